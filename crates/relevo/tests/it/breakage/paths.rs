//! Three networks, one of them with IPv6 only, and a stream that carries heartbeats only: added while the volume is in
//! use, cut one after another, taken away again.

use std::{thread::sleep, time::Duration};

use chaos::{Cables, Stage, eventually};
use serde_json::Value;

use super::{DEAD, pair};

const BOUND: Duration = Duration::from_secs(20);

const MEMBERS: [&str; 3] = ["alfa", "beta", "wit"];

/// Every node is on the network `six`, too.
fn add_six(stage: &Stage) {
    for (number, name) in (1..).zip(MEMBERS) {
        let address = Cables::six(number).to_string();
        // One asks another one for it.
        let done = stage.say("alfa", &["node", "path", "add", name, "six", &address]);
        assert!(
            done.contains(&format!("Node {name} uses the path six")),
            "{done}"
        );
    }
}

/// A stream between the data nodes. `name` is part of its place.
fn add_stream(stage: &Stage, name: &str) {
    let address = format!("unix:{}/{name}.sock", stage.directory().display());
    for node in ["alfa", "beta"] {
        stage.say(node, &["node", "path", "add", node, name, &address]);
    }
}

fn remove(stage: &Stage, node: &str, name: &str) {
    stage.say("beta", &["node", "path", "remove", node, name]);
}

/// A path to `to`, as `from` sees it.
fn path(stage: &Stage, from: &str, to: &str, name: &str) -> Value {
    let status = stage.status(from);
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    let node = nodes.into_iter().find(|node| node["name"] == to);
    let paths = node.and_then(|node| node["paths"].as_array().cloned());
    let found = paths
        .into_iter()
        .flatten()
        .find(|path| path["name"] == name);
    found.unwrap_or(Value::Null)
}

fn expect_up(stage: &Stage, from: &str, to: &str, names: &[&str]) {
    for name in names {
        let what = format!("{name} from {from} to {to} is up");
        eventually(BOUND, &what, || {
            let path = path(stage, from, to, name);
            path["up"] == true && path["trouble"].is_null() && path["jitter_us"].is_u64()
        });
    }
}

fn epoch(stage: &Stage) -> u64 {
    stage.volume()["epoch"].as_u64().unwrap()
}

/// Nobody was evicted, as far as a node knows, and the primary is who it was.
fn expect_nothing_moved(stage: &Stage, asked: &str, primary: &str) {
    let status = stage.status(asked);
    for node in status["nodes"].as_array().unwrap() {
        assert_eq!(node["evicted"], false, "{status:#}");
    }
    assert_eq!(stage.primary(), primary);
}

#[test]
fn networks_are_cut_one_after_another() {
    Stage::play(
        &pair("networks_are_cut_one_after_another"),
        |stage, round| {
            if round == 1 {
                add_six(stage);
                add_stream(stage, "ser");
            }
            let (primary, victim) = (stage.primary(), stage.secondary());
            expect_up(stage, &primary, &victim, &["lan", "repl", "six", "ser"]);
            expect_up(stage, &victim, &primary, &["lan", "repl", "six", "ser"]);
            expect_up(stage, "wit", &victim, &["lan", "repl", "six"]);
            let stream = path(stage, &primary, &victim, "ser");
            assert_eq!(stream["carries"], "heartbeats", "{stream}");
            // The stream takes no part in replication.
            for (cut, left) in [("repl", 3), ("lan", 2)] {
                let before = epoch(stage);
                stage.cables.set_one(&victim, cut, false);
                let alarm = format!("path {cut} to node {victim} is down");
                stage.expect_answer(&primary, &["status"], &alarm);
                let event = format!("path {cut} to {victim} is down: no heartbeat arrives on it");
                stage.expect_answer(&primary, &["events"], &event);
                // The link was on this one: it is made on another.
                eventually(BOUND, "the link is made anew", || epoch(stage) > before + 1);
                stage.expect_whole();
                stage.expect_progress();
                expect_nothing_moved(stage, &primary, &primary);
                let up =
                    ["lan", "repl", "six", "ser"].map(|name| path(stage, &primary, &victim, name));
                assert_eq!(up.iter().filter(|path| path["up"] == true).count(), left);
            }
            // On the network with IPv6 alone: the control log too.
            for extents in ["600", "700"] {
                let option = format!("congestion-extents={extents}");
                stage.say(&victim, &["volume", "set", "mail", &option]);
            }
            stage.cables.set(&victim, true);
            for name in ["lan", "repl"] {
                let event = format!("path {name} to {victim} is in order again");
                stage.expect_answer(&primary, &["events"], &event);
            }
            eventually(BOUND, "no alarm is left", || {
                !stage.ask(&primary, &["status"]).contains(" to node ")
            });
            expect_nothing_moved(stage, &primary, &primary);
        },
    );
}

