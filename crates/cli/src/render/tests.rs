//! Fixed answers and the text that they make.

use relevo_server::{
    api::{Event, Status},
    saved::SavedFile,
};

use super::*;

const NOW: u64 = 1_700_000_100_000;

const DEGRADED: &str = r#"{
  "health": "degraded",
  "problems": ["replica of mail on beta is not in sync: a failure of alfa now would stop the volume"],
  "daemon": {"version": "0.1.0", "pid": 7, "started_unix_ms": 1700000000000, "state_dir": "/var/lib/relevo"},
  "cluster": {
    "id": "00", "name": "campus", "sensitivity": "normal", "revision": 42, "this_node": "alfa",
    "quorum": {"voters": 3, "alive": 2, "needed": 2, "leader": "alfa", "lease": {"held": true, "left_ms": 812}},
    "nodes": [
      {"name": "alfa", "id": "n1", "kind": "data", "state": "alive", "reason": null, "since_unix_ms": null,
       "voter": true, "standby": false, "evicted": false,
       "paths": [{"name": "lan", "address": "10.0.0.1", "carries": "all", "up": null, "round_trip_us": null, "loss_percent": 0}]},
      {"name": "beta", "id": "n2", "kind": "data", "state": "alive", "reason": null, "since_unix_ms": 1700000090000,
       "voter": true, "standby": true, "evicted": false,
       "paths": [{"name": "lan", "address": "10.0.0.2", "carries": "all", "up": true, "round_trip_us": 312, "jitter_us": 45, "loss_percent": 3},
                 {"name": "repl", "address": "10.9.0.2", "carries": "all", "up": false, "round_trip_us": null, "loss_percent": 100},
                 {"name": "ser", "address": "serial:/dev/ttyS0:9600", "carries": "heartbeats", "up": true, "round_trip_us": 210000, "loss_percent": 0},
                 {"name": "usb", "address": "serial:/dev/ttyUSB0:9600", "carries": "heartbeats", "up": false, "loss_percent": 100, "unusable": "there is no such device"}]},
      {"name": "wit", "id": "n3", "kind": "witness", "state": "dead", "reason": "silent on lan for 1.0 s",
       "since_unix_ms": 1700000095000, "voter": true, "standby": false, "evicted": true, "paths": []}
    ],
    "volumes": [
      {"name": "mail", "id": "v1", "size": 21474836480, "epoch": 5, "primary": "alfa", "in_sync": ["alfa"],
       "replicas": [
         {"node": "alfa", "role": "Primary", "disk": "UpToDate", "replication": null, "dirty_bytes": null,
          "sync_percent": null, "driver": "io_uring, direct", "backing": "/var/lib/relevo/pool/mail", "remark": null},
         {"node": "beta", "role": "Secondary", "disk": "Inconsistent", "replication": "SyncSource",
          "dirty_bytes": 1572864, "sync_percent": 40, "sync_bytes_per_s": 524288, "sync_same_bytes": 1048576, "sync_limit_bytes_per_s": 4194304, "sync_left_s": 3, "driver": null, "backing": null,
          "remark": "superblock slot 0 is damaged, slot 1 was used"}],
       "device": "/dev/relevo/mail", "nbd": "/var/lib/relevo/nbd/mail.sock",
       "wait": {"what": "3 writes", "why": "beta must leave the in-sync set first", "since_unix_ms": 1700000099700,
                "next": "the control log commits it"}}
    ],
    "services": [
      {"name": "mail", "id": "s1", "enabled": true, "state": "running", "node": "alfa", "target": "beta",
       "parts": [{"part": "mount /srv/mail", "state": "active", "detail": null},
                 {"part": "process /usr/sbin/maild", "state": "failed", "detail": "exit status 1"}],
       "failures": [{"node": "beta", "count": 1, "reason": "mount failed"}],
       "wait": {"what": "the move to beta", "why": "beta is in standby", "since_unix_ms": null, "next": null}},
      {"name": "web", "id": "s2", "enabled": false, "state": "stopped", "node": null, "target": null,
       "parts": [], "failures": [], "wait": null}
    ],
    "waits": []
  }
}"#;

