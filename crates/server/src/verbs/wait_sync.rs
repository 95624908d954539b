//! `relevo wait-sync`: waiting until every replica of a volume has everything.

use std::time::Duration;

use relevo_types::size::format_size;
use tokio::time::Instant;

use super::find_volume;
use crate::{
    api::{ApiError, Done, ErrorKind, ReplicaStatus, VolumeStatus, WaitSyncRequest},
    cluster::Cluster,
};

/// How often the status is looked at: each look asks every node.
const LOOK_EVERY: Duration = Duration::from_millis(250);

impl Cluster {
    pub(crate) async fn wait_sync(
        &self,
        name: &str,
        request: WaitSyncRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("volume `{name}` is not in sync");
        let seconds = request.timeout_s.min(WaitSyncRequest::MOST_S);
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            // Also when it was removed meanwhile.
            let id = find_volume(&self.state(), name, &what)?.id.to_string();
            let status = self.status().await;
            let volume = status.volumes.iter().find(|volume| volume.id == id);
            let lacking = volume.map_or_else(|| vec!["it is being created".to_owned()], lacking);
            if lacking.is_empty() {
                return Ok(Done {
                    done: format!("Every replica of volume {name} is in sync."),
                });
            }
            if Instant::now() >= end {
                return Err(ApiError::new(
                    ErrorKind::Unavailable,
                    what,
                    lacking.join("; "),
                    "`relevo status` shows what its replicas are doing",
                ));
            }
            tokio::time::sleep_until((Instant::now() + LOOK_EVERY).min(end)).await;
        }
    }
}

/// What is waited for, a phrase for each replica that lacks something.
fn lacking(volume: &VolumeStatus) -> Vec<String> {
    if volume.epoch == 0 {
        return vec!["it is being created".to_owned()];
    }
    let replicas = volume.replicas.iter();
    let missing = replicas.filter(|it| !volume.in_sync.contains(&it.node) && !it.follows());
    missing.map(describe).collect()
}

fn describe(replica: &ReplicaStatus) -> String {
    let state = replica.replication.as_deref().unwrap_or("not connected");
    let mut words = format!("the replica on {} is {state}", replica.node);
    if let Some(dirty) = replica.dirty_bytes {
        words += &format!(" and lacks {}", format_size(dirty));
    }
    if let Some(first) = &replica.sync_after {
        words += &format!(", waits for the resync of volume {first} (`resync-after`)");
    }
    match (replica.sync_left_s, replica.sync_bytes_per_s) {
        (Some(left), _) => words += &format!(", about {left} s are left"),
        (None, Some(0)) => words += ", its resync stands still",
        _ => {}
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(in_sync: &[&str], protocol: &str, replication: &str) -> VolumeStatus {
        let json = serde_json::json!({
            "name": "mail", "id": "v1", "size": 1 << 20, "epoch": 3, "primary": "alfa",
            "in_sync": in_sync, "device": null, "nbd": null, "wait": null,
            "replicas": [
                {"node": "alfa", "role": "Primary"},
                {"node": "beta", "role": "Secondary", "replication": replication, "protocol": protocol,
                 "dirty_bytes": 8192, "sync_bytes_per_s": 0},
            ],
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            lacking(&volume(&["alfa"], "C", "PausedSyncS")),
            ["the replica on beta is PausedSyncS and lacks 8 KiB, its resync stands still"]
        );
        assert!(lacking(&volume(&["alfa", "beta"], "C", "Established")).is_empty());
    }

    #[test]
    fn a_follower_has_everything_unless_it_was_left_behind() {
        assert!(lacking(&volume(&["alfa"], "A", "Established")).is_empty());
        assert_eq!(lacking(&volume(&["alfa"], "A", "Ahead")).len(), 1);
    }
}
