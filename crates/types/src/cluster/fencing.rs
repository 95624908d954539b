//! Fencing: the devices that can switch a node off, and the record of what was done with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::Command;
use crate::{LeaseGeneration, NodeId};

/// The most devices of a cluster: each of seven nodes with two power supplies, its BMC and a person, and room.
pub const FENCE_DEVICES_MAX: usize = 64;

/// How many attempts are remembered, the newest.
pub const FENCE_HISTORY_MAX: usize = 50;

/// The highest level: more ways to switch off one machine are a mistake.
pub const FENCE_LEVEL_MAX: u8 = 9;

/// Devices, and what was done with them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Fencing {
    /// Devices, by name.
    pub devices: BTreeMap<String, FenceDevice>,
    /// Attempts that ended or reached their proof, the oldest first, at most [`FENCE_HISTORY_MAX`].
    pub history: Vec<FenceRecord>,
}

/// Something that can switch nodes off.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceDevice {
    /// Unique name.
    pub name: String,
    /// What it is.
    pub kind: FenceKind,
    /// What it is told besides the node and the action: address, user ...
    pub parameters: BTreeMap<String, FenceValue>,
    /// The nodes that it can switch off; at least one.
    pub targets: BTreeMap<NodeId, FenceTarget>,
    /// The nodes that may use it; `None`: every data node. Nobody fences itself.
    pub from: Option<BTreeSet<NodeId>>,
    /// How long one action may take, in seconds.
    pub action_limit_s: u32,
    /// How long after `off` the power may still be on, in seconds.
    pub verify_limit_s: u32,
    /// How often it is checked, in seconds.
    pub check_every_s: u32,
    /// An `off` that ended well counts as proof without anybody asking for the state of the power. For
    /// devices that can't be asked; the administrator's word that their exit code is right.
    pub trust_exit_code: bool,
}

/// What a device is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FenceKind {
    /// A fence agent of the distribution, by its name: `fence_ipmilan`.
    Agent(String),
    /// A program (absolute path) and its arguments, in which `{node}`, `{plug}` and `{action}` are replaced.
    Command(Vec<String>),
    /// A person, who looks and says that the node is off (meatware).
    Person,
}

/// A parameter's value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceValue {
    /// Shown to everybody.
    Plain(String),
    /// Never shown.
    Secret(String),
    /// The first line of this file on the node that uses the device. Never shown; the path is.
    File(PathBuf),
}

/// A node as a device knows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FenceTarget {
    /// The plug, virtual machine, slot ... that is the node; `None`: the device is the node's alone.
    pub plug: Option<String>,
    /// Level 1 is tried first; all devices of a level must succeed.
    pub level: u8,
    /// How long to wait before this node is fenced, in milliseconds: two nodes that fence each other at the
    /// same moment need different ones.
    pub delay_ms: u64,
}

/// What shall become of the node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FenceAction {
    /// Off, and it stays so.
    Off,
    /// Off, and on again after that was verified.
    Reboot,
}

/// Who asked for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FenceAsked {
    /// A person, by a command.
    Person(String),
    /// The cluster itself; why.
    Cluster(String),
}

/// The evidence that a node was off.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceProof {
    /// The node.
    pub node: NodeId,
    /// Its lease generation when the attempt began: the proof is about what it held under this one, and
    /// about nothing later.
    pub generation: LeaseGeneration,
    /// The node that did it.
    pub by: NodeId,
    /// When, in milliseconds since 1970 by the clock of `by`.
    pub unix_ms: u64,
    /// How it is known.
    pub how: FenceEvidence,
}

/// How it is known that a node was off.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FenceEvidence {
    /// All devices of a level switched it off.
    Devices {
        /// The level.
        level: u8,
        /// Each device, and how its word was checked.
        devices: Vec<(String, FenceVerified)>,
    },
    /// A person said so.
    Person {
        /// Who.
        who: String,
        /// On which node.
        on: NodeId,
    },
}

/// How a device's `off` was checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FenceVerified {
    /// Asked afterwards, the device said that the power is off.
    Status,
    /// Its exit code is all there is, and the administrator takes that for proof.
    ExitCode,
}

/// An attempt to fence a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceRecord {
    /// The node.
    pub node: NodeId,
    /// Its name then.
    pub name: String,
    /// The node that did it.
    pub by: NodeId,
    /// Who asked for it.
    pub asked: FenceAsked,
    /// What was asked for.
    pub action: FenceAction,
    /// When it began, in milliseconds since 1970 by the clock of `by`. With `by` it names the attempt.
    pub begun_unix_ms: u64,
    /// When it ended; `None`: it has its proof, and goes on (switches the node on again).
    pub ended_unix_ms: Option<u64>,
    /// What came of it.
    pub outcome: FenceOutcome,
    /// What else is to be known, a sentence each.
    pub remarks: Vec<String>,
}

/// What came of an attempt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FenceOutcome {
    /// The node was off.
    Proved(FenceProof),
    /// Nobody knows that it was off.
    Failed(Vec<FenceFailure>),
}

/// What failed in an attempt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceFailure {
    /// The device, or `None` where it was none.
    pub device: Option<String>,
    /// What happened, why, and what to do.
    pub why: String,
}

/// A change of the devices or of the record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FenceCommand {
    /// A new device.
    AddDevice(FenceDevice),
    /// A device goes.
    RemoveDevice {
        /// Its name.
        name: String,
    },
    /// What came of an attempt; replaces what was recorded of the same one.
    Record(FenceRecord),
    /// A device that is there becomes this one, in one step: its levels are never without it.
    ReplaceDevice(FenceDevice),
}

impl From<FenceCommand> for Command {
    fn from(command: FenceCommand) -> Self {
        Self::Fence(Box::new(command))
    }
}

impl fmt::Debug for FenceValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(value) => write!(f, "{value:?}"),
            Self::Secret(_) => f.write_str("(secret)"),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

impl fmt::Display for FenceValue {
    /// As it may be shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(value) => f.write_str(value),
            Self::Secret(_) => f.write_str("(secret)"),
            Self::File(path) => write!(f, "(first line of {})", path.display()),
        }
    }
}

impl fmt::Display for FenceAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Reboot => "reboot",
        })
    }
}

impl fmt::Display for FenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(name) => f.write_str(name),
            Self::Command(words) => f.write_str(&words.join(" ")),
            Self::Person => f.write_str("a person"),
        }
    }
}

impl Fencing {
    /// The levels of a node, the first one first, each with its devices.
    #[must_use]
    pub fn levels(&self, node: NodeId) -> BTreeMap<u8, Vec<&FenceDevice>> {
        let mut levels: BTreeMap<u8, Vec<&FenceDevice>> = BTreeMap::new();
        for device in self.devices.values() {
            if let Some(target) = device.targets.get(&node) {
                levels.entry(target.level).or_default().push(device);
            }
        }
        levels
    }
}
