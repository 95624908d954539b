//! The machines of the demo: namespaces joined by cables, with a daemon in each.
//!
//! ```text
//!            hub: bridges `lan` and `repl`
//!     lan ┌──────────┬──────────┬──────────┐
//!        one        two      witness     client
//!    repl └──────────┘
//! ```
//!
//! Nothing here has a name outside this process: when it ends, in whatever way, the kernel kills
//! the daemons and takes the namespaces, interfaces and mounts back.

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use anyhow::{Context as _, bail};
use relevo_host::{command::NsCommand, hub::Hub, mountns::MountNs, netns::NetNs, userns};
use relevo_server::api::{
    ClusterStatus, InitRequest, JoinRequest, NodeRequest, PathRequest, TokenRequest, VolumeStatus,
};
use relevo_types::{
    Sensitivity,
    cluster::{NodeKind, PathAddress, Ports},
};

use crate::{
    api::{Api, random_word, wait_for},
    progress::Progress,
};

/// Data nodes come up and answer within this, also on a loaded machine.
const START_BOUND: Duration = Duration::from_secs(20);

/// The service's virtual address on the network of the namespaces.
const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);

/// The same on loopback, where every address of 127/8 exists already.
const LOOPBACK_SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 77, 0, 100);

/// Port of the demo's ledger.
const SERVICE_PORT: u16 = 8080;

/// Where the cluster is built.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Surroundings {
    /// Network namespaces, as root.
    Namespaces,
    /// Network namespaces inside an unprivileged user namespace.
    UserNamespaces,
    /// Loopback addresses: no cables to cut.
    Loopback,
}

impl Surroundings {
    /// In words, for the report.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Namespaces => "namespaces",
            Self::UserNamespaces => "user namespaces",
            Self::Loopback => "loopback",
        }
    }
}

/// Chooses the surroundings and enters a user namespace if that is what they are. The process must
/// have one thread.
///
/// # Errors
/// The surroundings that were asked for are not to be had.
pub fn enter(asked: Option<Surroundings>) -> anyhow::Result<Surroundings> {
    let root = rustix::process::geteuid().is_root();
    match asked {
        Some(Surroundings::Namespaces) => {
            NetNs::new("trial")?;
            Ok(Surroundings::Namespaces)
        }
        Some(Surroundings::UserNamespaces) => {
            userns::try_enter_user_namespace()?;
            Ok(Surroundings::UserNamespaces)
        }
        Some(Surroundings::Loopback) => Ok(Surroundings::Loopback),
        None if root && NetNs::new("trial").is_ok() => Ok(Surroundings::Namespaces),
        None => match userns::try_enter_user_namespace() {
            Ok(()) => Ok(Surroundings::UserNamespaces),
            Err(why) => {
                eprintln!("no namespaces, so the cluster is built on loopback: {why}");
                Ok(Surroundings::Loopback)
            }
        },
    }
}

/// A machine of the demo.
#[derive(Debug)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its place; `None` on loopback.
    pub namespace: Option<NetNs>,
    /// What it mounted; made with its first daemon, gone with its power.
    mounts: Option<MountNs>,
    /// The daemon's state directory; the client has none.
    pub state_dir: PathBuf,
    daemon: Option<Child>,
    kind: Option<NodeKind>,
    paths: Vec<(&'static str, Ipv4Addr)>,
}

/// Machines, cables and the directory that holds everything.
#[derive(Debug)]
pub struct Lab {
    /// Where it was built.
    pub surroundings: Surroundings,
    /// What could not be had there, in sentences.
    pub left_out: Vec<String>,
    /// Whether volumes become block devices.
    pub devices: bool,
    pub(crate) api: Api,
    directory: PathBuf,
    program: PathBuf,
    hub: Option<Hub>,
    machines: Vec<Machine>,
}

impl Lab {
    /// Builds the machines, starts the daemons and joins them to a cluster.
    ///
    /// # Errors
    /// What could not be built. What was built until then is gone.
    pub fn build(surroundings: Surroundings, progress: &Progress) -> anyhow::Result<Self> {
        Self::build_in(
            &std::env::temp_dir(),
            surroundings,
            NodeKind::Witness,
            progress,
        )
    }

