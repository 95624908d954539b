//! A disk that alters data by itself, and the verification that must find it; and that none finds
//! anything else.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use relevo_replication::{Order, PeerState};
use relevo_types::{BlockRange, Time, cluster::Command};

use super::{
    Cluster, Phase,
    machine::{Crash, Failing},
    node_id,
    verify::HEAL_WITHIN,
};
use crate::{
    check::{Verdict, Violation, marked},
    net::Index,
    second::Point,
};

const RULE: &str = "verification reports damage, and nothing else";

/// From the order to verify until what was damaged is repaired: a leave, a resync, a join.
const REPAIRED_WITHIN: Duration = Duration::from_secs(6);

/// A service that is on its way to another node has got there after this time.
const MOVED_WITHIN: Duration = Duration::from_secs(1);

/// An operator who is refused asks again after this time.
const ORDER_EVERY: Duration = Duration::from_millis(200);

/// What a disk altered by itself.
#[derive(Clone, Debug)]
pub(super) struct Rotten {
    node: Index,
    blocks: BTreeSet<u64>,
    found: bool,
}

impl Cluster {
    /// All is quiet and in sync: the disk of a secondary alters some blocks, and an operator verifies.
    pub(super) fn rot_one(&mut self) -> Verdict {
        if self.scenario.managed {
            self.keep_service()?;
        }
        let Some(primary) = self.open_primary() else {
            return Ok(());
        };
        let node = self.other_than(primary, self.scenario.data_nodes);
        // A primary that steps down, by an order that it was given before, verifies nothing and may leave
        // the volume to the disk that rots.
        self.order_verify(primary, node)?;
        if !self.is_verifying(primary, node) {
            return Ok(());
        }
        // One that is under way would find a part of it.
        self.order(primary, Order::StopVerify { peer: None })?;
        let now = self.queue.now();
        let mut blocks = BTreeSet::new();
        for _ in 0..3 {
            let block = self.chance.trouble.below(self.scenario.blocks);
            if blocks.insert(block) {
                let range = BlockRange::new(block, 1).bytes();
                let disk = &mut self.machines[node].disk;
                let mut bytes = disk.view_bytes(range).to_vec();
                let at = usize::try_from(range.len / 2).unwrap_or(0);
                bytes[at] ^= 0x10;
                disk.install(range.offset, &Bytes::from(bytes));
            }
        }
        if self.chance.trouble.chance(25.0) {
            self.machines[node].failing = Some(Failing::Read);
        }
        self.trace
            .node(now, node, || format!("blocks {blocks:?} rot on its disk"));
        self.rotten = Some(Rotten {
            node,
            blocks,
            found: false,
        });
        self.phase = Phase::Settling;
        let within = if self.scenario.kill_finder {
            HEAL_WITHIN
        } else {
            REPAIRED_WITHIN
        };
        self.wait_until_repaired(primary, node, self.queue.now() + within)?;
        self.marks.reached("verification found what a disk altered");
        self.rotten = None;
        match self.open_primary().filter(|primary| *primary != node) {
            Some(primary) => marked::drained(self.engine(primary), node_id(node)),
            None => Ok(()),
        }
    }

    /// A person asks for the service where it is, as one does before a verification: it takes the primary's
    /// content for right, so a replica that rots must not become primary before it was compared.
    pub(super) fn keep_service(&mut self) -> Verdict {
        let services = self.control.state().services.values();
        let held = services.map(|service| (service.id, service.holder)).next();
        if let Some((service, target)) = held {
            let by = self.open_primary().unwrap_or(0);
            let command = Command::SetTarget { service, target };
            drop(self.commit_now(by, &command));
        }
        // A move that had begun ends.
        self.run_until(self.queue.now() + MOVED_WITHIN)?;
        let until = self.queue.now() + REPAIRED_WITHIN;
        self.wait_for(until, "the service rests", |cluster| {
            cluster.service_runs() && cluster.is_silent_and_whole()
        })
    }

