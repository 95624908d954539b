//! Tables and lines: volumes, services, events.

use comfy_table::{Table, presets};
use relevo_server::{
    api::{
        Event, EventKind, EventLevel, NodeStatus, PartState, ServiceState, ServiceStatus,
        VolumeStatus,
    },
    saved::SavedFile,
};
use relevo_types::size::format_size;

use super::{age, clock, status::path_words};

/// The volumes as a table.
#[must_use]
pub fn volume_list(volumes: &[VolumeStatus]) -> String {
    if volumes.is_empty() {
        return "There are no volumes; `relevo volume create NAME --size SIZE` makes one.\n"
            .to_owned();
    }
    let mut table = table(&["NAME", "SIZE", "PRIMARY", "IN SYNC", "REPLICAS", "DEVICE"]);
    for volume in volumes {
        let replicas: Vec<&str> = volume.replicas.iter().map(|r| r.node.as_str()).collect();
        let device = volume.device.as_ref().or(volume.nbd.as_ref());
        table.add_row([
            volume.name.clone(),
            format_size(volume.size),
            volume.primary.clone().unwrap_or_else(|| "-".to_owned()),
            if volume.epoch == 0 {
                "being created".to_owned()
            } else {
                volume.in_sync.join(" ")
            },
            replicas.join(" "),
            device.map_or_else(|| "-".to_owned(), |path| path.display().to_string()),
        ]);
    }
    finish(&table)
}

/// The paths of all nodes as a table.
#[must_use]
pub fn path_list(nodes: &[NodeStatus]) -> String {
    let mut table = table(&["NODE", "PATH", "ADDRESS", "STATE"]);
    for node in nodes {
        for path in &node.paths {
            table.add_row([
                node.name.clone(),
                path.name.clone(),
                path.address.clone(),
                path_words(path),
            ]);
        }
    }
    finish(&table)
}

/// The services as a table.
#[must_use]
pub fn service_list(services: &[ServiceStatus]) -> String {
    if services.is_empty() {
        return "There are no services; `relevo service create --help` tells how to make one.\n"
            .to_owned();
    }
    let mut table = table(&["NAME", "STATE", "NODE", "PARTS"]);
    for service in services {
        let parts: Vec<&str> = service.parts.iter().map(|p| p.part.as_str()).collect();
        table.add_row([
            service.name.clone(),
            service_state(service.state).to_owned(),
            service.node.clone().unwrap_or_else(|| "-".to_owned()),
            parts.join(", "),
        ]);
    }
    finish(&table)
}

/// Files of saved blocks as a table.
#[must_use]
pub fn saved_list(files: &[SavedFile], now_unix_ms: u64) -> String {
    if files.is_empty() {
        return "Nothing is saved on this node: no replica of it gave way with changes of its own.\n"
            .to_owned();
    }
    let mut table = table(&["VOLUME", "AGE", "BLOCKS", "GAVE WAY TO", "STATE", "FILE"]);
    let or_unknown = |text: &str| if text.is_empty() { "?" } else { text }.to_owned();
    for file in files {
        let age = if file.begun_unix_s == 0 {
            "?".to_owned()
        } else {
            age(now_unix_ms, file.begun_unix_s.saturating_mul(1000))
        };
        table.add_row([
            or_unknown(&file.volume),
            age,
            file.blocks.to_string(),
            or_unknown(&file.gave_way_to),
            file.trouble
                .clone()
                .unwrap_or_else(|| "complete".to_owned()),
            file.path.display().to_string(),
        ]);
    }
    finish(&table)
}

/// An event as a line: time, node, what it is about, what happened.
#[must_use]
pub fn event_line(event: &Event) -> String {
    let kind = match event.kind {
        EventKind::Daemon => "daemon",
        EventKind::Cluster => "cluster",
        EventKind::Node => "node",
        EventKind::Path => "path",
        EventKind::Volume => "volume",
        EventKind::Service => "service",
        EventKind::Fence => "fence",
    };
    let about = if event.subject.is_empty() {
        kind.to_owned()
    } else {
        format!("{kind} {}", event.subject)
    };
    let mark = match event.level {
        EventLevel::Info => ' ',
        EventLevel::Warning => '!',
        EventLevel::Alarm => '#',
    };
    format!(
        "{} {mark} {:<10}  {:<16}  {}",
        clock(event.unix_ms),
        event.node,
        about,
        event.text
    )
}

pub(super) const fn service_state(state: ServiceState) -> &'static str {
    match state {
        ServiceState::Running => "running",
        ServiceState::Starting => "starting",
        ServiceState::Stopping => "stopping",
        ServiceState::Stopped => "stopped",
        ServiceState::Waiting => "waiting",
        ServiceState::Unknown => "unknown",
    }
}

pub(super) const fn part_state(state: PartState) -> &'static str {
    match state {
        PartState::Stopped => "stopped",
        PartState::Starting => "starting",
        PartState::Active => "active",
        PartState::Stopping => "stopping",
        PartState::Failed => "failed",
        PartState::Unknown => "unknown",
    }
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

pub(super) fn finish(table: &Table) -> String {
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().trim_start_matches(' ').to_owned() + "\n")
        .collect();
    lines.concat()
}
