//! What this replica does under another node's reign: persists epochs, writes what it is sent,
//! keeps the tail and the marks for absent replicas, answers.

use relevo_types::{BlockRange, ByteRange, Epoch, NodeId, ReplicaSlot, Seq};
use relevo_wire::{Body, Message, Refusal};

use crate::{
    jobs::{FlushFor, JobId, Owner, Reply},
    lab::PlantedBug,
    link::{Incoming, Part},
    machine::{Machine, Role, mask, slots_of},
    ops::Cx,
};

/// Runs in one `Uncertain` or `DirtyMap` message: 16 bytes each, so a message stays below 64 KiB.
pub(crate) const RUNS_PER_MESSAGE: usize = 4000;

/// Runs in a `Tail`, which is one message. A tail in more pieces is given in whole regions; if
/// even those are too many the replica counts as uncertain and is resynced.
const TAIL_RUNS_MAX: usize = 16_384;

/// What goes on when a change of the metadata is durable.
#[derive(Debug)]
pub(crate) enum After {
    /// Answer `StartSync`.
    StartSync(Reply),
    /// Answer the `StartSync` of a primary that left this replica behind.
    CatchUp(Reply),
    /// Answer `Reconcile`.
    Reconcile(Reply),
    /// Act on `EpochUpdate`.
    EpochUpdate(Reply, u8),
    /// Answer `Barrier`.
    Barrier(Reply, u64),
    /// Act under the configuration of this epoch.
    Config(Epoch),
}

impl After {
    /// Whether it is about this node's own reign.
    pub(crate) fn is_for_primary(&self) -> bool {
        matches!(self, Self::Config(_))
    }
}

/// A barrier that waits for earlier writes of its link.
#[derive(Debug)]
pub(crate) struct Barrier {
    pub(crate) reply: Reply,
    id: u64,
    before: JobId,
}

impl Machine {
    pub(crate) fn carry_on(&mut self, cx: &mut Cx<'_>, after: After) {
        match after {
            After::Config(epoch) => self.config_durable(cx, epoch),
            After::StartSync(reply) if self.is_current(reply) => {
                self.send_uncertain(cx, reply);
                self.unblock(cx, reply.peer);
            }
            After::CatchUp(reply) if self.is_current(reply) => {
                self.send_runs_of_doubt(cx, reply, &[]);
                self.unblock(cx, reply.peer);
            }
            After::Reconcile(reply) if self.is_current(reply) => {
                self.send_tail(cx, reply);
                self.unblock(cx, reply.peer);
            }
            After::EpochUpdate(reply, in_sync) if self.is_current(reply) => {
                self.enter_epoch(reply.peer, in_sync);
                self.unblock(cx, reply.peer);
            }
            After::Barrier(reply, id) if self.is_link_of(reply) => {
                let Reply { peer, epoch, .. } = reply;
                self.send(cx, peer, Message::BarrierAck { epoch, id });
            }
            After::StartSync(reply) | After::CatchUp(reply) | After::Reconcile(reply) => {
                // Overtaken by a higher epoch, perhaps one of the same primary, which would wait for
                // the answer for ever: on a new link it asks again.
                if self.is_link_of(reply) {
                    self.stale(cx, reply.peer, reply.epoch);
                }
            }
            After::EpochUpdate(reply, _) => {
                // Overtaken too, but nobody waits for an answer.
                if self.is_link_of(reply) {
                    self.unblock(cx, reply.peer);
                }
            }
            After::Barrier(..) => {}
        }
    }

    /// Whether the link of a reply is still there.
    pub(crate) fn is_link_of(&self, reply: Reply) -> bool {
        self.link_number(reply.peer) == Some(reply.link)
    }

    fn link_number(&self, peer: NodeId) -> Option<u64> {
        self.links.get(&peer).map(|link| link.number)
    }

    /// Whether the link is the same and its reign was not replaced.
    pub(crate) fn is_current(&self, reply: Reply) -> bool {
        self.links.get(&reply.peer).is_some_and(|link| {
            link.number == reply.link
                && link
                    .incoming
                    .is_some_and(|incoming| incoming.epoch == reply.epoch)
        }) && reply.epoch >= self.seen_epoch()
    }

