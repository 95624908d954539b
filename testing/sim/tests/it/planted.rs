//! Bugs put in on purpose are caught: what shows that the checkers see.

use relevo_replication::lab::PlantedBug;
use sim::{
    batch,
    scenario::{Planted, Scenario},
};

/// Seeds after which a planted bug counts as not caught.
const SEEDS: u64 = 2_000;

fn caught(bug: PlantedBug) {
    let totals = batch::run_many(0..SEEDS, batch::threads(), |seed| Scenario {
        planted: Some(Planted(bug)),
        ..Scenario::of_seed(seed)
    });
    match totals.failures.first() {
        Some(failure) => println!(
            "{bug:?} caught by seed {} after {} good ones: {}",
            failure.seed, totals.runs, failure.what
        ),
        None => panic!("{bug:?} went through {} seeds", totals.runs),
    }
}

#[test]
fn acknowledging_before_the_leave_is_committed_is_caught() {
    caught(PlantedBug::AckBeforeLeaveCommitted);
}

#[test]
fn clearing_a_mark_without_the_acknowledgement_is_caught() {
    caught(PlantedBug::ClearDirtyWithoutAck);
}

#[test]
fn writing_before_the_activity_log_is_durable_is_caught() {
    caught(PlantedBug::SkipActivityWait);
}

#[test]
fn opening_before_reconciliation_is_caught() {
    caught(PlantedBug::OpenBeforeReconcile);
}

#[test]
fn taking_messages_of_lower_epochs_is_caught() {
    caught(PlantedBug::IgnoreLowerEpoch);
}
