//! `sim`: runs seeds by hand.

use std::process::ExitCode;

use clap::Parser;
use sim::{
    batch, enumerate,
    faults::Fault,
    scenario::{CrashPoint, Planted, Scenario},
    trace::Trace,
};

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
    #[arg(long, default_value_t = 0)]
    from: u64,
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
        (None, _) => many(&arguments, threads),
    }
}

/// What the arguments make of a seed.
fn scenario_of(seed: u64, arguments: &Arguments) -> Scenario {
    let mut scenario = match (arguments.short, arguments.managed) {
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
    let scenario = scenario_of(seed, arguments);
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
    let range = arguments.from..arguments.from + arguments.seeds;
    let totals = batch::run_many_until(range, threads, arguments.failures, |seed| {
        scenario_of(seed, arguments)
    });
    if arguments.coverage {
        print!("{}", totals.marks.table());
    }
    match totals.failures.first() {
        Some(failure) => {
            let code = fail(failure);
            let failed = totals.failures.len() as u64;
            eprintln!("{failed} of {} seeds failed", totals.runs + failed);
            for failure in &totals.failures {
                let what: String = failure.what.chars().take(300).collect();
                eprintln!("  {}: {what}", failure.seed);
            }
            code
        }
        None => {
            println!(
                "{} seeds: all promises kept; {} events, {} requests answered",
                totals.runs, totals.events, totals.answered
            );
            ExitCode::SUCCESS
        }
    }
}

fn fail(failure: &batch::Failure) -> ExitCode {
    eprintln!("{failure}");
    ExitCode::FAILURE
}
