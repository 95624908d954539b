//! Replicas that come and go while the volume is in use.

use relevo_replication::{DiskState, PeerState};
use relevo_types::cluster::Command;

use crate::world::{A, B, C, World};

fn block(world: &World, node: relevo_types::NodeId, number: u64) -> u8 {
    world.block(node, number)[0]
}

#[test]
fn a_replica_that_is_added_gets_everything_and_joins() {
    let mut world = World::opened(3, 1024, A);
    world.remove_replica(C);
    world.pass_ms(10);
    assert!(!world.status(A).peers.contains_key(&C));
    for number in 0..300 {
        world.write(A, number, 1, 5);
    }
    world.pass_ms(10);
    world.add_replica(C);
    world.pass_ms(5);
    assert_eq!(world.status(C).disk, DiskState::Inconsistent);
    world.connect_all();
    world.pass_ms(200);
    assert!(world.volume().in_sync.contains(&C));
    assert!(world.same(A, C));
    assert_eq!(world.status(A).peers[&C], PeerState::Established);
    assert_eq!(world.status(C).disk, DiskState::UpToDate);
}

#[test]
fn what_waits_for_a_removed_replica_goes_on() {
    let mut world = World::opened(3, 1024, A);
    world.silence(A, C);
    let write = world.write(A, 7, 1, 9);
    world.pass_ms(50);
    assert!(!world.is_acked(write));
    world.remove_replica(C);
    world.pass_ms(10);
    assert!(world.is_acked(write));
    assert_eq!(block(&world, B, 7), 9);
}

/// Nobody but the new replica itself says that it lacks everything, so it must say so to whoever is
/// primary then, also after it lost power half-way.
#[test]
fn an_added_replica_knows_that_it_has_nothing_whoever_is_primary() {
    let mut world = World::opened(3, 1024, A);
    world.write(A, 900, 1, 3);
    world.pass_ms(10);
    world.remove_replica(C);
    world.pass_ms(10);
    world.add_replica(C);
    world.pass_ms(5);
    world.connect(A, C);
    world.run();
    world.crash(C, true);
    world.crash(A, true);
    world.evict(A);
    world.promote(B);
    world.start(C);
    world.connect_all();
    world.pass_ms(2000);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.volume());
    assert_eq!(block(&world, C, 900), 3);
    assert!(world.same(B, C));
}

#[test]
fn the_slot_of_a_removed_replica_serves_the_next() {
    let mut world = World::opened(3, 1024, A);
    for round in 1..4 {
        world.remove_replica(C);
        for number in 0..40 {
            world.write(A, number * round, 1, 10 + u8::try_from(round).unwrap());
        }
        world.pass_ms(10);
        world.add_replica(C);
        world.connect_all();
        world.pass_ms(200);
        assert!(world.same(A, C), "round {round}");
        assert!(world.volume().in_sync.contains(&C));
    }
}

/// B hears of the new replica only in band. What A sent to it and to B when it was lost again, B must
/// know to be missing there, although its own configuration does not list that replica.
#[test]
fn a_member_marks_for_a_replica_that_it_was_not_told_of() {
    let mut world = World::opened(3, 1024, A);
    let old_slot = world.volume().slot(C);
    world.node(B).control = false;
    world.remove_replica(C);
    world.pass_ms(10);
    // Another slot than the old one, which B knows: slots are chosen by the version.
    while world.volume().version % 7 != 4 {
        let volume = world.volume().clone();
        world.command(&Command::SetVolumeOptions {
            volume: volume.id,
            expect: volume.version,
            options: volume.options,
        });
    }
    world.add_replica(C);
    assert_ne!(world.volume().slot(C), old_slot);
    world.connect_all();
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.volume());

    world.silence(A, C);
    let write = world.write(A, 500, 1, 9);
    world.pass_ms(1100);
    assert!(world.is_acked(write), "C has left");
    world.crash(A, true);
    world.node(B).control = true;
    world.evict(A);
    world.promote(B);
    world.end_silence();
    world.pass_ms(2500);
    world.connect_all();
    world.pass_ms(2500);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.volume());
    assert_eq!(block(&world, C, 500), 9);
}
