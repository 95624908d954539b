//! Virtual time: a queue of what will happen, in order of time and then of entry.

use std::{cmp::Ordering, collections::BinaryHeap, time::Duration};

use relevo_types::Time;

/// What will happen, and the clock that moves when it does.
#[derive(Debug)]
pub struct Queue<E> {
    now: Time,
    entries: u64,
    heap: BinaryHeap<Entry<E>>,
}

#[derive(Debug)]
struct Entry<E> {
    at: Time,
    order: u64,
    event: E,
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Self {
            now: Time::ZERO,
            entries: 0,
            heap: BinaryHeap::new(),
        }
    }
}

impl<E> Queue<E> {
    /// The present.
    #[must_use]
    pub const fn now(&self) -> Time {
        self.now
    }

    /// How many events were entered; a measure of the work of a run.
    #[must_use]
    pub const fn entered(&self) -> u64 {
        self.entries
    }

    /// Lets an event happen after a while.
    pub fn after(&mut self, delay: Duration, event: E) {
        self.at(self.now + delay, event);
    }

    /// Lets an event happen at a moment, at once if that is past.
    pub fn at(&mut self, at: Time, event: E) {
        self.entries += 1;
        self.heap.push(Entry {
            at: at.max(self.now),
            order: self.entries,
            event,
        });
    }

    /// Moves the clock to the next event and takes it.
    pub fn take(&mut self) -> Option<E> {
        let entry = self.heap.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }
}

// Reversed: the heap gives its greatest entry first, and the earliest is wanted.
impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<E> Eq for Entry<E> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earliest_first_then_in_order_of_entry() {
        let mut queue = Queue::default();
        queue.after(Duration::from_secs(2), 'c');
        queue.after(Duration::from_secs(1), 'a');
        queue.after(Duration::from_secs(1), 'b');
        let order: String = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(order, "abc");
        assert_eq!(queue.now(), Time(2_000_000_000));
    }
}
