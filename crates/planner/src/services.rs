//! Services: who gets one, and who gives one back.

use relevo_types::{
    NodeId, ServiceId,
    cluster::{ClusterState, Command, NodeKind, Service},
};

use crate::{
    Draft, Fitness, PlanInput, Rank, Views, fitness,
    fitness::judge,
    listed, patience,
    placement::{self, named},
};

/// Finds a node for a service that nobody holds; explains what a held one waits for.
pub(crate) fn plan_service(draft: &mut Draft, id: ServiceId, input: &PlanInput) {
    let Some(service) = draft.state.services.get(&id).cloned() else {
        return;
    };
    if !service.enabled {
        return;
    }
    patience::plan_forgetting(draft, &service, input.now_s);
    let Some(service) = draft.state.services.get(&id).cloned() else {
        return;
    };
    match service.holder {
        Some(holder) => {
            explain_held(draft, &service, holder, input);
            patience::plan_failback(draft, &service, holder, input);
        }
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
    if service.hold.is_some() {
        return None;
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
    for other in &service.placement.with {
        let holder = state.services.get(other).and_then(|other| other.holder);
        if let Some(holder) = holder.filter(|holder| *holder != me) {
            return Some(format!(
                "it shall run where {} does, and that is {} now",
                named(state, *other),
                state.node_name(holder)
            ));
        }
    }
    let why = misplaced(state, service, me)?;
    let other = best(state, views, me, service, Some(me))?.node;
    Some(format!("{why}, and {} can take it", state.node_name(other)))
}

/// Why a service should leave a node as soon as another one can take it.
fn misplaced(state: &ClusterState, service: &Service, node: NodeId) -> Option<String> {
    let here = state.nodes.get(&node)?;
    if here.standby {
        return Some(format!("{} is on standby", here.spec.name));
    }
    if let Some(reason) = placement::keeps_from(service, node) {
        return Some(format!("{} {reason}", here.spec.name));
    }
    // Both came here before they were to be apart; the younger one goes.
    let elder = state
        .apart_from(service.id)
        .find(|other| *other < service.id && state.services[other].holder == Some(node))?;
    Some(format!(
        "{} runs {}, from which it is kept apart",
        here.spec.name,
        named(state, elder)
    ))
}

/// A held service that should be elsewhere: what it waits for.
fn explain_held(draft: &mut Draft, service: &Service, holder: NodeId, input: &PlanInput) {
    let state = &draft.state;
    let name = &service.spec.name;
    let here = state.node_name(holder);
    let judge = |node| fitness(state, &input.nodes, input.planner, service.id, node);
    if service.hold.is_some() {
        return;
    }
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
        _ => misplaced(state, service, holder).map(|why| {
            match best(state, &input.nodes, input.planner, service, Some(holder)) {
                Some(to) => format!(
                    "{name}: waits for {here} to stop it, to go to {}",
                    state.node_name(to.node)
                ),
                None => format!(
                    "{name}: stays on {here} though {why}, for no other node can take it: {}",
                    objections(draft, service, input, Some(holder))
                ),
            }
        }),
    };
    if let Some(reason) = reason {
        draft.wait(Some(service.id), reason);
    }
}

/// A service without a holder: the best node gets it.
fn place(draft: &mut Draft, service: &Service, input: &PlanInput) {
    let name = &service.spec.name;
    if let Some(why) = &service.hold {
        let reason = format!(
            "{name}: is held where it is ({why}), and that is nowhere; `relevo service unhold {name}` ends that"
        );
        draft.wait(Some(service.id), reason);
        return;
    }
    if let Some(why) = patience::too_many_moves(service, input.now_s) {
        draft.act(
            Command::Hold {
                service: service.id,
                reason: Some(why.clone()),
            },
            format!("{name}: it is held where it is, for {why}"),
        );
        return;
    }
    if let Some(reason) = placement::waits_for(&draft.state, &input.nodes, service) {
        draft.wait(Some(service.id), format!("{name}: {reason}"));
        return;
    }
    let judge = |node| fitness(&draft.state, &input.nodes, input.planner, service.id, node);
    let Some(Choice {
        rank,
        preference,
        node,
        ..
    }) = best(&draft.state, &input.nodes, input.planner, service, None)
    else {
        let reason = match placement::followed(&draft.state, service) {
            Some((other, there)) => format!(
                "{name}: shall run where {} does, and {} {}",
                named(&draft.state, other),
                draft.state.node_name(there),
                judge(there).words()
            ),
            None => nowhere(draft, service, input),
        };
        draft.wait(Some(service.id), reason);
        return;
    };
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
    if preference < service.placement.prefer.len() {
        reason.push_str(match preference {
            0 => ", and is the one that it prefers",
            _ => ", and is preferred to others",
        });
    }
    match service.target {
        Some(target) if target == node => {
            reason = format!("{name}: it was asked for on {there}, which can run it");
        }
        Some(target) => {
            // The wish is over: a service stays where it is until someone asks again.
            let wish = judge(target).words();
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
    patience::stamp_move(draft, service, input.now_s);
    draft.act(
        Command::Acquire {
            service: service.id,
            node,
        },
        reason,
    );
}

/// What speaks for a node, the most important first: the least one is chosen.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Choice {
    /// It is not where the administrator asked it to be.
    not_wished: bool,
    pub(crate) rank: Rank,
    preference: usize,
    /// Services that shall run on the same node and can't there.
    left_behind: usize,
    /// Services that it has.
    busy: usize,
    pub(crate) node: NodeId,
}

/// The best node for a service, one aside.
pub(crate) fn best(
    state: &ClusterState,
    views: &Views,
    planner: NodeId,
    service: &Service,
    except: Option<NodeId>,
) -> Option<Choice> {
    let followers = |node: NodeId| {
        let unfit = |other: &&Service| {
            let there = judge(state, views, planner, other.id, node, false);
            !matches!(there, Fitness::Fit { .. })
        };
        let follow = |other: &&Service| other.enabled && other.placement.with.contains(&service.id);
        let services = state.services.values();
        services.filter(follow).filter(unfit).count()
    };
    let held = |node: NodeId| {
        let services = state.services.values();
        services.filter(|it| it.holder == Some(node)).count()
    };
    let nodes = state.nodes.keys().copied();
    let choices = nodes
        .filter(|node| Some(*node) != except)
        .filter_map(|node| {
            let Fitness::Fit { rank } = fitness(state, views, planner, service.id, node) else {
                return None;
            };
            Some(Choice {
                not_wished: service.target != Some(node),
                rank,
                preference: service.placement.preference(node),
                left_behind: followers(node),
                busy: held(node),
                node,
            })
        });
    choices.min()
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
    let remedy = format!(
        "fix it and run `relevo service start {name}`; a node tries again by itself {} min after it failed",
        patience::FAILURE_MEMORY_S / 60
    );
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
