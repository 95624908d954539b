//! What happened, for `relevo events` and the log.
//!
//! Written from every thread of the daemon, also from the one that sends heartbeats: an entry
//! costs a short lock and never waits for a reader.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::broadcast;

use crate::api::{Event, EventKind, EventLevel, StateChange};

/// Events that are remembered: some hours of a calm cluster, about 300 KiB.
const REMEMBERED: usize = 1000;

/// Events that a slow follower may lag behind before it misses some (and is told so).
const FOLLOWER_LAG: usize = 256;

/// The events of a daemon's run.
#[derive(Debug)]
pub(crate) struct Events {
    inner: Mutex<Inner>,
    live: broadcast::Sender<Event>,
}

#[derive(Debug)]
struct Inner {
    node: String,
    number: u64,
    past: VecDeque<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner {
                node: "-".to_owned(),
                number: 0,
                past: VecDeque::new(),
            }),
            live: broadcast::Sender::new(FOLLOWER_LAG),
        }
    }
}

impl Events {
    /// Names the node that tells the events from now on.
    pub(crate) fn set_node(&self, name: &str) {
        name.clone_into(&mut self.lock().node);
    }

    /// Remembers, logs and sends out an event.
    pub(crate) fn add(&self, level: EventLevel, kind: EventKind, subject: &str, text: &str) {
        self.add_with(level, kind, subject, text, None);
    }

    /// The same for a state of a volume's replica that changed.
    pub(crate) fn add_change(&self, level: EventLevel, volume: &str, change: StateChange) {
        let text = change.to_string();
        self.add_with(level, EventKind::Volume, volume, &text, Some(change));
    }

    fn add_with(
        &self,
        level: EventLevel,
        kind: EventKind,
        subject: &str,
        text: &str,
        change: Option<StateChange>,
    ) {
        match level {
            EventLevel::Info => tracing::info!(?kind, subject, "{text}"),
            EventLevel::Warning | EventLevel::Alarm => {
                tracing::warn!(?kind, ?level, subject, "{text}");
            }
        }
        let mut inner = self.lock();
        inner.number += 1;
        let event = Event {
            number: inner.number,
            unix_ms: unix_ms(),
            node: inner.node.clone(),
            kind,
            level,
            subject: subject.to_owned(),
            text: text.to_owned(),
            change,
        };
        if inner.past.len() == REMEMBERED {
            inner.past.pop_front();
        }
        inner.past.push_back(event.clone());
        // Under the lock, so that a new follower sees each event once. Nobody may be listening.
        drop(self.live.send(event));
    }

    /// The remembered events and those that come, without a gap between them.
    #[must_use]
    pub(crate) fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let inner = self.lock();
        let past = inner.past.iter().cloned().collect();
        (past, self.live.subscribe())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic elsewhere leaves at worst a lost event behind.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since 1970 by this machine's clock; for people only.
#[must_use]
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(events: &Events, text: &str) {
        events.add(EventLevel::Info, EventKind::Cluster, "", text);
    }

    #[test]
    fn remembers_the_newest() {
        let events = Events::default();
        for i in 0..REMEMBERED + 5 {
            add(&events, &i.to_string());
        }
        let (past, _) = events.follow();
        assert_eq!(past.len(), REMEMBERED);
        assert_eq!(past[0].text, "5");
        assert_eq!(past[0].number, 6);
    }

    #[test]
    fn a_follower_misses_nothing() {
        let events = Events::default();
        add(&events, "before");
        let (past, mut live) = events.follow();
        add(&events, "after");
        assert_eq!(past.len(), 1);
        assert_eq!(live.try_recv().unwrap().text, "after");
        assert!(live.try_recv().is_err());
    }
}
