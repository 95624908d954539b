//! Reading the metadata: superblocks first, then the activity log and the bitmaps in use.

use std::collections::VecDeque;

use bytes::Bytes;
use relevo_format::{
    Found, Identity, Layout, META_BLOCK, Superblock,
    activity::{self as log, Recovered},
    bitmap::{self, Copies, PageId},
    read_superblocks,
};
use relevo_types::{BlockRange, ByteRange, ReplicaSlot};

use crate::{
    activity::Activity,
    bitmap::Bitmaps,
    io::{DiskOpKind, EngineConfig},
    machine::slots_of,
    metadata::Metadata,
    ops::{Cx, OpUse, Ops},
};

/// Bytes of one metadata read; a multiple of two blocks, so that both copies of a page are in one.
const CHUNK: u64 = 1 << 20;

/// Metadata reads under way at once.
const READS_MAX: usize = 4;

/// An attach under way.
#[derive(Debug)]
pub(crate) struct Attach {
    superblock: Option<Found>,
    ring: Option<Recovered>,
    bitmaps: Bitmaps,
    damaged_pages: u64,
    parts: Vec<Part>,
    queue: VecDeque<usize>,
    under_way: usize,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    range: ByteRange,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Superblocks,
    Ring,
    Pages { slot: ReplicaSlot, first: u32 },
}

/// The metadata is read.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) meta: Metadata,
    /// It was detached in order.
    pub(crate) clean: bool,
    /// Nothing acknowledged can be missing.
    pub(crate) certain: bool,
    /// The bitmaps changed by what was found and must be durable before anything else.
    pub(crate) must_save: bool,
    pub(crate) remark: Option<String>,
}

impl Attach {
    /// Starts to read.
    ///
    /// # Errors
    /// The backing is too small to hold metadata.
    pub(crate) fn begin(
        cx: &mut Cx<'_>,
        ops: &mut Ops,
        config: &EngineConfig,
    ) -> Result<Self, String> {
        let range = Layout::superblocks(config.backing_size).ok_or_else(|| {
            format!(
                "the backing has only {} bytes: no replica can be on it; check that the right file or device is configured",
                config.backing_size
            )
        })?;
        let mut attach = Self {
            superblock: None,
            ring: None,
            bitmaps: Bitmaps::default(),
            damaged_pages: 0,
            parts: vec![Part {
                range,
                what: What::Superblocks,
            }],
            queue: VecDeque::from([0]),
            under_way: 0,
        };
        attach.pump(cx, ops);
        Ok(attach)
    }

    fn pump(&mut self, cx: &mut Cx<'_>, ops: &mut Ops) {
        while self.under_way < READS_MAX
            && let Some(index) = self.queue.pop_front()
            && let Some(part) = self.parts.get(index)
        {
            self.under_way += 1;
            ops.start(cx, DiskOpKind::Read(part.range), OpUse::Attach(index));
        }
    }

    /// A part was read. `Some` when everything is.
    ///
    /// # Errors
    /// Why the replica can't be attached, and what to do.
    pub(crate) fn part_read(
        &mut self,
        cx: &mut Cx<'_>,
        ops: &mut Ops,
        config: &EngineConfig,
        index: usize,
        data: &Bytes,
    ) -> Result<Option<Loaded>, String> {
        self.under_way = self.under_way.saturating_sub(1);
        let Some(part) = self.parts.get(index).copied() else {
            return Ok(None);
        };
        if data.len() as u64 != part.range.len {
            return Err(format!(
                "a read of {:?} gave {} bytes; the backing is shorter than it was",
                part.range,
                data.len()
            ));
        }
        let tag = self.tag(config);
        match part.what {
            What::Superblocks => self.superblocks_read(config, data)?,
            What::Ring => self.ring = Some(log::recover(data, tag)),
            What::Pages { slot, first } => self.pages_read(slot, first, tag, data),
        }
        self.pump(cx, ops);
        if self.under_way > 0 || !self.queue.is_empty() {
            return Ok(None);
        }
        self.finish().map(Some)
    }

    fn tag(&self, config: &EngineConfig) -> u32 {
        identity(config).tag()
    }

