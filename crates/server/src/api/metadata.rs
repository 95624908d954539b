//! What `dump-md` shows: the metadata on the backing of a replica.

use std::path::PathBuf;

use relevo_format::{Layout, Superblock, dump::Dump};
use relevo_types::{BLOCK_SIZE, ReplicaSlot};
use serde::{Deserialize, Serialize};

/// `GET /v1/volumes/NAME/metadata`: what is on the backing of the answering node's replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MetadataDump {
    /// The volume.
    pub volume: String,
    /// File or device.
    pub backing: PathBuf,
    /// Its size in bytes.
    pub backing_bytes: u64,
    /// What has the replica: `attached`, `detached`, or `no daemon`. While it is attached, what the
    /// daemon has in memory may be ahead of this.
    pub state: String,
    /// The two superblock slots.
    pub superblocks: Vec<SuperblockSlot>,
    /// The superblock in force; `None`: neither slot is usable.
    pub superblock: Option<SuperblockDump>,
    /// The activity log.
    pub activity_log: Option<ActivityLogDump>,
    /// The bitmaps in use.
    pub bitmaps: Vec<BitmapDump>,
    /// What is damaged or can't be read, in words.
    pub problems: Vec<String>,
}

/// A superblock slot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SuperblockSlot {
    /// 0 or 1.
    pub slot: u8,
    /// Its superblock counts.
    pub in_force: bool,
    /// The generation of its superblock; `None`: it is not usable.
    pub generation: Option<u64>,
    /// Why it is not usable.
    pub problem: Option<String>,
}

/// A superblock.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SuperblockDump {
    /// Grows with each write.
    pub generation: u64,
    /// The cluster that the replica belongs to.
    pub cluster: String,
    /// Id of the volume.
    pub volume: String,
    /// Id of the node.
    pub node: String,
    /// The replica's own slot.
    pub slot: u8,
    /// The history that its data belongs to.
    pub lineage: String,
    /// The highest epoch that it has seen.
    pub epoch: u64,
    /// Size of the volume in bytes.
    pub data_bytes: u64,
    /// Detached in order.
    pub clean: bool,
    /// Nothing that was acknowledged can be missing; counts only if clean.
    pub certain: bool,
    /// In the middle of a resync.
    pub inconsistent: bool,
    /// Added to a volume in use and never attached since.
    pub blank: bool,
    /// Slots whose bitmaps are in use.
    pub slots_used: Vec<u8>,
}

/// The activity log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ActivityLogDump {
    /// Number of the newest valid transaction.
    pub transaction: u64,
    /// Its regions: those that may be being written.
    pub regions: Vec<u32>,
    /// Bytes of a region.
    pub region_bytes: u64,
    /// What the next attach will take for uncertain because of it, in bytes; 0 after a clean end.
    pub uncertain_bytes: u64,
    /// Valid transactions in the ring.
    pub valid: usize,
    /// Damaged blocks in the ring.
    pub damaged: usize,
}

/// A bitmap: what the replica of a slot may lack.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BitmapDump {
    /// The slot.
    pub slot: u8,
    /// The node whose replica has it, where known.
    pub node: Option<String>,
    /// It is the replica's own: where it may differ from the others.
    pub own: bool,
    /// Dirty blocks of 4 KiB.
    pub dirty_blocks: u64,
    /// The same in bytes.
    pub dirty_bytes: u64,
    /// Runs of dirty blocks.
    pub runs: u64,
    /// The first of them: first block and count.
    pub first_runs: Vec<(u64, u64)>,
    /// Pages that were ever written.
    pub pages_written: u64,
    /// Damaged pages; all their blocks count as dirty.
    pub pages_damaged: u64,
    /// The highest generation of a page.
    pub generation: u64,
}

impl MetadataDump {
    /// Whether something is damaged or can't be read.
    pub(crate) fn is_damaged(&self) -> bool {
        let log = self.activity_log.as_ref();
        !self.problems.is_empty()
            || log.is_some_and(|log| log.damaged > 0)
            || self.superblocks.iter().any(|slot| slot.problem.is_some())
    }

    /// Puts a dump into words. `node_of` names the node of a replica slot.
    pub(crate) fn new(
        volume: &str,
        backing: PathBuf,
        state: &str,
        (backing_bytes, dump): (u64, Dump),
        node_of: impl Fn(ReplicaSlot) -> Option<String>,
    ) -> Self {
        let own = dump.superblock().map(|superblock| superblock.replica.slot);
        let superblocks = (0..2u8)
            .zip(&dump.slots)
            .map(|(slot, found)| SuperblockSlot {
                slot,
                in_force: dump.in_force == Some(usize::from(slot)),
                generation: found.as_ref().ok().map(|superblock| superblock.generation),
                problem: found.as_ref().err().cloned(),
            });
        let activity_log = dump.activity.as_ref().map(|activity| ActivityLogDump {
            transaction: activity.number,
            regions: activity.regions.iter().map(|region| region.0).collect(),
            region_bytes: Layout::REGION_BLOCKS * BLOCK_SIZE,
            uncertain_bytes: dump.uncertain_blocks() * BLOCK_SIZE,
            valid: activity.valid,
            damaged: activity.damaged,
        });
        let bitmaps = dump.bitmaps.iter().map(|bitmap| BitmapDump {
            slot: bitmap.slot.0,
            node: node_of(bitmap.slot),
            own: own == Some(bitmap.slot),
            dirty_blocks: bitmap.dirty,
            dirty_bytes: bitmap.dirty * BLOCK_SIZE,
            runs: bitmap.runs,
            first_runs: bitmap
                .first_runs
                .iter()
                .map(|run| (run.first, run.count))
                .collect(),
            pages_written: bitmap.pages_written,
            pages_damaged: bitmap.pages_damaged,
            generation: bitmap.generation,
        });
        Self {
            volume: volume.to_owned(),
            backing,
            backing_bytes,
            state: state.to_owned(),
            superblocks: superblocks.collect(),
            superblock: dump.superblock().map(superblock),
            activity_log,
            bitmaps: bitmaps.collect(),
            problems: dump.problems,
        }
    }
}

fn superblock(superblock: &Superblock) -> SuperblockDump {
    let replica = &superblock.replica;
    let used = (0..7).filter(|slot| superblock.slots_used & (1 << slot) != 0);
    SuperblockDump {
        generation: superblock.generation,
        cluster: replica.identity.cluster.to_string(),
        volume: replica.identity.volume.to_string(),
        node: replica.identity.node.to_string(),
        slot: replica.slot.0,
        lineage: replica.lineage.to_string(),
        epoch: superblock.epoch.0,
        data_bytes: superblock.layout.data_size(),
        clean: superblock.clean,
        certain: superblock.certain,
        inconsistent: superblock.inconsistent,
        blank: superblock.blank,
        slots_used: used.collect(),
    }
}
