//! The engine's border: inputs, effects and the values in them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use relevo_types::{
    BlockRange, ByteRange, ClusterId, Epoch, Instance, LineageId, NodeId, Time, VolumeId,
    cluster::{Volume, VolumeChange},
};
use relevo_wire::{Body, Message};

use crate::order::{Order, OrderId};

/// What an engine is told once, when it is made.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The cluster; checked against the metadata.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// This node.
    pub node: NodeId,
    /// Random number of this start.
    pub instance: Instance,
    /// Size of the backing file or device, in bytes: data area and metadata.
    pub backing_size: u64,
    /// A link that is owed an answer and silent this long is closed. The dead time.
    pub link_timeout: Duration,
    /// A quiet link gets a `Ping` this often.
    pub ping_interval: Duration,
    /// How long a new primary waits for an in-sync member without a link before it lets it leave
    /// the set.
    pub reconcile_grace: Duration,
    /// Resync data under way to one peer at most, in bytes.
    pub resync_window: u64,
}

/// What happens to an engine.
#[derive(Clone, Debug)]
pub enum Input {
    /// Read the metadata and become ready: the first input. Ends with
    /// [`VolumeEvent::Attached`] or [`VolumeEvent::DiskFailed`].
    Attach,
    /// The volume's configuration as committed in the control log; the newest version wins, older and
    /// equal ones are ignored.
    Config(Arc<Volume>),
    /// Reads may be served until then by this node's lease (DESIGN, rule 8).
    LeaseUntil(Time),
    /// A link to a peer is up. Replaces an older link to it.
    LinkUp {
        /// The peer, authenticated.
        peer: NodeId,
    },
    /// The link to a peer is gone.
    LinkDown {
        /// The peer.
        peer: NodeId,
    },
    /// A message arrived on the link to a peer.
    Message {
        /// The peer.
        peer: NodeId,
        /// The message.
        message: Message,
    },
    /// A disk operation ended.
    Disk {
        /// The operation.
        op: OpId,
        /// How.
        result: Result<DiskReply, DiskError>,
    },
    /// An application asks for something. Answered by one [`Effect::Reply`], now or later.
    Request {
        /// Chosen by the caller, unique among those not yet answered.
        id: RequestId,
        /// What it asks.
        request: AppRequest,
    },
    /// Prepare a planned step-down: take no more requests, drain, make every in-sync replica
    /// durable, then propose `Demote`. Ends with a configuration without a primary.
    Demote,
    /// Detach cleanly: flush, write the bitmap, mark the metadata clean. Ends with
    /// [`VolumeEvent::Detached`].
    Detach,
    /// An operator's order. Answered by one [`Effect::OrderDone`].
    Order {
        /// Chosen by the caller.
        id: OrderId,
        /// The order.
        order: Order,
    },
    /// A part of what gives way was kept, or could not be. Answers one [`Effect::Save`].
    Saved {
        /// The saving.
        id: SaveId,
        /// Why it could not be kept.
        result: Result<(), String>,
    },
    /// Nothing happened but the time; due at [`crate::Engine::deadline`].
    Tick,
}

/// A disk operation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// What a replica has of its own, being saved before it is overwritten.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SaveId(pub u64);

/// A part of what is saved. One is under way at a time; the next comes when it was answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SavePart {
    /// The first part.
    Begin {
        /// The history that gives way.
        from: LineageId,
        /// The node that it gives way to.
        to: NodeId,
        /// How many blocks of 4 KiB come.
        blocks: u64,
    },
    /// Whole blocks and their content.
    Blocks {
        /// Which.
        blocks: BlockRange,
        /// Their bytes.
        data: Bytes,
    },
    /// The last part: answered when everything is on stable storage.
    End,
}

/// An application request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// What an application asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AppRequest {
    /// Read a range, any alignment, within the volume.
    Read(ByteRange),
    /// Write a range, whole blocks.
    Write {
        /// Where.
        range: ByteRange,
        /// What.
        body: Body,
        /// Answer when it is on stable storage of every in-sync replica.
        fua: bool,
    },
    /// Make every answered write durable on every in-sync replica.
    Flush,
}

/// An operation on the backing. Offsets are of the backing: the data area starts at 0, metadata
/// is at the end. Offsets and lengths are multiples of 512 (the engine uses whole blocks except
/// for reads, which it widens itself).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskOp {
    /// Echoed in [`Input::Disk`].
    pub op: OpId,
    /// What to do.
    pub kind: DiskOpKind,
}

/// What to do on the backing. Operations under way are not ordered among each other; only a
/// completed flush orders: it covers the operations that had completed when it was submitted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskOpKind {
    /// Read a range. Never short.
    Read(ByteRange),
    /// Write bytes.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// Make a range read as zeroes, releasing storage where that is possible.
    Zero(ByteRange),
    /// Make completed operations durable.
    Flush,
}

