//! The thread that works for one volume: it makes, opens, closes and removes the replica, and
//! carries messages between the data thread and the node manager.
//!
//! What it does may wait for a disk, so every volume has its own. The others leave their wishes
//! in a mailbox that holds the newest of each kind: it is bounded without ever being full.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel},
    },
    thread,
    time::Duration,
};

use relevo_control::ControlLog as _;
use relevo_datapath::{
    DatapathEvent, NbdAddress, SpawnError, VolumeHandle, VolumeThread, VolumeThreadConfig,
};
use relevo_disk::{NewReplica, OpenError, create_replica, remove_replica};
use relevo_format::Start;
use relevo_node::Input;
use relevo_replication::{DiskState, EngineStatus, Order, VolumeEvent};
use relevo_transport::EstablishedLink;
use relevo_types::{
    NodeId, Time, VolumeId,
    cluster::{Command, ReplicaSpec, Volume},
};
use tokio::sync::Semaphore;

use super::{
    changes::Told,
    mailbox::Mailbox,
    volumes::{Live, Shared},
    words,
};
use crate::{
    api::{EventKind, EventLevel},
    local_store::LocalReplica,
    state_dir::private_dir,
};

/// How often the engine's status is looked at when nothing happens.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// How often right after something happened, when more is likely to follow.
const LOOK_SOON: Duration = Duration::from_millis(10);

/// How many of these short looks follow an event.
const SOON_LOOKS: u32 = 20;

/// Proposals of one engine under way. It proposes again while it needs it, so more are dropped.
const PROPOSALS_MAX: usize = 4;

/// How long a status may lag behind an event; a turn of the data thread takes microseconds.
const STATUS_WAIT: Duration = Duration::from_millis(200);

/// How often it is looked at meanwhile.
const STATUS_STEP: Duration = Duration::from_micros(100);

/// How long a killed predecessor may hold the backing: until its disk answered what was under
/// way.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(3);

/// How often it is tried meanwhile.
const PREDECESSOR_STEP: Duration = Duration::from_millis(10);

/// How long a disk may take to be opened before people hear of it: a killed predecessor may hold it for a
/// part of that.
const OPEN_PATIENCE: Duration = Duration::from_secs(4);

/// How long a detach may take: the flush of a slow disk.
const DETACH_WAIT: Duration = Duration::from_secs(10);

/// Starts the worker of a volume.
pub(crate) fn start(volume: VolumeId, shared: Arc<Shared>) -> std::io::Result<Arc<Mailbox>> {
    let mailbox = Arc::new(Mailbox::default());
    let worker = Worker {
        volume,
        shared,
        mailbox: Arc::clone(&mailbox),
        handle: None,
        opening: None,
        volume_now: None,
        down: false,
        links: BTreeMap::new(),
        told: None,
        shown: Told::default(),
        soon: 0,
        proposals: Arc::new(Semaphore::new(PROPOSALS_MAX)),
    };
    thread::Builder::new()
        .name(format!("relevo-{volume}w"))
        .spawn(move || worker.run())?;
    Ok(mailbox)
}

/// Where the replica comes from that is being opened.
type Opening = Receiver<Result<VolumeHandle, String>>;

struct Worker {
    volume: VolumeId,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    handle: Option<VolumeHandle>,
    /// The replica is being opened, and the disk takes its time.
    opening: Option<Opening>,
    /// The newest configuration.
    volume_now: Option<Arc<Volume>>,
    /// An operator detached the replica.
    down: bool,
    /// Links that came before the replica was open.
    links: BTreeMap<NodeId, EstablishedLink>,
    /// What the node manager was told last.
    told: Option<EngineStatus>,
    /// What people were told last.
    shown: Told,
    /// Short looks that are left.
    soon: u32,
    proposals: Arc<Semaphore>,
}

