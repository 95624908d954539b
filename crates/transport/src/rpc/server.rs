//! The listening side: connections of peers, and of machines that want to join.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use relevo_types::NodeId;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    Failure, Frame, MAX_FRAME_BYTES, MAX_STRANGER_FRAME_BYTES, Method, RpcError, RpcHandler,
    connection::{QUEUE_FRAMES, read_frame, write_frames},
    encode,
};
use crate::{
    identity::{Identity, IdentityError, Port, describe_tls_error, peer_node},
    listen::{Listeners, on_all},
    net,
};

/// A client must finish its TLS handshake in this time.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A machine without a certificate must be done in this time.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections at a time that have not shown who they are. Apart from those that have, so that
/// nobody outside the cluster can take the places of its nodes.
const HANDSHAKES_MAX: usize = 32;

/// Connections at a time of machines without a certificate.
const STRANGERS_MAX: usize = 8;

/// Connections at a time of nodes: a cluster has 7, the rest is room for reconnecting ones.
const PEERS_MAX: usize = 64;

/// Requests under way per connection; the next one is read when one is answered.
const REQUESTS_MAX: usize = QUEUE_FRAMES;

/// Pause after the system refused to accept a connection (no descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens for requests. Dropping it stops listening and closes every connection.
#[derive(Debug)]
pub struct RpcServer {
    listeners: Listeners,
}

impl RpcServer {
    /// Listens on every address. Must run inside a Tokio runtime.
    ///
    /// # Errors
    /// An address can't be listened on, or TLS refuses the identity.
    pub fn bind(
        addresses: &[SocketAddr],
        identity: &Arc<Identity>,
        handler: Arc<dyn RpcHandler>,
    ) -> io::Result<Self> {
        let tls = identity
            .server_config(Port::Control)
            .map_err(|error: IdentityError| io::Error::other(error))?;
        let shared = Arc::new(Shared {
            identity: Arc::clone(identity),
            acceptor: TlsAcceptor::from(tls),
            handler,
            handshakes: Semaphore::new(HANDSHAKES_MAX),
            strangers: Semaphore::new(STRANGERS_MAX),
            peers: Semaphore::new(PEERS_MAX),
        });
        let listeners =
            Listeners::new(move |listener, stop| accept(listener, stop, Arc::clone(&shared)));
        on_all(&listeners, addresses)?;
        Ok(Self { listeners })
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
}

impl Drop for RpcServer {
    fn drop(&mut self) {
        self.listeners.close();
    }
}

struct Shared {
    identity: Arc<Identity>,
    acceptor: TlsAcceptor,
    handler: Arc<dyn RpcHandler>,
    handshakes: Semaphore,
    strangers: Semaphore,
    peers: Semaphore,
}

async fn accept(listener: TcpListener, mut stop: oneshot::Receiver<()>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stop => break,
            Some(_ended) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, from)) => {
                connections.spawn(serve(stream, from, Arc::clone(&shared)));
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection on the control port");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve(stream: TcpStream, from: SocketAddr, shared: Arc<Shared>) {
    let Ok(handshake) = shared.handshakes.try_acquire() else {
        tracing::warn!(%from, "too many unfinished connections on the control port; one was closed");
        return;
    };
    let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, shake_hands(stream, &shared));
    let (stream, peer) = match shaken.await {
        Ok(Ok(shaken)) => shaken,
        Ok(Err(why)) => {
            tracing::warn!(%from, why, "a client on the control port was refused");
            return;
        }
        Err(_) => return,
    };
    drop(handshake);
    let places = if peer.is_some() {
        &shared.peers
    } else {
        &shared.strangers
    };
    let Ok(_place) = places.try_acquire() else {
        tracing::warn!(%from, ?peer, "too many connections on the control port; one was closed");
        return;
    };
    let served = converse(stream, peer, &shared.handler);
    let result = if peer.is_some() {
        served.await
    } else {
        let timed = tokio::time::timeout(STRANGER_TIMEOUT, served).await;
        timed.unwrap_or(Ok(()))
    };
    if let Err(error) = result {
        let why = describe_tls_error(&error);
        tracing::debug!(%from, ?peer, why, "a connection on the control port ended");
    }
}

/// TLS, and who the client is; `None`: it showed no certificate.
async fn shake_hands(
    stream: TcpStream,
    shared: &Shared,
) -> Result<(TlsStream<TcpStream>, Option<NodeId>), String> {
    net::tune(&stream).map_err(|error| error.to_string())?;
    let stream = shared
        .acceptor
        .accept(stream)
        .await
        .map_err(|error| describe_tls_error(&error))?;
    let chain = stream.get_ref().1.peer_certificates();
    let peer = chain
        .and_then(|chain| chain.first())
        .map(|certificate| peer_node(certificate, shared.identity.cluster()))
        .transpose()
        .map_err(|error| error.to_string())?;
    Ok((stream, peer))
}

async fn converse(
    stream: TlsStream<TcpStream>,
    peer: Option<NodeId>,
    handler: &Arc<dyn RpcHandler>,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (queue, queue_rx) = mpsc::channel(QUEUE_FRAMES);
    tokio::select! {
        result = read_requests(&mut reader, peer, handler, queue) => result,
        result = write_frames(&mut writer, queue_rx) => result,
    }
}

async fn read_requests(
    reader: &mut (impl tokio::io::AsyncRead + Unpin),
    peer: Option<NodeId>,
    handler: &Arc<dyn RpcHandler>,
    queue: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let max_bytes = if peer.is_some() {
        MAX_FRAME_BYTES
    } else {
        MAX_STRANGER_FRAME_BYTES
    };
    let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
    let mut requests = JoinSet::new();
    let closed = || io::Error::new(io::ErrorKind::BrokenPipe, "the connection closed");
    while let Some(frame) = read_frame(reader, max_bytes).await? {
        while requests.try_join_next().is_some() {}
        match frame {
            Frame::Ping => {
                let pong = encode(&Frame::Pong).map_err(io::Error::other)?;
                queue.send(pong).await.map_err(|_| closed())?;
            }
            Frame::Request { id, method, body } => {
                let slot = Arc::clone(&slots)
                    .acquire_owned()
                    .await
                    .map_err(|_| closed())?;
                let (handler, queue) = (Arc::clone(handler), queue.clone());
                requests.spawn(async move {
                    let result = answer(&*handler, peer, method, body).await;
                    let response = encode_response(id, result);
                    // When the connection is gone nobody waits for it.
                    queue.send(response).await.ok();
                    drop(slot);
                });
            }
            Frame::Response { .. } | Frame::Pong => {
                let why = "the client sent an answer to nothing";
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
        }
    }
    Ok(())
}

async fn answer(
    handler: &dyn RpcHandler,
    peer: Option<NodeId>,
    method: Method,
    body: Bytes,
) -> Result<Bytes, Failure> {
    if peer.is_none() && method != Method::Join {
        let why = "a machine without a certificate of this cluster can only ask to join; \
                   use `relevo join TOKEN`";
        return Err(Failure {
            refused: true,
            why: why.to_owned(),
        });
    }
    handler
        .handle(peer, method, body)
        .await
        .map_err(Failure::from)
}

fn encode_response(id: u64, result: Result<Bytes, Failure>) -> Vec<u8> {
    encode(&Frame::Response { id, result }).unwrap_or_else(|error: RpcError| {
        let result = Err(Failure::from(error));
        // A failure is short: it always fits.
        encode(&Frame::Response { id, result }).unwrap_or_default()
    })
}
