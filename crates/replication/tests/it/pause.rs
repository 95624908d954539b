//! Resyncs that an operator pauses, and that are not started over by a lost link or a restart.

use relevo_replication::{Input, Order, PeerState};
use relevo_types::{NodeId, VolumeId};

use crate::world::{A, B, World};

/// Blocks of the volume: 16 regions of the activity log.
const BLOCKS: u64 = 4096;

/// Regions in the activity log: what a crash leaves uncertain at most.
const HOT_BLOCKS: u64 = 2 * 256;

/// B lacks these many blocks, and is not linked.
fn lacking(blocks: u64) -> World {
    let mut world = World::opened(2, 1024, A);
    world.cut(A, B);
    world.pass_ms(100);
    for block in 0..blocks {
        world.write(A, block, 1, 9);
    }
    world.pass_ms(100);
    world
}

fn relink(world: &mut World) {
    world.connect(A, B);
    world.pass_ms(100);
}

fn in_sync(world: &World) -> bool {
    world.volume().in_sync.contains(&B)
        && world.status(A).peers[&B] == PeerState::Established
        && world.same(A, B)
}

fn pauses(by: NodeId) {
    let mut world = lacking(300);
    world.order(by, Order::PauseSync { peer: None }).unwrap();
    for _ in 0..2 {
        relink(&mut world);
        let dirty = 300;
        assert_eq!(world.status(A).peers[&B], PeerState::PausedSyncS { dirty });
        assert_eq!(world.status(B).peers[&A], PeerState::PausedSyncT);
        assert_eq!(world.copied, 0);
        // A lost link ends no pause.
        world.cut(A, B);
        world.pass_ms(100);
    }
    relink(&mut world);
    // Writes are replicated all the same.
    let write = world.write(A, 299, 2, 5);
    world.pass_ms(10);
    assert!(world.is_acked(write));
    assert_eq!(world.block(B, 300), world.block(A, 300));
    // The other side's operator can't end it.
    let other = if by == A { B } else { A };
    world
        .order(other, Order::ResumeSync { peer: None })
        .unwrap();
    world.pass_ms(100);
    assert!(!in_sync(&world));

    world.order(by, Order::ResumeSync { peer: None }).unwrap();
    world.pass_ms(100);
    assert!(in_sync(&world));
    assert_eq!(world.copied, 299, "what a write brought was not copied");
}

#[test]
fn the_source_pauses() {
    pauses(A);
}

#[test]
fn the_target_pauses_by_telling_the_source() {
    pauses(B);
}

/// The node lets it wait for another volume's resync; an operator can't end that, nor that an operator's
/// pause.
#[test]
fn a_resync_waits_for_another_volumes() {
    for by in [A, B] {
        let mut world = lacking(300);
        let first = Some(VolumeId(7));
        world.order(by, Order::HoldSync { after: first }).unwrap();
        assert_eq!(world.status(by).sync_after, first);
        for _ in 0..2 {
            relink(&mut world);
            let dirty = 300;
            assert_eq!(world.status(A).peers[&B], PeerState::PausedSyncS { dirty });
            assert_eq!(world.status(B).peers[&A], PeerState::PausedSyncT);
            world.cut(A, B);
            world.pass_ms(100);
        }
        relink(&mut world);
        world.order(by, Order::PauseSync { peer: None }).unwrap();
        world.order(by, Order::ResumeSync { peer: None }).unwrap();
        world.pass_ms(100);
        assert_eq!((world.copied, in_sync(&world)), (0, false));

        world.order(by, Order::PauseSync { peer: None }).unwrap();
        world.order(by, Order::HoldSync { after: None }).unwrap();
        world.pass_ms(100);
        assert_eq!((world.copied, in_sync(&world)), (0, false));
        world.order(by, Order::ResumeSync { peer: None }).unwrap();
        world.pass_ms(100);
        assert!(in_sync(&world));
    }
}

/// A new replica at B, of which about half is copied; then the resync is paused.
fn half_copied() -> World {
    let mut world = World::with_hot_regions(2, BLOCKS, 1, 2);
    world.connect_all();
    world.run();
    world.promote(A);
    world.pass_ms(10);
    world.lease(A, std::time::Duration::from_secs(3600));
    for block in (0..BLOCKS).step_by(64) {
        world.write(A, block, 64, 7);
        world.run();
    }
    world.cut(A, B);
    world.pass_ms(100);
    world.remove_replica(B);
    world.pass_ms(100);
    world.add_replica(B);
    world.run();
    world.connect(A, B);
    while world.copied < BLOCKS / 2 {
        assert!(world.step(), "the resync stands still");
    }
    world.order(A, Order::PauseSync { peer: None }).unwrap();
    // What was copied gets durable within a second.
    world.pass_ms(1500);
    assert!(world.copied < BLOCKS * 3 / 4);
    world
}

fn goes_on(mut world: World, copied_again: u64) {
    world.connect(A, B);
    world.order(A, Order::ResumeSync { peer: None }).unwrap();
    world.pass_ms(5000);
    assert!(in_sync(&world), "{:?}", world.status(A));
    assert!(
        world.copied <= BLOCKS + copied_again,
        "{} of {BLOCKS} blocks were copied",
        world.copied
    );
    assert!(world.copied >= BLOCKS);
}

#[test]
fn a_lost_link_does_not_start_a_resync_over() {
    let mut world = half_copied();
    world.cut(A, B);
    world.pass_ms(100);
    goes_on(world, 0);
}

#[test]
fn a_restart_of_the_target_does_not_start_a_resync_over() {
    let mut world = half_copied();
    world.input(B, Input::Detach);
    world.pass_ms(100);
    world.start(B);
    world.pass_ms(100);
    goes_on(world, 0);
}

#[test]
fn a_crash_of_the_target_costs_its_active_regions() {
    for power in [false, true] {
        let mut world = half_copied();
        world.crash(B, power);
        world.pass_ms(100);
        world.start(B);
        world.pass_ms(100);
        goes_on(world, HOT_BLOCKS);
    }
}

#[test]
fn a_crash_of_the_source_costs_its_active_regions() {
    for power in [false, true] {
        let mut world = half_copied();
        world.crash(A, power);
        world.pass_ms(100);
        world.start(A);
        world.pass_ms(100);
        world.lease(A, std::time::Duration::from_secs(3600));
        goes_on(world, HOT_BLOCKS);
    }
}

#[test]
fn the_speed_of_a_resync_is_told_and_is_zero_when_it_stands_still() {
    let mut world = half_copied();
    world.connect(A, B);
    world.order(A, Order::ResumeSync { peer: None }).unwrap();
    let copied = world.copied;
    while world.copied < copied + 512 {
        assert!(world.step(), "the resync stands still");
    }
    assert!(world.status(A).sync_speeds[&B] > 0, "{:?}", world.status(A));
    world.order(A, Order::PauseSync { peer: None }).unwrap();
    world.pass_ms(4000);
    assert_eq!(world.status(A).sync_speeds[&B], 0);
    world.order(A, Order::ResumeSync { peer: None }).unwrap();
    world.pass_ms(4000);
    assert!(in_sync(&world));
    assert!(world.status(A).sync_speeds.is_empty(), "none is under way");
}
