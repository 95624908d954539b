//! Carries out what the node manager wants. Called on the node manager's thread, so every method
//! only hands the work on.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use relevo_agents::AddressKeeper;
use relevo_control::{ControlLog as _, ProposeError, RaftControl, facts::Facts};
use relevo_node::{
    Input, Level, NodeEvent, PartOrder, ProposalId, ProposalResult, Report, Subject, VolumeOrder,
};
use relevo_transport::RpcClient;
use relevo_types::{LeaseGeneration, NodeId, Time, Timing, VolumeId, cluster::Command};
use tokio::{runtime::Handle, sync::watch};

use super::{
    node_loop::{Hands, NodeInbox},
    parts::Parts,
    volumes::Volumes,
};
use crate::{
    api::{EventKind, EventLevel},
    events::Events,
    rpc::send_report,
};

/// Condemnations that may wait for the disk: one a node and generation, so seven are many.
const CONDEMN_QUEUE: usize = 64;

/// What the hands work with.
pub(crate) struct HandsContext {
    pub(crate) facts: Facts,
    pub(crate) control: Arc<RaftControl>,
    pub(crate) rpc: Arc<RpcClient>,
    pub(crate) inbox: NodeInbox,
    pub(crate) volumes: Volumes,
    pub(crate) parts: Parts,
    pub(crate) keeper: AddressKeeper,
    pub(crate) events: Arc<Events>,
    pub(crate) timing: Timing,
    pub(crate) runtime: Handle,
    /// For the control log: which change of who votes is settled.
    pub(crate) settled: watch::Sender<u64>,
}

/// The hands.
pub(crate) struct DaemonHands {
    condemn: SyncSender<(NodeId, LeaseGeneration)>,
    reports: BTreeMap<NodeId, watch::Sender<Option<Report>>>,
    control: Arc<RaftControl>,
    rpc: Arc<RpcClient>,
    inbox: NodeInbox,
    volumes: Volumes,
    parts: Parts,
    keeper: AddressKeeper,
    events: Arc<Events>,
    /// A report that takes longer is outdated.
    report_bound: Duration,
    runtime: Handle,
    shutdown_done: watch::Sender<bool>,
    settled: watch::Sender<u64>,
}

impl DaemonHands {
    /// The hands, and what tells when the node manager has nothing left to do.
    pub(crate) fn new(context: HandsContext) -> std::io::Result<(Self, watch::Receiver<bool>)> {
        let condemn = start_condemner(context.facts, context.inbox.clone())?;
        let (shutdown_done, done) = watch::channel(false);
        let hands = Self {
            condemn,
            reports: BTreeMap::new(),
            control: context.control,
            rpc: context.rpc,
            inbox: context.inbox,
            volumes: context.volumes,
            parts: context.parts,
            keeper: context.keeper,
            events: context.events,
            report_bound: context.timing.dead,
            runtime: context.runtime,
            shutdown_done,
            settled: context.settled,
        };
        Ok((hands, done))
    }
}

impl Hands for DaemonHands {
    fn persist_condemned(&mut self, node: NodeId, generation: LeaseGeneration) {
        if self.condemn.try_send((node, generation)).is_err() {
            // The disk hangs. Without the promise this node's vote does not count.
            tracing::error!(%node, %generation, "a promise was not written: the disk hangs");
        }
    }

    fn voters_settled(&mut self, voters: u64) {
        self.settled.send_replace(voters);
    }

    fn report(&mut self, to: NodeId, report: Report) {
        let latest = self.reports.entry(to).or_insert_with(|| {
            let (sender, latest) = watch::channel(None);
            let rpc = Arc::clone(&self.rpc);
            self.runtime
                .spawn(deliver_reports(rpc, to, latest, self.report_bound));
            sender
        });
        latest.send_replace(Some(report));
    }

    fn propose(&mut self, id: ProposalId, command: Command, reason: String) {
        tracing::debug!(?command, reason, "propose");
        let control = Arc::clone(&self.control);
        let inbox = self.inbox.clone();
        self.runtime.spawn(async move {
            let result = match control.propose(command).await {
                Ok(outcome) => ProposalResult::Applied(outcome),
                Err(ProposeError::Rejected(rejection)) => ProposalResult::Rejected(rejection),
                Err(other) => ProposalResult::Lost(other.to_string()),
            };
            inbox.tell(Input::ProposalDone { id, result });
        });
    }

    fn volume(&mut self, volume: VolumeId, order: VolumeOrder) {
        self.volumes.order(volume, order);
    }

    fn part(&mut self, order: PartOrder) {
        self.parts.order(order);
    }

    fn lease_until(&mut self, until: Time) {
        self.keeper.lease_until(until);
        self.volumes.lease_until(until);
    }

    fn lease_lost(&mut self) {
        self.keeper.lease_until(Time::ZERO);
    }

    fn event(&mut self, event: NodeEvent) {
        let state = self.control.state();
        let state = state.borrow();
        let (kind, subject) = match event.subject {
            Subject::Cluster => (EventKind::Cluster, String::new()),
            Subject::Node(node) => (EventKind::Node, state.node_name(node)),
            Subject::Volume(id) => (
                EventKind::Volume,
                state
                    .volumes
                    .get(&id)
                    .map_or_else(|| id.to_string(), |volume| volume.name.clone()),
            ),
            Subject::Service(id) => (
                EventKind::Service,
                state
                    .services
                    .get(&id)
                    .map_or_else(|| id.to_string(), |service| service.spec.name.clone()),
            ),
        };
        let level = match event.level {
            Level::Info => EventLevel::Info,
            Level::Warning => EventLevel::Warning,
            Level::Alarm => EventLevel::Alarm,
        };
        let text = if event.why.is_empty() {
            event.what
        } else {
            format!("{}: {}", event.what, event.why)
        };
        self.events.add(level, kind, &subject, &text);
    }

    fn shutdown_done(&mut self) {
        self.shutdown_done.send_replace(true);
    }
}

/// Writes promises to stable storage on a thread of its own: a slow disk must not hold up the
/// heartbeats, and a takeover waits for this.
fn start_condemner(
    mut facts: Facts,
    inbox: NodeInbox,
) -> std::io::Result<SyncSender<(NodeId, LeaseGeneration)>> {
    let (sender, condemned) = sync_channel(CONDEMN_QUEUE);
    thread::Builder::new()
        .name("relevo-condemn".to_owned())
        .spawn(move || {
            for (node, generation) in condemned {
                match facts.condemn(node, generation) {
                    Ok(()) => inbox.tell(Input::CondemnedPersisted { node, generation }),
                    Err(error) => tracing::error!(
                        %error, %node, %generation,
                        "a promise could not be written: this node's vote does not count in taking over from that node"
                    ),
                }
            }
        })?;
    Ok(sender)
}

async fn deliver_reports(
    rpc: Arc<RpcClient>,
    to: NodeId,
    mut latest: watch::Receiver<Option<Report>>,
    bound: Duration,
) {
    while latest.changed().await.is_ok() {
        let report = latest.borrow_and_update().clone();
        if let Some(report) = report {
            send_report(&rpc, to, &report, bound).await;
        }
    }
}
