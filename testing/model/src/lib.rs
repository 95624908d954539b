//! The replication protocol of `docs/protocol.md` as a model: small enough that every state within
//! its bounds is visited. The simulator tries the product at random and deeply; this tries the
//! protocol completely and narrowly. What is left out stands in `docs/protocol.md`, "The model".
//!
//! [`explore`] knows nothing of replication; [`state`] is what there is, [`node`] what a replica does
//! with a message, [`steps`] what may happen next, [`checks`] what must always be true.

pub mod bugs;
pub mod checks;
pub mod explore;
pub mod node;
pub mod pack;
pub mod receive;
pub mod state;
pub mod steps;
