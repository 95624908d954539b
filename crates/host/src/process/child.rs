//! One run of a supervised process.

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus},
};
use tokio::{io::unix::AsyncFd, net::unix::pipe};

use super::{Exit, KILL_PATIENCE, ProcessSpec, log::Log};
use crate::{HostError, Result, parent};

/// How often a group is looked at for stragglers after its leader ended.
const GROUP_PAUSE: Duration = Duration::from_millis(5);

/// How long stragglers of a group are waited for after SIGKILL. Zombies whose new parent is slow
/// to collect them still count as members, so this must not hold a restart up.
const GROUP_PATIENCE: Duration = Duration::from_millis(200);

/// A started process, leader of its own process group. Killed with its group when dropped.
#[derive(Debug)]
pub(super) struct Running {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    ended: Option<Exit>,
    /// Reads what it writes.
    reader: tokio::task::JoinHandle<()>,
}

impl Running {
    /// Starts the process; what it writes goes to `log`.
    pub(super) fn start(spec: &ProcessSpec, log: &Arc<Log>) -> Result<Self> {
        let what = || format!("cannot start {}", spec.name);
        let next = "check the command, its rights and the directory of the process part";
        let (program, arguments) = spec
            .command
            .split_first()
            .ok_or_else(|| HostError::new(what(), "its command is empty", next))?;
        let start = || -> io::Result<Self> {
            let (reader, writer) = io::pipe()?;
            let mut command = Command::new(program);
            command
                .args(arguments)
                .envs(&spec.environment)
                .current_dir(spec.directory.as_deref().unwrap_or_else(|| "/".as_ref()))
                .stdin(Stdio::null())
                .stdout(writer.try_clone()?)
                .stderr(writer)
                .process_group(0);
            let child = parent::spawn(command)?;
            // Nobody has waited for the child yet, so the number is still its own.
            let pid = i32::try_from(child.id())
                .ok()
                .and_then(Pid::from_raw)
                .ok_or_else(|| io::Error::other("the kernel gave no process number"))?;
            let watched = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)
                .map_err(io::Error::from)
                .and_then(|pidfd| {
                    // SAFETY: an OwnedFd is open and stays the same descriptor while AsyncFd
                    // owns it; nobody replaces it.
                    Ok(unsafe { AsyncFd::register(pidfd) }?)
                })
                .and_then(|pidfd| {
                    let output = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
                    Ok((pidfd, output))
                });
            match watched {
                Ok((pidfd, output)) => {
                    let reader = tokio::spawn(Arc::clone(log).follow(output));
                    Ok(Self {
                        pid,
                        pidfd,
                        ended: None,
                        reader,
                    })
                }
                Err(error) => {
                    let mut child = child;
                    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                    drop(child.wait());
                    Err(error)
                }
            }
        };
        start().map_err(|error| HostError::io(format!("{} ({program})", what()), error, next))
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Waits for the end of the process. Can be cancelled and called again.
    pub(super) async fn exited(&mut self) -> Exit {
        if let Some(exit) = self.ended {
            return exit;
        }
        loop {
            // An error of the reactor means that the runtime ends; then nobody waits for us.
            let Ok(mut ready) = self.pidfd.readable().await else {
                return Exit::Unknown;
            };
            match self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT) {
                Ok(None) | Err(Errno::AGAIN | Errno::INTR) => ready.clear_ready(),
                // Ended, or not our child any more, which nobody else can cause.
                Ok(Some(_)) | Err(_) => return self.collect(),
            }
        }
    }

    /// Kills what is left of the group while the dead leader still reserves its number, so that no
    /// other group is hit; then collects the leader.
    fn collect(&mut self) -> Exit {
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        let exit = match self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
            Ok(None) | Err(_) => Exit::Unknown,
        };
        self.ended = Some(exit);
        exit
    }

    fn wait(&self, options: WaitIdOptions) -> Result<Option<WaitIdStatus>, Errno> {
        rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options)
    }

    /// Waits a moment for the rest of the group, which was killed with its leader, and for its
    /// last words to be read.
    pub(super) async fn group_gone(&mut self) {
        let gone = async {
            while rustix::process::test_kill_process_group(self.pid).is_ok() {
                tokio::time::sleep(GROUP_PAUSE).await;
            }
            // Ends when the last holder of the pipe is gone; cancelled below when one escaped.
            drop((&mut self.reader).await);
        };
        drop(tokio::time::timeout(GROUP_PATIENCE, gone).await);
    }

    /// SIGTERM, then after `patience` SIGKILL, to the whole group; without `patience` SIGKILL at once.
    pub(super) async fn stop(&mut self, name: &str, patience: Option<Duration>) -> Result<()> {
        if self.ended.is_none()
            && let Some(patience) = patience
        {
            let _ = rustix::process::kill_process_group(self.pid, Signal::TERM);
            drop(tokio::time::timeout(patience, self.exited()).await);
        }
        if self.ended.is_none() {
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
            if tokio::time::timeout(KILL_PATIENCE, self.exited())
                .await
                .is_err()
            {
                return Err(HostError::new(
                    format!("cannot stop {name}"),
                    format!(
                        "process {} is still there {KILL_PATIENCE:?} after SIGKILL",
                        self.pid()
                    ),
                    "it waits for a device in the kernel: free that device, or restart the machine",
                ));
            }
        }
        self.group_gone().await;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
            // Collected here when it is quick; otherwise when this process ends.
            let _ = self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
    }
}
