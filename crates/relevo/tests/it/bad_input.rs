//! Wrong input: each gets an error that says what, why and what to do, and nothing is lost.

use std::{net::TcpListener, time::Duration};

use crate::daemons::{Answer, Site, eventually, relevo};

fn one_node(site: &Site, name: &str, cluster: &str) -> crate::daemons::Daemon {
    let daemon = site.daemon(name);
    daemon.init(cluster);
    daemon
}

#[test]
fn no_daemon() {
    let site = Site::new();
    let dir = site.path().join("none");
    let output = relevo()
        .args(["init", "--name", "x", "--state-dir"])
        .arg(&dir)
        .output()
        .unwrap();
    let answer = Answer::from(output);
    assert_eq!(answer.code, 2);
    assert!(
        answer.err.contains("relevo daemon --state-dir"),
        "{}",
        answer.err
    );
}

#[test]
fn no_cluster() {
    let site = Site::new();
    let alfa = site.daemon("alfa");
    assert_eq!(alfa.run(&["status"]).code, 2);
    let err = alfa.refused(&["volume", "create", "mail", "--size", "16MiB"]);
    assert!(err.contains("belongs to no cluster"), "{err}");
    assert!(err.contains("relevo init"), "{err}");
}

#[test]
fn tokens() {
    let site = Site::new();
    let alfa = one_node(&site, "alfa", "campus");
    let other = one_node(&site, "other", "elsewhere");
    let beta = site.daemon("beta");
    let ports = beta.ports().to_string();

    let err = beta.refused(&beta.join_args("relevo-nonsense", &ports));
    assert!(err.contains("token"), "{err}");

    let expired = alfa.token(&["--valid", "0s"]);
    let err = beta.refused(&beta.join_args(&expired, &ports));
    assert!(err.contains("expired"), "{err}");
    assert!(err.contains("relevo token"), "{err}");

    let for_witness = alfa.token(&["--witness"]);
    let err = beta.refused(&beta.join_args(&for_witness, &ports));
    assert!(err.contains("witness"), "{err}");

    let token = alfa.token(&[]);
    beta.join(&token, &[]);
    let gamma = site.daemon("gamma");
    let ports = gamma.ports().to_string();
    let err = gamma.refused(&gamma.join_args(&token, &ports));
    assert!(err.contains("used already"), "{err}");

    // A machine that is in a cluster stays in it.
    let foreign = other.token(&[]);
    let err = beta.refused(&beta.join_args(&foreign, &ports));
    assert!(err.contains("belongs to the cluster `campus`"), "{err}");
    let err = beta.refused(&["init", "--name", "second"]);
    assert!(err.contains("belongs to the cluster `campus`"), "{err}");

    // The name of a node is taken.
    let token = alfa.token(&[]);
    let err = gamma.refused(&[
        "join",
        &token,
        "--node",
        "beta",
        "--path",
        "lan=127.0.0.1",
        "--ports",
        &ports,
    ]);
    assert!(err.contains("named `beta` exists"), "{err}");
}

/// A token whose addresses now belong to another cluster.
#[test]
fn a_token_of_another_cluster() {
    let site = Site::new();
    let alfa = one_node(&site, "alfa", "campus");
    let stale = alfa.token(&[]);
    let ports = alfa.ports().to_string();
    drop(alfa);
    let other = site.daemon("other");
    other.ok(&[
        "init",
        "--name",
        "elsewhere",
        "--node",
        "other",
        "--path",
        "lan=127.0.0.1",
        "--ports",
        &ports,
    ]);
    let beta = site.daemon("beta");
    let ports = beta.ports().to_string();
    let err = beta.refused(&beta.join_args(&stale, &ports));
    assert!(err.contains("another cluster"), "{err}");
}

#[test]
fn nobody_at_the_addresses_of_a_token() {
    let site = Site::new();
    let alfa = one_node(&site, "alfa", "campus");
    let token = alfa.token(&[]);
    drop(alfa);
    let beta = site.daemon("beta");
    let ports = beta.ports().to_string();
    let err = beta.refused(&beta.join_args(&token, &ports));
    assert!(err.contains("127.0.0.1"), "{err}");
    // Nothing stays behind: it can still start a cluster of its own.
    beta.init("own");
}

