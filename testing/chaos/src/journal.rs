//! What was acknowledged, kept off the cluster: the checksum of each block as it was last written.

use bytes::Bytes;
use relevo_types::{BLOCK_SIZE, ByteRange};

/// A block in memory.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// Complaints that are kept; the first says it all.
const COMPLAINTS_MAX: usize = 20;

/// One block.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Checksum of what was acknowledged last; `None`: two writes were under way at once, either
    /// may be there.
    content: Option<u32>,
    /// Writes under way.
    under_way: u32,
    /// Grows with each write.
    version: u64,
}

/// A journal of the acknowledged writes of a volume.
#[derive(Debug)]
pub struct Journal {
    blocks: Vec<Block>,
    writes: u64,
    complaints: Vec<String>,
}

/// What a read may return, noted when it began.
#[derive(Debug)]
pub struct Expected(Vec<Block>);

impl Journal {
    /// Of a new volume, which reads as zeroes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let block = Block {
            content: Some(crc32c::crc32c(&[0; BLOCK_BYTES])),
            under_way: 0,
            version: 0,
        };
        let count = usize::try_from(size / BLOCK_SIZE).unwrap_or(0);
        Self {
            blocks: vec![block; count],
            writes: 0,
            complaints: Vec::new(),
        }
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub const fn writes(&self) -> u64 {
        self.writes
    }

    /// What was read and should not have been.
    #[must_use]
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// A write goes out.
    pub fn write_begins(&mut self, range: ByteRange) {
        for block in self.area(range) {
            block.under_way += 1;
            block.version += 1;
        }
    }

    /// A write was acknowledged.
    pub fn write_ends(&mut self, range: ByteRange, data: &Bytes) {
        self.writes += 1;
        for (block, content) in self.area(range).zip(data.chunks(BLOCK_BYTES)) {
            block.content = (block.under_way == 1).then(|| crc32c::crc32c(content));
            block.under_way -= 1;
        }
    }

    /// A range was given up: it may read as anything.
    pub fn discard_ends(&mut self, range: ByteRange) {
        for block in self.area(range) {
            block.content = None;
            block.under_way -= 1;
        }
    }

    /// A read goes out.
    #[must_use]
    pub fn read_begins(&mut self, range: ByteRange) -> Expected {
        Expected(self.area(range).map(|block| *block).collect())
    }

    /// A read was answered: it must show what was acknowledged before it began, unless a write was
    /// under way meanwhile.
    pub fn read_ends(&mut self, range: ByteRange, expected: &Expected, data: &[u8]) {
        let first = range.offset / BLOCK_SIZE;
        let mut found = Vec::new();
        let blocks = self.area(range).zip(&expected.0);
        for (index, ((block, before), content)) in blocks.zip(data.chunks(BLOCK_BYTES)).enumerate()
        {
            let quiet = before.under_way == 0 && before.version == block.version;
            if quiet
                && before
                    .content
                    .is_some_and(|crc| crc != crc32c::crc32c(content))
            {
                found.push(first + index as u64);
            }
        }
        if !found.is_empty() && self.complaints.len() < COMPLAINTS_MAX {
            self.complaints.push(format!(
                "a read showed other than what was acknowledged: blocks {found:?}"
            ));
        }
    }

    /// Blocks of `content`, the whole volume, that are not as acknowledged. Call when no write is
    /// under way.
    #[must_use]
    pub fn missing(&self, content: &[u8]) -> Vec<usize> {
        self.blocks
            .iter()
            .zip(content.chunks(BLOCK_BYTES))
            .enumerate()
            .filter(|(_, (block, content))| {
                block.under_way == 0
                    && block
                        .content
                        .is_some_and(|crc| crc != crc32c::crc32c(content))
            })
            .map(|(index, _)| index)
            .collect()
    }

    /// The blocks that a range touches; a volume's requests are whole blocks.
    fn area(&mut self, range: ByteRange) -> std::slice::IterMut<'_, Block> {
        let len = self.blocks.len();
        let index = |at: u64| usize::try_from(at).unwrap_or(len).min(len);
        let first = index(range.offset / BLOCK_SIZE);
        let end = index(range.end().div_ceil(BLOCK_SIZE)).max(first);
        self.blocks[first..end].iter_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: ByteRange = ByteRange::new(BLOCK_SIZE, BLOCK_SIZE);

    fn filled(byte: u8) -> Bytes {
        vec![byte; BLOCK_BYTES].into()
    }

    fn written(journal: &mut Journal, byte: u8) {
        journal.write_begins(BLOCK);
        journal.write_ends(BLOCK, &filled(byte));
    }

    #[test]
    fn a_lost_write_is_missed() {
        let mut journal = Journal::new(4 * BLOCK_SIZE);
        let mut content = vec![0; 4 * BLOCK_BYTES];
        assert_eq!(journal.missing(&content), Vec::<usize>::new());
        written(&mut journal, 7);
        assert_eq!(journal.missing(&content), [1]);
        content[BLOCK_BYTES..2 * BLOCK_BYTES].fill(7);
        assert_eq!(journal.missing(&content), Vec::<usize>::new());
        written(&mut journal, 8);
        assert_eq!(journal.missing(&content), [1]);
    }

    #[test]
    fn a_stale_read_is_seen_and_a_concurrent_one_allowed() {
        let mut journal = Journal::new(4 * BLOCK_SIZE);
        written(&mut journal, 7);
        let expected = journal.read_begins(BLOCK);
        journal.read_ends(BLOCK, &expected, &filled(7));
        assert!(journal.complaints().is_empty());

        let expected = journal.read_begins(BLOCK);
        written(&mut journal, 8);
        journal.read_ends(BLOCK, &expected, &filled(7));
        assert!(journal.complaints().is_empty());

        let expected = journal.read_begins(BLOCK);
        journal.read_ends(BLOCK, &expected, &filled(7));
        assert_eq!(journal.complaints().len(), 1);
    }
}
