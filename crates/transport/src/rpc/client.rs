//! The dialing side: one task per peer keeps a connection up.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use relevo_types::NodeId;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::Instant,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Frame, MAX_FRAME_BYTES, Method, RpcConfig, RpcError,
    connection::{QUEUE_FRAMES, read_frame, write_frames},
    encode,
};
use crate::{
    identity::{
        Fingerprint, Identity, IdentityError, Port, describe_tls_error, joining_client_config,
        server_name,
    },
    net,
};

/// After every path failed, the first wait before they are tried again; it doubles up to the
/// second. Short enough to be back in a moment, long enough not to keep a processor busy.
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MOST: Duration = Duration::from_secs(1);

/// How long answers under way may take when a connection's path was removed: longer than any request. And how
/// often that is looked at.
const RETIRE_WAIT: Duration = Duration::from_secs(20);
const RETIRE_LOOK: Duration = Duration::from_millis(20);

/// Connections to the other nodes. Dropping it closes them.
#[derive(Debug)]
pub struct RpcClient {
    identity: Arc<Identity>,
    tls: Arc<ClientConfig>,
    config: RpcConfig,
    peers: Mutex<BTreeMap<NodeId, Peer>>,
}

#[derive(Debug)]
struct Peer {
    addresses: watch::Sender<Vec<SocketAddr>>,
    link: watch::Receiver<Link>,
    task: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone, Debug)]
enum Link {
    Down {
        why: String,
        /// How often every path was tried in vain.
        rounds: u64,
    },
    Up(Arc<Connection>),
}

impl RpcClient {
    /// A client without peers. Give it addresses with [`Self::set_peers`].
    ///
    /// # Errors
    /// TLS refuses the identity.
    pub fn new(identity: Arc<Identity>, config: RpcConfig) -> Result<Self, IdentityError> {
        Ok(Self {
            tls: identity.client_config(Port::Control)?,
            identity,
            config,
            peers: Mutex::default(),
        })
    }

    /// The peers and their control addresses, preferred path first. Connections to others are
    /// closed. Must run inside a Tokio runtime.
    pub fn set_peers(&self, peers: &BTreeMap<NodeId, Vec<SocketAddr>>) {
        let mut known = lock(&self.peers);
        known.retain(|node, _| peers.contains_key(node));
        for (node, addresses) in peers
            .iter()
            .filter(|(node, _)| **node != self.identity.node())
        {
            let peer = known
                .entry(*node)
                .or_insert_with(|| self.start_peer(*node, addresses.clone()));
            peer.addresses.send_if_modified(|current| {
                let changed = current != addresses;
                current.clone_from(addresses);
                changed
            });
        }
    }

    /// Why there is no connection to a peer; `None` while there is one.
    #[must_use]
    pub fn trouble_with(&self, node: NodeId) -> Option<String> {
        match lock(&self.peers).get(&node) {
            None => Some("its addresses are not known".to_owned()),
            Some(peer) => match &*peer.link.borrow() {
                Link::Down { why, .. } => Some(why.clone()),
                Link::Up(_) => None,
            },
        }
    }

    /// Sends a request and waits for its answer up to `timeout`. Without a connection it waits
    /// until one is up or every path was tried once more: a caller that wants a leader, say, must
    /// not hang on the one that died.
    ///
    /// # Errors
    /// See [`RpcError`]; [`RpcError::may_have_happened`] tells whether it may be asked again.
    pub async fn call(
        &self,
        node: NodeId,
        method: Method,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        let deadline = Instant::now() + timeout;
        let unreachable = |why: String| RpcError::Unreachable {
            peer: node.to_string(),
            why,
        };
        let link = lock(&self.peers).get(&node).map(|peer| peer.link.clone());
        let mut link = link.ok_or_else(|| unreachable("its addresses are not known".to_owned()))?;
        let mut first_rounds = None;
        let connection = loop {
            let why = match &*link.borrow_and_update() {
                Link::Up(connection) => break Arc::clone(connection),
                Link::Down { why, rounds } => {
                    if *first_rounds.get_or_insert(*rounds) < *rounds {
                        return Err(unreachable(why.clone()));
                    }
                    why.clone()
                }
            };
            match tokio::time::timeout_at(deadline, link.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(unreachable(why)),
            }
        };
        connection.call(method, body, deadline, timeout).await
    }

