//! Online verification: a primary compares its content with a replica's, block by block, while both are
//! in use.
//!
//! A range is read through the gate, so no write to it is under way here, and its digests are sent on the
//! ordered link before the next write to it can be. The replica reads it through its own gate, after all
//! that was sent before. So both digests are of the same position, and a difference is one. Each is all the
//! same looked at again before it is told: a read error that a disk hides is no damage.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use relevo_types::{
    BlockRange, Epoch, NodeId, Time,
    cluster::{Differs, VolumeChange},
};
use relevo_wire::{BlockDigest, Message};

use crate::{
    bitmap::Blocks,
    digest::{differing, digests},
    io::{Effect, VolumeEvent},
    jobs::{Owner, Reply},
    lab::PlantedBug,
    link::Part,
    machine::Machine,
    ops::Cx,
    sync::Stage,
};

/// Blocks of one comparison: 256 KiB. Writes to them wait while they are read on either side.
const CHUNK_BLOCKS: u64 = 64;

/// Blocks of the second look at what differs: 32 KiB. Small: a disk that can't read one block of a read says
/// nothing of the others.
const PIECE_BLOCKS: u64 = 8;

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
    /// What came of one, and is not told before the log has it.
    untold: BTreeMap<NodeId, Untold>,
    /// What exactly is to be copied to a replica when it has left the in-sync set; the log has at most
    /// some hundred places.
    repairs: BTreeMap<NodeId, Blocks>,
    /// When the next one begins by itself.
    next: Option<Time>,
    /// As replica: digests to compare with, by link and id.
    checks: BTreeMap<(u64, u64), (u64, Vec<BlockDigest>)>,
}

