//! The activity log: which regions are being written, and so may differ after a crash.
//!
//! Each transaction holds the *whole* set of active regions, so the highest valid transaction is
//! the state: no replay, and a lost or torn write leaves the one before in force. That one is
//! enough, because nothing is written to a region before its transaction is on stable storage,
//! and a region that a lost transaction dropped is only compared for nothing.

use crate::{
    META_BLOCK, Region,
    bytes::{get_u32, get_u64, is_blank, is_sealed, put_u32, put_u64, seal},
};

/// Blocks of the ring. Only the last transaction counts; the others spread the wear.
pub const RING_BLOCKS: u64 = 64;

/// The most regions in one transaction: 24 bytes of header leave room for 1018, this is a round
/// number below it.
pub const REGIONS_MAX: usize = 900;

const MAGIC: u32 = u32::from_le_bytes(*b"RLAL");
const CRC_AT: usize = 4;
const NUMBER_AT: usize = 8;
const TAG_AT: usize = 16;
const COUNT_AT: usize = 20;
const REGIONS_AT: usize = 24;

/// What the ring holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// The highest valid transaction; 0 when there is none.
    pub number: u64,
    /// Its regions, ascending.
    pub regions: Vec<Region>,
    /// Valid transactions; a replica that [`crate::create`] made has one at least.
    pub valid: usize,
    /// Blocks that are neither valid nor blank: a write was torn, or the medium is bad.
    pub damaged: usize,
}

/// One transaction. `regions` beyond [`REGIONS_MAX`] are an error of the caller.
///
/// # Panics
/// More than [`REGIONS_MAX`] regions.
#[must_use]
pub fn encode(number: u64, tag: u32, regions: &[Region]) -> Vec<u8> {
    assert!(
        regions.len() <= REGIONS_MAX,
        "{} regions don't fit into an activity log transaction",
        regions.len()
    );
    let mut block = vec![0; META_BLOCK];
    put_u32(&mut block, 0, MAGIC);
    put_u64(&mut block, NUMBER_AT, number);
    put_u32(&mut block, TAG_AT, tag);
    put_u32(
        &mut block,
        COUNT_AT,
        u32::try_from(regions.len()).unwrap_or(u32::MAX),
    );
    for (index, region) in regions.iter().enumerate() {
        put_u32(&mut block, REGIONS_AT + 4 * index, region.0);
    }
    seal(&mut block, CRC_AT);
    block
}

/// Number and regions of a transaction; `None` when it is not a valid one of that replica.
#[must_use]
pub fn decode(block: &[u8], tag: u32) -> Option<(u64, Vec<Region>)> {
    let count = usize::try_from(get_u32(block, COUNT_AT)).ok()?;
    let ours = block.len() == META_BLOCK
        && get_u32(block, 0) == MAGIC
        && get_u32(block, TAG_AT) == tag
        && count <= REGIONS_MAX
        && is_sealed(block, CRC_AT);
    ours.then(|| {
        let regions = (0..count).map(|index| Region(get_u32(block, REGIONS_AT + 4 * index)));
        (get_u64(block, NUMBER_AT), regions.collect())
    })
}

/// Reads the whole ring.
#[must_use]
pub fn recover(ring: &[u8], tag: u32) -> Recovered {
    let mut recovered = Recovered::default();
    for (block, position) in ring.chunks(META_BLOCK).zip(0u64..) {
        match decode(block, tag) {
            Some((number, regions)) if number % RING_BLOCKS == position => {
                if recovered.valid == 0 || number > recovered.number {
                    recovered.number = number;
                    recovered.regions = regions;
                }
                recovered.valid += 1;
            }
            None if is_blank(block) => {}
            Some(_) | None => recovered.damaged += 1,
        }
    }
    recovered
}

const _: () = assert!(REGIONS_AT + 4 * REGIONS_MAX <= META_BLOCK);
