//! The supervisor: restarts, gives up, stops, leaves nothing behind.

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use relevo_host::{
    clock,
    process::{ProcessSpec, ProcessState, Supervisor},
};

use crate::{eventually, is_alive};

fn shell(name: &str, script: &str) -> ProcessSpec {
    ProcessSpec::new(name, vec!["/bin/sh".into(), "-c".into(), script.into()])
}

fn pid_in(file: &Path) -> Option<i32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn running(supervisor: &Supervisor) -> Option<i32> {
    match supervisor.state() {
        ProcessState::Running { pid } => Some(pid),
        _ => None,
    }
}

#[tokio::test]
async fn a_crashed_process_runs_again_within_a_second() {
    let mut spec = shell("sleeper", "echo started as $WORD in $(pwd); exec sleep 60");
    spec.environment.insert("WORD".into(), "told".into());
    spec.directory = Some("/tmp".into());
    let supervisor = Supervisor::start(spec).unwrap();
    let first = running(&supervisor).unwrap();
    let mut states = supervisor.states();
    while supervisor.last_lines(1).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let killed = clock::now();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(first).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let state = states
        .wait_for(|state| matches!(state, ProcessState::Restarting { .. }))
        .await
        .unwrap()
        .clone();
    let ProcessState::Restarting { reason } = state else {
        unreachable!()
    };
    assert!(reason.contains("ended by signal 9"), "{reason}");
    states
        .wait_for(|state| matches!(state, ProcessState::Running { pid } if *pid != first))
        .await
        .unwrap();
    let took = clock::now().since(killed);
    assert!(took < Duration::from_secs(1), "{took:?}");
    let second = running(&supervisor).unwrap();
    supervisor.stop(false).await.unwrap();
    assert!(!is_alive(first) && !is_alive(second));
    assert_eq!(supervisor.state(), ProcessState::Stopped);
    assert!(
        supervisor
            .last_lines(9)
            .contains(&"started as told in /tmp".to_owned())
    );
    supervisor.stop(true).await.unwrap();
}

#[tokio::test]
async fn a_process_that_ends_again_and_again_is_given_up_with_its_last_words() {
    let directory = tempfile::tempdir().unwrap();
    let mut spec = shell("loser", "echo run; echo no such table >&2; exit 3");
    let log = directory.path().join("log");
    spec.log = Some(log.clone());
    spec.ready = Some("127.0.0.1:1".parse().unwrap());
    let began = clock::now();
    let supervisor = Supervisor::start(spec).unwrap();
    let error = supervisor.ready().await.unwrap_err().to_string();
    assert!(error.contains("ended with code 3"), "{error}");
    assert!(error.contains("no such table"), "{error}");
    let took = clock::now().since(began);
    assert!(took >= Duration::from_millis(700), "with pauses: {took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let runs = fs::read_to_string(&log).unwrap().matches("run").count();
    assert_eq!(runs, 4);
    assert!(matches!(supervisor.state(), ProcessState::Failed { .. }));
    supervisor.stop(false).await.unwrap();
}

#[tokio::test]
async fn readiness_is_a_listening_address() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut spec = shell("server", "exec sleep 60");
    spec.ready = Some(listener.local_addr().unwrap());
    let supervisor = Supervisor::start(spec.clone()).unwrap();
    supervisor.ready().await.unwrap();
    drop(listener);
    spec.ready_patience = Duration::from_millis(100);
    let mute = Supervisor::start(spec).unwrap();
    let error = mute.ready().await.unwrap_err().to_string();
    assert!(error.contains("accepted no connection"), "{error}");
}

#[tokio::test]
async fn a_process_that_ignores_sigterm_is_killed_with_its_whole_group() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("grandchild");
    let script = format!(
        "trap '' TERM; (trap '' TERM; sh -c 'echo $$ > {0}.new; mv {0}.new {0}; sleep 60; :') & \
         while :; do sleep 1; done",
        file.display()
    );
    let mut spec = shell("stubborn", &script);
    spec.stop_patience = Duration::from_millis(200);
    let supervisor = Supervisor::start(spec).unwrap();
    let leader = running(&supervisor).unwrap();
    assert!(eventually(Duration::from_secs(5), || pid_in(&file).is_some()));
    let grandchild = pid_in(&file).unwrap();
    assert!(is_alive(grandchild));
    let began = clock::now();
    supervisor.stop(false).await.unwrap();
    let took = clock::now().since(began);
    assert!(
        took >= Duration::from_millis(200) && took < Duration::from_secs(5),
        "{took:?}"
    );
    assert!(!is_alive(leader));
    assert!(eventually(Duration::from_secs(1), || !is_alive(grandchild)));
}

#[tokio::test]
async fn a_gentle_process_ends_by_sigterm_and_a_forced_stop_does_not_ask() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("farewell");
    let script = format!(
        "trap 'echo bye > {}; exit 0' TERM; echo up; while :; do sleep 0.02; done",
        file.display()
    );
    for force in [true, false] {
        let supervisor = Supervisor::start(shell("gentle", &script)).unwrap();
        let up = || !supervisor.last_lines(1).is_empty();
        while !up() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        supervisor.stop(force).await.unwrap();
        assert_eq!(file.exists(), !force);
    }
}

#[tokio::test]
async fn what_cannot_start_is_an_error_at_once() {
    let spec = ProcessSpec::new("ghost", vec!["/nonexistent/ghost".into()]);
    let error = Supervisor::start(spec).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/ghost"), "{error}");
    assert!(Supervisor::start(ProcessSpec::new("nothing", Vec::new())).is_err());
}

const PID_FILE: &str = "RELEVO_TEST_PID_FILE";

/// Not a test: the parent that the next test kills.
#[tokio::test]
#[ignore = "run by a_killed_parent_takes_its_processes_along"]
async fn parent() {
    let Ok(file) = env::var(PID_FILE) else { return };
    let script = format!("echo $$ > {file}.new; mv {file}.new {file}; exec sleep 60");
    let _supervisor = Supervisor::start(shell("child", &script)).unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
}

#[test]
fn a_killed_parent_takes_its_processes_along() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pid");
    let mut parent = Command::new(env::current_exe().unwrap())
        .args(["--exact", "supervision::parent", "--ignored"])
        .env(PID_FILE, &file)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = eventually(Duration::from_secs(10), || pid_in(&file).is_some());
    parent.kill().unwrap();
    parent.wait().unwrap();
    assert!(started);
    let child = pid_in(&file).unwrap();
    assert!(eventually(Duration::from_secs(2), || !is_alive(child)));
}
