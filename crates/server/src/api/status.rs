//! What the daemon shows: `GET /v1/status`, `/v1/volumes`, `/v1/services` and `/v1/events`.
//!
//! Nodes, volumes and services appear by name. Moments are milliseconds since 1970 by the clock of
//! the machine that answers, only for people to read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use relevo_membership::PathTrouble;
use relevo_types::{Sensitivity, cluster::NodeKind};
use serde::{Deserialize, Serialize};

use super::FencingStatus;

/// `GET /v1/status`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The verdict; decides the exit code of `relevo status`.
    pub health: Health,
    /// What is not as it should be, a sentence each.
    pub problems: Vec<String>,
    /// The daemon that answers.
    pub daemon: DaemonStatus,
    /// `None` before `init` or `join`.
    pub cluster: Option<ClusterStatus>,
}

/// A verdict.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Everything is as asked for.
    Healthy,
    /// Everything that was asked for is served; something that protects it is missing.
    Degraded,
    /// Something that was asked for is not served, or this node can't tell.
    Down,
}

/// The daemon that answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When it started.
    pub started_unix_ms: u64,
    /// Where it keeps its state.
    pub state_dir: PathBuf,
}

/// The cluster as the answering node sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Its identity.
    pub id: String,
    /// Its name.
    pub name: String,
    /// How fast a silent machine is taken for dead.
    pub sensitivity: Sensitivity,
    /// Position of this node in the control log.
    pub revision: u64,
    /// The node that answers.
    pub this_node: String,
    /// Votes.
    pub quorum: QuorumStatus,
    /// Members.
    pub nodes: Vec<NodeStatus>,
    /// Volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Services.
    pub services: Vec<ServiceStatus>,
    /// What the cluster as a whole waits for.
    pub waits: Vec<WaitStatus>,
    /// Fence devices, and what they are at.
    #[serde(default)]
    pub fencing: FencingStatus,
}

/// Votes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QuorumStatus {
    /// How many members vote.
    pub voters: usize,
    /// How many of them this node hears, itself included.
    pub alive: usize,
    /// How many are a majority.
    pub needed: usize,
    /// The leader of the control log; `None`: there is none now.
    pub leader: Option<String>,
    /// The answering node's lease.
    pub lease: LeaseStatus,
}

/// A node's right to act.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// It has it now.
    pub held: bool,
    /// How long it still holds without news, in milliseconds.
    pub left_ms: u64,
}

/// A member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its id in logs.
    pub id: String,
    /// Data node or witness.
    pub kind: NodeKind,
    /// `alive`, `suspect`, `dead` or `unknown`.
    pub state: String,
    /// Why, when there is more to say.
    pub reason: Option<String>,
    /// Since when.
    pub since_unix_ms: Option<u64>,
    /// Its vote counts.
    pub voter: bool,
    /// Services leave it.
    pub standby: bool,
    /// What it held was taken from it and it was not readmitted yet.
    pub evicted: bool,
    /// Ways to it; for the answering node its own addresses.
    pub paths: Vec<PathStatus>,
}

/// A way to a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PathStatus {
    /// Its name.
    pub name: String,
    /// The node's address there: an IP address, or a stream as in `serial:/dev/ttyS0:115200`.
    pub address: String,
    /// What it carries.
    pub carries: PathCarries,
    /// Heartbeats arrive; `None` for the answering node itself.
    pub up: Option<bool>,
    /// Smoothed round trip in microseconds.
    pub round_trip_us: Option<u32>,
    /// Smoothed variation of the round trip in microseconds, as in RFC 3550.
    pub jitter_us: Option<u32>,
    /// Heartbeats missed of the last 100, in percent.
    pub loss_percent: u8,
    /// The alarm that the answering node has about it.
    pub trouble: Option<PathTrouble>,
    /// Why the node itself can't use it: its address or device is missing, say.
    pub unusable: Option<String>,
}

/// What goes over a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathCarries {
    /// Heartbeats, the control log and replication.
    All,
    /// A byte stream: heartbeats and nothing else.
    Heartbeats,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its id in logs.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// Number of its configuration; 0 until every replica was created.
    pub epoch: u64,
    /// Its primary.
    pub primary: Option<String>,
    /// The node that brings the other replicas up to date while nobody uses the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tended_by: Option<String>,
    /// Members of the in-sync set.
    pub in_sync: Vec<String>,
    /// Replicas.
    pub replicas: Vec<ReplicaStatus>,
    /// The answering node's own links to the other replicas: node and state.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    /// What the administrator chose, or the defaults.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Block device on the answering node.
    pub device: Option<PathBuf>,
    /// NBD socket on the answering node.
    pub nbd: Option<PathBuf>,
    /// What its requests wait for.
    pub wait: Option<WaitStatus>,
    /// Split brain: pairs of replicas whose histories forked, both with changes of their own.
    #[serde(default)]
    pub splits: Vec<SplitStatus>,
}

