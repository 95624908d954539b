//! Append-only files of checksummed records.
//!
//! A file is a magic followed by records: length (u32), CRC-32C of length and body (u32), body
//! (postcard), all little-endian. Records of one append reach the disk by one write and one flush,
//! so a crash can tear only the end of the file: the torn end was never promised to anybody and is cut
//! off on opening. A bad record with a good one after it is no torn end but damage: the
//! file is refused, because a node that forgot what it promised must not vote.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Longest record: a cluster state of seven nodes and hundreds of services is far below.
const RECORD_LEN_MAX: usize = 16 << 20;

const HEADER_LEN: usize = 8;

/// What a [`RecordFile`] holds.
pub trait Record: Serialize + DeserializeOwned {
    /// First bytes of the file: kind and version.
    const MAGIC: [u8; 8];
}

/// An append-only file of records.
pub struct RecordFile<R> {
    path: PathBuf,
    file: File,
    len: u64,
    kind: PhantomData<fn() -> R>,
}

impl<R> fmt::Debug for RecordFile<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordFile({}, {} bytes)", self.path.display(), self.len)
    }
}

impl<R: Record> RecordFile<R> {
    /// Opens or makes the file and reads its records. A torn end is cut off.
    ///
    /// # Errors
    /// I/O, another kind of file, or damage in the middle.
    pub fn open(path: &Path) -> io::Result<(Self, Vec<R>)> {
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        if bytes.len() < R::MAGIC.len() {
            // New, or torn while it was made: nothing was promised yet.
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(&R::MAGIC)?;
            file.sync_all()?;
            sync_directory(path)?;
            let len = R::MAGIC.len() as u64;
            return Ok((
                Self {
                    path: path.to_path_buf(),
                    file,
                    len,
                    kind: PhantomData,
                },
                Vec::new(),
            ));
        }
        if !bytes.starts_with(&R::MAGIC) {
            return Err(damaged(path, "it is no file of this kind or version"));
        }
        let mut records = Vec::new();
        let mut position = R::MAGIC.len();
        while position < bytes.len() {
            let Some((record, end)) = decode(&bytes, position) else {
                if has_record_after(&bytes, position) {
                    let words =
                        format!("the record at byte {position} is bad and good ones follow");
                    return Err(damaged(path, &words));
                }
                break;
            };
            records.push(postcard::from_bytes(record).map_err(|error| {
                damaged(
                    path,
                    &format!("the record at byte {position} makes no sense: {error}"),
                )
            })?);
            position = end;
        }
        file.set_len(position as u64)?;
        file.sync_all()?;
        file.seek(SeekFrom::End(0))?;
        let len = position as u64;
        Ok((
            Self {
                path: path.to_path_buf(),
                file,
                len,
                kind: PhantomData,
            },
            records,
        ))
    }

    /// Appends records and returns when they are on stable storage. After an error the file is
    /// not usable: whether the records are there is unknown.
    ///
    /// # Errors
    /// I/O.
    pub fn append<'r>(&mut self, records: impl IntoIterator<Item = &'r R>) -> io::Result<()>
    where
        R: 'r,
    {
        self.append_unsynced(records)?;
        self.file.sync_data()
    }

    /// Appends records that may be lost in a crash.
    ///
    /// # Errors
    /// I/O.
    pub fn append_unsynced<'r>(
        &mut self,
        records: impl IntoIterator<Item = &'r R>,
    ) -> io::Result<()>
    where
        R: 'r,
    {
        let bytes = encode_all(records)?;
        self.file.write_all(&bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Replaces the whole content, atomically.
    ///
    /// # Errors
    /// I/O; then the old content is still there.
    pub fn rewrite<'r>(&mut self, records: impl IntoIterator<Item = &'r R>) -> io::Result<()>
    where
        R: 'r,
    {
        let temporary = self.path.with_extension("new");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        let mut bytes = R::MAGIC.to_vec();
        bytes.extend(encode_all(records)?);
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        sync_directory(&self.path)?;
        self.file = file;
        self.len = bytes.len() as u64;
        Ok(())
    }

    /// Size of the file in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no record was ever appended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len <= R::MAGIC.len() as u64
    }
}

fn encode_all<'r, R: Record + 'r>(records: impl IntoIterator<Item = &'r R>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for record in records {
        let body = postcard::to_stdvec(record).map_err(io::Error::other)?;
        let len = u32::try_from(body.len())
            .ok()
            .filter(|len| *len as usize <= RECORD_LEN_MAX);
        let len = len
            .ok_or_else(|| io::Error::other("a record is too long"))?
            .to_le_bytes();
        bytes.extend_from_slice(&len);
        bytes.extend_from_slice(&checksum(len, &body).to_le_bytes());
        bytes.extend_from_slice(&body);
    }
    Ok(bytes)
}

