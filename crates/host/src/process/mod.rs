//! Supervised processes: started, watched, restarted, stopped, and never left behind.
//!
//! Called by the process part of `agents`. A [`Supervisor`] owns one process and its process group.
//! The kernel kills the process when this one dies, tells its end at once by a pidfd, and the
//! group is killed with it.

mod child;
pub(crate) mod leader;
mod log;
mod supervisor;

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, time::Duration};

pub use supervisor::Supervisor;

/// More ends than this within [`EXIT_WINDOW`] and the process counts as failed: restarts here don't
/// help, so the service shall move. With the pauses below a process that ends at once is given up
/// after 0.7 s.
pub const MAX_EXITS: usize = 3;

/// See [`MAX_EXITS`].
pub const EXIT_WINDOW: Duration = Duration::from_secs(60);

/// The pause before a first restart; each further one within [`EXIT_WINDOW`] doubles it.
pub const FIRST_RESTART: Duration = Duration::from_millis(100);

/// How long a process may take to become ready, unless its spec says otherwise.
pub const READY_PATIENCE: Duration = Duration::from_secs(30);

/// How long a process may take to end after SIGTERM, unless its spec says otherwise.
pub const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How long the kernel may take to end a process after SIGKILL before the stop is reported as
/// failed: such a process waits for a device.
pub const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// What to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProcessSpec {
    /// For messages and thread names.
    pub name: String,
    /// Program and arguments. At least one word.
    pub command: Vec<String>,
    /// Environment, in addition to ours.
    pub environment: BTreeMap<String, String>,
    /// Where it runs; `None`: `/`.
    pub directory: Option<PathBuf>,
    /// Ready when this TCP address accepts; `None`: when it started.
    pub ready: Option<SocketAddr>,
    /// A file that gets its output, besides the last lines kept in memory. Renamed to `.1` when it
    /// grows past 1 MiB.
    pub log: Option<PathBuf>,
    /// How long it may take to become ready.
    pub ready_patience: Duration,
    /// How long it may take to end after SIGTERM.
    pub stop_patience: Duration,
}

impl ProcessSpec {
    /// A spec with the default patience, no environment, no log.
    #[must_use]
    pub fn new(name: impl Into<String>, command: Vec<String>) -> Self {
        Self {
            name: name.into(),
            command,
            environment: BTreeMap::new(),
            directory: None,
            ready: None,
            log: None,
            ready_patience: READY_PATIENCE,
            stop_patience: STOP_PATIENCE,
        }
    }
}

/// What a supervised process does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProcessState {
    /// It runs.
    Running {
        /// Its process id.
        pid: i32,
    },
    /// It ended and is started again in a moment.
    Restarting {
        /// How it ended.
        reason: String,
    },
    /// It was given up.
    Failed {
        /// Why, with its last words.
        reason: String,
    },
    /// It was stopped as asked.
    Stopped,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// The kernel could not say.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with code {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}
