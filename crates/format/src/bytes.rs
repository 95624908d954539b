//! Reading and writing numbers at fixed offsets of a metadata block.

/// A block with a CRC-32C at `crc_at`, computed over the block with that field zero.
pub(crate) fn seal(block: &mut [u8], crc_at: usize) {
    put_u32(block, crc_at, 0);
    let crc = crc32c::crc32c(block);
    put_u32(block, crc_at, crc);
}

/// Whether the CRC-32C at `crc_at` fits the block.
pub(crate) fn is_sealed(block: &[u8], crc_at: usize) -> bool {
    let (Some(before), Some(after)) = (block.get(..crc_at), block.get(crc_at + 4..)) else {
        return false;
    };
    let crc = crc32c::crc32c(before);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, after) == get_u32(block, crc_at)
}

pub(crate) fn is_blank(block: &[u8]) -> bool {
    // Without a way out in the middle: the compiler makes wide comparisons of it, and blank blocks are what an
    // attach reads most.
    block.iter().fold(0, |bits, byte| bits | byte) == 0
}

pub(crate) fn put_u32(block: &mut [u8], at: usize, value: u32) {
    block[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(block: &mut [u8], at: usize, value: u64) {
    block[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// The number at `at`; 0 when the block ends before it.
pub(crate) fn get_u32(block: &[u8], at: usize) -> u32 {
    get(block, at).map_or(0, u32::from_le_bytes)
}

/// The number at `at`; 0 when the block ends before it.
pub(crate) fn get_u64(block: &[u8], at: usize) -> u64 {
    get(block, at).map_or(0, u64::from_le_bytes)
}

pub(crate) fn get<const N: usize>(block: &[u8], at: usize) -> Option<[u8; N]> {
    block.get(at..at + N)?.try_into().ok()
}
