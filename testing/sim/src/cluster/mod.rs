//! A whole cluster under one virtual clock: the composition of engines, disks, network, control log,
//! leases, clients and checkers. Run by `run`; owns all state of a run.
//!
//! Everything that happens is an `Event` of the queue, handled to its end. An engine's effects are
//! carried out at once and in order (`effects`); their consequences are new events. The other
//! modules of this folder are further `impl` blocks, one per concern.

mod effects;
mod govern;
mod last_disk;
mod load;
mod machine;
mod managed;
mod operator;
mod paths;
mod replicas;
mod rot;
mod second;
mod split;
mod trouble;
mod verify;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use relevo_replication::{Engine, EngineConfig, Input, lab::Lab};
use relevo_types::{
    BLOCK_SIZE, Instance, LeaseGeneration, LineageId, NodeId, Time,
    cluster::{Command, VolumeOptions},
};

use crate::{
    check::{
        HEALS, Verdict, Violation,
        cold::ColdRegions,
        linear::{History, Tick},
        lower_epoch::LowerEpoch,
        one_writer::OneWriter,
    },
    control::{CLUSTER, Control, VOLUME},
    coverage::Marks,
    disk::Disk,
    lease::{Leases, Reach},
    net::{Arrival, ConnId, Head, Index, Network, Plane},
    paths::PathNet,
    queue::Queue,
    rng::Rng,
    scenario::Scenario,
    second::{Blow, Point, Victim},
    trace::Trace,
};

use load::Load;
use machine::{Crash, Machine, Process};
use managed::News;

/// Trouble of a run, all rounds: another seed shows more than more of the same.
const TROUBLE_MAX: Duration = Duration::from_millis(1200);

/// Events of a run at most; the longest of 1,500 had 54,000. What goes round in circles would eat all memory.
const EVENTS_MAX: u64 = 1_000_000;

