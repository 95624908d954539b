//! Two servers that take each other's place, the second of which has what the first one had, or less.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use chaos::{Relay, eventually};
use relevo_export::{
    BlockRequest, Errno,
    nbd::{Client, Export, NbdAddr, Session},
};

const SIZE: usize = 256 << 10;
const LIMIT: Option<Duration> = Some(Duration::from_secs(20));

/// A node: its content, and whether it is primary.
struct Node {
    content: Mutex<Vec<u8>>,
    primary: AtomicBool,
}

impl Node {
    fn start(socket: &Path, primary: bool) -> Arc<Self> {
        let node = Arc::new(Self {
            content: Mutex::new(vec![0; SIZE]),
            primary: AtomicBool::new(primary),
        });
        let listener = UnixListener::bind(socket).unwrap();
        let serving = Arc::clone(&node);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, node) = (stream.unwrap(), Arc::clone(&serving));
                thread::spawn(move || node.serve(stream));
            }
        });
        node
    }

    fn serve(&self, mut stream: UnixStream) {
        let why = "another node is primary".to_owned();
        let mut session = Session::new(Arc::new([Export {
            name: "mail".to_owned(),
            description: String::new(),
            size: SIZE as u64,
            read_only: false,
            min_block: 4096,
            unavailable: (!self.primary.load(Ordering::SeqCst)).then_some(why),
        }]));
        let mut buffer = [0; 64 << 10];
        loop {
            while let Some(request) = session.next_request() {
                let result = self.perform(&request.request);
                session.reply(request.tag, result);
            }
            while let Some(piece) = session.next_output() {
                if stream.write_all(&piece).is_err() {
                    return;
                }
            }
            let count = stream.read(&mut buffer).unwrap_or(0);
            if count == 0 {
                return;
            }
            assert_eq!(session.receive(&buffer[..count]), count);
        }
    }

    fn perform(&self, request: &BlockRequest) -> Result<Bytes, Errno> {
        if !self.primary.load(Ordering::SeqCst) {
            return Err(Errno::Shutdown);
        }
        let range = request.range();
        let place = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
        let mut content = self.content.lock().unwrap();
        match request {
            BlockRequest::Read { .. } => return Ok(content[place].to_vec().into()),
            BlockRequest::Write { data, .. } => content[place].copy_from_slice(data),
            _ => {}
        }
        Ok(Bytes::new())
    }
}

struct Pair {
    first: Arc<Node>,
    second: Arc<Node>,
    relay: Relay,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("relevo-")
            .tempdir()
            .unwrap();
        let sockets = [dir.path().join("one"), dir.path().join("two")];
        let first = Node::start(&sockets[0], true);
        let second = Node::start(&sockets[1], false);
        let socket = dir.path().join("relay");
        let relay = Relay::start(&socket, "mail", SIZE as u64, &sockets);
        Self {
            first,
            second,
            relay,
            socket,
            _dir: dir,
        }
    }

    fn client(&self) -> Client {
        Client::connect(&NbdAddr::Unix(self.socket.clone()), "mail", LIMIT).unwrap()
    }

    /// The second takes over with the content of the first.
    fn take_over(&self) {
        let content = self.first.content.lock().unwrap().clone();
        self.first.primary.store(false, Ordering::SeqCst);
        *self.second.content.lock().unwrap() = content;
        self.second.primary.store(true, Ordering::SeqCst);
    }
}

#[test]
fn the_client_follows_and_nothing_is_missing() {
    let pair = Pair::new();
    let mut client = pair.client();
    client.write(4096, &[7; 4096], false).unwrap();
    pair.take_over();
    client.write(8192, &[8; 8192], false).unwrap();
    client.flush().unwrap();
    let mut found = [0; 4096];
    client.read(4096, &mut found).unwrap();
    assert_eq!(found, [7; 4096]);
    assert_eq!(pair.relay.moves(), 2);
    let content = pair.relay.read_all();
    let journal = pair.relay.journal();
    assert_eq!(journal.writes(), 2);
    assert!(journal.missing(&content).is_empty());
    assert!(journal.complaints().is_empty());
}

/// The second server has not got what the first one acknowledged.
#[test]
fn what_a_takeover_loses_is_told() {
    let pair = Pair::new();
    let mut client = pair.client();
    client.write(4096, &[7; 4096], false).unwrap();
    pair.take_over();
    pair.second.content.lock().unwrap()[4096..8192].fill(0);
    client.read(4096, &mut [0; 4096]).unwrap();
    let content = pair.relay.read_all();
    let journal = pair.relay.journal();
    assert_eq!(journal.missing(&content), [1]);
    assert!(!journal.complaints().is_empty());
}

#[test]
fn a_request_waits_until_somebody_is_primary() {
    let pair = Pair::new();
    let mut client = pair.client();
    client.flush().unwrap();
    pair.first.primary.store(false, Ordering::SeqCst);
    thread::scope(|scope| {
        let writing = scope.spawn(|| client.write(0, &[1; 4096], true));
        thread::sleep(Duration::from_millis(300));
        assert!(!writing.is_finished(), "nobody could have answered");
        pair.second.primary.store(true, Ordering::SeqCst);
        eventually(Duration::from_secs(10), "it is answered", || {
            writing.is_finished()
        });
        writing.join().unwrap().unwrap();
    });
    assert_eq!(pair.second.content.lock().unwrap()[..4096], [1; 4096]);
    assert_eq!(pair.relay.moves(), 2);
}
