//! Where a service runs: what an administrator says about it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{ClusterState, Rejection};
use crate::{NodeId, ServiceId};

/// Where a service may and shall run. No numbers to weigh against each other: each rule either keeps a node
/// from getting the service, or orders those that may have it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Placement {
    /// Rather on these than on others, the first one first. A service that runs stays where it is all the same.
    pub prefer: Vec<NodeId>,
    /// On no other node; empty: any.
    pub only: BTreeSet<NodeId>,
    /// Not on these.
    pub never: BTreeSet<NodeId>,
    /// On the node of each of these services: it follows them, they don't follow it.
    pub with: BTreeSet<ServiceId>,
    /// Not on the node of any of these services, nor they on its.
    pub apart: BTreeSet<ServiceId>,
    /// It starts only while each of these services runs, on whatever node.
    pub after: BTreeSet<ServiceId>,
    /// Memory that it needs, in MiB; 0: not worth counting. The services on a node need no more together than the
    /// node has.
    pub memory_mib: u64,
    /// It returns to a node that it prefers to where it is once that could have had it for so long, in seconds;
    /// `None`: it stays.
    pub failback_s: Option<u64>,
}

impl Placement {
    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the service may run on a node, as far as the node's own identity goes.
    #[must_use]
    pub fn allows(&self, node: NodeId) -> bool {
        !self.never.contains(&node) && (self.only.is_empty() || self.only.contains(&node))
    }

    /// Place in the order of preference: 0 for the best.
    #[must_use]
    pub fn preference(&self, node: NodeId) -> usize {
        let place = self.prefer.iter().position(|preferred| *preferred == node);
        place.unwrap_or(self.prefer.len())
    }

    /// Its rules as an administrator writes them, with names: `prefer beta alfa`.
    #[must_use]
    pub fn words(&self, state: &ClusterState) -> Vec<String> {
        fn nodes<'a>(state: &ClusterState, ids: impl Iterator<Item = &'a NodeId>) -> Vec<String> {
            ids.map(|id| state.node_name(*id)).collect()
        }
        let services = |ids: &BTreeSet<ServiceId>| -> Vec<String> {
            let known = ids.iter().map(|id| (id, state.services.get(id)));
            known
                .map(|(id, service)| {
                    service.map_or_else(|| id.to_string(), |it| it.spec.name.clone())
                })
                .collect()
        };
        let memory = (self.memory_mib > 0).then(|| format!("{}MiB", self.memory_mib));
        let failback = self.failback_s.map(|delay| format!("{delay}s"));
        let rules = [
            ("prefer", nodes(state, self.prefer.iter())),
            ("only", nodes(state, self.only.iter())),
            ("never", nodes(state, self.never.iter())),
            ("with", services(&self.with)),
            ("apart", services(&self.apart)),
            ("after", services(&self.after)),
            ("memory", memory.into_iter().collect()),
            ("failback", failback.into_iter().collect()),
        ];
        rules
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(rule, names)| format!("{rule} {}", names.join(" ")))
            .collect()
    }

    /// The services that it can't do without.
    fn needs(&self) -> impl Iterator<Item = ServiceId> + '_ {
        self.with.iter().chain(&self.after).copied()
    }

    /// A node left the cluster.
    pub(super) fn forget_node(&mut self, node: NodeId) {
        self.prefer.retain(|preferred| *preferred != node);
        self.only.remove(&node);
        self.never.remove(&node);
    }
}

