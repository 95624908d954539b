//! What may happen next, and the bounds of it.

use crate::{
    bugs::Bug,
    explore::{Model, Next},
    node::has_primary,
    pack::{Reader, Writer},
    state::{
        Budget, Config, EPOCHS, Log, Member, Message, NOBODY, Role, Stage, State, Wrong, pair,
    },
};

/// The protocol within bounds.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// Data nodes, 2 or 3. A witness and the control log are always there.
    pub nodes: usize,
    /// Blocks, 1 or 2.
    pub blocks: usize,
    /// Writes, at most 3.
    pub writes: u8,
    /// How often what may happen.
    pub budget: Budget,
    /// It begins with the primary alone in the set, the last node lost.
    pub alone: bool,
    /// It begins with a primary that only tends the volume.
    pub tended: bool,
    /// The node whose replica is of protocol A, if any: outside the set, and never promoted.
    pub follower: Option<usize>,
    /// Nodes that may fail.
    pub failing: u8,
    /// Links that may break, as in [`State::links`].
    pub cut: u8,
    /// A bug.
    pub bug: Option<Bug>,
}

/// Something that happens.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "nodes are numbers, the rest has its name")]
pub enum Step {
    /// The oldest message of a link arrives and is acted on.
    Deliver {
        from: usize,
        to: usize,
        message: Message,
    },
    /// An application's write begins.
    Write { at: usize },
    /// A node hears of the next configuration of its log.
    Learn {
        node: usize,
        epoch: u8,
        config: Config,
    },
    /// A link comes up.
    Connect { a: usize, b: usize },
    /// A link breaks.
    Break { a: usize, b: usize },
    /// A process ends; what it wrote stays.
    Crash { node: usize },
    /// Power is lost, and what was not flushed.
    Outage { node: usize },
    /// The primary says by itself what is complete.
    Complete { from: usize, to: usize, id: u8 },
    /// The last node is lost for good: its disk stays as it is.
    Lose { node: usize },
    /// The process is there again.
    Restart { node: usize },
    /// The log commits that nodes leave.
    CommitLeave { nodes: u8 },
    /// The log commits that a node joins.
    CommitJoin { node: usize },
    /// The log commits that the primary steps down.
    CommitDemote,
    /// The log commits that the primary is evicted.
    Evict { node: usize },
    /// The log lets a node back in.
    Readmit { node: usize },
    /// The log commits a primary.
    Promote { node: usize },
    /// The log commits a primary that takes no requests.
    Tend { node: usize },
    /// The lease of a primary runs out.
    LeaseEnds { node: usize },
    /// It is granted again.
    Renew { node: usize },
    /// A planned step-down is asked for.
    StepDown { node: usize },
    /// The primary begins a generation of marks for the follower at a member.
    Generation { from: usize, to: usize },
    /// A promotion waited long enough for members without a link.
    GraceOver { node: usize },
    /// An operator forces a node to be primary, by a log and lineage of its own.
    Force { node: usize },
}

const fn bit(number: usize) -> u8 {
    1 << number
}

impl Model for Protocol {
    type State = State;
    type Step = Step;

    fn initial(&self) -> State {
        let config = Config {
            primary: 0,
            in_sync: self.may_be_members(),
            tends: self.tended,
        };
        let mut s = State {
            left: self.budget,
            ..State::default()
        };
        s.logs[0].epoch = 1;
        s.logs[0].configs[1] = config;
        for node in 0..self.nodes {
            let n = &mut s.nodes[node];
            (n.up, n.lease, n.certain) = (true, true, true);
            (n.seen, n.known) = (1, 1);
            if node == 0 {
                n.role = Role::Primary;
                for peer in 1..self.nodes {
                    let stage = if self.follower == Some(peer) {
                        Stage::Following
                    } else {
                        Stage::InSync
                    };
                    (n.peers[peer].stage, n.peers[peer].began) = (stage, 1);
                }
            } else {
                n.peers[0].reign = 1;
            }
            for other in node + 1..self.nodes {
                s.links |= pair(node, other);
            }
        }
        if self.alone {
            self.leave_alone(&mut s);
        }
        s
    }

