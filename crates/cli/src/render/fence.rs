//! Fencing as text.

use std::fmt::Write as _;

use relevo_server::api::{
    FenceAgentStatus, FenceAgentSummary, FenceCheckStatus, FenceDeviceStatus, FenceHistoryEntry,
    FenceOutlook, FencePower,
};

use super::{
    age, duration_words,
    lists::{finish, table},
};

/// What is known before a node is switched off, for whoever is asked to confirm it.
#[must_use]
pub fn fence_outlook(outlook: &FenceOutlook) -> String {
    let mut text = format!("Node {}:\n", outlook.node);
    for known in &outlook.known {
        text.push_str(&format!("  - {known}\n"));
    }
    for warning in &outlook.warnings {
        text.push_str(&format!("  ! {warning}\n"));
    }
    text
}

/// The devices as a table.
#[must_use]
pub fn fence_devices(devices: &[FenceDeviceStatus]) -> String {
    if devices.is_empty() {
        return "There are no fence devices; `relevo fence device add --help` tells how to add one.\n"
            .to_owned();
    }
    let mut table = table(&["NAME", "WHAT", "NODES", "LEVEL", "WOULD WORK"]);
    for device in devices {
        let nodes: Vec<String> = device
            .targets
            .iter()
            .map(|target| match &target.plug {
                Some(plug) => format!("{}={plug}", target.node),
                None => target.node.clone(),
            })
            .collect();
        let levels: Vec<String> = device
            .targets
            .iter()
            .map(|target| target.level.to_string())
            .collect();
        table.add_row([
            device.name.clone(),
            device.what.clone(),
            nodes.join(" "),
            levels.join(" "),
            works(device),
        ]);
    }
    finish(&table)
}

fn works(device: &FenceDeviceStatus) -> String {
    if device.checks.is_empty() {
        return "-".to_owned();
    }
    let failing: Vec<&str> = device
        .checks
        .iter()
        .filter(|check| check.works == Some(false))
        .map(|check| check.node.as_str())
        .collect();
    if !failing.is_empty() {
        format!("NOT from {}", failing.join(", "))
    } else if device.checks.iter().all(|check| check.works == Some(true)) {
        "yes".to_owned()
    } else {
        "not checked yet".to_owned()
    }
}

/// All of a device but its secrets.
#[must_use]
pub fn fence_device(device: &FenceDeviceStatus, now_unix_ms: u64) -> String {
    let mut text = format!("Fence device {}: {}\n", device.name, device.what);
    // Writing to a String can't fail.
    for target in &device.targets {
        let plug = target
            .plug
            .as_ref()
            .map_or_else(String::new, |plug| format!(", plug {plug}"));
        let delay = match target.delay_ms {
            0 => String::new(),
            ms => format!(", after a delay of {}", duration_words(ms)),
        };
        let _ = writeln!(
            text,
            "  switches off {}{plug}, level {}{delay}",
            target.node, target.level
        );
    }
    if !device.from.is_empty() {
        let _ = writeln!(text, "  used from {}", device.from.join(", "));
    }
    let _ = writeln!(
        text,
        "  an action may take {} s, the power may be on {} s after off, checked every {} s",
        device.action_limit_s, device.verify_limit_s, device.check_every_s
    );
    if device.trust_exit_code {
        text.push_str("  its exit code is proof where it can't be asked for the power\n");
    }
    for (name, value) in &device.parameters {
        let _ = writeln!(text, "  {name} = {value}");
    }
    for check in &device.checks {
        let _ = writeln!(
            text,
            "  from {}: {}",
            check.node,
            check_words(check, now_unix_ms)
        );
    }
    text
}

/// A device in `relevo status`: a line, and one for each node from which it would not work.
pub(super) fn fence_device_line(device: &FenceDeviceStatus, now_unix_ms: u64) -> Vec<String> {
    let nodes: Vec<String> = device
        .targets
        .iter()
        .map(|target| format!("{} (level {})", target.node, target.level))
        .collect();
    let checked = device
        .checks
        .iter()
        .filter_map(|check| check.at_unix_ms)
        .min();
    let checked = match (device.checks.is_empty(), checked) {
        (true, _) => String::new(),
        (false, Some(at)) => format!(", checked {} ago", age(now_unix_ms, at)),
        (false, None) => ", not checked yet".to_owned(),
    };
    let mut lines = vec![format!(
        "{}  {} for {}{checked}",
        device.name,
        device.what,
        nodes.join(", ")
    )];
    let failing = device
        .checks
        .iter()
        .filter(|check| check.works == Some(false));
    lines.extend(
        failing.map(|check| format!("  from {}: {}", check.node, check_words(check, now_unix_ms))),
    );
    lines
}

