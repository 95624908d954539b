//! Clients: several requests in flight on whatever node is open, each write with its own stamp, all
//! of it recorded in the history.

use std::collections::BTreeMap;

use bytes::Bytes;
use relevo_replication::{AppRequest, Input, ReplyError, RequestId};
use relevo_types::{BLOCK_SIZE, BlockRange, ByteRange, cluster::Protocol};
use relevo_wire::Body;

use super::{Cluster, Event, Phase, node_id};
use crate::{
    check::{Verdict, Violation, commit_then_ack, linear::Tick},
    net::Index,
    stamp::{SECTOR, SECTORS_PER_BLOCK, WriteNo, fill, read_sector},
};

/// Blocks that are written while the cluster heals.
const PROBES: u64 = 3;

/// However long something is waited for, there are requests: of all clients together, one in this time at
/// least, in microseconds.
const SLOWEST_US: u64 = 8000;

/// Blocks of a read of the final check at most.
const READ_BLOCKS: u64 = 16;

/// What the clients do and wait for.
#[derive(Debug)]
pub(super) struct Load {
    last_request: u64,
    pending: BTreeMap<RequestId, Pending>,
    pub(super) answered: u64,
    /// Writes answered well since the last heal.
    pub(super) writes_answered: u64,
    /// Reads that failed while the disk was in use, of the last one in sync.
    pub(super) read_errors: u64,
}

#[derive(Debug)]
struct Pending {
    /// `None`: a read of the final check.
    client: Option<usize>,
    node: Index,
    invoked: Tick,
    what: What,
}

#[derive(Debug)]
enum What {
    Read(ByteRange),
    Write { number: WriteNo, fua: bool },
    Flush,
}

