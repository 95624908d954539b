//! Online verification: what it finds, what it never finds, and repair.

use std::time::Duration;

use relevo_replication::{Input, Order, PeerState, VolumeEvent};
use relevo_types::{
    BlockRange, NodeId,
    cluster::{Command, PairProtocol, Protocol},
};
use relevo_wire::Message;

use crate::world::{A, B, BLOCK, C, V, World};

fn verify(world: &mut World, repair: bool) {
    world
        .order(A, Order::Verify { peer: None, repair })
        .unwrap();
}

/// What each verification of a node by A found: what differs, why it was stopped, whether it repairs.
fn verified(world: &World, of: NodeId) -> Vec<(Vec<BlockRange>, Option<String>, bool)> {
    let events = world.nodes[&A].events.iter();
    events
        .filter_map(|event| match event {
            VolumeEvent::Verified {
                node,
                differing,
                stopped,
                repair,
                ..
            } if *node == of => Some((differing.clone(), stopped.clone(), *repair)),
            _ => None,
        })
        .collect()
}

/// What the log says that a replica differs in.
fn recorded(world: &World, of: NodeId) -> Vec<BlockRange> {
    let differs = &world.volume().replicas[&of].differs;
    differs.as_ref().map_or_else(Vec::new, |it| it.runs.clone())
}

/// The disk of a node alters a block by itself.
fn rot(world: &mut World, node: NodeId, block: u64) {
    let mut bytes = world.block(node, block);
    bytes[100] ^= 0x40;
    let disk = &mut world.node(node).disk;
    disk.write(block * BLOCK as u64, &bytes);
    disk.flush();
}

fn used(nodes: u32) -> World {
    let mut world = World::opened(nodes, 1024, A);
    for block in (0..1000).step_by(50) {
        world.write(A, block, 20, 7);
        world.run();
    }
    world.pass_ms(100);
    world
}

#[test]
fn silent_corruption_is_found_and_told() {
    let mut world = used(3);
    for block in [0, 255, 256, 1023] {
        rot(&mut world, B, block);
    }
    verify(&mut world, false);
    assert!(matches!(
        world.status(A).peers[&B],
        PeerState::VerifyS { .. }
    ));
    world.pass_ms(10);
    let found = [
        BlockRange::new(0, 1),
        BlockRange::new(255, 2),
        BlockRange::new(1023, 1),
    ];
    assert_eq!(verified(&world, B), [(found.to_vec(), None, false)]);
    assert_eq!(verified(&world, C), [(Vec::new(), None, false)]);
    assert_eq!(recorded(&world, B), found);
    assert_eq!(recorded(&world, C), []);
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
    // Nothing was changed.
    assert!(world.volume().in_sync.contains(&B));
    assert_eq!(world.differing(A, B), [0, 255, 256, 1023]);
}

#[test]
fn the_replica_shows_that_it_is_verified() {
    let mut world = used(2);
    verify(&mut world, false);
    world.deliver(A, B);
    assert_eq!(world.status(B).peers[&A], PeerState::VerifyT);
    world.pass_ms(10);
    assert_eq!(world.status(B).peers[&A], PeerState::Established);
}

#[test]
fn repair_leaves_the_set_first_and_copies_exactly_what_differs() {
    let mut world = used(3);
    rot(&mut world, B, 300);
    rot(&mut world, B, 777);
    world.commits = false;
    verify(&mut world, true);
    world.pass_ms(50);
    assert_eq!(
        verified(&world, B),
        [],
        "nothing is told that may be forgotten"
    );
    assert_eq!(world.copied, 0, "nothing is copied to a member");
    assert!(world.volume().in_sync.contains(&B));

    let epoch = world.volume().epoch;
    world.commits = true;
    world.pass_ms(200);
    assert_eq!(verified(&world, B).len(), 1);
    assert!(verified(&world, B)[0].2);
    assert!(world.volume().in_sync.contains(&B));
    assert_eq!(world.volume().epoch.0, epoch.0 + 2, "it leaves and joins");
    assert_eq!(world.copied, 2);
    assert!(world.same(A, B));
    assert!(world.same(A, C));
    assert_eq!(recorded(&world, B), [], "the join is the end of it");
    verify(&mut world, false);
    world.pass_ms(50);
    assert_eq!(recorded(&world, B), []);
}

