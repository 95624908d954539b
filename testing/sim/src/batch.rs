//! Running seeds: one with its story, or many on all cores.

use std::{
    fmt,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    check::HEALS,
    cluster::{Cluster, Summary},
    coverage::Marks,
    scenario::Scenario,
    trace::Trace,
};

/// From so many seeds on, every situation that has a mark must have been reached.
pub const SEEDS_FOR_COVERAGE: u64 = 4_000;

/// A run that broke a promise, or in which a core panicked.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// The arguments of `sim` that show it again.
    pub arguments: String,
    /// When it broke, in virtual time, and which promise how.
    pub what: String,
    /// It was a promise about data, not about healing in time.
    pub is_safety: bool,
    /// The last lines of the story.
    pub story: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\nseed {} failed: {}\nto see it again: cargo run -p sim -- {} --trace",
            self.story, self.seed, self.what, self.arguments
        )
    }
}

/// What many runs gave.
#[derive(Debug, Default)]
pub struct Totals {
    /// Runs.
    pub runs: u64,
    /// Events.
    pub events: u64,
    /// Requests that were answered well.
    pub answered: u64,
    /// Situations.
    pub marks: Marks,
    /// The failures, lowest seed first; the batch stops soon after the first.
    pub failures: Vec<Failure>,
}

/// Runs one scenario.
///
/// # Errors
/// Which promise it broke.
pub fn run(scenario: Scenario, trace: &Trace) -> Result<Summary, Failure> {
    let seed = scenario.seed;
    let arguments = scenario.arguments();
    let failure = |what: String, is_safety: bool| Failure {
        seed,
        is_safety,
        arguments: arguments.clone(),
        what,
        story: trace.last_lines(),
    };
    let attempt = AssertUnwindSafe(|| {
        let mut cluster =
            Cluster::new(scenario, trace.clone()).map_err(|v| (v.to_string(), false))?;
        match cluster.run() {
            Ok(()) => Ok(cluster.summary()),
            Err(violation) => {
                let what = format!("at {:?}: {violation}", cluster.now());
                Err((what, violation.rule != HEALS))
            }
        }
    });
    match catch_unwind(attempt) {
        Ok(Ok(summary)) => Ok(summary),
        Ok(Err((what, is_safety))) => Err(failure(what, is_safety)),
        Err(panic) => Err(failure(format!("panic: {}", panic_words(&*panic)), false)),
    }
}

/// Runs one scenario silently, and again with its story if it fails.
///
/// # Errors
/// Which promise it broke, with the story.
pub fn run_with_story(scenario: &Scenario) -> Result<Summary, Failure> {
    run(scenario.clone(), &Trace::silent()).or_else(|_| run(scenario.clone(), &Trace::keeping()))
}

/// Runs the scenarios of a range of numbers on so many threads, until one fails.
#[must_use]
pub fn run_many(
    range: Range<u64>,
    threads: usize,
    scenario: impl Fn(u64) -> Scenario + Sync,
) -> Totals {
    run_many_until(range, threads, 1, scenario)
}

/// The same until so many have failed.
#[must_use]
pub fn run_many_until(
    range: Range<u64>,
    threads: usize,
    failures_max: usize,
    scenario: impl Fn(u64) -> Scenario + Sync,
) -> Totals {
    let failed = AtomicU64::new(0);
    let next = AtomicU64::new(range.start);
    let stop = AtomicBool::new(false);
    let totals = Mutex::new(Totals::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let mut ours = Totals::default();
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= range.end {
                        break;
                    }
                    match run_with_story(&scenario(number)) {
                        Ok(summary) => ours.count(&summary),
                        Err(failure) => {
                            ours.failures.push(failure);
                            let failed = failed.fetch_add(1, Ordering::Relaxed) + 1;
                            if failed >= failures_max as u64 {
                                stop.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                }
                if let Ok(mut totals) = totals.lock() {
                    totals.add(ours);
                }
            });
        }
    });
    let mut totals = totals.into_inner().unwrap_or_default();
    totals.failures.sort_by_key(|failure| failure.seed);
    totals
}

/// All cores.
#[must_use]
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The scenarios of a file of seeds: one a line with its story behind it; `managed` before the number means
/// with the real managers; `#` begins a comment.
#[must_use]
pub fn scenarios_of(text: &str) -> Vec<Scenario> {
    let scenario = |line: &str| {
        let mut words = line.split_whitespace();
        Some(match words.next()? {
            "managed" => Scenario::managed(words.next()?.parse().ok()?),
            seed => Scenario::of_seed(seed.parse().ok()?),
        })
    };
    text.lines().filter_map(scenario).collect()
}

impl Totals {
    fn count(&mut self, summary: &Summary) {
        self.runs += 1;
        self.events += summary.events;
        self.answered += summary.answered;
        self.marks.add(&summary.marks);
    }

    /// Adds what another batch gave.
    pub fn add(&mut self, other: Self) {
        self.runs += other.runs;
        self.events += other.events;
        self.answered += other.answered;
        self.marks.add(&other.marks);
        self.failures.extend(other.failures);
    }
}

fn panic_words(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "without words".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_file_has_a_story_behind_each_seed() {
        let found = scenarios_of("# why\n12 lost write\n\nmanaged 7\tpanic\n");
        let found: Vec<_> = found.iter().map(|it| (it.seed, it.managed)).collect();
        assert_eq!(found, [(12, false), (7, true)]);
    }
}