impl Load {
    pub(super) const fn new() -> Self {
        Self {
            last_request: 0,
            pending: BTreeMap::new(),
            answered: 0,
            writes_answered: 0,
            read_errors: 0,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether requests to a node have no answer.
    pub(super) fn waits_at(&self, node: Index) -> bool {
        self.pending.values().any(|pending| pending.node == node)
    }

    /// The oldest request without an answer, for messages.
    pub(super) fn oldest(&self) -> String {
        self.pending.iter().next().map_or_else(
            || "none".to_owned(),
            |(id, pending)| format!("{id:?} {pending:?}"),
        )
    }
}

impl Cluster {
    /// A client does its next thing.
    pub(super) fn client(&mut self, client: usize) -> Verdict {
        let works = match self.phase {
            Phase::Trouble => !self.quiet,
            Phase::Healing => {
                let hangs = self.machines.iter().any(|machine| machine.hung);
                let alone = self.last_disk.is_some();
                let healed = self.all_in_sync(false) && self.is_not_replacing();
                !self.scenario.idle_heal || healed || hangs || alone
            }
            Phase::Settling => false,
        };
        let node = if works { self.choose_node() } else { None };
        let Some(node) = node else {
            let soon = self.phase == Phase::Trouble;
            let (least, most) = if soon { (2, 10) } else { (10, 40) };
            let again = self.chance.load.millis(least, most);
            self.queue.after(again, Event::Client(client));
            return Ok(());
        };
        let request = self.choose_request();
        self.issue(Some(client), node, request)
    }

    /// Reads everything that was ever written, once, at a node.
    pub(super) fn read_everything(&mut self, node: Index) -> Verdict {
        let mut runs: Vec<BlockRange> = Vec::new();
        for block in self.history.blocks() {
            match runs.last_mut() {
                Some(run) if run.end() == block && run.count < READ_BLOCKS => run.count += 1,
                _ => runs.push(BlockRange::new(block, 1)),
            }
        }
        for run in runs {
            self.issue(None, node, What::Read(run.bytes()))?;
        }
        Ok(())
    }

    /// How long a client thinks at most. While the cluster heals, or does in peace what takes it seconds,
    /// the thousandth request shows nothing that the hundredth did not, and costs as much.
    fn think_us(&self) -> u64 {
        let waited = self.waits_since.map(|since| self.queue.now().since(since));
        let waited = waited.map_or(0, |waited| waited.as_micros());
        let slow = u64::try_from(waited).unwrap_or(u64::MAX) / 4;
        let slowest = self.scenario.clients as u64 * SLOWEST_US;
        self.scenario.think_us.max(slow.min(slowest))
    }

    /// Usually the node that is open; now and then any.
    fn choose_node(&mut self) -> Option<Index> {
        let any = self.chance.load.index(self.scenario.data_nodes);
        if self.severed.contains(&any) {
            return None;
        }
        if self.chance.load.chance(3.0) {
            return self.machines[any].process.is_some().then_some(any);
        }
        let open: Vec<Index> = (0..self.scenario.data_nodes)
            .filter(|node| !self.severed.contains(node))
            .filter(|node| self.machines[*node].open().is_some())
            .collect();
        (!open.is_empty()).then(|| self.chance.load.pick(&open))
    }

    fn choose_blocks(&mut self) -> BlockRange {
        let rng = &mut self.chance.load;
        let blocks = self.scenario.blocks;
        if self.phase == Phase::Healing {
            // Probes: what trouble left in all other blocks stays there to be compared.
            return BlockRange::new(rng.below(PROBES), 1);
        }
        let first = if rng.chance(90.0) {
            rng.pick(&self.scenario.hot)
        } else {
            rng.below(blocks)
        };
        let count = rng.pick(&[1, 1, 1, 2, 4, 16]);
        BlockRange::new(first, count.min(blocks - first))
    }

    fn choose_request(&mut self) -> What {
        let blocks = self.choose_blocks();
        let rng = &mut self.chance.load;
        if rng.chance(self.scenario.reads) {
            let mut range = blocks.bytes();
            if rng.chance(10.0) && range.len > BLOCK_SIZE / 2 {
                // Any byte may be the first or the last.
                let skip = rng.below(range.len / 2);
                let cut = rng.below(range.len / 2);
                range = ByteRange::new(range.offset + skip, range.len - skip - cut);
                self.marks.reached("unaligned read");
            }
            return What::Read(range);
        }
        if rng.chance(self.scenario.flushes) {
            return What::Flush;
        }
        let fua = rng.chance(self.scenario.fua);
        let zeroes = rng.chance(self.scenario.zeroes)
            && blocks
                .iter()
                .all(|block| self.history.zeroes_are_clear(block));
        if zeroes {
            self.marks.reached("zeroes written");
        }
        let number = self.history.begin_write(blocks, zeroes);
        What::Write { number, fua }
    }

    fn issue(&mut self, client: Option<usize>, node: Index, what: What) -> Verdict {
        let request = match &what {
            What::Read(range) => AppRequest::Read(*range),
            What::Flush => AppRequest::Flush,
            What::Write { number, fua } => {
                let write = self.history.write(*number);
                AppRequest::Write {
                    range: write.blocks.bytes(),
                    body: if write.zeroes {
                        Body::Zeroes
                    } else {
                        Body::Data(fill(*number, write.blocks))
                    },
                    fua: *fua,
                }
            }
        };
        self.load.last_request += 1;
        let id = RequestId(self.load.last_request);
        let invoked = self.history.tick();
        // Requests begin in the order of their numbers.
        let oldest = self.load.pending.values().next();
        let oldest = oldest.map_or(invoked, |pending| pending.invoked);
        self.history.no_read_before(oldest);
        self.load.pending.insert(
            id,
            Pending {
                client,
                node,
                invoked,
                what,
            },
        );
        let late = matches!(request, AppRequest::Read(_))
            && self.machines[node].acts()
            && !self.leases.holds(node, self.queue.now());
        self.feed(node, Input::Request { id, request })?;
        if self.machines[node].process.is_none() {
            // Nobody is there, or it crashed on this very request.
            self.requests_lost(node);
            return Ok(());
        }
        if late && self.machines[node].open().is_some() && self.load.pending.contains_key(&id) {
            self.marks
                .reached("a read was held while the lease was over");
        }
        Ok(())
    }

    /// An engine answers.
    pub(super) fn reply(
        &mut self,
        node: Index,
        id: RequestId,
        result: Result<Bytes, ReplyError>,
    ) -> Verdict {
        let answers = "every request is answered once";
        let Some(pending) = self.load.pending.remove(&id) else {
            return Err(Violation::new(
                answers,
                format!("n{} answered {id:?} again", node + 1),
            ));
        };
        if pending.node != node {
            return Err(Violation::new(
                answers,
                format!(
                    "n{} answered {id:?}, which n{} was asked",
                    node + 1,
                    pending.node + 1
                ),
            ));
        }
        if let Some(client) = pending.client {
            let most = self.think_us();
            let think = self.chance.load.micros(0, most);
            self.queue.after(think, Event::Client(client));
        }
        match result {
            Ok(bytes) => {
                self.load.answered += 1;
                self.answered_well(node, &pending, &bytes)
            }
            Err(ReplyError::Invalid) => Err(Violation::new(
                answers,
                format!("{pending:?} was called invalid"),
            )),
            Err(error @ (ReplyError::NotPrimary | ReplyError::Io)) => {
                let attached = self.machines[node]
                    .process
                    .as_ref()
                    .is_some_and(|process| !process.disk_failed);
                let reads = matches!(pending.what, What::Read(_));
                self.request_failed(node, error, reads)?;
                let open = self.machines[node].open().is_some();
                if error == ReplyError::Io && attached && open && !reads {
                    self.marks.reached("requests failed without a majority");
                }
                match pending.what {
                    What::Write { number, .. } => self.history.write_failed(number),
                    What::Read(_) | What::Flush => Ok(()),
                }
            }
        }
    }

    fn answered_well(&mut self, node: Index, pending: &Pending, bytes: &Bytes) -> Verdict {
        if self.severed.contains(&node) {
            // Of a history that somebody gave up: it promises nothing any more.
            return match pending.what {
                What::Write { number, .. } => self.history.write_failed(number),
                What::Read(_) | What::Flush => Ok(()),
            };
        }
        match &pending.what {
            What::Read(range) => self.read_answered(pending.invoked, *range, bytes),
            What::Write { number, fua } => {
                self.marks.reached("a write was acknowledged");
                if pending.invoked < self.last_leave {
                    self.marks.reached("write waited for the commit of a leave");
                }
                self.load.writes_answered += 1;
                if let Some(epoch) = self.machines[node].open() {
                    self.one_writer
                        .acknowledged(node_id(node), epoch, pending.invoked)?;
                }
                let received = self.received();
                let volume = self.control.volume();
                let early = (0..).zip(&received).any(|(node, received)| {
                    !received.is_empty() && volume.in_sync.contains(&node_id(node))
                });
                if early {
                    self.marks
                        .reached("protocol B: acknowledged before the disk did");
                }
                let replicas = self.replica_views(&received);
                let volume = self.control.volume();
                commit_then_ack::write(
                    volume,
                    node_id(node),
                    &replicas,
                    &self.history,
                    *number,
                    *fua,
                )?;
                self.history.write_acked(*number, *fua)
            }
            What::Flush => {
                let received = self.received();
                let replicas = self.replica_views(&received);
                commit_then_ack::flush(
                    self.control.volume(),
                    &replicas,
                    &self.history,
                    pending.invoked,
                )?;
                self.history.flush_acked(pending.invoked);
                Ok(())
            }
        }
    }

    fn read_answered(&mut self, invoked: Tick, range: ByteRange, bytes: &Bytes) -> Verdict {
        if bytes.len() as u64 != range.len {
            return Err(Violation::new(
                "a read gives what was asked for",
                format!("{range:?} gave {} bytes", bytes.len()),
            ));
        }
        // Whole sectors only: parts of sectors were compared with nothing, their neighbours will.
        let first = range.offset.div_ceil(SECTOR as u64);
        let end = range.end() / SECTOR as u64;
        for number in first..end {
            let at = usize::try_from(number * SECTOR as u64 - range.offset).unwrap_or(0);
            let block = number / SECTORS_PER_BLOCK as u64;
            let sector = usize::try_from(number % SECTORS_PER_BLOCK as u64).unwrap_or(0);
            let saw = read_sector(block, sector, &bytes[at..at + SECTOR])
                .map_err(|what| Violation::new("a read gives what was written", what))?;
            self.history.read(invoked, block, sector, saw)?;
        }
        Ok(())
    }

    fn replica_views<'a>(
        &'a self,
        received: &'a [Vec<BlockRange>],
    ) -> Vec<commit_then_ack::ReplicaView<'a>> {
        self.machines[..self.scenario.data_nodes]
            .iter()
            .zip(received)
            .map(|(machine, received)| commit_then_ack::ReplicaView {
                node: machine.id,
                disk: &machine.disk,
                lost_power: machine.lost_power,
                received,
            })
            .collect()
    }

    /// What each replica received and has not written.
    fn received(&self) -> Vec<Vec<BlockRange>> {
        // Only of protocol B does it count for anything.
        let counts = self.scenario.protocols.contains(&Protocol::B);
        (0..self.scenario.data_nodes)
            .map(|node| {
                let engine = self.engine(node).filter(|_| counts);
                engine.map_or_else(Vec::new, relevo_replication::Engine::received_blocks)
            })
            .collect()
    }

    /// A node's daemon is gone: what it was asked will never be answered.
    pub(super) fn requests_lost(&mut self, node: Index) {
        let lost: Vec<RequestId> = self
            .load
            .pending
            .iter()
            .filter(|(_, pending)| pending.node == node)
            .map(|(id, _)| *id)
            .collect();
        for id in lost {
            let Some(pending) = self.load.pending.remove(&id) else {
                continue;
            };
            if let What::Write { number, .. } = pending.what {
                // Its end alone breaks nothing: a clash would have shown when it was seen.
                let verdict = self.history.write_failed(number);
                debug_assert_eq!(verdict, Ok(()));
            }
            if let Some(client) = pending.client {
                let again = self.chance.load.millis(1, 20);
                self.queue.after(again, Event::Client(client));
            }
        }
    }
}
