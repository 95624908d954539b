//! One story each.

use relevo_replication::{AppRequest, DiskState, Input, PeerState, ReplyError, VolumeEvent};
use relevo_types::{
    ByteRange, Epoch, NodeId,
    cluster::{Command, Proof, Protocol, VolumeChange},
};

use relevo_wire::{Body, Message};

use crate::world::{A, B, C, World};

pub(crate) fn block(world: &World, node: relevo_types::NodeId, number: usize) -> u8 {
    let block = world.block(node, number as u64);
    assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
    block[0]
}

#[test]
fn a_write_is_on_both_replicas_when_it_is_answered() {
    let mut world = World::opened(2, 1024, A);
    let write = world.write(A, 3, 2, 7);
    assert!(!world.is_acked(write));
    world.run();
    assert!(world.is_acked(write));
    assert_eq!((block(&world, A, 4), block(&world, B, 4)), (7, 7));
    let read = world.read(A, ByteRange::new(3 * 4096 + 100, 50));
    world.run();
    assert_eq!(world.replies[&read].as_deref(), Ok([7u8; 50].as_slice()));
    let flush = world.request(A, AppRequest::Flush);
    world.run();
    assert!(world.is_acked(flush));
    world.crash(A, true);
    world.crash(B, true);
    assert_eq!((block(&world, A, 4), block(&world, B, 4)), (7, 7));
}

#[test]
fn a_write_waits_until_the_loss_of_a_member_is_committed() {
    let mut world = World::opened(2, 1024, A);
    world.commits = false;
    world.cut(A, B);
    world.run();
    let write = world.write(A, 0, 1, 9);
    world.pass_ms(2000);
    assert!(!world.is_acked(write));
    let waiting = world.status(A).waiting.unwrap();
    assert!(waiting.contains("n2"), "{waiting}");
    world.commits = true;
    world.pass_ms(10);
    assert!(world.is_acked(write));
    assert_eq!(world.volume().in_sync.len(), 1);
    assert!(
        !world.nodes[&A]
            .engine
            .as_ref()
            .unwrap()
            .dirty_blocks(B)
            .is_empty()
    );
}

#[test]
fn a_silent_peer_is_given_up() {
    let mut world = World::opened(2, 1024, A);
    world.silence(A, B);
    let write = world.write(A, 0, 1, 9);
    world.pass_ms(900);
    assert!(!world.is_acked(write));
    world.pass_ms(200);
    assert!(world.is_acked(write));
}

#[test]
fn a_peer_that_comes_back_is_resynced_and_joins() {
    let mut world = World::opened(3, 1024, A);
    world.cut(A, B);
    world.pass_ms(10);
    for number in 0..200 {
        world.write(A, number, 1, 5);
    }
    world.pass_ms(10);
    assert_eq!(block(&world, C, 100), 5);
    assert_eq!(block(&world, B, 100), 0);
    world.connect(A, B);
    world.pass_ms(100);
    assert_eq!(world.volume().in_sync.len(), 3);
    assert!(world.same(A, B));
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
    assert_eq!(world.status(B).disk, DiskState::UpToDate);
    for node in [A, C] {
        assert!(
            world.nodes[&node]
                .engine
                .as_ref()
                .unwrap()
                .dirty_blocks(B)
                .is_empty()
        );
    }
}

#[test]
fn a_survivor_can_resync_a_peer_that_was_absent_under_the_old_primary() {
    let mut world = World::opened(3, 1024, A);
    world.cut(A, C);
    world.cut(B, C);
    world.pass_ms(10);
    world.write(A, 700, 1, 5);
    world.pass_ms(10);
    world.crash(A, false);
    world.evict(A);
    world.promote(B);
    world.pass_ms(2000);
    assert!(world.status(B).open, "{:?}", world.status(B));
    world.connect(B, C);
    world.pass_ms(100);
    assert_eq!(block(&world, C, 700), 5);
    assert!(world.volume().in_sync.contains(&C));
}

