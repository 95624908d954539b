//! Cut cables, one-way networks, a port that is blocked.

use std::thread::sleep;

use chaos::{Direction, Stage};

use super::{DEAD, pair, trio};

/// Of the data port, by default.
pub(super) const DATA_PORT: u16 = 7622;

#[test]
fn a_secondary_is_cut_off() {
    Stage::play(&pair("a_secondary_is_cut_off"), |stage, _| {
        let victim = stage.secondary();
        stage.cables.set(&victim, false);
        stage.expect_out_of_sync(&victim);
        stage.expect_progress();
        stage.cables.set(&victim, true);
    });
}

#[test]
fn the_primary_is_cut_off_and_replaced() {
    Stage::play(&pair("the_primary_is_cut_off_and_replaced"), |stage, _| {
        let victim = stage.primary();
        stage.cables.set(&victim, false);
        stage.expect_takeover_from(&victim);
        stage.expect_progress();
        stage.cables.set(&victim, true);
    });
}

/// Too short for anybody to be given up.
#[test]
fn a_cable_is_pulled_for_a_moment() {
    Stage::play(&trio("a_cable_is_pulled_for_a_moment"), |stage, _| {
        for name in stage.data_nodes().to_vec() {
            stage.cables.set(&name, false);
            sleep(DEAD / 10);
            stage.cables.set(&name, true);
            sleep(DEAD / 2);
        }
    });
}

#[test]
fn one_way_networks() {
    Stage::play(&pair("one_way_networks"), |stage, _| {
        for direction in [Direction::In, Direction::Out] {
            for primary in [false, true] {
                let victim = if primary {
                    stage.primary()
                } else {
                    stage.secondary()
                };
                stage.cables.drop_all(&victim, direction);
                if primary {
                    stage.expect_takeover_from(&victim);
                } else {
                    stage.expect_out_of_sync(&victim);
                }
                stage.expect_progress();
                stage.cables.undo_drops(&victim);
                stage.settle();
            }
        }
    });
}

/// Heartbeats and the control log go on: nothing moves.
#[test]
fn only_the_data_port_is_blocked() {
    Stage::play(&pair("only_the_data_port_is_blocked"), |stage, _| {
        let (primary, victim) = (stage.primary(), stage.secondary());
        stage.cables.drop_port(&victim, DATA_PORT);
        stage.expect_out_of_sync(&victim);
        stage.expect_progress();
        assert_eq!(stage.primary(), primary);
        stage.cables.undo_drops(&victim);
    });
}

/// Each change makes the links anew: a member is missing for a moment, as after a cut cable.
#[test]
fn encryption_of_links_is_switched_under_load() {
    let test = "encryption_of_links_is_switched_under_load";
    Stage::play(&pair(test), |stage, _| {
        for value in ["off", "on"] {
            let primary = stage.primary();
            let option = format!("encryption={value}");
            stage.say(&primary, &["volume", "set", "mail", &option]);
            stage.expect_answer(&primary, &["volume", "options", "mail"], &option);
            stage.settle();
            let victim = stage.secondary();
            stage.cables.set(&victim, false);
            stage.expect_out_of_sync(&victim);
            stage.expect_progress();
            stage.cables.set(&victim, true);
            stage.settle();
        }
    });
}

/// The replication path alone is cut: the link is lost and made on the other path. When the path is back the
/// link goes on there, and nobody leaves the in-sync set for that.
#[test]
fn a_link_goes_back_to_its_path_and_nobody_notices() {
    let test = "a_link_goes_back_to_its_path_and_nobody_notices";
    Stage::play(&pair(test), |stage, _| {
        let victim = stage.secondary();
        let epoch = |stage: &Stage| stage.volume()["epoch"].as_u64().unwrap();
        let before = epoch(stage);
        stage.cables.set_one(&victim, "repl", false);
        chaos::eventually(DEAD * 4, "the link is lost and made anew", || {
            epoch(stage) > before + 1
        });
        stage.expect_whole();
        let before = epoch(stage);
        stage.cables.set_one(&victim, "repl", true);
        sleep(DEAD * 2);
        // It is on that path again: without the other one nothing changes either.
        stage.cables.set_one(&victim, "lan", false);
        sleep(DEAD);
        stage.expect_progress();
        assert_eq!(epoch(stage), before, "nobody left");
        stage.cables.set_one(&victim, "lan", true);
    });
}
