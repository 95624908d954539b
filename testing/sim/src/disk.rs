//! A disk with a volatile cache: byte-accurate, slow, and as mean as real ones at a power loss.
//!
//! Owned by a simulated node, used by its effects. What the rules are (io.rs of the engine):
//! operations under way are not ordered; only a completed flush orders, and it covers the
//! operations that had completed when it was submitted. What we make of it:
//!
//! * a write takes effect when it completes; a read that overlaps a write under way sees an
//!   arbitrary mix of sectors;
//! * a process crash leaves what completed, and of each write under way nothing, all or some
//!   sectors;
//! * a power loss leaves of each sector any of: its durable content, any content that was written
//!   since, completed or under way;
//! * a failed write or flush did some of it, and what it did not make durable is never made
//!   durable by a later flush (the lesson of the fsync studies).

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use relevo_replication::{DiskError, DiskOp, DiskOpKind, DiskReply, OpId};
use relevo_types::{BLOCK_SIZE, BlockRange, ByteRange};

use crate::{rng::Rng, stamp::SECTOR};

const PAGE: usize = 4096;
const SECTOR_U64: u64 = SECTOR as u64;

const ZEROES: [u8; PAGE] = [0; PAGE];

/// What reads of many pages give where nothing was written: it need not be made each time.
static ZERO_PAGES: [u8; 64 * PAGE] = [0; 64 * PAGE];

/// Bytes by pages of [`PAGE`] bytes, `None` where all are zero, as is what is behind the last one. A page that was
/// written whole shares the memory of the write: most of what a run does with blocks copies nothing.
#[derive(Clone, Debug, Default)]
struct Pages(Vec<Option<Bytes>>);

/// Content that was written somewhere.
#[derive(Clone, Debug)]
struct Change {
    offset: u64,
    /// `None`: zeroes.
    data: Option<Bytes>,
    len: u64,
}

#[derive(Debug)]
struct InFlight {
    kind: DiskOpKind,
    /// For a flush: it covers the completions numbered below this.
    covers: u64,
}

/// A simulated disk.
#[derive(Debug)]
pub struct Disk {
    size: u64,
    /// What a read gives.
    view: Pages,
    /// What a power loss leaves for certain.
    durable: Pages,
    /// Completed and not covered by a completed flush, oldest first.
    unflushed: VecDeque<(u64, Change)>,
    completions: u64,
    in_flight: BTreeMap<OpId, InFlight>,
    /// A flush failed: the view may show what no flush will make durable.
    flush_failed: bool,
}

impl Disk {
    /// An empty disk of so many bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            view: Pages::default(),
            durable: Pages::default(),
            unflushed: VecDeque::new(),
            completions: 0,
            in_flight: BTreeMap::new(),
            flush_failed: false,
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether a flush failed since power came up.
    #[must_use]
    pub const fn flush_failed(&self) -> bool {
        self.flush_failed
    }

    /// Writes something durably, outside of any operation: how a backing is created.
    pub fn install(&mut self, offset: u64, data: &Bytes) {
        let change = Change {
            offset,
            len: data.len() as u64,
            data: Some(data.clone()),
        };
        self.view.apply(&change);
        self.durable.apply(&change);
    }

