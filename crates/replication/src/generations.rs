//! Generations of marks for replicas of protocol A.
//!
//! Such a replica is outside the in-sync set, so every member marks each write for it: any of them may be
//! the next primary. The primary knows what the replica acknowledged; the members don't. So that they need
//! not keep what was marked since it was in the set last, the primary cuts the stream to each of them into
//! generations. A generation begins with a message between two writes. When the replica has acknowledged
//! every write before that begin, the next message says so: what was marked before the begin is forgotten,
//! and the next generation begins. After a takeover at most two generations are copied again.
//!
//! The invariant, and why it holds, is in `docs/protocol.md`, "Protocols".

use std::time::Duration;

use relevo_types::{Epoch, NodeId, ReplicaSlot, Seq, Time};
use relevo_wire::Message;

use crate::{
    lab::PlantedBug,
    machine::{Machine, mask},
    ops::Cx,
    sync::Stage,
};

/// A generation lasts at least this long; and as long as the replica owes an acknowledgement from before
/// its begin. Ten small messages a second for each pair are nothing beside the writes that cause them.
const GENERATION: Duration = Duration::from_millis(100);

/// The last generation that was begun on a link, of marks for one replica of protocol A.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Generation {
    /// The last write before the begin.
    begun: Seq,
    /// The receiver may have marks from before the begin.
    older: bool,
}

impl Machine {
    /// Looks at the generations after a while, unless that is due already.
    pub(crate) fn generations_soon(&mut self, cx: &Cx<'_>) {
        self.generations_due.get_or_insert(cx.now + GENERATION);
    }

    pub(crate) fn generations_deadline(&self) -> Time {
        self.generations_due
            .filter(|_| self.is_open())
            .unwrap_or(Time::NEVER)
    }

    /// Ends generations whose writes were acknowledged, and begins the next.
    pub(crate) fn settle_generations(&mut self, cx: &mut Cx<'_>) {
        if self.generations_due.is_none_or(|due| cx.now < due) {
            return;
        }
        self.generations_due = None;
        let mut unfinished = false;
        for (follower, slot) in self.followers() {
            let acknowledged = self.acknowledged_by(slot);
            for receiver in self.links.keys().copied().collect::<Vec<_>>() {
                if receiver != follower {
                    unfinished |= self.next_generation(cx, receiver, follower, slot, acknowledged);
                }
            }
        }
        if unfinished {
            self.generations_soon(cx);
        }
    }

    /// Replicas of protocol A that get every write and lack nothing else: whatever they were sent or not in
    /// an earlier session, they have it.
    fn followers(&self) -> Vec<(NodeId, ReplicaSlot)> {
        let sessions = self.links.iter().filter_map(|(peer, link)| {
            let session = link.session.as_ref()?;
            let slot = self.slot(*peer)?;
            let lacks_nothing = self.meta.bitmaps.of(slot).is_empty();
            (session.stage == Stage::Following && lacks_nothing).then_some((*peer, slot))
        });
        sessions.collect()
    }

    /// The position up to which a replica that gets every write has acknowledged all that it was sent.
    fn acknowledged_by(&self, slot: ReplicaSlot) -> Seq {
        let Some(primary) = self.primary() else {
            return Seq(0);
        };
        let mut writes = primary.writes.iter();
        let oldest = writes.find(|(_, write)| write.unacked & mask(slot) != 0);
        oldest.map_or(primary.last_seq, |(seq, _)| Seq(seq.0.saturating_sub(1)))
    }

    /// Tells a peer, which marks for a follower, that a generation begins, if it is time. True: another
    /// one will have to.
    fn next_generation(
        &mut self,
        cx: &mut Cx<'_>,
        receiver: NodeId,
        follower: NodeId,
        slot: ReplicaSlot,
        acknowledged: Seq,
    ) -> bool {
        let early = self.lab.has(PlantedBug::GenerationDroppedEarly);
        let Some((epoch, last)) = self.primary().map(|it| (it.epoch, it.last_seq)) else {
            return false;
        };
        let Some(receiving) = self.session_mut(receiver) else {
            return false;
        };
        // One that lacks something may have marks that stand for more than what passes by.
        if !matches!(receiving.stage, Stage::InSync | Stage::Following) {
            return false;
        }
        let known = receiving.generations.get(&follower).copied();
        let confirmed = match known {
            None => false,
            Some(known) if !known.older && known.begun == last => return false,
            Some(known) if known.begun <= acknowledged || early => true,
            Some(_) => return true,
        };
        let older = known.is_none_or(|known| known.begun < last);
        let begun = Generation { begun: last, older };
        receiving.generations.insert(follower, begun);
        let message = Message::Generation {
            epoch,
            slot,
            confirmed,
        };
        self.send(cx, receiver, message);
        older
    }

    // The side of a replica that marks.

    /// A generation of marks for another replica begins here.
    pub(crate) fn generation(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        slot: ReplicaSlot,
        confirmed: bool,
    ) {
        if !self.check_reign(cx, peer, epoch) || slot == self.meta.own_slot() {
            return;
        }
        if confirmed {
            self.meta.bitmaps.keep_newest_generation(slot);
        } else {
            self.meta.bitmaps.begin_generation(slot);
        }
    }
}
