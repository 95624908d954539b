//! The primary's side of a session with a peer: resync of what is dirty, the barrier at its end,
//! and the way into the in-sync set.

use std::collections::BTreeMap;

use bytes::Bytes;
use relevo_types::{
    BLOCK_SIZE, BlockRange, Epoch, NodeId, ReplicaSlot, Seq, Time,
    cluster::options::{Csums, SyncRate},
};
use relevo_wire::{Body, Message};

use crate::{
    bitmap::Blocks,
    compare::{Comparing, Means},
    generations::Generation,
    jobs::Owner,
    lab::PlantedBug,
    link::Walk,
    machine::{Machine, is_zero, mask, slots_of},
    meter::Meter,
    ops::Cx,
    secondary::RUNS_PER_MESSAGE,
};

/// Blocks of one resync write: 128 KiB, a good size for disks, small enough not to delay
/// application writes to the same blocks.
pub(crate) const CHUNK_BLOCKS: u64 = 32;

/// Blocks that are read at once where the last ones were all zero: 1 MiB. Zeroes come in long runs, and one
/// frame and one operation of the target's disk do for each. Also what an application's write waits for at
/// most.
const ZERO_CHUNK_BLOCKS: u64 = 256;

/// Fewer zero blocks than these between data travel with it: each piece costs a frame and an operation of
/// the target's disk.
const ZEROES_MIN: u64 = 4;

/// Resync writes under way to one peer at most, however short they are: they share the gate with
/// the application's I/O and must leave it room.
const CHUNKS_MAX: usize = 128;

/// A session: from the peer's first answer on every write is sent to it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) stage: Stage,
    /// Where the last generation of marks for each replica of protocol A began on this link.
    pub(crate) generations: BTreeMap<NodeId, Generation>,
    /// The epoch of its begin, echoed in `Uncertain`.
    epoch: Epoch,
    pub(crate) began: Time,
    /// Where the search for dirty blocks goes on.
    cursor: u64,
    /// Being read, sent or compared.
    pub(crate) busy: Blocks,
    pub(crate) reads: BTreeMap<BlockRange, Means>,
    sent: BTreeMap<u64, BlockRange>,
    pub(crate) comparing: Comparing,
    /// Blocks that the next read has at most.
    reach: u64,
    /// The complete position that the peer was told last.
    pub(crate) told_complete: Seq,
    /// Bytes of writes that were sent and not acknowledged ([`crate::primary::Write::weight`]).
    pub(crate) owed_bytes: u64,
    /// Since when a replica of protocol A lacks what it was not sent, or is being given it.
    pub(crate) behind_since: Option<Time>,
    /// It is given what verification found: when it is in sync, or follows, it differs no more.
    pub(crate) repairs: bool,
    /// What the resync copied.
    pub(crate) meter: Meter,
    /// Its speed when the engine last looked, in bytes a second, and when it looks again.
    pub(crate) speed: u64,
    pub(crate) speed_due: Time,
}

/// How far a session is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// The peer was asked what is uncertain.
    Starting,
    /// Dirty blocks are copied.
    Copying,
    /// Nothing is dirty; the barrier with this id is on its way. The peer is required from now on.
    Barrier(u64),
    /// The barrier was passed; the join is to be committed.
    Joining,
    /// In the in-sync set.
    InSync,
    /// Of protocol A, and nothing is dirty: the barrier with this id is on its way. Nobody waits.
    Settling(u64),
    /// Of protocol A: gets every write, is waited for by none. DRBD's `Established`.
    Following,
    /// Of protocol A, and did not keep up: marks instead of data until it has passed the barrier with
    /// this id, and with it all that was sent before. DRBD's `Ahead`.
    Ahead(u64),
}

impl Stage {
    /// Whether writes are sent: else their blocks are marked.
    pub(crate) fn takes_writes(self) -> bool {
        !matches!(self, Self::Starting | Self::Ahead(_))
    }
}

impl Session {
    fn new(stage: Stage, epoch: Epoch, began: Time) -> Self {
        Self {
            stage,
            generations: BTreeMap::new(),
            epoch,
            began,
            cursor: 0,
            busy: Blocks::default(),
            reads: BTreeMap::new(),
            sent: BTreeMap::new(),
            comparing: Comparing::default(),
            reach: CHUNK_BLOCKS,
            told_complete: Seq(0),
            owed_bytes: 0,
            behind_since: None,
            repairs: false,
            meter: Meter::default(),
            speed: 0,
            speed_due: Time::NEVER,
        }
    }

