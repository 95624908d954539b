//! What a replica does: with a configuration, with a lost link, and what it goes on to by itself
//! afterwards. With a message: `receive`.

use crate::{
    bugs::Bug,
    state::{Generation, Member, Message, NOBODY, Node, Peer, Role, Stage, State, block_of, pair},
    steps::Protocol,
};

pub(crate) const fn bit(number: usize) -> u8 {
    1 << number
}

pub(crate) fn narrow(number: usize) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

impl Protocol {
    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// All nodes but one.
    pub(crate) fn others(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        (0..self.nodes).filter(move |other| *other != node)
    }

    const fn everyone(&self) -> u8 {
        bit(self.nodes) - 1
    }

    pub(crate) fn send(s: &mut State, from: usize, to: usize, message: Message) {
        if s.linked(from, to) {
            s.queues[from][to].push(message);
        }
    }

    /// A link ends: what is under way on it is gone, and both ends notice.
    pub(crate) fn break_link(&self, s: &mut State, a: usize, b: usize) {
        if !s.linked(a, b) {
            return;
        }
        s.links &= !pair(a, b);
        s.queues[a][b].clear();
        s.queues[b][a].clear();
        for (node, peer) in [(a, b), (b, a)] {
            self.drop_session(s, node, peer);
            let n = &mut s.nodes[node];
            if n.peers[peer].reign != 0 {
                n.forget_generations();
            }
            n.peers[peer] = Peer {
                pending_join: n.peers[peer].pending_join,
                ..Peer::default()
            };
            if matches!(n.role, Role::Gathering | Role::Pushing)
                && s.known(node).in_sync & bit(peer) != 0
            {
                self.begin_promotion(s, node);
            }
        }
        self.settle(s, a);
        self.settle(s, b);
    }

    fn drop_session(&self, s: &mut State, node: usize, peer: usize) {
        let n = &mut s.nodes[node];
        n.peers[peer].stage = Stage::None;
        n.peers[peer].busy = 0;
        n.peers[peer].generation = Generation::default();
        for id in 1..=s.issued {
            let at = usize::from(id) - 1;
            if n.unacked[at] & bit(peer) != 0 {
                n.unacked[at] &= !bit(peer);
                if !self.has(Bug::LostLinkNotMarked) {
                    self.mark(n, peer, bit(block_of(id, self.blocks)));
                }
            }
        }
    }

    fn fold_tail(&self, n: &mut Node, own: usize) {
        n.dirty[own] |= self.tail_blocks(n);
        n.tail = 0;
    }

    fn tail_blocks(&self, n: &Node) -> u8 {
        let ids = (1..=3_u8).filter(|id| n.tail & bit(usize::from(*id) - 1) != 0);
        ids.fold(0, |blocks, id| blocks | bit(block_of(id, self.blocks)))
    }

    /// The end of a reign, or of a promotion.
    pub(crate) fn close(&self, s: &mut State, node: usize) {
        if s.nodes[node].role == Role::Primary {
            for peer in self.others(node) {
                let n = &mut s.nodes[node];
                for id in 1..=s.issued {
                    let at = usize::from(id) - 1;
                    let block = bit(block_of(id, self.blocks));
                    if n.unacked[at] & bit(peer) != 0 {
                        n.dirty[peer] |= block;
                    }
                    if n.open & bit(at) != 0 {
                        n.dirty[node] |= block;
                    }
                }
            }
        }
        let n = &mut s.nodes[node];
        if n.role != Role::Secondary {
            n.role = Role::Secondary;
            n.end_reign();
        }
    }

    pub(crate) fn begin_promotion(&self, s: &mut State, node: usize) {
        let n = &mut s.nodes[node];
        n.forget_generations();
        self.fold_tail(n, node);
        n.end_reign();
        for peer in &mut n.peers {
            peer.reign = 0;
            peer.reconciles = false;
        }
        n.role = Role::Gathering;
    }

    /// The next configuration of the log is heard of.
    pub(crate) fn learn(&self, s: &mut State, node: usize) {
        let before = s.known(node);
        s.nodes[node].known += 1;
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        let named = usize::from(config.primary) == node && epoch >= s.nodes[node].seen;
        let member = config.in_sync & bit(node) != 0;
        if !named {
            s.nodes[node].demoting = false;
            self.close(s, node);
        }
        let n = &mut s.nodes[node];
        if n.attached < epoch {
            n.attached = 0;
        }
        if named || before.primary != config.primary {
            n.seen = n.seen.max(epoch);
        }
        if named {
            let alone = config.in_sync == bit(node);
            match n.role {
                Role::Primary if member => self.new_epoch(s, node),
                _ if !member => {
                    self.close(s, node);
                    s.nodes[node].role = Role::Yielding;
                }
                Role::Yielding if !alone => {}
                _ => self.begin_promotion(s, node),
            }
        }
        self.settle(s, node);
    }

