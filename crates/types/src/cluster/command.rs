//! The commands of the control log, what they answer and why they are rejected.

use serde::{Deserialize, Serialize};

use super::{
    Differs, FenceCommand, JoinToken, NodeKind, NodeSpec, PathAddress, Placement, ReplicaSpec,
    ServiceSpec, VolumeOptions,
};
use crate::{
    ClusterId, Epoch, LeaseGeneration, LineageId, NodeId, Sensitivity, ServiceId, VolumeId,
};

/// A change of the replicated state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Command {
    /// First command of a cluster, by `relevo init`: names it and adds the first node.
    Init {
        /// Identity of the cluster.
        cluster: ClusterId,
        /// Name of the cluster.
        name: String,
        /// How fast a silent machine is taken for dead.
        sensitivity: Sensitivity,
        /// The first node.
        node: NodeSpec,
    },
    /// A new join token.
    CreateToken {
        /// Hash of the secret, 64 hex digits. The secret itself is never stored.
        hash: String,
        /// What it allows.
        token: JoinToken,
    },
    /// Uses a token up and adds the node that showed it.
    Join {
        /// Hash of the secret that was shown.
        hash: String,
        /// The clock of the node that handles the join, in seconds since 1970.
        now_unix_s: u64,
        /// The node to add.
        node: NodeSpec,
    },
    /// A node that joined has the control log: its vote counts from now on.
    AdmitVoter {
        /// The node.
        node: NodeId,
        /// [`super::ClusterState::voters_version`] that the proposer knows.
        expect: u64,
    },
    /// A node leaves for good. Rejected while it holds a service, a primary role or a replica.
    RemoveNode {
        /// The node.
        node: NodeId,
        /// [`super::ClusterState::voters_version`] that the proposer knows.
        expect: u64,
    },
    /// Sets or clears standby.
    SetStandby {
        /// The node.
        node: NodeId,
        /// Whether services shall leave it.
        standby: bool,
    },
    /// Takes from a node all it holds.
    Evict {
        /// The node.
        node: NodeId,
        /// The generation that the proof is about.
        generation: LeaseGeneration,
        /// Why it can't do anything any more.
        proof: Proof,
    },
    /// Lets a node hold leases again, under the next generation.
    Readmit {
        /// The node.
        node: NodeId,
        /// The generation it had.
        generation: LeaseGeneration,
    },
    /// A new volume. Its nodes then create their replicas.
    CreateVolume {
        /// Unique name.
        name: String,
        /// Size in bytes.
        size: u64,
        /// Its history.
        lineage: LineageId,
        /// Its replicas, at least one, each on another data node.
        replicas: Vec<ReplicaSpec>,
    },
    /// A node created its replica. The last one opens the volume at epoch 1, all in sync: a new
    /// volume is zero everywhere.
    ReplicaCreated {
        /// The volume.
        volume: VolumeId,
        /// The node.
        node: NodeId,
    },
    /// A node could not create its replica.
    ReplicaNotCreated {
        /// The volume.
        volume: VolumeId,
        /// The node.
        node: NodeId,
        /// What happened and what to do.
        reason: String,
    },
    /// One more replica of a volume that is in use. Its node creates it; it gets everything by resync.
    AddReplica {
        /// The volume.
        volume: VolumeId,
        /// What is asked for.
        replica: ReplicaSpec,
        /// The replica that it takes the place of.
        replaces: Option<NodeId>,
    },
    /// A replica goes for good, with its data. Rejected for the primary's and for the last one in
    /// sync. Another one in sync stays until the primary let it leave the in-sync set: only an open
    /// primary knows that nothing is on that replica alone.
    RemoveReplica {
        /// The volume.
        volume: VolumeId,
        /// Its node.
        node: NodeId,
    },
    /// Removes a volume. Rejected while a service uses it or it has a primary.
    RemoveVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// Changes what the administrator chose for a volume.
    SetVolumeOptions {
        /// The volume.
        volume: VolumeId,
        /// The version that the proposer knows.
        expect: u64,
        /// All options.
        options: VolumeOptions,
    },
    /// Changes a volume's configuration by compare-and-swap on its epoch.
    Volume {
        /// The volume.
        volume: VolumeId,
        /// The epoch that the proposer knows.
        expect: Epoch,
        /// What to change. If it is applied the epoch grows by one.
        change: VolumeChange,
    },
    /// A new service, enabled.
    CreateService {
        /// What to run.
        spec: ServiceSpec,
        /// Where it may and shall run.
        placement: Placement,
        /// Where it shall run first, if that matters.
        target: Option<NodeId>,
    },
    /// Changes where a service may and shall run.
    SetPlacement {
        /// The service.
        service: ServiceId,
        /// All rules.
        placement: Placement,
    },
    /// Leaves a service where it is from now on, or ends that.
    Hold {
        /// The service.
        service: ServiceId,
        /// Why; `None`: ends it.
        reason: Option<String>,
    },
    /// Removes a service. Rejected while it is held.
    RemoveService {
        /// The service.
        service: ServiceId,
    },
    /// Starts or stops a service. Starting clears its failures.
    EnableService {
        /// The service.
        service: ServiceId,
        /// Whether it shall run.
        enabled: bool,
    },
    /// Asks for a service to be on a node; `None` takes the wish back.
    SetTarget {
        /// The service.
        service: ServiceId,
        /// Where.
        target: Option<NodeId>,
    },
    /// The leader read the cluster's clock. Never goes back.
    Clock {
        /// See [`super::ClusterState::clock_s`].
        at_s: u64,
    },
    /// That a node gave a service up is long ago: it may try again.
    ForgetFailure {
        /// The service.
        service: ServiceId,
        /// The node.
        node: NodeId,
        /// How often it had; nothing is forgotten if it did so again meanwhile.
        count: u32,
    },
    /// Gives a service that nobody holds to a node.
    Acquire {
        /// The service.
        service: ServiceId,
        /// The node.
        node: NodeId,
    },
    /// The holder stopped every part and gives the service back.
    Release {
        /// The service.
        service: ServiceId,
        /// The holder.
        node: NodeId,
        /// Set when it gives up because a part failed.
        failure: Option<String>,
        /// What failed is the node's disk of this volume.
        #[serde(default)]
        disk: Option<VolumeId>,
    },
    /// The disk that made a node give a service up is in use again, with all data.
    DiskRepaired {
        /// The service.
        service: ServiceId,
        /// The node.
        node: NodeId,
    },
    /// A node gets one more path.
    AddPath {
        /// The node.
        node: NodeId,
        /// Name of the path: those of two nodes belong together by it.
        name: String,
        /// Where it is on the node.
        address: PathAddress,
        /// Replication prefers it; only for a network.
        replication: bool,
    },
    /// A path of a node goes. Rejected for the last network that it shares with another node.
    RemovePath {
        /// The node.
        node: NodeId,
        /// Name of the path.
        name: String,
    },
    /// Fence devices, and what was done with them.
    Fence(Box<FenceCommand>),
}

