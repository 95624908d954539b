//! Resync by checksum: instead of blocks their digests travel, and then only the blocks that differ
//! (`csums`, DRBD's `csums-alg`).
//!
//! The primary reads dirty blocks through the gate and sends their digests at that place of the stream. The
//! target reads the same blocks through its own gate, after all that was sent before. So both are of the
//! same position, and what is the same there is as good as a resync write that was acknowledged: it was
//! brought by no write, but every later one is sent after it. What the target has read is either on stable
//! storage or in a region that its activity log names: an attach after an unclean end flushes what an earlier
//! life wrote. So a mark may be cleared although nothing was written.
//!
//! Comparing costs a read at the target, and of what differs a second one here. With `auto` it goes on as
//! long as it saves something: after a crash, or with a backing that was attached again, nearly all of what
//! is marked is the same.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use relevo_types::{BlockRange, Epoch, NodeId, cluster::options::Csums};
use relevo_wire::Message;

use crate::{
    digest::digests, jobs::Reply, lab::PlantedBug, machine::Machine, ops::Cx, sync::Session,
};

/// With `auto`: blocks that are compared before anything is concluded. The rest waits for these answers, one
/// round trip.
const SAMPLE_BLOCKS: u64 = 256;

/// Of the last so many blocks that were compared the share that was the same is known, roughly.
const HORIZON_BLOCKS: u64 = 1024;

/// Comparing goes on while at least one block of so many was the same: less saves nothing that the reads
/// are worth.
const WORTH_ONE_IN: u64 = 8;

/// When it does not, one piece of so many is compared all the same: what is marked changes its nature
/// along the volume.
const PROBE_EVERY: u64 = 64;

/// What is to be done with blocks that are read for a resync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Means {
    Copy,
    Compare,
}

/// What a session compares.
#[derive(Debug, Default)]
pub(crate) struct Comparing {
    /// The target's answer is awaited.
    asked: BTreeMap<u64, BlockRange>,
    /// Differ, and are to be copied next.
    differing: VecDeque<BlockRange>,
    /// Bytes that were the same.
    pub(crate) same_bytes: u64,
    share: Share,
}

/// How much of what was compared lately was the same, in blocks.
#[derive(Debug, Default)]
struct Share {
    compared: u64,
    same: u64,
    /// Pieces that were copied without a look since the last that was compared.
    unseen: u64,
}

impl Share {
    fn add(&mut self, compared: u64, same: u64) {
        self.compared += compared;
        self.same += same;
        if self.compared >= HORIZON_BLOCKS {
            self.compared /= 2;
            self.same /= 2;
        }
    }

    /// What to do with the next piece while `looking` blocks are being compared; `None`: wait for that.
    fn means(&mut self, looking: u64) -> Option<Means> {
        if self.compared < SAMPLE_BLOCKS {
            return (self.compared + looking < SAMPLE_BLOCKS).then_some(Means::Compare);
        }
        self.unseen += 1;
        if self.same * WORTH_ONE_IN >= self.compared || self.unseen >= PROBE_EVERY {
            self.unseen = 0;
            return Some(Means::Compare);
        }
        Some(Means::Copy)
    }
}

impl Comparing {
    pub(crate) fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.differing.is_empty()
    }

    /// Whether an answer is awaited.
    pub(crate) fn owes(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Questions under way.
    pub(crate) fn asked(&self) -> usize {
        self.asked.len()
    }

    /// What was under way is no longer.
    pub(crate) fn forget(&mut self) {
        self.asked.clear();
        self.differing.clear();
    }

    /// A run that is known to differ.
    pub(crate) fn take_differing(&mut self) -> Option<BlockRange> {
        self.differing.pop_front()
    }

    /// Whether there is one.
    pub(crate) fn has_differing(&self) -> bool {
        !self.differing.is_empty()
    }

    /// All of these.
    pub(crate) fn drop_differing(&mut self) -> VecDeque<BlockRange> {
        std::mem::take(&mut self.differing)
    }
}

impl Session {
    /// Whether the next piece is to be compared or copied; `None`: that is known when the answers are here
    /// that are awaited.
    pub(crate) fn next_means(&mut self, csums: Csums) -> Option<Means> {
        match csums {
            Csums::No => Some(Means::Copy),
            Csums::Yes => Some(Means::Compare),
            // What was written while it was left behind differs, and every round trip keeps it there longer.
            Csums::Auto if self.behind_since.is_some() => Some(Means::Copy),
            Csums::Auto => {
                let reads = self.reads.iter();
                let reads = reads.filter(|(_, means)| **means == Means::Compare);
                let reads = reads.map(|(blocks, _)| blocks.count);
                let asked = self.comparing.asked.values().map(|blocks| blocks.count);
                let looking = reads.chain(asked).sum();
                self.comparing.share.means(looking)
            }
        }
    }
}

