//! What there is: the control log, the nodes with what they remember and what they only know, the
//! links. Sets of nodes, blocks and writes are masks.

use crate::{pack::Bits, steps::Protocol};

/// Data nodes at most.
pub const NODES: usize = 3;
/// Blocks of the volume at most.
pub const BLOCKS: usize = 2;
/// Writes at most; their ids begin with 1, and 0 is what a block holds at first.
pub const WRITES: usize = 3;
/// Epochs at most, the first included.
pub const EPOCHS: usize = 16;
/// No primary.
pub const NOBODY: u8 = 3;

/// A committed configuration.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Config {
    /// The primary, or [`NOBODY`].
    pub primary: u8,
    /// The in-sync set.
    pub in_sync: u8,
    /// The primary takes no requests: whoever is promoted displaces it.
    pub tends: bool,
}

/// A control log: one to begin with, one more for each forced promotion.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Log {
    /// The newest epoch; 0 as long as there is no such log.
    pub epoch: u8,
    /// Configurations by epoch, from the oldest that a node still has to hear of.
    pub configs: [Config; EPOCHS],
    /// Proposals under way that expect the newest epoch: who may join.
    pub joins: u8,
    /// The same: who may leave, a bit for each set of nodes.
    pub leaves: u8,
    /// The same: whether the primary may step down.
    pub demote: bool,
    /// Nodes that were evicted and not readmitted.
    pub evicted: u8,
}

/// What a node is to the volume.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Role {
    /// It follows, or waits.
    #[default]
    Secondary,
    /// Named primary, asks the members for their tails.
    Gathering,
    /// Writes its content of all tails to the members.
    Pushing,
    /// Open.
    Primary,
    /// Named primary, but another knows better.
    Yielding,
}

/// What a promotion knows of a member.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Member {
    /// Not asked.
    #[default]
    Absent,
    /// Owes its tail.
    Asked,
    /// Told its tail.
    Answered,
    /// Can't tell what it has.
    Uncertain,
}

/// How far a primary's session with a peer is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Stage {
    /// There is none.
    #[default]
    None,
    /// The peer was asked what is uncertain.
    Starting,
    /// Dirty blocks are copied.
    Copying,
    /// The barrier is on its way.
    Barrier,
    /// The join is to be committed.
    Joining,
    /// In the set.
    InSync,
    /// Of protocol A: the barrier is on its way, and nobody waits.
    Settling,
    /// Of protocol A: gets every write, is waited for by none.
    Following,
}

/// The last generation of marks for the follower that a primary began on a link.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Generation {
    /// There is one.
    pub begun: bool,
    /// The last write before its begin.
    pub at: u8,
    /// The receiver may have marks from before the begin.
    pub older: bool,
}

/// What a node has towards one other.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Peer {
    /// The session, of a primary.
    pub stage: Stage,
    /// The epoch at which it began.
    pub began: u8,
    /// Blocks that are being copied or pushed to the peer.
    pub busy: u8,
    /// The epoch that a proposed join of it expects, 0 for none.
    pub pending_join: u8,
    /// What a promotion knows of it.
    pub member: Member,
    /// The epoch of its reign over this node on this link, 0 for none.
    pub reign: u8,
    /// Whether that reign still reconciles.
    pub reconciles: bool,
    /// Of marks for the follower, as the primary told the peer.
    pub generation: Generation,
}

