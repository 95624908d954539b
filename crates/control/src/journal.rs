//! Append-only files of checksummed records.
//!
//! A file is a magic followed by frames: length (u32), CRC-32C of length and body (u32), body (the
//! records of one append, postcard), all little-endian. A frame is on stable storage before the
//! next one is written, so a crash can tear only the last: it was never promised to anybody and is cut
//! off on opening. A bad frame with a good one after it is no torn end but damage: the file is
//! refused, because a node that forgot what it promised must not vote.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Longest frame: a whole log with a cluster state of seven nodes and hundreds of services is far
/// below.
const FRAME_LEN_MAX: usize = 16 << 20;

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
    /// A write or flush failed: what is on the disk is unknown, and nothing may follow it.
    broken: bool,
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
        let mut records = Vec::new();
        let position = if bytes.len() < R::MAGIC.len() {
            // New, or torn while it was made: nothing was promised yet.
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(&R::MAGIC)?;
            sync_directory(path)?;
            R::MAGIC.len()
        } else {
            let position = read_frames(path, &bytes, &mut records)?;
            file.set_len(position as u64)?;
            position
        };
        file.sync_all()?;
        file.seek(SeekFrom::End(0))?;
        let file = Self {
            path: path.to_path_buf(),
            file,
            len: position as u64,
            broken: false,
            kind: PhantomData,
        };
        Ok((file, records))
    }

    /// Appends records, all of them or none, and returns when they are on stable storage. After
    /// an error the file takes nothing more: a failed flush is a failed disk.
    ///
    /// # Errors
    /// I/O, or an error before.
    pub fn append(&mut self, records: &[R]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(format!(
                "{} failed before; what it holds is known only after a restart",
                self.path.display()
            )));
        }
        let frame = encode(records)?;
        // Until the flush is known to have worked.
        self.broken = true;
        self.file.write_all(&frame)?;
        self.file.sync_data()?;
        self.broken = false;
        self.len += frame.len() as u64;
        Ok(())
    }

    /// Replaces the whole content, atomically.
    ///
    /// # Errors
    /// I/O; then the old content is still there.
    pub fn rewrite(&mut self, records: &[R]) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        let mut bytes = R::MAGIC.to_vec();
        bytes.extend(encode(records)?);
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

/// Reads the records of all good frames; gives where they end.
fn read_frames<R: Record>(path: &Path, bytes: &[u8], records: &mut Vec<R>) -> io::Result<usize> {
    if !bytes.starts_with(&R::MAGIC) {
        return Err(damaged(path, "it is no file of this kind or version"));
    }
    let mut position = R::MAGIC.len();
    while position < bytes.len() {
        let Some((body, end)) = decode(bytes, position) else {
            if has_frame_after(bytes, position) {
                let words =
                    format!("what stands at byte {position} is bad and good records follow");
                return Err(damaged(path, &words));
            }
            break;
        };
        let frame: Vec<R> = postcard::from_bytes(body).map_err(|error| {
            damaged(
                path,
                &format!("what stands at byte {position} makes no sense: {error}"),
            )
        })?;
        records.extend(frame);
        position = end;
    }
    Ok(position)
}

/// One frame of records.
fn encode<R: Record>(records: &[R]) -> io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(records).map_err(io::Error::other)?;
    let len = u32::try_from(body.len())
        .ok()
        .filter(|len| *len as usize <= FRAME_LEN_MAX)
        .ok_or_else(|| io::Error::other("the records are too long for one frame"))?
        .to_le_bytes();
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    bytes.extend_from_slice(&len);
    bytes.extend_from_slice(&checksum(len, &body).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn checksum(len: [u8; 4], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&len), body)
}

/// The body of the frame at `position`, and where it ends.
fn decode(bytes: &[u8], position: usize) -> Option<(&[u8], usize)> {
    let header = bytes.get(position..position + HEADER_LEN)?;
    let len: [u8; 4] = header[..4].try_into().ok()?;
    let sum = u32::from_le_bytes(header[4..].try_into().ok()?);
    let size = u32::from_le_bytes(len) as usize;
    if size > FRAME_LEN_MAX {
        return None;
    }
    let end = position + HEADER_LEN + size;
    let body = bytes.get(position + HEADER_LEN..end)?;
    (checksum(len, body) == sum).then_some((body, end))
}

/// Whether a good frame begins anywhere after `position`.
fn has_frame_after(bytes: &[u8], position: usize) -> bool {
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
        let bytes = encode(&words(&["abc"])).unwrap();
        assert_eq!(bytes, b"\x05\0\0\0\x80\x06\x08\x9d\x01\x03abc");
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
        // One append is there whole or not at all.
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(RecordFile::<Word>::open(&path).unwrap().1.is_empty());
        fs::write(&path, &whole).unwrap();
        assert_eq!(RecordFile::<Word>::open(&path).unwrap().1, all);
    }

    #[test]
    fn damage_in_the_middle_is_refused_and_at_the_end_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("words");
        let (mut file, _) = RecordFile::<Word>::open(&path).unwrap();
        file.append(&words(&["first"])).unwrap();
        file.append(&words(&["second"])).unwrap();
        drop(file);
        let whole = fs::read(&path).unwrap();
        let second = 8 + HEADER_LEN + 7;
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
    fn after_a_failure_nothing_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let (mut file, _) = RecordFile::<Word>::open(&directory.path().join("words")).unwrap();
        // A descriptor that can't be written stands for a disk that fails.
        file.file = File::open("/dev/null").unwrap();
        assert!(file.append(&words(&["a"])).is_err());
        file.file = File::create(directory.path().join("good")).unwrap();
        assert!(
            file.append(&words(&["b"]))
                .unwrap_err()
                .to_string()
                .contains("restart")
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
