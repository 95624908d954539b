//! `node path add`, `remove`, `list`.

use std::process::ExitCode;

use clap::Subcommand;
use relevo_server::api::PathRequest;
use relevo_types::cluster::PathAddress;

use super::{Context, cluster::parse_address};
use crate::{CliError, render};

/// `relevo node`
#[derive(Subcommand, Debug)]
pub enum NodeVerb {
    /// Ways between nodes: networks, and byte streams that carry heartbeats only
    #[command(subcommand)]
    Path(PathVerb),
}

/// `relevo node path`
#[derive(Subcommand, Debug)]
pub enum PathVerb {
    /// Give a node one more path, while everything runs; give the other nodes theirs of the same name too
    Add {
        /// Name of the node
        node: String,
        /// Name of the path: those of two nodes belong together by it
        name: String,
        /// An IP address of the node, `,replication` if replication prefers it; or a byte stream to one other
        /// node: serial:DEVICE:BAUD, or unix:SOCKET
        #[arg(value_name = "ADDRESS[,replication]", value_parser = parse_address)]
        address: (PathAddress, bool),
    },
    /// Take a path from a node, while everything runs
    Remove {
        /// Name of the node
        node: String,
        /// Name of the path
        name: String,
    },
    /// List the paths of all nodes, as this node sees them
    List,
}

pub(super) async fn run(context: &Context, verb: NodeVerb) -> Result<ExitCode, CliError> {
    let NodeVerb::Path(verb) = verb;
    let done = match verb {
        PathVerb::Add {
            node,
            name,
            address: (address, replication),
        } => {
            let request = PathRequest {
                name,
                address,
                replication,
            };
            context.client.add_path(&node, &request).await?
        }
        PathVerb::Remove { node, name } => context.client.remove_path(&node, &name).await?,
        PathVerb::List => {
            let nodes = context.client.cluster().await?.nodes;
            context.print(&nodes, |nodes| render::path_list(nodes))?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    context.print_done(&done)
}
