//! The simulator's own test command: seeds that ever failed, then fresh ones; crash enumeration;
//! planted bugs.

mod crashes;
mod planted;
mod seeds;
