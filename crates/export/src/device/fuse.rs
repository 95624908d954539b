//! A FUSE file system with one file, the volume. Its thread does no I/O: it hands requests to the
//! [`BlockTarget`] and goes on; the answer is sent by whoever completes the request.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt, io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, SessionACL, WriteFlags,
};
use relevo_types::{BLOCK_SIZE, ByteRange};
use rustix::fs::{Mode, OFlags};

use crate::{
    block::{BlockRequest, BlockTarget, Errno},
    buffer::AlignedBuf,
};

/// Before the volume's name in the name of the file, which `losetup` shows.
pub(super) const FILE_PREFIX: &str = "relevo:";

/// The file's number; the root directory is 1.
const FILE: INodeNo = INodeNo(2);

/// Nothing but the data ever changes.
const ATTRIBUTES_VALID: Duration = Duration::from_secs(3600);

/// The largest request of the kernel: what its default page limit (256) gives.
const MAX_WRITE: u32 = 1 << 20;

/// Requests of the loop device under way at once: its queue depth is 128.
const MAX_BACKGROUND: u16 = 128;

/// Opens `/dev/fuse` for a new file system.
pub(super) fn open_device() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/fuse", flags, Mode::empty())
}

/// The requests of the kernel that wait for the volume; shared by the file system, which adds
/// them, their completions, and the export, which can answer them all at once.
pub(super) struct Pending {
    target: Arc<dyn BlockTarget>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Everything is answered with `EIO` from now on.
    dead: bool,
    next_id: u64,
    replies: HashMap<u64, KernelReply>,
}

/// An answer that is owed to the kernel.
enum KernelReply {
    Read(ReplyData),
    Write(ReplyWrite, u32),
    Done(ReplyEmpty),
}

impl KernelReply {
    fn send(self, result: Result<Bytes, Errno>) {
        match (self, result) {
            (Self::Read(reply), Ok(data)) => reply.data(&data),
            (Self::Write(reply, len), Ok(_)) => reply.written(len),
            (Self::Done(reply), Ok(_)) => reply.ok(),
            (Self::Read(reply), Err(errno)) => reply.error(kernel_errno(errno)),
            (Self::Write(reply, _), Err(errno)) => reply.error(kernel_errno(errno)),
            (Self::Done(reply), Err(errno)) => reply.error(kernel_errno(errno)),
        }
    }
}

fn kernel_errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.to_kernel())
}

