//! The NBD session, byte by byte.

use std::{collections::VecDeque, io::IoSlice, sync::Arc};

use bytes::Bytes;
use proptest::prelude::*;
use relevo_export::{
    BlockRequest, Errno, Extent,
    nbd::{CloseReason, Export, MAX_REQUEST, NbdRequest, Phase, Session},
};
use relevo_types::ByteRange;

use crate::wire::{self, *};

const SIZE: u64 = 1 << 20;

fn export(name: &str) -> Export {
    Export {
        name: name.to_owned(),
        description: format!("volume {name}"),
        size: SIZE,
        read_only: false,
        min_block: 4096,
        unavailable: None,
    }
}

fn exports() -> Arc<[Export]> {
    let elsewhere = Export {
        unavailable: Some("web1 is primary of wiki, not this node".to_owned()),
        ..export("wiki")
    };
    let frozen = Export {
        read_only: true,
        ..export("frozen")
    };
    Arc::new([export("mail"), elsewhere, frozen])
}

fn drain(session: &mut Session) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(piece) = session.next_output() {
        bytes.extend_from_slice(&piece);
    }
    bytes
}

/// Feeds everything; returns the requests. Nothing may be left over.
fn feed(session: &mut Session, bytes: &[u8]) -> Vec<NbdRequest> {
    let mut requests = Vec::new();
    let mut rest = bytes;
    loop {
        let taken = session.receive(rest);
        rest = &rest[taken..];
        while let Some(request) = session.next_request() {
            requests.push(request);
        }
        if rest.is_empty() || (taken == 0 && !session.wants_input()) {
            return requests;
        }
    }
}

/// After the greeting and the client's flags.
fn negotiating() -> Session {
    let mut session = Session::new(exports());
    assert_eq!(drain(&mut session), GREETING);
    assert!(feed(&mut session, CLIENT_FLAGS).is_empty());
    session
}

/// One option; returns the answer.
fn ask(session: &mut Session, number: u32, data: &[u8]) -> Vec<u8> {
    assert!(feed(session, &wire::option(number, data)).is_empty());
    drain(session)
}

/// Opened with `GO`.
fn serving(name: &str, structured: bool, context: bool) -> Session {
    let mut session = negotiating();
    if structured {
        assert_eq!(ask(&mut session, 8, &[]), option_reply(8, 1, &[]));
    }
    if context {
        ask(&mut session, 10, &contexts(name, &["base:allocation"]));
    }
    ask(&mut session, 7, &info(name, &[]));
    assert!(matches!(session.phase(), Phase::Serving(export) if export.name == name));
    session
}

fn starts_with(bytes: &[u8], option: u32, kind: u32) {
    assert_eq!(bytes[8..12], option.to_be_bytes());
    assert_eq!(bytes[12..16], kind.to_be_bytes(), "{bytes:x?}");
}

const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_POLICY: u32 = 0x8000_0002;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_TOO_BIG: u32 = 0x8000_0009;

#[test]
fn export_name_golden() {
    for (flags, zeroes) in [(b"\x00\x00\x00\x01", 124), (b"\x00\x00\x00\x03", 0)] {
        let mut session = Session::new(exports());
        drain(&mut session);
        feed(&mut session, flags);
        feed(&mut session, &wire::option(1, b"mail"));
        // 1 MiB; HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN.
        let mut golden = b"\x00\x00\x00\x00\x00\x10\x00\x00\x01\x6d".to_vec();
        golden.extend(vec![0; zeroes]);
        assert_eq!(drain(&mut session), golden);
        assert!(matches!(session.phase(), Phase::Serving(_)));
    }
}

#[test]
fn go_golden() {
    let mut session = negotiating();
    ask(&mut session, 8, &[]);
    let mut golden = option_reply(7, 3, b"\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x01\xed");
    golden.extend(option_reply(
        7,
        3,
        b"\x00\x03\x00\x00\x10\x00\x00\x01\x00\x00\x02\x00\x00\x00",
    ));
    golden.extend(option_reply(7, 3, b"\x00\x01mail"));
    golden.extend(option_reply(7, 3, b"\x00\x02volume mail"));
    golden.extend(option_reply(7, 1, &[]));
    assert_eq!(ask(&mut session, 7, &info("mail", &[1, 2, 3, 99])), golden);
}

