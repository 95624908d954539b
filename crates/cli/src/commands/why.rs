//! `why`: what the planner thinks of each node for a service.

use std::process::ExitCode;

use clap::Args;

use super::Context;
use crate::{CliError, render};

/// `relevo why SERVICE [on NODE]`
#[derive(Args, Debug)]
pub struct WhyArgs {
    /// Name of the service
    service: String,
    /// Only what is to be said of one node: `on NODE`
    #[arg(value_name = "on NODE", num_args = 2)]
    on: Vec<String>,
}

pub(super) async fn why(context: &Context, args: &WhyArgs) -> Result<ExitCode, CliError> {
    let mut answer = context.client.why(&args.service).await?;
    match args.on.as_slice() {
        [] => {}
        [on, node] if on == "on" => {
            let all: Vec<String> = answer.nodes.iter().map(|it| it.node.clone()).collect();
            answer.nodes.retain(|it| it.node == *node);
            if answer.nodes.is_empty() {
                return Err(CliError::Input(format!(
                    "there is no node `{node}`; the nodes are: {}",
                    all.join(", ")
                )));
            }
        }
        other => {
            return Err(CliError::Input(format!(
                "`{}` was not understood: write `relevo why SERVICE on NODE`",
                other.join(" ")
            )));
        }
    }
    context.print(&answer, render::why)?;
    Ok(ExitCode::SUCCESS)
}
