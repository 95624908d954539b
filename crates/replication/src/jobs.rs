//! Local I/O on the data area: every read and write of this replica, whoever wants it.
//!
//! A job passes the [gate](crate::gate), then, if it writes, waits until its regions are
//! [hot](crate::activity), then runs on the disk, then is flushed if it must be, then goes back
//! to its owner. Jobs that were not started on the disk can be cancelled; those that were run to
//! their end and keep their place in the gate until then, even if nobody waits for them any more.

use std::mem;

use bytes::Bytes;
use relevo_types::{BlockRange, Epoch, NodeId, Seq};
use relevo_wire::Body;

use crate::{
    gate::Access,
    io::{DiskOpKind, RequestId, SaveId},
    lab::PlantedBug,
    machine::Machine,
    ops::{Cx, OpUse},
    window::Window,
};

/// A job. Grows; the order of ids is the order of arrival at the gate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct JobId(pub(crate) u64);

/// Whose job it is, and what to do at its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// An application's read.
    AppRead(RequestId),
    /// A piece of an application's write; becomes [`Owner::Write`] when it gets its position.
    AppWrite(RequestId),
    /// A write with a position.
    Write(Seq),
    /// Content for a peer's resync.
    SyncRead(NodeId),
    /// Content for a comparison with a peer's replica.
    VerifyRead(NodeId),
    /// Content for an answer to digests.
    DigestRead(Reply, u64),
    /// Content to compare with in a resync.
    CompareRead(Reply, u64),
    /// Content for a primary whose disk can't read it.
    PeerRead(Reply, u64),
    /// Content for the reconciliation of a promotion, by its attempt.
    PushRead(u64),
    /// Content that gives way, to be saved.
    SaveRead(SaveId),
    /// A write from the primary.
    PeerWrite(Reply, Seq),
    /// A resync write from the primary.
    PeerSync(Reply, u64),
    /// Nobody waits for it any more.
    Nobody,
}

/// Where an answer goes: dropped when the link is not the same any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reply {
    pub(crate) peer: NodeId,
    pub(crate) link: u64,
    pub(crate) epoch: Epoch,
}

#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) blocks: BlockRange,
    /// What to write; `None` for a read, and once it was handed to the disk.
    body: Option<Body>,
    fua: bool,
    pub(crate) owner: Owner,
    pub(crate) stage: Stage,
    write: bool,
    /// What a read got from another replica, while it is being written here.
    healed: Option<Bytes>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// Waits for overlapping jobs.
    Gate,
    /// Waits for its regions to be hot.
    Activity,
    /// On the disk.
    Disk,
    /// A read that the disk refused: another replica is asked.
    Remote,
    /// Waits for the flush.
    Flush,
    /// Done here; its owner keeps it in the gate.
    Held,
}

/// All jobs.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    last: u64,
    pub(crate) table: Window<JobId, Job>,
}

impl Jobs {
    /// Whether writes of applications wait for their position.
    pub(crate) fn has_app_writes(&self) -> bool {
        let is_app_write = |job: &Job| matches!(job.owner, Owner::AppWrite(_));
        self.table.values().any(is_app_write)
    }
}

impl Job {
    /// Whether it holds pins on its regions.
    pub(crate) fn is_pinned(&self) -> bool {
        self.write && matches!(self.stage, Stage::Disk | Stage::Flush | Stage::Held)
    }

    pub(crate) const fn is_write(&self) -> bool {
        self.write
    }

    /// The disk can't do it; another replica is asked.
    pub(crate) const fn wait_for_content(&mut self) {
        self.stage = Stage::Remote;
    }

    /// What it writes, while the disk was not given it.
    pub(crate) fn queued(&self) -> Option<(BlockRange, Body)> {
        Some((self.blocks, self.body.clone()?))
    }

    /// Whether it writes some of these blocks anew.
    pub(crate) fn heals(&self, blocks: BlockRange) -> bool {
        self.healed.is_some() && self.blocks.overlaps(&blocks)
    }

    fn is_from_peer(&self) -> bool {
        matches!(self.owner, Owner::PeerWrite(..) | Owner::PeerSync(..))
    }
}

impl Jobs {
    /// The next id to be given: jobs below it are older than what comes next.
    pub(crate) fn next_id(&self) -> JobId {
        JobId(self.last + 1)
    }

    /// Whether a peer's job older than `limit` is not done.
    pub(crate) fn has_peer_job_before(&self, limit: JobId) -> bool {
        let jobs = self.table.iter();
        jobs.take_while(|(id, _)| **id < limit)
            .any(|(_, job)| job.is_from_peer())
    }
}

impl Machine {
    /// Starts a read of whole blocks.
    pub(crate) fn read_blocks(&mut self, cx: &mut Cx<'_>, blocks: BlockRange, owner: Owner) {
        self.start_job(
            cx,
            Job {
                blocks,
                body: None,
                fua: false,
                owner,
                stage: Stage::Gate,
                write: false,
                healed: None,
            },
        );
    }

