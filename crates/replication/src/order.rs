//! What an operator tells an engine: it is obeyed or refused with a reason, and answered once.

use relevo_types::{NodeId, VolumeId};

use crate::{attach::whole, io::Effect, machine::Machine, ops::Cx};

/// An order under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OrderId(pub u64);

/// What an operator tells an engine. It lasts until the engine ends, or the opposite is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// Take no further request to the disk; those that come wait.
    SuspendIo,
    /// End [`Self::SuspendIo`].
    ResumeIo,
    /// Have no link to a peer, or to any: `StandAlone`.
    Disconnect {
        /// The peer; `None`: all.
        peer: Option<NodeId>,
    },
    /// Let the resync to or from a peer, or any, stand still; writes go on being replicated.
    PauseSync {
        /// The peer; `None`: all.
        peer: Option<NodeId>,
    },
    /// End [`Self::PauseSync`] of this side.
    ResumeSync {
        /// The peer; `None`: all.
        peer: Option<NodeId>,
    },
    /// Let all resyncs of the volume to and from this node stand still while another volume's are under way
    /// here (`resync-after`), or no longer. The node says so, not an operator.
    HoldSync {
        /// The volume that comes first; `None`: none.
        after: Option<VolumeId>,
    },
    /// Take every block of this replica for wrong: it is copied anew from the primary.
    Invalidate,
    /// Compare a replica, or all that are in sync, with this one, which is primary. Ends with
    /// [`crate::VolumeEvent::Verified`] for each.
    Verify {
        /// The peer; `None`: all that are in sync.
        peer: Option<NodeId>,
        /// Copy what differs to it: it leaves the in-sync set until that is done.
        repair: bool,
    },
    /// End [`Self::Verify`] before its end.
    StopVerify {
        /// The peer; `None`: all.
        peer: Option<NodeId>,
    },
    /// End [`Self::Disconnect`].
    Connect {
        /// The peer; `None`: all.
        peer: Option<NodeId>,
    },
}

impl Machine {
    pub(crate) fn order_arrived(&mut self, cx: &mut Cx<'_>, id: OrderId, order: Order) {
        let result = self.obey(cx, order);
        cx.emit(Effect::OrderDone { id, result });
    }

    fn obey(&mut self, cx: &mut Cx<'_>, order: Order) -> Result<(), String> {
        match order {
            Order::SuspendIo => self.suspended = true,
            Order::ResumeIo => self.suspended = false,
            Order::Disconnect { peer } => {
                for peer in self.peers_named(peer)? {
                    let why = "an operator disconnected it";
                    self.stand_alone(cx, peer, why.to_owned());
                }
            }
            Order::PauseSync { peer } => {
                for peer in self.peers_named(peer)? {
                    self.pause_sync(cx, peer, true);
                }
            }
            Order::ResumeSync { peer } => {
                for peer in self.peers_named(peer)? {
                    self.pause_sync(cx, peer, false);
                }
            }
            Order::HoldSync { after } => self.hold_sync(cx, after),
            Order::Invalidate => return self.invalidate(cx),
            Order::Verify { peer, repair } => {
                let mut refused = None;
                let mut begun = false;
                for peer in self.peers_named(peer)? {
                    match self.start_verify(cx, peer, repair) {
                        Ok(()) => begun = true,
                        Err(why) => refused = Some(why),
                    }
                }
                if let Some(why) = refused.filter(|_| !begun) {
                    return Err(why);
                }
            }
            Order::StopVerify { peer } => {
                for peer in self.peers_named(peer)? {
                    self.stop_verify(cx, peer, "an operator stopped it");
                }
            }
            Order::Connect { peer } => {
                for peer in self.peers_named(peer)? {
                    self.standalone.remove(&peer);
                    self.lineages.splits.remove(&peer);
                }
            }
        }
        Ok(())
    }

    /// The uncertain map is what the primary asks for when it begins a resync, and that it begins with the
    /// next link: this replica then leaves the in-sync set like one that was lost.
    fn invalidate(&mut self, cx: &mut Cx<'_>) -> Result<(), String> {
        if !matches!(self.role, crate::machine::Role::Secondary) {
            return Err("this node is primary: the data is what the others are copied from; make another node primary first".to_owned());
        }
        let volume = self.volume.as_ref();
        let source = volume.and_then(|volume| {
            let others = volume.in_sync.iter().any(|node| *node != self.node());
            volume.primary.filter(|_| others)
        });
        if source.is_none() {
            return Err("no other node is primary that it could be copied from".to_owned());
        }
        let all = whole(self.meta.layout());
        let own = self.meta.own_slot();
        self.meta.bitmaps.set(own, all);
        self.meta.want_bitmaps();
        for peer in self.links.keys().copied().collect::<Vec<_>>() {
            self.close_link(cx, peer, "an operator invalidated this replica".to_owned());
        }
        Ok(())
    }

    /// The peers that an order is about.
    fn peers_named(&self, peer: Option<NodeId>) -> Result<Vec<NodeId>, String> {
        match peer {
            None => Ok(self.other_replicas().collect()),
            Some(peer) if self.other_replicas().any(|other| other == peer) => Ok(vec![peer]),
            Some(peer) => Err(format!("{peer} has no other replica of the volume")),
        }
    }

    /// Ends the link to a peer and has none until told otherwise.
    pub(crate) fn stand_alone(&mut self, cx: &mut Cx<'_>, peer: NodeId, why: String) {
        self.standalone.insert(peer, why.clone());
        if self.links.contains_key(&peer) {
            self.refuse(cx, peer, relevo_wire::Refusal::StandAlone { reason: why });
        }
    }
}