    /// The same with its files in a new directory below `parent`, and a third machine of that kind:
    /// `witness`, or the data node `three`.
    ///
    /// # Errors
    /// As of [`Self::build`].
    pub fn build_in(
        parent: &Path,
        surroundings: Surroundings,
        third: NodeKind,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let directory = parent.join(format!("relevo-demo-{}", random_word()));
        fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
        let mut lab = Self {
            surroundings,
            left_out: Vec::new(),
            devices: false,
            api: Api::new()?,
            directory,
            program: std::env::current_exe().context("find this program")?,
            hub: None,
            machines: Vec::new(),
        };
        lab.note_what_is_left_out();
        progress.step("building machines and cables");
        lab.build_machines(third)?;
        progress.step("starting three daemons");
        for name in lab.voters() {
            lab.start_daemon(&name)?;
        }
        progress.step("joining them to a cluster with one-time tokens");
        lab.join_all()?;
        progress.line(format!(
            "cluster `demo` is up in {}: {}",
            surroundings.words(),
            match third {
                NodeKind::Data => "data nodes `one`, `two` and `three`",
                NodeKind::Witness => "data nodes `one` and `two`, and `witness`",
            }
        ));
        Ok(lab)
    }

    fn note_what_is_left_out(&mut self) {
        let missing = |path: &str| !Path::new(path).exists();
        self.devices = false;
        match self.surroundings {
            Surroundings::Namespaces if missing("/dev/fuse") || missing("/dev/loop-control") => {
                self.left_out.push(
                    "block device and ext4: this machine has no /dev/fuse or no /dev/loop-control; \
                     the ledger writes to the volume over NBD"
                        .to_owned(),
                );
            }
            Surroundings::Namespaces if !relevo_host::mkfs::is_available("ext4") => {
                self.left_out.push(
                    "block device and ext4: mkfs.ext4 is not installed (Debian: e2fsprogs); the \
                     ledger writes to the volume over NBD"
                        .to_owned(),
                );
            }
            Surroundings::Namespaces => self.devices = true,
            Surroundings::UserNamespaces => self.left_out.push(
                "block device and ext4: loop devices need root; the ledger writes to the volume \
                 over NBD"
                    .to_owned(),
            ),
            Surroundings::Loopback => {
                self.left_out.push(
                    "block device and ext4: they need root; the ledger writes to the volume over \
                     NBD"
                    .to_owned(),
                );
                self.left_out.push(
                    "cables, the virtual address and the scenes that need them: they need network \
                     namespaces; a fixed loopback address stands for the virtual one"
                        .to_owned(),
                );
            }
        }
    }

    /// The machines with a daemon.
    fn voters(&self) -> Vec<String> {
        let voters = self
            .machines
            .iter()
            .filter(|machine| machine.kind.is_some());
        voters.map(|machine| machine.name.clone()).collect()
    }

    fn build_machines(&mut self, third: NodeKind) -> anyhow::Result<()> {
        let (third_name, replicates) = match third {
            NodeKind::Data => ("three", true),
            NodeKind::Witness => ("witness", false),
        };
        let plan: [(&str, Option<NodeKind>, u8, bool); 4] = [
            ("one", Some(NodeKind::Data), 1, true),
            ("two", Some(NodeKind::Data), 2, true),
            (third_name, Some(third), 3, replicates),
            ("client", None, 9, false),
        ];
        if self.has_cables() {
            self.hub = Some(Hub::new(&["lan", "repl"])?);
        }
        for (name, kind, number, replicates) in plan {
            let state_dir = self.directory.join(name);
            fs::create_dir(&state_dir)?;
            let mut paths = Vec::new();
            let namespace = match &self.hub {
                Some(hub) => {
                    let namespace = NetNs::new(name)?;
                    paths.push(("lan", Ipv4Addr::new(10, 77, 0, number)));
                    if replicates {
                        paths.push(("repl", Ipv4Addr::new(10, 78, 0, number)));
                    }
                    for (path, address) in &paths {
                        hub.plug(name, &namespace, path, IpAddr::V4(*address))?;
                    }
                    Some(namespace)
                }
                None => {
                    paths.push(("lan", Ipv4Addr::new(127, 77, 0, number)));
                    None
                }
            };
            let name = name.to_owned();
            self.machines.push(Machine {
                name,
                namespace,
                mounts: None,
                state_dir,
                daemon: None,
                kind,
                paths,
            });
        }
        Ok(())
    }

    fn join_all(&self) -> anyhow::Result<()> {
        let one = &self.machine("one").state_dir;
        let request = InitRequest {
            cluster: "demo".to_owned(),
            sensitivity: Sensitivity::Normal,
            node: self.machine("one").request(),
        };
        self.api
            .call(one, async |client| client.init(&request).await)?;
        for machine in &self.machines[1..] {
            let Some(kind) = machine.kind else { continue };
            let wish = TokenRequest {
                kind: Some(kind),
                valid_s: 600,
            };
            let token = self
                .api
                .call(one, async |client| client.create_token(&wish).await)?;
            let request = JoinRequest {
                token: token.token,
                kind,
                node: machine.request(),
            };
            self.api.call(&machine.state_dir, async |client| {
                client.join(&request).await
            })?;
        }
        wait_for(START_BOUND, "three voters that hear each other", || {
            self.cluster().filter(|cluster| cluster.quorum.alive == 3)
        })?;
        Ok(())
    }