    /// Takes an operation.
    ///
    /// # Errors
    /// What is wrong with it: the engine broke the rules of its border.
    pub fn submit(&mut self, op: DiskOp) -> Result<(), String> {
        let range = span(&op.kind);
        if let Some(range) = range {
            let aligned =
                range.offset.is_multiple_of(SECTOR_U64) && range.len.is_multiple_of(SECTOR_U64);
            if !aligned || range.len == 0 || range.checked_end().is_none_or(|end| end > self.size) {
                return Err(format!(
                    "{:?} at {range:?} is not aligned or outside",
                    op.op
                ));
            }
            if changes(&op.kind)
                && let Some((other, _)) = self.in_flight.iter().find(|(_, other)| {
                    changes(&other.kind) && span(&other.kind).is_some_and(|r| r.overlaps(&range))
                })
            {
                return Err(format!(
                    "{:?} at {range:?} overlaps {other:?}, a write still under way: which one wins is undefined",
                    op.op
                ));
            }
        }
        let entry = InFlight {
            kind: op.kind,
            covers: self.completions,
        };
        match self.in_flight.insert(op.op, entry) {
            None => Ok(()),
            Some(_) => Err(format!("{:?} is under way already", op.op)),
        }
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// What an operation under way does, `None` when there is none of that number.
    #[must_use]
    pub fn kind(&self, op: OpId) -> Option<&DiskOpKind> {
        self.in_flight.get(&op).map(|entry| &entry.kind)
    }

    /// Ends an operation well. `None` when it is not under way (a crash took it).
    pub fn complete(&mut self, op: OpId, rng: &mut Rng) -> Option<DiskReply> {
        let entry = self.in_flight.remove(&op)?;
        Some(match entry.kind {
            DiskOpKind::Read(range) => DiskReply::Data(self.read(range, rng)),
            DiskOpKind::Flush => {
                while self
                    .unflushed
                    .front()
                    .is_some_and(|(number, _)| *number < entry.covers)
                {
                    if let Some((_, change)) = self.unflushed.pop_front() {
                        self.durable.apply(&change);
                    }
                }
                DiskReply::Done
            }
            kind => {
                if let Some(change) = change(&kind) {
                    self.view.apply(&change);
                    self.unflushed.push_back((self.completions, change));
                    self.completions += 1;
                }
                DiskReply::Done
            }
        })
    }

    /// Ends an operation with an error. `None` when it is not under way.
    pub fn fail(&mut self, op: OpId, rng: &mut Rng) -> Option<DiskError> {
        let entry = self.in_flight.remove(&op)?;
        let what = match &entry.kind {
            DiskOpKind::Read(_) => "read",
            DiskOpKind::Write { .. } => "write",
            DiskOpKind::Zero(_) => "zero",
            DiskOpKind::Flush => "flush",
        };
        if let Some(change) = change(&entry.kind) {
            let parts = torn(&change, rng);
            for part in parts {
                self.view.apply(&part);
                self.unflushed.push_back((self.completions, part));
                self.completions += 1;
            }
        }
        if entry.kind == DiskOpKind::Flush {
            self.flush_failed = true;
            // The pages count as clean from now on: what did not make it never will.
            let lost = std::mem::take(&mut self.unflushed);
            for (number, change) in lost {
                if number >= entry.covers {
                    self.unflushed.push_back((number, change));
                } else if rng.chance(50.0) {
                    self.durable.apply(&change);
                }
            }
        }
        Some(DiskError {
            what,
            reason: "Input/output error (simulated)".to_owned(),
        })
    }

    /// The process that used the disk is gone.
    pub fn crash_process(&mut self, rng: &mut Rng) {
        for (_, entry) in std::mem::take(&mut self.in_flight) {
            if let Some(change) = change(&entry.kind) {
                for part in torn(&change, rng) {
                    self.view.apply(&part);
                    self.unflushed.push_back((self.completions, part));
                    self.completions += 1;
                }
            }
        }
    }

    /// The power is gone.
    pub fn lose_power(&mut self, rng: &mut Rng) {
        let mut candidates: BTreeMap<u64, Vec<(usize, u64)>> = BTreeMap::new();
        let mut pending: Vec<Change> = self.unflushed.drain(..).map(|(_, change)| change).collect();
        pending.extend(
            std::mem::take(&mut self.in_flight)
                .values()
                .filter_map(|entry| change(&entry.kind)),
        );
        for (index, change) in pending.iter().enumerate() {
            for at in (change.offset..change.offset + change.len).step_by(SECTOR) {
                candidates
                    .entry(at)
                    .or_default()
                    .push((index, at - change.offset));
            }
        }
        // Some disks lose everything, some almost nothing, most a part.
        let keep = rng.pick(&[0.0, 20.0, 50.0, 80.0, 100.0]);
        for (at, versions) in candidates {
            if !rng.chance(keep) {
                continue;
            }
            let (index, skip) = if rng.chance(60.0) {
                versions[versions.len() - 1]
            } else {
                rng.pick(&versions)
            };
            let source = &pending[index];
            let skip = usize::try_from(skip).unwrap_or(0);
            self.durable.apply(&Change {
                offset: at,
                len: SECTOR_U64,
                data: source
                    .data
                    .as_ref()
                    .map(|data| data.slice(skip..skip + SECTOR)),
            });
        }
        self.view = self.durable.clone();
        self.flush_failed = false;
    }

    /// What a read of a block gives now; `None`: zeroes.
    #[must_use]
    pub fn block(&self, block: u64) -> Option<&Bytes> {
        self.view.page(block)
    }

    /// The writes under way that touch blocks below `end`: where, and the bytes (`None`: zeroes).
    pub fn under_way_below(&self, end: u64) -> impl Iterator<Item = (BlockRange, Option<Bytes>)> {
        let changes = self.in_flight.values().filter_map(|it| change(&it.kind));
        let blocks =
            |change: &Change| BlockRange::new(change.offset / BLOCK_SIZE, change.len / BLOCK_SIZE);
        changes
            .map(move |change| (blocks(&change), change.data))
            .filter(move |(blocks, _)| blocks.first < end)
    }

    /// What a power loss leaves of a block for certain; `None`: zeroes.
    #[must_use]
    pub fn durable_block(&self, block: u64) -> Option<&Bytes> {
        self.durable.page(block)
    }

    /// What a read of a range gives now, for checkers that read metadata.
    #[must_use]
    pub fn view_bytes(&self, range: ByteRange) -> Bytes {
        self.view.read(range)
    }

    /// The blocks below `end` that are not all zeroes.
    pub fn blocks_below(&self, end: u64) -> impl Iterator<Item = u64> + '_ {
        let pages = (0..end).zip(&self.view.0);
        pages.filter_map(|(block, page)| page.is_some().then_some(block))
    }

