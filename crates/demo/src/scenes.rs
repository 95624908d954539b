//! The scenes: what is done to the cluster, what is watched, what is checked.
//!
//! Every scene begins with a healthy cluster and ends with one: act, watch the client until it is
//! served steadily again, mend, wait until all replicas are in sync, ask the service for every
//! entry it ever acknowledged, and compare the replicas block by block.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use anyhow::Context as _;
use relevo_server::api::{
    AddressRequest, CreateServiceRequest, CreateVolumeRequest, MountRequest, MoveServiceRequest,
    PartRequest, PlacementRequest, ProcessRequest, ServiceState, VolumePartRequest,
};

use crate::{
    api::{all_in_sync, now, wait_for},
    interrupt,
    lab::Lab,
    ledger::{Client, kill_ledger},
    progress::Progress,
    report::SceneReport,
};

/// Name of the demo's volume and of its service.
const NAME: &str = "ledger";

/// Small, so that comparing replicas is quick; large enough for ext4 with a journal, and for a
/// block for every entry where the ledger writes to the volume itself.
const VOLUME_SIZE: u64 = 256 << 20;

/// A takeover takes a second or two; after this the scene has failed.
const SERVE_BOUND: Duration = Duration::from_secs(30);

/// Resync of a small volume takes seconds; after this the scene has failed.
const HEAL_BOUND: Duration = Duration::from_secs(60);

/// So many entries acknowledged after a disturbance count as steady service.
const STEADY_ENTRIES: usize = 20;

/// How long the undisturbed client is watched before each disturbance.
const CALM: Duration = Duration::from_millis(300);

/// A kernel-held address with a lifetime of a second is gone after 1.25 s; some more for the clock
/// tick and a loaded machine.
const ADDRESS_GONE_BOUND: Duration = Duration::from_millis(2000);

/// A data link that had to be made on another path is back on the replication path after this.
const LINK_RETURN: Duration = Duration::from_secs(3);

/// A scene of the demo.
#[derive(Debug)]
pub struct Scene {
    /// As `--scene` takes it.
    pub name: &'static str,
    /// What happens, for the progress display. `ACTIVE` stands for the active node.
    pub what: &'static str,
    needs_cables: bool,
    act: fn(&mut Stage<'_>, &mut SceneReport) -> anyhow::Result<()>,
}

/// All scenes in the order of the demo.
pub const SCENES: &[Scene] = &[
    Scene {
        name: "power-loss",
        what: "the active node loses power: everything on it is killed and its cables are cut",
        needs_cables: true,
        act: power_loss,
    },
    Scene {
        name: "return",
        what: "a node that lost power returns and is resynced under load",
        needs_cables: false,
        act: node_return,
    },
    Scene {
        name: "process-kill",
        what: "every process of the active node is killed while its kernel lives on",
        needs_cables: false,
        act: process_kill,
    },
    Scene {
        name: "service-crash",
        what: "the service's process alone is killed",
        needs_cables: false,
        act: service_crash,
    },
    Scene {
        name: "switchover",
        what: "the service is moved by command",
        needs_cables: false,
        act: switchover,
    },
    Scene {
        name: "partition",
        what: "the active node is cut off from all others",
        needs_cables: true,
        act: partition,
    },
    Scene {
        name: "replication-cut",
        what: "the replication path alone is cut",
        needs_cables: true,
        act: replication_cut,
    },
    Scene {
        name: "witness-loss",
        what: "the witness is killed",
        needs_cables: false,
        act: witness_loss,
    },
];

/// The cluster with its service and its client, between scenes.
#[derive(Debug)]
pub struct Stage<'lab> {
    lab: &'lab mut Lab,
    progress: &'lab Progress,
    client: Client,
}

