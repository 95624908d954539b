//! Whether a node can run a service, and how well.

use relevo_types::{
    NodeId, ServiceId,
    cluster::{ClusterState, NodeKind, Volume},
};
use serde::{Deserialize, Serialize};

use crate::{ReplicaView, Views, placement};

/// Whether a node can run a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Fitness {
    /// It can.
    Fit {
        /// How good a choice.
        rank: Rank,
    },
    /// It gave the service up before, and nothing else speaks against it.
    Failed {
        /// The reason it gave.
        reason: String,
    },
    /// It can't.
    Unfit {
        /// Why, to follow the node's name: `is silent`.
        reason: String,
    },
    /// It is not for this at all (a witness, a node without a replica): not worth a word where
    /// others are.
    Never {
        /// Why, to follow the node's name.
        reason: String,
    },
}

impl Fitness {
    /// In words, to follow the node's name: `can run it`.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Fit { .. } => "can run it".to_owned(),
            Self::Failed { reason } => format!("gave it up ({reason})"),
            Self::Unfit { reason } | Self::Never { reason } => reason.clone(),
        }
    }
}

/// How good a choice a node is, the best one first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Rank {
    /// All its replicas are known to be certain.
    Certain,
    /// One restarted uncleanly.
    Uncertain,
    /// One is not attached yet.
    Attaching,
    /// Verification found one to differ from another replica. Which of the two is right nobody knows, so
    /// it is not kept from serving; but every node of which nothing is known is better.
    Differs,
}

/// Judges a node for a service, from the replicated state and what is observed. `planner` is who
/// observes.
#[must_use]
pub fn fitness(
    state: &ClusterState,
    views: &Views,
    planner: NodeId,
    service: ServiceId,
    node: NodeId,
) -> Fitness {
    judge(state, views, planner, service, node, true)
}

/// As [`fitness`]; with `with` false as if the service could be on any node, whatever it shall be together with.
pub(crate) fn judge(
    state: &ClusterState,
    views: &Views,
    planner: NodeId,
    service: ServiceId,
    node: NodeId,
    with: bool,
) -> Fitness {
    let never = |reason: String| Fitness::Never { reason };
    let unfit = |reason: String| Fitness::Unfit { reason };
    let (Some(member), Some(service)) = (state.nodes.get(&node), state.services.get(&service))
    else {
        return never("is no member".to_owned());
    };
    if member.spec.kind == NodeKind::Witness {
        return never("is a witness".to_owned());
    }
    if let Some(reason) = placement::keeps_from(service, node) {
        return never(reason);
    }
    let volumes: Vec<Option<&Volume>> = service
        .spec
        .volumes()
        .map(|volume| state.volumes.get(&volume))
        .collect();
    for volume in &volumes {
        match volume {
            None => return never("can't run it: a volume of it does not exist".to_owned()),
            Some(volume) if !volume.replicas.contains_key(&node) => {
                return never(format!("has no replica of volume `{}`", volume.name));
            }
            Some(_) => {}
        }
    }
    if let Some(reason) = member_is_unfit(state, views, planner, node) {
        return unfit(reason);
    }
    if let Some(reason) = placement::others_object(state, views, service, node, with) {
        return unfit(reason);
    }
    let mut rank = Rank::Certain;
    for volume in volumes.into_iter().flatten() {
        if !volume.is_created() {
            return unfit(format!(
                "waits for all replicas of volume `{}` to be created",
                volume.name
            ));
        }
        if !volume.in_sync.contains(&node) {
            return unfit(format!(
                "is not in sync on volume `{}` (making it primary would lose writes)",
                volume.name
            ));
        }
        let replica = views
            .get(&node)
            .and_then(|view| view.replicas.get(&volume.id));
        rank = rank.max(match replica {
            Some(ReplicaView::Certain) => Rank::Certain,
            Some(ReplicaView::Uncertain) => Rank::Uncertain,
            Some(ReplicaView::Attaching) | None => Rank::Attaching,
            Some(ReplicaView::Failed) => {
                return unfit(format!(
                    "can't use its replica of volume `{0}`: its disk failed or its metadata is \
                     damaged (repair it and run `relevo attach {0}` there)",
                    volume.name
                ));
            }
        });
        if volume.replicas[&node].differs.is_some() {
            rank = Rank::Differs;
        }
    }
    match service.failures.get(&node) {
        Some(record) => Fitness::Failed {
            reason: record.reason.clone(),
        },
        None => Fitness::Fit { rank },
    }
}

/// What speaks against a data node whatever the service.
fn member_is_unfit(
    state: &ClusterState,
    views: &Views,
    planner: NodeId,
    node: NodeId,
) -> Option<String> {
    let member = state.nodes.get(&node)?;
    let Some(view) = views.get(&node) else {
        return Some("was not heard yet".to_owned());
    };
    if !view.alive {
        return Some(view.silent_for.map_or_else(
            || "is not heard".to_owned(),
            |silence| format!("is silent for {:.0} s", silence.as_secs_f64()),
        ));
    }
    let condemned =
        view.generation == member.lease.generation && view.condemned_by.contains(&planner);
    if member.lease.evicted {
        Some("is evicted and not readmitted yet".to_owned())
    } else if condemned {
        Some("was counted as dead and not readmitted yet".to_owned())
    } else if view.line_alone {
        Some("is heard on a line alone, and no network to it works".to_owned())
    } else if view.leaving {
        Some("is shutting down".to_owned())
    } else if member.standby {
        Some("is on standby".to_owned())
    } else {
        None
    }
}
