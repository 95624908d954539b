//! NBD listeners and sessions of a volume: sockets around the sans-IO [`Session`].

use std::{
    io::{self, IoSlice, Read as _, Write as _},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use relevo_export::nbd::{CloseReason, Export, NbdRequest, Phase, Session};
use relevo_types::Time;

use crate::{handle::Listener, poller::Interest};

/// Sessions of one volume at most. Clients with several connections use 4 to 16; beyond this they
/// are leaks.
pub(crate) const SESSIONS_MAX: usize = 64;

/// Reads of one session in one turn at most, so that one busy client does not starve the others.
const READS_PER_TURN: usize = 8;

/// Pieces sent with one call.
const SLICES_MAX: usize = 32;

/// A connection of either kind.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }

    fn write(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(from),
            Self::Tcp(stream) => stream.write_vectored(from),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Listener {
    /// The next connection; `None` when there is no more now.
    pub(crate) fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match self {
            Self::Unix(listener, _) => listener.accept().map(|(s, _)| Stream::Unix(s)),
            Self::Tcp(listener) => listener.accept().map(|(s, _)| Stream::Tcp(s)),
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        match &stream {
            Stream::Unix(stream) => stream.set_nonblocking(true)?,
            Stream::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                relevo_transport::net::tune(stream)?;
            }
        }
        Ok(Some(stream))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self
            && let Err(error) = std::fs::remove_file(&*path)
        {
            tracing::debug!(path = %path.display(), %error, "the socket file was gone");
        }
    }
}

/// One client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) stream: Stream,
    pub(crate) session: Session,
    /// What is registered with the poller.
    pub(crate) interest: Interest,
    /// The connection failed; nothing can be sent any more.
    broken: bool,
    /// When a session that is being closed is given up.
    pub(crate) deadline: Option<Time>,
}

impl Client {
    pub(crate) fn new(stream: Stream, exports: Arc<[Export]>) -> Self {
        Self {
            stream,
            session: Session::new(exports),
            interest: Interest::default(),
            broken: false,
            deadline: None,
        }
    }

    /// Takes what the client sent, as far as the session's bounds allow.
    pub(crate) fn receive(&mut self, requests: &mut Vec<NbdRequest>) {
        for _ in 0..READS_PER_TURN {
            self.understood(requests);
            if !self.session.wants_input() {
                return;
            }
            let buffer = self.session.recv_buffer();
            let room = buffer.len();
            match self.stream.read(buffer) {
                Ok(count) => {
                    self.session.received(count);
                    if count > 0 && count < room {
                        // The socket is empty.
                        return self.understood(requests);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.failed(&error),
            }
        }
        self.understood(requests);
    }

    /// Requests that were received but not taken because too much was under way.
    pub(crate) fn understood(&mut self, requests: &mut Vec<NbdRequest>) {
        while let Some(request) = self.session.next_request() {
            requests.push(request);
        }
    }

    /// Sends what the socket takes.
    pub(crate) fn send(&mut self) {
        while self.session.output_len() > 0 && !self.broken {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let used = self.session.output_slices(&mut slices);
            match self.stream.write(&slices[..used]) {
                Ok(count) => self.session.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.failed(&error),
            }
        }
    }

    fn failed(&mut self, error: &io::Error) {
        tracing::debug!(%error, "an NBD connection failed");
        self.broken = true;
        self.session.close(CloseReason::Lost("unexpectedly"));
    }

    /// Takes no more requests; ends when what is under way is answered, at `deadline` at the latest.
    pub(crate) fn close(&mut self, reason: &str, deadline: Time) {
        self.session.close(CloseReason::ByServer(reason.to_owned()));
        self.deadline.get_or_insert(deadline);
    }

    pub(crate) fn is_closing(&self) -> bool {
        matches!(self.session.phase(), Phase::Closing(_))
    }

    pub(crate) fn is_negotiating(&self) -> bool {
        matches!(self.session.phase(), Phase::Negotiating)
    }

    /// The connection can be dropped. Answers to come find nobody.
    pub(crate) fn is_over(&self, now: Time) -> bool {
        self.broken
            || self.session.is_finished()
            || self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// `paused`: the peers can't keep up, take no more requests.
    pub(crate) fn wanted(&self, paused: bool) -> Interest {
        Interest {
            read: self.session.wants_input() && !paused,
            write: self.session.output_len() > 0,
        }
    }
}
