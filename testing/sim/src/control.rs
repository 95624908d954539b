//! The control log as an oracle: one linearizable log outside of all nodes.
//!
//! A command commits if its proposer, at that moment, reaches a majority of the voters both ways;
//! applying it is the production code (`ClusterState::apply`). Nodes learn what was committed later,
//! may skip states in between, and keep what they know over restarts. `cluster` asks this module
//! and delivers.

use std::sync::Arc;

use relevo_types::{
    ClusterId, Epoch, LineageId, NodeId, Sensitivity, VolumeId,
    cluster::{
        AddressPart, ClusterState, Command, JoinToken, NodeKind, NodePath, NodeSpec, Outcome, Part,
        Placement, Ports, ProcessPart, Protocol, Rejection, ReplicaSpec, ServiceSpec, Volume,
        VolumeChange, VolumeOptions, VolumePart,
    },
};

use crate::paths::PathPlan;

/// The one volume of a run.
pub const VOLUME: VolumeId = VolumeId(1);

/// The cluster of every run.
pub const CLUSTER: ClusterId = ClusterId([7; 16]);

/// The committed state and its past.
#[derive(Debug)]
pub struct Control {
    state: ClusterState,
    snapshots: Vec<Arc<ClusterState>>,
}

impl Control {
    /// A cluster of so many data nodes, with a witness or not, and one volume on all data nodes,
    /// created: the state at the start of a run.
    ///
    /// # Errors
    /// The control log refused a step; a bug in it or here.
    pub fn new(
        protocols: &[Protocol],
        witness: bool,
        size: u64,
        lineage: LineageId,
        sensitivity: Sensitivity,
    ) -> Result<Self, Rejection> {
        let data_nodes = u32::try_from(protocols.len()).unwrap_or(u32::MAX);
        let mut state = ClusterState::default();
        let node = |number: u32, kind| NodeSpec {
            name: format!("n{number}"),
            kind,
            paths: vec![NodePath {
                name: "lan".to_owned(),
                address: std::net::IpAddr::from([127, 0, 0, 1]),
                replication: false,
            }],
            streams: Vec::new(),
            ports: Ports::default(),
        };
        state.apply(&Command::Init {
            cluster: CLUSTER,
            name: "sim".to_owned(),
            sensitivity,
            node: node(1, NodeKind::Data),
        })?;
        let mut join = |number: u32, kind| {
            let hash = format!("{number}");
            let token = JoinToken {
                kind: None,
                expires_unix_s: 1,
            };
            state.apply(&Command::CreateToken {
                hash: hash.clone(),
                token,
            })?;
            state.apply(&Command::Join {
                hash,
                now_unix_s: 0,
                node: node(number, kind),
            })?;
            let expect = state.voters_version;
            state.apply(&Command::AdmitVoter {
                node: NodeId(number),
                expect,
            })
        };
        for number in 2..=data_nodes {
            join(number, NodeKind::Data)?;
        }
        if witness {
            join(data_nodes + 1, NodeKind::Witness)?;
        }
        let replicas = (1..=data_nodes)
            .zip(protocols)
            .map(|(number, protocol)| ReplicaSpec {
                node: NodeId(number),
                protocol: *protocol,
                backing: None,
                force: false,
            })
            .collect();
        state.apply(&Command::CreateVolume {
            name: "data".to_owned(),
            size,
            lineage,
            replicas,
        })?;
        for number in 1..=data_nodes {
            state.apply(&Command::ReplicaCreated {
                volume: VOLUME,
                node: NodeId(number),
            })?;
        }
        let snapshots = vec![Arc::new(state.clone())];
        Ok(Self { state, snapshots })
    }

    /// The same with other options.
    ///
    /// # Errors
    /// The control log refused it; a bug in it or here.
    pub fn with_options(mut self, options: VolumeOptions) -> Result<Self, Rejection> {
        let volume = &self.state.volumes[&VOLUME];
        let expect = volume.version;
        self.state.apply(&Command::SetVolumeOptions {
            volume: VOLUME,
            expect,
            options,
        })?;
        self.snapshots = vec![Arc::new(self.state.clone())];
        Ok(self)
    }

    /// The same with a service on the volume: its export, a virtual address, a process.
    ///
    /// # Errors
    /// The control log refused it; a bug in it or here.
    pub fn with_service(mut self) -> Result<Self, Rejection> {
        let parts = vec![
            Part::Volume(VolumePart {
                volume: VOLUME,
                device: true,
            }),
            Part::Address(AddressPart {
                address: std::net::IpAddr::from([192, 0, 2, 1]),
                prefix: 24,
                interface: None,
            }),
            Part::Process(ProcessPart {
                command: vec!["/bin/service".to_owned()],
                environment: std::collections::BTreeMap::new(),
                directory: None,
                ready: None,
            }),
        ];
        self.state.apply(&Command::CreateService {
            spec: ServiceSpec {
                name: "data".to_owned(),
                parts,
            },
            placement: Placement::default(),
            target: None,
        })?;
        self.snapshots = vec![Arc::new(self.state.clone())];
        Ok(self)
    }

