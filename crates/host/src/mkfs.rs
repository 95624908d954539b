//! Making file systems with the distribution's tools.
//!
//! Called by the mount part of `agents`, and only for a device that [`is_blank`].

use std::{
    env,
    fs::File,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{HostError, Result, parent};

/// How much of a device must read as zeroes to call it blank: the superblock or label of every
/// file system, volume manager and partition table in use lies in it.
pub const BLANK_BYTES: u64 = 1 << 20;

/// Where mkfs tools live, besides `PATH`, which for a daemon often lacks them.
const TOOL_DIRECTORIES: [&str; 4] = ["/sbin", "/usr/sbin", "/usr/local/sbin", "/bin"];

/// Whether the first [`BLANK_BYTES`] of a device (all of a shorter one) read as zeroes.
///
/// # Errors
/// It can't be read.
pub fn is_blank(device: &Path) -> Result<bool> {
    let read = || {
        let mut content = Vec::new();
        File::open(device)?
            .take(BLANK_BYTES)
            .read_to_end(&mut content)?;
        Ok(content.iter().all(|byte| *byte == 0))
    };
    read().map_err(|error: std::io::Error| {
        HostError::io(
            format!("cannot read {}", device.display()),
            error,
            "check that the volume is exported here and its disk works",
        )
    })
}

/// Whether the tool that makes file systems of this type is installed.
#[must_use]
pub fn is_available(filesystem: &str) -> bool {
    find_tool(&format!("mkfs.{filesystem}")).is_some()
}

/// Makes a file system of type `filesystem` on `device`, overwriting what is there. Blocks for
/// as long as the tool runs; the tool dies with this process.
///
/// # Errors
/// The tool is missing or failed; its last words are in the error.
pub fn make_filesystem(filesystem: &str, device: &Path) -> Result<()> {
    let what = || {
        format!(
            "cannot make a file system of type {filesystem} on {}",
            device.display()
        )
    };
    let plausible = !filesystem.is_empty()
        && filesystem
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    if !plausible {
        return Err(HostError::new(
            what(),
            "that is not the name of a file system",
            "use ext4, xfs or btrfs, say",
        ));
    }
    let name = format!("mkfs.{filesystem}");
    let tool = find_tool(&name).ok_or_else(|| {
        HostError::new(
            what(),
            format!("the tool {name} is not installed"),
            format!(
                "install it ({}), or make the file system elsewhere",
                package(filesystem)
            ),
        )
    })?;
    let mut command = Command::new(tool);
    command
        .args(options(filesystem))
        .arg(device)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let output = parent::spawn(command)
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| HostError::io(what(), error, format!("check that {name} can run")))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let last = words
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it gave no reason");
    Err(HostError::new(
        what(),
        format!("{name} ended with {}: {}", output.status, last.trim()),
        "check the device's size and the disk under it",
    ))
}

/// The device is blank, so nothing asks for confirmation, and nothing is discarded: it would only
/// be replicated. ext4 leaves its tables to be zeroed after the mount; they are zeroes already.
fn options(filesystem: &str) -> &'static [&'static str] {
    match filesystem {
        "ext2" | "ext3" => &["-q", "-F", "-E", "nodiscard"],
        "ext4" => &[
            "-q",
            "-F",
            "-E",
            "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
        ],
        "xfs" | "btrfs" => &["-q", "-f", "-K"],
        "f2fs" => &["-q", "-f", "-t", "0"],
        _ => &[],
    }
}

fn package(filesystem: &str) -> &'static str {
    match filesystem {
        "ext2" | "ext3" | "ext4" => "package e2fsprogs",
        "xfs" => "package xfsprogs",
        "btrfs" => "package btrfs-progs",
        _ => "see your distribution's packages",
    }
}

fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(TOOL_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| {
            file.metadata()
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use super::*;

    #[test]
    fn blank_is_a_mebibyte_of_zeroes() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * BLANK_BYTES).unwrap();
        assert!(is_blank(file.path()).unwrap());
        let mut content = vec![0; 2 * 1024 * 1024];
        content[BLANK_BYTES as usize] = 1;
        file.write_all(&content).unwrap();
        assert!(is_blank(file.path()).unwrap(), "the byte after it");
        content[BLANK_BYTES as usize - 1] = 1;
        fs::write(file.path(), content).unwrap();
        assert!(!is_blank(file.path()).unwrap());
        assert!(is_blank(Path::new("/nonexistent/device")).is_err());
    }

    #[test]
    fn a_missing_tool_is_named() {
        let error = make_filesystem("nosuchfs", Path::new("/dev/null")).unwrap_err();
        assert!(
            error.to_string().contains("mkfs.nosuchfs is not installed"),
            "{error}"
        );
        assert!(make_filesystem("../x", Path::new("/dev/null")).is_err());
    }
}
