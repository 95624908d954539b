//! A few engines, their disks, the links between them and the control log, in one thread.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use relevo_format::{Identity, Layout, Replica, Start, create};
use relevo_replication::{
    AppRequest, DiskError, DiskOp, Effect, Engine, EngineConfig, EngineStatus, Input, Order,
    OrderId, ReplyError, RequestId, VolumeEvent, lab::Lab,
};
use relevo_types::{
    BlockRange, ByteRange, ClusterId, Epoch, Instance, LineageId, NodeId, ReplicaSlot, Sensitivity,
    Time, VolumeId,
    cluster::{
        ClusterState, Command, JoinToken, NodeKind, NodePath, NodeSpec, Ports, Proof, Protocol,
        ReplicaSpec, Volume, VolumeChange, VolumeOptions,
    },
};
use relevo_wire::{Body, Message};

use crate::{
    disk::{Disk, apply, op_name},
    split::Safe,
};

pub(crate) const A: NodeId = NodeId(1);
pub(crate) const B: NodeId = NodeId(2);
pub(crate) const C: NodeId = NodeId(3);
pub(crate) const D: NodeId = NodeId(4);
pub(crate) const V: VolumeId = VolumeId(1);
pub(crate) const BLOCK: usize = 4096;
const LINEAGE: LineageId = LineageId(77);

/// Small and deterministic.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) engine: Option<Engine>,
    pub(crate) disk: Disk,
    pub(crate) ops: Vec<DiskOp>,
    pub(crate) events: Vec<VolumeEvent>,
    /// The control log reaches it.
    pub(crate) control: bool,
    configs: VecDeque<Arc<Volume>>,
    pub(crate) lease_until: Time,
    instance: u64,
    pub(crate) safe: Safe,
}

#[derive(Debug)]
enum Packet {
    Message(Message),
    Down,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Time,
    lab: Lab,
    pub(crate) nodes: BTreeMap<NodeId, Machine>,
    pub(crate) control: ClusterState,
    /// Packets on the way, by sender and receiver.
    wires: BTreeMap<(NodeId, NodeId), VecDeque<Packet>>,
    /// Who (first) has a link to whom (second), as far as it knows.
    pub(crate) up: BTreeSet<(NodeId, NodeId)>,
    /// Packets from the first to the second vanish.
    pub(crate) silent: BTreeSet<(NodeId, NodeId)>,
    pub(crate) proposals: VecDeque<(NodeId, Epoch, VolumeChange)>,
    pub(crate) replies: BTreeMap<RequestId, Result<Bytes, ReplyError>>,
    last_request: u64,
    orders: BTreeMap<OrderId, Result<(), String>>,
    pub(crate) random: Random,
    pub(crate) layout: Layout,
    pub(crate) commits: bool,
    /// Lines of trace to print when it fails; 0: none are kept, which is much faster.
    trace_lines: usize,
    trace: Vec<String>,
    /// Blocks sent by resyncs so far.
    pub(crate) copied: u64,
    /// Bytes of data in them: zeroes are none.
    pub(crate) copied_bytes: u64,
    /// Frames that took.
    pub(crate) copies: u64,
    /// Blocks whose digests were sent by resyncs.
    pub(crate) compared: u64,
}

fn spec(name: &str) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        kind: NodeKind::Data,
        paths: vec![NodePath {
            name: "lan".to_owned(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            replication: false,
        }],
        streams: Vec::new(),
        ports: Ports::default(),
    }
}

