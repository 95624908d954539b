//! Bugs put in on purpose are caught: what shows that the checkers see.

use relevo_replication::lab::PlantedBug;
use relevo_types::cluster::Protocol;
use sim::{
    batch,
    faults::Fault,
    scenario::{Planted, REPLICAS_MAX, Scenario},
};

/// Seeds after which a planted bug counts as not caught.
const SEEDS: u64 = 4_000;

/// Runs are given up that only take too long to heal: what must be seen is wrong data, or a broken
/// order.
const SLOW_ONES_PASSED_OVER: usize = 200;

fn caught(bug: PlantedBug) {
    let scenario = |seed| {
        let mut scenario = Scenario {
            planted: Some(Planted(bug)),
            hang_one: false,
            last_disk: false,
            ..Scenario::of_seed(seed)
        };
        scenario.split |= matches!(
            bug,
            PlantedBug::MergeInSilence | PlantedBug::OverwriteWithoutSaving
        );
        if bug == PlantedBug::IgnoreLowerEpoch {
            // A replaced primary rarely gets a write through to anyone: it takes a network that
            // loses its heartbeats alone, and not too much else at the same time.
            scenario.faults = vec![(Fault::Zombie, 1)];
        }
        if bug == PlantedBug::GenerationDroppedEarly {
            // A follower is cut off with writes on the way; the others go on.
            scenario.data_nodes = 3;
            scenario.protocols = [Protocol::C; REPLICAS_MAX];
            scenario.protocols[2] = Protocol::A;
            scenario.faults = vec![(Fault::CutPair, 1), (Fault::CutOneWay, 1)];
        }
        scenario.rot |= bug == PlantedBug::RepairForgotten;
        if bug == PlantedBug::TenderTakesRequests {
            // Displaced without having heard of it, and the application is still there.
            scenario.tends = 60.0;
            scenario.faults = vec![
                (Fault::Switchover, 1),
                (Fault::CutPair, 1),
                (Fault::LogAway, 1),
            ];
            scenario.rot = false;
        }
        if bug == PlantedBug::ReceiptSettles {
            // A replica that received and had not written dies, again and again.
            scenario.protocols = [Protocol::B; REPLICAS_MAX];
            scenario.faults = vec![(Fault::CrashProcess, 1), (Fault::CrashSoon, 1)];
        }
        if bug == PlantedBug::VerifyOutsideGate {
            // Orders to verify in the middle of a heavy load, and nothing else.
            scenario.faults = vec![(Fault::Orders, 1)];
            scenario.clients = 8;
            scenario.think_us = 1000;
        }
        if bug == PlantedBug::HealFromAnybody {
            // A disk fails to read while another replica is behind; nothing else does.
            scenario.faults = vec![(Fault::DiskError, 1), (Fault::CutPair, 1)];
        }
        scenario
    };
    let mut from = 0;
    for _ in 0..SLOW_ONES_PASSED_OVER {
        let totals = batch::run_many(from..SEEDS, batch::threads(), scenario);
        let Some(failure) = totals.failures.first() else {
            break;
        };
        if failure.is_safety {
            said::say(format_args!(
                "{bug:?} caught after {} seeds: {}",
                failure.seed + 1,
                failure.what
            ));
            return;
        }
        from = failure.seed + 1;
    }
    panic!("{bug:?} went through {SEEDS} seeds");
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

#[test]
fn a_replica_of_protocol_a_in_the_set_that_nobody_waits_for_is_caught() {
    caught(PlantedBug::AsyncCountsAsInSync);
}

#[test]
fn leaving_a_replica_behind_without_marks_is_caught() {
    caught(PlantedBug::AheadWithoutMarks);
}

#[test]
fn trusting_old_acknowledgements_of_one_left_behind_is_caught() {
    caught(PlantedBug::AheadTrustsOldAcks);
}

#[test]
fn forgetting_marks_before_they_are_acknowledged_is_caught() {
    caught(PlantedBug::GenerationDroppedEarly);
}

#[test]
fn a_flush_that_forgets_what_was_only_received_is_caught() {
    caught(PlantedBug::FlushForgetsReceived);
}

#[test]
fn a_receipt_that_counts_as_written_is_caught() {
    caught(PlantedBug::ReceiptSettles);
}

#[test]
fn joining_while_the_resync_is_paused_is_caught() {
    caught(PlantedBug::JoinWhilePaused);
}

#[test]
fn taking_what_differs_for_the_same_in_a_resync_is_caught() {
    caught(PlantedBug::DifferingCountsAsSame);
}

#[test]
fn verifying_outside_the_gate_is_caught() {
    caught(PlantedBug::VerifyOutsideGate);
}

#[test]
fn telling_of_damage_that_the_log_does_not_have_is_caught() {
    caught(PlantedBug::ToldBeforeCommitted);
}

#[test]
fn forgetting_a_repair_with_who_found_it_is_caught() {
    caught(PlantedBug::RepairForgotten);
}

#[test]
fn healing_from_a_replica_that_is_not_in_sync_is_caught() {
    caught(PlantedBug::HealFromAnybody);
}

#[test]
fn overwriting_a_history_that_nobody_gave_up_is_caught() {
    caught(PlantedBug::MergeInSilence);
}

#[test]
fn overwriting_before_it_was_saved_is_caught() {
    caught(PlantedBug::OverwriteWithoutSaving);
}

#[test]
fn one_that_only_tends_and_takes_requests_is_caught() {
    caught(PlantedBug::TenderTakesRequests);
}

/// Managers that take no heartbeat from any path but the first, while the others hold.
#[test]
fn a_path_whose_loss_moves_something_is_caught() {
    let scenario = |seed| Scenario {
        deaf: true,
        faults: vec![(Fault::CutPath, 1)],
        ..Scenario::managed(seed)
    };
    let totals = batch::run_many(0..SEEDS, batch::threads(), scenario);
    let failure = totals.failures.first().expect("it is caught");
    assert!(
        failure.what.contains("the loss of a path moves nothing"),
        "{failure}"
    );
}
