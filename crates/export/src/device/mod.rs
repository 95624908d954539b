//! A volume as a block device of the kernel: a FUSE file of the volume's size, a loop device on
//! it, and a link `<device_dir>/<volume>` to the loop device.
//!
//! The data path attaches when the volume opens on this node and detaches when it closes.
//!
//! Nothing of it outlives the daemon. The FUSE file system is mounted nowhere: its file is opened
//! through a detached mount, so there is no mount point that could go stale, and the loop device
//! clears itself when its last user closes it. After a crash only the link remains, which
//! [`cleanup_leftovers`] removes.
//!
//! System calls that may wait for the volume run in a helper thread with a time limit, because the
//! volume is served by the very process that would be waiting; and a forced detach first answers
//! everything under way with `EIO`, so that nobody is left waiting.

mod fuse;
mod loopdev;

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno as SysErrno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use self::{
    fuse::{FILE_PREFIX, FileSystem, Pending},
    loopdev::LoopDevice,
};
use crate::block::BlockTarget;

/// What attaching may take: our own threads, and the one flush with which the loop driver starts.
/// Attach when the volume answers; while it is suspended this is how long attaching waits for it.
const ATTACH_LIMIT: Duration = Duration::from_secs(5);

/// What writing back the device's cache may take in a clean detach.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);

/// What clearing the loop device may take once everything under way was answered.
const CLEAR_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait for the FUSE file system to end after that. With another user of the device
/// it does not, however long one waits.
const END_LIMIT: Duration = Duration::from_secs(1);

/// How the loop device does its I/O.
///
/// With direct I/O the requests of the device reach the volume side by side; without it the loop
/// driver does one after the other, and latencies add up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceOptions {
    /// Direct I/O on the FUSE file.
    pub direct_io: bool,
    /// Logical block size in bytes: 512 to 4096, a power of two.
    pub block_size: u32,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            direct_io: true,
            block_size: 4096,
        }
    }
}

/// Why a device could not be made or taken away.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The name can't be a file name.
    #[error("`{0}` can't be the name of a device")]
    Name(String),
    /// The path of the link is taken by something that is not a link.
    #[error("{0} exists and is not a link; remove it, or choose another device directory")]
    Occupied(PathBuf),
    /// A file system or a program uses the device.
    #[error(
        "{device} is in use (mounted, or opened by a program); stop its users, or detach by force, \
         which fails their requests"
    )]
    Busy {
        /// The loop device.
        device: PathBuf,
    },
    /// A step took too long. The device can still be detached by force.
    #[error("{step} took longer than {limit_s} s; detach by force to fail what is under way")]
    TimedOut {
        /// What was tried.
        step: &'static str,
        /// The limit in seconds.
        limit_s: u64,
    },
    /// The system refused.
    #[error("can't {step}: {error}")]
    System {
        /// What was tried.
        step: &'static str,
        /// The system's words.
        error: io::Error,
    },
}

/// Names a step for the error message.
fn step<T, E: Into<io::Error>>(step: &'static str, result: Result<T, E>) -> Result<T, DeviceError> {
    result.map_err(|error| DeviceError::System {
        step,
        error: error.into(),
    })
}

/// How to detach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detach {
    /// Refuse when a file system is mounted from the device; write back its cache first. A program
    /// that merely has it open gets `EIO` from then on.
    Clean,
    /// Answer everything under way and everything that still comes with `EIO`, at once.
    Force,
}

/// What became of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detached {
    /// It is gone.
    Gone,
    /// Something still holds the loop device open, a mounted file system say: its requests fail,
    /// and it goes when that ends.
    StillOpen,
}

/// A volume that is a block device. Dropping it detaches by force.
#[derive(Debug)]
pub struct DeviceExport {
    link: PathBuf,
    device: PathBuf,
    direct_io: bool,
    pending: Arc<Pending>,
    /// `None` once detached.
    parts: Mutex<Option<Parts>>,
}

#[derive(Debug)]
struct Parts {
    device: Arc<LoopDevice>,
    session: fuser::BackgroundSession,
}

impl DeviceExport {
    /// Makes the device and the link `<device_dir>/<name>`, replacing the link of a former
    /// instance. `device_dir` is made when it is missing.
    ///
    /// # Errors
    /// See [`DeviceError`]; nothing is left behind.
    pub fn attach(
        name: &str,
        device_dir: &Path,
        target: Arc<dyn BlockTarget>,
    ) -> Result<Self, DeviceError> {
        Self::attach_with(name, device_dir, target, DeviceOptions::default())
    }

