//! Pausing a resync by an operator's order, or for another volume's, at either side, and what keeps a resync from being started
//! over: progress that is durable on both sides.

use std::{collections::BTreeSet, time::Duration};

use relevo_types::{BlockRange, NodeId, Time, VolumeId, cluster::Protocol};
use relevo_wire::Message;

use crate::{jobs::Reply, link::Part, machine::Machine, ops::Cx};

/// Cleared marks get durable at the latest after this time, so that a crash in a resync costs no more than
/// what was copied since. A commit costs a flush: one a second is nothing beside the copying.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Which resyncs stand still, and what of the resyncs is not durable yet.
#[derive(Debug, Default)]
pub(crate) struct Pauses {
    /// Peers to and from which an operator of this node paused the resync.
    ours: BTreeSet<NodeId>,
    /// The volume whose resync on this node comes first (`resync-after`): all of this one's wait.
    after: Option<VolumeId>,
    /// When marks that were cleared by a resync shall be durable.
    save_at: Option<Time>,
}

impl Machine {
    /// An operator pauses the resync to or from a peer, or lets it go on. Lasts longer than the link.
    pub(crate) fn pause_sync(&mut self, cx: &mut Cx<'_>, peer: NodeId, paused: bool) {
        let before = self.pauses_here(peer);
        if paused {
            self.pauses.ours.insert(peer);
        } else {
            self.pauses.ours.remove(&peer);
        }
        self.tell_pause_if_new(cx, peer, before);
    }

    /// This node's resyncs of the volume wait for those of another one, or no longer.
    pub(crate) fn hold_sync(&mut self, cx: &mut Cx<'_>, after: Option<VolumeId>) {
        let peers: Vec<NodeId> = self.links.keys().copied().collect();
        let before: Vec<bool> = peers.iter().map(|peer| self.pauses_here(*peer)).collect();
        self.pauses.after = after;
        for (peer, before) in peers.into_iter().zip(before) {
            self.tell_pause_if_new(cx, peer, before);
        }
    }

    fn tell_pause_if_new(&mut self, cx: &mut Cx<'_>, peer: NodeId, before: bool) {
        let paused = self.pauses_here(peer);
        if paused != before && self.links.contains_key(&peer) {
            self.send(cx, peer, Message::PauseSync { paused });
        }
    }

    /// A new link was greeted on: the peer does not know yet.
    pub(crate) fn tell_pause(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        if self.pauses_here(peer) {
            self.send(cx, peer, Message::PauseSync { paused: true });
        }
    }

    /// Whether this side wants the resync to or from a peer to stand still.
    fn pauses_here(&self, peer: NodeId) -> bool {
        self.pauses.after.is_some() || self.pauses.ours.contains(&peer)
    }

    /// Whose resyncs on this node come first.
    pub(crate) fn sync_after(&self) -> Option<VolumeId> {
        self.pauses.after
    }

    /// The other side's operator paused the resync, or lets it go on.
    pub(crate) fn peer_pauses(&mut self, peer: NodeId, paused: bool) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.peer_pauses = paused;
        }
    }

    /// Whether the resync to or from a peer stands still by either side's wish.
    pub(crate) fn is_sync_paused(&self, peer: NodeId) -> bool {
        self.pauses_here(peer) || self.links.get(&peer).is_some_and(|link| link.peer_pauses)
    }

    /// Forgets the pauses of replicas that are gone.
    pub(crate) fn forget_pauses(&mut self, stays: impl Fn(&NodeId) -> bool) {
        self.pauses.ours.retain(stays);
    }

    /// This replica, as a resync's target, has blocks as the primary has them: it is uncertain of them no
    /// longer, and the next resync, after a lost link or a restart, need not copy them again. Whoever is
    /// primary later knows of every write since: this replica is outside the set, so each write names it.
    /// Not for a reign that is over: its successor may have been told of these blocks already.
    pub(crate) fn copied_here(&mut self, cx: &Cx<'_>, reply: Reply, blocks: BlockRange) {
        let current = self.reigning() == Some((reply.peer, Part::Target)) && self.is_current(reply);
        if current && !self.has_receipts(reply.peer) {
            let own = self.meta.own_slot();
            self.meta.bitmaps.clear(own, blocks);
            self.save_soon(cx);
        }
    }

    /// Whether a write of a primary may be complete when a member only received it (protocol B): then a
    /// resync may bring what a crash of both takes back, and nobody but this replica would know.
    fn has_receipts(&self, primary: NodeId) -> bool {
        self.volume.as_ref().is_none_or(|volume| {
            let others = volume.replicas.keys().filter(|node| **node != primary);
            let mut protocols = others.map(|node| volume.protocol(primary, *node));
            protocols.any(|protocol| protocol == Protocol::B)
        })
    }

    /// The target of a resync has blocks.
    pub(crate) fn copied_there(&mut self, cx: &Cx<'_>, peer: NodeId, blocks: BlockRange) {
        let Some(slot) = self.slot(peer) else {
            return;
        };
        self.meta.bitmaps.clear(slot, blocks);
        self.save_soon(cx);
    }

    fn save_soon(&mut self, cx: &Cx<'_>) {
        self.pauses.save_at.get_or_insert(cx.now + SAVE_EVERY);
    }

    /// Makes what was copied durable when it is time.
    pub(crate) fn settle_saving(&mut self, cx: &Cx<'_>) {
        if self.pauses.save_at.is_some_and(|at| cx.now >= at) {
            self.pauses.save_at = None;
            self.meta.want_bitmaps();
        }
    }

    pub(crate) fn saving_deadline(&self) -> Time {
        self.pauses.save_at.unwrap_or(Time::NEVER)
    }
}
