//! A disk that fails when it is told to: a file behind FUSE.
//!
//! The file system has this one file and is mounted nowhere: daemons open it through the
//! descriptor of a detached mount (`/proc/<pid>/fd/<n>/disk`), so nothing is left whatever ends
//! first. Its one thread passes reads, writes, holes and flushes on to a file in the test's
//! directory, unless a [`Fault`] is switched on. Direct I/O and io_uring work on it.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyWrite, Request, SessionACL, WriteFlags,
};
use rustix::{
    fs::{FallocateFlags, Mode, OFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

/// The file's number; the root directory is 1.
const FILE: INodeNo = INodeNo(2);

/// Its name.
const NAME: &str = "disk";

/// A sector: what a torn write is cut at.
const SECTOR: usize = 512;

/// The attributes never change.
const VALID: Duration = Duration::from_secs(3600);

/// What is wrong with a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Reads fail with `EIO`.
    Read,
    /// Reads of blocks fail with `EIO` until they are written: what a medium that went bad does.
    Sectors,
    /// Writes fail with `EIO`; nothing of them is written.
    Write,
    /// Writes fail with `ENOSPC`; nothing of them is written.
    Full,
    /// The first half of the sectors of a write is written, then it fails with `EIO`.
    Torn,
    /// Flushes fail with `EIO`.
    Flush,
    /// Nothing is answered any more, until the fault is changed.
    Hang,
}

/// A file that daemons use as a backing.
#[derive(Debug)]
pub struct FaultyDisk {
    path: PathBuf,
    behind: PathBuf,
    switch: Arc<Switch>,
    // The mount goes first, and with it the session ends.
    _mount: OwnedFd,
    _session: BackgroundSession,
}

#[derive(Debug, Default)]
struct Switch {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    fault: Option<Fault>,
    /// How often the fault struck.
    hits: u64,
    /// Blocks that were written since then.
    rewritten: BTreeSet<u64>,
}

impl Switch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What strikes an operation for which the `relevant` ones matter. A hang ends here.
    fn strikes(&self, relevant: &[Fault]) -> Option<Fault> {
        let mut state = self.lock();
        if state.fault == Some(Fault::Hang) {
            state.hits += 1;
        }
        while state.fault == Some(Fault::Hang) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let fault = state.fault.filter(|fault| relevant.contains(fault));
        state.hits += u64::from(fault.is_some());
        fault
    }
}

impl Switch {
    /// Whether bad sectors strike a read.
    fn strikes_sectors(&self, offset: u64, len: u64) -> bool {
        let mut state = self.lock();
        let strikes = state.fault == Some(Fault::Sectors)
            && blocks_of(offset, len).any(|block| !state.rewritten.contains(&block));
        state.hits += u64::from(strikes);
        strikes
    }

    /// Something was written.
    fn wrote(&self, offset: u64, len: u64) {
        let mut state = self.lock();
        if state.fault == Some(Fault::Sectors) {
            state.rewritten.extend(blocks_of(offset, len));
        }
    }
}

fn blocks_of(offset: u64, len: u64) -> impl Iterator<Item = u64> {
    offset / 4096..(offset + len).div_ceil(4096)
}

impl FaultyDisk {
    /// A disk of `size` bytes that reads as zeroes, kept in a file `name` of `directory`.
    ///
    /// # Panics
    /// The kernel refuses: it needs root and FUSE.
    #[must_use]
    pub fn new(directory: &Path, name: &str, size: u64) -> Self {
        let behind = directory.join(name);
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&behind)
            .unwrap();
        file.set_len(size).unwrap();
        let switch = Arc::new(Switch::default());
        let disk = Disk {
            file,
            size,
            switch: Arc::clone(&switch),
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/fuse", flags, Mode::empty()).unwrap();
        let mount = mount(&device).unwrap();
        let session =
            fuser::Session::from_fd(disk, device, SessionACL::All, fuser::Config::default())
                .and_then(fuser::Session::spawn)
                .unwrap();
        let path = format!(
            "/proc/{}/fd/{}/{NAME}",
            std::process::id(),
            mount.as_raw_fd()
        );
        Self {
            path: path.into(),
            behind,
            switch,
            _mount: mount,
            _session: session,
        }
    }

    /// Whether such disks can be made; else why not.
    ///
    /// # Errors
    /// A sentence.
    pub fn is_possible() -> Result<(), String> {
        if Path::new("/dev/fuse").exists() {
            Ok(())
        } else {
            Err("there is no /dev/fuse".to_owned())
        }
    }

