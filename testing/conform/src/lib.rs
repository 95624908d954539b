//! Foreign judges: programs that others wrote to speak or to check the protocols that Relevo
//! speaks. All of it is in `tests/`; a judge that is not installed is named as skipped, and with
//! `RELEVO_REQUIRE_ALL=1` that is a failure.