    /// The blocks below `end` in which reads of two disks differ.
    pub fn differing<'a>(&'a self, other: &'a Self, end: u64) -> impl Iterator<Item = u64> + 'a {
        (0..end).filter(|block| match (self.block(*block), other.block(*block)) {
            (None, None) => false,
            // What two replicas have of one write is one place in memory, seldom two.
            (Some(one), Some(two)) => one.as_ptr() != two.as_ptr() && one != two,
            _ => true,
        })
    }

    fn read(&self, range: ByteRange, rng: &mut Rng) -> Bytes {
        let bytes = self.view.read(range);
        let overlaps =
            |kind: &DiskOpKind| changes(kind) && span(kind).is_some_and(|r| r.overlaps(&range));
        let mut under_way = self
            .in_flight
            .values()
            .filter(|entry| overlaps(&entry.kind))
            .peekable();
        if under_way.peek().is_none() {
            return bytes;
        }
        let mut bytes = Vec::from(bytes);
        for change in under_way.filter_map(|entry| change(&entry.kind)) {
            for part in torn(&change, rng) {
                part.copy_into(range.offset, &mut bytes);
            }
        }
        bytes.into()
    }
}

impl Pages {
    fn page(&self, number: u64) -> Option<&Bytes> {
        let page = self.0.get(usize::try_from(number).ok()?)?;
        page.as_ref()
    }

    fn set(&mut self, number: u64, page: Option<Bytes>) {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        if index >= self.0.len() {
            if page.is_none() {
                return;
            }
            self.0.resize_with(index + 1, || None);
        }
        self.0[index] = page;
    }

