//! An operator who removes a replica and adds it again on an empty disk.

use std::{sync::Arc, time::Duration};

use relevo_types::cluster::{Command, Protocol, ReplicaSpec};

use super::{Cluster, Crash, Event, Phase, backing, node_id};
use crate::{
    check::{Verdict, Violation},
    control::VOLUME,
    net::Index,
};

/// The operator looks this often how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// A replica that is removed and added again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replaced {
    node: Index,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// It shall leave the in-sync set.
    Leaving,
    /// It is gone from the configuration; its node may not know.
    Gone,
    /// Its node took it away.
    Away,
}

impl Cluster {
    /// Begins to remove a replica, by way of any node that reaches the log.
    pub(super) fn remove_replica(&mut self, node: Index) {
        let Some(by) = self.any_with_majority() else {
            return;
        };
        if self.replaced.is_some() || self.scenario.managed || self.scenario.crash_point.is_some() {
            return;
        }
        let command = Command::RemoveReplica {
            volume: VOLUME,
            node: node_id(node),
        };
        if self.commit_now(by, &command).is_ok() {
            self.replaced = Some(Replaced {
                node,
                stage: Stage::Leaving,
            });
            self.queue.after(LOOK_EVERY, Event::Replaced);
        }
    }

    /// Carries a replacement on.
    pub(super) fn replace_replica(&mut self) -> Verdict {
        let Some(Replaced { node, stage }) = self.replaced else {
            return Ok(());
        };
        let gone = !self.control.volume().replicas.contains_key(&node_id(node));
        let next = match stage {
            Stage::Leaving if gone => Some(Stage::Gone),
            Stage::Leaving => {
                // It became primary meanwhile: it can only go when another one is.
                let others = self.control.volume().in_sync.len() > 1;
                let healing = self.phase == Phase::Healing && others && self.all_in_sync(false);
                if healing && self.open_primary() == Some(node) {
                    self.switchover()?;
                }
                None
            }
            Stage::Gone => {
                self.crash(node, Crash::Power);
                self.machines[node].has_replica = false;
                self.queue.after(Duration::ZERO, Event::Start(node));
                Some(Stage::Away)
            }
            Stage::Away => {
                if self.add_replica(node)? {
                    self.replaced = None;
                    // It starts anew with its replica.
                    self.crash(node, Crash::Process);
                    self.queue.after(Duration::ZERO, Event::Start(node));
                    return Ok(());
                }
                None
            }
        };
        let wait = match next {
            Some(stage) => {
                self.replaced = Some(Replaced { node, stage });
                self.chance.trouble.spread_millis(3, 400)
            }
            None => LOOK_EVERY,
        };
        self.queue.after(wait, Event::Replaced);
        Ok(())
    }

    fn add_replica(&mut self, node: Index) -> Result<bool, Violation> {
        let Some(by) = self.any_with_majority() else {
            return Ok(false);
        };
        let id = node_id(node);
        let failed = |what: String| Violation::new("a replica can be added", what);
        let replica = ReplicaSpec {
            node: id,
            protocol: Protocol::C,
            backing: None,
            force: false,
        };
        let add = Command::AddReplica {
            volume: VOLUME,
            replica,
            replaces: None,
        };
        let created = Command::ReplicaCreated {
            volume: VOLUME,
            node: id,
        };
        self.commit_now(by, &add)
            .map_err(|rejection| failed(rejection.to_string()))?;
        let lineage = self.control.volume().lineage;
        let start = relevo_format::Start::Blank;
        let (disk, cold) =
            backing(&self.scenario, id, &self.control, lineage, start).map_err(failed)?;
        self.commit_now(by, &created)
            .map_err(|rejection| failed(rejection.to_string()))?;
        self.marks.reached("a replica was added to a volume in use");
        let newest = (
            self.control.newest_number(),
            Arc::clone(&self.control.newest()),
        );
        let machine = &mut self.machines[node];
        machine.disk = disk;
        machine.cold = cold;
        machine.failing = None;
        machine.lost_power = None;
        machine.has_replica = true;
        // It made the replica because it learned this.
        machine.known = newest;
        Ok(true)
    }

    fn any_with_majority(&self) -> Option<Index> {
        (0..self.scenario.nodes()).find(|node| self.reaches_majority(*node))
    }
}
