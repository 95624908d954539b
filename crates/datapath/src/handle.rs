//! The interface to a volume's thread. Everything here may be called from any thread.

use std::{
    any::Any,
    fmt, io,
    net::TcpListener,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use relevo_disk::{Backing, DriverChoice, IoMode, OpenError, OpenOptions};
use relevo_export::{BlockRequest, BlockTarget, Completion, Errno};
use relevo_replication::{EngineConfig, EngineStatus, Order, VolumeEvent};
use relevo_transport::EstablishedLink;
use relevo_types::{
    Epoch, NodeId, Time,
    cluster::{Volume, VolumeChange},
};
use rustix::event::{EventfdFlags, eventfd};

use crate::owner::Owner;

/// Commands waiting for the thread. It takes all of them each turn, so a full queue means that it
/// hangs or is flooded: then the caller waits. Above the requests a kernel block device has under way.
const COMMANDS_MAX: usize = 1024;

/// How long [`VolumeHandle::stop`] waits for the thread: longer than the disk driver gives a disk.
const STOP_WAIT: Duration = Duration::from_secs(15);

/// What a volume's thread is told at its start.
#[derive(Clone, Debug)]
pub struct VolumeThreadConfig {
    /// For the engine. `backing_size` is filled in from the backing.
    pub engine: EngineConfig,
    /// The volume's name, under which NBD clients find it.
    pub name: String,
    /// Its backing file or device.
    pub backing: PathBuf,
    /// The disk driver, from [`relevo_disk::probe`].
    pub driver: DriverChoice,
    /// Where what only this replica has is kept before it takes another history. Made when it is needed.
    pub saved_dir: PathBuf,
}

/// Starts volume threads.
#[derive(Debug)]
pub struct VolumeThread;

/// Why a volume's thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The backing can't be opened.
    #[error(transparent)]
    Backing(#[from] OpenError),
    /// The system gives no thread, descriptor or ring.
    #[error(
        "the volume's thread can't be set up: {0}; check the limits on processes, open files and locked memory"
    )]
    System(#[from] io::Error),
}

/// What a volume's thread tells the node. Called on the volume's thread: it must not block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DatapathEvent {
    /// The engine says.
    Volume(VolumeEvent),
    /// Propose this change to the control log; see [`relevo_replication::Effect::Propose`].
    Propose {
        /// The epoch that the proposal expects.
        expect: Epoch,
        /// The change.
        change: VolumeChange,
    },
    /// What only this replica had is in that file, on stable storage; now it is overwritten.
    Saved {
        /// The file.
        path: PathBuf,
    },
    /// A link ended.
    LinkLost {
        /// To whom.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// There is no link to a peer that has a replica: one of the two sides should establish one. Said
    /// again twice a second while it lasts.
    WantLink {
        /// The peer.
        peer: NodeId,
    },
    /// The thread ended by a defect of ours. The volume is failed on this node; its sessions are
    /// closed, the node lives.
    Died {
        /// The panic's message.
        reason: String,
    },
}

/// The volume's thread has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the volume's thread has ended")]
pub struct Gone;

/// Where NBD clients connect.
#[derive(Debug)]
pub enum NbdAddress {
    /// A socket file. A stale one is replaced; it is removed when the listener closes.
    Unix(PathBuf),
    /// A listener that is already bound.
    Tcp(TcpListener),
}

/// What a volume is doing, at most some 50 ms old.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// The engine's view.
    pub engine: EngineStatus,
    /// The disk driver and why.
    pub driver: DriverChoice,
    /// How I/O reaches the disk and, when buffered, why.
    pub io_mode: IoMode,
    /// NBD connections.
    pub nbd_sessions: usize,
    /// When this was taken.
    pub as_of: Time,
    /// The thread runs.
    pub alive: bool,
}

/// Wakes the thread that waits for this counter (`eventfd`).
pub(crate) fn ring(wake: &OwnedFd) {
    // Fails only when the counter is full, and then the thread is woken anyway.
    match rustix::io::write(wake, &1u64.to_ne_bytes()) {
        Ok(_) | Err(_) => {}
    }
}

