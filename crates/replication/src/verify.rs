//! Online verification: a primary compares its content with a replica's, block by block, while both are
//! in use.
//!
//! A range is read through the gate, so no write to it is under way here, and its digests are sent on the
//! ordered link before the next write to it can be. The replica reads it through its own gate, after all
//! that was sent before. So both digests are of the same position, and a difference is one. Each is all the
//! same looked at again before it is told: a read error that a disk hides is no damage.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use relevo_types::{BlockRange, Epoch, NodeId, Time};
use relevo_wire::{BlockDigest, Message};

use crate::{
    bitmap::Blocks,
    digest::{differing, digests},
    io::{Effect, VolumeEvent},
    jobs::{Owner, Reply},
    lab::PlantedBug,
    link::{Part, Walk},
    machine::{Machine, mask},
    ops::Cx,
    sync::Stage,
};

/// Blocks of one comparison: 256 KiB. Writes to them wait while they are read on either side.
const CHUNK_BLOCKS: u64 = 64;

/// Comparisons under way to one peer at most.
const CHUNKS_MAX: usize = 8;

/// Digests that wait here for the disk at most, per link: more is a broken peer. A resync has some more
/// under way than a verification.
const CHECKS_MAX: usize = 1024;

/// A verification of one replica.
#[derive(Debug)]
pub(crate) struct Verify {
    repair: bool,
    /// The begin of the session that it is about.
    session: Time,
    cursor: u64,
    /// Being read here.
    reads: BTreeMap<BlockRange, Look>,
    /// The peer's answer is awaited, since when.
    asked: BTreeMap<u64, (BlockRange, Look, Time)>,
    again: VecDeque<BlockRange>,
    differs: Blocks,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Look {
    First,
    Second,
}

/// What verification keeps beside the sessions.
#[derive(Debug, Default)]
pub(crate) struct Verification {
    /// As primary: what is under way.
    running: BTreeMap<NodeId, Verify>,
    /// What the last one found, until the next.
    pub(crate) found: BTreeMap<NodeId, Vec<BlockRange>>,
    /// What is to be copied when the replica has left the in-sync set.
    repairs: BTreeMap<NodeId, Blocks>,
    /// What the other members shall mark too.
    marked: Vec<(NodeId, Blocks)>,
    /// When the next one begins by itself.
    next: Option<Time>,
    /// As replica: digests to compare with, by link and id.
    checks: BTreeMap<(u64, u64), (u64, Vec<BlockDigest>)>,
}

impl Verify {
    fn is_done(&self) -> bool {
        self.reads.is_empty() && self.asked.is_empty() && self.again.is_empty()
    }
}

impl Machine {
    /// Begins to verify a replica.
    ///
    /// # Errors
    /// Why it can't be.
    pub(crate) fn start_verify(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        repair: bool,
    ) -> Result<(), String> {
        let Some(session) = self.verifiable(peer) else {
            return Err(if self.is_open() {
                format!("the replica of {peer} is not in sync: its resync comes first")
            } else {
                "verification runs where the volume is primary".to_owned()
            });
        };
        let verify = Verify {
            repair,
            session,
            cursor: 0,
            reads: BTreeMap::new(),
            asked: BTreeMap::new(),
            again: VecDeque::new(),
            differs: Blocks::default(),
        };
        self.abandon_jobs(cx, |owner| *owner == Owner::VerifyRead(peer));
        self.verification.running.insert(peer, verify);
        self.verification.found.remove(&peer);
        self.tell_verifying(cx, peer, true);
        Ok(())
    }

    /// Ends a verification before its end; what it found so far is told.
    pub(crate) fn stop_verify(&mut self, cx: &mut Cx<'_>, peer: NodeId, why: &str) {
        let Some(verify) = self.verification.running.remove(&peer) else {
            return;
        };
        self.abandon_jobs(cx, |owner| *owner == Owner::VerifyRead(peer));
        self.tell_verifying(cx, peer, false);
        self.verified(cx, peer, &verify, Some(why.to_owned()));
    }

    /// The begin of the session of a replica that gets every write.
    fn verifiable(&self, peer: NodeId) -> Option<Time> {
        let session = self.links.get(&peer)?.session.as_ref()?;
        let live = matches!(session.stage, Stage::InSync | Stage::Following);
        (live && !self.stepping_down).then_some(session.began)
    }

    fn tell_verifying(&mut self, cx: &mut Cx<'_>, peer: NodeId, active: bool) {
        if let Some(epoch) = self.primary().map(|primary| primary.epoch)
            && self.links.contains_key(&peer)
        {
            self.send(cx, peer, Message::Verifying { epoch, active });
        }
    }

    /// Goes on with what is under way, and begins what is due.
    pub(crate) fn settle_verify(&mut self, cx: &mut Cx<'_>) {
        self.settle_regular(cx);
        self.send_repair_marks(cx);
        for peer in self
            .verification
            .running
            .keys()
            .copied()
            .collect::<Vec<_>>()
        {
            let verify = self.verification.running.get(&peer);
            if verify.map(|verify| verify.session) != self.verifiable(peer) {
                self.stop_verify(cx, peer, "the replica does not get every write any more");
            } else {
                self.look(cx, peer);
            }
        }
    }