impl ClusterState {
    /// The services, itself aside, that may not run on the node of this one: whichever of the two says so.
    pub fn apart_from(&self, id: ServiceId) -> impl Iterator<Item = ServiceId> + '_ {
        let said = self
            .services
            .get(&id)
            .map(|service| &service.placement.apart);
        self.services.values().filter_map(move |other| {
            let apart = other.placement.apart.contains(&id)
                || said.is_some_and(|said| said.contains(&other.id));
            (apart && other.id != id).then_some(other.id)
        })
    }

    /// Memory that the services on a node need together, in MiB, one service aside.
    #[must_use]
    pub fn memory_used_mib(&self, node: NodeId, aside: ServiceId) -> u64 {
        self.services
            .values()
            .filter(|service| service.holder == Some(node) && service.id != aside)
            .map(|service| service.placement.memory_mib)
            .fold(0, u64::saturating_add)
    }

    /// Refuses what names something that does not exist, and what no cluster could satisfy. `id` is that of the
    /// service, which need not exist yet.
    pub(super) fn check_placement(
        &self,
        id: ServiceId,
        placement: &Placement,
    ) -> Result<(), Rejection> {
        let bad = |why: String| Err(Rejection::BadPlacement { why });
        let nodes = placement.prefer.iter();
        for node in nodes.chain(&placement.only).chain(&placement.never) {
            self.data_node(*node)?;
        }
        for (index, node) in placement.prefer.iter().enumerate() {
            let name = self.node_name(*node);
            if placement.prefer[..index].contains(node) {
                return bad(format!("`prefer` names {name} twice"));
            }
            if !placement.allows(*node) {
                return bad(format!(
                    "{name} is preferred, but `only` or `never` keeps the service from it"
                ));
            }
        }
        if let Some(node) = placement.only.intersection(&placement.never).next() {
            let name = self.node_name(*node);
            return bad(format!("{name} is both in `only` and in `never`"));
        }
        let named = placement.needs().chain(placement.apart.iter().copied());
        for service in named {
            if service == id {
                return bad("it names the service itself".to_owned());
            }
            if !self.services.contains_key(&service) {
                return Err(Rejection::NoService { service });
            }
        }
        if let Some(service) = placement.with.intersection(&placement.apart).next() {
            let name = &self.services[service].spec.name;
            return bad(format!("`{name}` is both in `with` and in `apart`"));
        }
        if let Some(path) = self.way_back(id, placement) {
            return bad(format!(
                "the services would wait for each other: it needs {path}, which needs it"
            ));
        }
        // All of them end up on one node.
        let group = self.followed(placement);
        for one in &group {
            let against = self.apart_from(*one).collect::<BTreeSet<_>>();
            let other = group.iter().find(|other| against.contains(other));
            if let Some(other) = other.or_else(|| placement.apart.get(one)) {
                return bad(format!(
                    "it shall run with `{}`, which is kept apart from `{}`",
                    self.services[one].spec.name,
                    if other == one {
                        "it"
                    } else {
                        self.services[other].spec.name.as_str()
                    }
                ));
            }
        }
        Ok(())
    }

    /// The services on whose node one with that placement would be, by `with` again and again.
    fn followed(&self, placement: &Placement) -> BTreeSet<ServiceId> {
        let mut group = BTreeSet::new();
        let mut next: Vec<ServiceId> = placement.with.iter().copied().collect();
        while let Some(id) = next.pop() {
            if group.insert(id)
                && let Some(service) = self.services.get(&id)
            {
                next.extend(&service.placement.with);
            }
        }
        group
    }

    /// A way by `with` and `after` from what a placement needs back to the service itself, as names.
    fn way_back(&self, id: ServiceId, placement: &Placement) -> Option<String> {
        let mut seen = BTreeSet::new();
        let mut ways: Vec<Vec<ServiceId>> = placement.needs().map(|need| vec![need]).collect();
        while let Some(way) = ways.pop() {
            let last = *way.last()?;
            if last == id {
                let names = way[..way.len() - 1]
                    .iter()
                    .filter_map(|id| self.services.get(id))
                    .map(|service| format!("`{}`", service.spec.name));
                return Some(names.collect::<Vec<_>>().join(", which needs "));
            }
            if seen.insert(last)
                && let Some(service) = self.services.get(&last)
            {
                ways.extend(service.placement.needs().map(|need| {
                    let mut longer = way.clone();
                    longer.push(need);
                    longer
                }));
            }
        }
        None
    }

    /// The service that needs another one, by `with` or `after`.
    pub(super) fn needed_by(&self, id: ServiceId) -> Option<&super::Service> {
        self.services
            .values()
            .find(|service| service.placement.needs().any(|need| need == id))
    }
}
