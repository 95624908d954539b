use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const GRACE: Duration = Duration::from_millis(200);
const SILENCE: Duration = Duration::from_secs(1);
const HEARTBEAT: Duration = Duration::from_millis(100);

/// A device that may be broken or lie, and the power that it really switches.
#[derive(Clone, Debug)]
struct Device {
    ability: Ability,
    /// It switches this node's power, and not another one's.
    ours: bool,
    /// How long after `off` the power goes.
    lag: Duration,
    /// How long an action takes; more than its limit: it is killed.
    takes: Duration,
    /// Actions by number, of all kinds, that fail.
    fails: BTreeSet<usize>,
    /// `status` says off, whatever is.
    says_off: bool,
    /// `off` says that it did, and does nothing.
    idle: bool,
    on: bool,
    goes_off_at: Option<Time>,
    calls: usize,
}

impl Device {
    fn new(name: &str) -> Self {
        Self {
            ability: ability(name),
            ours: true,
            lag: Duration::ZERO,
            takes: Duration::from_millis(200),
            fails: BTreeSet::new(),
            says_off: false,
            idle: false,
            on: true,
            goes_off_at: None,
            calls: 0,
        }
    }

    fn settle(&mut self, now: Time) {
        if self.goes_off_at.is_some_and(|at| at <= now) {
            self.on = false;
            self.goes_off_at = None;
        }
    }
}

fn ability(name: &str) -> Ability {
    Ability {
        name: name.to_owned(),
        unusable: None,
        off: true,
        on: true,
        status: true,
        trust_exit_code: false,
        action_limit: Duration::from_secs(10),
        verify_limit: Duration::from_secs(5),
    }
}

/// A node with a power supply for each device that is really its own, and the attempt to fence it.
struct World {
    attempt: Attempt,
    plan: Plan,
    devices: BTreeMap<String, Device>,
    now: Time,
    /// Runs under way: when they end, and with what.
    running: BTreeMap<RunId, (Time, String, Action, Reply)>,
    /// What ended, in order.
    trace: Vec<(Time, String, Action, Reply)>,
    started: Vec<(Time, String, Action)>,
    /// Heartbeats reach us.
    audible: bool,
    next_beat: Time,
    proved: Option<(Time, FenceEvidence)>,
    alarms: Vec<String>,
    ended: Option<Result<(), Vec<FenceFailure>>>,
}

const START: Time = Time(1_000_000_000_000);

impl World {
    fn new(action: FenceAction, levels: Vec<Vec<Device>>) -> Self {
        let plan = Plan {
            node: "beta".to_owned(),
            action,
            delay: Duration::ZERO,
            hold: false,
            levels: (1..)
                .zip(&levels)
                .map(|(number, devices)| Level {
                    number,
                    means: Means::Devices(devices.iter().map(|it| it.ability.clone()).collect()),
                })
                .collect(),
            grace: GRACE,
            silence: SILENCE,
        };
        let devices = levels.into_iter().flatten();
        Self {
            attempt: Attempt::new(plan.clone()),
            plan,
            devices: devices.map(|it| (it.ability.name.clone(), it)).collect(),
            now: START,
            running: BTreeMap::new(),
            trace: Vec::new(),
            started: Vec::new(),
            audible: true,
            next_beat: START,
            proved: None,
            alarms: Vec::new(),
            ended: None,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Plan)) -> Self {
        change(&mut self.plan);
        self.attempt = Attempt::new(self.plan.clone());
        self
    }

    /// The node runs while any of its supplies gives power. Without any device of its own it runs for ever.
    fn node_is_on(&self) -> bool {
        let mut own = self.devices.values().filter(|it| it.ours).peekable();
        own.peek().is_none() || own.any(|it| it.on)
    }

    fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Run {
                    run,
                    device,
                    action,
                    limit,
                } => self.start(run, device, action, limit),
                Effect::Cancel(run) => {
                    self.running.remove(&run);
                }
                Effect::Proved(evidence) => {
                    assert!(self.proved.is_none(), "proved twice");
                    self.check_proof(&evidence);
                    self.proved = Some((self.now, evidence));
                }
                Effect::AskPerson(text) | Effect::Alarm(text) => self.alarms.push(text),
                Effect::Ended(result) => {
                    assert!(self.ended.is_none(), "ended twice");
                    assert_eq!(result.is_ok(), self.proved.is_some());
                    assert!(self.running.is_empty(), "something still runs");
                    self.ended = Some(result);
                }
            }
        }
    }

    fn start(&mut self, run: RunId, name: String, action: Action, limit: Duration) {
        assert!(self.ended.is_none());
        self.started.push((self.now, name.clone(), action));
        if action == Action::On {
            assert!(self.proved.is_some(), "switched on before the proof");
            assert_eq!(self.plan.action, FenceAction::Reboot);
        }
        let now = self.now;
        let device = self.devices.get_mut(&name).expect("a known device");
        device.settle(now);
        device.calls += 1;
        let end = now + device.takes.min(limit);
        let reply = if device.takes > limit {
            Reply::Failed("it took too long".to_owned())
        } else if device.fails.contains(&device.calls) {
            Reply::Failed("it is broken".to_owned())
        } else {
            match action {
                Action::Off => {
                    if !device.idle {
                        device.goes_off_at = Some(end + device.lag);
                    }
                    Reply::Done
                }
                Action::On => {
                    device.goes_off_at = None;
                    device.on = true;
                    Reply::Done
                }
                // What it says is what is when it is asked; nothing switches on by itself meanwhile.
                Action::Status if device.says_off || !device.on => Reply::Off,
                Action::Status => Reply::On,
                Action::Monitor => Reply::Done,
            }
        };
        self.running.insert(run, (end, name, action, reply));
    }

    /// What a proof by devices needs, judged by what was asked and answered alone.
    fn check_proof(&self, evidence: &FenceEvidence) {
        let FenceEvidence::Devices { level, devices } = evidence else {
            return;
        };
        let level = self.plan.levels.iter().find(|it| it.number == *level);
        let Some(Means::Devices(abilities)) = level.map(|it| &it.means) else {
            panic!("proved by a level that is none");
        };
        let names: Vec<&String> = abilities.iter().map(|it| &it.name).collect();
        assert!(
            names
                .iter()
                .copied()
                .eq(devices.iter().map(|(name, _)| name))
        );
        let last = |name: &str, action: Action| {
            self.trace
                .iter()
                .rposition(|(_, it, what, _)| it == name && *what == action)
        };
        let last_off = abilities
            .iter()
            .map(|it| last(&it.name, Action::Off).expect("an `off` of each device"))
            .max()
            .unwrap();
        let last_off_at = self.trace[last_off].0;
        for ability in abilities {
            let off = &self.trace[last(&ability.name, Action::Off).unwrap()];
            assert_eq!(off.3, Reply::Done, "an `off` that failed");
            if ability.status {
                let status = last(&ability.name, Action::Status).expect("asked");
                assert_eq!(self.trace[status].3, Reply::Off);
                let asked = self
                    .started
                    .iter()
                    .rfind(|(_, name, what)| *name == ability.name && *what == Action::Status)
                    .unwrap();
                assert!(asked.0 >= last_off_at, "asked before all were off");
            } else {
                assert!(ability.trust_exit_code, "nobody asked it");
            }
        }
        // Where its heartbeats would be heard, no lie of a device can prove a node off that is on.
        if self.audible {
            assert!(
                !self.node_is_on(),
                "proved off, and it is on: {:?}",
                self.trace
            );
        }
    }

    /// Runs until the end, or until nothing happens any more.
    fn run(&mut self) {
        let effects = self.attempt.step(self.now, Input::Tick);
        self.apply(effects);
        for _ in 0..20_000 {
            if self.ended.is_some() {
                return;
            }
            let run_ends = self.running.values().map(|it| it.0).min();
            let wake = self.attempt.wake();
            let device_turns = self.devices.values().filter_map(|it| it.goes_off_at).min();
            let beat = (self.audible && self.node_is_on()).then_some(self.next_beat);
            let next = [run_ends, wake, device_turns, beat];
            let Some(next) = next.into_iter().flatten().min() else {
                return;
            };
            if run_ends.is_none() && wake.is_none() && device_turns.is_none() {
                // A person is waited for.
                return;
            }
            self.now = self.now.max(next);
            let now = self.now;
            self.devices.values_mut().for_each(|it| it.settle(now));
            if beat.is_some_and(|beat| beat <= now) {
                self.next_beat = now + HEARTBEAT;
                if self.node_is_on() {
                    let effects = self.attempt.step(now, Input::Heard(now));
                    self.apply(effects);
                }
            }
            let over: Vec<RunId> = self
                .running
                .iter()
                .filter(|(_, it)| it.0 <= now)
                .map(|(run, _)| *run)
                .collect();
            for run in over {
                if let Some((_, name, action, reply)) = self.running.remove(&run) {
                    self.trace.push((now, name, action, reply.clone()));
                    let effects = self.attempt.step(now, Input::Replied { run, reply });
                    self.apply(effects);
                }
            }
            let effects = self.attempt.step(now, Input::Tick);
            self.apply(effects);
        }
        panic!("it does not end: {}", self.attempt.doing());
    }

    fn failures(&self) -> Vec<String> {
        match &self.ended {
            Some(Err(failures)) => failures.iter().map(|it| it.why.clone()).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn counts(&self, name: &str, action: Action) -> usize {
        self.started
            .iter()
            .filter(|(_, it, what)| it == name && *what == action)
            .count()
    }
}

#[test]
fn off_is_verified_and_proves() {
    let mut world = World::new(FenceAction::Off, vec![vec![Device::new("bmc")]]);
    world.run();
    let (at, evidence) = world.proved.clone().unwrap();
    let devices = vec![("bmc".to_owned(), FenceVerified::Status)];
    assert_eq!(evidence, FenceEvidence::Devices { level: 1, devices });
    // off, status, and the silence after the last heartbeat.
    assert!(
        at.since(START) <= Duration::from_millis(400) + SILENCE,
        "{at:?}"
    );
    assert!(!world.node_is_on());
}

/// A node that died before costs no wait for its silence.
#[test]
fn a_node_that_is_silent_anyway_is_proved_at_once() {
    let mut world = World::new(FenceAction::Off, vec![vec![Device::new("bmc")]]);
    world.audible = false;
    world.run();
    assert_eq!(
        world.proved.unwrap().0.since(START),
        Duration::from_millis(400)
    );
}

#[test]
fn two_supplies_are_off_at_the_same_time_before_either_is_on_again() {
    let slow = Device {
        lag: Duration::from_secs(2),
        ..Device::new("two")
    };
    let mut world = World::new(FenceAction::Reboot, vec![vec![Device::new("one"), slow]]);
    world.run();
    let (at, _) = world.proved.clone().unwrap();
    let first_on = world.started.iter().find(|it| it.2 == Action::On).unwrap();
    assert!(first_on.0 >= at);
    assert!(world.node_is_on(), "rebooted");
    assert_eq!(world.ended, Some(Ok(())));
    assert!(world.alarms.is_empty());
}

#[test]
fn power_that_goes_late_is_waited_for_within_the_limit() {
    let late = |lag| Device {
        lag: Duration::from_secs(lag),
        ..Device::new("bmc")
    };
    let mut world = World::new(FenceAction::Off, vec![vec![late(4)]]);
    world.run();
    assert!(world.proved.is_some());
    let mut world = World::new(FenceAction::Off, vec![vec![late(60)]]);
    world.audible = false;
    world.run();
    assert!(world.proved.is_none());
    assert!(world.failures()[0].contains("still says that the power is on"));
}

#[test]
fn a_liar_proves_nothing() {
    // Off, it says, and on, it says.
    let idle = Device {
        idle: true,
        ..Device::new("bmc")
    };
    let mut world = World::new(FenceAction::Off, vec![vec![idle.clone()]]);
    world.run();
    assert!(world.failures()[0].contains("still says that the power is on"));
    assert_eq!(world.counts("bmc", Action::Off), 2, "tried twice, not more");

    // Off, it says, and off, it says: the plug of another machine. The heartbeats tell.
    let other = Device {
        ours: false,
        ..Device::new("bmc")
    };
    let mut world = World::new(FenceAction::Off, vec![vec![other]]);
    world.run();
    let why = world.failures();
    assert!(
        why[0].contains("heartbeats of beta still arrive"),
        "{why:?}"
    );
}

#[test]
fn the_next_level_is_used_when_one_fails() {
    let broken = Device {
        fails: (1..100).collect(),
        ours: false,
        ..Device::new("bmc")
    };
    let hangs = Device {
        takes: Duration::from_secs(1000),
        ours: false,
        ..Device::new("hangs")
    };
    let mut world = World::new(
        FenceAction::Off,
        vec![vec![broken], vec![hangs], vec![Device::new("strip")]],
    );
    world.run();
    let (_, evidence) = world.proved.clone().unwrap();
    assert!(matches!(evidence, FenceEvidence::Devices { level: 3, .. }));
    assert_eq!(world.counts("bmc", Action::Off), 2);
    assert_eq!(world.counts("hangs", Action::Off), 2);
}

#[test]
fn one_of_two_supplies_is_no_proof() {
    let broken = Device {
        fails: (1..100).collect(),
        ..Device::new("two")
    };
    let mut world = World::new(FenceAction::Off, vec![vec![Device::new("one"), broken]]);
    world.run();
    let why = world.failures();
    assert_eq!(why, ["off failed: it is broken"]);
    assert_eq!(world.counts("one", Action::Status), 0, "nothing to ask");
}

#[test]
fn an_off_that_failed_once_is_tried_again() {
    let shaky = Device {
        fails: [1].into(),
        ..Device::new("bmc")
    };
    let mut world = World::new(FenceAction::Off, vec![vec![shaky]]);
    world.run();
    assert!(world.proved.is_some());
    assert_eq!(world.counts("bmc", Action::Off), 2);
}

#[test]
fn what_can_prove_nothing_is_not_used() {
    let with = |change: &dyn Fn(&mut Ability)| {
        let mut device = Device::new("bmc");
        change(&mut device.ability);
        let mut world = World::new(FenceAction::Reboot, vec![vec![device]]);
        world.run();
        world
    };
    let reboot_only = with(&|it| it.off = false);
    assert!(reboot_only.failures()[0].contains("a reboot proves nothing"));
    assert!(reboot_only.started.is_empty());
    let mute = with(&|it| it.status = false);
    assert!(mute.failures()[0].contains("--trust-exit-code"));
    assert!(mute.started.is_empty());
    let away = with(&|it| it.unusable = Some("its agent is not installed".to_owned()));
    assert_eq!(away.failures(), ["its agent is not installed"]);
    let trusted = with(&|it| {
        it.status = false;
        it.trust_exit_code = true;
    });
    let FenceEvidence::Devices { devices, .. } = trusted.proved.unwrap().1 else {
        panic!("by the device");
    };
    assert_eq!(devices[0].1, FenceVerified::ExitCode);
    let mut nothing = World::new(FenceAction::Off, Vec::new());
    nothing.run();
    assert!(nothing.failures()[0].contains("no fence device"));
}

#[test]
fn a_node_that_can_not_be_switched_on_is_an_alarm_and_no_failure() {
    let mut no_on = Device::new("bmc");
    no_on.ability.on = false;
    let mut world = World::new(FenceAction::Reboot, vec![vec![no_on]]);
    world.run();
    assert_eq!(world.ended, Some(Ok(())));
    assert!(
        world.alarms[0].contains("no action `on`"),
        "{:?}",
        world.alarms
    );
    let weak = Device {
        // off, status, on, on
        fails: [3, 4].into(),
        ..Device::new("bmc")
    };
    let mut world = World::new(FenceAction::Reboot, vec![vec![weak]]);
    world.run();
    assert_eq!(world.ended, Some(Ok(())));
    assert!(world.alarms[0].contains("switch it on by hand"));
    assert_eq!(world.counts("bmc", Action::On), 2);
}

#[test]
fn the_delay_comes_first() {
    let delay = Duration::from_secs(7);
    let mut world = World::new(FenceAction::Off, vec![vec![Device::new("bmc")]])
        .with(|plan| plan.delay = delay);
    world.run();
    assert_eq!(world.started[0].0, START + delay);
}

#[test]
fn a_node_is_not_back_before_what_it_had_was_taken_from_it() {
    let held = || {
        let mut world = World::new(FenceAction::Reboot, vec![vec![Device::new("bmc")]])
            .with(|plan| plan.hold = true);
        world.run();
        assert!(world.proved.is_some() && world.ended.is_none());
        assert_eq!(world.counts("bmc", Action::On), 0);
        assert!(world.attempt.confirm(world.now, "root", NodeId(1)).is_err());
        world
    };
    let mut world = held();
    let effects = world.attempt.step(world.now, Input::SwitchOn);
    world.apply(effects);
    world.run();
    assert_eq!(world.ended, Some(Ok(())));
    assert_eq!(world.counts("bmc", Action::On), 1);
    let mut world = held();
    let effects = world.attempt.give_up("root");
    world.apply(effects);
    assert_eq!(world.ended, Some(Ok(())));
    assert!(world.alarms[0].contains("stays off"));
    assert_eq!(world.counts("bmc", Action::On), 0);
}

fn with_person(devices: Vec<Device>) -> World {
    let mut world = World::new(FenceAction::Off, vec![devices]);
    world.audible = false;
    world.with(|plan| {
        plan.levels.push(Level {
            number: 2,
            means: Means::Person,
        });
    })
}

#[test]
fn a_person_is_asked_last_and_believed_while_the_node_is_silent() {
    let broken = Device {
        fails: (1..100).collect(),
        ..Device::new("bmc")
    };
    let mut world = with_person(vec![broken]);
    world.run();
    assert!(world.ended.is_none() && world.attempt.waits_for_a_person());
    assert!(world.alarms[0].contains("relevo fence confirm beta"));
    let now = world.now;
    let effects = world.attempt.step(now, Input::Heard(now));
    assert!(effects.is_empty());
    let error = world.attempt.confirm(now, "root", NodeId(1)).unwrap_err();
    assert!(error.contains("beta is on"), "{error}");
    let effects = world
        .attempt
        .confirm(now + SILENCE, "root", NodeId(1))
        .unwrap();
    world.apply(effects);
    let (_, evidence) = world.proved.clone().unwrap();
    assert_eq!(
        evidence,
        FenceEvidence::Person {
            who: "root".to_owned(),
            on: NodeId(1)
        }
    );
    assert!(
        world
            .attempt
            .confirm(now + SILENCE, "root", NodeId(1))
            .is_err()
    );
}

/// A device that hangs must not make a person wait who knows already.
#[test]
fn a_person_ends_what_devices_do() {
    let mut world = with_person(vec![Device::new("bmc")]);
    let effects = world.attempt.step(START, Input::Tick);
    world.apply(effects);
    assert_eq!(world.running.len(), 1);
    let effects = world.attempt.confirm(START, "root", NodeId(3)).unwrap();
    world.apply(effects);
    assert!(world.proved.is_some() && world.ended.is_some());
    let late = Input::Replied {
        run: RunId(1),
        reply: Reply::Done,
    };
    assert_eq!(world.attempt.step(START, late), []);
}

#[test]
fn an_attempt_can_be_given_up_before_its_proof() {
    let mut world = with_person(vec![Device::new("bmc")]);
    let effects = world.attempt.step(START, Input::Tick);
    world.apply(effects);
    let effects = world.attempt.give_up("root");
    world.apply(effects);
    assert!(world.failures()[0].contains("root gave it up"));
    assert!(world.running.is_empty() && world.proved.is_none());
    assert_eq!(world.attempt.give_up("root"), []);
}

prop_compose! {
    fn any_device(name: String)(
        ours in any::<bool>(),
        lag in prop_oneof![Just(0u64), 0..3000u64, 4000..9000u64],
        takes in prop_oneof![10..800u64, 9000..12_000u64],
        fails in proptest::collection::btree_set(1..12usize, 0..6),
        lies in 0..10u8,
        lacks in 0..12u8,
    ) -> Device {
        let mut ability = ability(&name);
        match lacks {
            0 => ability.off = false,
            1 => ability.on = false,
            2 => ability.status = false,
            3 => { ability.status = false; ability.trust_exit_code = true; }
            4 => ability.unusable = Some("it is away".to_owned()),
            _ => {}
        }
        Device {
            ability,
            ours,
            lag: Duration::from_millis(lag),
            takes: Duration::from_millis(takes),
            fails,
            says_off: lies == 0,
            idle: lies == 1,
            ..Device::new(&name)
        }
    }
}

fn any_levels() -> impl Strategy<Value = Vec<Vec<Device>>> {
    proptest::collection::vec(1..4usize, 0..4).prop_flat_map(|sizes| {
        let mut number = 0;
        let levels: Vec<Vec<_>> = sizes
            .into_iter()
            .map(|size| {
                (0..size)
                    .map(|_| {
                        number += 1;
                        any_device(format!("d{number}"))
                    })
                    .collect()
            })
            .collect();
        levels
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// [`World`] checks each proof and each action: never a proof without a verified `off` of every device of
    /// one level, nothing switched on before it, and no node proved off that is heard.
    #[test]
    fn whatever_devices_do_no_proof_is_false(
        levels in any_levels(),
        reboot in any::<bool>(),
        audible in any::<bool>(),
        delay in 0..2000u64,
    ) {
        let action = if reboot { FenceAction::Reboot } else { FenceAction::Off };
        let delay = Duration::from_millis(delay);
        let good = levels.iter().any(|level| level.iter().all(is_good));
        let own = levels.iter().find(|level| level.iter().all(is_good)).is_some_and(|level| {
            // All supplies of the node are in that level.
            level.iter().filter(|it| it.ours).count()
                == levels.iter().flatten().filter(|it| it.ours).count()
                && level.iter().any(|it| it.ours)
        });
        let mut world = World::new(action, levels).with(|plan| plan.delay = delay);
        world.audible = audible;
        world.run();
        prop_assert!(world.ended.is_some(), "{}", world.attempt.doing());
        prop_assert!(world.started.iter().all(|it| it.0 >= START + delay));
        if good && (own || !audible) {
            prop_assert!(world.proved.is_some(), "{:?}", world.ended);
        }
        if let Some(Err(failures)) = &world.ended {
            prop_assert!(!failures.is_empty(), "failed without a reason");
        }
    }
}

/// It does what it shall at once, and tells the truth.
fn is_good(device: &Device) -> bool {
    let ability = &device.ability;
    ability.off
        && ability.status
        && ability.unusable.is_none()
        && device.fails.is_empty()
        && !device.idle
        && !device.says_off
        && device.takes < ability.action_limit
        && device.lag < ability.verify_limit
}
