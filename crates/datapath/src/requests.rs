//! What exports ask, cut to what the engine takes.
//!
//! The engine writes whole blocks of 4 KiB and moves a bounded amount per request; clients write any
//! range. A large request becomes several; the blocks at an unaligned write's edges are read,
//! merged and written. Between the read and the write of an edge no other write may touch its
//! block, from whichever session: such writes wait here, in order. Owned by the volume's thread.

use std::collections::{HashMap, VecDeque};

use bytes::{Bytes, BytesMut};
use relevo_export::{BlockRequest, Errno};
use relevo_replication::{AppRequest, ReplyError, RequestId};
use relevo_types::{BLOCK_SIZE, BlockRange, ByteRange};
use relevo_wire::Body;

/// Data in one engine request, in bytes: a quarter of what a frame may carry, so that
/// acknowledgements behind it do not wait long.
const DATA_MAX: u64 = 1 << 20;

/// Zeroes in one engine request, in bytes: carries no data, but touches the activity log's regions
/// (256 of 1 MiB at once).
const ZEROES_MAX: u64 = 16 << 20;

/// Parts of one request with the engine at once: keeps the disk busy, and a trim of 4 GiB from
/// crowding out everybody else.
const PARTS_AT_ONCE: usize = 8;

/// The requests of a volume on their way. `O` is where an answer goes.
#[derive(Debug)]
pub(crate) struct Requests<O> {
    next: u64,
    whole: HashMap<WholeId, Whole<O>>,
    /// Engine requests under way, and whose part they are.
    parts: HashMap<RequestId, Part>,
    /// Writes that wait for others, oldest first.
    waiting: VecDeque<WholeId>,
    /// Writes under way with unaligned edges, and the blocks that they keep.
    kept: Vec<(WholeId, BlockRange)>,
    /// For the engine.
    pub(crate) to_engine: VecDeque<(RequestId, AppRequest)>,
    /// Answers.
    pub(crate) finished: VecDeque<(O, Result<Bytes, Errno>)>,
}

type WholeId = u64;

#[derive(Debug)]
struct Whole<O> {
    origin: O,
    work: Work,
    /// Not given to the engine yet.
    todo: Todo,
    /// With the engine.
    under_way: usize,
    error: Option<Errno>,
}

/// Parts in line. Most requests have one, for which nothing is allocated.
#[derive(Debug, Default)]
struct Todo {
    first: Option<(Role, AppRequest)>,
    rest: VecDeque<(Role, AppRequest)>,
}

#[derive(Debug)]
enum Work {
    /// A flush; a discard of nothing.
    Plain,
    /// Bytes of a read, by part.
    Read {
        parts: Vec<Option<Bytes>>,
    },
    Write(Write),
}

#[derive(Debug)]
struct Write {
    range: ByteRange,
    body: Body,
    fua: bool,
    blocks: BlockRange,
    /// The edge blocks, with their old content once it was read.
    edges: Vec<(u64, Option<Bytes>)>,
    started: bool,
    /// Edges are read; the writes are on their way.
    writing: bool,
}

/// What a part is within its whole.
#[derive(Clone, Copy, Debug)]
enum Role {
    /// Nothing to keep of its answer.
    Plain,
    /// The n-th piece of a read.
    Piece(usize),
    /// The old content of the n-th edge.
    Edge(usize),
}

#[derive(Debug)]
struct Part {
    whole: WholeId,
    role: Role,
}

/// Requests under way for which there is room at first: twice what most clients have. Tables that are at most half
/// full make room for what comes among what went, instead of growing at some moment that chance decides.
const ROOM: usize = 64;

impl<O> Default for Requests<O> {
    fn default() -> Self {
        Self {
            next: 0,
            whole: HashMap::with_capacity(ROOM),
            parts: HashMap::with_capacity(ROOM),
            waiting: VecDeque::new(),
            kept: Vec::new(),
            to_engine: VecDeque::new(),
            finished: VecDeque::new(),
        }
    }
}

