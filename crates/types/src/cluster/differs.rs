//! What verification found: a replica differs from another one, and nobody has put it right yet.

use serde::{Deserialize, Serialize};

use super::{Rejection, Volume};
use crate::{BlockRange, NodeId};

/// How many places are remembered one by one: some kilobytes in the log, and far more than a disk has
/// that only rots here and there.
pub const DIFFERS_RUNS_MAX: usize = 256;

/// A replica differs from the then primary's. Which of the two is right nobody knows but a person who
/// looks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Differs {
    /// Whose replica it was compared with.
    pub from: NodeId,
    /// Blocks of 4 KiB that differ.
    pub blocks: u64,
    /// Where, in order, at most [`DIFFERS_RUNS_MAX`]. If there are more places, those that are closest
    /// to each other are taken together with what lies between.
    pub runs: Vec<BlockRange>,
    /// A person decided that the replica is given what the primary has. It left the in-sync set with
    /// this decision, so whoever is primary may copy it, and it joins when that is done.
    pub repair: bool,
}

impl Differs {
    /// A record of these runs, which are in order and do not touch; `None` if nothing differs.
    #[must_use]
    pub fn new(from: NodeId, mut runs: Vec<BlockRange>, repair: bool) -> Option<Self> {
        if runs.is_empty() {
            return None;
        }
        let blocks = runs.iter().map(|run| run.count).sum();
        if let Some(too_many) = runs.len().checked_sub(DIFFERS_RUNS_MAX) {
            let gap_after = |at: usize| runs[at + 1].first - runs[at].end();
            let mut gaps: Vec<(u64, usize)> =
                (0..runs.len() - 1).map(|at| (gap_after(at), at)).collect();
            gaps.sort_unstable();
            let mut closed: Vec<usize> = gaps[..too_many].iter().map(|(_, at)| *at).collect();
            // From the end, so that the places before stay what they are.
            closed.sort_unstable();
            for at in closed.into_iter().rev() {
                let next = runs.remove(at + 1);
                runs[at].count = next.end() - runs[at].first;
            }
        }
        Some(Self {
            from,
            blocks,
            runs,
            repair,
        })
    }
}

impl Volume {
    /// A verification by the primary ended. With `repair` the replica leaves the in-sync set in the same
    /// step: a member may be promoted, and must not be a mix meanwhile.
    pub(super) fn set_differs(
        &mut self,
        node: NodeId,
        from: NodeId,
        differs: Option<&Differs>,
    ) -> Result<(), Rejection> {
        if self.primary != Some(from) {
            return Err(Rejection::NotPrimary { node: from });
        }
        let replica = self.replicas.get_mut(&node).filter(|_| node != from);
        let replica = replica.ok_or(Rejection::NoReplica { node })?;
        replica.differs = differs.cloned();
        match differs {
            Some(differs) if differs.repair => {
                self.in_sync.remove(&node);
            }
            Some(_) => {}
            None => self.same_again(node, from),
        }
        Ok(())
    }

    /// A replica joined: if it was to be repaired, it is.
    pub(super) fn repaired(&mut self, node: NodeId) {
        let replica = self.replicas.get_mut(&node);
        let repaired = replica.is_some_and(|replica| {
            let differs = replica.differs.take_if(|differs| differs.repair);
            differs.is_some()
        });
        if let Some(primary) = self.primary.filter(|_| repaired) {
            self.same_again(node, primary);
        }
    }

    /// The primary and another replica are the same: an older record that says otherwise, from the time
    /// when that one was primary, is over.
    fn same_again(&mut self, node: NodeId, primary: NodeId) {
        if let Some(replica) = self.replicas.get_mut(&primary) {
            replica.differs = replica.differs.take().filter(|it| it.from != node);
        }
    }

