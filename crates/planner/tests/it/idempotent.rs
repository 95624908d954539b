//! A plan is accepted by the control log, and once carried out there is nothing left to do.

use std::time::Duration;

use proptest::prelude::*;
use relevo_planner::{ReplicaView, plan};
use relevo_types::{
    NodeId,
    cluster::{self, Command},
};

use crate::world::World;

#[derive(Clone, Debug)]
struct View {
    alive: bool,
    silent_ms: Option<u64>,
    stale_generation: bool,
    condemned_by: u8,
    heard_by: u8,
    leaving: bool,
    replicas: [u8; 2],
    standby: bool,
    evicted: bool,
}

#[derive(Clone, Debug)]
struct Placement {
    enabled: bool,
    holder: Option<u8>,
    target: Option<u8>,
    failed_on: u8,
    /// Which nodes and services its rules name, a bit each.
    rules: [u8; 6],
    memory_mib: u64,
    held: bool,
    slow: bool,
}

fn view() -> impl Strategy<Value = View> {
    (
        any::<bool>(),
        proptest::option::of(0..5000u64),
        prop::bool::weighted(0.1),
        any::<u8>(),
        any::<u8>(),
        prop::bool::weighted(0.1),
        any::<[u8; 2]>(),
        (prop::bool::weighted(0.2), prop::bool::weighted(0.2)),
    )
        .prop_map(|v| View {
            alive: v.0,
            silent_ms: v.1,
            stale_generation: v.2,
            condemned_by: v.3,
            heard_by: v.4,
            leaving: v.5,
            replicas: v.6,
            standby: v.7.0,
            evicted: v.7.1,
        })
}

fn placement() -> impl Strategy<Value = Placement> {
    (
        any::<bool>(),
        proptest::option::of(0..3u8),
        proptest::option::of(0..3u8),
        0..8u8,
        (
            // Mostly nothing: else the control log refuses nearly all.
            prop::array::uniform6(prop_oneof![3 => Just(0), 1 => 0..16u8]),
            prop_oneof![1 => Just(0), 1 => 1..8u64],
            prop::bool::weighted(0.1),
            prop::bool::weighted(0.3),
        ),
    )
        .prop_map(|(enabled, holder, target, failed_on, place)| Placement {
            enabled,
            holder,
            target,
            failed_on,
            rules: place.0,
            memory_mib: place.1,
            held: place.2,
            slow: place.3,
        })
}

