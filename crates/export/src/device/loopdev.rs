//! Loop devices: the five ioctls that are needed (`linux/loop.h`).

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::{DeviceError, DeviceOptions};

const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;

/// The device clears itself when its last user closes it.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Free devices are handed out without a reservation: others may be faster, so try again; more
/// than this many neighbours at once is not plausible.
const MAX_TRIES: u32 = 64;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo64 {
    const fn new(flags: u32) -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A loop device with a backing file. It goes when the last descriptor of it is closed.
#[derive(Debug)]
pub(super) struct LoopDevice {
    file: File,
    path: PathBuf,
    direct_io: bool,
}

impl LoopDevice {
    /// Takes a free device and puts it on `backing`.
    pub(super) fn attach(backing: BorrowedFd<'_>, options: DeviceOptions) -> io::Result<Self> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        for _ in 0..MAX_TRIES {
            // SAFETY: the request takes no argument.
            let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = match open(&path, 0) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    make_node(&path, number)?;
                    open(&path, 0)?
                }
                opened => opened?,
            };
            match configure(&file, backing, options) {
                Ok(()) => {
                    let direct_io = status_flags(&file)? & LO_FLAGS_DIRECT_IO != 0;
                    return Ok(Self {
                        file,
                        path,
                        direct_io,
                    });
                }
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "others took every free loop device first; try again",
        ))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether direct I/O was granted.
    pub(super) const fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// Makes sure that no file system uses the device, and writes back its cache.
    pub(super) fn claim_and_flush(&self) -> Result<(), DeviceError> {
        let claimed = match open(&self.path, libc::O_EXCL) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let device = self.path.clone();
                return Err(DeviceError::Busy { device });
            }
            opened => super::step("open the loop device", opened)?,
        };
        super::step("write back the device's cache", claimed.sync_all())
    }

    /// Lets go of the backing file, at once or when the last other user closes the device.
    pub(super) fn clear(&self) -> io::Result<()> {
        // SAFETY: the request takes no argument.
        let result = check(unsafe { libc::ioctl(self.file.as_raw_fd(), LOOP_CLR_FD) });
        match result {
            // Cleared before, by this or by somebody's `losetup -d`.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            result => result.map(drop),
        }
    }
}

/// The name of the file that a loop device is on; `None` when it is on nothing.
pub(super) fn backing_file(device: &Path) -> Option<String> {
    let name = device.file_name()?.to_str()?;
    let text = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    Some(text.trim_end().to_owned())
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

/// In a container `/dev` may be a plain directory, where no node appears by itself.
fn make_node(path: &Path, number: libc::c_int) -> io::Result<()> {
    /// `LOOP_MAJOR`.
    const MAJOR: u32 = 7;

    let minor = u32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::from_raw_mode(0o600),
        rustix::fs::makedev(MAJOR, minor),
    );
    match made {
        // Somebody else did it in between.
        Err(rustix::io::Errno::EXIST) => Ok(()),
        made => Ok(made?),
    }
}

fn configure(file: &File, backing: BorrowedFd<'_>, options: DeviceOptions) -> io::Result<()> {
    let direct = if options.direct_io {
        LO_FLAGS_DIRECT_IO
    } else {
        0
    };
    let config = LoopConfig {
        fd: u32::try_from(backing.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?,
        block_size: options.block_size,
        info: LoopInfo64::new(LO_FLAGS_AUTOCLEAR | direct),
        reserved: [0; 8],
    };
    // SAFETY: `config` has the layout that the kernel reads, and lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CONFIGURE, &raw const config) })?;
    Ok(())
}

fn status_flags(file: &File) -> io::Result<u32> {
    let mut info = LoopInfo64::new(0);
    // SAFETY: `info` has the layout that the kernel writes, and lives through the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
    Ok(info.flags)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's sizes (linux/loop.h).
    #[test]
    fn layout() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 8 + 232 + 64);
    }
}
