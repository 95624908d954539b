//! Services move, fail, are stopped; replicas are made and removed.

use relevo_node::{OrderId, Phase};
use relevo_replication::io::{DiskState, VolumeEvent};
use relevo_types::cluster::{Command, VolumeChange};

use crate::cluster::{A, B, Cluster, MAIL, V, W};

#[test]
fn a_planned_move_stops_in_order_and_starts_in_order() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.command(&Command::SetTarget {
        service: MAIL,
        target: Some(B),
    });
    let took = cluster.run_until(1000, |cluster| cluster.serves(B));
    assert_eq!(
        cluster.words(A, from),
        [
            "stop address",
            "stop process",
            "stop export",
            "demote",
            "commit demote n1",
            "commit release n1",
        ]
    );
    assert_eq!(
        cluster.words(B, from),
        [
            "commit promote n2",
            "start export",
            "start process",
            "start address"
        ]
    );
    assert!(took < 100, "{took} ms");
}

#[test]
fn a_part_that_fails_moves_the_service() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    // The last start order was the address's, the one before the process's.
    let orders = cluster.trace.iter().filter(|(_, node, words)| {
        *node == A && (words.starts_with("start") || words.starts_with("force"))
    });
    let process = OrderId(orders.count() as u64 - 1);
    cluster.part_fails(A, process, "it ended 5 times in 60 s");
    cluster.run_until(1000, |cluster| cluster.serves(B));
    let words = cluster.words(A, from);
    assert_eq!(words[..3], ["stop address", "stop process", "stop export"]);
    let failure = &cluster.state.services[&MAIL].failures[&A];
    assert_eq!(
        failure.reason,
        "process /bin/serve failed: it ended 5 times in 60 s"
    );
}

#[test]
fn what_failed_on_both_waits_for_a_person() {
    let mut cluster = Cluster::running();
    for node in [A, B] {
        cluster
            .start_fails
            .insert((node, 1), "no space left".to_owned());
    }
    cluster.command(&Command::SetTarget {
        service: MAIL,
        target: Some(B),
    });
    cluster.run(2000);
    assert_eq!(cluster.state.services[&MAIL].holder, None);
    assert_eq!(cluster.state.volumes[&V].primary, None);
    let waits = cluster.node(W).status().waits;
    assert_eq!(
        waits[0].reason,
        "mail: failed on a (process /bin/serve did not start: no space left) and b (process \
         /bin/serve did not start: no space left); fix it and run `relevo service start mail`; a node \
         tries again by itself 10 min after it failed"
    );
    let quiet = cluster.trace.len();
    cluster.run(5000);
    assert_eq!(
        cluster.trace.len(),
        quiet,
        "nothing is tried again and again"
    );
    cluster.start_fails.clear();
    cluster.command(&Command::EnableService {
        service: MAIL,
        enabled: true,
    });
    cluster.run_until(1000, |cluster| cluster.serves(A) || cluster.serves(B));
}

#[test]
fn a_part_that_resists_is_forced() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.stop_resists.insert((A, 1));
    cluster.command(&Command::EnableService {
        service: MAIL,
        enabled: false,
    });
    cluster.run(500);
    assert_eq!(
        cluster.words(A, from)[..4],
        [
            "stop address",
            "stop process",
            "force process",
            "stop export"
        ]
    );
    assert_eq!(cluster.state.services[&MAIL].holder, None);
    assert_eq!(cluster.state.volumes[&V].primary, None);
}

#[test]
fn a_disk_that_fails_under_the_service_moves_it() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.engine_event(
        A,
        |status| {
            status.open = false;
            status.disk = DiskState::Failed;
        },
        VolumeEvent::DiskFailed {
            reason: "a flush failed: replace the disk".to_owned(),
        },
    );
    cluster.run_until(1000, |cluster| cluster.serves(B));
    assert_eq!(
        cluster.words(A, from),
        [
            "force address",
            "force process",
            "force export",
            "commit demote n1",
            "commit release n1: volume `mail` closed: a flush failed: replace the disk",
        ]
    );
    cluster.run(2000);
    assert!(cluster.serves(B));
}

/// The set shrinks to A alone.
fn last_one_in_sync() -> Cluster {
    let mut cluster = Cluster::running();
    let expect = cluster.state.volumes[&V].epoch;
    let change = VolumeChange::Leave { nodes: vec![B] };
    drop(cluster.command(&Command::Volume {
        volume: V,
        expect,
        change,
    }));
    cluster.run(200);
    assert!(cluster.serves(A));
    cluster
}

fn disk_fails(cluster: &mut Cluster, held: bool) {
    cluster.engine_event(
        A,
        |status| {
            status.open = false;
            status.held = held;
            status.disk = DiskState::Failed;
        },
        VolumeEvent::DiskFailed {
            reason: "a write failed".to_owned(),
        },
    );
}

