//! What this node alone must remember beside its keys, its log and its promises: how it listens, and
//! which replicas are here.
//!
//! Small JSON files, each replaced as a whole: written beside, made durable, renamed. A crash
//! leaves the old or the new content, never a mix. What the cluster agrees on is in the control
//! log, not here.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    marker::PhantomData,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use relevo_types::{Sensitivity, VolumeId, cluster::NodeSpec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A file that holds one value.
#[derive(Debug)]
pub(crate) struct Stored<T> {
    path: PathBuf,
    value: PhantomData<fn() -> T>,
}

/// A file could not be read or written. The text says which, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{} can't be {what}: {source}; {remedy}", path.display())]
pub(crate) struct StoreError {
    path: PathBuf,
    what: &'static str,
    remedy: &'static str,
    source: io::Error,
}

/// The content of a file with the version of its format.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    content: T,
}

/// The one version there is.
const VERSION: u32 = 1;

impl<T: Serialize + DeserializeOwned> Stored<T> {
    /// The value of a name in a state directory.
    #[must_use]
    pub(crate) fn new(state_dir: &Path, name: &str) -> Self {
        Self {
            path: state_dir.join(name),
            value: PhantomData,
        }
    }

    /// Reads the value; `None` when it was never written.
    ///
    /// # Errors
    /// The file can't be read or understood.
    pub(crate) fn load(&self) -> Result<Option<T>, StoreError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.error("read", "check the disk and its rights", e)),
        };
        let damaged = |e: io::Error| {
            self.error(
                "understood",
                "restore it from a copy, or let this machine join anew with an empty state directory",
                e,
            )
        };
        let versioned: Versioned<T> =
            serde_json::from_slice(&bytes).map_err(|e| damaged(e.into()))?;
        if versioned.version != VERSION {
            let why = format!(
                "it has format {}, this program knows {VERSION}",
                versioned.version
            );
            return Err(damaged(io::Error::other(why)));
        }
        Ok(Some(versioned.content))
    }

    /// Replaces the value; it is on stable storage when this returns.
    ///
    /// # Errors
    /// The system's; the old value is still there then.
    pub(crate) fn save(&self, value: &T) -> Result<(), StoreError> {
        let content = Versioned {
            version: VERSION,
            content: value,
        };
        self.try_save(&content).map_err(|e| {
            self.error(
                "written",
                "check the disk, its rights and the space left",
                e,
            )
        })
    }

    fn try_save(&self, content: &Versioned<&T>) -> io::Result<()> {
        let beside = self.path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(&serde_json::to_vec_pretty(content)?)?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        // The rename is durable only with its directory.
        File::open(self.path.parent().unwrap_or_else(|| Path::new("/")))?.sync_all()
    }

    fn error(&self, what: &'static str, remedy: &'static str, source: io::Error) -> StoreError {
        StoreError {
            path: self.path.clone(),
            what,
            remedy,
            source,
        }
    }
}

/// How this node appears in its cluster, from `init` or `join`: what it needs before it has read
/// the control log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct NodeFile {
    /// Name of the cluster.
    pub(crate) cluster_name: String,
    /// Its time-outs.
    pub(crate) sensitivity: Sensitivity,
    /// What this node told about itself, and what became of it.
    pub(crate) spec: NodeSpec,
    /// Up to which revision of the control log; 0: as it told.
    #[serde(default)]
    pub(crate) revision: u64,
    /// The key of the cluster's heartbeats.
    pub(crate) heartbeat_key: [u8; 32],
}

/// The replicas that were made on this node.
pub(crate) type LocalReplicas = BTreeMap<VolumeId, LocalReplica>;

/// A replica that was made on this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct LocalReplica {
    /// Name of its volume.
    pub(crate) name: String,
    /// File or device.
    pub(crate) backing: PathBuf,
    /// The file is in the pool directory and was made for this replica: it is deleted with it.
    pub(crate) ours: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives() {
        let dir = tempfile::tempdir().unwrap();
        let store: Stored<LocalReplicas> = Stored::new(dir.path(), "replicas");
        assert_eq!(store.load().unwrap(), None);
        let replica = LocalReplica {
            name: "mail".to_owned(),
            backing: PathBuf::from("/x/mail"),
            ours: true,
        };
        let value = BTreeMap::from([(VolumeId(2), replica)]);
        store.save(&value).unwrap();
        store.save(&value).unwrap();
        assert_eq!(store.load().unwrap(), Some(value));
    }

    #[test]
    fn damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let store: Stored<LocalReplicas> = Stored::new(dir.path(), "replicas");
        fs::write(
            dir.path().join("replicas"),
            "{\"version\": 9, \"content\": {}}",
        )
        .unwrap();
        let error = store.load().unwrap_err().to_string();
        assert!(error.contains("format 9"), "{error}");
        fs::write(dir.path().join("replicas"), "{").unwrap();
        let error = store.load().unwrap_err().to_string();
        assert!(error.contains("join anew"), "{error}");
    }
}
