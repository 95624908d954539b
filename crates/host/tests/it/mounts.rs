//! File systems on a loop device.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use relevo_host::{mkfs, mount};

use crate::need;

const LOOP_SET_FD: libc::c_ulong = 0x4c00;
const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;

/// A loop device on a sparse file, mounted or not; taken apart when dropped.
struct Loop {
    directory: tempfile::TempDir,
    device: PathBuf,
    handle: File,
}

impl Loop {
    fn new(size: u64) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("relevo-").tempdir()?;
        let backing = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(directory.path().join("backing"))?;
        backing.set_len(size)?;
        fs::create_dir(directory.path().join("mnt"))?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        let mut last = io::Error::other("no loop device is free");
        for _ in 0..20 {
            // SAFETY: the ioctl takes no argument and returns a number.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let device = PathBuf::from(format!("/dev/loop{number}"));
            let handle = OpenOptions::new().read(true).write(true).open(&device)?;
            // SAFETY: the argument is a descriptor number.
            if unsafe { libc::ioctl(handle.as_raw_fd(), LOOP_SET_FD, backing.as_raw_fd()) } == 0 {
                return Ok(Self {
                    directory,
                    device,
                    handle,
                });
            }
            // Another program took it between the two calls.
            last = io::Error::last_os_error();
        }
        Err(last)
    }

    fn mount_point(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(mount::force_unmount(&self.mount_point()));
        // SAFETY: the ioctl takes no argument.
        unsafe { libc::ioctl(self.handle.as_raw_fd(), LOOP_CLR_FD) };
    }
}

fn has_tool(name: &str) -> bool {
    ["/sbin", "/usr/sbin", "/usr/bin"]
        .iter()
        .any(|directory| Path::new(directory).join(name).exists())
}

#[test]
fn a_file_system_is_made_mounted_used_and_unmounted() {
    let test = "a_file_system_is_made_mounted_used_and_unmounted";
    let Some(device) = need(test, Loop::new(64 << 20)) else {
        return;
    };
    if need(
        test,
        has_tool("mkfs.ext4")
            .then_some(())
            .ok_or("mkfs.ext4 is not installed"),
    )
    .is_none()
    {
        return;
    }
    let point = device.mount_point();
    assert!(mkfs::is_blank(&device.device).unwrap());
    mkfs::make_filesystem("ext4", &device.device).unwrap();
    assert!(!mkfs::is_blank(&device.device).unwrap());

    let error = mount::mount(&device.device, &point, "ext4", "no_such_option=1").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("check the file system's type and options"),
        "{error}"
    );
    mount::mount(&device.device, &point, "ext4", "noatime,errors=remount-ro").unwrap();
    let entry = mount::mounted_on(&point).unwrap().unwrap();
    assert_eq!(entry.filesystem, "ext4");
    assert!(entry.options.contains("noatime"), "{entry:?}");
    assert!(mount::is_mount_of(&entry, &device.device));
    assert!(!mount::is_mount_of(&entry, Path::new("/dev/null")));

    fs::write(point.join("file"), "content").unwrap();
    let busy = File::open(point.join("file")).unwrap();
    let error = mount::unmount(&point, Duration::from_millis(50)).unwrap_err();
    let us = format!("({})", std::process::id());
    assert!(error.to_string().contains(&us), "{error}");
    drop(busy);
    mount::unmount(&point, Duration::from_secs(2)).unwrap();
    assert!(!mount::is_mounted(&point).unwrap());
    mount::unmount(&point, Duration::ZERO).unwrap();

    mount::mount(&device.device, &point, "ext4", "ro").unwrap();
    assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "content");
}

#[test]
fn a_forced_unmount_kills_the_users() {
    let test = "a_forced_unmount_kills_the_users";
    let Some(device) = need(test, Loop::new(64 << 20)) else {
        return;
    };
    if need(
        test,
        has_tool("mkfs.ext4")
            .then_some(())
            .ok_or("mkfs.ext4 is not installed"),
    )
    .is_none()
    {
        return;
    }
    let point = device.mount_point();
    mkfs::make_filesystem("ext4", &device.device).unwrap();
    mount::mount(&device.device, &point, "ext4", "").unwrap();
    let mut inside = Command::new("sleep")
        .arg("60")
        .current_dir(&point)
        .spawn()
        .unwrap();
    let output = File::create(point.join("log")).unwrap();
    let mut writer = Command::new("sleep")
        .arg("60")
        .stdout(Stdio::from(output))
        .spawn()
        .unwrap();
    let mut bystander = Command::new("sleep").arg("60").spawn().unwrap();
    assert_eq!(mount::users(&point).unwrap().len(), 2);
    let killed = mount::force_unmount(&point).unwrap();
    assert_eq!(killed.len(), 2, "{killed:?}");
    assert!(
        killed.iter().all(|name| name.starts_with("sleep (")),
        "{killed:?}"
    );
    assert!(!mount::is_mounted(&point).unwrap());
    assert!(!inside.wait().unwrap().success());
    assert!(!writer.wait().unwrap().success());
    assert!(bystander.try_wait().unwrap().is_none(), "others live on");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[test]
fn a_failing_tool_gives_its_reason() {
    let test = "a_failing_tool_gives_its_reason";
    if need(
        test,
        has_tool("mkfs.ext4")
            .then_some(())
            .ok_or("mkfs.ext4 is not installed"),
    )
    .is_none()
    {
        return;
    }
    let error = mkfs::make_filesystem("ext4", Path::new("/nonexistent"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("mkfs.ext4 ended with"), "{error}");
    assert!(error.contains("/nonexistent"), "{error}");
}
