//! What tests say even when they pass. The harness shows what a test prints only if it fails; who
//! reads the log must still see what was left out, and how many seeds ran.

pub mod fuzz;

use std::{
    env,
    fmt::Display,
    io::{self, Write as _},
};

/// Prints a line past the harness, which captures only the print macros.
pub fn say(line: impl Display) {
    let mut out = io::stdout().lock();
    // A log that can't be written to is no reason to fail.
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {}
}

/// Says that a test can't run here.
///
/// # Panics
/// With `RELEVO_REQUIRE_ALL=1`: then nothing may be skipped.
pub fn skip(test: &str, why: impl Display) {
    let required = env::var_os("RELEVO_REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "{test} must run here, and can't: {why}");
    say(format_args!("SKIPPED {test}: {why}"));
}

/// What a test needs, or `None` after [`skip`].
pub fn need<T, E: Display>(test: &str, result: Result<T, E>) -> Option<T> {
    result.map_err(|why| skip(test, why)).ok()
}
