//! Running the planner where this node leads the control log.

use std::time::Duration;

use relevo_membership::Liveness;
use relevo_planner::{NodeView, Plan, PlanInput, Views, plan};
use relevo_types::{
    NodeId, Time, VolumeId,
    cluster::{ClusterState, Command, VolumeChange},
};

use crate::{Effect, Level, Node, NodeEvent, Phase, Subject, runner::Runner};

/// The planner runs at every change of what it looks at; this often it runs in any case, so that
/// a change that was overlooked costs no more than this.
const PLAN_INTERVAL: Duration = Duration::from_millis(500);

impl Node {
    /// What this node observes of each member, itself included.
    pub(crate) fn views(&self, now: Time, state: &ClusterState) -> Views {
        let me = self.config.me;
        let view = |id: NodeId, generation| {
            let liveness = self.membership.liveness(id);
            let alive = matches!(liveness, Liveness::Alive | Liveness::Suspect);
            let silent_for = if alive {
                None
            } else {
                self.membership.silent_for(id, now)
            };
            let (leaving, replicas, running, memory_mib) = if id == me {
                let runs = |runner: &&Runner| runner.phase == Phase::Running;
                let running = self.runners.iter().filter(|(_, runner)| runs(runner));
                (
                    self.shutdown.is_some(),
                    self.engines.replica_views(),
                    running.map(|(id, _)| *id).collect(),
                    self.config.memory_mib,
                )
            } else {
                let told = self.reports.of(id).map(|report| {
                    let services = report.services.iter();
                    let running = services.filter(|(_, it)| it.phase == Phase::Running);
                    (
                        report.leaving,
                        report.replicas.clone(),
                        running.map(|(id, _)| *id).collect(),
                        report.memory_mib,
                    )
                });
                told.unwrap_or_default()
            };
            NodeView {
                alive,
                silent_for,
                generation,
                condemned_by: self.membership.condemned_by(id, generation),
                heard_by: self.membership.heard_by(id),
                line_alone: alive && self.is_heard_on_a_line_alone(id, state),
                leaving,
                replicas,
                running,
                memory_mib,
            }
        };
        state
            .nodes
            .iter()
            .map(|(id, node)| (*id, view(*id, node.lease.generation)))
            .collect()
    }

    /// Whether no network to a node works that both are on.
    fn is_heard_on_a_line_alone(&self, id: NodeId, state: &ClusterState) -> bool {
        let nodes = state.nodes.get(&id).zip(state.nodes.get(&self.config.me));
        let Some((theirs, ours)) = nodes.filter(|_| id != self.config.me) else {
            return false;
        };
        let up = |name: &str| self.membership.hears_on(id, name);
        let networks = theirs.spec.paths.iter();
        let works = networks.clone().any(|path| up(&path.name));
        let line = theirs.spec.streams.iter().any(|path| up(&path.name));
        line && !works && theirs.spec.shares_network(&ours.spec)
    }

    /// The cluster's clock: as far as the log had it when this node began to lead, and the time since.
    fn cluster_clock(&self, now: Time) -> u64 {
        self.leads_since
            .map_or(0, |(since, clock_s)| clock_s + now.since(since).as_secs())
    }

    /// What the planner looks at, as this node sees it.
    pub(crate) fn plan_input(&self, now: Time, state: &ClusterState) -> PlanInput {
        PlanInput {
            planner: self.config.me,
            state: state.clone(),
            nodes: self.views(now, state),
            now_s: self.cluster_clock(now),
            better_since: self.better_since.clone(),
        }
    }

    /// Plans and proposes, on the leader.
    pub(crate) fn plan(
        &mut self,
        now: Time,
        news: bool,
        state: &ClusterState,
        out: &mut Vec<Effect>,
    ) {
        let me = self.config.me;
        if self.leader != Some(me) || !state.nodes.contains_key(&me) {
            return;
        }
        // With a proposal under way or refused, the pass that is due for it plans again.
        if !news && now < self.next_plan && !self.planned_something {
            return;
        }
        self.next_plan = now + PLAN_INTERVAL;
        let input = self.plan_input(now, state);
        let plan = plan(&input);
        self.better_since = plan.better_since(&input);
        let Plan { actions, waits, .. } = plan;
        self.planned_something = !actions.is_empty();
        for action in actions {
            self.proposals
                .want(now, state.revision, action.command, &action.reason, out);
        }
        for wait in &waits {
            // The reason tells times that run; one event for each wait is enough.
            if !self.waits.iter().any(|known| known.service == wait.service) {
                out.push(Effect::Event(NodeEvent {
                    level: Level::Warning,
                    subject: wait.service.map_or(Subject::Cluster, Subject::Service),
                    what: "something has to wait".to_owned(),
                    why: wait.reason.clone(),
                }));
            }
        }
        self.waits = waits;
    }
}

