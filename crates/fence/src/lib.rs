//! Fencing: making sure that a node does nothing any more, and knowing it.
//!
//! Called by `server`, which configures devices through the control log and drives the rest.
//!
//! * [`metadata`]: what an agent says of itself; parameters are checked against it.
//! * [`agent`]: one action of one device: an agent of the distribution, or any command.
//! * [`attempt`]: fencing one node: levels, verification, retries, proof. Sans-IO.
//! * [`check`]: whether devices would work, looked at all the time. Sans-IO.

pub mod agent;
pub mod attempt;
pub mod check;
pub mod metadata;

pub use agent::{Action, Agents, Reply};
pub use attempt::{Ability, Attempt, Effect, Input, Level, Means, Plan, RunId};
pub use check::{Change, Checks, Found};
pub use metadata::{Findings, Metadata, Parameter};
