//! The io_uring driver: one ring per volume, used by the volume's thread only.
//!
//! Deferred task work (Linux 6.1) where there is: completions are then processed when this thread
//! asks, not in the middle of its other calls. The wake-up is a registered eventfd: polling the
//! ring itself was seen to miss the first completion of a ring with deferred work (Linux 6.18).

use std::{
    collections::VecDeque,
    io,
    marker::PhantomData,
    mem,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use io_uring::{
    IoUring, Probe, opcode, squeue,
    types::{self, SubmitArgs, Timespec},
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

/// Operations with the kernel at once; more wait in a queue here. Above what one volume's sessions
/// and resync have under way, and small in locked memory.
const RING_ENTRIES: u32 = 256;

/// How often a ring that says "busy" is asked again within one turn; each time completions are
/// taken, which is what frees it.
const BUSY_RETRIES_MAX: u32 = 100;

/// How long dropping a driver waits for the disk, in seconds. A disk that hangs longer keeps its
/// buffers: they are leaked, as the kernel may still write into them.
const DROP_WAIT_S: u64 = 10;

/// See the module. Must be used on the thread that made it.
pub struct UringDisk {
    ring: IoUring,
    context: Context,
    /// What the kernel works on, by the number that its completion carries.
    slots: Vec<Option<Work>>,
    free: Vec<usize>,
    /// Taken, not with the kernel.
    waiting: VecDeque<Work>,
    finished: Vec<Finished>,
    target: Target,
    /// The kernel counts it up with each completion.
    event: OwnedFd,
    /// A ring with deferred work belongs to the thread that made it.
    _one_thread: PhantomData<*const ()>,
}

/// How entries name the backing.
#[derive(Clone, Copy, Debug)]
struct Target {
    fd: types::Fd,
    flags: squeue::Flags,
}

/// Whether a ring can be made here and knows the operations; else why not.
pub(crate) fn is_usable() -> Result<(), String> {
    let ring = IoUring::new(4).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel has none, or it is filtered (seccomp)".to_owned(),
        Some(libc::EPERM) => {
            "it is forbidden here (kernel.io_uring_disabled or a container's filter)".to_owned()
        }
        _ => error.to_string(),
    })?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| format!("its operations can't be listed: {error}"))?;
    let needed = [
        (opcode::Read::CODE, "read"),
        (opcode::Write::CODE, "write"),
        (opcode::Fsync::CODE, "fsync"),
        (opcode::Fallocate::CODE, "fallocate"),
    ];
    match needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => Err(format!("it lacks `{name}` (Linux 5.6 has it)")),
        None => Ok(()),
    }
}

