//! Forced promotion, and histories that meet (rule 9).

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use relevo_replication::{
    DiskState, Input, PeerState, SaveId, SavePart, Side, Verdict, VolumeEvent, judge,
};
use relevo_types::{
    BlockRange, LineageId, NodeId,
    cluster::{AfterSplitBrain, VolumeChange},
};

use crate::world::{A, B, BLOCK, C, World};

/// Where a node keeps what gives way.
#[derive(Debug, Default)]
pub(crate) struct Safe {
    /// Why it takes nothing.
    no_room: Option<String>,
    under_way: BTreeMap<u64, Bytes>,
    /// By block.
    kept: BTreeMap<u64, Bytes>,
    pub(crate) answers: VecDeque<Input>,
}

impl Safe {
    pub(crate) fn keep(&mut self, id: SaveId, part: SavePart) {
        let result = self.no_room.clone().map_or(Ok(()), Err);
        match part {
            SavePart::Begin { .. } => self.under_way.clear(),
            SavePart::Blocks { blocks, data } => {
                for (block, at) in blocks.iter().zip((0..data.len()).step_by(BLOCK)) {
                    self.under_way.insert(block, data.slice(at..at + BLOCK));
                }
            }
            SavePart::End => self.kept.extend(std::mem::take(&mut self.under_way)),
        }
        self.answers.push_back(Input::Saved { id, result });
    }

    fn blocks(&self) -> Vec<u64> {
        self.kept.keys().copied().collect()
    }
}

/// The next answer of a node's safe.
pub(crate) fn next_answer(world: &mut World) -> Option<(NodeId, Input)> {
    let ids = world.ids();
    ids.into_iter()
        .filter(|id| world.nodes[id].engine.is_some())
        .collect::<Vec<_>>()
        .into_iter()
        .find_map(|id| Some((id, world.node(id).safe.answers.pop_front()?)))
}

fn force(world: &mut World, node: NodeId, lineage: u64, others_give_way: bool) {
    let epoch = world.volume().epoch;
    let change = VolumeChange::Force {
        node,
        lineage: LineageId(lineage),
        others_give_way,
    };
    world.change(epoch, change);
    world.run();
}

/// A is primary alone and hears no log; B was forced in its place. Both wrote: A blocks 1 and 2 after it
/// lost B, B what is said.
fn forked(ours: &[u64]) -> World {
    let mut world = World::opened(2, 64, A);
    world.write(A, 0, 1, 0x10);
    // Until everybody knows that it is complete.
    world.pass_ms(500);
    world.cut(A, B);
    for node in [A, B] {
        world.silence(node, if node == A { B } else { A });
    }
    world.pass_ms(3000);
    assert!(!world.volume().in_sync.contains(&B));
    world.write(A, 1, 2, 0xaa);
    world.run();
    world.node(A).control = false;
    world.evict(A);
    force(&mut world, B, 1000, false);
    world.promote(B);
    world.run();
    world.lease(B, Duration::from_secs(1000));
    assert!(world.status(B).open, "{:?}", world.status(B));
    for block in ours {
        world.write(B, *block, 1, 0xbb);
    }
    world.run();
    world
}

fn meet(world: &mut World) {
    world.node(A).control = true;
    world.deliver_configs(A);
    world.end_silence();
    world.connect_all();
    world.pass_ms(2000);
}

impl World {
    fn deliver_configs(&mut self, node: NodeId) {
        while self.has_config(node) {
            self.deliver_config(node);
        }
        self.run();
    }

    fn kept(&self, node: NodeId) -> Vec<u64> {
        self.nodes[&node].safe.blocks()
    }
}

