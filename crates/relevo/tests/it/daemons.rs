//! Real daemons as child processes on the loopback interface, driven by the command line.
//!
//! No root, no devices: volumes are reached over NBD. Every daemon is killed when its handle is
//! dropped, and by the kernel when the test's thread ends.

use std::{
    fs::File,
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tempfile::TempDir;

/// A directory with the state of some daemons.
pub(crate) struct Site {
    dir: TempDir,
}

/// One daemon and its state directory.
pub(crate) struct Daemon {
    name: String,
    state_dir: PathBuf,
    ports: u16,
    child: Option<Child>,
}

/// What a command answered.
pub(crate) struct Answer {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("relevo-it-")
            .tempdir()
            .unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Starts a daemon that belongs to no cluster yet.
    pub(crate) fn daemon(&self, name: &str) -> Daemon {
        let mut daemon = Daemon {
            name: name.to_owned(),
            state_dir: self.dir.path().join(name),
            ports: free_ports(),
            child: None,
        };
        daemon.start();
        daemon
    }

    /// Two data nodes, `alfa` and `beta`, and the witness `wit`, joined.
    pub(crate) fn cluster(&self) -> [Daemon; 3] {
        let alfa = self.daemon("alfa");
        let beta = self.daemon("beta");
        let wit = self.daemon("wit");
        alfa.init("campus");
        beta.join(&alfa.token(&[]), &[]);
        wit.join(&alfa.token(&["--witness"]), &["--witness"]);
        let members = [alfa, beta, wit];
        eventually(
            Duration::from_secs(10),
            "every node hears every other",
            || {
                members.iter().all(|daemon| {
                    let status = daemon.status();
                    status["cluster"]["quorum"]["alive"] == 3
                        && status["cluster"]["quorum"]["lease"]["held"] == true
                        && !status["cluster"]["quorum"]["leader"].is_null()
                })
            },
        );
        members
    }
}

impl Daemon {
    pub(crate) fn start(&mut self) {
        let mut child = self.spawn();
        let socket = self.state_dir.join("relevo.sock");
        eventually(Duration::from_secs(20), "the daemon's socket", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("daemon {} ended: {status}\n{}", self.name, self.log());
            }
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        self.child = Some(child);
    }

    fn spawn(&self) -> Child {
        std::fs::create_dir_all(&self.state_dir).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.state_dir.join("log"))
            .unwrap();
        relevo()
            .args(["daemon", "--die-with-parent", "--no-devices", "--state-dir"])
            .arg(&self.state_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.state_dir.join("log")).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    pub(crate) fn ports(&self) -> u16 {
        self.ports
    }

    /// Runs a verb on this node.
    pub(crate) fn run(&self, args: &[&str]) -> Answer {
        let output = relevo()
            .args(args)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .output()
            .unwrap();
        Answer::from(output)
    }

    /// Runs a verb that must work.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let answer = self.run(args);
        assert_eq!(
            answer.code,
            0,
            "relevo {args:?} on {}: {}{}\n--- log of {}:\n{}",
            self.name,
            answer.out,
            answer.err,
            self.name,
            tail(&self.log())
        );
        answer.out
    }

    /// Runs a verb that must be refused, and gives what it says.
    pub(crate) fn refused(&self, args: &[&str]) -> String {
        let answer = self.run(args);
        assert_eq!(
            answer.code, 1,
            "relevo {args:?}: {}{}",
            answer.out, answer.err
        );
        answer.err
    }

    pub(crate) fn init(&self, cluster: &str) {
        let ports = self.ports.to_string();
        self.ok(&[
            "init",
            "--name",
            cluster,
            "--node",
            &self.name,
            "--path",
            "lan=127.0.0.1",
            "--ports",
            &ports,
        ]);
    }

    pub(crate) fn token(&self, args: &[&str]) -> String {
        let answer = self.ok(&[&["token", "--json"], args].concat());
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["token"].as_str().unwrap().to_owned()
    }

    pub(crate) fn join_args<'a>(&'a self, token: &'a str, ports: &'a str) -> Vec<&'a str> {
        vec![
            "join",
            token,
            "--node",
            &self.name,
            "--path",
            "lan=127.0.0.1",
            "--ports",
            ports,
        ]
    }

    pub(crate) fn join(&self, token: &str, args: &[&str]) {
        let ports = self.ports.to_string();
        self.ok(&[&self.join_args(token, &ports)[..], args].concat());
    }

    pub(crate) fn status(&self) -> Value {
        let answer = self.run(&["status", "--json"]);
        serde_json::from_str(&answer.out)
            .unwrap_or_else(|e| panic!("{e}: {}{}", answer.out, answer.err))
    }

    /// A volume or service of this node's status.
    pub(crate) fn find(&self, list: &str, name: &str) -> Value {
        let status = self.status();
        let found = status["cluster"][list]
            .as_array()
            .and_then(|all| all.iter().find(|one| one["name"] == name).cloned());
        found.unwrap_or(Value::Null)
    }

    /// SIGKILL, as a power cut of the process.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGTERM; gives the exit code.
    pub(crate) fn terminate(&mut self, bound: Duration) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let start = SystemTime::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            if start.elapsed().unwrap_or_default() > bound {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("daemon {} did not end:\n{}", self.name, tail(&self.log()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}", self.name, tail(&self.log()));
        }
    }
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The program under test.
pub(crate) fn relevo() -> Command {
    Command::new(env!("CARGO_BIN_EXE_relevo"))
}

/// Looks until it is so.
pub(crate) fn eventually(bound: Duration, what: &str, mut look: impl FnMut() -> bool) {
    let start = SystemTime::now();
    while !look() {
        assert!(
            start.elapsed().unwrap_or_default() < bound,
            "not within {} s: {what}",
            bound.as_secs()
        );
        std::thread::sleep(Duration::from_millis(30));
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// The first of three ports that nobody has now. Tests of this process never get the same ones.
fn free_ports() -> u16 {
    static NEXT: Mutex<u16> = Mutex::new(0);
    let mut next = NEXT.lock().unwrap();
    if *next == 0 {
        // Below the range that the kernel hands out by itself; another place for each process.
        *next = 12_000 + u16::try_from(std::process::id() % 1600).unwrap() * 10;
    }
    loop {
        let base = *next;
        *next = if base > 31_900 { 12_000 } else { base + 3 };
        let free = |port| {
            TcpListener::bind(("127.0.0.1", port)).is_ok()
                && UdpSocket::bind(("127.0.0.1", port)).is_ok()
        };
        if (base..base + 3).all(free) {
            return base;
        }
    }
}
