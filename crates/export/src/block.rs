//! The one request type that NBD, FUSE and later exports produce, and who answers it.

use bytes::Bytes;
use relevo_types::ByteRange;

/// What an application asks of a volume. The exports have checked that the range lies within the
/// volume; alignment is checked where the export's clients can be told of it (see each export).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockRequest {
    /// Read a range. Answered with exactly `range.len` bytes.
    Read {
        /// Where.
        range: ByteRange,
    },
    /// Write. Answered with no bytes.
    Write {
        /// Where; `range.len == data.len()`.
        range: ByteRange,
        /// What. Starts at a multiple of 4096 in memory, so that it can go to a disk with
        /// `O_DIRECT` without a copy.
        data: Bytes,
        /// Answer only when it is on stable storage.
        fua: bool,
    },
    /// Make every write that was answered before durable, whichever connection it came by.
    Flush,
    /// The content is not needed any more. May be ignored, or done for a part of the range.
    Discard {
        /// Where.
        range: ByteRange,
        /// Answer only when it is on stable storage.
        fua: bool,
    },
    /// Make the range read as zeroes.
    Zero {
        /// Where.
        range: ByteRange,
        /// Storage may be released; otherwise it stays allocated so that later writes can't run
        /// out of space.
        may_release: bool,
        /// Answer only when it is on stable storage.
        fua: bool,
    },
    /// Which parts of the range are allocated (NBD only). Answered with extents; an empty answer
    /// means: all of it is allocated data.
    Status {
        /// Where.
        range: ByteRange,
        /// The client wants one extent only.
        single: bool,
    },
}

impl BlockRequest {
    /// The range that the request is about; empty for a flush.
    #[must_use]
    pub const fn range(&self) -> ByteRange {
        match self {
            Self::Read { range }
            | Self::Write { range, .. }
            | Self::Discard { range, .. }
            | Self::Zero { range, .. }
            | Self::Status { range, .. } => *range,
            Self::Flush => ByteRange::new(0, 0),
        }
    }
}

/// A run of a volume and what is stored there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes, more than 0.
    pub len: u64,
    /// Nothing is allocated.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

impl Extent {
    /// Allocated data of `len` bytes.
    #[must_use]
    pub const fn data(len: u64) -> Self {
        Self {
            len,
            hole: false,
            zero: false,
        }
    }
}

/// Why a request failed, in the words that NBD and the kernel share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, thiserror::Error)]
pub enum Errno {
    /// The volume is read-only here.
    #[error("not permitted")]
    NotPermitted,
    /// The disk failed, or nothing better fits.
    #[error("input/output error")]
    Io,
    /// No memory for it now.
    #[error("out of memory")]
    NoMemory,
    /// The request makes no sense: outside the volume, not aligned, unknown flags.
    #[error("invalid request")]
    Invalid,
    /// A write past the end, or the storage is full.
    #[error("no space left")]
    NoSpace,
    /// Too much data for one answer.
    #[error("too large")]
    Overflow,
    /// The export can't do this.
    #[error("not supported")]
    NotSupported,
    /// The export is going away: this node is not, or no longer, primary.
    #[error("the export is shutting down")]
    Shutdown,
}

impl Errno {
    /// The number on the wire of NBD (the specification, "Error values"; they equal Linux').
    #[must_use]
    pub const fn to_nbd(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// From the wire of NBD; the specification treats what is not in its list as `EINVAL`.
    #[must_use]
    pub const fn from_nbd(number: u32) -> Self {
        match number {
            1 => Self::NotPermitted,
            5 => Self::Io,
            12 => Self::NoMemory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        }
    }

    /// For an answer to the kernel: numbers that the block layer and file systems know. A device
    /// that is going away reads as `EIO`, the one error that every file system handles.
    #[must_use]
    pub const fn to_kernel(self) -> i32 {
        match self {
            Self::NotPermitted => libc::EPERM,
            Self::Io | Self::Shutdown => libc::EIO,
            Self::NoMemory => libc::ENOMEM,
            Self::Invalid => libc::EINVAL,
            Self::NoSpace => libc::ENOSPC,
            Self::Overflow => libc::EOVERFLOW,
            Self::NotSupported => libc::EOPNOTSUPP,
        }
    }
}

/// Called once with the outcome of a request: the bytes of a read, empty otherwise. May be called
/// on any thread, also before `submit` returns.
pub type Completion = Box<dyn FnOnce(Result<Bytes, Errno>) + Send>;

/// A volume as the device exports see it: the data path implements it by handing the request to
/// the volume's thread.
pub trait BlockTarget: Send + Sync {
    /// Starts a request and returns at once; it must not wait for I/O, because the caller is the
    /// only thread that takes the kernel's requests. Dropping `done` without a call answers the
    /// request with an I/O error.
    fn submit(&self, request: BlockRequest, done: Completion);

    /// Size in bytes, a multiple of 4096; constant while exported.
    fn size(&self) -> u64;
}
