//! From being named primary to being open for I/O.
//!
//! In-sync replicas can differ only in writes that were never acknowledged: their tails. The new
//! primary asks every other member for its tail and writes its own content of all those blocks to
//! every member. A member that can't be reached, or does not know what it has, leaves the set by
//! commit first. Every change of the configuration starts this over, so no step has to be undone.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use relevo_types::{BlockRange, Epoch, NodeId, Time, cluster::Volume};
use relevo_wire::Message;

use crate::{
    bitmap::Blocks,
    io::{Effect, VolumeEvent},
    jobs::Owner,
    lab::PlantedBug,
    machine::{Machine, Role, body_of, mask, slots_of},
    metadata::Ticket,
    ops::Cx,
    primary::Primary,
    sync::{CHUNK_BLOCKS, Session},
};

/// Reconciliation chunks under way at once.
const PUSHES_MAX: usize = 32;

/// A replica that restarted uncleanly may lack what it acknowledged; it waits this many times
/// longer for a member that does not, before it goes on alone.
const UNCERTAIN_PATIENCE: u32 = 3;

/// A promotion under way.
#[derive(Debug)]
pub(crate) struct Promotion {
    /// Tells late results of an earlier attempt.
    attempt: u64,
    pub(crate) epoch: Epoch,
    /// When this node was named.
    pub(crate) since: Time,
    /// When this attempt was started.
    pub(crate) began: Time,
    /// Absent members were waited for long enough.
    pub(crate) patience_over: bool,
    members: BTreeMap<NodeId, Member>,
    step: Step,
}

#[derive(Debug)]
enum Member {
    /// Not asked: no link.
    Absent,
    Asked,
    Answered(Vec<BlockRange>),
    /// Can't tell what it has.
    Uncertain,
}

#[derive(Debug)]
enum Step {
    /// The tails come in.
    Gathering,
    /// The own content of all tails goes out.
    Pushing(Pushing),
    /// The marks for replicas outside the set get durable.
    Marking(Ticket),
}

#[derive(Debug, Default)]
struct Pushing {
    left: Blocks,
    reading: usize,
    sent: BTreeMap<u64, NodeId>,
}

impl Promotion {
    /// Whether a member's answer is awaited.
    pub(crate) fn awaits(&self, peer: NodeId) -> bool {
        matches!(self.members.get(&peer), Some(Member::Asked))
            || matches!(&self.step, Step::Pushing(pushing) if pushing.sent.values().any(|p| *p == peer))
    }

    /// Members that did not answer yet.
    pub(crate) fn missing(&self) -> Vec<NodeId> {
        self.members
            .iter()
            .filter(|(_, member)| !matches!(member, Member::Answered(_)))
            .map(|(node, _)| *node)
            .collect()
    }
}

impl Machine {
    /// Starts or restarts the promotion under the known configuration, which names this node.
    pub(crate) fn begin_promotion(&mut self, cx: &mut Cx<'_>, since: Time) {
        let Some(volume) = self.volume.clone() else {
            return;
        };
        self.fold_tail();
        self.meta.bitmaps.forget_generations();
        self.afters.retain(|(_, after)| !after.is_for_primary());
        self.barriers.clear();
        for link in self.links.values_mut() {
            link.incoming = None;
            link.session = None;
        }
        let attempt = self.next_id();
        self.abandon_jobs(cx, |owner| matches!(owner, Owner::PushRead(_)));
        let others = volume.in_sync.iter().filter(|node| **node != self.node());
        self.role = Role::Promoting(Promotion {
            attempt,
            epoch: volume.epoch,
            since,
            began: cx.now,
            patience_over: false,
            members: others.map(|node| (*node, Member::Absent)).collect(),
            step: Step::Gathering,
        });
        for peer in self.links.keys().copied().collect::<Vec<_>>() {
            // Whatever waited there was for another reign; it will be refused.
            self.unblock(cx, peer);
        }
    }

    /// An earlier life of this engine may have made proposals under the epoch in force: this one
    /// can open only under a later one, at which those can't be committed any more.
    pub(crate) fn needs_fresh_epoch(&self) -> bool {
        self.volume
            .as_ref()
            .is_none_or(|volume| volume.epoch <= self.attached_epoch)
    }

