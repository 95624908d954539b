//! This node's replicas: which there are, who works for each, and what the rest of the daemon may
//! ask of them.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use relevo_control::RaftControl;
use relevo_datapath::{NbdAddress, VolumeHandle, VolumeStatus};
use relevo_disk::DriverChoice;
use relevo_node::VolumeOrder;
use relevo_replication::{DiskState, EngineConfig, EngineStatus, Order, PeerState};
use relevo_transport::EstablishedLink;
use relevo_types::{ClusterId, Instance, NodeId, Time, Timing, VolumeId};
use tokio::runtime::Handle;

use super::{
    exports::Exports, links::Dialer, mailbox::Mailbox, node_loop::NodeInbox, volume_worker,
};
use crate::{
    events::{Events, unix_ms},
    local_store::{LocalReplica, LocalReplicas, Stored},
    status::dirty_blocks,
};

/// How long a person waits for a volume to open after a promotion by hand.
const OPEN_WAIT: Duration = Duration::from_secs(15);

/// How long `volume create` waits for the first attachment, which takes milliseconds.
const ATTACH_WAIT: Duration = Duration::from_secs(5);

/// How long an order may take.
const ORDER_WAIT: Duration = Duration::from_secs(10);

/// How often these look.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Resync data under way to one peer: two round trips of a fast link.
const RESYNC_WINDOW: u64 = 16 << 20;

/// What the replicas work with.
pub(crate) struct VolumesContext {
    pub(crate) cluster: ClusterId,
    pub(crate) me: NodeId,
    pub(crate) instance: Instance,
    pub(crate) timing: Timing,
    pub(crate) pool_dir: PathBuf,
    /// `None`: no block devices.
    pub(crate) device_dir: Option<PathBuf>,
    pub(crate) nbd_dir: PathBuf,
    pub(crate) saved_dir: PathBuf,
    pub(crate) nbd_listen: Option<SocketAddr>,
    pub(crate) max_resyncs: Option<NonZeroU32>,
    pub(crate) store: Stored<LocalReplicas>,
    pub(crate) replicas: LocalReplicas,
    pub(crate) control: Arc<RaftControl>,
    pub(crate) inbox: NodeInbox,
    pub(crate) events: Arc<Events>,
    pub(crate) runtime: Handle,
}

/// The replicas of this node.
#[derive(Clone)]
pub(crate) struct Volumes {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) cluster: ClusterId,
    pub(crate) me: NodeId,
    instance: Instance,
    timing: Timing,
    pool_dir: PathBuf,
    nbd_dir: PathBuf,
    /// Where what gives way is kept.
    pub(crate) saved_dir: PathBuf,
    nbd_listen: Option<SocketAddr>,
    max_resyncs: Option<NonZeroU32>,
    pub(crate) driver: DriverChoice,
    store: Stored<LocalReplicas>,
    replicas: Mutex<LocalReplicas>,
    pub(crate) control: Arc<RaftControl>,
    pub(crate) inbox: NodeInbox,
    pub(crate) events: Arc<Events>,
    pub(crate) runtime: Handle,
    pub(crate) exports: Exports,
    /// Set once the data port listens.
    dialer: Mutex<Option<Dialer>>,
    volumes: Mutex<BTreeMap<VolumeId, Known>>,
    lease: Mutex<Lease>,
}

/// The node's lease, and what the volumes were told of it. It is renewed with every heartbeat; telling
/// them each time would wake two threads a volume ten times a second for nothing. What they know is
/// earlier by the suspect time at most, so that a healthy lease always has more than half of the dead
/// time left there.
#[derive(Debug, Default)]
struct Lease {
    until: Time,
    told: Time,
}

impl Lease {
    /// Takes the new end. True: the volumes must be told.
    fn renew(&mut self, until: Time, now: Time, step: Duration) -> bool {
        self.until = until;
        let tell = until < self.told || self.told <= now || until >= self.told + step;
        if tell {
            self.told = until;
        }
        tell
    }
}

/// A volume that this node was told about.
struct Known {
    mailbox: Arc<Mailbox>,
    live: Option<Live>,
    /// Why its backing could not be opened.
    trouble: Option<String>,
    /// An operator detached it.
    down: bool,
    /// Its `resync-after`.
    after: Option<VolumeId>,
}