    fn apply(&mut self, change: &Change) {
        let mut at = change.offset;
        let end = change.offset + change.len;
        while at < end {
            let number = at / PAGE as u64;
            let within = usize::try_from(at % PAGE as u64).unwrap_or(0);
            let len = (PAGE - within).min(usize::try_from(end - at).unwrap_or(PAGE));
            let skip = usize::try_from(at - change.offset).unwrap_or(0);
            let page = match &change.data {
                Some(data) if len == PAGE => Some(data.slice(skip..skip + len)),
                None if len == PAGE => None,
                part => {
                    let page = self.page(number);
                    let mut page = page.map_or(&ZEROES[..], |page| page).to_vec();
                    match part {
                        Some(data) => {
                            page[within..within + len].copy_from_slice(&data[skip..skip + len])
                        }
                        None => page[within..within + len].fill(0),
                    }
                    Some(page.into())
                }
            };
            // A page of zeroes is none: a resync of untouched regions stays cheap, and the same content is the
            // same pages.
            self.set(number, page.filter(|page| !is_zero(page)));
            at += len as u64;
        }
    }

    fn read(&self, range: ByteRange) -> Bytes {
        let len = usize::try_from(range.len).unwrap_or(0);
        let number = range.offset / PAGE as u64;
        let within = usize::try_from(range.offset % PAGE as u64).unwrap_or(0);
        if within + len <= PAGE {
            let page = self.page(number);
            return page
                .map_or(Bytes::from_static(&ZEROES), Bytes::clone)
                .slice(within..within + len);
        }
        let numbers = number..range.end().div_ceil(PAGE as u64);
        let mut pages = numbers.map(|number| self.page(number));
        if len <= ZERO_PAGES.len() && pages.clone().all(|page| page.is_none()) {
            return Bytes::from_static(&ZERO_PAGES[..len]);
        }
        let mut bytes = Vec::with_capacity(len + PAGE);
        if let Some(first) = pages.next() {
            bytes.extend_from_slice(&first.map_or(&ZEROES[..], |page| page)[within..]);
        }
        for page in pages {
            bytes.extend_from_slice(page.map_or(&ZEROES[..], |page| page));
        }
        bytes.truncate(len);
        bytes.into()
    }
}

impl Change {
    /// Puts the bytes of this change that fall on a buffer beginning at `start` there.
    fn copy_into(&self, start: u64, buffer: &mut [u8]) {
        match &self.data {
            Some(data) => overlay(self.offset, data, start, buffer),
            None => {
                let zeroes = vec![0; usize::try_from(self.len).unwrap_or(0)];
                overlay(self.offset, &zeroes, start, buffer);
            }
        }
    }
}

/// Copies what two runs of bytes have in common, by their offsets, from the first to the second.
fn overlay(from_offset: u64, from: &[u8], to_offset: u64, to: &mut [u8]) {
    let first = from_offset.max(to_offset);
    let end = (from_offset + from.len() as u64).min(to_offset + to.len() as u64);
    if first < end {
        let index = |at: u64, origin: u64| usize::try_from(at - origin).unwrap_or(0);
        to[index(first, to_offset)..index(end, to_offset)]
            .copy_from_slice(&from[index(first, from_offset)..index(end, from_offset)]);
    }
}

fn span(kind: &DiskOpKind) -> Option<ByteRange> {
    match kind {
        DiskOpKind::Read(range) | DiskOpKind::Zero(range) => Some(*range),
        DiskOpKind::Write { offset, data } => Some(ByteRange::new(*offset, data.len() as u64)),
        DiskOpKind::Flush => None,
    }
}

const fn changes(kind: &DiskOpKind) -> bool {
    matches!(kind, DiskOpKind::Write { .. } | DiskOpKind::Zero(_))
}

fn change(kind: &DiskOpKind) -> Option<Change> {
    match kind {
        DiskOpKind::Write { offset, data } => Some(Change {
            offset: *offset,
            len: data.len() as u64,
            data: Some(data.clone()),
        }),
        DiskOpKind::Zero(range) => Some(Change {
            offset: range.offset,
            len: range.len,
            data: None,
        }),
        DiskOpKind::Read(_) | DiskOpKind::Flush => None,
    }
}

/// Whether a page is all zeroes.
fn is_zero(page: &[u8]) -> bool {
    page == ZEROES
}

