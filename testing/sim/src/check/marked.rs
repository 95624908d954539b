//! Sent or marked (rules 5 and 6): for each replica outside the in-sync set and each replica that
//! could be the source of its resync, now, after the next takeover, or when it is forced: the blocks in
//! which they differ are dirty for it at the source, or uncertain by the word of one of the two; of
//! generations of marks for a replica of protocol A so much is left. And marks drain: once a
//! replica is in sync and quiet, the primary has none left for it.

use relevo_replication::Engine;
use relevo_types::{BlockRange, NodeId};

use super::{Verdict, Violation};
use crate::disk::Disk;

const RULE: &str = "what differs is marked (rules 5, 6)";

/// Checks a replica outside the in-sync set against a source, given all that is marked.
///
/// # Errors
/// A block differs that nobody marked.
pub fn check(
    blocks: u64,
    source: (NodeId, &Disk),
    target: (NodeId, &Disk),
    marks: &[BlockRange],
) -> Verdict {
    let marked = |block: u64| marks.iter().any(|range| contains(range, block));
    let mut differing = source.1.differing(target.1, blocks);
    match differing.find(|block| !marked(*block)) {
        None => Ok(()),
        Some(block) => Err(Violation::new(
            RULE,
            format!(
                "block {block} differs between {}, which may be a source, and {}, which is not in sync, and is marked by neither: {marks:?}",
                source.0, target.0
            ),
        )),
    }
}

/// Checks that no mark is left for a replica that is in sync.
///
/// # Errors
/// A mark never drained.
pub fn drained(primary: Option<&Engine>, other: NodeId) -> Verdict {
    match primary.map(|engine| engine.dirty_blocks(other)) {
        Some(marks) if !marks.is_empty() => Err(Violation::new(
            RULE,
            format!("{other} is in sync and quiet, but still marked: {marks:?}"),
        )),
        _ => Ok(()),
    }
}

const fn contains(range: &BlockRange, block: u64) -> bool {
    block >= range.first && block < range.end()
}
