//! The thread that runs the node manager.
//!
//! It sends and receives heartbeats and counts the lease, so nothing here may wait: no disk, no
//! lock that is held over I/O, no queue that can be full for long. It takes inputs from one
//! bounded channel and from the heartbeat sockets, and hands every effect to [`Hands`], whose
//! every method returns at once; what takes time happens elsewhere and comes back as an input.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    thread,
    time::Duration,
};

use relevo_node::{
    Effect, Input, Node, NodeConfig, NodeEvent, NodeStatus, PartOrder, ProposalId, Report,
    VolumeOrder,
};
use relevo_planner::{Fitness, Forecast, Supposed};
use relevo_transport::{HeartbeatSockets, HeartbeatWaker, PathChange};
use relevo_types::{
    LeaseGeneration, NodeId, ServiceId, Time, VolumeId,
    cluster::{ClusterState, Command},
};
use tokio::sync::oneshot;

/// Inputs that may wait: a second's worth of the busiest cluster. The loop empties it within
/// milliseconds; senders wait when it is full.
const INPUT_QUEUE: usize = 4096;

/// The longest sleep, so that a wrong deadline can't stop the heartbeats.
const SLEEP_MAX: Duration = Duration::from_millis(500);

/// Inputs handled before the clock is read and the sockets are looked at again.
const BATCH: usize = 64;

/// What the node manager's effects are carried out with. No method may wait.
pub(crate) trait Hands: Send {
    fn persist_condemned(&mut self, node: NodeId, generation: LeaseGeneration);
    fn voters_settled(&mut self, voters: u64);
    fn report(&mut self, to: NodeId, report: Report);
    fn propose(&mut self, id: ProposalId, command: Command, reason: String);
    fn volume(&mut self, volume: VolumeId, order: VolumeOrder);
    fn part(&mut self, order: PartOrder);
    fn lease_until(&mut self, until: Time);
    fn lease_lost(&mut self);
    fn event(&mut self, event: NodeEvent);
    fn shutdown_done(&mut self);
}

/// What the loop takes.
enum Message {
    Input(Box<Input>),
    Path(Box<PathChange>),
    Status(oneshot::Sender<NodeStatus>),
    Forecast(Supposed, oneshot::Sender<Option<Forecast>>),
    Verdicts(ServiceId, oneshot::Sender<BTreeMap<NodeId, Fitness>>),
    Stop,
}

/// A way to the loop.
#[derive(Clone, Debug)]
pub(crate) struct NodeInbox {
    sender: SyncSender<Message>,
    waker: HeartbeatWaker,
}

impl NodeInbox {
    /// Tells the node something; waits while the queue is full. After the loop's end nobody
    /// listens, and nothing is lost by that.
    pub(crate) fn tell(&self, input: Input) {
        self.send(Message::Input(Box::new(input)));
    }

    /// Uses a path for heartbeats from now on, or no longer.
    pub(crate) fn path(&self, change: PathChange) {
        self.send(Message::Path(Box::new(change)));
    }

    /// What the node knows; `None` after its end.
    pub(crate) async fn status(&self) -> Option<NodeStatus> {
        let (answer, status) = oneshot::channel();
        self.send(Message::Status(answer));
        status.await.ok()
    }

    /// Whether each node can run a service; empty when the loop has ended.
    pub(crate) async fn verdicts(&self, service: ServiceId) -> BTreeMap<NodeId, Fitness> {
        let (answer, verdicts) = oneshot::channel();
        self.send(Message::Verdicts(service, answer));
        verdicts.await.unwrap_or_default()
    }

    /// What would come of something; `None` when the loop has ended.
    pub(crate) async fn forecast(&self, supposed: Supposed) -> Option<Forecast> {
        let (answer, forecast) = oneshot::channel();
        self.send(Message::Forecast(supposed, answer));
        forecast.await.ok().flatten()
    }

    /// Ends the loop.
    pub(crate) fn stop(&self) {
        self.send(Message::Stop);
    }

    fn send(&self, message: Message) {
        drop(self.sender.send(message));
        self.waker.wake();
    }
}

/// The channel to a loop that is started later with [`start`].
pub(crate) fn inbox(sockets: HeartbeatSockets) -> (NodeInbox, LoopInputs) {
    let (sender, messages) = sync_channel(INPUT_QUEUE);
    let waker = sockets.waker();
    (
        NodeInbox { sender, waker },
        LoopInputs { messages, sockets },
    )
}

/// The other end of a [`NodeInbox`].
#[derive(Debug)]
pub(crate) struct LoopInputs {
    messages: Receiver<Message>,
    sockets: HeartbeatSockets,
}