/// What became of a write that was cut short: nothing, all, or some of its sectors.
fn torn(change: &Change, rng: &mut Rng) -> Vec<Change> {
    match rng.below(3) {
        0 => Vec::new(),
        1 => vec![change.clone()],
        _ => (change.offset..change.offset + change.len)
            .step_by(SECTOR)
            .filter_map(|at| {
                let skip = usize::try_from(at - change.offset).unwrap_or(0);
                rng.chance(50.0).then(|| Change {
                    offset: at,
                    len: SECTOR_U64,
                    data: change
                        .data
                        .as_ref()
                        .map(|data| data.slice(skip..skip + SECTOR)),
                })
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(op: u64, offset: u64, byte: u8) -> DiskOp {
        DiskOp {
            op: OpId(op),
            kind: DiskOpKind::Write {
                offset,
                data: vec![byte; PAGE].into(),
            },
        }
    }

    fn flush(op: u64) -> DiskOp {
        DiskOp {
            op: OpId(op),
            kind: DiskOpKind::Flush,
        }
    }

    #[test]
    fn a_flush_covers_what_completed_before_it_was_submitted() {
        let mut covered = 0;
        for seed in 0..50 {
            let mut rng = Rng::new(seed, 0);
            let mut disk = Disk::new(1 << 20);
            disk.submit(write(1, 0, 1)).unwrap();
            disk.complete(OpId(1), &mut rng).unwrap();
            disk.submit(write(2, 4096, 2)).unwrap();
            disk.submit(flush(3)).unwrap();
            disk.complete(OpId(2), &mut rng).unwrap();
            disk.complete(OpId(3), &mut rng).unwrap();
            disk.lose_power(&mut rng);
            assert_eq!(disk.block(0).map(|page| &page[..]), Some(&[1; PAGE][..]));
            covered += usize::from(disk.block(1).is_some_and(|page| page[..] == [2; PAGE]));
        }
        assert!(
            (1..50).contains(&covered),
            "never or always durable: {covered}"
        );
    }

    #[test]
    fn overlapping_writes_under_way_are_refused() {
        let mut disk = Disk::new(1 << 20);
        disk.submit(write(1, 0, 1)).unwrap();
        assert!(
            disk.submit(write(2, 512, 1))
                .unwrap_err()
                .contains("overlaps")
        );
        assert!(
            disk.submit(write(3, 1 << 20, 1))
                .unwrap_err()
                .contains("outside")
        );
    }

    #[test]
    fn a_failed_flush_is_not_made_good_by_the_next() {
        let mut lost = 0;
        for seed in 0..50 {
            let mut rng = Rng::new(seed, 0);
            let mut disk = Disk::new(1 << 20);
            disk.submit(write(1, 0, 1)).unwrap();
            disk.complete(OpId(1), &mut rng).unwrap();
            disk.submit(flush(2)).unwrap();
            disk.fail(OpId(2), &mut rng).unwrap();
            disk.submit(flush(3)).unwrap();
            disk.complete(OpId(3), &mut rng).unwrap();
            assert_eq!(
                disk.block(0).map(|page| &page[..]),
                Some(&[1; PAGE][..]),
                "the cache still shows it"
            );
            disk.lose_power(&mut rng);
            lost += usize::from(disk.block(0).is_none());
        }
        assert!(lost > 0);
    }

    #[test]
    fn a_crash_tears_what_is_under_way() {
        let mut kinds = [false; 3];
        for seed in 0..50 {
            let mut rng = Rng::new(seed, 0);
            let mut disk = Disk::new(1 << 20);
            disk.submit(write(1, 0, 1)).unwrap();
            disk.crash_process(&mut rng);
            let ones = disk
                .block(0)
                .map_or(0, |page| page.iter().filter(|b| **b == 1).count());
            kinds[match ones {
                0 => 0,
                PAGE => 2,
                _ => 1,
            }] = true;
        }
        assert_eq!(kinds, [true; 3]);
    }
}
