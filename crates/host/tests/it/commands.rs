//! Processes in namespaces, and the power cut.

use std::{fs, io::Read as _, process::Stdio, time::Duration};

use relevo_host::{command::NsCommand, netns::NetNs};

use crate::{eventually, is_alive, need};

#[test]
fn a_command_gets_namespaces_of_its_own() {
    let test = "a_command_gets_namespaces_of_its_own";
    let Some(machine) = need(test, NetNs::new("machine")) else {
        return;
    };
    let mut child = NsCommand::new("sh")
        .args([
            "-c",
            "readlink /proc/self/ns/net /proc/self/ns/mnt; echo $WORD; pwd",
        ])
        .env("WORD", "hello")
        .current_dir("/tmp")
        .stdout(Stdio::piped())
        .in_namespace(&machine)
        .own_mounts()
        .own_group()
        .spawn()
        .unwrap();
    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert!(child.wait().unwrap().success());
    let lines: Vec<&str> = output.lines().collect();
    let ours = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    assert_eq!(lines.len(), 4, "{output}");
    assert_ne!(lines[0], ours("net").to_str().unwrap());
    assert_ne!(lines[1], ours("mnt").to_str().unwrap());
    assert_eq!(lines[2..], ["hello", "/tmp"]);
}

#[test]
fn a_missing_program_is_named() {
    let error = NsCommand::new("/nonexistent/program")
        .spawn()
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/program"), "{error}");
}

#[test]
fn a_power_cut_kills_everything_in_the_namespace() {
    let test = "a_power_cut_kills_everything_in_the_namespace";
    let Some(machine) = need(test, NetNs::new("machine")) else {
        return;
    };
    let mut child = NsCommand::new("sh")
        .args([
            "-c",
            "trap '' TERM; sleep 60 & sleep 60 & setsid sleep 60 & wait",
        ])
        .in_namespace(&machine)
        .spawn()
        .unwrap();
    assert!(eventually(Duration::from_secs(5), || machine
        .processes()
        .len()
        == 4));
    assert_eq!(machine.kill_all().unwrap(), 4);
    assert_eq!(machine.processes(), []);
    assert!(!child.wait().unwrap().success());
    assert_eq!(machine.kill_all().unwrap(), 0);
}

#[test]
fn a_command_outlives_the_thread_that_asked_for_it() {
    // The thread that asks ends at once; the child must live on, for its parent is another one.
    let child = std::thread::spawn(|| NsCommand::new("sleep").arg("60").spawn().unwrap());
    let mut child = child.join().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(is_alive(i32::try_from(child.id()).unwrap()));
    child.kill().unwrap();
    child.wait().unwrap();
}
