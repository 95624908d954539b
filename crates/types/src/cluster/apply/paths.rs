//! Paths of a running cluster come and go.

use super::{Applied, ClusterState, Outcome, Rejection};
use crate::{NodeId, cluster::PathAddress};

impl ClusterState {
    pub(super) fn add_path(
        &mut self,
        id: NodeId,
        name: &str,
        address: &PathAddress,
        replication: bool,
    ) -> Applied {
        let node = self.nodes.get(&id).ok_or(Rejection::NoNode { node: id })?;
        self.check_path(Some(id), &node.spec, name, address, replication)?;
        let spec = &mut self.node_mut(id)?.spec;
        spec.push_path(name, address, replication);
        Ok(Outcome::Done)
    }

    /// Two nodes that share a network keep sharing one: they could neither replicate nor agree on anything
    /// without.
    pub(super) fn remove_path(&mut self, id: NodeId, name: &str) -> Applied {
        let node = self.nodes.get(&id).ok_or(Rejection::NoNode { node: id })?;
        let own = &node.spec.name;
        let bad = |why: String| Err(Rejection::BadPath { why });
        if node.spec.path(name).is_none() {
            return bad(format!(
                "node {own} has no path `{name}`; `relevo node path list` lists them"
            ));
        }
        let mut rest = node.spec.clone();
        rest.paths.retain(|path| path.name != name);
        rest.streams.retain(|path| path.name != name);
        if rest.paths.is_empty() {
            return bad(format!(
                "path `{name}` is node {own}'s last IP address; add another one first"
            ));
        }
        for other in self.nodes.values().filter(|other| other.id != id) {
            if node.spec.shares_network(&other.spec) && !rest.shares_network(&other.spec) {
                return bad(format!(
                    "`{name}` is the last network that node {own} and node {} have in common; add another one to both first",
                    other.spec.name
                ));
            }
        }
        self.node_mut(id)?.spec = rest;
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ClusterId, Sensitivity,
        cluster::{Command, JoinToken, NodeKind, NodeSpec, PATHS_MAX, Ports},
    };

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    fn spec(name: &str, paths: &[(&str, String)]) -> NodeSpec {
        let mut spec = NodeSpec {
            name: name.to_owned(),
            kind: NodeKind::Data,
            paths: Vec::new(),
            streams: Vec::new(),
            ports: Ports::default(),
        };
        for (name, address) in paths {
            spec.push_path(name, &address.parse().unwrap(), false);
        }
        spec
    }

    /// `a`, `b` and `c`, each on `lan`; `a` and `b` also on `repl`.
    fn cluster() -> ClusterState {
        let mut state = ClusterState::default();
        for number in 1..=3 {
            let mut paths = vec![("lan", format!("10.0.0.{number}"))];
            if number < 3 {
                paths.push(("repl", format!("fd00::{number}")));
            }
            let node = spec(["a", "b", "c"][number - 1], &paths);
            state.check_paths(&node).unwrap();
            let command = if number == 1 {
                Command::Init {
                    cluster: ClusterId([1; 16]),
                    name: "x".to_owned(),
                    sensitivity: Sensitivity::Normal,
                    node,
                }
            } else {
                let token = JoinToken {
                    kind: None,
                    expires_unix_s: 10,
                };
                let hash = String::new();
                let command = Command::CreateToken { hash, token };
                state.apply(&command).unwrap();
                Command::Join {
                    hash: String::new(),
                    now_unix_s: 1,
                    node,
                }
            };
            state.apply(&command).unwrap();
        }
        state
    }

    fn add(state: &mut ClusterState, node: NodeId, name: &str, address: &str) -> Applied {
        let (address, replication) = match address.split_once(',') {
            Some((address, _)) => (address, true),
            None => (address, false),
        };
        state.apply(&Command::AddPath {
            node,
            name: name.to_owned(),
            address: address.parse().unwrap(),
            replication,
        })
    }

    fn remove(state: &mut ClusterState, node: NodeId, name: &str) -> Applied {
        let name = name.to_owned();
        state.apply(&Command::RemovePath { node, name })
    }