#[test]
fn options() {
    let mut session = negotiating();
    // LIST names what can be opened.
    let list = ask(&mut session, 3, &[]);
    let mut golden = Vec::new();
    for name in ["mail", "frozen"] {
        let mut item = wire::string(name);
        item.extend(format!("volume {name}").into_bytes());
        golden.extend(option_reply(3, 2, &item));
    }
    golden.extend(option_reply(3, 1, &[]));
    assert_eq!(list, golden);
    starts_with(&ask(&mut session, 3, b"x"), 3, ERR_INVALID);

    // STARTTLS, PEEK_EXPORT, EXTENDED_HEADERS, and what nobody has invented yet.
    for number in [5, 4, 11, 0xffff] {
        starts_with(&ask(&mut session, number, b"data"), number, ERR_UNSUP);
    }
    starts_with(&ask(&mut session, 6, &info("none", &[])), 6, ERR_UNKNOWN);
    starts_with(&ask(&mut session, 7, &info("", &[])), 7, ERR_UNKNOWN);
    let elsewhere = ask(&mut session, 7, &info("wiki", &[]));
    starts_with(&elsewhere, 7, ERR_POLICY);
    assert!(elsewhere.ends_with(b"web1 is primary of wiki, not this node"));
    for bad in [
        &b""[..],
        b"\0\0\0\x05mail",
        b"\0\0\0\x04mail\0\x02\0\x01",
        b"\xff\xff\xff\xff",
    ] {
        starts_with(&ask(&mut session, 7, bad), 7, ERR_INVALID);
        starts_with(&ask(&mut session, 9, bad), 9, ERR_INVALID);
    }
    starts_with(&ask(&mut session, 6, &vec![0; 100_000]), 6, ERR_TOO_BIG);
    starts_with(&ask(&mut session, 8, b"x"), 8, ERR_INVALID);

    // Contexts need structured replies.
    let wanted = contexts("mail", &["base:allocation", "qemu:dirty-bitmap:x"]);
    starts_with(&ask(&mut session, 10, &wanted), 10, ERR_INVALID);
    ask(&mut session, 8, &[]);
    let mut golden = option_reply(10, 4, b"\0\0\0\x01base:allocation");
    golden.extend(option_reply(10, 1, &[]));
    assert_eq!(ask(&mut session, 10, &wanted), golden);
    assert_eq!(
        ask(&mut session, 10, &contexts("mail", &["other:thing"])),
        option_reply(10, 1, &[])
    );
    for query in [&[][..], &["base:"], &["base:allocation"]] {
        let mut golden = option_reply(9, 4, b"\0\0\0\0base:allocation");
        golden.extend(option_reply(9, 1, &[]));
        assert_eq!(ask(&mut session, 9, &contexts("mail", query)), golden);
    }

    // Still fit for use after all that, and INFO does not open.
    ask(&mut session, 6, &info("mail", &[]));
    assert_eq!(session.phase(), Phase::Negotiating);
    assert_eq!(ask(&mut session, 2, &[]), option_reply(2, 1, &[]));
    assert_eq!(session.phase(), Phase::Closing(&CloseReason::Disconnected));
    assert!(session.is_finished());
}

#[test]
fn no_name_means_the_only_export() {
    let mut session = Session::new(Arc::new([export("mail")]));
    drain(&mut session);
    feed(&mut session, CLIENT_FLAGS);
    feed(&mut session, &wire::option(7, &info("", &[])));
    assert!(matches!(session.phase(), Phase::Serving(export) if export.name == "mail"));
}

