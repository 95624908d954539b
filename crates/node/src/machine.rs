//! The dispatch: inputs are noted, then everything that follows from them is done in one go.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use relevo_membership::{
    self as membership, Liveness, MemberConfig, Membership, PathConfig, PathTrouble,
    rounds_per_heartbeat,
};
use relevo_planner::{Wait, should_release};
use relevo_types::{
    NodeId, ServiceId, Time, Timing,
    cluster::{ClusterState, NodeKind, PathAddress},
};

use crate::{
    Effect, Input, Level, NodeConfig, NodeEvent, OrderId, Phase, ProposalId, ProposalResult,
    Subject, planning,
    proposals::Proposals,
    reports::Reports,
    runner::{Context, Runner},
    shutdown::Shutdown,
    volumes::Engines,
};

/// The manager of one node.
#[derive(Debug)]
pub struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) membership: Membership,
    pub(crate) state: Option<Arc<ClusterState>>,
    pub(crate) leader: Option<NodeId>,
    /// When this node began to lead, and what the cluster's clock was then.
    pub(crate) leads_since: Option<(Time, u64)>,
    /// Since when services could be on a node that they prefer, by the cluster's clock.
    pub(crate) better_since: BTreeMap<ServiceId, (NodeId, u64)>,
    pub(crate) engines: Engines,
    pub(crate) runners: BTreeMap<ServiceId, Runner>,
    pub(crate) proposals: Proposals,
    pub(crate) reports: Reports,
    /// The lease is valid, as far as was told.
    pub(crate) lease_valid: bool,
    /// Something of a service that was taken from this node is not stopped yet: no lease is asked
    /// for until it is.
    withholds_lease: bool,
    /// What the planner waits for; empty where it does not run.
    pub(crate) waits: Vec<Wait>,
    pub(crate) next_plan: Time,
    /// The last plan had actions: they are proposed until the state shows them.
    pub(crate) planned_something: bool,
    pub(crate) shutdown: Option<Shutdown>,
    pub(crate) last_order: u64,
}

impl Node {
    /// A manager that knows nothing but its configuration.
    #[must_use]
    pub fn new(config: NodeConfig, now: Time) -> Self {
        let membership = Membership::new(
            config.me,
            config.instance,
            config.timing,
            config.condemned.clone(),
            now,
        );
        Self {
            membership,
            state: None,
            leader: None,
            leads_since: None,
            better_since: BTreeMap::new(),
            engines: Engines::new(config.local_replicas.clone()),
            runners: BTreeMap::new(),
            proposals: Proposals::default(),
            reports: Reports::default(),
            lease_valid: false,
            withholds_lease: false,
            waits: Vec::new(),
            next_plan: Time::NEVER,
            planned_something: false,
            shutdown: None,
            last_order: 0,
            config,
        }
    }

