//! The drivers against the real kernel. What needs root runs in namespaces of its own and says so
//! when it can't.

mod addresses;
mod commands;
mod mounts;
mod namespaces;
mod processes;
mod supervision;

use std::time::Duration;

use said::need;

/// Waits until `condition` holds, for at most `patience`; says whether it did.
fn eventually(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = relevo_host::clock::now() + patience;
    loop {
        if condition() {
            return true;
        }
        if relevo_host::clock::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process, as the kernel sees it: there and not a zombie.
fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let after_name = stat.rsplit(')').next().unwrap_or("");
        !after_name.trim_start().starts_with('Z')
    })
}
