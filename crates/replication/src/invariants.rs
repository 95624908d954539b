//! The rules of safety (DESIGN, section 3) that one engine can check by itself.
//!
//! Checked after every input in debug builds and in the simulator; the rules between engines are
//! the simulator's.

use relevo_format::Layout;

use crate::{
    machine::{Machine, Role, mask},
    sync::Stage,
    tail::WINDOW_MAX,
};

/// With more writes under way than this, only the oldest are checked: the check runs after every
/// input.
const WRITES_CHECKED_MAX: usize = 64;

impl Machine {
    /// # Errors
    /// Which rule is broken, and how.
    pub(crate) fn check_invariants(&self) -> Result<(), String> {
        self.check_io()?;
        self.check_reign_state()?;
        self.check_writes()
    }

    /// Order of overlapping I/O; rule 6: nothing is written to a cold region.
    fn check_io(&self) -> Result<(), String> {
        if self.gate.len() <= WRITES_CHECKED_MAX
            && let Some((a, b)) = self.gate.broken_pair()
        {
            return Err(format!(
                "jobs {a:?} and {b:?} overlap and both passed the gate"
            ));
        }
        for (id, job) in self.jobs.table.iter().take(WRITES_CHECKED_MAX) {
            let cold = Layout::regions(job.blocks)
                .find(|region| job.is_pinned() && !self.meta.activity.is_pinned(*region));
            if let Some(region) = cold {
                return Err(format!("job {id:?} writes to {region:?}, which is not hot"));
            }
        }
        if self.tail.len() as u64 > WINDOW_MAX + 1 {
            return Err(format!("the tail has {} writes", self.tail.len()));
        }
        Ok(())
    }

    /// Rules 1, 3 and 4: who is open, under what, with whom in sync.
    fn check_reign_state(&self) -> Result<(), String> {
        if self.meta.durable_epoch() > self.meta.superblock.epoch {
            return Err("an epoch was forgotten".to_owned());
        }
        let has_session = self.links.values().any(|link| link.session.is_some());
        let Role::Primary(primary) = &self.role else {
            return if has_session {
                Err("a session without being primary".to_owned())
            } else {
                Ok(())
            };
        };
        if self.meta.durable_epoch() < primary.epoch {
            return Err(format!("acts under {} before it is durable", primary.epoch));
        }
        if primary.epoch <= self.attached_epoch {
            return Err(format!(
                "open under {}, which an earlier life may have used",
                primary.epoch
            ));
        }
        if !primary.in_sync.contains(&self.node()) {
            return Err("open without being in the in-sync set".to_owned());
        }
        if primary.complete > primary.last_seq {
            return Err("complete is past the last write".to_owned());
        }
        for (peer, link) in &self.links {
            let Some(session) = &link.session else {
                continue;
            };
            if session.stage == Stage::InSync && !primary.in_sync.contains(peer) {
                return Err(format!("{peer} is in sync here but not by commit"));
            }
            let slot = self.slot(*peer);
            let dirty = slot.map_or(0, |slot| self.meta.bitmaps.of(slot).count());
            if matches!(
                session.stage,
                Stage::InSync | Stage::Joining | Stage::Barrier(_)
            ) && dirty > 0
            {
                return Err(format!(
                    "{peer} is past its resync with {dirty} dirty blocks"
                ));
            }
        }
        Ok(())
    }

    /// Rules 1 and 5: sent or marked; complete only what all must have.
    fn check_writes(&self) -> Result<(), String> {
        let Role::Primary(primary) = &self.role else {
            return Ok(());
        };
        let required = self.required();
        let members = primary.in_sync.iter().filter_map(|node| self.slot(*node));
        let members = members.fold(0, |all, slot| all | mask(slot)) & !mask(self.meta.own_slot());
        if members & !required != 0 {
            return Err("a member of the in-sync set is not required".to_owned());
        }
        let others = self.other_slots();
        for (seq, write) in primary.writes.iter().take(WRITES_CHECKED_MAX) {
            // A complete one may have been resynced since.
            if !write.complete {
                self.sent_or_marked(write, others)?;
            }
            if write.settled == primary.incomplete.contains_key(seq)
                || write.settled && !write.complete
            {
                return Err(format!("write {seq} is complete and incomplete"));
            }
            if write.complete && members & write.unacked & !write.received != 0 {
                return Err(format!("write {seq} is complete but a member lacks it"));
            }
        }
        Ok(())
    }
}
