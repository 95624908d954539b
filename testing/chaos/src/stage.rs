//! A cluster under load, broken and mended by a test, and judged at the end: all replicas in sync
//! and equal byte by byte, fio content, nothing acknowledged missing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::Value;

use crate::{Cables, Daemon, FaultyDisk, Fio, Relay, Site, eventually, journal::BLOCK_BYTES};

/// The volume, and the service that makes it move.
const VOLUME: &str = "mail";

/// Size of the volume: several regions of the activity log, and small enough to compare.
const VOLUME_SIZE: u64 = 16 << 20;

/// What fio writes of it.
const LOAD_SIZE: u64 = 8 << 20;

/// Room for the metadata behind the data of a disk that the test brings.
const METADATA_ROOM: u64 = 4 << 20;

/// The witness's name.
const WITNESS: &str = "wit";

/// Whatever happened: in this time the cluster is whole again.
const HEAL_BOUND: Duration = Duration::from_secs(40);

/// A link on another path is brought back to the preferred one within this.
const PREFERENCE: Duration = Duration::from_millis(2500);

/// Lines that a daemon may log on one stage: some 20 for each thing that happens.
const LOG_LINES_MAX: usize = 3000;

/// Acknowledged writes that show that the client goes on.
const PROGRESS: u64 = 100;

/// What a test plays on.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Its name, for the message when it can't run.
    pub test: &'static str,
    /// The binary under test.
    pub program: &'static str,
    /// Data nodes; with an even number of them there is a witness too.
    pub data_nodes: &'static [&'static str],
    /// The disks can be made to fail.
    pub faulty_disks: bool,
}

/// A cluster under load.
#[derive(Debug)]
pub struct Stage {
    // In the order of taking down: the load, the nodes, and what they stand on.
    fio: Option<Fio>,
    relay: Relay,
    daemons: BTreeMap<String, Daemon>,
    /// Nodes that would not answer.
    stopped: BTreeSet<String>,
    disks: BTreeMap<String, FaultyDisk>,
    /// The networks.
    pub cables: Cables,
    data_nodes: Vec<String>,
    site: Site,
}

impl Stage {
    /// Plays `round` on a fresh cluster, again and again for `RELEVO_CHAOS_SECONDS` (once if that is
    /// not set), and judges the outcome. The cluster must be whole again some time after each round.
    /// Says that it was skipped where it can't run.
    ///
    /// # Panics
    /// The outcome is not as promised.
    pub fn play(plan: &Plan, mut round: impl FnMut(&mut Self, u32)) {
        if let Err(why) = Self::is_possible(plan) {
            return said::skip(plan.test, why);
        }
        let seconds = std::env::var("RELEVO_CHAOS_SECONDS")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let start = SystemTime::now();
        let mut stage = Self::build(plan);
        let mut rounds = 0;
        while rounds == 0 || start.elapsed().unwrap_or_default() < Duration::from_secs(seconds) {
            if rounds > 0 {
                stage.settle();
            }
            rounds += 1;
            round(&mut stage, rounds);
            stage.expect_whole();
            stage.expect_progress();
        }
        let verdict = stage.finish();
        said::say(format_args!(
            "chaos {}: {rounds} round(s) in {} s, {verdict}",
            plan.test,
            start.elapsed().unwrap_or_default().as_secs()
        ));
    }

