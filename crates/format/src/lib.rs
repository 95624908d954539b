//! What Relevo writes at the end of a replica's backing, as pure encoding and decoding.
//!
//! `docs/formats.md` has the byte tables. All numbers are little-endian, every block carries a
//! CRC-32C and, directly or by [`Identity::tag`], whose it is. The replication engine decides
//! when what is written; the disk driver calls [`create`] once and [`identify`] before it lets
//! anything near a backing.
//!
//! * [`Layout`]: where things are.
//! * [`Superblock`] and [`read_superblocks`]: what the replica is, in two alternating slots.
//! * [`activity`]: the ring of transactions that names the regions being written.
//! * [`bitmap`]: pages of dirty bits, each in two alternating slots.
//! * [`dump`]: all of it for a person, the damaged parts too.
//! * [`saved`]: not on the backing: files that keep what a replica had of its own when it gave way.

#![forbid(unsafe_code)]

pub mod activity;
pub mod bitmap;
mod bytes;
pub mod dump;
mod layout;
pub mod saved;
mod superblock;

pub use layout::{Layout, LayoutError, Region};
pub use superblock::{
    Backing, Found, Identity, Replica, Start, Superblock, SuperblockError, identify,
    read_superblocks,
};

/// The unit of every metadata write: the smallest that disks write as one.
pub const META_BLOCK: usize = 4096;

/// Everything that must be written to make a replica of a backing whose data and metadata areas
/// read as zeroes: pairs of offset and bytes. Flush after them.
#[must_use]
pub fn create(replica: &Replica, layout: &Layout, start: Start) -> Vec<(u64, Vec<u8>)> {
    let first = Superblock::new(*replica, layout, start);
    let mut writes: Vec<(u64, Vec<u8>)> = vec![(
        layout.activity_block(0),
        activity::encode(0, replica.identity.tag(), &[]),
    )];
    // Both slots, so that a damaged one is never mistaken for one that was never written.
    for generation in [first.generation, first.generation + 1] {
        let superblock = Superblock {
            generation,
            ..first.clone()
        };
        writes.push((layout.superblock_block(generation), superblock.encode()));
    }
    writes
}

#[cfg(test)]
mod tests;
