//! Engines against each other: an instant network, disks in memory, the real control state.

mod allocations;
mod compare;
mod disk;
mod generations;
mod heal;
mod knowledge;
mod nonsense;
mod orders;
mod pause;
mod protocols;
mod rate;
mod replicas;
mod scenarios;
mod split;
mod storm;
mod tend;
mod verify;
mod world;

#[global_allocator]
static ALLOCATOR: ::allocations::Counting = ::allocations::Counting;