    #[test]
    fn what_does_not_fit_is_refused_with_words() {
        let mut state = cluster();
        add(&mut state, A, "ser", "serial:/dev/ttyS0:9600").unwrap();
        add(&mut state, B, "ser", "serial:/dev/ttyS1:9600").unwrap();
        add(&mut state, A, "half", "serial:/dev/ttyS1:9600").unwrap();
        let before = state.clone();
        for (node, name, address, word) in [
            (A, "lan", "10.0.1.1", "has a path `lan` already"),
            (A, "new", "10.0.0.1", "on node a's path `lan` already"),
            (C, "new", "10.0.0.1", "node a's address"),
            (C, "repl", "10.0.1.3", "the other IPv6"),
            (C, "new", "fe80::1", "unique local"),
            (C, "new", "0.0.0.0", "no address of one machine"),
            (C, "new", "ff02::1", "no address of one machine"),
            (C, "ser", "10.0.1.3", "is a stream on node a"),
            (C, "ser", "unix:/x", "a stream has two ends"),
            (C, "lan", "unix:/x", "has a path `lan` already"),
            (C, "repl", "unix:/x", "is a network on node a"),
            (A, "new", "serial:/dev/ttyS0:1200", "on node a's path `ser`"),
            (C, "half", "serial:/dev/ttyS0:19200", "the same speed"),
            (C, "new", "unix:/x,replication", "heartbeats only"),
            (C, "ne w", "10.0.1.3", "is no name"),
            (NodeId(9), "new", "10.0.1.3", "no node"),
        ] {
            let text = add(&mut state, node, name, address)
                .unwrap_err()
                .to_string();
            assert!(text.contains(word), "{name} {address}: {text}");
            assert!(text.contains("; ") || word == "is no name", "{text}");
        }
        state.revision = before.revision;
        assert_eq!(state, before);
        // Another instance on the same machine has other ports.
        let twin = spec("d", &[("lan", "10.0.0.1".to_owned())]);
        assert!(state.check_paths(&twin).is_err());
        let ports = Ports {
            control: 1,
            heartbeat: 2,
            data: 3,
        };
        state.check_paths(&NodeSpec { ports, ..twin }).unwrap();
        let alone = spec("d", &[("half", "unix:/x".to_owned())]);
        let text = state.check_paths(&alone).unwrap_err().to_string();
        assert!(text.contains("needs an IP address"), "{text}");
        let twice = spec(
            "d",
            &[("n", "10.9.0.1".to_owned()), ("n", "10.9.0.2".to_owned())],
        );
        let text = state.check_paths(&twice).unwrap_err().to_string();
        assert!(text.contains("already"), "{text}");
        for number in 0..PATHS_MAX - 1 {
            add(
                &mut state,
                C,
                &format!("n{number}"),
                &format!("10.1.{number}.3"),
            )
            .unwrap();
        }
        let text = add(&mut state, C, "many", "10.2.0.3")
            .unwrap_err()
            .to_string();
        assert!(text.contains("the most there can be"), "{text}");
    }

    #[test]
    fn a_path_moves_and_two_nodes_never_lose_each_other() {
        let mut state = cluster();
        let text = remove(&mut state, A, "x").unwrap_err().to_string();
        assert!(text.contains("no path `x`"), "{text}");
        let text = remove(&mut state, C, "lan").unwrap_err().to_string();
        assert!(text.contains("last IP address"), "{text}");
        add(&mut state, C, "ser", "unix:/x").unwrap();
        let text = remove(&mut state, C, "lan").unwrap_err().to_string();
        assert!(text.contains("last IP address"), "a stream is none: {text}");
        let text = remove(&mut state, A, "lan").unwrap_err().to_string();
        assert!(text.contains("node a and node c"), "{text}");
        remove(&mut state, A, "repl").unwrap();
        add(&mut state, C, "repl", "fd00::3").unwrap();
        // To b and c on the new network.
        add(&mut state, A, "repl", "fd00::77,replication").unwrap();
        remove(&mut state, A, "lan").unwrap();
        assert_eq!(state.nodes[&A].spec.all_paths().count(), 1);
        assert!(state.nodes[&A].spec.paths[0].replication);
        remove(&mut state, C, "ser").unwrap();
        assert!(state.nodes[&C].spec.streams.is_empty());
    }

    #[test]
    fn data_goes_over_what_both_have() {
        let mut state = cluster();
        add(&mut state, B, "own", "10.5.0.2,replication").unwrap();
        let text = |from: NodeId| -> Vec<String> {
            let from = &state.nodes[&from].spec;
            let addresses = state.nodes[&B].data_addresses(from);
            addresses.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            text(A),
            ["10.0.0.2:7622", "[fd00::2]:7622", "10.5.0.2:7622"]
        );
        assert_eq!(
            text(C),
            ["10.0.0.2:7622", "10.5.0.2:7622", "[fd00::2]:7622"]
        );
    }
}
