//! `why` and `what-if` as text.

use relevo_server::api::{WhatIfAnswer, WhyAnswer};

use super::lists::service_state;

/// Why a service is where it is.
#[must_use]
pub fn why(answer: &WhyAnswer) -> String {
    let service = &answer.service;
    let place = match &service.node {
        Some(node) => format!("{} on {node}", service_state(service.state)),
        None => service_state(service.state).to_owned(),
    };
    let mut lines = vec![format!("{}  {place}", service.name)];
    lines.push(if service.placement.is_empty() {
        "  rules   none: any node that can".to_owned()
    } else {
        format!("  rules   {}", service.placement.join("; "))
    });
    if let Some(reason) = &service.hold {
        lines.push(format!("  held    where it is: {reason}"));
    }
    if let Some(target) = &service.target {
        lines.push(format!("  wished  on {target}"));
    }
    if let Some(wait) = &service.wait {
        lines.push(format!("  waits   {}", wait.why));
    }
    let width = answer.nodes.iter().map(|it| it.node.len()).max();
    for node in &answer.nodes {
        let has_it = if node.has_it { "has it, and " } else { "" };
        lines.push(format!(
            "  {:width$}  {has_it}{}",
            node.node,
            node.verdict,
            width = width.unwrap_or(0)
        ));
    }
    if !answer.decides {
        lines.push(format!(
            "  This is how {} sees it; the leader of the control log decides.",
            answer.judged_by
        ));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// What would come of something.
#[must_use]
pub fn what_if(answer: &WhatIfAnswer) -> String {
    let mut lines = Vec::new();
    let place = |node: &Option<String>| node.clone().unwrap_or_else(|| "nowhere".to_owned());
    for it in &answer.moves {
        lines.push(format!(
            "{}  from {} to {}",
            it.service,
            place(&it.from),
            place(&it.to)
        ));
    }
    if answer.moves.is_empty() && answer.decides {
        lines.push("No service would move.".to_owned());
    }
    let section = |lines: &mut Vec<String>, title: &str, items: &[String]| {
        if !items.is_empty() {
            lines.push(title.to_owned());
            lines.extend(items.iter().map(|item| format!("  {item}")));
        }
    };
    section(&mut lines, "It would be done:", &answer.steps);
    section(&mut lines, "It would have to wait:", &answer.waits);
    section(&mut lines, "Mind:", &answer.remarks);
    lines.push(String::new());
    lines.join("\n")
}
