//! The primary's reign: writes with their positions, who must acknowledge them, flushes, and the
//! end of the reign.

use std::collections::{BTreeMap, BTreeSet};

use relevo_types::{BlockRange, Epoch, NodeId, Seq, Time};
use relevo_wire::{Body, Message};

use crate::{
    io::{Effect, ReplyError, RequestId, VolumeEvent},
    jobs::{FlushFor, JobId, Owner},
    lab::PlantedBug,
    link::Walk,
    machine::{Machine, Role, mask, slots_of},
    ops::Cx,
    sync::Stage,
    window::Window,
};

/// When no write carries the complete position, it is sent by itself after this time.
const IDLE_COMPLETE: std::time::Duration = std::time::Duration::from_millis(50);

/// State of a reign.
#[derive(Debug)]
pub(crate) struct Primary {
    /// The epoch in force: committed, and durable here.
    pub(crate) epoch: Epoch,
    /// Its in-sync set.
    pub(crate) in_sync: BTreeSet<NodeId>,
    /// Joins that were proposed and may yet be committed, with the epoch that they expect.
    pub(crate) pending_joins: BTreeMap<NodeId, Epoch>,
    pub(crate) last_seq: Seq,
    /// Every write at or below it is acknowledged by all that must.
    pub(crate) complete: Seq,
    /// Writes that somebody did not acknowledge yet.
    pub(crate) writes: Window<Seq, Write>,
    pub(crate) incomplete: Window<Seq, ()>,
    /// Bytes of data of `writes`.
    pub(crate) write_bytes: u64,
    pub(crate) flushes: BTreeMap<u64, PendingFlush>,
    pub(crate) demotion: Demotion,
    /// Requests are taken: it does not only tend the volume.
    pub(crate) serves: bool,
    /// When to send the complete position by itself.
    pub(crate) complete_due: Option<Time>,
}

/// A write under way.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) epoch: Epoch,
    pub(crate) blocks: BlockRange,
    data_bytes: u64,
    fua: bool,
    request: RequestId,
    job: JobId,
    pub(crate) local_done: bool,
    /// Slots that it was sent to and that owe the acknowledgement.
    pub(crate) unacked: u8,
    /// Slots that acknowledged it.
    pub(crate) acked: u8,
    /// Slots that said that they received it, on a session that lasts.
    pub(crate) received: u8,
    /// Answered, as far as replication goes.
    pub(crate) complete: bool,
    /// Written by all that must: only then the complete position passes it.
    pub(crate) settled: bool,
    pub(crate) since: Time,
}

/// An application's flush, or the last one before a step-down.
#[derive(Debug)]
pub(crate) struct PendingFlush {
    request: Option<RequestId>,
    local_done: bool,
    asked: u8,
    acked: u8,
    pub(crate) since: Time,
}

/// How far a planned step-down is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Demotion {
    None,
    /// Everything is answered; the last flush is under way.
    Flushing,
    /// Everything is durable everywhere; only the commit is missing.
    Proposing,
}

impl Write {
    /// What it counts in a send buffer: zeroes are not free, each write is remembered.
    pub(crate) fn weight(&self) -> u64 {
        self.data_bytes.max(relevo_types::BLOCK_SIZE)
    }
}

impl Primary {
    pub(crate) fn new(epoch: Epoch, in_sync: BTreeSet<NodeId>) -> Self {
        Self {
            epoch,
            in_sync,
            pending_joins: BTreeMap::new(),
            last_seq: Seq(0),
            complete: Seq(0),
            writes: Window::default(),
            incomplete: Window::default(),
            write_bytes: 0,
            flushes: BTreeMap::new(),
            demotion: Demotion::None,
            serves: false,
            complete_due: None,
        }
    }

    /// Since when the replica of a slot owes the answer to a write or flush.
    pub(crate) fn unanswered_since(&self, slot: u8) -> Option<Time> {
        let write = self.writes.values().find(|write| write.unacked & slot != 0);
        let flush = self
            .flushes
            .values()
            .find(|flush| flush.asked & !flush.acked & slot != 0);
        let write = write.map(|write| write.since);
        write
            .into_iter()
            .chain(flush.map(|flush| flush.since))
            .min()
    }
}

