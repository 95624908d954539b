//! Integration tests of the whole: the demo as a user runs it, daemons driven by the command line,
//! bad input, and the house rules.

mod bad_input;
mod cluster;
mod daemons;
mod demo;
mod tidy;