    /// Takes an input in; effects are appended to `out`, to be carried out in order.
    pub fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Effect>) {
        self.check_lease(now, out);
        // Whether the planner has something new to look at.
        let mut news = true;
        match input {
            Input::State(state) => self.note_state(now, state, out),
            Input::Leader(leader) => self.note_leader(now, leader, out),
            Input::Heartbeat { path, heartbeat } => {
                let input = membership::Input::Heartbeat { path, heartbeat };
                news = self.member_input(now, input, out);
            }
            Input::CondemnedPersisted { node, generation } => {
                let input = membership::Input::Persisted { node, generation };
                news = self.member_input(now, input, out);
            }
            Input::Report(report) => self.reports.note(report),
            Input::Volume {
                volume,
                event,
                status,
            } => self.engines.note(volume, event.as_ref(), status),
            Input::ReplicaCreated { volume, result } => self.engines.note_created(volume, result),
            Input::PartDone { order, result } => self.part_done(now, order, &result, out),
            Input::PartFailed { order, reason } => self.part_failed(now, order, &reason, out),
            Input::ProposalDone { id, result } => self.proposal_done(id, &result, out),
            Input::Tick => news = false,
            Input::Shutdown => {
                self.shutdown.get_or_insert_with(|| Shutdown::new(now));
            }
        }
        if now >= self.membership.deadline() {
            news |= self.member_input(now, membership::Input::Tick, out);
        }
        self.check_lease(now, out);
        self.drive(now, news, out);
    }

    /// When [`Input::Tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Time {
        let lease_end = if self.lease_valid {
            self.membership.lease_until()
        } else {
            Time::NEVER
        };
        let shutdown = self
            .shutdown
            .as_ref()
            .map_or(Time::NEVER, Shutdown::deadline);
        self.runners
            .values()
            .map(|runner| runner.wake)
            .chain([
                self.membership.deadline(),
                lease_end,
                self.next_plan,
                self.proposals.deadline(),
                self.reports.deadline(),
                shutdown,
            ])
            .fold(Time::NEVER, Time::min)
    }

    fn note_state(&mut self, now: Time, state: Arc<ClusterState>, out: &mut Vec<Effect>) {
        let first = self.state.is_none();
        if self
            .state
            .as_ref()
            .is_some_and(|known| known.revision >= state.revision)
        {
            return;
        }
        // A voter that came and went between two states leaves the same nodes under another number.
        let changed = self.state.as_ref().is_none_or(|known| {
            known.nodes != state.nodes || known.voters_version != state.voters_version
        });
        self.reports
            .retain_members(|node| state.nodes.contains_key(&node));
        self.state = Some(Arc::clone(&state));
        if changed || self.has_leftovers(&state) {
            self.tell_members(now, &state, out);
        }
        if first {
            self.clean_up_after_the_last_process(now, out);
        }
    }

    /// Tells membership who the members are. An eviction that was missed and a readmission may come in
    /// one piece: as long as anything of a service is active that this node lost by it, a lease under
    /// the new generation would put addresses back that another node has by now. So the node counts as
    /// evicted until all that is stopped.
    fn tell_members(&mut self, now: Time, state: &ClusterState, out: &mut Vec<Effect>) {
        let mut members = members_of(state, self.config.me, &self.config.timing);
        self.withholds_lease = self.has_leftovers(state);
        if self.withholds_lease
            && let Some(own) = members.get_mut(&self.config.me)
        {
            own.evicted = true;
        }
        let known = state.voters_version;
        let voters = membership::Voters {
            known,
            told: known.max(self.config.voters_told),
        };
        let input = membership::Input::Members { members, voters };
        self.member_input(now, input, out);
    }

    /// Whether parts are active here of a service that this node does not hold any more.
    fn has_leftovers(&self, state: &ClusterState) -> bool {
        self.runners.iter().any(|(id, runner)| {
            let holder = state.services.get(id).and_then(|service| service.holder);
            // What an earlier process left is not renewed by this one.
            holder != Some(self.config.me) && runner.phase != Phase::Cleaning && runner.is_active()
        })
    }

    /// Whatever an earlier process of this node had active is stopped before anything starts.
    fn clean_up_after_the_last_process(&mut self, now: Time, out: &mut Vec<Effect>) {
        let Some(state) = self.state.clone() else {
            return;
        };
        let me = self.config.me;
        let is_data = state
            .nodes
            .get(&me)
            .is_some_and(|node| node.spec.kind == NodeKind::Data);
        if !is_data {
            return;
        }
        let mut runners = std::mem::take(&mut self.runners);
        let mut context = self.context(now, &state, out);
        for (id, service) in &state.services {
            runners.insert(*id, Runner::cleaning(service, &mut context));
        }
        self.runners = runners;
    }

    fn note_leader(&mut self, now: Time, leader: Option<NodeId>, out: &mut Vec<Effect>) {
        if leader == self.leader {
            return;
        }
        self.leader = leader;
        self.waits.clear();
        self.better_since.clear();
        self.leads_since = None;
        if leader == Some(self.config.me) {
            let clock_s = self.state.as_ref().map_or(0, |state| state.clock_s);
            self.leads_since = Some((now, clock_s));
            self.next_plan = now;
            out.push(Effect::Event(NodeEvent {
                level: Level::Info,
                subject: Subject::Cluster,
                what: "this node leads the control log and plans".to_owned(),
                why: "the voters elected it".to_owned(),
            }));
        } else {
            self.next_plan = Time::NEVER;
        }
    }

    fn proposal_done(&mut self, id: ProposalId, result: &ProposalResult, out: &mut Vec<Effect>) {
        let Some((command, reason)) = self.proposals.answered(id, result) else {
            return;
        };
        if let Some(state) = &self.state {
            out.push(Effect::Event(planning::told(state, &command, reason)));
        }
    }

    fn part_done(
        &mut self,
        now: Time,
        order: OrderId,
        result: &Result<(), String>,
        out: &mut Vec<Effect>,
    ) {
        for (id, runner) in &mut self.runners {
            if runner.part_done(now, order, result) {
                if let Err(reason) = result {
                    out.push(Effect::Event(NodeEvent {
                        level: Level::Warning,
                        subject: Subject::Service(*id),
                        what: format!("{}: a part could not be started or stopped", runner.name()),
                        why: reason.clone(),
                    }));
                }
                return;
            }
        }
    }

    fn part_failed(&mut self, now: Time, order: OrderId, reason: &str, out: &mut Vec<Effect>) {
        for (id, runner) in &mut self.runners {
            if runner.part_failed(now, order, reason) {
                out.push(Effect::Event(NodeEvent {
                    level: Level::Warning,
                    subject: Subject::Service(*id),
                    what: format!("{}: a part failed", runner.name()),
                    why: reason.to_owned(),
                }));
                return;
            }
        }
    }

    /// Gives membership an input and passes its effects on. Returns whether they concern the
    /// planner.
    fn member_input(&mut self, now: Time, input: membership::Input, out: &mut Vec<Effect>) -> bool {
        let mut effects = Vec::new();
        self.membership.handle(now, input, &mut effects);
        let mut news = false;
        for effect in effects {
            news |= self.member_effect(now, effect, out);
        }
        news
    }

    fn member_effect(
        &mut self,
        now: Time,
        effect: membership::Effect,
        out: &mut Vec<Effect>,
    ) -> bool {
        match effect {
            membership::Effect::Send {
                to,
                path,
                heartbeat,
            } => out.push(Effect::SendHeartbeat {
                to,
                path,
                heartbeat,
            }),
            membership::Effect::PersistCondemned { node, generation } => {
                out.push(Effect::PersistCondemned { node, generation });
            }
            membership::Effect::VotersSettled(voters) => out.push(Effect::VotersSettled(voters)),
            membership::Effect::LeaseUntil(until) => {
                out.push(Effect::LeaseUntil(until));
                if until > now {
                    self.lease_valid = true;
                }
            }
            membership::Effect::Liveness {
                node,
                liveness,
                reason,
            } => {
                self.tell_liveness(node, liveness, reason, out);
                return true;
            }
            membership::Effect::Condemned { .. } | membership::Effect::HeardBy { .. } => {
                return true;
            }
            membership::Effect::Path {
                node,
                path,
                trouble,
                loss_percent,
            } => {
                let name = self.node_name(node);
                let (level, what, why) = match trouble {
                    None => (
                        Level::Info,
                        "is in order again".to_owned(),
                        "heartbeats arrive on it",
                    ),
                    Some(PathTrouble::Down) => (
                        Level::Alarm,
                        "is down".to_owned(),
                        "no heartbeat arrives on it, and the node is alive by another path; nothing moves. \
                         Look at its cable, interface and switch, or at what filters packets",
                    ),
                    Some(PathTrouble::Loss) => (
                        Level::Alarm,
                        format!("loses {loss_percent} % of the heartbeats"),
                        "what is sent over it arrives late and slowly; nothing moves. Look at its cable, \
                         interface and switch, and at whether it is overloaded",
                    ),
                };
                out.push(Effect::Event(NodeEvent {
                    level,
                    subject: Subject::Node(node),
                    what: format!("path {path} to {name} {what}"),
                    why: why.to_owned(),
                }));
            }
            membership::Effect::Paused { pause } => {
                let seconds = pause.as_secs_f64();
                out.push(Effect::Event(NodeEvent {
                    level: Level::Warning,
                    subject: Subject::Node(self.config.me),
                    what: format!("this daemon did not run for {seconds:.1} s"),
                    why: "it was stopped or starved, or the machine slept; it judges nobody by \
                          the silence before"
                        .to_owned(),
                }));
            }
        }
        false
    }

    fn tell_liveness(
        &self,
        node: NodeId,
        liveness: Liveness,
        reason: String,
        out: &mut Vec<Effect>,
    ) {
        let name = self.node_name(node);
        let (level, what) = match liveness {
            Liveness::Unknown => (Level::Info, "unknown"),
            Liveness::Alive => (Level::Info, "alive"),
            Liveness::Suspect => (Level::Info, "suspect"),
            Liveness::Dead => (Level::Warning, "dead"),
        };
        out.push(Effect::Event(NodeEvent {
            level,
            subject: Subject::Node(node),
            what: format!("{name} is {what}"),
            why: reason,
        }));
    }

    pub(crate) fn node_name(&self, node: NodeId) -> String {
        self.state
            .as_ref()
            .map_or_else(|| node.to_string(), |state| state.node_name(node))
    }

    /// Tells when the lease ran out or was taken.
    fn check_lease(&mut self, now: Time, out: &mut Vec<Effect>) {
        if self.lease_valid && self.membership.lease_until() <= now {
            self.lease_valid = false;
            out.push(Effect::LeaseLost);
            if !self.runners.is_empty() {
                out.push(Effect::Event(NodeEvent {
                    level: Level::Warning,
                    subject: Subject::Node(self.config.me),
                    what: "this node lost its lease; its addresses are taken down".to_owned(),
                    why: "too few voters answer its heartbeats".to_owned(),
                }));
            }
        }
    }

    /// Everything that follows from what is known.
    fn drive(&mut self, now: Time, news: bool, out: &mut Vec<Effect>) {
        let Some(state) = self.state.clone() else {
            self.drive_shutdown_without_state(out);
            return;
        };
        let me = self.config.me;
        self.proposals.forget_old(now);
        self.proposals.begin();
        if state.nodes.contains_key(&me) {
            self.engines
                .drive(now, me, &state, &mut self.proposals, out);
        }
        self.drive_runners(now, &state, out);
        if self.withholds_lease && !self.has_leftovers(&state) {
            self.tell_members(now, &state, out);
        }
        self.plan(now, news, &state, out);
        self.drive_shutdown(now, &state, out);
        self.send_report(now, &state, out);
    }

    pub(crate) fn context<'a>(
        &'a mut self,
        now: Time,
        state: &'a ClusterState,
        out: &'a mut Vec<Effect>,
    ) -> Context<'a> {
        Context {
            now,
            me: self.config.me,
            leaving: self.shutdown.is_some(),
            state,
            engines: &self.engines,
            proposals: &mut self.proposals,
            last_order: &mut self.last_order,
            out,
        }
    }

    fn drive_runners(&mut self, now: Time, state: &ClusterState, out: &mut Vec<Effect>) {
        let me = self.config.me;
        // Idle nodes come here with every heartbeat.
        let views = if self.runners.is_empty() {
            BTreeMap::new()
        } else {
            self.views(now, state)
        };
        let leaving = self.shutdown.is_some();
        let mut runners = std::mem::take(&mut self.runners);
        for (id, service) in &state.services {
            if service.holder == Some(me) && !runners.contains_key(id) {
                let mut context = self.context(now, state, out);
                let runner = if leaving {
                    Runner::refusing(service, now, "this node is shutting down")
                } else {
                    Runner::starting(service, &mut context)
                };
                runners.insert(*id, runner);
            }
        }
        for (id, runner) in &mut runners {
            if leaving {
                runner.stop(now, "this node is shutting down");
            } else if matches!(runner.phase, Phase::Starting | Phase::Running)
                && state.services.get(id).and_then(|service| service.holder) == Some(me)
                && let Some(reason) = should_release(state, &views, me, *id)
            {
                runner.stop(now, &reason);
            }
        }
        let mut over = BTreeSet::new();
        for (id, runner) in &mut runners {
            let before = runner.phase;
            let fresh = runner.since == now && before == Phase::Starting;
            let mut context = self.context(now, state, out);
            if runner.drive(&mut context) {
                over.insert(*id);
                continue;
            }
            if runner.phase != before || fresh {
                out.push(Effect::Event(phase_event(*id, runner)));
            }
        }
        runners.retain(|id, _| !over.contains(id));
        self.runners = runners;
    }
}

