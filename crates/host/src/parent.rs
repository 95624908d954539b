//! The thread that is the parent of every process we start.
//!
//! Used by [`crate::command`], [`crate::process`], [`crate::run`] and [`crate::mkfs`]. A process asks the kernel to be killed when its parent dies
//! (`PR_SET_PDEATHSIG`), and by *parent* the kernel means the thread that forked. The threads of an
//! async runtime come and go, so one thread that lives as long as this process does all the forks.

use std::{
    io,
    os::unix::process::CommandExt as _,
    process::{Child, Command},
    sync::{
        LazyLock,
        mpsc::{Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

use rustix::process::Signal;

struct Job {
    command: Command,
    answer: SyncSender<io::Result<Child>>,
}

/// `None` when the system has no thread left for it.
static PARENT: LazyLock<Option<Sender<Job>>> = LazyLock::new(|| {
    let (sender, jobs) = channel::<Job>();
    thread::Builder::new()
        .name("relevo-parent".to_owned())
        .spawn(move || {
            for mut job in jobs {
                // A caller that went away no longer wants the child; it is killed by its owner's drop.
                if let Err(unwanted) = job.answer.send(job.command.spawn())
                    && let Ok(mut child) = unwanted.0
                {
                    drop(child.kill());
                    drop(child.wait());
                }
            }
        })
        .ok()
        .map(|_| sender)
});

/// Starts a process that the kernel kills when this process dies.
pub(crate) fn spawn(mut command: Command) -> io::Result<Child> {
    let us = rustix::process::getpid();
    // SAFETY: between fork and exec only async-signal-safe system calls run, without allocation.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // Our process may have died before the request above.
            if rustix::process::getppid() != Some(us) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    let gone = || io::Error::other("the thread that starts processes could not be started");
    let (answer, result) = sync_channel(1);
    let parent = PARENT.as_ref().ok_or_else(gone)?;
    parent.send(Job { command, answer }).map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}
