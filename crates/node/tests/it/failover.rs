//! Nodes die, are cut off, come back.

use relevo_node::Phase;
use relevo_types::LeaseGeneration;

use crate::cluster::{A, B, Cluster, MAIL, W};

const TAKEOVER: [&str; 5] = [
    "commit promote n2",
    "start export",
    "start process",
    "start address",
    "commit evict n1",
];

#[test]
fn the_other_takes_over_after_the_silence_without_any_further_delay() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.kill(A);
    let took = cluster.run_until(3000, |cluster| cluster.serves(B));
    // One second of silence, counted from the last heartbeat; then: persist 2, say 1, evict and
    // acquire 4 + 1, promote 4 + 1, open 10, two parts of 5 each, none of them after a poll.
    assert!(
        (900..=1040).contains(&took),
        "{took} ms\n{}",
        cluster.story(from)
    );
    assert_eq!(cluster.words(B, from), &TAKEOVER[..4]);
    let leader = cluster.words(W, from);
    assert_eq!(leader, ["commit evict n1", "commit acquire n2"]);
}

#[test]
fn the_leader_itself_dies() {
    let mut cluster = Cluster::running();
    cluster.elect(A);
    cluster.run(1000);
    let from = cluster.now;
    cluster.kill(A);
    // The control log elects before the silence is long enough, or after.
    cluster.run(400);
    cluster.elect(B);
    cluster.run_until(2000, |cluster| cluster.serves(B));
    assert!(cluster.words(B, from).contains(&TAKEOVER[4]));
}

#[test]
fn a_leader_elected_late_acts_at_once() {
    let mut cluster = Cluster::running();
    cluster.elect(A);
    cluster.run(1000);
    cluster.kill(A);
    cluster.run(3000);
    cluster.elect(W);
    let took = cluster.run_until(1000, |cluster| cluster.serves(B));
    assert!(took <= 50, "{took} ms");
}

#[test]
fn a_node_that_was_cut_off_stops_by_force_and_is_let_in_again() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.cut.insert(A);
    cluster.run(1500);
    // It can't know what happened, but its lease is over before the others act.
    assert_eq!(cluster.words(A, from)[..1], ["lease lost"]);
    let lost = cluster
        .trace
        .iter()
        .find(|(_, _, words)| words == "lease lost");
    let evicted = cluster
        .trace
        .iter()
        .find(|(_, _, words)| words == "commit evict n1");
    assert!(lost.unwrap().0 < evicted.unwrap().0);
    assert_eq!(cluster.state.services[&MAIL].holder, Some(B));
    let back = cluster.now;
    cluster.cut.clear();
    cluster.tell_all_state();
    cluster.run_until(1000, |cluster| cluster.serves(B));
    assert_eq!(
        cluster.words(A, back),
        ["force address", "force process", "force export"]
    );
    cluster.run(1000);
    let lease = cluster.state.nodes[&A].lease;
    assert_eq!(
        (lease.generation, lease.evicted),
        (LeaseGeneration(2), false)
    );
    assert!(cluster.serves(B), "it stays where it is");
    let membership = cluster.node(A).status().membership;
    assert!(
        membership.lease_until.0 > cluster.now * 1_000_000,
        "it has a lease again"
    );
}

#[test]
fn a_node_that_died_comes_back_without_moving_anything() {
    let mut cluster = Cluster::running();
    cluster.kill(A);
    cluster.run(2000);
    assert!(cluster.serves(B));
    let from = cluster.now;
    cluster.boot(A);
    cluster.run(2000);
    assert!(cluster.serves(B));
    assert!(!cluster.state.nodes[&A].lease.evicted);
    assert_eq!(
        cluster.words(A, from),
        ["force address", "force process", "force export"],
        "only what might be left over is cleaned up"
    );
    assert!(cluster.node(A).status().services.is_empty());
}

#[test]
fn a_daemon_that_restarts_in_time_keeps_its_service() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.crash_and_restart(A);
    cluster.run(3000);
    assert!(cluster.serves(A));
    assert_eq!(
        cluster.words(A, from),
        [
            "force address",
            "force process",
            "force export",
            "start export",
            "start process",
            "start address",
        ]
    );
    assert_eq!(
        cluster.node(A).status().services[&MAIL].phase,
        Phase::Running
    );
    assert_eq!(cluster.words(W, from), Vec::<&str>::new());
}

#[test]
fn without_a_majority_nothing_moves_and_it_heals() {
    let mut cluster = Cluster::running();
    cluster.kill(W);
    cluster.leader = None;
    cluster.run(1500);
    cluster.elect(B);
    cluster.run(500);
    assert!(cluster.serves(A));
    cluster.cut.insert(A);
    cluster.run(3000);
    assert_eq!(cluster.state.services[&MAIL].holder, Some(A));
    let waits = cluster.node(B).status().waits;
    assert!(waits[0].reason.contains("bring a voter back"), "{waits:?}");
    cluster.boot(W);
    cluster.run_until(3000, |cluster| {
        cluster.state.services[&MAIL].holder == Some(B)
    });
}
