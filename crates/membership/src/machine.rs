//! The machine: inputs to effects.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{Instance, LeaseGeneration, NodeId, Time, Timing};
use serde::{Deserialize, Serialize};

use crate::{
    Effect, Heartbeat, Input, Liveness, MemberConfig, PathEcho, PathStatus, PeerEcho, Voters,
    lease::OwnLease, path::Path, peer::Peer,
};

/// The membership machine of one node.
#[derive(Debug)]
pub struct Membership {
    me: NodeId,
    instance: Instance,
    timing: Timing,
    /// This node as the control log has it; `None` before the first [`Input::Members`] and after
    /// its removal.
    own: Option<MemberConfig>,
    peers: BTreeMap<NodeId, Peer>,
    /// The highest generation of each node that is condemned on stable storage.
    condemned: BTreeMap<NodeId, LeaseGeneration>,
    lease: OwnLease,
    /// Which change of who votes is known here, and since when it was told.
    voters: Voters,
    voters_told_since: Time,
    /// What [`Effect::VotersSettled`] told last.
    settled: u64,
    /// When the next round of heartbeats is due.
    next_round: Time,
    /// What [`Effect::Condemned`] told last.
    told_condemned: BTreeMap<NodeId, (LeaseGeneration, Vec<NodeId>)>,
    /// What [`Effect::HeardBy`] told last.
    told_heard_by: BTreeMap<NodeId, Vec<NodeId>>,
}

/// What `status` shows of membership.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The generation under which this node asks for its lease.
    pub generation: LeaseGeneration,
    /// How long this node's lease holds.
    pub lease_until: Time,
    /// The other members.
    pub peers: BTreeMap<NodeId, PeerStatus>,
}

/// What `status` shows of a member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// What it is to this node.
    pub liveness: Liveness,
    /// Since when.
    pub since: Time,
    /// Why.
    pub reason: String,
    /// When it was heard last; `None`: not since this process started.
    pub heard_at: Option<Time>,
    /// When a heartbeat of it arrived last, also one that says that it does not hear this node: then it is on.
    pub arrived_at: Option<Time>,
    /// Its newest heartbeat says that it hears this node.
    pub hears_us: bool,
    /// Its paths.
    pub paths: Vec<PathStatus>,
    /// The voters that condemned its generation in force.
    pub condemned_by: Vec<NodeId>,
    /// The voters to which it is alive.
    pub heard_by: Vec<NodeId>,
}

impl Membership {
    /// A machine that knows nothing but what it promised. `condemned` is all that
    /// [`Effect::PersistCondemned`] ever asked to be written down.
    #[must_use]
    pub fn new(
        me: NodeId,
        instance: Instance,
        timing: Timing,
        condemned: Vec<(NodeId, LeaseGeneration)>,
        now: Time,
    ) -> Self {
        let mut machine = Self {
            me,
            instance,
            timing,
            own: None,
            peers: BTreeMap::new(),
            condemned: BTreeMap::new(),
            lease: OwnLease::new(),
            voters: Voters::default(),
            voters_told_since: now,
            settled: 0,
            next_round: now,
            told_condemned: BTreeMap::new(),
            told_heard_by: BTreeMap::new(),
        };
        for (node, generation) in condemned {
            machine.note_condemned(node, generation);
        }
        machine
    }

