//! Everything that the metadata of a backing says, for a person: also what is damaged.
//!
//! Unlike an attach this refuses nothing: what can't be read or believed is described, and the rest
//! is read all the same. Nothing is written.

use relevo_types::{BlockRange, ByteRange, ReplicaSlot};

use crate::{
    Layout, META_BLOCK, Superblock, SuperblockError,
    activity::{self, Recovered},
    bitmap::{self, Copies, PageId},
    superblock::read_slot,
};

/// Runs of dirty blocks that are named; of more there is a count.
pub const RUNS_NAMED: usize = 16;

/// Bytes of one read; a multiple of two blocks, so that both copies of a page are in one.
const CHUNK: u64 = 1 << 20;

/// What the metadata says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dump {
    /// What the two superblock slots hold, or why they hold nothing.
    pub slots: [Result<Superblock, String>; 2],
    /// Which of them is in force.
    pub in_force: Option<usize>,
    /// The activity log; `None` when no superblock tells where it is.
    pub activity: Option<Recovered>,
    /// The bitmaps in use, by slot.
    pub bitmaps: Vec<SlotBitmap>,
    /// What else is wrong.
    pub problems: Vec<String>,
}

/// The bitmap of one replica slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotBitmap {
    /// Whose blocks: the replica of this slot may lack them.
    pub slot: ReplicaSlot,
    /// Dirty blocks; those of damaged pages are.
    pub dirty: u64,
    /// Runs of dirty blocks.
    pub runs: u64,
    /// The first [`RUNS_NAMED`] of them.
    pub first_runs: Vec<BlockRange>,
    /// Pages that were ever written.
    pub pages_written: u64,
    /// Pages of which a copy is damaged, so that all their blocks count as dirty.
    pub pages_damaged: u64,
    /// The highest generation of a page.
    pub generation: u64,
}

impl SlotBitmap {
    fn new(slot: ReplicaSlot) -> Self {
        Self {
            slot,
            dirty: 0,
            runs: 0,
            first_runs: Vec::new(),
            pages_written: 0,
            pages_damaged: 0,
            generation: 0,
        }
    }
}

impl Dump {
    /// Reads the metadata of a backing of that many bytes. `read` gives exactly the bytes of a range,
    /// or why it can't.
    pub fn read(
        backing_size: u64,
        mut read: impl FnMut(ByteRange) -> Result<Vec<u8>, String>,
    ) -> Self {
        let mut reader = Reader {
            read: &mut read,
            problems: Vec::new(),
        };
        let nothing = |why: &str| Err(why.to_owned());
        let mut dump = Self {
            slots: [nothing("it was not read"), nothing("it was not read")],
            in_force: None,
            activity: None,
            bitmaps: Vec::new(),
            problems: Vec::new(),
        };
        let Some(area) = Layout::superblocks(backing_size) else {
            dump.problems.push(format!(
                "a backing of {backing_size} bytes has no room for superblocks"
            ));
            return dump;
        };
        for (index, parity) in (0..2).zip(0u64..) {
            let offset = area.offset + parity * META_BLOCK as u64;
            // One by one: an unreadable sector must not hide the other slot.
            dump.slots[index] =
                (reader.read)(ByteRange::new(offset, META_BLOCK as u64)).and_then(|block| {
                    read_slot(&block, parity).map_err(|error: SuperblockError| error.to_string())
                });
        }
        dump.in_force = match &dump.slots {
            [Ok(even), Ok(odd)] => Some(usize::from(odd.generation > even.generation)),
            [Ok(_), Err(_)] => Some(0),
            [Err(_), Ok(_)] => Some(1),
            [Err(_), Err(_)] => None,
        };
        let Some(superblock) = dump.superblock().cloned() else {
            dump.problems
                .push("no superblock is usable: the rest can't be found".to_owned());
            return dump;
        };
        let layout = superblock.layout;
        let whole = backing_size / META_BLOCK as u64 * META_BLOCK as u64;
        if layout.backing_size() != whole {
            // Nothing is where it says; and a size that was made up must not be read through.
            dump.problems.push(format!(
                "the metadata was written for a backing of {} bytes, this one has {backing_size}: the activity log and the bitmaps were not looked for",
                layout.backing_size()
            ));
            return dump;
        }
        let tag = superblock.replica.identity.tag();
        let ring = reader.bytes(
            "the activity log",
            layout.activity_ring(),
            META_BLOCK as u64,
        );
        let activity = activity::recover(&ring, tag);
        if activity.valid == 0 {
            dump.problems.push(
                "the activity log has no valid transaction: after an unclean end every block is uncertain"
                    .to_owned(),
            );
        }
        dump.activity = Some(activity);
        let used = (0..7).map(ReplicaSlot);
        for slot in used.filter(|slot| superblock.slots_used & (1 << slot.0) != 0) {
            let bitmap = reader.bitmap(&layout, slot, tag);
            if bitmap.pages_damaged > 0 {
                dump.problems.push(format!(
                    "{} pages of bitmap {} are damaged: all their blocks are taken for dirty",
                    bitmap.pages_damaged, slot.0
                ));
            }
            dump.bitmaps.push(bitmap);
        }
        dump.problems.append(&mut reader.problems);
        dump
    }