    /// A session with a member whose tail was reconciled.
    pub(crate) fn in_sync(epoch: Epoch, began: Time) -> Self {
        Self::new(Stage::InSync, epoch, began)
    }

    /// Once a session copies nothing any more, that is soon zero, and nothing is due.
    fn look_at_speed(&mut self, now: Time) {
        self.meter.settle(now);
        self.speed = self.meter.speed(now);
        self.speed_due = self.meter.deadline(now);
    }

    /// Whether the peer owes an answer about the resync.
    pub(crate) fn owes(&self) -> bool {
        let waits = matches!(
            self.stage,
            Stage::Starting | Stage::Barrier(_) | Stage::Settling(_) | Stage::Ahead(_)
        );
        waits || !self.sent.is_empty() || self.comparing.owes()
    }

    fn is_idle(&self) -> bool {
        self.reads.is_empty() && self.sent.is_empty() && self.comparing.is_idle()
    }

    /// What was being copied is no longer: it stays dirty. From now on the stage is another one.
    pub(crate) fn restart(&mut self, stage: Stage, epoch: Epoch, now: Time) {
        self.stage = stage;
        self.generations.clear();
        self.epoch = epoch;
        self.began = now;
        self.cursor = 0;
        self.busy = Blocks::default();
        self.reads.clear();
        self.sent.clear();
        self.comparing.forget();
        self.reach = CHUNK_BLOCKS;
        self.owed_bytes = 0;
    }

    /// The target has so many bytes more.
    pub(crate) fn copied(&mut self, now: Time, bytes: u64) {
        self.meter.add(now, bytes);
        self.look_at_speed(now);
    }

    /// Whether there is room for one more piece.
    fn has_room(&self) -> bool {
        let pieces = self.reads.len() + self.sent.len() + self.comparing.asked();
        self.stage == Stage::Copying && pieces < CHUNKS_MAX
    }

    /// The same by the bytes of what is under way.
    fn has_window(&self, window: u64) -> bool {
        let under_way = self.busy.count() * BLOCK_SIZE;
        under_way < window || under_way == 0
    }

    /// Whether something is to be read that could be read now.
    fn has_more(&self, dirty: &Blocks, window: u64) -> bool {
        // What is busy and was written meanwhile is not dirty any more: then its end is soon, and leads
        // here again.
        let new = dirty.count() > self.busy.count() && self.has_window(window);
        self.has_room() && (new || self.comparing.has_differing())
    }

    /// What to read next, and why, if more may be under way.
    fn next_piece(
        &mut self,
        dirty: &Blocks,
        window: u64,
        csums: Csums,
    ) -> Option<(BlockRange, Means)> {
        if !self.has_room() {
            return None;
        }
        if let Some(run) = self.comparing.take_differing() {
            return Some((run, Means::Copy));
        }
        if !self.has_window(window) {
            return None;
        }
        let means = self.next_means(csums)?;
        let chunk = self.next_chunk(dirty)?;
        self.busy.set(chunk, |_| {});
        Some((chunk, means))
    }

    /// The next dirty run that is not under way.
    fn next_chunk(&mut self, dirty: &Blocks) -> Option<BlockRange> {
        let mut wrapped = self.cursor == 0;
        loop {
            let Some(run) = dirty.next_run(self.cursor, self.reach) else {
                if wrapped {
                    return None;
                }
                wrapped = true;
                self.cursor = 0;
                continue;
            };
            match self.busy.next_run(run.first, run.count) {
                Some(busy) if busy.first == run.first => self.cursor = busy.end(),
                Some(busy) if busy.first < run.end() => {
                    self.cursor = busy.end();
                    return Some(BlockRange::new(run.first, busy.first - run.first));
                }
                _ => {
                    self.cursor = run.end();
                    return Some(run);
                }
            }
        }
    }
}

impl Machine {
    pub(crate) fn session_mut(&mut self, peer: NodeId) -> Option<&mut Session> {
        self.links.get_mut(&peer)?.session.as_mut()
    }

    /// Begins sessions, copies, ends resyncs.
    pub(crate) fn settle_sync(&mut self, cx: &mut Cx<'_>) {
        self.settle_yield();
        self.settle_rate(cx);
        // Who comes after the one that was copied to last is first, so that none waits for ever.
        let turn = self.rate.turn();
        let mut walk = Walk::after(turn);
        while let Some(peer) = walk.next(&self.links) {
            self.settle_sync_with(cx, peer);
        }
        let mut walk = Walk::default();
        while let Some(peer) = walk.next(&self.links)
            && turn.is_some_and(|turn| peer <= turn)
        {
            self.settle_sync_with(cx, peer);
        }
        self.settle_verify(cx);
    }

