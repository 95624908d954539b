//! Requests between daemons: what this one answers, and how the control log reaches the others.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use relevo_control::{ControlLog as _, Peers, ProposeError, RaftControl};
use relevo_node::{Input, Report};
use relevo_transport::{Method, RpcClient, RpcError, RpcHandler};
use relevo_types::{
    NodeId, Timing,
    cluster::{ClusterState, Command, Outcome},
};

use crate::{
    daemon::node_loop::NodeInbox,
    fencing::{ConfirmFailure, FenceCall, Fencing},
    join::Admitter,
    status::{LocalReport, LocalSource},
};

/// How long a proposal may take at the leader: the control log gives up earlier.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(6);

/// A word is taken at once or not at all.
const FENCE_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The way of the control log to the other nodes.
#[derive(Debug)]
pub(crate) struct ControlPeers {
    rpc: Arc<RpcClient>,
    /// A request of the consensus library that takes longer is of no use any more.
    raft_timeout: Duration,
}

impl ControlPeers {
    pub(crate) fn new(rpc: Arc<RpcClient>, timing: &Timing) -> Self {
        Self {
            rpc,
            raft_timeout: timing.dead.max(Duration::from_secs(1)),
        }
    }
}

#[async_trait]
impl Peers for ControlPeers {
    async fn raft(&self, target: NodeId, request: Vec<u8>) -> Result<Vec<u8>, String> {
        self.rpc
            .call(
                target,
                Method::Raft,
                Bytes::from(request),
                self.raft_timeout,
            )
            .await
            .map(Vec::from)
            .map_err(|e| e.to_string())
    }

    async fn propose(&self, target: NodeId, request: Vec<u8>) -> Result<Vec<u8>, String> {
        self.rpc
            .call(
                target,
                Method::Propose,
                Bytes::from(request),
                PROPOSE_TIMEOUT,
            )
            .await
            .map(Vec::from)
            .map_err(|e| e.to_string())
    }
}

/// The control addresses of the members, for [`RpcClient::set_peers`].
pub(crate) fn control_addresses(state: &ClusterState) -> BTreeMap<NodeId, Vec<SocketAddr>> {
    state
        .nodes
        .values()
        .map(|node| (node.id, node.control_addresses().collect()))
        .collect()
}

/// Asks a node for what only it knows.
pub(crate) async fn fetch_report(
    rpc: &RpcClient,
    node: NodeId,
    bound: Duration,
) -> Option<LocalReport> {
    let answer = rpc
        .call(node, Method::Api, Bytes::new(), bound)
        .await
        .ok()?;
    serde_json::from_slice(&answer).ok()
}

/// Tells a node what a person says about the fencing of one.
pub(crate) async fn send_fence_call(
    rpc: &RpcClient,
    to: NodeId,
    call: &FenceCall,
) -> Result<Result<(), ConfirmFailure>, String> {
    let body = postcard::to_stdvec(call).map_err(|e| e.to_string())?;
    let answer = rpc
        .call(to, Method::Fence, Bytes::from(body), FENCE_CALL_TIMEOUT)
        .await
        .map_err(|e| e.to_string())?;
    postcard::from_bytes(&answer).map_err(|e| e.to_string())
}

/// Tells a node what this one observes.
pub(crate) async fn send_report(rpc: &RpcClient, to: NodeId, report: &Report, bound: Duration) {
    // A lost report is followed by the next one.
    if let Ok(body) = postcard::to_stdvec(report)
        && let Err(error) = rpc.call(to, Method::Report, Bytes::from(body), bound).await
    {
        tracing::trace!(%error, %to, "a report was not delivered");
    }
}

/// What this daemon answers to others.
pub(crate) struct Handler {
    pub(crate) control: Arc<RaftControl>,
    pub(crate) inbox: NodeInbox,
    /// `None` on a node that admits nobody.
    pub(crate) admitter: Option<Admitter>,
    pub(crate) local: LocalSource,
    pub(crate) fencing: Fencing,
}

#[async_trait]
impl RpcHandler for Handler {
    async fn handle(
        &self,
        peer: Option<NodeId>,
        method: Method,
        body: Bytes,
    ) -> Result<Bytes, RpcError> {
        let failed = |why: String| RpcError::Failed { why };
        if let Some(peer) = peer {
            self.check_member(peer)?;
        }
        match method {
            Method::Join => self.admit(&body).await,
            Method::Raft => self
                .control
                .handle_raft(&body)
                .await
                .map(Bytes::from)
                .map_err(failed),
            Method::Propose => self
                .control
                .handle_propose(&body)
                .await
                .map(Bytes::from)
                .map_err(failed),
            Method::Report => {
                let report: Report =
                    postcard::from_bytes(&body).map_err(|e| failed(e.to_string()))?;
                if Some(report.from) != peer {
                    return Err(RpcError::Refused {
                        why: "a report about another node than its sender".to_owned(),
                    });
                }
                self.inbox.tell(Input::Report(report));
                Ok(Bytes::new())
            }
            Method::Fence => {
                let call: FenceCall =
                    postcard::from_bytes(&body).map_err(|e| failed(e.to_string()))?;
                let answer = self.fencing.answer(call).await;
                postcard::to_stdvec(&answer)
                    .map(Bytes::from)
                    .map_err(|e| failed(e.to_string()))
            }
            Method::Api => serde_json::to_vec(&self.local.report().await)
                .map(Bytes::from)
                .map_err(|e| failed(e.to_string())),
        }
    }
}

impl Handler {
    /// A certificate is good for ever; a node that left is kept out here. One that this node
    /// does not know yet may be newer than what it has read of the control log.
    fn check_member(&self, peer: NodeId) -> Result<(), RpcError> {
        let state = self.control.state();
        let state = state.borrow();
        if peer.0 <= state.last_node && !state.nodes.contains_key(&peer) {
            return Err(RpcError::Refused {
                why: format!(
                    "node {peer} left the cluster; to come back, let it join anew with an empty state directory"
                ),
            });
        }
        Ok(())
    }

    async fn admit(&self, body: &[u8]) -> Result<Bytes, RpcError> {
        let Some(admitter) = &self.admitter else {
            return Err(RpcError::Refused {
                why: "a witness can't admit nodes; make the token on a data node".to_owned(),
            });
        };
        let (call, command): (_, Command) = Admitter::command(body)?;
        let checked = self.control.state().borrow().check_paths(call.spec());
        checked.map_err(|rejection| RpcError::Refused {
            why: rejection.to_string(),
        })?;
        let outcome = self.control.propose(command).await.map_err(|e| match e {
            ProposeError::Rejected(rejection) => RpcError::Refused {
                why: rejection.to_string(),
            },
            other => RpcError::Failed {
                why: other.to_string(),
            },
        })?;
        let Outcome::Node(node) = outcome else {
            return Err(RpcError::Failed {
                why: "the control log gave an answer that does not fit".to_owned(),
            });
        };
        let state = self.control.state().borrow().clone();
        admitter.reply(&call, node, &state.name, state.sensitivity)
    }
}
