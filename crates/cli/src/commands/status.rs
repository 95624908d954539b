//! `status`.

use std::process::ExitCode;

use relevo_server::api::Health;

use super::{Context, events::unix_ms};
use crate::{CliError, render};

pub(super) async fn status(context: &Context) -> Result<ExitCode, CliError> {
    let status = context.client.status().await?;
    context.print(&status, |status| render::status(status, unix_ms()))?;
    Ok(ExitCode::from(match status.health {
        Health::Healthy => 0,
        Health::Degraded => 1,
        Health::Down => 2,
    }))
}
