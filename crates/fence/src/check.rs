//! Whether devices would work: looked at again and again, so that nobody finds out when a node must be fenced.
//!
//! [`Checks`] says when which device is due, and keeps what was found, since when. Sans-IO. [`look`] looks.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use relevo_types::{
    NodeId, Time,
    cluster::{FenceDevice, FenceKind},
};

use crate::{
    agent::{Action, Agents, Reply},
    metadata::Metadata,
};

/// The first check of a new device, or after a start, comes so soon ...
const FIRST: Duration = Duration::from_secs(1);

/// ... and on each further node so much later: a BMC has few sessions.
const APART: Duration = Duration::from_secs(5);

/// A device that would not work is looked at again after this, or sooner where it is checked more often: the
/// alarm must not stay for an hour after the cause is gone.
const AGAIN: Duration = Duration::from_secs(60);

/// What is known of the devices of a node.
#[derive(Debug, Default)]
pub struct Checks {
    entries: BTreeMap<String, Entry>,
    last_ticket: u64,
}

#[derive(Debug)]
struct Entry {
    device: FenceDevice,
    next: Time,
    ticket: Option<Ticket>,
    found: Option<Found>,
}

/// Names one check under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket(u64);

/// What the last check found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Why the device would not work; `None`: it would.
    pub trouble: Option<String>,
    /// Since when that is so, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// When it was looked at last.
    pub at_unix_ms: u64,
}

/// What a check changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The device would not work; why. Told once.
    Broke(String),
    /// It would work again.
    Repaired,
}

impl Checks {
    /// The devices that this node may use, with this node's place among those that may. What is known of a
    /// device that changed is forgotten.
    pub fn configure<'a>(
        &mut self,
        now: Time,
        devices: impl Iterator<Item = (&'a FenceDevice, usize)>,
    ) {
        let mut entries = BTreeMap::new();
        for (device, place) in devices {
            let known = self.entries.remove(&device.name);
            let entry = match known {
                Some(known) if known.device == *device => known,
                Some(_) | None => {
                    let apart = APART * u32::try_from(place).unwrap_or(u32::MAX);
                    Entry {
                        device: device.clone(),
                        next: now + FIRST + apart,
                        ticket: None,
                        found: None,
                    }
                }
            };
            entries.insert(device.name.clone(), entry);
        }
        self.entries = entries;
    }

    /// When the next check is due.
    #[must_use]
    pub fn wake(&self) -> Option<Time> {
        let idle = self.entries.values().filter(|it| it.ticket.is_none());
        idle.map(|it| it.next).min()
    }

    /// A device that is due; it is taken for being looked at until [`Checks::done`].
    pub fn due(&mut self, now: Time) -> Option<(Ticket, FenceDevice)> {
        let entry = self
            .entries
            .values_mut()
            .find(|it| it.ticket.is_none() && it.next <= now)?;
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        entry.ticket = Some(ticket);
        Some((ticket, entry.device.clone()))
    }

    /// A check ended. One of a device that changed meanwhile changes nothing.
    pub fn done(
        &mut self,
        now: Time,
        unix_ms: u64,
        ticket: Ticket,
        result: Result<(), String>,
    ) -> Option<(String, Change)> {
        let entry = self
            .entries
            .values_mut()
            .find(|it| it.ticket == Some(ticket))?;
        entry.ticket = None;
        let every = Duration::from_secs(u64::from(entry.device.check_every_s));
        let trouble = result.err();
        entry.next = now
            + if trouble.is_some() {
                every.min(AGAIN)
            } else {
                every
            };
        let before = entry.found.as_ref();
        let was = before.map(|it| it.trouble.is_some());
        let since_unix_ms = match before {
            Some(found) if found.trouble.is_some() == trouble.is_some() => found.since_unix_ms,
            Some(_) | None => unix_ms,
        };
        let change = match (&trouble, was) {
            (Some(why), None | Some(false)) => Some(Change::Broke(why.clone())),
            (None, Some(true)) => Some(Change::Repaired),
            (Some(_), Some(true)) | (None, None | Some(false)) => None,
        };
        entry.found = Some(Found {
            trouble,
            since_unix_ms,
            at_unix_ms: unix_ms,
        });
        change.map(|change| (entry.device.name.clone(), change))
    }

    /// A person asks for a check of a device now.
    pub fn hurry(&mut self, now: Time, device: &str) {
        if let Some(entry) = self.entries.get_mut(device) {
            entry.next = entry.next.min(now);
        }
    }

    /// What was found, by device; `None`: it was not looked at yet.
    pub fn found(&self) -> impl Iterator<Item = (&str, Option<&Found>)> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.as_str(), entry.found.as_ref()))
    }
}

