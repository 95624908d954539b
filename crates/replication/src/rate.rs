//! How fast resyncs and verifications go: as fast as they can while no application asks for anything, and
//! no faster than applications bear while one does (`c-min-rate`, `c-max-rate`), or at a fixed speed
//! (`resync-rate`).
//!
//! One bucket of bytes for each volume on the primary, which all its resyncs and verifications take from.
//! How fast it fills is looked at again every [`LOOK_EVERY`]: when an application begins to ask, or its
//! writes take much longer than they lately did at best, half as fast; else an eighth faster. So what is
//! idle gets used, and a disk or line that both share is soon left to the application.
//!
//! A source reads before it sends and has bounded windows, so the reads alone need to be held.

use std::time::Duration;

use relevo_types::{NodeId, Time, cluster::options::SyncRate};

/// How often the speed is looked at. DRBD's plan has steps of 100 ms too: some round trips of any network,
/// and no time for a person.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A write is slow that takes this many times as long as they lately did at best, and
const SLOW_FACTOR: u32 = 2;

/// longer by this: one more seek, or one more flush of a fast disk.
const SLOW_EXTRA: Duration = Duration::from_millis(1);

/// After so long without any resync the speed of the last one says nothing.
const FORGET_AFTER: Duration = Duration::from_secs(1);

/// The best that is remembered is that of so many times
const BEST_SLICES: usize = 8;

/// this long: a minute in all. Longer than a resync goes on at full speed without falling back once, shorter
/// than until another load is another measure.
const BEST_SLICE: Duration = Duration::from_secs(8);

/// The bucket holds what runs in within this time.
const HOLDS: Duration = LOOK_EVERY;

/// The bucket, and what is known of the application.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    /// Bytes a second; `None`: as fast as it goes.
    limit: Option<u64>,
    /// Bytes in the bucket. What was taken last may have been more.
    left: i128,
    filled: Time,
    /// When the speed was looked at last.
    looked: Time,
    /// Since then: bytes taken,
    taken: u64,
    /// and the application's writes that were done, and what they took together.
    writes: u32,
    took: Duration,
    last_take: Time,
    /// When an application asked for something last, and whether one did when the speed was looked at.
    asked: Time,
    busy: bool,
    best: Best,
    /// Something waits for the bucket to fill.
    waits: bool,
    /// Who took from it last.
    turn: Option<NodeId>,
}

/// The shortest mean time of writes lately.
#[derive(Debug, Default)]
struct Best {
    slices: [Option<Duration>; BEST_SLICES],
    at: usize,
    since: Time,
}

impl Best {
    fn add(&mut self, now: Time, took: Duration) {
        if now >= self.since + BEST_SLICE {
            self.at = (self.at + 1) % BEST_SLICES;
            self.slices[self.at] = None;
            self.since = now;
        }
        let slice = &mut self.slices[self.at];
        *slice = Some(slice.map_or(took, |best| best.min(took)));
    }

    fn get(&self) -> Option<Duration> {
        self.slices.iter().flatten().min().copied()
    }
}

impl Rate {
    /// An application asks for something.
    pub(crate) fn app_asks(&mut self, now: Time) {
        self.asked = now;
    }

    /// A write of the application is done.
    pub(crate) fn app_wrote(&mut self, took: Duration) {
        self.writes = self.writes.saturating_add(1);
        self.took = self.took.saturating_add(took);
    }

    /// Looks at the speed if it is time. `open`: requests are under way.
    pub(crate) fn settle(&mut self, now: Time, chosen: SyncRate, open: bool) {
        self.waits = false;
        let passed = now.since(self.looked);
        if passed < LOOK_EVERY {
            return;
        }
        let limit = self.wanted(now, chosen, open, passed);
        if limit != self.limit {
            self.fill(now);
            self.limit = limit;
            self.left = self.left.min(self.holds());
        }
        self.busy = self.is_busy(now, open);
        self.looked = now;
        self.taken = 0;
        self.writes = 0;
        self.took = Duration::ZERO;
    }

    fn is_busy(&self, now: Time, open: bool) -> bool {
        open || self.asked != Time::ZERO && now < self.asked + LOOK_EVERY
    }

