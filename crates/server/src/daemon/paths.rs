//! This node's paths as the control log has them: sockets for heartbeats, addresses to listen on, byte streams. They come
//! and go without a restart, and what can't be used now is tried again.
//!
//! At a start the paths are those of `node.json`, for the control log may be out of reach without them; from then on this
//! follows the committed state, and writes it there for the next start.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use relevo_transport::{HeartbeatKey, HeartbeatLine, HeartbeatSocket, Listeners, PathChange, line};
use relevo_types::{
    ClusterId, NodeId,
    cluster::{ClusterState, Line, NodeSpec},
};
use tokio::{runtime::Handle, sync::watch, task::AbortHandle};

use super::node_loop::NodeInbox;
use crate::{
    api::{EventKind, EventLevel},
    events::Events,
    local_store::NodeFile,
    membership_files::Places,
};

/// A path that can't be used is tried again this often: an interface comes up, a device is plugged in.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// A stream that ended is opened again after this; after twice the time each time it can't be or does not last,
/// up to [`TRY_EVERY`].
const REOPEN_FIRST: Duration = Duration::from_millis(100);

/// Longer than whoever takes every connection and ends it at once.
const LASTING: Duration = Duration::from_secs(5);

/// What the keeper works with.
pub(crate) struct PathContext {
    pub(crate) me: NodeId,
    pub(crate) cluster: ClusterId,
    pub(crate) file: NodeFile,
    pub(crate) places: Places,
    pub(crate) inbox: NodeInbox,
    pub(crate) control: Listeners,
    /// `None` on a node without replicas.
    pub(crate) data: Option<Listeners>,
    pub(crate) board: PathBoard,
    pub(crate) events: Arc<Events>,
    pub(crate) runtime: Handle,
}

/// Keeps the paths of this node open. Clones are about the same.
#[derive(Clone)]
pub(crate) struct PathKeeper {
    inner: Arc<Inner>,
}

struct Inner {
    context: PathContext,
    key: HeartbeatKey,
    /// Changed by one caller at a time: at the start, then by [`PathKeeper::follow`].
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    file: Option<NodeFile>,
    sockets: BTreeMap<String, SocketAddr>,
    lines: BTreeMap<String, (Line, AbortHandle)>,
}

/// Every path of a node, and why it can't be used; `None`: it can.
pub(crate) type Standing = BTreeMap<String, Option<String>>;

/// How this node's paths are, for whoever asks. Clones are about the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct PathBoard(Arc<Mutex<Standing>>);

impl PathBoard {
    pub(crate) fn read(&self) -> Standing {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        lock(&self.0)
    }
}

impl PathKeeper {
    /// Opens the paths of the last start.
    ///
    /// # Errors
    /// None of its addresses can be used: such a node would be a stranger to its cluster.
    pub(crate) fn start(context: PathContext) -> anyhow::Result<Self> {
        let file = context.file.clone();
        let keeper = Self {
            inner: Arc::new(Inner {
                key: HeartbeatKey::new(&file.heartbeat_key),
                context,
                open: Mutex::new(Open {
                    file: Some(file.clone()),
                    ..Open::default()
                }),
            }),
        };
        keeper.inner.apply(&file.spec);
        let standing = keeper.inner.context.board.read();
        let networks = || file.spec.paths.iter().map(|path| &standing[&path.name]);
        if networks().all(Option::is_some)
            && let Some(Some(why)) = networks().next()
        {
            keeper.close();
            anyhow::bail!("{why}");
        }
        Ok(keeper)
    }

