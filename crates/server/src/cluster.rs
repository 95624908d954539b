//! This machine as a running member of a cluster: everything that is started with the membership
//! and ends with it.
//!
//! The parts, and who talks to whom: the node manager (`daemon::node_loop`, its own thread) decides;
//! `daemon::hands` carries its effects out on `daemon::volumes` (data threads), `daemon::parts`
//! (agents), the control log and the other daemons (`rpc`). What the API asks goes through the
//! control log, also when this node itself shall do it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use relevo_agents::{AddressKeeper, FAILURE_QUEUE, PartContext, PartRunner};
use relevo_control::{
    ControlLog as _, ProposeError, RaftControl, RaftControlConfig, facts::VotersKnown,
};
use relevo_node::{Input, NodeConfig};
use relevo_planner::{Fitness, Forecast, Supposed};
use relevo_replication::io::promotion;
use relevo_transport::{HeartbeatSockets, RpcClient, RpcServer, Token, random, rpc::RpcConfig};
use relevo_types::{
    ClusterId, Instance, NodeId, ServiceId, VolumeId,
    cluster::{ClusterState, Command, NodeKind, Outcome, VolumeChange},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::{
    DaemonOptions,
    api::{ApiError, ClusterStatus, ErrorKind, EventKind, EventLevel, ServiceState},
    daemon::{
        hands::{DaemonHands, HandsContext},
        links,
        node_loop::{self, NodeInbox},
        parts::Parts,
        paths::{PathBoard, PathContext, PathKeeper, Standing},
        volumes::{Volumes, VolumesContext},
    },
    events::{Events, unix_ms},
    fencing::{Fencing, FencingContext},
    join::Admitter,
    local_store::LocalReplicas,
    membership_files::{MemberFiles, Places},
    rpc::{ControlPeers, Handler, control_addresses},
    state_dir::private_dir,
    status::{self, LocalSource, Sources},
    verbs::ProposeFailure,
};

/// How long a new member waits until the cluster counts its vote.
const ADMISSION_WAIT: Duration = Duration::from_secs(30);

/// How long a planned stop may take before the process ends anyway: stopping services has its own
/// bounds, this is the last one.
const STOP_WAIT: Duration = Duration::from_secs(30);

/// How long a leaving leader waits for another one.
const HAND_OVER_WAIT: Duration = Duration::from_secs(5);

/// A running member.
pub(crate) struct Cluster {
    id: ClusterId,
    me: NodeId,
    cluster_name: String,
    control: Arc<RaftControl>,
    rpc: Arc<RpcClient>,
    inbox: NodeInbox,
    volumes: Volumes,
    local: LocalSource,
    board: PathBoard,
    fencing: Fencing,
    ca: Option<relevo_transport::Fingerprint>,
    events: Arc<Events>,
    shutdown_done: watch::Receiver<bool>,
    /// Ends with the membership.
    held: Mutex<Option<Held>>,
}

/// What must be ended, in this order.
struct Held {
    tasks: JoinSet<()>,
    paths: PathKeeper,
    server: RpcServer,
    node_thread: thread::JoinHandle<()>,
}

impl Cluster {
    /// Starts everything; with a `first` command, begins the cluster's control log with it.
    pub(crate) async fn start(
        places: Places,
        files: MemberFiles,
        options: &DaemonOptions,
        events: Arc<Events>,
        runtime: Handle,
        first: Option<Command>,
    ) -> anyhow::Result<Arc<Self>> {
        let me = files.member.node;
        let timing = files.node.sensitivity.timing();
        let spec = &files.node.spec;
        let data_node = spec.kind == NodeKind::Data;
        let facts = places.facts().context("read what this node promised")?;
        let voters = places.voters().context("read who votes")?;
        private_dir(&places.nbd_dir())?;

        let (inbox, inputs) = node_loop::inbox(HeartbeatSockets::new(Vec::new())?);
        let rpc = Arc::new(RpcClient::new(
            Arc::clone(&files.identity),
            RpcConfig::for_timing(&timing),
        )?);
        let (settled, settled_by_majority) = watch::channel(0);
        let control_config = RaftControlConfig {
            directory: places.control_dir(),
            me,
            timing,
            settled: settled_by_majority,
        };
        let peers = Arc::new(ControlPeers::new(Arc::clone(&rpc), &timing));
        let control = RaftControl::open(control_config, peers)
            .await
            .context("open the control log")?;
        let control = Arc::new(control);
        if let Some(command) = first {
            control.bootstrap(command).await?;
        }

        let instance = Instance(random::nonzero_u64()?);
        let replicas = places.replicas().load()?.unwrap_or_default();
        let volumes = Volumes::new(VolumesContext {
            cluster: files.member.cluster,
            me,
            instance,
            timing,
            pool_dir: options.pool_dir.clone(),
            device_dir: (data_node && options.devices).then(|| options.device_dir.clone()),
            nbd_dir: places.nbd_dir(),
            saved_dir: places.saved_dir(),
            nbd_listen: options.nbd_listen,
            max_resyncs: options.max_resyncs,
            store: places.replicas(),
            replicas: replicas.clone(),
            control: Arc::clone(&control),
            inbox: inbox.clone(),
            events: Arc::clone(&events),
            runtime: runtime.clone(),
        });
        let (failures, failed) = mpsc::channel(FAILURE_QUEUE);
        let keeper = AddressKeeper::start(failures.clone()).map_err(|e| anyhow::anyhow!("{e}"))?;
        let runner = PartRunner::new(PartContext {
            node_name: spec.name.clone(),
            log_directory: places.log_dir(),
            keeper: keeper.clone(),
            exports: Arc::new(volumes.clone()),
            failures,
        });
        let parts = Parts::new(runner, inbox.clone(), failed, runtime.clone());
        let board = PathBoard::default();
        let fencing = Fencing::new(FencingContext {
            me,
            control: Arc::clone(&control),
            states: control.state(),
            inbox: inbox.clone(),
            events: Arc::clone(&events),
            timing,
            runtime: runtime.clone(),
        });
        let local = LocalSource::new(
            volumes.clone(),
            parts.clone(),
            inbox.clone(),
            board.clone(),
            fencing.clone(),
            control.state(),
        );

        let mut tasks = JoinSet::new();
        fencing.start(&mut tasks);
        let admitter = files.ca.as_ref().map(|ca| Admitter {
            ca: Arc::clone(ca),
            heartbeat_key: files.node.heartbeat_key,
        });
        let handler = Handler {
            control: Arc::clone(&control),
            inbox: inbox.clone(),
            admitter,
            local: local.clone(),
            fencing: fencing.clone(),
        };
        let server = RpcServer::bind(&[], &files.identity, Arc::new(handler))?;
        let data = data_node
            .then(|| links::start(&mut tasks, &files.identity, &volumes, control.state()))
            .transpose()?;
        let paths = PathKeeper::start(PathContext {
            me,
            cluster: files.member.cluster,
            file: files.node.clone(),
            places: places.clone(),
            inbox: inbox.clone(),
            control: server.listeners().clone(),
            data,
            board: board.clone(),
            events: Arc::clone(&events),
            runtime: runtime.clone(),
        })?;

        let config = NodeConfig {
            me,
            instance,
            timing,
            condemned: facts.condemned().to_vec(),
            local_replicas: replicas.keys().copied().collect(),
            voters_told: voters.known(),
            memory_mib: relevo_host::memory_mib(),
        };
        let (hands, shutdown_done) = DaemonHands::new(HandsContext {
            facts,
            control: Arc::clone(&control),
            rpc: Arc::clone(&rpc),
            inbox: inbox.clone(),
            volumes: volumes.clone(),
            parts,
            keeper,
            events: Arc::clone(&events),
            timing,
            runtime: runtime.clone(),
            settled,
        })?;
        let node_thread = node_loop::start(inputs, config, hands)?;
        tasks.spawn(feed_states(
            control.state(),
            inbox.clone(),
            Arc::clone(&rpc),
            voters,
        ));
        tasks.spawn(paths.clone().follow(control.state()));
        tasks.spawn(feed_leaders(control.leader(), inbox.clone()));
        events.add(
            EventLevel::Info,
            EventKind::Daemon,
            "",
            &format!(
                "started as node {} of cluster {}",
                spec.name, files.node.cluster_name
            ),
        );
        Ok(Arc::new(Self {
            id: files.member.cluster,
            me,
            cluster_name: files.node.cluster_name.clone(),
            control,
            rpc,
            inbox,
            volumes,
            local,
            board,
            fencing,
            ca: files.ca.as_ref().map(|ca| ca.fingerprint()),
            events,
            shutdown_done,
            held: Mutex::new(Some(Held {
                tasks,
                paths,
                server,
                node_thread,
            })),
        }))
    }

    pub(crate) const fn me(&self) -> NodeId {
        self.me
    }

    /// This node's own paths.
    pub(crate) fn own_paths(&self) -> Standing {
        self.board.read()
    }

    /// What this node observes; `None` while it stops.
    pub(crate) async fn observed(&self) -> Option<relevo_node::NodeStatus> {
        self.inbox.status().await
    }

    pub(crate) const fn fencing(&self) -> &Fencing {
        &self.fencing
    }

    pub(crate) const fn rpc(&self) -> &Arc<RpcClient> {
        &self.rpc
    }

    pub(crate) fn name(&self) -> &str {
        &self.cluster_name
    }

    pub(crate) fn state(&self) -> Arc<ClusterState> {
        self.control.state().borrow().clone()
    }

    pub(crate) fn states(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.control.state()
    }

    pub(crate) async fn propose(&self, command: Command) -> Result<Outcome, ProposeFailure> {
        self.control.propose(command).await.map_err(|e| match e {
            ProposeError::Rejected(rejection) => ProposeFailure::Rejected(rejection),
            other => ProposeFailure::Lost(other.to_string()),
        })
    }

    /// A token with a new secret, and the hash under which the control log shall know it.
    pub(crate) fn new_token(
        &self,
        kind: Option<NodeKind>,
        expires_unix_s: u64,
    ) -> Result<(String, String), ApiError> {
        let what = "no token was made";
        let Some(ca) = self.ca else {
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                "a witness can't admit nodes",
                "ask for the token on a data node",
            ));
        };
        let token = Token::generate(self.id, ca, self.token_addresses(), kind, expires_unix_s)
            .map_err(|e| ApiError::new(ErrorKind::Internal, what, e.to_string(), ""))?;
        Ok((token.to_string(), token.hash()))
    }

    /// Control addresses of the nodes that can admit, this one first.
    fn token_addresses(&self) -> Vec<SocketAddr> {
        let state = self.state();
        let mut nodes: Vec<_> = state
            .nodes
            .values()
            .filter(|node| node.spec.kind == NodeKind::Data)
            .collect();
        nodes.sort_by_key(|node| node.id != self.me);
        nodes
            .into_iter()
            .flat_map(relevo_types::cluster::Node::control_addresses)
            .take(TOKEN_ADDRESSES)
            .collect()
    }

    /// Waits until the cluster counts this node's vote.
    pub(crate) async fn await_admission(&self) -> Result<(), ApiError> {
        let mut states = self.states();
        let admitted =
            states.wait_for(|state| state.nodes.get(&self.me).is_some_and(|node| node.voter));
        match tokio::time::timeout(ADMISSION_WAIT, admitted).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(ApiError::new(
                ErrorKind::Unavailable,
                "this machine joined, but has no vote yet",
                format!(
                    "the leader of the control log did not reach it within {} s",
                    ADMISSION_WAIT.as_secs()
                ),
                "check that the members can reach this machine's ports; it goes on trying by itself",
            )),
        }
    }

    /// Takes this node out of the control log.
    pub(crate) async fn leave(&self, what: &str) -> Result<(), ApiError> {
        self.check_leave(self.me, what)?;
        let remove = Command::RemoveNode {
            node: self.me,
            expect: self.state().voters_version,
        };
        self.propose(remove).await.map_err(|e| e.explain(what))?;
        // A leader takes itself out of the group last; without it the others would have to
        // find out by its silence.
        let mut leader = self.control.leader();
        let handed_over = leader.wait_for(|leader| *leader != Some(self.me));
        if tokio::time::timeout(HAND_OVER_WAIT, handed_over)
            .await
            .is_err()
        {
            tracing::warn!("leaving while still leader of the control log");
        }
        Ok(())
    }

    /// Ends everything. `in_order`: services are handed over first.
    pub(crate) async fn stop(&self, in_order: bool) {
        if in_order {
            self.inbox.tell(Input::Shutdown);
            let mut done = self.shutdown_done.clone();
            if tokio::time::timeout(STOP_WAIT, done.wait_for(|done| *done))
                .await
                .is_err()
            {
                let text = format!("services did not stop within {} s", STOP_WAIT.as_secs());
                self.events
                    .add(EventLevel::Alarm, EventKind::Daemon, "", &text);
            }
        }
        self.fencing.stop();
        self.volumes.close().await;
        let held = self
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(mut held) = held {
            self.inbox.stop();
            held.tasks.shutdown().await;
            held.paths.close();
            drop(held.server);
            let joined = tokio::task::spawn_blocking(move || held.node_thread.join().is_ok());
            if !joined.await.unwrap_or(false) {
                tracing::error!("the node manager's thread failed");
            }
        }
        self.control.shutdown().await;
    }

    /// What is going on, as this node sees it and as the others report.
    pub(crate) async fn status(&self) -> ClusterStatus {
        let state = self.state();
        let node = self.inbox.status().await;
        let reports = status::collect(&self.rpc, &self.local, &state, self.me).await;
        let leader = *self.control.leader().borrow();
        status::compose(&Sources {
            state: &state,
            me: self.me,
            leader,
            observed: node.as_ref(),
            reports: &reports,
            now: relevo_host::clock::now(),
            now_unix_ms: unix_ms(),
        })
    }

    /// Whether each node can run a service, as this node sees it.
    pub(crate) async fn verdicts(&self, service: ServiceId) -> BTreeMap<NodeId, Fitness> {
        self.inbox.verdicts(service).await
    }

    /// What would come of something, as this node sees the cluster.
    pub(crate) async fn forecast(&self, supposed: Supposed) -> Option<Forecast> {
        self.inbox.forecast(supposed).await
    }

    /// Whether this node leads the control log, and so decides.
    pub(crate) fn leader(&self) -> Option<NodeId> {
        *self.control.leader().borrow()
    }

    /// What a service is doing, as far as this node knows without asking.
    pub(crate) async fn service_state(&self, service: ServiceId) -> ServiceState {
        let state = self.state();
        let node = self.inbox.status().await;
        status::service_state(&state, node.as_ref(), service)
    }

    /// How this node asks to become primary of a volume.
    pub(crate) fn promotion(&self, volume: VolumeId) -> VolumeChange {
        let live = self.volumes.shared.live(volume);
        let status = live.map(|live| live.handle.status().engine);
        promotion(self.me, status.as_ref())
    }

    /// Waits until this node's replica is open as primary.
    pub(crate) async fn await_open(&self, volume: VolumeId, what: &str) -> Result<(), ApiError> {
        self.volumes.await_open(volume).await.map_err(|why| {
            ApiError::new(
                ErrorKind::Unavailable,
                what,
                why,
                "`relevo status` shows what it waits for; it opens by itself when it can",
            )
        })
    }

    /// Waits a moment until this node's replica of a new volume is attached, so that what
    /// follows a `volume create` finds it in place. Not an error when it is late: `status` tells.
    pub(crate) async fn await_replicas_attached(&self, volume: VolumeId) {
        self.volumes.await_attached(volume).await;
    }

    pub(crate) async fn export_by_hand(&self, volume: VolumeId) -> Result<PathBuf, String> {
        self.volumes.export_by_hand(volume).await
    }

    pub(crate) async fn end_export_by_hand(&self, volume: VolumeId) -> Result<(), String> {
        self.volumes.end_export_by_hand(volume).await
    }

    /// Gives an order to this node's replica of a volume.
    pub(crate) async fn order_replica(
        &self,
        volume: VolumeId,
        order: relevo_replication::Order,
    ) -> Result<(), String> {
        self.volumes.order_replica(volume, order).await
    }

    /// Opens this node's replica of a volume again.
    pub(crate) async fn attach_replica(&self, volume: VolumeId) -> Result<(), String> {
        self.volumes.attach(volume).await
    }

    /// The replicas that were made on this node.
    pub(crate) fn local_replicas(&self) -> LocalReplicas {
        self.volumes.replicas()
    }

    /// Whether this node's replica of a volume is open.
    pub(crate) fn is_attached(&self, volume: VolumeId) -> bool {
        self.volumes.shared.live(volume).is_some()
    }

    /// Closes this node's replica of a volume.
    pub(crate) async fn detach_replica(&self, volume: VolumeId) -> Result<(), String> {
        self.volumes.detach(volume).await
    }

    /// Whether this node's replica has a link to the primary's.
    pub(crate) fn is_connected_to_primary(&self, volume: &relevo_types::cluster::Volume) -> bool {
        volume
            .primary
            .is_some_and(|primary| self.volumes.is_connected(volume.id, primary))
    }

    /// Tells the engine to step down.
    pub(crate) fn demote(&self, volume: VolumeId) -> Result<(), String> {
        self.volumes.demote(volume)
    }
}

/// Addresses in a token: every path of the data nodes of a usual cluster.
const TOKEN_ADDRESSES: usize = 8;

/// After a failure to write down who votes it is tried again after this long.
const VOTERS_AGAIN: Duration = Duration::from_secs(1);

async fn feed_states(
    mut states: watch::Receiver<Arc<ClusterState>>,
    inbox: NodeInbox,
    rpc: Arc<RpcClient>,
    mut voters: VotersKnown,
) {
    loop {
        let state = states.borrow_and_update().clone();
        if !state.nodes.is_empty() {
            // A few bytes, at a change of who votes only.
            if let Err(error) = voters.raise(state.voters_version) {
                // Told without being durable it might be denied after a restart.
                tracing::error!(%error, "who votes can't be written down; this node goes on with what it knew");
                tokio::time::sleep(VOTERS_AGAIN).await;
                continue;
            }
            rpc.set_peers(&control_addresses(&state));
            inbox.tell(Input::State(state));
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

async fn feed_leaders(mut leaders: watch::Receiver<Option<NodeId>>, inbox: NodeInbox) {
    loop {
        let leader = *leaders.borrow_and_update();
        inbox.tell(Input::Leader(leader));
        if leaders.changed().await.is_err() {
            return;
        }
    }
}
