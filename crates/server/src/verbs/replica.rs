//! Replicas of a volume that is in use: add, remove, move.

use relevo_types::{
    NodeId, VolumeId,
    cluster::{ClusterState, Command, Protocol, ReplicaSpec, ReplicaStanding},
};

use super::{Found, WAIT, find_node, find_volume};
use crate::{
    api::{AddReplicaRequest, ApiError, Done, ErrorKind},
    cluster::Cluster,
};

impl Cluster {
    /// Adds a replica; returns when it exists. When it can't be made nothing stays behind.
    pub(crate) async fn add_replica(
        &self,
        name: &str,
        request: AddReplicaRequest,
    ) -> Result<Done, ApiError> {
        let node_name = &request.replica.node;
        let what = format!("volume `{name}` got no replica on {node_name}");
        let state = self.state();
        let volume = find_volume(&state, name, &what)?.id;
        let node = find_node(&state, node_name, &what)?;
        let replaces = match &request.replaces {
            None => None,
            Some(old) => Some(find_node(&state, old, &what)?),
        };
        let replica = ReplicaSpec {
            node,
            protocol: Protocol::C,
            backing: request.replica.backing.clone(),
            force: request.force,
        };
        let command = Command::AddReplica {
            volume,
            replica,
            replaces,
        };
        self.change(&what, command).await?;
        let late = || {
            ApiError::new(
                ErrorKind::Unavailable,
                what.clone(),
                format!("{node_name} did not answer within {} s", WAIT.as_secs()),
                format!(
                    "it is made when {node_name} is back; `relevo volume replica remove {name} {node_name}` takes the wish back"
                ),
            )
        };
        let made = self
            .await_state(WAIT, late, |state| made(state, volume, node, &what))
            .await;
        if let Err(error) = made {
            return Err(self.undo_replica(volume, node, error).await);
        }
        let then = match &request.replaces {
            None => String::new(),
            Some(old) => {
                format!("; the one on {old} is removed when it is in sync and not primary")
            }
        };
        Ok(Done {
            done: format!(
                "Volume {name} has a replica on {node_name}, which is being filled{then}. `relevo status` shows how far it is."
            ),
        })
    }

    /// Takes a replica back that could not be made. One whose node is only late stays wanted.
    async fn undo_replica(&self, volume: VolumeId, node: NodeId, error: ApiError) -> ApiError {
        if error.kind == ErrorKind::Refused
            && let Err(undo) = self.propose(Command::RemoveReplica { volume, node }).await
        {
            let why = undo.explain("").reason;
            tracing::warn!(why, %volume, %node, "a replica that was not made is still listed");
        }
        error
    }

    /// Removes a replica and its data.
    pub(crate) async fn remove_replica(&self, name: &str, node: &str) -> Result<Done, ApiError> {
        let what = format!("the replica of volume `{name}` on {node} was not removed");
        let state = self.state();
        let volume = find_volume(&state, name, &what)?;
        let id = find_node(&state, node, &what)?;
        let command = Command::RemoveReplica {
            volume: volume.id,
            node: id,
        };
        self.change(&what, command).await?;
        let left = volume.replicas.len().saturating_sub(1);
        let warning = if left == 1 {
            " It has one replica left: the next loss takes it away."
        } else {
            ""
        };
        Ok(Done {
            done: format!(
                "Volume {name} has no replica on {node} any more; its data is being removed there.{warning}"
            ),
        })
    }
}

/// Whether a replica's creation came to its end.
fn made(state: &ClusterState, volume: VolumeId, node: NodeId, what: &str) -> Found<()> {
    let replica = state
        .volumes
        .get(&volume)
        .and_then(|volume| volume.replicas.get(&node));
    match replica.map(|replica| &replica.standing) {
        Some(ReplicaStanding::Ready) => Found::Yes(()),
        Some(ReplicaStanding::Creating) => Found::NotYet,
        Some(ReplicaStanding::Failed(why)) => Found::Failed(ApiError::new(
            ErrorKind::Refused,
            what,
            why.clone(),
            "mend that and ask again; nothing was changed",
        )),
        None => Found::Failed(ApiError::new(
            ErrorKind::Unavailable,
            what,
            "it was removed while it was being made",
            "",
        )),
    }
}
