//! Replicas of a volume that is in use: added, removed, moved.

use super::Applied;
use crate::{
    Epoch, NodeId, ReplicaSlot, VolumeId,
    cluster::{ClusterState, Outcome, Rejection, Replica, ReplicaSpec, ReplicaStanding, Volume},
};

impl ClusterState {
    /// The epoch stays: the new replica is outside the in-sync set until its resync ends, and until
    /// then it says itself that every block of it is uncertain.
    pub(super) fn add_replica(
        &mut self,
        id: VolumeId,
        spec: &ReplicaSpec,
        replaces: Option<NodeId>,
    ) -> Applied {
        self.data_node(spec.node)?;
        let volume = self.volume_mut(id)?;
        if !volume.is_created() {
            return Err(Rejection::NotCreated);
        }
        let bad = |why: String| Err(Rejection::BadReplicas { why });
        if volume.replicas.contains_key(&spec.node) {
            return bad(format!(
                "node {} has a replica of volume `{}` already; a node holds one",
                spec.node, volume.name
            ));
        }
        if let Some(node) = replaces.filter(|node| !volume.replicas.contains_key(node)) {
            return Err(Rejection::NoReplica { node });
        }
        let Some(slot) = volume.free_slot() else {
            return bad(format!(
                "volume `{}` has {} replicas, the most there can be; remove one first",
                volume.name,
                volume.replicas.len()
            ));
        };
        let replica = Replica {
            spec: spec.clone(),
            slot,
            standing: ReplicaStanding::Creating,
            joined: Epoch(0),
            replaces,
            leaving: false,
            gives_way: false,
            differs: None,
        };
        volume.replicas.insert(spec.node, replica);
        volume.version += 1;
        Ok(Outcome::Done)
    }

    /// Outside the in-sync set it goes at once, with a new epoch: that ends a join that is under way.
    pub(super) fn remove_replica(&mut self, id: VolumeId, node: NodeId) -> Applied {
        let volume = self.volume_mut(id)?;
        if !volume.is_created() {
            return Err(Rejection::NotCreated);
        }
        let serving = volume.serving();
        let Some(replica) = volume.replicas.get_mut(&node) else {
            return Err(Rejection::NoReplica { node });
        };
        if serving == Some(node) {
            return Err(Rejection::ReplicaOfPrimary { node });
        }
        if volume.in_sync.iter().all(|member| *member == node) {
            return Err(Rejection::OnlyGoodReplica { node });
        }
        replica.leaving = true;
        if volume.primary == Some(node) {
            // It only tends: another one may, and let it leave.
            volume.resign();
            volume.epoch = volume.epoch.next();
        }
        if !volume.in_sync.contains(&node) {
            volume.drop_leavers();
            volume.epoch = volume.epoch.next();
        }
        volume.version += 1;
        Ok(Outcome::Epoch(volume.epoch))
    }
}

impl Volume {
    /// The primary's reign is over.
    pub(super) fn resign(&mut self) {
        self.primary = None;
        self.tends = false;
    }

    /// Whether a replica can become primary, as far as the state knows.
    pub(super) fn check_vacant(&self, node: NodeId) -> Result<(), Rejection> {
        if let Some(primary) = self.serving() {
            return Err(Rejection::HasPrimary { primary });
        }
        if !self.in_sync.contains(&node) {
            return Err(Rejection::NotInSync { node });
        }
        Ok(())
    }

    /// Begins its search elsewhere each time, so that a slot that was just given up, of which messages
    /// may be on their way, usually rests for a while.
    fn free_slot(&self) -> Option<ReplicaSlot> {
        let taken = |slot: &ReplicaSlot| self.replicas.values().any(|other| other.slot == *slot);
        let count = ReplicaSlot::COUNT as u64;
        let slots = (0..count).map(|at| u8::try_from((self.version + at) % count));
        slots.flatten().map(ReplicaSlot).find(|slot| !taken(slot))
    }

    /// Replicas that shall go, are outside the in-sync set and not primary go; those whose successor is
    /// in sync begin to.
    pub(super) fn drop_leavers(&mut self) {
        let replaced: Vec<NodeId> = self
            .replicas
            .values()
            .filter(|successor| self.in_sync.contains(&successor.spec.node))
            .filter_map(|successor| successor.replaces)
            .collect();
        for node in replaced {
            if let Some(replica) = self.replicas.get_mut(&node) {
                replica.leaving = true;
            }
        }
        let (in_sync, primary) = (&self.in_sync, self.primary);
        self.replicas.retain(|node, replica| {
            !replica.leaving || in_sync.contains(node) || primary == Some(*node)
        });
        let left: Vec<NodeId> = self.replicas.keys().copied().collect();
        for replica in self.replicas.values_mut() {
            replica.replaces = replica.replaces.filter(|node| left.contains(node));
        }
        self.forget_differences();
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Epoch, NodeId, ReplicaSlot,
        cluster::{
            ClusterState, Command, Rejection, VolumeChange,
            tests::{A, B, V, replica, with_three_data_nodes},
        },
    };

    fn change(state: &mut ClusterState, change: VolumeChange) {
        let expect = state.volumes[&V].epoch;
        let command = Command::Volume {
            volume: V,
            expect,
            change,
        };
        state.apply(&command).unwrap();
    }