fn control_state(protocols: &[Protocol], size: u64) -> ClusterState {
    let nodes = u32::try_from(protocols.len()).unwrap();
    let mut state = ClusterState::default();
    let mut apply = |command: Command| state.apply(&command).unwrap();
    apply(Command::Init {
        cluster: ClusterId([9; 16]),
        name: "test".to_owned(),
        sensitivity: Sensitivity::Normal,
        node: spec("n1"),
    });
    for number in 2..=nodes {
        let hash = number.to_string();
        apply(Command::CreateToken {
            hash: hash.clone(),
            token: JoinToken {
                kind: None,
                expires_unix_s: 1,
            },
        });
        apply(Command::Join {
            hash,
            now_unix_s: 0,
            node: spec(&format!("n{number}")),
        });
    }
    let replica = |number| ReplicaSpec {
        node: NodeId(number),
        protocol: protocols[number as usize - 1],
        backing: None,
        force: false,
    };
    apply(Command::CreateVolume {
        name: "v".to_owned(),
        size,
        lineage: LINEAGE,
        replicas: (1..=nodes).map(replica).collect(),
    });
    for number in 1..=nodes {
        apply(Command::ReplicaCreated {
            volume: V,
            node: NodeId(number),
        });
    }
    state
}

/// A disk with a new replica.
pub(crate) fn formatted(node: NodeId, slot: ReplicaSlot, layout: &Layout, start: Start) -> Disk {
    let mut disk = Disk::default();
    let replica = Replica {
        identity: Identity {
            cluster: ClusterId([9; 16]),
            volume: V,
            node,
        },
        slot,
        lineage: LINEAGE,
    };
    for (offset, bytes) in create(&replica, layout, start) {
        disk.write(offset, &bytes);
    }
    disk.flush();
    disk
}

impl World {
    /// Replicas with these protocols, all linked, the first one primary.
    pub(crate) fn mixed(protocols: &[Protocol], blocks: u64) -> Self {
        let hot = Lab::default().hot_regions_max;
        Self::with_protocols(protocols, blocks, 1, hot).open(A)
    }

    /// Engines attached and linked, no primary.
    pub(crate) fn new(nodes: u32, blocks: u64, seed: u64) -> Self {
        Self::with_hot_regions(nodes, blocks, seed, Lab::default().hot_regions_max)
    }

    /// The same with small activity logs.
    pub(crate) fn with_hot_regions(nodes: u32, blocks: u64, seed: u64, hot: usize) -> Self {
        let protocols = vec![Protocol::C; nodes as usize];
        Self::with_protocols(&protocols, blocks, seed, hot)
    }

    /// The same with a protocol for each replica.
    pub(crate) fn with_protocols(
        protocols: &[Protocol],
        blocks: u64,
        seed: u64,
        hot: usize,
    ) -> Self {
        let size = blocks * BLOCK as u64;
        let layout = Layout::new(size).unwrap();
        let control = control_state(protocols, size);
        let lab = Lab {
            hot_regions_max: hot,
            ..Lab::default()
        };
        let mut world = Self {
            lab,
            now: Time(1_000_000_000),
            nodes: BTreeMap::new(),
            wires: BTreeMap::new(),
            up: BTreeSet::new(),
            silent: BTreeSet::new(),
            proposals: VecDeque::new(),
            replies: BTreeMap::new(),
            last_request: 0,
            orders: BTreeMap::new(),
            random: Random::new(seed),
            layout,
            commits: true,
            trace_lines: std::env::var("RELEVO_TRACE_LINES")
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
            trace: Vec::new(),
            copied: 0,
            copied_bytes: 0,
            copies: 0,
            compared: 0,
            control,
        };
        for (node, replica) in world.volume().replicas.clone() {
            let disk = formatted(node, replica.slot, &layout, Start::Zeroes);
            let machine = Machine {
                engine: None,
                disk,
                ops: Vec::new(),
                events: Vec::new(),
                control: true,
                configs: VecDeque::new(),
                lease_until: Time::ZERO,
                instance: 0,
                safe: Safe::default(),
            };
            world.nodes.insert(node, machine);
        }
        for node in world.ids() {
            world.start(node);
        }
        world
    }

    pub(crate) fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    pub(crate) fn volume(&self) -> &Volume {
        &self.control.volumes[&V]
    }

    pub(crate) fn node(&mut self, node: NodeId) -> &mut Machine {
        self.nodes.get_mut(&node).unwrap()
    }

    pub(crate) fn status(&self, node: NodeId) -> EngineStatus {
        self.nodes[&node].engine.as_ref().unwrap().status()
    }

