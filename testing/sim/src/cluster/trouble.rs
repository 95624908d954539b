//! Faults: what each does, for how long, and what must stay whole so that a broken promise is the
//! engine's fault. A disk error is only injected while another good in-sync replica exists.

use std::time::Duration;

use relevo_replication::Input;

use super::{Cluster, Crash, Event, Phase, node_id, verify::QUIET};
use relevo_types::cluster::{Command, Protocol, VolumeOptions};

use crate::{
    check::Verdict,
    cluster::machine::Failing,
    faults::Fault,
    net::{Index, Plane},
    second::Point,
};

/// A fault cuts the network for this long at most.
const CUTS_MAX_MS: u64 = 1500;
pub(super) const CUTS_MAX: Duration = Duration::from_millis(CUTS_MAX_MS);

impl Cluster {
    /// Injects the next fault and arranges the one after it.
    pub(super) fn trouble(&mut self) -> Verdict {
        if self.phase != Phase::Trouble || self.scenario.faults.is_empty() {
            return Ok(());
        }
        let mean = self.scenario.fault_every;
        let next = if self.chance.trouble.chance(self.scenario.bursts) {
            self.chance.trouble.millis(0, 15)
        } else {
            self.chance.trouble.time(Duration::ZERO, mean * 2)
        };
        self.queue.after(next, Event::Trouble);
        let total: u64 = self.scenario.faults.iter().map(|(_, weight)| weight).sum();
        let mut draw = self.chance.trouble.below(total);
        let mut chosen = self.scenario.faults[0].0;
        for (fault, weight) in &self.scenario.faults {
            if draw < *weight {
                chosen = *fault;
                break;
            }
            draw -= weight;
        }
        self.inject(chosen)
    }

    fn inject(&mut self, fault: Fault) -> Verdict {
        let now = self.queue.now();
        let any = self.chance.trouble.index(self.scenario.nodes());
        let data = self.chance.trouble.index(self.scenario.data_nodes);
        self.trace.all(now, || format!("fault: {fault:?}"));
        let primary = self.open_primary().and_then(|node| self.engine(node));
        let waits = primary.and_then(|engine| engine.status().waiting);
        if waits.is_some_and(|words| words.contains("on-congestion")) {
            self.marks
                .reached("protocol A: congestion blocked the application");
        }
        match fault {
            Fault::CrashProcess => self.crash_and_return(any, Crash::Process),
            Fault::LosePower => self.crash_and_return(any, Crash::Power),
            Fault::LosePowerEverywhere => {
                self.marks.reached("power loss of all data nodes");
                for node in 0..self.scenario.data_nodes {
                    self.crash_and_return(node, Crash::Power);
                }
            }
            Fault::CrashSoon => self.arm(data),
            Fault::Pause => self.pause(any),
            Fault::Isolate => {
                let directions = (0..self.scenario.nodes())
                    .filter(|other| *other != any)
                    .flat_map(|other| [(any, other), (other, any)])
                    .collect();
                self.cut(directions);
            }
            Fault::CutOneWay => {
                let other = self.other_than(any, self.scenario.nodes());
                self.marks.reached("one direction cut alone");
                self.cut(vec![(any, other)]);
            }
            Fault::CutPair => {
                let other = self.other_than(data, self.scenario.data_nodes);
                self.cut(vec![(data, other), (other, data)]);
            }
            Fault::Zombie => self.zombie(),
            Fault::BreakLink => self.break_link(data),
            Fault::DiskError => self.disk_error(data),
            Fault::DiskStall => {
                self.machines[data].slow_until = now + self.chance.trouble.spread_millis(5, 900);
            }
            Fault::LogAway => {
                self.machines[any].log_away_until = now + self.chance.trouble.spread_millis(5, 900);
            }
            Fault::Switchover => return self.switchover(),
            Fault::Restart => return self.restart(data),
            Fault::Replicas => self.remove_replica(data),
            Fault::Orders => return self.give_orders(data),
            Fault::MoveService => self.move_service(data),
            Fault::CutPath => self.cut_path(),
        }
        Ok(())
    }

    /// The workload holds back for a moment, so that what lies on the disks can be compared, in the
    /// middle of whatever is going on.
    pub(super) fn hush(&mut self) {
        let again = self.chance.load.millis(100, 600);
        let long = QUIET + self.chance.load.millis(20, 250);
        self.queue.after(long, Event::Loud);
        self.queue.after(long + again, Event::Hush);
        if self.phase == Phase::Trouble {
            self.quiet = true;
            self.quiet_since = self.queue.now();
            self.compared = false;
        }
    }

