//! What this node's engines do, and what they are told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use relevo_planner::ReplicaView;
use relevo_replication::io::{DiskState, EngineStatus, PeerState, VolumeEvent, promotion};
use relevo_types::{
    NodeId, Time, VolumeId,
    cluster::{ClusterState, Command, ReplicaStanding, Volume, VolumeChange},
};

use crate::{Effect, VolumeOrder, proposals::Proposals, runner::DEMOTE_AGAIN};

/// A service that starts, or a person, is about to promote somebody within this time.
const TEND_AFTER: Duration = Duration::from_secs(3);

/// One engine as it told.
#[derive(Debug)]
struct Engine {
    status: EngineStatus,
    /// Why it closed or failed last.
    trouble: Option<String>,
    /// It was open and closed since, or its disk failed: it does not open by itself.
    closed: bool,
}

impl Engine {
    fn peer(&self, node: NodeId) -> PeerState {
        self.status.peers.get(&node).copied().unwrap_or_default()
    }

    /// Whether there is a link to another node's replica, and they are of one history.
    fn reaches(&self, node: NodeId) -> bool {
        !matches!(
            self.peer(node),
            PeerState::Connecting | PeerState::StandAlone
        )
    }
}

/// All engines of this node.
#[derive(Debug, Default)]
pub(crate) struct Engines {
    engines: BTreeMap<VolumeId, Engine>,
    /// The configurations that were sent.
    sent: BTreeMap<VolumeId, Arc<Volume>>,
    /// Replicas that are being made, and how that ended.
    creating: BTreeMap<VolumeId, Option<Result<(), String>>>,
    /// Replicas that exist here.
    local: BTreeSet<VolumeId>,
    /// Volumes of which this node is primary and shall not be, and when it was told to step down.
    stepping_down: BTreeMap<VolumeId, Time>,
    /// Volumes of which a replica lacks something although nobody uses them, and since when.
    untended: BTreeMap<VolumeId, Time>,
}

impl Engines {
    pub(crate) fn new(local: BTreeSet<VolumeId>) -> Self {
        Self {
            local,
            ..Self::default()
        }
    }

    /// An engine told something.
    pub(crate) fn note(
        &mut self,
        volume: VolumeId,
        event: Option<&VolumeEvent>,
        status: EngineStatus,
    ) {
        let was_open = self.is_open(volume);
        let engine = self.engines.entry(volume).or_insert_with(|| Engine {
            status: status.clone(),
            trouble: None,
            closed: false,
        });
        engine.status = status;
        match event {
            Some(VolumeEvent::DiskFailed { reason } | VolumeEvent::Closed { reason }) => {
                engine.trouble = Some(reason.clone());
                engine.closed = true;
            }
            Some(VolumeEvent::Opened { .. } | VolumeEvent::Attached { .. }) => {
                engine.trouble = None;
                engine.closed = false;
            }
            Some(
                VolumeEvent::Detached
                | VolumeEvent::Tends { .. }
                | VolumeEvent::Peer { .. }
                | VolumeEvent::Verified { .. }
                | VolumeEvent::Healed { .. }
                | VolumeEvent::Unreadable { .. }
                | VolumeEvent::SplitBrain { .. }
                | VolumeEvent::GaveWay { .. },
            )
            | None => {}
        }
        engine.closed |= was_open && !engine.status.open;
        engine.closed &= !engine.status.open;
    }

    pub(crate) fn note_created(&mut self, volume: VolumeId, result: Result<(), String>) {
        if result.is_ok() {
            self.local.insert(volume);
        }
        self.creating.insert(volume, Some(result));
    }

    pub(crate) fn is_open(&self, volume: VolumeId) -> bool {
        self.engines
            .get(&volume)
            .is_some_and(|engine| engine.status.open)
    }

    /// Its disk failed, and its requests wait until data is accessible again.
    pub(crate) fn is_held(&self, volume: VolumeId) -> bool {
        self.engines
            .get(&volume)
            .is_some_and(|engine| engine.status.held)
    }

