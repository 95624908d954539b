//! One path to a peer: up or down, round trip, loss. For people and for reasons; no decision
//! depends on a single path.

use std::time::Duration;

use relevo_types::Time;

use crate::PathStatus;

/// Rounds that the loss is counted over.
const WINDOW: u32 = 100;

/// What is known of a path.
#[derive(Debug, Default)]
pub(crate) struct Path {
    /// The newest round of the peer's instance that arrived here; 0 for none.
    pub(crate) newest_round: u64,
    /// When it arrived.
    pub(crate) heard_at: Option<Time>,
    /// Heartbeats arrive.
    pub(crate) up: bool,
    /// Smoothed round trip in microseconds.
    round_trip_us: Option<u32>,
    /// Bit n: the round n before `newest_round` arrived.
    arrived: u128,
    /// First round of this instance that arrived here: before it nothing can be missed.
    first_round: u64,
}

impl Path {
    /// The peer restarted: its rounds start anew.
    pub(crate) fn reset_rounds(&mut self) {
        self.newest_round = 0;
        self.arrived = 0;
        self.first_round = 0;
    }

    /// A round arrived, newer than `newest_round`.
    pub(crate) fn arrived(&mut self, now: Time, round: u64) {
        let shift = round - self.newest_round;
        if self.newest_round == 0 {
            self.first_round = round;
        }
        self.arrived = u32::try_from(shift)
            .ok()
            .and_then(|shift| self.arrived.checked_shl(shift))
            .unwrap_or(0)
            | 1;
        self.newest_round = round;
        self.heard_at = Some(now);
    }

    /// A round trip was measured; smoothed like TCP's, one eighth of the new value.
    pub(crate) fn measured(&mut self, round_trip: Duration) {
        let sample = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX);
        self.round_trip_us = Some(match self.round_trip_us {
            None => sample,
            Some(old) => old - old / 8 + sample / 8,
        });
    }

    /// When it counts as down if nothing arrives; `base`: when the timers last started anew.
    pub(crate) fn down_at(&self, base: Time, suspect: Duration) -> Time {
        if self.up {
            self.heard_at.map_or(base, |at| at.max(base)) + suspect
        } else {
            Time::NEVER
        }
    }

    /// `peer_newest`: the peer's newest round that arrived on any path.
    pub(crate) fn status(&self, name: &str, peer_newest: u64) -> PathStatus {
        PathStatus {
            name: name.to_owned(),
            up: self.up,
            round_trip_us: self.round_trip_us,
            loss_percent: self.loss_percent(peer_newest),
        }
    }

    fn loss_percent(&self, peer_newest: u64) -> u8 {
        if !self.up {
            return 100;
        }
        let newest = peer_newest.max(self.newest_round);
        let sent = (newest + 1 - self.first_round).min(u64::from(WINDOW));
        // Rounds that arrived elsewhere since the newest one here count as missed here.
        let behind = newest - self.newest_round;
        let Some(seen_bits) = sent.checked_sub(behind).filter(|bits| *bits > 0) else {
            return 100;
        };
        let mask = u128::MAX >> (128 - seen_bits);
        let missed = sent - u64::from((self.arrived & mask).count_ones());
        u8::try_from(missed * 100 / sent).unwrap_or(100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_counts_gaps_and_what_came_on_other_paths() {
        let mut path = Path {
            up: true,
            ..Path::default()
        };
        for round in 11..=20 {
            path.arrived(Time(0), round);
        }
        assert_eq!(path.loss_percent(20), 0);
        assert_eq!(path.loss_percent(30), 50);
        path.arrived(Time(0), 30);
        assert_eq!(path.loss_percent(30), 45);
        for round in 31..=400 {
            path.arrived(Time(0), round);
        }
        assert_eq!(path.loss_percent(400), 0);
        assert_eq!(path.loss_percent(1000), 100);
        path.arrived(Time(0), 100_000);
        assert_eq!(path.loss_percent(100_000), 99);
        path.up = false;
        assert_eq!(path.loss_percent(100_000), 100);
    }

    #[test]
    fn the_round_trip_is_smoothed() {
        let mut path = Path::default();
        path.measured(Duration::from_micros(800));
        path.measured(Duration::from_micros(1600));
        assert_eq!(path.status("lan", 0).round_trip_us, Some(900));
    }
}
