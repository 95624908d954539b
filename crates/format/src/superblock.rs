//! The superblock: whose replica a backing is, how it is laid out and how it was left.

use relevo_types::{ClusterId, Epoch, LineageId, NodeId, ReplicaSlot, VolumeId};

use crate::{
    Layout, LayoutError, META_BLOCK, activity,
    bytes::{get, get_u32, get_u64, is_blank, is_sealed, put_u32, put_u64, seal},
};

const MAGIC: [u8; 8] = *b"RELEVOSB";

/// The version this code writes and reads. A newer one gets an upgrade function per step here.
const VERSION: u32 = 1;

const VERSION_AT: usize = 8;
const CRC_AT: usize = 12;
const GENERATION_AT: usize = 16;
const CLUSTER_AT: usize = 24;
const VOLUME_AT: usize = 40;
const NODE_AT: usize = 44;
const SLOT_AT: usize = 48;
const FLAGS_AT: usize = 49;
const SLOTS_USED_AT: usize = 50;
const REGION_BLOCKS_AT: usize = 52;
const DATA_SIZE_AT: usize = 56;
const BITMAP_AT: usize = 64;
const ACTIVITY_AT: usize = 72;
const ACTIVITY_BLOCKS_AT: usize = 80;
const LINEAGE_AT: usize = 88;
const EPOCH_AT: usize = 96;

const FLAG_CLEAN: u8 = 1;
const FLAG_CERTAIN: u8 = 2;
const FLAG_INCONSISTENT: u8 = 4;
const FLAG_BLANK: u8 = 8;

/// Whose replica it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// The node.
    pub node: NodeId,
}

impl Identity {
    /// A short form of the identity that every activity log and bitmap block carries, so that
    /// leftovers of an earlier replica on the same backing are never taken for this one's.
    #[must_use]
    pub fn tag(&self) -> u32 {
        let crc = crc32c::crc32c(&self.cluster.0);
        let crc = crc32c::crc32c_append(crc, &self.volume.0.to_le_bytes());
        crc32c::crc32c_append(crc, &self.node.0.to_le_bytes())
    }
}

/// What a new replica is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replica {
    /// Whose it is.
    pub identity: Identity,
    /// Its bitmap slot.
    pub slot: ReplicaSlot,
    /// The volume's history.
    pub lineage: LineageId,
}

/// What a new replica has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Zeroes, like all replicas of its new volume: it is in sync.
    Zeroes,
    /// Nothing of a volume that is in use: it gets every block from another replica.
    Blank,
}

/// A superblock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Grows with each write; its parity chooses the slot.
    pub generation: u64,
    /// What the replica is.
    pub replica: Replica,
    /// Where things are.
    pub layout: Layout,
    /// The highest epoch seen.
    pub epoch: Epoch,
    /// Detached in order: the bitmaps say all there is to say. When not set, every active region
    /// of the activity log is uncertain.
    pub clean: bool,
    /// Nothing acknowledged can be missing here: no unclean restart since this replica was last
    /// in sync. Only meaningful when `clean`.
    pub certain: bool,
    /// In the middle of a resync: a mix of old and new.
    pub inconsistent: bool,
    /// Added to a volume in use and never attached yet: every block is uncertain, whatever the
    /// bitmap says.
    pub blank: bool,
    /// Replica slots whose bitmaps may hold anything but zeroes; bit n is slot n. Others need not
    /// be read.
    pub slots_used: u8,
}

/// Why a block is no superblock.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SuperblockError {
    /// All zeroes.
    #[error("it is blank")]
    Blank,
    /// Something else is there.
    #[error("it holds foreign data")]
    Foreign,
    /// Ours, but the checksum does not fit.
    #[error("its checksum is wrong")]
    Checksum,
    /// Of a later version.
    #[error("it has format version {0}; this program reads version 1, use a newer one")]
    Version(u32),
    /// Checksum right, content impossible.
    #[error("its field `{0}` is out of range")]
    Field(&'static str),
}

/// The superblock in force.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// It.
    pub superblock: Superblock,
    /// What is wrong with the other slot, if something is.
    pub remark: Option<String>,
}

