use bytes::Bytes;
use proptest::prelude::*;
use relevo_types::{
    BlockRange, ByteRange, ClusterId, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Seq,
    VolumeId, cluster::Encryption,
};

use super::*;
use crate::{BlockDigest, Body, PeerInfo, Refusal};

fn bytes_of(message: &Message) -> Vec<u8> {
    let encoded = encode(message).unwrap();
    let mut all = encoded.head.to_vec();
    all.extend_from_slice(encoded.data.as_deref().unwrap_or_default());
    assert_eq!(all.len(), encoded.len());
    all
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write() -> Message {
    Message::Write {
        epoch: Epoch(3),
        seq: Seq(7),
        complete: Seq(6),
        range: ByteRange::new(4096, 4),
        body: Body::Data(Bytes::from_static(b"abcd")),
        fua: true,
        dirty_for: 0b100,
    }
}

#[test]
fn golden_bytes() {
    // Computed by an independent implementation of the specification.
    assert_eq!(
        hex(&bytes_of(&Message::Ping)),
        "5276011200000000000000000000000000000000e9780a93"
    );
    assert_eq!(
        hex(&bytes_of(&write())),
        "52760103\
         2b000000\
         04000000\
         fe081072\
         310ac892\
         e773f026\
         03000000000000000700000000000000060000000000000000100000000000000400000000000000\
         000104\
         61626364"
    );
    let hello = LinkHello::new(ClusterId([7; 16]), VolumeId(9), Encryption::On);
    assert_eq!(
        hex(&hello.encode()),
        "52454c45564f444c010100000707070707070707070707070707070709000000996efcea"
    );
    let hello = LinkHello::new(ClusterId([7; 16]), VolumeId(9), Encryption::Off);
    assert_eq!(
        hex(&hello.encode()),
        "52454c45564f444c0101010007070707070707070707070707070707090000002d80e9b6"
    );
    assert_eq!(LinkHello::decode(&hello.encode()), Ok(hello));
}

#[test]
fn the_data_is_not_copied() {
    let data = Bytes::from(vec![5; 8192]);
    let message = Message::SyncWrite {
        epoch: Epoch(1),
        id: 1,
        range: ByteRange::new(0, 8192),
        body: Body::Data(data.clone()),
    };
    let encoded = encode(&message).unwrap();
    assert_eq!(encoded.data.unwrap().as_ptr(), data.as_ptr());
}

#[test]
fn a_caller_mistake_is_an_error() {
    let short = Message::SyncWrite {
        epoch: Epoch(1),
        id: 1,
        range: ByteRange::new(0, 8192),
        body: Body::Data(Bytes::from_static(b"x")),
    };
    assert!(matches!(encode(&short), Err(FrameError::Malformed { .. })));
    let long = Message::SyncWrite {
        epoch: Epoch(1),
        id: 1,
        range: ByteRange::new(0, MAX_DATA_BYTES as u64 + 1),
        body: Body::Data(Bytes::from(vec![0; MAX_DATA_BYTES + 1])),
    };
    assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    let many = Message::Tail {
        epoch: Epoch(1),
        blocks: vec![BlockRange::new(0, 1); MAX_BLOCK_RUNS + 1],
        certain: true,
    };
    assert!(matches!(encode(&many), Err(FrameError::TooLong { .. })));
    let many = digests(MAX_DIGESTS + 1);
    assert!(matches!(encode(&many), Err(FrameError::TooLong { .. })));
}

fn digests(count: usize) -> Message {
    Message::Digests {
        epoch: Epoch(1),
        id: 1,
        first: 0,
        digests: vec![BlockDigest([9; BlockDigest::BYTES]); count],
    }
}

#[test]
fn the_longest_frame_passes() {
    let blocks = vec![BlockRange::new(9, 1); MAX_BLOCK_RUNS];
    let runs = Message::Uncertain {
        epoch: Epoch(1),
        blocks,
        last: true,
    };
    for message in [runs, digests(MAX_DIGESTS)] {
        let mut decoder = Decoder::new();
        assert_eq!(
            decoder.take(&mut &bytes_of(&message)[..]),
            Ok(Some(message))
        );
    }
}

#[test]
fn a_length_beyond_the_bound_is_refused_before_it_is_awaited() {
    let header = Header {
        kind: 18,
        field_len: 0,
        data_len: u32::try_from(MAX_DATA_BYTES).unwrap() + 1,
        field_crc: 0,
        data_crc: 0,
    };
    let mut decoder = Decoder::new();
    assert!(matches!(
        decoder.take(&mut &header.to_bytes()[..]),
        Err(FrameError::TooLong { part: "data", .. })
    ));
    let ping = bytes_of(&Message::Ping);
    assert!(decoder.take(&mut &ping[..]).is_err(), "an error is final");
}

/// In pieces, as the bytes of a socket come.
#[test]
fn data_can_be_read_in_place() {
    let data: Vec<u8> = (0..9999u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    let message = Message::SyncWrite {
        epoch: Epoch(1),
        id: 1,
        range: ByteRange::new(0, data.len() as u64),
        body: Body::Data(data.into()),
    };
    let bytes = [bytes_of(&Message::Ping), bytes_of(&message)].concat();
    let mut decoder = Decoder::new();
    assert_eq!(decoder.place(1, 4096), None, "no frame is under way");
    let mut input = &bytes[..100];
    assert_eq!(decoder.take(&mut input), Ok(Some(Message::Ping)));
    assert_eq!(decoder.take(&mut input), Ok(None));
    let mut at = 100;
    let last = loop {
        assert_eq!(decoder.place(10_000, 4096), None, "too little is missing");
        let place = decoder.place(1, 4096).unwrap();
        let count = place.len().min(bytes.len() - at).div_ceil(2);
        place[..count].copy_from_slice(&bytes[at..at + count]);
        at += count;
        if let Some(last) = decoder.placed(count).unwrap() {
            break last;
        }
    };
    assert_eq!((last, at), (message, bytes.len()));
    let mut damaged = bytes_of(&write());
    let end = damaged.len() - 1;
    damaged[end] ^= 1;
    assert_eq!(decoder.take(&mut &damaged[..end]), Ok(None));
    decoder
        .place(1, 1)
        .unwrap()
        .copy_from_slice(&damaged[end..]);
    let part = "data";
    assert_eq!(decoder.placed(1), Err(FrameError::Checksum { part }));
}

#[test]
fn greetings_are_checked() {
    let ours = LinkHello::new(ClusterId([1; 16]), VolumeId(1), Encryption::On);
    assert_eq!(ours.agree(&ours), Ok(PROTOCOL_MAX));
    let cluster = LinkHello::new(ClusterId([2; 16]), VolumeId(1), Encryption::On);
    assert!(matches!(
        ours.agree(&cluster),
        Err(HelloError::OtherCluster { .. })
    ));
    let volume = LinkHello::new(ClusterId([1; 16]), VolumeId(2), Encryption::On);
    assert!(matches!(
        ours.agree(&volume),
        Err(HelloError::OtherVolume { .. })
    ));
    let plain = LinkHello {
        encryption: Encryption::Off,
        ..ours
    };
    assert_eq!(plain.agree(&plain), Ok(PROTOCOL_MAX));
    for (one, other) in [(ours, plain), (plain, ours)] {
        let refused = one.agree(&other).unwrap_err().to_string();
        assert!(refused.contains("option `encryption`"), "{refused}");
    }
    for flags in [ours, plain] {
        for continues in [false, true] {
            let hello = LinkHello { continues, ..flags };
            assert_eq!(LinkHello::decode(&hello.encode()), Ok(hello));
        }
    }
    let newer = LinkHello {
        protocol_min: ProtocolVersion(PROTOCOL_MAX.0 + 1),
        protocol_max: ProtocolVersion(PROTOCOL_MAX.0 + 3),
        ..ours
    };
    assert!(matches!(
        ours.agree(&newer),
        Err(HelloError::NoCommonVersion { .. })
    ));
    let overlapping = LinkHello {
        protocol_max: ProtocolVersion(PROTOCOL_MAX.0 + 3),
        ..ours
    };
    assert_eq!(ours.agree(&overlapping), Ok(PROTOCOL_MAX));
    assert_eq!(
        LinkHello::decode(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n\0"),
        Err(HelloError::NotRelevo)
    );
}

fn blocks() -> impl Strategy<Value = Vec<BlockRange>> {
    prop::collection::vec((0..1u64 << 40, 1..1u64 << 20), 0..20).prop_map(|runs| {
        runs.into_iter()
            .map(|(first, count)| BlockRange::new(first, count))
            .collect()
    })
}

fn body() -> impl Strategy<Value = (ByteRange, Body)> {
    let data =
        (0..1u64 << 40, prop::collection::vec(any::<u8>(), 0..300)).prop_map(|(at, data)| {
            (
                ByteRange::new(at, data.len() as u64),
                Body::Data(data.into()),
            )
        });
    let zeroes = (0..1u64 << 40, 0..1u64 << 40)
        .prop_map(|(at, len)| (ByteRange::new(at, len), Body::Zeroes));
    prop_oneof![data, zeroes]
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        any::<(u64, u64)>().prop_map(|(given, seen)| Refusal::StaleEpoch {
            given: Epoch(given),
            seen: Epoch(seen)
        }),
        "\\PC{0,80}".prop_map(|reason| Refusal::Disk { reason }),
        "\\PC{0,80}".prop_map(|reason| Refusal::StandAlone { reason }),
        "\\PC{0,80}".prop_map(|reason| Refusal::Protocol { reason }),
        (any::<(u64, u64)>(), "\\PC{0,80}")
            .prop_map(|((ours, theirs), why)| { Refusal::SplitBrain { ours, theirs, why } }),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let epoch = || any::<u64>().prop_map(Epoch);
    let pair = || any::<(u64, u64)>();
    prop_oneof![
        any::<(u32, u64, u64, u64)>().prop_map(|(node, instance, lineage, epoch)| {
            Message::Hello(PeerInfo {
                node: NodeId(node),
                instance: Instance(instance),
                lineage: LineageId(lineage),
                epoch: Epoch(epoch),
            })
        }),
        epoch().prop_map(|epoch| Message::StartSync { epoch }),
        (any::<(u64, u64, u64, bool, u8)>(), body()).prop_map(
            |((epoch, seq, complete, fua, dirty_for), (range, body))| Message::Write {
                epoch: Epoch(epoch),
                seq: Seq(seq),
                complete: Seq(complete),
                range,
                body,
                fua,
                dirty_for,
            }
        ),
        pair().prop_map(|(epoch, id)| Message::Flush {
            epoch: Epoch(epoch),
            id
        }),
        (pair(), body()).prop_map(|((epoch, id), (range, body))| Message::SyncWrite {
            epoch: Epoch(epoch),
            id,
            range,
            body
        }),
        (epoch(), 0u8..7, blocks()).prop_map(|(epoch, slot, blocks)| Message::DirtyMap {
            epoch,
            slot: ReplicaSlot(slot),
            blocks
        }),
        pair().prop_map(|(epoch, id)| Message::Barrier {
            epoch: Epoch(epoch),
            id
        }),
        (epoch(), any::<u8>()).prop_map(|(epoch, in_sync)| Message::EpochUpdate { epoch, in_sync }),
        pair().prop_map(|(epoch, seq)| Message::Complete {
            epoch: Epoch(epoch),
            seq: Seq(seq)
        }),
        epoch().prop_map(|epoch| Message::Reconcile { epoch }),
        (epoch(), blocks(), any::<bool>()).prop_map(|(epoch, blocks, last)| {
            Message::Uncertain {
                epoch,
                blocks,
                last,
            }
        }),
        pair().prop_map(|(epoch, seq)| Message::WriteAck {
            epoch: Epoch(epoch),
            seq: Seq(seq)
        }),
        pair().prop_map(|(epoch, id)| Message::FlushAck {
            epoch: Epoch(epoch),
            id
        }),
        pair().prop_map(|(epoch, id)| Message::SyncAck {
            epoch: Epoch(epoch),
            id
        }),
        pair().prop_map(|(epoch, id)| Message::BarrierAck {
            epoch: Epoch(epoch),
            id
        }),
        (epoch(), blocks(), any::<bool>()).prop_map(|(epoch, blocks, certain)| Message::Tail {
            epoch,
            blocks,
            certain
        }),
        pair().prop_map(|(epoch, id)| Message::Behind {
            epoch: Epoch(epoch),
            id
        }),
        epoch().prop_map(|epoch| Message::Following { epoch }),
        (epoch(), any::<bool>()).prop_map(|(epoch, wanted)| Message::Receipts { epoch, wanted }),
        (epoch(), 0u8..7, any::<bool>()).prop_map(|(epoch, slot, confirmed)| {
            Message::Generation {
                epoch,
                slot: ReplicaSlot(slot),
                confirmed,
            }
        }),
        pair().prop_map(|(epoch, seq)| Message::Received {
            epoch: Epoch(epoch),
            seq: Seq(seq)
        }),
        (
            pair(),
            any::<u64>(),
            prop::collection::vec(any::<[u8; BlockDigest::BYTES]>(), 0..9)
        )
            .prop_map(|((epoch, id), first, digests)| Message::Digests {
                epoch: Epoch(epoch),
                id,
                first,
                digests: digests.into_iter().map(BlockDigest).collect(),
            }),
        (pair(), blocks()).prop_map(|((epoch, id), blocks)| Message::Differ {
            epoch: Epoch(epoch),
            id,
            blocks
        }),
        (
            pair(),
            any::<u64>(),
            prop::collection::vec(any::<[u8; BlockDigest::BYTES]>(), 0..9)
        )
            .prop_map(|((epoch, id), first, digests)| Message::SyncDigests {
                epoch: Epoch(epoch),
                id,
                first,
                digests: digests.into_iter().map(BlockDigest).collect(),
            }),
        (pair(), blocks()).prop_map(|((epoch, id), blocks)| Message::SyncDiffer {
            epoch: Epoch(epoch),
            id,
            blocks
        }),
        (pair(), 0..1u64 << 40, 0..1u64 << 20).prop_map(|((epoch, id), first, count)| {
            Message::ReadBlocks {
                epoch: Epoch(epoch),
                id,
                blocks: BlockRange::new(first, count),
            }
        }),
        (pair(), body()).prop_map(|((epoch, id), (range, body))| Message::Content {
            epoch: Epoch(epoch),
            id,
            range,
            body
        }),
        (epoch(), any::<bool>()).prop_map(|(epoch, active)| Message::Verifying { epoch, active }),
        any::<bool>().prop_map(|paused| Message::PauseSync { paused }),
        refusal().prop_map(Message::Refuse),
        Just(Message::Ping),
        Just(Message::Pong),
        Just(Message::Moved),
    ]
}

/// Feeds bytes in pieces and collects what comes out until the end or the first error.
fn decode_all(bytes: &[u8], piece: usize) -> (Vec<Message>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    for chunk in bytes.chunks(piece.max(1)) {
        let mut input = chunk;
        while !input.is_empty() {
            match decoder.take(&mut input) {
                Ok(message) => messages.extend(message),
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        messages in prop::collection::vec(message(), 1..8),
        piece in 1usize..400,
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(bytes_of).collect();
        prop_assert_eq!(decode_all(&bytes, piece), (messages, None));
    }

    #[test]
    fn a_flipped_bit_is_always_detected(message in message(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = bytes_of(&message);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let (messages, error) = decode_all(&bytes, usize::MAX);
        prop_assert!(error.is_some(), "undetected: {:?}", messages);
        prop_assert!(messages.is_empty());
    }

    #[test]
    fn a_truncated_frame_waits(message in message(), cut in any::<prop::sample::Index>()) {
        let bytes = bytes_of(&message);
        let cut = cut.index(bytes.len());
        prop_assert_eq!(decode_all(&bytes[..cut], 64), (Vec::new(), None));
        let mut decoder = Decoder::new();
        let (mut input, mut rest) = bytes.split_at(cut);
        prop_assert_eq!(decoder.take(&mut input), Ok(None));
        prop_assert!(input.is_empty() && decoder.missing() > 0);
        prop_assert_eq!(decoder.take(&mut rest), Ok(Some(message)));
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000), piece in 1usize..64) {
        decode_all(&bytes, piece);
    }

    #[test]
    fn fields_of_garbage_with_good_checksums_never_panic(
        kind in 0u8..52,
        fields in prop::collection::vec(any::<u8>(), 0..120),
        data in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let header = Header {
            kind,
            field_len: u32::try_from(fields.len()).unwrap(),
            data_len: u32::try_from(data.len()).unwrap(),
            field_crc: crc32c::crc32c(&fields),
            data_crc: if data.is_empty() { 0 } else { crc32c::crc32c(&data) },
        };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(&fields);
        bytes.extend_from_slice(&data);
        let (messages, error) = decode_all(&bytes, usize::MAX);
        // What is accepted has one encoding only.
        prop_assert_eq!(messages.len() + usize::from(error.is_some()), 1);
        for message in messages {
            prop_assert_eq!(bytes_of(&message), bytes.clone());
        }
    }

    #[test]
    fn a_flipped_greeting_is_refused(at in 0usize..LINK_HELLO_BYTES, bit in 0u8..8) {
        let mut bytes = LinkHello::new(ClusterId([3; 16]), VolumeId(5), Encryption::On).encode();
        bytes[at] ^= 1 << bit;
        prop_assert!(LinkHello::decode(&bytes).is_err());
    }
}
