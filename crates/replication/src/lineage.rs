//! Histories that forked (DESIGN, rule 9): a forced promotion begins a new one; when two meet, one gives
//! way or both stand alone; what only the loser has is saved before it is overwritten.
//!
//! What a side changed since the fork needs no record of its own: it is what is marked in its bitmap for
//! the other side, because each write is sent or marked (rule 5), and what it calls uncertain. The primary,
//! whose history is in force by commit, judges; the other side tells and obeys.

use std::collections::BTreeMap;

use bytes::Bytes;
use relevo_types::{
    BlockRange, Epoch, LineageId, NodeId,
    cluster::{AfterSplitBrain, Volume, VolumeChange},
};
use relevo_wire::{Message, Refusal};

use crate::{
    attach::whole,
    bitmap::Blocks,
    io::{Effect, SaveId, SavePart, SplitBrain, VolumeEvent},
    jobs::{Owner, Reply},
    lab::PlantedBug,
    machine::{Machine, mask, slots_of},
    ops::Cx,
};

/// Blocks of one part of what is saved: 1 MiB.
const SAVE_BLOCKS: u64 = 256;

/// What this node knows of other histories.
#[derive(Debug, Default)]
pub(crate) struct Lineages {
    /// Peers with whom nothing is replicated until somebody decides; until the next configuration.
    pub(crate) splits: BTreeMap<NodeId, SplitBrain>,
    /// What this replica has of its own is being saved.
    saving: Option<Saving>,
    /// The primary's history gives way to a peer's: no write begins from then on, since its answer would be a promise
    /// about a history that is over.
    yields: Option<Yield>,
}

/// The primary's history gives way.
#[derive(Clone, Copy, Debug)]
struct Yield {
    /// Under this epoch. Once it was proposed it may be committed until the epoch is over.
    epoch: Epoch,
    to: NodeId,
    proposed: bool,
}

/// What both sides of a link of two histories said.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fork {
    told: Option<u64>,
    heard: Option<Side>,
    /// This node judged that the peer's history gives way.
    pub(crate) gives_way: bool,
}

/// One of two histories that met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Side {
    /// Whose.
    pub node: NodeId,
    /// Blocks of 4 KiB that only this side has, as far as it knows.
    pub changed: u64,
    /// It is no mix of old and new.
    pub consistent: bool,
    /// Its history.
    pub lineage: LineageId,
}

/// What becomes of two histories that met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The side that is not in force is overwritten.
    OtherGivesWay,
    /// The side in force is.
    InForceGivesWay,
    /// Neither, until a person decides; with the reason.
    StandAlone(String),
}

/// Judges two histories that met (rule 9). `in_force` is the primary's.
#[must_use]
pub fn judge(volume: &Volume, in_force: &Side, other: &Side) -> Verdict {
    let decided = volume.replicas.get(&other.node);
    if decided.is_some_and(|replica| replica.gives_way) || other.changed == 0 {
        return Verdict::OtherGivesWay;
    }
    let stand_alone = |why: &str| Verdict::StandAlone(why.to_owned());
    let keep_other = || {
        if other.consistent {
            Verdict::InForceGivesWay
        } else {
            stand_alone("the other replica is a mix of old and new and can't be kept")
        }
    };
    if in_force.changed == 0 {
        return keep_other();
    }
    let age = |lineage| volume.lineages.iter().position(|known| *known == lineage);
    let policy = volume.options.after_split_brain;
    let discard_younger = policy == AfterSplitBrain::DiscardYoungerPrimary;
    match policy {
        AfterSplitBrain::Disconnect => {
            stand_alone("`after-split-brain` is `disconnect`: a person decides")
        }
        AfterSplitBrain::DiscardZeroChanges => {
            stand_alone("both have changes, so `discard-zero-changes` decides nothing")
        }
        AfterSplitBrain::DiscardLeastChanges if other.changed < in_force.changed => {
            Verdict::OtherGivesWay
        }
        AfterSplitBrain::DiscardLeastChanges if other.changed > in_force.changed => keep_other(),
        AfterSplitBrain::DiscardLeastChanges => {
            stand_alone("both have as many changes, so `discard-least-changes` decides nothing")
        }
        AfterSplitBrain::DiscardOlderPrimary | AfterSplitBrain::DiscardYoungerPrimary => {
            match (age(in_force.lineage), age(other.lineage)) {
                (Some(ours), Some(theirs)) if (theirs > ours) == discard_younger => {
                    Verdict::OtherGivesWay
                }
                (Some(_), Some(_)) => keep_other(),
                _ => stand_alone("which of the two histories is older is not known any more"),
            }
        }
        AfterSplitBrain::Discard(node) if node == other.node => Verdict::OtherGivesWay,
        AfterSplitBrain::Discard(node) if node == in_force.node => keep_other(),
        AfterSplitBrain::Discard(_) => {
            stand_alone("`after-split-brain` names a node that is neither of the two")
        }
    }
}

