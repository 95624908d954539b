//! Tests that need what not every machine has.

/// Whether block devices can be made; says so when not.
pub(crate) fn no_devices(name: &str) -> bool {
    match relevo_export::device::probe() {
        Ok(()) => false,
        Err(why) => {
            said::skip(name, why);
            true
        }
    }
}
