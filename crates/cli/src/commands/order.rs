//! Orders to this node's replica of a volume, under the names that `drbdadm` has for them.

use std::process::ExitCode;

use clap::Args;
use relevo_server::api::OrderRequest;

use super::Context;
use crate::CliError;

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

pub(super) async fn give(
    context: &Context,
    volume: &str,
    request: OrderRequest,
) -> Result<ExitCode, CliError> {
    let done = context.client.order(volume, &request).await?;
    context.print_done(&done)
}
