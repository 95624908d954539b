//! Feeding engines and carrying out what they ask for; crashes between two effects of one input.

use std::time::Duration;

use relevo_replication::{
    DiskOp, DiskOpKind, Effect, Input, OpId, PeerState, SavePart, VolumeEvent,
};
use relevo_types::{ByteRange, NodeId, Time, cluster::Protocol};
use relevo_wire::{Message, Refusal};

use super::{Cluster, Crash, Event, Phase, index_of, node_id};
use crate::{
    check::{Verdict, Violation, cold::Seen},
    cluster::machine::Failing,
    net::Index,
};

impl Cluster {
    /// Gives an input to a node's engine, now or when its process goes on.
    pub(super) fn feed(&mut self, node: Index, input: Input) -> Verdict {
        let now = self.queue.now();
        let machine = &mut self.machines[node];
        let paused = machine.paused_until.is_some();
        let local = now + machine.clock_offset;
        let Some(process) = &mut machine.process else {
            return Ok(());
        };
        if paused {
            process.inbox.push_back(input);
            return Ok(());
        }
        let Some(engine) = &mut process.engine else {
            return Ok(());
        };
        if self.trace.is_on() {
            self.trace
                .node(now, node, || format!("< {}", input_words(&input)));
        }
        if let Input::Message { peer, message } = &input {
            process.lower_epoch.arrives(*peer, message);
            if matches!(message, Message::Content { .. }) {
                self.second.content_arrived(node, index_of(*peer));
            }
        }
        if let Input::Message {
            message: Message::Tail {
                blocks, certain, ..
            },
            ..
        } = &input
        {
            if !certain {
                self.marks
                    .reached("reconciliation found a member that could not tell");
            } else if !blocks.is_empty() {
                self.marks.reached("reconciliation carried a tail");
            }
        }
        // For every input: without a new list each time.
        let mut effects = std::mem::take(&mut self.effects);
        engine.handle(local, input, &mut effects);
        // With debug assertions the engine looks by itself after every input, and panics.
        if cfg!(not(debug_assertions))
            && let Err(what) = engine.check_invariants()
        {
            return Err(Violation::new(
                "the engine's own invariants",
                format!("n{}: {what}", node + 1),
            ));
        }
        let deadline = engine.deadline();
        let incarnation = process.incarnation;
        if deadline < process.tick_at {
            process.tick_at = deadline;
            // Never earlier than a moment ahead: an engine that asks for the past again and again
            // shows as a run without an end, not as a hang.
            let due = Time(deadline.0.saturating_sub(nanos(machine.clock_offset)));
            self.queue.at(
                due.max(now + Duration::from_micros(1)),
                Event::Tick {
                    node,
                    incarnation,
                    deadline,
                },
            );
        }
        self.look_at_heir(node);
        self.carry_out(node, incarnation, &mut effects)?;
        // Those of a crash that came between were never carried out.
        effects.clear();
        self.effects = effects;
        self.tell_of_engine(node, None);
        Ok(())
    }

    fn carry_out(&mut self, node: Index, incarnation: u64, effects: &mut Vec<Effect>) -> Verdict {
        let count = effects.len();
        for (position, effect) in effects.drain(..).enumerate() {
            if self.crash_is_due(node, &effect) {
                if position > 0 && position < count {
                    self.marks.reached("crash between two effects of one input");
                }
                return Ok(());
            }
            self.carry_out_one(node, incarnation, effect)?;
        }
        Ok(())
    }

    /// Crashes the node now if that was arranged. The effect is not carried out then.
    fn crash_is_due(&mut self, node: Index, effect: &Effect) -> bool {
        let machine = &mut self.machines[node];
        let mut crash = None;
        if let Some((left, kind)) = &mut machine.crash_in {
            if *left == 0 {
                crash = Some(*kind);
            } else {
                *left -= 1;
            }
        }
        if matches!(effect, Effect::Disk(_)) {
            if let Some(point) = self.scenario.crash_point
                && point.node == node
                && point.disk_effect == machine.disk_effects
            {
                crash = Some(if point.power {
                    Crash::Power
                } else {
                    Crash::Process
                });
            }
            machine.disk_effects += 1;
        }
        let Some(kind) = crash else { return false };
        self.crash(node, kind);
        let back = self.chance.trouble.spread_millis(3, 900);
        self.queue.after(back, Event::Start(node));
        true
    }

