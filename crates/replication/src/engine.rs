//! The engine as its driver sees it: attaching, then the [`Machine`], then failed or detached.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use relevo_types::{
    BlockRange, Epoch, LineageId, NodeId, Time,
    cluster::{Volume, options::OnNoData},
};
use relevo_wire::{Body, Message, Refusal};

use crate::{
    attach::{Attach, Loaded},
    heal::{DISK_HANGS, disk_deadline},
    io::{
        DiskReply, DiskState, Effect, EngineConfig, EngineStatus, Input, PeerState, ReplyError,
        RequestId, VolumeEvent,
    },
    lab::Lab,
    machine::{Detach, Machine},
    metadata::Ticket,
    ops::{Cx, OpUse, Ops},
    proposals::{Proposals, hand_over},
    window::Window,
};

/// Messages that arrive before the metadata is read. Peers say little before they are greeted.
const PARKED_MAX: usize = 1024;

/// One volume's replication on one node.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    lab: Lab,
    state: State,
}

#[derive(Debug)]
enum State {
    New(Parked),
    Reading(Box<Attach>, Ops, Parked),
    /// What a crash left uncertain gets durable.
    Recovering(Box<Machine>, Recovery, Parked),
    Ready(Box<Machine>),
    Failed(Failed),
    Detached,
}

#[derive(Debug)]
struct Recovery {
    ticket: Ticket,
    clean: bool,
    remark: Option<String>,
}

/// What arrives before the metadata is read.
#[derive(Debug, Default)]
struct Parked {
    volume: Option<Arc<Volume>>,
    lease_until: Option<Time>,
    links: BTreeSet<NodeId>,
    messages: VecDeque<(NodeId, Message)>,
    detach: bool,
}

/// An unusable disk. The engine only helps others to go on without this replica.
#[derive(Debug)]
struct Failed {
    volume: Option<Arc<Volume>>,
    reason: String,
    epoch: Epoch,
    proposals: Proposals,
    /// Requests that wait for data to be accessible again (`on-no-data-accessible=suspend-io`); `None`:
    /// they fail.
    held: Option<Vec<RequestId>>,
}

/// Requests that wait for accessible data at most; further ones fail.
const HELD_MAX: usize = 16_384;

