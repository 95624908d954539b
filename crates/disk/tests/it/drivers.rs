//! The two drivers against real files.

use std::{fs, os::unix::fs::MetadataExt as _, process::Command};

use bytes::Bytes;
use relevo_disk::{Backing, DriverKind, IoMode, OpenError, OpenOptions};
use relevo_replication::io::{DiskOpKind, DiskReply};
use relevo_types::ByteRange;

use crate::support::{Disk, dir, file, kinds, open, pattern};

const MIB: usize = 1 << 20;

fn each(test: &str, mut check: impl FnMut(DriverKind, bool)) {
    for kind in kinds(test) {
        for buffered in [false, true] {
            check(kind, buffered);
        }
    }
}

fn data(reply: Result<DiskReply, relevo_replication::DiskError>) -> Bytes {
    match reply {
        Ok(DiskReply::Data(data)) => data,
        other => panic!("{other:?}"),
    }
}

fn read(offset: usize, len: usize) -> DiskOpKind {
    DiskOpKind::Read(ByteRange::new(offset as u64, len as u64))
}

#[test]
fn what_is_written_is_read_and_lasts() {
    each("what_is_written_is_read_and_lasts", |kind, buffered| {
        let dir = dir();
        let path = file(dir.path(), 4 * MIB);
        let backing = open(&path, buffered);
        if !buffered && *backing.mode() != IoMode::Direct {
            said::skip(
                "what_is_written_is_read_and_lasts, direct",
                "not on this filesystem",
            );
        }
        let mut disk = Disk::new(kind, backing);
        let mut expected = pattern(4 * MIB);
        // A slice that starts at an odd address: the driver must align it.
        let odd = Bytes::from(vec![9; MIB + 4097]).slice(1..=MIB + 4096 - 4096);
        for (offset, data) in [(8192, odd), (3 * MIB, Bytes::from(vec![8; 4096]))] {
            expected[offset..offset + data.len()].copy_from_slice(&data);
            let offset = offset as u64;
            let write = DiskOpKind::Write { offset, data };
            assert_eq!(disk.run(write), Ok(DiskReply::Done), "{kind} {buffered}");
        }
        assert_eq!(disk.run(DiskOpKind::Flush), Ok(DiskReply::Done));
        assert_eq!(data(disk.run(read(0, 4 * MIB))), expected);
        assert_eq!(data(disk.run(read(4096, 8192))), expected[4096..12288]);
        assert_eq!(data(disk.run(read(0, 0))), Bytes::new());
        drop(disk);
        assert_eq!(fs::read(&path).unwrap(), expected);
    });
}

#[test]
fn many_operations_at_once_complete_once_each() {
    each("many_operations_at_once", |kind, buffered| {
        const BLOCKS: usize = 1000;
        let dir = dir();
        let path = file(dir.path(), BLOCKS * 4096);
        let mut disk = Disk::new(kind, open(&path, buffered));
        // More than the ring holds; a long read first, so that later ones can overtake it.
        let mut ops = vec![disk.start(read(0, BLOCKS * 4096))];
        for block in 0..BLOCKS {
            if block % 3 == 0 {
                let fill = (block % 250) as u8;
                ops.push(disk.start(DiskOpKind::Write {
                    offset: (block * 4096) as u64,
                    data: vec![fill; 4096].into(),
                }));
            } else {
                ops.push(disk.start(read(block * 4096, 4096)));
            }
        }
        let original = pattern(BLOCKS * 4096);
        for (i, op) in ops.iter().enumerate().skip(1).rev() {
            let block = i - 1;
            match disk.wait(*op).unwrap() {
                DiskReply::Data(data) => {
                    assert_eq!(data, original[block * 4096..][..4096], "block {block}");
                }
                DiskReply::Done => assert_eq!(block % 3, 0),
            }
        }
        assert_eq!(data(disk.wait(ops[0])).len(), BLOCKS * 4096);
        assert_eq!(disk.order.len(), ops.len());
        let after = data(disk.run(read(0, BLOCKS * 4096)));
        for block in (0..BLOCKS).step_by(3) {
            assert!(
                after[block * 4096..][..4096]
                    .iter()
                    .all(|b| *b == (block % 250) as u8)
            );
        }
    });
}

#[test]
fn a_dropped_driver_leaves_no_operation_behind() {
    each(
        "a_dropped_driver_leaves_no_operation_behind",
        |kind, buffered| {
            let dir = dir();
            let path = file(dir.path(), 8 * MIB);
            let mut disk = Disk::new(kind, open(&path, buffered));
            let first = disk.start(read(0, 4096));
            for i in 0..64 {
                disk.start(read(i * 65536, 65536));
            }
            assert!(disk.wait(first).is_ok());
            drop(disk);
            // The lock is free at once.
            drop(open(&path, buffered));
        },
    );
}

