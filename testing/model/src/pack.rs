//! A state as few bytes, and back, by one description of its fields.

/// Reads or writes fields of a few bits.
pub trait Bits {
    /// The next field: `width` bits, at most 8. A writer takes it from `value`, a reader puts it there.
    fn bits(&mut self, value: &mut u8, width: u32);

    /// The next field, of one bit.
    fn flag(&mut self, value: &mut bool) {
        let mut bit = u8::from(*value);
        self.bits(&mut bit, 1);
        *value = bit != 0;
    }
}

/// Writes fields, the lowest bit of each first.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    used: u32,
    rest: u16,
}

impl Writer {
    /// Begins anew.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.used = 0;
        self.rest = 0;
    }

    /// What was written, filled up to a whole byte.
    pub fn finish(&mut self) -> &[u8] {
        if self.used > 0 {
            self.bytes.push(self.rest.to_le_bytes()[0]);
            self.used = 0;
            self.rest = 0;
        }
        &self.bytes
    }
}

impl Bits for Writer {
    fn bits(&mut self, value: &mut u8, width: u32) {
        debug_assert!(u32::from(*value) < 1 << width, "{value} in {width} bits");
        self.rest |= u16::from(*value) << self.used;
        self.used += width;
        if self.used >= 8 {
            self.bytes.push(self.rest.to_le_bytes()[0]);
            self.rest >>= 8;
            self.used -= 8;
        }
    }
}

/// Reads what a [`Writer`] wrote.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    used: u32,
}

impl<'a> Reader<'a> {
    /// At the beginning of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, used: 0 }
    }
}

impl Bits for Reader<'_> {
    fn bits(&mut self, value: &mut u8, width: u32) {
        let second = self.bytes.get(1).copied().unwrap_or(0);
        let both = u16::from_le_bytes([self.bytes[0], second]);
        let mask = (1_u16 << width) - 1;
        *value = ((both >> self.used) & mask).to_le_bytes()[0];
        self.used += width;
        if self.used >= 8 {
            self.bytes = &self.bytes[1..];
            self.used -= 8;
        }
    }
}