/// Something that will happen.
#[derive(Debug)]
enum Event {
    /// Look at the head of a queue of the network.
    Arrive(Head),
    /// A side learns that its connection is up.
    TellUp(ConnId, usize),
    /// A side learns that its connection is gone.
    TellDown(ConnId, usize),
    /// Two data nodes connect if they need to.
    Connect(Index, Index),
    /// A disk operation ends.
    DiskDone {
        node: Index,
        incarnation: u64,
        op: relevo_replication::OpId,
        fails: bool,
    },
    /// An engine's deadline, by its own clock.
    Tick {
        node: Index,
        incarnation: u64,
        deadline: Time,
    },
    /// A proposal reaches the log.
    Commit {
        by: Index,
        incarnation: u64,
        command: Box<Command>,
    },
    /// A node learns what was committed, up to a state of that number.
    Learn { node: Index, number: usize },
    /// A node sends its heartbeats and looks at its grants.
    Heartbeat(Index),
    /// A node's manager looks around.
    Manage(Index),
    /// A real manager gets an input.
    Manager {
        node: Index,
        incarnation: u64,
        news: News,
    },
    /// A proposal of a real manager reaches the leader of the log.
    CommitManaged {
        by: Index,
        incarnation: u64,
        id: relevo_node::ProposalId,
        command: Box<Command>,
    },
    /// The log looks for a leader.
    Elect,
    /// The oldest order to a part of a service is carried out.
    PartDone {
        node: Index,
        incarnation: u64,
        service: relevo_types::ServiceId,
    },
    /// A client does its next thing.
    Client(usize),
    /// The next fault.
    Trouble,
    /// What was to be saved is.
    Saved {
        node: Index,
        incarnation: u64,
        id: relevo_replication::SaveId,
    },
    /// A node starts its daemon.
    Start(Index),
    /// A stopped process goes on.
    Resume(Index),
    /// Directions of the network heal.
    Heal(Vec<(Plane, Index, Index)>),
    /// Directions of a path carry heartbeats again.
    MendPath(Vec<(&'static str, Index, Index)>),
    /// An operator gives an order to an engine.
    Order {
        node: Index,
        order: relevo_replication::Order,
    },
    /// An operator looks how far the replacement of a replica is.
    Replaced,
    /// An operator asks for the service to be on a node, which first got what it lacked.
    MoveService(Index),
    /// Something breaks at a point of recovery between two nodes.
    SecondFault {
        point: Point,
        between: (Index, Index),
        victim: Victim,
        blow: Blow,
    },
    /// What a second fault cut heals.
    SecondOver(Vec<(Plane, Index, Index)>),
    /// The workload holds back for a moment.
    Hush,
    /// The workload goes on.
    Loud,
}

/// Which part of a round is running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Faults and workload.
    Trouble,
    /// No faults; workload.
    Healing,
    /// No faults, no workload.
    Settling,
}

/// What a run gives when nothing was broken.
#[derive(Debug, Default)]
pub struct Summary {
    /// The situations it reached.
    pub marks: Marks,
    /// Events handled.
    pub events: u64,
    /// Requests that were answered well.
    pub answered: u64,
    /// Disk effects by node.
    pub disk_effects: Vec<u64>,
}

/// A cluster.
#[derive(Debug)]
pub struct Cluster {
    scenario: Scenario,
    queue: Queue<Event>,
    /// Room for what an engine asks for next.
    effects: Vec<relevo_replication::Effect>,
    chance: Chance,
    net: Network,
    paths: PathNet,
    control: Control,
    leases: Leases,
    machines: Vec<Machine>,
    load: Load,
    history: History,
    one_writer: OneWriter,
    marks: Marks,
    trace: Trace,
    phase: Phase,
    /// Since when something is waited for that faults do not disturb: the longer, the longer clients think.
    waits_since: Option<Time>,
    /// The last cut of the network by a fault is over by then.
    cuts_over: Time,
    /// Clients hold back until told.
    quiet: bool,
    /// Since when they do.
    quiet_since: Time,
    /// The replicas were compared since the clients began to hold back.
    compared: bool,
    /// Failed disks are being repaired.
    repairing: bool,
    last_order: u64,
    /// What a disk altered by itself, until it is repaired.
    rotten: Option<rot::Rotten>,
    replaced: Option<replicas::Replaced>,
    second: second::Second,
    /// Whose disk is the last one that works, or did: nobody repairs any.
    last_disk: Option<Index>,
    /// Whose reign is of a history that is not in force any more: clients stay away until they open anew.
    severed: BTreeSet<Index>,
    /// Whose history was in force and gave way, by itself or by a policy.
    went_back: BTreeSet<Index>,
    /// Whose replica was made the volume and did not open since.
    heir: Option<split::Heir>,
    /// Who shall be primary, by the operator's last wish.
    target: Option<NodeId>,
    /// A part or a disk failed: a person has to say `service start` after the repair. Layer 2.
    person_needed: bool,
    /// Who leads the log. Layer 2.
    leader: Option<Index>,
    /// When the last leave was committed.
    last_leave: Tick,
    /// Who opened last.
    last_open: Option<Index>,
}

/// The streams of chance, one a concern.
#[derive(Debug)]
struct Chance {
    disk: Rng,
    net: Rng,
    node: Rng,
    load: Rng,
    trouble: Rng,
}

/// The network and machines as the lease oracle sees them.
struct View<'a> {
    machines: &'a [Machine],
    net: &'a Network,
}

impl Reach for View<'_> {
    fn runs(&self, node: Index) -> bool {
        self.machines[node].acts()
    }

    fn reaches(&self, from: Index, to: Index) -> bool {
        self.net.is_open(Plane::Control, from, to)
    }
}

