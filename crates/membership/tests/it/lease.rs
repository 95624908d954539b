//! The lease rule under arbitrary faults, and a proof that the checker can fail.

use std::time::Duration;

use proptest::prelude::*;
use relevo_types::{Sensitivity, Timing};

use crate::cluster::{Broken, Cluster, Fault, NETWORKS, Plan};

/// Faults happen in this time; then there is quiet.
const FAULTS_MS: u64 = 12_000;
/// How long after the last fault everything must be well: the longest fault, the dead time, the
/// readmission, and what was still under way.
const QUIET_MS: u64 = 9_000;

fn faults() -> impl Strategy<Value = Vec<(u64, Fault)>> {
    let fault = prop_oneof![
        (any::<u8>(), any::<u8>(), 50..4000u64).prop_map(|(from, to, ms)| Fault::Cut {
            from,
            to,
            ms
        }),
        (any::<u8>(), 50..4000u64).prop_map(|(node, ms)| Fault::Isolate { node, ms }),
        (10..90u8, 500..4000u64).prop_map(|(percent, ms)| Fault::Loss { percent, ms }),
        (10..1500u64, 500..4000u64).prop_map(|(up_to_ms, ms)| Fault::Delay { up_to_ms, ms }),
        (any::<u8>(), 50..3000u64).prop_map(|(node, ms)| Fault::Pause { node, ms }),
        (any::<u8>(), 10..2500u64).prop_map(|(node, down_ms)| Fault::Restart { node, down_ms }),
        any::<u8>().prop_map(|node| Fault::Vote { node }),
        any::<u8>().prop_map(|node| Fault::Vote { node }),
        (any::<u8>(), 100..3000u64).prop_map(|(node, ms)| Fault::Lag { node, ms }),
    ];
    prop::collection::vec((0..FAULTS_MS, fault), 1..16)
}

