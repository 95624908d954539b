//! An NBD server on a Unix socket for clients that give up when their server dies, fio above all.
//! Behind it our own client follows the primary from node to node: a request that was not answered
//! is sent again to whoever is primary now, until it is answered. Everything acknowledged goes into
//! the [`Journal`], and every read is checked against it.
//!
//! Who is primary: who answers a read. A node that is cut off still takes connections, but it
//! answers reads only while it has its lease. The relay moves only when *another* node answers:
//! a request sent again to the node that still has it could overtake its own older self.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use relevo_export::{
    BlockRequest, Errno,
    nbd::{Breaker, Client, ClientError, Export, NbdAddr, NbdRequest, Session},
};
use relevo_types::{BLOCK_SIZE, ByteRange};

use crate::journal::{BLOCK_BYTES, Journal};

/// Requests of one connection that are under way at once.
const WORKERS: usize = 16;

/// How often the others are asked whether they are primary.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// A node that does not answer a read in this time is not asked further: it waits for something.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// Making a connection to a node that was primary a moment ago.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Troubles that are kept to be told when the test fails.
const TROUBLES_MAX: usize = 200;

/// Between two attempts of a request that was refused.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// A running relay. Its threads end when it is dropped.
#[derive(Debug)]
pub struct Relay {
    socket: PathBuf,
    listener: UnixListener,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    volume: String,
    size: u64,
    nodes: Vec<NbdAddr>,
    route: Mutex<Route>,
    moved: Condvar,
    journal: Mutex<Journal>,
    moves: AtomicU64,
    repeats: AtomicU64,
    troubles: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

/// Where requests go.
#[derive(Debug, Default)]
struct Route {
    /// Index of the node.
    current: Option<usize>,
    /// Grows with each move.
    generation: u64,
    /// Connections to the current node, to be cut when it is no longer the one.
    breakers: Vec<Weak<Breaker>>,
}

impl Route {
    fn cut_all(&mut self) {
        for breaker in self.breakers.drain(..).filter_map(|known| known.upgrade()) {
            breaker.cut();
        }
    }
}

impl Relay {
    /// Listens on `socket` and serves the volume of `size` bytes from the NBD sockets of the nodes.
    ///
    /// # Panics
    /// The socket can't be made.
    #[must_use]
    pub fn start(socket: &Path, volume: &str, size: u64, nodes: &[PathBuf]) -> Self {
        let shared = Arc::new(Shared {
            volume: volume.to_owned(),
            size,
            nodes: nodes.iter().cloned().map(NbdAddr::Unix).collect(),
            route: Mutex::default(),
            moved: Condvar::new(),
            journal: Mutex::new(Journal::new(size)),
            moves: AtomicU64::new(0),
            repeats: AtomicU64::new(0),
            troubles: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let listener = UnixListener::bind(socket).unwrap();
        let scout = Arc::clone(&shared);
        let server = Arc::clone(&shared);
        Self {
            socket: socket.to_owned(),
            listener: listener.try_clone().unwrap(),
            shared,
            threads: vec![
                thread::spawn(move || scout.scout()),
                thread::spawn(move || server.serve(&listener)),
            ],
        }
    }

    /// The address, for fio.
    #[must_use]
    pub fn uri(&self) -> String {
        let volume = &self.shared.volume;
        format!("nbd+unix:///{volume}?socket={}", self.socket.display())
    }

    /// The journal.
    ///
    /// # Panics
    /// A thread of the relay has panicked.
    pub fn journal(&self) -> MutexGuard<'_, Journal> {
        self.shared.journal.lock().unwrap()
    }

    /// How often it went to another node, the first included.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.shared.moves.load(Ordering::Relaxed)
    }

    /// How many requests were sent more than once.
    #[must_use]
    pub fn repeats(&self) -> u64 {
        self.shared.repeats.load(Ordering::Relaxed)
    }

    /// Why connections were given up, the first ones.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let troubles = self.shared.troubles.lock();
        troubles.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the whole volume through whoever is primary.
    #[must_use]
    pub fn read_all(&self) -> Vec<u8> {
        let len = usize::try_from(self.shared.size).unwrap_or(0);
        let mut content = Vec::with_capacity(len);
        let mut line = None;
        while content.len() < len {
            let step = (len - content.len()).min(1 << 20) as u64;
            let range = ByteRange::new(content.len() as u64, step);
            match self
                .shared
                .perform(&mut line, &BlockRequest::Read { range })
            {
                Ok(data) => content.extend_from_slice(&data),
                Err(_) => break,
            }
        }
        content
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.shared.lose(None);
        // Wakes whoever waits for a connection, also when the socket's file is gone.
        if let Err(error) = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both) {
            eprintln!("the relay's listener stays: {error}");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a thread of the relay had panicked");
            }
        }
    }
}

