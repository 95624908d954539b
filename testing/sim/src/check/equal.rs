//! In sync means equal (rules 4 and 11): when nothing is under way, a replica in the committed
//! in-sync set has the bytes of the primary; once everything is healed, all replicas have.

use relevo_types::NodeId;

use super::{Verdict, Violation};
use crate::{
    disk::Disk,
    stamp::{SECTORS_PER_BLOCK, WriteNo, read_block},
};

const RULE: &str = "replicas in the in-sync set are equal when quiet (rule 4)";

/// Compares the data areas of two replicas.
///
/// # Errors
/// They differ; names the first block.
pub fn check(blocks: u64, one: (NodeId, &Disk), other: (NodeId, &Disk)) -> Verdict {
    match one.1.differing(other.1, blocks).next() {
        None => Ok(()),
        Some(block) => {
            let what = |(node, disk): (NodeId, &Disk)| {
                let content = match disk.block(block) {
                    None => Ok([WriteNo::ZERO; SECTORS_PER_BLOCK]),
                    Some(bytes) => read_block(block, bytes),
                };
                match content {
                    Ok(writes) => format!("{node} has writes {:?}", writes.map(|write| write.0)),
                    Err(what) => format!("{node}: {what}"),
                }
            };
            Err(Violation::new(
                RULE,
                format!("block {block}: {}; {}", what(one), what(other)),
            ))
        }
    }
}