    /// An open primary acts under a new configuration.
    fn new_epoch(&self, s: &mut State, node: usize) {
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        for peer in self.others(node) {
            let p = &mut s.nodes[node].peers[peer];
            if p.pending_join < epoch {
                p.pending_join = 0;
            }
            if p.stage == Stage::None {
                continue;
            }
            match (p.stage, config.in_sync & bit(peer) != 0) {
                (Stage::Joining | Stage::InSync, true) => p.stage = Stage::InSync,
                (_, true) | (Stage::InSync, false) => {
                    self.drop_session(s, node, peer);
                    continue;
                }
                (_, false) => {}
            }
            let in_sync = config.in_sync;
            Self::send(s, node, peer, Message::EpochUpdate { epoch, in_sync });
        }
    }

    /// What goes on by itself after anything happened to a node.
    pub(crate) fn settle(&self, s: &mut State, node: usize) {
        if !s.nodes[node].up {
            return;
        }
        match s.nodes[node].role {
            Role::Secondary => {}
            Role::Yielding => self.propose(s, node),
            Role::Gathering | Role::Pushing => self.settle_promotion(s, node),
            Role::Primary => self.settle_primary(s, node),
        }
    }

    fn settle_primary(&self, s: &mut State, node: usize) {
        self.complete_writes(s, node);
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        for peer in self.others(node) {
            let n = &s.nodes[node];
            let p = n.peers[peer];
            if s.linked(node, peer)
                && p.stage == Stage::None
                && p.pending_join == 0
                && config.in_sync & bit(peer) == 0
                && !n.demoting
            {
                let p = &mut s.nodes[node].peers[peer];
                (p.stage, p.began, p.busy) = (Stage::Starting, epoch, 0);
                Self::send(s, node, peer, Message::StartSync { epoch });
            }
            self.copy(s, node, peer);
        }
        self.complete_writes(s, node);
        self.propose(s, node);
    }

    fn copy(&self, s: &mut State, node: usize, peer: usize) {
        if s.nodes[node].peers[peer].stage != Stage::Copying {
            return;
        }
        let epoch = s.nodes[node].known;
        let session = s.nodes[node].peers[peer].began;
        for block in 0..self.blocks {
            let n = &mut s.nodes[node];
            let due = n.dirty[peer] & !n.peers[peer].busy & bit(block) != 0;
            if due && self.gate_is_free(n, block) {
                n.peers[peer].busy |= bit(block);
                if self.has(Bug::ClearOnSend) {
                    n.dirty[peer] &= !bit(block);
                    n.peers[peer].busy &= !bit(block);
                }
                let content = n.content[block];
                let block = narrow(block);
                Self::send(
                    s,
                    node,
                    peer,
                    Message::SyncWrite {
                        epoch,
                        session,
                        block,
                        content,
                    },
                );
            }
        }
        let n = &s.nodes[node];
        if n.dirty[peer] != 0 || n.peers[peer].busy != 0 {
            return;
        }
        if self.has(Bug::JoinWithoutBarrier) {
            s.nodes[node].peers[peer].stage = Stage::Joining;
            return;
        }
        s.nodes[node].peers[peer].stage = if self.follower == Some(peer) {
            Stage::Settling
        } else {
            Stage::Barrier
        };
        for other in self.others(node).filter(|other| *other != peer) {
            let n = &s.nodes[node];
            let mut blocks = n.dirty[other];
            for id in 1..=s.issued {
                if n.unacked[usize::from(id) - 1] & bit(other) != 0 {
                    blocks |= bit(block_of(id, self.blocks));
                }
            }
            if blocks != 0 && !self.has(Bug::NoDirtyMap) {
                let slot = narrow(other);
                Self::send(
                    s,
                    node,
                    peer,
                    Message::DirtyMap {
                        epoch,
                        slot,
                        blocks,
                    },
                );
            }
        }
        Self::send(s, node, peer, Message::Barrier { epoch, session });
    }

    /// Whether no write to a block is under way that is not complete.
    pub(crate) fn gate_is_free(&self, n: &Node, block: usize) -> bool {
        (1..=3_u8)
            .all(|id| n.open & bit(usize::from(id) - 1) == 0 || block_of(id, self.blocks) != block)
    }