impl Machine {
    /// The reign, if there is one.
    pub(crate) fn primary(&self) -> Option<&Primary> {
        match &self.role {
            Role::Primary(primary) => Some(primary),
            Role::Secondary | Role::Promoting(_) | Role::Yielding => None,
        }
    }

    pub(crate) fn primary_mut(&mut self) -> Option<&mut Primary> {
        match &mut self.role {
            Role::Primary(primary) => Some(primary),
            Role::Secondary | Role::Promoting(_) | Role::Yielding => None,
        }
    }

    /// The slots whose acknowledgement a write needs besides the local disk's: the committed
    /// in-sync set, and whoever is about to join it or may have joined it already.
    pub(crate) fn required(&self) -> u8 {
        let Some(primary) = self.primary() else {
            return 0;
        };
        let joining = self.links.iter().filter_map(|(peer, link)| {
            let stage = &link.session.as_ref()?.stage;
            matches!(stage, Stage::Barrier(_) | Stage::Joining | Stage::InSync).then_some(peer)
        });
        let waits = !self.lab.has(PlantedBug::AckBeforeLeaveCommitted);
        let has_session = |node: &NodeId| {
            self.links
                .get(node)
                .is_some_and(|link| link.session.is_some())
        };
        let slots = primary
            .in_sync
            .iter()
            .filter(|node| waits || has_session(node))
            .chain(primary.pending_joins.keys())
            .chain(joining)
            .filter_map(|node| self.slot(*node));
        let slots = slots.fold(0, |all, slot| all | mask(slot)) & !mask(self.meta.own_slot());
        if self.lab.has(PlantedBug::AsyncCountsAsInSync) {
            return slots & !self.async_slots;
        }
        slots
    }

    /// The slots of peers with a session that have everything that they were not sent on it.
    fn past_barrier(&self) -> u8 {
        self.session_slots(|stage| {
            matches!(stage, Stage::Barrier(_) | Stage::Joining | Stage::InSync)
        })
    }

    /// The slots of the peers with a session at such a stage.
    fn session_slots(&self, which: impl Fn(Stage) -> bool) -> u8 {
        let sessions = self.links.iter().filter(|(_, link)| {
            let session = link.session.as_ref();
            session.is_some_and(|session| which(session.stage))
        });
        sessions
            .filter_map(|(peer, _)| self.slot(*peer))
            .fold(0, |all, slot| all | mask(slot))
    }

    /// The next peer of a walk that has a session, and its slot.
    pub(crate) fn next_session(&self, walk: &mut Walk) -> Option<(NodeId, u8)> {
        loop {
            let peer = walk.next(&self.links)?;
            let has_session = self.links.get(&peer)?.session.is_some();
            if let Some(slot) = self.slot(peer).filter(|_| has_session) {
                return Some((peer, mask(slot)));
            }
        }
    }

