//! What is known of one other member.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{Instance, LeaseGeneration, NodeId, Time, Timing};

use crate::{Heartbeat, Liveness, MemberConfig, PeerEcho, path::Path};

/// One other member.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) config: MemberConfig,
    /// Its newest instance.
    pub(crate) instance: Option<Instance>,
    /// The newest of this node's rounds that `instance` echoed.
    echoed: Option<u64>,
    /// The newest round of `instance`, on any path.
    pub(crate) newest_round: u64,
    pub(crate) paths: BTreeMap<String, Path>,
    /// When a heartbeat of it arrived last, heard or not.
    pub(crate) arrived_at: Option<Time>,
    /// When a heartbeat of it arrived last that said that it hears this node.
    pub(crate) heard_at: Option<Time>,
    /// Its newest heartbeat says that it hears this node.
    hears_us: bool,
    /// When the timers of silence started at the latest, whatever was heard before: start of this
    /// process, end of a pause, a new generation.
    base: Time,
    pub(crate) granted_round: u64,
    /// The newest change of who votes that it told, and since when no older one.
    pub(crate) voters: Option<(u64, Time)>,
    /// What it says of the others.
    pub(crate) says: BTreeMap<NodeId, PeerEcho>,
    pub(crate) liveness: Liveness,
    pub(crate) since: Time,
    pub(crate) reason: String,
    /// [`Effect::PersistCondemned`](crate::Effect) is under way for this generation.
    pub(crate) condemning: Option<LeaseGeneration>,
}

impl Peer {
    pub(crate) fn new(config: MemberConfig, now: Time) -> Self {
        let mut peer = Self {
            config,
            instance: None,
            echoed: None,
            newest_round: 0,
            paths: BTreeMap::new(),
            arrived_at: None,
            heard_at: None,
            hears_us: false,
            base: now,
            granted_round: 0,
            voters: None,
            says: BTreeMap::new(),
            liveness: Liveness::Unknown,
            since: now,
            reason: "not heard since this daemon started".to_owned(),
            condemning: None,
        };
        peer.match_paths(now);
        peer
    }

    /// The control log says something new of it.
    pub(crate) fn configure(&mut self, config: MemberConfig, now: Time) {
        if config.generation != self.config.generation {
            // It was let in again: it gets the full time to be heard under the new generation.
            self.restart_silence(now);
        }
        self.config = config;
        self.match_paths(now);
    }

    fn match_paths(&mut self, now: Time) {
        let configured = &self.config.paths;
        self.paths
            .retain(|name, _| configured.iter().any(|path| path.name == *name));
        for config in configured {
            let known = self.paths.entry(config.name.clone());
            let path = known.or_insert_with(|| Path::new(config.every, now));
            path.configure(config);
        }
    }

    /// Since when its paths are compared with each other: it is alive, and the timers did not start anew.
    pub(crate) fn compared_since(&self) -> Option<Time> {
        (self.liveness == Liveness::Alive).then(|| self.since.max(self.base))
    }

    /// Silence from before this moment is no evidence.
    pub(crate) fn restart_silence(&mut self, now: Time) {
        self.base = self.base.max(now);
    }

    /// It knows this change of who votes.
    pub(crate) fn knows_voters(&mut self, now: Time, told: u64) {
        if self.voters.is_none_or(|(known, _)| known != told) {
            self.voters = Some((told, now));
        }
    }

    /// Since when it is silent.
    pub(crate) fn silent_from(&self) -> Time {
        self.heard_at.map_or(self.base, |at| at.max(self.base))
    }

    pub(crate) const fn base(&self) -> Time {
        self.base
    }

    /// Whether its heartbeats arrive, be it that it does not hear this node.
    pub(crate) fn arrives(&self, now: Time, timing: &Timing) -> bool {
        self.arrived_at
            .is_some_and(|at| now.since(at) < timing.suspect)
    }

