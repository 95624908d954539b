//! What the tests share.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use relevo_disk::{
    Backing, DiskDriver, DriverKind, MemoryDisk, OpenOptions, PoolDisk, UringDisk, probe,
};
use relevo_replication::io::{DiskError, DiskOp, DiskOpKind, DiskReply, OpId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub(crate) type Outcome = Result<DiskReply, DiskError>;

/// A driver with a way to wait.
pub(crate) struct Disk {
    driver: Box<dyn DiskDriver>,
    next: u64,
    done: BTreeMap<OpId, Outcome>,
    /// In the order of completion.
    pub(crate) order: Vec<OpId>,
}

impl Disk {
    pub(crate) fn new(kind: DriverKind, backing: Backing) -> Self {
        let backing = Arc::new(backing);
        let driver: Box<dyn DiskDriver> = match kind {
            DriverKind::Uring => Box::new(UringDisk::new(backing).unwrap()),
            DriverKind::Pool => Box::new(PoolDisk::new(backing).unwrap()),
            DriverKind::Memory => Box::new(MemoryDisk::new(backing).unwrap()),
        };
        Self {
            driver,
            next: 0,
            done: BTreeMap::new(),
            order: Vec::new(),
        }
    }

    pub(crate) fn start(&mut self, kind: DiskOpKind) -> OpId {
        let op = OpId(self.next);
        self.next += 1;
        self.driver.submit(DiskOp { op, kind });
        op
    }

    pub(crate) fn wait(&mut self, op: OpId) -> Outcome {
        self.driver.flush_submissions();
        let mut completed = Vec::new();
        loop {
            // The counter first: a completion after this makes it readable again.
            match rustix::io::read(self.driver.wake_fd(), &mut [0; 8]) {
                Ok(_) | Err(_) => {}
            }
            self.driver.poll_completions(&mut completed);
            for (op, outcome) in completed.drain(..) {
                self.order.push(op);
                assert!(self.done.insert(op, outcome).is_none(), "{op:?} twice");
            }
            if let Some(outcome) = self.done.remove(&op) {
                return outcome;
            }
            let patience = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            let fd = self.driver.wake_fd();
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => panic!("{op:?} did not complete within 20 s"),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub(crate) fn run(&mut self, kind: DiskOpKind) -> Outcome {
        let op = self.start(kind);
        self.wait(op)
    }
}

/// The drivers that work here.
pub(crate) fn kinds(test: &str) -> Vec<DriverKind> {
    let choice = probe();
    if choice.kind == DriverKind::Uring {
        return vec![DriverKind::Uring, DriverKind::Pool, DriverKind::Memory];
    }
    said::skip(&format!("{test} with io_uring"), &choice.reason);
    vec![DriverKind::Pool, DriverKind::Memory]
}

/// A file of `len` bytes of a pattern, on the filesystem of the build (not a tmpfs, mostly).
pub(crate) fn file(dir: &Path, len: usize) -> PathBuf {
    let path = dir.join("backing");
    fs::write(&path, pattern(len)).unwrap();
    path
}

pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 31 % 251) as u8 + 1).collect()
}

/// A directory beside the test binary: on a disk, where direct I/O works.
pub(crate) fn dir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("relevo-disk-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .unwrap()
}

pub(crate) fn open(path: &Path, buffered: bool) -> Backing {
    let options = OpenOptions {
        buffered,
        ..OpenOptions::default()
    };
    Backing::open(path, &options).unwrap()
}
