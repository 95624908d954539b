//! What only a laboratory sets: the simulator runs engines with a small activity log, so that
//! regions get cold within seconds, and with bugs planted on purpose, to prove that its checkers
//! see. Production engines are made by `Engine::new` and have neither; the planted bugs are
//! compiled in only with the feature `planted-bugs`.

use crate::activity::HOT_MAX;

/// Settings of an engine that production never changes.
#[derive(Clone, Copy, Debug)]
pub struct Lab {
    /// Regions that the activity log holds at most; at least 2, a write may touch two.
    pub hot_regions_max: usize,
    /// A bug.
    pub planted: Option<PlantedBug>,
}

impl Default for Lab {
    fn default() -> Self {
        Self {
            hot_regions_max: HOT_MAX,
            planted: None,
        }
    }
}

/// A bug that breaks one rule of DESIGN section 3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlantedBug {
    /// A member whose link is lost is not waited for, although its leave is not committed (rule 2).
    AckBeforeLeaveCommitted,
    /// A dirty mark is cleared when the block is sent (rule 5).
    ClearDirtyWithoutAck,
    /// A region counts as hot while its transaction is still being written (rule 6).
    SkipActivityWait,
    /// A promoted node opens without bringing the members' tails into line (rule 3).
    OpenBeforeReconcile,
    /// Messages of a primary that was replaced are not refused (rule 1).
    IgnoreLowerEpoch,
    /// A replica of protocol A joins the in-sync set, and nothing waits for it (rules 1, 4).
    AsyncCountsAsInSync,
    /// What a replica that was left behind is not sent is not marked for it (rule 5).
    AheadWithoutMarks,
    /// The acknowledgement of what was sent before a replica was left behind clears marks that were
    /// made after it (rule 5).
    AheadTrustsOldAcks,
    /// A flush does not wait for writes that were acknowledged by their receipt (rule 1).
    FlushForgetsReceived,
    /// A write that was only received counts as written everywhere: nobody remembers that a replica
    /// that crashes may lack it (rule 5).
    ReceiptSettles,
    /// A paused resync counts as done (rule 4).
    JoinWhilePaused,
    /// A write passes between reading a range for verification and sending its digests.
    VerifyOutsideGate,
    /// Who is asked for blocks that the disk here can't read need not be in sync (rule 4).
    HealFromAnybody,
    /// A history with changes of its own is overwritten although nobody decided (rule 9).
    MergeInSilence,
    /// What only the loser has is not saved before it is overwritten (rule 9).
    OverwriteWithoutSaving,
    /// What a resync compared counts as the same although it is not (rule 5).
    DifferingCountsAsSame,
    /// Marks for a replica of protocol A are forgotten before it acknowledged what they stand for (rule 5).
    GenerationDroppedEarly,
    /// What verification found is told before the log has it.
    ToldBeforeCommitted,
    /// Only who found it knows what is to be repaired.
    RepairForgotten,
    /// Who only tends the volume takes requests (rule 1: it is displaced without a proof).
    TenderTakesRequests,
}

impl Lab {
    /// Whether this bug was planted.
    pub(crate) fn has(self, bug: PlantedBug) -> bool {
        cfg!(feature = "planted-bugs") && self.planted == Some(bug)
    }
}