impl<'lab> Stage<'lab> {
    /// Creates the volume and the service and starts the client.
    ///
    /// # Errors
    /// What the cluster refused, or did not do in time.
    pub fn set(lab: &'lab mut Lab, progress: &'lab Progress) -> anyhow::Result<Self> {
        progress.step("creating a replicated volume");
        let state_dir = lab.machine("one").state_dir.clone();
        let volume = CreateVolumeRequest {
            name: NAME.to_owned(),
            size: VOLUME_SIZE,
            replicas: Vec::new(),
            force: false,
        };
        lab.api.call(&state_dir, async |client| {
            client.create_volume(&volume).await
        })?;
        progress.step("starting the service");
        let service = service_request(lab);
        lab.api.call(&state_dir, async |client| {
            client.create_service(&service).await
        })?;
        wait_for(SERVE_BOUND, "the service to run", || active_node(lab))
            .with_context(|| explain(lab))?;
        progress.step("starting the client");
        let client = Client::start(lab)?;
        wait_for(
            SERVE_BOUND,
            "the client's first entries to be acknowledged",
            || (client.acknowledged_after(Duration::ZERO) >= STEADY_ENTRIES).then_some(()),
        )
        .with_context(|| explain(lab))?;
        progress.line(format!(
            "service `{NAME}` answers at http://{}, {}; a client posts entries without a pause",
            lab.service_socket(),
            if lab.devices {
                "on ext4 on a replicated block device"
            } else {
                "on a replicated volume over NBD"
            }
        ));
        Ok(Self {
            lab,
            progress,
            client,
        })
    }

    /// Whether the surroundings allow the scene.
    #[must_use]
    pub fn possible(&self, scene: &Scene) -> bool {
        !scene.needs_cables || self.lab.has_cables()
    }

