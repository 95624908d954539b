//! Digests of blocks: what verification and a resync of doubtful blocks compare instead of data.
//!
//! The whole SHA-256. A collision hides a difference, for good when a resync trusts it, so the
//! digest must hold against content that someone chose (a guest's files), which rules out checksums,
//! hashes without collision resistance, and a digest that was cut: of 128 bits a collision can be made
//! with 2^64 hashes, which is within reach. `ring` is the hash that the TLS links use already, with the processor's SHA
//! instructions where there are any; it does no I/O, so a sans-IO crate may use it.

use relevo_types::{BLOCK_SIZE, BlockRange};
use relevo_wire::BlockDigest;
use ring::digest::{SHA256, digest};

use crate::machine::is_zero;

/// The digest of each block of some data, which is whole blocks.
pub(crate) fn digests(data: &[u8]) -> Vec<BlockDigest> {
    let block = usize::try_from(BLOCK_SIZE).unwrap_or(usize::MAX);
    data.chunks(block).map(digest_of).collect()
}

/// The digest of a block of zeroes: what large parts of many volumes are, and looking is quicker.
const OF_ZEROES: BlockDigest = BlockDigest([
    0xad, 0x7f, 0xac, 0xb2, 0x58, 0x6f, 0xc6, 0xe9, 0x66, 0xc0, 0x04, 0xd7, 0xd1, 0xd1, 0x6b, 0x02,
    0x4f, 0x58, 0x05, 0xff, 0x7c, 0xb4, 0x7c, 0x7a, 0x85, 0xda, 0xbd, 0x8b, 0x48, 0x89, 0x2c, 0xa7,
]);

fn digest_of(block: &[u8]) -> BlockDigest {
    if block.len() as u64 == BLOCK_SIZE && is_zero(block) {
        return OF_ZEROES;
    }
    let mut bytes = [0; BlockDigest::BYTES];
    bytes.copy_from_slice(digest(&SHA256, block).as_ref());
    BlockDigest(bytes)
}

/// The blocks from `first` on whose digests differ, as runs in order. A block that only one side has a
/// digest of differs: nobody compared it.
pub(crate) fn differing(first: u64, a: &[BlockDigest], b: &[BlockDigest]) -> Vec<BlockRange> {
    let mut runs: Vec<BlockRange> = Vec::new();
    for (block, at) in (first..).zip(0..a.len().max(b.len())) {
        if a.get(at) == b.get(at) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end() == block => run.count += 1,
            _ => runs.push(BlockRange::new(block, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_differ_are_named_as_runs() {
        let a = vec![1; 5 * 4096];
        let mut b = a.clone();
        for at in [4096, 2 * 4096 + 4095, 4 * 4096] {
            b[at] ^= 1;
        }
        let runs = differing(10, &digests(&a), &digests(&b));
        assert_eq!(runs, [BlockRange::new(11, 2), BlockRange::new(14, 1)]);
        assert_eq!(differing(10, &digests(&a), &digests(&a)), []);
    }

    #[test]
    fn a_block_without_a_digest_differs() {
        let a = digests(&[1; 5 * 4096]);
        for (ours, theirs) in [(&a[..], &a[..3]), (&a[..3], &a[..])] {
            assert_eq!(differing(10, ours, theirs), [BlockRange::new(13, 2)]);
        }
        assert_eq!(differing(10, &a, &[]), [BlockRange::new(10, 5)]);
        assert_eq!(differing(10, &[], &[]), []);
    }

    /// The digest is part of the protocol.
    #[test]
    fn a_digest_is_sha_256() {
        let zeroes = [0; 4096];
        assert_eq!(digest(&SHA256, &zeroes).as_ref(), OF_ZEROES.0);
        for block in [zeroes, [7; 4096]] {
            assert_eq!(digests(&block)[0].0, digest(&SHA256, &block).as_ref());
        }
        assert_ne!(digests(&zeroes[..512]), [OF_ZEROES]);
    }
}
