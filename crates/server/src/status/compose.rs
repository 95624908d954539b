//! The status from its sources. Pure.

use std::collections::BTreeMap;

use relevo_membership::Liveness;
use relevo_node::{NodeStatus as Observed, Phase};
use relevo_types::{
    BLOCK_SIZE, BlockRange, NodeId, ServiceId, Time,
    cluster::{
        ClusterState, Differs, Node, Part, PathAddress, Replica, ReplicaStanding, Service, Volume,
    },
};

use super::{LocalReport, LocalVolume};
use crate::api::{
    ClusterStatus, DiffersStatus, FailureStatus, LeaseStatus, NodeStatus, PartState, PartStatus,
    PathCarries, PathStatus, QuorumStatus, ReplicaStatus, ServiceState, ServiceStatus, SplitStatus,
    VolumeStatus, WaitStatus,
};

/// Where a status comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sources<'a> {
    /// The control log as read here.
    pub(crate) state: &'a ClusterState,
    /// This node.
    pub(crate) me: NodeId,
    /// Who leads the control log.
    pub(crate) leader: Option<NodeId>,
    /// What this node observes; `None` while it stops.
    pub(crate) observed: Option<&'a Observed>,
    /// What the nodes that answered tell of themselves, this one included.
    pub(crate) reports: &'a BTreeMap<NodeId, LocalReport>,
    /// Now, by the monotonic clock of the observations.
    pub(crate) now: Time,
    /// The same moment by the clock on the wall, in milliseconds since 1970.
    pub(crate) now_unix_ms: u64,
}

/// The status of a cluster.
pub(crate) fn compose(from: &Sources<'_>) -> ClusterStatus {
    let state = from.state;
    ClusterStatus {
        id: state.id.to_string(),
        name: state.name.clone(),
        sensitivity: state.sensitivity,
        revision: state.revision,
        this_node: state.node_name(from.me),
        quorum: quorum(from),
        nodes: state.nodes.values().map(|node| from.node(node)).collect(),
        volumes: state
            .volumes
            .values()
            .map(|volume| from.volume(volume))
            .collect(),
        services: state
            .services
            .values()
            .map(|service| from.service(service))
            .collect(),
        waits: from
            .planner_waits(None)
            .map(|why| WaitStatus {
                what: "the plan".to_owned(),
                why: why.to_owned(),
                since_unix_ms: None,
                next: None,
            })
            .collect(),
        fencing: from.fencing(),
    }
}

/// What a service is doing, by its holder's word if there is one.
pub(crate) fn service_state(
    state: &ClusterState,
    observed: Option<&Observed>,
    id: ServiceId,
) -> ServiceState {
    let Some(service) = state.services.get(&id) else {
        return ServiceState::Stopped;
    };
    let Some(holder) = service.holder else {
        return if service.enabled {
            ServiceState::Waiting
        } else {
            ServiceState::Stopped
        };
    };
    let Some(observed) = observed else {
        return ServiceState::Unknown;
    };
    let silent = holder != observed.me
        && observed
            .membership
            .peers
            .get(&holder)
            .is_none_or(|peer| matches!(peer.liveness, Liveness::Dead | Liveness::Unknown));
    if silent {
        return ServiceState::Unknown;
    }
    match phase(observed, holder, id) {
        Some(Phase::Running) => ServiceState::Running,
        Some(Phase::Stopping | Phase::Forced | Phase::Releasing) => ServiceState::Stopping,
        Some(Phase::Cleaning | Phase::Starting) | None => ServiceState::Starting,
    }
}

fn phase(observed: &Observed, holder: NodeId, id: ServiceId) -> Option<Phase> {
    if holder == observed.me {
        observed.services.get(&id).map(|service| service.phase)
    } else {
        let report = observed.reports.get(&holder)?;
        report.services.get(&id).map(|service| service.phase)
    }
}

