//! Two volume threads joined by real TLS links, driven through NBD.

#![expect(
    clippy::cast_possible_truncation,
    reason = "small numbers as fill bytes, sizes of a few MiB"
)]

mod cluster;
mod replication;
mod saving;
