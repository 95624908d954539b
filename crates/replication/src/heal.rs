//! Reads that this node's disk refuses, while it is primary and another replica is in sync: that one is
//! asked, the application is answered, and the blocks are written anew here.
//!
//! The read keeps its place in the gate meanwhile. So no write to these blocks is under way, and whoever
//! is in sync has exactly what would have been read. What is written has the same content, so other
//! reads may pass; but it is a write, so its regions must be hot first (rule 6).
//!
//! A replica that can't read what it shall compare with the primary's says that it differs.
//!
//! A disk gets few such chances: a block that can't be read again after it was written, or too many of
//! them, and the replica leaves as after any other error. Errors of writes and flushes are never healed.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use relevo_types::{
    BlockRange, ByteRange, Epoch, NodeId, Time,
    cluster::{Volume, options::OnIoError},
};
use relevo_wire::{Body, Message};

use crate::{
    bitmap::Blocks,
    io::{DiskError, Effect, ReplyError, VolumeEvent},
    jobs::{JobId, Owner, Reply},
    lab::PlantedBug,
    link::Part,
    machine::{Machine, body_of},
    ops::Cx,
    sync::Stage,
};

/// Blocks of one question: 1 MiB, as much as a write message has.
pub(crate) const PIECE_BLOCKS: u64 = 256;

/// Questions of a primary that wait here for the disk at most: more is a broken peer.
const ASKED_MAX: usize = 64;

/// Questions under way at once; a read that fails beyond it takes the replica out of use. Each keeps as
/// much memory as the read is long.
const RUNNING_MAX: usize = ASKED_MAX;

/// Reads that are healed between two attachments: a disk with more bad places is going.
const HEALED_MAX: u64 = 1000;

/// What is said of a disk that is given up because it does not answer.
pub(crate) const DISK_HANGS: &str = "the disk did not answer within `disk-timeout`";

/// When a disk whose oldest operation began at `since` counts as failed if it does not answer. The last
/// replica that is in sync has no such time: waiting for it is all that is left.
pub(crate) fn disk_deadline(volume: Option<&Volume>, me: NodeId, since: Option<Time>) -> Time {
    let Some(volume) = volume else {
        return Time::NEVER;
    };
    let last = volume.in_sync.len() == 1 && volume.in_sync.contains(&me);
    match (volume.options.disk_timeout.seconds, since) {
        (Some(seconds), Some(since)) if !last => {
            since + std::time::Duration::from_secs(seconds.into())
        }
        _ => Time::NEVER,
    }
}

/// What is being healed, and what was.
#[derive(Debug, Default)]
pub(crate) struct Heals {
    running: BTreeMap<JobId, Heal>,
    /// Got from another replica, to be written when what overlaps it was.
    waiting: Vec<(JobId, Bytes)>,
    /// Written anew since the disk was attached.
    done: Blocks,
    count: u64,
}

/// A read that another replica answers.
#[derive(Debug)]
struct Heal {
    peer: NodeId,
    /// The begin of the session that it is about.
    session: Time,
    id: u64,
    /// What was asked for.
    piece: BlockRange,
    since: Time,
    got: BytesMut,
    /// What the disk said.
    error: String,
}

impl Machine {
    /// The disk could not do a job's read.
    pub(crate) fn read_failed(&mut self, cx: &mut Cx<'_>, id: JobId, error: &DiskError) {
        let error = error.to_string();
        let blocks = self.jobs.table.get(&id).map(|job| job.blocks);
        let peer = blocks.and_then(|blocks| self.healer(blocks));
        match (blocks, peer) {
            (Some(blocks), Some((peer, session))) => {
                let heal = Heal {
                    peer,
                    session,
                    id: 0,
                    piece: BlockRange::new(blocks.first, 0),
                    since: cx.now,
                    got: BytesMut::new(),
                    error,
                };
                self.heals.running.insert(id, heal);
                if let Some(job) = self.jobs.table.get_mut(&id) {
                    job.wait_for_content();
                }
                self.ask(cx, id);
            }
            _ => self.unreadable(cx, id, &error),
        }
    }

    /// A block that the primary asks to compare can't be read here. It is not the same, then: the primary
    /// hears so, and what it copies writes the block anew. Losing all other blocks' redundancy for it would
    /// mend nothing.
    fn incomparable(&mut self, cx: &mut Cx<'_>, blocks: Option<BlockRange>, error: &str) {
        if let Some(blocks) = blocks {
            self.heals.count += 1;
            cx.emit(Effect::Event(VolumeEvent::Unreadable {
                blocks,
                error: error.to_owned(),
            }));
        }
    }

