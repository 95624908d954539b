//! How fast a resync goes: bytes a second over the last few seconds.

use std::{collections::VecDeque, time::Duration};

use relevo_types::Time;

/// One part of what is looked back on.
const SLICE: Duration = Duration::from_millis(500);

/// So many parts: three seconds. Shorter and the number jumps; longer and a resync that stands still seems to
/// go on.
const SLICES: u32 = 6;

/// Counts bytes and tells their speed.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Begin of a part and the bytes in it, the oldest first.
    slices: VecDeque<(Time, u64)>,
}

impl Meter {
    pub(crate) fn add(&mut self, now: Time, bytes: u64) {
        self.settle(now);
        match self.slices.back_mut() {
            Some((since, sum)) if now < *since + SLICE => *sum += bytes,
            _ => self.slices.push_back((now, bytes)),
        }
    }

    /// Forgets what is too old.
    pub(crate) fn settle(&mut self, now: Time) {
        while self
            .slices
            .front()
            .is_some_and(|(since, _)| now >= *since + SLICE * SLICES)
        {
            self.slices.pop_front();
        }
    }

    /// Bytes a second; 0 when nothing was counted for a while.
    pub(crate) fn speed(&self, now: Time) -> u64 {
        let Some((first, _)) = self.slices.front() else {
            return 0;
        };
        let bytes: u64 = self.slices.iter().map(|(_, sum)| sum).sum();
        // Of a resync that just began less than a part is known: no wild guesses.
        let over = now.since(*first).max(SLICE);
        let millis = u64::try_from(over.as_millis()).unwrap_or(u64::MAX);
        bytes.saturating_mul(1000) / millis.max(1)
    }

    /// When the speed is another one although nothing happens.
    pub(crate) fn deadline(&self, now: Time) -> Time {
        if self.slices.is_empty() {
            Time::NEVER
        } else {
            now + SLICE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time(5_000_000_000) + Duration::from_millis(ms)
    }

    #[test]
    fn a_steady_stream_has_its_speed() {
        let mut meter = Meter::default();
        assert_eq!(meter.speed(at(0)), 0);
        for step in 0..100 {
            meter.add(at(step * 100), 1000);
        }
        let speed = meter.speed(at(10_000));
        assert!((9_000..=11_000).contains(&speed), "{speed}");
    }

    #[test]
    fn what_stands_still_gets_slower_until_it_is_zero() {
        let mut meter = Meter::default();
        meter.add(at(0), 1 << 20);
        let mut last = u64::MAX;
        for step in 1..6 {
            let now = at(step * 500);
            meter.settle(now);
            let speed = meter.speed(now);
            assert!(speed <= last && speed > 0, "{speed} after {step} steps");
            assert_eq!(meter.deadline(now), now + SLICE);
            last = speed;
        }
        meter.settle(at(3000));
        assert_eq!(meter.speed(at(3000)), 0);
        assert_eq!(meter.deadline(at(3000)), Time::NEVER);
    }
}
