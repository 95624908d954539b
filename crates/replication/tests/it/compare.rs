//! Resync by checksum, and zeroes in a resync.

use relevo_replication::{Order, PeerState};
use relevo_types::cluster::options::Csums;
use relevo_wire::Message;

use crate::world::{A, B, BLOCK, World};

const BLOCKS: u64 = 4096;

/// Two replicas with the same data in the first blocks; B is not linked.
fn used(blocks: u64, csums: Csums) -> World {
    let mut world = World::opened(2, BLOCKS, A);
    world.set_options(|options| options.csums = csums);
    for block in (0..blocks).step_by(64) {
        world.write(A, block, 64.min(blocks - block), 7);
    }
    world.pass_ms(200);
    assert!(world.same(A, B));
    world
}

/// B counts all of its blocks as uncertain.
fn invalidate(world: &mut World) {
    world.order(B, Order::Invalidate).unwrap();
    world.pass_ms(100);
}

/// The disk of B has something else there.
fn alter(world: &mut World, blocks: impl IntoIterator<Item = u64>) {
    for block in blocks {
        let disk = &mut world.node(B).disk;
        disk.write(block * BLOCK as u64, &[0x55; BLOCK]);
        disk.flush();
    }
}

fn resync(world: &mut World) {
    world.connect(A, B);
    world.pass_ms(500);
    assert_eq!(world.status(A).peers[&B], PeerState::Established);
    assert!(world.volume().in_sync.contains(&B));
    assert!(world.same(A, B), "{:?}", world.differing(A, B));
}

fn same_blocks(world: &World) -> u64 {
    let same = world.status(A).sync_same;
    same.get(&B).map_or(0, |bytes| bytes / BLOCK as u64)
}

/// What the activity log of a crash names is nearly all the same: `auto` sends digests.
#[test]
fn after_a_crash_digests_travel_and_no_data() {
    let mut world = used(600, Csums::Auto);
    world.crash(B, false);
    world.pass_ms(2000);
    world.write(A, 10, 1, 8);
    world.pass_ms(100);
    world.start(B);
    world.run();
    resync(&mut world);
    assert_eq!(world.copied_bytes, BLOCK as u64, "one block was written");
    assert_eq!(same_blocks(&world), 599);
}

#[test]
fn only_what_differs_travels() {
    let mut world = used(BLOCKS, Csums::Yes);
    invalidate(&mut world);
    let altered = [0, 31, 32, 1000, 1001, 1003, BLOCKS - 1];
    alter(&mut world, altered);
    resync(&mut world);
    assert_eq!(world.compared, BLOCKS);
    assert_eq!(world.copied, altered.len() as u64);
    assert_eq!(same_blocks(&world), BLOCKS - altered.len() as u64);
}

#[test]
fn without_checksums_everything_travels() {
    let mut world = used(1000, Csums::No);
    invalidate(&mut world);
    resync(&mut world);
    assert_eq!((world.compared, same_blocks(&world)), (0, 0));
    assert_eq!(world.copied_bytes, 1000 * BLOCK as u64);
}

/// Where nothing is the same digests are only a burden.
#[test]
fn auto_gives_up_where_nothing_is_the_same_and_looks_again() {
    let mut world = used(BLOCKS, Csums::Auto);
    invalidate(&mut world);
    alter(&mut world, 0..BLOCKS);
    resync(&mut world);
    assert!(
        world.compared <= 256 + BLOCKS / 64 + 32,
        "{}",
        world.compared
    );
    assert_eq!(world.copied, BLOCKS);

    // A volume of which the beginning differs and the rest does not.
    let mut world = used(BLOCKS, Csums::Auto);
    invalidate(&mut world);
    alter(&mut world, 0..BLOCKS / 2);
    resync(&mut world);
    let in_vain = world.copied - BLOCKS / 2;
    assert!(in_vain < BLOCKS / 2, "it never looked again");
}

