//! What a seed stands for: sizes, workload, and which faults happen how often. Each seed switches a
//! random part of the faults off (swarm testing): a run with only a few kinds of fault goes deeper
//! into what these do than a run with all of them.

use std::{str::FromStr, time::Duration};

use relevo_replication::lab::PlantedBug;
use relevo_types::{
    Sensitivity,
    cluster::{
        Congestion, OnCongestion, Protocol,
        options::{Csums, DiskTimeout, OnIoError, OnLoss, OnNoData, SyncRate},
    },
};

use crate::{
    faults::Fault,
    paths::PathPlan,
    rng::Rng,
    second::{Point, SecondFault},
};

/// Replicas of a run at most.
pub const REPLICAS_MAX: usize = 3;

/// A bug put into the engine on purpose, to prove that the checkers catch it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planted(pub PlantedBug);

impl Planted {
    /// Every one, with its name on the command line.
    pub const ALL: &'static [(PlantedBug, &'static str)] = &[
        (
            PlantedBug::AckBeforeLeaveCommitted,
            "ack-before-leave-committed",
        ),
        (PlantedBug::ClearDirtyWithoutAck, "clear-dirty-without-ack"),
        (PlantedBug::SkipActivityWait, "skip-activity-wait"),
        (PlantedBug::OpenBeforeReconcile, "open-before-reconcile"),
        (PlantedBug::IgnoreLowerEpoch, "ignore-lower-epoch"),
        (PlantedBug::AsyncCountsAsInSync, "async-counts-as-in-sync"),
        (PlantedBug::AheadWithoutMarks, "ahead-without-marks"),
        (PlantedBug::AheadTrustsOldAcks, "ahead-trusts-old-acks"),
        (
            PlantedBug::GenerationDroppedEarly,
            "generation-dropped-early",
        ),
        (PlantedBug::FlushForgetsReceived, "flush-forgets-received"),
        (PlantedBug::ReceiptSettles, "receipt-settles"),
        (PlantedBug::JoinWhilePaused, "join-while-paused"),
        (
            PlantedBug::DifferingCountsAsSame,
            "differing-counts-as-same",
        ),
        (PlantedBug::VerifyOutsideGate, "verify-outside-gate"),
        (PlantedBug::ToldBeforeCommitted, "told-before-committed"),
        (PlantedBug::RepairForgotten, "repair-forgotten"),
        (PlantedBug::HealFromAnybody, "heal-from-anybody"),
        (PlantedBug::TenderTakesRequests, "tender-takes-requests"),
        (PlantedBug::MergeInSilence, "merge-in-silence"),
        (
            PlantedBug::OverwriteWithoutSaving,
            "overwrite-without-saving",
        ),
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(bug, _)| *bug == self.0)
            .map_or("", |(_, name)| name)
    }
}

impl FromStr for Planted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = Self::ALL.iter().map(|(_, name)| *name).collect();
        Self::ALL
            .iter()
            .find(|(_, name)| *name == text)
            .map(|(bug, _)| Self(*bug))
            .ok_or_else(|| format!("`{text}` is none of {}", names.join(", ")))
    }
}

impl FromStr for CrashPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let explain = || format!("`{text}` is not NODE:EFFECT:power or NODE:EFFECT:process");
        let mut parts = text.split(':');
        let mut number = || {
            parts
                .next()
                .and_then(|part| part.parse::<u64>().ok())
                .ok_or_else(explain)
        };
        let (node, disk_effect) = (number()?, number()?);
        let power = match parts.next() {
            Some("power") => true,
            Some("process") => false,
            _ => return Err(explain()),
        };
        Ok(Self {
            node: usize::try_from(node)
                .ok()
                .and_then(|node| node.checked_sub(1))
                .ok_or_else(explain)?,
            disk_effect,
            power,
        })
    }
}

/// A crash at one exact point, for crash enumeration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CrashPoint {
    /// The node, by position.
    pub node: usize,
    /// Before its disk effect of this number (counted from 0 over the run).
    pub disk_effect: u64,
    /// The power goes, not only the process.
    pub power: bool,
}