impl Worker {
    fn run(mut self) {
        loop {
            let patience = if self.soon > 0 {
                LOOK_SOON
            } else {
                LOOK_INTERVAL
            };
            let wishes = self.mailbox.take(patience);
            self.look_at_opening();
            self.soon = if wishes.calls_for_attention() {
                SOON_LOOKS
            } else {
                self.soon.saturating_sub(1)
            };
            // First: it is about the replica there was, what else is wished about the next one.
            let gone = wishes.remove && wishes.create.is_none();
            if wishes.remove {
                self.remove();
            }
            if let Some((spec, volume)) = wishes.create {
                self.create(&spec, &volume);
            }
            if wishes.detach {
                self.detach();
            }
            if wishes.attach {
                self.attach();
            }
            if let Some(volume) = wishes.config {
                self.configure(volume);
            }
            // A peer may be quicker to open its replica than we are.
            self.links.extend(wishes.links);
            if let Some(handle) = &self.handle {
                // A thread that has ended said so by an event.
                if let Some(until) = wishes.lease {
                    let _gone = handle.lease_until(until);
                }
                while let Some((_, link)) = self.links.pop_first() {
                    let _gone = handle.link(link);
                }
                if wishes.demote {
                    let _gone = handle.demote();
                }
            }
            for (peer, reason) in wishes.lost {
                self.shown.link_lost(peer, reason);
            }
            for (at, event) in wishes.events {
                self.wait_for_status_of(at);
                self.pass_on(Some(event));
            }
            if let Some(reason) = wishes.died {
                self.thread_died(&reason);
            }
            self.pass_on(None);
            if wishes.close {
                self.close();
            }
            if (gone || wishes.close) && self.mailbox.set_closed() {
                self.shared.forget(self.volume, &self.mailbox);
                return;
            }
        }
    }

    fn create(&mut self, spec: &ReplicaSpec, volume: &Volume) {
        let result = self.try_create(spec, volume);
        if let Err(why) = &result {
            self.event(
                EventLevel::Warning,
                &volume.name,
                &format!("its replica was not created here: {why}"),
            );
        }
        self.shared.inbox.tell(Input::ReplicaCreated {
            volume: self.volume,
            result,
        });
    }

    fn try_create(&mut self, spec: &ReplicaSpec, volume: &Volume) -> Result<(), String> {
        // It was removed and is added again before this node heard of it.
        if self.shared.replica(self.volume).is_some() && volume.is_created() {
            self.remove();
        }
        let ours = spec.backing.is_none();
        let backing = match &spec.backing {
            Some(path) => path.clone(),
            None => {
                let pool = self.shared.pool_dir();
                private_dir(pool).map_err(|e| {
                    format!(
                        "the pool directory {} can't be made: {e}; make it, or name another with --pool-dir",
                        pool.display()
                    )
                })?;
                self.shared.pool_file(self.volume, &volume.name)
            }
        };
        let slot = volume
            .slot(self.shared.me)
            .ok_or("the volume has no replica on this node")?;
        // Remembered first: a crash in between leaves a note without a file, which is harmless,
        // and never a file that nobody knows.
        let replica = LocalReplica {
            name: volume.name.clone(),
            backing: backing.clone(),
            ours,
        };
        self.shared.remember(self.volume, Some(replica))?;
        let created = create_replica(&NewReplica {
            path: &backing,
            replica: relevo_format::Replica {
                identity: self.identity(),
                slot,
                lineage: volume.lineage,
            },
            start: if volume.is_created() {
                Start::Blank
            } else {
                Start::Zeroes
            },
            data_size: volume.size,
            force: spec.force,
        });
        created.map_err(|error| {
            if let Err(why) = self.shared.remember(self.volume, None) {
                tracing::warn!(why, "a replica that was not made is still noted");
            }
            error.to_string()
        })
    }

    /// Opens the replica at the first configuration, and hands every one to the engine.
    fn configure(&mut self, volume: Arc<Volume>) {
        self.volume_now = Some(Arc::clone(&volume));
        if self.down {
            return;
        }
        if self.handle.is_none() {
            self.open(&volume);
        }
        if let Some(handle) = &self.handle {
            let _gone = handle.config(volume);
        }
    }

    /// An operator closes the replica: its disk is free until it is attached again.
    fn detach(&mut self) {
        self.down = true;
        self.shared.set_down(self.volume, true);
        if self.handle.is_some() {
            self.close();
            let name = self.name();
            self.event(EventLevel::Info, &name, "detached here by an operator");
        }
        self.told = None;
        self.shared.inbox.tell(Input::Volume {
            volume: self.volume,
            event: Some(VolumeEvent::Detached),
            status: EngineStatus {
                disk: DiskState::Diskless,
                ..no_status()
            },
        });
    }

    /// An operator opens the replica again: it was detached, or its disk repaired.
    fn attach(&mut self) {
        self.down = false;
        self.shared.set_down(self.volume, false);
        let usable = self.handle.as_ref().is_some_and(|handle| {
            let status = handle.status();
            status.alive && status.engine.disk != DiskState::Failed
        });
        if usable {
            return;
        }
        self.close();
        self.told = None;
        if let Some(volume) = self.volume_now.clone() {
            self.configure(volume);
        }
    }

