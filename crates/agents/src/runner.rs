//! Starting, stopping and probing the parts of services.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use relevo_host::process::{ProcessState, Supervisor};
use relevo_types::{ServiceId, VolumeId, cluster::Part};
use tokio::sync::mpsc;

use crate::{
    AddressKeeper, AgentError, Attached, PartFailed, PartHealth, Result, VolumeExports,
    VolumePlace, mount, process, process::ProcessContext,
};

/// What the parts need of their node.
#[derive(Clone)]
pub struct PartContext {
    /// This node's name.
    pub node_name: String,
    /// Where the output of processes goes; made when missing.
    pub log_directory: PathBuf,
    /// Holds the addresses.
    pub keeper: AddressKeeper,
    /// Attaches the volumes.
    pub exports: Arc<dyn VolumeExports>,
    /// Hears of parts that can't be kept active.
    pub failures: mpsc::Sender<PartFailed>,
}

impl fmt::Debug for PartContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartContext")
            .field("node_name", &self.node_name)
            .finish_non_exhaustive()
    }
}

/// Runs parts. The caller must not start and stop the same part at the same time; different
/// services are independent.
#[derive(Debug)]
pub struct PartRunner {
    context: PartContext,
    attached: Mutex<BTreeMap<(ServiceId, VolumeId), Attached>>,
    processes: Mutex<BTreeMap<(ServiceId, usize), Arc<Supervisor>>>,
}

impl PartRunner {
    /// A runner with nothing active.
    #[must_use]
    pub fn new(context: PartContext) -> Self {
        Self {
            context,
            attached: Mutex::default(),
            processes: Mutex::default(),
        }
    }

    /// Makes part number `index` of a service active. An active part stays as it is.
    ///
    /// # Errors
    /// It can't be; it is as inactive as before, but for what a [`Self::stop`] removes.
    pub async fn start(
        &self,
        service: ServiceId,
        service_name: &str,
        index: usize,
        part: &Part,
    ) -> Result<()> {
        match part {
            Part::Volume(part) => {
                let attached = self
                    .context
                    .exports
                    .attach(part.volume, part.device)
                    .await?;
                lock(&self.attached).insert((service, part.volume), attached);
                Ok(())
            }
            Part::Mount(part) => {
                let device = self.device(service, part.volume, &part.mount_point)?;
                mount::start(part, &device).await
            }
            Part::Address(part) => self.context.keeper.take(service, index, part).await,
            Part::Process(part) => {
                let key = (service, index);
                let known = lock(&self.processes).get(&key).cloned();
                if known.is_some_and(|known| {
                    !matches!(
                        known.state(),
                        ProcessState::Failed { .. } | ProcessState::Stopped
                    )
                }) {
                    return Ok(());
                }
                let context = ProcessContext {
                    service,
                    service_name,
                    index,
                    node_name: &self.context.node_name,
                    log: self.log_file(service_name, index)?,
                    volumes: self.volumes(service),
                };
                let supervisor = process::start(part, context, &self.context.failures).await?;
                lock(&self.processes).insert(key, Arc::new(supervisor));
                Ok(())
            }
        }
    }

    /// Makes part number `index` of a service inactive. An inactive part is fine. `force`: at any
    /// price, because the node may not use it any longer.
    ///
    /// # Errors
    /// It can't be: what it is to the service is still active.
    pub async fn stop(
        &self,
        service: ServiceId,
        index: usize,
        part: &Part,
        force: bool,
    ) -> Result<()> {
        match part {
            Part::Volume(part) => {
                self.context.exports.detach(part.volume, force).await?;
                lock(&self.attached).remove(&(service, part.volume));
                Ok(())
            }
            Part::Mount(part) => {
                let device = self.known_device(service, part.volume);
                mount::stop(part, device.as_deref(), force).await
            }
            Part::Address(part) => self.context.keeper.give_up(part).await,
            Part::Process(_) => {
                let known = lock(&self.processes).get(&(service, index)).cloned();
                if let Some(supervisor) = known {
                    supervisor.stop(force).await?;
                    lock(&self.processes).remove(&(service, index));
                }
                Ok(())
            }
        }
    }

    /// Whether part number `index` of a service is active.
    pub async fn probe(&self, service: ServiceId, index: usize, part: &Part) -> PartHealth {
        match part {
            Part::Volume(part) => {
                if self.context.exports.is_attached(part.volume).await {
                    PartHealth::Active
                } else {
                    PartHealth::Inactive
                }
            }
            Part::Mount(part) => {
                let device = self.known_device(service, part.volume);
                mount::probe(part, device.as_deref()).await
            }
            Part::Address(part) => self.context.keeper.probe(part).await,
            Part::Process(_) => {
                let known = lock(&self.processes).get(&(service, index)).cloned();
                process::probe(known.as_deref())
            }
        }
    }

    /// The last lines that a service's process wrote, oldest first; for `status` and `events`.
    #[must_use]
    pub fn last_lines(&self, service: ServiceId, index: usize, count: usize) -> Vec<String> {
        lock(&self.processes)
            .get(&(service, index))
            .map_or_else(Vec::new, |supervisor| supervisor.last_lines(count))
    }

    fn volumes(&self, service: ServiceId) -> Vec<Attached> {
        lock(&self.attached)
            .iter()
            .filter(|((owner, _), _)| *owner == service)
            .map(|(_, attached)| attached.clone())
            .collect()
    }

    fn known_device(&self, service: ServiceId, volume: VolumeId) -> Option<PathBuf> {
        match &lock(&self.attached).get(&(service, volume))?.place {
            VolumePlace::Device(device) => Some(device.clone()),
            VolumePlace::Socket(_) => None,
        }
    }

    fn device(&self, service: ServiceId, volume: VolumeId, point: &Path) -> Result<PathBuf> {
        self.known_device(service, volume).ok_or_else(|| {
            AgentError::new(
                format!("cannot mount volume {volume} on {}", point.display()),
                "it is not attached as a block device here",
                "let a volume part with `device` stand before the mount part of the service",
            )
        })
    }

    fn log_file(&self, service_name: &str, index: usize) -> Result<PathBuf> {
        let directory = &self.context.log_directory;
        fs::create_dir_all(directory).map_err(|error| {
            AgentError::io(
                format!("cannot make the log directory {}", directory.display()),
                error,
                "check the rights on the state directory and the space left",
            )
        })?;
        Ok(directory.join(format!("{service_name}-{index}.log")))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves the map whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