    /// Follows the control log. Ends with it.
    pub(crate) async fn follow(self, mut states: watch::Receiver<Arc<ClusterState>>) {
        loop {
            let state = states.borrow_and_update().clone();
            self.inner.take(&state);
            let trouble = self
                .inner
                .context
                .board
                .lock()
                .values()
                .any(Option::is_some);
            let pause = if trouble { TRY_EVERY } else { Duration::MAX };
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Closes the streams; the sockets and listeners are others' to close.
    pub(crate) fn close(&self) {
        for (_, task) in std::mem::take(&mut lock(&self.inner.open).lines).into_values() {
            task.abort();
        }
    }
}

impl Inner {
    /// The paths by a committed state.
    fn take(self: &Arc<Self>, state: &ClusterState) {
        let Some(node) = state.nodes.get(&self.context.me) else {
            return;
        };
        let (spec, changed) = {
            let mut open = lock(&self.open);
            let Some(file) = &mut open.file else {
                return;
            };
            // After a restart the log is read anew, and what it said long ago is not what is to be done.
            if state.revision < file.revision {
                return;
            }
            let changed = file.spec != node.spec;
            if changed {
                file.spec.clone_from(&node.spec);
                file.revision = state.revision;
            }
            (node.spec.clone(), changed.then(|| file.clone()))
        };
        self.apply(&spec);
        if let Some(file) = changed {
            let places = self.context.places.clone();
            let events = Arc::clone(&self.context.events);
            self.context.runtime.spawn_blocking(move || {
                if let Err(error) = places.save_node(&file) {
                    let text = format!("the changed paths are not on disk: {error}");
                    events.add(EventLevel::Alarm, EventKind::Daemon, "", &text);
                }
            });
        }
    }

    /// Opens what is not open and closes what is no longer wanted.
    fn apply(self: &Arc<Self>, spec: &NodeSpec) {
        let mut open = lock(&self.open);
        let mut standing: Standing = spec
            .all_paths()
            .map(|(name, _)| (name.to_owned(), None))
            .collect();
        let unwanted = |name: &String| !standing.contains_key(name);
        let known = open.sockets.keys().chain(open.lines.keys());
        for name in known
            .filter(|name| unwanted(name))
            .cloned()
            .collect::<Vec<_>>()
        {
            self.forget(&mut open, &name);
        }
        let addresses = |port| -> Vec<SocketAddr> {
            let paths = spec.paths.iter();
            paths
                .map(|path| SocketAddr::new(path.address, port))
                .collect()
        };
        let ports = spec.ports;
        let mut failed = self.context.control.listen_on(&addresses(ports.control));
        if let Some(data) = &self.context.data {
            failed.extend(data.listen_on(&addresses(ports.data)));
        }
        for path in &spec.paths {
            let address = SocketAddr::new(path.address, ports.heartbeat);
            let listens = failed.iter().find(|(at, _)| at.ip() == path.address);
            let hears = self.open_socket(&mut open, &path.name, address);
            let why = listens
                .map(|(_, error)| error.to_string())
                .or_else(|| hears.err().map(|error| error.to_string()));
            standing.insert(path.name.clone(), why);
        }
        for stream in &spec.streams {
            self.open_line(&mut open, &stream.name, &stream.line);
            // The task tells how it is, a socket's when somebody came: until then it is as it should be.
            let known = self.context.board.lock().get(&stream.name).cloned();
            match (known, &stream.line) {
                (Some(known), _) => drop(standing.insert(stream.name.clone(), known)),
                (None, Line::Serial { .. }) => drop(standing.remove(&stream.name)),
                (None, Line::Unix(_)) => {}
            }
        }
        let mut told = self.context.board.lock();
        for path in &spec.paths {
            let before = told.get(&path.name).cloned().flatten();
            self.tell(
                &path.name,
                before.as_deref(),
                standing[&path.name].as_deref(),
            );
        }
        *told = standing;
    }

    fn forget(&self, open: &mut Open, name: &str) {
        open.sockets.remove(name);
        if let Some((_, task)) = open.lines.remove(name) {
            task.abort();
        }
        self.context.inbox.path(PathChange::Gone(name.to_owned()));
    }

    fn open_socket(&self, open: &mut Open, name: &str, address: SocketAddr) -> io::Result<()> {
        if open.sockets.get(name) == Some(&address) {
            return Ok(());
        }
        self.forget(open, name);
        let context = &self.context;
        let socket = HeartbeatSocket::bind(name, address, context.cluster, self.key.clone())?;
        open.sockets.insert(name.to_owned(), address);
        context.inbox.path(PathChange::Socket(socket));
        Ok(())
    }

    fn open_line(self: &Arc<Self>, open: &mut Open, name: &str, line: &Line) {
        if open.lines.get(name).is_some_and(|(known, _)| known == line) {
            return;
        }
        self.forget(open, name);
        let task = keep_line(Arc::clone(self), name.to_owned(), line.clone());
        let task = self.context.runtime.spawn(task).abort_handle();
        open.lines.insert(name.to_owned(), (line.clone(), task));
    }

    /// What became of a stream.
    fn note_line(&self, name: &str, why: Option<String>) {
        let open = lock(&self.open);
        // It may have been removed meanwhile.
        if open.lines.contains_key(name) {
            let mut standing = self.context.board.lock();
            let before = standing.insert(name.to_owned(), why.clone()).flatten();
            self.tell(name, before.as_deref(), why.as_deref());
        }
    }

    /// An event when something changed.
    fn tell(&self, name: &str, before: Option<&str>, now: Option<&str>) {
        let (level, text) = match (before, now) {
            (None, Some(why)) => (
                EventLevel::Alarm,
                format!("this node can't use its path {name}: {why}"),
            ),
            (Some(_), None) => (EventLevel::Info, format!("this node uses its path {name}")),
            (Some(_), Some(_)) | (None, None) => return,
        };
        self.context.events.add(level, EventKind::Node, "", &text);
    }
}

/// Opens a stream whenever it is not open, and gives it to the heartbeat thread.
async fn keep_line(inner: Arc<Inner>, name: String, line: Line) {
    let mut pause = REOPEN_FIRST;
    loop {
        match line::open(&line).await {
            Ok(stream) => {
                let (cluster, key) = (inner.context.cluster, inner.key.clone());
                let (end, ended) = HeartbeatLine::new(&name, stream, &line, cluster, key);
                inner.note_line(&name, None);
                inner.context.inbox.path(PathChange::Line(end));
                let opened = relevo_host::clock::now();
                let ended = ended.await;
                if relevo_host::clock::now().since(opened) >= LASTING {
                    pause = REOPEN_FIRST;
                }
                match ended {
                    // That nothing arrives is what membership tells.
                    Ok(why) => tracing::info!(path = name, %why, "a stream ended"),
                    // The heartbeat thread is gone, or has another one.
                    Err(_) => return,
                }
            }
            Err(error) => inner.note_line(&name, Some(error.to_string())),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(TRY_EVERY);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves it whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
