//! Counts what a test's thread allocates, for tests of paths that must not.
//!
//! ```ignore
//! #[global_allocator]
//! static ALLOCATOR: allocations::Counting = allocations::Counting;
//! ```

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting.
#[derive(Clone, Copy, Debug)]
pub struct Counting;

/// How often this thread has allocated memory, or grown what it had, since it began. 0 for ever if
/// [`Counting`] is not the global allocator.
#[must_use]
pub fn so_far() -> u64 {
    COUNT.with(Cell::get)
}

fn count() {
    // A thread that ends has no counter any more, and nobody who would ask.
    if COUNT.try_with(|count| count.set(count.get() + 1)).is_err() {}
}

// SAFETY: everything is the system allocator's; counting allocates nothing and can't panic: the counter is
// a constant at first and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.realloc(at, layout, len) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}