    /// Takes a heartbeat in. Returns whether it is its newest word; `None` when the heartbeat is
    /// a duplicate, or of the past.
    pub(crate) fn take(
        &mut self,
        now: Time,
        me: (NodeId, Instance),
        path: &str,
        heartbeat: &Heartbeat,
    ) -> Option<bool> {
        let echoed = heartbeat
            .echo
            .filter(|echo| echo.instance == me.1)
            .map(|echo| echo.round);
        if self.instance != Some(heartbeat.instance) {
            // Instances are random numbers, so which one is the later is told by what it heard of
            // this node: an earlier instance can't echo a round that was sent after its end. So a
            // replayed or delayed heartbeat of the past never displaces the living. An instance
            // that echoed nothing yet may be such a ghost itself: anything displaces it.
            if self.echoed.is_some() && echoed <= self.echoed {
                return None;
            }
            self.restarted(heartbeat.instance);
        }
        match self.paths.get_mut(path) {
            Some(known) if heartbeat.round > known.newest_round => {
                known.arrived(now, heartbeat.round);
            }
            // A path of which the control log has not told yet.
            None if heartbeat.round > self.newest_round => {}
            Some(_) | None => return None,
        }
        let newest = heartbeat.round > self.newest_round;
        if newest {
            self.newest_round = heartbeat.round;
            self.hears_us = false;
            for echo in &heartbeat.peers {
                if echo.node == me.0 {
                    self.hears_us = echo.instance == me.1 && echo.heard;
                }
                self.note_word(echo);
            }
        }
        self.echoed = self.echoed.max(echoed);
        self.arrived_at = Some(now);
        if self.hears_us {
            self.heard_at = Some(now);
        }
        Some(newest)
    }

    /// A condemnation is a durable promise: it is never forgotten.
    fn note_word(&mut self, echo: &PeerEcho) {
        let known = self.says.entry(echo.node).or_insert_with(|| echo.clone());
        let condemned = known.condemned.max(echo.condemned);
        known.clone_from(echo);
        known.condemned = condemned;
    }

    fn restarted(&mut self, instance: Instance) {
        self.instance = Some(instance);
        self.echoed = None;
        self.newest_round = 0;
        self.granted_round = 0;
        self.hears_us = false;
        self.paths.values_mut().for_each(Path::reset_rounds);
        for word in self.says.values_mut() {
            word.heard = false;
            word.alive = false;
            word.granted_round = 0;
        }
    }

    /// Whether its newest heartbeat said that it hears this node.
    pub(crate) const fn hears_us(&self) -> bool {
        self.hears_us
    }

    /// Judges its silence. Returns whether the liveness changed.
    pub(crate) fn judge(&mut self, now: Time, timing: &Timing) -> bool {
        let silent = now.since(self.silent_from());
        let heard = self.hears_us
            && self
                .heard_at
                .is_some_and(|at| now.since(at) < timing.suspect);
        let next = match self.liveness {
            _ if heard => Liveness::Alive,
            Liveness::Dead => Liveness::Dead,
            Liveness::Alive | Liveness::Suspect | Liveness::Unknown if silent >= timing.dead => {
                Liveness::Dead
            }
            Liveness::Alive if silent >= timing.suspect => Liveness::Suspect,
            unchanged => unchanged,
        };
        if next == self.liveness {
            return false;
        }
        self.reason = self.explain(next, now, silent, timing);
        self.liveness = next;
        self.since = now;
        true
    }

    fn explain(&self, next: Liveness, now: Time, silent: Duration, timing: &Timing) -> String {
        let silent = seconds(silent);
        match next {
            Liveness::Unknown => "not heard since this daemon started".to_owned(),
            Liveness::Alive => {
                let up: Vec<&str> = self
                    .paths
                    .iter()
                    .filter(|(_, path)| {
                        path.heard_at
                            .is_some_and(|at| now.since(at) < timing.suspect)
                    })
                    .map(|(name, _)| name.as_str())
                    .collect();
                format!("heartbeats arrive on {}", listed(&up))
            }
            Liveness::Suspect | Liveness::Dead if self.arrives(now, timing) => format!(
                "its heartbeats arrive, but for {silent} they say that it does not hear this node"
            ),
            Liveness::Suspect | Liveness::Dead => {
                let all: Vec<&str> = self.paths.keys().map(String::as_str).collect();
                format!("silent on {} for {silent}", listed(&all))
            }
        }
    }

    /// Whether silence lasted long enough that every grant to it is over.
    pub(crate) fn grants_are_over(&self, now: Time, timing: &Timing) -> bool {
        now.since(self.silent_from()) >= timing.dead
    }

    /// When [`Self::judge`] has something to say at the latest.
    pub(crate) fn judged_next(&self, timing: &Timing) -> Time {
        match self.liveness {
            Liveness::Alive => self.silent_from() + timing.suspect,
            Liveness::Suspect | Liveness::Unknown => self.silent_from() + timing.dead,
            Liveness::Dead => Time::NEVER,
        }
    }
}

/// A duration in words: `1.0 s`.
fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// `lan, repl and wan`.
fn listed(names: &[&str]) -> String {
    match names {
        [] => "no path".to_owned(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
