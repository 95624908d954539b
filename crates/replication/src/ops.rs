//! Disk operations under way: their numbers, and what each is for.

use bytes::Bytes;
use relevo_types::Time;

use crate::{
    io::{DiskOp, DiskOpKind, Effect, OpId},
    jobs::JobId,
    window::Window,
};

/// What one call of [`crate::Engine::handle`] works with: the time and the list of effects.
pub(crate) struct Cx<'a> {
    pub(crate) now: Time,
    pub(crate) effects: &'a mut Vec<Effect>,
}

impl Cx<'_> {
    pub(crate) fn emit(&mut self, effect: Effect) {
        self.effects.push(effect);
    }
}

/// What an operation is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OpUse {
    /// Reading metadata while attaching; which part.
    Attach(usize),
    /// Data of a job.
    Job(JobId),
    /// The flush that the flusher has under way.
    Flush,
    /// A write or flush of the metadata commit under way.
    Commit,
}

/// The operations under way.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    last: u64,
    /// What for, and since when; in the order in which they began.
    uses: Window<OpId, (OpUse, Time)>,
}

impl Ops {
    pub(crate) fn start(&mut self, cx: &mut Cx<'_>, kind: DiskOpKind, used_for: OpUse) {
        self.last += 1;
        let op = OpId(self.last);
        self.uses.insert(op, (used_for, cx.now));
        cx.emit(Effect::Disk(DiskOp { op, kind }));
    }

    pub(crate) fn write(&mut self, cx: &mut Cx<'_>, offset: u64, data: Vec<u8>, used_for: OpUse) {
        let data = Bytes::from(data);
        self.start(cx, DiskOpKind::Write { offset, data }, used_for);
    }

    /// What a completed operation was for; `None` when nobody asked for it.
    pub(crate) fn finish(&mut self, op: OpId) -> Option<OpUse> {
        self.uses.remove(&op).map(|(used_for, _)| used_for)
    }

    /// Since when the oldest operation is under way.
    pub(crate) fn oldest(&self) -> Option<Time> {
        self.uses.first().map(|(_, (_, since))| *since)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.uses.is_empty()
    }
}