/// The next primary must know it too: B has left, and A dies before B was repaired.
#[test]
fn another_member_knows_what_is_to_be_repaired() {
    let mut world = used(3);
    rot(&mut world, B, 300);
    world.order(B, Order::PauseSync { peer: None }).unwrap();
    verify(&mut world, true);
    world.pass_ms(200);
    assert!(!world.volume().in_sync.contains(&B));
    assert_eq!(world.copied, 0);
    world.crash(A, true);
    world.evict(A);
    world.promote(C);
    world.pass_ms(2000);
    world.order(B, Order::ResumeSync { peer: None }).unwrap();
    world.pass_ms(2000);
    assert!(world.volume().in_sync.contains(&B), "{:?}", world.volume());
    assert!(world.same(B, C));
}

/// A lost link, another primary: what is known to differ stays known, and nothing of it is overwritten as
/// long as nobody decided.
#[test]
fn what_differs_stays_known_until_somebody_decides() {
    let mut world = used(3);
    rot(&mut world, B, 300);
    verify(&mut world, false);
    world.pass_ms(50);
    world.cut(A, B);
    world.pass_ms(100);
    assert!(!world.volume().in_sync.contains(&B));
    world.connect_all();
    world.pass_ms(500);
    assert!(world.volume().in_sync.contains(&B), "it is back");
    assert_eq!(recorded(&world, B), [BlockRange::new(300, 1)]);
    assert_eq!(world.differing(A, B), [300]);
    // Part of a comparison settles nothing.
    verify(&mut world, false);
    world.order(A, Order::StopVerify { peer: None }).unwrap();
    world.pass_ms(50);
    assert_eq!(recorded(&world, B), [BlockRange::new(300, 1)]);
    // All of it does.
    let good = world.block(A, 300);
    let disk = &mut world.node(B).disk;
    disk.write(300 * BLOCK as u64, &good);
    disk.flush();
    verify(&mut world, false);
    world.pass_ms(50);
    assert_eq!(recorded(&world, B), []);
}

/// A replica that an operator takes for wrong as a whole is copied anew where it differs, too.
#[test]
fn an_invalidated_replica_differs_no_more() {
    let mut world = used(3);
    rot(&mut world, B, 300);
    verify(&mut world, false);
    world.pass_ms(50);
    world.order(B, Order::Invalidate).unwrap();
    world.pass_ms(100);
    world.connect_all();
    world.pass_ms(3000);
    assert!(world.volume().in_sync.contains(&B), "{:?}", world.volume());
    assert_eq!(recorded(&world, B), []);
    assert!(world.same(A, B));
}

/// A replica of protocol A never joins; it is repaired all the same, and that is known.
#[test]
fn a_replica_outside_the_set_is_repaired() {
    let mut world = used(2);
    world.set_options(|options| {
        options.protocols = vec![PairProtocol {
            nodes: [A, B],
            protocol: Protocol::A,
        }];
    });
    world.pass_ms(500);
    assert_eq!(world.status(A).peers[&B], PeerState::Following);
    rot(&mut world, B, 300);
    verify(&mut world, true);
    world.pass_ms(500);
    assert!(verified(&world, B)[0].2);
    assert!(world.same(A, B));
    assert_eq!(world.status(A).peers[&B], PeerState::Following);
    assert_eq!(recorded(&world, B), []);
    // The next one begins anew.
    rot(&mut world, B, 301);
    verify(&mut world, false);
    world.pass_ms(500);
    assert_eq!(recorded(&world, B), [BlockRange::new(301, 1)]);
}

#[test]
fn a_repair_that_is_not_recorded_yet_is_not_taken_back_by_another_verification() {
    let mut world = World::mixed(&[Protocol::C, Protocol::A, Protocol::C], 1024);
    world.write(A, 0, 20, 7);
    world.pass_ms(1000);
    rot(&mut world, B, 3);
    rot(&mut world, B, 500);
    world.commits = false;
    verify(&mut world, true);
    world.pass_ms(50);
    let again = Order::Verify {
        peer: Some(B),
        repair: false,
    };
    let refused = world.order(A, again.clone()).unwrap_err();
    assert!(refused.contains("not in the control log yet"), "{refused}");
    world.commits = true;
    world.pass_ms(2000);
    assert!(world.same(A, B), "{:?}", world.differing(A, B));
    assert_eq!(recorded(&world, B), [], "it is repaired");
    world.order(A, again).unwrap();
    world.pass_ms(50);
    assert_eq!(verified(&world, B).last(), Some(&(Vec::new(), None, false)));
}

