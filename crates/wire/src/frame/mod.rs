//! Frames: how a [`Message`] lies on a data link.
//!
//! Called by the data path, which owns the socket and the TLS session; nothing here does I/O.
//! Both sides first exchange a [`LinkHello`] (fixed size, so that it can be read before a
//! version is agreed on), then frames:
//!
//! ```text
//!  0  u16  magic 0x7652           all integers little-endian
//!  2  u8   protocol version
//!  3  u8   message type
//!  4  u32  length of the fields
//!  8  u32  length of the data
//! 12  u32  crc32c of the fields
//! 16  u32  crc32c of the data
//! 20  u32  crc32c of bytes 0 to 19
//! 24       fields, then data
//! ```
//!
//! The header has a checksum of its own so that a damaged length is noticed at once, not after
//! waiting for bytes that never come. No message leaves the [`Decoder`] before all three checksums
//! held: a write is never applied from a frame that something on the way altered (TLS protects the
//! wire; this protects against memory and offload engines on either end).

mod codec;
mod hello;
#[cfg(test)]
mod tests;

use bytes::{Bytes, BytesMut};

pub use hello::{HelloError, LINK_HELLO_BYTES, LinkHello, PLAIN_START, ProtocolVersion};

use crate::{Message, PayloadArena};

/// The newest protocol version that this build speaks.
pub const PROTOCOL_MAX: ProtocolVersion = ProtocolVersion(1);

/// The oldest protocol version that this build speaks.
pub const PROTOCOL_MIN: ProtocolVersion = ProtocolVersion(1);

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 24;

/// The most data in one frame. Exports split larger requests: small enough that a frame does not
/// hold up the acknowledgements behind it, large enough that its header costs nothing.
pub const MAX_DATA_BYTES: usize = 4 << 20;

/// The most runs of blocks in one frame: what fits in 1 MiB. Engines send longer lists in parts.
pub const MAX_BLOCK_RUNS: usize = 65_536;

/// Most digests of blocks in one message: as many as the fields have room for.
pub const MAX_DIGESTS: usize = MAX_BLOCK_RUNS * 16 / crate::BlockDigest::BYTES;

/// The most bytes of fields in one frame: the longest list of runs and the few fields beside it.
pub const MAX_FIELD_BYTES: usize = MAX_BLOCK_RUNS * 16 + 64;

/// The longest frame; a receiver never buffers more for one.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + MAX_FIELD_BYTES + MAX_DATA_BYTES;

const MAGIC: u16 = 0x7652;

/// Why bytes are no frame, or a message can't become one. The link is closed: after a damaged
/// frame the start of the next one is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes do not begin with the magic number.
    #[error("the peer sent something that is no Relevo frame (it begins with {found:#06x})")]
    BadMagic {
        /// What was there.
        found: u16,
    },
    /// A checksum does not match.
    #[error("the checksum of a frame's {part} does not match; it was damaged on the way")]
    Checksum {
        /// `header`, `fields` or `data`.
        part: &'static str,
    },
    /// The version was not agreed on.
    #[error(
        "a frame of protocol version {found} arrived on a link that speaks {}",
        PROTOCOL_MAX.0
    )]
    Version {
        /// What the frame says.
        found: u8,
    },
    /// The message type is unknown.
    #[error("a frame of unknown type {found} arrived")]
    UnknownType {
        /// The type.
        found: u8,
    },
    /// More than a frame may hold.
    #[error("a frame with {len} bytes of {part} is longer than allowed ({max})")]
    TooLong {
        /// `fields` or `data`.
        part: &'static str,
        /// How many there are.
        len: usize,
        /// How many there may be.
        max: usize,
    },
    /// The fields contradict the message type.
    #[error("a frame of type {kind} is malformed: {why}")]
    Malformed {
        /// The message type.
        kind: u8,
        /// What is wrong.
        why: &'static str,
    },
}

/// A message as bytes: write `head`, then `data`. The data is the message's own, not a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Header and fields.
    pub head: Bytes,
    /// The payload of a write.
    pub data: Option<Bytes>,
}

impl Encoded {
    /// How many bytes go on the wire.
    #[must_use]
    #[allow(
        clippy::len_without_is_empty,
        reason = "a frame is never empty: it has a header"
    )]
    pub fn len(&self) -> usize {
        self.head.len() + self.data.as_ref().map_or(0, Bytes::len)
    }
}

/// Encodes a message.
///
/// # Errors
/// [`FrameError::TooLong`] and [`FrameError::Malformed`] (data that is not as long as its range):
/// a mistake of the caller, never of the peer.
pub fn encode(message: &Message) -> Result<Encoded, FrameError> {
    let mut head = BytesMut::with_capacity(HEADER_BYTES + 64);
    let data = encode_into(message, &mut head)?;
    Ok(Encoded {
        head: head.freeze(),
        data,
    })
}

/// Appends header and fields of a message to `out` and gives the data that follows them; on an error
/// `out` is what it was.
///
/// # Errors
/// As of [`encode`].
pub fn encode_into(message: &Message, out: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let before = out.len();
    encode_at(before, message, out).inspect_err(|_| out.truncate(before))
}

