//! Tests of the node manager: whole clusters of them with an instant control log.

mod cluster;
mod failover;
mod services;
mod shutdown;
