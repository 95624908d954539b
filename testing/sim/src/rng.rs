//! The one source of chance of a run. Every decision of the simulator is drawn from here, so a
//! seed gives the same run again.

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Rng(Pcg64Mcg);

impl Rng {
    /// The stream of a concern within a run: streams of one seed do not disturb each other, so
    /// that another fault schedule leaves the workload as it was.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(Pcg64Mcg::seed_from_u64(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03),
        ))
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: f64) -> bool {
        self.0.random_bool((percent / 100.0).clamp(0.0, 1.0))
    }

    /// A number below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.0.random_range(0..n) }
    }

    /// An index below `n`; 0 when `n` is 0.
    pub fn index(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { self.0.random_range(0..n) }
    }

    /// A number in `lo..=hi`.
    pub fn between(&mut self, lo: u64, hi: u64) -> u64 {
        self.0.random_range(lo..=hi.max(lo))
    }

    /// A time between two.
    pub fn time(&mut self, lo: Duration, hi: Duration) -> Duration {
        Duration::from_nanos(self.between(nanos(lo), nanos(hi)))
    }

    /// A time between two numbers of microseconds.
    pub fn micros(&mut self, lo: u64, hi: u64) -> Duration {
        Duration::from_micros(self.between(lo, hi))
    }

    /// A time between two numbers of milliseconds.
    pub fn millis(&mut self, lo: u64, hi: u64) -> Duration {
        Duration::from_micros(self.between(lo * 1000, hi * 1000))
    }

    /// A time between two numbers of milliseconds, short ones as often as long ones are rare: each
    /// order of magnitude is equally likely. Trouble that lasts a few milliseconds falls between two
    /// steps of a protocol, trouble that lasts a second outlasts its time-outs; both are wanted.
    pub fn spread_millis(&mut self, lo: u64, hi: u64) -> Duration {
        let (lo, hi) = ((lo.max(1) * 1000) as f64, (hi.max(1) * 1000) as f64);
        let share = self.0.random::<f64>();
        Duration::from_secs_f64(lo * (hi / lo).powf(share) / 1e6)
    }

    /// 64 random bits, not 0.
    pub fn id(&mut self) -> u64 {
        self.0.random::<u64>() | 1
    }

    /// One of a list that must not be empty.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.index(list.len())]
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
