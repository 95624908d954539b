//! What a dump tells of metadata in order, of damaged metadata, and of anything else.

use relevo_format::{
    Identity, Layout, META_BLOCK, Region, Replica, Start, Superblock,
    activity::{self, RING_BLOCKS},
    bitmap::{self, BLOCKS_PER_PAGE, PageId, WORDS},
    create,
    dump::{Dump, RUNS_NAMED},
};
use relevo_types::{
    BlockRange, ByteRange, ClusterId, Epoch, LineageId, NodeId, ReplicaSlot, VolumeId,
};
use said::fuzz::{Random, fuzz, mutate};

/// Two pages a slot, the second one cut.
const DATA_SIZE: u64 = 130 << 20;

/// The metadata of a backing; the data area is not kept.
struct Disk {
    layout: Layout,
    bytes: Vec<u8>,
    size: u64,
    /// Offsets that can't be read.
    bad: Vec<u64>,
}

fn replica() -> Replica {
    Replica {
        identity: Identity {
            cluster: ClusterId([7; 16]),
            volume: VolumeId(3),
            node: NodeId(2),
        },
        slot: ReplicaSlot(1),
        lineage: LineageId(77),
    }
}

impl Disk {
    fn new() -> Self {
        let layout = Layout::new(DATA_SIZE).unwrap();
        let area = layout.metadata();
        let mut disk = Self {
            layout,
            bytes: vec![0; usize::try_from(area.len).unwrap()],
            size: layout.backing_size(),
            bad: Vec::new(),
        };
        for (offset, bytes) in create(&replica(), &layout, Start::Zeroes) {
            disk.put(offset, &bytes);
        }
        disk
    }

