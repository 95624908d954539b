//! Split brain: two histories, forced apart and brought together (rule 9).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use relevo_replication::{Input, SaveId, SavePart};
use relevo_types::{
    Epoch, LineageId, ServiceId,
    cluster::{AfterSplitBrain, Command, VolumeChange, VolumeOptions},
};

use relevo_wire::Body;

use super::{Cluster, Crash, Event, Phase, index_of, node_id, verify::HEAL_WITHIN};
use crate::{
    check::{HEALS, Verdict, Violation},
    control::volume_command,
    net::{Index, Plane},
    second::Point,
    stamp::{SECTORS_PER_BLOCK, WriteNo, read_block},
};

const RULE: &str = "divergence is seen and never merged in silence (rule 9)";

/// Blocks that were ever written, with their bytes.
type Content = BTreeMap<u64, Bytes>;

/// An operator who still sees two histories decides again after this time.
const KEEP_EVERY: Duration = Duration::from_millis(20);

/// Bytes of a block.
const BLOCK: usize = 4096;

/// A fork.
#[derive(Debug)]
struct Scene {
    old: Index,
    forced: Index,
    policy: AfterSplitBrain,
    /// What the forced replica had at the fork.
    fork: Content,
    /// What the old primary had when the other was forced.
    theirs: Content,
    /// Both wrote before they met.
    both: bool,
    /// Whose history gives way, and what it had. Nobody's that is looked at: the forced one's, by a
    /// policy, in the middle of its work.
    loser: Option<(Index, Content)>,
}

/// Whose replica was made the volume and did not open since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heir {
    node: Index,
    /// By the change that led to this epoch.
    epoch: Epoch,
    /// It began the new history.
    began: bool,
}

impl Cluster {
    /// A replica that gives way has something kept.
    pub(super) fn save(&mut self, node: Index, id: SaveId, part: SavePart) -> Verdict {
        let machine = &mut self.machines[node];
        match part {
            SavePart::Begin { to, .. } => {
                machine.saving = Some((id, BTreeMap::new()));
                self.at_point(Point::Saving, node, index_of(to));
            }
            SavePart::Blocks { blocks, data } => {
                if let Some((_, saving)) = machine.saving.as_mut().filter(|(of, _)| *of == id) {
                    for (block, at) in blocks.iter().zip((0..data.len()).step_by(BLOCK)) {
                        saving.insert(block, data.slice(at..at + BLOCK));
                    }
                }
            }
            SavePart::End => {
                if let Some((_, saving)) = machine.saving.take_if(|(of, _)| *of == id) {
                    machine.saved.extend(saving);
                }
            }
        }
        let incarnation = self.machines[node].incarnation();
        let delay = self.chance.disk.micros(100, 3000);
        let saved = Event::Saved {
            node,
            incarnation,
            id,
        };
        self.queue.after(delay, saved);
        Ok(())
    }

    /// The history in force gives way to that of a replica outside the set.
    pub(super) fn went_back(&mut self, from: Index, to: Index) {
        self.marks.reached("a policy decided");
        self.went_back.insert(from);
        self.inherits(to);
        self.severed.insert(from);
    }

    /// A replica was made the volume. What it has when it begins the new history is the truth, not what it had at
    /// the commit:
    ///
    /// * until it hears of the commit it may be the target of an earlier primary's resync, and rightly writes what
    ///   comes. Nothing that was promised is lost by that: the volume has no primary whose clients count any more
    ///   from the commit on until this replica opens, and the new history promises what it reads then;
    /// * when it begins the history it closes all links. So what its disk has under way then and what it was given
    ///   before is all that can change it yet, each piece once, whole or (by a crash) by sectors. Each sector is
    ///   what it was or one of these. Whatever else is read there later came from another history: a violation;
    /// * if it crashes before the new history is durable it returns as of the old one, and begins once more.
    fn inherits(&mut self, node: Index) {
        self.truth_is_on(node);
        self.heir = Some(Heir {
            node,
            epoch: self.control.volume().epoch,
            began: false,
        });
    }

    /// Looks whether the replica that was made the volume begins its history.
    pub(super) fn look_at_heir(&mut self, node: Index) {
        let Some(heir) = self.heir.filter(|heir| heir.node == node) else {
            return;
        };
        let Some(lineage) = self.engine(node).and_then(|engine| engine.lineage()) else {
            return;
        };
        let began = lineage == self.control.volume().lineage;
        if began && !heir.began {
            self.truth_is_on(node);
        }
        self.heir = Some(Heir { began, ..heir });
    }