#[test]
fn a_degraded_cluster() {
    let answer: Status = serde_json::from_str(DEGRADED).unwrap();
    let expected = "\
Cluster campus: DEGRADED. This is node alfa, relevo 0.1.0, up for 1 min 40 s.
  ! replica of mail on beta is not in sync: a failure of alfa now would stop the volume
Quorum: 2 of 3 votes alive, 2 needed: a majority; alfa leads the control log; this node's lease holds (812 ms left).
Sensitivity normal: a machine that is silent on all paths for 1.0 s is dead.

Nodes
  alfa  alive (this node)
        path lan  10.0.0.1
  beta  alive for 10 s - standby: services leave it
        path lan   10.0.0.2                  up, round trip 0.31 ms, jitter 0.04 ms, 3 % of heartbeats lost
        path repl  10.9.0.2                  DOWN: no heartbeats arrive
        path ser   serial:/dev/ttyS0:9600    up, round trip 210.00 ms, heartbeats only
        path usb   serial:/dev/ttyUSB0:9600  UNUSABLE: there is no such device
  wit   dead for 5.0 s (witness) - evicted: what it held was taken from it
        silent on lan for 1.0 s

Volumes
  mail  20 GiB, primary on alfa, in sync: alfa (epoch 5)
    alfa  Primary   UpToDate (io_uring, direct) /var/lib/relevo/pool/mail
    beta  Secondary Inconsistent SyncSource lacks 1.5 MiB 40 % done at 512 KiB/s (held to 4 MiB/s) 1 MiB were the same 3.0 s left
          superblock slot 0 is damaged, slot 1 was used
    device /dev/relevo/mail
    nbd    /var/lib/relevo/nbd/mail.sock
    waits: 3 writes: beta must leave the in-sync set first (for 0.3 s)
      next: the control log commits it

Services
  mail  running on alfa, asked to be on beta
    mount /srv/mail          active
    process /usr/sbin/maild  failed  exit status 1
    beta gave it up once: mount failed; `relevo service start mail` tries it there again
    waits: the move to beta: beta is in standby
  web  stopped
";
    assert_eq!(status(&answer, NOW), expected);
}

#[test]
fn no_cluster() {
    let answer: Status = serde_json::from_str(
        r#"{"health": "down", "problems": [], "cluster": null,
            "daemon": {"version": "0.1.0", "pid": 7, "started_unix_ms": 0, "state_dir": "/x"}}"#,
    )
    .unwrap();
    assert!(status(&answer, NOW).contains("`relevo init --name NAME`"));
}

#[test]
fn no_majority_and_no_lease() {
    let mut answer: Status = serde_json::from_str(DEGRADED).unwrap();
    let cluster = answer.cluster.as_mut().unwrap();
    cluster.quorum.alive = 1;
    cluster.quorum.leader = None;
    cluster.quorum.lease.held = false;
    let text = status(&answer, NOW);
    assert!(
        text.contains("1 of 3 votes alive, 2 needed: NO majority"),
        "{text}"
    );
    assert!(text.contains("no leader of the control log"), "{text}");
    assert!(text.contains("NO lease"), "{text}");
}

#[test]
fn lists() {
    let answer: Status = serde_json::from_str(DEGRADED).unwrap();
    let cluster = answer.cluster.unwrap();
    let expected = "\
NAME  SIZE    PRIMARY  IN SYNC  REPLICAS   DEVICE
mail  20 GiB  alfa     alfa     alfa beta  /dev/relevo/mail
";
    assert_eq!(volume_list(&cluster.volumes), expected);
    let expected = "\
NAME  STATE    NODE  PARTS
mail  running  alfa  mount /srv/mail, process /usr/sbin/maild
web   stopped  -
";
    assert_eq!(service_list(&cluster.services), expected);
    assert!(volume_list(&[]).contains("volume create"));
    assert!(service_list(&[]).contains("service create"));
}

