//! The node manager: a sans-IO state machine per node that composes membership, planner and the
//! runners of services.
//!
//! The daemon and the simulator drive it: [`Node::new`], [`Node::handle`] with an [`Input`] and
//! the time, [`Node::deadline`] (when [`Input::Tick`] is due), [`Node::status`]. See [`io`] for
//! what goes in and out.
//!
//! Where to start: `machine` for the dispatch. After every input it goes through the same few
//! steps (`drive`), each of which compares what is with what should be and orders the difference;
//! no step keeps a script of its own. `runner` starts and stops one service, `volumes` tells the
//! data path about configurations, `planning` runs the planner on the leader, `proposals`
//! remembers what was proposed, `reports` what nodes tell each other.

pub mod io;
mod machine;
mod planning;
mod proposals;
mod reports;
mod runner;
mod shutdown;
mod status;
mod volumes;

pub use io::{
    Effect, Input, Level, NodeConfig, NodeEvent, OrderId, PartAction, PartOrder, Phase, ProposalId,
    ProposalResult, Report, ServiceSummary, Subject, VolumeOrder,
};
pub use machine::Node;
pub use status::{NodeStatus, ServiceStatus};
