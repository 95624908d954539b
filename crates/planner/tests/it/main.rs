//! Tests of the planner: golden scenarios, and properties over random clusters.

mod idempotent;
mod scenario;
mod world;
