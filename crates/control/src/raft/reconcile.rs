//! The leader makes the members of the consensus group follow the nodes in the state.
//!
//! A node that joined is first a learner; when it has caught up it becomes a voter of the group, and
//! then the state counts its vote too ([`Command::AdmitVoter`]): so a node that joined and never came
//! up, or came up slowly, takes no majority away. A node that left the state leaves the group.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use openraft::{ChangeMembers, Raft, ServerState};
use relevo_types::{
    NodeId,
    cluster::{ClusterState, Command},
};
use tokio::{sync::watch, time::timeout};

use super::{Proposal, TypeConfig, node_id};

/// A learner this close to the end of the log has caught up: a few commands are under way at any
/// time.
const CAUGHT_UP_WITHIN: u64 = 8;

/// Looks again this often when nothing changed, for learners that catch up.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn run(
    me: NodeId,
    raft: Raft<TypeConfig>,
    mut state: watch::Receiver<Arc<ClusterState>>,
    settled: watch::Receiver<u64>,
) {
    loop {
        let metrics = raft.metrics().borrow().clone();
        if metrics.state == ServerState::Leader {
            let current = state.borrow_and_update().clone();
            let known_for_long = *settled.borrow();
            if let Err(error) = step(me, &raft, &current, known_for_long).await {
                tracing::debug!(error, "the group does not follow the nodes yet");
            }
        }
        if let Ok(Err(_)) = timeout(LOOK_EVERY, state.changed()).await {
            return;
        }
    }
}

/// Does the first thing that is due.
async fn step(
    me: NodeId,
    raft: &Raft<TypeConfig>,
    state: &ClusterState,
    settled: u64,
) -> Result<(), String> {
    let metrics = raft.metrics().borrow().clone();
    let group = metrics.membership_config.membership();
    let voters: BTreeSet<NodeId> = group.voter_ids().filter_map(node_id).collect();
    let members: BTreeSet<NodeId> = group.nodes().filter_map(|(id, _)| node_id(*id)).collect();
    if state.nodes.is_empty() {
        // Before `Init` is applied the state is empty; nobody is to be removed for that.
        return Ok(());
    }
    let words = |error: openraft::error::RaftError<u64, _>| error.to_string();
    for node in state.nodes.values() {
        let id = u64::from(node.id.0);
        if !members.contains(&node.id) {
            raft.add_learner(id, openraft::EmptyNode {}, false)
                .await
                .map_err(words)?;
            return Ok(());
        }
        if !voters.contains(&node.id) {
            let matched = metrics
                .replication
                .as_ref()
                .and_then(|replication| replication.get(&id))
                .and_then(|matched| matched.map(|log_id| log_id.index));
            let last = metrics.last_log_index.unwrap_or(0);
            if matched.is_some_and(|matched| matched + CAUGHT_UP_WITHIN >= last) {
                let add = ChangeMembers::AddVoterIds([id].into());
                raft.change_membership(add, false).await.map_err(words)?;
                return Ok(());
            }
        } else if !node.voter && settled >= state.voters_version {
            let admit = Command::AdmitVoter {
                node: node.id,
                expect: state.voters_version,
            };
            raft.client_write(Proposal::new(admit))
                .await
                .map_err(|error| error.to_string())?;
            return Ok(());
        }
    }
    // Itself last: a leader that leaves hands over first.
    let mut leaving: Vec<NodeId> = members
        .into_iter()
        .filter(|member| !state.nodes.contains_key(member))
        .collect();
    leaving.sort_by_key(|node| *node == me);
    if let Some(node) = leaving.first() {
        let id = u64::from(node.0);
        let change = if voters.contains(node) {
            ChangeMembers::RemoveVoters([id].into())
        } else {
            ChangeMembers::RemoveNodes([id].into())
        };
        raft.change_membership(change, false).await.map_err(words)?;
    }
    Ok(())
}
