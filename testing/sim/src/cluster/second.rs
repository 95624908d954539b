//! A second fault in the middle of the recovery from the first. Random faults overlap too, but rarely
//! within the few milliseconds that matter: here a seed names a point of recovery, and when a run reaches
//! it, something breaks before it is over.
//!
//! The other modules say when a point begins (`at_point`) and, where that can't be seen from outside, when
//! it ends (`point_over`).

use std::time::Duration;

use relevo_types::{Time, cluster::Protocol};
use relevo_wire::Message;

use super::{Cluster, Crash, Event, Phase, node_id};
use crate::{
    check::Verdict,
    net::{Index, Plane},
    rng::Rng,
    second::{Blow, Point, SecondFault, Victim},
};

/// What a blow breaks is whole again within this time, the nodes started again.
const BACK_WITHIN_MS: u64 = 500;

/// From then on until nobody can take a node for well that is not: links time out, evictions.
const NOTICED_WITHIN: Duration = Duration::from_millis(1000);

/// Blows in one run at most: it must heal between two.
const BLOWS: u32 = 3;

/// Blows of a run, past and coming.
#[derive(Debug)]
pub(super) struct Second {
    chance: Rng,
    left: u32,
    /// One is about to fall.
    pending: bool,
    /// A point that lasts until somebody says that it is over.
    lasts: Option<(Point, Index, Index)>,
    /// When the last one is over, and noticed everywhere.
    pub(super) over_at: Time,
    /// Scenes that must know all that happens want none.
    pub(super) off: bool,
}

impl Second {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            chance: Rng::new(seed, 13),
            left: BLOWS,
            pending: false,
            lasts: None,
            over_at: Time::ZERO,
            off: false,
        }
    }

    /// What was asked for is there: the blocks are about to be written anew.
    pub(super) fn content_arrived(&mut self, source: Index, target: Index) {
        if self.lasts == Some((Point::Heal, source, target)) {
            self.lasts = None;
        }
    }
}

impl Cluster {
    /// A point of recovery begins between two nodes: perhaps something breaks there.
    pub(super) fn at_point(&mut self, point: Point, source: Index, target: Index) {
        let planned = self.scenario.second.filter(|plan| plan.point == point);
        let Some(SecondFault { victim, blow, .. }) = planned else {
            return;
        };
        // The scenes of these two are settled or quiet otherwise.
        let scene = matches!(point, Point::Saving | Point::Repair);
        let allowed = scene || !self.second.off && self.phase != Phase::Settling;
        if !allowed || self.second.pending || self.second.left == 0 {
            return;
        }
        self.second.lasts = Some((point, source, target));
        if self.queue.now() < self.second.over_at || !self.second.chance.chance(60.0) {
            return;
        }
        self.second.pending = true;
        // Such blocks are asked for, read, sent and written anew in few steps.
        let most = if point == Point::Heal { 1 } else { 2 };
        let delay = self.second.chance.micros(0, most * self.scenario.net_us);
        let event = Event::SecondFault {
            point,
            between: (source, target),
            victim,
            blow,
        };
        self.queue.after(delay, event);
    }

    /// A point that lasts until then is over.
    pub(super) fn point_over(&mut self, point: Point, source: Index, target: Index) {
        if self.second.lasts == Some((point, source, target)) {
            self.second.lasts = None;
        }
    }

    /// What an engine sends, as far as it begins a point.
    pub(super) fn point_of_message(&mut self, from: Index, to: Index, message: &Message) {
        match message {
            Message::Reconcile { .. } => self.at_point(Point::Reconcile, from, to),
            Message::StartSync { .. } => self.at_point(Point::StartSync, from, to),
            Message::ReadBlocks { .. } => self.at_point(Point::Heal, from, to),
            Message::Barrier { .. } => {
                let volume = self.control.volume();
                let (from_id, to_id) = (node_id(from), node_id(to));
                let joins = volume.protocol(from_id, to_id) != Protocol::A
                    || volume.options.admit == Some(to_id);
                if joins {
                    self.at_point(Point::Join, from, to);
                }
            }
            // The answer: it arrives soon.
            Message::Uncertain { last: true, .. } => self.point_over(Point::StartSync, to, from),
            _ => {}
        }
    }