/// A data node.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Node {
    /// On stable storage: the write that each block holds.
    pub content: [u8; BLOCKS],
    /// What loss of power leaves of it.
    pub flushed: [u8; BLOCKS],
    /// Blocks that the activity log names.
    pub hot: u8,
    /// Blocks that the replica of each slot may lack; of the own slot the uncertain map.
    pub dirty: [u8; NODES],
    /// The highest epoch seen.
    pub seen: u8,
    /// The epoch of the newest configuration that it heard of from its log.
    pub known: u8,
    /// The log and the lineage that it belongs to; they have the same number.
    pub lineage: u8,
    /// Whether it was primary and wrote since its lineage began.
    pub wrote: bool,

    /// The process runs.
    pub up: bool,
    /// It may serve reads.
    pub lease: bool,
    /// It has all that it acknowledged.
    pub certain: bool,
    /// The highest epoch that an earlier life may have acted under, 0 once that is past.
    pub attached: u8,
    /// Its role.
    pub role: Role,
    /// Blocks of all tails that a promotion was told.
    pub gathered: u8,
    /// A generation of marks for the follower has begun here.
    pub generation: bool,
    /// What was marked for the follower since.
    pub newest: u8,
    /// Received writes that are not known to be on every member.
    pub tail: u8,
    /// A step-down was asked for.
    pub demoting: bool,
    /// As primary: who owes the acknowledgement of each write, and who gave it.
    pub unacked: [u8; WRITES],
    /// Who gave it.
    pub acked: [u8; WRITES],
    /// Writes that are not complete.
    pub open: u8,
    /// The other nodes.
    pub peers: [Peer; NODES],
}

/// A message, as in docs/protocol.md.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[allow(missing_docs, reason = "docs/protocol.md says what each field is")]
pub enum Message {
    #[default]
    Nothing,
    StartSync {
        epoch: u8,
    },
    Uncertain {
        epoch: u8,
        blocks: u8,
    },
    Write {
        epoch: u8,
        id: u8,
        complete: u8,
        dirty_for: u8,
    },
    WriteAck {
        epoch: u8,
        id: u8,
    },
    SyncWrite {
        epoch: u8,
        session: u8,
        block: u8,
        content: u8,
    },
    SyncAck {
        session: u8,
        block: u8,
    },
    DirtyMap {
        epoch: u8,
        slot: u8,
        blocks: u8,
    },
    Barrier {
        epoch: u8,
        session: u8,
    },
    BarrierAck {
        session: u8,
    },
    EpochUpdate {
        epoch: u8,
        in_sync: u8,
    },
    Reconcile {
        epoch: u8,
    },
    Tail {
        epoch: u8,
        blocks: u8,
        certain: bool,
    },
    Complete {
        epoch: u8,
        id: u8,
    },
    Following {
        epoch: u8,
    },
    Generation {
        epoch: u8,
        confirmed: bool,
    },
}

/// What never happens again once it happened so often.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Budget {
    /// Ends of a process.
    pub crashes: u8,
    /// Losses of power.
    pub outages: u8,
    /// Broken links.
    pub breaks: u8,
    /// Leases that ran out on a running node.
    pub leases: u8,
    /// Planned step-downs.
    pub demotes: u8,
    /// Forced promotions.
    pub forced: u8,
    /// Losses of the last node for good.
    pub losses: u8,
    /// Reigns that only tend the volume.
    pub tends: u8,
}

/// What can be seen only while it happens.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Wrong {
    /// Nothing.
    #[default]
    Nothing,
    /// A primary with a lease reads less than was acknowledged, and another was named meanwhile.
    StaleRead,
    /// The same, but it is the primary in force: it is lost.
    Lost,
    /// Data of a lineage was given up though it had been promised, and nobody was told.
    Merged,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct State {
    /// Nodes, the first `nodes` of them.
    pub nodes: [Node; NODES],
    /// Control logs by lineage.
    pub logs: [Log; NODES],
    /// Links that are up, a bit for each pair (see [`pair`]).
    pub links: u8,
    /// What is under way, `[from][to]`.
    pub queues: [[Vec<Message>; NODES]; NODES],
    /// What may still happen.
    pub left: Budget,
    /// Writes issued so far.
    pub issued: u8,
    /// The epoch of each write.
    pub epoch_of: [u8; WRITES],
    /// Who issued it.
    pub writer_of: [u8; WRITES],
    /// Of a lineage, the newest write to each block that was acknowledged or shown to a reader.
    pub promised: [[u8; BLOCKS]; NODES],
    /// Writes that were acknowledged.
    pub acknowledged: u8,
    /// Of a lineage, what the node that was forced had.
    pub forked_at: [[u8; BLOCKS]; NODES],
    /// Two lineages met, both with changes, and a person was told.
    pub alarm: bool,
    /// What went wrong in a step, as against in a state.
    pub wrong: Wrong,
}

