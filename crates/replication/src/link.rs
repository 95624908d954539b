//! Links to peers: the greeting, the order of messages, signs of life.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
};

use relevo_types::{BLOCK_SIZE, ByteRange, Epoch, NodeId, Time};
use relevo_wire::{Body, Message, PeerInfo, Refusal};

use crate::{
    heal::PIECE_BLOCKS,
    io::Effect,
    jobs::Owner,
    lineage::Fork,
    machine::{Machine, Role, mask},
    ops::Cx,
    sync::Session,
};

/// Messages of one link that wait while an earlier one gets durable. A primary keeps at most
/// `WINDOW_MAX` writes open and as many resync writes as fit the window, so more is a broken peer.
const INBOX_MAX: usize = 16_384;

/// A peer that is alive but owes an answer that needs its disk, and answers nothing for this many
/// link time-outs, is given up too: its disk hangs, and with it every application here.
const STALL_TIMEOUTS: u32 = 10;

/// A link.
#[derive(Debug)]
pub(crate) struct Link {
    /// Tells this link from earlier ones to the same peer.
    pub(crate) number: u64,
    pub(crate) hello: Option<PeerInfo>,
    inbox: VecDeque<Message>,
    /// A message is being made durable; later ones wait.
    blocked: bool,
    heard: Time,
    /// When it last said anything but a sign of life.
    answered: Time,
    /// Since when the peer owes an answer and is silent.
    owed: Option<Time>,
    pinged: bool,
    /// The peer wants to be told of each write that it was received (protocol B).
    pub(crate) gives_receipts: bool,
    /// The peer was told that this node wants that.
    pub(crate) wants_receipts: bool,
    /// The peer said that the resync shall stand still.
    pub(crate) peer_pauses: bool,
    /// The primary compares this replica with its own.
    pub(crate) verifies: bool,
    /// The greeting named another history: what each side said it has of its own.
    pub(crate) fork: Fork,
    /// The peer's reign over this replica.
    pub(crate) incoming: Option<Incoming>,
    /// This node's reign over the peer's replica.
    pub(crate) session: Option<Session>,
}

/// Walks over the links while its caller changes them: without a list of them, since that is done for
/// every input.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    at: Option<NodeId>,
}

impl Walk {
    /// Over those behind a peer; `None`: over all.
    pub(crate) fn after(at: Option<NodeId>) -> Self {
        Self { at }
    }

    pub(crate) fn next(&mut self, links: &BTreeMap<NodeId, Link>) -> Option<NodeId> {
        let after = self.at.map_or(Bound::Unbounded, Bound::Excluded);
        let (peer, _) = links.range((after, Bound::Unbounded)).next()?;
        self.at = Some(*peer);
        self.at
    }
}

/// What a primary is to this replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Incoming {
    pub(crate) epoch: Epoch,
    /// What this replica is in it.
    pub(crate) part: Part,
}

/// What this replica is under a primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// Gets what it lacks.
    Target,
    /// Told its tail; gets what the primary decided of it.
    Reconciling,
    /// In sync.
    Member,
    /// Of protocol A: gets every write, is waited for by none.
    Following,
    /// The same, but it does not keep up and is sent nothing for now.
    Behind,
}

impl Machine {
    pub(crate) fn link_up(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        self.link_lost(cx, peer);
        if self.detach.is_some() {
            return;
        }
        if let Some(reason) = self.standalone.get(&peer).cloned() {
            self.refuse(cx, peer, Refusal::StandAlone { reason });
            return;
        }
        if self.refuse_split(cx, peer) {
            return;
        }
        self.last_link += 1;
        let link = Link {
            number: self.last_link,
            hello: None,
            inbox: VecDeque::new(),
            blocked: false,
            heard: cx.now,
            answered: cx.now,
            owed: None,
            pinged: false,
            gives_receipts: false,
            wants_receipts: false,
            peer_pauses: false,
            verifies: false,
            fork: Fork::default(),
            incoming: None,
            session: None,
        };
        self.links.insert(peer, link);
        let hello = PeerInfo {
            node: self.node(),
            instance: self.config.instance,
            lineage: self.meta.superblock.replica.lineage,
            epoch: self.seen_epoch(),
        };
        self.send(cx, peer, Message::Hello(hello));
        self.tell_pause(cx, peer);
    }

