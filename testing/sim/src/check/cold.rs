//! After a crash, uncertain is dirty (rule 6): the activity log names a region on *stable* storage
//! before the first write to it reaches the data area. Read from the disk itself, at every write.

use std::collections::BTreeMap;

use relevo_format::{
    Layout, META_BLOCK, Region, activity,
    bitmap::{self, Copies, PageId},
};
use relevo_types::{BLOCK_SIZE, BlockRange, ByteRange};

use super::{Verdict, Violation};
use crate::disk::Disk;

const RULE: &str = "the activity log is durable before a cold region is written (rule 6)";

/// Transactions remembered per disk: more than can be under way at once, less than the ring has.
const TRANSACTIONS: usize = 32;

/// What was written to the activity log of one disk.
#[derive(Debug)]
pub struct ColdRegions {
    layout: Layout,
    tag: u32,
    transactions: BTreeMap<u64, Vec<Region>>,
}

/// Something worth a coverage mark.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// A transaction dropped a region.
    Eviction,
    /// A superblock was written to the slot for even or odd generations.
    Superblock {
        /// The first slot.
        even: bool,
    },
}

impl ColdRegions {
    /// For a fresh replica.
    #[must_use]
    pub fn new(layout: Layout, tag: u32) -> Self {
        Self {
            layout,
            tag,
            transactions: BTreeMap::from([(0, Vec::new())]),
        }
    }

    /// A write to the metadata begins.
    pub fn metadata(&mut self, offset: u64, data: &[u8]) -> Option<Seen> {
        for parity in 0..2 {
            if offset == self.layout.superblock_block(parity) {
                return Some(Seen::Superblock { even: parity == 0 });
            }
        }
        let (number, regions) = activity::decode(data, self.tag)?;
        let before = self.transactions.range(..number).next_back();
        let dropped =
            before.is_some_and(|(_, before)| before.iter().any(|region| !regions.contains(region)));
        self.transactions.insert(number, regions);
        while self.transactions.len() > TRANSACTIONS {
            self.transactions.pop_first();
        }
        dropped.then_some(Seen::Eviction)
    }

    /// A write to the data area begins.
    ///
    /// # Errors
    /// A crash now would not know that the region may differ.
    pub fn data(&self, disk: &Disk, range: ByteRange) -> Verdict {
        let durable = self.transactions.iter().rev().find(|(number, _)| {
            let block = self.layout.activity_block(**number) / BLOCK_SIZE;
            disk.durable_block(block)
                .and_then(|bytes| activity::decode(bytes, self.tag))
                .is_some_and(|(found, _)| found == **number)
        });
        let named = durable.map_or(&[][..], |(_, regions)| regions);
        match Layout::regions(range.blocks_touched()).find(|region| !named.contains(region)) {
            None => Ok(()),
            Some(region) => Err(Violation::new(
                RULE,
                format!(
                    "{range:?} is written, but the activity log on stable storage names {named:?}, not {region:?}"
                ),
            )),
        }
    }

    /// The blocks that a replica will call uncertain when it is attached again, read from its disk as
    /// an attach does: its own bitmap, and after an unclean end the regions of the activity log.
    #[must_use]
    pub fn uncertain(&self, disk: &Disk) -> Vec<BlockRange> {
        let all = vec![BlockRange::new(0, self.layout.data_blocks())];
        let superblocks = Layout::superblocks(disk.size()).map(|range| disk.view_bytes(range));
        let Some(Ok(found)) = superblocks.map(|bytes| relevo_format::read_superblocks(&bytes))
        else {
            return all;
        };
        if found.superblock.blank {
            return all;
        }
        let slot = found.superblock.replica.slot;
        let mut blocks = Vec::new();
        let pages = disk.view_bytes(self.layout.bitmap_of(slot));
        for (page, copies) in (0u32..).zip(pages.chunks(2 * META_BLOCK)) {
            let first = u64::from(page) * bitmap::BLOCKS_PER_PAGE;
            match bitmap::read(PageId { slot, page }, self.tag, copies) {
                Copies::Blank => {}
                Copies::Damaged { .. } => return all,
                Copies::Valid { words, .. } => {
                    for (at, word) in (first..).step_by(64).zip(words.iter()) {
                        let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
                        blocks.extend(bits.map(|bit| BlockRange::new(at + bit, 1)));
                    }
                }
            }
        }
        if !found.superblock.clean {
            let ring = activity::recover(&disk.view_bytes(self.layout.activity_ring()), self.tag);
            if ring.valid == 0 {
                return all;
            }
            blocks.extend(
                ring.regions
                    .iter()
                    .map(|region| self.layout.region_blocks(*region)),
            );
        }
        blocks
    }

    /// Whether a range lies in the data area.
    #[must_use]
    pub const fn is_data(&self, range: ByteRange) -> bool {
        range.offset < self.layout.data_size()
    }
}
