//! A crash before every disk effect of a short schedule, with power and without.

use sim::{batch, enumerate};

/// Schedules; `RELEVO_SIM_CRASH_SCHEDULES` gives another number.
const SCHEDULES: u64 = 2;

#[test]
fn a_crash_at_any_disk_effect_breaks_nothing() {
    let schedules = std::env::var("RELEVO_SIM_CRASH_SCHEDULES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(SCHEDULES);
    let mut runs = 0;
    for seed in 0..schedules {
        for node in 0..2 {
            match enumerate::crash_everywhere(seed, node, 3, batch::threads()) {
                Ok(count) => runs += count,
                Err(failure) => panic!("{failure}"),
            }
        }
    }
    said::say(format_args!("{runs} crash points"));
    assert!(
        runs > 100,
        "the schedules have hardly any disk effects: {runs}"
    );
}