impl<O> Requests<O> {
    /// Takes a request; its range lies within the volume. Afterwards `to_engine` and `finished`
    /// hold what follows from it.
    pub(crate) fn submit(&mut self, origin: O, request: BlockRequest) {
        let mut todo = Todo::default();
        let work = match request {
            BlockRequest::Read { range } => {
                todo = cut(range, DATA_MAX)
                    .enumerate()
                    .map(|(n, piece)| (Role::Piece(n), AppRequest::Read(piece)))
                    .collect();
                Work::Read {
                    parts: vec![None; todo.len()],
                }
            }
            BlockRequest::Flush => {
                todo.push((Role::Plain, AppRequest::Flush));
                Work::Plain
            }
            BlockRequest::Write { range, data, fua } => Write::of(range, Body::Data(data), fua),
            // Releasing storage is fine for both: replicas are sparse where they can be, so
            // keeping it allocated could not promise that later writes find space.
            BlockRequest::Zero { range, fua, .. } => Write::of(range, Body::Zeroes, fua),
            // Whole blocks only; the rest of a discard may be ignored.
            BlockRequest::Discard { range, fua } => {
                Write::of(range.blocks_covered().bytes(), Body::Zeroes, fua)
            }
            // No extents: all of it counts as data.
            BlockRequest::Status { .. } => Work::Plain,
        };
        let id = self.next;
        self.next += 1;
        let whole = Whole {
            origin,
            work,
            todo,
            under_way: 0,
            error: None,
        };
        let is_write = matches!(whole.work, Work::Write(_));
        self.whole.insert(id, whole);
        if !is_write {
            self.go_on(id);
        } else if self.must_wait(id, self.waiting.len()) {
            self.waiting.push_back(id);
        } else {
            self.start_write(id);
        }
    }

    /// Takes the engine's answer to a request of `to_engine`.
    pub(crate) fn reply(&mut self, id: RequestId, result: Result<Bytes, ReplyError>) {
        let Some(part) = self.parts.remove(&id) else {
            return;
        };
        let Some(whole) = self.whole.get_mut(&part.whole) else {
            return;
        };
        whole.under_way -= 1;
        match (result, part.role, &mut whole.work) {
            (Ok(bytes), Role::Piece(n), Work::Read { parts }) => parts[n] = Some(bytes),
            (Ok(bytes), Role::Edge(n), Work::Write(write)) => write.edges[n].1 = Some(bytes),
            (Ok(_), _, _) => {}
            (Err(error), _, _) => {
                whole.error.get_or_insert_with(|| errno(error));
                whole.todo = Todo::default();
            }
        }
        self.go_on(part.whole);
    }

    /// Requests not answered.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.whole.len()
    }

    /// Hands over the next parts, or finishes.
    fn go_on(&mut self, id: WholeId) {
        let Some(whole) = self.whole.get_mut(&id) else {
            return;
        };
        let idle = whole.todo.is_empty() && whole.under_way == 0 && whole.error.is_none();
        if let Work::Write(write) = &mut whole.work
            && idle
            && !write.writing
        {
            write.writing = true;
            whole.todo = write.parts();
        }
        while whole.under_way < PARTS_AT_ONCE
            && let Some((role, request)) = whole.todo.pop()
        {
            let part = RequestId(self.next);
            self.next += 1;
            whole.under_way += 1;
            self.parts.insert(part, Part { whole: id, role });
            self.to_engine.push_back((part, request));
        }
        if whole.under_way == 0 {
            self.finish(id);
        }
    }

    fn finish(&mut self, id: WholeId) {
        let Some(whole) = self.whole.remove(&id) else {
            return;
        };
        let is_write = matches!(whole.work, Work::Write(_));
        let result = match (whole.error, whole.work) {
            (Some(error), _) => Err(error),
            (None, Work::Read { parts }) => Ok(join(parts)),
            (None, Work::Plain | Work::Write(_)) => Ok(Bytes::new()),
        };
        self.finished.push_back((whole.origin, result));
        if is_write {
            self.kept.retain(|(keeper, _)| *keeper != id);
            self.start_waiting();
        }
    }

    /// Whether a write must wait: for an unaligned write that keeps its blocks, for one that came
    /// before it and waits, or, when it is unaligned itself, for any write to its blocks.
    fn must_wait(&self, id: WholeId, waiting_before: usize) -> bool {
        let Some(write) = self.write(id) else {
            return false;
        };
        let blocks = write.blocks;
        let meets = |other: BlockRange| blocks.overlaps(&other);
        self.kept.iter().any(|(_, kept)| meets(*kept))
            || self
                .waiting
                .iter()
                .take(waiting_before)
                .any(|earlier| self.write(*earlier).is_some_and(|w| meets(w.blocks)))
            || !write.edges.is_empty()
                && self.whole.iter().any(|(other, whole)| match &whole.work {
                    Work::Write(w) => *other != id && w.started && meets(w.blocks),
                    Work::Plain | Work::Read { .. } => false,
                })
    }

    fn write(&self, id: WholeId) -> Option<&Write> {
        match &self.whole.get(&id)?.work {
            Work::Write(write) => Some(write),
            Work::Plain | Work::Read { .. } => None,
        }
    }

    fn start_waiting(&mut self) {
        let mut at = 0;
        while let Some(id) = self.waiting.get(at).copied() {
            if self.must_wait(id, at) {
                at += 1;
            } else {
                self.waiting.remove(at);
                self.start_write(id);
            }
        }
    }

    fn start_write(&mut self, id: WholeId) {
        let Some(whole) = self.whole.get_mut(&id) else {
            return;
        };
        let Work::Write(write) = &mut whole.work else {
            return;
        };
        write.started = true;
        if !write.edges.is_empty() {
            self.kept.push((id, write.blocks));
            let reads = write.edges.iter().enumerate().map(|(n, (block, _))| {
                let block = BlockRange::new(*block, 1).bytes();
                (Role::Edge(n), AppRequest::Read(block))
            });
            whole.todo = reads.collect();
        }
        self.go_on(id);
    }
}

