//! `relevo status` as text that explains itself.

use std::fmt::Write as _;

use relevo_server::api::{
    ClusterStatus, Health, NodeStatus, PathCarries, PathStatus, QuorumStatus, ReplicaStatus,
    ServiceState, ServiceStatus, Status, VolumeStatus, WaitStatus,
};
use relevo_types::{Sensitivity, cluster::NodeKind, size::format_size};

use super::{
    age,
    fence::fence_device_line,
    lists::{part_state, service_state},
};

/// The whole of `relevo status`.
#[must_use]
pub fn status(status: &Status, now_unix_ms: u64) -> String {
    let mut page = Page {
        text: String::new(),
        now_unix_ms,
    };
    match &status.cluster {
        None => page.line(
            0,
            "This machine belongs to no cluster. `relevo init --name NAME` starts one, `relevo join TOKEN` joins one.",
        ),
        Some(cluster) => page.cluster(status, cluster),
    }
    page.text
}

struct Page {
    text: String,
    now_unix_ms: u64,
}

impl Page {
    fn line(&mut self, indent: usize, text: &str) {
        // Writing to a String can't fail.
        let _ = writeln!(self.text, "{:indent$}{text}", "");
    }

    fn cluster(&mut self, status: &Status, cluster: &ClusterStatus) {
        self.line(
            0,
            &format!(
                "Cluster {}: {}. This is node {}, relevo {}, up for {}.",
                cluster.name,
                verdict(status.health),
                cluster.this_node,
                status.daemon.version,
                age(self.now_unix_ms, status.daemon.started_unix_ms),
            ),
        );
        for problem in &status.problems {
            self.line(2, &format!("! {problem}"));
        }
        self.quorum(&cluster.quorum, cluster.sensitivity);
        for wait in &cluster.waits {
            self.wait(2, wait);
        }
        self.line(0, "");
        self.line(0, "Nodes");
        let width = widest(cluster.nodes.iter().map(|node| node.name.as_str()));
        for node in &cluster.nodes {
            self.node(node, node.name == cluster.this_node, width);
        }
        self.line(0, "");
        if cluster.volumes.is_empty() {
            self.line(0, "No volumes.");
        } else {
            self.line(0, "Volumes");
        }
        for volume in &cluster.volumes {
            self.volume(volume);
        }
        self.line(0, "");
        if cluster.services.is_empty() {
            self.line(0, "No services.");
        } else {
            self.line(0, "Services");
        }
        for service in &cluster.services {
            self.service(service);
        }
        if !cluster.fencing.devices.is_empty() {
            self.line(0, "");
            self.line(0, "Fencing");
        }
        for device in &cluster.fencing.devices {
            for line in fence_device_line(device, self.now_unix_ms) {
                self.line(2, &line);
            }
        }
        for attempt in &cluster.fencing.attempts {
            let since = age(self.now_unix_ms, attempt.since_unix_ms);
            let text = format!(
                "{} is being fenced by {} (for {since}): it {}",
                attempt.node, attempt.by, attempt.doing
            );
            self.line(2, &text);
        }
    }

    fn quorum(&mut self, quorum: &QuorumStatus, sensitivity: Sensitivity) {
        let majority = if quorum.alive >= quorum.needed {
            "a majority"
        } else {
            "NO majority: nothing can be decided"
        };
        let leader = quorum.leader.as_ref().map_or_else(
            || "no leader of the control log".to_owned(),
            |leader| format!("{leader} leads the control log"),
        );
        let lease = if quorum.lease.held {
            format!("this node's lease holds ({} ms left)", quorum.lease.left_ms)
        } else {
            "this node has NO lease: it runs nothing".to_owned()
        };
        self.line(
            0,
            &format!(
                "Quorum: {} of {} votes alive, {} needed: {majority}; {leader}; {lease}.",
                quorum.alive, quorum.voters, quorum.needed
            ),
        );
        let dead = sensitivity.timing().dead;
        self.line(
            0,
            &format!(
                "Sensitivity {}: a machine that is silent on all paths for {} is dead.",
                sensitivity_word(sensitivity),
                super::duration_words(u64::try_from(dead.as_millis()).unwrap_or(u64::MAX))
            ),
        );
    }

