//! The one clock of the data path.

use relevo_types::Time;
use rustix::time::{ClockId, clock_gettime};

/// The time now by `CLOCK_BOOTTIME`: monotonic, and it counts suspend, so that a machine that
/// slept finds its leases over.
#[must_use]
pub fn now() -> Time {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Time(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

#[cfg(test)]
mod tests {
    use super::now;

    #[test]
    fn time_does_not_go_back() {
        let before = now();
        assert!(before.0 > 0);
        assert!(now() >= before);
    }
}