    /// Who must acknowledge a write.
    fn required(&self, s: &State, node: usize) -> u8 {
        let config = s.known(node);
        let mut required = 0;
        for peer in self.others(node) {
            let p = s.nodes[node].peers[peer];
            let member = config.in_sync & bit(peer) != 0
                && (p.stage != Stage::None || !self.has(Bug::AckBeforeLeave));
            let joins = matches!(p.stage, Stage::Barrier | Stage::Joining | Stage::InSync);
            if member || joins || p.pending_join != 0 {
                required |= bit(peer);
            }
        }
        required
    }

    fn complete_writes(&self, s: &mut State, node: usize) {
        let required = self.required(s, node);
        for id in 1..=s.issued {
            let at = usize::from(id) - 1;
            let n = &mut s.nodes[node];
            if n.open & bit(at) != 0 && required & !n.acked[at] == 0 {
                n.open &= !bit(at);
                s.acknowledged |= bit(at);
                self.promise(s, node, block_of(id, self.blocks), id);
            }
        }
        let n = &mut s.nodes[node];
        for at in 0..usize::from(s.issued) {
            if n.open & bit(at) == 0 && n.unacked[at] == 0 {
                n.acked[at] = 0;
            }
        }
    }

    /// Somebody was told, or shown, that a block holds a write.
    pub(crate) fn promise(&self, s: &mut State, node: usize, block: usize, id: u8) {
        let lineage = usize::from(s.nodes[node].lineage);
        if s.position(id) > s.position(s.promised[lineage][block]) {
            s.promised[lineage][block] = id;
        }
    }

    /// Issues the next write.
    pub(crate) fn write(&self, s: &mut State, node: usize) {
        s.issued += 1;
        let id = s.issued;
        let at = usize::from(id) - 1;
        let block = block_of(id, self.blocks);
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        s.epoch_of[at] = epoch;
        s.writer_of[at] = narrow(node);
        let n = &mut s.nodes[node];
        let takes = |peer: &usize| !matches!(n.peers[*peer].stage, Stage::None | Stage::Starting);
        let sent = self
            .others(node)
            .filter(takes)
            .fold(0, |all, peer| all | bit(peer));
        let others = self.everyone() & !bit(node);
        for peer in self.others(node) {
            if others & !sent & bit(peer) != 0 {
                n.dirty[peer] |= bit(block);
            }
        }
        let mut dirty_for = others & !(sent & config.in_sync);
        if self.has(Bug::NoDirtyFor) {
            dirty_for = 0;
        }
        let complete = n.complete(id);
        n.wrote = true;
        n.hot |= bit(block);
        n.content[block] = id;
        (n.open, n.unacked[at], n.acked[at]) = (n.open | bit(at), sent, 0);
        for peer in self.others(node).filter(|peer| sent & bit(*peer) != 0) {
            let dirty_for = dirty_for & !bit(peer);
            Self::send(
                s,
                node,
                peer,
                Message::Write {
                    epoch,
                    id,
                    complete,
                    dirty_for,
                },
            );
        }
        self.settle(s, node);
    }

    fn propose(&self, s: &mut State, node: usize) {
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        if usize::from(config.primary) != node {
            return;
        }
        let n = &s.nodes[node];
        let (mut leave, mut join, mut demote) = (None, None, false);
        match n.role {
            Role::Yielding if config.in_sync & bit(node) == 0 => demote = true,
            Role::Yielding if config.in_sync != bit(node) => leave = Some(bit(node)),
            Role::Gathering | Role::Pushing if n.demoting => demote = true,
            Role::Gathering | Role::Pushing if self.needs_fresh_epoch(n) => leave = Some(0),
            Role::Gathering | Role::Pushing => {
                let uncertain = self
                    .others(node)
                    .filter(|peer| n.peers[*peer].member == Member::Uncertain)
                    .fold(0, |all, peer| all | bit(peer));
                leave = (uncertain != 0).then_some(uncertain);
            }
            Role::Primary => {
                let leavers = self.others(node).filter(|peer| {
                    let p = n.peers[*peer];
                    let member = config.in_sync & bit(*peer) != 0;
                    member && p.stage != Stage::InSync
                        || p.pending_join != 0 && p.stage == Stage::None
                });
                let leavers = leavers.fold(0, |all, peer| all | bit(peer));
                if leavers != 0 {
                    leave = Some(leavers);
                } else if n.demoting && n.open == 0 {
                    demote = true;
                } else if !n.demoting {
                    join = self
                        .others(node)
                        .find(|peer| n.peers[*peer].stage == Stage::Joining);
                }
            }
            _ => {}
        }
        // One that only tends makes nobody leave.
        if config.tends && leave.is_some_and(|nodes| nodes != 0) {
            (leave, demote) = (None, true);
        }
        if let Some(peer) = join {
            s.nodes[node].peers[peer].pending_join = epoch;
        }
        let log = &mut s.logs[usize::from(s.nodes[node].lineage)];
        if log.epoch == epoch {
            log.leaves |= leave.map_or(0, |set| 1 << set);
            log.joins |= join.map_or(0, bit);
            log.demote |= demote;
        }
    }

