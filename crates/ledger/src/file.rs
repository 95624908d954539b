//! Entries in a file: one line each, `<crc32c of the rest in hex> <number> <text as JSON>`.
//!
//! The file is only ever appended to, and flushed before an entry is acknowledged. After a crash
//! its end may be torn: whatever was not acknowledged lies in the last batch, so bad bytes within one
//! batch of the end are dropped, and bad bytes before that are damage.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
};

use rustix::fs::FlockOperation;

use crate::{Entry, LedgerError, book::MAX_BATCH, store::Store};

const FILE_NAME: &str = "entries.log";

/// The longest line: a text whose every byte is escaped as `\u00XX`, and the rest.
const MAX_LINE: usize = 6 * crate::MAX_TEXT + 64;

/// The most that one batch writes.
const MAX_TORN: usize = MAX_BATCH * MAX_LINE;

#[derive(Debug)]
pub(crate) struct FileStore {
    file: File,
    /// The end of the last whole line.
    length: u64,
}

impl FileStore {
    /// Opens or makes the file in `directory` and reads it; a torn end is cut off.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Vec<Entry>), LedgerError> {
        let path = directory.join(FILE_NAME);
        let failed = |why: String, next: &'static str| LedgerError::Open {
            place: format!("file {}", path.display()),
            why,
            next,
        };
        let check = "check that the directory exists, can be written and its disk works";
        let io = |error: std::io::Error| failed(error.to_string(), check);
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(io)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            failed(
                format!("another program holds it ({error})"),
                "end the other ledger",
            )
        })?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(io)?;
        let (entries, length) = read_lines(&content);
        let torn = content.len() - length;
        if torn > MAX_TORN {
            return Err(failed(
                format!("it is damaged at byte {length}, {torn} bytes before its end"),
                "restore it from a backup, or cut it there by hand and lose what follows",
            ));
        }
        let length = length as u64;
        if torn > 0 {
            tracing::warn!(
                "dropped {torn} bytes that were not acknowledged from {}",
                path.display()
            );
            file.set_len(length).map_err(io)?;
        }
        file.seek(SeekFrom::End(0)).map_err(io)?;
        // The file's own entry, and a cut end, must be as lasting as the entries.
        file.sync_all().map_err(io)?;
        fs::File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io)?;
        Ok((Self { file, length }, entries))
    }
}

impl Store for FileStore {
    fn append(&mut self, entries: &[Entry]) -> Result<(), LedgerError> {
        let lines: String = entries.iter().map(line).collect();
        let fatal = |error: std::io::Error| LedgerError::Failed(error.to_string());
        if let Err(error) = self.file.write_all(lines.as_bytes()) {
            if error.kind() == std::io::ErrorKind::StorageFull {
                self.file.set_len(self.length).map_err(fatal)?;
                return Err(LedgerError::Full);
            }
            return Err(fatal(error));
        }
        self.file.sync_data().map_err(fatal)?;
        self.length += lines.len() as u64;
        Ok(())
    }
}

fn line(entry: &Entry) -> String {
    // A JSON string holds no line end, whatever the text holds.
    let text = serde_json::Value::from(entry.text.as_str());
    let rest = format!("{} {text}", entry.number);
    format!("{:08x} {rest}\n", crc32c::crc32c(rest.as_bytes()))
}

/// The entries up to the first bad line, and where that begins.
fn read_lines(content: &[u8]) -> (Vec<Entry>, usize) {
    let mut entries = Vec::new();
    let mut good = 0;
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        let Some(entry) = read_line(line) else { break };
        entries.push(entry);
        good += line.len();
    }
    (entries, good)
}

fn read_line(line: &[u8]) -> Option<Entry> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, rest) = line.split_once(' ')?;
    if u32::from_str_radix(sum, 16).ok()? != crc32c::crc32c(rest.as_bytes()) {
        return None;
    }
    let (number, text) = rest.split_once(' ')?;
    Some(Entry {
        number: number.parse().ok()?,
        text: serde_json::from_str(text).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u64, text: &str) -> Entry {
        Entry {
            number,
            text: text.to_owned(),
        }
    }

    #[test]
    fn entries_survive_and_a_torn_end_at_any_byte_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let first = [entry(1, "one\nline"), entry(7, "ü \"quoted\"")];
        {
            let (mut store, entries) = FileStore::open(directory.path()).unwrap();
            assert_eq!(entries, []);
            store.append(&first).unwrap();
            let error = FileStore::open(directory.path()).unwrap_err();
            assert!(error.to_string().contains("another program"), "{error}");
        }
        let path = directory.path().join(FILE_NAME);
        let whole = fs::read(&path).unwrap();
        let torn = line(&entry(8, "never acknowledged"));
        for cut in 1..torn.len() {
            let mut content = whole.clone();
            content.extend_from_slice(&torn.as_bytes()[..cut]);
            fs::write(&path, &content).unwrap();
            let (mut store, entries) = FileStore::open(directory.path()).unwrap();
            assert_eq!(entries, first, "cut after {cut}");
            store.append(&[entry(8, "again")]).unwrap();
            drop(store);
            let (_, entries) = FileStore::open(directory.path()).unwrap();
            assert_eq!(entries.last(), Some(&entry(8, "again")));
        }
    }

    #[test]
    fn damage_far_from_the_end_is_not_dropped_in_silence() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = FileStore::open(directory.path()).unwrap();
        let long = "x".repeat(crate::MAX_TEXT);
        let count = MAX_TORN / crate::MAX_TEXT + 10;
        for number in 0..count as u64 {
            store
                .file
                .write_all(line(&entry(number, &long)).as_bytes())
                .unwrap();
        }
        drop(store);
        let path = directory.path().join(FILE_NAME);
        let mut content = fs::read(&path).unwrap();
        content[100] ^= 1;
        fs::write(&path, &content).unwrap();
        let error = FileStore::open(directory.path()).unwrap_err();
        assert!(error.to_string().contains("damaged at byte 0"), "{error}");
        assert_eq!(fs::read(&path).unwrap().len(), content.len());
    }

    #[test]
    fn the_longest_line_is_bounded() {
        let worst = entry(u64::MAX, &"\u{1}".repeat(crate::MAX_TEXT));
        assert!(line(&worst).len() <= MAX_LINE);
        assert_eq!(read_line(line(&worst).as_bytes()), Some(worst));
    }
}
