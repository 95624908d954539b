//! The daemon: wires the cores to the drivers, and answers the CLI.
//!
//! [`run`] is `relevo daemon`. [`api`] is what it answers on its socket; [`service_file`] reads a
//! service from TOML; [`saved`] reads what gave way to another history.
//!
//! Where to start: `run` for the life of the process, `app` for the two phases of a daemon (in no
//! cluster, member of one), `cluster` for everything that runs as a member, `daemon` for its
//! threads and tasks, `verbs` for what the calls of the API do, `status` for what is shown.

pub mod api;
mod app;
mod cluster;
mod daemon;
mod events;
mod fencing;
mod join;
mod local_store;
mod membership_files;
mod options;
mod rpc;
mod run;
pub mod saved;
pub mod service_file;
mod state_dir;
mod status;
mod verbs;

pub use options::{DEFAULT_DEVICE_DIR, DEFAULT_STATE_DIR, DaemonOptions};
pub use run::run;
pub use verbs::metadata::dump_metadata_without_daemon;
