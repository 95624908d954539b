//! Connections between replicas: the node with the lower id dials, the other one listens.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use relevo_transport::{
    DataListener, EstablishedLink, Identity, LinkAdmission, Listeners, WantedLink,
    datalink::LinkDialer,
};
use relevo_types::{
    NodeId, Time, VolumeId,
    cluster::{ClusterState, Encryption, NodePath},
};
use tokio::{runtime::Handle, sync::watch, task::JoinSet};

use super::volumes::{Volumes, lock};

/// An address that does not answer in this time is passed by: a cut cable is found out on the
/// preferred path first, and the other path must take over well within the dead time.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);

/// First and longest pause between two tries: back within a moment after a short loss, quiet while
/// a peer is down.
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MOST: Duration = Duration::from_millis(500);

/// A link that did not last this long was no success: the next one waits longer than it did. A
/// peer whose disk failed takes every link and ends it at once.
const LASTING: Duration = Duration::from_secs(5);

/// A link that had to be made on another path looks this often whether a path that is marked for
/// replication is back.
const PREFER_EVERY: Duration = Duration::from_secs(2);

/// Dials peers. One task for each volume and peer at a time.
#[derive(Clone)]
pub(crate) struct Dialer {
    inner: Arc<Inner>,
}

struct Inner {
    me: NodeId,
    dialer: LinkDialer,
    volumes: Volumes,
    states: watch::Receiver<Arc<ClusterState>>,
    dialing: Mutex<BTreeSet<(VolumeId, NodeId)>>,
    /// When each link was last made, and how long that had waited.
    made: Mutex<BTreeMap<(VolumeId, NodeId), (Time, Duration)>>,
    runtime: Handle,
}

/// Takes links on the data port, wherever it is told to listen, and dials from now on.
pub(crate) fn start(
    tasks: &mut JoinSet<()>,
    identity: &Arc<Identity>,
    volumes: &Volumes,
    states: watch::Receiver<Arc<ClusterState>>,
) -> io::Result<Listeners> {
    let me = identity.node();
    let known = states.clone();
    let admission: LinkAdmission =
        Arc::new(move |peer, volume| admit(&known.borrow(), me, peer, volume));
    let mut listener = DataListener::bind(&[], identity, admission)?;
    let listeners = listener.listeners().clone();
    let accepting = volumes.clone();
    tasks.spawn(async move {
        while let Some(link) = listener.accept().await {
            accepting.link(link);
        }
    });
    let dialer = LinkDialer::new(Arc::clone(identity)).map_err(io::Error::other)?;
    volumes.set_dialer(Dialer {
        inner: Arc::new(Inner {
            me,
            dialer,
            volumes: volumes.clone(),
            states,
            dialing: Mutex::default(),
            made: Mutex::default(),
            runtime: Handle::current(),
        }),
    });
    Ok(listeners)
}

/// Both must have a replica of the volume. Gives what its configuration says of encryption.
fn admit(
    state: &ClusterState,
    me: NodeId,
    peer: NodeId,
    volume: VolumeId,
) -> Result<Encryption, String> {
    let Some(known) = state.volumes.get(&volume) else {
        return Err(format!("volume {volume} is not known here"));
    };
    for node in [me, peer] {
        if !known.replicas.contains_key(&node) {
            return Err(format!(
                "node {node} has no replica of volume {}",
                known.name
            ));
        }
    }
    Ok(known.options.encryption)
}

impl Dialer {
    /// There should be a link. Does not wait.
    pub(crate) fn want(&self, volume: VolumeId, peer: NodeId) {
        let inner = &self.inner;
        if inner.me >= peer || !lock(&inner.dialing).insert((volume, peer)) {
            return;
        }
        let inner = Arc::clone(inner);
        inner.runtime.clone().spawn(async move {
            let link = dial(&inner, volume, peer).await;
            // Before the link is handed over: if it breaks at once, it is dialed again at once.
            lock(&inner.dialing).remove(&(volume, peer));
            if let Some((link, waited)) = link {
                let remote = link.remote.ip();
                let made = inner.hand_over(link, waited);
                keep_on_its_path(&inner, (volume, peer), made, remote).await;
            }
        });
    }
}

