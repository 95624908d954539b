//! What the ledger needs of its storage.

use std::{fmt, path::PathBuf};

use relevo_export::nbd::client::NbdAddr;
use serde::{Deserialize, Serialize};

/// Where the entries are kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Storage {
    /// A file in this directory.
    Directory(PathBuf),
    /// A volume, by NBD.
    Nbd {
        /// Its server.
        address: NbdAddr,
        /// Name of the export.
        export: String,
    },
    /// A block device.
    Device(PathBuf),
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "directory {}", path.display()),
            Self::Nbd { address, .. } => write!(f, "volume at {address}"),
            Self::Device(path) => write!(f, "device {}", path.display()),
        }
    }
}

/// An entry of the ledger.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its number; each is given once.
    pub number: u64,
    /// Its text, at most [`crate::MAX_TEXT`] bytes.
    #[serde(default)]
    pub text: String,
}

/// Why the ledger can't work. Each ends with what to do.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// What was asked for makes no sense.
    #[error("cannot run the ledger: {0}")]
    Configuration(String),
    /// It can't listen.
    #[error("cannot listen on {address}: {error}; choose another port or end the other program")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// The system's words.
        error: std::io::Error,
    },
    /// The storage can't be opened or read.
    #[error("cannot open the ledger on the {place}: {why}; {next}")]
    Open {
        /// Where the entries are.
        place: String,
        /// What is wrong.
        why: String,
        /// What to do.
        next: &'static str,
    },
    /// A write or a flush failed. Nothing can be said of the entries that were not acknowledged.
    #[error("the ledger's storage failed: {0}; check the disk or volume, then start it again")]
    Failed(String),
    /// No room is left; the ledger goes on for reading.
    #[error("the ledger's storage is full; make it larger")]
    Full,
}

/// Storage that entries can be added to. Opening it gives the entries that are there.
pub(crate) trait Store: Send {
    /// Adds entries, each valid and new; they are on stable storage when this returns. After
    /// [`LedgerError::Full`] none of them is there; after another error the store is not used again.
    fn append(&mut self, entries: &[Entry]) -> Result<(), LedgerError>;
}

/// Opens the storage.
pub(crate) fn open(storage: &Storage) -> Result<(Box<dyn Store>, Vec<Entry>), LedgerError> {
    Ok(match storage {
        Storage::Directory(directory) => {
            let (store, entries) = crate::file::FileStore::open(directory)?;
            (Box::new(store), entries)
        }
        Storage::Nbd { address, export } => {
            let volume = crate::blocks::nbd(address, export)?;
            let (store, entries) = crate::blocks::BlockStore::open(volume)?;
            (Box::new(store), entries)
        }
        Storage::Device(path) => {
            let device = crate::blocks::device(path)?;
            let (store, entries) = crate::blocks::BlockStore::open(device)?;
            (Box::new(store), entries)
        }
    })
}
