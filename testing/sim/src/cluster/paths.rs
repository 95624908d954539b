//! Heartbeats on several paths, and the promise that the loss of one moves nothing. Layer 2.

use std::time::Duration;

use relevo_types::Time;

use super::{Cluster, Event};
use crate::{
    check::{Verdict, Violation},
    net::{Index, Plane},
    paths::LAN,
};

/// A path fails for this long at most: through any time-out, and no longer than a run has.
const CUT_MAX_MS: u64 = 2500;

impl Cluster {
    /// Sends a heartbeat; gives when it arrives, if it does.
    pub(super) fn heartbeat_delay(
        &mut self,
        from: Index,
        to: Index,
        path: &str,
    ) -> Option<Duration> {
        let now = self.queue.now();
        // Datagrams: lost where the network is cut, now and then elsewhere, in no order.
        let carried = self.net.is_open(Plane::Control, from, to)
            && (path != LAN || !self.chance.net.chance(self.scenario.datagram_loss));
        let longer = self.paths.send(now, path, (from, to), carried)?;
        let usual = if path == LAN {
            self.message_delay()
        } else {
            self.paths.delay(self.scenario.net_us)
        };
        let dead = self.scenario.sensitivity.timing().dead;
        if longer > Duration::ZERO
            && self.paths.line_is_alone(now, from, to, dead)
            && self.machines[from].acts()
            && self.machines[to].acts()
        {
            self.marks.reached("a stream alone kept two nodes alive");
        }
        Some(usual + longer)
    }

    /// A path fails, or one node's end of it, while the others hold.
    pub(super) fn cut_path(&mut self) {
        let ways = self.paths.cut_some(self.scenario.nodes());
        let how_long = self.chance.trouble.spread_millis(20, CUT_MAX_MS);
        self.marks.reached("one path of heartbeats failed alone");
        self.queue.after(how_long, Event::MendPath(ways));
    }

    /// A voter gave a node up: on every path between them something got lost meanwhile, or one of them did not run.
    pub(super) fn check_condemnation(&self, voter: Index, node: Index) -> Verdict {
        let timing = self.scenario.sensitivity.timing();
        let slowest = Duration::from_micros(self.scenario.net_us * 10);
        let slack = timing.heartbeat * 8 + slowest * 4;
        let now = self.queue.now();
        let Some(since) = now
            .0
            .checked_sub(super::effects::nanos(timing.dead + slack))
        else {
            return Ok(());
        };
        let since = Time(since);
        let awake = |node: Index| {
            let machine = &self.machines[node];
            machine.acts() && machine.awake_since <= since
        };
        if !awake(voter) || !awake(node) {
            return Ok(());
        }
        match self.paths.whole_since(since, voter, node) {
            None => Ok(()),
            Some(path) => Err(Violation::new(
                "the loss of a path moves nothing",
                format!(
                    "n{} gave n{} up, and every heartbeat between them got through on {path}",
                    voter + 1,
                    node + 1
                ),
            )),
        }
    }
}
