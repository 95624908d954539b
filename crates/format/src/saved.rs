//! What a replica had of its own when it gave way to another history, kept in a file.
//!
//! A header block says whose it is; records hold runs of blocks; a trailer ends the file, and without it
//! the file is incomplete. Header, records, their data and the trailer each carry a CRC-32C, and everything
//! after the header carries that of the header, so that nothing of another file is ever taken for a part
//! of this one. `docs/formats.md` has the byte tables.

use std::io::{self, Read, Write};

use relevo_types::{BLOCK_SIZE, BlockRange, ClusterId, LineageId, NodeId, VolumeId};

use crate::{
    META_BLOCK,
    bytes::{get, get_u32, get_u64, is_sealed, put_u32, put_u64, seal},
};

/// The most blocks in one record, 4 MiB: what a reader has in memory at once.
pub const RECORD_BLOCKS_MAX: u64 = 1024;

/// The longest name of a volume, in bytes; a longer one is cut.
pub const NAME_MAX: usize = 255;

const MAGIC: [u8; 8] = *b"RELEVOSV";
const VERSION: u32 = 1;
const VERSION_AT: usize = 8;
const CRC_AT: usize = 12;
const CLUSTER_AT: usize = 16;
const VOLUME_AT: usize = 32;
const NODE_AT: usize = 36;
const TO_AT: usize = 40;
const NAME_LEN_AT: usize = 44;
const LINEAGE_AT: usize = 48;
const SIZE_AT: usize = 56;
const BLOCKS_AT: usize = 64;
const UNIX_S_AT: usize = 72;
const NAME_AT: usize = 80;

/// Bytes of a record before its data, and of the trailer.
const RECORD: usize = 32;
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"RLSR");
const END_MAGIC: u32 = u32::from_le_bytes(*b"RLSE");
const RECORD_CRC_AT: usize = 4;
const TAG_AT: usize = 8;
const DATA_CRC_AT: usize = 12;
const FIRST_AT: usize = 16;
const COUNT_AT: usize = 24;

/// Whose blocks a file has, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// Its name when the file was made.
    pub name: String,
    /// Size of the volume in bytes, a multiple of [`BLOCK_SIZE`].
    pub size: u64,
    /// The node whose replica gave way.
    pub node: NodeId,
    /// The history that gave way.
    pub lineage: LineageId,
    /// The node of the replica that it gave way to.
    pub to: NodeId,
    /// How many blocks the file has.
    pub blocks: u64,
    /// When it was begun, in seconds since 1970.
    pub unix_s: u64,
}

/// A run of blocks as it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Which.
    pub blocks: BlockRange,
    /// Their bytes.
    pub data: Vec<u8>,
}