/// The bit of a link.
#[must_use]
pub const fn pair(a: usize, b: usize) -> u8 {
    1 << (a + b - 1)
}

/// The blocks that writes are to.
#[must_use]
pub const fn block_of(id: u8, blocks: usize) -> usize {
    (id as usize - 1) % blocks
}

impl State {
    /// The newest configuration of a node's log.
    #[must_use]
    pub fn newest(&self, node: usize) -> Config {
        let log = &self.logs[usize::from(self.nodes[node].lineage)];
        log.configs[usize::from(log.epoch)]
    }

    /// The configuration that a node knows.
    #[must_use]
    pub fn known(&self, node: usize) -> Config {
        let node = &self.nodes[node];
        self.logs[usize::from(node.lineage)].configs[usize::from(node.known)]
    }

    /// Whether two nodes have a link.
    #[must_use]
    pub const fn linked(&self, a: usize, b: usize) -> bool {
        self.links & pair(a, b) != 0
    }

    /// Where a write stands among all: a later reign's is later.
    #[must_use]
    pub fn position(&self, id: u8) -> (u8, u8) {
        match id {
            0 => (0, 0),
            id => (self.epoch_of[usize::from(id) - 1], id),
        }
    }

    /// All of it, for `count` nodes and `blocks` blocks. What no step depends on is not in it.
    pub fn pack(&mut self, bits: &mut impl Bits, bounds: &Protocol) {
        let (count, blocks, forced) = (bounds.nodes, bounds.blocks, bounds.budget.forced > 0);
        let per_block = u32::try_from(blocks).unwrap_or(8);
        bits.bits(&mut self.issued, 2);
        for id in 0..usize::from(self.issued) {
            bits.bits(&mut self.epoch_of[id], 4);
            bits.bits(&mut self.writer_of[id], 2);
        }
        bits.bits(&mut self.acknowledged, 3);
        choice(bits, &mut self.wrong, &WRONGS);
        for left in [
            &mut self.left.crashes,
            &mut self.left.outages,
            &mut self.left.breaks,
            &mut self.left.leases,
            &mut self.left.demotes,
            &mut self.left.forced,
            &mut self.left.losses,
            &mut self.left.tends,
        ] {
            bits.bits(left, 2);
        }
        let lineages = if forced { NODES } else { 1 };
        for lineage in 0..lineages {
            for block in 0..blocks {
                bits.bits(&mut self.promised[lineage][block], 2);
                if forced {
                    bits.bits(&mut self.forked_at[lineage][block], 2);
                }
            }
        }
        if forced {
            bits.flag(&mut self.alarm);
        }
        for node in &mut self.nodes[..count] {
            if forced {
                bits.bits(&mut node.lineage, 2);
                bits.flag(&mut node.wrote);
            }
            node.pack(bits, count, blocks, per_block);
            if bounds.follower.is_some() {
                node.pack_generations(bits, count, per_block);
            }
        }
        for (number, log) in (0..).zip(&mut self.logs[..lineages]) {
            bits.bits(&mut log.epoch, 4);
            if log.epoch == 0 {
                continue;
            }
            let mine = self.nodes[..count]
                .iter()
                .filter(|node| node.lineage == number);
            let oldest = mine.map(|node| node.known).min().unwrap_or(log.epoch);
            for epoch in oldest..=log.epoch {
                let config = &mut log.configs[usize::from(epoch)];
                bits.bits(&mut config.primary, 2);
                bits.bits(&mut config.in_sync, 3);
                bits.flag(&mut config.tends);
            }
            bits.bits(&mut log.joins, 3);
            bits.bits(&mut log.leaves, 8);
            bits.flag(&mut log.demote);
            bits.bits(&mut log.evicted, 3);
        }
        bits.bits(&mut self.links, 3);
        for from in 0..count {
            for to in 0..count {
                if from == to || !self.linked(from, to) {
                    continue;
                }
                let queue = &mut self.queues[from][to];
                let mut len = u8::try_from(queue.len()).unwrap_or(u8::MAX);
                bits.bits(&mut len, 5);
                queue.resize(usize::from(len), Message::Nothing);
                for message in queue {
                    message.pack(bits, per_block);
                }
            }
        }
    }
}