fn quorum(from: &Sources<'_>) -> QuorumStatus {
    let alive = |voter: &NodeId| {
        *voter == from.me
            || from.liveness(*voter) == Some(Liveness::Alive)
            || from.liveness(*voter) == Some(Liveness::Suspect)
    };
    let lease_until = from
        .observed
        .map_or(Time::ZERO, |observed| observed.membership.lease_until);
    let left_ms = lease_until.since(from.now).as_millis();
    QuorumStatus {
        voters: from.state.voters().count(),
        alive: from.state.voters().filter(alive).count(),
        needed: from.state.majority(),
        leader: from.leader.map(|leader| from.state.node_name(leader)),
        lease: LeaseStatus {
            held: lease_until > from.now,
            left_ms: u64::try_from(left_ms).unwrap_or(u64::MAX),
        },
    }
}

impl Sources<'_> {
    fn peer(&self, node: NodeId) -> Option<&relevo_membership::PeerStatus> {
        self.observed?.membership.peers.get(&node)
    }

    fn liveness(&self, node: NodeId) -> Option<Liveness> {
        self.peer(node).map(|peer| peer.liveness)
    }

    /// A moment of the monotonic clock as one of the clock on the wall.
    fn unix_ms(&self, moment: Time) -> u64 {
        let ago = u64::try_from(self.now.since(moment).as_millis()).unwrap_or(u64::MAX);
        self.now_unix_ms.saturating_sub(ago)
    }

    fn planner_waits(&self, service: Option<ServiceId>) -> impl Iterator<Item = &str> {
        self.reports
            .values()
            .flat_map(|report| &report.waits)
            .filter(move |(about, _)| *about == service)
            .map(|(_, why)| why.as_str())
    }

    fn node(&self, node: &Node) -> NodeStatus {
        let peer = self.peer(node.id);
        let this = node.id == self.me;
        let liveness = match (this, peer) {
            (true, _) => Liveness::Alive,
            (false, Some(peer)) => peer.liveness,
            (false, None) => Liveness::Unknown,
        };
        let state = match liveness {
            Liveness::Unknown => "unknown",
            Liveness::Alive => "alive",
            Liveness::Suspect => "suspect",
            Liveness::Dead => "dead",
        };
        NodeStatus {
            name: node.spec.name.clone(),
            id: node.id.to_string(),
            kind: node.spec.kind,
            state: state.to_owned(),
            reason: peer
                .filter(|peer| peer.liveness != Liveness::Alive && !peer.reason.is_empty())
                .map(|peer| peer.reason.clone()),
            since_unix_ms: peer.map(|peer| self.unix_ms(peer.since)),
            voter: node.voter,
            standby: node.standby,
            evicted: node.lease.evicted,
            paths: self.paths(node, peer),
        }
    }

    fn paths(&self, node: &Node, peer: Option<&relevo_membership::PeerStatus>) -> Vec<PathStatus> {
        let mine = self.state.nodes.get(&self.me);
        let shared = |name: &str| mine.is_none_or(|mine| mine.spec.path(name).is_some());
        let told = self.reports.get(&node.id).map(|report| &report.paths);
        node.spec
            .all_paths()
            .map(|(name, address)| {
                let unusable = told.and_then(|told| told.get(name).cloned().flatten());
                (name, address, unusable)
            })
            .filter(|(name, _, unusable)| shared(name) || unusable.is_some())
            .map(|(name, address, unusable)| {
                let known = peer.and_then(|peer| peer.paths.iter().find(|p| p.name == name));
                PathStatus {
                    name: name.to_owned(),
                    address: address.to_string(),
                    carries: match address {
                        PathAddress::Ip(_) => PathCarries::All,
                        PathAddress::Line(_) => PathCarries::Heartbeats,
                    },
                    up: known.map(|known| known.up),
                    round_trip_us: known.and_then(|known| known.round_trip_us),
                    jitter_us: known.and_then(|known| known.jitter_us),
                    loss_percent: known.map_or(0, |known| known.loss_percent),
                    trouble: known.and_then(|known| known.trouble),
                    unusable,
                }
            })
            .collect()
    }

    fn volume(&self, volume: &Volume) -> VolumeStatus {
        let mine = self.local(self.me, volume);
        // The primary knows most of the others.
        let teller = volume
            .primary
            .filter(|primary| self.local(*primary, volume).is_some())
            .unwrap_or(self.me);
        // Without requests nothing waits.
        let told = self.local(teller, volume).filter(|_| !volume.tends);
        let waiting = told.and_then(|local| {
            let why = local.waiting.clone()?;
            Some(WaitStatus {
                what: "its requests".to_owned(),
                why,
                since_unix_ms: local.waiting_since_unix_ms,
                next: None,
            })
        });
        VolumeStatus {
            name: volume.name.clone(),
            id: volume.id.to_string(),
            size: volume.size,
            epoch: volume.epoch.0,
            primary: volume.serving().map(|node| self.state.node_name(node)),
            tended_by: volume
                .primary
                .filter(|_| volume.tends)
                .map(|node| self.state.node_name(node)),
            in_sync: volume
                .in_sync
                .iter()
                .map(|node| self.state.node_name(*node))
                .collect(),
            replicas: volume
                .replicas
                .iter()
                .map(|(node, replica)| self.replica(volume, *node, replica, teller))
                .collect(),
            links: mine
                .into_iter()
                .flat_map(|local| &local.peers)
                .map(|(node, peer)| (self.state.node_name(*node), peer.state.clone()))
                .collect(),
            options: volume
                .options
                .list(self.state)
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
            device: mine.and_then(|local| local.device.clone()),
            nbd: mine.and_then(|local| local.nbd.clone()),
            wait: waiting,
            splits: self.splits(volume),
        }
    }

    /// Every pair once; the primary's word counts before that of others.
    fn splits(&self, volume: &Volume) -> Vec<SplitStatus> {
        let others = volume.replicas.keys().copied();
        let others = others.filter(|node| volume.primary != Some(*node));
        let tellers = volume.primary.into_iter().chain(others);
        let mut known = BTreeMap::new();
        for teller in tellers {
            let told = self.local(teller, volume).map(|local| &local.splits);
            for (peer, split) in told.into_iter().flatten() {
                let pair = (teller.min(*peer), teller.max(*peer));
                known.entry(pair).or_insert_with(|| SplitStatus {
                    node: self.state.node_name(teller),
                    blocks: split.ours,
                    peer: self.state.node_name(*peer),
                    peer_blocks: split.theirs,
                    why: split.why.clone(),
                });
            }
        }
        known.into_values().collect()
    }

    fn local(&self, node: NodeId, volume: &Volume) -> Option<&LocalVolume> {
        self.reports.get(&node)?.volumes.get(&volume.id)
    }

    fn replica(
        &self,
        volume: &Volume,
        node: NodeId,
        replica: &Replica,
        teller: NodeId,
    ) -> ReplicaStatus {
        let local = self.local(node, volume);
        let told = self
            .local(teller, volume)
            .filter(|_| teller != node)
            .and_then(|teller| teller.peers.get(&node));
        let dirty = told.and_then(|peer| peer.dirty_blocks);
        let percent = told.and_then(|peer| {
            let (left, all) = (peer.dirty_blocks?, peer.dirty_at_first?);
            let done = all.saturating_sub(left).saturating_mul(100);
            u8::try_from(done.checked_div(all)?).ok()
        });
        // Either side may wait for another volume.
        let there = local.and_then(|local| local.peers.get(&teller));
        let after = told.and_then(|peer| peer.sync_after);
        let after = after.or_else(|| there?.sync_after);
        let after = after.filter(|_| dirty.is_some());
        let speed = told.and_then(|peer| peer.sync_bytes_per_s);
        let remark = match &replica.standing {
            ReplicaStanding::Creating => Some("it is being created".to_owned()),
            ReplicaStanding::Failed(why) => Some(format!("it was not created: {why}")),
            ReplicaStanding::Ready => local.and_then(|local| local.remark.clone()),
        };
        ReplicaStatus {
            node: self.state.node_name(node),
            role: if volume.serving() == Some(node) {
                "Primary"
            } else {
                "Secondary"
            }
            .to_owned(),
            disk: local.map(|local| local.disk.clone()),
            replication: told.map(|peer| peer.state.clone()),
            behind_bytes: told.and_then(|peer| Some(peer.behind?.0)),
            behind_ms: told.and_then(|peer| Some(peer.behind?.1)),
            protocol: volume
                .primary
                .filter(|primary| *primary != node)
                .map(|primary| volume.protocol(primary, node).to_string()),
            dirty_bytes: dirty.map(|blocks| blocks.saturating_mul(BLOCK_SIZE)),
            differs: replica
                .differs
                .as_ref()
                .map(|differs| self.differs(differs)),
            sync_percent: percent,
            sync_bytes_per_s: speed,
            sync_same_bytes: told.and_then(|peer| peer.sync_same_bytes),
            sync_after: after.map(|first| {
                let volume = self.state.volumes.get(&first);
                volume.map_or_else(|| first.to_string(), |volume| volume.name.clone())
            }),
            sync_limit_bytes_per_s: told.and_then(|peer| peer.sync_limit),
            sync_left_s: dirty.zip(speed).and_then(|(blocks, speed)| {
                // Nothing is known of one that stands still.
                let bytes = blocks.saturating_mul(BLOCK_SIZE);
                (speed > 0).then(|| bytes.div_ceil(speed))
            }),
            driver: local.and_then(|local| local.driver.clone()),
            backing: local
                .and_then(|local| local.backing.clone())
                .or_else(|| replica.spec.backing.clone()),
            remark,
        }
    }

    fn differs(&self, differs: &Differs) -> DiffersStatus {
        let places = differs.runs.iter().map(BlockRange::bytes);
        DiffersStatus {
            from: self.state.node_name(differs.from),
            bytes: differs.blocks.saturating_mul(BLOCK_SIZE),
            places: places.map(|bytes| (bytes.offset, bytes.len)).collect(),
            repair: differs.repair,
        }
    }

    fn service(&self, service: &Service) -> ServiceStatus {
        let state = service_state(self.state, self.observed, service.id);
        let told = service
            .holder
            .and_then(|holder| self.reports.get(&holder))
            .and_then(|report| report.services.get(&service.id));
        let parts = service.spec.parts.iter().enumerate().map(|(index, part)| {
            let nothing = if service.holder.is_none() || state == ServiceState::Starting {
                (PartState::Stopped, None)
            } else {
                (PartState::Unknown, None)
            };
            let (state, detail) = told
                .and_then(|parts| parts.get(&index).cloned())
                .unwrap_or(nothing);
            PartStatus {
                part: self.part_label(part),
                state,
                detail,
            }
        });
        ServiceStatus {
            name: service.spec.name.clone(),
            id: service.id.to_string(),
            enabled: service.enabled,
            state,
            node: service.holder.map(|node| self.state.node_name(node)),
            target: service.target.map(|node| self.state.node_name(node)),
            placement: service.placement.words(self.state),
            hold: service.hold.clone(),
            parts: parts.collect(),
            failures: service
                .failures
                .iter()
                .map(|(node, failure)| FailureStatus {
                    node: self.state.node_name(*node),
                    count: failure.count,
                    reason: failure.reason.clone(),
                })
                .collect(),
            wait: self.service_wait(service),
        }
    }

    fn service_wait(&self, service: &Service) -> Option<WaitStatus> {
        let observed = self.observed?;
        let running = service.holder.and_then(|holder| {
            if holder == self.me {
                let here = observed.services.get(&service.id)?;
                Some((here.waiting.clone()?, Some(self.unix_ms(here.since))))
            } else {
                let there = observed.reports.get(&holder)?.services.get(&service.id)?;
                Some((there.waiting.clone()?, None))
            }
        });
        let (why, since_unix_ms) = running.or_else(|| {
            let why = self.planner_waits(Some(service.id)).next()?;
            Some((why.to_owned(), None))
        })?;
        Some(WaitStatus {
            what: "the service".to_owned(),
            why,
            since_unix_ms,
            next: None,
        })
    }

    /// [`Part::label`] with the volume's name instead of its id.
    fn part_label(&self, part: &Part) -> String {
        match part {
            Part::Volume(volume) => match self.state.volumes.get(&volume.volume) {
                Some(known) => format!("volume {}", known.name),
                None => part.label(),
            },
            Part::Mount(_) | Part::Address(_) | Part::Process(_) => part.label(),
        }
    }
}