/// Starts the loop on its own thread.
///
/// # Errors
/// The system has no thread left.
pub(crate) fn start(
    inputs: LoopInputs,
    config: NodeConfig,
    hands: impl Hands + 'static,
) -> std::io::Result<thread::JoinHandle<()>> {
    thread::Builder::new()
        .name("relevo-node".to_owned())
        .spawn(move || {
            let now = relevo_host::clock::now();
            let node_loop = NodeLoop {
                node: Node::new(config, now),
                messages: inputs.messages,
                sockets: inputs.sockets,
                addresses: BTreeMap::new(),
                hands,
                effects: Vec::new(),
            };
            if catch_unwind(AssertUnwindSafe(|| node_loop.run())).is_err() {
                // Without it nobody renews the lease or stops what loses it. Services and
                // addresses of this process end with it, and the others take over.
                tracing::error!("the node manager failed; the daemon ends");
                std::process::abort();
            }
        })
}

struct NodeLoop<H> {
    node: Node,
    messages: Receiver<Message>,
    sockets: HeartbeatSockets,
    /// Heartbeat addresses of the members, by node and path.
    addresses: BTreeMap<NodeId, BTreeMap<String, SocketAddr>>,
    hands: H,
    effects: Vec<Effect>,
}

impl<H: Hands> NodeLoop<H> {
    fn run(mut self) {
        loop {
            let now = relevo_host::clock::now();
            let due = self.node.deadline();
            if due > now
                && let Err(error) = self.sockets.wait(due.since(now).min(SLEEP_MAX))
            {
                tracing::error!(%error, "can't wait for heartbeats");
                thread::sleep(Duration::from_millis(10));
            }
            let now = relevo_host::clock::now();
            if !self.take_messages(now) {
                return;
            }
            self.take_heartbeats(now);
            if self.node.deadline() <= now {
                self.node.handle(now, Input::Tick, &mut self.effects);
            }
            self.carry_out();
        }
    }

    /// Handles what waits in the channel; false at the end.
    fn take_messages(&mut self, now: Time) -> bool {
        for _ in 0..BATCH {
            match self.messages.try_recv() {
                Ok(Message::Input(input)) => {
                    if let Input::State(state) = &*input {
                        self.addresses = heartbeat_addresses(state);
                    }
                    self.node.handle(now, *input, &mut self.effects);
                }
                Ok(Message::Path(change)) => self.sockets.change(*change),
                // A caller that hung up needs no answer.
                Ok(Message::Status(answer)) => drop(answer.send(self.node.status())),
                Ok(Message::Verdicts(service, answer)) => {
                    let now = relevo_host::clock::now();
                    drop(answer.send(self.node.verdicts(now, service)));
                }
                Ok(Message::Forecast(supposed, answer)) => {
                    let now = relevo_host::clock::now();
                    drop(answer.send(self.node.forecast(now, supposed)));
                }
                Ok(Message::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
        // More waits: the next sleep must not be long.
        self.sockets.waker().wake();
        true
    }

    fn take_heartbeats(&mut self, now: Time) {
        let (received, errors) = self.sockets.drain();
        for received in received {
            let input = Input::Heartbeat {
                path: received.path,
                heartbeat: received.heartbeat,
            };
            self.node.handle(now, input, &mut self.effects);
        }
        for (path, error) in errors {
            tracing::error!(%error, path, "can't receive heartbeats");
        }
    }

    fn carry_out(&mut self) {
        let mut effects = std::mem::take(&mut self.effects);
        for effect in effects.drain(..) {
            let hands = &mut self.hands;
            match effect {
                Effect::SendHeartbeat {
                    to,
                    path,
                    heartbeat,
                } => {
                    let address = self.addresses.get(&to).and_then(|paths| paths.get(&path));
                    let now = relevo_host::clock::now();
                    self.sockets.send(now, &path, address.copied(), &heartbeat);
                }
                Effect::VotersSettled(voters) => hands.voters_settled(voters),
                Effect::PersistCondemned { node, generation } => {
                    hands.persist_condemned(node, generation);
                }
                Effect::Report { to, report } => hands.report(to, report),
                Effect::Propose {
                    id,
                    command,
                    reason,
                } => hands.propose(id, command, reason),
                Effect::Volume { volume, order } => hands.volume(volume, order),
                Effect::Part(order) => hands.part(order),
                Effect::LeaseUntil(until) => hands.lease_until(until),
                Effect::LeaseLost => hands.lease_lost(),
                Effect::Event(event) => hands.event(event),
                Effect::ShutdownDone => hands.shutdown_done(),
            }
        }
        // The list keeps its memory for the next round.
        self.effects = effects;
    }
}

fn heartbeat_addresses(state: &ClusterState) -> BTreeMap<NodeId, BTreeMap<String, SocketAddr>> {
    let port = |node: &relevo_types::cluster::Node| node.spec.ports.heartbeat;
    state
        .nodes
        .values()
        .map(|node| {
            let paths = node.spec.paths.iter().map(|path| {
                let address = SocketAddr::new(path.address, port(node));
                (path.name.clone(), address)
            });
            (node.id, paths.collect())
        })
        .collect()
}
