//! One path to a peer: up or down, round trip, jitter, loss, and whether that is worth an alarm. For people
//! and for reasons; no decision depends on a single path.

use std::time::Duration;

use relevo_types::{Time, Timing};

use crate::{PathConfig, PathStatus, PathTrouble};

/// Heartbeats that the loss is counted over.
const WINDOW: u64 = 100;

/// So many must have been due before their loss is an alarm: one lost in three is chance.
const COUNTED_MIN: u64 = 50;

/// Loss that is an alarm, in percent. TCP over such a path is slow: at 1 % it has a tenth of its speed left on
/// a LAN; 10 % of the few small heartbeats is what can be told from chance. And the loss at which the alarm is
/// over; apart, so that a path between the two does not raise one every minute.
const LOSS_RAISED: u8 = 10;
const LOSS_OVER: u8 = 3;

/// So many heartbeats must have been due since a path is back before it counts as in order.
const STEADY: u64 = 10;

/// What is known of a path.
#[derive(Debug)]
pub(crate) struct Path {
    /// A heartbeat comes in rounds whose number is a multiple of this.
    pub(crate) every: u32,
    /// Since when it belongs to the configuration.
    since: Time,
    /// The newest round of the peer's instance that arrived here; 0 for none.
    pub(crate) newest_round: u64,
    /// When it arrived.
    pub(crate) heard_at: Option<Time>,
    /// Heartbeats arrive.
    pub(crate) up: bool,
    /// Smoothed round trip in microseconds.
    round_trip_us: Option<u32>,
    /// The last round trip as it was measured, in microseconds.
    last_round_trip_us: Option<u32>,
    /// Sixteen times the jitter, in microseconds.
    jitter_16: Option<u32>,
    /// Bit n: the heartbeat n before the newest one arrived.
    arrived: u128,
    /// Number of the first heartbeat of this instance that arrived here: before it nothing can be missed.
    first: u64,
    /// What is wrong with it.
    pub(crate) trouble: Option<PathTrouble>,
}

impl Path {
    pub(crate) const fn new(every: u32, now: Time) -> Self {
        Self {
            every,
            since: now,
            newest_round: 0,
            heard_at: None,
            up: false,
            round_trip_us: None,
            last_round_trip_us: None,
            jitter_16: None,
            arrived: 0,
            first: 0,
            trouble: None,
        }
    }

    /// The control log says something new of it.
    pub(crate) fn configure(&mut self, config: &PathConfig) {
        if self.every != config.every {
            self.every = config.every;
            self.restart_loss();
        }
    }

    /// The peer restarted: its rounds start anew.
    pub(crate) fn reset_rounds(&mut self) {
        self.newest_round = 0;
        self.restart_loss();
    }

    /// What was missed before is no evidence any more.
    fn restart_loss(&mut self) {
        self.arrived = 0;
        self.first = 0;
    }

    /// The number of the heartbeat that a round has on this path, counted from 1.
    fn number(&self, round: u64) -> u64 {
        round / u64::from(self.every.max(1)) + 1
    }

    /// A round arrived, newer than `newest_round`.
    pub(crate) fn arrived(&mut self, now: Time, round: u64) {
        if self.trouble == Some(PathTrouble::Down) && !self.up {
            self.restart_loss();
        }
        let number = self.number(round);
        if self.first == 0 {
            self.first = number;
        }
        let shift = number.saturating_sub(self.number(self.newest_round));
        self.arrived = u32::try_from(shift)
            .ok()
            .and_then(|shift| self.arrived.checked_shl(shift))
            .unwrap_or(0)
            | 1;
        self.newest_round = round;
        self.heard_at = Some(now);
    }

