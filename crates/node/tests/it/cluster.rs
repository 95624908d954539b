//! Node managers under one virtual clock, with a control log that commits in a few milliseconds
//! while a majority is up, engines that open and close as the configuration says, and agents that
//! do what they are told.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use relevo_node::{
    Effect, Input, Node, NodeConfig, PartAction, PartOrder, ProposalId, ProposalResult, VolumeOrder,
};
use relevo_replication::io::{DiskState, EngineStatus, VolumeEvent};
use relevo_types::{
    ClusterId, Epoch, Instance, LeaseGeneration, LineageId, NodeId, Sensitivity, ServiceId, Time,
    VolumeId,
    cluster::{
        AddressPart, ClusterState, Command, JoinToken, NodeKind, NodePath, NodeSpec, Part,
        Placement, Ports, ProcessPart, Protocol, ReplicaSpec, ServiceSpec, VolumeChange,
        VolumePart,
    },
};

pub(crate) const A: NodeId = NodeId(1);
pub(crate) const B: NodeId = NodeId(2);
pub(crate) const W: NodeId = NodeId(3);
pub(crate) const V: VolumeId = VolumeId(1);
pub(crate) const MAIL: ServiceId = ServiceId(1);

/// Milliseconds that things take.
const NETWORK_MS: u64 = 1;
const COMMIT_MS: u64 = 4;
const PERSIST_MS: u64 = 2;
const AGENT_MS: u64 = 5;
const ENGINE_MS: u64 = 10;

fn ms(value: u64) -> Time {
    Time(value * 1_000_000)
}

enum Event {
    Tick(u64),
    Input(Input),
    /// A proposal reaches the leader.
    Commit(NodeId, ProposalId, Command),
    /// The engine of a volume gets around to it.
    Engine(VolumeId),
    EngineDemote(VolumeId),
}

struct Machine {
    node: Node,
    wakeup: u64,
    instance: u64,
    engines: BTreeMap<VolumeId, EngineStatus>,
    configs: BTreeMap<VolumeId, Arc<relevo_types::cluster::Volume>>,
    /// Parts that are active, as the agents know.
    active: BTreeSet<(ServiceId, usize)>,
}

pub(crate) struct Cluster {
    pub(crate) now: u64,
    queue: BinaryHeap<Reverse<(u64, u64, u32)>>,
    events: BTreeMap<u64, (NodeId, u64, Event)>,
    count: u64,
    machines: BTreeMap<NodeId, Machine>,
    condemned: BTreeMap<NodeId, Vec<(NodeId, LeaseGeneration)>>,
    instances: u64,
    pub(crate) state: ClusterState,
    pub(crate) leader: Option<NodeId>,
    /// Cut off from all others.
    pub(crate) cut: BTreeSet<NodeId>,
    /// Agents whose start of a part fails: node and index.
    pub(crate) start_fails: BTreeMap<(NodeId, usize), String>,
    /// Agents that don't answer a stop with manners.
    pub(crate) stop_resists: BTreeSet<(NodeId, usize)>,
    /// What was ordered and committed: milliseconds, node, words.
    pub(crate) trace: Vec<(u64, NodeId, String)>,
    pub(crate) done: BTreeSet<NodeId>,
}

fn spec(name: &str, kind: NodeKind) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        kind,
        paths: vec![NodePath {
            name: "lan".to_owned(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            replication: false,
        }],
        streams: Vec::new(),
        ports: Ports::default(),
    }
}

/// Data nodes a and b and the witness w, the volume and the service `mail`.
fn initial() -> ClusterState {
    let mut state = ClusterState::default();
    let init = Command::Init {
        cluster: ClusterId([3; 16]),
        name: "test".to_owned(),
        sensitivity: Sensitivity::Normal,
        node: spec("a", NodeKind::Data),
    };
    state.apply(&init).unwrap();
    for (name, kind) in [("b", NodeKind::Data), ("w", NodeKind::Witness)] {
        let token = JoinToken {
            kind: None,
            expires_unix_s: 1,
        };
        let hash = name.to_owned();
        let create = Command::CreateToken { hash, token };
        state.apply(&create).unwrap();
        let join = Command::Join {
            hash: name.to_owned(),
            now_unix_s: 0,
            node: spec(name, kind),
        };
        state.apply(&join).unwrap();
    }
    for node in [A, B, W] {
        let expect = state.voters_version;
        state.apply(&Command::AdmitVoter { node, expect }).unwrap();
    }
    state
}

