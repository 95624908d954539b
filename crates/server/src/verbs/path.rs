//! Paths of a running cluster.

use std::time::Duration;

use relevo_membership::{Liveness, ROUNDS_MAX, rounds_per_heartbeat};
use relevo_types::{
    NodeId,
    cluster::{ClusterState, Command, Node, PathAddress},
};

use super::find_node;
use crate::{
    api::{ApiError, Done, ErrorKind, PathRequest},
    cluster::Cluster,
    daemon::paths::Standing,
    join::check_address,
    rpc::fetch_report,
};

/// How long a node may take to follow the control log. It does within milliseconds; a device takes its time.
const FOLLOW_WAIT: Duration = Duration::from_secs(3);

/// How often it is asked, and how long it may take to answer.
const ASK_EVERY: Duration = Duration::from_millis(100);
const ASK_BOUND: Duration = Duration::from_millis(500);

/// The most members of a cluster: a line must have room for what they say of each other.
const MEMBERS_MAX: usize = 7;

impl Cluster {
    /// Gives a node one more path; answered when it uses it.
    pub(crate) async fn add_path(
        &self,
        node: &str,
        request: PathRequest,
    ) -> Result<Done, ApiError> {
        let PathRequest {
            name,
            address,
            replication,
        } = request;
        let what = format!("node {node} did not get the path `{name}`");
        let state = self.state();
        let id = find_node(&state, node, &what)?;
        check_speed(&state, &address, &what)?;
        if let (Some(known), PathAddress::Ip(ip), true) =
            (state.nodes.get(&id), &address, id == self.me())
            && known.spec.paths.iter().all(|path| path.address != *ip)
        {
            check_address(*ip, known.spec.ports, &what)?;
        }
        let command = Command::AddPath {
            node: id,
            name: name.clone(),
            address: address.clone(),
            replication,
        };
        self.change(&what, command).await?;
        let used = format!("Node {node} uses the path {name} ({address}) now");
        match self.await_path(id, |paths| paths.get(&name).cloned()).await {
            Some(None) => {}
            Some(Some(why)) => {
                return Err(ApiError::new(
                    ErrorKind::Unavailable,
                    format!("node {node} has the path `{name}` now and can't use it"),
                    why,
                    format!(
                        "it goes on trying; mend that, or `relevo node path remove {node} {name}`"
                    ),
                ));
            }
            None => {
                return Ok(Done {
                    done: format!(
                        "Node {node} has the path {name} ({address}) now; it does not answer, and uses it when it is back."
                    ),
                });
            }
        }
        let state = self.state();
        let ends = others_on(&state, id, &name);
        let next = if ends.is_empty() {
            format!(
                ". No other node is on it: `relevo node path add NODE {name} ADDRESS` gives one the other end"
            )
        } else {
            format!(", with {}", ends.join(", "))
        };
        Ok(Done {
            done: format!("{used}{next}."),
        })
    }

    /// Takes a path from a node.
    pub(crate) async fn remove_path(&self, node: &str, name: &str) -> Result<Done, ApiError> {
        let what = format!("node {node} keeps the path `{name}`");
        let state = self.state();
        let id = find_node(&state, node, &what)?;
        self.check_other_ways(&state, id, name, &what).await?;
        let command = Command::RemovePath {
            node: id,
            name: name.to_owned(),
        };
        self.change(&what, command).await?;
        let gone = |paths: &Standing| (!paths.contains_key(name)).then_some(());
        // When it does not answer it will follow as well.
        self.await_path(id, gone).await;
        Ok(Done {
            done: format!("Node {node} does not use the path {name} any more."),
        })
    }

    /// Refuses to take the only network away that works now: what this node sees of it.
    async fn check_other_ways(
        &self,
        state: &ClusterState,
        node: NodeId,
        name: &str,
        what: &str,
    ) -> Result<(), ApiError> {
        let Some(observed) = self.observed().await else {
            return Ok(());
        };
        for (peer, seen) in &observed.membership.peers {
            let concerned = node == self.me() || *peer == node;
            let (Some(known), Liveness::Alive, true) =
                (state.nodes.get(peer), seen.liveness, concerned)
            else {
                continue;
            };
            let is_network = |path: &str| known.spec.paths.iter().any(|own| own.name == path);
            let mut up = seen
                .paths
                .iter()
                .filter(|path| path.up && is_network(&path.name))
                .map(|path| path.name.as_str());
            let carries = up.clone().any(|path| path == name);
            if carries && up.all(|path| path == name) {
                let (one, other) = (state.node_name(self.me()), &known.spec.name);
                return Err(ApiError::new(
                    ErrorKind::Refused,
                    what,
                    format!("it is the only network between {one} and {other} that works now"),
                    "repair or add another one first; `relevo status` shows which are down",
                ));
            }
        }
        Ok(())
    }

    /// Waits until a node's own word of its paths has what is looked for; `None`: it does not answer in time.
    async fn await_path<T>(
        &self,
        node: NodeId,
        look: impl Fn(&Standing) -> Option<T>,
    ) -> Option<T> {
        let ask = async {
            loop {
                let found = if node == self.me() {
                    look(&self.own_paths())
                } else {
                    let report = fetch_report(self.rpc(), node, ASK_BOUND).await;
                    report.and_then(|report| look(&report.paths))
                };
                if let Some(found) = found {
                    return found;
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
        };
        tokio::time::timeout(FOLLOW_WAIT, ask).await.ok()
    }
}

/// A line on which a heartbeat takes too long would seem dead.
fn check_speed(state: &ClusterState, address: &PathAddress, what: &str) -> Result<(), ApiError> {
    let PathAddress::Line(line) = address else {
        return Ok(());
    };
    let timing = state.sensitivity.timing();
    let rounds = rounds_per_heartbeat(line.bytes_per_second(), MEMBERS_MAX, &timing);
    if rounds <= ROUNDS_MAX {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::Refused,
        what,
        format!(
            "a heartbeat of up to {MEMBERS_MAX} nodes takes {rounds} times {} ms on {line}, and with this sensitivity one must arrive in {ROUNDS_MAX} times that",
            timing.heartbeat.as_millis()
        ),
        "give both ends of the line a higher speed: 9600 is enough for `normal`, 19200 for `fast`",
    ))
}

/// The other nodes that are on a path.
fn others_on<'a>(state: &'a ClusterState, node: NodeId, name: &str) -> Vec<&'a str> {
    let on_it = |other: &&Node| other.id != node && other.spec.path(name).is_some();
    let others = state.nodes.values().filter(on_it);
    others.map(|other| other.spec.name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::state;

    #[test]
    fn a_line_that_is_too_slow_is_refused() {
        let check = |address: &str, sensitivity| {
            let mut state = state();
            state.sensitivity = sensitivity;
            check_speed(&state, &address.parse().unwrap(), "x")
        };
        use relevo_types::Sensitivity::{Fast, Normal, Patient};
        check("10.0.0.1", Fast).unwrap();
        check("unix:/x", Fast).unwrap();
        check("serial:/dev/x:9600", Normal).unwrap();
        check("serial:/dev/x:1200", Patient).unwrap();
        check("serial:/dev/x:19200", Fast).unwrap();
        let error = check("serial:/dev/x:9600", Fast).unwrap_err().to_string();
        assert!(error.contains("50 ms"), "{error}");
        assert!(check("serial:/dev/x:4800", Normal).is_err());
    }
}
