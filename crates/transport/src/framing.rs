//! Frames on a byte stream that loses, alters and adds bytes: a serial line.
//!
//! COBS (Cheshire and Baker, "Consistent overhead byte stuffing", 1999): a frame has no zero byte in it, and one
//! before and one after it. Whatever happened before, the next zero is the border of a frame, so a reader
//! is back in step with the next frame that arrives whole. What stands between two zeroes and makes no sense
//! is counted and passed over; that what makes sense is authentic is its user's to find out. Pure.

/// The longest content of a frame.
pub const CONTENT_MAX: usize = 1400;

/// The longest frame between its zeroes: a byte more for each 254.
const FRAME_MAX: usize = CONTENT_MAX + CONTENT_MAX.div_ceil(254) + 1;

/// A block's length byte that says: 254 bytes follow, and no zero after them.
const FULL: u8 = 0xff;

/// The content as a frame, with the zero before it (which ends what noise may have left) and the one after it.
/// `None` if it is too long.
#[must_use]
pub fn frame(content: &[u8]) -> Option<Vec<u8>> {
    if content.len() > CONTENT_MAX {
        return None;
    }
    let mut bytes = vec![0];
    let mut rest = content;
    loop {
        let run = rest.iter().take(254).take_while(|byte| **byte != 0).count();
        // At most 254, so that it fits.
        bytes.push(u8::try_from(run + 1).unwrap_or(FULL));
        bytes.extend_from_slice(&rest[..run]);
        if run == 254 && rest.len() > run {
            rest = &rest[run..];
        } else if run < rest.len() {
            rest = &rest[run + 1..];
        } else {
            break;
        }
    }
    bytes.push(0);
    Some(bytes)
}

/// Finds frames in what arrives.
#[derive(Debug, Default)]
pub struct Deframer {
    /// What came since the last zero, at most [`FRAME_MAX`] bytes.
    pending: Vec<u8>,
    /// More came than a frame can have: it is passed over up to the next zero.
    overlong: bool,
    damaged: u64,
}

impl Deframer {
    /// Takes bytes in, and gives the content of each frame that they complete.
    pub fn push(&mut self, bytes: &[u8], mut found: impl FnMut(&[u8])) {
        for byte in bytes {
            if *byte != 0 {
                if self.pending.len() == FRAME_MAX {
                    self.overlong = true;
                } else {
                    self.pending.push(*byte);
                }
                continue;
            }
            if self.overlong {
                self.damaged += 1;
            } else if !self.pending.is_empty() {
                match content(&self.pending) {
                    Some(content) => found(&content),
                    None => self.damaged += 1,
                }
            }
            self.pending.clear();
            self.overlong = false;
        }
    }

    /// What stood between two zeroes and was no frame.
    #[must_use]
    pub const fn damaged(&self) -> u64 {
        self.damaged
    }
}

/// The content of a frame without its zeroes; `None`: it is none.
fn content(frame: &[u8]) -> Option<Vec<u8>> {
    let mut content = Vec::with_capacity(frame.len());
    let mut rest = frame;
    while let Some((length, after)) = rest.split_first() {
        let (block, after) = after.split_at_checked(usize::from(length.checked_sub(1)?))?;
        content.extend_from_slice(block);
        if *length != FULL && !after.is_empty() {
            content.push(0);
        }
        rest = after;
    }
    (content.len() <= CONTENT_MAX).then_some(content)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(deframer: &mut Deframer, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        deframer.push(bytes, |content| found.push(content.to_vec()));
        found
    }

    #[test]
    fn known_frames() {
        // Examples of the paper's rules.
        for (content, framed) in [
            (vec![], vec![0, 1, 0]),
            (vec![0], vec![0, 1, 1, 0]),
            (
                vec![0x11, 0x22, 0, 0x33],
                vec![0, 3, 0x11, 0x22, 2, 0x33, 0],
            ),
        ] {
            assert_eq!(frame(&content).unwrap(), framed);
            assert_eq!(read(&mut Deframer::default(), &framed), [content]);
        }
        let long = [vec![7; 254], vec![8]].concat();
        let framed = frame(&long).unwrap();
        assert_eq!((framed[1], framed[256]), (FULL, 2));
        assert_eq!(read(&mut Deframer::default(), &framed), [long]);
        assert!(frame(&[1; CONTENT_MAX + 1]).is_none());
        assert_eq!(frame(&[1; CONTENT_MAX]).unwrap().len(), FRAME_MAX + 1);
    }

    #[test]
    fn noise_without_end_is_held_in_bounds() {
        let mut deframer = Deframer::default();
        for _ in 0..1000 {
            assert!(read(&mut deframer, &[0x55; 4096]).is_empty());
            assert!(deframer.pending.capacity() <= 2 * FRAME_MAX);
        }
        let framed = frame(b"after it").unwrap();
        assert_eq!(read(&mut deframer, &framed), [b"after it"]);
        assert_eq!(deframer.damaged(), 1);
    }

    proptest! {
        #[test]
        fn what_is_framed_is_found_in_any_pieces(
            contents in prop::collection::vec(prop::collection::vec(0u8..4, 0..600), 1..5),
            piece in 1usize..40,
        ) {
            let bytes: Vec<u8> = contents.iter().flat_map(|content| frame(content).unwrap()).collect();
            let mut deframer = Deframer::default();
            let found: Vec<Vec<u8>> =
                bytes.chunks(piece).flat_map(|piece| read(&mut deframer, piece)).collect();
            prop_assert_eq!(found, contents);
            prop_assert_eq!(deframer.damaged(), 0);
        }

        /// Whatever came before: bytes that are noise, frames that were cut, bytes lost or altered in them.
        #[test]
        fn after_anything_the_next_whole_frame_is_found(
            noise in prop::collection::vec(any::<u8>(), 0..4000),
            broken in prop::collection::vec(any::<u8>(), 0..300),
            lost in any::<prop::sample::Index>(),
            content in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut deframer = Deframer::default();
            read(&mut deframer, &noise);
            let mut half = frame(&broken).unwrap();
            half.remove(lost.index(half.len()));
            read(&mut deframer, &half);
            let found = read(&mut deframer, &frame(&content).unwrap());
            prop_assert_eq!(found.last(), Some(&content));
            prop_assert!(found.len() <= 2);
            prop_assert!(deframer.pending.len() <= FRAME_MAX);
        }
    }
}