impl Cluster {
    /// A cluster at rest, its volume created, its daemons about to start.
    ///
    /// # Errors
    /// The setting up failed.
    pub fn new(scenario: Scenario, trace: Trace) -> Result<Self, Violation> {
        let seed = scenario.seed;
        let setup = |what: String| Violation::new("set up", what);
        let mut node_chance = Rng::new(seed, 3);
        let lineage = LineageId(node_chance.id());
        let control = Control::new(
            &scenario.protocols[..scenario.data_nodes],
            scenario.witness,
            scenario.blocks * BLOCK_SIZE,
            lineage,
            scenario.sensitivity,
        )
        .and_then(|control| {
            let (on_io_error, disk_timeout) = scenario.disk_trouble;
            control.with_options(VolumeOptions {
                congestion: scenario.congestion,
                on_no_quorum: scenario.on_no_quorum,
                csums: scenario.csums,
                sync_rate: scenario.sync_rate,
                on_io_error,
                on_no_data: scenario.on_no_data,
                disk_timeout,
                ..VolumeOptions::default()
            })
        })
        .map_err(|rejection| setup(rejection.to_string()))?;
        let control = if scenario.managed {
            control
                .with_paths(&scenario.paths)
                .and_then(Control::with_service)
                .map_err(|rejection| setup(rejection.to_string()))?
        } else {
            control
        };
        let mut machines = Vec::new();
        for index in 0..scenario.nodes() {
            let id = node_id(index);
            let disk = if index < scenario.data_nodes {
                backing(
                    &scenario,
                    id,
                    &control,
                    lineage,
                    relevo_format::Start::Zeroes,
                )
                .map_err(setup)?
            } else {
                (Disk::new(0), None)
            };
            // Boot times differ by up to some hours: nobody may compare moments of two machines.
            let offset = Duration::from_millis(node_chance.below(10_000_000));
            machines.push(Machine::new(id, disk, control.newest(), offset));
        }
        let mut one_writer = OneWriter::default();
        one_writer.committed(control.volume());
        trace.begin(scenario.nodes());
        let mut cluster = Self {
            queue: Queue::default(),
            effects: Vec::new(),
            chance: Chance {
                disk: Rng::new(seed, 1),
                net: Rng::new(seed, 2),
                node: node_chance,
                load: Rng::new(seed, 4),
                trouble: Rng::new(seed, 5),
            },
            net: Network::new(scenario.nodes()),
            paths: PathNet::new(seed, scenario.paths.clone()),
            control,
            leases: Leases::new(scenario.nodes(), scenario.sensitivity.timing()),
            machines,
            load: Load::new(),
            history: History::default(),
            one_writer,
            marks: Marks::default(),
            trace,
            phase: Phase::Trouble,
            waits_since: None,
            cuts_over: Time::ZERO,
            quiet: false,
            quiet_since: Time::ZERO,
            compared: false,
            repairing: false,
            last_order: 0,
            rotten: None,
            replaced: None,
            second: second::Second::new(seed),
            severed: BTreeSet::new(),
            went_back: BTreeSet::new(),
            heir: None,
            target: None,
            person_needed: false,
            last_disk: None,
            leader: None,
            last_leave: Tick(0),
            last_open: None,
            scenario,
        };
        cluster.enter_first_events();
        Ok(cluster)
    }

    fn enter_first_events(&mut self) {
        let nodes = self.scenario.nodes();
        for index in 0..nodes {
            let delay = self.chance.node.millis(0, 20);
            self.queue.after(delay, Event::Start(index));
            if !self.scenario.managed {
                self.queue.after(delay, Event::Heartbeat(index));
            }
            self.queue.after(delay, Event::Manage(index));
        }
        for a in 0..self.scenario.data_nodes {
            for b in a + 1..self.scenario.data_nodes {
                let delay = self.chance.net.millis(1, 30);
                self.queue.after(delay, Event::Connect(a, b));
            }
        }
        if self.scenario.managed {
            self.queue.after(Duration::from_millis(30), Event::Elect);
        }
        self.queue.after(Duration::from_millis(200), Event::Hush);
        for client in 0..self.scenario.clients {
            self.queue
                .after(Duration::from_millis(10), Event::Client(client));
        }
    }

