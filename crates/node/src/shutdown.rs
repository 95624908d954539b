//! Leaving in good order: services first, then volumes, then the word that nothing runs here.

use std::time::Duration;

use relevo_types::{
    Time, VolumeId,
    cluster::{ClusterState, Command, NodeKind, Proof},
};

use crate::{Effect, Level, Node, NodeEvent, Subject, VolumeOrder};

/// How long services may take to stop and volumes to step down before they are stopped by force:
/// a part's own time-out and some more, within the 90 s that service managers wait.
const PATIENCE: Duration = Duration::from_secs(75);

/// How long a forced stop may take after that.
const FORCE_PATIENCE: Duration = Duration::from_secs(5);

/// How long the goodbye may take to be committed. Without it the others take this node for dead
/// after the dead time; nothing is lost by that, since it holds nothing any more.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(2);

/// An engine that was told to step down is told again after this long.
const DEMOTE_AGAIN: Duration = Duration::from_secs(1);

/// A shutdown under way.
#[derive(Debug)]
pub(crate) struct Shutdown {
    since: Time,
    /// When nothing ran here any more.
    idle_since: Option<Time>,
    demoted_at: Option<Time>,
    /// The patience is over.
    forced: bool,
    done: bool,
}

impl Shutdown {
    pub(crate) const fn new(now: Time) -> Self {
        Self {
            since: now,
            idle_since: None,
            demoted_at: None,
            forced: false,
            done: false,
        }
    }

    /// When to look again.
    pub(crate) fn deadline(&self) -> Time {
        if self.done {
            return Time::NEVER;
        }
        if self.forced {
            return self.since + PATIENCE + FORCE_PATIENCE;
        }
        let patience = self
            .idle_since
            .map_or(self.since + PATIENCE, |at| at + GOODBYE_PATIENCE);
        self.demoted_at
            .map_or(patience, |at| patience.min(at + DEMOTE_AGAIN))
    }
}

impl Node {
    /// A node that knows no cluster has nothing to give up.
    pub(crate) fn drive_shutdown_without_state(&mut self, out: &mut Vec<Effect>) {
        if let Some(shutdown) = self.shutdown.as_mut().filter(|shutdown| !shutdown.done) {
            shutdown.done = true;
            out.push(Effect::ShutdownDone);
        }
    }

    /// Goes on with a shutdown. The runners were told to stop already.
    pub(crate) fn drive_shutdown(
        &mut self,
        now: Time,
        state: &ClusterState,
        out: &mut Vec<Effect>,
    ) {
        let me = self.config.me;
        let Some(since) = self
            .shutdown
            .as_ref()
            .filter(|shutdown| !shutdown.done)
            .map(|shutdown| shutdown.since)
        else {
            return;
        };
        if now >= since + PATIENCE {
            self.lose_patience(now, since, state, out);
            return;
        }
        if !self.runners.is_empty() || self.demote_all(now, state, out) {
            if let Some(shutdown) = self.shutdown.as_mut() {
                shutdown.idle_since = None;
            }
            return;
        }
        let Some(shutdown) = self.shutdown.as_mut() else {
            return;
        };
        let idle_since = *shutdown.idle_since.get_or_insert(now);
        let node = state.nodes.get(&me);
        let says_goodbye = node
            .is_some_and(|node| node.spec.kind == NodeKind::Data && !node.lease.evicted)
            && now < idle_since + GOODBYE_PATIENCE;
        if !says_goodbye {
            shutdown.done = true;
            out.push(Effect::ShutdownDone);
            return;
        }
        if let Some(node) = node {
            let command = Command::Evict {
                node: me,
                generation: node.lease.generation,
                proof: Proof::Goodbye,
            };
            let reason = format!("{} shuts down, and nothing runs on it", node.spec.name);
            self.proposals
                .want(now, state.revision, command, &reason, out);
        }
    }

    /// Volumes without a service step down, too. Returns whether one is still primary here.
    fn demote_all(&mut self, now: Time, state: &ClusterState, out: &mut Vec<Effect>) -> bool {
        let me = self.config.me;
        let primary: Vec<VolumeId> = state
            .volumes
            .values()
            .filter(|volume| volume.serving() == Some(me) && self.engines.is_open(volume.id))
            .map(|volume| volume.id)
            .collect();
        let Some(shutdown) = self.shutdown.as_mut() else {
            return false;
        };
        if primary.is_empty() {
            shutdown.demoted_at = None;
            return false;
        }
        if shutdown
            .demoted_at
            .is_none_or(|at| now >= at + DEMOTE_AGAIN)
        {
            shutdown.demoted_at = Some(now);
            for volume in primary {
                out.push(Effect::Volume {
                    volume,
                    order: VolumeOrder::Demote,
                });
            }
        }
        true
    }

    /// What does not stop in good order is stopped by force; then the process ends in any case.
    fn lose_patience(
        &mut self,
        now: Time,
        since: Time,
        state: &ClusterState,
        out: &mut Vec<Effect>,
    ) {
        if let Some(shutdown) = self.shutdown.as_mut() {
            shutdown.forced = true;
        }
        let reason = "it did not stop in time for the shutdown";
        let mut runners = std::mem::take(&mut self.runners);
        for runner in runners.values_mut() {
            runner.force(now, reason);
            let mut context = self.context(now, state, out);
            runner.drive(&mut context);
        }
        let all_stopped = runners.values().all(|runner| !runner.is_active());
        self.runners = runners;
        if !all_stopped && now < since + PATIENCE + FORCE_PATIENCE {
            return;
        }
        if let Some(shutdown) = self.shutdown.as_mut() {
            shutdown.done = true;
        }
        out.push(Effect::Event(NodeEvent {
            level: Level::Alarm,
            subject: Subject::Node(self.config.me),
            what: "the shutdown was ended by force".to_owned(),
            why: format!(
                "services or volumes did not stop within {} s; the others take over when this \
                 node falls silent",
                PATIENCE.as_secs()
            ),
        }));
        out.push(Effect::ShutdownDone);
    }
}