    /// Starts a write of whole blocks. With `fua` it is done when it is on stable storage.
    pub(crate) fn write_blocks(
        &mut self,
        cx: &mut Cx<'_>,
        blocks: BlockRange,
        body: Body,
        fua: bool,
        owner: Owner,
    ) {
        self.start_job(
            cx,
            Job {
                blocks,
                body: Some(body),
                fua,
                owner,
                stage: Stage::Gate,
                write: true,
                healed: None,
            },
        );
    }

    fn start_job(&mut self, cx: &mut Cx<'_>, job: Job) {
        let id = self.jobs.next_id();
        self.jobs.last = id.0;
        let access = if job.write {
            Access::Exclusive
        } else {
            Access::Shared
        };
        let granted = self.gate.enter(id, job.blocks, access);
        self.jobs.table.insert(id, job);
        if granted {
            self.job_granted(cx, id);
        }
    }

    fn job_granted(&mut self, cx: &mut Cx<'_>, id: JobId) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        if !job.write {
            job.stage = Stage::Disk;
            let kind = DiskOpKind::Read(job.blocks.bytes());
            self.ops.start(cx, kind, OpUse::Job(id));
            return;
        }
        self.warm_job(cx, id);
    }

    /// Writes what a read got from another replica; the read ends with it.
    pub(crate) fn write_anew(&mut self, cx: &mut Cx<'_>, id: JobId, data: Bytes) {
        if let Some(job) = self.jobs.table.get_mut(&id) {
            job.healed = Some(data.clone());
            job.body = Some(Body::Data(data));
            job.write = true;
            self.warm_job(cx, id);
        }
    }

    fn warm_job(&mut self, cx: &mut Cx<'_>, id: JobId) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        job.stage = Stage::Activity;
        let blocks = job.blocks;
        if self.meta.activity.pin_or_wait(id, blocks) {
            self.job_hot(cx, id);
        }
    }

    /// The job's regions are hot and pinned: nothing stands between it and the disk.
    pub(crate) fn job_hot(&mut self, cx: &mut Cx<'_>, id: JobId) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        job.stage = Stage::Disk;
        let Some(body) = job.body.take() else {
            return;
        };
        let (owner, blocks, fua) = (job.owner, job.blocks, job.fua);
        if let Owner::AppWrite(request) = owner {
            // The peers get it before the local disk: their way is longer.
            self.issue_write(cx, id, request, blocks, &body, fua);
        }
        let kind = match body {
            Body::Data(data) => DiskOpKind::Write {
                offset: blocks.bytes().offset,
                data,
            },
            Body::Zeroes => DiskOpKind::Zero(blocks.bytes()),
        };
        self.ops.start(cx, kind, OpUse::Job(id));
    }

    /// The disk did the job's operation.
    pub(crate) fn job_disk_done(&mut self, cx: &mut Cx<'_>, id: JobId, data: Option<Bytes>) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        let data = data.or_else(|| job.healed.take());
        if job.fua && job.owner != Owner::Nobody {
            job.stage = Stage::Flush;
            self.flush(cx, FlushFor::Job(id));
        } else {
            self.job_done(cx, id, data);
        }
    }

    fn job_done(&mut self, cx: &mut Cx<'_>, id: JobId, data: Option<Bytes>) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        job.stage = Stage::Held;
        let (owner, blocks) = (job.owner, job.blocks);
        match owner {
            Owner::Write(seq) => self.local_write_done(cx, seq),
            Owner::PeerWrite(reply, seq) => {
                self.end_job(cx, id);
                self.peer_write_done(cx, reply, seq);
            }
            Owner::PeerSync(reply, sync_id) => {
                self.end_job(cx, id);
                self.copied_here(cx, reply, blocks);
                self.peer_sync_done(cx, reply, sync_id);
            }
            Owner::AppRead(request) => {
                self.end_job(cx, id);
                self.app_read_done(cx, request, blocks, data.unwrap_or_default());
            }
            // Sent before the gate opens: a write to the same blocks must come after it.
            Owner::SyncRead(peer) => {
                self.sync_read_done(cx, peer, blocks, &data.unwrap_or_default());
                self.end_job(cx, id);
            }
            Owner::VerifyRead(peer) => {
                if self.lab.has(PlantedBug::VerifyOutsideGate) {
                    self.end_job(cx, id);
                }
                self.verify_read_done(cx, peer, blocks, &data.unwrap_or_default());
                self.end_job(cx, id);
            }
            Owner::DigestRead(reply, check) => {
                let data = data.unwrap_or_default();
                self.digest_read_done(cx, reply, check, Some(&data));
                self.end_job(cx, id);
            }
            Owner::CompareRead(reply, check) => {
                let data = data.unwrap_or_default();
                self.compare_read_done(cx, reply, check, Some(&data));
                self.end_job(cx, id);
            }
            Owner::PeerRead(reply, number) => {
                self.peer_read_done(cx, reply, number, blocks, data.unwrap_or_default());
                self.end_job(cx, id);
            }
            Owner::PushRead(attempt) => {
                self.push_read_done(cx, attempt, blocks, data.unwrap_or_default());
                self.end_job(cx, id);
            }
            Owner::SaveRead(save) => {
                self.save_read_done(cx, save, blocks, data.unwrap_or_default());
                self.end_job(cx, id);
            }
            Owner::Nobody | Owner::AppWrite(_) => self.end_job(cx, id),
        }
    }

    /// Takes a job that is not on the disk out of the gate and unpins its regions.
    pub(crate) fn end_job(&mut self, cx: &mut Cx<'_>, id: JobId) {
        self.open_gate(cx, id);
        self.forget_job(id);
    }

    /// Lets overlapping jobs pass; the job keeps its pins.
    pub(crate) fn open_gate(&mut self, cx: &mut Cx<'_>, id: JobId) {
        let granted = self.gate.leave(id);
        for next in &granted {
            self.job_granted(cx, *next);
        }
        self.gate.reuse(granted);
    }

    /// Drops a job that has left the gate, and its pins.
    pub(crate) fn forget_job(&mut self, id: JobId) {
        if let Some(job) = self.jobs.table.remove(&id) {
            if job.is_pinned() {
                self.meta.activity.unpin(job.blocks);
            } else {
                self.meta.activity.forget(id);
            }
        }
    }

    /// Its owner is gone: cancelled if the disk has not seen it, else it runs to its end for
    /// nobody.
    pub(crate) fn abandon_job(&mut self, cx: &mut Cx<'_>, id: JobId) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        match job.stage {
            Stage::Disk => job.owner = Owner::Nobody,
            Stage::Remote => {
                self.forget_heal(id);
                self.end_job(cx, id);
            }
            Stage::Gate | Stage::Activity | Stage::Flush | Stage::Held => self.end_job(cx, id),
        }
    }

    /// Abandons all jobs of the owners for which `which` is true.
    pub(crate) fn abandon_jobs(&mut self, cx: &mut Cx<'_>, which: impl Fn(&Owner) -> bool) {
        // The newest first: else the gate would let a job pass that is about to be cancelled.
        let jobs = self.jobs.table.iter().rev();
        let ids: Vec<JobId> = jobs
            .filter(|(_, job)| which(&job.owner))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.abandon_job(cx, id);
        }
    }
}

