//! What is asked of the daemon.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use relevo_types::{
    Sensitivity,
    cluster::{NodeKind, NodeSpec, PathAddress, Ports, Protocol},
};
use serde::{Deserialize, Serialize};

/// What a machine tells about itself, for `init` and `join`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRequest {
    /// Unique name; `None`: the host name.
    pub name: Option<String>,
    /// Its paths; without a network among them: also one named `lan` with the address of the default route's
    /// interface.
    pub paths: Vec<PathRequest>,
    /// Its ports.
    pub ports: Ports,
}

/// A path of a node; also `POST /v1/nodes/{name}/paths`, answered when the node uses it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathRequest {
    /// Name of the path, the same on every node that is on it.
    pub name: String,
    /// This node's address there: `10.0.0.1`, `fd00::1`, `serial:/dev/ttyS0:115200`, `unix:/run/line.sock`.
    pub address: PathAddress,
    /// Replication prefers this path. Not for a stream, which carries heartbeats only.
    #[serde(default)]
    pub replication: bool,
}

/// `POST /v1/init`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitRequest {
    /// Name of the cluster.
    pub cluster: String,
    /// How fast a silent machine is taken for dead.
    pub sensitivity: Sensitivity,
    /// This machine.
    pub node: NodeRequest,
}

/// Answer to [`InitRequest`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InitAnswer {
    /// Identity of the cluster.
    pub cluster_id: String,
    /// Name of the cluster.
    pub cluster: String,
    /// Name of this node.
    pub node: String,
    /// A first join token.
    pub token: TokenAnswer,
}

/// `POST /v1/join`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The token as `relevo token` printed it.
    pub token: String,
    /// Data node or witness.
    pub kind: NodeKind,
    /// This machine.
    pub node: NodeRequest,
}

/// Answer to [`JoinRequest`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// Identity of the cluster.
    pub cluster_id: String,
    /// Name of the cluster.
    pub cluster: String,
    /// Name of this node.
    pub node: String,
    /// Every member, this node included.
    pub members: Vec<String>,
}

/// `POST /v1/tokens`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// What the joiner may become; `None`: either kind.
    pub kind: Option<NodeKind>,
    /// How long it is good, in seconds.
    pub valid_s: u64,
}

/// Answer to [`TokenRequest`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenAnswer {
    /// The token; it can be used once.
    pub token: String,
    /// When it ends, in seconds since 1970.
    pub expires_unix_s: u64,
}

/// `POST /v1/volumes`. Answered when every replica exists.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolumeRequest {
    /// Unique name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Its replicas; empty: one on every data node, in the node's pool directory.
    #[serde(default)]
    pub replicas: Vec<ReplicaRequest>,
    /// Take backings that hold foreign data.
    #[serde(default)]
    pub force: bool,
}

/// A replica that is asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaRequest {
    /// Name of the node.
    pub node: String,
    /// Backing file or device there; `None`: a file in the node's pool directory.
    #[serde(default)]
    pub backing: Option<PathBuf>,
    /// Its protocol; the weaker one of two replicas' counts between them. C if not given.
    #[serde(default)]
    pub protocol: Protocol,
}

/// `POST /v1/volumes/{name}/replicas`. Answered when the replica exists; it is filled after that.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddReplicaRequest {
    /// The replica.
    pub replica: ReplicaRequest,
    /// Node of the replica that it takes the place of; that one is removed when this one is in sync.
    #[serde(default)]
    pub replaces: Option<String>,
    /// Take a backing that holds foreign data.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/volumes/{name}/options`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetOptionsRequest {
    /// Options with their new values; the others stay.
    pub options: Vec<(String, String)>,
}

/// `POST /v1/volumes/{name}/wait-sync`: answered when every replica is in sync, or follows if it is of
/// protocol A; fails with what is missing when the time is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitSyncRequest {
    /// How long to wait, in seconds; more than [`Self::MOST_S`] counts as that.
    pub timeout_s: u64,
}

impl WaitSyncRequest {
    /// The longest wait of one call, in seconds: whoever wants to wait longer asks again.
    pub const MOST_S: u64 = 60;
}

/// `POST /v1/volumes/{name}/order`: an order to the replica on the node that is asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case", deny_unknown_fields)]
pub enum OrderRequest {
    /// Let requests wait.
    SuspendIo,
    /// Let them go on.
    ResumeIo,
    /// Copy everything anew from the primary.
    Invalidate,
    /// Don't be promoted, although in sync when the link to the primary was lost.
    Outdate,
    /// Open the replica: after `detach`, or when its disk was repaired.
    Attach,
    /// Close the replica; its disk is free.
    Detach,
    /// Have no link to a peer.
    Disconnect {
        /// Name of the peer; `None`: all.
        #[serde(default)]
        node: Option<String>,
    },
    /// Let the resync to and from a peer stand still.
    PauseSync {
        /// Name of the peer; `None`: all.
        #[serde(default)]
        node: Option<String>,
    },
    /// Let it go on.
    ResumeSync {
        /// Name of the peer; `None`: all.
        #[serde(default)]
        node: Option<String>,
    },
    /// Compare the other replicas with this one.
    Verify {
        /// Name of the peer; `None`: all that are in sync.
        #[serde(default)]
        node: Option<String>,
        /// Copy what differs from here.
        #[serde(default)]
        repair: bool,
    },
    /// End it.
    StopVerify {
        /// Name of the peer; `None`: all.
        #[serde(default)]
        node: Option<String>,
    },
    /// Have one again.
    Connect {
        /// Name of the peer; `None`: all.
        #[serde(default)]
        node: Option<String>,
    },
}

