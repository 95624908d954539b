//! `why`: what the planner thinks of each node for a service; `what-if`: what it would do.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use relevo_server::api::WhatIfRequest;

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

/// `relevo what-if NODE dies|standby`
#[derive(Args, Debug)]
pub struct WhatIfArgs {
    /// Name of the node, a witness too
    node: String,
    /// What happens to it
    #[arg(value_enum)]
    what: What,
}

/// What is supposed to happen
#[derive(ValueEnum, Clone, Copy, Debug)]
enum What {
    /// It loses its power
    Dies,
    /// It is put on standby
    Standby,
}

pub(super) async fn what_if(context: &Context, args: WhatIfArgs) -> Result<ExitCode, CliError> {
    let request = match args.what {
        What::Dies => WhatIfRequest::Dies(args.node),
        What::Standby => WhatIfRequest::Standby(args.node),
    };
    let answer = context.client.what_if(&request).await?;
    context.print(&answer, render::what_if)?;
    Ok(ExitCode::SUCCESS)
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
