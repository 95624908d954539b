//! The server side of one NBD connection, without the connection.
//!
//! The data path calls it. It owns the bytes received and not understood yet, the requests under
//! way and the bytes to send. A driver's loop:
//!
//! ```text
//! loop {
//!     while let Some(request) = session.next_request() { start(request) }
//!     if session.output_len() > 0 {
//!         send what can be sent without waiting   // next_output, or output_slices + sent
//!         if something was sent { continue }       // there may be room for a request now
//!     }
//!     if session.is_finished() { close; break }
//!     wait for: answers -> session.reply(tag, result)
//!               writable, if there is output
//!               readable, if session.wants_input() -> n = read(session.recv_buffer());
//!                                                     session.received(n)   // 0: end of stream
//! }
//! ```
//!
//! When too much is under way, `next_request` gives none although some were received, then
//! `wants_input` turns false and `recv_buffer` empty: the driver stops reading, and TCP slows the
//! client down. Hence `next_request` is to be called after each of: bytes received, an answer
//! given, output sent.

use std::{collections::HashMap, fmt, io::IoSlice, sync::Arc};

use bytes::Bytes;
use relevo_wire::PayloadArena;

use super::{
    negotiate::Negotiation,
    output::Output,
    proto::MAX_REQUEST,
    transmit::{DIRECT_MIN, Incoming, Pending, Replies},
};
use crate::block::{BlockRequest, Errno, Extent};

/// Received and not yet understood, in bytes. Holds the largest option
/// ([`super::negotiate::MAX_OPTION`]) and some dozen 4 KiB writes: one system call for all of them.
const STAGING: usize = 128 << 10;

/// Received in place at once: what is handed out is zeroed first, so a piece should stay in the
/// processor's cache.
const DIRECT_MAX: usize = 256 << 10;

/// Requests taken and not answered on one connection. Clients keep up to 128 per connection
/// (Linux, fio's largest usual depth); twice that leaves nobody waiting.
const MAX_UNDER_WAY: usize = 256;

/// Payload bytes on one connection: writes and reads under way and answers not sent. Two of the
/// largest requests, so that one is received while one is worked on.
const MAX_UNDER_WAY_BYTES: usize = 2 * MAX_REQUEST as usize;

/// A volume offered to clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// The name that clients ask for: the volume's.
    pub name: String,
    /// A sentence for `LIST`.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Writes are refused with `EPERM`.
    pub read_only: bool,
    /// Writes, discards of whole blocks and zeroes must be multiples of this, a power of two from
    /// 1 to 65536; others are refused with `EINVAL`. Advertised. Reads may have any alignment.
    pub min_block: u32,
    /// Why it can't be opened now, for the client to show: `web1 is primary of mail, not this
    /// node`. Not listed then.
    pub unavailable: Option<String>,
}

/// Names a request within its session; never used twice in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestTag(pub u64);

/// A client's request, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdRequest {
    /// To be given to [`Session::reply`].
    pub tag: RequestTag,
    /// What is asked; the range lies within the export.
    pub request: BlockRequest,
}