    /// Opens the replica, or begins to: a disk that hangs is not waited for, only heard when it answers.
    fn open(&mut self, volume: &Volume) {
        let (opening, patience) = match self.opening.take() {
            Some(opening) => (Ok(opening), Duration::ZERO),
            None => (self.begin_opening(volume), OPEN_PATIENCE),
        };
        let opened = match opening {
            Ok(opening) => match opening.recv_timeout(patience) {
                Ok(opened) => opened,
                Err(RecvTimeoutError::Disconnected) => {
                    Err("the thread that opened it ended".to_owned())
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.opening = Some(opening);
                    if patience.is_zero() {
                        return;
                    }
                    Err("its disk does not answer; it is opened as soon as it does".to_owned())
                }
            },
            Err(why) => Err(why),
        };
        match opened {
            Ok(handle) => {
                let live = self.live(volume, &handle);
                self.shared.set_live(self.volume, Some(live));
                let _gone = handle.lease_until(self.shared.lease());
                self.handle = Some(handle);
            }
            Err(why) => {
                let text = format!("its replica here can't be opened: {why}");
                // Tried again with every configuration, told once.
                if self.shared.set_trouble(self.volume, &why) {
                    self.event(EventLevel::Alarm, &volume.name, &text);
                }
                self.disk_failed(why);
            }
        }
    }

    fn begin_opening(&self, volume: &Volume) -> Result<Opening, String> {
        let config = VolumeThreadConfig {
            engine: self.shared.engine_config(self.volume),
            name: volume.name.clone(),
            backing: self.backing(volume),
            driver: self.shared.driver.clone(),
            saved_dir: self.shared.saved_dir.clone(),
        };
        let events = Arc::new(DataEvents {
            volume: self.volume,
            shared: Arc::clone(&self.shared),
            mailbox: Arc::clone(&self.mailbox),
            proposals: Arc::clone(&self.proposals),
        });
        let (opened, opening) = sync_channel(1);
        thread::Builder::new()
            .name(format!("relevo-{}o", self.volume))
            .spawn(move || {
                // If nobody waits for it any more the replica is closed again with its handle.
                drop(opened.send(spawn_patiently(&config, &events)));
            })
            .map_err(|error| format!("no thread to open it: {error}"))?;
        Ok(opening)
    }

    /// What an opening that took too long came to.
    fn look_at_opening(&mut self) {
        if self.down {
            // Its disk shall be free.
            let waits = |opening: &Opening| {
                opening
                    .try_recv()
                    .is_err_and(|it| it == TryRecvError::Empty)
            };
            self.opening = self.opening.take().filter(waits);
        } else if self.opening.is_some()
            && let Some(volume) = self.volume_now.clone()
        {
            self.configure(volume);
        }
    }

    fn backing(&self, volume: &Volume) -> PathBuf {
        self.shared.replica(self.volume).map_or_else(
            || self.shared.pool_file(self.volume, &volume.name),
            |replica| replica.backing,
        )
    }

    /// A replica that was opened, with what clients reach it by.
    fn live(&self, volume: &Volume, handle: &VolumeHandle) -> Live {
        let nbd = self.shared.nbd_socket(&volume.name);
        if let Err(error) = handle.listen_nbd(NbdAddress::Unix(nbd.clone())) {
            let text = format!("NBD clients can't reach it at {}: {error}", nbd.display());
            self.event(EventLevel::Warning, &volume.name, &text);
        }
        match self.shared.nbd_tcp(self.volume) {
            None => {}
            Some(address) => {
                if let Err(error) = address.and_then(|address| handle.listen_nbd(address)) {
                    let text = format!("NBD clients can't reach it over TCP: {error}");
                    self.event(EventLevel::Warning, &volume.name, &text);
                }
            }
        }
        Live {
            name: volume.name.clone(),
            size: volume.size,
            backing: self.backing(volume),
            handle: handle.clone(),
            nbd,
            remark: None,
            waiting_since_unix_ms: None,
            progress: BTreeMap::new(),
        }
    }

