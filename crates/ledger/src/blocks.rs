//! Entries on a volume itself: a header block, then one block for each entry, in order.
//!
//! ```text
//! block 0        "RLVLEDGR"  version u32 le  crc32c u32 le  zeroes
//! block n >= 1   "RLVENTRY"  index u64 le  number u64 le  length u16 le  text ...  zeroes  crc32c u32 le (last 4 bytes)
//! ```
//!
//! A block is written once, durably, before its entry is acknowledged; blocks of one batch are
//! written in one go, so after a crash any of them may be missing. The entries end at the first
//! block that is not valid; what lies within one batch behind it was not acknowledged and is
//! cleared when the ledger is opened, so that it can't come back later.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use relevo_export::nbd::client::{Client, NbdAddr};

use crate::{Entry, LedgerError, MAX_TEXT, book::MAX_BATCH, store::Store};

const BLOCK: usize = 4096;
const HEADER_MAGIC: &[u8; 8] = b"RLVLEDGR";
const ENTRY_MAGIC: &[u8; 8] = b"RLVENTRY";
const VERSION: u32 = 1;
const TEXT_AT: usize = 26;
const CRC_AT: usize = BLOCK - 4;
const _: () = assert!(TEXT_AT + MAX_TEXT <= CRC_AT);

/// How much is read at a time when the ledger is opened.
const READ_BLOCKS: u64 = 256;

/// Blocks that can be read and durably written.
pub(crate) trait Blocks: Send {
    /// For messages.
    fn place(&self) -> String;
    /// How many whole blocks there are.
    fn count(&self) -> u64;
    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<(), String>;
    /// On stable storage when it returns.
    fn write(&mut self, first: u64, data: &[u8]) -> Result<(), String>;
}

#[derive(Debug)]
pub(crate) struct BlockStore<B> {
    blocks: B,
    /// The first block without an entry.
    next: u64,
}

impl<B: Blocks> BlockStore<B> {
    /// Opens the ledger on the blocks, or makes one when they are blank.
    pub(crate) fn open(mut blocks: B) -> Result<(Self, Vec<Entry>), LedgerError> {
        let place = blocks.place();
        let failed = |why: String, next: &'static str| LedgerError::Open {
            place: place.clone(),
            why,
            next,
        };
        let io = |why| failed(why, "check the volume and its replicas");
        if blocks.count() < 2 {
            return Err(failed("it has no room".into(), "use a larger volume"));
        }
        let mut header = vec![0; BLOCK];
        blocks.read(0, &mut header).map_err(io)?;
        if header.iter().all(|byte| *byte == 0) {
            blocks.write(0, &encode_header()).map_err(io)?;
        } else if header != encode_header() {
            return Err(failed(
                "its first block holds something else".into(),
                "use a volume that is blank or has a ledger of this version on it",
            ));
        }
        let mut entries = Vec::new();
        let mut next = 1;
        'read: while next < blocks.count() {
            let count = READ_BLOCKS.min(blocks.count() - next);
            // At most READ_BLOCKS, which fits anywhere.
            let mut buffer = vec![0; usize::try_from(count).unwrap_or(0) * BLOCK];
            blocks.read(next, &mut buffer).map_err(io)?;
            for block in buffer.chunks_exact(BLOCK) {
                let Some(entry) = decode(block, next) else {
                    break 'read;
                };
                entries.push(entry);
                next += 1;
            }
        }
        clear_tail(&mut blocks, next).map_err(io)?;
        Ok((Self { blocks, next }, entries))
    }
}

impl<B: Blocks> Store for BlockStore<B> {
    fn append(&mut self, entries: &[Entry]) -> Result<(), LedgerError> {
        let count = entries.len() as u64;
        if self.next + count > self.blocks.count() {
            return Err(LedgerError::Full);
        }
        let data: Vec<u8> = (self.next..)
            .zip(entries)
            .flat_map(|(index, entry)| encode(entry, index))
            .collect();
        self.blocks
            .write(self.next, &data)
            .map_err(LedgerError::Failed)?;
        self.next += count;
        Ok(())
    }
}

/// Clears what a batch that was not acknowledged may have left behind the last entry.
fn clear_tail(blocks: &mut impl Blocks, next: u64) -> Result<(), String> {
    let count = (MAX_BATCH as u64).min(blocks.count() - next);
    let mut tail = vec![0; usize::try_from(count).unwrap_or(0) * BLOCK];
    blocks.read(next, &mut tail)?;
    if tail.iter().any(|byte| *byte != 0) {
        tracing::warn!("cleared blocks after block {next} that were not acknowledged");
        tail.fill(0);
        blocks.write(next, &tail)?;
    }
    Ok(())
}

fn encode_header() -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..8].copy_from_slice(HEADER_MAGIC);
    block[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let crc = crc32c::crc32c(&block[..12]);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    block
}

fn encode(entry: &Entry, index: u64) -> Vec<u8> {
    let text = entry.text.as_bytes();
    let mut block = vec![0; BLOCK];
    block[..8].copy_from_slice(ENTRY_MAGIC);
    block[8..16].copy_from_slice(&index.to_le_bytes());
    block[16..24].copy_from_slice(&entry.number.to_le_bytes());
    // Entries are checked against MAX_TEXT before they come here.
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    block[24..26].copy_from_slice(&length.to_le_bytes());
    block[TEXT_AT..TEXT_AT + text.len()].copy_from_slice(text);
    let crc = crc32c::crc32c(&block[..CRC_AT]);
    block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    block
}

