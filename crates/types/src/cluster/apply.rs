//! Applying commands: the one place where the replicated state changes.

mod fencing;
mod lineages;
mod paths;
mod replicas;
mod services;

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ClusterState, Command, LeaseStanding, Node, NodeKind, NodeSpec, Outcome, Proof, Rejection,
    Replica, ReplicaSpec, ReplicaStanding, Service, Volume, VolumeChange, VolumeOptions,
};
use crate::{
    BLOCK_SIZE, Epoch, LeaseGeneration, LineageId, NodeId, ReplicaSlot, ServiceId, VolumeId,
};

/// The most voters a cluster can have (DESIGN section 4).
pub(super) const NODES_MAX: usize = 7;

/// The longest name: what a DNS label allows.
const NAME_LEN_MAX: usize = 63;

type Applied = Result<Outcome, Rejection>;

impl ClusterState {
    /// Applies one command of the log. Deterministic: the same state and command give the same
    /// result on every node. A rejected command changes nothing but the revision.
    ///
    /// # Errors
    /// Why the command no longer fits the state.
    pub fn apply(&mut self, command: &Command) -> Applied {
        self.revision += 1;
        match command {
            Command::Init {
                cluster,
                name,
                sensitivity,
                node,
            } => {
                if !self.nodes.is_empty() {
                    return Err(Rejection::AlreadyInitialised {
                        name: self.name.clone(),
                    });
                }
                check_name(name)?;
                let added = self.add_node(node, true)?;
                self.voters_version = 1;
                self.id = *cluster;
                self.name.clone_from(name);
                self.sensitivity = *sensitivity;
                Ok(added)
            }
            Command::CreateToken { hash, token } => {
                self.tokens.insert(hash.clone(), token.clone());
                Ok(Outcome::Done)
            }
            Command::Join {
                hash,
                now_unix_s,
                node,
            } => self.join(hash, *now_unix_s, node),
            Command::AdmitVoter { node, expect } => {
                self.check_voters(*expect)?;
                let node = self.node_mut(*node)?;
                if !std::mem::replace(&mut node.voter, true) {
                    self.voters_version += 1;
                }
                Ok(Outcome::Done)
            }
            Command::RemoveNode { node, expect } => {
                self.check_voters(*expect)?;
                self.remove_node(*node)
            }
            Command::SetStandby { node, standby } => {
                self.node_mut(*node)?.standby = *standby;
                Ok(Outcome::Done)
            }
            Command::Evict {
                node,
                generation,
                proof,
            } => self.evict(*node, *generation, proof),
            Command::Readmit { node, generation } => {
                let standing = &mut self.node_mut(*node)?.lease;
                check_generation(*node, *generation, *standing)?;
                *standing = LeaseStanding {
                    generation: generation.next(),
                    evicted: false,
                };
                Ok(Outcome::Done)
            }
            Command::CreateVolume {
                name,
                size,
                lineage,
                replicas,
            } => self.create_volume(name, *size, *lineage, replicas),
            Command::ReplicaCreated { volume, node } => {
                self.replica_created(*volume, *node, ReplicaStanding::Ready)
            }
            Command::ReplicaNotCreated {
                volume,
                node,
                reason,
            } => self.replica_created(*volume, *node, ReplicaStanding::Failed(reason.clone())),
            Command::AddReplica {
                volume,
                replica,
                replaces,
            } => self.add_replica(*volume, replica, *replaces),
            Command::RemoveReplica { volume, node } => self.remove_replica(*volume, *node),
            Command::RemoveVolume { volume } => self.remove_volume(*volume),
            Command::SetVolumeOptions {
                volume,
                expect,
                options,
            } => self.set_volume_options(*volume, *expect, options),
            Command::Volume {
                volume,
                expect,
                change,
            } => self.change_volume(*volume, *expect, change),
            Command::CreateService {
                spec,
                placement,
                target,
            } => self.create_service(spec, placement, *target),
            Command::SetPlacement { service, placement } => {
                self.service_mut(*service)?;
                self.check_placement(*service, placement)?;
                self.service_mut(*service)?.placement = placement.clone();
                Ok(Outcome::Done)
            }
            Command::Hold { service, reason } => {
                let service = self.service_mut(*service)?;
                service.hold.clone_from(reason);
                if reason.is_none() {
                    service.moves_s.clear();
                }
                Ok(Outcome::Done)
            }
            Command::RemoveService { service } => {
                if let Some(holder) = self.service_mut(*service)?.holder {
                    return Err(Rejection::ServiceHeld { holder });
                }
                if let Some(other) = self.needed_by(*service) {
                    let needs = other.spec.name.clone();
                    return Err(Rejection::ServiceNeeded { needs });
                }
                self.services.remove(service);
                for other in self.services.values_mut() {
                    other.placement.apart.remove(service);
                }
                Ok(Outcome::Done)
            }
            Command::EnableService { service, enabled } => {
                let service = self.service_mut(*service)?;
                service.enabled = *enabled;
                if *enabled {
                    service.failures.clear();
                    service.moves_s.clear();
                }
                Ok(Outcome::Done)
            }
            Command::SetTarget { service, target } => {
                if let Some(node) = target {
                    self.data_node(*node)?;
                }
                let service = self.service_mut(*service)?;
                service.target = *target;
                if let Some(node) = target {
                    // Asking for a node again is asking to try it again.
                    service.failures.remove(node);
                }
                Ok(Outcome::Done)
            }
            Command::Clock { at_s } => {
                self.read_clock(*at_s);
                Ok(Outcome::Done)
            }
            Command::ForgetFailure {
                service,
                node,
                count,
            } => {
                let failures = &mut self.service_mut(*service)?.failures;
                if failures.get(node).is_some_and(|it| it.count == *count) {
                    failures.remove(node);
                }
                Ok(Outcome::Done)
            }
            Command::Acquire { service, node } => self.acquire(*service, *node),
            Command::Release {
                service,
                node,
                failure,
                disk,
            } => self.release(*service, *node, failure.as_deref(), *disk),
            Command::DiskRepaired { service, node } => {
                let failures = &mut self.service_mut(*service)?.failures;
                if failures.get(node).is_some_and(|it| it.disk.is_some()) {
                    failures.remove(node);
                }
                Ok(Outcome::Done)
            }
            Command::AddPath {
                node,
                name,
                address,
                replication,
            } => self.add_path(*node, name, address, *replication),
            Command::RemovePath { node, name } => self.remove_path(*node, name),
            Command::Fence(command) => self.apply_fence(command),
        }
    }

