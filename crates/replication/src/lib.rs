//! The replication engine: one sans-IO state machine per volume and node.
//!
//! Call [`Engine::handle`] with an [`Input`] and the time; it runs to its end and leaves
//! [`Effect`]s to be carried out in order. It never blocks, reads no clock, draws no random
//! number. The data path drives it in production, `testing/sim` in simulation; both only move
//! bytes. `docs/protocol.md` explains the protocol.
//!
//! Where to start: [`io`] for what goes in and out; `machine` for the state and the dispatch;
//! `primary`, `sync` (with `compare`) and `promotion` for a reign, `secondary` for the other side of it; `rate` for how fast copies go; `jobs`,
//! `gate` and `activity` for local I/O; `metadata` for what is on disk, and when; `invariants`
//! for the rules; `heal` for what another replica reads.

#![forbid(unsafe_code)]

mod activity;
mod attach;
mod bitmap;
mod compare;
mod digest;
mod engine;
mod follow;
mod gate;
mod generations;
mod heal;
mod invariants;
pub mod io;
mod jobs;
pub mod lab;
mod lineage;
mod link;
mod machine;
mod metadata;
mod meter;
mod ops;
mod order;
mod pause;
mod primary;
mod promotion;
mod proposals;
mod rate;
mod requests;
mod secondary;
mod status;
mod sync;
mod tail;
mod verify;
mod window;

pub use engine::Engine;
pub use follow::ADMITTED_FOR;
pub use io::{
    AppRequest, BehindBy, DiskError, DiskOp, DiskOpKind, DiskReply, DiskState, Effect,
    EngineConfig, EngineStatus, Input, OpId, PeerState, ReplyError, RequestId, SaveId, SavePart,
    SplitBrain, VolumeEvent,
};
pub use lineage::{Side, Verdict, judge};
pub use order::{Order, OrderId};
