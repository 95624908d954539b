//! Leaving in good order.

use std::{collections::BTreeSet, sync::Arc};

use relevo_node::{Effect, Input, Node, NodeConfig, VolumeOrder};
use relevo_types::{Instance, NodeId, Sensitivity, Time, VolumeId, cluster::ClusterState};

use crate::cluster::{A, B, Cluster, MAIL, W};

#[test]
fn a_shutdown_moves_everything_first_and_says_goodbye() {
    let mut cluster = Cluster::running();
    let from = cluster.now;
    cluster.input(A, Input::Shutdown);
    let took = cluster.run_until(1000, |cluster| cluster.done.contains(&A));
    assert!(took < 100, "{took} ms");
    let words = cluster.words(A, from);
    assert_eq!(
        words[words.len() - 4..],
        [
            "commit release n1",
            "commit evict n1",
            "lease lost",
            "shutdown done"
        ]
    );
    cluster.kill(A);
    cluster.run_until(100, |cluster| cluster.serves(B));
    cluster.run(3000);
    assert!(cluster.state.nodes[&A].lease.evicted);
    cluster.boot(A);
    cluster.run(1000);
    assert!(!cluster.state.nodes[&A].lease.evicted);
    assert!(cluster.serves(B));
}

#[test]
fn the_last_node_shuts_down_without_a_majority() {
    let mut cluster = Cluster::running();
    cluster.kill(B);
    cluster.kill(W);
    cluster.leader = None;
    cluster.run(2000);
    let from = cluster.now;
    cluster.input(A, Input::Shutdown);
    cluster.run(100);
    assert!(!cluster.done.contains(&A), "its volume can't step down yet");
    cluster.run_until(85_000, |cluster| cluster.done.contains(&A));
    assert!(cluster.words(A, from).contains(&"stop process"));
    assert_eq!(cluster.state.services[&MAIL].holder, Some(A));
}

fn lone(local: &[u32]) -> Node {
    let config = NodeConfig {
        me: NodeId(1),
        instance: Instance(1),
        timing: Sensitivity::Normal.timing(),
        condemned: Vec::new(),
        memory_mib: None,
        voters_told: 0,
        local_replicas: local
            .iter()
            .map(|id| VolumeId(*id))
            .collect::<BTreeSet<_>>(),
    };
    Node::new(config, Time::ZERO)
}

#[test]
fn a_node_of_no_cluster_has_nothing_to_give_up() {
    let mut node = lone(&[]);
    let mut out = Vec::new();
    node.handle(Time(1), Input::Shutdown, &mut out);
    node.handle(Time(2), Input::Tick, &mut out);
    assert_eq!(out, [Effect::ShutdownDone]);
}

#[test]
fn an_old_state_removes_no_replica() {
    let mut node = lone(&[1, 2]);
    let mut out = Vec::new();
    // The state of a moment at which volume 2 was not created yet, and volume 1 was removed.
    let state = ClusterState {
        revision: 9,
        last_volume: 1,
        ..ClusterState::default()
    };
    let mut member = Cluster::new().state;
    member.revision = state.revision;
    member.last_volume = state.last_volume;
    node.handle(Time(1), Input::State(Arc::new(member)), &mut out);
    let removed: Vec<VolumeId> = out
        .iter()
        .filter_map(|effect| match effect {
            Effect::Volume {
                volume,
                order: VolumeOrder::RemoveReplica,
            } => Some(*volume),
            _ => None,
        })
        .collect();
    assert_eq!(removed, [VolumeId(1)]);
}
