//! Members: who is evicted, who is let in again.

use std::collections::BTreeSet;

use relevo_types::{
    NodeId,
    cluster::{ClusterState, Command, Proof},
};

use crate::{Draft, NodeView, names};

/// Evicts a member that holds something and is proven to be without a lease; lets a member in
/// again that is back.
pub(crate) fn plan_node(draft: &mut Draft, id: NodeId, view: &NodeView) {
    let Some(node) = draft.state.nodes.get(&id) else {
        return;
    };
    let standing = node.lease;
    let name = node.spec.name.clone();
    let condemners = voters_of(&draft.state, &view.condemned_by);
    // What is known of another generation proves nothing about this one.
    let current = view.generation == standing.generation;
    let condemned = current && condemners.len() >= draft.state.majority();

    if is_back(&draft.state, id, view) && (standing.evicted || current && relented(view)) {
        let heard_by = names(&draft.state, &view.heard_by);
        let why = if standing.evicted {
            "it was evicted".to_owned()
        } else {
            format!(
                "{} had counted it as dead",
                names(&draft.state, &view.condemned_by)
            )
        };
        draft.act(
            Command::Readmit {
                node: id,
                generation: standing.generation,
            },
            format!("{name} is back, heard by {heard_by}; {why}"),
        );
        return;
    }
    if standing.evicted || !draft.state.holds_something(id) {
        return;
    }
    if !condemned {
        if !view.alive {
            let promised = if current { condemners.len() } else { 0 };
            draft.wait(
                None,
                format!(
                    "{name} is silent, but what it holds can't be taken yet: {promised} of {} \
                     voters promised to grant it no lease, and {} are needed; bring a voter back, \
                     or {name}",
                    draft.state.voters().count(),
                    draft.state.majority()
                ),
            );
        }
        return;
    }
    let silence = view.silent_for.map_or_else(String::new, |silence| {
        format!(" for {:.1} s", silence.as_secs_f64())
    });
    let by: Vec<NodeId> = condemners.into_iter().collect();
    draft.act(
        Command::Evict {
            node: id,
            generation: standing.generation,
            proof: Proof::Condemned { by: by.clone() },
        },
        format!(
            "{name} was silent{silence}: {} of {} voters ({}) promised to grant it no lease",
            by.len(),
            draft.state.voters().count(),
            names(&draft.state, &by)
        ),
    );
}

/// Whether a majority of the voters hears the node, itself counted where it votes: then it gets a
/// lease once it is let in.
fn is_back(state: &ClusterState, id: NodeId, view: &NodeView) -> bool {
    let mut hearers = voters_of(state, &view.heard_by);
    if state.voters().any(|voter| voter == id) {
        hearers.insert(id);
    }
    view.alive && !view.leaving && hearers.len() >= state.majority()
}

/// Whether a voter that condemned the node hears it again. Without that a new generation is no use
/// (who still does not hear it would condemn that one as well), and it would come between the
/// condemnations of the first and the second voter when the node really dies.
fn relented(view: &NodeView) -> bool {
    view.condemned_by
        .iter()
        .any(|voter| view.heard_by.contains(voter))
}

fn voters_of(state: &ClusterState, list: &[NodeId]) -> BTreeSet<NodeId> {
    state
        .voters()
        .filter(|voter| list.contains(voter))
        .collect()
}
