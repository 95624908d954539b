//! What would happen if: the same planner on a supposed state.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{
    NodeId, ServiceId,
    cluster::{ClusterState, Command, VolumeChange},
};
use serde::{Deserialize, Serialize};

use crate::{PlanInput, Wait, names, plan, should_release};

/// Rounds of planning and acting at most; a planner that needs more runs in circles.
const ROUNDS_MAX: usize = 16;

/// What is supposed to happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Supposed {
    /// A node loses its power.
    Dies(NodeId),
    /// A node is put on standby.
    Standby(NodeId),
}

/// What would come of it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Forecast {
    /// Enough voters would be left to decide anything.
    pub decides: bool,
    /// What would be done, in order, each with its reason.
    pub steps: Vec<String>,
    /// What would have to wait.
    pub waits: Vec<Wait>,
    /// The services that are somewhere else after it: before, after.
    pub moves: BTreeMap<ServiceId, (Option<NodeId>, Option<NodeId>)>,
    /// What else is to be known: redundancy that would be gone.
    pub remarks: Vec<String>,
}

/// Plays it through on what the planner sees now. Nodes are supposed to do at once what they are told, and all of
/// it to succeed.
#[must_use]
pub fn forecast(input: &PlanInput, supposed: Supposed) -> Forecast {
    let mut world = input.clone();
    let mut forecast = Forecast::default();
    match supposed {
        Supposed::Dies(node) => die(&mut world, node),
        Supposed::Standby(node) => {
            let standby = Command::SetStandby {
                node,
                standby: true,
            };
            if let Err(rejection) = world.state.apply(&standby) {
                forecast.remarks.push(rejection.to_string());
                return forecast;
            }
        }
    }
    let voters: Vec<NodeId> = world.state.voters().collect();
    let left: Vec<NodeId> = voters
        .iter()
        .copied()
        .filter(|voter| world.nodes.get(voter).is_some_and(|view| view.alive))
        .collect();
    forecast.decides = left.len() >= world.state.majority();
    if !forecast.decides {
        forecast.remarks.push(format!(
            "{} of {} voters would be left ({}), and {} are needed: nothing could be decided, and leases would end \
             with the services that need them{}",
            left.len(),
            voters.len(),
            names(&world.state, &left),
            world.state.majority(),
            if voters.len() == 2 {
                "; a witness on a third machine prevents that"
            } else {
                ""
            }
        ));
        return forecast;
    }
    if left.len() == world.state.majority() {
        forecast.remarks.push(format!(
            "the last majority: without one more of {} nothing could be decided",
            names(&world.state, &left)
        ));
    }
    settle(&mut world, &mut forecast);
    for (id, after) in &world.state.services {
        let before = input.state.services.get(id).and_then(|it| it.holder);
        if before != after.holder {
            forecast.moves.insert(*id, (before, after.holder));
        }
    }
    for volume in world.state.volumes.values().filter(|it| it.is_created()) {
        let alive = |node: &&NodeId| world.nodes.get(*node).is_some_and(|view| view.alive);
        let whole: Vec<NodeId> = volume.in_sync.iter().filter(alive).copied().collect();
        match whole.as_slice() {
            [] => forecast.remarks.push(format!(
                "volume `{}` would be out of reach: no replica in sync is left",
                volume.name
            )),
            [only] if volume.replicas.len() > 1 => forecast.remarks.push(format!(
                "volume `{}` would have a single replica in sync, on {}",
                volume.name,
                world.state.node_name(*only)
            )),
            _ => {}
        }
    }
    forecast
}

/// The node is silent for long enough, every other voter condemned it, and another one plans.
fn die(world: &mut PlanInput, node: NodeId) {
    let others: Vec<NodeId> = world
        .state
        .voters()
        .filter(|voter| *voter != node)
        .filter(|voter| world.nodes.get(voter).is_some_and(|view| view.alive))
        .collect();
    for view in world.nodes.values_mut() {
        view.heard_by.retain(|hearer| *hearer != node);
    }
    let generation = world.state.nodes.get(&node).map(|it| it.lease.generation);
    if let (Some(view), Some(generation)) = (world.nodes.get_mut(&node), generation) {
        view.alive = false;
        view.silent_for = Some(Duration::from_secs(1));
        view.heard_by.clear();
        view.generation = generation;
        view.condemned_by.clone_from(&others);
    }
    if world.planner == node
        && let Some(other) = others.first()
    {
        world.planner = *other;
    }
}

/// Plans, and nodes do what they are told, until nothing changes.
fn settle(world: &mut PlanInput, forecast: &mut Forecast) {
    for _ in 0..ROUNDS_MAX {
        let planned = plan(world);
        let idle = planned.actions.is_empty();
        for action in planned.actions {
            // The planner checked it against the state that the actions before it leave.
            if world.state.apply(&action.command).is_ok() {
                forecast.steps.push(action.reason);
            }
        }
        if !act(world, forecast) && idle {
            forecast.waits = planned.waits;
            return;
        }
    }
    let endless = "the planner would not come to rest: report this as a bug";
    forecast.remarks.push(endless.to_owned());
}

/// Holders give back what they should; those that hold something are primary and run it.
fn act(world: &mut PlanInput, forecast: &mut Forecast) -> bool {
    let mut acted = false;
    let held: Vec<(ServiceId, NodeId)> = world
        .state
        .services
        .values()
        .filter_map(|service| Some((service.id, service.holder?)))
        .filter(|(_, holder)| world.nodes.get(holder).is_some_and(|view| view.alive))
        .collect();
    for (id, holder) in held {
        let gives_back = should_release(&world.state, &world.nodes, holder, id);
        if let Some(reason) = &gives_back {
            let name = &world.state.services[&id].spec.name;
            let here = world.state.node_name(holder);
            forecast
                .steps
                .push(format!("{name}: {here} gives it back, for {reason}"));
        }
        acted |= change_roles(&mut world.state, id, holder, gives_back.is_none());
        if gives_back.is_some() {
            let release = Command::Release {
                service: id,
                node: holder,
                failure: None,
                disk: None,
            };
            acted |= world.state.apply(&release).is_ok();
        }
        if let Some(view) = world.nodes.get_mut(&holder) {
            if gives_back.is_some() {
                view.running.remove(&id);
            } else {
                acted |= view.running.insert(id);
            }
        }
    }
    acted
}

/// Makes a node primary of a service's volumes, or secondary.
fn change_roles(state: &mut ClusterState, id: ServiceId, node: NodeId, primary: bool) -> bool {
    let volumes: Vec<_> = state.services[&id].spec.volumes().collect();
    let mut changed = false;
    for id in volumes {
        let Some(volume) = state.volumes.get(&id) else {
            continue;
        };
        let change = match volume.serving() {
            Some(holder) if holder == node && !primary => VolumeChange::Demote { node },
            None if primary => VolumeChange::Promote { node },
            _ => continue,
        };
        let command = Command::Volume {
            volume: id,
            expect: volume.epoch,
            change,
        };
        changed |= state.apply(&command).is_ok();
    }
    changed
}
