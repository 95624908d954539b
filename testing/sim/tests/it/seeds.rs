//! Ten thousand seeds, after those that ever failed.

use sim::{batch, coverage, scenario::Scenario};

/// Seeds run by default; `RELEVO_SIM_SEEDS` gives another number.
const SEEDS: u64 = 10_000;

/// The same with the real managers, of what they must have met.
const MANAGED_FOR_COVERAGE: u64 = 400;
const MANAGED_MARKS: &[&str] = &[
    "commit: force",
    "split brain was seen",
    "split brain was decided for the history in force",
    "split brain was decided for the other history",
    "a history gave way",
    "who found what a disk altered was lost before it was repaired",
    "protocol A: switchover to such a replica",
    "second fault at: promotion, before it opens",
    "second fault at: the end of a resync, before the join",
    "second fault: the control log was out of reach",
];

/// One run with the real managers for so many without.
const MANAGED_SHARE: u64 = 10;

fn seeds() -> u64 {
    std::env::var("RELEVO_SIM_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(SEEDS)
}

#[test]
fn seeds_that_ever_failed_pass() {
    for scenario in batch::scenarios_of(include_str!("../../seeds.txt")) {
        if let Err(failure) = batch::run_with_story(&scenario) {
            panic!("{failure}");
        }
    }
}

#[test]
fn ten_thousand_seeds_keep_every_promise() {
    let seeds = seeds();
    let totals = batch::run_many(0..seeds, batch::threads(), Scenario::of_seed);
    if let Some(failure) = totals.failures.first() {
        panic!("{failure}");
    }
    said::say(format_args!(
        "{} seeds, {} events, {} requests answered\n{}",
        totals.runs,
        totals.events,
        totals.answered,
        totals.marks.table()
    ));
    assert_eq!(totals.runs, seeds);
    if seeds >= batch::SEEDS_FOR_COVERAGE {
        let missing = totals.marks.missing();
        assert!(
            missing.is_empty(),
            "never reached in {seeds} seeds: {missing:?}"
        );
    }
}

#[test]
fn real_managers_keep_every_promise() {
    let seeds = seeds() / MANAGED_SHARE;
    let totals = batch::run_many(0..seeds, batch::threads(), Scenario::managed);
    if let Some(failure) = totals.failures.first() {
        panic!("{failure}");
    }
    said::say(format_args!(
        "{} seeds with real managers, {} events",
        totals.runs, totals.events
    ));
    assert_eq!(totals.runs, seeds);
    if seeds >= MANAGED_FOR_COVERAGE {
        let missing: Vec<&str> = MANAGED_MARKS
            .iter()
            .chain(coverage::MANAGED)
            .copied()
            .filter(|mark| totals.marks.count(mark) == 0)
            .collect();
        assert!(
            missing.is_empty(),
            "never reached in {seeds} seeds with real managers: {missing:?}"
        );
    }
}

#[test]
fn a_seed_is_the_same_run_again() {
    for seed in [3, 4] {
        let counts = || {
            let summary =
                batch::run_with_story(&Scenario::of_seed(seed)).map_err(|f| f.to_string());
            summary.map(|summary| (summary.events, summary.answered, summary.disk_effects))
        };
        assert_eq!(counts(), counts());
    }
}