    /// Gives a write its position and routes it: each other replica either is sent it, and its
    /// acknowledgement is awaited, or has its blocks marked dirty.
    pub(crate) fn issue_write(
        &mut self,
        cx: &mut Cx<'_>,
        job: JobId,
        request: RequestId,
        blocks: BlockRange,
        body: &Body,
        fua: bool,
    ) {
        self.leave_behind_congested(cx, body);
        // One that was left behind gets nothing. A peer that has not answered yet gets nothing: its marks are as good, and one whose disk
        // hangs would hold up the application with every new link.
        let sent = self.session_slots(Stage::takes_writes);
        let others = self.other_slots();
        let slot_of = |node: &NodeId| self.slot(*node).map_or(0, mask);
        let Some(primary) = self.primary() else {
            return;
        };
        let in_sync = primary
            .in_sync
            .iter()
            .map(slot_of)
            .fold(0, |all, slot| all | slot);
        // A peer that is being resynced gets the write, but nothing waits for it: whoever takes
        // over must know that it may lack it.
        let dirty_for = others & !(sent & in_sync);
        let mut marked = others & !sent;
        if self.lab.has(PlantedBug::AheadWithoutMarks) {
            marked &= !self.left_behind_slots();
        }
        self.mark_dirty(marked, blocks);
        let Some(primary) = self.primary_mut() else {
            return;
        };
        let seq = primary.last_seq.next();
        let (epoch, complete) = (primary.epoch, primary.complete);
        primary.last_seq = seq;
        primary.incomplete.insert(seq, ());
        let data_bytes = match body {
            Body::Data(data) => data.len() as u64,
            Body::Zeroes => 0,
        };
        primary.write_bytes += data_bytes;
        let write = Write {
            epoch,
            blocks,
            data_bytes,
            fua,
            request,
            job,
            local_done: false,
            unacked: sent,
            acked: 0,
            received: 0,
            complete: false,
            settled: false,
            since: cx.now,
        };
        let weight = write.weight();
        primary.writes.insert(seq, write);
        if self.async_slots != 0 {
            self.generations_soon(cx);
        }
        if let Some(job) = self.jobs.table.get_mut(&job) {
            job.owner = Owner::Write(seq);
        }
        let mut walk = Walk::default();
        while let Some((peer, slot)) = self.next_session(&mut walk) {
            if sent & slot == 0 {
                continue;
            }
            let write = Message::Write {
                epoch,
                seq,
                complete,
                range: blocks.bytes(),
                body: body.clone(),
                fua,
                dirty_for: dirty_for & !slot,
            };
            self.told_complete(peer, complete);
            if let Some(session) = self.session_mut(peer) {
                session.owed_bytes += weight;
            }
            self.send(cx, peer, write);
        }
    }

    fn told_complete(&mut self, peer: NodeId, complete: Seq) {
        if let Some(session) = self
            .links
            .get_mut(&peer)
            .and_then(|link| link.session.as_mut())
        {
            session.told_complete = complete;
        }
    }

    pub(crate) fn local_write_done(&mut self, cx: &mut Cx<'_>, seq: Seq) {
        if let Some(write) = self.primary_mut().and_then(|p| p.writes.get_mut(&seq)) {
            write.local_done = true;
            self.update_write(cx, seq);
        }
    }

    pub(crate) fn write_acked(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, seq: Seq) {
        let Some(slot) = self.slot(peer) else {
            return;
        };
        let Some(write) = self.primary_mut().and_then(|p| p.writes.get_mut(&seq)) else {
            return;
        };
        if write.epoch != epoch || write.unacked & mask(slot) == 0 {
            return;
        }
        write.unacked &= !mask(slot);
        write.acked |= mask(slot);
        let (blocks, weight) = (write.blocks, write.weight());
        if let Some(session) = self.session_mut(peer) {
            session.owed_bytes = session.owed_bytes.saturating_sub(weight);
        }
        // The peer has these blocks whole. A later write to them that it was not sent would have
        // ended its session, and with it this acknowledgement.
        self.meta.bitmaps.clear(slot, blocks);
        self.update_write(cx, seq);
    }

    /// A peer received a write: for protocol B that is enough to complete it.
    pub(crate) fn write_received(&mut self, cx: &mut Cx<'_>, peer: NodeId, epoch: Epoch, seq: Seq) {
        let slot = self.slot(peer).map_or(0, mask);
        let Some(write) = self.primary_mut().and_then(|p| p.writes.get_mut(&seq)) else {
            return;
        };
        if write.epoch == epoch && write.unacked & slot != 0 {
            write.received |= slot;
            self.update_write(cx, seq);
        }
    }

