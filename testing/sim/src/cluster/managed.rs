//! Layer 2: every node also runs the real node manager (membership, planner, service runners) with
//! parts that are not real. Heartbeats cross the simulated network as datagrams, proposals go through
//! a leader of the log, leases and evictions are the machines' own; `check::holder` watches them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use relevo_node::{
    Effect, Input, Node, NodeConfig, OrderId, PartAction, PartOrder, ProposalId, ProposalResult,
    Report, VolumeOrder,
};
use relevo_replication::{DiskState, EngineStatus, Input as EngineInput, VolumeEvent};
use relevo_types::{
    Epoch, Instance, LeaseGeneration, NodeId, ServiceId, Time,
    cluster::{Command, Part, Proof},
};

use super::{Cluster, Event, Phase, index_of, node_id};
use crate::{
    check::{Verdict, Violation},
    control::VOLUME,
    net::{Index, Plane},
    paths::LAN,
};

/// Datagrams of a stopped process that its socket keeps; the rest is dropped.
const SOCKET_KEEPS: usize = 64;

/// What a manager is told, and when it may be told again.
#[derive(Debug)]
pub(super) enum News {
    /// An input of the manager.
    Input(Box<Input>),
    /// Its deadline.
    Tick,
}

/// The manager of a node and what it drives.
#[derive(Debug)]
pub(super) struct Manager {
    node: Node,
    tick_at: Time,
    /// Inputs of a stopped process.
    inbox: Vec<Input>,
    /// What the manager was told of its engine last.
    told: Option<(bool, DiskState, Epoch, bool, bool)>,
    /// Orders of a service under way, in order.
    orders: BTreeMap<ServiceId, Vec<PartOrder>>,
    /// What it was told about the leader last.
    leader: Option<NodeId>,
}

/// An address that the kernel holds with a lifetime.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    /// The end of its lifetime, in virtual time.
    until: Time,
    /// The running daemon put it up and renews it.
    renewed: bool,
}

/// What the machine keeps over restarts of the daemon, for its manager.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Generations it never grants again.
    pub(super) condemned: Vec<(NodeId, LeaseGeneration)>,
    /// Addresses on its interfaces.
    pub(super) addresses: BTreeMap<(ServiceId, usize), Address>,
    /// Other parts that are active.
    pub(super) active: BTreeMap<(ServiceId, usize), OrderId>,
}

impl Cluster {
    /// Starts a node's manager with its daemon.
    pub(super) fn start_manager(&mut self, node: Index) -> Verdict {
        if !self.scenario.managed {
            return Ok(());
        }
        self.machines[node].awake_since = self.queue.now();
        let now = self.queue.now() + self.machines[node].clock_offset;
        let config = NodeConfig {
            me: node_id(node),
            instance: Instance(self.chance.node.id()),
            timing: self.scenario.sensitivity.timing(),
            condemned: self.machines[node].kept.condemned.clone(),
            memory_mib: None,
            voters_told: 0,
            local_replicas: (node < self.scenario.data_nodes)
                .then_some(VOLUME)
                .into_iter()
                .collect(),
        };
        // The processes of services die with the daemon's keeper; addresses go by their lifetime.
        let kept = &mut self.machines[node].kept;
        kept.active.clear();
        kept.addresses
            .values_mut()
            .for_each(|address| address.renewed = false);
        let manager = Manager {
            node: Node::new(config, now),
            tick_at: Time::NEVER,
            inbox: Vec::new(),
            told: None,
            orders: BTreeMap::new(),
            leader: None,
        };
        if let Some(process) = &mut self.machines[node].process {
            process.manager = Some(manager);
        }
        let state = Arc::clone(&self.machines[node].known.1);
        self.tell(node, Input::State(state));
        self.tell_manager_tick(node)
    }

    fn tell_manager_tick(&mut self, node: Index) -> Verdict {
        let incarnation = self.machines[node].incarnation();
        self.queue.after(
            Duration::from_micros(1),
            Event::Manager {
                node,
                incarnation,
                news: News::Tick,
            },
        );
        Ok(())
    }