    pub(crate) fn reply_to(&self, peer: NodeId, epoch: Epoch) -> Reply {
        let link = self.link_number(peer).unwrap_or(0);
        Reply { peer, link, epoch }
    }

    fn stale(&mut self, cx: &mut Cx<'_>, peer: NodeId, given: Epoch) {
        let seen = self.seen_epoch();
        self.refuse(cx, peer, Refusal::StaleEpoch { given, seen });
    }

    /// A primary begins or renews its reign with this epoch. False: it was refused.
    fn accept_reign(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, part: Part) -> bool {
        if epoch < self.seen_epoch() {
            self.stale(cx, peer, epoch);
            return false;
        }
        let known = self.volume.as_ref().map(|v| (v.epoch, v.primary));
        if known.is_some_and(|(known, primary)| known == epoch && primary != Some(peer)) {
            self.protocol_error(cx, peer, "the sender is not primary under this epoch");
            return false;
        }
        self.close(cx, "another node is primary");
        self.meta.bitmaps.forget_generations();
        self.saw_epoch(epoch);
        if let Some(link) = self.links.get_mut(&peer) {
            link.incoming = Some(Incoming { epoch, part });
        }
        true
    }

    /// Whether a message of a reign may be acted on; else it was refused.
    pub(crate) fn check_reign(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch) -> bool {
        if self.lab.has(PlantedBug::IgnoreLowerEpoch) {
            return true;
        }
        if epoch < self.seen_epoch() {
            self.stale(cx, peer, epoch);
            return false;
        }
        if self.reign(peer) != Some(epoch) {
            self.protocol_error(cx, peer, "data under an epoch that was not begun");
            return false;
        }
        true
    }

    /// The epoch of the peer's reign over this replica.
    fn reign(&self, peer: NodeId) -> Option<Epoch> {
        let incoming = self.links.get(&peer)?.incoming?;
        Some(incoming.epoch)
    }

    pub(crate) fn start_sync(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch) {
        let left = Incoming {
            epoch,
            part: Part::Behind,
        };
        let catches_up = self.links.get(&peer).and_then(|link| link.incoming) == Some(left);
        if self.accept_reign(cx, peer, epoch, Part::Target) {
            self.fold_tail();
            self.barriers.clear();
            self.block(peer);
            let reply = self.reply_to(peer, epoch);
            if catches_up {
                // The same reign on the same link: the primary was told what is uncertain here when this
                // session began, and has marked since what it did not send. To be told of it again it would
                // copy everything again, each time.
                self.become_mix(After::CatchUp(reply));
            } else if self.is_other_lineage(peer) {
                self.give_way(cx, reply);
            } else {
                self.become_target(reply);
            }
        }
    }

    /// From here on this replica is a mix, durably, before the primary is told what it lacks.
    pub(crate) fn become_target(&mut self, reply: Reply) {
        self.become_mix(After::StartSync(reply));
    }

    fn become_mix(&mut self, after: After) {
        self.meta.superblock.inconsistent = true;
        let ticket = self.meta.want_all();
        self.afters.push((ticket, after));
    }

    fn send_uncertain(&mut self, cx: &mut Cx<'_>, reply: Reply) {
        let own = self.meta.bitmaps.of(self.meta.own_slot());
        let runs: Vec<BlockRange> = own.runs(u64::MAX).collect();
        self.send_runs_of_doubt(cx, reply, &runs);
    }

    fn send_runs_of_doubt(&mut self, cx: &mut Cx<'_>, reply: Reply, runs: &[BlockRange]) {
        let epoch = reply.epoch;
        let mut parts = runs.chunks(RUNS_PER_MESSAGE).peekable();
        if parts.peek().is_none() {
            let nothing = Message::Uncertain {
                epoch,
                blocks: Vec::new(),
                last: true,
            };
            self.send(cx, reply.peer, nothing);
        }
        while let Some(part) = parts.next() {
            let blocks = part.to_vec();
            let last = parts.peek().is_none();
            self.send(
                cx,
                reply.peer,
                Message::Uncertain {
                    epoch,
                    blocks,
                    last,
                },
            );
        }
    }

    pub(crate) fn reconcile(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch) {
        if self.accept_reign(cx, peer, epoch, Part::Reconciling) {
            self.fold_tail();
            self.barriers.clear();
            let ticket = self.meta.want_superblock();
            self.block(peer);
            let reply = self.reply_to(peer, epoch);
            self.afters.push((ticket, After::Reconcile(reply)));
        }
    }

