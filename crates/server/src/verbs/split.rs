//! Forced promotion, and what a person decides when two histories met (DESIGN, rule 9).

use relevo_types::{
    NodeId,
    cluster::{ClusterState, Command, Volume, VolumeChange},
};

use super::{Found, WAIT, find_node, find_volume, new_lineage};
use crate::{
    api::{
        ApiError, ClusterStatus, ConfirmRequest, Done, ErrorKind, LossStatus, ReplicaStatus,
        SplitStatus,
    },
    cluster::Cluster,
    status::side_words,
};

impl Cluster {
    /// What is known of what is lost when this node's replica is forced; refuses what can't be done.
    pub(crate) async fn force_loss(&self, name: &str) -> Result<LossStatus, ApiError> {
        let what = format!("this node's replica of volume `{name}` was not forced");
        let state = self.state();
        let volume = find_volume(&state, name, &what)?;
        check_force(&state, volume, self.me(), &what)?;
        let status = self.status().await;
        let here = state.node_name(self.me());
        let replica = replica_of(&status, name, &here, &what)?;
        check_disk(replica, name, &what)?;
        let mut loss = LossStatus::new(name, &here);
        for member in &volume.in_sync {
            let member = state.node_name(*member);
            let node = status.nodes.iter().find(|node| node.name == member);
            let alive = node.is_some_and(|node| node.state == "alive");
            let condition = node.map_or("unknown", |node| node.state.as_str());
            loss.known.push(format!(
                "the replica on {member} is in sync and has everything; that node is {condition}"
            ));
            if alive {
                loss.warnings.push(format!(
                    "{member} is alive and complete: `relevo primary {name}` there, or its service, loses nothing"
                ));
            }
        }
        let joined = volume.replicas.get(&self.me()).map_or(0, |it| it.joined.0);
        loss.known.push(format!(
            "the replica here was last taken into the in-sync set at epoch {joined} and has left it since; the volume is at epoch {}: whatever was written after it left is missing here, how much only the others know",
            volume.epoch.0
        ));
        loss.add_disk(replica);
        loss.add_splits(&status);
        Ok(loss)
    }

    /// Takes this node's replica, which is outside the in-sync set, for the volume, and makes it primary
    /// where no service does that.
    pub(crate) async fn force_primary(
        &self,
        name: &str,
        request: &ConfirmRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("this node's replica of volume `{name}` was not forced");
        self.force_loss(name).await?;
        check_confirmation(name, request, &what)?;
        let state = self.state();
        let volume = find_volume(&state, name, &what)?;
        let service = service_of(&state, volume);
        self.force(volume, self.me(), false, &what).await?;
        let Some(service) = service else {
            let Done { done } = self.make_primary(name).await?;
            return Ok(Done {
                done: format!(
                    "Volume {name} begins a new history with the replica of this node. {done}"
                ),
            });
        };
        Ok(Done {
            done: format!(
                "Volume {name} begins a new history with the replica of this node. Service {service} takes it over here by itself; `relevo service start {service}` if it was stopped."
            ),
        })
    }

    /// What is known of what gives way when the replica of a node is kept; refuses what can't be done.
    pub(crate) async fn resolve_loss(
        &self,
        name: &str,
        keep: &str,
    ) -> Result<LossStatus, ApiError> {
        let what = format!("nothing was decided about volume `{name}`");
        let state = self.state();
        let volume = find_volume(&state, name, &what)?;
        let kept = find_node(&state, keep, &what)?;
        check_resolve(&state, volume, kept, &what)?;
        let status = self.status().await;
        let replica = replica_of(&status, name, keep, &what)?;
        let mut loss = LossStatus::new(name, keep);
        if !volume.in_sync.contains(&kept) {
            check_disk(replica, name, &what)?;
            loss.add_disk(replica);
        }
        loss.add_splits(&status);
        if loss.known.is_empty() {
            loss.known.push(
                "no two replicas told of different histories yet; the decision holds for when they meet"
                    .to_owned(),
            );
        }
        let others: Vec<String> = giving_way(volume, kept)
            .map(|node| state.node_name(node))
            .collect();
        loss.known.push(format!(
            "the replica on {keep} is kept; on {} what only that replica has is saved in a file, then overwritten",
            others.join(", ")
        ));
        Ok(loss)
    }

