//! Time as the cores see it: a number that is passed in.

use std::{fmt, ops, time::Duration};

use serde::{Deserialize, Serialize};

/// A moment of one machine's monotonic clock that also counts suspend (`CLOCK_BOOTTIME`), in
/// nanoseconds. Moments of two machines can't be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    /// The earliest moment.
    pub const ZERO: Self = Self(0);
    /// Later than any moment: a deadline that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// How long after `earlier` this moment is; zero when it is not after it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl ops::Add<Duration> for Time {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{:06}s",
            self.0 / 1_000_000_000,
            self.0 % 1_000_000_000 / 1000
        )
    }
}

/// How fast a silent machine is taken for dead: the one time knob of a cluster (DESIGN section 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sensitivity {
    /// Direct cables, quiet machines: dead after 400 ms.
    Fast,
    /// A LAN: dead after 1 s.
    #[default]
    Normal,
    /// WAN or overloaded machines: dead after 10 s.
    Patient,
}

/// The time-outs that follow from a [`Sensitivity`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// A heartbeat is sent on every path this often.
    pub heartbeat: Duration,
    /// Silence on all paths after which a node is *suspect*: shown, nothing moves.
    pub suspect: Duration,
    /// Silence on all paths after which a node is *dead* to this voter, which is also how long a
    /// voter's grant of the lease lasts after it was given.
    pub dead: Duration,
    /// How long the holder trusts a grant, counted from when it *sent* the heartbeat that was
    /// granted. Shorter than `dead` by a tenth, so that clocks that drift apart by up to 5 %
    /// either way can't make a holder outlive a grant.
    pub lease: Duration,
}

impl Sensitivity {
    /// The time-outs of this sensitivity.
    #[must_use]
    pub const fn timing(self) -> Timing {
        const fn timing(heartbeat: u64, suspect: u64, dead: u64) -> Timing {
            Timing {
                heartbeat: Duration::from_millis(heartbeat),
                suspect: Duration::from_millis(suspect),
                dead: Duration::from_millis(dead),
                lease: Duration::from_millis(dead / 10 * 9),
            }
        }
        match self {
            Self::Fast => timing(50, 150, 400),
            Self::Normal => timing(100, 300, 1000),
            Self::Patient => timing(1000, 3000, 10_000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_saturates() {
        assert_eq!(Time::NEVER + Duration::from_secs(1), Time::NEVER);
        assert_eq!(Time(5).since(Time(9)), Duration::ZERO);
    }
}
