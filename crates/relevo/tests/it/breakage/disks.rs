//! Disks that fail. Whatever fails, on whichever node: that replica leaves, the client goes on, and
//! the daemon takes the disk back when it is attached again, or the daemon started again.

use std::{thread::sleep, time::Duration};

use chaos::{Fault, Stage};
use serde_json::{Value, json};

use super::{pair_with_faulty_disks, trio_with_faulty_disks};

/// Switches a fault on, waits until it struck and the volume went on without the disk, then repairs
/// it and takes it back.
fn fails(stage: &mut Stage, victim: &str, fault: Fault) {
    stage.disk(victim).set(Some(fault));
    chaos::eventually(Duration::from_secs(20), "the fault strikes", || {
        stage.disk(victim).hits() > 0
    });
    stage.expect_out_of_sync(victim);
    stage.expect_progress();
    stage.disk(victim).set(None);
    if fault == Fault::Torn {
        stage.kill(victim);
        stage.start(victim);
    } else {
        stage.say(victim, &["attach", "mail"]);
    }
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
            for fault in [Fault::Write, Fault::Flush, Fault::Full, Fault::Torn] {
                let victim = stage.primary();
                fails(stage, &victim, fault);
            }
        },
    );
}

/// The medium of the primary went bad all over. What can't be read comes from the other replica and is
/// written anew; the service stays where it is, and nobody leaves the in-sync set.
#[test]
fn bad_sectors_of_the_primary_are_healed() {
    Stage::play(
        &pair_with_faulty_disks("bad_sectors_of_the_primary_are_healed"),
        |stage, _| {
            let primary = stage.primary();
            let other = stage.secondary();
            stage.disk(&primary).set(Some(Fault::Sectors));
            chaos::eventually(Duration::from_secs(20), "reads fail", || {
                stage.disk(&primary).hits() > 3
            });
            stage.expect_progress();
            stage.expect_answer(&primary, &["events"], "are written anew");
            assert_eq!(stage.primary(), primary);
            let in_sync = stage.volume()["in_sync"].to_string();
            assert!(
                in_sync.contains(&primary) && in_sync.contains(&other),
                "{in_sync}"
            );
            stage.disk(&primary).set(None);
            stage.expect_whole();
        },
    );
}

/// A primary that can read nothing at all: what it wrote anew fails again, and its disk counts as failed.
#[test]
fn a_primary_that_can_read_nothing_leaves() {
    Stage::play(
        &pair_with_faulty_disks("a_primary_that_can_read_nothing_leaves"),
        |stage, _| {
            let primary = stage.primary();
            fails(stage, &primary, Fault::Read);
        },
    );
}

/// A disk that answers nothing for `disk-timeout` counts as failed, on either side.
#[test]
fn a_disk_that_hangs_for_disk_timeout_leaves() {
    Stage::play(
        &pair_with_faulty_disks("a_disk_that_hangs_for_disk_timeout_leaves"),
        |stage, _| {
            let primary = stage.primary();
            let set = ["volume", "set", "mail", "disk-timeout=2s"];
            stage.say(&primary, &set);
            for primary in [false, true] {
                let victim = if primary {
                    stage.primary()
                } else {
                    stage.secondary()
                };
                stage.disk(&victim).set(Some(Fault::Hang));
                stage.expect_answer(&victim, &["events"], "within `disk-timeout`");
                stage.expect_out_of_sync(&victim);
                stage.expect_progress();
                stage.disk(&victim).set(None);
                stage.say(&victim, &["attach", "mail"]);
                stage.expect_whole();
            }
        },
    );
}

/// The process dies with a write half done, as with the power: of data, of the activity log, or of
/// whatever was under way. Nobody was told of an error in time.
#[test]
fn a_write_is_torn_and_the_daemon_dies() {
    Stage::play(
        &pair_with_faulty_disks("a_write_is_torn_and_the_daemon_dies"),
        |stage, _| {
            for primary in [false, true, false, true] {
                let victim = if primary {
                    stage.primary()
                } else {
                    stage.secondary()
                };
                stage.disk(&victim).set(Some(Fault::Torn));
                while stage.disk(&victim).hits() == 0 {
                    sleep(Duration::from_millis(1));
                }
                stage.kill(&victim);
                stage.disk(&victim).set(None);
                if primary {
                    stage.expect_takeover_from(&victim);
                }
                stage.start(&victim);
                stage.expect_whole();
            }
        },
    );
}

