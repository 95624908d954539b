//! The ledger: a small real HTTP service that must not lose an entry, and the client that checks it.
//!
//! `relevo ledger` runs [`run`] as a service's process; `relevo ledger-client` runs [`run_client`]
//! somewhere else in the network; `demo` reads the client's journal and compares.
//!
//! An entry is a number and a text. `POST /entries` answers 200 only when the entry is on stable
//! storage. Entries are idempotent by number, so a client that got no answer asks again. Storage is a
//! file, or the blocks of a volume itself.

mod args;
mod blocks;
mod book;
mod client;
mod file;
mod journal;
mod server;
mod store;

pub use args::{LedgerArgs, LedgerClientArgs};
pub use book::Stored;
pub use client::{ClientConfig, ClientError, LedgerClient, run_client};
pub use journal::{Acknowledged, Gap, Journal, longest_gap, missing};
pub use server::{Ledger, LedgerConfig, run};
pub use store::{Entry, LedgerError, Storage};

/// The longest text of an entry in bytes: a record with it fits in one block of a volume.
pub const MAX_TEXT: usize = 3072;
