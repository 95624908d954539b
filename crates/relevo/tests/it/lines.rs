//! Paths of real daemons on loopback: a serial line of two pseudo terminals, and paths that can't be used.

use std::{
    net::UdpSocket,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::Duration,
};

use rustix::{
    fs::{OFlags, fcntl_setfl},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};
use serde_json::Value;

use crate::daemons::{Daemon, Site, eventually};

const BOUND: Duration = Duration::from_secs(10);

/// A cable between two serial devices.
struct Cable {
    devices: [String; 2],
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    cut: AtomicBool,
    noisy: AtomicBool,
    over: AtomicBool,
}

impl Cable {
    fn new() -> Self {
        let ends = [terminal(), terminal()];
        let devices = [0, 1].map(|end: usize| {
            let name = ptsname(&ends[end], Vec::new()).unwrap();
            name.to_str().unwrap().to_owned()
        });
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let thread = thread::spawn(move || carry(&ends, &shared));
        Self {
            devices,
            state,
            thread: Some(thread),
        }
    }

    fn path(&self, end: usize) -> String {
        format!("serial:{}:115200", self.devices[end])
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn terminal() -> OwnedFd {
    let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&end).unwrap();
    unlockpt(&end).unwrap();
    fcntl_setfl(&end, OFlags::NONBLOCK).unwrap();
    end
}

/// Carries bytes both ways; a noisy cable alters one in 200, and says something of its own now and then.
fn carry(ends: &[OwnedFd; 2], state: &State) {
    let mut carried = 0u32;
    while !state.over.load(Ordering::Relaxed) {
        for (from, to) in [(0, 1), (1, 0)] {
            let mut buffer = [0; 4096];
            // An error: nobody has the device open.
            let count = rustix::io::read(&ends[from], &mut buffer).unwrap_or(0);
            if state.cut.load(Ordering::Relaxed) {
                continue;
            }
            let bytes = &mut buffer[..count];
            if state.noisy.load(Ordering::Relaxed) {
                for byte in &mut *bytes {
                    carried += 1;
                    if carried.is_multiple_of(200) {
                        *byte ^= 0x41;
                    }
                }
                if carried % 1000 < 100 {
                    rustix::io::write(&ends[to], b"\r\nlogin: ").ok();
                }
            }
            if !bytes.is_empty() {
                rustix::io::write(&ends[to], bytes).ok();
            }
        }
        sleep(Duration::from_millis(1));
    }
}

fn path(asked: &Daemon, node: &str, name: &str) -> Value {
    let paths = asked.find("nodes", node)["paths"].clone();
    let paths = paths.as_array().cloned().unwrap_or_default();
    let found = paths.into_iter().find(|path| path["name"] == name);
    found.unwrap_or(Value::Null)
}

#[test]
fn a_serial_line_between_two_daemons() {
    let site = Site::new();
    let cable = Cable::new();
    let [alfa, beta, wit] = ["alfa", "beta", "wit"].map(|name| site.daemon(name));
    let ports = alfa.ports().to_string();
    let own = format!("ser={}", cable.path(0));
    let init = ["init", "--name", "campus", "--node", "alfa"];
    let paths = ["--path", "lan=127.0.0.1", "--path", &own, "--ports", &ports];
    alfa.ok(&[&init[..], &paths].concat());
    let theirs = format!("ser={}", cable.path(1));
    beta.join(&alfa.token(&[]), &["--path", &theirs]);
    wit.join(&alfa.token(&["--witness"]), &["--witness"]);
    let up = |asked: &Daemon, node: &str| {
        let path = path(asked, node, "ser");
        path["up"] == true && path["trouble"].is_null() && path["jitter_us"].is_u64()
    };
    eventually(BOUND, "the line is up at both ends", || {
        up(&alfa, "beta") && up(&beta, "alfa")
    });
    eventually(BOUND, "all is well", || alfa.run(&["status"]).code == 0);
    let list = alfa.ok(&["node", "path", "list"]);
    assert!(
        list.contains(&cable.path(1)) && list.contains("heartbeats only"),
        "{list}"
    );

    // It loses what noise damages, and finds its way.
    cable.state.noisy.store(true, Ordering::Relaxed);
    eventually(BOUND, "heartbeats are lost", || {
        path(&alfa, "beta", "ser")["loss_percent"].as_u64() > Some(10)
    });
    let alarm = "path ser to node beta loses";
    eventually(BOUND, alarm, || alfa.run(&["status"]).out.contains(alarm));
    cable.state.noisy.store(false, Ordering::Relaxed);
    eventually(BOUND * 2, "that is over", || {
        alfa.run(&["status"]).code == 0
    });

    cable.state.cut.store(true, Ordering::Relaxed);
    let alarm = "path ser to node beta is down: if lan is lost too, node beta counts as dead";
    eventually(BOUND, alarm, || alfa.run(&["status"]).out.contains(alarm));
    cable.state.cut.store(false, Ordering::Relaxed);
    eventually(BOUND, "it is up again", || alfa.run(&["status"]).code == 0);

    let third = ["node", "path", "add", "wit", "ser", "unix:/run/x.sock"];
    let err = alfa.refused(&third);
    assert!(err.contains("a stream has two ends"), "{err}");
    let err = alfa.refused(&["node", "path", "add", "wit", "slow", "serial:/dev/x:1200"]);
    assert!(err.contains("higher speed"), "{err}");
    let err = alfa.refused(&["node", "path", "remove", "beta", "lan"]);
    assert!(err.contains("only network between alfa and beta"), "{err}");
    for node in ["alfa", "beta"] {
        let done = alfa.ok(&["node", "path", "remove", node, "ser"]);
        assert!(
            done.contains("does not use the path ser any more"),
            "{done}"
        );
    }
    eventually(BOUND, "it is gone", || path(&alfa, "beta", "ser").is_null());
    assert_eq!(alfa.run(&["status"]).code, 0);
}

#[test]
fn a_path_that_cannot_be_used_is_told_and_tried_again() {
    let site = Site::new();
    let [mut alfa, beta, _wit] = site.cluster();
    let err = alfa.refused(&["node", "path", "add", "alfa", "far", "192.0.2.7"]);
    assert!(err.contains("no address of this machine"), "{err}");
    // Asked elsewhere, only that node can tell.
    let err = beta.refused(&["node", "path", "add", "alfa", "far", "192.0.2.7"]);
    assert!(
        err.contains("can't use it") && err.contains("192.0.2.7"),
        "{err}"
    );
    let why = "node alfa can't use its path far";
    eventually(BOUND, why, || {
        beta.run(&["status"])
            .out
            .contains("alfa can't use its path far")
    });
    beta.ok(&["node", "path", "remove", "alfa", "far"]);
    let err = alfa.refused(&[
        "node",
        "path",
        "add",
        "alfa",
        "tty",
        "serial:/dev/null:9600",
    ]);
    assert!(err.contains("no serial line"), "{err}");
    alfa.ok(&["node", "path", "remove", "alfa", "tty"]);
    eventually(BOUND, "all is well", || alfa.run(&["status"]).code == 0);

    let done = alfa.ok(&["node", "path", "add", "alfa", "extra", "127.0.0.9"]);
    assert!(done.contains("No other node is on it"), "{done}");
    let done = alfa.ok(&["node", "path", "add", "beta", "extra", "127.0.0.10"]);
    assert!(done.contains("with alfa"), "{done}");
    eventually(BOUND, "it is up", || {
        path(&alfa, "beta", "extra")["up"] == true
    });

    // The daemon starts without it, by what it knew, and takes it when it can.
    alfa.kill();
    let taken = UdpSocket::bind(("127.0.0.9", alfa.ports() + 1)).unwrap();
    alfa.start();
    let alarm = "this node can't use its path extra";
    eventually(BOUND, alarm, || alfa.run(&["status"]).out.contains(alarm));
    let list = alfa.ok(&["node", "path", "list"]);
    assert!(list.contains("UNUSABLE"), "{list}");
    drop(taken);
    eventually(BOUND, "it is up again", || alfa.run(&["status"]).code == 0);
    let events = alfa.ok(&["events"]);
    assert!(events.contains("this node uses its path extra"), "{events}");
}