#[test]
fn divergent_tails_are_reconciled_before_the_new_primary_opens() {
    let mut world = World::opened(3, 1024, A);
    // The write reaches B only; nobody acknowledges it.
    world.silent.insert((A, C));
    let write = world.write(A, 10, 1, 4);
    world.node(A).control = false;
    world.run();
    assert!(!world.is_acked(write));
    assert_eq!((block(&world, B, 10), block(&world, C, 10)), (4, 0));
    world.crash(A, false);
    world.end_silence();
    world.evict(A);
    world.promote(C);
    world.pass_ms(2000);
    assert!(world.status(C).open);
    assert_eq!(block(&world, B, 10), block(&world, C, 10));
    assert_eq!(world.volume().in_sync.len(), 2);
}

#[test]
fn an_unclean_restart_makes_active_regions_uncertain() {
    let mut world = World::opened(2, 1024, A);
    world.write(A, 300, 1, 1);
    world.run();
    world.crash(B, true);
    world.pass_ms(10);
    world.start(B);
    world.connect_all();
    // Not before its attach: the link waits.
    world.run();
    let attached = world.nodes[&B].events.iter().find_map(|event| match event {
        VolumeEvent::Attached { clean, .. } => Some(*clean),
        _ => None,
    });
    assert_eq!(attached, Some(false));
    world.pass_ms(200);
    assert!(world.same(A, B));
    assert_eq!(world.volume().in_sync.len(), 2);
    assert!(world.status(B).certain);
}

#[test]
fn a_clean_detach_leaves_nothing_uncertain() {
    let mut world = World::opened(2, 1024, A);
    world.write(A, 300, 1, 1);
    world.run();
    world.pass_ms(100);
    world.input(B, Input::Detach);
    world.run();
    assert!(world.nodes[&B].events.contains(&VolumeEvent::Detached));
    world.start(B);
    world.run();
    assert!(world.nodes[&B].events.contains(&VolumeEvent::Attached {
        clean: true,
        remark: None
    }));
    assert!(
        world.nodes[&B]
            .engine
            .as_ref()
            .unwrap()
            .dirty_blocks(B)
            .is_empty()
    );
}

#[test]
fn a_primary_that_restarted_uncleanly_yields_to_a_member_that_knows_more() {
    let mut world = World::opened(2, 1024, A);
    let write = world.write(A, 0, 1, 6);
    world.run();
    assert!(world.is_acked(write));
    world.crash(A, true);
    world.start(A);
    world.run();
    world.connect_all();
    world.pass_ms(300);
    assert_eq!(world.volume().primary, None);
    assert_eq!(
        world.volume().in_sync.iter().copied().collect::<Vec<_>>(),
        [B]
    );
    world.promote(B);
    world.pass_ms(300);
    assert!(world.status(B).open);
    assert_eq!(world.volume().in_sync.len(), 2);
    assert_eq!((block(&world, A, 0), block(&world, B, 0)), (6, 6));
}

#[test]
fn a_lone_primary_opens_again_under_a_fresh_epoch_after_a_crash() {
    let mut world = World::opened(2, 1024, A);
    world.crash(B, false);
    world.write(A, 0, 1, 6);
    world.pass_ms(100);
    let before = world.volume().epoch;
    world.crash(A, true);
    world.start(A);
    world.pass_ms(5000);
    assert!(world.status(A).open);
    assert!(world.volume().epoch > before);
    world.start(B);
    world.connect_all();
    world.pass_ms(300);
    assert_eq!(world.volume().in_sync.len(), 2);
    assert!(world.same(A, B));
}