#[test]
fn negotiation_that_ends_the_session() {
    let cases: [(&str, Vec<u8>); 5] = [
        ("unknown flags", b"\x00\x00\x00\x07".to_vec()),
        ("fixed newstyle", b"\x00\x00\x00\x00".to_vec()),
        (
            "magic",
            [CLIENT_FLAGS, &b"IHAVENOT\0\0\0\0\0\0\0\0"[..]].concat(),
        ),
        (
            "too long",
            [CLIENT_FLAGS, &b"IHAVEOPT\0\0\0\x01\xff\xff\xff\xff"[..]].concat(),
        ),
        ("without end", {
            let mut bytes = CLIENT_FLAGS.to_vec();
            (0..300).for_each(|_| bytes.extend(wire::option(3, &[])));
            bytes
        }),
    ];
    for (part, bytes) in cases {
        let mut session = Session::new(exports());
        feed(&mut session, &bytes);
        let Phase::Closing(reason) = session.phase() else {
            panic!("{part}: still open");
        };
        assert!(reason.to_string().contains(part), "{part}: {reason}");
        assert!(!session.wants_input() && session.recv_buffer().is_empty());
        drain(&mut session);
        assert!(session.is_finished());
    }
    // EXPORT_NAME knows no error: the connection is closed, the reason is for our log.
    let mut session = negotiating();
    feed(&mut session, &wire::option(1, b"wiki"));
    let Phase::Closing(reason) = session.phase() else {
        panic!("open");
    };
    assert!(reason.to_string().contains("web1 is primary"));
    assert!(drain(&mut session).is_empty());
}

#[test]
fn requests_and_replies() {
    let mut session = serving("mail", true, true);
    let mut bytes = wire::request(FUA, WRITE, 70, 4096, 8192);
    bytes.extend(vec![0xab; 8192]);
    bytes.extend(wire::request(DF, READ, 71, 10, 3));
    bytes.extend(wire::request(0, FLUSH, 72, 0, 0));
    bytes.extend(wire::request(0, TRIM, 73, 100, 12288));
    bytes.extend(wire::request(0, TRIM, 74, 100, 4000));
    bytes.extend(wire::request(NO_HOLE | FUA, WRITE_ZEROES, 75, 0, 4096));
    bytes.extend(wire::request(0, WRITE_ZEROES, 76, 0, 4096));
    bytes.extend(wire::request(REQ_ONE, BLOCK_STATUS, 77, 0, 65536));
    bytes.extend(wire::request(0, BLOCK_STATUS, 78, 4096, 8192));
    let requests = feed(&mut session, &bytes);
    let kinds: Vec<_> = requests.iter().map(|item| item.request.clone()).collect();
    assert_eq!(
        kinds,
        [
            BlockRequest::Write {
                range: ByteRange::new(4096, 8192),
                data: Bytes::from(vec![0xab; 8192]),
                fua: true
            },
            BlockRequest::Read {
                range: ByteRange::new(10, 3)
            },
            BlockRequest::Flush,
            BlockRequest::Discard {
                range: ByteRange::new(4096, 8192),
                fua: false
            },
            BlockRequest::Zero {
                range: ByteRange::new(0, 4096),
                may_release: false,
                fua: true
            },
            BlockRequest::Zero {
                range: ByteRange::new(0, 4096),
                may_release: true,
                fua: false
            },
            BlockRequest::Status {
                range: ByteRange::new(0, 65536),
                single: true
            },
            BlockRequest::Status {
                range: ByteRange::new(4096, 8192),
                single: false
            },
        ]
    );
    if let BlockRequest::Write { data, .. } = &kinds[0] {
        assert_eq!(data.as_ptr().addr() % 4096, 0);
    }
    // The trim without a whole block is answered without asking anybody.
    assert_eq!(drain(&mut session), simple_reply(0, 74));
    assert_eq!(session.under_way(), 8);

    // In any order, each with the client's cookie.
    session.reply(requests[1].tag, Ok(Bytes::from_static(b"abc")));
    let mut golden = chunk(1, 71, b"\0\0\0\0\0\0\0\x0aabc");
    session.reply(requests[0].tag, Ok(Bytes::new()));
    golden.extend(simple_reply(0, 70));
    session.reply(requests[2].tag, Err(Errno::Io));
    golden.extend(simple_reply(EIO, 72));
    let extents = [
        Extent {
            len: 4096,
            hole: true,
            zero: true,
        },
        Extent::data(1 << 40),
    ];
    session.reply_extents(requests[6].tag, &extents);
    golden.extend(chunk(5, 77, b"\0\0\0\x01\0\0\x10\0\0\0\0\x03"));
    session.reply_extents(requests[7].tag, &extents);
    golden.extend(chunk(
        5,
        78,
        b"\0\0\0\x01\0\0\x10\0\0\0\0\x03\0\0\x10\0\0\0\0\0",
    ));
    assert_eq!(drain(&mut session), golden);

    // Answered twice, or never asked: nothing.
    session.reply(requests[0].tag, Ok(Bytes::new()));
    assert!(drain(&mut session).is_empty());
    assert_eq!(session.under_way(), 3);

    // Goodbye: what is under way is still answered.
    feed(&mut session, &wire::request(0, DISC, 80, 0, 0));
    assert_eq!(session.phase(), Phase::Closing(&CloseReason::Disconnected));
    assert!(!session.is_finished());
    for request in &requests[3..6] {
        session.reply(request.tag, Ok(Bytes::new()));
    }
    assert!(!session.is_finished());
    drain(&mut session);
    assert!(session.is_finished());
}

