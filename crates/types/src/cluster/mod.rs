//! What the control log replicates: the configuration of a cluster and the decisions taken in it.
//!
//! [`ClusterState`] changes only by [`ClusterState::apply`], in the order of the log, on every
//! node alike. A command carries what it expects (an epoch, a generation, a holder) and is
//! rejected when that is no longer so; so two actors that act on old knowledge can't both win.

mod apply;
mod command;
mod differs;
mod fencing;
pub mod options;
mod paths;
mod placement;
mod service;
mod state;
#[cfg(test)]
mod tests;

pub use command::{Command, Outcome, Proof, Rejection, VolumeChange};
pub use differs::{DIFFERS_RUNS_MAX, Differs};
pub use fencing::{
    FENCE_DEVICES_MAX, FENCE_HISTORY_MAX, FENCE_LEVEL_MAX, FenceAction, FenceAsked, FenceCommand,
    FenceDevice, FenceEvidence, FenceFailure, FenceKind, FenceOutcome, FenceProof, FenceRecord,
    FenceTarget, FenceValue, FenceVerified, Fencing,
};
pub use options::{
    AfterSplitBrain, Congestion, Encryption, OnCongestion, PairProtocol, VolumeOptions,
};
pub use paths::{Line, NodePath, PATHS_MAX, PathAddress, StreamPath};
pub use placement::Placement;
pub use service::{
    AddressPart, FailureRecord, MountPart, Part, ProcessPart, Service, ServiceSpec, VolumePart,
};
pub use state::{
    ClusterState, JoinToken, LINEAGES_MAX, LeaseStanding, Node, NodeKind, NodeSpec, Ports,
    Protocol, Replica, ReplicaSpec, ReplicaStanding, Volume,
};
