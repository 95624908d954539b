//! Fencing with real daemons: a device that kills the process of a daemon, devices that lie, hang, shout and
//! break, persons, and the agents of the distribution.

mod agents;

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use serde_json::Value;

use crate::daemons::{Daemon, Site, eventually};

/// How long the others may take until they no longer hear a node, and the log to be read everywhere.
const SOON: Duration = Duration::from_secs(10);

/// A power switch for the processes of daemons: `off` is a power cut, `status` looks whether there is a process.
const POWER: &str = r#"
pid=$(cat "$DIR/$1.pid")
case $2 in
off) kill -9 $pid;;
status)
    if [ -d /proc/$pid ] && ! grep -q "^State:.Z" /proc/$pid/status; then echo on; exit 0; fi
    echo off; exit 2;;
*) echo "this switch has no action $2" >&2; exit 1;;
esac
"#;

/// A script in the directory of the site, in which `$DIR` is that directory.
fn script(site: &Site, name: &str, text: &str) -> PathBuf {
    let path = site.path().join(name);
    let text = format!("#!/bin/sh\nDIR={}\n{text}", site.path().display());
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn write_pid(site: &Site, daemon: &Daemon) {
    let path = site.path().join(format!("{}.pid", daemon.name()));
    fs::write(path, daemon.pid().to_string()).unwrap();
}

/// The last word of the history, as a node reads it.
fn last(daemon: &Daemon) -> Value {
    let history: Value = serde_json::from_str(&daemon.ok(&["fence", "history", "--json"])).unwrap();
    history
        .as_array()
        .unwrap()
        .last()
        .cloned()
        .unwrap_or_default()
}

fn ended(daemon: &Daemon) -> Value {
    eventually(SOON, "the end is recorded", || {
        !last(daemon)["ended_unix_ms"].is_null()
    });
    last(daemon)
}

fn problems(daemon: &Daemon) -> String {
    daemon.status()["problems"].to_string()
}

fn add(daemon: &Daemon, name: &str, command: &str, more: &[&str]) -> String {
    let base = [
        "fence",
        "device",
        "add",
        name,
        "--command",
        command,
        "--node",
        "beta",
    ];
    daemon.ok(&[&base[..], more].concat())
}

#[test]
fn a_node_is_switched_off_and_the_proof_is_kept() {
    let site = Site::new();
    let [alfa, mut beta, wit] = site.cluster();
    assert!(
        alfa.ok(&["fence", "history"])
            .contains("No node was fenced")
    );
    assert!(
        alfa.ok(&["fence", "device", "list"])
            .contains("no fence devices")
    );
    let err = alfa.refused(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(err.contains("beta has no fence device"), "{err}");

    write_pid(&site, &beta);
    let power = script(&site, "power", POWER);
    let command = format!("{} {{node}} {{action}}", power.display());
    let out = add(&alfa, "strip", &command, &["--set", "comment=rack 3"]);
    assert!(out.contains("can switch off beta"), "{out}");
    eventually(SOON, "the device was checked", || {
        wit.ok(&["fence", "device", "list"]).contains("yes")
    });
    // Nobody said how alfa is switched off.
    let text = problems(&wit);
    assert!(text.contains("node alfa has no fence device"), "{text}");
    let out = alfa.ok(&["fence", "device", "test", "strip"]);
    assert!(out.contains("would work"), "{out}");
    let shown = wit.ok(&["fence", "device", "show", "strip"]);
    assert!(shown.contains("comment = rack 3"), "{shown}");
    assert!(shown.contains("used from alfa, beta"), "{shown}");
    assert_eq!(alfa.run(&["fence", "status", "beta"]).code, 0);

    // Not without the name, not itself, not from a node that may not.
    let err = alfa.refused(&["fence", "off", "beta"]);
    assert!(err.contains("--confirm beta"), "{err}");
    let err = alfa.refused(&["fence", "off", "beta", "--confirm", "Beta"]);
    assert!(err.contains("nothing was done"), "{err}");
    let err = beta.refused(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(err.contains("ask on another node"), "{err}");
    let err = wit.refused(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(err.contains("this node may not use it"), "{err}");
    assert!(beta.hears(3), "beta lives");

    let answer = alfa.run(&["fence", "off", "beta", "--confirm", "beta"]);
    assert_eq!(answer.code, 0, "{}{}", answer.out, answer.err);
    assert!(answer.err.contains("beta is alive"), "{}", answer.err);
    assert!(
        answer
            .out
            .contains("Node beta was off: strip switched it off and said so"),
        "{}",
        answer.out
    );
    assert_eq!(alfa.run(&["fence", "status", "beta"]).code, 2);

    // Known on every node: what, by whom, and how it is known.
    let proof = ended(&wit);
    assert_eq!(proof["proved"], true, "{proof}");
    assert_eq!(proof["node"], "beta");
    assert_eq!(proof["by"], "alfa");
    assert_eq!(proof["generation"], 1);
    assert!(
        proof["asked"].as_str().unwrap().ends_with("on alfa"),
        "{proof}"
    );
    let story = alfa.ok(&["events"]);
    assert!(
        story.contains("fence beta") && story.contains("was off: strip"),
        "{story}"
    );
    let text = wit.ok(&["fence", "history"]);
    assert!(text.contains("beta (off) by alfa"), "{text}");

    // The evidence is about what it held; it comes back like after any power cut.
    beta.kill();
    beta.start();
    write_pid(&site, &beta);
    eventually(Duration::from_secs(20), "beta is back", || beta.hears(3));
    assert_eq!(alfa.run(&["fence", "status", "beta"]).code, 0);
}

/// A switch that switches nothing, and one that is another node's: neither proves anything, and beta lives.
#[test]
fn a_device_that_lies_proves_nothing() {
    let site = Site::new();
    let [alfa, beta, _wit] = site.cluster();
    let idle = script(&site, "idle", "[ $1 = status ] && echo on; exit 0");
    let other = script(
        &site,
        "other",
        "[ $1 = status ] || exit 0; echo off; exit 2",
    );
    let command = |path: &PathBuf| format!("{} {{action}}", path.display());
    add(&alfa, "idle", &command(&idle), &["--verify", "1"]);
    add(&alfa, "other", &command(&other), &["--level", "2"]);
    // That the plug is another one's is seen before it is needed.
    let err = alfa.refused(&["fence", "device", "test", "other"]);
    assert!(err.contains("the plug is not that node's"), "{err}");
    eventually(SOON, "the alarm", || {
        problems(&alfa).contains("fence device other would not work from alfa")
    });
    let alarm = alfa.ok(&["events"]);
    assert!(
        alarm.contains("fence other") && alarm.contains("would not work"),
        "{alarm}"
    );

    let err = alfa.refused(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(
        err.contains("idle: its `off` ended well, and it still says"),
        "{err}"
    );
    assert!(
        err.contains("other: it says that the power is off, and heartbeats"),
        "{err}"
    );
    let failed = ended(&alfa);
    assert_eq!(failed["proved"], false, "{failed}");
    assert_eq!(failed["how"].as_array().unwrap().len(), 2, "{failed}");
    assert!(beta.hears(3));
}

/// One that hangs is killed with what it started, one that prints megabytes is bounded, and the next level does
/// it.
#[test]
fn the_next_level_does_what_a_broken_device_does_not() {
    let site = Site::new();
    let [alfa, beta, _wit] = site.cluster();
    write_pid(&site, &beta);
    let hangs = script(&site, "hangs", "sleep 600 & echo $! >\"$DIR/left\"; wait");
    let shouts = script(
        &site,
        "shouts",
        "yes nonsense | head -c 20000000; yes more | head -c 20000000 >&2; echo 'out of paper' >&2; exit 1",
    );
    let power = script(&site, "power", POWER);
    add(
        &alfa,
        "hangs",
        &hangs.display().to_string(),
        &["--timeout", "1", "--delay", "1"],
    );
    add(
        &alfa,
        "shouts",
        &shouts.display().to_string(),
        &["--level", "2"],
    );
    let command = format!("{} {{plug}} {{action}}", power.display());
    add(&alfa, "strip", &command, &["--level", "3"]);
    let out = alfa.ok(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(
        out.contains("strip switched it off") && out.contains("level 3"),
        "{out}"
    );
    assert_eq!(ended(&alfa)["proved"], true);
    let left = fs::read_to_string(site.path().join("left")).unwrap();
    eventually(SOON, "what the killed one had started is gone", || {
        fs::read_to_string(format!("/proc/{}/stat", left.trim()))
            .map_or(true, |stat| stat.contains(") Z "))
    });
    let err = alfa.refused(&["fence", "device", "test", "shouts"]);
    assert!(
        err.contains("out of paper") && err.len() < 5000,
        "{} bytes",
        err.len()
    );
    let begun = ended(&alfa)["begun_unix_ms"].as_u64().unwrap();
    let proved = ended(&alfa)["proved_unix_ms"].as_u64().unwrap();
    // The delay, two tries of a second each with a pause between them.
    assert!(proved - begun >= 4000, "{} ms", proved - begun);
}

#[test]
fn a_person_is_believed_only_while_nobody_hears_the_node() {
    let site = Site::new();
    let [alfa, mut beta, wit] = site.cluster();
    alfa.ok(&[
        "fence", "device", "add", "operator", "--person", "--node", "beta",
    ]);
    let mut asked = alfa.begin(&["fence", "off", "beta", "--confirm", "beta"]);
    eventually(SOON, "a person is waited for", || {
        problems(&wit).contains("relevo fence confirm beta")
    });
    let err = wit.refused(&["fence", "confirm", "beta", "--confirm", "beta"]);
    assert!(
        err.contains("beta is on: its heartbeats arrive on"),
        "{err}"
    );
    let err = wit.refused(&["fence", "confirm", "beta"]);
    assert!(err.contains("--confirm beta"), "{err}");

    beta.kill();
    eventually(SOON, "nobody hears it", || {
        wit.run(&["fence", "confirm", "beta", "--confirm", "beta"])
            .code
            == 0
    });
    assert!(asked.wait().unwrap().success());
    let proof = ended(&alfa);
    assert_eq!(
        (proof["proved"].as_bool(), proof["by"].as_str()),
        (Some(true), Some("alfa"))
    );
    assert!(
        proof["how"][0]
            .as_str()
            .unwrap()
            .contains("confirmed it on node wit"),
        "{proof}"
    );

    // A word that nobody waited for is recorded like any other.
    let out = wit.ok(&["fence", "confirm", "beta", "--confirm", "beta"]);
    assert!(out.contains("confirmed it on node wit"), "{out}");
    eventually(SOON, "the word is recorded", || last(&alfa)["by"] == "wit");

    // And an attempt that waits can be taken back.
    let mut asked = alfa.begin(&["fence", "reboot", "beta", "--confirm", "beta"]);
    eventually(SOON, "it can be taken back", || {
        wit.run(&["fence", "cancel", "beta"]).code == 0
    });
    assert!(!asked.wait().unwrap().success());
    eventually(SOON, "that is recorded", || last(&wit)["proved"] == false);
    let given_up = last(&wit);
    assert!(
        given_up["how"][0].as_str().unwrap().contains("gave it up"),
        "{given_up}"
    );
}

/// Without a majority nothing can be recorded; the proof is there all the same, and recorded later.
#[test]
fn a_proof_needs_no_majority() {
    let site = Site::new();
    let [alfa, beta, mut wit] = site.cluster();
    write_pid(&site, &beta);
    let power = script(&site, "power", POWER);
    add(
        &alfa,
        "strip",
        &format!("{} {{node}} {{action}}", power.display()),
        &[],
    );
    wit.kill();
    beta.stop();
    eventually(SOON, "alfa is alone", || {
        alfa.status()["cluster"]["quorum"]["alive"] == 1
    });
    let out = alfa.ok(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(out.contains("strip switched it off"), "{out}");
    assert_eq!(last(&alfa), Value::Null, "recorded without a majority");
    wit.start();
    eventually(Duration::from_secs(20), "it is recorded", || {
        last(&wit)["proved"] == true
    });
}

/// An alarm when a device would not work any more, and its end when it would.
#[test]
fn a_device_that_breaks_is_told_before_it_is_needed() {
    let site = Site::new();
    let [alfa, _beta, _wit] = site.cluster();
    let text = "[ -e \"$DIR/broken\" ] && { echo 'no route to host' >&2; exit 1; }; echo on";
    let device = script(&site, "device", text);
    add(
        &alfa,
        "strip",
        &device.display().to_string(),
        &["--check-every", "10"],
    );
    let works = || alfa.ok(&["fence", "device", "list"]);
    eventually(SOON, "it was checked", || works().contains("yes"));
    fs::write(site.path().join("broken"), "").unwrap();
    eventually(Duration::from_secs(20), "the alarm", || {
        problems(&alfa)
            .contains("fence device strip would not work from alfa: status of beta failed")
    });
    assert_eq!(alfa.run(&["status"]).code, 1, "degraded");
    let shown = alfa.ok(&["fence", "device", "show", "strip"]);
    assert!(
        shown.contains("would NOT work") && shown.contains("no route to host"),
        "{shown}"
    );
    fs::remove_file(site.path().join("broken")).unwrap();
    eventually(Duration::from_secs(20), "its end", || {
        works().contains("yes")
    });
    let story = alfa.ok(&["events"]);
    assert!(story.contains("would work again"), "{story}");
    let again = format!("{} {{action}}", device.display());
    let out = add(&alfa, "strip", &again, &["--replace"]);
    assert!(out.contains("can switch off beta"), "{out}");
    let shown = alfa.ok(&["fence", "device", "show", "strip"]);
    assert!(shown.contains("checked every 3600 s"), "{shown}");
    alfa.ok(&["fence", "device", "remove", "strip"]);
    assert!(works().contains("no fence devices"));
}
