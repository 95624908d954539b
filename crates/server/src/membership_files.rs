//! The files of a member: written by `init` and `join`, read at every start, removed by `leave`.
//!
//! `identity/` keys and certificates, `control/` the control log, `member` and `condemned` the
//! facts of the control crate, `node.json` how this node listens, `replicas.json` what is here.
//! `member` is written last and removed first: without it nothing else counts.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use relevo_control::facts::{Facts, Member, VotersKnown};
use relevo_transport::{ClusterCa, Identity};

use crate::local_store::{LocalReplicas, NodeFile, StoreError, Stored};

/// Everything that a start needs of a member.
#[derive(Debug)]
pub(crate) struct MemberFiles {
    pub(crate) member: Member,
    pub(crate) identity: Arc<Identity>,
    /// `None` on a node that may not admit others.
    pub(crate) ca: Option<Arc<ClusterCa>>,
    pub(crate) node: NodeFile,
}

/// Where the files are.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    state_dir: PathBuf,
}

impl Places {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
        }
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    pub(crate) fn control_dir(&self) -> PathBuf {
        self.state_dir.join("control")
    }

    pub(crate) fn nbd_dir(&self) -> PathBuf {
        self.state_dir.join("nbd")
    }

    pub(crate) fn saved_dir(&self) -> PathBuf {
        crate::saved::saved_dir(&self.state_dir)
    }

    pub(crate) fn log_dir(&self) -> PathBuf {
        self.state_dir.join("logs")
    }

    pub(crate) fn replicas(&self) -> Stored<LocalReplicas> {
        Stored::new(&self.state_dir, "replicas.json")
    }

    pub(crate) fn facts(&self) -> io::Result<Facts> {
        Facts::open(&self.state_dir)
    }

    /// Which change of who votes this node knows.
    pub(crate) fn voters(&self) -> io::Result<VotersKnown> {
        VotersKnown::open(&self.state_dir)
    }

    fn identity_dir(&self) -> PathBuf {
        self.state_dir.join("identity")
    }

    fn node(&self) -> Stored<NodeFile> {
        Stored::new(&self.state_dir, "node.json")
    }

    /// Reads the member's files; `None` when this machine belongs to no cluster.
    pub(crate) fn load(&self) -> anyhow::Result<Option<MemberFiles>> {
        let Some(member) = self.facts()?.member()? else {
            return Ok(None);
        };
        let identity = Identity::load(&self.identity_dir(), member.cluster)?;
        anyhow::ensure!(
            identity.node() == member.node,
            "the certificate in {} is of node {}, but this machine is node {}; restore the state directory \
             from one copy, or let the machine join anew with an empty one",
            self.identity_dir().display(),
            identity.node(),
            member.node
        );
        let ca = ClusterCa::load(&self.identity_dir(), member.cluster)?.map(Arc::new);
        let node = self.node().load()?.ok_or_else(|| {
            anyhow::anyhow!(
                "the file node.json is missing in {}; restore it, or let this machine join anew with an \
                 empty state directory",
                self.state_dir.display()
            )
        })?;
        Ok(Some(MemberFiles {
            member,
            identity: Arc::new(identity),
            ca,
            node,
        }))
    }

    /// Writes the files of a new member.
    pub(crate) fn save(&self, files: &MemberFiles) -> anyhow::Result<()> {
        files.identity.save(&self.identity_dir())?;
        if let Some(ca) = &files.ca {
            ca.save(&self.identity_dir())?;
        }
        self.node().save(&files.node)?;
        self.facts()?.set_member(&files.member)?;
        Ok(())
    }

    /// Writes how the node listens now.
    pub(crate) fn save_node(&self, node: &NodeFile) -> Result<(), StoreError> {
        self.node().save(node)
    }

    /// Removes what makes this machine a member. What is not there is fine.
    pub(crate) fn wipe(&self) -> io::Result<()> {
        let file = |name: &str| match fs::remove_file(self.state_dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Ok(()) | Err(_) => Ok(()),
        };
        let directory = |path: PathBuf| match fs::remove_dir_all(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Ok(()) | Err(_) => Ok(()),
        };
        for name in [
            "member",
            "condemned",
            "voters",
            "node.json",
            "replicas.json",
        ] {
            file(name)?;
        }
        directory(self.identity_dir())?;
        directory(self.control_dir())
    }
}
