//! The verbs, one file per group.

mod cluster;
mod confirm;
mod daemon;
mod events;
mod fence;
mod node;
mod order;
mod replica;
mod role;
mod saved;
mod service;
mod status;
mod volume;
mod why;

use std::{future::Future, io::Write as _, path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use relevo_server::api::{Done, OrderRequest};
use serde::Serialize;

use crate::{CliError, Client};

/// Options that every verb takes.
#[derive(Args, Clone, Debug)]
pub struct GlobalArgs {
    /// State directory of this machine's daemon
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "RELEVO_STATE_DIR",
        default_value = relevo_server::DEFAULT_STATE_DIR
    )]
    pub state_dir: PathBuf,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

/// A verb.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Make this machine the first node of a new cluster
    Init(cluster::InitArgs),
    /// Make this machine a node of an existing cluster
    Join(cluster::JoinArgs),
    /// Make a token with which one more machine can join
    Token(cluster::TokenArgs),
    /// Take this machine out of its cluster for good
    Leave,
    /// Show what is going on; exit code 0 healthy, 1 degraded, 2 down or unreachable
    Status,
    /// Show what happened, and with --follow what happens
    Events(events::EventsArgs),
    /// Nodes of the cluster: their paths
    #[command(subcommand)]
    Node(node::NodeVerb),
    /// Replicated volumes
    #[command(subcommand)]
    Volume(volume::VolumeVerb),
    /// Say what would happen if a node died or were put on standby; nothing of it is done
    WhatIf(why::WhatIfArgs),
    /// Say why a service is where it is, and what speaks against each node
    Why(why::WhyArgs),
    /// Services: what runs on one node and moves when that node fails
    #[command(subcommand)]
    Service(service::ServiceVerb),
    /// Fencing: switch a node off and know it
    #[command(subcommand)]
    Fence(fence::FenceVerb),
    /// Make this node primary of a volume by hand, for a volume that no service uses; with --force also
    /// when its replica is not in sync
    Primary(role::PrimaryArgs),
    /// Make this node secondary of a volume by hand
    Secondary(role::RoleArgs),
    /// Open this node's replica of a volume: after `detach`, or when its disk was repaired
    #[command(visible_alias = "up")]
    Attach(order::OrderArgs),
    /// Close this node's replica of a volume; its disk is free
    #[command(visible_alias = "down")]
    Detach(order::OrderArgs),
    /// Copy this node's replica of a volume anew from the primary
    Invalidate(order::OrderArgs),
    /// Keep this node's replica from being promoted until it was in sync again
    Outdate(order::OrderArgs),
    /// Show the role of this node for a volume
    Role(order::OrderArgs),
    /// Show the links of a volume's replicas, a line each
    Cstate(order::OrderArgs),
    /// Show the disks of a volume's replicas, a line each
    Dstate(order::OrderArgs),
    /// Let requests to a volume wait, on this node
    SuspendIo(order::OrderArgs),
    /// Let requests to a volume go on
    ResumeIo(order::OrderArgs),
    /// End the link of this node's replica to another one, and have none: StandAlone
    Disconnect(order::PeerArgs),
    /// Link this node's replica to the others again
    Connect(order::PeerArgs),
    /// Let the resync of a volume to and from this node stand still; writes go on being replicated
    PauseSync(order::PeerArgs),
    /// Let the resync of a volume go on
    ResumeSync(order::PeerArgs),
    /// Compare the other replicas of a volume with this node's, which is primary, while it is in use
    Verify(order::VerifyArgs),
    /// Show the metadata on the backing of this node's replica, also while the volume is down or no
    /// daemon runs
    DumpMd(order::OrderArgs),
    /// Wait until every replica of a volume is in sync; exit code 1 if it is not when the time is over
    WaitSync(order::WaitSyncArgs),
    /// Move every service off a node and let none come back
    Standby(role::StandbyArgs),
    /// Let services come to a node again
    Unstandby(role::StandbyArgs),
    /// Run the daemon of this machine in the foreground
    Daemon(daemon::DaemonArgs),
}

/// What a verb works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) json: bool,
    pub(crate) state_dir: PathBuf,
}

