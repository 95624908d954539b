//! An operator who removes a replica and adds it again on an empty disk, perhaps in another one's place.

use std::{sync::Arc, time::Duration};

use relevo_types::{
    NodeId,
    cluster::{Command, ReplicaSpec},
};

use super::{Cluster, Crash, Event, Phase, backing, index_of, node_id};
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
                // It is primary, or became it meanwhile: it can only go when another one is.
                let healing = self.phase == Phase::Healing && self.all_in_sync(false);
                if healing
                    && self.open_primary() == Some(node)
                    && let Some(other) = self.successor_of(node)
                {
                    self.switch_to(node, other)?;
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
                // Now and then it comes in the place of another one, which goes when it has everything.
                let others = self.control.volume().replicas.keys();
                let others: Vec<Index> = others.map(|node| index_of(*node)).collect();
                let moves = !others.is_empty() && self.chance.trouble.chance(30.0);
                let replaces = moves.then(|| self.chance.trouble.pick(&others));
                if self.add_replica(node, replaces)? {
                    // It starts anew with its replica.
                    self.crash(node, Crash::Process);
                    self.queue.after(Duration::ZERO, Event::Start(node));
                    self.replaced = replaces.map(|moved| Replaced {
                        node: moved,
                        stage: Stage::Leaving,
                    });
                    if moves {
                        self.marks.reached("a replica was moved");
                        self.queue.after(LOOK_EVERY, Event::Replaced);
                    }
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

    /// Who shall be primary in the place of a node whose replica shall go: a member, if there is one.
    fn successor_of(&self, node: Index) -> Option<Index> {
        let volume = self.control.volume();
        let usable = |other: &&NodeId| {
            let process = self.machines[index_of(**other)].process.as_ref();
            **other != node_id(node) && process.is_some_and(|it| !it.disk_failed)
        };
        let members = volume.in_sync.iter().find(usable);
        let other = members.or_else(|| volume.replicas.keys().find(usable))?;
        Some(index_of(*other))
    }

    fn add_replica(&mut self, node: Index, replaces: Option<Index>) -> Result<bool, Violation> {
        let Some(by) = self.any_with_majority() else {
            return Ok(false);
        };
        let id = node_id(node);
        let failed = |what: String| Violation::new("a replica can be added", what);
        let replica = ReplicaSpec {
            node: id,
            protocol: self.scenario.protocols[node],
            backing: None,
            force: false,
        };
        let add = Command::AddReplica {
            volume: VOLUME,
            replica,
            replaces: replaces.map(node_id),
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
