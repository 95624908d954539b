//! Services move, fail, are stopped; replicas are made and removed.

use relevo_node::{OrderId, Phase};
use relevo_replication::io::{DiskState, VolumeEvent};
use relevo_types::cluster::Command;

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
         /bin/serve did not start: no space left); fix it and run `relevo service start mail`"
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
