//! The server under judgement: the NBD session around a volume in memory, on a Unix socket, one
//! thread per connection.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
};

use bytes::Bytes;
use relevo_export::{
    AlignedBuf, BlockRequest, Errno, Extent,
    nbd::{Export, Phase, Session},
};
use relevo_types::{BLOCK_SIZE, ByteRange};

/// The volume's name.
pub(crate) const EXPORT: &str = "mail";

/// A running server; its threads end with the test process.
pub(crate) struct Subject {
    dir: tempfile::TempDir,
    content: Arc<Mutex<Vec<u8>>>,
}

impl Subject {
    pub(crate) fn start(size: usize) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("relevo-")
            .tempdir()
            .unwrap();
        let subject = Self {
            dir,
            content: Arc::new(Mutex::new(vec![0; size])),
        };
        let listener = UnixListener::bind(subject.socket()).unwrap();
        let content = Arc::clone(&subject.content);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, content) = (stream.unwrap(), Arc::clone(&content));
                thread::spawn(move || serve(stream, &content));
            }
        });
        subject
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// A place for files of the test.
    pub(crate) fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub(crate) fn uri(&self) -> String {
        self.uri_of(EXPORT)
    }

    pub(crate) fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }
}

/// Bytes without a period, the same for the same seed; some blocks are zeroes, so that judges
/// that look for holes find some.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let block = usize::try_from(BLOCK_SIZE).unwrap();
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        if bytes.len() / block % 7 == 3 {
            bytes.push(0);
        } else {
            bytes.extend_from_slice(&state.to_be_bytes()[..4]);
        }
    }
    bytes.truncate(len);
    bytes
}

fn exports(size: usize) -> Arc<[Export]> {
    let export = |name: &str| Export {
        name: name.to_owned(),
        description: format!("volume {name}"),
        size: size as u64,
        read_only: false,
        min_block: u32::try_from(BLOCK_SIZE).unwrap(),
        unavailable: None,
    };
    let read_only = Export {
        read_only: true,
        ..export("frozen")
    };
    let elsewhere = Export {
        unavailable: Some("web1 is primary of wiki, not this node".to_owned()),
        ..export("wiki")
    };
    Arc::new([export(EXPORT), read_only, elsewhere])
}

fn serve(mut stream: UnixStream, content: &Mutex<Vec<u8>>) {
    let size = content.lock().unwrap().len();
    let mut session = Session::new(exports(size));
    loop {
        while let Some(request) = session.next_request() {
            let mut content = content.lock().unwrap();
            match &request.request {
                BlockRequest::Status { range, .. } => {
                    session.reply_extents(request.tag, &extents(&content, *range));
                }
                other => {
                    let result = apply(&mut content, other);
                    session.reply(request.tag, result);
                }
            }
        }
        while let Some(piece) = session.next_output() {
            // The client left, perhaps killed by its own test: nobody to answer.
            if stream.write_all(&piece).is_err() {
                return;
            }
        }
        if session.is_finished() {
            if let Phase::Closing(reason) = session.phase() {
                println!("the session ended: {reason}");
            }
            return;
        }
        let Ok(count) = stream.read(session.recv_buffer()) else {
            return;
        };
        session.received(count);
    }
}

fn area(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap()
}

fn apply(content: &mut [u8], request: &BlockRequest) -> Result<Bytes, Errno> {
    let area = content
        .get_mut(area(request.range()))
        .ok_or(Errno::Invalid)?;
    match request {
        BlockRequest::Read { .. } => return Ok(AlignedBuf::copy_from(area).freeze()),
        BlockRequest::Write { data, .. } => area.copy_from_slice(data),
        BlockRequest::Zero { .. } | BlockRequest::Discard { .. } => area.fill(0),
        BlockRequest::Flush | BlockRequest::Status { .. } => {}
    }
    Ok(Bytes::new())
}

/// Blocks of zeroes are holes. Looks at a part only: clients ask for gigabytes at once and go on
/// where the answer ended.
fn extents(content: &[u8], range: ByteRange) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let block = usize::try_from(BLOCK_SIZE).unwrap();
    for piece in content[area(range)].chunks(block).take(256) {
        let zero = piece.iter().all(|&byte| byte == 0);
        let len = piece.len() as u64;
        match extents.last_mut() {
            Some(last) if last.zero == zero => last.len += len,
            _ => extents.push(Extent {
                len,
                hole: zero,
                zero,
            }),
        }
    }
    extents
}
