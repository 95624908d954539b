//! The one error of this crate: a sentence of what happened, why, and what to do next.

use std::{fmt, io};

/// What a driver could not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostError {
    /// What was tried: `cannot mount /dev/loop0 on /srv/mail`.
    pub what: String,
    /// Why it failed: the kernel's or the tool's words.
    pub why: String,
    /// What a person can do next.
    pub next: String,
    /// The kernel's error number, when the kernel refused.
    pub errno: Option<i32>,
}

/// What this crate returns.
pub type Result<T, E = HostError> = std::result::Result<T, E>;

impl HostError {
    /// A failure that the kernel did not report.
    pub fn new(what: impl Into<String>, why: impl fmt::Display, next: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            why: why.to_string(),
            next: next.into(),
            errno: None,
        }
    }

    /// A system call that failed.
    pub fn io(
        what: impl Into<String>,
        error: impl Into<io::Error>,
        next: impl Into<String>,
    ) -> Self {
        let error = error.into();
        Self {
            what: what.into(),
            why: error.to_string(),
            next: next.into(),
            errno: error.raw_os_error(),
        }
    }

    /// Whether the kernel refused for lack of rights.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        matches!(self.errno, Some(libc::EPERM | libc::EACCES))
    }
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.why, self.next)
    }
}

impl std::error::Error for HostError {}
