//! Starting and stopping one service on this node.
//!
//! A runner exists while something of a service may be active here. It goes through its phases by
//! comparing what is with what should be each time it is driven; the orders under way are all it
//! remembers.

use std::time::Duration;

use relevo_replication::io::DiskState;
use relevo_types::{
    NodeId, ServiceId, Time, VolumeId,
    cluster::{ClusterState, Command, Part, Service, VolumeChange},
};

use crate::{
    Effect, OrderId, PartAction, PartOrder, Phase, VolumeOrder, proposals::Proposals,
    volumes::Engines,
};

/// How long an agent may take for one order: a file system check after a crash takes most.
const PART_TIMEOUT: Duration = Duration::from_secs(60);

/// A forced stop that failed is tried again after this long.
const FORCE_AGAIN: Duration = Duration::from_secs(5);

/// An engine that was told to step down is told again after this long, in case it restarted.
pub(crate) const DEMOTE_AGAIN: Duration = Duration::from_secs(1);

/// What a runner needs of its node.
pub(crate) struct Context<'a> {
    pub(crate) now: Time,
    pub(crate) me: NodeId,
    /// The daemon is shutting down: nothing is started any more.
    pub(crate) leaving: bool,
    pub(crate) state: &'a ClusterState,
    pub(crate) engines: &'a Engines,
    pub(crate) proposals: &'a mut Proposals,
    pub(crate) last_order: &'a mut u64,
    pub(crate) out: &'a mut Vec<Effect>,
}

/// One part of the service here.
#[derive(Debug)]
struct Slot {
    part: Part,
    /// It may be active: a start was ordered, or an earlier process may have left it.
    touched: bool,
    /// The start order that was last given.
    start: Option<OrderId>,
    /// The order under way, and when it was given.
    order: Option<(OrderId, Time)>,
    /// The last stop failed: when, and how.
    stuck: Option<(Time, String)>,
    demote_at: Option<Time>,
}

/// A service on this node.
#[derive(Debug)]
pub(crate) struct Runner {
    service: ServiceId,
    name: String,
    slots: Vec<Slot>,
    pub(crate) phase: Phase,
    pub(crate) since: Time,
    /// Why the phase was entered.
    pub(crate) reason: String,
    /// What it gives up for, when it does.
    failure: Option<String>,
    /// That was the disk of this volume.
    broken_disk: Option<VolumeId>,
    /// What it waits for now.
    pub(crate) waiting: Option<String>,
    /// When it is to be driven again.
    pub(crate) wake: Time,
}

impl Runner {
    /// A runner that first cleans up what an earlier process may have left.
    pub(crate) fn cleaning(service: &Service, context: &mut Context<'_>) -> Self {
        let mut runner = Self::new(service, context.now);
        for slot in &mut runner.slots {
            slot.touched = true;
        }
        let reason = "what an earlier daemon may have left is stopped first";
        runner.enter(Phase::Cleaning, context.now, reason);
        runner
    }

    /// A runner that starts the service.
    pub(crate) fn starting(service: &Service, context: &mut Context<'_>) -> Self {
        let mut runner = Self::new(service, context.now);
        runner.enter(
            Phase::Starting,
            context.now,
            "this node was given the service",
        );
        runner
    }

    /// A runner for a service that was given to this node and is not started any more.
    pub(crate) fn refusing(service: &Service, now: Time, reason: &str) -> Self {
        let mut runner = Self::new(service, now);
        runner.enter(Phase::Stopping, now, reason);
        runner
    }

    fn new(service: &Service, now: Time) -> Self {
        let slot = |part: &Part| Slot {
            part: part.clone(),
            touched: false,
            start: None,
            order: None,
            stuck: None,
            demote_at: None,
        };
        Self {
            service: service.id,
            name: service.spec.name.clone(),
            slots: service.spec.parts.iter().map(slot).collect(),
            phase: Phase::Starting,
            since: now,
            reason: String::new(),
            failure: None,
            broken_disk: None,
            waiting: None,
            wake: Time::NEVER,
        }
    }

    fn enter(&mut self, phase: Phase, now: Time, reason: &str) {
        self.phase = phase;
        self.since = now;
        reason.clone_into(&mut self.reason);
        self.waiting = None;
    }

    /// Name of the service.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether some part may be active.
    pub(crate) fn is_active(&self) -> bool {
        self.slots.iter().any(|slot| slot.touched)
    }

    /// Begins an orderly stop, if it runs or starts.
    pub(crate) fn stop(&mut self, now: Time, reason: &str) {
        if matches!(self.phase, Phase::Starting | Phase::Running) {
            self.enter(Phase::Stopping, now, reason);
        }
    }