#[test]
fn all_allocated_is_the_default_answer_to_block_status() {
    let mut session = serving("mail", true, true);
    let requests = feed(&mut session, &wire::request(0, BLOCK_STATUS, 1, 0, 65536));
    session.reply(requests[0].tag, Ok(Bytes::new()));
    assert_eq!(
        drain(&mut session),
        chunk(5, 1, b"\0\0\0\x01\0\x01\0\0\0\0\0\0")
    );
}

#[test]
fn simple_reads_and_a_read_of_the_wrong_length() {
    let mut session = serving("mail", false, false);
    let requests = feed(
        &mut session,
        &[
            wire::request(0, READ, 5, 0, 2),
            wire::request(0, READ, 6, 0, 2),
        ]
        .concat(),
    );
    session.reply(requests[0].tag, Ok(Bytes::from_static(b"ok")));
    session.reply(requests[1].tag, Ok(Bytes::from_static(b"longer")));
    let golden = [&simple_reply(0, 5)[..], b"ok", &simple_reply(EIO, 6)].concat();
    assert_eq!(drain(&mut session), golden);
}

/// What libnbd's and nbdkit's own checks expect of illegal requests; the session stays usable
/// after each.
#[test]
fn illegal_requests() {
    let end = SIZE;
    // (export, structured, context, flags, command, offset, length, error)
    let cases = [
        ("mail", true, true, 0, READ, end, 1, EINVAL),
        ("mail", true, true, 0, READ, end - 1, 2, EINVAL),
        ("mail", true, true, 0, READ, u64::MAX, 4096, EINVAL),
        ("mail", true, true, 0, READ, 0, 0, EINVAL),
        ("mail", true, true, 0, READ, 0, MAX_REQUEST + 1, EINVAL),
        ("mail", false, false, DF, READ, 0, 4096, EINVAL),
        ("mail", true, true, NO_HOLE, READ, 0, 4096, EINVAL),
        ("mail", true, true, 0, WRITE, end, 4096, ENOSPC),
        ("mail", true, true, 0, WRITE, u64::MAX - 4095, 4096, ENOSPC),
        ("mail", true, true, 0, WRITE, 0, 0, EINVAL),
        ("mail", true, true, 0, WRITE, 1, 4096, EINVAL),
        ("mail", true, true, 0, WRITE, 0, 4095, EINVAL),
        ("mail", true, true, 0, WRITE, 0, MAX_REQUEST + 4096, EINVAL),
        ("mail", true, true, DF, WRITE, 0, 4096, EINVAL),
        ("mail", true, true, 1 << 15, WRITE, 0, 4096, EINVAL),
        ("frozen", true, true, 0, WRITE, 0, 4096, EPERM),
        ("frozen", true, true, 0, TRIM, 0, 4096, EPERM),
        ("frozen", true, true, 0, WRITE_ZEROES, 0, 4096, EPERM),
        ("mail", true, true, 0, FLUSH, 4096, 0, EINVAL),
        ("mail", true, true, 0, FLUSH, 0, 1, EINVAL),
        ("mail", true, true, 0, TRIM, end, 4096, EINVAL),
        ("mail", true, true, 0, TRIM, 0, 0, EINVAL),
        ("mail", true, true, 0, WRITE_ZEROES, end, 4096, ENOSPC),
        ("mail", true, true, 0, WRITE_ZEROES, 512, 512, EINVAL),
        ("mail", true, true, FAST_ZERO, WRITE_ZEROES, 0, 4096, EINVAL),
        ("mail", true, false, 0, BLOCK_STATUS, 0, 4096, EINVAL),
        ("mail", true, true, 0, BLOCK_STATUS, end, 4096, EINVAL),
        ("mail", true, true, 0, BLOCK_STATUS, 0, 0, EINVAL),
        ("mail", true, true, DF, BLOCK_STATUS, 0, 4096, EINVAL),
        ("mail", true, true, 0, CACHE, 0, 4096, EINVAL),
        ("mail", true, true, 0, RESIZE, 0, 4096, EINVAL),
        ("mail", true, true, 0, 0xffff, 0, 4096, EINVAL),
    ];
    for case in cases {
        let (name, structured, context, flags, command, offset, len, error) = case;
        let mut session = serving(name, structured, context);
        let mut bytes = wire::request(flags, command, 9, offset, len);
        if command == WRITE {
            bytes.extend(vec![1; len as usize]);
        }
        assert!(feed(&mut session, &bytes).is_empty(), "{case:?}");
        let answer = drain(&mut session);
        let as_chunk = structured && matches!(command, READ | BLOCK_STATUS);
        let found = if as_chunk {
            assert_eq!(
                answer[..8],
                *b"\x66\x8e\x33\xef\x00\x01\x80\x01",
                "{case:?}"
            );
            assert_eq!(answer[8..16], 9u64.to_be_bytes());
            let payload = u32::from_be_bytes(answer[16..20].try_into().unwrap()) as usize;
            assert_eq!(answer.len(), 20 + payload);
            let text = u16::from_be_bytes(answer[24..26].try_into().unwrap()) as usize;
            assert_eq!(payload, 6 + text);
            u32::from_be_bytes(answer[20..24].try_into().unwrap())
        } else {
            assert_eq!(answer, simple_reply(error, 9), "{case:?}");
            error
        };
        assert_eq!(found, error, "{case:?}");
        // In step still.
        let requests = feed(&mut session, &wire::request(0, READ, 10, 0, 4096));
        assert_eq!(requests.len(), 1, "{case:?}");
    }
}

