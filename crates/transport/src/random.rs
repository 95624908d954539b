//! Random bytes from the operating system, for keys, secrets and ids.

use ring::rand::{SecureRandom as _, SystemRandom};

/// The operating system gave no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the operating system gave no random bytes; is /dev/urandom accessible?")]
pub struct NoRandomness;

/// `N` random bytes.
///
/// # Errors
/// The operating system gave none.
pub fn bytes<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| NoRandomness)?;
    Ok(bytes)
}

/// A random number that is not 0.
///
/// # Errors
/// The operating system gave none.
pub fn nonzero_u64() -> Result<u64, NoRandomness> {
    loop {
        let number = u64::from_le_bytes(bytes()?);
        if number != 0 {
            return Ok(number);
        }
    }
}