    fn at(&self, offset: u64) -> usize {
        usize::try_from(offset - self.layout.metadata().offset).unwrap()
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let at = self.at(offset);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn superblock(&mut self, superblock: &Superblock) {
        let offset = self.layout.superblock_block(superblock.generation);
        self.put(offset, &superblock.encode());
    }

    fn page(&mut self, slot: u8, page: u32, generation: u64, bits: &[u64]) {
        let mut words = [0; WORDS];
        for bit in bits {
            words[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64);
        }
        let id = PageId {
            slot: ReplicaSlot(slot),
            page,
        };
        let block = bitmap::encode(id, replica().identity.tag(), generation, &words);
        self.put(self.layout.bitmap_block(id.slot, page, generation), &block);
    }

    fn dump(&self) -> Dump {
        let area = self.layout.metadata();
        Dump::read(self.size, |range: ByteRange| {
            if self
                .bad
                .iter()
                .any(|bad| range.offset <= *bad && *bad < range.end())
            {
                return Err("a bad sector".to_owned());
            }
            if range.offset < area.offset || range.end() > area.end() {
                return Err("outside".to_owned());
            }
            let at = self.at(range.offset);
            Ok(self.bytes[at..at + usize::try_from(range.len).unwrap()].to_vec())
        })
    }
}

/// A replica in use: not clean, three regions active, two slots dirty.
fn in_use() -> Disk {
    let mut disk = Disk::new();
    let layout = disk.layout;
    disk.superblock(&Superblock {
        generation: 9,
        epoch: Epoch(5),
        clean: false,
        slots_used: 0b111,
        ..Superblock::new(replica(), &layout, Start::Zeroes)
    });
    let regions = [Region(0), Region(7), Region(129)];
    let tag = replica().identity.tag();
    disk.put(
        layout.activity_block(17),
        &activity::encode(17, tag, &regions),
    );
    // Runs that go over the ends of words and of pages; bits beyond the volume.
    let last = BLOCKS_PER_PAGE - 1;
    disk.page(0, 0, 4, &[3, 63, 64, 65, last]);
    disk.page(
        0,
        1,
        1,
        &[0, 1, layout.data_blocks() - BLOCKS_PER_PAGE, 30_000],
    );
    disk
}

#[test]
fn a_replica_in_use_is_told_whole() {
    let disk = in_use();
    let mut disk = disk;
    disk.page(0, 0, 3, &[1]);
    let dump = disk.dump();
    assert_eq!(dump.problems, [] as [String; 0]);
    assert_eq!(dump.in_force, Some(1));
    let superblock = dump.superblock().unwrap();
    assert_eq!((superblock.generation, superblock.epoch), (9, Epoch(5)));
    assert_eq!(dump.slots[0].as_ref().unwrap().generation, 2);
    let activity = dump.activity.as_ref().unwrap();
    assert_eq!((activity.number, activity.valid), (17, 2));
    // The last region is cut at the end of the volume.
    assert_eq!(dump.uncertain_blocks(), 3 * 256);
    let slots: Vec<u8> = dump.bitmaps.iter().map(|bitmap| bitmap.slot.0).collect();
    assert_eq!(slots, [0, 1, 2]);
    let first = &dump.bitmaps[0];
    let runs = [
        BlockRange::new(3, 1),
        BlockRange::new(63, 3),
        BlockRange::new(BLOCKS_PER_PAGE - 1, 3),
    ];
    assert_eq!(first.first_runs, runs);
    assert_eq!((first.dirty, first.runs), (7, 3));
    assert_eq!((first.pages_written, first.generation), (2, 4));
    assert_eq!(
        (dump.bitmaps[1].dirty, dump.bitmaps[1].pages_written),
        (0, 0)
    );
}

#[test]
fn many_runs_are_counted_and_some_named() {
    let mut disk = in_use();
    let bits: Vec<u64> = (0..400).map(|bit| bit * 2).collect();
    disk.page(2, 0, 1, &bits);
    let bitmap = &disk.dump().bitmaps[2];
    assert_eq!((bitmap.dirty, bitmap.runs), (400, 400));
    assert_eq!(bitmap.first_runs.len(), RUNS_NAMED);
}

#[test]
fn damage_is_described_and_hides_nothing_else() {
    let mut disk = in_use();
    // The slot that was in force; a bitmap page; the newest transaction.
    let slot = disk.layout.superblock_block(9);
    disk.put(slot + 30, b"x");
    let dump = disk.dump();
    assert_eq!(dump.in_force, Some(0));
    assert!(dump.slots[1].as_ref().unwrap_err().contains("checksum"));

    let mut disk = in_use();
    let page = disk.layout.bitmap_block(ReplicaSlot(0), 0, 4);
    disk.put(page + 100, b"x");
    let transaction = disk.layout.activity_block(17);
    disk.put(transaction + 9, b"x");
    let dump = disk.dump();
    let bitmap = &dump.bitmaps[0];
    assert_eq!(bitmap.pages_damaged, 1);
    assert_eq!(bitmap.dirty, BLOCKS_PER_PAGE + 2);
    assert!(dump.problems[0].contains("bitmap 0"), "{:?}", dump.problems);
    let activity = dump.activity.unwrap();
    assert_eq!((activity.valid, activity.damaged), (1, 1));
}

#[test]
fn what_the_disk_refuses_to_read_is_described() {
    let mut disk = in_use();
    disk.bad = vec![
        disk.layout.superblock_block(2),
        disk.layout.activity_block(30),
        disk.layout.bitmap_block(ReplicaSlot(2), 1, 0),
    ];
    let dump = disk.dump();
    assert_eq!(dump.in_force, Some(1));
    assert_eq!(dump.slots[0], Err("a bad sector".to_owned()));
    let activity = dump.activity.as_ref().unwrap();
    assert_eq!((activity.valid, activity.damaged), (2, 1));
    assert_eq!(dump.bitmaps[2].pages_damaged, 1);
    let told = dump.problems.join("\n");
    assert!(
        told.contains("4096 bytes of the activity log can't be read: a bad sector"),
        "{told}"
    );
    assert!(
        told.contains("8192 bytes of bitmap 2 can't be read"),
        "{told}"
    );
}

#[test]
fn a_backing_that_holds_no_replica_is_described_too() {
    let mut disk = in_use();
    disk.bytes.fill(0);
    let dump = disk.dump();
    assert_eq!((dump.in_force, dump.superblock()), (None, None));
    assert!(dump.slots[0].as_ref().unwrap_err().contains("blank"));
    assert_eq!(dump.uncertain_blocks(), 0);
    assert!(!dump.problems.is_empty());
    // Too small for anything, and of another size than the superblock says.
    assert!(Dump::read(4096, |_| Err(String::new())).in_force.is_none());
    let mut disk = in_use();
    let grown = disk.layout.superblock_block(0);
    let superblocks = disk.bytes[disk.at(grown)..].to_vec();
    disk.size += 1 << 20;
    let end = disk.size - 2 * META_BLOCK as u64;
    let dump = Dump::read(disk.size, |range| {
        let at = usize::try_from(range.offset - end).unwrap();
        Ok(superblocks[at..at + META_BLOCK].to_vec())
    });
    assert!(dump.superblock().is_some() && dump.activity.is_none());
    assert!(dump.problems[0].contains("was written for a backing"));
}

#[test]
fn any_metadata_is_dumped_without_a_panic() {
    let whole = in_use();
    fuzz(
        "any_metadata_is_dumped_without_a_panic",
        |random: &mut Random| {
            let mut disk = Disk {
                layout: whole.layout,
                bytes: whole.bytes.clone(),
                size: whole.size,
                bad: Vec::new(),
            };
            for _ in 0..1 + random.below(4) {
                // The superblocks, the log and the first pages, in which something is.
                let blocks = disk.bytes.len() / META_BLOCK;
                let block = match random.below(4) {
                    0 => blocks - 1 - random.below(2),
                    1 => blocks - 3 - random.below(usize::try_from(RING_BLOCKS).unwrap()),
                    _ => random.below(8),
                };
                let mut bytes = disk.bytes[block * META_BLOCK..][..META_BLOCK].to_vec();
                mutate(random, &mut bytes);
                bytes.resize(META_BLOCK, random.byte());
                disk.bytes[block * META_BLOCK..][..META_BLOCK].copy_from_slice(&bytes);
                if random.one_in(3) {
                    disk.bad
                        .push(disk.layout.metadata().offset + (block * META_BLOCK) as u64);
                }
            }
            if random.one_in(8) {
                disk.size = random.tricky() >> 8;
            }
            let dump = disk.dump();
            for bitmap in &dump.bitmaps {
                assert!(bitmap.dirty <= disk.layout.data_blocks());
                assert!(bitmap.runs <= bitmap.dirty);
            }
            assert!(dump.uncertain_blocks() <= disk.layout.data_blocks());
        },
    );
}
