//! Answers of the daemon as text for people. Pure: the time is passed in.

use relevo_server::api::LossStatus;

mod fence;
mod lists;
mod metadata;
mod status;
#[cfg(test)]
mod tests;
mod why;

pub use fence::{
    fence_agent, fence_agents, fence_device, fence_devices, fence_history, fence_outlook,
    fence_power,
};
pub use lists::{event_line, path_list, saved_list, service_list, volume_list};
pub use metadata::metadata;
pub use status::status;
pub use why::{what_if, why};

/// What may be lost by a decision, for whoever is asked to confirm it.
#[must_use]
pub fn loss(loss: &LossStatus) -> String {
    let mut text = format!(
        "Volume {}: the replica on {} is kept.\n",
        loss.volume, loss.node
    );
    for known in &loss.known {
        text.push_str(&format!("  - {known}\n"));
    }
    for warning in &loss.warnings {
        text.push_str(&format!("  ! {warning}\n"));
    }
    text
}

/// A length of time in words: `0.3 s`, `42 s`, `5 min`, `3 h 20 min`, `4 d 2 h`.
#[must_use]
pub fn duration_words(ms: u64) -> String {
    const SECOND: u64 = 1000;
    const MINUTE: u64 = 60 * SECOND;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| {
        if small == 0 {
            format!("{big} {big_unit}")
        } else {
            format!("{big} {big_unit} {small} {small_unit}")
        }
    };
    match ms {
        0..10_000 => format!("{}.{} s", ms / SECOND, ms % SECOND / 100),
        10_000..MINUTE => format!("{} s", ms / SECOND),
        MINUTE..HOUR => two(ms / MINUTE, "min", ms % MINUTE / SECOND, "s"),
        HOUR..DAY => two(ms / HOUR, "h", ms % HOUR / MINUTE, "min"),
        DAY.. => two(ms / DAY, "d", ms % DAY / HOUR, "h"),
    }
}

/// How long ago a moment was, for a clock that may have been set since.
fn age(now_unix_ms: u64, then_unix_ms: u64) -> String {
    duration_words(now_unix_ms.saturating_sub(then_unix_ms))
}

/// A moment of the day, UTC: `12:34:56.789`.
fn clock(unix_ms: u64) -> String {
    let of_day = unix_ms % 86_400_000;
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        of_day / 3_600_000,
        of_day / 60_000 % 60,
        of_day / 1000 % 60,
        of_day % 1000
    )
}