    /// A round trip was measured; smoothed like TCP's, one eighth of the new value. Its variation is smoothed
    /// as RFC 3550 does (section 6.4.1, appendix A.8): a sixteenth of the difference of two that follow each
    /// other. There it is the transit time of packets one way; the difference of round trips needs no time
    /// stamps of the other machine.
    pub(crate) fn measured(&mut self, round_trip: Duration) {
        let sample = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX);
        self.round_trip_us = Some(match self.round_trip_us {
            None => sample,
            Some(old) => old - old / 8 + sample / 8,
        });
        if let Some(last) = self.last_round_trip_us {
            // Bounded so that sixteen times it fits.
            let difference = sample.abs_diff(last).min(u32::MAX >> 5);
            let known = self.jitter_16.unwrap_or(0);
            self.jitter_16 = Some(known - ((known + 8) >> 4) + difference);
        }
        self.last_round_trip_us = Some(sample);
    }

    /// How long it may be silent before it is down.
    fn patience(&self, timing: &Timing) -> Duration {
        timing.suspect + timing.heartbeat * self.every.saturating_sub(1)
    }

    /// When it counts as down if nothing arrives; `base`: when the timers last started anew.
    pub(crate) fn down_at(&self, base: Time, timing: &Timing) -> Time {
        if self.up {
            self.heard_at.map_or(base, |at| at.max(base)) + self.patience(timing)
        } else {
            Time::NEVER
        }
    }

    /// Judges whether heartbeats arrive.
    pub(crate) fn judge_up(&mut self, now: Time, base: Time, timing: &Timing) {
        self.up = self.heard_at.is_some_and(|at| {
            let from = if self.up { at.max(base) } else { at };
            now.since(from) < self.patience(timing)
        });
    }

    /// When silence becomes a trouble of the path; `base`: since when the peer is alive, or the timers last
    /// started anew.
    pub(crate) fn trouble_at(&self, base: Time, timing: &Timing) -> Time {
        if self.trouble == Some(PathTrouble::Down) {
            return Time::NEVER;
        }
        let from = self.heard_at.map_or(base, |at| at.max(base));
        from.max(self.since) + timing.dead
    }

    /// Judges what is wrong with it while the peer is alive. Returns whether that changed.
    pub(crate) fn judge_trouble(
        &mut self,
        now: Time,
        base: Time,
        peer_newest: u64,
        timing: &Timing,
    ) -> bool {
        let (due, loss) = self.loss(peer_newest);
        // The silence that a cut begins with is no loss: it is told as what it is.
        let lossy = loss >= LOSS_RAISED && self.up;
        let next = match self.trouble {
            _ if now >= self.trouble_at(base, timing) => Some(PathTrouble::Down),
            Some(PathTrouble::Down) if !self.up || due < STEADY => Some(PathTrouble::Down),
            Some(PathTrouble::Down) if lossy && due < COUNTED_MIN => Some(PathTrouble::Down),
            Some(PathTrouble::Loss) if loss > LOSS_OVER => Some(PathTrouble::Loss),
            Some(PathTrouble::Down) | None if lossy && due >= COUNTED_MIN => {
                Some(PathTrouble::Loss)
            }
            Some(_) | None => None,
        };
        let changed = next != self.trouble;
        self.trouble = next;
        changed
    }

    /// `peer_newest`: the peer's newest round that arrived on any path.
    pub(crate) fn status(&self, name: &str, peer_newest: u64) -> PathStatus {
        PathStatus {
            name: name.to_owned(),
            up: self.up,
            round_trip_us: self.round_trip_us,
            jitter_us: self.jitter_16.map(|jitter| jitter >> 4),
            loss_percent: self.loss_percent(peer_newest),
            trouble: self.trouble,
        }
    }

    pub(crate) fn loss_percent(&self, peer_newest: u64) -> u8 {
        if self.up {
            self.loss(peer_newest).1
        } else {
            100
        }
    }

    /// How many of the newest heartbeats are counted, and how many of them are missing, in percent.
    fn loss(&self, peer_newest: u64) -> (u64, u8) {
        if self.first == 0 {
            return (0, 100);
        }
        let newest_here = self.number(self.newest_round);
        let newest = self.number(peer_newest).max(newest_here);
        let due = (newest + 1 - self.first).min(WINDOW);
        // Heartbeats whose rounds arrived elsewhere since the newest one here count as missed here.
        let behind = newest - newest_here;
        let Some(seen_bits) = due.checked_sub(behind).filter(|bits| *bits > 0) else {
            return (due, 100);
        };
        let mask = u128::MAX >> (128 - seen_bits);
        let missed = due - u64::from((self.arrived & mask).count_ones());
        (due, u8::try_from(missed * 100 / due).unwrap_or(100))
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::Sensitivity;

    use super::*;

    const NORMAL: Timing = Sensitivity::Normal.timing();

    fn up(every: u32) -> Path {
        Path {
            up: true,
            ..Path::new(every, Time::ZERO)
        }
    }

    fn ms(value: u64) -> Time {
        Time(value * 1_000_000)
    }

    #[test]
    fn loss_counts_gaps_and_what_came_on_other_paths() {
        let mut path = up(1);
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

    /// Rounds in which nothing goes over a slow line are not lost there.
    #[test]
    fn a_slow_line_loses_only_what_was_due_on_it() {
        let mut path = up(2);
        for round in (10..=60).step_by(2) {
            path.arrived(Time(0), round);
            assert_eq!(path.loss_percent(round + 1), 0, "{round}");
        }
        for round in (64..=208).step_by(4) {
            path.arrived(Time(0), round);
        }
        assert_eq!(path.loss_percent(208), 37);
        // The patience is as much longer.
        path.heard_at = Some(ms(0));
        assert_eq!(path.down_at(Time::ZERO, &NORMAL), ms(400));
    }

    #[test]
    fn the_round_trip_and_its_variation_are_smoothed() {
        let mut path = up(1);
        path.measured(Duration::from_micros(800));
        let status = path.status("lan", 0);
        assert_eq!((status.round_trip_us, status.jitter_us), (Some(800), None));
        path.measured(Duration::from_micros(1600));
        let status = path.status("lan", 0);
        assert_eq!(
            (status.round_trip_us, status.jitter_us),
            (Some(900), Some(50))
        );
        // Ever the same difference: the jitter comes near it. Then none: it fades.
        for _ in 0..100 {
            path.measured(Duration::from_micros(800));
            path.measured(Duration::from_micros(1600));
        }
        let jitter = path.status("lan", 0).jitter_us.unwrap();
        assert!((780..=800).contains(&jitter), "{jitter}");
        for _ in 0..100 {
            path.measured(Duration::from_micros(1600));
        }
        assert!(path.status("lan", 0).jitter_us.unwrap() < 5);
        path.measured(Duration::from_secs(100_000));
        path.measured(Duration::ZERO);
        assert!(path.status("lan", 0).jitter_us.unwrap() > 1_000_000);
    }

    /// Plays a second of ten rounds, of which `lost` don't arrive here; the peer is alive by another path.
    struct Play {
        path: Path,
        round: u64,
        told: Vec<Option<PathTrouble>>,
    }

    impl Play {
        fn new() -> Self {
            Self {
                path: Path::new(1, Time::ZERO),
                round: 0,
                told: Vec::new(),
            }
        }

        fn rounds(&mut self, count: u64, arrives: impl Fn(u64) -> bool) {
            for _ in 0..count {
                self.round += 1;
                let now = ms(self.round * 100);
                if arrives(self.round) {
                    self.path.arrived(now, self.round);
                }
                self.path.judge_up(now, Time::ZERO, &NORMAL);
                if self
                    .path
                    .judge_trouble(now, Time::ZERO, self.round, &NORMAL)
                {
                    self.told.push(self.path.trouble);
                }
            }
        }
    }

    #[test]
    fn a_path_that_is_cut_is_told_once_and_when_it_is_back_to_stay() {
        let mut play = Play::new();
        play.rounds(100, |_| true);
        play.rounds(9, |_| false);
        assert!(!play.path.up);
        assert_eq!(play.told, [], "a short silence is no alarm");
        play.rounds(200, |_| false);
        assert_eq!(play.told, [Some(PathTrouble::Down)]);
        play.rounds(5, |_| true);
        assert!(play.path.up);
        assert_eq!(play.told.len(), 1, "not yet for sure");
        play.rounds(10, |_| true);
        assert_eq!(play.told, [Some(PathTrouble::Down), None]);
        assert_eq!(play.path.loss_percent(play.round), 0, "the cut is past");
        // One that was never heard is down as well.
        let mut play = Play::new();
        play.rounds(20, |_| false);
        assert_eq!(play.told, [Some(PathTrouble::Down)]);
    }

    #[test]
    fn loss_is_told_and_does_not_flap() {
        let mut play = Play::new();
        play.rounds(300, |round| round % 20 != 0);
        assert_eq!(play.told, [], "5 % are no alarm");
        play.rounds(300, |round| round % 8 != 0);
        assert_eq!(play.told, [Some(PathTrouble::Loss)]);
        play.rounds(300, |round| round % 20 != 0);
        assert_eq!(play.told.len(), 1, "5 % are not the end of it");
        play.rounds(300, |round| round % 50 != 0);
        assert_eq!(play.told, [Some(PathTrouble::Loss), None]);
        // Up and down again, too short each time for a cut: loss.
        let mut play = Play::new();
        play.rounds(300, |round| round % 10 < 5);
        assert_eq!(play.told, [Some(PathTrouble::Loss)]);
        // Cut and back, but bad: it is not in order.
        let mut play = Play::new();
        play.rounds(50, |_| true);
        play.rounds(50, |_| false);
        play.rounds(200, |round| round % 4 != 0);
        assert_eq!(
            play.told,
            [Some(PathTrouble::Down), Some(PathTrouble::Loss)]
        );
    }
}