    pub(super) fn crash_and_return(&mut self, node: Index, kind: Crash) {
        if self.machines[node].process.is_some() || kind == Crash::Power {
            self.crash(node, kind);
            let back = self.chance.trouble.spread_millis(3, 1500);
            self.queue.after(back, Event::Start(node));
        }
    }

    /// Lets a node crash within its next few effects.
    fn arm(&mut self, node: Index) {
        let effects = self.chance.trouble.below(25);
        let kind = if self.chance.trouble.chance(50.0) {
            Crash::Process
        } else {
            Crash::Power
        };
        let effects = u32::try_from(effects).unwrap_or(0);
        self.machines[node].crash_in = Some((effects, kind));
    }

    /// Something interesting began at a node: perhaps it or another one crashes close by.
    pub(super) fn ambush(&mut self, node: Index) {
        if self.phase != Phase::Trouble || node >= self.scenario.data_nodes {
            return;
        }
        if self.chance.trouble.chance(self.scenario.ambush) {
            let victim = if self.chance.trouble.chance(60.0) {
                node
            } else {
                self.other_than(node, self.scenario.data_nodes)
            };
            self.arm(victim);
        }
    }

    pub(super) fn other_than(&mut self, node: Index, among: usize) -> Index {
        let other = self.chance.trouble.index(among.saturating_sub(1));
        if other >= node { other + 1 } else { other }
    }

    fn pause(&mut self, node: Index) {
        if !self.machines[node].acts() {
            return;
        }
        let how_long = self.chance.trouble.spread_millis(3, 1200);
        if how_long > self.leases.timing().lease {
            self.marks.reached("node paused past its lease");
        }
        self.machines[node].paused_until = Some(self.queue.now() + how_long);
        self.queue.after(how_long, Event::Resume(node));
    }

    /// Cuts directions for a while: usually whole cables, sometimes one plane alone.
    fn cut(&mut self, directions: Vec<(Index, Index)>) {
        let how_long = self.chance.trouble.spread_millis(3, CUTS_MAX_MS);
        let planes: &[Plane] = match self.chance.trouble.below(4) {
            0 => &[Plane::Data],
            1 => &[Plane::Control],
            _ => &Plane::ALL,
        };
        if planes == [Plane::Control] {
            self.marks
                .reached("heartbeats and log cut, replication not");
        }
        let cuts: Vec<(Plane, Index, Index)> = directions
            .into_iter()
            .flat_map(|(from, to)| planes.iter().map(move |plane| (*plane, from, to)))
            .collect();
        for (plane, from, to) in &cuts {
            self.net.set_open(*plane, *from, *to, false);
        }
        self.queue.after(how_long, Event::Heal(cuts));
    }

    fn zombie(&mut self) {
        let Some(primary) = self.open_primary() else {
            return;
        };
        let cut_already = (0..self.scenario.nodes())
            .any(|other| !self.net.is_open(Plane::Control, primary, other));
        if cut_already {
            return;
        }
        let mut cuts = Vec::new();
        for other in (0..self.scenario.nodes()).filter(|other| *other != primary) {
            cuts.push((Plane::Control, primary, other));
            cuts.push((Plane::Control, other, primary));
        }
        let other = self.other_than(primary, self.scenario.data_nodes);
        match self.chance.trouble.below(3) {
            0 => {}
            1 => cuts.push((Plane::Data, other, primary)),
            _ => cuts.extend([(Plane::Data, other, primary), (Plane::Data, primary, other)]),
        }
        for (plane, from, to) in &cuts {
            self.net.set_open(*plane, *from, *to, false);
        }
        self.marks
            .reached("heartbeats and log cut, replication not");
        let how_long = self.chance.trouble.millis(300, CUTS_MAX_MS);
        self.queue.after(how_long, Event::Heal(cuts));
    }

    fn break_link(&mut self, node: Index) {
        let other = self.other_than(node, self.scenario.data_nodes);
        let busy = self.net.under_way > 0;
        let Some(conn) = self.net.break_link(node, other, &mut self.chance.net) else {
            return;
        };
        if busy {
            self.marks.reached("link broke with messages under way");
        }
        for side in 0..2 {
            let late = self.chance.net.chance(20.0);
            let delay = self.chance.net.millis(0, if late { 600 } else { 20 });
            self.queue.after(delay, Event::TellDown(conn, side));
        }
    }

