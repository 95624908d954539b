//! Where the rest of the daemon leaves what it wants of a volume.
//!
//! The newest wish of each kind is kept, so a mailbox is bounded without ever being full, and
//! nobody who leaves something waits. [`super::volume_worker`] empties it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use relevo_node::VolumeOrder;
use relevo_replication::VolumeEvent;
use relevo_transport::EstablishedLink;
use relevo_types::{
    NodeId, Time,
    cluster::{ReplicaSpec, Volume},
};

/// Events of the engine that may wait. They are changes of state, a few per failure; of more the
/// oldest is dropped.
const EVENTS_MAX: usize = 256;

/// How long closing may take, the end of the data thread included. What is not closed in order
/// is uncertain at the next start, which costs a resync and no data.
const CLOSE_WAIT: Duration = Duration::from_secs(27);

/// What others want of a volume: the newest wish of each kind.
#[derive(Default)]
pub(super) struct Wishes {
    pub(super) create: Option<(ReplicaSpec, Arc<Volume>)>,
    pub(super) config: Option<Arc<Volume>>,
    pub(super) lease: Option<Time>,
    pub(super) links: BTreeMap<NodeId, EstablishedLink>,
    pub(super) demote: bool,
    pub(super) attach: bool,
    pub(super) detach: bool,
    pub(super) remove: bool,
    pub(super) close: bool,
    /// With the moment at which each was told.
    pub(super) events: VecDeque<(Time, VolumeEvent)>,
    /// Links that ended, and why.
    pub(super) lost: BTreeMap<NodeId, String>,
    pub(super) died: Option<String>,
    closed: bool,
}

/// Where others leave what they want of a volume. Nothing here waits but [`Self::wait_closed`].
#[derive(Default)]
pub(crate) struct Mailbox {
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

impl Mailbox {
    /// False: the worker has ended and takes nothing any more.
    pub(crate) fn order(&self, order: VolumeOrder) -> bool {
        let mut wishes = self.lock();
        if wishes.closed {
            return false;
        }
        match order {
            VolumeOrder::Config(volume) => wishes.config = Some(volume),
            VolumeOrder::Demote => wishes.demote = true,
            VolumeOrder::CreateReplica { spec, volume } => wishes.create = Some((spec, volume)),
            VolumeOrder::RemoveReplica => {
                // Whatever was wished before is about the replica that goes.
                *wishes = Wishes {
                    remove: true,
                    close: wishes.close,
                    ..Wishes::default()
                };
            }
        }
        self.changed.notify_all();
        true
    }

    pub(crate) fn lease(&self, until: Time) {
        self.lock().lease = Some(until);
        self.changed.notify_all();
    }

    pub(crate) fn link(&self, link: EstablishedLink) {
        self.lock().links.insert(link.peer, link);
        self.changed.notify_all();
    }

    /// Open the replica again, or close it until then. The last word counts.
    pub(crate) fn attach(&self, attach: bool) {
        let mut wishes = self.lock();
        wishes.attach = attach;
        wishes.detach = !attach;
        self.changed.notify_all();
    }

    pub(crate) fn close(&self) {
        self.lock().close = true;
        self.changed.notify_all();
    }

    /// Waits until the replica is closed and the worker ended; false when a disk that hangs does
    /// not let it.
    pub(crate) fn wait_closed(&self) -> bool {
        let wishes = self.lock();
        let (wishes, _) = self
            .changed
            .wait_timeout_while(wishes, CLOSE_WAIT, |wishes| !wishes.closed)
            .unwrap_or_else(PoisonError::into_inner);
        wishes.closed
    }

    pub(super) fn event(&self, event: VolumeEvent) {
        let mut wishes = self.lock();
        if wishes.events.len() == EVENTS_MAX {
            wishes.events.pop_front();
        }
        wishes.events.push_back((relevo_host::clock::now(), event));
        self.changed.notify_all();
    }

    /// A link ended. Told with the event that says so of the state.
    pub(super) fn link_lost(&self, peer: NodeId, reason: String) {
        self.lock().lost.insert(peer, reason);
    }

    pub(super) fn died(&self, reason: String) {
        self.lock().died = Some(reason);
        self.changed.notify_all();
    }

    /// Takes everything; waits for `patience` when there is nothing.
    pub(super) fn take(&self, patience: Duration) -> Wishes {
        let wishes = self.lock();
        let (mut wishes, _) = self
            .changed
            .wait_timeout_while(wishes, patience, |wishes| wishes.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut wishes)
    }

    /// The worker ends, unless the replica is wanted again already.
    pub(super) fn set_closed(&self) -> bool {
        let mut wishes = self.lock();
        if wishes.create.is_some() && !wishes.close {
            return false;
        }
        wishes.closed = true;
        self.changed.notify_all();
        true
    }

    fn lock(&self) -> MutexGuard<'_, Wishes> {
        // Only whole values are put in and taken out.
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wishes {
    pub(super) fn is_empty(&self) -> bool {
        self.lease.is_none()
            && self.create.is_none()
            && !self.remove
            && !self.close
            && !self.attach
            && !self.detach
            && self.died.is_none()
            && !self.calls_for_attention()
    }

    /// Whether the engine's status is likely to change now. A lease comes many times a second and
    /// changes nothing to look at.
    pub(super) fn calls_for_attention(&self) -> bool {
        self.config.is_some() || !self.links.is_empty() || self.demote || !self.events.is_empty()
    }
}
