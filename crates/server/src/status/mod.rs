//! What `relevo status` tells: put together from the control log, from what this node observes,
//! and from what every living node reports of its own replicas and services.
//!
//! [`compose`] and [`judge`] are pure.

mod compose;
mod fencing;
mod judge;
#[cfg(test)]
pub(crate) mod tests;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use futures::future::join_all;
use relevo_replication::PeerState;
use relevo_transport::RpcClient;
use relevo_types::{NodeId, ServiceId, VolumeId, cluster::ClusterState};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub(crate) use compose::{Sources, compose, service_state};
pub(crate) use judge::{judge, side_words};

use crate::{
    api::PartState,
    daemon::{
        node_loop::NodeInbox,
        parts::Parts,
        paths::{PathBoard, Standing},
        volumes::Volumes,
    },
    fencing::{Fencing, LocalFencing},
    rpc::fetch_report,
};

/// How long the others may take to report: a person waits.
const REPORT_BOUND: Duration = Duration::from_millis(500);

/// What only the node itself knows, sent as JSON when another one asks.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LocalReport {
    /// Its replicas.
    pub(crate) volumes: BTreeMap<VolumeId, LocalVolume>,
    /// The parts of services that were ordered here, by their place in the list.
    pub(crate) services: BTreeMap<ServiceId, BTreeMap<usize, (PartState, Option<String>)>>,
    /// What the planner waits for, if it runs here.
    pub(crate) waits: Vec<(Option<ServiceId>, String)>,
    /// Its own paths, and why it can't use one.
    #[serde(default)]
    pub(crate) paths: Standing,
    /// Its fence devices, and the fencing under way there.
    #[serde(default)]
    pub(crate) fencing: LocalFencing,
}

/// A replica as its node sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LocalVolume {
    pub(crate) disk: String,
    pub(crate) waiting: Option<String>,
    pub(crate) waiting_since_unix_ms: Option<u64>,
    pub(crate) peers: BTreeMap<NodeId, LocalPeer>,
    pub(crate) driver: Option<String>,
    pub(crate) backing: Option<PathBuf>,
    pub(crate) remark: Option<String>,
    pub(crate) device: Option<PathBuf>,
    pub(crate) nbd: Option<PathBuf>,
    /// Peers whose history forked from this replica's, both with changes.
    #[serde(default)]
    pub(crate) splits: BTreeMap<NodeId, LocalSplit>,
}

/// What a replica's node knows of a peer of another history.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LocalSplit {
    /// Blocks that only this replica has.
    pub(crate) ours: u64,
    /// Blocks that only the peer's has.
    pub(crate) theirs: u64,
    pub(crate) why: String,
}

/// What a replica's node knows of another replica.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LocalPeer {
    /// State of the replication.
    pub(crate) state: String,
    /// Blocks that it lacks, while it is resynced.
    pub(crate) dirty_blocks: Option<u64>,
    /// The most blocks that it lacked in this resync.
    pub(crate) dirty_at_first: Option<u64>,
    /// Bytes a second of its resync, while one is under way.
    #[serde(default)]
    pub(crate) sync_bytes_per_s: Option<u64>,
    /// Bytes that its resync compared and did not send, since they were the same there.
    #[serde(default)]
    pub(crate) sync_same_bytes: Option<u64>,
    /// Bytes a second that its resync is held to, while one is under way.
    #[serde(default)]
    pub(crate) sync_limit: Option<u64>,
    /// The volume whose resyncs on this node come first.
    #[serde(default)]
    pub(crate) sync_after: Option<VolumeId>,
    /// A replica of protocol A, told by its primary: bytes that it may lack, and for how long it does.
    #[serde(default)]
    pub(crate) behind: Option<(u64, u64)>,
}

/// Makes this node's report.
#[derive(Clone, Debug)]
pub(crate) struct LocalSource {
    volumes: Volumes,
    parts: Parts,
    inbox: NodeInbox,
    paths: PathBoard,
    fencing: Fencing,
    states: watch::Receiver<Arc<ClusterState>>,
}

impl LocalSource {
    pub(crate) fn new(
        volumes: Volumes,
        parts: Parts,
        inbox: NodeInbox,
        paths: PathBoard,
        fencing: Fencing,
        states: watch::Receiver<Arc<ClusterState>>,
    ) -> Self {
        Self {
            volumes,
            parts,
            inbox,
            fencing,
            paths,
            states,
        }
    }

    pub(crate) async fn report(&self) -> LocalReport {
        let mut report = LocalReport {
            volumes: self.local_volumes(),
            paths: self.paths.read(),
            fencing: self.fencing.report(),
            ..LocalReport::default()
        };
        let services: Vec<ServiceId> = self.states.borrow().services.keys().copied().collect();
        for service in services {
            let parts = self.parts.states(service).await;
            if !parts.is_empty() {
                report.services.insert(service, parts);
            }
        }
        if let Some(node) = self.inbox.status().await {
            let waits = node.waits.into_iter();
            report.waits = waits.map(|wait| (wait.service, wait.reason)).collect();
        }
        report
    }

