//! Bytes and blocks of a volume.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The unit of dirty tracking and resync, and the logical block size of every export: 4 KiB, the
/// page size and the physical sector size of today's disks. Volume sizes are multiples of it.
pub const BLOCK_SIZE: u64 = 4096;

/// A run of bytes `[offset, offset + len)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// The run of `len` bytes that starts at `offset`.
    #[must_use]
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// The first byte after the run, or `None` when that does not fit in 64 bits.
    #[must_use]
    pub const fn checked_end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    /// The first byte after the run. Saturates; check bounds with [`Self::checked_end`] first.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Whether the two runs share a byte.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Every block that holds a byte of the run.
    #[must_use]
    pub const fn blocks_touched(&self) -> BlockRange {
        let first = self.offset / BLOCK_SIZE;
        BlockRange {
            first,
            count: self.end().div_ceil(BLOCK_SIZE).saturating_sub(first),
        }
    }

    /// Every block that lies wholly inside the run.
    #[must_use]
    pub const fn blocks_covered(&self) -> BlockRange {
        let first = self.offset.div_ceil(BLOCK_SIZE);
        BlockRange {
            first,
            count: (self.end() / BLOCK_SIZE).saturating_sub(first),
        }
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}

/// A run of blocks `[first, first + count)`, each of [`BLOCK_SIZE`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockRange {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRange {
    /// The run of `count` blocks that starts at `first`.
    #[must_use]
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// The first block after the run.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Whether the two runs share a block.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }

    /// The bytes of the run.
    #[must_use]
    pub const fn bytes(&self) -> ByteRange {
        ByteRange {
            offset: self.first * BLOCK_SIZE,
            len: self.count * BLOCK_SIZE,
        }
    }

    /// The block numbers of the run.
    pub fn iter(&self) -> impl Iterator<Item = u64> + use<> {
        self.first..self.end()
    }

    /// The run in pieces of `most` blocks, the last one shorter; `most` is not 0.
    pub fn pieces(&self, most: u64) -> impl Iterator<Item = Self> + use<> {
        let end = self.end();
        let step = usize::try_from(most).unwrap_or(usize::MAX);
        let starts = (self.first..end).step_by(step);
        starts.map(move |first| Self::new(first, most.min(end - first)))
    }
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}+{}", self.first, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole_run_in_order() {
        let pieces: Vec<_> = BlockRange::new(5, 7).pieces(3).collect();
        let run = BlockRange::new;
        assert_eq!(pieces, [run(5, 3), run(8, 3), run(11, 1)]);
        assert_eq!(run(5, 3).pieces(3).count(), 1);
        assert_eq!(run(5, 0).pieces(3).count(), 0);
    }

    #[test]
    fn blocks_touched_and_covered() {
        let range = ByteRange::new(4095, 4098);
        assert_eq!(range.blocks_touched(), BlockRange::new(0, 3));
        assert_eq!(range.blocks_covered(), BlockRange::new(1, 1));
        assert_eq!(ByteRange::new(1, 10).blocks_covered().count, 0);
        assert_eq!(
            ByteRange::new(8192, 4096).blocks_touched(),
            BlockRange::new(2, 1)
        );
        assert_eq!(ByteRange::new(8192, 0).blocks_touched().count, 0);
    }
}