    /// Gives a manager an input, in an event of its own.
    pub(super) fn tell(&mut self, node: Index, input: Input) {
        self.tell_after(node, Duration::ZERO, input);
    }

    fn tell_after(&mut self, node: Index, delay: Duration, input: Input) {
        if !self.scenario.managed {
            return;
        }
        let incarnation = self.machines[node].incarnation();
        let news = News::Input(Box::new(input));
        self.queue.after(
            delay,
            Event::Manager {
                node,
                incarnation,
                news,
            },
        );
    }

    /// A manager gets its input now.
    pub(super) fn manager_news(&mut self, node: Index, incarnation: u64, news: News) -> Verdict {
        let now = self.queue.now();
        let machine = &mut self.machines[node];
        if machine.incarnation() != incarnation {
            return Ok(());
        }
        let local = now + machine.clock_offset;
        let offset = machine.clock_offset;
        let paused = machine.paused_until.is_some();
        let Some(manager) = machine.process.as_mut().and_then(|p| p.manager.as_mut()) else {
            return Ok(());
        };
        let input = match news {
            News::Input(input) if paused => {
                let datagram = matches!(*input, Input::Heartbeat { .. });
                if !datagram || manager.inbox.len() < SOCKET_KEEPS {
                    manager.inbox.push(*input);
                }
                return Ok(());
            }
            News::Input(input) => *input,
            News::Tick if paused => return Ok(()),
            News::Tick => {
                manager.tick_at = Time::NEVER;
                Input::Tick
            }
        };
        if self.trace.is_on() && !matches!(input, Input::Heartbeat { .. } | Input::Tick) {
            self.trace
                .node(now, node, || format!("<< {}", short(&input)));
        }
        let mut effects = Vec::new();
        manager.node.handle(local, input, &mut effects);
        let deadline = manager.node.deadline();
        if deadline < manager.tick_at {
            manager.tick_at = deadline;
            let due = Time(deadline.0.saturating_sub(super::effects::nanos(offset)));
            self.queue.at(
                due.max(now + Duration::from_micros(1)),
                Event::Manager {
                    node,
                    incarnation,
                    news: News::Tick,
                },
            );
        }
        for effect in effects {
            self.manager_effect(node, effect)?;
        }
        Ok(())
    }

    /// A stopped manager goes on: what waited arrives now, its timers first.
    pub(super) fn resume_manager(&mut self, node: Index) -> Verdict {
        self.machines[node].awake_since = self.queue.now();
        let incarnation = self.machines[node].incarnation();
        let Some(manager) = self.machines[node]
            .process
            .as_mut()
            .and_then(|p| p.manager.as_mut())
        else {
            return Ok(());
        };
        let inbox = std::mem::take(&mut manager.inbox);
        self.manager_news(node, incarnation, News::Tick)?;
        for input in inbox {
            self.manager_news(node, incarnation, News::Input(Box::new(input)))?;
        }
        Ok(())
    }