    fn look(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        let end = self.meta.layout().data_blocks();
        while let Some(verify) = self.verification.running.get_mut(&peer) {
            if verify.reads.len() + verify.asked.len() >= CHUNKS_MAX {
                return;
            }
            let (blocks, look) = if let Some(blocks) = verify.again.pop_front() {
                (blocks, Look::Second)
            } else if verify.cursor < end {
                let count = CHUNK_BLOCKS.min(end - verify.cursor);
                let blocks = BlockRange::new(verify.cursor, count);
                verify.cursor = blocks.end();
                (blocks, Look::First)
            } else {
                break;
            };
            verify.reads.insert(blocks, look);
            self.read_blocks(cx, blocks, Owner::VerifyRead(peer));
        }
        let done = |verify: &mut Verify| verify.is_done();
        if self.verification.running.get_mut(&peer).is_some_and(done)
            && let Some(verify) = self.verification.running.remove(&peer)
        {
            self.tell_verifying(cx, peer, false);
            self.verified(cx, peer, &verify, None);
        }
    }

    pub(crate) fn verify_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        blocks: BlockRange,
        data: &Bytes,
    ) {
        let id = self.next_id();
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        let Some(verify) = self.verification.running.get_mut(&peer) else {
            return;
        };
        let Some(look) = verify.reads.remove(&blocks) else {
            return;
        };
        verify.asked.insert(id, (blocks, look, cx.now));
        self.send_digests(cx, peer, epoch, id, blocks, data);
    }

    pub(crate) fn send_digests(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        id: u64,
        blocks: BlockRange,
        data: &Bytes,
    ) {
        let message = Message::Digests {
            epoch,
            id,
            first: blocks.first,
            digests: digests(data),
        };
        self.send(cx, peer, message);
    }

    /// What of a comparison differs at the peer.
    pub(crate) fn verify_answered(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        id: u64,
        blocks: &[BlockRange],
    ) {
        let Some(verify) = self.verification.running.get_mut(&peer) else {
            return;
        };
        let Some((asked, look, _)) = verify.asked.remove(&id) else {
            return;
        };
        let inside = |run: &BlockRange| run.first >= asked.first && run.end() <= asked.end();
        if !blocks.iter().all(inside) {
            // Whoever answers something else than it was asked says nothing of what it was asked.
            self.protocol_error(cx, peer, "an answer about blocks that were not compared");
            return;
        }
        for run in blocks {
            match look {
                Look::First => verify.again.push_back(*run),
                Look::Second => verify.differs.set(*run, |_| {}),
            }
        }
    }

    /// Since when a peer owes the answer to a comparison.
    pub(crate) fn verify_owed_since(&self, peer: NodeId) -> Option<Time> {
        let verify = self.verification.running.get(&peer)?;
        verify.asked.values().map(|(.., since)| *since).min()
    }

    fn verified(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        verify: &Verify,
        stopped: Option<String>,
    ) {
        let differing: Vec<BlockRange> = verify.differs.runs(u64::MAX).collect();
        if let Some(every) = self.verify_every() {
            self.verification.next = Some(cx.now + every);
        }
        self.verification.found.insert(peer, differing.clone());
        let repair = verify.repair && !differing.is_empty() && self.verifiable(peer).is_some();
        if repair {
            self.repair(cx, peer, verify.differs.clone());
        }
        cx.emit(Effect::Event(VolumeEvent::Verified {
            node: peer,
            checked: verify.cursor,
            differing,
            stopped,
            repair,
        }));
    }

    /// Blocks that the replica still has to be compared in, while one is under way to it.
    pub(crate) fn verify_left(&self, peer: NodeId) -> Option<u64> {
        let verify = self.verification.running.get(&peer)?;
        Some(self.meta.layout().data_blocks() - verify.cursor)
    }

    // Verification by the clock.

    fn verify_every(&self) -> Option<std::time::Duration> {
        let seconds = self.volume.as_ref()?.options.verify_every_s?;
        Some(std::time::Duration::from_secs(seconds.into()))
    }

    fn settle_regular(&mut self, cx: &mut Cx<'_>) {
        let Some(every) = self.verify_every() else {
            self.verification.next = None;
            return;
        };
        let due = *self.verification.next.get_or_insert(cx.now + every);
        if cx.now < due {
            // A shorter time may have been chosen meanwhile.
            self.verification.next = Some(due.min(cx.now + every));
            return;
        }
        self.verification.next = Some(cx.now + every);
        for peer in self.other_replicas().collect::<Vec<_>>() {
            let running = self.verification.running.contains_key(&peer);
            if !running && self.verifiable(peer).is_some() {
                // It is: just looked at.
                drop(self.start_verify(cx, peer, false));
            }
        }
    }

