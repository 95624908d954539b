//! Drivers for what the kernel does for a node: virtual addresses, network namespaces, mounts,
//! processes, the clock.
//!
//! Called by `agents` (parts of services), `fence` (agents), `server` (clock, signals) and `demo` (namespaces). It
//! holds no policy: nothing here knows services, leases or the cluster. System calls and the few
//! unsafe blocks of this job live here; the netlink library is used in [`netlink`] only.
//!
//! * [`clock`]: `CLOCK_BOOTTIME` as [`relevo_types::Time`].
//! * [`address`]: addresses with a lifetime that the kernel ends by itself; [`announce`]:
//!   gratuitous ARP and unsolicited neighbour advertisements.
//! * [`netns`], [`hub`], [`mountns`], [`userns`], [`command`]: whole machines out of namespaces, without the `ip` tool.
//! * [`mount`], [`mkfs`]: file systems.
//! * [`run`]: programs run to their end within limits.
//! * [`process`]: supervised processes that can't outlive their parent.

pub mod address;
pub mod announce;
pub mod clock;
pub mod command;
pub mod error;
pub mod hub;
pub mod mkfs;
pub mod mount;
pub mod mountns;
pub mod netlink;
pub mod netns;
mod parent;
pub mod process;
mod procfs;
pub mod run;
pub mod userns;

pub use error::{HostError, Result};
pub use procfs::memory_mib;
