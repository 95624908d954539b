//! A whole status from fixed sources, and verdicts.

use std::collections::BTreeMap;

use relevo_membership::{Liveness, PathStatus, PathTrouble, PeerStatus};
use relevo_node::{NodeStatus as Observed, Phase, ServiceStatus as Running};
use relevo_types::{
    ClusterId, LeaseGeneration, LineageId, NodeId, Sensitivity, ServiceId, Time, VolumeId,
    cluster::{
        ClusterState, Command, JoinToken, NodeKind, NodePath, NodeSpec, Part, Placement, Ports,
        ProcessPart, Protocol, ReplicaSpec, ServiceSpec, VolumeChange, VolumePart,
    },
};

use super::*;
use crate::api::{ClusterStatus, Health, ServiceState};

const SECOND: u64 = 1_000_000_000;

fn spec(name: &str, kind: NodeKind) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        kind,
        paths: vec![NodePath {
            name: "lan".to_owned(),
            address: "10.0.0.1".parse().unwrap(),
            replication: false,
        }],
        streams: Vec::new(),
        ports: Ports::default(),
    }
}

/// `alfa` and `beta` with a replica each of `mail`, the witness `wit`; `alfa` is primary and
/// holds the service.
pub(crate) fn state() -> ClusterState {
    let mut state = ClusterState::default();
    let mut apply = |command: Command| {
        state.apply(&command).unwrap();
    };
    apply(Command::Init {
        cluster: ClusterId([1; 16]),
        name: "campus".to_owned(),
        sensitivity: Sensitivity::Normal,
        node: spec("alfa", NodeKind::Data),
    });
    for (name, kind, id) in [("beta", NodeKind::Data, 2), ("wit", NodeKind::Witness, 3)] {
        apply(Command::CreateToken {
            hash: name.to_owned(),
            token: JoinToken {
                kind: None,
                expires_unix_s: 10,
            },
        });
        apply(Command::Join {
            hash: name.to_owned(),
            now_unix_s: 1,
            node: spec(name, kind),
        });
        apply(Command::AdmitVoter {
            node: NodeId(id),
            expect: u64::from(id) - 1,
        });
    }
    let replica = |node| ReplicaSpec {
        node: NodeId(node),
        protocol: Protocol::C,
        backing: None,
        force: false,
    };
    apply(Command::CreateVolume {
        name: "mail".to_owned(),
        size: 1 << 20,
        lineage: LineageId(7),
        replicas: vec![replica(1), replica(2)],
    });
    for node in [1, 2] {
        apply(Command::ReplicaCreated {
            volume: VolumeId(1),
            node: NodeId(node),
        });
    }
    apply(Command::Volume {
        volume: VolumeId(1),
        expect: relevo_types::Epoch(1),
        change: VolumeChange::Promote { node: NodeId(1) },
    });
    apply(Command::CreateService {
        spec: ServiceSpec {
            name: "mail".to_owned(),
            parts: vec![
                Part::Volume(VolumePart {
                    volume: VolumeId(1),
                    device: false,
                }),
                Part::Process(ProcessPart {
                    command: vec!["/bin/maild".to_owned()],
                    environment: BTreeMap::new(),
                    directory: None,
                    ready: None,
                }),
            ],
        },
        placement: Placement::default(),
        target: None,
    });
    apply(Command::Acquire {
        service: ServiceId(1),
        node: NodeId(1),
    });
    state
}

fn peer(liveness: Liveness) -> PeerStatus {
    PeerStatus {
        liveness,
        since: Time(95 * SECOND),
        reason: "silent on lan".to_owned(),
        heard_at: None,
        arrived_at: None,
        hears_us: true,
        paths: vec![PathStatus {
            name: "lan".to_owned(),
            up: liveness == Liveness::Alive,
            round_trip_us: Some(200),
            jitter_us: Some(30),
            loss_percent: 0,
            trouble: None,
        }],
        condemned_by: vec![],
        heard_by: vec![],
    }
}

