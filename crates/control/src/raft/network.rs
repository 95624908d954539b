//! The consensus library's requests to other nodes.

use std::{fmt, sync::Arc, time::Duration};

use openraft::{
    RaftNetwork, RaftNetworkFactory,
    error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable},
    network::{Backoff, RPCOption},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest,
        InstallSnapshotResponse, VoteRequest, VoteResponse,
    },
};
use serde::de::DeserializeOwned;

use super::{Request, TypeConfig, encode, node_id};
use crate::Peers;

/// An unreachable node is tried again this soon: the pause counts into every takeover in which it
/// comes back.
const BACKOFF: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub(super) struct Network {
    peers: Arc<dyn Peers>,
}

pub(super) struct Connection {
    peers: Arc<dyn Peers>,
    target: u64,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}

impl Network {
    pub(super) fn new(peers: Arc<dyn Peers>) -> Self {
        Self { peers }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, _: &openraft::EmptyNode) -> Connection {
        Connection {
            peers: self.peers.clone(),
            target,
        }
    }
}

type CallError<E> = RPCError<u64, openraft::EmptyNode, RaftError<u64, E>>;

impl Connection {
    async fn call<T, E>(&self, request: &Request, option: &RPCOption) -> Result<T, CallError<E>>
    where
        T: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let unreachable = |reason: String| {
            RPCError::Unreachable(Unreachable::new(&std::io::Error::other(reason)))
        };
        let garbled =
            |reason: String| RPCError::Network(NetworkError::new(&std::io::Error::other(reason)));
        let target = node_id(self.target).ok_or_else(|| unreachable("not a node".to_owned()))?;
        let bytes = encode(request).map_err(garbled)?;
        let answer = tokio::time::timeout(option.hard_ttl(), self.peers.raft(target, bytes))
            .await
            .map_err(|_| unreachable("no answer in time".to_owned()))?
            .map_err(unreachable)?;
        let answer: Result<T, RaftError<u64, E>> =
            postcard::from_bytes(&answer).map_err(|error| garbled(error.to_string()))?;
        answer.map_err(|error| RPCError::RemoteError(RemoteError::new(self.target, error)))
    }
}

impl RaftNetwork<TypeConfig> for Connection {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, CallError<openraft::error::Infallible>> {
        self.call(&Request::Append(request), &option).await
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, CallError<InstallSnapshotError>> {
        self.call(&Request::Snapshot(request), &option).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, CallError<openraft::error::Infallible>> {
        self.call(&Request::Vote(request), &option).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(BACKOFF))
    }
}
