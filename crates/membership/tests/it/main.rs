//! Property tests of membership: clusters of machines under faults.

mod cluster;
mod lease;