#[test]
fn both_stand_alone_and_say_what_each_changed() {
    let mut world = forked(&[2, 5, 6]);
    let before: Vec<Vec<u8>> = (0..64).map(|block| world.block(A, block)).collect();
    meet(&mut world);
    for (node, ours, theirs) in [(A, 2, 3), (B, 3, 2)] {
        let status = world.status(node);
        let split = status.splits.values().next().expect("a split");
        assert_eq!((split.ours, split.theirs), (ours, theirs), "{node}");
        assert!(split.why.contains("disconnect"), "{}", split.why);
        let other = if node == A { B } else { A };
        assert_eq!(status.peers[&other], PeerState::StandAlone);
        let told = |event: &VolumeEvent| matches!(event, VolumeEvent::SplitBrain { .. });
        assert!(world.node(node).events.iter().any(told), "{node}");
        let engine = world.nodes[&node].engine.as_ref().unwrap();
        assert!(!engine.wants_link(other), "to be refused again and again");
    }
    let after: Vec<Vec<u8>> = (0..64).map(|block| world.block(A, block)).collect();
    assert_eq!(before, after, "nothing is merged in silence");
    assert!(world.status(B).open && !world.status(A).open);
}

#[test]
fn a_decision_for_what_is_in_force_overwrites_the_other_and_saves_it_first() {
    let mut world = forked(&[2, 5, 6]);
    meet(&mut world);
    let lost = world.block(A, 1);
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::KeepInForce);
    world.run();
    world.connect_all();
    world.pass_ms(3000);
    assert_eq!(world.kept(A), [1, 2]);
    assert_eq!(&world.nodes[&A].safe.kept[&1][..], &lost[..]);
    assert!(world.same(A, B), "{:?}", world.differing(A, B));
    assert!(world.volume().in_sync.contains(&A));
    assert!(!world.volume().replicas[&A].gives_way);
}

#[test]
fn a_decision_for_the_other_side_begins_a_history_there() {
    let mut world = forked(&[2, 5, 6]);
    meet(&mut world);
    world.input(B, Input::Demote);
    world.run();
    world.pass_ms(500);
    assert_eq!(world.volume().primary, None);
    force(&mut world, A, 2000, true);
    world.promote(A);
    world.run();
    world.connect_all();
    world.pass_ms(3000);
    assert_eq!(world.kept(B), [2, 5, 6]);
    assert!(world.kept(A).is_empty());
    assert!(world.same(A, B), "{:?}", world.differing(A, B));
    assert_eq!(world.block(B, 1)[0], 0xaa);
    assert!(world.volume().in_sync.contains(&B));
}

#[test]
fn who_wrote_nothing_since_the_fork_gives_way_without_a_word() {
    // The forced one wrote nothing: its history gives way.
    let mut world = forked(&[]);
    meet(&mut world);
    world.pass_ms(1000);
    assert!(world.status(B).splits.is_empty());
    assert_eq!(world.volume().primary, None, "{:?}", world.volume());
    assert!(world.volume().in_sync.contains(&A) && !world.volume().in_sync.contains(&B));
    world.promote(A);
    world.run();
    world.connect_all();
    world.pass_ms(3000);
    assert!(world.same(A, B) && world.volume().in_sync.contains(&B));
    assert_eq!(world.block(B, 1)[0], 0xaa);
    assert!(world.kept(B).is_empty());
}

#[test]
fn a_history_that_gives_way_promises_nothing_any_more() {
    let mut world = forked(&[]);
    // The log does not hear what B proposes.
    world.node(B).control = false;
    meet(&mut world);
    let late = world.write(B, 9, 1, 0xbb);
    world.run();
    assert!(!world.is_answered(late), "it would be lost");
    // What was proposed may be committed at any time: nothing is taken back when the other is gone again.
    world.cut(A, B);
    world.pass_ms(1000);
    assert!(!world.is_answered(late));
    world.node(B).control = true;
    world.pass_ms(1000);
    assert!(world.volume().in_sync.contains(&A), "{:?}", world.volume());
    assert!(world.is_answered(late) && !world.is_acked(late));
}