    fn next(&self, state: &State, visit: &mut dyn FnMut(Next<Self>)) {
        let mut go = |step: Step, fault: bool, act: &dyn Fn(&mut State)| {
            let mut state = state.clone();
            act(&mut state);
            self.read(&mut state);
            visit(Next { step, state, fault });
        };
        for node in 0..self.nodes {
            self.messages(state, node, &mut go);
            self.of_node(state, node, &mut go);
            self.faults(state, node, &mut go);
        }
        for log in 0..self.lineages() {
            if state.logs[log].epoch != 0 {
                self.of_log(state, log, &mut go);
            }
        }
    }

    fn check(&self, state: &State) -> Result<(), String> {
        self.check_state(state)
    }

    fn is_whole(&self, state: &State) -> bool {
        self.all_is_well(state)
    }

    fn encode<'a>(&self, state: &State, into: &'a mut Writer) -> &'a [u8] {
        into.clear();
        state.clone().pack(into, self);
        into.finish()
    }

    fn decode(&self, bytes: &[u8]) -> State {
        let mut state = State::default();
        state.pack(&mut Reader::new(bytes), self);
        state
    }
}

type Go<'a> = dyn FnMut(Step, bool, &dyn Fn(&mut State)) + 'a;

impl Protocol {
    /// The others left by commit, everyone heard of it, and no link is up.
    fn leave_alone(&self, s: &mut State) {
        s.left.losses = 0;
        s.links = 0;
        s.logs[0].commit(Config {
            primary: 0,
            in_sync: 1,
            tends: false,
        });
        for node in 0..self.nodes {
            let n = &mut s.nodes[node];
            n.known = 2;
            n.peers = Default::default();
        }
        s.nodes[0].seen = 2;
        s.nodes[self.nodes - 1].crash(false);
    }

    /// The nodes that may be in the in-sync set.
    pub(crate) fn may_be_members(&self) -> u8 {
        let everyone = bit(self.nodes) - 1;
        everyone & !self.follower.map_or(0, bit)
    }

    const fn lineages(&self) -> usize {
        if self.budget.forced > 0 { 3 } else { 1 }
    }

    fn messages(&self, s: &State, to: usize, go: &mut Go<'_>) {
        for from in self.others(to) {
            if let Some(message) = s.queues[from][to].first() {
                let step = Step::Deliver {
                    from,
                    to,
                    message: *message,
                };
                go(step, false, &|s| self.receive(s, to, from));
            }
        }
    }

    fn of_node(&self, s: &State, node: usize, go: &mut Go<'_>) {
        let n = &s.nodes[node];
        let log = &s.logs[usize::from(n.lineage)];
        if self.is_lost(s, node) {
            return;
        }
        if !n.up {
            return go(Step::Restart { node }, false, &|s| {
                let n = &mut s.nodes[node];
                n.up = true;
                n.lease = s.logs[usize::from(n.lineage)].evicted & bit(node) == 0;
                self.restart(s, node);
            });
        }
        if n.known < log.epoch {
            let epoch = n.known + 1;
            let config = log.configs[usize::from(epoch)];
            go(
                Step::Learn {
                    node,
                    epoch,
                    config,
                },
                false,
                &|s| self.learn(s, node),
            );
        }
        let block = crate::state::block_of(s.issued + 1, self.blocks);
        if self.takes_requests(s, node) && s.issued < self.writes && self.gate_is_free(n, block) {
            go(Step::Write { at: node }, false, &|s| self.write(s, node));
        }
        if !n.lease && log.evicted & bit(node) == 0 {
            go(Step::Renew { node }, false, &|s| s.nodes[node].lease = true);
        }
        self.complete_positions(s, node, go);
        for to in self.others(node) {
            if self.generation_is_due(s, node, to) {
                let step = Step::Generation { from: node, to };
                go(step, false, &|s| self.begin_generation(s, node, to));
            }
        }
        for other in node + 1..self.nodes {
            if s.nodes[other].up && !s.linked(node, other) && !s.alarm {
                let step = Step::Connect { a: node, b: other };
                go(step, false, &|s| self.meet(s, node, other));
            }
        }
        let absent = self.absent(s, node);
        if absent != 0
            && self.may_go_on(s, node)
            && log.epoch == n.known
            && log.leaves & (1 << absent) == 0
        {
            go(Step::GraceOver { node }, false, &|s| {
                s.logs[usize::from(s.nodes[node].lineage)].leaves |= 1 << absent;
            });
        }
    }

