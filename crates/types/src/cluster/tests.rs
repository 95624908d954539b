mod fencing;

use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::{
    ClusterId, Epoch, LeaseGeneration, LineageId, NodeId, Sensitivity, ServiceId, VolumeId,
};

pub(super) const A: NodeId = NodeId(1);
pub(super) const B: NodeId = NodeId(2);
const W: NodeId = NodeId(3);
pub(super) const V: VolumeId = VolumeId(1);
const S: ServiceId = ServiceId(1);

fn spec(name: &str, kind: NodeKind) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        kind,
        paths: vec![NodePath {
            name: "lan".to_owned(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            replication: false,
        }],
        streams: Vec::new(),
        ports: Ports::default(),
    }
}

pub(super) fn replica(node: NodeId) -> ReplicaSpec {
    ReplicaSpec {
        node,
        protocol: Protocol::C,
        backing: None,
        force: false,
    }
}

fn change(expect: u64, change: VolumeChange) -> Command {
    Command::Volume {
        volume: V,
        expect: Epoch(expect),
        change,
    }
}

fn cluster() -> ClusterState {
    let mut state = ClusterState::default();
    let init = Command::Init {
        cluster: ClusterId([7; 16]),
        name: "campus".to_owned(),
        sensitivity: Sensitivity::Normal,
        node: spec("a", NodeKind::Data),
    };
    assert_eq!(state.apply(&init), Ok(Outcome::Node(A)));
    for (name, kind) in [("b", NodeKind::Data), ("w", NodeKind::Witness)] {
        let token = JoinToken {
            kind: Some(kind),
            expires_unix_s: 100,
        };
        state
            .apply(&Command::CreateToken {
                hash: name.to_owned(),
                token,
            })
            .unwrap();
        let join = Command::Join {
            hash: name.to_owned(),
            now_unix_s: 99,
            node: spec(name, kind),
        };
        let Ok(Outcome::Node(node)) = state.apply(&join) else {
            panic!("joins")
        };
        let before = state.majority();
        assert_eq!(before, state.voters().count() / 2 + 1);
        let expect = state.voters_version;
        state.apply(&Command::AdmitVoter { node, expect }).unwrap();
    }
    assert_eq!(state.majority(), 2);
    state
}

fn with_volume() -> ClusterState {
    let mut state = cluster();
    let create = Command::CreateVolume {
        name: "mail".to_owned(),
        size: 1 << 20,
        lineage: LineageId(9),
        replicas: vec![replica(A), replica(B)],
    };
    assert_eq!(state.apply(&create), Ok(Outcome::Volume(V)));
    state
        .apply(&Command::ReplicaCreated { volume: V, node: A })
        .unwrap();
    assert!(!state.volumes[&V].is_created());
    state
        .apply(&Command::ReplicaCreated { volume: V, node: B })
        .unwrap();
    assert_eq!(state.volumes[&V].epoch, Epoch(1));
    state
}

/// With one more data node, which has no replica.
pub(super) fn with_three_data_nodes(fourth: NodeId) -> ClusterState {
    let mut state = with_volume();
    let token = JoinToken {
        kind: None,
        expires_unix_s: 100,
    };
    let hash = "d".to_owned();
    let create = Command::CreateToken {
        hash: hash.clone(),
        token,
    };
    state.apply(&create).unwrap();
    let join = Command::Join {
        hash,
        now_unix_s: 99,
        node: spec("d", NodeKind::Data),
    };
    assert_eq!(state.apply(&join), Ok(Outcome::Node(fourth)));
    state
}