#[test]
fn an_outdated_third_replica_without_changes_follows_the_forced_one() {
    let mut world = World::opened(3, 64, A);
    world.write(A, 0, 1, 0x10);
    // Until everybody knows that it is complete.
    world.pass_ms(500);
    for node in [B, C] {
        world.cut(A, node);
        world.silence(A, node);
        world.silence(node, A);
    }
    world.pass_ms(3000);
    world.write(A, 1, 2, 0xaa);
    world.run();
    world.crash(A, true);
    world.evict(A);
    force(&mut world, B, 1000, false);
    world.promote(B);
    world.run();
    world.lease(B, Duration::from_secs(1000));
    world.write(B, 9, 1, 0xbb);
    world.run();
    world.connect_all();
    world.pass_ms(3000);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.status(B));
    assert!(world.same(B, C) && world.kept(C).is_empty());
    assert_eq!(world.status(C).disk, DiskState::UpToDate);
}

#[test]
fn without_room_to_save_nothing_is_overwritten() {
    let mut world = forked(&[2]);
    world.node(A).safe.no_room = Some("the disk is full".to_owned());
    meet(&mut world);
    let lost = world.block(A, 1);
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::KeepInForce);
    world.run();
    world.connect_all();
    world.pass_ms(3000);
    assert_eq!(world.block(A, 1), lost);
    assert_eq!(world.status(A).peers[&B], PeerState::StandAlone);
    // Room was made.
    world.node(A).safe.no_room = None;
    let connect = relevo_replication::Order::Connect { peer: None };
    world.order(A, connect).unwrap();
    world.connect_all();
    world.pass_ms(3000);
    assert!(world.same(A, B) && world.kept(A) == [1, 2]);
}

#[test]
fn a_crash_while_saving_saves_again() {
    let mut world = forked(&[2, 5]);
    meet(&mut world);
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::KeepInForce);
    for steps in 1..400 {
        if !world.step() {
            break;
        }
        if steps == 40 {
            world.connect_all();
        }
        if steps % 60 == 59 {
            world.crash(A, true);
            world.start(A);
            world.run();
            world.connect_all();
        }
    }
    world.run();
    world.connect_all();
    world.pass_ms(4000);
    assert!(world.same(A, B), "{:?}", world.differing(A, B));
    let kept = world.kept(A);
    assert!(kept.contains(&1) && kept.contains(&2), "{kept:?}");
}

#[test]
fn the_policies_judge() {
    let mut world = forked(&[2, 5, 6]);
    let side = |node, changed, lineage| Side {
        node,
        changed,
        consistent: true,
        lineage: LineageId(lineage),
    };
    let (ours, theirs) = (side(B, 3, 1000), side(A, 2, 77));
    let mut with = |policy, in_force: &Side, other: &Side| {
        world.set_options(|options| options.after_split_brain = policy);
        judge(world.volume(), in_force, other)
    };
    use AfterSplitBrain::{
        Discard, DiscardLeastChanges, DiscardOlderPrimary, DiscardYoungerPrimary,
        DiscardZeroChanges, Disconnect,
    };
    for policy in [Disconnect, DiscardZeroChanges, Discard(C)] {
        assert!(matches!(
            with(policy, &ours, &theirs),
            Verdict::StandAlone(_)
        ));
        let nothing = side(A, 0, 77);
        assert_eq!(with(policy, &ours, &nothing), Verdict::OtherGivesWay);
        let nothing = side(B, 0, 1000);
        assert_eq!(with(policy, &nothing, &theirs), Verdict::InForceGivesWay);
    }
    for policy in [DiscardLeastChanges, DiscardOlderPrimary, Discard(A)] {
        assert_eq!(
            with(policy, &ours, &theirs),
            Verdict::OtherGivesWay,
            "{policy:?}"
        );
    }
    let more = side(A, 4, 77);
    assert_eq!(
        with(DiscardLeastChanges, &ours, &more),
        Verdict::InForceGivesWay
    );
    for policy in [DiscardYoungerPrimary, Discard(B)] {
        assert_eq!(
            with(policy, &ours, &theirs),
            Verdict::InForceGivesWay,
            "{policy:?}"
        );
    }
    let even = side(A, 3, 77);
    assert!(matches!(
        with(DiscardLeastChanges, &ours, &even),
        Verdict::StandAlone(_)
    ));
    let forgotten = side(A, 3, 5);
    assert!(matches!(
        with(DiscardOlderPrimary, &ours, &forgotten),
        Verdict::StandAlone(_)
    ));
    let mix = Side {
        consistent: false,
        ..theirs
    };
    assert!(matches!(
        with(Discard(B), &ours, &mix),
        Verdict::StandAlone(_)
    ));
}

