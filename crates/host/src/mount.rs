//! Mounting and unmounting.
//!
//! Called by the mount part of `agents`, from threads that may block.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsString},
    fs, io,
    os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
    process::Pid,
};

use crate::{HostError, Result, clock, procfs};

/// How often a busy mount is tried again: a process that just ended lets go within moments.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// How long a forced unmount waits for the killed users before it detaches what is left.
const KILLED_PATIENCE: Duration = Duration::from_secs(1);

/// How many users an error names; one is enough to start looking.
const NAMED_USERS: usize = 5;

/// A mounted file system.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountEntry {
    /// Where.
    pub mount_point: PathBuf,
    /// What: a device for file systems on one.
    pub source: PathBuf,
    /// Type of the file system.
    pub filesystem: String,
    /// The kernel's device number.
    pub device: (u32, u32),
    /// Its options as the kernel writes them.
    pub options: String,
}

/// Mounts `device` on `mount_point`, which must exist. `options` is a comma-separated list as of
/// mount(8): flags the kernel knows become flags, the rest goes to the file system.
///
/// # Errors
/// The kernel refused.
pub fn mount(device: &Path, mount_point: &Path, filesystem: &str, options: &str) -> Result<()> {
    let what = || {
        format!(
            "cannot mount {} on {} as {filesystem}",
            device.display(),
            mount_point.display()
        )
    };
    let (flags, data) = parse_options(options);
    let data = CString::new(data).map_err(|error| {
        HostError::new(what(), error, "remove the zero byte from the mount options")
    })?;
    rustix::mount::mount(device, mount_point, filesystem, flags, data.as_c_str()).map_err(|errno| {
        let next = match errno {
            Errno::NODEV => "load the kernel's module for this file system",
            Errno::INVAL => {
                "check the file system's type and options; `dmesg` has the kernel's reason"
            }
            Errno::BUSY => "the device or directory is in use; unmount it first",
            Errno::NOENT => "check that the device and the directory exist",
            Errno::PERM | Errno::ACCESS => "run as root",
            _ => "`dmesg` has the kernel's reason",
        };
        HostError::io(what(), errno, next)
    })
}

/// Splits options into the kernel's flags and the file system's own.
fn parse_options(options: &str) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options.split(',').map(str::trim) {
        let (flag, on) = match option {
            "" | "defaults" | "auto" | "noauto" | "nofail" | "_netdev" => continue,
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "diratime" => (MountFlags::NODIRATIME, false),
            "relatime" => (MountFlags::RELATIME, true),
            "norelatime" => (MountFlags::RELATIME, false),
            "strictatime" => (MountFlags::STRICTATIME, true),
            "lazytime" => (MountFlags::LAZYTIME, true),
            "silent" => (MountFlags::SILENT, true),
            other => {
                data.push(other);
                continue;
            }
        };
        flags.set(flag, on);
    }
    (flags, data.join(","))
}

/// Every mount of this process's mount namespace, oldest first.
///
/// # Errors
/// `/proc` is not mounted.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")
        .map_err(|error| HostError::io("cannot list the mounts", error, "mount /proc"))?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse_mountinfo)
        .collect())
}

/// What is mounted on exactly this directory (the last mount, which is what one sees there).
///
/// # Errors
/// `/proc` is not mounted.
pub fn mounted_on(mount_point: &Path) -> Result<Option<MountEntry>> {
    let resolved = fs::canonicalize(mount_point).unwrap_or_else(|_| mount_point.to_owned());
    Ok(mounts()?
        .into_iter()
        .rfind(|entry| entry.mount_point == resolved))
}

/// Whether something is mounted on this directory.
///
/// # Errors
/// `/proc` is not mounted.
pub fn is_mounted(mount_point: &Path) -> Result<bool> {
    Ok(mounted_on(mount_point)?.is_some())
}

/// Whether `entry` is a mount of the block device at `device`, by whatever name.
#[must_use]
pub fn is_mount_of(entry: &MountEntry, device: &Path) -> bool {
    fs::metadata(device).is_ok_and(|found| {
        let number = found.rdev();
        number != 0 && (rustix::fs::major(number), rustix::fs::minor(number)) == entry.device
    })
}

/// One line of `/proc/self/mountinfo` (proc(5)): spaces in paths are octal escapes, a lone `-` ends
/// the optional fields.
fn parse_mountinfo(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let separator = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    let device = text(fields.get(2)?);
    let (major, minor) = device.split_once(':')?;
    Some(MountEntry {
        mount_point: unescape(fields.get(4)?),
        source: unescape(fields.get(separator + 2)?),
        filesystem: text(fields.get(separator + 1)?),
        device: (major.parse().ok()?, minor.parse().ok()?),
        options: text(fields.get(5)?),
    })
}

fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escape = (byte == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escape {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// Unmounts, trying for `patience` while the file system is busy. Nothing mounted there is fine.
///
/// # Errors
/// It stayed busy (the error names the users), or the kernel refused.
pub fn unmount(mount_point: &Path, patience: Duration) -> Result<()> {
    let what = || format!("cannot unmount {}", mount_point.display());
    let deadline = clock::now() + patience;
    loop {
        match rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::INVAL | Errno::NOENT) if !is_mounted(mount_point)? => return Ok(()),
            Err(Errno::BUSY) if clock::now() < deadline => thread::sleep(BUSY_PAUSE),
            Err(Errno::BUSY) => {
                let users = users(mount_point)?;
                let why = if users.is_empty() {
                    "it is busy, and not by a process: something is mounted below it, or it is \
                     exported or used as swap"
                        .to_owned()
                } else {
                    let some: Vec<&str> = users
                        .values()
                        .take(NAMED_USERS)
                        .map(String::as_str)
                        .collect();
                    format!("it is in use by {}", some.join(", "))
                };
                return Err(HostError {
                    errno: Some(libc::EBUSY),
                    ..HostError::new(what(), why, "end them, or force the stop")
                });
            }
            Err(errno) => {
                return Err(HostError::io(
                    what(),
                    errno,
                    "`dmesg` has the kernel's reason",
                ));
            }
        }
    }
}