/// Nobody else has the data, and requests shall wait for it: the service waits with them, neither stopped
/// nor given up, and its status says for what. When the disk is back it starts anew by itself, for its
/// connections ended.
#[test]
fn a_service_waits_with_requests_that_wait_for_their_disk() {
    let mut cluster = last_one_in_sync();
    let from = cluster.now;
    disk_fails(&mut cluster, true);
    cluster.run(90_000);
    assert_eq!(cluster.words(A, from), [""; 0], "nothing is done");
    assert_eq!(cluster.state.services[&MAIL].holder, Some(A));
    let waiting = cluster.node(A).status().services[&MAIL].waiting.clone();
    let waiting = waiting.unwrap();
    assert!(waiting.contains("waits for accessible data"), "{waiting}");
    assert!(waiting.contains("relevo attach mail"), "{waiting}");

    cluster.engine_event(
        A,
        |status| {
            status.held = false;
            status.disk = DiskState::Diskless;
        },
        VolumeEvent::Detached,
    );
    cluster.run(200);
    let epoch = cluster.state.volumes[&V].epoch;
    cluster.engine_event(
        A,
        |status| {
            status.disk = DiskState::UpToDate;
            status.open = true;
        },
        VolumeEvent::Opened { epoch },
    );
    cluster.run_until(1000, |cluster| cluster.serves(A));
    let words = cluster.words(A, from);
    assert_eq!(
        words[..3],
        ["force address", "force process", "force export"]
    );
    assert_eq!(
        words[3..],
        ["start export", "start process", "start address"]
    );
    assert!(cluster.state.services[&MAIL].failures.is_empty());
}

/// It was chosen that requests fail: the service is given up. The disk is repaired and attached, which
/// proves that the cause is gone: nobody has to start the service.
#[test]
fn the_last_disk_is_repaired_and_the_service_starts_by_itself() {
    let mut cluster = last_one_in_sync();
    disk_fails(&mut cluster, false);
    cluster.run(2000);
    assert_eq!(cluster.state.services[&MAIL].holder, None);
    assert_eq!(cluster.state.services[&MAIL].failures[&A].disk, Some(V));
    let waits = cluster.node(W).status().waits;
    assert!(waits[0].reason.contains("relevo attach mail"), "{waits:?}");
    let quiet = cluster.trace.len();
    cluster.run(5000);
    assert_eq!(cluster.trace.len(), quiet, "nothing is tried in vain");

    cluster.engine_event(
        A,
        |status| status.disk = DiskState::UpToDate,
        VolumeEvent::Attached {
            clean: false,
            remark: None,
        },
    );
    cluster.run_until(1000, |cluster| cluster.serves(A));
    assert!(cluster.state.services[&MAIL].failures.is_empty());
}

#[test]
fn standby_empties_a_node() {
    let mut cluster = Cluster::running();
    cluster.command(&Command::SetStandby {
        node: A,
        standby: true,
    });
    cluster.run_until(1000, |cluster| cluster.serves(B));
    cluster.command(&Command::SetStandby {
        node: A,
        standby: false,
    });
    cluster.run(1000);
    assert!(cluster.serves(B));
}

#[test]
fn a_volume_that_does_not_open_says_so() {
    let mut cluster = Cluster::running();
    cluster.command(&Command::EnableService {
        service: MAIL,
        enabled: false,
    });
    cluster.run(500);
    cluster.kill(B);
    cluster.run(1500);
    cluster.cut.insert(W);
    cluster.state.services.get_mut(&MAIL).unwrap().enabled = true;
    cluster.state.services.get_mut(&MAIL).unwrap().holder = Some(A);
    cluster.command(&Command::SetTarget {
        service: MAIL,
        target: Some(A),
    });
    cluster.run(1000);
    let status = &cluster.node(A).status().services[&MAIL];
    assert_eq!(status.phase, Phase::Starting);
    let waiting = status.waiting.clone().unwrap();
    assert!(waiting.contains("make this node primary"), "{waiting}");
}

#[test]
fn replicas_are_made_once_and_removed_with_their_volume() {
    let mut cluster = Cluster::running();
    let made = |cluster: &Cluster, words: &str| {
        let all = cluster.trace.iter().filter(|(_, _, w)| w == words);
        all.count()
    };
    assert_eq!(made(&cluster, "create replica"), 2);
    cluster.command(&Command::EnableService {
        service: MAIL,
        enabled: false,
    });
    cluster.run(500);
    cluster.kill(B);
    cluster.run(100);
    cluster.command(&Command::RemoveService { service: MAIL });
    cluster.command(&Command::RemoveVolume { volume: V });
    cluster.run(100);
    assert_eq!(made(&cluster, "remove replica"), 1);
    assert!(cluster.state.volumes.is_empty());
}