impl Inner {
    fn hand_over(&self, link: EstablishedLink, waited: Duration) -> Time {
        tracing::info!(volume = %link.volume, peer = %link.peer, remote = %link.remote, "a data link is made");
        let now = relevo_host::clock::now();
        lock(&self.made).insert((link.volume, link.peer), (now, waited));
        self.volumes.link(link);
        now
    }
}

/// Moves a link to a path that is marked for replication when it had to be made on another one, and away from a path
/// that was removed. It goes on on the new connection: nobody leaves the in-sync set for it. Ends when the link
/// changed otherwise.
async fn keep_on_its_path(
    inner: &Inner,
    (volume, peer): (VolumeId, NodeId),
    mut made: Time,
    mut remote: IpAddr,
) {
    let mut states = inner.states.clone();
    let mut rested = false;
    loop {
        let last = lock(&inner.made).get(&(volume, peer)).copied();
        let unchanged = last.is_some_and(|(last, _)| last == made);
        if !unchanged || inner.volumes.shared.live(volume).is_none() {
            return;
        }
        let state = states.borrow_and_update().clone();
        let ways = Ways::between(&state, inner.me, peer);
        let admitted = admit(&state, inner.me, peer, volume);
        let (Some(ways), Ok(encryption)) = (ways, admitted) else {
            return;
        };
        let better = ways.better_than(remote);
        if better.is_empty() {
            if states.changed().await.is_err() {
                return;
            }
            continue;
        }
        if !ways.is_removed(remote) && !rested {
            // The path that was left may not be back to stay.
            tokio::time::sleep(PREFER_EVERY).await;
            rested = true;
            continue;
        }
        let wanted = WantedLink {
            continues: true,
            ..WantedLink::new(volume, encryption)
        };
        let dialed = inner
            .dialer
            .dial(peer, &better, wanted, CONNECT_TIMEOUT)
            .await;
        match dialed {
            Ok(link) => {
                remote = link.remote.ip();
                made = inner.hand_over(link, Duration::ZERO);
                rested = false;
            }
            Err(error) => {
                tracing::debug!(%error, %volume, "a data link does not move yet");
                tokio::time::sleep(PREFER_EVERY).await;
            }
        }
    }
}

/// The networks that two nodes are both on, as addresses of the peer's data port.
struct Ways {
    marked: Vec<SocketAddr>,
    others: Vec<SocketAddr>,
}

impl Ways {
    fn between(state: &ClusterState, me: NodeId, peer: NodeId) -> Option<Self> {
        let (me, peer) = state.nodes.get(&me).zip(state.nodes.get(&peer))?;
        let shared = |path: &&NodePath| me.spec.paths.iter().any(|own| own.name == path.name);
        let paths = peer.spec.paths.iter().filter(shared);
        let (marked, others): (Vec<_>, Vec<_>) = paths.partition(|path| path.replication);
        let addresses = |paths: Vec<&NodePath>| {
            let addresses = paths.into_iter();
            addresses
                .map(|path| SocketAddr::new(path.address, peer.spec.ports.data))
                .collect()
        };
        Some(Self {
            marked: addresses(marked),
            others: addresses(others),
        })
    }

    /// Whether a link goes over none of them. Where the two share none, it goes as it can.
    fn is_removed(&self, remote: IpAddr) -> bool {
        let mut all = self.marked.iter().chain(&self.others).peekable();
        all.peek().is_some() && all.all(|address| address.ip() != remote)
    }

    /// Where a link shall rather go, in order; none if it is well where it is.
    fn better_than(&self, remote: IpAddr) -> Vec<SocketAddr> {
        if self.marked.iter().any(|address| address.ip() == remote) {
            return Vec::new();
        }
        let others = self.others.iter().filter(|_| self.is_removed(remote));
        self.marked.iter().chain(others).copied().collect()
    }
}

