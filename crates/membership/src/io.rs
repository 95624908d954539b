//! The border of the membership machine.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{Instance, LeaseGeneration, NodeId, Time};
use serde::{Deserialize, Serialize};

/// What the machine knows of the members, from the control log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberConfig {
    /// Names of the paths on which the member can be reached from this node, in a fixed order.
    pub paths: Vec<String>,
    /// The generation under which it may hold a lease.
    pub generation: LeaseGeneration,
    /// That generation was taken from it.
    pub evicted: bool,
    /// Its grants and condemnations count.
    pub voter: bool,
}

/// What happens to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// The members by the control log, this node among them.
    Members(BTreeMap<NodeId, MemberConfig>),
    /// A heartbeat arrived, authenticated.
    Heartbeat {
        /// Name of the path.
        path: String,
        /// The heartbeat.
        heartbeat: Heartbeat,
    },
    /// What [`Effect::PersistCondemned`] asked for is on stable storage.
    Persisted {
        /// The node.
        node: NodeId,
        /// Its generation.
        generation: LeaseGeneration,
    },
    /// Nothing happened but the time; due at `Membership::deadline`.
    Tick,
}

/// What the machine wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send a heartbeat.
    Send {
        /// To this member.
        to: NodeId,
        /// On this path.
        path: String,
        /// The heartbeat.
        heartbeat: Heartbeat,
    },
    /// Write down that this node never grants this generation again; answer with
    /// [`Input::Persisted`]. All condemned generations are given to `Membership::new` after a
    /// restart.
    PersistCondemned {
        /// The node.
        node: NodeId,
        /// Its generation.
        generation: LeaseGeneration,
    },
    /// This node's lease holds until then (an earlier moment than before when it is lost).
    LeaseUntil(Time),
    /// A member's liveness changed.
    Liveness {
        /// The member.
        node: NodeId,
        /// What it is now.
        liveness: Liveness,
        /// For people: `silent on lan and repl for 1.0 s`.
        reason: String,
    },
    /// The voters that condemned a member's generation in force, this node's word included,
    /// changed. A majority is the proof for an eviction.
    Condemned {
        /// The member.
        node: NodeId,
        /// Its generation.
        generation: LeaseGeneration,
        /// The voters.
        by: Vec<NodeId>,
    },
    /// The voters to which a member is alive now changed: this node's judgement, and what the
    /// others say in their heartbeats; the member itself is never among them.
    HeardBy {
        /// The member.
        node: NodeId,
        /// The voters.
        by: Vec<NodeId>,
    },
    /// A path to a member went up or down.
    Path {
        /// The member.
        node: NodeId,
        /// Name of the path.
        path: String,
        /// Heartbeats arrive on it.
        up: bool,
    },
    /// This process did not run for a while; it distrusted its own view.
    Paused {
        /// How long.
        pause: Duration,
    },
}

/// What a node tells another one, many times a second.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The sender.
    pub from: NodeId,
    /// Drawn when the sender's process started; a new one resets what is known of it, once it
    /// echoes a round that the former one had not.
    pub instance: Instance,
    /// Grows with every round of heartbeats of an instance; the same on all paths and to all
    /// members in one round.
    pub round: u64,
    /// The generation under which the sender asks for the lease.
    pub generation: LeaseGeneration,
    /// What the sender says of the others. The same on all paths and to all members.
    pub peers: Vec<PeerEcho>,
    /// The receiver's newest round that the sender got on this path. `None` before the first.
    pub echo: Option<PathEcho>,
}

/// What a heartbeat says of another member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerEcho {
    /// The member.
    pub node: NodeId,
    /// The member's instance that the rest is about.
    pub instance: Instance,
    /// The newest round of it that the sender granted the lease to; 0 for none.
    pub granted_round: u64,
    /// The sender got a heartbeat of that instance, on any path, within the suspect time. When a
    /// member's heartbeats arrive but say `false` of the receiver, the way to it is cut: it can't
    /// learn of grants or decisions and counts as silent.
    pub heard: bool,
    /// The sender hears that instance and is heard by it: [`Liveness::Alive`].
    pub alive: bool,
    /// The highest generation of it that the sender has durably condemned; 0 for none.
    pub condemned: LeaseGeneration,
}

/// Echo of one path: for its round-trip time, and to tell a peer's later instance from its earlier
/// one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PathEcho {
    /// The instance of the receiver whose round it is.
    pub instance: Instance,
    /// The round.
    pub round: u64,
    /// How long ago it arrived, in microseconds.
    pub held_us: u32,
}

/// What a node is to another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// Not heard since this process started.
    Unknown,
    /// Heartbeats arrive, and they say that ours arrive there.
    Alive,
    /// Silent on all paths for the suspect time: shown, nothing moves.
    Suspect,
    /// Silent on all paths for the dead time.
    Dead,
}

/// A path as `status` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PathStatus {
    /// Name.
    pub name: String,
    /// Heartbeats arrive on it.
    pub up: bool,
    /// Smoothed round trip in microseconds; `None` before the first.
    pub round_trip_us: Option<u32>,
    /// Heartbeats missed of the last 100, in percent.
    pub loss_percent: u8,
}
