//! The engine and the control log: what a committed configuration means, and what the engine
//! proposes.
//!
//! At any time there is at most one thing to propose, found from the state alone, and it is
//! proposed again until the state no longer asks for it. All proposals expect the epoch in force,
//! so of several only one is ever committed.

use std::{sync::Arc, time::Duration};

use relevo_types::{
    BlockRange, Epoch, NodeId, Time,
    cluster::{Volume, VolumeChange},
};
use relevo_wire::Message;

use crate::{
    io::Effect,
    lab::PlantedBug,
    link::Walk,
    machine::{Machine, Role, mask},
    ops::Cx,
    primary::Demotion,
    secondary::After,
    sync::Stage,
};

/// A proposal that nothing came of is made again after this time.
pub(crate) const PROPOSE_AGAIN: Duration = Duration::from_millis(100);

/// The proposal under way.
#[derive(Debug, Default)]
pub(crate) struct Proposals {
    current: Option<Proposal>,
}

#[derive(Debug, PartialEq, Eq)]
struct Proposal {
    expect: Epoch,
    change: VolumeChange,
    again: Time,
}

impl Proposals {
    /// Proposes what is wanted now, unless that was done a moment ago.
    pub(crate) fn settle(&mut self, cx: &mut Cx<'_>, wanted: Option<(Epoch, VolumeChange)>) {
        let Some((expect, change)) = wanted else {
            self.current = None;
            return;
        };
        let same = self.current.as_ref().is_some_and(|current| {
            current.expect == expect && current.change == change && cx.now < current.again
        });
        if !same {
            cx.emit(Effect::Propose {
                expect,
                change: change.clone(),
            });
            self.current = Some(Proposal {
                expect,
                change,
                again: cx.now + PROPOSE_AGAIN,
            });
        }
    }

    pub(crate) fn deadline(&self) -> Time {
        self.current
            .as_ref()
            .map_or(Time::NEVER, |current| current.again)
    }

    /// What is being proposed, in words.
    pub(crate) fn words(&self) -> Option<String> {
        let current = self.current.as_ref()?;
        let what = match &current.change {
            VolumeChange::Leave { nodes } if nodes.is_empty() => "a new epoch".to_owned(),
            VolumeChange::Leave { nodes } => {
                let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
                format!("that {} leaves the in-sync set", names.join(", "))
            }
            VolumeChange::Join { node } => format!("that {node} joins the in-sync set"),
            VolumeChange::Demote { node } => format!("that {node} steps down"),
            VolumeChange::Promote { node } | VolumeChange::PromoteUncertain { node } => {
                format!("that {node} becomes primary")
            }
            VolumeChange::Tend { node } => format!("that {node} brings the others up to date"),
            VolumeChange::Differs { node, .. } => {
                format!("what verification found of the replica of {node}")
            }
            VolumeChange::GiveWay { to, .. } => {
                format!("that what {to} has is kept, and this node's history gives way")
            }
            VolumeChange::Force { node, .. } => format!("that {node} is forced"),
            VolumeChange::KeepInForce => "that the others give way".to_owned(),
        };
        Some(format!("the control log to commit {what}"))
    }
}

/// What a replica with an unusable disk, or one that must not serve, proposes to hand over.
pub(crate) fn hand_over(volume: &Volume, me: NodeId) -> Option<(Epoch, VolumeChange)> {
    if volume.primary != Some(me) {
        return None;
    }
    let change = if !volume.in_sync.contains(&me) {
        VolumeChange::Demote { node: me }
    } else if volume.in_sync.len() > 1 {
        VolumeChange::Leave { nodes: vec![me] }
    } else {
        // The last in-sync replica: nobody could take over.
        return None;
    };
    Some((volume.epoch, change))
}