fn observed(beta: Liveness, phase: Phase) -> Observed {
    let running = Running {
        phase,
        since: Time(98 * SECOND),
        reason: String::new(),
        waiting: (phase == Phase::Starting).then(|| "volume `mail` opens".to_owned()),
    };
    Observed {
        me: NodeId(1),
        leader: Some(NodeId(1)),
        membership: relevo_membership::Status {
            generation: LeaseGeneration(1),
            lease_until: Time(100 * SECOND + 700_000_000),
            peers: BTreeMap::from([(NodeId(2), peer(beta)), (NodeId(3), peer(Liveness::Alive))]),
        },
        services: BTreeMap::from([(ServiceId(1), running)]),
        waits: vec![],
        reports: BTreeMap::new(),
        leaving: false,
    }
}

fn report(dirty: Option<(u64, u64)>) -> LocalReport {
    let beta = LocalPeer {
        state: if dirty.is_some() {
            "SyncSource"
        } else {
            "Established"
        }
        .to_owned(),
        dirty_blocks: dirty.map(|(left, _)| left),
        dirty_at_first: dirty.map(|(_, all)| all),
        sync_bytes_per_s: dirty.map(|_| 4096),
        sync_same_bytes: dirty.map(|_| 8192),
        sync_limit: dirty.map(|_| 16384),
        sync_after: None,
        behind: None,
    };
    let volume = LocalVolume {
        disk: "UpToDate".to_owned(),
        peers: BTreeMap::from([(NodeId(2), beta)]),
        ..LocalVolume::default()
    };
    let parts = BTreeMap::from([
        (0, (PartState::Active, None)),
        (1, (PartState::Active, None)),
    ]);
    LocalReport {
        volumes: BTreeMap::from([(VolumeId(1), volume)]),
        services: BTreeMap::from([(ServiceId(1), parts)]),
        waits: vec![],
        paths: Standing::new(),
        ..LocalReport::default()
    }
}

fn status(state: &ClusterState, observed: &Observed, mine: LocalReport) -> ClusterStatus {
    compose(&Sources {
        state,
        me: NodeId(1),
        leader: observed.leader,
        observed: Some(observed),
        reports: &BTreeMap::from([(NodeId(1), mine)]),
        now: Time(100 * SECOND),
        now_unix_ms: 1_700_000_000_000,
    })
}

#[test]
fn a_healthy_cluster() {
    let status = status(
        &state(),
        &observed(Liveness::Alive, Phase::Running),
        report(None),
    );
    assert_eq!(judge(&status), (Health::Healthy, vec![]));
    assert_eq!(status.quorum.alive, 3);
    assert_eq!(status.quorum.needed, 2);
    assert_eq!(status.quorum.lease.left_ms, 700);
    let beta = &status.nodes[1];
    assert_eq!(beta.since_unix_ms, Some(1_699_999_995_000));
    assert_eq!(beta.paths[0].round_trip_us, Some(200));
    assert_eq!(status.nodes[0].paths[0].up, None);
    let mail = &status.volumes[0];
    assert_eq!(mail.primary.as_deref(), Some("alfa"));
    assert_eq!(mail.replicas[1].replication.as_deref(), Some("Established"));
    // beta did not report.
    assert_eq!(mail.replicas[1].disk, None);
    let service = &status.services[0];
    assert_eq!(service.state, ServiceState::Running);
    assert_eq!(service.parts[0].part, "volume mail");
    assert_eq!(service.parts[1].state, PartState::Active);
}

#[test]
fn a_replica_of_protocol_a_is_no_trouble_but_no_safety() {
    let mut state = state();
    let volume = state.volumes.get_mut(&VolumeId(1)).unwrap();
    volume.replicas.get_mut(&NodeId(2)).unwrap().spec.protocol = Protocol::A;
    volume.in_sync.remove(&NodeId(2));
    let mut report = report(None);
    let volume = report.volumes.get_mut(&VolumeId(1)).unwrap();
    volume.peers.get_mut(&NodeId(2)).unwrap().behind = Some((8192, 1500));
    let observed = observed(Liveness::Alive, Phase::Running);
    let status = status(&state, &observed, report);
    let beta = &status.volumes[0].replicas[1];
    assert_eq!(beta.protocol.as_deref(), Some("A"));
    assert_eq!(
        (beta.behind_bytes, beta.behind_ms),
        (Some(8192), Some(1500))
    );
    let (_, problems) = judge(&status);
    assert_eq!(
        problems,
        [
            "no other replica has acknowledged data of volume mail: if alfa is lost, what its replicas of protocol A lack is lost too"
        ]
    );
}

