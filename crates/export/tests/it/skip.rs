//! Tests that need what not every machine has.

/// Says that a test can't run here; with `RELEVO_REQUIRE_ALL=1` it fails instead.
pub(crate) fn skip(name: &str, why: &str) {
    let required = std::env::var_os("RELEVO_REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "{name} can't run here: {why}");
    println!("SKIPPED {name}: {why}");
}

/// Whether block devices can be made; says so when not.
pub(crate) fn no_devices(name: &str) -> bool {
    match relevo_export::device::probe() {
        Ok(()) => false,
        Err(why) => {
            skip(name, &why);
            true
        }
    }
}
