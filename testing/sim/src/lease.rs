//! Leases and condemnations as an oracle (DESIGN, rule 8, and the lease rule in the head of
//! `relevo_membership`), with heartbeats that cross the network in no time.
//!
//! Owned by the cluster, which calls [`Leases::round`] for each node at every heartbeat interval.
//! A voter grants for the dead time from receipt; the holder counts the shorter lease from when it
//! sent. Only a voter without a grant to a node condemns it. Layer 2 puts the real membership
//! machine in this place.

use std::collections::BTreeSet;

use relevo_types::{LeaseGeneration, NodeId, Time, Timing, cluster::ClusterState};

use crate::net::Index;

/// The voters' grants and condemnations.
#[derive(Debug)]
pub struct Leases {
    voters: usize,
    timing: Timing,
    /// `granted_until[voter][holder]`.
    granted_until: Vec<Vec<Time>>,
    /// Of which generation `granted_until` is.
    granted: Vec<Vec<LeaseGeneration>>,
    /// Durable: by voter.
    condemned: Vec<BTreeSet<(Index, LeaseGeneration)>>,
    /// Each node's own belief, in virtual time.
    until: Vec<Time>,
}

/// What the cluster knows that matters here.
pub trait Reach {
    /// Whether the daemon of a node runs and is not paused.
    fn runs(&self, node: Index) -> bool;
    /// Whether what `from` sends reaches `to`.
    fn reaches(&self, from: Index, to: Index) -> bool;
}

impl Leases {
    /// Nobody holds anything; voters just started.
    #[must_use]
    pub fn new(voters: usize, timing: Timing) -> Self {
        Self {
            voters,
            timing,
            granted_until: vec![vec![Time::ZERO + timing.dead; voters]; voters],
            granted: vec![vec![LeaseGeneration(1); voters]; voters],
            condemned: vec![BTreeSet::new(); voters],
            until: vec![Time::ZERO; voters],
        }
    }

    /// The time-outs.
    #[must_use]
    pub const fn timing(&self) -> Timing {
        self.timing
    }

    /// A voter's process started: it forgot what it granted, so it grants nobody's absence for a
    /// dead time.
    pub fn started(&mut self, voter: Index, now: Time) {
        self.granted_until[voter] = vec![now + self.timing.dead; self.voters];
        self.until[voter] = Time::ZERO;
    }

    /// A node sends its heartbeats, asking under `generation`. Gives its lease's end if that moved.
    pub fn round(
        &mut self,
        node: Index,
        generation: LeaseGeneration,
        now: Time,
        reach: &dyn Reach,
    ) -> Option<Time> {
        let mut echoes = 0;
        for voter in 0..self.voters {
            if !reach.runs(voter) || !reach.reaches(node, voter) {
                continue;
            }
            if self.condemned[voter].contains(&(node, generation)) {
                continue;
            }
            self.granted_until[voter][node] = now + self.timing.dead;
            echoes += usize::from(reach.reaches(voter, node));
        }
        if echoes <= self.voters / 2 {
            return None;
        }
        self.until[node] = now + self.timing.lease;
        Some(self.until[node])
    }

    /// A voter looks at the grants it gave: condemns holders whose grant is over.
    pub fn judge(&mut self, voter: Index, state: &ClusterState, now: Time) {
        for (id, node) in &state.nodes {
            let holder = id.0 as usize - 1;
            if self.granted[voter][holder] != node.lease.generation {
                // Its silence counts anew.
                self.granted[voter][holder] = node.lease.generation;
                let until = &mut self.granted_until[voter][holder];
                *until = (*until).max(now + self.timing.dead);
            }
            if holder != voter && !node.lease.evicted && self.granted_until[voter][holder] < now {
                self.condemned[voter].insert((holder, node.lease.generation));
            }
        }
    }

    /// The voters that condemned a node's generation.
    #[must_use]
    pub fn condemned_by(&self, node: Index, generation: LeaseGeneration) -> Vec<NodeId> {
        (0u32..)
            .zip(&self.condemned)
            .filter(|(_, condemned)| condemned.contains(&(node, generation)))
            .map(|(voter, _)| NodeId(voter + 1))
            .collect()
    }

    /// Whether a node believes that it holds its lease.
    #[must_use]
    pub fn holds(&self, node: Index, now: Time) -> bool {
        now < self.until[node]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use relevo_types::Sensitivity;

    use super::*;

    struct Map(Vec<(Index, Index)>);

    impl Reach for Map {
        fn runs(&self, _: Index) -> bool {
            true
        }

        fn reaches(&self, from: Index, to: Index) -> bool {
            from == to || !self.0.contains(&(from, to))
        }
    }

    #[test]
    fn a_majority_condemns_only_after_every_lease_it_gave() {
        let timing = Sensitivity::Fast.timing();
        let mut leases = Leases::new(3, timing);
        let control = crate::control::Control::new(
            &[relevo_types::cluster::Protocol::C; 2],
            true,
            4096,
            relevo_types::LineageId(1),
            Sensitivity::Fast,
        )
        .unwrap();
        let one = LeaseGeneration(1);
        let sent = Time::ZERO + Duration::from_secs(1);
        let until = leases.round(0, one, sent, &Map(vec![])).unwrap();
        // One-way: its heartbeats arrive, the answers do not: no lease, and no condemnation.
        let deaf = Map(vec![(1, 0), (2, 0)]);
        let later = sent + timing.dead;
        assert_eq!(leases.round(0, one, later, &deaf), None);
        for voter in 1..3 {
            leases.judge(voter, control.state(), later);
        }
        assert!(leases.condemned_by(0, one).is_empty());
        // Silent: condemned when the last grant is over, long after the lease.
        let much_later = later + timing.dead + Duration::from_nanos(1);
        for voter in 1..3 {
            leases.judge(voter, control.state(), much_later);
        }
        assert_eq!(leases.condemned_by(0, one), [NodeId(2), NodeId(3)]);
        assert!(until < much_later && !leases.holds(0, much_later));
        assert_eq!(leases.round(0, one, much_later, &Map(vec![])), None);
        assert!(
            leases
                .round(0, one.next(), much_later, &Map(vec![]))
                .is_some()
        );
    }
}
