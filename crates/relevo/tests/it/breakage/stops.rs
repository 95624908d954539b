//! SIGSTOP: a process that holds still for longer than the dead time, and goes on as if nothing
//! had been.

use std::thread::sleep;

use chaos::Stage;

use super::{DEAD, pair, trio};

#[test]
fn a_secondary_holds_still() {
    Stage::play(&pair("a_secondary_holds_still"), |stage, _| {
        let victim = stage.secondary();
        stage.stop(&victim);
        stage.expect_out_of_sync(&victim);
        stage.expect_progress();
        stage.go_on(&victim);
    });
}

#[test]
fn the_primary_holds_still_and_is_replaced() {
    Stage::play(
        &pair("the_primary_holds_still_and_is_replaced"),
        |stage, _| {
            let victim = stage.primary();
            stage.stop(&victim);
            stage.expect_takeover_from(&victim);
            stage.expect_progress();
            stage.go_on(&victim);
        },
    );
}

/// All but the primary: it can get nothing acknowledged, and must not.
#[test]
fn everybody_else_holds_still() {
    Stage::play(&trio("everybody_else_holds_still"), |stage, _| {
        let primary = stage.primary();
        let others: Vec<String> = stage
            .data_nodes()
            .iter()
            .filter(|name| **name != primary)
            .cloned()
            .collect();
        for name in &others {
            stage.stop(name);
        }
        sleep(DEAD);
        let before = stage.writes();
        sleep(DEAD / 2);
        assert_eq!(stage.writes(), before, "acknowledged without a majority");
        for name in &others {
            stage.go_on(name);
        }
    });
}
