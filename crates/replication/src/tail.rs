//! The tail: writes that this replica got from the primary and does not know to be on every
//! member of the in-sync set.
//!
//! If the primary dies these are the only blocks in which two in-sync replicas can differ. When
//! the primary's reign ends in any way the tail is folded into the replica's own bitmap, which
//! [`crate::promotion`] and a resync ask for.

use std::collections::BTreeSet;

use relevo_format::{Layout, Region};
use relevo_types::{BlockRange, Seq};

use crate::window::Window;

/// Writes that a primary keeps above the complete position at most. Bounds the tail everywhere.
pub(crate) const WINDOW_MAX: u64 = 4096;

#[derive(Debug, Default)]
pub(crate) struct Tail {
    writes: Window<Seq, BlockRange>,
}

impl Tail {
    /// Adds a write. False: the primary keeps more writes open than [`WINDOW_MAX`].
    pub(crate) fn add(&mut self, seq: Seq, blocks: BlockRange) -> bool {
        self.writes.insert(seq, blocks);
        self.writes.len() as u64 <= WINDOW_MAX
    }

    /// Every write at or below `complete` is everywhere.
    pub(crate) fn complete(&mut self, complete: Seq) {
        self.writes.remove_through(&complete);
    }

    pub(crate) fn blocks(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.writes.values().copied()
    }

    pub(crate) fn take(&mut self) -> impl Iterator<Item = BlockRange> + use<> {
        self.writes.take().map(|(_, blocks)| blocks)
    }

    pub(crate) fn regions(&self) -> BTreeSet<Region> {
        self.blocks().flat_map(Layout::regions).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.writes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_writes_leave_the_tail() {
        let mut tail = Tail::default();
        for seq in 1..=3 {
            assert!(tail.add(Seq(seq), BlockRange::new(seq * 256, 1)));
        }
        tail.complete(Seq(2));
        assert_eq!(tail.regions(), BTreeSet::from([Region(3)]));
        tail.complete(Seq(1));
        assert_eq!(tail.take().count(), 1);
        assert_eq!(tail.len(), 0);
    }
}
