//! The thread-pool driver: a few threads make blocking calls. For kernels and containers that
//! refuse io_uring.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use relevo_replication::io::{DiskError, DiskOp, DiskReply, OpId};
use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

use crate::{
    backing::Backing,
    driver::DiskDriver,
    work::{Call, Context, Finished, Next, Work},
};

/// Threads per volume: enough to keep a disk's queue busy at the depth where a fallback is
/// used, few enough for a machine with dozens of volumes.
const THREADS: usize = 4;

/// Stack of a thread, in bytes: it only makes system calls.
const STACK_LEN: usize = 128 << 10;

/// See the module.
#[derive(Debug)]
pub struct PoolDisk {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    taken: Vec<DiskOp>,
}

#[derive(Debug)]
struct Shared {
    context: Context,
    queue: Mutex<Queue>,
    work_to_do: Condvar,
    finished: Mutex<Vec<Finished>>,
    event: OwnedFd,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Work>,
    closed: bool,
}

impl PoolDisk {
    /// Starts the threads.
    ///
    /// # Errors
    /// No descriptor or thread to be had.
    pub fn new(backing: Arc<Backing>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            context: Context::new(backing),
            queue: Mutex::default(),
            work_to_do: Condvar::new(),
            finished: Mutex::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let mut disk = Self {
            shared,
            threads: Vec::new(),
            taken: Vec::new(),
        };
        for i in 0..THREADS {
            let shared = Arc::clone(&disk.shared);
            let thread = thread::Builder::new()
                .name(format!("relevo-disk-{i}"))
                .stack_size(STACK_LEN)
                .spawn(move || shared.run())?;
            disk.threads.push(thread);
        }
        Ok(disk)
    }
}

impl DiskDriver for PoolDisk {
    fn submit(&mut self, op: DiskOp) {
        self.taken.push(op);
    }

    fn flush_submissions(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let shared = &self.shared;
        let mut refused = Vec::new();
        let mut queue = lock(&shared.queue);
        for op in self.taken.drain(..) {
            match Work::new(op, &shared.context) {
                Ok(work) => {
                    queue.waiting.push_back(work);
                    shared.work_to_do.notify_one();
                }
                Err(finished) => refused.push(finished),
            }
        }
        drop(queue);
        for finished in refused {
            shared.report(finished);
        }
    }

    fn poll_completions(&mut self, completed: &mut Vec<(OpId, Result<DiskReply, DiskError>)>) {
        completed.append(&mut lock(&self.shared.finished));
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl Drop for PoolDisk {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.closed = true;
        queue.waiting.clear();
        drop(queue);
        self.shared.work_to_do.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a disk thread had panicked");
            }
        }
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let work = loop {
                if queue.closed {
                    return;
                }
                match queue.waiting.pop_front() {
                    Some(work) => break work,
                    None => {
                        queue = self
                            .work_to_do
                            .wait(queue)
                            .unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            drop(queue);
            self.report(perform(work, &self.context));
        }
    }

    fn report(&self, finished: Finished) {
        lock(&self.finished).push(finished);
        // Fails only when the counter is full, and then the descriptor is readable anyway.
        match rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            Ok(_) | Err(_) => {}
        }
    }
}

/// Makes an operation's calls, one after the other, on this thread.
pub(crate) fn perform(mut work: Work, context: &Context) -> Finished {
    loop {
        let result = make(&work.call(context), context);
        if result == Err(Errno::AGAIN) {
            thread::yield_now();
        }
        match work.advance(result, context) {
            Next::Again(again) => work = again,
            Next::Finished(finished) => return finished,
        }
    }
}

fn make(call: &Call, context: &Context) -> Result<usize, Errno> {
    let file = context.backing.file();
    let errno = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    match *call {
        Call::Read { into, len, offset } => {
            // SAFETY: `into` is `len` bytes inside the buffer of the `Work` that gave this call;
            // this thread owns that work and makes no other use of the buffer meanwhile.
            let into = unsafe { std::slice::from_raw_parts_mut(into, len) };
            file.read_at(into, offset).map_err(errno)
        }
        Call::Write { from, len, offset } => {
            // SAFETY: `from` is `len` initialised bytes inside the data of the `Work` that gave
            // this call, or of the context's zeroes; both outlive the call and are not changed.
            let from = unsafe { std::slice::from_raw_parts(from, len) };
            file.write_at(from, offset).map_err(errno)
        }
        Call::Fallocate { mode, range } => {
            let flags = rustix::fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
            rustix::fs::fallocate(file, flags, range.offset, range.len).map(|()| 0)
        }
        Call::Sync => rustix::fs::fdatasync(file).map(|()| 0),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic of another thread leaves lists that are still lists.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
