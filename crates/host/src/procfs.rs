//! Reading `/proc`: which processes there are and what they hold.

use std::{fs, os::unix::ffi::OsStrExt as _};

use rustix::process::{Pid, PidfdFlags, Signal};

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