    /// A node opened: if it was the heir it has what it inherited.
    pub(super) fn heir_opened(&mut self, node: Index, epoch: Epoch) -> Verdict {
        let heir = self
            .heir
            .take_if(|heir| heir.node == node && heir.epoch < epoch);
        if heir.is_some_and(|heir| !heir.began) {
            let what = format!(
                "n{} opened at {epoch} without beginning the history that it was forced to begin",
                node + 1
            );
            return Err(Violation::new(RULE, what));
        }
        Ok(())
    }

    /// What a replica has, or what it was given may yet make of it, is the truth.
    fn truth_is_on(&mut self, node: Index) {
        let disk = &self.machines[node].disk;
        let end = self.scenario.blocks;
        let under_way = disk.under_way_below(end);
        let queued = self
            .engine(node)
            .map_or_else(Vec::new, relevo_replication::Engine::queued_writes);
        let queued = queued.into_iter().map(|(blocks, body)| match body {
            Body::Data(data) => (blocks, Some(data)),
            Body::Zeroes => (blocks, None),
        });
        let mut coming: BTreeMap<u64, Vec<Option<Bytes>>> = BTreeMap::new();
        for (blocks, data) in under_way.chain(queued) {
            for (block, at) in blocks.iter().zip((0..).step_by(BLOCK)) {
                let bytes = data.as_ref().map(|data| data.slice(at..at + BLOCK));
                coming.entry(block).or_default().push(bytes);
            }
        }
        let writes = |block, bytes: Option<&Bytes>| {
            // What is no content of ours is found by the reads.
            bytes
                .and_then(|bytes| read_block(block, bytes).ok())
                .unwrap_or([WriteNo::ZERO; SECTORS_PER_BLOCK])
        };
        self.history.restart(|block| {
            let coming = coming.get(&block).into_iter().flatten();
            let all = [disk.block(block)]
                .into_iter()
                .chain(coming.map(Option::as_ref));
            all.map(|bytes| writes(block, bytes)).collect()
        });
    }

    fn content(&self, node: Index) -> Content {
        let disk = &self.machines[node].disk;
        let blocks = disk.blocks_below(self.scenario.blocks);
        let content = blocks.filter_map(|block| Some((block, disk.block(block)?.clone())));
        content.collect()
    }

    /// A primary is cut off, an outdated replica is forced in its place, both are written to; then they
    /// meet. What only one has is overwritten when somebody decided, and saved before.
    pub(super) fn split_brain(&mut self) -> Verdict {
        let Some(old) = self.open_primary() else {
            return Ok(());
        };
        if self.scenario.nodes() < 3 {
            return Ok(());
        }
        let forced = self.other_than(old, self.scenario.data_nodes);
        let policy = self.choose_policy(old, forced);
        // Nothing else happens: what each side has must be known.
        self.scenario.ambush = 0.0;
        self.scenario.tends = 0.0;
        self.scenario.faults.clear();
        self.second.off = true;
        self.end_waits();
        self.load.writes_answered = 0;
        self.phase = Phase::Trouble;
        // What was cut before heals no more while somebody is cut off on purpose.
        self.quiet = true;
        self.run_until(self.cuts_over.max(self.second.over_at))?;
        self.quiet = false;
        self.some_time(200)?;
        if self.open_primary() != Some(old) {
            return Ok(());
        }
        self.sever_data(old);
        let alone = BTreeSet::from([node_id(old)]);
        self.wait("it is alone", |it| it.control.volume().in_sync == alone)?;
        self.some_time(200)?;
        self.sever_control(old);
        self.wait("it is evicted", |it| it.control.volume().primary.is_none())?;
        self.some_time(200)?;
        self.severed.insert(old);
        // What its clients asked for is answered, but for reads without a lease.
        self.run_until(self.queue.now() + Duration::from_millis(300))?;
        // A planner that knows old things may have named it again meanwhile.
        self.wait("it is evicted", |it| it.control.volume().primary.is_none())?;
        let fork = self.content(forced);
        let theirs = self.content(old);
        self.force(forced, false)?;
        self.wait("the forced replica serves", |it| {
            it.open_primary() == Some(forced)
        })?;
        // Now and then it writes nothing.
        self.quiet = self.chance.trouble.chance(20.0);
        self.some_time(400)?;
        let both = theirs != fork && self.content(forced) != fork && self.went_back.is_empty();
        self.mend_network();
        let mut scene = Scene {
            old,
            forced,
            policy,
            fork,
            loser: Some((old, theirs.clone())),
            theirs,
            both,
        };
        self.meet(&mut scene)?;
        if !self.went_back.is_empty() {
            scene.loser = None;
        }
        self.severed.clear();
        self.quiet = false;
        self.heal()?;
        self.settle()?;
        self.check_saved(&scene)
    }

