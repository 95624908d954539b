//! The breaking tools judged themselves: disks that fail as they are told, and a relay that follows
//! the primary and tells what was lost. Without root, but for the disks.

mod disk;
mod relay;
