//! Which regions are hot: named by the activity log transaction that is on stable storage.
//!
//! A write may touch the data area only while all its regions are hot and pinned by it. Cold
//! regions become hot in batches: all that wait go into the next transaction. The log holds a
//! bounded number of regions; to make room, regions that nobody pins are dropped, the least
//! recently used first, after the data and bitmap pages written so far are durable.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use relevo_format::{Layout, Region, activity::REGIONS_MAX};
use relevo_types::BlockRange;

use crate::jobs::JobId;

/// Hot regions at most: as many as a transaction has room for. A write to a cold region waits for two flushes
/// on every replica, so a working set should fit; after a crash 900 MiB at most are copied.
pub(crate) const HOT_MAX: usize = REGIONS_MAX;

/// When room is needed, this many regions are dropped at once if they can be: each round costs
/// two flushes.
const DROP_BATCH: usize = 16;

#[derive(Debug)]
struct Hot {
    pins: u32,
    used: u64,
}

/// Hot regions and the jobs that wait for theirs.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    hot: BTreeMap<Region, Hot>,
    /// In the transaction that is being written.
    warming: BTreeSet<Region>,
    waiting: VecDeque<(JobId, BlockRange)>,
    /// Number of the last transaction that was planned.
    number: u64,
    uses: u64,
    /// Regions with a pin.
    pinned: usize,
    limit: Limit,
}

/// How many regions are hot at most.
#[derive(Clone, Copy, Debug)]
struct Limit(usize);

impl Default for Limit {
    fn default() -> Self {
        Self(HOT_MAX)
    }
}

/// The next transaction.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) number: u64,
    /// The whole set.
    pub(crate) regions: Vec<Region>,
    /// Regions are dropped: data and bitmap pages must be durable before the transaction is
    /// written.
    pub(crate) drops: bool,
}

impl Activity {
    /// Continues after the last transaction found on the backing, with no hot region.
    pub(crate) fn after(number: u64) -> Self {
        Self {
            number,
            ..Self::default()
        }
    }

    /// Changes the limit; for the simulator.
    pub(crate) fn hold_at_most(&mut self, regions: usize) {
        self.limit = Limit(regions.clamp(2, HOT_MAX));
    }

    /// Regions that are hot at most. A job must not need more.
    pub(crate) fn limit(&self) -> usize {
        self.limit.0
    }

    /// Pins the regions of a job's blocks if all are hot; else the job waits, and [`Activity::warmed`]
    /// names it.
    pub(crate) fn pin_or_wait(&mut self, job: JobId, blocks: BlockRange) -> bool {
        if self.pin(blocks) {
            return true;
        }
        self.waiting.push_back((job, blocks));
        false
    }

    fn pin(&mut self, blocks: BlockRange) -> bool {
        let all = Layout::regions(blocks).all(|region| self.hot.contains_key(&region));
        if all {
            self.uses += 1;
            for region in Layout::regions(blocks) {
                if let Some(hot) = self.hot.get_mut(&region) {
                    self.pinned += usize::from(hot.pins == 0);
                    hot.pins += 1;
                    hot.used = self.uses;
                }
            }
        }
        all
    }

    /// Ends one pin of each region of these blocks.
    pub(crate) fn unpin(&mut self, blocks: BlockRange) {
        for region in Layout::regions(blocks) {
            if let Some(hot) = self.hot.get_mut(&region) {
                debug_assert!(hot.pins > 0, "{region:?} is unpinned once too often");
                self.pinned -= usize::from(hot.pins == 1);
                hot.pins = hot.pins.saturating_sub(1);
            }
        }
    }

    /// A job no longer waits.
    pub(crate) fn forget(&mut self, job: JobId) {
        self.waiting.retain(|(waiting, _)| *waiting != job);
    }

    pub(crate) fn is_pinned(&self, region: Region) -> bool {
        self.hot.get(&region).is_some_and(|hot| hot.pins > 0)
    }

    /// How many regions are pinned.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Kept regions without whose room the oldest waiting job would wait for ever; empty when it
    /// finds room otherwise, or has to wait for pinned ones. Call only when no transaction is being
    /// written.
    pub(crate) fn starved_by(&self, keep: &BTreeSet<Region>) -> Vec<Region> {
        let Some((_, needs)) = self.waiting.front() else {
            return Vec::new();
        };
        let needs: BTreeSet<Region> = Layout::regions(*needs).collect();
        let cold = needs
            .iter()
            .filter(|region| !self.hot.contains_key(region))
            .count();
        let needed = (self.hot.len() + cold).saturating_sub(self.limit.0);
        let idle = self
            .hot
            .iter()
            .filter(|(region, hot)| hot.pins == 0 && !needs.contains(region));
        let (mut kept, free): (Vec<_>, Vec<_>) = idle
            .map(|(region, hot)| (hot.used, *region))
            .partition(|(_, region)| keep.contains(region));
        let lacking = needed.saturating_sub(free.len());
        if lacking > kept.len() {
            return Vec::new();
        }
        kept.sort_unstable();
        kept.truncate(lacking);
        kept.into_iter().map(|(_, region)| region).collect()
    }

