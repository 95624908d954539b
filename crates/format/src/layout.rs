//! Where data and metadata lie on a backing.
//!
//! ```text
//! 0            data_size      bitmap        activity        superblocks    end (whole blocks)
//! | data area  |  (unused)    | 7 x pages x 2 | 64 blocks   | even | odd   |
//! ```
//!
//! Metadata is at the end so that the data area starts at offset 0: a volume is readable without
//! Relevo, and an existing device can be taken over when its last part is free.

use relevo_types::{BLOCK_SIZE, BlockRange, ByteRange, ReplicaSlot};

use crate::{activity, bitmap};

/// A region: the unit of the activity log, [`Layout::REGION_BLOCKS`] blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Region(pub u32);

/// Offsets on one backing, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    data_size: u64,
    pages: u32,
    bitmap_offset: u64,
    activity_offset: u64,
    superblock_offset: u64,
}

/// A backing can't hold the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutError {
    /// It is too small.
    #[error(
        "the backing has {backing_size} bytes, but a volume of {data_size} bytes needs {needed} with its metadata; use a larger backing or a smaller volume"
    )]
    TooSmall {
        /// Size of the backing.
        backing_size: u64,
        /// Size of the volume.
        data_size: u64,
        /// What it needs.
        needed: u64,
    },
    /// The volume's size can't be.
    #[error(
        "a volume of {data_size} bytes can't be: the size must be a multiple of 4096, more than 0 and at most {max}",
        max = Layout::DATA_SIZE_MAX
    )]
    BadSize {
        /// Size of the volume.
        data_size: u64,
    },
}

impl Layout {
    /// Blocks in a region: 1 MiB. Small enough that a crash leaves little to compare (900 active
    /// regions: 900 MiB), large enough that steady writing rarely meets a cold one.
    pub const REGION_BLOCKS: u64 = 256;

    /// The largest volume: 1 PiB. Keeps page and region numbers well within 32 bits.
    pub const DATA_SIZE_MAX: u64 = 1 << 50;

    /// The layout of the smallest backing for a volume of `data_size` bytes.
    ///
    /// # Errors
    /// The size can't be.
    pub fn new(data_size: u64) -> Result<Self, LayoutError> {
        let bad = LayoutError::BadSize { data_size };
        if data_size == 0
            || !data_size.is_multiple_of(BLOCK_SIZE)
            || data_size > Self::DATA_SIZE_MAX
        {
            return Err(bad);
        }
        let pages = (data_size / BLOCK_SIZE).div_ceil(bitmap::BLOCKS_PER_PAGE);
        let bitmap_len = pages * 2 * BLOCK_SIZE * ReplicaSlot::COUNT as u64;
        let activity_offset = data_size + bitmap_len;
        Ok(Self {
            data_size,
            pages: u32::try_from(pages).map_err(|_| bad)?,
            bitmap_offset: data_size,
            activity_offset,
            superblock_offset: activity_offset + activity::RING_BLOCKS * BLOCK_SIZE,
        })
    }

    /// The layout of a volume of `data_size` bytes on a backing of `backing_size` bytes: metadata
    /// ends with its last whole block.
    ///
    /// # Errors
    /// The backing is too small, or the size can't be.
    pub fn on_backing(data_size: u64, backing_size: u64) -> Result<Self, LayoutError> {
        let smallest = Self::new(data_size)?;
        let needed = smallest.backing_size();
        let end = backing_size / BLOCK_SIZE * BLOCK_SIZE;
        let Some(gap) = end.checked_sub(needed) else {
            return Err(LayoutError::TooSmall {
                backing_size,
                data_size,
                needed,
            });
        };
        Ok(Self {
            bitmap_offset: smallest.bitmap_offset + gap,
            activity_offset: smallest.activity_offset + gap,
            superblock_offset: smallest.superblock_offset + gap,
            ..smallest
        })
    }

    /// Where the two superblock slots are on a backing: its last two whole blocks. `None` when it
    /// is smaller than that.
    #[must_use]
    pub fn superblocks(backing_size: u64) -> Option<ByteRange> {
        let end = backing_size / BLOCK_SIZE * BLOCK_SIZE;
        let offset = end.checked_sub(2 * BLOCK_SIZE)?;
        Some(ByteRange::new(offset, 2 * BLOCK_SIZE))
    }

    /// Size of the volume in bytes.
    #[must_use]
    pub const fn data_size(&self) -> u64 {
        self.data_size
    }

    /// Blocks of the volume.
    #[must_use]
    pub const fn data_blocks(&self) -> u64 {
        self.data_size / BLOCK_SIZE
    }

    /// Bytes of the backing up to the end of the metadata.
    #[must_use]
    pub const fn backing_size(&self) -> u64 {
        self.superblock_offset + 2 * BLOCK_SIZE
    }

    /// The metadata area. On a backing that does not read as zeroes, zero it before
    /// [`crate::create`]'s writes.
    #[must_use]
    pub const fn metadata(&self) -> ByteRange {
        ByteRange::new(self.bitmap_offset, self.backing_size() - self.bitmap_offset)
    }

    /// Where the superblock of a generation goes: even ones first, odd ones second.
    #[must_use]
    pub const fn superblock_block(&self, generation: u64) -> u64 {
        self.superblock_offset + (generation % 2) * BLOCK_SIZE
    }

    /// The ring of the activity log.
    #[must_use]
    pub const fn activity_ring(&self) -> ByteRange {
        ByteRange::new(self.activity_offset, activity::RING_BLOCKS * BLOCK_SIZE)
    }

    /// Where an activity log transaction goes.
    #[must_use]
    pub const fn activity_block(&self, number: u64) -> u64 {
        self.activity_offset + (number % activity::RING_BLOCKS) * BLOCK_SIZE
    }

    /// Pages of one replica slot's bitmap.
    #[must_use]
    pub const fn pages(&self) -> u32 {
        self.pages
    }

    /// The two copies of each page of a replica slot, in page order.
    #[must_use]
    pub const fn bitmap_of(&self, slot: ReplicaSlot) -> ByteRange {
        let len = self.pages as u64 * 2 * BLOCK_SIZE;
        ByteRange::new(self.bitmap_offset + slot.index() as u64 * len, len)
    }

    /// Where a generation of a bitmap page goes: even ones first, odd ones second.
    #[must_use]
    pub const fn bitmap_block(&self, slot: ReplicaSlot, page: u32, generation: u64) -> u64 {
        self.bitmap_of(slot).offset + (page as u64 * 2 + generation % 2) * BLOCK_SIZE
    }

    /// The regions that hold blocks of a run.
    pub fn regions(blocks: BlockRange) -> impl Iterator<Item = Region> + use<> {
        let first = blocks.first / Self::REGION_BLOCKS;
        let end = if blocks.count == 0 {
            first
        } else {
            blocks.end().div_ceil(Self::REGION_BLOCKS)
        };
        (first..end).map(|number| Region(u32::try_from(number).unwrap_or(u32::MAX)))
    }

    /// The blocks of a region, cut at the end of the volume; empty when it is outside.
    #[must_use]
    pub fn region_blocks(&self, region: Region) -> BlockRange {
        let first = (u64::from(region.0) * Self::REGION_BLOCKS).min(self.data_blocks());
        let end = (first + Self::REGION_BLOCKS).min(self.data_blocks());
        BlockRange::new(first, end - first)
    }

    pub(crate) const fn bitmap_offset(&self) -> u64 {
        self.bitmap_offset
    }

    pub(crate) const fn activity_offset(&self) -> u64 {
        self.activity_offset
    }
}