impl Todo {
    fn push(&mut self, part: (Role, AppRequest)) {
        if self.is_empty() {
            self.first = Some(part);
        } else {
            self.rest.push_back(part);
        }
    }

    fn pop(&mut self) -> Option<(Role, AppRequest)> {
        self.first.take().or_else(|| self.rest.pop_front())
    }

    fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl FromIterator<(Role, AppRequest)> for Todo {
    fn from_iter<I: IntoIterator<Item = (Role, AppRequest)>>(parts: I) -> Self {
        let mut todo = Self::default();
        parts.into_iter().for_each(|part| todo.push(part));
        todo
    }
}

impl Write {
    fn of(range: ByteRange, body: Body, fua: bool) -> Work {
        let blocks = range.blocks_touched();
        let mut edges = Vec::new();
        if range.len > 0 {
            if !range.offset.is_multiple_of(BLOCK_SIZE) {
                edges.push((blocks.first, None));
            }
            let last = blocks.end() - 1;
            let is_new = edges.first().is_none_or(|(block, _)| *block != last);
            if !range.end().is_multiple_of(BLOCK_SIZE) && is_new {
                edges.push((last, None));
            }
        }
        Work::Write(Self {
            range,
            body,
            fua,
            blocks,
            edges,
            started: false,
            writing: false,
        })
    }

    /// The engine's writes, now that the edges are known.
    fn parts(&mut self) -> Todo {
        let mut parts = Todo::default();
        for (block, old) in std::mem::take(&mut self.edges) {
            let old = old.unwrap_or_default();
            let range = BlockRange::new(block, 1).bytes();
            let body = Body::Data(self.merge(range, &old));
            let fua = self.fua;
            parts.push((Role::Plain, AppRequest::Write { range, body, fua }));
        }
        let max = match self.body {
            Body::Data(_) => DATA_MAX,
            Body::Zeroes => ZEROES_MAX,
        };
        for range in cut(self.range.blocks_covered().bytes(), max) {
            let body = match &self.body {
                Body::Data(data) => {
                    let from = index(range.offset - self.range.offset);
                    Body::Data(data.slice(from..from + index(range.len)))
                }
                Body::Zeroes => Body::Zeroes,
            };
            let fua = self.fua;
            parts.push((Role::Plain, AppRequest::Write { range, body, fua }));
        }
        parts
    }