    fn local_volumes(&self) -> BTreeMap<VolumeId, LocalVolume> {
        let local = self.volumes.local().into_iter();
        local
            .filter_map(|known| match (known.live, known.trouble) {
                (Some(live), _) => {
                    let status = live.handle.status();
                    let peers = status.engine.peers.iter().map(|(node, state)| {
                        let peer = LocalPeer {
                            state: peer_state(*state).to_owned(),
                            dirty_blocks: dirty_blocks(*state),
                            dirty_at_first: live.progress.get(node).copied(),
                            sync_bytes_per_s: status.engine.sync_speeds.get(node).copied(),
                            sync_same_bytes: status.engine.sync_same.get(node).copied(),
                            sync_after: status.engine.sync_after,
                            sync_limit: status
                                .engine
                                .sync_limit
                                .filter(|_| status.engine.sync_speeds.contains_key(node)),
                            behind: status.engine.behind.get(node).map(|behind| {
                                let since = behind.since.map(|since| status.as_of.since(since));
                                let ms = since.map_or(0, |since| since.as_millis());
                                (behind.bytes, u64::try_from(ms).unwrap_or(u64::MAX))
                            }),
                        };
                        (*node, peer)
                    });
                    let volume = LocalVolume {
                        disk: format!("{:?}", status.engine.disk),
                        waiting_since_unix_ms: live
                            .waiting_since_unix_ms
                            .filter(|_| status.engine.waiting.is_some()),
                        waiting: status.engine.waiting.clone(),
                        peers: peers.collect(),
                        driver: Some(driver_words(&status)),
                        backing: Some(live.backing),
                        remark: live.remark,
                        device: self.volumes.shared.exports.device(known.volume),
                        nbd: status.engine.open.then_some(live.nbd),
                        splits: status
                            .engine
                            .splits
                            .iter()
                            .map(|(node, split)| {
                                let split = LocalSplit {
                                    ours: split.ours,
                                    theirs: split.theirs,
                                    why: split.why.clone(),
                                };
                                (*node, split)
                            })
                            .collect(),
                    };
                    Some((known.volume, volume))
                }
                (None, _) if known.down => {
                    let volume = LocalVolume {
                        disk: "Diskless".to_owned(),
                        remark: Some(
                            "an operator detached it; `relevo attach` takes it back".to_owned(),
                        ),
                        ..LocalVolume::default()
                    };
                    Some((known.volume, volume))
                }
                (None, Some(why)) => {
                    let volume = LocalVolume {
                        disk: "Failed".to_owned(),
                        remark: Some(why),
                        ..LocalVolume::default()
                    };
                    Some((known.volume, volume))
                }
                (None, None) => None,
            })
            .collect()
    }
}

/// This node's report and those of the others that answer in time.
pub(crate) async fn collect(
    rpc: &RpcClient,
    local: &LocalSource,
    state: &ClusterState,
    me: NodeId,
) -> BTreeMap<NodeId, LocalReport> {
    let others = state.nodes.keys().copied().filter(|node| *node != me);
    let asked = others.map(|node| async move {
        // Asking a node that is away costs the whole wait, and tells nothing.
        if rpc.trouble_with(node).is_some() {
            return None;
        }
        Some((node, fetch_report(rpc, node, REPORT_BOUND).await?))
    });
    let (mine, theirs) = futures::join!(local.report(), join_all(asked));
    let mut reports: BTreeMap<NodeId, LocalReport> = theirs.into_iter().flatten().collect();
    reports.insert(me, mine);
    reports
}

pub(crate) const fn peer_state(state: PeerState) -> &'static str {
    match state {
        PeerState::Connecting => "Connecting",
        PeerState::StandAlone => "StandAlone",
        PeerState::Connected => "Connected",
        PeerState::SyncSource { .. } => "SyncSource",
        PeerState::SyncTarget => "SyncTarget",
        PeerState::VerifyS { .. } => "VerifyS",
        PeerState::VerifyT => "VerifyT",
        PeerState::Established | PeerState::Following => "Established",
        PeerState::Ahead { .. } => "Ahead",
        PeerState::Behind => "Behind",
        PeerState::PausedSyncS { .. } => "PausedSyncS",
        PeerState::PausedSyncT => "PausedSyncT",
    }
}

pub(crate) const fn dirty_blocks(state: PeerState) -> Option<u64> {
    match state {
        PeerState::SyncSource { dirty }
        | PeerState::PausedSyncS { dirty }
        | PeerState::Ahead { dirty } => Some(dirty),
        PeerState::Connecting
        | PeerState::StandAlone
        | PeerState::Connected
        | PeerState::SyncTarget
        | PeerState::VerifyS { .. }
        | PeerState::VerifyT
        | PeerState::Following
        | PeerState::Behind
        | PeerState::PausedSyncT
        | PeerState::Established => None,
    }
}

fn driver_words(status: &relevo_datapath::VolumeStatus) -> String {
    match &status.io_mode {
        relevo_disk::IoMode::Direct => format!("{}, direct", status.driver.kind),
        relevo_disk::IoMode::Buffered { reason } => {
            format!("{}, buffered: {reason}", status.driver.kind)
        }
    }
}