/// `POST /v1/services`, and the content of a service file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateServiceRequest {
    /// Unique name.
    pub name: String,
    /// Node where it shall run first.
    #[serde(default)]
    pub on: Option<String>,
    /// Where it may and shall run.
    #[serde(default)]
    pub placement: PlacementRequest,
    /// Its parts, started first to last, stopped last to first.
    pub parts: Vec<PartRequest>,
}

/// `POST /v1/services/{name}/place`: where a service may and shall run. A rule that is not given stays as it
/// is; an empty list takes it back.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlacementRequest {
    /// Nodes that are preferred, the first one first.
    pub prefer: Option<Vec<String>>,
    /// The only nodes that may have it.
    pub only: Option<Vec<String>>,
    /// Nodes that may not have it.
    pub never: Option<Vec<String>>,
    /// Services on whose node it runs.
    pub with: Option<Vec<String>>,
    /// Services on whose node it does not run.
    pub apart: Option<Vec<String>>,
    /// Services that have to run before it starts.
    pub after: Option<Vec<String>>,
    /// Memory that it needs: `4GiB`. `0`: not worth counting.
    pub memory: Option<String>,
    /// It returns to a node that it prefers once that could have had it for so long: `30s`, `5min`, `1h`. `never`:
    /// it stays where it is.
    pub failback: Option<String>,
}

/// `POST /v1/what-if`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum WhatIfRequest {
    /// This node loses its power.
    Dies(String),
    /// This node is put on standby.
    Standby(String),
}

/// `POST /v1/services/{name}/hold`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldRequest {
    /// Why it is held; `None`: it is held no more.
    pub reason: Option<String>,
}

/// A part of a service that is asked for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartRequest {
    /// Primary of a volume.
    Volume(VolumePartRequest),
    /// A mounted file system.
    Mount(MountRequest),
    /// A virtual address.
    Address(AddressRequest),
    /// A supervised process.
    Process(ProcessRequest),
}

/// Primary of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumePartRequest {
    /// Name of the volume.
    pub name: String,
    /// Make it a block device of the kernel.
    #[serde(default = "yes")]
    pub device: bool,
}

/// A mounted file system.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// Name of the volume, whose part stands earlier in the list.
    pub volume: String,
    /// Where; made when missing.
    pub at: PathBuf,
    /// Type of the file system.
    #[serde(default = "ext4")]
    pub filesystem: String,
    /// Make the file system when the volume is blank.
    #[serde(default = "yes")]
    pub make: bool,
    /// Mount options, comma separated.
    #[serde(default)]
    pub options: String,
}

/// A virtual address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressRequest {
    /// The address and the length of its prefix: `192.168.1.1/24`.
    pub address: String,
    /// The interface; `None`: the one that has another address of this network.
    #[serde(default)]
    pub interface: Option<String>,
}

/// A supervised process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessRequest {
    /// Program (absolute path) and arguments.
    pub command: Vec<String>,
    /// Additional environment.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Where it runs.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// It is ready when this TCP address accepts.
    #[serde(default)]
    pub ready: Option<SocketAddr>,
}

/// `POST /v1/services/{name}/move`. Answered when the service runs there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveServiceRequest {
    /// Where to; `None`: take the wish back, the planner chooses.
    pub to: Option<String>,
}

/// `POST /v1/volumes/{name}/force`: this node's replica, outside the in-sync set, is the volume from now on.
/// `POST /v1/volumes/{name}/resolve/{node}`: that node's replica is kept, the others give way. `GET` tells
/// what may be lost by it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfirmRequest {
    /// The name of the volume, as a person typed it.
    pub confirm: String,
}

/// `POST /v1/nodes/{name}/standby`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StandbyRequest {
    /// Whether services shall leave the node.
    pub standby: bool,
}

/// Answer to a call that changed something and has nothing else to tell.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Done {
    /// What was done, in a sentence.
    pub done: String,
}

impl NodeRequest {
    /// The request as the control log wants it, with what was left out filled in.
    #[must_use]
    pub fn into_spec(self, kind: NodeKind, host_name: &str, address: IpAddr) -> NodeSpec {
        let mut spec = NodeSpec {
            name: self.name.unwrap_or_else(|| host_name.to_owned()),
            kind,
            paths: Vec::new(),
            streams: Vec::new(),
            ports: self.ports,
        };
        for path in &self.paths {
            spec.push_path(&path.name, &path.address, path.replication);
        }
        if spec.paths.is_empty() {
            spec.push_path(DEFAULT_PATH, &PathAddress::Ip(address), false);
        }
        spec
    }
}

/// Name of the path of a node that names none.
pub const DEFAULT_PATH: &str = "lan";

const fn yes() -> bool {
    true
}

fn ext4() -> String {
    "ext4".to_owned()
}