impl Machine {
    /// What was chosen for this volume.
    pub(crate) fn csums(&self) -> Csums {
        let volume = self.volume.as_ref();
        volume.map_or_else(Csums::default, |volume| volume.options.csums)
    }

    /// Sends the digests of blocks that the peer may lack.
    pub(crate) fn compare(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        epoch: Epoch,
        blocks: BlockRange,
        data: &Bytes,
    ) {
        let id = self.next_id();
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        session.comparing.asked.insert(id, blocks);
        let message = Message::SyncDigests {
            epoch,
            id,
            first: blocks.first,
            digests: digests(data),
        };
        self.send(cx, peer, message);
    }

    /// The target compared: what is the same it has, as if it had acknowledged it; the rest is copied.
    pub(crate) fn sync_compared(
        &mut self,
        cx: &mut Cx<'_>,
        peer: NodeId,
        id: u64,
        differ: &[BlockRange],
    ) {
        let trusts = self.lab.has(PlantedBug::DifferingCountsAsSame);
        let Some(session) = self.session_mut(peer) else {
            return;
        };
        let Some(asked) = session.comparing.asked.remove(&id) else {
            return;
        };
        let Some(same) = without(asked, differ) else {
            self.protocol_error(cx, peer, "an answer about blocks that were not compared");
            return;
        };
        let (same, differ) = if trusts {
            (vec![asked], &[][..])
        } else {
            (same, differ)
        };
        let blocks: u64 = same.iter().map(|run| run.count).sum();
        let bytes = blocks * relevo_types::BLOCK_SIZE;
        session.comparing.share.add(asked.count, blocks);
        session.comparing.same_bytes += bytes;
        session.comparing.differing.extend(differ);
        for run in &same {
            session.busy.clear(*run, |_| {});
        }
        session.copied(cx.now, bytes);
        for run in same {
            self.copied_there(cx, peer, run);
        }
    }

    // The target's side.

    /// This replica's blocks were read, or could not be: then it must be given them, which writes them
    /// anew. Gives the blocks that were asked for, if the link is still there.
    pub(crate) fn compare_read_done(
        &mut self,
        cx: &mut Cx<'_>,
        reply: Reply,
        id: u64,
        data: Option<&Bytes>,
    ) -> Option<BlockRange> {
        let (asked, blocks) = self.compare_with(reply, id, data)?;
        for run in without(asked, &blocks).unwrap_or_default() {
            self.copied_here(cx, reply, run);
        }
        let Reply { peer, epoch, .. } = reply;
        self.send(cx, peer, Message::SyncDiffer { epoch, id, blocks });
        Some(asked)
    }
}

/// What is left of a run without others; `None` if these are not in order within it.
fn without(whole: BlockRange, others: &[BlockRange]) -> Option<Vec<BlockRange>> {
    let mut left = Vec::new();
    let mut at = whole.first;
    for other in others {
        if other.first < at || other.end() > whole.end() {
            return None;
        }
        if other.first > at {
            left.push(BlockRange::new(at, other.first - at));
        }
        at = other.end();
    }
    if at < whole.end() {
        left.push(BlockRange::new(at, whole.end() - at));
    }
    Some(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> BlockRange {
        BlockRange::new(first, count)
    }

    #[test]
    fn what_is_left_is_the_rest() {
        let whole = run(10, 10);
        assert_eq!(without(whole, &[]), Some(vec![whole]));
        assert_eq!(without(whole, &[whole]), Some(Vec::new()));
        let others = [run(10, 2), run(15, 1)];
        assert_eq!(without(whole, &others), Some(vec![run(12, 3), run(16, 4)]));
        for wrong in [
            [run(9, 2), run(15, 1)],
            [run(15, 2), run(16, 1)],
            [run(12, 1), run(19, 2)],
        ] {
            assert_eq!(without(whole, &wrong), None);
        }
    }

    #[test]
    fn a_sample_decides_and_later_looks_change_the_mind() {
        let mut share = Share::default();
        assert_eq!(share.means(0), Some(Means::Compare));
        assert_eq!(share.means(SAMPLE_BLOCKS - 1), Some(Means::Compare));
        assert_eq!(share.means(SAMPLE_BLOCKS), None, "waits for the sample");
        // Nothing is the same: it copies, and looks now and then.
        share.add(SAMPLE_BLOCKS, 0);
        let mut looks = 0;
        for _ in 0..10 * PROBE_EVERY {
            looks += u64::from(share.means(0) == Some(Means::Compare));
        }
        assert_eq!(looks, 10);
        // What it sees there is the same from here on.
        for _ in 0..8 {
            share.add(32, 32);
        }
        assert_eq!(share.means(0), Some(Means::Compare));
        // And no longer.
        let mut compared = 0;
        while share.means(0) == Some(Means::Compare) {
            share.add(32, 0);
            compared += 32;
        }
        assert!(compared <= 4 * HORIZON_BLOCKS, "{compared}");
    }
}
