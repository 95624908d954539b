//! Files of saved blocks: golden bytes, what was written is read, and nothing damaged is believed.

use relevo_format::{
    META_BLOCK,
    saved::{Header, Reader, Record, SavedError, Writer},
};
use relevo_types::{BLOCK_SIZE, BlockRange, ClusterId, LineageId, NodeId, VolumeId};
use said::fuzz::{Random, fuzz, mutate};

fn header(blocks: u64) -> Header {
    Header {
        cluster: ClusterId([7; 16]),
        volume: VolumeId(3),
        name: "m\u{e4}il".to_owned(),
        size: 4096 * BLOCK_SIZE,
        node: NodeId(2),
        lineage: LineageId(0x1122_3344_5566_7788),
        to: NodeId(1),
        blocks,
        unix_s: 1_700_000_000,
    }
}

fn content(fill: u8, blocks: u64) -> Vec<u8> {
    vec![fill; usize::try_from(blocks * BLOCK_SIZE).unwrap()]
}

fn file(runs: &[(BlockRange, Vec<u8>)]) -> Vec<u8> {
    let blocks = runs.iter().map(|(run, _)| run.count).sum();
    let mut writer = Writer::begin(Vec::new(), &header(blocks)).unwrap();
    for (run, data) in runs {
        writer.add(*run, data).unwrap();
    }
    writer.end().unwrap()
}