    /// What a service waits for whose volume is held.
    pub(crate) fn why_held(&self, volume: VolumeId, state: &ClusterState) -> String {
        let name = state
            .volumes
            .get(&volume)
            .map_or_else(|| volume.to_string(), |volume| volume.name.clone());
        let engine = self.engines.get(&volume);
        let trouble = engine.and_then(|engine| engine.trouble.as_deref());
        format!(
            "volume `{name}` waits for accessible data (`on-no-data-accessible=suspend-io`): {}; repair the disk and run `relevo attach {name}`: the service goes on by itself",
            trouble.unwrap_or("its disk failed")
        )
    }

    /// Primary by the configuration, but closed for good: it will not step down by itself.
    pub(crate) fn is_dead(&self, volume: VolumeId) -> bool {
        self.engines.get(&volume).is_some_and(|engine| {
            !engine.status.open && (engine.closed || engine.status.disk == DiskState::Failed)
        })
    }

    /// How this node asks to become primary.
    pub(crate) fn promotion(&self, volume: VolumeId, me: NodeId) -> VolumeChange {
        let engine = self.engines.get(&volume);
        promotion(me, engine.map(|engine| &engine.status))
    }

    pub(crate) fn disk(&self, volume: VolumeId) -> Option<DiskState> {
        self.engines.get(&volume).map(|engine| engine.status.disk)
    }

    pub(crate) fn why_closed(&self, volume: VolumeId, state: &ClusterState) -> String {
        let name = state
            .volumes
            .get(&volume)
            .map_or_else(|| volume.to_string(), |volume| volume.name.clone());
        let trouble = self
            .engines
            .get(&volume)
            .and_then(|engine| engine.trouble.as_deref())
            .unwrap_or("this node is not primary any more");
        format!("volume `{name}` closed: {trouble}")
    }

    pub(crate) fn why_not_open(&self, volume: VolumeId, name: &str) -> String {
        match self.engines.get(&volume) {
            None => format!("volume `{name}` is not attached yet"),
            Some(engine) => match (&engine.status.waiting, engine.status.disk) {
                (Some(waiting), _) => format!("volume `{name}` opens: {waiting}"),
                (None, DiskState::Attaching) => format!("volume `{name}` is being attached"),
                (None, _) => format!("volume `{name}` reconciles with the other replicas"),
            },
        }
    }

    pub(crate) fn why_not_demoted(&self, volume: VolumeId, name: &str) -> String {
        let waiting = self
            .engines
            .get(&volume)
            .and_then(|engine| engine.status.waiting.as_deref());
        match waiting {
            Some(waiting) => format!("volume `{name}` steps down: {waiting}"),
            None => format!("volume `{name}` steps down: its last writes are made durable"),
        }
    }

    /// This node's replicas for its report.
    pub(crate) fn replica_views(&self) -> BTreeMap<VolumeId, ReplicaView> {
        let view = |engine: &Engine| match engine.status.disk {
            DiskState::Failed => ReplicaView::Failed,
            DiskState::Attaching | DiskState::Diskless => ReplicaView::Attaching,
            DiskState::Inconsistent
            | DiskState::Outdated
            | DiskState::Consistent
            | DiskState::UpToDate => {
                if engine.status.certain {
                    ReplicaView::Certain
                } else {
                    ReplicaView::Uncertain
                }
            }
        };
        self.engines
            .iter()
            .map(|(id, engine)| (*id, view(engine)))
            .collect()
    }

