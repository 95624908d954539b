//! A peer that says anything: links may close, the engine lives on.

use std::collections::BTreeSet;

use bytes::Bytes;
use relevo_replication::{AppRequest, Input, Order};
use relevo_types::{BlockRange, ByteRange, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Seq};
use relevo_wire::{Body, Message, PeerInfo, Refusal, encode, frame::is_known};
use said::fuzz::fuzz;

use crate::world::{A, B, C, Random, World};

fn number(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => u64::MAX,
        1 => random.next(),
        2 => 0,
        _ => random.next() % 6,
    }
}

fn runs(random: &mut Random) -> Vec<BlockRange> {
    let count = random.below(4);
    let run = |random: &mut Random| match random.below(6) {
        0 => BlockRange::new(number(random), number(random)),
        _ => BlockRange::new(random.next() % 1000, 1 + random.next() % 24),
    };
    (0..count).map(|_| run(random)).collect()
}

fn body(random: &mut Random, len: u64) -> Body {
    if random.one_in(2) || len > 1 << 20 {
        return Body::Zeroes;
    }
    let wrong = u64::from(random.one_in(10));
    Body::Data(Bytes::from(vec![1; usize::try_from(len + wrong).unwrap()]))
}

fn range(random: &mut Random) -> ByteRange {
    match random.below(6) {
        0 => ByteRange::new(number(random), number(random)),
        _ => BlockRange::new(random.next() % 1000, 1 + random.next() % 8).bytes(),
    }
}

fn message(random: &mut Random, peer: NodeId, known: Epoch) -> Message {
    let epoch = match random.below(6) {
        0 => Epoch(number(random)),
        1 => Epoch(known.0.saturating_add(1)),
        _ => known,
    };
    let byte = u8::try_from(random.below(256)).unwrap();
    let range = range(random);
    let body = body(random, range.len);
    let id = number(random);
    match random.below(35) {
        0 => Message::Hello(PeerInfo {
            node: peer,
            instance: Instance(1),
            lineage: LineageId(number(random)),
            epoch,
        }),
        1 => Message::StartSync { epoch },
        2..5 => Message::Write {
            epoch,
            seq: Seq(id),
            complete: Seq(number(random)),
            range,
            body,
            fua: random.one_in(2),
            dirty_for: byte / 2,
        },
        5 => Message::Flush { epoch, id },
        6 => Message::SyncWrite {
            epoch,
            id,
            range,
            body,
        },
        7 => Message::DirtyMap {
            epoch,
            slot: ReplicaSlot(byte % 9),
            blocks: runs(random),
        },
        8 => Message::Barrier { epoch, id },
        9 => Message::EpochUpdate {
            epoch,
            in_sync: byte,
        },
        10 => Message::Complete {
            epoch,
            seq: Seq(id),
        },
        11 => Message::Reconcile { epoch },
        12 => Message::Uncertain {
            epoch,
            blocks: runs(random),
            last: random.one_in(2),
        },
        13 => Message::WriteAck {
            epoch,
            seq: Seq(id),
        },
        14 => Message::FlushAck { epoch, id },
        15 => Message::SyncAck { epoch, id },
        16 => Message::BarrierAck { epoch, id },
        17 => Message::Tail {
            epoch,
            blocks: runs(random),
            certain: random.one_in(2),
        },
        20 => Message::Digests {
            epoch,
            id,
            first: random.next() % 1030,
            digests: vec![relevo_wire::BlockDigest([7; 32]); random.below(70)],
        },
        21 => Message::Differ {
            epoch,
            id,
            blocks: runs(random),
        },
        22 => Message::Verifying {
            epoch,
            active: random.one_in(2),
        },
        19 => Message::PauseSync {
            paused: random.one_in(2),
        },
        18 => Message::Refuse(Refusal::Protocol {
            reason: String::new(),
        }),
        23 => Message::Behind { epoch, id },
        24 => Message::Following { epoch },
        25 => Message::Receipts {
            epoch,
            wanted: random.one_in(2),
        },
        32 => Message::Generation {
            epoch,
            slot: ReplicaSlot(byte % 9),
            confirmed: random.one_in(2),
        },
        26 => Message::Received {
            epoch,
            seq: Seq(id),
        },
        27 => Message::ReadBlocks {
            epoch,
            id,
            blocks: BlockRange::new(random.next() % 1030, random.next() % 300),
        },
        28 => Message::Content {
            epoch,
            id,
            range,
            body,
        },
        29 => Message::Changes {
            blocks: number(random),
            consistent: random.one_in(2),
        },
        30 => Message::SyncDigests {
            epoch,
            id,
            first: random.next() % 1030,
            digests: vec![relevo_wire::BlockDigest([7; 32]); random.below(70)],
        },
        31 => Message::SyncDiffer {
            epoch,
            id,
            blocks: runs(random),
        },
        33 => Message::Moved,
        _ if random.one_in(2) => Message::Pong,
        _ => Message::Ping,
    }
}

#[test]
fn nonsense_has_every_kind() {
    let mut random = Random::new(3);
    let mut made = BTreeSet::new();
    for _ in 0..4000 {
        // Data of a wrong length can't be encoded, but reach the engine in these tests.
        if let Ok(frame) = encode(&message(&mut random, C, Epoch(3))) {
            made.insert(frame.head[3]);
        }
    }
    let known: BTreeSet<u8> = (0..=u8::MAX).filter(|kind| is_known(*kind)).collect();
    assert_eq!(
        made, known,
        "`message` above makes the kinds on the left, the code knows those on the right"
    );
}

