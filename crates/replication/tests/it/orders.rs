//! Orders of an operator.

use relevo_replication::{DiskState, Order, PeerState};
use relevo_types::{NodeId, cluster::Command};

use crate::world::{A, B, C, World};

#[test]
fn suspended_requests_wait_and_go_on() {
    let mut world = World::opened(2, 1024, A);
    world.order(A, Order::SuspendIo).unwrap();
    let write = world.write(A, 0, 1, 9);
    world.pass_ms(2000);
    assert!(!world.is_acked(write));
    let waiting = world.status(A).waiting.unwrap();
    assert!(waiting.contains("resume-io"), "{waiting}");
    world.order(A, Order::ResumeIo).unwrap();
    world.pass_ms(10);
    assert!(world.is_acked(write));
    assert_eq!(world.status(A).waiting, None);
}

#[test]
fn a_disconnected_replica_stays_alone_until_it_is_connected() {
    let mut world = World::opened(3, 1024, A);
    world.order(A, Order::Disconnect { peer: Some(B) }).unwrap();
    world.pass_ms(10);
    assert_eq!(world.status(A).peers[&B], PeerState::StandAlone);
    assert_eq!(world.status(A).peers[&C], PeerState::Established);
    let write = world.write(A, 0, 1, 9);
    world.pass_ms(10);
    assert!(world.is_acked(write), "B has left the set");
    for _ in 0..3 {
        world.connect(A, B);
        world.pass_ms(100);
    }
    assert_eq!(world.status(A).peers[&B], PeerState::StandAlone);
    assert!(!world.volume().in_sync.contains(&B));

    world.order(A, Order::Connect { peer: None }).unwrap();
    world.connect(A, B);
    world.pass_ms(100);
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
    assert!(world.volume().in_sync.contains(&B));
    assert!(world.same(A, B));
}

#[test]
fn orders_that_cannot_be_are_refused_with_a_reason() {
    let mut world = World::opened(2, 1024, A);
    let peer = Some(NodeId(7));
    let error = world.order(A, Order::Disconnect { peer }).unwrap_err();
    assert!(error.contains("no other replica"), "{error}");
    let error = world
        .order(A, Order::Connect { peer: Some(A) })
        .unwrap_err();
    assert!(error.contains("no other replica"), "{error}");
}

#[test]
fn an_invalidated_replica_is_copied_anew() {
    let mut world = World::opened(2, 1024, A);
    world.write(A, 9, 1, 5);
    world.pass_ms(10);
    // What nobody knows of: the disk of B lies.
    world.node(B).disk.write(9 * 4096, &[7; 4096]);
    let error = world.order(A, Order::Invalidate).unwrap_err();
    assert!(error.contains("primary"), "{error}");
    world.order(B, Order::Invalidate).unwrap();
    world.pass_ms(5);
    world.connect(A, B);
    world.pass_ms(500);
    assert!(world.volume().in_sync.contains(&B), "{:?}", world.volume());
    assert_eq!(world.status(B).disk, DiskState::UpToDate);
    assert!(world.same(A, B));
}

#[test]
fn requests_fail_without_a_majority_if_that_was_chosen() {
    let mut world = World::opened(2, 1024, A);
    world.silence(A, B);
    world.node(A).control = false;
    let write = world.write(A, 0, 1, 9);
    world.lease(A, std::time::Duration::from_millis(500));
    world.pass_ms(3000);
    assert!(!world.is_answered(write), "by default they wait");

    let volume = world.volume().clone();
    let mut options = volume.options.clone();
    options
        .set(&world.control, "on-no-quorum", "io-error")
        .unwrap();
    world.node(A).control = true;
    world.commits = false;
    world.command(&Command::SetVolumeOptions {
        volume: volume.id,
        expect: volume.version,
        options,
    });
    world.pass_ms(10);
    assert!(world.is_answered(write) && !world.is_acked(write));
    let later = world.write(A, 0, 1, 9);
    assert!(world.is_answered(later) && !world.is_acked(later));

    world.lease(A, std::time::Duration::from_secs(100));
    world.commits = true;
    world.pass_ms(500);
    let later = world.write(A, 0, 1, 9);
    world.pass_ms(10);
    assert!(world.is_acked(later), "B has left the set");
}
