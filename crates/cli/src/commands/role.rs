//! `primary`, `secondary`, `standby`, `unstandby`.

use std::process::ExitCode;

use clap::Args;

use super::{Context, confirm::confirm};
use crate::CliError;

/// `relevo primary`
#[derive(Args, Debug)]
pub struct PrimaryArgs {
    /// Name of the volume
    volume: String,
    /// Take this node's replica although it is not in sync: what was written since is missing in it
    #[arg(long)]
    force: bool,
    /// The volume's name again, for --force where there is no terminal to ask on
    #[arg(long, value_name = "VOLUME", requires = "force")]
    confirm: Option<String>,
}

/// `relevo secondary`
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

pub(super) async fn primary(context: &Context, args: PrimaryArgs) -> Result<ExitCode, CliError> {
    if args.force {
        let loss = context.client.force_loss(&args.volume).await?;
        let request = confirm(context, &loss, args.confirm)?;
        let done = context.client.force(&args.volume, &request).await?;
        return context.print_done(&done);
    }
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
