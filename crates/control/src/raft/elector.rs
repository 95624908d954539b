//! When to stand for election. The stable line of the library has no pre-vote: a node that comes
//! back from a partition would depose a healthy leader with its higher term, and two nodes whose
//! time-outs are close would split the votes again and again. So we start elections ourselves:
//! after a silence of the leader that is drawn anew each time, and only when a majority says
//! that it would vote for this node.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use openraft::{LogId, Raft, ServerState};
use relevo_types::{NodeId, Timing};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{Request, TypeConfig, encode, node_id, store::LogStore};
use crate::Peers;

pub(super) struct Elector {
    me: NodeId,
    timing: Timing,
    raft: Raft<TypeConfig>,
    store: LogStore,
    peers: Arc<dyn Peers>,
    /// When a leader was last heard, or this copy began.
    heard: Mutex<Instant>,
}

impl Elector {
    pub(super) fn new(
        me: NodeId,
        timing: Timing,
        raft: Raft<TypeConfig>,
        store: LogStore,
        peers: Arc<dyn Peers>,
    ) -> Self {
        Self {
            me,
            timing,
            raft,
            store,
            peers,
            heard: Mutex::new(Instant::now()),
        }
    }

    /// A leader was heard.
    pub(super) fn heard_leader(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether this copy would vote for a leader whose log ends at `last`: it heard no other leader
    /// for a while, is none itself, and its own log goes no further.
    pub(super) fn would_vote(&self, last: Option<LogId<u64>>) -> bool {
        let metrics = self.raft.metrics().borrow().clone();
        let leads = metrics.state == ServerState::Leader;
        !leads && self.silence() >= self.timing.heartbeat * 4 && last >= self.store.last()
    }

    fn silence(&self) -> Duration {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
    }

    pub(super) async fn run(self: Arc<Self>) {
        loop {
            let patience = self.patience();
            loop {
                if self.leads() {
                    self.heard_leader();
                }
                let left = patience.saturating_sub(self.silence());
                if left.is_zero() && self.may_stand() {
                    break;
                }
                // Asleep while a leader is heard: an idle node costs next to nothing.
                sleep(left.max(self.timing.heartbeat / 4)).await;
            }
            if self.has_majority().await
                && let Err(error) = self.raft.trigger().elect().await
            {
                tracing::warn!(%error, "can't stand for election");
                return;
            }
            // Time for the votes to come in before the next try.
            sleep(self.timing.heartbeat).await;
        }
    }

    /// How long a leader may be silent this time: 5 to 8 heartbeats, so that a new leader is
    /// there before the dead node's lease is condemned.
    fn patience(&self) -> Duration {
        let random = RandomState::new().hash_one(self.me.0) % 1000;
        let spread = self.timing.heartbeat * 3 * u32::try_from(random).unwrap_or(0) / 1000;
        self.timing.heartbeat * 5 + spread
    }

    fn leads(&self) -> bool {
        self.raft.metrics().borrow().state == ServerState::Leader
    }

    /// Only a voter of the group stands; a leader need not.
    fn may_stand(&self) -> bool {
        let metrics = self.raft.metrics().borrow().clone();
        let mut voters = metrics.membership_config.membership().voter_ids();
        metrics.state != ServerState::Leader && voters.any(|id| id == u64::from(self.me.0))
    }

    /// Asks every other voter whether it would vote for this node.
    async fn has_majority(&self) -> bool {
        let metrics = self.raft.metrics().borrow().clone();
        let voters: Vec<NodeId> = metrics
            .membership_config
            .membership()
            .voter_ids()
            .filter_map(node_id)
            .collect();
        let Ok(request) = encode(&Request::PreVote {
            last: self.store.last(),
        }) else {
            return false;
        };
        let mut asked = JoinSet::new();
        for voter in voters.iter().copied().filter(|voter| *voter != self.me) {
            let (peers, request) = (self.peers.clone(), request.clone());
            let bound = self.timing.heartbeat * 3;
            asked.spawn(async move {
                let answer = timeout(bound, peers.raft(voter, request))
                    .await
                    .ok()?
                    .ok()?;
                postcard::from_bytes::<bool>(&answer).ok()
            });
        }
        let mut votes = 1;
        while votes <= voters.len() / 2 {
            match asked.join_next().await {
                Some(answer) => votes += usize::from(matches!(answer, Ok(Some(true)))),
                None => return false,
            }
        }
        true
    }
}