/// Commands a volume's thread. Clones command the same one; it ends with [`Self::stop`], or when the
/// last handle is dropped.
#[derive(Clone)]
pub struct VolumeHandle {
    shared: Arc<Shared>,
    commands: SyncSender<Command>,
}

/// What the thread and its handles share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) status: Mutex<VolumeStatus>,
    pub(crate) wake: OwnedFd,
    ended: Condvar,
}

/// Called once with what came of an order: done, or why not. Dropped when the thread ends before.
pub type OrderDone = Box<dyn FnOnce(Result<(), String>) + Send>;

/// What handles tell the thread.
pub(crate) enum Command {
    Config(Arc<Volume>),
    LeaseUntil(Time),
    Link(Box<EstablishedLink>),
    Demote,
    Detach,
    Order(Order, OrderDone),
    Listen(Listener),
    CloseNbd,
    Request(BlockRequest, Completion),
    Stop,
    #[cfg(test)]
    Panic,
}

/// A bound, non-blocking listener.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl VolumeThread {
    /// Opens the backing and starts the volume's thread, which attaches at once. `events` is called
    /// on that thread and must not block.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub fn spawn(
        config: VolumeThreadConfig,
        events: impl Fn(DatapathEvent) + Send + 'static,
    ) -> Result<VolumeHandle, SpawnError> {
        let backing = Backing::open(&config.backing, &OpenOptions::default())?;
        let (commands, queue) = sync_channel(COMMANDS_MAX);
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        let (started, start) = sync_channel(1);
        thread::Builder::new()
            .name(format!("relevo-{}", config.engine.volume))
            .spawn(move || run(config, backing, queue, wake, Box::new(events), &started))?;
        let shared = start
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread ended while it started")))?;
        Ok(VolumeHandle { shared, commands })
    }
}

impl VolumeHandle {
    /// The volume's configuration as committed. Older ones are ignored.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn config(&self, volume: Arc<Volume>) -> Result<(), Gone> {
        self.command(Command::Config(volume))
    }

    /// Until when this node's lease lets it serve reads.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn lease_until(&self, until: Time) -> Result<(), Gone> {
        self.command(Command::LeaseUntil(until))
    }

    /// A link to a peer about this volume; replaces an older one.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn link(&self, link: EstablishedLink) -> Result<(), Gone> {
        self.command(Command::Link(Box::new(link)))
    }

    /// Step down in order: see [`relevo_replication::Input::Demote`].
    ///
    /// # Errors
    /// The thread has ended.
    pub fn demote(&self) -> Result<(), Gone> {
        self.command(Command::Demote)
    }

    /// Detach from the disk in order; ends with [`VolumeEvent::Detached`]. The thread runs on until
    /// [`Self::stop`].
    ///
    /// # Errors
    /// The thread has ended.
    pub fn detach(&self) -> Result<(), Gone> {
        self.command(Command::Detach)
    }

    /// An operator's order; `done` is called on the volume's thread and must not block.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn order(&self, order: Order, done: OrderDone) -> Result<(), Gone> {
        self.command(Command::Order(order, done))
    }

    /// Accept NBD clients there. While the volume is not open here they are told why.
    ///
    /// # Errors
    /// The address is taken or not allowed, or the thread has ended.
    pub fn listen_nbd(&self, address: NbdAddress) -> io::Result<()> {
        let listener = bind(address)?;
        self.command(Command::Listen(listener))
            .map_err(io::Error::other)
    }

    /// Stop accepting NBD clients and end their sessions.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn close_nbd(&self) -> Result<(), Gone> {
        self.command(Command::CloseNbd)
    }

    /// Start a request; `done` is called on the volume's thread. When the thread has ended, `done`
    /// is called at once with an error.
    pub fn request(&self, request: BlockRequest, done: Completion) {
        if let Err(mpsc::SendError(Command::Request(_, done))) =
            self.commands.send(Command::Request(request, done))
        {
            return done(Err(Errno::Io));
        }
        self.wake();
    }

    /// What the volume is doing. Never waits for the thread.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        lock(&self.shared.status).clone()
    }

    /// Ends the thread as a crash would (detach first for an orderly end): sessions and links close,
    /// disk operations under way are waited for. Returns whether it ended within 15 s; blocks until
    /// then.
    #[must_use = "a thread that did not end still holds the backing"]
    pub fn stop(&self) -> bool {
        if self.command(Command::Stop) == Err(Gone) {
            return true;
        }
        let status = lock(&self.shared.status);
        let ended = self
            .shared
            .ended
            .wait_timeout_while(status, STOP_WAIT, |status| status.alive);
        ended.is_ok_and(|(status, _)| !status.alive)
    }

    fn command(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        self.wake();
        Ok(())
    }

    fn wake(&self) {
        ring(&self.shared.wake);
    }

    #[cfg(test)]
    fn panic(&self) {
        assert_eq!(self.command(Command::Panic), Ok(()));
    }
}