#[test]
fn an_event() {
    let event: Event = serde_json::from_str(
        r#"{"number": 3, "unix_ms": 1700000000123, "node": "alfa", "kind": "node", "level": "warning",
            "subject": "beta", "text": "dead: silent on lan for 1.0 s"}"#,
    )
    .unwrap();
    assert_eq!(
        event_line(&event),
        "22:13:20.123 ! alfa        node beta         dead: silent on lan for 1.0 s"
    );
}

#[test]
fn lengths_of_time() {
    assert_eq!(duration_words(0), "0.0 s");
    assert_eq!(duration_words(9_990), "9.9 s");
    assert_eq!(duration_words(59_999), "59 s");
    assert_eq!(duration_words(60_000), "1 min");
    assert_eq!(duration_words(3_661_000), "1 h 1 min");
    assert_eq!(duration_words(90_000_000), "1 d 1 h");
}

const METADATA: &str = r#"{
  "volume": "mail", "backing": "/dev/sdb", "backing_bytes": 1073741824, "state": "attached",
  "superblocks": [
    {"slot": 0, "in_force": true, "generation": 8, "problem": null},
    {"slot": 1, "in_force": false, "generation": null, "problem": "its checksum is wrong"}],
  "superblock": {"generation": 8, "cluster": "00", "volume": "v1", "node": "n1", "slot": 0, "lineage": "l77",
    "epoch": 5, "data_bytes": 1048576, "clean": false, "certain": true, "inconsistent": false, "blank": false,
    "slots_used": [0, 1]},
  "activity_log": {"transaction": 17, "regions": [0, 7], "region_bytes": 1048576, "uncertain_bytes": 2097152,
    "valid": 18, "damaged": 1},
  "bitmaps": [
    {"slot": 0, "node": "alfa", "own": true, "dirty_blocks": 0, "dirty_bytes": 0, "runs": 0, "first_runs": [],
     "pages_written": 0, "pages_damaged": 0, "generation": 0},
    {"slot": 1, "node": null, "own": false, "dirty_blocks": 4, "dirty_bytes": 16384, "runs": 2,
     "first_runs": [[3, 1], [63, 3]], "pages_written": 2, "pages_damaged": 1, "generation": 4}],
  "problems": ["1 pages of bitmap 1 are damaged: all their blocks are taken for dirty"]
}"#;

#[test]
fn metadata_as_lines() {
    let dump = serde_json::from_str(METADATA).unwrap();
    assert_eq!(
        metadata(&dump),
        "mail: metadata on /dev/sdb (1 GiB), attached: the daemon's memory may be ahead of this\n\
        \x20 superblock 0  generation 8, in force\n\
        \x20 superblock 1  not usable: its checksum is wrong\n\
        \x20 replica       volume v1, node n1, slot 0, of cluster 00\n\
        \x20 data          1 MiB\n\
        \x20 lineage       l77\n\
        \x20 epoch         5\n\
        \x20 flags         certain\n\
        \x20 activity log  transaction 17, 2 regions of 1 MiB active: 0 7; the next attach takes 2 MiB for uncertain; 1 damaged blocks\n\
        \x20 bitmap 0      alfa, its own: nothing dirty\n\
        \x20 bitmap 1      16 KiB dirty, 4 blocks in 2 runs: 3 63-65; 1 of 2 written pages damaged\n\
        \x20 problem       1 pages of bitmap 1 are damaged: all their blocks are taken for dirty\n"
    );
}