    /// Takes an input in; effects are appended to `out`, to be carried out in order.
    pub fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Effect>) {
        self.detect_pause(now, out);
        match input {
            Input::Members { members, voters } => self.members(now, members, voters, out),
            Input::Heartbeat { path, heartbeat } => self.heartbeat(now, &path, &heartbeat, out),
            Input::Persisted { node, generation } => {
                self.note_condemned(node, generation);
                // The leader shall know at once: a takeover waits for this word.
                self.next_round = now;
            }
            Input::Tick => {}
        }
        self.judge(now, out);
        self.settle_voters(now, out);
        if now >= self.next_round {
            self.send_round(now, out);
        }
        self.tell_changes(out);
    }

    /// When [`Input::Tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Time {
        let Some(_) = self.own else {
            return Time::NEVER;
        };
        self.peers
            .iter()
            .flat_map(|(id, peer)| {
                let compared = peer.compared_since();
                peer.paths
                    .values()
                    .map(move |path| {
                        let trouble = compared
                            .map_or(Time::NEVER, |since| path.trouble_at(since, &self.timing));
                        trouble.min(path.down_at(peer.base(), &self.timing))
                    })
                    .chain([peer.judged_next(&self.timing), self.condemn_at(*id, peer)])
            })
            .fold(self.next_round, Time::min)
    }

    /// What is known, for people.
    #[must_use]
    pub fn status(&self) -> Status {
        let peer_status = |(id, peer): (&NodeId, &Peer)| {
            let paths = peer
                .paths
                .iter()
                .map(|(name, path)| path.status(name, peer.newest_round))
                .collect();
            let status = PeerStatus {
                liveness: peer.liveness,
                since: peer.since,
                reason: peer.reason.clone(),
                heard_at: peer.heard_at,
                arrived_at: peer.arrived_at,
                hears_us: peer.hears_us(),
                paths,
                condemned_by: self.condemned_by(*id, peer.config.generation),
                heard_by: self.heard_by(*id),
            };
            (*id, status)
        };
        Status {
            generation: self.lease.generation(),
            lease_until: self.lease.until(),
            peers: self.peers.iter().map(peer_status).collect(),
        }
    }

    /// How long this node's lease holds.
    #[must_use]
    pub const fn lease_until(&self) -> Time {
        self.lease.until()
    }

    /// The generation under which this node asks for its lease.
    #[must_use]
    pub const fn generation(&self) -> LeaseGeneration {
        self.lease.generation()
    }

    /// What a member is to this node.
    #[must_use]
    pub fn liveness(&self, node: NodeId) -> Liveness {
        if node == self.me {
            return Liveness::Alive;
        }
        self.peers
            .get(&node)
            .map_or(Liveness::Unknown, |peer| peer.liveness)
    }

    /// Whether heartbeats of a member arrive on a path.
    #[must_use]
    pub fn hears_on(&self, node: NodeId, path: &str) -> bool {
        let peer = self.peers.get(&node);
        peer.and_then(|peer| peer.paths.get(path))
            .is_some_and(|path| path.up)
    }

    /// How long a member has been silent; `None` when it was never heard, or is no member.
    #[must_use]
    pub fn silent_for(&self, node: NodeId, now: Time) -> Option<Duration> {
        let heard_at = self.peers.get(&node)?.heard_at?;
        Some(now.since(heard_at))
    }

    /// The process did not run when it should have: what arrived meanwhile waits to be read, so
    /// the silence before now says nothing of the others.
    fn detect_pause(&mut self, now: Time, out: &mut Vec<Effect>) {
        let due = self.deadline();
        if due == Time::NEVER || now <= due + self.timing.suspect {
            return;
        }
        out.push(Effect::Paused {
            pause: now.since(due),
        });
        for peer in self.peers.values_mut() {
            peer.restart_silence(now);
        }
    }

    fn members(
        &mut self,
        now: Time,
        mut members: BTreeMap<NodeId, MemberConfig>,
        voters: Voters,
        out: &mut Vec<Effect>,
    ) {
        if voters.told != self.voters.told {
            self.voters_told_since = now;
        }
        self.voters = voters;
        let own = members.remove(&self.me);
        self.peers.retain(|id, _| members.contains_key(id));
        self.lease
            .retain_voters(|id| members.get(&id).is_some_and(|member| member.voter));
        for (id, config) in members {
            match self.peers.get_mut(&id) {
                Some(peer) => peer.configure(config, now),
                None => {
                    self.peers.insert(id, Peer::new(config, now));
                }
            }
        }
        let entitled = own.as_ref().is_some_and(|own| !own.evicted);
        if let Some(own) = &own {
            if own.generation != self.lease.generation() || self.own.is_none() {
                // Not at the next beat but now: the lease under it begins with this round.
                self.next_round = now;
            }
            self.lease.set_generation(own.generation);
        }
        self.own = own;
        if !entitled && self.lease.revoke(now) {
            out.push(Effect::LeaseUntil(self.lease.until()));
        }
        self.recount(out);
    }

    fn heartbeat(&mut self, now: Time, path: &str, heartbeat: &Heartbeat, out: &mut Vec<Effect>) {
        let from = heartbeat.from;
        let condemned = self.condemned_generation(from);
        let me = (self.me, self.instance);
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        let Some(newest) = peer.take(now, me, path, heartbeat) else {
            return;
        };
        if newest && peer.hears_us() {
            let refused =
                condemned
                    .max(peer.condemning.unwrap_or_default())
                    .max(if peer.config.evicted {
                        peer.config.generation
                    } else {
                        LeaseGeneration(0)
                    });
            if heartbeat.generation > refused {
                peer.granted_round = heartbeat.round;
            }
        }
        if let Some(echo) = heartbeat.echo.filter(|echo| echo.instance == self.instance)
            && let Some(sent) = self.lease.sent_at(echo.round)
            && let Some(path) = peer.paths.get_mut(path)
        {
            let held = Duration::from_micros(u64::from(echo.held_us));
            path.measured(now.since(sent).saturating_sub(held));
        }
        let granted = heartbeat
            .peers
            .iter()
            .find(|echo| echo.node == self.me && echo.instance == self.instance)
            .map(|echo| echo.granted_round);
        peer.knows_voters(now, heartbeat.voters);
        // Who knows of voters that this node does not know may grant together with them to another node.
        if let Some(round) = granted
            && peer.config.voter
            && heartbeat.voters <= self.voters.known
        {
            self.lease.note_grant(from, round);
            self.recount(out);
        }
    }

    /// Whether this node's word counts.
    fn votes(&self) -> bool {
        self.own.as_ref().is_some_and(|own| own.voter)
    }

    /// Counts the grants of this node's own rounds.
    fn recount(&mut self, out: &mut Vec<Effect>) {
        let entitled = self.own.as_ref().is_some_and(|own| !own.evicted);
        let own_vote = self.votes();
        let others = self.peers.values().filter(|peer| peer.config.voter).count();
        let majority = (others + usize::from(own_vote)) / 2 + 1;
        if entitled && self.lease.recount(majority, own_vote, &self.timing) {
            out.push(Effect::LeaseUntil(self.lease.until()));
        }
    }

    /// Judges silence; condemns whose grants are over.
    fn judge(&mut self, now: Time, out: &mut Vec<Effect>) {
        if self.own.is_none() {
            return;
        }
        for (id, peer) in &mut self.peers {
            let base = peer.base();
            for path in peer.paths.values_mut() {
                path.judge_up(now, base, &self.timing);
            }
            if peer.judge(now, &self.timing) {
                out.push(Effect::Liveness {
                    node: *id,
                    liveness: peer.liveness,
                    reason: peer.reason.clone(),
                });
            }
            let (compared, newest) = (peer.compared_since(), peer.newest_round);
            for (name, path) in &mut peer.paths {
                let Some(since) = compared else {
                    // The member is gone, not the path.
                    path.trouble = None;
                    continue;
                };
                if path.judge_trouble(now, since, newest, &self.timing) {
                    out.push(Effect::Path {
                        node: *id,
                        path: name.clone(),
                        trouble: path.trouble,
                        loss_percent: path.loss_percent(newest),
                    });
                }
            }
        }
        for id in self.peers.keys().copied().collect::<Vec<_>>() {
            self.condemn_if_due(now, id, out);
        }
    }

    fn condemn_if_due(&mut self, now: Time, id: NodeId, out: &mut Vec<Effect>) {
        let Some(peer) = self.peers.get(&id) else {
            return;
        };
        if self.may_condemn(id, peer) && peer.grants_are_over(now, &self.timing) {
            let generation = peer.config.generation;
            if let Some(peer) = self.peers.get_mut(&id) {
                // From here on nothing is granted under it, though it is not a promise yet.
                peer.condemning = Some(generation);
            }
            out.push(Effect::PersistCondemned {
                node: id,
                generation,
            });
        }
    }

    fn may_condemn(&self, id: NodeId, peer: &Peer) -> bool {
        let generation = peer.config.generation;
        self.votes()
            && !peer.config.evicted
            && generation > self.condemned_generation(id)
            && peer.condemning.is_none_or(|pending| generation > pending)
    }

    fn condemn_at(&self, id: NodeId, peer: &Peer) -> Time {
        if self.may_condemn(id, peer) {
            peer.silent_from() + self.timing.dead
        } else {
            Time::NEVER
        }
    }

    fn condemned_generation(&self, node: NodeId) -> LeaseGeneration {
        self.condemned.get(&node).copied().unwrap_or_default()
    }

    fn note_condemned(&mut self, node: NodeId, generation: LeaseGeneration) {
        let known = self.condemned.entry(node).or_default();
        *known = generation.max(*known);
        if let Some(peer) = self.peers.get_mut(&node)
            && peer.condemning.is_some_and(|pending| pending <= generation)
        {
            peer.condemning = None;
        }
    }

    fn send_round(&mut self, now: Time, out: &mut Vec<Effect>) {
        let Some(own) = &self.own else {
            return;
        };
        let generation = own.generation;
        let round = self.lease.begin_round(now);
        self.next_round = now + self.timing.heartbeat;
        let says: Vec<PeerEcho> = self
            .peers
            .iter()
            .map(|(id, peer)| PeerEcho {
                node: *id,
                instance: peer.instance.unwrap_or_default(),
                granted_round: peer.granted_round,
                heard: peer.arrives(now, &self.timing),
                alive: peer.liveness == Liveness::Alive,
                condemned: self.condemned_generation(*id),
            })
            .collect();
        for (id, peer) in &self.peers {
            let due = |path: &Path| round.is_multiple_of(u64::from(path.every.max(1)));
            for (name, path) in peer.paths.iter().filter(|(_, path)| due(path)) {
                let echo = path
                    .heard_at
                    .zip(peer.instance)
                    .map(|(at, instance)| PathEcho {
                        instance,
                        round: path.newest_round,
                        held_us: u32::try_from(now.since(at).as_micros()).unwrap_or(u32::MAX),
                    });
                out.push(Effect::Send {
                    to: *id,
                    path: name.clone(),
                    heartbeat: Heartbeat {
                        from: self.me,
                        instance: self.instance,
                        round,
                        generation,
                        voters: self.voters.told,
                        peers: says.clone(),
                        echo,
                    },
                });
            }
        }
        // A cluster of one grants itself.
        self.recount(out);
    }

    /// The voters that condemned a generation of a node (this one, too), in order.
    #[must_use]
    pub fn condemned_by(&self, node: NodeId, generation: LeaseGeneration) -> Vec<NodeId> {
        let others = self.peers.iter().filter(|(id, peer)| {
            **id != node
                && peer.config.voter
                && peer
                    .says
                    .get(&node)
                    .is_some_and(|word| word.condemned >= generation)
        });
        let mut by: Vec<NodeId> = others.map(|(id, _)| *id).collect();
        if self.votes() && self.condemned_generation(node) >= generation {
            by.push(self.me);
        }
        by.sort_unstable();
        by
    }

    /// The other voters to which a node (this one, too) is alive, in order. Who is silent has no
    /// say.
    #[must_use]
    pub fn heard_by(&self, node: NodeId) -> Vec<NodeId> {
        let others = self.peers.iter().filter(|(id, peer)| {
            **id != node
                && peer.config.voter
                && peer.liveness == Liveness::Alive
                && peer.says.get(&node).is_some_and(|word| word.alive)
        });
        let mut by: Vec<NodeId> = others.map(|(id, _)| *id).collect();
        if node != self.me && self.votes() && self.liveness(node) == Liveness::Alive {
            by.push(self.me);
        }
        by.sort_unstable();
        by
    }

    /// Whether a majority of the voters has known for the dead time who they are: by then no lease is left that
    /// was counted among the voters before.
    fn settle_voters(&mut self, now: Time, out: &mut Vec<Effect>) {
        let wanted = self.voters.known;
        if self.own.is_none() || self.settled >= wanted {
            return;
        }
        let settled =
            |told: u64, since: Time| told >= wanted && now.since(since) >= self.timing.dead;
        let voters = self.peers.values().filter(|peer| peer.config.voter);
        let others = voters.clone().filter(|peer| {
            peer.voters
                .is_some_and(|(told, since)| settled(told, since))
        });
        let mine = self.votes() && settled(self.voters.told, self.voters_told_since);
        let majority = (voters.count() + usize::from(self.votes())) / 2 + 1;
        if others.count() + usize::from(mine) >= majority {
            self.settled = wanted;
            out.push(Effect::VotersSettled(wanted));
        }
    }

    fn tell_changes(&mut self, out: &mut Vec<Effect>) {
        self.told_condemned
            .retain(|id, _| self.peers.contains_key(id));
        self.told_heard_by
            .retain(|id, _| self.peers.contains_key(id));
        for (id, peer) in &self.peers {
            let generation = peer.config.generation;
            let by = self.condemned_by(*id, generation);
            let told = self.told_condemned.entry(*id).or_default();
            if (told.0, &told.1) != (generation, &by) {
                *told = (generation, by.clone());
                out.push(Effect::Condemned {
                    node: *id,
                    generation,
                    by,
                });
            }
            let by = self.heard_by(*id);
            let told = self.told_heard_by.entry(*id).or_default();
            if *told != by {
                told.clone_from(&by);
                out.push(Effect::HeardBy { node: *id, by });
            }
        }
    }
}
