//! What an engine tells about itself, and what it waits for, in words.

use std::collections::BTreeMap;

use relevo_types::{NodeId, Time};

use crate::{
    io::{DiskState, Effect, EngineStatus, PeerState, VolumeEvent},
    link::Part,
    machine::{Detach, Machine, Role, mask},
    ops::Cx,
    sync::Stage,
};

impl Machine {
    pub(crate) fn status(&self) -> EngineStatus {
        EngineStatus {
            open: self.serves(),
            disk: self.disk_state(),
            epoch: self.meta.durable_epoch(),
            certain: self.certain,
            in_flight: self.requests.len(),
            held: false,
            waiting: self.waiting(),
            peers: self.peer_states(),
            behind: self.behind(),
            sync_speeds: self.sync_speeds(),
            sync_same: self.sync_same(),
            sync_limit: self.rate.limit(),
            sync_after: self.sync_after(),
            splits: self.lineages.splits.clone(),
        }
    }

    /// Bytes a second of the resyncs that are under way from here.
    fn sync_speeds(&self) -> BTreeMap<NodeId, u64> {
        let links = self.links.iter();
        let sessions = links.filter_map(|(peer, link)| Some((*peer, link.session.as_ref()?)));
        let copying = sessions.filter(|(_, session)| session.stage == Stage::Copying);
        copying.map(|(peer, it)| (peer, it.speed)).collect()
    }

    /// Bytes that resyncs compared and did not send.
    fn sync_same(&self) -> BTreeMap<NodeId, u64> {
        let links = self.links.iter();
        let sessions = links.filter_map(|(peer, link)| Some((*peer, link.session.as_ref()?)));
        let same = sessions.map(|(peer, session)| (peer, session.comparing.same_bytes));
        same.filter(|(_, bytes)| *bytes > 0).collect()
    }

    fn disk_state(&self) -> DiskState {
        let member = self
            .volume
            .as_ref()
            .is_some_and(|volume| volume.in_sync.contains(&self.node()));
        if self.detach == Some(Detach::Done) {
            DiskState::Diskless
        } else if member {
            DiskState::UpToDate
        } else if self.meta.superblock.inconsistent || !self.certain {
            // After an unclean end too: later writes may be there without earlier ones.
            DiskState::Inconsistent
        } else if matches!(self.reigning(), Some((_, Part::Following | Part::Behind))) {
            DiskState::Consistent
        } else {
            DiskState::Outdated
        }
    }

    fn peer_states(&self) -> BTreeMap<NodeId, PeerState> {
        self.other_replicas()
            .map(|node| (node, self.peer_state(node)))
            .collect()
    }