fn mail_parts() -> Vec<Part> {
    vec![
        Part::Volume(VolumePart {
            volume: V,
            device: true,
        }),
        Part::Process(ProcessPart {
            command: vec!["/bin/serve".to_owned()],
            environment: BTreeMap::new(),
            directory: None,
            ready: None,
        }),
        Part::Address(AddressPart {
            address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            prefix: 24,
            interface: None,
        }),
    ]
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let mut cluster = Self {
            now: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            count: 0,
            machines: BTreeMap::new(),
            condemned: BTreeMap::new(),
            instances: 0,
            state: initial(),
            leader: Some(W),
            cut: BTreeSet::new(),
            start_fails: BTreeMap::new(),
            stop_resists: BTreeSet::new(),
            trace: Vec::new(),
            done: BTreeSet::new(),
        };
        for node in [A, B, W] {
            cluster.boot(node);
        }
        cluster
    }

    /// A cluster in which `mail` runs on a.
    pub(crate) fn running() -> Self {
        let mut cluster = Self::new();
        cluster.run(500);
        cluster.command(&Command::CreateVolume {
            name: "mail".to_owned(),
            size: 1 << 20,
            lineage: LineageId(5),
            replicas: [A, B]
                .map(|node| ReplicaSpec {
                    node,
                    protocol: Protocol::C,
                    backing: None,
                    force: false,
                })
                .to_vec(),
        });
        cluster.run(200);
        cluster.command(&Command::CreateService {
            spec: ServiceSpec {
                name: "mail".to_owned(),
                parts: mail_parts(),
            },
            placement: Placement::default(),
            target: None,
        });
        cluster.run(500);
        assert!(cluster.serves(A), "{}", cluster.story(0));
        cluster
    }

    /// Every part of `mail` is active on the node and on no other.
    pub(crate) fn serves(&self, node: NodeId) -> bool {
        self.machines.iter().all(|(id, machine)| {
            let wanted = if *id == node { 3 } else { 0 };
            machine.active.len() == wanted
        }) && self.state.services[&MAIL].holder == Some(node)
    }

    /// The trace from a moment on, a line each.
    pub(crate) fn story(&self, from_ms: u64) -> String {
        let mut text = String::new();
        for (at, node, words) in &self.trace {
            if *at >= from_ms {
                text.push_str(&format!("{at} {node} {words}\n"));
            }
        }
        text
    }

    /// The words of a node's trace from a moment on.
    pub(crate) fn words(&self, node: NodeId, from_ms: u64) -> Vec<&str> {
        let mine = self
            .trace
            .iter()
            .filter(|(at, n, _)| *n == node && *at >= from_ms);
        mine.map(|(_, _, words)| words.as_str()).collect()
    }

    pub(crate) fn node(&self, node: NodeId) -> &Node {
        &self.machines[&node].node
    }

    /// Starts a node's process.
    pub(crate) fn boot(&mut self, id: NodeId) {
        self.instances += 1;
        let state = &self.state;
        let local_replicas = state
            .volumes
            .values()
            .filter(|volume| volume.replicas.contains_key(&id))
            .map(|volume| volume.id)
            .collect();
        let config = NodeConfig {
            me: id,
            instance: Instance(self.instances),
            timing: Sensitivity::Normal.timing(),
            condemned: self.condemned.get(&id).cloned().unwrap_or_default(),
            local_replicas,
            memory_mib: None,
            voters_told: 0,
        };
        let machine = Machine {
            node: Node::new(config, ms(self.now)),
            wakeup: 0,
            instance: self.instances,
            engines: BTreeMap::new(),
            configs: BTreeMap::new(),
            active: BTreeSet::new(),
        };
        self.machines.insert(id, machine);
        let state = Arc::new(self.state.clone());
        self.input(id, Input::State(state));
        let leader = self.leader;
        self.input(id, Input::Leader(leader));
    }

    /// Power loss: the node and all it ran are gone.
    pub(crate) fn kill(&mut self, id: NodeId) {
        self.machines.remove(&id);
    }

    /// The node's process dies alone: what it started goes on until something stops it.
    pub(crate) fn crash_and_restart(&mut self, id: NodeId) {
        let active = self.machines.remove(&id).map(|machine| machine.active);
        self.boot(id);
        let machine = self.machines.get_mut(&id).unwrap();
        machine.active = active.unwrap_or_default();
    }

    /// Another node leads the control log from now on.
    pub(crate) fn elect(&mut self, leader: NodeId) {
        self.leader = Some(leader);
        for id in self.machines.keys().copied().collect::<Vec<_>>() {
            if !self.cut.contains(&id) {
                self.input(id, Input::Leader(Some(leader)));
            }
        }
    }

    /// Commits a command at once and tells everyone who can be reached.
    pub(crate) fn command(&mut self, command: &Command) -> ProposalResult {
        let result = match self.state.apply(command) {
            Ok(outcome) => ProposalResult::Applied(outcome),
            Err(rejection) => ProposalResult::Rejected(rejection),
        };
        let state = Arc::new(self.state.clone());
        for id in self.machines.keys().copied().collect::<Vec<_>>() {
            if !self.cut.contains(&id) {
                self.after(
                    NETWORK_MS,
                    id,
                    Event::Input(Input::State(Arc::clone(&state))),
                );
            }
        }
        result
    }

    pub(crate) fn tell_all_state(&mut self) {
        let state = Arc::new(self.state.clone());
        for id in self.machines.keys().copied().collect::<Vec<_>>() {
            self.input(id, Input::State(Arc::clone(&state)));
        }
    }

    /// An engine of a node tells something by itself.
    pub(crate) fn engine_event(
        &mut self,
        id: NodeId,
        change: impl FnOnce(&mut EngineStatus),
        event: VolumeEvent,
    ) {
        let machine = self.machines.get_mut(&id).unwrap();
        let status = machine.engines.get_mut(&V).unwrap();
        change(status);
        let status = status.clone();
        self.input(
            id,
            Input::Volume {
                volume: V,
                event: Some(event),
                status,
            },
        );
    }

    /// Fails the part that was started last at this index.
    pub(crate) fn part_fails(&mut self, id: NodeId, order: relevo_node::OrderId, reason: &str) {
        let reason = reason.to_owned();
        self.input(id, Input::PartFailed { order, reason });
    }

    pub(crate) fn run(&mut self, for_ms: u64) {
        let end = self.now + for_ms;
        while let Some(Reverse((at, _, _))) = self.queue.peek()
            && *at <= end
        {
            let Some(Reverse((at, number, _))) = self.queue.pop() else {
                break;
            };
            self.now = at;
            if let Some((node, instance, event)) = self.events.remove(&number) {
                self.step(node, instance, event);
            }
        }
        self.now = end;
    }

    /// Runs until it is so; the milliseconds that took.
    pub(crate) fn run_until(&mut self, limit_ms: u64, so: impl Fn(&Self) -> bool) -> u64 {
        let from = self.now;
        while !so(self) {
            assert!(
                self.now < from + limit_ms,
                "not within {limit_ms} ms:\n{}",
                self.story(from)
            );
            self.run(1);
        }
        self.now - from
    }

    fn after(&mut self, ms: u64, node: NodeId, event: Event) {
        self.count += 1;
        let instance = self.machines.get(&node).map_or(0, |m| m.instance);
        self.events.insert(self.count, (node, instance, event));
        self.queue
            .push(Reverse((self.now + ms, self.count, node.0)));
    }

    fn step(&mut self, id: NodeId, instance: u64, event: Event) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        if machine.instance != instance {
            return;
        }
        match event {
            Event::Tick(wakeup) => {
                if machine.wakeup == wakeup {
                    self.input(id, Input::Tick);
                }
            }
            Event::Input(input) => self.input(id, input),
            Event::Commit(from, proposal, command) => {
                let up = self.machines.keys().filter(|node| !self.cut.contains(node));
                let leads = self.leader.is_some_and(|leader| {
                    self.machines.contains_key(&leader) && !self.cut.contains(&leader)
                });
                let result = if up.count() >= 2 && leads && !self.cut.contains(&from) {
                    let result = self.command(&command);
                    let fate = match &result {
                        ProposalResult::Applied(_) => String::new(),
                        other => format!(" {other:?}"),
                    };
                    self.trace
                        .push((self.now, from, format!("commit {}{fate}", brief(&command))));
                    result
                } else {
                    ProposalResult::Lost("no leader".to_owned())
                };
                let done = Input::ProposalDone {
                    id: proposal,
                    result,
                };
                self.after(NETWORK_MS, from, Event::Input(done));
            }
            Event::Engine(volume) => self.engine(id, volume),
            Event::EngineDemote(volume) => {
                let config = &machine.configs[&volume];
                if config.primary == Some(id) {
                    let command = Command::Volume {
                        volume,
                        expect: config.epoch,
                        change: VolumeChange::Demote { node: id },
                    };
                    self.after(COMMIT_MS, id, Event::Commit(id, ProposalId(0), command));
                }
            }
        }
    }

    /// The engine follows its configuration.
    fn engine(&mut self, id: NodeId, volume: VolumeId) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let config = machine.configs[&volume].clone();
        let status = machine.engines.entry(volume).or_insert(EngineStatus {
            open: false,
            disk: DiskState::Attaching,
            epoch: Epoch(0),
            certain: true,
            in_flight: 0,
            held: false,
            waiting: None,
            peers: BTreeMap::new(),
            behind: BTreeMap::new(),
            sync_speeds: BTreeMap::new(),
            sync_same: BTreeMap::new(),
            sync_limit: None,
            sync_after: None,
            splits: BTreeMap::new(),
        });
        if status.disk == DiskState::Failed {
            return;
        }
        let primary = config.primary == Some(id);
        let event = match (status.open, primary) {
            (false, true) => Some(VolumeEvent::Opened {
                epoch: config.epoch,
            }),
            (true, false) => Some(VolumeEvent::Closed {
                reason: format!("epoch {} has no primary here", config.epoch),
            }),
            _ => None,
        };
        status.open = primary;
        status.epoch = config.epoch;
        status.disk = if config.in_sync.contains(&id) {
            DiskState::UpToDate
        } else {
            DiskState::Outdated
        };
        let input = Input::Volume {
            volume,
            event,
            status: status.clone(),
        };
        self.input(id, input);
    }

    pub(crate) fn input(&mut self, id: NodeId, input: Input) {
        let now = ms(self.now);
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let mut out = Vec::new();
        machine.node.handle(now, input, &mut out);
        machine.wakeup += 1;
        let wakeup = machine.wakeup;
        let deadline = machine.node.deadline();
        assert!(
            deadline > now,
            "{id} would be driven at {now:?} for ever: {:?}",
            machine.node.status()
        );
        for effect in out {
            self.carry_out(id, effect);
        }
        if deadline != Time::NEVER {
            let at = deadline.0.div_ceil(1_000_000);
            self.after(at - self.now, id, Event::Tick(wakeup));
        }
    }

    fn carry_out(&mut self, id: NodeId, effect: Effect) {
        match effect {
            Effect::SendHeartbeat {
                to,
                path,
                heartbeat,
            } => {
                if !self.cut.contains(&id) && !self.cut.contains(&to) {
                    let arrived = Input::Heartbeat { path, heartbeat };
                    self.after(NETWORK_MS, to, Event::Input(arrived));
                }
            }
            Effect::PersistCondemned { node, generation } => {
                self.condemned
                    .entry(id)
                    .or_default()
                    .push((node, generation));
                let done = Input::CondemnedPersisted { node, generation };
                self.after(PERSIST_MS, id, Event::Input(done));
            }
            Effect::Report { to, report } => {
                if !self.cut.contains(&id) && !self.cut.contains(&to) {
                    self.after(NETWORK_MS, to, Event::Input(Input::Report(report)));
                }
            }
            Effect::Propose {
                id: proposal,
                command,
                reason,
            } => {
                assert!(!reason.is_empty());
                self.after(COMMIT_MS, id, Event::Commit(id, proposal, command));
            }
            Effect::Volume { volume, order } => self.volume_order(id, volume, order),
            Effect::Part(order) => self.part_order(id, order),
            Effect::LeaseUntil(_) => {}
            Effect::LeaseLost => self.trace.push((self.now, id, "lease lost".to_owned())),
            Effect::VotersSettled(_) => {}
            Effect::Event(event) => {
                assert!(!event.what.is_empty() && !event.why.is_empty(), "{event:?}");
            }
            Effect::ShutdownDone => {
                self.trace.push((self.now, id, "shutdown done".to_owned()));
                self.done.insert(id);
            }
        }
    }

    fn volume_order(&mut self, id: NodeId, volume: VolumeId, order: VolumeOrder) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        match order {
            VolumeOrder::Config(config) => {
                machine.configs.insert(volume, config);
                self.after(ENGINE_MS, id, Event::Engine(volume));
            }
            VolumeOrder::Demote => {
                self.trace.push((self.now, id, "demote".to_owned()));
                self.after(ENGINE_MS, id, Event::EngineDemote(volume));
            }
            VolumeOrder::CreateReplica { .. } => {
                self.trace.push((self.now, id, "create replica".to_owned()));
                let done = Input::ReplicaCreated {
                    volume,
                    result: Ok(()),
                };
                self.after(AGENT_MS, id, Event::Input(done));
            }
            VolumeOrder::RemoveReplica => {
                self.trace.push((self.now, id, "remove replica".to_owned()));
            }
        }
    }

    fn part_order(&mut self, id: NodeId, order: PartOrder) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let key = (order.service, order.index);
        let kind = match &order.part {
            Part::Volume(_) => "export",
            Part::Mount(_) => "mount",
            Part::Address(_) => "address",
            Part::Process(_) => "process",
        };
        let (verb, result) = match order.what {
            PartAction::Start => match self.start_fails.get(&(id, order.index)) {
                Some(reason) => ("start", Err(reason.clone())),
                None => {
                    machine.active.insert(key);
                    ("start", Ok(()))
                }
            },
            PartAction::Stop { force: false } if self.stop_resists.contains(&(id, order.index)) => {
                ("stop", Err("it is busy".to_owned()))
            }
            PartAction::Stop { force } => {
                machine.active.remove(&key);
                (if force { "force" } else { "stop" }, Ok(()))
            }
        };
        self.trace.push((self.now, id, format!("{verb} {kind}")));
        let done = Input::PartDone {
            order: order.id,
            result,
        };
        self.after(AGENT_MS, id, Event::Input(done));
    }
}

fn brief(command: &Command) -> String {
    match command {
        Command::Evict { node, .. } => format!("evict {node}"),
        Command::Readmit { node, .. } => format!("readmit {node}"),
        Command::Acquire { node, .. } => format!("acquire {node}"),
        Command::Release { node, failure, .. } => match failure {
            Some(failure) => format!("release {node}: {failure}"),
            None => format!("release {node}"),
        },
        Command::Volume { change, .. } => match change {
            VolumeChange::Promote { node } => format!("promote {node}"),
            VolumeChange::PromoteUncertain { node } => format!("promote {node}, uncertain"),
            VolumeChange::Demote { node } => format!("demote {node}"),
            other => format!("{other:?}"),
        },
        Command::ReplicaCreated { node, .. } => format!("created {node}"),
        Command::SetTarget { target, .. } => format!("target {target:?}"),
        other => format!("{other:?}"),
    }
}