impl Drop for VolumeHandle {
    fn drop(&mut self) {
        // The last one: let the thread see that the queue is closed.
        self.wake();
    }
}

impl fmt::Debug for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeHandle").finish_non_exhaustive()
    }
}

/// A volume for the exports that hand over requests (FUSE).
#[derive(Clone, Debug)]
pub struct VolumeTarget {
    /// The volume.
    pub handle: VolumeHandle,
    /// Its size in bytes.
    pub size: u64,
}

impl BlockTarget for VolumeTarget {
    fn submit(&self, request: BlockRequest, done: Completion) {
        self.handle.request(request, done);
    }

    fn size(&self) -> u64 {
        self.size
    }
}

fn bind(address: NbdAddress) -> io::Result<Listener> {
    match address {
        NbdAddress::Tcp(listener) => {
            listener.set_nonblocking(true)?;
            Ok(Listener::Tcp(listener))
        }
        NbdAddress::Unix(path) => {
            match std::fs::symlink_metadata(&path) {
                Ok(found) if found.file_type().is_socket() => std::fs::remove_file(&path)?,
                Ok(_) => {
                    return Err(io::Error::new(
                        io::ErrorKind::AlreadyExists,
                        format!("{} exists and is no socket; remove it", path.display()),
                    ));
                }
                Err(_) => {}
            }
            let listener = UnixListener::bind(&path)?;
            // Whoever may open the socket may read and write the volume.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok(Listener::Unix(listener, path))
        }
    }
}

type Started = SyncSender<io::Result<Arc<Shared>>>;

/// The thread: a panic ends the volume, never the node.
fn run(
    config: VolumeThreadConfig,
    backing: Backing,
    queue: Receiver<Command>,
    wake: OwnedFd,
    events: Box<dyn Fn(DatapathEvent) + Send>,
    started: &Started,
) {
    let name = config.name.clone();
    let opened = wake
        .try_clone()
        .and_then(|bell| Owner::open(config, backing, queue, bell, events));
    let mut owner = match opened {
        Ok(owner) => owner,
        Err(error) => return answer(started, Err(error)),
    };
    let shared = Arc::new(Shared {
        status: Mutex::new(owner.status()),
        wake,
        ended: Condvar::new(),
    });
    answer(started, Ok(Arc::clone(&shared)));
    let died = match catch_unwind(AssertUnwindSafe(|| owner.run(&shared))) {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("it can't wait for its descriptors: {error}")),
        Err(panic) => Some(message_of(panic.as_ref())),
    };
    let events = owner.take_events();
    // Sessions, links and the disk go before anyone hears of the end; the disk last, it may hang.
    let end = || {
        owner.disconnect();
        drop(owner);
    };
    if catch_unwind(AssertUnwindSafe(end)).is_err() {
        tracing::error!(
            volume = name,
            "the volume's thread failed again while it ended"
        );
    }
    lock(&shared.status).alive = false;
    shared.ended.notify_all();
    if let Some(reason) = died {
        tracing::error!(
            volume = name,
            reason,
            "the volume's thread died; the volume is failed here"
        );
        events(DatapathEvent::Died { reason });
    }
}

