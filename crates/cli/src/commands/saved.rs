//! `volume saved`: what replicas of this node had of their own when they gave way.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use relevo_server::saved::{self, SavedFile};

use super::Context;
use crate::{CliError, render};

/// `relevo volume saved`
#[derive(Args, Debug)]
pub struct SavedArgs {
    /// Name of the volume (default: all)
    #[arg(conflicts_with_all = ["list", "read"])]
    volume: Option<String>,
    /// Print which blocks a file has, as byte offsets and lengths
    #[arg(long, value_name = "FILE", conflicts_with = "read")]
    list: Option<PathBuf>,
    /// Put the blocks of a file at their places into a new sparse image of the volume's size
    #[arg(long, value_name = "FILE", requires = "to")]
    read: Option<PathBuf>,
    /// The image; it must not be there yet
    #[arg(long, value_name = "IMAGE", requires = "read")]
    to: Option<PathBuf>,
}

pub(super) async fn run(context: &Context, args: SavedArgs) -> Result<ExitCode, CliError> {
    let told = |error: saved::RestoreError| CliError::Input(error.to_string());
    if let (Some(file), Some(image)) = (&args.read, &args.to) {
        let restored = saved::restore(file, image).map_err(told)?;
        context.print(&restored, |restored| {
            format!(
                "{} blocks of 4 KiB of volume {} are at their places in {}; every checksum is right. The rest of the image is empty.\n",
                restored.blocks,
                restored.volume,
                image.display()
            )
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(file) = &args.list {
        let ranges = saved::ranges(file).map_err(told)?;
        let bytes: Vec<_> = ranges.iter().map(|run| run.bytes()).collect();
        context.print(&bytes, |ranges| {
            let lines = ranges
                .iter()
                .map(|run| format!("{} {}\n", run.offset, run.len));
            lines.collect()
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut files = saved::list(&context.state_dir, args.volume.as_deref()).map_err(|error| {
        let dir = saved::saved_dir(&context.state_dir);
        CliError::Input(format!("{} can't be read: {error}", dir.display()))
    })?;
    name_nodes(context, &mut files).await;
    let now = super::events::unix_ms();
    context.print(&files, |files| render::saved_list(files, now))?;
    Ok(ExitCode::SUCCESS)
}

/// Files know ids of nodes; the daemon knows their names. Without it the ids must do.
async fn name_nodes(context: &Context, files: &mut [SavedFile]) {
    if files.is_empty() {
        return;
    }
    let Ok(cluster) = context.client.cluster().await else {
        return;
    };
    for node in cluster.nodes {
        for file in &mut *files {
            for id in [&mut file.node, &mut file.gave_way_to] {
                if *id == node.id {
                    id.clone_from(&node.name);
                }
            }
        }
    }
}
