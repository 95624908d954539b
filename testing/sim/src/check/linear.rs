//! No acknowledged write lost, no stale read, no flip-flop (the sentence on *acknowledged* in
//! DESIGN section 3, and rule 8 for reads).
//!
//! Each sector of 512 bytes is a register; it must be linearizable. Every write has its own
//! content, so the test of Gibbons and Korach applies: gather each write with the reads that saw it
//! into a cluster; its zone runs from the earliest end to the latest beginning of its operations.
//! If the end is first, the cluster's value was certainly in force all through the zone
//! ("forward"). The history is linearizable if no two forward zones overlap and no other zone lies
//! inside a forward one.
//!
//! * A write that failed (error reply, or its node died) counts as ended then, *if* it was ever
//!   seen: it may have happened before that or never, but must not rise from the dead after later
//!   writes.
//! * Zeroes are not unique. The workload writes zeroes to a block only while no older zeroes can
//!   come to light, so a zero belongs to the newest zero write (or to the empty volume).
//! * Power loss: when a node opens that lost power since it was last known to have everything,
//!   writes that no completed flush covered may be gone. Then the history is cut there, and the
//!   register starts again with any one of what a disk may have kept.

mod settled;

use relevo_types::BlockRange;

use super::{Verdict, Violation};
use crate::stamp::{SECTORS_PER_BLOCK, WriteNo};

const RULE: &str = "acknowledged writes stay, reads are fresh (section 3, rule 8)";

/// A moment in the history: operations are numbered as they begin and end, so no two share one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Tick(pub u64);

impl Tick {
    const NEVER: Self = Self(u64::MAX);
}

/// A write of the workload.
#[derive(Clone, Debug)]
pub struct Write {
    /// Where.
    pub blocks: BlockRange,
    /// When it began.
    pub invoked: Tick,
    /// When it ended, well or not.
    pub ended: Option<Tick>,
    /// It was acknowledged.
    pub acked: bool,
    /// A completed flush covers it, or it was acknowledged with FUA. Not set any more once a cut made
    /// it uncertain whether there is anything left to flush.
    pub flushed: bool,
    /// It wrote zeroes.
    pub zeroes: bool,
}

/// One write of one block with the reads that saw it, by sector.
#[derive(Clone, Debug)]
struct Cluster {
    write: WriteNo,
    /// Earliest end of its operations.
    first_end: [Tick; SECTORS_PER_BLOCK],
    /// Latest beginning.
    last_begin: [Tick; SECTORS_PER_BLOCK],
    /// The sectors on which it was read at least once or acknowledged. Bit n is sector n.
    happened: u8,
    /// After a cut: it is one of what may be there. Bit n is sector n.
    candidate: u8,
    /// `candidate` as the cut made it. It counts again at the next cut if no flush was completed in
    /// between: what was read is no more durable for that.
    offered: u8,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// In the order in which their writes began.
    clusters: Vec<Cluster>,
    /// So many of them, the first, are settled: another one that certainly came after them is certainly over
    /// as well, so whoever clashes with one of them from now on clashes with that one too.
    settled: usize,
    /// With so many clusters it is looked for more that are.
    look_at: usize,
    /// After a cut: the sectors whose value is not known yet. Bit n is sector n.
    unknown: u8,
    cut: Tick,
    /// The write to which zeroes belong.
    zero: WriteNo,
}

/// All that the clients did, and the verdict on it.
#[derive(Debug)]
pub struct History {
    tick: Tick,
    /// By number; index 0 is the empty volume.
    writes: Vec<Write>,
    /// By number; those that nobody used are empty.
    blocks: Vec<Block>,
    /// No read will come that began before.
    oldest_read: Tick,
    /// The writes before this one are of no concern to any flush to come: flushed, failed, or cut.
    unflushed_from: usize,
    lost_with_power: u64,
    last_cut: Tick,
    /// When the newest acknowledged flush began.
    last_flush: Tick,
}

impl Default for History {
    fn default() -> Self {
        let empty = Write {
            blocks: BlockRange::new(0, 0),
            invoked: Tick(0),
            ended: Some(Tick(0)),
            acked: true,
            flushed: true,
            zeroes: true,
        };
        Self {
            tick: Tick(0),
            writes: vec![empty],
            blocks: Vec::new(),
            oldest_read: Tick(0),
            unflushed_from: 0,
            lost_with_power: 0,
            last_cut: Tick(0),
            last_flush: Tick(0),
        }
    }
}