    fn send_tail(&mut self, cx: &mut Cx<'_>, reply: Reply) {
        let own = self.meta.bitmaps.of(self.meta.own_slot());
        let mut blocks: Vec<BlockRange> = own.runs(u64::MAX).take(TAIL_RUNS_MAX + 1).collect();
        if blocks.len() > TAIL_RUNS_MAX {
            let mut regions: Vec<_> = own
                .runs(u64::MAX)
                .flat_map(relevo_format::Layout::regions)
                .take(TAIL_RUNS_MAX * relevo_format::activity::REGIONS_MAX)
                .collect();
            regions.dedup();
            let layout = self.meta.layout();
            blocks = regions
                .into_iter()
                .map(|region| layout.region_blocks(region))
                .collect();
        }
        let certain = self.certain && blocks.len() <= TAIL_RUNS_MAX;
        if !certain {
            blocks.clear();
        }
        let tail = Message::Tail {
            epoch: reply.epoch,
            blocks,
            certain,
        };
        self.send(cx, reply.peer, tail);
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one message")]
    pub(crate) fn peer_write(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        seq: Seq,
        range: ByteRange,
        body: Body,
        fua: bool,
        dirty_for: u8,
    ) {
        let blocks = range.blocks_covered();
        // Before the write, and before a later EpochUpdate can take marks back.
        self.use_slots(dirty_for);
        self.mark_dirty(dirty_for, blocks);
        if !self.tail.add(seq, blocks) {
            self.protocol_error(cx, peer, "more writes are open than the window allows");
            return;
        }
        let reply = self.reply_to(peer, epoch);
        // Not while a crash would go unnoticed: it would take the write back, and this replica would count
        // as one that has everything.
        let receipt = !fua
            && self.meta.is_durably_in_use()
            && self
                .links
                .get(&peer)
                .is_some_and(|link| link.gives_receipts);
        if receipt {
            // From here on it is as good as written: nothing but the end of this process takes it
            // out of the jobs.
            self.gave_receipts = true;
            self.send(cx, peer, Message::Received { epoch, seq });
        }
        self.write_blocks(cx, blocks, body, fua, Owner::PeerWrite(reply, seq));
    }

    pub(crate) fn peer_write_done(&mut self, cx: &mut Cx<'_>, reply: Reply, seq: Seq) {
        if self.is_link_of(reply) {
            let epoch = reply.epoch;
            self.send(cx, reply.peer, Message::WriteAck { epoch, seq });
        }
    }

    pub(crate) fn peer_sync_write(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        id: u64,
        range: ByteRange,
        body: Body,
    ) {
        if !self.check_reign(cx, peer, epoch) {
            return;
        }
        let blocks = range.blocks_covered();
        let part = self.links.get(&peer).and_then(|link| link.incoming);
        if part.is_some_and(|incoming| incoming.part == Part::Reconciling) {
            // The new primary may die before every member has this: then the next one must hear
            // of it, even if this replica's own tail never had the block.
            let own = self.meta.own_slot();
            self.meta.bitmaps.set(own, blocks);
        }
        let reply = self.reply_to(peer, epoch);
        self.write_blocks(cx, blocks, body, false, Owner::PeerSync(reply, id));
    }

    pub(crate) fn peer_sync_done(&mut self, cx: &mut Cx<'_>, reply: Reply, id: u64) {
        if self.is_link_of(reply) {
            let epoch = reply.epoch;
            self.send(cx, reply.peer, Message::SyncAck { epoch, id });
        }
    }

    pub(crate) fn peer_flush(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, id: u64) {
        if self.check_reign(cx, peer, epoch) {
            let reply = self.reply_to(peer, epoch);
            self.flush_received(cx, FlushFor::Peer(reply, id));
        }
    }

    pub(crate) fn peer_flush_done(&mut self, cx: &mut Cx<'_>, reply: Reply, id: u64) {
        if self.is_link_of(reply) {
            let epoch = reply.epoch;
            self.send(cx, reply.peer, Message::FlushAck { epoch, id });
        }
    }

    pub(crate) fn barrier(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, id: u64) {
        if self.check_reign(cx, peer, epoch) {
            let reply = self.reply_to(peer, epoch);
            let before = self.jobs.next_id();
            self.barriers.push(Barrier { reply, id, before });
        }
    }

    /// Barriers whose earlier writes are done get durable.
    pub(crate) fn settle_barriers(&mut self, _cx: &mut Cx<'_>) {
        let barriers = std::mem::take(&mut self.barriers);
        for barrier in barriers {
            if self.jobs.has_peer_job_before(barrier.before) {
                self.barriers.push(barrier);
            } else {
                // The flush of the bitmaps covers the data too.
                let ticket = self.meta.want_bitmaps();
                let after = After::Barrier(barrier.reply, barrier.id);
                self.afters.push((ticket, after));
            }
        }
    }

    /// Late ones are about a reign that is over, and harmless: passed over.
    pub(crate) fn dirty_map(
        &mut self,
        peer: NodeId,
        epoch: Epoch,
        slot: ReplicaSlot,
        blocks: &[BlockRange],
    ) {
        if self.reign(peer) == Some(epoch) && epoch >= self.seen_epoch() {
            self.use_slots(mask(slot));
            let own = self.meta.own_slot();
            for run in blocks {
                if slot == own {
                    // About this replica: a member may lack what this one is about to be given.
                    self.meta.bitmaps.set(own, *run);
                } else {
                    self.mark_dirty(mask(slot), *run);
                }
            }
        }
    }

    pub(crate) fn peer_complete(&mut self, peer: NodeId, epoch: Epoch, seq: Seq) {
        if self.reign(peer) == Some(epoch) && epoch >= self.seen_epoch() {
            self.tail.complete(seq);
        }
    }

    pub(crate) fn epoch_update(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        in_sync: u8,
    ) {
        if epoch < self.seen_epoch() {
            return;
        }
        let own = self.meta.own_slot();
        let member = in_sync & mask(own) != 0;
        let Some(incoming) = self
            .links
            .get_mut(&peer)
            .and_then(|link| link.incoming.as_mut())
        else {
            self.protocol_error(cx, peer, "a new epoch without a reign");
            return;
        };
        if epoch < incoming.epoch {
            return;
        }
        incoming.epoch = epoch;
        self.saw_epoch(epoch);
        // What this replica alone may have seen of the last reign, or does not know to be
        // complete, the replicas outside the set may lack.
        // Slots used before too: this node may not know yet of a replica that was added.
        self.use_slots(in_sync);
        let used = self.meta.superblock.slots_used & !mask(own);
        let outside = (self.other_slots() | used) & !in_sync;
        self.use_slots(outside);
        let tail: Vec<BlockRange> = self.tail.blocks().collect();
        for blocks in tail {
            self.mark_dirty(outside, blocks);
        }
        if member {
            for slot in slots_of(outside) {
                self.meta.bitmaps.merge(own, slot);
            }
            self.meta.superblock.inconsistent = false;
        }
        // Durable before the own map is cleared.
        let ticket = self.meta.want_all();
        self.block(peer);
        let reply = self.reply_to(peer, epoch);
        self.afters
            .push((ticket, After::EpochUpdate(reply, in_sync)));
    }

    /// The members of the in-sync set lack nothing that is complete; what is not is in the tail.
    fn enter_epoch(&mut self, peer: NodeId, in_sync: u8) {
        let member = in_sync & mask(self.meta.own_slot()) != 0;
        for slot in slots_of(in_sync) {
            self.meta.bitmaps.clear_all(slot);
        }
        if member {
            self.certain = true;
            if let Some(incoming) = self
                .links
                .get_mut(&peer)
                .and_then(|link| link.incoming.as_mut())
            {
                incoming.part = Part::Member;
            }
        }
    }

    /// The link of the primary whose reign this replica is under, and what it is there.
    pub(crate) fn reigning(&self) -> Option<(NodeId, Part)> {
        if !matches!(self.role, Role::Secondary) {
            return None;
        }
        self.links
            .iter()
            .filter_map(|(peer, link)| Some((*peer, link.incoming?)))
            .filter(|(_, incoming)| incoming.epoch >= self.seen_epoch())
            .map(|(peer, incoming)| (peer, incoming.part))
            .next_back()
    }
}
