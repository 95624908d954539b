//! Page-aligned buffers with a small cache behind them.
//!
//! Direct I/O wants memory aligned to the sector; allocating a fresh aligned megabyte for each
//! request would fault in its pages each time. A pool keeps a bounded number of freed buffers.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;

/// Alignment of every buffer: the page, which no device's direct I/O exceeds in practice.
pub const BUFFER_ALIGN: usize = 4096;

/// Freed buffers kept for reuse, in bytes per pool: covers a queue depth of 32 at 128 KiB, and is
/// small against the 60 MB that a daemon with one volume may take.
const CACHED_BYTES_MAX: usize = 4 << 20;

/// Size classes: 4 KiB, 8 KiB ... 1 MiB. Larger buffers are rare and not cached.
const CLASSES: usize = 9;

/// Memory of a fixed capacity, aligned to [`BUFFER_ALIGN`]. Always initialised.
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: `Memory` owns its allocation exclusively and has no thread affinity; it is only reached
// through `&`/`&mut` of its owner.
unsafe impl Send for Memory {}
// SAFETY: as above; shared references only allow reading.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero: `capacity` is at least BUFFER_ALIGN.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self { start, capacity }
    }

    fn layout(capacity: usize) -> Layout {
        assert!(capacity > 0, "an empty buffer has no memory");
        match Layout::from_size_align(capacity, BUFFER_ALIGN) {
            Ok(layout) => layout,
            Err(_) => panic!("a buffer of {capacity} bytes exceeds the address space"),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and not freed before.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

#[derive(Default)]
struct Free {
    classes: [Vec<Memory>; CLASSES],
    bytes: usize,
}

/// A source of [`AlignedBuf`]s. Clones share the cache; buffers may outlive it.
#[derive(Clone, Default)]
pub struct BufferPool(Arc<Mutex<Free>>);

impl BufferPool {
    /// An empty pool.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer of `len` bytes (at least 1). Its content is whatever it held before: fill it.
    #[must_use]
    pub fn take(&self, len: usize) -> AlignedBuf {
        let len = len.max(1);
        let class = class_of(len);
        let cached = class.and_then(|class| {
            let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let memory = free.classes[class].pop()?;
            free.bytes -= memory.capacity;
            Some(memory)
        });
        let capacity = class.map_or_else(
            || len.next_multiple_of(BUFFER_ALIGN),
            |class| BUFFER_ALIGN << class,
        );
        AlignedBuf {
            memory: Some(cached.unwrap_or_else(|| Memory::new(capacity))),
            len,
            home: Arc::downgrade(&self.0),
        }
    }

    /// An aligned copy of `data`.
    #[must_use]
    pub fn copy(&self, data: &[u8]) -> AlignedBuf {
        let mut buf = self.take(data.len());
        buf.as_mut()[..data.len()].copy_from_slice(data);
        buf
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "BufferPool({} bytes cached)", free.bytes)
    }
}

fn class_of(len: usize) -> Option<usize> {
    let class = len
        .div_ceil(BUFFER_ALIGN)
        .next_power_of_two()
        .trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

/// A buffer aligned to [`BUFFER_ALIGN`]; goes back to its pool when dropped. Becomes a [`Bytes`]
/// without a copy.
pub struct AlignedBuf {
    /// `None` only while being dropped.
    memory: Option<Memory>,
    len: usize,
    home: Weak<Mutex<Free>>,
}

impl AlignedBuf {
    /// Length in bytes, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The bytes, shared, without a copy.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn start(&self) -> *mut u8 {
        match &self.memory {
            Some(memory) => memory.start.as_ptr(),
            None => unreachable!("memory is taken in drop only"),
        }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the memory is initialised (zeroed when allocated), owned by self, and at least
        // `len` bytes long: `take` picks a capacity of `len` or more.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl AsMut<[u8]> for AlignedBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_ref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else {
            return;
        };
        let (Some(home), Some(class)) = (self.home.upgrade(), class_of(memory.capacity)) else {
            return;
        };
        let mut free = home.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + memory.capacity <= CACHED_BYTES_MAX {
            free.bytes += memory.capacity;
            free.classes[class].push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufferPool::new();
        for len in [1, 512, 4096, 4097, 1 << 20, (1 << 20) + 1] {
            let mut buf = pool.take(len);
            assert_eq!(buf.as_ref().len(), len);
            assert_eq!(buf.as_ref().as_ptr() as usize % BUFFER_ALIGN, 0);
            buf.as_mut().fill(7);
        }
        let bytes = pool.copy(b"abc").into_bytes();
        let start = bytes.as_ptr();
        assert_eq!(&bytes[..], b"abc");
        drop(bytes);
        assert_eq!(pool.take(5).as_ref().as_ptr(), start, "reused");
    }

    #[test]
    fn the_cache_is_bounded_and_a_buffer_may_outlive_the_pool() {
        let pool = BufferPool::new();
        let many: Vec<_> = (0..8).map(|_| pool.take(1 << 20)).collect();
        drop(many);
        assert!(pool.0.lock().unwrap().bytes <= CACHED_BYTES_MAX);
        let buf = pool.take(4096);
        drop(pool);
        assert_eq!(buf.len(), 4096);
    }
}