impl Engine {
    /// An engine that has not read its metadata yet; give it [`Input::Attach`] first.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        Self::with_lab(config, Lab::default())
    }

    /// The same with the settings of a laboratory.
    #[must_use]
    pub fn with_lab(config: EngineConfig, lab: Lab) -> Self {
        Self {
            config,
            lab,
            state: State::New(Parked::default()),
        }
    }

    /// Takes one input at the time `now` and appends what shall be done to `effects`.
    pub fn handle(&mut self, now: Time, input: Input, effects: &mut Vec<Effect>) {
        let mut cx = Cx { now, effects };
        let state = std::mem::replace(&mut self.state, State::Detached);
        let state = self.step(&mut cx, state, input);
        self.state = self.give_up_hanging(&mut cx, state);
        if let State::Recovering(machine, _, parked) = &mut self.state
            && machine.failed.is_some()
        {
            parked.hand_to_failed(&mut cx, machine);
        }
        if let State::Ready(machine) | State::Recovering(machine, ..) = &mut self.state
            && let Some(reason) = machine.failed.take()
        {
            let failed = fail_machine(&mut cx, machine, reason);
            self.state = State::Failed(failed);
        }
        if let State::Ready(machine) = &self.state
            && machine.detach == Some(Detach::Done)
        {
            self.state = State::Detached;
        }
        // A planted bug is for others to find.
        debug_assert!(
            self.lab.planted.is_some() || self.check_invariants() == Ok(()),
            "{:?}",
            self.check_invariants()
        );
    }

    fn step(&self, cx: &mut Cx<'_>, state: State, input: Input) -> State {
        match (state, input) {
            (State::Ready(mut machine), input) => {
                machine.handle(cx, input);
                State::Ready(machine)
            }
            (State::New(parked), Input::Attach) => self.attach(cx, parked),
            (State::Reading(attach, ops, parked), Input::Disk { op, result }) => {
                self.read(cx, attach, ops, parked, op, result)
            }
            (State::Recovering(mut machine, recovery, parked), input @ Input::Disk { .. }) => {
                machine.handle(cx, input);
                recovered(cx, machine, recovery, parked)
            }
            (State::Failed(_), Input::Detach) => {
                // Requests that wait stay unanswered: their connections end, and who connects again may
                // ask again.
                cx.emit(Effect::Event(VolumeEvent::Detached));
                State::Detached
            }
            (State::Failed(mut failed), input) => {
                failed.handle(cx, self.config.node, input);
                State::Failed(failed)
            }
            (State::New(mut parked), input) => {
                if parked.park(cx, input) {
                    cx.emit(Effect::Event(VolumeEvent::Detached));
                    return State::Detached;
                }
                State::New(parked)
            }
            (State::Reading(attach, ops, mut parked), input) => {
                parked.park(cx, input);
                State::Reading(attach, ops, parked)
            }
            (State::Recovering(machine, recovery, mut parked), input) => {
                parked.park(cx, input);
                State::Recovering(machine, recovery, parked)
            }
            (State::Detached, input) => {
                Parked::default().park(cx, input);
                State::Detached
            }
        }
    }

    /// A disk that does not answer while it is being attached is given up like one in use. The daemon and
    /// its other volumes never wait for it; this is so that it is told, and that the others are not kept
    /// waiting by a replica that is in sync and can't say what it has.
    fn give_up_hanging(&self, cx: &mut Cx<'_>, mut state: State) -> State {
        if cx.now < self.attach_deadline(&state) {
            return state;
        }
        match state {
            State::Reading(_, _, parked) => {
                let reason = format!(
                    "{DISK_HANGS}, while it was attached; once it does, attach the volume again"
                );
                fail_attach(cx, self.config.node, parked, reason)
            }
            State::Recovering(ref mut machine, ..) => {
                machine.disk_error(DISK_HANGS);
                state
            }
            _ => state,
        }
    }

    fn attach_deadline(&self, state: &State) -> Time {
        let (oldest, parked) = match state {
            State::Reading(_, ops, parked) => (ops.oldest(), parked),
            State::Recovering(machine, _, parked) => (machine.ops.oldest(), parked),
            _ => return Time::NEVER,
        };
        disk_deadline(parked.volume.as_deref(), self.config.node, oldest)
    }

    fn attach(&self, cx: &mut Cx<'_>, parked: Parked) -> State {
        let mut ops = Ops::default();
        match Attach::begin(cx, &mut ops, &self.config) {
            Ok(attach) => State::Reading(Box::new(attach), ops, parked),
            Err(reason) => fail_attach(cx, self.config.node, parked, reason),
        }
    }

    fn read(
        &self,
        cx: &mut Cx<'_>,
        mut attach: Box<Attach>,
        mut ops: Ops,
        parked: Parked,
        op: crate::OpId,
        result: Result<DiskReply, crate::DiskError>,
    ) -> State {
        let Some(OpUse::Attach(index)) = ops.finish(op) else {
            return State::Reading(attach, ops, parked);
        };
        let read = match result {
            Ok(DiskReply::Data(data)) => attach.part_read(cx, &mut ops, &self.config, index, &data),
            Ok(DiskReply::Done) => Err("a read gave no data; the disk driver is at fault".into()),
            Err(error) => Err(format!("the metadata can't be read: {error}")),
        };
        match read {
            Ok(None) => State::Reading(attach, ops, parked),
            Ok(Some(loaded)) => self.recover(cx, ops, parked, loaded),
            Err(reason) => fail_attach(cx, self.config.node, parked, reason),
        }
    }

    fn recover(&self, cx: &mut Cx<'_>, ops: Ops, parked: Parked, loaded: Loaded) -> State {
        let Loaded {
            mut meta,
            clean,
            certain,
            must_save,
            remark,
        } = loaded;
        let ticket = if must_save {
            meta.want_empty_log()
        } else {
            Ticket::default()
        };
        let mut machine = Box::new(Machine::new(
            self.config.clone(),
            self.lab,
            ops,
            meta,
            certain,
        ));
        machine.settle(cx);
        let recovery = Recovery {
            ticket,
            clean,
            remark,
        };
        recovered(cx, machine, recovery, parked)
    }

    /// When [`Input::Tick`] is due; [`Time::NEVER`] when nothing waits for time.
    #[must_use]
    pub fn deadline(&self) -> Time {
        match &self.state {
            State::Ready(machine) => machine.deadline(),
            State::Failed(failed) => failed.proposals.deadline(),
            State::Reading(..) | State::Recovering(..) => self.attach_deadline(&self.state),
            State::New(_) | State::Detached => Time::NEVER,
        }
    }

    /// Whether a link to a peer would be of use: not while an operator or a decision keeps them apart.
    #[must_use]
    pub fn wants_link(&self, peer: NodeId) -> bool {
        match &self.state {
            State::Ready(machine) => machine.wants_link(peer),
            _ => true,
        }
    }

    /// Whether requests wait although the disk here failed: clients shall stay connected.
    #[must_use]
    pub fn holds_requests(&self) -> bool {
        matches!(&self.state, State::Failed(failed) if failed.held.is_some())
    }

    /// What the engine is doing.
    #[must_use]
    pub fn status(&self) -> EngineStatus {
        let (disk, epoch, waiting) = match &self.state {
            State::Ready(machine) => return machine.status(),
            State::New(_) => (DiskState::Attaching, Epoch(0), None),
            State::Reading(..) => {
                let words = "waits for the metadata to be read".to_owned();
                (DiskState::Attaching, Epoch(0), Some(words))
            }
            State::Recovering(machine, ..) => {
                let words = "waits for what a crash left uncertain to be durable".to_owned();
                (DiskState::Attaching, machine.seen_epoch(), Some(words))
            }
            State::Failed(failed) => {
                let words = failed
                    .proposals
                    .words()
                    .map(|words| format!("waits for {words}"));
                let mut words = words.unwrap_or_else(|| failed.reason.clone());
                if failed.held.is_some() {
                    words = format!("waits for accessible data (`on-no-data-accessible`): {words}");
                }
                (DiskState::Failed, failed.epoch, Some(words))
            }
            State::Detached => (DiskState::Diskless, Epoch(0), None),
        };
        EngineStatus {
            open: false,
            disk,
            epoch,
            certain: false,
            in_flight: 0,
            held: self.holds_requests(),
            waiting,
            peers: BTreeMap::<NodeId, PeerState>::new(),
            behind: BTreeMap::new(),
            sync_speeds: BTreeMap::new(),
            sync_same: BTreeMap::new(),
            sync_limit: None,
            sync_after: None,
            splits: BTreeMap::new(),
        }
    }

    /// Where the replica of `node` may lack what this node has, for tests and verification; empty
    /// for an unknown node. For this node itself: what it would call uncertain, its tail included, and as
    /// a primary what it wrote and not all acknowledged.
    #[must_use]
    pub fn dirty_blocks(&self, node: NodeId) -> Vec<BlockRange> {
        let State::Ready(machine) = &self.state else {
            return Vec::new();
        };
        let runs = |slot| machine.meta.bitmaps.of(slot).runs(u64::MAX);
        if node == self.config.node {
            let own = runs(machine.meta.own_slot());
            let writes = machine.primary().map(|primary| &primary.writes);
            let writes = writes.into_iter().flat_map(Window::values);
            let incomplete = writes.filter(|it| !it.complete).map(|it| it.blocks);
            return own.chain(machine.tail.blocks()).chain(incomplete).collect();
        }
        machine
            .slot(node)
            .map_or_else(Vec::new, |slot| runs(slot).collect())
    }

    /// Writes of a primary that this replica received and has not written, for tests.
    #[must_use]
    pub fn received_blocks(&self) -> Vec<BlockRange> {
        let State::Ready(machine) = &self.state else {
            return Vec::new();
        };
        let jobs = machine.jobs.table.values();
        let received = jobs.filter(|job| matches!(job.owner, crate::jobs::Owner::PeerWrite(..)));
        received.map(|job| job.blocks).collect()
    }

    /// What waits here for its turn on the disk, for tests: whatever overlaps comes before it or after it.
    #[must_use]
    pub fn queued_writes(&self) -> Vec<(BlockRange, Body)> {
        let State::Ready(machine) = &self.state else {
            return Vec::new();
        };
        let jobs = machine.jobs.table.values();
        jobs.filter_map(crate::jobs::Job::queued).collect()
    }

    /// The history that the replica belongs to, for tests; `None` while its metadata is not read.
    #[must_use]
    pub fn lineage(&self) -> Option<LineageId> {
        match &self.state {
            State::Ready(machine) => Some(machine.lineage()),
            _ => None,
        }
    }

    /// Whether the replica calls itself a mix of old and new, for tests.
    #[must_use]
    pub fn is_mix(&self) -> bool {
        matches!(&self.state, State::Ready(machine) if machine.meta.superblock.inconsistent)
    }

    /// Checks the rules of DESIGN section 3 that one engine can check by itself.
    ///
    /// # Errors
    /// Which rule is broken, and how.
    pub fn check_invariants(&self) -> Result<(), String> {
        match &self.state {
            State::Ready(machine) => machine.check_invariants(),
            State::New(_)
            | State::Reading(..)
            | State::Recovering(..)
            | State::Failed(_)
            | State::Detached => Ok(()),
        }
    }
}