    /// Only where it changes something: else it is as if it had not been sent.
    fn complete_positions(&self, s: &State, node: usize, go: &mut Go<'_>) {
        let n = &s.nodes[node];
        let (epoch, id) = (n.known, n.complete(s.issued + 1));
        for peer in self.others(node).filter(|_| n.role == Role::Primary) {
            let told = |message: &Message| {
                matches!(message, Message::Complete { .. } | Message::Write { .. })
            };
            let p = &s.nodes[peer];
            let news = p.tail & ((1 << id) - 1) != 0 && !s.queues[node][peer].iter().any(told);
            if news && p.peers[node].reign <= epoch && n.peers[peer].stage != Stage::None {
                go(
                    Step::Complete {
                        from: node,
                        to: peer,
                        id,
                    },
                    false,
                    &|s| {
                        Self::send(s, node, peer, Message::Complete { epoch, id });
                    },
                );
            }
        }
    }

    /// Whether a node is down and stays so.
    pub(crate) fn is_lost(&self, s: &State, node: usize) -> bool {
        self.budget.losses > s.left.losses && node + 1 == self.nodes
    }

    /// Members that a promotion could not ask.
    fn absent(&self, s: &State, node: usize) -> u8 {
        let n = &s.nodes[node];
        if n.role != Role::Gathering || self.needs_fresh_epoch(n) || n.demoting {
            return 0;
        }
        let members = self
            .others(node)
            .filter(|peer| s.known(node).in_sync & bit(*peer) != 0);
        members
            .filter(|peer| n.peers[*peer].member == Member::Absent && !s.linked(node, *peer))
            .fold(0, |all, peer| all | bit(peer))
    }

    /// A node that is uncertain goes on without the members only if none of them that is certain
    /// lives: three times the grace are enough to get a link to one that does.
    fn may_go_on(&self, s: &State, node: usize) -> bool {
        s.nodes[node].certain
            || self.others(node).all(|peer| {
                let p = &s.nodes[peer];
                s.known(node).in_sync & bit(peer) == 0 || !(p.up && p.certain)
            })
    }

    fn faults(&self, s: &State, node: usize, go: &mut Go<'_>) {
        let n = &s.nodes[node];
        if !n.up {
            return;
        }
        let fails = self.failing & bit(node) != 0;
        // A leave that is under way may be committed after the fault: as if it had been before.
        let log = &s.logs[usize::from(n.lineage)];
        let leaving = (0..8_u8)
            .filter(|set| log.leaves & (1 << set) != 0)
            .fold(0, |all, set| all | set);
        let in_sync = s.newest(node).in_sync & !leaving;
        let another_knows = self
            .others(node)
            .any(|peer| s.nodes[peer].up && s.nodes[peer].certain && in_sync & bit(peer) != 0);
        let outages_before = self.budget.outages - s.left.outages;
        // What is acknowledged survives all but the loss of the last that has it for certain.
        if fails && s.left.crashes > 0 && (outages_before == 0 || another_knows) {
            go(Step::Crash { node }, true, &|s| {
                s.left.crashes -= 1;
                self.crash(s, node, false);
            });
        }
        if fails && s.left.outages > 0 && another_knows {
            go(Step::Outage { node }, true, &|s| {
                s.left.outages -= 1;
                self.crash(s, node, true);
            });
        }
        if s.left.losses > 0 && node + 1 == self.nodes {
            go(Step::Lose { node }, true, &|s| {
                s.left.losses -= 1;
                self.crash(s, node, false);
            });
        }
        for other in node + 1..self.nodes {
            if s.left.breaks > 0 && s.linked(node, other) && self.cut & pair(node, other) != 0 {
                go(Step::Break { a: node, b: other }, true, &|s| {
                    s.left.breaks -= 1;
                    self.break_link(s, node, other);
                });
            }
        }
        let reigns = matches!(n.role, Role::Primary);
        if fails && s.left.leases > 0 && n.lease && usize::from(s.newest(node).primary) == node {
            go(Step::LeaseEnds { node }, true, &|s| {
                s.left.leases -= 1;
                s.nodes[node].lease = false;
            });
        }
        if s.left.demotes > 0 && reigns && !n.demoting {
            go(Step::StepDown { node }, true, &|s| {
                s.left.demotes -= 1;
                s.nodes[node].demoting = true;
                self.settle(s, node);
            });
        }
        if s.left.forced > 0 && !reigns && n.lineage == 0 {
            go(Step::Force { node }, true, &|s| {
                s.left.forced -= 1;
                self.force(s, node);
            });
        }
    }

