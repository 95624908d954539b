//! How applications on this node reach its volumes: block devices where they are wanted and
//! possible, and NBD sockets always (the data thread serves those).

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use relevo_agents::{AgentError, Attached, VolumeExports, VolumePlace};
use relevo_datapath::VolumeTarget;
use relevo_export::{
    DeviceExport,
    device::{Detach, Detached},
};
use relevo_types::VolumeId;

use super::volumes::{Live, Volumes, lock};

/// The block devices of this node.
#[derive(Debug)]
pub(crate) struct Exports {
    /// Where links to them are made; `None`: this node makes none.
    device_dir: Option<PathBuf>,
    devices: Mutex<BTreeMap<VolumeId, Slot>>,
}

/// The device of one volume. Locked while it is being made or taken away, which may take seconds
/// and keeps nobody else waiting.
type Slot = Arc<Mutex<Option<Arc<DeviceExport>>>>;

impl Exports {
    pub(crate) fn new(device_dir: Option<PathBuf>) -> Self {
        Self {
            device_dir,
            devices: Mutex::default(),
        }
    }

    /// The block device of a volume, if it has one here.
    pub(crate) fn device(&self, volume: VolumeId) -> Option<PathBuf> {
        let slot = self.slot(volume);
        // While it is locked there is no device that could be used.
        let device = slot.try_lock().ok()?;
        device.as_ref().map(|device| device.link().to_owned())
    }

    fn slot(&self, volume: VolumeId) -> Slot {
        Arc::clone(lock(&self.devices).entry(volume).or_default())
    }

    /// Ends a device at once; its users get errors.
    pub(crate) fn drop_by_force(&self, volume: VolumeId) {
        let slot = lock(&self.devices).remove(&volume);
        if let Some(slot) = slot
            && let Some(device) = lock(&slot).take()
            && let Err(error) = device.detach(Detach::Force)
        {
            tracing::warn!(%error, %volume, "a device could not be taken away");
        }
    }

    fn attach(&self, volume: VolumeId, live: &Live) -> Result<PathBuf, AgentError> {
        let what = format!("cannot make volume {} a block device", live.name);
        let Some(device_dir) = &self.device_dir else {
            return Err(AgentError::new(
                what,
                "this daemon was started without block devices",
                "start it without --no-devices, or create the service with --no-device and use NBD",
            ));
        };
        let slot = self.slot(volume);
        let mut made = lock(&slot);
        if let Some(device) = &*made {
            return Ok(device.link().to_owned());
        }
        let target = VolumeTarget {
            handle: live.handle.clone(),
            size: live.size,
        };
        let device = DeviceExport::attach(&live.name, device_dir, Arc::new(target)).map_err(|e| {
            AgentError::new(
                what,
                e,
                "FUSE and loop devices need root; without them create the service with --no-device and use NBD",
            )
        })?;
        let link = device.link().to_owned();
        *made = Some(Arc::new(device));
        Ok(link)
    }

    fn detach(&self, volume: VolumeId, force: bool) -> Result<(), AgentError> {
        let slot = self.slot(volume);
        let mut made = lock(&slot);
        let Some(device) = made.clone() else {
            return Ok(());
        };
        let how = if force { Detach::Force } else { Detach::Clean };
        let detached = device.detach(how).map_err(|e| {
            AgentError::new(
                format!("cannot take the device {} away", device.link().display()),
                e,
                "end what uses it",
            )
        })?;
        if detached == Detached::StillOpen {
            tracing::warn!(
                device = %device.device().display(),
                "a device is still open; its requests fail, and it goes when its last user ends"
            );
        }
        *made = None;
        Ok(())
    }
}

impl Volumes {
    fn live_or_explain(&self, volume: VolumeId) -> Result<Live, AgentError> {
        self.shared.live(volume).ok_or_else(|| {
            AgentError::new(
                format!("cannot use volume {volume} on this node"),
                "its replica is not attached here",
                "`relevo status` and `relevo events` tell why",
            )
        })
    }

    /// Makes a volume that was made primary by hand usable: as a device if this node makes
    /// devices, else by its NBD socket.
    pub(crate) async fn export_by_hand(&self, volume: VolumeId) -> Result<PathBuf, String> {
        let device = self.shared.exports.device_dir.is_some();
        let attached = VolumeExports::attach(self, volume, device).await;
        attached
            .map(|attached| attached.place.path().to_owned())
            .map_err(|e| e.to_string())
    }

    /// Takes that back.
    pub(crate) async fn end_export_by_hand(&self, volume: VolumeId) -> Result<(), String> {
        VolumeExports::detach(self, volume, false)
            .await
            .map_err(|e| e.to_string())
    }
}

#[async_trait]
impl VolumeExports for Volumes {
    async fn attach(&self, volume: VolumeId, device: bool) -> Result<Attached, AgentError> {
        let live = self.live_or_explain(volume)?;
        let name = live.name.clone();
        if !device {
            return Ok(Attached {
                name,
                place: VolumePlace::Socket(live.nbd),
            });
        }
        let shared = Arc::clone(&self.shared);
        let attached =
            tokio::task::spawn_blocking(move || shared.exports.attach(volume, &live)).await;
        Ok(Attached {
            name,
            place: VolumePlace::Device(attached.map_err(thread_failed)??),
        })
    }

    async fn detach(&self, volume: VolumeId, force: bool) -> Result<(), AgentError> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || shared.exports.detach(volume, force))
            .await
            .map_err(thread_failed)?
    }

    async fn is_attached(&self, volume: VolumeId) -> bool {
        self.shared
            .live(volume)
            .is_some_and(|live| live.handle.status().engine.open)
    }
}

fn thread_failed(error: tokio::task::JoinError) -> AgentError {
    AgentError::new(
        "cannot attach or detach a device",
        error,
        "this is a defect of Relevo: report it",
    )
}
