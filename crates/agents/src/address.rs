//! The address keeper: holds this node's virtual addresses, and only while the node's lease lasts.
//!
//! One thread with its own small runtime, so that nothing else on the node can hold it up. Several
//! times a second it renews the lifetime that the kernel gives the addresses ([`LIFETIME`]). When
//! the lease ends it removes them at once; when this process is killed or hangs, the kernel does.

use std::{collections::BTreeMap, fmt, net::IpAddr, thread, time::Duration};

use relevo_host::{
    address::{self, LIFETIME, VirtualAddress},
    announce::BURSTS,
    clock,
    netlink::Netlink,
};
use relevo_types::{ServiceId, Time, cluster::AddressPart};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{AgentError, PartFailed, PartHealth, Result};

/// How often the lifetime is renewed: four times within it, so that three renewals may be late.
const RENEW_INTERVAL: Duration = Duration::from_millis(250);

/// A lifetime is renewed only while the lease lasts at least this long: a node whose lease is not
/// renewed any more and that hangs just then keeps its addresses for less time after the lease. Well
/// below what is left of a healthy lease even at `fast` (360 ms, renewed every 50 ms).
const RENEW_MARGIN: Duration = Duration::from_millis(200);

/// How long a start waits for the lease. A node without one is being cut off.
const LEASE_PATIENCE: Duration = Duration::from_secs(1);

/// Renewals in a row that may fail before the part is reported as failed: the kernel has dropped
/// the address by then.
const MAX_FAILURES: u32 = 6;

/// Without a lease there is nothing to do until it comes back, which wakes the thread.
const WITHOUT_LEASE: Duration = Duration::from_secs(3600);

/// Requests that may wait; the thread serves each within milliseconds.
const REQUEST_QUEUE: usize = 64;

/// The keeper's handle. Clones drive the same keeper; when the last is dropped the addresses are
/// removed and the thread ends.
#[derive(Clone)]
pub struct AddressKeeper {
    requests: mpsc::Sender<Request>,
    lease: watch::Sender<Time>,
}

enum Request {
    Take {
        owner: (ServiceId, usize),
        part: AddressPart,
        done: oneshot::Sender<Result<()>>,
    },
    GiveUp {
        address: IpAddr,
        done: oneshot::Sender<Result<()>>,
    },
    Probe {
        address: IpAddr,
        done: oneshot::Sender<PartHealth>,
    },
}

impl fmt::Debug for AddressKeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressKeeper")
            .field("lease", &*self.lease.borrow())
            .finish_non_exhaustive()
    }
}

impl AddressKeeper {
    /// Starts the keeper's thread, in the network namespace of the calling thread, without a lease.
    /// An address that can't be kept is reported to `failures`.
    ///
    /// # Errors
    /// No thread or no netlink socket is left.
    pub fn start(failures: mpsc::Sender<PartFailed>) -> Result<Self> {
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        let (lease, leases) = watch::channel(Time::ZERO);
        let (opened, result) = std::sync::mpsc::sync_channel(1);
        let what = "cannot start the address keeper";
        let next = "raise the limits of processes and open files";
        thread::Builder::new()
            .name("relevo-address".to_owned())
            .spawn(move || run(queue, leases, failures, &opened))
            .map_err(|error| AgentError::io(what, error, next))?;
        result
            .recv()
            .map_err(|_| AgentError::new(what, "its thread ended", next))??;
        Ok(Self { requests, lease })
    }

    /// Until when this node's lease holds, whenever that changes. An earlier moment than before
    /// shortens it; once it has passed, the addresses are removed; a later one puts them back.
    pub fn lease_until(&self, until: Time) {
        // A mere extension, ten a second, wakes nobody: the thread looks when it next acts, and
        // that is before the lease it knows is over.
        self.lease.send_if_modified(|known| {
            let extended = *known > clock::now() && until >= *known;
            *known = until;
            !extended
        });
    }

