//! A volume in memory behind our own NBD sessions, on a Unix socket.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use bytes::Bytes;
use relevo_export::{
    BlockRequest, Errno,
    nbd::{Export, Session},
};

/// The volume; its threads end with the test process.
pub(crate) struct Volume {
    pub(crate) socket: PathBuf,
    _directory: tempfile::TempDir,
    failing: Arc<AtomicBool>,
}

impl Volume {
    pub(crate) fn new(size: usize) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("relevo-")
            .tempdir()
            .unwrap();
        let socket = directory.path().join("nbd");
        let listener = UnixListener::bind(&socket).unwrap();
        let failing = Arc::new(AtomicBool::new(false));
        let content = Arc::new(Mutex::new(vec![0; size]));
        let fails = Arc::clone(&failing);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (content, fails) = (Arc::clone(&content), Arc::clone(&fails));
                thread::spawn(move || serve(stream.unwrap(), &content, &fails));
            }
        });
        Self {
            socket,
            _directory: directory,
            failing,
        }
    }

    /// From now on every write fails.
    pub(crate) fn fail(&self) {
        self.failing.store(true, Ordering::SeqCst);
    }
}

fn serve(mut stream: UnixStream, content: &Mutex<Vec<u8>>, fails: &AtomicBool) {
    let size = content.lock().unwrap().len() as u64;
    let export = Export {
        name: "ledger".into(),
        description: String::new(),
        size,
        read_only: false,
        min_block: 4096,
        unavailable: None,
    };
    let mut session = Session::new(Arc::from([export]));
    loop {
        while let Some(request) = session.next_request() {
            let result = answer(&mut content.lock().unwrap(), fails, &request.request);
            session.reply(request.tag, result);
        }
        while let Some(output) = session.next_output() {
            if stream.write_all(&output).is_err() {
                return;
            }
        }
        if session.is_finished() {
            return;
        }
        let Ok(count) = stream.read(session.recv_buffer()) else {
            return;
        };
        session.received(count);
    }
}

fn answer(content: &mut [u8], fails: &AtomicBool, request: &BlockRequest) -> Result<Bytes, Errno> {
    let range = request.range();
    let at = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
    match request {
        BlockRequest::Read { .. } => Ok(Bytes::copy_from_slice(&content[at])),
        BlockRequest::Write { data, fua, .. } => {
            assert!(fua, "an entry is acknowledged only when it is stable");
            if fails.load(Ordering::SeqCst) {
                return Err(Errno::Io);
            }
            content[at].copy_from_slice(data);
            Ok(Bytes::new())
        }
        _ => Ok(Bytes::new()),
    }
}
