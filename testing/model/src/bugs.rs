//! Bugs put into the model, one a run, to prove that its properties see.

/// A bug, and the rule of DESIGN section 3 or the sentence of docs/protocol.md that it breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A member without a link is not waited for, although its leave is not committed (rule 2).
    AckBeforeLeave,
    /// A mark is cleared when the block is sent (rule 5).
    ClearOnSend,
    /// What is sent and not acknowledged when a link is lost is not marked (rule 5).
    LostLinkNotMarked,
    /// A promoted node opens without bringing the tails into line (rule 3).
    OpenBeforeReconcile,
    /// Data of a primary that was replaced is not refused (rule 1).
    IgnoreLowerEpoch,
    /// A replica joins when it was sent everything, not when it has it (rule 4).
    JoinWithoutBarrier,
    /// A primary that restarted opens under its old epoch: a `Join` of its earlier life may yet be
    /// committed.
    NoFreshEpoch,
    /// At a new epoch the tail is not marked for those outside the set.
    TailNotMarked,
    /// A new member is not told what others lack.
    NoDirtyMap,
    /// What a promotion pushes is not added to the uncertain maps of those who get it.
    PushNotRemembered,
    /// A write does not name the replicas that it is not sent to, or that nobody waits for.
    NoDirtyFor,
    /// An uncertain node opens although a certain member answered.
    UncertainOpens,
    /// A node is evicted while its lease is valid (rule 8).
    LeaseNotWaitedOut,
    /// An uncertain node that is promoted does not hear the evicted members either: they leave in the
    /// same step.
    UncertainDropsEvicted,
    /// A generation of marks for a follower is forgotten before it acknowledged what they stand for
    /// (rule 5).
    GenerationDroppedEarly,
    /// A node that only tends the volume takes requests (rule 1: it is displaced without a proof).
    TenderTakesRequests,
    /// Equal epochs count as equal histories when two lineages meet (rule 9).
    EqualEpochEqualData,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::AckBeforeLeave,
        Self::ClearOnSend,
        Self::LostLinkNotMarked,
        Self::OpenBeforeReconcile,
        Self::IgnoreLowerEpoch,
        Self::JoinWithoutBarrier,
        Self::NoFreshEpoch,
        Self::TailNotMarked,
        Self::NoDirtyMap,
        Self::PushNotRemembered,
        Self::NoDirtyFor,
        Self::UncertainOpens,
        Self::LeaseNotWaitedOut,
        Self::UncertainDropsEvicted,
        Self::GenerationDroppedEarly,
        Self::TenderTakesRequests,
        Self::EqualEpochEqualData,
    ];
}