    fn start_peer(&self, node: NodeId, addresses: Vec<SocketAddr>) -> Peer {
        let (addresses, addresses_rx) = watch::channel(addresses);
        let (link_tx, link) = watch::channel(Link::Down {
            why: "not connected yet".to_owned(),
            rounds: 0,
        });
        let dialer = Dialer {
            peer: node.to_string(),
            name: server_name(node, self.identity.cluster()),
            tls: Arc::clone(&self.tls),
            config: self.config,
        };
        let task = tokio::spawn(dialer.run(addresses_rx, link_tx));
        Peer {
            addresses,
            link,
            task,
        }
    }
}

/// Keeps a connection to one peer.
struct Dialer {
    peer: String,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    config: RpcConfig,
}

impl Dialer {
    async fn run(self, mut addresses: watch::Receiver<Vec<SocketAddr>>, link: watch::Sender<Link>) {
        let mut backoff = BACKOFF_FIRST;
        let mut path = 0;
        let mut rounds = 0;
        let mut retired = JoinSet::new();
        loop {
            let known = addresses.borrow_and_update().clone();
            let mut failures = Vec::new();
            let mut lost = false;
            for turn in 0..known.len() {
                let address = known[(path + turn) % known.len()];
                match dial(address, &self.name, &self.tls, self.config.connect_timeout).await {
                    Ok(stream) => {
                        tracing::debug!(peer = self.peer, %address, "connected");
                        let why = self
                            .serve(stream, (address, &mut addresses), &mut retired, &link)
                            .await;
                        tracing::info!(peer = self.peer, %address, why, "connection lost");
                        failures = vec![format!("{address}: {why}")];
                        // The path that broke is tried last.
                        path = (path + turn + 1) % known.len();
                        backoff = BACKOFF_FIRST;
                        lost = true;
                        break;
                    }
                    Err(why) => failures.push(format!("{address}: {why}")),
                }
            }
            let why = if known.is_empty() {
                "it has no address".to_owned()
            } else {
                failures.join("; ")
            };
            rounds += u64::from(!lost);
            link.send_replace(Link::Down { why, rounds });
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                changed = addresses.changed() => if changed.is_err() { return },
            }
            backoff = (backoff * 2).min(BACKOFF_MOST);
        }
    }

    /// Runs a connection to its end and says why it ended: also when its address is the peer's no longer. Then
    /// it is among the retired ones for as long as answers are under way.
    async fn serve(
        &self,
        stream: TlsStream<TcpStream>,
        (address, addresses): (SocketAddr, &mut watch::Receiver<Vec<SocketAddr>>),
        retired: &mut JoinSet<()>,
        link: &watch::Sender<Link>,
    ) -> String {
        let (connection, queue) = Connection::new(self.peer.clone());
        link.send_replace(Link::Up(Arc::clone(&connection)));
        // It ends with the set.
        let mut running = JoinSet::new();
        let (runner, config) = (Arc::clone(&connection), self.config);
        running.spawn(async move { runner.run(stream, queue, &config).await });
        tokio::select! {
            why = running.join_next() => {
                let why = why.and_then(Result::ok);
                let why = why.unwrap_or_else(|| "it was ended".to_owned());
                connection.fail(&why);
                why
            }
            // An error: the client is being dropped, and this task with it.
            _ = addresses.wait_for(|known| !known.contains(&address)) => {
                while retired.try_join_next().is_some() {}
                retired.spawn(connection.retire(running));
                "its path was removed".to_owned()
            }
        }
    }
}