    /// Keeps the replica of a node: the others give way, whatever they have.
    pub(crate) async fn resolve(
        &self,
        name: &str,
        keep: &str,
        request: &ConfirmRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("nothing was decided about volume `{name}`");
        self.resolve_loss(name, keep).await?;
        check_confirmation(name, request, &what)?;
        let state = self.state();
        let volume = find_volume(&state, name, &what)?;
        let kept = find_node(&state, keep, &what)?;
        let in_force = volume.in_sync.contains(&kept);
        if in_force {
            let command = Command::Volume {
                volume: volume.id,
                expect: volume.epoch,
                change: VolumeChange::KeepInForce,
            };
            self.change(&what, command).await?;
        } else {
            self.force(volume, kept, true, &what).await?;
        }
        let others: Vec<String> = giving_way(volume, kept)
            .map(|node| state.node_name(node))
            .collect();
        let next = match (
            volume.primary.filter(|_| in_force),
            service_of(&state, volume),
        ) {
            (Some(_), _) => String::new(),
            (None, Some(service)) => format!(
                " That begins when the volume has a primary: service {service} makes {keep} primary; `relevo service start {service}` if it was stopped."
            ),
            (None, None) => format!(
                " That begins when the volume has a primary: `relevo primary {name}` on {keep}."
            ),
        };
        Ok(Done {
            done: format!(
                "Volume {name} keeps the replica on {keep}. What only {} has is saved there (`relevo volume saved {name}`), then it is copied anew from {keep}.{next}",
                others.join(", ")
            ),
        })
    }

    async fn force(
        &self,
        volume: &Volume,
        node: NodeId,
        others_give_way: bool,
        what: &str,
    ) -> Result<(), ApiError> {
        let lineage = new_lineage(what)?;
        let command = Command::Volume {
            volume: volume.id,
            expect: volume.epoch,
            change: VolumeChange::Force {
                node,
                lineage,
                others_give_way,
            },
        };
        self.change(what, command).await?;
        // What follows is about the configuration that this made; here it may be known a moment later.
        let late = || {
            ApiError::new(
                ErrorKind::Unavailable,
                format!(
                    "volume `{}` has a new history, and the rest was not done",
                    volume.name
                ),
                format!("this node did not hear of it within {} s", WAIT.as_secs()),
                "look at `relevo status`, then use `relevo primary`",
            )
        };
        self.await_state(WAIT, late, |state| match state.volumes.get(&volume.id) {
            Some(volume) if volume.lineages.contains(&lineage) => Found::Yes(()),
            _ => Found::NotYet,
        })
        .await
    }
}