    /// There is nothing left that the primary could differ from.
    pub(super) fn forget_differences(&mut self) {
        let left: Vec<NodeId> = self.replicas.keys().copied().collect();
        let primary = self.primary.and_then(|node| self.replicas.get_mut(&node));
        if let Some(replica) = primary {
            replica.differs = replica.differs.take().filter(|it| left.contains(&it.from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Epoch,
        cluster::{
            ClusterState, Command, VolumeChange,
            tests::{A, B, V, with_three_data_nodes},
        },
    };

    const C: NodeId = NodeId(4);

    fn change(state: &mut ClusterState, change: VolumeChange) -> Result<Epoch, Rejection> {
        let command = Command::Volume {
            volume: V,
            expect: state.volumes[&V].epoch,
            change,
        };
        state.apply(&command).map(|_| state.volumes[&V].epoch)
    }

    fn found(node: NodeId, from: NodeId, blocks: u64, repair: bool) -> VolumeChange {
        let runs = (0..blocks).map(|at| BlockRange::new(at * 10, 1)).collect();
        let differs = Differs::new(from, runs, repair);
        VolumeChange::Differs {
            node,
            from,
            differs,
        }
    }

    fn record(state: &ClusterState, node: NodeId) -> Option<&Differs> {
        state.volumes[&V].replicas[&node].differs.as_ref()
    }

    #[test]
    fn what_was_found_stays_until_it_is_repaired_or_found_to_be_the_same() {
        let mut state = with_three_data_nodes(C);
        change(&mut state, VolumeChange::Promote { node: A }).unwrap();
        change(&mut state, found(B, A, 2, false)).unwrap();
        assert!(state.volumes[&V].in_sync.contains(&B), "still a member");
        assert_eq!(record(&state, B).unwrap().blocks, 2);
        // Losing it and its coming back repair nothing.
        change(&mut state, VolumeChange::Leave { nodes: vec![B] }).unwrap();
        change(&mut state, VolumeChange::Join { node: B }).unwrap();
        assert!(record(&state, B).is_some());
        change(&mut state, found(B, A, 0, false)).unwrap();
        assert_eq!(record(&state, B), None);
        // With the decision it leaves, and the join is the end of it.
        change(&mut state, found(B, A, 2, true)).unwrap();
        assert!(!state.volumes[&V].in_sync.contains(&B));
        change(&mut state, VolumeChange::Join { node: B }).unwrap();
        assert_eq!(record(&state, B), None);
    }

    #[test]
    fn only_the_primary_says_what_differs_and_only_of_others() {
        let mut state = with_three_data_nodes(C);
        change(&mut state, VolumeChange::Promote { node: A }).unwrap();
        let error = change(&mut state, found(A, B, 1, false)).unwrap_err();
        assert_eq!(error, Rejection::NotPrimary { node: B });
        let error = change(&mut state, found(A, A, 1, true)).unwrap_err();
        assert_eq!(error, Rejection::NoReplica { node: A });
        let error = change(&mut state, found(NodeId(9), A, 1, true)).unwrap_err();
        assert_eq!(error, Rejection::NoReplica { node: NodeId(9) });
    }

    #[test]
    fn a_primary_is_good_again_when_the_one_that_it_differed_from_is_the_same() {
        let mut state = with_three_data_nodes(C);
        change(&mut state, VolumeChange::Promote { node: A }).unwrap();
        change(&mut state, found(B, A, 2, false)).unwrap();
        change(&mut state, VolumeChange::Demote { node: A }).unwrap();
        change(&mut state, VolumeChange::Promote { node: B }).unwrap();
        assert!(record(&state, B).is_some(), "a promotion decides nothing");
        change(&mut state, found(A, B, 2, true)).unwrap();
        change(&mut state, VolumeChange::Join { node: A }).unwrap();
        assert_eq!((record(&state, A), record(&state, B)), (None, None));
    }

    #[test]
    fn a_primary_does_not_differ_from_a_replica_that_is_gone() {
        let mut state = with_three_data_nodes(C);
        change(&mut state, VolumeChange::Promote { node: A }).unwrap();
        change(&mut state, found(B, A, 2, false)).unwrap();
        change(&mut state, VolumeChange::Demote { node: A }).unwrap();
        change(&mut state, VolumeChange::Leave { nodes: vec![A] }).unwrap();
        change(&mut state, VolumeChange::Promote { node: B }).unwrap();
        let remove = Command::RemoveReplica { volume: V, node: A };
        state.apply(&remove).unwrap();
        assert_eq!(record(&state, B), None);
    }

    #[test]
    fn a_record_is_bounded_and_covers_all_that_differs() {
        let runs: Vec<BlockRange> = (0..3 * DIFFERS_RUNS_MAX as u64)
            .map(|at| BlockRange::new(at * at * 3, 1 + at % 2))
            .collect();
        let record = Differs::new(A, runs.clone(), false).unwrap();
        assert_eq!(record.runs.len(), DIFFERS_RUNS_MAX);
        assert_eq!(record.blocks, runs.iter().map(|run| run.count).sum::<u64>());
        let covers = |run: &BlockRange| {
            let around = |it: &&BlockRange| it.first <= run.first && run.end() <= it.end();
            record.runs.iter().filter(around).count() == 1
        };
        assert!(runs.iter().all(covers));
        let apart = record.runs.is_sorted_by(|a, b| a.end() < b.first);
        assert!(apart, "{:?}", record.runs);
        // The places far apart are still told one by one.
        assert_eq!(record.runs.last(), runs.last());
    }
}
