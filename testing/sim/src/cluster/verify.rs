//! The checks that need a quiet moment, and the liveness phase: faults stop, everything is put right
//! once, and the cluster must serve and converge within a bounded time by itself (rule 11).

use std::time::Duration;

use relevo_replication::{DiskState, PeerState};
use relevo_types::{NodeId, Time};

use super::{Cluster, Event, Phase, index_of, machine::Crash, node_id};
use crate::{
    check::{HEALS, Verdict, Violation, equal, marked},
    cluster::trouble::CUTS_MAX,
    net::{Index, Plane},
};

/// From the end of all faults until everything serves and is in sync. Generous: some dead times for
/// evictions and link time-outs one after the other, restarts, and a resync.
pub(super) const HEAL_WITHIN: Duration = Duration::from_secs(14);

/// From when a secondary's disk hangs until writes go on without it: some link time-outs.
pub(super) const SERVES_WITHOUT_WITHIN: Duration = Duration::from_secs(8);

/// Silence after which a member knows of every write that it is complete.
pub(super) const QUIET: Duration = Duration::from_millis(110);

/// From the last request until nothing is under way.
const SETTLE_WITHIN: Duration = Duration::from_secs(4);

impl Cluster {
    /// Ends all faults and waits until the cluster serves and is whole.
    pub(super) fn heal(&mut self) -> Verdict {
        let now = self.queue.now();
        self.repairing = false;
        self.trace.all(now, || "faults stop".to_owned());
        if self.phase == Phase::Trouble {
            self.cuts_over = now + CUTS_MAX;
        }
        self.phase = Phase::Healing;
        self.waits_since = Some(now);
        self.quiet = false;
        self.end_waits();
        self.mend_network();
        self.end_orders();
        for node in 0..self.scenario.nodes() {
            if self.machines[node].paused_until.is_some() {
                self.machines[node].paused_until = Some(now);
                self.queue.after(Duration::ZERO, Event::Resume(node));
            }
            self.queue
                .after(Duration::from_millis(50), Event::Start(node));
        }
        self.run_until(now + Duration::from_millis(100))?;
        self.become_whole()?;
        if self.scenario.repair_late {
            // Only now the operator replaces disks that failed.
            self.repairing = true;
            self.become_whole()?;
        }
        Ok(())
    }

    /// Opens every direction of the network.
    pub(super) fn mend_network(&mut self) {
        let nodes = self.scenario.nodes();
        for from in 0..nodes {
            for to in 0..nodes {
                for plane in Plane::ALL {
                    self.net.set_open(plane, from, to, true);
                }
            }
        }
        self.paths.mend_all();
        self.look_at_all_queues();
    }

    fn become_whole(&mut self) -> Verdict {
        self.load.writes_answered = 0;
        self.waits_since = Some(self.queue.now());
        let until = self.queue.now() + HEAL_WITHIN;
        // A second fault, while it heals, begins the time anew.
        while self.queue.now() < until.max(self.second.over_at + HEAL_WITHIN) {
            self.step()?;
            if self.is_whole() || self.needs_repair() {
                return Ok(());
            }
        }
        let volume = self.control.volume();
        let mut what = format!(
            "{HEAL_WITHIN:?} after the last fault: {} primary {:?} in sync {:?}, {} writes answered since;",
            volume.epoch, volume.primary, volume.in_sync, self.load.writes_answered
        );
        for machine in &self.machines[..self.scenario.data_nodes] {
            let status = machine
                .process
                .as_ref()
                .and_then(|process| process.engine.as_ref())
                .map(relevo_replication::Engine::status);
            what.push_str(&format!(" {}: {status:?};", machine.id));
        }
        Err(Violation::new(HEALS, what))
    }

    /// Hangs the disk of one secondary. Its daemon answers pings, but owes acknowledgements for ever:
    /// it must leave the in-sync set, and come back when its disk does.
    pub(super) fn hang_one(&mut self) -> Verdict {
        let Some(primary) = self.open_primary() else {
            return Ok(());
        };
        let node = self.other_than(primary, self.scenario.data_nodes);
        self.trace
            .node(self.queue.now(), node, || "its disk hangs".to_owned());
        self.marks
            .reached("the disk of a secondary hangs, its daemon lives");
        self.machines[node].hung = true;
        self.second.off = true;
        self.load.writes_answered = 0;
        let clients = self.scenario.clients as u64;
        let until = self.queue.now() + SERVES_WITHOUT_WITHIN;
        // More than those that were answered on the way.
        self.wait_for(
            until,
            "writes go on without the replica whose disk hangs",
            |cluster| cluster.load.writes_answered > 2 * clients,
        )?;
        if self.scenario.disk_trouble.1.seconds == Some(2) {
            self.attach_hanging(node)?;
        }
        self.machines[node].hung = false;
        self.second.off = false;
        let until = self.queue.now() + HEAL_WITHIN;
        self.wait_for(
            until,
            "the replica whose disk hung is in sync again",
            Self::is_whole,
        )
    }