    /// The superblock in force.
    #[must_use]
    pub fn superblock(&self) -> Option<&Superblock> {
        self.slots.get(self.in_force?)?.as_ref().ok()
    }

    /// Blocks that the next attach takes for uncertain because of the activity log: none after a clean
    /// end.
    #[must_use]
    pub fn uncertain_blocks(&self) -> u64 {
        let (Some(superblock), Some(activity)) = (self.superblock(), &self.activity) else {
            return 0;
        };
        if superblock.blank || (!superblock.clean && activity.valid == 0) {
            return superblock.layout.data_blocks();
        }
        if superblock.clean {
            return 0;
        }
        let mut regions = activity.regions.clone();
        regions.sort_unstable();
        regions.dedup();
        let blocks = regions
            .iter()
            .map(|region| superblock.layout.region_blocks(*region).count);
        blocks.sum()
    }
}

struct Reader<'a, R> {
    read: &'a mut R,
    problems: Vec<String>,
}

impl<R: FnMut(ByteRange) -> Result<Vec<u8>, String>> Reader<'_, R> {
    /// The bytes of a range; what can't be read is no valid block of anything.
    fn bytes(&mut self, what: &str, range: ByteRange, step: u64) -> Vec<u8> {
        if let Ok(bytes) = (self.read)(range)
            && bytes.len() as u64 == range.len
        {
            return bytes;
        }
        let mut all = Vec::new();
        let mut unreadable = 0u64;
        let mut why = String::new();
        let mut offset = range.offset;
        while offset < range.end() {
            let len = step.min(range.end() - offset);
            match (self.read)(ByteRange::new(offset, len)) {
                Ok(bytes) if bytes.len() as u64 == len => all.extend(bytes),
                other => {
                    unreadable += len;
                    why = other.err().unwrap_or_else(|| "it is short".to_owned());
                    let end = all.len() + usize::try_from(len).unwrap_or(0);
                    all.resize(end, 0xff);
                }
            }
            offset += len;
        }
        if unreadable > 0 {
            self.problems
                .push(format!("{unreadable} bytes of {what} can't be read: {why}"));
        }
        all
    }

    fn bitmap(&mut self, layout: &Layout, slot: ReplicaSlot, tag: u32) -> SlotBitmap {
        let mut bitmap = SlotBitmap::new(slot);
        let mut run = BlockRange::new(0, 0);
        let area = layout.bitmap_of(slot);
        let pair = 2 * META_BLOCK as u64;
        let what = format!("bitmap {}", slot.0);
        let mut offset = area.offset;
        let mut page = 0;
        while offset < area.end() {
            let len = CHUNK.min(area.end() - offset);
            let chunk = self.bytes(&what, ByteRange::new(offset, len), pair);
            for copies in chunk.chunks(2 * META_BLOCK) {
                bitmap.add(layout, page, tag, copies, &mut run);
                page += 1;
            }
            offset += len;
        }
        bitmap.end_run(run);
        bitmap
    }
}

impl SlotBitmap {
    fn add(&mut self, layout: &Layout, page: u32, tag: u32, copies: &[u8], run: &mut BlockRange) {
        let first = u64::from(page) * bitmap::BLOCKS_PER_PAGE;
        let end = (first + bitmap::BLOCKS_PER_PAGE).min(layout.data_blocks());
        let id = PageId {
            slot: self.slot,
            page,
        };
        match bitmap::read(id, tag, copies) {
            Copies::Blank => {}
            Copies::Valid { generation, words } => {
                self.pages_written += 1;
                self.generation = self.generation.max(generation);
                for (word, at) in words.iter().zip((first..).step_by(64)) {
                    self.add_word(*word, at, end, run);
                }
            }
            Copies::Damaged { generation } => {
                self.pages_written += 1;
                self.pages_damaged += 1;
                self.generation = self.generation.max(generation);
                self.add_run(first, end.saturating_sub(first), run);
            }
        }
    }

    fn add_word(&mut self, mut word: u64, first: u64, end: u64, run: &mut BlockRange) {
        while word != 0 {
            let skip = word.trailing_zeros();
            let count = (word >> skip).trailing_ones();
            let at = first + u64::from(skip);
            // Bits beyond the volume mean nothing.
            let inside = end.saturating_sub(at).min(u64::from(count));
            self.add_run(at, inside, run);
            let done = skip + count;
            word = if done >= 64 { 0 } else { word >> done << done };
        }
    }

    fn add_run(&mut self, first: u64, count: u64, run: &mut BlockRange) {
        if count == 0 {
            return;
        }
        self.dirty += count;
        if run.count > 0 && run.end() == first {
            run.count += count;
        } else {
            self.end_run(*run);
            *run = BlockRange::new(first, count);
        }
    }

    fn end_run(&mut self, run: BlockRange) {
        if run.count > 0 {
            self.runs += 1;
            if self.first_runs.len() < RUNS_NAMED {
                self.first_runs.push(run);
            }
        }
    }
}
