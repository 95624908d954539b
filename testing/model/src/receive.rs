//! What a replica does with a message.

use crate::{
    bugs::Bug,
    node::bit,
    state::{Member, Message, Role, Stage, State, block_of},
    steps::Protocol,
};

impl Protocol {
    /// The next message of a link.
    pub(crate) fn receive(&self, s: &mut State, node: usize, peer: usize) {
        let message = s.queues[peer][node].remove(0);
        if !self.dispatch(s, node, peer, message) {
            return self.break_link(s, node, peer);
        }
        self.settle(s, node);
    }

    /// False: refused, and the link ends.
    fn dispatch(&self, s: &mut State, node: usize, peer: usize, message: Message) -> bool {
        match message {
            Message::Nothing => {}
            Message::StartSync { epoch } => {
                if !self.accept_reign(s, node, peer, epoch) {
                    return false;
                }
                let blocks = s.nodes[node].dirty[node];
                Self::send(s, node, peer, Message::Uncertain { epoch, blocks });
            }
            Message::Reconcile { epoch } => {
                if !self.accept_reign(s, node, peer, epoch) {
                    return false;
                }
                let n = &mut s.nodes[node];
                n.peers[peer].reconciles = true;
                let certain = n.certain;
                let blocks = if certain { n.dirty[node] } else { 0 };
                Self::send(
                    s,
                    node,
                    peer,
                    Message::Tail {
                        epoch,
                        blocks,
                        certain,
                    },
                );
            }
            Message::Write {
                epoch,
                id,
                complete,
                dirty_for,
            } => {
                if !self.check_reign(s, node, peer, epoch) {
                    return false;
                }
                let block = block_of(id, self.blocks);
                let n = &mut s.nodes[node];
                n.tail &= !(bit(usize::from(complete)) - 1);
                for slot in (0..self.nodes).filter(|slot| dirty_for & bit(*slot) != 0) {
                    self.mark(n, slot, bit(block));
                }
                n.tail |= bit(usize::from(id) - 1);
                n.content[block] = id;
                n.hot |= bit(block);
                Self::send(s, node, peer, Message::WriteAck { epoch, id });
            }
            Message::SyncWrite {
                epoch,
                session,
                block,
                content,
            } => {
                if !self.check_reign(s, node, peer, epoch) {
                    return false;
                }
                let n = &mut s.nodes[node];
                let at = usize::from(block);
                if n.peers[peer].reconciles && !self.has(Bug::PushNotRemembered) {
                    n.dirty[node] |= bit(at);
                }
                // What a resync brings is what every member has.
                if !n.peers[peer].reconciles && epoch >= n.seen {
                    n.dirty[node] &= !bit(at);
                }
                n.content[at] = content;
                n.hot |= bit(at);
                Self::send(s, node, peer, Message::SyncAck { session, block });
            }
            Message::Barrier { epoch, session } => {
                if !self.check_reign(s, node, peer, epoch) {
                    return false;
                }
                let n = &mut s.nodes[node];
                n.flushed = n.content;
                Self::send(s, node, peer, Message::BarrierAck { session });
            }
            Message::DirtyMap {
                epoch,
                slot,
                blocks,
            } => {
                let n = &mut s.nodes[node];
                if n.peers[peer].reign == epoch && epoch >= n.seen {
                    self.mark(n, usize::from(slot), blocks);
                }
            }
            Message::EpochUpdate { epoch, in_sync } => {
                return self.epoch_update(s, node, peer, epoch, in_sync);
            }
            Message::Complete { epoch, id } => {
                let n = &mut s.nodes[node];
                if n.peers[peer].reign == epoch && epoch >= n.seen {
                    n.tail &= !(bit(usize::from(id)) - 1);
                }
            }
            Message::Uncertain { epoch, blocks } => {
                let n = &mut s.nodes[node];
                let p = &mut n.peers[peer];
                if n.role == Role::Primary && p.stage == Stage::Starting && p.began == epoch {
                    p.stage = Stage::Copying;
                    n.dirty[peer] |= blocks;
                }
            }
            Message::WriteAck { epoch, id } => {
                let at = usize::from(id) - 1;
                let n = &mut s.nodes[node];
                let mine = n.role == Role::Primary && s.epoch_of[at] == epoch;
                if mine && n.unacked[at] & bit(peer) != 0 {
                    n.unacked[at] &= !bit(peer);
                    n.acked[at] |= bit(peer);
                    n.dirty[peer] &= !bit(block_of(id, self.blocks));
                }
            }
            Message::SyncAck { session, block } => {
                let n = &mut s.nodes[node];
                let block = bit(usize::from(block));
                let copies = n.role == Role::Primary && n.peers[peer].began == session;
                let pushes = n.role == Role::Pushing && n.known == session;
                if (copies || pushes) && n.peers[peer].busy & block != 0 {
                    n.peers[peer].busy &= !block;
                    if copies {
                        n.dirty[peer] &= !block;
                    }
                }
            }
            Message::BarrierAck { session } => {
                let p = &mut s.nodes[node].peers[peer];
                if p.stage == Stage::Barrier && p.began == session {
                    p.stage = Stage::Joining;
                } else if p.stage == Stage::Settling && p.began == session {
                    p.stage = Stage::Following;
                    let epoch = s.nodes[node].known;
                    Self::send(s, node, peer, Message::Following { epoch });
                }
            }
            Message::Following { epoch } => {
                if !self.check_reign(s, node, peer, epoch) {
                    return false;
                }
                s.nodes[node].certain = true;
            }
            Message::Generation { epoch, confirmed } => {
                if !self.check_reign(s, node, peer, epoch) {
                    return false;
                }
                let n = &mut s.nodes[node];
                if confirmed
                    && n.generation
                    && let Some(follower) = self.follower
                {
                    n.dirty[follower] &= n.newest;
                }
                (n.generation, n.newest) = (true, 0);
            }
            Message::Tail {
                epoch,
                blocks,
                certain,
            } => {
                let n = &mut s.nodes[node];
                let p = &mut n.peers[peer];
                if n.role == Role::Gathering && n.known == epoch && p.member == Member::Asked {
                    p.member = if certain {
                        Member::Answered
                    } else {
                        Member::Uncertain
                    };
                    n.gathered |= blocks;
                }
            }
        }
        true
    }
}