    /// An edge block: what was there, with what this write puts over it.
    fn merge(&self, block: ByteRange, old: &Bytes) -> Bytes {
        assert_eq!(old.len() as u64, block.len, "an edge is read whole");
        let mut merged = BytesMut::from(&old[..]);
        let from = self.range.offset.max(block.offset);
        let to = self.range.end().min(block.end());
        let target = &mut merged[index(from - block.offset)..index(to - block.offset)];
        match &self.body {
            Body::Data(data) => {
                let first = index(from - self.range.offset);
                target.copy_from_slice(&data[first..first + target.len()]);
            }
            Body::Zeroes => target.fill(0),
        }
        merged.freeze()
    }
}

/// Cuts a range at multiples of `max`, a multiple of the block size.
fn cut(range: ByteRange, max: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = range.offset;
    std::iter::from_fn(move || {
        (at < range.end()).then(|| {
            let end = ((at / max + 1) * max).min(range.end());
            let piece = ByteRange::new(at, end - at);
            at = end;
            piece
        })
    })
}

fn join(parts: Vec<Option<Bytes>>) -> Bytes {
    let mut parts = parts.into_iter().flatten();
    let first = parts.next().unwrap_or_default();
    let mut rest = parts.peekable();
    if rest.peek().is_none() {
        return first;
    }
    let mut all = BytesMut::from(&first[..]);
    rest.for_each(|part| all.extend_from_slice(&part));
    all.freeze()
}

/// An offset within data in memory.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

const fn errno(error: ReplyError) -> Errno {
    match error {
        ReplyError::Invalid => Errno::Invalid,
        ReplyError::NotPrimary => Errno::Shutdown,
        ReplyError::Io => Errno::Io,
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "small numbers as fill bytes"
)]
mod tests {
    use super::*;

    /// An engine on a piece of memory that answers newest first when told to.
    struct Engine {
        memory: Vec<u8>,
        requests: Requests<u32>,
        under_way: Vec<(RequestId, AppRequest)>,
    }

    impl Engine {
        fn new(len: usize) -> Self {
            Self {
                memory: (0..len).map(|i| (i % 249) as u8).collect(),
                requests: Requests::default(),
                under_way: Vec::new(),
            }
        }

        fn take(&mut self) {
            self.under_way.extend(self.requests.to_engine.drain(..));
        }

        fn answer_newest(&mut self) -> bool {
            self.take();
            let Some((id, request)) = self.under_way.pop() else {
                return false;
            };
            let slice = |range: ByteRange| index(range.offset)..index(range.end());
            let reply = match request {
                AppRequest::Read(range) => Bytes::copy_from_slice(&self.memory[slice(range)]),
                AppRequest::Write { range, body, .. } => {
                    assert!(range.offset.is_multiple_of(BLOCK_SIZE));
                    assert!(range.len.is_multiple_of(BLOCK_SIZE) && range.len > 0);
                    match body {
                        Body::Data(data) => {
                            assert!(data.len() as u64 <= DATA_MAX);
                            self.memory[slice(range)].copy_from_slice(&data);
                        }
                        Body::Zeroes => self.memory[slice(range)].fill(0),
                    }
                    Bytes::new()
                }
                AppRequest::Flush => Bytes::new(),
            };
            self.requests.reply(id, Ok(reply));
            true
        }

        fn run(&mut self) -> Vec<(u32, Result<Bytes, Errno>)> {
            while self.answer_newest() {}
            assert_eq!(self.requests.len(), 0, "everything is answered");
            assert!(self.requests.kept.is_empty());
            self.requests.finished.drain(..).collect()
        }

        fn write(&mut self, origin: u32, offset: u64, data: Vec<u8>) {
            let range = ByteRange::new(offset, data.len() as u64);
            let data = data.into();
            let request = BlockRequest::Write {
                range,
                data,
                fua: false,
            };
            self.requests.submit(origin, request);
        }
    }

    #[test]
    fn any_range_can_be_written_zeroed_and_read() {
        let len = 40 * 4096;
        for (offset, count) in [
            (0, 4096),
            (512, 512),
            (4000, 200),
            (1, 8191),
            (4096, 5000),
            (100, 100_000),
            (0, len),
        ] {
            let mut engine = Engine::new(len);
            let mut expected = engine.memory.clone();
            expected[offset..offset + count].fill(255);
            engine.write(1, offset as u64, vec![255; count]);
            assert_eq!(engine.run(), [(1, Ok(Bytes::new()))]);
            assert_eq!(engine.memory, expected, "write {offset}+{count}");
            let range = ByteRange::new(offset as u64, count as u64);
            let zero = BlockRequest::Zero {
                range,
                may_release: true,
                fua: true,
            };
            engine.requests.submit(2, zero);
            engine.requests.submit(3, BlockRequest::Read { range });
            engine.run();
            expected[offset..offset + count].fill(0);
            assert_eq!(engine.memory, expected, "zero {offset}+{count}");
        }
    }

