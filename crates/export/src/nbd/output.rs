//! What a session has to send: small pieces gathered, large ones kept as they are.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, Bytes, BytesMut};

/// Data up to this size is copied behind its header: one copy of a page costs less than another
/// element in the system call, and keeps a burst of 4 KiB reads in few pieces.
const GATHER_MAX: usize = 8 << 10;

/// A gathered piece is closed at this size, so that sending can start while more comes.
const PIECE_MAX: usize = 64 << 10;

/// A queue of bytes to send.
#[derive(Debug, Default)]
pub(crate) struct Output {
    closed: VecDeque<Bytes>,
    /// The piece that is still growing; after all of `closed`.
    open: BytesMut,
    len: usize,
}

impl Output {
    /// Bytes not sent.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Appends a copy.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        if self.open.capacity() - self.open.len() < bytes.len() {
            // The same memory again, if all that was in it is sent.
            self.open.reserve(bytes.len().max(PIECE_MAX));
        }
        self.open.extend_from_slice(bytes);
        self.len += bytes.len();
        if self.open.len() >= PIECE_MAX {
            self.seal();
        }
    }

    /// Appends data, without a copy when it is large.
    pub(crate) fn put_bytes(&mut self, data: Bytes) {
        if data.len() <= GATHER_MAX {
            self.put(&data);
        } else {
            self.seal();
            self.len += data.len();
            self.closed.push_back(data);
        }
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            self.closed.push_back(self.open.split().freeze());
        }
    }

    /// Takes the next piece.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        if self.closed.is_empty() {
            self.seal();
        }
        let piece = self.closed.pop_front()?;
        self.len -= piece.len();
        Some(piece)
    }

    /// Puts what is to be sent into `slices`; returns how many were used.
    pub(crate) fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.seal();
        let mut used = 0;
        for (slot, piece) in slices.iter_mut().zip(&self.closed) {
            *slot = IoSlice::new(piece);
            used += 1;
        }
        used
    }

    /// Drops `count` bytes from the front: they were sent.
    pub(crate) fn sent(&mut self, mut count: usize) {
        self.seal();
        while count > 0 {
            let Some(front) = self.closed.front_mut() else {
                debug_assert!(false, "{count} bytes more were sent than there were");
                return;
            };
            let step = count.min(front.len());
            front.advance(step);
            if front.is_empty() {
                self.closed.pop_front();
            }
            self.len -= step;
            count -= step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_large_data_is_not_copied() {
        let large = Bytes::from(vec![9u8; GATHER_MAX + 1]);
        let mut output = Output::default();
        output.put(b"head");
        output.put_bytes(large.clone());
        output.put_bytes(Bytes::from_static(b"tail"));
        assert_eq!(output.len(), large.len() + 8);

        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(output.slices(&mut slices), 3);
        assert_eq!(slices[1].as_ptr(), large.as_ptr());

        output.sent(5);
        assert_eq!(output.len(), large.len() + 3);
        let mut rest = Vec::new();
        while let Some(piece) = output.pop() {
            rest.extend_from_slice(&piece);
        }
        assert_eq!(rest.len(), large.len() + 3);
        assert!(rest.ends_with(b"\x09tail"));
        assert_eq!(output.len(), 0);
    }
}
