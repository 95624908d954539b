//! The fields of each message, in the order of the protocol's specification.

use bytes::{BufMut as _, Bytes, BytesMut};
use relevo_types::{BlockRange, ByteRange, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Seq};

use super::{FrameError, MAX_BLOCK_RUNS, MAX_DATA_BYTES, MAX_DIGESTS};
use crate::{BlockDigest, Body, Message, PeerInfo, Refusal};

/// Message types on the wire. Numbers are never reused.
mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const START_SYNC: u8 = 2;
    pub(super) const WRITE: u8 = 3;
    pub(super) const FLUSH: u8 = 4;
    pub(super) const SYNC_WRITE: u8 = 5;
    pub(super) const DIRTY_MAP: u8 = 6;
    pub(super) const BARRIER: u8 = 7;
    pub(super) const EPOCH_UPDATE: u8 = 8;
    pub(super) const COMPLETE: u8 = 9;
    pub(super) const RECONCILE: u8 = 10;
    pub(super) const UNCERTAIN: u8 = 11;
    pub(super) const WRITE_ACK: u8 = 12;
    pub(super) const FLUSH_ACK: u8 = 13;
    pub(super) const SYNC_ACK: u8 = 14;
    pub(super) const BARRIER_ACK: u8 = 15;
    pub(super) const TAIL: u8 = 16;
    pub(super) const REFUSE: u8 = 17;
    pub(super) const PING: u8 = 18;
    pub(super) const PONG: u8 = 19;
    pub(super) const MOVED: u8 = 60;
    pub(super) const BEHIND: u8 = 30;
    pub(super) const FOLLOWING: u8 = 31;
    pub(super) const RECEIPTS: u8 = 32;
    pub(super) const RECEIVED: u8 = 33;
    pub(super) const GENERATION: u8 = 34;
    pub(super) const PAUSE_SYNC: u8 = 20;
    pub(super) const DIGESTS: u8 = 21;
    pub(super) const DIFFER: u8 = 22;
    pub(super) const VERIFYING: u8 = 23;
    pub(super) const READ_BLOCKS: u8 = 50;
    pub(super) const CONTENT: u8 = 51;
    pub(super) const CHANGES: u8 = 44;
    pub(super) const SYNC_DIGESTS: u8 = 40;
    pub(super) const SYNC_DIFFER: u8 = 41;
}

const BODY_DATA: u8 = 0;
const BODY_ZEROES: u8 = 1;

const REFUSE_STALE_EPOCH: u8 = 0;
// 1 was a refusal of other lineages, which are judged now: never used again.
const REFUSE_DISK: u8 = 2;
const REFUSE_PROTOCOL: u8 = 3;
const REFUSE_STAND_ALONE: u8 = 4;
const REFUSE_SPLIT_BRAIN: u8 = 5;

/// The longest text of a refusal; longer ones are cut. They are for a person's log.
const MAX_REASON_BYTES: usize = 1024;