/// Runs a verb, prints its result or its error, and gives the exit code.
#[must_use]
pub fn run(global: GlobalArgs, verb: Verb) -> ExitCode {
    let context = Context {
        client: Client::new(&global.state_dir),
        json: global.json,
        state_dir: global.state_dir,
    };
    let result = match verb {
        Verb::Daemon(args) => return daemon::run(&context, args),
        Verb::Init(args) => block_on(cluster::init(&context, args)),
        Verb::Join(args) => block_on(cluster::join(&context, args)),
        Verb::Token(args) => block_on(cluster::token(&context, args)),
        Verb::Leave => block_on(cluster::leave(&context)),
        Verb::Status => block_on(status::status(&context)),
        Verb::Events(args) => block_on(events::events(&context, args)),
        Verb::Node(verb) => block_on(node::run(&context, verb)),
        Verb::Volume(verb) => block_on(volume::run(&context, verb)),
        Verb::Service(verb) => block_on(service::run(&context, verb)),
        Verb::WhatIf(args) => block_on(why::what_if(&context, args)),
        Verb::Why(args) => block_on(why::why(&context, &args)),
        Verb::Fence(verb) => block_on(fence::run(&context, verb)),
        Verb::Primary(args) => block_on(role::primary(&context, args)),
        Verb::Secondary(args) => block_on(role::secondary(&context, args)),
        Verb::Attach(args) => block_on(order::give(&context, &args.volume, OrderRequest::Attach)),
        Verb::Detach(args) => block_on(order::give(&context, &args.volume, OrderRequest::Detach)),
        Verb::Invalidate(args) => block_on(order::give(
            &context,
            &args.volume,
            OrderRequest::Invalidate,
        )),
        Verb::Outdate(args) => block_on(order::give(&context, &args.volume, OrderRequest::Outdate)),
        Verb::Role(args) => block_on(order::role(&context, &args.volume)),
        Verb::Cstate(args) => block_on(order::cstate(&context, &args.volume)),
        Verb::Dstate(args) => block_on(order::dstate(&context, &args.volume)),
        Verb::SuspendIo(args) => {
            block_on(order::give(&context, &args.volume, OrderRequest::SuspendIo))
        }
        Verb::ResumeIo(args) => {
            block_on(order::give(&context, &args.volume, OrderRequest::ResumeIo))
        }
        Verb::Disconnect(args) => {
            let request = OrderRequest::Disconnect { node: args.node };
            block_on(order::give(&context, &args.volume, request))
        }
        Verb::Connect(args) => {
            let request = OrderRequest::Connect { node: args.node };
            block_on(order::give(&context, &args.volume, request))
        }
        Verb::PauseSync(args) => {
            let request = OrderRequest::PauseSync { node: args.node };
            block_on(order::give(&context, &args.volume, request))
        }
        Verb::ResumeSync(args) => {
            let request = OrderRequest::ResumeSync { node: args.node };
            block_on(order::give(&context, &args.volume, request))
        }
        Verb::Verify(args) => block_on(order::verify(&context, args)),
        Verb::DumpMd(args) => block_on(order::dump_md(&context, &args.volume)),
        Verb::WaitSync(args) => block_on(order::wait_sync(&context, args)),
        Verb::Standby(args) => block_on(role::standby(&context, args, true)),
        Verb::Unstandby(args) => block_on(role::standby(&context, args, false)),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            report(&context, &error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints an error: text to standard error; with `--json` an object to standard output.
fn report(context: &Context, error: &CliError) {
    // `relevo events | head` closes the pipe: nobody is there to be told.
    if let CliError::Output(e) = error
        && e.kind() == std::io::ErrorKind::BrokenPipe
    {
        return;
    }
    let written = if context.json {
        let (what, why, remedy) = error.explain();
        let object = serde_json::json!({ "error": what, "reason": why, "remedy": remedy });
        writeln!(std::io::stdout(), "{object:#}")
    } else {
        write!(std::io::stderr(), "{}", error.render())
    };
    // Nothing is left to report a failing report to; the exit code still tells.
    drop(written);
}

fn block_on<T>(future: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

impl Context {
    /// Prints an answer: as it is with `--json`, else the text made of it.
    pub(crate) fn print<T: Serialize>(
        &self,
        answer: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let mut out = std::io::stdout().lock();
        if self.json {
            let json = serde_json::to_string_pretty(answer)
                .map_err(|e| CliError::BadAnswer(e.to_string()))?;
            writeln!(out, "{json}")?;
        } else {
            write!(out, "{}", text(answer))?;
        }
        out.flush()?;
        Ok(())
    }

    /// Prints what was done.
    pub(crate) fn print_done(&self, done: &Done) -> Result<ExitCode, CliError> {
        self.print(done, |done| format!("{}\n", done.done))?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        global: GlobalArgs,
        #[command(subcommand)]
        verb: Verb,
    }

    fn parse(line: &str) -> Result<Program, String> {
        Program::try_parse_from(line.split(' ')).map_err(|e| e.to_string())
    }

    #[test]
    fn the_arguments_fit_together() {
        Program::command().debug_assert();
    }

    #[test]
    fn global_options_may_stand_anywhere() {
        let program = parse("relevo volume list --json --state-dir /x").unwrap();
        assert!(program.global.json);
        assert_eq!(program.global.state_dir, PathBuf::from("/x"));
        assert!(matches!(
            program.verb,
            Verb::Volume(volume::VolumeVerb::List)
        ));
    }

    #[test]
    fn options_that_need_others_say_so() {
        let error = parse("relevo service create web --mount /srv")
            .err()
            .unwrap();
        assert!(error.contains("--volume"), "{error}");
        let error = parse("relevo service create").err().unwrap();
        assert!(error.contains("--file"), "{error}");
        let error = parse("relevo service create web --file x --exec y")
            .err()
            .unwrap();
        assert!(error.contains("cannot be used with"), "{error}");
        let error = parse("relevo wait-sync mail --timeout soon").err().unwrap();
        assert!(error.contains("--timeout"), "{error}");
        assert!(parse("relevo wait-sync mail --timeout 5").is_ok());
        for line in [
            "relevo primary mail --confirm mail",
            "relevo volume saved --read x",
            "relevo volume saved --to x",
            "relevo volume resolve mail",
        ] {
            let error = parse(line).err().unwrap();
            assert!(error.contains("required"), "{line}: {error}");
        }
        let error = parse("relevo service move web").err().unwrap();
        assert!(error.contains("<TO>") || error.contains("[TO]"), "{error}");
    }
}
