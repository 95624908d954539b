//! One machine with its peers played by the test.

use std::time::Duration;

use relevo_types::{Instance, LeaseGeneration, NodeId, Sensitivity, Time};

use crate::{
    Effect, Heartbeat, Input, Liveness, MemberConfig, Membership, PathConfig, PathEcho,
    PathTrouble, PeerEcho, Voters, rounds_per_heartbeat,
};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const W: NodeId = NodeId(3);
const MINE: Instance = Instance(11);
const G1: LeaseGeneration = LeaseGeneration(1);
const G2: LeaseGeneration = LeaseGeneration(2);

fn ms(value: u64) -> Time {
    Time(value * 1_000_000)
}

/// Node `a` of the cluster a, b, w, with its peers' next rounds.
struct Bench {
    machine: Membership,
    out: Vec<Effect>,
    round: u64,
}

impl Bench {
    fn new(condemned: Vec<(NodeId, LeaseGeneration)>) -> Self {
        let timing = Sensitivity::Normal.timing();
        let mut bench = Self {
            machine: Membership::new(A, MINE, timing, condemned, Time::ZERO),
            out: Vec::new(),
            round: 0,
        };
        bench.input(0, the(members(&[(A, G1), (B, G1), (W, G1)])));
        bench
    }

    /// Handles one input and returns its effects.
    fn input(&mut self, at_ms: u64, input: Input) -> Vec<Effect> {
        self.out.clear();
        self.machine.handle(ms(at_ms), input, &mut self.out);
        self.out.clone()
    }

    fn tick(&mut self, at_ms: u64) -> Vec<Effect> {
        self.input(at_ms, Input::Tick)
    }

    fn hear(&mut self, at_ms: u64, from: NodeId) -> Vec<Effect> {
        self.round += 1;
        let heartbeat = heartbeat(from, self.round, echo_of_a(0, LeaseGeneration(0)));
        self.hear_this(at_ms, "lan", heartbeat)
    }

    fn hear_this(&mut self, at_ms: u64, path: &str, heartbeat: Heartbeat) -> Vec<Effect> {
        let path = path.to_owned();
        self.input(at_ms, Input::Heartbeat { path, heartbeat })
    }

    /// Ticks at every deadline up to and at the time; all effects.
    fn run(&mut self, to_ms: u64) -> Vec<Effect> {
        let mut all = Vec::new();
        while self.machine.deadline() <= ms(to_ms) {
            self.out.clear();
            let at = self.machine.deadline();
            self.machine.handle(at, Input::Tick, &mut self.out);
            all.append(&mut self.out);
        }
        all
    }
}

fn the(members: std::collections::BTreeMap<NodeId, MemberConfig>) -> Input {
    let voters = Voters { known: 1, told: 1 };
    Input::Members { members, voters }
}

fn members(list: &[(NodeId, LeaseGeneration)]) -> std::collections::BTreeMap<NodeId, MemberConfig> {
    let config = |generation| MemberConfig {
        paths: ["lan", "repl"]
            .map(|name| PathConfig {
                name: name.to_owned(),
                every: 1,
            })
            .to_vec(),
        generation,
        evicted: false,
        voter: true,
    };
    list.iter()
        .map(|(node, generation)| (*node, config(*generation)))
        .collect()
}

fn echo_of_a(granted_round: u64, condemned: LeaseGeneration) -> PeerEcho {
    PeerEcho {
        node: A,
        instance: MINE,
        granted_round,
        heard: true,
        alive: true,
        condemned,
    }
}

fn heartbeat(from: NodeId, round: u64, echo: PeerEcho) -> Heartbeat {
    Heartbeat {
        from,
        instance: Instance(u64::from(from.0) * 100),
        round,
        generation: G1,
        voters: 1,
        peers: vec![echo],
        echo: None,
    }
}

/// What the newest heartbeat to `to` says about it.
fn word_about(effects: &[Effect], to: NodeId) -> Option<PeerEcho> {
    effects.iter().rev().find_map(|effect| match effect {
        Effect::Send { heartbeat, .. } => {
            heartbeat.peers.iter().find(|echo| echo.node == to).cloned()
        }
        _ => None,
    })
}

fn liveness(effects: &[Effect], node: NodeId) -> Vec<Liveness> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Liveness {
                node: n, liveness, ..
            } if *n == node => Some(*liveness),
            _ => None,
        })
        .collect()
}

fn persists(effects: &[Effect], node: NodeId) -> usize {
    effects
        .iter()
        .filter(|effect| matches!(effect, Effect::PersistCondemned { node: n, .. } if *n == node))
        .count()
}

