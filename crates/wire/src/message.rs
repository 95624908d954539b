//! Messages between the replication engines of two nodes, about one volume.
//!
//! A link carries one volume between two nodes; transport has authenticated the peer, and messages
//! of one link arrive in order or the link breaks. All state that a message refers to dies with
//! its link.

use bytes::Bytes;
use relevo_types::{BlockRange, ByteRange, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Seq};

/// A message between two engines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// First message of both sides on a new link.
    Hello(PeerInfo),

    // Primary to the others, under its epoch.
    /// Become a resync target (`SyncTarget`): persist the epoch, persist and report what may
    /// differ. Answered by [`Message::Uncertain`].
    StartSync {
        /// The primary's epoch.
        epoch: Epoch,
    },
    /// An application write.
    Write {
        /// The primary's epoch.
        epoch: Epoch,
        /// Its position; grows by one with each write of an epoch.
        seq: Seq,
        /// Every write at or below this position is on every member of the in-sync set.
        complete: Seq,
        /// Where.
        range: ByteRange,
        /// What.
        body: Body,
        /// Acknowledge only when it is on stable storage.
        fua: bool,
        /// Replicas that do not get this write: mark its blocks dirty for them. Bit n is slot n.
        dirty_for: u8,
    },
    /// Make every write acknowledged so far durable. Answered by [`Message::FlushAck`].
    Flush {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer; grows.
        id: u64,
    },
    /// Content of a range that is dirty for the receiver. Answered by [`Message::SyncAck`].
    SyncWrite {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer; grows.
        id: u64,
        /// Where; whole blocks.
        range: ByteRange,
        /// What.
        body: Body,
    },
    /// Blocks that another replica lacks. The receiver adds them to its bitmap for that replica.
    DirtyMap {
        /// The primary's epoch.
        epoch: Epoch,
        /// The other replica.
        slot: ReplicaSlot,
        /// The blocks.
        blocks: Vec<BlockRange>,
    },
    /// End of a resync: answer with [`Message::BarrierAck`] when everything sent before is on
    /// stable storage.
    Barrier {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer.
        id: u64,
    },
    /// The configuration that is in force for what follows on this link. The receiver persists
    /// the epoch before it acts on anything under it.
    EpochUpdate {
        /// The new epoch.
        epoch: Epoch,
        /// Its in-sync set, as slots. Bit n is slot n.
        in_sync: u8,
    },
    /// Sent when no write carries the news for a while: see `complete` of [`Message::Write`].
    Complete {
        /// The primary's epoch.
        epoch: Epoch,
        /// The position.
        seq: Seq,
    },
    /// The receiver, of protocol A, does not keep up: what follows is not sent but marked for it, until
    /// everything before this has arrived. Answered by [`Message::BarrierAck`], like a barrier.
    Behind {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer.
        id: u64,
    },
    /// The receiver, of protocol A, has got everything that it lacked, on stable storage: from here on
    /// it is a prefix of what the primary wrote.
    Following {
        /// The primary's epoch.
        epoch: Epoch,
    },
    /// A new generation of marks for a replica of protocol A begins here, at the receiver, another
    /// replica: what it marks for that one from here on is of it.
    Generation {
        /// The primary's epoch.
        epoch: Epoch,
        /// The replica of protocol A.
        slot: ReplicaSlot,
        /// That replica has acknowledged every write before the begin of the last generation, so what
        /// was marked for it before that is forgotten.
        confirmed: bool,
    },
    /// Whether the receiver shall say that it received a write ([`Message::Received`], protocol B)
    /// before it says that it is done.
    Receipts {
        /// The primary's epoch.
        epoch: Epoch,
        /// It shall.
        wanted: bool,
    },
    /// The new primary asks a member of the in-sync set what it has that others may lack. The
    /// receiver persists the epoch and answers with [`Message::Tail`].
    Reconcile {
        /// The new primary's epoch.
        epoch: Epoch,
    },

    /// Digests of the primary's content from a block on, one a block, as it is at this place of the
    /// stream. Answered by [`Message::Differ`].
    Digests {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer.
        id: u64,
        /// The first block.
        first: u64,
        /// A digest of it and of each block that follows; at least one.
        digests: Vec<BlockDigest>,
    },
    /// The same in a resync, of blocks that the receiver may lack. Answered by [`Message::SyncDiffer`].
    SyncDigests {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer.
        id: u64,
        /// The first block.
        first: u64,
        /// A digest of it and of each block that follows; at least one.
        digests: Vec<BlockDigest>,
    },
    /// The primary's disk refuses to read these blocks: the receiver, a member of the in-sync set,
    /// shall. Answered by [`Message::Content`].
    ReadBlocks {
        /// The primary's epoch.
        epoch: Epoch,
        /// Echoed in the answer.
        id: u64,
        /// The blocks; at most 256.
        blocks: BlockRange,
    },
    /// The primary begins or ends to compare the receiver's replica with its own: for its status.
    Verifying {
        /// The primary's epoch.
        epoch: Epoch,
        /// It begins.
        active: bool,
    },

    // The others to the primary; `epoch` echoes the primary's.
    /// Which blocks of the sender may differ from the primary's (answer to `StartSync`).
    Uncertain {
        /// Echo.
        epoch: Epoch,
        /// The blocks; more may follow.
        blocks: Vec<BlockRange>,
        /// This was the last part.
        last: bool,
    },
    /// A write was done.
    WriteAck {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        seq: Seq,
    },
    /// A write was received; [`Message::WriteAck`] follows.
    Received {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        seq: Seq,
    },
    /// A flush was done.
    FlushAck {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        id: u64,
    },
    /// A resync write was done.
    SyncAck {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        id: u64,
    },
    /// Answer to [`Message::Digests`].
    Differ {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        id: u64,
        /// The blocks whose digests differ at the sender.
        blocks: Vec<BlockRange>,
    },
    /// Answer to [`Message::SyncDigests`].
    SyncDiffer {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        id: u64,
        /// The blocks that the sender must be given. The others it has as the primary has them.
        blocks: Vec<BlockRange>,
    },
    /// Answer to [`Message::ReadBlocks`].
    Content {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        id: u64,
        /// Where; the blocks that were asked for.
        range: ByteRange,
        /// What is there.
        body: Body,
    },
    /// A barrier was passed.
    BarrierAck {
        /// Echo.
        epoch: Epoch,
        /// Echo.
        id: u64,
    },
    /// Answer to `Reconcile`.
    Tail {
        /// Echo.
        epoch: Epoch,
        /// Blocks of writes that the sender got and does not know to be complete.
        blocks: Vec<BlockRange>,
        /// False when the sender restarted and can't tell: it must be resynced instead.
        certain: bool,
    },
    /// The sender can't do what was asked. The link closes after it.
    Refuse(Refusal),
    /// The greetings named different histories: what the sender has of its own. Sent again, with what is
    /// left, while a replica that gives way saves it: a sign of life.
    Changes {
        /// Blocks of 4 KiB that the receiver may lack and the sender has, as far as the sender knows.
        blocks: u64,
        /// The sender's replica is no mix of old and new: it could be kept.
        consistent: bool,
    },

    // Both.
    /// The sender's operator wants the resync between the two to stand still, or to go on. Holds for
    /// this link; writes are replicated all the same.
    PauseSync {
        /// It shall stand still.
        paused: bool,
    },
    /// The last message on a connection: what follows comes on another one, as if it were the same link.
    /// Between the ends of connections; an engine never sees it.
    Moved,
    /// Keeps an idle link provably alive. Answered by [`Message::Pong`].
    Ping,
    /// Answer to `Ping`.
    Pong,
}

