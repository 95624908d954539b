//! The verdict on a status: what is not as it should be. Pure.

use relevo_membership::PathTrouble;
use relevo_types::BLOCK_SIZE;

use crate::api::{
    ClusterStatus, DiffersStatus, FencingStatus, Health, NodeStatus, PartState, PathCarries,
    PathStatus, ReplicaStatus, ServiceState, ServiceStatus, VolumeStatus,
};

/// The health of a cluster, and a sentence for each thing that is not as it should be.
pub(crate) fn judge(cluster: &ClusterStatus) -> (Health, Vec<String>) {
    let mut findings = Findings::default();
    findings.quorum(cluster);
    for node in &cluster.nodes {
        findings.node(node, node.name == cluster.this_node);
    }
    for volume in &cluster.volumes {
        findings.volume(volume);
    }
    for service in &cluster.services {
        findings.service(service);
    }
    findings.fencing(&cluster.fencing);
    (
        findings.health.unwrap_or(Health::Healthy),
        findings.problems,
    )
}

#[derive(Default)]
struct Findings {
    health: Option<Health>,
    problems: Vec<String>,
}

impl Findings {
    fn add(&mut self, health: Health, problem: String) {
        self.health = self.health.max(Some(health));
        self.problems.push(problem);
    }

    fn quorum(&mut self, cluster: &ClusterStatus) {
        let quorum = &cluster.quorum;
        if quorum.alive < quorum.needed {
            let problem = format!(
                "this node hears {} of {} voters and needs {}: nothing can be decided here",
                quorum.alive, quorum.voters, quorum.needed
            );
            self.add(Health::Down, problem);
        } else if !quorum.lease.held {
            let problem = "this node has no lease: it runs nothing".to_owned();
            self.add(Health::Down, problem);
        }
        if quorum.alive == quorum.needed && quorum.alive < quorum.voters {
            let problem = format!(
                "{} of {} voters are alive and {} are needed: the next loss stops the cluster until a voter is back",
                quorum.alive, quorum.voters, quorum.needed
            );
            self.add(Health::Degraded, problem);
        }
        if quorum.leader.is_none() {
            let problem = "the control log has no leader: nothing can be changed now".to_owned();
            self.add(Health::Degraded, problem);
        }
    }

    fn node(&mut self, node: &NodeStatus, this: bool) {
        let name = &node.name;
        if !this && node.state != "alive" {
            self.add(Health::Degraded, format!("node {name} is {}", node.state));
        } else if node.evicted {
            let problem = format!("node {name} was evicted and is not readmitted yet");
            self.add(Health::Degraded, problem);
        } else if !node.voter {
            let problem = format!("node {name} has no vote yet: it is catching up");
            self.add(Health::Degraded, problem);
        }
        self.paths(node, this);
    }

    /// The loss of a path moves nothing, and leaves one way less.
    fn paths(&mut self, node: &NodeStatus, this: bool) {
        let name = &node.name;
        for path in &node.paths {
            if let Some(why) = &path.unusable {
                let whose = if this { "this node" } else { name };
                let problem = format!("{whose} can't use its path {}: {why}", path.name);
                self.add(Health::Degraded, problem);
            }
        }
        if this || node.state != "alive" {
            return;
        }
        let up = |path: &&PathStatus| path.up == Some(true);
        let left: Vec<&str> = node
            .paths
            .iter()
            .filter(up)
            .map(|path| path.name.as_str())
            .collect();
        let networks = || {
            node.paths
                .iter()
                .filter(|path| path.carries == PathCarries::All)
        };
        // All is said with one word then.
        let cut_off = networks().next().is_some() && networks().all(|path| path.up == Some(false));
        if cut_off {
            let cut: Vec<&str> = networks().map(|path| path.name.as_str()).collect();
            let problem = format!(
                "node {name} is heard on {} alone, which carries heartbeats and nothing else: nothing can be replicated to it or decided with it from here. It counts as alive, so nothing it has is taken over; a primary without it and without a majority waits. Repair a network to it ({})",
                left.join(", "),
                cut.join(", ")
            );
            self.add(Health::Degraded, problem);
        }
        for path in &node.paths {
            let problem = match path.trouble {
                Some(PathTrouble::Down) if cut_off && path.carries == PathCarries::All => continue,
                Some(PathTrouble::Down) if path.up == Some(true) => format!(
                    "path {} to node {name} was down and is back; this ends when it has held for ten heartbeats",
                    path.name
                ),
                Some(PathTrouble::Down) => {
                    let next = match left.as_slice() {
                        [one] => format!("if {one} is lost too, node {name} counts as dead"),
                        _ => "nothing moves for it".to_owned(),
                    };
                    format!(
                        "path {} to node {name} is down: {next}; look at its cable, interface and switch there and here, and at what filters packets",
                        path.name
                    )
                }
                Some(PathTrouble::Loss) => format!(
                    "path {} to node {name} loses {} % of the heartbeats: what goes over it is slow; look at its cable, interface and switch, and at whether it is overloaded",
                    path.name, path.loss_percent
                ),
                None => continue,
            };
            self.add(Health::Degraded, problem);
        }
    }

