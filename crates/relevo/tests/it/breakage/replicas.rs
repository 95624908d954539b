//! Replicas that come and go under load.

use std::{thread::sleep, time::Duration};

use chaos::Stage;

use super::{pair, trio};

#[test]
fn a_replica_is_removed_and_added_under_load() {
    let plan = trio("a_replica_is_removed_and_added_under_load");
    Stage::play(&plan, |stage, _| {
        let primary = stage.primary();
        let victim = stage.secondary();
        let refused =
            stage.expect_refusal(&primary, &["volume", "replica", "remove", "mail", &primary]);
        assert!(refused.contains("is primary of the volume"), "{refused}");
        stage.say(&primary, &["volume", "replica", "remove", "mail", &victim]);
        let rest: Vec<&str> = stage
            .data_nodes()
            .iter()
            .map(String::as_str)
            .filter(|name| *name != victim)
            .collect();
        stage.expect_replicas_on(&rest);
        stage.expect_progress();
        stage.say(&victim, &["volume", "replica", "add", "mail", &victim]);
    });
}

#[test]
fn a_replica_is_moved_under_load() {
    Stage::play(&trio("a_replica_is_moved_under_load"), |stage, _| {
        let primary = stage.primary();
        let from = stage.secondary();
        let names: Vec<String> = stage.data_nodes().to_vec();
        let to = names
            .iter()
            .find(|name| **name != primary && **name != from)
            .unwrap();
        stage.say(&primary, &["volume", "replica", "remove", "mail", to]);
        stage.expect_replicas_on(&[&primary, &from]);
        stage.say(&primary, &["volume", "replica", "move", "mail", &from, to]);
        stage.expect_replicas_on(&[&primary, to]);
        stage.expect_progress();
        // The primary's goes when another one is primary.
        stage.say(
            &primary,
            &["volume", "replica", "move", "mail", &primary, &from],
        );
        stage.say(&primary, &["service", "move", "mail", to]);
        stage.expect_replicas_on(&[to, &from]);
        stage.expect_progress();
        stage.say(&from, &["volume", "replica", "add", "mail", &primary]);
    });
}

/// The node hears of the removal and of the new replica only when it is back.
#[test]
fn a_replica_is_replaced_while_its_node_is_away() {
    let plan = trio("a_replica_is_replaced_while_its_node_is_away");
    Stage::play(&plan, |stage, _| {
        let primary = stage.primary();
        let victim = stage.secondary();
        stage.kill(&victim);
        stage.expect_out_of_sync(&victim);
        stage.say(&primary, &["volume", "replica", "remove", "mail", &victim]);
        let mut adding = stage.begin(&primary, &["volume", "replica", "add", "mail", &victim]);
        stage.expect_progress();
        stage.start(&victim);
        assert!(adding.wait().unwrap().success());
    });
}

#[test]
fn a_replica_is_detached_attached_and_invalidated() {
    let plan = trio("a_replica_is_detached_attached_and_invalidated");
    Stage::play(&plan, |stage, _| {
        let primary = stage.primary();
        let victim = stage.secondary();
        let refused = stage.expect_refusal(&primary, &["detach", "mail"]);
        assert!(refused.contains("this node is primary"), "{refused}");
        let refused = stage.expect_refusal(&primary, &["invalidate", "mail"]);
        assert!(refused.contains("this node is primary"), "{refused}");
        let refused = stage.expect_refusal(&victim, &["outdate", "mail"]);
        assert!(refused.contains("connected to the primary"), "{refused}");

        stage.say(&victim, &["down", "mail"]);
        stage.expect_out_of_sync(&victim);
        assert_eq!(stage.say(&victim, &["role", "mail"]), "Secondary\n");
        stage.expect_answer(&victim, &["dstate", "mail"], &format!("{victim} Diskless"));
        stage.expect_progress();
        stage.say(&victim, &["up", "mail"]);
        stage.expect_whole();
        stage.expect_answer(&victim, &["dstate", "mail"], &format!("{victim} UpToDate"));

        stage.say(&victim, &["disconnect", "mail", &primary]);
        stage.expect_out_of_sync(&victim);
        stage.expect_answer(&victim, &["cstate", "mail"], "StandAlone");
        stage.expect_progress();
        stage.say(&victim, &["connect", "mail"]);
        stage.expect_whole();

        stage.say(&victim, &["invalidate", "mail"]);
        stage.expect_progress();
        stage.expect_whole();
    });
}

/// `wait-sync`, on any node: at once where all is well, with what is missing when its time is over, and else as
/// long as the resync takes.
#[test]
fn a_person_waits_until_all_are_in_sync() {
    Stage::play(&pair("a_person_waits_until_all_are_in_sync"), |stage, _| {
        let (primary, victim) = (stage.primary(), stage.secondary());
        stage.say(&primary, &["wait-sync", "mail", "--timeout", "20"]);
        stage.kill(&victim);
        stage.expect_out_of_sync(&victim);
        for node in [&primary[..], "wit"] {
            let refused = stage.expect_refusal(node, &["wait-sync", "mail", "--timeout", "1"]);
            assert!(refused.contains(&victim), "{refused}");
        }
        let mut waiting = stage.begin("wit", &["wait-sync", "mail", "--timeout", "60"]);
        sleep(Duration::from_secs(2));
        assert!(waiting.try_wait().unwrap().is_none(), "it does not wait");
        stage.start(&victim);
        assert!(waiting.wait().unwrap().success());
        let in_sync = stage.volume()["in_sync"].to_string();
        assert!(in_sync.contains(&victim), "{in_sync}");
    });
}

/// Nobody uses the volume, a replica comes back that missed something: it need not wait for the next user.
#[test]
fn a_replica_is_resynced_while_nobody_uses_the_volume() {
    let plan = trio("a_replica_is_resynced_while_nobody_uses_the_volume");
    Stage::play(&plan, |stage, _| {
        let primary = stage.primary();
        let victim = stage.secondary();
        stage.kill(&victim);
        stage.expect_out_of_sync(&victim);
        stage.expect_progress();
        stage.say(&primary, &["service", "stop", "mail"]);
        assert_eq!(stage.say(&primary, &["role", "mail"]), "Secondary\n");
        stage.start(&victim);
        stage.expect_whole();
        assert_eq!(stage.volume()["primary"], serde_json::Value::Null);
        assert_eq!(stage.say(&primary, &["role", "mail"]), "Secondary\n");
        // And it is over then.
        stage.expect_answer(&primary, &["status"], "no primary, in sync");
        stage.start_service();
        stage.expect_progress();
    });
}