    fn choose_policy(&mut self, old: Index, forced: Index) -> AfterSplitBrain {
        let policy = self.chance.trouble.pick(&[
            AfterSplitBrain::Disconnect,
            AfterSplitBrain::Disconnect,
            AfterSplitBrain::DiscardZeroChanges,
            AfterSplitBrain::DiscardLeastChanges,
            AfterSplitBrain::DiscardOlderPrimary,
            AfterSplitBrain::DiscardYoungerPrimary,
            AfterSplitBrain::Discard(node_id(old)),
            AfterSplitBrain::Discard(node_id(forced)),
        ]);
        let volume = self.control.volume();
        let command = Command::SetVolumeOptions {
            volume: volume.id,
            expect: volume.version,
            options: VolumeOptions {
                after_split_brain: policy,
                ..volume.options.clone()
            },
        };
        drop(self.commit_now(old, &command));
        policy
    }

    fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> Verdict {
        let until = self.queue.now() + HEAL_WITHIN;
        self.wait_for(until, what, done)
    }

    fn some_time(&mut self, most_ms: u64) -> Verdict {
        let time = self.chance.trouble.millis(1, most_ms);
        self.waits_since = Some(self.queue.now());
        self.run_until(self.queue.now() + time)
    }

    fn sever_data(&mut self, node: Index) {
        for other in (0..self.scenario.data_nodes).filter(|other| *other != node) {
            self.net.set_open(Plane::Data, node, other, false);
            self.net.set_open(Plane::Data, other, node, false);
        }
    }

    fn sever_control(&mut self, node: Index) {
        self.paths.sever(node, self.scenario.nodes());
        for other in (0..self.scenario.nodes()).filter(|other| *other != node) {
            self.net.set_open(Plane::Control, node, other, false);
            self.net.set_open(Plane::Control, other, node, false);
        }
    }

    fn force(&mut self, node: Index, others_give_way: bool) -> Verdict {
        let change = VolumeChange::Force {
            node: node_id(node),
            lineage: LineageId(self.chance.trouble.id()),
            others_give_way,
        };
        let expect = self.control.volume().epoch;
        self.commit_now(node, &volume_command(expect, change))
            .map_err(|rejection| {
                Violation::new(RULE, format!("forcing was rejected: {rejection}"))
            })?;
        self.inherits(node);
        Ok(())
    }

    /// Until all are in sync, by themselves or by a decision.
    fn meet(&mut self, scene: &mut Scene) -> Verdict {
        let until = self.queue.now() + HEAL_WITHIN;
        let mut crash = self.chance.trouble.chance(30.0);
        let mut decided = false;
        let quiet_from = self.queue.now() + HEAL_WITHIN / 3;
        let mut keep_at = self.queue.now();
        self.waits_since = Some(self.queue.now());
        while !(self.all_in_sync(true) && self.open_primary().is_some()) {
            self.step()?;
            self.quiet |= self.queue.now() >= quiet_from;
            let saves = self.machines[scene.old].saving.is_some();
            if saves && crash {
                crash = false;
                self.marks.reached("a crash while a history gave way");
                self.crash_and_return(scene.old, Crash::Process);
            }
            if !decided && self.is_split() {
                self.stands_alone(scene)?;
                decided = true;
                self.decide(scene)?;
            } else if self.queue.now() >= keep_at && self.is_split() {
                // A third replica met another one. A primary that is stopped hears of it later.
                self.keep_in_force(scene.forced);
                keep_at = self.queue.now() + KEEP_EVERY;
            }
            if self.queue.now() >= until {
                let status = |node| self.engine(node).map(relevo_replication::Engine::status);
                let what = format!(
                    "two histories that met did not become one within {HEAL_WITHIN:?} (decided: {decided}, {:?}): {:?}; {:?}",
                    scene.policy,
                    status(scene.old),
                    status(scene.forced)
                );
                return Err(Violation::new(HEALS, what));
            }
        }
        let by_hand = matches!(
            scene.policy,
            AfterSplitBrain::Disconnect | AfterSplitBrain::DiscardZeroChanges
        );
        // Whose history was in force gave way because it had nothing of its own; any other loser that has
        // something is a person's choice.
        let gave_way =
            !self.went_back.contains(&scene.old) && !self.machines[scene.old].saved.is_empty();
        if (scene.both && self.went_back.is_empty() || gave_way) && by_hand && !decided {
            return Err(Violation::new(
                RULE,
                format!("both had changes, and nobody decided ({:?})", scene.policy),
            ));
        }
        Ok(())
    }