    /// Whether the job is a read on the disk: one whose failure may be healed.
    pub(crate) fn is_read(&self, id: JobId) -> bool {
        self.jobs.table.get(&id).is_some_and(|job| !job.is_write())
    }

    /// Another replica that has these blocks as this one should have them.
    fn healer(&self, blocks: BlockRange) -> Option<(NodeId, Time)> {
        let primary = self.primary()?;
        // Which of several blocks is the bad one is not known: only if all were written anew is it one
        // of those.
        let again = self.heals.done.covers(blocks);
        let spent = self.heals.count >= HEALED_MAX || again;
        if self.heals.running.len() >= RUNNING_MAX || (spent && !self.passes_on()) {
            return None;
        }
        let trusts_all = self.lab.has(PlantedBug::HealFromAnybody);
        self.links.iter().find_map(|(peer, link)| {
            let session = link.session.as_ref()?;
            let member = session.stage == Stage::InSync && primary.in_sync.contains(peer);
            (member || trusts_all && session.stage != Stage::Starting)
                .then_some((*peer, session.began))
        })
    }

    fn passes_on(&self) -> bool {
        let volume = self.volume.as_ref();
        volume.is_some_and(|volume| volume.options.on_io_error == OnIoError::PassOn)
    }

    /// Nobody has the blocks of a read: by `on-io-error` the application is told, or the replica is out
    /// of use.
    fn unreadable(&mut self, cx: &mut Cx<'_>, id: JobId, error: &str) {
        let owner = self.jobs.table.get(&id).map(|job| job.owner);
        match owner {
            Some(Owner::AppRead(request)) if self.passes_on() => {
                self.reply(cx, request, Err(ReplyError::Io));
                self.end_job(cx, id);
            }
            Some(Owner::Nobody) if self.passes_on() => self.end_job(cx, id),
            Some(Owner::DigestRead(reply, number)) if self.heals.count < HEALED_MAX => {
                self.end_job(cx, id);
                let blocks = self.digest_read_done(cx, reply, number, None);
                self.incomparable(cx, blocks, error);
            }
            // It stays dirty, and who needs it does not join. On a new link it is tried again.
            Some(Owner::SyncRead(peer)) if self.passes_on() => {
                self.end_job(cx, id);
                let reason = "a block that it needs can't be read here, and nobody else has it";
                self.close_link(cx, peer, reason.to_owned());
            }
            Some(Owner::VerifyRead(peer)) if self.passes_on() => {
                self.end_job(cx, id);
                self.stop_verify(cx, peer, "a block can't be read here");
            }
            // The primary gives it what it can't read, which writes it anew.
            Some(Owner::CompareRead(reply, check)) if self.heals.count < HEALED_MAX => {
                let blocks = self.compare_read_done(cx, reply, check, None);
                self.end_job(cx, id);
                self.incomparable(cx, blocks, error);
            }
            _ => self.disk_error(error),
        }
    }

    /// Asks for the next piece of a job's blocks.
    fn ask(&mut self, cx: &mut Cx<'_>, id: JobId) {
        let number = self.next_id();
        let Some(blocks) = self.jobs.table.get(&id).map(|job| job.blocks) else {
            return;
        };
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        let Some(heal) = self.heals.running.get_mut(&id) else {
            return;
        };
        let first = heal.piece.end();
        heal.piece = BlockRange::new(first, PIECE_BLOCKS.min(blocks.end() - first));
        heal.id = number;
        heal.since = cx.now;
        let (peer, blocks) = (heal.peer, heal.piece);
        let ask = Message::ReadBlocks {
            epoch,
            id: number,
            blocks,
        };
        self.send(cx, peer, ask);
    }

    /// A piece of what was asked for.
    pub(crate) fn content_arrived(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        number: u64,
        range: ByteRange,
        body: &Body,
    ) {
        let running = self.heals.running.iter_mut();
        let Some((id, heal)) = running
            .map(|(id, heal)| (*id, heal))
            .find(|(_, heal)| heal.peer == peer && heal.id == number)
        else {
            return;
        };
        if range != heal.piece.bytes() {
            self.protocol_error(cx, peer, "content that was not asked for");
            return;
        }
        match body {
            Body::Data(data) => heal.got.extend_from_slice(data),
            Body::Zeroes => {
                let len = usize::try_from(range.len).unwrap_or(0);
                heal.got.resize(heal.got.len() + len, 0);
            }
        }
        let end = heal.piece.end();
        if self
            .jobs
            .table
            .get(&id)
            .is_some_and(|job| job.blocks.end() > end)
        {
            self.ask(cx, id);
        } else if let Some(heal) = self.heals.running.remove(&id) {
            self.heal(cx, id, heal.got.freeze(), peer, heal.error);
        }
    }

