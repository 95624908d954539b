//! `sim`: runs seeds by hand.

use std::{
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Parser;
use sim::{
    batch, enumerate,
    faults::Fault,
    scenario::{CrashPoint, Planted, Scenario},
    trace::Trace,
};

/// Seeds of a spell of a night, and how many of them run with the real managers as well.
const SPELL: u64 = 2000;
const SPELL_MANAGED: u64 = 200;

/// Runs simulated clusters and checks every promise after every step.
#[derive(Parser, Debug)]
struct Arguments {
    /// Run this one seed.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Print what happens, a column per node.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Run so many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// Begin with this one.
    #[arg(long)]
    from: Option<u64>,
    /// For nights: run seeds that nobody ran before for so long, a tenth of them with the real managers as well.
    #[arg(long, conflicts_with_all = ["seeds", "seed", "managed"])]
    minutes: Option<u64>,
    /// Threads; all cores when not given.
    #[arg(long)]
    threads: Option<usize>,
    /// The seed's short schedule, as crash enumeration uses it.
    #[arg(long, requires = "seed")]
    short: bool,
    /// Layer 2: with the real node managers.
    #[arg(long)]
    managed: bool,
    /// Inject only faults of this kind; may be given several times.
    #[arg(long)]
    only: Vec<Fault>,
    /// Crash a node before one of its disk effects: NODE:EFFECT:power or NODE:EFFECT:process.
    #[arg(long, requires = "seed")]
    crash: Option<CrashPoint>,
    /// Plant a bug in the engine.
    #[arg(long)]
    planted: Option<Planted>,
    /// Crash the node of this number (1, 2) at every disk effect of the seed's short schedule.
    #[arg(long, requires = "seed")]
    crash_everywhere: Option<usize>,
    /// Go on until so many seeds failed; the first one's story is shown, of the others what broke.
    #[arg(long, default_value_t = 1)]
    failures: usize,
    /// Show how often each situation was reached.
    #[arg(long)]
    coverage: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let threads = arguments.threads.unwrap_or_else(batch::threads);
    match (arguments.seed, arguments.crash_everywhere) {
        (Some(seed), Some(node)) => {
            match enumerate::crash_everywhere(seed, node.saturating_sub(1), 1, threads) {
                Ok(runs) => {
                    println!("seed {seed}: {runs} crash points, all promises kept");
                    ExitCode::SUCCESS
                }
                Err(failure) => fail(&failure),
            }
        }
        (Some(seed), None) => one(seed, &arguments),
        (None, _) => match arguments.minutes {
            Some(minutes) => night(&arguments, threads, Duration::from_secs(60 * minutes)),
            None => many(&arguments, threads),
        },
    }
}

/// What the arguments make of a seed.
fn scenario_of(seed: u64, arguments: &Arguments, managed: bool) -> Scenario {
    let mut scenario = match (arguments.short, managed) {
        (true, _) => Scenario::short(seed),
        (false, true) => Scenario::managed(seed),
        (false, false) => Scenario::of_seed(seed),
    };
    scenario.crash_point = arguments.crash;
    scenario.planted = arguments.planted;
    if !arguments.only.is_empty() {
        scenario.faults = arguments.only.iter().map(|fault| (*fault, 1)).collect();
    }
    scenario
}

fn one(seed: u64, arguments: &Arguments) -> ExitCode {
    let scenario = scenario_of(seed, arguments, arguments.managed);
    println!("{scenario:?}");
    let trace = if arguments.trace {
        Trace::printing()
    } else {
        Trace::keeping()
    };
    match batch::run(scenario, &trace) {
        Ok(summary) => {
            if arguments.coverage {
                print!("{}", summary.marks.table());
            }
            println!(
                "seed {seed}: all promises kept; {} events, {} requests answered",
                summary.events, summary.answered
            );
            ExitCode::SUCCESS
        }
        Err(failure) => fail(&failure),
    }
}

fn many(arguments: &Arguments, threads: usize) -> ExitCode {
    let from = arguments.from.unwrap_or(0);
    let begin = now();
    let totals = batch::run_many_until(
        from..from + arguments.seeds,
        threads,
        arguments.failures,
        |seed| scenario_of(seed, arguments, arguments.managed),
    );
    report(arguments, &totals, begin.elapsed())
}

/// Spells of seeds until the time is over, or as many have failed as may.
fn night(arguments: &Arguments, threads: usize, time: Duration) -> ExitCode {
    // The clock's seconds, spread out: two nights have no seed in common.
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let spread = clock.map_or(1, |clock| clock.as_secs()) * 1_000_000;
    let mut from = arguments.from.unwrap_or(spread);
    let begin = now();
    let mut totals = batch::Totals::default();
    while begin.elapsed() < time && totals.failures.len() < arguments.failures {
        for (seeds, managed) in [(SPELL, false), (SPELL_MANAGED, true)] {
            totals.add(batch::run_many_until(
                from..from + seeds,
                threads,
                arguments.failures,
                |seed| scenario_of(seed, arguments, managed),
            ));
        }
        from += SPELL;
        println!(
            "{} minutes: {} seeds, up to {from}; {} failed",
            begin.elapsed().as_secs() / 60,
            totals.runs,
            totals.failures.len()
        );
    }
    report(arguments, &totals, begin.elapsed())
}

/// The moment, to tell how long runs take.
#[expect(
    clippy::disallowed_methods,
    reason = "a suspended machine runs no seeds: what is told is the speed"
)]
fn now() -> Instant {
    Instant::now()
}

fn report(arguments: &Arguments, totals: &batch::Totals, time: Duration) -> ExitCode {
    if arguments.coverage {
        print!("{}", totals.marks.table());
    }
    if let Some(failure) = totals.failures.first() {
        let code = fail(failure);
        let failed = totals.failures.len() as u64;
        eprintln!("{failed} of {} seeds failed", totals.runs + failed);
        for failure in &totals.failures {
            let what: String = failure.what.chars().take(300).collect();
            eprintln!("  {}: {what}", failure.arguments);
        }
        return code;
    }
    // Schedules that reach nothing prove nothing.
    let all_kinds = !arguments.managed && arguments.only.is_empty() && arguments.planted.is_none();
    let missing = totals.marks.missing();
    if all_kinds && totals.runs >= batch::SEEDS_FOR_COVERAGE && !missing.is_empty() {
        eprintln!("never reached in {} seeds: {missing:?}", totals.runs);
        return ExitCode::FAILURE;
    }
    println!(
        "{} seeds: all promises kept; {} events, {} requests answered; {} s, {:.0} seeds a second",
        totals.runs,
        totals.events,
        totals.answered,
        time.as_secs(),
        totals.runs as f64 / time.as_secs_f64()
    );
    ExitCode::SUCCESS
}

fn fail(failure: &batch::Failure) -> ExitCode {
    eprintln!("{failure}");
    ExitCode::FAILURE
}