    /// Forgets a link and all that depended on it.
    pub(crate) fn link_lost(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        if self.links.contains_key(&peer) {
            self.drop_session(cx, peer);
            if let Some(link) = self.links.remove(&peer) {
                self.forget_checks(link.number);
                if link.incoming.is_some() {
                    self.meta.bitmaps.forget_generations();
                }
            }
            self.barriers.retain(|barrier| barrier.reply.peer != peer);
            self.promotion_lost_link(cx, peer);
        }
    }

    pub(crate) fn close_link(&mut self, cx: &mut Cx<'_>, peer: NodeId, reason: String) {
        self.link_lost(cx, peer);
        cx.emit(Effect::CloseLink { peer, reason });
    }

    pub(crate) fn send(&mut self, cx: &mut Cx<'_>, peer: NodeId, message: Message) {
        cx.emit(Effect::Send { peer, message });
    }

    /// Tells the peer why, and ends the link.
    pub(crate) fn refuse(&mut self, cx: &mut Cx<'_>, peer: NodeId, refusal: Refusal) {
        let reason = format!("refused: {refusal}");
        self.send(cx, peer, Message::Refuse(refusal));
        self.close_link(cx, peer, reason);
    }

    pub(crate) fn protocol_error(&mut self, cx: &mut Cx<'_>, peer: NodeId, reason: &str) {
        let reason = reason.to_owned();
        self.refuse(cx, peer, Refusal::Protocol { reason });
    }

    pub(crate) fn message_arrived(&mut self, cx: &mut Cx<'_>, peer: NodeId, message: Message) {
        let Some(link) = self.links.get_mut(&peer) else {
            return;
        };
        link.heard = cx.now;
        link.owed = None;
        match message {
            // At once, not in order: they are about the link, not about data.
            Message::Ping => self.send(cx, peer, Message::Pong),
            Message::Pong => link.pinged = false,
            message => {
                link.answered = cx.now;
                link.inbox.push_back(message);
                if link.inbox.len() > INBOX_MAX {
                    self.protocol_error(cx, peer, "too many messages are under way");
                }
                self.drain_inbox(cx, peer);
            }
        }
    }

    fn drain_inbox(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        while let Some(link) = self.links.get_mut(&peer)
            && !link.blocked
            && self.failed.is_none()
            && let Some(message) = link.inbox.pop_front()
        {
            self.dispatch(cx, peer, message);
        }
    }