#[test]
fn a_token_works_once_and_until_it_expires() {
    let mut state = cluster();
    let join = |hash: &str, now, kind| Command::Join {
        hash: hash.to_owned(),
        now_unix_s: now,
        node: spec("c", kind),
    };
    assert_eq!(
        state.apply(&join("b", 1, NodeKind::Data)),
        Err(Rejection::TokenUnknown)
    );
    let token = JoinToken {
        kind: Some(NodeKind::Data),
        expires_unix_s: 100,
    };
    state
        .apply(&Command::CreateToken {
            hash: "h".to_owned(),
            token,
        })
        .unwrap();
    assert_eq!(
        state.apply(&join("h", 130, NodeKind::Data)),
        Err(Rejection::TokenExpired { ago_s: 30 })
    );
    assert!(matches!(
        state.apply(&join("h", 1, NodeKind::Witness)),
        Err(Rejection::TokenKind { .. })
    ));
    assert_eq!(
        state.apply(&join("h", 1, NodeKind::Data)),
        Ok(Outcome::Node(NodeId(4)))
    );
    assert_eq!(
        state.apply(&join("h", 1, NodeKind::Data)),
        Err(Rejection::TokenUnknown)
    );
}

#[test]
fn a_name_in_use_does_not_burn_the_token() {
    let mut state = cluster();
    let token = JoinToken {
        kind: None,
        expires_unix_s: 100,
    };
    state
        .apply(&Command::CreateToken {
            hash: "h".to_owned(),
            token,
        })
        .unwrap();
    let join = |name: &str| Command::Join {
        hash: "h".to_owned(),
        now_unix_s: 1,
        node: spec(name, NodeKind::Data),
    };
    assert!(matches!(
        state.apply(&join("a")),
        Err(Rejection::NameTaken { .. })
    ));
    assert!(matches!(
        state.apply(&join("../x")),
        Err(Rejection::BadName { .. })
    ));
    assert!(state.apply(&join("c")).is_ok());
}

#[test]
fn only_an_in_sync_replica_of_a_volume_without_primary_is_promoted() {
    let mut state = with_volume();
    state
        .apply(&change(1, VolumeChange::Promote { node: A }))
        .unwrap();
    assert_eq!(
        state.apply(&change(2, VolumeChange::Promote { node: B })),
        Err(Rejection::HasPrimary { primary: A })
    );
    state
        .apply(&change(2, VolumeChange::Leave { nodes: vec![B] }))
        .unwrap();
    state
        .apply(&change(3, VolumeChange::Demote { node: A }))
        .unwrap();
    assert_eq!(
        state.apply(&change(4, VolumeChange::Promote { node: B })),
        Err(Rejection::NotInSync { node: B })
    );
    assert_eq!(
        state.apply(&change(4, VolumeChange::Leave { nodes: vec![A] })),
        Err(Rejection::LastInSync)
    );
    assert_eq!(
        state.apply(&change(3, VolumeChange::Promote { node: A })),
        Err(Rejection::StaleEpoch {
            expected: Epoch(3),
            actual: Epoch(4)
        })
    );
    state
        .apply(&change(4, VolumeChange::Join { node: B }))
        .unwrap();
    assert_eq!(state.volumes[&V].replicas[&B].joined, Epoch(5));
}

#[test]
fn an_uncertain_replica_is_promoted_with_the_evicted_members() {
    let evict = Command::Evict {
        node: A,
        generation: LeaseGeneration(1),
        proof: Proof::Condemned { by: vec![B, W] },
    };
    let promoted = |promote: VolumeChange| {
        let mut state = with_volume();
        state
            .apply(&change(1, VolumeChange::Promote { node: A }))
            .unwrap();
        state.apply(&evict).unwrap();
        state.apply(&change(3, promote)).unwrap();
        let volume = &state.volumes[&V];
        assert_eq!((volume.primary, volume.epoch), (Some(B), Epoch(4)));
        volume.in_sync.iter().copied().collect::<Vec<_>>()
    };
    assert_eq!(promoted(VolumeChange::Promote { node: B }), [B]);
    assert_eq!(promoted(VolumeChange::PromoteUncertain { node: B }), [A, B]);
    let mut state = with_volume();
    state
        .apply(&change(1, VolumeChange::Promote { node: A }))
        .unwrap();
    state.apply(&evict).unwrap();
    assert_eq!(
        state.apply(&change(3, VolumeChange::PromoteUncertain { node: A })),
        Err(Rejection::Evicted { node: A })
    );
}

