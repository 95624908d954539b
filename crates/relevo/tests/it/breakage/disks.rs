//! Disks that fail. Whatever fails, on whichever node: that replica leaves, the client goes on, and
//! the daemon takes the disk back when it is started again.

use std::{thread::sleep, time::Duration};

use chaos::{Fault, Stage};

use super::pair_with_faulty_disks;

/// Switches a fault on, waits until it struck and the volume went on without the disk, then repairs
/// it and restarts the daemon.
fn fails(stage: &mut Stage, victim: &str, fault: Fault) {
    stage.disk(victim).set(Some(fault));
    chaos::eventually(Duration::from_secs(20), "the fault strikes", || {
        stage.disk(victim).hits() > 0
    });
    stage.expect_out_of_sync(victim);
    stage.expect_progress();
    stage.disk(victim).set(None);
    stage.kill(victim);
    stage.start(victim);
    stage.expect_whole();
}

#[test]
fn the_disk_of_a_secondary_fails() {
    Stage::play(
        &pair_with_faulty_disks("the_disk_of_a_secondary_fails"),
        |stage, _| {
            for fault in [Fault::Write, Fault::Flush, Fault::Full, Fault::Torn] {
                let victim = stage.secondary();
                fails(stage, &victim, fault);
            }
        },
    );
}

#[test]
fn the_disk_of_the_primary_fails() {
    Stage::play(
        &pair_with_faulty_disks("the_disk_of_the_primary_fails"),
        |stage, _| {
            for fault in [
                Fault::Read,
                Fault::Write,
                Fault::Flush,
                Fault::Full,
                Fault::Torn,
            ] {
                let victim = stage.primary();
                fails(stage, &victim, fault);
            }
        },
    );
}

/// The disk of either node answers nothing for a while, and then everything.
#[test]
fn a_disk_hangs_for_a_while() {
    Stage::play(
        &pair_with_faulty_disks("a_disk_hangs_for_a_while"),
        |stage, _| {
            for primary in [false, true] {
                let victim = if primary {
                    stage.primary()
                } else {
                    stage.secondary()
                };
                stage.disk(&victim).set(Some(Fault::Hang));
                sleep(Duration::from_secs(3));
                assert!(stage.disk(&victim).set(None) > 0, "nothing hung");
                stage.expect_whole();
                stage.expect_progress();
            }
        },
    );
}
