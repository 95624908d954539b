//! A small fuzzer for stable Rust: seeds until the time is up, each case a function of its seed.
//!
//! `RELEVO_FUZZ_SECONDS` lengthens each fuzz test and starts from a seed of the clock;
//! `RELEVO_FUZZ_SEED` plays one seed, which is what a failure prints.

use std::{
    env, thread,
    time::{Duration, SystemTime},
};

use crate::say;

/// What a fuzz test takes where nobody asked for more.
const SECONDS: u64 = 2;

/// Numbers at which code that counts goes wrong.
const INTERESTING: [u64; 14] = [
    0,
    1,
    7,
    8,
    0x7f,
    0xff,
    0x1000,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    u64::MAX / 2,
    u64::MAX,
];

/// Numbers that depend on nothing but a seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        // Neighbouring seeds shall have nothing in common.
        let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((state ^ (state >> 31)) | 1)
    }

    /// Any number.
    pub const fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, 0 for a limit of 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = limit.max(1) as u64;
        usize::try_from((self.number() >> 16) % limit).unwrap_or(0)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A number that code may stumble over, or a small one, or any.
    pub fn tricky(&mut self) -> u64 {
        match self.below(4) {
            0 => self.number(),
            1 => self.number() % 10,
            _ => INTERESTING[self.below(INTERESTING.len())],
        }
    }

    /// A byte.
    pub const fn byte(&mut self) -> u8 {
        self.number().to_le_bytes()[3]
    }

    /// Bytes, at most `most`.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let len = self.below(most + 1);
        (0..len).map(|_| self.byte()).collect()
    }
}

/// Changes bytes the way broken hardware, software and people do: bits flipped, numbers replaced,
/// pieces zeroed, lost, repeated or moved. Says whether they are others now.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>) -> bool {
    let before = bytes.clone();
    for _ in 0..=random.below(3) {
        mutate_once(random, bytes);
    }
    *bytes != before
}

/// Changes bytes where they are: nothing is lost, repeated or moved. Says whether they are others now.
pub fn spoil(random: &mut Random, bytes: &mut [u8]) -> bool {
    let before = bytes.to_vec();
    for _ in 0..=random.below(3) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(8)).min(bytes.len());
        match random.below(3) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at..end].fill(0),
            _ => bytes[at..end].fill_with(|| random.byte()),
        }
    }
    *bytes != *before
}

fn mutate_once(random: &mut Random, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        bytes.extend(random.bytes(64));
        return;
    }
    let at = random.below(bytes.len());
    let len = 1 + random.below((bytes.len() - at).min(64));
    match random.below(8) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at] = random.byte(),
        3 => {
            let number = random.tricky();
            let width = [1, 2, 4, 8][random.below(4)];
            let raw = if random.one_in(2) {
                number.to_le_bytes()
            } else {
                number.rotate_right(64 - 8 * width).to_be_bytes()
            };
            let end = (at + usize::try_from(width).unwrap_or(8)).min(bytes.len());
            bytes[at..end].copy_from_slice(&raw[..end - at]);
        }
        4 => bytes[at..at + len].fill(0),
        5 => {
            bytes.drain(at..at + len);
        }
        6 => bytes.truncate(at),
        _ => {
            let piece = bytes[at..at + len].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, piece);
        }
    }
}

/// Plays cases until the time is up, and says how many. A case that panics prints its seed.
///
/// # Panics
/// When a case does.
pub fn fuzz(test: &str, mut case: impl FnMut(&mut Random)) {
    let number = |name: &str| {
        env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    if let Some(seed) = number("RELEVO_FUZZ_SEED") {
        case(&mut Random::new(seed));
        return say(format_args!("fuzz {test}: seed {seed} played"));
    }
    let asked = number("RELEVO_FUZZ_SECONDS");
    let start = SystemTime::now();
    // Every day the same seeds, so that nobody's work fails by another one's luck; new ones by
    // night.
    let base = asked.map_or(0, |_| {
        let since = start.duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs()) << 20
    });
    let length = Duration::from_secs(asked.unwrap_or(SECONDS));
    let mut seeds = 0;
    while seeds == 0 || start.elapsed().unwrap_or_default() < length {
        let told = Told {
            test,
            seed: base + seeds,
        };
        case(&mut Random::new(told.seed));
        drop(told);
        seeds += 1;
    }
    say(format_args!("fuzz {test}: {seeds} seeds from {base}"));
}

/// Prints how to play a seed again, if it is dropped by a panic.
struct Told<'a> {
    test: &'a str,
    seed: u64,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let Self { test, seed } = self;
            say(format_args!(
                "fuzz {test}: replay with RELEVO_FUZZ_SEED={seed}"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_all() {
        let play = |seed| {
            let mut random = Random::new(seed);
            let mut bytes = random.bytes(100);
            mutate(&mut random, &mut bytes);
            bytes
        };
        assert_eq!(play(7), play(7));
        assert_ne!(play(7), play(8));
    }

    #[test]
    fn every_kind_of_damage_is_done() {
        let mut random = Random::new(1);
        let whole = vec![0x55; 200];
        let (mut longer, mut shorter, mut same) = (0, 0, 0);
        for _ in 0..1000 {
            let mut bytes = whole.clone();
            if mutate(&mut random, &mut bytes) {
                match bytes.len().cmp(&whole.len()) {
                    std::cmp::Ordering::Less => shorter += 1,
                    std::cmp::Ordering::Equal => same += 1,
                    std::cmp::Ordering::Greater => longer += 1,
                }
            }
        }
        assert!(
            longer > 50 && shorter > 50 && same > 50,
            "{longer} {shorter} {same}"
        );
    }
}
