//! What an administrator chooses for a volume, and orders to this node's replica of it.

use relevo_replication::Order;
use relevo_types::{
    VolumeId,
    cluster::{ClusterState, Command, Rejection, Volume, VolumeChange},
};

use super::{find_node, find_volume};
use crate::{
    api::{ApiError, Done, ErrorKind, OrderRequest},
    cluster::Cluster,
    verbs::ProposeFailure,
};

/// How often options are set anew because the volume was changed meanwhile.
const TRIES: usize = 10;

impl Cluster {
    /// Sets options of a volume; all of them or none.
    pub(crate) async fn set_volume_options(
        &self,
        name: &str,
        changes: &[(String, String)],
    ) -> Result<Done, ApiError> {
        let what = format!("the options of volume `{name}` were not changed");
        if changes.is_empty() {
            return Err(ApiError::new(
                ErrorKind::BadRequest,
                what,
                "no option was named",
                format!(
                    "there are {}",
                    relevo_types::cluster::options::keys().join(", ")
                ),
            ));
        }
        let mut outcome = self.try_set_options(name, changes, &what).await?;
        for _ in 0..TRIES {
            match outcome {
                Err(ProposeFailure::Rejected(Rejection::StaleVersion { .. })) => {
                    outcome = self.try_set_options(name, changes, &what).await?;
                }
                _ => break,
            }
        }
        outcome.map_err(|error| error.explain(&what))?;
        let words: Vec<String> = changes
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        Ok(Done {
            done: format!("Volume {name} has {}.", words.join(", ")),
        })
    }

    async fn try_set_options(
        &self,
        name: &str,
        changes: &[(String, String)],
        what: &str,
    ) -> Result<Result<(), ProposeFailure>, ApiError> {
        let state = self.state();
        let volume = find_volume(&state, name, what)?;
        let mut options = volume.options.clone();
        for (key, value) in changes {
            options.set(&state, key, value).map_err(|error| {
                ApiError::new(
                    ErrorKind::BadRequest,
                    what,
                    error.to_string(),
                    format!("`relevo volume options {name}` shows what is in force"),
                )
            })?;
        }
        let command = Command::SetVolumeOptions {
            volume: volume.id,
            expect: volume.version,
            options,
        };
        Ok(self.propose(command).await.map(|_| ()))
    }

    /// Gives an order to this node's replica.
    pub(crate) async fn order_volume(
        &self,
        name: &str,
        request: OrderRequest,
    ) -> Result<Done, ApiError> {
        let state = self.state();
        let here = state.node_name(self.me());
        let what = format!("volume `{name}` on {here} did not obey");
        let volume = find_volume(&state, name, &what)?;
        match request {
            OrderRequest::Attach => return self.attach(name, volume.id, &what).await,
            OrderRequest::Detach => return self.detach(name, volume.id, &what).await,
            OrderRequest::Outdate => return self.outdate(name, volume, &what).await,
            _ => {}
        }
        let (order, done) = translate(&state, name, &request, &what)?;
        self.order_replica(volume.id, order).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Refused,
                what,
                why,
                "`relevo status` shows what its replicas are doing",
            )
        })?;
        Ok(Done { done })
    }
}

impl Cluster {
    async fn attach(&self, name: &str, volume: VolumeId, what: &str) -> Result<Done, ApiError> {
        self.attach_replica(volume).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Refused,
                what,
                why,
                format!(
                    "repair the disk and ask again; if what it held is lost: `relevo volume replica remove {name}` for this node, then `add`, and it is filled from the others"
                ),
            )
        })?;
        Ok(Done {
            done: format!(
                "Volume {name} is attached here; what it missed is copied. `relevo status` shows how far it is."
            ),
        })
    }

    async fn detach(&self, name: &str, volume: VolumeId, what: &str) -> Result<Done, ApiError> {
        self.detach_replica(volume).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Refused,
                what,
                why,
                "move its service or run `relevo secondary` first",
            )
        })?;
        Ok(Done {
            done: format!(
                "Volume {name} is detached here, its disk is free. `relevo attach {name}` takes it back."
            ),
        })
    }

    /// By commit: nobody promotes it until it was in sync again.
    async fn outdate(&self, name: &str, volume: &Volume, what: &str) -> Result<Done, ApiError> {
        let me = self.me();
        let refused =
            |why: &str, remedy: &str| Err(ApiError::new(ErrorKind::Refused, what, why, remedy));
        if volume.serving() == Some(me) {
            return refused("this node is primary", "run `relevo secondary` first");
        }
        if self.is_connected_to_primary(volume) {
            return refused(
                "it is connected to the primary, which would bring it in sync at once",
                &format!("run `relevo disconnect {name}` first"),
            );
        }
        let command = Command::Volume {
            volume: volume.id,
            expect: volume.epoch,
            change: VolumeChange::Leave { nodes: vec![me] },
        };
        self.change(what, command).await?;
        Ok(Done {
            done: format!("Volume {name} is outdated here until it was in sync again."),
        })
    }
}

/// The order for the engine, and what is said when it was obeyed.
fn translate(
    state: &ClusterState,
    name: &str,
    request: &OrderRequest,
    what: &str,
) -> Result<(Order, String), ApiError> {
    let peer = |node: &Option<String>| {
        let peer = node.as_deref().map(|node| find_node(state, node, what));
        peer.transpose()
    };
    let all = || "the other replicas".to_owned();
    Ok(match request {
        OrderRequest::Attach | OrderRequest::Detach | OrderRequest::Outdate => {
            return Err(ApiError::new(
                ErrorKind::Internal,
                what,
                "this order is not for the engine",
                "report this as a bug",
            ));
        }
        OrderRequest::Invalidate => (
            Order::Invalidate,
            format!("Volume {name} is copied anew to this node."),
        ),
        OrderRequest::SuspendIo => (
            Order::SuspendIo,
            format!("Requests to volume {name} wait here until `relevo resume-io {name}`."),
        ),
        OrderRequest::ResumeIo => (Order::ResumeIo, format!("Requests to volume {name} go on.")),
        OrderRequest::Disconnect { node } => (
            Order::Disconnect { peer: peer(node)? },
            format!(
                "Volume {name} has no link to {} any more, until `relevo connect {name}`.",
                node.clone().unwrap_or_else(all)
            ),
        ),
        OrderRequest::PauseSync { node } => (
            Order::PauseSync { peer: peer(node)? },
            format!(
                "The resync of volume {name} to and from {} stands still until `relevo resume-sync {name}`; writes are replicated all the same.",
                node.clone().unwrap_or_else(all)
            ),
        ),
        OrderRequest::ResumeSync { node } => (
            Order::ResumeSync { peer: peer(node)? },
            format!(
                "The resync of volume {name} to and from {} may go on; if the other side paused it too, it must be resumed there.",
                node.clone().unwrap_or_else(all)
            ),
        ),
        OrderRequest::Verify { node, repair } => (
            Order::Verify {
                peer: peer(node)?,
                repair: *repair,
            },
            format!(
                "Volume {name} is being compared with {}; `relevo status` shows how far it is, `relevo events` what it finds.",
                node.clone().unwrap_or_else(all)
            ),
        ),
        OrderRequest::StopVerify { node } => (
            Order::StopVerify { peer: peer(node)? },
            format!(
                "Volume {name} is no longer being compared with {}.",
                node.clone().unwrap_or_else(all)
            ),
        ),
        OrderRequest::Connect { node } => (
            Order::Connect { peer: peer(node)? },
            format!(
                "Volume {name} connects to {}.",
                node.clone().unwrap_or_else(all)
            ),
        ),
    })
}
