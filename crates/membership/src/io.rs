//! The border of the membership machine.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{Instance, LeaseGeneration, NodeId, Time, Timing};
use serde::{Deserialize, Serialize};

/// What the machine knows of the members, from the control log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberConfig {
    /// The paths on which the member can be reached from this node.
    pub paths: Vec<PathConfig>,
    /// The generation under which it may hold a lease.
    pub generation: LeaseGeneration,
    /// That generation was taken from it.
    pub evicted: bool,
    /// Its grants and condemnations count.
    pub voter: bool,
}

/// A path to a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathConfig {
    /// Its name.
    pub name: String,
    /// A heartbeat goes over it in every so many rounds, 1 or more: in those whose number is a multiple of it.
    /// More than 1 where the line is too slow for more; both ends must say the same. See
    /// [`rounds_per_heartbeat`].
    pub every: u32,
}

/// In every how many rounds a line has room for a heartbeat of a cluster with so many members; 1 where no bound
/// of the line is known. More than [`ROUNDS_MAX`] means that the line is too slow for these time-outs.
#[must_use]
pub fn rounds_per_heartbeat(bytes_per_second: Option<u32>, members: usize, timing: &Timing) -> u32 {
    let Some(rate) = bytes_per_second else {
        return 1;
    };
    let bytes = HEARTBEAT_BYTES + PEER_ECHO_BYTES * members.saturating_sub(1);
    let needed_us = (bytes as u128 * 1_000_000).div_ceil(u128::from(rate.max(1)));
    let rounds = needed_us.div_ceil(timing.heartbeat.as_micros().max(1));
    u32::try_from(rounds).unwrap_or(u32::MAX).max(1)
}

/// A path on which a heartbeat goes in fewer rounds can't tell life from silence: the suspect time is three
/// rounds long.
pub const ROUNDS_MAX: u32 = 2;

/// A heartbeat in a frame of a stream, without what it says of others, and what it says of one more; in bytes,
/// with numbers as large as they get in a year.
const HEARTBEAT_BYTES: usize = 58;
const PEER_ECHO_BYTES: usize = 20;

/// Which change of who votes a node knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Voters {
    /// The one that the members are of.
    pub known: u64,
    /// The newest one that this node ever knew, durably, also before a restart: at least `known`. It is told
    /// in heartbeats.
    pub told: u64,
}

/// What happens to the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// The members by the control log, this node among them.
    Members {
        /// Who they are.
        members: BTreeMap<NodeId, MemberConfig>,
        /// The number of the voters among them ([`Voters`]).
        voters: Voters,
    },
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
    /// A path to a member that is alive has a trouble, or has none any more.
    Path {
        /// The member.
        node: NodeId,
        /// Name of the path.
        path: String,
        /// What is wrong with it; `None`: it is in order again.
        trouble: Option<PathTrouble>,
        /// Heartbeats missed lately, in percent.
        loss_percent: u8,
    },
    /// A majority of the voters has known this change of who votes for the dead time: the next one may follow.
    VotersSettled(u64),
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
    /// The newest change of who votes that the sender knows: who knows less may not count its grant.
    pub voters: u64,
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

/// What is wrong with a path to a member that is alive. An alarm: nothing moves for it.
///
/// When everything is silent the member is, not its paths; so there is none of a member that is not alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathTrouble {
    /// It was silent for the dead time. Over when ten heartbeats arrived since, most of them.
    Down,
    /// Of the last 100 heartbeats, or of 50 at least, 10 % or more did not arrive. Over at 3 % or less.
    Loss,
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
    /// Smoothed variation of the round trip in microseconds; `None` before the second.
    pub jitter_us: Option<u32>,
    /// Heartbeats missed of the last 100, in percent.
    pub loss_percent: u8,
    /// What is wrong with it.
    pub trouble: Option<PathTrouble>,
}
