//! `docs/wire.md` says what the code does: its tables and examples are read here and compared with
//! the encoder and the decoder. Who adds a kind of message is told what to write.

use std::{collections::BTreeSet, fs, path::Path};

use relevo_types::{BlockRange, ByteRange, cluster::Encryption};
use relevo_wire::{
    Body, Decoder, FrameError, LinkHello, Message, Refusal, encode,
    frame::{HEADER_BYTES, MAX_BLOCK_RUNS, MAX_DATA_BYTES, MAX_DIGESTS, MAX_FIELD_BYTES, is_known},
};
use said::fuzz::Random;

use crate::corpus;

/// A row of a table.
#[derive(Clone, Debug)]
struct Row {
    offset: usize,
    /// Bytes; `None`: to the end.
    size: Option<usize>,
    /// `16 each`: pieces of this many bytes, to the end.
    each: Option<usize>,
    field: String,
}

/// A piece of the page under a heading: tables, each with the examples that follow it.
#[derive(Debug)]
struct Section {
    heading: String,
    text: String,
    tables: Vec<(Vec<Row>, Vec<Vec<u8>>)>,
}

fn page() -> Vec<Section> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/wire.md");
    let page = fs::read_to_string(path).unwrap();
    let mut sections: Vec<Section> = Vec::new();
    let mut example = String::new();
    for line in page.lines().chain(["# end"]) {
        if line.starts_with("    ") {
            example += line.trim();
            continue;
        }
        if !example.is_empty() {
            let section = sections.last_mut().unwrap();
            if section.tables.is_empty() {
                section.tables.push((Vec::new(), Vec::new()));
            }
            section
                .tables
                .last_mut()
                .unwrap()
                .1
                .push(bytes(&std::mem::take(&mut example)));
        }
        if line.starts_with('#') {
            sections.push(Section {
                heading: line.trim_start_matches('#').trim().to_owned(),
                text: String::new(),
                tables: Vec::new(),
            });
            continue;
        }
        let section = sections.last_mut().unwrap();
        section.text += line;
        section.text.push('\n');
        if line.starts_with("| offset |") {
            section.tables.push((Vec::new(), Vec::new()));
        } else if let Some(row) = row(line) {
            section.tables.last_mut().unwrap().0.push(row);
        }
    }
    sections
}

/// `| 8 | 8 | seq | meaning |`, and nothing else.
fn row(line: &str) -> Option<Row> {
    let mut cells = line.strip_prefix("| ")?.split(" | ");
    let offset = cells.next()?.parse().ok()?;
    let size = cells.next()?;
    let each = size.strip_suffix(" each").map(|size| size.parse().unwrap());
    Some(Row {
        offset,
        size: size.parse().ok(),
        each,
        field: cells.next()?.to_owned(),
    })
}

fn bytes(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2), "half a byte: {hex}");
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

fn section<'a>(page: &'a [Section], heading: &str) -> &'a Section {
    page.iter()
        .find(|section| section.heading == heading)
        .unwrap_or_else(|| panic!("docs/wire.md has no section {heading:?}"))
}

/// The bytes of each row: every byte belongs to exactly one.
fn split<'a>(rows: &[Row], bytes: &'a [u8]) -> Vec<(String, &'a [u8])> {
    let mut at = 0;
    let mut parts = Vec::new();
    for row in rows {
        assert_eq!(row.offset, at, "{rows:?}: the rows leave a gap");
        let size = row.size.unwrap_or_else(|| bytes.len().saturating_sub(at));
        let part = bytes.get(at..at + size);
        let part = part.unwrap_or_else(|| panic!("{row:?} is beyond the end of the example"));
        if let Some(each) = row.each {
            assert!(part.len().is_multiple_of(each), "{row:?}: a piece is cut");
        }
        parts.push((row.field.clone(), part));
        at += size;
    }
    assert_eq!(at, bytes.len(), "{rows:?} does not cover the example");
    parts
}