/// What waits for a flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FlushFor {
    /// A FUA write.
    Job(JobId),
    /// An application's flush, by its number.
    App(u64),
    /// A flush for the primary.
    Peer(Reply, u64),
}

/// Data flushes: one under way; whoever comes meanwhile shares the next, since a flush covers
/// only what was complete when it began.
#[derive(Debug, Default)]
pub(crate) struct Flusher {
    is_under_way: bool,
    under_way: Vec<FlushFor>,
    next: Vec<FlushFor>,
}

impl Machine {
    /// A flush that covers every write that was acknowledged to an application, also those of which
    /// this replica only said that it received them: it waits for them.
    pub(crate) fn flush_received(&mut self, cx: &mut Cx<'_>, who: FlushFor) {
        let before = self.jobs.next_id();
        let waits = self.gave_receipts && !self.lab.has(PlantedBug::FlushForgetsReceived);
        if waits && self.jobs.has_peer_job_before(before) {
            self.held_flushes.push((before, who));
        } else {
            self.flush(cx, who);
        }
    }

    pub(crate) fn settle_held_flushes(&mut self, cx: &mut Cx<'_>) {
        if self.held_flushes.is_empty() {
            return;
        }
        for (before, who) in std::mem::take(&mut self.held_flushes) {
            if self.jobs.has_peer_job_before(before) {
                self.held_flushes.push((before, who));
            } else {
                self.flush(cx, who);
            }
        }
    }

    pub(crate) fn flush(&mut self, cx: &mut Cx<'_>, who: FlushFor) {
        self.flusher.next.push(who);
        self.start_flush(cx);
    }

    fn start_flush(&mut self, cx: &mut Cx<'_>) {
        let flusher = &mut self.flusher;
        if !flusher.is_under_way && !flusher.next.is_empty() {
            flusher.is_under_way = true;
            mem::swap(&mut flusher.under_way, &mut flusher.next);
            self.ops.start(cx, DiskOpKind::Flush, OpUse::Flush);
        }
    }

    /// The flush under way is done.
    pub(crate) fn flush_done(&mut self, cx: &mut Cx<'_>) {
        let mut done = mem::take(&mut self.flusher.under_way);
        for who in done.drain(..) {
            match who {
                FlushFor::Job(id) => self.job_done(cx, id, None),
                FlushFor::App(number) => self.local_flush_done(cx, number),
                FlushFor::Peer(reply, id) => self.peer_flush_done(cx, reply, id),
            }
        }
        self.flusher.under_way = done;
        self.flusher.is_under_way = false;
        self.start_flush(cx);
    }
}