/// Two replicas whose histories forked. Nothing is replicated between them until somebody decides.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SplitStatus {
    /// One of the two; the primary, where it is one of them.
    pub node: String,
    /// Blocks of 4 KiB that only its replica has.
    pub blocks: u64,
    /// The other one.
    pub peer: String,
    /// Blocks of 4 KiB that only that replica has.
    pub peer_blocks: u64,
    /// Why neither gives way by itself.
    pub why: String,
}

/// What is known of what is lost by a decision, for whoever takes it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LossStatus {
    /// Name of the volume.
    pub volume: String,
    /// The node whose replica is kept.
    pub node: String,
    /// What is known, a sentence each.
    pub known: Vec<String>,
    /// What speaks against it, a sentence each.
    pub warnings: Vec<String>,
}

/// What verification found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiffersStatus {
    /// The node whose replica it was compared with.
    pub from: String,
    /// Bytes that differ, in whole blocks of 4 KiB.
    pub bytes: u64,
    /// Where, as offset and length in bytes. If there are more than 256 places, neighbours are one.
    pub places: Vec<(u64, u64)>,
    /// It is being given what the primary has.
    pub repair: bool,
}

/// A replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its node.
    pub node: String,
    /// `Primary` or `Secondary`.
    pub role: String,
    /// `UpToDate`, `Inconsistent` ..., as its node reports it; `None`: it did not answer.
    pub disk: Option<String>,
    /// What the primary (or else the answering node) says of the link to it: `Established`,
    /// `SyncSource`, `Connecting` ...; `None` for the one who says.
    pub replication: Option<String>,
    /// Bytes that it lacks, where known.
    pub dirty_bytes: Option<u64>,
    /// A replica of protocol A: bytes that it may lack of what the primary wrote, by the primary's word.
    pub behind_bytes: Option<u64>,
    /// How old the oldest of them is, in milliseconds; 0: it has everything.
    pub behind_ms: Option<u64>,
    /// The protocol between it and the primary; `None` for the primary, or without one.
    pub protocol: Option<String>,
    /// What verification found to differ from another replica, and nobody repaired since.
    #[serde(default)]
    pub differs: Option<DiffersStatus>,
    /// Progress of its resync since it began, in percent.
    pub sync_percent: Option<u8>,
    /// How fast its resync went over the last three seconds, in bytes a second; 0: it stands still.
    #[serde(default)]
    pub sync_bytes_per_s: Option<u64>,
    /// Bytes that its last resync, since it was connected, compared by checksum and did not send, since they
    /// were the same.
    #[serde(default)]
    pub sync_same_bytes: Option<u64>,
    /// Bytes a second that it is held to, by `resync-rate`, `c-max-rate`, or for the sake of applications.
    #[serde(default)]
    pub sync_limit_bytes_per_s: Option<u64>,
    /// The volume whose resync comes first, while this one waits for it (`resync-after`).
    #[serde(default)]
    pub sync_after: Option<String>,
    /// How long the rest takes at that speed, in seconds; `None` also when it stands still.
    #[serde(default)]
    pub sync_left_s: Option<u64>,
    /// How its node reads and writes the backing: `io_uring`, `thread pool` ...
    pub driver: Option<String>,
    /// File or device on its node.
    pub backing: Option<PathBuf>,
    /// What is wrong with it, or worth knowing.
    pub remark: Option<String>,
}

impl ReplicaStatus {
    /// Of protocol A, and gets every write.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.protocol.as_deref() == Some("A") && self.replication.as_deref() == Some("Established")
    }
}

/// A service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Its id in logs.
    pub id: String,
    /// Whether it shall run.
    pub enabled: bool,
    /// What it is doing.
    pub state: ServiceState,
    /// The node that has its parts.
    pub node: Option<String>,
    /// Where the administrator asked it to be.
    pub target: Option<String>,
    /// Where it may and shall run: `prefer beta alfa`, a rule each.
    #[serde(default)]
    pub placement: Vec<String>,
    /// Why it is held where it is, if it is.
    #[serde(default)]
    pub hold: Option<String>,
    /// Its parts.
    pub parts: Vec<PartStatus>,
    /// Nodes that gave it up.
    pub failures: Vec<FailureStatus>,
    /// What it waits for.
    pub wait: Option<WaitStatus>,
}