#[test]
fn an_engine_survives_whatever_a_peer_says() {
    let mut understood = 0;
    for seed in 0..60 {
        let mut world = World::opened(3, 1024, A);
        world.random = Random::new(seed);
        let target = if seed % 2 == 0 { A } else { B };
        for _ in 0..300 {
            let peer = if target == A || world.random.one_in(2) {
                C
            } else {
                A
            };
            let mut random = world.random.clone();
            let message = message(&mut random, peer, world.status(target).epoch);
            world.random = random;
            world.input(target, Input::Message { peer, message });
            if world.up.contains(&(target, peer)) {
                understood += 1;
            }
            if world.status(A).open {
                let block = world.random.next() % 1000;
                world.write(A, block, 1, 3);
            }
            if world.random.one_in(4) {
                world.pass_ms(20);
                world.connect_all();
                world.run();
            }
        }
    }
    assert!(
        understood > 1000,
        "the links were closed nearly always: {understood}"
    );
}

/// States of an engine that a peer may find it in.
const STATES: usize = 10;

/// A world of three in the middle of something, by number.
fn in_the_middle_of(state: usize, seed: u64) -> World {
    let mut world = match state {
        // Attaching: nothing was read from the disks yet.
        0 => World::new(3, 1024, seed),
        // Attached, linked, no primary.
        1 => {
            let mut world = World::new(3, 1024, seed);
            world.connect_all();
            world.run();
            world
        }
        _ => World::opened(3, 1024, A),
    };
    world.random = Random::new(seed);
    match state {
        // C is being resynced.
        3 => {
            world.cut(A, C);
            world.pass_ms(20);
            for block in 0..200 {
                world.write(A, block * 3, 1, 5);
            }
            world.pass_ms(20);
            world.connect_all();
        }
        // B is reconciling after the death of A.
        4 => {
            world.write(A, 7, 3, 5);
            world.crash(A, true);
            world.pass_ms(20);
            world.evict(A);
            world.promote(B);
        }
        // A is stepping down, with writes under way.
        5 => {
            for block in 0..20 {
                world.write(A, block, 1, 5);
            }
            world.input(A, Input::Demote);
        }
        // B is detaching.
        6 => world.input(B, Input::Detach),
        // A disk has failed.
        7 => {
            let victim = if world.random.one_in(2) { A } else { B };
            world.node(victim).disk.broken = Some("write");
            world.write(A, 1, 1, 5);
        }
        // A disk hangs.
        8 => {
            let victim = if world.random.one_in(2) { A } else { B };
            world.node(victim).disk.stalled = true;
            world.write(A, 1, 1, 5);
        }
        // C is left out, and comes back with another configuration on its way.
        9 => {
            world.cut(A, C);
            world.pass_ms(1500);
            world.commits = false;
            world.connect_all();
        }
        _ => {}
    }
    world
}

/// One thing of those that are due happens; or something that nobody asked for.
fn something_happens(world: &mut World) {
    let ids = world.ids();
    let id = ids[world.random.below(ids.len())];
    let peer = ids[world.random.below(ids.len())];
    match world.random.below(14) {
        0..4 => {
            let wires = world.busy_wires();
            if !wires.is_empty() {
                let (from, to) = wires[world.random.below(wires.len())];
                world.deliver(from, to);
            }
        }
        4..7 => {
            let ops = world.node(id).ops.len();
            if ops > 0 && world.is_up(id) {
                let index = world.random.below(ops);
                world.finish_op(id, index);
            }
        }
        7 => world.deliver_config(id),
        8 => {
            world.commit();
        }
        9 => {
            world.pass_ms(20);
        }
        10 => world.connect(id, peer),
        11 => world.cut(id, peer),
        12 => {
            let block = world.random.next() % 1000;
            match world.random.below(4) {
                0 => {
                    world.request(id, AppRequest::Flush);
                }
                1 => {
                    world.read(id, BlockRange::new(block, 2).bytes());
                }
                _ => {
                    world.write(id, block, 1, 3);
                }
            }
        }
        _ => {
            let order = match world.random.below(8) {
                6 => Order::Verify {
                    peer: None,
                    repair: true,
                },
                7 => Order::StopVerify { peer: None },
                4 => Order::PauseSync { peer: None },
                5 => Order::ResumeSync { peer: None },
                0 => Order::SuspendIo,
                1 => Order::ResumeIo,
                2 => Order::Disconnect { peer: None },
                _ => Order::Connect { peer: None },
            };
            if world.is_up(id) {
                // It may be refused: nothing is attached, say.
                drop(world.order(id, order));
            }
        }
    }
}

#[test]
fn an_engine_in_any_state_survives_whatever_a_peer_says() {
    let mut understood = [0u64; STATES];
    fuzz(
        "an_engine_in_any_state_survives_whatever_a_peer_says",
        |seeds| {
            let state = seeds.below(STATES);
            let mut world = in_the_middle_of(state, seeds.number());
            for _ in 0..60 {
                let ids = world.ids();
                let target = ids[world.random.below(ids.len())];
                // Also from a node that has no replica, and from itself.
                let peer = match world.random.below(12) {
                    0 => NodeId(9),
                    _ => ids[world.random.below(ids.len())],
                };
                if world.is_up(target) {
                    let known = world.status(target).epoch;
                    let mut random = world.random.clone();
                    let message = message(&mut random, peer, known);
                    world.random = random;
                    understood[state] += u64::from(world.up.contains(&(target, peer)));
                    world.input(target, Input::Message { peer, message });
                }
                for _ in 0..world.random.below(8) {
                    something_happens(&mut world);
                }
            }
        },
    );
    // One seed played again reaches one state only.
    if std::env::var_os("RELEVO_FUZZ_SEED").is_none() {
        let reached = understood.iter().filter(|count| **count > 0).count();
        assert!(
            reached == STATES,
            "not every state was reached: {understood:?}"
        );
    }
}