    fn carry_out_one(&mut self, node: Index, incarnation: u64, effect: Effect) -> Verdict {
        let now = self.queue.now();
        if self.trace.is_on() {
            self.trace
                .node(now, node, || format!("> {}", effect_words(&effect)));
        }
        match effect {
            Effect::Disk(op) => self.begin_disk(node, incarnation, op),
            Effect::Send { peer, message } => self.send(node, peer, message),
            Effect::CloseLink { peer, .. } => {
                if self.machines[node]
                    .process
                    .as_ref()
                    .is_some_and(|p| p.syncing)
                {
                    self.marks.reached("resync: link lost while it ran");
                }
                let due = now + self.message_delay();
                if let Some((head, due)) = self.net.close(node, index_of(peer), due) {
                    self.queue.at(due, Event::Arrive(head));
                }
                Ok(())
            }
            Effect::Reply { id, result } => self.reply(node, id, result),
            Effect::Propose { expect, change } => {
                self.propose(node, crate::control::volume_command(expect, change));
                Ok(())
            }
            Effect::OrderDone { .. } => Ok(()),
            Effect::Save { id, part } => self.save(node, id, part),
            Effect::Event(event) => self.volume_event(node, event),
        }
    }

    fn begin_disk(&mut self, node: Index, incarnation: u64, op: DiskOp) -> Verdict {
        let now = self.queue.now();
        let id = op.op;
        let fails = match (self.machines[node].failing, &op.kind) {
            (Some(Failing::Read), DiskOpKind::Read(_)) => Some("disk error on read"),
            (Some(Failing::Write), DiskOpKind::Write { .. } | DiskOpKind::Zero(_)) => {
                Some("disk error on write")
            }
            (Some(Failing::Flush), DiskOpKind::Flush) => Some("disk error on flush"),
            _ => None,
        };
        if let Some(mark) = fails {
            self.marks.reached(mark);
            self.machines[node].failing = None;
        }
        let usual = self.scenario.disk_us;
        let rng = &mut self.chance.disk;
        let mut delay = rng.micros(20, usual);
        if rng.chance(2.0) {
            delay += rng.micros(0, 20 * usual);
        }
        self.watch_disk(node, &op)?;
        let machine = &mut self.machines[node];
        machine.disk.submit(op).map_err(|what| {
            Violation::new(
                "the engine uses its disk as agreed",
                format!("n{}: {what}", node + 1),
            )
        })?;
        let at = (now + delay).max(machine.slow_until + delay);
        self.queue.at(
            at,
            Event::DiskDone {
                node,
                incarnation,
                op: id,
                fails: fails.is_some(),
            },
        );
        Ok(())
    }

    /// Looks at what is written before it is.
    fn watch_disk(&mut self, node: Index, op: &DiskOp) -> Verdict {
        let machine = &mut self.machines[node];
        let Some(cold) = &mut machine.cold else {
            return Ok(());
        };
        let range = match &op.kind {
            DiskOpKind::Write { offset, data } => ByteRange::new(*offset, data.len() as u64),
            DiskOpKind::Zero(range) => *range,
            DiskOpKind::Read(_) | DiskOpKind::Flush => return Ok(()),
        };
        if cold.is_data(range) {
            return cold
                .data(&machine.disk, range)
                .map_err(|v| Violation::new(v.rule, format!("n{}: {}", node + 1, v.what)));
        }
        if let DiskOpKind::Write { offset, data } = &op.kind {
            match cold.metadata(*offset, data) {
                Some(Seen::Eviction) => self.marks.reached("activity log: a region was evicted"),
                Some(Seen::Superblock { even: true }) => {
                    self.marks.reached("superblock slot 0 written")
                }
                Some(Seen::Superblock { even: false }) => {
                    self.marks.reached("superblock slot 1 written")
                }
                None => {}
            }
        }
        Ok(())
    }

    pub(super) fn disk_done(
        &mut self,
        node: Index,
        incarnation: u64,
        op: OpId,
        fails: bool,
    ) -> Verdict {
        let machine = &mut self.machines[node];
        if machine.incarnation() != incarnation {
            return Ok(());
        }
        if machine.hung {
            self.queue.after(
                Duration::from_millis(20),
                Event::DiskDone {
                    node,
                    incarnation,
                    op,
                    fails,
                },
            );
            return Ok(());
        }
        let rng = &mut self.chance.disk;
        let result = if fails {
            machine.disk.fail(op, rng).map(Err)
        } else {
            machine.disk.complete(op, rng).map(Ok)
        };
        match result {
            Some(result) => self.feed(node, Input::Disk { op, result }),
            None => Ok(()),
        }
    }

