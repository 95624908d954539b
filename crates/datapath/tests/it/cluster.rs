//! Two nodes in one process: volume threads on files, a control log that is a value, and links
//! that can be cut.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use relevo_datapath::{DatapathEvent, NbdAddress, VolumeHandle, VolumeThread, VolumeThreadConfig};
use relevo_disk::{DriverChoice, NewReplica, create_replica, probe};
use relevo_export::nbd::{Client, NbdAddr};
use relevo_format::{Identity as ReplicaIdentity, Replica as NewSuperblock};
use relevo_replication::EngineConfig;
use relevo_transport::{
    ClusterCa, DataListener, EstablishedLink, Identity, LinkAdmission, NodeKey, WantedLink,
    datalink::LinkDialer,
};
use relevo_types::{
    ClusterId, Epoch, Instance, LineageId, NodeId, Sensitivity, Time, VolumeId,
    cluster::{
        ClusterState, Command, Encryption, JoinToken, NodeKind, NodePath, NodeSpec, Outcome, Ports,
        Protocol, ReplicaSpec, Volume, VolumeChange,
    },
};
use tokio::runtime::Runtime;

pub(crate) const A: NodeId = NodeId(1);
pub(crate) const B: NodeId = NodeId(2);
pub(crate) const SIZE: u64 = 64 << 20;

const CLUSTER: ClusterId = ClusterId([7; 16]);
const V: VolumeId = VolumeId(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// One node's replica.
pub(crate) struct Node {
    pub(crate) handle: VolumeHandle,
    pub(crate) nbd: NbdAddr,
    backing: PathBuf,
    events: Vec<DatapathEvent>,
}

/// See the module.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    state: ClusterState,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    inbox: Receiver<(NodeId, DatapathEvent)>,
    outbox: Sender<(NodeId, DatapathEvent)>,
    runtime: Runtime,
    listener: DataListener,
    dialer: LinkDialer,
    /// Both ends' sockets of the link in use.
    sockets: Vec<TcpStream>,
    /// No link is established.
    pub(crate) cut: bool,
    starts: u64,
    /// What the link made last is.
    pub(crate) made: Option<Encryption>,
    /// What the listening side takes.
    encryption: Arc<Mutex<Encryption>>,
}

