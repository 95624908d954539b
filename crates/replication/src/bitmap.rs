//! Dirty bits in memory: which blocks a replica may lack, and which pages of that are not on the
//! backing yet.

use std::collections::{BTreeMap, BTreeSet, btree_map};

use relevo_format::bitmap::{BLOCKS_PER_PAGE, PageId, WORDS, Words};
use relevo_types::{BlockRange, ReplicaSlot};

/// A set of blocks as a sparse bitmap: pages that are all clear take no memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Blocks {
    pages: BTreeMap<u32, Page>,
    count: u64,
}

#[derive(Clone, Debug)]
struct Page {
    words: Box<Words>,
    count: u64,
}

impl Page {
    fn empty() -> Self {
        Self {
            words: Box::new([0; WORDS]),
            count: 0,
        }
    }
}

/// Page number and the run's bits within it, for every page that a run touches.
fn page_runs(blocks: BlockRange) -> impl Iterator<Item = (u32, u64, u64)> {
    let mut at = blocks.first;
    std::iter::from_fn(move || {
        let left = blocks.end().checked_sub(at).filter(|left| *left > 0)?;
        let bit = at % BLOCKS_PER_PAGE;
        let count = left.min(BLOCKS_PER_PAGE - bit);
        let page = u32::try_from(at / BLOCKS_PER_PAGE).unwrap_or(u32::MAX);
        at += count;
        Some((page, bit, count))
    })
}

/// Word index and mask for every word that a run of bits touches.
fn word_masks(bit: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut at = bit;
    let end = bit + count;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let shift = at % 64;
            let bits = (end - at).min(64 - shift);
            let mask = (u64::MAX >> (64 - bits)) << shift;
            let index = usize::try_from(at / 64).unwrap_or(usize::MAX);
            at += bits;
            (index, mask)
        })
    })
}

impl Blocks {
    /// Number of blocks in the set.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a run; tells the pages that changed.
    pub(crate) fn set(&mut self, blocks: BlockRange, mut changed: impl FnMut(u32)) {
        for (number, bit, count) in page_runs(blocks) {
            let page = self.pages.entry(number).or_insert_with(Page::empty);
            let mut added = 0;
            for (index, mask) in word_masks(bit, count) {
                let word = &mut page.words[index];
                added += u64::from((mask & !*word).count_ones());
                *word |= mask;
            }
            page.count += added;
            self.count += added;
            if added > 0 {
                changed(number);
            }
        }
    }

    /// Takes a run out; tells the pages that changed.
    pub(crate) fn clear(&mut self, blocks: BlockRange, mut changed: impl FnMut(u32)) {
        for (number, bit, count) in page_runs(blocks) {
            let btree_map::Entry::Occupied(mut entry) = self.pages.entry(number) else {
                continue;
            };
            let page = entry.get_mut();
            let mut removed = 0;
            for (index, mask) in word_masks(bit, count) {
                let word = &mut page.words[index];
                removed += u64::from((mask & *word).count_ones());
                *word &= !mask;
            }
            page.count -= removed;
            self.count -= removed;
            if page.count == 0 {
                entry.remove();
            }
            if removed > 0 {
                changed(number);
            }
        }
    }

    /// Empties the set; gives the pages that were not empty.
    pub(crate) fn clear_all(&mut self) -> Vec<u32> {
        self.count = 0;
        std::mem::take(&mut self.pages).into_keys().collect()
    }

    /// Whether every block of the run is in the set.
    pub(crate) fn covers(&self, blocks: BlockRange) -> bool {
        page_runs(blocks).all(|(number, bit, count)| {
            self.pages.get(&number).is_some_and(|page| {
                word_masks(bit, count).all(|(index, mask)| page.words[index] & mask == mask)
            })
        })
    }

    /// The first run at or after `from`, at most `max` blocks long.
    pub(crate) fn next_run(&self, from: u64, max: u64) -> Option<BlockRange> {
        let first = self.next_set(from)?;
        let longest = first.saturating_add(max.max(1));
        let end = self.next_clear(first, longest);
        Some(BlockRange::new(first, end - first))
    }