/// What a frame means, and how many bytes of it are fields.
fn decode(frame: &[u8]) -> Result<Option<Message>, FrameError> {
    let mut decoder = Decoder::new();
    let mut rest = frame;
    let message = decoder.take(&mut rest);
    assert!(message.is_err() || rest.is_empty());
    message
}

fn encoded(message: &Message) -> Vec<u8> {
    let encoded = encode(message).unwrap();
    let mut all = encoded.head.to_vec();
    all.extend_from_slice(encoded.data.as_deref().unwrap_or_default());
    all
}

/// A frame with good checksums around any fields.
fn sealed(kind: u8, fields: &[u8]) -> Vec<u8> {
    let mut frame = encoded(&Message::Ping);
    frame[3] = kind;
    frame[4..8].copy_from_slice(&u32::try_from(fields.len()).unwrap().to_le_bytes());
    frame[12..16].copy_from_slice(&crc32c::crc32c(fields).to_le_bytes());
    let crc = crc32c::crc32c(&frame[..20]);
    frame[20..24].copy_from_slice(&crc.to_le_bytes());
    frame.extend_from_slice(fields);
    frame
}

/// The kinds that the decoder knows.
fn kinds() -> BTreeSet<u8> {
    (0..=u8::MAX).filter(|kind| is_known(*kind)).collect()
}

fn name_of(message: &Message) -> String {
    let text = format!("{message:?}");
    let end = text.find(|c: char| !c.is_alphanumeric());
    text[..end.unwrap_or(text.len())].to_owned()
}

