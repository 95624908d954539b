//! Real daemons on a real kernel, and what breaks them.
//!
//! The tests that use this are in `crates/relevo/tests/it/chaos`: only the integration tests of the
//! package that has the binary get a binary that is never older than the sources. This crate
//! knows the program by its path and nothing of how it is built.
//!
//! - [`Site`] and [`Daemon`]: daemons as child processes, on loopback or in network namespaces,
//!   driven by the command line;
//! - [`Cables`]: the networks between namespaces, cut by cable, by direction and by port;
//! - [`FaultyDisk`]: a FUSE file whose reads, writes and flushes fail, hang or tear on demand;
//! - [`Relay`]: an NBD server for fio that follows the primary from node to node, and the journal of
//!   everything that was acknowledged;
//! - [`Stage`]: a cluster under load with all of these, and the checks at its end.
//!
//! Nothing here has a name that outlives the test process: namespaces are anonymous, the FUSE files
//! are in no mount table, processes die with their parent, and files are in one temporary directory.

mod cables;
mod disk;
mod fio;
mod journal;
mod relay;
mod site;
mod stage;

pub use cables::{Cables, Direction};
pub use disk::{Fault, FaultyDisk};
pub use fio::Fio;
pub use journal::Journal;
pub use relay::Relay;
pub use site::{Answer, Daemon, Site, eventually};
pub use stage::{Plan, Stage};