    pub(crate) fn verify_deadline(&self) -> Time {
        let next = self.verification.next.filter(|_| self.is_open());
        next.unwrap_or(Time::NEVER)
    }

    // Repair.

    /// What differs is to be copied from here. A member is one by commit, so it must first leave by
    /// commit (rules 3 and 4): else it could be promoted with what is known to be damaged.
    fn repair(&mut self, cx: &mut Cx<'_>, peer: NodeId, blocks: Blocks) {
        self.verification.repairs.insert(peer, blocks);
        let follows = self.session_mut(peer).map(|session| session.stage) == Some(Stage::Following);
        if self.lab.has(PlantedBug::RepairWithoutLeave) && !follows {
            // Marks for a member: its next join would be none.
            self.mark_repair(peer);
        } else if follows {
            // Outside the set already.
            self.mark_repair(peer);
            self.leave_behind(cx, peer);
        }
    }

    /// Whether a member must leave the set to be repaired.
    pub(crate) fn is_to_be_repaired(&self, peer: NodeId) -> bool {
        self.verification.repairs.contains_key(&peer)
    }

    /// The replica is outside the set, or lost: what was found is dirty for it from now on.
    pub(crate) fn mark_repair(&mut self, peer: NodeId) {
        let (Some(blocks), Some(slot)) = (self.verification.repairs.remove(&peer), self.slot(peer))
        else {
            return;
        };
        for run in blocks.runs(u64::MAX) {
            self.meta.bitmaps.set(slot, run);
        }
        self.meta.want_bitmaps();
        self.verification.marked.push((peer, blocks));
    }

    /// The other members mark it too: any of them may be the next primary.
    fn send_repair_marks(&mut self, cx: &mut Cx<'_>) {
        let Some(epoch) = self.primary().map(|primary| primary.epoch) else {
            return;
        };
        for (repaired, blocks) in std::mem::take(&mut self.verification.marked) {
            let Some(slot) = self.slot(repaired) else {
                continue;
            };
            let runs: Vec<BlockRange> = blocks.runs(u64::MAX).collect();
            let mut walk = Walk::default();
            while let Some((peer, other)) = self.next_session(&mut walk) {
                if other == mask(slot) || self.verifiable(peer).is_none() {
                    continue;
                }
                self.send_dirty_map(cx, peer, epoch, slot, &runs);
            }
        }
    }

    /// The reign is over: so is every verification. The next primary knows nothing of it.
    pub(crate) fn forget_verification(&mut self) {
        let checks = std::mem::take(&mut self.verification.checks);
        self.verification = Verification {
            checks,
            ..Verification::default()
        };
    }

    // The replica's side.

    /// Digests of the primary's blocks arrived: this replica's are read after all that was sent before.
    pub(crate) fn digests_arrived(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        id: u64,
        first: u64,
        digests: Vec<BlockDigest>,
    ) {
        if !self.check_reign(cx, peer, epoch) {
            return;
        }
        let reply = self.reply_to(peer, epoch);
        let blocks = BlockRange::new(first, digests.len() as u64);
        if self.hold_check(cx, reply, id, first, digests) {
            self.read_blocks(cx, blocks, Owner::DigestRead(reply, id));
        }
    }

    /// Keeps digests of the primary's until this replica's blocks are read. False: there are too many.
    pub(crate) fn hold_check(
        &mut self,
        cx: &mut Cx<'_>,
        reply: Reply,
        id: u64,
        first: u64,
        digests: Vec<BlockDigest>,
    ) -> bool {
        let checks = &mut self.verification.checks;
        checks.insert((reply.link, id), (first, digests));
        let held = checks.len() <= CHECKS_MAX;
        if !held {
            self.protocol_error(cx, reply.peer, "too many digests are under way");
        }
        held
    }

    /// Digests that were kept, unless their link is gone.
    pub(crate) fn take_check(&mut self, reply: Reply, id: u64) -> Option<(u64, Vec<BlockDigest>)> {
        self.verification.checks.remove(&(reply.link, id))
    }

    pub(crate) fn digest_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        reply: Reply,
        id: u64,
        data: &Bytes,
    ) {
        let Some((first, theirs)) = self.take_check(reply, id) else {
            return;
        };
        let blocks = differing(first, &theirs, &digests(data));
        let Reply { peer, epoch, .. } = reply;
        self.send(cx, peer, Message::Differ { epoch, id, blocks });
    }

    /// Digests that came by a link that is lost are of no use.
    pub(crate) fn forget_checks(&mut self, number: u64) {
        self.verification
            .checks
            .retain(|(link, _), _| *link != number);
    }

    pub(crate) fn peer_verifies(&mut self, peer: NodeId, epoch: Epoch, active: bool) {
        let member = self
            .reigning()
            .is_some_and(|(primary, part)| primary == peer && part != Part::Target);
        if epoch >= self.seen_epoch()
            && member
            && let Some(link) = self.links.get_mut(&peer)
        {
            link.verifies = active;
        }
    }
}