    /// Whether machines hang on cables that can be cut.
    #[must_use]
    pub fn has_cables(&self) -> bool {
        self.surroundings != Surroundings::Loopback
    }

    /// The service's address.
    #[must_use]
    pub fn service_address(&self) -> Ipv4Addr {
        if self.has_cables() {
            SERVICE_ADDRESS
        } else {
            LOOPBACK_SERVICE_ADDRESS
        }
    }

    /// Where the ledger is reached.
    #[must_use]
    pub fn service_socket(&self) -> SocketAddr {
        SocketAddr::new(self.service_address().into(), SERVICE_PORT)
    }

    /// Where the ledger's file system is mounted, on whichever node.
    #[must_use]
    pub fn mount_point(&self) -> PathBuf {
        self.directory.join("srv")
    }

    /// A file of the demo.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// This program, of which every process of the demo is a copy.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A machine by name.
    ///
    /// # Panics
    /// When the name is not one of the four that [`Self::build`] made.
    #[must_use]
    pub fn machine(&self, name: &str) -> &Machine {
        self.machines
            .iter()
            .find(|machine| machine.name == name)
            .expect("one of the four machines")
    }

    fn machine_mut(&mut self, name: &str) -> &mut Machine {
        self.machines
            .iter_mut()
            .find(|machine| machine.name == name)
            .expect("one of the four machines")
    }

    /// Starts a machine's daemon and waits until it answers.
    ///
    /// # Errors
    /// It ended or does not answer; the text has its last words.
    pub fn start_daemon(&mut self, name: &str) -> anyhow::Result<()> {
        let log_path = self.directory.join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(&log_path)?;
        let program = self.program.clone();
        let machine = self.machine_mut(name);
        let mut command = NsCommand::new(&program)
            .arg("--state-dir")
            .arg(&machine.state_dir)
            .arg("daemon")
            .arg("--device-dir")
            .arg(machine.state_dir.join("dev"))
            .stdout(log.try_clone()?)
            .stderr(log)
            .own_group();
        if let Some(namespace) = &machine.namespace {
            let mounts = match machine.mounts.take() {
                Some(mounts) => mounts,
                None => MountNs::new()?,
            };
            command = command.in_namespace(namespace).in_mounts(&mounts);
            machine.mounts = Some(mounts);
        }
        machine.daemon = Some(command.spawn()?);
        let state_dir = machine.state_dir.clone();
        wait_for(
            START_BOUND,
            &format!("the daemon of `{name}` to answer"),
            || {
                self.api
                    .call(&state_dir, async |client| client.status().await)
                    .ok()
            },
        )
        .with_context(|| format!("its log ends with: {}", tail(&log_path)))?;
        Ok(())
    }

    /// Kills every process of a machine at once. Its cables stay.
    ///
    /// # Errors
    /// A process does not die.
    pub fn kill_everything(&mut self, name: &str) -> anyhow::Result<()> {
        let machine = self.machine_mut(name);
        match &machine.namespace {
            Some(namespace) => {
                namespace.kill_all()?;
            }
            None => {
                if let Some(daemon) = &mut machine.daemon {
                    daemon.kill().context("kill the daemon")?;
                }
            }
        }
        if let Some(mut daemon) = machine.daemon.take() {
            daemon.wait().context("wait for the killed daemon")?;
        }
        Ok(())
    }

    /// Takes a machine's power: its cables are cut, its processes killed, its mounts forgotten.
    ///
    /// # Errors
    /// As of [`Self::set_cables`] and [`Self::kill_everything`].
    pub fn cut_power(&mut self, name: &str) -> anyhow::Result<()> {
        if self.has_cables() {
            self.set_cables(name, None, false)?;
        }
        self.kill_everything(name)?;
        self.machine_mut(name).mounts = None;
        Ok(())
    }

    /// Whether a machine's daemon runs.
    #[must_use]
    pub fn is_up(&self, name: &str) -> bool {
        self.machine(name).daemon.is_some()
    }

