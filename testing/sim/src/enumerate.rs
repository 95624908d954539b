//! Crash enumeration: a short schedule is run once to count the disk effects of a node, then again
//! with a crash before each of them, once with power and once without.

use crate::{
    batch::{Failure, run, run_many},
    scenario::{CrashPoint, Scenario},
    trace::Trace,
};

/// Crashes a node of a seed's short schedule before every `stride`th disk effect. Gives how many
/// runs that were.
///
/// # Errors
/// The first run that broke a promise.
pub fn crash_everywhere(
    seed: u64,
    node: usize,
    stride: u64,
    threads: usize,
) -> Result<u64, Failure> {
    let whole = run(Scenario::short(seed), &Trace::silent())?;
    let effects = whole.disk_effects.get(node).copied().unwrap_or(0);
    let points = effects.div_ceil(stride.max(1));
    let totals = run_many(0..points * 2, threads, |number| Scenario {
        crash_point: Some(CrashPoint {
            node,
            disk_effect: number / 2 * stride.max(1),
            power: number % 2 == 1,
        }),
        ..Scenario::short(seed)
    });
    match totals.failures.into_iter().next() {
        Some(failure) => Err(failure),
        None => Ok(totals.runs),
    }
}
