//! The planner: a pure function from what is known to an ordered plan with reasons.
//!
//! It runs on the leader of the control log after every change. It proposes only commands that
//! the control log checks again, so a plan made from old knowledge is harmless. The same input
//! gives the same plan; a plan that was carried out gives an empty one.
//!
//! `node` calls [`plan`] on the leader, and [`should_release`] on a service's holder: to move a
//! service, its holder gives it back and the planner then gives it to another node. Both judge
//! nodes by the same [`fitness`].

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use relevo_types::{
    LeaseGeneration, NodeId, ServiceId, VolumeId,
    cluster::{ClusterState, Command},
};
use serde::{Deserialize, Serialize};

mod fitness;
mod forecast;
mod nodes;
mod patience;
mod placement;
mod services;

pub use fitness::{Fitness, Rank, fitness};
pub use forecast::{Forecast, Supposed, forecast};
pub use services::should_release;

/// Everything the planner looks at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlanInput {
    /// The node that plans: the leader of the control log.
    pub planner: NodeId,
    /// The replicated state.
    pub state: ClusterState,
    /// What the planner's node observes of each member, itself included.
    pub nodes: Views,
    /// The cluster's clock as the planner reads it.
    pub now_s: u64,
    /// What [`Plan::better`] told before, and since when it does without a break.
    pub better_since: BTreeMap<ServiceId, (NodeId, u64)>,
}

/// What a node observes of each member.
pub type Views = BTreeMap<NodeId, NodeView>;

/// What is observed of a member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeView {
    /// Whether its heartbeats arrive (suspect counts as alive: nothing moves on a suspicion).
    pub alive: bool,
    /// How long it was silent when this was written down; `None` while it is heard, or when it
    /// was never heard.
    pub silent_for: Option<Duration>,
    /// The generation that `condemned_by` is about.
    pub generation: LeaseGeneration,
    /// The voters that durably promised to grant it nothing more.
    pub condemned_by: Vec<NodeId>,
    /// The voters, itself aside, that hear it now.
    pub heard_by: Vec<NodeId>,
    /// Heartbeats arrive on byte streams and on no network: it is alive, and can be told nothing. It gets nothing new.
    pub line_alone: bool,
    /// It said that it is about to stop: it gets nothing new.
    pub leaving: bool,
    /// Its replicas as it reported them; missing: unknown.
    pub replicas: BTreeMap<VolumeId, ReplicaView>,
    /// The services of which it reported that every part is active.
    pub running: BTreeSet<ServiceId>,
    /// Its memory in MiB as it reported it; `None`: unknown, nothing is refused for it.
    pub memory_mib: Option<u64>,
}

/// What a node reports of its own replica of a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaView {
    /// Attached, its content certain.
    Certain,
    /// Attached after an unclean stop: usable, but another in-sync replica is the better choice.
    Uncertain,
    /// Not attached yet.
    Attaching,
    /// Its disk failed or its metadata is damaged: unusable.
    Failed,
}

/// What to do now, in order, and what is waited for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Commands to propose, in order.
    pub actions: Vec<Action>,
    /// What can't be done yet, and why.
    pub waits: Vec<Wait>,
    /// Services that would return to a node that they prefer, once it could have had them for long enough.
    pub better: BTreeMap<ServiceId, NodeId>,
}

impl Plan {
    /// [`PlanInput::better_since`] of the next input, when this plan was made of `input`.
    #[must_use]
    pub fn better_since(&self, input: &PlanInput) -> BTreeMap<ServiceId, (NodeId, u64)> {
        let since = |(service, node): (&ServiceId, &NodeId)| {
            let before = input.better_since.get(service);
            let since_s = before.filter(|(known, _)| known == node);
            (*service, (*node, since_s.map_or(input.now_s, |it| it.1)))
        };
        self.better.iter().map(since).collect()
    }
}

/// One step of a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Action {
    /// The command.
    pub command: Command,
    /// Why, in a sentence for people.
    pub reason: String,
}

/// Something that should be done and can't be yet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Wait {
    /// The service that waits; `None`: the cluster.
    pub service: Option<ServiceId>,
    /// What is waited for and what a person can do, in a sentence.
    pub reason: String,
}

/// What to do now. Every action is checked against the state as the actions before it leave it,
/// so the whole plan can be proposed at once.
#[must_use]
pub fn plan(input: &PlanInput) -> Plan {
    let mut draft = Draft {
        state: input.state.clone(),
        plan: Plan::default(),
    };
    patience::plan_clock(&mut draft, input.now_s);
    for (id, view) in &input.nodes {
        nodes::plan_node(&mut draft, *id, view);
    }
    // Whom others follow comes before them.
    let mut services: Vec<ServiceId> = input.state.services.keys().copied().collect();
    services.sort_by_cached_key(|id| (placement::steps_behind(&input.state, *id), *id));
    for service in services {
        services::plan_service(&mut draft, service, input);
    }
    draft.plan
}

/// A plan in the making, and the state that it leads to.
struct Draft {
    state: ClusterState,
    plan: Plan,
}

impl Draft {
    /// Adds an action if the control log would accept it.
    fn act(&mut self, command: Command, reason: String) {
        let mut next = self.state.clone();
        match next.apply(&command) {
            Ok(_) => {
                self.state = next;
                self.plan.actions.push(Action { command, reason });
            }
            Err(rejection) => self.plan.waits.push(Wait {
                service: None,
                reason: format!("{reason}, but {rejection}"),
            }),
        }
    }

    fn wait(&mut self, service: Option<ServiceId>, reason: String) {
        self.plan.waits.push(Wait { service, reason });
    }
}

/// `a`, `a and b`, `a, b and c`.
fn listed(words: &[String]) -> String {
    match words {
        [] => "nobody".to_owned(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Names of nodes, listed.
fn names(state: &ClusterState, nodes: &[NodeId]) -> String {
    let words: Vec<String> = nodes.iter().map(|id| state.node_name(*id)).collect();
    listed(&words)
}
