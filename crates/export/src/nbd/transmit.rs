//! The transmission phase: requests understood and checked, replies formed.

use bytes::Bytes;
use relevo_types::ByteRange;
use relevo_wire::PayloadArena;

use super::{
    output::Output,
    proto::{
        BASE_ALLOCATION_ID, MAX_REQUEST, REQUEST_LEN, RequestHeader, SIMPLE_REPLY_MAGIC,
        STRUCTURED_REPLY_MAGIC, chunk, cmd, cmd_flag, state,
    },
    session::{CloseReason, Export, Staging, Step},
};
use crate::block::{BlockRequest, Errno, Extent};

/// Extents in one answer at most; a client asks on from where they end.
const MAX_EXTENTS: usize = 1024;

/// Payloads of which this much or more is missing are received in place; less goes through the staging
/// buffer, which may catch following requests in the same call.
pub(super) const DIRECT_MIN: usize = 64 << 10;

/// What has to be remembered of a request to answer it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Pending {
    header: RequestHeader,
}

impl Pending {
    /// Bytes that it holds in memory while under way.
    pub(super) const fn payload_bytes(&self) -> usize {
        match self.header.command {
            cmd::READ | cmd::WRITE => self.header.len as usize,
            _ => 0,
        }
    }
}

/// The receiving side: between requests, or within a payload.
#[derive(Debug, Default)]
pub(super) enum Incoming {
    /// A header is next.
    #[default]
    Header,
    /// The payload of an accepted write, in the session's arena.
    Payload { header: RequestHeader },
    /// The payload of a refused write, thrown away so that the stream stays in step.
    Skip {
        header: RequestHeader,
        left: usize,
        errno: Errno,
    },
}

impl Incoming {
    /// Nothing of a request was taken yet.
    pub(super) const fn is_idle(&self) -> bool {
        matches!(self, Self::Header)
    }

    /// A payload is being received.
    pub(super) const fn is_payload(&self) -> bool {
        matches!(self, Self::Payload { .. })
    }

    /// Understands the next part of what was received.
    pub(super) fn step(
        &mut self,
        staging: &mut Staging,
        arena: &mut PayloadArena,
        export: &Export,
        replies: &Replies,
    ) -> Step {
        match self {
            Self::Header => {
                let Some(bytes) = staging.take::<REQUEST_LEN>() else {
                    return Step::Wait;
                };
                let Some(header) = RequestHeader::decode(&bytes) else {
                    return Step::Close(CloseReason::Malformed(
                        "a request doesn't start with its magic number",
                    ));
                };
                self.begin(header, arena, export, replies)
            }
            Self::Payload { header } => {
                let taken = arena.fill(staging.bytes());
                staging.consume(taken);
                if arena.missing() > 0 {
                    return Step::Wait;
                }
                let header = *header;
                *self = Self::Header;
                write_request(header, arena.take())
            }
            Self::Skip {
                header,
                left,
                errno,
            } => {
                let count = staging.bytes().len().min(*left);
                staging.consume(count);
                *left -= count;
                if *left > 0 {
                    return Step::Wait;
                }
                let step = Step::Answer(Pending { header: *header }, Err(*errno));
                *self = Self::Header;
                step
            }
        }
    }

    fn begin(
        &mut self,
        header: RequestHeader,
        arena: &mut PayloadArena,
        export: &Export,
        replies: &Replies,
    ) -> Step {
        if header.command == cmd::DISC {
            return Step::Close(CloseReason::Disconnected);
        }
        let checked = check(&header, export, replies);
        let pending = Pending { header };
        if header.command == cmd::WRITE {
            *self = match checked {
                Ok(()) => {
                    arena.begin(header.len as usize);
                    Self::Payload { header }
                }
                Err(errno) => Self::Skip {
                    header,
                    left: header.len as usize,
                    errno,
                },
            };
            return Step::Again;
        }
        match checked.map(|()| request_of(&header, export)) {
            Err(errno) => Step::Answer(pending, Err(errno)),
            Ok(None) => Step::Answer(pending, Err(Errno::Invalid)),
            // A trim that covers no whole block: nothing to do, which a trim may always do.
            Ok(Some(BlockRequest::Discard { range, .. })) if range.len == 0 => {
                Step::Answer(pending, Ok(()))
            }
            Ok(Some(request)) => Step::Request(pending, request),
        }
    }
}

fn write_request(header: RequestHeader, data: Bytes) -> Step {
    let request = BlockRequest::Write {
        range: range_of(&header),
        data,
        fua: header.flags & cmd_flag::FUA != 0,
    };
    Step::Request(Pending { header }, request)
}

/// The block in bytes that writes must be aligned to.
fn block_of(export: &Export) -> u64 {
    u64::from(export.min_block.max(1))
}

const fn range_of(header: &RequestHeader) -> ByteRange {
    ByteRange::new(header.offset, header.len as u64)
}

