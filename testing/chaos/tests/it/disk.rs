//! Each fault does what it says, and nothing else.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    sync::mpsc,
    thread,
    time::Duration,
};

use chaos::{Fault, FaultyDisk};
use relevo_export::AlignedBuf;

const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// `O_DIRECT` on all architectures that these tests run on.
fn direct() -> i32 {
    rustix::fs::OFlags::DIRECT.bits().cast_signed()
}

fn code(result: io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn faults_do_what_they_say() {
    if !rustix::process::geteuid().is_root() {
        return said::skip("faults_do_what_they_say", "FUSE without a mount needs root");
    }
    let dir = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    let disk = FaultyDisk::new(dir.path(), "disk", SIZE);
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(direct())
        .open(disk.path())
        .unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    let ones = AlignedBuf::copy_from(&[1; 8192]);
    let twos = AlignedBuf::copy_from(&[2; 8192]);
    let write = |data: &AlignedBuf| code(file.write_all_at(data.as_ref(), 4096));
    let behind = || {
        let mut found = vec![0; 8192];
        let behind = File::open(disk.behind()).unwrap();
        behind.read_exact_at(&mut found, 4096).unwrap();
        found
    };
    let read = || {
        let mut buffer = AlignedBuf::with_capacity(8192);
        file.read_exact_at(buffer.spare(8192), 4096)?;
        buffer.advance(8192);
        Ok::<_, io::Error>(buffer.freeze())
    };
    assert_eq!(write(&ones), None);
    assert_eq!(read().unwrap(), ones.as_ref());

    disk.set(Some(Fault::Read));
    assert_eq!(read().unwrap_err().raw_os_error(), Some(EIO));
    assert_eq!(code(file.sync_data()), None);
    assert!(disk.set(Some(Fault::Write)) > 0, "hits are counted");
    assert_eq!(write(&twos), Some(EIO));
    assert_eq!(read().unwrap(), ones.as_ref());
    disk.set(Some(Fault::Full));
    assert_eq!(write(&twos), Some(ENOSPC));
    assert_eq!(behind(), ones.as_ref());
    disk.set(Some(Fault::Flush));
    assert_eq!(code(file.sync_data()), Some(EIO));
    assert_eq!(write(&ones), None);
    disk.set(Some(Fault::Torn));
    assert_eq!(write(&twos), Some(EIO));
    assert_eq!(behind(), [[2; 4096], [1; 4096]].concat());
    assert_eq!(disk.set(None), 1);
    assert_eq!(write(&twos), None);
    assert_eq!(behind(), twos.as_ref());

    disk.set(Some(Fault::Hang));
    let (sender, done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let result = write(&ones);
            sender.send(result).unwrap();
        });
        let early = done.recv_timeout(Duration::from_millis(100));
        assert!(early.is_err(), "it was answered");
        disk.set(None);
        assert_eq!(done.recv_timeout(Duration::from_secs(10)), Ok(None));
    });
    assert_eq!(behind(), ones.as_ref());
}