#[test]
fn a_damaged_superblock_slot_is_remarked_two_are_refused() {
    let mut world = World::new(2, 1024, 1);
    world.run();
    world.crash(A, false);
    let damage = |world: &mut World, generation: u64| {
        let offset = world.layout.superblock_block(generation);
        let disk = &mut world.node(A).disk;
        let mut block = disk.read(ByteRange::new(offset, 4096));
        block[60] ^= 1;
        disk.write(offset, &block);
    };
    damage(&mut world, 0);
    world.start(A);
    world.run();
    let remark = world.nodes[&A].events.iter().find_map(|event| match event {
        VolumeEvent::Attached { remark, .. } => remark.clone(),
        _ => None,
    });
    assert!(remark.unwrap().contains("slot 0"));
    world.crash(A, false);
    damage(&mut world, 1);
    world.start(A);
    world.run();
    assert_eq!(world.status(A).disk, DiskState::Failed);
    assert!(world.nodes[&A].events.iter().any(
        |event| matches!(event, VolumeEvent::DiskFailed { reason } if reason.contains("checksum"))
    ));
}

#[test]
fn a_replaced_primary_gets_nothing_acknowledged() {
    let mut world = World::opened(2, 1024, A);
    // A is cut off from the control log, but not from B.
    world.node(A).control = false;
    world.evict(A);
    world.promote(B);
    world.deliver_config(B);
    world.deliver_config(B);
    let write = world.write(A, 0, 1, 6);
    world.pass_ms(3000);
    assert!(!world.is_acked(write));
    assert!(world.status(B).open);
    // The control log still does not reach it, but B does.
    world.connect_all();
    world.pass_ms(100);
    assert!(!world.status(A).open);
    assert!(world.replies[&write].is_err());
    world.node(A).control = true;
    world.pass_ms(3000);
    assert_eq!(world.volume().in_sync.len(), 2);
    assert!(world.same(A, B));
}

#[test]
fn an_old_configuration_does_not_make_a_primary_again() {
    let mut world = World::opened(2, 1024, A);
    // A is slow to hear what the control log says, but hears the new primary.
    world.node(A).control = false;
    world.crash(A, false);
    world.run();
    world.start(A);
    world.evict(A);
    world.promote(B);
    while world.nodes[&A].events.is_empty() {
        world.finish_op(A, 0);
    }
    world.node(A).disk.stalled = true;
    world.connect(A, B);
    world.run();
    world.node(A).control = true;
    world.run();
    world.node(A).disk.stalled = false;
    world.pass_ms(1000);
    assert!(world.status(B).open, "{:?}", world.status(B));
    assert_eq!(world.volume().in_sync.len(), 2);
}

#[test]
fn a_failed_flush_is_a_failed_disk() {
    let mut world = World::opened(2, 1024, A);
    world.write(A, 0, 1, 6);
    world.run();
    world.node(A).disk.broken = Some("flush");
    let flush = world.request(A, AppRequest::Flush);
    world.pass_ms(500);
    assert_eq!(world.replies[&flush], Err(ReplyError::Io));
    assert_eq!(world.status(A).disk, DiskState::Failed);
    assert_eq!(world.volume().primary, None);
    assert_eq!(
        world.volume().in_sync.iter().copied().collect::<Vec<_>>(),
        [B]
    );
    let late = world.read(A, ByteRange::new(0, 512));
    assert_eq!(world.replies[&late], Err(ReplyError::Io));
}

#[test]
fn a_secondary_with_a_failed_disk_leaves() {
    let mut world = World::opened(2, 1024, A);
    world.node(B).disk.broken = Some("write");
    let write = world.write(A, 0, 1, 6);
    world.pass_ms(500);
    assert!(world.is_acked(write));
    assert_eq!(
        world.volume().in_sync.iter().copied().collect::<Vec<_>>(),
        [A]
    );
}

#[test]
fn a_replica_whose_disk_hangs_is_given_up_and_comes_back() {
    let mut world = World::opened(2, 1024, A);
    world.node(B).disk.stalled = true;
    let write = world.write(A, 0, 1, 6);
    let flush = world.request(A, AppRequest::Flush);
    world.pass_ms(9_000);
    assert!(!world.is_acked(write));
    assert!(world.status(A).waiting.unwrap().contains("n2"));
    world.pass_ms(1_500);
    assert!(world.is_acked(write) && world.is_acked(flush));
    world.node(B).disk.stalled = false;
    world.connect(A, B);
    world.pass_ms(200);
    assert_eq!(world.volume().in_sync.len(), 2);
    assert_eq!(block(&world, B, 0), 6);
}

