//! The disk of the last replica in sync fails: an unreadable block is passed on or takes the replica out of
//! use, requests then fail or wait, all as was chosen; and when the disks are repaired all is well again
//! without anybody saying more.

use std::time::Duration;

use relevo_replication::ReplyError;
use relevo_types::cluster::options::{OnIoError, OnNoData};

use super::{
    Cluster, Phase,
    machine::Failing,
    node_id,
    verify::{HEAL_WITHIN, SERVES_WITHOUT_WITHIN},
};
use crate::{
    check::{Verdict, Violation},
    net::Index,
};

const RULE: &str = "without accessible data requests wait or fail, as was chosen";

/// How long it is looked at what becomes of requests.
const LOOK: Duration = Duration::from_millis(800);

impl Cluster {
    /// All is quiet and in sync: one disk after the other fails, the primary's last.
    pub(super) fn fail_last_disk(&mut self) -> Verdict {
        if self.scenario.managed {
            self.keep_service()?;
        }
        let Some(primary) = self.open_primary() else {
            return Ok(());
        };
        let now = self.queue.now();
        self.trace
            .node(now, primary, || "all disks fail, its own last".to_owned());
        self.last_disk = Some(primary);
        self.phase = Phase::Healing;
        for node in (0..self.scenario.data_nodes).filter(|node| *node != primary) {
            self.machines[node].failing = Some(Failing::Write);
        }
        self.load.writes_answered = 0;
        let clients = self.scenario.clients as u64;
        let until = self.queue.now() + SERVES_WITHOUT_WITHIN;
        self.wait_for(until, "writes go on with one replica in sync", |cluster| {
            cluster.control.volume().in_sync.len() == 1
                && cluster.load.writes_answered > 2 * clients
        })?;
        let mut failing = self.chance.trouble.pick(&[Failing::Read, Failing::Write]);
        if failing == Failing::Read && self.scenario.disk_trouble.0 == OnIoError::PassOn {
            self.pass_on(primary)?;
            failing = Failing::Write;
        }
        self.machines[primary].failing = Some(failing);
        let until = self.queue.now() + SERVES_WITHOUT_WITHIN;
        self.wait_for(until, "the last disk fails", |cluster| {
            let process = cluster.machines[primary].process.as_ref();
            process.is_some_and(|process| process.disk_failed)
        })?;
        self.run_until(self.queue.now() + LOOK)?;
        let waits = self.load.waits_at(primary);
        match self.scenario.on_no_data {
            OnNoData::Suspend if waits => {
                self.marks.reached("requests waited for accessible data");
            }
            OnNoData::Suspend => {}
            OnNoData::Error if waits => {
                let what = format!("requests to n{} wait", primary + 1);
                return Err(Violation::new(RULE, what));
            }
            OnNoData::Error => self
                .marks
                .reached("requests failed without accessible data"),
        }
        self.last_disk = None;
        self.repairing = true;
        let until = self.queue.now() + HEAL_WITHIN;
        self.load.writes_answered = 0;
        self.wait_for(until, "all is well with repaired disks", Self::is_whole)?;
        self.settle()
    }

    /// One block can't be read, and nobody else has it: its reader is told, and nothing else happens.
    fn pass_on(&mut self, primary: Index) -> Verdict {
        self.machines[primary].failing = Some(Failing::Read);
        self.load.read_errors = 0;
        let until = self.queue.now() + SERVES_WITHOUT_WITHIN;
        self.wait_for(until, "a read error reaches its reader", |cluster| {
            cluster.load.read_errors > 0
        })?;
        self.marks.reached("a read error was passed on");
        if self.open_primary() == Some(primary) {
            return Ok(());
        }
        let what = format!(
            "n{} closed for a read error that was to be passed on",
            primary + 1
        );
        Err(Violation::new(RULE, what))
    }

    /// A node closed. When its disk fails and requests shall wait it may do so only if another one could serve,
    /// as far as it knew: that this one left the set as well may have been on its way to it.
    pub(super) fn closed(&self, node: Index) -> Verdict {
        let known = self.machines[node].known_volume();
        let alone = known.primary == Some(node_id(node)) && known.in_sync.len() == 1;
        if self.last_disk != Some(node) || !alone || self.scenario.on_no_data != OnNoData::Suspend {
            return Ok(());
        }
        let what = format!("n{} closed, and knew that it was alone", node + 1);
        Err(Violation::new(RULE, what))
    }

    /// A request failed.
    pub(super) fn request_failed(&mut self, node: Index, error: ReplyError, read: bool) -> Verdict {
        if self.last_disk != Some(node) {
            return Ok(());
        }
        let volume = self.control.volume();
        let alone = volume.primary == Some(node_id(node)) && volume.in_sync.len() == 1;
        let process = self.machines[node].process.as_ref();
        let failed = process.is_some_and(|process| process.disk_failed);
        // One that closed said so to its clients; whether it might is looked at then.
        let open = process.is_some_and(|process| process.open.is_some());
        if failed && open && alone && self.scenario.on_no_data == OnNoData::Suspend {
            let what = format!("n{} answered {error:?}", node + 1);
            return Err(Violation::new(RULE, what));
        }
        if read && !failed && error == ReplyError::Io {
            self.load.read_errors += 1;
        }
        Ok(())
    }
}