    fn manager_effect(&mut self, node: Index, effect: Effect) -> Verdict {
        let now = self.queue.now();
        let quiet = matches!(
            effect,
            Effect::SendHeartbeat { .. } | Effect::LeaseUntil(_) | Effect::Report { .. }
        );
        if self.trace.is_on() && !quiet {
            self.trace.node(now, node, || format!(">> {effect:?}"));
        }
        match effect {
            Effect::SendHeartbeat {
                to,
                path,
                heartbeat,
            } => {
                let to = index_of(to);
                if let Some(delay) = self.heartbeat_delay(node, to, &path)
                    && !(self.scenario.deaf && path != LAN)
                {
                    self.tell_after(to, delay, Input::Heartbeat { path, heartbeat });
                }
                Ok(())
            }
            Effect::PersistCondemned {
                node: condemned,
                generation,
            } => {
                self.check_condemnation(node, index_of(condemned))?;
                self.machines[node]
                    .kept
                    .condemned
                    .push((condemned, generation));
                let delay = self.chance.disk.micros(100, 5000);
                let persisted = Input::CondemnedPersisted {
                    node: condemned,
                    generation,
                };
                self.tell_after(node, delay, persisted);
                Ok(())
            }
            Effect::Report { to, report } => {
                self.send_report(node, index_of(to), report);
                Ok(())
            }
            Effect::Propose { id, command, .. } => {
                self.propose_managed(node, id, command);
                Ok(())
            }
            Effect::Volume { order, .. } => match order {
                VolumeOrder::Config(volume) => self.feed(node, EngineInput::Config(volume)),
                VolumeOrder::Demote => self.feed(node, EngineInput::Demote),
                VolumeOrder::CreateReplica { volume, .. } => {
                    let id = volume.id;
                    self.tell(
                        node,
                        Input::ReplicaCreated {
                            volume: id,
                            result: Ok(()),
                        },
                    );
                    Ok(())
                }
                VolumeOrder::RemoveReplica => Err(Violation::new(
                    "a replica in use is not removed",
                    format!("n{} was told to remove its replica", node + 1),
                )),
            },
            Effect::Part(order) => {
                self.part_ordered(node, order);
                Ok(())
            }
            Effect::LeaseUntil(until) => self.lease_moved(node, until),
            Effect::LeaseLost => {
                let addresses = self.machines[node].kept.addresses.values_mut();
                addresses.for_each(|address| address.until = Time::ZERO);
                Ok(())
            }
            Effect::Event(_) | Effect::ShutdownDone | Effect::VotersSettled(_) => Ok(()),
        }
    }

    fn send_report(&mut self, node: Index, to: Index, report: Report) {
        if self.net.is_open(Plane::Control, node, to) && self.net.is_open(Plane::Control, to, node)
        {
            let delay = self.message_delay();
            self.tell_after(to, delay, Input::Report(report));
        }
    }

    fn lease_moved(&mut self, node: Index, until: Time) -> Verdict {
        let machine = &mut self.machines[node];
        let global = Time(
            until
                .0
                .saturating_sub(super::effects::nanos(machine.clock_offset)),
        );
        machine.lease_until = global;
        for address in machine.kept.addresses.values_mut() {
            if address.renewed {
                address.until = global;
            }
        }
        self.watch_holders()?;
        self.feed(node, EngineInput::LeaseUntil(until))
    }

    fn propose_managed(&mut self, node: Index, id: ProposalId, command: Command) {
        let delay = self.chance.node.micros(200, 8000);
        let incarnation = self.machines[node].incarnation();
        self.queue.after(
            delay,
            Event::CommitManaged {
                by: node,
                incarnation,
                id,
                command: Box::new(command),
            },
        );
    }

    /// A proposal of a manager reaches the leader, if it does.
    pub(super) fn commit_managed(
        &mut self,
        by: Index,
        incarnation: u64,
        id: ProposalId,
        command: &Command,
    ) -> Verdict {
        let arrives = self.leader.is_some_and(|leader| {
            self.reaches_majority(leader)
                && self.net.is_open(Plane::Control, by, leader)
                && self.machines[by].incarnation() == incarnation
        });
        let result = if arrives {
            match self.commit_now(by, command) {
                Ok(outcome) => {
                    self.check_eviction(command)?;
                    ProposalResult::Applied(outcome)
                }
                Err(rejection) => ProposalResult::Rejected(rejection),
            }
        } else {
            ProposalResult::Lost("no leader in reach".to_owned())
        };
        // The answer may be lost although the command was not.
        let result = if self.chance.node.chance(3.0) {
            ProposalResult::Lost("time-out".to_owned())
        } else {
            result
        };
        if self.machines[by].incarnation() == incarnation {
            let delay = self.message_delay();
            self.tell_after(by, delay, Input::ProposalDone { id, result });
        }
        Ok(())
    }

    /// Rule 8: an eviction with the voters' word comes after the node's lease.
    fn check_eviction(&self, command: &Command) -> Verdict {
        let Command::Evict {
            node,
            proof: Proof::Condemned { .. },
            ..
        } = command
        else {
            return Ok(());
        };
        let machine = &self.machines[index_of(*node)];
        if machine.process.is_some() && machine.lease_until > self.queue.now() {
            return Err(Violation::new(
                "a lease ends before its node is evicted (rule 8)",
                format!(
                    "{node} was evicted while its lease holds until {:?}",
                    machine.lease_until
                ),
            ));
        }
        Ok(())
    }

