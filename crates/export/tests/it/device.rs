//! A volume in memory as a block device of the kernel.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, atomic::Ordering, mpsc},
    thread,
    time::Duration,
};

use relevo_export::{
    AlignedBuf, BlockRequest, BlockTarget, Completion, DeviceExport,
    device::{Detach, Detached, DeviceError, DeviceOptions, cleanup_leftovers},
};

use crate::{memory::Memory, skip::no_devices};

const MIB: usize = 1 << 20;

/// A directory for links, and a volume name that no other test and no other run has.
fn place() -> (tempfile::TempDir, String) {
    let dir = tempfile::Builder::new()
        .prefix("relevo-")
        .tempdir()
        .unwrap();
    let tail = dir.path().file_name().unwrap().to_str().unwrap();
    let name = tail.replace('.', "");
    (dir, name)
}

fn open(path: &Path, flags: i32) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

/// Bytes that tell where they belong.
fn pattern(offset: usize, len: usize, salt: u8) -> AlignedBuf {
    let bytes: Vec<u8> = (offset..offset + len)
        .map(|position| (position / 512) as u8 ^ (position >> 17) as u8 ^ salt)
        .collect();
    AlignedBuf::copy_from(&bytes)
}

/// Every size from 512 bytes to 4 MiB, written and read back through the device in a way, and
/// compared with what arrived in the volume.
fn matrix(options: DeviceOptions, flags: i32, salt: u8) {
    const SIZE: usize = 32 * MIB;
    let (dir, name) = place();
    let memory = Memory::new(SIZE);
    let target: Arc<dyn BlockTarget> = Arc::clone(&memory) as _;
    let export = DeviceExport::attach_with(&name, dir.path(), target, options).unwrap();
    assert_eq!(export.direct_io(), options.direct_io);
    let file = open(export.link(), flags);
    let mut expected = vec![0; SIZE];
    let mut offset = 0;
    let mut len = options.block_size as usize;
    while len <= 4 * MIB {
        for count in [len, len * 3 / 2] {
            let count = count / options.block_size as usize * options.block_size as usize;
            let data = pattern(offset, count, salt);
            file.write_all_at(data.as_ref(), offset as u64).unwrap();
            expected[offset..offset + count].copy_from_slice(data.as_ref());
            let mut back = AlignedBuf::zeroed(count);
            read_into(&file, &mut back, offset as u64);
            assert!(
                back.as_ref() == data.as_ref(),
                "{count} bytes at {offset} read back"
            );
            offset += count;
        }
        len *= 2;
    }
    file.sync_all().unwrap();
    assert!(
        memory.content() == expected,
        "the volume has what was written"
    );
    let mut all = AlignedBuf::zeroed(SIZE);
    read_into(&file, &mut all, 0);
    assert!(all.as_ref() == expected);
    drop(file);
    assert_eq!(memory.counters.unaligned.load(Ordering::Relaxed), 0);
    println!(
        "{options:?}: largest write {} KiB",
        memory.counters.largest_write.load(Ordering::Relaxed) >> 10
    );
    assert_eq!(export.detach(Detach::Clean).unwrap(), Detached::Gone);
}

fn read_into(file: &File, buffer: &mut AlignedBuf, offset: u64) {
    // An aligned buffer of the right length, refilled in place.
    let len = buffer.as_ref().len();
    let mut fresh = AlignedBuf::with_capacity(len);
    file.read_exact_at(fresh.spare(len), offset).unwrap();
    fresh.advance(len);
    *buffer = fresh;
}

#[test]
fn every_request_size_arrives_whole() {
    if no_devices("every_request_size_arrives_whole") {
        return;
    }
    let mut salt = 1;
    for direct_io in [true, false] {
        for block_size in [4096, 512] {
            for flags in [libc::O_DIRECT, 0] {
                let options = DeviceOptions {
                    direct_io,
                    block_size,
                };
                matrix(options, flags, salt);
                salt += 1;
            }
        }
    }
}

#[test]
fn link_flush_zeroes_and_detach() {
    if no_devices("link_flush_zeroes_and_detach") {
        return;
    }
    let (dir, name) = place();
    let memory = Memory::new(8 * MIB);
    let export = DeviceExport::attach(&name, dir.path(), Arc::clone(&memory) as _).unwrap();
    let link = dir.path().join(&name);
    assert_eq!(export.link(), link);
    assert_eq!(fs::read_link(&link).unwrap(), export.device());

    let file = open(&link, libc::O_DIRECT);
    let data = pattern(0, MIB, 7);
    file.write_all_at(data.as_ref(), 0).unwrap();
    let flushes = memory.counters.flushes.load(Ordering::Relaxed);
    file.sync_all().unwrap();
    assert!(memory.counters.flushes.load(Ordering::Relaxed) > flushes);

    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        4096,
        8192,
    )
    .unwrap();
    assert_eq!(memory.counters.zeroes.load(Ordering::Relaxed), 1);
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::ZERO_RANGE | rustix::fs::FallocateFlags::KEEP_SIZE,
        16384,
        4096,
    )
    .unwrap();
    let content = memory.content();
    assert!(content[4096..12288].iter().all(|&byte| byte == 0));
    assert!(content[16384..20480].iter().all(|&byte| byte == 0));
    assert_eq!(content[..4096], data.as_ref()[..4096]);
    assert_eq!(content[12288..16384], data.as_ref()[12288..16384]);
    drop(file);

    // What sits in the device's cache is written back by a clean detach.
    let cached = open(&link, 0);
    cached.write_all_at(&[0x5a; 4096], 4096).unwrap();
    drop(cached);
    assert_eq!(export.detach(Detach::Clean).unwrap(), Detached::Gone);
    assert_eq!(memory.content()[4096..8192], [0x5a; 4096]);
    assert!(!link.exists() && fs::symlink_metadata(&link).is_err());
    assert_eq!(export.detach(Detach::Clean).unwrap(), Detached::Gone);
}

