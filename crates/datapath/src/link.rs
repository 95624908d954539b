//! A link to a peer: socket, TLS session and frames, driven by hand on the volume's thread.

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, IoSlice, Read as _, Write as _},
    net::{Shutdown, TcpStream},
};

use bytes::{Buf as _, Bytes, BytesMut};
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

/// Pieces encrypted with one call: they fill records of 16 KiB together, where one by one each head
/// would be a record of its own.
const SLICES_MAX: usize = 64;

/// Heads of messages share blocks of this many bytes: some hundred of them.
const HEADS_LEN: usize = 8 << 10;

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
    /// Heads that follow what is in `outgoing`.
    heads: BytesMut,
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
            heads: BytesMut::new(),
            outgoing_bytes: 0,
            closing: None,
            notified: false,
            interest: Interest::default(),
        })
    }

    /// Queues a message; [`Self::flush`] sends it.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), String> {
        if self.heads.capacity() < frame::HEADER_BYTES {
            self.heads.reserve(HEADS_LEN);
        }
        let before = self.heads.len();
        let data =
            frame::encode_into(message, &mut self.heads).map_err(|error| error.to_string())?;
        self.outgoing_bytes += self.heads.len() - before;
        if let Some(data) = data {
            self.outgoing_bytes += data.len();
            self.seal_heads();
            self.outgoing.push_back(data);
        }
        if self.outgoing_bytes > OUTGOING_MAX {
            return Err(format!(
                "the peer does not read: {} MiB wait for it",
                self.outgoing_bytes >> 20
            ));
        }
        Ok(())
    }

    fn seal_heads(&mut self) {
        if !self.heads.is_empty() {
            self.outgoing.push_back(self.heads.split().freeze());
        }
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
        self.take_plaintext(messages)?;
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
                self.take_plaintext(messages)?;
            }
            if count < scratch.len() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn take_plaintext(&mut self, messages: &mut Vec<Message>) -> Result<(), String> {
        let state = self
            .tls
            .process_new_packets()
            .map_err(|error| format!("TLS: {error}"))?;
        let mut available = state.plaintext_bytes_to_read();
        let mut reader = self.tls.reader();
        while available > 0 {
            // Where rustls has it: the decoder copies it to where it stays.
            let mut chunk = reader.fill_buf().map_err(|error| error.to_string())?;
            let len = chunk.len();
            while !chunk.is_empty() {
                let message = self.decoder.take(&mut chunk);
                messages.extend(message.map_err(|error| error.to_string())?);
            }
            reader.consume(len);
            available = available.saturating_sub(len.max(1));
        }
        Ok(())
    }

    /// Sends what the socket takes. An error is the end of the link.
    pub(crate) fn flush(&mut self) -> Result<(), String> {
        self.seal_heads();
        loop {
            self.encrypt()?;
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

    /// Hands the TLS session as much of what is queued as it takes.
    fn encrypt(&mut self) -> Result<(), String> {
        while !self.outgoing.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let mut used = 0;
            for (slot, piece) in slices.iter_mut().zip(&self.outgoing) {
                *slot = IoSlice::new(piece);
                used += 1;
            }
            let mut taken = self
                .tls
                .writer()
                .write_vectored(&slices[..used])
                .map_err(|error| error.to_string())?;
            if taken == 0 {
                return Ok(());
            }
            self.outgoing_bytes -= taken;
            while let Some(piece) = self.outgoing.front_mut()
                && taken > 0
            {
                let step = taken.min(piece.len());
                piece.advance(step);
                taken -= step;
                if piece.is_empty() {
                    self.outgoing.pop_front();
                }
            }
        }
        Ok(())
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
