//! A cluster of membership machines under one true time, each with its own drifting clock, and a
//! checker that knows everything.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

use relevo_membership::{
    Effect, Heartbeat, Input, Liveness, MemberConfig, Membership, PathConfig, Voters,
};
use relevo_types::{Instance, LeaseGeneration, NodeId, Time, Timing};

const MS: u64 = 1_000_000;

/// The networks of every node.
pub(crate) const NETWORKS: [&str; 2] = ["lan", "repl"];

/// A slow line between the first two nodes, and how long a heartbeat takes there at most.
const LINE: &str = "line";
const LINE_MS: u64 = 120;

/// A fault, at a true time in milliseconds.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Nothing gets from one node to the other; one way.
    Cut { from: u8, to: u8, ms: u64 },
    /// Nothing gets over one path, whoever sends.
    CutPath { path: &'static str, ms: u64 },
    /// Nothing gets to or from a node.
    Isolate { node: u8, ms: u64 },
    /// A share of all heartbeats is lost.
    Loss { percent: u8, ms: u64 },
    /// Heartbeats take up to that long.
    Delay { up_to_ms: u64, ms: u64 },
    /// The process does not run; what arrives meanwhile waits for it.
    Pause { node: u8, ms: u64 },
    /// A node votes from now on, or no more, as soon as another such change may follow the last one.
    Vote { node: u8 },
    /// A node learns of nothing that the control log decides.
    Lag { node: u8, ms: u64 },
    /// The process dies and starts again.
    Restart { node: u8, down_ms: u64 },
}

/// A planted bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Broken {
    /// The next change does not wait until the last one is settled.
    Hasty,
    /// Who knows less of who votes counts grants all the same.
    Blind,
}

/// What a run is made of.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) nodes: u8,
    /// The first ones vote at the beginning.
    pub(crate) voters: u8,
    /// A rule about changes of who votes that is broken on purpose.
    pub(crate) broken: Option<Broken>,
    /// Each node's clock gains that many thousandths.
    pub(crate) drift_permille: Vec<i64>,
    pub(crate) faults: Vec<(u64, Fault)>,
    pub(crate) seed: u64,
    pub(crate) timing: Timing,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Event {
    Tick {
        node: usize,
        wakeup: u64,
    },
    Arrive {
        node: usize,
        from: usize,
        message: usize,
    },
    Persisted {
        node: usize,
        life: u64,
        of: NodeId,
        generation: LeaseGeneration,
    },
    /// The node applies one more entry of the control log.
    Apply {
        node: usize,
    },
    Fault {
        index: usize,
    },
    Resume {
        node: usize,
    },
    Start {
        node: usize,
    },
}

struct Machine {
    /// `None` while the process is down.
    core: Option<Membership>,
    /// Counts its processes.
    life: u64,
    /// Only the tick that was armed last counts.
    wakeup: u64,
    paused: bool,
    /// What arrived during a pause.
    inbox: Vec<Input>,
    /// Durable.
    condemned: BTreeSet<(NodeId, LeaseGeneration)>,
    /// Entries of the control log that were applied; durable.
    applied: usize,
    /// It learns of nothing until then.
    lags_until: u64,
    /// The newest change of who votes that it was ever given; durable.
    voters_told: u64,
    /// The newest one that it says is settled.
    settled: u64,
    offset: u64,
    drift_permille: i64,
}

/// What the control log says after an entry.
#[derive(Clone)]
struct Standing {
    /// Generation, and whether it is evicted.
    nodes: BTreeMap<NodeId, (LeaseGeneration, bool)>,
    voters: BTreeSet<NodeId>,
    voters_version: u64,
}

impl Standing {
    fn majority(&self) -> usize {
        self.voters.len() / 2 + 1
    }
}