    fn is_split(&self) -> bool {
        let primary = self.open_primary().and_then(|node| self.engine(node));
        primary.is_some_and(|engine| !engine.status().splits.is_empty())
    }

    /// While nobody decided, nothing of the other history is touched.
    fn stands_alone(&mut self, scene: &Scene) -> Verdict {
        let split_with = |cluster: &Self| {
            let primary = cluster.open_primary().and_then(|node| cluster.engine(node));
            primary.is_some_and(|engine| engine.status().splits.contains_key(&node_id(scene.old)))
        };
        if !split_with(self) {
            return Ok(());
        }
        self.some_time(600)?;
        if split_with(self) && self.content(scene.old) != scene.theirs {
            return Err(Violation::new(
                RULE,
                "a history that stands alone was overwritten".to_owned(),
            ));
        }
        Ok(())
    }

    fn keep_in_force(&mut self, by: Index) {
        let expect = self.control.volume().epoch;
        let keep = volume_command(expect, VolumeChange::KeepInForce);
        drop(self.commit_now(by, &keep));
    }

    fn decide(&mut self, scene: &mut Scene) -> Verdict {
        let in_force = self.chance.trouble.chance(50.0);
        if in_force || self.open_primary() != Some(scene.forced) {
            self.marks
                .reached("split brain was decided for the history in force");
            self.keep_in_force(scene.forced);
            return Ok(());
        }
        self.marks
            .reached("split brain was decided for the other history");
        self.wait("the old primary hears that it is over", |it| {
            it.machines[scene.old].open().is_none()
        })?;
        if self.open_primary() != Some(scene.forced) {
            return Ok(());
        }
        self.quiet = true;
        self.step_down_for(scene.forced, scene.old)?;
        self.wait("it steps down", |it| it.control.volume().primary.is_none())?;
        self.severed.insert(scene.forced);
        if self.control.volume().in_sync.contains(&node_id(scene.old)) {
            // A policy was faster.
            self.enable_service(true);
            return Ok(());
        }
        scene.loser = Some((scene.forced, self.content(scene.forced)));
        self.force(scene.old, true)?;
        self.enable_service(true);
        self.quiet = false;
        Ok(())
    }

    /// The operator ends a primary, because another node shall be it: stops the service that uses the
    /// volume, where there is one.
    fn step_down_for(&mut self, node: Index, other: Index) -> Verdict {
        self.target = Some(node_id(other));
        if self.scenario.managed {
            self.enable_service(false);
            return Ok(());
        }
        if let Some(process) = &mut self.machines[node].process {
            process.stepping_down = true;
        }
        self.feed(node, Input::Demote)
    }

    fn enable_service(&mut self, enabled: bool) {
        let services: Vec<ServiceId> = self.control.state().services.keys().copied().collect();
        for service in services {
            let command = Command::EnableService { service, enabled };
            drop(self.commit_now(0, &command));
        }
    }

    /// What only the loser had and does not have any more was saved.
    fn check_saved(&self, scene: &Scene) -> Verdict {
        let Some((loser, had)) = &scene.loser else {
            return Ok(());
        };
        let now = self.content(*loser);
        let saved = &self.machines[*loser].saved;
        for (block, bytes) in had {
            let own = scene.fork.get(block) != Some(bytes);
            let there = now.get(block) == Some(bytes);
            let kept = saved.get(block).is_some_and(|kept| kept[..] == bytes[..]);
            if own && !there && !kept {
                return Err(Violation::new(
                    RULE,
                    format!(
                        "block {block} of the history that gave way was overwritten and not saved"
                    ),
                ));
            }
        }
        Ok(())
    }
}