    fn of_log(&self, s: &State, number: usize, go: &mut Go<'_>) {
        let log = &s.logs[number];
        let config = log.configs[usize::from(log.epoch)];
        let mine = |node: usize| usize::from(s.nodes[node].lineage) == number;
        for nodes in 0..8_u8 {
            if log.leaves & (1 << nodes) != 0 && config.in_sync & !nodes != 0 {
                let in_sync = config.in_sync & !nodes;
                go(Step::CommitLeave { nodes }, false, &|s| {
                    s.logs[number].commit(Config { in_sync, ..config });
                });
            }
        }
        for node in (0..self.nodes).filter(|node| log.joins & bit(*node) != 0) {
            let in_sync = config.in_sync | bit(node);
            go(Step::CommitJoin { node }, false, &|s| {
                s.logs[number].commit(Config { in_sync, ..config });
            });
        }
        let nobody = Config {
            primary: NOBODY,
            tends: false,
            ..config
        };
        if log.demote {
            go(Step::CommitDemote, false, &|s| {
                s.logs[number].commit(nobody)
            });
        }
        for node in (0..self.nodes).filter(|node| mine(*node)) {
            let n = &s.nodes[node];
            let over = !n.lease || self.has(Bug::LeaseNotWaitedOut);
            if usize::from(config.primary) == node && over && log.evicted & bit(node) == 0 {
                go(Step::Evict { node }, false, &|s| {
                    s.logs[number].evicted |= bit(node);
                    s.logs[number].commit(nobody);
                });
            }
            // It reads the log in order, so it heard that it was evicted before it has a lease again.
            let mut unheard = usize::from(n.known)..=usize::from(log.epoch);
            let told = unheard.all(|epoch| usize::from(log.configs[epoch].primary) != node);
            if n.up && told && log.evicted & bit(node) != 0 {
                go(Step::Readmit { node }, false, &|s| {
                    s.logs[number].evicted &= !bit(node);
                    s.nodes[node].lease = true;
                });
            }
            let fit = n.up && config.in_sync & !log.evicted & bit(node) != 0;
            let named = u8::try_from(node).unwrap_or(NOBODY);
            if s.left.tends > 0 && !has_primary(config.primary) && fit && n.certain {
                go(Step::Tend { node }, false, &|s| {
                    s.left.tends -= 1;
                    s.logs[number].commit(Config {
                        primary: named,
                        tends: true,
                        ..config
                    });
                });
            }
            if (!has_primary(config.primary) || config.tends) && fit {
                // Evicted members can't answer, as a rule, and are not waited for. One that is uncertain
                // must hear them if they can.
                let drops = n.certain || self.has(Bug::UncertainDropsEvicted);
                let in_sync = config.in_sync & !if drops { log.evicted } else { 0 };
                go(Step::Promote { node }, false, &|s| {
                    s.logs[number].commit(Config {
                        primary: named,
                        in_sync,
                        tends: false,
                    });
                });
            }
        }
    }

    fn crash(&self, s: &mut State, node: usize, power: bool) {
        // First what was under way from it and to it, then the node, then what the others do.
        s.nodes[node].crash(power);
        for peer in self.others(node) {
            self.break_link(s, node, peer);
        }
        s.nodes[node].peers = Default::default();
    }

    /// A node that comes up finds the configuration that it knew.
    fn restart(&self, s: &mut State, node: usize) {
        let (known, config) = (s.nodes[node].known, s.known(node));
        if usize::from(config.primary) == node && known >= s.nodes[node].seen {
            s.nodes[node].seen = known;
            if config.in_sync & bit(node) == 0 {
                s.nodes[node].role = Role::Yielding;
            } else {
                self.begin_promotion(s, node);
            }
        }
        self.settle(s, node);
    }

