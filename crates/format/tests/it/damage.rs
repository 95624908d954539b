//! Valid metadata with some of its blocks damaged, over and over: nothing damaged is ever taken for
//! what it was, and what was not damaged is found.

use relevo_format::{
    Backing, Identity, Layout, META_BLOCK, Region, Replica, Start, Superblock,
    activity::{self, RING_BLOCKS},
    bitmap::{self, Copies, PageId, WORDS},
    create, identify, read_superblocks,
};
use relevo_types::{ClusterId, Epoch, LineageId, NodeId, ReplicaSlot, VolumeId};
use said::fuzz::{Random, fuzz, mutate};

const DATA_SIZE: u64 = 1 << 30;
const TAG: u32 = 0x1234_5678;

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

/// Damages a block and keeps its length, as a disk does. Returns whether it is another one now.
fn damage(random: &mut Random, block: &mut [u8]) -> bool {
    let mut bytes = block.to_vec();
    match random.below(8) {
        0 => bytes.fill(0),
        1 => {
            // Torn at a sector: the rest is what was there before.
            let at = random.below(8) * 512;
            bytes[at..].fill(random.byte());
        }
        2 => bytes = (0..META_BLOCK).map(|_| random.byte()).collect(),
        _ => {
            mutate(random, &mut bytes);
            bytes.resize(META_BLOCK, 0);
        }
    }
    let changed = bytes != block;
    block.copy_from_slice(&bytes);
    changed
}

/// Two generations of a superblock in their slots.
fn slots(random: &mut Random) -> (Vec<u8>, [Superblock; 2]) {
    let layout = Layout::new(DATA_SIZE).unwrap();
    let first = Superblock {
        generation: 2 + random.number() % 1000,
        epoch: Epoch(random.number() % 100),
        clean: random.one_in(2),
        certain: random.one_in(2),
        inconsistent: random.one_in(2),
        slots_used: u8::try_from(random.below(128)).unwrap(),
        ..Superblock::new(replica(), &layout, Start::Zeroes)
    };
    let second = Superblock {
        generation: first.generation + 1,
        epoch: Epoch(first.epoch.0 + 1),
        ..first.clone()
    };
    let mut both = [first, second];
    both.sort_by_key(|superblock| superblock.generation % 2);
    let bytes = [both[0].encode(), both[1].encode()].concat();
    (bytes, both)
}