/// Appends the fields of a message. Returns its type and the data that follows them.
pub(super) fn write_fields(
    message: &Message,
    out: &mut BytesMut,
) -> Result<(u8, Option<Bytes>), FrameError> {
    let kind = match message {
        Message::Hello(info) => {
            out.put_u32_le(info.node.0);
            out.put_u64_le(info.instance.0);
            out.put_u64_le(info.lineage.0);
            out.put_u64_le(info.epoch.0);
            kind::HELLO
        }
        Message::Write {
            epoch,
            seq,
            complete,
            range,
            body,
            fua,
            dirty_for,
        } => {
            out.put_u64_le(epoch.0);
            out.put_u64_le(seq.0);
            out.put_u64_le(complete.0);
            let data = put_body(out, kind::WRITE, *range, body)?;
            out.put_u8(u8::from(*fua));
            out.put_u8(*dirty_for);
            return Ok((kind::WRITE, data));
        }
        Message::SyncWrite {
            epoch,
            id,
            range,
            body,
        } => {
            put_pair(out, kind::SYNC_WRITE, *epoch, *id);
            let data = put_body(out, kind::SYNC_WRITE, *range, body)?;
            return Ok((kind::SYNC_WRITE, data));
        }
        Message::Content {
            epoch,
            id,
            range,
            body,
        } => {
            put_pair(out, kind::CONTENT, *epoch, *id);
            let data = put_body(out, kind::CONTENT, *range, body)?;
            return Ok((kind::CONTENT, data));
        }
        Message::ReadBlocks { epoch, id, blocks } => {
            put_pair(out, kind::READ_BLOCKS, *epoch, *id);
            out.put_u64_le(blocks.first);
            out.put_u64_le(blocks.count);
            kind::READ_BLOCKS
        }
        Message::DirtyMap {
            epoch,
            slot,
            blocks,
        } => {
            out.put_u64_le(epoch.0);
            out.put_u8(slot.0);
            put_blocks(out, blocks)?;
            kind::DIRTY_MAP
        }
        Message::EpochUpdate { epoch, in_sync } => {
            out.put_u64_le(epoch.0);
            out.put_u8(*in_sync);
            kind::EPOCH_UPDATE
        }
        Message::Uncertain {
            epoch,
            blocks,
            last,
        } => {
            out.put_u64_le(epoch.0);
            out.put_u8(u8::from(*last));
            put_blocks(out, blocks)?;
            kind::UNCERTAIN
        }
        Message::Tail {
            epoch,
            blocks,
            certain,
        } => {
            out.put_u64_le(epoch.0);
            out.put_u8(u8::from(*certain));
            put_blocks(out, blocks)?;
            kind::TAIL
        }
        Message::Refuse(refusal) => {
            put_refusal(out, refusal);
            kind::REFUSE
        }
        Message::Receipts { epoch, wanted } => {
            out.put_u64_le(epoch.0);
            out.put_u8(u8::from(*wanted));
            kind::RECEIPTS
        }
        Message::Generation {
            epoch,
            slot,
            confirmed,
        } => {
            out.put_u64_le(epoch.0);
            out.put_u8(slot.0);
            out.put_u8(u8::from(*confirmed));
            kind::GENERATION
        }
        Message::Behind { epoch, id } => put_pair(out, kind::BEHIND, *epoch, *id),
        Message::Following { epoch } => put_epoch(out, kind::FOLLOWING, *epoch),
        Message::Received { epoch, seq } => put_pair(out, kind::RECEIVED, *epoch, seq.0),
        Message::Digests {
            epoch,
            id,
            first,
            digests,
        } => {
            put_comparison(out, *epoch, *id, *first, digests)?;
            kind::DIGESTS
        }
        Message::SyncDigests {
            epoch,
            id,
            first,
            digests,
        } => {
            put_comparison(out, *epoch, *id, *first, digests)?;
            kind::SYNC_DIGESTS
        }
        Message::Differ { epoch, id, blocks } => {
            put_pair(out, kind::DIFFER, *epoch, *id);
            put_blocks(out, blocks)?;
            kind::DIFFER
        }
        Message::SyncDiffer { epoch, id, blocks } => {
            put_pair(out, kind::SYNC_DIFFER, *epoch, *id);
            put_blocks(out, blocks)?;
            kind::SYNC_DIFFER
        }
        Message::Verifying { epoch, active } => {
            out.put_u64_le(epoch.0);
            out.put_u8(u8::from(*active));
            kind::VERIFYING
        }
        Message::Changes { blocks, consistent } => {
            out.put_u64_le(*blocks);
            out.put_u8(u8::from(*consistent));
            kind::CHANGES
        }
        Message::PauseSync { paused } => {
            out.put_u8(u8::from(*paused));
            kind::PAUSE_SYNC
        }
        Message::StartSync { epoch } => put_epoch(out, kind::START_SYNC, *epoch),
        Message::Reconcile { epoch } => put_epoch(out, kind::RECONCILE, *epoch),
        Message::Flush { epoch, id } => put_pair(out, kind::FLUSH, *epoch, *id),
        Message::Barrier { epoch, id } => put_pair(out, kind::BARRIER, *epoch, *id),
        Message::Complete { epoch, seq } => put_pair(out, kind::COMPLETE, *epoch, seq.0),
        Message::WriteAck { epoch, seq } => put_pair(out, kind::WRITE_ACK, *epoch, seq.0),
        Message::FlushAck { epoch, id } => put_pair(out, kind::FLUSH_ACK, *epoch, *id),
        Message::SyncAck { epoch, id } => put_pair(out, kind::SYNC_ACK, *epoch, *id),
        Message::BarrierAck { epoch, id } => put_pair(out, kind::BARRIER_ACK, *epoch, *id),
        Message::Ping => kind::PING,
        Message::Pong => kind::PONG,
        Message::Moved => kind::MOVED,
    };
    Ok((kind, None))
}

fn put_epoch(out: &mut BytesMut, kind: u8, epoch: Epoch) -> u8 {
    out.put_u64_le(epoch.0);
    kind
}

