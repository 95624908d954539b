//! The running parts of a member: see [`crate::cluster`] for how they fit together.
//!
//! * [`node_loop`]: the node manager on its thread; [`hands`]: what its effects do.
//! * [`volumes`]: this node's replicas, one [`volume_worker`] (with its [`mailbox`]) and one data thread each;
//!   [`exports`]: how applications here reach them; [`links`]: connections between replicas.
//! * [`parts`]: the parts of services. [`words`]: what people are told.

pub(crate) mod changes;
mod exports;
pub(crate) mod hands;
pub(crate) mod links;
pub(crate) mod mailbox;
pub(crate) mod node_loop;
pub(crate) mod parts;
pub(crate) mod paths;
pub(crate) mod volume_worker;
pub(crate) mod volumes;
pub(crate) mod words;
