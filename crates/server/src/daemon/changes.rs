//! What changed about a replica, for `relevo events`: the state before, the state after, and why.

use std::collections::BTreeMap;

use relevo_replication::{DiskState, EngineStatus, PeerState, VolumeEvent};
use relevo_types::NodeId;

use crate::{
    api::{EventLevel, StateChange},
    status::peer_state,
};

/// What was told last.
#[derive(Debug)]
pub(super) struct Told {
    role: &'static str,
    disk: DiskState,
    peers: BTreeMap<NodeId, &'static str>,
    /// Why the links ended that are not told yet.
    lost: BTreeMap<NodeId, String>,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            role: SECONDARY,
            disk: DiskState::Attaching,
            peers: BTreeMap::new(),
            lost: BTreeMap::new(),
        }
    }
}

const PRIMARY: &str = "Primary";
const SECONDARY: &str = "Secondary";

impl Told {
    /// A link ended.
    pub(super) fn link_lost(&mut self, peer: NodeId, reason: String) {
        self.lost.insert(peer, reason);
    }

    /// What is new with an event, if there is one, and the status after it.
    pub(super) fn changes(
        &mut self,
        event: Option<&VolumeEvent>,
        status: &EngineStatus,
        name: impl Fn(NodeId) -> String,
    ) -> Vec<(EventLevel, StateChange)> {
        let mut changes = Vec::new();
        if let Some(VolumeEvent::Peer { node, state }) = event {
            changes.extend(self.peer(*node, *state, &name));
        }
        let role = if status.open { PRIMARY } else { SECONDARY };
        if role != self.role {
            let reason = match event {
                Some(VolumeEvent::Opened { epoch }) => Some(format!(
                    "the control log names this node at {epoch}, and the replicas agree on the last writes"
                )),
                Some(VolumeEvent::Closed { reason } | VolumeEvent::DiskFailed { reason }) => {
                    Some(reason.clone())
                }
                _ => None,
            };
            changes.push((
                EventLevel::Info,
                change("role", None, self.role, role, reason),
            ));
            self.role = role;
        }
        if status.disk != self.disk {
            let (level, reason) = match (event, status.disk) {
                // The alarm was given with the event itself.
                (Some(VolumeEvent::DiskFailed { reason }), _) => {
                    (EventLevel::Info, Some(reason.clone()))
                }
                (_, DiskState::Failed) => (EventLevel::Alarm, status.waiting.clone()),
                (_, DiskState::UpToDate) => (
                    EventLevel::Info,
                    Some("it is in the in-sync set".to_owned()),
                ),
                (_, DiskState::Outdated | DiskState::Consistent) => (
                    EventLevel::Warning,
                    Some("it is outside the in-sync set".to_owned()),
                ),
                (_, DiskState::Inconsistent) => (
                    EventLevel::Warning,
                    Some("a resync began: until its end it is a mix of old and new".to_owned()),
                ),
                (_, DiskState::Attaching | DiskState::Diskless) => (EventLevel::Info, None),
            };
            let (old, new) = (format!("{:?}", self.disk), format!("{:?}", status.disk));
            changes.push((level, change("disk", None, &old, &new, reason)));
            self.disk = status.disk;
        }
        changes
    }

    fn peer(
        &mut self,
        node: NodeId,
        state: PeerState,
        name: impl Fn(NodeId) -> String,
    ) -> Option<(EventLevel, StateChange)> {
        let new = peer_state(state);
        let old = self.peers.insert(node, new).unwrap_or("Connecting");
        let reason = self.lost.remove(&node);
        let linked = !matches!(state, PeerState::Connecting | PeerState::StandAlone);
        let reason = reason.filter(|_| !linked);
        (old != new).then(|| {
            let change = change("replication", Some(name(node)), old, new, reason);
            (EventLevel::Info, change)
        })
    }
}

fn change(
    what: &str,
    peer: Option<String>,
    old: &str,
    new: &str,
    reason: Option<String>,
) -> StateChange {
    StateChange {
        what: what.to_owned(),
        peer,
        old: old.to_owned(),
        new: new.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::Epoch;

    use super::*;
    use crate::daemon::volume_worker::no_status;

    const B: NodeId = NodeId(2);

    fn name(node: NodeId) -> String {
        node.to_string()
    }

    #[test]
    fn each_change_is_told_once_with_both_states_and_the_reason() {
        let mut told = Told::default();
        let mut status = no_status();
        assert_eq!(told.changes(None, &status, name), []);

        status.disk = DiskState::UpToDate;
        status.open = true;
        let opened = VolumeEvent::Opened { epoch: Epoch(3) };
        let changes = told.changes(Some(&opened), &status, name);
        let words: Vec<_> = changes
            .iter()
            .map(|(_, it)| (it.what.as_str(), it.old.as_str(), it.new.as_str()))
            .collect();
        assert_eq!(
            words,
            [
                ("role", "Secondary", "Primary"),
                ("disk", "Attaching", "UpToDate")
            ]
        );
        assert_eq!(told.changes(None, &status, name), []);

        let state = PeerState::Established;
        let up = VolumeEvent::Peer { node: B, state };
        let changes = told.changes(Some(&up), &status, name);
        assert_eq!(changes[0].1.reason, None);
        told.link_lost(B, "the cable was cut".to_owned());
        let down = VolumeEvent::Peer {
            node: B,
            state: PeerState::Connecting,
        };
        let changes = told.changes(Some(&down), &status, name);
        let (_, lost) = &changes[0];
        assert_eq!(
            (lost.old.as_str(), lost.new.as_str()),
            ("Established", "Connecting")
        );
        assert_eq!(lost.peer.as_deref(), Some("n2"));
        assert_eq!(lost.reason.as_deref(), Some("the cable was cut"));
    }
}