#[test]
fn a_read_waits_for_the_lease() {
    let mut world = World::opened(2, 1024, A);
    world.lease(A, std::time::Duration::from_millis(100));
    world.pass_ms(200);
    let read = world.read(A, ByteRange::new(0, 4096));
    world.pass_ms(500);
    assert!(!world.replies.contains_key(&read));
    assert!(world.status(A).waiting.unwrap().contains("lease"));
    world.lease(A, std::time::Duration::from_millis(100));
    world.run();
    assert!(world.is_acked(read));
}

#[test]
fn a_planned_step_down_leaves_nothing_to_reconcile() {
    let mut world = World::opened(2, 1024, A);
    for number in 0..20 {
        world.write(A, number, 1, 3);
    }
    world.input(A, Input::Demote);
    let late = world.write(A, 50, 1, 1);
    assert_eq!(world.replies[&late], Err(ReplyError::NotPrimary));
    world.pass_ms(200);
    assert_eq!(world.volume().primary, None);
    assert!((1..=20).all(|id| world.is_acked(relevo_replication::RequestId(id))));
    for node in [A, B] {
        assert!(
            world.nodes[&node]
                .engine
                .as_ref()
                .unwrap()
                .dirty_blocks(node)
                .is_empty()
        );
    }
    world.promote(B);
    world.pass_ms(50);
    assert!(world.status(B).open);
    assert_eq!(world.volume().epoch, Epoch(4));
}

#[test]
fn a_join_that_may_be_committed_keeps_the_peer_required() {
    let mut world = World::opened(2, 1024, A);
    world.cut(A, B);
    world.pass_ms(10);
    world.write(A, 0, 1, 3);
    world.pass_ms(10);
    world.connect(A, B);
    // The barrier is passed, the join proposed; then the link is lost before the commit.
    world.commits = false;
    world.pass_ms(50);
    assert!(
        world
            .proposals
            .iter()
            .any(|(_, _, change)| matches!(change, VolumeChange::Join { .. }))
    );
    world.cut(A, B);
    world.run();
    let write = world.write(A, 1, 1, 4);
    world.pass_ms(500);
    assert!(!world.is_acked(write), "the join may be committed yet");
    world.commits = true;
    world.pass_ms(200);
    assert!(world.is_acked(write));
    assert_eq!(world.volume().in_sync.len(), 1);
}

#[test]
fn nonsense_ends_the_link_and_nothing_else() {
    let mut world = World::opened(2, 1024, A);
    let nonsense = Message::Write {
        epoch: Epoch(2),
        seq: relevo_types::Seq(9),
        complete: relevo_types::Seq(0),
        range: ByteRange::new(u64::MAX - 4095, 4096),
        body: Body::Zeroes,
        fua: false,
        dirty_for: 0,
    };
    world.input(
        B,
        Input::Message {
            peer: A,
            message: nonsense,
        },
    );
    world.pass_ms(10);
    assert_eq!(world.volume().in_sync.len(), 1);
    world.connect(A, B);
    world.pass_ms(100);
    assert_eq!(world.volume().in_sync.len(), 2);
}

#[test]
fn long_requests_go_in_pieces() {
    let mut world = World::opened(2, 40_000, A);
    let fill = world.write(A, 10, 700, 9);
    world.run();
    assert!(world.is_acked(fill));
    assert_eq!((block(&world, B, 10), block(&world, B, 709)), (9, 9));
    let range = ByteRange::new(0, 40_000 * 4096);
    let body = Body::Zeroes;
    let fua = true;
    let zero = world.request(A, AppRequest::Write { range, body, fua });
    let read = world.read(A, ByteRange::new(700 * 4096, 4096));
    world.run();
    assert!(world.is_acked(zero));
    assert!(world.replies[&read].is_ok());
    assert_eq!((block(&world, A, 709), block(&world, B, 709)), (0, 0));
}