#[test]
fn a_bad_magic_ends_the_session_but_not_what_is_under_way() {
    let mut session = serving("mail", false, false);
    let mut bytes = wire::request(0, FLUSH, 3, 0, 0);
    bytes.extend(b"\xde\xad\xbe\xef garbage of more than one header's length");
    let requests = feed(&mut session, &bytes);
    assert_eq!(requests.len(), 1);
    assert!(matches!(
        session.phase(),
        Phase::Closing(CloseReason::Malformed(_))
    ));
    session.reply(requests[0].tag, Ok(Bytes::new()));
    assert_eq!(drain(&mut session), simple_reply(0, 3));
    assert!(session.is_finished());
}

#[test]
fn the_end_of_the_stream() {
    let mut session = negotiating();
    session.received(0);
    assert!(matches!(
        session.phase(),
        Phase::Closing(CloseReason::Lost(_))
    ));

    let mut session = serving("mail", false, false);
    session.received(0);
    assert_eq!(session.phase(), Phase::Closing(&CloseReason::Disconnected));

    for cut in [1, 27, 28, 2000] {
        let mut session = serving("mail", false, false);
        let mut bytes = wire::request(0, WRITE, 3, 0, 4096);
        bytes.extend(vec![0; 4096]);
        assert!(feed(&mut session, &bytes[..cut]).is_empty());
        session.received(0);
        assert!(
            matches!(session.phase(), Phase::Closing(CloseReason::Lost(_))),
            "{cut}"
        );
    }
}