/// What this replica has of its own, on its way to a safe place.
#[derive(Debug)]
struct Saving {
    id: SaveId,
    reply: Reply,
    to: LineageId,
    total: u64,
    left: Blocks,
    ended: bool,
}

impl Machine {
    pub(crate) fn lineage(&self) -> LineageId {
        self.meta.superblock.replica.lineage
    }

    /// Whether the greeting of a peer named another history than this replica's.
    pub(crate) fn is_other_lineage(&self, peer: NodeId) -> bool {
        let hello = self.links.get(&peer).and_then(|link| link.hello);
        hello.is_some_and(|info| info.lineage != self.lineage())
    }

    /// Whether a link to a peer would be of use.
    pub(crate) fn wants_link(&self, peer: NodeId) -> bool {
        // Judged here or there, it stays so until the next configuration: to try again would only be
        // refused again. A primary that judged, and forgot it by a restart, makes the link itself.
        let judged = self.lineages.splits.contains_key(&peer);
        !judged && !self.standalone.contains_key(&peer)
    }

    /// What this replica has and a peer may lack.
    fn changes_for(&self, peer: NodeId) -> Blocks {
        self.changes_in(self.slot(peer).map_or(0, mask))
    }

    /// What this replica has and any other may lack. That is what it has of its own when it meets a newer
    /// history: a peer that was equal to it may have given way to that one meanwhile, and has its content
    /// now; what is marked for the peer alone knows nothing of it.
    fn own_changes(&self) -> Blocks {
        let used = self.meta.superblock.slots_used & !mask(self.meta.own_slot());
        self.changes_in(self.other_slots() | used)
    }

    fn changes_in(&self, slots: u8) -> Blocks {
        // Of a mix the own map says what it lacks.
        let own = if self.meta.superblock.inconsistent {
            0
        } else {
            mask(self.meta.own_slot())
        };
        let maps = slots_of(slots | own).map(|slot| self.meta.bitmaps.of(slot));
        let marked = maps.flat_map(|map| map.runs(u64::MAX));
        let mut changes = Blocks::default();
        for blocks in marked.chain(self.tail.blocks()) {
            changes.set(blocks, |_| {});
        }
        changes
    }

    /// The greetings named different histories: each side says what it has of its own.
    pub(crate) fn tell_changes(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        if !self.is_other_lineage(peer) {
            return;
        }
        let blocks = self.own_changes().count();
        let consistent = !self.meta.superblock.inconsistent;
        if let Some(link) = self.links.get_mut(&peer) {
            link.fork.told = Some(blocks);
        }
        self.send(cx, peer, Message::Changes { blocks, consistent });
    }

    pub(crate) fn peer_changes(&mut self, peer: NodeId, blocks: u64, consistent: bool) {
        if let Some(link) = self.links.get_mut(&peer)
            && let Some(info) = link.hello
        {
            link.fork.heard.get_or_insert(Side {
                node: peer,
                changed: blocks,
                consistent,
                lineage: info.lineage,
            });
        }
    }

    /// Whether a peer's replica may be made what this one is.
    pub(crate) fn may_be_overwritten(&self, peer: NodeId) -> bool {
        let link = self.links.get(&peer);
        !self.is_other_lineage(peer) || link.is_some_and(|link| link.fork.gives_way)
    }

    fn verdict(&self, peer: NodeId) -> Option<(SplitBrain, Verdict)> {
        let (primary, volume) = (self.primary()?, self.volume.as_deref()?);
        let link = self.links.get(&peer)?;
        let theirs = link.fork.heard.filter(|_| self.is_other_lineage(peer))?;
        // One that has seen a higher epoch knows better which history is in force.
        let knows_better = link.hello.is_some_and(|info| info.epoch > primary.epoch);
        let judged = link.fork.gives_way || primary.in_sync.contains(&peer) || knows_better;
        if judged || volume.epoch != primary.epoch || !volume.replicas.contains_key(&peer) {
            return None;
        }
        let ours = Side {
            node: self.node(),
            changed: self.changes_for(peer).count(),
            consistent: true,
            lineage: self.lineage(),
        };
        let mut verdict = judge(volume, &ours, &theirs);
        if self.lab.has(PlantedBug::MergeInSilence) {
            verdict = Verdict::OtherGivesWay;
        }
        let why = match &verdict {
            Verdict::StandAlone(why) => why.clone(),
            _ => String::new(),
        };
        let split = SplitBrain {
            ours: ours.changed,
            theirs: theirs.changed,
            why,
        };
        Some((split, verdict))
    }

