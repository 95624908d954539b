//! Services: who gets one, and who gives one back.

use relevo_types::{
    NodeId, ServiceId,
    cluster::{ClusterState, Command, NodeKind, Service},
};

use crate::{Draft, Fitness, PlanInput, Rank, Views, fitness, listed};

/// Finds a node for a service that nobody holds; explains what a held one waits for.
pub(crate) fn plan_service(draft: &mut Draft, id: ServiceId, input: &PlanInput) {
    let Some(service) = draft.state.services.get(&id).cloned() else {
        return;
    };
    if !service.enabled {
        return;
    }
    match service.holder {
        Some(holder) => explain_held(draft, &service, holder, input),
        None => place(draft, &service, input),
    }
}

/// Whether the holder of a service should give it back now, and why. Called by the holder with
/// its own view; `None`: it stays.
#[must_use]
pub fn should_release(
    state: &ClusterState,
    views: &Views,
    me: NodeId,
    service: ServiceId,
) -> Option<String> {
    let Some(service) = state.services.get(&service) else {
        return Some("the service was removed".to_owned());
    };
    if !service.enabled {
        return Some("it was stopped with `relevo service stop`".to_owned());
    }
    let judge = |node| fitness(state, views, me, service.id, node);
    if let Some(target) = service.target.filter(|target| *target != me)
        && matches!(judge(target), Fitness::Fit { .. })
    {
        return Some(format!(
            "it was asked to move to {}",
            state.node_name(target)
        ));
    }
    let here = state.nodes.get(&me).filter(|here| here.standby)?;
    let other = state
        .nodes
        .keys()
        .find(|node| **node != me && matches!(judge(**node), Fitness::Fit { .. }))?;
    Some(format!(
        "{} is on standby, and {} can take it",
        here.spec.name,
        state.node_name(*other)
    ))
}

/// A held service that should be elsewhere: what it waits for.
fn explain_held(draft: &mut Draft, service: &Service, holder: NodeId, input: &PlanInput) {
    let state = &draft.state;
    let name = &service.spec.name;
    let here = state.node_name(holder);
    let judge = |node| fitness(state, &input.nodes, input.planner, service.id, node);
    let reason = match service.target {
        Some(target) if target != holder => {
            let there = state.node_name(target);
            match judge(target) {
                Fitness::Fit { .. } => Some(format!(
                    "{name}: waits for {here} to stop it, to go to {there}"
                )),
                Fitness::Failed { reason } => Some(format!(
                    "{name}: stays on {here}, for it failed on {there} ({reason}); fix it and \
                     ask again with `relevo service move {name} {there}`"
                )),
                Fitness::Unfit { reason } | Fitness::Never { reason } => Some(format!(
                    "{name}: stays on {here} until {there} can take it: {there} {reason}"
                )),
            }
        }
        _ if state.nodes.get(&holder).is_some_and(|node| node.standby) => {
            let fit =
                |node: &&NodeId| **node != holder && matches!(judge(**node), Fitness::Fit { .. });
            Some(match state.nodes.keys().find(fit) {
                Some(to) => format!(
                    "{name}: waits for {here} to stop it, to go to {}",
                    state.node_name(*to)
                ),
                None => format!(
                    "{name}: stays on {here} though that is on standby, for no other node can \
                     take it: {}",
                    objections(draft, service, input, Some(holder))
                ),
            })
        }
        _ => None,
    };
    if let Some(reason) = reason {
        draft.wait(Some(service.id), reason);
    }
}

