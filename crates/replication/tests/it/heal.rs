//! Disks that can't be read, that hang, and that are the last ones.

use std::time::Duration;

use relevo_replication::{DiskOpKind, DiskState, Input, Order, ReplyError, RequestId, VolumeEvent};
use relevo_types::{
    BlockRange, NodeId,
    cluster::options::{DiskTimeout, OnIoError, OnNoData},
};

use crate::world::{A, B, BLOCK, C, World};

/// A volume of three, A primary, blocks 0 to 399 written with 5.
fn written() -> World {
    let mut world = World::opened(3, 1024, A);
    world.write(A, 0, 256, 5);
    world.write(A, 256, 144, 5);
    world.run();
    world
}

fn healed(world: &World) -> Vec<(BlockRange, NodeId)> {
    let events = world.nodes[&A].events.iter();
    events
        .filter_map(|event| match event {
            VolumeEvent::Healed { blocks, from, .. } => Some((*blocks, *from)),
            _ => None,
        })
        .collect()
}

fn read(world: &mut World, first: u64, count: u64) -> RequestId {
    world.read(A, BlockRange::new(first, count).bytes())
}

fn expect_content(world: &World, id: RequestId, fill: u8, blocks: usize) {
    let data = world.replies[&id].as_ref().expect("the read failed");
    assert!(data.len() == blocks * BLOCK && data.iter().all(|byte| *byte == fill));
}

#[test]
fn a_read_error_is_answered_and_healed_from_another_replica() {
    let mut world = written();
    world.node(A).disk.bad.insert(7);
    let id = read(&mut world, 6, 3);
    world.pass_ms(20);
    expect_content(&world, id, 5, 3);
    assert_eq!(healed(&world), [(BlockRange::new(6, 3), B)]);
    assert!(world.nodes[&A].disk.bad.is_empty(), "it was written anew");
    assert!(world.status(A).open && world.same(A, B));
    // From its own disk again.
    let id = read(&mut world, 6, 3);
    world.pass_ms(20);
    expect_content(&world, id, 5, 3);
    assert_eq!(healed(&world).len(), 1);
}

#[test]
fn a_long_read_is_asked_for_in_pieces() {
    let mut world = written();
    world.node(A).disk.bad.extend([3, 390]);
    let id = read(&mut world, 0, 400);
    world.pass_ms(50);
    expect_content(&world, id, 5, 400);
    assert!(world.nodes[&A].disk.bad.is_empty());
}

#[test]
fn overlapping_reads_are_not_written_anew_at_the_same_time() {
    let mut world = written();
    world.node(A).disk.bad.insert(7);
    let one = read(&mut world, 6, 3);
    let other = read(&mut world, 7, 3);
    while !world.node(A).ops.is_empty() {
        world.finish_op(A, 0);
    }
    world.node(A).disk.stalled = true;
    world.run();
    let writes = |world: &World| {
        let ops = world.nodes[&A].ops.iter();
        let writes = ops.filter(|op| matches!(op.kind, DiskOpKind::Write { .. }));
        writes.count()
    };
    assert_eq!(writes(&world), 1);
    world.node(A).disk.stalled = false;
    world.pass_ms(20);
    assert_eq!(healed(&world).len(), 2);
    expect_content(&world, one, 5, 3);
    expect_content(&world, other, 5, 3);
    assert!(world.same(A, B));
}

/// A write that comes meanwhile waits, and is not overwritten with what was there before.
#[test]
fn a_write_waits_until_the_block_is_healed() {
    let mut world = written();
    world.node(A).disk.bad.insert(7);
    let old = read(&mut world, 7, 1);
    world.tick();
    // The read fails; the question is on its way.
    while world.busy_wires().is_empty() {
        assert!(!world.nodes[&A].ops.is_empty(), "{}", world.tail());
        world.finish_op(A, 0);
    }
    let write = world.write(A, 7, 1, 9);
    world.pass_ms(50);
    expect_content(&world, old, 5, 1);
    assert!(world.is_acked(write));
    let new = read(&mut world, 7, 1);
    world.pass_ms(20);
    expect_content(&world, new, 9, 1);
    assert!(world.same(A, B) && world.same(A, C));
}