    /// Stops everything by force.
    pub(crate) fn force(&mut self, now: Time, reason: &str) {
        if !matches!(self.phase, Phase::Forced | Phase::Cleaning) {
            for slot in &mut self.slots {
                // Whatever was ordered before, the forced stop comes after it.
                slot.order = None;
            }
            self.enter(Phase::Forced, now, reason);
        }
    }

    /// An order ended. Returns whether it was one of this runner's.
    pub(crate) fn part_done(
        &mut self,
        now: Time,
        order: OrderId,
        result: &Result<(), String>,
    ) -> bool {
        let position = self
            .slots
            .iter()
            .position(|slot| slot.order.is_some_and(|(id, _)| id == order));
        let Some(index) = position else {
            return false;
        };
        let slot = &mut self.slots[index];
        slot.order = None;
        let starting = slot.start == Some(order);
        match (starting, result) {
            (true, Ok(())) => {}
            (true, Err(reason)) => {
                let reason = format!("{} did not start: {reason}", slot.part.label());
                self.fail(now, reason);
            }
            (false, Ok(())) => {
                slot.touched = false;
                slot.start = None;
                slot.stuck = None;
            }
            (false, Err(reason)) => slot.stuck = Some((now, reason.clone())),
        }
        true
    }

    /// A started part broke. Returns whether it was one of this runner's.
    pub(crate) fn part_failed(&mut self, now: Time, order: OrderId, reason: &str) -> bool {
        let broken = self.slots.iter().find(|slot| slot.start == Some(order));
        let Some(label) = broken.map(|slot| slot.part.label()) else {
            return false;
        };
        self.fail(now, format!("{label} failed: {reason}"));
        true
    }

    fn fail(&mut self, now: Time, reason: String) {
        if matches!(self.phase, Phase::Starting | Phase::Running) {
            self.stop(now, &reason);
            self.failure = Some(reason);
        }
    }

    /// Does what can be done now. Returns whether the runner is at its end.
    pub(crate) fn drive(&mut self, context: &mut Context<'_>) -> bool {
        self.wake = Time::NEVER;
        let holder = context
            .state
            .services
            .get(&self.service)
            .and_then(|service| service.holder);
        let mine = holder == Some(context.me);
        if !mine && !matches!(self.phase, Phase::Cleaning | Phase::Forced) {
            if !self.is_active() {
                return true;
            }
            self.force(context.now, "the service was taken from this node");
        }
        if let Some((volume, reason)) = self.closed_below(context) {
            // A lost role is no failure: evicted and given the service anew before it knew of it,
            // the node starts again. A disk that failed is.
            if context.engines.disk(volume) == Some(DiskState::Failed) {
                self.failure = Some(reason.clone());
                self.broken_disk = Some(volume);
            }
            self.force(context.now, &reason);
        }
        // A phase that ends leads to the next one at once.
        loop {
            let before = self.phase;
            let over = match self.phase {
                Phase::Cleaning | Phase::Forced => self.drive_forced(context, mine),
                Phase::Starting => self.drive_starting(context),
                Phase::Running => {
                    self.waiting = self.held_below(context);
                    false
                }
                Phase::Stopping => self.drive_stopping(context),
                Phase::Releasing => self.drive_releasing(context),
            };
            if over || self.phase == before {
                return over;
            }
        }
    }

    /// A volume that parts stand on is no longer open: which and why.
    fn closed_below(&self, context: &Context<'_>) -> Option<(VolumeId, String)> {
        if !matches!(
            self.phase,
            Phase::Starting | Phase::Running | Phase::Stopping
        ) {
            return None;
        }
        self.slots.iter().find_map(|slot| match &slot.part {
            Part::Volume(part)
                if slot.touched
                    && !context.engines.is_open(part.volume)
                    && !context.engines.is_held(part.volume) =>
            {
                let why = context.engines.why_closed(part.volume, context.state);
                Some((part.volume, why))
            }
            _ => None,
        })
    }

    /// A volume whose requests wait for its disk, in words: nobody else has the data, so the service waits
    /// with them. To stop it would only make its requests fail.
    fn held_below(&self, context: &Context<'_>) -> Option<String> {
        let volumes = self.slots.iter().filter_map(|slot| match &slot.part {
            Part::Volume(part) if slot.touched => Some(part.volume),
            _ => None,
        });
        let held = volumes.filter(|volume| context.engines.is_held(*volume));
        held.map(|volume| context.engines.why_held(volume, context.state))
            .next()
    }

