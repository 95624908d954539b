//! A second fault in the middle of the recovery from the first: where replicated stores broke. What it is;
//! what makes it fall is in `cluster::second`.

use crate::{faults::Fault, rng::Rng};

/// A point of recovery at which a second fault comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// A new primary asks the members for their tails, or brings them into line.
    Reconcile,
    /// A node is named primary and not open yet.
    Promotion,
    /// A replica was asked what it is uncertain of and has not answered.
    StartSync,
    /// The last block of a resync is copied, the join not committed.
    Join,
    /// What only the loser of a split brain has is being saved.
    Saving,
    /// The successor of a moved replica is in sync, the moved one is still there.
    Move,
    /// The metadata of a replica is read, or what a crash left uncertain is made durable.
    Attach,
    /// Another replica was asked for blocks that the primary's disk can't read.
    Heal,
    /// What a verification found is being copied.
    Repair,
}

impl Point {
    /// Every one.
    pub const ALL: [Self; 9] = [
        Self::Reconcile,
        Self::Promotion,
        Self::StartSync,
        Self::Join,
        Self::Saving,
        Self::Move,
        Self::Attach,
        Self::Heal,
        Self::Repair,
    ];

    /// Its coverage mark.
    #[must_use]
    pub const fn mark(self) -> &'static str {
        match self {
            Self::Reconcile => "second fault at: reconciliation",
            Self::Promotion => "second fault at: promotion, before it opens",
            Self::StartSync => "second fault at: the begin of a resync",
            Self::Join => "second fault at: the end of a resync, before the join",
            Self::Saving => "second fault at: the saving of what gives way",
            Self::Move => "second fault at: the second half of a move",
            Self::Attach => "second fault at: an attach",
            Self::Heal => "second fault at: the healing of a read error",
            Self::Repair => "second fault at: the repair of what a verification found",
        }
    }

    /// A first fault after which a run gets there.
    pub(crate) const fn needs(self) -> Option<Fault> {
        match self {
            Self::Reconcile | Self::Promotion | Self::Attach => Some(Fault::CrashProcess),
            Self::StartSync | Self::Join => Some(Fault::CutPair),
            Self::Move => Some(Fault::Replicas),
            Self::Heal => Some(Fault::DiskError),
            Self::Saving | Self::Repair => None,
        }
    }
}

/// Whom a second fault hits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Victim {
    /// Who drives the recovery: the primary; a replica that gives way, goes or is attached.
    Source,
    /// The other one.
    Target,
    /// The leader of the control log; without real managers, the way to it.
    Leader,
}

/// What a second fault is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blow {
    /// The process dies.
    Crash,
    /// The power goes.
    Power,
    /// The two lose each other, on the data plane or entirely.
    Cut,
    /// A disk fails one operation.
    Disk,
    /// The process is stopped for a while.
    Pause,
    /// The control log is out of reach.
    NoLog,
}

impl Blow {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::Crash,
        Self::Power,
        Self::Cut,
        Self::Disk,
        Self::Pause,
        Self::NoLog,
    ];

    /// Its coverage mark.
    #[must_use]
    pub const fn mark(self) -> &'static str {
        match self {
            Self::Crash => "second fault: a process died",
            Self::Power => "second fault: the power went",
            Self::Cut => "second fault: two nodes lost each other",
            Self::Disk => "second fault: a disk failed",
            Self::Pause => "second fault: a process was stopped",
            Self::NoLog => "second fault: the control log was out of reach",
        }
    }
}

/// A second fault in the middle of the recovery from the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SecondFault {
    /// When.
    pub point: Point,
    /// Whom it hits.
    pub victim: Victim,
    /// What it is.
    pub blow: Blow,
}

impl SecondFault {
    /// The one of a seed, if it has one. Chance of its own: what else a seed means does not change.
    #[must_use]
    pub fn of_seed(seed: u64) -> Option<Self> {
        let mut rng = Rng::new(seed, 12);
        rng.chance(40.0).then(|| Self {
            point: rng.pick(&Point::ALL),
            victim: rng.pick(&[
                Victim::Source,
                Victim::Source,
                Victim::Target,
                Victim::Target,
                Victim::Leader,
            ]),
            blow: rng.pick(&Blow::ALL),
        })
    }
}
