//! The applied state: in memory, published to watchers, and in a snapshot file.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Cursor},
    path::{Path, PathBuf},
    sync::Arc,
};

use openraft::{
    EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership, storage::RaftStateMachine,
};
use relevo_types::cluster::ClusterState;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{MaybeResponse, Proposal, Response, TypeConfig};
use crate::facts::{open_sealed, seal, write_durably};

type Membership = StoredMembership<u64, openraft::EmptyNode>;

/// What a snapshot holds, on disk and on its way to another node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Content {
    last: Option<LogId<u64>>,
    membership: Membership,
    state: ClusterState,
    /// What the last proposals answered, oldest first: one that arrives again because its answer
    /// was lost gets the same answer and is not applied twice.
    answered: VecDeque<(u64, Response)>,
}

/// A proposal is repeated for seconds at most; so many commands are not applied in that time.
const ANSWERS_KEPT: usize = 256;

/// The state machine.
#[derive(Debug)]
pub(super) struct StateMachine {
    path: PathBuf,
    content: Content,
    published: watch::Sender<Arc<ClusterState>>,
}

/// Takes a snapshot of the moment it was made.
#[derive(Debug)]
pub(super) struct Builder {
    path: PathBuf,
    content: Content,
}

impl StateMachine {
    pub(super) fn open(path: &Path) -> io::Result<(Self, watch::Receiver<Arc<ClusterState>>)> {
        let content = match fs::read(path) {
            Ok(bytes) => open_sealed(&bytes).map_err(|reason| damaged(path, &reason))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Content::default(),
            Err(error) => return Err(error),
        };
        let (published, state) = watch::channel(Arc::new(content.state.clone()));
        Ok((
            Self {
                path: path.to_path_buf(),
                content,
                published,
            },
            state,
        ))
    }

    fn publish(&self) {
        self.published
            .send_replace(Arc::new(self.content.state.clone()));
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = Builder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, Membership), StorageError<u64>> {
        Ok((self.content.last, self.content.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<MaybeResponse>, StorageError<u64>>
    where
        I: IntoIterator<Item = openraft::Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut responses = Vec::new();
        let mut changed = false;
        for entry in entries {
            self.content.last = Some(entry.log_id);
            responses.push(MaybeResponse(match entry.payload {
                EntryPayload::Blank => None,
                EntryPayload::Normal(proposal) => {
                    changed = true;
                    Some(self.content.apply(&proposal))
                }
                EntryPayload::Membership(membership) => {
                    self.content.membership = StoredMembership::new(Some(entry.log_id), membership);
                    None
                }
            }));
        }
        if changed {
            self.publish();
        }
        Ok(responses)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            path: self.path.clone(),
            content: self.content.clone(),
        }
    }

    async fn begin_receiving_snapshot(
        &mut self,
    ) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, openraft::EmptyNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<u64>> {
        let bytes = snapshot.into_inner();
        let content: Content = open_sealed(&bytes).map_err(|reason| {
            let error = io::Error::other(format!("a snapshot arrived damaged: {reason}"));
            StorageIOError::read_snapshot(Some(meta.signature()), &error)
        })?;
        save(&self.path, bytes)
            .await
            .map_err(|error| StorageIOError::write_snapshot(Some(meta.signature()), &error))?;
        self.content = content;
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<TypeConfig>>, StorageError<u64>> {
        match fs::read(&self.path) {
            Ok(bytes) => {
                let content: Content = open_sealed(&bytes)
                    .map_err(|reason| damaged(&self.path, &reason))
                    .map_err(|error| StorageIOError::read_snapshot(None, &error))?;
                Ok(Some(content.snapshot(bytes)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StorageIOError::read_snapshot(None, &error).into()),
        }
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<u64>> {
        let bytes = seal(&self.content);
        save(&self.path, bytes.clone())
            .await
            .map_err(|error| StorageIOError::write_snapshot(None, &error))?;
        Ok(self.content.snapshot(bytes))
    }
}

impl Content {
    fn apply(&mut self, proposal: &Proposal) -> Response {
        let known = self.answered.iter().find(|(id, _)| *id == proposal.id);
        if let Some((_, response)) = known {
            return response.clone();
        }
        let result = self.state.apply(&proposal.command);
        let response = Response {
            revision: self.state.revision,
            result,
        };
        self.answered.push_back((proposal.id, response.clone()));
        if self.answered.len() > ANSWERS_KEPT {
            self.answered.pop_front();
        }
        response
    }

    fn snapshot(&self, bytes: Vec<u8>) -> Snapshot<TypeConfig> {
        let snapshot_id = self
            .last
            .map_or_else(|| "empty".to_owned(), |last| last.to_string());
        let meta = SnapshotMeta {
            last_log_id: self.last,
            last_membership: self.membership.clone(),
            snapshot_id,
        };
        Snapshot {
            meta,
            snapshot: Box::new(Cursor::new(bytes)),
        }
    }
}

async fn save(path: &Path, bytes: Vec<u8>) -> io::Result<()> {
    let path = path.to_path_buf();
    tokio::task::spawn_blocking(move || write_durably(&path, &bytes))
        .await
        .map_err(io::Error::other)?
}

fn damaged(path: &Path, reason: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "{} is damaged: {reason}. Remove this node from the cluster, empty its state directory and join again",
            path.display()
        ),
    )
}
