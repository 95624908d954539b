//! Creating, showing and removing a replica's backing. Called by the node when the control log says so.
//!
//! All replicas of a new volume start in sync, so each starts as zeroes; one that is added later says
//! of itself that it has nothing. A new file is sparse; an
//! existing file or device is zeroed from end to end. Nothing that may be anybody's is
//! overwritten unless the administrator forced it.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use relevo_format::{
    Backing as Found, Identity, Layout, LayoutError, Replica, Start, Superblock, dump::Dump,
};
use relevo_types::{ByteRange, Epoch, size::format_size};
use rustix::{
    fs::{FallocateFlags, RenameFlags},
    io::Errno,
};

use crate::{
    backing::{Backing, OpenError, OpenOptions},
    signature::{LOOK_LEN, recognise},
};

/// Zeroed with one call: bounds how long the call runs.
const ZERO_STEP: u64 = 1 << 30;

/// Zeroes written at once where the disk can't zero by itself.
const ZEROES_LEN: usize = 1 << 20;

/// A replica to be created.
#[derive(Clone, Debug)]
pub struct NewReplica<'a> {
    /// A file that does not exist yet, or an existing file or block device.
    pub path: &'a Path,
    /// What it will be.
    pub replica: Replica,
    /// What it has at its beginning.
    pub start: Start,
    /// Size of the volume in bytes.
    pub data_size: u64,
    /// Overwrite what an existing file or device holds.
    pub force: bool,
}