/// Looks whether a device would work, without switching anything: its agent is there and can do what a proof
/// needs, its parameters fit, it answers `monitor`, and tells the power of each node. `nodes` are those that it
/// can switch off, but for this one. Gives the nodes that are off by its word: if one of them is heard, the plug is
/// another one's.
///
/// # Errors
/// It would not work; why and what to do.
pub async fn look(
    agents: &Agents,
    device: &FenceDevice,
    nodes: &BTreeMap<NodeId, String>,
) -> Result<BTreeSet<NodeId>, String> {
    let limit = Duration::from_secs(u64::from(device.action_limit_s));
    let mut can_tell = !device.trust_exit_code;
    if let FenceKind::Agent(name) = &device.kind {
        let metadata = agents.metadata(name).await?;
        let with_plug = device.targets.values().any(|it| it.plug.is_some());
        if let Some(error) = metadata.check(&device.parameters, with_plug).errors.first() {
            return Err(error.clone());
        }
        if let Some(why) = unfit(&metadata, device.trust_exit_code) {
            return Err(why.to_owned());
        }
        can_tell = metadata.can("status");
        if metadata.can("monitor") {
            let reply = agents.call(device, "", Action::Monitor, limit).await;
            if let Reply::Failed(why) = reply {
                return Err(format!("monitor failed: {why}"));
            }
        }
    }
    let mut off = BTreeSet::new();
    if !can_tell || device.kind == FenceKind::Person {
        return Ok(off);
    }
    for (node, name) in nodes {
        let Some(target) = device.targets.get(node) else {
            continue;
        };
        let reply = agents
            .call_for(device, name, target, Action::Status, limit)
            .await;
        match reply {
            Reply::Failed(why) => return Err(format!("status of {name} failed: {why}")),
            Reply::Off => {
                off.insert(*node);
            }
            Reply::On | Reply::Done => {}
        }
    }
    Ok(off)
}

/// Why an agent can prove nothing.
#[must_use]
pub fn unfit(metadata: &Metadata, trust_exit_code: bool) -> Option<&'static str> {
    crate::attempt::unfit(metadata.can("off"), metadata.can("status"), trust_exit_code)
}

#[cfg(test)]
mod tests {
    use relevo_types::cluster::FenceTarget;

    use super::*;

    const B: NodeId = NodeId(2);

    fn device(name: &str, script: &str) -> FenceDevice {
        FenceDevice {
            name: name.to_owned(),
            kind: FenceKind::Command(vec![
                "/bin/sh".to_owned(),
                "-c".to_owned(),
                script.to_owned(),
            ]),
            parameters: BTreeMap::new(),
            targets: BTreeMap::from([(B, FenceTarget::default())]),
            from: None,
            action_limit_s: 10,
            verify_limit_s: 10,
            check_every_s: 3600,
            trust_exit_code: false,
        }
    }

    #[test]
    fn each_is_looked_at_in_its_time_and_a_change_is_told_once() {
        let (one, two) = (device("one", ""), device("two", ""));
        let mut checks = Checks::default();
        let start = Time(1_000_000_000_000);
        checks.configure(start, [(&one, 0), (&two, 2)].into_iter());
        assert_eq!(checks.due(start), None);
        let now = checks.wake().unwrap();
        assert_eq!(now, start + FIRST);
        let (ticket, due) = checks.due(now).unwrap();
        assert_eq!(due, one);
        assert_eq!(checks.due(now), None, "two comes later, one is under way");
        let broke = checks.done(now, 1000, ticket, Err("why".to_owned()));
        assert_eq!(
            broke,
            Some(("one".to_owned(), Change::Broke("why".to_owned())))
        );
        let now = start + FIRST + APART * 2;
        let (ticket, due) = checks.due(now).unwrap();
        assert_eq!(due, two);
        assert_eq!(checks.done(now, 2000, ticket, Ok(())), None);
        // The broken one comes again soon, the other one in an hour.
        let now = checks.wake().unwrap();
        assert_eq!(now, start + FIRST + AGAIN);
        let (ticket, _) = checks.due(now).unwrap();
        assert_eq!(
            checks.done(now, 3000, ticket, Err("other".to_owned())),
            None
        );
        let found = checks.found().next().unwrap().1.unwrap();
        assert_eq!((found.since_unix_ms, found.at_unix_ms), (1000, 3000));
        checks.hurry(now, "one");
        let (ticket, _) = checks.due(now).unwrap();
        let repaired = checks.done(now, 4000, ticket, Ok(()));
        assert_eq!(repaired, Some(("one".to_owned(), Change::Repaired)));
        let two_again = start + FIRST + APART * 2 + Duration::from_secs(3600);
        assert_eq!(checks.wake(), Some(two_again), "both in an hour");
    }

    #[test]
    fn a_changed_device_is_looked_at_anew() {
        let old = device("one", "");
        let mut checks = Checks::default();
        let start = Time(1_000_000_000_000);
        checks.configure(start, [(&old, 0)].into_iter());
        let (ticket, _) = checks.due(start + FIRST).unwrap();
        let new = device("one", "exit 1");
        checks.configure(start + FIRST, [(&new, 0)].into_iter());
        assert_eq!(
            checks.done(start + FIRST, 1, ticket, Err("late".to_owned())),
            None
        );
        assert_eq!(checks.found().next().unwrap().1, None);
        assert!(checks.due(start + FIRST + FIRST).is_some());
        checks.configure(start, std::iter::empty());
        assert_eq!(checks.found().count(), 0);
        assert_eq!(checks.wake(), None);
    }

    #[tokio::test]
    async fn a_device_is_looked_at_without_being_used() {
        let agents = Agents::new("/nonexistent");
        let nodes = BTreeMap::from([(B, "beta".to_owned())]);
        let look = async |script: &str| look(&agents, &device("one", script), &nodes).await;
        let only_status = "read action; [ $action = action=status ] || exit 9;";
        assert_eq!(look(&format!("{only_status} exit 0")).await, Ok([].into()));
        let off = format!("{only_status} echo off; exit 2");
        assert_eq!(look(&off).await, Ok([B].into()));
        let broken = look("echo no route >&2; exit 1").await.unwrap_err();
        assert!(
            broken.contains("status of beta failed") && broken.contains("no route"),
            "{broken}"
        );
        let mut agent = device("one", "");
        agent.kind = FenceKind::Agent("fence_none".to_owned());
        let away = super::look(&agents, &agent, &nodes).await.unwrap_err();
        assert!(away.contains("package fence-agents"), "{away}");
    }
}
