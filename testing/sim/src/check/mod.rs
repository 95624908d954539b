//! The checkers, one module each, with the rule of DESIGN section 3 that it watches in its head.
//!
//! They see everything (the committed log, the bytes on all disks, all requests and answers) and
//! trust nothing that an engine says about itself.

pub mod cold;
pub mod commit_then_ack;
pub mod equal;
pub mod linear;
pub mod lower_epoch;
pub mod marked;
pub mod one_writer;

use std::fmt;

/// The rule about liveness: broken when something takes too long, not when data is wrong.
pub const HEALS: &str = "it heals when faults stop (rule 11)";

/// A broken promise.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Which promise, in a few words; the same for every run that breaks it.
    pub rule: &'static str,
    /// What happened.
    pub what: String,
}

impl Violation {
    /// A broken promise.
    #[must_use]
    pub fn new(rule: &'static str, what: impl Into<String>) -> Self {
        Self {
            rule,
            what: what.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)
    }
}

/// What every check gives.
pub type Verdict = Result<(), Violation>;
