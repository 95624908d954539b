//! The agents of the distribution (Debian's package `fence-agents`), unmodified. The machines that they talk to
//! are ours: an `ipmitool` and an `ssh` that switch the processes of daemons.

use std::{fs, path::Path};

use super::{POWER, SOON, ended, eventually, last, script, write_pid};
use crate::daemons::{Daemon, Site};

fn missing(test: &str) -> bool {
    let works = |agent: &str| {
        std::process::Command::new(Path::new("/usr/sbin").join(agent))
            .args(["-o", "metadata"])
            .output()
            .is_ok_and(|output| output.status.success())
    };
    let found = ["fence_dummy", "fence_virsh", "fence_ipmilan"]
        .into_iter()
        .all(works);
    if !found {
        said::skip(
            test,
            "package fence-agents is not installed, or does not work",
        );
    }
    !found
}

fn add(
    daemon: &Daemon,
    name: &str,
    agent: &str,
    node: &str,
    more: &[&str],
) -> crate::daemons::Answer {
    let base = [
        "fence", "device", "add", name, "--agent", agent, "--node", node,
    ];
    daemon.run(&[&base[..], more].concat())
}

#[test]
fn fence_dummy_switches_its_file() {
    if missing("fence_dummy_switches_its_file") {
        return;
    }
    let site = Site::new();
    let [alfa, mut beta, _wit] = site.cluster();
    let file = site.path().join("dummy");
    fs::write(&file, "on").unwrap();
    let set = format!("status_file={}", file.display());
    let answer = add(&alfa, "dummy", "fence_dummy", "beta", &["--set", &set]);
    assert_eq!(answer.code, 0, "{}", answer.err);
    let out = alfa.ok(&["fence", "device", "test", "dummy"]);
    assert!(out.contains("would work"), "{out}");
    assert_eq!(alfa.run(&["fence", "status", "beta"]).code, 0);

    // A file is no power supply: beta lives, whatever the agent says.
    let err = alfa.refused(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(err.contains("heartbeats of beta still arrive"), "{err}");
    assert!(beta.hears(3));

    beta.kill();
    fs::write(&file, "on").unwrap();
    let out = alfa.ok(&["fence", "reboot", "beta", "--confirm", "beta"]);
    assert!(
        out.contains("dummy switched it off and said so when asked"),
        "{out}"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "on", "rebooted");
    assert_eq!(ended(&alfa)["proved"], true);
}

#[test]
fn fence_virsh_destroys_a_machine_by_ssh() {
    if missing("fence_virsh_destroys_a_machine_by_ssh") {
        return;
    }
    let site = Site::new();
    let [alfa, beta, wit] = site.cluster();
    write_pid(&site, &beta);
    script(&site, "power", POWER);
    // What `ssh` shows: a question for the password, then a shell with a prompt, in which there is `virsh`.
    let ssh = script(
        &site,
        "ssh",
        r#"
stty -echo
printf "root@10.0.0.9's password: "
read -r password
[ "$password" = sesame ] || { echo "Permission denied"; exit 255; }
stty echo
while printf '[EXPECT]# ' && read -r word verb name; do
    case "$word $verb" in
    "virsh list") printf ' Id   Name   State\n----------------------\n 1    machine-b   running\n';;
    "virsh domstate") if "$DIR/power" beta status >/dev/null; then echo running; else echo 'shut off'; fi; echo;;
    "virsh destroy") "$DIR/power" beta off; echo "Domain $name destroyed";;
    "virsh start") echo "Domain $name started";;
    quit*|exit*) exit 0;;
    *) echo "$word: command not found";;
    esac
done
"#,
    );
    let ssh = format!("ssh_path={}", ssh.display());
    let parameters = [
        "--set",
        "ip=10.0.0.9",
        "--set",
        "username=root",
        "--set",
        "password=sesame",
        "--set",
        &ssh,
    ];
    // What is wrong is told, with what is meant.
    let err = add(&alfa, "virt", "fence_virsh", "beta", &parameters).err;
    assert!(err.contains("--node NODE=PLUG"), "{err}");
    let typo = [&parameters[2..], &["--set", "ipadr=10.0.0.9"]].concat();
    let err = add(&alfa, "virt", "fence_virsh", "beta=machine-b", &typo).err;
    assert!(
        err.contains("no parameter `ipadr`") && err.contains("perhaps `ipaddr`"),
        "{err}"
    );
    assert!(err.contains("`ip`") && err.contains("is required"), "{err}");
    assert!(!err.contains("sesame"), "{err}");

    let answer = add(&alfa, "virt", "fence_virsh", "beta=machine-b", &parameters);
    assert_eq!(answer.code, 0, "{}", answer.err);
    alfa.ok(&["fence", "device", "test", "virt"]);
    let out = alfa.ok(&["fence", "off", "beta", "--confirm", "beta"]);
    assert!(
        out.contains("virt switched it off and said so when asked"),
        "{out}"
    );
    assert_eq!(ended(&alfa)["proved"], true);
    no_secret(&[&alfa, &wit], "sesame");
}

