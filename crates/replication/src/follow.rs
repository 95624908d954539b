//! Replicas of protocol A, and receipts of protocol B.
//!
//! A replica of protocol A gets every write and is waited for by none: it is outside the in-sync set.
//! What is under way to it is bounded. When it does not keep up, the application waits, or the primary
//! leaves it behind: everything that it did not acknowledge becomes dirty for it, and so does every
//! further write, until it has passed a barrier behind all that was sent; then comes a short resync.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{
    BLOCK_SIZE, BlockRange, Epoch, NodeId,
    cluster::{OnCongestion, Protocol},
};
use relevo_wire::{Body, Message};

use crate::{
    bitmap::Blocks,
    io::BehindBy,
    jobs::Owner,
    lab::PlantedBug,
    link::Part,
    machine::{Machine, mask, slots_of},
    ops::Cx,
    primary::Write,
    sync::Stage,
};

/// How long a replica of protocol A may be in the in-sync set after it was admitted: as long as it is
/// every write waits for it, and a switchover that was given up must not leave it so.
pub const ADMITTED_FOR: Duration = Duration::from_secs(300);

impl Machine {
    /// Looks up the protocols of all pairs that this node is in, and who is admitted.
    pub(crate) fn learn_protocols(&mut self, cx: &Cx<'_>) {
        let Some(volume) = &self.volume else {
            return;
        };
        let slots_of = |protocol| {
            let replicas = volume.replicas.iter();
            replicas
                .filter(|(node, _)| **node != self.config.node)
                .filter(|(node, _)| volume.protocol(self.config.node, **node) == protocol)
                .fold(0, |all, (_, replica)| all | mask(replica.slot))
        };
        let (a, b) = (slots_of(Protocol::A), slots_of(Protocol::B));
        let admitted = volume.options.admit;
        if admitted != self.admit_known {
            self.admit_known = admitted;
            self.admitted = admitted.map(|node| (node, cx.now + ADMITTED_FOR));
        }
        self.async_slots = a;
        self.receipt_slots = b;
    }

    /// Whether a replica may be in the in-sync set while this node is primary.
    pub(crate) fn may_join(&self, peer: NodeId) -> bool {
        let slot = self.slot(peer).map_or(0, mask);
        self.async_slots & slot == 0
            || self.admitted.is_some_and(|(node, _)| node == peer)
            || self.takes_a_place(peer)
            || self.lab.has(PlantedBug::AsyncCountsAsInSync)
    }

    /// Whether a replica of protocol A has caught up that takes the place of another one. The place is free
    /// when the set, by commit, has the successor: so it is in the set for that moment. Not before it has
    /// caught up: until then it may be left behind like any other of its kind.
    fn takes_a_place(&self, peer: NodeId) -> bool {
        let replicas = self.volume.as_ref().map(|volume| &volume.replicas);
        let taken = replicas.and_then(|all| all.get(&all.get(&peer)?.replaces?));
        let link = self.links.get(&peer);
        let stage = link.and_then(|link| link.session.as_ref().map(|session| session.stage));
        let caught_up = matches!(
            stage,
            Some(Stage::Following | Stage::Barrier(_) | Stage::Joining | Stage::InSync)
        );
        caught_up && taken.is_some_and(|replica| !replica.leaving)
    }

    /// Whether the application waits until a replica of protocol A has taken what is under way to it.
    pub(crate) fn is_congested(&self) -> bool {
        let Some(volume) = self.volume.as_ref().filter(|_| self.async_slots != 0) else {
            return false;
        };
        let limit = volume.options.congestion.sndbuf_bytes;
        self.links.iter().any(|(peer, link)| {
            let owed = link
                .session
                .as_ref()
                .map_or(0, |session| session.owed_bytes);
            owed >= limit && self.slot(*peer).map_or(0, mask) & self.async_slots != 0
        })
    }

    /// Leaves behind whom one more write would be too much for.
    pub(crate) fn leave_behind_congested(&mut self, cx: &mut Cx<'_>, body: &Body) {
        let bytes = match body {
            Body::Data(data) => data.len() as u64,
            Body::Zeroes => BLOCK_SIZE,
        };
        self.leave_behind_if(cx, |owed, limit| owed > 0 && owed + bytes > limit);
    }