impl Machine {
    /// A committed configuration arrived.
    pub(crate) fn config_arrived(&mut self, cx: &mut Cx<'_>, volume: Arc<Volume>) {
        if volume.id != self.config.volume {
            return;
        }
        let known = self.volume.as_ref();
        if known.is_some_and(|known| volume.version <= known.version) {
            return;
        }
        self.lineages.splits.clear();
        if known.is_some_and(|known| volume.epoch == known.epoch) {
            // Only what the administrator chose, or a replica that is not in the set.
            self.take_config(cx, volume);
            return;
        }
        self.forget_removed_peers(cx, &volume);
        let known = self.volume.as_ref();
        let new_reign = known.is_none_or(|known| known.primary != volume.primary);
        let me = self.node();
        // One that names this node is over if a later primary was heard of in band.
        let named = volume.primary == Some(me) && volume.epoch >= self.seen_epoch();
        let member = volume.in_sync.contains(&me);
        let (epoch, alone) = (volume.epoch, volume.in_sync.len() == 1);
        self.take_config(cx, volume);
        if !named {
            self.stepping_down = false;
            self.close(cx, "the control log names another primary, or none");
        }
        if self.detach.is_some() {
            return;
        }
        self.begin_lineage(cx);
        // A change of the in-sync set alone must not make a secondary refuse what the primary
        // sent before it knew.
        if new_reign || named {
            self.saw_epoch(epoch);
        }
        if !named {
            return;
        }
        match &self.role {
            Role::Primary(_) if member => {
                let ticket = self.meta.want_superblock();
                self.afters.push((ticket, After::Config(epoch)));
            }
            _ if !member => {
                self.close(cx, "this replica is not in the in-sync set");
                self.role = Role::Yielding;
            }
            Role::Yielding if !alone => {}
            Role::Promoting(promotion) => {
                let since = promotion.since;
                self.begin_promotion(cx, since);
            }
            Role::Secondary | Role::Primary(_) | Role::Yielding => {
                self.begin_promotion(cx, cx.now);
            }
        }
    }

    fn take_config(&mut self, cx: &Cx<'_>, volume: Arc<Volume>) {
        let before = self.volume.as_ref().map(|_| self.other_slots());
        self.volume = Some(volume);
        self.learn_protocols(cx);
        let others = self.other_slots();
        self.use_slots(others);
        // A new replica lacks everything and says so itself; what is under way was routed without it.
        let added = before.map_or(0, |before| others & !before);
        let under_way: Vec<BlockRange> = match self.primary() {
            Some(primary) if added != 0 => primary.writes.values().map(|it| it.blocks).collect(),
            _ => Vec::new(),
        };
        for blocks in under_way {
            self.mark_dirty(added, blocks);
        }
    }

    /// Peers whose replica was removed, or made anew under another slot. While the old slot is known: it
    /// may be another replica's next.
    fn forget_removed_peers(&mut self, cx: &mut Cx<'_>, volume: &Volume) {
        let removed: Vec<NodeId> = self
            .links
            .keys()
            .copied()
            .filter(|peer| {
                let known = self.slot(*peer);
                known.is_some() && volume.slot(*peer) != known
            })
            .collect();
        for peer in removed {
            self.close_link(cx, peer, "its replica was removed".to_owned());
        }
        let known = self.volume.clone();
        let slot = |peer| known.as_ref().and_then(|known| known.slot(peer));
        self.forget_found(|peer| volume.slot(peer) == slot(peer));
        self.standalone
            .retain(|peer, _| volume.replicas.contains_key(peer));
        self.forget_pauses(|peer| volume.replicas.contains_key(peer));
        self.told_peers
            .retain(|peer, _| volume.replicas.contains_key(peer));
    }

    /// The epoch of a configuration is durable: an open primary acts under it from now on.
    pub(crate) fn config_durable(&mut self, cx: &mut Cx<'_>, epoch: Epoch) {
        let Some(volume) = self.volume.clone() else {
            return;
        };
        let Some(primary) = self.primary_mut() else {
            return;
        };
        if volume.epoch != epoch || epoch <= primary.epoch {
            return;
        }
        primary.epoch = epoch;
        primary.in_sync.clone_from(&volume.in_sync);
        primary.pending_joins.retain(|_, expect| *expect >= epoch);
        let members = volume.in_sync.iter().filter_map(|node| volume.slot(*node));
        let in_sync = members.fold(0, |all, slot| all | mask(slot));
        let mut walk = Walk::default();
        while let Some((peer, _)) = self.next_session(&mut walk) {
            let Some(session) = self
                .links
                .get_mut(&peer)
                .and_then(|link| link.session.as_mut())
            else {
                continue;
            };
            match (session.stage, volume.in_sync.contains(&peer)) {
                (Stage::Joining | Stage::InSync, true) => session.stage = Stage::InSync,
                (_, true) | (Stage::InSync, false) => {
                    // Not by this primary's doing, or it is of protocol A now. It starts over.
                    self.drop_session(cx, peer);
                    continue;
                }
                (_, false) => {}
            }
            // Before anything under the new epoch, and before the complete position passes what
            // waited for those who left.
            self.send(cx, peer, Message::EpochUpdate { epoch, in_sync });
        }
        self.generations_soon(cx);
        self.update_all(cx);
        self.serve(cx, &volume);
    }

