//! `dump-md`: the metadata of this node's replica as it lies on the backing, whether the volume is up
//! or down, and without a daemon too.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use relevo_types::{ReplicaSlot, VolumeId};

use crate::{
    api::{ApiError, ErrorKind, MetadataDump},
    cluster::Cluster,
    local_store::LocalReplicas,
    membership_files::Places,
};

/// A disk that does not answer for this long is not waited for. The metadata of 1 TiB are read in a
/// fraction of it.
const READ_WAIT: Duration = Duration::from_secs(30);

/// A block may be read in the middle of being written while the replica is attached: what looks damaged
/// then is looked at again this often.
const LOOKS: usize = 5;

impl Cluster {
    /// The metadata of this node's replica of a volume.
    pub(crate) async fn dump_metadata(&self, name: &str) -> Result<MetadataDump, ApiError> {
        let state = self.state();
        let (id, backing) = find(&self.local_replicas(), name)?;
        let attached = self.is_attached(id);
        let volume = state.volumes.get(&id).cloned();
        let node_of = move |slot: ReplicaSlot| {
            let mut replicas = volume.as_ref()?.replicas.iter();
            let (node, _) = replicas.find(|(_, replica)| replica.slot == slot)?;
            Some(state.node_name(*node).to_owned())
        };
        let word = if attached { "attached" } else { "detached" };
        let (name, path) = (name.to_owned(), backing.clone());
        let read = move || {
            let mut looks = if attached { LOOKS } else { 1 };
            loop {
                looks -= 1;
                let dump = read_backing(&name, &path, word, &node_of)?;
                if looks == 0 || !dump.is_damaged() {
                    return Ok(dump);
                }
            }
        };
        let read = tokio::task::spawn_blocking(read);
        let unread = |why: String| unreadable(&backing, &why);
        match tokio::time::timeout(READ_WAIT, read).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(unread(error.to_string())),
            Err(_) => Err(unread(format!(
                "it does not answer within {} s",
                READ_WAIT.as_secs()
            ))),
        }
    }
}

/// The metadata of a replica of a machine whose daemon does not run, by what its state directory says.
///
/// # Errors
/// There is no such replica, or its backing can't be opened.
pub fn dump_metadata_without_daemon(
    state_dir: &Path,
    name: &str,
) -> Result<MetadataDump, ApiError> {
    let replicas = Places::new(state_dir).replicas().load().map_err(|error| {
        let text = error.to_string();
        ApiError::new(ErrorKind::Internal, "nothing was dumped", text, "")
    })?;
    let (_, backing) = find(&replicas.unwrap_or_default(), name)?;
    read_backing(name, &backing, "no daemon", &|_| None)
}

fn find(replicas: &LocalReplicas, name: &str) -> Result<(VolumeId, PathBuf), ApiError> {
    let found = replicas.iter().find(|(_, replica)| replica.name == name);
    found
        .map(|(id, replica)| (*id, replica.backing.clone()))
        .ok_or_else(|| {
            ApiError::new(
                ErrorKind::NotFound,
                "nothing was dumped",
                format!("this machine has no replica of a volume `{name}`"),
                "`relevo volume list` shows the volumes and the nodes of their replicas",
            )
        })
}

fn unreadable(backing: &Path, why: &str) -> ApiError {
    ApiError::new(
        ErrorKind::Unavailable,
        "nothing was dumped",
        format!("{} can't be read: {why}", backing.display()),
        "check the disk; `relevo status` shows what the volume does without it",
    )
}

fn read_backing(
    name: &str,
    backing: &Path,
    state: &str,
    node_of: &impl Fn(ReplicaSlot) -> Option<String>,
) -> Result<MetadataDump, ApiError> {
    let dump = relevo_disk::dump_metadata(backing)
        .map_err(|error| unreadable(backing, &error.to_string()))?;
    let backing = backing.to_owned();
    Ok(MetadataDump::new(name, backing, state, dump, node_of))
}
