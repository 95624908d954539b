//! NBD from clients and servers that are broken, or enemies.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use relevo_export::{
    BlockRequest, Errno, Extent,
    nbd::{Client, Export, NbdAddr, NbdRequest, Op, Pipeline, Session},
};
use said::fuzz::{Random, fuzz, mutate};

use crate::wire::{self, *};

const SIZE: u64 = 1 << 20;

/// What a session may hand out to be received into, at once.
const RECEIVE_MAX: usize = 256 << 10;

/// Requests under way on one connection.
const UNDER_WAY_MAX: usize = 256;

fn exports() -> Arc<[Export]> {
    let export = |name: &str| Export {
        name: name.to_owned(),
        description: format!("volume {name}"),
        size: SIZE,
        read_only: name == "frozen",
        min_block: 4096,
        unavailable: (name == "wiki").then(|| "web1 is primary of wiki".to_owned()),
    };
    Arc::new([export("mail"), export("frozen"), export("wiki")])
}

/// What a client may say before it opens an export.
fn option(random: &mut Random) -> Vec<u8> {
    let name = ["mail", "frozen", "wiki", "", "none"][random.below(5)];
    let queries = ["base:allocation", "base:", "qemu:dirty-bitmap:x"];
    match random.below(9) {
        0 => wire::option(8, &[]),
        1 => wire::option(3, &[]),
        2 => wire::option(5, &[]),
        3 => wire::option(10, &contexts(name, &queries[..random.below(4)])),
        4 => wire::option(9, &contexts(name, &queries[..random.below(4)])),
        5 => wire::option(6, &info(name, &[1, 3])),
        6 => wire::option(random.byte().into(), &random.bytes(200)),
        _ => wire::option(7, &info(name, &[0, 3])),
    }
}

fn client_request(random: &mut Random, cookie: u64) -> Vec<u8> {
    let command = u16::from(random.byte() % 9);
    let flags = if random.one_in(3) {
        u16::from(random.byte() % 32)
    } else {
        0
    };
    let (offset, len) = if random.one_in(4) {
        (random.tricky(), (random.tricky() & 0xffff_ffff) as u32)
    } else {
        let blocks = 1 + random.below(20) as u32;
        (random.number() % 240 * 4096, blocks * 4096)
    };
    let mut bytes = wire::request(flags, command, cookie, offset, len);
    if command == WRITE {
        // An announced length without the bytes is what a client that dies leaves.
        bytes.resize(bytes.len() + (len as usize).min(90_000), 3);
    }
    bytes
}

fn conversation(random: &mut Random) -> Vec<u8> {
    let mut bytes = CLIENT_FLAGS.to_vec();
    for _ in 0..random.below(4) {
        bytes.extend(option(random));
    }
    bytes.extend(wire::option(7, &info("mail", &[0, 3])));
    for cookie in 0..random.below(12) as u64 {
        bytes.extend(client_request(random, cookie));
    }
    if random.one_in(2) {
        bytes.extend(wire::request(0, DISC, 0, 0, 0));
    }
    bytes
}

/// What the data path relies on.
fn check(request: &NbdRequest) {
    let range = request.request.range();
    assert!(
        range.checked_end().is_some_and(|end| end <= SIZE),
        "{range:?}"
    );
    match &request.request {
        BlockRequest::Write { range, data, .. } => {
            assert_eq!(range.len, data.len() as u64);
            assert!(range.offset.is_multiple_of(4096) && range.len.is_multiple_of(4096));
            assert!(data.is_empty() || (data.as_ptr() as usize).is_multiple_of(4096));
        }
        BlockRequest::Zero { range, .. } => {
            assert!(range.offset.is_multiple_of(4096) && range.len.is_multiple_of(4096));
        }
        _ => {}
    }
}

