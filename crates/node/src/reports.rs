//! What nodes tell each other about themselves.

use std::{collections::BTreeMap, time::Duration};

use relevo_types::{NodeId, Time, cluster::ClusterState};

use crate::{Effect, Node, Report, ServiceSummary};

/// A report is repeated this often, for a leader that is new or lost one.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Reports of the others, and this node's own.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    others: BTreeMap<NodeId, Report>,
    own: Option<Report>,
    next: Option<Time>,
}

impl Reports {
    pub(crate) fn deadline(&self) -> Time {
        self.next.unwrap_or(Time::NEVER)
    }

    /// A report arrived; an older one of the same process is passed over.
    pub(crate) fn note(&mut self, report: Report) {
        let known = self.others.get(&report.from);
        let old = known.is_some_and(|known| {
            known.instance == report.instance && known.number >= report.number
        });
        if !old {
            self.others.insert(report.from, report);
        }
    }

    pub(crate) fn of(&self, node: NodeId) -> Option<&Report> {
        self.others.get(&node)
    }

    pub(crate) fn all(&self) -> BTreeMap<NodeId, Report> {
        self.others.clone()
    }

    pub(crate) fn retain_members(&mut self, mut is_member: impl FnMut(NodeId) -> bool) {
        self.others.retain(|node, _| is_member(*node));
    }
}

impl Node {
    /// Tells the others about this node, when something changed or it is time.
    pub(crate) fn send_report(&mut self, now: Time, state: &ClusterState, out: &mut Vec<Effect>) {
        let me = self.config.me;
        if !state.nodes.contains_key(&me) {
            return;
        }
        let services = self.runners.iter().map(|(id, runner)| {
            let summary = ServiceSummary {
                phase: runner.phase,
                waiting: runner.waiting.clone(),
            };
            (*id, summary)
        });
        let mut report = Report {
            from: me,
            instance: self.config.instance,
            number: self.reports.own.as_ref().map_or(0, |own| own.number),
            replicas: self.engines.replica_views(),
            services: services.collect(),
            memory_mib: self.config.memory_mib,
            leaving: self.shutdown.is_some(),
        };
        let due = self.reports.next.is_none_or(|next| now >= next);
        if !due && self.reports.own.as_ref() == Some(&report) {
            return;
        }
        report.number += 1;
        self.reports.next = Some(now + REPORT_INTERVAL);
        for to in state.nodes.keys().filter(|to| **to != me) {
            out.push(Effect::Report {
                to: *to,
                report: report.clone(),
            });
        }
        self.reports.own = Some(report);
    }
}