    fn drive_starting(&mut self, context: &mut Context<'_>) -> bool {
        if let Some(held) = self.held_below(context) {
            self.waiting = Some(held);
            return false;
        }
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if let Some((_, at)) = slot.order {
                let label = slot.part.label();
                if context.now >= at + PART_TIMEOUT {
                    let timeout = PART_TIMEOUT.as_secs();
                    self.slots[index].order = None;
                    self.fail(
                        context.now,
                        format!("{label} did not start within {timeout} s"),
                    );
                    return false;
                }
                self.wake_at(at + PART_TIMEOUT);
                self.waiting = Some(format!("{label} is being started"));
                return false;
            }
            if slot.start.is_some() {
                continue;
            }
            if let Part::Volume(part) = &slot.part {
                let volume = part.volume;
                if !context.engines.is_open(volume) {
                    match promote(context, volume, &self.name) {
                        Ok(waiting) => self.waiting = Some(waiting),
                        Err(NotHere::Broken(failure, disk)) => {
                            self.fail(context.now, failure);
                            self.broken_disk = disk.then_some(volume);
                        }
                        // Nothing is wrong with this node; it may get the service again.
                        Err(NotHere::Behind(reason)) => self.stop(context.now, &reason),
                    }
                    return false;
                }
            }
            self.order(index, PartAction::Start, context);
            let label = self.slots[index].part.label();
            self.waiting = Some(format!("{label} is being started"));
            return false;
        }
        self.enter(Phase::Running, context.now, "every part is active");
        false
    }

    /// From the last part to the first: stop it, and step down where it is a volume.
    fn drive_stopping(&mut self, context: &mut Context<'_>) -> bool {
        for index in (0..self.slots.len()).rev() {
            let slot = &self.slots[index];
            let label = slot.part.label();
            if let Some((_, at)) = slot.order {
                if context.now < at + PART_TIMEOUT {
                    self.wake_at(at + PART_TIMEOUT);
                    self.waiting = Some(format!("{label} is being stopped"));
                    return false;
                }
                let timeout = PART_TIMEOUT.as_secs();
                let slow = format!("no answer for {timeout} s");
                self.slots[index].stuck = Some((at, slow));
                self.slots[index].order = None;
            }
            if self.slots[index].touched {
                // Manners are tried once.
                let force = self.slots[index].stuck.is_some();
                if force && !self.may_force_again(index, context.now) {
                    return false;
                }
                self.order(index, PartAction::Stop { force }, context);
                self.waiting = Some(format!("{label} is being stopped"));
                return false;
            }
            if !self.stepped_down(index, context) {
                return false;
            }
        }
        let reason = self.reason.clone();
        self.enter(Phase::Releasing, context.now, &reason);
        false
    }

    /// Whether a forced stop of a part that resists may be tried now; else says what is waited
    /// for.
    fn may_force_again(&mut self, index: usize, now: Time) -> bool {
        let slot = &self.slots[index];
        let Some((at, reason)) = &slot.stuck else {
            return true;
        };
        // The first forced stop follows the polite one at once.
        let again = if slot.start.is_some() {
            *at
        } else {
            *at + FORCE_AGAIN
        };
        if now >= again {
            return true;
        }
        let label = slot.part.label();
        self.waiting = Some(format!(
            "{label} can't be stopped ({reason}); it is tried again every {} s; stop it by hand",
            FORCE_AGAIN.as_secs()
        ));
        self.wake_at(again);
        false
    }

    /// Whether a volume part has this node as primary no more; else sees to it.
    fn stepped_down(&mut self, index: usize, context: &mut Context<'_>) -> bool {
        let Part::Volume(part) = &self.slots[index].part else {
            return true;
        };
        let id = part.volume;
        let Some(volume) = context.state.volumes.get(&id) else {
            return true;
        };
        if volume.serving() != Some(context.me) {
            self.slots[index].demote_at = None;
            return true;
        }
        self.waiting = Some(context.engines.why_not_demoted(id, &volume.name));
        if context.engines.is_dead(id) {
            // Nobody else can step down for it. Whatever it acknowledged is on every in-sync
            // replica (DESIGN, rule 1), and it acknowledges nothing any more.
            let command = Command::Volume {
                volume: id,
                expect: volume.epoch,
                change: VolumeChange::Demote { node: context.me },
            };
            let reason = format!(
                "{}: volume `{}` is closed on this node",
                self.name, volume.name
            );
            let revision = context.state.revision;
            context
                .proposals
                .want(context.now, revision, command, &reason, context.out);
            return false;
        }
        let due = self.slots[index]
            .demote_at
            .map_or(context.now, |at| at + DEMOTE_AGAIN);
        if context.now >= due {
            self.slots[index].demote_at = Some(context.now);
            context.out.push(Effect::Volume {
                volume: id,
                order: VolumeOrder::Demote,
            });
            self.wake_at(context.now + DEMOTE_AGAIN);
        } else {
            self.wake_at(due);
        }
        false
    }

    fn drive_releasing(&mut self, context: &mut Context<'_>) -> bool {
        let reason = match &self.failure {
            Some(failure) => format!("{}: {failure}", self.name),
            None => format!("{}: {}", self.name, self.reason),
        };
        let command = Command::Release {
            service: self.service,
            node: context.me,
            failure: self.failure.clone(),
            disk: self.broken_disk,
        };
        let revision = context.state.revision;
        context
            .proposals
            .want(context.now, revision, command, &reason, context.out);
        self.waiting = Some("the control log has to commit the release".to_owned());
        false
    }

    /// Everything at once, last part first; those that resist again and again.
    fn drive_forced(&mut self, context: &mut Context<'_>, mine: bool) -> bool {
        for index in (0..self.slots.len()).rev() {
            let slot = &self.slots[index];
            if !slot.touched {
                continue;
            }
            if let Some((_, at)) = slot.order {
                self.wake_at(at + PART_TIMEOUT);
                if context.now < at + PART_TIMEOUT {
                    continue;
                }
                self.slots[index].order = None;
            }
            let again = self.slots[index]
                .stuck
                .as_ref()
                .map_or(context.now, |(at, _)| *at + FORCE_AGAIN);
            if context.now < again {
                self.wake_at(again);
                continue;
            }
            self.order(index, PartAction::Stop { force: true }, context);
        }
        let left = self.slots.iter().rev().find(|slot| slot.touched);
        if let Some(slot) = left {
            let label = slot.part.label();
            self.waiting = Some(match &slot.stuck {
                Some((_, reason)) => format!(
                    "{label} can't be stopped ({reason}); it is tried again every {} s; stop it \
                     by hand",
                    FORCE_AGAIN.as_secs()
                ),
                None => format!("{label} is being stopped by force"),
            });
            return false;
        }
        if !mine {
            return true;
        }
        let reason = self.reason.clone();
        if self.failure.is_some() || context.leaving {
            self.enter(Phase::Stopping, context.now, &reason);
        } else {
            self.enter(
                Phase::Starting,
                context.now,
                "this node holds the service and has cleaned up",
            );
        }
        false
    }

    fn order(&mut self, index: usize, what: PartAction, context: &mut Context<'_>) {
        *context.last_order += 1;
        let id = OrderId(*context.last_order);
        let slot = &mut self.slots[index];
        slot.order = Some((id, context.now));
        match what {
            PartAction::Start => {
                slot.touched = true;
                slot.start = Some(id);
            }
            // A part that is being stopped by force can't fail any more.
            PartAction::Stop { force: true } => slot.start = None,
            PartAction::Stop { force: false } => {}
        }
        context.out.push(Effect::Part(PartOrder {
            id,
            service: self.service,
            name: self.name.clone(),
            index,
            part: slot.part.clone(),
            what,
        }));
        self.wake_at(context.now + PART_TIMEOUT);
    }

    fn wake_at(&mut self, at: Time) {
        self.wake = self.wake.min(at);
    }
}