fn number(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn runs(blocks: &[BlockRange]) -> Vec<u8> {
    let numbers = blocks.iter().flat_map(|run| [run.first, run.count]);
    numbers.flat_map(u64::to_le_bytes).collect()
}

/// The fields of a message by the names of the page, in the order of the page.
fn fields(message: &Message) -> Vec<(&'static str, Vec<u8>)> {
    let epoch_and = |epoch: &relevo_types::Epoch, name, value: Vec<u8>| {
        vec![("epoch", number(epoch.0)), (name, value)]
    };
    let written = |range: &ByteRange, body: &Body| {
        let body = u8::from(matches!(body, Body::Zeroes));
        vec![
            ("range.offset", number(range.offset)),
            ("range.len", number(range.len)),
            ("body", vec![body]),
        ]
    };
    match message {
        Message::Hello(info) => vec![
            ("node", info.node.0.to_le_bytes().to_vec()),
            ("instance", number(info.instance.0)),
            ("lineage", number(info.lineage.0)),
            ("epoch", number(info.epoch.0)),
        ],
        Message::StartSync { epoch }
        | Message::Reconcile { epoch }
        | Message::Following { epoch } => vec![("epoch", number(epoch.0))],
        Message::Write {
            epoch,
            seq,
            complete,
            range,
            body,
            fua,
            dirty_for,
        } => {
            let mut all = epoch_and(epoch, "seq", number(seq.0));
            all.push(("complete", number(complete.0)));
            all.extend(written(range, body));
            all.push(("fua", vec![u8::from(*fua)]));
            all.push(("dirty_for", vec![*dirty_for]));
            all
        }
        Message::ReadBlocks { epoch, id, blocks } => {
            let mut all = epoch_and(epoch, "id", number(*id));
            all.push(("first", number(blocks.first)));
            all.push(("count", number(blocks.count)));
            all
        }
        Message::SyncWrite {
            epoch,
            id,
            range,
            body,
        }
        | Message::Content {
            epoch,
            id,
            range,
            body,
        } => {
            let mut all = epoch_and(epoch, "id", number(*id));
            all.extend(written(range, body));
            all
        }
        Message::Flush { epoch, id }
        | Message::Barrier { epoch, id }
        | Message::Behind { epoch, id }
        | Message::FlushAck { epoch, id }
        | Message::SyncAck { epoch, id }
        | Message::BarrierAck { epoch, id } => epoch_and(epoch, "id", number(*id)),
        Message::Complete { epoch, seq }
        | Message::WriteAck { epoch, seq }
        | Message::Received { epoch, seq } => epoch_and(epoch, "seq", number(seq.0)),
        Message::DirtyMap {
            epoch,
            slot,
            blocks,
        } => {
            let mut all = epoch_and(epoch, "slot", vec![slot.0]);
            all.push(("blocks", runs(blocks)));
            all
        }
        Message::EpochUpdate { epoch, in_sync } => epoch_and(epoch, "in_sync", vec![*in_sync]),
        Message::Uncertain {
            epoch,
            blocks,
            last,
        } => {
            let mut all = epoch_and(epoch, "last", vec![u8::from(*last)]);
            all.push(("blocks", runs(blocks)));
            all
        }
        Message::Tail {
            epoch,
            blocks,
            certain,
        } => {
            let mut all = epoch_and(epoch, "certain", vec![u8::from(*certain)]);
            all.push(("blocks", runs(blocks)));
            all
        }
        Message::Refuse(refusal) => refused(refusal),
        Message::PauseSync { paused } => vec![("paused", vec![u8::from(*paused)])],
        Message::Changes { blocks, consistent } => vec![
            ("blocks", number(*blocks)),
            ("consistent", vec![u8::from(*consistent)]),
        ],
        Message::Digests {
            epoch,
            id,
            first,
            digests,
        }
        | Message::SyncDigests {
            epoch,
            id,
            first,
            digests,
        } => {
            let mut all = epoch_and(epoch, "id", number(*id));
            all.push(("first", number(*first)));
            let digests = digests.iter().flat_map(|digest| digest.0);
            all.push(("digests", digests.collect()));
            all
        }
        Message::Differ { epoch, id, blocks } | Message::SyncDiffer { epoch, id, blocks } => {
            let mut all = epoch_and(epoch, "id", number(*id));
            all.push(("blocks", runs(blocks)));
            all
        }
        Message::Verifying { epoch, active } => epoch_and(epoch, "active", vec![u8::from(*active)]),
        Message::Receipts { epoch, wanted } => epoch_and(epoch, "wanted", vec![u8::from(*wanted)]),
        Message::Generation {
            epoch,
            slot,
            confirmed,
        } => {
            let mut all = epoch_and(epoch, "slot", vec![slot.0]);
            all.push(("confirmed", vec![u8::from(*confirmed)]));
            all
        }
        Message::Ping | Message::Pong | Message::Moved => Vec::new(),
        #[allow(
            unreachable_patterns,
            reason = "a new message fails the test, with words"
        )]
        other => panic!(
            "{} is not known here: give its fields, by name and in the order of the wire, in \
             crates/wire/tests/it/document.rs, and describe it in docs/wire.md",
            name_of(other)
        ),
    }
}

fn refused(refusal: &Refusal) -> Vec<(&'static str, Vec<u8>)> {
    let text =
        |number: u8, text: &str| vec![("reason", vec![number]), ("text", text.as_bytes().to_vec())];
    let pair = |reason: u8, a: (&'static str, u64), b: (&'static str, u64)| {
        vec![
            ("reason", vec![reason]),
            (a.0, number(a.1)),
            (b.0, number(b.1)),
        ]
    };
    match refusal {
        Refusal::StaleEpoch { given, seen } => pair(0, ("given", given.0), ("seen", seen.0)),
        Refusal::Disk { reason } => text(2, reason),
        Refusal::Protocol { reason } => text(3, reason),
        Refusal::StandAlone { reason } => text(4, reason),
        Refusal::SplitBrain { ours, theirs, why } => {
            let mut all = pair(5, ("ours", *ours), ("theirs", *theirs));
            all.push(("text", why.as_bytes().to_vec()));
            all
        }
        #[allow(
            unreachable_patterns,
            reason = "a new reason fails the test, with words"
        )]
        other => panic!(
            "the refusal {other:?} is not known here: give its number and fields in \
             crates/wire/tests/it/document.rs, and a table and an example of it in docs/wire.md"
        ),
    }
}