    /// The primary judges a peer that is of another history.
    pub(crate) fn settle_lineage(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        match self.verdict(peer) {
            Some((_, Verdict::OtherGivesWay)) => {
                if let Some(link) = self.links.get_mut(&peer) {
                    link.fork.gives_way = true;
                }
            }
            Some((split, Verdict::StandAlone(_))) => {
                self.remember_split(cx, peer, split);
                self.refuse_split(cx, peer);
            }
            Some((_, Verdict::InForceGivesWay)) if self.yields().is_none() => {
                self.lineages.yields = self.primary().map(|primary| Yield {
                    epoch: primary.epoch,
                    to: peer,
                    proposed: false,
                });
            }
            Some((_, Verdict::InForceGivesWay)) | None => {}
        }
    }

    fn yields(&self) -> Option<Yield> {
        let epoch = self.primary()?.epoch;
        self.lineages.yields.filter(|it| it.epoch == epoch)
    }

    /// Whether writes wait, because this history gives way.
    pub(crate) fn is_yielding(&self) -> bool {
        self.yields().is_some()
    }

    /// Looks again at what this history gives way to, while that was not proposed.
    pub(crate) fn settle_yield(&mut self) {
        let Some(Yield { to, proposed, .. }) = self.yields() else {
            self.lineages.yields = None;
            return;
        };
        let stands = |(_, verdict): (SplitBrain, Verdict)| verdict == Verdict::InForceGivesWay;
        if proposed || self.verdict(to).is_some_and(stands) {
            return;
        }
        // The link is gone, or a write that had begun before is one change now.
        self.lineages.yields = None;
    }

    /// The primary's history gives way by commit: the replica that is kept is the in-sync set then. Proposed when no
    /// write is under way, and again until the epoch is over.
    pub(crate) fn gives_way_to(&self) -> Option<VolumeChange> {
        let Yield { to, proposed, .. } = self.yields()?;
        let node = self.node();
        (proposed || !self.jobs.has_app_writes()).then_some(VolumeChange::GiveWay { node, to })
    }

    /// That was proposed: it may be committed at any time now.
    pub(crate) fn proposed_to_give_way(&mut self) {
        if let Some(yields) = &mut self.lineages.yields {
            yields.proposed = true;
        }
    }

    fn remember_split(&mut self, cx: &mut Cx<'_>, peer: NodeId, split: SplitBrain) {
        let known = self.lineages.splits.insert(peer, split.clone());
        if known.as_ref() != Some(&split) {
            cx.emit(Effect::Event(VolumeEvent::SplitBrain { peer, split }));
        }
    }

    /// Ends the link to a peer that was judged. False: it was not.
    pub(crate) fn refuse_split(&mut self, cx: &mut Cx<'_>, peer: NodeId) -> bool {
        let split = self.lineages.splits.get(&peer).filter(|_| self.is_open());
        let Some(SplitBrain { ours, theirs, why }) = split.cloned() else {
            return false;
        };
        self.refuse(cx, peer, Refusal::SplitBrain { ours, theirs, why });
        true
    }

    /// The primary said that the histories forked and nobody decided.
    pub(crate) fn heard_of_split(&mut self, cx: &mut Cx<'_>, peer: NodeId, refusal: &Refusal) {
        // A primary judges by itself.
        if let Refusal::SplitBrain { ours, theirs, why } = refusal
            && !self.is_open()
        {
            let split = SplitBrain {
                ours: *theirs,
                theirs: *ours,
                why: why.clone(),
            };
            self.remember_split(cx, peer, split);
        }
    }

    /// A committed configuration made this replica the volume: a history of its own begins here.
    pub(crate) fn begin_lineage(&mut self, cx: &mut Cx<'_>) {
        let Some(volume) = self.volume.clone() else {
            return;
        };
        let me = self.node();
        let alone = volume.in_sync.len() == 1 && volume.in_sync.contains(&me);
        if !alone || volume.lineage == self.lineage() {
            return;
        }
        for peer in self.links.keys().copied().collect::<Vec<_>>() {
            self.close_link(
                cx,
                peer,
                "a new history of the volume begins here".to_owned(),
            );
        }
        self.doubt_a_mix();
        self.saw_epoch(volume.epoch);
        self.meta.superblock.replica.lineage = volume.lineage;
        self.meta.want_all();
    }