/// Why a replica could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The volume's size can't be, or the given backing is too small.
    #[error(transparent)]
    Size(#[from] LayoutError),
    /// The filesystem is too full or too small.
    #[error(
        "a volume of {} needs {} with its metadata, but the filesystem of {directory} has {} free; make room, choose a smaller size, or give the replica another backing",
        format_size(*.data_size), format_size(*.needed), format_size(*.available)
    )]
    NoSpace {
        /// Directory of the new file.
        directory: PathBuf,
        /// Size of the volume.
        data_size: u64,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// It holds something.
    #[error(
        "{path} holds {found}; nothing was changed. If it is not needed any more, create the replica again with --force, which overwrites it; else give another backing"
    )]
    Occupied {
        /// The backing.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The system refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Why a replica was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// It is not the replica that should go.
    #[error(
        "{path} holds {found}, not the replica that is to be removed; nothing was changed. Look at it and remove it by hand if it is not needed"
    )]
    NotOurs {
        /// The backing.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// It can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The system refused.
    #[error("cannot {what} {path}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Creates a replica's backing, durably. Safe to repeat after a crash: an unused replica of the same
/// identity is made anew.
///
/// # Errors
/// See [`CreateError`]. After an error a file that did not exist does not exist.
pub fn create_replica(new: &NewReplica<'_>) -> Result<(), CreateError> {
    let smallest = Layout::new(new.data_size)?;
    match fs::metadata(new.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => create_file(new, &smallest),
        Err(error) => Err(failed("look at", new.path)(error)),
        Ok(_) => take_over(new),
    }
}

/// Removes a replica: deletes its file, or wipes the metadata on its device. The device's data
/// area stays as it is. A backing that is gone already is fine.
///
/// # Errors
/// See [`RemoveError`]; what is not this very replica is left alone.
pub fn remove_replica(path: &Path, identity: &Identity) -> Result<(), RemoveError> {
    let system = |what| {
        move |source: io::Error| RemoveError::System {
            what,
            path: path.to_owned(),
            source,
        }
    };
    let backing = match Backing::open(path, &buffered()) {
        Ok(backing) => backing,
        Err(OpenError::Missing { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let found = match owner(&backing).map_err(system("read"))? {
        Found::Ours(superblock) if superblock.replica.identity == *identity => {
            return if backing.is_device() {
                let layout = superblock.layout.metadata();
                wipe(backing.file(), layout).map_err(system("wipe"))
            } else {
                fs::remove_file(path).map_err(system("remove"))?;
                sync_directory(path).map_err(system("sync the directory of"))
            };
        }
        Found::Blank if backing.is_device() => return Ok(()),
        Found::Blank | Found::Foreign => "no replica of Relevo".to_owned(),
        Found::Ours(superblock) => describe(&superblock),
        Found::Damaged(why) => format!("a damaged replica ({why})"),
    };
    Err(RemoveError::NotOurs {
        path: path.to_owned(),
        found,
    })
}

/// The size of a backing in bytes, and what its metadata says. Takes no lock, so that it works beside a
/// daemon that has the replica attached; a block that is being written at this moment may then look
/// damaged.
///
/// # Errors
/// The system's: it can't be opened. What can't be read is described in the dump.
pub fn dump_metadata(path: &Path) -> io::Result<(u64, Dump)> {
    let mut file = File::open(path)?;
    // Of a device too, whose metadata says 0.
    let size = file.seek(SeekFrom::End(0))?;
    let read = |range: ByteRange| {
        let len = usize::try_from(range.len).map_err(|error| error.to_string())?;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, range.offset)
            .map_err(|error| error.to_string())?;
        Ok(bytes)
    };
    Ok((size, Dump::read(size, read)))
}

const fn buffered() -> OpenOptions {
    OpenOptions {
        read_only: false,
        buffered: true,
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> CreateError {
    move |source| CreateError::System {
        what,
        path: path.to_owned(),
        source,
    }
}

fn create_file(new: &NewReplica<'_>, layout: &Layout) -> Result<(), CreateError> {
    let directory = directory_of(new.path);
    let space = rustix::fs::statvfs(directory)
        .map_err(|error| failed("look at the directory of", new.path)(error.into()))?;
    let available = space.f_bavail.saturating_mul(space.f_frsize);
    if layout.backing_size() > available {
        return Err(CreateError::NoSpace {
            directory: directory.to_owned(),
            data_size: new.data_size,
            needed: layout.backing_size(),
            available,
        });
    }
    // Under another name until it is complete, so that a crash leaves no half replica.
    let mut name = OsString::from(".");
    name.push(new.path.file_name().unwrap_or_default());
    name.push(".creating");
    let unfinished = directory.join(name);
    let made = write_file(new, layout, &unfinished);
    if made.is_err()
        && let Err(error) = fs::remove_file(&unfinished)
    {
        tracing::warn!(path = %unfinished.display(), %error, "an unfinished file is left");
    }
    made
}

fn write_file(new: &NewReplica<'_>, layout: &Layout, to: &Path) -> Result<(), CreateError> {
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)
        .map_err(failed("create", to))?;
    file.set_len(layout.backing_size())
        .map_err(failed("give the needed size to", to))?;
    write_metadata(&file, new, layout).map_err(failed("write", to))?;
    match rustix::fs::renameat_with(
        rustix::fs::CWD,
        to,
        rustix::fs::CWD,
        new.path,
        RenameFlags::NOREPLACE,
    ) {
        // Some filesystems can't promise not to replace; nothing was there a moment ago.
        Err(Errno::INVAL) => fs::rename(to, new.path),
        other => other.map_err(io::Error::from),
    }
    .map_err(failed("put in place", new.path))?;
    sync_directory(new.path).map_err(failed("sync the directory of", new.path))
}

fn take_over(new: &NewReplica<'_>) -> Result<(), CreateError> {
    let path = new.path;
    let backing = Backing::open(path, &buffered())?;
    let layout = Layout::on_backing(new.data_size, backing.size())?;
    if !new.force
        && let Some(found) = occupied_by(new, &backing).map_err(failed("read", path))?
    {
        return Err(CreateError::Occupied {
            path: path.to_owned(),
            found,
        });
    }
    wipe(backing.file(), ByteRange::new(0, layout.backing_size())).map_err(failed("zero", path))?;
    write_metadata(backing.file(), new, &layout).map_err(failed("write", path))
}

/// What would be lost by taking this backing.
fn occupied_by(new: &NewReplica<'_>, backing: &Backing) -> io::Result<Option<String>> {
    match owner(backing)? {
        Found::Ours(superblock) => {
            let unused =
                superblock.replica.identity == new.replica.identity && superblock.epoch == Epoch(0);
            Ok((!unused).then(|| describe(&superblock)))
        }
        Found::Damaged(why) => Ok(Some(format!("a damaged replica ({why})"))),
        Found::Blank | Found::Foreign => {
            let len = LOOK_LEN.min(backing.size());
            let read = |offset| {
                let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
                backing
                    .file()
                    .read_exact_at(&mut bytes, offset)
                    .map(|()| bytes)
            };
            Ok(recognise(&read(0)?, &read(backing.size() - len)?))
        }
    }
}

fn owner(backing: &Backing) -> io::Result<Found> {
    let Some(range) = Layout::superblocks(backing.size()) else {
        return Ok(Found::Foreign);
    };
    let mut blocks = vec![0; usize::try_from(range.len).unwrap_or(0)];
    backing.file().read_exact_at(&mut blocks, range.offset)?;
    Ok(relevo_format::identify(&blocks))
}

fn describe(superblock: &Superblock) -> String {
    let Identity {
        cluster,
        volume,
        node,
    } = superblock.replica.identity;
    format!(
        "a replica of volume {volume} of cluster {cluster}, node {node} (epoch {})",
        superblock.epoch
    )
}

fn write_metadata(file: &File, new: &NewReplica<'_>, layout: &Layout) -> io::Result<()> {
    for (offset, bytes) in relevo_format::create(&new.replica, layout, new.start) {
        file.write_all_at(&bytes, offset)?;
    }
    file.sync_all()
}

/// Makes a range read as zeroes, durably.
fn wipe(file: &File, range: ByteRange) -> io::Result<()> {
    let mut at = range.offset;
    while at < range.end() {
        let len = ZERO_STEP.min(range.end() - at);
        zero(file, at, len)?;
        at += len;
    }
    file.sync_all()
}

fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    for flags in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
        match rustix::fs::fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let zeroes = vec![0; ZEROES_LEN];
    let mut done = 0;
    while done < len {
        let step = usize::try_from(len - done).unwrap_or(usize::MAX);
        let step = step.min(zeroes.len());
        file.write_all_at(&zeroes[..step], offset + done)?;
        done += step as u64;
    }
    Ok(())
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}
