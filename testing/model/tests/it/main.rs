//! The model, explored; and bugs put into it, found.

use std::env;

use model::{
    bugs::Bug,
    explore::{Violation, explore},
    state::Budget,
    steps::Protocol,
};
use said::say;

const NONE: Budget = Budget {
    crashes: 0,
    outages: 0,
    breaks: 0,
    leases: 0,
    demotes: 0,
    forced: 0,
    losses: 0,
    tends: 0,
};

/// About 100 bytes each with all that is kept of it.
const STATES_MAX: usize = 30_000_000;

const fn protocol(nodes: usize, blocks: usize, writes: u8, budget: Budget) -> Protocol {
    Protocol {
        nodes,
        blocks,
        writes,
        budget,
        alone: false,
        tended: false,
        follower: None,
        failing: 7,
        cut: 7,
        bug: None,
    }
}

fn for_nights() -> bool {
    env::var_os("RELEVO_MODEL_MORE").is_some_and(|value| value == "1")
}

/// Explores all of it; `RELEVO_MODEL_MORE=1` adds one more of each fault that there is, for nights.
fn holds(name: &str, mut protocol: Protocol) {
    if for_nights() {
        let more = |count: &mut u8| *count += u8::from(*count > 0 && *count < 3);
        let budget = &mut protocol.budget;
        for count in [
            &mut budget.crashes,
            &mut budget.breaks,
            &mut budget.leases,
            &mut budget.demotes,
        ] {
            more(count);
        }
    }
    match explore(&protocol, STATES_MAX) {
        Ok(report) => {
            say(format_args!("model {name}: {report}"));
            assert!(report.whole > 1, "{name}: nothing happens");
        }
        Err(violation) => panic!("model {name}: {violation}"),
    }
}

#[test]
fn two_nodes_whose_links_break_and_processes_end() {
    let budget = Budget {
        crashes: 1,
        breaks: 1,
        ..NONE
    };
    holds("2 nodes, crash and break", protocol(2, 1, 2, budget));
}

#[test]
fn two_nodes_whose_leases_end() {
    let budget = Budget {
        breaks: 2,
        leases: 1,
        ..NONE
    };
    holds(
        "2 nodes, 2 blocks, 2 breaks and a lease",
        protocol(2, 2, 2, budget),
    );
    let budget = Budget {
        crashes: 1,
        leases: 1,
        ..NONE
    };
    holds("2 nodes, crash and lease", protocol(2, 1, 2, budget));
}

#[test]
fn two_nodes_that_lose_power() {
    let budget = Budget {
        crashes: 1,
        outages: 1,
        breaks: 1,
        ..NONE
    };
    holds(
        "2 nodes, outage, crash and break",
        protocol(2, 1, 1, budget),
    );
}

#[test]
fn two_nodes_that_lose_power_and_a_lease() {
    let budget = Budget {
        outages: 1,
        leases: 1,
        ..NONE
    };
    holds(
        "2 nodes, 2 blocks, outage and lease",
        protocol(2, 2, 3, budget),
    );
}

#[test]
fn two_nodes_and_a_planned_step_down() {
    let budget = Budget {
        crashes: 1,
        breaks: 1,
        demotes: 1,
        ..NONE
    };
    holds(
        "2 nodes, step-down, crash and break",
        protocol(2, 1, 2, budget),
    );
}

#[test]
fn two_nodes_of_which_one_tends_the_volume() {
    let budget = Budget {
        breaks: 1,
        demotes: 1,
        tends: 1,
        ..NONE
    };
    holds(
        "2 nodes, step-down, tending and break",
        protocol(2, 1, 2, budget),
    );
    let budget = Budget {
        leases: 1,
        tends: 1,
        ..NONE
    };
    holds("2 nodes, lease and tending", protocol(2, 1, 2, budget));
    let budget = Budget {
        outages: 1,
        tends: 1,
        ..NONE
    };
    holds("2 nodes, outage and tending", protocol(2, 1, 2, budget));
}

#[test]
fn two_nodes_and_forced_promotions() {
    let budget = Budget {
        breaks: 1,
        forced: 2,
        ..NONE
    };
    holds("2 nodes, 2 forced and break", protocol(2, 1, 3, budget));
}

#[test]
fn three_nodes_whose_leases_end() {
    let budget = Budget { leases: 1, ..NONE };
    holds("3 nodes, lease", protocol(3, 1, 1, budget));
}

#[test]
fn three_nodes_whose_processes_end() {
    let budget = Budget { crashes: 1, ..NONE };
    holds("3 nodes, crash", protocol(3, 1, 1, budget));
    let budget = Budget { outages: 1, ..NONE };
    holds("3 nodes, outage", protocol(3, 1, 1, budget));
}