/// Unmounts at any price: kills the processes that use the file system, then unmounts, then
/// detaches what is left of it. May block as long as the device under it does. Nothing mounted
/// there is fine. Returns whom it killed, for the log.
///
/// # Errors
/// This process itself uses it, or the kernel refused.
pub fn force_unmount(mount_point: &Path) -> Result<Vec<String>> {
    let Some(entry) = mounted_on(mount_point)? else {
        return Ok(Vec::new());
    };
    let mut killed = Vec::new();
    let deadline = clock::now() + KILLED_PATIENCE;
    loop {
        match rustix::mount::unmount(mount_point, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(killed),
            Err(Errno::INVAL | Errno::NOENT) if !is_mounted(mount_point)? => return Ok(killed),
            Err(Errno::BUSY) if clock::now() < deadline => {}
            Err(_) => break,
        }
        for (pid, name) in users(mount_point)? {
            let victim = Pid::from_raw(pid);
            if victim.is_some_and(|pid| procfs::kill_if(pid, |pid| uses(pid, entry.device)))
                && !killed.contains(&name)
            {
                killed.push(name);
            }
        }
        thread::sleep(BUSY_PAUSE);
    }
    rustix::mount::unmount(
        mount_point,
        UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
    )
    .map_err(|errno| {
        HostError::io(
            format!("cannot detach {}", mount_point.display()),
            errno,
            "`dmesg` has the kernel's reason; as a last resort restart the machine",
        )
    })?;
    Ok(killed)
}

/// The processes that use what is mounted on a directory, as `name (pid)` by pid.
///
/// # Errors
/// `/proc` is not mounted.
pub fn users(mount_point: &Path) -> Result<BTreeMap<i32, String>> {
    let Some(entry) = mounted_on(mount_point)? else {
        return Ok(BTreeMap::new());
    };
    Ok(procfs::processes()
        .into_iter()
        .filter(|pid| uses(*pid, entry.device))
        .map(|pid| {
            let number = pid.as_raw_nonzero().get();
            (number, format!("{} ({number})", procfs::name(pid)))
        })
        .collect())
}

/// Whether a process has a file of this file system open, mapped, as its program or as its
/// directory.
fn uses(pid: Pid, device: (u32, u32)) -> bool {
    let base = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    if ["cwd", "root", "exe"]
        .iter()
        .any(|link| device_of(&base.join(link)) == Some(device))
    {
        return true;
    }
    if let Ok(descriptors) = fs::read_dir(base.join("fd"))
        && descriptors
            .flatten()
            .any(|descriptor| device_of(&descriptor.path()) == Some(device))
    {
        return true;
    }
    // address perms offset major:minor inode path, the device number in hexadecimal
    let number = format!("{:02x}:{:02x}", device.0, device.1);
    fs::read_to_string(base.join("maps")).is_ok_and(|maps| {
        maps.lines()
            .any(|line| line.split_whitespace().nth(3) == Some(&number))
    })
}

/// The device number of the file system that a file lies on; never asks the file system itself,
/// which may hang.
fn device_of(path: &Path) -> Option<(u32, u32)> {
    let found = rustix::fs::statx(
        CWD,
        path,
        AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT,
        StatxFlags::empty(),
    )
    .map_err(io::Error::from)
    .ok()?;
    Some((found.stx_dev_major, found.stx_dev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_flags_and_data() {
        let (flags, data) = parse_options("defaults, noatime,ro,rw,data=ordered,commit=5");
        assert_eq!(flags, MountFlags::NOATIME);
        assert_eq!(data, "data=ordered,commit=5");
        assert_eq!(parse_options(""), (MountFlags::empty(), String::new()));
    }

    #[test]
    fn mountinfo_lines_are_read_with_their_escapes() {
        let line = br"36 35 98:1 /mnt1 /mnt/my\040data rw,noatime master:1 - ext3 /dev/root rw";
        let entry = parse_mountinfo(line).unwrap();
        assert_eq!(entry.mount_point, Path::new("/mnt/my data"));
        assert_eq!(entry.source, Path::new("/dev/root"));
        assert_eq!(entry.filesystem, "ext3");
        assert_eq!(entry.device, (98, 1));
        assert_eq!(parse_mountinfo(b""), None);
        assert_eq!(unescape(br"a\9z"), Path::new(r"a\9z"));
    }

    #[test]
    fn proc_is_found_and_an_ordinary_directory_is_not() {
        let entry = mounted_on(Path::new("/proc")).unwrap().unwrap();
        assert_eq!(entry.filesystem, "proc");
        let directory = tempfile::tempdir().unwrap();
        assert!(!is_mounted(directory.path()).unwrap());
        unmount(directory.path(), Duration::ZERO).unwrap();
        assert_eq!(
            force_unmount(directory.path()).unwrap(),
            Vec::<String>::new()
        );
    }

    #[test]
    fn our_own_open_file_is_seen() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let device = (
            rustix::fs::major(metadata.dev()),
            rustix::fs::minor(metadata.dev()),
        );
        assert!(uses(rustix::process::getpid(), device));
        assert!(!uses(rustix::process::getpid(), (4095, 77)));
    }
}
