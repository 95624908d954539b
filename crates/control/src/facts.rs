//! Small facts that a node must not forget: its identity in the cluster, and the lease generations
//! that it condemned. A condemnation is a promise: it is on stable storage before it is told to
//! anybody (DESIGN, rule 8), because after a restart the node must still keep it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use relevo_types::{ClusterId, LeaseGeneration, NodeId};
use serde::{Deserialize, Serialize};

use crate::journal::{Record, RecordFile};

const MEMBER_NAME: &str = "member";
const CONDEMNED_NAME: &str = "condemned";
const VOTERS_NAME: &str = "voters";

/// Who this node is. Written once, when it becomes a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Member {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its id there.
    pub node: NodeId,
}

/// The facts of one state directory.
#[derive(Debug)]
pub struct Facts {
    directory: PathBuf,
    condemned: RecordFile<Condemned>,
    known: Vec<(NodeId, LeaseGeneration)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Condemned {
    node: NodeId,
    generation: LeaseGeneration,
}

impl Record for Condemned {
    const MAGIC: [u8; 8] = *b"RLVCOND1";
}

impl Facts {
    /// Opens the facts of a state directory, empty ones if there are none.
    ///
    /// # Errors
    /// They can't be read, or are damaged in the middle.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let (condemned, records) = RecordFile::<Condemned>::open(&directory.join(CONDEMNED_NAME))?;
        let known = records
            .into_iter()
            .map(|record| (record.node, record.generation))
            .collect();
        Ok(Self {
            directory: directory.to_path_buf(),
            condemned,
            known,
        })
    }

    /// Who this node is; `None` before it became a member.
    ///
    /// # Errors
    /// The file can't be read or is damaged.
    pub fn member(&self) -> io::Result<Option<Member>> {
        read_sealed(&self.directory.join(MEMBER_NAME))
    }

    /// Writes down who this node is.
    ///
    /// # Errors
    /// It can't be written.
    pub fn set_member(&self, member: &Member) -> io::Result<()> {
        write_durably(&self.directory.join(MEMBER_NAME), &seal(member))
    }

    /// Writes down, durably, that a generation is condemned.
    ///
    /// # Errors
    /// It can't be written: then it must not be told to anybody.
    pub fn condemn(&mut self, node: NodeId, generation: LeaseGeneration) -> io::Result<()> {
        if !self.known.contains(&(node, generation)) {
            self.condemned.append(&[Condemned { node, generation }])?;
            self.known.push((node, generation));
        }
        Ok(())
    }

    /// Every condemnation ever written down.
    #[must_use]
    pub fn condemned(&self) -> &[(NodeId, LeaseGeneration)] {
        &self.known
    }
}

/// Which change of who votes this node knows, also when the log is applied only in part after a restart.
#[derive(Debug)]
pub struct VotersKnown {
    path: PathBuf,
    known: u64,
}

impl VotersKnown {
    /// Opens it in a state directory.
    ///
    /// # Errors
    /// The file can't be read or is damaged.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join(VOTERS_NAME);
        let known = read_sealed(&path)?.unwrap_or(0);
        Ok(Self { path, known })
    }

    /// The newest one.
    #[must_use]
    pub const fn known(&self) -> u64 {
        self.known
    }

    /// Writes one down, durably, unless a newer one is.
    ///
    /// # Errors
    /// It can't be written: then nothing that depends on it may be told to anybody.
    pub fn raise(&mut self, known: u64) -> io::Result<()> {
        if known > self.known {
            write_durably(&self.path, &seal(&known))?;
            self.known = known;
        }
        Ok(())
    }
}

/// The sealed value of a file; `None` where there is none.
fn read_sealed<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => open_sealed(&bytes)
            .map(Some)
            .map_err(|reason| io::Error::other(format!("{} is damaged: {reason}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A value with its checksum in front.
pub(crate) fn seal<T: Serialize>(value: &T) -> Vec<u8> {
    let body = postcard::to_stdvec(value).expect("plain data encodes into memory");
    let mut bytes = crc32c::crc32c(&body).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

/// The value of [`seal`].
pub(crate) fn open_sealed<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, String> {
    let (sum, body) = bytes.split_first_chunk::<4>().ok_or("it is too short")?;
    if crc32c::crc32c(body).to_le_bytes() != *sum {
        return Err("its checksum does not fit".to_owned());
    }
    postcard::from_bytes(body).map_err(|error| error.to_string())
}

/// Replaces a file so that after a crash it is the old one or the new one, whole.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path
        .parent()
        .ok_or_else(|| io::Error::other("a file has a directory"))?;
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_and_identity_outlive_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let member = Member {
            cluster: ClusterId([3; 16]),
            node: NodeId(2),
        };
        {
            let mut facts = Facts::open(directory.path()).unwrap();
            assert_eq!(facts.member().unwrap(), None);
            facts.set_member(&member).unwrap();
            facts.condemn(NodeId(1), LeaseGeneration(4)).unwrap();
            facts.condemn(NodeId(1), LeaseGeneration(4)).unwrap();
        }
        let facts = Facts::open(directory.path()).unwrap();
        assert_eq!(facts.member().unwrap(), Some(member));
        assert_eq!(facts.condemned(), [(NodeId(1), LeaseGeneration(4))]);
    }

    #[test]
    fn what_is_known_of_the_voters_outlives_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let mut voters = VotersKnown::open(directory.path()).unwrap();
        assert_eq!(voters.known(), 0);
        voters.raise(3).unwrap();
        voters.raise(2).unwrap();
        assert_eq!(VotersKnown::open(directory.path()).unwrap().known(), 3);
        fs::write(directory.path().join(VOTERS_NAME), [1, 2, 3]).unwrap();
        let damaged = VotersKnown::open(directory.path()).unwrap_err();
        assert!(damaged.to_string().contains("damaged"));
    }

    #[test]
    fn a_damaged_identity_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let facts = Facts::open(directory.path()).unwrap();
        let member = Member {
            cluster: ClusterId([3; 16]),
            node: NodeId(2),
        };
        facts.set_member(&member).unwrap();
        let path = directory.path().join(MEMBER_NAME);
        let mut bytes = fs::read(&path).unwrap();
        bytes[6] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(facts.member().unwrap_err().to_string().contains("damaged"));
    }
}
