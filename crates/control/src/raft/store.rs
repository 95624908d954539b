//! Log, vote and commit mark of the consensus library, in memory and in one record file.
//!
//! The log is short (snapshots cut it), so it is held in memory whole; the file is only read on
//! opening. What the library must not forget is on stable storage before it is told so.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    ops::RangeBounds,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use openraft::{
    LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};
use serde::{Deserialize, Serialize};

use super::TypeConfig;
use crate::journal::{Record, RecordFile};

type Entry = openraft::Entry<TypeConfig>;

/// The file is written anew when it is larger than this and mostly holds what is obsolete.
const COMPACT_ABOVE: u64 = 4 << 20;

/// One step of the log's life.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Step {
    Vote(Vote<u64>),
    Append(Box<Entry>),
    /// The entries from this one on are void.
    Truncate(u64),
    /// The entries up to this one are in a snapshot.
    Purge(LogId<u64>),
    /// A hint: entries up to this one are committed.
    Committed(Option<LogId<u64>>),
}

impl Record for Step {
    const MAGIC: [u8; 8] = *b"RLVRAFT1";
}

#[derive(Debug, Default)]
struct Log {
    vote: Option<Vote<u64>>,
    entries: BTreeMap<u64, Entry>,
    purged: Option<LogId<u64>>,
    committed: Option<LogId<u64>>,
}

/// The store; clones share it (the library reads through one and writes through another).
///
/// Two locks, so that readers on the runtime's threads never wait for a disk: the file's is held
/// during a flush, the log's only while memory changes. The file's is taken first.
#[derive(Clone, Debug)]
pub(super) struct LogStore {
    file: Arc<Mutex<RecordFile<Step>>>,
    log: Arc<Mutex<Log>>,
}

impl LogStore {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let (file, steps) = RecordFile::open(path)?;
        let mut log = Log::default();
        steps.into_iter().for_each(|step| log.take(step));
        Ok(Self {
            file: Arc::new(Mutex::new(file)),
            log: Arc::new(Mutex::new(log)),
        })
    }

    /// Where the log ends.
    pub(super) fn last(&self) -> Option<LogId<u64>> {
        let log = self.log();
        let last = log.entries.values().next_back().map(|entry| entry.log_id);
        last.or(log.purged)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }

    /// Writes steps durably, then takes them. Off the runtime's threads: a flush takes
    /// milliseconds.
    async fn write(&self, mut steps: Vec<Step>) -> io::Result<()> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || {
            let mut file = lock(&store.file);
            // The commit mark is a hint; it rides along and never costs a flush.
            let committed = store.log().committed;
            steps.push(Step::Committed(committed));
            file.append(&steps)?;
            let mut log = store.log();
            steps.into_iter().for_each(|step| log.take(step));
            let obsolete = file.len() > COMPACT_ABOVE;
            let steps = if obsolete { log.steps() } else { Vec::new() };
            drop(log);
            if obsolete {
                file.rewrite(&steps)?;
            }
            Ok(())
        })
        .await
        .map_err(io::Error::other)?
    }
}

/// A panic while a lock is held can only come from memory running out; the log is changed after
/// the file, so it is still true.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Log {
    fn take(&mut self, step: Step) {
        match step {
            Step::Vote(vote) => self.vote = Some(vote),
            Step::Append(entry) => {
                self.entries.insert(entry.log_id.index, *entry);
            }
            Step::Truncate(from) => {
                self.entries.split_off(&from);
            }
            Step::Purge(up_to) => {
                self.entries = self.entries.split_off(&(up_to.index + 1));
                self.purged = Some(up_to);
            }
            // Older than what is known, unless the file is being read.
            Step::Committed(committed) => self.committed = self.committed.max(committed),
        }
    }

    fn steps(&self) -> Vec<Step> {
        let entries = self
            .entries
            .values()
            .cloned()
            .map(Box::new)
            .map(Step::Append);
        self.vote
            .map(Step::Vote)
            .into_iter()
            .chain(self.purged.map(Step::Purge))
            .chain(entries)
            .chain([Step::Committed(self.committed)])
            .collect()
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError<u64>> {
        Ok(self
            .log()
            .entries
            .range(range)
            .map(|(_, entry)| entry.clone())
            .collect())
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        let last_purged_log_id = self.log().purged;
        let last_log_id = self.last();
        Ok(LogState {
            last_purged_log_id,
            last_log_id,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        self.write(vec![Step::Vote(*vote)])
            .await
            .map_err(|error| StorageIOError::write_vote(&error).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        Ok(self.log().vote)
    }

    async fn save_committed(
        &mut self,
        committed: Option<LogId<u64>>,
    ) -> Result<(), StorageError<u64>> {
        // A hint: it reaches the disk with the next step.
        self.log().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError<u64>> {
        // The hint may have outlived entries that were lost with a crash before their flush.
        let log = self.log();
        let last = log.entries.keys().next_back().copied();
        Ok(log.committed.filter(|committed| {
            last.is_some_and(|last| committed.index <= last)
                || log
                    .purged
                    .is_some_and(|purged| committed.index <= purged.index)
        }))
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let steps = entries
            .into_iter()
            .map(Box::new)
            .map(Step::Append)
            .collect();
        let result = self.write(steps).await;
        let failed = result.as_ref().err().map(StorageIOError::write_logs);
        callback.log_io_completed(result);
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.write(vec![Step::Truncate(log_id.index)])
            .await
            .map_err(|error| StorageIOError::write_logs(&error).into())
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.write(vec![Step::Purge(log_id)])
            .await
            .map_err(|error| StorageIOError::write_logs(&error).into())
    }
}