    /// Later messages of the link wait until [`Machine::unblock`].
    pub(crate) fn block(&mut self, peer: NodeId) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.blocked = true;
        }
    }

    pub(crate) fn unblock(&mut self, cx: &mut Cx<'_>, peer: NodeId) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.blocked = false;
        }
        self.drain_inbox(cx, peer);
    }

    fn dispatch(&mut self, cx: &mut Cx<'_>, peer: NodeId, message: Message) {
        let greeted = self
            .links
            .get(&peer)
            .is_some_and(|link| link.hello.is_some());
        if let Err(reason) = self.check(&message, greeted) {
            self.protocol_error(cx, peer, reason);
            return;
        }
        match message {
            Message::Hello(info) => self.hello(cx, peer, info),
            Message::StartSync { epoch } => self.start_sync(cx, peer, epoch),
            Message::Write {
                epoch,
                seq,
                complete,
                range,
                body,
                fua,
                dirty_for,
            } => {
                if self.check_reign(cx, peer, epoch) {
                    self.tail.complete(complete);
                    self.peer_write(cx, peer, epoch, seq, range, body, fua, dirty_for);
                }
            }
            Message::Flush { epoch, id } => self.peer_flush(cx, peer, epoch, id),
            Message::SyncWrite {
                epoch,
                id,
                range,
                body,
            } => self.peer_sync_write(cx, peer, epoch, id, range, body),
            Message::DirtyMap {
                epoch,
                slot,
                blocks,
            } => self.dirty_map(peer, epoch, slot, &blocks),
            Message::Barrier { epoch, id } => self.barrier(cx, peer, epoch, id),
            Message::Behind { epoch, id } => self.left_behind(cx, peer, epoch, id),
            Message::Following { epoch } => self.follows(cx, peer, epoch),
            Message::Generation {
                epoch,
                slot,
                confirmed,
            } => self.generation(cx, peer, epoch, slot, confirmed),
            Message::Receipts { epoch, wanted } => self.receipts(cx, peer, epoch, wanted),
            Message::Received { epoch, seq } => self.write_received(cx, peer, epoch, seq),
            Message::EpochUpdate { epoch, in_sync } => self.epoch_update(cx, peer, epoch, in_sync),
            Message::Complete { epoch, seq } => self.peer_complete(peer, epoch, seq),
            Message::Reconcile { epoch } => self.reconcile(cx, peer, epoch),
            Message::Uncertain {
                epoch,
                blocks,
                last,
            } => self.uncertain(peer, epoch, &blocks, last),
            Message::WriteAck { epoch, seq } => self.write_acked(cx, peer, epoch, seq),
            Message::FlushAck { id, .. } => self.flush_acked(cx, peer, id),
            Message::SyncAck { id, .. } => {
                self.sync_acked(cx, peer, id);
                self.push_acked(peer, id);
            }
            Message::BarrierAck { id, .. } => self.barrier_acked(cx, peer, id),
            Message::Tail {
                epoch,
                blocks,
                certain,
            } => self.tail_arrived(peer, epoch, blocks, certain),
            Message::Digests {
                epoch,
                id,
                first,
                digests,
            } => self.digests_arrived(cx, peer, epoch, id, (first, digests), Owner::DigestRead),
            Message::SyncDigests {
                epoch,
                id,
                first,
                digests,
            } => self.digests_arrived(cx, peer, epoch, id, (first, digests), Owner::CompareRead),
            Message::SyncDiffer { id, blocks, .. } => self.sync_compared(cx, peer, id, &blocks),
            Message::ReadBlocks { epoch, id, blocks } => {
                self.read_asked(cx, peer, epoch, id, blocks);
            }
            Message::Content {
                id, range, body, ..
            } => self.content_arrived(cx, peer, id, range, &body),
            Message::Differ { id, blocks, .. } => self.verify_answered(cx, peer, id, &blocks),
            Message::Verifying { epoch, active } => self.peer_verifies(peer, epoch, active),
            Message::PauseSync { paused } => self.peer_pauses(peer, paused),
            Message::Changes { blocks, consistent } => {
                self.peer_changes(peer, blocks, consistent);
            }
            Message::Refuse(refusal) => {
                self.heard_of_split(cx, peer, &refusal);
                self.close_link(cx, peer, format!("the peer ended it: {refusal}"));
            }
            Message::Moved => self.protocol_error(cx, peer, "a connection that moved within"),
            Message::Ping | Message::Pong => {}
        }
    }

    fn hello(&mut self, cx: &mut Cx<'_>, peer: NodeId, info: PeerInfo) {
        if info.node != peer {
            self.protocol_error(cx, peer, "the greeting names another node");
        } else if let Some(link) = self.links.get_mut(&peer) {
            link.hello = Some(info);
            self.tell_changes(cx, peer);
        }
    }

    /// What can be told wrong of a message by itself.
    fn check(&self, message: &Message, greeted: bool) -> Result<(), &'static str> {
        match message {
            Message::Hello(_) if greeted => Err("a second greeting"),
            Message::Hello(_) | Message::Refuse(_) => Ok(()),
            _ if !greeted => Err("the first message is no greeting"),
            Message::Write {
                range,
                body,
                dirty_for,
                ..
            } => {
                self.check_body(*range, body)?;
                (*dirty_for < 128)
                    .then_some(())
                    .ok_or("a slot out of range")
            }
            Message::SyncWrite { range, body, .. } | Message::Content { range, body, .. } => {
                self.check_body(*range, body)
            }
            Message::ReadBlocks { blocks, .. } => (self.is_inside(*blocks)
                && blocks.count <= PIECE_BLOCKS)
                .then_some(())
                .ok_or("a block outside the volume, or too many"),
            Message::DirtyMap { slot, blocks, .. } => {
                let known = slot.index() < relevo_types::ReplicaSlot::COUNT;
                let inside = blocks.iter().all(|run| self.is_inside(*run));
                (known && inside)
                    .then_some(())
                    .ok_or("a slot or block out of range")
            }
            Message::Generation { slot, .. } => (slot.index() < relevo_types::ReplicaSlot::COUNT)
                .then_some(())
                .ok_or("a slot out of range"),
            Message::Digests { first, digests, .. }
            | Message::SyncDigests { first, digests, .. } => self
                .is_inside(relevo_types::BlockRange::new(*first, digests.len() as u64))
                .then_some(())
                .ok_or("a block outside the volume"),
            Message::Uncertain { blocks, .. }
            | Message::Tail { blocks, .. }
            | Message::Differ { blocks, .. }
            | Message::SyncDiffer { blocks, .. } => blocks
                .iter()
                .all(|run| self.is_inside(*run))
                .then_some(())
                .ok_or("a block outside the volume"),
            Message::EpochUpdate { in_sync, .. } if *in_sync >= 128 => Err("a slot out of range"),
            _ => Ok(()),
        }
    }

    fn check_body(&self, range: ByteRange, body: &Body) -> Result<(), &'static str> {
        let whole = range.offset.is_multiple_of(BLOCK_SIZE) && range.len.is_multiple_of(BLOCK_SIZE);
        if !whole || range.checked_end().is_none() || !self.is_inside(range.blocks_covered()) {
            return Err("a range that is not whole blocks of the volume");
        }
        match body {
            Body::Data(data) if data.len() as u64 != range.len => {
                Err("as many bytes as the range is long were expected")
            }
            Body::Data(_) | Body::Zeroes => Ok(()),
        }
    }

    /// Pings quiet links and closes those that owe an answer for too long.
    pub(crate) fn settle_links(&mut self, cx: &mut Cx<'_>) {
        let stall_timeout = self.stall_timeout();
        let mut walk = Walk::default();
        while let Some(peer) = walk.next(&self.links) {
            let stalls = self.unanswered_since(peer);
            let Some(link) = self.links.get_mut(&peer) else {
                continue;
            };
            let owes = link.pinged || link.hello.is_none() || stalls.is_some();
            if owes {
                link.owed.get_or_insert(cx.now);
            } else {
                link.owed = None;
            }
            if link
                .owed
                .is_some_and(|since| cx.now >= since + self.config.link_timeout)
            {
                let silent_ms = cx.now.since(link.heard).as_millis();
                let reason = format!("the peer owes an answer and is silent for {silent_ms} ms");
                self.close_link(cx, peer, reason);
            } else if stalls.is_some_and(|since| cx.now >= since + stall_timeout) {
                let reason = "the peer is alive but does not answer a write: its disk hangs";
                self.close_link(cx, peer, reason.to_owned());
            } else if !link.pinged
                && link.hello.is_some()
                && cx.now >= link.heard + self.config.ping_interval
            {
                link.pinged = true;
                link.owed.get_or_insert(cx.now);
                self.send(cx, peer, Message::Ping);
            }
        }
    }

    /// Since when a peer owes the answer to something that needs its disk and gives none. A slow
    /// one that gives some gets on.
    fn unanswered_since(&self, peer: NodeId) -> Option<Time> {
        let slot = self.slot(peer)?;
        let link = self.links.get(&peer)?;
        let since = match &self.role {
            Role::Primary(primary) => {
                let session = link.session.as_ref()?;
                let resync = session.owes().then_some(session.began);
                resync
                    .or_else(|| primary.unanswered_since(mask(slot)))
                    .or_else(|| self.verify_owed_since(peer))
                    .or_else(|| self.heal_owed_since(peer))
            }
            Role::Promoting(promotion) => promotion.awaits(peer).then_some(promotion.began),
            Role::Secondary | Role::Yielding => None,
        };
        Some(since?.max(link.answered))
    }

    fn stall_timeout(&self) -> std::time::Duration {
        self.config.link_timeout * STALL_TIMEOUTS
    }

    /// When the next link needs a ping or is given up.
    pub(crate) fn links_deadline(&self) -> Time {
        let due = self.links.iter().flat_map(|(peer, link)| {
            let ping = (!link.pinged && link.hello.is_some())
                .then(|| link.heard + self.config.ping_interval);
            let give_up = link.owed.map(|since| since + self.config.link_timeout);
            let stalls = self.unanswered_since(*peer);
            let stalls = stalls.map(|since| since + self.stall_timeout());
            ping.into_iter().chain(give_up).chain(stalls)
        });
        due.min().unwrap_or(Time::NEVER)
    }
}