    /// Tells the node manager of an event, or of a status that differs from what it knows.
    fn pass_on(&mut self, event: Option<VolumeEvent>) {
        let Some(handle) = &self.handle else {
            return;
        };
        let status = handle.status().engine;
        self.shared.observe(self.volume, &status);
        self.keep_resync_order(&status);
        match &event {
            Some(VolumeEvent::DiskFailed { reason }) => {
                self.shared.set_remark(self.volume, Some(reason.clone()));
            }
            Some(VolumeEvent::Attached { remark, .. }) => {
                self.shared.set_remark(self.volume, remark.clone());
            }
            Some(
                VolumeEvent::Opened { .. }
                | VolumeEvent::Tends { .. }
                | VolumeEvent::Closed { .. }
                | VolumeEvent::Detached
                | VolumeEvent::Verified { .. }
                | VolumeEvent::Healed { .. }
                | VolumeEvent::Unreadable { .. }
                | VolumeEvent::SplitBrain { .. }
                | VolumeEvent::GaveWay { .. }
                | VolumeEvent::Peer { .. },
            ) => {}
            None if self
                .told
                .as_ref()
                .is_some_and(|told| same_to_a_person(told, &status)) =>
            {
                return;
            }
            None => {}
        }
        if let Some(event) = &event {
            self.tell_people(event);
        }
        self.tell_changes(event.as_ref(), &status);
        self.told = Some(status.clone());
        self.shared.inbox.tell(Input::Volume {
            volume: self.volume,
            event,
            status,
        });
    }

    /// Lets the resyncs of this volume wait for those that come first. What is true now decides, so a new
    /// engine or a lost order changes nothing for longer than a look.
    fn keep_resync_order(&self, status: &EngineStatus) {
        let (Some(handle), Some(volume)) = (&self.handle, &self.volume_now) else {
            return;
        };
        let chosen = volume.options.resync_after;
        let after = self.shared.resync_after(self.volume, chosen);
        let ready = !matches!(
            status.disk,
            DiskState::Attaching | DiskState::Failed | DiskState::Diskless
        );
        if ready && after != status.sync_after {
            let nobody = Box::new(|_| {});
            let _gone = handle.order(Order::HoldSync { after }, nobody);
        }
    }

    /// Waits until the status is newer than an event: the data thread tells of an event in the
    /// middle of a turn and publishes its status at the end. An older status with the event would
    /// contradict it.
    fn wait_for_status_of(&self, event_at: Time) {
        let Some(handle) = &self.handle else {
            return;
        };
        let deadline = event_at + STATUS_WAIT;
        loop {
            let status = handle.status();
            let now = relevo_host::clock::now();
            if status.as_of >= event_at || !status.alive || now >= deadline {
                return;
            }
            thread::sleep(STATUS_STEP);
        }
    }

    fn tell_people(&self, event: &VolumeEvent) {
        let state = self.shared.control.state();
        let node = |id| state.borrow().node_name(id);
        let Some((level, text)) = words::of_event(event, &self.name(), node) else {
            return;
        };
        let name = self.name();
        self.event(level, &name, &text);
    }

    fn tell_changes(&mut self, event: Option<&VolumeEvent>, status: &EngineStatus) {
        let state = self.shared.control.state();
        let changes = self
            .shown
            .changes(event, status, |node| state.borrow().node_name(node));
        for (level, change) in changes {
            self.shared.events.add_change(level, &self.name(), change);
        }
    }

    fn thread_died(&mut self, reason: &str) {
        let why = format!(
            "the volume's thread failed: {reason}; this is a defect of Relevo: report it, and restart the daemon to use this replica again"
        );
        let name = self.name();
        self.event(EventLevel::Alarm, &name, &why);
        self.handle = None;
        self.shared.set_trouble(self.volume, &why);
        self.disk_failed(why);
    }

    fn disk_failed(&mut self, reason: String) {
        let mut status = self.told.take().unwrap_or_else(no_status);
        status.open = false;
        status.disk = DiskState::Failed;
        self.shared.inbox.tell(Input::Volume {
            volume: self.volume,
            event: Some(VolumeEvent::DiskFailed { reason }),
            status,
        });
    }

    /// Detaches in order and ends the data thread.
    fn close(&mut self) {
        self.shared.exports.drop_by_force(self.volume);
        let Some(handle) = self.handle.take() else {
            return;
        };
        if handle.detach().is_ok() {
            self.wait_detached(&handle);
        }
        self.shared.set_live(self.volume, None);
        if !handle.stop() {
            tracing::error!(volume = %self.volume, "the volume's thread did not end");
        }
    }

