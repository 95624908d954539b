//! Files that keep what a replica of this node had of its own when it gave way: `relevo volume saved`.
//!
//! Read straight from the state directory: that works without the daemon, and after its end.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use relevo_format::saved::{Header, Reader, SavedError};
use relevo_types::{BLOCK_SIZE, BlockRange};
use serde::{Deserialize, Serialize};

/// Name of the directory within the state directory.
const SAVED_DIR: &str = "saved";

/// Where a node's files are.
#[must_use]
pub fn saved_dir(state_dir: &Path) -> PathBuf {
    state_dir.join(SAVED_DIR)
}

/// A file of saved blocks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Name of the volume; empty when the file can't be read so far.
    pub volume: String,
    /// Id of the node whose replica gave way, as in logs.
    pub node: String,
    /// Id of the node of the replica that it gave way to.
    pub gave_way_to: String,
    /// The history that gave way, in hexadecimal.
    pub lineage: String,
    /// When, in seconds since 1970.
    pub begun_unix_s: u64,
    /// Size of the volume in bytes.
    pub volume_size: u64,
    /// Blocks of 4 KiB that it has.
    pub blocks: u64,
    /// It is complete, and every checksum is right.
    pub complete: bool,
    /// What is wrong with it.
    pub trouble: Option<String>,
}

/// What was read of a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Restored {
    /// Name of the volume.
    pub volume: String,
    /// Blocks of 4 KiB.
    pub blocks: u64,
    /// Size of the volume, and of the image, in bytes.
    pub volume_size: u64,
}

/// Why a file was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is not what was saved.
    #[error("{}: {error}", path.display())]
    Saved {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: SavedError,
    },
    /// The image can't be made.
    #[error("{} can't be made: {error}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// The files of a node, or those of one volume, the oldest first. Each is read to its end.
///
/// # Errors
/// The directory can't be read; that there is none is no error.
pub fn list(state_dir: &Path, volume: Option<&str>) -> io::Result<Vec<SavedFile>> {
    let entries = match fs::read_dir(saved_dir(state_dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let file = look(&path);
        let belongs = volume.is_none_or(|volume| {
            let name = path.file_name().and_then(|name| name.to_str());
            let alike = |name: &str| name.starts_with(&format!("{volume}-"));
            file.volume == volume || (file.volume.is_empty() && name.is_some_and(alike))
        });
        if belongs {
            files.push(file);
        }
    }
    files.sort_by(|a, b| (a.begun_unix_s, &a.path).cmp(&(b.begun_unix_s, &b.path)));
    Ok(files)
}

fn look(path: &Path) -> SavedFile {
    let mut blocks = 0;
    let (header, error) = match open(path) {
        Err(error) => (None, Some(error)),
        Ok(mut reader) => {
            let error = each(&mut reader, |run, _| {
                blocks += run.count;
                Ok(())
            });
            (Some(reader.header().clone()), error.err())
        }
    };
    let of = |text: fn(&Header) -> String| header.as_ref().map(text).unwrap_or_default();
    let number = |number: fn(&Header) -> u64| header.as_ref().map_or(0, number);
    SavedFile {
        path: path.to_owned(),
        volume: of(|header| header.name.clone()),
        node: of(|header| header.node.to_string()),
        gave_way_to: of(|header| header.to.to_string()),
        lineage: of(|header| format!("{:016x}", header.lineage.0)),
        begun_unix_s: number(|header| header.unix_s),
        volume_size: number(|header| header.size),
        blocks,
        complete: error.is_none(),
        trouble: error.map(|error| error.to_string()),
    }
}

/// The runs of blocks of a file, joined where they touch.
///
/// # Errors
/// The file is not what was saved.
pub fn ranges(path: &Path) -> Result<Vec<BlockRange>, RestoreError> {
    let mut ranges: Vec<BlockRange> = Vec::new();
    let mut add = |run: BlockRange| match ranges.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => ranges.push(run),
    };
    let mut reader = open(path).map_err(|error| broken(path, error))?;
    each(&mut reader, |run, _| {
        add(run);
        Ok(())
    })
    .map_err(|error| broken(path, error))?;
    Ok(ranges)
}

/// Writes the blocks of a file at their places into a new sparse image of the volume's size. What was not
/// saved reads as zeroes there. After an error the image has the blocks before it, which are as they were.
///
/// # Errors
/// The file is not what was saved, or the image is there already or can't be written.
pub fn restore(path: &Path, image: &Path) -> Result<Restored, RestoreError> {
    let mut reader = open(path).map_err(|error| broken(path, error))?;
    let bad_image = |error| RestoreError::Image {
        path: image.to_owned(),
        error,
    };
    let out = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(image)
        .map_err(bad_image)?;
    out.set_len(reader.header().size).map_err(bad_image)?;
    let mut blocks = 0;
    let mut failed = None;
    let read = each(&mut reader, |run, data| {
        blocks += run.count;
        out.write_all_at(data, run.first * BLOCK_SIZE)
            .map_err(|error| failed = Some(error))
    });
    if let Some(error) = failed {
        return Err(bad_image(error));
    }
    out.sync_all().map_err(bad_image)?;
    read.map_err(|error| broken(path, error))?;
    Ok(Restored {
        volume: reader.header().name.clone(),
        blocks,
        volume_size: reader.header().size,
    })
}

