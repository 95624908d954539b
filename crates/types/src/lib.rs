//! The words of Relevo as types: identifiers, positions, time, and the replicated state of a
//! cluster with the commands that change it.
//!
//! Everything above this crate speaks in these types; it has no clock, no socket and no thread.
//!
//! * [`ids`]: newtypes for nodes, volumes, services, epochs, sequence numbers.
//! * [`range`]: bytes and blocks of a volume.
//! * [`time`]: the monotonic clock that is passed in, and the time-outs of DESIGN section 5.
//! * [`cluster`]: the state that the control log replicates, and [`cluster::Command`], the only
//!   way to change it. Applying a command is a pure function, so the simulator and the daemon
//!   share it.

pub mod cluster;
pub mod ids;
pub mod range;
pub mod size;
pub mod time;

pub use ids::{
    ClusterId, Epoch, Instance, LeaseGeneration, LineageId, NodeId, ReplicaSlot, Seq, ServiceId,
    VolumeId,
};
pub use range::{BLOCK_SIZE, BlockRange, ByteRange};
pub use time::{Sensitivity, Time, Timing};
