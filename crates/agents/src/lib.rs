//! The native parts of a service: what it takes to make a volume, a mount, an address or a process
//! active on this node, and to make it inactive again.
//!
//! The service manager of `server` calls [`PartRunner`] in the order that the planner decided;
//! nothing here decides whether or where a service runs. [`AddressKeeper`] is fed with the
//! lease of the node and holds addresses only under it (DESIGN, rule 8).
//!
//! Every start finds out first what is already so, so that it can be repeated; every stop of a
//! stopped part is fine; every error is a sentence: what, why, what to do.

mod address;
mod mount;
mod process;
mod runner;

use std::path::PathBuf;

pub use address::AddressKeeper;
use async_trait::async_trait;
pub use relevo_host::HostError as AgentError;
use relevo_types::{ServiceId, VolumeId};
pub use runner::{PartContext, PartRunner};

/// What this crate returns.
pub type Result<T, E = AgentError> = std::result::Result<T, E>;

/// How many failure reports may wait for the service manager. A part reports its failure once, so
/// this is more than the parts of any sensible node; a report past it waits in its watcher.
pub const FAILURE_QUEUE: usize = 64;

/// How volumes are made usable on this node. The server implements it.
#[async_trait]
pub trait VolumeExports: Send + Sync {
    /// Makes the volume usable on this node, which is its primary; returns when it can be opened.
    /// `device`: as a block device of the kernel; otherwise by NBD on a Unix socket. An attached volume
    /// stays as it is.
    ///
    /// # Errors
    /// A sentence for people.
    async fn attach(&self, volume: VolumeId, device: bool) -> Result<Attached>;

    /// Takes the device or socket away. A volume that is not attached is fine. `force`: even if
    /// it is in use; the users get I/O errors.
    ///
    /// # Errors
    /// It is in use, or the kernel does not let go of it.
    async fn detach(&self, volume: VolumeId, force: bool) -> Result<()>;

    /// Whether the volume is attached and serves I/O.
    async fn is_attached(&self, volume: VolumeId) -> bool;
}

/// An attached volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attached {
    /// The volume's name.
    pub name: String,
    /// How to reach it.
    pub place: VolumePlace,
}

/// Where the data of an attached volume is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumePlace {
    /// A block device.
    Device(PathBuf),
    /// A Unix socket that speaks NBD; the export's name is the volume's, or empty.
    Socket(PathBuf),
}

impl VolumePlace {
    /// The path of the device or socket.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        match self {
            Self::Device(path) | Self::Socket(path) => path,
        }
    }
}

/// A part that was active and can't be kept so on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartFailed {
    /// Its service.
    pub service: ServiceId,
    /// Its place in the service's list of parts.
    pub index: usize,
    /// What happened, in a sentence.
    pub reason: String,
}

/// Whether a part is active on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PartHealth {
    /// It is active and works.
    Active,
    /// It is not active.
    Inactive,
    /// It is being started again, or is only half there; the text says more.
    Impaired(String),
    /// It was given up, or something foreign is in its place; the text says more.
    Failed(String),
}
