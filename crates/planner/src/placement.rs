//! What a service's placement says about a node.

use relevo_types::{
    NodeId, ServiceId,
    cluster::{ClusterState, Service},
};

use crate::Views;

/// Why a node is not for a service at all, to follow the node's name.
pub(crate) fn keeps_from(service: &Service, node: NodeId) -> Option<String> {
    if service.placement.never.contains(&node) {
        Some("may not run it (`never`)".to_owned())
    } else if service.placement.allows(node) {
        None
    } else {
        Some("is not among the nodes that may run it (`only`)".to_owned())
    }
}

/// What the other services speak against a node, to follow its name. `with`: heed on whose node it shall be.
pub(crate) fn others_object(
    state: &ClusterState,
    views: &Views,
    service: &Service,
    node: NodeId,
    with: bool,
) -> Option<String> {
    let name = |id: &ServiceId| named(state, *id);
    let holder = |id: &ServiceId| state.services.get(id).and_then(|other| other.holder);
    if with
        && let Some(other) = service
            .placement
            .with
            .iter()
            .find(|other| holder(other) != Some(node))
    {
        return Some(format!("does not run {}", name(other)));
    }
    let mut apart = state.apart_from(service.id);
    if let Some(other) = apart.find(|other| holder(other) == Some(node)) {
        return Some(format!(
            "runs {}, from which it is kept apart",
            name(&other)
        ));
    }
    let needed = service.placement.memory_mib;
    let available = views.get(&node).and_then(|view| view.memory_mib);
    if let Some(available) = available.filter(|_| needed > 0) {
        let used = state.memory_used_mib(node, service.id);
        if used.saturating_add(needed) > available {
            return Some(format!(
                "has {} MiB of memory left of {available}, and it needs {needed}",
                available.saturating_sub(used)
            ));
        }
    }
    None
}

/// A service that has to run before this one starts and does not.
pub(crate) fn waits_for(state: &ClusterState, views: &Views, service: &Service) -> Option<String> {
    let runs = |id: &ServiceId| {
        let holder = state.services.get(id).and_then(|other| other.holder);
        holder
            .and_then(|holder| views.get(&holder))
            .is_some_and(|view| view.running.contains(id))
    };
    let missing = service.placement.after.iter().find(|id| !runs(id));
    if let Some(other) = missing {
        return Some(format!("waits for {} to run", named(state, *other)));
    }
    let nowhere = service.placement.with.iter().find(|id| {
        let other = state.services.get(id);
        other.is_none_or(|other| other.holder.is_none())
    });
    if let Some(other) = nowhere {
        return Some(format!(
            "waits for {}, on whose node it shall run",
            named(state, *other)
        ));
    }
    let (first, there) = followed(state, service)?;
    service.placement.with.iter().find_map(|other| {
        let elsewhere = state.services[other].holder.filter(|node| *node != there)?;
        Some(format!(
            "shall run with {} on {} and with {} on {}, which are two nodes; move one of them",
            named(state, first),
            state.node_name(there),
            named(state, *other),
            state.node_name(elsewhere)
        ))
    })
}

/// The first service on whose node it shall run, and that node.
pub(crate) fn followed(state: &ClusterState, service: &Service) -> Option<(ServiceId, NodeId)> {
    let first = *service.placement.with.first()?;
    Some((first, state.services.get(&first)?.holder?))
}

/// How many services there are between a service and one that follows none.
pub(crate) fn steps_behind(state: &ClusterState, id: ServiceId) -> usize {
    let with = state.services.get(&id).map(|it| &it.placement.with);
    // The control log takes no circle.
    let longest = with
        .into_iter()
        .flatten()
        .map(|id| 1 + steps_behind(state, *id));
    longest.max().unwrap_or(0)
}

/// A service by its name, for messages.
pub(crate) fn named(state: &ClusterState, id: ServiceId) -> String {
    state.services.get(&id).map_or_else(
        || id.to_string(),
        |service| format!("`{}`", service.spec.name),
    )
}
