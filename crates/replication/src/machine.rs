//! The engine once its metadata is read: all state of one volume on this node, and the dispatch
//! of inputs to the modules that handle them.
//!
//! A handler changes state and emits effects; then [`Machine::settle`] starts whatever the new
//! state allows. What may be done is decided from the state alone, never from how it was reached,
//! so a lost link, a new configuration or a failed proposal at any step leads to the same place.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use relevo_format::Layout;
use relevo_types::{BlockRange, Epoch, NodeId, ReplicaSlot, Time, cluster::Volume};
use relevo_wire::Body;

use crate::{
    gate::Gate,
    heal::Heals,
    io::{
        AppRequest, DiskError, DiskReply, Effect, EngineConfig, Input, OpId, PeerState, VolumeEvent,
    },
    jobs::{FlushFor, Flusher, JobId, Jobs, Owner},
    lab::{Lab, PlantedBug},
    lineage::Lineages,
    link::Link,
    metadata::{Metadata, Ticket},
    ops::{Cx, OpUse, Ops},
    pause::Pauses,
    primary::Primary,
    promotion::Promotion,
    proposals::Proposals,
    rate::Rate,
    requests::Requests,
    secondary::{After, Barrier},
    tail::Tail,
    verify::Verification,
};

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) config: EngineConfig,
    pub(crate) lab: Lab,
    pub(crate) ops: Ops,
    pub(crate) meta: Metadata,
    pub(crate) gate: Gate,
    pub(crate) jobs: Jobs,
    pub(crate) flusher: Flusher,
    pub(crate) links: BTreeMap<NodeId, Link>,
    pub(crate) last_link: u64,
    /// The newest committed configuration.
    pub(crate) volume: Option<Arc<Volume>>,
    /// The highest epoch that an earlier life of this engine may have acted under.
    pub(crate) attached_epoch: Epoch,
    /// Nothing acknowledged can be missing on this replica.
    pub(crate) certain: bool,
    pub(crate) tail: Tail,
    pub(crate) lease_until: Time,
    /// When this node opened as primary last.
    pub(crate) opened: Time,
    pub(crate) role: Role,
    pub(crate) requests: Requests,
    pub(crate) afters: Vec<(Ticket, After)>,
    pub(crate) barriers: Vec<Barrier>,
    pub(crate) proposals: Proposals,
    /// The node asked for a planned step-down.
    pub(crate) stepping_down: bool,
    pub(crate) detach: Option<Detach>,
    /// Set when the disk is unusable; the engine then discards this machine.
    pub(crate) failed: Option<String>,
    /// Ids of flushes, resync writes and barriers; never used twice.
    pub(crate) last_id: u64,
    pub(crate) told_peers: BTreeMap<NodeId, PeerState>,
    /// An operator suspended I/O: requests wait.
    pub(crate) suspended: bool,
    /// Slots of the replicas that are of protocol A towards this node, and of protocol B. Known, not
    /// looked up: every write asks.
    pub(crate) async_slots: u8,
    pub(crate) receipt_slots: u8,
    /// A replica of protocol A that may be in the in-sync set for a while, and until when.
    pub(crate) admitted: Option<(NodeId, Time)>,
    /// What the configuration says of that; time counts from the change.
    pub(crate) admit_known: Option<NodeId>,
    /// This replica said at some time that it received a write which was not done.
    pub(crate) gave_receipts: bool,
    /// Flushes that wait for such writes.
    pub(crate) held_flushes: Vec<(JobId, FlushFor)>,
    /// Peers that there shall be no link to, and why.
    pub(crate) standalone: BTreeMap<NodeId, String>,
    pub(crate) lineages: Lineages,
    pub(crate) pauses: Pauses,
    pub(crate) verification: Verification,
    pub(crate) heals: Heals,
    /// When to look whether a generation of marks for replicas of protocol A is over.
    pub(crate) generations_due: Option<Time>,
    pub(crate) rate: Rate,
}

