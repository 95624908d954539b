//! The border of the node manager: what goes in, what comes out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use relevo_membership::Heartbeat;
use relevo_planner::ReplicaView;
use relevo_replication::io::{EngineStatus, VolumeEvent};
use relevo_types::{
    Instance, LeaseGeneration, NodeId, ServiceId, Time, Timing, VolumeId,
    cluster::{ClusterState, Command, Outcome, Part, Rejection, ReplicaSpec, Volume},
};
use serde::{Deserialize, Serialize};

/// What a node manager is told once, when it is made.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This node.
    pub me: NodeId,
    /// Random number of this start.
    pub instance: Instance,
    /// The time-outs.
    pub timing: Timing,
    /// Every generation that [`Effect::PersistCondemned`] ever asked to be written down.
    pub condemned: Vec<(NodeId, LeaseGeneration)>,
    /// The volumes of which a replica exists here. Those that the cluster removed while this
    /// process did not run get [`VolumeOrder::RemoveReplica`].
    pub local_replicas: BTreeSet<VolumeId>,
    /// The newest [`ClusterState::voters_version`] that this node was ever given, durably: before each
    /// [`Input::State`] it is written down.
    pub voters_told: u64,
    /// Memory of this machine in MiB, for services that need much; `None`: unknown.
    pub memory_mib: Option<u64>,
}

/// What happens to a node.
#[derive(Clone, Debug)]
pub enum Input {
    /// The control log was applied up to here. Newest wins (by `revision`).
    State(Arc<ClusterState>),
    /// Who leads the control log, as far as this node knows. The leader plans.
    Leader(Option<NodeId>),
    /// A heartbeat arrived, authenticated.
    Heartbeat {
        /// Name of the path.
        path: String,
        /// The heartbeat.
        heartbeat: Heartbeat,
    },
    /// What [`Effect::PersistCondemned`] asked for is on stable storage.
    CondemnedPersisted {
        /// The node.
        node: NodeId,
        /// Its generation.
        generation: LeaseGeneration,
    },
    /// Another node's report arrived, authenticated.
    Report(Report),
    /// The data path tells of a volume: at each event, and when the status changed in what a
    /// person or the planner would notice (disk state, certain, open, waiting).
    Volume {
        /// The volume.
        volume: VolumeId,
        /// What happened, if something did.
        event: Option<VolumeEvent>,
        /// How the engine is now.
        status: EngineStatus,
    },
    /// Answer to [`VolumeOrder::CreateReplica`].
    ReplicaCreated {
        /// The volume.
        volume: VolumeId,
        /// `Err`: what happened and what to do.
        result: Result<(), String>,
    },
    /// Answer to [`Effect::Part`]: exactly one for each order.
    PartDone {
        /// The order.
        order: OrderId,
        /// `Err`: what happened and what to do.
        result: Result<(), String>,
    },
    /// A part that was started is broken and its agent can't mend it: a process that restarts
    /// don't help, a mount that is lost.
    PartFailed {
        /// The order that started it.
        order: OrderId,
        /// What happened.
        reason: String,
    },
    /// What became of an [`Effect::Propose`].
    ProposalDone {
        /// The proposal.
        id: ProposalId,
        /// How it ended.
        result: ProposalResult,
    },
    /// Nothing happened but the time; due at `Node::deadline`.
    Tick,
    /// Give everything to the others and stop: ends with [`Effect::ShutdownDone`].
    Shutdown,
}

/// What a node wants done, in the order of the list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send a heartbeat, by UDP.
    SendHeartbeat {
        /// To this member.
        to: NodeId,
        /// On this path.
        path: String,
        /// The heartbeat.
        heartbeat: Heartbeat,
    },
    /// A majority has known this change of who votes for long enough: the next one may follow.
    VotersSettled(u64),
    /// Write down durably that this node never grants this generation again; answer at once with
    /// [`Input::CondemnedPersisted`]: a takeover waits for it.
    PersistCondemned {
        /// The node.
        node: NodeId,
        /// Its generation.
        generation: LeaseGeneration,
    },
    /// Send a report to a member, on a reliable connection if there is one; may be lost.
    Report {
        /// To this member.
        to: NodeId,
        /// The report.
        report: Report,
    },
    /// Propose a command to the control log, through its leader. Answered by
    /// [`Input::ProposalDone`]; proposed again by the node while it is needed.
    Propose {
        /// Echoed in the answer.
        id: ProposalId,
        /// The command.
        command: Command,
        /// Why, in a sentence for people.
        reason: String,
    },
    /// Tell the data path to do something with a volume.
    Volume {
        /// The volume.
        volume: VolumeId,
        /// What.
        order: VolumeOrder,
    },
    /// Start or stop a part. Orders of one service are carried out one after the other, in the
    /// order given; those of different services independently. Answered by [`Input::PartDone`].
    Part(PartOrder),
    /// This node's lease holds until then: give it to every engine (reads) and to every address
    /// agent (lifetimes that the kernel holds). An earlier moment than before takes it back.
    LeaseUntil(Time),
    /// The lease ran out or was taken: addresses go at once. They come back by the next
    /// [`Effect::LeaseUntil`] that lies in the future, if their part is still started then.
    LeaseLost,
    /// For `relevo events` and the log.
    Event(NodeEvent),
    /// After [`Input::Shutdown`]: nothing runs here any more (or waiting longer is no use, as its
    /// event says); the process can end.
    ShutdownDone,
}