    /// Processor time that a machine's daemon has taken so far, all its threads together.
    ///
    /// # Errors
    /// It does not run.
    pub fn processor_time(&self, name: &str) -> anyhow::Result<Duration> {
        let daemon = self.machine(name).daemon.as_ref();
        let pid = daemon.context("its daemon does not run")?.id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Behind the name, which may hold anything: fields 14 and 15 of proc(5).
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().context("read /proc/PID/stat"))
            .sum::<anyhow::Result<u64>>()?;
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_micros(ticks * 1_000_000 / per_second.max(1)))
    }

    /// Bytes that arrived at a machine on one of its paths; `None` on loopback, where they can't be told
    /// from those of others.
    ///
    /// # Errors
    /// It has no such path, or its daemon does not run.
    pub fn received_bytes(&self, name: &str, path: &str) -> anyhow::Result<Option<u64>> {
        if !self.has_cables() {
            return Ok(None);
        }
        let daemon = self.machine(name).daemon.as_ref();
        let pid = daemon.context("its daemon does not run")?.id();
        let devices = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        let prefix = format!("{path}:");
        let line = devices
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(&prefix));
        let bytes = line.and_then(|line| line.split_whitespace().next());
        let bytes = bytes.with_context(|| format!("`{name}` has no path `{path}`"))?;
        Ok(Some(bytes.parse().context("read /proc/PID/net/dev")?))
    }

    /// Cuts or mends a machine's cables: those of one path, or all.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set_cables(&self, name: &str, path: Option<&str>, up: bool) -> anyhow::Result<()> {
        let Some(hub) = &self.hub else {
            bail!("there are no cables on loopback")
        };
        // The replication path first: whoever connects when it comes back shall find it.
        for (own, _) in self.machine(name).paths.iter().rev() {
            if path.is_none_or(|path| path == *own) {
                hub.set_cable(name, own, up)?;
            }
        }
        Ok(())
    }

    /// What the cluster looks like to the first data node that answers and has a leader.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterStatus> {
        self.voters()
            .iter()
            .filter(|name| self.is_up(name))
            .filter_map(|name| self.api.cluster(&self.machine(name).state_dir))
            .filter(|cluster| cluster.quorum.alive >= cluster.quorum.needed)
            .max_by_key(|cluster| cluster.revision)
    }

    /// A volume, as the cluster sees it.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<VolumeStatus> {
        self.cluster()?
            .volumes
            .into_iter()
            .find(|volume| volume.name == name)
    }

    /// The addresses that a machine's kernel has.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn has_address(&self, name: &str, address: Ipv4Addr) -> anyhow::Result<bool> {
        let Some(namespace) = &self.machine(name).namespace else {
            return Ok(false);
        };
        let addresses = namespace.with_netlink(async |netlink| netlink.addresses().await)?;
        Ok(addresses
            .iter()
            .any(|known| known.address == IpAddr::V4(address)))
    }

    /// Tells how to look at the cluster from another terminal.
    pub fn explain_how_to_reach(&self) {
        println!("\nThe cluster stays up until you press Ctrl-C. From another terminal:");
        for machine in self
            .machines
            .iter()
            .filter(|machine| machine.kind.is_some())
        {
            let state_dir = machine.state_dir.display();
            println!(
                "  relevo --state-dir {state_dir} status      # as `{}` sees it",
                machine.name
            );
        }
        if let (Some(daemon), true) = (&self.machine("one").daemon, self.has_cables()) {
            println!(
                "  nsenter --net=/proc/{}/ns/net ip address   # on `one`",
                daemon.id()
            );
        }
        println!("  the daemons' logs are in {}", self.directory.display());
        println!("Here `relevo` is {}", self.program.display());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let names = self
            .machines
            .iter()
            .rev()
            .map(|machine| machine.name.clone());
        for name in names.collect::<Vec<_>>() {
            if let Err(error) = self.kill_everything(&name) {
                eprintln!("clean up `{name}`: {error:#}");
            }
        }
        if std::env::var_os("RELEVO_DEMO_KEEP_FILES").is_some() {
            eprintln!("files are kept in {}", self.directory.display());
        } else if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("remove {}: {error}", self.directory.display());
        }
    }
}

impl Machine {
    fn request(&self) -> NodeRequest {
        let path = |(name, address): &(&str, Ipv4Addr)| PathRequest {
            name: (*name).to_owned(),
            address: PathAddress::Ip(IpAddr::V4(*address)),
            replication: *name == "repl",
        };
        NodeRequest {
            name: Some(self.name.clone()),
            paths: self.paths.iter().map(path).collect(),
            ports: Ports::default(),
        }
    }
}

/// The last words of a log.
fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join(" / ")
}