    /// Takes the address of a service's part: puts it on its interface, tells the neighbours and
    /// keeps it. An address that is kept already is announced again.
    ///
    /// # Errors
    /// No interface fits, somebody else configured it here, there is no lease, or the kernel
    /// refused.
    pub async fn take(&self, service: ServiceId, index: usize, part: &AddressPart) -> Result<()> {
        let mut leases = self.lease.subscribe();
        let valid = leases.wait_for(|until| *until > clock::now());
        if tokio::time::timeout(LEASE_PATIENCE, valid).await.is_err() {
            return Err(AgentError::new(
                format!("cannot take the address {}", part.address),
                "this node has no lease: it can't reach a majority of the voters",
                "check the network between the nodes",
            ));
        }
        self.ask(|done| Request::Take {
            owner: (service, index),
            part: part.clone(),
            done,
        })
        .await?
    }

    /// Removes the address. One that is not kept is fine.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn give_up(&self, part: &AddressPart) -> Result<()> {
        let address = part.address;
        self.ask(|done| Request::GiveUp { address, done }).await?
    }

    /// Whether the address is kept and on its interface.
    pub async fn probe(&self, part: &AddressPart) -> PartHealth {
        let address = part.address;
        match self.ask(|done| Request::Probe { address, done }).await {
            Ok(health) => health,
            Err(error) => PartHealth::Failed(error.to_string()),
        }
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        let gone = || {
            AgentError::new(
                "cannot change the addresses",
                "the address keeper has ended",
                "restart the daemon",
            )
        };
        let (done, answer) = oneshot::channel();
        self.requests
            .send(request(done))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

/// The keeper's thread.
fn run(
    queue: mpsc::Receiver<Request>,
    leases: watch::Receiver<Time>,
    failures: mpsc::Sender<PartFailed>,
    opened: &std::sync::mpsc::SyncSender<Result<()>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = AgentError::io("cannot start a runtime", error, "raise the limits");
            drop(opened.send(Err(error)));
            return;
        }
    };
    runtime.block_on(async {
        match Netlink::open() {
            Ok(netlink) => {
                drop(opened.send(Ok(())));
                let keeper = Keeper {
                    netlink,
                    held: BTreeMap::new(),
                    failures,
                };
                keeper.serve(queue, leases).await;
            }
            Err(error) => drop(opened.send(Err(error))),
        }
    });
}

struct Keeper {
    netlink: Netlink,
    held: BTreeMap<IpAddr, Held>,
    failures: mpsc::Sender<PartFailed>,
}

struct Held {
    owner: (ServiceId, usize),
    place: VirtualAddress,
    /// It is on the interface, as far as we know.
    present: bool,
    /// When to announce it next, soonest first.
    bursts: Vec<Time>,
    failed_renewals: u32,
}

impl Keeper {
    async fn serve(
        mut self,
        mut queue: mpsc::Receiver<Request>,
        mut leases: watch::Receiver<Time>,
    ) {
        let mut next_renewal = clock::now();
        loop {
            let lease = *leases.borrow_and_update();
            let now = clock::now();
            if lease <= now {
                self.drop_all("the node's lease has ended").await;
            } else if next_renewal <= now {
                next_renewal = now + RENEW_INTERVAL;
                if lease.since(now) >= RENEW_MARGIN {
                    self.renew().await;
                }
            }
            self.announce(clock::now());

            let mut wake = if lease > now {
                next_renewal.min(lease)
            } else {
                now + WITHOUT_LEASE
            };
            for held in self.held.values().filter(|held| held.present) {
                wake = held.bursts.first().map_or(wake, |burst| wake.min(*burst));
            }
            let idle = self.held.is_empty();
            tokio::select! {
                // Nothing to keep: sleep until somebody asks, for an idle node costs nothing.
                () = tokio::time::sleep(wake.since(clock::now())), if !idle => {}
                changed = leases.changed() => {
                    if changed.is_err() {
                        break;
                    }
                }
                request = queue.recv() => match request {
                    Some(request) => self.handle(request).await,
                    None => break,
                },
            }
        }
        self.drop_all("the daemon ends").await;
    }

    async fn handle(&mut self, request: Request) {
        // Who asked may have gone; what was asked is done all the same.
        match request {
            Request::Take { owner, part, done } => drop(done.send(self.take(owner, &part).await)),
            Request::GiveUp { address, done } => drop(done.send(self.give_up(address).await)),
            Request::Probe { address, done } => drop(done.send(self.probe(address).await)),
        }
    }