    /// Answers an application at once, and writes the blocks anew.
    fn heal(&mut self, cx: &mut Cx<'_>, id: JobId, data: Bytes, peer: NodeId, error: String) {
        let Some(job) = self.jobs.table.get_mut(&id) else {
            return;
        };
        let (owner, blocks) = (job.owner, job.blocks);
        if let Owner::AppRead(request) = owner {
            job.owner = Owner::Nobody;
            self.app_read_done(cx, request, blocks, data.clone());
        }
        cx.emit(Effect::Event(VolumeEvent::Healed {
            blocks,
            from: peer,
            error,
        }));
        self.heals.count += 1;
        self.heals.done.set(blocks, |_| {});
        self.heals.waiting.push((id, data));
        self.settle_healing_writes(cx);
    }

    /// Overlapping reads share the gate, so both may have failed; of two writes to one place at a time nobody
    /// knows which one the disk keeps.
    pub(crate) fn settle_healing_writes(&mut self, cx: &mut Cx<'_>) {
        for (id, data) in std::mem::take(&mut self.heals.waiting) {
            let Some(blocks) = self.jobs.table.get(&id).map(|job| job.blocks) else {
                continue;
            };
            if self.jobs.table.values().any(|job| job.heals(blocks)) {
                self.heals.waiting.push((id, data));
            } else {
                self.write_anew(cx, id, data);
            }
        }
    }

    /// Looks after reads whose other replica was lost, or left the set.
    pub(crate) fn settle_heals(&mut self, cx: &mut Cx<'_>) {
        let lost: Vec<JobId> = self
            .heals
            .running
            .iter()
            .filter(|(_, heal)| {
                let link = self.links.get(&heal.peer);
                let session = link.and_then(|link| link.session.as_ref());
                session.is_none_or(|session| session.began != heal.session)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in lost {
            let Some(mut heal) = self.heals.running.remove(&id) else {
                continue;
            };
            let Some(blocks) = self.jobs.table.get(&id).map(|job| job.blocks) else {
                continue;
            };
            match self.healer(blocks) {
                Some((peer, session)) => {
                    heal.peer = peer;
                    heal.session = session;
                    heal.piece = BlockRange::new(blocks.first, 0);
                    heal.got.clear();
                    self.heals.running.insert(id, heal);
                    self.ask(cx, id);
                }
                None => self.unreadable(cx, id, &heal.error),
            }
        }
    }

    /// Since when a peer owes the answer to a question.
    pub(crate) fn heal_owed_since(&self, peer: NodeId) -> Option<Time> {
        let asked = self.heals.running.values().filter(|heal| heal.peer == peer);
        asked.map(|heal| heal.since).min()
    }

    /// Nobody waits for a job's content any more.
    pub(crate) fn forget_heal(&mut self, id: JobId) {
        self.heals.running.remove(&id);
    }

    /// When the disk counts as failed if it does not answer.
    pub(crate) fn disk_deadline(&self) -> Time {
        disk_deadline(self.volume.as_deref(), self.node(), self.ops.oldest())
    }

    /// Gives up a disk that hangs. What it still does later is done to a backing that stays locked until
    /// then, so it can't fall on anything newer.
    pub(crate) fn settle_disk(&mut self, cx: &Cx<'_>) {
        if cx.now >= self.disk_deadline() {
            self.disk_error(DISK_HANGS);
        }
    }

    // The replica's side.

    /// The primary can't read these blocks.
    pub(crate) fn read_asked(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        id: u64,
        blocks: BlockRange,
    ) {
        if !self.check_reign(cx, peer, epoch) {
            return;
        }
        let part = self.links.get(&peer).and_then(|link| link.incoming);
        let member = part.is_some_and(|incoming| incoming.part == Part::Member);
        if !member && !self.lab.has(PlantedBug::HealFromAnybody) {
            self.protocol_error(cx, peer, "this replica is not in sync");
            return;
        }
        let jobs = self.jobs.table.values();
        let asked = jobs.filter(|job| matches!(job.owner, Owner::PeerRead(..)));
        if asked.count() >= ASKED_MAX {
            self.protocol_error(cx, peer, "too many reads are under way");
            return;
        }
        let reply = self.reply_to(peer, epoch);
        self.read_blocks(cx, blocks, Owner::PeerRead(reply, id));
    }

    pub(crate) fn peer_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        reply: Reply,
        id: u64,
        blocks: BlockRange,
        data: Bytes,
    ) {
        if !self.is_link_of(reply) {
            return;
        }
        let body = body_of(data);
        let Reply { peer, epoch, .. } = reply;
        let content = Message::Content {
            epoch,
            id,
            range: blocks.bytes(),
            body,
        };
        self.send(cx, peer, content);
    }
}