    fn wait_detached(&self, handle: &VolumeHandle) {
        let deadline = relevo_host::clock::now() + DETACH_WAIT;
        loop {
            let status = handle.status();
            let over = !status.alive
                || matches!(status.engine.disk, DiskState::Diskless | DiskState::Failed);
            if over {
                return;
            }
            if relevo_host::clock::now() >= deadline {
                tracing::warn!(volume = %self.volume, "the volume did not detach in time");
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The volume is gone from the cluster: its replica here goes too.
    fn remove(&mut self) {
        let name = self.name();
        self.close();
        let Some(replica) = self.shared.replica(self.volume) else {
            return;
        };
        match remove_replica(&replica.backing, &self.identity()) {
            Ok(()) => self.event(
                EventLevel::Info,
                &name,
                &format!("its replica {} was removed", replica.backing.display()),
            ),
            Err(error) => self.event(
                EventLevel::Warning,
                &name,
                &format!("its replica was not removed: {error}"),
            ),
        }
        if let Err(why) = self.shared.remember(self.volume, None) {
            tracing::warn!(why, "a removed replica is still noted");
        }
    }

    fn identity(&self) -> relevo_format::Identity {
        relevo_format::Identity {
            cluster: self.shared.cluster,
            volume: self.volume,
            node: self.shared.me,
        }
    }

    fn name(&self) -> String {
        self.shared.name_of(self.volume)
    }

    fn event(&self, level: EventLevel, name: &str, text: &str) {
        self.shared.events.add(level, EventKind::Volume, name, text);
    }
}

/// Starts the data thread; waits for a predecessor to let go of the backing. This daemon has the
/// state directory to itself, but after a kill the kernel ends the I/O of the process that was
/// killed, and with it the lock, some milliseconds after the process itself.
fn spawn_patiently(
    config: &VolumeThreadConfig,
    events: &Arc<DataEvents>,
) -> Result<VolumeHandle, String> {
    let deadline = relevo_host::clock::now() + PREDECESSOR_WAIT;
    loop {
        let events = Arc::clone(events);
        match VolumeThread::spawn(config.clone(), move |event| events.take(event)) {
            Ok(handle) => return Ok(handle),
            Err(SpawnError::Backing(OpenError::InUse { .. }))
                if relevo_host::clock::now() < deadline =>
            {
                thread::sleep(PREDECESSOR_STEP);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// What the data thread tells. Called on that thread: nothing here waits.
struct DataEvents {
    volume: VolumeId,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    proposals: Arc<Semaphore>,
}

impl DataEvents {
    fn take(&self, event: DatapathEvent) {
        match event {
            DatapathEvent::Volume(event) => self.mailbox.event(event),
            DatapathEvent::Died { reason } => self.mailbox.died(reason),
            DatapathEvent::Propose { expect, change } => {
                let Ok(permit) = Arc::clone(&self.proposals).try_acquire_owned() else {
                    return;
                };
                let control = Arc::clone(&self.shared.control);
                let command = Command::Volume {
                    volume: self.volume,
                    expect,
                    change,
                };
                self.shared.runtime.spawn(async move {
                    // Whatever comes of it arrives as a configuration.
                    if let Err(error) = control.propose(command).await {
                        tracing::debug!(%error, "a proposal of an engine");
                    }
                    drop(permit);
                });
            }
            DatapathEvent::Saved { path } => {
                let name = self.shared.name_of(self.volume);
                let text = format!(
                    "what only this replica had is kept in {}; `relevo volume saved` reads it",
                    path.display()
                );
                self.shared
                    .events
                    .add(EventLevel::Warning, EventKind::Volume, &name, &text);
            }
            DatapathEvent::LinkLost { peer, reason } => {
                tracing::info!(volume = %self.volume, %peer, reason, "a data link ended");
                self.mailbox.link_lost(peer, reason);
                self.dial(peer);
            }
            DatapathEvent::WantLink { peer } => self.dial(peer),
        }
    }

    fn dial(&self, peer: NodeId) {
        if let Some(dialer) = self.shared.dialer() {
            dialer.want(self.volume, peer);
        }
    }
}

/// Whether a person or the planner would see a difference.
fn same_to_a_person(a: &EngineStatus, b: &EngineStatus) -> bool {
    a.open == b.open
        && a.held == b.held
        && a.disk == b.disk
        && a.certain == b.certain
        && a.epoch == b.epoch
        && a.waiting == b.waiting
}

pub(super) fn no_status() -> EngineStatus {
    EngineStatus {
        open: false,
        disk: DiskState::Attaching,
        epoch: relevo_types::Epoch(0),
        certain: false,
        in_flight: 0,
        held: false,
        waiting: None,
        peers: BTreeMap::new(),
        behind: BTreeMap::new(),
        sync_speeds: BTreeMap::new(),
        sync_same: BTreeMap::new(),
        sync_limit: None,
        sync_after: None,
        splits: BTreeMap::new(),
    }
}