    /// All runs, in order, each at most `max` blocks long.
    pub(crate) fn runs(&self, max: u64) -> impl Iterator<Item = BlockRange> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from, max)?;
            from = run.end();
            Some(run)
        })
    }

    /// The first block at or after `from` that is not in the set, or `limit` if that is lower. Goes by pages
    /// and words: a replica that lacks everything is one run of millions of blocks.
    fn next_clear(&self, from: u64, limit: u64) -> u64 {
        let mut at = from;
        while at < limit {
            let number = u32::try_from(at / BLOCKS_PER_PAGE).unwrap_or(u32::MAX);
            let Some(page) = self.pages.get(&number) else {
                return at;
            };
            let bit = at % BLOCKS_PER_PAGE;
            if page.count == BLOCKS_PER_PAGE {
                at += BLOCKS_PER_PAGE - bit;
                continue;
            }
            let index = usize::try_from(bit / 64).unwrap_or(WORDS);
            let ones = (page.words[index] >> (bit % 64)).trailing_ones();
            let left = 64 - bit % 64;
            at += u64::from(ones).min(left);
            if u64::from(ones) < left {
                break;
            }
        }
        at.min(limit)
    }

    fn next_set(&self, from: u64) -> Option<u64> {
        let first_page = u32::try_from(from / BLOCKS_PER_PAGE).ok()?;
        for (number, page) in self.pages.range(first_page..) {
            let base = u64::from(*number) * BLOCKS_PER_PAGE;
            let bit = from.saturating_sub(base);
            let skip = usize::try_from(bit / 64).unwrap_or(WORDS);
            for (index, word) in page.words.iter().enumerate().skip(skip) {
                let masked = if index == skip && from > base {
                    word & (u64::MAX << (bit % 64))
                } else {
                    *word
                };
                if masked != 0 {
                    return Some(base + index as u64 * 64 + u64::from(masked.trailing_zeros()));
                }
            }
        }
        None
    }

    fn words(&self, page: u32) -> Words {
        self.pages.get(&page).map_or([0; WORDS], |page| *page.words)
    }

    fn load(&mut self, number: u32, words: Box<Words>) {
        let count = words.iter().map(|word| u64::from(word.count_ones())).sum();
        if count > 0 {
            self.count += count;
            self.pages.insert(number, Page { words, count });
        }
    }
}

/// The bitmaps of all replica slots of a volume, as this node knows them.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    slots: [Blocks; ReplicaSlot::COUNT],
    /// Generation of each page's newest copy on the backing; absent: never written.
    generations: BTreeMap<PageId, u64>,
    /// Pages that differ from the backing.
    unsaved: BTreeSet<PageId>,
    /// What was set in a slot's bitmap since a generation of marks began ([`crate::generations`]);
    /// in memory only: a crash takes all for the oldest generation.
    newest: [Option<Blocks>; ReplicaSlot::COUNT],
}

impl Bitmaps {
    pub(crate) fn of(&self, slot: ReplicaSlot) -> &Blocks {
        &self.slots[slot.index()]
    }

    pub(crate) fn set(&mut self, slot: ReplicaSlot, blocks: BlockRange) {
        let unsaved = &mut self.unsaved;
        self.slots[slot.index()].set(blocks, |page| {
            unsaved.insert(PageId { slot, page });
        });
        if let Some(newest) = &mut self.newest[slot.index()] {
            newest.set(blocks, |_| {});
        }
    }

    /// What is set in a slot's bitmap from here on is of a new generation.
    pub(crate) fn begin_generation(&mut self, slot: ReplicaSlot) {
        self.newest[slot.index()] = Some(Blocks::default());
    }

    /// Takes out of a slot's bitmap what was set before the last generation began; a new one begins.
    /// Nothing where none was begun.
    pub(crate) fn keep_newest_generation(&mut self, slot: ReplicaSlot) {
        let newest = self.newest[slot.index()].replace(Blocks::default());
        let Some(newest) = newest else {
            return;
        };
        let mut older = self.of(slot).clone();
        for blocks in newest.runs(u64::MAX) {
            older.clear(blocks, |_| {});
        }
        for blocks in older.runs(u64::MAX) {
            self.clear(slot, blocks);
        }
    }

    /// Everything counts as of the oldest generation, until the next one begins.
    pub(crate) fn forget_generations(&mut self) {
        self.newest = Default::default();
    }

    pub(crate) fn clear(&mut self, slot: ReplicaSlot, blocks: BlockRange) {
        let unsaved = &mut self.unsaved;
        self.slots[slot.index()].clear(blocks, |page| {
            unsaved.insert(PageId { slot, page });
        });
    }

    pub(crate) fn clear_all(&mut self, slot: ReplicaSlot) {
        for page in self.slots[slot.index()].clear_all() {
            self.unsaved.insert(PageId { slot, page });
        }
    }

    /// Adds everything that is in `from` to `to`.
    pub(crate) fn merge(&mut self, from: ReplicaSlot, to: ReplicaSlot) {
        let runs: Vec<BlockRange> = self.of(from).runs(u64::MAX).collect();
        for run in runs {
            self.set(to, run);
        }
    }

    /// Takes over a page that was read from the backing.
    pub(crate) fn load(&mut self, id: PageId, generation: u64, words: Box<Words>) {
        self.generations.insert(id, generation);
        self.slots[id.slot.index()].load(id.page, words);
    }

    /// Takes over a page whose copies on the backing are damaged: all dirty, to be written anew.
    pub(crate) fn load_damaged(&mut self, id: PageId, generation: u64, data_blocks: u64) {
        self.generations.insert(id, generation);
        let first = u64::from(id.page) * BLOCKS_PER_PAGE;
        let count = BLOCKS_PER_PAGE.min(data_blocks.saturating_sub(first));
        self.set(id.slot, BlockRange::new(first, count));
        self.unsaved.insert(id);
    }

