//! Marks that say which interesting situations a batch of runs reached. A simulator that no longer
//! reaches them finds nothing, and says so only here: the batch test asserts that all are reached.

use std::collections::BTreeMap;

/// Every mark, with what it stands for. Asserted over a batch.
pub const ALL: &[&str] = &[
    "a write was acknowledged",
    "a replica was added to a volume in use",
    "an operator suspended I/O",
    "requests failed without a majority",
    "a read error was healed from another replica",
    "a disk that hung was given up",
    "a disk that hung while it was attached was given up",
    "a replica could not read what was compared",
    "a read error was passed on",
    "requests waited for accessible data",
    "requests failed without accessible data",
    "an operator invalidated a replica",
    "an uncertain replica was promoted with an evicted member",
    "an operator disconnected a replica",
    "an operator paused a resync",
    "a node let resyncs wait for another volume's",
    "a paused resync went on",
    "an operator verified while all was in use",
    "a verification came to its end",
    "verification found what a disk altered",
    "commit: what verification found",
    "who found what a disk altered was lost before it was repaired",
    "commit: force",
    "split brain was seen",
    "split brain was decided for the history in force",
    "split brain was decided for the other history",
    "a policy decided",
    "a history gave way",
    "a crash while a history gave way",
    "a read was held while the lease was over",
    "an unflushed write was lost with the power",
    "activity log: a region was evicted",
    "commit: join",
    "commit: leave",
    "commit: demote",
    "commit: tend",
    "resync: ended while nobody used the volume",
    "commit: evict, condemned",
    "crash between two effects of one input",
    "crash while a resync runs to or from the node",
    "crash while promoting, before opening",
    "disk error on flush",
    "disk error on read",
    "disk error on write",
    "failover: another node opened than before",
    "heartbeats and log cut, replication not",
    "link broke with messages under way",
    "link replaced without a word",
    "metadata of an unclean end was read",
    "node paused past its lease",
    "one direction cut alone",
    "power loss of the primary",
    "power loss of all data nodes",
    "reconciliation carried a tail",
    "reconciliation found a member that could not tell",
    "refused: a stale epoch",
    "replicas were compared in the middle of trouble",
    "resync: started",
    "resync: ended with a join",
    "resync: link lost while it ran",
    "a join was lost with its link or node",
    "a member told of another one's dirty blocks",
    "superblock slot 0 written",
    "superblock slot 1 written",
    "switchover: the old primary demoted, another opened",
    "the log was out of reach for the primary",
    "the disk of a secondary hangs, its daemon lives",
    "unaligned read",
    "write waited for the commit of a leave",
    "zeroes written",
    "resync: blocks were the same",
    "resync: blocks differed",
    "second fault at: reconciliation",
    "second fault at: promotion, before it opens",
    "second fault at: the begin of a resync",
    "second fault at: the end of a resync, before the join",
    "second fault at: the saving of what gives way",
    "second fault at: the second half of a move",
    "second fault at: an attach",
    "second fault at: the healing of a read error",
    "second fault at: the repair of what a verification found",
    "second fault: a process died",
    "second fault: the power went",
    "second fault: two nodes lost each other",
    "second fault: a disk failed",
    "second fault: a process was stopped",
    "second fault: the control log was out of reach",
    "resync: held for the application's sake",
    "resync: held no longer",
    "protocol A: pulled ahead of a replica",
    "protocol A: one that was left behind has caught up",
    "protocol A: congestion blocked the application",
    "protocol A: switchover to such a replica",
    "protocol A: a generation of marks was forgotten",
    "protocol A: a replica took another one's place",
    "a replica was moved",
    "protocol B: acknowledged before the disk did",
    "protocol B: a replica crashed with received writes",
];

/// Marks that only runs with the real managers can reach.
pub const MANAGED: &[&str] = &[
    "one path of heartbeats failed alone",
    "a stream alone kept two nodes alive",
];

/// Counters of marks.
#[derive(Clone, Debug, Default)]
pub struct Marks(BTreeMap<&'static str, u64>);

impl Marks {
    /// The mark was reached once more.
    pub fn reached(&mut self, mark: &'static str) {
        debug_assert!(
            ALL.contains(&mark) || MANAGED.contains(&mark),
            "unknown mark `{mark}`"
        );
        *self.0.entry(mark).or_default() += 1;
    }

    /// How often a mark was reached.
    #[must_use]
    pub fn count(&self, mark: &str) -> u64 {
        self.0.get(mark).copied().unwrap_or(0)
    }

    /// Adds another run's counters.
    pub fn add(&mut self, other: &Self) {
        for (mark, count) in &other.0 {
            *self.0.entry(mark).or_default() += count;
        }
    }

    /// The marks that were never reached.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        ALL.iter()
            .copied()
            .filter(|mark| self.count(mark) == 0)
            .collect()
    }

    /// One line a mark.
    #[must_use]
    pub fn table(&self) -> String {
        ALL.iter()
            .map(|mark| format!("{:>10}  {mark}\n", self.count(mark)))
            .collect()
    }
}