/// How an engine introduces itself on a new link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerInfo {
    /// The sender.
    pub node: NodeId,
    /// Drawn when the sender's engine started.
    pub instance: Instance,
    /// The history its data belongs to.
    pub lineage: LineageId,
    /// The highest epoch it has persisted.
    pub epoch: Epoch,
}

/// The SHA-256 of a block of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockDigest(pub [u8; BlockDigest::BYTES]);

impl BlockDigest {
    /// Its length.
    pub const BYTES: usize = 32;
}

/// What a write writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// These bytes, as many as the range is long.
    Data(Bytes),
    /// Zeroes; storage may be released (trim and write-zeroes: a trimmed block reads as zeroes on
    /// every replica alike).
    Zeroes,
}

/// Why an engine ends a link.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// The sender has seen a higher epoch: the receiver was replaced.
    #[error("epoch {seen} is in force, {given} is over")]
    StaleEpoch {
        /// The epoch that was sent.
        given: Epoch,
        /// The highest epoch seen.
        seen: Epoch,
    },
    /// The sender's disk failed or is not attached.
    #[error("the disk is not usable: {reason}")]
    Disk {
        /// What failed.
        reason: String,
    },
    /// The sender shall have no link to the receiver until it is told otherwise.
    #[error("it stands alone: {reason}")]
    StandAlone {
        /// Who or what decided that, and why.
        reason: String,
    },
    /// The histories of both forked, both have changes of their own, and nobody decided yet.
    #[error("split brain: {ours} blocks were changed there alone, {theirs} here alone; {why}")]
    SplitBrain {
        /// Blocks of 4 KiB that only the sender has.
        ours: u64,
        /// Blocks that only the receiver has.
        theirs: u64,
        /// Why none of them gives way.
        why: String,
    },
    /// The receiver broke the protocol.
    #[error("protocol error: {reason}")]
    Protocol {
        /// What was wrong.
        reason: String,
    },
}