    /// Tells the data path what changed in the replicated state.
    pub(crate) fn drive(
        &mut self,
        now: Time,
        me: NodeId,
        state: &ClusterState,
        proposals: &mut Proposals,
        out: &mut Vec<Effect>,
    ) {
        self.remove_gone(me, state, out);
        for (id, volume) in &state.volumes {
            let Some(replica) = volume.replicas.get(&me) else {
                continue;
            };
            match replica.standing {
                ReplicaStanding::Creating => self.create(now, me, state, volume, proposals, out),
                ReplicaStanding::Failed(_) => {}
                ReplicaStanding::Ready => {
                    self.local.insert(*id);
                    self.creating.remove(id);
                    if self.sent.get(id).is_none_or(|sent| **sent != *volume) {
                        let config = Arc::new(volume.clone());
                        self.sent.insert(*id, Arc::clone(&config));
                        out.push(Effect::Volume {
                            volume: *id,
                            order: VolumeOrder::Config(config),
                        });
                    }
                    if volume.primary != Some(me) {
                        self.stepping_down.remove(id);
                    }
                    self.leave_to_holder(now, me, state, volume, proposals, out);
                    self.tend(now, me, state, volume, proposals, out);
                    self.forgive_disk(now, me, state, volume, proposals, out);
                }
            }
        }
    }

    /// This node gave services up because its disk failed, and has all data on a disk that works: whatever
    /// there was to repair is repaired. (A replica that had to leave the in-sync set is forgiven by its
    /// join; this is for the last one, which never left.) A disk that fails again gives up again, and only
    /// after it was attached anew.
    fn forgive_disk(
        &self,
        now: Time,
        me: NodeId,
        state: &ClusterState,
        volume: &Volume,
        proposals: &mut Proposals,
        out: &mut Vec<Effect>,
    ) {
        if self.disk(volume.id) != Some(DiskState::UpToDate) {
            return;
        }
        for service in state.services.values() {
            let record = service.failures.get(&me);
            if record.is_some_and(|record| record.disk == Some(volume.id)) {
                let command = Command::DiskRepaired {
                    service: service.id,
                    node: me,
                };
                let reason = format!(
                    "{}: the disk of volume `{}` is in use again here",
                    service.spec.name, volume.name
                );
                proposals.want(now, state.revision, command, &reason, out);
            }
        }
    }

    /// Steps down where another node holds the service of a volume. A promotion that was under way
    /// when the service was given back is committed after the release: without this the new holder
    /// would wait for this node for ever.
    fn leave_to_holder(
        &mut self,
        now: Time,
        me: NodeId,
        state: &ClusterState,
        volume: &Volume,
        proposals: &mut Proposals,
        out: &mut Vec<Effect>,
    ) {
        let id = volume.id;
        let holder = state
            .services
            .values()
            .filter(|service| service.spec.uses(id))
            .find_map(|service| service.holder.filter(|holder| *holder != me));
        let Some(holder) = holder.filter(|_| volume.primary == Some(me)) else {
            return;
        };
        if self.is_dead(id) {
            let command = Command::Volume {
                volume: id,
                expect: volume.epoch,
                change: VolumeChange::Demote { node: me },
            };
            let reason = format!(
                "volume `{}` is closed on this node, and {} holds its service",
                volume.name,
                state.node_name(holder)
            );
            proposals.want(now, state.revision, command, &reason, out);
        } else {
            self.tell_to_step_down(now, id, out);
        }
    }

    /// Now, and again as long as it is primary.
    fn tell_to_step_down(&mut self, now: Time, volume: VolumeId, out: &mut Vec<Effect>) {
        let told = self.stepping_down.get(&volume);
        if told.is_none_or(|told| now >= *told + DEMOTE_AGAIN) {
            self.stepping_down.insert(volume, now);
            out.push(Effect::Volume {
                volume,
                order: VolumeOrder::Demote,
            });
        }
    }

    /// While nobody uses a volume, a replica in sync brings the others up to date: as a primary that takes no
    /// request, until all is done or somebody is promoted.
    fn tend(
        &mut self,
        now: Time,
        me: NodeId,
        state: &ClusterState,
        volume: &Volume,
        proposals: &mut Proposals,
        out: &mut Vec<Effect>,
    ) {
        let id = volume.id;
        let needed = volume.serving().is_none() && self.needs_tending(me, volume);
        if volume.primary == Some(me) && volume.tends && !needed {
            self.tell_to_step_down(now, id, out);
            return;
        }
        let mut services = state.services.values();
        if !needed
            || volume.primary.is_some()
            || services.any(|it| it.holder.is_some() && it.spec.uses(id))
            || !self.may_tend(me, state, volume)
        {
            self.untended.remove(&id);
            return;
        }
        if now < *self.untended.entry(id).or_insert(now) + TEND_AFTER {
            return;
        }
        let command = Command::Volume {
            volume: id,
            expect: volume.epoch,
            change: VolumeChange::Tend { node: me },
        };
        let reason = format!(
            "volume `{}`: nobody uses it, and a replica lacks what this one has",
            volume.name
        );
        proposals.want(now, state.revision, command, &reason, out);
    }