    /// Leaves behind whoever makes the activity log overflow; ends what was allowed for a time.
    pub(crate) fn settle_followers(&mut self, cx: &mut Cx<'_>) {
        self.admitted = self.admitted.filter(|(_, until)| cx.now < *until);
        if self.async_slots == 0 {
            return;
        }
        let pinned = self.meta.activity.pinned();
        let extents = self
            .volume
            .as_ref()
            .map_or(u32::MAX, |volume| volume.options.congestion.extents);
        if self.meta.wants_room() || pinned >= usize::try_from(extents).unwrap_or(usize::MAX) {
            self.leave_behind_if(cx, |owed, _| owed > 0);
        }
    }

    fn leave_behind_if(&mut self, cx: &mut Cx<'_>, too_much: impl Fn(u64, u64) -> bool) {
        if self.async_slots == 0 {
            return;
        }
        let Some(congestion) = self.volume.as_ref().map(|volume| volume.options.congestion) else {
            return;
        };
        if congestion.policy != OnCongestion::PullAhead {
            return;
        }
        let limit = congestion.pull_ahead_at();
        for peer in self.links.keys().copied().collect::<Vec<_>>() {
            let congested = self.session_mut(peer).is_some_and(|session| {
                let stage = session.stage;
                matches!(
                    stage,
                    Stage::Copying | Stage::Settling(_) | Stage::Following
                ) && too_much(session.owed_bytes, limit)
            });
            if congested && !self.may_join(peer) {
                self.leave_behind(cx, peer);
            }
        }
    }

    /// From now on marks instead of data.
    pub(crate) fn leave_behind(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let id = self.next_id();
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        // First: what the abandoned reads let pass is not sent any more.
        if let Some(session) = self.session_mut(peer) {
            session.restart(Stage::Ahead(id), epoch, cx.now);
        }
        // The acknowledgement of a write that it was sent must not clear the mark of a later one that
        // it was not: so no acknowledgement counts any more, and what it would have said is marked.
        let oldest = if self.lab.has(PlantedBug::AheadTrustsOldAcks) {
            None
        } else {
            self.mark_unacked(peer)
        };
        if let Some(session) = self.session_mut(peer) {
            session.behind_since = session.behind_since.or(oldest).or(Some(cx.now));
        }
        self.send(cx, peer, Message::Behind { epoch, id });
        self.abandon_jobs(cx, |owner| *owner == Owner::SyncRead(peer));
        self.update_all(cx);
    }

    /// The slots of those who are left behind.
    pub(crate) fn left_behind_slots(&self) -> u8 {
        let ahead = self.links.iter().filter(|(_, link)| {
            let stage = link.session.as_ref().map(|session| session.stage);
            matches!(stage, Some(Stage::Ahead(_)))
        });
        ahead
            .filter_map(|(peer, _)| self.slot(*peer))
            .fold(0, |all, slot| all | mask(slot))
    }

    /// Everything that was sent to a replica that was left behind has arrived: the short resync.
    pub(crate) fn catch_up(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        if let Some(session) = self.session_mut(peer) {
            session.restart(Stage::Starting, epoch, cx.now);
            self.send(cx, peer, Message::StartSync { epoch });
        }
    }

    /// A replica of protocol A has everything up to its barrier, durably.
    pub(crate) fn let_follow(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        if let Some(session) = self.session_mut(peer) {
            session.stage = Stage::Following;
            session.behind_since = None;
            self.send(cx, peer, Message::Following { epoch });
            self.generations_soon(cx);
        }
    }

    /// Tells a peer whether to say what it received.
    pub(crate) fn settle_receipts(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let wanted = self.slot(peer).map_or(0, mask) & self.receipt_slots != 0;
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        if let Some(link) = self.links.get_mut(&peer)
            && link.wants_receipts != wanted
            && link
                .session
                .as_ref()
                .is_some_and(|session| session.stage != Stage::Starting)
        {
            link.wants_receipts = wanted;
            self.send(cx, peer, Message::Receipts { epoch, wanted });
        }
    }

