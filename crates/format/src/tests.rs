//! Golden bytes, round trips, damage, and garbage.

use proptest::prelude::*;
use relevo_types::{BlockRange, ClusterId, Epoch, LineageId, NodeId, ReplicaSlot, VolumeId};

use super::*;
use crate::bitmap::{Copies, PageId, WORDS};

fn replica() -> Replica {
    Replica {
        identity: Identity {
            cluster: ClusterId([7; 16]),
            volume: VolumeId(3),
            node: NodeId(2),
        },
        slot: ReplicaSlot(1),
        lineage: LineageId(0x1122_3344_5566_7788),
    }
}

fn layout() -> Layout {
    Layout::on_backing(1 << 20, 4 << 20).unwrap()
}

/// The backing's last two blocks after `create`.
fn created() -> Vec<u8> {
    let layout = layout();
    let mut end = vec![0; 2 * META_BLOCK];
    let first = layout.superblock_block(0);
    for (offset, bytes) in create(&replica(), &layout, Start::Zeroes) {
        if let Some(at) = offset.checked_sub(first) {
            let at = usize::try_from(at).unwrap();
            end[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }
    end
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn superblock_golden_bytes() {
    let superblock = Superblock {
        generation: 6,
        epoch: Epoch(9),
        clean: false,
        slots_used: 0b11,
        ..Superblock::new(replica(), &layout(), Start::Zeroes)
    };
    let block = superblock.encode();
    assert_eq!(
        hex(&block[..104]),
        concat!(
            "52454c45564f5342", // RELEVOSB
            "01000000",         // version
            "d1aaa919",         // CRC-32C
            "0600000000000000", // generation
            "07070707070707070707070707070707",
            "0300000002000000", // volume, node
            "01020300",         // slot, flags (certain), slots used
            "00010000",         // blocks in a region
            "0000100000000000", // data size
            "00003b0000000000", // bitmap
            "00e03b0000000000", // activity log
            "40000000",
            "00000000",
            "8877665544332211", // lineage
            "0900000000000000", // epoch
        )
    );
    assert!(block[104..].iter().all(|byte| *byte == 0));
    assert_eq!(Superblock::decode(&block), Ok(superblock));
}

#[test]
fn activity_golden_bytes() {
    let block = activity::encode(70, 0xaabb_ccdd, &[Region(1), Region(258)]);
    assert_eq!(
        hex(&block[..32]),
        concat!(
            "524c414c80ac9fba", // RLAL, CRC-32C
            "4600000000000000", // number
            "ddccbbaa02000000", // tag, count
            "0100000002010000",
        )
    );
    assert!(block[32..].iter().all(|byte| *byte == 0));
}

#[test]
fn bitmap_golden_bytes() {
    let id = PageId {
        slot: ReplicaSlot(2),
        page: 5,
    };
    let mut words = [0; WORDS];
    words[0] = 0x8000_0000_0000_0001;
    let block = bitmap::encode(id, 0xaabb_ccdd, 3, &words);
    assert_eq!(
        hex(&block[..40]),
        concat!(
            "49e0c90b524c424d", // CRC-32C, RLBM
            "0300000000000000", // generation
            "0500000002000000", // page, slot
            "ddccbbaa00000000", // tag
            "0100000000000080",
        )
    );
    assert_eq!(
        bitmap::decode(id, 0xaabb_ccdd, &block),
        Some((3, Box::new(words)))
    );
}

#[test]
fn metadata_is_at_the_end_of_the_backing() {
    let size = 20 << 30;
    let smallest = Layout::new(size).unwrap();
    let larger = Layout::on_backing(size, smallest.backing_size() + 5000).unwrap();
    assert_eq!(larger.backing_size(), smallest.backing_size() + 4096);
    assert_eq!(larger.metadata().end(), larger.backing_size());
    assert_eq!(
        Layout::superblocks(smallest.backing_size() + 5000).map(|range| range.offset),
        Some(larger.superblock_block(0))
    );
    assert!(matches!(
        Layout::on_backing(size, smallest.backing_size() - 1),
        Err(LayoutError::TooSmall { .. })
    ));
    let overhead = smallest.metadata().len;
    assert!(overhead < size / 1000, "{overhead} bytes of metadata");
    assert!(Layout::new(0).is_err());
    assert!(Layout::new(4097).is_err());
    assert!(Layout::new(u64::MAX / 4096 * 4096).is_err());
}

#[test]
fn areas_don_t_overlap() {
    let layout = Layout::new(1 << 30).unwrap();
    let mut end = layout.data_size();
    for slot in 0..7 {
        let area = layout.bitmap_of(ReplicaSlot(slot));
        assert_eq!(area.offset, end);
        end = area.end();
    }
    assert_eq!(layout.activity_ring().offset, end);
    assert_eq!(layout.activity_ring().end(), layout.superblock_block(0));
}

#[test]
fn regions_of_a_run() {
    let regions = |first, count| Layout::regions(BlockRange::new(first, count)).collect::<Vec<_>>();
    assert_eq!(regions(255, 2), [Region(0), Region(1)]);
    assert_eq!(regions(256, 256), [Region(1)]);
    assert_eq!(regions(256, 0), []);
    let layout = Layout::new(300 * 4096).unwrap();
    assert_eq!(layout.region_blocks(Region(1)), BlockRange::new(256, 44));
    assert_eq!(layout.region_blocks(Region(9)).count, 0);
}

#[test]
fn a_created_replica_is_ours() {
    let end = created();
    let found = read_superblocks(&end).unwrap();
    assert_eq!(found.remark, None);
    assert_eq!(found.superblock.generation, 2);
    assert!(found.superblock.clean && found.superblock.certain);
    assert!(matches!(identify(&end), Backing::Ours(s) if s.replica == replica()));
}

#[test]
fn one_damaged_superblock_is_survived_two_are_not() {
    let mut end = created();
    end[100] ^= 1;
    let found = read_superblocks(&end).unwrap();
    assert_eq!(found.superblock.generation, 1);
    assert!(found.remark.unwrap().contains("slot 0"));
    end[META_BLOCK + 100] ^= 1;
    assert!(read_superblocks(&end).is_err());
    assert!(matches!(identify(&end), Backing::Damaged(why) if why.contains("checksum")));
}

#[test]
fn blank_and_foreign_are_told_apart() {
    assert_eq!(identify(&vec![0; 2 * META_BLOCK]), Backing::Blank);
    let mut foreign = vec![0; 2 * META_BLOCK];
    foreign[5000] = 1;
    assert_eq!(identify(&foreign), Backing::Foreign);
    let mut newer = created();
    for at in [8, META_BLOCK + 8] {
        newer[at] = 2;
    }
    for block in newer.chunks_mut(META_BLOCK) {
        crate::bytes::seal(block, 12);
    }
    assert!(matches!(identify(&newer), Backing::Damaged(why) if why.contains("version 2")));
}

#[test]
fn a_superblock_in_the_wrong_slot_is_not_taken() {
    let end = created();
    let swapped = [&end[META_BLOCK..], &end[..META_BLOCK]].concat();
    assert!(read_superblocks(&swapped).is_err());
}

#[test]
fn the_highest_valid_transaction_counts() {
    let mut ring = vec![0; META_BLOCK * usize::try_from(activity::RING_BLOCKS).unwrap()];
    let mut put = |number: u64, regions: &[Region], tag| {
        let at = META_BLOCK * usize::try_from(number % activity::RING_BLOCKS).unwrap();
        ring[at..at + META_BLOCK].copy_from_slice(&activity::encode(number, tag, regions));
        activity::recover(&ring, 1)
    };
    assert_eq!(put(0, &[], 1).valid, 1);
    assert_eq!(put(63, &[Region(4)], 1).regions, [Region(4)]);
    // Wraps over the oldest.
    assert_eq!(put(64, &[Region(5)], 1).regions, [Region(5)]);
    // Another replica's leftovers don't count.
    let last = put(65, &[Region(6)], 2);
    assert_eq!((last.number, last.damaged), (64, 1));
}

#[test]
fn a_bitmap_page_alternates() {
    let id = PageId {
        slot: ReplicaSlot(0),
        page: 0,
    };
    let blank = vec![0; META_BLOCK];
    let one = bitmap::encode(id, 1, 1, &[1; WORDS]);
    let two = bitmap::encode(id, 1, 2, &[2; WORDS]);
    let read = |even: &[u8], odd: &[u8]| bitmap::read(id, 1, &[even, odd].concat());
    assert_eq!(read(&blank, &blank), Copies::Blank);
    let valid = |generation: u64| Copies::Valid {
        generation,
        words: Box::new([generation; WORDS]),
    };
    assert_eq!(read(&blank, &one), valid(1));
    assert_eq!(read(&two, &one), valid(2));
    let mut torn = two.clone();
    torn[2000..].fill(0);
    assert_eq!(read(&torn, &one), Copies::Damaged { generation: 1 });
    assert_eq!(read(&torn, &blank), Copies::Damaged { generation: 0 });
    assert_eq!(read(&one, &two), Copies::Damaged { generation: 0 });
    assert_eq!(bitmap::read(id, 1, &[]), Copies::Blank);
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..3 * META_BLOCK), ours: bool) {
        let mut bytes = bytes;
        if ours && bytes.len() >= META_BLOCK {
            bytes[..8].copy_from_slice(b"RELEVOSB");
            crate::bytes::seal(&mut bytes[..META_BLOCK], 12);
        }
        let _found = read_superblocks(&bytes);
        let _backing = identify(&bytes);
        let _recovered = activity::recover(&bytes, 1);
        let id = PageId { slot: ReplicaSlot(1), page: 1 };
        let _copies = bitmap::read(id, 1, &bytes);
    }

    #[test]
    fn garbage_behind_a_valid_checksum_never_panics(
        fields in prop::collection::vec(any::<u8>(), 96),
        data_size in prop_oneof![any::<u64>(), (0u64..1 << 30).prop_map(|n| n * 4096)],
    ) {
        let mut block = Superblock::new(replica(), &layout(), Start::Zeroes).encode();
        block[16..104].copy_from_slice(&fields[..88]);
        block[56..64].copy_from_slice(&data_size.to_le_bytes());
        crate::bytes::seal(&mut block, 12);
        let _result = Superblock::decode(&block);
    }

    #[test]
    fn superblocks_survive_their_encoding(
        generation in 1u64.., epoch: u64, clean: bool, certain: bool, inconsistent: bool,
        slots_used in 0u8..128, blocks in 1u64..1 << 30, gap in 0u64..1000,
    ) {
        let data_size = blocks * 4096;
        let needed = Layout::new(data_size).unwrap().backing_size();
        let layout = Layout::on_backing(data_size, needed + gap * 4096).unwrap();
        let superblock = Superblock {
            generation, epoch: Epoch(epoch), clean, certain, inconsistent, slots_used,
            ..Superblock::new(replica(), &layout, Start::Zeroes)
        };
        prop_assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    }

    #[test]
    fn one_flipped_bit_is_seen(at in 0usize..META_BLOCK, bit in 0u8..8) {
        let mut block = Superblock::new(replica(), &layout(), Start::Zeroes).encode();
        block[at] ^= 1 << bit;
        prop_assert!(Superblock::decode(&block).is_err());
    }
}
