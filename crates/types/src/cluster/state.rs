//! The replicated state: nodes, volumes, services, tokens.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{Differs, Fencing, NodePath, Service, StreamPath, VolumeOptions};
use crate::{
    ClusterId, Epoch, LeaseGeneration, LineageId, NodeId, ReplicaSlot, Sensitivity, ServiceId,
    VolumeId,
};

/// Everything that the nodes of a cluster agree on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ClusterState {
    /// Identity drawn by `relevo init`.
    pub id: ClusterId,
    /// Name given by the administrator.
    pub name: String,
    /// How many commands were applied, counting rejected ones.
    pub revision: u64,
    /// The cluster's own clock: seconds for which it had a leader. It does not depend on any machine's idea of
    /// the date, and is read ([`super::Command::Clock`]) only while something waits for time to pass.
    #[serde(default)]
    pub clock_s: u64,
    /// How fast a silent machine is taken for dead.
    pub sensitivity: Sensitivity,
    /// Members, by id.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Volumes, by id.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Services, by id.
    pub services: BTreeMap<ServiceId, Service>,
    /// Join tokens that were not used yet, by the hash of their secret (64 hex digits).
    pub tokens: BTreeMap<String, JoinToken>,
    /// Grows with every change of who votes. A lease is counted among voters by this number, and the next change
    /// waits until a majority has known this one for a while: decision 0010.
    #[serde(default)]
    pub voters_version: u64,
    /// The last id given to a node; ids are never given twice.
    pub last_node: u32,
    /// The last id given to a volume.
    pub last_volume: u32,
    /// The last id given to a service.
    pub last_service: u32,
    /// Fence devices, and what was done with them.
    #[serde(default)]
    pub fencing: Fencing,
}

/// What a machine brings to the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// Holds replicas, runs services and votes.
    Data,
    /// Only votes.
    Witness,
}

/// A member of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// What it told about itself when it joined.
    pub spec: NodeSpec,
    /// Whether it may hold a lease.
    pub lease: LeaseStanding,
    /// Its vote counts. A node that joined becomes a voter once it has the control log; until then it
    /// sends heartbeats and grants leases, but no majority waits for it.
    pub voter: bool,
    /// Set by the administrator: services leave it and don't come back.
    pub standby: bool,
}

/// What a node tells about itself when it joins.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Unique name, by default the host name.
    pub name: String,
    /// Data node or witness.
    pub kind: NodeKind,
    /// Its addresses, one a network; at least one. Paths of two nodes belong together by name.
    pub paths: Vec<NodePath>,
    /// Its byte streams, which carry heartbeats only.
    #[serde(default)]
    pub streams: Vec<StreamPath>,
    /// Where it listens, on each of its addresses.
    pub ports: Ports,
}

/// The ports a node listens on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ports {
    /// TCP: control log, join, forwarded commands; TLS.
    pub control: u16,
    /// UDP: heartbeats.
    pub heartbeat: u16,
    /// TCP: replication; TLS.
    pub data: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            control: 7620,
            heartbeat: 7621,
            data: 7622,
        }
    }
}

impl Ports {
    /// Whether two nodes with the same address would be in each other's way.
    #[must_use]
    pub fn overlap(self, other: Self) -> bool {
        // Those of TCP and those of UDP are apart.
        let tcp = |ports: Self| [ports.control, ports.data];
        self.heartbeat == other.heartbeat || tcp(self).iter().any(|port| tcp(other).contains(port))
    }
}

/// Under which generation a node may hold a lease, and whether it was taken from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseStanding {
    /// The generation that is or was in force.
    pub generation: LeaseGeneration,
    /// What the node held under this generation was taken from it, with a proof. It gets no lease
    /// until it is readmitted under the next generation.
    pub evicted: bool,
}

/// When a replica's acknowledgement is due. The order is from the weakest to the strongest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub enum Protocol {
    /// Written here and handed to the network. Such a replica is outside the in-sync set.
    A,
    /// Received by the peer.
    B,
    /// Written by the peer.
    #[default]
    C,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
            Self::C => "C",
        })
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "A" | "a" => Ok(Self::A),
            "B" | "b" => Ok(Self::B),
            "C" | "c" => Ok(Self::C),
            _ => Err(format!("a protocol is A, B or C, not `{text}`")),
        }
    }
}

