//! Reading `/proc`: which processes there are and what they hold.

use std::{fs, os::unix::ffi::OsStrExt as _};

use rustix::process::{Pid, PidfdFlags, Signal};

/// The memory of this machine in MiB: what its kernel says it has in all. `None` where it does not say.
#[must_use]
pub fn memory_mib() -> Option<u64> {
    memory_of(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn memory_of(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// All processes that can be seen.
pub(crate) fn processes() -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let number: i32 = std::str::from_utf8(name.as_bytes()).ok()?.parse().ok()?;
            Pid::from_raw(number)
        })
        .collect()
}

/// The short name of a process, for messages.
pub(crate) fn name(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()))
        .map_or_else(|_| "?".to_owned(), |name| name.trim_end().to_owned())
}

/// Kills a process if `still` holds for it once it can't be confused with a later one of the same
/// number. Never ourselves nor the first process. Says whether it was killed.
pub(crate) fn kill_if(pid: Pid, still: impl Fn(Pid) -> bool) -> bool {
    if pid == rustix::process::getpid() || pid.is_init() {
        return false;
    }
    let Ok(handle) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    still(pid) && rustix::process::pidfd_send_signal(handle, Signal::KILL).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read() {
        let text = "MemTotal:       24652148 kB\nMemFree:         5042156 kB\n";
        assert_eq!(memory_of(text), Some(24_074));
        assert_eq!(memory_of("MemFree: 1 kB\n"), None);
        assert_eq!(memory_of("MemTotal: much\n"), None);
        assert!(memory_mib().is_some_and(|mib| mib > 0));
    }
}
