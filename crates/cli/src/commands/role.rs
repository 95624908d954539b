//! `primary`, `secondary`, `standby`, `unstandby`.

use std::process::ExitCode;

use clap::Args;

use super::Context;
use crate::CliError;

/// `relevo primary`, `relevo secondary`
#[derive(Args, Debug)]
pub struct RoleArgs {
    /// Name of the volume
    volume: String,
}

/// `relevo standby`, `relevo unstandby`
#[derive(Args, Debug)]
pub struct StandbyArgs {
    /// Name of the node (default: this one)
    node: Option<String>,
}

pub(super) async fn primary(context: &Context, args: RoleArgs) -> Result<ExitCode, CliError> {
    let done = context.client.make_primary(&args.volume).await?;
    context.print_done(&done)
}

pub(super) async fn secondary(context: &Context, args: RoleArgs) -> Result<ExitCode, CliError> {
    let done = context.client.make_secondary(&args.volume).await?;
    context.print_done(&done)
}

pub(super) async fn standby(
    context: &Context,
    args: StandbyArgs,
    standby: bool,
) -> Result<ExitCode, CliError> {
    let node = match args.node {
        Some(node) => node,
        None => context.client.cluster().await?.this_node,
    };
    let done = context.client.set_standby(&node, standby).await?;
    context.print_done(&done)
}