/// What a disk operation gave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskReply {
    /// The bytes of a read.
    Data(Bytes),
    /// Anything else is done.
    Done,
}

/// A disk operation failed. Whether the write happened is unknown.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} failed: {reason}")]
pub struct DiskError {
    /// `read`, `write`, `flush`, `zero`.
    pub what: &'static str,
    /// The system's words.
    pub reason: String,
}

/// What an engine wants done, in the order of the list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Start a disk operation.
    Disk(DiskOp),
    /// Send a message on the link to a peer, after all earlier ones. Dropped when there is none.
    Send {
        /// The peer.
        peer: NodeId,
        /// The message.
        message: Message,
    },
    /// Close the link to a peer after what was sent; the driver connects again. Followed by no
    /// `LinkDown`: the engine already forgot the link.
    CloseLink {
        /// The peer.
        peer: NodeId,
        /// Why, for the log.
        reason: String,
    },
    /// Answer an application request.
    Reply {
        /// The request.
        id: RequestId,
        /// Its result: the bytes of a read, or empty.
        result: Result<Bytes, ReplyError>,
    },
    /// Propose a change of the configuration, expecting this epoch. Whatever comes of it arrives
    /// as [`Input::Config`]; the engine proposes again while it needs it. The driver may drop
    /// what it can't deliver.
    Propose {
        /// The epoch that the proposal expects.
        expect: Epoch,
        /// The change.
        change: VolumeChange,
    },
    /// Keep a part of what gives way; answered by one [`Input::Saved`]. A new id ends an earlier saving
    /// that is not complete: that one is thrown away.
    Save {
        /// The saving.
        id: SaveId,
        /// The part.
        part: SavePart,
    },
    /// An operator's order was obeyed, or why not.
    OrderDone {
        /// The order.
        id: OrderId,
        /// Done, or the reason.
        result: Result<(), String>,
    },
    /// Something that status, logs and the rest of the node want to know.
    Event(VolumeEvent),
}

/// Why an application request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplyError {
    /// The range is outside the volume or not whole blocks: the caller's mistake.
    #[error("outside the volume or not aligned")]
    Invalid,
    /// This node is not primary of the volume, or is stepping down.
    #[error("this node is not primary of the volume")]
    NotPrimary,
    /// The disk failed.
    #[error("input/output error")]
    Io,
}

/// A change in an engine, with its reason where there is one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeEvent {
    /// The metadata was read.
    Attached {
        /// It was detached cleanly; nothing is uncertain.
        clean: bool,
        /// What is worth knowing, `superblock slot 0 is damaged, slot 1 was used` say.
        remark: Option<String>,
    },
    /// Detached; nothing more comes.
    Detached,
    /// The disk is unusable: metadata damaged, another volume's, or an I/O error. The node lives.
    DiskFailed {
        /// What happened and what to do.
        reason: String,
    },
    /// This node is primary and open for I/O.
    Opened {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// This node is primary, takes no requests, and brings the other replicas up to date.
    Tends {
        /// Under this epoch.
        epoch: Epoch,
    },
    /// This node is no longer primary. Requests not answered were answered with an error.
    Closed {
        /// Why.
        reason: String,
    },
    /// A verification ended, and the log has what it found.
    Verified {
        /// The replica that was compared with this node's.
        node: NodeId,
        /// So many blocks of 4 KiB from the start of the volume on were compared.
        checked: u64,
        /// What differs, seen twice.
        differing: Vec<BlockRange>,
        /// Why it ended before the end of the volume.
        stopped: Option<String>,
        /// The replica now leaves the in-sync set and is given what differs.
        repair: bool,
    },
    /// Blocks that the disk here could not read were read from another replica; they are written anew.
    Healed {
        /// The blocks.
        blocks: BlockRange,
        /// Whose replica had them.
        from: NodeId,
        /// What the disk said.
        error: String,
    },
    /// The disk here could not read all of these blocks, which the primary asked to compare: they count as
    /// different.
    Unreadable {
        /// The blocks.
        blocks: BlockRange,
        /// What the disk said.
        error: String,
    },
    /// The histories of this node's replica and a peer's forked, and both have changes of their own:
    /// nothing is replicated between them until a person, or the policy, decides.
    SplitBrain {
        /// The peer.
        peer: NodeId,
        /// What is known.
        split: SplitBrain,
    },
    /// This replica gave way to the history of a peer. What only it had was saved.
    GaveWay {
        /// The peer.
        to: NodeId,
        /// Blocks of 4 KiB that were saved.
        saved: u64,
    },
    /// What is known of a peer changed.
    Peer {
        /// The peer.
        node: NodeId,
        /// What it is now.
        state: PeerState,
    },
}

