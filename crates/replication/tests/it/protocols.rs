//! Protocols A, B and C, mixed in one volume.

use relevo_replication::{AppRequest, DiskState, Input, PeerState};
use relevo_types::{
    ByteRange, NodeId,
    cluster::{
        OnCongestion, PairProtocol,
        Protocol::{self, A as Async, B as Receipt, C as Sync},
        VolumeChange,
    },
};
use relevo_wire::Body;

use crate::{
    scenarios::block,
    world::{A, B, C, World},
};

fn members(world: &World) -> Vec<NodeId> {
    world.volume().in_sync.iter().copied().collect()
}

fn dirty(world: &World, at: NodeId, of: NodeId) -> u64 {
    let engine = world.nodes[&at].engine.as_ref().unwrap();
    engine.dirty_blocks(of).iter().map(|run| run.count).sum()
}

/// A first write, far from the others: receipts are given only after it.
fn use_all(world: &mut World) {
    world.write(A, 400, 1, 1);
    world.pass_ms(20);
}

/// Three replicas, the last one of protocol A and with a small buffer.
fn with_follower(policy: OnCongestion) -> World {
    let mut world = World::mixed(&[Sync, Sync, Async], 1024);
    world.set_options(|options| {
        options.congestion.policy = policy;
        options.congestion.sndbuf_bytes = 16 * 4096;
        options.congestion.fill_bytes = 8 * 4096;
    });
    world.pass_ms(10);
    world
}

#[test]
fn a_replica_of_protocol_a_is_outside_the_set_and_nothing_waits_for_it() {
    let mut world = with_follower(OnCongestion::Block);
    assert_eq!(members(&world), [A, B]);
    assert_eq!(world.status(A).peers[&C], PeerState::Following);
    assert_eq!(world.status(C).disk, DiskState::Consistent);
    world.node(C).disk.stalled = true;
    let write = world.write(A, 3, 1, 7);
    let flush = world.request(A, AppRequest::Flush);
    world.pass_ms(100);
    assert!(world.is_acked(write) && world.is_acked(flush));
    let behind = world.status(A).behind[&C];
    assert_eq!(behind.bytes, 4096);
    assert!(behind.since.is_some());
    assert_eq!(block(&world, C, 3), 0);
    world.node(C).disk.stalled = false;
    world.pass_ms(100);
    assert_eq!(block(&world, C, 3), 7);
    assert_eq!(world.status(A).behind[&C].bytes, 0);
    assert_eq!(world.status(A).behind[&C].since, None);
    assert_eq!(members(&world), [A, B]);
}

#[test]
fn what_a_lost_follower_did_not_acknowledge_is_marked() {
    let mut world = with_follower(OnCongestion::Block);
    world.node(C).disk.stalled = true;
    world.write(A, 3, 1, 7);
    world.pass_ms(10);
    assert_eq!(dirty(&world, A, C), 0);
    world.cut(A, C);
    world.pass_ms(10);
    assert_eq!(dirty(&world, A, C), 1);
    world.write(A, 4, 2, 8);
    world.pass_ms(10);
    assert_eq!(dirty(&world, A, C), 3);
    assert_eq!(world.status(A).behind[&C].bytes, 3 * 4096);
    world.node(C).disk.stalled = false;
    world.connect(A, C);
    world.pass_ms(200);
    assert!(world.same(A, C));
    assert_eq!(world.status(A).peers[&C], PeerState::Following);
    assert_eq!(world.status(C).disk, DiskState::Consistent);
}

#[test]
fn with_block_the_application_waits_for_room_in_the_buffer() {
    let mut world = with_follower(OnCongestion::Block);
    // What waits for the activity log is past the check: the region is made hot first.
    world.write(A, 0, 1, 5);
    world.pass_ms(10);
    world.node(C).disk.stalled = true;
    let writes: Vec<_> = (0..20).map(|n| world.write(A, n, 1, 5)).collect();
    world.pass_ms(100);
    assert!(writes[..16].iter().all(|write| world.is_acked(*write)));
    assert!(!world.is_acked(writes[16]));
    let waiting = world.status(A).waiting.unwrap();
    assert!(waiting.contains("protocol A"), "{waiting}");
    world.node(C).disk.stalled = false;
    world.pass_ms(100);
    assert!(writes.iter().all(|write| world.is_acked(*write)));
    assert!(world.same(A, C));
}