fn answer(started: &Started, result: io::Result<Arc<Shared>>) {
    if started.send(result).is_err() {
        tracing::debug!("whoever started the volume's thread is gone");
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Only whole values are assigned under the lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use relevo_disk::{DriverKind, probe};
    use relevo_types::{ClusterId, Instance, VolumeId};

    use super::*;

    fn config(dir: &tempfile::TempDir) -> VolumeThreadConfig {
        let backing = dir.path().join("backing");
        std::fs::write(&backing, vec![0; 1 << 20]).unwrap();
        VolumeThreadConfig {
            engine: EngineConfig {
                cluster: ClusterId([1; 16]),
                volume: VolumeId(1),
                node: NodeId(1),
                instance: Instance(1),
                backing_size: 0,
                link_timeout: Duration::from_secs(1),
                ping_interval: Duration::from_secs(1),
                reconcile_grace: Duration::from_secs(1),
                resync_window: 1 << 20,
            },
            name: "mail".to_owned(),
            backing,
            driver: probe(),
            saved_dir: dir.path().join("saved"),
        }
    }

    #[test]
    fn a_defect_ends_the_volume_not_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let (tell, events) = channel();
        let config = config(&dir);
        let spawn = |tell: mpsc::Sender<DatapathEvent>| {
            VolumeThread::spawn(config.clone(), move |event| {
                tell.send(event).unwrap_or_default();
            })
        };
        let handle = spawn(tell.clone()).unwrap();
        assert!(
            matches!(spawn(tell.clone()), Err(SpawnError::Backing(_))),
            "locked"
        );
        // Zeroes are no replica: the disk fails, the thread lives.
        let failed = events.recv_timeout(STOP_WAIT).unwrap();
        assert!(
            matches!(
                failed,
                DatapathEvent::Volume(VolumeEvent::DiskFailed { .. })
            ),
            "{failed:?}"
        );
        assert!(handle.status().alive);
        handle.panic();
        let died = events.recv_timeout(STOP_WAIT).unwrap();
        assert_eq!(
            died,
            DatapathEvent::Died {
                reason: "asked to panic".to_owned()
            }
        );
        assert!(!handle.status().alive);
        assert_eq!(handle.demote(), Err(Gone));
        let (answer, answered) = channel();
        let done = Box::new(move |result| answer.send(result).unwrap());
        handle.request(BlockRequest::Flush, done);
        assert_eq!(answered.recv_timeout(STOP_WAIT), Ok(Err(Errno::Io)));
        assert!(handle.stop());
        // Everything it held is free: a new one takes over.
        let again = spawn(tell).unwrap();
        assert!(again.stop());
    }

    #[test]
    fn a_thread_ends_with_its_last_handle_and_takes_its_socket_along() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(&dir);
        let socket = dir.path().join("nbd.sock");
        let handle = VolumeThread::spawn(config, |_| ()).unwrap();
        let status = handle.status();
        assert!(matches!(
            status.driver.kind,
            DriverKind::Uring | DriverKind::Pool | DriverKind::Memory
        ));
        handle.listen_nbd(NbdAddress::Unix(socket.clone())).unwrap();
        assert!(socket.exists());
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        let refused = handle
            .listen_nbd(NbdAddress::Unix(file.clone()))
            .unwrap_err();
        assert!(refused.to_string().contains("no socket"), "{refused}");
        let shared = Arc::clone(&handle.shared);
        drop(handle);
        let status = lock(&shared.status);
        let (status, _) = shared
            .ended
            .wait_timeout_while(status, STOP_WAIT, |status| status.alive)
            .unwrap();
        assert!(!status.alive);
        assert!(!socket.exists() && file.exists());
    }
}
