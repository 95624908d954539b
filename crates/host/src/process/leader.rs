//! A started process that leads a group: its end is told by a pidfd, and its group ends with it.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    process::Child,
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus},
};
use tokio::io::unix::AsyncFd;

use super::Exit;

/// How often a group is looked at for stragglers after its leader ended.
const GROUP_PAUSE: Duration = Duration::from_millis(5);

/// The leader of a process group. Killed with its group when dropped.
#[derive(Debug)]
pub(crate) struct Leader {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    ended: Option<Exit>,
}

impl Leader {
    /// Watches a child that was just started as leader of its own group, and that nobody else waits for.
    /// It is killed when that can't be done.
    pub(crate) fn watch(mut child: Child) -> io::Result<Self> {
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
            });
        match watched {
            Ok(pidfd) => Ok(Self {
                pid,
                pidfd,
                ended: None,
            }),
            Err(error) => {
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                drop(child.wait());
                Err(error)
            }
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) const fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Waits for the end of the process. Can be cancelled and called again.
    pub(crate) async fn exited(&mut self) -> Exit {
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
        self.signal(Signal::KILL);
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

    /// Sends a signal to the whole group.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    /// Waits until nobody of the group is left, which was killed with its leader.
    pub(crate) async fn group_gone(&self) {
        while rustix::process::test_kill_process_group(self.pid).is_ok() {
            tokio::time::sleep(GROUP_PAUSE).await;
        }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.signal(Signal::KILL);
            // Collected here when it is quick; otherwise when this process ends.
            let _ = self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
    }
}