#[test]
fn with_pull_ahead_the_follower_is_left_behind_and_catches_up() {
    let mut world = with_follower(OnCongestion::PullAhead);
    world.node(C).disk.stalled = true;
    let writes: Vec<_> = (0..20).map(|n| world.write(A, n, 1, 5)).collect();
    // A block that was sent before and is written again: the old acknowledgement must not clear it.
    let again = world.write(A, 2, 1, 6);
    world.pass_ms(100);
    assert!(writes.iter().all(|write| world.is_acked(*write)) && world.is_acked(again));
    assert!(matches!(
        world.status(A).peers[&C],
        PeerState::Ahead { dirty: 20 }
    ));
    assert_eq!(world.status(C).peers[&A], PeerState::Behind);
    assert_eq!(world.status(C).disk, DiskState::Consistent);
    assert!(world.status(A).behind[&C].since.is_some());
    world.node(C).disk.stalled = false;
    world.pass_ms(200);
    assert_eq!(block(&world, C, 2), 6);
    assert!(world.same(A, C));
    assert_eq!(world.status(A).peers[&C], PeerState::Following);
    assert_eq!(world.status(A).behind[&C].bytes, 0);
    assert_eq!(members(&world), [A, B]);
}

#[test]
fn a_follower_in_its_short_resync_is_inconsistent_and_says_so() {
    let mut world = with_follower(OnCongestion::PullAhead);
    world.node(C).disk.stalled = true;
    for number in 0..20 {
        world.write(A, number, 1, 5);
    }
    world.pass_ms(10);
    world.node(C).disk.stalled = false;
    while world.status(C).disk != DiskState::Inconsistent {
        let wires = world.busy_wires();
        if let Some((from, to)) = wires.first().copied() {
            world.deliver(from, to);
        } else {
            world.finish_op(C, 0);
        }
    }
    assert_eq!(world.status(C).peers[&A], PeerState::SyncTarget);
    world.crash(A, false);
    world.run();
    assert_eq!(world.status(C).disk, DiskState::Inconsistent);
}

#[test]
fn a_crashed_follower_does_not_call_itself_consistent() {
    let mut world = with_follower(OnCongestion::Block);
    world.write(A, 3, 1, 7);
    world.run();
    world.crash(C, false);
    world.start(C);
    world.run();
    assert_eq!(world.status(C).disk, DiskState::Inconsistent);
    world.connect(A, C);
    world.pass_ms(200);
    assert_eq!(world.status(C).disk, DiskState::Consistent);
}

#[test]
fn a_planned_switchover_drains_to_the_follower_first() {
    let mut world = World::mixed(&[Sync, Async], 1024);
    assert_eq!(members(&world), [A]);
    let write = world.write(A, 3, 1, 7);
    world.run();
    assert!(world.is_acked(write));
    world.set_options(|options| options.admit = Some(B));
    world.pass_ms(10);
    assert_eq!(members(&world), [A, B]);
    assert_eq!(world.status(B).disk, DiskState::UpToDate);
    // While it is in the set writes wait for it.
    world.node(B).disk.stalled = true;
    let write = world.write(A, 4, 1, 8);
    world.pass_ms(10);
    assert!(!world.is_acked(write));
    world.node(B).disk.stalled = false;
    world.input(A, Input::Demote);
    world.pass_ms(10);
    assert_eq!(world.volume().primary, None);
    world.promote(B);
    world.pass_ms(10);
    assert!(world.status(B).open);
    assert_eq!(block(&world, B, 4), 8);
    // The pair is of protocol A whoever is primary.
    assert_eq!(members(&world), [B]);
    world.pass_ms(100);
    assert_eq!(world.status(B).peers[&A], PeerState::Following);
    assert!(world.same(A, B));
}