/// Why this node can't be primary.
enum NotHere {
    /// Something failed: a person has to look at it. Whether that is the disk.
    Broken(String, bool),
    /// Its replica lacks writes: a resync mends that.
    Behind(String),
}

/// Makes this node primary of a volume. `Ok`: what is waited for; `Err`: it can't be.
fn promote(context: &mut Context<'_>, id: VolumeId, service: &str) -> Result<String, NotHere> {
    let Some(volume) = context.state.volumes.get(&id) else {
        let reason = format!("volume {id} does not exist");
        return Err(NotHere::Broken(reason, false));
    };
    let name = &volume.name;
    if context.engines.disk(id) == Some(DiskState::Failed) {
        let reason = format!("the disk of volume `{name}` is unusable here");
        return Err(NotHere::Broken(reason, true));
    }
    // One that only tends the volume is displaced.
    match volume.serving() {
        Some(primary) if primary == context.me => Ok(context.engines.why_not_open(id, name)),
        Some(primary) => Ok(format!(
            "volume `{name}` has {} as primary; it has to step down or be evicted",
            context.state.node_name(primary)
        )),
        None if !volume.in_sync.contains(&context.me) => Err(NotHere::Behind(format!(
            "this node is not in sync on volume `{name}` any more"
        ))),
        None => {
            let command = Command::Volume {
                volume: id,
                expect: volume.epoch,
                change: context.engines.promotion(id, context.me),
            };
            let reason = format!("{service}: this node holds the service and needs the volume");
            let revision = context.state.revision;
            context
                .proposals
                .want(context.now, revision, command, &reason, context.out);
            Ok(format!(
                "the control log has to make this node primary of volume `{name}`"
            ))
        }
    }
}
