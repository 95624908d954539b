//! The interface of a disk driver, and which one is used.

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc};

use relevo_replication::io::{DiskError, DiskOp, DiskReply, OpId};

use crate::{
    backing::Backing,
    memory::MemoryDisk,
    pool::PoolDisk,
    uring::{self, UringDisk},
};

/// Forces the driver: `uring` or `pool`.
pub const DRIVER_VARIABLE: &str = "RELEVO_DISK_DRIVER";

/// Carries out operations on one backing. Owned by the volume's thread.
///
/// Operations under way are unordered among each other. After [`Self::flush_submissions`] call
/// [`Self::poll_completions`] once, and then whenever [`Self::wake_fd`] was counted up: what is refused
/// without asking the disk completes without a wake-up. Dropping a driver waits for what is under
/// way; what has not been started is not carried out.
pub trait DiskDriver: fmt::Debug {
    /// Takes an operation. Nothing happens before [`Self::flush_submissions`]. The queue is not
    /// bounded here: the engine bounds what it has under way.
    fn submit(&mut self, op: DiskOp);

    /// Starts what was taken.
    fn flush_submissions(&mut self);

    /// Appends what completed since the last call; each operation completes exactly once.
    fn poll_completions(&mut self, completed: &mut Vec<(OpId, Result<DiskReply, DiskError>)>);

    /// A counter (`eventfd`) that goes up when there are completions to take. Nobody reads it, which
    /// saves a system call per turn: watch it edge-triggered.
    fn wake_fd(&self) -> BorrowedFd<'_>;
}

/// A driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DriverKind {
    /// io_uring.
    Uring,
    /// A few threads that make blocking calls.
    Pool,
    /// Calls on the volume's own thread: for a backing in memory.
    Memory,
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "io_uring",
            Self::Pool => "thread pool",
            Self::Memory => "at once",
        })
    }
}

/// A driver and why it was chosen, for status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DriverChoice {
    /// The driver.
    pub kind: DriverKind,
    /// Why this one.
    pub reason: String,
}

impl fmt::Display for DriverChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.kind, self.reason)
    }
}

/// Chooses the driver for this process: io_uring where the kernel allows it and has the
/// operations, unless [`DRIVER_VARIABLE`] says otherwise. Cheap; called once at start.
#[must_use]
pub fn probe() -> DriverChoice {
    choose(
        std::env::var(DRIVER_VARIABLE).ok().as_deref(),
        uring::is_usable,
    )
}

fn choose(forced: Option<&str>, usable: impl Fn() -> Result<(), String>) -> DriverChoice {
    let because = |kind, reason: String| DriverChoice { kind, reason };
    let note = match forced {
        Some("uring") => {
            return because(DriverKind::Uring, format!("{DRIVER_VARIABLE}=uring"));
        }
        Some("pool") => return because(DriverKind::Pool, format!("{DRIVER_VARIABLE}=pool")),
        Some(other) => {
            format!("; {DRIVER_VARIABLE}={other} is neither uring nor pool and was ignored")
        }
        None => String::new(),
    };
    match usable() {
        Ok(()) => because(DriverKind::Uring, format!("the kernel offers it{note}")),
        Err(why) => because(
            DriverKind::Pool,
            format!("io_uring can't be used here: {why}{note}"),
        ),
    }
}

/// Opens the chosen driver; for a backing in memory, unless one was forced, the one for that. When
/// io_uring was chosen by the probe but can't be set up now (limits
/// on locked memory, say) the pool takes its place; the returned choice says so.
///
/// # Errors
/// The system's refusal to give what even the pool needs, or a forced io_uring that does not work.
pub fn open_driver(
    backing: Arc<Backing>,
    choice: &DriverChoice,
) -> io::Result<(Box<dyn DiskDriver>, DriverChoice)> {
    let forced = choice.reason.starts_with(DRIVER_VARIABLE);
    if choice.kind == DriverKind::Memory
        || choice.kind == DriverKind::Uring && !forced && backing.is_in_memory()
    {
        let choice = DriverChoice {
            kind: DriverKind::Memory,
            reason: "the backing is in memory".to_owned(),
        };
        return Ok((Box::new(MemoryDisk::new(backing)?), choice));
    }
    if choice.kind == DriverKind::Uring {
        match UringDisk::new(Arc::clone(&backing)) {
            Ok(disk) => return Ok((Box::new(disk), choice.clone())),
            Err(error) if forced => return Err(error),
            Err(error) => {
                let choice = DriverChoice {
                    kind: DriverKind::Pool,
                    reason: format!("io_uring could not be set up for this volume: {error}"),
                };
                return Ok((Box::new(PoolDisk::new(backing)?), choice));
            }
        }
    }
    Ok((Box::new(PoolDisk::new(backing)?), choice.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_gives_its_reason() {
        let works = || Ok(());
        let refused = || Err("Operation not permitted".to_owned());
        assert_eq!(choose(None, works).kind, DriverKind::Uring);
        assert_eq!(choose(Some("pool"), works).kind, DriverKind::Pool);
        assert_eq!(choose(Some("uring"), refused).kind, DriverKind::Uring);
        let fallen_back = choose(Some("urng"), refused);
        assert_eq!(fallen_back.kind, DriverKind::Pool);
        let text = fallen_back.to_string();
        assert!(
            text.contains("not permitted") && text.contains("urng"),
            "{text}"
        );
    }
}