    fn node(&mut self, node: &NodeStatus, this: bool, width: usize) {
        let mut words = vec![if this {
            "alive (this node)".to_owned()
        } else {
            node.state.clone()
        }];
        if let Some(since) = node.since_unix_ms.filter(|_| !this) {
            words.push(format!("for {}", age(self.now_unix_ms, since)));
        }
        if node.kind == NodeKind::Witness {
            words.push("(witness)".to_owned());
        }
        if !node.voter {
            words.push("- no vote yet: it is catching up".to_owned());
        }
        if node.standby {
            words.push("- standby: services leave it".to_owned());
        }
        if node.evicted {
            words.push("- evicted: what it held was taken from it".to_owned());
        }
        self.line(2, &format!("{:width$}  {}", node.name, words.join(" ")));
        if let Some(reason) = &node.reason {
            self.line(4 + width, reason);
        }
        let path_width = widest(node.paths.iter().map(|path| path.name.as_str()));
        let address_width = widest(node.paths.iter().map(|path| path.address.as_str()));
        for path in &node.paths {
            let text = format!(
                "path {:path_width$}  {:address_width$}  {}",
                path.name,
                path.address,
                path_words(path)
            );
            self.line(4 + width, text.trim_end());
        }
    }

    fn volume(&mut self, volume: &VolumeStatus) {
        let primary = match (&volume.primary, &volume.tended_by) {
            (Some(node), _) => format!("primary on {node}"),
            (None, Some(node)) => format!("no primary ({node} brings the others up to date)"),
            (None, None) => "no primary".to_owned(),
        };
        let in_sync = if volume.epoch == 0 {
            "being created".to_owned()
        } else {
            format!("in sync: {}", volume.in_sync.join(" "))
        };
        self.line(
            2,
            &format!(
                "{}  {}, {primary}, {in_sync} (epoch {})",
                volume.name,
                format_size(volume.size),
                volume.epoch
            ),
        );
        let width = widest(volume.replicas.iter().map(|replica| replica.node.as_str()));
        for replica in &volume.replicas {
            self.replica(replica, width);
        }
        if let Some(device) = &volume.device {
            self.line(4, &format!("device {}", device.display()));
        }
        if let Some(nbd) = &volume.nbd {
            self.line(4, &format!("nbd    {}", nbd.display()));
        }
        if let Some(wait) = &volume.wait {
            self.wait(4, wait);
        }
    }

    fn replica(&mut self, replica: &ReplicaStatus, width: usize) {
        let mut words = vec![
            format!("{:<9}", replica.role),
            replica
                .disk
                .clone()
                .unwrap_or_else(|| "disk state unknown".to_owned()),
        ];
        words.extend(replica.replication.clone());
        if let Some(first) = &replica.sync_after {
            words.push(format!("(after volume {first})"));
        }
        if let Some(protocol) = replica.protocol.as_ref().filter(|name| *name != "C") {
            words.push(format!("protocol {protocol}"));
        }
        if let (Some(bytes), Some(ms)) = (replica.behind_bytes, replica.behind_ms)
            && bytes > 0
        {
            let (s, tenths) = (ms / 1000, ms % 1000 / 100);
            words.push(format!(
                "behind by {} and {s}.{tenths} s",
                format_size(bytes)
            ));
        } else if let Some(dirty) = replica.dirty_bytes.filter(|dirty| *dirty > 0) {
            words.push(format!("lacks {}", format_size(dirty)));
        }
        if let Some(percent) = replica.sync_percent {
            words.push(format!("{percent} % done"));
        }
        if let Some(speed) = replica.sync_bytes_per_s {
            words.push(format!("at {}/s", format_size(speed)));
            if let Some(limit) = replica.sync_limit_bytes_per_s {
                words.push(format!("(held to {}/s)", format_size(limit)));
            }
            if let Some(same) = replica.sync_same_bytes {
                words.push(format!("{} were the same", format_size(same)));
            }
        }
        if let Some(left) = replica.sync_left_s {
            let left = super::duration_words(left.saturating_mul(1000));
            words.push(format!("{left} left"));
        }
        if let Some(differs) = &replica.differs {
            words.push(format!(
                "DIFFERS from {} in {} at {} places",
                differs.from,
                format_size(differs.bytes),
                differs.places.len()
            ));
        }
        if let Some(driver) = &replica.driver {
            words.push(format!("({driver})"));
        }
        if let Some(backing) = &replica.backing {
            words.push(backing.display().to_string());
        }
        self.line(4, &format!("{:width$}  {}", replica.node, words.join(" ")));
        if let Some(remark) = &replica.remark {
            self.line(6 + width, remark);
        }
    }

