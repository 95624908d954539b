//! What is on the backing besides data, and when: superblock, activity log and bitmaps are
//! changed in memory at once and reach the backing in *commits*, one at a time.
//!
//! A commit has two halves, each ended by a flush. First the bitmap pages, if somebody wants them
//! durable or the activity log drops regions (that flush also covers the data written to those
//! regions); then the activity log transaction and the superblock. Whoever needs something
//! durable before going on takes a [`Ticket`] and goes on when [`Metadata::durable`] reaches it.

use std::collections::{BTreeSet, VecDeque};

use relevo_format::{Layout, Region, Superblock, activity as log, bitmap};
use relevo_types::{Epoch, ReplicaSlot};

use crate::{
    activity::{Activity, Plan},
    bitmap::Bitmaps,
    io::DiskOpKind,
    ops::{Cx, OpUse, Ops},
};

/// Metadata blocks under way at most; more would only crowd out data.
const WRITES_MAX: usize = 64;

/// A moment in the order of metadata changes: everything changed before it was taken is durable
/// when the metadata's `durable` has reached it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Ticket(u64);

#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) superblock: Superblock,
    pub(crate) bitmaps: Bitmaps,
    pub(crate) activity: Activity,
    tag: u32,
    wanted: Wanted,
    last_ticket: u64,
    durable: Ticket,
    durable_epoch: Epoch,
    /// The superblock on stable storage says that the replica is in use.
    durably_in_use: bool,
    commit: Option<Commit>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Wanted {
    bitmaps: bool,
    superblock: bool,
    empty_log: bool,
}

#[derive(Debug)]
struct Commit {
    covers: Ticket,
    half: Half,
    superblock: bool,
    plan: Option<Plan>,
    queue: VecDeque<(u64, Vec<u8>)>,
    under_way: usize,
    flushing: bool,
    epoch: Epoch,
    in_use: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Half {
    Pages,
    Heads,
}

impl Metadata {
    pub(crate) fn new(superblock: Superblock, bitmaps: Bitmaps, activity: Activity) -> Self {
        Self {
            tag: superblock.replica.identity.tag(),
            durable_epoch: superblock.epoch,
            durably_in_use: !superblock.clean,
            superblock,
            bitmaps,
            activity,
            wanted: Wanted::default(),
            last_ticket: 0,
            durable: Ticket(0),
            commit: None,
        }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.superblock.layout
    }

    /// This replica's own slot: its bitmap tells where it may differ from the others.
    pub(crate) fn own_slot(&self) -> ReplicaSlot {
        self.superblock.replica.slot
    }

    /// The highest epoch that is on stable storage.
    pub(crate) fn durable_epoch(&self) -> Epoch {
        self.durable_epoch
    }

    /// Whether a crash from here on is seen at the next attach: not before the first write since a clean
    /// one.
    pub(crate) fn is_durably_in_use(&self) -> bool {
        self.durably_in_use
    }

    pub(crate) fn is_durable(&self, ticket: Ticket) -> bool {
        self.durable >= ticket
    }

    /// Whether nothing is wanted or under way.
    pub(crate) fn is_settled(&self) -> bool {
        self.commit.is_none() && !self.wants_something()
    }

    /// Wants the superblock durable as it is now.
    pub(crate) fn want_superblock(&mut self) -> Ticket {
        self.wanted.superblock = true;
        self.ticket()
    }

    /// Wants the bitmaps durable as they are now, and the data written so far.
    pub(crate) fn want_bitmaps(&mut self) -> Ticket {
        self.wanted.bitmaps = true;
        self.ticket()
    }

    /// Wants both.
    pub(crate) fn want_all(&mut self) -> Ticket {
        self.wanted.superblock = true;
        self.want_bitmaps()
    }

    /// Wants an activity log that names no region. Nothing may be pinned or waiting.
    pub(crate) fn want_empty_log(&mut self) -> Ticket {
        self.wanted.empty_log = true;
        self.want_all()
    }

    fn ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        Ticket(self.last_ticket)
    }

    fn wants_something(&self) -> bool {
        self.wanted.bitmaps || self.wanted.superblock || self.wanted.empty_log
    }