#[test]
fn zeroing_releases_storage() {
    each("zeroing_releases_storage", |kind, buffered| {
        let dir = dir();
        let path = file(dir.path(), 4 * MIB);
        fs::File::open(&path).unwrap().sync_all().unwrap();
        let before = fs::metadata(&path).unwrap().blocks();
        let mut disk = Disk::new(kind, open(&path, buffered));
        let range = ByteRange::new(MIB as u64, 2 * MIB as u64);
        assert_eq!(disk.run(DiskOpKind::Zero(range)), Ok(DiskReply::Done));
        assert_eq!(disk.run(DiskOpKind::Flush), Ok(DiskReply::Done));
        let mut expected = pattern(4 * MIB);
        expected[MIB..3 * MIB].fill(0);
        assert_eq!(data(disk.run(read(0, 4 * MIB))), expected);
        drop(disk);
        let after = fs::metadata(&path).unwrap();
        assert_eq!(after.len(), 4 * MIB as u64, "the size stays");
        assert!(
            after.blocks() + (MIB as u64 / 512) < before,
            "{} of {before} sectors are left",
            after.blocks()
        );
    });
}

#[test]
fn what_is_outside_or_misaligned_is_refused() {
    each(
        "what_is_outside_or_misaligned_is_refused",
        |kind, buffered| {
            let dir = dir();
            let path = file(dir.path(), MIB);
            let mut disk = Disk::new(kind, open(&path, buffered));
            let error = disk.run(read(MIB - 4096, 8192)).unwrap_err();
            assert_eq!(error.what, "read");
            assert!(error.reason.contains("past the end"), "{error}");
            assert!(disk.run(read(usize::MAX - 4095, 8192)).is_err());
            let beyond = DiskOpKind::Write {
                offset: MIB as u64,
                data: vec![1; 4096].into(),
            };
            assert_eq!(disk.run(beyond).unwrap_err().what, "write");
            assert_eq!(fs::metadata(&path).unwrap().len(), MIB as u64);
            if !buffered {
                let error = disk.run(read(100, 4096)).unwrap_err();
                assert!(error.reason.contains("aligned"), "{error}");
            }
            // A file that was cut behind our back: short, not zeroes.
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(8192)
                .unwrap();
            let error = disk.run(read(4096, 8192)).unwrap_err();
            assert!(error.reason.contains("truncated"), "{error}");
            assert!(disk.run(read(0, 4096)).is_ok(), "the driver lives");
        },
    );
}

#[test]
fn a_read_only_backing_fails_writes() {
    each("a_read_only_backing_fails_writes", |kind, buffered| {
        let dir = dir();
        let path = file(dir.path(), MIB);
        let options = OpenOptions {
            read_only: true,
            buffered,
        };
        let mut disk = Disk::new(kind, Backing::open(&path, &options).unwrap());
        let write = DiskOpKind::Write {
            offset: 0,
            data: vec![1; 4096].into(),
        };
        assert_eq!(disk.run(write).unwrap_err().what, "write");
        let zero = DiskOpKind::Zero(ByteRange::new(0, 4096));
        assert_eq!(disk.run(zero).unwrap_err().what, "zero");
        assert!(disk.run(read(0, 4096)).is_ok());
    });
}

/// A tmpfs of 1 MiB, unmounted when dropped.
struct SmallFilesystem(tempfile::TempDir);

impl SmallFilesystem {
    fn mount() -> Result<Self, String> {
        let dir = dir();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "relevo-test"])
            .arg(dir.path())
            .output()
            .map_err(|error| error.to_string())?;
        if mount.status.success() {
            Ok(Self(dir))
        } else {
            Err(String::from_utf8_lossy(&mount.stderr).into_owned())
        }
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

#[test]
fn a_full_filesystem_is_an_error_with_its_reason() {
    let small = match SmallFilesystem::mount() {
        Ok(small) => small,
        Err(why) => return said::skip("a_full_filesystem_is_an_error_with_its_reason", &why),
    };
    let path = small.0.path().join("backing");
    each("a_full_filesystem", |kind, buffered| {
        let sparse = fs::File::create(&path).unwrap();
        sparse.set_len(4 * MIB as u64).unwrap();
        drop(sparse);
        let mut disk = Disk::new(kind, open(&path, buffered));
        let write = DiskOpKind::Write {
            offset: 0,
            data: vec![1; 4 * MIB].into(),
        };
        let error = disk.run(write).unwrap_err();
        assert!(error.reason.contains("No space left"), "{error}");
        assert!(disk.run(read(0, 4096)).is_ok());
    });
}

#[test]
fn one_daemon_per_backing() {
    let dir = dir();
    let path = file(dir.path(), MIB);
    let first = open(&path, false);
    let error = Backing::open(&path, &OpenOptions::default()).unwrap_err();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    drop(first);
    drop(open(&path, false));
    let missing = Backing::open(&dir.path().join("none"), &OpenOptions::default()).unwrap_err();
    assert!(matches!(missing, OpenError::Missing { .. }), "{missing}");
    let kind = Backing::open(dir.path(), &OpenOptions::default()).unwrap_err();
    assert!(matches!(kind, OpenError::WrongKind { .. }), "{kind}");
}
