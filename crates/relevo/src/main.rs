//! The `relevo` program: the verbs of the command line, and those that need no daemon.

use std::{future::Future, process::ExitCode};

use clap::{Parser, Subcommand};
use relevo_cli::GlobalArgs;
use relevo_demo::{DemoArgs, bench::BenchArgs};
use relevo_ledger::{LedgerArgs, LedgerClientArgs};

/// Makes a few Linux machines behave as one machine that stays up
#[derive(Parser, Debug)]
#[command(name = "relevo", version, max_term_width = 100)]
struct Program {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    #[command(flatten)]
    Cluster(relevo_cli::Verb),
    /// Build a cluster on this machine, pull plugs, and show that nothing is lost
    Demo(DemoArgs),
    /// Measure what replication costs, on a cluster on this machine
    Bench(BenchArgs),
    /// Run the small service that the demo watches
    Ledger(LedgerArgs),
    /// Post numbered entries to a ledger and keep a journal of what it acknowledged
    LedgerClient(LedgerClientArgs),
}

// Not an async main: the demo enters namespaces, and the daemon arranges its threads itself.
fn main() -> ExitCode {
    let Program { global, verb } = Program::parse();
    let result = match verb {
        Verb::Cluster(verb) => return relevo_cli::run(global, verb),
        Verb::Demo(args) => relevo_demo::run(&args, global.json),
        Verb::Bench(args) => relevo_demo::bench::run(&args, global.json),
        Verb::Ledger(args) => ledger(args),
        Verb::LedgerClient(args) => ledger_client(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn ledger(args: LedgerArgs) -> anyhow::Result<ExitCode> {
    block_on(relevo_ledger::run(args.config()?))??;
    Ok(ExitCode::SUCCESS)
}

fn ledger_client(args: LedgerClientArgs) -> anyhow::Result<ExitCode> {
    let interrupted = async {
        // If no handler can be installed, the signal ends the process all the same.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    block_on(relevo_ledger::run_client(args.config(), interrupted))??;
    Ok(ExitCode::SUCCESS)
}

fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(future))
}
