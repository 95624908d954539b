//! Commands about services.

use std::collections::BTreeMap;

use super::{Applied, check_name, taken};
use crate::{
    NodeId, ServiceId, VolumeId,
    cluster::{
        ClusterState, FailureRecord, Outcome, Part, Placement, Rejection, Service, ServiceSpec,
    },
};

/// So many moves of a service are remembered: more than any budget.
const MOVES_KEPT: usize = 16;

impl ClusterState {
    pub(super) fn create_service(
        &mut self,
        spec: &ServiceSpec,
        placement: &Placement,
        target: Option<NodeId>,
    ) -> Applied {
        check_name(&spec.name)?;
        if self.service_named(&spec.name).is_some() {
            return Err(taken("service", &spec.name));
        }
        if let Some(node) = target {
            self.data_node(node)?;
        }
        self.check_parts(spec)?;
        self.check_placement(ServiceId(self.last_service + 1), placement)?;
        self.last_service += 1;
        let id = ServiceId(self.last_service);
        let service = Service {
            id,
            spec: spec.clone(),
            enabled: true,
            placement: placement.clone(),
            hold: None,
            displaced: false,
            moves_s: Vec::new(),
            target,
            holder: None,
            failures: BTreeMap::new(),
        };
        self.services.insert(id, service);
        Ok(Outcome::Service(id))
    }

    /// A volume, a mount point or an address belongs to one service; a mount comes after its
    /// volume.
    fn check_parts(&self, spec: &ServiceSpec) -> Result<(), Rejection> {
        let bad = |why: String| Err(Rejection::BadService { why });
        if spec.parts.is_empty() {
            return bad(format!(
                "service `{}` has no parts; give it at least one",
                spec.name
            ));
        }
        for (index, part) in spec.parts.iter().enumerate() {
            let label = part.label();
            let (before, rest) = spec.parts.split_at(index);
            if rest[1..].iter().any(|other| other.conflicts(part)) {
                return bad(format!("{label} is twice in service `{}`", spec.name));
            }
            for other in self.services.values() {
                if other.spec.parts.iter().any(|theirs| theirs.conflicts(part)) {
                    return bad(format!(
                        "{label} belongs to service `{}` already",
                        other.spec.name
                    ));
                }
            }
            match part {
                Part::Volume(part) if !self.volumes.contains_key(&part.volume) => {
                    return Err(Rejection::NoVolume {
                        volume: part.volume,
                    });
                }
                Part::Mount(mount) => {
                    let has_device = before.iter().any(|earlier| {
                        matches!(earlier, Part::Volume(v) if v.volume == mount.volume && v.device)
                    });
                    if !has_device {
                        return bad(format!(
                            "{label} needs volume {} as a block device earlier in the list",
                            mount.volume
                        ));
                    }
                }
                Part::Process(process) if process.command.is_empty() => {
                    return bad(format!(
                        "a process of service `{}` has no command",
                        spec.name
                    ));
                }
                Part::Volume(_) | Part::Address(_) | Part::Process(_) => {}
            }
        }
        Ok(())
    }

    pub(super) fn acquire(&mut self, service: ServiceId, node: NodeId) -> Applied {
        if self.data_node(node)?.lease.evicted {
            return Err(Rejection::Evicted { node });
        }
        let id = service;
        let apart = self
            .apart_from(id)
            .find(|other| self.services[other].holder == Some(node))
            .map(|other| self.services[&other].spec.name.clone());
        let now_s = self.clock_s;
        let service = self.service_mut(id)?;
        if let Some(holder) = service.holder {
            return Err(Rejection::ServiceHeld { holder });
        }
        if !service.enabled {
            return Err(Rejection::ServiceDisabled);
        }
        if !service.placement.allows(node) || apart.is_some() {
            return Err(Rejection::PlacedElsewhere { node, apart });
        }
        service.holder = Some(node);
        if std::mem::take(&mut service.displaced) {
            let kept = service.moves_s.len().saturating_sub(MOVES_KEPT - 1);
            service.moves_s.drain(..kept);
            service.moves_s.push(now_s);
        }
        Ok(Outcome::Done)
    }

    /// The leader read the clock: what happened since the last reading happened now.
    pub(super) fn read_clock(&mut self, at_s: u64) {
        self.clock_s = self.clock_s.max(at_s);
        for service in self.services.values_mut() {
            for failure in service.failures.values_mut() {
                failure.at_s.get_or_insert(self.clock_s);
            }
        }
    }

    pub(super) fn release(
        &mut self,
        service: ServiceId,
        node: NodeId,
        failure: Option<&str>,
        disk: Option<VolumeId>,
    ) -> Applied {
        let service = self.service_mut(service)?;
        if service.holder != Some(node) {
            return Err(Rejection::NotHolder { node });
        }
        service.holder = None;
        if let Some(reason) = failure {
            let record = service
                .failures
                .entry(node)
                .or_insert_with(|| FailureRecord {
                    count: 0,
                    reason: String::new(),
                    at_s: None,
                    disk,
                });
            record.disk = record.disk.filter(|failed| disk == Some(*failed));
            record.count += 1;
            record.at_s = None;
            // A disk that fails is not the service's doing, nor is a node that dies.
            service.displaced = disk.is_none();
            reason.clone_into(&mut record.reason);
        }
        Ok(Outcome::Done)
    }
}

impl Part {
    /// Whether both claim the same thing, which only one service may have.
    fn conflicts(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Volume(a), Self::Volume(b)) => a.volume == b.volume,
            (Self::Mount(a), Self::Mount(b)) => a.mount_point == b.mount_point,
            (Self::Address(a), Self::Address(b)) => a.address == b.address,
            _ => false,
        }
    }
}
