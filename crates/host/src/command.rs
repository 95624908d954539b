//! Starting a process inside a namespace, so that it dies with us.
//!
//! Used by `demo` (the nodes and the client) and by tests.

use std::{
    ffi::OsStr,
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::{
    mount::MountPropagationFlags,
    thread::{LinkNameSpaceType, UnshareFlags},
};

use crate::{HostError, Result, mountns::MountNs, netns, netns::NetNs, parent};

/// A process to be started in a network namespace with mounts of its own. The kernel kills it when
/// this process ends in whatever way.
#[derive(Debug)]
pub struct NsCommand {
    command: Command,
    namespace: Option<NetNs>,
    mounts: Option<MountNs>,
    own_mounts: bool,
}

impl NsCommand {
    /// The program, found in `PATH`; its input is `/dev/null`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        Self {
            command,
            namespace: None,
            mounts: None,
            own_mounts: false,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Where its output goes.
    #[must_use]
    pub fn stdout(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stdout(to);
        self
    }

    /// Where its error output goes.
    #[must_use]
    pub fn stderr(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stderr(to);
        self
    }

    /// A process group of its own: an interrupt typed at the terminal does not reach it.
    #[must_use]
    pub fn own_group(mut self) -> Self {
        self.command.process_group(0);
        self
    }

    /// Starts it in this network namespace.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &NetNs) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    /// Starts it in this mount namespace.
    #[must_use]
    pub fn in_mounts(mut self, mounts: &MountNs) -> Self {
        self.mounts = Some(mounts.clone());
        self
    }

    /// Gives it a mount namespace of its own: what it mounts, nobody else sees, and it goes away
    /// with its last process. Not for a process that serves a file system to itself: see
    /// [`MountNs`].
    #[must_use]
    pub fn own_mounts(mut self) -> Self {
        self.own_mounts = true;
        self
    }

    /// Starts it. The caller must wait for the child some day.
    ///
    /// # Errors
    /// The program does not exist, or the kernel refuses the namespaces.
    pub fn spawn(self) -> Result<Child> {
        let Self {
            mut command,
            namespace,
            mounts,
            own_mounts,
        } = self;
        let program = command.get_program().to_owned();
        let place = namespace.as_ref().map_or(String::new(), |namespace| {
            format!(" in {}", namespace.label())
        });
        // SAFETY: between fork and exec only async-signal-safe system calls run, without
        // allocation: setns, unshare and mount with constant arguments. `unshare` of the mount
        // namespace also unshares the working directory, in the child only.
        unsafe {
            command.pre_exec(move || {
                if let Some(namespace) = &namespace {
                    netns::enter(namespace.fd())?;
                }
                if let Some(mounts) = &mounts {
                    rustix::thread::move_into_link_name_space(
                        mounts.fd(),
                        Some(LinkNameSpaceType::Mount),
                    )?;
                }
                if own_mounts {
                    separate_mounts()?;
                }
                Ok(())
            });
        }
        parent::spawn(command).map_err(|error| {
            HostError::io(
                format!("cannot start {}{place}", program.display()),
                error,
                "check that the program exists and that namespaces are allowed",
            )
        })
    }
}

/// Leaves the shared mount namespace. Async-signal-safe.
pub(crate) fn separate_mounts() -> io::Result<()> {
    // SAFETY: the caller is a child between fork and exec or a single-threaded process: no other
    // thread shares the working directory or the mounts.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    rustix::mount::mount_change(
        c"/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?;
    Ok(())
}