#[test]
fn a_forced_detach_answers_what_hangs() {
    if no_devices("a_forced_detach_answers_what_hangs") {
        return;
    }
    let (dir, name) = place();
    let memory = Memory::new(4 * MIB);
    let export = DeviceExport::attach(&name, dir.path(), Arc::clone(&memory) as _).unwrap();
    memory.stall();
    let (sender, outcome) = mpsc::channel();
    let path = export.link().to_owned();
    let writer = thread::spawn(move || {
        let file = open(&path, libc::O_DIRECT);
        let result = file.write_all_at(pattern(0, MIB, 1).as_ref(), 0);
        sender.send(result).unwrap();
    });
    while memory.kept() == 0 {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(export.under_way() > 0);
    // The writer holds the device open until its write is answered.
    let (sender, detached) = mpsc::channel();
    let detacher = thread::spawn(move || sender.send(export.detach(Detach::Force)).unwrap());
    let limit = Duration::from_secs(10);
    let error = outcome.recv_timeout(limit).unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(detached.recv_timeout(limit).unwrap().is_ok());
    writer.join().unwrap();
    detacher.join().unwrap();
    assert!(fs::symlink_metadata(dir.path().join(&name)).is_err());
}

/// Loses the reads that it is given.
struct Forgetful(Arc<Memory>);

impl BlockTarget for Forgetful {
    fn submit(&self, request: BlockRequest, done: Completion) {
        match request {
            BlockRequest::Read { .. } => drop(done),
            other => self.0.submit(other, done),
        }
    }

    fn size(&self) -> u64 {
        self.0.size()
    }
}

#[test]
fn a_forgotten_request_is_an_error() {
    if no_devices("a_forgotten_request_is_an_error") {
        return;
    }
    let (dir, name) = place();
    let target = Arc::new(Forgetful(Memory::new(MIB)));
    let export = DeviceExport::attach(&name, dir.path(), target as _).unwrap();
    let file = open(export.link(), libc::O_DIRECT);
    let mut buffer = AlignedBuf::with_capacity(4096);
    let error = file.read_at(buffer.spare(4096), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    file.write_all_at(pattern(0, 4096, 1).as_ref(), 0).unwrap();
}

#[test]
fn a_forced_detach_overtakes_a_clean_one_that_hangs() {
    if no_devices("a_forced_detach_overtakes_a_clean_one_that_hangs") {
        return;
    }
    let (dir, name) = place();
    let memory = Memory::new(4 * MIB);
    let export = DeviceExport::attach(&name, dir.path(), Arc::clone(&memory) as _).unwrap();
    let export = Arc::new(export);
    // Opening the device and closing it may read and flush; stall only once that is over.
    let file = open(export.link(), 0);
    memory.stall();
    file.write_all_at(&[1; 4096], 0).unwrap();
    let (sender, outcome) = mpsc::channel();
    for (how, wait_for_it) in [(Detach::Clean, true), (Detach::Force, false)] {
        let (export, sender) = (Arc::clone(&export), sender.clone());
        thread::spawn(move || sender.send((how, export.detach(how))).unwrap());
        while wait_for_it && memory.kept() == 0 {
            thread::sleep(Duration::from_millis(5));
        }
    }
    // A program has the device open, so it stays until that ends; the detach does not.
    let limit = Duration::from_secs(10);
    for _ in 0..2 {
        let (how, result) = outcome.recv_timeout(limit).unwrap();
        match how {
            Detach::Force => assert!(result.is_ok(), "{result:?}"),
            Detach::Clean => assert!(!matches!(result, Err(DeviceError::TimedOut { .. }))),
        }
    }
    assert!(file.sync_all().is_err());
}

#[test]
fn a_new_instance_takes_the_place_of_a_crashed_one() {
    if no_devices("a_new_instance_takes_the_place_of_a_crashed_one") {
        return;
    }
    let (dir, name) = place();
    let link = dir.path().join(&name);
    std::os::unix::fs::symlink("/dev/relevo-no-such-device", &link).unwrap();
    let memory = Memory::new(MIB);
    let export = DeviceExport::attach(&name, dir.path(), memory as _).unwrap();
    assert_eq!(fs::read_link(&link).unwrap(), export.device());
    drop(export);
    assert!(fs::symlink_metadata(&link).is_err());

    fs::write(&link, b"precious").unwrap();
    let refused = DeviceExport::attach(&name, dir.path(), Memory::new(MIB) as _);
    assert!(matches!(refused, Err(DeviceError::Occupied(_))));
    assert_eq!(fs::read(&link).unwrap(), b"precious");
}

#[test]
fn names_that_are_no_file_names_are_refused() {
    for name in ["", ".", "..", "a/b", ".hidden"] {
        let refused = cleanup_leftovers(name, Path::new("/nonexistent"));
        assert!(matches!(refused, Err(DeviceError::Name(_))), "{name}");
    }
}

/// Unmounts when the test ends, whichever way.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

#[test]
fn a_file_system_lives_on_it() {
    const TEST: &str = "a_file_system_lives_on_it";
    if no_devices(TEST) {
        return;
    }
    if Command::new("mkfs.ext4").arg("-V").output().is_err() {
        return said::skip(TEST, "mkfs.ext4 is not installed");
    }
    let (dir, name) = place();
    let memory = Memory::new(64 * MIB);
    let export = DeviceExport::attach(&name, dir.path(), Arc::clone(&memory) as _).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(export.link()));
    let mount_point = dir.path().join("mounted");
    fs::create_dir(&mount_point).unwrap();
    let mount = |device: &Path| {
        rustix::mount::mount(
            device,
            &mount_point,
            "ext4",
            rustix::mount::MountFlags::empty(),
            None,
        )
        .unwrap();
        Mounted(mount_point.clone())
    };

    let mounted = mount(export.link());
    let mut files = Vec::new();
    for number in 0..40usize {
        let path = mount_point.join(format!("file{number}"));
        let content = pattern(number * 512, number * 20_011, 3);
        fs::write(&path, content.as_ref()).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        files.push((path, content));
    }
    assert!(memory.counters.flushes.load(Ordering::Relaxed) > 0);
    assert!(matches!(
        export.detach(Detach::Clean),
        Err(DeviceError::Busy { .. })
    ));
    rustix::mount::unmount(&mount_point, rustix::mount::UnmountFlags::empty()).unwrap();
    drop(mounted);
    assert_eq!(export.detach(Detach::Clean).unwrap(), Detached::Gone);

    let again = DeviceExport::attach(&name, dir.path(), Arc::clone(&memory) as _).unwrap();
    run(Command::new("e2fsck").arg("-fn").arg(again.link()));
    let mounted = mount(again.link());
    for (path, content) in &files {
        assert!(
            fs::read(path).unwrap() == content.as_ref(),
            "{}",
            path.display()
        );
    }
    // The volume closes under a mounted file system: its calls fail, nothing hangs.
    assert_eq!(again.detach(Detach::Force).unwrap(), Detached::StillOpen);
    let late = File::create(mount_point.join("late")).and_then(|file| file.sync_all());
    assert!(late.is_err());
    drop(mounted);
}

/// In a process of its own, started and killed by the test below.
#[test]
fn holds_a_device_for_another_test() {
    let Some(dir) = std::env::var_os("RELEVO_TEST_HOLD") else {
        return;
    };
    let export = DeviceExport::attach("held", Path::new(&dir), Memory::new(MIB) as _).unwrap();
    fs::write(
        Path::new(&dir).join("ready"),
        export.device().as_os_str().as_encoded_bytes(),
    )
    .unwrap();
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_process_leaves_only_the_link() {
    const TEST: &str = "a_killed_process_leaves_only_the_link";
    if no_devices(TEST) {
        return;
    }
    let (dir, _) = place();
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "device::holds_a_device_for_another_test"])
        .env("RELEVO_TEST_HOLD", dir.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let ready = dir.path().join("ready");
    let limit = 2000;
    for turn in 0..=limit {
        if fs::read(&ready).is_ok_and(|content| !content.is_empty()) {
            break;
        }
        assert!(turn < limit, "no device");
        thread::sleep(Duration::from_millis(5));
    }
    let device = PathBuf::from(fs::read_to_string(&ready).unwrap());
    let backing = Path::new("/sys/block")
        .join(device.file_name().unwrap())
        .join("loop/backing_file");
    let bound = || fs::read_to_string(&backing).is_ok_and(|name| name.contains("relevo:held"));
    assert!(bound());
    // A program that has the device open survives the daemon; its requests fail.
    let user = open(&device, libc::O_DIRECT);
    holder.kill().unwrap();
    holder.wait().unwrap();
    let mut buffer = AlignedBuf::with_capacity(4096);
    assert!(user.read_at(buffer.spare(4096), 0).is_err());
    let found = cleanup_leftovers("held", dir.path()).unwrap();
    assert!(found.link);
    assert_eq!(found.still_open, Some(device));
    drop(user);
    for turn in 0..=limit {
        if !bound() {
            break;
        }
        assert!(turn < limit, "the loop device stays");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(
        cleanup_leftovers("held", dir.path()).unwrap(),
        Default::default()
    );
}
