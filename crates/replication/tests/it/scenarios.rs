//! One story each.

use relevo_replication::{AppRequest, DiskState, Input, PeerState, ReplyError, VolumeEvent};
use relevo_types::{ByteRange, Epoch, cluster::VolumeChange};

use relevo_wire::Message;

use crate::world::{A, B, C, D, World};

fn block(world: &World, node: relevo_types::NodeId, number: usize) -> u8 {
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
    use relevo_wire::Body;
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

/// C is being resynced by A and hears nothing any more; then a write to block 5 is acknowledged
/// by A and B.
fn with_a_write_that_a_sync_target_lacks() -> World {
    let mut world = World::opened(3, 1024, A);
    world.cut(A, C);
    world.cut(B, C);
    world.pass_ms(10);
    world.write(A, 900, 1, 1);
    world.pass_ms(10);
    world.connect(A, C);
    while !matches!(world.status(A).peers[&C], PeerState::SyncSource { .. }) {
        let (from, to) = world.busy_wires()[0];
        world.deliver(from, to);
    }
    world.silence(A, C);
    let write = world.write(A, 5, 1, 8);
    world.run();
    assert!(world.is_acked(write));
    // B is told that it is complete.
    world.pass_ms(100);
    world
}

#[test]
fn a_member_knows_what_a_sync_target_may_lack() {
    let mut world = with_a_write_that_a_sync_target_lacks();
    world.crash(A, false);
    world.evict(A);
    world.promote(B);
    world.pass_ms(3000);
    world.end_silence();
    world.run();
    world.connect(B, C);
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&C));
    assert_eq!((block(&world, B, 5), block(&world, C, 5)), (8, 8));
}

#[test]
fn a_primary_that_steps_down_and_up_knows_what_a_sync_target_may_lack() {
    let mut world = with_a_write_that_a_sync_target_lacks();
    world.input(A, Input::Demote);
    world.pass_ms(50);
    assert_eq!(world.volume().primary, None);
    world.promote(A);
    world.pass_ms(2000);
    assert!(world.status(A).open);
    world.end_silence();
    world.run();
    world.connect(A, C);
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&C));
    assert_eq!(block(&world, C, 5), 8);
}

#[test]
fn a_member_that_joined_while_another_was_absent_can_resync_that_one() {
    let mut world = World::opened(3, 1024, A);
    for (a, b) in [(A, B), (A, C), (B, C)] {
        world.cut(a, b);
    }
    world.pass_ms(10);
    world.write(A, 5, 1, 8);
    world.pass_ms(10);
    world.connect(A, B);
    world.pass_ms(100);
    assert_eq!(world.volume().in_sync.len(), 2);
    world.crash(A, false);
    world.evict(A);
    world.promote(B);
    world.pass_ms(2000);
    world.connect(B, C);
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&C));
    assert_eq!(block(&world, C, 5), 8);
}

#[test]
fn what_a_reconciliation_wrote_is_reconciled_when_it_was_cut_short() {
    let mut world = World::opened(4, 1024, A);
    // A write reaches B alone.
    world.silent.extend([(A, C), (A, D)]);
    world.node(A).control = false;
    world.write(A, 10, 1, 4);
    world.run();
    world.crash(A, false);
    world.end_silence();
    world.evict(A);
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::Leave { nodes: vec![A] });
    world.promote(B);
    // B's reconciliation reaches C, not D.
    while block(&world, C, 10) != 4 {
        let is_push = |world: &World| matches!(world.head(B, D), Some(Message::SyncWrite { .. }));
        let wires = world.busy_wires();
        let wire = wires
            .iter()
            .find(|wire| **wire != (B, D) || !is_push(&world));
        let ids = world.ids();
        let busy = ids.iter().find(|id| !world.nodes[id].ops.is_empty());
        let told = ids.iter().find(|id| world.has_config(**id));
        match (wire, busy, told) {
            (Some((from, to)), ..) => world.deliver(*from, *to),
            (None, Some(id), _) => world.finish_op(*id, 0),
            (None, None, Some(id)) => world.deliver_config(*id),
            (None, None, None) => panic!("nothing happens: {:?}", world.status(B)),
        }
    }
    world.silence(B, D);
    world.crash(B, false);
    world.end_silence();
    world.run();
    assert_eq!((block(&world, C, 10), block(&world, D, 10)), (4, 0));
    world.evict(B);
    world.promote(C);
    world.pass_ms(3000);
    assert!(world.status(C).open);
    assert_eq!(block(&world, C, 10), block(&world, D, 10));
}

#[test]
fn a_member_learns_from_its_own_tail_what_those_who_left_may_lack() {
    let mut world = World::opened(4, 1024, A);
    // A write does not reach D, which is given up; B hears of that, C does not.
    world.silence(A, D);
    let write = world.write(A, 10, 1, 4);
    world.run();
    assert!(!world.is_acked(write));
    world.silent.insert((A, C));
    world.pass_ms(1100);
    assert!(world.is_acked(write));
    for node in [B, C] {
        world.cut(node, D);
    }
    world.crash(A, false);
    world.end_silence();
    world.run();
    world.evict(A);
    world.promote(B);
    world.connect(B, C);
    world.pass_ms(2500);
    assert!(world.status(B).open, "{:?}", world.status(B));
    assert_eq!(
        world.volume().in_sync.iter().copied().collect::<Vec<_>>(),
        [B, C]
    );
    world.crash(B, false);
    world.evict(B);
    world.promote(C);
    world.pass_ms(2500);
    assert!(world.status(C).open);
    world.connect(C, D);
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&D));
    assert_eq!((block(&world, C, 10), block(&world, D, 10)), (4, 4));
}