    /// In words, where the cluster was built.
    #[must_use]
    pub fn surroundings(&self) -> &'static str {
        self.lab.surroundings.words()
    }

    /// What the surroundings did not allow.
    #[must_use]
    pub fn left_out(&self) -> Vec<String> {
        self.lab.left_out.clone()
    }

    /// Plays one scene from a healthy cluster to a healthy cluster.
    ///
    /// # Errors
    /// Only what stops the demo; what the scene found wrong is in its report.
    pub fn play(&mut self, scene: &Scene, run: u32) -> anyhow::Result<SceneReport> {
        let active = self.active().context("before the scene")?;
        self.progress
            .line(format!("{}: {} (active: {active})", scene.name, scene.what));
        let mut report = SceneReport {
            name: scene.name.to_owned(),
            run,
            active_before: active,
            active_after: String::new(),
            longest_gap_ms: 0,
            acknowledged: 0,
            missing: 0,
            recovered: false,
            replicas_equal: None,
            healed_ms: 0,
            notes: Vec::new(),
            failures: Vec::new(),
        };
        std::thread::sleep(CALM);
        let begin = now();
        if let Err(error) = (scene.act)(self, &mut report) {
            interrupt::check()?;
            report.failures.push(format!("{error:#}"));
            report.failures.push(explain(self.lab));
        }
        let end = now();
        report.longest_gap_ms = millis(self.client.longest_gap(begin, end));
        report.acknowledged = self.client.acknowledged_between(begin, end);
        report.active_after = active_node(self.lab).unwrap_or_default();
        self.mend_and_check(&mut report)?;
        self.progress.line(format!(
            "{}: served by {}; longest wait {} ms; {} acknowledged, {} missing{}",
            scene.name,
            if report.active_after.is_empty() {
                "nobody"
            } else {
                &report.active_after
            },
            report.longest_gap_ms,
            report.acknowledged,
            report.missing,
            if report.ok() { "" } else { "; FAILED" },
        ));
        Ok(report)
    }

    fn mend_and_check(&mut self, report: &mut SceneReport) -> anyhow::Result<()> {
        self.progress.step(format!(
            "{}: mending, waiting for all replicas",
            report.name
        ));
        let mended = now();
        let healed = self.mend().and_then(|()| {
            wait_for(
                HEAL_BOUND,
                "every replica to be in sync and the service to run",
                || {
                    let volume = self.lab.volume(NAME)?;
                    (all_in_sync(&volume) && active_node(self.lab).is_some()).then_some(())
                },
            )
        });
        if report.healed_ms == 0 {
            report.healed_ms = millis(now().saturating_sub(mended));
        }
        match healed {
            Ok(()) => report.recovered = report.failures.is_empty(),
            Err(error) => {
                interrupt::check()?;
                report.failures.push(format!("{error:#}"));
                report.failures.push(explain(self.lab));
                return Ok(());
            }
        }
        self.progress
            .step(format!("{}: asking for every entry", report.name));
        self.client.pause()?;
        match self.client.missing(self.lab) {
            Ok(missing) => report.missing = missing,
            Err(error) => report.failures.push(format!("{error:#}")),
        }
        self.progress
            .step(format!("{}: comparing the replicas", report.name));
        match self.compare_replicas() {
            Ok(equal) => report.replicas_equal = Some(equal),
            Err(error) => report.failures.push(format!("{error:#}")),
        }
        let resumed = now();
        self.client.resume()?;
        let served = wait_for(
            SERVE_BOUND,
            "the client to be served after the scene",
            || (self.client.acknowledged_after(resumed) >= STEADY_ENTRIES).then_some(()),
        );
        if let Err(error) = served {
            interrupt::check()?;
            report.recovered = false;
            report.failures.push(format!("{error:#}"));
        }
        Ok(())
    }

    /// Everything that a scene broke is whole again: cables and daemons.
    fn mend(&mut self) -> anyhow::Result<()> {
        for name in ["one", "two", "witness"] {
            if self.lab.has_cables() {
                self.lab.set_cables(name, None, true)?;
            }
            if !self.lab.is_up(name) {
                self.lab.start_daemon(name)?;
            }
        }
        Ok(())
    }

    fn active(&self) -> anyhow::Result<String> {
        wait_for(SERVE_BOUND, "the service to run", || active_node(self.lab))
            .with_context(|| explain(self.lab))
    }

    /// Waits until the client was served steadily after `since`.
    fn served_again(&self, since: Duration) -> anyhow::Result<()> {
        wait_for(SERVE_BOUND, "the client to be served again", || {
            (self.client.acknowledged_after(since) >= STEADY_ENTRIES).then_some(())
        })
    }

    /// Reads both backing files whole. The client is paused; what the file system still writes of
    /// its own gets a few seconds to end.
    fn compare_replicas(&self) -> anyhow::Result<bool> {
        // A node may know only its own backing.
        let backings: BTreeSet<PathBuf> = ["one", "two"]
            .into_iter()
            .filter_map(|name| self.lab.api.cluster(&self.lab.machine(name).state_dir))
            .flat_map(|cluster| cluster.volumes)
            .filter(|volume| volume.name == NAME)
            .flat_map(|volume| volume.replicas)
            .filter_map(|replica| replica.backing)
            .collect();
        let backings: Vec<PathBuf> = backings.into_iter().collect();
        anyhow::ensure!(
            backings.len() == 2,
            "found {} backing files, not 2",
            backings.len()
        );
        for _ in 0..10 {
            if equal(&backings[0], &backings[1])? {
                return Ok(true);
            }
            interrupt::check()?;
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(false)
    }
}

