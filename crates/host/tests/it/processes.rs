//! User namespaces: in a process of their own, for they need one thread.

use std::{
    env, fs, io,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::Command,
};

use relevo_host::{netns::NetNs, userns};

use crate::need;

/// The test harness has threads, so entering is refused with a reason.
#[test]
fn a_process_with_threads_is_told_so() {
    let error = userns::try_enter_user_namespace().unwrap_err().to_string();
    assert!(error.contains("threads"), "{error}");
}

const INSIDE: &str = "RELEVO_TEST_INSIDE";

/// Not a test: what the next one runs inside a user namespace, where it is root.
#[test]
#[ignore = "run by an_unprivileged_user_can_build_machines"]
fn inside() {
    if env::var_os(INSIDE).is_none() {
        return;
    }
    assert_eq!(rustix::process::getuid().as_raw(), 0);
    let hub = NetNs::new("hub").unwrap();
    let machine = NetNs::new("machine").unwrap();
    hub.add_bridge("lan").unwrap();
    hub.add_cable("port1", &machine, "eth0").unwrap();
    hub.add_port("lan", "port1").unwrap();
    machine
        .add_address("eth0", "10.9.9.1".parse().unwrap(), 24)
        .unwrap();
    println!("built");
}

#[test]
fn an_unprivileged_user_can_build_machines() {
    // Where an ordinary user can read it.
    let directory = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("it");
    fs::copy(env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(program);
    command
        .args(["--exact", "processes::inside", "--ignored", "--nocapture"])
        .env(INSIDE, "1");
    // SAFETY: this is not async-signal-safe (it allocates), but glibc makes its allocator usable in
    // a forked child, and nothing else that another thread may have locked is used.
    unsafe {
        command.pre_exec(|| {
            if rustix::process::getuid().is_root() {
                become_nobody()?;
            }
            userns::try_enter_user_namespace().map_err(|error| {
                error.errno.map_or_else(
                    || io::Error::other("no errno"),
                    io::Error::from_raw_os_error,
                )
            })
        });
    }
    let test = "an_unprivileged_user_can_build_machines";
    let output = command.output().map_err(|error| {
        format!("this kernel does not let an ordinary user make a namespace ({error})")
    });
    let Some(output) = need(test, output) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("built"),
        "{output:?}"
    );
}

fn become_nobody() -> io::Result<()> {
    const NOBODY: u32 = 65534;
    rustix::thread::set_thread_gid(rustix::process::Gid::from_raw(NOBODY))?;
    rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(NOBODY))?;
    // A change of user makes /proc/self root's; an ordinary user's process owns its own.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
    Ok(())
}
