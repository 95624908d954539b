//! A simulated machine: what survives a process (disk, what it knows of the log, its clock), and the
//! process with its engine. Owned by the cluster.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use relevo_replication::{Engine, Input, SaveId};
use relevo_types::{Epoch, NodeId, Time, cluster::ClusterState, cluster::Volume};

use super::managed::{Kept, Manager};
use crate::{
    check::{cold::ColdRegions, linear::Tick, lower_epoch::LowerEpoch},
    control::VOLUME,
    disk::Disk,
};

/// How a process ends without being asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Crash {
    /// It dies; the kernel lives.
    Process,
    /// The machine loses power.
    Power,
}

/// Which operation fails next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Failing {
    Read,
    Write,
    Flush,
}

/// A machine.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) id: NodeId,
    pub(super) disk: Disk,
    /// Watches its activity log; `None` on a witness.
    pub(super) cold: Option<ColdRegions>,
    pub(super) process: Option<Process>,
    /// Stopped until then; its inputs queue.
    pub(super) paused_until: Option<Time>,
    /// The newest state of the log it learned, with its number. Durable.
    pub(super) known: (usize, Arc<ClusterState>),
    /// Since when its process runs without having been stopped. Layer 2.
    pub(super) awake_since: Time,
    /// Its clock is ahead of virtual time by this.
    pub(super) clock_offset: Duration,
    /// When it last lost power without having been resynced since.
    pub(super) lost_power: Option<Tick>,
    /// It was left behind as a replica of protocol A.
    pub(super) was_behind: bool,
    /// The line to it, if it is far away, carries something until then.
    pub(super) line_busy_until: Time,
    /// When it last said that all it was sent is on stable storage.
    pub(super) barrier_passed: Tick,
    /// It crashes after so many more effects.
    pub(super) crash_in: Option<(u32, Crash)>,
    /// Operations that begin before then end after it.
    pub(super) slow_until: Time,
    pub(super) failing: Option<Failing>,
    /// Blocks of which some could not be read when they were compared.
    pub(super) unreadable: BTreeSet<u64>,
    /// No operation ends.
    pub(super) hung: bool,
    /// It can't reach the control log until then.
    pub(super) log_away_until: Time,
    pub(super) disk_effects: u64,
    /// The end of its lease by its own word, in virtual time. Layer 2.
    pub(super) lease_until: Time,
    /// False while an operator replaces its replica.
    pub(super) has_replica: bool,
    /// What its manager's doings leave on the machine. Layer 2.
    pub(super) kept: Kept,
    pub(super) incarnations: u64,
    /// What was saved of it before it was overwritten, by block; and a saving that is not complete.
    pub(super) saved: BTreeMap<u64, Bytes>,
    pub(super) saving: Option<(SaveId, BTreeMap<u64, Bytes>)>,
}

/// A running daemon.
#[derive(Debug)]
pub(super) struct Process {
    /// `None` on a witness.
    pub(super) engine: Option<Engine>,
    /// The real one, in layer 2.
    pub(super) manager: Option<Manager>,
    pub(super) incarnation: u64,
    pub(super) inbox: VecDeque<Input>,
    /// When a tick is due that is in the queue already.
    pub(super) tick_at: Time,
    pub(super) open: Option<Epoch>,
    pub(super) attached: bool,
    pub(super) disk_failed: bool,
    pub(super) detaching: bool,
    /// It was asked to step down.
    pub(super) stepping_down: bool,
    /// When it started, for a restart after a failure.
    pub(super) started: Time,
    /// A resync runs to or from it, as it says.
    pub(super) syncing: bool,
    /// One of them stands still by an order.
    pub(super) sync_paused: bool,
    /// Its resyncs are held for the application's sake.
    pub(super) sync_held: bool,
    /// Watches which epochs it is under.
    pub(super) lower_epoch: LowerEpoch,
}

impl Machine {
    pub(super) fn new(
        id: NodeId,
        (disk, cold): (Disk, Option<ColdRegions>),
        known: Arc<ClusterState>,
        clock_offset: Duration,
    ) -> Self {
        Self {
            id,
            disk,
            cold,
            process: None,
            paused_until: None,
            awake_since: Time::ZERO,
            known: (0, known),
            clock_offset,
            lost_power: None,
            was_behind: false,
            line_busy_until: Time::ZERO,
            barrier_passed: Tick(0),
            crash_in: None,
            slow_until: Time::ZERO,
            failing: None,
            unreadable: BTreeSet::new(),
            hung: false,
            log_away_until: Time::ZERO,
            disk_effects: 0,
            lease_until: Time::ZERO,
            has_replica: true,
            kept: Kept::default(),
            incarnations: 0,
            saved: BTreeMap::new(),
            saving: None,
        }
    }

    /// The daemon runs and is not stopped.
    pub(super) fn acts(&self) -> bool {
        self.process.is_some() && self.paused_until.is_none()
    }

    /// The configuration of the volume as this node knows it.
    pub(super) fn known_volume(&self) -> &Volume {
        &self.known.1.volumes[&VOLUME]
    }

    /// The node is open for applications.
    pub(super) fn open(&self) -> Option<Epoch> {
        self.process.as_ref().and_then(|process| process.open)
    }

    pub(super) fn incarnation(&self) -> u64 {
        self.process
            .as_ref()
            .map_or(0, |process| process.incarnation)
    }
}
