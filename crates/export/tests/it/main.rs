//! Integration tests of the exports.

mod client;
mod device;
mod fuzz;
mod memory;
mod session;
mod skip;
mod wire;

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;