/// What the end of a backing says about its owner.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backing {
    /// The last two blocks are zeroes. The rest may still hold something: look for other
    /// signatures before taking it.
    Blank,
    /// Something that is not ours.
    Foreign,
    /// A replica.
    Ours(Box<Superblock>),
    /// Ours once, unreadable now; the text says why.
    Damaged(String),
}

impl Superblock {
    /// The first superblock of a replica, clean, at epoch 0.
    #[must_use]
    pub const fn new(replica: Replica, layout: &Layout, start: Start) -> Self {
        let blank = matches!(start, Start::Blank);
        Self {
            generation: 1,
            replica,
            layout: *layout,
            epoch: Epoch(0),
            clean: true,
            certain: !blank,
            inconsistent: blank,
            blank,
            slots_used: 1 << replica.slot.0,
        }
    }

    /// The block as it lies on the backing.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; META_BLOCK];
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let Identity {
            cluster,
            volume,
            node,
        } = self.replica.identity;
        block[..8].copy_from_slice(&MAGIC);
        put_u32(&mut block, VERSION_AT, VERSION);
        put_u64(&mut block, GENERATION_AT, self.generation);
        block[CLUSTER_AT..CLUSTER_AT + 16].copy_from_slice(&cluster.0);
        put_u32(&mut block, VOLUME_AT, volume.0);
        put_u32(&mut block, NODE_AT, node.0);
        block[SLOT_AT] = self.replica.slot.0;
        block[FLAGS_AT] = flag(self.clean, FLAG_CLEAN)
            | flag(self.certain, FLAG_CERTAIN)
            | flag(self.inconsistent, FLAG_INCONSISTENT)
            | flag(self.blank, FLAG_BLANK);
        block[SLOTS_USED_AT] = self.slots_used;
        put_u32(&mut block, REGION_BLOCKS_AT, REGION_BLOCKS);
        put_u64(&mut block, DATA_SIZE_AT, self.layout.data_size());
        put_u64(&mut block, BITMAP_AT, self.layout.bitmap_offset());
        put_u64(&mut block, ACTIVITY_AT, self.layout.activity_offset());
        put_u32(&mut block, ACTIVITY_BLOCKS_AT, ACTIVITY_BLOCKS);
        put_u64(&mut block, LINEAGE_AT, self.replica.lineage.0);
        put_u64(&mut block, EPOCH_AT, self.epoch.0);
        seal(&mut block, CRC_AT);
        block
    }

    /// Reads a block.
    ///
    /// # Errors
    /// Why it is no superblock.
    pub fn decode(block: &[u8]) -> Result<Self, SuperblockError> {
        if is_blank(block) {
            return Err(SuperblockError::Blank);
        }
        if block.len() != META_BLOCK || block[..8] != MAGIC {
            return Err(SuperblockError::Foreign);
        }
        if !is_sealed(block, CRC_AT) {
            return Err(SuperblockError::Checksum);
        }
        let version = get_u32(block, VERSION_AT);
        if version != VERSION {
            return Err(SuperblockError::Version(version));
        }
        let slot = ReplicaSlot(block[SLOT_AT]);
        let flags = block[FLAGS_AT];
        let slots_used = block[SLOTS_USED_AT];
        let data_size = get_u64(block, DATA_SIZE_AT);
        let cluster = get(block, CLUSTER_AT).map_or_else(ClusterId::default, ClusterId);
        Ok(Self {
            generation: get_u64(block, GENERATION_AT),
            replica: Replica {
                identity: Identity {
                    cluster,
                    volume: VolumeId(get_u32(block, VOLUME_AT)),
                    node: NodeId(get_u32(block, NODE_AT)),
                },
                slot: check(slot.index() < ReplicaSlot::COUNT, "slot", slot)?,
                lineage: LineageId(get_u64(block, LINEAGE_AT)),
            },
            layout: decode_layout(block, data_size)?,
            epoch: Epoch(get_u64(block, EPOCH_AT)),
            clean: flags & FLAG_CLEAN != 0,
            certain: flags & FLAG_CERTAIN != 0,
            inconsistent: flags & FLAG_INCONSISTENT != 0,
            blank: flags & FLAG_BLANK != 0,
            slots_used: check(
                usize::from(slots_used) < 1 << ReplicaSlot::COUNT,
                "slots_used",
                slots_used,
            )?,
        })
    }
}