#[test]
fn too_much_under_way_stops_the_input_until_answered() {
    let mut session = serving("mail", false, false);
    // A client that sends reads for ever and takes no answers.
    let burst: Vec<u8> = (0..100_000u64)
        .flat_map(|cookie| wire::request(0, READ, cookie, 0, SIZE as u32))
        .collect();
    let mut taken = 0;
    let mut requests = Vec::new();
    while session.wants_input() && taken < burst.len() {
        taken += session.receive(&burst[taken..]);
        requests.extend(std::iter::from_fn(|| session.next_request()));
    }
    assert_eq!(requests.len(), 64, "64 MiB of reads");
    assert!(taken < 1 << 20, "and a bounded buffer: {taken}");
    assert!(session.recv_buffer().is_empty());

    // Answers that are not sent still count.
    for request in requests.drain(..) {
        session.reply(request.tag, Ok(Bytes::from(vec![0; SIZE as usize])));
    }
    assert!(session.next_request().is_none());
    let mut slices = [IoSlice::new(&[]); 4];
    let used = session.output_slices(&mut slices);
    let sent: usize = slices[..used].iter().map(|slice| slice.len()).sum();
    session.sent(sent);
    assert!(session.next_request().is_some());
}

#[test]
fn small_requests_are_bounded_by_number() {
    let mut session = serving("mail", false, false);
    let burst: Vec<u8> = (0..1000)
        .flat_map(|cookie| wire::request(0, FLUSH, cookie, 0, 0))
        .collect();
    assert_eq!(session.receive(&burst), burst.len());
    let requests: Vec<_> = std::iter::from_fn(|| session.next_request()).collect();
    assert_eq!(requests.len(), 256);
    session.reply(requests[0].tag, Ok(Bytes::new()));
    assert!(session.next_request().is_some());
    assert!(session.next_request().is_none());
}

#[test]
fn closing_by_the_server() {
    let mut session = serving("mail", false, false);
    let requests = feed(&mut session, &wire::request(0, FLUSH, 1, 0, 0));
    session.close(CloseReason::ByServer("mail moves to web2".to_owned()));
    session.received(0);
    assert!(session.next_request().is_none());
    session.reply(requests[0].tag, Err(Errno::Shutdown));
    assert_eq!(drain(&mut session), simple_reply(108, 1));
    assert!(session.is_finished());
}

/// A whole conversation, with one write large enough to be received in place.
fn conversation() -> Vec<u8> {
    let mut bytes = CLIENT_FLAGS.to_vec();
    bytes.extend(wire::option(8, &[]));
    bytes.extend(wire::option(3, &[]));
    bytes.extend(wire::option(77, &vec![1; 20_000]));
    bytes.extend(wire::option(10, &contexts("mail", &["base:allocation"])));
    bytes.extend(wire::option(7, &info("mail", &[1, 2])));
    for round in 0..6u64 {
        let len = [4096, 200_704, 8192, 4096, 700_416, 4096][round as usize];
        bytes.extend(wire::request(0, WRITE, round * 10, 4096, len));
        bytes.extend((0..len).map(|byte| (byte / 7) as u8 ^ round as u8));
        bytes.extend(wire::request(0, READ, round * 10 + 1, round, 4096));
        bytes.extend(wire::request(0, WRITE, round * 10 + 2, SIZE, 40_960));
        bytes.extend(vec![2; 40_960]);
        bytes.extend(wire::request(0, BLOCK_STATUS, round * 10 + 3, 0, 4096));
    }
    bytes.extend(wire::request(0, DISC, 0, 0, 0));
    bytes
}