    /// Runs to the end: rounds of trouble and healing.
    ///
    /// # Errors
    /// The first broken promise.
    pub fn run(&mut self) -> Verdict {
        let rounds = self.scenario.rounds;
        let trouble = self.scenario.trouble;
        let trouble = trouble.min(TROUBLE_MAX / u32::try_from(rounds).unwrap_or(1));
        for round in 0..rounds {
            self.trace.all(self.queue.now(), || {
                format!("round {round}: trouble begins")
            });
            self.phase = Phase::Trouble;
            self.waits_since = None;
            let first = self
                .chance
                .trouble
                .time(Duration::ZERO, self.scenario.fault_every * 2);
            self.queue
                .after(first + Duration::from_millis(100), Event::Trouble);
            let until = self.queue.now() + trouble;
            self.run_until(until)?;
            self.heal()?;
            if self.scenario.hang_one {
                self.hang_one()?;
            }
            self.settle()?;
            if self.scenario.rot {
                self.rot_one()?;
            }
            if self.scenario.last_disk {
                self.fail_last_disk()?;
            }
        }
        if self.scenario.split {
            self.split_brain()?;
        }
        Ok(())
    }

    /// What the run did.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            marks: self.all_marks(),
            events: self.queue.entered(),
            answered: self.load.answered,
            disk_effects: self
                .machines
                .iter()
                .map(|machine| machine.disk_effects)
                .collect(),
        }
    }

    fn all_marks(&self) -> Marks {
        let mut marks = self.marks.clone();
        if self.history.lost_with_power() > 0 {
            marks.reached("an unflushed write was lost with the power");
        }
        marks
    }

    /// The moment, for messages.
    #[must_use]
    pub const fn now(&self) -> Time {
        self.queue.now()
    }

    fn run_until(&mut self, until: Time) -> Verdict {
        while self.queue.now() < until {
            self.step()?;
        }
        Ok(())
    }

    /// Handles the next event.
    fn step(&mut self) -> Verdict {
        let Some(event) = self.queue.take() else {
            return Err(Violation::new("set up", "the queue is empty"));
        };
        if self.queue.entered() > EVENTS_MAX {
            return Err(Violation::new(
                HEALS,
                "more and more happens, and time stands still",
            ));
        }
        self.handle(event)?;
        self.look_when_quiet()
    }

    fn handle(&mut self, event: Event) -> Verdict {
        match event {
            Event::Arrive(head) => self.arrive(head),
            Event::TellUp(conn, side) => match self.net.tell_up(conn, side) {
                Some((node, peer)) => self.feed(
                    node,
                    Input::LinkUp {
                        peer: node_id(peer),
                    },
                ),
                None => Ok(()),
            },
            Event::TellDown(conn, side) => match self.net.tell_down(conn, side) {
                Some((node, peer)) => self.feed(
                    node,
                    Input::LinkDown {
                        peer: node_id(peer),
                    },
                ),
                None => Ok(()),
            },
            Event::Connect(a, b) => {
                self.connect(a, b);
                Ok(())
            }
            Event::DiskDone {
                node,
                incarnation,
                op,
                fails,
            } => self.disk_done(node, incarnation, op, fails),
            Event::Tick {
                node,
                incarnation,
                deadline,
            } => self.tick_due(node, incarnation, deadline),
            Event::Commit {
                by,
                incarnation,
                command,
            } => {
                self.commit(by, incarnation, &command);
                Ok(())
            }
            Event::Learn { node, number } => self.learn(node, number),
            Event::Heartbeat(node) => self.heartbeat(node),
            Event::Manage(node) => self.manage(node),
            Event::Manager {
                node,
                incarnation,
                news,
            } => self.manager_news(node, incarnation, news),
            Event::CommitManaged {
                by,
                incarnation,
                id,
                command,
            } => self.commit_managed(by, incarnation, id, &command),
            Event::Elect => {
                self.elect();
                Ok(())
            }
            Event::PartDone {
                node,
                incarnation,
                service,
            } => self.part_done(node, incarnation, service),
            Event::Client(client) => self.client(client),
            Event::Trouble => self.trouble(),
            Event::Saved {
                node,
                incarnation,
                id,
            } if self.machines[node].incarnation() == incarnation => {
                self.feed(node, Input::Saved { id, result: Ok(()) })
            }
            Event::Saved { .. } => Ok(()),
            Event::Start(node) => self.start(node),
            Event::Resume(node) => self.resume(node),
            Event::Replaced => self.replace_replica(),
            Event::MoveService(node) => {
                // The operator gives up when it takes too long.
                if self.phase == Phase::Trouble {
                    self.move_service(node);
                }
                Ok(())
            }
            Event::MendPath(ways) => {
                // Not while a node is cut off on purpose.
                if self.severed.is_empty() {
                    self.paths.mend(&ways);
                }
                Ok(())
            }
            Event::Order { node, order } => self.order(node, order),
            // Not while a node is cut off on purpose.
            Event::Heal(_) if !self.severed.is_empty() => Ok(()),
            Event::SecondFault {
                point,
                between,
                victim,
                blow,
            } => self.second_fault(point, between, victim, blow),
            Event::Heal(directions) | Event::SecondOver(directions) => {
                for (plane, from, to) in directions {
                    self.net.set_open(plane, from, to, true);
                }
                self.look_at_all_queues();
                Ok(())
            }
            Event::Hush => {
                self.hush();
                Ok(())
            }
            Event::Loud => {
                self.quiet = false;
                Ok(())
            }
        }
    }

    fn arrive(&mut self, head: Head) -> Verdict {
        let (got, again) = self.net.arrive(head, self.queue.now());
        if let Some(again) = again {
            self.queue.at(again, Event::Arrive(head));
        }
        let Some(got) = got else {
            return Ok(());
        };
        for arrival in got.arrivals {
            let peer = node_id(got.from);
            self.feed(
                got.to,
                match arrival {
                    Arrival::Up => Input::LinkUp { peer },
                    Arrival::Down => Input::LinkDown { peer },
                    Arrival::Message(message) => Input::Message {
                        peer,
                        message: *message,
                    },
                },
            )?;
        }
        Ok(())
    }

    fn look_at_all_queues(&mut self) {
        for head in self.net.heads() {
            self.queue.after(Duration::ZERO, Event::Arrive(head));
        }
    }

    /// Two data nodes connect if both daemons run and the network lets them; looks again later.
    fn connect(&mut self, a: Index, b: Index) {
        let again = self.chance.net.millis(5, 60);
        self.queue.after(again, Event::Connect(a, b));
        let possible = self.machines[a].acts()
            && self.machines[b].acts()
            && self.net.is_open(Plane::Data, a, b)
            && self.net.is_open(Plane::Data, b, a);
        if !possible || !self.net.wants_connection(a, b) {
            return;
        }
        if self.net.is_linked(a, b) || self.net.is_linked(b, a) {
            self.marks.reached("link replaced without a word");
        }
        let conn = self.net.connect(a, b);
        for side in 0..2 {
            let delay = self.chance.net.micros(50, 3000);
            self.queue.after(delay, Event::TellUp(conn, side));
        }
    }

    /// Starts a node's daemon if it does not run.
    fn start(&mut self, node: Index) -> Verdict {
        let now = self.queue.now();
        if self.machines[node].process.is_some() {
            return Ok(());
        }
        self.trace.node(now, node, || "start".to_owned());
        self.leases.started(node, now);
        let has_replica = node < self.scenario.data_nodes && self.machines[node].has_replica;
        let lab = Lab {
            hot_regions_max: self.scenario.active_regions,
            planted: self.scenario.planted.map(|planted| planted.0),
        };
        let engine = has_replica.then(|| Engine::with_lab(self.engine_config(node), lab));
        let machine = &mut self.machines[node];
        machine.incarnations += 1;
        let volume = Arc::new(machine.known_volume().clone());
        machine.process = Some(Process {
            engine,
            manager: None,
            incarnation: machine.incarnations,
            inbox: std::collections::VecDeque::new(),
            tick_at: Time::NEVER,
            open: None,
            attached: false,
            disk_failed: false,
            detaching: false,
            stepping_down: false,
            started: now,
            syncing: false,
            sync_paused: false,
            sync_held: false,
            lower_epoch: LowerEpoch::default(),
        });
        if has_replica {
            self.fail_early(node);
            let other = self.open_primary().filter(|primary| *primary != node);
            self.at_point(Point::Attach, node, other.unwrap_or(node));
            self.feed(node, Input::Attach)?;
            if !self.scenario.managed {
                self.feed(node, Input::Config(volume))?;
            }
        }
        self.start_manager(node)
    }

    fn engine_config(&mut self, node: Index) -> EngineConfig {
        let timing = self.scenario.sensitivity.timing();
        EngineConfig {
            cluster: CLUSTER,
            volume: VOLUME,
            node: node_id(node),
            instance: Instance(self.chance.node.id()),
            backing_size: self.machines[node].disk.size(),
            link_timeout: timing.dead,
            ping_interval: timing.heartbeat * 2,
            reconcile_grace: timing.suspect,
            resync_window: 1 << 20,
        }
    }

    fn resume(&mut self, node: Index) -> Verdict {
        let now = self.queue.now();
        if self.machines[node]
            .paused_until
            .is_none_or(|until| until > now)
        {
            return Ok(());
        }
        self.trace.node(now, node, || "goes on".to_owned());
        self.machines[node].paused_until = None;
        let mut inbox = match &mut self.machines[node].process {
            Some(process) => std::mem::take(&mut process.inbox),
            None => return Ok(()),
        };
        let incarnation = self.machines[node].incarnation();
        // A process that was stopped finds its timers due first.
        self.tick(node, incarnation)?;
        while let Some(input) = inbox.pop_front() {
            if self.machines[node].incarnation() != incarnation {
                break;
            }
            self.feed(node, input)?;
        }
        self.resume_manager(node)
    }

    /// A node's lease generation as it knows it.
    fn generation(&self, node: Index) -> LeaseGeneration {
        let machine = &self.machines[node];
        machine
            .known
            .1
            .nodes
            .get(&machine.id)
            .map_or(LeaseGeneration(0), |node| node.lease.generation)
    }
}

/// The id of the node at a position.
fn node_id(index: Index) -> NodeId {
    NodeId(u32::try_from(index).unwrap_or(u32::MAX - 1) + 1)
}

/// The position of a node.
const fn index_of(node: NodeId) -> Index {
    node.0 as usize - 1
}

/// A disk with a replica that was just created.
fn backing(
    scenario: &Scenario,
    node: NodeId,
    control: &Control,
    lineage: LineageId,
    start: relevo_format::Start,
) -> Result<(Disk, Option<ColdRegions>), String> {
    let layout = relevo_format::Layout::new(scenario.blocks * BLOCK_SIZE)
        .map_err(|error| error.to_string())?;
    let replica = relevo_format::Replica {
        identity: relevo_format::Identity {
            cluster: CLUSTER,
            volume: VOLUME,
            node,
        },
        slot: control.volume().slot(node).ok_or("no slot")?,
        lineage,
    };
    let mut disk = Disk::new(layout.backing_size());
    for (offset, bytes) in relevo_format::create(&replica, &layout, start) {
        disk.install(offset, &bytes.into());
    }
    let cold = ColdRegions::new(layout, replica.identity.tag());
    Ok((disk, Some(cold)))
}