/// The link leaves a path that is removed, and goes to one that is marked: nobody leaves the in-sync set.
#[test]
fn networks_come_and_go_and_nobody_notices() {
    Stage::play(
        &pair("networks_come_and_go_and_nobody_notices"),
        |stage, round| {
            if round == 1 {
                add_six(stage);
            }
            stage.settle();
            let (primary, victim) = (stage.primary(), stage.secondary());
            let before = epoch(stage);
            let address = path(stage, &victim, &victim, "repl")["address"].clone();
            let address = format!("{},replication", address.as_str().unwrap());
            remove(stage, &victim, "repl");
            sleep(DEAD);
            stage.expect_progress();
            // The link is elsewhere already: to cut this one breaks nothing.
            stage.cables.set_one(&victim, "repl", false);
            sleep(DEAD);
            stage.expect_progress();
            assert!(
                path(stage, &primary, &victim, "repl").is_null(),
                "they share it no more"
            );
            stage.cables.set_one(&victim, "repl", true);
            assert_eq!(epoch(stage), before, "nobody left");
            // Back again, on the other side's word.
            let done = stage.say(
                &primary,
                &["node", "path", "add", &victim, "repl", &address],
            );
            assert!(
                done.contains(&format!("with {primary}")) || done.contains("alfa, wit"),
                "{done}"
            );
            expect_up(stage, &primary, &victim, &["repl"]);
            sleep(DEAD);
            stage.expect_progress();
            assert_eq!(epoch(stage), before, "nobody left");
            // The link is on it. While it is made anew, on this one first, its path goes.
            stage.cables.set_one(&victim, "repl", false);
            eventually(BOUND, "the link is lost with it", || epoch(stage) > before);
            remove(stage, &victim, "repl");
            stage.expect_whole();
            stage.expect_progress();
            stage.cables.set_one(&victim, "repl", true);
            stage.say(
                &primary,
                &["node", "path", "add", &victim, "repl", &address],
            );
            expect_up(stage, &primary, &victim, &["repl"]);
            expect_nothing_moved(stage, &primary, &primary);

            // What would cut them apart is refused.
            stage.cables.set_one(&victim, "lan", false);
            stage.cables.set_one(&victim, "six", false);
            let why = format!("path six to node {victim} is down");
            stage.expect_answer(&primary, &["status"], &why);
            let err = stage.expect_refusal(&primary, &["node", "path", "remove", &victim, "repl"]);
            assert!(err.contains("only network between"), "{err}");
            stage.cables.set(&victim, true);
            expect_up(stage, &primary, &victim, &["lan", "six", "repl"]);
        },
    );
}

/// All networks of a node are cut, the stream is not: it counts as alive, and can do nothing that needs more than
/// heartbeats.
#[test]
fn a_stream_alone_is_left() {
    Stage::play(&pair("a_stream_alone_is_left"), |stage, round| {
        if round == 1 {
            add_stream(stage, "ser");
        }
        let (primary, secondary) = (stage.primary(), stage.secondary());
        expect_up(stage, &primary, &secondary, &["lan", "repl", "ser"]);
        let alone = |of: &str| format!("node {of} is heard on ser alone");
        let state_of = |stage: &Stage, asked: &str, of: &str| {
            let status = stage.status(asked);
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            nodes.into_iter().find(|node| node["name"] == of).unwrap()["state"].clone()
        };

        // The secondary's: it leaves the in-sync set, as with a cut data network.
        stage.cables.set(&secondary, false);
        stage.expect_out_of_sync(&secondary);
        stage.expect_progress();
        stage.expect_answer(&primary, &["status"], &alone(&secondary));
        stage.expect_answer(&secondary, &["status"], &alone(&primary));
        sleep(DEAD);
        assert_eq!(state_of(stage, &primary, &secondary), "alive");
        assert_eq!(state_of(stage, &secondary, &primary), "alive");
        expect_nothing_moved(stage, &primary, &primary);
        stage.cables.set(&secondary, true);
        stage.expect_whole();

        // Everybody's: no majority can decide, both hold their lease, writes wait.
        for name in MEMBERS {
            stage.cables.set(name, false);
        }
        stage.expect_answer(&primary, &["status"], &alone(&secondary));
        sleep(DEAD);
        let writes = stage.writes();
        sleep(DEAD);
        assert_eq!(stage.writes(), writes, "nothing is acknowledged");
        for (asked, of) in [(&primary, &secondary), (&secondary, &primary)] {
            assert_eq!(state_of(stage, asked, of), "alive");
            let status = stage.status(asked);
            assert_eq!(status["quorum"]["lease"]["held"], true, "{status:#}");
        }
        stage.expect_answer(&primary, &["status"], "volume mail waits");
        for name in MEMBERS {
            stage.cables.set(name, true);
        }
        stage.expect_progress();
        stage.expect_whole();
        expect_nothing_moved(stage, &primary, &primary);

        // The primary's: it is alive, so nobody takes over, and its writes wait until a network is back.
        stage.cables.set(&primary, false);
        stage.expect_answer(&secondary, &["status"], &alone(&primary));
        sleep(DEAD * 2);
        expect_nothing_moved(stage, &secondary, &primary);
        stage.cables.set(&primary, true);
        stage.expect_progress();
        stage.expect_whole();
        expect_nothing_moved(stage, &secondary, &primary);
    });
}

/// The stream's other end dies and comes back, and the daemon with it.
#[test]
fn a_stream_is_found_again_after_a_restart() {
    Stage::play(
        &pair("a_stream_is_found_again_after_a_restart"),
        |stage, round| {
            if round == 1 {
                add_stream(stage, "ser");
                add_six(stage);
            }
            for name in ["alfa", "beta"] {
                expect_up(stage, "alfa", "beta", &["ser", "six"]);
                expect_up(stage, "beta", "alfa", &["ser", "six"]);
                stage.settle();
                stage.kill(name);
                stage.start(name);
            }
            expect_up(stage, "alfa", "beta", &["lan", "repl", "ser", "six"]);
            expect_up(stage, "beta", "alfa", &["lan", "repl", "ser", "six"]);
        },
    );
}