/// The number and name of a section about a message.
fn message_heading(heading: &str) -> Option<(u8, &str)> {
    let (kind, name) = heading.split_once(' ')?;
    Some((kind.parse().ok()?, name))
}

#[test]
fn every_kind_of_the_code_is_described() {
    let page = page();
    let described: Vec<u8> = page
        .iter()
        .filter_map(|section| Some(message_heading(&section.heading)?.0))
        .collect();
    assert!(
        described.is_sorted_by(|a, b| a < b),
        "not in order: {described:?}"
    );
    let described: BTreeSet<u8> = described.into_iter().collect();
    let known = kinds();
    if let Some(kind) = known.difference(&described).next() {
        panic!(
            "docs/wire.md does not describe kind {kind}. Under \"## Messages\", in the order of the \
             numbers, it needs: \"### {kind} NAME\", NAME as in the code; a paragraph that begins with \
             the direction (\"*primary → replica.*\", \"*replica → primary.*\" or \"*both.*\") and says \
             when it is sent, what the receiver must do, and what it refuses; the table \"| offset | \
             size | field | meaning |\" of its fields; and a whole frame as an example, in hex, indented \
             by four. This test then checks both against the code."
        );
    }
    assert_eq!(
        described, known,
        "the page describes what the code does not know"
    );
}

#[test]
fn tables_and_examples_are_what_the_code_reads_and_writes() {
    let mut refusals = BTreeSet::new();
    for section in page() {
        let Some((kind, name)) = message_heading(&section.heading) else {
            continue;
        };
        assert!(
            ["*primary → replica", "*replica → primary", "*both"]
                .iter()
                .any(|way| section.text.trim_start().starts_with(way)),
            "### {}: the text does not begin with a direction",
            section.heading
        );
        let examples: usize = section.tables.iter().map(|(_, all)| all.len()).sum();
        assert!(examples > 0, "### {}: no example", section.heading);
        for (rows, examples) in &section.tables {
            assert!(
                !examples.is_empty(),
                "### {}: a table without an example",
                section.heading
            );
            for frame in examples {
                let message = decode(frame)
                    .unwrap_or_else(|error| panic!("### {}: {error}", section.heading))
                    .unwrap_or_else(|| panic!("### {}: the frame is cut", section.heading));
                assert_eq!(name_of(&message), name, "### {}", section.heading);
                assert_eq!(frame[3], kind, "### {}", section.heading);
                assert_eq!(&encoded(&message), frame, "### {}", section.heading);
                let field_len = u32::from_le_bytes(frame[4..8].try_into().unwrap()) as usize;
                let field_bytes = &frame[HEADER_BYTES..HEADER_BYTES + field_len];
                let written: Vec<(String, Vec<u8>)> = split(rows, field_bytes)
                    .into_iter()
                    .map(|(field, bytes)| (field, bytes.to_vec()))
                    .collect();
                let meant: Vec<(String, Vec<u8>)> = fields(&message)
                    .into_iter()
                    .map(|(field, bytes)| (field.to_owned(), bytes))
                    .collect();
                assert_eq!(written, meant, "### {}: {message:?}", section.heading);
                // One byte less or more is another kind's frame, or none.
                if rows.iter().all(|row| row.size.is_some())
                    && field_len == frame.len() - HEADER_BYTES
                {
                    let longer = [field_bytes, &[0]].concat();
                    assert!(decode(&sealed(kind, &longer)).is_err());
                    if let Some((_, shorter)) = field_bytes.split_last() {
                        assert!(decode(&sealed(kind, shorter)).is_err());
                    }
                }
                if let Message::Refuse(_) = message {
                    refusals.insert(field_bytes[0]);
                }
            }
        }
    }
    // Each reason to refuse that the decoder knows has an example.
    let pair = [7; 16];
    for reason in 0..=u8::MAX {
        let known = [&[][..], &pair].iter().any(|rest| {
            let fields = [&[reason], *rest].concat();
            !decode(&sealed(17, &fields))
                .is_err_and(|error| error.to_string().contains("unknown reason"))
        });
        assert_eq!(
            refusals.contains(&reason),
            known,
            "### 17 Refuse: reason {reason} stands there without being known, or is known and has no example"
        );
    }
}