    /// A tick comes due, unless an earlier one took its place: that one sees to what is due later. If each
    /// arranged its own successor there would be more and more of them.
    pub(super) fn tick_due(&mut self, node: Index, incarnation: u64, deadline: Time) -> Verdict {
        let process = self.machines[node].process.as_ref();
        if process.is_some_and(|process| process.tick_at == deadline) {
            self.tick(node, incarnation)
        } else {
            Ok(())
        }
    }

    pub(super) fn tick(&mut self, node: Index, incarnation: u64) -> Verdict {
        let now = self.queue.now();
        let machine = &mut self.machines[node];
        if machine.incarnation() != incarnation || machine.paused_until.is_some() {
            return Ok(());
        }
        let local = now + machine.clock_offset;
        let offset = machine.clock_offset;
        let Some(process) = &mut machine.process else {
            return Ok(());
        };
        process.tick_at = Time::NEVER;
        let Some(deadline) = process
            .engine
            .as_ref()
            .map(relevo_replication::Engine::deadline)
        else {
            return Ok(());
        };
        if deadline <= local {
            self.feed(node, Input::Tick)
        } else {
            if deadline != Time::NEVER {
                process.tick_at = deadline;
                let due = Time(deadline.0.saturating_sub(nanos(offset)));
                self.queue.at(
                    due,
                    Event::Tick {
                        node,
                        incarnation,
                        deadline,
                    },
                );
            }
            Ok(())
        }
    }

    pub(super) fn message_delay(&mut self) -> Duration {
        let usual = self.scenario.net_us;
        let rng = &mut self.chance.net;
        let delay = rng.micros(30, usual);
        if rng.chance(1.0) { delay * 10 } else { delay }
    }

    /// When a message gets on its way: the line to a replica of protocol A may be slow.
    fn line_free(&mut self, node: Index, peer: Index, message: &Message) -> Time {
        let now = self.queue.now();
        let volume = self.control.volume();
        let far = volume.protocol(node_id(node), node_id(peer)) == Protocol::A
            && matches!(message, Message::Write { .. } | Message::SyncWrite { .. });
        if !far || self.scenario.far_us == 0 || self.phase != Phase::Trouble {
            return now;
        }
        let line = &mut self.machines[peer].line_busy_until;
        *line = (*line).max(now) + Duration::from_micros(self.scenario.far_us);
        *line
    }

    fn send(&mut self, node: Index, peer: NodeId, message: Message) -> Verdict {
        if let Some(process) = &mut self.machines[node].process {
            process
                .lower_epoch
                .sends(peer, &message)
                .map_err(|v| Violation::new(v.rule, format!("n{}: {}", node + 1, v.what)))?;
        }
        self.point_of_message(node, index_of(peer), &message);
        match &message {
            Message::BarrierAck { .. } => {
                self.machines[node].barrier_passed = self.history.tick();
            }
            Message::Refuse(Refusal::StaleEpoch { .. }) => {
                self.marks.reached("refused: a stale epoch")
            }
            Message::SyncWrite { .. } | Message::SyncDigests { .. } => self.look_at_rate(node),
            Message::SyncDiffer { blocks, .. } => {
                self.marks.reached(if blocks.is_empty() {
                    "resync: blocks were the same"
                } else {
                    "resync: blocks differed"
                });
            }
            Message::DirtyMap { .. } => {
                self.marks
                    .reached("a member told of another one's dirty blocks");
            }
            _ => {}
        }
        match &message {
            Message::Behind { .. } => self.marks.reached("protocol A: pulled ahead of a replica"),
            Message::Generation {
                confirmed: true, ..
            } => self
                .marks
                .reached("protocol A: a generation of marks was forgotten"),
            Message::Following { .. } if self.machines[index_of(peer)].was_behind => {
                self.machines[index_of(peer)].was_behind = false;
                self.marks
                    .reached("protocol A: one that was left behind has caught up");
            }
            _ => {}
        }
        if matches!(message, Message::Behind { .. }) {
            self.machines[index_of(peer)].was_behind = true;
        }
        let due = self.line_free(node, index_of(peer), &message) + self.message_delay();
        if let Some((head, due)) = self.net.send(node, index_of(peer), message, due) {
            self.queue.at(due, Event::Arrive(head));
        }
        Ok(())
    }

