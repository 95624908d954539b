//! The network between the data nodes: connections that keep order or break.
//!
//! Owned by the cluster. A connection between two nodes has two sides, which learn of its beginning
//! and end at different times. A cut direction holds what is sent until it heals; a connection
//! that breaks loses what is under way. Rules at the engine's border: messages of one link arrive in
//! order; `LinkUp` replaces an older link; after `CloseLink` there is no `LinkDown`.

use std::collections::{BTreeMap, VecDeque};

use relevo_types::Time;
use relevo_wire::Message;

use crate::rng::Rng;

/// A node by position.
pub type Index = usize;

/// What a cable carries. Replication may have its own; then one can be cut without the other, and a
/// node that everybody takes for dead still writes to its peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plane {
    /// Replication.
    Data,
    /// Heartbeats and the control log.
    Control,
}

impl Plane {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Data, Self::Control];
}

/// A connection between two nodes; never the same number again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ConnId(pub u64);

/// What one side knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    /// Not told yet.
    Pending,
    Up,
    Closed,
}

#[derive(Debug)]
enum Parcel {
    Message(Message),
    /// The sender closed; nothing follows.
    Fin,
}

#[derive(Debug)]
struct Conn {
    ends: [Index; 2],
    sides: [Side; 2],
    /// By the side that sends.
    sent: [VecDeque<(Time, Parcel)>; 2],
    broken: bool,
}

/// What a side gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The connection is up; if it replaces another one, that is gone.
    Up,
    /// A message.
    Message(Box<Message>),
    /// The connection is gone.
    Down,
}

/// Who gets what from whom.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Who gets it.
    pub to: Index,
    /// From whom.
    pub from: Index,
    /// What, in order.
    pub arrivals: Vec<Arrival>,
}

/// The network.
#[derive(Debug)]
pub struct Network {
    nodes: usize,
    /// By plane: `open[from * nodes + to]`.
    open: [Vec<bool>; 2],
    conns: BTreeMap<ConnId, Conn>,
    /// The connection that a node uses towards another one.
    current: BTreeMap<(Index, Index), ConnId>,
    last: u64,
    /// Messages under way, all connections.
    pub under_way: usize,
}

/// Something to look at later: the head of what `side` sends on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The connection.
    pub conn: ConnId,
    /// 0 or 1: who sends.
    pub side: usize,
}

impl Network {
    /// A network without any trouble or connection.
    #[must_use]
    pub fn new(nodes: usize) -> Self {
        Self {
            nodes,
            open: [vec![true; nodes * nodes], vec![true; nodes * nodes]],
            conns: BTreeMap::new(),
            current: BTreeMap::new(),
            last: 0,
            under_way: 0,
        }
    }

    /// Whether what `from` sends on a plane reaches `to`.
    #[must_use]
    pub fn is_open(&self, plane: Plane, from: Index, to: Index) -> bool {
        from == to || self.open[plane as usize][from * self.nodes + to]
    }

    /// Opens or cuts a direction of a plane. Call [`Self::heads`] after opening.
    pub fn set_open(&mut self, plane: Plane, from: Index, to: Index, open: bool) {
        self.open[plane as usize][from * self.nodes + to] = open;
    }

    /// Every queue that has something in it: to be looked at again after a heal.
    #[must_use]
    pub fn heads(&self) -> Vec<Head> {
        let mut heads = Vec::new();
        for (conn, entry) in &self.conns {
            for side in 0..2 {
                if !entry.sent[side].is_empty() {
                    heads.push(Head { conn: *conn, side });
                }
            }
        }
        heads
    }

    /// Whether two nodes need a connection.
    #[must_use]
    pub fn wants_connection(&self, a: Index, b: Index) -> bool {
        let usable = |conn: &ConnId| {
            self.conns.get(conn).is_some_and(|conn| {
                !conn.broken && conn.sides.iter().all(|side| *side != Side::Closed)
            })
        };
        match (self.current.get(&(a, b)), self.current.get(&(b, a))) {
            (Some(one), Some(other)) => one != other || !usable(one),
            _ => !self.conns.iter().any(|(id, conn)| {
                conn.ends == [a.min(b), a.max(b)]
                    && usable(id)
                    && conn.sides.contains(&Side::Pending)
            }),
        }
    }

    /// Makes a connection; the sides are told by [`Self::tell_up`].
    pub fn connect(&mut self, a: Index, b: Index) -> ConnId {
        self.last += 1;
        let id = ConnId(self.last);
        self.conns.insert(
            id,
            Conn {
                ends: [a.min(b), a.max(b)],
                sides: [Side::Pending; 2],
                sent: [VecDeque::new(), VecDeque::new()],
                broken: false,
            },
        );
        id
    }

