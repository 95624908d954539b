//! Becoming root of a user namespace, for a demo without root.
//!
//! Called by `relevo demo` before it starts any thread.

use std::{fs, io};

use rustix::thread::UnshareFlags;

use crate::{HostError, Result, command, netlink::Netlink};

const WHAT: &str = "cannot enter a user namespace";

/// Makes this process root of a new user namespace, with mount and network namespaces of its own;
/// the loopback interface there is up. What it makes there vanishes with its last process. On an
/// error the process is as it was, unless the kernel failed half-way, which the error says.
///
/// # Errors
/// The process has several threads, or the kernel or a security module forbids it; the text says
/// which setting it is.
pub fn try_enter_user_namespace() -> Result<()> {
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(HostError::new(
            WHAT,
            format!("this process has {threads} threads and the kernel allows it to one only"),
            "call it before anything starts a thread",
        ));
    }
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    // SAFETY: the process has one thread, which is the one calling; nothing that Rust code relies
    // on is shared with anyone.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
        .map_err(|error| HostError::io(WHAT, io::Error::from(error), hint()))?;
    let map = || -> io::Result<()> {
        // The kernel demands this before an unprivileged process may map its group.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
        // SAFETY: as above, one thread; the network namespace holds nothing that is in use.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        command::separate_mounts()
    };
    map().map_err(|error| {
        HostError::io(
            "entered a user namespace but got no rights in it",
            error,
            hint(),
        )
    })?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| HostError::io("cannot start a runtime", error, "raise the limits"))?
        .block_on(async {
            let netlink = Netlink::open()?;
            let loopback = netlink.link("lo").await?;
            netlink.set_up(loopback.index, true).await
        })
}

/// Which setting forbids it, as far as can be seen.
fn hint() -> &'static str {
    let is = |file: &str, value: &str| {
        fs::read_to_string(file).is_ok_and(|content| content.trim() == value)
    };
    if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "set kernel.unprivileged_userns_clone=1 by sysctl, or run as root"
    } else if is(
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
    ) {
        "set kernel.apparmor_restrict_unprivileged_userns=0 by sysctl, or run as root"
    } else if is("/proc/sys/user/max_user_namespaces", "0") {
        "set user.max_user_namespaces above 0 by sysctl, or run as root"
    } else {
        "run as root, or outside the container that forbids it"
    }
}
