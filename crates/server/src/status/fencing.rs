//! Fencing in the status. Pure.

use relevo_types::{
    NodeId,
    cluster::{FenceDevice, FenceKind, NodeKind},
};

use super::Sources;
use crate::{
    api::{
        FenceAttemptStatus, FenceCheckStatus, FenceDeviceStatus, FenceTargetStatus, FencingStatus,
    },
    fencing::may_use,
};

impl Sources<'_> {
    pub(super) fn fencing(&self) -> FencingStatus {
        let state = self.state;
        let devices = &state.fencing.devices;
        let without = |node: &&relevo_types::cluster::Node| {
            node.spec.kind == NodeKind::Data && state.fencing.levels(node.id).is_empty()
        };
        let nodes_without = state
            .nodes
            .values()
            .filter(|_| !devices.is_empty())
            .filter(without)
            .map(|node| node.spec.name.clone());
        let attempts = self.reports.iter().flat_map(|(by, report)| {
            let attempts = report.fencing.attempts.iter();
            attempts.map(|(node, (doing, since))| FenceAttemptStatus {
                node: state.node_name(*node),
                by: state.node_name(*by),
                doing: doing.clone(),
                since_unix_ms: *since,
            })
        });
        FencingStatus {
            devices: devices.values().map(|it| self.fence_device(it)).collect(),
            nodes_without: nodes_without.collect(),
            attempts: attempts.collect(),
        }
    }

    fn fence_device(&self, device: &FenceDevice) -> FenceDeviceStatus {
        let state = self.state;
        let users: Vec<NodeId> = state
            .nodes
            .keys()
            .copied()
            .filter(|node| may_use(state, device, *node))
            .collect();
        let targets = device.targets.iter();
        let checks = users.iter().filter_map(|user| {
            let found = self.reports.get(user)?.fencing.checks.get(&device.name)?;
            let found = found.as_ref();
            Some(FenceCheckStatus {
                node: state.node_name(*user),
                works: found.map(|it| it.trouble.is_none()),
                trouble: found.and_then(|it| it.trouble.clone()),
                since_unix_ms: found.map(|it| it.since_unix_ms),
                at_unix_ms: found.map(|it| it.at_unix_ms),
            })
        });
        FenceDeviceStatus {
            name: device.name.clone(),
            what: device.kind.to_string(),
            parameters: device
                .parameters
                .iter()
                .map(|(name, value)| (name.clone(), value.to_string()))
                .collect(),
            targets: targets
                .map(|(node, target)| FenceTargetStatus {
                    node: state.node_name(*node),
                    plug: target.plug.clone(),
                    level: target.level,
                    delay_ms: target.delay_ms,
                })
                .collect(),
            from: match device.kind {
                FenceKind::Person => Vec::new(),
                FenceKind::Agent(_) | FenceKind::Command(_) => {
                    users.iter().map(|user| state.node_name(*user)).collect()
                }
            },
            action_limit_s: device.action_limit_s,
            verify_limit_s: device.verify_limit_s,
            check_every_s: device.check_every_s,
            trust_exit_code: device.trust_exit_code,
            checks: checks.collect(),
        }
    }
}