    fn settle_sync_with(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        self.settle_lineage(cx, peer);
        if self.may_start_sync(peer) {
            self.begin_session(cx, peer);
        }
        self.settle_receipts(cx, peer);
        self.copy(cx, peer);
        self.end_copy(cx, peer);
        if let Some(session) = self.session_mut(peer)
            && cx.now >= session.speed_due
        {
            session.look_at_speed(cx.now);
        }
    }

    /// How fast may be copied and compared now.
    fn settle_rate(&mut self, cx: &Cx<'_>) {
        let chosen = self.volume.as_ref();
        let chosen = chosen.map_or_else(SyncRate::default, |volume| volume.options.sync_rate);
        self.rate.settle(cx.now, chosen, !self.requests.is_empty());
    }

    /// A replica outside the in-sync set, of which no join may yet be committed, greeted and not
    /// ahead of us.
    fn may_start_sync(&self, peer: NodeId) -> bool {
        let (Some(primary), Some(volume)) = (self.primary(), &self.volume) else {
            return false;
        };
        let greeted = self.links.get(&peer).is_some_and(|link| {
            link.session.is_none() && link.hello.is_some_and(|info| info.epoch <= primary.epoch)
        });
        greeted
            && !self.stepping_down
            && volume.epoch == primary.epoch
            && volume.replicas.get(&peer).is_some_and(|it| !it.leaving)
            && !primary.in_sync.contains(&peer)
            && !primary.pending_joins.contains_key(&peer)
            && self.may_be_overwritten(peer)
    }

    fn begin_session(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        if let Some(link) = self.links.get_mut(&peer) {
            link.session = Some(Session::new(Stage::Starting, epoch, cx.now));
            self.mark_repair(peer);
            self.send(cx, peer, Message::StartSync { epoch });
        }
    }

    /// What the peer is not sure of is dirty for it.
    pub(crate) fn uncertain(
        &mut self,
        peer: NodeId,
        epoch: Epoch,
        blocks: &[BlockRange],
        last: bool,
    ) {
        let Some(slot) = self.slot(peer) else {
            return;
        };
        let expected = self
            .session_mut(peer)
            .is_some_and(|session| session.stage == Stage::Starting && session.epoch == epoch);
        if !expected {
            return;
        }
        for run in blocks {
            self.meta.bitmaps.set(slot, *run);
        }
        if last {
            self.repaired_anyway(peer);
        }
        if let Some(session) = self.session_mut(peer).filter(|_| last) {
            session.stage = Stage::Copying;
        }
    }

    fn copy(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let Some(slot) = self.slot(peer) else {
            return;
        };
        let paused = self.is_sync_paused(peer);
        let (window, csums) = (self.config.resync_window, self.csums());
        loop {
            let dirty = self.meta.bitmaps.of(slot);
            let Some(session) = self
                .links
                .get_mut(&peer)
                .and_then(|link| link.session.as_mut())
            else {
                return;
            };
            if paused {
                // They stay dirty.
                for run in session.comparing.drop_differing() {
                    session.busy.clear(run, |_| {});
                }
                return;
            }
            if !self.rate.may(cx.now) {
                if session.has_more(dirty, window) {
                    self.rate.wait();
                }
                return;
            }
            let Some((blocks, means)) = session.next_piece(dirty, window, csums) else {
                return;
            };
            self.rate.take(cx.now, peer, blocks.bytes().len);
            session.reads.insert(blocks, means);
            self.read_blocks(cx, blocks, Owner::SyncRead(peer));
        }
    }