/// Tells an order to a part from all others of this process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OrderId(pub u64);

/// Tells a proposal from all others of this process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProposalId(pub u64);

/// How a proposal ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProposalResult {
    /// Committed and applied.
    Applied(Outcome),
    /// Committed, and it no longer fitted the state.
    Rejected(Rejection),
    /// Not known to be committed: no leader, no majority, a time-out. It may still come.
    Lost(String),
}

/// What the data path shall do with a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeOrder {
    /// The committed configuration. The first one since the process started, or since the replica
    /// was created, means: open the backing and attach.
    Config(Arc<Volume>),
    /// Prepare a planned step-down and propose `Demote`.
    Demote,
    /// Make this node's replica; answer with [`Input::ReplicaCreated`]. After a restart it may be
    /// asked for again: a backing that carries this volume's metadata already is a success.
    CreateReplica {
        /// What was asked for.
        spec: ReplicaSpec,
        /// The volume it belongs to.
        volume: Arc<Volume>,
    },
    /// The volume was removed from the cluster: detach, and remove this node's replica.
    RemoveReplica,
}

/// An order to an agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartOrder {
    /// Echoed in the answer.
    pub id: OrderId,
    /// The service it belongs to.
    pub service: ServiceId,
    /// Name of the service.
    pub name: String,
    /// Position in the service's list of parts.
    pub index: usize,
    /// The part. For a `Volume` part: start is to export an open volume, stop to end the export.
    pub part: Part,
    /// What to do.
    pub what: PartAction,
}

/// What an agent shall do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PartAction {
    /// Make it active; a success when it is already.
    Start,
    /// Make it inactive; a success when it is already, also when this process never started it.
    Stop {
        /// Without manners: kill, lazy unmount, drop. The volume below may be gone already.
        force: bool,
    },
}

/// What a node tells every other one about itself: at each change, and once a second.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The sender.
    pub from: NodeId,
    /// Its instance.
    pub instance: Instance,
    /// Grows with each report of an instance.
    pub number: u64,
    /// Its replicas.
    pub replicas: BTreeMap<VolumeId, ReplicaView>,
    /// The services that it holds or still stops.
    pub services: BTreeMap<ServiceId, ServiceSummary>,
    /// Its memory in MiB, where it knows it.
    pub memory_mib: Option<u64>,
    /// It is about to stop.
    pub leaving: bool,
}

/// A service on its node, for `status` on any node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceSummary {
    /// Where it is between stopped and running.
    pub phase: Phase,
    /// What it waits for, in a sentence.
    pub waiting: Option<String>,
}

/// Where a service is between stopped and running.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// What an earlier process may have left is being stopped.
    Cleaning,
    /// Its parts are being started.
    Starting,
    /// Every part is active.
    Running,
    /// Its parts are being stopped, in order.
    Stopping,
    /// Its parts are being stopped by force: this node lost it.
    Forced,
    /// Every part is stopped; the release is being committed.
    Releasing,
}

/// Something that happened, with its reason.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeEvent {
    /// How much it matters.
    pub level: Level,
    /// What it is about.
    pub subject: Subject,
    /// What happened, in a sentence.
    pub what: String,
    /// Why.
    pub why: String,
}

/// How much an event matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Part of normal work.
    Info,
    /// Redundancy or service is affected.
    Warning,
    /// A person has to do something.
    Alarm,
}

/// What an event is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// The cluster.
    Cluster,
    /// A node.
    Node(NodeId),
    /// A volume.
    Volume(VolumeId),
    /// A service.
    Service(ServiceId),
}