    fn volume_event(&mut self, node: Index, event: VolumeEvent) -> Verdict {
        self.tell_of_engine(node, Some(event.clone()));
        let Some(process) = &mut self.machines[node].process else {
            return Ok(());
        };
        match event {
            VolumeEvent::Attached { clean, .. } => {
                process.attached = true;
                if !clean {
                    self.marks.reached("metadata of an unclean end was read");
                }
            }
            VolumeEvent::Detached => self.detached(node),
            VolumeEvent::Healed { .. } => {
                self.marks
                    .reached("a read error was healed from another replica");
            }
            VolumeEvent::Unreadable { blocks, .. } => {
                self.marks
                    .reached("a replica could not read what was compared");
                self.machines[node].unreadable.extend(blocks.iter());
            }
            VolumeEvent::DiskFailed { reason } => {
                if reason.contains("while it was attached") {
                    self.marks
                        .reached("a disk that hung while it was attached was given up");
                } else if reason.contains("disk-timeout") {
                    self.marks.reached("a disk that hung was given up");
                }
                process.disk_failed = true;
                self.person_needed = true;
                let open = process.open.take().is_some();
                if !open && self.gives_receipts(node) {
                    // What it received and did not write is lost; its word may still be on the way.
                    self.machines[node].lost_power = Some(self.history.tick());
                }
            }
            VolumeEvent::Opened { epoch } => {
                process.open = Some(epoch);
                process.lower_epoch.opened(epoch);
                self.opened(node, epoch)?;
            }
            VolumeEvent::Tends { .. } => self.holes_are_known(node),
            VolumeEvent::Closed { .. } => {
                process.open = None;
                self.closed(node)?;
            }
            VolumeEvent::SplitBrain { .. } => self.marks.reached("split brain was seen"),
            VolumeEvent::GaveWay { .. } => self.marks.reached("a history gave way"),
            VolumeEvent::Verified {
                node: peer,
                differing,
                stopped,
                ..
            } => {
                let found = (index_of(peer), &differing[..]);
                self.verified(node, found, stopped.is_none())?;
            }
            VolumeEvent::Peer { state, .. } => {
                let paused = matches!(
                    state,
                    PeerState::PausedSyncS { .. } | PeerState::PausedSyncT
                );
                let now_syncing =
                    paused || matches!(state, PeerState::SyncSource { .. } | PeerState::SyncTarget);
                if process.sync_paused && now_syncing && !paused {
                    self.marks.reached("a paused resync went on");
                }
                process.sync_paused = paused;
                let began = now_syncing && !process.syncing;
                process.syncing = now_syncing;
                if began {
                    self.marks.reached("resync: started");
                    self.ambush(node);
                }
            }
        }
        Ok(())
    }

    /// Whether a resync is held because an application has something to do.
    fn look_at_rate(&mut self, node: Index) {
        let chosen = self.control.volume().options.sync_rate;
        let status = self.engine(node).map(relevo_replication::Engine::status);
        let (Some(status), None) = (status, chosen.fixed) else {
            return;
        };
        let held = status.sync_limit.is_some() && status.sync_limit != chosen.max;
        if let Some(process) = &mut self.machines[node].process {
            let before = std::mem::replace(&mut process.sync_held, held);
            if held {
                self.marks
                    .reached("resync: held for the application's sake");
            } else if before {
                self.marks.reached("resync: held no longer");
            }
        }
    }

    fn opened(&mut self, node: Index, epoch: relevo_types::Epoch) -> Verdict {
        let at = self.history.tick();
        self.one_writer.opened(self.machines[node].id, epoch, at)?;
        self.heir_opened(node, epoch)?;
        let volume = self.machines[node].known_volume();
        if volume.epoch == epoch && volume.tends {
            return Err(Violation::new(
                "who only tends a volume takes no requests: it is displaced without a proof (rules 1, 8)",
                format!("n{} opened at {epoch}, at which it only tends", node + 1),
            ));
        }
        if self.last_open.is_some_and(|last| last != node) {
            self.marks
                .reached("failover: another node opened than before");
            if self.target == Some(self.machines[node].id) {
                self.marks
                    .reached("switchover: the old primary demoted, another opened");
                let last = self.last_open.map_or(node, |last| last);
                let volume = self.control.volume();
                if volume.protocol(node_id(last), node_id(node)) == Protocol::A {
                    self.marks
                        .reached("protocol A: switchover to such a replica");
                }
            }
        }
        self.last_open = Some(node);
        self.severed.remove(&node);
        self.holes_are_known(node);
        self.ambush(node);
        Ok(())
    }

    /// What this node has is the truth from now on, with the holes that a power loss left.
    fn holes_are_known(&mut self, node: Index) {
        if let Some(lost) = self.machines[node].lost_power.take() {
            self.history.cut(lost);
        }
    }

    /// Whether a node's replica is of protocol B towards any other.
    fn gives_receipts(&self, node: Index) -> bool {
        let (volume, node) = (self.control.volume(), node_id(node));
        let mut others = volume.replicas.keys().filter(|other| **other != node);
        others.any(|other| volume.protocol(node, *other) == Protocol::B)
    }

