//! Who knows what absent replicas lack: stories of two failures in a row.

use std::time::Duration;

use relevo_replication::{Input, PeerState};
use relevo_types::cluster::VolumeChange;
use relevo_wire::Message;

use crate::{
    scenarios::block,
    world::{A, B, C, D, World},
};

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
fn a_new_member_knows_what_is_on_its_way_to_another_one() {
    let mut world = World::opened(3, 1024, A);
    for (a, b) in [(A, B), (A, C), (B, C)] {
        world.cut(a, b);
    }
    world.pass_ms(10);
    world.write(A, 900, 1, 1);
    world.pass_ms(10);
    // C is being resynced; a write is sent to it and does not arrive.
    world.connect(A, C);
    while !matches!(world.status(A).peers[&C], PeerState::SyncSource { .. }) {
        let (from, to) = world.busy_wires()[0];
        world.deliver(from, to);
    }
    world.silence(A, C);
    let write = world.write(A, 5, 1, 8);
    world.run();
    assert!(world.is_acked(write));
    // B gets the block by its resync, and joins.
    world.connect(A, B);
    world.pass_ms(100);
    assert!(world.volume().in_sync.contains(&B));
    world.crash(A, false);
    world.end_silence();
    world.run();
    world.evict(A);
    world.promote(B);
    world.pass_ms(3000);
    world.connect(B, C);
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&C));
    assert_eq!((block(&world, B, 5), block(&world, C, 5)), (8, 8));
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

/// Nothing was written since all were in sync: the next primary has nothing to reconcile, and the old
/// one nothing to get when it returns.
#[test]
fn a_primary_lost_after_no_write_leaves_nothing_to_copy() {
    let mut world = World::opened(3, 1024, A);
    world.crash(A, true);
    world.evict(A);
    world.promote(B);
    // Past the grace for the lost member.
    world.pass_ms(1000);
    world.lease(B, Duration::from_secs(3600));
    assert!(world.status(B).open, "{:?}", world.status(B));
    world.start(A);
    world.run();
    world.connect_all();
    let mut copied = 0;
    loop {
        let wires = world.busy_wires();
        if let Some((from, to)) = wires.first().copied() {
            let copies = matches!(world.head(from, to), Some(Message::SyncWrite { .. }));
            copied += usize::from(copies);
            world.deliver(from, to);
        } else if let Some(id) = [A, B, C]
            .into_iter()
            .find(|id| !world.node(*id).ops.is_empty())
        {
            world.finish_op(id, 0);
        } else if let Some(id) = [A, B, C].into_iter().find(|id| world.has_config(*id)) {
            world.deliver_config(id);
        } else if !world.commit() {
            break;
        }
    }
    assert!(world.volume().in_sync.contains(&A));
    assert_eq!(copied, 0, "blocks were copied that are the same everywhere");
}