/// Connects and shakes hands, within `timeout` each.
async fn dial(
    address: SocketAddr,
    name: &ServerName<'static>,
    tls: &Arc<ClientConfig>,
    timeout: Duration,
) -> Result<TlsStream<TcpStream>, String> {
    let stream = net::connect(address, timeout)
        .await
        .map_err(|error| error.to_string())?;
    let handshake = TlsConnector::from(Arc::clone(tls)).connect(name.clone(), stream);
    tokio::time::timeout(timeout, handshake)
        .await
        .map_err(|_| format!("no TLS handshake within {} ms", timeout.as_millis()))?
        .map_err(|error| describe_tls_error(&error))
}

/// One connection and the requests that wait for answers on it.
#[derive(Debug)]
struct Connection {
    peer: String,
    queue: mpsc::Sender<Vec<u8>>,
    next_id: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    answers: BTreeMap<u64, oneshot::Sender<Result<Bytes, RpcError>>>,
    /// When the first of them was sent, or something arrived, whichever is later.
    quiet_since: Instant,
    /// Set when the connection broke.
    failed: Option<String>,
}

impl Connection {
    fn new(peer: String) -> (Arc<Self>, mpsc::Receiver<Vec<u8>>) {
        let (queue, rx) = mpsc::channel(QUEUE_FRAMES);
        let waiting = Waiting {
            answers: BTreeMap::new(),
            quiet_since: Instant::now(),
            failed: None,
        };
        let connection = Arc::new(Self {
            peer,
            queue,
            next_id: AtomicU64::new(1),
            waiting: Mutex::new(waiting),
        });
        (connection, rx)
    }

    async fn call(
        &self,
        method: Method,
        body: Bytes,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Bytes, RpcError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = encode(&Frame::Request { id, method, body })?;
        let unreachable = |why: String| RpcError::Unreachable {
            peer: self.peer.clone(),
            why,
        };
        let Ok(permit) = tokio::time::timeout_at(deadline, self.queue.reserve()).await else {
            return Err(unreachable(
                "it does not take what was sent before".to_owned(),
            ));
        };
        let permit = permit.map_err(|_| unreachable("the connection closed".to_owned()))?;
        let (answer, answer_rx) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            if let Some(why) = &waiting.failed {
                return Err(unreachable(why.clone()));
            }
            if waiting.answers.is_empty() {
                waiting.quiet_since = Instant::now();
            }
            waiting.answers.insert(id, answer);
        }
        let _forget = Forget {
            connection: self,
            id,
        };
        permit.send(frame);
        match tokio::time::timeout_at(deadline, answer_rx).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(RpcError::Lost {
                peer: self.peer.clone(),
                why: "it closed".to_owned(),
            }),
            Err(_) => Err(RpcError::TimedOut {
                peer: self.peer.clone(),
                after: timeout,
            }),
        }
    }

    async fn run(
        &self,
        stream: TlsStream<TcpStream>,
        queue: mpsc::Receiver<Vec<u8>>,
        config: &RpcConfig,
    ) -> String {
        let (mut reader, mut writer) = tokio::io::split(stream);
        tokio::select! {
            result = self.read(&mut reader) => match result {
                Ok(()) => "the peer closed it".to_owned(),
                Err(error) => describe_tls_error(&error),
            },
            result = write_frames(&mut writer, queue) => match result {
                Ok(()) => "closed".to_owned(),
                Err(error) => describe_tls_error(&error),
            },
            why = self.watch(config) => why,
        }
    }

    async fn read(&self, reader: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<()> {
        while let Some(frame) = read_frame(reader, MAX_FRAME_BYTES).await? {
            let mut waiting = lock(&self.waiting);
            waiting.quiet_since = Instant::now();
            match frame {
                Frame::Response { id, result } => {
                    if let Some(answer) = waiting.answers.remove(&id) {
                        // The caller may have given up meanwhile.
                        answer.send(result.map_err(RpcError::from)).ok();
                    }
                }
                Frame::Pong => {}
                Frame::Request { .. } | Frame::Ping => {
                    let why = "the peer sent a request on a connection that only answers";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
        }
        Ok(())
    }

    /// Ends when the peer owes an answer and is silent.
    async fn watch(&self, config: &RpcConfig) -> String {
        let ping = encode(&Frame::Ping).unwrap_or_default();
        loop {
            tokio::time::sleep(config.ping).await;
            let quiet = {
                let waiting = lock(&self.waiting);
                if waiting.answers.is_empty() {
                    continue;
                }
                waiting.quiet_since.elapsed()
            };
            if quiet >= config.silence {
                return format!(
                    "it owes an answer and was silent for {} ms",
                    quiet.as_millis()
                );
            }
            if quiet >= config.ping {
                // A full queue is a sign of life asked for already.
                self.queue.try_send(ping.clone()).ok();
            }
        }
    }

    /// Its path was taken away, and new requests are for another connection: those under way get their answers.
    async fn retire(self: Arc<Self>, running: JoinSet<String>) {
        let deadline = Instant::now() + RETIRE_WAIT;
        while Instant::now() < deadline && !lock(&self.waiting).answers.is_empty() {
            tokio::time::sleep(RETIRE_LOOK).await;
        }
        self.fail("its path was removed");
        drop(running);
    }

    fn fail(&self, why: &str) {
        let mut waiting = lock(&self.waiting);
        waiting.failed = Some(why.to_owned());
        for (_, answer) in std::mem::take(&mut waiting.answers) {
            let lost = RpcError::Lost {
                peer: self.peer.clone(),
                why: why.to_owned(),
            };
            // The caller may have given up meanwhile.
            answer.send(Err(lost)).ok();
        }
    }
}

/// Forgets a request whose caller no longer waits.
struct Forget<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.connection.waiting).answers.remove(&self.id);
    }
}

