//! Fencing one node: what to ask which device, when its word is believed, and what that proves. Sans-IO.
//!
//! # What counts as proof
//!
//! A proof lets others take what the node had. So nothing is believed that could be otherwise:
//!
//! * All devices of one level ended their `off` well, and after the last of them ended, *one* round of questions
//!   for the state of the power was answered with *off* by all of them. A machine with two power supplies is
//!   without power in that moment, not only each of them at some time.
//! * An `off` that failed or took too long is a failure, also where the power seems to be off afterwards: the
//!   next try asks for it again, which costs nothing if it is off.
//! * A device that can't be asked (agents without `status`) proves nothing, unless the administrator declared its
//!   exit code to be trusted.
//! * A device that can only reboot proves nothing: nobody saw the node off, and it may be up again already.
//! * A node whose heartbeats arrive after its power was seen off is on, whatever the device says: the plug is
//!   another one's, or the device lies.
//! * A person's word is proof. It is not taken while the node is heard.
//!
//! `reboot` is `off`, the proof, and then `on`; that `on` fails is an alarm and takes nothing from the proof.
//!
//! The agents' own `reboot` is not used: it tells afterwards that the node was off, and by then it may be back.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use relevo_types::{
    NodeId, Time,
    cluster::{FenceAction, FenceEvidence, FenceFailure, FenceVerified},
};

use crate::agent::{Action, Reply};

/// How often a level is tried before the next one. Once more, since a BMC that is busy answers the second time.
pub const TRIES: u32 = 2;

/// How often a node is switched on again before that is an alarm.
const ON_TRIES: u32 = 2;

/// Between two tries: a BMC that just refused needs a moment.
const TRY_PAUSE: Duration = Duration::from_secs(1);

/// Between two rounds of questions for the state of the power.
const ASK_PAUSE: Duration = Duration::from_millis(300);

/// How a node is to be fenced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The node, for messages.
    pub node: String,
    /// What shall become of it.
    pub action: FenceAction,
    /// How long to wait first.
    pub delay: Duration,
    /// A reboot waits after its proof for [`Input::SwitchOn`]: the node must not be back before what it had was
    /// taken from it.
    pub hold: bool,
    /// Ways to do it, the first one first.
    pub levels: Vec<Level>,
    /// A heartbeat that arrives so long after the power was seen off may have been under way.
    pub grace: Duration,
    /// So long a node must have been silent. Some heartbeats' time, longer than `grace`.
    pub silence: Duration,
}

/// One way to do it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Level {
    /// Its number.
    pub number: u8,
    /// All devices must succeed; or a person does it.
    pub means: Means,
}

/// The means of a level.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Means {
    /// All of these.
    Devices(Vec<Ability>),
    /// A person.
    Person,
}

/// What a device can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ability {
    /// Its name.
    pub name: String,
    /// Why it can't be used at all: this node may not, its agent is not installed ...
    pub unusable: Option<String>,
    /// It has `off`.
    pub off: bool,
    /// It has `on`.
    pub on: bool,
    /// It has `status`.
    pub status: bool,
    /// Where it has no `status`, its exit code is proof.
    pub trust_exit_code: bool,
    /// How long one action may take.
    pub action_limit: Duration,
    /// How long after `off` the power may still be on.
    pub verify_limit: Duration,
}

/// Names one run of a device within an attempt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RunId(pub u64);

/// What an attempt is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// It begins, or the moment of [`Attempt::wake`] has come.
    Tick,
    /// A run ended.
    Replied {
        /// Which one.
        run: RunId,
        /// With what.
        reply: Reply,
    },
    /// A heartbeat of the node arrived at that moment.
    Heard(Time),
    /// What the node had was taken from it: a reboot may go on.
    SwitchOn,
}

/// What an attempt wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Ask a device to do something about the node.
    Run {
        /// Name of this run.
        run: RunId,
        /// The device.
        device: String,
        /// What.
        action: Action,
        /// After this it is killed, and has failed.
        limit: Duration,
    },
    /// Nobody waits for that run any more: kill it.
    Cancel(RunId),
    /// The node was off.
    Proved(FenceEvidence),
    /// A person has to look, and say what is: the last means. The text says how.
    AskPerson(String),
    /// A person has to do something, although the node was off.
    Alarm(String),
    /// It is over.
    Ended(Result<(), Vec<FenceFailure>>),
}

