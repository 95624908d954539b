//! The disk of a replica: its backing file or device, and the drivers that carry out the
//! replication engine's operations on it.
//!
//! Called by `relevo-datapath` (one driver per volume, on the volume's thread) and by
//! `relevo-node` (creating and removing replicas). Knows offsets and bytes only; what they mean
//! is the business of `relevo-format` and `relevo-replication`.
//!
//! * [`backing`]: opening: direct I/O where it works, one daemon per backing, size.
//! * [`replica`]: creating and removing a replica's backing without overwriting foreign data.
//! * [`driver`]: the driver's interface and the choice between those below.
//! * [`uring`]: io_uring. [`pool`]: a few threads, where io_uring is refused. [`memory`]: at once, where
//!   the backing is in memory.
//! * [`buffer`]: page-aligned buffers, as direct I/O wants them.
//! * [`clock`]: the clock that is passed into the cores.

pub mod backing;
pub mod buffer;
pub mod clock;
pub mod driver;
pub mod memory;
pub mod pool;
pub mod replica;
pub mod signature;
pub mod uring;
mod work;

pub use backing::{Backing, IoMode, OpenError, OpenOptions};
pub use buffer::{AlignedBuf, BufferPool};
pub use driver::{DiskDriver, DriverChoice, DriverKind, open_driver, probe};
pub use memory::MemoryDisk;
pub use pool::PoolDisk;
pub use replica::{
    CreateError, NewReplica, RemoveError, create_replica, dump_metadata, remove_replica,
};
pub use uring::UringDisk;