/// The only layout of version 1, checked against the offsets that are written.
fn decode_layout(block: &[u8], data_size: u64) -> Result<Layout, SuperblockError> {
    let smallest = Layout::new(data_size).map_err(|_| SuperblockError::Field("data_size"))?;
    let bitmap = get_u64(block, BITMAP_AT);
    let gap = bitmap
        .checked_sub(smallest.bitmap_offset())
        .and_then(|gap| smallest.backing_size().checked_add(gap))
        .ok_or(SuperblockError::Field("bitmap_offset"))?;
    let layout = Layout::on_backing(data_size, gap)
        .map_err(|_: LayoutError| SuperblockError::Field("bitmap_offset"))?;
    check(layout.bitmap_offset() == bitmap, "bitmap_offset", ())?;
    check(
        layout.activity_offset() == get_u64(block, ACTIVITY_AT),
        "activity_offset",
        (),
    )?;
    check(
        get_u32(block, ACTIVITY_BLOCKS_AT) == ACTIVITY_BLOCKS,
        "activity_blocks",
        (),
    )?;
    check(
        get_u32(block, REGION_BLOCKS_AT) == REGION_BLOCKS,
        "region_blocks",
        layout,
    )
}

fn check<T>(good: bool, field: &'static str, value: T) -> Result<T, SuperblockError> {
    if good {
        Ok(value)
    } else {
        Err(SuperblockError::Field(field))
    }
}

#[allow(clippy::cast_possible_truncation, reason = "64")]
const ACTIVITY_BLOCKS: u32 = activity::RING_BLOCKS as u32;
#[allow(clippy::cast_possible_truncation, reason = "256")]
const REGION_BLOCKS: u32 = Layout::REGION_BLOCKS as u32;

/// Reads the slot of superblocks whose generations have that parity.
pub(crate) fn read_slot(block: &[u8], parity: u64) -> Result<Superblock, SuperblockError> {
    let superblock = Superblock::decode(block)?;
    // A block in the wrong slot was misdirected.
    check(
        superblock.generation % 2 == parity,
        "generation",
        superblock,
    )
}

/// Chooses between the two slots, given the last two whole blocks of a backing: the newest valid
/// one is in force.
///
/// # Errors
/// Why neither is usable, the first slot's reason first.
pub fn read_superblocks(blocks: &[u8]) -> Result<Found, (SuperblockError, SuperblockError)> {
    let (first, second) = blocks.split_at(META_BLOCK.min(blocks.len()));
    let remark = |index: u8, error: SuperblockError| {
        format!("superblock slot {index} is not usable ({error}); the other one was used")
    };
    match (read_slot(first, 0), read_slot(second, 1)) {
        (Ok(a), Ok(b)) => Ok(Found {
            superblock: if a.generation > b.generation { a } else { b },
            remark: None,
        }),
        (Ok(superblock), Err(error)) => Ok(Found {
            superblock,
            remark: Some(remark(1, error)),
        }),
        (Err(error), Ok(superblock)) => Ok(Found {
            superblock,
            remark: Some(remark(0, error)),
        }),
        (Err(a), Err(b)) => Err((a, b)),
    }
}

/// Whose a backing is, given its last two whole blocks (see [`Layout::superblocks`]).
#[must_use]
pub fn identify(blocks: &[u8]) -> Backing {
    use SuperblockError::{Blank, Foreign};
    match read_superblocks(blocks) {
        Ok(found) => Backing::Ours(Box::new(found.superblock)),
        Err((Blank, Blank)) => Backing::Blank,
        Err((Blank | Foreign, Blank | Foreign)) => Backing::Foreign,
        Err((first, second)) => Backing::Damaged(format!(
            "both superblocks are unusable: of the first {first}, of the second {second}"
        )),
    }
}