#[test]
fn a_source_that_can_t_read_a_block_gets_it_from_a_member() {
    let mut world = written();
    world.cut(A, C);
    world.pass_ms(1500);
    world.write(A, 50, 4, 8);
    world.pass_ms(50);
    world.node(A).disk.bad.insert(51);
    world.connect_all();
    world.pass_ms(500);
    assert_eq!(world.status(C).disk, DiskState::UpToDate);
    assert_eq!(healed(&world).len(), 1);
    assert!(world.same(A, C));
}

#[test]
fn the_next_replica_is_asked_if_the_first_is_lost() {
    let mut world = written();
    world.node(A).disk.bad.insert(7);
    world.node(B).disk.stalled = true;
    let id = read(&mut world, 7, 1);
    world.pass_ms(20);
    assert!(!world.is_answered(id));
    world.cut(A, B);
    world.pass_ms(50);
    expect_content(&world, id, 5, 1);
    assert_eq!(healed(&world), [(BlockRange::new(7, 1), C)]);
}

#[test]
fn a_block_that_can_t_be_healed_takes_the_replica_out_of_use() {
    let mut world = written();
    world.node(A).disk.hopeless = true;
    world.node(A).disk.bad.insert(7);
    let id = read(&mut world, 7, 1);
    world.pass_ms(20);
    expect_content(&world, id, 5, 1);
    let id = read(&mut world, 7, 1);
    world.pass_ms(20);
    assert_eq!(world.replies[&id], Err(ReplyError::Io));
    assert_eq!(world.status(A).disk, DiskState::Failed);
}

#[test]
fn a_failed_heal_takes_the_replica_out_of_use() {
    let mut world = written();
    world.node(A).disk.bad.insert(7);
    let id = read(&mut world, 7, 1);
    world.tick();
    world.finish_op(A, 0);
    world.node(A).disk.broken = Some("write");
    world.pass_ms(50);
    // It was answered before.
    expect_content(&world, id, 5, 1);
    assert_eq!(world.status(A).disk, DiskState::Failed);
}

/// Without another replica that has the block: as was chosen.
#[test]
fn on_io_error_decides_what_becomes_of_a_read_that_nobody_can_serve() {
    for policy in [OnIoError::Detach, OnIoError::PassOn] {
        let mut world = World::opened(2, 1024, A);
        world.write(A, 0, 8, 5);
        world.pass_ms(20);
        world.set_options(|options| options.on_io_error = policy);
        world.crash(B, false);
        world.pass_ms(1500);
        world.node(A).disk.bad.insert(3);
        let bad = read(&mut world, 3, 1);
        let good = read(&mut world, 4, 1);
        world.pass_ms(50);
        assert_eq!(world.replies[&bad], Err(ReplyError::Io));
        let detached = world.status(A).disk == DiskState::Failed;
        assert_eq!(detached, policy == OnIoError::Detach);
        if policy == OnIoError::PassOn {
            expect_content(&world, good, 5, 1);
            // Writing the block heals it, as on any disk.
            let write = world.write(A, 3, 1, 6);
            world.pass_ms(20);
            assert!(world.is_acked(write));
            let read = read(&mut world, 3, 1);
            world.pass_ms(20);
            expect_content(&world, read, 6, 1);
        }
    }
}

/// Found by the simulator, seed 2556: the block was left under way for as long as the link lasted.
#[test]
fn a_resync_that_needs_an_unreadable_block_is_tried_again() {
    let mut world = World::opened(2, 1024, A);
    world.set_options(|options| options.on_io_error = OnIoError::PassOn);
    world.cut(A, B);
    world.pass_ms(1500);
    world.write(A, 0, 8, 5);
    world.pass_ms(50);
    world.node(A).disk.bad.insert(3);
    world.connect_all();
    world.pass_ms(200);
    assert!(world.status(A).open);
    assert_ne!(world.status(B).disk, DiskState::UpToDate);
    let write = world.write(A, 3, 1, 6);
    world.pass_ms(50);
    assert!(world.is_acked(write));
    world.connect_all();
    world.pass_ms(500);
    assert_eq!(world.status(B).disk, DiskState::UpToDate);
    assert!(world.same(A, B));
}