fn encode_at(
    start: usize,
    message: &Message,
    out: &mut BytesMut,
) -> Result<Option<Bytes>, FrameError> {
    out.resize(start + HEADER_BYTES, 0);
    let (kind, data) = codec::write_fields(message, out)?;
    let head = &mut out[start..];
    let field_len = head.len() - HEADER_BYTES;
    let data_len = data.as_ref().map_or(0, Bytes::len);
    let header = Header {
        kind,
        field_len: length("fields", field_len, MAX_FIELD_BYTES)?,
        data_len: length("data", data_len, MAX_DATA_BYTES)?,
        field_crc: crc32c::crc32c(&head[HEADER_BYTES..]),
        data_crc: data.as_ref().map_or(0, |data| crc32c::crc32c(data)),
    };
    head[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    Ok(data.filter(|data| !data.is_empty()))
}

/// Whether a frame's type number stands for a message: what tests of every kind are measured by.
#[must_use]
pub fn is_known(kind: u8) -> bool {
    let fields = codec::read_fields(kind, &[], Bytes::new());
    !matches!(fields, Err(FrameError::UnknownType { .. }))
}

/// Turns the bytes of a link into messages. After an error it yields only that error: nothing
/// behind a damaged frame can be trusted.
///
/// Bytes are taken as far as they make one message, so nothing is buffered behind it; the data of a write
/// goes to its aligned place at once, and stays there on its way to the disk.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Header and fields of the frame under way.
    head: Vec<u8>,
    header: Option<Header>,
    /// The data of the frame under way.
    data: PayloadArena,
    failed: Option<FrameError>,
}

impl Decoder {
    /// A decoder at the start of a frame.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes that arrived off the front of `input`: all of them, or up to the end of a message,
    /// which it returns. Call until it is empty.
    ///
    /// # Errors
    /// The bytes are no frame; close the link.
    pub fn take(&mut self, input: &mut &[u8]) -> Result<Option<Message>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.try_take(input).inspect_err(|error| {
            self.failed = Some(error.clone());
        })
    }

    /// Where the next bytes go, at most `max`, if at least `least` bytes of data are missing and nothing else is:
    /// for a read straight from a socket. Follow with [`Self::placed`].
    pub fn place(&mut self, least: usize, max: usize) -> Option<&mut [u8]> {
        let head_len = self.header.as_ref().map(Header::head_len)?;
        let direct = self.head.len() == head_len && self.data.missing() >= least.max(1);
        direct.then(|| self.data.spare(max))
    }

    /// Counts bytes of [`Self::place`] as arrived. Returns the message that they completed.
    ///
    /// # Errors
    /// As of [`Self::take`].
    pub fn placed(&mut self, count: usize) -> Result<Option<Message>, FrameError> {
        self.data.advance(count);
        self.take(&mut &[][..])
    }

    /// How many more bytes complete the frame under way, as far as is known.
    #[must_use]
    pub fn missing(&self) -> usize {
        let head_len = self.header.as_ref().map_or(HEADER_BYTES, Header::head_len);
        head_len - self.head.len() + self.data.missing()
    }

    fn try_take(&mut self, input: &mut &[u8]) -> Result<Option<Message>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                take_up_to(&mut self.head, HEADER_BYTES, input);
                let Some(bytes) = self.head.first_chunk::<HEADER_BYTES>() else {
                    return Ok(None);
                };
                let header = Header::parse(bytes)?;
                self.data.begin(header.data_len as usize);
                *self.header.insert(header)
            }
        };
        take_up_to(&mut self.head, header.head_len(), input);
        if self.head.len() < header.head_len() {
            return Ok(None);
        }
        let taken = self.data.fill(input);
        *input = &input[taken..];
        if self.data.missing() > 0 {
            return Ok(None);
        }
        self.header = None;
        let data = self.data.take();
        let fields = &self.head[HEADER_BYTES..];
        if crc32c::crc32c(fields) != header.field_crc {
            return Err(FrameError::Checksum { part: "fields" });
        }
        let data_crc = if data.is_empty() {
            0
        } else {
            crc32c::crc32c(&data)
        };
        if data_crc != header.data_crc {
            return Err(FrameError::Checksum { part: "data" });
        }
        let message = codec::read_fields(header.kind, fields, data)?;
        self.head.clear();
        Ok(Some(message))
    }
}

/// Moves bytes from the front of `input` until `buffer` has `len`.
fn take_up_to(buffer: &mut Vec<u8>, len: usize, input: &mut &[u8]) {
    let count = input.len().min(len.saturating_sub(buffer.len()));
    buffer.extend_from_slice(&input[..count]);
    *input = &input[count..];
}

#[derive(Clone, Copy, Debug)]
struct Header {
    kind: u8,
    field_len: u32,
    data_len: u32,
    field_crc: u32,
    data_crc: u32,
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2] = PROTOCOL_MAX.0;
        bytes[3] = self.kind;
        bytes[4..8].copy_from_slice(&self.field_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data_len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.field_crc.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.data_crc.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let found = u16::from_le_bytes([bytes[0], bytes[1]]);
        if found != MAGIC {
            return Err(FrameError::BadMagic { found });
        }
        if crc32c::crc32c(&bytes[..20]) != word(20) {
            return Err(FrameError::Checksum { part: "header" });
        }
        if bytes[2] != PROTOCOL_MAX.0 {
            return Err(FrameError::Version { found: bytes[2] });
        }
        let header = Self {
            kind: bytes[3],
            field_len: word(4),
            data_len: word(8),
            field_crc: word(12),
            data_crc: word(16),
        };
        length("fields", header.field_len as usize, MAX_FIELD_BYTES)?;
        length("data", header.data_len as usize, MAX_DATA_BYTES)?;
        Ok(header)
    }

    fn head_len(&self) -> usize {
        HEADER_BYTES + self.field_len as usize
    }
}

fn length(part: &'static str, len: usize, max: usize) -> Result<u32, FrameError> {
    let too_long = FrameError::TooLong { part, len, max };
    if len > max {
        return Err(too_long);
    }
    u32::try_from(len).map_err(|_| too_long)
}