#[test]
fn the_other_superblock_is_used_and_a_damaged_one_never() {
    fuzz(
        "the_other_superblock_is_used_and_a_damaged_one_never",
        |random| {
            let (mut bytes, written) = slots(random);
            let newest = written.iter().max_by_key(|one| one.generation).unwrap();
            assert_eq!(read_superblocks(&bytes).unwrap().superblock, *newest);

            let (first, second) = bytes.split_at_mut(META_BLOCK);
            let hit = match random.below(3) {
                0 => [damage(random, first), false],
                1 => [false, damage(random, second)],
                _ => [damage(random, first), damage(random, second)],
            };
            let expected = written
                .iter()
                .zip(hit)
                .filter(|(_, hit)| !hit)
                .map(|(superblock, _)| superblock)
                .max_by_key(|superblock| superblock.generation);
            match (read_superblocks(&bytes), expected) {
                (Ok(found), Some(expected)) => {
                    assert_eq!(found.superblock, *expected);
                    assert_eq!(found.remark.is_some(), hit != [false, false]);
                }
                (Err(_), None) => assert!(!matches!(identify(&bytes), Backing::Ours(_))),
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        },
    );
}

#[test]
fn the_newest_undamaged_transaction_is_found() {
    fuzz("the_newest_undamaged_transaction_is_found", |random| {
        let blocks = usize::try_from(RING_BLOCKS).unwrap();
        let mut ring = vec![0; blocks * META_BLOCK];
        let last = random.number() % 200;
        let oldest = (last + 1).saturating_sub(RING_BLOCKS);
        let mut written = Vec::new();
        for number in oldest..=last {
            let regions: Vec<Region> = (0..random.below(20))
                .map(|index| Region(u32::try_from(index).unwrap() * 3))
                .collect();
            let at = usize::try_from(number % RING_BLOCKS).unwrap();
            ring[at * META_BLOCK..][..META_BLOCK]
                .copy_from_slice(&activity::encode(number, TAG, &regions));
            written.push((number, regions, at));
        }
        let mut hits = 0;
        for _ in 0..random.below(6) {
            // The newest most of all: those are what a crash tears.
            let index = written.len().saturating_sub(1 + random.below(4));
            let Some((.., at)) = written.get(index) else {
                continue;
            };
            let block = &mut ring[at * META_BLOCK..][..META_BLOCK];
            if damage(random, block) {
                hits += 1;
                written.remove(index);
            }
        }
        let found = activity::recover(&ring, TAG);
        assert_eq!(found.valid, written.len());
        assert!(found.damaged <= hits);
        if let Some((number, regions, _)) = written.last() {
            assert_eq!((found.number, &found.regions), (*number, regions));
        }
        // Another replica's ring says nothing.
        assert_eq!(activity::recover(&ring, TAG + 1).valid, 0);
    });
}

/// Dirty bits may be too many after damage, never too few.
#[test]
fn a_damaged_bitmap_page_is_all_set_or_what_was_written_last() {
    fuzz(
        "a_damaged_bitmap_page_is_all_set_or_what_was_written_last",
        |random| {
            let id = PageId {
                slot: ReplicaSlot(u8::try_from(random.below(7)).unwrap()),
                page: u32::try_from(random.below(100)).unwrap(),
            };
            let newest = 1 + random.number() % 9;
            let words = |generation: u64| {
                let mut words = [0; WORDS];
                words[3] = generation;
                words
            };
            let mut copies = vec![0; 2 * META_BLOCK];
            for generation in newest.saturating_sub(1).max(1)..=newest {
                let at = usize::try_from(generation % 2).unwrap() * META_BLOCK;
                copies[at..][..META_BLOCK].copy_from_slice(&bitmap::encode(
                    id,
                    TAG,
                    generation,
                    &words(generation),
                ));
            }
            let expected = Copies::Valid {
                generation: newest,
                words: Box::new(words(newest)),
            };
            assert_eq!(bitmap::read(id, TAG, &copies), expected);

            let copy = usize::from(random.one_in(2));
            let block = &mut copies[copy * META_BLOCK..][..META_BLOCK];
            if !damage(random, block) {
                return;
            }
            let wiped = block.iter().all(|byte| *byte == 0);
            let is_newest = u64::try_from(copy).unwrap() == newest % 2;
            match bitmap::read(id, TAG, &copies) {
                Copies::Damaged { generation } => assert!(generation <= newest),
                // A page that was written once and wiped can't be told from one that never was.
                Copies::Blank => assert_eq!(newest, 1),
                // Nor the second generation, wiped, from one that was never reached.
                Copies::Valid { generation: 1, .. } if newest == 2 => assert!(wiped),
                Copies::Valid { generation, .. } => assert!(
                    !is_newest && generation == newest,
                    "generation {generation} of {newest} was taken, copy {copy} damaged"
                ),
            }
        },
    );
}

/// Found by the test above: the newer copy was wiped, and the older one was believed.
#[test]
fn a_wiped_copy_is_not_one_that_was_never_written() {
    let id = PageId {
        slot: ReplicaSlot(0),
        page: 0,
    };
    let two = bitmap::encode(id, TAG, 2, &[2; WORDS]);
    let three = bitmap::encode(id, TAG, 3, &[3; WORDS]);
    let blank = vec![0; META_BLOCK];
    for (even, odd, generation) in [(&two, &blank, 2), (&blank, &three, 3)] {
        assert_eq!(
            bitmap::read(id, TAG, &[&even[..], &odd[..]].concat()),
            Copies::Damaged { generation }
        );
    }
}

#[test]
fn any_bytes_are_read_without_a_panic() {
    fuzz("any_bytes_are_read_without_a_panic", |random| {
        let layout = Layout::new(DATA_SIZE).unwrap();
        let mut bytes = if random.one_in(2) {
            random.bytes(3 * META_BLOCK)
        } else {
            let mut area = Vec::new();
            for (_, block) in create(&replica(), &layout, Start::Zeroes) {
                area.extend(block);
            }
            area
        };
        mutate(random, &mut bytes);
        drop(read_superblocks(&bytes));
        drop(identify(&bytes));
        drop(activity::recover(&bytes, TAG));
        let id = PageId {
            slot: ReplicaSlot(1),
            page: 1,
        };
        drop(bitmap::read(id, TAG, &bytes));
    });
}
