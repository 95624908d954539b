//! One operation on its way, independent of the driver: which system call is next, and what a
//! result means. Short transfers continue, unsupported ways to zero fall back to the next.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

use bytes::Bytes;
use relevo_replication::io::{DiskError, DiskOp, DiskOpKind, DiskReply, OpId};
use relevo_types::ByteRange;
use rustix::io::Errno;

use crate::{
    backing::{Backing, IoMode},
    buffer::{AlignedBuf, BUFFER_ALIGN, BufferPool},
};

/// Result of an operation, as drivers hand it out.
pub(crate) type Finished = (OpId, Result<DiskReply, DiskError>);

/// The most bytes of one read or write call: Linux moves at most 2 GiB less a page.
const CALL_MAX: usize = 1 << 30;

/// Zeroes written with one call where the disk has no way to zero by itself.
const ZEROES_LEN: usize = 256 << 10;

/// A call that says "not now" is made again this often before the operation fails. Interrupted
/// calls are made again without limit.
const BUSY_RETRIES_MAX: u8 = 100;

/// What every operation of a driver shares.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) backing: Arc<Backing>,
    pub(crate) buffers: BufferPool,
    /// The best way to zero that was not refused so far, a [`ZeroWith`].
    zero_with: AtomicU8,
    zeroes: OnceLock<Bytes>,
}

impl Context {
    pub(crate) fn new(backing: Arc<Backing>) -> Self {
        Self {
            backing,
            buffers: BufferPool::new(),
            zero_with: AtomicU8::new(ZeroWith::Punch as u8),
            zeroes: OnceLock::new(),
        }
    }

    fn zero_with(&self) -> ZeroWith {
        match self.zero_with.load(Ordering::Relaxed) {
            0 => ZeroWith::Punch,
            1 => ZeroWith::ZeroRange,
            _ => ZeroWith::Writes,
        }
    }

    fn zeroes(&self) -> &Bytes {
        self.zeroes.get_or_init(|| {
            let mut buf = self.buffers.take(ZEROES_LEN);
            buf.as_mut().fill(0);
            buf.into_bytes()
        })
    }
}

/// How a range is zeroed, best first. On block devices the first two are discard-with-zeroes
/// and the device's own zeroing (with a fallback inside the kernel).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum ZeroWith {
    Punch = 0,
    ZeroRange = 1,
    Writes = 2,
}

#[derive(Debug)]
enum Kind {
    Read { buf: AlignedBuf, offset: u64 },
    Write { data: Bytes, offset: u64 },
    Zero { range: ByteRange, with: ZeroWith },
    Flush,
}

/// An operation that was taken. Owns its buffer until it is finished: while a call is under way
/// the kernel uses the memory.
#[derive(Debug)]
pub(crate) struct Work {
    op: OpId,
    kind: Kind,
    /// Bytes done.
    done: u64,
    busy_retries: u8,
}

/// The next system call of an operation. Pointers stay valid while the [`Work`] lives and is
/// not advanced.
#[derive(Debug)]
pub(crate) enum Call {
    Read {
        into: *mut u8,
        len: usize,
        offset: u64,
    },
    Write {
        from: *const u8,
        len: usize,
        offset: u64,
    },
    Fallocate {
        mode: i32,
        range: ByteRange,
    },
    Sync,
}

/// What comes after a call's result.
#[derive(Debug)]
pub(crate) enum Next {
    /// Make the [`Work::call`] that is due now.
    Again(Work),
    Finished(Finished),
}