/// Whether the data areas of two backing files hold the same bytes.
fn equal(one: &PathBuf, two: &PathBuf) -> anyhow::Result<bool> {
    use std::io::Read as _;
    let open = |path: &PathBuf| {
        std::fs::File::open(path).with_context(|| format!("open {}", path.display()))
    };
    let (mut one, mut two) = (open(one)?.take(VOLUME_SIZE), open(two)?.take(VOLUME_SIZE));
    let (mut a, mut b) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    for _ in 0..VOLUME_SIZE >> 20 {
        one.read_exact(&mut a)?;
        two.read_exact(&mut b)?;
        if a != b {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The node on which the whole service runs.
fn active_node(lab: &Lab) -> Option<String> {
    let cluster = lab.cluster()?;
    let service = cluster
        .services
        .into_iter()
        .find(|service| service.name == NAME)?;
    (service.state == ServiceState::Running).then_some(service.node?)
}

/// What the cluster says of itself when it does not do what it should.
fn explain(lab: &Lab) -> String {
    let Some(cluster) = lab.cluster() else {
        return "no daemon with a majority answers".to_owned();
    };
    let waits = cluster
        .services
        .iter()
        .filter_map(|service| service.wait.as_ref());
    let waits = waits.chain(
        cluster
            .volumes
            .iter()
            .filter_map(|volume| volume.wait.as_ref()),
    );
    let waits: Vec<String> = waits
        .chain(&cluster.waits)
        .map(|wait| format!("{}: {}", wait.what, wait.why))
        .collect();
    let in_sync: Vec<String> = cluster
        .volumes
        .iter()
        .map(|volume| volume.in_sync.join(", "))
        .collect();
    format!(
        "in sync: {}; the cluster says: {}",
        in_sync.join(" / "),
        waits.join("; ")
    )
}

fn service_request(lab: &Lab) -> CreateServiceRequest {
    let program = lab.program().display().to_string();
    let mut parts = vec![PartRequest::Volume(VolumePartRequest {
        name: NAME.to_owned(),
        device: lab.devices,
    })];
    let listen = if lab.has_cables() {
        format!("0.0.0.0:{}", lab.service_socket().port())
    } else {
        lab.service_socket().to_string()
    };
    let ready = if lab.has_cables() {
        format!("127.0.0.1:{}", lab.service_socket().port())
            .parse()
            .ok()
    } else {
        Some(lab.service_socket())
    };
    let command = if lab.devices {
        let mount_point = lab.mount_point();
        parts.push(PartRequest::Mount(MountRequest {
            volume: NAME.to_owned(),
            at: mount_point.clone(),
            filesystem: "ext4".to_owned(),
            make: true,
            options: String::new(),
        }));
        let directory = mount_point.display().to_string();
        vec![
            program,
            "ledger".into(),
            "--listen".into(),
            listen,
            "--dir".into(),
            directory,
        ]
    } else {
        // The socket's path differs from node to node: the daemon puts it into the environment.
        let variable = "RELEVO_VOLUME_LEDGER".to_owned();
        vec![
            program,
            "ledger".into(),
            "--listen".into(),
            listen,
            "--storage-env".into(),
            variable,
        ]
    };
    parts.push(PartRequest::Process(ProcessRequest {
        command,
        environment: [(
            "RELEVO_DEMO".to_owned(),
            lab.mount_point().display().to_string(),
        )]
        .into(),
        directory: None,
        ready,
    }));
    if lab.has_cables() {
        // Last, so that clients reach the address only when the ledger answers.
        parts.push(PartRequest::Address(AddressRequest {
            address: format!("{}/24", lab.service_address()),
            interface: None,
        }));
    }
    CreateServiceRequest {
        placement: PlacementRequest::default(),
        name: NAME.to_owned(),
        on: Some("one".to_owned()),
        parts,
    }
}

fn other(name: &str) -> &'static str {
    if name == "one" { "two" } else { "one" }
}

fn power_loss(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    let active = report.active_before.clone();
    stage.lab.cut_power(&active)?;
    stage.served_again(now())
}

fn node_return(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    let lost = report.active_before.clone();
    stage.lab.cut_power(&lost)?;
    stage.served_again(now())?;
    let taker = stage.active()?;
    report.notes.push(format!(
        "the wait includes the takeover from `{lost}` by `{taker}`"
    ));
    let back = now();
    if stage.lab.has_cables() {
        stage.lab.set_cables(&lost, None, true)?;
    }
    stage.lab.start_daemon(&lost)?;
    wait_for(HEAL_BOUND, &format!("`{lost}` to be in sync"), || {
        stage.lab.volume(NAME).filter(all_in_sync)
    })?;
    report.healed_ms = millis(now().saturating_sub(back));
    let during = stage.client.longest_gap(back, now());
    report.notes.push(format!(
        "longest wait during return and resync: {} ms",
        millis(during)
    ));
    let active = stage.active()?;
    anyhow::ensure!(
        active == taker,
        "the service moved from `{taker}` to `{active}` by itself"
    );
    stage.served_again(now())
}

fn process_kill(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    let active = report.active_before.clone();
    stage.lab.kill_everything(&active)?;
    let killed = now();
    if stage.lab.has_cables() {
        let address = stage.lab.service_address();
        wait_for(
            ADDRESS_GONE_BOUND,
            "the dead node's address to vanish by itself",
            || matches!(stage.lab.has_address(&active, address), Ok(false)).then_some(()),
        )?;
        report.notes.push(format!(
            "the address vanished from `{active}` by itself {} ms after the kill",
            millis(now().saturating_sub(killed))
        ));
    }
    stage.served_again(killed)
}

fn service_crash(stage: &mut Stage<'_>, _: &mut SceneReport) -> anyhow::Result<()> {
    let killed = kill_ledger(stage.lab)?;
    anyhow::ensure!(killed == 1, "found {killed} ledger processes, not 1");
    stage.served_again(now())
}

fn switchover(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    let to = other(&report.active_before);
    let request = MoveServiceRequest {
        to: Some(to.to_owned()),
    };
    let state_dir = stage.lab.machine(to).state_dir.clone();
    stage.lab.api.call(&state_dir, async |client| {
        client.move_service(NAME, &request).await
    })?;
    wait_for(
        SERVE_BOUND,
        &format!("the service to run on `{to}`"),
        || active_node(stage.lab).filter(|active| active == to),
    )?;
    stage.served_again(now())
}

fn partition(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    let active = report.active_before.clone();
    stage.lab.set_cables(&active, None, false)?;
    let cut = now();
    let address = stage.lab.service_address();
    stage.served_again(cut)?;
    anyhow::ensure!(
        !stage.lab.has_address(&active, address)?,
        "`{active}` still has the service's address although it was cut off"
    );
    let taker = stage.active()?;
    stage.lab.set_cables(&active, None, true)?;
    let healed = now();
    stage.served_again(healed)?;
    let holder = stage.active()?;
    anyhow::ensure!(
        holder == taker,
        "the service moved from `{taker}` to `{holder}` by itself"
    );
    Ok(())
}

fn replication_cut(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    let active = report.active_before.clone();
    // After an earlier scene the link may still be on its way back to the path that is cut here.
    std::thread::sleep(LINK_RETURN);
    stage.lab.set_cables(&active, Some("repl"), false)?;
    let cut = now();
    // Replication gives the silent link up after the dead time and goes on along the other path.
    wait_for(
        HEAL_BOUND,
        "replication to go on along the other path",
        || {
            let volume = stage.lab.volume(NAME)?;
            (now().saturating_sub(cut) > Duration::from_secs(2) && all_in_sync(&volume))
                .then_some(())
        },
    )?;
    report
        .notes
        .push("replication went on along the other path, the cable still cut".to_owned());
    stage.served_again(now())?;
    let holder = stage.active()?;
    anyhow::ensure!(
        holder == active,
        "the service moved to `{holder}`; nothing should move"
    );
    Ok(())
}

fn witness_loss(stage: &mut Stage<'_>, report: &mut SceneReport) -> anyhow::Result<()> {
    stage.lab.kill_everything("witness")?;
    let killed = now();
    // Long enough for every time-out that might be waiting for it.
    wait_for(SERVE_BOUND, "three seconds without a witness", || {
        (now().saturating_sub(killed) > Duration::from_secs(3)).then_some(())
    })?;
    stage.served_again(now())?;
    let holder = stage.active()?;
    anyhow::ensure!(
        holder == report.active_before,
        "the service moved to `{holder}`; nothing should move"
    );
    Ok(())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