#[test]
fn a_split_brain_is_an_alarm_that_names_both_sides() {
    let mut state = state();
    let volume = state.volumes.get_mut(&VolumeId(1)).unwrap();
    volume.in_sync.remove(&NodeId(2));
    let mut report = report(None);
    let mine = report.volumes.get_mut(&VolumeId(1)).unwrap();
    mine.peers.get_mut(&NodeId(2)).unwrap().state = "StandAlone".to_owned();
    let split = |ours, theirs| LocalSplit {
        ours,
        theirs,
        why: "a person decides".to_owned(),
    };
    mine.splits.insert(NodeId(2), split(300, 2));
    let mut theirs = LocalReport::default();
    let volume = LocalVolume {
        disk: "Outdated".to_owned(),
        splits: BTreeMap::from([(NodeId(1), split(2, 300))]),
        ..LocalVolume::default()
    };
    theirs.volumes.insert(VolumeId(1), volume);
    let observed = observed(Liveness::Alive, Phase::Running);
    let status = compose(&Sources {
        state: &state,
        me: NodeId(2),
        leader: observed.leader,
        observed: Some(&observed),
        reports: &BTreeMap::from([(NodeId(1), report), (NodeId(2), theirs)]),
        now: Time(100 * SECOND),
        now_unix_ms: 1_700_000_000_000,
    });
    let splits = &status.volumes[0].splits;
    assert_eq!(splits.len(), 1, "once, by the primary's word: {splits:?}");
    let (health, problems) = judge(&status);
    assert_eq!(health, Health::Degraded);
    let alarm = problems.iter().find(|it| it.starts_with("SPLIT BRAIN"));
    assert_eq!(
        alarm.map(String::as_str),
        Some(
            "SPLIT BRAIN of volume mail: its replicas on alfa and beta were both changed while they were apart: only alfa has 1.1 MiB (300 blocks of 4 KiB), only beta has 0.0 MiB (2 blocks of 4 KiB). Nothing is replicated between them (a person decides). `relevo volume resolve mail --keep alfa` or `relevo volume resolve mail --keep beta` decides; what only the other one has is saved before it is overwritten"
        ),
        "{problems:?}"
    );
}

#[test]
fn a_resync_shows_its_progress() {
    let mut state = state();
    state
        .apply(&Command::Volume {
            volume: VolumeId(1),
            expect: relevo_types::Epoch(2),
            change: VolumeChange::Leave {
                nodes: vec![NodeId(2)],
            },
        })
        .unwrap();
    let observed = observed(Liveness::Alive, Phase::Running);
    let status = status(&state, &observed, report(Some((30, 120))));
    let beta = &status.volumes[0].replicas[1];
    assert_eq!(beta.dirty_bytes, Some(30 * 4096));
    assert_eq!(beta.sync_percent, Some(75));
    assert_eq!(
        (beta.sync_bytes_per_s, beta.sync_left_s),
        (Some(4096), Some(30))
    );
    assert_eq!(beta.sync_same_bytes, Some(8192));
    assert_eq!(beta.sync_limit_bytes_per_s, Some(16384));
    let (health, problems) = judge(&status);
    assert_eq!(health, Health::Degraded);
    assert_eq!(
        problems,
        ["the replica of volume mail on beta is not in sync; its resync is 75 % done"]
    );
}

#[test]
fn a_dead_node_degrades() {
    let status = status(
        &state(),
        &observed(Liveness::Dead, Phase::Running),
        report(None),
    );
    let (health, problems) = judge(&status);
    assert_eq!(health, Health::Degraded);
    assert_eq!(
        problems,
        [
            "2 of 3 voters are alive and 2 are needed: the next loss stops the cluster until a voter is back",
            "node beta is dead"
        ]
    );
    assert_eq!(status.nodes[1].reason.as_deref(), Some("silent on lan"));
}

