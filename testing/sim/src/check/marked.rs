//! Sent or marked (rules 5 and 6): blocks in which a replica outside the in-sync set differs from the
//! primary are dirty for it at the primary, or uncertain by its own word. And marks drain: once a
//! replica is in sync and quiet, the primary has none left for it.

use relevo_replication::Engine;
use relevo_types::{BlockRange, NodeId};

use super::{Verdict, Violation, equal};
use crate::disk::Disk;

const RULE: &str = "what differs is marked (rules 5, 6)";

/// Checks a replica outside the in-sync set against the primary.
///
/// # Errors
/// A block differs that nobody marked.
pub fn check(
    blocks: u64,
    primary: (NodeId, &Disk),
    other: (NodeId, &Disk),
    engines: (Option<&Engine>, Option<&Engine>),
) -> Verdict {
    let (Some(source), Some(target)) = engines else {
        return Ok(());
    };
    let mut marks = source.dirty_blocks(other.0);
    marks.extend(target.dirty_blocks(other.0));
    let marked = |block: u64| marks.iter().any(|range| contains(range, block));
    match equal::differing(blocks, primary.1, other.1).find(|block| !marked(*block)) {
        None => Ok(()),
        Some(block) => Err(Violation::new(
            RULE,
            format!(
                "block {block} differs between {} (primary) and {}, which is not in sync, and is marked by neither: {marks:?}",
                primary.0, other.0
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
