//! Both drivers and the life of a replica's backing, on real files.

mod drivers;
mod replicas;
mod support;