impl LossStatus {
    /// Nothing is known yet of what is lost when the replica of a node is kept.
    fn new(volume: &str, node: &str) -> Self {
        Self {
            volume: volume.to_owned(),
            node: node.to_owned(),
            known: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn add_disk(&mut self, replica: &ReplicaStatus) {
        let disk = replica.disk.as_deref().unwrap_or("unknown");
        let node = &replica.node;
        self.known.push(format!("the disk of {node} is {disk}"));
        if disk == "Inconsistent" {
            self.warnings.push(format!(
                "the replica on {node} is a MIX of old and new blocks, because a resync to it did not end: file systems and databases on it are most likely broken. Take it only when no other replica can ever be had"
            ));
        }
    }

    fn add_splits(&mut self, status: &ClusterStatus) {
        let volume = status.volumes.iter().find(|it| it.name == self.volume);
        for split in volume.into_iter().flat_map(|volume| &volume.splits) {
            self.known.push(split_sides(split));
        }
    }
}

/// What each of two replicas has that the other has not.
fn split_sides(split: &SplitStatus) -> String {
    format!(
        "only {} has {}, only {} has {}",
        split.node,
        side_words(split.blocks),
        split.peer,
        side_words(split.peer_blocks)
    )
}

fn giving_way(volume: &Volume, kept: NodeId) -> impl Iterator<Item = NodeId> {
    let in_force = volume.in_sync.contains(&kept);
    volume
        .replicas
        .keys()
        .copied()
        .filter(move |node| *node != kept && !(in_force && volume.in_sync.contains(node)))
}

fn service_of(state: &ClusterState, volume: &Volume) -> Option<String> {
    let mut services = state.services.values();
    let service = services.find(|service| service.spec.uses(volume.id))?;
    Some(service.spec.name.clone())
}

fn check_force(
    state: &ClusterState,
    volume: &Volume,
    node: NodeId,
    what: &str,
) -> Result<(), ApiError> {
    let name = &volume.name;
    let refused =
        |why: String, remedy: String| Err(ApiError::new(ErrorKind::Refused, what, why, remedy));
    if !volume.replicas.contains_key(&node) {
        return refused(
            format!("node {} has no replica of it", state.node_name(node)),
            "`relevo status` shows where its replicas are".to_owned(),
        );
    }
    if let Some(primary) = volume.serving() {
        let primary = state.node_name(primary);
        let stop = match service_of(state, volume) {
            Some(service) => format!("`relevo service stop {service}`"),
            None => format!("`relevo secondary {name}` on {primary}"),
        };
        return refused(
            format!("node {primary} is primary of it, and applications write there"),
            format!(
                "run {stop} first; a primary that is lost is replaced or deposed by the cluster within the dead time"
            ),
        );
    }
    if volume.in_sync.contains(&node) {
        return refused(
            format!(
                "the replica on {} is in sync: nothing is missing there and nothing needs to be forced",
                state.node_name(node)
            ),
            format!("`relevo primary {name}` without --force is right, or starting its service"),
        );
    }
    Ok(())
}

fn check_resolve(
    state: &ClusterState,
    volume: &Volume,
    kept: NodeId,
    what: &str,
) -> Result<(), ApiError> {
    if volume.in_sync.contains(&kept) {
        if giving_way(volume, kept).next().is_some() {
            return Ok(());
        }
        return Err(ApiError::new(
            ErrorKind::Refused,
            what,
            "every replica is in sync: there are no two histories of it",
            "`relevo status` names a split brain where there is one",
        ));
    }
    check_force(state, volume, kept, what)
}

fn replica_of<'a>(
    status: &'a ClusterStatus,
    volume: &str,
    node: &str,
    what: &str,
) -> Result<&'a ReplicaStatus, ApiError> {
    let volume = status.volumes.iter().find(|it| it.name == volume);
    let mut replicas = volume.into_iter().flat_map(|volume| &volume.replicas);
    replicas
        .find(|replica| replica.node == node)
        .ok_or_else(|| {
            ApiError::new(
                ErrorKind::Refused,
                what,
                format!("node {node} has no replica of it"),
                "`relevo status` shows where its replicas are",
            )
        })
}

/// A replica that is taken for the volume must be there.
fn check_disk(replica: &ReplicaStatus, volume: &str, what: &str) -> Result<(), ApiError> {
    let (node, disk) = (&replica.node, replica.disk.as_deref());
    let (why, remedy) = match disk {
        None => (
            format!("node {node} does not answer: in which state its replica is can't be seen"),
            format!("bring {node} back first"),
        ),
        Some("Failed" | "Diskless" | "Attaching") => (
            format!(
                "the disk of its replica on {node} is {}",
                disk.unwrap_or_default()
            ),
            format!("`relevo attach {volume}` on {node}, after the disk was repaired"),
        ),
        Some(_) => return Ok(()),
    };
    Err(ApiError::new(ErrorKind::Refused, what, why, remedy))
}

fn check_confirmation(name: &str, request: &ConfirmRequest, what: &str) -> Result<(), ApiError> {
    if request.confirm == name {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::BadRequest,
        what,
        format!(
            "data may be lost by it, and the confirmation is `{}`, not the volume's name",
            request.confirm
        ),
        format!("look at what may be lost, then confirm with the name: --confirm {name}"),
    ))
}

#[cfg(test)]
mod tests {
    use relevo_types::VolumeId;

    use super::*;
    use crate::status::tests::state;