/// `pass_on` is about reads: what was not written must not be taken for written.
#[test]
fn failed_writes_and_flushes_take_the_replica_out_of_use_whatever_was_chosen() {
    for broken in ["write", "flush"] {
        let mut world = written();
        world.set_options(|options| options.on_io_error = OnIoError::PassOn);
        world.run();
        world.node(A).disk.broken = Some(broken);
        world.write(A, 1, 1, 9);
        world.request(A, relevo_replication::AppRequest::Flush);
        world.pass_ms(20);
        assert_eq!(world.status(A).disk, DiskState::Failed);
    }
}

#[test]
fn a_disk_that_hangs_is_given_up_after_disk_timeout() {
    for victim in [A, B] {
        let mut world = written();
        world.set_options(|options| options.disk_timeout = DiskTimeout { seconds: Some(2) });
        world.run();
        world.node(victim).disk.stalled = true;
        world.write(A, 1, 1, 9);
        world.pass_ms(1500);
        assert_ne!(world.status(victim).disk, DiskState::Failed);
        world.pass_ms(1000);
        assert_eq!(world.status(victim).disk, DiskState::Failed, "{victim}");
        world.pass_ms(500);
        assert!(!world.volume().in_sync.contains(&victim));
        if victim == B {
            let write = world.write(A, 2, 1, 9);
            world.pass_ms(50);
            assert!(world.is_acked(write), "the others go on");
        }
    }
}

#[test]
fn the_last_replica_in_sync_is_waited_for_however_long_its_disk_hangs() {
    let mut world = World::opened(2, 1024, A);
    world.set_options(|options| options.disk_timeout = DiskTimeout { seconds: Some(2) });
    world.crash(B, false);
    world.pass_ms(1500);
    world.node(A).disk.stalled = true;
    let write = world.write(A, 1, 1, 9);
    world.pass_ms(10_000);
    assert!(!world.is_answered(write));
    world.node(A).disk.stalled = false;
    world.pass_ms(50);
    assert!(world.is_acked(write) && world.status(A).open);
}

/// Also while it is being attached, where there is nothing else that could tell: the status does, and links
/// are refused with the reason instead of being left open.
#[test]
fn a_disk_that_hangs_while_it_is_attached_is_given_up() {
    for unclean in [false, true] {
        let mut world = World::opened(2, 1024, A);
        world.set_options(|options| options.disk_timeout = DiskTimeout { seconds: Some(2) });
        world.run();
        if !unclean {
            world.input(B, Input::Detach);
            world.pass_ms(50);
        }
        world.crash(B, false);
        world.pass_ms(1500);
        world.node(B).disk.stalled = true;
        world.start(B);
        world.connect_all();
        world.pass_ms(1900);
        assert_eq!(world.status(B).disk, DiskState::Attaching);
        world.pass_ms(200);
        let status = world.status(B);
        assert_eq!(status.disk, DiskState::Failed);
        assert!(status.waiting.unwrap().contains("disk-timeout"));
        // It comes back, and is attached again.
        world.node(B).disk.stalled = false;
        world.crash(B, false);
        world.start(B);
        world.connect_all();
        world.pass_ms(1000);
        assert!(world.volume().in_sync.contains(&B));
    }
}