    /// Members that must leave the set before this node can open: those that can't tell what they
    /// have, and, after a time, those that can't be asked.
    pub(crate) fn promotion_leavers(&self, promotion: &Promotion) -> Vec<NodeId> {
        let greeted = |node: &NodeId| {
            self.links
                .get(node)
                .is_some_and(|link| link.hello.is_some())
        };
        let members = promotion.members.iter();
        let leavers = members.filter(|(node, member)| match member {
            // One that is about to be asked is not absent, however late it is.
            // Nothing that this node will acknowledge waits for it. But if it knows better than this
            // node what was acknowledged, it shall say so first.
            _ if self.certain && !self.may_join(**node) => true,
            Member::Absent => promotion.patience_over && !greeted(node),
            Member::Uncertain => true,
            Member::Asked | Member::Answered(_) => false,
        });
        leavers.map(|(node, _)| *node).collect()
    }

    /// How long absent members are waited for.
    pub(crate) fn patience(&self) -> std::time::Duration {
        if self.certain {
            self.config.reconcile_grace
        } else {
            self.config.reconcile_grace * UNCERTAIN_PATIENCE
        }
    }

    pub(crate) fn settle_promotion(&mut self, cx: &mut Cx<'_>) {
        let patience = self.patience();
        let Role::Promoting(promotion) = &mut self.role else {
            return;
        };
        promotion.patience_over = cx.now >= promotion.since + patience;
        let epoch = promotion.epoch;
        if self.needs_fresh_epoch() || self.meta.durable_epoch() < epoch {
            return;
        }
        self.ask_members(cx, epoch);
        let Role::Promoting(promotion) = &mut self.role else {
            return;
        };
        let knows = |member: &Member| matches!(member, Member::Answered(_));
        match &promotion.step {
            Step::Gathering if !self.certain && promotion.members.values().any(knows) => {
                // That member has everything that was acknowledged; this replica may not.
                self.role = Role::Yielding;
            }
            Step::Gathering if promotion.members.values().all(knows) => self.start_pushing(cx),
            Step::Gathering => {}
            Step::Pushing(_) => self.push(cx),
            Step::Marking(ticket) => {
                if self.meta.is_durable(*ticket) {
                    self.open(cx);
                }
            }
        }
    }

    fn ask_members(&mut self, cx: &mut Cx<'_>, epoch: Epoch) {
        let Role::Promoting(promotion) = &mut self.role else {
            return;
        };
        let mut asked = Vec::new();
        for (node, member) in &mut promotion.members {
            let greeted = self.links.get(node).and_then(|link| link.hello);
            if matches!(member, Member::Absent) && greeted.is_some_and(|info| info.epoch <= epoch) {
                *member = Member::Asked;
                asked.push(*node);
            }
        }
        for node in asked {
            self.send(cx, node, Message::Reconcile { epoch });
        }
    }

    pub(crate) fn tail_arrived(
        &mut self,
        peer: NodeId,
        epoch: Epoch,
        blocks: Vec<BlockRange>,
        certain: bool,
    ) {
        if let Role::Promoting(promotion) = &mut self.role
            && promotion.epoch == epoch
            && let Some(member @ Member::Asked) = promotion.members.get_mut(&peer)
        {
            *member = if certain {
                Member::Answered(blocks)
            } else {
                Member::Uncertain
            };
        }
    }

    /// Answers that came over the link don't count any more; what was pushed may be lost.
    pub(crate) fn promotion_lost_link(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        if let Role::Promoting(promotion) = &self.role
            && promotion.members.contains_key(&peer)
        {
            let since = promotion.since;
            self.begin_promotion(cx, since);
        }
    }

    fn start_pushing(&mut self, cx: &mut Cx<'_>) {
        let own: Vec<BlockRange> = {
            let own = self.meta.bitmaps.of(self.meta.own_slot());
            own.runs(u64::MAX).collect()
        };
        let Role::Promoting(promotion) = &mut self.role else {
            return;
        };
        let mut left = Blocks::default();
        let has_members = !promotion.members.is_empty();
        let theirs = promotion.members.values().flat_map(|member| match member {
            Member::Answered(blocks) => blocks.as_slice(),
            Member::Absent | Member::Asked | Member::Uncertain => &[],
        });
        let pushes = has_members && !self.lab.has(PlantedBug::OpenBeforeReconcile);
        for run in own.iter().chain(theirs).filter(|_| pushes) {
            left.set(*run, |_| {});
        }
        promotion.step = Step::Pushing(Pushing {
            left,
            ..Pushing::default()
        });
        self.push(cx);
    }

