//! Looks at the devices that this node may use, again and again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use relevo_fence::{
    Change,
    check::{Ticket, look},
};
use relevo_host::clock;
use relevo_types::{
    NodeId,
    cluster::{ClusterState, FenceDevice, FenceKind, Fencing},
};
use tokio::task::JoinSet;

use super::{Inner, lock, may_use};
use crate::{api::EventLevel, events::unix_ms};

/// Checks at the same time: agents are programs of some 30 MB each.
const PARALLEL: usize = 2;

/// While devices fence a node nothing is checked, and this often it is looked whether that is over.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

/// With nothing due it is looked again after this.
const IDLE: Duration = Duration::from_secs(3600);

pub(super) async fn run(inner: Arc<Inner>) {
    let mut states = inner.context.states.clone();
    let mut known = None;
    let mut running: JoinSet<(Ticket, Result<(), String>)> = JoinSet::new();
    loop {
        let state = states.borrow_and_update().clone();
        configure(&inner, &state, &mut known);
        // A device has few sessions: none is taken from an attempt.
        let at_rest = lock(&inner.attempts)
            .values()
            .all(|running| running.progress.borrow().waits_for_a_person);
        while at_rest && running.len() < PARALLEL {
            let due = lock(&inner.checks).due(clock::now());
            let Some((ticket, device)) = due else {
                break;
            };
            let inner = Arc::clone(&inner);
            running.spawn(async move { (ticket, inner.look(&device).await) });
        }
        let wake = lock(&inner.checks).wake();
        let pause = match wake {
            Some(_) if !at_rest => ATTEMPT_PAUSE,
            Some(at) if running.len() < PARALLEL => at.since(clock::now()).min(IDLE),
            Some(_) | None => IDLE,
        };
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            () = inner.hurry.notified() => {}
            () = tokio::time::sleep(pause) => {}
            Some(done) = running.join_next(), if !running.is_empty() => {
                if let Ok((ticket, result)) = done {
                    tell(&inner, ticket, result);
                }
            }
        }
    }
}

/// Takes the devices of a new state over, if they or the nodes changed.
fn configure(inner: &Inner, state: &ClusterState, known: &mut Option<(Fencing, Vec<NodeId>)>) {
    let devices = Fencing {
        history: Vec::new(),
        devices: state.fencing.devices.clone(),
    };
    let nodes: Vec<NodeId> = state.nodes.keys().copied().collect();
    let now = Some((devices, nodes));
    if *known == now {
        return;
    }
    let me = inner.context.me;
    let mine = state
        .fencing
        .devices
        .values()
        .filter(|device| device.kind != FenceKind::Person && may_use(state, device, me))
        // One that switches off this node alone is for the others.
        .filter(|device| device.targets.keys().any(|node| *node != me))
        .map(|device| {
            let before = |node: &&NodeId| **node < me && may_use(state, device, **node);
            (device, state.nodes.keys().filter(before).count())
        });
    lock(&inner.checks).configure(clock::now(), mine);
    *known = now;
}

fn tell(inner: &Inner, ticket: Ticket, result: Result<(), String>) {
    let change = lock(&inner.checks).done(clock::now(), unix_ms(), ticket, result);
    match change {
        Some((device, Change::Broke(why))) => {
            let text = format!("would not work from this node: {why}");
            inner.event(EventLevel::Alarm, &device, &text);
        }
        Some((device, Change::Repaired)) => {
            inner.event(EventLevel::Info, &device, "would work again from this node");
        }
        None => {}
    }
}

impl Inner {
    /// Looks whether a device would work from this node.
    pub(super) async fn look(&self, device: &FenceDevice) -> Result<(), String> {
        let state = self.state();
        let nodes: BTreeMap<NodeId, String> = device
            .targets
            .keys()
            .filter(|node| **node != self.context.me)
            .map(|node| (*node, state.node_name(*node)))
            .collect();
        // A node that dies while its device is asked is no wrong plug: it must be heard before and after.
        let before = self.on_for_certain(&nodes).await;
        let off = look(&self.agents, device, &nodes).await?;
        let after = self.on_for_certain(&nodes).await;
        let wrong = off.intersection(&before).find(|node| after.contains(node));
        match wrong.and_then(|node| nodes.get(node)) {
            Some(name) => Err(format!(
                "it says that {name} is off, and {name} is heard: the plug is not that node's, or the device does not tell the truth; check --node {name}=PLUG"
            )),
            None => Ok(()),
        }
    }

    /// Those nodes whose heartbeats arrive.
    async fn on_for_certain(&self, nodes: &BTreeMap<NodeId, String>) -> BTreeSet<NodeId> {
        let Some(status) = self.context.inbox.status().await else {
            return BTreeSet::new();
        };
        let heard = |node: &&NodeId| {
            let peer = status.membership.peers.get(node);
            peer.and_then(|peer| peer.arrived_at)
                .is_some_and(|at| at + self.context.timing.suspect > clock::now())
        };
        nodes.keys().filter(heard).copied().collect()
    }
}