/// Goes on when what a crash left uncertain is durable.
fn recovered(cx: &mut Cx<'_>, machine: Box<Machine>, recovery: Recovery, parked: Parked) -> State {
    if machine.failed.is_some() || !machine.meta.is_durable(recovery.ticket) {
        return State::Recovering(machine, recovery, parked);
    }
    cx.emit(Effect::Event(VolumeEvent::Attached {
        clean: recovery.clean,
        remark: recovery.remark,
    }));
    State::Ready(parked.replay(cx, machine))
}

fn fail_attach(cx: &mut Cx<'_>, me: NodeId, parked: Parked, reason: String) -> State {
    for peer in parked.links {
        refuse_disk(cx, peer, &reason);
    }
    cx.emit(Effect::Event(VolumeEvent::DiskFailed {
        reason: reason.clone(),
    }));
    if parked.detach {
        cx.emit(Effect::Event(VolumeEvent::Detached));
        return State::Detached;
    }
    let mut failed = Failed {
        volume: parked.volume,
        reason,
        epoch: Epoch(0),
        proposals: Proposals::default(),
        held: None,
    };
    failed.propose(cx, me);
    State::Failed(failed)
}

/// Ends a machine whose disk failed: requests are answered with errors, peers are told.
fn fail_machine(cx: &mut Cx<'_>, machine: &mut Machine, reason: String) -> Failed {
    let requests = machine.requests.drain();
    let me = machine.node();
    let volume = machine.volume.as_deref();
    let holds = machine.serves() && volume.is_some_and(|volume| nothing_accessible(volume, me));
    let held = if holds {
        Some(requests)
    } else {
        fail_requests(cx, requests);
        None
    };
    for peer in machine.links.keys() {
        refuse_disk(cx, *peer, &reason);
    }
    if machine.serves() && !holds {
        cx.emit(Effect::Event(VolumeEvent::Closed {
            reason: reason.clone(),
        }));
    }
    cx.emit(Effect::Event(VolumeEvent::DiskFailed {
        reason: reason.clone(),
    }));
    let mut failed = Failed {
        volume: machine.volume.clone(),
        epoch: machine.meta.durable_epoch(),
        reason,
        proposals: Proposals::default(),
        held,
    };
    failed.propose(cx, me);
    failed
}