    pub(crate) fn sync_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        blocks: BlockRange,
        data: &Bytes,
    ) {
        let (window, held) = (self.config.resync_window, self.rate.limit().is_some());
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        let Some(means) = session.reads.remove(&blocks) else {
            return;
        };
        let pieces = pieces(blocks, data);
        let empty = matches!(pieces[..], [(_, Body::Zeroes)]);
        // Not where it is held: it would take a lot at once.
        session.reach = if empty && !held {
            let most = ZERO_CHUNK_BLOCKS.min(window / BLOCK_SIZE / 4);
            (blocks.count * 2).clamp(CHUNK_BLOCKS, most.max(CHUNK_BLOCKS))
        } else {
            CHUNK_BLOCKS
        };
        if self.lab.has(PlantedBug::ClearDirtyWithoutAck)
            && let Some(slot) = self.slot(peer)
        {
            self.meta.bitmaps.clear(slot, blocks);
        }
        self.tell_in_doubt(cx, peer, blocks);
        for (blocks, body) in pieces {
            match body {
                // Zeroes are shorter than their digests.
                Body::Data(data) if means == Means::Compare => {
                    self.compare(cx, peer, epoch, blocks, &data);
                }
                body => self.send_copy(cx, peer, epoch, blocks, body),
            }
        }
    }

    fn send_copy(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        blocks: BlockRange,
        body: Body,
    ) {
        let id = self.next_id();
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        session.sent.insert(id, blocks);
        let range = blocks.bytes();
        self.send(
            cx,
            peer,
            Message::SyncWrite {
                epoch,
                id,
                range,
                body,
            },
        );
    }

    pub(crate) fn sync_acked(&mut self, cx: &Cx<'_>, peer: NodeId, id: u64) {
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        if let Some(blocks) = session.sent.remove(&id) {
            session.busy.clear(blocks, |_| {});
            session.copied(cx.now, blocks.bytes().len);
            self.copied_there(cx, peer, blocks);
        }
    }

    /// When the speed of a resync is to be looked at again.
    pub(crate) fn speed_deadline(&self) -> Time {
        let sessions = self.links.values().filter_map(|link| link.session.as_ref());
        let due = sessions.map(|session| session.speed_due).min();
        due.unwrap_or(Time::NEVER)
    }

    /// When nothing is dirty and nothing under way: the barrier.
    fn end_copy(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let Some(slot) = self.slot(peer) else {
            return;
        };
        let mut clean = self.meta.bitmaps.of(slot).is_empty();
        clean |= self.lab.has(PlantedBug::JoinWhilePaused) && self.is_sync_paused(peer);
        let id = self.last_id + 1;
        let joins = self.may_join(peer);
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        let from = matches!(
            (session.stage, joins),
            (Stage::Copying, _) | (Stage::Following, true)
        );
        if !from || !session.is_idle() || !clean {
            return;
        }
        session.stage = if joins {
            Stage::Barrier(id)
        } else {
            Stage::Settling(id)
        };
        self.last_id = id;
        // One of protocol A too: it may be forced.
        self.send_dirty_maps(cx, peer);
        if joins {
            self.send_pending_flushes(cx, peer);
        }
        if let Some(epoch) = self.primary().map(|primary| primary.epoch) {
            self.send(cx, peer, Message::Barrier { epoch, id });
        }
    }

    /// What other replicas may lack: the new member must be able to resync them after a failover.
    /// That is what is marked for them, and what was sent to them and is not acknowledged yet: the
    /// new member may have got it by its resync and not with a write that names who lacks it.
    fn send_dirty_maps(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let Some(primary) = self.primary() else {
            return;
        };
        let epoch = primary.epoch;
        let others = self.other_slots() & !self.slot(peer).map_or(0, mask);
        let mut maps: Vec<(ReplicaSlot, Vec<BlockRange>)> = Vec::new();
        for slot in slots_of(others) {
            let mut lacking = self.meta.bitmaps.of(slot).clone();
            for write in primary.writes.values() {
                if write.unacked & mask(slot) != 0 {
                    lacking.set(write.blocks, |_| {});
                }
            }
            maps.push((slot, lacking.runs(u64::MAX).collect()));
        }
        for (slot, runs) in maps {
            self.send_dirty_map(cx, peer, epoch, slot, &runs);
        }
    }

    /// Tells a peer, in as many messages as it takes, what the replica of a slot may lack. Nothing where
    /// that is nothing.
    pub(crate) fn send_dirty_map(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        slot: ReplicaSlot,
        runs: &[BlockRange],
    ) {
        for part in runs.chunks(RUNS_PER_MESSAGE) {
            let map = Message::DirtyMap {
                epoch,
                slot,
                blocks: part.to_vec(),
            };
            self.send(cx, peer, map);
        }
    }

    pub(crate) fn barrier_acked(&mut self, cx: &mut Cx<'_>, peer: NodeId, id: u64) {
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        match session.stage {
            Stage::Barrier(barrier) if barrier == id => session.stage = Stage::Joining,
            Stage::Settling(barrier) if barrier == id => self.let_follow(cx, peer),
            Stage::Ahead(barrier) if barrier == id => self.catch_up(cx, peer),
            _ => {}
        }
    }

    /// Forgets a session: what the peer did not acknowledge is dirty for it.
    pub(crate) fn drop_session(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let session = self
            .links
            .get_mut(&peer)
            .and_then(|link| link.session.take());
        if session.is_none() {
            return;
        }
        self.stop_verify(cx, peer, "the link to the replica was lost");
        self.abandon_jobs(cx, |owner| *owner == Owner::SyncRead(peer));
        self.mark_unacked(peer);
        self.update_all(cx);
    }

    /// What a peer was sent and did not acknowledge is dirty for it, and no acknowledgement of it
    /// counts any more. Gives the time of the oldest.
    pub(crate) fn mark_unacked(&mut self, peer: NodeId) -> Option<Time> {
        let slot = self.slot(peer)?;
        let mut unacked = Vec::new();
        let mut oldest = None;
        if let Some(primary) = self.primary_mut() {
            for write in primary.writes.values_mut() {
                // Only as good as the process that gave it.
                write.received &= !mask(slot);
                if write.unacked & mask(slot) != 0 {
                    write.unacked &= !mask(slot);
                    unacked.push(write.blocks);
                    oldest.get_or_insert(write.since);
                }
            }
        }
        for blocks in unacked {
            self.meta.bitmaps.set(slot, blocks);
        }
        oldest
    }
}

