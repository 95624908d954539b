//! What the daemon answers on its Unix socket: JSON over HTTP, version 1.
//!
//! The CLI, the demo and every later user interface speak these types; nothing else of the
//! daemon is reachable from outside. [`request`] is what is asked, [`status`] and [`metadata`] what is shown,
//! [`fence`] both for fencing, [`error`] how a refusal reads.

pub mod error;
pub mod fence;
pub mod metadata;
pub mod request;
pub(crate) mod router;
pub mod status;

pub use error::{ApiError, ErrorKind};
pub use fence::{
    AddFenceDeviceRequest, FenceAgentStatus, FenceAgentSummary, FenceAttemptStatus,
    FenceCheckStatus, FenceDeviceStatus, FenceHistoryEntry, FenceKindRequest, FenceOutlook,
    FenceParameterStatus, FencePower, FenceRequest, FenceTargetStatus, FenceWordRequest,
    FencingStatus,
};
pub use metadata::{ActivityLogDump, BitmapDump, MetadataDump, SuperblockDump, SuperblockSlot};
pub use request::{
    AddReplicaRequest, AddressRequest, ConfirmRequest, CreateServiceRequest, CreateVolumeRequest,
    Done, HoldRequest, InitAnswer, InitRequest, JoinAnswer, JoinRequest, MountRequest,
    MoveServiceRequest, NodeRequest, OrderRequest, PartRequest, PathRequest, PlacementRequest,
    ProcessRequest, ReplicaRequest, SetOptionsRequest, StandbyRequest, TokenAnswer, TokenRequest,
    VolumePartRequest, WaitSyncRequest, WhatIfRequest,
};
pub use status::{
    ClusterStatus, DaemonStatus, DiffersStatus, Event, EventKind, EventLevel, FailureStatus,
    Health, LeaseStatus, LossStatus, MoveForecast, NodeStatus, PartState, PartStatus, PathCarries,
    PathStatus, QuorumStatus, ReplicaStatus, ServiceState, ServiceStatus, SplitStatus, StateChange,
    Status, VolumeStatus, WaitStatus, WhatIfAnswer, WhyAnswer, WhyNode,
};

/// Name of the socket within the state directory.
pub const SOCKET_NAME: &str = "relevo.sock";