fn fail_requests(cx: &mut Cx<'_>, requests: Vec<RequestId>) {
    for id in requests {
        cx.emit(Effect::Reply {
            id,
            result: Err(ReplyError::Io),
        });
    }
}

/// Whether requests to this node, whose disk failed, shall wait: no other replica is in sync, and that
/// was chosen.
fn nothing_accessible(volume: &Volume, me: NodeId) -> bool {
    volume.options.on_no_data == OnNoData::Suspend
        && volume.primary == Some(me)
        && volume.in_sync.len() == 1
        && volume.in_sync.contains(&me)
}

fn refuse_disk(cx: &mut Cx<'_>, peer: NodeId, reason: &str) {
    let refusal = Refusal::Disk {
        reason: reason.to_owned(),
    };
    cx.emit(Effect::Send {
        peer,
        message: Message::Refuse(refusal),
    });
    cx.emit(Effect::CloseLink {
        peer,
        reason: "the disk is not usable".to_owned(),
    });
}

impl Failed {
    fn handle(&mut self, cx: &mut Cx<'_>, me: NodeId, input: Input) {
        match input {
            Input::Config(volume) => {
                let known = self.volume.as_ref();
                if known.is_none_or(|known| volume.version > known.version) {
                    if !nothing_accessible(&volume, me) {
                        // Somebody else may serve, or waiting is not wanted any more.
                        if let Some(held) = self.held.take() {
                            fail_requests(cx, held);
                            let reason = self.reason.clone();
                            cx.emit(Effect::Event(VolumeEvent::Closed { reason }));
                        }
                    }
                    self.volume = Some(volume);
                }
            }
            Input::LinkUp { peer } => refuse_disk(cx, peer, &self.reason),
            Input::Request { id, .. } => match &mut self.held {
                Some(held) if held.len() < HELD_MAX => held.push(id),
                _ => fail_requests(cx, vec![id]),
            },
            Input::Order { id, .. } => cx.emit(Effect::OrderDone {
                id,
                result: Err(format!("its disk is not usable: {}", self.reason)),
            }),
            Input::Attach
            | Input::LeaseUntil(_)
            | Input::LinkDown { .. }
            | Input::Message { .. }
            | Input::Disk { .. }
            | Input::Demote
            | Input::Detach
            | Input::Saved { .. }
            | Input::Tick => {}
        }
        self.propose(cx, me);
    }