    fn wait_until_repaired(&mut self, primary: Index, node: Index, until: Time) -> Verdict {
        let is_repaired = |cluster: &Self| {
            let disk = |node: Index| &cluster.machines[node].disk;
            let same = |other: Index| {
                let blocks = cluster.scenario.blocks;
                disk(other).differing(disk(node), blocks).next().is_none()
            };
            cluster.rotten.as_ref().is_some_and(|rotten| rotten.found)
                && cluster.is_silent_and_whole()
                && cluster.queue.now() >= cluster.second.over_at
                && (0..cluster.scenario.data_nodes).all(same)
        };
        let mut order_at = self.queue.now();
        let mut kills = self.scenario.kill_finder;
        while !is_repaired(self) {
            let found = self.rotten.as_ref().is_some_and(|rotten| rotten.found);
            if found && kills {
                kills = false;
                self.marks
                    .reached("who found what a disk altered was lost before it was repaired");
                self.crash_and_return(primary, Crash::Power);
            }
            if self.queue.now() >= order_at {
                // Again and again: it is refused until the primary knows that all are in sync.
                order_at = self.queue.now() + ORDER_EVERY;
                self.order_verify(primary, node)?;
            }
            if self.queue.now() >= until {
                return Err(Violation::new(
                    RULE,
                    format!("what a disk altered was not repaired: {:?}", self.rotten),
                ));
            }
            self.step()?;
        }
        Ok(())
    }

    fn order_verify(&mut self, primary: Index, node: Index) -> Verdict {
        let found = self.rotten.as_ref().is_some_and(|rotten| rotten.found);
        if found || self.is_verifying(primary, node) {
            return Ok(());
        }
        let verify = Order::Verify {
            peer: Some(node_id(node)),
            repair: true,
        };
        self.order(primary, verify)
    }

    fn is_verifying(&self, primary: Index, node: Index) -> bool {
        let status = self.engine(primary).map(relevo_replication::Engine::status);
        let state = status.and_then(|status| status.peers.get(&node_id(node)).copied());
        matches!(state, Some(PeerState::VerifyS { .. }))
    }

    /// An engine tells what it found of another replica.
    pub(super) fn verified(
        &mut self,
        by: Index,
        (node, differing): (Index, &[BlockRange]),
        whole: bool,
    ) -> Verdict {
        if whole {
            self.marks.reached("a verification came to its end");
        }
        let open = self.engine(by).is_some_and(|engine| engine.status().open);
        let replica = self.control.volume().replicas.get(&node_id(node));
        let recorded = replica.is_none_or(|replica| replica.differs.is_some());
        if open && !differing.is_empty() && !recorded && self.replaced.is_none() {
            return Err(Violation::new(
                RULE,
                format!("n{} tells of damage that the log does not have", by + 1),
            ));
        }
        let mut found: BTreeSet<u64> = differing.iter().flat_map(BlockRange::iter).collect();
        // Those count as different, for nobody can tell.
        let unreadable = &self.machines[node].unreadable;
        let rots = self.rotten.as_ref().map(|rotten| &rotten.blocks);
        found.retain(|block| {
            !unreadable.contains(block) || rots.is_some_and(|it| it.contains(block))
        });
        let rotten = self.rotten.as_mut().filter(|rotten| rotten.node == node);
        let expected = rotten
            .as_ref()
            .map_or_else(BTreeSet::new, |rotten| rotten.blocks.clone());
        let Some(rotten) = rotten.filter(|_| found == expected) else {
            // One that was stopped tells what it had found until then.
            if found.is_empty() || !whole && found.is_subset(&expected) {
                return Ok(());
            }
            return Err(Violation::new(
                RULE,
                format!(
                    "blocks {found:?} of n{} were called different, but {expected:?} are",
                    node + 1
                ),
            ));
        };
        rotten.found = true;
        if let Some(primary) = self.open_primary() {
            self.at_point(Point::Repair, primary, node);
        }
        Ok(())
    }

    /// What a disk altered was found and is not repaired yet.
    pub(super) fn is_repairing(&self) -> bool {
        self.rotten.as_ref().is_some_and(|rotten| rotten.found)
    }
}