impl UringDisk {
    /// Sets up a ring for a backing.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new(backing: Arc<Backing>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_clamp()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(RING_ENTRIES)
            .or_else(|_| IoUring::builder().setup_clamp().build(RING_ENTRIES))?;
        let raw = backing.file().as_raw_fd();
        // Registering saves a reference count per operation; without it all works the same.
        let target = match ring.submitter().register_files(&[raw]) {
            Ok(()) => Target {
                fd: types::Fd(0),
                flags: squeue::Flags::FIXED_FILE,
            },
            Err(_) => Target {
                fd: types::Fd(raw),
                flags: squeue::Flags::empty(),
            },
        };
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let depth = ring.params().sq_entries() as usize;
        Ok(Self {
            ring,
            context: Context::new(backing),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::new(),
            finished: Vec::new(),
            target,
            event,
            _one_thread: PhantomData,
        })
    }

    fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Moves waiting work into the submission queue while there is room. Every slot has room in
    /// the queue: there are as many slots as entries.
    fn fill(&mut self) {
        while !self.waiting.is_empty() {
            let Some(slot) = self.free.pop() else { return };
            let Some(mut work) = self.waiting.pop_front() else {
                unreachable!("checked above")
            };
            let entry = entry(&work.call(&self.context), self.target).user_data(slot as u64);
            self.slots[slot] = Some(work);
            // SAFETY: the entry's pointers lead into the buffer of the work in `slots[slot]`,
            // which is neither moved out nor changed before its completion was taken (`reap`);
            // `drop` waits for the completions or leaks the slots. The descriptor is open as
            // long as the context's backing, which is dropped after the ring's last completion.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_err() {
                // Entries of an earlier turn that the kernel would not take yet.
                if let Some(work) = self.slots[slot].take() {
                    self.waiting.push_front(work);
                }
                self.free.push(slot);
                return;
            }
        }
    }

    /// Hands the submission queue to the kernel.
    fn enter(&mut self) {
        for _ in 0..BUSY_RETRIES_MAX {
            match self.ring.submit() {
                Ok(_) => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EBUSY | libc::EAGAIN) => self.reap(),
                    _ => {
                        tracing::error!(%error, "io_uring refuses submissions");
                        return;
                    }
                },
            }
        }
        tracing::warn!("io_uring stays busy; what was not taken is handed in again later");
    }

    /// Takes completions off the ring. Work that needs another call goes to the front of the
    /// waiting.
    fn reap(&mut self) {
        let mut again = Vec::new();
        for completion in self.ring.completion() {
            let slot = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
            let Some(work) = self.slots.get_mut(slot).and_then(Option::take) else {
                tracing::error!(slot, "io_uring completed what was not under way");
                continue;
            };
            self.free.push(slot);
            let result = usize::try_from(completion.result())
                .map_err(|_| Errno::from_raw_os_error(-completion.result()));
            match work.advance(result, &self.context) {
                Next::Again(work) => again.push(work),
                Next::Finished(finished) => self.finished.push(finished),
            }
        }
        for work in again {
            self.waiting.push_front(work);
        }
    }
}

impl DiskDriver for UringDisk {
    fn submit(&mut self, op: DiskOp) {
        match Work::new(op, &self.context) {
            Ok(work) => self.waiting.push_back(work),
            Err(finished) => self.finished.push(finished),
        }
    }

    fn flush_submissions(&mut self) {
        self.fill();
        if !self.ring.submission().is_empty() {
            self.enter();
        }
    }

    fn poll_completions(&mut self, completed: &mut Vec<(OpId, Result<DiskReply, DiskError>)>) {
        let (overflow, taskrun) = {
            let queue = self.ring.submission();
            (queue.cq_overflow(), queue.taskrun())
        };
        if overflow || taskrun {
            self.enter();
        }
        self.reap();
        if !self.waiting.is_empty() {
            self.flush_submissions();
        }
        completed.append(&mut self.finished);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        self.waiting.clear();
        let patience = Timespec::new().sec(DROP_WAIT_S);
        while self.under_way() > 0 {
            let args = SubmitArgs::new().timespec(&patience);
            match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    let left = self.under_way();
                    tracing::error!(%error, left, "the disk does not answer; its buffers are given up");
                    mem::forget(mem::take(&mut self.slots));
                    return;
                }
            }
            self.reap();
            self.waiting.clear();
            self.finished.clear();
        }
        // The kernel takes a closed ring apart later; the backing must be free at once.
        if self.target.flags.contains(squeue::Flags::FIXED_FILE)
            && let Err(error) = self.ring.submitter().unregister_files()
        {
            tracing::debug!(%error, "the backing stays in use a moment longer");
        }
    }
}

impl std::fmt::Debug for UringDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringDisk")
            .field("under_way", &self.under_way())
            .field(
                "waiting",
                &self.waiting.iter().map(Work::op).collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}

fn entry(call: &Call, target: Target) -> squeue::Entry {
    let fd = target.fd;
    let entry = match *call {
        Call::Read { into, len, offset } => opcode::Read::new(fd, into, call_len(len))
            .offset(offset)
            .build(),
        Call::Write { from, len, offset } => opcode::Write::new(fd, from, call_len(len))
            .offset(offset)
            .build(),
        Call::Fallocate { mode, range } => opcode::Fallocate::new(fd, range.len)
            .offset(range.offset)
            .mode(mode)
            .build(),
        Call::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    };
    entry.flags(target.flags)
}

/// A call's length for the ring. `Work` keeps it at 1 GiB or less; were it more, the transfer
/// would be short and go on.
fn call_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(1 << 30)
}
