//! Data links: TLS connections that carry the replication of one volume between two nodes.
//!
//! Set up here with Tokio (accept, connect, handshake, [`LinkHello`] both ways), then handed to
//! the data path as an [`EstablishedLink`]: a plain socket and the TLS session, which the volume's
//! own thread drives. The dialing side speaks first.
//!
//! A volume may want no encryption. Then too both prove who they are by TLS, and the greetings, inside TLS,
//! must agree; only what follows is plain. What each side wants is in its committed configuration, and nothing
//! that arrives can change it.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use relevo_types::{NodeId, VolumeId, cluster::Encryption};
use relevo_wire::{HelloError, LINK_HELLO_BYTES, LinkHello, PLAIN_START, ProtocolVersion};
use rustls::{ClientConfig, Connection};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    identity::{Identity, IdentityError, Port, describe_tls_error, peer_node, server_name},
    listen::{Listeners, on_all},
    net,
};

/// Links under way to being established, and established ones not taken yet: more than the
/// volumes that reconnect at once after a network came back.
const PENDING_LINKS: usize = 64;

/// An accepted connection must be established in this time.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after the system refused to accept a connection (no descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Decides whether a peer may have a link for a volume, and with what encryption: `Err` says why not, for
/// the log.
pub type LinkAdmission = Arc<dyn Fn(NodeId, VolumeId) -> Result<Encryption, String> + Send + Sync>;

/// Why a link was not established.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No path led to the peer.
    #[error("no path to the data port of node {peer}: {why}")]
    Unreachable {
        /// The peer.
        peer: NodeId,
        /// What happened on each path.
        why: String,
    },
    /// TLS refuses this node's identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A connection to a peer about one volume, authenticated and greeted, ready for frames.
pub struct EstablishedLink {
    /// The peer, by its certificate.
    pub peer: NodeId,
    /// The volume.
    pub volume: VolumeId,
    /// The version that both sides speak.
    pub protocol: ProtocolVersion,
    /// The peer's address; tells which path the link is on.
    pub remote: SocketAddr,
    /// It continues the link that there is: see [`relevo_wire::Message::Moved`].
    pub continues: bool,
    /// The socket, non-blocking, tuned.
    pub stream: std::net::TcpStream,
    /// The TLS session, its handshake done and all it had to write written. What the peer sent
    /// early is inside: empty its `reader()` before waiting for the socket. `None` on a link without
    /// encryption: frames are on the socket as they are.
    pub tls: Option<Connection>,
}

impl EstablishedLink {
    /// Whether it is encrypted.
    #[must_use]
    pub const fn encryption(&self) -> Encryption {
        match self.tls {
            Some(_) => Encryption::On,
            None => Encryption::Off,
        }
    }
}

impl fmt::Debug for EstablishedLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "EstablishedLink({} {} {})",
            self.peer, self.volume, self.remote
        )
    }
}

/// Listens on the data port.
#[derive(Debug)]
pub struct DataListener {
    listeners: Listeners,
    established: mpsc::Receiver<EstablishedLink>,
}

impl DataListener {
    /// Listens on every address. Must run inside a Tokio runtime.
    ///
    /// # Errors
    /// An address can't be listened on, or TLS refuses the identity.
    pub fn bind(
        addresses: &[SocketAddr],
        identity: &Arc<Identity>,
        admission: LinkAdmission,
    ) -> io::Result<Self> {
        let tls = identity
            .server_config(Port::Data)
            .map_err(io::Error::other)?;
        let (links, established) = mpsc::channel(PENDING_LINKS);
        let shared = Arc::new(Shared {
            identity: Arc::clone(identity),
            acceptor: TlsAcceptor::from(tls),
            admission,
            links,
            pending: Semaphore::new(PENDING_LINKS),
        });
        let listeners =
            Listeners::new(move |listener, stop| accept_all(listener, stop, Arc::clone(&shared)));
        on_all(&listeners, addresses)?;
        Ok(Self {
            listeners,
            established,
        })
    }

