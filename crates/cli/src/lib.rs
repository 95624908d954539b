//! The command line: verbs, and how answers read.
//!
//! It talks to the daemon of this machine over its Unix socket and knows nothing that the API
//! does not tell; whatever a verb can do, a program can do too. The binary crate adds the verbs
//! that are not about a running daemon. One file per verb group in [`commands`]; text for people
//! is made by pure functions in [`render`]; [`client`] is the way to the daemon, also for the
//! demo and tests.

pub mod client;
pub mod commands;
mod error;
pub mod render;

pub use client::Client;
pub use commands::{GlobalArgs, Verb, run};
pub use error::CliError;