    fn propose(&mut self, cx: &mut Cx<'_>, me: NodeId) {
        let wanted = self
            .volume
            .as_deref()
            .and_then(|volume| hand_over(volume, me));
        self.proposals.settle(cx, wanted);
    }
}

impl Parked {
    /// Keeps an input for later. True: it asked to detach.
    fn park(&mut self, cx: &mut Cx<'_>, input: Input) -> bool {
        match input {
            Input::Config(volume) => {
                let newer = |known: &Arc<Volume>| volume.version > known.version;
                if self.volume.as_ref().is_none_or(newer) {
                    self.volume = Some(volume);
                }
            }
            Input::LeaseUntil(until) => self.lease_until = Some(until),
            Input::LinkUp { peer } => {
                self.forget(peer);
                self.links.insert(peer);
            }
            Input::LinkDown { peer } => self.forget(peer),
            Input::Message { peer, message } => {
                if self.links.contains(&peer) && self.messages.len() >= PARKED_MAX {
                    self.forget(peer);
                    let reason = "too many messages before the disk is attached".to_owned();
                    cx.emit(Effect::CloseLink { peer, reason });
                } else if self.links.contains(&peer) {
                    self.messages.push_back((peer, message));
                }
            }
            Input::Request { id, .. } => cx.emit(Effect::Reply {
                id,
                result: Err(ReplyError::NotPrimary),
            }),
            Input::Detach => self.detach = true,
            Input::Order { id, .. } => cx.emit(Effect::OrderDone {
                id,
                result: Err("it is not attached yet; ask again".to_owned()),
            }),
            Input::Attach
            | Input::Disk { .. }
            | Input::Demote
            | Input::Saved { .. }
            | Input::Tick => {}
        }
        self.detach
    }

    /// The disk failed while it was recovered: what came meanwhile still counts. Above all the
    /// configuration, under which this node may have to hand its role over.
    fn hand_to_failed(&mut self, cx: &mut Cx<'_>, machine: &mut Machine) {
        let parked = std::mem::take(self);
        machine.volume = parked.volume;
        let reason = machine.failed.clone().unwrap_or_default();
        for peer in parked.links {
            refuse_disk(cx, peer, &reason);
        }
        if parked.detach {
            cx.emit(Effect::Event(VolumeEvent::Detached));
        }
    }

    fn forget(&mut self, peer: NodeId) {
        self.links.remove(&peer);
        self.messages.retain(|(from, _)| *from != peer);
    }

    /// Hands everything to the machine.
    fn replay(self, cx: &mut Cx<'_>, mut machine: Box<Machine>) -> Box<Machine> {
        if let Some(volume) = self.volume {
            machine.handle(cx, Input::Config(volume));
        }
        if let Some(until) = self.lease_until {
            machine.handle(cx, Input::LeaseUntil(until));
        }
        for peer in self.links {
            machine.handle(cx, Input::LinkUp { peer });
        }
        for (peer, message) in self.messages {
            machine.handle(cx, Input::Message { peer, message });
        }
        if self.detach {
            machine.handle(cx, Input::Detach);
        }
        machine
    }
}
