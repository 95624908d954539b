//! The paths of heartbeats, in layer 2: networks that fail on their own, and a slow line between two nodes that carries
//! nothing else. Replication and the log have their own cables ([`crate::net`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use relevo_types::Time;

use crate::{net::Index, rng::Rng};

/// The network of every node. A cut of heartbeats and log is one of all networks.
pub const LAN: &str = "lan";
/// A second network of every node.
const SECOND: &str = "repl";
/// A serial line between the first two nodes.
const LINE: &str = "ser";

/// Bits a second of the line: a heartbeat goes over it in every second round.
const LINE_BAUD: u32 = 19_200;
/// How long a heartbeat takes on it.
const LINE_TIME: Duration = Duration::from_millis(60);

/// What paths a seed has beside [`LAN`], and what each of them loses.
#[derive(Clone, Debug, Default)]
pub struct PathPlan {
    /// Loss of each in percent, by name.
    losses: Vec<(&'static str, f64)>,
}

impl PathPlan {
    /// The plan of a seed. Chance of its own: a seed without further paths is the run that it would be else.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 15);
        if !rng.chance(30.0) {
            return Self::default();
        }
        let names: &[&str] = rng.pick(&[&[SECOND] as &[&str], &[LINE], &[SECOND, LINE]]);
        let loss = |name: &&'static str| (*name, rng.pick(&[0.0, 1.0, 10.0]));
        Self {
            losses: names.iter().map(loss).collect(),
        }
    }

    /// Whether there is a path beside [`LAN`].
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.losses.is_empty()
    }

    /// Those of a node beside [`LAN`], with the addresses as in the control log.
    #[must_use]
    pub fn of_node(&self, node: Index) -> Vec<(&'static str, String)> {
        let names = self.names().filter(|name| *name != LINE || node < 2);
        names
            .map(|name| match name {
                LINE => (name, format!("serial:/dev/ttyS{node}:{LINE_BAUD}")),
                _ => (name, format!("fd00::{}", node + 1)),
            })
            .collect()
    }

    fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.losses.iter().map(|(name, _)| *name)
    }

    fn loss(&self, path: &str) -> f64 {
        let known = self.losses.iter().find(|(name, _)| *name == path);
        known.map_or(0.0, |(_, loss)| *loss)
    }
}

