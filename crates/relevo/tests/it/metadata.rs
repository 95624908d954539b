//! `dump-md`: the metadata of a replica while it is up, while it is down, and without a daemon.

use std::{fs::File, os::unix::fs::FileExt as _, path::PathBuf, time::Duration};

use serde_json::Value;

use crate::daemons::{Daemon, Site, eventually};

fn dump(node: &Daemon) -> Value {
    serde_json::from_str(&node.ok(&["dump-md", "mail", "--json"])).unwrap()
}

fn backing(node: &Daemon) -> PathBuf {
    let pool = node.state_dir().join("pool");
    let mut files = std::fs::read_dir(pool).unwrap();
    files.next().unwrap().unwrap().path()
}

#[test]
fn metadata_is_dumped_up_down_and_without_a_daemon() {
    let site = Site::new();
    let [mut alfa, beta, wit] = site.cluster();
    alfa.ok(&["volume", "create", "mail", "--size", "300MiB"]);
    alfa.ok(&["primary", "mail"]);

    // Up.
    let text = alfa.ok(&["dump-md", "mail"]);
    assert!(text.contains("mail: metadata on"), "{text}");
    assert!(text.contains("attached"), "{text}");
    assert!(text.contains("alfa, its own"), "{text}");
    let up = dump(&alfa);
    assert_eq!(up["state"], "attached");
    assert_eq!(up["problems"], serde_json::json!([]));
    assert_eq!(up["superblock"]["data_bytes"], 300 << 20);
    assert!(up["superblock"]["epoch"].as_u64().unwrap() > 0, "{up:#}");
    let err = wit.refused(&["dump-md", "mail"]);
    assert!(err.contains("no replica"), "{err}");
    let err = alfa.refused(&["dump-md", "post"]);
    assert!(err.contains("`post`"), "{err}");

    // Down, with a daemon.
    beta.ok(&["down", "mail"]);
    let down = dump(&beta);
    assert_eq!(down["state"], "detached");
    assert_eq!(down["superblock"]["clean"], true);
    assert_eq!(down["superblock"]["lineage"], up["superblock"]["lineage"]);
    assert_eq!(down["activity_log"]["regions"], serde_json::json!([]));
    beta.ok(&["up", "mail"]);
    eventually(Duration::from_secs(20), "both replicas are in sync", || {
        alfa.find("volumes", "mail")["in_sync"] == serde_json::json!(["alfa", "beta"])
    });

    // Without a daemon: the primary was killed.
    alfa.kill();
    let dead = dump(&alfa);
    assert_eq!(dead["state"], "no daemon");
    assert_eq!(dead["superblock"]["lineage"], up["superblock"]["lineage"]);

    // A damaged slot is described, and the other one is in force.
    let in_force = dead["superblocks"]
        .as_array()
        .unwrap()
        .iter()
        .position(|slot| slot["in_force"] == true)
        .unwrap();
    let path = backing(&alfa);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let end = file.metadata().unwrap().len() / 4096 * 4096;
    let slot = end - 8192 + 4096 * u64::try_from(in_force).unwrap();
    file.write_all_at(b"damage", slot + 90).unwrap();
    let text = alfa.ok(&["dump-md", "mail"]);
    let line = format!("superblock {in_force}  not usable: its checksum is wrong");
    assert!(text.contains(&line), "{text}");
    assert!(text.contains("in force"), "{text}");
    file.write_all_at(&[7; 8192], end - 8192).unwrap();
    let text = alfa.ok(&["dump-md", "mail"]);
    assert!(
        text.contains("problem       no superblock is usable"),
        "{text}"
    );
    std::fs::remove_file(&path).unwrap();
    let err = alfa.refused(&["dump-md", "mail"]);
    assert!(err.contains("can't be read"), "{err}");
}
