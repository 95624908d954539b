//! The simulator: whole clusters of the production cores under one virtual clock, with faults of
//! network, disk, process and time, and checkers that trust nobody.
//!
//! `cargo run -p sim -- --seed N` runs one seed; the same seed on the same commit is the same run.
//! `cargo test -p sim` runs ten thousand, proves that planted bugs are caught, and asserts that the
//! interesting situations were reached.
//!
//! * [`scenario`]: what a seed stands for.
//! * [`cluster`]: a run; composes the models below with one engine per data node.
//! * [`disk`], [`net`], [`control`], [`lease`]: the models.
//! * [`check`]: the checkers, one module per promise.
//! * [`batch`]: many seeds on all cores; [`enumerate`]: one schedule, a crash at every disk effect.
//! * [`coverage`], [`trace`]: what was reached, what happened.

pub mod batch;
pub mod check;
pub mod cluster;
pub mod control;
pub mod coverage;
pub mod disk;
pub mod enumerate;
pub mod faults;
pub mod lease;
pub mod net;
pub mod paths;
pub mod queue;
pub mod rng;
pub mod scenario;
pub mod second;
pub mod stamp;
pub mod trace;