/// A change of a volume's configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum VolumeChange {
    /// An in-sync replica of a volume without a primary becomes primary. Evicted members leave
    /// the in-sync set in the same step.
    Promote {
        /// The node.
        node: NodeId,
    },
    /// The same, by a replica that restarted uncleanly and may lack what it acknowledged. Evicted members
    /// stay: one of them may have it, and is asked if it comes back in time; the new primary lets it leave
    /// if it does not.
    PromoteUncertain {
        /// The node.
        node: NodeId,
    },
    /// An in-sync replica of a volume without a primary brings the others up to date, as a primary that takes
    /// no request: until it is promoted itself, or another one is, or it steps down.
    Tend {
        /// The node.
        node: NodeId,
    },
    /// The primary steps down, with everything it acknowledged on every in-sync replica.
    Demote {
        /// The primary.
        node: NodeId,
    },
    /// Replicas leave the in-sync set. The set must not become empty. A node that is not in it is
    /// passed over; the epoch grows all the same, which ends any join still under way.
    Leave {
        /// The nodes.
        nodes: Vec<NodeId>,
    },
    /// A replica whose resync ended with a barrier joins the in-sync set.
    Join {
        /// The node.
        node: NodeId,
    },
    /// A verification of a replica ended, or what to do about what it found was decided.
    Differs {
        /// The node of the replica.
        node: NodeId,
        /// The primary, which compared it with its own.
        from: NodeId,
        /// What differs; `None`: nothing.
        differs: Option<Differs>,
    },
    /// A person takes a replica outside the in-sync set for the volume: it becomes the set, and a new
    /// history begins. What only others have is missing from now on. Rejected while the volume has a
    /// primary, and for a member, which can be promoted without loss.
    Force {
        /// The node of the replica.
        node: NodeId,
        /// The new history; one that the volume never had.
        lineage: LineageId,
        /// The other replicas give way whatever they have. Else they stand alone if they have
        /// something of their own, until a person or the policy decides.
        others_give_way: bool,
    },
    /// A person, or the policy, keeps the history in force: replicas outside the in-sync set give way
    /// whatever they have.
    KeepInForce,
    /// The primary's history gives way to what a replica outside the set has, where a new history
    /// begins: others may be of the same one as that replica and have something else. The node of the
    /// primary steps down; all but that replica give way.
    GiveWay {
        /// The primary.
        node: NodeId,
        /// The node of the replica that is kept.
        to: NodeId,
    },
}

