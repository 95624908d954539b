//! What `relevo status` shows of a node.

use std::collections::BTreeMap;

use relevo_planner::{Fitness, Forecast, Supposed, Wait, fitness, forecast};
use relevo_types::{NodeId, ServiceId, Time};
use serde::{Deserialize, Serialize};

use crate::{Node, Phase, Report};

/// A node as it sees itself and the others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// This node.
    pub me: NodeId,
    /// Who leads the control log, as far as is known here.
    pub leader: Option<NodeId>,
    /// Lease, liveness, paths.
    pub membership: relevo_membership::Status,
    /// The services that are, or were, active here.
    pub services: BTreeMap<ServiceId, ServiceStatus>,
    /// What the planner waits for; empty where it does not run.
    pub waits: Vec<Wait>,
    /// What the others reported last.
    pub reports: BTreeMap<NodeId, Report>,
    /// It is shutting down.
    pub leaving: bool,
}

/// A service on this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Where it is between stopped and running.
    pub phase: Phase,
    /// Since when.
    pub since: Time,
    /// Why.
    pub reason: String,
    /// What it waits for, in a sentence.
    pub waiting: Option<String>,
}

impl Node {
    /// What is known, for people.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        let services = self.runners.iter().map(|(id, runner)| {
            let status = ServiceStatus {
                phase: runner.phase,
                since: runner.since,
                reason: runner.reason.clone(),
                waiting: runner.waiting.clone(),
            };
            (*id, status)
        });
        NodeStatus {
            me: self.config.me,
            leader: self.leader,
            membership: self.membership.status(),
            services: services.collect(),
            waits: self.waits.clone(),
            reports: self.reports.all(),
            leaving: self.shutdown.is_some(),
        }
    }

    /// Whether each node can run a service, as this node sees it: what the planner goes by, on the leader.
    #[must_use]
    pub fn verdicts(&self, now: Time, service: ServiceId) -> BTreeMap<NodeId, Fitness> {
        let Some(state) = &self.state else {
            return BTreeMap::new();
        };
        let views = self.views(now, state);
        let nodes = state.nodes.keys().copied();
        nodes
            .map(|node| (node, fitness(state, &views, self.config.me, service, node)))
            .collect()
    }

    /// What would come of something, as this node sees the cluster; `None` before it knows the cluster.
    #[must_use]
    pub fn forecast(&self, now: Time, supposed: Supposed) -> Option<Forecast> {
        let state = self.state.as_ref()?;
        Some(forecast(&self.plan_input(now, state), supposed))
    }
}