fn read(bytes: &[u8]) -> Result<(Header, Vec<Record>), SavedError> {
    let mut reader = Reader::open(bytes)?;
    let mut records = Vec::new();
    while let Some(record) = reader.next_record()? {
        records.push(record);
    }
    assert!(reader.next_record()?.is_none(), "the end stays the end");
    Ok((reader.header().clone(), records))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn saved_golden_bytes() {
    let bytes = file(&[(BlockRange::new(258, 1), content(0xab, 1))]);
    assert_eq!(
        hex(&bytes[..88]),
        concat!(
            "52454c45564f5356", // RELEVOSV
            "01000000",         // version
            "1faa8414",         // CRC-32C
            "07070707070707070707070707070707",
            "0300000002000000", // volume, node
            "0100000005000000", // gives way to, length of the name
            "8877665544332211", // lineage
            "0000000100000000", // size
            "0100000000000000", // blocks
            "00f1536500000000", // seconds since 1970
            "6dc3a4696c000000", // name
        )
    );
    assert!(bytes[88..META_BLOCK].iter().all(|byte| *byte == 0));
    assert_eq!(
        hex(&bytes[META_BLOCK..META_BLOCK + 32]),
        concat!(
            "524c5352e73ae384", // RLSR, CRC-32C
            "1faa841493413794", // that of the header, that of the data
            "0201000000000000", // first block
            "0100000000000000", // how many
        )
    );
    let data = META_BLOCK + 32;
    assert_eq!(bytes[data..data + META_BLOCK], content(0xab, 1));
    assert_eq!(
        hex(&bytes[data + META_BLOCK..]),
        concat!(
            "524c5345e247f62e", // RLSE, CRC-32C
            "1faa841400000000",
            "0100000000000000", // blocks
            "0100000000000000", // records
        )
    );
}

#[test]
fn what_was_saved_is_read_back() {
    // The second run is longer than a record may be.
    let runs = [
        (BlockRange::new(0, 2), content(1, 2)),
        (BlockRange::new(5, 1500), content(2, 1500)),
        (BlockRange::new(4095, 1), content(3, 1)),
    ];
    let (found, records) = read(&file(&runs)).unwrap();
    assert_eq!(found, header(1503));
    let lengths: Vec<u64> = records.iter().map(|record| record.blocks.count).collect();
    assert_eq!(lengths, [2, 1024, 476, 1]);
    let all: Vec<u8> = records.into_iter().flat_map(|record| record.data).collect();
    assert!(all == runs.map(|(_, data)| data).concat());
}

#[test]
fn a_file_of_nothing_is_complete() {
    let (found, records) = read(&file(&[])).unwrap();
    assert_eq!((found.blocks, records.len()), (0, 0));
}

#[test]
fn a_long_name_is_cut_at_a_letter() {
    let long = Header {
        name: "\u{e4}".repeat(200),
        ..header(0)
    };
    let found = Header::decode(&long.encode()).unwrap();
    assert_eq!(found.name, "\u{e4}".repeat(127));
}

#[test]
fn every_end_that_comes_too_early_is_seen() {
    let whole = file(&[
        (BlockRange::new(1, 1), content(1, 1)),
        (BlockRange::new(9, 1), content(2, 1)),
    ]);
    for len in (8..whole.len()).step_by(7).chain([whole.len() - 1]) {
        let error = read(&whole[..len]).unwrap_err();
        assert!(
            matches!(error, SavedError::Incomplete { at, .. } if at == len as u64),
            "{len}: {error}"
        );
    }
    let error = read(&[&whole[..], &[0]].concat()).unwrap_err();
    assert!(error.to_string().contains("follows"), "{error}");
}

#[test]
fn blocks_without_their_content_are_not_taken() {
    let mut writer = Writer::begin(Vec::new(), &header(2)).unwrap();
    assert!(writer.add(BlockRange::new(0, 2), &content(0, 1)).is_err());
    assert!(writer.add(BlockRange::new(0, u64::MAX), &[]).is_err());
}

/// A record of another file, with everything in order but whose it is.
#[test]
fn a_part_of_another_file_is_no_part_of_this_one() {
    let run = [(BlockRange::new(1, 1), content(1, 1))];
    let mut bytes = file(&run);
    let other = Header {
        unix_s: 5,
        ..header(1)
    };
    bytes[..META_BLOCK].copy_from_slice(&other.encode());
    let error = read(&bytes).unwrap_err();
    assert!(
        matches!(error, SavedError::Damaged { at: 4096, .. }),
        "{error}"
    );
}

#[test]
fn nothing_damaged_is_taken_for_what_was_saved() {
    fuzz("nothing_damaged_is_taken_for_what_was_saved", |random| {
        let mut runs = Vec::new();
        let mut next = 0;
        for _ in 0..random.below(4) {
            let first = next + random.below(50) as u64;
            let count = 1 + random.below(3) as u64;
            runs.push((BlockRange::new(first, count), content(random.byte(), count)));
            next = first + count;
        }
        let whole = file(&runs);
        let (_, saved) = read(&whole).unwrap();
        let mut bytes = whole.clone();
        damage(random, &mut bytes);
        if bytes == whole {
            return;
        }
        // Nothing is read of a damaged file that was not written, and its end is never reached.
        let Ok(mut reader) = Reader::open(&bytes[..]) else {
            return;
        };
        let mut saved = saved.into_iter();
        loop {
            match reader.next_record() {
                // Others before it may be lost, which is seen at the end.
                Ok(Some(found)) => assert!(saved.any(|record| record == found)),
                Ok(None) => panic!("a damaged file ended in order"),
                Err(_) => return,
            }
        }
    });
}

fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    match random.below(3) {
        0 => {
            // A whole record lost, repeated, or moved.
            let at = META_BLOCK + 32 * random.below(2);
            let end = (at + META_BLOCK + 32).min(bytes.len());
            bytes.drain(at.min(end)..end);
        }
        1 => {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        _ => {
            mutate(random, bytes);
        }
    }
}

#[test]
fn any_bytes_are_read_as_a_file_without_a_panic() {
    fuzz("any_bytes_are_read_as_a_file_without_a_panic", |random| {
        let mut bytes = random.bytes(3 * META_BLOCK);
        if random.one_in(2) {
            let mut block = header(random.tricky()).encode();
            mutate(random, &mut block);
            block.extend(bytes);
            bytes = block;
        }
        drop(read(&bytes));
    });
}
