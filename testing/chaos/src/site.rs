//! Real daemons as child processes, driven by the command line.
//!
//! On loopback they need no root; in network namespaces ([`crate::Cables`]) they do. Volumes are
//! reached over NBD. Every daemon is killed when its handle is dropped, and by the kernel when the
//! test process ends.

use std::{
    fs::File,
    io::Write as _,
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
    time::{Duration, SystemTime},
};

use relevo_host::{command::NsCommand, netns::NetNs};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

/// How long a daemon may take until its socket answers, also on a loaded machine.
const START_BOUND: Duration = Duration::from_secs(20);

/// Lines of a log that a failure shows.
const TAIL_LINES: usize = 60;

/// A directory with the state of some daemons.
#[derive(Debug)]
pub struct Site {
    program: PathBuf,
    dir: TempDir,
}

/// One daemon and its state directory.
#[derive(Debug)]
pub struct Daemon {
    program: PathBuf,
    name: String,
    state_dir: PathBuf,
    /// Its `--path` arguments.
    paths: Vec<String>,
    /// The first of its ports; the default ones are used where it is alone.
    ports: Option<u16>,
    namespace: Option<NetNs>,
    /// Further arguments of the daemon.
    arguments: Vec<String>,
    child: Option<Child>,
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code; -1 when it was killed.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

impl Site {
    /// A new directory; `program` is the binary under test.
    ///
    /// # Panics
    /// The directory can't be made.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("relevo-it-")
            .tempdir()
            .unwrap();
        Self {
            program: program.into(),
            dir,
        }
    }

    /// Where everything of the test is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Starts a daemon on loopback that belongs to no cluster yet.
    #[must_use]
    pub fn daemon(&self, name: &str) -> Daemon {
        self.start(
            name,
            vec!["lan=127.0.0.1".to_owned()],
            Some(free_ports()),
            None,
        )
    }

    /// The same in a network namespace.
    #[must_use]
    pub fn daemon_in(&self, name: &str, namespace: NetNs, paths: Vec<String>) -> Daemon {
        self.start(name, paths, None, Some(namespace))
    }

    fn start(
        &self,
        name: &str,
        paths: Vec<String>,
        ports: Option<u16>,
        namespace: Option<NetNs>,
    ) -> Daemon {
        let mut daemon = Daemon {
            program: self.program.clone(),
            name: name.to_owned(),
            state_dir: self.dir.path().join(name),
            paths,
            ports,
            namespace,
            arguments: Vec::new(),
            child: None,
        };
        daemon.start();
        daemon
    }

    /// Two data nodes, `alfa` and `beta`, and the witness `wit`, joined, on loopback.
    ///
    /// # Panics
    /// They don't come together.
    #[must_use]
    pub fn cluster(&self) -> [Daemon; 3] {
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
            || members.iter().all(|daemon| daemon.hears(members.len())),
        );
        members
    }
}

impl Daemon {
    /// Starts it and waits until it answers.
    ///
    /// # Panics
    /// It ends or does not answer; the text has its log.
    pub fn start(&mut self) {
        let mut child = self.spawn();
        let socket = self.state_dir.join("relevo.sock");
        eventually(START_BOUND, "the daemon's socket", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("daemon {} ended: {status}\n{}", self.name, self.log());
            }
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        self.child = Some(child);
    }

