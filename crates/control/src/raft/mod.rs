//! The control log on openraft's stable line. Nothing outside this module names the library.
//!
//! * `store`: log, vote and commit mark in a [`crate::journal::RecordFile`].
//! * `machine`: the applied [`ClusterState`] and its snapshots.
//! * `elector`: when to stand for election, after asking whether it has a chance.
//! * `network`: requests to the other nodes through [`crate::Peers`].
//! * `reconcile`: the members of the consensus group follow the nodes in the state.

mod elector;
mod machine;
mod network;
mod reconcile;
mod store;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Cursor},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use openraft::{
    Config, Raft, SnapshotPolicy,
    error::{ClientWriteError, RaftError},
};
use relevo_types::{
    NodeId, Timing,
    cluster::{ClusterState, Command, Outcome, Rejection},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    ControlLog, Peers, ProposeError,
    raft::{elector::Elector, machine::StateMachine, network::Network, store::LogStore},
};

/// What a command answers, as it travels in the log's responses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Response {
    /// The state's revision after the command: a node that shows it has applied the command.
    revision: u64,
    result: Result<Outcome, Rejection>,
}

openraft::declare_raft_types!(
    /// The types of our use of the library.
    pub(crate) TypeConfig:
        D = Proposal,
        R = MaybeResponse,
        NodeId = u64,
        Node = openraft::EmptyNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

/// A command on its way into the log. The id tells a proposal that is sent again, because its
/// answer was lost, from a new one with the same content.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Proposal {
    id: u64,
    command: Command,
}

impl Proposal {
    fn new(command: Command) -> Self {
        // Randomly seeded once for each call; no two are alike.
        let id = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8);
        Self { id, command }
    }
}

/// The answer to an entry; entries of the library itself have none.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct MaybeResponse(Option<Response>);

/// A snapshot is taken after so many commands: replaying them takes milliseconds.
const SNAPSHOT_EVERY: u64 = 500;

/// So many entries stay behind a snapshot for nodes that lag a little; others get the snapshot.
const LOG_KEPT: u64 = 500;

/// How long a proposal looks for a leader that takes it. Longer than any election, shorter than a
/// person's patience.
const PROPOSE_BOUND: Duration = Duration::from_secs(5);

/// Pause between two tries of a proposal: a fraction of an election.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Where a control log lives and how it behaves.
#[derive(Clone, Debug)]
pub struct RaftControlConfig {
    /// Directory of its files; made if missing.
    pub directory: PathBuf,
    /// This node.
    pub me: NodeId,
    /// The cluster's time-outs.
    pub timing: Timing,
    /// The newest change of who votes that a majority has known for long enough, as this node's membership sees
    /// it: another one is proposed only then (decision 0010).
    pub settled: watch::Receiver<u64>,
}

/// A node's copy of the control log.
pub struct RaftControl {
    me: NodeId,
    raft: Raft<TypeConfig>,
    peers: Arc<dyn Peers>,
    state: watch::Receiver<Arc<ClusterState>>,
    leader: watch::Receiver<Option<NodeId>>,
    elector: Arc<Elector>,
    settled: watch::Receiver<u64>,
    background: Vec<JoinHandle<()>>,
}

impl fmt::Debug for RaftControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RaftControl({})", self.me)
    }
}

/// A request to another node's copy.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Append(openraft::raft::AppendEntriesRequest<TypeConfig>),
    Vote(openraft::raft::VoteRequest<u64>),
    Snapshot(openraft::raft::InstallSnapshotRequest<TypeConfig>),
    /// Would you vote for a leader whose log ends here? Answered by a `bool`.
    PreVote {
        last: Option<openraft::LogId<u64>>,
    },
}

/// What a forwarded proposal answers.
#[derive(Debug, Serialize, Deserialize)]
enum Forwarded {
    Answer(Response),
    NotLeader,
    Failed(String),
}

