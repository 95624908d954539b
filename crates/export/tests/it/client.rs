//! The client against the session, over a real socket.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixListener,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use relevo_export::{
    BlockRequest, BlockTarget as _, Errno,
    bench::{Bench, Pattern},
    nbd::{Client, ClientError, Export, NbdAddr, Op, Pipeline, Session},
};

use crate::memory::Memory;

const SIZE: usize = 48 << 20;
const LIMIT: Option<Duration> = Some(Duration::from_secs(20));

/// Serves each connection in a thread, one batch of requests after the other.
fn serve(memory: &Arc<Memory>) -> (tempfile::TempDir, NbdAddr) {
    let dir = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let memory = Arc::clone(memory);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, memory) = (stream.unwrap(), Arc::clone(&memory));
            thread::spawn(move || connection(stream, &memory));
        }
    });
    (dir, NbdAddr::Unix(path))
}

fn connection(mut stream: std::os::unix::net::UnixStream, memory: &Memory) {
    let export = |name: &str, unavailable| Export {
        name: name.to_owned(),
        description: String::new(),
        size: SIZE as u64,
        read_only: name == "frozen",
        min_block: 4096,
        unavailable,
    };
    let busy = Some("web1 is primary".to_owned());
    let mut session = Session::new(Arc::new([
        export("mail", None),
        export("frozen", None),
        export("wiki", busy),
    ]));
    loop {
        while let Some(request) = session.next_request() {
            let (sender, answer) = mpsc::channel();
            let tag = request.tag;
            memory.submit(
                request.request,
                Box::new(move |result| sender.send(result).unwrap()),
            );
            session.reply(tag, answer.recv().unwrap_or(Err(Errno::Io)));
        }
        while let Some(piece) = session.next_output() {
            if stream.write_all(&piece).is_err() {
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

#[test]
fn every_operation() {
    let memory = Memory::new(SIZE);
    let (_dir, address) = serve(&memory);
    let mut client = Client::connect(&address, "mail", LIMIT).unwrap();
    assert_eq!(client.size(), SIZE as u64);
    assert!(!client.is_read_only());

    // More than one request's worth, so it is split.
    let data: Vec<u8> = (0..40usize << 20).map(|byte| (byte / 4096) as u8).collect();
    client.write(4096, &data, true).unwrap();
    let mut back = vec![0; data.len()];
    client.read(4096, &mut back).unwrap();
    assert!(back == data);
    assert!(memory.content()[4096..4096 + data.len()] == data);

    client.write_zeroes(8192, 4096, false).unwrap();
    client.trim(16384, 4096).unwrap();
    client.flush().unwrap();
    let content = memory.content();
    assert_eq!(content[8192..12288], [0; 4096]);
    assert_eq!(content[16384..20480], [0; 4096]);

    // A failed request leaves the connection usable.
    let past = client.write(SIZE as u64, &[0; 4096], false);
    assert!(matches!(past, Err(ClientError::Request(Errno::NoSpace))));
    let mut byte = [0; 1];
    assert!(matches!(
        client.read(SIZE as u64, &mut byte),
        Err(ClientError::Request(Errno::Invalid))
    ));
    client.read(4096 * 9, &mut byte).unwrap();
    client.disconnect().unwrap();
}

#[test]
fn refusals_name_the_reason() {
    let memory = Memory::new(SIZE);
    let (_dir, address) = serve(&memory);
    let refused = Client::connect(&address, "wiki", LIMIT)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("wiki") && refused.contains("web1 is primary"),
        "{refused}"
    );
    let unknown = Client::connect(&address, "none", LIMIT)
        .unwrap_err()
        .to_string();
    assert!(unknown.contains("no volume `none`"), "{unknown}");
    let mut frozen = Client::connect(&address, "frozen", LIMIT).unwrap();
    assert!(frozen.is_read_only());
    assert!(matches!(
        frozen.write(0, &[0; 4096], false),
        Err(ClientError::Request(Errno::NotPermitted))
    ));
    let nowhere = NbdAddr::Unix("/nonexistent/relevo.sock".into());
    assert!(matches!(
        Client::connect(&nowhere, "mail", LIMIT),
        Err(ClientError::Connect { .. })
    ));
}

#[test]
fn pipelined_requests_find_their_answers() {
    let memory = Memory::new(SIZE);
    let (_dir, address) = serve(&memory);
    let mut pipeline = Pipeline::connect(&address, "mail", LIMIT).unwrap();
    let mut cookies = Vec::new();
    for block in 0..32u64 {
        let data = [block as u8 + 1; 4096];
        let op = Op::Write {
            offset: block * 4096,
            data: &data,
            fua: false,
        };
        cookies.push(pipeline.submit(op).unwrap());
    }
    cookies.push(
        pipeline
            .submit(Op::Read {
                offset: 0,
                len: 100,
            })
            .unwrap(),
    );
    cookies.push(
        pipeline
            .submit(Op::Trim {
                offset: SIZE as u64,
                len: 4096,
            })
            .unwrap(),
    );
    assert_eq!(pipeline.under_way(), 34);
    let mut failed = Vec::new();
    while pipeline.under_way() > 0 {
        let done = pipeline.complete().unwrap();
        let place = cookies
            .iter()
            .position(|&cookie| cookie == done.cookie)
            .unwrap();
        cookies.swap_remove(place);
        failed.extend(done.result.err());
    }
    assert!(cookies.is_empty());
    assert_eq!(failed, [Errno::Invalid]);
    let content = memory.content();
    assert!((0..32).all(|block| content[block * 4096..][..4096] == [block as u8 + 1; 4096]));
}

#[test]
fn a_silent_server_ends_by_time_out() {
    let memory = Memory::new(SIZE);
    let (_dir, address) = serve(&memory);
    let mut client = Client::connect(&address, "mail", LIMIT).unwrap();
    client.set_timeout(Some(Duration::from_millis(50))).unwrap();
    memory.stall();
    let start = std::time::SystemTime::now();
    assert!(matches!(client.flush(), Err(ClientError::Connection(_))));
    let took = start.elapsed().unwrap();
    assert!(took < LIMIT.unwrap() / 2, "the new one counts: {took:?}");
    // What the server holds is a flush; nothing else was sent.
    assert_eq!(memory.kept(), 1);
    assert!(memory.kept_is(|request| matches!(request, BlockRequest::Flush)));
}

#[test]
fn bench_counts_what_it_did() {
    let memory = Memory::new(SIZE);
    let (_dir, address) = serve(&memory);
    for pattern in [
        Pattern::RandomWrite4K { depth: 1 },
        Pattern::RandomWrite4K { depth: 8 },
        Pattern::SequentialWrite1M,
    ] {
        let mut bench = Bench::open(&address, "mail", pattern, Duration::from_secs(20)).unwrap();
        for _ in 0..2 {
            bench.run(Duration::from_millis(40)).unwrap();
        }
        let measured = bench.finish().unwrap();
        println!("{}: {measured:?}", pattern.title());
        assert!(measured.requests >= 2 && measured.iops > 0.0 && measured.mib_s > 0.0);
        assert!(measured.p50_us > 0.0 && measured.p50_us <= measured.p99_us);
    }
    // Each block that was written says where it belongs.
    let content = memory.content();
    let stamped = (0..SIZE).step_by(1 << 20).filter(|&at| {
        let stamp = u64::from_le_bytes(content[at..at + 8].try_into().unwrap());
        stamp == at as u64
    });
    assert!(stamped.count() >= 2);
    let refused = Bench::open(
        &address,
        "frozen",
        Pattern::SequentialWrite1M,
        Duration::from_secs(9),
    )
    .unwrap()
    .run(Duration::from_millis(10));
    assert!(refused.is_err());
}

#[test]
fn addresses() {
    let unix = NbdAddr::Unix("/run/relevo/nbd".into());
    assert_eq!("unix:/run/relevo/nbd".parse(), Ok(unix.clone()));
    assert_eq!("/run/relevo/nbd".parse(), Ok(unix.clone()));
    assert_eq!(unix.to_string(), "unix:/run/relevo/nbd");
    assert_eq!(
        "[::1]:10809".parse(),
        Ok(NbdAddr::Tcp("[::1]:10809".into()))
    );
    assert!("mail".parse::<NbdAddr>().unwrap_err().contains("host:port"));
}
