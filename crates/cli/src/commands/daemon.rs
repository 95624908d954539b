//! `daemon`.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, process::ExitCode};

use clap::{Args, ValueEnum};
use relevo_server::DaemonOptions;

use super::Context;

/// `relevo daemon`
#[derive(Args, Debug)]
pub struct DaemonArgs {
    /// Where links to block devices are made
    #[arg(long, value_name = "DIR", default_value = relevo_server::DEFAULT_DEVICE_DIR)]
    device_dir: PathBuf,
    /// Where replicas without a backing of their own are kept (default: `pool` in the state
    /// directory)
    #[arg(long, value_name = "DIR")]
    pool_dir: Option<PathBuf>,
    /// Make no block devices: volumes are reached over NBD only
    #[arg(long)]
    no_devices: bool,
    /// Serve NBD on this TCP address too (no authentication: for trusted networks)
    #[arg(long, value_name = "ADDRESS:PORT")]
    nbd_listen: Option<SocketAddr>,
    /// How many volumes are resynced at a time on this node; the others wait (default: any number)
    #[arg(long, value_name = "COUNT")]
    max_resyncs: Option<NonZeroU32>,
    /// How much is logged to standard error
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// Stop when the process that started this one ends
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

pub(super) fn run(context: &Context, args: DaemonArgs) -> ExitCode {
    let options = DaemonOptions {
        pool_dir: args
            .pool_dir
            .unwrap_or_else(|| context.state_dir.join("pool")),
        state_dir: context.state_dir.clone(),
        device_dir: args.device_dir,
        devices: !args.no_devices,
        nbd_listen: args.nbd_listen,
        max_resyncs: args.max_resyncs,
        log_level: args.log_level.word().to_owned(),
        die_with_parent: args.die_with_parent,
    };
    match relevo_server::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("relevo: {error:#}");
            ExitCode::from(1)
        }
    }
}