/// Feeds in the given pieces, answers at once; returns all requests and all output.
fn converse(bytes: &[u8], pieces: &[usize]) -> (Vec<NbdRequest>, Vec<u8>) {
    let mut session = Session::new(exports());
    let mut requests = Vec::new();
    let mut output = Vec::new();
    let mut pieces = pieces.iter().copied().cycle();
    let mut rest = bytes;
    while !rest.is_empty() && session.wants_input() {
        let piece = pieces.next().unwrap_or(usize::MAX).clamp(1, rest.len());
        let taken = session.receive(&rest[..piece]);
        rest = &rest[taken..];
        while let Some(request) = session.next_request() {
            let len = match &request.request {
                BlockRequest::Read { range } => range.len as usize,
                _ => 0,
            };
            session.reply(request.tag, Ok(Bytes::from(vec![0x11; len])));
            requests.push(request);
        }
        output.extend(drain(&mut session));
    }
    assert!(session.is_finished() || session.wants_input());
    (requests, output)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_gives_the_same(pieces in prop::collection::vec(
        prop_oneof![1usize..64, 1usize..5000, 1usize..300_000], 1..40))
    {
        let bytes = conversation();
        let whole = converse(&bytes, &[usize::MAX]);
        prop_assert_eq!(whole.0.len(), 18);
        let split = converse(&bytes, &pieces);
        prop_assert!(whole == split);
    }

    #[test]
    fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..4000),
        pieces in prop::collection::vec(1usize..200, 1..10))
    {
        converse(&garbage, &pieces);
    }

    /// A valid conversation with some bytes changed gets past the magic numbers.
    #[test]
    fn damaged_conversations_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        early in any::<bool>())
    {
        let mut bytes = conversation();
        let reach = if early { 21_000 } else { bytes.len() };
        for (index, value) in damage {
            bytes[index.index(reach)] = value;
        }
        converse(&bytes, &[8192]);
    }

    #[test]
    fn random_requests_never_panic(headers in prop::collection::vec(
        (any::<u16>(), 0u16..10, any::<u64>(), prop_oneof![0..SIZE + 9000, any::<u64>()],
         prop_oneof![0u32..10_000, any::<u32>()]), 1..20))
    {
        let mut session = serving("mail", true, true);
        for (flags, command, cookie, offset, len) in headers {
            let mut bytes = wire::request(flags & 0x1f, command, cookie, offset, len);
            if command == WRITE {
                bytes.extend(vec![3; (len as usize).min(50_000)]);
            }
            for request in feed(&mut session, &bytes) {
                prop_assert!(request.request.range().end() <= SIZE);
                session.reply(request.tag, Ok(Bytes::new()));
            }
            drain(&mut session);
        }
    }
}

/// Small and large ones, some always under way.
#[test]
fn writes_allocate_nothing() {
    let mut session = serving("mail", false, false);
    let stream: Vec<Vec<u8>> = [4096, 4096, 4096, 256 << 10]
        .iter()
        .map(|len| {
            let mut bytes = request(0, WRITE, 7, 0, *len);
            bytes.resize(bytes.len() + *len as usize, 9);
            bytes
        })
        .collect();
    let mut under_way = VecDeque::with_capacity(32);
    let mut allocated = 0;
    for round in 0..2000 {
        let before = allocations::so_far();
        let mut rest = &stream[round % stream.len()][..];
        while !rest.is_empty() {
            let taken = session.receive(rest);
            rest = &rest[taken..];
            while let Some(request) = session.next_request() {
                under_way.push_back(request);
            }
        }
        if under_way.len() > 16 {
            let answered = under_way.pop_front().unwrap();
            session.reply(answered.tag, Ok(Bytes::new()));
            drop(answered);
            let mut slices = [IoSlice::new(&[]); 4];
            assert_eq!(session.output_slices(&mut slices), 1);
            session.sent(16);
        }
        if round >= 1000 {
            allocated += allocations::so_far() - before;
        }
    }
    assert_eq!(allocated, 0, "in 1000 writes");
}