    pub(crate) fn needs_fresh_epoch(&self, n: &Node) -> bool {
        n.known <= n.attached && !self.has(Bug::NoFreshEpoch)
    }

    fn settle_promotion(&self, s: &mut State, node: usize) {
        if self.needs_fresh_epoch(&s.nodes[node]) || s.nodes[node].demoting {
            return self.propose(s, node);
        }
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        let members: Vec<usize> = self
            .others(node)
            .filter(|peer| config.in_sync & bit(*peer) != 0)
            .collect();
        for peer in &members {
            if s.nodes[node].peers[*peer].member == Member::Absent && s.linked(node, *peer) {
                s.nodes[node].peers[*peer].member = Member::Asked;
                Self::send(s, node, *peer, Message::Reconcile { epoch });
            }
        }
        let n = &mut s.nodes[node];
        let knows = |peer: &usize| n.peers[*peer].member == Member::Answered;
        if n.role == Role::Gathering {
            if !n.certain && members.iter().any(knows) && !self.has(Bug::UncertainOpens) {
                n.role = Role::Yielding;
                n.end_reign();
                return self.propose(s, node);
            }
            if !members.iter().all(knows) {
                return self.propose(s, node);
            }
            n.role = Role::Pushing;
            n.gathered |= n.dirty[node];
            let pushed = if self.has(Bug::OpenBeforeReconcile) {
                0
            } else {
                n.gathered
            };
            for peer in &members {
                s.nodes[node].peers[*peer].busy = pushed;
                for block in (0..self.blocks).filter(|block| pushed & bit(*block) != 0) {
                    let content = s.nodes[node].content[block];
                    let (session, block) = (epoch, narrow(block));
                    Self::send(
                        s,
                        node,
                        *peer,
                        Message::SyncWrite {
                            epoch,
                            session,
                            block,
                            content,
                        },
                    );
                }
            }
        }
        let n = &mut s.nodes[node];
        if members.iter().all(|peer| n.peers[*peer].busy == 0) {
            self.open(s, node);
        }
    }

    fn open(&self, s: &mut State, node: usize) {
        let (epoch, config) = (s.nodes[node].known, s.known(node));
        let own = s.nodes[node].dirty[node];
        let n = &mut s.nodes[node];
        n.end_reign();
        for peer in 0..self.nodes {
            if config.in_sync & bit(peer) != 0 {
                n.dirty[peer] = 0;
            } else {
                n.dirty[peer] |= own;
            }
        }
        n.certain = true;
        n.role = Role::Primary;
        for peer in self.others(node) {
            if config.in_sync & bit(peer) != 0 && s.linked(node, peer) {
                let p = &mut s.nodes[node].peers[peer];
                (p.stage, p.began) = (Stage::InSync, epoch);
                let in_sync = config.in_sync;
                Self::send(s, node, peer, Message::EpochUpdate { epoch, in_sync });
            }
        }
        self.settle(s, node);
    }

    /// Whether data of a reign is taken; else the link ends.
    pub(crate) fn check_reign(&self, s: &State, node: usize, peer: usize, epoch: u8) -> bool {
        let n = &s.nodes[node];
        self.has(Bug::IgnoreLowerEpoch) || epoch >= n.seen && n.peers[peer].reign == epoch
    }

    pub(crate) fn accept_reign(&self, s: &mut State, node: usize, peer: usize, epoch: u8) -> bool {
        let other = s.nodes[node].known == epoch && usize::from(s.known(node).primary) != peer;
        if epoch < s.nodes[node].seen || other {
            return false;
        }
        self.close(s, node);
        let n = &mut s.nodes[node];
        n.forget_generations();
        n.seen = epoch;
        n.peers[peer].reign = epoch;
        n.peers[peer].reconciles = false;
        self.fold_tail(n, node);
        true
    }