    /// The same with further paths for heartbeats.
    ///
    /// # Errors
    /// The control log refused a step; a bug in it or here.
    pub fn with_paths(mut self, plan: &PathPlan) -> Result<Self, Rejection> {
        for node in self.state.nodes.keys().copied().collect::<Vec<_>>() {
            for (name, address) in plan.of_node(node.0 as usize - 1) {
                let address = address.parse().map_err(|why| Rejection::BadPath { why })?;
                self.state.apply(&Command::AddPath {
                    node,
                    name: name.to_owned(),
                    address,
                    replication: false,
                })?;
            }
        }
        self.snapshots = vec![Arc::new(self.state.clone())];
        Ok(self)
    }

    /// The committed state.
    #[must_use]
    pub const fn state(&self) -> &ClusterState {
        &self.state
    }

    /// The newest committed state, to be handed to nodes.
    #[must_use]
    pub fn newest(&self) -> Arc<ClusterState> {
        Arc::clone(&self.snapshots[self.snapshots.len() - 1])
    }

    /// A committed state of the past, by its number.
    #[must_use]
    pub fn snapshot(&self, number: usize) -> Arc<ClusterState> {
        Arc::clone(&self.snapshots[number.min(self.snapshots.len() - 1)])
    }

    /// The number of the newest state.
    #[must_use]
    pub fn newest_number(&self) -> usize {
        self.snapshots.len() - 1
    }

    /// The committed configuration of the volume.
    #[must_use]
    pub fn volume(&self) -> &Volume {
        &self.state.volumes[&VOLUME]
    }

    /// Commits a command.
    ///
    /// # Errors
    /// The state machine rejected it.
    pub fn commit(&mut self, command: &Command) -> Result<Outcome, Rejection> {
        let outcome = self.state.apply(command)?;
        self.snapshots.push(Arc::new(self.state.clone()));
        Ok(outcome)
    }
}

/// The command that an engine's proposal stands for.
#[must_use]
pub const fn volume_command(expect: Epoch, change: VolumeChange) -> Command {
    Command::Volume {
        volume: VOLUME,
        expect,
        change,
    }
}

/// A command in a few words, for traces.
#[must_use]
pub fn words(command: &Command) -> String {
    match command {
        Command::Volume { expect, change, .. } => match change {
            VolumeChange::Tend { node } => format!("tend by {node} at {expect}"),
            VolumeChange::Promote { node } => format!("promote {node} at {expect}"),
            VolumeChange::PromoteUncertain { node } => {
                format!("promote {node}, uncertain, at {expect}")
            }
            VolumeChange::Demote { node } => format!("demote {node} at {expect}"),
            VolumeChange::Leave { nodes } => format!("leave {nodes:?} at {expect}"),
            VolumeChange::Join { node } => format!("join {node} at {expect}"),
            VolumeChange::Differs { node, differs, .. } => {
                let repair = differs.as_ref().map(|differs| differs.repair);
                format!("{node} differs (repair {repair:?}) at {expect}")
            }
            VolumeChange::Force { node, .. } => format!("force {node} at {expect}"),
            VolumeChange::KeepInForce => format!("keep what is in force at {expect}"),
            VolumeChange::GiveWay { node, to, .. } => {
                format!("{node} gives way to {to} at {expect}")
            }
        },
        Command::Evict { node, proof, .. } => format!("evict {node} {proof:?}"),
        Command::Readmit { node, .. } => format!("readmit {node}"),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// A configuration, for tests of checkers.
    pub(crate) fn volume(epoch: u64, primary: Option<u32>, in_sync: &[u32]) -> Volume {
        Volume {
            id: VOLUME,
            name: "data".to_owned(),
            size: 4096,
            lineage: LineageId(1),
            lineages: vec![LineageId(1)],
            epoch: Epoch(epoch),
            primary: primary.map(NodeId),
            tends: false,
            in_sync: in_sync.iter().copied().map(NodeId).collect::<BTreeSet<_>>(),
            replicas: BTreeMap::new(),
            options: relevo_types::cluster::VolumeOptions::default(),
            version: epoch,
        }
    }

    #[test]
    fn a_run_begins_with_a_created_volume() {
        let mut control = Control::new(
            &[Protocol::C; 2],
            true,
            1 << 20,
            LineageId(1),
            Sensitivity::Fast,
        )
        .unwrap();
        assert_eq!(control.volume().epoch, Epoch(1));
        assert_eq!(control.state().majority(), 2);
        let promote = volume_command(Epoch(1), VolumeChange::Promote { node: NodeId(1) });
        control.commit(&promote).unwrap();
        assert!(control.commit(&promote).is_err());
        assert_eq!(control.newest_number(), 1);
        assert_eq!(control.snapshot(0).volumes[&VOLUME].primary, None);
    }
}
