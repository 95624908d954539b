//! The book: which numbers are there, and the one thread that adds to it.
//!
//! Requests that arrive while the storage is busy are written together with one flush.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::{
    Entry, LedgerError, Storage,
    store::{self, Store},
};

/// Entries written with one flush. More would make the first of them wait for the last.
pub(crate) const MAX_BATCH: usize = 64;

/// Requests that may wait for the storage; further clients are told to come again. Four batches:
/// whoever waits longer than that has given up.
const QUEUE: usize = 4 * MAX_BATCH;

/// How the ledger took an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stored {
    /// It is on stable storage.
    Stored,
    /// It was already, with the same text.
    Known,
}

/// Why an entry was not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The number is there with another text.
    Conflict,
    /// Too many requests wait.
    Busy,
    /// No room is left.
    Full,
    /// The storage failed; this ledger will end.
    Failed(String),
}

struct Request {
    entry: Entry,
    done: oneshot::Sender<Result<Stored, Refusal>>,
}

/// The index of a ledger and the way to its writer.
#[derive(Debug)]
pub(crate) struct Book {
    index: Arc<Mutex<Index>>,
    requests: SyncSender<Request>,
    failure: watch::Receiver<Option<String>>,
}

/// The numbers that are on stable storage, with a checksum of their texts.
type Index = BTreeMap<u64, u32>;

impl Book {
    /// Opens the storage, reads it, and starts the writer. Blocks.
    pub(crate) fn open(storage: &Storage) -> Result<Self, LedgerError> {
        let (store, entries) = store::open(storage)?;
        let index = entries
            .iter()
            .map(|entry| (entry.number, checksum(entry)))
            .collect();
        let index = Arc::new(Mutex::new(index));
        let (requests, queue) = sync_channel(QUEUE);
        let (report, failure) = watch::channel(None);
        let writer = Writer {
            store,
            index: Arc::clone(&index),
        };
        thread::Builder::new()
            .name("ledger-writer".to_owned())
            .spawn(move || writer.run(&queue, &report))
            .map_err(|error| LedgerError::Failed(error.to_string()))?;
        Ok(Self {
            index,
            requests,
            failure,
        })
    }

    /// Adds an entry; returns when it is on stable storage.
    pub(crate) async fn add(&self, entry: Entry) -> Result<Stored, Refusal> {
        let (done, answer) = oneshot::channel();
        match self.requests.try_send(Request { entry, done }) {
            Ok(()) => answer.await.unwrap_or_else(|_| Err(self.ended())),
            Err(TrySendError::Full(_)) => Err(Refusal::Busy),
            Err(TrySendError::Disconnected(_)) => Err(self.ended()),
        }
    }

    /// Up to `limit` numbers from `from` on, ascending.
    pub(crate) fn numbers(&self, from: u64, limit: usize) -> Vec<u64> {
        lock(&self.index)
            .range(from..)
            .take(limit)
            .map(|(number, _)| *number)
            .collect()
    }

    /// How many entries there are, and the highest number.
    pub(crate) fn extent(&self) -> (usize, Option<u64>) {
        let index = lock(&self.index);
        let last = index.last_key_value().map(|(number, _)| *number);
        (index.len(), last)
    }

    /// Becomes `Some` when the storage has failed.
    pub(crate) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.clone()
    }

    fn ended(&self) -> Refusal {
        let reason = self.failure.borrow().clone();
        Refusal::Failed(reason.unwrap_or_else(|| "the ledger ends".to_owned()))
    }
}

/// The storage is not to be used again.
struct StorageFailed;

struct Writer {
    store: Box<dyn Store>,
    index: Arc<Mutex<Index>>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Request>, report: &watch::Sender<Option<String>>) {
        while let Ok(first) = queue.recv() {
            let batch: Vec<Request> = std::iter::once(first)
                .chain(queue.try_iter())
                .take(MAX_BATCH)
                .collect();
            if self.write(batch, report).is_err() {
                return;
            }
        }
    }

    /// Writes a batch and answers it; an error, reported before the answers, ends the writer.
    fn write(
        &mut self,
        batch: Vec<Request>,
        report: &watch::Sender<Option<String>>,
    ) -> Result<(), StorageFailed> {
        let mut fresh: Vec<Entry> = Vec::new();
        let mut in_batch: HashMap<u64, u32> = HashMap::new();
        let mut waiting = Vec::new();
        for Request { entry, done } in batch {
            let sum = checksum(&entry);
            let known = lock(&self.index).get(&entry.number).copied();
            if let Some(known) = known {
                let answer = if known == sum {
                    Ok(Stored::Known)
                } else {
                    Err(Refusal::Conflict)
                };
                drop(done.send(answer));
                continue;
            }
            match in_batch.entry(entry.number) {
                hash_map::Entry::Vacant(place) => {
                    place.insert(sum);
                    fresh.push(entry);
                    waiting.push((done, Stored::Stored));
                }
                // Twice at the same time, after a client's time-out say: answered with the first.
                hash_map::Entry::Occupied(place) if *place.get() == sum => {
                    waiting.push((done, Stored::Known));
                }
                hash_map::Entry::Occupied(_) => drop(done.send(Err(Refusal::Conflict))),
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let result = self.store.append(&fresh);
        if result.is_ok() {
            lock(&self.index).extend(fresh.iter().map(|entry| (entry.number, checksum(entry))));
        }
        let refusal = match &result {
            Ok(()) => None,
            Err(LedgerError::Full) => Some(Refusal::Full),
            Err(error) => Some(Refusal::Failed(error.to_string())),
        };
        let failed = matches!(refusal, Some(Refusal::Failed(_)));
        if let Some(Refusal::Failed(reason)) = &refusal {
            report.send_replace(Some(reason.clone()));
        }
        for (done, stored) in waiting {
            // A client that went away asks again.
            drop(done.send(refusal.clone().map_or(Ok(stored), Err)));
        }
        if failed { Err(StorageFailed) } else { Ok(()) }
    }
}

fn checksum(entry: &Entry) -> u32 {
    crc32c::crc32c(entry.text.as_bytes())
}

fn lock(index: &Mutex<Index>) -> MutexGuard<'_, Index> {
    // Each use leaves the index whole, so a panic elsewhere spoils nothing.
    index.lock().unwrap_or_else(PoisonError::into_inner)
}