    /// [`Self::attach`] with other options, for tests and for machines that need them.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_with(
        name: &str,
        device_dir: &Path,
        target: Arc<dyn BlockTarget>,
        options: DeviceOptions,
    ) -> Result<Self, DeviceError> {
        cleanup_leftovers(name, device_dir)?;
        step("make the device directory", fs::create_dir_all(device_dir))?;
        let link = device_dir.join(name);
        let pending = Arc::new(Pending::new(target));
        let made = {
            let name = name.to_owned();
            let pending = Arc::clone(&pending);
            within("making the device", ATTACH_LIMIT, move || {
                make(&name, pending, options)
            })
        };
        let (device, session) = made.and_then(|made| made).inspect_err(|_| pending.kill())?;
        let export = Self {
            device: device.path().to_owned(),
            direct_io: device.direct_io(),
            link,
            pending,
            parts: Mutex::new(Some(Parts {
                device: Arc::new(device),
                session,
            })),
        };
        // From here on a failure drops `export`, which takes everything down again.
        step("make the link", replace_link(&export.device, &export.link))?;
        Ok(export)
    }

    /// The link, `/dev/relevo/mail` say.
    #[must_use]
    pub fn link(&self) -> &Path {
        &self.link
    }

    /// The loop device, `/dev/loop3` say.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Whether the kernel granted direct I/O.
    #[must_use]
    pub const fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// Requests of the kernel that wait for the volume.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.pending.len()
    }

    /// Takes the device away. Returns within a bounded time, also when the volume answers
    /// nothing any more. Detaching twice is fine.
    ///
    /// # Errors
    /// [`DeviceError::Busy`] and [`DeviceError::TimedOut`] leave the device as it was.
    pub fn detach(&self, how: Detach) -> Result<Detached, DeviceError> {
        if how == Detach::Force {
            self.pending.kill();
        }
        // The lock is not held while waiting: a forced detach must get past a clean one that hangs.
        let Some(device) = self.parts().as_ref().map(|parts| Arc::clone(&parts.device)) else {
            return Ok(Detached::Gone);
        };
        if how == Detach::Clean {
            let device = Arc::clone(&device);
            within("writing back the device's cache", FLUSH_LIMIT, move || {
                device.claim_and_flush()
            })??;
        }
        let cleared = within("clearing the loop device", CLEAR_LIMIT, move || {
            device.clear()
        });
        remove_link(&self.link, &self.device);
        step("clear the loop device", cleared?)?;
        let Some(Parts { device, session }) = self.parts().take() else {
            return Ok(Detached::Gone);
        };
        // Closing the last descriptor is what lets the kernel drop the FUSE file, and with it the
        // file system; then the session ends. With another user that takes as long as it takes.
        let ended = within("closing the loop device", END_LIMIT, move || {
            drop(device);
            session.join()
        });
        match ended {
            Ok(_) => Ok(Detached::Gone),
            Err(DeviceError::TimedOut { .. }) => {
                self.pending.kill();
                Ok(Detached::StillOpen)
            }
            Err(error) => Err(error),
        }
    }

    fn parts(&self) -> MutexGuard<'_, Option<Parts>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DeviceExport {
    fn drop(&mut self) {
        let parts = self
            .parts
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(parts) = parts else {
            return;
        };
        self.pending.kill();
        remove_link(&self.link, &self.device);
        // In a thread of its own: nobody waits for a drop.
        let spawned = thread::Builder::new()
            .name("relevo-undev".into())
            .spawn(move || {
                if let Err(error) = parts.device.clear() {
                    tracing::warn!(%error, "a loop device could not be cleared");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to clear a loop device");
        }
    }
}

/// What [`cleanup_leftovers`] found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Leftovers {
    /// A stale link was removed.
    pub link: bool,
    /// This loop device of a former instance is still in use, by a mounted file system most
    /// likely: unmount it. Its requests fail.
    pub still_open: Option<PathBuf>,
}

/// Removes what a crashed instance left in `device_dir` for the volume. The loop device and the
/// FUSE file system vanish by themselves; only the link can stay.
///
/// # Errors
/// When the name is no file name, or something else than a link has its place.
pub fn cleanup_leftovers(name: &str, device_dir: &Path) -> Result<Leftovers, DeviceError> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) || name.len() > 200 {
        return Err(DeviceError::Name(name.to_owned()));
    }
    let link = device_dir.join(name);
    let kind = match fs::symlink_metadata(&link) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Leftovers::default()),
        Err(error) => return step("look at the old link", Err(error)),
    };
    if !kind.is_symlink() {
        return Err(DeviceError::Occupied(link));
    }
    let device = step("read the old link", fs::read_link(&link))?;
    step("remove the old link", fs::remove_file(&link))?;
    // The number may belong to somebody else by now; the name of the backing file tells.
    let backing = loopdev::backing_file(&device);
    let ours = format!("{FILE_PREFIX}{name}");
    let still_open = backing.is_some_and(|backing| backing.ends_with(&ours));
    Ok(Leftovers {
        link: true,
        still_open: still_open.then_some(device),
    })
}