/// A replicated block device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Unique name.
    pub name: String,
    /// Size in bytes: a multiple of [`crate::BLOCK_SIZE`], more than 0.
    pub size: u64,
    /// Its history in force.
    pub lineage: LineageId,
    /// All its histories, the first one first, at most [`LINEAGES_MAX`] of the newest: which of two
    /// forked from which.
    #[serde(default)]
    pub lineages: Vec<LineageId>,
    /// Number of the configuration below; 0 until every replica was created.
    pub epoch: Epoch,
    /// The one node whose applications may use the volume, unless it only tends it.
    pub primary: Option<NodeId>,
    /// The primary brings the other replicas up to date and takes no request. Whoever is promoted displaces
    /// it: it acknowledged nothing and answered no read.
    #[serde(default)]
    pub tends: bool,
    /// The replicas that must have a write before it is acknowledged. Empty until every replica
    /// was created, never empty after.
    pub in_sync: BTreeSet<NodeId>,
    /// All replicas, by node.
    pub replicas: BTreeMap<NodeId, Replica>,
    /// What the administrator chose.
    pub options: VolumeOptions,
    /// Grows with every change of anything above, also where the epoch stays.
    pub version: u64,
}

/// What the administrator asks of a replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaSpec {
    /// The node that holds it.
    pub node: NodeId,
    /// When its acknowledgement is due.
    pub protocol: Protocol,
    /// Backing file or device on that node; `None`: a sparse file in the node's pool directory.
    pub backing: Option<PathBuf>,
    /// Take the backing even if it holds foreign data.
    pub force: bool,
}

/// A volume's copy on one node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Replica {
    /// What was asked for.
    pub spec: ReplicaSpec,
    /// Which bitmap in everyone's metadata is about this replica.
    pub slot: ReplicaSlot,
    /// Whether its backing exists.
    pub standing: ReplicaStanding,
    /// The epoch at which it last joined the in-sync set.
    pub joined: Epoch,
    /// It takes the place of the replica on that node, which starts leaving when this one is in sync.
    pub replaces: Option<NodeId>,
    /// It shall go. The primary first lets it leave the in-sync set; outside of it, it is removed.
    pub leaving: bool,
    /// A person, or the policy, decided that what only this replica has gives way to the history in force.
    /// Its node saves it before it is overwritten. Over when it joins.
    #[serde(default)]
    pub gives_way: bool,
    /// A verification found it to differ, and it was not repaired since.
    #[serde(default)]
    pub differs: Option<Differs>,
}

/// How many histories of a volume are remembered.
pub const LINEAGES_MAX: usize = 64;

/// Whether a replica's backing exists.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ReplicaStanding {
    /// The node was told to create it and has not answered.
    Creating,
    /// The backing exists and carries our metadata.
    Ready,
    /// The node could not create it; the text says why and what to do.
    Failed(String),
}

/// A one-time right to join.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinToken {
    /// What the joiner may become; `None`: either kind.
    pub kind: Option<NodeKind>,
    /// When it ends, in seconds since 1970 by the clock of the node that made it.
    pub expires_unix_s: u64,
}

impl ClusterState {
    /// The members whose votes count, data nodes and witnesses.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes
            .values()
            .filter(|node| node.voter)
            .map(|node| node.id)
    }

    /// How many voters are a majority. 1 for an empty cluster.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.voters().count() / 2 + 1
    }

    /// The node of that name.
    #[must_use]
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.spec.name == name)
    }

    /// The volume of that name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&Volume> {
        self.volumes.values().find(|volume| volume.name == name)
    }

    /// The service of that name.
    #[must_use]
    pub fn service_named(&self, name: &str) -> Option<&Service> {
        self.services
            .values()
            .find(|service| service.spec.name == name)
    }

    /// A node's name for messages; its id when it left.
    #[must_use]
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes
            .get(&id)
            .map_or_else(|| id.to_string(), |node| node.spec.name.clone())
    }

    /// Whether the node is primary of a volume or holds a service: then its death needs a
    /// takeover.
    #[must_use]
    pub fn holds_something(&self, id: NodeId) -> bool {
        self.volumes
            .values()
            .any(|volume| volume.primary == Some(id))
            || self
                .services
                .values()
                .any(|service| service.holder == Some(id))
    }
}

impl Volume {
    /// Whether every replica was created, so that the volume can be used.
    #[must_use]
    pub fn is_created(&self) -> bool {
        self.epoch > Epoch(0)
    }

    /// The node whose applications use the volume: the primary, unless it only tends it.
    #[must_use]
    pub fn serving(&self) -> Option<NodeId> {
        self.primary.filter(|_| !self.tends)
    }

    /// When an acknowledgement is due between the replicas of two nodes: what the administrator chose
    /// for the pair, else the weaker one of what was chosen for each. C for a node without a replica.
    #[must_use]
    pub fn protocol(&self, one: NodeId, other: NodeId) -> Protocol {
        let own = |node| {
            self.replicas
                .get(&node)
                .map(|replica| replica.spec.protocol)
        };
        let weaker = own(one).into_iter().chain(own(other)).min();
        self.options
            .protocol_of_pair(one, other)
            .or(weaker)
            .unwrap_or_default()
    }

    /// The bitmap slot of a node's replica.
    #[must_use]
    pub fn slot(&self, node: NodeId) -> Option<ReplicaSlot> {
        self.replicas.get(&node).map(|replica| replica.slot)
    }
}
