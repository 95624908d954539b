//! A disk in memory that may lose what was not flushed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use relevo_replication::{DiskOpKind, DiskReply};
use relevo_types::ByteRange;

use crate::world::{BLOCK, Random};

type Blocks = BTreeMap<u64, Arc<[u8]>>;

/// A disk that may lose what was not flushed. Blocks that were never written are zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    /// What reads see.
    pub(crate) blocks: Blocks,
    /// What is on stable storage of the blocks that differ.
    unflushed: BTreeMap<u64, Option<Arc<[u8]>>>,
    /// Fails operations of this kind.
    pub(crate) broken: Option<&'static str>,
    /// Blocks that can't be read until they are written.
    pub(crate) bad: BTreeSet<u64>,
    /// Not even then.
    pub(crate) hopeless: bool,
    /// Nothing gets done.
    pub(crate) stalled: bool,
}

impl Disk {
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset.is_multiple_of(BLOCK as u64) && data.len().is_multiple_of(BLOCK));
        for (number, block) in (offset / BLOCK as u64..).zip(data.chunks(BLOCK)) {
            if !self.hopeless {
                self.bad.remove(&number);
            }
            let old = self.blocks.insert(number, block.into());
            self.unflushed.entry(number).or_insert(old);
        }
    }

    /// Whether an operation reads a block that can't be read.
    pub(crate) fn is_unreadable(&self, kind: &DiskOpKind) -> bool {
        let DiskOpKind::Read(range) = kind else {
            return false;
        };
        range
            .blocks_covered()
            .iter()
            .any(|block| self.bad.contains(&block))
    }

    pub(crate) fn read(&self, range: ByteRange) -> Vec<u8> {
        let mut data = Vec::new();
        for number in range.blocks_covered().iter() {
            match self.blocks.get(&number) {
                Some(block) => data.extend_from_slice(block),
                None => data.extend_from_slice(&[0; BLOCK]),
            }
        }
        data
    }

    pub(crate) fn flush(&mut self) {
        self.unflushed.clear();
    }

    /// Loses power: of what was not flushed each block may or may not be there.
    pub(crate) fn lose_power(&mut self, random: &mut Random) {
        for (number, old) in std::mem::take(&mut self.unflushed) {
            if random.one_in(2) {
                match old {
                    Some(block) => self.blocks.insert(number, block),
                    None => self.blocks.remove(&number),
                };
            }
        }
    }
}

pub(crate) fn op_name(kind: &DiskOpKind) -> &'static str {
    match kind {
        DiskOpKind::Read(_) => "read",
        DiskOpKind::Write { .. } => "write",
        DiskOpKind::Zero(_) => "zero",
        DiskOpKind::Flush => "flush",
    }
}

pub(crate) fn apply(disk: &mut Disk, kind: &DiskOpKind) -> DiskReply {
    match kind {
        DiskOpKind::Read(range) => {
            return DiskReply::Data(disk.read(*range).into());
        }
        DiskOpKind::Write { offset, data } => disk.write(*offset, data),
        DiskOpKind::Zero(range) => {
            disk.write(range.offset, &vec![0; usize::try_from(range.len).unwrap()]);
        }
        DiskOpKind::Flush => disk.flush(),
    }
    DiskReply::Done
}