pub(crate) struct Cluster {
    plan: Plan,
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Event)>>,
    events: u64,
    machines: Vec<Machine>,
    messages: Vec<(String, Heartbeat)>,
    cuts: Vec<(usize, usize, u64)>,
    cut_paths: Vec<(&'static str, u64)>,
    loss: (u8, u64),
    delay: (u64, u64),
    /// The control log: the standing of all nodes after each entry.
    log: Vec<Standing>,
    /// Changes of who votes that wait.
    votes: Vec<NodeId>,
    pub(crate) votes_changed: usize,
    random: u64,
    pub(crate) evictions: usize,
    pub(crate) readmissions: usize,
    /// Who took whom for suspect or dead, by position.
    pub(crate) doubts: Vec<(usize, usize)>,
}

fn id(index: usize) -> NodeId {
    NodeId(u32::try_from(index).unwrap() + 1)
}

impl Cluster {
    pub(crate) fn new(plan: Plan) -> Self {
        let nodes = usize::from(plan.nodes);
        let standing = Standing {
            nodes: (0..nodes)
                .map(|index| (id(index), (LeaseGeneration(1), false)))
                .collect(),
            voters: (0..usize::from(plan.voters)).map(id).collect(),
            voters_version: 1,
        };
        let machines = (0..nodes)
            .map(|index| Machine {
                core: None,
                life: 0,
                wakeup: 0,
                paused: false,
                inbox: Vec::new(),
                condemned: BTreeSet::new(),
                applied: 1,
                lags_until: 0,
                voters_told: 1,
                settled: 0,
                offset: (index as u64 + 1) * 1_000_000 * MS,
                drift_permille: plan.drift_permille[index],
            })
            .collect();
        let mut cluster = Self {
            now: 0,
            queue: BinaryHeap::new(),
            events: 0,
            machines,
            messages: Vec::new(),
            cuts: Vec::new(),
            cut_paths: Vec::new(),
            doubts: Vec::new(),
            loss: (0, 0),
            delay: (0, 0),
            log: vec![standing],
            votes: Vec::new(),
            votes_changed: 0,
            random: plan.seed | 1,
            evictions: 0,
            readmissions: 0,
            plan,
        };
        for node in 0..nodes {
            cluster.at(0, Event::Start { node });
        }
        for index in 0..cluster.plan.faults.len() {
            let at = cluster.plan.faults[index].0 * MS;
            cluster.at(at, Event::Fault { index });
        }
        cluster
    }

    /// Runs to a true time in milliseconds, checking after every event.
    pub(crate) fn run(&mut self, to_ms: u64) -> Result<(), String> {
        while let Some(Reverse((at, _, _))) = self.queue.peek()
            && *at <= to_ms * MS
        {
            let Some(Reverse((at, _, event))) = self.queue.pop() else {
                break;
            };
            self.now = at;
            self.step(event);
            self.decide();
            self.check()?;
        }
        self.now = to_ms * MS;
        Ok(())
    }

    /// Everyone is alive to everyone, and everyone holds its lease.
    pub(crate) fn healed(&self) -> Result<(), String> {
        for (index, machine) in self.machines.iter().enumerate() {
            let Some(core) = &machine.core else {
                return Err(format!("{} is down", id(index)));
            };
            let status = core.status();
            for (peer, status) in &status.peers {
                if status.liveness != Liveness::Alive {
                    return Err(format!(
                        "{peer} is {:?} to {}: {}",
                        status.liveness,
                        id(index),
                        status.reason
                    ));
                }
            }
            if status.lease_until <= self.local(index) {
                return Err(format!("{} has no lease", id(index)));
            }
        }
        Ok(())
    }

    /// Whether a node, by position, holds its lease.
    pub(crate) fn has_lease(&self, node: usize) -> bool {
        let core = self.machines[node].core.as_ref();
        core.is_some_and(|core| core.lease_until() > self.local(node))
    }

    fn at(&mut self, at: u64, event: Event) {
        self.events += 1;
        self.queue
            .push(Reverse((at.max(self.now), self.events, event)));
    }

