//! Replicas that come and go while the volume is in use.

use relevo_format::Start;
use relevo_replication::{DiskState, PeerState};
use relevo_types::{
    NodeId,
    cluster::{Command, OnCongestion, Protocol, ReplicaSpec},
};

use crate::{
    disk::Disk,
    world::{A, B, C, D, V, World, formatted},
};

impl World {
    /// Takes a node's replica away with its disk.
    pub(crate) fn remove_replica(&mut self, node: NodeId) {
        self.command(&Command::RemoveReplica { volume: V, node });
        self.crash(node, true);
        self.node(node).disk = Disk::default();
    }

    /// Makes a replica on a node that had one; it has nothing.
    pub(crate) fn add_replica(&mut self, node: NodeId) {
        self.add_replica_for(node, Protocol::C, None);
    }

    /// The same, of any protocol, perhaps in the place of another one.
    pub(crate) fn add_replica_for(
        &mut self,
        node: NodeId,
        protocol: Protocol,
        replaces: Option<NodeId>,
    ) {
        let replica = ReplicaSpec {
            node,
            protocol,
            backing: None,
            force: false,
        };
        self.command(&Command::AddReplica {
            volume: V,
            replica,
            replaces,
        });
        let slot = self.volume().slot(node).unwrap();
        self.node(node).disk = formatted(node, slot, &self.layout.clone(), Start::Blank);
        self.command(&Command::ReplicaCreated { volume: V, node });
        self.start(node);
    }
}

fn block(world: &World, node: NodeId, number: u64) -> u8 {
    world.block(node, number)[0]
}

#[test]
fn a_replica_that_is_added_gets_everything_and_joins() {
    let mut world = World::opened(3, 1024, A);
    world.remove_replica(C);
    world.pass_ms(10);
    assert!(!world.status(A).peers.contains_key(&C));
    for number in 0..300 {
        world.write(A, number, 1, 5);
    }
    world.pass_ms(10);
    world.add_replica(C);
    world.pass_ms(5);
    assert_eq!(world.status(C).disk, DiskState::Inconsistent);
    world.connect_all();
    world.pass_ms(200);
    assert!(world.volume().in_sync.contains(&C));
    assert!(world.same(A, C));
    assert_eq!(world.status(A).peers[&C], PeerState::Established);
    assert_eq!(world.status(C).disk, DiskState::UpToDate);
}

#[test]
fn what_waits_for_a_removed_replica_goes_on() {
    let mut world = World::opened(3, 1024, A);
    world.silence(A, C);
    let write = world.write(A, 7, 1, 9);
    world.pass_ms(50);
    assert!(!world.is_acked(write));
    world.remove_replica(C);
    world.pass_ms(10);
    assert!(world.is_acked(write));
    assert_eq!(block(&world, B, 7), 9);
}

/// Nobody but the new replica itself says that it lacks everything, so it must say so to whoever is
/// primary then, also after it lost power half-way.
#[test]
fn an_added_replica_knows_that_it_has_nothing_whoever_is_primary() {
    let mut world = World::opened(3, 1024, A);
    world.write(A, 900, 1, 3);
    world.pass_ms(10);
    world.remove_replica(C);
    world.pass_ms(10);
    world.add_replica(C);
    world.pass_ms(5);
    world.connect(A, C);
    world.run();
    world.crash(C, true);
    world.crash(A, true);
    world.evict(A);
    world.promote(B);
    world.start(C);
    world.connect_all();
    world.pass_ms(2000);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.volume());
    assert_eq!(block(&world, C, 900), 3);
    assert!(world.same(B, C));
}

#[test]
fn the_slot_of_a_removed_replica_serves_the_next() {
    let mut world = World::opened(3, 1024, A);
    for round in 1..4 {
        world.remove_replica(C);
        for number in 0..40 {
            world.write(A, number * round, 1, 10 + u8::try_from(round).unwrap());
        }
        world.pass_ms(10);
        world.add_replica(C);
        world.connect_all();
        world.pass_ms(200);
        assert!(world.same(A, C), "round {round}");
        assert!(world.volume().in_sync.contains(&C));
    }
}