    pub(crate) fn has_unsaved(&self) -> bool {
        !self.unsaved.is_empty()
    }

    /// The pages to write now, with their next generation. They count as saved from here on; the
    /// caller stops the volume if a write fails. One by one: of a large volume they are tens of megabytes.
    pub(crate) fn take_unsaved(&mut self) -> impl Iterator<Item = (PageId, u64, Words)> + '_ {
        std::mem::take(&mut self.unsaved).into_iter().map(|id| {
            let generation = self.generations.entry(id).or_insert(0);
            *generation += 1;
            (id, *generation, self.slots[id.slot.index()].words(id.page))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bitmap_is_a_set(steps in prop::collection::vec(
            (any::<bool>(), 0u64..70_000, 1u64..40_000), 1..20)) {
            let mut bits = Blocks::default();
            let mut model = BTreeSet::new();
            for (add, first, count) in steps {
                let run = BlockRange::new(first, count);
                if add {
                    bits.set(run, |_| {});
                    model.extend(run.iter());
                } else {
                    bits.clear(run, |_| {});
                    model.retain(|block| !(run.first..run.end()).contains(block));
                }
            }
            prop_assert_eq!(bits.count(), model.len() as u64);
            let listed: Vec<u64> = bits.runs(1000).flat_map(|run| run.iter()).collect();
            prop_assert!(bits.runs(1000).all(|run| run.count <= 1000));
            prop_assert_eq!(listed, model.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_run_may_be_as_long_as_a_volume() {
        let mut bits = Blocks::default();
        let all = BlockRange::new(5, (1 << 28) - 10);
        bits.set(all, |_| {});
        assert_eq!(bits.next_run(0, u64::MAX), Some(all));
        assert_eq!(bits.runs(u64::MAX).count(), 1);
        let hole = BlockRange::new(3 * BLOCKS_PER_PAGE - 1, 2);
        bits.clear(hole, |_| {});
        let runs: Vec<BlockRange> = bits.runs(u64::MAX).collect();
        assert_eq!(runs.len(), 2);
        assert_eq!((runs[0].end(), runs[1].first), (hole.first, hole.end()));
        assert_eq!(bits.next_run(7, 64), Some(BlockRange::new(7, 64)));
    }

    #[test]
    fn pages_that_changed_are_saved_once() {
        let slot = ReplicaSlot(2);
        let mut bitmaps = Bitmaps::default();
        bitmaps.set(slot, BlockRange::new(BLOCKS_PER_PAGE - 1, 2));
        let pages: Vec<_> = bitmaps
            .take_unsaved()
            .map(|(id, generation, _)| (id.page, generation))
            .collect();
        assert_eq!(pages, [(0, 1), (1, 1)]);
        assert!(!bitmaps.has_unsaved());
        // Setting what is set changes nothing.
        bitmaps.set(slot, BlockRange::new(BLOCKS_PER_PAGE, 1));
        assert!(!bitmaps.has_unsaved());
        bitmaps.clear_all(slot);
        let saved: Vec<_> = bitmaps.take_unsaved().collect();
        assert!(
            saved
                .iter()
                .all(|(_, generation, words)| *generation == 2 && *words == [0; WORDS])
        );
        assert_eq!(saved.len(), 2);
    }

    #[test]
    fn only_the_newest_generation_is_kept() {
        let slot = ReplicaSlot(3);
        let mut bitmaps = Bitmaps::default();
        let marked =
            |bitmaps: &Bitmaps| -> Vec<BlockRange> { bitmaps.of(slot).runs(u64::MAX).collect() };
        bitmaps.set(slot, BlockRange::new(0, 10));
        bitmaps.keep_newest_generation(slot);
        assert_eq!(marked(&bitmaps), [BlockRange::new(0, 10)], "none was begun");
        bitmaps.begin_generation(slot);
        bitmaps.set(slot, BlockRange::new(8, 4));
        bitmaps.set(ReplicaSlot(4), BlockRange::new(2, 1));
        bitmaps.keep_newest_generation(slot);
        assert_eq!(marked(&bitmaps), [BlockRange::new(8, 4)]);
        bitmaps.set(slot, BlockRange::new(9, 1));
        bitmaps.forget_generations();
        bitmaps.keep_newest_generation(slot);
        assert_eq!(marked(&bitmaps), [BlockRange::new(8, 4)]);
        assert!(bitmaps.take_unsaved().count() > 0);
        bitmaps.keep_newest_generation(slot);
        assert!(marked(&bitmaps).is_empty() && bitmaps.has_unsaved());
    }

    #[test]
    fn a_damaged_page_is_all_dirty() {
        let id = PageId {
            slot: ReplicaSlot(0),
            page: 0,
        };
        let mut bitmaps = Bitmaps::default();
        bitmaps.load_damaged(id, 4, 100);
        assert_eq!(bitmaps.of(id.slot).count(), 100);
        let (_, generation, _) = bitmaps.take_unsaved().next().unwrap();
        assert_eq!(generation, 5);
    }
}