fn put_pair(out: &mut BytesMut, kind: u8, epoch: Epoch, number: u64) -> u8 {
    out.put_u64_le(epoch.0);
    out.put_u64_le(number);
    kind
}

fn put_body(
    out: &mut BytesMut,
    kind: u8,
    range: ByteRange,
    body: &Body,
) -> Result<Option<Bytes>, FrameError> {
    out.put_u64_le(range.offset);
    out.put_u64_le(range.len);
    match body {
        Body::Data(data) if data.len() as u64 == range.len => {
            out.put_u8(BODY_DATA);
            Ok(Some(data.clone()))
        }
        Body::Data(_) => Err(FrameError::Malformed {
            kind,
            why: "the data is not as long as its range",
        }),
        Body::Zeroes => {
            out.put_u8(BODY_ZEROES);
            Ok(None)
        }
    }
}

fn put_blocks(out: &mut BytesMut, blocks: &[BlockRange]) -> Result<(), FrameError> {
    if blocks.len() > MAX_BLOCK_RUNS {
        return Err(FrameError::TooLong {
            part: "fields",
            len: blocks.len() * 16,
            max: MAX_BLOCK_RUNS * 16,
        });
    }
    out.reserve(blocks.len() * 16);
    for run in blocks {
        out.put_u64_le(run.first);
        out.put_u64_le(run.count);
    }
    Ok(())
}

fn put_comparison(
    out: &mut BytesMut,
    epoch: Epoch,
    id: u64,
    first: u64,
    digests: &[BlockDigest],
) -> Result<(), FrameError> {
    out.put_u64_le(epoch.0);
    out.put_u64_le(id);
    out.put_u64_le(first);
    put_digests(out, digests)
}

fn put_digests(out: &mut BytesMut, digests: &[BlockDigest]) -> Result<(), FrameError> {
    if digests.len() > MAX_DIGESTS {
        return Err(FrameError::TooLong {
            part: "fields",
            len: digests.len() * BlockDigest::BYTES,
            max: MAX_DIGESTS * BlockDigest::BYTES,
        });
    }
    for digest in digests {
        out.put_slice(&digest.0);
    }
    Ok(())
}

fn put_refusal(out: &mut BytesMut, refusal: &Refusal) {
    match refusal {
        Refusal::StaleEpoch { given, seen } => {
            out.put_u8(REFUSE_STALE_EPOCH);
            out.put_u64_le(given.0);
            out.put_u64_le(seen.0);
        }
        Refusal::Disk { reason } => {
            out.put_u8(REFUSE_DISK);
            put_reason(out, reason);
        }
        Refusal::Protocol { reason } => {
            out.put_u8(REFUSE_PROTOCOL);
            put_reason(out, reason);
        }
        Refusal::StandAlone { reason } => {
            out.put_u8(REFUSE_STAND_ALONE);
            put_reason(out, reason);
        }
        Refusal::SplitBrain { ours, theirs, why } => {
            out.put_u8(REFUSE_SPLIT_BRAIN);
            out.put_u64_le(*ours);
            out.put_u64_le(*theirs);
            put_reason(out, why);
        }
    }
}

fn put_reason(out: &mut BytesMut, reason: &str) {
    let cut = reason.floor_char_boundary(MAX_REASON_BYTES);
    out.put_slice(&reason.as_bytes()[..cut]);
}

/// Reads the fields of a message. Everything must be used up: fields and data.
pub(super) fn read_fields(kind: u8, fields: &[u8], data: Bytes) -> Result<Message, FrameError> {
    let mut fields = Fields { kind, rest: fields };
    if !data.is_empty() && !matches!(kind, kind::WRITE | kind::SYNC_WRITE | kind::CONTENT) {
        return Err(fields.malformed("it carries data"));
    }
    let message = read_message(&mut fields, data)?;
    if fields.rest.is_empty() {
        Ok(message)
    } else {
        Err(fields.malformed("its fields are too long"))
    }
}

