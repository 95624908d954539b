//! `events`.

use std::{
    io::Write as _,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Args;

use super::Context;
use crate::{CliError, render};

/// `relevo events`
#[derive(Args, Debug)]
pub struct EventsArgs {
    /// Go on and show events as they happen, until interrupted
    #[arg(long, short)]
    follow: bool,
}

/// Prints a line per event; with `--json` a JSON object per line.
pub(super) async fn events(context: &Context, args: EventsArgs) -> Result<ExitCode, CliError> {
    let mut stream = context.client.event_stream(args.follow).await?;
    while let Some(event) = stream.next().await? {
        let line = if context.json {
            serde_json::to_string(&event).map_err(|e| CliError::BadAnswer(e.to_string()))?
        } else {
            render::event_line(&event)
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}")?;
        out.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// This machine's clock, for ages.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}
