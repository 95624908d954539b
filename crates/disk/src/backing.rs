//! Opening a backing file or device for a daemon's own use.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt as _, FileTypeExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, SeekFrom},
    io::Errno,
};

use crate::buffer::BufferPool;

/// How to open a backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Open for reading only: every write fails.
    pub read_only: bool,
    /// Go through the page cache even where direct I/O works.
    pub buffered: bool,
}

/// How reads and writes reach the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoMode {
    /// Past the page cache.
    Direct,
    /// Through the page cache; durable after a flush all the same.
    Buffered {
        /// Why not direct.
        reason: String,
    },
}

/// Why a backing could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is there.
    #[error(
        "{path} does not exist; if it was moved, move it back, else remove and create the replica on this node"
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// Another process has it.
    #[error("{path} is in use{how}; stop what uses it, or give the replica another backing")]
    InUse {
        /// The path.
        path: PathBuf,
        /// By whom, as far as known, with a leading space.
        how: &'static str,
    },
    /// A directory, a pipe, ...
    #[error("{path} is neither a file nor a block device; give a path of one")]
    WrongKind {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// An open backing. While it is open no second daemon can open it: a file is locked (`flock`), a
/// device is opened exclusively, which also refuses a mounted one.
#[derive(Debug)]
pub struct Backing {
    file: File,
    path: PathBuf,
    size: u64,
    is_device: bool,
    mode: IoMode,
    alignment: u64,
}

impl Backing {
    /// Opens a file or block device.
    ///
    /// # Errors
    /// See [`OpenError`]; each says what to do.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        let system = |what| {
            move |source: io::Error| OpenError::System {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let kind = match fs::metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(OpenError::Missing {
                    path: path.to_owned(),
                });
            }
            Err(error) => return Err(system("look at")(error)),
        };
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            return Err(OpenError::WrongKind {
                path: path.to_owned(),
            });
        }
        let (file, mut mode) = open_file(path, options, is_device)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(OpenError::InUse {
                    path: path.to_owned(),
                    how: " by another process (a running daemon, or one that is just ending)",
                });
            }
            Err(error) => return Err(system("lock")(error.into())),
        }
        let size =
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| system("size")(e.into()))?;
        let alignment = if mode == IoMode::Direct {
            match direct_alignment(&file, size).map_err(system("read"))? {
                Some(alignment) => alignment,
                None => {
                    mode = leave_direct(&file).map_err(system("set flags of"))?;
                    1
                }
            }
        } else {
            1
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            size,
            is_device,
            mode,
            alignment,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes when it was opened.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// A block device rather than a file.
    #[must_use]
    pub const fn is_device(&self) -> bool {
        self.is_device
    }

    /// A file on tmpfs: no disk is behind it, and nothing is waited for.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        /// `TMPFS_MAGIC` of Linux' `magic.h`.
        const TMPFS: u64 = 0x0102_1994;
        rustix::fs::fstatfs(&self.file).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(TMPFS))
    }

    /// How I/O reaches the disk.
    #[must_use]
    pub const fn mode(&self) -> &IoMode {
        &self.mode
    }

    /// Offsets, lengths and memory of every read and write are multiples of this many bytes:
    /// 1 when buffered, 512 or 4096 when direct.
    #[must_use]
    pub const fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The open file.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for Backing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // A ring that the kernel is still taking apart may hold the file: unlock, don't just close.
        if let Err(error) = rustix::fs::flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(path = %self.path.display(), %error, "unlocking failed");
        }
    }
}

fn open_file(
    path: &Path,
    options: &OpenOptions,
    is_device: bool,
) -> Result<(File, IoMode), OpenError> {
    let access = if options.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let mut flags = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    if is_device {
        // Without O_CREAT, O_EXCL on a block device fails while it is mounted or claimed.
        flags |= OFlags::EXCL;
    }
    let open = |flags| rustix::fs::open(path, flags, Mode::empty());
    let buffered = |reason: &str| IoMode::Buffered {
        reason: reason.to_owned(),
    };
    let opened = if options.buffered {
        open(flags).map(|fd| (fd, buffered("asked for")))
    } else {
        match open(flags | OFlags::DIRECT) {
            Err(Errno::INVAL) => {
                open(flags).map(|fd| (fd, buffered("the filesystem refuses direct I/O")))
            }
            other => other.map(|fd| (fd, IoMode::Direct)),
        }
    };
    match opened {
        Ok((fd, mode)) => Ok((File::from(fd), mode)),
        Err(Errno::BUSY) => Err(OpenError::InUse {
            path: path.to_owned(),
            how: " (mounted, or part of another device)",
        }),
        Err(error) => Err(OpenError::System {
            what: "open",
            path: path.to_owned(),
            source: error.into(),
        }),
    }
}

/// The alignment that direct reads need, found by trying: what `statx` and the device report is
/// missing on older kernels and wrong on some filesystems. `None`: direct reads don't work.
fn direct_alignment(file: &File, size: u64) -> io::Result<Option<u64>> {
    if size < 4096 {
        // Nothing to try on. Every replica is larger; the strictest is safe.
        return Ok(Some(4096));
    }
    let mut buf = BufferPool::new().take(4096);
    for len in [512, 4096] {
        match file.read_at(&mut buf.as_mut()[..len], 0) {
            Ok(_) => return Ok(Some(len as u64)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn leave_direct(file: &File) -> io::Result<IoMode> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?;
    Ok(IoMode::Buffered {
        reason: "direct reads fail on this filesystem".to_owned(),
    })
}