/// What a command that was applied did, in words.
pub(crate) fn told(state: &ClusterState, command: &Command, why: String) -> NodeEvent {
    let node = |id: &NodeId| state.node_name(*id);
    let volume = |id: &VolumeId| {
        state
            .volumes
            .get(id)
            .map_or_else(|| id.to_string(), |volume| volume.name.clone())
    };
    let service = |id: &relevo_types::ServiceId| {
        state
            .services
            .get(id)
            .map_or_else(|| id.to_string(), |service| service.spec.name.clone())
    };
    let (level, subject, what) = match command {
        Command::Evict { node: id, .. } => (
            Level::Warning,
            Subject::Node(*id),
            format!("{} was evicted: what it held is free", node(id)),
        ),
        Command::Readmit { node: id, .. } => (
            Level::Info,
            Subject::Node(*id),
            format!("{} was let in again", node(id)),
        ),
        Command::Acquire {
            service: id,
            node: to,
        } => (
            Level::Info,
            Subject::Service(*id),
            format!("{} was given to {}", service(id), node(to)),
        ),
        Command::Release {
            service: id,
            node: from,
            failure,
            ..
        } => (
            if failure.is_some() {
                Level::Warning
            } else {
                Level::Info
            },
            Subject::Service(*id),
            format!("{} gave {} back", node(from), service(id)),
        ),
        Command::SetTarget { service: id, .. } => (
            Level::Info,
            Subject::Service(*id),
            format!("the wish where {} shall be was dropped", service(id)),
        ),
        Command::Volume {
            volume: id, change, ..
        } => {
            let what = match change {
                VolumeChange::Promote { node: to }
                | VolumeChange::PromoteUncertain { node: to } => {
                    format!("{} is primary of volume {}", node(to), volume(id))
                }
                VolumeChange::Tend { node: by } => {
                    format!(
                        "{} brings the other replicas of volume {} up to date: nobody uses it",
                        node(by),
                        volume(id)
                    )
                }
                VolumeChange::Demote { node: from } => {
                    format!("{} is primary of volume {} no more", node(from), volume(id))
                }
                VolumeChange::Leave { .. } | VolumeChange::Join { .. } => {
                    format!("the in-sync set of volume {} changed", volume(id))
                }
                VolumeChange::Differs {
                    node: of,
                    differs: None,
                    ..
                } => format!(
                    "what verification had found of volume {} on {} is settled",
                    volume(id),
                    node(of)
                ),
                VolumeChange::Differs { node: of, from, .. } => format!(
                    "verification found the replica of volume {} on {} to differ from that on {}",
                    volume(id),
                    node(of),
                    node(from)
                ),
                VolumeChange::Force { node: to, .. } => format!(
                    "the replica on {} is volume {} by force: a new history begins",
                    node(to),
                    volume(id)
                ),
                VolumeChange::GiveWay { to, .. } => format!(
                    "volume {} goes back to the history of the replica on {}",
                    volume(id),
                    node(to)
                ),
                VolumeChange::KeepInForce => format!(
                    "replicas outside the in-sync set of volume {} give way",
                    volume(id)
                ),
            };
            (Level::Info, Subject::Volume(*id), what)
        }
        Command::SetPlacement { service: id, .. } => (
            Level::Info,
            Subject::Service(*id),
            format!("where {} may and shall run was changed", service(id)),
        ),
        Command::Hold {
            service: id,
            reason,
        } => (
            Level::Alarm,
            Subject::Service(*id),
            match reason {
                Some(reason) => format!("{} is held where it is: {reason}", service(id)),
                None => format!("{} is held no more", service(id)),
            },
        ),
        Command::DiskRepaired { service: id, .. } => (
            Level::Info,
            Subject::Service(*id),
            format!("{} may run here again", service(id)),
        ),
        Command::ReplicaCreated {
            volume: id,
            node: on,
        } => (
            Level::Info,
            Subject::Volume(*id),
            format!("{} has its replica of volume {}", node(on), volume(id)),
        ),
        Command::ReplicaNotCreated {
            volume: id,
            node: on,
            ..
        } => (
            Level::Alarm,
            Subject::Volume(*id),
            format!("{} has no replica of volume {}", node(on), volume(id)),
        ),
        other => (
            Level::Info,
            Subject::Cluster,
            format!("the control log applied {other:?}"),
        ),
    };
    NodeEvent {
        level,
        subject,
        what,
        why,
    }
}