    /// Elects: a leader stays while it reaches a majority; nodes learn of it when they reach it.
    pub(super) fn elect(&mut self) {
        let again = self.chance.node.millis(20, 120);
        self.queue.after(again, Event::Elect);
        self.repair();
        if self
            .leader
            .is_none_or(|leader| !self.reaches_majority(leader))
        {
            let candidates: Vec<Index> = (0..self.scenario.nodes())
                .filter(|node| self.reaches_majority(*node))
                .collect();
            self.leader = (!candidates.is_empty()).then(|| self.chance.node.pick(&candidates));
            let leader = self.leader;
            self.trace
                .all(self.queue.now(), || format!("log: led by {leader:?}"));
        }
        for node in 0..self.scenario.nodes() {
            let known = self.leader.filter(|leader| {
                self.net.is_open(Plane::Control, node, *leader)
                    && self.net.is_open(Plane::Control, *leader, node)
            });
            let known = known.map(node_id);
            let acts = self.machines[node].acts();
            let Some(manager) = self.machines[node]
                .process
                .as_mut()
                .and_then(|p| p.manager.as_mut())
            else {
                continue;
            };
            if acts && manager.leader != known {
                manager.leader = known;
                self.tell(node, Input::Leader(known));
            }
        }
    }

    /// The operator repaired what only a person can: says `service start`, by way of the leader.
    pub(super) fn repair(&mut self) {
        // Who lets replicas be compared looks after the service, too: if its node is lost meanwhile, no other one may be left
        // than such as it failed on before, and those wait for a person (docs/failures.md).
        let looks = self.phase == Phase::Healing || self.rotten.is_some();
        if !self.scenario.managed || !self.person_needed || !looks {
            return;
        }
        let Some(leader) = self.leader.filter(|leader| self.reaches_majority(*leader)) else {
            return;
        };
        // A node that has the data, a disk that works and no failure on record, or none but of that disk,
        // needs nobody: there the managers must bring the service up by themselves. A person is also right to start it before
        // a failed disk elsewhere is replaced. A failure may be recorded late; the operator looks again.
        let able: Vec<NodeId> = self
            .control
            .volume()
            .in_sync
            .iter()
            .copied()
            .filter(|node| {
                let process = self.machines[index_of(*node)].process.as_ref();
                process.is_some_and(|process| !process.disk_failed)
            })
            .collect();
        let given_up: Vec<ServiceId> = self
            .control
            .state()
            .services
            .values()
            .filter(|service| !service.failures.is_empty())
            .filter(|service| {
                let gave_up = |node: &NodeId| {
                    let record = service.failures.get(node);
                    record.is_some_and(|record| record.disk.is_none())
                };
                able.iter().all(gave_up)
            })
            .map(|service| service.id)
            .collect();
        for service in given_up {
            let command = Command::EnableService {
                service,
                enabled: true,
            };
            drop(self.commit_now(leader, &command));
        }
    }

    /// Tells the manager of its engine, when there is something to tell.
    pub(super) fn tell_of_engine(&mut self, node: Index, event: Option<VolumeEvent>) {
        if !self.scenario.managed {
            return;
        }
        let Some(process) = &mut self.machines[node].process else {
            return;
        };
        let (Some(engine), Some(manager)) = (&process.engine, &mut process.manager) else {
            return;
        };
        let status: EngineStatus = engine.status();
        let told = (
            status.open,
            status.disk,
            status.epoch,
            status.certain,
            status.waiting.is_some(),
        );
        if event.is_some() || manager.told != Some(told) {
            manager.told = Some(told);
            self.tell(
                node,
                Input::Volume {
                    volume: VOLUME,
                    event,
                    status,
                },
            );
        }
    }