/// Writes of the application while blocks are compared, in any order of what happens.
#[test]
fn writes_that_come_between_are_neither_lost_nor_undone() {
    for seed in 0..40u64 {
        let mut world = used(512, Csums::Yes);
        world.random = crate::world::Random::new(seed);
        invalidate(&mut world);
        alter(&mut world, (0..512).filter(|block| block % 5 == seed % 5));
        world.connect(A, B);
        for step in 0..600u64 {
            if step % 6 == 0 {
                let block = world.random.next() % 512;
                world.write(A, block, 1 + step % 3, step.to_le_bytes()[0]);
            }
            world.anything();
        }
        world.pass_ms(500);
        assert!(world.volume().in_sync.contains(&B), "seed {seed}");
        assert!(world.same(A, B), "seed {seed}: {:?}", world.differing(A, B));
    }
}

/// A lost link, again and again, loses no answer that counted and counts none that did not come.
#[test]
fn a_link_lost_between_question_and_answer_clears_nothing() {
    let mut world = used(512, Csums::Yes);
    invalidate(&mut world);
    alter(&mut world, [3, 300]);
    world.connect(A, B);
    while !matches!(world.head(A, B), Some(Message::SyncDigests { .. })) {
        assert!(world.step(), "it compares");
    }
    let dirty = world.status(A).peers[&B];
    assert_eq!(dirty, PeerState::SyncSource { dirty: BLOCKS });
    world.cut(A, B);
    world.run();
    let marked: u64 = world.nodes[&A]
        .engine
        .as_ref()
        .unwrap()
        .dirty_blocks(B)
        .iter()
        .map(|run| run.count)
        .sum();
    assert_eq!(marked, BLOCKS);
    resync(&mut world);
}

/// Its content can't be compared, so it is given it; writing makes it readable.
#[test]
fn a_block_that_the_target_can_not_read_is_copied() {
    let mut world = used(512, Csums::Yes);
    invalidate(&mut world);
    world.node(B).disk.bad.insert(40);
    resync(&mut world);
    assert!(world.node(B).disk.bad.is_empty());
    assert_eq!(
        world.copied_bytes,
        32 * BLOCK as u64,
        "the piece that it is in"
    );
}

#[test]
fn a_pause_stops_the_copying_of_what_was_compared() {
    let mut world = used(512, Csums::Yes);
    invalidate(&mut world);
    alter(&mut world, 100..200);
    world.connect(A, B);
    while !matches!(world.head(B, A), Some(Message::SyncDiffer { blocks, .. }) if !blocks.is_empty())
    {
        assert!(world.step(), "it compares");
    }
    world.order(A, Order::PauseSync { peer: None }).unwrap();
    world.copied_bytes = 0;
    world.pass_ms(100);
    assert_eq!(world.copied_bytes, 0);
    assert!(!world.same(A, B));
    world.order(A, Order::ResumeSync { peer: None }).unwrap();
    world.pass_ms(500);
    assert!(world.volume().in_sync.contains(&B) && world.same(A, B));
    assert_eq!(world.copied_bytes, 100 * BLOCK as u64);
}

/// A volume with data at its beginning and its end, and a few blocks in the middle.
#[test]
fn runs_of_zeroes_travel_in_few_frames_and_are_no_data() {
    let mut world = World::opened(2, BLOCKS, A);
    world.set_options(|options| options.csums = Csums::No);
    world.write(A, 0, 8, 7);
    world.write(A, 2000, 3, 7);
    world.write(A, BLOCKS - 1, 1, 7);
    world.pass_ms(100);
    invalidate(&mut world);
    alter(&mut world, 500..600);
    resync(&mut world);
    assert_eq!(world.copied, BLOCKS);
    let data = 8 + 3 + 1;
    assert_eq!(world.copied_bytes, data * BLOCK as u64);
    // In pieces of 32 blocks, as data has them, it were 128. A quarter of the window, 64 blocks here, is
    // read at once.
    assert!(world.copies <= 80, "{} frames", world.copies);
}
