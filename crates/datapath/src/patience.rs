//! How long a volume's thread looks for events before it goes to sleep.
//!
//! Going to sleep and being woken lies on the way of a write four times, and takes some ten microseconds each time on
//! a machine, more on a virtual one, whose idle processors are given back to the host. So while waits are that short
//! anyway, the thread looks again and again instead, as hypervisors do for their guests (`halt_poll_ns` of Linux's KVM).
//! An idle volume costs nothing by it: the first longer wait ends it.

use std::{num::NonZero, thread, time::Duration};

use relevo_types::Time;

/// Beside a longer wait the cost of sleeping does not matter.
const MAX: Duration = Duration::from_micros(100);

/// The first budget.
const START: Duration = Duration::from_micros(20);

/// Between two looks passes less than this, unless somebody else had the core.
const AWAY: Duration = Duration::from_micros(30);

/// So many waits are slept through when somebody else wanted the core.
const MODEST: u32 = 64;

/// See the module.
#[derive(Debug)]
pub(crate) struct Patience {
    /// There is another core for those who are waited for.
    allowed: bool,
    /// Look for that long.
    budget: Duration,
    /// Waits that are still slept through.
    modest: u32,
}

/// One wait.
#[derive(Debug)]
pub(crate) struct Wait {
    begun: Time,
    looked: Time,
    budget: Duration,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self::of(thread::available_parallelism().map_or(1, NonZero::get))
    }

    const fn of(cores: usize) -> Self {
        Self {
            allowed: cores > 1,
            budget: Duration::ZERO,
            modest: 0,
        }
    }

    /// A wait begins.
    pub(crate) fn begin(&mut self, now: Time) -> Wait {
        let budget = if self.modest > 0 {
            self.modest -= 1;
            Duration::ZERO
        } else {
            self.budget
        };
        Wait {
            begun: now,
            looked: now,
            budget,
        }
    }

    /// Whether to look (again) instead of sleeping.
    pub(crate) fn looks(&mut self, wait: &mut Wait, now: Time) -> bool {
        if now.since(wait.looked) > AWAY {
            self.modest = MODEST;
            return false;
        }
        wait.looked = now;
        now.since(wait.begun) < wait.budget
    }

    /// A wait that was slept through at its end is over.
    pub(crate) fn slept(&mut self, wait: &Wait, now: Time) {
        let waited = now.since(wait.begun);
        if waited > MAX || !self.allowed {
            self.budget = Duration::ZERO;
        } else if waited > self.budget {
            self.budget = (self.budget * 2).clamp(START, MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One wait whose event comes after `micros`, looked for every microsecond. Returns for how long it was looked.
    fn wait(patience: &mut Patience, micros: u64) -> u64 {
        let at = |micros: u64| Time(micros * 1000);
        let mut wait = patience.begin(at(0));
        for now in 0.. {
            if !patience.looks(&mut wait, at(now)) {
                patience.slept(&wait, at(micros));
                return now;
            }
            if now == micros {
                return now;
            }
        }
        unreachable!()
    }

    #[test]
    fn short_waits_are_looked_through_soon_and_a_long_one_ends_that() {
        let mut patience = Patience::of(2);
        let looked: Vec<_> = (0..6).map(|_| wait(&mut patience, 70)).collect();
        assert_eq!(looked, [0, 20, 40, 70, 70, 70]);
        assert_eq!(wait(&mut patience, 5000), 80);
        assert_eq!(wait(&mut patience, 5000), 0);
        assert_eq!(wait(&mut patience, 101), 0);
        assert_eq!(wait(&mut patience, 100), 0);
        assert_eq!(wait(&mut patience, 100), 20);
    }

    #[test]
    fn who_lost_the_core_meanwhile_is_modest() {
        let mut patience = Patience::of(2);
        for _ in 0..4 {
            wait(&mut patience, 70);
        }
        let mut one = patience.begin(Time(0));
        assert!(patience.looks(&mut one, Time(1000)));
        assert!(!patience.looks(&mut one, Time(40_000)));
        patience.slept(&one, Time(50_000));
        for _ in 0..MODEST {
            assert_eq!(wait(&mut patience, 70), 0);
        }
        assert_eq!(wait(&mut patience, 70), 70);
    }

    #[test]
    fn on_a_single_core_nobody_is_kept_waiting() {
        let mut patience = Patience::of(1);
        assert!((0..10).all(|_| wait(&mut patience, 30) == 0));
    }
}
