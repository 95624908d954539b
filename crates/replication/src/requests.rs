//! Application requests: checked, bounded, cut into pieces, answered once.

use std::collections::VecDeque;

use bytes::Bytes;
use relevo_format::Layout;
use relevo_types::{BLOCK_SIZE, BlockRange, ByteRange, Time, cluster::options::OnLoss};
use relevo_wire::Body;

use crate::{
    io::{AppRequest, Effect, ReplyError, RequestId},
    jobs::Owner,
    machine::Machine,
    ops::Cx,
    tail::WINDOW_MAX,
    window::Window,
};

/// Requests taken at once. Exports have far smaller queues; beyond it requests fail.
const REQUESTS_MAX: usize = 16_384;

/// Jobs in the gate at once: its cost grows with their number. Later requests wait in line.
const JOBS_MAX: usize = 512;

/// Bytes of data in writes that some replica has not acknowledged. A slow peer slows the application
/// down here, instead of filling the memory.
const WRITE_BYTES_MAX: u64 = 64 << 20;

/// Longer writes of data go in pieces of this size, one after the other: 1 MiB, a quarter of what
/// fits a message.
const DATA_PIECE_BLOCKS: u64 = 256;

/// Longer writes of zeroes go in pieces of at most so many regions, 64 MiB, and of at most this part of those
/// that the activity log holds. Each piece of cold regions costs flushes, so large is
/// good, and leaves room for others.
const ZERO_PIECE_REGIONS: usize = 64;
const ZERO_PIECE_PART: usize = 4;

/// The longest read: what NBD clients may ask for is below it.
const READ_BYTES_MAX: u64 = 64 << 20;

/// Requests that were not answered yet.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    table: Window<RequestId, Request>,
    /// Not started: wait for their turn.
    queue: VecDeque<RequestId>,
    /// Reads that wait for the lease.
    parked: VecDeque<RequestId>,
}

#[derive(Debug)]
enum Request {
    Read(ByteRange),
    /// What is left to do.
    Write {
        left: BlockRange,
        body: Body,
        fua: bool,
    },
    Flush,
}

impl Requests {
    pub(crate) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Forgets all; the caller answers them.
    pub(crate) fn drain(&mut self) -> Vec<RequestId> {
        self.queue.clear();
        self.parked.clear();
        self.table.take().map(|(id, _)| id).collect()
    }
}

impl Machine {
    pub(crate) fn reply(
        &mut self,
        cx: &mut Cx<'_>,
        id: RequestId,
        result: Result<Bytes, ReplyError>,
    ) {
        if self.requests.table.remove(&id).is_some() {
            cx.emit(Effect::Reply { id, result });
        }
    }

    pub(crate) fn accept_request(&mut self, cx: &mut Cx<'_>, id: RequestId, request: AppRequest) {
        let refusal = if !self.serves() || self.stepping_down {
            Some(ReplyError::NotPrimary)
        } else if self.is_without_quorum(cx.now)
            || self.requests.len() >= REQUESTS_MAX
            || self.requests.table.contains_key(&id)
        {
            Some(ReplyError::Io)
        } else {
            None
        };
        let taken = match refusal {
            Some(error) => Err(error),
            None => self.check_request(request).ok_or(ReplyError::Invalid),
        };
        match taken {
            Err(error) => cx.emit(Effect::Reply {
                id,
                result: Err(error),
            }),
            Ok(request) => {
                self.rate.app_asks(cx.now);
                self.requests.table.insert(id, request);
                self.requests.queue.push_back(id);
                // Here, not only when settling: a request that must wait for nothing starts in
                // the order in which it came.
                self.pump_requests(cx);
            }
        }
    }

    /// When requests begin to fail, with `on-no-quorum=io-error`: without a lease for the dead time this
    /// node can't know that it is primary still, and the others have replaced it if they could.
    pub(crate) fn fails_from(&self) -> Time {
        let fails = self
            .volume
            .as_ref()
            .is_some_and(|volume| volume.options.on_no_quorum == OnLoss::Error);
        if fails && self.serves() {
            self.lease_until.max(self.opened) + self.config.link_timeout
        } else {
            Time::NEVER
        }
    }

    fn is_without_quorum(&self, now: Time) -> bool {
        now >= self.fails_from()
    }

    /// Answers what waits with errors, if that was chosen and no majority is in sight. What was sent
    /// already may yet be done, as after any error.
    pub(crate) fn settle_quorum(&mut self, cx: &mut Cx<'_>) {
        if self.requests.is_empty() || !self.is_without_quorum(cx.now) {
            return;
        }
        self.abandon_jobs(cx, |owner| {
            matches!(owner, Owner::AppRead(_) | Owner::AppWrite(_))
        });
        for id in self.requests.drain() {
            cx.emit(Effect::Reply {
                id,
                result: Err(ReplyError::Io),
            });
        }
    }