#[test]
fn bad_requests_are_the_callers_mistake() {
    let mut world = World::opened(2, 1024, A);
    let end = 1024 * 4096;
    for range in [
        ByteRange::new(end, 1),
        ByteRange::new(u64::MAX, 2),
        ByteRange::new(0, end + 1),
    ] {
        let read = world.read(A, range);
        assert_eq!(world.replies[&read], Err(ReplyError::Invalid), "{range:?}");
    }
    for range in [
        ByteRange::new(512, 4096),
        ByteRange::new(0, 512),
        ByteRange::new(end, 4096),
    ] {
        let body = Body::Zeroes;
        let fua = false;
        let write = world.request(A, AppRequest::Write { range, body, fua });
        assert_eq!(world.replies[&write], Err(ReplyError::Invalid), "{range:?}");
    }
    let write = world.write(B, 0, 1, 1);
    assert_eq!(world.replies[&write], Err(ReplyError::NotPrimary));
}

/// B lost what it had only received, by a crash that A had no time to have committed before it was
/// evicted. Promoted, B must hear A, which is alive and back in time.
#[test]
fn an_uncertain_replica_hears_the_evicted_primary_that_knows_more() {
    let mut world = World::mixed(&[Protocol::B, Protocol::B], 1024);
    let write = lose_at_b(&mut world);
    assert!(world.is_acked(write));
    promote_as_it_is(&mut world, B);
    world.pass_ms(100);
    assert!(!world.status(B).open);
    let waiting = world.status(B).waiting.unwrap();
    assert!(waiting.contains("n1"), "{waiting}");
    readmit(&mut world, A);
    world.connect_all();
    world.pass_ms(1000);
    assert_eq!(world.volume().primary, None, "B stepped down");
    promote_as_it_is(&mut world, A);
    world.pass_ms(1000);
    assert!(world.status(A).open);
    assert_eq!((block(&world, A, 700), block(&world, B, 700)), (6, 6));
}

/// The same, but A does not come back: after its patience B goes on with what it has.
#[test]
fn an_uncertain_replica_goes_on_without_the_evicted_primary_after_its_patience() {
    let mut world = World::mixed(&[Protocol::B, Protocol::B], 1024);
    lose_at_b(&mut world);
    world.crash(A, false);
    promote_as_it_is(&mut world, B);
    world.pass_ms(1400);
    assert!(!world.status(B).open);
    world.pass_ms(300);
    assert!(world.status(B).open);
    assert_eq!(world.volume().in_sync.len(), 1);
}

/// A certain survivor waits for nobody who was evicted.
#[test]
fn a_certain_replica_opens_at_once_without_the_evicted_primary() {
    let mut world = World::opened(2, 1024, A);
    world.crash(A, false);
    evict_for_now(&mut world, A);
    promote_as_it_is(&mut world, B);
    world.run();
    assert!(world.status(B).open);
}

/// The promotion as the node asks for it itself: it says whether it may lack something.
fn promote_as_it_is(world: &mut World, node: NodeId) {
    let epoch = world.volume().epoch;
    let change = if world.status(node).certain {
        VolumeChange::Promote { node }
    } else {
        VolumeChange::PromoteUncertain { node }
    };
    world.change(epoch, change);
}

fn evict_for_now(world: &mut World, node: NodeId) {
    let generation = world.control.nodes[&node].lease.generation;
    world.command(&Command::Evict {
        node,
        generation,
        proof: Proof::Goodbye,
    });
}

fn readmit(world: &mut World, node: NodeId) {
    let generation = world.control.nodes[&node].lease.generation;
    world.command(&Command::Readmit { node, generation });
}

fn lose_at_b(world: &mut World) -> relevo_replication::RequestId {
    world.write(A, 0, 1, 5);
    world.pass_ms(10);
    world.node(B).disk.stalled = true;
    let write = world.write(A, 700, 1, 6);
    world.pass_ms(10);
    world.node(B).ops.clear();
    world.commits = false;
    world.crash(B, false);
    world.node(B).disk.stalled = false;
    world.run();
    evict_for_now(world, A);
    world.start(B);
    world.run();
    world.proposals.clear();
    world.commits = true;
    write
}