#[test]
fn greeting_header_and_bounds() {
    let page = page();
    let (rows, examples) = &section(&page, "Greeting").tables[0];
    let greeting: [u8; 36] = examples[0].as_slice().try_into().unwrap();
    let hello = LinkHello::decode(&greeting).unwrap();
    assert_eq!(hello.encode(), greeting);
    let meant: [(&str, Vec<u8>); 8] = [
        ("magic", b"RELEVODL".to_vec()),
        ("protocol_min", vec![hello.protocol_min.0]),
        ("protocol_max", vec![hello.protocol_max.0]),
        ("flags", vec![u8::from(hello.encryption == Encryption::Off)]),
        ("reserved", vec![0]),
        ("cluster", hello.cluster.0.to_vec()),
        ("volume", hello.volume.0.to_le_bytes().to_vec()),
        (
            "crc",
            crc32c::crc32c(&greeting[..32]).to_le_bytes().to_vec(),
        ),
    ];
    let plain: [u8; 36] = examples[1].as_slice().try_into().unwrap();
    let encryption = Encryption::Off;
    assert_eq!(
        LinkHello::decode(&plain),
        Ok(LinkHello {
            encryption,
            ..hello
        })
    );
    let written = split(rows, &greeting);
    assert_eq!(written.len(), meant.len());
    for ((field, bytes), (name, value)) in written.into_iter().zip(meant) {
        assert_eq!((field.as_str(), bytes), (name, value.as_slice()));
    }

    let frame_section = section(&page, "Frame");
    let rows = &frame_section.tables[0].0;
    let write = &section(&page, "3 Write").tables[0].1[0];
    let (fields, data) = (&write[24..write.len() - 4], &write[write.len() - 4..]);
    let meant: [(&str, Vec<u8>); 8] = [
        ("magic", vec![0x52, 0x76]),
        ("version", vec![1]),
        ("kind", vec![3]),
        (
            "field_len",
            u32::try_from(fields.len()).unwrap().to_le_bytes().to_vec(),
        ),
        ("data_len", vec![4, 0, 0, 0]),
        ("field_crc", crc32c::crc32c(fields).to_le_bytes().to_vec()),
        ("data_crc", crc32c::crc32c(data).to_le_bytes().to_vec()),
        (
            "header_crc",
            crc32c::crc32c(&write[..20]).to_le_bytes().to_vec(),
        ),
    ];
    let written = split(rows, &write[..HEADER_BYTES]);
    assert_eq!(written.len(), meant.len());
    for ((field, bytes), (name, value)) in written.into_iter().zip(meant) {
        assert_eq!((field.as_str(), bytes), (name, value.as_slice()));
    }
    for (what, bound) in [
        ("header", HEADER_BYTES),
        ("fields at most", MAX_FIELD_BYTES),
        ("data at most", MAX_DATA_BYTES),
        ("runs of blocks in a frame at most", MAX_BLOCK_RUNS),
        ("digests in a frame at most", MAX_DIGESTS),
    ] {
        let line = format!("| {what} | {bound} |\n");
        assert!(
            frame_section.text.contains(&line),
            "docs/wire.md, Frame: {line}"
        );
    }
}

#[test]
fn the_fuzzers_corpus_has_every_kind() {
    let mut random = Random::new(1);
    let mut made = BTreeSet::new();
    for kind in 0..corpus::KINDS {
        made.insert(encoded(&corpus::of_kind(kind, &mut random))[3]);
    }
    assert_eq!(
        made,
        kinds(),
        "the messages of crates/wire/tests/it/corpus.rs (left) are not all kinds of the code (right)"
    );
}
