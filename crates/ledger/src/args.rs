//! The command lines of `relevo ledger` and `relevo ledger-client`.

use std::{
    env, fs,
    net::SocketAddr,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{ClientConfig, LedgerConfig, LedgerError, Storage};

/// Runs the ledger until it is told to end.
#[derive(clap::Args, Clone, Debug)]
pub struct LedgerArgs {
    /// Where to listen; may be given several times. The address need not be on this machine yet.
    #[arg(long, value_name = "ADDRESS:PORT", required = true)]
    pub listen: Vec<SocketAddr>,
    #[command(flatten)]
    storage: StorageArgs,
    /// Name of the NBD export.
    #[arg(long, default_value = "")]
    pub export: String,
}

#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
struct StorageArgs {
    /// Keep the entries in a file in this directory.
    #[arg(long, value_name = "DIRECTORY")]
    dir: Option<PathBuf>,
    /// Keep the entries on the volume behind this NBD server (unix:/path, /path or host:port).
    #[arg(long, value_name = "SERVER")]
    nbd: Option<String>,
    /// Keep the entries on this block device.
    #[arg(long, value_name = "DEVICE")]
    device: Option<PathBuf>,
    /// Keep the entries on what this environment variable names: a directory, a block device or
    /// the socket of an NBD server (RELEVO_VOLUME_<NAME> is set for the processes of a service).
    #[arg(long, value_name = "VARIABLE")]
    storage_env: Option<String>,
}

impl LedgerArgs {
    /// What [`crate::run`] takes.
    ///
    /// # Errors
    /// The storage can't be understood.
    pub fn config(self) -> Result<LedgerConfig, LedgerError> {
        let export = self.export;
        let storage = match self.storage {
            StorageArgs { dir: Some(dir), .. } => Storage::Directory(dir),
            StorageArgs {
                device: Some(device),
                ..
            } => Storage::Device(device),
            StorageArgs {
                storage_env: Some(variable),
                ..
            } => from_variable(&variable, export)?,
            StorageArgs { nbd, .. } => Storage::Nbd {
                address: nbd
                    .unwrap_or_default()
                    .parse()
                    .map_err(LedgerError::Configuration)?,
                export,
            },
        };
        Ok(LedgerConfig {
            listen: self.listen,
            storage,
        })
    }
}

fn from_variable(variable: &str, export: String) -> Result<Storage, LedgerError> {
    let value = env::var_os(variable).ok_or_else(|| {
        LedgerError::Configuration(format!(
            "the environment variable {variable} is not set; a service has one for each volume part"
        ))
    })?;
    let path = Path::new(&value);
    let kind = fs::metadata(path).map_err(|error| {
        LedgerError::Configuration(format!(
            "{variable} names {}, which can't be used: {error}",
            path.display()
        ))
    })?;
    Ok(if kind.is_dir() {
        Storage::Directory(path.to_owned())
    } else if kind.file_type().is_socket() {
        Storage::Nbd {
            address: relevo_export::nbd::client::NbdAddr::Unix(path.to_owned()),
            export,
        }
    } else {
        Storage::Device(path.to_owned())
    })
}

/// Posts numbered entries without a pause and keeps a journal of what was acknowledged.
#[derive(clap::Args, Clone, Debug)]
pub struct LedgerClientArgs {
    /// The ledger, `http://192.168.1.1:8080` say.
    #[arg(long, value_name = "URL")]
    pub target: String,
    /// The journal; a client that finds one goes on after its last number.
    #[arg(long, value_name = "FILE")]
    pub journal: PathBuf,
    /// Rest between two entries, in milliseconds.
    #[arg(long, default_value_t = 0)]
    pub pause_ms: u64,
    /// End after this many entries.
    #[arg(long)]
    pub count: Option<u64>,
    /// Give a connection up after this long, in milliseconds.
    #[arg(long, default_value_t = 250)]
    pub connect_timeout_ms: u64,
    /// Give an answer up after this long, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    pub request_timeout_ms: u64,
}

impl LedgerClientArgs {
    /// What [`crate::run_client`] takes.
    #[must_use]
    pub fn config(self) -> ClientConfig {
        ClientConfig {
            pause: Duration::from_millis(self.pause_ms),
            count: self.count,
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            request_timeout: Duration::from_millis(self.request_timeout_ms),
            ..ClientConfig::new(self.target, self.journal)
        }
    }
}