/// Dials until there is a link, or none is wanted any more. Returns it with how long it had waited.
async fn dial(
    inner: &Inner,
    volume: VolumeId,
    peer: NodeId,
) -> Option<(EstablishedLink, Duration)> {
    let last = lock(&inner.made).get(&(volume, peer)).copied();
    let first = first_pause(last, relevo_host::clock::now());
    tokio::time::sleep(first).await;
    let mut pause = first.max(BACKOFF_FIRST);
    loop {
        // One was made meanwhile, on a path that replication prefers: a further one would break
        // it, and its replica would have to leave the in-sync set once more. If that one is lost
        // too, the data path says so again.
        if lock(&inner.made).get(&(volume, peer)).copied() != last {
            return None;
        }
        let (addresses, encryption) = {
            let state = inner.states.borrow();
            let encryption = admit(&state, inner.me, peer, volume).ok()?;
            let nodes = state.nodes.get(&peer).zip(state.nodes.get(&inner.me));
            let addresses = nodes.map(|(peer, me)| peer.data_addresses(&me.spec));
            (addresses.unwrap_or_default(), encryption)
        };
        // Detached meanwhile.
        inner.volumes.shared.live(volume)?;
        let wanted = WantedLink::new(volume, encryption);
        match inner
            .dialer
            .dial(peer, &addresses, wanted, CONNECT_TIMEOUT)
            .await
        {
            Ok(link) => return Some((link, first)),
            Err(error) => tracing::debug!(%error, %volume, "no data link yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(BACKOFF_MOST);
    }
}

/// How long a new link waits, by when the last one was made and how long that had waited.
fn first_pause(last: Option<(Time, Duration)>, now: Time) -> Duration {
    match last {
        Some((made, waited)) if now.since(made) < LASTING => {
            (waited * 2).clamp(BACKOFF_FIRST, BACKOFF_MOST)
        }
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::{
        LineageId, Sensitivity,
        cluster::{Command, JoinToken, NodeKind, NodePath, NodeSpec, Ports, Protocol, ReplicaSpec},
    };

    use super::*;

    /// Found by the disk tests in `crates/relevo/tests/it/breakage`: a peer with a failed disk was
    /// dialed 600 times a second.
    #[test]
    fn links_that_end_at_once_are_made_less_and_less_often() {
        let mut now = Time(0);
        let mut last = None;
        let mut links = 0;
        while now < Time::ZERO + Duration::from_secs(10) {
            let pause = first_pause(last, now);
            now = now + pause + Duration::from_millis(1);
            last = Some((now, pause));
            links += 1;
        }
        assert!((20..40).contains(&links), "{links}");
        // One that lasted is replaced at once.
        assert_eq!(first_pause(last, now + LASTING), Duration::ZERO);
    }

    #[test]
    fn only_replicas_of_a_volume_get_links() {
        let spec = |name: &str| NodeSpec {
            name: name.to_owned(),
            kind: NodeKind::Data,
            paths: vec![NodePath {
                name: "lan".to_owned(),
                address: "127.0.0.1".parse().unwrap(),
                replication: false,
            }],
            streams: Vec::new(),
            ports: Ports::default(),
        };
        let mut state = ClusterState::default();
        state
            .apply(&Command::Init {
                cluster: relevo_types::ClusterId([1; 16]),
                name: "c".to_owned(),
                sensitivity: Sensitivity::Normal,
                node: spec("a"),
            })
            .unwrap();
        for name in ["b", "c"] {
            let token = JoinToken {
                kind: None,
                expires_unix_s: 10,
            };
            let hash = name.to_owned();
            state
                .apply(&Command::CreateToken {
                    hash: hash.clone(),
                    token,
                })
                .unwrap();
            state
                .apply(&Command::Join {
                    hash,
                    now_unix_s: 1,
                    node: spec(name),
                })
                .unwrap();
        }
        let replica = |node| ReplicaSpec {
            node: NodeId(node),
            protocol: Protocol::C,
            backing: None,
            force: false,
        };
        state
            .apply(&Command::CreateVolume {
                name: "v".to_owned(),
                size: 4096,
                lineage: LineageId(7),
                replicas: vec![replica(1), replica(2)],
            })
            .unwrap();
        let admitted = admit(&state, NodeId(1), NodeId(2), VolumeId(1));
        assert_eq!(admitted, Ok(Encryption::On));
        assert!(admit(&state, NodeId(1), NodeId(3), VolumeId(1)).is_err());
        assert!(admit(&state, NodeId(1), NodeId(2), VolumeId(2)).is_err());
    }
}