impl Pending {
    pub(super) fn new(target: Arc<dyn BlockTarget>) -> Self {
        Self {
            target,
            waiting: Mutex::default(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting().replies.len()
    }

    /// Answers everything that waits, and everything from now on, with `EIO`. What the volume
    /// still completes is ignored.
    pub(super) fn kill(&self) {
        let replies = {
            let mut waiting = self.waiting();
            waiting.dead = true;
            std::mem::take(&mut waiting.replies)
        };
        for reply in replies.into_values() {
            reply.send(Err(Errno::Shutdown));
        }
    }

    fn submit(self: &Arc<Self>, request: BlockRequest, reply: KernelReply) {
        let expected = match &request {
            BlockRequest::Read { range } => range.len,
            _ => 0,
        };
        let id = {
            let mut waiting = self.waiting();
            if waiting.dead {
                drop(waiting);
                return reply.send(Err(Errno::Shutdown));
            }
            let id = waiting.next_id;
            waiting.next_id += 1;
            waiting.replies.insert(id, reply);
            id
        };
        let ticket = Ticket {
            pending: Arc::clone(self),
            id,
        };
        self.target.submit(
            request,
            Box::new(move |result| {
                // A short read would read as the end of the file: rather an error.
                let result = result.and_then(|data| {
                    let whole = expected == 0 || data.len() as u64 == expected;
                    if whole { Ok(data) } else { Err(Errno::Io) }
                });
                ticket.finish(result);
            }),
        );
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("waiting", &self.len())
            .finish_non_exhaustive()
    }
}

/// Stands for one waiting request in its completion; dropped without a call it answers `EIO`.
struct Ticket {
    pending: Arc<Pending>,
    id: u64,
}

impl Ticket {
    fn finish(&self, result: Result<Bytes, Errno>) {
        let reply = self.pending.waiting().replies.remove(&self.id);
        if let Some(reply) = reply {
            reply.send(result);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.finish(Err(Errno::Io));
    }
}

/// The file system.
#[derive(Debug)]
pub(super) struct FileSystem {
    file_name: String,
    size: u64,
    pending: Arc<Pending>,
}

impl FileSystem {
    pub(super) fn new(file_name: String, pending: Arc<Pending>) -> Self {
        Self {
            file_name,
            size: pending.target.size(),
            pending,
        }
    }

    /// Serves the mounted `/dev/fuse` descriptor in threads until the file system is gone.
    pub(super) fn serve(self, device: OwnedFd) -> io::Result<fuser::BackgroundSession> {
        let config = fuser::Config::default();
        fuser::Session::from_fd(self, device, SessionACL::All, config)?.spawn()
    }

    fn attributes(&self, number: INodeNo) -> FileAttr {
        let is_file = number == FILE;
        let epoch = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: number,
            size: if is_file { self.size } else { 0 },
            blocks: if is_file { self.size / 512 } else { 0 },
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_SIZE as u32,
            flags: 0,
        }
    }

    /// The part of a request within the volume, `None` for nothing.
    fn clamp(&self, offset: u64, len: u64) -> Option<ByteRange> {
        let len = len.min(self.size.saturating_sub(offset));
        (len > 0).then_some(ByteRange::new(offset, len))
    }
}

impl fuser::Filesystem for FileSystem {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is the nearest that is possible; a smaller one costs speed only.
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND);
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES;
        let _ = config.add_capabilities(wanted & config.capabilities());
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == OsStr::new(&self.file_name) {
            reply.entry(&ATTRIBUTES_VALID, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(fuser::Errno::ENOENT);
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        number: INodeNo,
        _file: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        reply.attr(&ATTRIBUTES_VALID, &self.attributes(number));
    }

    fn open(&self, _request: &Request, _number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // No page cache of our own below the device's; and writes side by side, which are no
        // danger to each other in a file that never grows.
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _request: &Request,
        _number: INodeNo,
        _file: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.clamp(offset, u64::from(size)) {
            Some(range) => self
                .pending
                .submit(BlockRequest::Read { range }, KernelReply::Read(reply)),
            None => reply.data(&[]),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _number: INodeNo,
        _file: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let range = ByteRange::new(offset, data.len() as u64);
        let inside = range.checked_end().is_some_and(|end| end <= self.size);
        let Some(len) = u32::try_from(data.len()).ok().filter(|_| inside) else {
            return reply.error(fuser::Errno::ENOSPC);
        };
        let request = BlockRequest::Write {
            range,
            data: AlignedBuf::copy_from(data).freeze(),
            fua: flags.0 & libc::O_DSYNC != 0,
        };
        self.pending.submit(request, KernelReply::Write(reply, len));
    }

    fn flush(
        &self,
        _request: &Request,
        _number: INodeNo,
        _file: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // The close of a descriptor; promises nothing.
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _number: INodeNo,
        _file: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.pending
            .submit(BlockRequest::Flush, KernelReply::Done(reply));
    }

    /// The loop device's discard and write-zeroes: the first arrives as a punched hole, and so may
    /// the second, hence holes must read as zeroes.
    fn fallocate(
        &self,
        _request: &Request,
        _number: INodeNo,
        _file: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let may_release = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => true,
            libc::FALLOC_FL_ZERO_RANGE => false,
            _ => return reply.error(fuser::Errno::EOPNOTSUPP),
        };
        let Some(range) = self.clamp(offset, length) else {
            return reply.ok();
        };
        let request = BlockRequest::Zero {
            range,
            may_release,
            fua: false,
        };
        self.pending.submit(request, KernelReply::Done(reply));
    }

    fn statfs(&self, _request: &Request, _number: INodeNo, reply: ReplyStatfs) {
        // The loop driver takes the granularity of discards from the block size.
        let block = BLOCK_SIZE as u32;
        reply.statfs(self.size / BLOCK_SIZE, 0, 0, 1, 0, block, 255, block);
    }
}
