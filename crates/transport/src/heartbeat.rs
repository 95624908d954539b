//! Heartbeats as datagrams: one UDP socket per network, authenticated with a key of the cluster. And all paths
//! of a node together, its byte streams ([`crate::line`]) among them.
//!
//! Driven by the heartbeat thread, which is real-time: everything here is synchronous and
//! non-blocking but [`HeartbeatSockets::wait`]. Which path a datagram came on is told by the socket
//! it arrived at, never by what it says. Old datagrams that someone sends again carry an old
//! instance or round, which the membership machine ignores.
//!
//! ```text
//!  0  4   magic "RVHB"
//!  4  1   version
//!  5  16  cluster id
//! 21  n   heartbeat, postcard
//!     32  HMAC-SHA256 of all before it
//! ```

use std::{
    fmt, io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use relevo_membership::Heartbeat;
use relevo_types::{ClusterId, Time};
use ring::hmac;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::{line::HeartbeatLine, net::explain_bind};

const MAGIC: [u8; 4] = *b"RVHB";
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 4 + 1 + 16;
const TAG_BYTES: usize = 32;

/// Of a heartbeat on a line.
const SHORT_MAGIC: [u8; 4] = *b"RVHL";
const SHORT_VERSION: u8 = 1;
const SHORT_TAG_BYTES: usize = 16;

/// The longest datagram: fits an Ethernet frame. Seven nodes need some 250 bytes.
const MAX_DATAGRAM_BYTES: usize = 1400;

/// The key that authenticates heartbeats: random, shared by the nodes of a cluster, handed over
/// when a node joins.
#[derive(Clone)]
pub struct HeartbeatKey {
    key: hmac::Key,
}

impl fmt::Debug for HeartbeatKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HeartbeatKey")
    }
}

impl HeartbeatKey {
    /// The key of these bytes.
    #[must_use]
    pub fn new(bytes: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, bytes),
        }
    }

    /// A heartbeat as a datagram. Empty when it does not fit, which 7 nodes never reach.
    #[must_use]
    pub fn seal(&self, cluster: ClusterId, heartbeat: &Heartbeat) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_DATAGRAM_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.push(VERSION);
        bytes.extend_from_slice(&cluster.0);
        let Ok(mut bytes) = postcard::to_extend(heartbeat, bytes) else {
            return Vec::new();
        };
        let tag = hmac::sign(&self.key, &bytes);
        bytes.extend_from_slice(tag.as_ref());
        if bytes.len() > MAX_DATAGRAM_BYTES {
            return Vec::new();
        }
        bytes
    }

    /// A heartbeat for a slow line; see [`crate::line`].
    #[must_use]
    pub fn seal_short(&self, cluster: ClusterId, heartbeat: &Heartbeat) -> Vec<u8> {
        let Ok(mut bytes) = postcard::to_extend(heartbeat, vec![SHORT_VERSION]) else {
            return Vec::new();
        };
        let tag = self.short_tag(cluster, &bytes);
        bytes.extend_from_slice(&tag);
        bytes
    }

    /// The heartbeat that came over a line; `None` if it is not one of this cluster.
    #[must_use]
    pub fn open_short(&self, cluster: ClusterId, bytes: &[u8]) -> Option<Heartbeat> {
        let (signed, tag) = bytes.split_last_chunk::<SHORT_TAG_BYTES>()?;
        let (version, body) = signed.split_first()?;
        if *version != SHORT_VERSION {
            return None;
        }
        let expected = self.short_tag(cluster, signed);
        // In the same time wherever they differ.
        let differing = expected
            .iter()
            .zip(tag)
            .fold(0, |all, (a, b)| all | (a ^ b));
        if differing != 0 {
            return None;
        }
        let (heartbeat, rest) = postcard::take_from_bytes(body).ok()?;
        rest.is_empty().then_some(heartbeat)
    }

    fn short_tag(&self, cluster: ClusterId, signed: &[u8]) -> [u8; SHORT_TAG_BYTES] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&SHORT_MAGIC);
        context.update(&cluster.0);
        context.update(signed);
        let mut tag = [0; SHORT_TAG_BYTES];
        tag.copy_from_slice(&context.sign().as_ref()[..SHORT_TAG_BYTES]);
        tag
    }

    /// The heartbeat in a datagram; `None` if it is not one of this cluster.
    #[must_use]
    pub fn open(&self, cluster: ClusterId, datagram: &[u8]) -> Option<Heartbeat> {
        let (signed, tag) = datagram.split_last_chunk::<TAG_BYTES>()?;
        let (head, body) = signed.split_at_checked(HEAD_BYTES)?;
        if head[..4] != MAGIC || head[4] != VERSION || head[5..] != cluster.0 {
            return None;
        }
        hmac::verify(&self.key, signed, tag).ok()?;
        let (heartbeat, rest) = postcard::take_from_bytes(body).ok()?;
        rest.is_empty().then_some(heartbeat)
    }
}

