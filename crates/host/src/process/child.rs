//! One run of a supervised process.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::Signal;
use tokio::net::unix::pipe;

use super::{Exit, KILL_PATIENCE, ProcessSpec, leader::Leader, log::Log};
use crate::{HostError, Result, parent};

/// How long stragglers of a group are waited for after SIGKILL. Zombies whose new parent is slow
/// to collect them still count as members, so this must not hold a restart up.
const GROUP_PATIENCE: Duration = Duration::from_millis(200);

/// A started process, leader of its own process group. Killed with its group when dropped.
#[derive(Debug)]
pub(super) struct Running {
    leader: Leader,
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
            let leader = Leader::watch(parent::spawn(command)?)?;
            let output = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
            let reader = tokio::spawn(Arc::clone(log).follow(output));
            Ok(Self { leader, reader })
        };
        start().map_err(|error| HostError::io(format!("{} ({program})", what()), error, next))
    }

    pub(super) fn pid(&self) -> i32 {
        self.leader.pid()
    }

    /// Waits for the end of the process. Can be cancelled and called again.
    pub(super) async fn exited(&mut self) -> Exit {
        self.leader.exited().await
    }

    /// Waits a moment for the rest of the group, which was killed with its leader, and for its
    /// last words to be read.
    pub(super) async fn group_gone(&mut self) {
        let gone = async {
            self.leader.group_gone().await;
            // Ends when the last holder of the pipe is gone; cancelled below when one escaped.
            drop((&mut self.reader).await);
        };
        drop(tokio::time::timeout(GROUP_PATIENCE, gone).await);
    }

    /// SIGTERM, then after `patience` SIGKILL, to the whole group; without `patience` SIGKILL at once.
    pub(super) async fn stop(&mut self, name: &str, patience: Option<Duration>) -> Result<()> {
        if !self.leader.has_ended()
            && let Some(patience) = patience
        {
            self.leader.signal(Signal::TERM);
            drop(tokio::time::timeout(patience, self.exited()).await);
        }
        if !self.leader.has_ended() {
            self.leader.signal(Signal::KILL);
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