    fn service(&mut self, service: &ServiceStatus) {
        let place = match (service.state, &service.node) {
            (ServiceState::Unknown, Some(node)) => {
                format!("held by {node}, which does not answer")
            }
            (state, Some(node)) => format!("{} on {node}", service_state(state)),
            (state, None) => service_state(state).to_owned(),
        };
        let target = match &service.target {
            Some(target) if service.node.as_ref() != Some(target) => {
                format!(", asked to be on {target}")
            }
            _ => String::new(),
        };
        let disabled = if service.enabled || service.state == ServiceState::Stopped {
            ""
        } else {
            ", asked to stop"
        };
        self.line(2, &format!("{}  {place}{target}{disabled}", service.name));
        let width = widest(service.parts.iter().map(|part| part.part.as_str()));
        for part in &service.parts {
            let detail = part
                .detail
                .as_ref()
                .map_or_else(String::new, |d| format!("  {d}"));
            self.line(
                4,
                &format!("{:width$}  {}{detail}", part.part, part_state(part.state)),
            );
        }
        for failure in &service.failures {
            let times = if failure.count == 1 {
                "once".to_owned()
            } else {
                format!("{} times", failure.count)
            };
            self.line(
                4,
                &format!(
                    "{} gave it up {times}: {}; `relevo service start {}` tries it there again",
                    failure.node, failure.reason, service.name
                ),
            );
        }
        if let Some(reason) = &service.hold {
            self.line(
                4,
                &format!(
                    "held where it is: {reason}; `relevo service unhold {}` ends that",
                    service.name
                ),
            );
        }
        if let Some(wait) = &service.wait {
            self.wait(4, wait);
        }
    }

    fn wait(&mut self, indent: usize, wait: &WaitStatus) {
        let since = wait.since_unix_ms.map_or_else(String::new, |since| {
            format!(" (for {})", age(self.now_unix_ms, since))
        });
        self.line(
            indent,
            &format!("waits: {}: {}{since}", wait.what, wait.why),
        );
        if let Some(next) = &wait.next {
            self.line(indent + 2, &format!("next: {next}"));
        }
    }
}

pub(super) fn path_words(path: &PathStatus) -> String {
    if let Some(why) = &path.unusable {
        return format!("UNUSABLE: {why}");
    }
    let mut words = match path.up {
        None if path.carries == PathCarries::Heartbeats => return "heartbeats only".to_owned(),
        None => return String::new(),
        Some(true) => "up".to_owned(),
        Some(false) => return "DOWN: no heartbeats arrive".to_owned(),
    };
    let ms = |us: u32| format!("{}.{:02} ms", us / 1000, us % 1000 / 10);
    if let Some(us) = path.round_trip_us {
        let _ = write!(words, ", round trip {}", ms(us));
    }
    if let Some(us) = path.jitter_us {
        let _ = write!(words, ", jitter {}", ms(us));
    }
    if path.loss_percent > 0 {
        let _ = write!(words, ", {} % of heartbeats lost", path.loss_percent);
    }
    if path.carries == PathCarries::Heartbeats {
        words.push_str(", heartbeats only");
    }
    words
}

const fn verdict(health: Health) -> &'static str {
    match health {
        Health::Healthy => "healthy",
        Health::Degraded => "DEGRADED",
        Health::Down => "DOWN",
    }
}

const fn sensitivity_word(sensitivity: Sensitivity) -> &'static str {
    match sensitivity {
        Sensitivity::Fast => "fast",
        Sensitivity::Normal => "normal",
        Sensitivity::Patient => "patient",
    }
}

fn widest<'a>(words: impl Iterator<Item = &'a str>) -> usize {
    words.map(|word| word.chars().count()).max().unwrap_or(0)
}