/// What this node is for the volume.
#[derive(Debug)]
pub(crate) enum Role {
    /// Does what a primary says.
    Secondary,
    /// Named primary; not open yet.
    Promoting(Promotion),
    /// Open for I/O.
    Primary(Primary),
    /// Named primary, but another in-sync member knows better what was acknowledged: leaves the
    /// in-sync set and steps down.
    Yielding,
}

/// How far a clean detach is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Detach {
    /// Jobs on the disk end.
    Draining,
    /// The metadata gets durable.
    Saving(Ticket),
    /// Done.
    Done,
}

impl Machine {
    pub(crate) fn new(
        config: EngineConfig,
        lab: Lab,
        ops: Ops,
        mut meta: Metadata,
        certain: bool,
    ) -> Self {
        meta.activity.hold_at_most(lab.hot_regions_max);
        Self {
            attached_epoch: meta.superblock.epoch,
            config,
            lab,
            ops,
            meta,
            gate: Gate::default(),
            jobs: Jobs::default(),
            flusher: Flusher::default(),
            links: BTreeMap::new(),
            last_link: 0,
            volume: None,
            certain,
            tail: Tail::default(),
            lease_until: Time::ZERO,
            opened: Time::ZERO,
            role: Role::Secondary,
            requests: Requests::default(),
            afters: Vec::new(),
            barriers: Vec::new(),
            proposals: Proposals::default(),
            stepping_down: false,
            detach: None,
            failed: None,
            last_id: 0,
            told_peers: BTreeMap::new(),
            suspended: false,
            async_slots: 0,
            receipt_slots: 0,
            admitted: None,
            admit_known: None,
            gave_receipts: false,
            held_flushes: Vec::new(),
            standalone: BTreeMap::new(),
            lineages: Lineages::default(),
            pauses: Pauses::default(),
            verification: Verification::default(),
            heals: Heals::default(),
            generations_due: None,
            rate: Rate::default(),
        }
    }

    pub(crate) fn handle(&mut self, cx: &mut Cx<'_>, input: Input) {
        match input {
            Input::Attach | Input::Tick => {}
            Input::Config(volume) => self.config_arrived(cx, volume),
            Input::LeaseUntil(until) => self.lease_arrived(cx, until),
            Input::LinkUp { peer } => self.link_up(cx, peer),
            Input::LinkDown { peer } => self.link_lost(cx, peer),
            Input::Message { peer, message } => self.message_arrived(cx, peer, message),
            Input::Disk { op, result } => self.disk_done(cx, op, result),
            Input::Request { id, request } => self.request_arrived(cx, id, request),
            Input::Demote => self.stepping_down |= !matches!(self.role, Role::Secondary),
            Input::Detach => self.detach_asked(cx),
            Input::Order { id, order } => self.order_arrived(cx, id, order),
            Input::Saved { id, result } => self.saved(cx, id, result),
        }
        self.settle(cx);
    }

    /// Starts everything that the state allows.
    pub(crate) fn settle(&mut self, cx: &mut Cx<'_>) {
        if self.failed.is_some() {
            return;
        }
        self.settle_disk(cx);
        if self.failed.is_some() {
            return;
        }
        self.settle_healing_writes(cx);
        self.settle_links(cx);
        self.settle_giving_way(cx);
        self.settle_barriers(cx);
        self.settle_held_flushes(cx);
        match self.role {
            Role::Secondary | Role::Yielding => {}
            Role::Promoting(_) => self.settle_promotion(cx),
            Role::Primary(_) => self.settle_primary(cx),
        }
        self.settle_proposals(cx);
        self.settle_saving(cx);
        self.settle_detach(cx);
        if self.detach == Some(Detach::Done) {
            // The backing is somebody else's from now on, whatever came meanwhile.
            return;
        }
        self.pump_metadata(cx);
        self.tell_peer_states(cx);
    }