/// A worker's connection, and under which generation it was made.
struct Line {
    client: Client,
    /// Holds the connection open as the client does.
    _breaker: Arc<Breaker>,
    node: usize,
    generation: u64,
}

impl Shared {
    fn route(&self) -> MutexGuard<'_, Route> {
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Looks for the primary, again and again.
    fn scout(&self) {
        while !self.is_stopped() {
            let current = self.route().current;
            let found = (0..self.nodes.len())
                .filter(|node| Some(*node) != current)
                .find(|node| self.answers(*node).is_ok());
            if let Some(node) = found {
                let mut route = self.route();
                route.current = Some(node);
                route.generation += 1;
                route.cut_all();
                self.moves.fetch_add(1, Ordering::Relaxed);
                self.moved.notify_all();
            }
            thread::sleep(PROBE_INTERVAL);
        }
    }

    fn answers(&self, node: usize) -> Result<(), ClientError> {
        let mut client = Client::connect(&self.nodes[node], &self.volume, Some(PROBE_TIMEOUT))?;
        client.read(0, &mut [0; BLOCK_BYTES])?;
        client.disconnect()
    }

    fn note(&self, what: &str, node: usize, error: &ClientError) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        if troubles.len() < TROUBLES_MAX {
            let now = relevo_host::clock::now();
            troubles.push(format!("{now:?} {what} at {}: {error}", self.nodes[node]));
        }
    }

    /// The node of this generation refuses or is gone: whoever answers next is the one. `None`:
    /// every connection is to be cut.
    fn lose(&self, generation: Option<u64>) {
        let mut route = self.route();
        if generation.is_none_or(|generation| generation == route.generation) {
            route.current = None;
            route.cut_all();
            self.moved.notify_all();
        }
    }

    /// A connection to whoever is primary now; waits for one. `None`: stopped, or try again.
    fn connect(&self) -> Option<Line> {
        let (node, generation) = {
            let mut route = self.route();
            loop {
                if self.is_stopped() {
                    return None;
                }
                if let Some(node) = route.current {
                    break (node, route.generation);
                }
                route = self
                    .moved
                    .wait_timeout(route, PROBE_INTERVAL)
                    .map_or_else(|poisoned| poisoned.into_inner().0, |waited| waited.0);
            }
        };
        let connected = Client::connect(&self.nodes[node], &self.volume, Some(CONNECT_TIMEOUT))
            .and_then(|mut client| {
                client.set_timeout(None)?;
                Ok((client.breaker()?, client))
            });
        let (breaker, client) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                self.note("connecting", node, &error);
                self.lose(Some(generation));
                return None;
            }
        };
        let mut route = self.route();
        if route.generation != generation || route.current.is_none() {
            return None;
        }
        let breaker = Arc::new(breaker);
        // Those of connections that ended go, so that there are never more than open ones.
        route.breakers.retain(|known| known.strong_count() > 0);
        route.breakers.push(Arc::downgrade(&breaker));
        Some(Line {
            client,
            _breaker: breaker,
            node,
            generation,
        })
    }

    /// Sends a request until it is answered.
    fn perform(&self, line: &mut Option<Line>, request: &BlockRequest) -> Result<Bytes, Errno> {
        let mut attempts = 0;
        while !self.is_stopped() {
            if line.is_none() {
                *line = self.connect();
            }
            let Some(connected) = line else {
                thread::sleep(RETRY_PAUSE);
                continue;
            };
            attempts += 1;
            if attempts == 2 {
                self.repeats.fetch_add(1, Ordering::Relaxed);
            }
            match ask(&mut connected.client, request) {
                Ok(data) => return Ok(data),
                Err(ClientError::Request(errno @ (Errno::Invalid | Errno::NotSupported))) => {
                    return Err(errno);
                }
                // Its disk failed, or it is primary no more. The client goes where the volume is.
                Err(error) => {
                    self.note("a request", connected.node, &error);
                    self.lose(Some(connected.generation));
                    *line = None;
                    thread::sleep(RETRY_PAUSE);
                }
            }
        }
        Err(Errno::Shutdown)
    }

    /// [`Self::perform`], with the journal.
    fn perform_and_note(
        &self,
        line: &mut Option<Line>,
        request: &BlockRequest,
    ) -> Result<Bytes, Errno> {
        let journal = || self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            BlockRequest::Read { range } => {
                let expected = journal().read_begins(*range);
                let data = self.perform(line, request)?;
                journal().read_ends(*range, &expected, &data);
                Ok(data)
            }
            BlockRequest::Write { range, data, .. } => {
                journal().write_begins(*range);
                let answer = self.perform(line, request)?;
                journal().write_ends(*range, data);
                Ok(answer)
            }
            BlockRequest::Zero { range, .. } => {
                journal().write_begins(*range);
                let answer = self.perform(line, request)?;
                let len = usize::try_from(range.len).unwrap_or(0);
                journal().write_ends(*range, &vec![0; len].into());
                Ok(answer)
            }
            BlockRequest::Discard { range, .. } => {
                journal().write_begins(*range);
                let answer = self.perform(line, request)?;
                journal().discard_ends(*range);
                Ok(answer)
            }
            BlockRequest::Flush | BlockRequest::Status { .. } => self.perform(line, request),
        }
    }

    fn serve(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            if self.is_stopped() {
                return;
            }
            let Ok(stream) = stream else { return };
            let shared = Arc::clone(self);
            thread::spawn(move || shared.serve_one(&stream));
        }
    }

    fn serve_one(self: &Arc<Self>, stream: &UnixStream) {
        let Ok(writer) = stream.try_clone() else {
            return;
        };
        let front = Front {
            shared: Arc::clone(self),
            session: Mutex::new(Session::new(self.exports())),
            writer,
        };
        let (sender, receiver) = channel();
        let receiver = Mutex::new(receiver);
        thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| front.work(&receiver));
            }
            front.read(stream, sender);
        });
    }

    fn exports(&self) -> Arc<[Export]> {
        Arc::new([Export {
            name: self.volume.clone(),
            description: "followed from node to node".to_owned(),
            size: self.size,
            read_only: false,
            min_block: u32::try_from(BLOCK_SIZE).unwrap_or(4096),
            unavailable: None,
        }])
    }
}