/// An attempt to fence a node.
#[derive(Debug)]
pub struct Attempt {
    plan: Plan,
    stage: Stage,
    next_run: u64,
    heard_at: Option<Time>,
    failures: Vec<FenceFailure>,
    effects: VecDeque<Effect>,
}

/// Index of a device in its level.
type Index = usize;

#[derive(Debug)]
enum Stage {
    /// The delay of the node.
    Delay {
        until: Option<Time>,
    },
    /// `off` of all devices of the level at `place`.
    Off {
        place: usize,
        try_no: u32,
        running: BTreeMap<RunId, Index>,
        failed: bool,
    },
    /// A round of questions.
    Ask {
        place: usize,
        try_no: u32,
        until: Time,
        running: BTreeMap<RunId, Index>,
        /// What did not say *off* in this round, and what it said.
        doubts: BTreeMap<Index, Reply>,
    },
    /// Between two rounds.
    AskPause {
        place: usize,
        try_no: u32,
        until: Time,
        next: Time,
    },
    /// Off, if nothing is heard.
    Listen {
        place: usize,
        try_no: u32,
        seen_off: Time,
    },
    /// Between two tries.
    TryPause {
        place: usize,
        try_no: u32,
        until: Time,
    },
    /// A person has to look.
    Person,
    /// Proved; it may not be switched on yet.
    Hold {
        place: usize,
    },
    /// Proved; being switched on again.
    On {
        place: usize,
        running: BTreeMap<RunId, (Index, u32)>,
    },
    Over,
}