    /// Completes a write that all have that must; forgets one that all have.
    fn update_write(&mut self, cx: &mut Cx<'_>, seq: Seq) {
        let required = self.required();
        let write = self.primary().and_then(|primary| primary.writes.get(&seq));
        let unsettled = write.is_some_and(|write| write.complete && !write.settled);
        let by_resync = if unsettled { self.past_barrier() } else { 0 };
        let by_receipt = self.receipt_slots;
        let early = self.lab.has(PlantedBug::ReceiptSettles);
        let Some(primary) = self.primary_mut() else {
            return;
        };
        let Some(write) = primary.writes.get_mut(&seq) else {
            return;
        };
        let (job, request, blocks) = (write.job, write.request, write.blocks);
        let (data_bytes, since) = (write.data_bytes, write.since);
        let all_have_it = write.local_done && write.unacked == 0;
        let received = if write.fua {
            0
        } else {
            write.received & by_receipt
        };
        let have_it = write.acked | received;
        let now_complete = !write.complete && write.local_done && required & !have_it == 0;
        write.complete |= now_complete;
        // A replica that only received it may crash and lack it, and know nothing of it: whoever
        // takes over must have it in its tail until then.
        let mut written = if early { have_it } else { write.acked };
        // One that it was not sent has it by its resync, which reads what is complete.
        written |= by_resync & !write.unacked;
        let now_settled = !write.settled && write.local_done && required & !written == 0;
        write.settled |= now_settled;
        let over = write.settled && all_have_it;
        if now_settled {
            primary.incomplete.remove(&seq);
            primary.complete = primary
                .incomplete
                .first()
                .map_or(primary.last_seq, |(first, ())| Seq(first.0 - 1));
            primary.complete_due.get_or_insert(cx.now + IDLE_COMPLETE);
        }
        if over {
            primary.writes.remove(&seq);
            primary.write_bytes -= data_bytes;
        }
        if now_complete {
            self.rate.app_wrote(cx.now.since(since));
            self.open_gate(cx, job);
        }
        if over {
            self.forget_job(job);
        }
        if now_complete {
            self.piece_done(cx, request, blocks);
        }
    }

    /// Looks again at everything that waits for acknowledgements, after a change of who must.
    pub(crate) fn update_all(&mut self, cx: &mut Cx<'_>) {
        let Some(primary) = self.primary() else {
            return;
        };
        let seqs: Vec<Seq> = primary.writes.keys().copied().collect();
        let flushes: Vec<u64> = primary.flushes.keys().copied().collect();
        for seq in seqs {
            self.update_write(cx, seq);
        }
        for id in flushes {
            self.update_flush(cx, id);
        }
    }

    /// Starts a flush of everything acknowledged so far, here and on every member.
    pub(crate) fn start_app_flush(&mut self, cx: &mut Cx<'_>, request: Option<RequestId>) {
        let id = self.next_id();
        let required = self.required();
        let sent = self.session_slots(|_| true);
        let Some(primary) = self.primary_mut() else {
            return;
        };
        let flush = PendingFlush {
            request,
            local_done: false,
            asked: required & sent,
            acked: 0,
            since: cx.now,
        };
        primary.flushes.insert(id, flush);
        let epoch = primary.epoch;
        let mut walk = Walk::default();
        while let Some((peer, slot)) = self.next_session(&mut walk) {
            if slot & required != 0 {
                self.send(cx, peer, Message::Flush { epoch, id });
            }
        }
        self.flush_received(cx, FlushFor::App(id));
    }

    /// Asks a peer that is about to be required for the flushes under way too.
    pub(crate) fn send_pending_flushes(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let slot = self.slot(peer).map_or(0, mask);
        let Some(primary) = self.primary_mut() else {
            return;
        };
        let epoch = primary.epoch;
        let mut ids = Vec::new();
        for (id, flush) in &mut primary.flushes {
            // An answer that it gave in an earlier session does not count for this one.
            flush.asked |= slot;
            flush.acked &= !slot;
            ids.push(*id);
        }
        for id in ids {
            self.send(cx, peer, Message::Flush { epoch, id });
        }
    }

    pub(crate) fn local_flush_done(&mut self, cx: &mut Cx<'_>, id: u64) {
        if let Some(flush) = self.primary_mut().and_then(|p| p.flushes.get_mut(&id)) {
            flush.local_done = true;
            self.update_flush(cx, id);
        }
    }

    pub(crate) fn flush_acked(&mut self, cx: &mut Cx<'_>, peer: NodeId, id: u64) {
        let slot = self.slot(peer).map_or(0, mask);
        if let Some(flush) = self.primary_mut().and_then(|p| p.flushes.get_mut(&id)) {
            flush.acked |= slot;
            self.update_flush(cx, id);
        }
    }

    fn update_flush(&mut self, cx: &mut Cx<'_>, id: u64) {
        let required = self.required();
        let Some(primary) = self.primary_mut() else {
            return;
        };
        let done = primary
            .flushes
            .get(&id)
            .is_some_and(|flush| flush.local_done && required & !flush.acked == 0);
        if done && let Some(flush) = primary.flushes.remove(&id) {
            match flush.request {
                Some(request) => self.reply(cx, request, Ok(bytes::Bytes::new())),
                None => primary.demotion = Demotion::Proposing,
            }
        }
    }