fn check_words(check: &FenceCheckStatus, now_unix_ms: u64) -> String {
    let since = check.since_unix_ms.map_or_else(String::new, |since| {
        format!(" for {}", age(now_unix_ms, since))
    });
    let at = check.at_unix_ms.map_or_else(String::new, |at| {
        format!(" (checked {} ago)", age(now_unix_ms, at))
    });
    match (check.works, &check.trouble) {
        (Some(true), _) => format!("would work{since}{at}"),
        (Some(false), Some(trouble)) => format!("would NOT work{since}{at}: {trouble}"),
        (Some(false), None) => format!("would NOT work{since}{at}"),
        (None, _) => "not checked yet".to_owned(),
    }
}

/// What devices say of a node's power.
#[must_use]
pub fn fence_power(power: &[FencePower]) -> String {
    let mut text = String::new();
    for device in power {
        let detail = device
            .detail
            .as_ref()
            .map_or_else(String::new, |detail| format!(": {detail}"));
        let _ = writeln!(
            text,
            "{} (level {}): {}{detail}",
            device.device, device.level, device.power
        );
    }
    text
}

/// Attempts and their proofs, the newest last.
#[must_use]
pub fn fence_history(history: &[FenceHistoryEntry], now_unix_ms: u64) -> String {
    if history.is_empty() {
        return "No node was fenced.\n".to_owned();
    }
    let mut text = String::new();
    for entry in history {
        let outcome = match (entry.proved, entry.ended_unix_ms) {
            (true, Some(_)) => "was off",
            (true, None) => "was off; it goes on",
            (false, _) => "NOT fenced",
        };
        let took = entry
            .proved_unix_ms
            .or(entry.ended_unix_ms)
            .map_or_else(String::new, |at| {
                format!(
                    " after {}",
                    duration_words(at.saturating_sub(entry.begun_unix_ms))
                )
            });
        let _ = writeln!(
            text,
            "{} ago: {} ({}) by {}, asked by {}: {outcome}{took}",
            age(now_unix_ms, entry.begun_unix_ms),
            entry.node,
            entry.action,
            entry.by,
            entry.asked
        );
        for line in &entry.how {
            let _ = writeln!(text, "    {line}");
        }
        for line in &entry.remarks {
            let _ = writeln!(text, "  ! {line}");
        }
    }
    text
}

/// The agents as a table.
#[must_use]
pub fn fence_agents(agents: &[FenceAgentSummary]) -> String {
    if agents.is_empty() {
        return "No fence agents are installed on this node; package fence-agents has them.\n"
            .to_owned();
    }
    let mut table = table(&["NAME", "WHAT"]);
    for agent in agents {
        table.add_row([&agent.name, &agent.description]);
    }
    finish(&table)
}

/// What an agent says of itself.
#[must_use]
pub fn fence_agent(agent: &FenceAgentStatus) -> String {
    let mut text = format!("{}: {}\n", agent.name, agent.description);
    if !agent.text.is_empty() && agent.text != agent.description {
        let _ = writeln!(text, "{}", agent.text);
    }
    let _ = writeln!(text, "Actions: {}", agent.actions.join(", "));
    if let Some(unfit) = &agent.unfit {
        let _ = writeln!(text, "NOTE: {unfit}");
    }
    if agent.needs_plug {
        text.push_str("Each node needs its plug: --node NODE=PLUG\n");
    }
    text.push_str("Parameters (--set PARAMETER=VALUE):\n");
    let plug = |name: &str| matches!(name, "plug" | "port" | "nodename" | "delay");
    let shown = agent.parameters.iter().filter(|it| !plug(&it.name));
    for parameter in shown.filter(|it| !it.deprecated) {
        let mut marks = Vec::new();
        if parameter.required {
            marks.push("required".to_owned());
        }
        if parameter.secret {
            marks.push("secret".to_owned());
        }
        if !parameter.choices.is_empty() {
            marks.push(format!("one of {}", parameter.choices.join(", ")));
        }
        if let Some(default) = &parameter.default {
            marks.push(format!("default {default}"));
        }
        let marks = if marks.is_empty() {
            String::new()
        } else {
            format!(" ({})", marks.join("; "))
        };
        let _ = writeln!(
            text,
            "  {:<22} {}{marks}",
            parameter.name, parameter.description
        );
    }
    text
}