/// What was read of a run, in the pieces in which it travels: runs of zeroes as such, so that they take no
/// room at the target either, and data in writes of a bounded size.
fn pieces(blocks: BlockRange, data: &Bytes) -> Vec<(BlockRange, Body)> {
    let block = usize::try_from(BLOCK_SIZE).unwrap_or(usize::MAX);
    let mut runs: Vec<(BlockRange, bool)> = Vec::new();
    for (number, content) in blocks.iter().zip(data.chunks(block)) {
        let zero = is_zero(content);
        match runs.last_mut() {
            Some((run, same)) if *same == zero => run.count += 1,
            _ => runs.push((BlockRange::new(number, 1), zero)),
        }
    }
    let single = runs.len() == 1;
    let mut pieces: Vec<(BlockRange, Body)> = Vec::new();
    let slice = |run: BlockRange| {
        let range = run.bytes();
        let from = usize::try_from(range.offset - blocks.bytes().offset).unwrap_or(usize::MAX);
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        Body::Data(data.slice(from..from + len))
    };
    let cut = |run: Option<BlockRange>| {
        let runs = run.into_iter().flat_map(|run| run.pieces(CHUNK_BLOCKS));
        runs.map(|run| (run, slice(run)))
    };
    let mut rest: Option<BlockRange> = None;
    for (run, zero) in runs {
        if zero && (single || run.count >= ZEROES_MIN) {
            pieces.extend(cut(rest.take()));
            pieces.push((run, Body::Zeroes));
        } else if let Some(rest) = &mut rest {
            rest.count += run.count;
        } else {
            rest = Some(run);
        }
    }
    pieces.extend(cut(rest));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Content of blocks of which these are not zero.
    fn content(count: u64, used: &[u64]) -> Bytes {
        let block = usize::try_from(BLOCK_SIZE).unwrap();
        let used = |number| u8::from(used.contains(&number));
        let blocks = (0..count).flat_map(|number| vec![used(number); block]);
        blocks.collect::<Vec<u8>>().into()
    }

    fn split(count: u64, used: &[u64]) -> Vec<(u64, u64, bool)> {
        let data = content(count, used);
        let pieces = pieces(BlockRange::new(100, count), &data);
        for (run, body) in &pieces {
            if let Body::Data(bytes) = body {
                let from = usize::try_from((run.first - 100) * BLOCK_SIZE).unwrap();
                assert_eq!(bytes[..], data[from..from + bytes.len()]);
                assert_eq!(bytes.len() as u64, run.bytes().len);
            }
        }
        let brief = |(run, body): (BlockRange, Body)| {
            (run.first - 100, run.count, matches!(body, Body::Zeroes))
        };
        pieces.into_iter().map(brief).collect()
    }

    #[test]
    fn zeroes_travel_in_one_piece_and_data_in_bounded_ones() {
        assert_eq!(split(256, &[]), [(0, 256, true)]);
        assert_eq!(split(1, &[]), [(0, 1, true)]);
        let all: Vec<u64> = (0..70).collect();
        assert_eq!(
            split(70, &all),
            [(0, 32, false), (32, 32, false), (64, 6, false)]
        );
        let ends = [(0, 1, false), (1, 30, true), (31, 1, false)];
        assert_eq!(split(32, &[0, 31]), ends);
        let few = "three zero blocks stay with the data around them";
        assert_eq!(split(8, &[0, 4, 5, 6]), [(0, 8, false)], "{few}");
        assert_eq!(
            split(9, &[3, 8]),
            [(0, 4, false), (4, 4, true), (8, 1, false)]
        );
    }
}
