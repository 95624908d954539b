//! SIGKILL.

use chaos::Stage;

use super::{DEAD, pair, trio};

#[test]
fn a_secondary_is_killed_and_comes_back() {
    Stage::play(&pair("a_secondary_is_killed_and_comes_back"), |stage, _| {
        let victim = stage.secondary();
        stage.kill(&victim);
        stage.expect_out_of_sync(&victim);
        stage.expect_progress();
        stage.start(&victim);
    });
}

/// It is back before anybody missed it: what it had not written yet must be found out.
#[test]
fn a_secondary_is_killed_and_back_at_once() {
    Stage::play(
        &pair("a_secondary_is_killed_and_back_at_once"),
        |stage, _| {
            let victim = stage.secondary();
            for _ in 0..3 {
                stage.kill(&victim);
                stage.start(&victim);
            }
        },
    );
}

#[test]
fn the_primary_is_killed_and_the_client_follows() {
    Stage::play(
        &pair("the_primary_is_killed_and_the_client_follows"),
        |stage, _| {
            let victim = stage.primary();
            stage.kill(&victim);
            stage.expect_takeover_from(&victim);
            stage.expect_progress();
            stage.start(&victim);
        },
    );
}

/// The second failure hits the recovery from the first.
#[test]
fn the_next_primary_is_killed_during_the_resync_of_the_first() {
    Stage::play(
        &trio("the_next_primary_is_killed_during_the_resync_of_the_first"),
        |stage, _| {
            let first = stage.primary();
            stage.kill(&first);
            let second = stage.expect_takeover_from(&first);
            stage.start(&first);
            stage.kill(&second);
            stage.expect_takeover_from(&second);
            stage.expect_progress();
            stage.start(&second);
        },
    );
}

#[test]
fn everything_is_killed_at_once() {
    Stage::play(&trio("everything_is_killed_at_once"), |stage, _| {
        let names = stage.data_nodes().to_vec();
        for name in &names {
            stage.kill(name);
        }
        std::thread::sleep(DEAD);
        for name in &names {
            stage.start(name);
        }
    });
}
