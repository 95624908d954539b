//! Memory for payloads, aligned so that `O_DIRECT` takes it as it is.

use std::{
    alloc::{self, Layout},
    fmt, ptr,
};

use bytes::Bytes;

/// Start of every buffer in memory: the page and the largest logical sector in use.
pub const ALIGNMENT: usize = 4096;

/// A buffer of fixed capacity that is filled from the front and then frozen into [`Bytes`].
///
/// Memory is neither zeroed nor touched before it is filled: a client that announces 32 MiB and
/// sends nothing costs address space only.
pub struct AlignedBuf {
    start: ptr::NonNull<u8>,
    capacity: usize,
    /// Bytes that were filled with content.
    len: usize,
    /// Bytes that hold any value at all, `len` or more.
    initialised: usize,
}

// SAFETY: the buffer owns its memory alone, like a `Vec<u8>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// An empty buffer for `capacity` bytes. Aborts the process when the address space is used
    /// up, as every allocation does.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout has a size of at least one alignment unit, never 0.
        let start = unsafe { alloc::alloc(layout) };
        let Some(start) = ptr::NonNull::new(start) else {
            alloc::handle_alloc_error(layout)
        };
        Self {
            start,
            capacity,
            len: 0,
            initialised: 0,
        }
    }

    /// A buffer with a copy of `content`.
    #[must_use]
    pub fn copy_from(content: &[u8]) -> Self {
        let mut buffer = Self::with_capacity(content.len());
        buffer.fill(content);
        buffer
    }

    /// A buffer of `len` zeroes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::with_capacity(len);
        buffer.spare(len);
        buffer.advance(len);
        buffer
    }

    fn layout(capacity: usize) -> Layout {
        let size = capacity.max(1).next_multiple_of(ALIGNMENT);
        Layout::from_size_align(size, ALIGNMENT)
            .unwrap_or_else(|_| alloc::handle_alloc_error(Layout::new::<u8>()))
    }

    /// Bytes that still fit.
    #[must_use]
    pub const fn remaining(&self) -> usize {
        self.capacity - self.len
    }

    /// Appends as much of `content` as fits; returns how much.
    pub fn fill(&mut self, content: &[u8]) -> usize {
        let count = content.len().min(self.remaining());
        // SAFETY: `count` bytes fit behind `len` within the allocation; `content` is another
        // allocation, since `self` is borrowed mutably.
        unsafe {
            ptr::copy_nonoverlapping(content.as_ptr(), self.start.as_ptr().add(self.len), count);
        }
        self.len += count;
        self.initialised = self.initialised.max(self.len);
        count
    }

    /// The next at most `max` bytes to fill, for a read straight from a socket. Follow with
    /// [`Self::advance`].
    pub fn spare(&mut self, max: usize) -> &mut [u8] {
        let end = self.len + max.min(self.remaining());
        if end > self.initialised {
            // SAFETY: `initialised <= end <= capacity`, so this stays within the allocation.
            unsafe {
                ptr::write_bytes(
                    self.start.as_ptr().add(self.initialised),
                    0,
                    end - self.initialised,
                );
            }
            self.initialised = end;
        }
        // SAFETY: `len..end` is within the allocation and holds values since the lines above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(self.len), end - self.len) }
    }

    /// Counts `count` bytes of [`Self::spare`] as filled; no more than were handed out.
    pub fn advance(&mut self, count: usize) {
        debug_assert!(self.len + count <= self.initialised);
        self.len = (self.len + count).min(self.initialised);
    }

    /// The filled bytes, without a copy.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the first `len` bytes were filled.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated with the same layout, and not used after this.
        unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_aligned_and_freezes() {
        let mut buffer = AlignedBuf::with_capacity(10_000);
        assert_eq!(buffer.fill(b"abc"), 3);
        let spare = buffer.spare(5);
        assert_eq!(spare, [0; 5]);
        spare[..2].copy_from_slice(b"de");
        buffer.advance(2);
        assert_eq!(buffer.fill(&[7; 20_000]), 10_000 - 5);
        assert_eq!(buffer.remaining(), 0);
        assert!(buffer.spare(9).is_empty());
        let bytes = buffer.freeze();
        assert_eq!(bytes.as_ptr().addr() % ALIGNMENT, 0);
        assert_eq!(&bytes[..6], b"abcde\x07");
        assert_eq!(bytes.len(), 10_000);
        assert!(AlignedBuf::with_capacity(0).freeze().is_empty());
        assert_eq!(AlignedBuf::zeroed(3).as_ref(), [0; 3]);
    }
}
