//! A link to a peer: socket, TLS session, if it is encrypted, and frames, driven by hand on the volume's
//! thread.

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, IoSlice, Read as _, Write as _},
    net::{Shutdown, TcpStream},
};

use bytes::{Buf as _, Bytes, BytesMut};
use relevo_transport::EstablishedLink;
use relevo_types::{NodeId, Time, cluster::Encryption};
use relevo_wire::{Message, frame};
use rustls::Connection;

use crate::poller::Interest;

/// Encrypted and not yet sent, in bytes: one system call's worth.
const TLS_BUFFER: usize = 256 << 10;

/// Read from the socket with one call.
pub(crate) const READ_LEN: usize = 256 << 10;

/// Without encryption: from this much missing on, data is read to where it stays, instead of being copied
/// there from the same call as what precedes and follows it.
const DIRECT_MIN: usize = 64 << 10;

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
    /// `None`: frames go as they are.
    tls: Option<Connection>,
    decoder: frame::Decoder,
    outgoing: VecDeque<Bytes>,
    /// Heads that follow what is in `outgoing`.
    heads: BytesMut,
    outgoing_bytes: usize,
    /// Send what is left, until then at most, and end.
    closing: Option<Time>,
    notified: bool,
    /// It continues that connection, whose last message was not read yet; nothing is read here before.
    pub(crate) follows: Option<u32>,
    /// [`Message::Moved`] was queued: what follows goes elsewhere.
    pub(crate) moved_out: bool,
    /// It was read: what follows comes elsewhere.
    pub(crate) moved_in: bool,
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
        if let Some(tls) = &mut tls {
            tls.set_buffer_limit(Some(TLS_BUFFER));
        }
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
            follows: None,
            moved_out: false,
            moved_in: false,
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

    pub(crate) const fn encryption(&self) -> Encryption {
        match self.tls {
            Some(_) => Encryption::On,
            None => Encryption::Off,
        }
    }

    /// Bytes queued and not yet encrypted, or not yet sent.
    pub(crate) const fn outgoing_bytes(&self) -> usize {
        self.outgoing_bytes
    }

    /// Takes what arrived. On an error the messages before it were taken, and the link is over.
    pub(crate) fn receive(
        &mut self,
        scratch: &mut [u8],
        messages: &mut Vec<Message>,
    ) -> Result<(), String> {
        if let Some(tls) = &mut self.tls {
            // What came with the handshake.
            take_plaintext(tls, &mut self.decoder, messages)?;
        }
        let mut total = 0;
        while total < READ_PER_TURN {
            // The rest of a long payload goes where it stays.
            let direct = match &self.tls {
                Some(_) => None,
                None => self.decoder.place(DIRECT_MIN, READ_LEN),
            };
            let is_direct = direct.is_some();
            let place = direct.unwrap_or(&mut *scratch);
            let room = place.len();
            let count = match self.stream.read(place) {
                Ok(0) => return Err("the peer closed the connection".to_owned()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.to_string()),
            };
            total += count;
            let mut received = &scratch[..count];
            match &mut self.tls {
                _ if is_direct => {
                    let message = self.decoder.placed(count);
                    messages.extend(message.map_err(|error| error.to_string())?);
                }
                None => decode(&mut self.decoder, received, messages)?,
                // Through our own buffer: rustls reads the socket 4 KiB at a time.
                Some(tls) => {
                    while !received.is_empty() {
                        tls.read_tls(&mut received)
                            .map_err(|error| error.to_string())?;
                        take_plaintext(tls, &mut self.decoder, messages)?;
                    }
                }
            }
            if count < room {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends what the socket takes. An error is the end of the link.
    pub(crate) fn flush(&mut self) -> Result<(), String> {
        self.seal_heads();
        loop {
            self.encrypt()?;
            if self.closing.is_some() && self.outgoing.is_empty() && !self.notified {
                if let Some(tls) = &mut self.tls {
                    tls.send_close_notify();
                }
                self.notified = true;
            }
            if !self.wants_write() {
                return Ok(());
            }
            match self.write() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn wants_write(&self) -> bool {
        match &self.tls {
            Some(tls) => tls.wants_write(),
            None => !self.outgoing.is_empty(),
        }
    }

    /// One call.
    fn write(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.write_tls(&mut self.stream)?;
            return Ok(());
        }
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let used = fill_slices(&self.outgoing, &mut slices);
        let taken = self.stream.write_vectored(&slices[..used])?;
        self.taken(taken);
        Ok(())
    }

    /// Hands the TLS session, if there is one, as much of what is queued as it takes.
    fn encrypt(&mut self) -> Result<(), String> {
        while let Some(tls) = &mut self.tls
            && !self.outgoing.is_empty()
        {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let used = fill_slices(&self.outgoing, &mut slices);
            let taken = tls.writer().write_vectored(&slices[..used]);
            let taken = taken.map_err(|error| error.to_string())?;
            if taken == 0 {
                return Ok(());
            }
            self.taken(taken);
        }
        Ok(())
    }

    /// Drops from what is queued.
    fn taken(&mut self, mut bytes: usize) {
        self.outgoing_bytes -= bytes;
        while let Some(piece) = self.outgoing.front_mut()
            && bytes > 0
        {
            let step = bytes.min(piece.len());
            piece.advance(step);
            bytes -= step;
            if piece.is_empty() {
                self.outgoing.pop_front();
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
        self.notified && !self.wants_write()
    }

    /// All that belongs to this connection was sent and read: another one continues it.
    pub(crate) fn has_moved(&self) -> bool {
        let sent = self.outgoing.is_empty() && self.heads.is_empty() && !self.wants_write();
        self.moved_out && self.moved_in && sent
    }

    pub(crate) fn wanted(&self) -> Interest {
        Interest {
            read: self.closing.is_none() && self.follows.is_none(),
            write: self.wants_write(),
        }
    }
}

fn fill_slices<'a>(pieces: &'a VecDeque<Bytes>, slices: &mut [IoSlice<'a>]) -> usize {
    let mut used = 0;
    for (slot, piece) in slices.iter_mut().zip(pieces) {
        *slot = IoSlice::new(piece);
        used += 1;
    }
    used
}

/// The messages in what the TLS session decrypted.
fn take_plaintext(
    tls: &mut Connection,
    decoder: &mut frame::Decoder,
    messages: &mut Vec<Message>,
) -> Result<(), String> {
    let state = tls
        .process_new_packets()
        .map_err(|error| format!("TLS: {error}"))?;
    let mut available = state.plaintext_bytes_to_read();
    let mut reader = tls.reader();
    while available > 0 {
        // Where rustls has it: the decoder copies it to where it stays.
        let chunk = reader.fill_buf().map_err(|error| error.to_string())?;
        let len = chunk.len();
        decode(decoder, chunk, messages)?;
        reader.consume(len);
        available = available.saturating_sub(len.max(1));
    }
    Ok(())
}

fn decode(
    decoder: &mut frame::Decoder,
    mut bytes: &[u8],
    messages: &mut Vec<Message>,
) -> Result<(), String> {
    while !bytes.is_empty() {
        let message = decoder.take(&mut bytes);
        messages.extend(message.map_err(|error| error.to_string())?);
    }
    Ok(())
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = self.stream.shutdown(Shutdown::Both) {
            tracing::trace!(%error, "the peer was faster");
        }
    }
}
