//! A volume that nobody uses: a replica in sync brings the others up to date.

use relevo_replication::{PeerState, ReplyError, VolumeEvent};
use relevo_types::cluster::VolumeChange;

use crate::{
    scenarios::block,
    world::{A, B, C, World},
};

/// C was away while 50 blocks were written; then the primary stepped down, and C is back.
fn one_lags() -> World {
    let mut world = World::opened(3, 1024, A);
    world.cut(A, C);
    world.cut(B, C);
    world.pass_ms(10);
    for number in 0..50 {
        world.write(A, number, 1, 5);
    }
    world.pass_ms(10);
    world.change(world.volume().epoch, VolumeChange::Demote { node: A });
    world.run();
    world.connect_all();
    world.pass_ms(100);
    assert_eq!(
        (world.volume().primary, world.volume().in_sync.len()),
        (None, 2)
    );
    world
}

fn tend(world: &mut World, node: relevo_types::NodeId) {
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::Tend { node });
}

#[test]
fn one_in_sync_brings_the_others_up_to_date_and_takes_no_request() {
    let mut world = one_lags();
    tend(&mut world, A);
    world.pass_ms(100);
    assert_eq!(world.volume().in_sync.len(), 3);
    assert_eq!(world.volume().serving(), None);
    assert!(world.same(A, C));
    assert!(!world.status(A).open);
    let write = world.write(A, 0, 1, 9);
    world.run();
    assert_eq!(world.replies[&write], Err(ReplyError::NotPrimary));
    let opened =
        |event: &VolumeEvent| matches!(event, VolumeEvent::Opened { epoch } if epoch.0 > 3);
    assert!(!world.nodes[&A].events.iter().any(opened));
    // The same node is promoted: it serves without doing anything again.
    world.promote(A);
    world.run();
    let write = world.write(A, 0, 1, 9);
    world.run();
    assert!(world.is_acked(write));
    assert_eq!(block(&world, C, 0), 9);
}

#[test]
fn whoever_is_promoted_displaces_it_in_the_middle() {
    let mut world = one_lags();
    world.node(C).disk.stalled = true;
    tend(&mut world, A);
    world.run();
    assert!(matches!(
        world.status(A).peers[&C],
        PeerState::SyncSource { .. }
    ));
    // A hears nothing of it.
    world.node(A).control = false;
    world.promote(B);
    world.run();
    assert!(world.status(B).open, "{}", world.tail());
    let write = world.write(B, 3, 1, 7);
    world.node(C).disk.stalled = false;
    world.pass_ms(200);
    assert!(world.is_acked(write));
    world.node(A).control = true;
    world.pass_ms(500);
    assert_eq!(world.volume().in_sync.len(), 3);
    for node in [A, B, C] {
        assert_eq!(block(&world, node, 3), 7);
    }
}

#[test]
fn it_makes_nobody_leave_and_gives_the_role_back() {
    let mut world = one_lags();
    tend(&mut world, A);
    world.pass_ms(100);
    world.cut(A, B);
    world.pass_ms(3000);
    assert_eq!(world.volume().primary, None);
    assert!(world.volume().in_sync.contains(&B));
}