    /// A number below `below`.
    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below.max(1)
    }

    /// A machine's own clock.
    fn local(&self, node: usize) -> Time {
        let machine = &self.machines[node];
        let gained = i128::from(self.now) * i128::from(machine.drift_permille) / 1000;
        Time(machine.offset + u64::try_from(i128::from(self.now) + gained).unwrap())
    }

    /// The true time at which a machine's own clock shows this.
    fn true_time(&self, node: usize, local: Time) -> u64 {
        let machine = &self.machines[node];
        let rate = u128::try_from(1000 + machine.drift_permille).unwrap();
        let shown = u128::from(local.0.saturating_sub(machine.offset));
        u64::try_from((shown * 1000).div_ceil(rate)).unwrap_or(u64::MAX / 2)
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Start { node } => self.start(node),
            Event::Tick { node, wakeup } => {
                let machine = &self.machines[node];
                if machine.wakeup == wakeup && !machine.paused {
                    self.input(node, Input::Tick);
                }
            }
            Event::Arrive {
                node,
                from,
                message,
            } => {
                let cut = self
                    .cuts
                    .iter()
                    .any(|(f, t, until)| (*f, *t) == (from, node) && self.now < *until);
                let (path, heartbeat) = self.messages[message].clone();
                let cut_path = self
                    .cut_paths
                    .iter()
                    .any(|(cut, until)| *cut == path && self.now < *until);
                if !cut && !cut_path {
                    self.input(node, Input::Heartbeat { path, heartbeat });
                }
            }
            Event::Persisted {
                node,
                life,
                of,
                generation,
            } => {
                // A process that died meanwhile may or may not have written it down.
                if self.machines[node].life == life || self.draw(2) == 0 {
                    self.machines[node].condemned.insert((of, generation));
                }
                if self.machines[node].life == life {
                    self.input(
                        node,
                        Input::Persisted {
                            node: of,
                            generation,
                        },
                    );
                }
            }
            Event::Apply { node } => {
                let lags_until = self.machines[node].lags_until;
                if self.now < lags_until {
                    self.at(lags_until, Event::Apply { node });
                    return;
                }
                let machine = &mut self.machines[node];
                machine.applied = (machine.applied + 1).min(self.log.len());
                let members = self.members(node);
                self.input(node, members);
            }
            Event::Fault { index } => self.fault(index),
            Event::Resume { node } => {
                self.machines[node].paused = false;
                // What comes first after a pause is anyone's guess.
                if self.draw(2) == 0 {
                    self.input(node, Input::Tick);
                }
                for input in std::mem::take(&mut self.machines[node].inbox) {
                    self.input(node, input);
                }
                self.input(node, Input::Tick);
            }
        }
    }

    fn start(&mut self, node: usize) {
        let now = self.local(node);
        let instance = Instance(self.draw(u64::MAX));
        let machine = &mut self.machines[node];
        machine.life += 1;
        machine.paused = false;
        machine.inbox.clear();
        let condemned = machine.condemned.iter().copied().collect();
        let timing = self.plan.timing;
        machine.core = Some(Membership::new(id(node), instance, timing, condemned, now));
        let members = self.members(node);
        self.input(node, members);
    }

    /// What a node is told of the members; which change of who votes that is it writes down first.
    fn members(&mut self, node: usize) -> Input {
        let machine = &mut self.machines[node];
        let standing = &self.log[machine.applied - 1];
        let known = standing.voters_version;
        machine.voters_told = machine.voters_told.max(known);
        let voters = Voters {
            known,
            told: machine.voters_told,
        };
        let path = |name: &str, every| PathConfig {
            name: name.to_owned(),
            every,
        };
        let config = |of: NodeId, (generation, evicted): (LeaseGeneration, bool)| {
            let mut paths = NETWORKS.map(|network| path(network, 1)).to_vec();
            if node < 2 && of.0 <= 2 {
                paths.push(path(LINE, 2));
            }
            MemberConfig {
                paths,
                generation,
                evicted,
                voter: standing.voters.contains(&of),
            }
        };
        let nodes = standing.nodes.iter();
        let members = nodes.map(|(id, s)| (*id, config(*id, *s))).collect();
        Input::Members { members, voters }
    }

    fn input(&mut self, node: usize, input: Input) {
        if self.machines[node].paused {
            self.machines[node].inbox.push(input);
            return;
        }
        let now = self.local(node);
        let mut out = Vec::new();
        let Some(core) = &mut self.machines[node].core else {
            return;
        };
        core.handle(now, input, &mut out);
        for effect in out {
            self.carry_out(node, effect);
        }
        let Some(deadline) = self.machines[node].core.as_ref().map(Membership::deadline) else {
            return;
        };
        self.machines[node].wakeup += 1;
        let wakeup = self.machines[node].wakeup;
        if deadline != Time::NEVER {
            let at = self.true_time(node, deadline);
            self.at(at, Event::Tick { node, wakeup });
        }
    }

    fn carry_out(&mut self, node: usize, effect: Effect) {
        match effect {
            Effect::Send {
                to,
                path,
                heartbeat,
            } => {
                let lost = self.now < self.loss.1 && self.draw(100) < u64::from(self.loss.0);
                if lost {
                    return;
                }
                let slow = if self.now < self.delay.1 {
                    self.draw(self.delay.0 * MS)
                } else {
                    0
                };
                let line = if path == LINE { LINE_MS * MS } else { 0 };
                let at = self.now + 50_000 + self.draw(500_000) + slow + line;
                let to = usize::try_from(to.0 - 1).unwrap();
                let mut heartbeat = heartbeat;
                if self.plan.broken == Some(Broken::Blind) {
                    // Told on to the checker's `settled` only.
                    heartbeat.voters = heartbeat.voters.min(self.known_by(to));
                }
                self.messages.push((path, heartbeat));
                let message = self.messages.len() - 1;
                let event = Event::Arrive {
                    node: to,
                    from: node,
                    message,
                };
                if self.draw(20) == 0 {
                    let again = at + self.draw(2000 * MS);
                    self.at(again, event.clone());
                }
                self.at(at, event);
            }
            Effect::PersistCondemned {
                node: of,
                generation,
            } => {
                let at = self.now + self.draw(30 * MS);
                let life = self.machines[node].life;
                self.at(
                    at,
                    Event::Persisted {
                        node,
                        life,
                        of,
                        generation,
                    },
                );
            }
            Effect::VotersSettled(voters) => self.machines[node].settled = voters,
            Effect::Liveness {
                node: of, liveness, ..
            } if liveness != Liveness::Alive => {
                let of = usize::try_from(of.0 - 1).unwrap();
                self.doubts.push((node, of));
            }
            _ => {}
        }
    }

    fn fault(&mut self, index: usize) {
        let count = self.machines.len();
        let until = |ms: u64| self.now + ms * MS;
        match self.plan.faults[index].1.clone() {
            Fault::Cut { from, to, ms } => {
                let cut = (
                    usize::from(from) % count,
                    usize::from(to) % count,
                    until(ms),
                );
                self.cuts.push(cut);
            }
            Fault::CutPath { path, ms } => self.cut_paths.push((path, until(ms))),
            Fault::Isolate { node, ms } => {
                let node = usize::from(node) % count;
                let until = until(ms);
                for other in 0..count {
                    self.cuts.push((node, other, until));
                    self.cuts.push((other, node, until));
                }
            }
            Fault::Loss { percent, ms } => self.loss = (percent, until(ms)),
            Fault::Delay { up_to_ms, ms } => self.delay = (up_to_ms, until(ms)),
            Fault::Pause { node, ms } => {
                let node = usize::from(node) % count;
                let until = until(ms);
                if !self.machines[node].paused {
                    self.machines[node].paused = true;
                    self.at(until, Event::Resume { node });
                }
            }
            Fault::Vote { node } => self.votes.push(id(usize::from(node) % count)),
            Fault::Lag { node, ms } => {
                let node = usize::from(node) % count;
                self.machines[node].lags_until = until(ms);
            }
            Fault::Restart { node, down_ms } => {
                let node = usize::from(node) % count;
                let until = until(down_ms);
                self.machines[node].core = None;
                self.machines[node].settled = 0;
                self.machines[node].life += 1;
                self.at(until, Event::Start { node });
            }
        }
    }

    fn known_by(&self, node: usize) -> u64 {
        self.log[self.machines[node].applied - 1].voters_version
    }

    /// The next change of who votes is decided once some node, which may lead the log, knows the last one as
    /// settled. At least one voter stays.
    fn change_voters(&mut self) {
        let last = self.log[self.log.len() - 1].clone();
        let settled =
            |machine: &Machine| machine.core.is_some() && machine.settled >= last.voters_version;
        let hasty = self.plan.broken == Some(Broken::Hasty);
        if self.votes.is_empty() || !hasty && !self.machines.iter().any(settled) {
            return;
        }
        let node = self.votes.remove(0);
        let mut next = last;
        if !next.voters.remove(&node) {
            next.voters.insert(node);
        }
        if next.voters.is_empty() {
            return;
        }
        next.voters_version += 1;
        self.votes_changed += 1;
        self.decided(next);
    }

    /// An entry of the log, of which each node learns some time later.
    fn decided(&mut self, next: Standing) {
        self.log.push(next);
        for node in 0..self.machines.len() {
            let at = self.now + self.draw(300 * MS);
            self.at(at, Event::Apply { node });
        }
    }

    /// The voters that hold a durable condemnation of this generation or a later one.
    fn condemners(&self, node: NodeId, generation: LeaseGeneration) -> usize {
        let voters = &self.log[self.log.len() - 1].voters;
        self.machines
            .iter()
            .enumerate()
            .filter(|(index, machine)| {
                id(*index) != node
                    && voters.contains(&id(*index))
                    && machine
                        .condemned
                        .iter()
                        .any(|(of, condemned)| *of == node && *condemned >= generation)
            })
            .count()
    }

    /// Plays the planner and the control log: evicts what a majority condemned, readmits what a
    /// majority hears; each node learns of it some time later.
    fn decide(&mut self) {
        self.change_voters();
        let standing = self.log[self.log.len() - 1].clone();
        let majority = standing.majority();
        for (node, (generation, evicted)) in &standing.nodes {
            let condemners = self.condemners(*node, *generation);
            let hears = |machine: &&Machine| {
                let core = machine.core.as_ref();
                core.is_some_and(|core| core.liveness(*node) == Liveness::Alive)
            };
            let voting = self.machines.iter().enumerate();
            let hearers = voting
                .filter(|(index, machine)| standing.voters.contains(&id(*index)) && hears(machine))
                .count();
            // Readmission is of use only where someone who condemned it hears it again.
            let relents = self.machines.iter().filter(hears).any(|machine| {
                machine
                    .condemned
                    .iter()
                    .any(|(of, condemned)| of == node && condemned >= generation)
            });
            let mut next = self.log[self.log.len() - 1].clone();
            if (*evicted || relents) && hearers >= majority {
                next.nodes.insert(*node, (generation.next(), false));
                self.readmissions += 1;
            } else if !evicted && condemners >= majority {
                next.nodes.insert(*node, (*generation, true));
                self.evictions += 1;
            } else {
                continue;
            }
            self.decided(next);
        }
    }

    /// Nobody believes in a lease under a generation that a majority condemned.
    fn check(&self) -> Result<(), String> {
        let standing = &self.log[self.log.len() - 1];
        let majority = standing.majority();
        for (index, machine) in self.machines.iter().enumerate() {
            let Some(core) = &machine.core else {
                continue;
            };
            let status_until = core.lease_until();
            let local = self.local(index);
            if status_until <= local {
                continue;
            }
            let generation = core.generation();
            let condemners = self.condemners(id(index), generation);
            if condemners >= majority {
                return Err(format!(
                    "at {:?} (its clock {local:?}) {} believes in its lease under {generation} until \
                     {status_until:?}, and {condemners} of {} voters condemned it",
                    Time(self.now),
                    id(index),
                    standing.voters.len()
                ));
            }
        }
        Ok(())
    }
}
