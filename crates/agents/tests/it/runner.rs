//! Whole services: volume, mount, process, started and stopped part by part.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use relevo_agents::{
    AddressKeeper, Attached, FAILURE_QUEUE, PartContext, PartFailed, PartHealth, PartRunner,
    Result, VolumeExports, VolumePlace,
};
use relevo_host::mount;
use relevo_types::{
    ServiceId, VolumeId,
    cluster::{MountPart, Part, ProcessPart, VolumePart},
};
use tokio::sync::mpsc;

use crate::need;

const SERVICE: ServiceId = ServiceId(7);
const VOLUME: VolumeId = VolumeId(3);

/// A volume that is always there.
struct Fixed(VolumePlace);

#[async_trait::async_trait]
impl VolumeExports for Fixed {
    async fn attach(&self, _: VolumeId, _: bool) -> Result<Attached> {
        Ok(Attached {
            name: "mail-1".into(),
            place: self.0.clone(),
        })
    }

    async fn detach(&self, _: VolumeId, _: bool) -> Result<()> {
        Ok(())
    }

    async fn is_attached(&self, _: VolumeId) -> bool {
        true
    }
}

fn runner(directory: &Path, place: VolumePlace) -> (PartRunner, mpsc::Receiver<PartFailed>) {
    let (report, failures) = mpsc::channel(FAILURE_QUEUE);
    let runner = PartRunner::new(PartContext {
        node_name: "east".into(),
        log_directory: directory.join("log"),
        keeper: AddressKeeper::start(report.clone()).unwrap(),
        exports: Arc::new(Fixed(place)),
        failures: report,
    });
    (runner, failures)
}

fn shell(script: &str) -> Part {
    Part::Process(ProcessPart {
        command: vec!["/bin/sh".into(), "-c".into(), script.into()],
        environment: BTreeMap::from([("WORD".into(), "hello".into())]),
        directory: None,
        ready: None,
    })
}

fn volume() -> Part {
    Part::Volume(VolumePart {
        volume: VOLUME,
        device: true,
    })
}

/// A loop device, taken apart when dropped.
struct Loop {
    directory: tempfile::TempDir,
    device: PathBuf,
}

impl Loop {
    fn new() -> std::io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("relevo-").tempdir()?;
        let backing = directory.path().join("backing");
        fs::File::create(&backing)?.set_len(64 << 20)?;
        let output = Command::new("losetup")
            .arg("--find")
            .arg("--show")
            .arg(&backing)
            .output()?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(std::io::Error::other(why));
        }
        let device = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        Ok(Self { directory, device })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(mount::force_unmount(&self.directory.path().join("srv/mnt")));
        drop(
            Command::new("losetup")
                .arg("--detach")
                .arg(&self.device)
                .status(),
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_on_a_file_system_is_started_twice_and_stopped_twice() {
    let test = "a_service_on_a_file_system_is_started_twice_and_stopped_twice";
    let Some(device) = need(test, Loop::new()) else {
        return;
    };
    let directory = device.directory.path();
    let point = directory.join("srv/mnt");
    let (runner, _failures) = runner(directory, VolumePlace::Device(device.device.clone()));
    let mount_part = |filesystem: &str| {
        Part::Mount(MountPart {
            volume: VOLUME,
            mount_point: point.clone(),
            filesystem: filesystem.into(),
            make: true,
            options: "noatime".into(),
        })
    };
    let script = format!(
        "echo $RELEVO_SERVICE $RELEVO_NODE $RELEVO_VOLUME_MAIL_1 $WORD > {0}/told; exec sleep 60",
        point.display()
    );
    let parts = [volume(), mount_part("ext4"), shell(&script)];

    let early = runner
        .start(SERVICE, "mail", 1, &parts[1])
        .await
        .unwrap_err()
        .to_string();
    assert!(early.contains("not attached as a block device"), "{early}");
    for _ in 0..2 {
        for (index, part) in parts.iter().enumerate() {
            runner.start(SERVICE, "mail", index, part).await.unwrap();
            assert_eq!(runner.probe(SERVICE, index, part).await, PartHealth::Active);
        }
    }
    let told = format!("mail east {} hello\n", device.device.display());
    while fs::read_to_string(point.join("told")).unwrap_or_default() != told {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..2 {
        for (index, part) in parts.iter().enumerate().rev() {
            runner.stop(SERVICE, index, part, false).await.unwrap();
        }
    }
    assert_eq!(
        runner.probe(SERVICE, 1, &parts[1]).await,
        PartHealth::Inactive
    );
    assert_eq!(
        runner.probe(SERVICE, 2, &parts[2]).await,
        PartHealth::Inactive
    );

    // The second start finds the file system and does not make it again.
    for (index, part) in parts.iter().enumerate().take(2) {
        runner.start(SERVICE, "mail", index, part).await.unwrap();
    }
    assert_eq!(fs::read_to_string(point.join("told")).unwrap(), told);
    // A user that is in the way holds an ordinary stop up, not a forced one.
    let mut user = Command::new("sleep")
        .arg("60")
        .current_dir(&point)
        .spawn()
        .unwrap();
    let error = runner
        .stop(SERVICE, 1, &parts[1], false)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("in use by sleep"), "{error}");
    runner.stop(SERVICE, 1, &parts[1], true).await.unwrap();
    assert!(!user.wait().unwrap().success());
    assert!(!mount::is_mounted(&point).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_mount_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (runner, _failures) = runner(directory.path(), VolumePlace::Device("/dev/null".into()));
    runner.start(SERVICE, "mail", 0, &volume()).await.unwrap();
    let part = Part::Mount(MountPart {
        volume: VOLUME,
        mount_point: "/proc".into(),
        filesystem: "ext4".into(),
        make: false,
        options: String::new(),
    });
    let error = runner
        .start(SERVICE, "mail", 1, &part)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("not this service's volume"), "{error}");
    runner.stop(SERVICE, 1, &part, true).await.unwrap();
    assert!(mount::is_mounted(Path::new("/proc")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_restarts_do_not_help_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let (runner, mut failures) = runner(directory.path(), VolumePlace::Socket("/run/x".into()));
    let part = shell("echo $RELEVO_NODE can not; sleep 0.05; exit 9");
    runner.start(SERVICE, "mail", 2, &part).await.unwrap();
    let patience = Duration::from_secs(20);
    let failed = tokio::time::timeout(patience, failures.recv())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((failed.service, failed.index), (SERVICE, 2));
    assert!(
        failed.reason.contains("ended with code 9"),
        "{}",
        failed.reason
    );
    assert!(failed.reason.contains("east can not"), "{}", failed.reason);
    assert!(matches!(
        runner.probe(SERVICE, 2, &part).await,
        PartHealth::Failed(_)
    ));
    assert_eq!(runner.last_lines(SERVICE, 2, 1), ["east can not"]);
    let log = fs::read_to_string(directory.path().join("log/mail-2.log")).unwrap();
    assert_eq!(log.lines().count(), 4);
    runner.stop(SERVICE, 2, &part, false).await.unwrap();
}