#[test]
fn eviction_needs_a_majority_and_takes_everything() {
    let mut state = with_volume();
    state
        .apply(&change(1, VolumeChange::Promote { node: A }))
        .unwrap();
    let service = ServiceSpec {
        name: "mail".to_owned(),
        parts: vec![Part::Volume(VolumePart {
            volume: V,
            device: true,
        })],
    };
    state
        .apply(&Command::CreateService {
            spec: service,
            placement: Placement::default(),
            target: None,
        })
        .unwrap();
    state
        .apply(&Command::Acquire {
            service: S,
            node: A,
        })
        .unwrap();
    let evict = |by: Vec<NodeId>, generation| Command::Evict {
        node: A,
        generation: LeaseGeneration(generation),
        proof: Proof::Condemned { by },
    };
    assert!(matches!(
        state.apply(&evict(vec![B], 1)),
        Err(Rejection::NoProof { .. })
    ));
    assert!(matches!(
        state.apply(&evict(vec![B, B], 1)),
        Err(Rejection::NoProof { .. })
    ));
    assert!(matches!(
        state.apply(&evict(vec![B, W], 2)),
        Err(Rejection::StaleGeneration { .. })
    ));
    state.apply(&evict(vec![B, W], 1)).unwrap();
    assert_eq!(state.volumes[&V].primary, None);
    assert_eq!(state.volumes[&V].epoch, Epoch(3));
    assert_eq!(state.services[&S].holder, None);
    // Evicted, it can take nothing, until it is readmitted.
    assert_eq!(
        state.apply(&Command::Acquire {
            service: S,
            node: A
        }),
        Err(Rejection::Evicted { node: A })
    );
    assert_eq!(
        state.apply(&change(3, VolumeChange::Promote { node: A })),
        Err(Rejection::Evicted { node: A })
    );
    state
        .apply(&Command::Readmit {
            node: A,
            generation: LeaseGeneration(1),
        })
        .unwrap();
    assert_eq!(state.nodes[&A].lease.generation, LeaseGeneration(2));
    state
        .apply(&Command::Acquire {
            service: S,
            node: A,
        })
        .unwrap();
}

#[test]
fn one_service_one_holder() {
    let mut state = with_volume();
    let part = Part::Volume(VolumePart {
        volume: V,
        device: false,
    });
    let service = |name: &str| Command::CreateService {
        spec: ServiceSpec {
            name: name.to_owned(),
            parts: vec![part.clone()],
        },
        placement: Placement::default(),
        target: None,
    };
    state.apply(&service("one")).unwrap();
    assert!(matches!(
        state.apply(&service("two")),
        Err(Rejection::BadService { .. })
    ));
    state
        .apply(&Command::Acquire {
            service: S,
            node: A,
        })
        .unwrap();
    assert_eq!(
        state.apply(&Command::Acquire {
            service: S,
            node: B
        }),
        Err(Rejection::ServiceHeld { holder: A })
    );
    let release = |node| Command::Release {
        service: S,
        node,
        failure: Some("disk".to_owned()),
        disk: None,
    };
    assert_eq!(
        state.apply(&release(B)),
        Err(Rejection::NotHolder { node: B })
    );
    state.apply(&release(A)).unwrap();
    assert_eq!(state.services[&S].failures[&A].count, 1);
    assert!(matches!(
        state.apply(&Command::RemoveVolume { volume: V }),
        Err(Rejection::VolumeInUse { .. })
    ));
}