/// Why a node can't do anything any more (DESIGN, rule 8).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Proof {
    /// A majority of the voters heard nothing from it for the dead time, and each promised
    /// durably to grant it nothing more under this generation.
    Condemned {
        /// The voters that promised.
        by: Vec<NodeId>,
    },
    /// It said so itself after it stopped everything.
    Goodbye,
}

/// What an applied command answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// Done.
    Done,
    /// The node that was added.
    Node(NodeId),
    /// The volume that was created.
    Volume(VolumeId),
    /// The volume's new epoch.
    Epoch(Epoch),
    /// The service that was created.
    Service(ServiceId),
}

/// Why a command was not applied. Each text says what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "the message of each variant documents it and its fields"
)]
pub enum Rejection {
    #[error(
        "this machine already belongs to the cluster `{name}`; to start anew, stop the daemon and give it an empty state directory"
    )]
    AlreadyInitialised { name: String },
    #[error("a {kind} named `{name}` exists already; choose another name")]
    NameTaken { kind: String, name: String },
    #[error(
        "`{name}` is no name: use 1 to 63 of a-z, A-Z, 0-9, `-`, `_` and `.`, beginning with a letter or digit"
    )]
    BadName { name: String },
    #[error(
        "the join token is unknown to this cluster: it was used already, or it was made by another cluster; make a new one with `relevo token`"
    )]
    TokenUnknown,
    #[error("the join token expired {ago_s} s ago; make a new one with `relevo token`")]
    TokenExpired { ago_s: u64 },
    #[error(
        "the join token is for a {allowed}, not for a {asked}; make one for it with `relevo token`"
    )]
    TokenKind { allowed: String, asked: String },
    #[error("the cluster has {count} voters, the most there can be; remove a node first")]
    TooManyNodes { count: usize },
    #[error("there is no node {node}; `relevo status` lists the nodes")]
    NoNode { node: NodeId },
    #[error("there is no volume {volume}; `relevo volume list` lists them")]
    NoVolume { volume: VolumeId },
    #[error("there is no service {service}; `relevo service list` lists them")]
    NoService { service: ServiceId },
    #[error("node {node} is a witness and holds no data; choose data nodes")]
    NotADataNode { node: NodeId },
    #[error("node {node} still {what}; {remedy}")]
    NodeInUse {
        node: NodeId,
        what: String,
        remedy: String,
    },
    #[error("generation {given} of node {node} is not the one in force, {actual}")]
    StaleGeneration {
        node: NodeId,
        given: LeaseGeneration,
        actual: LeaseGeneration,
    },
    #[error("who votes was changed meanwhile; ask again")]
    StaleVoters,
    #[error("node {node} was evicted already")]
    AlreadyEvicted { node: NodeId },
    #[error("node {node} is evicted and can't take anything until it is readmitted")]
    Evicted { node: NodeId },
    #[error("{votes} votes are no proof that node {node} is down: {majority} are needed")]
    NoProof {
        node: NodeId,
        votes: usize,
        majority: usize,
    },
    #[error("a size of {size} bytes can't be: it must be a multiple of 4096 and more than 0")]
    BadSize { size: u64 },
    #[error("{why}")]
    BadReplicas { why: String },
    #[error("the volume is at epoch {actual}, not {expected}: someone else changed it first")]
    StaleEpoch { expected: Epoch, actual: Epoch },
    #[error("the volume is at version {actual}, not {expected}: someone else changed it first")]
    StaleVersion { expected: u64, actual: u64 },
    #[error("the volume is not created yet; `relevo volume list` shows which replica is missing")]
    NotCreated,
    #[error(
        "node {node} has no in-sync replica of the volume, so making it primary would lose writes; wait for its resync"
    )]
    NotInSync { node: NodeId },
    #[error("node {primary} is primary of the volume; only one can be")]
    HasPrimary { primary: NodeId },
    #[error("node {node} is not primary of the volume")]
    NotPrimary { node: NodeId },
    #[error("the in-sync set would be empty")]
    LastInSync,
    #[error(
        "node {node} has an in-sync replica: `relevo primary` makes it primary without any loss, nothing needs to be forced"
    )]
    AlreadyInSync { node: NodeId },
    #[error("the replica on node {node} was not created: there is nothing on it")]
    ReplicaNotReady { node: NodeId },
    #[error("the volume had history {lineage} before: a new one must be new")]
    OldLineage { lineage: LineageId },
    #[error("node {node} has no replica of the volume")]
    NoReplica { node: NodeId },
    #[error(
        "node {node} is primary of the volume; move the service or run `relevo secondary` there first"
    )]
    ReplicaOfPrimary { node: NodeId },
    #[error(
        "the replica on node {node} is the only one that has all data; wait until another is in sync, or remove the volume"
    )]
    OnlyGoodReplica { node: NodeId },
    #[error("volume `{volume}` is used by service `{service}`; remove the service first")]
    VolumeInUse { volume: String, service: String },
    #[error("{why}")]
    BadService { why: String },
    #[error("node {node} may not have the service by its placement{}", apart.as_ref().map_or_else(String::new, |name| format!(": it runs `{name}`, from which it is kept apart")))]
    PlacedElsewhere { node: NodeId, apart: Option<String> },
    #[error("{why}; change `placement`")]
    BadPlacement { why: String },
    #[error(
        "service `{needs}` names it in its placement (`with` or `after`); change that first with `relevo service place`"
    )]
    ServiceNeeded { needs: String },
    #[error("the service is held by node {holder}; stop it first")]
    ServiceHeld { holder: NodeId },
    #[error("node {node} does not hold the service")]
    NotHolder { node: NodeId },
    #[error("the service is not enabled; `relevo service start` enables it")]
    ServiceDisabled,
    #[error(
        "volumes would wait for each other: this one after {names}; clear `resync-after` of one of them first (`none`)"
    )]
    ResyncCircle { names: String },
    #[error("{why}")]
    BadPath { why: String },
    #[error("{why}")]
    BadFencing { why: String },
}

impl NodeKind {
    /// The kind in words, for messages.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Data => "data node",
            Self::Witness => "witness",
        }
    }
}