    fn wanted(&mut self, now: Time, chosen: SyncRate, open: bool, passed: Duration) -> Option<u64> {
        let mean = self.took.checked_div(self.writes);
        if let Some(mean) = mean {
            self.best.add(now, mean);
        }
        if chosen.fixed.is_some() {
            return chosen.fixed;
        }
        if !self.is_busy(now, open) {
            return chosen.max;
        }
        let floor = chosen.max.map_or(chosen.min, |max| max.min(chosen.min));
        if self.last_take == Time::ZERO || now >= self.last_take + FORGET_AFTER {
            return Some(floor);
        }
        let micros = passed.as_micros().max(1);
        let speed = u128::from(self.taken) * 1_000_000 / micros;
        let speed = u64::try_from(speed).unwrap_or(u64::MAX);
        let limit = self.limit.unwrap_or(u64::MAX);
        let best = self.best.get().unwrap_or_default();
        let slow = mean.is_some_and(|mean| mean > best * SLOW_FACTOR + SLOW_EXTRA);
        let next = if slow || !self.busy {
            // Of what it did: a limit that it does not reach holds nothing.
            let did = if speed > 0 { speed.min(limit) } else { limit };
            did / 2
        } else if limit / 2 > speed {
            // It needs no more, and shall not save it up.
            limit
        } else {
            limit.saturating_add(limit / 8)
        };
        Some(next.min(chosen.max.unwrap_or(u64::MAX)).max(floor))
    }

    /// What the bucket holds at most.
    fn holds(&self) -> i128 {
        let limit = i128::from(self.limit.unwrap_or(0));
        limit * i128::try_from(HOLDS.as_millis()).unwrap_or(0) / 1000
    }

    fn fill(&mut self, now: Time) {
        let Some(limit) = self.limit.filter(|limit| *limit > 0) else {
            self.filled = now;
            self.left = 0;
            return;
        };
        let passed = now.since(self.filled).as_nanos();
        let bytes = passed.saturating_mul(u128::from(limit)) / 1_000_000_000;
        if bytes > 0 {
            // Only the time that these bytes took: who looks often loses nothing.
            let nanos = bytes.saturating_mul(1_000_000_000) / u128::from(limit);
            self.filled =
                self.filled + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            let sum = self
                .left
                .saturating_add(i128::try_from(bytes).unwrap_or(i128::MAX));
            self.left = sum.min(self.holds());
        }
    }

    /// Whether something may be read. If not, and if there is something, call [`Self::wait`].
    pub(crate) fn may(&mut self, now: Time) -> bool {
        if self.limit.is_none() {
            return true;
        }
        self.fill(now);
        self.left > 0
    }

    /// Something is to be read when the bucket is not empty any more.
    pub(crate) fn wait(&mut self) {
        self.waits = true;
    }

    /// So much is read, for this peer. The bucket then lacks what it had not.
    pub(crate) fn take(&mut self, now: Time, peer: NodeId, bytes: u64) {
        self.taken = self.taken.saturating_add(bytes);
        self.last_take = now;
        self.turn = Some(peer);
        if self.limit.is_some() {
            self.left -= i128::from(bytes);
        }
    }

    /// Who took from it last, if it is not enough for all.
    pub(crate) fn turn(&self) -> Option<NodeId> {
        self.turn.filter(|_| self.limit.is_some())
    }

    /// Bytes a second that it is held to.
    pub(crate) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// When there is something in the bucket, or its speed is another one, if anybody waits for that.
    pub(crate) fn deadline(&self) -> Time {
        let Some(limit) = self.limit.filter(|limit| *limit > 0 && self.waits) else {
            return Time::NEVER;
        };
        let lacks = u128::try_from(1 - self.left.min(0)).unwrap_or(1);
        let nanos = lacks
            .saturating_mul(1_000_000_000)
            .div_ceil(u128::from(limit));
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        let full = self.filled + Duration::from_nanos(nanos);
        full.min(self.looked + LOOK_EVERY)
    }

