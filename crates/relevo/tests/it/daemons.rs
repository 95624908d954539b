//! Daemons of the binary under test; `testing/chaos` knows how to drive them.

use std::{ops::Deref, process::Command};

pub(crate) use chaos::{Answer, Daemon, eventually};

/// The binary under test: cargo builds it before these tests, so it is never stale.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_relevo");

/// A directory with daemons of the binary under test, on loopback.
pub(crate) struct Site(chaos::Site);

impl Site {
    pub(crate) fn new() -> Self {
        Self(chaos::Site::new(PROGRAM))
    }
}

impl Deref for Site {
    type Target = chaos::Site;

    fn deref(&self) -> &chaos::Site {
        &self.0
    }
}

/// The program under test.
pub(crate) fn relevo() -> Command {
    Command::new(PROGRAM)
}