fn checksum(len: [u8; 4], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&len), body)
}

/// The body of the record at `position`, and where it ends.
fn decode(bytes: &[u8], position: usize) -> Option<(&[u8], usize)> {
    let header = bytes.get(position..position + HEADER_LEN)?;
    let len: [u8; 4] = header[..4].try_into().ok()?;
    let sum = u32::from_le_bytes(header[4..].try_into().ok()?);
    let size = u32::from_le_bytes(len) as usize;
    if size > RECORD_LEN_MAX {
        return None;
    }
    let end = position + HEADER_LEN + size;
    let body = bytes.get(position + HEADER_LEN..end)?;
    (checksum(len, body) == sum).then_some((body, end))
}

/// Whether a good record with content begins anywhere after `position`. Records of no length are
/// passed over: eight zero bytes look like one.
fn has_record_after(bytes: &[u8], position: usize) -> bool {
    (position + 1..bytes.len())
        .any(|start| decode(bytes, start).is_some_and(|(body, _)| !body.is_empty()))
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or_else(|| Path::new(".")))?.sync_all()
}

fn damaged(path: &Path, what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "{} is damaged: {what}. This node can't be trusted with a vote any more: remove it from the cluster, \
             empty its state directory and join again",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
    struct Word(String);

    impl Record for Word {
        const MAGIC: [u8; 8] = *b"RLVTEST1";
    }

    fn words(list: &[&str]) -> Vec<Word> {
        list.iter().map(|word| Word((*word).to_owned())).collect()
    }

    #[test]
    fn the_bytes_on_disk_stay_what_they_are() {
        let bytes = encode_all(&words(&["abc"])).unwrap();
        assert_eq!(bytes[..4], 4u32.to_le_bytes());
        assert_eq!(&bytes[8..], b"\x03abc");
        assert_eq!(
            bytes[4..8],
            checksum(4u32.to_le_bytes(), b"\x03abc").to_le_bytes()
        );
    }

    #[test]
    fn cut_anywhere_it_opens_with_what_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("words");
        let all = words(&["one", "two", "three"]);
        let (mut file, none) = RecordFile::<Word>::open(&path).unwrap();
        assert!(none.is_empty() && file.is_empty());
        file.append(&all).unwrap();
        drop(file);
        let whole = fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut file, found) = RecordFile::<Word>::open(&path).unwrap();
            assert_eq!(found[..], all[..found.len()], "cut at {cut}");
            // What is appended after a cut is found again.
            file.append(&words(&["more"])).unwrap();
            drop(file);
            let (_, again) = RecordFile::<Word>::open(&path).unwrap();
            assert_eq!(again.len(), found.len() + 1, "cut at {cut}");
            assert_eq!(again.last(), Some(&Word("more".to_owned())));
        }
        // Only a cut between records loses none of the ones before it.
        fs::write(&path, &whole).unwrap();
        assert_eq!(RecordFile::<Word>::open(&path).unwrap().1, all);
    }

    #[test]
    fn damage_in_the_middle_is_refused_and_at_the_end_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("words");
        let (mut file, _) = RecordFile::<Word>::open(&path).unwrap();
        file.append(&words(&["first", "second"])).unwrap();
        drop(file);
        let whole = fs::read(&path).unwrap();
        let second = 8 + HEADER_LEN + 6;
        for flip in 8..whole.len() {
            let mut bytes = whole.clone();
            bytes[flip] ^= 0x10;
            fs::write(&path, &bytes).unwrap();
            let opened = RecordFile::<Word>::open(&path);
            if flip < second {
                let words = opened.unwrap_err().to_string();
                assert!(words.contains("join again"), "{words}");
            } else {
                assert_eq!(opened.unwrap().1.len(), 1, "flip at {flip}");
            }
        }
    }

    #[test]
    fn a_rewrite_replaces_everything() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("words");
        let (mut file, _) = RecordFile::<Word>::open(&path).unwrap();
        file.append(&words(&["a", "b", "c"])).unwrap();
        file.rewrite(&words(&["d"])).unwrap();
        file.append(&words(&["e"])).unwrap();
        drop(file);
        assert_eq!(
            RecordFile::<Word>::open(&path).unwrap().1,
            words(&["d", "e"])
        );
    }

    #[test]
    fn a_foreign_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("words");
        fs::write(&path, b"something else").unwrap();
        assert!(RecordFile::<Word>::open(&path).is_err());
    }
}
