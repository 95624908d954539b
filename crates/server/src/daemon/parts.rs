//! Carries out the orders to parts: one worker per service, so that orders of one service follow
//! each other and those of others don't wait.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use relevo_agents::{PartFailed, PartHealth, PartRunner};
use relevo_node::{Input, OrderId, PartAction, PartOrder};
use relevo_types::{ServiceId, cluster::Part};
use tokio::{runtime::Handle, sync::mpsc};

use super::node_loop::NodeInbox;
use crate::api::PartState;

/// Orders of one service that may wait. The node manager has one order per part under way and
/// a forced stop for each at most; a service with more parts than this is not accepted to run.
const ORDER_QUEUE: usize = 256;

/// How long a look at a part may take: a person waits for the status.
const PROBE_BOUND: Duration = Duration::from_millis(300);

/// The parts of this node's services.
#[derive(Clone)]
pub(crate) struct Parts {
    inner: Arc<Inner>,
}

struct Inner {
    runner: PartRunner,
    inbox: NodeInbox,
    runtime: Handle,
    workers: Mutex<BTreeMap<ServiceId, mpsc::Sender<PartOrder>>>,
    /// What was last ordered of each part, and what came of it.
    known: Mutex<BTreeMap<(ServiceId, usize), Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    part: Part,
    started_by: Option<OrderId>,
    state: PartState,
    detail: Option<String>,
}

impl Parts {
    /// Nothing is active. `failures` is where `runner` reports to.
    pub(crate) fn new(
        runner: PartRunner,
        inbox: NodeInbox,
        failures: mpsc::Receiver<PartFailed>,
        runtime: Handle,
    ) -> Self {
        let inner = Arc::new(Inner {
            runner,
            inbox,
            runtime: runtime.clone(),
            workers: Mutex::default(),
            known: Mutex::default(),
        });
        runtime.spawn(pass_failures_on(Arc::clone(&inner), failures));
        Self { inner }
    }

    /// Takes an order; its answer goes to the node manager. Does not wait.
    pub(crate) fn order(&self, order: PartOrder) {
        let inner = &self.inner;
        let id = order.id;
        let mut workers = lock(&inner.workers);
        let worker = workers.entry(order.service).or_insert_with(|| {
            let (sender, orders) = mpsc::channel(ORDER_QUEUE);
            inner.runtime.spawn(work(Arc::clone(inner), orders));
            sender
        });
        if worker.try_send(order).is_err() {
            // Answered from another task: this is the node manager's own thread.
            let inner = Arc::clone(inner);
            inner.runtime.clone().spawn(async move {
                let result = Err("too many orders wait for this service".to_owned());
                inner.inbox.tell(Input::PartDone { order: id, result });
            });
        }
    }

    /// What each part of a service is doing here, by its place in the list.
    pub(crate) async fn states(
        &self,
        service: ServiceId,
    ) -> BTreeMap<usize, (PartState, Option<String>)> {
        let known: Vec<(usize, Known)> = lock(&self.inner.known)
            .range((service, 0)..=(service, usize::MAX))
            .map(|((_, index), known)| (*index, known.clone()))
            .collect();
        let mut states = BTreeMap::new();
        for (index, known) in known {
            let state = if known.state == PartState::Active {
                let probe = self.inner.runner.probe(service, index, &known.part);
                match tokio::time::timeout(PROBE_BOUND, probe).await {
                    Ok(PartHealth::Active) => (PartState::Active, known.detail),
                    Ok(PartHealth::Inactive) => (PartState::Stopped, known.detail),
                    Ok(PartHealth::Impaired(why)) => (PartState::Starting, Some(why)),
                    Ok(PartHealth::Failed(why)) => (PartState::Failed, Some(why)),
                    Err(_) => (PartState::Unknown, Some("it does not answer".to_owned())),
                }
            } else {
                (known.state, known.detail)
            };
            states.insert(index, state);
        }
        states
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

async fn work(inner: Arc<Inner>, mut orders: mpsc::Receiver<PartOrder>) {
    while let Some(order) = orders.recv().await {
        let result = carry_out(&inner, &order).await;
        inner.inbox.tell(Input::PartDone {
            order: order.id,
            result,
        });
    }
}

async fn carry_out(inner: &Inner, order: &PartOrder) -> Result<(), String> {
    let key = (order.service, order.index);
    let note = |state, detail: Option<String>, started_by| {
        let known = Known {
            part: order.part.clone(),
            started_by,
            state,
            detail,
        };
        lock(&inner.known).insert(key, known);
    };
    tracing::debug!(service = order.name, part = order.part.label(), action = ?order.what, "part");
    match order.what {
        PartAction::Start => {
            note(PartState::Starting, None, Some(order.id));
            let result = inner
                .runner
                .start(order.service, &order.name, order.index, &order.part)
                .await
                .map_err(|e| e.to_string());
            match &result {
                Ok(()) => note(PartState::Active, None, Some(order.id)),
                Err(why) => {
                    let detail = inner.with_last_words(order, why);
                    note(PartState::Failed, Some(detail), None);
                }
            }
            result
        }
        PartAction::Stop { force } => {
            note(PartState::Stopping, None, None);
            let result = inner
                .runner
                .stop(order.service, order.index, &order.part, force)
                .await
                .map_err(|e| e.to_string());
            match &result {
                Ok(()) => {
                    lock(&inner.known).remove(&key);
                }
                Err(why) => note(PartState::Failed, Some(why.clone()), None),
            }
            result
        }
    }
}

impl Inner {
    /// An error of a process is told best by its own last line.
    fn with_last_words(&self, order: &PartOrder, why: &str) -> String {
        match self.runner.last_lines(order.service, order.index, 1).pop() {
            Some(line) => format!("{why}; it last wrote: {line}"),
            None => why.to_owned(),
        }
    }
}

async fn pass_failures_on(inner: Arc<Inner>, mut failures: mpsc::Receiver<PartFailed>) {
    while let Some(failed) = failures.recv().await {
        let order = {
            let mut known = lock(&inner.known);
            known
                .get_mut(&(failed.service, failed.index))
                .and_then(|known| {
                    known.state = PartState::Failed;
                    known.detail = Some(failed.reason.clone());
                    known.started_by
                })
        };
        // A part that was stopped meanwhile has nothing left to fail.
        if let Some(order) = order {
            inner.inbox.tell(Input::PartFailed {
                order,
                reason: failed.reason,
            });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves the map whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