impl Attempt {
    /// An attempt, which begins with the first [`Input::Tick`].
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self {
            plan,
            stage: Stage::Delay { until: None },
            next_run: 0,
            heard_at: None,
            failures: Vec::new(),
            effects: VecDeque::new(),
        }
    }

    /// Takes an input, and tells what is wanted, in order.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Effect> {
        match input {
            Input::Tick => {}
            Input::Replied { run, reply } => self.replied(now, run, reply),
            Input::Heard(at) => self.heard_at = self.heard_at.max(Some(at)),
            Input::SwitchOn => {
                if let Stage::Hold { place } = self.stage {
                    self.switch_on(place);
                }
            }
        }
        self.advance(now);
        self.effects.drain(..).collect()
    }

    /// A person says that the node is off. Whatever is under way is given up.
    ///
    /// # Errors
    /// The word is not taken; the text says why and what to do.
    pub fn confirm(&mut self, now: Time, who: &str, on: NodeId) -> Result<Vec<Effect>, String> {
        let node = self.plan.node.clone();
        match &self.stage {
            Stage::Over | Stage::Hold { .. } | Stage::On { .. } => {
                return Err(format!("the attempt to fence {node} is over already"));
            }
            _ => {}
        }
        if let Some(at) = self.heard_at
            && now < at + self.plan.silence
        {
            return Err(format!(
                "{node} is on: its heartbeats arrive here; switch it off first"
            ));
        }
        self.cancel_runs();
        self.effects
            .push_back(Effect::Proved(FenceEvidence::Person {
                who: who.to_owned(),
                on,
            }));
        if self.plan.action == FenceAction::Reboot {
            self.effects.push_back(Effect::Alarm(format!(
                "{node} stays off: a person switched it off, and has to switch it on"
            )));
        }
        self.end(Ok(()));
        Ok(self.effects.drain(..).collect())
    }

    /// A person takes the attempt back. It ends without a proof; where it has one it stands, and a node that is not
    /// being switched on yet stays off.
    pub fn give_up(&mut self, who: &str) -> Vec<Effect> {
        if matches!(self.stage, Stage::Hold { .. }) {
            let alarm = format!(
                "{} stays off: {who} gave its reboot up; switch it on by hand",
                self.plan.node
            );
            self.effects.push_back(Effect::Alarm(alarm));
            self.end(Ok(()));
        } else if !matches!(self.stage, Stage::Over | Stage::On { .. }) {
            self.cancel_runs();
            self.fail(None, format!("{who} gave it up"));
            let failures = std::mem::take(&mut self.failures);
            self.end(Err(failures));
        }
        self.effects.drain(..).collect()
    }

    fn cancel_runs(&mut self) {
        if let Stage::Off { running, .. } | Stage::Ask { running, .. } = &self.stage {
            let running: Vec<RunId> = running.keys().copied().collect();
            self.effects.extend(running.into_iter().map(Effect::Cancel));
        }
    }

    /// When it wants the next [`Input::Tick`], if nothing else comes before.
    #[must_use]
    pub fn wake(&self) -> Option<Time> {
        match &self.stage {
            Stage::Delay { until } => Some(until.unwrap_or(Time::ZERO)),
            Stage::AskPause { next, .. } => Some(*next),
            Stage::TryPause { until, .. } => Some(*until),
            Stage::Listen { seen_off, .. } => Some(self.silent_at(*seen_off)),
            Stage::Off { .. }
            | Stage::Ask { .. }
            | Stage::Person
            | Stage::Hold { .. }
            | Stage::On { .. }
            | Stage::Over => None,
        }
    }

    /// Whether a person's word is all that is still waited for.
    #[must_use]
    pub const fn waits_for_a_person(&self) -> bool {
        matches!(self.stage, Stage::Person)
    }

    /// What it does now, in words.
    #[must_use]
    pub fn doing(&self) -> String {
        let node = &self.plan.node;
        let level = |place: &usize| self.plan.levels.get(*place).map_or(0, |it| it.number);
        match &self.stage {
            Stage::Delay { .. } => format!(
                "waits for {} s before it fences {node}, as its delay says",
                self.plan.delay.as_secs_f64()
            ),
            Stage::Off { place, .. } => {
                format!(
                    "switches {node} off by {} (level {})",
                    self.names(*place),
                    level(place)
                )
            }
            Stage::Ask { place, .. } | Stage::AskPause { place, .. } => {
                format!("asks {} whether {node} is off", self.names(*place))
            }
            Stage::Listen { .. } => format!("listens whether {node} is silent"),
            Stage::TryPause { place, .. } => {
                format!(
                    "tries {} (level {}) once more in a moment",
                    self.names(*place),
                    level(place)
                )
            }
            Stage::Person => format!(
                "waits for a person: look whether {node} is off, or switch it off, then `relevo fence confirm {node}`"
            ),
            Stage::Hold { .. } => {
                format!("has its proof, and switches {node} on when what it had was taken from it")
            }
            Stage::On { place, .. } => {
                format!("switches {node} on again by {}", self.names(*place))
            }
            Stage::Over => "is over".to_owned(),
        }
    }

    fn advance(&mut self, now: Time) {
        // Each turn starts something that takes time, or ends the attempt.
        loop {
            match self.stage {
                Stage::Delay { until: None } => {
                    self.stage = Stage::Delay {
                        until: Some(now + self.plan.delay),
                    };
                }
                Stage::Delay { until: Some(until) } if now >= until => self.begin(0, 1),
                Stage::TryPause {
                    place,
                    try_no,
                    until,
                } if now >= until => self.begin(place, try_no),
                Stage::AskPause {
                    place,
                    try_no,
                    until,
                    next,
                } if now >= next => self.ask(now, place, try_no, until),
                Stage::Listen {
                    place,
                    try_no,
                    seen_off,
                } => {
                    if self.heard_at > Some(seen_off + self.plan.grace) {
                        self.heard_after_off(now, place, try_no);
                    } else if now >= self.silent_at(seen_off) {
                        self.prove(place);
                    } else {
                        return;
                    }
                }
                _ => return,
            }
        }
    }

    /// Starts a try of a level, or what comes when there is no such level.
    fn begin(&mut self, place: usize, try_no: u32) {
        let Some(level) = self.plan.levels.get(place) else {
            if self.failures.is_empty() {
                self.fail(
                    None,
                    "it has no fence device; add one with `relevo fence device add`".to_owned(),
                );
            }
            let failures = std::mem::take(&mut self.failures);
            return self.end(Err(failures));
        };
        let devices = match &level.means {
            Means::Person => {
                self.stage = Stage::Person;
                let doing = self.doing();
                self.effects
                    .push_back(Effect::AskPerson(format!("the fencing {doing}")));
                return;
            }
            Means::Devices(devices) => devices.clone(),
        };
        let mut any_unfit = devices.is_empty();
        for device in &devices {
            let lack = || {
                let lack = self::unfit(device.off, device.status, device.trust_exit_code);
                lack.map(str::to_owned)
            };
            let Some(why) = device.unusable.clone().or_else(lack) else {
                continue;
            };
            any_unfit = true;
            self.fail(Some(&device.name), why);
        }
        if any_unfit {
            return self.begin(place + 1, 1);
        }
        let mut running = BTreeMap::new();
        for (index, device) in devices.iter().enumerate() {
            running.insert(self.run(device, Action::Off), index);
        }
        self.stage = Stage::Off {
            place,
            try_no,
            running,
            failed: false,
        };
    }

    fn replied(&mut self, now: Time, run: RunId, reply: Reply) {
        match &mut self.stage {
            Stage::Off {
                place,
                try_no,
                running,
                failed,
            } => {
                let Some(index) = running.remove(&run) else {
                    return;
                };
                let (place, try_no) = (*place, *try_no);
                let bad = reply != Reply::Done;
                *failed |= bad;
                let over = running.is_empty();
                let failed = *failed;
                if bad {
                    let why = format!("off failed: {}", words(&reply));
                    self.fail_at(place, index, why);
                }
                // What the others still do is waited for: a level is never left half done in the background.
                if over && failed {
                    self.again(now, place, try_no);
                } else if over {
                    let limit = self.devices(place).iter().map(|it| it.verify_limit).max();
                    let until = now + limit.unwrap_or_default();
                    self.ask(now, place, try_no, until);
                }
            }
            Stage::Ask {
                place,
                try_no,
                until,
                running,
                doubts,
            } => {
                let Some(index) = running.remove(&run) else {
                    return;
                };
                if reply != Reply::Off {
                    doubts.insert(index, reply);
                }
                if running.is_empty() {
                    let (place, try_no, until) = (*place, *try_no, *until);
                    let doubts = std::mem::take(doubts);
                    self.answered(now, place, try_no, until, doubts);
                }
            }
            Stage::On { place, running } => {
                let Some((index, try_no)) = running.remove(&run) else {
                    return;
                };
                let place = *place;
                self.switched_on(place, index, try_no, &reply);
            }
            Stage::Delay { .. }
            | Stage::AskPause { .. }
            | Stage::Listen { .. }
            | Stage::TryPause { .. }
            | Stage::Person
            | Stage::Hold { .. }
            | Stage::Over => {}
        }
    }

    /// Asks all devices that can be asked.
    fn ask(&mut self, now: Time, place: usize, try_no: u32, until: Time) {
        let devices = self.devices(place).to_vec();
        let mut running = BTreeMap::new();
        for (index, device) in devices.iter().enumerate() {
            if device.status {
                running.insert(self.run(device, Action::Status), index);
            }
        }
        if running.is_empty() {
            // Every one is trusted without being asked.
            return self.answered(now, place, try_no, until, BTreeMap::new());
        }
        self.stage = Stage::Ask {
            place,
            try_no,
            until,
            running,
            doubts: BTreeMap::new(),
        };
    }

    /// A round of questions is over.
    fn answered(
        &mut self,
        now: Time,
        place: usize,
        try_no: u32,
        until: Time,
        doubts: BTreeMap<Index, Reply>,
    ) {
        if doubts.is_empty() {
            self.stage = Stage::Listen {
                place,
                try_no,
                seen_off: now,
            };
        } else if now < until {
            self.stage = Stage::AskPause {
                place,
                try_no,
                until,
                next: now + ASK_PAUSE,
            };
        } else {
            for (index, reply) in doubts {
                let why = match reply {
                    Reply::On => "its `off` ended well, and it still says that the power is on; look whether the plug is the right one and what the device itself shows".to_owned(),
                    other => format!(
                        "its `off` ended well, and whether the power is off is not known: {}",
                        words(&other)
                    ),
                };
                self.fail_at(place, index, why);
            }
            self.again(now, place, try_no);
        }
    }

    fn heard_after_off(&mut self, now: Time, place: usize, try_no: u32) {
        let why = format!(
            "it says that the power is off, and heartbeats of {} still arrive: the plug is not that node's, or the device does not tell the truth; check --node {}=PLUG",
            self.plan.node, self.plan.node
        );
        for index in 0..self.devices(place).len() {
            self.fail_at(place, index, why.clone());
        }
        self.again(now, place, try_no);
    }

    /// A try of a level failed.
    fn again(&mut self, now: Time, place: usize, try_no: u32) {
        if try_no < TRIES {
            self.stage = Stage::TryPause {
                place,
                try_no: try_no + 1,
                until: now + TRY_PAUSE,
            };
        } else {
            self.begin(place + 1, 1);
        }
    }

    fn prove(&mut self, place: usize) {
        let devices = self.devices(place).to_vec();
        let verified = |device: &Ability| {
            if device.status {
                FenceVerified::Status
            } else {
                FenceVerified::ExitCode
            }
        };
        self.effects
            .push_back(Effect::Proved(FenceEvidence::Devices {
                level: self.plan.levels.get(place).map_or(0, |it| it.number),
                devices: devices
                    .iter()
                    .map(|device| (device.name.clone(), verified(device)))
                    .collect(),
            }));
        match self.plan.action {
            FenceAction::Off => self.end(Ok(())),
            FenceAction::Reboot if self.plan.hold => self.stage = Stage::Hold { place },
            FenceAction::Reboot => self.switch_on(place),
        }
    }

    fn switch_on(&mut self, place: usize) {
        let devices = self.devices(place).to_vec();
        let mut running = BTreeMap::new();
        for (index, device) in devices.iter().enumerate() {
            if device.on {
                running.insert(self.run(device, Action::On), (index, 1));
            } else {
                self.stays_off(&device.name, "it has no action `on`");
            }
        }
        self.stage = Stage::On { place, running };
        self.end_if_on();
    }

    fn switched_on(&mut self, place: usize, index: Index, try_no: u32, reply: &Reply) {
        if *reply != Reply::Done
            && let Some(device) = self.devices(place).get(index).cloned()
        {
            if try_no < ON_TRIES {
                let run = self.run(&device, Action::On);
                if let Stage::On { running, .. } = &mut self.stage {
                    running.insert(run, (index, try_no + 1));
                }
                return;
            }
            self.stays_off(&device.name, &words(reply));
        }
        self.end_if_on();
    }

    fn stays_off(&mut self, device: &str, why: &str) {
        let alarm = format!(
            "{} was off, as asked, and was not switched on again by {device}: {why}; switch it on by hand",
            self.plan.node
        );
        self.effects.push_back(Effect::Alarm(alarm));
    }

    fn end_if_on(&mut self) {
        if matches!(&self.stage, Stage::On { running, .. } if running.is_empty()) {
            self.end(Ok(()));
        }
    }

    fn end(&mut self, result: Result<(), Vec<FenceFailure>>) {
        self.stage = Stage::Over;
        self.effects.push_back(Effect::Ended(result));
    }

    /// When the node has been silent long enough after its power was seen off.
    fn silent_at(&self, seen_off: Time) -> Time {
        match self.heard_at {
            Some(at) => seen_off.max(at + self.plan.silence),
            None => seen_off,
        }
    }

    fn devices(&self, place: usize) -> &[Ability] {
        match self.plan.levels.get(place).map(|level| &level.means) {
            Some(Means::Devices(devices)) => devices,
            Some(Means::Person) | None => &[],
        }
    }

    fn names(&self, place: usize) -> String {
        let names: Vec<&str> = self
            .devices(place)
            .iter()
            .map(|device| device.name.as_str())
            .collect();
        names.join(" and ")
    }

    fn run(&mut self, device: &Ability, action: Action) -> RunId {
        self.next_run += 1;
        let run = RunId(self.next_run);
        self.effects.push_back(Effect::Run {
            run,
            device: device.name.clone(),
            action,
            limit: device.action_limit,
        });
        run
    }

    fn fail_at(&mut self, place: usize, index: Index, why: String) {
        let name = self.devices(place).get(index).map(|it| it.name.clone());
        self.fail(name.as_deref(), why);
    }

    /// Notes what failed; the second time the same is one failure.
    fn fail(&mut self, device: Option<&str>, why: String) {
        let failure = FenceFailure {
            device: device.map(str::to_owned),
            why,
        };
        if !self.failures.contains(&failure) {
            self.failures.push(failure);
        }
    }
}

/// Why a device with, or without, these actions can prove nothing.
pub(crate) const fn unfit(off: bool, status: bool, trust_exit_code: bool) -> Option<&'static str> {
    if !off {
        Some(
            "it has no action `off`, and a reboot proves nothing: the node may be up again already; use a device that can switch off",
        )
    } else if !status && !trust_exit_code {
        Some(
            "it has no action `status`, so nobody can ask whether the power is off; if its exit code is to be trusted, say so with --trust-exit-code",
        )
    } else {
        None
    }
}

fn words(reply: &Reply) -> String {
    match reply {
        Reply::Failed(why) => why.clone(),
        Reply::Done => "it did not say what it was asked".to_owned(),
        Reply::On => "it says that the power is on".to_owned(),
        Reply::Off => "it says that the power is off".to_owned(),
    }
}

#[cfg(test)]
mod tests;