/// Data nodes a, b, c and the witness w; a volume and a service on all, one of each on a and b.
fn build(views: &[View], placements: &[Placement], leaves: [u8; 2]) -> World {
    let mut world = World::new(&["a", "b", "c", "w:witness"]);
    world.add_volume("wide", &["a", "b", "c"]);
    world.add_volume("narrow", &["a", "b"]);
    world.add_service("wide", &["wide"], &[]);
    world.add_service("narrow", &["narrow"], &[]);
    world.add_service("free", &[], &[]);
    world.add_service("small", &[], &[]);
    let nodes: Vec<NodeId> = world.state.nodes.keys().copied().collect();
    let chosen = |bits: u8| -> Vec<NodeId> {
        let picked = nodes.iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1);
        picked.map(|(_, node)| *node).collect()
    };
    // Whatever the control log accepts is a state that can be.
    let mut commands = Vec::new();
    let services: Vec<_> = world.state.services.keys().copied().collect();
    let named = |bits: u8| {
        let picked = services.iter().enumerate();
        picked
            .filter(move |(i, _)| bits >> i & 1 == 1)
            .map(|(_, id)| *id)
    };
    for (service, given) in services.iter().copied().zip(placements) {
        let [prefer, only, never, with, apart, after] = given.rules;
        let set = |placement: cluster::Placement| Command::SetPlacement { service, placement };
        // Each rule on its own too: together they are refused more often.
        let one = cluster::Placement {
            memory_mib: given.memory_mib,
            ..cluster::Placement::default()
        };
        let two = cluster::Placement {
            prefer: chosen(prefer),
            only: chosen(only).into_iter().collect(),
            never: chosen(never).into_iter().collect(),
            ..one.clone()
        };
        let three = cluster::Placement {
            with: named(with).collect(),
            apart: named(apart).collect(),
            after: named(after).collect(),
            ..one.clone()
        };
        let all = cluster::Placement {
            with: three.with.clone(),
            apart: three.apart.clone(),
            after: three.after.clone(),
            ..two.clone()
        };
        commands.extend([set(one), set(two), set(three), set(all)]);
        if given.held {
            let reason = Some("by hand".to_owned());
            commands.push(Command::Hold { service, reason });
        }
    }
    for (service, placement) in services.iter().copied().zip(placements) {
        for node in chosen(placement.failed_on) {
            commands.push(Command::Acquire { service, node });
            commands.push(Command::Release {
                service,
                node,
                failure: Some("disk".to_owned()),
                disk: None,
            });
        }
        let target = placement.target.map(|n| nodes[usize::from(n)]);
        commands.push(Command::SetTarget { service, target });
        if let Some(holder) = placement.holder {
            let node = nodes[usize::from(holder)];
            commands.push(Command::Acquire { service, node });
        }
        if !placement.enabled {
            commands.push(Command::EnableService {
                service,
                enabled: false,
            });
        }
    }
    for (volume, leaves) in world.state.volumes.values().zip(leaves) {
        commands.push(Command::Volume {
            volume: volume.id,
            expect: volume.epoch,
            change: relevo_types::cluster::VolumeChange::Leave {
                nodes: chosen(leaves),
            },
        });
    }
    for (node, view) in nodes.iter().zip(views) {
        commands.push(Command::SetStandby {
            node: *node,
            standby: view.standby,
        });
        if view.evicted {
            commands.push(Command::Evict {
                node: *node,
                generation: world.state.nodes[node].lease.generation,
                proof: relevo_types::cluster::Proof::Goodbye,
            });
        }
    }
    for command in commands {
        // Rejected ones change nothing.
        drop(world.state.apply(&command));
    }
    for (node, given) in nodes.iter().zip(views) {
        let volumes: Vec<_> = world.state.volumes.keys().copied().collect();
        let view = world.views.get_mut(node).unwrap();
        view.alive = given.alive;
        view.silent_for = given.silent_ms.map(Duration::from_millis);
        if given.stale_generation {
            view.generation.0 = 0;
        }
        view.condemned_by = chosen(given.condemned_by);
        view.condemned_by.retain(|by| by != node);
        view.heard_by = chosen(given.heard_by);
        view.heard_by.retain(|by| by != node);
        view.leaving = given.leaving;
        view.memory_mib = (given.condemned_by % 4 > 0).then_some(8);
        for (volume, replica) in volumes.into_iter().zip(given.replicas) {
            let replica = match replica % 5 {
                0 => ReplicaView::Certain,
                1 => ReplicaView::Uncertain,
                2 => ReplicaView::Attaching,
                3 => ReplicaView::Failed,
                _ => continue,
            };
            view.replicas.insert(volume, replica);
        }
    }
    for (service, given) in services.iter().zip(placements) {
        let holder = world.state.services[service].holder;
        if let Some(holder) = holder.filter(|_| !given.slow) {
            world
                .views
                .get_mut(&holder)
                .unwrap()
                .running
                .insert(*service);
        }
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_that_was_carried_out_leaves_nothing_to_do(
        views in prop::collection::vec(view(), 4),
        placements in prop::collection::vec(placement(), 4),
        leaves in any::<[u8; 2]>(),
    ) {
        let mut world = build(&views, &placements, leaves);
        let first = plan(&world.input());
        prop_assert_eq!(&first, &plan(&world.input()), "the same input gives the same plan");
        for action in &first.actions {
            prop_assert!(!action.reason.is_empty());
            let applied = world.state.apply(&action.command);
            prop_assert!(applied.is_ok(), "{:?}: {:?}", action, applied);
        }
        let second = plan(&world.input());
        prop_assert!(second.actions.is_empty(), "{:?} after {:?}", second.actions, first.actions);
        // Rule of DESIGN, section 3: only in-sync replicas, never two holders.
        for action in &first.actions {
            if let Command::Acquire { service, node } = &action.command {
                for volume in world.state.services[service].spec.volumes() {
                    prop_assert!(world.state.volumes[&volume].in_sync.contains(node));
                }
                prop_assert!(world.views[node].alive);
                prop_assert!(!world.state.nodes[node].standby);
                let service = &world.state.services[service];
                prop_assert!(service.placement.allows(*node) && service.hold.is_none());
                for other in world.state.apart_from(service.id) {
                    prop_assert!(world.state.services[&other].holder != Some(*node));
                }
                for other in &service.placement.with {
                    prop_assert!(world.state.services[other].holder == Some(*node));
                }
                for other in &service.placement.after {
                    let holder = world.state.services[other].holder.expect("a holder");
                    prop_assert!(world.views[&holder].running.contains(other));
                }
                if let Some(memory) = world.views[node].memory_mib {
                    let needed = service.placement.memory_mib;
                    let used = world.state.memory_used_mib(*node, service.id);
                    prop_assert!(needed == 0 || used + needed <= memory);
                }
            }
        }
        // Everything that should run and does not is explained.
        for service in world.state.services.values() {
            if service.enabled && service.holder.is_none() {
                let explained = second.waits.iter().any(|wait| wait.service == Some(service.id));
                prop_assert!(explained, "{} waits without a word", service.spec.name);
            }
        }
    }
}