    /// The same with further arguments, from now on.
    ///
    /// # Panics
    /// See [`Self::start`].
    pub fn start_with(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|it| (*it).to_owned()).collect();
        self.start();
    }

    fn spawn(&self) -> Child {
        std::fs::create_dir_all(&self.state_dir).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.state_dir.join("log"))
            .unwrap();
        let mut command = NsCommand::new(&self.program)
            .args(["daemon", "--die-with-parent", "--no-devices", "--state-dir"])
            .arg(&self.state_dir)
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(namespace) = &self.namespace {
            command = command.in_namespace(namespace);
        }
        command.spawn().unwrap()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.state_dir.join("log")).unwrap_or_default()
    }

    /// Its process.
    ///
    /// # Panics
    /// It does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Whether it was started and not killed.
    #[must_use]
    pub const fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Where it keeps its state.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The NBD socket of a volume; there while the volume has a replica here.
    #[must_use]
    pub fn nbd_socket(&self, volume: &str) -> PathBuf {
        self.state_dir.join("nbd").join(format!("{volume}.sock"))
    }

    /// The first of its ports.
    ///
    /// # Panics
    /// It has the default ones.
    #[must_use]
    pub fn ports(&self) -> u16 {
        self.ports.unwrap()
    }

    /// Runs a verb on this node.
    ///
    /// # Panics
    /// The program can't be started.
    pub fn run(&self, args: &[&str]) -> Answer {
        let output = Command::new(&self.program)
            .args(args)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .output()
            .unwrap();
        Answer::from(output)
    }

    /// Starts a verb that takes a while.
    ///
    /// # Panics
    /// The program can't be started.
    #[must_use]
    pub fn begin(&self, args: &[&str]) -> std::process::Child {
        let mut command = Command::new(&self.program);
        command.args(args).arg("--state-dir").arg(&self.state_dir);
        command.spawn().unwrap()
    }

    /// Runs a verb on a terminal of its own, on which `input` is typed. What it says to either stream is its
    /// output.
    ///
    /// # Panics
    /// `script` (util-linux, which every Debian has) can't be started.
    #[must_use]
    pub fn typed(&self, args: &[&str], input: &str) -> Answer {
        let (program, state_dir) = (self.program.display(), self.state_dir.display());
        // Paths and verbs of tests: nothing that a shell takes for its own.
        let line = format!("{program} {} --state-dir {state_dir}", args.join(" "));
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Open until it has ended: the end of its input would hang up the terminal.
        let mut keyboard = child.stdin.take().unwrap();
        keyboard.write_all(input.as_bytes()).unwrap();
        let answer = child.wait_with_output().unwrap();
        drop(keyboard);
        Answer::from(answer)
    }

    /// Runs a verb that must work.
    ///
    /// # Panics
    /// It does not; the text has what it said and the end of the log.
    pub fn ok(&self, args: &[&str]) -> String {
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
    ///
    /// # Panics
    /// It is not refused.
    #[must_use]
    pub fn refused(&self, args: &[&str]) -> String {
        let answer = self.run(args);
        assert_eq!(
            answer.code, 1,
            "relevo {args:?}: {}{}",
            answer.out, answer.err
        );
        answer.err
    }

    /// Starts a cluster.
    pub fn init(&self, cluster: &str) {
        let node = self.node_args();
        self.ok(&[&["init", "--name", cluster], &borrowed(&node)[..]].concat());
    }

    /// A join token.
    ///
    /// # Panics
    /// It is refused.
    #[must_use]
    pub fn token(&self, args: &[&str]) -> String {
        let answer = self.ok(&[&["token", "--json"], args].concat());
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["token"].as_str().unwrap().to_owned()
    }

    /// The arguments of a join on loopback.
    #[must_use]
    pub fn join_args<'a>(&'a self, token: &'a str, ports: &'a str) -> Vec<&'a str> {
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

    /// Joins a cluster.
    pub fn join(&self, token: &str, args: &[&str]) {
        let node = self.node_args();
        self.ok(&[&["join", token], &borrowed(&node)[..], args].concat());
    }

    fn node_args(&self) -> Vec<String> {
        let mut args = vec!["--node".to_owned(), self.name.clone()];
        for path in &self.paths {
            args.extend(["--path".to_owned(), path.clone()]);
        }
        if let Some(ports) = self.ports {
            args.extend(["--ports".to_owned(), ports.to_string()]);
        }
        args
    }

    /// What it says of the cluster.
    ///
    /// # Panics
    /// It does not answer.
    #[must_use]
    pub fn status(&self) -> Value {
        let answer = self.run(&["status", "--json"]);
        serde_json::from_str(&answer.out)
            .unwrap_or_else(|e| panic!("{e}: {}{}", answer.out, answer.err))
    }

    /// Whether it hears `count` voters, itself included, has its lease and knows a leader.
    #[must_use]
    pub fn hears(&self, count: usize) -> bool {
        let quorum = self.status()["cluster"]["quorum"].clone();
        quorum["alive"] == count && quorum["lease"]["held"] == true && !quorum["leader"].is_null()
    }

    /// A volume or service of this node's status.
    #[must_use]
    pub fn find(&self, list: &str, name: &str) -> Value {
        let status = self.status();
        let found = status["cluster"][list]
            .as_array()
            .and_then(|all| all.iter().find(|one| one["name"] == name).cloned());
        found.unwrap_or(Value::Null)
    }

    /// SIGKILL, as a power cut of the process.
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGSTOP: it holds still, with everything it has open.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM; gives the exit code.
    ///
    /// # Panics
    /// It does not end within `bound`.
    pub fn terminate(&mut self, bound: Duration) -> Option<i32> {
        self.signal(Signal::TERM);
        let mut child = self.child.take().unwrap();
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

/// Looks until it is so.
///
/// # Panics
/// It is not so within the bound.
pub fn eventually(bound: Duration, what: &str, mut look: impl FnMut() -> bool) {
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

fn borrowed(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
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
