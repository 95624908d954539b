//! The API of the daemons, for a caller without an async runtime.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use relevo_cli::client::Client;
use relevo_server::api::{ClusterStatus, VolumeStatus};
use tokio::runtime::Runtime;

use crate::interrupt;

/// How often a wait looks again: well below the shortest time that is measured.
const POLL: Duration = Duration::from_millis(20);

/// Calls daemons, one call at a time.
#[derive(Debug)]
pub(crate) struct Api {
    runtime: Runtime,
}

impl Api {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start a runtime for API calls")?;
        Ok(Self { runtime })
    }

    /// One call to the daemon of a state directory.
    pub(crate) fn call<T, E, F>(
        &self,
        state_dir: &Path,
        call: impl FnOnce(Client) -> F,
    ) -> anyhow::Result<T>
    where
        F: Future<Output = Result<T, E>>,
        E: std::error::Error + Send + Sync + 'static,
    {
        Ok(self.runtime.block_on(call(Client::new(state_dir)))?)
    }

    /// What a daemon knows of its cluster; `None` when it does not answer.
    pub(crate) fn cluster(&self, state_dir: &Path) -> Option<ClusterStatus> {
        let client = Client::new(state_dir);
        self.runtime
            .block_on(async {
                tokio::time::timeout(Duration::from_secs(2), client.cluster()).await
            })
            .ok()?
            .ok()
    }
}

/// Looks again and again until `look` finds something.
///
/// # Errors
/// After `bound`, or when the user interrupts. `what` completes "waited 30 s for ...".
pub(crate) fn wait_for<T>(
    bound: Duration,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let start = now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        interrupt::check()?;
        anyhow::ensure!(
            now().saturating_sub(start) < bound,
            "waited {} s for {what}",
            bound.as_secs()
        );
        std::thread::sleep(POLL);
    }
}

/// The time since boot: the clock that the ledger's client writes into its journal.
pub(crate) fn now() -> Duration {
    Duration::from_nanos(relevo_host::clock::now().0)
}

/// Whether every replica is in the in-sync set.
pub(crate) fn all_in_sync(volume: &VolumeStatus) -> bool {
    !volume.in_sync.is_empty() && volume.in_sync.len() == volume.replicas.len()
}

/// A short random word for names, so that two runs can't collide.
pub(crate) fn random_word() -> String {
    let nanos = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    format!(
        "{:08x}",
        (nanos ^ (u128::from(std::process::id()) << 13)) & 0xffff_ffff
    )
}
