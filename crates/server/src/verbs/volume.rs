//! Volumes: create, remove, primary and secondary by hand.

use relevo_types::{
    BLOCK_SIZE, VolumeId,
    cluster::{
        ClusterState, Command, NodeKind, Outcome, Protocol, Rejection, ReplicaSpec,
        ReplicaStanding, Volume,
    },
    size::format_size,
};

use super::{Found, ProposeFailure, WAIT, find_node, find_volume, new_lineage};
use crate::{
    api::{ApiError, CreateVolumeRequest, Done, ErrorKind},
    cluster::Cluster,
};

impl Cluster {
    /// Creates a volume; returns when every replica exists. When one can't be made nothing stays
    /// behind.
    pub(crate) async fn create_volume(
        &self,
        request: CreateVolumeRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("volume `{}` was not created", request.name);
        check_size(request.size, &what)?;
        let replicas = replica_specs(&self.state(), &request, &what)?;
        let lineage = new_lineage(&what)?;
        let command = Command::CreateVolume {
            name: request.name.clone(),
            size: request.size,
            lineage,
            replicas,
        };
        let Outcome::Volume(id) = self.change(&what, command).await? else {
            return Err(ApiError::new(
                ErrorKind::Internal,
                what,
                "the control log gave an answer that does not fit",
                "report this as a bug",
            ));
        };
        let late = || {
            ApiError::new(
                ErrorKind::Unavailable,
                what.clone(),
                format!(
                    "not every node answered within {} s: {}",
                    WAIT.as_secs(),
                    missing_replicas(&self.state(), id)
                ),
                "look at `relevo status` for nodes that are away, and at the log of those that are not",
            )
        };
        let created = self
            .await_state(WAIT, late, |state| creation(state, id, &what))
            .await;
        match created {
            Ok(nodes) => {
                self.await_replicas_attached(id).await;
                Ok(Done {
                    done: format!(
                        "Volume {} of {} is there, with replicas on {nodes}.",
                        request.name,
                        format_size(request.size)
                    ),
                })
            }
            Err(error) => Err(self.undo_volume(id, error).await),
        }
    }

    /// Takes a half-made volume back; what was created is removed by the nodes when they learn
    /// that the volume is gone.
    async fn undo_volume(&self, id: VolumeId, mut error: ApiError) -> ApiError {
        if let Err(undo) = self.propose(Command::RemoveVolume { volume: id }).await {
            let why = undo.explain("").reason;
            error.remedy = format!(
                "{}; the half-made volume could not be taken back ({why}): remove it with `relevo volume remove`",
                error.remedy
            );
        }
        error
    }

    /// Removes a volume. The nodes then remove their replicas.
    pub(crate) async fn remove_volume(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("volume `{name}` was not removed");
        let state = self.state();
        let volume = find_volume(&state, name, &what)?;
        if let Some(primary) = volume.serving()
            && !state.services.values().any(|s| s.spec.uses(volume.id))
        {
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                format!("it is in use: {} is primary", state.node_name(primary)),
                format!("run `relevo secondary {name}` there first"),
            ));
        }
        self.change(&what, Command::RemoveVolume { volume: volume.id })
            .await?;
        let nodes: Vec<String> = volume
            .replicas
            .keys()
            .map(|n| state.node_name(*n))
            .collect();
        Ok(Done {
            done: format!(
                "Volume {name} is gone; its data is being removed on {}.",
                nodes.join(", ")
            ),
        })
    }

    /// Makes this node primary by hand.
    pub(crate) async fn make_primary(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("this node was not made primary of volume `{name}`");
        let volume = self.manual(name, &what)?;
        let me = self.me();
        if volume.serving() != Some(me) {
            if let Some(primary) = volume.serving() {
                let primary = self.state().node_name(primary);
                return Err(ApiError::new(
                    ErrorKind::Refused,
                    what,
                    format!("node {primary} is primary; only one can be"),
                    format!("run `relevo secondary {name}` on {primary} first"),
                ));
            }
            let command = Command::Volume {
                volume: volume.id,
                expect: volume.epoch,
                change: self.promotion(volume.id),
            };
            self.propose(command).await.map_err(|failure| {
                let is_stale = matches!(
                    failure,
                    ProposeFailure::Rejected(Rejection::NotInSync { .. })
                );
                let mut error = failure.explain(&what);
                if is_stale {
                    error.remedy = format!(
                        "wait for its resync; if every replica in sync is lost for good: `relevo primary {name} --force`"
                    );
                }
                error
            })?;
        }
        self.await_open(volume.id, &what).await?;
        let path = self.export_by_hand(volume.id).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Internal,
                format!("this node is primary of volume `{name}`, without a device"),
                why,
                "the NBD socket in `relevo status` works all the same",
            )
        })?;
        Ok(Done {
            done: format!("This node is primary of volume {name}: {}", path.display()),
        })
    }

    /// Makes this node secondary by hand.
    pub(crate) async fn make_secondary(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("this node was not made secondary of volume `{name}`");
        let volume = self.manual(name, &what)?;
        let me = self.me();
        let done = Done {
            done: format!("This node is secondary of volume {name}."),
        };
        if volume.serving() != Some(me) {
            return Ok(done);
        }
        self.end_export_by_hand(volume.id).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Refused,
                what.clone(),
                why,
                "end what uses the device, then ask again",
            )
        })?;
        self.demote(volume.id)
            .map_err(|why| ApiError::new(ErrorKind::Unavailable, what.clone(), why, "ask again"))?;
        let late = || {
            ApiError::new(
                ErrorKind::Unavailable,
                what,
                format!("it did not step down within {} s", WAIT.as_secs()),
                "`relevo status` shows what its requests wait for",
            )
        };
        self.await_state(WAIT, late, |state| match state.volumes.get(&volume.id) {
            Some(volume) if volume.serving() == Some(me) => Found::NotYet,
            _ => Found::Yes(()),
        })
        .await?;
        Ok(done)
    }

    /// A volume whose role may be changed by hand: one that no service uses.
    fn manual(&self, name: &str, what: &str) -> Result<Volume, ApiError> {
        let state = self.state();
        let volume = find_volume(&state, name, what)?;
        if let Some(service) = state
            .services
            .values()
            .find(|service| service.spec.uses(volume.id))
        {
            let service = &service.spec.name;
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                format!("service `{service}` uses the volume and decides where it is primary"),
                format!(
                    "use `relevo service move {service} NODE` or `relevo service stop {service}`"
                ),
            ));
        }
        Ok(volume.clone())
    }
}

