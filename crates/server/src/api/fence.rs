//! Fencing: what is asked and what is shown.
//!
//! Secrets are taken and never shown.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use relevo_types::cluster::FenceAction;
use serde::{Deserialize, Serialize};

/// `POST /v1/fence/devices`
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddFenceDeviceRequest {
    /// Unique name.
    pub name: String,
    /// What it is.
    pub kind: FenceKindRequest,
    /// Parameters with their values.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
    /// Those of them that are never shown, besides those that are known for secrets.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// Parameters whose value is the first line of a file on the node that uses the device.
    #[serde(default)]
    pub files: BTreeMap<String, PathBuf>,
    /// The nodes that it can switch off, each with its plug where the device has plugs.
    pub nodes: Vec<(String, Option<String>)>,
    /// Level of the device for these nodes.
    pub level: u8,
    /// How long to wait before these nodes are fenced, in milliseconds.
    #[serde(default)]
    pub delay_ms: u64,
    /// The nodes that may use it; `None`: every data node.
    #[serde(default)]
    pub from: Option<Vec<String>>,
    /// How long one action may take, in seconds.
    pub action_limit_s: u32,
    /// How long after `off` the power may still be on, in seconds.
    pub verify_limit_s: u32,
    /// How often it is checked, in seconds.
    pub check_every_s: u32,
    /// Where the device can't be asked for the power, its exit code is proof.
    #[serde(default)]
    pub trust_exit_code: bool,
    /// Take it without asking the agent whether the parameters fit.
    #[serde(default)]
    pub unchecked: bool,
    /// It takes the place of the device of that name, all of it.
    #[serde(default)]
    pub replace: bool,
}

impl fmt::Debug for AddFenceDeviceRequest {
    /// Without the values, which may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddFenceDeviceRequest")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

/// What a device is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FenceKindRequest {
    /// A fence agent, by its name.
    Agent(String),
    /// A program and its arguments.
    Command(Vec<String>),
    /// A person.
    Person,
}

/// `POST /v1/fence/nodes/{name}`: answered when it is over, or after two minutes with what it does then.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceRequest {
    /// What shall become of the node.
    pub action: FenceAction,
    /// The name of the node, as a person typed it.
    pub confirm: String,
    /// Who asks, for the record.
    pub who: String,
}

/// `POST /v1/fence/nodes/{name}/confirm`: a person says that the node is off. `.../cancel`: the attempt to fence
/// it shall end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceWordRequest {
    /// The name of the node, as a person typed it.
    pub confirm: String,
    /// Who says so, for the record.
    pub who: String,
}

/// `GET /v1/fence/nodes/{name}`: what is known before a node is switched off.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceOutlook {
    /// The node.
    pub node: String,
    /// What is known, a sentence each.
    pub known: Vec<String>,
    /// What speaks against it, a sentence each.
    pub warnings: Vec<String>,
}

/// Fencing, in `GET /v1/status`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FencingStatus {
    /// Devices.
    pub devices: Vec<FenceDeviceStatus>,
    /// Data nodes that no device can switch off; empty where there are no devices at all.
    pub nodes_without: Vec<String>,
    /// Attempts under way.
    pub attempts: Vec<FenceAttemptStatus>,
}

/// A fence device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceDeviceStatus {
    /// Its name.
    pub name: String,
    /// Name of the agent, the command, or `a person`.
    pub what: String,
    /// Its parameters; instead of a secret there is `(secret)`.
    pub parameters: BTreeMap<String, String>,
    /// The nodes that it can switch off.
    pub targets: Vec<FenceTargetStatus>,
    /// The nodes that may use it.
    pub from: Vec<String>,
    /// How long one action may take, in seconds.
    pub action_limit_s: u32,
    /// How long after `off` the power may still be on, in seconds.
    pub verify_limit_s: u32,
    /// How often it is checked, in seconds.
    pub check_every_s: u32,
    /// Its exit code is proof where it can't be asked.
    pub trust_exit_code: bool,
    /// What the last checks found, by node that may use it and answered.
    pub checks: Vec<FenceCheckStatus>,
}

/// A node as a device knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceTargetStatus {
    /// The node.
    pub node: String,
    /// Its plug.
    pub plug: Option<String>,
    /// The level.
    pub level: u8,
    /// How long to wait before it is fenced, in milliseconds.
    pub delay_ms: u64,
}

/// What the last check of a device on a node found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceCheckStatus {
    /// The node that looked.
    pub node: String,
    /// Whether it would work; `None`: nobody looked yet.
    pub works: Option<bool>,
    /// Why it would not.
    pub trouble: Option<String>,
    /// Since when that is so.
    pub since_unix_ms: Option<u64>,
    /// When it was looked at last.
    pub at_unix_ms: Option<u64>,
}

/// An attempt to fence a node that is under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceAttemptStatus {
    /// The node that is fenced.
    pub node: String,
    /// The node that does it.
    pub by: String,
    /// What it does, in words.
    pub doing: String,
    /// Since when.
    pub since_unix_ms: u64,
}

/// `GET /v1/fence/history`: an attempt that ended, or has its proof.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceHistoryEntry {
    /// The node.
    pub node: String,
    /// The node that did it.
    pub by: String,
    /// Who asked for it.
    pub asked: String,
    /// What was asked for.
    pub action: FenceAction,
    /// When it began.
    pub begun_unix_ms: u64,
    /// When it ended; `None`: it goes on after its proof.
    pub ended_unix_ms: Option<u64>,
    /// The node was off.
    pub proved: bool,
    /// When that was known.
    pub proved_unix_ms: Option<u64>,
    /// The lease generation of the node that the proof is about.
    pub generation: Option<u64>,
    /// How it is known, or what failed.
    pub how: Vec<String>,
    /// What else is to be known.
    pub remarks: Vec<String>,
}

/// `GET /v1/fence/nodes/{name}/power`: what a device says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FencePower {
    /// The device.
    pub device: String,
    /// Its level for the node.
    pub level: u8,
    /// `on`, `off` or `unknown`.
    pub power: String,
    /// Why it is not known.
    pub detail: Option<String>,
}

/// `GET /v1/fence/agents`: a fence agent that is installed on the answering node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceAgentSummary {
    /// Its name.
    pub name: String,
    /// What it is, or why that is not known.
    pub description: String,
}

/// `GET /v1/fence/agents/{name}`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceAgentStatus {
    /// Its name.
    pub name: String,
    /// What it is, in a line.
    pub description: String,
    /// What it is, at length.
    pub text: String,
    /// What it can do.
    pub actions: Vec<String>,
    /// What a device of it can be told.
    pub parameters: Vec<FenceParameterStatus>,
    /// Each node needs a plug.
    pub needs_plug: bool,
    /// Why no device of it can prove anything.
    pub unfit: Option<String>,
}

/// A parameter of an agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FenceParameterStatus {
    /// Its name.
    pub name: String,
    /// The agent does nothing without it.
    pub required: bool,
    /// It is never shown.
    pub secret: bool,
    /// An old name, which still works.
    pub deprecated: bool,
    /// What it is when it is not given.
    pub default: Option<String>,
    /// The values that can be chosen; empty: any.
    pub choices: Vec<String>,
    /// What it is.
    pub description: String,
}
