//! Services: ordered lists of parts that run on one node.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use super::ClusterState;
use super::Placement;
use crate::{NodeId, ServiceId, VolumeId};

/// What an administrator runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Its id.
    pub id: ServiceId,
    /// What was asked for.
    pub spec: ServiceSpec,
    /// Whether it shall run.
    pub enabled: bool,
    /// Where it may and shall run.
    #[serde(default)]
    pub placement: Placement,
    /// It is left where it is, also stopped where nobody holds it: why. Set and cleared by the administrator.
    #[serde(default)]
    pub hold: Option<String>,
    /// A node gave it up, and no other one has it yet.
    #[serde(default)]
    pub displaced: bool,
    /// When it went to another node because one had given it up, by the cluster's own clock: the newest last.
    #[serde(default)]
    pub moves_s: Vec<u64>,
    /// Where the administrator last asked it to be (`service move`). The planner prefers it.
    pub target: Option<NodeId>,
    /// The one node that may have parts of it active. Set only when nobody holds it; cleared by
    /// the holder after it stopped every part, or by the holder's eviction with a proof.
    pub holder: Option<NodeId>,
    /// Nodes that gave it up because a part failed there, and why. Cleared by
    /// `service start`, and for a node that is in sync again on a volume of the service, or whose disk
    /// was what failed and is in use again.
    pub failures: BTreeMap<NodeId, FailureRecord>,
}

/// Why a node gave a service up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FailureRecord {
    /// How often.
    pub count: u32,
    /// The last reason.
    pub reason: String,
    /// When it was told by the cluster's own clock, [`ClusterState::clock_s`]; `None` until that was read.
    #[serde(default)]
    pub at_s: Option<u64>,
    /// It was the node's disk of this volume, and nothing else before: once that disk is in use again the
    /// failure is over.
    #[serde(default)]
    pub disk: Option<VolumeId>,
}

/// What the administrator asks for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Unique name.
    pub name: String,
    /// Started first to last, stopped last to first.
    pub parts: Vec<Part>,
}

/// One thing that a service needs active on its node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The node is primary of a volume and exports it.
    Volume(VolumePart),
    /// A file system of a volume is mounted.
    Mount(MountPart),
    /// A virtual address is on an interface and announced.
    Address(AddressPart),
    /// A process runs, restarted when it ends.
    Process(ProcessPart),
}

/// Primary of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumePart {
    /// The volume.
    pub volume: VolumeId,
    /// Make it a block device of the kernel; otherwise it is reached by NBD on a Unix socket.
    pub device: bool,
}

/// A mounted file system.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountPart {
    /// The volume, whose `Volume` part stands earlier in the list.
    pub volume: VolumeId,
    /// Where; made when missing.
    pub mount_point: PathBuf,
    /// Type of the file system, `ext4` say.
    pub filesystem: String,
    /// Make the file system when the volume is blank: its first MiB reads as zeroes.
    pub make: bool,
    /// Mount options, comma separated.
    pub options: String,
}

/// A virtual address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressPart {
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix.
    pub prefix: u8,
    /// The interface; `None`: the one that has another address of this network.
    pub interface: Option<String>,
}

/// A supervised process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessPart {
    /// Program and arguments; the program by absolute path. At least one word.
    pub command: Vec<String>,
    /// Additional environment.
    pub environment: BTreeMap<String, String>,
    /// Where it runs; `None`: `/`.
    pub directory: Option<PathBuf>,
    /// It is ready when this TCP address of the node accepts; `None`: when it started.
    pub ready: Option<std::net::SocketAddr>,
}

impl Part {
    /// The part's kind and what it is about, for messages: `mount /srv/mail`.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Volume(part) => format!("volume {}", part.volume),
            Self::Mount(part) => format!("mount {}", part.mount_point.display()),
            Self::Address(part) => format!("address {}/{}", part.address, part.prefix),
            Self::Process(part) => {
                format!(
                    "process {}",
                    part.command.first().map_or("", String::as_str)
                )
            }
        }
    }
}

impl ServiceSpec {
    /// The volumes that the service uses.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.parts.iter().filter_map(|part| match part {
            Part::Volume(part) => Some(part.volume),
            Part::Mount(_) | Part::Address(_) | Part::Process(_) => None,
        })
    }

    /// Whether the service uses a volume.
    #[must_use]
    pub fn uses(&self, volume: VolumeId) -> bool {
        self.volumes().any(|used| used == volume)
    }
}