fn identity(ca: &ClusterCa, node: NodeId) -> Arc<Identity> {
    let key = NodeKey::generate().unwrap();
    let certificate = ca
        .issue(&key.public_der(), node, "test", NodeKind::Data)
        .unwrap();
    Arc::new(Identity::assemble(CLUSTER, ca.certificate().clone(), certificate, &key).unwrap())
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

/// The log of a cluster of two with a volume, created on `nodes`.
fn state(nodes: &[NodeId]) -> ClusterState {
    let mut state = ClusterState::default();
    let commands = [
        Command::Init {
            cluster: CLUSTER,
            name: "campus".to_owned(),
            sensitivity: Sensitivity::Normal,
            node: spec("a"),
        },
        Command::CreateToken {
            hash: "b".to_owned(),
            token: JoinToken {
                kind: None,
                expires_unix_s: 100,
            },
        },
        Command::Join {
            hash: "b".to_owned(),
            now_unix_s: 1,
            node: spec("b"),
        },
        Command::CreateVolume {
            name: "mail".to_owned(),
            size: SIZE,
            lineage: LineageId(9),
            replicas: nodes
                .iter()
                .map(|node| ReplicaSpec {
                    node: *node,
                    protocol: Protocol::C,
                    backing: None,
                    force: false,
                })
                .collect(),
        },
    ];
    for command in &commands {
        state.apply(command).unwrap();
    }
    for node in nodes {
        let created = Command::ReplicaCreated {
            volume: V,
            node: *node,
        };
        state.apply(&created).unwrap();
    }
    state
}

impl Cluster {
    /// A cluster with a replica on each of `nodes`, driver chosen by the probe.
    pub(crate) fn new(nodes: &[NodeId]) -> Self {
        Self::with_driver(nodes, &probe())
    }

    pub(crate) fn with_driver(nodes: &[NodeId], driver: &DriverChoice) -> Self {
        let ca = ClusterCa::create(CLUSTER).unwrap();
        let runtime = Runtime::new().unwrap();
        let guard = runtime.enter();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let encryption = Arc::new(Mutex::new(Encryption::default()));
        let admitted = Arc::clone(&encryption);
        let admission: LinkAdmission = Arc::new(move |_, _| Ok(*admitted.lock().unwrap()));
        let listener = DataListener::bind(&[anywhere], &identity(&ca, B), admission).unwrap();
        drop(guard);
        let (outbox, inbox) = channel();
        let mut cluster = Self {
            dir: tempfile::Builder::new()
                .prefix("relevo-dp-")
                .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
                .unwrap(),
            state: state(nodes),
            nodes: BTreeMap::new(),
            inbox,
            outbox,
            runtime,
            listener,
            dialer: LinkDialer::new(identity(&ca, A)).unwrap(),
            sockets: Vec::new(),
            cut: false,
            starts: 0,
            made: None,
            encryption,
        };
        for node in nodes {
            cluster.create(*node);
            cluster.start(*node, driver);
        }
        cluster
    }

    fn backing(&self, node: NodeId) -> PathBuf {
        self.dir.path().join(format!("{node}.replica"))
    }

    /// Where a node keeps what gives way.
    pub(crate) fn saved_dir(&self, node: NodeId) -> PathBuf {
        self.dir.path().join(format!("{node}.saved"))
    }

    fn create(&self, node: NodeId) {
        let replica = NewSuperblock {
            identity: ReplicaIdentity {
                cluster: CLUSTER,
                volume: V,
                node,
            },
            slot: self.volume().slot(node).unwrap(),
            lineage: LineageId(9),
        };
        create_replica(&NewReplica {
            path: &self.backing(node),
            replica,
            start: relevo_format::Start::Zeroes,
            data_size: SIZE,
            force: false,
        })
        .unwrap();
    }

    /// Starts a node's thread, as a daemon does.
    pub(crate) fn start(&mut self, node: NodeId, driver: &DriverChoice) {
        self.starts += 1;
        let backing = self.backing(node);
        let config = VolumeThreadConfig {
            engine: EngineConfig {
                cluster: CLUSTER,
                volume: V,
                node,
                instance: Instance(self.starts),
                backing_size: 0,
                link_timeout: Duration::from_secs(2),
                ping_interval: Duration::from_millis(300),
                reconcile_grace: Duration::from_secs(1),
                resync_window: 4 << 20,
            },
            name: "mail".to_owned(),
            backing: backing.clone(),
            driver: driver.clone(),
            saved_dir: self.saved_dir(node),
        };
        let outbox = self.outbox.clone();
        let handle = VolumeThread::spawn(config, move |event| {
            // The receiver is gone when a test is over.
            outbox.send((node, event)).unwrap_or_default();
        })
        .unwrap();
        let socket = self.dir.path().join(format!("{node}.sock"));
        handle.listen_nbd(NbdAddress::Unix(socket.clone())).unwrap();
        handle.lease_until(Time::NEVER).unwrap();
        handle.config(Arc::new(self.volume().clone())).unwrap();
        let node_state = Node {
            handle,
            nbd: NbdAddr::Unix(socket),
            backing,
            events: Vec::new(),
        };
        self.nodes.insert(node, node_state);
    }

    pub(crate) fn volume(&self) -> &Volume {
        &self.state.volumes[&V]
    }

    pub(crate) fn handle(&self, node: NodeId) -> &VolumeHandle {
        &self.nodes[&node].handle
    }

    /// Commits a change and tells everybody, as the control log does.
    pub(crate) fn commit(&mut self, expect: Epoch, change: VolumeChange) {
        let command = Command::Volume {
            volume: V,
            expect,
            change,
        };
        if matches!(self.state.apply(&command), Ok(Outcome::Epoch(_))) {
            self.tell_config();
        }
    }

    /// Changes the volume's option.
    pub(crate) fn set_encryption(&mut self, encryption: Encryption) {
        let mut options = self.volume().options.clone();
        options.encryption = encryption;
        let command = Command::SetVolumeOptions {
            volume: V,
            expect: self.volume().version,
            options,
        };
        self.state.apply(&command).unwrap();
        *self.encryption.lock().unwrap() = encryption;
        self.tell_config();
    }

    fn tell_config(&self) {
        let volume = Arc::new(self.volume().clone());
        for node in self.nodes.values() {
            node.handle.config(Arc::clone(&volume)).unwrap();
        }
    }

    pub(crate) fn promote(&mut self, node: NodeId) {
        let epoch = self.volume().epoch;
        self.commit(epoch, VolumeChange::Promote { node });
        self.until("the volume opens", |c| {
            c.nodes[&node].handle.status().engine.open
        });
    }

    /// Runs the cluster until something holds.
    pub(crate) fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        #[expect(clippy::disallowed_methods, reason = "only a test's patience")]
        let start = Instant::now();
        while !holds(self) {
            if start.elapsed() > PATIENCE {
                for (node, state) in &self.nodes {
                    eprintln!("{node}: {:?}", state.handle.status());
                    eprintln!("{node}: {:#?}", state.events);
                }
                panic!("not within {PATIENCE:?}: {what}; {:?}", self.volume());
            }
            if let Ok((node, event)) = self.inbox.recv_timeout(Duration::from_millis(10)) {
                self.heard(node, event);
            }
        }
    }

    fn heard(&mut self, node: NodeId, event: DatapathEvent) {
        match &event {
            DatapathEvent::Propose { expect, change } => self.commit(*expect, change.clone()),
            DatapathEvent::WantLink { .. } if node == A && !self.cut => self.join(),
            DatapathEvent::Died { reason } => panic!("{node} died: {reason}"),
            _ => {}
        }
        if !matches!(event, DatapathEvent::WantLink { .. }) {
            self.nodes.get_mut(&node).unwrap().events.push(event);
        }
    }

    /// What a node said since it was started.
    pub(crate) fn said(&self, node: NodeId, which: impl Fn(&DatapathEvent) -> bool) -> bool {
        self.nodes[&node].events.iter().any(which)
    }

    /// Establishes a link between the two.
    fn join(&mut self) {
        let [dialed, accepted] = self.establish(false);
        self.nodes[&A].handle.link(dialed).unwrap();
        self.nodes[&B].handle.link(accepted).unwrap();
    }

    /// Moves the link to another connection, which one of the two knows of some milliseconds earlier.
    pub(crate) fn move_link(&mut self, first: NodeId) {
        let [dialed, accepted] = self.establish(true);
        let (mut ends, pause) = ([(A, dialed), (B, accepted)], Duration::from_millis(3));
        if first == B {
            ends.reverse();
        }
        for (node, end) in ends {
            self.nodes[&node].handle.link(end).unwrap();
            std::thread::sleep(pause);
        }
    }

    fn establish(&mut self, continues: bool) -> [EstablishedLink; 2] {
        let addresses = self.listener.addresses();
        let encryption = self.volume().options.encryption;
        let (dialer, listener) = (&self.dialer, &mut self.listener);
        let wait = Duration::from_secs(5);
        let (dialed, accepted) = self.runtime.block_on(async {
            let dial = async {
                let wanted = WantedLink {
                    continues,
                    ..WantedLink::new(V, encryption)
                };
                dialer.dial(B, &addresses, wanted, wait).await
            };
            tokio::join!(dial, listener.accept())
        });
        let ends = [dialed.unwrap(), accepted.unwrap()];
        assert!(ends.iter().all(|end| end.continues == continues));
        self.made = Some(ends[0].encryption());
        self.sockets = ends
            .iter()
            .map(|end| end.stream.try_clone().unwrap())
            .collect();
        ends
    }

    /// Breaks the link; there is no other until `cut` is taken back.
    pub(crate) fn cut(&mut self) {
        self.cut = true;
        for socket in self.sockets.drain(..) {
            // It may be broken already.
            socket.shutdown(Shutdown::Both).unwrap_or_default();
        }
    }

    pub(crate) fn connect(&self, node: NodeId) -> Client {
        Client::connect(&self.nodes[&node].nbd, "mail", Some(PATIENCE)).unwrap()
    }

    pub(crate) fn listen_tcp(&self, node: NodeId) -> NbdAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let handle = self.handle(node);
        handle.listen_nbd(NbdAddress::Tcp(listener)).unwrap();
        NbdAddr::Tcp(address)
    }

    /// The data area as it lies on the disk.
    pub(crate) fn data(&self, node: NodeId) -> Vec<u8> {
        let mut bytes = std::fs::read(&self.nodes[&node].backing).unwrap();
        bytes.truncate(SIZE as usize);
        bytes
    }

    pub(crate) fn in_sync(&self) -> Vec<NodeId> {
        self.volume().in_sync.iter().copied().collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in self.nodes.values() {
            assert!(node.handle.stop() || std::thread::panicking());
        }
    }
}