#[test]
fn a_service_that_waits_is_down() {
    let status = status(
        &state(),
        &observed(Liveness::Alive, Phase::Starting),
        report(None),
    );
    let (health, problems) = judge(&status);
    assert_eq!(health, Health::Down);
    assert_eq!(
        problems,
        ["service mail is being started: volume `mail` opens"]
    );
    let wait = status.services[0].wait.as_ref().unwrap();
    assert_eq!(wait.since_unix_ms, Some(1_699_999_998_000));
}

#[test]
fn a_holder_that_does_not_answer() {
    let mut observed = observed(Liveness::Dead, Phase::Running);
    observed.me = NodeId(1);
    let mut state = state();
    let service = state.services.get_mut(&ServiceId(1)).unwrap();
    service.holder = Some(NodeId(2));
    let status = status(&state, &observed, report(None));
    assert_eq!(status.services[0].state, ServiceState::Unknown);
    assert_eq!(judge(&status).0, Health::Down);
}

#[test]
fn without_a_majority_nothing_is_known() {
    let mut observed = observed(Liveness::Dead, Phase::Running);
    observed
        .membership
        .peers
        .get_mut(&NodeId(3))
        .unwrap()
        .liveness = Liveness::Dead;
    observed.membership.lease_until = Time(99 * SECOND);
    observed.leader = None;
    let status = status(&state(), &observed, report(None));
    assert!(!status.quorum.lease.held);
    let (health, problems) = judge(&status);
    assert_eq!(health, Health::Down);
    assert!(problems[0].contains("1 of 3 voters"), "{problems:?}");
    assert!(problems[1].contains("no leader"), "{problems:?}");
}

/// The paths of alfa, which answers, and beta: `lan`, `repl` and the stream `ser`.
fn status_with_paths(beta: [(bool, Option<PathTrouble>); 3], own: Standing) -> ClusterStatus {
    let mut state = state();
    for (node, name, address) in [
        (1, "repl", "fd00::1"),
        (2, "repl", "fd00::2"),
        (1, "ser", "serial:/dev/ttyS0:9600"),
        (2, "ser", "serial:/dev/ttyS1:9600"),
    ] {
        let command = Command::AddPath {
            node: NodeId(node),
            name: name.to_owned(),
            address: address.parse().unwrap(),
            replication: false,
        };
        state.apply(&command).unwrap();
    }
    let mut observed = observed(Liveness::Alive, Phase::Running);
    let paths = ["lan", "repl", "ser"].into_iter().zip(beta);
    let paths = paths.map(|(name, (up, trouble))| PathStatus {
        name: name.to_owned(),
        up,
        round_trip_us: None,
        jitter_us: None,
        loss_percent: if up { 12 } else { 100 },
        trouble,
    });
    observed.membership.peers.get_mut(&NodeId(2)).unwrap().paths = paths.collect();
    let mut report = report(None);
    report.paths = own;
    status(&state, &observed, report)
}

