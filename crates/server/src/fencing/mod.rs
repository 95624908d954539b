//! Fencing on this node: attempts, checks of the devices, and what is recorded of them.
//!
//! [`Fencing::fence`] begins an attempt (or joins the one under way) and gives a [`Progress`] to watch: it has the
//! proof as soon as the node was verifiably off. It works without a majority: what it proves is recorded in the
//! control log when that can be. The verbs (`verbs::fence`) call it for people.

pub(crate) mod attempts;
mod checks;
mod record;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use relevo_control::RaftControl;
use relevo_fence::{Action, Agents, Checks, Reply};
use relevo_types::{
    NodeId, Time, Timing,
    cluster::{
        ClusterState, FenceAction, FenceDevice, FenceFailure, FenceKind, FenceProof, FenceRecord,
        NodeKind,
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};

use self::attempts::Running;
use crate::{
    api::{EventKind, EventLevel},
    daemon::node_loop::NodeInbox,
    events::Events,
};

/// Records that wait for the control log: an attempt has two, so these are many.
const RECORDS_MAX: usize = 32;

/// What fencing works with.
pub(crate) struct FencingContext {
    pub(crate) me: NodeId,
    pub(crate) control: Arc<RaftControl>,
    pub(crate) states: watch::Receiver<Arc<ClusterState>>,
    pub(crate) inbox: NodeInbox,
    pub(crate) events: Arc<Events>,
    pub(crate) timing: Timing,
    pub(crate) runtime: Handle,
}

/// Fencing on this node.
#[derive(Clone)]
pub(crate) struct Fencing {
    inner: Arc<Inner>,
}

struct Inner {
    context: FencingContext,
    agents: Agents,
    attempts: Mutex<BTreeMap<NodeId, Running>>,
    checks: Mutex<Checks>,
    /// A check may be due earlier than was thought.
    hurry: Notify,
    records: mpsc::Sender<FenceRecord>,
    unrecorded: Mutex<Option<mpsc::Receiver<FenceRecord>>>,
}

/// How far an attempt is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Progress {
    /// What it does, in words.
    pub(crate) doing: String,
    /// A person is all that it waits for; it uses no device.
    pub(crate) waits_for_a_person: bool,
    /// What shall become of the node.
    pub(crate) action: FenceAction,
    /// When it began, in milliseconds since 1970.
    pub(crate) begun_unix_ms: u64,
    /// The node was off.
    pub(crate) proof: Option<FenceProof>,
    /// It is over. `Ok` if and only if there is a proof.
    pub(crate) ended: Option<Result<(), Vec<FenceFailure>>>,
    /// What else is to be known.
    pub(crate) remarks: Vec<String>,
}

/// Why an attempt was not begun.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct FenceRefusal {
    pub(crate) reason: String,
    pub(crate) remedy: String,
}

/// Why a person's word had no effect.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum ConfirmFailure {
    /// No attempt to fence the node is under way here.
    NoAttempt,
    /// It is not believed; why and what to do.
    Refused(String),
}

/// What a person says about the fencing of a node, for whoever is at it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum FenceCall {
    /// It is off.
    Confirm {
        /// The node.
        node: NodeId,
        /// Who says so.
        who: String,
        /// On which node.
        on: NodeId,
    },
    /// The attempt shall end.
    GiveUp {
        /// The node.
        node: NodeId,
        /// Who says so.
        who: String,
    },
}

/// What this node tells others of its fencing.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LocalFencing {
    /// The devices that this node may use, with what the last check found; `None`: it was not looked at yet.
    pub(crate) checks: BTreeMap<String, Option<LocalCheck>>,
    /// Attempts under way: what they do, and since when.
    pub(crate) attempts: BTreeMap<NodeId, (String, u64)>,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct LocalCheck {
    pub(crate) trouble: Option<String>,
    pub(crate) since_unix_ms: u64,
    pub(crate) at_unix_ms: u64,
}

impl Fencing {
    pub(crate) fn new(context: FencingContext) -> Self {
        let (records, unrecorded) = mpsc::channel(RECORDS_MAX);
        Self {
            inner: Arc::new(Inner {
                context,
                agents: Agents::default(),
                attempts: Mutex::default(),
                checks: Mutex::default(),
                hurry: Notify::new(),
                records,
                unrecorded: Mutex::new(Some(unrecorded)),
            }),
        }
    }