/// `GET /v1/services/{name}/why`: why a service is where it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WhyAnswer {
    /// The service.
    pub service: ServiceStatus,
    /// The node that judged, and whether it is the one that decides: the leader of the control log.
    pub judged_by: String,
    /// Whether it decides.
    pub decides: bool,
    /// What is to be said of each node.
    pub nodes: Vec<WhyNode>,
}

/// What would come of something: nothing of it was done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WhatIfAnswer {
    /// Enough voters would be left to decide anything.
    pub decides: bool,
    /// What would be done, in order, with the reasons.
    pub steps: Vec<String>,
    /// Services that would be somewhere else.
    pub moves: Vec<MoveForecast>,
    /// What would have to wait, and why.
    pub waits: Vec<String>,
    /// Redundancy that would be gone.
    pub remarks: Vec<String>,
}

/// A service that would be somewhere else.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MoveForecast {
    /// The service.
    pub service: String,
    /// Where it is.
    pub from: Option<String>,
    /// Where it would be.
    pub to: Option<String>,
}

/// A node and a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WhyNode {
    /// Its name.
    pub node: String,
    /// It has the service.
    pub has_it: bool,
    /// It could run it, now.
    pub can: bool,
    /// In words, to follow the node's name.
    pub verdict: String,
}

/// What a service is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    /// Every part is active.
    Running,
    /// A node holds it and starts its parts.
    Starting,
    /// A node holds it and stops its parts.
    Stopping,
    /// Disabled, and nobody holds it.
    Stopped,
    /// Enabled, and nobody holds it.
    Waiting,
    /// A node holds it and does not answer.
    Unknown,
}

/// A part of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartStatus {
    /// Kind and subject: `mount /srv/mail`.
    pub part: String,
    /// What it is doing.
    pub state: PartState,
    /// More about it: an error, a process id.
    pub detail: Option<String>,
}

/// What a part is doing on the holder.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartState {
    /// Not active.
    Stopped,
    /// Being started.
    Starting,
    /// Active.
    Active,
    /// Being stopped.
    Stopping,
    /// Could not be started, stopped or kept.
    Failed,
    /// The holder did not say.
    Unknown,
}

/// A node that gave a service up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FailureStatus {
    /// The node.
    pub node: String,
    /// How often.
    pub count: u32,
    /// The last reason.
    pub reason: String,
}

/// Something that is waited for (DESIGN, rule 10).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WaitStatus {
    /// What waits.
    pub what: String,
    /// Why.
    pub why: String,
    /// Since when.
    pub since_unix_ms: Option<u64>,
    /// What happens next, and what a person can do.
    pub next: Option<String>,
}

/// One line of `relevo events`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with each event of a daemon's run.
    pub number: u64,
    /// When, by this machine's clock.
    pub unix_ms: u64,
    /// The node that tells it.
    pub node: String,
    /// What it is about.
    pub kind: EventKind,
    /// How much it matters.
    pub level: EventLevel,
    /// The node, volume, service or path concerned; empty for the cluster.
    pub subject: String,
    /// What happened and why.
    pub text: String,
    /// The state that changed, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<StateChange>,
}

/// A state of this node's replica of a volume that changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StateChange {
    /// `role`, `disk` or `replication`.
    pub what: String,
    /// For `replication`: the node at the other end.
    pub peer: Option<String>,
    /// The state before.
    pub old: String,
    /// The state after.
    pub new: String,
    /// Why, where that is known.
    pub reason: Option<String>,
}

impl std::fmt::Display for StateChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, old, new, .. } = self;
        match &self.peer {
            Some(peer) => write!(f, "{what} with {peer}: {old} -> {new}")?,
            None => write!(f, "{what}: {old} -> {new}")?,
        }
        match &self.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// The daemon itself.
    Daemon,
    /// The cluster: joins, quorum, the plan.
    Cluster,
    /// A node's life.
    Node,
    /// A path.
    Path,
    /// A volume.
    Volume,
    /// A service.
    Service,
    /// A fence device, or the fencing of a node.
    Fence,
}

/// How much an event matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventLevel {
    /// Part of normal work.
    Info,
    /// Redundancy or service is affected.
    Warning,
    /// A person has to do something.
    Alarm,
}