/// The client's side of one connection.
struct Front {
    shared: Arc<Shared>,
    session: Mutex<Session>,
    writer: UnixStream,
}

impl Front {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the client leaves. Dropping the sender ends the workers.
    fn read(&self, mut stream: &UnixStream, requests: Sender<NbdRequest>) {
        let mut buffer = vec![0; 64 << 10];
        // The server speaks first.
        self.flush(&mut self.session());
        loop {
            let count = stream.read(&mut buffer).unwrap_or(0);
            let mut rest = &buffer[..count];
            loop {
                let mut session = self.session();
                if count == 0 {
                    session.received(0);
                } else {
                    let taken = session.receive(rest);
                    rest = &rest[taken..];
                }
                while let Some(request) = session.next_request() {
                    if requests.send(request).is_err() {
                        return;
                    }
                }
                self.flush(&mut session);
                if session.is_finished() || count == 0 {
                    return;
                }
                drop(session);
                if rest.is_empty() {
                    break;
                }
                // Too much is under way; answers make room.
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn work(&self, requests: &Mutex<Receiver<NbdRequest>>) {
        let mut line = None;
        loop {
            let next = requests
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .recv();
            let Ok(NbdRequest { tag, request }) = next else {
                return;
            };
            let result = self.shared.perform_and_note(&mut line, &request);
            let mut session = self.session();
            session.reply(tag, result);
            self.flush(&mut session);
        }
    }

    fn flush(&self, session: &mut Session) {
        while let Some(piece) = session.next_output() {
            // The client left, perhaps killed by its own test: nobody to answer.
            if (&self.writer).write_all(&piece).is_err() {
                return;
            }
        }
    }
}

fn ask(client: &mut Client, request: &BlockRequest) -> Result<Bytes, ClientError> {
    let len = |range: &ByteRange| u32::try_from(range.len).map_err(|_| Errno::Invalid);
    match request {
        BlockRequest::Read { range } => {
            let mut buffer = vec![0; len(range)? as usize];
            client.read(range.offset, &mut buffer)?;
            return Ok(buffer.into());
        }
        BlockRequest::Write { range, data, fua } => client.write(range.offset, data, *fua)?,
        BlockRequest::Flush => client.flush()?,
        BlockRequest::Discard { range, .. } => client.trim(range.offset, len(range)?)?,
        BlockRequest::Zero { range, fua, .. } => {
            client.write_zeroes(range.offset, len(range)?, *fua)?;
        }
        BlockRequest::Status { .. } => {}
    }
    Ok(Bytes::new())
}
