//! A blocking NBD client: for the ledger without a block device, the demo's comparison of
//! replicas, the benchmark, and tests. Simple replies only; enough for any server.

use std::{
    fmt,
    io::{self, BufReader, Read, Write},
    net::{Shutdown, TcpStream, ToSocketAddrs as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::proto::{
    IHAVEOPT, MAX_REQUEST, MAX_STRING, NBDMAGIC, OPTION_REPLY_MAGIC, REQUEST_LEN, Reader,
    RequestHeader, SIMPLE_REPLY_MAGIC, cmd, cmd_flag, flag, handshake, info, opt, rep,
};
use crate::block::Errno;

/// Payloads up to this size are sent in one piece with their header.
const JOIN_MAX: usize = 64 << 10;

/// Requests taken are sent at this many bytes: a burst of small ones is one call, and the server works
/// on the first while the rest comes.
const SEND_MAX: usize = 64 << 10;

/// Replies to one option that are read before the server is taken for a broken one.
const MAX_OPTION_REPLIES: usize = 64;

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddr {
    /// A Unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl fmt::Display for NbdAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// `unix:/path`, `/path`, or `host:port`.
impl FromStr for NbdAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        if text.contains(':') {
            return Ok(Self::Tcp(text.to_owned()));
        }
        Err(format!(
            "`{text}` is not the address of an NBD server; write unix:/path/to/socket or host:port"
        ))
    }
}

/// Why a client could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection could not be made.
    #[error("can't connect to {address}: {error}")]
    Connect {
        /// Where to.
        address: NbdAddr,
        /// The system's words.
        error: io::Error,
    },
    /// The connection failed or its time ran out; requests under way may or may not be done.
    #[error("the connection to the NBD server failed: {0}")]
    Connection(#[from] io::Error),
    /// The server does not give the export.
    #[error("the server refuses export `{export}`: {why}")]
    Refused {
        /// What was asked for.
        export: String,
        /// The server's words.
        why: String,
    },
    /// The server does not speak the protocol.
    #[error("the server's answer is not NBD: {0}")]
    Protocol(&'static str),
    /// A request failed; the connection goes on.
    #[error("{0}")]
    Request(#[from] Errno),
}

/// One connection, one request at a time. After [`ClientError::Connection`] or
/// [`ClientError::Protocol`] connect again.
#[derive(Debug)]
pub struct Client {
    pipeline: Pipeline,
}

impl Client {
    /// Connects and opens an export. `timeout` bounds the connection and then every single wait
    /// for the server; `None` waits for ever.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(
        address: &NbdAddr,
        export: &str,
        timeout: Option<Duration>,
    ) -> Result<Self, ClientError> {
        let pipeline = Pipeline::connect(address, export, timeout)?;
        Ok(Self { pipeline })
    }

    /// Size of the export in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.pipeline.size
    }

    /// Whether writes are refused.
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        self.pipeline.flags & flag::READ_ONLY != 0
    }

    /// Changes the time-out given at [`Self::connect`].
    ///
    /// # Errors
    /// The system's, for a time-out of zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.pipeline.timeout = timeout;
        self.pipeline.stream.get_ref().set_timeout(timeout)
    }

    /// What another thread can cut this connection with.
    ///
    /// # Errors
    /// The system's: no descriptor is left.
    pub fn breaker(&self) -> io::Result<Breaker> {
        self.pipeline.stream.get_ref().try_clone().map(Breaker)
    }

    /// Reads `buffer.len()` bytes, any number, in requests of at most [`MAX_REQUEST`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        let mut position = offset;
        for piece in buffer.chunks_mut(MAX_REQUEST as usize) {
            let len = length(piece.len())?;
            self.pipeline.submit(Op::Read {
                offset: position,
                len,
            })?;
            let done = self.pipeline.complete_into(piece)?;
            done.result?;
            position += u64::from(len);
        }
        Ok(())
    }

    /// Writes any number of bytes, in requests of at most [`MAX_REQUEST`]. With `fua` they are on
    /// stable storage when this returns.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), ClientError> {
        let mut position = offset;
        for piece in data.chunks(MAX_REQUEST as usize) {
            self.run(Op::Write {
                offset: position,
                data: piece,
                fua,
            })?;
            position += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.run(Op::Flush)
    }

    /// Gives a range up.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<(), ClientError> {
        self.run(Op::Trim { offset, len })
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_zeroes(&mut self, offset: u64, len: u32, fua: bool) -> Result<(), ClientError> {
        self.run(Op::WriteZeroes { offset, len, fua })
    }

    fn run(&mut self, op: Op<'_>) -> Result<(), ClientError> {
        self.pipeline.submit(op)?;
        self.pipeline.complete()?.result?;
        Ok(())
    }

    /// Says goodbye and closes; the server finishes what is under way.
    ///
    /// # Errors
    /// The connection's.
    pub fn disconnect(self) -> Result<(), ClientError> {
        self.pipeline.disconnect()
    }
}

