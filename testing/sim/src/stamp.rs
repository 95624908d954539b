//! What test writes write: every sector says which write it is from and where it belongs, so that
//! a checker knows the history of a sector from its bytes alone.

use bytes::Bytes;
use relevo_types::{BLOCK_SIZE, BlockRange};

/// The unit in which a disk tears: bytes.
pub const SECTOR: usize = 512;

/// Sectors of a block.
pub const SECTORS_PER_BLOCK: usize = 8;

/// Number of a write of a run; 0 stands for zeroes, written or never written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct WriteNo(pub u32);

impl WriteNo {
    /// Zeroes, or nothing at all.
    pub const ZERO: Self = Self(0);
}

/// The eight bytes that fill a sector: write, block, sector.
fn pattern(write: WriteNo, block: u64, sector: usize) -> [u8; 8] {
    let place = (block << 3) | sector as u64;
    // An odd constant keeps neighbouring writes from sharing most bytes.
    let word = (u64::from(write.0) << 32) | (place & 0xffff_ffff);
    (word ^ 0x5a5a_0000_0000_a5a5).to_le_bytes()
}

/// The content that a write gives to a run of blocks.
#[must_use]
pub fn fill(write: WriteNo, range: BlockRange) -> Bytes {
    let mut bytes = Vec::with_capacity(usize::try_from(range.bytes().len).unwrap_or(0));
    for block in range.iter() {
        for sector in 0..SECTORS_PER_BLOCK {
            let words = [pattern(write, block, sector); SECTOR / 8];
            bytes.extend_from_slice(words.as_flattened());
        }
    }
    bytes.into()
}

/// Which write a sector is from.
///
/// # Errors
/// What the bytes look like, when no write of this place left them.
pub fn read_sector(block: u64, sector: usize, bytes: &[u8]) -> Result<WriteNo, String> {
    let (words, _) = bytes.as_chunks::<8>();
    let Some(first) = words.first() else {
        return Err("no bytes".to_owned());
    };
    // All words are the same when each is the one before it: one comparison of long runs.
    if bytes[8..] != bytes[..bytes.len() - 8] {
        return Err(format!(
            "block {block} sector {sector} is torn inside the sector: {:02x?} and {:02x?}",
            first,
            words.iter().find(|word| *word != first)
        ));
    }
    if *first == [0; 8] {
        return Ok(WriteNo::ZERO);
    }
    let word = u64::from_le_bytes(*first) ^ 0x5a5a_0000_0000_a5a5;
    let place = word & 0xffff_ffff;
    if place != ((block << 3) | sector as u64) {
        return Err(format!(
            "block {block} sector {sector} holds bytes of block {} sector {}",
            place >> 3,
            place & 7
        ));
    }
    Ok(WriteNo(u32::try_from(word >> 32).unwrap_or(0)))
}

/// Which writes the sectors of a block are from.
///
/// # Errors
/// As [`read_sector`].
pub fn read_block(block: u64, bytes: &[u8]) -> Result<[WriteNo; SECTORS_PER_BLOCK], String> {
    let mut writes = [WriteNo::ZERO; SECTORS_PER_BLOCK];
    for (sector, chunk) in bytes
        .chunks_exact(SECTOR)
        .enumerate()
        .take(SECTORS_PER_BLOCK)
    {
        writes[sector] = read_sector(block, sector, chunk)?;
    }
    debug_assert_eq!(bytes.len() as u64, BLOCK_SIZE);
    Ok(writes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_its_write_and_place() {
        let bytes = fill(WriteNo(77), BlockRange::new(5, 2));
        assert_eq!(read_block(6, &bytes[4096..]), Ok([WriteNo(77); 8]));
        assert!(
            read_block(5, &bytes[4096..])
                .unwrap_err()
                .contains("block 6")
        );
        let mut torn = bytes[..4096].to_vec();
        torn[512..1024].fill(0);
        let writes = read_block(5, &torn).unwrap();
        assert_eq!((writes[0], writes[1]), (WriteNo(77), WriteNo::ZERO));
        torn[513] = 1;
        assert!(read_block(5, &torn).unwrap_err().contains("torn inside"));
    }
}
