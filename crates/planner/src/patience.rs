//! What takes time: failures that are forgotten, moves that are too many, returning to a better node.
//!
//! The time is the cluster's own: seconds for which it had a leader. The log has it only as far as it was read, and
//! it is read only while something waits for it.

use relevo_types::{
    NodeId,
    cluster::{ClusterState, Command, Service},
};

use crate::{Draft, PlanInput, Rank, services::best};

/// A node that gave a service up may try again after so many seconds without another failure.
pub(crate) const FAILURE_MEMORY_S: u64 = 600;

/// The moves of a service because nodes gave it up are counted over so many seconds.
const MOVES_WINDOW_S: u64 = 3600;

/// More moves than this in the window, and the service is held where it is, with an alarm: it is not the nodes.
const MOVES_MAX: usize = 3;

/// The clock is read this often while something waits for it.
const CLOCK_EVERY_S: u64 = 60;

/// Reads the clock where that is needed: what follows in the plan is stamped with it.
pub(crate) fn plan_clock(draft: &mut Draft, now_s: u64) {
    let state = &draft.state;
    let services = || state.services.values();
    let unstamped = services().any(|it| it.failures.values().any(|it| it.at_s.is_none()));
    let waits = services().any(|service| {
        let recent = |at: &u64| at + MOVES_WINDOW_S > state.clock_s;
        !service.failures.is_empty() || service.moves_s.iter().any(recent)
    });
    let passed = now_s.saturating_sub(state.clock_s);
    if unstamped || waits && passed >= CLOCK_EVERY_S {
        read_clock(draft, now_s);
    }
}

fn read_clock(draft: &mut Draft, at_s: u64) {
    let reason = "failures and moves of services are counted by the cluster's clock";
    draft.act(Command::Clock { at_s }, reason.to_owned());
}

/// Reads the clock if the next holder of a service gets it for another node's failure: that counts as a move.
pub(crate) fn stamp_move(draft: &mut Draft, service: &Service, now_s: u64) {
    if service.displaced && draft.state.clock_s < now_s {
        read_clock(draft, now_s);
    }
}

/// Forgets what is long ago.
pub(crate) fn plan_forgetting(draft: &mut Draft, service: &Service, now_s: u64) {
    let old = |at_s: u64| at_s + FAILURE_MEMORY_S <= now_s;
    for (node, failure) in &service.failures {
        if let Some(at_s) = failure.at_s.filter(|at_s| old(*at_s)) {
            let there = draft.state.node_name(*node);
            let name = &service.spec.name;
            draft.act(
                Command::ForgetFailure {
                    service: service.id,
                    node: *node,
                    count: failure.count,
                },
                format!(
                    "{name}: {there} gave it up {} min ago ({}) and may try again",
                    (now_s - at_s) / 60,
                    failure.reason
                ),
            );
        }
    }
}

/// Why a service that its node gave up is not given to another one any more.
pub(crate) fn too_many_moves(service: &Service, now_s: u64) -> Option<String> {
    let recent = |at: &&u64| **at + MOVES_WINDOW_S > now_s;
    let count = service.moves_s.iter().filter(recent).count();
    (service.displaced && count >= MOVES_MAX).then(|| {
        let last = service.failures.values().max_by_key(|it| it.at_s);
        let why = last.map_or(String::new(), |it| {
            format!("; the last time: {}", it.reason)
        });
        format!("nodes gave it up {} times within an hour{why}", count + 1)
    })
}

/// A service that is not where it likes best: it returns when it could have for long enough.
pub(crate) fn plan_failback(
    draft: &mut Draft,
    service: &Service,
    holder: NodeId,
    input: &PlanInput,
) {
    let Some(delay_s) = service.placement.failback_s else {
        return;
    };
    if service.hold.is_some() || service.target.is_some_and(|target| target != holder) {
        return;
    }
    let Some(better) = preferred(&draft.state, service, holder, input) else {
        return;
    };
    let since = input.better_since.get(&service.id);
    let since_s = since.filter(|(node, _)| *node == better).map(|it| it.1);
    let waited = since_s.map_or(0, |since_s| input.now_s.saturating_sub(since_s));
    let (name, there) = (&service.spec.name, draft.state.node_name(better));
    if since_s.is_some() && waited >= delay_s {
        draft.act(
            Command::SetTarget {
                service: service.id,
                target: Some(better),
            },
            format!("{name}: it prefers {there}, which could have had it for {waited} s"),
        );
        return;
    }
    draft.plan.better.insert(service.id, better);
    draft.wait(
        Some(service.id),
        format!(
            "{name}: returns to {there}, which it prefers, in {} s (`failback`)",
            delay_s - waited
        ),
    );
}

/// The best node, if the service prefers it to where it is and all is well there.
fn preferred(
    state: &ClusterState,
    service: &Service,
    holder: NodeId,
    input: &PlanInput,
) -> Option<NodeId> {
    // What the administrator asked for last is not counted: it was fulfilled.
    let free = Service {
        target: None,
        ..service.clone()
    };
    let choice = best(state, &input.nodes, input.planner, &free, Some(holder))?;
    let closer = service.placement.preference(choice.node) < service.placement.preference(holder);
    (closer && choice.rank == Rank::Certain).then_some(choice.node)
}
