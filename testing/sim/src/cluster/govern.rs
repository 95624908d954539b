//! What stands above the engines: proposals and news of the control log, heartbeats and leases, and
//! a small manager per node that promotes, evicts, readmits and restarts. The real manager and
//! membership take this place in layer 2.

use std::{sync::Arc, time::Duration};

use relevo_replication::{Input, PeerState};
use relevo_types::{
    NodeId, Time,
    cluster::{Command, Outcome, Proof, Protocol, Rejection, VolumeChange},
};

use super::{Cluster, Event, View, index_of, node_id};
use crate::{
    check::Verdict,
    control::{VOLUME, volume_command, words},
    lease::Reach as _,
    net::Index,
    second::Point,
};

/// A manager looks around this often.
const MANAGE_EVERY: Duration = Duration::from_millis(25);

/// A node that is not the wanted one waits this long before it offers itself as primary.
const MODESTY: Duration = Duration::from_millis(300);

impl Cluster {
    fn view(&self) -> View<'_> {
        View {
            machines: &self.machines,
            net: &self.net,
        }
    }

    /// Whether a node and a majority of the running voters hear each other and its log is there.
    pub(super) fn reaches_majority(&self, node: Index) -> bool {
        let view = self.view();
        if self.machines[node].log_away_until > self.queue.now() {
            return false;
        }
        let heard = (0..self.scenario.nodes())
            .filter(|voter| {
                view.runs(*voter) && view.reaches(node, *voter) && view.reaches(*voter, node)
            })
            .count();
        view.runs(node) && heard >= self.control.state().majority()
    }

    /// Sends a command towards the log.
    pub(super) fn propose(&mut self, by: Index, command: Command) {
        let rng = &mut self.chance.node;
        let delay = if rng.chance(5.0) {
            rng.millis(1, 400)
        } else {
            rng.micros(200, 8000)
        };
        let incarnation = self.machines[by].incarnation();
        self.queue.after(
            delay,
            Event::Commit {
                by,
                incarnation,
                command: Box::new(command),
            },
        );
    }

    /// A command reaches the log, if it does.
    pub(super) fn commit(&mut self, by: Index, incarnation: u64, command: &Command) {
        let lives = self.machines[by].incarnation() == incarnation && self.machines[by].acts();
        // A dead proposer's command may be on its way already.
        let arrives = if lives {
            self.reaches_majority(by)
        } else {
            self.chance.node.chance(50.0) && self.some_majority()
        };
        if !arrives {
            self.marks
                .reached("the log was out of reach for the primary");
            return;
        }
        // An engine asks again while it needs to: what it is told is the new configuration.
        drop(self.commit_now(by, command));
    }

    /// Commits a command and lets the news spread.
    pub(super) fn commit_now(
        &mut self,
        by: Index,
        command: &Command,
    ) -> Result<Outcome, Rejection> {
        let now = self.queue.now();
        let result = self.control.commit(command);
        match &result {
            Err(rejection) => {
                self.trace.node(now, by, || {
                    format!("log: {} rejected: {rejection}", words(command))
                });
            }
            Ok(_) => {
                self.trace.all(now, || {
                    let volume = self.control.volume();
                    format!(
                        "log: {} -> {} primary {:?} in sync {:?}",
                        words(command),
                        volume.epoch,
                        volume.primary,
                        volume.in_sync
                    )
                });
                self.committed(command);
            }
        }
        result
    }

    /// Whether any majority of voters runs and hears each other.
    fn some_majority(&self) -> bool {
        (0..self.scenario.nodes()).any(|node| self.reaches_majority(node))
    }

    fn committed(&mut self, command: &Command) {
        self.one_writer.committed(self.control.volume());
        match command {
            Command::Volume { change, .. } => match change {
                VolumeChange::Join { node } => self.joined(*node),
                VolumeChange::Leave { nodes } => {
                    self.marks.reached("commit: leave");
                    self.last_leave = self.history.tick();
                    for node in nodes.clone() {
                        self.ambush(index_of(node));
                    }
                }
                VolumeChange::Tend { .. } => self.marks.reached("commit: tend"),
                VolumeChange::Demote { .. } => self.marks.reached("commit: demote"),
                VolumeChange::Promote { node } => {
                    self.promoted(index_of(*node));
                }
                VolumeChange::PromoteUncertain { node } => {
                    let nodes = &self.control.state().nodes;
                    let evicted = |member: &NodeId| nodes[member].lease.evicted;
                    if self.control.volume().in_sync.iter().any(evicted) {
                        self.marks
                            .reached("an uncertain replica was promoted with an evicted member");
                    }
                    self.promoted(index_of(*node));
                }
                VolumeChange::Differs { .. } => {
                    self.marks.reached("commit: what verification found");
                }
                VolumeChange::Force { .. } => self.marks.reached("commit: force"),
                VolumeChange::KeepInForce => {}
                VolumeChange::GiveWay { node, to } => {
                    self.went_back(index_of(*node), index_of(*to));
                }
            },
            Command::Evict { .. } => self.marks.reached("commit: evict, condemned"),
            _ => {}
        }
        let number = self.control.newest_number();
        for node in 0..self.scenario.nodes() {
            let rng = &mut self.chance.node;
            let delay = if rng.chance(10.0) {
                rng.millis(1, 200)
            } else {
                rng.micros(100, 5000)
            };
            self.queue.after(delay, Event::Learn { node, number });
        }
    }

    fn promoted(&mut self, node: Index) {
        let members = self.control.volume().in_sync.iter();
        let other = members
            .map(|node| index_of(*node))
            .find(|other| *other != node);
        self.at_point(Point::Promotion, node, other.unwrap_or(node));
        self.ambush(node);
    }

    fn joined(&mut self, node: NodeId) {
        let volume = self.control.volume();
        let mut leaving = volume.replicas.iter().filter(|(_, it)| it.leaving);
        let moved = leaving.next().map(|(node, _)| index_of(*node));
        if let Some(primary) = volume.primary.map(index_of) {
            self.point_over(Point::Join, primary, index_of(node));
        }
        if let Some(moved) = moved {
            self.at_point(Point::Move, moved, index_of(node));
        }
        let volume = self.control.volume();
        let tended = volume.tends;
        let of_a = |primary| volume.protocol(primary, node) == Protocol::A;
        let before = self.control.snapshot(self.control.newest_number() - 1);
        let replaces = before.volumes[&VOLUME].replicas[&node].replaces.is_some();
        if replaces && volume.primary.is_some_and(of_a) {
            self.marks
                .reached("protocol A: a replica took another one's place");
        }
        let machine = &mut self.machines[index_of(node)];
        self.marks.reached("commit: join");
        self.marks.reached("resync: ended with a join");
        if tended {
            self.marks
                .reached("resync: ended while nobody used the volume");
        }
        // All it was sent was on stable storage at the barrier, and is still, if it had power since.
        if machine
            .lost_power
            .is_some_and(|lost| lost < machine.barrier_passed)
        {
            machine.lost_power = None;
        }
        if machine.process.is_none() {
            self.marks.reached("a join was lost with its link or node");
        }
        self.ambush(index_of(node));
    }

    /// A node learns a committed state, if it can.
    pub(super) fn learn(&mut self, node: Index, number: usize) -> Verdict {
        if !self.reaches_majority(node) {
            return Ok(());
        }
        let number = if self.chance.node.chance(50.0) {
            self.control.newest_number()
        } else {
            number
        };
        if number <= self.machines[node].known.0 {
            return Ok(());
        }
        self.machines[node].known = (number, self.control.snapshot(number));
        if self.scenario.managed {
            let state = Arc::clone(&self.machines[node].known.1);
            self.tell(node, relevo_node::Input::State(state));
            return Ok(());
        }
        let volume = Arc::new(self.machines[node].known_volume().clone());
        self.feed(node, Input::Config(volume))
    }

    /// Heartbeats of a node: asks for its lease, and as a voter looks at the grants it gave.
    pub(super) fn heartbeat(&mut self, node: Index) -> Verdict {
        let timing = self.leases.timing();
        let again = timing.heartbeat + self.chance.node.micros(0, 2000);
        self.queue.after(again, Event::Heartbeat(node));
        if !self.machines[node].acts() {
            return Ok(());
        }
        let now = self.queue.now();
        self.leases.judge(node, self.control.state(), now);
        let generation = self.generation(node);
        let view = View {
            machines: &self.machines,
            net: &self.net,
        };
        if let Some(until) = self.leases.round(node, generation, now, &view) {
            let until = until + self.machines[node].clock_offset;
            self.feed(node, Input::LeaseUntil(until))?;
        }
        // News that were missed are fetched with the next contact.
        if self.machines[node].known.0 < self.control.newest_number()
            && self.chance.node.chance(30.0)
        {
            let number = self.control.newest_number();
            self.learn(node, number)?;
        }
        Ok(())
    }

    /// A node's manager looks around.
    pub(super) fn manage(&mut self, node: Index) -> Verdict {
        let again = MANAGE_EVERY + self.chance.node.millis(0, 10);
        self.queue.after(again, Event::Manage(node));
        if !self.machines[node].acts() {
            return Ok(());
        }
        if self.scenario.managed {
            // The real manager decides; only news that were missed, and a failed daemon's restart,
            // are seen to here.
            if node < self.scenario.data_nodes {
                self.restart_failed(node);
            }
            let number = self.control.newest_number();
            return if self.chance.node.chance(30.0) {
                self.learn(node, number)
            } else {
                Ok(())
            };
        }
        self.evict_condemned(node);
        self.readmit_returned(node);
        if node < self.scenario.data_nodes {
            self.restart_failed(node);
            self.claim(node);
        }
        Ok(())
    }

    /// Any node that finds a majority's word against another one evicts it.
    fn evict_condemned(&mut self, node: Index) {
        let state = Arc::clone(&self.machines[node].known.1);
        for (id, other) in &state.nodes {
            if index_of(*id) == node || other.lease.evicted || !state.holds_something(*id) {
                continue;
            }
            let by = self
                .leases
                .condemned_by(index_of(*id), other.lease.generation);
            if by.len() >= state.majority() {
                self.propose(
                    node,
                    Command::Evict {
                        node: *id,
                        generation: other.lease.generation,
                        proof: Proof::Condemned { by },
                    },
                );
            }
        }
    }

    /// Nodes that are heard again are let in by whoever notices, even before they know that they were
    /// out.
    fn readmit_returned(&mut self, node: Index) {
        let state = Arc::clone(&self.machines[node].known.1);
        for (id, other) in &state.nodes {
            let index = index_of(*id);
            let view = self.view();
            let heard = view.runs(index) && view.reaches(index, node) && view.reaches(node, index);
            if index != node && other.lease.evicted && heard && self.chance.node.chance(20.0) {
                self.propose(
                    node,
                    Command::Readmit {
                        node: *id,
                        generation: other.lease.generation,
                    },
                );
            }
        }
    }

    /// A daemon whose disk failed says goodbye to what it holds and is started again after a while.
    fn restart_failed(&mut self, node: Index) {
        let now = self.queue.now();
        let machine = &self.machines[node];
        let Some(process) = &machine.process else {
            return;
        };
        let late = self.scenario.repair_late && !self.repairing;
        let patience = if late || self.last_disk.is_some() {
            return;
        } else {
            Duration::from_millis(300)
        };
        if process.disk_failed && now.since(process.started) > patience {
            self.crash(node, super::Crash::Power);
            let back = self.chance.node.millis(20, 300);
            self.queue.after(back, Event::Start(node));
        }
    }

    /// What a manager does about its own role.
    fn claim(&mut self, node: Index) {
        let now = self.queue.now();
        let machine = &self.machines[node];
        let id = machine.id;
        let standing = match machine.known.1.nodes.get(&id) {
            Some(entry) => entry.lease,
            None => return,
        };
        // Condemned by some voters while it was away, but not evicted: those that hear it again
        // promised to grant it nothing under its old number.
        let relented = self
            .leases
            .condemned_by(node, standing.generation)
            .iter()
            .any(|voter| {
                let voter = index_of(*voter);
                let view = self.view();
                view.runs(voter) && view.reaches(node, voter) && view.reaches(voter, node)
            });
        if standing.evicted || relented {
            self.propose(
                node,
                Command::Readmit {
                    node: id,
                    generation: standing.generation,
                },
            );
            return;
        }
        self.nominate(node);
        let machine = &self.machines[node];
        let volume = machine.known_volume();
        let Some(process) = &machine.process else {
            return;
        };
        let able = volume.serving().is_none()
            && volume.in_sync.contains(&id)
            && process.attached
            && !process.disk_failed
            && !process.detaching
            && self.leases.holds(node, now);
        if !able {
            return;
        }
        let wanted = self.target.is_none_or(|target| target == id);
        let patience = if wanted { 60.0 } else { percent_each(MODESTY) };
        let expect = volume.epoch;
        // Nobody uses it for a while: then who is in sync brings the others up to date.
        if volume.primary.is_none() && self.chance.node.chance(self.scenario.tends) {
            self.propose(
                node,
                volume_command(expect, VolumeChange::Tend { node: id }),
            );
            return;
        }
        // And is displaced, but not at once.
        let patience = if volume.tends {
            patience / 4.0
        } else {
            patience
        };
        if self.chance.node.chance(patience) {
            self.propose(node, volume_command(expect, self.promotion_of(node)));
        }
    }

    /// Now and then a node proposes another one, as a planner may: then that one can miss every
    /// configuration in between.
    fn nominate(&mut self, node: Index) {
        let state = Arc::clone(&self.machines[node].known.1);
        let volume = &state.volumes[&VOLUME];
        if volume.serving().is_some() || !self.chance.node.chance(10.0) {
            return;
        }
        let members: Vec<NodeId> = volume
            .in_sync
            .iter()
            .copied()
            .filter(|member| {
                let allowed = state
                    .nodes
                    .get(member)
                    .is_some_and(|node| !node.lease.evicted);
                allowed && self.machines[index_of(*member)].process.is_some()
            })
            .collect();
        if !members.is_empty() {
            let member = self.chance.node.pick(&members);
            let promotion = self.promotion_of(index_of(member));
            self.propose(node, volume_command(volume.epoch, promotion));
        }
    }

    /// The promotion of a node, as its engine says now what it knows.
    fn promotion_of(&self, node: Index) -> VolumeChange {
        let status = self.engine(node).map(relevo_replication::Engine::status);
        relevo_replication::io::promotion(node_id(node), status.as_ref())
    }

    /// Whether the committed state has all replicas in sync.
    /// Replicas of protocol A are outside the set: they follow, and if they must be `equal` have all.
    pub(super) fn all_in_sync(&self, equal: bool) -> bool {
        let volume = &self.control.state().volumes[&VOLUME];
        volume.replicas.keys().all(|node| {
            volume.in_sync.contains(node)
                || self.is_out_of_order(index_of(*node))
                || self.follows(*node, equal)
        })
    }

    fn follows(&self, node: NodeId, equal: bool) -> bool {
        let status = self
            .open_primary()
            .and_then(|primary| self.engine(primary))
            .map(relevo_replication::Engine::status);
        let Some(status) = status else {
            return false;
        };
        let Some(behind) = status.behind.get(&node) else {
            return false;
        };
        match status.peers.get(&node) {
            Some(PeerState::Following | PeerState::VerifyS { .. }) => !equal || behind.bytes == 0,
            Some(PeerState::Ahead { .. } | PeerState::SyncSource { .. }) => !equal,
            _ => false,
        }
    }

    /// Its disk failed, and nobody repairs it yet.
    fn is_out_of_order(&self, node: Index) -> bool {
        let failed = |process: &super::Process| process.disk_failed;
        self.scenario.repair_late
            && !self.repairing
            && self.machines[node].process.as_ref().is_some_and(failed)
    }

    /// Nobody has the data but nodes whose disks failed: only a repair can help.
    pub(super) fn needs_repair(&self) -> bool {
        let in_sync = &self.control.volume().in_sync;
        in_sync
            .iter()
            .all(|node| self.is_out_of_order(index_of(*node)))
    }

    /// The node that is primary by the committed state and open.
    pub(super) fn open_primary(&self) -> Option<Index> {
        let primary = index_of(self.control.volume().primary?);
        self.machines[primary].open().map(|_| primary)
    }

    /// Lets everything that waits for time alone be over.
    pub(super) fn end_waits(&mut self) {
        for machine in &mut self.machines {
            machine.log_away_until = Time::ZERO;
            machine.slow_until = Time::ZERO;
            machine.failing = None;
            machine.crash_in = None;
        }
    }
}

/// The chance per look that makes a wait of `mean` on average, in percent.
fn percent_each(mean: Duration) -> f64 {
    100.0 * MANAGE_EVERY.as_secs_f64() / mean.as_secs_f64()
}
