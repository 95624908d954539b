//! The kinds of fault that a run injects. What each does is in `cluster::trouble`.

/// A fault, or something that an operator does at a bad time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// The daemon of a node dies; its kernel lives.
    CrashProcess,
    /// A node loses power.
    LosePower,
    /// All data nodes lose power at once.
    LosePowerEverywhere,
    /// A node crashes after the next few effects of its engine.
    CrashSoon,
    /// A node's process is stopped for a while; its clock goes on.
    Pause,
    /// A node is cut off from all others.
    Isolate,
    /// What one node sends to another one does not arrive for a while.
    CutOneWay,
    /// Two data nodes lose each other; the rest sees both.
    CutPair,
    /// The primary is cut off from heartbeats and log while its replication lives, except perhaps to
    /// one peer: it is replaced and goes on writing to the others.
    Zombie,
    /// The connection of two data nodes breaks.
    BreakLink,
    /// A disk fails one operation.
    DiskError,
    /// A disk takes its time.
    DiskStall,
    /// A node can't reach the control log.
    LogAway,
    /// A planned switchover.
    Switchover,
    /// A secondary's daemon is stopped in an orderly way and started again.
    Restart,
    /// An operator asks for the service to be on another node. Layer 2 only.
    MoveService,
    /// A path of heartbeats fails, or one node's end of it, while the others hold. Layer 2 only.
    CutPath,
    /// An operator suspends I/O or disconnects a replica for a while.
    Orders,
    /// An operator removes a replica and adds it again, empty.
    Replicas,
}

impl Fault {
    /// Every kind of layer 1.
    pub const ALL: &'static [Self] = &[
        Self::CrashProcess,
        Self::LosePower,
        Self::LosePowerEverywhere,
        Self::CrashSoon,
        Self::Pause,
        Self::Isolate,
        Self::CutOneWay,
        Self::CutPair,
        Self::Zombie,
        Self::BreakLink,
        Self::DiskError,
        Self::DiskStall,
        Self::LogAway,
        Self::Switchover,
        Self::Restart,
        Self::Orders,
        Self::Replicas,
    ];
}

impl std::str::FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = |fault: &Self| format!("{fault:?}");
        Self::ALL
            .iter()
            .chain([&Self::MoveService, &Self::CutPath])
            .find(|fault| name(fault) == text)
            .copied()
            .ok_or_else(|| {
                let names: Vec<String> = Self::ALL.iter().map(name).collect();
                format!("`{text}` is none of {}", names.join(", "))
            })
    }
}