/// A replica of this node for `status`.
pub(crate) struct Local {
    pub(crate) volume: VolumeId,
    pub(crate) live: Option<Live>,
    /// Why its backing could not be opened.
    pub(crate) trouble: Option<String>,
    /// An operator detached it.
    pub(crate) down: bool,
}

/// A replica whose data thread runs.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) backing: PathBuf,
    pub(crate) handle: VolumeHandle,
    pub(crate) nbd: PathBuf,
    /// What is worth knowing of the last attachment.
    pub(crate) remark: Option<String>,
    /// Since when its requests wait for more than the disk.
    pub(crate) waiting_since_unix_ms: Option<u64>,
    /// For each peer that is being resynced, the most blocks that it lacked.
    pub(crate) progress: BTreeMap<NodeId, u64>,
}

impl Volumes {
    pub(crate) fn new(context: VolumesContext) -> Self {
        let shared = Shared {
            cluster: context.cluster,
            me: context.me,
            instance: context.instance,
            timing: context.timing,
            pool_dir: context.pool_dir,
            exports: Exports::new(context.device_dir),
            nbd_dir: context.nbd_dir,
            saved_dir: context.saved_dir,
            nbd_listen: context.nbd_listen,
            max_resyncs: context.max_resyncs,
            driver: relevo_disk::probe(),
            store: context.store,
            replicas: Mutex::new(context.replicas),
            control: context.control,
            inbox: context.inbox,
            events: context.events,
            runtime: context.runtime,
            dialer: Mutex::new(None),
            volumes: Mutex::default(),
            lease: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Takes an order of the node manager. Does not wait.
    pub(crate) fn order(&self, volume: VolumeId, order: VolumeOrder) {
        while let Some(mailbox) = self.mailbox(volume) {
            if mailbox.order(order.clone()) {
                return;
            }
            // The worker of a replica that was removed; a new one starts for the next.
            self.shared.forget(volume, &mailbox);
        }
    }

    /// Until when reads may be served. Does not wait.
    pub(crate) fn lease_until(&self, until: Time) {
        let step = self.shared.timing.suspect;
        if !lock(&self.shared.lease).renew(until, relevo_host::clock::now(), step) {
            return;
        }
        for known in lock(&self.shared.volumes).values() {
            known.mailbox.lease(until);
        }
    }

    /// A link that was established. Does not wait.
    pub(crate) fn link(&self, link: EstablishedLink) {
        let mailbox = lock(&self.shared.volumes)
            .get(&link.volume)
            .map(|known| Arc::clone(&known.mailbox));
        if let Some(mailbox) = mailbox {
            mailbox.link(link);
        }
    }

    pub(crate) fn set_dialer(&self, dialer: Dialer) {
        *lock(&self.shared.dialer) = Some(dialer);
    }

    /// Ends every replica in order, so that the next start finds clean metadata.
    pub(crate) async fn close(&self) {
        let mailboxes: Vec<Arc<Mailbox>> = lock(&self.shared.volumes)
            .values()
            .map(|known| Arc::clone(&known.mailbox))
            .collect();
        let closed = tokio::task::spawn_blocking(move || {
            for mailbox in &mailboxes {
                mailbox.close();
            }
            // All of them are asked, also when one hangs.
            mailboxes
                .iter()
                .filter(|mailbox| !mailbox.wait_closed())
                .count()
        });
        match closed.await {
            Ok(0) => {}
            Ok(open) => tracing::error!(open, "some volumes were not closed in time"),
            Err(error) => tracing::error!(%error, "closing the volumes failed"),
        }
    }

    /// Waits until this node's replica is open as primary.
    pub(crate) async fn await_open(&self, volume: VolumeId) -> Result<(), String> {
        let open = |status: &VolumeStatus| status.engine.open;
        if self.look_until(volume, OPEN_WAIT, open).await {
            return Ok(());
        }
        let waiting = self
            .shared
            .live(volume)
            .and_then(|live| live.handle.status().engine.waiting);
        Err(format!(
            "the volume did not open within {} s{}",
            OPEN_WAIT.as_secs(),
            waiting.map_or_else(String::new, |why| format!(": {why}"))
        ))
    }

    /// Waits a moment until this node's replica is attached, if it has one.
    pub(crate) async fn await_attached(&self, volume: VolumeId) {
        let has_one = lock(&self.shared.replicas).contains_key(&volume);
        if has_one {
            let attached = |status: &VolumeStatus| status.engine.disk != DiskState::Attaching;
            self.look_until(volume, ATTACH_WAIT, attached).await;
        }
    }

    async fn look_until(
        &self,
        volume: VolumeId,
        bound: Duration,
        so: impl Fn(&VolumeStatus) -> bool,
    ) -> bool {
        let look = async {
            while !self
                .shared
                .live(volume)
                .is_some_and(|live| so(&live.handle.status()))
            {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        tokio::time::timeout(bound, look).await.is_ok()
    }

    /// Tells the engine to step down.
    pub(crate) fn demote(&self, volume: VolumeId) -> Result<(), String> {
        if self.shared.live(volume).is_none() {
            return Err("its replica is not attached here".to_owned());
        }
        self.order(volume, VolumeOrder::Demote);
        Ok(())
    }

    /// Opens a replica that was detached, or whose disk failed; waits until it is attached.
    pub(crate) async fn attach(&self, volume: VolumeId) -> Result<(), String> {
        let mailbox = self.mailbox_of(volume)?;
        self.shared.set_attaching(volume);
        mailbox.attach(true);
        let over = || {
            let (live, trouble) = self.shared.known(volume)?;
            if let Some(trouble) = trouble {
                return Some(Err(trouble));
            }
            let status = live?.handle.status().engine;
            match status.disk {
                DiskState::Attaching | DiskState::Diskless => None,
                DiskState::Failed => Some(Err(status.waiting.unwrap_or_default())),
                _ => Some(Ok(())),
            }
        };
        let looked = async {
            loop {
                tokio::time::sleep(LOOK_AGAIN).await;
                if let Some(result) = over() {
                    return result;
                }
            }
        };
        let late = |_| {
            Err(format!(
                "it was not attached within {} s",
                ORDER_WAIT.as_secs()
            ))
        };
        tokio::time::timeout(ORDER_WAIT, looked)
            .await
            .unwrap_or_else(late)
    }

    /// Closes a replica that is not primary; waits until its disk is free.
    pub(crate) async fn detach(&self, volume: VolumeId) -> Result<(), String> {
        let mailbox = self.mailbox_of(volume)?;
        if self
            .shared
            .live(volume)
            .is_some_and(|live| live.handle.status().engine.open)
        {
            return Err("this node is primary of the volume".to_owned());
        }
        mailbox.attach(false);
        let free = async {
            while self.shared.live(volume).is_some() {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        tokio::time::timeout(ORDER_WAIT, free)
            .await
            .map_err(|_| format!("its disk was not free within {} s", ORDER_WAIT.as_secs()))
    }

    /// The replicas that were made on this node.
    pub(crate) fn replicas(&self) -> LocalReplicas {
        lock(&self.shared.replicas).clone()
    }

    /// Whether a replica has a link to a peer's.
    pub(crate) fn is_connected(&self, volume: VolumeId, peer: NodeId) -> bool {
        self.shared.live(volume).is_some_and(|live| {
            let status = live.handle.status().engine;
            status.peers.get(&peer).is_some_and(|state| {
                !matches!(state, PeerState::Connecting | PeerState::StandAlone)
            })
        })
    }

    /// The mailbox of a volume that has a replica here.
    fn mailbox_of(&self, volume: VolumeId) -> Result<Arc<Mailbox>, String> {
        let volumes = lock(&self.shared.volumes);
        let known = volumes.get(&volume);
        known
            .map(|known| Arc::clone(&known.mailbox))
            .ok_or_else(|| "it has no replica on this node".to_owned())
    }

    /// Gives an order to the engine of a replica, and waits until it obeyed.
    pub(crate) async fn order_replica(&self, volume: VolumeId, order: Order) -> Result<(), String> {
        let Some(live) = self.shared.live(volume) else {
            return Err("its replica is not attached here".to_owned());
        };
        let (done, answer) = tokio::sync::oneshot::channel();
        let done = Box::new(move |result| {
            // Whoever asked may have hung up.
            drop(done.send(result));
        });
        let gone = "the volume's thread has ended";
        live.handle.order(order, done).map_err(|_| gone)?;
        match tokio::time::timeout(ORDER_WAIT, answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(gone.to_owned())),
            Err(_) => Err(format!(
                "it did not answer within {} s",
                ORDER_WAIT.as_secs()
            )),
        }
    }

    /// This node's replicas for `status`.
    pub(crate) fn local(&self) -> Vec<Local> {
        let local = |(volume, known): (&VolumeId, &Known)| Local {
            volume: *volume,
            live: known.live.clone(),
            trouble: known.trouble.clone(),
            down: known.down,
        };
        lock(&self.shared.volumes).iter().map(local).collect()
    }

    fn mailbox(&self, volume: VolumeId) -> Option<Arc<Mailbox>> {
        let mut volumes = lock(&self.shared.volumes);
        if let Some(known) = volumes.get(&volume) {
            return Some(Arc::clone(&known.mailbox));
        }
        match volume_worker::start(volume, Arc::clone(&self.shared)) {
            Ok(mailbox) => {
                mailbox.lease(self.shared.lease());
                let known = Known {
                    mailbox: Arc::clone(&mailbox),
                    live: None,
                    trouble: None,
                    down: false,
                    after: None,
                };
                volumes.insert(volume, known);
                Some(mailbox)
            }
            Err(error) => {
                tracing::error!(%error, %volume, "no thread for a volume; raise the limit of processes");
                None
            }
        }
    }
}

impl std::fmt::Debug for Volumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Volumes").finish_non_exhaustive()
    }
}

impl Shared {
    /// The replica whose data thread runs, if it does.
    pub(crate) fn live(&self, volume: VolumeId) -> Option<Live> {
        lock(&self.volumes).get(&volume)?.live.clone()
    }

    pub(crate) fn set_live(&self, volume: VolumeId, live: Option<Live>) {
        if let Some(known) = lock(&self.volumes).get_mut(&volume) {
            known.live = live;
            known.trouble = None;
        }
    }

    /// What is known of a volume's replica: its data thread, and why it could not be opened.
    pub(crate) fn known(&self, volume: VolumeId) -> Option<(Option<Live>, Option<String>)> {
        let volumes = lock(&self.volumes);
        let known = volumes.get(&volume)?;
        Some((known.live.clone(), known.trouble.clone()))
    }

    /// An operator detached a replica, or took it back.
    pub(crate) fn set_down(&self, volume: VolumeId, down: bool) {
        if let Some(known) = lock(&self.volumes).get_mut(&volume) {
            known.down = down;
        }
    }

    /// What was known of a replica is over: it is to be opened anew.
    pub(crate) fn set_attaching(&self, volume: VolumeId) {
        if let Some(known) = lock(&self.volumes).get_mut(&volume) {
            known.trouble = None;
            let failed = known.live.as_ref().is_some_and(|live| {
                let status = live.handle.status();
                !status.alive || status.engine.disk == DiskState::Failed
            });
            if failed {
                known.live = None;
            }
        }
    }

    /// Notes why a replica is not open; tells whether that is news.
    pub(crate) fn set_trouble(&self, volume: VolumeId, why: &str) -> bool {
        let mut volumes = lock(&self.volumes);
        let Some(known) = volumes.get_mut(&volume) else {
            return false;
        };
        known.live = None;
        let before = known.trouble.replace(why.to_owned());
        before.as_deref() != Some(why)
    }

    pub(crate) fn set_remark(&self, volume: VolumeId, remark: Option<String>) {
        if let Some(live) = lock(&self.volumes)
            .get_mut(&volume)
            .and_then(|known| known.live.as_mut())
        {
            live.remark = remark;
        }
    }

    /// Follows the engine for what a single look can't tell: how long, and how much of it.
    pub(crate) fn observe(&self, volume: VolumeId, status: &EngineStatus) {
        let mut volumes = lock(&self.volumes);
        let Some(live) = volumes
            .get_mut(&volume)
            .and_then(|known| known.live.as_mut())
        else {
            return;
        };
        if status.waiting.is_none() {
            live.waiting_since_unix_ms = None;
        } else if live.waiting_since_unix_ms.is_none() {
            live.waiting_since_unix_ms = Some(unix_ms());
        }
        live.progress.retain(|node, _| {
            status
                .peers
                .get(node)
                .copied()
                .and_then(dirty_blocks)
                .is_some()
        });
        for (node, state) in &status.peers {
            if let Some(dirty) = dirty_blocks(*state) {
                let most = live.progress.entry(*node).or_default();
                *most = dirty.max(*most);
            }
        }
    }

    /// The volume whose resyncs on this node come before those of this one: the one that was chosen
    /// (`resync-after`), or the last of as many as may be resynced at a time.
    pub(crate) fn resync_after(
        &self,
        volume: VolumeId,
        chosen: Option<VolumeId>,
    ) -> Option<VolumeId> {
        if let Some(known) = lock(&self.volumes).get_mut(&volume) {
            known.after = chosen;
        }
        if chosen.is_none() && self.max_resyncs.is_none() {
            return None;
        }
        let resyncs: Vec<Resync> = lock(&self.volumes)
            .iter()
            .filter_map(|(volume, known)| {
                let status = known.live.as_ref()?.handle.status();
                Resync::of(*volume, known.after, &status.engine)
            })
            .collect();
        first_of(&resyncs, volume, chosen, self.max_resyncs)
    }

    /// Forgets a volume whose worker ended.
    pub(crate) fn forget(&self, volume: VolumeId, mailbox: &Arc<Mailbox>) {
        let mut volumes = lock(&self.volumes);
        if volumes
            .get(&volume)
            .is_some_and(|known| Arc::ptr_eq(&known.mailbox, mailbox))
        {
            volumes.remove(&volume);
        }
    }

    pub(crate) fn dialer(&self) -> Option<Dialer> {
        lock(&self.dialer).clone()
    }

    pub(crate) fn lease(&self) -> Time {
        lock(&self.lease).until
    }

    pub(crate) fn replica(&self, volume: VolumeId) -> Option<LocalReplica> {
        lock(&self.replicas).get(&volume).cloned()
    }

    /// The name of a volume with a replica here, for messages; its id when there is none.
    pub(crate) fn name_of(&self, volume: VolumeId) -> String {
        self.replica(volume)
            .map_or_else(|| volume.to_string(), |replica| replica.name)
    }

    /// Remembers a replica durably, or forgets it.
    pub(crate) fn remember(
        &self,
        volume: VolumeId,
        replica: Option<LocalReplica>,
    ) -> Result<(), String> {
        let mut replicas = lock(&self.replicas);
        let mut changed = replicas.clone();
        match replica {
            Some(replica) => changed.insert(volume, replica),
            None => changed.remove(&volume),
        };
        self.store.save(&changed).map_err(|e| e.to_string())?;
        *replicas = changed;
        Ok(())
    }

    /// Where a replica without a backing of its own is kept.
    pub(crate) fn pool_file(&self, volume: VolumeId, name: &str) -> PathBuf {
        // With the id: a new volume may have the name of one whose file could not be removed.
        self.pool_dir.join(format!("{name}-{volume}"))
    }

    pub(crate) fn pool_dir(&self) -> &Path {
        &self.pool_dir
    }

    pub(crate) fn nbd_socket(&self, name: &str) -> PathBuf {
        self.nbd_dir.join(format!("{name}.sock"))
    }

    /// Volume number n is served at the n-th port from the one that was given.
    pub(crate) fn nbd_tcp(&self, volume: VolumeId) -> Option<std::io::Result<NbdAddress>> {
        let mut address = self.nbd_listen?;
        let offset = u16::try_from(volume.0.saturating_sub(1)).ok();
        let port = offset.and_then(|offset| address.port().checked_add(offset));
        Some(match port {
            Some(port) => {
                address.set_port(port);
                TcpListener::bind(address).map(NbdAddress::Tcp)
            }
            None => Err(std::io::Error::other("there is no such port")),
        })
    }

    /// What the engine of a volume is told. A link that owes an answer is given up after the dead
    /// time; a quiet one owes nothing but pings, and nobody waits for it.
    pub(crate) fn engine_config(&self, volume: VolumeId) -> EngineConfig {
        EngineConfig {
            cluster: self.cluster,
            volume,
            node: self.me,
            instance: self.instance,
            backing_size: 0,
            link_timeout: self.timing.dead,
            ping_interval: self.timing.suspect,
            reconcile_grace: self.timing.suspect,
            resync_window: RESYNC_WINDOW,
        }
    }
}

/// A resync of a volume on this node, under way or not.
#[derive(Clone, Copy, Debug)]
struct Resync {
    volume: VolumeId,
    /// It copies, or would if it had not to wait for its turn: it takes one of the places there are.
    wants_turn: bool,
}

impl Resync {
    fn of(volume: VolumeId, chosen: Option<VolumeId>, status: &EngineStatus) -> Option<Self> {
        let mut states = status.peers.values();
        let copies = states
            .clone()
            .any(|state| matches!(state, PeerState::SyncSource { .. } | PeerState::SyncTarget));
        let waits = states.any(|state| {
            matches!(
                state,
                PeerState::PausedSyncS { .. } | PeerState::PausedSyncT
            )
        });
        // Who is paused by an operator, the other side or a choice takes no place: it may be for long.
        let for_turn = status.sync_after.is_some() && status.sync_after != chosen;
        (copies || waits).then_some(Self {
            volume,
            wants_turn: copies || for_turn,
        })
    }
}

/// What a volume's resyncs wait for. By turns the order is that of the ids, on every node the same: so the
/// lowest one waits nowhere, and the others come after it.
fn first_of(
    resyncs: &[Resync],
    volume: VolumeId,
    chosen: Option<VolumeId>,
    most: Option<NonZeroU32>,
) -> Option<VolumeId> {
    if let Some(first) = chosen.filter(|first| resyncs.iter().any(|it| it.volume == *first)) {
        return Some(first);
    }
    let places = usize::try_from(most?.get()).unwrap_or(usize::MAX);
    let wants = |it: &&Resync| it.wants_turn;
    resyncs
        .iter()
        .filter(wants)
        .find(|it| it.volume == volume)?;
    let earlier = resyncs.iter().filter(wants).filter(|it| it.volume < volume);
    earlier.map(|it| it.volume).nth(places - 1)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves the value whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resyncs_have_an_order() {
        let id = VolumeId;
        let resync = |number, wants_turn| Resync {
            volume: id(number),
            wants_turn,
        };
        let all = [
            resync(1, true),
            resync(2, false),
            resync(3, true),
            resync(4, true),
        ];
        let waits = |of, chosen, most| first_of(&all, id(of), chosen, NonZeroU32::new(most));
        assert_eq!(waits(4, None, 0), None, "any number");
        // A choice counts also where that one stands still.
        assert_eq!(waits(4, Some(id(2)), 0), Some(id(2)));
        assert_eq!(waits(4, Some(id(9)), 0), None);
        let one = [1, 2, 3, 4].map(|of| waits(of, None, 1));
        assert_eq!(one, [None, None, Some(id(1)), Some(id(1))]);
        let two = [1, 3, 4].map(|of| waits(of, None, 2));
        assert_eq!(two, [None, None, Some(id(3))]);
        assert_eq!(waits(4, None, 3), None);
    }

    /// Two volumes of which one waits for the other by choice and comes first by its number.
    #[test]
    fn a_turn_and_a_choice_don_t_wait_for_each_other() {
        let paused = |sync_after| EngineStatus {
            peers: BTreeMap::from([(NodeId(2), PeerState::PausedSyncT)]),
            sync_after,
            ..volume_worker::no_status()
        };
        let (first, second) = (VolumeId(1), VolumeId(2));
        let chosen = Some(second);
        let waits = Resync::of(first, chosen, &paused(chosen)).unwrap();
        assert!(!waits.wants_turn);
        let turn = Resync::of(second, None, &paused(Some(first))).unwrap();
        assert!(turn.wants_turn);
        let most = NonZeroU32::new(1);
        assert_eq!(first_of(&[waits, turn], second, None, most), None);
        assert_eq!(first_of(&[waits, turn], first, chosen, most), chosen);
        assert!(!Resync::of(first, None, &paused(None)).unwrap().wants_turn);
    }

    #[test]
    fn volumes_are_told_of_a_lease_when_it_matters() {
        let at = |ms: u64| Time::ZERO + Duration::from_millis(ms);
        let step = Duration::from_millis(300);
        let mut lease = Lease::default();
        assert!(lease.renew(at(1900), at(1000), step), "the first one");
        assert!(!lease.renew(at(2000), at(1100), step), "a mere renewal");
        assert!(!lease.renew(at(2100), at(1200), step));
        assert!(lease.renew(at(2200), at(1300), step), "a step further");
        assert!(lease.renew(at(2100), at(1300), step), "a shorter one");
        assert!(
            lease.renew(at(2200), at(2150), step),
            "what they know is over"
        );
        assert_eq!(lease.until, at(2200));
    }
}
