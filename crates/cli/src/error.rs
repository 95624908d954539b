//! How a verb fails, and with which exit code.

use std::{io, path::PathBuf};

use relevo_server::api::ApiError;

/// Exit code when the daemon refused or failed.
pub(crate) const EXIT_FAILED: u8 = 1;
/// Exit code when there was nobody to ask (clap uses it for usage errors too).
pub(crate) const EXIT_UNREACHABLE: u8 = 2;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The daemon's answer.
    #[error("{0}")]
    Api(#[from] ApiError),
    /// No daemon.
    #[error("no daemon answers on {}: {reason}", socket.display())]
    NoDaemon {
        /// Where it should be.
        socket: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The daemon went away or talks nonsense.
    #[error("the daemon's answer was cut short or not understood: {0}")]
    BadAnswer(String),
    /// A file that was named can't be used. The text is complete.
    #[error("{0}")]
    Input(String),
    /// Writing to the terminal failed.
    #[error("can't write the output: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    /// The error as what happened, why, what to do.
    #[must_use]
    pub fn explain(&self) -> (String, String, String) {
        match self {
            Self::Api(error) => (
                error.error.clone(),
                error.reason.clone(),
                error.remedy.clone(),
            ),
            Self::NoDaemon { socket, reason } => (
                "the relevo daemon was not reached".to_owned(),
                format!("{}: {reason}", socket.display()),
                format!(
                    "start it with `{}`, or name its state directory with --state-dir or RELEVO_STATE_DIR",
                    daemon_command(socket)
                ),
            ),
            Self::BadAnswer(reason) => (
                "the daemon's answer was not understood".to_owned(),
                reason.clone(),
                "check with `relevo events` whether it restarted; the command may have been carried out"
                    .to_owned(),
            ),
            Self::Input(text) => (text.clone(), String::new(), String::new()),
            Self::Output(error) => (
                "the output was not written".to_owned(),
                error.to_string(),
                String::new(),
            ),
        }
    }

    /// The exit code.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoDaemon { .. } => EXIT_UNREACHABLE,
            Self::Api(_) | Self::BadAnswer(_) | Self::Input(_) | Self::Output(_) => EXIT_FAILED,
        }
    }

    /// The text for a terminal.
    #[must_use]
    pub fn render(&self) -> String {
        let (what, why, remedy) = self.explain();
        let mut text = format!("relevo: {what}\n");
        if !why.is_empty() {
            text.push_str(&format!("  why: {why}\n"));
        }
        if !remedy.is_empty() {
            text.push_str(&format!("  what to do: {remedy}\n"));
        }
        text
    }
}

fn daemon_command(socket: &std::path::Path) -> String {
    let state_dir = socket.parent().unwrap_or(socket);
    if state_dir == std::path::Path::new(relevo_server::DEFAULT_STATE_DIR) {
        "relevo daemon".to_owned()
    } else {
        format!("relevo daemon --state-dir {}", state_dir.display())
    }
}