/// Why a file is not what was saved.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It can't be read.
    #[error("it can't be read: {0}")]
    Io(#[from] io::Error),
    /// Something else.
    #[error("it is no file of saved blocks")]
    Foreign,
    /// Of a later version.
    #[error("it has format version {0}; this program reads version 1, use a newer one")]
    Version(u32),
    /// It ends too early.
    #[error("it is incomplete: it ends at byte {at}, after {blocks} blocks")]
    Incomplete {
        /// Where it ends.
        at: u64,
        /// Blocks before that.
        blocks: u64,
    },
    /// It was altered, or the medium is bad.
    #[error("it is damaged at byte {at}: {what}")]
    Damaged {
        /// Where the part begins that is not as it was written.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
}

impl Header {
    /// The first block of a file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut name = self.name.as_str();
        while name.len() > NAME_MAX {
            name = &name[..name.floor_char_boundary(name.len() - 1)];
        }
        let mut block = vec![0; META_BLOCK];
        block[..MAGIC.len()].copy_from_slice(&MAGIC);
        put_u32(&mut block, VERSION_AT, VERSION);
        block[CLUSTER_AT..VOLUME_AT].copy_from_slice(&self.cluster.0);
        put_u32(&mut block, VOLUME_AT, self.volume.0);
        put_u32(&mut block, NODE_AT, self.node.0);
        put_u32(&mut block, TO_AT, self.to.0);
        let len = u32::try_from(name.len()).unwrap_or(0);
        put_u32(&mut block, NAME_LEN_AT, len);
        put_u64(&mut block, LINEAGE_AT, self.lineage.0);
        put_u64(&mut block, SIZE_AT, self.size);
        put_u64(&mut block, BLOCKS_AT, self.blocks);
        put_u64(&mut block, UNIX_S_AT, self.unix_s);
        block[NAME_AT..NAME_AT + name.len()].copy_from_slice(name.as_bytes());
        seal(&mut block, CRC_AT);
        block
    }

    /// Reads the first block of a file.
    ///
    /// # Errors
    /// See [`SavedError`].
    pub fn decode(block: &[u8]) -> Result<Self, SavedError> {
        let damaged = |what| Err(SavedError::Damaged { at: 0, what });
        if block.len() != META_BLOCK || !block.starts_with(&MAGIC) {
            return Err(SavedError::Foreign);
        }
        let version = get_u32(block, VERSION_AT);
        if version != VERSION {
            return Err(SavedError::Version(version));
        }
        if !is_sealed(block, CRC_AT) {
            return damaged("the checksum of its header is wrong");
        }
        let len = usize::try_from(get_u32(block, NAME_LEN_AT)).unwrap_or(usize::MAX);
        let name = block[NAME_AT..]
            .get(..len)
            .filter(|name| name.len() <= NAME_MAX)
            .and_then(|name| std::str::from_utf8(name).ok());
        let Some(name) = name else {
            return damaged("the name in its header is no name");
        };
        let header = Self {
            cluster: ClusterId(get(block, CLUSTER_AT).unwrap_or_default()),
            volume: VolumeId(get_u32(block, VOLUME_AT)),
            name: name.to_owned(),
            size: get_u64(block, SIZE_AT),
            node: NodeId(get_u32(block, NODE_AT)),
            lineage: LineageId(get_u64(block, LINEAGE_AT)),
            to: NodeId(get_u32(block, TO_AT)),
            blocks: get_u64(block, BLOCKS_AT),
            unix_s: get_u64(block, UNIX_S_AT),
        };
        if !header.size.is_multiple_of(BLOCK_SIZE) || header.blocks > header.size / BLOCK_SIZE {
            return damaged("the size in its header is out of range");
        }
        Ok(header)
    }
}

/// Writes a file.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    tag: u32,
    blocks: u64,
    records: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// It can't be written.
    pub fn begin(mut out: W, header: &Header) -> io::Result<Self> {
        let block = header.encode();
        out.write_all(&block)?;
        Ok(Self {
            out,
            tag: get_u32(&block, CRC_AT),
            blocks: 0,
            records: 0,
        })
    }

    /// Adds whole blocks.
    ///
    /// # Errors
    /// It can't be written, or `data` is not the content of `blocks`.
    pub fn add(&mut self, blocks: BlockRange, data: &[u8]) -> io::Result<()> {
        let len = blocks.count.checked_mul(BLOCK_SIZE);
        if len != u64::try_from(data.len()).ok() {
            return Err(io::Error::other("the blocks and their content differ"));
        }
        let mut first = blocks.first;
        let most = usize::try_from(RECORD_BLOCKS_MAX * BLOCK_SIZE).unwrap_or(usize::MAX);
        for data in data.chunks(most) {
            let count = data.len() as u64 / BLOCK_SIZE;
            let head = self.part(RECORD_MAGIC, crc32c::crc32c(data), [first, count]);
            self.out.write_all(&head)?;
            self.out.write_all(data)?;
            self.blocks += count;
            self.records += 1;
            first += count;
        }
        Ok(())
    }

    /// Writes the trailer. The caller makes the file durable.
    ///
    /// # Errors
    /// It can't be written.
    pub fn end(mut self) -> io::Result<W> {
        let trailer = self.part(END_MAGIC, 0, [self.blocks, self.records]);
        self.out.write_all(&trailer)?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Where it is written to.
    #[must_use]
    pub const fn out(&self) -> &W {
        &self.out
    }

    fn part(&self, magic: u32, data_crc: u32, numbers: [u64; 2]) -> [u8; RECORD] {
        let mut part = [0; RECORD];
        put_u32(&mut part, 0, magic);
        put_u32(&mut part, TAG_AT, self.tag);
        put_u32(&mut part, DATA_CRC_AT, data_crc);
        put_u64(&mut part, FIRST_AT, numbers[0]);
        put_u64(&mut part, COUNT_AT, numbers[1]);
        seal(&mut part, RECORD_CRC_AT);
        part
    }
}

