//! Disks that alter data by themselves, and comparing replicas while the volume is in use.

use std::{fs::File, os::unix::fs::FileExt as _, time::Duration};

use chaos::Stage;
use serde_json::{Value, json};

use super::pair_with_faulty_disks;

/// Where the disks alter data: what the client never writes, for its next write would put it right.
const PLACES: [u64; 2] = [12 << 20, 13 << 20];

/// The shortest `verify-every`, and time for the comparison itself.
const SCHEDULED: Duration = Duration::from_secs(90);

/// The disk of a node alters a bit in the middle of some blocks. The daemon does not write there, and is told
/// of nothing.
fn alter(stage: &Stage, name: &str, places: &[u64]) {
    let behind = stage.disk(name).behind();
    let file = File::options().read(true).write(true).open(behind).unwrap();
    for place in places {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place + 2000).unwrap();
        byte[0] ^= 0x10;
        file.write_all_at(&byte, place + 2000).unwrap();
    }
}

/// What the status of a node says of a replica.
fn differs(stage: &Stage, at: &str, of: &str) -> Value {
    let status: Value = serde_json::from_str(&stage.ask(at, &["status", "--json"])).unwrap();
    let volumes = status["cluster"]["volumes"].as_array().unwrap();
    let replicas = volumes[0]["replicas"].as_array().unwrap();
    let replica = replicas.iter().find(|replica| replica["node"] == of);
    replica.unwrap()["differs"].clone()
}

/// How often the events of a node say so.
fn told(stage: &Stage, at: &str, words: &str) -> usize {
    stage.ask(at, &["events"]).matches(words).count()
}

/// Compares, and waits until the primary says that nothing differs.
fn expect_clean(stage: &Stage) {
    let primary = stage.primary();
    let before = told(stage, &primary, "no difference");
    stage.say(&primary, &["verify", "mail"]);
    chaos::eventually(Duration::from_secs(40), "nothing differs", || {
        told(stage, &primary, "no difference") > before
    });
}

/// The client writes all the while: that is never taken for damage. What is one is told with its places on
/// every node, changes nothing by itself, is repaired when a person says so, and is gone then.
#[test]
fn silent_corruption_is_found_under_load() {
    Stage::play(
        &pair_with_faulty_disks("silent_corruption_is_found_under_load"),
        |stage, _| {
            for _ in 0..3 {
                expect_clean(stage);
            }
            let primary = stage.primary();
            let victim = stage.secondary();
            alter(stage, &victim, &PLACES);
            stage.say(&primary, &["verify", "mail"]);
            let words = "2 blocks of 4 KiB differ, at bytes 12582912+4096, 13631488+4096";
            stage.expect_answer(&primary, &["events"], words);
            let found = json!({
                "from": primary,
                "bytes": 8192,
                "places": [[PLACES[0], 4096], [PLACES[1], 4096]],
                "repair": false,
            });
            for node in ["alfa", "beta", "wit"] {
                chaos::eventually(Duration::from_secs(5), "every node knows it", || {
                    differs(stage, node, &victim) == found
                });
            }
            let status = stage.ask(&primary, &["status"]);
            assert!(
                status.contains("which of the two is right is not known"),
                "{status}"
            );
            let in_sync = stage.volume()["in_sync"].to_string();
            assert!(in_sync.contains(&victim), "{in_sync}");

            stage.expect_progress();
            stage.say(&primary, &["verify", "mail", "--repair"]);
            chaos::eventually(Duration::from_secs(40), "it is repaired", || {
                differs(stage, &primary, &victim).is_null()
            });
            stage.expect_whole();
            expect_clean(stage);
        },
    );
}

/// A disk altered data while its machine was down, and nobody asked: the scheduled comparison finds it. A
/// restart of the primary does not forget it.
#[test]
fn silent_corruption_is_found_by_the_clock() {
    Stage::play(
        &pair_with_faulty_disks("silent_corruption_is_found_by_the_clock"),
        |stage, _| {
            let primary = stage.primary();
            let victim = stage.secondary();
            stage.kill(&victim);
            alter(stage, &victim, &PLACES[..1]);
            stage.start(&victim);
            stage.expect_whole();
            let set = ["volume", "set", "mail", "verify-every=1min"];
            stage.say(&primary, &set);
            chaos::eventually(SCHEDULED, "the scheduled comparison finds it", || {
                differs(stage, &primary, &victim)["bytes"] == 4096
            });
            stage.say(&primary, &["volume", "set", "mail", "verify-every=no"]);

            stage.kill(&primary);
            let next = stage.expect_takeover_from(&primary);
            assert_eq!(next, victim, "there is no better one");
            stage.start(&primary);
            stage.expect_whole();
            assert_eq!(differs(stage, &primary, &victim)["bytes"], 4096);
            // A person looked: the first one has the good copy.
            stage.say(&victim, &["service", "move", "mail", &primary]);
            stage.expect_takeover_from(&victim);
            stage.settle();
            stage.say(&victim, &["invalidate", "mail"]);
            chaos::eventually(Duration::from_secs(40), "it is copied anew", || {
                differs(stage, &primary, &victim).is_null()
            });
            stage.expect_whole();
            expect_clean(stage);
        },
    );
}
