//! A small cluster that the tests act on: the replicated state, what is observed, and holders that
//! do at once what they are told.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use relevo_planner::{
    Forecast, NodeView, Plan, PlanInput, ReplicaView, Supposed, Views, forecast, plan,
    should_release,
};
use relevo_types::{
    BlockRange, ClusterId, LineageId, NodeId, Sensitivity, ServiceId, VolumeId,
    cluster::{
        ClusterState, Command, Differs, JoinToken, NodeKind, NodePath, NodeSpec, Part, Placement,
        Ports, ProcessPart, Proof, Protocol, ReplicaSpec, ServiceSpec, VolumeChange, VolumePart,
    },
};

/// Rounds of planning after a step at most; more means that the planner runs in circles.
const ROUNDS_MAX: usize = 12;

pub(crate) struct World {
    pub(crate) planner: NodeId,
    pub(crate) state: ClusterState,
    pub(crate) views: Views,
    pub(crate) log: String,
    /// Services whose parts take their time: held, and not running.
    slow: BTreeSet<ServiceId>,
    now_s: u64,
    better_since: BTreeMap<ServiceId, (NodeId, u64)>,
}

fn node_spec(name: &str) -> NodeSpec {
    let (name, kind) = match name.split_once(':') {
        Some((name, "witness")) => (name, NodeKind::Witness),
        Some((name, _memory)) => (name, NodeKind::Data),
        None => (name, NodeKind::Data),
    };
    NodeSpec {
        name: name.to_owned(),
        kind,
        paths: vec![NodePath {
            name: "lan".to_owned(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            replication: false,
        }],
        streams: Vec::new(),
        ports: Ports::default(),
    }
}

impl World {
    /// A cluster of these nodes (`w:witness` for a witness, `a:8000` for memory), all well; the last one plans.
    pub(crate) fn new(nodes: &[&str]) -> Self {
        let mut state = ClusterState::default();
        for (index, name) in nodes.iter().enumerate() {
            let node = node_spec(name);
            if index == 0 {
                let init = Command::Init {
                    cluster: ClusterId([1; 16]),
                    name: "test".to_owned(),
                    sensitivity: Sensitivity::Normal,
                    node,
                };
                state.apply(&init).unwrap();
                continue;
            }
            let hash = (*name).to_owned();
            let token = JoinToken {
                kind: None,
                expires_unix_s: 1,
            };
            let create = Command::CreateToken {
                hash: hash.clone(),
                token,
            };
            state.apply(&create).unwrap();
            let join = Command::Join {
                hash,
                now_unix_s: 0,
                node,
            };
            state.apply(&join).unwrap();
        }
        let ids: Vec<NodeId> = state.nodes.keys().copied().collect();
        for node in &ids {
            let admit = Command::AdmitVoter {
                node: *node,
                expect: state.voters_version,
            };
            state.apply(&admit).unwrap();
        }
        let planner = *ids.last().unwrap();
        let mut world = Self {
            planner,
            state,
            views: BTreeMap::new(),
            log: String::new(),
            slow: BTreeSet::new(),
            now_s: 0,
            better_since: BTreeMap::new(),
        };
        for (id, name) in ids.into_iter().zip(nodes) {
            let mut view = world.well(id);
            view.memory_mib = name.split_once(':').and_then(|it| it.1.parse().ok());
            world.views.insert(id, view);
        }
        world
    }

    fn well(&self, id: NodeId) -> NodeView {
        NodeView {
            alive: true,
            silent_for: None,
            generation: self.state.nodes[&id].lease.generation,
            condemned_by: Vec::new(),
            heard_by: self
                .state
                .nodes
                .keys()
                .copied()
                .filter(|n| *n != id)
                .collect(),
            line_alone: false,
            leaving: false,
            replicas: BTreeMap::new(),
            running: BTreeSet::new(),
            memory_mib: None,
        }
    }

    pub(crate) fn node(&self, name: &str) -> NodeId {
        self.state
            .node_named(name)
            .unwrap_or_else(|| panic!("no node {name}"))
            .id
    }

    fn view(&mut self, name: &str) -> &mut NodeView {
        let id = self.node(name);
        self.views.get_mut(&id).unwrap()
    }

    fn volume(&self, name: &str) -> VolumeId {
        self.state
            .volume_named(name)
            .unwrap_or_else(|| panic!("no volume {name}"))
            .id
    }

    fn service(&self, name: &str) -> ServiceId {
        self.state
            .service_named(name)
            .unwrap_or_else(|| panic!("no service {name}"))
            .id
    }

    /// A volume with a replica on each of the nodes, created and certain.
    pub(crate) fn add_volume(&mut self, name: &str, nodes: &[&str]) {
        let ids: Vec<NodeId> = nodes.iter().map(|node| self.node(node)).collect();
        let replicas = ids
            .iter()
            .map(|node| ReplicaSpec {
                node: *node,
                protocol: Protocol::C,
                backing: None,
                force: false,
            })
            .collect();
        self.must(&Command::CreateVolume {
            name: name.to_owned(),
            size: 1 << 20,
            lineage: LineageId(7),
            replicas,
        });
        let volume = self.volume(name);
        for node in ids {
            self.must(&Command::ReplicaCreated { volume, node });
            let view = self.views.get_mut(&node).unwrap();
            view.replicas.insert(volume, ReplicaView::Certain);
        }
    }

    /// A service on volumes, with a process; its placement as words, `prefer a b` say.
    pub(crate) fn add_service(&mut self, name: &str, volumes: &[&str], place: &[&str]) {
        let mut placement = Placement::default();
        for rule in place {
            let words: Vec<&str> = rule.split_whitespace().collect();
            self.rule(&mut placement, words[0], &words[1..]);
        }
        let mut parts: Vec<Part> = volumes
            .iter()
            .map(|volume| {
                Part::Volume(VolumePart {
                    volume: self.volume(volume),
                    device: true,
                })
            })
            .collect();
        parts.push(Part::Process(ProcessPart {
            command: vec!["/bin/serve".to_owned()],
            environment: BTreeMap::new(),
            directory: None,
            ready: None,
        }));
        self.must(&Command::CreateService {
            spec: ServiceSpec {
                name: name.to_owned(),
                parts,
            },
            placement,
            target: None,
        });
    }

    fn rule(&self, placement: &mut Placement, rule: &str, words: &[&str]) {
        let nodes = || words.iter().map(|name| self.node(name));
        let services = || words.iter().map(|name| self.service(name)).collect();
        match rule {
            "prefer" => placement.prefer = nodes().collect(),
            "only" => placement.only = nodes().collect(),
            "never" => placement.never = nodes().collect(),
            "with" => placement.with = services(),
            "apart" => placement.apart = services(),
            "after" => placement.after = services(),
            "memory" => placement.memory_mib = words[0].parse().unwrap(),
            "failback" => placement.failback_s = Some(words[0].parse().unwrap()),
            other => panic!("what is the rule `{other}`?"),
        }
    }

    pub(crate) fn must(&mut self, command: &Command) {
        if let Err(rejection) = self.state.apply(command) {
            panic!("{command:?}: {rejection}");
        }
    }

    pub(crate) fn input(&self) -> PlanInput {
        PlanInput {
            planner: self.planner,
            state: self.state.clone(),
            nodes: self.views.clone(),
            now_s: self.now_s,
            better_since: self.better_since.clone(),
        }
    }

    /// One line of a scenario.
    pub(crate) fn step(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["silent", node, seconds] => {
                let silent = Duration::from_secs_f64(seconds.parse().unwrap());
                let id = self.node(node);
                let view = self.view(node);
                view.alive = false;
                view.silent_for = Some(silent);
                view.heard_by.clear();
                for view in self.views.values_mut() {
                    view.heard_by.retain(|hearer| *hearer != id);
                }
            }
            ["heard", node, "by", by @ ..] => {
                let by = by.iter().map(|name| self.node(name)).collect();
                let view = self.view(node);
                view.alive = true;
                view.silent_for = None;
                view.heard_by = by;
            }
            ["condemned", node, "by", by @ ..] => {
                let by = by.iter().map(|name| self.node(name)).collect();
                self.view(node).condemned_by = by;
            }
            ["line-alone", node] => self.view(node).line_alone = true,
            ["networks", node] => self.view(node).line_alone = false,
            ["leaving", node] => self.view(node).leaving = true,
            ["restarted", node] => {
                let view = self.view(node);
                view.leaving = false;
                view.replicas
                    .values_mut()
                    .for_each(|replica| *replica = ReplicaView::Attaching);
            }
            ["replica", node, volume, standing] => {
                let volume = self.volume(volume);
                let standing = match *standing {
                    "certain" => ReplicaView::Certain,
                    "uncertain" => ReplicaView::Uncertain,
                    "attaching" => ReplicaView::Attaching,
                    "failed" => ReplicaView::Failed,
                    other => panic!("a replica can't be {other}"),
                };
                self.view(node).replicas.insert(volume, standing);
            }
            ["what-if", node, what] => self.what_if(node, what),
            ["planner", node] => self.planner = self.node(node),
            ["seconds", seconds] => self.now_s += seconds.parse::<u64>().unwrap(),
            ["memory", node, mib] => self.view(node).memory_mib = Some(mib.parse().unwrap()),
            ["slow", service] => drop(self.slow.insert(self.service(service))),
            ["ready", service] => drop(self.slow.remove(&self.service(service))),
            ["refused", rest @ ..] => {
                let command = self.read(rest, line);
                let rejection = self.state.apply(&command).expect_err(line);
                writeln!(self.log, "    {rejection}").unwrap();
            }
            _ => self.command(&words, line),
        }
    }

    /// A line that is a command of the control log.
    fn command(&mut self, words: &[&str], line: &str) {
        let command = self.read(words, line);
        self.must(&command);
    }

    fn read(&mut self, words: &[&str], line: &str) -> Command {
        match words {
            ["leave", volume, nodes @ ..] => {
                let nodes = nodes.iter().map(|name| self.node(name)).collect();
                self.change(volume, VolumeChange::Leave { nodes })
            }
            ["join", volume, node] => {
                let node = self.node(node);
                self.change(volume, VolumeChange::Join { node })
            }
            ["differs", volume, node, "from", primary] => {
                let (node, from) = (self.node(node), self.node(primary));
                let differs = Differs::new(from, vec![BlockRange::new(7, 1)], false);
                let found = VolumeChange::Differs {
                    node,
                    from,
                    differs,
                };
                self.change(volume, found)
            }
            ["standby", node, on] => Command::SetStandby {
                node: self.node(node),
                standby: *on == "on",
            },
            ["move", service, node] => Command::SetTarget {
                service: self.service(service),
                target: Some(self.node(node)),
            },
            [verb @ ("start" | "stop"), service] => Command::EnableService {
                service: self.service(service),
                enabled: *verb == "start",
            },
            ["disk-fails", service, volume] => {
                let disk = Some(self.volume(volume));
                self.give_up(service, "its disk failed".to_owned(), disk)
            }
            ["repaired", service, node] => Command::DiskRepaired {
                service: self.service(service),
                node: self.node(node),
            },
            ["fail", service, reason @ ..] => self.give_up(service, reason.join(" "), None),
            ["goodbye", node] => {
                let id = self.node(node);
                Command::Evict {
                    node: id,
                    generation: self.state.nodes[&id].lease.generation,
                    proof: Proof::Goodbye,
                }
            }
            ["place", service, rule, words @ ..] => {
                let service = self.service(service);
                let mut placement = self.state.services[&service].placement.clone();
                self.rule(&mut placement, rule, words);
                Command::SetPlacement { service, placement }
            }
            ["hold", service, reason @ ..] => Command::Hold {
                service: self.service(service),
                reason: Some(reason.join(" ")),
            },
            ["unhold", service] => Command::Hold {
                service: self.service(service),
                reason: None,
            },
            ["remove", service] => Command::RemoveService {
                service: self.service(service),
            },
            ["remove-node", node] => Command::RemoveNode {
                node: self.node(node),
                expect: self.state.voters_version,
            },
            _ => panic!("what is `{line}`?"),
        }
    }

    /// The holder steps down and gives the service up.
    fn give_up(&mut self, service: &str, why: String, disk: Option<VolumeId>) -> Command {
        let service = self.service(service);
        let node = self.state.services[&service].holder.expect("a holder");
        self.demote(service, node);
        Command::Release {
            service,
            node,
            failure: Some(why),
            disk,
        }
    }

    fn change(&self, volume: &str, change: VolumeChange) -> Command {
        let volume = self.volume(volume);
        Command::Volume {
            volume,
            expect: self.state.volumes[&volume].epoch,
            change,
        }
    }

    /// Plans and carries out until nothing changes; writes down what happened and what is
    /// waited for.
    pub(crate) fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            self.report_running();
            let input = self.input();
            let plan = plan(&input);
            self.better_since = plan.better_since(&input);
            let Plan { actions, waits, .. } = plan;
            for action in &actions {
                let words = self.words(&action.command);
                writeln!(self.log, "  plan: {words}\n        {}", action.reason).unwrap();
                self.must(&action.command);
            }
            let held = self.holders_act();
            if actions.is_empty() && !held {
                for wait in waits {
                    writeln!(self.log, "  wait: {}", wait.reason).unwrap();
                }
                let summary = self.summary();
                writeln!(self.log, "  = {summary}").unwrap();
                return;
            }
            // Heartbeats tell of generations as soon as the log does.
            for (id, view) in &mut self.views {
                let generation = self.state.nodes[id].lease.generation;
                if view.generation != generation {
                    view.generation = generation;
                    view.condemned_by.clear();
                }
            }
        }
        panic!("the planner runs in circles:\n{}", self.log);
    }

    /// Plays it through and writes down what came of it; nothing is changed.
    fn what_if(&mut self, node: &str, what: &str) {
        let node = self.node(node);
        let supposed = match what {
            "dies" => Supposed::Dies(node),
            "standby" => Supposed::Standby(node),
            other => panic!("what is `{other}`?"),
        };
        self.report_running();
        let Forecast {
            decides: _,
            steps,
            waits,
            moves,
            remarks,
        } = forecast(&self.input(), supposed);
        let place = |node: Option<NodeId>| {
            node.map_or_else(|| "nowhere".to_owned(), |node| self.state.node_name(node))
        };
        let mut lines: Vec<String> = steps.iter().map(|step| format!("step: {step}")).collect();
        lines.extend(waits.iter().map(|wait| format!("wait: {}", wait.reason)));
        lines.extend(moves.iter().map(|(service, (from, to))| {
            let name = &self.state.services[service].spec.name;
            format!("{name}: {} -> {}", place(*from), place(*to))
        }));
        lines.extend(remarks);
        for line in lines {
            writeln!(self.log, "    {line}").unwrap();
        }
    }

    /// Each node tells which services run there.
    fn report_running(&mut self) {
        for (id, view) in &mut self.views {
            let held =
                self.state.services.values().filter(|service| {
                    service.holder == Some(*id) && !self.slow.contains(&service.id)
                });
            view.running = held.map(|service| service.id).collect();
        }
    }

    /// Holders that live give back what they should and promote what they need.
    fn holders_act(&mut self) -> bool {
        let mut acted = false;
        for id in self.state.services.keys().copied().collect::<Vec<_>>() {
            let service = self.state.services[&id].clone();
            let Some(holder) = service.holder.filter(|holder| self.views[holder].alive) else {
                continue;
            };
            let name = self.state.node_name(holder);
            if let Some(reason) = should_release(&self.state, &self.views, holder, id) {
                self.demote(id, holder);
                self.must(&Command::Release {
                    service: id,
                    node: holder,
                    failure: None,
                    disk: None,
                });
                let service = &service.spec.name;
                writeln!(self.log, "  {name}: gives {service} back\n        {reason}").unwrap();
                acted = true;
                continue;
            }
            for volume in service.spec.volumes() {
                let volume = self.state.volumes[&volume].clone();
                if volume.primary.is_none() {
                    self.must(&Command::Volume {
                        volume: volume.id,
                        expect: volume.epoch,
                        change: VolumeChange::Promote { node: holder },
                    });
                    writeln!(self.log, "  {name}: promotes {}", volume.name).unwrap();
                    acted = true;
                }
            }
        }
        acted
    }

    fn demote(&mut self, service: ServiceId, holder: NodeId) {
        let volumes: Vec<VolumeId> = self.state.services[&service].spec.volumes().collect();
        for volume in volumes {
            let volume = self.state.volumes[&volume].clone();
            if volume.primary == Some(holder) {
                self.must(&Command::Volume {
                    volume: volume.id,
                    expect: volume.epoch,
                    change: VolumeChange::Demote { node: holder },
                });
            }
        }
    }

    fn words(&self, command: &Command) -> String {
        let node = |id: &NodeId| self.state.node_name(*id);
        let service = |id: &ServiceId| self.state.services[id].spec.name.clone();
        match command {
            Command::Evict {
                node: id,
                generation,
                ..
            } => {
                format!("evict {} under {generation}", node(id))
            }
            Command::Readmit {
                node: id,
                generation,
            } => {
                format!("readmit {} after {generation}", node(id))
            }
            Command::Acquire {
                service: s,
                node: id,
            } => {
                format!("give {} to {}", service(s), node(id))
            }
            Command::SetTarget {
                service: s,
                target: None,
            } => {
                format!("drop the wish where {} shall be", service(s))
            }
            Command::Clock { at_s } => format!("the clock is at {at_s} s"),
            Command::ForgetFailure {
                service: s,
                node: id,
                ..
            } => {
                format!("forget that {} gave {} up", node(id), service(s))
            }
            Command::Hold { service: s, .. } => format!("hold {}", service(s)),
            Command::SetTarget {
                service: s,
                target: Some(id),
            } => format!("ask for {} on {}", service(s), node(id)),
            other => format!("{other:?}"),
        }
    }

    fn summary(&self) -> String {
        let mut parts = Vec::new();
        for service in self.state.services.values() {
            let holder = service.holder.map_or_else(
                || "nowhere".to_owned(),
                |holder| format!("on {}", self.state.node_name(holder)),
            );
            parts.push(format!("{} {holder}", service.spec.name));
        }
        for volume in self.state.volumes.values() {
            let names: Vec<String> = volume
                .in_sync
                .iter()
                .map(|id| self.state.node_name(*id))
                .collect();
            let primary = volume
                .primary
                .map_or_else(|| "none".to_owned(), |id| self.state.node_name(id));
            parts.push(format!(
                "volume {} {} primary {primary} in sync {}",
                volume.name,
                volume.epoch,
                names.join(" ")
            ));
        }
        for node in self.state.nodes.values().filter(|node| node.lease.evicted) {
            parts.push(format!("{} evicted", node.spec.name));
        }
        parts.join("; ")
    }
}