    /// Begins to check the devices, and to record what comes of attempts.
    pub(crate) fn start(&self, tasks: &mut JoinSet<()>) {
        tasks.spawn(checks::run(Arc::clone(&self.inner)));
        let unrecorded = lock(&self.inner.unrecorded).take();
        if let Some(unrecorded) = unrecorded {
            let control = Arc::clone(&self.inner.context.control);
            tasks.spawn(record::run(control, unrecorded));
        }
    }

    /// Gives up what is under way; agents that run are killed.
    pub(crate) fn stop(&self) {
        // Not under the lock: an attempt that ends takes itself off the list.
        let attempts = std::mem::take(&mut *lock(&self.inner.attempts));
        attempts.into_values().for_each(Running::abort);
    }

    /// Takes what a person says, here or on another node.
    pub(crate) async fn answer(&self, call: FenceCall) -> Result<(), ConfirmFailure> {
        match call {
            FenceCall::Confirm { node, who, on } => self.confirm(node, &who, on).await,
            FenceCall::GiveUp { node, who } => self.give_up(node, &who).await,
        }
    }

    /// The agents of this machine.
    pub(crate) fn agents(&self) -> &Agents {
        &self.inner.agents
    }

    /// What this node tells others.
    pub(crate) fn report(&self) -> LocalFencing {
        let checks = lock(&self.inner.checks);
        let found = checks.found().map(|(name, found)| {
            let check = found.map(|found| LocalCheck {
                trouble: found.trouble.clone(),
                since_unix_ms: found.since_unix_ms,
                at_unix_ms: found.at_unix_ms,
            });
            (name.to_owned(), check)
        });
        let attempts = lock(&self.inner.attempts);
        let attempts = attempts.iter().map(|(node, running)| {
            let progress = running.progress.borrow();
            (*node, (progress.doing.clone(), progress.begun_unix_ms))
        });
        LocalFencing {
            checks: found.collect(),
            attempts: attempts.collect(),
        }
    }

    /// What the devices of a node that this one may use say of its power.
    pub(crate) async fn power(&self, node: NodeId) -> Vec<(FenceDevice, u8, Reply)> {
        let state = self.inner.state();
        let name = state.node_name(node);
        let mut found = Vec::new();
        for (level, devices) in state.fencing.levels(node) {
            for device in devices {
                if device.kind == FenceKind::Person
                    || !may_use(&state, device, self.inner.context.me)
                {
                    continue;
                }
                let target = device.targets.get(&node).cloned().unwrap_or_default();
                let reply = self
                    .inner
                    .agents
                    .call_for(device, &name, &target, Action::Status, action_limit(device))
                    .await;
                found.push((device.clone(), level, reply));
            }
        }
        found
    }

    /// Looks now whether a device would work from this node.
    ///
    /// # Errors
    /// It would not; why and what to do.
    pub(crate) async fn test(&self, device: &FenceDevice) -> Result<(), String> {
        let result = self.inner.look(device).await;
        lock(&self.inner.checks).hurry(relevo_host::clock::now(), &device.name);
        self.inner.hurry.notify_one();
        result
    }
}

impl Inner {
    fn state(&self) -> Arc<ClusterState> {
        self.context.states.borrow().clone()
    }

    /// When a heartbeat of the node arrived last, and who hears it. `None`: this node listens no more.
    async fn heard(&self, node: NodeId) -> Option<(Option<Time>, Vec<NodeId>)> {
        let mut status = self.context.inbox.status().await?;
        let peer = status.membership.peers.remove(&node);
        Some(peer.map_or((None, Vec::new()), |it| (it.arrived_at, it.heard_by)))
    }

    fn event(&self, level: EventLevel, subject: &str, text: &str) {
        self.context
            .events
            .add(level, EventKind::Fence, subject, text);
    }
}

/// Whether a node may use a device.
pub(crate) fn may_use(state: &ClusterState, device: &FenceDevice, node: NodeId) -> bool {
    match &device.from {
        Some(from) => from.contains(&node),
        None => state
            .nodes
            .get(&node)
            .is_some_and(|it| it.spec.kind == NodeKind::Data),
    }
}

fn action_limit(device: &FenceDevice) -> Duration {
    Duration::from_secs(u64::from(device.action_limit_s))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Each use leaves what it guards whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Fencing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fencing").finish_non_exhaustive()
    }
}