    fn check_request(&self, request: AppRequest) -> Option<Request> {
        let inside = |range: ByteRange| {
            range
                .checked_end()
                .is_some_and(|end| end <= self.meta.layout().data_size())
        };
        match request {
            AppRequest::Flush => Some(Request::Flush),
            AppRequest::Read(range) => {
                (inside(range) && range.len <= READ_BYTES_MAX).then_some(Request::Read(range))
            }
            AppRequest::Write { range, body, fua } => {
                let whole =
                    range.offset.is_multiple_of(BLOCK_SIZE) && range.len.is_multiple_of(BLOCK_SIZE);
                let fits = match &body {
                    Body::Data(data) => data.len() as u64 == range.len,
                    Body::Zeroes => true,
                };
                (inside(range) && whole && fits).then(|| Request::Write {
                    left: range.blocks_covered(),
                    body,
                    fua,
                })
            }
        }
    }

    /// Starts requests in line while there is room.
    pub(crate) fn pump_requests(&mut self, cx: &mut Cx<'_>) {
        while self.has_room()
            && let Some(id) = self.requests.queue.pop_front()
        {
            self.start_request(cx, id);
        }
    }

    fn has_room(&self) -> bool {
        !self.suspended
            && !self.is_yielding()
            && self.primary().is_some_and(|primary| {
                let open = primary.last_seq.0 - primary.complete.0;
                self.gate.len() < JOBS_MAX
                    && open + (JOBS_MAX as u64) < WINDOW_MAX
                    && primary.write_bytes < WRITE_BYTES_MAX
                    && !self.is_congested()
            })
    }

    fn start_request(&mut self, cx: &mut Cx<'_>, id: RequestId) {
        match self.requests.table.get(&id) {
            None => {}
            Some(Request::Flush) => self.start_app_flush(cx, Some(id)),
            Some(Request::Read(range)) if range.len == 0 => self.reply(cx, id, Ok(Bytes::new())),
            Some(Request::Read(range)) => {
                let blocks = range.blocks_touched();
                if cx.now < self.lease_until {
                    self.read_blocks(cx, blocks, Owner::AppRead(id));
                } else {
                    self.requests.parked.push_back(id);
                }
            }
            Some(Request::Write { left, body, fua }) => {
                if left.count == 0 {
                    self.reply(cx, id, Ok(Bytes::new()));
                    return;
                }
                let limit = match body {
                    Body::Zeroes => {
                        let part = self.meta.activity.limit() / ZERO_PIECE_PART;
                        part.clamp(1, ZERO_PIECE_REGIONS) as u64 * Layout::REGION_BLOCKS
                    }
                    Body::Data(_) => DATA_PIECE_BLOCKS,
                };
                let piece = BlockRange::new(left.first, left.count.min(limit));
                let piece_body = match body {
                    Body::Zeroes => Body::Zeroes,
                    Body::Data(data) => {
                        let len = usize::try_from(piece.bytes().len).unwrap_or(usize::MAX);
                        Body::Data(data.slice(..len.min(data.len())))
                    }
                };
                let fua = *fua;
                self.write_blocks(cx, piece, piece_body, fua, Owner::AppWrite(id));
            }
        }
    }

    /// A piece of a write is everywhere it must be.
    pub(crate) fn piece_done(&mut self, cx: &mut Cx<'_>, id: RequestId, piece: BlockRange) {
        let Some(Request::Write { left, body, .. }) = self.requests.table.get_mut(&id) else {
            return;
        };
        *left = BlockRange::new(piece.end(), left.count - piece.count);
        if let Body::Data(data) = body {
            let len = usize::try_from(piece.bytes().len).unwrap_or(usize::MAX);
            *data = data.slice(len.min(data.len())..);
        }
        if left.count == 0 {
            self.reply(cx, id, Ok(Bytes::new()));
        } else {
            self.requests.queue.push_back(id);
        }
    }

    /// The lease must be valid when a read starts and when it is answered. If it is not, the
    /// read waits and is done again: by then another primary may have been and gone.
    pub(crate) fn app_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        id: RequestId,
        blocks: BlockRange,
        data: Bytes,
    ) {
        let Some(Request::Read(range)) = self.requests.table.get(&id) else {
            return;
        };
        if cx.now >= self.lease_until {
            self.requests.parked.push_back(id);
            return;
        }
        let skip = usize::try_from(range.offset - blocks.bytes().offset).unwrap_or(usize::MAX);
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        match skip.checked_add(len).filter(|end| *end <= data.len()) {
            Some(end) => self.reply(cx, id, Ok(data.slice(skip..end))),
            None => self.fail(format!(
                "a read of {blocks:?} gave {} bytes; the disk driver is at fault",
                data.len()
            )),
        }
    }

    pub(crate) fn start_parked_reads(&mut self, cx: &mut Cx<'_>) {
        if cx.now < self.lease_until {
            let parked = std::mem::take(&mut self.requests.parked);
            self.requests.queue.extend(parked);
        }
    }
}