#[test]
fn a_round_goes_to_every_member_on_every_path() {
    let mut bench = Bench::new(vec![]);
    let sends: Vec<(NodeId, String)> = bench
        .tick(100)
        .into_iter()
        .filter_map(|effect| match effect {
            Effect::Send { to, path, .. } => Some((to, path)),
            _ => None,
        })
        .collect();
    let expected = [(B, "lan"), (B, "repl"), (W, "lan"), (W, "repl")];
    assert_eq!(sends, expected.map(|(to, path)| (to, path.to_owned())));
    assert_eq!(bench.machine.deadline(), ms(200));
}

#[test]
fn suspect_dead_condemned_at_the_exact_times() {
    let mut bench = Bench::new(vec![]);
    bench.run(40);
    let heard = bench.hear(50, B);
    assert_eq!(liveness(&heard, B), [Liveness::Alive]);
    assert!(liveness(&bench.run(349), B).is_empty());
    assert_eq!(liveness(&bench.run(350), B), [Liveness::Suspect]);
    let before = bench.run(1049);
    assert!(liveness(&before, B).is_empty());
    assert_eq!(persists(&before, B), 0);
    let dead = bench.run(1050);
    assert_eq!(liveness(&dead, B), [Liveness::Dead]);
    assert_eq!(persists(&dead, B), 1);
    assert!(dead.iter().any(|effect| matches!(
        effect,
        Effect::Liveness { reason, .. } if reason == "silent on lan and repl for 1.0 s"
    )));
    assert_eq!(persists(&bench.run(5000), B), 0, "asked for once");
}

#[test]
fn a_condemnation_is_said_only_when_durable_and_then_at_once() {
    let mut bench = Bench::new(vec![]);
    bench.hear(50, B);
    bench.run(1050);
    let not_yet = bench.run(1150);
    assert_eq!(
        word_about(&not_yet, B).unwrap().condemned,
        LeaseGeneration(0)
    );
    // Its heartbeat comes after all, while the disk writes: it gets no grant any more.
    bench.hear(1160, B);
    assert_eq!(word_about(&bench.run(1250), B).unwrap().granted_round, 1);
    let persisted = bench.input(
        1260,
        Input::Persisted {
            node: B,
            generation: G1,
        },
    );
    assert_eq!(word_about(&persisted, B).unwrap().condemned, G1);
    assert!(persisted.contains(&Effect::Condemned {
        node: B,
        generation: G1,
        by: vec![A]
    }));
    bench.hear(1300, B);
    assert_eq!(word_about(&bench.run(1360), B).unwrap().granted_round, 1);
    // Readmitted, it gets grants again.
    bench.input(1400, the(members(&[(A, G1), (B, G2), (W, G1)])));
    bench.round += 1;
    let mut again = heartbeat(B, bench.round, echo_of_a(0, LeaseGeneration(0)));
    again.generation = G2;
    let round = again.round;
    bench.hear_this(1410, "lan", again);
    assert_eq!(
        word_about(&bench.run(1500), B).unwrap().granted_round,
        round
    );
}

#[test]
fn after_a_restart_nobody_is_condemned_before_the_dead_time() {
    let mut bench = Bench::new(vec![(B, G1)]);
    let effects = bench.run(999);
    assert_eq!(persists(&effects, B) + persists(&effects, W), 0);
    assert_eq!(word_about(&effects, B).unwrap().condemned, G1);
    let effects = bench.run(1000);
    assert_eq!((persists(&effects, B), persists(&effects, W)), (0, 1));
    // What was condemned before the restart stays so.
    bench.hear(1100, B);
    assert_eq!(word_about(&bench.run(1300), B).unwrap().granted_round, 0);
}

#[test]
fn a_node_that_does_not_hear_us_is_as_good_as_silent() {
    let mut bench = Bench::new(vec![]);
    bench.hear(50, B);
    let mut effects = Vec::new();
    for at in (100..1200).step_by(100) {
        bench.round += 1;
        let mut deaf = heartbeat(B, bench.round, echo_of_a(0, LeaseGeneration(0)));
        deaf.peers[0].heard = false;
        effects.append(&mut bench.run(at));
        effects.append(&mut bench.hear_this(at, "lan", deaf));
    }
    assert_eq!(liveness(&effects, B), [Liveness::Suspect, Liveness::Dead]);
    assert_eq!(persists(&effects, B), 1);
    assert_eq!(word_about(&effects, B).unwrap().granted_round, 1);
    assert!(word_about(&effects, B).unwrap().heard);
    let status = bench.machine.status();
    assert!(status.peers[&B].reason.contains("does not hear this node"));
}