    fn pump_metadata(&mut self, cx: &mut Cx<'_>) {
        let starved = if self.meta.wants_room() {
            self.meta.activity.starved_by(&self.tail.regions())
        } else {
            Vec::new()
        };
        // The tail keeps its regions, and a write that waits for room keeps the tail from getting
        // shorter: writes to hot regions pass it, and no position is complete before it. So here
        // what the log can't remember goes into the replica's own bitmap, which the commit that
        // drops the regions saves first.
        if !starved.is_empty() {
            let own = self.meta.own_slot();
            for blocks in self.tail.blocks() {
                if Layout::regions(blocks).any(|region| starved.contains(&region)) {
                    self.meta.bitmaps.set(own, blocks);
                }
            }
        }
        let tail = &self.tail;
        self.meta.pump(cx, &mut self.ops, || {
            let mut keep = tail.regions();
            keep.retain(|region| !starved.contains(region));
            keep
        });
        if self.lab.has(PlantedBug::SkipActivityWait) {
            for job in self.meta.activity.warmed() {
                self.job_hot(cx, job);
            }
        }
    }

    fn disk_done(&mut self, cx: &mut Cx<'_>, op: OpId, result: Result<DiskReply, DiskError>) {
        let Some(used_for) = self.ops.finish(op) else {
            return;
        };
        let data = match result {
            Ok(DiskReply::Data(data)) => Some(data),
            Ok(DiskReply::Done) => None,
            Err(error) => {
                match used_for {
                    OpUse::Job(id) if self.is_read(id) => self.read_failed(cx, id, &error),
                    _ => self.disk_error(&error.to_string()),
                }
                return;
            }
        };
        match used_for {
            OpUse::Job(id) => self.job_disk_done(cx, id, data),
            OpUse::Flush => self.flush_done(cx),
            OpUse::Commit => {
                if self.meta.commit_op_done(cx, &mut self.ops) {
                    self.commit_done(cx);
                }
            }
            OpUse::Attach(_) => {}
        }
    }

    fn commit_done(&mut self, cx: &mut Cx<'_>) {
        for job in self.meta.activity.warmed() {
            self.job_hot(cx, job);
        }
        let afters = std::mem::take(&mut self.afters);
        for (ticket, after) in afters {
            if self.meta.is_durable(ticket) {
                self.carry_on(cx, after);
            } else {
                self.afters.push((ticket, after));
            }
        }
    }

    /// The disk could not do what this replica can't be without.
    pub(crate) fn disk_error(&mut self, error: &str) {
        self.fail(format!(
            "{error}; the replica is out of use until the disk is repaired and the volume attached again"
        ));
    }

    /// The disk is unusable. Nothing is tried again.
    pub(crate) fn fail(&mut self, reason: String) {
        self.failed.get_or_insert(reason);
    }

    pub(crate) fn node(&self) -> NodeId {
        self.config.node
    }

    /// The highest epoch seen; data messages of lower ones are refused.
    pub(crate) fn seen_epoch(&self) -> Epoch {
        self.meta.superblock.epoch
    }