    fn superblocks_read(&mut self, config: &EngineConfig, data: &Bytes) -> Result<(), String> {
        let found = read_superblocks(data).map_err(|(first, second)| {
            format!(
                "both superblocks are unusable: of the first {first}, of the second {second}. The replica is not touched. If its data is lost, remove the replica and create it anew: it is then copied from the others"
            )
        })?;
        let superblock = &found.superblock;
        check_identity(superblock, config)?;
        let layout = superblock.layout;
        let whole = config.backing_size / META_BLOCK as u64 * META_BLOCK as u64;
        if layout.backing_size() != whole {
            return Err(format!(
                "the metadata was written for a backing of {} bytes, this one has {}; restore its size",
                layout.backing_size(),
                config.backing_size
            ));
        }
        self.parts.push(Part {
            range: layout.activity_ring(),
            what: What::Ring,
        });
        for slot in slots_of(superblock.slots_used) {
            let area = layout.bitmap_of(slot);
            let mut offset = area.offset;
            while offset < area.end() {
                let len = CHUNK.min(area.end() - offset);
                let page = (offset - area.offset) / (2 * META_BLOCK as u64);
                let first = u32::try_from(page).unwrap_or(u32::MAX);
                self.parts.push(Part {
                    range: ByteRange::new(offset, len),
                    what: What::Pages { slot, first },
                });
                offset += len;
            }
        }
        self.queue.extend(1..self.parts.len());
        self.superblock = Some(found);
        Ok(())
    }

    fn pages_read(&mut self, slot: ReplicaSlot, first: u32, tag: u32, data: &Bytes) {
        let blocks = self
            .superblock
            .as_ref()
            .map_or(0, |found| found.superblock.layout.data_blocks());
        for (page, copies) in (first..).zip(data.chunks(2 * META_BLOCK)) {
            let id = PageId { slot, page };
            match bitmap::read(id, tag, copies) {
                Copies::Blank => {}
                Copies::Valid { generation, words } => self.bitmaps.load(id, generation, words),
                Copies::Damaged { generation } => {
                    self.damaged_pages += 1;
                    self.bitmaps.load_damaged(id, generation, blocks);
                }
            }
        }
    }

    fn finish(&mut self) -> Result<Loaded, String> {
        let (Some(found), Some(ring)) = (self.superblock.take(), self.ring.take()) else {
            return Err("the metadata could not be read".to_owned());
        };
        let mut superblock = found.superblock;
        let layout = superblock.layout;
        let mut bitmaps = std::mem::take(&mut self.bitmaps);
        let mut remarks: Vec<String> = found.remark.into_iter().collect();
        let clean = superblock.clean;
        if !clean {
            let mut uncertain: Vec<BlockRange> = ring
                .regions
                .iter()
                .map(|region| layout.region_blocks(*region))
                .collect();
            if ring.valid == 0 {
                remarks.push("the activity log is unreadable: every block is uncertain".to_owned());
                uncertain = vec![whole(&layout)];
            }
            for slot in slots_of(superblock.slots_used) {
                for blocks in &uncertain {
                    bitmaps.set(slot, *blocks);
                }
            }
        }
        if superblock.blank {
            // From here on the bitmap says it; it is saved before the superblock is.
            bitmaps.set(superblock.replica.slot, whole(&layout));
            superblock.blank = false;
        }
        if self.damaged_pages > 0 {
            remarks.push(format!(
                "{} bitmap pages are damaged: their blocks are taken for dirty",
                self.damaged_pages
            ));
        }
        let certain = clean && superblock.certain && self.damaged_pages == 0;
        let activity = Activity::after(ring.number);
        Ok(Loaded {
            must_save: !clean || bitmaps.has_unsaved(),
            meta: Metadata::new(superblock, bitmaps, activity),
            clean,
            certain,
            remark: (!remarks.is_empty()).then(|| remarks.join("; ")),
        })
    }
}

/// Every block of a volume.
pub(crate) fn whole(layout: &Layout) -> BlockRange {
    BlockRange::new(0, layout.data_blocks())
}

fn identity(config: &EngineConfig) -> Identity {
    Identity {
        cluster: config.cluster,
        volume: config.volume,
        node: config.node,
    }
}

fn check_identity(superblock: &Superblock, config: &EngineConfig) -> Result<(), String> {
    let (found, ours) = (superblock.replica.identity, identity(config));
    if found == ours {
        return Ok(());
    }
    Err(format!(
        "the backing belongs to volume {} on node {} of cluster {}, not to volume {} on node {} of cluster {}; check that the right file or device is configured",
        found.volume, found.node, found.cluster, ours.volume, ours.node, ours.cluster
    ))
}