    pub(crate) fn settle_proposals(&mut self, cx: &mut Cx<'_>) {
        let wanted = self.wanted_proposal();
        if let Some((expect, VolumeChange::Join { node })) = &wanted
            && let Some(primary) = self.primary_mut()
        {
            primary.pending_joins.insert(*node, *expect);
        }
        if let Some((_, VolumeChange::GiveWay { .. })) = &wanted {
            self.proposed_to_give_way();
        }
        self.proposals.settle(cx, wanted);
    }

    fn wanted_proposal(&self) -> Option<(Epoch, VolumeChange)> {
        let volume = self.volume.as_deref()?;
        if volume.primary != Some(self.node()) || self.detach.is_some() {
            return None;
        }
        let change = match &self.role {
            Role::Secondary => None,
            Role::Yielding => hand_over(volume, self.node()).map(|(_, change)| change),
            Role::Promoting(_) if self.stepping_down => {
                Some(VolumeChange::Demote { node: self.node() })
            }
            Role::Promoting(_) if self.needs_fresh_epoch() => {
                Some(VolumeChange::Leave { nodes: Vec::new() })
            }
            Role::Promoting(promotion) => leave(self.promotion_leavers(promotion)),
            Role::Primary(primary) if primary.epoch < volume.epoch => None,
            Role::Primary(primary) => leave(self.leavers())
                .or_else(|| self.differs_to_commit())
                .or_else(|| {
                    (primary.demotion == Demotion::Proposing)
                        .then(|| VolumeChange::Demote { node: self.node() })
                })
                .or_else(|| self.gives_way_to())
                .or_else(|| self.joiner().map(|node| VolumeChange::Join { node })),
        };
        let change = change?;
        let change = if volume.tends && self.bereaves(&change) {
            VolumeChange::Demote { node: self.node() }
        } else {
            change
        };
        Some((volume.epoch, change))
    }

    /// Whether a change would take members from the set that were not meant to go. One that only tends the
    /// volume gives the role back instead: nobody waits for what it does, and who leaves can't serve.
    fn bereaves(&self, change: &VolumeChange) -> bool {
        match change {
            VolumeChange::Leave { nodes } => nodes
                .iter()
                .any(|node| self.may_join(*node) && !self.is_leaving(*node)),
            _ => false,
        }
    }

    /// Who must leave the in-sync set: members without an in-sync session, whose replica shall go, or of
    /// protocol A,
    /// and peers without a session that a pending join might still make members.
    fn leavers(&self) -> Vec<NodeId> {
        let Some(primary) = self.primary() else {
            return Vec::new();
        };
        let stage = |node: &NodeId| Some(self.links.get(node)?.session.as_ref()?.stage);
        let stays = |node: &NodeId| {
            let wanted = self.may_join(*node) && !self.is_leaving(*node);
            stage(node) == Some(Stage::InSync) && wanted
        };
        let members = primary
            .in_sync
            .iter()
            .filter(|node| **node != self.node() && !stays(node));
        let joiners = primary
            .pending_joins
            .keys()
            .filter(|node| stage(node).is_none());
        members.chain(joiners).copied().collect()
    }

    /// Whether a peer's replica shall go.
    pub(crate) fn is_leaving(&self, peer: NodeId) -> bool {
        let volume = self.volume.as_ref();
        volume.is_some_and(|volume| volume.replicas.get(&peer).is_some_and(|it| it.leaving))
    }

    fn joiner(&self) -> Option<NodeId> {
        if self.stepping_down {
            return None;
        }
        self.links
            .iter()
            .filter(|(peer, _)| !self.is_leaving(**peer))
            .find(|(_, link)| {
                link.session.as_ref().is_some_and(|session| {
                    session.stage == Stage::Joining
                        || session.stage == Stage::Following
                            && self.lab.has(PlantedBug::AsyncCountsAsInSync)
                })
            })
            .map(|(peer, _)| *peer)
    }
}

fn leave(nodes: Vec<NodeId>) -> Option<VolumeChange> {
    (!nodes.is_empty()).then_some(VolumeChange::Leave { nodes })
}