    fn fencing(&mut self, fencing: &FencingStatus) {
        for device in &fencing.devices {
            for check in &device.checks {
                if let Some(trouble) = &check.trouble {
                    let problem = format!(
                        "fence device {} would not work from {}: {trouble}",
                        device.name, check.node
                    );
                    self.add(Health::Degraded, problem);
                }
            }
            if device.from.is_empty() && device.what != "a person" {
                let problem = format!("no node may use fence device {}", device.name);
                self.add(Health::Degraded, problem);
            }
        }
        for node in &fencing.nodes_without {
            let problem = format!(
                "node {node} has no fence device, and others have; `relevo fence device add` adds one"
            );
            self.add(Health::Degraded, problem);
        }
        for attempt in &fencing.attempts {
            let problem = format!(
                "node {} is being fenced: {} {}",
                attempt.node, attempt.by, attempt.doing
            );
            self.add(Health::Degraded, problem);
        }
    }

    fn differs(&mut self, volume: &VolumeStatus, node: &str, differs: &DiffersStatus) {
        let (name, from) = (&volume.name, &differs.from);
        let places = differs.places.len();
        let what = format!(
            "the replicas of volume {name} on {node} and {from} differ in {} bytes at {places} places",
            differs.bytes
        );
        let next = if differs.repair {
            format!("{node} is being given what the primary has")
        } else if volume.primary.as_deref() == Some(node) {
            format!(
                "{node} is primary now, and which of the two is right is not known: look at its data, then `relevo verify {name} --repair` here copies it, or move the service to {from} first"
            )
        } else {
            format!(
                "which of the two is right is not known: `relevo verify {name} --repair` on the primary copies its data, and until then others are preferred to {node}"
            )
        };
        self.add(Health::Degraded, format!("{what}; {next}"));
    }

    fn volume(&mut self, volume: &VolumeStatus) {
        let name = &volume.name;
        if volume.epoch == 0 {
            let problem = format!("volume {name} is being created");
            return self.add(Health::Degraded, problem);
        }
        for replica in &volume.replicas {
            let node = &replica.node;
            if replica.disk.as_deref() == Some("Failed") {
                let problem = format!("the replica of volume {name} on {node} failed");
                self.add(Health::Degraded, problem);
            } else if !volume.in_sync.contains(node) && !follows(replica) {
                let progress = match replica.sync_percent {
                    Some(percent) => format!("; its resync is {percent} % done"),
                    None => String::new(),
                };
                let problem =
                    format!("the replica of volume {name} on {node} is not in sync{progress}");
                self.add(Health::Degraded, problem);
            }
            if let Some(differs) = &replica.differs {
                self.differs(volume, node, differs);
            }
        }
        for split in &volume.splits {
            let (node, peer) = (&split.node, &split.peer);
            let problem = format!(
                "SPLIT BRAIN of volume {name}: its replicas on {node} and {peer} were both changed while they were apart: only {node} has {}, only {peer} has {}. Nothing is replicated between them ({}). `relevo volume resolve {name} --keep {node}` or `relevo volume resolve {name} --keep {peer}` decides; what only the other one has is saved before it is overwritten",
                side_words(split.blocks),
                side_words(split.peer_blocks),
                split.why
            );
            self.add(Health::Degraded, problem);
        }
        let alone = volume.in_sync.len() == 1 && volume.replicas.len() > 1;
        if alone
            && let (Some(primary), true) = (&volume.primary, volume.replicas.iter().any(follows))
        {
            let problem = format!(
                "no other replica has acknowledged data of volume {name}: if {primary} is lost, what its replicas of protocol A lack is lost too"
            );
            self.add(Health::Degraded, problem);
        }
        if let Some(wait) = &volume.wait {
            let problem = format!("volume {name} waits: {}", wait.why);
            self.add(Health::Degraded, problem);
        }
    }

    fn service(&mut self, service: &ServiceStatus) {
        let name = &service.name;
        if service.enabled && service.state != ServiceState::Running {
            let state = match service.state {
                ServiceState::Starting => "is being started",
                ServiceState::Stopping => "is being stopped",
                ServiceState::Unknown => "is on a node that does not answer",
                ServiceState::Running | ServiceState::Stopped | ServiceState::Waiting => {
                    "does not run"
                }
            };
            let why = match &service.wait {
                Some(wait) => format!(": {}", wait.why),
                None => String::new(),
            };
            self.add(Health::Down, format!("service {name} {state}{why}"));
        }
        for failure in &service.failures {
            let problem = format!(
                "service {name} failed on {}: {}",
                failure.node, failure.reason
            );
            self.add(Health::Degraded, problem);
        }
        if service.state == ServiceState::Running {
            for part in &service.parts {
                if matches!(part.state, PartState::Active | PartState::Unknown) {
                    continue;
                }
                let detail = part.detail.as_deref().unwrap_or("it is not active");
                let problem = format!("{} of service {name}: {detail}", part.part);
                self.add(Health::Degraded, problem);
            }
        }
    }
}

/// How much of it a replica has alone: `1.2 MiB (300 blocks of 4 KiB)`.
pub(crate) fn side_words(blocks: u64) -> String {
    let tenths = blocks.saturating_mul(BLOCK_SIZE).saturating_mul(10) >> 20;
    let (whole, tenths) = (tenths / 10, tenths % 10);
    format!("{whole}.{tenths} MiB ({blocks} blocks of 4 KiB)")
}

/// A replica of protocol A that does what it shall: it is never in sync, and gets every write.
fn follows(replica: &ReplicaStatus) -> bool {
    replica.follows()
}
