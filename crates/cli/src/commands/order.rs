//! Orders to this node's replica of a volume, under the names that `drbdadm` has for them.

use std::{collections::BTreeMap, process::ExitCode};

use clap::Args;
use relevo_server::api::{OrderRequest, ReplicaStatus};

use super::{Context, volume};
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

/// This node's role.
pub(super) async fn role(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    let here = context.client.cluster().await?.this_node;
    let volume = volume::find(context, name).await?;
    let mine = volume.replicas.iter().find(|replica| replica.node == here);
    let role = mine.map_or("Diskless", |replica| &replica.role);
    context.print(&role, |role| format!("{role}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The links to the other replicas.
pub(super) async fn cstate(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    lines(context, name, |replica| replica.replication.as_ref()).await
}

/// The state of every replica's disk.
pub(super) async fn dstate(context: &Context, name: &str) -> Result<ExitCode, CliError> {
    lines(context, name, |replica| replica.disk.as_ref()).await
}

async fn lines(
    context: &Context,
    name: &str,
    word: impl Fn(&ReplicaStatus) -> Option<&String>,
) -> Result<ExitCode, CliError> {
    let volume = volume::find(context, name).await?;
    let words: BTreeMap<&str, Option<&String>> = volume
        .replicas
        .iter()
        .map(|replica| (replica.node.as_str(), word(replica)))
        .collect();
    context.print(&words, |words| {
        let line = |(node, word): (&&str, &Option<&String>)| {
            word.map_or_else(String::new, |word| format!("{node} {word}\n"))
        };
        words.iter().map(line).collect()
    })?;
    Ok(ExitCode::SUCCESS)
}