    /// Nothing is read any more: the reign is over.
    pub(crate) fn rest(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId(2);
    const MIB: u64 = 1 << 20;
    const CHUNK: u64 = 128 << 10;
    /// Of the bench: small beside what its disk does in a millisecond.
    const PIECE: u64 = 16 << 10;

    /// A resync that always has something to copy, at most so fast, and an application.
    struct Bench {
        rate: Rate,
        chosen: SyncRate,
        now: Time,
        /// Bytes a second that the disk can do.
        disk: u64,
    }

    impl Bench {
        fn new(chosen: SyncRate) -> Self {
            Self {
                rate: Rate::default(),
                chosen,
                now: Time(7_000_000_000),
                disk: 100 * MIB,
            }
        }

        /// Bytes that were copied in so many milliseconds. The application writes each millisecond, and
        /// that takes `write`; `None`: it does nothing.
        fn run(&mut self, ms: u64, write: impl Fn(u64) -> Option<Duration>) -> u64 {
            let mut copied = 0;
            let mut slice = 0;
            for _ in 0..ms {
                self.now = self.now + Duration::from_millis(1);
                if let Some(took) = write(slice) {
                    self.rate.app_asks(self.now);
                    self.rate.app_wrote(took);
                }
                self.rate.settle(self.now, self.chosen, false);
                let mut room = self.disk / 1000;
                while room >= PIECE {
                    if !self.rate.may(self.now) {
                        self.rate.wait();
                        assert!(self.rate.deadline() > self.now);
                        assert!(self.rate.deadline() <= self.now + LOOK_EVERY);
                        break;
                    }
                    self.rate.take(self.now, PEER, PIECE);
                    copied += PIECE;
                    slice += PIECE;
                    room -= PIECE;
                }
                slice = slice * 99 / 100;
            }
            copied
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn quick(_: u64) -> Option<Duration> {
        Some(Duration::from_micros(300))
    }

    fn near(bytes: u64, mib: u64) -> bool {
        (mib * MIB * 8 / 10..=mib * MIB * 12 / 10).contains(&bytes)
    }

    #[test]
    fn without_an_application_it_is_held_by_nothing_but_c_max_rate() {
        let mut bench = Bench::new(SyncRate::default());
        assert!(bench.run(1000, |_| None) >= 80 * MIB);
        assert_eq!(bench.rate.limit(), None);
        let max = Some(20 * MIB);
        let mut bench = Bench::new(SyncRate {
            max,
            ..SyncRate::default()
        });
        assert!(near(bench.run(1000, |_| None), 20));
    }

    #[test]
    fn a_fixed_rate_is_kept_whatever_happens() {
        let fixed = Some(10 * MIB);
        let mut bench = Bench::new(SyncRate {
            fixed,
            ..SyncRate::default()
        });
        assert!(near(bench.run(1000, |_| None), 10));
        assert!(near(bench.run(1000, |_| Some(ms(50))), 10));
    }

    #[test]
    fn it_begins_at_the_least_where_an_application_writes_and_takes_what_is_idle() {
        let mut bench = Bench::new(SyncRate::default());
        let first = bench.run(200, quick);
        assert!(first <= 2 * MIB, "{first}");
        let later = bench.run(6000, quick);
        assert!(later > 100 * MIB, "{later}");
        // It does not save up what it can't use.
        assert!(
            bench.rate.limit().unwrap() <= 300 * MIB,
            "{:?}",
            bench.rate.limit()
        );
    }

    #[test]
    fn it_halves_when_an_application_begins_and_when_its_writes_get_slow() {
        let mut bench = Bench::new(SyncRate::default());
        bench.run(2000, |_| None);
        let with = bench.run(150, quick);
        let limit = bench.rate.limit().unwrap();
        assert!(
            (30 * MIB..70 * MIB).contains(&limit),
            "{limit} after {with}"
        );
        bench.run(2000, quick);
        // From 0.3 ms to 5 ms: down to the least.
        bench.run(2000, |_| Some(ms(5)));
        assert_eq!(bench.rate.limit(), Some(4 * MIB));
        let held = bench.run(1000, |_| Some(ms(5)));
        assert!(near(held, 4), "{held}");
        // Well again: faster again; and unbounded when nobody asks.
        assert!(bench.run(4000, quick) > 40 * MIB);
        bench.run(300, |_| None);
        assert_eq!(bench.rate.limit(), None);
    }

    /// Writes get slow when the resync takes more than 30 MiB/s: it settles around that.
    #[test]
    fn it_finds_what_the_application_leaves() {
        let mut bench = Bench::new(SyncRate::default());
        bench.run(500, quick);
        let load = |lately: u64| {
            // Of the last 100 ms or so.
            let slow = lately > 3 * MIB;
            Some(if slow {
                ms(4)
            } else {
                Duration::from_micros(300)
            })
        };
        bench.run(3000, load);
        let copied = bench.run(4000, load) / 4;
        assert!((10 * MIB..45 * MIB).contains(&copied), "{copied}");
    }

    #[test]
    fn c_max_rate_bounds_the_least_too() {
        let chosen = SyncRate {
            fixed: None,
            min: 10 * MIB,
            max: Some(2 * MIB),
        };
        let mut bench = Bench::new(chosen);
        bench.run(1000, |_| Some(ms(5)));
        let held = bench.run(1000, |_| Some(ms(50)));
        assert!(near(held, 2), "{held}");
    }

    #[test]
    fn who_looks_often_loses_nothing() {
        let fixed = Some(64 << 10);
        let mut bench = Bench::new(SyncRate {
            fixed,
            ..SyncRate::default()
        });
        let end = bench.now + Duration::from_secs(20);
        let mut copied = 0;
        while bench.now < end {
            bench.now = bench.now + Duration::from_micros(7);
            bench.rate.settle(bench.now, bench.chosen, false);
            if bench.rate.may(bench.now) {
                bench.rate.take(bench.now, PEER, CHUNK);
                copied += CHUNK;
            }
        }
        assert!((10..=12).contains(&(copied / CHUNK)), "{copied}");
    }
}