    /// Tells a side that its connection is up. Gives the node and its peer, if there is news.
    pub fn tell_up(&mut self, id: ConnId, side: usize) -> Option<(Index, Index)> {
        let conn = self.conns.get_mut(&id)?;
        if conn.sides[side] != Side::Pending || conn.broken {
            return None;
        }
        conn.sides[side] = Side::Up;
        let (node, peer) = (conn.ends[side], conn.ends[1 - side]);
        if let Some(old) = self.current.insert((node, peer), id) {
            self.close_side(old, node);
        }
        Some((node, peer))
    }

    /// Sends a message; gives the queue to look at if it was empty and when.
    pub fn send(
        &mut self,
        from: Index,
        to: Index,
        message: Message,
        due: Time,
    ) -> Option<(Head, Time)> {
        let id = *self.current.get(&(from, to))?;
        self.push(id, from, Parcel::Message(message), due)
    }

    /// Closes a node's side of its connection to a peer, after what it sent.
    pub fn close(&mut self, node: Index, peer: Index, due: Time) -> Option<(Head, Time)> {
        let id = self.current.remove(&(node, peer))?;
        let head = self.push(id, node, Parcel::Fin, due);
        self.close_side(id, node);
        head
    }

    /// The process or machine of a node is gone; `speaks`: its kernel closes its connections. Of what
    /// it sent, a part is lost. Gives queues to look at.
    pub fn node_gone(
        &mut self,
        node: Index,
        speaks: bool,
        due: Time,
        rng: &mut Rng,
    ) -> Vec<(Head, Time)> {
        let mut heads = Vec::new();
        let ids: Vec<ConnId> = self
            .conns
            .iter()
            .filter(|(_, conn)| conn.ends.contains(&node))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(conn) = self.conns.get_mut(&id) else {
                continue;
            };
            let side = usize::from(conn.ends[1] == node);
            if conn.sides[side] == Side::Closed {
                continue;
            }
            if rng.chance(60.0) {
                let keep = rng.index(conn.sent[side].len() + 1);
                self.under_way -= conn.sent[side].len() - keep;
                conn.sent[side].truncate(keep);
            }
            if speaks {
                heads.extend(self.push(id, node, Parcel::Fin, due));
            }
            self.close_side(id, node);
        }
        self.current.retain(|(from, _), _| *from != node);
        heads
    }

    /// Breaks the connection of two nodes: what is under way is lost from some point on, new sends
    /// vanish. The sides are told by [`Self::tell_down`].
    pub fn break_link(&mut self, a: Index, b: Index, rng: &mut Rng) -> Option<ConnId> {
        let id = *self
            .current
            .get(&(a, b))
            .or_else(|| self.current.get(&(b, a)))?;
        let conn = self.conns.get_mut(&id)?;
        conn.broken = true;
        for sent in &mut conn.sent {
            let keep = rng.index(sent.len() + 1);
            self.under_way -= sent.len() - keep;
            sent.truncate(keep);
        }
        Some(id)
    }

    /// Tells a side that its connection is gone. Gives the node and its peer, if there is news.
    pub fn tell_down(&mut self, id: ConnId, side: usize) -> Option<(Index, Index)> {
        let conn = self.conns.get(&id)?;
        let (node, peer, was) = (conn.ends[side], conn.ends[1 - side], conn.sides[side]);
        self.close_side(id, node);
        if was != Side::Up {
            return None;
        }
        if self.current.get(&(node, peer)) == Some(&id) {
            self.current.remove(&(node, peer));
        }
        Some((node, peer))
    }

    /// Looks at the head of a queue: gives who gets it, from whom and what, and when to look again.
    pub fn arrive(&mut self, head: Head, now: Time) -> (Option<Delivery>, Option<Time>) {
        let Some(conn) = self.conns.get_mut(&head.conn) else {
            return (None, None);
        };
        let (from, to) = (conn.ends[head.side], conn.ends[1 - head.side]);
        if from != to && !self.open[Plane::Data as usize][from * self.nodes + to] {
            return (None, None);
        }
        match conn.sent[head.side].front() {
            None => return (None, None),
            Some((due, _)) if *due > now => return (None, Some(*due)),
            Some(_) => {}
        }
        let parcel = conn.sent[head.side].pop_front();
        self.under_way -= 1;
        let next = conn.sent[head.side].front().map(|(due, _)| (*due).max(now));
        let side = conn.sides[1 - head.side];
        let mut arrivals = Vec::new();
        match (parcel, side) {
            (Some((_, Parcel::Message(message))), Side::Pending | Side::Up) => {
                if side == Side::Pending && self.tell_up(head.conn, 1 - head.side).is_some() {
                    arrivals.push(Arrival::Up);
                }
                arrivals.push(Arrival::Message(Box::new(message)));
            }
            (Some((_, Parcel::Fin)), _) => {
                if self.tell_down(head.conn, 1 - head.side).is_some() {
                    arrivals.push(Arrival::Down);
                }
            }
            (_, Side::Closed) | (None, _) => {}
        }
        let delivery = Delivery { to, from, arrivals };
        (Some(delivery), next)
    }

    /// Whether a node has a connection to a peer.
    #[must_use]
    pub fn is_linked(&self, node: Index, peer: Index) -> bool {
        self.current.contains_key(&(node, peer))
    }

    fn push(&mut self, id: ConnId, from: Index, parcel: Parcel, due: Time) -> Option<(Head, Time)> {
        let conn = self.conns.get_mut(&id)?;
        let side = usize::from(conn.ends[1] == from);
        if conn.broken || conn.sides[1 - side] == Side::Closed {
            return None;
        }
        let queue = &mut conn.sent[side];
        let due = queue.back().map_or(due, |(last, _)| (*last).max(due));
        queue.push_back((due, parcel));
        self.under_way += 1;
        (queue.len() == 1).then_some((Head { conn: id, side }, due))
    }

    fn close_side(&mut self, id: ConnId, node: Index) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let side = usize::from(conn.ends[1] == node);
        conn.sides[side] = Side::Closed;
        // What was on its way to it is for nobody.
        self.under_way -= conn.sent[1 - side].len();
        conn.sent[1 - side].clear();
        let done = conn.sides.iter().all(|side| *side == Side::Closed);
        if done {
            self.under_way -= conn.sent[side].len();
            self.conns.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(arrivals: Vec<Arrival>) -> Delivery {
        Delivery {
            to: 1,
            from: 0,
            arrivals,
        }
    }

    fn up(net: &mut Network) -> ConnId {
        let id = net.connect(0, 1);
        assert_eq!(net.tell_up(id, 0), Some((0, 1)));
        assert_eq!(net.tell_up(id, 1), Some((1, 0)));
        assert!(!net.wants_connection(0, 1));
        id
    }

    #[test]
    fn messages_arrive_in_order_and_a_cut_holds_them() {
        let mut net = Network::new(2);
        up(&mut net);
        let (head, due) = net.send(0, 1, Message::Ping, Time(10)).unwrap();
        assert_eq!(due, Time(10));
        assert!(
            net.send(0, 1, Message::Pong, Time(5)).is_none(),
            "queued behind"
        );
        assert_eq!(net.arrive(head, Time(9)).1, Some(Time(10)));
        net.set_open(Plane::Data, 0, 1, false);
        assert_eq!(net.arrive(head, Time(10)), (None, None));
        net.set_open(Plane::Data, 0, 1, true);
        assert_eq!(net.heads(), [head]);
        let (got, next) = net.arrive(head, Time(20));
        assert_eq!(
            got,
            Some(delivery(vec![Arrival::Message(Box::new(Message::Ping))]))
        );
        assert_eq!(next, Some(Time(20)));
    }

    #[test]
    fn a_side_that_closes_says_so_after_what_it_sent() {
        let mut net = Network::new(2);
        up(&mut net);
        let (head, _) = net.send(0, 1, Message::Ping, Time(1)).unwrap();
        assert!(net.close(0, 1, Time(1)).is_none(), "queued behind the ping");
        assert!(net.wants_connection(0, 1));
        assert!(net.arrive(head, Time(1)).0.is_some());
        assert_eq!(
            net.arrive(head, Time(1)).0,
            Some(delivery(vec![Arrival::Down]))
        );
        assert_eq!(net.under_way, 0);
    }

    #[test]
    fn a_new_connection_replaces_the_old_without_a_word() {
        let mut net = Network::new(2);
        up(&mut net);
        assert!(
            net.node_gone(0, false, Time(1), &mut Rng::new(1, 1))
                .is_empty()
        );
        assert!(net.is_linked(1, 0));
        assert!(net.wants_connection(0, 1));
        let id = net.connect(0, 1);
        assert_eq!(net.tell_up(id, 1), Some((1, 0)));
        assert_eq!(net.tell_up(id, 0), Some((0, 1)));
    }
}