fn phase_event(id: ServiceId, runner: &Runner) -> NodeEvent {
    let (level, doing) = match runner.phase {
        Phase::Cleaning => (Level::Info, "is cleaned up"),
        Phase::Starting => (Level::Info, "starts"),
        Phase::Running => (Level::Info, "runs"),
        Phase::Stopping => (Level::Info, "stops"),
        Phase::Forced => (Level::Warning, "is stopped by force"),
        Phase::Releasing => (Level::Info, "is stopped and given back"),
    };
    NodeEvent {
        level,
        subject: Subject::Service(id),
        what: format!("{} {doing} on this node", runner.name()),
        why: runner.reason.clone(),
    }
}

/// The members as membership sees them: paths that both ends are on.
fn members_of(state: &ClusterState, me: NodeId, timing: &Timing) -> BTreeMap<NodeId, MemberConfig> {
    let own = state.nodes.get(&me).map(|node| &node.spec);
    let shared = |(name, theirs): (&str, PathAddress)| {
        let mine = own?.path(name)?;
        // Both ends get the same number.
        let rate = [mine, theirs]
            .iter()
            .filter_map(|end| match end {
                PathAddress::Line(line) => line.bytes_per_second(),
                PathAddress::Ip(_) => None,
            })
            .min();
        Some(PathConfig {
            name: name.to_owned(),
            every: rounds_per_heartbeat(rate, state.nodes.len(), timing),
        })
    };
    state
        .nodes
        .iter()
        .map(|(id, node)| {
            let config = MemberConfig {
                paths: node.spec.all_paths().filter_map(shared).collect(),
                generation: node.lease.generation,
                evicted: node.lease.evicted,
                voter: node.voter,
            };
            (*id, config)
        })
        .collect()
}