    /// What the primary starts by itself.
    pub(crate) fn settle_primary(&mut self, cx: &mut Cx<'_>) {
        self.settle_quorum(cx);
        self.settle_heals(cx);
        self.settle_followers(cx);
        self.settle_generations(cx);
        self.pump_requests(cx);
        self.settle_sync(cx);
        self.settle_demotion(cx);
        self.settle_complete(cx);
    }

    fn settle_demotion(&mut self, cx: &mut Cx<'_>) {
        if !self.stepping_down || !self.requests.is_empty() {
            return;
        }
        let Some(primary) = self.primary_mut() else {
            return;
        };
        if primary.demotion == Demotion::None && primary.incomplete.is_empty() {
            primary.demotion = Demotion::Flushing;
            primary.complete_due = Some(cx.now);
            self.start_app_flush(cx, None);
        }
    }

    fn settle_complete(&mut self, cx: &mut Cx<'_>) {
        let Some(primary) = self.primary_mut() else {
            return;
        };
        if primary.complete_due.is_none_or(|due| cx.now < due) {
            return;
        }
        primary.complete_due = None;
        let (epoch, seq) = (primary.epoch, primary.complete);
        let mut walk = Walk::default();
        while let Some((peer, _)) = self.next_session(&mut walk) {
            let session = self
                .links
                .get_mut(&peer)
                .and_then(|link| link.session.as_mut());
            if session.is_some_and(|session| session.told_complete < seq) {
                self.told_complete(peer, seq);
                self.send(cx, peer, Message::Complete { epoch, seq });
            }
        }
    }

    /// Ends whatever this node was as primary: nothing is acknowledged any more, requests are
    /// answered with errors, and what may differ elsewhere is remembered as uncertain.
    pub(crate) fn close(&mut self, cx: &mut Cx<'_>, reason: &str) {
        if matches!(self.role, Role::Secondary) {
            return;
        }
        // First of all: from here on nothing gets acknowledged.
        let role = std::mem::replace(&mut self.role, Role::Secondary);
        self.forget_verification(cx);
        self.rate.rest();
        for link in self.links.values_mut() {
            link.session = None;
        }
        self.abandon_jobs(cx, |owner| {
            matches!(
                owner,
                Owner::AppRead(_)
                    | Owner::AppWrite(_)
                    | Owner::Write(_)
                    | Owner::SyncRead(_)
                    | Owner::VerifyRead(_)
                    | Owner::PushRead(_)
            )
        });
        if let Role::Primary(primary) = role {
            let own = self.meta.own_slot();
            for write in primary.writes.values() {
                self.mark_dirty(write.unacked, write.blocks);
            }
            for seq in primary.incomplete.keys() {
                if let Some(write) = primary.writes.get(seq) {
                    self.meta.bitmaps.set(own, write.blocks);
                }
            }
            let in_doubt: BTreeSet<RequestId> = primary
                .incomplete
                .keys()
                .filter_map(|seq| primary.writes.get(seq))
                .map(|write| write.request)
                .collect();
            for id in self.requests.drain() {
                let error = if in_doubt.contains(&id) {
                    ReplyError::Io
                } else {
                    ReplyError::NotPrimary
                };
                cx.emit(Effect::Reply {
                    id,
                    result: Err(error),
                });
            }
            if primary.serves {
                let reason = reason.to_owned();
                cx.emit(Effect::Event(VolumeEvent::Closed { reason }));
            }
        }
    }

    /// Rule 5 for one write: every slot that must have it and does not owe or has it is marked.
    pub(crate) fn sent_or_marked(&self, write: &Write, others: u8) -> Result<(), String> {
        for slot in slots_of(others & !write.unacked & !write.acked) {
            if !self.meta.bitmaps.of(slot).covers(write.blocks) {
                return Err(format!(
                    "a write to {:?} was neither sent to {slot:?} nor marked dirty for it",
                    write.blocks
                ));
            }
        }
        Ok(())
    }
}
