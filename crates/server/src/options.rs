//! What the daemon is told when it starts.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf};

/// Where a daemon keeps its state unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/relevo";

/// Where links to block devices are made unless told otherwise.
pub const DEFAULT_DEVICE_DIR: &str = "/dev/relevo";

/// What the daemon is told when it starts. Everything else is in its state directory or in the
/// control log.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// Identity, control log, socket; one daemon each.
    pub state_dir: PathBuf,
    /// Links to block devices.
    pub device_dir: PathBuf,
    /// Backing files of replicas that were given none.
    pub pool_dir: PathBuf,
    /// Make block devices where the machine allows it.
    pub devices: bool,
    /// Serve NBD over TCP too.
    pub nbd_listen: Option<SocketAddr>,
    /// Volumes that are resynced at a time on this node; `None`: any number.
    pub max_resyncs: Option<NonZeroU32>,
    /// `error` to `trace`, or a filter in the words of `tracing-subscriber`.
    pub log_level: String,
    /// End when the parent process ends: for tests and the demo, so that none is left over.
    pub die_with_parent: bool,
}