    /// Tells the target of a resync which of the blocks that it gets now a required replica may not have
    /// on its disk: a write that was complete by its receipt (protocol B) may be lost there by a crash,
    /// without a trace in its own log. The target did not get the write itself, so that it is in no tail
    /// of its; if this primary is gone and that replica is the next one, only the target can say that the
    /// two differ.
    pub(crate) fn tell_in_doubt(&mut self, cx: &mut Cx<'_>, peer: NodeId, blocks: BlockRange) {
        let (Some(primary), Some(slot)) = (self.primary(), self.slot(peer)) else {
            return;
        };
        let required = self.required() & !mask(slot);
        let mut doubt = Blocks::default();
        let unwritten = |write: &&Write| write.complete && write.acked & required != required;
        for write in primary.writes.values().filter(unwritten) {
            if let Some(both) = overlap(write.blocks, blocks) {
                doubt.set(both, |_| {});
            }
        }
        for member in slots_of(required) {
            let marks = self.meta.bitmaps.of(member);
            let mut from = blocks.first;
            while let Some(run) = marks.next_run(from, blocks.count) {
                let Some(both) = overlap(run, blocks) else {
                    break;
                };
                doubt.set(both, |_| {});
                from = both.end();
            }
        }
        let epoch = primary.epoch;
        let runs: Vec<BlockRange> = doubt.runs(u64::MAX).collect();
        self.send_dirty_map(cx, peer, epoch, slot, &runs);
    }

    /// How far the replicas of protocol A are behind.
    pub(crate) fn behind(&self) -> BTreeMap<NodeId, BehindBy> {
        let Some(primary) = self.primary() else {
            return BTreeMap::new();
        };
        let followers = self.other_replicas().filter(|peer| {
            self.slot(*peer).map_or(0, mask) & self.async_slots != 0
                && !primary.in_sync.contains(peer)
        });
        followers
            .map(|peer| {
                let slot = self.slot(peer).map_or(0, mask);
                let session = self.links.get(&peer).and_then(|link| link.session.as_ref());
                let owed = session.map_or(0, |session| session.owed_bytes);
                let unacked = primary
                    .writes
                    .values()
                    .find(|write| write.unacked & slot != 0);
                let since = session
                    .and_then(|session| session.behind_since)
                    .or_else(|| unacked.map(|write| write.since));
                let bytes = owed + self.dirty_count(peer) * BLOCK_SIZE;
                (peer, BehindBy { bytes, since })
            })
            .collect()
    }

    // The replica's side.

    /// The primary sends nothing for now. What was sent before comes to its end, and that is told.
    pub(crate) fn left_behind(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, id: u64) {
        if self.check_reign(cx, peer, epoch) {
            self.set_part(peer, Part::Behind);
            self.barrier(cx, peer, epoch, id);
        }
    }

    /// Everything before this is on stable storage: from here on this replica is a prefix of what the
    /// primary wrote.
    pub(crate) fn follows(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch) {
        if self.check_reign(cx, peer, epoch) {
            self.set_part(peer, Part::Following);
            self.meta.superblock.inconsistent = false;
            self.certain = true;
            self.meta.want_superblock();
        }
    }

    pub(crate) fn receipts(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, wanted: bool) {
        if self.check_reign(cx, peer, epoch)
            && let Some(link) = self.links.get_mut(&peer)
        {
            link.gives_receipts = wanted;
        }
    }

    fn set_part(&mut self, peer: NodeId, part: Part) {
        let link = self.links.get_mut(&peer);
        if let Some(incoming) = link.and_then(|link| link.incoming.as_mut()) {
            incoming.part = part;
        }
    }
}

/// What two runs share.
fn overlap(one: BlockRange, other: BlockRange) -> Option<BlockRange> {
    let first = one.first.max(other.first);
    let end = one.end().min(other.end());
    (first < end).then(|| BlockRange::new(first, end - first))
}
