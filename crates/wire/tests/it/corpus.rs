//! Messages of every kind, with numbers at which code stumbles.

use bytes::Bytes;
use relevo_types::{BlockRange, ByteRange, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Seq};
use relevo_wire::{BlockDigest, Body, Message, PeerInfo, Refusal};
use said::fuzz::Random;

/// Kinds of messages that [`message`] makes.
pub(crate) const KINDS: usize = 34;

fn blocks(random: &mut Random) -> Vec<BlockRange> {
    (0..random.below(40))
        .map(|_| BlockRange::new(random.number() >> 20, 1 + random.number() % 9000))
        .collect()
}

fn digests(random: &mut Random) -> Vec<BlockDigest> {
    (0..random.below(40))
        .map(|_| BlockDigest([random.byte(); 32]))
        .collect()
}

fn body(random: &mut Random) -> (ByteRange, Body) {
    let offset = random.number() >> 12;
    if random.one_in(3) {
        return (ByteRange::new(offset, random.number() >> 30), Body::Zeroes);
    }
    let data = random.bytes(9000);
    (
        ByteRange::new(offset, data.len() as u64),
        Body::Data(Bytes::from(data)),
    )
}

fn refusal(random: &mut Random) -> Refusal {
    let reason = "a reason with \u{e4} and \u{20ac}".repeat(random.below(9));
    match random.below(5) {
        0 => Refusal::StaleEpoch {
            given: Epoch(random.tricky()),
            seen: Epoch(random.tricky()),
        },
        1 => Refusal::Disk { reason },
        2 => Refusal::StandAlone { reason },
        3 => Refusal::SplitBrain {
            ours: random.tricky(),
            theirs: random.tricky(),
            why: reason,
        },
        _ => Refusal::Protocol { reason },
    }
}

/// A valid message of any kind.
pub(crate) fn message(random: &mut Random) -> Message {
    let kind = random.below(KINDS);
    of_kind(kind, random)
}

/// A valid message of the kind with this index.
pub(crate) fn of_kind(kind: usize, random: &mut Random) -> Message {
    let epoch = Epoch(random.tricky());
    let seq = Seq(random.tricky());
    let id = random.tricky();
    match kind {
        0 => Message::Hello(PeerInfo {
            node: NodeId(u32::from(random.byte())),
            instance: Instance(id),
            lineage: LineageId(random.tricky()),
            epoch,
        }),
        1 => Message::StartSync { epoch },
        2 => {
            let (range, body) = body(random);
            Message::Write {
                epoch,
                seq,
                complete: Seq(id),
                range,
                body,
                fua: random.one_in(2),
                dirty_for: random.byte(),
            }
        }
        3 => Message::Flush { epoch, id },
        4 => {
            let (range, body) = body(random);
            Message::SyncWrite {
                epoch,
                id,
                range,
                body,
            }
        }
        5 => Message::DirtyMap {
            epoch,
            slot: ReplicaSlot(random.byte() % 7),
            blocks: blocks(random),
        },
        6 => Message::Barrier { epoch, id },
        7 => Message::EpochUpdate {
            epoch,
            in_sync: random.byte(),
        },
        8 => Message::Complete { epoch, seq },
        9 => Message::Reconcile { epoch },
        10 => Message::Uncertain {
            epoch,
            blocks: blocks(random),
            last: random.one_in(2),
        },
        11 => Message::WriteAck { epoch, seq },
        12 => Message::FlushAck { epoch, id },
        13 => Message::SyncAck { epoch, id },
        14 => Message::BarrierAck { epoch, id },
        15 => Message::Tail {
            epoch,
            blocks: blocks(random),
            certain: random.one_in(2),
        },
        16 => Message::Refuse(refusal(random)),
        17 => Message::PauseSync {
            paused: random.one_in(2),
        },
        18 => Message::Digests {
            epoch,
            id,
            first: random.tricky(),
            digests: digests(random),
        },
        19 => Message::Differ {
            epoch,
            id,
            blocks: blocks(random),
        },
        20 => Message::Verifying {
            epoch,
            active: random.one_in(2),
        },
        21 => Message::Behind { epoch, id },
        22 => Message::Following { epoch },
        23 => Message::Receipts {
            epoch,
            wanted: random.one_in(2),
        },
        24 => Message::Received { epoch, seq },
        31 => Message::Generation {
            epoch,
            slot: ReplicaSlot(random.byte() % 7),
            confirmed: random.one_in(2),
        },
        25 => Message::ReadBlocks {
            epoch,
            id,
            blocks: BlockRange::new(random.number() >> 20, random.number() % 9000),
        },
        26 => {
            let (range, body) = body(random);
            Message::Content {
                epoch,
                id,
                range,
                body,
            }
        }
        27 => Message::Ping,
        28 => Message::Changes {
            blocks: random.tricky(),
            consistent: random.one_in(2),
        },
        29 => Message::SyncDigests {
            epoch,
            id,
            first: random.tricky(),
            digests: digests(random),
        },
        30 => Message::SyncDiffer {
            epoch,
            id,
            blocks: blocks(random),
        },
        32 => Message::Moved,
        _ => Message::Pong,
    }
}