fn plan(timing: Timing) -> impl Strategy<Value = Plan> {
    (
        3..=5u8,
        2..=5u8,
        prop::collection::vec(-40..=40i64, 5),
        faults(),
        any::<u64>(),
    )
        .prop_map(move |(nodes, voters, drift_permille, faults, seed)| Plan {
            nodes,
            voters: voters.min(nodes),
            broken: None,
            drift_permille,
            faults,
            seed,
            timing,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_lease_outlives_a_majority_of_condemnations(plan in plan(Sensitivity::Normal.timing())) {
        let mut cluster = Cluster::new(plan);
        if let Err(violation) = cluster.run(FAULTS_MS + QUIET_MS) {
            return Err(TestCaseError::fail(violation));
        }
        if let Err(unwell) = cluster.healed() {
            return Err(TestCaseError::fail(unwell));
        }
    }
}

/// Networks go down one after another, each for a while, the next one as soon as the last is back.
fn one_by_one() -> impl Strategy<Value = Vec<(u64, Fault)>> {
    let cuts = prop::collection::vec((0..NETWORKS.len(), 50..4000u64, 0..300u64), 1..8);
    cuts.prop_map(|cuts| {
        let mut at = 1000;
        let mut faults = Vec::new();
        for (network, ms, pause) in cuts {
            let path = NETWORKS[network];
            faults.push((at, Fault::CutPath { path, ms }));
            at += ms + pause;
        }
        faults
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_loss_of_one_path_after_another_moves_nothing(
        faults in one_by_one(),
        drift_permille in prop::collection::vec(-40..=40i64, 5),
        nodes in 3..=5u8,
        seed in any::<u64>(),
    ) {
        let timing = Sensitivity::Normal.timing();
        let mut cluster = Cluster::new(Plan { nodes, voters: nodes, broken: None, drift_permille, faults, seed, timing });
        prop_assert_eq!(cluster.run(40_000), Ok(()));
        prop_assert_eq!(cluster.healed(), Ok(()));
        prop_assert_eq!(cluster.evictions, 0);
        prop_assert_eq!(&cluster.doubts, &[]);
    }

    /// All networks are down at once: the two at the ends of the line hold each other's lease through it, and the
    /// third is lost.
    #[test]
    fn a_slow_line_alone_keeps_two_nodes_alive(
        drift_permille in prop::collection::vec(-40..=40i64, 5),
        seed in any::<u64>(),
        ms in 2500..8000u64,
    ) {
        let timing = Sensitivity::Normal.timing();
        let faults = NETWORKS.map(|path| (2000, Fault::CutPath { path, ms })).to_vec();
        let mut cluster = Cluster::new(Plan { nodes: 3, voters: 3, broken: None, drift_permille, faults, seed, timing });
        prop_assert_eq!(cluster.run(1990), Ok(()));
        for at in (2000..2000 + ms).step_by(100) {
            prop_assert_eq!(cluster.run(at), Ok(()));
            for node in [0, 1] {
                prop_assert!(cluster.has_lease(node), "{} at {} ms", node, at);
            }
        }
        prop_assert!(cluster.doubts.contains(&(0, 2)));
        prop_assert!(!cluster.doubts.iter().any(|(one, other)| *one < 2 && *other < 2));
        prop_assert_eq!(cluster.run(2000 + ms + QUIET_MS), Ok(()));
        prop_assert_eq!(cluster.healed(), Ok(()));
    }
}

/// Runs a fixed plan in which a node is isolated; returns the checker's verdict.
fn isolation(timing: Timing, seed: u64) -> (Result<(), String>, Cluster) {
    let plan = Plan {
        nodes: 3,
        voters: 3,
        broken: None,
        drift_permille: vec![-40, 40, 40],
        faults: vec![(1000, Fault::Isolate { node: 0, ms: 3000 })],
        seed,
        timing,
    };
    let mut cluster = Cluster::new(plan);
    let verdict = cluster.run(10_000);
    (verdict, cluster)
}

#[test]
fn the_checker_catches_a_lease_that_is_too_long() {
    let timing = Sensitivity::Normal.timing();
    for seed in 1..20 {
        let (verdict, cluster) = isolation(timing, seed);
        verdict.unwrap();
        cluster.healed().unwrap();
        assert_eq!(cluster.evictions, 1, "the scenario exercises the eviction");
        // It had condemned the others as well.
        assert_eq!(cluster.readmissions, 3);
        let too_long = Timing {
            lease: timing.dead + Duration::from_millis(250),
            ..timing
        };
        let (verdict, _) = isolation(too_long, seed);
        assert!(verdict.unwrap_err().contains("believes in its lease"));
    }
}

/// Three of five nodes vote. The third is cut off from all but the second, which hears everybody; then the other two
/// become voters, one after the other. The second one learns of that late.
fn two_more_voters(seed: u64, broken: Option<Broken>) -> (Result<(), String>, Cluster) {
    let mut faults = vec![(1000, Fault::Lag { node: 2, ms: 8000 })];
    for other in [0, 3, 4] {
        for (from, to) in [(2, other), (other, 2)] {
            faults.push((1000, Fault::Cut { from, to, ms: 8000 }));
        }
    }
    let lag = 50 + seed * 37 % 1500;
    faults.push((
        1900,
        Fault::Lag {
            node: 1,
            ms: 100 + lag,
        },
    ));
    faults.push((2000, Fault::Vote { node: 3 }));
    faults.push((2001, Fault::Vote { node: 4 }));
    let plan = Plan {
        nodes: 5,
        voters: 3,
        broken,
        drift_permille: vec![40, 0, -40, 40, 40],
        faults,
        seed,
        timing: Sensitivity::Normal.timing(),
    };
    let mut cluster = Cluster::new(plan);
    let verdict = cluster.run(20_000);
    (verdict, cluster)
}

#[test]
fn two_changes_of_who_votes_leave_nobody_with_a_lease_of_the_voters_before() {
    for seed in 1..40 {
        let (verdict, cluster) = two_more_voters(seed, None);
        verdict.unwrap();
        cluster.healed().unwrap();
        assert_eq!(cluster.votes_changed, 2);
        // The voters of which it knows nothing took it for dead, and rightly so.
        assert!(cluster.evictions >= 1);
    }
    for broken in [Broken::Hasty, Broken::Blind] {
        let caught = (1..40).filter(|seed| {
            let (verdict, _) = two_more_voters(*seed, Some(broken));
            verdict.is_err_and(|why| why.contains("believes in its lease"))
        });
        assert!(caught.count() > 0, "{broken:?} is never caught");
    }
}
