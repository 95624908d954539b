//! The main job, as a user runs it: real daemons on this kernel, plugs pulled, nothing lost.
//!
//! The demo counts and compares by itself; these tests run it in every surrounding, believe its
//! JSON only where its exit code agrees, and check that it leaves nothing behind.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, SystemTime},
};

use serde_json::Value;

/// The whole demo takes about a minute; a hang is a failure.
const BOUND: Duration = Duration::from_secs(300);

fn relevo() -> Command {
    Command::new(env!("CARGO_BIN_EXE_relevo"))
}

/// Runs the demo with its files in `directory`.
fn demo(directory: &Path, arguments: &[&str]) -> Output {
    let child = relevo()
        .arg("demo")
        .arg("--json")
        .args(arguments)
        .env("TMPDIR", directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the demo");
    wait(child)
}

fn wait(mut child: std::process::Child) -> Output {
    let start = SystemTime::now();
    while child.try_wait().expect("wait for the demo").is_none() {
        if start.elapsed().unwrap_or_default() > BOUND {
            child.kill().expect("kill the demo");
            panic!("the demo hangs");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child
        .wait_with_output()
        .expect("read what the demo printed")
}

fn report(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!(
            "{error} in {text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

fn assert_perfect(output: &Output, scenes: &[&str]) {
    let report = report(output);
    let played: Vec<&str> = report["scenes"]
        .as_array()
        .expect("scenes")
        .iter()
        .map(|scene| scene["name"].as_str().expect("name"))
        .collect();
    assert_eq!(played, scenes, "{report:#}");
    for scene in report["scenes"].as_array().expect("scenes") {
        assert_eq!(scene["missing"], 0, "{report:#}");
        assert_eq!(scene["recovered"], true, "{report:#}");
        assert_eq!(scene["replicas_equal"], true, "{report:#}");
        assert!(scene["acknowledged"].as_u64() > Some(0), "{report:#}");
    }
    assert_eq!(report["ok"], true, "{report:#}");
    assert!(
        output.status.success(),
        "the exit code contradicts the report"
    );
}

fn assert_nothing_left(directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory)
        .expect("directory")
        .flatten()
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    let word = directory.display().to_string();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        assert!(!command.contains(&word), "still running: {command}");
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(&word), "still mounted: {mounts}");
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| {
        use std::os::unix::fs::MetadataExt as _;
        metadata.uid() == 0
    })
}

#[test]
fn as_root_in_namespaces_every_scene() {
    if !is_root() {
        return said::skip("as_root_in_namespaces_every_scene", "it needs root");
    }
    let directory = tempfile::tempdir().expect("directory");
    let output = demo(directory.path(), &["--surroundings", "namespaces"]);
    assert_perfect(
        &output,
        &[
            "power-loss",
            "return",
            "process-kill",
            "service-crash",
            "switchover",
            "partition",
            "replication-cut",
            "witness-loss",
        ],
    );
    assert_nothing_left(directory.path());
}

#[test]
fn in_a_user_namespace_without_block_devices() {
    let directory = tempfile::tempdir().expect("directory");
    let arguments = [
        "--surroundings",
        "user-namespaces",
        "--scene",
        "power-loss",
        "--scene",
        "partition",
    ];
    let output = demo(directory.path(), &arguments);
    let words = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && words.contains("user namespace") {
        return said::skip("in_a_user_namespace_without_block_devices", &words);
    }
    assert_perfect(&output, &["power-loss", "partition"]);
    assert!(
        report(&output)["left_out"][0]
            .as_str()
            .expect("reason")
            .contains("NBD")
    );
    assert_nothing_left(directory.path());
}

#[test]
fn on_loopback_with_nothing_at_all() {
    let directory = tempfile::tempdir().expect("directory");
    let arguments = [
        "--surroundings",
        "loopback",
        "--scene",
        "process-kill",
        "--scene",
        "switchover",
    ];
    let output = demo(directory.path(), &arguments);
    assert_perfect(&output, &["process-kill", "switchover"]);
    assert_nothing_left(directory.path());
}

#[test]
fn an_interrupt_cleans_everything_up() {
    let directory = tempfile::tempdir().expect("directory");
    let child = relevo()
        .args(["demo", "--json", "--repeat", "100"])
        .env("TMPDIR", directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the demo");
    // Somewhere in the middle: daemons run by then.
    std::thread::sleep(Duration::from_secs(4));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("interrupt");
    let output = wait(child);
    assert!(
        !output.status.success(),
        "an interrupted demo is no success"
    );
    assert_nothing_left(directory.path());
}

#[test]
fn an_unknown_scene_names_the_known_ones() {
    let output = relevo()
        .args(["demo", "--scene", "earthquake"])
        .output()
        .expect("run");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        words.contains("earthquake") && words.contains("power-loss"),
        "{words}"
    );
}

#[test]
fn a_replica_that_returns_is_given_what_it_lacks() {
    let directory = tempfile::tempdir().expect("directory");
    let child = relevo()
        .args(["bench", "--resync", "--size", "64MiB", "--json"])
        .arg("--directory")
        .arg(directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the benchmark");
    let report = report(&wait(child));
    let returns = report["returns"].as_array().expect("returns");
    let dirty: Vec<u64> = returns
        .iter()
        .map(|one| one["dirty_bytes"].as_u64().expect("bytes"))
        .collect();
    assert_eq!(dirty, [0, 16 << 12, 163 << 12, 1638 << 12]);
    for one in returns {
        let dirty = one["dirty_bytes"].as_u64().expect("bytes");
        // On loopback nobody can tell.
        if let Some(received) = one["received_bytes"].as_u64() {
            let most = dirty + dirty / 8 + (64 << 10);
            assert!((dirty..most).contains(&received), "{report:#}");
        }
    }
    assert_nothing_left(directory.path());
}