    /// Of a mix nobody knows where it differs from anybody.
    fn doubt_a_mix(&mut self) {
        if self.meta.superblock.inconsistent {
            let all = whole(self.meta.layout());
            let own = self.meta.own_slot();
            self.meta.bitmaps.set(own, all);
        }
    }

    /// A primary of another history begins a resync: what only this replica has is saved first.
    pub(crate) fn give_way(&mut self, cx: &mut Cx<'_>, reply: Reply) {
        self.lineages.splits.remove(&reply.peer);
        let changes = self.own_changes();
        let link = self.links.get(&reply.peer);
        let told = link.and_then(|link| link.fork.told);
        let to = link.and_then(|link| link.hello).map(|info| info.lineage);
        let (Some(told), Some(to)) = (told, to) else {
            return;
        };
        if told < changes.count() {
            // An application wrote here meanwhile: the verdict was about less.
            self.protocol_error(
                cx,
                reply.peer,
                "more was changed here than was told when the histories met",
            );
            return;
        }
        let id = SaveId(self.next_id());
        let total = changes.count();
        let saving = Saving {
            id,
            reply,
            to,
            total,
            left: changes,
            ended: total == 0,
        };
        if total == 0 || self.lab.has(PlantedBug::OverwriteWithoutSaving) {
            self.gave_way(cx, &saving);
            return;
        }
        self.lineages.saving = Some(saving);
        let part = SavePart::Begin {
            from: self.lineage(),
            to: reply.peer,
            blocks: total,
        };
        cx.emit(Effect::Save { id, part });
    }

    /// Forgets a saving that nobody waits for any more.
    pub(crate) fn settle_giving_way(&mut self, cx: &mut Cx<'_>) {
        let saving = self.lineages.saving.as_ref();
        if saving.is_some_and(|saving| !self.is_current(saving.reply)) {
            self.lineages.saving = None;
            self.abandon_jobs(cx, |owner| matches!(owner, Owner::SaveRead(_)));
        }
    }

    pub(crate) fn save_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        id: SaveId,
        blocks: BlockRange,
        data: Bytes,
    ) {
        let saving = self.lineages.saving.as_mut();
        if let Some(saving) = saving.filter(|saving| saving.id == id) {
            saving.left.clear(blocks, |_| {});
            let part = SavePart::Blocks { blocks, data };
            cx.emit(Effect::Save { id, part });
        }
    }

    /// A part was saved: the next one, or the resync.
    pub(crate) fn saved(&mut self, cx: &mut Cx<'_>, id: SaveId, result: Result<(), String>) {
        let Some(mut saving) = self.lineages.saving.take_if(|saving| saving.id == id) else {
            return;
        };
        let peer = saving.reply.peer;
        if !self.is_current(saving.reply) {
            return;
        }
        if let Err(why) = result {
            let why = format!(
                "what only this node has could not be saved before it is overwritten: {why}; make room, then `relevo connect`"
            );
            self.stand_alone(cx, peer, why);
            return;
        }
        if saving.ended {
            self.gave_way(cx, &saving);
            return;
        }
        // A sign of life: a primary waits for the answer to its StartSync.
        let progress = Message::Changes {
            blocks: saving.left.count(),
            consistent: true,
        };
        self.send(cx, peer, progress);
        match saving.left.next_run(0, SAVE_BLOCKS) {
            Some(run) => self.read_blocks(cx, run, Owner::SaveRead(id)),
            None => {
                saving.ended = true;
                let part = SavePart::End;
                cx.emit(Effect::Save { id, part });
            }
        }
        self.lineages.saving = Some(saving);
    }

    /// Nothing that only this replica has can be lost any more: it takes the primary's history.
    fn gave_way(&mut self, cx: &mut Cx<'_>, saving: &Saving) {
        let peer = saving.reply.peer;
        // They were greeted with the history that is given up: who judges by that greeting judges wrong, or never.
        let others = self.links.keys().copied().filter(|other| *other != peer);
        for other in others.collect::<Vec<_>>() {
            let reason = "this replica takes another history of the volume".to_owned();
            self.close_link(cx, other, reason);
        }
        let own = self.meta.own_slot();
        for blocks in self.own_changes().runs(u64::MAX).collect::<Vec<_>>() {
            self.meta.bitmaps.set(own, blocks);
        }
        self.doubt_a_mix();
        self.meta.superblock.replica.lineage = saving.to;
        if saving.total > 0 {
            cx.emit(Effect::Event(VolumeEvent::GaveWay {
                to: peer,
                saved: saving.total,
            }));
        }
        self.become_target(saving.reply);
    }
}