/// A service without a holder: the best node gets it.
fn place(draft: &mut Draft, service: &Service, input: &PlanInput) {
    let judge = |node| fitness(&draft.state, &input.nodes, input.planner, service.id, node);
    let mut fit: Vec<(bool, Rank, NodeId)> = Vec::new();
    for node in draft.state.nodes.keys().copied() {
        if let Fitness::Fit { rank } = judge(node) {
            fit.push((service.target != Some(node), rank, node));
        }
    }
    let Some((_, rank, node)) = fit.into_iter().min() else {
        let reason = nowhere(draft, service, input);
        draft.wait(Some(service.id), reason);
        return;
    };
    let name = &service.spec.name;
    let there = draft.state.node_name(node);
    let mut reason = match rank {
        Rank::Certain => format!("{name}: {there} can run it"),
        Rank::Uncertain => format!("{name}: {there} can run it, after an unclean stop"),
        Rank::Attaching => format!("{name}: {there} can run it once its disks are attached"),
        Rank::Differs => format!(
            "{name}: {there} can run it and no better node can, but verification found its \
             replica to differ from another one"
        ),
    };
    match service.target {
        Some(target) if target == node => {
            reason = format!("{name}: it was asked for on {there}, which can run it");
        }
        Some(target) => {
            // The wish is over: a service stays where it is until someone asks again.
            let wish = judge_in_words(&judge(target));
            let gone = draft.state.node_name(target);
            draft.act(
                Command::SetTarget {
                    service: service.id,
                    target: None,
                },
                format!("{name}: it goes to {there} and stays, for {gone} {wish}"),
            );
        }
        None => {}
    }
    draft.act(
        Command::Acquire {
            service: service.id,
            node,
        },
        reason,
    );
}

fn judge_in_words(fitness: &Fitness) -> String {
    match fitness {
        Fitness::Fit { .. } => "can run it".to_owned(),
        Fitness::Failed { reason } => format!("gave it up ({reason})"),
        Fitness::Unfit { reason } | Fitness::Never { reason } => reason.clone(),
    }
}

/// Why no node can run a service, and what a person can do.
fn nowhere(draft: &Draft, service: &Service, input: &PlanInput) -> String {
    let name = &service.spec.name;
    let judged: Vec<(NodeId, Fitness)> = draft
        .state
        .nodes
        .keys()
        .map(|node| {
            let fitness = fitness(&draft.state, &input.nodes, input.planner, service.id, *node);
            (*node, fitness)
        })
        .filter(|(_, fitness)| !matches!(fitness, Fitness::Never { .. }))
        .collect();
    let failed: Vec<String> = judged
        .iter()
        .filter_map(|(node, fitness)| match fitness {
            Fitness::Failed { reason } => {
                Some(format!("{} ({reason})", draft.state.node_name(*node)))
            }
            _ => None,
        })
        .collect();
    if failed.is_empty() {
        return format!(
            "{name}: waits for a node that can run it: {}",
            objections(draft, service, input, None)
        );
    }
    let remedy = format!("fix it and run `relevo service start {name}`");
    if failed.len() == judged.len() {
        format!("{name}: failed on {}; {remedy}", listed(&failed))
    } else {
        format!(
            "{name}: failed on {}, and {}; {remedy}",
            listed(&failed),
            objections(draft, service, input, None)
        )
    }
}

/// What speaks against each node but `except`, in a sentence.
fn objections(
    draft: &Draft,
    service: &Service,
    input: &PlanInput,
    except: Option<NodeId>,
) -> String {
    let state = &draft.state;
    let mut words = Vec::new();
    let mut never = Vec::new();
    for (id, node) in &state.nodes {
        if Some(*id) == except {
            continue;
        }
        match fitness(state, &input.nodes, input.planner, service.id, *id) {
            Fitness::Unfit { reason } => words.push(format!("{} {reason}", node.spec.name)),
            Fitness::Failed { reason } if except.is_some() => {
                words.push(format!("{} gave it up ({reason})", node.spec.name));
            }
            Fitness::Never { reason } if node.spec.kind == NodeKind::Data => {
                never.push(format!("{} {reason}", node.spec.name));
            }
            Fitness::Fit { .. } | Fitness::Failed { .. } | Fitness::Never { .. } => {}
        }
    }
    if words.is_empty() {
        words = never;
    }
    if words.is_empty() {
        "there is no other data node".to_owned()
    } else {
        listed(&words)
    }
}