    fn push(&mut self, cx: &mut Cx<'_>) {
        loop {
            let Role::Promoting(promotion) = &mut self.role else {
                return;
            };
            let attempt = promotion.attempt;
            let members = promotion.members.len().max(1);
            let Step::Pushing(pushing) = &mut promotion.step else {
                return;
            };
            let under_way = pushing.reading + pushing.sent.len() / members;
            let Some(chunk) = pushing.left.next_run(0, CHUNK_BLOCKS) else {
                if pushing.reading == 0 && pushing.sent.is_empty() {
                    self.start_marking();
                }
                return;
            };
            if under_way >= PUSHES_MAX {
                return;
            }
            pushing.left.clear(chunk, |_| {});
            pushing.reading += 1;
            self.read_blocks(cx, chunk, Owner::PushRead(attempt));
        }
    }

    pub(crate) fn push_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        attempt: u64,
        blocks: BlockRange,
        data: Bytes,
    ) {
        let first_id = self.last_id + 1;
        let Role::Promoting(promotion) = &mut self.role else {
            return;
        };
        let Step::Pushing(pushing) = &mut promotion.step else {
            return;
        };
        if promotion.attempt != attempt {
            return;
        }
        pushing.reading -= 1;
        let epoch = promotion.epoch;
        let sends: Vec<(u64, NodeId)> = (first_id..)
            .zip(promotion.members.keys().copied())
            .collect();
        pushing.sent.extend(sends.iter().copied());
        self.last_id += sends.len() as u64;
        let body = body_of(data);
        for (id, peer) in sends {
            let message = Message::SyncWrite {
                epoch,
                id,
                range: blocks.bytes(),
                body: body.clone(),
            };
            self.send(cx, peer, message);
        }
    }

    pub(crate) fn push_acked(&mut self, peer: NodeId, id: u64) {
        if let Role::Promoting(promotion) = &mut self.role
            && let Step::Pushing(pushing) = &mut promotion.step
            && pushing.sent.get(&id) == Some(&peer)
        {
            pushing.sent.remove(&id);
        }
    }

    /// What this replica alone may have is missing on replicas outside the set, as far as anyone
    /// knows: marked for them, durably, before the own map is cleared.
    fn start_marking(&mut self) {
        let outside = self.other_slots() & !self.member_slots();
        self.use_slots(outside);
        let own = self.meta.own_slot();
        for slot in slots_of(outside) {
            self.meta.bitmaps.merge(own, slot);
        }
        let ticket = self.meta.want_bitmaps();
        if let Role::Promoting(promotion) = &mut self.role {
            promotion.step = Step::Marking(ticket);
        }
    }

    /// The slots of the in-sync set under the known configuration.
    fn member_slots(&self) -> u8 {
        self.volume.as_ref().map_or(0, |volume| {
            let slots = volume.in_sync.iter().filter_map(|node| volume.slot(*node));
            slots.fold(0, |all, slot| all | mask(slot))
        })
    }

    fn open(&mut self, cx: &mut Cx<'_>) {
        let Some(volume) = self.volume.clone() else {
            return;
        };
        let epoch = volume.epoch;
        let in_sync: BTreeSet<NodeId> = volume.in_sync.clone();
        let members = self.member_slots();
        for slot in slots_of(members) {
            self.meta.bitmaps.clear_all(slot);
        }
        self.certain = true;
        self.meta.superblock.inconsistent = false;
        self.opened = cx.now;
        self.role = Role::Primary(Primary::new(epoch, in_sync.clone()));
        for peer in in_sync {
            if let Some(link) = self.links.get_mut(&peer) {
                link.session = Some(Session::in_sync(epoch, cx.now));
                let in_sync = members;
                self.send(cx, peer, Message::EpochUpdate { epoch, in_sync });
            }
        }
        if volume.tends {
            cx.emit(Effect::Event(VolumeEvent::Tends { epoch }));
        }
        self.serve(cx, &volume);
        self.settle_primary(cx);
    }

    /// Requests are taken from now on, unless this node only tends the volume.
    pub(crate) fn serve(&mut self, cx: &mut Cx<'_>, volume: &Volume) {
        let takes = self.lab.has(PlantedBug::TenderTakesRequests);
        let Some(primary) = self.primary_mut() else {
            return;
        };
        if !primary.serves && (!volume.tends || takes) {
            primary.serves = true;
            let epoch = primary.epoch;
            cx.emit(Effect::Event(VolumeEvent::Opened { epoch }));
        }
    }
}