fn decode(block: &[u8], index: u64) -> Option<Entry> {
    let number_at = |at: usize| Some(u64::from_le_bytes(block.get(at..at + 8)?.try_into().ok()?));
    let crc = u32::from_le_bytes(block.get(CRC_AT..)?.try_into().ok()?);
    if &block[..8] != ENTRY_MAGIC
        || crc != crc32c::crc32c(&block[..CRC_AT])
        || number_at(8)? != index
    {
        return None;
    }
    let length = usize::from(u16::from_le_bytes(block[24..26].try_into().ok()?));
    let text = block.get(TEXT_AT..TEXT_AT + length)?;
    Some(Entry {
        number: number_at(16)?,
        text: String::from_utf8(text.to_vec()).ok()?,
    })
}

/// A volume by NBD. It waits for ever: a volume that is suspended goes on some day.
pub(crate) fn nbd(address: &NbdAddr, export: &str) -> Result<impl Blocks + use<>, LedgerError> {
    let place = format!("volume at {address}");
    let client = Client::connect(address, export, None).map_err(|error| LedgerError::Open {
        place: place.clone(),
        why: error.to_string(),
        next: "check that this node is primary of the volume and exports it",
    })?;
    if client.is_read_only() {
        return Err(LedgerError::Open {
            place,
            why: "it can only be read here".into(),
            next: "run the ledger on the primary",
        });
    }
    Ok(NbdBlocks { client, place })
}

struct NbdBlocks {
    client: Client,
    place: String,
}

impl Blocks for NbdBlocks {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn count(&self) -> u64 {
        self.client.size() / BLOCK as u64
    }

    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<(), String> {
        self.client
            .read(first * BLOCK as u64, buffer)
            .map_err(|error| error.to_string())
    }

    fn write(&mut self, first: u64, data: &[u8]) -> Result<(), String> {
        self.client
            .write(first * BLOCK as u64, data, true)
            .map_err(|error| error.to_string())
    }
}

/// A block device; each write is synchronous.
pub(crate) fn device(path: &Path) -> Result<impl Blocks + use<>, LedgerError> {
    let place = format!("device {}", path.display());
    let open = || -> std::io::Result<FileBlocks> {
        let dsync = i32::try_from(rustix::fs::OFlags::DSYNC.bits()).unwrap_or(0);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(dsync)
            .open(path)?;
        // For a device the end is its size; its metadata says 0.
        let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0))?;
        Ok(FileBlocks {
            file,
            place: place.clone(),
            count: size / BLOCK as u64,
        })
    };
    open().map_err(|error| LedgerError::Open {
        place: place.clone(),
        why: error.to_string(),
        next: "check that the device exists here and may be written",
    })
}

struct FileBlocks {
    file: File,
    place: String,
    count: u64,
}

impl Blocks for FileBlocks {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn count(&self) -> u64 {
        self.count
    }

    fn read(&mut self, first: u64, buffer: &mut [u8]) -> Result<(), String> {
        self.file
            .read_exact_at(buffer, first * BLOCK as u64)
            .map_err(|error| error.to_string())
    }

    fn write(&mut self, first: u64, data: &[u8]) -> Result<(), String> {
        self.file
            .write_all_at(data, first * BLOCK as u64)
            .map_err(|error| error.to_string())
    }
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

    fn volume(blocks: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(blocks * BLOCK as u64).unwrap();
        file
    }

    fn open(
        file: &tempfile::NamedTempFile,
    ) -> Result<(BlockStore<impl Blocks + use<>>, Vec<Entry>), LedgerError> {
        BlockStore::open(device(file.path()).unwrap())
    }

    #[test]
    fn entries_survive_until_the_volume_is_full() {
        let file = volume(4);
        let (mut store, entries) = open(&file).unwrap();
        assert_eq!(entries, []);
        let long = "ü".repeat(MAX_TEXT / 2);
        store.append(&[entry(5, "a"), entry(3, &long)]).unwrap();
        assert!(matches!(
            store.append(&[entry(6, ""), entry(7, "")]),
            Err(LedgerError::Full)
        ));
        store.append(&[entry(6, "")]).unwrap();
        let (_, entries) = open(&file).unwrap();
        assert_eq!(entries, [entry(5, "a"), entry(3, &long), entry(6, "")]);
    }

    #[test]
    fn a_batch_that_was_not_acknowledged_does_not_come_back() {
        let file = volume(20);
        let (mut store, _) = open(&file).unwrap();
        store.append(&[entry(1, "kept")]).unwrap();
        drop(store);
        // Of a torn batch in blocks 2 and 3 only the second block arrived.
        file.as_file()
            .write_all_at(&encode(&entry(3, "lost"), 3), 3 * BLOCK as u64)
            .unwrap();
        let (mut store, entries) = open(&file).unwrap();
        assert_eq!(entries, [entry(1, "kept")]);
        store.append(&[entry(2, "new")]).unwrap();
        let (_, entries) = open(&file).unwrap();
        assert_eq!(entries, [entry(1, "kept"), entry(2, "new")]);
    }

    #[test]
    fn foreign_data_is_refused_and_left_alone() {
        let file = volume(4);
        file.as_file().write_all_at(b"hello", 100).unwrap();
        let error = open(&file).map(drop).unwrap_err();
        assert!(
            error.to_string().contains("holds something else"),
            "{error}"
        );
        let mut content = [0; 5];
        file.as_file().read_exact_at(&mut content, 100).unwrap();
        assert_eq!(&content, b"hello");
        assert!(open(&volume(1)).is_err());
    }

    #[test]
    fn a_flipped_bit_anywhere_is_seen() {
        let block = encode(&entry(9, "text"), 4);
        assert_eq!(decode(&block, 4), Some(entry(9, "text")));
        assert_eq!(decode(&block, 5), None);
        for at in 0..BLOCK {
            let mut flipped = block.clone();
            flipped[at] ^= 4;
            assert_eq!(decode(&flipped, 4), None, "byte {at}");
        }
    }
}