/// B hears of the new replica only in band. What A sent to it and to B when it was lost again, B must
/// know to be missing there, although its own configuration does not list that replica.
#[test]
fn a_member_marks_for_a_replica_that_it_was_not_told_of() {
    let mut world = World::opened(3, 1024, A);
    let old_slot = world.volume().slot(C);
    world.node(B).control = false;
    world.remove_replica(C);
    world.pass_ms(10);
    // Another slot than the old one, which B knows: slots are chosen by the version.
    while world.volume().version % 7 != 4 {
        let volume = world.volume().clone();
        world.command(&Command::SetVolumeOptions {
            volume: volume.id,
            expect: volume.version,
            options: volume.options,
        });
    }
    world.add_replica(C);
    assert_ne!(world.volume().slot(C), old_slot);
    world.connect_all();
    world.pass_ms(300);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.volume());

    world.silence(A, C);
    let write = world.write(A, 500, 1, 9);
    world.pass_ms(1100);
    assert!(world.is_acked(write), "C has left");
    world.crash(A, true);
    world.node(B).control = true;
    world.evict(A);
    world.promote(B);
    world.end_silence();
    world.pass_ms(2500);
    world.connect_all();
    world.pass_ms(2500);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.volume());
    assert_eq!(block(&world, C, 500), 9);
}

/// A replica of protocol A in the place of one of protocol C: it is in the set for the moment in which the
/// other one's place becomes free, and outside again when that one is gone.
#[test]
fn a_replica_of_protocol_a_takes_the_place_of_another_one() {
    let mut world = World::opened(4, 1024, A);
    world.remove_replica(D);
    for number in 0..300 {
        world.write(A, number, 1, 5);
    }
    world.pass_ms(10);
    world.add_replica_for(D, Protocol::A, Some(C));
    world.connect_all();
    world.pass_ms(1000);
    let volume = world.volume();
    assert!(!volume.replicas.contains_key(&C), "{volume:?}");
    assert_eq!(volume.replicas[&D].replaces, None);
    assert_eq!(volume.in_sync.iter().copied().collect::<Vec<_>>(), [A, B]);
    assert!(world.same(A, D));
    assert_eq!(world.status(A).peers[&D], PeerState::Following);
    // Nothing waits for it any more.
    world.silence(A, D);
    let write = world.write(A, 7, 1, 9);
    world.pass_ms(10);
    assert!(world.is_acked(write));
}

/// The primary's own replica is moved: it stays until the role has gone elsewhere, and the successor is not
/// waited for meanwhile.
#[test]
fn the_primary_s_replica_is_moved_to_one_of_protocol_a() {
    let mut world = World::opened(2, 1024, A);
    world.remove_replica(B);
    world.write(A, 3, 1, 7);
    world.pass_ms(10);
    world.add_replica_for(B, Protocol::A, Some(A));
    world.connect_all();
    world.pass_ms(1000);
    assert!(world.volume().replicas[&A].leaving);
    assert_eq!(world.status(A).peers[&B], PeerState::Following);
    assert!(!world.volume().in_sync.contains(&B));
    world.set_options(|options| options.admit = Some(B));
    world.pass_ms(100);
    world.input(A, relevo_replication::Input::Demote);
    world.pass_ms(100);
    world.promote(B);
    world.pass_ms(1000);
    assert!(world.status(B).open);
    assert!(!world.volume().replicas.contains_key(&A));
    assert_eq!(block(&world, B, 3), 7);
}

/// While it gets everything it is left behind like any other of its kind: the application does not wait for
/// hours because a replica is moved.
#[test]
fn a_successor_that_does_not_keep_up_is_left_behind() {
    let mut world = World::opened(3, 1024, A);
    world.set_options(|options| {
        options.congestion.policy = OnCongestion::PullAhead;
        options.congestion.sndbuf_bytes = 16 * 4096;
        options.congestion.fill_bytes = 8 * 4096;
    });
    world.remove_replica(C);
    world.pass_ms(10);
    world.add_replica_for(C, Protocol::A, Some(B));
    world.connect_all();
    world.run();
    world.node(C).disk.stalled = true;
    let writes: Vec<_> = (0..40).map(|n| world.write(A, n, 1, 5)).collect();
    world.pass_ms(100);
    assert!(writes.iter().all(|write| world.is_acked(*write)));
    world.node(C).disk.stalled = false;
    world.pass_ms(1000);
    assert!(!world.volume().replicas.contains_key(&B));
    assert!(world.same(A, C));
}