    /// Where it listens; can be changed.
    #[must_use]
    pub const fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    /// Where it listens; tells the port when 0 was asked for.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.addresses()
    }

    /// The next link that a peer established. Peers that were refused are in the log only.
    /// `None` never comes while this exists. Cancel-safe.
    pub async fn accept(&mut self) -> Option<EstablishedLink> {
        self.established.recv().await
    }
}

impl Drop for DataListener {
    fn drop(&mut self) {
        self.listeners.close();
    }
}

struct Shared {
    identity: Arc<Identity>,
    acceptor: TlsAcceptor,
    admission: LinkAdmission,
    links: mpsc::Sender<EstablishedLink>,
    pending: Semaphore,
}

async fn accept_all(listener: TcpListener, mut stop: oneshot::Receiver<()>, shared: Arc<Shared>) {
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stop => break,
            Some(_ended) = handshakes.join_next() => continue,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection on the data port");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let shared = Arc::clone(&shared);
        handshakes.spawn(async move {
            let Ok(_permit) = shared.pending.try_acquire() else {
                tracing::warn!(%from, "too many unfinished data links; one was closed");
                return;
            };
            let established =
                tokio::time::timeout(ACCEPT_TIMEOUT, accept_one(stream, from, &shared));
            match established.await {
                // The listener is gone when nobody receives.
                Ok(Ok(link)) => shared.links.send(link).await.unwrap_or(()),
                Ok(Err(why)) => tracing::warn!(%from, why, "a data link was refused"),
                Err(_) => tracing::warn!(%from, "a data link was not established in time"),
            }
        });
    }
    drop(listener);
    while handshakes.join_next().await.is_some() {}
}

async fn accept_one(
    stream: TcpStream,
    from: SocketAddr,
    shared: &Shared,
) -> Result<EstablishedLink, String> {
    net::tune(&stream).map_err(|error| error.to_string())?;
    let mut stream = shared
        .acceptor
        .accept(stream)
        .await
        .map_err(|error| describe_tls_error(&error))?;
    let cluster = shared.identity.cluster();
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first());
    let peer = certificate
        .ok_or("the peer showed no certificate")
        .map_err(str::to_owned)
        .and_then(|certificate| {
            peer_node(certificate, cluster).map_err(|error| error.to_string())
        })?;
    let theirs = read_hello(&mut stream).await?;
    let encryption = (shared.admission)(peer, theirs.volume)?;
    let ours = LinkHello::new(cluster, theirs.volume, encryption);
    // The answer goes out before the verdict, so that the peer can name the difference too.
    let sent = async {
        stream.write_all(&ours.encode()).await?;
        stream.flush().await
    };
    sent.await.map_err(|error| describe_tls_error(&error))?;
    let protocol = ours.agree(&theirs).map_err(|error| error.to_string())?;
    let (mut stream, tls) = stream.into_inner();
    let tls = match encryption {
        Encryption::On => Some(Connection::Server(tls)),
        Encryption::Off => {
            read_plain_start(&mut stream).await?;
            None
        }
    };
    Ok(EstablishedLink {
        peer,
        volume: theirs.volume,
        protocol,
        remote: from,
        continues: theirs.continues,
        stream: stream.into_std().map_err(|error| error.to_string())?,
        tls,
    })
}

/// What a link is dialed for.
#[derive(Clone, Copy, Debug)]
pub struct WantedLink {
    /// Whose.
    pub volume: VolumeId,
    /// What the volume's configuration says.
    pub encryption: Encryption,
    /// It shall continue the link that there is: see [`relevo_wire::Message::Moved`].
    pub continues: bool,
}

impl WantedLink {
    /// A link of its own.
    #[must_use]
    pub const fn new(volume: VolumeId, encryption: Encryption) -> Self {
        Self {
            volume,
            encryption,
            continues: false,
        }
    }
}

