//! Membership: who is alive, and who may act.
//!
//! A sans-IO state machine per node. It sends heartbeats on every path to every member, judges
//! silence, grants leases to others and counts what others grant to this node. `node` owns it;
//! the daemon's heartbeat thread and the simulator carry the heartbeats.
//!
//! # The lease rule
//!
//! A heartbeat carries its sender's lease generation. A voter that receives it *grants* the sender
//! the lease for the dead time from the moment of receipt, unless it has *condemned* that
//! generation, and says so in its own next heartbeat by echoing the number of the newest heartbeat
//! it granted. The holder has the lease until `sent + Timing::lease` of the heartbeat that a
//! majority of the voters (itself among them) echoed or surpassed.
//!
//! A voter that heard nothing from a node on any path for the dead time (so that its last grant is
//! over) condemns the node's generation: durably first ([`Effect::PersistCondemned`]), then it
//! says so in its heartbeats. It never grants that generation again. When a majority of the voters
//! condemned a generation, no majority can grant it: any two majorities share a voter. That is the
//! proof with which the node is evicted, whatever its clock or network does. The control log lets
//! it back in under the next generation.
//!
//! # What counts as heard
//!
//! Only a heartbeat whose sender says that it hears this node, too. A node to which the way is cut
//! (it sends, and receives nothing) can learn neither of grants nor of decisions: to grant it a
//! lease is no use, and to take its heartbeats for life would leave its services stuck for ever.
//! The rule above is not weakened by this: grants are given to such heartbeats only, and silence
//! counts from the last of them.
//!
//! # After a restart or a pause
//!
//! What this node granted before a restart is forgotten, so it condemns nobody before it ran for
//! the dead time; a majority's promises hold across restarts of its members because what was
//! condemned is on stable storage. After a pause of this process the heartbeats of the meantime
//! wait in a socket's buffer: the timers of silence start anew. A lease needs no such care: it
//! counts from when the heartbeats were sent.

pub mod io;
mod lease;
mod machine;
mod path;
mod peer;
#[cfg(test)]
mod tests;

pub use io::{
    Effect, Heartbeat, Input, Liveness, MemberConfig, PathConfig, PathEcho, PathStatus,
    PathTrouble, PeerEcho, ROUNDS_MAX, Voters, rounds_per_heartbeat,
};
pub use machine::{Membership, PeerStatus, Status};
