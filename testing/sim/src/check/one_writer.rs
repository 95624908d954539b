//! One writer (rules 1 and 3): what opens was made primary by a commit, out of the committed
//! in-sync set; no two nodes open under one epoch; who was replaced gets no write acknowledged any
//! more.
//!
//! That is about writes that begin after the other one opened. One that began before may be answered
//! after it: a process that was stopped between the last acknowledgement it needed and its answer
//! can't know, and need not, as every member has that write (`commit_then_ack` looks).

use std::collections::BTreeMap;

use relevo_types::{Epoch, NodeId, cluster::Volume};

use super::{Verdict, Violation, linear::Tick};

const PROMOTION: &str = "only a committed in-sync replica is promoted (rule 3)";
const WRITER: &str = "one writer (rule 1)";

/// What was committed and who opened.
#[derive(Debug, Default)]
pub struct OneWriter {
    /// By epoch: the primary, if it was in the in-sync set.
    committed: BTreeMap<Epoch, (Option<NodeId>, bool)>,
    opened: BTreeMap<Epoch, (NodeId, Tick)>,
}

impl OneWriter {
    /// The log committed a configuration.
    pub fn committed(&mut self, volume: &Volume) {
        let in_sync = volume
            .primary
            .is_some_and(|node| volume.in_sync.contains(&node));
        self.committed
            .insert(volume.epoch, (volume.primary, in_sync));
    }

    /// A node says that it opened.
    ///
    /// # Errors
    /// It had no right to.
    pub fn opened(&mut self, node: NodeId, epoch: Epoch, at: Tick) -> Verdict {
        match self.committed.get(&epoch) {
            Some((Some(primary), true)) if *primary == node => {}
            other => {
                return Err(Violation::new(
                    PROMOTION,
                    format!(
                        "{node} opened under {epoch}, whose committed (primary, in the in-sync set) is {other:?}"
                    ),
                ));
            }
        }
        match self.opened.insert(epoch, (node, at)) {
            Some((other, _)) if other != node => Err(Violation::new(
                WRITER,
                format!("{other} and {node} both opened under {epoch}"),
            )),
            _ => Ok(()),
        }
    }

    /// A node acknowledges a write that began at `invoked`; it opened under `epoch`.
    ///
    /// # Errors
    /// Another node had replaced it before the write began.
    pub fn acknowledged(&self, node: NodeId, epoch: Epoch, invoked: Tick) -> Verdict {
        let newer = self
            .opened
            .range(epoch.next()..)
            .find(|(_, (other, at))| *other != node && *at < invoked);
        match newer {
            Some((newer, (other, _))) => Err(Violation::new(
                WRITER,
                format!(
                    "{node}, open since {epoch}, acknowledged a write that began after {other} had opened under {newer}"
                ),
            )),
            None => Ok(()),
        }
    }

    /// How often any node opened.
    #[must_use]
    pub fn openings(&self) -> usize {
        self.opened.len()
    }

    /// How many different nodes opened.
    #[must_use]
    pub fn openers(&self) -> usize {
        let mut nodes: Vec<NodeId> = self.opened.values().map(|(node, _)| *node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::tests::volume;

    #[test]
    fn a_replaced_primary_may_not_acknowledge() {
        let mut checker = OneWriter::default();
        checker.committed(&volume(2, Some(1), &[1, 2]));
        checker.committed(&volume(4, Some(2), &[1, 2]));
        checker.opened(NodeId(1), Epoch(2), Tick(1)).unwrap();
        assert!(checker.acknowledged(NodeId(1), Epoch(2), Tick(2)).is_ok());
        checker.opened(NodeId(2), Epoch(4), Tick(5)).unwrap();
        assert!(checker.acknowledged(NodeId(1), Epoch(2), Tick(4)).is_ok());
        assert!(checker.acknowledged(NodeId(1), Epoch(2), Tick(6)).is_err());
        assert!(checker.acknowledged(NodeId(2), Epoch(4), Tick(6)).is_ok());
    }

    #[test]
    fn only_a_committed_in_sync_primary_opens() {
        let mut checker = OneWriter::default();
        checker.committed(&volume(2, Some(1), &[2]));
        assert!(
            checker.opened(NodeId(1), Epoch(2), Tick(1)).is_err(),
            "not in sync"
        );
        assert!(
            checker.opened(NodeId(2), Epoch(2), Tick(1)).is_err(),
            "not primary"
        );
        assert!(
            checker.opened(NodeId(1), Epoch(3), Tick(1)).is_err(),
            "not committed"
        );
    }
}