/// The size is checked here already: the message can name what was asked for.
fn check_size(size: u64, what: &str) -> Result<(), ApiError> {
    if size > 0 && size.is_multiple_of(BLOCK_SIZE) {
        return Ok(());
    }
    let (why, remedy) = if size == 0 {
        (
            "its size is 0".to_owned(),
            "give it a size, `--size 20GiB` say".to_owned(),
        )
    } else {
        let up = size.div_ceil(BLOCK_SIZE).saturating_mul(BLOCK_SIZE);
        (
            format!("its size of {size} bytes is no multiple of {BLOCK_SIZE}"),
            format!("use --size {up}"),
        )
    };
    Err(ApiError::new(ErrorKind::BadRequest, what, why, remedy))
}

fn replica_specs(
    state: &ClusterState,
    request: &CreateVolumeRequest,
    what: &str,
) -> Result<Vec<ReplicaSpec>, ApiError> {
    let spec = |node, backing, protocol| ReplicaSpec {
        node,
        protocol,
        backing,
        force: request.force,
    };
    if request.replicas.is_empty() {
        return Ok(state
            .nodes
            .values()
            .filter(|node| node.spec.kind == NodeKind::Data)
            .map(|node| spec(node.id, None, Protocol::C))
            .collect());
    }
    request
        .replicas
        .iter()
        .map(|replica| {
            let node = find_node(state, &replica.node, what)?;
            Ok(spec(node, replica.backing.clone(), replica.protocol))
        })
        .collect()
}

/// Whether a volume's creation came to its end.
fn creation(state: &ClusterState, id: VolumeId, what: &str) -> Found<String> {
    let Some(volume) = state.volumes.get(&id) else {
        return Found::Failed(ApiError::new(
            ErrorKind::Refused,
            what,
            "it was removed while it was being created",
            "",
        ));
    };
    if volume.is_created() {
        let nodes: Vec<String> = volume
            .replicas
            .keys()
            .map(|n| state.node_name(*n))
            .collect();
        return Found::Yes(nodes.join(", "));
    }
    let answered = volume
        .replicas
        .values()
        .all(|replica| replica.standing != ReplicaStanding::Creating);
    let failures: Vec<String> = volume
        .replicas
        .iter()
        .filter_map(|(node, replica)| match &replica.standing {
            ReplicaStanding::Failed(why) => Some(format!("node {}: {why}", state.node_name(*node))),
            ReplicaStanding::Creating | ReplicaStanding::Ready => None,
        })
        .collect();
    // Wait for every answer, so that the message names every failure.
    if answered && !failures.is_empty() {
        return Found::Failed(ApiError::new(
            ErrorKind::Refused,
            what,
            failures.join("; "),
            "mend that and ask again; what was made was taken back",
        ));
    }
    Found::NotYet
}

fn missing_replicas(state: &ClusterState, id: VolumeId) -> String {
    let Some(volume) = state.volumes.get(&id) else {
        return "it is gone".to_owned();
    };
    let missing: Vec<String> = volume
        .replicas
        .iter()
        .filter(|(_, replica)| replica.standing == ReplicaStanding::Creating)
        .map(|(node, _)| state.node_name(*node))
        .collect();
    format!("no answer from {}", missing.join(", "))
}