/// Establishes links to peers.
#[derive(Debug, Clone)]
pub struct LinkDialer {
    identity: Arc<Identity>,
    tls: Arc<ClientConfig>,
}

impl LinkDialer {
    /// Dials with this identity.
    ///
    /// # Errors
    /// TLS refuses it.
    pub fn new(identity: Arc<Identity>) -> Result<Self, LinkError> {
        Ok(Self {
            tls: identity.client_config(Port::Data)?,
            identity,
        })
    }

    /// Tries a peer's data addresses in order, each for at most `timeout`.
    ///
    /// # Errors
    /// None led to the peer, or it refused.
    pub async fn dial(
        &self,
        peer: NodeId,
        addresses: &[SocketAddr],
        wanted: WantedLink,
        timeout: Duration,
    ) -> Result<EstablishedLink, LinkError> {
        let mut failures = Vec::new();
        for address in addresses {
            let attempt = self.dial_one(peer, *address, wanted, timeout);
            match tokio::time::timeout(timeout, attempt).await {
                Ok(Ok(link)) => return Ok(link),
                Ok(Err(why)) => failures.push(format!("{address}: {why}")),
                Err(_) => failures.push(format!(
                    "{address}: no link within {} ms",
                    timeout.as_millis()
                )),
            }
        }
        if addresses.is_empty() {
            failures.push("it has no address".to_owned());
        }
        Err(LinkError::Unreachable {
            peer,
            why: failures.join("; "),
        })
    }

    async fn dial_one(
        &self,
        peer: NodeId,
        address: SocketAddr,
        wanted: WantedLink,
        timeout: Duration,
    ) -> Result<EstablishedLink, String> {
        let WantedLink {
            volume,
            encryption,
            continues,
        } = wanted;
        let stream = net::connect(address, timeout)
            .await
            .map_err(|error| error.to_string())?;
        let name = server_name(peer, self.identity.cluster());
        let mut stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(name, stream)
            .await
            .map_err(|error| describe_tls_error(&error))?;
        let ours = LinkHello {
            continues,
            ..LinkHello::new(self.identity.cluster(), volume, encryption)
        };
        let sent = async {
            stream.write_all(&ours.encode()).await?;
            stream.flush().await
        };
        sent.await.map_err(|error| describe_tls_error(&error))?;
        let theirs = read_hello(&mut stream).await?;
        let protocol = ours
            .agree(&theirs)
            .map_err(|error: HelloError| error.to_string())?;
        let (mut stream, tls) = stream.into_inner();
        let tls = match encryption {
            Encryption::On => Some(Connection::Client(tls)),
            Encryption::Off => {
                let sent = stream.write_all(&PLAIN_START).await;
                sent.map_err(|error| error.to_string())?;
                None
            }
        };
        Ok(EstablishedLink {
            peer,
            volume,
            protocol,
            remote: address,
            continues,
            stream: stream.into_std().map_err(|error| error.to_string())?,
            tls,
        })
    }
}

async fn read_hello(stream: &mut (impl AsyncRead + Unpin)) -> Result<LinkHello, String> {
    let mut bytes = [0; LINK_HELLO_BYTES];
    stream.read_exact(&mut bytes).await.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            "it closed the connection instead of greeting; it may not have the volume (yet), its log says why"
                .to_owned()
        }
        _ => describe_tls_error(&error),
    })?;
    LinkHello::decode(&bytes).map_err(|error| error.to_string())
}

/// The dialing side has read all that came inside TLS: from here on both may send plain frames.
async fn read_plain_start(stream: &mut TcpStream) -> Result<(), String> {
    let mut bytes = [0; PLAIN_START.len()];
    let read = stream.read_exact(&mut bytes).await;
    read.map_err(|error| format!("it did not go on without encryption: {error}"))?;
    if bytes == PLAIN_START {
        Ok(())
    } else {
        Err(
            "what follows its greeting is not what a link without encryption begins with"
                .to_owned(),
        )
    }
}
