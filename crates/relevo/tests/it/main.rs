//! Integration tests of the whole: the demo as a user runs it, daemons driven by the command line,
//! metadata shown, bad input, real failures under load, and the house rules.

mod bad_input;
mod breakage;
mod cluster;
mod daemons;
mod demo;
mod fencing;
mod large;
mod lines;
mod metadata;
mod placement;
mod resync;
mod tidy;