impl RaftControl {
    /// Opens a node's copy; an empty one in an empty directory. An empty copy waits until a
    /// leader adds it (its node joined), or until [`Self::bootstrap`].
    ///
    /// # Errors
    /// The files can't be read or are damaged; the text says what to do.
    pub async fn open(config: RaftControlConfig, peers: Arc<dyn Peers>) -> io::Result<Self> {
        std::fs::create_dir_all(&config.directory)?;
        let store = LogStore::open(&config.directory.join("control.log"))?;
        let (machine, state) = StateMachine::open(&config.directory.join("control.snapshot"))?;
        let raft = Raft::new(
            u64::from(config.me.0),
            Arc::new(raft_config(config.timing)?),
            Network::new(peers.clone()),
            store.clone(),
            machine,
        )
        .await
        .map_err(|error| io::Error::other(error.to_string()))?;
        let (leader, follow) = follow_leader(&raft);
        let reconcile = tokio::spawn(reconcile::run(
            config.me,
            raft.clone(),
            state.clone(),
            config.settled.clone(),
        ));
        let elector = Arc::new(Elector::new(
            config.me,
            config.timing,
            raft.clone(),
            store,
            peers.clone(),
        ));
        let elect = tokio::spawn(elector.clone().run());
        let background = vec![follow, reconcile, elect];
        Ok(Self {
            me: config.me,
            raft,
            peers,
            state,
            leader,
            elector,
            settled: config.settled,
            background,
        })
    }

    /// Makes this copy the only member of a new group and applies the first command.
    ///
    /// # Errors
    /// The copy is not empty, or the command was refused.
    pub async fn bootstrap(&self, init: Command) -> Result<Outcome, ProposeError> {
        let members = BTreeMap::from([(u64::from(self.me.0), openraft::EmptyNode {})]);
        match self.raft.initialize(members).await {
            // Interrupted after this step the last time: go on from here.
            Ok(()) | Err(RaftError::APIError(openraft::error::InitializeError::NotAllowed(_))) => {}
            Err(error) => {
                return Err(ProposeError::Storage {
                    reason: error.to_string(),
                });
            }
        }
        self.propose(init).await
    }

    /// Answers a request of another node's [`Peers::raft`].
    ///
    /// # Errors
    /// It made no sense, or this copy failed; in words.
    pub async fn handle_raft(&self, request: &[u8]) -> Result<Vec<u8>, String> {
        match postcard::from_bytes(request).map_err(|error| error.to_string())? {
            Request::Append(request) => {
                let answer = self.raft.append_entries(request).await;
                if matches!(answer, Ok(openraft::raft::AppendEntriesResponse::Success)) {
                    self.elector.heard_leader();
                }
                encode(&answer)
            }
            Request::PreVote { last } => encode(&self.elector.would_vote(last)),
            Request::Vote(request) => encode(&self.raft.vote(request).await),
            Request::Snapshot(request) => encode(&self.raft.install_snapshot(request).await),
        }
    }

    /// Answers a request of another node's [`Peers::propose`].
    ///
    /// # Errors
    /// It made no sense; in words.
    pub async fn handle_propose(&self, request: &[u8]) -> Result<Vec<u8>, String> {
        let proposal = postcard::from_bytes(request).map_err(|error| error.to_string())?;
        encode(&self.propose_here(proposal).await)
    }