/// Cuts the connection of a [`Client`] that waits for its server, in another thread. The connection
/// stays open while this exists, as it does while the client exists.
#[derive(Debug)]
pub struct Breaker(Stream);

impl Breaker {
    /// Cuts it: whatever waits on it fails now. One that is closed already stays closed.
    pub fn cut(&self) {
        let result = match &self.0 {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
        if let Err(error) = result {
            tracing::trace!(%error, "the connection was gone already");
        }
    }
}

/// A request of [`Pipeline::submit`].
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Read `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, at most [`MAX_REQUEST`].
        len: u32,
    },
    /// Write.
    Write {
        /// First byte.
        offset: u64,
        /// At most [`MAX_REQUEST`] bytes.
        data: &'a [u8],
        /// Stable when answered.
        fua: bool,
    },
    /// Flush.
    Flush,
    /// Trim.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Stable when answered.
        fua: bool,
    },
}

/// The end of a pipelined request.
#[derive(Clone, Copy, Debug)]
pub struct Completed {
    /// What [`Pipeline::submit`] returned for it.
    pub cookie: u64,
    /// How it went.
    pub result: Result<(), Errno>,
}

/// One connection with several requests under way, answered in any order. The caller bounds their
/// number; with large writes keep it low, as a server may stop reading while its answers are not
/// taken.
#[derive(Debug)]
pub struct Pipeline {
    stream: BufReader<Stream>,
    size: u64,
    flags: u16,
    next_cookie: u64,
    /// Reads under way and their lengths: their replies carry data.
    reads: std::collections::HashMap<u64, u32>,
    under_way: usize,
    /// Requests that were not sent yet.
    scratch: Vec<u8>,
    /// For each wait.
    timeout: Option<Duration>,
}

impl Pipeline {
    /// As [`Client::connect`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(
        address: &NbdAddr,
        export: &str,
        timeout: Option<Duration>,
    ) -> Result<Self, ClientError> {
        let stream = Stream::connect(address, timeout).map_err(|error| ClientError::Connect {
            address: address.clone(),
            error,
        })?;
        let mut stream = BufReader::with_capacity(JOIN_MAX, stream);
        let (size, flags) = negotiate(&mut stream, export)?;
        Ok(Self {
            stream,
            size,
            flags,
            next_cookie: 1,
            reads: std::collections::HashMap::new(),
            under_way: 0,
            scratch: Vec::new(),
            timeout,
        })
    }

    /// Size of the export in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Requests not answered.
    #[must_use]
    pub const fn under_way(&self) -> usize {
        self.under_way
    }

    /// Takes a request; returns its cookie. It is sent with others in one call, at the latest when an
    /// answer is waited for.
    ///
    /// # Errors
    /// The connection's, or `EINVAL` for more than [`MAX_REQUEST`] bytes.
    pub fn submit(&mut self, op: Op<'_>) -> Result<u64, ClientError> {
        let fua_flag = |fua| if fua { cmd_flag::FUA } else { 0 };
        let (command, flags, offset, len, data): (_, _, _, _, &[u8]) = match op {
            Op::Read { offset, len } => (cmd::READ, 0, offset, len, &[]),
            Op::Write { offset, data, fua } => {
                let len = length(data.len())?;
                (cmd::WRITE, fua_flag(fua), offset, len, data)
            }
            Op::Flush => (cmd::FLUSH, 0, 0, 0, &[]),
            Op::Trim { offset, len } => (cmd::TRIM, 0, offset, len, &[]),
            Op::WriteZeroes { offset, len, fua } => {
                (cmd::WRITE_ZEROES, fua_flag(fua), offset, len, &[])
            }
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let header = RequestHeader {
            flags,
            command,
            cookie,
            offset,
            len,
        };
        self.send(&header.encode(), data)?;
        self.under_way += 1;
        if command == cmd::READ {
            self.reads.insert(cookie, len);
        }
        Ok(cookie)
    }

    fn send(&mut self, header: &[u8; REQUEST_LEN], data: &[u8]) -> io::Result<()> {
        self.scratch.extend_from_slice(header);
        if data.len() <= JOIN_MAX {
            self.scratch.extend_from_slice(data);
        }
        if data.len() > JOIN_MAX || self.scratch.len() > SEND_MAX {
            self.send_scratch()?;
        }
        if data.len() > JOIN_MAX {
            self.stream.get_mut().write_all(data)?;
        }
        Ok(())
    }

    fn send_scratch(&mut self) -> io::Result<()> {
        if !self.scratch.is_empty() {
            self.stream.get_mut().write_all(&self.scratch)?;
            self.scratch.clear();
        }
        Ok(())
    }

    /// Sends what was taken, and waits for an answer. By `poll`: a read that blocks is also woken each
    /// time that the server takes something off a Unix socket.
    fn wait(&mut self) -> io::Result<()> {
        self.send_scratch()?;
        if !self.stream.buffer().is_empty() {
            return Ok(());
        }
        let timeout = self.timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        loop {
            let mut fds = [PollFd::new(self.stream.get_ref(), PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the next answer; the bytes of a read are dropped.
    ///
    /// # Errors
    /// The connection's; the request's own error is within [`Completed`].
    pub fn complete(&mut self) -> Result<Completed, ClientError> {
        self.complete_with(|stream, len| {
            let mut data = stream.take(u64::from(len));
            let copied = io::copy(&mut data, &mut io::sink())?;
            if copied < u64::from(len) {
                return Err(ClientError::Connection(io::ErrorKind::UnexpectedEof.into()));
            }
            Ok(())
        })
    }

    /// Waits for the next answer, with the bytes of a read in `buffer`, which has its length.
    ///
    /// # Errors
    /// The connection's; the request's own error is within [`Completed`].
    pub fn complete_into(&mut self, buffer: &mut [u8]) -> Result<Completed, ClientError> {
        self.complete_with(|stream, len| {
            if buffer.len() != len as usize {
                return Err(ClientError::Protocol("a read was answered out of turn"));
            }
            Ok(stream.read_exact(buffer)?)
        })
    }

    fn complete_with(
        &mut self,
        take_data: impl FnOnce(&mut BufReader<Stream>, u32) -> Result<(), ClientError>,
    ) -> Result<Completed, ClientError> {
        self.wait()?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        let mut reader = Reader(&head);
        let (Some(SIMPLE_REPLY_MAGIC), Some(error), Some(cookie)) =
            (reader.u32(), reader.u32(), reader.u64())
        else {
            return Err(ClientError::Protocol(
                "a reply doesn't start with its magic number",
            ));
        };
        if self.under_way == 0 || cookie == 0 || cookie >= self.next_cookie {
            return Err(ClientError::Protocol("a reply to nothing"));
        }
        self.under_way -= 1;
        let read = self.reads.remove(&cookie);
        let result = match (error, read) {
            (0, Some(len)) => {
                take_data(&mut self.stream, len)?;
                Ok(())
            }
            (0, None) => Ok(()),
            (error, _) => Err(Errno::from_nbd(error)),
        };
        Ok(Completed { cookie, result })
    }

    /// Says goodbye and closes; the server finishes what is under way.
    ///
    /// # Errors
    /// The connection's.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        let header = RequestHeader {
            flags: 0,
            command: cmd::DISC,
            cookie: self.next_cookie,
            offset: 0,
            len: 0,
        };
        self.send(&header.encode(), &[])?;
        self.send_scratch()?;
        Ok(())
    }
}

/// A length that a request can carry.
fn length(len: usize) -> Result<u32, ClientError> {
    u32::try_from(len)
        .ok()
        .filter(|&len| len <= MAX_REQUEST)
        .ok_or(ClientError::Request(Errno::Invalid))
}

/// Greets and opens the export with `GO`; returns size and flags.
fn negotiate(stream: &mut BufReader<Stream>, export: &str) -> Result<(u64, u16), ClientError> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let mut reader = Reader(&greeting);
    let (Some(NBDMAGIC), Some(IHAVEOPT), Some(flags)) = (reader.u64(), reader.u64(), reader.u16())
    else {
        return Err(ClientError::Protocol("the greeting is wrong"));
    };
    if flags & handshake::FIXED_NEWSTYLE == 0 {
        return Err(ClientError::Protocol(
            "the server is too old (not fixed newstyle)",
        ));
    }
    let answer = u32::from(flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES));
    let name_len = length(export.len())?;
    let mut message = answer.to_be_bytes().to_vec();
    message.extend_from_slice(&IHAVEOPT.to_be_bytes());
    message.extend_from_slice(&opt::GO.to_be_bytes());
    message.extend_from_slice(&(name_len + 8).to_be_bytes());
    message.extend_from_slice(&name_len.to_be_bytes());
    message.extend_from_slice(export.as_bytes());
    message.extend_from_slice(&1u16.to_be_bytes());
    message.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    stream.get_mut().write_all(&message)?;

    let mut found = None;
    for _ in 0..MAX_OPTION_REPLIES {
        let (kind, data) = option_reply(stream, opt::GO)?;
        let mut reader = Reader(&data);
        match kind {
            rep::ACK => {
                return found.ok_or(ClientError::Protocol("the server didn't tell the size"));
            }
            rep::INFO if reader.u16() == Some(info::EXPORT) => {
                found = reader.u64().zip(reader.u16());
            }
            kind if kind & rep::ERROR != 0 => {
                let why = if data.is_empty() {
                    format!("error {}", kind & !rep::ERROR)
                } else {
                    String::from_utf8_lossy(&data).into_owned()
                };
                // Goodbye, for the server's log; the refusal is what counts.
                let mut goodbye = IHAVEOPT.to_be_bytes().to_vec();
                goodbye.extend_from_slice(&opt::ABORT.to_be_bytes());
                goodbye.extend_from_slice(&0u32.to_be_bytes());
                drop(stream.get_mut().write_all(&goodbye));
                let export = export.to_owned();
                return Err(ClientError::Refused { export, why });
            }
            _ => {}
        }
    }
    Err(ClientError::Protocol("the negotiation doesn't end"))
}

fn option_reply(
    stream: &mut BufReader<Stream>,
    option: u32,
) -> Result<(u32, Vec<u8>), ClientError> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let mut reader = Reader(&head);
    let (Some(OPTION_REPLY_MAGIC), Some(answered), Some(kind), Some(len)) =
        (reader.u64(), reader.u32(), reader.u32(), reader.u32())
    else {
        return Err(ClientError::Protocol(
            "an option's answer doesn't start with its magic number",
        ));
    };
    if answered != option {
        return Err(ClientError::Protocol("another option was answered"));
    }
    let len = len as usize;
    if len > 4 * MAX_STRING {
        return Err(ClientError::Protocol("an option's answer is too long"));
    }
    let mut data = vec![0; len];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

/// Either kind of connection.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &NbdAddr, timeout: Option<Duration>) -> io::Result<Self> {
        let stream = match address {
            NbdAddr::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            NbdAddr::Tcp(address) => Self::Tcp(connect_tcp(address, timeout)?),
        };
        stream.set_timeout(timeout)?;
        Ok(stream)
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)
            }
        }
    }
}

/// Tries each address of the name. No delay: a request is not to wait for an acknowledgement.
fn connect_tcp(address: &str, timeout: Option<Duration>) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let attempt = match timeout {
            Some(timeout) => TcpStream::connect_timeout(&address, timeout),
            None => TcpStream::connect(address),
        };
        match attempt {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buffer),
            Self::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
