//! The data path: one thread per volume that owns its replication engine, its disk, its links to
//! the peers and the applications' connections. No locks: everything is a command to the one owner.
//!
//! Called by `relevo-node`, which spawns a [`VolumeThread`] per replica on this node, feeds it the
//! committed configuration and the lease, hands it links, and carries out what its
//! [`DatapathEvent`]s ask for (proposals to the control log, links to establish).
//!
//! * [`handle`]: the interface: commands, events, status.
//! * `requests`: what exports ask, cut to what the engine takes: size limits, unaligned edges.
//! * `link`: a TLS link to a peer. `nbd`: listeners and sessions.
//! * `saving`: files that keep what a replica has of its own before it gives way.
//! * `poller`: epoll. `owner`: the volume's state and its loop.

pub mod handle;
mod link;
mod nbd;
mod owner;
mod patience;
mod poller;
mod requests;
mod saving;

pub use handle::{
    DatapathEvent, Gone, NbdAddress, OrderDone, SpawnError, VolumeHandle, VolumeStatus,
    VolumeTarget, VolumeThread, VolumeThreadConfig,
};

#[cfg(test)]
#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;