    /// The daemon of a node whose disk hangs starts again: its replica is given up, and when the disk is back
    /// it is attached.
    fn attach_hanging(&mut self, node: Index) -> Verdict {
        self.crash(node, Crash::Process);
        self.start(node)?;
        let until = self.queue.now() + SERVES_WITHOUT_WITHIN;
        self.wait_for(until, "a disk that hangs is given up", |cluster| {
            let process = cluster.machines[node].process.as_ref();
            process.is_some_and(|process| process.disk_failed)
        })?;
        self.repairing = true;
        Ok(())
    }

    pub(super) fn is_whole(&self) -> bool {
        self.load.writes_answered >= 3
            && self.queue.now() >= self.second.over_at
            && self.is_not_replacing()
            && self.open_primary().is_some()
            && self.all_in_sync(false)
            && (!self.scenario.managed || self.service_runs())
    }

    /// No replica is being moved, or its move waits for a repair.
    pub(super) fn is_not_replacing(&self) -> bool {
        self.replaced.is_none() || self.scenario.repair_late && !self.repairing
    }

    /// Stops the workload, waits for silence, compares all replicas and reads everything.
    pub(super) fn settle(&mut self) -> Verdict {
        self.trace
            .all(self.queue.now(), || "workload stops".to_owned());
        self.phase = Phase::Settling;
        let until = self.queue.now() + SETTLE_WITHIN;
        self.wait_for(until, "requests are answered", |cluster| {
            cluster.load.is_idle()
        })?;
        self.wait_for(until, "silence comes", Self::is_silent_and_whole)?;
        // Of protocol A: members forget what they marked, one generation after the other. All at one moment, and whoever is
        // primary then answers for it: a service that was asked elsewhere before may go there only now, its new primary
        // begins all this again, and what an old one has marked is right. No mark is forgiven by that: they must be gone in
        // the same time, and at that moment everybody is in sync or follows, and nothing is under way.
        let until = self.queue.now() + SETTLE_WITHIN;
        self.wait_for(until, "members know what followers have", |cluster| {
            cluster.is_silent_and_whole() && cluster.undrained().is_none()
        })?;
        let Some(primary) = self.open_primary() else {
            return Err(Violation::new(HEALS, "no primary after settling"));
        };
        let blocks = self.scenario.blocks;
        for node in 0..self.scenario.data_nodes {
            let one = (node_id(primary), &self.machines[primary].disk);
            equal::check(blocks, one, (node_id(node), &self.machines[node].disk))?;
            if node != primary {
                marked::drained(self.engine(primary), node_id(node))?;
            }
        }
        self.read_everything(primary)?;
        let until = self.queue.now() + SETTLE_WITHIN;
        self.wait_for(until, "reads are answered", |cluster| {
            cluster.load.is_idle()
        })
    }

    pub(super) fn wait_for(
        &mut self,
        until: Time,
        what: &str,
        done: impl Fn(&Self) -> bool,
    ) -> Verdict {
        self.waits_since = Some(self.queue.now());
        while !done(self) {
            if self.queue.now() >= until {
                return Err(Violation::new(
                    HEALS,
                    format!(
                        "waited in vain until {what}; oldest request: {}",
                        self.load.oldest()
                    ),
                ));
            }
            self.step()?;
        }
        Ok(())
    }

    pub(super) fn is_silent_and_whole(&self) -> bool {
        self.is_silent() && self.open_primary().is_some() && self.all_in_sync(true)
    }

    /// Nothing is under way that could change a byte.
    fn is_silent(&self) -> bool {
        self.load.is_idle()
            && self.net.under_way == 0
            && self.machines.iter().all(|machine| machine.disk.is_idle())
    }

    /// In a quiet moment of the trouble phase: replicas in sync are equal, the others marked.
    pub(super) fn look_when_quiet(&mut self) -> Verdict {
        let long_enough = self.quiet && self.queue.now() > self.quiet_since + QUIET;
        if !long_enough || self.compared || self.rotten.is_some() || !self.is_silent() {
            return Ok(());
        }
        let Some(primary) = self.open_primary() else {
            return Ok(());
        };
        let volume = self.control.volume();
        if self.machines[primary].known_volume().epoch != volume.epoch
            || !self.machines[primary].acts()
        {
            return Ok(());
        }
        self.compared = true;
        self.marks
            .reached("replicas were compared in the middle of trouble");
        let members: Vec<Index> = (0..self.scenario.data_nodes)
            .filter(|node| *node != primary && volume.in_sync.contains(&node_id(*node)))
            .filter(|node| self.is_attached(*node) && self.is_established(primary, *node))
            .collect();
        let disk = |node: Index| (node_id(node), &self.machines[node].disk);
        for node in &members {
            equal::check(self.scenario.blocks, disk(primary), disk(*node))?;
        }
        let outside: Vec<Index> = (0..self.scenario.data_nodes)
            .filter(|node| volume.replicas.contains_key(&node_id(*node)))
            .filter(|node| !volume.in_sync.contains(&node_id(*node)))
            .collect();
        for node in outside.iter().copied() {
            // On a link that is broken and not known to be, what the primary sent is awaited: neither
            // there nor marked by it yet. Whoever would take over must have it marked all the same.
            let sent = self.net.is_linked(primary, node)
                && self.net.wants_connection(primary, node)
                || self.machines[node].paused_until.is_some();
            let sources = members.iter().chain((!sent).then_some(&primary));
            // One that follows may be forced.
            let followers = outside.iter().filter(|other| {
                **other != node && self.is_attached(**other) && self.is_following(primary, **other)
            });
            for source in sources.chain(followers) {
                self.check_marks(*source, node)?;
            }
        }
        Ok(())
    }