/// A disk that can't be read is found out when its node takes over: the third one does it then.
#[test]
fn a_bad_disk_is_found_out_at_the_takeover() {
    Stage::play(
        &trio_with_faulty_disks("a_bad_disk_is_found_out_at_the_takeover"),
        |stage, _| {
            let first = stage.primary();
            let others: Vec<String> = stage
                .data_nodes()
                .iter()
                .filter(|name| **name != first)
                .cloned()
                .collect();
            // Whichever is chosen; then the other one is well.
            for name in &others {
                stage.disk(name).set(Some(Fault::Read));
            }
            stage.kill(&first);
            chaos::eventually(Duration::from_secs(20), "a bad disk is read", || {
                others.iter().any(|name| stage.disk(name).hits() > 0)
            });
            let bad = others
                .iter()
                .position(|name| stage.disk(name).hits() > 0)
                .unwrap();
            let good = &others[1 - bad];
            stage.disk(good).set(None);
            chaos::eventually(Duration::from_secs(20), "the third one is primary", || {
                stage.primary() == *good
            });
            stage.expect_progress();
            stage.start(&first);
            stage.disk(&others[bad]).set(None);
            stage.kill(&others[bad]);
            stage.start(&others[bad]);
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

/// The primary is the last one in sync.
fn alone(stage: &mut Stage) -> (String, String) {
    let (primary, other) = (stage.primary(), stage.secondary());
    stage.kill(&other);
    stage.expect_out_of_sync(&other);
    stage.expect_progress();
    (primary, other)
}

/// The disk of the last one in sync is repaired and attached: all goes on without another word.
fn repair(stage: &mut Stage, primary: &str, other: &str) {
    stage.disk(primary).set(None);
    stage.say(primary, &["attach", "mail"]);
    stage.expect_progress();
    assert_eq!(service(stage, primary)["failures"], json!([]));
    stage.start(other);
    stage.expect_whole();
}

fn service(stage: &Stage, at: &str) -> Value {
    let status: Value = serde_json::from_str(&stage.ask(at, &["status", "--json"])).unwrap();
    status["cluster"]["services"][0].clone()
}

/// Nobody else has the data, and requests shall wait for it: so does the service, which nobody stops, and
/// the status says for what. The disk is repaired and attached, and all goes on without another word.
#[test]
fn requests_wait_for_the_last_disk() {
    Stage::play(
        &pair_with_faulty_disks("requests_wait_for_the_last_disk"),
        |stage, _| {
            let set = ["volume", "set", "mail", "on-no-data-accessible=suspend-io"];
            stage.say(&stage.primary(), &set);
            let (primary, other) = alone(stage);
            stage.disk(&primary).set(Some(Fault::Write));
            stage.expect_answer(&primary, &["status"], "waits for accessible data");
            let writes = stage.writes();
            sleep(Duration::from_secs(5));
            assert_eq!(stage.writes(), writes, "nothing is acknowledged");
            let before = service(stage, &primary);
            assert_eq!(before["node"], primary, "{before:#}");
            assert_eq!(before["state"], "running", "{before:#}");
            assert_eq!(before["failures"], json!([]), "{before:#}");
            repair(stage, &primary, &other);
        },
    );
}

/// Requests fail, and the service is given up: there is no other node for it. Once the disk is repaired and
/// attached the service starts by itself.
#[test]
fn requests_to_the_last_disk_fail() {
    Stage::play(
        &pair_with_faulty_disks("requests_to_the_last_disk_fail"),
        |stage, _| {
            let (primary, other) = alone(stage);
            stage.disk(&primary).set(Some(Fault::Write));
            chaos::eventually(Duration::from_secs(20), "the service is given up", || {
                service(stage, &primary)["failures"] != json!([])
            });
            stage.expect_answer(&primary, &["status"], "run `relevo attach mail` there");
            repair(stage, &primary, &other);
        },
    );
}

/// The last replica can't read: `on-io-error` decides whether only the reader hears of it.
#[test]
fn read_errors_of_the_last_replica_are_passed_on_or_take_it_out_of_use() {
    let test = "read_errors_of_the_last_replica_are_passed_on_or_take_it_out_of_use";
    Stage::play(&pair_with_faulty_disks(test), |stage, _| {
        let (primary, other) = alone(stage);
        for (policy, disk) in [("pass_on", "UpToDate"), ("detach", "Failed")] {
            let set = format!("on-io-error={policy}");
            stage.say(&primary, &["volume", "set", "mail", &set]);
            stage.disk(&primary).set(Some(Fault::Read));
            chaos::eventually(Duration::from_secs(20), "reads fail", || {
                stage.disk(&primary).hits() > 3 || disk == "Failed"
            });
            let state = || {
                let volume = stage.volume();
                let replicas = volume["replicas"].as_array().unwrap().clone();
                let mine = replicas.iter().find(|replica| replica["node"] == *primary);
                mine.unwrap()["disk"].clone()
            };
            chaos::eventually(Duration::from_secs(20), policy, || state() == disk);
            stage.disk(&primary).set(None);
            if disk == "Failed" {
                stage.say(&primary, &["attach", "mail"]);
            }
            stage.expect_progress();
        }
        stage.start(&other);
        stage.expect_whole();
    });
}

/// A disk that does not answer while it is opened holds up nothing: the daemon starts, says so, and takes the
/// replica when the disk is back.
#[test]
fn a_disk_that_hangs_at_the_start_is_told() {
    Stage::play(
        &pair_with_faulty_disks("a_disk_that_hangs_at_the_start_is_told"),
        |stage, _| {
            let victim = stage.secondary();
            stage.kill(&victim);
            stage.disk(&victim).set(Some(Fault::Hang));
            stage.start(&victim);
            stage.expect_answer(&victim, &["events"], "its disk does not answer");
            stage.expect_answer(&victim, &["status"], "its disk does not answer");
            stage.expect_progress();
            stage.disk(&victim).set(None);
            stage.expect_whole();
        },
    );
}