/// The protocols of a seed. Chance of its own: what else a seed means does not change.
fn mixture(seed: u64) -> ([Protocol; REPLICAS_MAX], Congestion, u64) {
    let mut rng = Rng::new(seed, 6);
    let mut protocols = [Protocol::C; REPLICAS_MAX];
    if rng.chance(60.0) {
        for own in &mut protocols {
            *own = rng.pick(&[Protocol::A, Protocol::B, Protocol::C]);
        }
        // One at least that a failover can go to or a restart can bring back.
        protocols[0] = protocols[0].max(Protocol::B);
    }
    let block = 4096;
    let sndbuf_bytes = rng.pick(&[2, 8, 32]) * block;
    let congestion = Congestion {
        sndbuf_bytes,
        policy: rng.pick(&[OnCongestion::Block, OnCongestion::PullAhead]),
        // Not less than a block: options refuse it.
        fill_bytes: (rng.pick(&[1, 2, 4]) * sndbuf_bytes / 4).max(block),
        extents: rng.pick(&[2, 1000]),
    };
    (protocols, congestion, rng.pick(&[0, 2000, 8000]))
}

/// What requests do without a majority. Chance of its own too.
fn no_quorum(seed: u64) -> OnLoss {
    if Rng::new(seed, 8).chance(20.0) {
        OnLoss::Error
    } else {
        OnLoss::Suspend
    }
}

/// What becomes of reads that nobody can serve, and how long a disk may hang. Chance of its own too.
fn disk_trouble(seed: u64) -> (OnIoError, DiskTimeout) {
    let mut rng = Rng::new(seed, 9);
    let policy = if rng.chance(20.0) {
        OnIoError::PassOn
    } else {
        OnIoError::Detach
    };
    let seconds = rng.pick(&[None, Some(2), Some(30)]);
    (policy, DiskTimeout { seconds })
}

/// How fast resyncs go. The largest volume has 8 MiB, which must be copied before a run counts as one
/// that does not heal. Chance of its own too.
fn sync_rate(seed: u64) -> SyncRate {
    let mut rng = Rng::new(seed, 12);
    let mib = |number: u64| number << 20;
    SyncRate {
        fixed: rng.chance(5.0).then(|| mib(rng.pick(&[4, 20]))),
        // A slow resync beside a busy application is a long run.
        min: mib(rng.pick(&[64, 64, 64, 16, 4])),
        max: rng.pick(&[None, None, None, Some(mib(8)), Some(mib(50))]),
    }
}

/// Everything that a run is made from.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Where all chance comes from.
    pub seed: u64,
    /// Nodes with a replica.
    pub data_nodes: usize,
    /// A further voter without one.
    pub witness: bool,
    /// The time-outs.
    pub sensitivity: Sensitivity,
    /// Size of the volume, in blocks.
    pub blocks: u64,
    /// Regions that the activity log holds at once.
    pub active_regions: usize,
    /// The blocks that the workload uses most.
    pub hot: Vec<u64>,
    /// Requests in flight at most.
    pub clients: usize,
    /// A client waits up to this long between requests, in microseconds.
    pub think_us: u64,
    /// Reads, in percent; of the rest:
    pub reads: f64,
    /// flushes, in percent; and of the writes:
    pub flushes: f64,
    /// with FUA, in percent;
    pub fua: f64,
    /// zeroes, in percent.
    pub zeroes: f64,
    /// Faults with their weights.
    pub faults: Vec<(Fault, u64)>,
    /// Mean time between faults.
    pub fault_every: Duration,
    /// A fault is followed by another one at once, in percent.
    pub bursts: f64,
    /// While the cluster heals there are no writes until it is whole: nothing then hides what is
    /// wrong, or shakes a peer awake. Also where writes would keep a replica of protocol A behind.
    pub idle_heal: bool,
    /// When all is whole, the disk of a secondary hangs while its daemon lives: writes must go on
    /// without it after a while.
    pub hang_one: bool,
    /// When all is whole and quiet, the disk of a secondary alters blocks by itself: a verification must
    /// find and repair exactly these.
    pub rot: bool,
    /// The primary that found it loses power as soon as it has told so: whoever is primary next repairs it.
    pub kill_finder: bool,
    /// When all is whole and quiet, all disks fail, the primary's last.
    pub last_disk: bool,
    /// At the end a primary is cut off, an outdated replica is forced, and both go on; then they meet.
    pub split: bool,
    /// Something breaks at a chosen point of recovery.
    pub second: Option<SecondFault>,
    /// A failed disk is repaired only when everything else is well: the others must do without it.
    pub repair_late: bool,
    /// How often something interesting is followed by a crash close by, in percent.
    pub ambush: f64,
    /// How long faults happen, each round.
    pub trouble: Duration,
    /// Rounds of trouble and healing.
    pub rounds: usize,
    /// Slowest usual disk operation, in microseconds.
    pub disk_us: u64,
    /// Slowest usual message, in microseconds.
    pub net_us: u64,
    /// Layer 2: the real node managers instead of the oracle of `cluster::govern`.
    pub managed: bool,
    /// Paths of heartbeats beside the first one. Layer 2.
    pub paths: PathPlan,
    /// A planted bug: managers take no heartbeat from any path but the first.
    pub deaf: bool,
    /// Heartbeats that get lost, in percent.
    pub datagram_loss: f64,
    /// The short schedule of crash enumeration, not the seed's own.
    pub short: bool,
    /// Protocols of the replicas, at least one for each.
    pub protocols: [Protocol; REPLICAS_MAX],
    /// Limits for replicas of protocol A.
    pub congestion: Congestion,
    /// Requests without a majority wait or fail.
    pub on_no_quorum: OnLoss,
    /// What becomes of reads that nobody can serve, and how long a disk may hang.
    pub disk_trouble: (OnIoError, DiskTimeout),
    /// Whether resyncs compare before they copy.
    pub csums: Csums,
    /// What becomes of requests when the last disk fails.
    pub on_no_data: OnNoData,
    /// How fast resyncs go.
    pub sync_rate: SyncRate,
    /// Replicas of protocol A are far away: each write to them takes the line this long, in
    /// microseconds. 0: they are not.
    pub far_us: u64,
    /// A volume without a primary is tended first, in percent.
    pub tends: f64,
    /// A planted bug.
    pub planted: Option<Planted>,
    /// Crash enumeration: the one crash of the run.
    pub crash_point: Option<CrashPoint>,
}