    async fn take(&mut self, owner: (ServiceId, usize), part: &AddressPart) -> Result<()> {
        if let Some(held) = self.held.get_mut(&part.address) {
            if held.owner != owner {
                return Err(AgentError::new(
                    format!("cannot take the address {}", part.address),
                    format!("service {} has it already", held.owner.0),
                    "give the two services different addresses",
                ));
            }
            held.place.put(&self.netlink).await?;
            held.present = true;
            held.bursts = bursts(clock::now());
            return Ok(());
        }
        let found = address::find(
            &self.netlink,
            part.address,
            part.prefix,
            part.interface.as_deref(),
        );
        let place = found.await?;
        let foreign = self
            .netlink
            .addresses()
            .await?
            .into_iter()
            .any(|other| other.address == part.address && other.valid.is_none());
        if foreign {
            return Err(AgentError::new(
                format!("cannot take the address {}", part.address),
                "it is configured on this node for good, not by this cluster",
                "remove it from the system's network configuration on every node",
            ));
        }
        place.put(&self.netlink).await?;
        tracing::info!(
            "took the address {} on {} (for {LIFETIME:?} at a time)",
            place.address,
            place.interface
        );
        let held = Held {
            owner,
            place,
            present: true,
            bursts: bursts(clock::now()),
            failed_renewals: 0,
        };
        self.held.insert(part.address, held);
        self.announce(clock::now());
        Ok(())
    }

    async fn give_up(&mut self, address: IpAddr) -> Result<()> {
        let Some(held) = self.held.get(&address) else {
            return Ok(());
        };
        held.place.remove(&self.netlink).await?;
        tracing::info!("gave up the address {address}");
        self.held.remove(&address);
        Ok(())
    }

    async fn probe(&self, address: IpAddr) -> PartHealth {
        let Some(held) = self.held.get(&address) else {
            return PartHealth::Inactive;
        };
        match held.place.is_present(&self.netlink).await {
            Ok(true) => PartHealth::Active,
            Ok(false) => PartHealth::Impaired(format!(
                "{address} is not on {} at the moment",
                held.place.interface
            )),
            Err(error) => PartHealth::Failed(error.to_string()),
        }
    }

    /// Renews every address, and puts back what something else removed.
    async fn renew(&mut self) {
        for held in self.held.values_mut() {
            let vanished = match held.place.is_present(&self.netlink).await {
                Ok(there) => !there,
                Err(_) => false,
            };
            match held.place.put(&self.netlink).await {
                Ok(()) => {
                    held.failed_renewals = 0;
                    if vanished {
                        if held.present {
                            tracing::warn!(
                                "something removed the address {} from {}; it was put back",
                                held.place.address,
                                held.place.interface
                            );
                        }
                        held.bursts = bursts(clock::now());
                    }
                    held.present = true;
                }
                Err(error) => {
                    held.failed_renewals += 1;
                    tracing::warn!("{error}");
                    if held.failed_renewals == MAX_FAILURES {
                        held.present = false;
                        let report = PartFailed {
                            service: held.owner.0,
                            index: held.owner.1,
                            reason: error.to_string(),
                        };
                        // A full queue means the manager has much worse to do; the next
                        // failure in a row tries again.
                        if self.failures.try_send(report).is_err() {
                            held.failed_renewals = 0;
                        }
                    }
                }
            }
        }
    }

    /// Sends the announcements that are due.
    fn announce(&mut self, now: Time) {
        for held in self.held.values_mut().filter(|held| held.present) {
            let due = held
                .bursts
                .iter()
                .take_while(|burst| **burst <= now)
                .count();
            if due == 0 {
                continue;
            }
            held.bursts.drain(..due);
            if let Some(announcement) = held.place.announcement()
                && let Err(error) = announcement.send()
            {
                tracing::warn!("{error}");
            }
        }
    }

    async fn drop_all(&mut self, why: &str) {
        for held in self.held.values_mut().filter(|held| held.present) {
            match held.place.remove(&self.netlink).await {
                Ok(_) => tracing::warn!("removed the address {}: {why}", held.place.address),
                // Not tried again: the kernel removes it within its lifetime.
                Err(error) => tracing::error!("{error}"),
            }
            held.present = false;
            held.bursts.clear();
        }
    }
}

fn bursts(now: Time) -> Vec<Time> {
    BURSTS.iter().map(|after| now + *after).collect()
}