    const ALFA: NodeId = NodeId(1);
    const BETA: NodeId = NodeId(2);
    const WIT: NodeId = NodeId(3);

    /// `mail`, used by a service, in sync on alfa alone, nobody primary.
    fn alone() -> (ClusterState, Volume) {
        let mut state = state();
        let volume = state.volumes.get_mut(&VolumeId(1)).unwrap();
        volume.in_sync.remove(&BETA);
        volume.primary = None;
        let volume = volume.clone();
        (state, volume)
    }

    #[test]
    fn nothing_is_forced_where_something_better_is_right() {
        let (state, mut volume) = alone();
        check_force(&state, &volume, BETA, "no").unwrap();
        let error = check_force(&state, &volume, ALFA, "no").unwrap_err();
        assert!(error.remedy.contains("without --force"), "{error:?}");
        let error = check_force(&state, &volume, WIT, "no").unwrap_err();
        assert!(error.reason.contains("wit has no replica"), "{error:?}");
        volume.primary = Some(ALFA);
        let error = check_force(&state, &volume, BETA, "no").unwrap_err();
        assert!(error.reason.contains("alfa is primary"), "{error:?}");
        assert!(error.remedy.contains("service stop mail"), "{error:?}");
    }

    #[test]
    fn a_decision_for_the_other_side_needs_a_volume_without_primary() {
        let (state, mut volume) = alone();
        volume.primary = Some(ALFA);
        check_resolve(&state, &volume, ALFA, "no").unwrap();
        let error = check_resolve(&state, &volume, BETA, "no").unwrap_err();
        assert!(error.remedy.contains("service stop mail"), "{error:?}");
        volume.primary = None;
        check_resolve(&state, &volume, BETA, "no").unwrap();
        volume.in_sync.insert(BETA);
        let error = check_resolve(&state, &volume, ALFA, "no").unwrap_err();
        assert!(
            error.reason.contains("every replica is in sync"),
            "{error:?}"
        );
    }

    #[test]
    fn who_gives_way_is_who_is_not_kept() {
        let (_, mut volume) = alone();
        assert_eq!(giving_way(&volume, ALFA).collect::<Vec<_>>(), [BETA]);
        assert_eq!(giving_way(&volume, BETA).collect::<Vec<_>>(), [ALFA]);
        volume.in_sync.insert(BETA);
        assert_eq!(giving_way(&volume, ALFA).count(), 0);
    }

    #[test]
    fn the_api_too_wants_the_name() {
        for confirm in ["", "yes", "Mail"] {
            let confirm = confirm.to_owned();
            let error = check_confirmation("mail", &ConfirmRequest { confirm }, "no").unwrap_err();
            assert!(error.remedy.contains("--confirm mail"), "{error:?}");
        }
        let confirm = "mail".to_owned();
        check_confirmation("mail", &ConfirmRequest { confirm }, "no").unwrap();
    }

    #[test]
    fn only_a_replica_that_is_there_can_be_kept() {
        let replica = |disk: Option<&str>| {
            let text = format!(
                r#"{{"node": "beta", "role": "Secondary", "disk": {}, "replication": null,
                    "dirty_bytes": null, "behind_bytes": null, "behind_ms": null,
                    "protocol": null, "sync_percent": null, "driver": null, "backing": null,
                    "remark": null}}"#,
                disk.map_or_else(|| "null".to_owned(), |disk| format!("\"{disk}\""))
            );
            serde_json::from_str::<ReplicaStatus>(&text).unwrap()
        };
        for disk in [None, Some("Failed"), Some("Diskless"), Some("Attaching")] {
            assert!(
                check_disk(&replica(disk), "mail", "no").is_err(),
                "{disk:?}"
            );
        }
        let mut loss = LossStatus::new("mail", "beta");
        check_disk(&replica(Some("Outdated")), "mail", "no").unwrap();
        loss.add_disk(&replica(Some("Outdated")));
        assert!(loss.warnings.is_empty());
        check_disk(&replica(Some("Inconsistent")), "mail", "no").unwrap();
        loss.add_disk(&replica(Some("Inconsistent")));
        assert!(loss.warnings[0].contains("MIX"), "{loss:?}");
    }
}