    /// Raises the highest epoch seen. It reaches the superblock with the next commit.
    pub(crate) fn saw_epoch(&mut self, epoch: Epoch) -> Option<Ticket> {
        if epoch > self.meta.superblock.epoch {
            self.meta.superblock.epoch = epoch;
            return Some(self.meta.want_superblock());
        }
        None
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// The slot of a node's replica under the known configuration.
    pub(crate) fn slot(&self, node: NodeId) -> Option<ReplicaSlot> {
        self.volume.as_ref()?.slot(node)
    }

    /// The slots of the other replicas, as bits.
    pub(crate) fn other_slots(&self) -> u8 {
        // Not knowing better, all that there can be.
        let all = self.volume.as_ref().map_or(0x7f, |volume| {
            let slots = volume.replicas.values().map(|replica| mask(replica.slot));
            slots.fold(0, |all, slot| all | slot)
        });
        all & !mask(self.meta.own_slot())
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(self.role, Role::Primary(_))
    }

    /// Whether this node takes requests.
    pub(crate) fn serves(&self) -> bool {
        self.primary().is_some_and(|primary| primary.serves)
    }

    /// Whether a run lies within the volume and is not empty.
    pub(crate) fn is_inside(&self, blocks: BlockRange) -> bool {
        let end = blocks.first.checked_add(blocks.count);
        blocks.count > 0 && end.is_some_and(|end| end <= self.meta.layout().data_blocks())
    }

    /// Makes sure that bits for these slots are read at the next attach.
    pub(crate) fn use_slots(&mut self, slots: u8) {
        if self.meta.superblock.slots_used & slots != slots {
            self.meta.superblock.slots_used |= slots;
            self.meta.want_superblock();
        }
    }

    /// Marks blocks dirty for all slots of a mask, except this replica's own.
    pub(crate) fn mark_dirty(&mut self, slots: u8, blocks: BlockRange) {
        for slot in slots_of(slots & !mask(self.meta.own_slot())) {
            self.meta.bitmaps.set(slot, blocks);
        }
    }

    /// Ends a reign over this replica: what it wrote and may be missing elsewhere is uncertain.
    pub(crate) fn fold_tail(&mut self) {
        let own = self.meta.own_slot();
        for blocks in self.tail.take() {
            self.meta.bitmaps.set(own, blocks);
        }
    }

    fn detach_asked(&mut self, cx: &mut Cx<'_>) {
        if self.detach.is_some() {
            return;
        }
        self.close(cx, "the volume is being detached");
        for peer in self.links.keys().copied().collect::<Vec<_>>() {
            self.close_link(cx, peer, "the volume is being detached".to_owned());
        }
        // What a primary was told to be received is written first.
        self.abandon_jobs(cx, |owner| !matches!(owner, Owner::PeerWrite(..)));
        self.fold_tail();
        self.detach = Some(Detach::Draining);
    }

    fn settle_detach(&mut self, cx: &mut Cx<'_>) {
        match self.detach {
            Some(Detach::Draining) if self.jobs.table.is_empty() && self.meta.is_settled() => {
                self.meta.superblock.certain = self.certain;
                self.meta.superblock.clean = true;
                let ticket = self.meta.want_empty_log();
                self.detach = Some(Detach::Saving(ticket));
            }
            Some(Detach::Saving(ticket)) if self.meta.is_durable(ticket) && self.ops.is_idle() => {
                self.detach = Some(Detach::Done);
                cx.emit(Effect::Event(VolumeEvent::Detached));
            }
            _ => {}
        }
    }

    fn request_arrived(&mut self, cx: &mut Cx<'_>, id: crate::io::RequestId, request: AppRequest) {
        self.accept_request(cx, id, request);
    }

    fn lease_arrived(&mut self, cx: &mut Cx<'_>, until: Time) {
        self.lease_until = until;
        self.start_parked_reads(cx);
    }
}

/// A slot as a bit.
pub(crate) fn mask(slot: ReplicaSlot) -> u8 {
    1u8.checked_shl(u32::from(slot.0)).unwrap_or(0)
}

/// The slots of a mask.
pub(crate) fn slots_of(mask_bits: u8) -> impl Iterator<Item = ReplicaSlot> {
    (0..7u8)
        .map(ReplicaSlot)
        .filter(move |slot| mask_bits & mask(*slot) != 0)
}

/// Content to be sent: zeroes travel as zeroes.
pub(crate) fn body_of(data: Bytes) -> Body {
    if is_zero(&data) {
        Body::Zeroes
    } else {
        Body::Data(data)
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(data: &[u8]) -> bool {
    // By words: the compiler turns this into wide compares.
    let (head, words, tail) = (data.chunks_exact(16), data.len() / 16 * 16, data);
    head.map(|chunk| chunk.iter().fold(0, |all, byte| all | byte))
        .all(|byte| byte == 0)
        && tail[words..].iter().all(|byte| *byte == 0)
}