/// Reads a file from its beginning to its end and checks everything.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    header: Header,
    tag: u32,
    at: u64,
    blocks: u64,
    records: u64,
    next: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// See [`SavedError`].
    pub fn open(mut input: R) -> Result<Self, SavedError> {
        let mut block = vec![0; META_BLOCK];
        let read = fill(&mut input, &mut block)?;
        if read < META_BLOCK && block.starts_with(&MAGIC) {
            return Err(SavedError::Incomplete {
                at: read as u64,
                blocks: 0,
            });
        }
        let header = Header::decode(&block)?;
        Ok(Self {
            input,
            header,
            tag: get_u32(&block, CRC_AT),
            at: META_BLOCK as u64,
            blocks: 0,
            records: 0,
            next: 0,
            ended: false,
        })
    }

    /// Whose blocks they are.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The next run of blocks, ascending; `None` after the last one of a complete file.
    ///
    /// # Errors
    /// See [`SavedError`]. What came before the error is as it was saved.
    pub fn next_record(&mut self) -> Result<Option<Record>, SavedError> {
        if self.ended {
            return Ok(None);
        }
        let mut part = [0; RECORD];
        self.read(&mut part)?;
        if !is_sealed(&part, RECORD_CRC_AT) || get_u32(&part, TAG_AT) != self.tag {
            return self.damaged("what is there is no part of this file");
        }
        let (first, count) = (get_u64(&part, FIRST_AT), get_u64(&part, COUNT_AT));
        match get_u32(&part, 0) {
            RECORD_MAGIC => {
                let record = self.record(BlockRange { first, count }, &part)?;
                Ok(Some(record))
            }
            END_MAGIC => {
                let announced = (first, first, count);
                if announced != (self.blocks, self.header.blocks, self.records) {
                    return self.damaged("parts of it are missing");
                }
                if fill(&mut self.input, &mut [0])? > 0 {
                    self.at += RECORD as u64;
                    return self.damaged("something follows its end");
                }
                self.ended = true;
                Ok(None)
            }
            _ => self.damaged("what is there is no part of this file"),
        }
    }

    fn record(&mut self, blocks: BlockRange, part: &[u8]) -> Result<Record, SavedError> {
        let all = self.header.size / BLOCK_SIZE;
        let end = blocks.first.checked_add(blocks.count);
        let fits = (1..=RECORD_BLOCKS_MAX).contains(&blocks.count)
            && blocks.first >= self.next
            && end.is_some_and(|end| end <= all);
        if !fits {
            return self.damaged("the place of its blocks is out of range");
        }
        let len = usize::try_from(blocks.count * BLOCK_SIZE).unwrap_or(0);
        let mut data = vec![0; len];
        let from = self.at;
        self.at += RECORD as u64;
        self.read(&mut data)?;
        if crc32c::crc32c(&data) != get_u32(part, DATA_CRC_AT) {
            return Err(SavedError::Damaged {
                at: from,
                what: "the checksum of its blocks is wrong",
            });
        }
        self.at += len as u64;
        self.blocks += blocks.count;
        self.records += 1;
        self.next = blocks.end();
        Ok(Record { blocks, data })
    }

    fn read(&mut self, into: &mut [u8]) -> Result<(), SavedError> {
        let read = fill(&mut self.input, into)?;
        if read == into.len() {
            return Ok(());
        }
        Err(SavedError::Incomplete {
            at: self.at + read as u64,
            blocks: self.blocks,
        })
    }

    const fn damaged<T>(&self, what: &'static str) -> Result<T, SavedError> {
        Err(SavedError::Damaged { at: self.at, what })
    }
}

/// Reads until the buffer is full or the input ends; returns how much there was.
fn fill(input: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match input.read(&mut into[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

const _: () = assert!(NAME_AT + NAME_MAX <= META_BLOCK);
