//! Metadata as damaged disks give it back.

mod damage;
mod dump;
mod saved;