#[test]
fn a_path_with_trouble_is_an_alarm_that_says_what_it_means() {
    let well = (true, None);
    let down = (false, Some(PathTrouble::Down));
    let problems = |beta| judge(&status_with_paths(beta, Standing::new())).1;
    assert_eq!(problems([well; 3]), [""; 0]);
    assert_eq!(
        problems([well, (false, None), well]),
        [""; 0],
        "a moment of silence"
    );
    let one = problems([well, down, well]);
    assert_eq!(one.len(), 1);
    assert!(
        one[0].starts_with("path repl to node beta is down: nothing moves for it; look at"),
        "{one:?}"
    );
    let two = problems([well, down, down]);
    assert_eq!(two.len(), 2);
    assert!(
        two[0].contains("if lan is lost too, node beta counts as dead"),
        "{two:?}"
    );
    let lossy = problems([well, (true, Some(PathTrouble::Loss)), well]);
    assert!(
        lossy[0].contains("loses 12 % of the heartbeats"),
        "{lossy:?}"
    );
    let back = problems([well, (true, Some(PathTrouble::Down)), well]);
    assert!(back[0].contains("was down and is back"), "{back:?}");
    // By the stream alone.
    let cut = problems([down, down, well]);
    assert_eq!(cut.len(), 1, "{cut:?}");
    assert!(
        cut[0].starts_with(
            "node beta is heard on ser alone, which carries heartbeats and nothing else"
        ),
        "{cut:?}"
    );
    assert!(
        cut[0].ends_with("Repair a network to it (lan, repl)"),
        "{cut:?}"
    );
    let own = Standing::from([("ser".to_owned(), Some("there is no such device".to_owned()))]);
    let status = status_with_paths([well; 3], own);
    let (_, unusable) = judge(&status);
    assert_eq!(
        unusable,
        ["this node can't use its path ser: there is no such device"]
    );
    let paths = &status.nodes[1].paths;
    assert_eq!(paths[2].address, "serial:/dev/ttyS1:9600");
    assert_eq!(paths[2].carries, crate::api::PathCarries::Heartbeats);
    assert_eq!(paths[0].carries, crate::api::PathCarries::All);
    // The witness is not on the others.
    assert_eq!(status.nodes[2].paths.len(), 1);
}

#[test]
fn fence_devices_and_what_is_wrong_with_them() {
    use relevo_types::cluster::{FenceCommand, FenceDevice, FenceKind, FenceTarget, FenceValue};

    let mut state = state();
    let secret = FenceValue::Secret("sesame".to_owned());
    let target = FenceTarget {
        plug: Some("7".to_owned()),
        level: 1,
        delay_ms: 2000,
    };
    let device = FenceDevice {
        name: "strip".to_owned(),
        kind: FenceKind::Agent("fence_apc".to_owned()),
        parameters: BTreeMap::from([("password".to_owned(), secret)]),
        targets: BTreeMap::from([(NodeId(2), target)]),
        from: None,
        action_limit_s: 60,
        verify_limit_s: 30,
        check_every_s: 3600,
        trust_exit_code: false,
    };
    state
        .apply(&FenceCommand::AddDevice(device).into())
        .unwrap();
    let observed = observed(Liveness::Alive, Phase::Running);
    let mut mine = report(None);
    mine.fencing.checks.insert("strip".to_owned(), None);
    let shown = status(&state, &observed, mine.clone());
    let strip = &shown.fencing.devices[0];
    assert_eq!(strip.parameters["password"], "(secret)");
    assert_eq!(strip.from, ["alfa", "beta"]);
    assert_eq!(strip.targets[0].plug.as_deref(), Some("7"));
    // beta did not report; here nobody looked yet.
    assert_eq!((strip.checks.len(), strip.checks[0].works), (1, None));
    assert_eq!(shown.fencing.nodes_without, ["alfa"]);
    let (health, problems) = judge(&shown);
    assert_eq!(health, Health::Degraded);
    assert!(
        problems[0].contains("node alfa has no fence device"),
        "{problems:?}"
    );

    let broken = crate::fencing::LocalCheck {
        trouble: Some("no route to host".to_owned()),
        since_unix_ms: 5,
        at_unix_ms: 9,
    };
    mine.fencing.checks.insert("strip".to_owned(), Some(broken));
    let doing = ("asks strip whether beta is off".to_owned(), 7);
    mine.fencing.attempts.insert(NodeId(2), doing);
    let shown = status(&state, &observed, mine);
    assert_eq!(shown.fencing.devices[0].checks[0].works, Some(false));
    let (_, problems) = judge(&shown);
    let text = problems.join(" | ");
    assert!(
        text.contains("strip would not work from alfa: no route to host"),
        "{text}"
    );
    assert!(
        text.contains("node beta is being fenced: alfa asks strip"),
        "{text}"
    );
    assert!(!serde_json::to_string(&shown).unwrap().contains("sesame"));
}