/// One direction of a path between two nodes.
type Way = (&'static str, Index, Index);

/// The paths of a run.
#[derive(Debug)]
pub struct PathNet {
    plan: PathPlan,
    rng: Rng,
    cut: BTreeSet<Way>,
    /// When a heartbeat last did not get through.
    holes: BTreeMap<Way, Time>,
    /// Since when all networks from one node to another are silent.
    silent_since: BTreeMap<(Index, Index), Time>,
}

impl PathNet {
    /// The paths of a seed, all well.
    #[must_use]
    pub fn new(seed: u64, plan: PathPlan) -> Self {
        Self {
            plan,
            rng: Rng::new(seed, 16),
            cut: BTreeSet::new(),
            holes: BTreeMap::new(),
            silent_since: BTreeMap::new(),
        }
    }

    fn known(path: &str) -> &'static str {
        [LAN, SECOND, LINE]
            .into_iter()
            .find(|name| *name == path)
            .unwrap_or(LAN)
    }

    /// Sends a heartbeat on a path; gives how much longer than on a network it takes, or `None` if it is lost.
    /// `carried`: the cable of heartbeats and log carries it.
    pub fn send(
        &mut self,
        now: Time,
        path: &str,
        (from, to): (Index, Index),
        carried: bool,
    ) -> Option<Duration> {
        let path = Self::known(path);
        let way = (path, from, to);
        let carried = carried || path == LINE;
        let lost = self.cut.contains(&way) || self.rng.chance(self.plan.loss(path));
        let through = carried && !lost;
        if !through {
            self.holes.insert(way, now);
        }
        if path == LAN && !through {
            self.silent_since.entry((from, to)).or_insert(now);
        } else if path != LINE && through {
            self.silent_since.remove(&(from, to));
        }
        let longer = if path == LINE {
            LINE_TIME
        } else {
            Duration::ZERO
        };
        through.then_some(longer)
    }

    /// How long a heartbeat is under way on a path beside [`LAN`]; `usual_us`: at most, usually.
    pub fn delay(&mut self, usual_us: u64) -> Duration {
        let delay = self.rng.micros(30, usual_us);
        if self.rng.chance(1.0) {
            delay * 10
        } else {
            delay
        }
    }

    /// Whether nothing but the line has carried a heartbeat between two nodes for so long, either way.
    #[must_use]
    pub fn line_is_alone(&self, now: Time, one: Index, other: Index, for_long: Duration) -> bool {
        [(one, other), (other, one)].iter().all(|pair| {
            let since = self.silent_since.get(pair);
            since.is_some_and(|since| now.since(*since) >= for_long)
        })
    }

    /// Draws a path and what of it fails: one node's end of it, the way between two nodes, or all of it. Gives the
    /// directions, cut from now on.
    pub fn cut_some(&mut self, nodes: usize) -> Vec<(&'static str, Index, Index)> {
        let names: Vec<&'static str> = [LAN].into_iter().chain(self.plan.names()).collect();
        let path = self.rng.pick(&names);
        let (kind, one, other) = (
            self.rng.below(3),
            self.rng.index(nodes),
            self.rng.index(nodes),
        );
        let mut ways = Vec::new();
        for from in 0..nodes {
            for to in (0..nodes).filter(|to| *to != from) {
                let hit = match kind {
                    0 => from == one || to == one,
                    1 => (from, to) == (one, other) || (from, to) == (other, one),
                    _ => true,
                };
                if hit {
                    ways.push((path, from, to));
                }
            }
        }
        self.cut.extend(&ways);
        ways
    }

    /// A node is off every path until all is mended.
    pub fn sever(&mut self, node: Index, nodes: usize) {
        for path in [LAN, SECOND, LINE] {
            for other in 0..nodes {
                self.cut.extend([(path, node, other), (path, other, node)]);
            }
        }
    }

    /// These directions carry again.
    pub fn mend(&mut self, ways: &[(&'static str, Index, Index)]) {
        for way in ways {
            self.cut.remove(way);
        }
    }

    /// Everything carries again.
    pub fn mend_all(&mut self) {
        self.cut.clear();
    }

    /// A path between two nodes on which every heartbeat got through since then, in both directions.
    #[must_use]
    pub fn whole_since(&self, since: Time, one: Index, other: Index) -> Option<&'static str> {
        let whole = |path: &&'static str| {
            [(*path, one, other), (*path, other, one)]
                .iter()
                .all(|way| self.holes.get(way).is_none_or(|hole| *hole < since))
        };
        let both = |path: &&str| *path != LINE || (one < 2 && other < 2);
        let mut names = [LAN].into_iter().chain(self.plan.names());
        names.find(|path| both(path) && whole(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cut of every path but one leaves that one whole, and a hole in it is seen.
    #[test]
    fn a_path_that_holds_is_found() {
        let plan = PathPlan {
            losses: vec![(LINE, 0.0)],
        };
        let mut net = PathNet::new(1, plan);
        assert_eq!(net.send(Time(5), LAN, (0, 1), false), None);
        assert_eq!(net.send(Time(5), LAN, (1, 0), false), None);
        assert_eq!(net.send(Time(5), LINE, (0, 1), false), Some(LINE_TIME));
        assert_eq!(net.whole_since(Time(1), 0, 1), Some(LINE));
        assert_eq!(net.whole_since(Time(6), 0, 1), Some(LAN), "it is over");
        assert_eq!(net.whole_since(Time(1), 0, 2), Some(LAN));
        assert!(net.line_is_alone(Time(9), 0, 1, Duration::from_nanos(4)));
        assert!(!net.line_is_alone(Time(9), 0, 1, Duration::from_nanos(5)));
        net.sever(1, 3);
        assert_eq!(net.send(Time(8), LINE, (1, 0), true), None);
        assert_eq!(net.whole_since(Time(1), 0, 1), None);
        net.mend_all();
        assert!(net.send(Time(9), LAN, (0, 1), true).is_some());
        assert!(!net.line_is_alone(Time(99), 0, 1, Duration::ZERO));
    }
}
