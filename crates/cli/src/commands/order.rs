//! Orders to this node's replica of a volume, under the names that `drbdadm` has for them.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use clap::Args;
use relevo_server::api::{ErrorKind, OrderRequest, WaitSyncRequest};

use super::{Context, volume};
use crate::{CliError, render};

/// The pause between two calls of one long wait.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// An order about a volume.
#[derive(Args, Debug)]
pub struct OrderArgs {
    /// Name of the volume
    pub(super) volume: String,
}

/// An order about a volume and one of its other replicas.
#[derive(Args, Debug)]
pub struct PeerArgs {
    /// Name of the volume
    pub(super) volume: String,
    /// Node of the other replica (default: all)
    pub(super) node: Option<String>,
}

/// A verification.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Name of the volume
    volume: String,
    /// Node of the other replica (default: all that are in sync)
    node: Option<String>,
    /// Copy what differs from here; the replica leaves the in-sync set until that is done
    #[arg(long)]
    repair: bool,
    /// End a verification that is under way
    #[arg(long, conflicts_with = "repair")]
    stop: bool,
}

pub(super) async fn verify(context: &Context, args: VerifyArgs) -> Result<ExitCode, CliError> {
    let VerifyArgs {
        volume,
        node,
        repair,
        stop,
    } = args;
    let request = if stop {
        OrderRequest::StopVerify { node }
    } else {
        OrderRequest::Verify { node, repair }
    };
    give(context, &volume, request).await
}

/// A wait.
#[derive(Args, Debug)]
pub struct WaitSyncArgs {
    /// Name of the volume
    volume: String,
    /// How many seconds to wait (default: as long as it takes)
    #[arg(long, value_name = "S")]
    timeout: Option<u64>,
}

pub(super) async fn wait_sync(context: &Context, args: WaitSyncArgs) -> Result<ExitCode, CliError> {
    let begun = tokio::time::Instant::now();
    loop {
        let passed = begun.elapsed().as_secs();
        let left = args.timeout.map(|all| all.saturating_sub(passed));
        let timeout_s = left.unwrap_or(u64::MAX).min(WaitSyncRequest::MOST_S);
        let request = WaitSyncRequest { timeout_s };
        match context.client.wait_sync(&args.volume, request).await {
            Ok(done) => return context.print_done(&done),
            // One call is over, the wait is not.
            Err(CliError::Api(error))
                if error.kind == ErrorKind::Unavailable && left != Some(timeout_s) =>
            {
                // Some refusals come at once, as of a daemon that is still joining.
                tokio::time::sleep(ASK_AGAIN).await;
            }
            Err(error) => return Err(error),
        }
    }
}

pub(super) async fn give(
    context: &Context,
    volume: &str,
    request: OrderRequest,
) -> Result<ExitCode, CliError> {
    let done = context.client.order(volume, &request).await?;
    context.print_done(&done)
}

/// The metadata of this machine's replica: by the daemon, or from the backing where none runs.
pub(super) async fn dump_md(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    let dump = match context.client.dump_metadata(name).await {
        Err(CliError::NoDaemon { .. }) => {
            relevo_server::dump_metadata_without_daemon(&context.state_dir, name)?
        }
        answer => answer?,
    };
    context.print(&dump, render::metadata)?;
    Ok(ExitCode::SUCCESS)
}

/// This node's role.
pub(super) async fn role(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    let here = context.client.cluster().await?.this_node;
    let volume = volume::find(context, name).await?;
    let mine = volume.replicas.iter().find(|replica| replica.node == here);
    let role = mine.map_or("Diskless", |replica| &replica.role);
    context.print(&role, |role| format!("{role}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// This node's links to the other replicas.
pub(super) async fn cstate(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    let volume = volume::find(context, name).await?;
    print_words(context, &volume.links)
}

/// The state of every replica's disk.
pub(super) async fn dstate(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    let volume = volume::find(context, name).await?;
    let disks = volume.replicas.into_iter();
    let disks = disks.map(|it| (it.node, it.disk.unwrap_or_else(|| "DUnknown".to_owned())));
    print_words(context, &disks.collect())
}

/// A line each: node and word.
fn print_words(context: &Context, words: &BTreeMap<String, String>) -> Result<ExitCode, CliError> {
    context.print(words, |words| {
        let lines = words.iter().map(|(node, word)| format!("{node} {word}\n"));
        lines.collect()
    })?;
    Ok(ExitCode::SUCCESS)
}
