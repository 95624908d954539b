//! Writes in a steady state allocate nothing, on no side.

use std::collections::VecDeque;

use bytes::Bytes;
use relevo_replication::{AppRequest, DiskReply, Effect, Input, RequestId};
use relevo_types::{BlockRange, NodeId, cluster::Protocol};
use relevo_wire::Body;

use crate::world::{A, BLOCK, World};

const BLOCKS: u64 = 16 * 256;

/// Writes under way at once.
const DEPTH: usize = 32;

/// Engines with nothing between them, and what each allocated.
struct Bench {
    world: World,
    inputs: VecDeque<(NodeId, Input)>,
    effects: Vec<Effect>,
    data: Bytes,
    allocated: [u64; 4],
    last_request: u64,
    answered: u64,
}

impl Bench {
    fn new(protocols: &[Protocol]) -> Self {
        Self {
            world: World::mixed(protocols, BLOCKS),
            inputs: VecDeque::new(),
            effects: Vec::new(),
            data: vec![7; 16 * BLOCK].into(),
            allocated: [0; 4],
            last_request: 1 << 32,
            answered: 0,
        }
    }

    fn write(&mut self, fua: bool) {
        let count = 1 + self.world.random.below(16) as u64;
        let first = self.world.random.next() % (BLOCKS - count);
        let range = BlockRange::new(first, count).bytes();
        self.last_request += 1;
        let body = Body::Data(self.data.slice(..usize::try_from(range.len).unwrap()));
        let request = AppRequest::Write { range, body, fua };
        let id = RequestId(self.last_request);
        self.inputs.push_back((A, Input::Request { id, request }));
    }

    /// Hands over one input. Disks answer in any order, links in theirs.
    fn step(&mut self) {
        let at = self.world.random.below(self.inputs.len().min(8));
        let is_disk = |input: &Input| matches!(input, Input::Disk { .. });
        let at = if is_disk(&self.inputs[at].1) { at } else { 0 };
        let (node, input) = self.inputs.remove(at).unwrap();
        let now = self.world.now;
        let engine = self.world.node(node).engine.as_mut().unwrap();
        let before = ::allocations::so_far();
        engine.handle(now, input, &mut self.effects);
        assert!(engine.deadline() > now);
        self.allocated[node.0 as usize] += ::allocations::so_far() - before;
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Disk(op) => {
                    let result = Ok(DiskReply::Done);
                    self.inputs
                        .push_back((node, Input::Disk { op: op.op, result }));
                }
                Effect::Send { peer, message } => {
                    let message = Input::Message {
                        peer: node,
                        message,
                    };
                    self.inputs.push_back((peer, message));
                }
                Effect::Reply { result, .. } => {
                    result.unwrap();
                    self.answered += 1;
                }
                other => panic!("nothing but writes goes on here: {other:?}"),
            }
        }
    }

    fn run(&mut self, writes: u64, fua: bool) {
        let begun = self.last_request;
        let end = self.answered + writes;
        while self.answered < end {
            let under_way = self.last_request - begun - (self.answered + writes - end);
            if under_way < DEPTH as u64 {
                self.write(fua);
            } else {
                self.step();
            }
        }
        while !self.inputs.is_empty() {
            self.step();
        }
    }
}

fn allocates_nothing(protocols: &[Protocol], fua: bool) {
    let mut bench = Bench::new(protocols);
    // Every region becomes hot, every list as long as it gets.
    bench.run(5000, fua);
    bench.allocated = [0; 4];
    bench.run(5000, fua);
    assert_eq!(bench.allocated, [0; 4], "by node, in 5000 writes");
}

#[test]
fn writes_allocate_nothing() {
    use Protocol::{A, B, C};
    let before = ::allocations::so_far();
    drop(vec![1]);
    assert_ne!(::allocations::so_far(), before, "allocations are counted");
    allocates_nothing(&[C, C], false);
    allocates_nothing(&[C, C, C], false);
    allocates_nothing(&[B, B], false);
    allocates_nothing(&[C, C, A], false);
    allocates_nothing(&[C], false);
    allocates_nothing(&[C, C], true);
}
