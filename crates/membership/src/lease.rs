//! What others granted to this node: its own lease.

use std::collections::{BTreeMap, VecDeque};

use relevo_types::{LeaseGeneration, NodeId, Time, Timing};

/// Rounds kept at most. The dead time is ten heartbeats in every sensitivity; the rest is for
/// rounds out of turn (a condemnation, a new generation). A round that was dropped early can only
/// make the lease shorter.
const ROUNDS_MAX: usize = 64;

/// A round of heartbeats that was sent.
#[derive(Clone, Copy, Debug)]
struct Round {
    number: u64,
    sent: Time,
}

/// The lease as its holder sees it.
#[derive(Debug)]
pub(crate) struct OwnLease {
    /// The generation under which rounds are sent.
    generation: LeaseGeneration,
    /// Number of the last round that was sent; 0 before the first.
    newest: u64,
    /// Sent under `generation`, oldest first.
    rounds: VecDeque<Round>,
    /// The newest round that each other voter granted.
    granted: BTreeMap<NodeId, u64>,
    /// How long the lease holds. Only [`Self::revoke`] moves it back.
    until: Time,
}

impl OwnLease {
    pub(crate) const fn new() -> Self {
        Self {
            generation: LeaseGeneration(0),
            newest: 0,
            rounds: VecDeque::new(),
            granted: BTreeMap::new(),
            until: Time::ZERO,
        }
    }

    pub(crate) const fn generation(&self) -> LeaseGeneration {
        self.generation
    }

    pub(crate) const fn until(&self) -> Time {
        self.until
    }

    /// From now on rounds are sent under this generation. Grants of earlier rounds are worth
    /// nothing for it; what was granted before runs on to its end, since nobody takes from a node
    /// what it holds under the new generation without the silence that ends those grants.
    pub(crate) fn set_generation(&mut self, generation: LeaseGeneration) {
        if generation != self.generation {
            self.generation = generation;
            self.rounds.clear();
        }
    }

    /// Begins a round; returns its number.
    pub(crate) fn begin_round(&mut self, now: Time) -> u64 {
        self.newest += 1;
        if self.rounds.len() == ROUNDS_MAX {
            self.rounds.pop_front();
        }
        self.rounds.push_back(Round {
            number: self.newest,
            sent: now,
        });
        self.newest
    }

    /// When a round was sent, if that is still known.
    pub(crate) fn sent_at(&self, number: u64) -> Option<Time> {
        let first = self.rounds.front()?.number;
        let index = usize::try_from(number.checked_sub(first)?).ok()?;
        self.rounds.get(index).map(|round| round.sent)
    }

    /// A voter said up to which round it granted.
    pub(crate) fn note_grant(&mut self, voter: NodeId, round: u64) {
        // A round that was not sent can't have been granted, whatever arrives.
        if round <= self.newest {
            let known = self.granted.entry(voter).or_insert(0);
            *known = round.max(*known);
        }
    }

    /// Forgets the grants of voters that are no members any more.
    pub(crate) fn retain_voters(&mut self, mut is_voter: impl FnMut(NodeId) -> bool) {
        self.granted.retain(|voter, _| is_voter(*voter));
    }

    /// Counts the grants. `own_vote`: this node is a voter; it grants every round to itself.
    /// Returns whether the lease became longer.
    pub(crate) fn recount(&mut self, majority: usize, own_vote: bool, timing: &Timing) -> bool {
        let mut rounds: Vec<u64> = self.granted.values().copied().collect();
        rounds.extend(own_vote.then_some(self.newest));
        rounds.sort_unstable_by(|a, b| b.cmp(a));
        let Some(sent) = rounds
            .get(majority - 1)
            .and_then(|round| self.sent_at(*round))
        else {
            return false;
        };
        let until = sent + timing.lease;
        let longer = until > self.until;
        self.until = until.max(self.until);
        longer
    }

    /// Takes the lease away now. Returns whether there was one.
    pub(crate) fn revoke(&mut self, now: Time) -> bool {
        self.rounds.clear();
        let had = self.until > now;
        self.until = self.until.min(now);
        had
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::Sensitivity;

    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_majority_decides_and_counts_from_the_sending() {
        let timing = Sensitivity::Normal.timing();
        let mut lease = OwnLease::new();
        lease.set_generation(LeaseGeneration(1));
        for i in 0..5 {
            lease.begin_round(Time(i * 100 * MS));
        }
        assert!(
            !lease.recount(2, true, &timing),
            "alone it has no majority of three"
        );
        lease.note_grant(NodeId(2), 3);
        assert!(lease.recount(2, true, &timing));
        assert_eq!(lease.until(), Time(1100 * MS));
        lease.note_grant(NodeId(3), 99);
        assert!(
            !lease.recount(2, true, &timing),
            "a round that was never sent"
        );
        assert!(!lease.recount(3, true, &timing));
    }

    #[test]
    fn grants_of_an_older_generation_are_worth_nothing_for_the_next() {
        let timing = Sensitivity::Normal.timing();
        let mut lease = OwnLease::new();
        lease.set_generation(LeaseGeneration(1));
        lease.begin_round(Time(0));
        lease.set_generation(LeaseGeneration(2));
        lease.begin_round(Time(100 * MS));
        lease.note_grant(NodeId(2), 1);
        assert!(!lease.recount(2, true, &timing));
        lease.note_grant(NodeId(2), 2);
        assert!(lease.recount(2, true, &timing));
        assert_eq!(lease.until(), Time(1000 * MS));
    }

    #[test]
    fn many_rounds_are_bounded() {
        let mut lease = OwnLease::new();
        for i in 0..1000 {
            lease.begin_round(Time(i));
        }
        assert_eq!(lease.sent_at(1), None);
        assert_eq!(lease.sent_at(1000), Some(Time(999)));
        assert_eq!(lease.sent_at(1001), None);
    }
}
