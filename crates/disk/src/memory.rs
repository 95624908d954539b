//! The driver of backings in memory (tmpfs): calls are made at once, on the volume's thread.
//!
//! There is nothing to wait for but a copy. io_uring would hand each of these writes to a thread of the
//! kernel, since tmpfs promises nothing about not waiting: twice the processor time, measured.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use relevo_replication::io::{DiskError, DiskOp, DiskReply, OpId};
use rustix::event::{EventfdFlags, eventfd};

use crate::{
    backing::Backing,
    driver::DiskDriver,
    pool::perform,
    work::{Context, Finished, Work},
};

/// See the module.
#[derive(Debug)]
pub struct MemoryDisk {
    context: Context,
    taken: Vec<DiskOp>,
    finished: Vec<Finished>,
    /// Never counts: everything is finished when `flush_submissions` returns.
    event: OwnedFd,
}

impl MemoryDisk {
    /// A driver for a backing in memory.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn new(backing: Arc<Backing>) -> io::Result<Self> {
        Ok(Self {
            context: Context::new(backing),
            taken: Vec::new(),
            finished: Vec::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }
}

impl DiskDriver for MemoryDisk {
    fn submit(&mut self, op: DiskOp) {
        self.taken.push(op);
    }

    fn flush_submissions(&mut self) {
        for op in self.taken.drain(..) {
            let finished = match Work::new(op, &self.context) {
                Ok(work) => perform(work, &self.context),
                Err(finished) => finished,
            };
            self.finished.push(finished);
        }
    }

    fn poll_completions(&mut self, completed: &mut Vec<(OpId, Result<DiskReply, DiskError>)>) {
        completed.append(&mut self.finished);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
