//! The relevo binary.
fn main() {}