    fn add(node: NodeId, replaces: Option<NodeId>) -> Command {
        Command::AddReplica {
            volume: V,
            replica: replica(node),
            replaces,
        }
    }

    const D: NodeId = NodeId(4);

    #[test]
    fn a_replica_is_added_outside_the_set_and_joins() {
        let mut state = with_three_data_nodes(D);
        let before = state.volumes[&V].clone();
        state.apply(&add(D, None)).unwrap();
        let volume = &state.volumes[&V];
        let slot = volume.slot(D).unwrap();
        assert!(slot.0 > 1 && slot < ReplicaSlot(7), "{slot}");
        assert_eq!(
            (volume.epoch, &volume.in_sync),
            (before.epoch, &before.in_sync)
        );
        assert!(volume.version > before.version);
        assert!(state.apply(&add(D, None)).is_err(), "twice");
        state
            .apply(&Command::ReplicaCreated { volume: V, node: D })
            .unwrap();
        change(&mut state, VolumeChange::Join { node: D });
        assert!(state.volumes[&V].in_sync.contains(&D));
    }

    #[test]
    fn the_primary_s_and_the_last_good_replica_stay() {
        let mut state = with_three_data_nodes(D);
        change(&mut state, VolumeChange::Promote { node: A });
        let remove = |node| Command::RemoveReplica { volume: V, node };
        assert_eq!(
            state.apply(&remove(A)),
            Err(Rejection::ReplicaOfPrimary { node: A })
        );
        change(&mut state, VolumeChange::Demote { node: A });
        change(&mut state, VolumeChange::Leave { nodes: vec![B] });
        assert_eq!(
            state.apply(&remove(A)),
            Err(Rejection::OnlyGoodReplica { node: A })
        );
        let epoch = state.volumes[&V].epoch;
        state.apply(&remove(B)).unwrap();
        assert_eq!(state.volumes[&V].epoch, Epoch(epoch.0 + 1));
        assert_eq!(
            state.apply(&remove(B)),
            Err(Rejection::NoReplica { node: B })
        );
    }

    #[test]
    fn a_replica_in_sync_goes_when_it_has_left_the_set() {
        let mut state = with_three_data_nodes(D);
        change(&mut state, VolumeChange::Promote { node: A });
        let epoch = state.volumes[&V].epoch;
        let remove = Command::RemoveReplica { volume: V, node: B };
        state.apply(&remove).unwrap();
        assert_eq!(state.volumes[&V].epoch, epoch);
        assert!(state.volumes[&V].replicas[&B].leaving);
        assert!(state.volumes[&V].in_sync.contains(&B));
        change(&mut state, VolumeChange::Leave { nodes: vec![B] });
        assert!(!state.volumes[&V].replicas.contains_key(&B));
    }

    #[test]
    fn a_moved_replica_leaves_when_its_successor_is_in_sync_and_it_is_not_primary() {
        let mut state = with_three_data_nodes(D);
        change(&mut state, VolumeChange::Promote { node: A });
        state.apply(&add(D, Some(A))).unwrap();
        change(&mut state, VolumeChange::Join { node: D });
        change(&mut state, VolumeChange::Leave { nodes: vec![B] });
        assert!(state.volumes[&V].replicas.contains_key(&A), "still primary");
        change(&mut state, VolumeChange::Demote { node: A });
        change(&mut state, VolumeChange::Promote { node: D });
        assert!(state.volumes[&V].replicas[&A].leaving);
        change(&mut state, VolumeChange::Leave { nodes: vec![A] });
        let volume = &state.volumes[&V];
        assert!(!volume.replicas.contains_key(&A));
        assert!(!volume.in_sync.contains(&A));
        assert_eq!(volume.replicas[&D].replaces, None);
    }

    #[test]
    fn who_only_tends_is_displaced_and_keeps_nobody_from_going() {
        let mut state = with_three_data_nodes(D);
        change(&mut state, VolumeChange::Tend { node: A });
        let volume = &state.volumes[&V];
        assert_eq!((volume.primary, volume.serving()), (Some(A), None));
        let again = Command::Volume {
            volume: V,
            expect: volume.epoch,
            change: VolumeChange::Tend { node: B },
        };
        assert_eq!(
            state.apply(&again),
            Err(Rejection::HasPrimary { primary: A })
        );
        change(&mut state, VolumeChange::Promote { node: B });
        let volume = &state.volumes[&V];
        assert_eq!(volume.serving(), Some(B));
        change(&mut state, VolumeChange::Demote { node: B });
        change(&mut state, VolumeChange::Tend { node: A });
        change(&mut state, VolumeChange::Promote { node: A });
        assert_eq!(state.volumes[&V].serving(), Some(A));
        change(&mut state, VolumeChange::Demote { node: A });
        change(&mut state, VolumeChange::Tend { node: A });
        state
            .apply(&Command::RemoveReplica { volume: V, node: A })
            .unwrap();
        let volume = &state.volumes[&V];
        assert_eq!((volume.primary, volume.tends), (None, false));
        assert!(volume.replicas[&A].leaving && volume.in_sync.contains(&A));
    }
}