/// Asks a cluster to let this machine join: one [`Method::Join`] request without a certificate of
/// our own, to the first address that answers with a certificate of the CA with that fingerprint.
///
/// # Errors
/// No address answers as that cluster, or the cluster refuses.
pub async fn join(
    addresses: &[SocketAddr],
    ca: Fingerprint,
    body: Bytes,
    timeout: Duration,
) -> Result<Bytes, RpcError> {
    call_as_stranger(addresses, ca, Method::Join, body, timeout).await
}

/// Asks a cluster anything without a certificate; it refuses all but [`Method::Join`], which
/// [`join`] asks.
///
/// # Errors
/// As [`join`].
pub async fn call_as_stranger(
    addresses: &[SocketAddr],
    ca: Fingerprint,
    method: Method,
    body: Bytes,
    timeout: Duration,
) -> Result<Bytes, RpcError> {
    let failed = |why: String| RpcError::Unreachable {
        peer: "of the cluster".to_owned(),
        why,
    };
    let tls = joining_client_config(ca).map_err(|error| failed(error.to_string()))?;
    let config = RpcConfig::default();
    let deadline = Instant::now() + timeout;
    let mut failures = Vec::new();
    for address in addresses {
        // The name is not checked when joining; an address is as good as any.
        let name = ServerName::from(address.ip());
        let dialed = dial(*address, &name, &tls, timeout.min(JOIN_CONNECT_TIMEOUT)).await;
        let stream = match dialed {
            Ok(stream) => stream,
            Err(why) => {
                failures.push(format!("{address}: {why}"));
                continue;
            }
        };
        let (connection, queue) = Connection::new(format!("at {address}"));
        return tokio::select! {
            result = connection.call(method, body, deadline, timeout) => result,
            why = connection.run(stream, queue, &config) => Err(RpcError::Lost {
                peer: format!("at {address}"),
                why,
            }),
        };
    }
    Err(failed(failures.join("; ")))
}

/// How long a joining machine waits for one address: a person waits, and each is tried once.
const JOIN_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Locks; a panic elsewhere left data that is only ever replaced whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