fn read_message(fields: &mut Fields<'_>, data: Bytes) -> Result<Message, FrameError> {
    Ok(match fields.kind {
        kind::HELLO => Message::Hello(PeerInfo {
            node: NodeId(fields.u32()?),
            instance: Instance(fields.u64()?),
            lineage: LineageId(fields.u64()?),
            epoch: fields.epoch()?,
        }),
        kind::START_SYNC => Message::StartSync {
            epoch: fields.epoch()?,
        },
        kind::WRITE => {
            let (epoch, seq, complete) = (fields.epoch()?, fields.seq()?, fields.seq()?);
            let (range, body) = fields.body(data)?;
            Message::Write {
                epoch,
                seq,
                complete,
                range,
                body,
                fua: fields.bool()?,
                dirty_for: fields.u8()?,
            }
        }
        kind::FLUSH => Message::Flush {
            epoch: fields.epoch()?,
            id: fields.u64()?,
        },
        kind::SYNC_WRITE => {
            let (epoch, id) = (fields.epoch()?, fields.u64()?);
            let (range, body) = fields.body(data)?;
            Message::SyncWrite {
                epoch,
                id,
                range,
                body,
            }
        }
        kind::DIRTY_MAP => Message::DirtyMap {
            epoch: fields.epoch()?,
            slot: fields.slot()?,
            blocks: fields.blocks()?,
        },
        kind::BARRIER => Message::Barrier {
            epoch: fields.epoch()?,
            id: fields.u64()?,
        },
        kind::EPOCH_UPDATE => Message::EpochUpdate {
            epoch: fields.epoch()?,
            in_sync: fields.u8()?,
        },
        kind::COMPLETE => Message::Complete {
            epoch: fields.epoch()?,
            seq: fields.seq()?,
        },
        kind::BEHIND => Message::Behind {
            epoch: fields.epoch()?,
            id: fields.u64()?,
        },
        kind::FOLLOWING => Message::Following {
            epoch: fields.epoch()?,
        },
        kind::RECEIPTS => Message::Receipts {
            epoch: fields.epoch()?,
            wanted: fields.bool()?,
        },
        kind::GENERATION => Message::Generation {
            epoch: fields.epoch()?,
            slot: fields.slot()?,
            confirmed: fields.bool()?,
        },
        kind::DIGESTS => Message::Digests {
            epoch: fields.epoch()?,
            id: fields.u64()?,
            first: fields.u64()?,
            digests: fields.digests()?,
        },
        kind::SYNC_DIGESTS => Message::SyncDigests {
            epoch: fields.epoch()?,
            id: fields.u64()?,
            first: fields.u64()?,
            digests: fields.digests()?,
        },
        kind::READ_BLOCKS => Message::ReadBlocks {
            epoch: fields.epoch()?,
            id: fields.u64()?,
            blocks: fields.run()?,
        },
        kind::VERIFYING => Message::Verifying {
            epoch: fields.epoch()?,
            active: fields.bool()?,
        },
        kind::RECONCILE => Message::Reconcile {
            epoch: fields.epoch()?,
        },
        _ => read_answer(fields, data)?,
    })
}

fn read_answer(fields: &mut Fields<'_>, data: Bytes) -> Result<Message, FrameError> {
    Ok(match fields.kind {
        kind::UNCERTAIN => Message::Uncertain {
            epoch: fields.epoch()?,
            last: fields.bool()?,
            blocks: fields.blocks()?,
        },
        kind::WRITE_ACK => Message::WriteAck {
            epoch: fields.epoch()?,
            seq: fields.seq()?,
        },
        kind::RECEIVED => Message::Received {
            epoch: fields.epoch()?,
            seq: fields.seq()?,
        },
        kind::FLUSH_ACK => Message::FlushAck {
            epoch: fields.epoch()?,
            id: fields.u64()?,
        },
        kind::SYNC_ACK => Message::SyncAck {
            epoch: fields.epoch()?,
            id: fields.u64()?,
        },
        kind::BARRIER_ACK => Message::BarrierAck {
            epoch: fields.epoch()?,
            id: fields.u64()?,
        },
        kind::TAIL => Message::Tail {
            epoch: fields.epoch()?,
            certain: fields.bool()?,
            blocks: fields.blocks()?,
        },
        kind::CONTENT => {
            let (epoch, id) = (fields.epoch()?, fields.u64()?);
            let (range, body) = fields.body(data)?;
            Message::Content {
                epoch,
                id,
                range,
                body,
            }
        }
        kind::REFUSE => Message::Refuse(fields.refusal()?),
        kind::DIFFER => Message::Differ {
            epoch: fields.epoch()?,
            id: fields.u64()?,
            blocks: fields.blocks()?,
        },
        kind::SYNC_DIFFER => Message::SyncDiffer {
            epoch: fields.epoch()?,
            id: fields.u64()?,
            blocks: fields.blocks()?,
        },
        kind::PAUSE_SYNC => Message::PauseSync {
            paused: fields.bool()?,
        },
        kind::CHANGES => Message::Changes {
            blocks: fields.u64()?,
            consistent: fields.bool()?,
        },
        kind::PING => Message::Ping,
        kind::PONG => Message::Pong,
        kind::MOVED => Message::Moved,
        found => return Err(FrameError::UnknownType { found }),
    })
}

