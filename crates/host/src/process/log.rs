//! What a supervised process writes: the last lines in memory, all of it in a bounded file.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::Write as _,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use tokio::{io::AsyncReadExt as _, net::unix::pipe};

/// Lines kept in memory: enough for a stack trace, little enough for every service.
const KEPT_LINES: usize = 200;

/// A longer line is cut: a process may write without line ends.
const MAX_LINE: usize = 2048;

/// The size past which the file is renamed and begun anew, so that two of them is the most a
/// process can fill the disk with.
const MAX_FILE: u64 = 1 << 20;

/// Where the output of a process goes.
#[derive(Debug)]
pub(super) struct Log {
    path: Option<PathBuf>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    file: Option<File>,
    written: u64,
}

impl Log {
    /// Begins, or goes on with, the file at `path`. A file that can't be written is given up in
    /// silence but for one line in memory: a full disk must not stop a service.
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        let log = Self {
            path,
            inner: Mutex::default(),
        };
        log.with(|inner| log.open(inner));
        log
    }

    /// The last lines, oldest first.
    pub(super) fn last_lines(&self, count: usize) -> Vec<String> {
        self.with(|inner| {
            let skip = inner.lines.len().saturating_sub(count);
            inner.lines.iter().skip(skip).cloned().collect()
        })
    }

    /// Reads a process's output to its end.
    pub(super) async fn follow(self: std::sync::Arc<Self>, mut output: pipe::Receiver) {
        let mut buffer = [0; 4096];
        while let Ok(length) = output.read(&mut buffer).await {
            if length == 0 {
                break;
            }
            self.take(&buffer[..length]);
        }
        self.with(Inner::end_line);
    }

    fn take(&self, bytes: &[u8]) {
        self.with(|inner| {
            for byte in bytes {
                if *byte == b'\n' {
                    inner.end_line();
                } else {
                    inner.partial.push(*byte);
                    if inner.partial.len() >= MAX_LINE {
                        inner.end_line();
                    }
                }
            }
            if let Some(file) = &mut inner.file {
                if file.write_all(bytes).is_err() {
                    inner.file = None;
                    inner.keep("(the log file can't be written; later lines are not in it)".into());
                }
                inner.written += bytes.len() as u64;
            }
            if inner.written > MAX_FILE {
                self.rotate(inner);
            }
        });
    }

    fn rotate(&self, inner: &mut Inner) {
        if let Some(path) = &self.path {
            let mut old = path.clone().into_os_string();
            old.push(".1");
            // When the rename fails the file is begun anew all the same: it must not grow on.
            if std::fs::rename(path, old).is_err() {
                drop(std::fs::remove_file(path));
            }
            self.open(inner);
        }
    }

    fn open(&self, inner: &mut Inner) {
        let Some(path) = &self.path else { return };
        let opened = OpenOptions::new().append(true).create(true).open(path);
        match opened {
            Ok(file) => {
                inner.written = file.metadata().map_or(0, |metadata| metadata.len());
                inner.file = Some(file);
            }
            Err(error) => {
                inner.written = 0;
                inner.file = None;
                inner.keep(format!("(no log file {}: {error})", path.display()));
            }
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        // Each use leaves the lines whole, so a panic elsewhere spoils nothing.
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Inner {
    fn end_line(&mut self) {
        if !self.partial.is_empty() {
            let line = String::from_utf8_lossy(&self.partial).into_owned();
            self.partial.clear();
            self.keep(line);
        }
    }

    fn keep(&mut self, line: String) {
        if self.lines.len() == KEPT_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_and_the_file_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = Log::new(Some(path.clone()));
        log.take(b"one\ntw");
        log.take(b"o\n");
        assert_eq!(log.last_lines(5), ["one", "two"]);
        assert_eq!(log.last_lines(1), ["two"]);
        for _ in 0..3000 {
            log.take(&[b'x'; 1023]);
            log.take(b"\n");
        }
        assert_eq!(log.last_lines(usize::MAX).len(), KEPT_LINES);
        assert!(path.metadata().unwrap().len() <= MAX_FILE + 1024);
        let old = directory.path().join("log.1");
        assert!(old.metadata().unwrap().len() <= MAX_FILE + 1024);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let log = Log::new(None);
        log.take(&vec![b'y'; 3 * MAX_LINE]);
        assert_eq!(log.last_lines(9).len(), 3);
    }
}