impl Work {
    /// Takes an operation, or refuses it: outside the backing, or not aligned for direct I/O.
    pub(crate) fn new(op: DiskOp, context: &Context) -> Result<Self, Finished> {
        let DiskOp { op, kind } = op;
        let (what, range) = match &kind {
            DiskOpKind::Read(range) => ("read", *range),
            DiskOpKind::Write { offset, data } => {
                ("write", ByteRange::new(*offset, data.len() as u64))
            }
            DiskOpKind::Zero(range) => ("zero", *range),
            DiskOpKind::Flush => ("flush", ByteRange::new(0, 0)),
        };
        let refuse = |reason: String| (op, Err(DiskError { what, reason }));
        let backing = &context.backing;
        match range.checked_end() {
            Some(end) if end <= backing.size() => {}
            _ => {
                return Err(refuse(format!(
                    "{range:?} is past the end of {} ({} bytes)",
                    backing.path().display(),
                    backing.size()
                )));
            }
        }
        let alignment = backing.alignment();
        if !range.offset.is_multiple_of(alignment) || !range.len.is_multiple_of(alignment) {
            return Err(refuse(format!(
                "{range:?} is not aligned to the {alignment} bytes that the disk wants"
            )));
        }
        let kind = match kind {
            DiskOpKind::Read(range) => {
                let len = usize::try_from(range.len).map_err(|_| refuse("too long".to_owned()))?;
                if len == 0 {
                    return Err((op, Ok(DiskReply::Data(Bytes::new()))));
                }
                Kind::Read {
                    buf: context.buffers.take(len),
                    offset: range.offset,
                }
            }
            DiskOpKind::Write { data, offset } => Kind::Write {
                data: aligned(data, context),
                offset,
            },
            DiskOpKind::Zero(range) => Kind::Zero {
                range,
                with: context.zero_with(),
            },
            DiskOpKind::Flush => Kind::Flush,
        };
        if range.len == 0 && !matches!(kind, Kind::Flush) {
            return Err((op, Ok(DiskReply::Done)));
        }
        Ok(Self {
            op,
            kind,
            done: 0,
            busy_retries: 0,
        })
    }

    /// The operation.
    pub(crate) const fn op(&self) -> OpId {
        self.op
    }

    /// The call that is due.
    pub(crate) fn call(&mut self, context: &Context) -> Call {
        // What is done is at most the length, which came from a usize.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "bounded by a buffer's length"
        )]
        let done = self.done as usize;
        match &mut self.kind {
            Kind::Read { buf, offset } => {
                let rest = &mut buf.as_mut()[done..];
                Call::Read {
                    len: rest.len().min(CALL_MAX),
                    into: rest.as_mut_ptr(),
                    offset: *offset + self.done,
                }
            }
            Kind::Write { data, offset } => {
                let rest = &data[done..];
                Call::Write {
                    len: rest.len().min(CALL_MAX),
                    from: rest.as_ptr(),
                    offset: *offset + self.done,
                }
            }
            Kind::Zero { range, with } => match with {
                ZeroWith::Punch => Call::Fallocate {
                    mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    range: *range,
                },
                ZeroWith::ZeroRange => Call::Fallocate {
                    mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                    range: *range,
                },
                ZeroWith::Writes => {
                    let zeroes = context.zeroes();
                    let rest = usize::try_from(range.len - self.done).unwrap_or(usize::MAX);
                    Call::Write {
                        from: zeroes.as_ptr(),
                        len: rest.min(zeroes.len()),
                        offset: range.offset + self.done,
                    }
                }
            },
            Kind::Flush => Call::Sync,
        }
    }

    /// Takes the result of the call: bytes moved, 0 for `fallocate` and sync.
    pub(crate) fn advance(mut self, result: Result<usize, Errno>, context: &Context) -> Next {
        let moved = match result {
            Ok(moved) => moved as u64,
            Err(Errno::INTR) => return Next::Again(self),
            Err(Errno::AGAIN) if self.busy_retries < BUSY_RETRIES_MAX => {
                self.busy_retries += 1;
                return Next::Again(self);
            }
            Err(errno) => {
                if self.zero_otherwise(errno, context) {
                    return Next::Again(self);
                }
                return self.failed(&io::Error::from(errno).to_string());
            }
        };
        let len = match &self.kind {
            Kind::Read { buf, .. } => buf.len() as u64,
            Kind::Write { data, .. } => data.len() as u64,
            Kind::Zero { range, with } if *with == ZeroWith::Writes => range.len,
            Kind::Zero { .. } | Kind::Flush => return self.finished(),
        };
        self.done += moved;
        if self.done >= len {
            self.finished()
        } else if moved == 0 {
            let done = self.done;
            self.failed(&format!(
                "the disk ended after {done} of {len} bytes: it was truncated or shrunk"
            ))
        } else {
            Next::Again(self)
        }
    }

    /// After a refused `fallocate`: whether there is another way.
    fn zero_otherwise(&mut self, errno: Errno, context: &Context) -> bool {
        let Kind::Zero { with, .. } = &mut self.kind else {
            return false;
        };
        if !matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS) {
            return false;
        }
        *with = match with {
            ZeroWith::Punch => ZeroWith::ZeroRange,
            ZeroWith::ZeroRange => ZeroWith::Writes,
            ZeroWith::Writes => return false,
        };
        context.zero_with.fetch_max(*with as u8, Ordering::Relaxed);
        true
    }

    fn finished(self) -> Next {
        let reply = match self.kind {
            Kind::Read { buf, .. } => DiskReply::Data(buf.into_bytes()),
            Kind::Write { .. } | Kind::Zero { .. } | Kind::Flush => DiskReply::Done,
        };
        Next::Finished((self.op, Ok(reply)))
    }

    fn failed(self, reason: &str) -> Next {
        let what = match self.kind {
            Kind::Read { .. } => "read",
            Kind::Write { .. } => "write",
            Kind::Zero { .. } => "zero",
            Kind::Flush => "flush",
        };
        let reason = reason.to_owned();
        Next::Finished((self.op, Err(DiskError { what, reason })))
    }
}