#[test]
fn a_switchover_that_does_not_come_lets_the_follower_leave_again() {
    let mut world = World::mixed(&[Sync, Async], 1024);
    world.set_options(|options| options.admit = Some(B));
    world.pass_ms(10);
    assert_eq!(members(&world), [A, B]);
    world.pass(relevo_replication::ADMITTED_FOR);
    world.pass_ms(100);
    assert_eq!(members(&world), [A]);
    assert_eq!(world.status(A).peers[&B], PeerState::Following);
}

#[test]
fn protocol_b_is_complete_when_the_peer_has_received_it() {
    let mut world = World::mixed(&[Sync, Receipt], 1024);
    use_all(&mut world);
    assert_eq!(members(&world), [A, B]);
    world.node(B).disk.stalled = true;
    let write = world.write(A, 3, 1, 7);
    world.pass_ms(10);
    assert!(world.is_acked(write));
    assert_eq!(block(&world, B, 3), 0);
    // Stable storage is asked of all.
    let fua = world.request(
        A,
        AppRequest::Write {
            range: ByteRange::new(9 * 4096, 4096),
            body: Body::Zeroes,
            fua: true,
        },
    );
    let flush = world.request(A, AppRequest::Flush);
    world.pass_ms(10);
    assert!(!world.is_acked(fua) && !world.is_acked(flush));
    world.node(B).disk.stalled = false;
    world.pass_ms(10);
    assert!(world.is_acked(fua) && world.is_acked(flush));
    world.crash(B, true);
    assert_eq!(block(&world, B, 3), 7);
}

#[test]
fn a_receipt_survives_the_crash_of_everyone_else() {
    let mut world = World::mixed(&[Sync, Receipt], 1024);
    use_all(&mut world);
    world.node(B).disk.stalled = true;
    let write = world.write(A, 3, 1, 7);
    world.pass_ms(10);
    assert!(world.is_acked(write));
    world.crash(A, true);
    world.evict(A);
    world.node(B).disk.stalled = false;
    world.promote(B);
    world.pass_ms(1000);
    world.lease(B, std::time::Duration::from_secs(10));
    let read = world.read(B, ByteRange::new(3 * 4096, 1));
    let flush = world.request(B, AppRequest::Flush);
    world.run();
    assert_eq!(world.replies[&read].as_deref(), Ok([7u8].as_slice()));
    assert!(world.is_acked(flush));
    world.crash(B, true);
    assert_eq!(block(&world, B, 3), 7, "a flush covers what was received");
}

/// The corner: a replica of protocol B acknowledged the receipt, crashed without having written it and
/// without knowing of it, and the primary is gone too. The third one must remember.
#[test]
fn what_was_only_received_stays_in_the_others_tails() {
    let mut world = World::mixed(&[Sync, Sync, Receipt], 1024);
    use_all(&mut world);
    // A cold region at the replica that crashes: nothing on its disk tells of the write.
    world.node(C).disk.stalled = true;
    let write = world.write(A, 700, 1, 7);
    world.pass_ms(200);
    assert!(world.is_acked(write));
    world.node(C).ops.clear();
    world.crash(C, false);
    world.crash(A, false);
    world.node(C).disk.stalled = false;
    world.evict(A);
    world.promote(B);
    world.start(C);
    world.run();
    world.connect(B, C);
    world.pass_ms(3000);
    assert!(world.status(B).open);
    assert_eq!(block(&world, B, 700), 7);
    assert!(members(&world).contains(&C), "{:?}", world.volume());
    assert!(world.same(B, C));
}

#[test]
fn protocols_change_while_the_volume_is_in_use() {
    let mut world = World::mixed(&[Sync, Sync], 1024);
    let choose = |world: &mut World, protocol| {
        world.set_options(|options| {
            options.protocols = vec![PairProtocol {
                nodes: [A, B],
                protocol,
            }];
        });
        world.pass_ms(100);
    };
    choose(&mut world, Protocol::A);
    assert_eq!(members(&world), [A]);
    assert_eq!(world.status(A).peers[&B], PeerState::Following);
    choose(&mut world, Protocol::B);
    assert_eq!(members(&world), [A, B]);
    use_all(&mut world);
    world.node(B).disk.stalled = true;
    let received = world.write(A, 1, 1, 1);
    world.pass_ms(10);
    assert!(world.is_acked(received));
    choose(&mut world, Protocol::C);
    let written = world.write(A, 2, 1, 1);
    let flush = world.request(A, AppRequest::Flush);
    world.pass_ms(10);
    assert!(!world.is_acked(written) && !world.is_acked(flush));
    world.node(B).disk.stalled = false;
    world.pass_ms(10);
    assert!(world.is_acked(written) && world.is_acked(flush));
    world.crash(B, true);
    assert!(world.same(A, B));
}

