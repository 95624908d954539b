//! Engines against each other: an instant network, disks in memory, the real control state.

mod scenarios;
mod storm;
mod world;
