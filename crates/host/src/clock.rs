//! The one clock of the drivers.

use relevo_types::Time;

/// The current moment of this machine, suspend included (`CLOCK_BOOTTIME`).
#[must_use]
pub fn now() -> Time {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // The kernel's boot time is never negative and below 584 years.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    Time(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[test]
    fn it_moves_forward_by_what_was_slept() {
        let before = super::now();
        std::thread::sleep(Duration::from_millis(20));
        let passed = super::now().since(before);
        assert!(passed >= Duration::from_millis(20), "{passed:?}");
        assert!(passed < Duration::from_secs(20), "{passed:?}");
    }
}