#[test]
fn seven_replicas_of_all_protocols_end_up_the_same() {
    let mut world = World::mixed(&[Sync, Receipt, Async, Sync, Async, Receipt, Async], 1024);
    assert_eq!(members(&world).len(), 4);
    for number in 0..50u8 {
        let at = u64::from(number);
        world.write(A, at * 20, 1 + at % 3, number);
        if number % 16 == 7 {
            world.request(A, AppRequest::Flush);
        }
    }
    world.pass_ms(100);
    for node in world.ids() {
        assert!(world.same(A, node), "{node}");
    }
    world.crash(A, false);
    world.evict(A);
    assert!(world.volume().in_sync.contains(&NodeId(4)));
    world.promote(NodeId(4));
    world.pass_ms(3000);
    world.start(A);
    world.connect_all();
    world.pass_ms(3000);
    assert_eq!(members(&world).len(), 4);
    for node in world.ids() {
        assert!(world.same(A, node), "{node}");
    }
}

#[test]
fn a_follower_is_never_promoted_by_itself() {
    let mut world = World::mixed(&[Sync, Async], 1024);
    world.crash(A, true);
    world.evict(A);
    let expect = world.volume().epoch;
    world.change(expect, VolumeChange::Promote { node: B });
    world.pass_ms(5000);
    assert_eq!(world.volume().primary, None);
    assert!(!world.status(B).open);
}

/// A write is complete because a member received it; a follower gets it by its resync, not as a write.
/// Then the member crashes without a trace of it, and the primary is gone.
#[test]
fn a_follower_knows_what_a_member_may_lose_that_it_was_copied() {
    let mut world = World::mixed(&[Receipt, Receipt, Async], 1024);
    use_all(&mut world);
    world.pass_ms(10);
    world.crash(C, false);
    world.pass_ms(10);
    world.node(B).disk.stalled = true;
    let write = world.write(A, 700, 1, 7);
    world.pass_ms(10);
    assert!(world.is_acked(write));
    world.start(C);
    world.run();
    world.connect(A, C);
    world.pass_ms(300);
    assert_eq!(block(&world, C, 700), 7);
    // Beside the region that its own crash left uncertain: what was not in doubt is not marked.
    assert_eq!(dirty(&world, C, C), 256 + 1);
    world.node(B).ops.clear();
    world.crash(B, false);
    world.crash(A, false);
    world.node(B).disk.stalled = false;
    world.evict(A);
    world.promote(B);
    world.start(B);
    world.run();
    world.connect(B, C);
    world.pass_ms(5000);
    assert!(world.status(B).open);
    assert_eq!(world.status(B).peers[&C], PeerState::Following);
    assert!(world.same(B, C));
}

/// The first write after a clean attach: a crash before it is written would leave the superblock clean, and
/// the replica would be taken for one that lacks nothing.
#[test]
fn no_receipt_is_given_before_a_crash_would_be_noticed() {
    let mut world = World::mixed(&[Receipt, Receipt], 1024);
    world.node(B).disk.stalled = true;
    let write = world.write(A, 700, 1, 7);
    world.pass_ms(100);
    assert!(!world.is_acked(write));
    world.node(B).disk.stalled = false;
    world.pass_ms(100);
    assert!(world.is_acked(write));
    world.node(B).disk.stalled = true;
    let write = world.write(A, 20, 1, 7);
    world.pass_ms(100);
    assert!(world.is_acked(write), "from then on by the receipt");
    world.crash(B, false);
    world.node(B).disk.stalled = false;
    world.start(B);
    world.run();
    assert!(!world.status(B).certain);
}
