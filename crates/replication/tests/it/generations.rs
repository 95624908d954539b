//! What members keep marked for a replica of protocol A: two generations, not everything since it was in
//! the set last.

use relevo_replication::PeerState;
use relevo_types::{
    NodeId,
    cluster::{
        Protocol::{A as Async, B as Receipt, C as Sync},
        options::Csums,
    },
};

use crate::world::{A, B, C, D, World};

fn dirty(world: &World, at: NodeId, of: NodeId) -> u64 {
    let engine = world.nodes[&at].engine.as_ref().unwrap();
    engine.dirty_blocks(of).iter().map(|run| run.count).sum()
}

/// The primary is lost; its follower and the next primary find each other.
fn fail_over(world: &mut World, to: NodeId) {
    world.crash(A, true);
    world.evict(A);
    world.promote(to);
    world.connect_all();
    world.pass_ms(3000);
    assert!(world.status(to).open);
}

#[test]
fn after_a_takeover_only_the_last_generations_are_copied() {
    let mut world = World::mixed(&[Sync, Sync, Async], 8192);
    for number in 0..500 {
        world.write(A, number * 8, 1, 1);
    }
    world.pass_ms(1000);
    assert_eq!(dirty(&world, B, C), 0);
    for number in 0..7 {
        world.write(A, 5000 + number, 1, 2);
    }
    world.pass_ms(10);
    assert_eq!(dirty(&world, B, C), 7);
    // What is compared and the same is not copied; here it is.
    world.set_options(|options| options.csums = Csums::No);
    let before = world.copied;
    fail_over(&mut world, B);
    assert_eq!(world.status(B).peers[&C], PeerState::Following);
    assert!(world.same(B, C));
    assert_eq!(world.copied - before, 7, "blocks copied after the takeover");
}

/// A follower that is slow keeps its generation open, however long that takes.
#[test]
fn what_a_follower_did_not_acknowledge_stays_marked() {
    let mut world = World::mixed(&[Sync, Sync, Async], 8192);
    world.write(A, 1, 1, 1);
    world.pass_ms(1000);
    world.node(C).disk.stalled = true;
    world.write(A, 2, 1, 1);
    world.pass_ms(700);
    world.write(A, 3, 1, 1);
    world.pass_ms(2000);
    assert_eq!(dirty(&world, B, C), 2);
    // It owes the first one only.
    world.node(C).disk.stalled = false;
    world.pass_ms(10);
    world.node(C).disk.stalled = true;
    world.write(A, 4, 1, 1);
    world.pass_ms(2000);
    assert!(dirty(&world, B, C) >= 1);
    let before = world.copied;
    world.node(C).disk.stalled = false;
    fail_over(&mut world, B);
    assert!(world.same(B, C));
    assert!(world.copied - before <= 3, "{}", world.copied - before);
}

/// What was acknowledged on a link that is gone says nothing of the next one.
#[test]
fn a_lost_link_to_the_follower_begins_anew() {
    let mut world = World::mixed(&[Sync, Sync, Async], 8192);
    world.write(A, 1, 1, 1);
    world.pass_ms(1000);
    world.silence(A, C);
    world.write(A, 2, 1, 2);
    world.pass_ms(3000);
    world.write(A, 3, 1, 2);
    world.pass_ms(1000);
    assert_eq!(dirty(&world, B, C), 2);
    fail_over(&mut world, B);
    assert!(world.same(B, C));
}

/// A member that crashes takes all its marks for old: what it forgot it need not know, what it did not it
/// knows.
#[test]
fn a_member_that_restarts_keeps_what_it_has_on_its_disk() {
    let mut world = World::mixed(&[Sync, Sync, Async], 8192);
    world.write(A, 1, 1, 1);
    world.pass_ms(1000);
    world.node(C).disk.stalled = true;
    world.write(A, 300, 1, 2);
    world.pass_ms(100);
    world.crash(B, true);
    world.start(B);
    world.run();
    world.connect(A, B);
    world.pass_ms(3000);
    assert!(world.volume().in_sync.contains(&B));
    assert!(dirty(&world, B, C) >= 1);
    world.node(C).disk.stalled = false;
    fail_over(&mut world, B);
    assert!(world.same(B, C));
}

/// Two followers mark for each other; a member of protocol B may only have received what they have.
#[test]
fn followers_forget_for_each_other_too() {
    let mut world = World::mixed(&[Receipt, Receipt, Async, Async], 8192);
    for number in 0..50 {
        world.write(A, number * 8, 1, 1);
    }
    world.pass_ms(1500);
    for (at, of) in [(B, C), (B, D), (C, D), (D, C)] {
        assert_eq!(dirty(&world, at, of), 0, "{at} for {of}");
    }
    world.node(D).disk.stalled = true;
    world.write(A, 1000, 1, 2);
    world.pass_ms(1500);
    assert_eq!((dirty(&world, B, D), dirty(&world, C, D)), (1, 1));
    assert_eq!((dirty(&world, B, C), dirty(&world, A, D)), (0, 0));
}