    /// What a daemon opens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file behind it, which never fails.
    #[must_use]
    pub fn behind(&self) -> &Path {
        &self.behind
    }

    /// Switches a fault on, or all off. Returns how often the one before struck.
    pub fn set(&self, fault: Option<Fault>) -> u64 {
        let mut state = self.switch.lock();
        state.fault = fault;
        state.rewritten.clear();
        self.switch.changed.notify_all();
        std::mem::take(&mut state.hits)
    }

    /// How often the fault struck since it was switched on.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.switch.lock().hits
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        // Whoever hangs could not even be killed.
        self.set(None);
    }
}

/// A mount of the file system behind `fuse` that is in no mount table.
fn mount(fuse: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};

    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    fsconfig_set_string(context, "source", "relevo-chaos")?;
    fsconfig_set_string(context, "fd", fuse.as_raw_fd().to_string())?;
    fsconfig_set_string(context, "rootmode", "40000")?;
    fsconfig_set_string(context, "user_id", "0")?;
    fsconfig_set_string(context, "group_id", "0")?;
    fsconfig_set_flag(context, "allow_other")?;
    fsconfig_create(context)?;
    fsmount(
        context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
    )
}

/// The file system.
#[derive(Debug)]
struct Disk {
    file: File,
    size: u64,
    switch: Arc<Switch>,
}

impl Disk {
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
            blksize: 4096,
            flags: 0,
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        match self
            .switch
            .strikes(&[Fault::Write, Fault::Full, Fault::Torn])
        {
            None => {
                self.file.write_all_at(data, offset).map_err(errno)?;
                self.switch.wrote(offset, data.len() as u64);
                Ok(())
            }
            Some(Fault::Full) => Err(Errno::ENOSPC),
            Some(Fault::Torn) => {
                let half = data.len() / 2 / SECTOR * SECTOR;
                self.file
                    .write_all_at(&data[..half], offset)
                    .map_err(errno)?;
                Err(Errno::EIO)
            }
            Some(_) => Err(Errno::EIO),
        }
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

impl fuser::Filesystem for Disk {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES;
        // Without them it is slower, no more.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == OsStr::new(NAME) {
            reply.entry(&VALID, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        number: INodeNo,
        _file: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        reply.attr(&VALID, &self.attributes(number));
    }

    fn open(&self, _request: &Request, _number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
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
        if self.switch.strikes(&[Fault::Read]).is_some() {
            return reply.error(Errno::EIO);
        }
        let len = u64::from(size).min(self.size.saturating_sub(offset));
        if self.switch.strikes_sectors(offset, len) {
            return reply.error(Errno::EIO);
        }
        let mut buffer = vec![0; usize::try_from(len).unwrap_or(0)];
        match self.file.read_exact_at(&mut buffer, offset) {
            Ok(()) => reply.data(&buffer),
            Err(error) => reply.error(errno(error)),
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
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let fits = offset
            .checked_add(data.len() as u64)
            .is_some_and(|end| end <= self.size);
        let Some(len) = u32::try_from(data.len()).ok().filter(|_| fits) else {
            return reply.error(Errno::ENOSPC);
        };
        match Self::write(self, offset, data) {
            Ok(()) => reply.written(len),
            Err(error) => reply.error(error),
        }
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
        // Not passed on: the machine's own power is not what these tests cut.
        match self.switch.strikes(&[Fault::Flush]) {
            Some(_) => reply.error(Errno::EIO),
            None => reply.ok(),
        }
    }

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
        match self.switch.strikes(&[Fault::Write, Fault::Full]) {
            Some(Fault::Full) => return reply.error(Errno::ENOSPC),
            Some(_) => return reply.error(Errno::EIO),
            None => {}
        }
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        match rustix::fs::fallocate(&self.file, mode, offset, length) {
            Ok(()) => {
                self.switch.wrote(offset, length);
                reply.ok();
            }
            Err(error) => reply.error(errno(error.into())),
        }
    }

    fn lseek(
        &self,
        _request: &Request,
        _number: INodeNo,
        _file: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let offset = offset.cast_unsigned();
        let to = match whence {
            libc::SEEK_DATA => rustix::fs::SeekFrom::Data(offset),
            libc::SEEK_HOLE => rustix::fs::SeekFrom::Hole(offset),
            _ => return reply.error(Errno::EINVAL),
        };
        match rustix::fs::seek(&self.file, to) {
            Ok(found) => reply.offset(found.cast_signed()),
            Err(error) => reply.error(errno(error.into())),
        }
    }
}