#[test]
fn old_heartbeats_are_refused() {
    let mut bench = Bench::new(vec![]);
    let first = heartbeat(B, 7, echo_of_a(0, LeaseGeneration(0)));
    bench.hear_this(10, "lan", first.clone());
    // Replayed, or of the past.
    bench.run(500);
    assert!(liveness(&bench.hear_this(500, "lan", first.clone()), B).is_empty());
    let mut past = first.clone();
    past.round = 6;
    assert!(liveness(&bench.hear_this(501, "lan", past), B).is_empty());
    // The same round on another path is no replay.
    assert_eq!(
        liveness(&bench.hear_this(502, "repl", first.clone()), B),
        [Liveness::Alive]
    );
}

#[test]
fn an_instance_that_echoes_newer_rounds_is_the_later_one() {
    let mut bench = Bench::new(vec![]);
    bench.run(600);
    let echo = |round| {
        Some(PathEcho {
            instance: MINE,
            round,
            held_us: 0,
        })
    };
    let mut first = heartbeat(B, 7, echo_of_a(0, LeaseGeneration(0)));
    first.echo = echo(3);
    assert_eq!(
        liveness(&bench.hear_this(600, "lan", first.clone()), B),
        [Liveness::Alive]
    );
    // It restarted. Before it heard this node it can't be told from a ghost.
    let mut second = first.clone();
    second.instance = Instance(999);
    second.round = 1;
    second.echo = None;
    bench.run(1000);
    assert!(bench.hear_this(1000, "lan", second.clone()).is_empty());
    second.round = 2;
    second.echo = echo(5);
    assert_eq!(
        liveness(&bench.hear_this(1100, "lan", second.clone()), B),
        [Liveness::Alive]
    );
    // The first one never comes back, not with a round it did not use either.
    bench.run(1500);
    first.round = 1000;
    first.echo = echo(4);
    assert!(bench.hear_this(1500, "lan", first).is_empty());
    second.round = 3;
    assert_eq!(
        liveness(&bench.hear_this(1501, "lan", second), B),
        [Liveness::Alive]
    );
}

/// Found by the property test: a ghost of an earlier instance came first to both of two restarted
/// nodes, each waited for the other to echo it, and neither ever heard the other.
#[test]
fn a_ghost_heard_first_gives_way() {
    let mut bench = Bench::new(vec![]);
    let mut ghost = heartbeat(B, 700, echo_of_a(0, LeaseGeneration(0)));
    ghost.peers[0].instance = Instance(10);
    bench.hear_this(10, "lan", ghost.clone());
    let mut real = ghost;
    real.instance = Instance(999);
    real.round = 1;
    let effects = bench.hear_this(50, "lan", real);
    assert!(effects.is_empty(), "it does not hear this node yet");
    assert_eq!(
        word_about(&bench.run(200), B).unwrap().instance,
        Instance(999)
    );
}

#[test]
fn the_lease_follows_the_majority() {
    let mut bench = Bench::new(vec![]);
    bench.run(200);
    assert_eq!(bench.machine.lease_until(), Time::ZERO);
    let round = 2;
    let granted = heartbeat(W, 1, echo_of_a(round, LeaseGeneration(0)));
    let effects = bench.hear_this(210, "lan", granted);
    // Round 2 was sent at 100 ms; the lease is 900 ms.
    assert!(effects.contains(&Effect::LeaseUntil(ms(1000))));
    // A grant to an earlier process of this node is none to this one.
    let mut stale = heartbeat(B, 1, echo_of_a(3, LeaseGeneration(0)));
    stale.peers[0].instance = Instance(10);
    bench.hear_this(220, "lan", stale);
    assert_eq!(bench.machine.lease_until(), ms(1000));
    // Evicted, it has none from then on.
    let mut evicted = members(&[(A, G1), (B, G1), (W, G1)]);
    evicted.get_mut(&A).unwrap().evicted = true;
    let effects = bench.input(300, the(evicted));
    assert!(effects.contains(&Effect::LeaseUntil(ms(300))));
    let granted = heartbeat(W, 2, echo_of_a(4, LeaseGeneration(0)));
    bench.hear_this(310, "lan", granted);
    assert_eq!(bench.machine.lease_until(), ms(300));
}