#[test]
fn three_nodes_of_which_one_tends_the_volume() {
    let budget = Budget { breaks: 1, ..NONE };
    let tended = Protocol {
        tended: true,
        ..protocol(3, 1, 1, budget)
    };
    holds("3 nodes, tended, and break", tended);
}

#[test]
fn three_nodes_whose_links_break() {
    let budget = Budget { breaks: 1, ..NONE };
    holds("3 nodes, break", protocol(3, 1, 2, budget));
    let budget = Budget {
        breaks: 1,
        demotes: 1,
        ..NONE
    };
    holds("3 nodes, step-down and break", protocol(3, 1, 1, budget));
}

#[test]
fn three_nodes_of_which_one_is_lost() {
    let budget = Budget {
        breaks: 1,
        leases: 1,
        losses: 1,
        ..NONE
    };
    let alone = Protocol {
        alone: true,
        ..protocol(3, 1, 2, budget)
    };
    holds("3 nodes, one lost, lease and break", alone);
    let budget = Budget {
        leases: 1,
        losses: 1,
        ..NONE
    };
    holds("3 nodes, lease and loss", protocol(3, 1, 1, budget));
}

/// The last of three replicas is of protocol A.
const fn with_follower(writes: u8, budget: Budget) -> Protocol {
    Protocol {
        follower: Some(2),
        ..protocol(3, 1, writes, budget)
    }
}

#[test]
fn a_follower_whose_primary_is_replaced() {
    let budget = Budget { leases: 1, ..NONE };
    holds("follower, lease", with_follower(1, budget));
}

#[test]
fn a_follower_that_loses_its_link() {
    let budget = Budget {
        crashes: 1,
        breaks: 1,
        ..NONE
    };
    let alone = Protocol {
        follower: Some(1),
        ..protocol(2, 1, 2, budget)
    };
    holds("2 nodes, a follower, crash and break", alone);
    if for_nights() {
        // Four million states; what it adds to the others is the planted bug's too.
        let budget = Budget {
            breaks: 1,
            demotes: 1,
            ..NONE
        };
        let broken = Protocol {
            cut: 0b010,
            ..with_follower(1, budget)
        };
        let report = explore(&broken, STATES_MAX);
        let report = report.unwrap_or_else(|violation| panic!("model: {violation}"));
        say(format_args!(
            "model follower, step-down and break: {report}"
        ));
    }
}

#[test]
fn a_follower_among_nodes_that_fail() {
    let budget = Budget { crashes: 1, ..NONE };
    holds("follower, crash", with_follower(1, budget));
}

/// The bounds in which a bug shows.
fn bounds(bug: Bug) -> Protocol {
    let lease = Budget {
        breaks: 1,
        leases: 1,
        ..NONE
    };
    let lost = Protocol {
        failing: 0b001,
        cut: 0b001,
        ..protocol(3, 1, 1, Budget { losses: 1, ..lease })
    };
    match bug {
        Bug::NoFreshEpoch => protocol(
            2,
            1,
            1,
            Budget {
                crashes: 2,
                breaks: 1,
                ..NONE
            },
        ),
        Bug::UncertainOpens => protocol(
            2,
            1,
            1,
            Budget {
                outages: 1,
                ..lease
            },
        ),
        Bug::UncertainDropsEvicted => protocol(
            2,
            1,
            2,
            Budget {
                outages: 1,
                ..lease
            },
        ),
        Bug::EqualEpochEqualData => protocol(
            2,
            1,
            2,
            Budget {
                breaks: 1,
                forced: 1,
                ..NONE
            },
        ),
        Bug::TenderTakesRequests => protocol(2, 1, 2, Budget { tends: 1, ..lease }),
        Bug::GenerationDroppedEarly => with_follower(1, lease),
        Bug::TailNotMarked | Bug::NoDirtyFor => lost,
        Bug::NoDirtyMap => Protocol {
            alone: true,
            ..lost
        },
        Bug::PushNotRemembered => Protocol {
            failing: 0b011,
            cut: 0,
            ..protocol(3, 1, 1, Budget { leases: 2, ..NONE })
        },
        _ => protocol(2, 1, 2, lease),
    }
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Bug::ALL {
        let planted = Protocol {
            bug: Some(bug),
            ..bounds(bug)
        };
        let found: Violation = match explore(&planted, STATES_MAX) {
            Err(violation) => violation,
            Ok(report) => panic!("{bug:?} was not found: {report}"),
        };
        assert!(found.what.starts_with("rule"), "{bug:?}: {found}");
        let (what, states, steps) = (&found.what, found.states, found.steps.len());
        say(format_args!(
            "model {bug:?}: after {states} states, in {steps} steps: {what}"
        ));
    }
}