    fn is_possible(plan: &Plan) -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err("it needs root, for network namespaces".to_owned());
        }
        Fio::is_installed()?;
        Cables::can_filter()?;
        if plan.faulty_disks {
            FaultyDisk::is_possible()?;
        }
        Ok(())
    }

    fn build(plan: &Plan) -> Self {
        let site = Site::new(plan.program);
        let mut cables = Cables::new();
        let mut names = plan.data_nodes.to_vec();
        if names.len().is_multiple_of(2) {
            names.push(WITNESS);
        }
        let mut daemons = BTreeMap::new();
        let mut disks = BTreeMap::new();
        for name in &names {
            let (namespace, paths) = cables.plug(name);
            let daemon = site.daemon_in(name, namespace, paths);
            daemons.insert((*name).to_owned(), daemon);
        }
        let first = &daemons[names[0]];
        first.init("chaos");
        for name in &names[1..] {
            let kind: &[&str] = if *name == WITNESS {
                &["--witness"]
            } else {
                &[]
            };
            daemons[*name].join(&first.token(kind), kind);
        }
        eventually(HEAL_BOUND, "every node hears every other", || {
            daemons.values().all(|daemon| daemon.hears(names.len()))
        });

        let size = VOLUME_SIZE.to_string();
        let mut create = vec!["volume", "create", VOLUME, "--size", &size];
        let mut places = Vec::new();
        if plan.faulty_disks {
            for name in plan.data_nodes {
                let file = format!("{name}.disk");
                let disk = FaultyDisk::new(site.path(), &file, VOLUME_SIZE + METADATA_ROOM);
                places.push(format!("{name}={}", disk.path().display()));
                disks.insert((*name).to_owned(), disk);
            }
        }
        for place in &places {
            create.extend(["--on", place]);
        }
        first.ok(&create);
        let service = [
            "service",
            "create",
            VOLUME,
            "--volume",
            VOLUME,
            "--no-device",
        ];
        first.ok(&[
            &service[..],
            &["--exec", "/bin/sleep 100000", "--on", names[0]],
        ]
        .concat());

        let sockets: Vec<PathBuf> = plan
            .data_nodes
            .iter()
            .map(|name| daemons[*name].nbd_socket(VOLUME))
            .collect();
        let relay = Relay::start(&site.path().join("relay"), VOLUME, VOLUME_SIZE, &sockets);
        let fio = Fio::start(&relay.uri(), LOAD_SIZE, site.path());
        let stage = Self {
            fio: Some(fio),
            relay,
            daemons,
            stopped: BTreeSet::new(),
            disks,
            cables,
            data_nodes: plan
                .data_nodes
                .iter()
                .map(|name| (*name).to_owned())
                .collect(),
            site,
        };
        stage.expect_progress();
        stage
    }

    /// Names of the data nodes.
    #[must_use]
    pub fn data_nodes(&self) -> &[String] {
        &self.data_nodes
    }

    /// The volume, as the node sees it that knows the most recent configuration.
    #[must_use]
    pub fn volume(&self) -> Value {
        self.daemons
            .values()
            .filter(|daemon| daemon.is_started() && !self.stopped.contains(daemon.name()))
            .map(|daemon| daemon.find("volumes", VOLUME))
            .filter(|volume| !volume.is_null())
            .max_by_key(|volume| volume["epoch"].as_u64())
            .unwrap_or(Value::Null)
    }

    /// The primary; waits for one.
    #[must_use]
    pub fn primary(&self) -> String {
        let mut found = String::new();
        eventually(HEAL_BOUND, "there is a primary", || {
            let name = self.volume()["primary"].clone();
            found = name.as_str().unwrap_or_default().to_owned();
            !found.is_empty()
        });
        found
    }

    /// A data node that is not primary.
    ///
    /// # Panics
    /// There is one data node only.
    #[must_use]
    pub fn secondary(&self) -> String {
        let primary = self.primary();
        let mut others = self.data_nodes.iter().filter(|name| **name != primary);
        others.next().unwrap().clone()
    }

    fn daemon(&mut self, name: &str) -> &mut Daemon {
        self.daemons.get_mut(name).unwrap()
    }

    /// SIGKILL.
    ///
    /// # Panics
    /// There is no such node.
    pub fn kill(&mut self, name: &str) {
        self.daemon(name).kill();
    }

    /// Starts a daemon again.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(&mut self, name: &str) {
        self.daemon(name).start();
    }

    /// SIGSTOP.
    ///
    /// # Panics
    /// There is no such node.
    pub fn stop(&mut self, name: &str) {
        self.daemon(name).stop();
        self.stopped.insert(name.to_owned());
    }

    /// SIGCONT.
    ///
    /// # Panics
    /// There is no such node.
    pub fn go_on(&mut self, name: &str) {
        self.daemon(name).go_on();
        self.stopped.remove(name);
    }

    /// Says something to a node's daemon, which must do it.
    ///
    /// # Panics
    /// It is refused.
    pub fn say(&self, name: &str, args: &[&str]) -> String {
        self.daemons[name].ok(args)
    }

    /// Asks a node's daemon until its answer has these words.
    ///
    /// # Panics
    /// It never has.
    pub fn expect_answer(&self, name: &str, args: &[&str], words: &str) {
        let what = format!("{name} says `{words}` to {args:?}");
        eventually(HEAL_BOUND, &what, || self.ask(name, args).contains(words));
    }

    /// What a node's daemon says of the cluster.
    ///
    /// # Panics
    /// It does not answer.
    #[must_use]
    pub fn status(&self, name: &str) -> Value {
        self.daemons[name].status()["cluster"].clone()
    }

    /// A directory that all machines have.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.site.path()
    }

    /// What a node's daemon says to a question, such as `status`, whose exit code is an answer too.
    #[must_use]
    pub fn ask(&self, name: &str, args: &[&str]) -> String {
        self.daemons[name].run(args).out
    }

    /// Says something to a node's daemon that takes a while.
    ///
    /// # Panics
    /// The program can't be started.
    #[must_use]
    pub fn begin(&self, name: &str, args: &[&str]) -> std::process::Child {
        self.daemons[name].begin(args)
    }

    /// Says something to a node's daemon, which must refuse it; gives its words.
    ///
    /// # Panics
    /// It is done.
    pub fn expect_refusal(&self, name: &str, args: &[&str]) -> String {
        self.daemons[name].refused(args)
    }

    /// Waits until exactly these nodes have a replica, and nothing is left on the others.
    ///
    /// # Panics
    /// It does not happen.
    pub fn expect_replicas_on(&self, names: &[&str]) {
        let what = format!("the replicas are on {names:?} alone");
        eventually(HEAL_BOUND, &what, || {
            let volume = self.volume();
            let replicas = volume["replicas"].as_array().cloned().unwrap_or_default();
            let listed: BTreeSet<&str> = replicas
                .iter()
                .filter_map(|replica| replica["node"].as_str())
                .collect();
            let has_file = |name: &String| {
                let pool = self.site.path().join(name).join("pool");
                std::fs::read_dir(pool).is_ok_and(|files| files.count() > 0)
            };
            let kept = self.data_nodes.iter().filter(|name| has_file(name));
            let wanted: BTreeSet<&str> = names.iter().copied().collect();
            listed == wanted && kept.map(String::as_str).collect::<BTreeSet<_>>() == wanted
        });
    }

    /// A node's disk, on a stage with disks that fail.
    ///
    /// # Panics
    /// The disks of this stage don't fail.
    #[must_use]
    pub fn disk(&self, name: &str) -> &FaultyDisk {
        &self.disks[name]
    }

    /// `relevo service start`, as an operator does who repaired what failed.
    ///
    /// # Panics
    /// Nobody takes the order.
    pub fn start_service(&self) {
        eventually(HEAL_BOUND, "the service may be started", || {
            self.daemons.values().any(|daemon| {
                let started = daemon.is_started() && !self.stopped.contains(daemon.name());
                started && daemon.run(&["service", "start", VOLUME]).code == 0
            })
        });
    }

    /// Waits until another node is primary.
    ///
    /// # Panics
    /// It does not happen.
    pub fn expect_takeover_from(&self, name: &str) -> String {
        let mut found = String::new();
        let what = format!("another node than {name} is primary");
        eventually(HEAL_BOUND, &what, || {
            found = self.primary();
            found != name
        });
        found
    }

    /// Waits until a node is not in the in-sync set.
    ///
    /// # Panics
    /// It does not happen.
    pub fn expect_out_of_sync(&self, name: &str) {
        let what = format!("{name} left the in-sync set");
        eventually(HEAL_BOUND, &what, || !self.in_sync().contains(name));
    }

    fn in_sync(&self) -> BTreeSet<String> {
        let volume = self.volume();
        let names = volume["in_sync"].as_array().cloned().unwrap_or_default();
        names
            .iter()
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect()
    }

    /// Waits until every replica is in sync.
    ///
    /// # Panics
    /// It does not happen.
    pub fn expect_whole(&self) {
        let start = SystemTime::now();
        while self.in_sync().len() < self.data_nodes.len() {
            assert!(
                start.elapsed().unwrap_or_default() < HEAL_BOUND,
                "the replicas are not in sync within {} s: {:#}",
                HEAL_BOUND.as_secs(),
                self.volume()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Lets links find back to the path that they prefer, which takes their replica out of the in-sync
    /// set for a moment: the next failure would be the second one at once.
    pub fn settle(&self) {
        self.expect_whole();
        std::thread::sleep(PREFERENCE);
        self.expect_whole();
    }

    /// Waits until the client got some further writes acknowledged.
    ///
    /// # Panics
    /// It does not, or fio found something wrong.
    pub fn expect_progress(&self) {
        let before = self.writes();
        let start = SystemTime::now();
        while self.fio.as_ref().is_some_and(Fio::is_running) && self.writes() < before + PROGRESS {
            assert!(
                start.elapsed().unwrap_or_default() < HEAL_BOUND,
                "the client does not go on within {} s: {:#}",
                HEAL_BOUND.as_secs(),
                self.volume()
            );
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Writes acknowledged so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.relay.journal().writes()
    }

    /// Judges. Returns a sentence for the log.
    fn finish(mut self) -> String {
        let fio = self.fio.take().unwrap();
        let runs = fio.finish().unwrap_or_else(|words| panic!("{words}"));
        self.expect_whole();
        let content = self.relay.read_all();
        {
            let journal = self.relay.journal();
            assert!(
                journal.complaints().is_empty(),
                "{:?}",
                journal.complaints()
            );
            let missing = journal.missing(&content);
            assert!(
                missing.is_empty(),
                "acknowledged and not there: blocks {missing:?}"
            );
        }
        let asked = self.primary();
        self.daemons[&asked].ok(&["service", "stop", VOLUME]);
        eventually(HEAL_BOUND, "the volume is closed", || {
            self.volume()["primary"].is_null()
        });
        let backings: Vec<(String, PathBuf)> = self
            .data_nodes
            .iter()
            .map(|name| (name.clone(), self.backing(name)))
            .collect();
        for daemon in self.daemons.values_mut() {
            assert_eq!(daemon.terminate(Duration::from_secs(20)), Some(0));
            let log = daemon.log();
            assert!(!log.contains("panicked"), "{}: {log}", daemon.name());
            let lines = log.lines().count();
            assert!(lines < LOG_LINES_MAX, "a storm in the log: {lines} lines");
        }
        for (name, backing) in backings {
            let replica = data_area(&backing);
            if let Some(block) = first_difference(&replica, &content) {
                panic!("the replica of {name} differs from what was read, first in block {block}");
            }
        }
        let (writes, moves, repeats) = (self.writes(), self.relay.moves(), self.relay.repeats());
        format!(
            "{writes} writes acknowledged, {runs} runs of fio verified, {moves} primaries, \
             {repeats} requests sent again, {} replicas equal",
            self.data_nodes.len()
        )
    }

    /// The file that holds a node's replica.
    fn backing(&self, name: &str) -> PathBuf {
        if let Some(disk) = self.disks.get(name) {
            return disk.behind().to_owned();
        }
        let pool = self.site.path().join(name).join("pool");
        let mut files = std::fs::read_dir(&pool).unwrap();
        let file = files.next().unwrap().unwrap().path();
        assert!(files.next().is_none(), "{} has two files", pool.display());
        file
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("RELEVO_CHAOS_TROUBLES").is_some() {
            for trouble in self.relay.troubles() {
                eprintln!("relay: {trouble}");
            }
        }
        // A daemon whose disk hangs can't even be killed.
        for disk in self.disks.values() {
            disk.set(None);
        }
    }
}

fn data_area(backing: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;

    let mut content = vec![0; usize::try_from(VOLUME_SIZE).unwrap()];
    let file = std::fs::File::open(backing).unwrap();
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

fn first_difference(one: &[u8], other: &[u8]) -> Option<usize> {
    let mut blocks = one.chunks(BLOCK_BYTES).zip(other.chunks(BLOCK_BYTES));
    blocks
        .position(|(one, other)| one != other)
        .or_else(|| (one.len() != other.len()).then_some(one.len().min(other.len()) / BLOCK_BYTES))
}