    /// A node's process is gone, with its power or without.
    pub(super) fn crash(&mut self, node: Index, kind: Crash) {
        let now = self.queue.now();
        // After a failed flush what the disk shows and what it holds may differ for good; who uses
        // it again starts from what it holds.
        let kind = if self.machines[node].disk.flush_failed() {
            Crash::Power
        } else {
            kind
        };
        let (open, syncing, promoting) = match &self.machines[node].process {
            None => (false, false, false),
            Some(process) => {
                let open = process.open.is_some();
                let mine =
                    self.machines[node].known_volume().primary == Some(self.machines[node].id);
                (open, process.syncing, mine && !open)
            }
        };
        self.trace.node(now, node, || format!("!!! {kind:?} lost"));
        if syncing {
            self.marks
                .reached("crash while a resync runs to or from the node");
        }
        if promoting {
            self.marks.reached("crash while promoting, before opening");
        }
        // What a replica received and did not write is gone with its process, like what was not
        // flushed is gone with the power.
        let engine = self.machines[node].process.as_ref();
        let received = engine
            .and_then(|process| process.engine.as_ref())
            .is_some_and(|engine| !engine.received_blocks().is_empty());
        let receipts = self.gives_receipts(node);
        let machine = &mut self.machines[node];
        if received && receipts {
            machine.lost_power = Some(self.history.tick());
            self.marks
                .reached("protocol B: a replica crashed with received writes");
        }
        machine.process = None;
        machine.paused_until = None;
        machine.crash_in = None;
        // Services die with the keeper; an address stays until its lifetime is over, except without
        // power.
        machine.kept.active.clear();
        match kind {
            Crash::Process => machine.disk.crash_process(&mut self.chance.disk),
            Crash::Power => {
                machine.disk.lose_power(&mut self.chance.disk);
                machine.kept.addresses.clear();
                machine.lost_power = Some(self.history.tick());
                if open {
                    self.marks.reached("power loss of the primary");
                }
            }
        }
        let due = now + self.message_delay();
        let speaks = kind == Crash::Process;
        for (head, due) in self.net.node_gone(node, speaks, due, &mut self.chance.net) {
            self.queue.at(due, Event::Arrive(head));
        }
        self.requests_lost(node);
    }
}

pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn input_words(input: &Input) -> String {
    match input {
        Input::Config(volume) => format!(
            "config {} primary {:?} in sync {:?}",
            volume.epoch, volume.primary, volume.in_sync
        ),
        Input::Message { peer, message } => format!("{peer}: {}", message_words(message)),
        Input::Disk { op, result } => match result {
            Ok(_) => format!("disk {} done", op.0),
            Err(error) => format!("disk {} {error}", op.0),
        },
        Input::Request { id, request } => match request {
            relevo_replication::AppRequest::Write { range, fua, .. } => {
                format!(
                    "request {} write {range:?}{}",
                    id.0,
                    if *fua { " fua" } else { "" }
                )
            }
            other => format!("request {} {other:?}", id.0),
        },
        other => format!("{other:?}"),
    }
}

fn effect_words(effect: &Effect) -> String {
    match effect {
        Effect::Disk(op) => match &op.kind {
            DiskOpKind::Write { offset, data } => {
                format!("disk {} write {offset}+{}", op.op.0, data.len())
            }
            other => format!("disk {} {other:?}", op.op.0),
        },
        Effect::Send { peer, message } => format!("{peer}: {}", message_words(message)),
        Effect::Reply { id, result } => match result {
            Ok(bytes) => format!("reply {} ok {}", id.0, bytes.len()),
            Err(error) => format!("reply {} {error:?}", id.0),
        },
        Effect::Propose { expect, change } => format!("propose {change:?} at {expect}"),
        Effect::Event(event) => format!("{event:?}"),
        Effect::OrderDone { id, result } => format!("order {} {result:?}", id.0),
        Effect::Save { id, part } => match part {
            SavePart::Blocks { blocks, .. } => format!("save {} {blocks:?}", id.0),
            other => format!("save {} {other:?}", id.0),
        },
        Effect::CloseLink { peer, reason } => format!("close link to {peer}: {reason}"),
    }
}

fn message_words(message: &Message) -> String {
    match message {
        Message::Write {
            epoch,
            seq,
            complete,
            range,
            dirty_for,
            ..
        } => format!("Write {epoch} {seq} complete {complete} {range:?} dirty_for {dirty_for:b}"),
        Message::SyncWrite {
            epoch, id, range, ..
        } => format!("SyncWrite {epoch} {id} {range:?}"),
        other => format!("{other:?}"),
    }
}
