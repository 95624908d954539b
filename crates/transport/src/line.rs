//! Heartbeats on a byte stream: a serial line, or a Unix socket.
//!
//! A stream is opened with [`open`], which may take a while, and then given to the heartbeat thread as a
//! [`HeartbeatLine`], which never waits. Heartbeats never queue up: one is begun only when the line has room for it,
//! and otherwise it is lost as a datagram would be. A later one says all that it would have said, and an old one that
//! arrives late would make its sender seem alive when it is not.
//!
//! In a frame of [`crate::framing`], since each byte takes its time on a slow line:
//!
//! ```text
//!  0  1   version
//!  1  n   heartbeat, postcard
//!     16  the first half of HMAC-SHA256 of: "RVHL", the cluster's id, and all before it
//! ```
//!
//! Half of a tag is what RFC 2104 (section 5) allows to keep. What a heartbeat says keeps old ones that someone
//! records and sends again from counting, as for datagrams.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::Path,
    time::Duration,
};

use relevo_membership::Heartbeat;
use relevo_types::{ClusterId, Time, cluster::Line};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    net::sockopt,
    termios::{self, ControlModes, OptionalActions, QueueSelector},
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::oneshot,
};

use crate::{
    framing::{Deframer, frame},
    heartbeat::HeartbeatKey,
};

/// Bytes read at most before the thread looks at its other sockets.
const READ_MAX: usize = 8192;

/// Send buffer of a Unix socket, in bytes: the kernel's least. Room for a heartbeat or two, since what a peer
/// that stands still has not read is as old as its pause.
const SEND_BUFFER: usize = 2304;

/// Whoever listens looks this often whether its socket is still the one that others find.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// One end of an open stream.
#[derive(Debug)]
pub struct HeartbeatLine {
    path: String,
    stream: OwnedFd,
    bytes_per_second: Option<u32>,
    cluster: ClusterId,
    key: HeartbeatKey,
    /// What is left of the frame that was begun.
    rest: Vec<u8>,
    /// When the line has carried what was given to it.
    free_at: Time,
    deframer: Deframer,
    /// Frames that were no authentic heartbeat of this cluster.
    ignored: u64,
    ended: Option<oneshot::Sender<io::Error>>,
}

impl HeartbeatLine {
    /// An end of an open, non-blocking stream. The other value tells when it ended and why; a line that was
    /// dropped says nothing.
    #[must_use]
    pub fn new(
        path: &str,
        stream: OwnedFd,
        line: &Line,
        cluster: ClusterId,
        key: HeartbeatKey,
    ) -> (Self, oneshot::Receiver<io::Error>) {
        let (ended, why) = oneshot::channel();
        let end = Self {
            path: path.to_owned(),
            stream,
            bytes_per_second: line.bytes_per_second(),
            cluster,
            key,
            rest: Vec::new(),
            free_at: Time::ZERO,
            deframer: Deframer::default(),
            ignored: 0,
            ended: Some(ended),
        };
        (end, why)
    }