#[test]
fn alone_it_holds_its_lease_while_it_runs() {
    let timing = Sensitivity::Normal.timing();
    let mut machine = Membership::new(A, MINE, timing, vec![], Time::ZERO);
    let mut out = Vec::new();
    machine.handle(ms(0), the(members(&[(A, G1)])), &mut out);
    assert_eq!(out, [Effect::LeaseUntil(ms(900))]);
    machine.handle(ms(100), Input::Tick, &mut out);
    assert_eq!(machine.lease_until(), ms(1000));
    out.clear();
    machine.handle(ms(5000), Input::Tick, &mut out);
    let pause = Duration::from_millis(4800);
    // Alone it is a majority, and has known for the dead time that it is.
    assert_eq!(
        out,
        [
            Effect::Paused { pause },
            Effect::VotersSettled(1),
            Effect::LeaseUntil(ms(5900))
        ]
    );
}

#[test]
fn after_a_pause_silence_starts_anew() {
    let mut bench = Bench::new(vec![]);
    bench.hear(50, B);
    bench.hear(60, W);
    bench.run(100);
    let effects = bench.tick(3000);
    assert!(matches!(effects[0], Effect::Paused { .. }));
    assert!(liveness(&effects, B).is_empty());
    let effects = bench.run(3999);
    assert_eq!(liveness(&effects, B), [Liveness::Suspect]);
    assert_eq!(persists(&effects, B), 0);
    assert_eq!(persists(&bench.run(4000), B), 1);
}

#[test]
fn a_majority_of_condemnations_is_counted_from_members_only() {
    let mut bench = Bench::new(vec![]);
    let mut word = heartbeat(W, 1, echo_of_a(0, LeaseGeneration(0)));
    word.peers.push(PeerEcho {
        node: B,
        condemned: G1,
        ..echo_of_a(0, G1)
    });
    let effects = bench.hear_this(10, "lan", word.clone());
    assert!(effects.contains(&Effect::Condemned {
        node: B,
        generation: G1,
        by: vec![W]
    }));
    // A stranger's word, and what is said of an older generation, count for nothing.
    word.from = NodeId(9);
    assert!(bench.hear_this(20, "lan", word).is_empty());
    let effects = bench.input(30, the(members(&[(A, G1), (B, G2), (W, G1)])));
    assert!(effects.contains(&Effect::Condemned {
        node: B,
        generation: G2,
        by: vec![]
    }));
    // A promise is kept in mind though its voter restarts and has not repeated it yet.
    let mut restarted = heartbeat(W, 1, echo_of_a(0, LeaseGeneration(0)));
    restarted.instance = Instance(301);
    restarted.echo = Some(PathEcho {
        instance: MINE,
        round: 1,
        held_us: 0,
    });
    bench.hear_this(40, "lan", restarted);
    let effects = bench.input(50, the(members(&[(A, G1), (B, G1), (W, G1)])));
    assert!(effects.contains(&Effect::Condemned {
        node: B,
        generation: G1,
        by: vec![W]
    }));
}

#[test]
fn round_trips_are_measured_per_path() {
    let mut bench = Bench::new(vec![]);
    bench.run(100);
    let mut answer = heartbeat(B, 1, echo_of_a(0, LeaseGeneration(0)));
    answer.echo = Some(PathEcho {
        instance: MINE,
        round: 2,
        held_us: 49_000,
    });
    bench.hear_this(150, "repl", answer);
    let status = bench.machine.status();
    let paths = &status.peers[&B].paths;
    assert_eq!((paths[0].up, paths[0].round_trip_us), (false, None));
    assert_eq!((paths[1].up, paths[1].round_trip_us), (true, Some(1000)));
    assert_eq!(status.peers[&B].heard_by, [A]);
}

#[test]
fn only_voters_count() {
    let mut bench = Bench::new(vec![]);
    let mut config = members(&[(A, G1), (B, G1), (W, G1)]);
    config.get_mut(&B).unwrap().voter = false;
    bench.input(10, the(config));
    bench.run(200);
    let granted = heartbeat(B, 1, echo_of_a(1, LeaseGeneration(0)));
    let effects = bench.hear_this(210, "lan", granted);
    assert_eq!(bench.machine.lease_until(), Time::ZERO);
    assert!(
        !effects
            .iter()
            .any(|effect| matches!(effect, Effect::HeardBy { node: W, .. }))
    );
    let granted = heartbeat(W, 1, echo_of_a(1, LeaseGeneration(0)));
    bench.hear_this(220, "lan", granted);
    assert_eq!(bench.machine.lease_until(), ms(900));
}

