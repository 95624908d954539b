//! `volume replica add`, `remove`, `move`.

use std::process::ExitCode;

use clap::Subcommand;
use relevo_server::api::{AddReplicaRequest, ReplicaRequest};

use super::{Context, volume::parse_replica};
use crate::CliError;

/// `relevo volume replica`
#[derive(Subcommand, Debug)]
pub enum ReplicaVerb {
    /// Add a replica; it is filled while the volume is in use
    Add {
        /// Name of the volume
        name: String,
        /// Its node, with the backing file or device there (default: a sparse file in the node's
        /// pool directory)
        #[arg(value_name = "NODE[=PATH]", value_parser = parse_replica)]
        replica: ReplicaRequest,
        /// Take a backing that holds foreign data; what it holds is lost
        #[arg(long)]
        force: bool,
    },
    /// Remove a replica and its data
    Remove {
        /// Name of the volume
        name: String,
        /// Its node
        node: String,
    },
    /// Move a replica to another node: the old one goes when the new one is in sync
    Move {
        /// Name of the volume
        name: String,
        /// The node that has it
        from: String,
        /// The node that gets it
        #[arg(value_name = "NODE[=PATH]", value_parser = parse_replica)]
        to: ReplicaRequest,
        /// Take a backing that holds foreign data; what it holds is lost
        #[arg(long)]
        force: bool,
    },
}

pub(super) async fn run(context: &Context, verb: ReplicaVerb) -> Result<ExitCode, CliError> {
    let (name, request) = match verb {
        ReplicaVerb::Remove { name, node } => {
            let done = context.client.remove_replica(&name, &node).await?;
            return context.print_done(&done);
        }
        ReplicaVerb::Add {
            name,
            replica,
            force,
        } => (name, request(replica, None, force)),
        ReplicaVerb::Move {
            name,
            from,
            to,
            force,
        } => (name, request(to, Some(from), force)),
    };
    let done = context.client.add_replica(&name, &request).await?;
    context.print_done(&done)
}

const fn request(
    replica: ReplicaRequest,
    replaces: Option<String>,
    force: bool,
) -> AddReplicaRequest {
    AddReplicaRequest {
        replica,
        replaces,
        force,
    }
}