    /// Plans the next transaction for as many waiting jobs as there is room for, oldest first.
    /// `keep`: regions that must not be dropped although nobody pins them. Call only when no
    /// transaction is being written.
    pub(crate) fn plan(&mut self, keep: &BTreeSet<Region>) -> Option<Plan> {
        debug_assert!(self.warming.is_empty(), "one transaction at a time");
        let first_needs: BTreeSet<Region> = Layout::regions(self.waiting.front()?.1).collect();
        let mut droppable: Vec<(u64, Region)> = self
            .hot
            .iter()
            .filter(|(region, hot)| {
                hot.pins == 0 && !keep.contains(region) && !first_needs.contains(region)
            })
            .map(|(region, hot)| (hot.used, *region))
            .collect();
        droppable.sort_unstable();
        let mut droppable = droppable.into_iter().map(|(_, region)| region);
        let mut drops = false;
        for (_, blocks) in &self.waiting {
            let cold: BTreeSet<Region> = Layout::regions(*blocks)
                .filter(|region| !self.hot.contains_key(region) && !self.warming.contains(region))
                .collect();
            let total = self.hot.len() + self.warming.len() + cold.len();
            if total > self.limit.0 {
                let needed = total - self.limit.0;
                if droppable.len() < needed {
                    break;
                }
                for region in droppable.by_ref().take(needed.max(DROP_BATCH)) {
                    self.hot.remove(&region);
                    drops = true;
                }
            }
            self.warming.extend(cold);
        }
        if self.warming.is_empty() {
            return None;
        }
        self.number += 1;
        Some(Plan {
            number: self.number,
            regions: self.hot.keys().chain(&self.warming).copied().collect(),
            drops,
        })
    }

    /// A transaction that names no region: only when nothing is pinned or waits.
    pub(crate) fn plan_empty(&mut self) -> Plan {
        debug_assert!(
            self.hot.values().all(|hot| hot.pins == 0),
            "regions are in use"
        );
        self.hot.clear();
        self.number += 1;
        Plan {
            number: self.number,
            regions: Vec::new(),
            drops: true,
        }
    }

    /// The transaction is on stable storage. Gives the jobs whose regions are now all hot and
    /// pinned.
    pub(crate) fn warmed(&mut self) -> Vec<JobId> {
        for region in std::mem::take(&mut self.warming) {
            self.hot.insert(
                region,
                Hot {
                    pins: 0,
                    used: self.uses,
                },
            );
        }
        let mut ready = Vec::new();
        for (job, blocks) in std::mem::take(&mut self.waiting) {
            if self.pin(blocks) {
                ready.push(job);
            } else {
                self.waiting.push_back((job, blocks));
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(range: std::ops::Range<u32>) -> Vec<Region> {
        range.map(Region).collect()
    }

    /// Blocks of so many regions.
    fn blocks(range: std::ops::Range<u32>) -> BlockRange {
        let region = Layout::REGION_BLOCKS;
        let count = u64::from(range.end - range.start) * region;
        BlockRange::new(u64::from(range.start) * region, count)
    }

    #[test]
    fn waiting_jobs_share_a_transaction() {
        let mut activity = Activity::after(7);
        assert!(!activity.pin_or_wait(JobId(1), blocks(0..1)));
        assert!(!activity.pin_or_wait(JobId(2), blocks(0..2)));
        let plan = activity.plan(&BTreeSet::new()).unwrap();
        assert_eq!((plan.number, plan.drops), (8, false));
        assert_eq!(plan.regions, regions(0..2));
        // Not hot before the transaction is durable.
        assert!(!activity.pin_or_wait(JobId(3), blocks(0..1)));
        assert_eq!(activity.warmed(), [JobId(1), JobId(2), JobId(3)]);
        assert!(activity.pin_or_wait(JobId(4), blocks(1..2)));
        assert_eq!(activity.plan(&BTreeSet::new()), None);
    }

    #[test]
    fn only_unpinned_regions_are_dropped() {
        let mut activity = Activity::default();
        let max = u32::try_from(HOT_MAX).unwrap();
        assert!(!activity.pin_or_wait(JobId(1), blocks(0..max)));
        activity.plan(&BTreeSet::new()).unwrap();
        activity.warmed();
        assert!(!activity.pin_or_wait(JobId(2), blocks(max..max + 1)));
        assert_eq!(activity.plan(&BTreeSet::new()), None, "all are pinned");
        activity.unpin(blocks(0..2));
        let keep = BTreeSet::from([Region(0)]);
        let plan = activity.plan(&keep).unwrap();
        assert!(plan.drops);
        assert!(plan.regions.contains(&Region(0)) && !plan.regions.contains(&Region(1)));
        assert_eq!(activity.warmed(), [JobId(2)]);
    }

    #[test]
    fn a_job_that_waits_for_hot_and_cold_does_not_lose_the_hot_one() {
        let mut activity = Activity::default();
        let max = u32::try_from(HOT_MAX).unwrap();
        assert!(!activity.pin_or_wait(JobId(1), blocks(0..max)));
        activity.plan(&BTreeSet::new()).unwrap();
        activity.warmed();
        activity.unpin(blocks(0..max));
        // The hot one that it needs is the one that was not used for longest.
        assert!(activity.pin_or_wait(JobId(3), blocks(0..max - 1)));
        activity.unpin(blocks(0..max - 1));
        assert!(!activity.pin_or_wait(JobId(2), blocks(max - 1..max + 1)));
        activity.plan(&BTreeSet::new()).unwrap();
        assert_eq!(activity.warmed(), [JobId(2)]);
    }
}