    /// A disk that fails while the replica is attached, now and then.
    pub(super) fn fail_early(&mut self, node: Index) {
        let wanted = self
            .scenario
            .faults
            .iter()
            .any(|(fault, _)| *fault == Fault::DiskError);
        if self.phase == Phase::Trouble && wanted && self.chance.trouble.chance(6.0) {
            self.disk_error(node);
        }
    }

    /// Fails one disk operation, if the data is certainly elsewhere too.
    pub(super) fn disk_error(&mut self, node: Index) {
        let sick = |machine: &super::Machine| {
            machine.failing.is_some() || machine.process.as_ref().is_some_and(|p| p.disk_failed)
        };
        let volume = self.control.volume();
        let other_good = volume.in_sync.iter().any(|member| {
            *member != node_id(node) && self.machines[super::index_of(*member)].acts()
        });
        if !other_good || self.machines.iter().any(sick) {
            return;
        }
        let second = self.scenario.second.map(|plan| plan.point);
        let what: &[Failing] = if second == Some(Point::Heal) {
            &[Failing::Read]
        } else {
            &[Failing::Read, Failing::Write, Failing::Flush]
        };
        self.machines[node].failing = Some(self.chance.trouble.pick(what));
    }

    /// The operator moves the role to another node, perhaps twice in a row.
    pub(super) fn switchover(&mut self) -> Verdict {
        let Some(primary) = self.open_primary() else {
            return Ok(());
        };
        let other = self.other_than(primary, self.scenario.data_nodes);
        self.switch_to(primary, other)
    }

    /// The operator moves the role from one node to another.
    pub(super) fn switch_to(&mut self, primary: Index, other: Index) -> Verdict {
        // If it has to drain and join first, the next switchover may find it in the set.
        if self.drain_to(primary, other) {
            return Ok(());
        }
        self.target = Some(node_id(other));
        if let Some(process) = &mut self.machines[primary].process {
            process.stepping_down = true;
        }
        self.feed(primary, Input::Demote)
    }

    /// A replica of protocol A is to get what it lacks, and to join the set. False: it needn't.
    fn drain_to(&mut self, primary: Index, other: Index) -> bool {
        let volume = self.control.volume();
        let other = node_id(other);
        let drains = volume.replicas.contains_key(&other)
            && volume.protocol(node_id(primary), other) == Protocol::A
            && !volume.in_sync.contains(&other);
        if drains && volume.options.admit != Some(other) {
            let options = VolumeOptions {
                admit: Some(other),
                ..volume.options.clone()
            };
            let command = Command::SetVolumeOptions {
                volume: volume.id,
                expect: volume.version,
                options,
            };
            drop(self.commit_now(primary, &command));
        }
        drains
    }

    /// The operator asks for the service to be on a node. One of protocol A gets what it lacks first.
    pub(super) fn move_service(&mut self, node: Index) {
        let Some(service) = self.control.state().services.keys().next().copied() else {
            return;
        };
        let target = Some(node_id(node));
        if let Some(primary) = self.open_primary().filter(|primary| *primary != node)
            && self.phase == Phase::Trouble
            && self.drain_to(primary, node)
        {
            let later = self.chance.trouble.millis(20, 60);
            self.queue.after(later, Event::MoveService(node));
            return;
        }
        // By way of whoever leads the log; if nobody does, the operator gets an error.
        if self
            .leader
            .is_some_and(|leader| self.reaches_majority(leader))
        {
            let command = Command::SetTarget { service, target };
            drop(self.commit_now(node, &command));
            self.target = target;
        }
    }

    /// A secondary's daemon is stopped in order and comes back.
    fn restart(&mut self, node: Index) -> Verdict {
        let machine = &mut self.machines[node];
        let primary = machine.known_volume().primary == Some(machine.id);
        let Some(process) = &mut machine.process else {
            return Ok(());
        };
        if primary || process.open.is_some() || !process.attached || process.disk_failed {
            return Ok(());
        }
        process.detaching = true;
        self.feed(node, Input::Detach)
    }

    /// An engine detached: its daemon ends.
    pub(super) fn detached(&mut self, node: Index) {
        let due = self.queue.now() + self.message_delay();
        for (head, due) in self.net.node_gone(node, true, due, &mut self.chance.net) {
            self.queue.at(due, Event::Arrive(head));
        }
        self.requests_lost(node);
        let machine = &mut self.machines[node];
        machine.process = None;
        machine.paused_until = None;
        let back = self.chance.trouble.spread_millis(3, 600);
        self.queue.after(back, Event::Start(node));
    }
}