impl Node {
    fn pack(&mut self, bits: &mut impl Bits, count: usize, blocks: usize, per_block: u32) {
        bits.flag(&mut self.up);
        bits.flag(&mut self.lease);
        bits.flag(&mut self.certain);
        bits.flag(&mut self.demoting);
        bits.bits(&mut self.seen, 4);
        bits.bits(&mut self.known, 4);
        bits.bits(&mut self.attached, 4);
        bits.bits(&mut self.tail, 3);
        bits.bits(&mut self.hot, per_block);
        for block in 0..blocks {
            bits.bits(&mut self.content[block], 2);
            bits.bits(&mut self.flushed[block], 2);
        }
        for dirty in &mut self.dirty[..count] {
            bits.bits(dirty, per_block);
        }
        choice(bits, &mut self.role, &ROLES);
        if matches!(self.role, Role::Gathering | Role::Pushing) {
            bits.bits(&mut self.gathered, per_block);
        }
        if self.role == Role::Primary {
            bits.bits(&mut self.open, 3);
            for id in 0..WRITES {
                bits.bits(&mut self.unacked[id], 3);
                bits.bits(&mut self.acked[id], 3);
            }
        }
        for peer in &mut self.peers[..count] {
            bits.bits(&mut peer.pending_join, 4);
            bits.bits(&mut peer.reign, 4);
            bits.flag(&mut peer.reconciles);
            match self.role {
                Role::Primary => {
                    choice(bits, &mut peer.stage, &STAGES);
                    bits.bits(&mut peer.began, 4);
                    bits.bits(&mut peer.busy, per_block);
                }
                Role::Gathering | Role::Pushing => {
                    choice(bits, &mut peer.member, &MEMBERS);
                    bits.bits(&mut peer.busy, per_block);
                }
                Role::Secondary | Role::Yielding => {}
            }
        }
    }
}

impl Node {
    /// What there is of generations, where there is a follower.
    fn pack_generations(&mut self, bits: &mut impl Bits, count: usize, per_block: u32) {
        bits.flag(&mut self.generation);
        if self.generation {
            bits.bits(&mut self.newest, per_block);
        }
        if self.role == Role::Primary {
            for peer in &mut self.peers[..count] {
                bits.flag(&mut peer.generation.begun);
                if peer.generation.begun {
                    bits.bits(&mut peer.generation.at, 2);
                    bits.flag(&mut peer.generation.older);
                }
            }
        }
    }
}

const ROLES: [Role; 5] = [
    Role::Secondary,
    Role::Gathering,
    Role::Pushing,
    Role::Primary,
    Role::Yielding,
];
const STAGES: [Stage; 8] = [
    Stage::None,
    Stage::Starting,
    Stage::Copying,
    Stage::Barrier,
    Stage::Joining,
    Stage::InSync,
    Stage::Settling,
    Stage::Following,
];
const MEMBERS: [Member; 4] = [
    Member::Absent,
    Member::Asked,
    Member::Answered,
    Member::Uncertain,
];

const WRONGS: [Wrong; 4] = [Wrong::Nothing, Wrong::StaleRead, Wrong::Lost, Wrong::Merged];

/// One of at most eight.
fn choice<T: Copy + PartialEq>(bits: &mut impl Bits, value: &mut T, all: &[T]) {
    let index = all.iter().position(|one| one == value).unwrap_or(0);
    let mut index = u8::try_from(index).unwrap_or(0);
    bits.bits(&mut index, 3);
    *value = all[usize::from(index)];
}