    /// A link comes up, and both sides greet: those of two lineages compare what happened since.
    fn meet(&self, s: &mut State, a: usize, b: usize) {
        if s.nodes[a].lineage != s.nodes[b].lineage {
            let base = |s: &State, node: usize| {
                let lineage = usize::from(s.nodes[node].lineage);
                let at = if lineage == 0 {
                    s.nodes[node].content[0]
                } else {
                    s.forked_at[lineage][0]
                };
                s.position(at)
            };
            let (of_a, of_b) = (base(s, a), base(s, b));
            let changed = |s: &State, node: usize, base: (u8, u8)| {
                base > of_a.min(of_b) || s.nodes[node].lineage != 0 && s.nodes[node].wrote
            };
            let (a_changed, b_changed) = (changed(s, a, of_a), changed(s, b, of_b));
            let taken_for_equal =
                self.has(Bug::EqualEpochEqualData) && s.nodes[a].seen == s.nodes[b].seen;
            let a_adopts = if a_changed == b_changed || taken_for_equal {
                s.nodes[a].lineage < s.nodes[b].lineage
            } else {
                b_changed
            };
            if a_changed && b_changed && !taken_for_equal {
                s.alarm = true;
                return;
            }
            if a_adopts {
                self.adopt(s, a, b);
            } else {
                self.adopt(s, b, a);
            }
        }
        s.links |= pair(a, b);
        self.settle(s, a);
        self.settle(s, b);
    }

    /// A node gives its lineage up for another's, of which it has nothing to tell.
    fn adopt(&self, s: &mut State, node: usize, from: usize) {
        let (old, new) = (usize::from(s.nodes[node].lineage), s.nodes[from].lineage);
        let content = s.nodes[node].content[0];
        let promised = s.promised[old][0] == content && content != 0;
        let at_fork = if new == 0 {
            s.nodes[from].content[0]
        } else {
            s.forked_at[usize::from(new)][0]
        };
        if promised && s.position(content) > s.position(at_fork) {
            s.wrong = Wrong::Merged;
        }
        self.close(s, node);
        self.begin_promotion(s, node);
        let (known, seen) = (s.nodes[from].known, s.nodes[from].seen);
        let n = &mut s.nodes[node];
        n.role = Role::Secondary;
        n.end_reign();
        (n.lineage, n.known, n.seen, n.attached) = (new, known, seen, 0);
        (n.certain, n.wrote, n.demoting, n.lease) = (false, false, false, true);
    }

    fn force(&self, s: &mut State, node: usize) {
        for peer in self.others(node) {
            self.break_link(s, node, peer);
        }
        self.close(s, node);
        let lineage = (1..3)
            .find(|number| s.logs[*number].epoch == 0)
            .unwrap_or(2);
        let n = &mut s.nodes[node];
        n.lineage = u8::try_from(lineage).unwrap_or(2);
        let epoch = n.known.max(n.seen) + 1;
        (n.seen, n.known, n.attached) = (epoch, epoch, 0);
        (n.wrote, n.lease, n.demoting) = (false, true, false);
        s.forked_at[lineage] = n.content;
        let primary = u8::try_from(node).unwrap_or(NOBODY);
        let log = &mut s.logs[lineage];
        log.epoch = epoch - 1;
        log.commit(Config {
            primary,
            in_sync: bit(node),
            tends: false,
        });
        self.begin_promotion(s, node);
        self.settle(s, node);
    }

    /// Whether a node answers an application: one that steps down, or only tends the volume, does not.
    fn takes_requests(&self, s: &State, node: usize) -> bool {
        let n = &s.nodes[node];
        let tends = s.known(node).tends && !self.has(Bug::TenderTakesRequests);
        n.role == Role::Primary && !n.demoting && !tends
    }

    /// Whoever may serve reads shows what it has; it must be what was promised last.
    fn read(&self, s: &mut State) {
        for node in 0..self.nodes {
            let n = s.nodes[node];
            // One that steps down answers no new requests: it said goodbye.
            if !(n.up && n.lease && self.takes_requests(s, node)) {
                continue;
            }
            for block in (0..self.blocks).filter(|block| self.gate_is_free(&n, *block)) {
                let promised = s.promised[usize::from(n.lineage)][block];
                if s.position(n.content[block]) < s.position(promised) {
                    let named = usize::from(s.newest(node).primary) == node;
                    s.wrong = if named { Wrong::Lost } else { Wrong::StaleRead };
                }
                self.promise(s, node, block, n.content[block]);
            }
        }
    }
}

impl Log {
    /// The next configuration: whatever else was proposed expected the old epoch.
    fn commit(&mut self, config: Config) {
        self.epoch += 1;
        assert!(
            usize::from(self.epoch) < EPOCHS,
            "the bounds allow more epochs than fit"
        );
        self.configs[usize::from(self.epoch)] = config;
        (self.joins, self.leaves, self.demote) = (0, 0, false);
    }
}