    fn part_ordered(&mut self, node: Index, order: PartOrder) {
        let service = order.service;
        let Some(manager) = self.machines[node]
            .process
            .as_mut()
            .and_then(|p| p.manager.as_mut())
        else {
            return;
        };
        let queue = manager.orders.entry(service).or_default();
        queue.push(order);
        if queue.len() == 1 {
            self.begin_part(node, service);
        }
    }

    fn begin_part(&mut self, node: Index, service: ServiceId) {
        let incarnation = self.machines[node].incarnation();
        let slow = self.phase == Phase::Trouble && self.chance.node.chance(3.0);
        let delay = self.chance.node.millis(1, if slow { 1500 } else { 30 });
        self.queue.after(
            delay,
            Event::PartDone {
                node,
                incarnation,
                service,
            },
        );
    }

    /// The oldest order of a service is carried out.
    pub(super) fn part_done(
        &mut self,
        node: Index,
        incarnation: u64,
        service: ServiceId,
    ) -> Verdict {
        let now = self.queue.now();
        // In the scene of two histories nothing else happens.
        let troubled = self.phase == Phase::Trouble && !self.scenario.faults.is_empty();
        let fails = troubled && self.chance.node.chance(1.0);
        let machine = &mut self.machines[node];
        if machine.incarnation() != incarnation {
            return Ok(());
        }
        let lease = machine.lease_until;
        let Some(manager) = machine.process.as_mut().and_then(|p| p.manager.as_mut()) else {
            return Ok(());
        };
        let queue = manager.orders.entry(service).or_default();
        if queue.is_empty() {
            return Ok(());
        }
        let order = queue.remove(0);
        let more = !queue.is_empty();
        let key = (service, order.index);
        let result = match (order.what, &order.part) {
            (PartAction::Start, _) if fails => Err("it failed (simulated)".to_owned()),
            (PartAction::Start, Part::Address(_)) => {
                // Without a lease it is not put up; it comes with the next one.
                let address = Address {
                    until: lease,
                    renewed: true,
                };
                machine.kept.addresses.insert(key, address);
                Ok(())
            }
            (PartAction::Start, _) => {
                machine.kept.active.insert(key, order.id);
                Ok(())
            }
            (PartAction::Stop { .. }, _) => {
                machine.kept.addresses.remove(&key);
                machine.kept.active.remove(&key);
                Ok(())
            }
        };
        self.person_needed |= result.is_err();
        if more {
            self.begin_part(node, service);
        }
        self.trace.node(now, node, || {
            format!("part {key:?} {:?}: {result:?}", order.what)
        });
        self.tell(
            node,
            Input::PartDone {
                order: order.id,
                result,
            },
        );
        self.watch_holders()
    }

    /// At most one node answers for an address, at most one has a service's process.
    pub(super) fn watch_holders(&self) -> Verdict {
        let now = self.queue.now();
        let mut holders: BTreeMap<(ServiceId, usize), Index> = BTreeMap::new();
        for (node, machine) in self.machines.iter().enumerate() {
            for (key, address) in &machine.kept.addresses {
                if address.until <= now {
                    continue;
                }
                if let Some(other) = holders.insert(*key, node) {
                    return Err(Violation::new(
                        "one holder of a service (rule 8)",
                        format!("the address {key:?} is on n{} and n{}", other + 1, node + 1),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether the service runs: its address is up somewhere, and every other part is active there.
    pub(super) fn service_runs(&self) -> bool {
        let now = self.queue.now();
        self.control.state().services.values().all(|service| {
            service.holder.is_some_and(|holder| {
                let kept = &self.machines[index_of(holder)].kept;
                service
                    .spec
                    .parts
                    .iter()
                    .enumerate()
                    .all(|(index, part)| match part {
                        Part::Address(_) => kept
                            .addresses
                            .get(&(service.id, index))
                            .is_some_and(|address| address.until > now),
                        _ => kept.active.contains_key(&(service.id, index)),
                    })
            })
        })
    }
}

fn short(input: &Input) -> String {
    match input {
        Input::State(state) => format!("state {}", state.revision),
        Input::Report(report) => format!("report of {}", report.from),
        other => format!("{other:?}"),
    }
}
