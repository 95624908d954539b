//! Valid streams with damage in them, and garbage: nothing that was altered is ever accepted, nothing
//! panics, and nobody makes a receiver keep more than one frame.

use relevo_types::{ClusterId, VolumeId, cluster::Encryption};
use relevo_wire::{
    Decoder, LinkHello, Message, encode,
    frame::{HEADER_BYTES, MAX_FRAME_BYTES},
};
use said::fuzz::{Random, fuzz, mutate, spoil};

use crate::corpus::message;

fn bytes_of(message: &Message) -> Vec<u8> {
    let encoded = encode(message).unwrap();
    let mut all = encoded.head.to_vec();
    all.extend_from_slice(encoded.data.as_deref().unwrap_or_default());
    all
}

/// Feeds bytes in pieces as a network would. Returns what came out, and whether it ended in an
/// error.
fn receive(random: &mut Random, bytes: &[u8]) -> (Vec<Message>, bool) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(1 + random.below(rest.len()));
        rest = behind;
        let mut input = piece;
        while !input.is_empty() {
            match decoder.take(&mut input) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => assert!(input.is_empty(), "a part of a message takes all there is"),
                Err(_) => {
                    // It stays that way.
                    assert!(decoder.take(&mut &bytes_of(&Message::Ping)[..]).is_err());
                    return (messages, true);
                }
            }
        }
        // What it waits for is one frame at most.
        assert!(decoder.missing() <= MAX_FRAME_BYTES);
    }
    (messages, false)
}

#[test]
fn an_altered_frame_is_never_accepted() {
    fuzz("an_altered_frame_is_never_accepted", |random| {
        let messages: Vec<Message> = (0..1 + random.below(5)).map(|_| message(random)).collect();
        let frames: Vec<Vec<u8>> = messages.iter().map(bytes_of).collect();
        let victim = random.below(frames.len());
        let mut damaged = frames[victim].clone();
        // Bytes that move may carry a checksum into the very fields that it covers, and fit there:
        // four zeroes and the checksum of eight bytes 0xff have that checksum again. A seed found
        // that. Wires and memories don't do it, and TLS keeps those away who would.
        let in_place = random.one_in(2);
        let altered = if in_place {
            spoil(random, &mut damaged)
        } else {
            mutate(random, &mut damaged)
        };
        if !altered {
            return;
        }
        let mut stream = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            stream.extend(if index == victim { &damaged } else { frame });
        }
        let (found, failed) = receive(random, &stream);
        assert!(found.len() >= victim, "what came before the damage is good");
        assert!(found[..victim] == messages[..victim]);
        if in_place {
            assert!(failed && found.len() == victim, "it was not noticed");
        }
    });
}

#[test]
fn an_undamaged_stream_arrives_however_it_is_cut() {
    fuzz("an_undamaged_stream_arrives_however_it_is_cut", |random| {
        let messages: Vec<Message> = (0..1 + random.below(8)).map(|_| message(random)).collect();
        let mut stream: Vec<u8> = messages.iter().flat_map(bytes_of).collect();
        assert!(receive(random, &stream) == (messages.clone(), false));
        stream.truncate(random.below(stream.len()));
        let (found, failed) = receive(random, &stream);
        assert!(!failed && found[..] == messages[..found.len()]);
        assert!(found.len() < messages.len());
    });
}

/// A sender that computes good checksums over bad fields: a bug or an enemy, not a bad wire.
#[test]
fn sealed_nonsense_is_refused_or_has_one_meaning() {
    fuzz("sealed_nonsense_is_refused_or_has_one_meaning", |random| {
        let mut bytes = bytes_of(&message(random));
        let mut tail = bytes.split_off(HEADER_BYTES);
        mutate(random, &mut tail);
        if random.one_in(4) {
            bytes[3] = random.byte();
        }
        let fields = random.below(tail.len() + 1);
        let put = |bytes: &mut Vec<u8>, at: usize, value: u32| {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        let crc = |part: &[u8]| {
            if part.is_empty() {
                0
            } else {
                crc32c::crc32c(part)
            }
        };
        let field_len = if random.one_in(2) {
            fields
        } else {
            usize::try_from(u32::from_le_bytes(bytes[4..8].try_into().unwrap()))
                .unwrap()
                .min(tail.len())
        };
        put(&mut bytes, 4, u32::try_from(field_len).unwrap());
        put(
            &mut bytes,
            8,
            u32::try_from(tail.len() - field_len).unwrap(),
        );
        put(&mut bytes, 12, crc(&tail[..field_len]));
        put(&mut bytes, 16, crc(&tail[field_len..]));
        let header = crc32c::crc32c(&bytes[..20]);
        put(&mut bytes, 20, header);
        bytes.extend(&tail);
        let (found, failed) = receive(random, &bytes);
        assert!(failed || found.len() == 1);
        for message in found {
            assert_eq!(bytes_of(&message), bytes, "{message:?} has two encodings");
        }
    });
}

/// Lengths up to 4 GiB are announced; nothing is kept for them.
#[test]
fn announced_lengths_are_believed_only_within_the_bounds() {
    fuzz(
        "announced_lengths_are_believed_only_within_the_bounds",
        |random| {
            let mut header = bytes_of(&Message::Ping);
            header[3] = random.byte() % 52;
            for at in [4, 8] {
                let len = u32::try_from(random.tricky() & u64::from(u32::MAX)).unwrap();
                header[at..at + 4].copy_from_slice(&len.to_le_bytes());
            }
            let crc = crc32c::crc32c(&header[..20]);
            header[20..24].copy_from_slice(&crc.to_le_bytes());
            receive(random, &header);
        },
    );
}

#[test]
fn garbage_and_damaged_greetings() {
    fuzz("garbage_and_damaged_greetings", |random| {
        let garbage = random.bytes(3000);
        let (found, _) = receive(random, &garbage);
        assert!(found.is_empty());

        let hello = LinkHello::new(ClusterId([3; 16]), VolumeId(5), Encryption::On);
        let mut bytes = hello.encode().to_vec();
        if mutate(random, &mut bytes)
            && let Ok(bytes) = bytes.try_into()
        {
            assert!(LinkHello::decode(&bytes).is_err());
        }
    });
}
