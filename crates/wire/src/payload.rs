//! Memory for payloads: aligned for direct I/O, cut from blocks that are used again.
//!
//! The data of a write lands here once, off the data link or a client's socket, and stays where it
//! is until the disk has it. An allocation of its own for each 4 KiB would cost more than the copy.

use std::{collections::VecDeque, mem};

use bytes::{BufMut as _, Bytes, BytesMut};

/// Payloads start at a multiple of this in memory: the page, which no device's direct I/O exceeds
/// in practice.
pub const PAYLOAD_ALIGN: usize = 4096;

/// The longest payload that shares its block with others. A block is as long as four of them: some
/// dozens of the usual writes, and a slow one, which keeps its whole block, keeps little.
const SMALL_MAX: usize = 64 << 10;

/// The longest payload whose block is used again: what exports cut requests to.
const LARGE_MAX: usize = 1 << 20;

/// Blocks kept, by kind: for a queue depth of 128 at 4 KiB, and for some large ones under way.
const BLOCKS_MAX: usize = 6;

/// Hands out memory for one payload after the other.
#[derive(Debug)]
pub struct PayloadArena {
    small: Shelf,
    large: Shelf,
    filling: BytesMut,
    /// Bytes of `filling` that were filled; behind them may be some that were only handed out.
    filled: usize,
}

/// Blocks of one length.
#[derive(Debug)]
struct Shelf {
    block_len: usize,
    /// What is left of the block in use.
    rest: BytesMut,
    /// Blocks that were used up, oldest first. Those whose payloads are gone serve again.
    used: VecDeque<BytesMut>,
}

impl Default for PayloadArena {
    fn default() -> Self {
        Self {
            small: Shelf::new(4 * SMALL_MAX + PAYLOAD_ALIGN),
            large: Shelf::new(LARGE_MAX + PAYLOAD_ALIGN),
            filling: BytesMut::new(),
            filled: 0,
        }
    }
}

impl PayloadArena {
    /// Begins a payload of `len` bytes. What was begun and not taken is dropped.
    pub fn begin(&mut self, len: usize) {
        self.filled = 0;
        self.filling = if len <= SMALL_MAX {
            self.small.cut(len)
        } else if len <= LARGE_MAX {
            self.large.cut(len)
        } else {
            Shelf::new(len + PAYLOAD_ALIGN).cut(len)
        };
    }

    /// Appends to the payload as much of `content` as it lacks; returns how much.
    pub fn fill(&mut self, content: &[u8]) -> usize {
        let count = content.len().min(self.missing());
        self.filling.truncate(self.filled);
        self.filling.put_slice(&content[..count]);
        self.filled += count;
        count
    }

    /// The next at most `max` bytes to be filled in place, for a read straight from a socket; what they hold
    /// means nothing. Follow with [`Self::advance`].
    pub fn spare(&mut self, max: usize) -> &mut [u8] {
        let end = self.filled + max.min(self.missing());
        if self.filling.len() < end {
            self.filling.resize(end, 0);
        }
        &mut self.filling[self.filled..end]
    }

    /// Counts `count` bytes of [`Self::spare`] as filled; no more than were handed out.
    pub fn advance(&mut self, count: usize) {
        debug_assert!(self.filled + count <= self.filling.len());
        self.filled = (self.filled + count).min(self.filling.len());
    }

    /// Bytes that the payload lacks.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.filling.capacity() - self.filled
    }

    /// The payload, as far as it was filled, without a copy.
    pub fn take(&mut self) -> Bytes {
        self.filling.truncate(self.filled);
        self.filled = 0;
        mem::take(&mut self.filling).freeze()
    }
}

impl Shelf {
    fn new(block_len: usize) -> Self {
        Self {
            block_len,
            rest: BytesMut::new(),
            used: VecDeque::new(),
        }
    }

    /// An empty, aligned buffer with room for exactly `len` bytes.
    fn cut(&mut self, len: usize) -> BytesMut {
        if self.rest.capacity() < misalignment(&self.rest) + len {
            self.change_block();
        }
        let mut piece = self.rest.split_off(misalignment(&self.rest));
        self.rest = piece.split_off(len);
        piece
    }

    fn change_block(&mut self) {
        let full = mem::take(&mut self.rest);
        if full.capacity() > 0 && self.used.len() < BLOCKS_MAX {
            self.used.push_back(full);
        }
        // The oldest free one. One that waits for a slow write is passed over, not waited for.
        let free = (0..self.used.len()).find(|at| self.used[*at].try_reclaim(self.block_len));
        self.rest = free
            .and_then(|at| self.used.remove(at))
            .unwrap_or_else(|| BytesMut::with_capacity(self.block_len));
    }
}

/// How far the start of a buffer is from the next aligned place.
fn misalignment(buffer: &BytesMut) -> usize {
    buffer.as_ptr().addr().wrapping_neg() % PAYLOAD_ALIGN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(arena: &mut PayloadArena, len: usize, byte: u8) -> Bytes {
        arena.begin(len);
        let content = vec![byte; len + 7];
        assert_eq!(arena.fill(&content[..len / 3]), len / 3);
        // In place, and fewer than were handed out.
        let place = arena.spare(len / 3);
        assert_eq!(place.len(), len / 3);
        let part = place.len() / 2;
        place[..part].fill(byte);
        arena.advance(part);
        let rest = len - len / 3 - part;
        assert_eq!(arena.missing(), rest);
        assert_eq!(arena.fill(&content), rest);
        assert_eq!(arena.missing(), 0);
        arena.take()
    }

    #[test]
    fn payloads_are_aligned_and_keep_their_content() {
        let mut arena = PayloadArena::default();
        let lens = [4096, 1, 8192, 65_536, 65_537, 1 << 20, 5 << 20, 0, 4096];
        for round in 0..40u8 {
            let held: Vec<Bytes> = lens
                .iter()
                .map(|len| payload(&mut arena, *len, round))
                .collect();
            for (bytes, len) in held.iter().zip(lens) {
                assert_eq!(bytes.len(), len);
                assert!(len == 0 || bytes.as_ptr().addr().is_multiple_of(PAYLOAD_ALIGN));
                assert!(bytes.iter().all(|byte| *byte == round));
            }
        }
    }

    #[test]
    fn memory_is_used_again_and_bounded_while_a_slow_write_keeps_its_block() {
        let mut arena = PayloadArena::default();
        let slow = payload(&mut arena, 4096, 1);
        let mut blocks = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            let bytes = payload(&mut arena, 4096, 2);
            blocks.insert(bytes.as_ptr().addr());
        }
        assert!(blocks.len() <= 3 * 4 * SMALL_MAX / 4096, "{}", blocks.len());
        assert!(slow.iter().all(|byte| *byte == 1));
        let many: Vec<Bytes> = (0..20).map(|_| payload(&mut arena, LARGE_MAX, 3)).collect();
        drop(many);
        assert!(arena.large.used.len() <= BLOCKS_MAX);
    }
}