/// Two histories with changes of their own met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SplitBrain {
    /// Blocks of 4 KiB that only this node has, as far as it knows.
    pub ours: u64,
    /// Blocks that only the peer has.
    pub theirs: u64,
    /// Why none of them gives way.
    pub why: String,
}

/// What the primary knows of a peer, or a secondary of the primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PeerState {
    /// No link.
    #[default]
    Connecting,
    /// No link, and none is wanted until an operator connects again.
    StandAlone,
    /// A link, nothing to do on it.
    Connected,
    /// The peer gets what it lacks; `dirty` blocks of 4 KiB are left.
    SyncSource {
        /// Blocks left.
        dirty: u64,
    },
    /// This node gets what it lacks.
    SyncTarget,
    /// In sync, and being compared; `left` blocks of 4 KiB were not looked at yet.
    VerifyS {
        /// Blocks left.
        left: u64,
    },
    /// The primary compares this node's replica with its own.
    VerifyT,
    /// The same as `SyncSource`, but an operator of either side paused it.
    PausedSyncS {
        /// Blocks left.
        dirty: u64,
    },
    /// The same as `SyncTarget`, but an operator of either side paused it.
    PausedSyncT,
    /// In sync.
    Established,
    /// Protocol A: one of the two gets every write and is waited for by none. DRBD calls it
    /// `Established` too.
    Following,
    /// The peer, of protocol A, did not keep up: it is sent nothing for now.
    Ahead {
        /// Blocks of 4 KiB that it lacks.
        dirty: u64,
    },
    /// This replica, of protocol A, did not keep up.
    Behind,
}

/// How far a replica of protocol A is behind its primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BehindBy {
    /// Bytes that it is not known to have: on their way, or marked for it.
    pub bytes: u64,
    /// When the oldest of them was written; `None`: it has everything.
    pub since: Option<Time>,
}

/// What an engine tells about itself at any time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EngineStatus {
    /// Primary and open for I/O.
    pub open: bool,
    /// The disk, in DRBD's words.
    pub disk: DiskState,
    /// Highest epoch persisted.
    pub epoch: Epoch,
    /// The metadata was clean at attach, or what was uncertain is resolved since.
    pub certain: bool,
    /// Requests taken and not answered.
    pub in_flight: usize,
    /// The disk failed, and requests wait until data is accessible again
    /// (`on-no-data-accessible=suspend-io`). Not open, and not closed either.
    pub held: bool,
    /// Why requests wait, if some wait for more than the disk: what, for whom.
    pub waiting: Option<String>,
    /// Peers.
    pub peers: BTreeMap<NodeId, PeerState>,
    /// On a primary: replicas of protocol A.
    pub behind: BTreeMap<NodeId, BehindBy>,
    /// On a primary: resyncs that copy, or would if they were not paused, and how many bytes a second they
    /// brought over the last three seconds: 0 when one stands still.
    pub sync_speeds: BTreeMap<NodeId, u64>,
    /// On a primary: bytes that resyncs of these peers did not send, since they were the same there, from
    /// the begin of the session on.
    pub sync_same: BTreeMap<NodeId, u64>,
    /// On a primary: bytes a second that resyncs and verifications are held to; `None`: to nothing.
    pub sync_limit: Option<u64>,
    /// The volume whose resyncs on this node come first: this one's stand still.
    pub sync_after: Option<VolumeId>,
    /// Peers whose history forked from this node's, both with changes.
    pub splits: BTreeMap<NodeId, SplitBrain>,
}

/// How a node's replica asks to become primary, by what its engine knows. One that may lack what it
/// acknowledged says so, and so does one whose engine told nothing yet: then members that may know better
/// are heard first.
#[must_use]
pub fn promotion(node: NodeId, status: Option<&EngineStatus>) -> VolumeChange {
    if status.is_some_and(|status| status.certain) {
        VolumeChange::Promote { node }
    } else {
        VolumeChange::PromoteUncertain { node }
    }
}

/// State of this node's replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DiskState {
    /// Metadata not read yet.
    #[default]
    Attaching,
    /// An I/O error or bad metadata.
    Failed,
    /// In the middle of a resync: a mix of old and new.
    Inconsistent,
    /// Not in the in-sync set: consistent but old.
    Outdated,
    /// Not in the in-sync set, and follows the primary by protocol A: at any time what the primary had
    /// a moment before.
    Consistent,
    /// In the in-sync set.
    UpToDate,
    /// Detached.
    Diskless,
}