/// What came of a verification.
#[derive(Debug)]
struct Untold {
    /// What the log shall say of the replica.
    differs: Option<Differs>,
    /// What is told then.
    event: Option<VolumeEvent>,
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
        // The repair would stop this one half-way, and half of it would be recorded in place of the whole, and of
        // the decision to repair.
        if self.verification.untold.contains_key(&peer) {
            return Err(format!(
                "what an earlier verification of {peer} came to is not in the control log yet, which takes a majority of the voters; verify again then"
            ));
        }
        if self.is_to_be_repaired(peer) {
            return Err(format!(
                "what an earlier verification of {peer} found is being repaired; verify again when that is over"
            ));
        }
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
        self.settle_untold(cx);
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
            let more = !verify.again.is_empty() || verify.cursor < end;
            if more && !self.rate.may(cx.now) {
                self.rate.wait();
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
            self.rate.take(cx.now, peer, blocks.bytes().len);
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
                Look::First => verify.again.extend(run.pieces(PIECE_BLOCKS)),
                Look::Second => verify.differs.set(*run, |_| {}),
            }
        }
    }

    /// Since when a peer owes the answer to a comparison.
    pub(crate) fn verify_owed_since(&self, peer: NodeId) -> Option<Time> {
        let verify = self.verification.running.get(&peer)?;
        verify.asked.values().map(|(.., since)| *since).min()
    }

    /// A verification ended. What it found is told when the log has it: from then on every node knows,
    /// whoever is lost.
    fn verified(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        verify: &Verify,
        stopped: Option<String>,
    ) {
        if let Some(every) = self.verify_every() {
            self.verification.next = Some(cx.now + every);
        }
        let differing: Vec<BlockRange> = verify.differs.runs(u64::MAX).collect();
        let repair = verify.repair && !differing.is_empty() && self.verifiable(peer).is_some();
        let known = self.differs(peer);
        let mut all = verify.differs.clone();
        if stopped.is_some() {
            // What was found earlier and not looked at again is as true as it was.
            for run in known.iter().flat_map(|known| &known.runs) {
                all.set(*run, |_| {});
            }
        }
        let differs = if differing.is_empty() && stopped.is_some() {
            known.cloned()
        } else {
            Differs::new(self.node(), all.runs(u64::MAX).collect(), repair)
        };
        let event = VolumeEvent::Verified {
            node: peer,
            checked: verify.cursor,
            differing,
            stopped,
            repair,
        };
        if repair {
            self.verification.repairs.insert(peer, all);
        }
        if self.lab.has(PlantedBug::ToldBeforeCommitted) {
            cx.emit(Effect::Event(event.clone()));
        }
        let event = Some(event);
        let untold = Untold { differs, event };
        self.verification.untold.insert(peer, untold);
        self.settle_untold(cx);
    }

    /// What the log says that a replica differs in.
    fn differs(&self, peer: NodeId) -> Option<&Differs> {
        let replica = self.volume.as_ref()?.replicas.get(&peer)?;
        replica.differs.as_ref()
    }

    /// Tells what the log has.
    fn settle_untold(&mut self, cx: &mut Cx<'_>) {
        for peer in self.verification.untold.keys().copied().collect::<Vec<_>>() {
            let untold = self.verification.untold.get(&peer);
            let committed = untold.is_some_and(|it| it.differs.as_ref() == self.differs(peer));
            if !committed {
                continue;
            }
            let untold = self.verification.untold.remove(&peer);
            if let Some(event) = untold.and_then(|untold| untold.event)
                && !self.lab.has(PlantedBug::ToldBeforeCommitted)
            {
                cx.emit(Effect::Event(event));
            }
            let stage = self.session_mut(peer).map(|session| session.stage);
            if stage == Some(Stage::Following) && self.is_to_be_repaired(peer) {
                // Outside the set already.
                self.mark_repair(peer);
                self.leave_behind(cx, peer);
            }
        }
    }

    /// What was found is about replicas that are there no more.
    pub(crate) fn forget_found(&mut self, is_same: impl Fn(NodeId) -> bool) {
        let verification = &mut self.verification;
        verification.untold.retain(|peer, _| is_same(*peer));
        verification.repairs.retain(|peer, _| is_same(*peer));
    }

    /// What a verification found, or that it is settled, is to be committed.
    pub(crate) fn differs_to_commit(&self) -> Option<VolumeChange> {
        let of = |peer: NodeId, differs: &Option<Differs>| VolumeChange::Differs {
            node: peer,
            from: self.node(),
            differs: differs.clone(),
        };
        let mut untold = self.verification.untold.iter();
        let found = untold.find(|(peer, it)| it.differs.as_ref() != self.differs(**peer));
        if let Some((peer, untold)) = found {
            return Some(of(*peer, &untold.differs));
        }
        // Of protocol A: no join says that it has got what differed.
        let repaired = self.links.iter().find(|(peer, link)| {
            let session = link.session.as_ref();
            session.is_some_and(|it| it.repairs && it.stage == Stage::Following)
                && self.is_to_be_repaired(**peer)
        });
        repaired.map(|(peer, _)| of(*peer, &None))
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
                // Not while an earlier one is recorded or repaired; the next one comes by the clock.
                drop(self.start_verify(cx, peer, false));
            }
        }
    }

    pub(crate) fn verify_deadline(&self) -> Time {
        let next = self.verification.next.filter(|_| self.is_open());
        next.unwrap_or(Time::NEVER)
    }

    // Repair.

    /// Whether a person decided that a replica is given what it differs in, by the log.
    fn is_to_be_repaired(&self, peer: NodeId) -> bool {
        self.differs(peer).is_some_and(|differs| differs.repair)
    }

    /// A session begins: what the replica, which is outside the set, is to be repaired in is dirty for it.
    /// Whoever is primary knows it from the log, also if it did not find it itself.
    pub(crate) fn mark_repair(&mut self, peer: NodeId) {
        let found = self.verification.repairs.remove(&peer);
        let Some(slot) = self.slot(peer) else {
            return;
        };
        let runs: Vec<BlockRange> = match (found, self.differs(peer)) {
            (Some(found), _) => found.runs(u64::MAX).collect(),
            (None, Some(known)) if known.repair && !self.lab.has(PlantedBug::RepairForgotten) => {
                known.runs.clone()
            }
            _ => return,
        };
        for run in runs {
            self.meta.bitmaps.set(slot, run);
        }
        self.meta.want_bitmaps();
        if let Some(session) = self.session_mut(peer) {
            session.repairs = true;
        }
    }

    /// A replica is about to be copied anew where it was found to differ: by an operator who took its data
    /// for wrong. When it has joined it does not differ any more.
    pub(crate) fn repaired_anyway(&mut self, peer: NodeId) {
        let (Some(slot), Some(known)) = (self.slot(peer), self.differs(peer)) else {
            return;
        };
        let dirty = self.meta.bitmaps.of(slot);
        if known.repair || !known.runs.iter().all(|run| dirty.covers(*run)) {
            return;
        }
        let differs = Differs {
            from: self.node(),
            repair: true,
            ..known.clone()
        };
        let untold = Untold {
            differs: Some(differs),
            event: None,
        };
        self.verification.untold.insert(peer, untold);
        if let Some(session) = self.session_mut(peer) {
            session.repairs = true;
        }
    }

    /// The reign is over, and with it every verification. What was found and is not in the log is told as
    /// such.
    pub(crate) fn forget_verification(&mut self, cx: &mut Cx<'_>) {
        let verification = std::mem::take(&mut self.verification);
        self.verification.checks = verification.checks;
        let untold = verification.untold.into_values();
        let mut events: Vec<VolumeEvent> = untold.filter_map(|it| it.event).collect();
        for (node, verify) in verification.running {
            events.push(VolumeEvent::Verified {
                node,
                checked: verify.cursor,
                differing: verify.differs.runs(u64::MAX).collect(),
                stopped: None,
                repair: false,
            });
        }
        for mut event in events {
            if let VolumeEvent::Verified {
                stopped, repair, ..
            } = &mut event
            {
                *repair = false;
                let why = "this node is not primary any more; what differs is not recorded, so verify again";
                *stopped = Some(why.to_owned());
            }
            cx.emit(Effect::Event(event));
        }
    }

    // The replica's side.

    /// Digests of the primary's blocks from the first one on arrived: this replica's are read after all that
    /// was sent before. `owner`: for what.
    pub(crate) fn digests_arrived(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        id: u64,
        theirs: (u64, Vec<BlockDigest>),
        owner: fn(Reply, u64) -> Owner,
    ) {
        if !self.check_reign(cx, peer, epoch) {
            return;
        }
        let reply = self.reply_to(peer, epoch);
        let blocks = BlockRange::new(theirs.0, theirs.1.len() as u64);
        let checks = &mut self.verification.checks;
        checks.insert((reply.link, id), theirs);
        if checks.len() > CHECKS_MAX {
            self.protocol_error(cx, peer, "too many digests are under way");
            return;
        }
        self.read_blocks(cx, blocks, owner(reply, id));
    }

    /// Compares this replica's blocks with digests that arrived: which blocks those are, and which of them
    /// differ. All of them, as far as anyone can tell, without `data`: the disk can't read them. `None`: the
    /// link that the digests came by is gone.
    pub(crate) fn compare_with(
        &mut self,
        reply: Reply,
        id: u64,
        data: Option<&Bytes>,
    ) -> Option<(BlockRange, Vec<BlockRange>)> {
        let (first, theirs) = self.verification.checks.remove(&(reply.link, id))?;
        let asked = BlockRange::new(first, theirs.len() as u64);
        let differ = data.map_or_else(
            || vec![asked],
            |data| differing(first, &theirs, &digests(data)),
        );
        Some((asked, differ))
    }

    /// This replica's blocks were read for a verification, or could not be. Which ones; `None`: nobody waits
    /// for the answer.
    pub(crate) fn digest_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        reply: Reply,
        id: u64,
        data: Option<&Bytes>,
    ) -> Option<BlockRange> {
        let (asked, blocks) = self.compare_with(reply, id, data)?;
        let Reply { peer, epoch, .. } = reply;
        self.send(cx, peer, Message::Differ { epoch, id, blocks });
        Some(asked)
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
