//! Nodes: tokens, standby, and this node's part of leaving.

use std::time::Duration;

use relevo_types::{
    NodeId,
    cluster::{Command, JoinToken},
};

use super::find_node;
use crate::{
    api::{ApiError, Done, ErrorKind, TokenAnswer, TokenRequest},
    cluster::Cluster,
    join,
};

/// A token that is good for longer is a key under the doormat.
const TOKEN_VALID_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

impl Cluster {
    /// Makes a join token.
    pub(crate) async fn create_token(
        &self,
        request: &TokenRequest,
    ) -> Result<TokenAnswer, ApiError> {
        let what = "no token was made";
        if request.valid_s > TOKEN_VALID_MAX.as_secs() {
            return Err(ApiError::new(
                ErrorKind::BadRequest,
                what,
                format!("it would be good for {} s", request.valid_s),
                "30 days are the most",
            ));
        }
        let expires_unix_s = join::unix_s().saturating_add(request.valid_s);
        let (token, hash) = self.new_token(request.kind, expires_unix_s)?;
        let command = Command::CreateToken {
            hash,
            token: JoinToken {
                kind: request.kind,
                expires_unix_s,
            },
        };
        self.change(what, command).await?;
        Ok(TokenAnswer {
            token,
            expires_unix_s,
        })
    }

    /// Sets or clears standby.
    pub(crate) async fn set_standby(&self, name: &str, standby: bool) -> Result<Done, ApiError> {
        let what = format!("standby of node `{name}` was not changed");
        let node = find_node(&self.state(), name, &what)?;
        self.change(&what, Command::SetStandby { node, standby })
            .await?;
        Ok(Done {
            done: if standby {
                format!(
                    "Node {name} is in standby: its services move to other nodes that can take them."
                )
            } else {
                format!("Node {name} takes services again.")
            },
        })
    }

    /// Refuses to leave while this node holds something: a person has to decide where it goes.
    pub(crate) fn check_leave(&self, me: NodeId, what: &str) -> Result<(), ApiError> {
        let state = self.state();
        let refuse =
            |why: String, remedy: String| Err(ApiError::new(ErrorKind::Refused, what, why, remedy));
        for service in state.services.values() {
            if service.holder == Some(me) {
                let name = &service.spec.name;
                return refuse(
                    format!("service `{name}` runs here"),
                    format!(
                        "`relevo standby` moves every service away, `relevo service move {name} NODE` this one"
                    ),
                );
            }
        }
        for volume in state.volumes.values() {
            if volume.replicas.contains_key(&me) {
                let name = &volume.name;
                return refuse(
                    format!("a replica of volume `{name}` is here"),
                    format!("`relevo volume remove {name}` removes the volume with its data"),
                );
            }
        }
        if state.nodes.len() == 1 {
            return refuse(
                "it is the last node: the cluster ends with it".to_owned(),
                "stop the daemon and remove its state directory".to_owned(),
            );
        }
        Ok(())
    }
}