/// Checks all that can be wrong with a request; the errors are those that libnbd's and nbdkit's
/// checks expect.
fn check(header: &RequestHeader, export: &Export, replies: &Replies) -> Result<(), Errno> {
    let extra_flags = match header.command {
        cmd::READ if replies.structured => cmd_flag::DF,
        cmd::READ | cmd::WRITE | cmd::FLUSH | cmd::TRIM => 0,
        cmd::WRITE_ZEROES => cmd_flag::NO_HOLE,
        cmd::BLOCK_STATUS if replies.allocation_context => cmd_flag::REQ_ONE,
        _ => return Err(Errno::Invalid),
    };
    // FUA is legal on every command once advertised, and without meaning on most.
    if header.flags & !(cmd_flag::FUA | extra_flags) != 0 {
        return Err(Errno::Invalid);
    }
    if header.command == cmd::FLUSH {
        return if header.offset == 0 && header.len == 0 {
            Ok(())
        } else {
            Err(Errno::Invalid)
        };
    }
    let changes = matches!(header.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    if changes && export.read_only {
        return Err(Errno::NotPermitted);
    }
    let carries_data = matches!(header.command, cmd::READ | cmd::WRITE);
    if header.len == 0 || (carries_data && header.len > MAX_REQUEST) {
        return Err(Errno::Invalid);
    }
    let inside = range_of(header)
        .checked_end()
        .is_some_and(|end| end <= export.size);
    let stores = matches!(header.command, cmd::WRITE | cmd::WRITE_ZEROES);
    if !inside {
        return Err(if stores {
            Errno::NoSpace
        } else {
            Errno::Invalid
        });
    }
    let block = block_of(export);
    let aligned =
        header.offset.is_multiple_of(block) && u64::from(header.len).is_multiple_of(block);
    if stores && !aligned {
        return Err(Errno::Invalid);
    }
    Ok(())
}

/// The request of a checked header; `None` for a command without one.
fn request_of(header: &RequestHeader, export: &Export) -> Option<BlockRequest> {
    let range = range_of(header);
    let fua = header.flags & cmd_flag::FUA != 0;
    Some(match header.command {
        cmd::READ => BlockRequest::Read { range },
        cmd::FLUSH => BlockRequest::Flush,
        cmd::TRIM => BlockRequest::Discard {
            range: shrink(range, block_of(export)),
            fua,
        },
        cmd::WRITE_ZEROES => BlockRequest::Zero {
            range,
            may_release: header.flags & cmd_flag::NO_HOLE == 0,
            fua,
        },
        cmd::BLOCK_STATUS => BlockRequest::Status {
            range,
            single: header.flags & cmd_flag::REQ_ONE != 0,
        },
        _ => return None,
    })
}

/// The whole blocks within a range; a trim is advice, so the rest may stay.
fn shrink(range: ByteRange, block: u64) -> ByteRange {
    let start = range.offset.next_multiple_of(block);
    let end = range.end() / block * block;
    ByteRange::new(start.min(range.end()), end.saturating_sub(start))
}

/// What was agreed on the form of replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Replies {
    /// Structured replies.
    pub(super) structured: bool,
    /// `base:allocation` may be asked.
    pub(super) allocation_context: bool,
}

impl Replies {
    /// A request is done; `data` are the bytes of a read.
    pub(super) fn success(&self, output: &mut Output, pending: &Pending, data: Bytes) {
        let header = &pending.header;
        match header.command {
            cmd::READ if data.len() != header.len as usize => {
                self.error(output, pending, Errno::Io);
            }
            cmd::READ if self.structured => {
                chunk_head(output, header, chunk::OFFSET_DATA, header.len + 8);
                output.put(&header.offset.to_be_bytes());
                output.put_bytes(data);
            }
            cmd::READ => {
                simple(output, header, 0);
                output.put_bytes(data);
            }
            cmd::BLOCK_STATUS => {
                let all = Extent::data(u64::from(header.len));
                self.extents(output, pending, std::iter::once(all));
            }
            _ => simple(output, header, 0),
        }
    }

    /// A request failed.
    pub(super) fn error(&self, output: &mut Output, pending: &Pending, errno: Errno) {
        let header = &pending.header;
        // These two may have no simple reply once structured ones are agreed on.
        let structured = self.structured && matches!(header.command, cmd::READ | cmd::BLOCK_STATUS);
        if !structured {
            return simple(output, header, errno.to_nbd());
        }
        let text = errno.to_string();
        let text_len = u16::try_from(text.len()).unwrap_or(0);
        chunk_head(output, header, chunk::ERROR, 6 + u32::from(text_len));
        output.put(&errno.to_nbd().to_be_bytes());
        output.put(&text_len.to_be_bytes());
        output.put(&text.as_bytes()[..usize::from(text_len)]);
    }

    /// Extents for a block status request.
    pub(super) fn extents(
        &self,
        output: &mut Output,
        pending: &Pending,
        extents: impl Iterator<Item = Extent>,
    ) {
        let header = &pending.header;
        if header.command != cmd::BLOCK_STATUS {
            return self.error(output, pending, Errno::Io);
        }
        let single = header.flags & cmd_flag::REQ_ONE != 0;
        let mut left = header.len;
        let mut descriptors = Vec::new();
        for extent in extents.take(if single { 1 } else { MAX_EXTENTS }) {
            let len = u32::try_from(extent.len).map_or(left, |len| len.min(left));
            if len == 0 {
                break;
            }
            left -= len;
            let hole = if extent.hole { state::HOLE } else { 0 };
            let zero = if extent.zero { state::ZERO } else { 0 };
            descriptors.extend_from_slice(&len.to_be_bytes());
            descriptors.extend_from_slice(&(hole | zero).to_be_bytes());
        }
        // The specification wants at least one extent.
        let Ok(payload_len) = u32::try_from(descriptors.len() + 4) else {
            return self.error(output, pending, Errno::Overflow);
        };
        if descriptors.is_empty() {
            return self.error(output, pending, Errno::Io);
        }
        chunk_head(output, header, chunk::BLOCK_STATUS, payload_len);
        output.put(&BASE_ALLOCATION_ID.to_be_bytes());
        output.put(&descriptors);
    }
}

fn simple(output: &mut Output, header: &RequestHeader, error: u32) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&header.cookie.to_be_bytes());
    output.put(&bytes);
}

/// The head of the only, hence last, chunk of a structured reply.
fn chunk_head(output: &mut Output, header: &RequestHeader, kind: u16, payload_len: u32) {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&chunk::FLAG_DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&header.cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&payload_len.to_be_bytes());
    output.put(&bytes);
}
