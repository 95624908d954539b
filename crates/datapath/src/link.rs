//! A link to a peer: socket, TLS session and frames, driven by hand on the volume's thread.

use std::{
    collections::VecDeque,
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
};

use bytes::{Buf as _, Bytes};
use relevo_transport::EstablishedLink;
use relevo_types::{NodeId, Time};
use relevo_wire::{Message, frame};
use rustls::Connection;

use crate::poller::Interest;

/// Encrypted and not yet sent, in bytes: one system call's worth.
const TLS_BUFFER: usize = 256 << 10;

/// Read from the socket with one call.
pub(crate) const READ_LEN: usize = 256 << 10;

/// Read from one link in one turn at most, so that one busy peer does not keep the others and the
/// disk waiting.
const READ_PER_TURN: usize = 1 << 20;

/// Queued for a peer before new application requests are no longer taken. A few of the largest
/// requests; more would only be latency.
pub(crate) const OUTGOING_HIGH: usize = 16 << 20;

/// Queued for a peer before the link is given up: what sessions and resync may have under way
/// together is well below, so this is a peer that stopped reading.
const OUTGOING_MAX: usize = 256 << 20;

/// An open link.
pub(crate) struct Link {
    pub(crate) peer: NodeId,
    pub(crate) stream: TcpStream,
    tls: Connection,
    decoder: frame::Decoder,
    outgoing: VecDeque<Bytes>,
    outgoing_bytes: usize,
    /// Send what is left, until then at most, and end.
    closing: Option<Time>,
    notified: bool,
    /// What is registered with the poller.
    pub(crate) interest: Interest,
}

impl Link {
    pub(crate) fn new(established: EstablishedLink) -> io::Result<Self> {
        let EstablishedLink {
            peer,
            stream,
            mut tls,
            ..
        } = established;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        tls.set_buffer_limit(Some(TLS_BUFFER));
        Ok(Self {
            peer,
            stream,
            tls,
            decoder: frame::Decoder::new(),
            outgoing: VecDeque::new(),
            outgoing_bytes: 0,
            closing: None,
            notified: false,
            interest: Interest::default(),
        })
    }

    /// Queues a message; [`Self::flush`] sends it.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), String> {
        let encoded = frame::encode(message).map_err(|error| error.to_string())?;
        self.outgoing_bytes += encoded.len();
        self.outgoing.push_back(encoded.head);
        self.outgoing.extend(encoded.data);
        if self.outgoing_bytes > OUTGOING_MAX {
            return Err(format!(
                "the peer does not read: {} MiB wait for it",
                self.outgoing_bytes >> 20
            ));
        }
        Ok(())
    }

    /// Bytes queued and not yet encrypted.
    pub(crate) const fn outgoing_bytes(&self) -> usize {
        self.outgoing_bytes
    }

    /// Takes what arrived. On an error the messages before it were taken, and the link is over.
    pub(crate) fn receive(
        &mut self,
        scratch: &mut [u8],
        messages: &mut Vec<Message>,
    ) -> Result<(), String> {
        // What came with the handshake.
        self.take_plaintext()?;
        let result = self.read(scratch);
        while let Some(message) = self.decoder.next().map_err(|error| error.to_string())? {
            messages.push(message);
        }
        result
    }

    fn read(&mut self, scratch: &mut [u8]) -> Result<(), String> {
        let mut total = 0;
        while total < READ_PER_TURN {
            let count = match self.stream.read(scratch) {
                Ok(0) => return Err("the peer closed the connection".to_owned()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.to_string()),
            };
            total += count;
            // Through our own buffer: rustls reads the socket 4 KiB at a time.
            let mut received = &scratch[..count];
            while !received.is_empty() {
                self.tls
                    .read_tls(&mut received)
                    .map_err(|error| error.to_string())?;
                self.take_plaintext()?;
            }
            if count < scratch.len() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn take_plaintext(&mut self) -> Result<(), String> {
        let state = self
            .tls
            .process_new_packets()
            .map_err(|error| format!("TLS: {error}"))?;
        let available = state.plaintext_bytes_to_read();
        if available > 0 {
            self.decoder
                .feed_from(&mut self.tls.reader(), available)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Sends what the socket takes. An error is the end of the link.
    pub(crate) fn flush(&mut self) -> Result<(), String> {
        loop {
            while let Some(piece) = self.outgoing.front_mut() {
                let taken = self
                    .tls
                    .writer()
                    .write(piece)
                    .map_err(|error| error.to_string())?;
                if taken == 0 {
                    break;
                }
                self.outgoing_bytes -= taken;
                piece.advance(taken);
                if piece.is_empty() {
                    self.outgoing.pop_front();
                }
            }
            if self.closing.is_some() && self.outgoing.is_empty() && !self.notified {
                self.tls.send_close_notify();
                self.notified = true;
            }
            if !self.tls.wants_write() {
                return Ok(());
            }
            match self.tls.write_tls(&mut self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// Sends what is queued, until `deadline` at most, and then ends; nothing is received any more.
    pub(crate) fn close(&mut self, deadline: Time) {
        self.closing = Some(deadline);
    }

    /// When a closing link is given up.
    pub(crate) const fn closing(&self) -> Option<Time> {
        self.closing
    }

    /// A closing link has sent everything.
    pub(crate) fn is_done(&self) -> bool {
        self.notified && !self.tls.wants_write()
    }

    pub(crate) fn wanted(&self) -> Interest {
        Interest {
            read: self.closing.is_none(),
            write: self.tls.wants_write(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = self.stream.shutdown(Shutdown::Both) {
            tracing::trace!(%error, "the peer was faster");
        }
    }
}