    /// Name of the path.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What to wait for: bytes, and room while a frame is half written.
    pub(crate) fn poll_fd(&self) -> PollFd<'_> {
        let mut flags = PollFlags::IN;
        if !self.rest.is_empty() {
            flags |= PollFlags::OUT;
        }
        PollFd::from_borrowed_fd(self.stream.as_fd(), flags)
    }

    /// Sends a heartbeat if the line has room for it, and says whether it had.
    ///
    /// # Errors
    /// The stream ended.
    pub fn send(&mut self, now: Time, heartbeat: &Heartbeat) -> io::Result<bool> {
        self.write_rest()?;
        if !self.rest.is_empty() || now < self.free_at || !self.has_room() {
            return Ok(false);
        }
        let sealed = self.key.seal_short(self.cluster, heartbeat);
        let Some(framed) = frame(&sealed).filter(|_| !sealed.is_empty()) else {
            return Ok(false);
        };
        if let Some(rate) = self.bytes_per_second {
            let needed_us = framed.len() as u64 * 1_000_000 / u64::from(rate.max(1));
            self.free_at = now + Duration::from_micros(needed_us);
        }
        self.rest = framed;
        self.write_rest()?;
        Ok(true)
    }

    /// The heartbeats that arrived, within bounds: call again while there are some.
    ///
    /// # Errors
    /// The stream ended.
    pub fn receive(&mut self) -> io::Result<Vec<Heartbeat>> {
        self.write_rest()?;
        let mut buffer = [0; READ_MAX];
        let read = match rustix::io::read(&self.stream, &mut buffer) {
            Ok(0) => {
                let why = "the other end hung up";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
            }
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut heartbeats = Vec::new();
        let Self {
            deframer,
            key,
            cluster,
            ignored,
            ..
        } = self;
        deframer.push(&buffer[..read], |content| {
            match key.open_short(*cluster, content) {
                Some(heartbeat) => heartbeats.push(heartbeat),
                None => *ignored += 1,
            }
        });
        Ok(heartbeats)
    }

    /// Frames and other bytes that were no authentic heartbeat of this cluster.
    #[must_use]
    pub const fn ignored(&self) -> u64 {
        self.ignored + self.deframer.damaged()
    }

    /// Tells whoever opened it that it ended.
    pub(crate) fn end(mut self, why: io::Error) {
        if let Some(ended) = self.ended.take() {
            // Whoever opened it may be gone.
            ended.send(why).ok();
        }
    }

    /// Whether the kernel has sent nearly all that it was given.
    fn has_room(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.stream.as_fd(),
            PollFlags::OUT,
        )];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    fn write_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match rustix::io::write(&self.stream, &self.rest) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
                Ok(written) => drop(self.rest.drain(..written)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Opens this node's end of a stream, non-blocking. Of a Unix socket to which nobody listens this one does, and
/// waits until somebody comes. Cancel-safe. Must run inside a Tokio runtime.
///
/// # Errors
/// Why it can't be opened and what to do.
pub async fn open(line: &Line) -> io::Result<OwnedFd> {
    match line {
        Line::Serial { device, baud } => open_serial(device, *baud),
        Line::Unix(path) => {
            let stream = open_unix(path).await.map_err(|error| {
                let remedy = "check that its directory exists and that this user may write there";
                explain(
                    &format!("can't use the socket {}", path.display()),
                    &error,
                    remedy,
                )
            })?;
            let stream = OwnedFd::from(stream.into_std()?);
            sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
            Ok(stream)
        }
    }
}

/// Opens a serial device: raw, 8 data bits, no parity, no flow control, and for nobody else.
///
/// # Errors
/// It is none, it does not have this speed, or another program has it.
pub fn open_serial(device: &Path, baud: u32) -> io::Result<OwnedFd> {
    let what = |doing: &str| format!("can't {doing} the serial line {}", device.display());
    // Without NONBLOCK a line without a carrier would hang here.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let stream = rustix::fs::open(device, flags, Mode::empty()).map_err(|error| {
        let remedy = match error {
            rustix::io::Errno::BUSY => "another program (a getty?) has it; stop that one",
            rustix::io::Errno::NOENT => "there is no such device; correct the path",
            _ => "check the device and who may use it",
        };
        explain(&what("open"), &error.into(), remedy)
    })?;
    let set = || {
        let mut settings = termios::tcgetattr(&stream)?;
        settings.make_raw();
        settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
        settings.control_modes -= ControlModes::CRTSCTS | ControlModes::CSTOPB;
        settings.set_speed(baud)?;
        termios::tcsetattr(&stream, OptionalActions::Now, &settings)?;
        termios::ioctl_tiocexcl(&stream)?;
        // What came before is of another life.
        termios::tcflush(&stream, QueueSelector::IOFlush)
    };
    set().map_err(|error| {
        let remedy = match error {
            rustix::io::Errno::NOTTY => "it is no serial line; correct the path",
            _ => "it may not have this speed; give both ends another one",
        };
        explain(&what("set up"), &error.into(), remedy)
    })?;
    Ok(stream)
}

fn explain(what: &str, error: &io::Error, remedy: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}; {remedy}"))
}

async fn open_unix(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Left over from one who listened and is gone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                remove_socket(path)?;
            }
            Err(error) => return Err(error),
        }
        match UnixListener::bind(path) {
            Ok(listener) => {
                let own = inode(path);
                let listening = Listening {
                    listener,
                    path,
                    own,
                };
                if let Some(stream) = listening.accept().await? {
                    return Ok(stream);
                }
            }
            // The other end was faster.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes a socket, and nothing else.
fn remove_socket(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt as _;

    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Err(io::Error::other("there is a file that is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Somebody shall connect. The socket is there only as long as this waits: for one connection.
struct Listening<'a> {
    listener: UnixListener,
    path: &'a Path,
    /// What tells its socket from a later one at the same place.
    own: Option<(u64, u64)>,
}

impl Listening<'_> {
    /// The one that came; `None`: the socket that others find is not this one any more.
    async fn accept(self) -> io::Result<Option<UnixStream>> {
        // Heartbeats are authenticated; a stranger could only take the place of the peer.
        fs::set_permissions(self.path, fs::Permissions::from_mode(0o600))?;
        loop {
            tokio::select! {
                accepted = self.listener.accept() => return Ok(Some(accepted?.0)),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            // Both ends took the same leftover away, and the other one was later.
            if !self.is_found() {
                return Ok(None);
            }
        }
    }

    fn is_found(&self) -> bool {
        self.own.is_some() && inode(self.path) == self.own
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        if self.is_found() {
            // Whoever comes next is to listen, not to be refused.
            remove_socket(self.path).ok();
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}
