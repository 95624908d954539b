//! One daemon for one state directory.

use std::{
    fs::{self, File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

/// Name of the lock file in the state directory; it holds the daemon's process id.
const LOCK_NAME: &str = "lock";

/// A state directory that no other daemon can use while this value lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    // Held, not read: the kernel drops the lock when the last descriptor closes, however the
    // process ends.
    _lock: File,
}

impl StateDir {
    /// Makes the directory if it is missing and takes its lock.
    ///
    /// # Errors
    /// Another daemon has it, or it can't be written; the text says what to do.
    pub fn lock(path: &Path) -> Result<Self, LockError> {
        let failed = |error: std::io::Error| LockError::Io {
            path: path.to_path_buf(),
            reason: error.to_string(),
        };
        fs::create_dir_all(path).map_err(failed)?;
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join(LOCK_NAME))
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid).map_err(failed)?;
                return Err(LockError::InUse {
                    path: path.to_path_buf(),
                    pid: pid.trim().to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        lock.set_len(0).map_err(failed)?;
        lock.rewind().map_err(failed)?;
        writeln!(lock, "{}", std::process::id()).map_err(failed)?;
        Ok(Self {
            path: path.to_path_buf(),
            _lock: lock,
        })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Why a state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon runs on it.
    #[error(
        "the state directory {} is in use by the daemon with process id {pid}; stop that one, or give this one \
         another --state-dir",
        path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The other daemon.
        pid: String,
    },
    /// It can't be made or written.
    #[error("the state directory {} can't be used: {reason}; check that it exists and is writable", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_told_who_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let first = StateDir::lock(&path).unwrap();
        let words = StateDir::lock(&path).unwrap_err().to_string();
        assert!(words.contains(&std::process::id().to_string()), "{words}");
        assert!(words.contains("--state-dir"), "{words}");
        drop(first);
        StateDir::lock(&path).unwrap();
    }
}