/// B is heard on both paths until the cable of one is pulled; later its machine dies.
#[test]
fn a_path_that_is_down_is_told_while_its_peer_is_alive() {
    let mut bench = Bench::new(vec![]);
    let mut told = Vec::new();
    let mut paths = |at: u64, effects: Vec<Effect>| {
        for effect in effects {
            if let Effect::Path { path, trouble, .. } = effect {
                told.push((at, path, trouble));
            }
        }
    };
    for round in 1..=90 {
        let at = round * 100;
        paths(at, bench.run(at));
        let heartbeat = heartbeat(B, round, echo_of_a(0, LeaseGeneration(0)));
        if round <= 60 {
            paths(at, bench.hear_this(at, "lan", heartbeat.clone()));
        }
        if round <= 10 || (31..=60).contains(&round) {
            paths(at, bench.hear_this(at, "repl", heartbeat));
        }
    }
    let repl = || "repl".to_owned();
    assert_eq!(
        told,
        [
            (2000, repl(), Some(PathTrouble::Down)),
            (4000, repl(), None)
        ],
        "nothing of the paths of a dead node"
    );
    assert_eq!(bench.machine.liveness(B), Liveness::Dead);
    assert_eq!(bench.machine.status().peers[&B].paths[1].trouble, None);
}

#[test]
fn a_slow_line_gets_a_heartbeat_when_it_has_room() {
    let timing = Sensitivity::Normal.timing();
    let of_line = |baud: u32| rounds_per_heartbeat(Some(baud / 10), 3, &timing);
    assert_eq!(rounds_per_heartbeat(None, 3, &timing), 1);
    assert_eq!((of_line(115_200), of_line(9600), of_line(1200)), (1, 2, 9));
    let mut bench = Bench::new(vec![]);
    let mut config = members(&[(A, G1), (B, G1), (W, G1)]);
    config.get_mut(&B).unwrap().paths[1].every = 2;
    bench.input(10, the(config));
    let mut sent = std::collections::BTreeMap::<String, Vec<u64>>::new();
    for effect in bench.run(1000) {
        if let Effect::Send {
            to: B,
            path,
            heartbeat,
        } = effect
        {
            sent.entry(path).or_default().push(heartbeat.round);
        }
    }
    let even = |rounds: &Vec<u64>| rounds.iter().filter(|round| **round % 2 == 0).count();
    assert!(sent["repl"].len() >= 4);
    assert_eq!(sent["repl"].len(), even(&sent["lan"]));
    assert_eq!(sent["repl"].len(), even(&sent["repl"]));
}

/// Its peers know of a change of who votes that it does not know: what they grant may come with a grant of voters it
/// does not know, so it counts no more.
#[test]
fn grants_of_who_knows_other_voters_are_not_counted() {
    let mut bench = Bench::new(vec![]);
    bench.run(100);
    let granted = |round, mine, voters| Heartbeat {
        voters,
        ..heartbeat(B, round, echo_of_a(mine, LeaseGeneration(0)))
    };
    bench.hear_this(110, "lan", granted(1, 1, 1));
    assert_eq!(
        bench.machine.lease_until(),
        ms(900),
        "from its round at 0 ms"
    );
    bench.run(200);
    bench.hear_this(210, "lan", granted(2, 3, 2));
    assert_eq!(bench.machine.lease_until(), ms(900));
    // It is told.
    let voters = Voters { known: 2, told: 2 };
    let members = members(&[(A, G1), (B, G1), (W, G1)]);
    bench.input(220, Input::Members { members, voters });
    bench.hear_this(230, "lan", granted(3, 3, 2));
    assert_eq!(bench.machine.lease_until(), ms(1100));
}

#[test]
fn a_change_of_who_votes_is_settled_once_a_majority_has_known_it_for_the_dead_time() {
    let mut bench = Bench::new(vec![]);
    let told = |effects: &[Effect]| effects.contains(&Effect::VotersSettled(2));
    let voters = Voters { known: 2, told: 2 };
    let members = members(&[(A, G1), (B, G1), (W, G1)]);
    bench.input(1000, Input::Members { members, voters });
    for at in (1000..3000).step_by(100) {
        assert!(!told(&bench.hear(at, B)), "nobody else knows it");
        assert!(!told(&bench.run(at + 50)));
    }
    let knows = |round| Heartbeat {
        voters: 2,
        ..heartbeat(B, round, echo_of_a(0, LeaseGeneration(0)))
    };
    for (round, at) in (1000..).zip((3000..4000).step_by(100)) {
        assert!(!told(&bench.hear_this(at, "lan", knows(round))));
        assert!(!told(&bench.run(at + 50)));
    }
    assert!(told(&bench.hear_this(4000, "lan", knows(2000))));
    assert!(!told(&bench.hear_this(4010, "lan", knows(2001))), "once");
}
