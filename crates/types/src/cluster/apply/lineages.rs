//! Histories of a volume that fork: forced promotion, and which side gives way (DESIGN, rule 9).

use std::collections::BTreeSet;

use crate::{
    LineageId, NodeId,
    cluster::{LINEAGES_MAX, Rejection, ReplicaStanding, Volume},
};

impl Volume {
    /// The replica of a node outside the in-sync set becomes the set, with a new history.
    pub(super) fn force(
        &mut self,
        node: NodeId,
        lineage: LineageId,
        others_give_way: bool,
    ) -> Result<(), Rejection> {
        if let Some(primary) = self.serving() {
            return Err(Rejection::HasPrimary { primary });
        }
        if self.in_sync.contains(&node) {
            return Err(Rejection::AlreadyInSync { node });
        }
        self.check_usable(node)?;
        if self.lineages.contains(&lineage) {
            return Err(Rejection::OldLineage { lineage });
        }
        self.resign();
        self.put_in_force(node, lineage);
        for (at, replica) in &mut self.replicas {
            replica.gives_way = others_give_way && *at != node;
        }
        Ok(())
    }

    /// The history in force gives way to what the replica on `to` has.
    pub(super) fn give_way(&mut self, node: NodeId, to: NodeId) -> Result<(), Rejection> {
        if self.primary != Some(node) {
            return Err(Rejection::NotPrimary { node });
        }
        if self.in_sync.contains(&to) {
            return Err(Rejection::AlreadyInSync { node: to });
        }
        self.check_usable(to)?;
        self.resign();
        let lineage = self.new_lineage();
        // Who gave way, and whoever was in sync with it, does not come back, or a policy by which the newest
        // history gives way would never come to an end. The others are judged when they are met: nobody decided
        // about what they have.
        for (at, replica) in &mut self.replicas {
            replica.gives_way |= self.in_sync.contains(at);
        }
        self.put_in_force(to, lineage);
        Ok(())
    }

    fn check_usable(&self, node: NodeId) -> Result<(), Rejection> {
        let replica = self.replicas.get(&node);
        let replica = replica.ok_or(Rejection::NoReplica { node })?;
        if replica.standing != ReplicaStanding::Ready {
            return Err(Rejection::ReplicaNotReady { node });
        }
        Ok(())
    }

    /// An identity for the next history: the log knows no chance, so it is made of what came before.
    fn new_lineage(&self) -> LineageId {
        let mut next = self.lineage.0 ^ self.epoch.0;
        loop {
            // Steele, Lea, Flood: SplitMix64; zero is no identity.
            next = next.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let lineage = LineageId(mixed ^ (mixed >> 27));
            if lineage.0 != 0 && !self.lineages.contains(&lineage) {
                return lineage;
            }
        }
    }

    fn put_in_force(&mut self, node: NodeId, lineage: LineageId) {
        self.lineages.push(lineage);
        if self.lineages.len() > LINEAGES_MAX {
            self.lineages.remove(0);
        }
        self.lineage = lineage;
        self.in_sync = BTreeSet::from([node]);
        let joined = self.epoch.next();
        if let Some(replica) = self.replicas.get_mut(&node) {
            replica.joined = joined;
            // Whatever was planned for it: it is the volume now.
            replica.gives_way = false;
            replica.leaving = false;
            if let Some(differs) = &mut replica.differs {
                differs.repair = false;
            }
        }
    }

