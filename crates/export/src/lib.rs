//! How applications reach a volume: the NBD protocol and a block device of the kernel.
//!
//! The data path owns the volumes; this crate turns what clients and the kernel send into
//! [`BlockRequest`]s and carries the answers back. It knows nothing of replication.
//!
//! * [`block`]: the request that every export produces, its errors, and the
//!   [`BlockTarget`] that answers it.
//! * [`nbd`]: the server side of a connection as a sans-IO [`nbd::Session`], and a small blocking
//!   client.
//! * [`device`]: a volume as `/dev/relevo/<volume>`: a FUSE file with a loop device on it.
//! * [`mod@bench`]: measures an NBD server from outside, for `relevo bench`.

pub mod bench;
pub mod block;
pub mod buffer;
pub mod device;
pub mod nbd;

pub use block::{BlockRequest, BlockTarget, Completion, Errno, Extent};
pub use buffer::AlignedBuf;
pub use device::{Detach, Detached, DeviceExport};
