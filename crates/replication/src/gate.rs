//! The order of overlapping I/O on one replica.
//!
//! Every local read and write passes here. Entries are served first come, first served per
//! block: an entry waits for every earlier one that it conflicts with, granted or waiting, so
//! nothing starves and two writes to a block reach the disk in the order in which they came.
//! Reads share; writes exclude. The owner decides how long it stays: an application write stays
//! until every in-sync replica has it, so that nobody reads or copies what may yet be lost.

use std::mem;

use relevo_types::BlockRange;

use crate::{jobs::JobId, window::Window};

/// Whether others may be on the same blocks at the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    /// A read.
    Shared,
    /// A write.
    Exclusive,
}

#[derive(Debug)]
struct Entry {
    blocks: BlockRange,
    access: Access,
    /// Earlier entries that it waits for.
    waits_for: usize,
}

/// The entries, in the order of their ids, which is the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    entries: Window<JobId, Entry>,
    /// Room for the next list of granted jobs.
    room: Vec<JobId>,
}

impl Entry {
    fn conflicts(&self, blocks: BlockRange, access: Access) -> bool {
        let shared = self.access == Access::Shared && access == Access::Shared;
        !shared && self.blocks.overlaps(&blocks)
    }
}

impl Gate {
    /// Enters a job whose id is higher than those of all present. True: it may go on at once;
    /// false: [`Gate::leave`] will name it later.
    pub(crate) fn enter(&mut self, job: JobId, blocks: BlockRange, access: Access) -> bool {
        debug_assert!(
            self.entries.last().is_none_or(|(last, _)| *last < job),
            "jobs enter the gate in order"
        );
        let waits_for = self
            .entries
            .values()
            .filter(|entry| entry.conflicts(blocks, access))
            .count();
        self.entries.insert(
            job,
            Entry {
                blocks,
                access,
                waits_for,
            },
        );
        waits_for == 0
    }

    /// Takes a job out, granted or waiting. Gives the jobs that may now go on, oldest first; hand the list back
    /// with [`Gate::reuse`].
    pub(crate) fn leave(&mut self, job: JobId) -> Vec<JobId> {
        let Some(gone) = self.entries.remove(&job) else {
            return Vec::new();
        };
        let mut granted = mem::take(&mut self.room);
        for (id, entry) in self.entries.after_mut(&job) {
            if entry.conflicts(gone.blocks, gone.access) {
                entry.waits_for -= 1;
                if entry.waits_for == 0 {
                    granted.push(*id);
                }
            }
        }
        granted
    }

    /// Takes back a list, for its room.
    pub(crate) fn reuse(&mut self, mut list: Vec<JobId>) {
        list.clear();
        self.room = list;
    }

    /// Two granted entries that exclude each other; none, if the gate works.
    pub(crate) fn broken_pair(&self) -> Option<(JobId, JobId)> {
        let granted = || {
            let entries = self.entries.iter();
            entries.filter(|(_, entry)| entry.waits_for == 0)
        };
        granted().find_map(|(id, entry)| {
            granted()
                .take_while(|(other, _)| *other < id)
                .find(|(_, other)| other.conflicts(entry.blocks, entry.access))
                .map(|(other, _)| (*other, *id))
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> BlockRange {
        BlockRange::new(first, count)
    }

    #[test]
    fn readers_share_and_writers_wait_their_turn() {
        use Access::{Exclusive, Shared};
        let mut gate = Gate::default();
        assert!(gate.enter(JobId(1), run(0, 4), Shared));
        assert!(gate.enter(JobId(2), run(2, 4), Shared));
        assert!(!gate.enter(JobId(3), run(3, 1), Exclusive));
        // A later reader does not overtake the waiting writer.
        assert!(!gate.enter(JobId(4), run(3, 1), Shared));
        assert!(gate.enter(JobId(5), run(9, 1), Exclusive));
        assert_eq!(gate.leave(JobId(1)), []);
        assert_eq!(gate.leave(JobId(2)), [JobId(3)]);
        assert_eq!(gate.broken_pair(), None);
        assert_eq!(gate.leave(JobId(3)), [JobId(4)]);
    }

    #[test]
    fn a_waiting_entry_can_leave() {
        let mut gate = Gate::default();
        assert!(gate.enter(JobId(1), run(0, 1), Access::Exclusive));
        assert!(!gate.enter(JobId(2), run(0, 2), Access::Exclusive));
        assert!(!gate.enter(JobId(3), run(1, 1), Access::Exclusive));
        assert_eq!(gate.leave(JobId(2)), [JobId(3)]);
        assert_eq!(gate.leave(JobId(2)), []);
        assert_eq!(gate.len(), 2);
    }
}