    /// Replicas outside the in-sync set give way, whatever they have.
    pub(super) fn let_outsiders_give_way(&mut self) {
        for (node, replica) in &mut self.replicas {
            replica.gives_way = !self.in_sync.contains(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{
        ClusterState, Command, VolumeChange,
        tests::{A, B, V, with_three_data_nodes},
    };

    const D: NodeId = NodeId(4);

    fn change(state: &mut ClusterState, change: VolumeChange) -> Result<(), Rejection> {
        let command = Command::Volume {
            volume: V,
            expect: state.volumes[&V].epoch,
            change,
        };
        state.apply(&command).map(|_| ())
    }

    /// A alone in sync, nobody primary.
    fn only_a() -> ClusterState {
        let mut state = with_three_data_nodes(D);
        change(&mut state, VolumeChange::Leave { nodes: vec![B] }).unwrap();
        state
    }

    fn force(lineage: u64, others_give_way: bool) -> VolumeChange {
        VolumeChange::Force {
            node: B,
            lineage: LineageId(lineage),
            others_give_way,
        }
    }

    #[test]
    fn a_forced_replica_is_the_set_of_a_new_history() {
        let mut state = only_a();
        let before = state.volumes[&V].clone();
        change(&mut state, force(77, false)).unwrap();
        let volume = &state.volumes[&V];
        assert_eq!(volume.in_sync, BTreeSet::from([B]));
        assert_eq!(volume.lineages, [before.lineage, LineageId(77)]);
        assert_eq!(volume.lineage, LineageId(77));
        assert_eq!(volume.epoch, before.epoch.next());
        assert_eq!(volume.replicas[&B].joined, volume.epoch);
        assert!(!volume.replicas[&A].gives_way);
    }

    #[test]
    fn nothing_is_forced_without_need() {
        let mut state = only_a();
        assert_eq!(
            change(&mut state, force(9, false)),
            Err(Rejection::OldLineage {
                lineage: LineageId(9)
            })
        );
        let member = VolumeChange::Force {
            node: A,
            lineage: LineageId(77),
            others_give_way: false,
        };
        assert_eq!(
            change(&mut state, member),
            Err(Rejection::AlreadyInSync { node: A })
        );
        let stranger = VolumeChange::Force {
            node: D,
            lineage: LineageId(77),
            others_give_way: false,
        };
        assert_eq!(
            change(&mut state, stranger),
            Err(Rejection::NoReplica { node: D })
        );
        change(&mut state, VolumeChange::Promote { node: A }).unwrap();
        assert_eq!(
            change(&mut state, force(77, false)),
            Err(Rejection::HasPrimary { primary: A })
        );
    }

    #[test]
    fn a_decision_holds_until_the_replica_joins() {
        let mut state = only_a();
        change(&mut state, force(77, false)).unwrap();
        change(&mut state, VolumeChange::KeepInForce).unwrap();
        assert!(state.volumes[&V].replicas[&A].gives_way);
        assert!(!state.volumes[&V].replicas[&B].gives_way);
        change(&mut state, VolumeChange::Join { node: A }).unwrap();
        assert!(!state.volumes[&V].replicas[&A].gives_way);
    }

    #[test]
    fn the_history_in_force_gives_way_to_what_another_replica_has() {
        let mut state = only_a();
        let first = state.volumes[&V].lineage;
        change(&mut state, force(77, false)).unwrap();
        change(&mut state, VolumeChange::Promote { node: B }).unwrap();
        let give_way = |node| VolumeChange::GiveWay { node, to: A };
        assert_eq!(
            change(&mut state, give_way(A)),
            Err(Rejection::NotPrimary { node: A })
        );
        change(&mut state, give_way(B)).unwrap();
        let volume = &state.volumes[&V];
        assert_eq!(volume.primary, None);
        assert_eq!(volume.lineages, [first, LineageId(77), volume.lineage]);
        assert!(volume.lineage != first && volume.lineage != LineageId(77));
        assert_eq!(volume.in_sync, BTreeSet::from([A]));
        assert!(volume.replicas[&B].gives_way && !volume.replicas[&A].gives_way);
    }

    #[test]
    fn who_gave_way_does_not_come_back_and_about_the_others_nobody_decided() {
        let mut state = only_a();
        let third = state.volumes[&V].replicas[&B].clone();
        state.volumes.get_mut(&V).unwrap().replicas.insert(D, third);
        let mut step = |it| change(&mut state, it).map(|()| state.volumes[&V].replicas.clone());
        step(force(77, false)).unwrap();
        step(VolumeChange::Promote { node: B }).unwrap();
        let replicas = step(VolumeChange::GiveWay { node: B, to: D }).unwrap();
        assert!(replicas[&B].gives_way && !replicas[&D].gives_way && !replicas[&A].gives_way);
        step(VolumeChange::Promote { node: D }).unwrap();
        let replicas = step(VolumeChange::GiveWay { node: D, to: A }).unwrap();
        assert!(replicas[&B].gives_way && replicas[&D].gives_way && !replicas[&A].gives_way);
    }
}