impl Message {
    fn pack(&mut self, bits: &mut impl Bits, per_block: u32) {
        // Kind, then four fields; those that a kind has not are 0 and cost little.
        let (mut kind, mut f) = self.fields();
        bits.bits(&mut kind, 4);
        let widths = match kind {
            1 | 11 | 14 => [4, 0, 0, 0],
            2 => [4, per_block, 0, 0],
            3 => [4, 2, 2, 3],
            4 | 13 => [4, 2, 0, 0],
            5 => [4, 4, 1, 2],
            6 => [4, 1, 0, 0],
            7 => [4, 2, per_block, 0],
            8 => [4, 4, 0, 0],
            9 => [4, 0, 0, 0],
            10 => [4, 3, 0, 0],
            12 => [4, per_block, 1, 0],
            15 => [4, 1, 0, 0],
            _ => [0; 4],
        };
        for (field, width) in f.iter_mut().zip(widths) {
            if width > 0 {
                bits.bits(field, width);
            }
        }
        *self = Self::of(kind, f);
    }

    const fn fields(self) -> (u8, [u8; 4]) {
        match self {
            Self::Nothing => (0, [0; 4]),
            Self::StartSync { epoch } => (1, [epoch, 0, 0, 0]),
            Self::Uncertain { epoch, blocks } => (2, [epoch, blocks, 0, 0]),
            Self::Write {
                epoch,
                id,
                complete,
                dirty_for,
            } => (3, [epoch, id, complete, dirty_for]),
            Self::WriteAck { epoch, id } => (4, [epoch, id, 0, 0]),
            Self::Complete { epoch, id } => (13, [epoch, id, 0, 0]),
            Self::SyncWrite {
                epoch,
                session,
                block,
                content,
            } => (5, [epoch, session, block, content]),
            Self::SyncAck { session, block } => (6, [session, block, 0, 0]),
            Self::DirtyMap {
                epoch,
                slot,
                blocks,
            } => (7, [epoch, slot, blocks, 0]),
            Self::Barrier { epoch, session } => (8, [epoch, session, 0, 0]),
            Self::BarrierAck { session } => (9, [session, 0, 0, 0]),
            Self::EpochUpdate { epoch, in_sync } => (10, [epoch, in_sync, 0, 0]),
            Self::Reconcile { epoch } => (11, [epoch, 0, 0, 0]),
            Self::Following { epoch } => (14, [epoch, 0, 0, 0]),
            Self::Generation { epoch, confirmed } => (15, [epoch, confirmed as u8, 0, 0]),
            Self::Tail {
                epoch,
                blocks,
                certain,
            } => (12, [epoch, blocks, certain as u8, 0]),
        }
    }

    const fn of(kind: u8, f: [u8; 4]) -> Self {
        let [a, b, c, d] = f;
        match kind {
            1 => Self::StartSync { epoch: a },
            2 => Self::Uncertain {
                epoch: a,
                blocks: b,
            },
            3 => Self::Write {
                epoch: a,
                id: b,
                complete: c,
                dirty_for: d,
            },
            13 => Self::Complete { epoch: a, id: b },
            4 => Self::WriteAck { epoch: a, id: b },
            5 => Self::SyncWrite {
                epoch: a,
                session: b,
                block: c,
                content: d,
            },
            6 => Self::SyncAck {
                session: a,
                block: b,
            },
            7 => Self::DirtyMap {
                epoch: a,
                slot: b,
                blocks: c,
            },
            8 => Self::Barrier {
                epoch: a,
                session: b,
            },
            9 => Self::BarrierAck { session: a },
            10 => Self::EpochUpdate {
                epoch: a,
                in_sync: b,
            },
            11 => Self::Reconcile { epoch: a },
            14 => Self::Following { epoch: a },
            15 => Self::Generation {
                epoch: a,
                confirmed: b != 0,
            },
            12 => Self::Tail {
                epoch: a,
                blocks: b,
                certain: c != 0,
            },
            _ => Self::Nothing,
        }
    }
}