/// Whether block devices can be made here, with the reason if not.
///
/// # Errors
/// A sentence for `status` and `doctor`.
pub fn probe() -> Result<(), String> {
    for (path, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
        let opened = fs::OpenOptions::new().read(true).write(true).open(path);
        match opened.map_err(|error| (error.kind(), error)) {
            Ok(_) => {}
            Err((io::ErrorKind::NotFound, _)) => {
                return Err(format!(
                    "block devices need {path}, which is missing; `modprobe {module}` brings it \
                     where the kernel has it"
                ));
            }
            Err((io::ErrorKind::PermissionDenied, _)) => {
                return Err(format!(
                    "block devices need root ({path} can't be opened); the volumes are reached by \
                     NBD"
                ));
            }
            Err((_, error)) => return Err(format!("{path} can't be opened: {error}")),
        }
    }
    Ok(())
}

fn make(
    name: &str,
    pending: Arc<Pending>,
    options: DeviceOptions,
) -> Result<(LoopDevice, fuser::BackgroundSession), DeviceError> {
    let file_name = format!("{FILE_PREFIX}{name}");
    let fuse = step("open /dev/fuse", fuse::open_device())?;
    let mount = step("mount the FUSE file system", detached_mount(&fuse))?;
    let file_system = FileSystem::new(file_name.clone(), pending);
    let session = step("start the FUSE file system", file_system.serve(fuse))?;

    let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
    if options.direct_io {
        flags |= OFlags::DIRECT;
    }
    let file = step(
        "open the FUSE file",
        rustix::fs::openat(&mount, &*file_name, flags, Mode::empty()),
    )?;
    let device = step(
        "make a loop device",
        LoopDevice::attach(file.as_fd(), options),
    )?;
    Ok((device, session))
}

/// Mounts the file system without a place in the tree. Closing the returned descriptor unmounts,
/// as soon as nothing in it is open.
fn detached_mount(fuse: &OwnedFd) -> Result<OwnedFd, SysErrno> {
    use rustix::mount;
    use std::os::fd::AsRawFd as _;

    let context = mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    mount::fsconfig_set_string(context, "source", "relevo")?;
    mount::fsconfig_set_string(context, "fd", fuse.as_raw_fd().to_string())?;
    mount::fsconfig_set_string(context, "rootmode", "40000")?;
    let user = rustix::process::getuid().as_raw().to_string();
    mount::fsconfig_set_string(context, "user_id", user)?;
    let group = rustix::process::getgid().as_raw().to_string();
    mount::fsconfig_set_string(context, "group_id", group)?;
    mount::fsconfig_set_flag(context, "allow_other")?;
    mount::fsconfig_create(context)?;
    mount::fsmount(
        context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
    )
}

/// Puts the link in its place in one step, so that nobody ever sees it missing.
fn replace_link(device: &Path, link: &Path) -> io::Result<()> {
    let mut temporary = link.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(device, &temporary)?;
    fs::rename(&temporary, link)
}

/// Removes the link if it still is ours.
fn remove_link(link: &Path, device: &Path) {
    if fs::read_link(link).is_ok_and(|target| target == device)
        && let Err(error) = fs::remove_file(link)
    {
        tracing::warn!(link = %link.display(), %error, "the link of a device could not be removed");
    }
}

/// Runs something that may hang in a thread of its own and waits at most `limit` for it. A thread
/// that hangs stays behind until the kernel lets it go.
fn within<T: Send + 'static>(
    what: &'static str,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, DeviceError> {
    let (sender, receiver) = mpsc::channel();
    let helper = thread::Builder::new().name("relevo-dev".into());
    step(
        "start a thread",
        helper.spawn(move || {
            // The receiver has left when the limit is over; what was made is dropped then.
            drop(sender.send(work()));
        }),
    )?;
    receiver
        .recv_timeout(limit)
        .map_err(|_| DeviceError::TimedOut {
            step: what,
            limit_s: limit.as_secs(),
        })
}