#[test]
fn names_and_sizes() {
    let site = Site::new();
    let alfa = one_node(&site, "alfa", "campus");
    alfa.ok(&["volume", "create", "mail", "--size", "16MiB"]);

    let err = alfa.refused(&["volume", "create", "mail", "--size", "16MiB"]);
    assert!(err.contains("named `mail` exists already"), "{err}");
    assert!(err.contains("another name"), "{err}");
    let err = alfa.refused(&["volume", "create", "a/b", "--size", "16MiB"]);
    assert!(err.contains("`a/b` is no name"), "{err}");
    let err = alfa.refused(&["volume", "create", "zero", "--size", "0"]);
    assert!(err.contains("size is 0"), "{err}");
    let err = alfa.refused(&["volume", "create", "odd", "--size", "5000"]);
    assert!(err.contains("--size 8192"), "{err}");
    let err = alfa.refused(&["volume", "create", "huge", "--size", "4000TiB"]);
    assert!(err.contains("node alfa"), "{err}");
    assert!(err.contains("taken back"), "{err}");
    let answer = alfa.run(&["volume", "create", "word", "--size", "big"]);
    assert_eq!(answer.code, 2);
    assert!(answer.err.contains("20GiB"), "{}", answer.err);
    // What was refused left nothing.
    let out = alfa.ok(&["volume", "list"]);
    assert_eq!(out.lines().count(), 2, "{out}");
    assert_eq!(
        std::fs::read_dir(alfa.state_dir().join("pool"))
            .unwrap()
            .count(),
        1
    );

    let err = alfa.refused(&["volume", "create", "x", "--size", "16MiB", "--on", "nobody"]);
    assert!(err.contains("no node `nobody`"), "{err}");
    assert!(err.contains("alfa"), "{err}");
    let err = alfa.refused(&["volume", "remove", "nothing"]);
    assert!(err.contains("no volume `nothing`"), "{err}");
    let err = alfa.refused(&["service", "stop", "nothing"]);
    assert!(err.contains("no service `nothing`"), "{err}");
}

#[test]
fn foreign_data_is_kept() {
    let site = Site::new();
    let alfa = one_node(&site, "alfa", "campus");
    let file = site.path().join("precious");
    // A file system's magic number where it belongs (ext4: 0xEF53 at byte 1080).
    let mut content = vec![0u8; 16 << 20];
    content[1080..1082].copy_from_slice(&[0x53, 0xef]);
    std::fs::write(&file, &content).unwrap();
    let replica = format!("alfa={}", file.display());
    let args = ["volume", "create", "x", "--size", "8MiB", "--on", &replica];
    let err = alfa.refused(&args);
    assert!(err.contains("--force"), "{err}");
    assert!(
        std::fs::read(&file).unwrap() == content,
        "the file was changed"
    );
    alfa.ok(&[&args[..], &["--force"]].concat());
}

#[test]
fn a_backing_of_another_cluster_is_kept() {
    let site = Site::new();
    let mut other = one_node(&site, "other", "elsewhere");
    other.ok(&["volume", "create", "theirs", "--size", "8MiB"]);
    assert_eq!(other.terminate(Duration::from_secs(10)), Some(0));
    let file = only_file(&other.state_dir().join("pool"));
    let content = std::fs::read(&file).unwrap();

    let mut alfa = one_node(&site, "alfa", "campus");
    let replica = format!("alfa={}", file.display());
    let args = ["volume", "create", "x", "--size", "8MiB", "--on", &replica];
    let err = alfa.refused(&args);
    assert!(err.contains("of cluster"), "{err}");
    assert!(err.contains("--force"), "{err}");

    // Nor is it taken when it stands where this cluster's own replica was.
    alfa.ok(&["volume", "create", "ours", "--size", "8MiB"]);
    assert_eq!(alfa.terminate(Duration::from_secs(10)), Some(0));
    let own = only_file(&alfa.state_dir().join("pool"));
    std::fs::write(&own, &content).unwrap();
    alfa.start();
    let mut replica = serde_json::Value::Null;
    eventually(Duration::from_secs(10), "the replica is refused", || {
        replica = alfa.find("volumes", "ours")["replicas"][0].clone();
        replica["disk"] == "Failed" && replica["remark"].is_string()
    });
    let remark = replica["remark"].as_str().unwrap();
    assert!(remark.contains("belongs to volume"), "{remark}");
    for kept in [&file, &own] {
        assert!(
            std::fs::read(kept).unwrap() == content,
            "{} was changed",
            kept.display()
        );
    }
}

#[test]
fn service_files() {
    let site = Site::new();
    let alfa = one_node(&site, "alfa", "campus");
    let file = site.path().join("web.toml");
    let create = |text: &str| {
        std::fs::write(&file, text).unwrap();
        alfa.run(&["service", "create", "--file", file.to_str().unwrap()])
    };
    let answer = create("name = \"web\"\nports = 80\nparts = []\n");
    assert_eq!(answer.code, 1);
    assert!(
        answer.err.contains("unknown field `ports`"),
        "{}",
        answer.err
    );
    assert!(answer.err.contains("web.toml:2:1"), "{}", answer.err);
    assert!(answer.err.contains("^^^^^"), "{}", answer.err);
    let answer = create("name = 7\nparts = []\n");
    assert!(answer.err.contains("web.toml:1:8"), "{}", answer.err);
    assert!(answer.err.contains("expected a string"), "{}", answer.err);
    let answer = create("name = \"web\"\nparts = []\n");
    assert!(answer.err.contains("no parts"), "{}", answer.err);
    let answer =
        create("name = \"web\"\n[[parts]]\nprocess = { command = [\"/bin/sleep\", \"1000\"] }\n");
    assert_eq!(answer.code, 0, "{}", answer.err);
    let err = alfa.refused(&["service", "create", "web", "--exec", "/bin/true"]);
    assert!(err.contains("named `web` exists already"), "{err}");
    let err = alfa.refused(&["service", "create", "w2", "--volume", "nothing"]);
    assert!(err.contains("no volume `nothing`"), "{err}");
    let err = alfa.refused(&["service", "create", "w3", "--ip", "10.0.0.1"]);
    assert!(err.contains("192.168.1.1/24"), "{err}");
    let err = alfa.refused(&["service", "create", "w4", "--exec", "/nonexistent/program"]);
    assert!(err.contains("/nonexistent/program"), "{err}");
}

