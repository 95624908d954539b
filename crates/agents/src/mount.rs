//! The mount part: a file system of a volume on a directory.

use std::{fs, path::Path, time::Duration};

use relevo_host::{
    mkfs,
    mount::{self, MountEntry},
};
use relevo_types::cluster::MountPart;

use crate::{AgentError, PartHealth, Result};

/// How long an ordinary stop waits for the last users, which are processes of this service that
/// were just stopped.
const BUSY_PATIENCE: Duration = Duration::from_secs(3);

/// How long a forced stop waits for the kernel. Longer, and the device under the file system does not
/// answer.
const FORCE_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn start(part: &MountPart, device: &Path) -> Result<()> {
    let part = part.clone();
    let device = device.to_owned();
    blocking(move || start_blocking(&part, &device)).await
}

fn start_blocking(part: &MountPart, device: &Path) -> Result<()> {
    let point = &part.mount_point;
    let what = || format!("cannot mount {} on {}", device.display(), point.display());
    if let Some(entry) = mount::mounted_on(point)? {
        return if mount::is_mount_of(&entry, device) {
            Ok(())
        } else {
            Err(AgentError::new(what(), taken(&entry), "unmount that first"))
        };
    }
    let elsewhere = mount::mounts()?
        .into_iter()
        .find(|entry| mount::is_mount_of(entry, device));
    if let Some(entry) = elsewhere {
        return Err(AgentError::new(
            what(),
            format!("it is mounted on {} already", entry.mount_point.display()),
            "unmount it there",
        ));
    }
    fs::create_dir_all(point).map_err(|error| {
        AgentError::io(
            format!("cannot make the mount point {}", point.display()),
            error,
            "make the directory by hand on every node",
        )
    })?;
    if part.make && mkfs::is_blank(device)? {
        tracing::info!(
            "{} is blank: making a file system of type {}",
            device.display(),
            part.filesystem
        );
        mkfs::make_filesystem(&part.filesystem, device)?;
    }
    mount::mount(device, point, &part.filesystem, &part.options)
}

/// Stops the part. `device`: the volume's, when it is known (after a restart of the daemon it may
/// not be).
pub(crate) async fn stop(part: &MountPart, device: Option<&Path>, force: bool) -> Result<()> {
    let point = part.mount_point.clone();
    let device = device.map(Path::to_owned);
    let work = blocking(move || {
        let Some(entry) = mount::mounted_on(&point)? else {
            return Ok(());
        };
        if device.is_some_and(|device| !mount::is_mount_of(&entry, &device)) {
            tracing::warn!("left {} alone: {}", point.display(), taken(&entry));
            return Ok(());
        }
        if !force {
            return mount::unmount(&point, BUSY_PATIENCE);
        }
        let killed = mount::force_unmount(&point)?;
        if !killed.is_empty() {
            tracing::warn!(
                "killed to unmount {}: {}",
                point.display(),
                killed.join(", ")
            );
        }
        Ok(())
    });
    let patience = BUSY_PATIENCE + FORCE_PATIENCE;
    tokio::time::timeout(patience, work).await.unwrap_or_else(|_| {
        Err(AgentError::new(
            format!("cannot unmount {}", part.mount_point.display()),
            format!("the kernel did not answer for {patience:?}: the volume under it does not serve I/O"),
            "detach the volume by force, or restart the machine",
        ))
    })
}

pub(crate) async fn probe(part: &MountPart, device: Option<&Path>) -> PartHealth {
    let point = part.mount_point.clone();
    let device = device.map(Path::to_owned);
    let result = blocking(move || {
        Ok(match (mount::mounted_on(&point)?, device) {
            (None, _) => PartHealth::Inactive,
            (Some(entry), Some(device)) if !mount::is_mount_of(&entry, &device) => {
                PartHealth::Failed(format!("{}: {}", point.display(), taken(&entry)))
            }
            (Some(entry), _) if entry.options.split(',').any(|option| option == "ro") => {
                PartHealth::Impaired(format!("{} is mounted read-only", point.display()))
            }
            (Some(_), _) => PartHealth::Active,
        })
    });
    result
        .await
        .unwrap_or_else(|error| PartHealth::Failed(error.to_string()))
}

fn taken(entry: &MountEntry) -> String {
    format!(
        "{} ({}) is mounted there, which is not this service's volume",
        entry.source.display(),
        entry.filesystem
    )
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(AgentError::new(
                "cannot work on a mount",
                error,
                "this is a fault of the program: report it with its log",
            ))
        })
}
