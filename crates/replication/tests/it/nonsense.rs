//! A peer that says anything: links may close, the engine lives on.

use bytes::Bytes;
use relevo_replication::Input;
use relevo_types::{BlockRange, ByteRange, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Seq};
use relevo_wire::{Body, Message, PeerInfo, Refusal};

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
    match random.below(20) {
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
        18 => Message::Refuse(Refusal::Protocol {
            reason: String::new(),
        }),
        _ => Message::Ping,
    }
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