    /// Stops this copy. Its files can be opened again after.
    pub async fn shutdown(&self) {
        for task in &self.background {
            task.abort();
        }
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "the control log did not stop cleanly");
        }
    }

    /// Proposes as the leader, if this node is it.
    async fn propose_here(&self, proposal: Proposal) -> Forwarded {
        if let Command::AdmitVoter { expect, .. } | Command::RemoveNode { expect, .. } =
            &proposal.command
        {
            if self.raft.metrics().borrow().state != openraft::ServerState::Leader {
                return Forwarded::NotLeader;
            }
            let mut settled = self.settled.clone();
            let known = settled.wait_for(|settled| settled >= expect);
            if !matches!(timeout(PROPOSE_BOUND, known).await, Ok(Ok(_))) {
                return Forwarded::Failed(
                    "a majority of the voters has not known the last change of who votes for long enough"
                        .to_owned(),
                );
            }
        }
        match self.raft.client_write(proposal).await {
            Ok(written) => written
                .data
                .0
                .map_or(Forwarded::NotLeader, Forwarded::Answer),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Forwarded::NotLeader,
            Err(error) => Forwarded::Failed(error.to_string()),
        }
    }

    /// Proposes to whoever leads, until someone answers or the bound is reached.
    async fn propose_somewhere(&self, proposal: &Proposal) -> Result<Response, String> {
        let deadline = Instant::now() + PROPOSE_BOUND;
        let bytes = postcard::to_stdvec(proposal).map_err(|error| error.to_string())?;
        let mut reason = "no leader is known".to_owned();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(reason);
            }
            let leader = *self.leader.borrow();
            let answer = match leader {
                Some(leader) if leader == self.me => {
                    match timeout(left, self.propose_here(proposal.clone())).await {
                        Ok(answer) => answer,
                        Err(_) => return Err("the leader can't reach a majority".to_owned()),
                    }
                }
                Some(leader) => {
                    match timeout(left, self.peers.propose(leader, bytes.clone())).await {
                        Ok(Ok(bytes)) => {
                            postcard::from_bytes(&bytes).map_err(|error| error.to_string())?
                        }
                        // The proposal may be on its way: proposing again is safe because commands
                        // carry what they expect.
                        Ok(Err(error)) => {
                            reason = format!("the leader, {leader}, did not answer: {error}");
                            Forwarded::NotLeader
                        }
                        Err(_) => {
                            return Err(format!("the leader, {leader}, did not answer in time"));
                        }
                    }
                }
                None => Forwarded::NotLeader,
            };
            match answer {
                Forwarded::Answer(response) => return Ok(response),
                Forwarded::NotLeader => sleep(RETRY_PAUSE).await,
                Forwarded::Failed(reason) => return Err(reason),
            }
        }
    }
}

#[async_trait]
impl ControlLog for RaftControl {
    async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        let answer = self
            .propose_somewhere(&Proposal::new(command))
            .await
            .map_err(|reason| {
                let state = self.state.borrow();
                ProposeError::Undecided {
                    reason,
                    needed: state.majority(),
                    voters: state.voters().count(),
                }
            })?;
        // The leader applied it; wait until this node did, so that the caller sees the effect.
        let mut state = self.state.clone();
        let seen = state.wait_for(|state| state.revision >= answer.revision);
        let _unless_cut_off = timeout(Duration::from_secs(1), seen).await.is_ok();
        Ok(answer.result?)
    }

    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }

    fn leader(&self) -> watch::Receiver<Option<NodeId>> {
        self.leader.clone()
    }
}

/// Elections are started by our own [`Elector`]; what the library's time-outs still decide is for
/// how long a voter that heard a leader refuses to vote for another one.
fn raft_config(timing: Timing) -> io::Result<Config> {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let config = Config {
        cluster_name: "relevo".to_owned(),
        heartbeat_interval: millis(timing.heartbeat),
        election_timeout_min: millis(timing.heartbeat * 2),
        election_timeout_max: millis(timing.heartbeat * 4),
        enable_elect: false,
        install_snapshot_timeout: 5000,
        max_payload_entries: 64,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: LOG_KEPT,
        ..Config::default()
    };
    config.validate().map_err(io::Error::other)
}

/// Publishes who leads; only changes wake the watchers.
fn follow_leader(raft: &Raft<TypeConfig>) -> (watch::Receiver<Option<NodeId>>, JoinHandle<()>) {
    let mut metrics = raft.metrics();
    let (sender, leader) = watch::channel(None);
    let follow = tokio::spawn(async move {
        loop {
            let current = metrics.borrow_and_update().current_leader.and_then(node_id);
            sender.send_if_modified(|known| {
                let changed = *known != current;
                *known = current;
                changed
            });
            if metrics.changed().await.is_err() {
                break;
            }
        }
    });
    (leader, follow)
}

fn node_id(id: u64) -> Option<NodeId> {
    u32::try_from(id).ok().map(NodeId)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, String> {
    postcard::to_stdvec(value).map_err(|error| error.to_string())
}

impl Drop for RaftControl {
    fn drop(&mut self) {
        for task in &self.background {
            task.abort();
        }
    }
}
