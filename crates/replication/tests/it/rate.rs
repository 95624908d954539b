//! How fast resyncs and verifications go. Disks and links take no time here: what holds them is the rate
//! alone.

use relevo_replication::{Order, PeerState, VolumeEvent};
use relevo_types::{NodeId, cluster::options::Csums};

use crate::world::{A, B, BLOCK, C, World};

const BLOCKS: u64 = 4096;

const MIB: u64 = 1 << 20;

/// Replicas of which the others lack everything, and are not linked.
fn lacking(nodes: u32) -> World {
    let mut world = World::opened(nodes, BLOCKS, A);
    world.set_options(|options| options.csums = Csums::No);
    for node in world.ids().into_iter().filter(|node| *node != A) {
        world.cut(A, node);
    }
    world.pass_ms(100);
    for block in (0..BLOCKS).step_by(64) {
        world.write(A, block, 64, 7);
    }
    world.pass_ms(1000);
    world
}

/// Bytes copied while so many milliseconds pass, the application writing or not.
fn copied_in(world: &mut World, ms: u64, writes: bool) -> u64 {
    let before = world.copied;
    for step in 0..ms {
        if writes {
            world.write(A, step % 64, 1, 9);
        }
        world.pass_ms(1);
    }
    (world.copied - before) * BLOCK as u64
}

fn limit(world: &World) -> Option<u64> {
    world.status(A).sync_limit
}

#[test]
fn without_an_application_a_resync_is_held_by_nothing() {
    let mut world = lacking(2);
    world.connect(A, B);
    assert_eq!(copied_in(&mut world, 1, false), BLOCKS * BLOCK as u64);
    assert_eq!(limit(&world), None);
}

#[test]
fn an_application_comes_first_and_what_is_idle_is_used() {
    let mut world = lacking(2);
    world.write(A, 0, 1, 1);
    world.run();
    world.connect(A, B);
    // From 4 MiB/s on, what the bucket holds first, then an eighth more each 100 ms: its writes are quick.
    let burst = copied_in(&mut world, 100, true);
    assert!(burst <= MIB, "{burst}");
    let first = copied_in(&mut world, 300, true);
    assert!((MIB..2 * MIB).contains(&first), "{first}");
    assert!(limit(&world).is_some_and(|limit| limit >= 4 * MIB));
    let second = copied_in(&mut world, 300, true);
    assert!(second > first, "{second} after {first}");
    // And nothing holds it when the application is still.
    copied_in(&mut world, 250, false);
    assert_eq!(limit(&world), None);
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
    assert!(world.same(A, B));
}

#[test]
fn chosen_rates_are_kept() {
    let mut world = lacking(2);
    world.set_options(|options| options.sync_rate.max = Some(8 * MIB));
    world.pass_ms(200);
    world.connect(A, B);
    let copied = copied_in(&mut world, 500, false);
    assert!((3 * MIB..5 * MIB).contains(&copied), "{copied}");
    // Changed on the way.
    world.set_options(|options| options.sync_rate.fixed = Some(2 * MIB));
    copied_in(&mut world, 100, false);
    let copied = copied_in(&mut world, 1000, true);
    assert!((MIB..3 * MIB).contains(&copied), "{copied}");
    assert_eq!(limit(&world), Some(2 * MIB));
    world.set_options(|options| options.sync_rate = Default::default());
    world.pass_ms(300);
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
}

#[test]
fn peers_share_what_there_is() {
    let mut world = lacking(3);
    world.set_options(|options| options.sync_rate.fixed = Some(8 * MIB));
    world.pass_ms(200);
    world.connect(A, B);
    world.connect(A, C);
    copied_in(&mut world, 1000, false);
    let left = |world: &World, node: NodeId| match world.status(A).peers[&node] {
        PeerState::SyncSource { dirty } => dirty,
        other => panic!("{node} is {other:?}"),
    };
    let (b, c) = (left(&world, B), left(&world, C));
    // All that the bucket held at first went to one of them.
    assert!(b.abs_diff(c) <= 256, "{b} and {c} blocks are left");
    let copied = (2 * BLOCKS - b - c) * BLOCK as u64;
    assert!((6 * MIB..10 * MIB).contains(&copied), "{copied}");
}

#[test]
fn a_verification_is_held_like_a_resync() {
    let mut world = World::opened(2, BLOCKS, A);
    world.set_options(|options| options.sync_rate.fixed = Some(8 * MIB));
    world.pass_ms(200);
    let verify = Order::Verify {
        peer: None,
        repair: false,
    };
    world.order(A, verify).unwrap();
    let left = |world: &World| match world.status(A).peers[&B] {
        PeerState::VerifyS { left } => left * BLOCK as u64,
        other => panic!("{other:?}"),
    };
    world.pass_ms(1000);
    let done = BLOCKS * BLOCK as u64 - left(&world);
    assert!((6 * MIB..10 * MIB).contains(&done), "{done}");
    world.pass_ms(1500);
    let events = &world.nodes[&A].events;
    assert!(
        events
            .iter()
            .any(|event| matches!(event, VolumeEvent::Verified { stopped: None, .. }))
    );
}

/// Nothing waits: nothing is due.
#[test]
fn a_volume_at_rest_is_not_woken_by_its_rate() {
    let mut world = lacking(2);
    world.set_options(|options| options.sync_rate.fixed = Some(8 * MIB));
    world.connect(A, B);
    world.pass_ms(4000);
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
    let quiet = world.now;
    assert!(
        world.deadline() >= quiet + std::time::Duration::from_millis(100),
        "{:?}",
        world.deadline()
    );
}