/// A reader over the fields of one frame.
struct Fields<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl Fields<'_> {
    fn malformed(&self, why: &'static str) -> FrameError {
        FrameError::Malformed {
            kind: self.kind,
            why,
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.malformed("its fields are too short"));
        };
        self.rest = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, FrameError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    fn epoch(&mut self) -> Result<Epoch, FrameError> {
        self.u64().map(Epoch)
    }

    fn seq(&mut self) -> Result<Seq, FrameError> {
        self.u64().map(Seq)
    }

    fn bool(&mut self) -> Result<bool, FrameError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.malformed("a flag is neither 0 nor 1")),
        }
    }

    fn slot(&mut self) -> Result<ReplicaSlot, FrameError> {
        let slot = ReplicaSlot(self.u8()?);
        if slot.index() < ReplicaSlot::COUNT {
            Ok(slot)
        } else {
            Err(self.malformed("there is no such replica slot"))
        }
    }

    fn body(&mut self, data: Bytes) -> Result<(ByteRange, Body), FrameError> {
        let range = ByteRange::new(self.u64()?, self.u64()?);
        if range.checked_end().is_none() {
            return Err(self.malformed("its range ends beyond 2^64"));
        }
        match (self.u8()?, data.len() as u64) {
            (BODY_DATA, len) if len == range.len && data.len() <= MAX_DATA_BYTES => {
                Ok((range, Body::Data(data)))
            }
            (BODY_DATA, _) => Err(self.malformed("the data is not as long as its range")),
            (BODY_ZEROES, 0) => Ok((range, Body::Zeroes)),
            (BODY_ZEROES, _) => Err(self.malformed("it writes zeroes and carries data")),
            _ => Err(self.malformed("its body is of an unknown kind")),
        }
    }

    /// All that is left, as digests.
    fn digests(&mut self) -> Result<Vec<BlockDigest>, FrameError> {
        let (digests, rest) = self.rest.as_chunks::<{ BlockDigest::BYTES }>();
        if !rest.is_empty() {
            return Err(self.malformed("a digest is cut short"));
        }
        self.rest = &[];
        Ok(digests.iter().copied().map(BlockDigest).collect())
    }

    fn run(&mut self) -> Result<BlockRange, FrameError> {
        let run = BlockRange::new(self.u64()?, self.u64()?);
        if run.first.checked_add(run.count).is_none() {
            return Err(self.malformed("a run of blocks ends beyond 2^64"));
        }
        Ok(run)
    }

    /// All that is left, as runs of blocks.
    fn blocks(&mut self) -> Result<Vec<BlockRange>, FrameError> {
        if !self.rest.len().is_multiple_of(16) {
            return Err(self.malformed("a run of blocks is cut short"));
        }
        let mut blocks = Vec::with_capacity(self.rest.len() / 16);
        while !self.rest.is_empty() {
            blocks.push(self.run()?);
        }
        Ok(blocks)
    }

    fn refusal(&mut self) -> Result<Refusal, FrameError> {
        Ok(match self.u8()? {
            REFUSE_STALE_EPOCH => Refusal::StaleEpoch {
                given: self.epoch()?,
                seen: self.epoch()?,
            },
            REFUSE_DISK => Refusal::Disk {
                reason: self.reason()?,
            },
            REFUSE_PROTOCOL => Refusal::Protocol {
                reason: self.reason()?,
            },
            REFUSE_STAND_ALONE => Refusal::StandAlone {
                reason: self.reason()?,
            },
            REFUSE_SPLIT_BRAIN => Refusal::SplitBrain {
                ours: self.u64()?,
                theirs: self.u64()?,
                why: self.reason()?,
            },
            _ => return Err(self.malformed("it refuses for an unknown reason")),
        })
    }

    /// All that is left, as text.
    fn reason(&mut self) -> Result<String, FrameError> {
        let bytes = std::mem::take(&mut self.rest);
        if bytes.len() > MAX_REASON_BYTES {
            return Err(self.malformed("its reason is too long"));
        }
        String::from_utf8(bytes.to_vec()).map_err(|_| self.malformed("its reason is no text"))
    }
}