/// How far a session is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase<'a> {
    /// Options are exchanged; no request yet.
    Negotiating,
    /// The client has opened this export.
    Serving(&'a Export),
    /// No request is taken any more. Answers under way are still to be given and sent, then
    /// [`Session::is_finished`].
    Closing(&'a CloseReason),
}

/// Why a session ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CloseReason {
    /// As it should be: the client said goodbye, or closed between two requests.
    #[error("the client disconnected")]
    Disconnected,
    /// The connection ended in the middle of something.
    #[error("the connection ended {0}")]
    Lost(&'static str),
    /// The client asked for an export in a way that allows no error message.
    #[error("the client asked for export `{name}`: {why}")]
    NoExport {
        /// The name.
        name: String,
        /// Why it was not given.
        why: String,
    },
    /// Not the protocol: the stream can't be understood from here on.
    #[error("malformed NBD: {0}")]
    Malformed(&'static str),
    /// The driver closed it.
    #[error("{0}")]
    ByServer(String),
}

/// Room for requests under way: twice what most clients have. A table that is at most half full makes room for
/// what comes among what went, instead of growing at some moment that chance decides.
const UNDER_WAY_ROOM: usize = 64;

/// The server side of one connection.
#[derive(Debug)]
pub struct Session {
    staging: Staging,
    arena: PayloadArena,
    output: Output,
    state: State,
    closing: Option<CloseReason>,
    replies: Replies,
    next_tag: u64,
    under_way: HashMap<RequestTag, Pending>,
    under_way_bytes: usize,
}

#[derive(Debug)]
enum State {
    Negotiating(Negotiation),
    Serving { export: Export, incoming: Incoming },
}

impl Session {
    /// A session for a new connection; its greeting is in the output at once.
    #[must_use]
    pub fn new(exports: Arc<[Export]>) -> Self {
        let mut output = Output::default();
        Negotiation::greet(&mut output);
        Self {
            staging: Staging::new(),
            arena: PayloadArena::default(),
            output,
            state: State::Negotiating(Negotiation::new(exports)),
            closing: None,
            replies: Replies::default(),
            next_tag: 0,
            under_way: HashMap::with_capacity(UNDER_WAY_ROOM),
            under_way_bytes: 0,
        }
    }

    /// Replaces the exports on offer. An export that is open stays as it is: end the session with
    /// [`Self::close`].
    pub fn set_exports(&mut self, exports: Arc<[Export]>) {
        if let State::Negotiating(negotiation) = &mut self.state {
            negotiation.set_exports(exports);
        }
    }

    /// How far it is.
    #[must_use]
    pub const fn phase(&self) -> Phase<'_> {
        match (&self.closing, &self.state) {
            (Some(reason), _) => Phase::Closing(reason),
            (None, State::Negotiating(_)) => Phase::Negotiating,
            (None, State::Serving { export, .. }) => Phase::Serving(export),
        }
    }

    /// Whether the driver should read from the connection. Also true while closing is not
    /// decided; false when too much is under way, until answers were given and sent.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.closing.is_none() && (self.staging.free() > 0 || self.direct_payload())
    }

    fn direct_payload(&self) -> bool {
        match &self.state {
            State::Serving { incoming, .. } => {
                self.staging.is_empty()
                    && incoming.is_payload()
                    && self.arena.missing() >= DIRECT_MIN
            }
            State::Negotiating(_) => false,
        }
    }

    /// Where the next bytes from the connection go: large payloads directly into their aligned
    /// buffer. Empty when `wants_input` is false. Follow with [`Self::received`].
    pub fn recv_buffer(&mut self) -> &mut [u8] {
        if self.closing.is_some() {
            return &mut [];
        }
        let direct = self.direct_payload();
        if direct {
            self.arena.spare(DIRECT_MAX)
        } else {
            self.staging.spare()
        }
    }

    /// Counts `count` bytes of [`Self::recv_buffer`] as received; 0 is the end of the stream.
    pub fn received(&mut self, count: usize) {
        if self.closing.is_some() {
            return;
        }
        if count == 0 {
            return self.end_of_stream();
        }
        let direct = self.direct_payload();
        if direct {
            self.arena.advance(count);
        } else {
            self.staging.filled(count);
        }
    }

    /// Copies bytes in, as many as there is room for; returns how many were taken. For drivers
    /// and tests that hold the bytes already. Call [`Self::next_request`] until `None` between.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            let room = self.recv_buffer();
            let count = room.len().min(bytes.len() - taken);
            if count == 0 {
                break;
            }
            room[..count].copy_from_slice(&bytes[taken..taken + count]);
            self.received(count);
            taken += count;
        }
        taken
    }

    fn end_of_stream(&mut self) {
        let partial = match &self.state {
            State::Negotiating(_) => Some("during negotiation"),
            State::Serving { incoming, .. } if incoming.is_idle() && self.staging.is_empty() => {
                None
            }
            State::Serving { .. } => Some("in the middle of a request"),
        };
        self.close(partial.map_or(CloseReason::Disconnected, CloseReason::Lost));
    }

    /// Works on what was received and returns the next request. Call until `None`, and again after
    /// bytes were received, an answer was given, or output was sent.
    pub fn next_request(&mut self) -> Option<NbdRequest> {
        while self.closing.is_none() {
            let full = self.is_full();
            let step = match &mut self.state {
                State::Negotiating(negotiation) => {
                    negotiation.step(&mut self.staging, &mut self.output)
                }
                State::Serving { .. } if full => return None,
                State::Serving { export, incoming } => {
                    incoming.step(&mut self.staging, &mut self.arena, export, &self.replies)
                }
            };
            match step {
                Step::Wait => return None,
                Step::Again => {}
                Step::Request(pending, request) => return Some(self.enlist(pending, request)),
                Step::Answer(pending, result) => {
                    self.form_reply(&pending, result.map(|()| Bytes::new()));
                }
                Step::Open { export, replies } => {
                    self.replies = replies;
                    let incoming = Incoming::default();
                    self.state = State::Serving { export, incoming };
                }
                Step::Close(reason) => self.close(reason),
            }
        }
        None
    }

    fn is_full(&self) -> bool {
        self.under_way.len() >= MAX_UNDER_WAY
            || self.under_way_bytes.saturating_add(self.output.len()) >= MAX_UNDER_WAY_BYTES
    }

    fn enlist(&mut self, pending: Pending, request: BlockRequest) -> NbdRequest {
        let tag = RequestTag(self.next_tag);
        self.next_tag += 1;
        self.under_way_bytes += pending.payload_bytes();
        self.under_way.insert(tag, pending);
        NbdRequest { tag, request }
    }

    fn delist(&mut self, tag: RequestTag) -> Option<Pending> {
        let pending = self.under_way.remove(&tag)?;
        self.under_way_bytes -= pending.payload_bytes();
        Some(pending)
    }

    /// Answers a request, in any order: the bytes of a read, no bytes otherwise (for a
    /// [`BlockRequest::Status`] that means: all of it is allocated data). A read with the wrong
    /// number of bytes is a mistake of ours and becomes `EIO`, never shifted data. A tag that is
    /// not under way is ignored.
    pub fn reply(&mut self, tag: RequestTag, result: Result<Bytes, Errno>) {
        if let Some(pending) = self.delist(tag) {
            self.form_reply(&pending, result);
        }
    }

    fn form_reply(&mut self, pending: &Pending, result: Result<Bytes, Errno>) {
        match result {
            Ok(data) => self.replies.success(&mut self.output, pending, data),
            Err(errno) => self.replies.error(&mut self.output, pending, errno),
        }
    }

    /// Answers a [`BlockRequest::Status`] with what is stored where, from the start of its range.
    /// What goes past its end, and extents after the first for a `single` one, are left out.
    pub fn reply_extents(&mut self, tag: RequestTag, extents: &[Extent]) {
        if let Some(pending) = self.delist(tag) {
            self.replies
                .extents(&mut self.output, &pending, extents.iter().copied());
        }
    }

    /// Requests taken and not answered.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Bytes to send.
    #[must_use]
    pub const fn output_len(&self) -> usize {
        self.output.len()
    }

    /// Takes the next piece to send, for drivers that send owned buffers.
    pub fn next_output(&mut self) -> Option<Bytes> {
        self.output.pop()
    }

    /// Puts what is to be sent into `slices`, for `writev`; returns how many were used. Follow
    /// with [`Self::sent`].
    pub fn output_slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.output.slices(slices)
    }

    /// Drops bytes of [`Self::output_slices`] that were sent.
    pub fn sent(&mut self, count: usize) {
        self.output.sent(count);
    }

    /// Takes no more requests; the first reason stays. Requests under way should still be
    /// answered, if only with [`Errno::Shutdown`].
    pub fn close(&mut self, reason: CloseReason) {
        if self.closing.is_none() {
            self.closing = Some(reason);
            self.staging = Staging::empty();
        }
    }

    /// Nothing is left to do: close the connection.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.closing.is_some() && self.under_way.is_empty() && self.output.len() == 0
    }
}