    /// Whether a replica that can be reached lacks something, or one that shall go waits to be let go.
    fn needs_tending(&self, me: NodeId, volume: &Volume) -> bool {
        let Some(engine) = self.engines.get(&volume.id) else {
            return false;
        };
        volume.replicas.iter().any(|(node, replica)| {
            if volume.in_sync.contains(node) {
                return replica.leaving;
            }
            let lacks = engine.reaches(*node) && engine.peer(*node) != PeerState::Following;
            lacks && *node != me && replica.standing == ReplicaStanding::Ready
        })
    }

    /// Whether this node has all, and is in touch with all who have: one that is away shall not have to leave
    /// the set for this.
    fn may_tend(&self, me: NodeId, state: &ClusterState, volume: &Volume) -> bool {
        let Some(engine) = self.engines.get(&volume.id) else {
            return false;
        };
        let status = &engine.status;
        let stays = volume.replicas.get(&me).is_some_and(|own| !own.leaving);
        let evicted = state.nodes.get(&me).is_none_or(|own| own.lease.evicted);
        let has_all = status.certain && status.disk == DiskState::UpToDate;
        let away = |node: &NodeId| *node != me && !engine.reaches(*node);
        stays && !evicted && has_all && !volume.in_sync.iter().any(away)
    }

    fn create(
        &mut self,
        now: Time,
        me: NodeId,
        state: &ClusterState,
        volume: &Volume,
        proposals: &mut Proposals,
        out: &mut Vec<Effect>,
    ) {
        let id = volume.id;
        let Some(replica) = volume.replicas.get(&me) else {
            return;
        };
        match self.creating.get(&id) {
            None => {
                // One that was removed and is added again: what is here of the old one goes.
                self.local.remove(&id);
                self.sent.remove(&id);
                self.engines.remove(&id);
                self.creating.insert(id, None);
                out.push(Effect::Volume {
                    volume: id,
                    order: VolumeOrder::CreateReplica {
                        spec: replica.spec.clone(),
                        volume: Arc::new(volume.clone()),
                    },
                });
            }
            Some(None) => {}
            Some(Some(result)) => {
                let (command, reason) = match result {
                    Ok(()) => (
                        Command::ReplicaCreated {
                            volume: id,
                            node: me,
                        },
                        format!("volume `{}`: the replica was created", volume.name),
                    ),
                    Err(reason) => (
                        Command::ReplicaNotCreated {
                            volume: id,
                            node: me,
                            reason: reason.clone(),
                        },
                        format!("volume `{}`: {reason}", volume.name),
                    ),
                };
                proposals.want(now, state.revision, command, &reason, out);
            }
        }
    }

    /// Replicas of volumes that are gone for good. An old state may not know a volume *yet*; ids
    /// are never given twice, so one that was given and is not there was removed.
    fn remove_gone(&mut self, me: NodeId, state: &ClusterState, out: &mut Vec<Effect>) {
        let known = self.local.iter().chain(self.creating.keys());
        let gone: BTreeSet<VolumeId> = known
            .copied()
            .filter(|id| {
                let has_mine = state
                    .volumes
                    .get(id)
                    .is_some_and(|volume| volume.replicas.contains_key(&me));
                id.0 <= state.last_volume && !has_mine
            })
            .collect();
        for id in gone {
            self.local.remove(&id);
            self.creating.remove(&id);
            self.sent.remove(&id);
            self.engines.remove(&id);
            out.push(Effect::Volume {
                volume: id,
                order: VolumeOrder::RemoveReplica,
            });
        }
    }
}