    /// Whether a primary would begin a generation of marks for the follower at a peer, and that would
    /// change something. When it does is a matter of time only.
    pub(crate) fn generation_is_due(&self, s: &State, node: usize, peer: usize) -> bool {
        let n = &s.nodes[node];
        let Some(follower) = self.follower.filter(|it| *it != peer && *it != node) else {
            return false;
        };
        let follows = n.peers[follower].stage == Stage::Following && n.dirty[follower] == 0;
        if n.role != Role::Primary || !follows || n.peers[peer].stage != Stage::InSync {
            return false;
        }
        // One is under way: two at once are as one.
        let begins = |message: &Message| matches!(message, Message::Generation { .. });
        if s.queues[node][peer].iter().any(begins) {
            return false;
        }
        let last = s.issued;
        let known = n.peers[peer].generation;
        let acknowledged = (1..=known.at)
            .all(|id| n.unacked[usize::from(id) - 1] & bit(follower) == 0)
            || self.has(Bug::GenerationDroppedEarly);
        !known.begun || (known.older || known.at != last) && acknowledged
    }

    pub(crate) fn begin_generation(&self, s: &mut State, node: usize, peer: usize) {
        let (epoch, last) = (s.nodes[node].known, s.issued);
        let known = s.nodes[node].peers[peer].generation;
        s.nodes[node].peers[peer].generation = Generation {
            begun: true,
            at: last,
            older: !known.begun || known.at < last,
        };
        let confirmed = known.begun;
        Self::send(s, node, peer, Message::Generation { epoch, confirmed });
    }

    /// Marks blocks for the replica of a slot.
    pub(crate) fn mark(&self, n: &mut Node, slot: usize, blocks: u8) {
        n.dirty[slot] |= blocks;
        if n.generation && self.follower == Some(slot) {
            n.newest |= blocks;
        }
    }

    pub(crate) fn epoch_update(
        &self,
        s: &mut State,
        node: usize,
        peer: usize,
        epoch: u8,
        in_sync: u8,
    ) -> bool {
        let everyone = self.everyone();
        let n = &mut s.nodes[node];
        if epoch < n.seen {
            return true;
        }
        if n.peers[peer].reign == 0 {
            return false;
        }
        if epoch < n.peers[peer].reign {
            return true;
        }
        n.peers[peer].reign = epoch;
        n.seen = epoch;
        let member = in_sync & bit(node) != 0;
        let tail = if self.has(Bug::TailNotMarked) {
            0
        } else {
            self.tail_blocks(n)
        };
        let lacking = tail | if member { n.dirty[node] } else { 0 };
        for slot in self.others(node) {
            if everyone & !in_sync & bit(slot) != 0 {
                self.mark(n, slot, lacking);
            }
        }
        for slot in 0..self.nodes {
            if in_sync & bit(slot) != 0 {
                n.dirty[slot] = 0;
            }
        }
        if member {
            n.certain = true;
            n.peers[peer].reconciles = false;
        }
        true
    }
}

impl Node {
    fn forget_generations(&mut self) {
        (self.generation, self.newest) = (false, 0);
    }

    /// Below `next`, which is not issued yet: the write at or below which all of a reign are complete.
    pub(crate) fn complete(&self, next: u8) -> u8 {
        let open = (1..next).find(|id| self.open & bit(usize::from(*id) - 1) != 0);
        open.unwrap_or(next) - 1
    }

    /// Forgets what only a primary, or one that becomes it, has.
    pub(crate) fn end_reign(&mut self) {
        self.gathered = 0;
        self.open = 0;
        self.unacked = [0; 3];
        self.acked = [0; 3];
        for peer in &mut self.peers {
            (peer.stage, peer.began, peer.busy) = (Stage::None, 0, 0);
            (peer.member, peer.pending_join) = (Member::Absent, 0);
            peer.generation = Generation::default();
        }
    }

    /// What the process knew is gone. What its activity log names may differ from all others.
    pub(crate) fn crash(&mut self, power: bool) {
        if power {
            self.content = self.flushed;
        }
        for dirty in &mut self.dirty {
            *dirty |= self.hot;
        }
        *self = Self {
            content: self.content,
            flushed: self.flushed,
            hot: self.hot,
            dirty: self.dirty,
            seen: self.seen,
            known: self.known,
            attached: self.seen,
            lineage: self.lineage,
            wrote: self.wrote,
            ..Self::default()
        };
    }
}

/// Whether a configuration has a primary.
#[must_use]
pub(crate) const fn has_primary(primary: u8) -> bool {
    primary != NOBODY
}
