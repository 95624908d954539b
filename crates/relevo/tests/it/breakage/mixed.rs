//! One failure after the other, drawn by a seed, the next ones in the middle of the recovery from the
//! first. Whatever happened, when everything is repaired nothing may be missing.

use std::{collections::BTreeMap, thread::sleep, time::Duration};

use chaos::{Direction, Fault, Stage};
use said::fuzz::Random;

use super::trio_with_faulty_disks;

/// Failures in a round.
const FAILURES: usize = 5;

/// What is wrong with a node.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Killed,
    Stopped,
    CutOff,
    OneWay(Direction),
    NoData,
    Disk(Fault),
}

const TROUBLES: [Trouble; 11] = [
    Trouble::Killed,
    Trouble::Killed,
    Trouble::Stopped,
    Trouble::CutOff,
    Trouble::OneWay(Direction::In),
    Trouble::OneWay(Direction::Out),
    Trouble::NoData,
    Trouble::Disk(Fault::Write),
    Trouble::Disk(Fault::Flush),
    Trouble::Disk(Fault::Read),
    Trouble::Disk(Fault::Torn),
];

fn make(stage: &mut Stage, node: &str, trouble: Trouble) {
    match trouble {
        Trouble::Killed => stage.kill(node),
        Trouble::Stopped => stage.stop(node),
        Trouble::CutOff => stage.cables.set(node, false),
        Trouble::OneWay(direction) => stage.cables.drop_all(node, direction),
        Trouble::NoData => stage.cables.drop_port(node, super::networks::DATA_PORT),
        Trouble::Disk(fault) => drop(stage.disk(node).set(Some(fault))),
    }
}

fn mend(stage: &mut Stage, node: &str, trouble: Trouble) {
    match trouble {
        Trouble::Killed => stage.start(node),
        Trouble::Stopped => stage.go_on(node),
        Trouble::CutOff => stage.cables.set(node, true),
        Trouble::OneWay(_) | Trouble::NoData => stage.cables.undo_drops(node),
        Trouble::Disk(_) => {
            // Its disk is replaced by a good one with the same content.
            stage.kill(node);
            stage.disk(node).set(None);
            stage.start(node);
        }
    }
}

#[test]
fn one_failure_after_the_other() {
    Stage::play(
        &trio_with_faulty_disks("one_failure_after_the_other"),
        |stage, round| {
            let mut random = Random::new(u64::from(round));
            let nodes = stage.data_nodes().to_vec();
            let mut wrong: BTreeMap<String, Trouble> = BTreeMap::new();
            let mut story = Vec::new();
            for _ in 0..FAILURES {
                let node = nodes[random.below(nodes.len())].clone();
                match wrong.remove(&node) {
                    Some(trouble) => mend(stage, &node, trouble),
                    None => {
                        let trouble = TROUBLES[random.below(TROUBLES.len())];
                        story.push((node.clone(), trouble));
                        make(stage, &node, trouble);
                        wrong.insert(node, trouble);
                    }
                }
                let pause = 20 + random.below(1500) as u64;
                sleep(Duration::from_millis(pause));
            }
            println!("round {round}: {story:?}");
            for (node, trouble) in wrong {
                mend(stage, &node, trouble);
            }
            // What failed on all of them waits for a person.
            stage.start_service();
        },
    );
}