/// Found by the disk tests in `crates/relevo/tests/it/breakage`: alfa's disk failed and was
/// repaired, then beta's failed, and nobody was allowed to have the service.
#[test]
fn a_node_that_is_in_sync_again_may_have_the_service_again() {
    let mut state = with_volume();
    let part = Part::Volume(VolumePart {
        volume: V,
        device: false,
    });
    let spec = ServiceSpec {
        name: "mail".to_owned(),
        parts: vec![part],
    };
    state
        .apply(&Command::CreateService {
            spec,
            placement: Placement::default(),
            target: None,
        })
        .unwrap();
    state
        .apply(&Command::Acquire {
            service: S,
            node: A,
        })
        .unwrap();
    let epoch = state.volumes[&V].epoch.0;
    state
        .apply(&change(epoch, VolumeChange::Leave { nodes: vec![A] }))
        .unwrap();
    state
        .apply(&Command::Release {
            service: S,
            node: A,
            failure: Some("its disk failed".to_owned()),
            disk: Some(V),
        })
        .unwrap();
    assert!(state.services[&S].failures.contains_key(&A));
    state
        .apply(&change(epoch + 1, VolumeChange::Join { node: A }))
        .unwrap();
    assert!(state.services[&S].failures.is_empty());
}

#[test]
fn a_command_survives_its_encoding() {
    let command = change(4, VolumeChange::Leave { nodes: vec![A, B] });
    let bytes = postcard::to_stdvec(&command).unwrap();
    assert_eq!(postcard::from_bytes::<Command>(&bytes), Ok(command));
}

#[test]
fn options_change_by_version_and_the_epoch_stays() {
    let mut state = with_volume();
    let volume = state.volumes[&V].clone();
    let mut options = volume.options.clone();
    options.set(&state, "on-no-quorum", "io-error").unwrap();
    let command = Command::SetVolumeOptions {
        volume: V,
        expect: volume.version,
        options: options.clone(),
    };
    state.apply(&command).unwrap();
    let changed = &state.volumes[&V];
    assert_eq!(changed.options, options);
    assert_eq!(changed.epoch, volume.epoch);
    assert_eq!(changed.version, volume.version + 1);
    let again = state.apply(&command).unwrap_err();
    assert!(matches!(again, Rejection::StaleVersion { .. }), "{again}");
}

/// Volumes whose resyncs wait for each other's.
#[test]
fn resyncs_are_in_an_order_without_circles() {
    let mut state = with_volume();
    let first = state.volumes[&V].clone();
    let name = |number: u32| format!("v{number}");
    for number in 2..=3 {
        let replicas = first.replicas.values().map(|replica| replica.spec.clone());
        let create = Command::CreateVolume {
            name: name(number),
            size: first.size,
            lineage: LineageId(u64::from(number)),
            replicas: replicas.collect(),
        };
        state.apply(&create).unwrap();
    }
    let set = |state: &mut ClusterState, of: u32, after: &str| {
        let volume = state.volumes[&VolumeId(of)].clone();
        let mut options = volume.options;
        options
            .set(state, "resync-after", after)
            .map_err(|error| error.to_string())?;
        let command = Command::SetVolumeOptions {
            volume: VolumeId(of),
            expect: volume.version,
            options,
        };
        state.apply(&command).map_err(|error| error.to_string())
    };
    let unknown = set(&mut state, 2, "nowhere").unwrap_err();
    assert!(unknown.contains("another volume"), "{unknown}");
    set(&mut state, 2, &first.name).unwrap();
    set(&mut state, 3, &name(2)).unwrap();
    for (of, after) in [(1, name(3)), (2, name(3)), (1, first.name.clone())] {
        let circle = set(&mut state, of, &after).unwrap_err();
        assert!(circle.contains("wait for each other"), "{circle}");
    }
    // Who waits for a volume that is removed waits for none.
    let before = state.volumes[&VolumeId(3)].clone();
    state
        .apply(&Command::RemoveVolume {
            volume: VolumeId(2),
        })
        .unwrap();
    let after = &state.volumes[&VolumeId(3)];
    assert_eq!(after.options.resync_after, None);
    assert_eq!(after.version, before.version + 1);
    set(&mut state, 1, &name(3)).unwrap();
    let shown = state.volumes[&V].options.list(&state);
    assert!(shown.contains(&("resync-after", name(3))), "{shown:?}");
}