impl History {
    /// A new moment.
    pub fn tick(&mut self) -> Tick {
        self.tick.0 += 1;
        self.tick
    }

    /// The newest moment.
    #[must_use]
    pub const fn now(&self) -> Tick {
        self.tick
    }

    /// The write of that number.
    #[must_use]
    pub fn write(&self, write: WriteNo) -> &Write {
        &self.writes[write.0 as usize]
    }

    /// Sectors on which an acknowledged write was seen to be gone after a power loss, as allowed.
    #[must_use]
    pub const fn lost_with_power(&self) -> u64 {
        self.lost_with_power
    }

    /// Whether it is certain that a write is still somewhere: no cut came after it.
    #[must_use]
    pub fn is_after_cuts(&self, write: &Write) -> bool {
        write.invoked > self.last_cut
    }

    /// The writes that a flush may cover and none did, with their numbers; and some others.
    pub fn unflushed(&self) -> impl Iterator<Item = (WriteNo, &Write)> {
        let all = (0u32..).map(WriteNo).zip(&self.writes);
        all.skip(self.unflushed_from.max(1))
    }

    /// The blocks that were ever used.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        let used = (0..).zip(&self.blocks).filter(|(_, block)| block.is_used());
        used.map(|(number, _)| number)
    }

    /// Says that no read will be answered any more that began before this moment.
    pub fn no_read_before(&mut self, oldest: Tick) {
        self.oldest_read = oldest;
    }

    fn block(&self, number: u64) -> Option<&Block> {
        let block = self.blocks.get(usize::try_from(number).ok()?)?;
        block.is_used().then_some(block)
    }

    fn block_mut(blocks: &mut Vec<Block>, number: u64) -> &mut Block {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        if index >= blocks.len() {
            blocks.resize_with(index + 1, Block::default);
        }
        &mut blocks[index]
    }

    /// A client begins a write.
    pub fn begin_write(&mut self, blocks: BlockRange, zeroes: bool) -> WriteNo {
        let invoked = self.tick();
        let number = WriteNo(u32::try_from(self.writes.len()).unwrap_or(u32::MAX));
        self.writes.push(Write {
            blocks,
            invoked,
            ended: None,
            acked: false,
            flushed: false,
            zeroes,
        });
        for block in blocks.iter() {
            let entry = Self::block_mut(&mut self.blocks, block);
            if entry.clusters.is_empty() && entry.cut == Tick(0) {
                entry.clusters.push(Cluster::empty_volume());
            }
            entry.settle(self.oldest_read, &self.writes);
            entry.clusters.push(Cluster::new(number, invoked));
            if zeroes {
                entry.zero = number;
            }
        }
        number
    }

    /// A write was acknowledged.
    ///
    /// # Errors
    /// The history is not linearizable.
    pub fn write_acked(&mut self, number: WriteNo, durable: bool) -> Verdict {
        let ended = self.tick();
        let write = &mut self.writes[number.0 as usize];
        write.ended = Some(ended);
        write.acked = true;
        write.flushed |= durable;
        let blocks = write.blocks;
        for block in blocks.iter() {
            let entry = Self::block_mut(&mut self.blocks, block);
            if let Some(index) = entry.position(number) {
                let cluster = &mut entry.clusters[index];
                cluster.happened = u8::MAX;
                for sector in 0..SECTORS_PER_BLOCK {
                    cluster.first_end[sector] = cluster.first_end[sector].min(ended);
                }
                for sector in 0..SECTORS_PER_BLOCK {
                    entry.check(index, sector, block, &self.writes)?;
                }
            }
        }
        Ok(())
    }

    /// A write failed or its node died: it happened before now, or never.
    ///
    /// # Errors
    /// The history is not linearizable.
    pub fn write_failed(&mut self, number: WriteNo) -> Verdict {
        let ended = self.tick();
        self.writes[number.0 as usize].ended = Some(ended);
        let blocks = self.writes[number.0 as usize].blocks;
        for block in blocks.iter() {
            let entry = Self::block_mut(&mut self.blocks, block);
            if let Some(index) = entry.position(number) {
                for sector in 0..SECTORS_PER_BLOCK {
                    if entry.clusters[index].happened & bit(sector) != 0 {
                        entry.clusters[index].first_end[sector] =
                            entry.clusters[index].first_end[sector].min(ended);
                        entry.check(index, sector, block, &self.writes)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A flush that began at `invoked` was acknowledged: it covers what was acknowledged before.
    pub fn flush_acked(&mut self, invoked: Tick) {
        self.last_flush = self.last_flush.max(invoked);
        for write in &mut self.writes[self.unflushed_from..] {
            if write.invoked > self.last_cut
                && write.acked
                && write.ended.is_some_and(|ended| ended < invoked)
            {
                write.flushed = true;
            }
        }
        let concerns = |write: &Write| {
            let open = write.ended.is_none() || write.acked && !write.flushed;
            open && write.invoked > self.last_cut
        };
        let from = &self.writes[self.unflushed_from..];
        self.unflushed_from += from.iter().take_while(|write| !concerns(write)).count();
    }

    /// A read that began at `invoked` gave this content of a sector.
    ///
    /// # Errors
    /// The history is not linearizable.
    pub fn read(&mut self, invoked: Tick, block: u64, sector: usize, saw: WriteNo) -> Verdict {
        let ended = self.tick();
        let entry = Self::block_mut(&mut self.blocks, block);
        if entry.clusters.is_empty() && entry.cut == Tick(0) {
            entry.clusters.push(Cluster::empty_volume());
        }
        let saw = if saw == WriteNo::ZERO {
            entry.zero
        } else {
            saw
        };
        let Some(index) = entry.position(saw) else {
            return Err(Violation::new(
                RULE,
                format!(
                    "block {block} sector {sector}: read {}, which is long gone or was never written here",
                    describe(saw, &self.writes)
                ),
            ));
        };
        let bit = bit(sector);
        let cluster = &mut entry.clusters[index];
        if entry.cut > Tick(0) && cluster.write_began_before(entry.cut, &self.writes) {
            if cluster.candidate & bit == 0 {
                return Err(Violation::new(
                    RULE,
                    format!(
                        "block {block} sector {sector}: read {}, which is older than what a flush covered",
                        describe(saw, &self.writes)
                    ),
                ));
            }
            if entry.unknown & bit != 0 {
                entry.unknown &= !bit;
                cluster.first_end[sector] = entry.cut;
                cluster.happened |= bit;
                let seen_ended = self.writes[saw.0 as usize].ended;
                for other in &mut entry.clusters {
                    if other.write != saw {
                        let write = &self.writes[other.write.0 as usize];
                        let newer = seen_ended.is_some_and(|ended| ended < write.invoked);
                        self.lost_with_power +=
                            u64::from(other.candidate & bit != 0 && write.acked && newer);
                        other.candidate &= !bit;
                    }
                }
            }
        }
        let cluster = &mut entry.clusters[index];
        if cluster.happened & bit == 0 {
            cluster.happened |= bit;
            // It failed before it was seen: only now is it known that it happened.
            if let Some(failed) = self.writes[saw.0 as usize].ended {
                cluster.first_end[sector] = cluster.first_end[sector].min(failed);
            }
        }
        cluster.first_end[sector] = cluster.first_end[sector].min(ended);
        cluster.last_begin[sector] = cluster.last_begin[sector].max(invoked);
        entry.check(index, sector, block, &self.writes)
    }

    /// A node opened that lost power at `lost`: what no flush covers may be gone from now on, as
    /// long as it began before the loss.
    pub fn cut(&mut self, lost: Tick) {
        let cut = self.tick();
        let flushed_since = self.last_flush > self.last_cut;
        self.last_cut = cut;
        let writes = &self.writes;
        for block in &mut self.blocks {
            block.cut_at(cut, lost, flushed_since, writes);
        }
    }

    /// Another history is in force (rule 9): what its replica has is the truth from now on, and no write
    /// under way elsewhere counts. `contents` gives the writes of a block's sectors on that replica, and
    /// those that writes under way there may make of it: one of them is the truth.
    pub fn restart(&mut self, contents: impl Fn(u64) -> Vec<[WriteNo; SECTORS_PER_BLOCK]>) {
        let cut = self.tick();
        self.last_cut = cut;
        for write in &mut self.writes {
            write.flushed = false;
        }
        for (block, entry) in (0..).zip(&mut self.blocks) {
            if !entry.is_used() {
                continue;
            }
            entry.clusters.clear();
            entry.settled = 0;
            entry.look_at = 0;
            entry.zero = WriteNo::ZERO;
            entry.unknown = u8::MAX;
            entry.cut = cut;
            for (number, write) in contents(block).as_flattened().iter().enumerate() {
                let sector = number % SECTORS_PER_BLOCK;
                let index = entry.position(*write).unwrap_or_else(|| {
                    entry.clusters.push(Cluster::new(*write, cut));
                    entry.clusters.len() - 1
                });
                entry.clusters[index].candidate |= bit(sector);
                entry.clusters[index].offered |= bit(sector);
            }
        }
    }

    /// Whether a write of a block may be there as well as `wanted` or instead of it: it is
    /// `wanted` itself, or was not certainly before it.
    #[must_use]
    pub fn same_or_newer(&self, block: u64, found: WriteNo, wanted: WriteNo) -> bool {
        let found = if found == WriteNo::ZERO {
            self.block(block).map_or(WriteNo::ZERO, |entry| entry.zero)
        } else {
            found
        };
        found == wanted
            || self
                .write(found)
                .ended
                .is_none_or(|ended| ended > self.write(wanted).invoked)
    }

    /// Whether zeroes may be written to a block without becoming ambiguous: older zeroes are
    /// certainly overwritten for good.
    #[must_use]
    pub fn zeroes_are_clear(&self, block: u64) -> bool {
        let Some(entry) = self.block(block) else {
            return false;
        };
        let Some(zero_ended) = self.write(entry.zero).ended else {
            return false;
        };
        entry.clusters.iter().any(|cluster| {
            let write = self.write(cluster.write);
            cluster.write != entry.zero && write.flushed && write.invoked > zero_ended
        })
    }
}

impl Cluster {
    fn new(write: WriteNo, invoked: Tick) -> Self {
        Self {
            write,
            first_end: [Tick::NEVER; SECTORS_PER_BLOCK],
            last_begin: [invoked; SECTORS_PER_BLOCK],
            happened: 0,
            candidate: 0,
            offered: 0,
        }
    }

    fn empty_volume() -> Self {
        Self {
            first_end: [Tick(0); SECTORS_PER_BLOCK],
            happened: u8::MAX,
            ..Self::new(WriteNo::ZERO, Tick(0))
        }
    }

    fn write_began_before(&self, moment: Tick, writes: &[Write]) -> bool {
        writes[self.write.0 as usize].invoked < moment
    }
}

impl Block {
    const fn is_used(&self) -> bool {
        !self.clusters.is_empty() || self.cut.0 > 0
    }

    fn position(&self, write: WriteNo) -> Option<usize> {
        self.clusters
            .iter()
            .rposition(|cluster| cluster.write == write)
    }

    /// Checks one cluster against all others, for one sector.
    fn check(&self, index: usize, sector: usize, block: u64, writes: &[Write]) -> Verdict {
        let ours = &self.clusters[index];
        if ours.happened & bit(sector) == 0 || ours.first_end[sector] == Tick::NEVER {
            return Ok(());
        }
        // One that is settled and comes up again clashes with what settled it.
        let from = if index < self.settled {
            0
        } else {
            self.settled
        };
        for (other_index, theirs) in self.clusters.iter().enumerate().skip(from) {
            let (end_a, begin_a) = (ours.first_end[sector], ours.last_begin[sector]);
            let (end_b, begin_b) = (theirs.first_end[sector], theirs.last_begin[sector]);
            if other_index == index || theirs.happened & bit(sector) == 0 || end_b == Tick::NEVER {
                continue;
            }
            let clash = match (end_a < begin_a, end_b < begin_b) {
                (true, true) => end_a < begin_b && end_b < begin_a,
                (true, false) => end_a < begin_b && end_b < begin_a,
                (false, true) => end_b < begin_a && end_a < begin_b,
                (false, false) => false,
            };
            if clash {
                return Err(Violation::new(
                    RULE,
                    format!(
                        "block {block} sector {sector}: {} was certainly there from tick {} to {}, but {} was there from {} to {}",
                        describe(ours.write, writes),
                        end_a.0.min(begin_a.0),
                        end_a.0.max(begin_a.0),
                        describe(theirs.write, writes),
                        end_b.0.min(begin_b.0),
                        end_b.0.max(begin_b.0),
                    ),
                ));
            }
        }
        Ok(())
    }

    fn cut_at(&mut self, cut: Tick, lost: Tick, flushed_since: bool, writes: &[Write]) {
        let last_cut = self.cut;
        // A write that began after the loss was acknowledged by what has not lost power since. One
        // from before the last cut may be gone already.
        let certain = |write: &Write| {
            let known = last_cut == Tick(0) || write.invoked > last_cut;
            known && write.acked && (write.flushed || write.invoked > lost)
        };
        let floors: Vec<Tick> = self
            .clusters
            .iter()
            .map(|cluster| &writes[cluster.write.0 as usize])
            .filter(|write| certain(write))
            .map(|write| write.invoked)
            .collect();
        let floor = floors.into_iter().max().unwrap_or_default();
        let mut kept = Vec::new();
        for old in &self.clusters {
            let write = &writes[old.write.0 as usize];
            if write.ended.is_some_and(|ended| ended < floor) {
                continue;
            }
            let mut new = Cluster::new(old.write, cut);
            for sector in 0..SECTORS_PER_BLOCK {
                // What was ruled out since the last cut stays so if a flush made that durable.
                let left = if flushed_since {
                    old.candidate
                } else {
                    old.offered
                };
                let ruled_out = last_cut > Tick(0)
                    && old.write_began_before(last_cut, writes)
                    && left & bit(sector) == 0;
                if !ruled_out {
                    new.candidate |= bit(sector);
                }
            }
            new.offered = new.candidate;
            if new.candidate != 0 {
                kept.push(new);
            }
        }
        if kept.is_empty() {
            // Never written: nothing can have changed.
            return;
        }
        self.clusters = kept;
        self.settled = 0;
        self.look_at = 0;
        self.unknown = u8::MAX;
        self.cut = cut;
    }
}

const fn bit(sector: usize) -> u8 {
    1 << sector
}

fn describe(number: WriteNo, writes: &[Write]) -> String {
    let Some(write) = writes.get(number.0 as usize) else {
        return format!("write {} that nobody made", number.0);
    };
    let what = if number == WriteNo::ZERO {
        "the empty volume".to_owned()
    } else if write.zeroes {
        format!("zeroes {}", number.0)
    } else {
        format!("write {}", number.0)
    };
    let outcome = match (write.acked, write.ended) {
        (true, Some(ended)) => format!("acknowledged at {}", ended.0),
        (false, Some(ended)) => format!("failed at {}", ended.0),
        _ => "not answered".to_owned(),
    };
    let durable = if write.flushed { ", flushed" } else { "" };
    format!(
        "{what} (begun at tick {}, {outcome}{durable})",
        write.invoked.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockRange = BlockRange::new(3, 1);

    fn read(history: &mut History, saw: WriteNo) -> Verdict {
        let invoked = history.tick();
        history.read(invoked, 3, 0, saw)
    }

    #[test]
    fn fresh_reads_pass_and_stale_ones_do_not() {
        let mut history = History::default();
        assert!(read(&mut history, WriteNo::ZERO).is_ok());
        let one = history.begin_write(BLOCK, false);
        assert!(read(&mut history, WriteNo::ZERO).is_ok());
        history.write_acked(one, false).unwrap();
        assert!(read(&mut history, one).is_ok());
        assert!(read(&mut history, WriteNo::ZERO).is_err());
    }

    #[test]
    fn an_observed_write_stays_observed() {
        let mut history = History::default();
        let one = history.begin_write(BLOCK, false);
        assert!(read(&mut history, one).is_ok());
        assert!(read(&mut history, WriteNo::ZERO).is_err());
    }

    #[test]
    fn concurrent_writes_may_end_either_way_but_one_way() {
        for (first, ok) in [(0, true), (1, true), (2, false)] {
            let mut history = History::default();
            let one = history.begin_write(BLOCK, false);
            let two = history.begin_write(BLOCK, false);
            history.write_acked(one, false).unwrap();
            history.write_acked(two, false).unwrap();
            let verdict = match first {
                0 => read(&mut history, one),
                1 => read(&mut history, two),
                _ => read(&mut history, one).and_then(|()| read(&mut history, two)),
            };
            assert_eq!(verdict.is_ok(), ok, "{first}");
        }
    }

    #[test]
    fn a_failed_write_does_not_rise_after_a_later_one() {
        let mut history = History::default();
        let one = history.begin_write(BLOCK, false);
        history.write_failed(one).unwrap();
        let two = history.begin_write(BLOCK, false);
        history.write_acked(two, false).unwrap();
        assert!(read(&mut history, one).is_err());
        let mut history = History::default();
        let one = history.begin_write(BLOCK, false);
        history.write_failed(one).unwrap();
        assert!(read(&mut history, one).is_ok(), "it may have happened");
    }

    #[test]
    fn a_cut_allows_exactly_what_no_flush_covers() {
        let made = || {
            let mut history = History::default();
            let one = history.begin_write(BLOCK, false);
            history.write_acked(one, true).unwrap();
            let two = history.begin_write(BLOCK, false);
            history.write_acked(two, false).unwrap();
            let lost = history.tick();
            history.cut(lost);
            (history, one, two)
        };
        let (mut history, _, _) = made();
        assert!(read(&mut history, WriteNo::ZERO).is_err(), "flushed");
        let (mut history, one, two) = made();
        assert!(read(&mut history, one).is_ok());
        assert!(read(&mut history, two).is_err(), "flip-flop");
        let (mut history, one, two) = made();
        assert!(read(&mut history, two).is_ok());
        assert!(read(&mut history, one).is_err(), "flip-flop");
        let (mut history, one, _) = made();
        let three = history.begin_write(BLOCK, false);
        history.write_acked(three, false).unwrap();
        assert!(read(&mut history, three).is_ok());
        assert!(read(&mut history, one).is_err(), "overwritten since");
    }

    #[test]
    fn a_new_history_has_what_its_replica_had_or_was_writing() {
        let made = |contents: &[WriteNo]| {
            let mut history = History::default();
            let one = history.begin_write(BLOCK, false);
            history.write_acked(one, true).unwrap();
            let two = history.begin_write(BLOCK, false);
            history.write_acked(two, true).unwrap();
            let contents: Vec<_> = contents.iter().map(|it| [*it; SECTORS_PER_BLOCK]).collect();
            history.restart(|_| contents.clone());
            history
        };
        let (zero, one, two) = (WriteNo::ZERO, WriteNo(1), WriteNo(2));
        let mut history = made(&[one]);
        assert!(read(&mut history, two).is_err(), "of the other history");
        assert!(read(&mut history, one).is_ok());
        let mut history = made(&[one, two]);
        assert!(read(&mut history, zero).is_err(), "nobody was writing it");
        assert!(read(&mut history, two).is_ok());
        assert!(read(&mut history, one).is_err(), "flip-flop");
    }

    #[test]
    fn a_second_loss_may_take_what_was_read_but_not_flushed() {
        for flushed in [false, true] {
            let mut history = History::default();
            let one = history.begin_write(BLOCK, false);
            history.write_acked(one, false).unwrap();
            let lost = history.tick();
            history.cut(lost);
            assert!(read(&mut history, one).is_ok());
            if flushed {
                let invoked = history.tick();
                history.flush_acked(invoked);
            }
            let lost = history.tick();
            history.cut(lost);
            assert_eq!(read(&mut history, WriteNo::ZERO).is_err(), flushed);
        }
    }

    #[test]
    fn a_write_after_the_loss_survives_the_cut() {
        let mut history = History::default();
        let lost = history.tick();
        let one = history.begin_write(BLOCK, false);
        history.write_acked(one, false).unwrap();
        history.cut(lost);
        assert!(read(&mut history, WriteNo::ZERO).is_err());
    }
}