fn answer(random: &mut Random, session: &mut Session, request: &NbdRequest) {
    match &request.request {
        _ if random.one_in(10) => session.reply(request.tag, Err(Errno::Io)),
        BlockRequest::Read { range } => {
            session.reply(request.tag, Ok(vec![1; range.len as usize].into()));
        }
        BlockRequest::Status { range, .. } => {
            let mut extents = vec![Extent::data(random.tricky().max(1)); random.below(4)];
            extents.push(Extent::data(range.len.max(1)));
            session.reply_extents(request.tag, &extents);
        }
        _ => session.reply(request.tag, Ok(Bytes::new())),
    }
}

#[test]
fn a_server_survives_any_client() {
    fuzz("a_server_survives_any_client", |random| {
        let mut bytes = conversation(random);
        if !random.one_in(4) {
            mutate(random, &mut bytes);
        }
        let mut session = Session::new(exports());
        let mut open = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() && session.wants_input() {
            let room = session.recv_buffer().len();
            assert!(room > 0 && room <= RECEIVE_MAX, "{room}");
            let piece = (1 + random.below(rest.len())).min(9000);
            let taken = session.receive(&rest[..piece]);
            rest = &rest[taken..];
            while let Some(request) = session.next_request() {
                check(&request);
                open.push(request);
            }
            assert_eq!(session.under_way(), open.len());
            assert!(open.len() <= UNDER_WAY_MAX);
            while !open.is_empty() && random.one_in(2) {
                let request = open.swap_remove(random.below(open.len()));
                answer(random, &mut session, &request);
                // A second answer is nobody's.
                session.reply(request.tag, Err(Errno::Io));
            }
            while session.next_output().is_some() {}
        }
        session.received(0);
        for request in open {
            answer(random, &mut session, &request);
        }
        while session.next_request().is_some() {}
        while session.next_output().is_some() {}
        assert_eq!((session.under_way(), session.output_len()), (0, 0));
        assert!(session.is_finished());
    });
}

/// Serves one connection, and breaks what it says.
fn broken_server(random: &mut Random, mut stream: &UnixStream) {
    let mut session = Session::new(exports());
    let mut buffer = [0; 16 << 10];
    loop {
        let mut output = Vec::new();
        while let Some(request) = session.next_request() {
            answer(random, &mut session, &request);
        }
        while let Some(piece) = session.next_output() {
            output.extend_from_slice(&piece);
        }
        let broken = random.one_in(3) && mutate(random, &mut output);
        // The client may have had enough.
        if stream.write_all(&output).is_err() || broken || session.is_finished() {
            return;
        }
        match stream.read(&mut buffer) {
            Ok(count) if count > 0 => {
                session.receive(&buffer[..count]);
            }
            _ => return,
        }
    }
}

#[test]
fn a_client_survives_any_server() {
    let dir = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let address = NbdAddr::Unix(path);
    // A client that waits for more than a broken server ever sends is told so by its end.
    let limit = Some(Duration::from_secs(20));
    fuzz("a_client_survives_any_server", |random| {
        let mut theirs = random.clone();
        theirs.number();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (stream, _) = listener.accept().unwrap();
                broken_server(&mut theirs, &stream);
            });
            if random.one_in(2) {
                let Ok(mut client) = Client::connect(&address, "mail", limit) else {
                    return;
                };
                let mut buffer = [0; 8192];
                for _ in 0..random.below(6) {
                    let result = match random.below(5) {
                        0 => client.write(4096, &buffer, true),
                        1 => client.flush(),
                        2 => client.trim(0, 4096),
                        3 => client.write_zeroes(0, 4096, false),
                        _ => client.read(random.number() % 9000, &mut buffer),
                    };
                    if result.is_err() {
                        break;
                    }
                }
            } else {
                let Ok(mut pipeline) = Pipeline::connect(&address, "mail", limit) else {
                    return;
                };
                for _ in 0..random.below(9) {
                    let op = match random.below(3) {
                        0 => Op::Flush,
                        1 => Op::Trim {
                            offset: 0,
                            len: 4096,
                        },
                        _ => Op::Read {
                            offset: 0,
                            len: 4096,
                        },
                    };
                    if pipeline.submit(op).is_err() {
                        return;
                    }
                }
                while pipeline.under_way() > 0 && pipeline.complete().is_ok() {}
            }
        });
    });
}