    /// A member that has marks for a replica outside the set, which lacks nothing.
    fn undrained(&self) -> Option<(NodeId, NodeId)> {
        let volume = self.control.volume();
        let outside = |node: &&NodeId| !volume.in_sync.contains(node);
        let marks = |member: NodeId, node: NodeId| {
            let engine = self.engine(index_of(member));
            engine.is_some_and(|engine| !engine.dirty_blocks(node).is_empty())
        };
        let mut pairs = volume.replicas.keys().filter(outside).flat_map(|node| {
            let members = volume.in_sync.iter();
            members.map(move |member| (*member, *node))
        });
        pairs.find(|(member, node)| marks(*member, *node))
    }

    fn check_marks(&self, source: Index, target: Index) -> Verdict {
        let (Some(engine), Some(cold)) = (self.engine(source), &self.machines[target].cold) else {
            return Ok(());
        };
        let mut marks = engine.dirty_blocks(node_id(target));
        marks.extend(engine.dirty_blocks(node_id(source)));
        if !self.control.volume().in_sync.contains(&node_id(source)) {
            // Two outside the set: what the source lacks is marked for it.
            let other = self.engine(target);
            marks.extend(other.map_or_else(Vec::new, |it| it.dirty_blocks(node_id(source))));
        }
        if !self.severed.is_empty() {
            // Of another history: what it has of its own is marked there.
            let other = self.engine(target);
            for node in (0..self.scenario.data_nodes).map(node_id) {
                marks.extend(other.map_or_else(Vec::new, |it| it.dirty_blocks(node)));
            }
        }
        // A mix of another history: its primary gave way before it was whole, and what that one alone had wrote is marked
        // there. But it takes the history in force only by giving way itself or by being forced, and both make each block
        // of a mix uncertain in the same durable step (`doubt_a_mix` of the engine). Until then nobody copies to it.
        let another = |engine: &relevo_replication::Engine| {
            engine.is_mix() && engine.lineage() != Some(self.control.volume().lineage)
        };
        if self.engine(target).is_some_and(another) {
            return Ok(());
        }
        let attached = self.machines[target]
            .process
            .as_ref()
            .is_some_and(|process| process.attached && !process.disk_failed);
        if !self.severed.is_empty() && !attached {
            return Ok(());
        }
        match self.engine(target).filter(|_| attached) {
            Some(engine) => marks.extend(engine.dirty_blocks(node_id(target))),
            None => marks.extend(cold.uncertain(&self.machines[target].disk)),
        }
        let disk = |node: Index| (node_id(node), &self.machines[node].disk);
        marked::check(self.scenario.blocks, disk(source), disk(target), &marks)
    }

    pub(super) fn engine(&self, node: Index) -> Option<&relevo_replication::Engine> {
        self.machines[node].process.as_ref()?.engine.as_ref()
    }

    fn is_attached(&self, node: Index) -> bool {
        self.machines[node].acts()
            && self.machines[node]
                .process
                .as_ref()
                .is_some_and(|process| process.attached && !process.disk_failed)
    }

    /// Primary and secondary agree that they are in sync, on one link.
    fn is_established(&self, primary: Index, node: Index) -> bool {
        self.agree(primary, node, PeerState::Established, DiskState::UpToDate)
    }

    /// The same of a replica of protocol A.
    fn is_following(&self, primary: Index, node: Index) -> bool {
        self.agree(primary, node, PeerState::Following, DiskState::Consistent)
    }

    fn agree(&self, primary: Index, node: Index, state: PeerState, disk: DiskState) -> bool {
        let linked = self.net.is_linked(primary, node) && !self.net.wants_connection(primary, node);
        let (Some(ours), Some(theirs)) = (self.engine(primary), self.engine(node)) else {
            return false;
        };
        let theirs = theirs.status();
        linked
            && ours.status().peers.get(&node_id(node)) == Some(&state)
            && theirs.disk == disk
            && theirs.certain
    }
}