#[test]
fn what_may_be_lost_and_what_was_saved() {
    let may_be_lost = LossStatus {
        volume: "mail".to_owned(),
        node: "beta".to_owned(),
        known: vec!["the disk of beta is Outdated".to_owned()],
        warnings: vec!["alfa is alive and complete".to_owned()],
    };
    assert_eq!(
        loss(&may_be_lost),
        "Volume mail: the replica on beta is kept.\n  - the disk of beta is Outdated\n  ! alfa is alive and complete\n"
    );
    assert!(saved_list(&[], NOW).contains("Nothing is saved"));
    let file = SavedFile {
        path: "/s/mail-x.saved".into(),
        volume: "mail".to_owned(),
        node: "alfa".to_owned(),
        gave_way_to: "beta".to_owned(),
        lineage: "00000000000000ff".to_owned(),
        begun_unix_s: NOW / 1000 - 90,
        volume_size: 1 << 20,
        blocks: 3,
        complete: true,
        trouble: None,
    };
    let damaged = SavedFile {
        volume: String::new(),
        begun_unix_s: 0,
        complete: false,
        trouble: Some("it is no file of saved blocks".to_owned()),
        ..file.clone()
    };
    let text = saved_list(&[file, damaged], NOW);
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[1],
        [
            "mail",
            "1",
            "min",
            "30",
            "s",
            "3",
            "beta",
            "complete",
            "/s/mail-x.saved"
        ]
    );
    assert_eq!(lines[2][..2], ["?", "?"]);
    assert!(text.contains("no file of saved blocks"), "{text}");
}

#[test]
fn fence_devices_and_history() {
    let devices = r#"[{"name": "bmc", "what": "fence_ipmilan", "parameters": {"ip": "10.0.0.12", "password": "(secret)"},
      "targets": [{"node": "beta", "plug": null, "level": 1, "delay_ms": 5000}], "from": ["alfa", "gamma"],
      "action_limit_s": 60, "verify_limit_s": 30, "check_every_s": 3600, "trust_exit_code": false,
      "checks": [{"node": "alfa", "works": true, "trouble": null, "since_unix_ms": 1700000000000, "at_unix_ms": 1700000090000},
                 {"node": "gamma", "works": false, "trouble": "no route to host", "since_unix_ms": 1700000095000, "at_unix_ms": 1700000095000}]}]"#;
    let devices: Vec<relevo_server::api::FenceDeviceStatus> =
        serde_json::from_str(devices).unwrap();
    let list = fence_devices(&devices);
    assert!(
        list.contains("bmc") && list.contains("NOT from gamma"),
        "{list}"
    );
    let expected = "\
Fence device bmc: fence_ipmilan
  switches off beta, level 1, after a delay of 5.0 s
  used from alfa, gamma
  an action may take 60 s, the power may be on 30 s after off, checked every 3600 s
  ip = 10.0.0.12
  password = (secret)
  from alfa: would work for 1 min 40 s (checked 10 s ago)
  from gamma: would NOT work for 5.0 s (checked 5.0 s ago): no route to host
";
    assert_eq!(fence_device(&devices[0], NOW), expected);
    let history = r#"[{"node": "beta", "by": "alfa", "asked": "root on alfa", "action": "reboot",
      "begun_unix_ms": 1700000090000, "ended_unix_ms": 1700000095000, "proved": true, "proved_unix_ms": 1700000092500,
      "generation": 3, "how": ["bmc switched it off and said so when asked (level 1)"],
      "remarks": ["beta was not switched on again"]},
     {"node": "beta", "by": "alfa", "asked": "root on alfa", "action": "off", "begun_unix_ms": 1700000096000,
      "ended_unix_ms": 1700000097000, "proved": false, "proved_unix_ms": null, "generation": null,
      "how": ["bmc: off failed: it ended with code 1"], "remarks": []}]"#;
    let history: Vec<relevo_server::api::FenceHistoryEntry> =
        serde_json::from_str(history).unwrap();
    let expected = "\
10 s ago: beta (reboot) by alfa, asked by root on alfa: was off after 2.5 s
    bmc switched it off and said so when asked (level 1)
  ! beta was not switched on again
4.0 s ago: beta (off) by alfa, asked by root on alfa: NOT fenced after 1.0 s
    bmc: off failed: it ended with code 1
";
    assert_eq!(fence_history(&history, NOW), expected);
    assert!(fence_history(&[], NOW).contains("No node was fenced"));
    assert!(fence_devices(&[]).contains("no fence devices"));
}