/// A heartbeat that arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Received {
    /// Name of the path whose socket it arrived at.
    pub path: String,
    /// Where it came from; `None`: from the other end of a stream.
    pub from: Option<SocketAddr>,
    /// The heartbeat, authenticated.
    pub heartbeat: Heartbeat,
}

/// The socket of one path.
#[derive(Debug)]
pub struct HeartbeatSocket {
    path: String,
    socket: UdpSocket,
    cluster: ClusterId,
    key: HeartbeatKey,
    ignored: u64,
}

impl HeartbeatSocket {
    /// Binds to this node's address on a path.
    ///
    /// # Errors
    /// The address is in use or not this machine's; the text says which.
    pub fn bind(
        path: &str,
        address: SocketAddr,
        cluster: ClusterId,
        key: HeartbeatKey,
    ) -> io::Result<Self> {
        let socket =
            UdpSocket::bind(address).map_err(|error| explain_bind(address, "UDP", &error))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            path: path.to_owned(),
            socket,
            cluster,
            key,
            ignored: 0,
        })
    }

    /// Name of the path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// The system's.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends a heartbeat. Never waits: a datagram that can't leave now is lost, as on the network.
    ///
    /// # Errors
    /// The system's words; the path is down, say. The next one is sent all the same.
    pub fn send(&self, to: SocketAddr, heartbeat: &Heartbeat) -> io::Result<()> {
        let datagram = self.key.seal(self.cluster, heartbeat);
        self.socket.send_to(&datagram, to).map(drop)
    }

    /// The next heartbeat that waits, if one does. What is not an authentic heartbeat of this
    /// cluster is counted and passed over.
    ///
    /// # Errors
    /// The socket is unusable.
    pub fn receive(&mut self) -> io::Result<Option<Received>> {
        let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
        loop {
            match self.socket.recv_from(&mut buffer) {
                Ok((len, from)) => match self.key.open(self.cluster, &buffer[..len]) {
                    Some(heartbeat) => {
                        return Ok(Some(Received {
                            path: self.path.clone(),
                            from: Some(from),
                            heartbeat,
                        }));
                    }
                    None => self.ignored += 1,
                },
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // Linux reports ICMP errors of earlier sends here; they say nothing about
                    // this socket.
                    io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Datagrams that were no authentic heartbeat of this cluster.
    #[must_use]
    pub const fn ignored(&self) -> u64 {
        self.ignored
    }
}

/// The sockets of all paths of a node.
#[derive(Debug)]
pub struct HeartbeatSockets {
    sockets: Vec<HeartbeatSocket>,
    lines: Vec<HeartbeatLine>,
    wake: Arc<OwnedFd>,
}

/// A path that a node uses from now on, or no longer.
#[derive(Debug)]
pub enum PathChange {
    /// On a network; in place of the one of this name, if there is one.
    Socket(HeartbeatSocket),
    /// On a stream; in place of the one of this name, if there is one.
    Line(HeartbeatLine),
    /// No more on the path of this name.
    Gone(String),
}

/// Ends a [`HeartbeatSockets::wait`] early, from any thread.
#[derive(Debug, Clone)]
pub struct HeartbeatWaker {
    wake: Arc<OwnedFd>,
}

impl HeartbeatWaker {
    /// Wakes.
    pub fn wake(&self) {
        // Fails only when the counter is full: then it is awake already.
        rustix::io::write(&self.wake, &1u64.to_ne_bytes()).ok();
    }
}

impl HeartbeatSockets {
    /// These sockets together.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(sockets: Vec<HeartbeatSocket>) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            sockets,
            lines: Vec::new(),
            wake: Arc::new(wake),
        })
    }

    /// Something that ends a wait.
    #[must_use]
    pub fn waker(&self) -> HeartbeatWaker {
        HeartbeatWaker {
            wake: Arc::clone(&self.wake),
        }
    }

    /// Takes a change of the paths in.
    pub fn change(&mut self, change: PathChange) {
        let path = match &change {
            PathChange::Socket(socket) => socket.path.as_str(),
            PathChange::Line(line) => line.path(),
            PathChange::Gone(path) => path,
        };
        self.sockets.retain(|socket| socket.path != path);
        self.lines.retain(|line| line.path() != path);
        match change {
            PathChange::Socket(socket) => self.sockets.push(socket),
            PathChange::Line(line) => self.lines.push(line),
            PathChange::Gone(_) => {}
        }
    }

    /// Sends a heartbeat on a path: to its peer's address there, or to the other end of the stream. One that
    /// can't be sent now is lost.
    pub fn send(
        &mut self,
        now: Time,
        path: &str,
        address: Option<SocketAddr>,
        heartbeat: &Heartbeat,
    ) {
        let socket = self.sockets.iter().find(|socket| socket.path == path);
        if let (Some(address), Some(socket)) = (address, socket) {
            if let Err(error) = socket.send(address, heartbeat) {
                // Silence on a path is what membership is there to notice.
                tracing::trace!(%error, %address, path, "a heartbeat was not sent");
            }
        } else if let Some(index) = self.lines.iter().position(|line| line.path() == path)
            && let Err(error) = self.lines[index].send(now, heartbeat)
        {
            self.lines.swap_remove(index).end(error);
        }
    }

    /// Waits until a heartbeat may be there, someone wakes, or the time is over. Follow with
    /// [`Self::drain`].
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&self, timeout: Duration) -> io::Result<()> {
        let mut fds: Vec<PollFd<'_>> = self
            .sockets
            .iter()
            .map(|socket| PollFd::from_borrowed_fd(socket.socket.as_fd(), PollFlags::IN))
            .collect();
        fds.extend(self.lines.iter().map(HeartbeatLine::poll_fd));
        fds.push(PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN));
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut counter = [0; 8];
        // Empty when nobody woke us.
        rustix::io::read(&self.wake, &mut counter).ok();
        Ok(())
    }

    /// All heartbeats that wait now, and with them what became of paths that can't be read from.
    pub fn drain(&mut self) -> (Vec<Received>, Vec<(String, io::Error)>) {
        let (mut received, mut errors) = (Vec::new(), Vec::new());
        for socket in &mut self.sockets {
            loop {
                match socket.receive() {
                    Ok(Some(heartbeat)) => received.push(heartbeat),
                    Ok(None) => break,
                    // The other paths are the more needed.
                    Err(error) => {
                        errors.push((socket.path.clone(), error));
                        break;
                    }
                }
            }
        }
        let mut index = 0;
        while let Some(line) = self.lines.get_mut(index) {
            match line.receive() {
                Ok(heartbeats) => {
                    let path = line.path().to_owned();
                    received.extend(heartbeats.into_iter().map(|heartbeat| Received {
                        path: path.clone(),
                        from: None,
                        heartbeat,
                    }));
                    index += 1;
                }
                Err(error) => self.lines.swap_remove(index).end(error),
            }
        }
        (received, errors)
    }

    /// What arrived and was no authentic heartbeat, on all paths.
    #[must_use]
    pub fn ignored(&self) -> u64 {
        let sockets = self.sockets.iter().map(HeartbeatSocket::ignored);
        let lines = self.lines.iter().map(HeartbeatLine::ignored);
        sockets.chain(lines).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use relevo_membership::{PathEcho, PeerEcho};
    use relevo_types::{Instance, LeaseGeneration, NodeId};

    use super::*;

    const CLUSTER: ClusterId = ClusterId([7; 16]);

    fn heartbeat() -> Heartbeat {
        Heartbeat {
            from: NodeId(1),
            instance: Instance(77),
            round: 300,
            generation: LeaseGeneration(1),
            voters: 1,
            peers: vec![PeerEcho {
                node: NodeId(2),
                instance: Instance(5),
                granted_round: 9,
                heard: true,
                alive: false,
                condemned: LeaseGeneration(0),
            }],
            echo: Some(PathEcho {
                instance: Instance(6),
                round: 200,
                held_us: 250,
            }),
        }
    }

    fn socket(path: &str, key: &HeartbeatKey) -> HeartbeatSocket {
        let any = "127.0.0.1:0".parse().unwrap();
        HeartbeatSocket::bind(path, any, CLUSTER, key.clone()).unwrap()
    }

    #[test]
    fn golden_datagram() {
        let sealed = HeartbeatKey::new(&[9; 32]).seal(CLUSTER, &heartbeat());
        let hex: String = sealed[..sealed.len() - TAG_BYTES]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "5256484201\
             07070707070707070707070707070707\
             014dac020101\
             01020509010000\
             0106c801fa01"
        );
    }

    #[test]
    fn golden_content_of_a_frame() {
        let sealed = HeartbeatKey::new(&[9; 32]).seal_short(CLUSTER, &heartbeat());
        let hex: String = sealed.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "01014dac020101010205090100000106c801fa01\
             d6045343e08ba81427d80bed1ed9c6a2"
        );
    }

    #[test]
    fn heartbeats_arrive_with_their_path_and_garbage_is_counted() {
        let key = HeartbeatKey::new(&[1; 32]);
        let lan = socket("lan", &key);
        let repl = socket("repl", &key);
        let sender = socket("lan", &key);
        let (to_lan, to_repl) = (lan.local_address().unwrap(), repl.local_address().unwrap());
        let mut sockets = HeartbeatSockets::new(vec![lan, repl]).unwrap();

        sender.send(to_repl, &heartbeat()).unwrap();
        let stranger = socket("lan", &HeartbeatKey::new(&[2; 32]));
        stranger.send(to_lan, &heartbeat()).unwrap();
        sender.socket.send_to(b"hello", to_lan).unwrap();
        let mut got = Vec::new();
        for _ in 0..50 {
            sockets.wait(Duration::from_millis(100)).unwrap();
            got.extend(sockets.drain().0);
            if got.len() == 1 && sockets.ignored() == 2 {
                break;
            }
        }
        assert_eq!(sockets.ignored(), 2);
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].path, "repl");
        assert_eq!(got[0].from, Some(sender.local_address().unwrap()));
        assert_eq!(got[0].heartbeat, heartbeat());
    }

    #[test]
    fn a_waker_ends_a_wait() {
        let sockets = HeartbeatSockets::new(Vec::new()).unwrap();
        let waker = sockets.waker();
        let woken = std::thread::spawn(move || {
            sockets.wait(Duration::from_secs(60)).unwrap();
        });
        waker.wake();
        woken.join().unwrap();
    }

    #[test]
    fn another_cluster_is_not_understood() {
        let key = HeartbeatKey::new(&[1; 32]);
        let sealed = key.seal(CLUSTER, &heartbeat());
        assert_eq!(key.open(CLUSTER, &sealed), Some(heartbeat()));
        assert_eq!(key.open(ClusterId([8; 16]), &sealed), None);
        let short = key.seal_short(CLUSTER, &heartbeat());
        assert_eq!(key.open_short(CLUSTER, &short), Some(heartbeat()));
        assert_eq!(key.open_short(ClusterId([8; 16]), &short), None);
        assert_eq!(
            HeartbeatKey::new(&[2; 32]).open_short(CLUSTER, &short),
            None
        );
    }

    proptest! {
        #[test]
        fn a_changed_datagram_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let key = HeartbeatKey::new(&[1; 32]);
            let mut sealed = key.seal(CLUSTER, &heartbeat());
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert_eq!(key.open(CLUSTER, &sealed), None);
            let mut short = key.seal_short(CLUSTER, &heartbeat());
            let at = at % short.len();
            short[at] ^= 1 << bit;
            prop_assert_eq!(key.open_short(CLUSTER, &short), None);
        }

        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(HeartbeatKey::new(&[1; 32]).open(CLUSTER, &bytes), None);
            prop_assert_eq!(HeartbeatKey::new(&[1; 32]).open_short(CLUSTER, &bytes), None);
        }
    }
}
