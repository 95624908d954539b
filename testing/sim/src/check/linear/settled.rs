//! What of a history needs no look any more. A block that is written all the time has thousands of writes,
//! and each that is read or acknowledged is compared with all others.

use super::{Block, Cluster, SECTORS_PER_BLOCK, Tick, Write, bit};

impl Block {
    /// Finds more clusters that need no look from now on, now and then. No read is under way, or will be, that
    /// began before `oldest`.
    ///
    /// A cluster is settled by another one of which all that is known lies after all that is known of the
    /// first, and before `oldest`. What comes changes a cluster in two ways. It is read: then it lasts from its
    /// first end to `oldest` at least; if it clashes with the settled one it began before the last of that,
    /// has the one that settled it within its time, and clashes with this too. Or it ends for the first time:
    /// now, which clashes with nothing that is past. And the settled one itself, if it is read, has the other
    /// within its time.
    pub(super) fn settle(&mut self, oldest: Tick, writes: &[Write]) {
        if self.clusters.len() < self.look_at {
            return;
        }
        let live = &self.clusters[self.settled..];
        let over = live.iter().filter(|cluster| cluster.is_over_at(oldest));
        let begin = over.map(Cluster::first).max().unwrap_or_default();
        let before = |cluster: &&Cluster| {
            let ended = writes[cluster.write.0 as usize].ended;
            ended.is_some_and(|ended| ended < begin) && cluster.lies_before(begin)
        };
        let more = live.iter().take_while(before).count();
        self.settled += more;
        self.look_at = self.clusters.len() + (self.clusters.len() - self.settled).max(8);
    }
}

impl Cluster {
    /// All its sectors were there for certain, and what is known of that ended before a moment.
    fn is_over_at(&self, moment: Tick) -> bool {
        self.happened == u8::MAX && self.lies_before(moment)
    }

    /// Nothing that is known of it is at or after a moment.
    fn lies_before(&self, moment: Tick) -> bool {
        (0..SECTORS_PER_BLOCK).all(|sector| {
            let seen = self.happened & bit(sector) != 0;
            self.last_begin[sector] < moment && (!seen || self.first_end[sector] < moment)
        })
    }

    /// The earliest of what is known of it.
    fn first(&self) -> Tick {
        let ends = self.first_end.iter().chain(&self.last_begin);
        ends.min().copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use relevo_types::BlockRange;

    use super::*;
    use crate::{check::linear::History, rng::Rng, stamp::WriteNo};

    const BLOCK: BlockRange = BlockRange::new(3, 1);

    /// What is not looked at any more would have broken nothing that is not seen all the same.
    #[test]
    fn settled_clusters_hide_no_clash() {
        let (mut clashes, mut passed, mut settled) = (0, 0, 0);
        for seed in 0..3000 {
            let mut rng = Rng::new(seed, 0);
            let mut all = History::default();
            let mut live = History::default();
            // Reads under way: since when; and writes.
            let mut reads: Vec<Tick> = Vec::new();
            let mut writes: Vec<WriteNo> = Vec::new();
            let honest = rng.between(60, 100) as f64;
            let mut newest = WriteNo::ZERO;
            let clashed = (0..400).any(|_| {
                let oldest = reads.first().copied().unwrap_or_else(|| live.now());
                live.no_read_before(oldest);
                let both = match rng.below(if writes.len() < 4 { 9 } else { 7 }) {
                    0 | 1 => {
                        live.tick();
                        reads.push(all.tick());
                        None
                    }
                    2..=4 if !reads.is_empty() => {
                        let invoked = reads.remove(rng.index(reads.len()));
                        let last = u64::from(newest.0);
                        let back = if rng.chance(honest) { 0 } else { rng.below(60) };
                        let saw = WriteNo(u32::try_from(last.saturating_sub(back)).unwrap());
                        let one = all.read(invoked, 3, 0, saw);
                        Some((one, live.read(invoked, 3, 0, saw)))
                    }
                    5 if !writes.is_empty() => {
                        let write = writes.remove(rng.index(writes.len()));
                        Some(if rng.chance(20.0) {
                            (all.write_failed(write), live.write_failed(write))
                        } else {
                            newest = newest.max(write);
                            let one = all.write_acked(write, false);
                            (one, live.write_acked(write, false))
                        })
                    }
                    6 => {
                        if rng.chance(1.0) {
                            all.cut(Tick(0));
                            live.cut(Tick(0));
                        }
                        None
                    }
                    _ => {
                        all.begin_write(BLOCK, false);
                        writes.push(live.begin_write(BLOCK, false));
                        None
                    }
                };
                both.is_some_and(|(one, other)| {
                    assert_eq!(
                        one.is_err(),
                        other.is_err(),
                        "seed {seed}: {one:?} {other:?}"
                    );
                    passed += u32::from(one.is_ok());
                    one.is_err()
                })
            });
            clashes += u32::from(clashed);
            settled += u32::from(live.block(3).is_some_and(|block| block.settled > 0));
        }
        assert!(
            clashes > 300 && passed > 30_000 && settled > 300,
            "{clashes} {passed} {settled}"
        );
    }
}
