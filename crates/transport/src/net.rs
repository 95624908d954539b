//! Sockets between nodes: their options, and connecting over several paths.

use std::{io, net::SocketAddr, os::fd::AsFd, time::Duration};

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// A connection whose sent bytes stay unacknowledged this long is broken. Longer than any dead
/// time: the users of a connection have shorter time-outs of their own; this one only makes sure
/// that the kernel does not keep a dead connection for a quarter of an hour.
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// An idle connection is probed after this long, so that one whose peer vanished is closed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_PROBES: u32 = 3;

/// Connections that wait to be accepted: a cluster has at most 7 nodes and a few dozen volumes.
const BACKLOG: u32 = 128;

/// Congestion controls in order of preference. Hosts default to BBR at times, which doubles the
/// latency of a 4 KiB round trip; inside a network namespace only `reno` may be allowed.
const CONGESTION: [&str; 2] = ["cubic", "reno"];

/// Sets the options of a connection between nodes: no delay of small segments, a loss-based
/// congestion control where that is allowed, keepalive, and an end for unacknowledged data.
///
/// # Errors
/// The socket is gone. An option that the kernel does not allow is passed over.
pub fn tune(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    let user_timeout_ms = u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, user_timeout_ms)?;
    let chosen = CONGESTION
        .iter()
        .find(|name| sockopt::set_tcp_congestion(socket, name).is_ok());
    if chosen.is_none() {
        tracing::debug!("the kernel allows neither cubic nor reno here; its default is used");
    }
    Ok(())
}

/// Connects to one address, within a time, and tunes the socket.
///
/// # Errors
/// The system's, or `TimedOut`.
pub async fn connect(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(timeout, TcpStream::connect(address))
        .await
        .map_err(|_| {
            let why = format!("no answer within {} ms", timeout.as_millis());
            io::Error::new(io::ErrorKind::TimedOut, why)
        })??;
    tune(&stream)?;
    Ok(stream)
}

/// Listens on an address. A daemon that restarts may take it again at once.
///
/// # Errors
/// The address is in use or not this machine's; the text says which address.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let bind = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|error| explain_bind(address, "TCP", &error))
}

/// An error of binding with the address and what to do about it.
pub(crate) fn explain_bind(address: SocketAddr, what: &str, error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program uses the port; stop it, or give this node other ports"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine does not have the address; bring its interface up, or correct the path"
        }
        io::ErrorKind::PermissionDenied => "choose a port above 1023, or run as root",
        _ => "see the system's message",
    };
    let text = format!("can't listen on {address} ({what}): {error}; {remedy}");
    io::Error::new(error.kind(), text)
}