    fn node_mut(&mut self, node: NodeId) -> Result<&mut Node, Rejection> {
        self.nodes.get_mut(&node).ok_or(Rejection::NoNode { node })
    }

    pub(super) fn data_node(&self, id: NodeId) -> Result<&Node, Rejection> {
        let node = self.nodes.get(&id).ok_or(Rejection::NoNode { node: id })?;
        match node.spec.kind {
            NodeKind::Data => Ok(node),
            NodeKind::Witness => Err(Rejection::NotADataNode { node: id }),
        }
    }

    fn volume_mut(&mut self, volume: VolumeId) -> Result<&mut Volume, Rejection> {
        self.volumes
            .get_mut(&volume)
            .ok_or(Rejection::NoVolume { volume })
    }

    fn service_mut(&mut self, service: ServiceId) -> Result<&mut Service, Rejection> {
        self.services
            .get_mut(&service)
            .ok_or(Rejection::NoService { service })
    }

    fn add_node(&mut self, spec: &NodeSpec, voter: bool) -> Applied {
        check_name(&spec.name)?;
        if self.node_named(&spec.name).is_some() {
            return Err(taken("node", &spec.name));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Rejection::TooManyNodes {
                count: self.nodes.len(),
            });
        }
        self.last_node += 1;
        let id = NodeId(self.last_node);
        let lease = LeaseStanding {
            generation: LeaseGeneration(1),
            evicted: false,
        };
        self.nodes.insert(
            id,
            Node {
                id,
                spec: spec.clone(),
                lease,
                voter,
                standby: false,
            },
        );
        Ok(Outcome::Node(id))
    }

    fn join(&mut self, hash: &str, now_unix_s: u64, spec: &NodeSpec) -> Applied {
        let token = self.tokens.get(hash).ok_or(Rejection::TokenUnknown)?;
        if now_unix_s >= token.expires_unix_s {
            return Err(Rejection::TokenExpired {
                ago_s: now_unix_s - token.expires_unix_s,
            });
        }
        if let Some(allowed) = token.kind.filter(|kind| *kind != spec.kind) {
            return Err(Rejection::TokenKind {
                allowed: allowed.words().to_owned(),
                asked: spec.kind.words().to_owned(),
            });
        }
        let added = self.add_node(spec, false)?;
        self.tokens.remove(hash);
        Ok(added)
    }

    fn check_voters(&self, expect: u64) -> Result<(), Rejection> {
        if self.voters_version == expect {
            Ok(())
        } else {
            Err(Rejection::StaleVoters)
        }
    }

    fn remove_node(&mut self, id: NodeId) -> Applied {
        let voted = self.node_mut(id)?.voter;
        let in_use = |what: String, remedy: &str| Rejection::NodeInUse {
            node: id,
            what,
            remedy: remedy.to_owned(),
        };
        if let Some(service) = self
            .services
            .values()
            .find(|service| service.holder == Some(id))
        {
            return Err(in_use(
                format!("runs service `{}`", service.spec.name),
                "move it with `relevo service move`",
            ));
        }
        if let Some(volume) = self
            .volumes
            .values()
            .find(|volume| volume.replicas.contains_key(&id))
        {
            return Err(in_use(
                format!("has a replica of volume `{}`", volume.name),
                "move it with `relevo volume replica move`, or remove it",
            ));
        }
        let alone = BTreeSet::from([id]);
        if let Some(service) = self.services.values().find(|it| it.placement.only == alone) {
            return Err(in_use(
                format!(
                    "is the only one that service `{}` may run on",
                    service.spec.name
                ),
                "change that with `relevo service place`",
            ));
        }
        self.nodes.remove(&id);
        self.voters_version += u64::from(voted);
        self.forget_fencing_of(id);
        for service in self.services.values_mut() {
            service.placement.forget_node(id);
            service.failures.remove(&id);
            if service.target == Some(id) {
                service.target = None;
            }
        }
        Ok(Outcome::Done)
    }

    fn evict(&mut self, id: NodeId, generation: LeaseGeneration, proof: &Proof) -> Applied {
        if let Proof::Condemned { by } = proof {
            let voters: BTreeSet<NodeId> = by
                .iter()
                .copied()
                .filter(|voter| self.nodes.get(voter).is_some_and(|node| node.voter))
                .collect();
            let majority = self.majority();
            if voters.len() < majority {
                return Err(Rejection::NoProof {
                    node: id,
                    votes: voters.len(),
                    majority,
                });
            }
        }
        let standing = &mut self.node_mut(id)?.lease;
        check_generation(id, generation, *standing)?;
        if standing.evicted {
            return Err(Rejection::AlreadyEvicted { node: id });
        }
        standing.evicted = true;
        for volume in self
            .volumes
            .values_mut()
            .filter(|volume| volume.primary == Some(id))
        {
            volume.resign();
            volume.drop_leavers();
            volume.epoch = volume.epoch.next();
            volume.version += 1;
        }
        for service in self
            .services
            .values_mut()
            .filter(|service| service.holder == Some(id))
        {
            service.holder = None;
        }
        Ok(Outcome::Done)
    }

    fn create_volume(
        &mut self,
        name: &str,
        size: u64,
        lineage: LineageId,
        specs: &[ReplicaSpec],
    ) -> Applied {
        check_name(name)?;
        if self.volume_named(name).is_some() {
            return Err(taken("volume", name));
        }
        if size == 0 || !size.is_multiple_of(BLOCK_SIZE) {
            return Err(Rejection::BadSize { size });
        }
        if specs.is_empty() || specs.len() > ReplicaSlot::COUNT {
            let why = format!(
                "a volume has 1 to {} replicas, not {}",
                ReplicaSlot::COUNT,
                specs.len()
            );
            return Err(Rejection::BadReplicas { why });
        }
        let mut replicas = BTreeMap::new();
        for (slot, spec) in (0u8..).zip(specs) {
            self.data_node(spec.node)?;
            let replica = Replica {
                spec: spec.clone(),
                slot: ReplicaSlot(slot),
                standing: ReplicaStanding::Creating,
                joined: Epoch(0),
                replaces: None,
                leaving: false,
                gives_way: false,
                differs: None,
            };
            if replicas.insert(spec.node, replica).is_some() {
                let why = format!(
                    "node {} is named twice; a node holds one replica",
                    spec.node
                );
                return Err(Rejection::BadReplicas { why });
            }
        }
        self.last_volume += 1;
        let id = VolumeId(self.last_volume);
        let volume = Volume {
            id,
            name: name.to_owned(),
            size,
            lineage,
            lineages: vec![lineage],
            epoch: Epoch(0),
            primary: None,
            tends: false,
            in_sync: BTreeSet::new(),
            replicas,
            options: VolumeOptions::default(),
            version: 1,
        };
        self.volumes.insert(id, volume);
        Ok(Outcome::Volume(id))
    }

    fn replica_created(
        &mut self,
        volume: VolumeId,
        node: NodeId,
        standing: ReplicaStanding,
    ) -> Applied {
        let volume = self.volume_mut(volume)?;
        let replica = volume
            .replicas
            .get_mut(&node)
            .ok_or(Rejection::NoReplica { node })?;
        if replica.standing == ReplicaStanding::Ready {
            return Ok(Outcome::Epoch(volume.epoch));
        }
        replica.standing = standing;
        volume.version += 1;
        let all_ready = volume
            .replicas
            .values()
            .all(|replica| replica.standing == ReplicaStanding::Ready);
        if all_ready && !volume.is_created() {
            volume.epoch = Epoch(1);
            volume.in_sync = volume.replicas.keys().copied().collect();
            volume
                .replicas
                .values_mut()
                .for_each(|replica| replica.joined = Epoch(1));
        }
        Ok(Outcome::Epoch(volume.epoch))
    }

    fn set_volume_options(
        &mut self,
        id: VolumeId,
        expect: u64,
        options: &VolumeOptions,
    ) -> Applied {
        let volume = self.volume_mut(id)?;
        if volume.version != expect {
            return Err(Rejection::StaleVersion {
                expected: expect,
                actual: volume.version,
            });
        }
        self.check_resync_order(id, options)?;
        let volume = self.volume_mut(id)?;
        volume.options = options.clone();
        volume.version += 1;
        Ok(Outcome::Done)
    }

    /// Volumes that waited for each other would wait for ever.
    fn check_resync_order(&self, id: VolumeId, options: &VolumeOptions) -> Result<(), Rejection> {
        let mut names = Vec::new();
        let mut next = options.resync_after;
        // Without a circle there are no more steps than volumes.
        while let Some(before) = next {
            let known = self.volumes.get(&before);
            let volume = known.ok_or(Rejection::NoVolume { volume: before })?;
            names.push(format!("`{}`", volume.name));
            if before == id {
                return Err(Rejection::ResyncCircle {
                    names: names.join(" after "),
                });
            }
            next = volume.options.resync_after;
        }
        Ok(())
    }

    fn remove_volume(&mut self, id: VolumeId) -> Applied {
        let volume = self
            .volumes
            .get(&id)
            .ok_or(Rejection::NoVolume { volume: id })?;
        let user = self.services.values().find(|service| service.spec.uses(id));
        if let Some(service) = user {
            return Err(Rejection::VolumeInUse {
                volume: volume.name.clone(),
                service: service.spec.name.clone(),
            });
        }
        if let Some(primary) = volume.serving() {
            return Err(Rejection::HasPrimary { primary });
        }
        self.volumes.remove(&id);
        for volume in self.volumes.values_mut() {
            if volume.options.resync_after == Some(id) {
                volume.options.resync_after = None;
                volume.version += 1;
            }
        }
        Ok(Outcome::Done)
    }

    fn change_volume(&mut self, id: VolumeId, expect: Epoch, change: &VolumeChange) -> Applied {
        if let VolumeChange::Promote { node }
        | VolumeChange::PromoteUncertain { node }
        | VolumeChange::Tend { node } = change
            && self.data_node(*node)?.lease.evicted
        {
            return Err(Rejection::Evicted { node: *node });
        }
        let evicted: BTreeSet<NodeId> = self
            .nodes
            .values()
            .filter(|node| node.lease.evicted)
            .map(|node| node.id)
            .collect();
        let volume = self.volume_mut(id)?;
        if !volume.is_created() {
            return Err(Rejection::NotCreated);
        }
        if volume.epoch != expect {
            return Err(Rejection::StaleEpoch {
                expected: expect,
                actual: volume.epoch,
            });
        }
        let epoch = volume.epoch.next();
        match change {
            VolumeChange::Promote { node } | VolumeChange::PromoteUncertain { node } => {
                volume.check_vacant(*node)?;
                volume.resign();
                volume.primary = Some(*node);
                // A member that was evicted can't answer the new primary's reconciliation: it
                // leaves in the same step and is resynced when it returns. Unless the new primary
                // does not know itself what was acknowledged: then it must hear whoever may know.
                if matches!(change, VolumeChange::Promote { .. }) {
                    volume
                        .in_sync
                        .retain(|member| member == node || !evicted.contains(member));
                }
            }
            VolumeChange::Tend { node } => {
                if let Some(primary) = volume.primary {
                    return Err(Rejection::HasPrimary { primary });
                }
                volume.check_vacant(*node)?;
                volume.primary = Some(*node);
                volume.tends = true;
            }
            VolumeChange::Demote { node } => {
                if volume.primary != Some(*node) {
                    return Err(Rejection::NotPrimary { node: *node });
                }
                volume.resign();
            }
            VolumeChange::Leave { nodes } => {
                if volume.in_sync.iter().all(|member| nodes.contains(member)) {
                    return Err(Rejection::LastInSync);
                }
                volume.in_sync.retain(|member| !nodes.contains(member));
            }
            VolumeChange::Join { node } => {
                let replica = volume
                    .replicas
                    .get_mut(node)
                    .ok_or(Rejection::NoReplica { node: *node })?;
                replica.joined = epoch;
                replica.gives_way = false;
                volume.in_sync.insert(*node);
                volume.repaired(*node);
            }
            VolumeChange::Differs {
                node,
                from,
                differs,
            } => volume.set_differs(*node, *from, differs.as_ref())?,
            VolumeChange::Force {
                node,
                lineage,
                others_give_way,
            } => volume.force(*node, *lineage, *others_give_way)?,
            VolumeChange::KeepInForce => volume.let_outsiders_give_way(),
            VolumeChange::GiveWay { node, to } => volume.give_way(*node, *to)?,
        }
        volume.drop_leavers();
        volume.epoch = epoch;
        volume.version += 1;
        if let VolumeChange::Join { node }
        | VolumeChange::Force { node, .. }
        | VolumeChange::GiveWay { to: node, .. } = change
        {
            self.forget_failures(id, *node);
        }
        Ok(Outcome::Epoch(epoch))
    }

    /// A node is in sync again: whatever made it give the volume's service up, its disk most of
    /// all, was repaired meanwhile. Otherwise the next failure elsewhere would leave the service
    /// without a node that may have it, although nothing is broken any more.
    fn forget_failures(&mut self, volume: VolumeId, node: NodeId) {
        for service in self.services.values_mut() {
            if service.spec.uses(volume) {
                service.failures.remove(&node);
            }
        }
    }
}

fn taken(kind: &str, name: &str) -> Rejection {
    Rejection::NameTaken {
        kind: kind.to_owned(),
        name: name.to_owned(),
    }
}

/// Names end up in paths (`/dev/relevo/NAME`), certificates and commands.
pub(super) fn check_name(name: &str) -> Result<(), Rejection> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = name.len() <= NAME_LEN_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(allowed);
    if good {
        Ok(())
    } else {
        Err(Rejection::BadName {
            name: name.to_owned(),
        })
    }
}

fn check_generation(
    node: NodeId,
    given: LeaseGeneration,
    standing: LeaseStanding,
) -> Result<(), Rejection> {
    if standing.generation == given {
        Ok(())
    } else {
        Err(Rejection::StaleGeneration {
            node,
            given,
            actual: standing.generation,
        })
    }
}