#[test]
fn a_replica_that_is_forced_in_the_middle_of_a_resync_has_what_it_was_given_until_then() {
    let mut world = forked(&[2, 5, 6]);
    meet(&mut world);
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::KeepInForce);
    // A gives way; its disk is slow with block 5 of B's history, which it lacks.
    let block = 5;
    let data = |op: &relevo_replication::DiskOp| {
        matches!(&op.kind, relevo_replication::DiskOpKind::Write { offset, data }
            if *offset <= block * 4096 && *offset + data.len() as u64 > block * 4096)
    };
    world.run();
    world.connect_all();
    let slow = loop {
        assert!(world.step(), "the resync does not begin");
        if let Some(at) = world.node(A).ops.iter().position(data) {
            break world.node(A).ops.remove(at);
        }
    };
    world.crash(B, false);
    world.evict(B);
    let epoch = world.volume().epoch;
    let change = VolumeChange::Force {
        node: A,
        lineage: LineageId(2000),
        others_give_way: true,
    };
    world.change(epoch, change);
    world.promote(A);
    world.pass_ms(3000);
    world.lease(A, Duration::from_secs(1000));
    assert!(world.status(A).open, "{:?}", world.status(A));
    let lineage = |world: &World| world.nodes[&A].engine.as_ref().unwrap().lineage();
    assert_eq!(lineage(&world), Some(LineageId(2000)));
    // What it was given is neither taken back nor done after what comes later.
    let range = BlockRange::new(block, 1).bytes();
    let read = world.read(A, range);
    let write = world.write(A, block, 1, 0xcc);
    world.run();
    assert!(!world.is_answered(read) && !world.is_answered(write));
    world.node(A).ops.push(slow);
    world.run();
    assert_eq!(world.replies[&read].as_ref().unwrap()[0], 0xbb);
    assert!(world.is_acked(write));
    assert_eq!(world.block(A, block)[0], 0xcc);
}

#[test]
fn who_took_another_history_judges_those_it_was_linked_with_before() {
    let mut world = World::opened(3, 64, B);
    world.write(B, 0, 1, 0x10);
    world.pass_ms(500);
    let apart = |world: &mut World, from: &[NodeId]| {
        for node in from {
            world.cut(A, *node);
            world.silence(A, *node);
            world.silence(*node, A);
        }
    };
    apart(&mut world, &[B, C]);
    world.pass_ms(3000);
    assert!(!world.volume().in_sync.contains(&A));
    world.write(B, 1, 2, 0xbb);
    world.pass_ms(500);
    world.evict(B);
    force(&mut world, A, 1000, false);
    world.promote(A);
    world.run();
    world.lease(A, Duration::from_secs(1000));
    world.write(A, 5, 1, 0xaa);
    world.run();
    // B and C shall give way. C hears nothing of A yet, but is linked with B all the time.
    let epoch = world.volume().epoch;
    world.change(epoch, VolumeChange::KeepInForce);
    world.run();
    world.end_silence();
    apart(&mut world, &[C]);
    world.connect(A, B);
    world.pass_ms(3000);
    assert!(world.volume().in_sync.contains(&B), "{:?}", world.status(B));
    world.connect(B, C);
    world.crash(A, false);
    world.evict(A);
    world.promote(B);
    world.pass_ms(3000);
    world.lease(B, Duration::from_secs(1000));
    world.connect(B, C);
    world.pass_ms(3000);
    assert!(world.volume().in_sync.contains(&C), "{:?}", world.status(B));
    assert!(world.same(B, C) && world.block(C, 5)[0] == 0xaa);
    assert_eq!(world.kept(C), [1, 2]);
}