#[test]
fn a_port_in_use() {
    let site = Site::new();
    let alfa = site.daemon("alfa");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let text = port.to_string();
    let args = [
        "init",
        "--name",
        "c",
        "--node",
        "alfa",
        "--path",
        "lan=127.0.0.1",
        "--ports",
    ];
    let err = alfa.refused(&[&args[..], &[&text]].concat());
    assert!(err.contains(&text), "{err}");
    assert!(err.contains("--ports"), "{err}");
    // Nothing stays behind.
    alfa.init("c");
}

#[test]
fn an_address_of_another_machine() {
    let site = Site::new();
    let alfa = site.daemon("alfa");
    let err = alfa.refused(&[
        "init",
        "--name",
        "c",
        "--node",
        "alfa",
        "--path",
        "lan=192.0.2.7",
    ]);
    assert!(err.contains("192.0.2.7"), "{err}");
    assert!(err.contains("--path"), "{err}");
    let err = alfa.refused(&[
        "init",
        "--name",
        "a b",
        "--node",
        "alfa",
        "--path",
        "lan=127.0.0.1",
    ]);
    assert!(err.contains("`a b` is no name"), "{err}");
}

#[test]
fn a_state_directory_in_use() {
    let site = Site::new();
    let alfa = site.daemon("alfa");
    let output = relevo()
        .args(["daemon", "--state-dir"])
        .arg(alfa.state_dir())
        .output()
        .unwrap();
    let answer = Answer::from(output);
    assert_eq!(answer.code, 1);
    assert!(
        answer.err.contains(&alfa.pid().to_string()),
        "{}",
        answer.err
    );
    assert!(answer.err.contains("--state-dir"), "{}", answer.err);
    alfa.run(&["status"]);
}

/// Flips bits in superblock slots of a replica: the last two blocks of its backing.
fn damage(backing: &std::path::Path, slots: std::ops::Range<u64>) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(backing)
        .unwrap();
    let first = file.metadata().unwrap().len() - 2 * 4096;
    for slot in slots {
        let at = first + slot * 4096 + 40;
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        file.write_all_at(&bytes.map(|byte| !byte), at).unwrap();
    }
}

fn only_file(directory: &std::path::Path) -> std::path::PathBuf {
    let mut files = std::fs::read_dir(directory).unwrap();
    let file = files.next().unwrap().unwrap().path();
    assert!(files.next().is_none());
    file
}

#[test]
fn a_damaged_metadata_slot() {
    let site = Site::new();
    for slot in 0..2 {
        let mut alfa = one_node(&site, &format!("alfa{slot}"), "campus");
        alfa.ok(&["volume", "create", "mail", "--size", "16MiB"]);
        assert_eq!(alfa.terminate(Duration::from_secs(10)), Some(0));
        damage(&only_file(&alfa.state_dir().join("pool")), slot..slot + 1);
        alfa.start();
        eventually(Duration::from_secs(10), "the damage is told", || {
            alfa.ok(&["events"]).contains("superblock")
        });
        alfa.ok(&["primary", "mail"]);
    }
}

#[test]
fn damaged_metadata() {
    let site = Site::new();
    let mut alfa = one_node(&site, "alfa", "campus");
    alfa.ok(&["volume", "create", "mail", "--size", "16MiB"]);
    let backing = only_file(&alfa.state_dir().join("pool"));
    alfa.ok(&["volume", "create", "web", "--size", "16MiB"]);
    assert_eq!(alfa.terminate(Duration::from_secs(10)), Some(0));
    damage(&backing, 0..2);
    let damaged = std::fs::read(&backing).unwrap();
    alfa.start();
    let mut replica = serde_json::Value::Null;
    eventually(Duration::from_secs(10), "the replica is refused", || {
        replica = alfa.find("volumes", "mail")["replicas"][0].clone();
        replica["disk"] == "Failed" && replica["remark"].is_string()
    });
    let remark = replica["remark"].as_str().unwrap();
    assert!(remark.contains("superblock"), "{remark}");
    // The node lives, and the other volume works.
    alfa.ok(&["primary", "web"]);
    assert!(
        std::fs::read(&backing).unwrap() == damaged,
        "the backing was changed"
    );
}