#[test]
fn fence_ipmilan_switches_by_ipmitool() {
    if missing("fence_ipmilan_switches_by_ipmitool") {
        return;
    }
    let site = Site::new();
    let [alfa, beta, wit] = site.cluster();
    write_pid(&site, &beta);
    script(&site, "power", POWER);
    let ipmitool = script(
        &site,
        "ipmitool",
        r#"
[ "$IPMITOOL_OFFLINE" ] && exit 1
for word; do last=$word; done
case "$*" in *"-H 10.0.0.9 "*"-P sesame"*) ;; *) echo "Unable to establish IPMI session" >&2; exit 1;; esac
case $last in
status) if "$DIR/power" beta status >/dev/null; then echo "Chassis Power is on"; else echo "Chassis Power is off"; fi;;
off) "$DIR/power" beta off; echo "Chassis Power Control: Down/Off";;
on) echo "Chassis Power Control: Up/On"; exit 1;;
esac
"#,
    );
    // The password is in a file on each node that uses the device; what is deprecated is told.
    let secret = site.path().join("bmc-password");
    fs::write(&secret, "sesame\n").unwrap();
    let path = format!("ipmitool_path={}", ipmitool.display());
    let file = format!("password={}", secret.display());
    let parameters = [
        "--set",
        "ipaddr=10.0.0.9",
        "--set",
        "username=admin",
        "--set-file",
        &file,
        "--set",
        &path,
        // Until the agent believes that the power does not come.
        "--set",
        "power_timeout=2",
    ];
    let answer = add(&alfa, "bmc", "fence_ipmilan", "beta", &parameters);
    assert_eq!(answer.code, 0, "{}", answer.err);
    assert!(
        answer.out.contains("`ip` is its new name"),
        "{}",
        answer.out
    );
    alfa.ok(&["fence", "device", "test", "bmc"]);
    let shown = wit.ok(&["fence", "device", "show", "bmc"]);
    assert!(shown.contains("(first line of"), "{shown}");

    // The agent has no answer when asked to switch it on: beta was off all the same, and somebody must go there.
    let answer = alfa.run(&["fence", "reboot", "beta", "--confirm", "beta"]);
    assert_eq!(answer.code, 0, "{}{}", answer.out, answer.err);
    assert!(
        answer.out.contains("switch it on by hand"),
        "{}",
        answer.out
    );
    let proof = ended(&wit);
    assert_eq!(proof["proved"], true);
    assert!(
        proof["remarks"][0].as_str().unwrap().contains("bmc"),
        "{proof}"
    );
    no_secret(&[&alfa, &wit], "sesame");

    // A password that is gone is an alarm before it is needed.
    fs::remove_file(&secret).unwrap();
    let err = alfa.refused(&["fence", "device", "test", "bmc"]);
    assert!(err.contains("`password` can't be read from"), "{err}");
}

/// A secret is in no log, no event and nothing that is shown.
fn no_secret(daemons: &[&Daemon], secret: &str) {
    for daemon in daemons {
        for args in [
            &["status", "--json"][..],
            &["fence", "device", "list", "--json"],
            &["fence", "history", "--json"],
            &["events", "--json"],
        ] {
            let answer = daemon.run(args);
            let text = answer.out + &answer.err;
            assert!(
                !text.contains(secret),
                "{args:?} on {}: {text}",
                daemon.name()
            );
        }
        assert!(!daemon.log().contains(secret), "log of {}", daemon.name());
    }
}

#[test]
fn agents_tell_what_they_are_and_what_they_need() {
    if missing("agents_tell_what_they_are_and_what_they_need") {
        return;
    }
    let site = Site::new();
    let [alfa, _beta, _wit] = site.cluster();
    let agent = alfa.ok(&["fence", "agent", "fence_ipmilan"]);
    assert!(agent.contains("Fence agent for IPMI"), "{agent}");
    assert!(
        agent.contains("lanplus") && agent.contains("(secret)"),
        "{agent}"
    );
    assert!(
        alfa.ok(&["fence", "agent", "fence_virsh"])
            .contains("NODE=PLUG")
    );
    let err = alfa.refused(&["fence", "agent", "fence_nothing"]);
    assert!(err.contains("package fence-agents"), "{err}");
    let err = add(&alfa, "x", "/usr/sbin/fence_dummy", "beta", &[]).err;
    assert!(err.contains("without a directory"), "{err}");
    // It can't say whether anything is off.
    let err = add(&alfa, "dump", "fence_kdump", "beta", &[]).err;
    assert!(err.contains("--trust-exit-code"), "{err}");
    let answer = add(&alfa, "dump", "fence_kdump", "beta", &["--trust-exit-code"]);
    assert_eq!(answer.code, 0, "{}", answer.err);
    let err = add(&alfa, "other", "fence_nothing", "beta", &[]).err;
    assert!(err.contains("--unchecked"), "{err}");
    let answer = add(
        &alfa,
        "other",
        "fence_nothing",
        "beta",
        &["--unchecked", "--level", "2"],
    );
    assert_eq!(answer.code, 0, "{}", answer.err);
    eventually(SOON, "what is not installed is told", || {
        alfa.status()["problems"]
            .to_string()
            .contains("agent fence_nothing is not installed")
    });
    assert!(last(&alfa).is_null());
}