    /// Whether a point is not over yet.
    fn still_at(&self, point: Point, source: Index, target: Index) -> bool {
        let runs = |node: Index| self.machines[node].acts();
        let volume = self.control.volume();
        match point {
            Point::Reconcile | Point::Promotion => {
                volume.primary == Some(node_id(source))
                    && runs(source)
                    && self.machines[source].open().is_none()
            }
            Point::StartSync | Point::Join | Point::Heal => {
                self.second.lasts == Some((point, source, target))
                    && runs(source)
                    && runs(target)
                    && self.net.is_linked(source, target)
            }
            Point::Saving => self.machines[source].saving.is_some() && runs(source),
            Point::Move => volume
                .replicas
                .get(&node_id(source))
                .is_some_and(|replica| replica.leaving),
            Point::Attach => {
                let process = self.machines[source].process.as_ref();
                process.is_some_and(|it| it.engine.is_some() && !it.attached && !it.disk_failed)
            }
            Point::Repair => self.is_repairing() && runs(source) && runs(target),
        }
    }

    /// A blow falls, if its point is not over.
    pub(super) fn second_fault(
        &mut self,
        point: Point,
        (source, target): (Index, Index),
        victim: Victim,
        blow: Blow,
    ) -> Verdict {
        self.second.pending = false;
        if !self.still_at(point, source, target) {
            return Ok(());
        }
        let (victim, blow) = self.spare(point, (source, target), victim, blow);
        let now = self.queue.now();
        self.trace.node(now, victim, || {
            format!("second fault at {point:?}: {blow:?}")
        });
        self.marks.reached(point.mark());
        self.marks.reached(blow.mark());
        self.second.left -= 1;
        let back = self.second.chance.millis(3, BACK_WITHIN_MS);
        self.second.over_at = now + back + NOTICED_WITHIN;
        match blow {
            Blow::Crash => self.crash_for(victim, Crash::Process, back),
            Blow::Power => self.crash_for(victim, Crash::Power, back),
            Blow::Disk => self.disk_error(victim),
            Blow::NoLog => self.machines[victim].log_away_until = now + back,
            Blow::Pause if self.machines[victim].acts() => {
                self.machines[victim].paused_until = Some(now + back);
                self.queue.after(back, Event::Resume(victim));
            }
            Blow::Pause => {}
            Blow::Cut => {
                let planes: &[Plane] = if self.second.chance.chance(50.0) {
                    &[Plane::Data]
                } else {
                    &Plane::ALL
                };
                let directions = [(source, target), (target, source)];
                let cuts: Vec<(Plane, Index, Index)> = planes
                    .iter()
                    .flat_map(|plane| directions.map(|(from, to)| (*plane, from, to)))
                    .filter(|(plane, from, to)| self.net.is_open(*plane, *from, *to))
                    .collect();
                for (plane, from, to) in &cuts {
                    self.net.set_open(*plane, *from, *to, false);
                }
                self.queue.after(back, Event::SecondOver(cuts));
            }
        }
        Ok(())
    }

    fn crash_for(&mut self, node: Index, kind: Crash, back: Duration) {
        if self.machines[node].process.is_some() {
            self.crash(node, kind);
            self.queue.after(back, Event::Start(node));
        }
    }

    /// Who is hit and by what: as the seed says, but for what would make a broken promise not the
    /// engine's fault.
    fn spare(
        &self,
        point: Point,
        (source, target): (Index, Index),
        victim: Victim,
        blow: Blow,
    ) -> (Index, Blow) {
        let node = match victim {
            Victim::Source => source,
            Victim::Target => target,
            // The oracle of the log has no leader: its proposer can't reach it.
            Victim::Leader => self.leader.unwrap_or(source),
        };
        match (point, victim, blow) {
            // What only the loser has is compared with what it had: none of it may go with the power.
            (Point::Saving, _, Blow::Power | Blow::Disk | Blow::NoLog) => (source, Blow::Crash),
            (Point::Saving, Victim::Leader, blow) => (source, blow),
            // The next primary may know nothing of what is to be repaired, and may be the damaged one.
            (Point::Repair, _, Blow::Disk | Blow::NoLog) => (target, Blow::Crash),
            (Point::Repair, _, blow) => (target, blow),
            (_, Victim::Leader, _) if self.leader.is_none() => (source, Blow::NoLog),
            (_, _, blow) => (node, blow),
        }
    }
}