/// Waiting is all that is left.
#[test]
fn the_last_replica_in_sync_is_waited_for_while_it_is_attached() {
    let mut world = World::opened(2, 1024, A);
    world.set_options(|options| options.disk_timeout = DiskTimeout { seconds: Some(2) });
    world.crash(B, false);
    world.pass_ms(1500);
    world.crash(A, false);
    world.node(A).disk.stalled = true;
    world.start(A);
    world.pass_ms(20_000);
    assert_eq!(world.status(A).disk, DiskState::Attaching);
    assert!(world.status(A).waiting.is_some());
    world.node(A).disk.stalled = false;
    world.pass_ms(1000);
    assert!(world.status(A).open);
}

/// A secondary's bad sector is found by comparing: it counts as different and is written anew by a repair.
/// Its other blocks keep their second copy all the while.
#[test]
fn a_block_that_a_replica_cannot_compare_differs() {
    let mut world = written();
    world.node(B).disk.bad.insert(7);
    let verify = |repair| Order::Verify { peer: None, repair };
    world.order(A, verify(false)).unwrap();
    world.pass_ms(50);
    assert_eq!(world.status(B).disk, DiskState::UpToDate);
    let differs = world.volume().replicas[&B].differs.clone().unwrap();
    assert_eq!(differs.runs, [BlockRange::new(0, 8)], "with its neighbours");
    let unreadable = |event: &VolumeEvent| matches!(event, VolumeEvent::Unreadable { .. });
    assert!(world.nodes[&B].events.iter().any(unreadable));
    world.order(A, verify(true)).unwrap();
    world.pass_ms(500);
    let volume = world.volume();
    assert!(volume.in_sync.contains(&B) && volume.replicas[&B].differs.is_none());
    world.order(A, verify(false)).unwrap();
    world.pass_ms(50);
    assert_eq!(world.volume().replicas[&B].differs, None);
}

#[test]
fn without_accessible_data_requests_fail_or_wait_as_was_chosen() {
    let mut world = World::opened(2, 1024, A);
    world.set_options(|options| options.on_no_data = OnNoData::Suspend);
    world.crash(B, false);
    world.pass_ms(1500);
    world.node(A).disk.broken = Some("write");
    let first = world.write(A, 1, 1, 9);
    world.pass_ms(50);
    assert_eq!(world.status(A).disk, DiskState::Failed);
    let later = read(&mut world, 3, 1);
    world.pass_ms(5000);
    assert!(!world.is_answered(first) && !world.is_answered(later));
    let status = world.status(A);
    let words = status.waiting.unwrap();
    assert!(words.contains("on-no-data-accessible"), "{words}");
    assert!(status.held && !status.open);
    let closed = |event: &VolumeEvent| matches!(event, VolumeEvent::Closed { .. });
    assert!(!world.nodes[&A].events.iter().any(closed));
    world.set_options(|options| options.on_no_data = OnNoData::Error);
    world.pass_ms(50);
    assert_eq!(world.replies[&first], Err(ReplyError::Io));
    assert_eq!(world.replies[&later], Err(ReplyError::Io));
    assert!(!world.status(A).held);
    assert!(world.nodes[&A].events.iter().any(closed));
}

/// Somebody else is in sync: they need not wait for this disk.
#[test]
fn requests_to_a_failed_disk_do_not_wait_where_another_replica_can_serve() {
    let mut world = written();
    world.set_options(|options| options.on_no_data = OnNoData::Suspend);
    world.run();
    world.node(A).disk.broken = Some("write");
    let write = world.write(A, 1, 1, 9);
    world.pass_ms(50);
    assert_eq!(world.replies[&write], Err(ReplyError::Io));
}

#[test]
fn a_detach_ends_a_read_that_is_being_healed() {
    let mut world = written();
    world.node(B).disk.stalled = true;
    world.node(A).disk.bad.insert(7);
    let id = read(&mut world, 7, 1);
    world.pass_ms(20);
    world.input(A, Input::Detach);
    world.pass_ms(50);
    assert_eq!(world.status(A).disk, DiskState::Diskless);
    assert!(world.replies[&id].is_err());
    drop(world.order(B, Order::SuspendIo));
    world.node(B).disk.stalled = false;
    world.pass_ms(Duration::from_secs(2).as_millis().try_into().unwrap());
}
