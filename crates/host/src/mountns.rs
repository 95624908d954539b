//! A mount namespace that outlives the processes in it.
//!
//! Used by `demo`: each of its machines has mounts of its own. A process that serves a FUSE file
//! and is the last one in the namespace where that file is mounted (through a loop device) can't
//! die: the kernel unmounts before it closes the process's FUSE descriptor, and the unmount
//! waits for an answer from the process that is just dying. So something else must hold the
//! namespace until the process is gone. A descriptor of the demo does, and, for the case that the
//! demo is killed, a guardian process that notices by its standard input and stays a little longer
//! than the daemons.

use std::{
    fs::File,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, Stdio},
    sync::Arc,
};

use crate::{HostError, Result, command::separate_mounts};

/// Waits for the end of its input, then long enough for killed processes to be gone.
const GUARDIAN: &str = "read _; sleep 3";

/// A mount namespace. What is mounted in it goes away when the last clone is dropped and the last
/// process in it is gone.
#[derive(Clone, Debug)]
pub struct MountNs {
    // Dropped first: then the last reference is the guardian's, or a process's.
    fd: Arc<OwnedFd>,
    _guardian: Arc<Guardian>,
}

#[derive(Debug)]
struct Guardian(Child);

impl MountNs {
    /// Makes a copy of this process's mounts. Changes of one side don't show on the other.
    ///
    /// # Errors
    /// The kernel refuses, or there is no `/bin/sh`.
    pub fn new() -> Result<Self> {
        let failed = |error: std::io::Error| {
            HostError::io(
                "cannot make a mount namespace",
                error,
                "run as root, or where unprivileged user namespaces are allowed",
            )
        };
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", GUARDIAN])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        // SAFETY: between fork and exec only async-signal-safe system calls run, without
        // allocation: unshare and mount with constant arguments.
        unsafe {
            command.pre_exec(separate_mounts);
        }
        let guardian = Guardian(command.spawn().map_err(failed)?);
        // The guardian is past its `unshare`: `spawn` returns after exec.
        let fd = File::open(format!("/proc/{}/ns/mnt", guardian.0.id())).map_err(failed)?;
        Ok(Self {
            fd: Arc::new(fd.into()),
            _guardian: Arc::new(guardian),
        })
    }

    /// The descriptor that holds it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // Orderly: its processes are gone already, so it need not stay.
        if self.0.kill().is_ok() {
            drop(self.0.wait());
        }
    }
}