impl Scenario {
    /// The scenario of a seed.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0);
        let data_nodes = if rng.chance(40.0) { 2 } else { 3 };
        // Two voters can't lose one; it is the rare case, for the waits.
        let witness = if data_nodes == 2 {
            rng.chance(90.0)
        } else {
            rng.chance(30.0)
        };
        // Regions of the activity log have 256 blocks; the last one may be short.
        let blocks = rng.pick(&[100, 600, 1300, 2048]);
        // Few blocks collide often; but what goes wrong with a block is soon written over. Many
        // keep it until the replicas are compared.
        let hot_count = rng.pick(&[4, 16, 64, 400]);
        let hot = (0..hot_count).map(|_| rng.below(blocks)).collect();
        // Few kinds go deep, many go wide.
        let kinds = rng.pick(&[1, 2, 2, 3, 4, 8]);
        let mut faults: Vec<(Fault, u64)> = Vec::new();
        while faults.len() < kinds {
            let fault = rng.pick(Fault::ALL);
            if faults.iter().all(|(other, _)| *other != fault) {
                faults.push((fault, rng.between(1, 10)));
            }
        }
        let second = SecondFault::of_seed(seed);
        let at = |point| second.is_some_and(|it| it.point == point);
        let needed = second.and_then(|it| it.point.needs());
        if let Some(needed) = needed.filter(|it| faults.iter().all(|(other, _)| other != it)) {
            faults.push((needed, 5));
        }
        let (protocols, congestion, far_us) = mixture(seed);
        let mut scenario = Self {
            seed,
            data_nodes,
            witness,
            sensitivity: Sensitivity::Fast,
            blocks,
            active_regions: rng.pick(&[2, 3, 4]),
            hot,
            clients: rng.pick(&[1, 2, 4, 8]),
            think_us: rng.pick(&[1000, 4000, 15_000]),
            reads: rng.pick(&[20.0, 40.0, 60.0]),
            flushes: rng.pick(&[0.0, 5.0, 25.0]),
            fua: rng.pick(&[0.0, 10.0, 50.0]),
            zeroes: rng.pick(&[0.0, 5.0, 20.0]),
            faults,
            fault_every: Duration::from_millis(rng.pick(&[40, 120, 300])),
            bursts: rng.pick(&[0.0, 20.0, 60.0]),
            idle_heal: rng.chance(50.0),
            hang_one: rng.chance(10.0),
            rot: Rng::new(seed, 77).chance(10.0) || at(Point::Repair),
            kill_finder: Rng::new(seed, 78).chance(40.0),
            last_disk: Rng::new(seed, 79).chance(8.0),
            on_no_data: Rng::new(seed, 80).pick(&[OnNoData::Error, OnNoData::Suspend]),
            split: Rng::new(seed, 10).chance(12.0) || at(Point::Saving),
            second,
            repair_late: rng.chance(50.0),
            ambush: rng.pick(&[0.0, 5.0, 25.0]),
            trouble: Duration::from_millis(rng.pick(&[300, 600, 1200])),
            rounds: rng.pick(&[1, 1, 2, 3]),
            disk_us: rng.pick(&[200, 1000, 4000]),
            net_us: rng.pick(&[100, 1000, 5000]),
            managed: false,
            paths: PathPlan::default(),
            deaf: false,
            datagram_loss: rng.pick(&[0.0, 1.0, 10.0]),
            short: false,
            planted: None,
            crash_point: None,
            protocols,
            congestion,
            on_no_quorum: no_quorum(seed),
            // One of protocol A that must also be copied slowly never catches up with a busy application.
            sync_rate: if protocols[..data_nodes].contains(&Protocol::A) {
                SyncRate {
                    fixed: None,
                    min: u64::MAX,
                    max: None,
                }
            } else {
                sync_rate(seed)
            },
            csums: Rng::new(seed, 11).pick(&[Csums::Auto, Csums::Yes, Csums::No]),
            disk_trouble: disk_trouble(seed),
            far_us,
            tends: Rng::new(seed, 14).pick(&[0.0, 0.0, 20.0, 60.0]),
        };
        // Who is left behind by an application that never pauses stays behind, as he should.
        scenario.idle_heal |= scenario.outruns();
        scenario
    }

    /// Whether more may be written than the line to a replica that is left behind carries: as much as
    /// begins `Ahead`, each round trip.
    fn outruns(&self) -> bool {
        let follows = self.protocols[..self.data_nodes].contains(&Protocol::A);
        let carried = self.congestion.fill_bytes / 4096 * self.think_us;
        let asked = 2 * self.clients as u64 * (2 * self.net_us + self.disk_us + self.far_us);
        follows && self.congestion.policy == OnCongestion::PullAhead && asked > carried
    }

    /// The seed's scenario with the real managers.
    #[must_use]
    pub fn managed(seed: u64) -> Self {
        let mut scenario = Self::of_seed(seed);
        // What these do is the manager's business: it decides who is primary.
        scenario
            .faults
            .retain(|(fault, _)| !matches!(fault, Fault::Switchover | Fault::Restart));
        scenario.faults.push((Fault::CrashProcess, 2));
        scenario.faults.push((Fault::MoveService, 3));
        let paths = PathPlan::of_seed(seed);
        if paths.has_more() {
            scenario.faults.push((Fault::CutPath, 8));
        }
        Self {
            managed: true,
            paths,
            witness: scenario.data_nodes == 2 || scenario.witness,
            ..scenario
        }
    }

    /// A short schedule without any chance fault, for crash enumeration: the switchover, the loss of
    /// a link and a resync are in it.
    #[must_use]
    pub fn short(seed: u64) -> Self {
        Self {
            data_nodes: 2,
            witness: true,
            blocks: 600,
            active_regions: 2,
            clients: 2,
            think_us: 3000,
            flushes: 10.0,
            faults: vec![
                (Fault::BreakLink, 3),
                (Fault::Switchover, 1),
                (Fault::CutPair, 1),
            ],
            fault_every: Duration::from_millis(150),
            ambush: 0.0,
            trouble: Duration::from_millis(700),
            rounds: 1,
            hang_one: false,
            rot: false,
            last_disk: false,
            split: false,
            second: None,
            disk_us: 1000,
            net_us: 1000,
            short: true,
            protocols: [Protocol::C; REPLICAS_MAX],
            ..Self::of_seed(seed)
        }
    }

    /// The arguments of `sim` that run this scenario again.
    #[must_use]
    pub fn arguments(&self) -> String {
        let mut text = format!("--seed {}", self.seed);
        if self.short {
            text.push_str(" --short");
        }
        if self.managed {
            text.push_str(" --managed");
        }
        if let Some(point) = self.crash_point {
            text.push_str(&format!(
                " --crash {}:{}:{}",
                point.node + 1,
                point.disk_effect,
                if point.power { "power" } else { "process" }
            ));
        }
        if let Some(bug) = self.planted {
            text.push_str(&format!(" --planted {}", bug.name()));
        }
        text
    }

    /// All voters.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.data_nodes + usize::from(self.witness)
    }
}