fn open(path: &Path) -> Result<Reader<BufReader<File>>, SavedError> {
    Reader::open(BufReader::new(File::open(path)?))
}

/// Calls for every run until there are no more or `take` wants none.
fn each(
    reader: &mut Reader<BufReader<File>>,
    mut take: impl FnMut(BlockRange, &[u8]) -> Result<(), ()>,
) -> Result<(), SavedError> {
    while let Some(record) = reader.next_record()? {
        if take(record.blocks, &record.data).is_err() {
            break;
        }
    }
    Ok(())
}

fn broken(path: &Path, error: SavedError) -> RestoreError {
    RestoreError::Saved {
        path: path.to_owned(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use relevo_format::saved::Writer;
    use relevo_types::{ClusterId, LineageId, NodeId, VolumeId};

    use super::*;

    fn write(dir: &Path, name: &str, runs: &[(BlockRange, u8)]) -> PathBuf {
        let header = Header {
            cluster: ClusterId([1; 16]),
            volume: VolumeId(1),
            name: "mail".to_owned(),
            size: 1 << 20,
            node: NodeId(2),
            lineage: LineageId(255),
            to: NodeId(1),
            blocks: runs.iter().map(|(run, _)| run.count).sum(),
            unix_s: 1_700_000_000,
        };
        fs::create_dir_all(saved_dir(dir)).unwrap();
        let path = saved_dir(dir).join(name);
        let mut writer = Writer::begin(File::create(&path).unwrap(), &header).unwrap();
        for (run, fill) in runs {
            let data = vec![*fill; usize::try_from(run.count * BLOCK_SIZE).unwrap()];
            writer.add(*run, &data).unwrap();
        }
        writer.end().unwrap();
        path
    }

    #[test]
    fn saved_blocks_are_listed_and_put_at_their_places() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(list(dir.path(), None).unwrap(), []);
        let runs = [
            (BlockRange::new(1, 1), 7),
            (BlockRange::new(2, 1), 8),
            (BlockRange::new(200, 2), 9),
        ];
        let path = write(dir.path(), "mail-x.saved", &runs);
        let files = list(dir.path(), Some("mail")).unwrap();
        assert_eq!(files.len(), 1);
        let file = &files[0];
        assert_eq!((file.blocks, file.complete), (4, true));
        assert_eq!((&file.node[..], &file.gave_way_to[..]), ("n2", "n1"));
        assert_eq!(list(dir.path(), Some("web")).unwrap(), []);
        assert_eq!(
            ranges(&path).unwrap(),
            [BlockRange::new(1, 2), BlockRange::new(200, 2)]
        );

        let image = dir.path().join("image");
        let restored = restore(&path, &image).unwrap();
        assert_eq!((restored.blocks, restored.volume_size), (4, 1 << 20));
        let mut expected = vec![0; 1 << 20];
        for (run, fill) in runs {
            let bytes = run.bytes();
            let at = usize::try_from(bytes.offset).unwrap();
            expected[at..at + usize::try_from(bytes.len).unwrap()].fill(fill);
        }
        assert!(fs::read(&image).unwrap() == expected);
        // What is there is never written over.
        let error = restore(&path, &image).unwrap_err();
        assert!(matches!(error, RestoreError::Image { .. }), "{error}");
    }

    #[test]
    fn a_damaged_file_is_listed_as_such_and_read_up_to_there() {
        let dir = tempfile::tempdir().unwrap();
        let runs = [(BlockRange::new(0, 1), 7), (BlockRange::new(9, 1), 8)];
        let path = write(dir.path(), "mail-x.saved", &runs);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 100;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        fs::write(saved_dir(dir.path()).join("mail-y.saved"), "nonsense").unwrap();
        let files = list(dir.path(), Some("mail")).unwrap();
        let troubles: Vec<&str> = files
            .iter()
            .map(|file| file.trouble.as_deref().unwrap())
            .collect();
        assert_eq!(
            troubles,
            [
                "it is no file of saved blocks",
                "it is damaged at byte 8224: the checksum of its blocks is wrong"
            ]
        );
        let image = dir.path().join("image");
        let error = restore(&path, &image).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
        assert_eq!(fs::read(&image).unwrap()[0], 7);
        assert!(ranges(&path).is_err());
    }
}
