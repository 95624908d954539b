//! Parts of services on a real kernel.

mod addresses;
mod runner;

use std::{env, fmt};

/// What a test needs, or `None` after saying that the test is skipped. With `RELEVO_REQUIRE_ALL=1`
/// nothing may be skipped.
fn need<T, E: fmt::Display>(test: &str, result: Result<T, E>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(why) if env::var_os("RELEVO_REQUIRE_ALL").is_some_and(|value| value == "1") => {
            panic!("{test} may not be skipped: {why}")
        }
        Err(why) => {
            println!("SKIPPED {test}: {why}");
            None
        }
    }
}
