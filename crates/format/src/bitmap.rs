//! Pages of dirty bits: one bit per block of the volume and replica slot.
//!
//! A page has two copies on the backing. A new generation goes over the older one, so a torn
//! write never harms the copy in force. A page whose both copies are blank was never written and
//! is all clear.

use relevo_types::ReplicaSlot;

use crate::{
    META_BLOCK,
    bytes::{get_u32, get_u64, is_blank, is_sealed, put_u32, put_u64, seal},
};

/// Bytes of bits in a page.
pub const PAYLOAD: usize = META_BLOCK - HEADER;

/// Words of bits in a page; bit `i` of the page is bit `i % 64` of word `i / 64`.
pub const WORDS: usize = PAYLOAD / 8;

/// Blocks of the volume that a page covers: 127 MiB.
pub const BLOCKS_PER_PAGE: u64 = PAYLOAD as u64 * 8;

/// The bits of a page.
pub type Words = [u64; WORDS];

const HEADER: usize = 32;
const MAGIC: u32 = u32::from_le_bytes(*b"RLBM");
const CRC_AT: usize = 0;
const MAGIC_AT: usize = 4;
const GENERATION_AT: usize = 8;
const PAGE_AT: usize = 16;
const SLOT_AT: usize = 20;
const TAG_AT: usize = 24;

/// Which page of which replica.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageId {
    /// Whose bits.
    pub slot: ReplicaSlot,
    /// Which page: blocks from `page * BLOCKS_PER_PAGE`.
    pub page: u32,
}

/// What the two copies of a page say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Copies {
    /// Neither was ever written: all clear.
    Blank,
    /// Both are in order, or one is and the other was never written.
    Valid {
        /// The newer generation.
        generation: u64,
        /// Its bits.
        words: Box<Words>,
    },
    /// A copy is damaged: torn by a crash, or the medium is bad, which look alike. The page must
    /// be taken for all dirty.
    Damaged {
        /// The next write must use a generation above this one, and of the parity that spares
        /// the valid copy, which this is the generation of (0: there is none).
        generation: u64,
    },
}

/// One copy of a page.
#[must_use]
pub fn encode(id: PageId, tag: u32, generation: u64, words: &Words) -> Vec<u8> {
    let mut block = vec![0; META_BLOCK];
    put_u32(&mut block, MAGIC_AT, MAGIC);
    put_u64(&mut block, GENERATION_AT, generation);
    put_u32(&mut block, PAGE_AT, id.page);
    put_u32(&mut block, SLOT_AT, u32::from(id.slot.0));
    put_u32(&mut block, TAG_AT, tag);
    for (chunk, word) in block[HEADER..].chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    seal(&mut block, CRC_AT);
    block
}

/// Generation and bits of a copy; `None` when it is not a valid copy of that page.
#[must_use]
pub fn decode(id: PageId, tag: u32, block: &[u8]) -> Option<(u64, Box<Words>)> {
    let ours = block.len() == META_BLOCK
        && get_u32(block, MAGIC_AT) == MAGIC
        && get_u32(block, PAGE_AT) == id.page
        && get_u32(block, SLOT_AT) == u32::from(id.slot.0)
        && get_u32(block, TAG_AT) == tag
        && is_sealed(block, CRC_AT);
    ours.then(|| {
        let mut words = Box::new([0; WORDS]);
        for (index, word) in words.iter_mut().enumerate() {
            *word = get_u64(block, HEADER + 8 * index);
        }
        (get_u64(block, GENERATION_AT), words)
    })
}

/// Reads both copies of a page, which lie one after the other.
#[must_use]
pub fn read(id: PageId, tag: u32, copies: &[u8]) -> Copies {
    let (even, odd) = copies.split_at(META_BLOCK.min(copies.len()));
    let valid = |block: &[u8], parity: u64| {
        decode(id, tag, block).filter(|(generation, _)| generation % 2 == parity)
    };
    match (valid(even, 0), valid(odd, 1)) {
        (Some(a), Some(b)) => {
            let (generation, words) = if a.0 > b.0 { a } else { b };
            Copies::Valid { generation, words }
        }
        // Only the first generation has no predecessor beside it. A later one next to a blank copy
        // may be the older of two: the newer was wiped.
        (None, Some((1, words))) if is_blank(even) => Copies::Valid {
            generation: 1,
            words,
        },
        (Some((generation, _)), None) | (None, Some((generation, _))) => {
            Copies::Damaged { generation }
        }
        (None, None) if is_blank(copies) => Copies::Blank,
        (None, None) => Copies::Damaged { generation: 0 },
    }
}

const _: () = assert!(PAYLOAD.is_multiple_of(8));