    pub(crate) fn is_up(&self, node: NodeId) -> bool {
        self.nodes[&node].engine.is_some()
    }

    /// The blocks of the data area that were ever written, as reads see them.
    pub(crate) fn written(&self, node: NodeId) -> BTreeSet<u64> {
        let end = self.layout.data_blocks();
        self.nodes[&node]
            .disk
            .blocks
            .range(..end)
            .map(|(number, _)| *number)
            .collect()
    }

    pub(crate) fn block(&self, node: NodeId, number: u64) -> Vec<u8> {
        self.nodes[&node]
            .disk
            .read(BlockRange::new(number, 1).bytes())
    }

    /// Blocks in which two replicas differ.
    pub(crate) fn differing(&self, a: NodeId, b: NodeId) -> Vec<u64> {
        let written: BTreeSet<u64> = self.written(a).union(&self.written(b)).copied().collect();
        let differ = |number: &u64| self.block(a, *number) != self.block(b, *number);
        written.into_iter().filter(differ).collect()
    }

    pub(crate) fn same(&self, a: NodeId, b: NodeId) -> bool {
        self.differing(a, b).is_empty()
    }

    /// Gives an order to an engine, which answers at once.
    pub(crate) fn order(&mut self, id: NodeId, order: Order) -> Result<(), String> {
        let number = OrderId(self.orders.len() as u64 + 1);
        self.input(id, Input::Order { id: number, order });
        self.orders[&number].clone()
    }

    pub(crate) fn start(&mut self, id: NodeId) {
        let backing_size = self.layout.backing_size();
        let volume = Arc::new(self.volume().clone());
        let lab = self.lab;
        let node = self.node(id);
        node.instance += 1;
        let config = EngineConfig {
            cluster: ClusterId([9; 16]),
            volume: V,
            node: id,
            instance: Instance(node.instance),
            backing_size,
            link_timeout: Duration::from_millis(1000),
            ping_interval: Duration::from_millis(300),
            reconcile_grace: Duration::from_millis(500),
            resync_window: 1 << 20,
        };
        node.engine = Some(Engine::with_lab(config, lab));
        node.configs.clear();
        node.configs.push_back(volume);
        self.input(id, Input::Attach);
    }