    /// Whether writes wait for cold regions and a transaction could be written now.
    pub(crate) fn wants_room(&self) -> bool {
        self.commit.is_none() && self.activity.waiting() > 0
    }

    /// Starts a commit if there is cause for one and none is under way. `keep`: see
    /// [`Activity::plan`].
    pub(crate) fn pump(
        &mut self,
        cx: &mut Cx<'_>,
        ops: &mut Ops,
        keep: impl FnOnce() -> BTreeSet<Region>,
    ) {
        if self.commit.is_some() || (!self.wants_something() && self.activity.waiting() == 0) {
            return;
        }
        let plan = if self.wanted.empty_log {
            Some(self.activity.plan_empty())
        } else if self.activity.waiting() > 0 {
            self.activity.plan(&keep())
        } else {
            None
        };
        if plan.is_none() && !self.wants_something() {
            return;
        }
        let wanted = std::mem::take(&mut self.wanted);
        let warms = plan.as_ref().is_some_and(|plan| !plan.regions.is_empty());
        let unclean = warms && std::mem::replace(&mut self.superblock.clean, false);
        let mut commit = Commit {
            covers: Ticket(self.last_ticket),
            half: Half::Heads,
            superblock: wanted.superblock || unclean,
            plan,
            queue: VecDeque::new(),
            under_way: 0,
            flushing: false,
            epoch: self.durable_epoch,
            in_use: self.durably_in_use,
        };
        let drops = commit.plan.as_ref().is_some_and(|plan| plan.drops);
        if wanted.bitmaps || drops {
            commit.half = Half::Pages;
            let layout = *self.layout();
            for (id, generation, words) in self.bitmaps.take_unsaved() {
                let offset = layout.bitmap_block(id.slot, id.page, generation);
                let block = bitmap::encode(id, self.tag, generation, &words);
                commit.queue.push_back((offset, block));
            }
        } else {
            self.queue_heads(&mut commit);
        }
        self.commit = Some(commit);
        self.advance(cx, ops);
    }

    fn queue_heads(&mut self, commit: &mut Commit) {
        commit.half = Half::Heads;
        if let Some(plan) = &commit.plan {
            let offset = self.layout().activity_block(plan.number);
            let block = log::encode(plan.number, self.tag, &plan.regions);
            commit.queue.push_back((offset, block));
        }
        if commit.superblock {
            self.superblock.generation += 1;
            let offset = self.layout().superblock_block(self.superblock.generation);
            commit.queue.push_back((offset, self.superblock.encode()));
            commit.epoch = self.superblock.epoch;
            commit.in_use = !self.superblock.clean;
        }
    }

    /// An operation of the commit is done. True: the commit is over, tickets and regions moved.
    pub(crate) fn commit_op_done(&mut self, cx: &mut Cx<'_>, ops: &mut Ops) -> bool {
        if let Some(commit) = &mut self.commit {
            if commit.flushing {
                commit.flushing = false;
                if commit.half == Half::Heads {
                    return self.end_commit();
                }
                if let Some(mut commit) = self.commit.take() {
                    self.queue_heads(&mut commit);
                    let nothing_more = commit.queue.is_empty();
                    self.commit = Some(commit);
                    if nothing_more {
                        return self.end_commit();
                    }
                }
            } else {
                commit.under_way = commit.under_way.saturating_sub(1);
            }
        }
        self.advance(cx, ops);
        false
    }

    fn end_commit(&mut self) -> bool {
        if let Some(commit) = self.commit.take() {
            self.durable = commit.covers;
            self.durable_epoch = commit.epoch;
            self.durably_in_use = commit.in_use;
        }
        true
    }

    fn advance(&mut self, cx: &mut Cx<'_>, ops: &mut Ops) {
        let Some(commit) = &mut self.commit else {
            return;
        };
        while commit.under_way < WRITES_MAX
            && let Some((offset, block)) = commit.queue.pop_front()
        {
            commit.under_way += 1;
            ops.write(cx, offset, block, OpUse::Commit);
        }
        if commit.under_way == 0 && !commit.flushing {
            commit.flushing = true;
            ops.start(cx, DiskOpKind::Flush, OpUse::Commit);
        }
    }
}