    pub(crate) fn other_replicas(&self) -> impl Iterator<Item = NodeId> + '_ {
        let replicas = self.volume.iter().flat_map(|volume| volume.replicas.keys());
        replicas.copied().filter(|node| *node != self.node())
    }

    fn peer_state(&self, peer: NodeId) -> PeerState {
        if self.standalone.contains_key(&peer) || self.lineages.splits.contains_key(&peer) {
            return PeerState::StandAlone;
        }
        let Some(link) = self.links.get(&peer) else {
            return PeerState::Connecting;
        };
        if let Some(left) = self.verify_left(peer) {
            return PeerState::VerifyS { left };
        }
        match link.session.as_ref().map(|session| session.stage) {
            Some(Stage::InSync) => PeerState::Established,
            Some(Stage::Following) => PeerState::Following,
            Some(Stage::Ahead(_)) => PeerState::Ahead {
                dirty: self.dirty_count(peer),
            },
            Some(
                Stage::Starting
                | Stage::Copying
                | Stage::Barrier(_)
                | Stage::Joining
                | Stage::Settling(_),
            ) => {
                let dirty = self.dirty_count(peer);
                if self.is_sync_paused(peer) {
                    PeerState::PausedSyncS { dirty }
                } else {
                    PeerState::SyncSource { dirty }
                }
            }
            None => match self.reigning() {
                Some((primary, _)) if primary == peer && link.verifies => PeerState::VerifyT,
                Some((primary, Part::Member)) if primary == peer => PeerState::Established,
                Some((primary, Part::Following)) if primary == peer => PeerState::Following,
                Some((primary, Part::Behind)) if primary == peer => PeerState::Behind,
                Some((primary, Part::Target)) if primary == peer && self.is_sync_paused(peer) => {
                    PeerState::PausedSyncT
                }
                Some((primary, Part::Target)) if primary == peer => PeerState::SyncTarget,
                _ if link.hello.is_some() => PeerState::Connected,
                _ => PeerState::Connecting,
            },
        }
    }

    /// Blocks marked for a peer.
    pub(crate) fn dirty_count(&self, peer: NodeId) -> u64 {
        let slot = self.slot(peer);
        slot.map_or(0, |slot| self.meta.bitmaps.of(slot).count())
    }

    /// Tells what is new of the peers; progress of a resync is in the status only.
    pub(crate) fn tell_peer_states(&mut self, cx: &mut Cx<'_>) {
        let Some(volume) = self.volume.clone() else {
            return;
        };
        // After every input, so without making a list.
        for node in volume.replicas.keys().copied() {
            if node == self.node() {
                continue;
            }
            let state = self.peer_state(node);
            let told = self.told_peers.entry(node).or_default();
            if std::mem::discriminant(told) != std::mem::discriminant(&state) {
                *told = state;
                cx.emit(Effect::Event(VolumeEvent::Peer { node, state }));
            }
        }
    }

    /// What is waited for, for whom, since when.
    fn waiting(&self) -> Option<String> {
        let words = match &self.role {
            Role::Secondary => return None,
            Role::Yielding => vec![
                "another in-sync replica to take over: this one restarted uncleanly and may lack acknowledged writes".to_owned(),
            ],
            Role::Promoting(promotion) => {
                let missing = names(&promotion.missing());
                let mut words = Vec::new();
                if missing.is_empty() {
                    words.push("the replicas to agree on the last writes".to_owned());
                } else {
                    let mut wait = format!(
                        "in-sync replica {missing} to tell its last writes, since {:?}",
                        promotion.since
                    );
                    if !self.certain {
                        wait.push_str(&format!(
                            " (this replica restarted uncleanly and may lack some: it goes on alone if no answer comes within {} ms)",
                            self.patience().as_millis()
                        ));
                    }
                    words.push(wait);
                }
                words
            }
            Role::Primary(_) => self.primary_waiting(),
        };
        let words: Vec<String> = words.into_iter().chain(self.proposals.words()).collect();
        (!words.is_empty()).then(|| format!("waits for {}", words.join("; for ")))
    }

    fn primary_waiting(&self) -> Vec<String> {
        let mut words = Vec::new();
        let Some(primary) = self.primary() else {
            return words;
        };
        if let Some(volume) = &self.volume
            && primary.epoch < volume.epoch
        {
            words.push(format!("epoch {} to get durable here", volume.epoch));
        }
        let required = self.required();
        let oldest = primary
            .incomplete
            .first()
            .and_then(|(seq, ())| primary.writes.get(seq))
            .filter(|write| write.local_done);
        if let Some(write) = oldest {
            let who = self.nodes_of(required & !write.acked);
            words.push(format!(
                "replica {who} to have a write, since {:?}",
                write.since
            ));
        } else if let Some(flush) = primary.flushes.values().next() {
            words.push(format!("a flush everywhere, since {:?}", flush.since));
        }
        if self.is_congested() {
            words.push(
                "a replica of protocol A to take what is under way to it (`on-congestion`, `sndbuf-size`)"
                    .to_owned(),
            );
        }
        if self.suspended {
            words.push("an operator to resume I/O (`relevo resume-io`)".to_owned());
        }
        if self.requests.parked() > 0 {
            words.push(format!(
                "a valid lease, to answer {} reads (the last ended at {:?})",
                self.requests.parked(),
                self.lease_until
            ));
        }
        words
    }

    fn nodes_of(&self, slots: u8) -> String {
        let nodes: Vec<NodeId> = self
            .volume
            .iter()
            .flat_map(|volume| &volume.replicas)
            .filter(|(_, replica)| mask(replica.slot) & slots != 0)
            .map(|(node, _)| *node)
            .collect();
        names(&nodes)
    }

    /// When something is due by time alone.
    pub(crate) fn deadline(&self) -> Time {
        let promotion = match &self.role {
            Role::Promoting(promotion) if !promotion.patience_over => {
                promotion.since + self.patience()
            }
            _ => Time::NEVER,
        };
        let complete = self
            .primary()
            .and_then(|primary| primary.complete_due)
            .unwrap_or(Time::NEVER);
        let admitted = self.admitted.filter(|_| self.is_open());
        let admitted = admitted.map(|(_, until)| until);
        let fails = if self.requests.is_empty() {
            Time::NEVER
        } else {
            self.fails_from()
        };
        self.links_deadline()
            .min(fails)
            .min(admitted.unwrap_or(Time::NEVER))
            .min(self.saving_deadline())
            .min(self.generations_deadline())
            .min(self.verify_deadline())
            .min(self.speed_deadline())
            .min(self.rate.deadline())
            .min(self.proposals.deadline())
            .min(self.disk_deadline())
            .min(promotion)
            .min(complete)
    }
}

fn names(nodes: &[NodeId]) -> String {
    let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    names.join(", ")
}