/// The primary is replaced before the log has what it found: that is told as such.
#[test]
fn what_is_not_recorded_when_the_reign_ends_is_told_so() {
    let mut world = used(2);
    rot(&mut world, B, 300);
    world.commits = false;
    verify(&mut world, false);
    world.pass_ms(50);
    assert_eq!(verified(&world, B), []);
    world.commits = true;
    world.proposals.clear();
    world.evict(A);
    world.pass_ms(10);
    let all = verified(&world, B);
    assert_eq!(all.len(), 1);
    assert!(
        all[0].1.as_ref().unwrap().contains("verify again"),
        "{all:?}"
    );
}

#[test]
fn load_is_never_taken_for_damage() {
    let mut world = used(3);
    // It shall not wait for the application.
    world.set_options(|options| options.sync_rate.min = 1 << 40);
    for round in 0..30u8 {
        verify(&mut world, true);
        for step in 0..400u64 {
            if step % 7 == 0 {
                let block = (step * 13 + u64::from(round) * 5) % 1000;
                world.write(A, block, 4, round.wrapping_add(step.to_le_bytes()[0]));
            }
            world.anything();
        }
        world.pass_ms(20);
    }
    for node in [B, C] {
        let all = verified(&world, node);
        assert!(all.len() >= 30, "{}", all.len());
        assert!(all.iter().all(|(found, ..)| found.is_empty()));
    }
    assert_eq!(world.copied, 0);
}

#[test]
fn it_is_stopped_by_order_and_by_a_lost_link() {
    let mut world = used(2);
    verify(&mut world, false);
    world.order(A, Order::StopVerify { peer: None }).unwrap();
    world.pass_ms(10);
    let all = verified(&world, B);
    assert!(
        all[0].1.as_ref().unwrap().contains("an operator"),
        "{all:?}"
    );
    verify(&mut world, false);
    world.cut(A, B);
    world.pass_ms(100);
    let all = verified(&world, B);
    assert!(all[1].1.as_ref().unwrap().contains("link"), "{all:?}");
    assert_eq!(all.len(), 2);
    let error = world
        .order(
            A,
            Order::Verify {
                peer: Some(B),
                repair: false,
            },
        )
        .unwrap_err();
    assert!(error.contains("not in sync"), "{error}");
    let error = world
        .order(
            B,
            Order::Verify {
                peer: None,
                repair: false,
            },
        )
        .unwrap_err();
    assert!(error.contains("primary"), "{error}");
}

/// A part of an answer that is not about what was asked must not be dropped: the rest would look as if it
/// had been compared.
#[test]
fn an_answer_about_other_blocks_ends_the_link_and_counts_for_nothing() {
    let mut world = used(2);
    rot(&mut world, B, 5);
    verify(&mut world, false);
    while !world.nodes[&A].ops.is_empty() {
        world.finish_op(A, 0);
    }
    while !matches!(world.head(A, B), Some(Message::Digests { .. })) {
        world.deliver(A, B);
    }
    let Some(Message::Digests {
        epoch,
        id,
        first,
        digests,
        ..
    }) = world.head(A, B).cloned()
    else {
        panic!("no digests");
    };
    let blocks = vec![BlockRange::new(first, digests.len() as u64 + 1)];
    let message = Message::Differ { epoch, id, blocks };
    world.input(A, Input::Message { peer: B, message });
    assert!(!world.up.contains(&(A, B)));
    let all = verified(&world, B);
    assert_eq!(all.len(), 1);
    assert!(all[0].1.is_some(), "{all:?}");
}

#[test]
fn a_replica_whose_disk_hangs_is_given_up() {
    let mut world = used(2);
    world.node(B).disk.stalled = true;
    verify(&mut world, false);
    world.pass_ms(12_000);
    assert!(!world.volume().in_sync.contains(&B));
    assert_eq!(verified(&world, B).len(), 1);
}

#[test]
fn the_primary_verifies_by_the_clock() {
    let mut world = used(2);
    let volume = world.volume().clone();
    let mut options = volume.options;
    options.verify_every_s = Some(60);
    world.command(&Command::SetVolumeOptions {
        volume: V,
        expect: volume.version,
        options,
    });
    rot(&mut world, B, 5);
    world.pass(Duration::from_secs(59));
    assert_eq!(verified(&world, B), []);
    world.pass(Duration::from_secs(2));
    assert_eq!(verified(&world, B).len(), 1);
    assert_eq!(recorded(&world, B), [BlockRange::new(5, 1)]);
    world.pass(Duration::from_secs(61));
    assert_eq!(verified(&world, B).len(), 2);
}