    /// The process is gone. With `power` the disk forgets what was not flushed; of the operations
    /// under way any may have happened.
    pub(crate) fn crash(&mut self, id: NodeId, power: bool) {
        let mut random = self.random.clone();
        let node = self.node(id);
        node.engine = None;
        node.events.clear();
        for op in std::mem::take(&mut node.ops) {
            if random.one_in(2) {
                apply(&mut node.disk, &op.kind);
            }
        }
        if power {
            node.disk.lose_power(&mut random);
        }
        self.random = random;
        for peer in self.ids() {
            self.side_down(id, peer);
        }
        self.note(|| format!("{id} crashes, power lost: {power}"));
    }

    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.trace_lines > 0 {
            let line = format!("{:?} {}", self.now, brief(&text()));
            self.trace.push(line);
        }
    }

    pub(crate) fn input(&mut self, id: NodeId, input: Input) {
        let now = self.now;
        let copy = (self.trace_lines > 0).then(|| input.clone());
        let Some(engine) = self.node(id).engine.as_mut() else {
            return;
        };
        let mut effects = Vec::new();
        engine.handle(now, input, &mut effects);
        let checked = engine.check_invariants();
        self.note(|| format!("{id} <- {copy:?}"));
        for effect in effects {
            self.effect(id, effect);
        }
        if let Err(broken) = checked {
            panic!("{id}: {broken}\n{}", self.tail());
        }
    }

    pub(crate) fn tail(&self) -> String {
        let from = self.trace.len().saturating_sub(self.trace_lines);
        self.trace[from..].join("\n")
    }

    fn effect(&mut self, id: NodeId, effect: Effect) {
        self.note(|| format!("{id}    {effect:?}"));
        match effect {
            Effect::Disk(op) => self.node(id).ops.push(op),
            Effect::Send { peer, message } => {
                if let Message::SyncWrite { range, body, .. } = &message {
                    self.copies += 1;
                    self.copied += range.len / BLOCK as u64;
                    if let Body::Data(data) = body {
                        self.copied_bytes += data.len() as u64;
                    }
                }
                if let Message::SyncDigests { digests, .. } = &message {
                    self.compared += digests.len() as u64;
                }
                if self.up.contains(&(id, peer)) && !self.silent.contains(&(id, peer)) {
                    self.wire(id, peer).push_back(Packet::Message(message));
                }
            }
            Effect::CloseLink { peer, .. } => self.side_down(id, peer),
            Effect::Reply { id, result } => {
                assert!(
                    self.replies.insert(id, result).is_none(),
                    "{id:?} answered twice"
                );
            }
            Effect::Propose { expect, change } => self.proposals.push_back((id, expect, change)),
            Effect::OrderDone { id, result } => {
                assert!(
                    self.orders.insert(id, result).is_none(),
                    "{id:?} answered twice"
                );
            }
            Effect::Save { id: save, part } => self.node(id).safe.keep(save, part),
            Effect::Event(event) => self.node(id).events.push(event),
        }
    }

    fn wire(&mut self, from: NodeId, to: NodeId) -> &mut VecDeque<Packet> {
        self.wires.entry((from, to)).or_default()
    }

    /// One side has no link any more: it hears nothing; the other hears what was sent, then that.
    fn side_down(&mut self, id: NodeId, peer: NodeId) {
        if self.up.remove(&(id, peer)) {
            self.wire(peer, id).clear();
            self.wire(id, peer).push_back(Packet::Down);
        }
    }

    /// Both sides lose the link and all that was on it, and hear so in their own time.
    pub(crate) fn cut(&mut self, a: NodeId, b: NodeId) {
        for (from, to) in [(a, b), (b, a)] {
            self.wire(from, to).clear();
            if self.up.contains(&(to, from)) {
                self.wire(from, to).push_back(Packet::Down);
            }
        }
    }

    /// Nothing gets through any more, and nobody is told.
    pub(crate) fn silence(&mut self, a: NodeId, b: NodeId) {
        for pair in [(a, b), (b, a)] {
            self.silent.insert(pair);
            self.wire(pair.0, pair.1).clear();
        }
    }

    /// Packets get through again. What was lost broke the links.
    pub(crate) fn end_silence(&mut self) {
        for (a, b) in std::mem::take(&mut self.silent) {
            self.cut(a, b);
        }
    }

    pub(crate) fn can_connect(&self, a: NodeId, b: NodeId) -> bool {
        let idle = |pair: (NodeId, NodeId)| {
            !self.up.contains(&pair) && self.wires.get(&pair).is_none_or(VecDeque::is_empty)
        };
        a != b
            && self.is_up(a)
            && self.is_up(b)
            && !self.silent.contains(&(a, b))
            && !self.silent.contains(&(b, a))
            && idle((a, b))
            && idle((b, a))
    }

    pub(crate) fn connect(&mut self, a: NodeId, b: NodeId) {
        if self.can_connect(a, b) {
            self.up.insert((a, b));
            self.up.insert((b, a));
            self.input(a, Input::LinkUp { peer: b });
            self.input(b, Input::LinkUp { peer: a });
        }
    }

    pub(crate) fn connect_all(&mut self) {
        for a in self.ids() {
            for b in self.ids() {
                if a < b {
                    self.connect(a, b);
                }
            }
        }
    }

    pub(crate) fn busy_wires(&self) -> Vec<(NodeId, NodeId)> {
        let busy = self.wires.iter().filter(|(_, wire)| !wire.is_empty());
        busy.map(|(pair, _)| *pair).collect()
    }

    /// The message that comes next.
    pub(crate) fn head(&self, from: NodeId, to: NodeId) -> Option<&Message> {
        match self.wires.get(&(from, to))?.front()? {
            Packet::Message(message) => Some(message),
            Packet::Down => None,
        }
    }

    pub(crate) fn deliver(&mut self, from: NodeId, to: NodeId) {
        match self.wire(from, to).pop_front() {
            Some(Packet::Message(message)) if self.up.contains(&(to, from)) => {
                self.input(
                    to,
                    Input::Message {
                        peer: from,
                        message,
                    },
                );
            }
            Some(Packet::Down) => {
                if self.up.remove(&(to, from)) {
                    // What it sent since goes nowhere.
                    self.wire(to, from)
                        .retain(|packet| matches!(packet, Packet::Down));
                    self.input(to, Input::LinkDown { peer: from });
                }
            }
            Some(Packet::Message(_)) | None => {}
        }
    }

    pub(crate) fn finish_op(&mut self, id: NodeId, index: usize) {
        let node = self.node(id);
        let op = node.ops.remove(index);
        let unreadable = node.disk.is_unreadable(&op.kind);
        let broken = node.disk.broken.or_else(|| unreadable.then_some("read"));
        let result = match broken {
            Some(what) if what == op_name(&op.kind) => Err(DiskError {
                what,
                reason: "the test broke it".to_owned(),
            }),
            _ => Ok(apply(&mut node.disk, &op.kind)),
        };
        self.input(id, Input::Disk { op: op.op, result });
    }

    /// The control log handles one proposal.
    pub(crate) fn commit(&mut self) -> bool {
        let Some((from, expect, change)) = self.proposals.pop_front() else {
            return false;
        };
        if self.nodes[&from].control {
            self.change(expect, change);
        }
        true
    }

    pub(crate) fn change(&mut self, expect: Epoch, change: VolumeChange) {
        let text = format!("control: {change:?} at {expect}");
        let result = self.control.apply(&Command::Volume {
            volume: V,
            expect,
            change,
        });
        self.note(|| format!("{text}: {result:?}"));
        if result.is_ok() {
            self.publish();
        }
    }

    /// The administrator changes the volume's options.
    pub(crate) fn set_options(&mut self, change: impl FnOnce(&mut VolumeOptions)) {
        let volume = self.volume();
        let (expect, mut options) = (volume.version, volume.options.clone());
        change(&mut options);
        self.apply_control(&Command::SetVolumeOptions {
            volume: V,
            expect,
            options,
        });
        self.publish();
    }

    fn publish(&mut self) {
        let volume = Arc::new(self.volume().clone());
        for node in self.nodes.values_mut() {
            node.configs.push_back(volume.clone());
        }
    }

    /// Applies a command and tells every node.
    pub(crate) fn command(&mut self, command: &Command) {
        self.apply_control(command);
        self.note(|| format!("control: {command:?}"));
        self.publish();
    }

    pub(crate) fn evict(&mut self, node: NodeId) {
        let generation = self.control.nodes[&node].lease.generation;
        self.apply_control(&Command::Evict {
            node,
            generation,
            proof: Proof::Goodbye,
        });
        self.apply_control(&Command::Readmit { node, generation });
        self.note(|| format!("control: {node} is evicted"));
        self.publish();
    }

    fn apply_control(&mut self, command: &Command) {
        self.control.apply(command).unwrap();
    }

    pub(crate) fn promote(&mut self, node: NodeId) {
        let epoch = self.volume().epoch;
        self.change(epoch, VolumeChange::Promote { node });
    }

    pub(crate) fn has_config(&self, id: NodeId) -> bool {
        let node = &self.nodes[&id];
        node.control && node.engine.is_some() && !node.configs.is_empty()
    }

    pub(crate) fn deliver_config(&mut self, id: NodeId) {
        if self.has_config(id)
            && let Some(volume) = self.node(id).configs.pop_front()
        {
            self.input(id, Input::Config(volume));
        }
    }

    pub(crate) fn lease(&mut self, id: NodeId, length: Duration) {
        let until = self.now + length;
        self.node(id).lease_until = until;
        self.input(id, Input::LeaseUntil(until));
    }

    pub(crate) fn request(&mut self, id: NodeId, request: AppRequest) -> RequestId {
        self.last_request += 1;
        let request_id = RequestId(self.last_request);
        self.input(
            id,
            Input::Request {
                id: request_id,
                request,
            },
        );
        request_id
    }

    pub(crate) fn write(&mut self, id: NodeId, block: u64, count: u64, fill: u8) -> RequestId {
        let range = BlockRange::new(block, count).bytes();
        let len = usize::try_from(range.len).unwrap();
        let body = Body::Data(vec![fill; len].into());
        let fua = false;
        self.request(id, AppRequest::Write { range, body, fua })
    }

    pub(crate) fn read(&mut self, id: NodeId, range: ByteRange) -> RequestId {
        self.request(id, AppRequest::Read(range))
    }

    pub(crate) fn is_answered(&self, id: RequestId) -> bool {
        self.replies.contains_key(&id)
    }

    pub(crate) fn is_acked(&self, id: RequestId) -> bool {
        matches!(self.replies.get(&id), Some(Ok(_)))
    }

    /// Everything that can happen without time passing happens.
    pub(crate) fn run(&mut self) {
        for _ in 0..200_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the world does not come to rest\n{}", self.tail());
    }

    /// One thing happens that needs no time; false: there is none.
    pub(crate) fn step(&mut self) -> bool {
        let wires = self.busy_wires();
        if let Some((from, to)) = wires.first().copied() {
            self.deliver(from, to);
        } else if let Some(id) = self
            .ids()
            .into_iter()
            .find(|id| !self.nodes[id].ops.is_empty() && !self.nodes[id].disk.stalled)
        {
            if self.is_up(id) {
                self.finish_op(id, 0);
            } else {
                self.node(id).ops.clear();
            }
        } else if let Some(id) = self.ids().into_iter().find(|id| self.has_config(*id)) {
            self.deliver_config(id);
        } else if let Some((id, saved)) = crate::split::next_answer(self) {
            self.input(id, saved);
        } else {
            return self.commits && self.commit();
        }
        true
    }

    /// A message of any link arrives, or any operation of any disk ends; or nothing happens.
    pub(crate) fn anything(&mut self) {
        let wires = self.busy_wires();
        let ids = self.ids();
        let id = ids[self.random.below(ids.len())];
        if !wires.is_empty() && self.random.one_in(2) {
            let (from, to) = wires[self.random.below(wires.len())];
            self.deliver(from, to);
        } else if !self.nodes[&id].ops.is_empty() {
            let index = self.random.below(self.nodes[&id].ops.len());
            self.finish_op(id, index);
        }
    }

    /// Time passes; everything happens when it is due.
    pub(crate) fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        self.run();
        for _ in 0..100_000 {
            let due = self.deadline();
            if due > end {
                self.now = end;
                return;
            }
            self.now = due.max(self.now);
            self.tick();
            self.run();
        }
        panic!("time does not pass\n{}", self.tail());
    }

    pub(crate) fn deadline(&self) -> Time {
        let due = self
            .nodes
            .values()
            .filter_map(|node| Some(node.engine.as_ref()?.deadline()));
        due.min().unwrap_or(Time::NEVER)
    }

    pub(crate) fn tick(&mut self) {
        for id in self.ids() {
            let due = self.nodes[&id]
                .engine
                .as_ref()
                .is_some_and(|e| e.deadline() <= self.now);
            if due {
                self.input(id, Input::Tick);
            }
        }
    }

    pub(crate) fn pass_ms(&mut self, ms: u64) {
        self.pass(Duration::from_millis(ms));
    }

    /// Linked, leased, the node open.
    pub(crate) fn opened(nodes: u32, blocks: u64, primary: NodeId) -> Self {
        Self::new(nodes, blocks, 1).open(primary)
    }

    fn open(mut self, primary: NodeId) -> Self {
        self.connect_all();
        self.run();
        self.promote(primary);
        self.pass_ms(10);
        self.lease(primary, Duration::from_secs(3600));
        assert!(self.status(primary).open, "{:?}", self.status(primary));
        self
    }
}

fn brief(text: &str) -> String {
    let mut short: String = text.chars().take(220).collect();
    if let Some(at) = short.find("b\"") {
        short.truncate(at);
        short.push_str("..");
    }
    short
}