    #[test]
    fn a_large_request_is_cut_and_put_together() {
        let len = 5 << 20;
        let mut engine = Engine::new(len);
        let range = ByteRange::new(512, (4 << 20) + 1000);
        engine.requests.submit(1, BlockRequest::Read { range });
        engine.take();
        assert_eq!(engine.under_way.len(), 5);
        let expected = Bytes::copy_from_slice(&engine.memory[512..512 + index(range.len)]);
        assert_eq!(engine.run(), [(1, Ok(expected))]);
        let zero = BlockRequest::Discard {
            range: ByteRange::new(0, 4 << 30),
            fua: false,
        };
        engine.requests.submit(2, zero);
        engine.take();
        assert_eq!(engine.under_way.len(), PARTS_AT_ONCE);
    }

    #[test]
    fn overlapping_unaligned_writes_lose_nothing() {
        let mut engine = Engine::new(8 * 4096);
        let mut expected = engine.memory.clone();
        // All into two blocks, submitted before anything is answered, answered newest first.
        for n in 0..16_usize {
            let at = n * 512;
            expected[at..at + 512].fill(n as u8);
            engine.write(n as u32, at as u64, vec![n as u8; 512]);
        }
        // An aligned write that must come after the edges it overlaps.
        expected[4096..8192].fill(99);
        engine.write(50, 4096, vec![99; 4096]);
        // One that has nothing to do with them does not wait.
        engine.write(51, 16384, vec![98; 4096]);
        expected[16384..20480].fill(98);
        assert!(engine.answer_newest());
        assert_eq!(engine.requests.finished.pop_front().unwrap().0, 51);
        assert_eq!(engine.run().len(), 17);
        assert_eq!(engine.memory, expected);
    }

    #[test]
    fn an_unaligned_write_waits_for_the_writes_before_it() {
        let mut engine = Engine::new(4 * 4096);
        engine.write(1, 0, vec![7; 8192]);
        engine.write(2, 100, vec![8; 10]);
        engine.take();
        assert_eq!(engine.under_way.len(), 1, "the second waits for the first");
        engine.run();
        assert_eq!(
            (engine.memory[99], engine.memory[100], engine.memory[110]),
            (7, 8, 7)
        );
    }

    #[test]
    fn a_write_of_one_part_allocates_nothing() {
        let mut requests = Requests::default();
        let data = Bytes::from(vec![7; 4096]);
        let mut before = 0;
        for n in 0..2000_u64 {
            if n == 1000 {
                // By now everything is as long as it gets.
                before = allocations::so_far();
            }
            let range = ByteRange::new(n * 4096, 4096);
            let data = data.clone();
            let fua = false;
            requests.submit(n, BlockRequest::Write { range, data, fua });
            // Some are always under way.
            if n >= 32 {
                let (id, _) = requests.to_engine.pop_front().unwrap();
                requests.reply(id, Ok(Bytes::new()));
                assert_eq!(
                    requests.finished.pop_front(),
                    Some((n - 32, Ok(Bytes::new())))
                );
            }
        }
        assert_eq!(allocations::so_far(), before);
    }

    #[test]
    fn an_error_ends_the_whole_and_frees_its_blocks() {
        let mut engine = Engine::new(4 * 4096);
        engine.write(1, 100, vec![8; 5000]);
        engine.write(2, 0, vec![9; 4096]);
        engine.take();
        let ids: Vec<_> = engine.under_way.drain(..).map(|(id, _)| id).collect();
        for id in ids {
            engine.requests.reply(id, Err(ReplyError::NotPrimary));
        }
        assert_eq!(
            engine.requests.finished.pop_front(),
            Some((1, Err(Errno::Shutdown)))
        );
        assert_eq!(engine.run(), [(2, Ok(Bytes::new()))]);
        assert_eq!(engine.memory[..4096], [9; 4096]);
        let nothing = BlockRequest::Discard {
            range: ByteRange::new(1, 100),
            fua: false,
        };
        engine.requests.submit(3, nothing);
        assert_eq!(engine.run(), [(3, Ok(Bytes::new()))]);
    }
}
