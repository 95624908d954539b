//! The control log: a few nodes agree on a sequence of [`Command`]s and so on one [`ClusterState`].
//!
//! The daemon proposes through [`ControlLog`] and watches the applied state; nothing above this
//! crate knows which consensus library does the work (openraft, in `raft`). The simulator has its
//! own implementation of the same idea: propose, and see the state change or be rejected.
//!
//! This crate owns what a node must remember to be trusted with a vote:
//!
//! * [`journal`]: append-only checksummed files, for the log, the vote and the commit mark.
//! * [`facts`]: who this node is and which lease generations it condemned.
//! * [`lock`]: one daemon for one state directory.

pub mod facts;
pub mod journal;
pub mod lock;
mod raft;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
pub use raft::{RaftControl, RaftControlConfig};
use relevo_types::{
    NodeId,
    cluster::{ClusterState, Command, Outcome, Rejection},
};
use tokio::sync::watch;

/// The replicated log of commands, as the rest of the daemon sees it.
#[async_trait]
pub trait ControlLog: Send + Sync + fmt::Debug {
    /// Proposes a command, through the leader wherever it is; returns when it is applied here.
    ///
    /// # Errors
    /// See [`ProposeError`].
    async fn propose(&self, command: Command) -> Result<Outcome, ProposeError>;

    /// The state after the last command applied on this node; published after every change.
    fn state(&self) -> watch::Receiver<Arc<ClusterState>>;

    /// Who leads the log, as far as this node knows.
    fn leader(&self) -> watch::Receiver<Option<NodeId>>;
}

/// Why a proposal gave nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProposeError {
    /// It was committed and did not fit the state any more: nothing changed.
    #[error("{0}")]
    Rejected(#[from] Rejection),
    /// It is not known to be committed. It may still be: look at the state.
    #[error(
        "the cluster can't decide now: {reason}; it needs {needed} of its {voters} voters to reach each other. \
         See `relevo status` for who is missing"
    )]
    Undecided {
        /// What was observed.
        reason: String,
        /// How many voters are a majority.
        needed: usize,
        /// How many voters there are.
        voters: usize,
    },
    /// This node can't keep its log any more.
    #[error(
        "this node's control log failed: {reason}; restart the daemon, and if it fails again replace the disk"
    )]
    Storage {
        /// The system's words.
        reason: String,
    },
}

/// The way to the other nodes. The daemon implements it on its TLS connections, tests in memory.
#[async_trait]
pub trait Peers: Send + Sync + 'static {
    /// Carries a request of the consensus library to a node's [`RaftControl::handle_raft`].
    ///
    /// # Errors
    /// The node can't be reached; in words.
    async fn raft(&self, target: NodeId, request: Vec<u8>) -> Result<Vec<u8>, String>;

    /// Carries a proposal to a node's [`RaftControl::handle_propose`].
    ///
    /// # Errors
    /// The node can't be reached; in words.
    async fn propose(&self, target: NodeId, request: Vec<u8>) -> Result<Vec<u8>, String>;
}