/// What understanding some bytes led to.
#[derive(Debug)]
pub(super) enum Step {
    /// More bytes are needed.
    Wait,
    /// Something was understood; there may be more.
    Again,
    /// A request for the driver.
    Request(Pending, BlockRequest),
    /// A request that is answered here.
    Answer(Pending, Result<(), Errno>),
    /// Negotiation is over.
    Open {
        /// The export that was chosen.
        export: Export,
        /// What was agreed on the form of replies.
        replies: Replies,
    },
    /// The session is over.
    Close(CloseReason),
}

/// Bytes received and not understood yet.
pub(super) struct Staging {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Staging {
    fn new() -> Self {
        Self {
            buffer: vec![0; STAGING],
            start: 0,
            end: 0,
        }
    }

    const fn empty() -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            end: 0,
        }
    }

    const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    const fn free(&self) -> usize {
        self.buffer.len() - (self.end - self.start)
    }

    /// Room for more, after moving what is left to the front.
    fn spare(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    fn filled(&mut self, count: usize) {
        debug_assert!(self.end + count <= self.buffer.len());
        self.end = (self.end + count).min(self.buffer.len());
    }

    /// What is there.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Drops `count` bytes that were understood; at most what is there.
    pub(super) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// Takes exactly `N` bytes, or nothing.
    pub(super) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let taken = *self.bytes().first_chunk::<N>()?;
        self.consume(N);
        Some(taken)
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staging({} bytes)", self.end - self.start)
    }
}