/// The data in memory that direct I/O accepts.
fn aligned(data: Bytes, context: &Context) -> Bytes {
    let direct = *context.backing.mode() == IoMode::Direct;
    if direct && !data.as_ptr().addr().is_multiple_of(BUFFER_ALIGN) && !data.is_empty() {
        context.buffers.copy(&data).into_bytes()
    } else {
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::OpenOptions;

    fn context(dir: &tempfile::TempDir) -> Context {
        let path = dir.path().join("backing");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let options = OpenOptions {
            buffered: true,
            ..OpenOptions::default()
        };
        Context::new(Arc::new(Backing::open(&path, &options).unwrap()))
    }

    fn work(kind: DiskOpKind, context: &Context) -> Work {
        Work::new(DiskOp { op: OpId(1), kind }, context).unwrap()
    }

    #[test]
    fn a_short_write_continues_where_it_stopped_and_interrupts_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let context = context(&dir);
        let data = Bytes::from(vec![2; 8192]);
        let write = work(DiskOpKind::Write { offset: 4096, data }, &context);
        let Next::Again(write) = write.advance(Ok(512), &context) else {
            panic!()
        };
        let Next::Again(mut write) = write.advance(Err(Errno::INTR), &context) else {
            panic!()
        };
        let Call::Write { len, offset, .. } = write.call(&context) else {
            panic!()
        };
        assert_eq!((len, offset), (8192 - 512, 4096 + 512));
        let Next::Finished((OpId(1), Ok(DiskReply::Done))) = write.advance(Ok(7680), &context)
        else {
            panic!()
        };
    }

    #[test]
    fn a_read_of_nothing_is_an_error_and_busy_ends() {
        let dir = tempfile::tempdir().unwrap();
        let context = context(&dir);
        let read = || work(DiskOpKind::Read(ByteRange::new(0, 4096)), &context);
        let Next::Finished((_, Err(error))) = read().advance(Ok(0), &context) else {
            panic!()
        };
        assert!(error.to_string().contains("0 of 4096"), "{error}");
        let mut turns = 0;
        let mut next = Next::Again(read());
        while let Next::Again(work) = next {
            turns += 1;
            assert!(turns < 1000, "a disk that is always busy must fail");
            next = work.advance(Err(Errno::AGAIN), &context);
        }
    }

    #[test]
    fn zeroing_falls_back_to_writing_and_remembers() {
        let dir = tempfile::tempdir().unwrap();
        let context = context(&dir);
        let zero = || work(DiskOpKind::Zero(ByteRange::new(0, 512 << 10)), &context);
        let Next::Again(step) = zero().advance(Err(Errno::OPNOTSUPP), &context) else {
            panic!()
        };
        let Next::Again(mut step) = step.advance(Err(Errno::OPNOTSUPP), &context) else {
            panic!()
        };
        let Call::Write { len, offset: 0, .. } = step.call(&context) else {
            panic!()
        };
        assert_eq!(len, ZEROES_LEN);
        let Next::Again(step) = step.advance(Ok(ZEROES_LEN), &context) else {
            panic!()
        };
        let Next::Finished((_, Ok(_))) = step.advance(Ok(ZEROES_LEN), &context) else {
            panic!()
        };
        assert!(matches!(zero().call(&context), Call::Write { .. }));
        // Any other error is one.
        let Next::Finished((_, Err(_))) = zero().advance(Err(Errno::NOSPC), &context) else {
            panic!()
        };
    }
}
