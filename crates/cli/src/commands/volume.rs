//! `volume create`, `volume list`, `volume remove`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use relevo_server::api::{
    ApiError, CreateVolumeRequest, ErrorKind, ReplicaRequest, SetOptionsRequest, VolumeStatus,
};
use relevo_types::{cluster::Protocol, size::parse_size};

use super::Context;
use crate::{CliError, render};

/// `relevo volume`
#[derive(Subcommand, Debug)]
pub enum VolumeVerb {
    /// Create a volume with a replica on every data node, or on those named with --on
    Create(CreateArgs),
    /// List the volumes
    List,
    /// Add, remove or move replicas while the volume is in use
    #[command(subcommand)]
    Replica(super::replica::ReplicaVerb),
    /// Choose how a volume behaves: `relevo volume set mail on-no-quorum=io-error`
    Set {
        /// Name of the volume
        name: String,
        /// Options, named as in drbd.conf
        #[arg(required = true, value_name = "OPTION=VALUE", value_parser = parse_option)]
        options: Vec<(String, String)>,
    },
    /// Show what was chosen for a volume
    Options {
        /// Name of the volume
        name: String,
    },
    /// Decide a split brain: which replica is kept. What only the others have is saved, then overwritten
    Resolve {
        /// Name of the volume
        name: String,
        /// Node of the replica that is kept
        #[arg(long, value_name = "NODE")]
        keep: String,
        /// The volume's name again, where there is no terminal to ask on
        #[arg(long, value_name = "VOLUME")]
        confirm: Option<String>,
    },
    /// Show what replicas of this node had of their own when they gave way, and read it
    Saved(super::saved::SavedArgs),
    /// Remove a volume and its data on every node
    Remove {
        /// Name of the volume
        name: String,
    },
}

/// `relevo volume create`
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Name of the volume: letters, digits, `-`, `_`, `.`
    name: String,
    /// Size: 512MiB, 20GiB, ...
    #[arg(long, value_parser = parse_size)]
    size: u64,
    /// Node of a replica, with the backing file or device there (default: a sparse file in the
    /// node's pool directory) and its protocol A, B or C (default: C); repeat for each replica
    #[arg(long = "on", value_name = "NODE[=PATH][,protocol=A|B|C]", value_parser = parse_replica)]
    replicas: Vec<ReplicaRequest>,
    /// Take a backing that holds foreign data; what it holds is lost
    #[arg(long)]
    force: bool,
}

pub(super) async fn run(context: &Context, verb: VolumeVerb) -> Result<ExitCode, CliError> {
    match verb {
        VolumeVerb::Create(args) => {
            let request = CreateVolumeRequest {
                name: args.name,
                size: args.size,
                replicas: args.replicas,
                force: args.force,
            };
            let done = context.client.create_volume(&request).await?;
            context.print_done(&done)
        }
        VolumeVerb::List => {
            let volumes = context.client.volumes().await?;
            context.print(&volumes, |volumes| render::volume_list(volumes))?;
            Ok(ExitCode::SUCCESS)
        }
        VolumeVerb::Replica(verb) => super::replica::run(context, verb).await,
        VolumeVerb::Set { name, options } => {
            let request = SetOptionsRequest { options };
            let done = context.client.set_options(&name, &request).await?;
            context.print_done(&done)
        }
        VolumeVerb::Options { name } => {
            let volume = find(context, &name).await?;
            context.print(&volume.options, |options| {
                let lines = options
                    .iter()
                    .map(|(key, value)| format!("{key}={value}\n"));
                lines.collect()
            })?;
            Ok(ExitCode::SUCCESS)
        }
        VolumeVerb::Resolve {
            name,
            keep,
            confirm,
        } => {
            let loss = context.client.resolve_loss(&name, &keep).await?;
            let request = super::confirm::confirm(context, &loss, confirm)?;
            let done = context.client.resolve(&name, &keep, &request).await?;
            context.print_done(&done)
        }
        VolumeVerb::Saved(args) => super::saved::run(context, args).await,
        VolumeVerb::Remove { name } => {
            let done = context.client.remove_volume(&name).await?;
            context.print_done(&done)
        }
    }
}

/// The volume of that name, as the daemon sees it.
pub(super) async fn find(context: &Context, name: &str) -> Result<VolumeStatus, CliError> {
    let volumes = context.client.volumes().await?;
    let found = volumes.into_iter().find(|volume| volume.name == name);
    found.ok_or_else(|| {
        CliError::Api(ApiError::new(
            ErrorKind::NotFound,
            "nothing was done",
            format!("there is no volume `{name}`"),
            "`relevo volume list` lists them",
        ))
    })
}

fn parse_option(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or("write OPTION=VALUE, on-no-quorum=io-error say")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

pub(super) fn parse_replica(text: &str) -> Result<ReplicaRequest, String> {
    let (text, protocol) = match text.rsplit_once(",protocol=") {
        None => (text, Protocol::C),
        Some((text, protocol)) => (text, protocol.parse()?),
    };
    let (node, backing) = match text.split_once('=') {
        None => (text, None),
        Some((node, path)) => (node, Some(PathBuf::from(path))),
    };
    if node.is_empty() {
        return Err("the node has no name; write NODE or NODE=PATH".to_owned());
    }
    if backing.as_ref().is_some_and(|path| !path.is_absolute()) {
        return Err(
            "the backing is no absolute path; write NODE=/dev/... or NODE=/path".to_owned(),
        );
    }
    Ok(ReplicaRequest {
        node: node.to_owned(),
        backing,
        protocol,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_are_read() {
        assert_eq!(parse_replica("alfa").unwrap().backing, None);
        let replica = parse_replica("alfa=/dev/sdb").unwrap();
        assert_eq!(replica.backing, Some(PathBuf::from("/dev/sdb")));
        let replica = parse_replica("alfa=/dev/sdb,protocol=A").unwrap();
        assert_eq!(replica.backing, Some(PathBuf::from("/dev/sdb")));
        assert_eq!(replica.protocol, Protocol::A);
        assert_eq!(
            parse_replica("alfa,protocol=B").unwrap().protocol,
            Protocol::B
        );
        let error = parse_replica("alfa,protocol=D").unwrap_err();
        assert!(error.contains("A, B or C"), "{error}");
        assert!(parse_replica("alfa=sdb").unwrap_err().contains("absolute"));
        assert!(parse_replica("=/dev/sdb").unwrap_err().contains("no name"));
    }
}
