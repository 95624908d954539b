//! Join tokens: the one line that an administrator carries from one machine to the next.
//!
//! `relevo1-` and base32 (lower case, no padding: it survives a double click, a phone call and a
//! terminal that folds case) of the fields in postcard and the first four bytes of their SHA-256
//! against typing errors. Made by the server for `relevo init` and `relevo token`, read by
//! `relevo join`. The secret in it is stored nowhere; the control log keeps its hash.

use std::{fmt, net::SocketAddr, str::FromStr};

use relevo_types::{ClusterId, cluster::NodeKind};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use crate::{
    identity::Fingerprint,
    random::{self, NoRandomness},
};

/// What a token begins with. The digit is the version of what follows.
const PREFIX: &str = "relevo1-";

const CHECK_BYTES: usize = 4;

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Addresses in a token at most; more paths than any node has.
const MAX_ADDRESSES: usize = 16;

/// What a joining machine needs to know, and the right to join once.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The cluster.
    pub cluster: ClusterId,
    /// SHA-256 of its CA's certificate.
    pub ca: Fingerprint,
    /// The secret that the token is about.
    pub secret: [u8; 16],
    /// Control addresses of members, to be tried in order. At least one.
    pub addresses: Vec<SocketAddr>,
    /// What the joiner may become; `None`: either kind.
    pub kind: Option<NodeKind>,
    /// When it ends, in seconds since 1970 by the clock of the node that made it.
    pub expires_unix_s: u64,
}

#[derive(Serialize, Deserialize)]
struct Fields {
    cluster: [u8; 16],
    ca: [u8; 32],
    secret: [u8; 16],
    addresses: Vec<SocketAddr>,
    kind: Option<NodeKind>,
    expires_unix_s: u64,
}

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not look like one.
    #[error(
        "this is no join token: a token begins with `{PREFIX}`; copy the whole line that `relevo init` or `relevo token` printed"
    )]
    NotAToken,
    /// It is of another version.
    #[error(
        "the token is of a version that this Relevo does not know (`{prefix}`); use the same version on both machines"
    )]
    OtherVersion {
        /// What it begins with.
        prefix: String,
    },
    /// A character that tokens don't have.
    #[error(
        "the token has a `{character}` at position {position}, which no token has; copy it again"
    )]
    BadCharacter {
        /// The character.
        character: char,
        /// Its place, from 1.
        position: usize,
    },
    /// The check does not match.
    #[error("a part of the token is missing or was changed; copy the whole token again")]
    Damaged,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the secret: debug output ends in logs.
        f.debug_struct("Token")
            .field("cluster", &self.cluster)
            .field("addresses", &self.addresses)
            .field("kind", &self.kind)
            .field("expires_unix_s", &self.expires_unix_s)
            .finish_non_exhaustive()
    }
}

impl Token {
    /// A token with a new secret.
    ///
    /// # Errors
    /// No randomness.
    pub fn generate(
        cluster: ClusterId,
        ca: Fingerprint,
        addresses: Vec<SocketAddr>,
        kind: Option<NodeKind>,
        expires_unix_s: u64,
    ) -> Result<Self, NoRandomness> {
        Ok(Self {
            cluster,
            ca,
            secret: random::bytes()?,
            addresses,
            kind,
            expires_unix_s,
        })
    }

    /// The name of the token in the control log: SHA-256 of its secret, 64 hex digits.
    #[must_use]
    pub fn hash(&self) -> String {
        Self::hash_of(&self.secret)
    }

    /// The hash of a secret that a joiner showed.
    #[must_use]
    pub fn hash_of(secret: &[u8; 16]) -> String {
        let hash = digest(&SHA256, secret);
        hash.as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = Fields {
            cluster: self.cluster.0,
            ca: self.ca.0,
            secret: self.secret,
            addresses: self.addresses.clone(),
            kind: self.kind,
            expires_unix_s: self.expires_unix_s,
        };
        let mut bytes = postcard::to_stdvec(&fields).map_err(|_| fmt::Error)?;
        let check = digest(&SHA256, &bytes);
        bytes.extend_from_slice(&check.as_ref()[..CHECK_BYTES]);
        write!(f, "{PREFIX}{}", to_base32(&bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim().to_ascii_lowercase();
        let Some(body) = text.strip_prefix(PREFIX) else {
            return Err(other_prefix(&text));
        };
        let bytes = from_base32(body)?;
        let (fields, check) = bytes
            .split_last_chunk::<CHECK_BYTES>()
            .ok_or(TokenError::Damaged)?;
        if digest(&SHA256, fields).as_ref()[..CHECK_BYTES] != *check {
            return Err(TokenError::Damaged);
        }
        let fields: Fields = postcard::from_bytes(fields).map_err(|_| TokenError::Damaged)?;
        if fields.addresses.is_empty() || fields.addresses.len() > MAX_ADDRESSES {
            return Err(TokenError::Damaged);
        }
        Ok(Self {
            cluster: ClusterId(fields.cluster),
            ca: Fingerprint(fields.ca),
            secret: fields.secret,
            addresses: fields.addresses,
            kind: fields.kind,
            expires_unix_s: fields.expires_unix_s,
        })
    }
}

fn other_prefix(text: &str) -> TokenError {
    let version = text
        .strip_prefix("relevo")
        .and_then(|rest| rest.split_once('-'))
        .map(|(version, _)| version)
        .filter(|version| !version.is_empty() && version.chars().all(|c| c.is_ascii_digit()));
    match version {
        Some(version) => TokenError::OtherVersion {
            prefix: format!("relevo{version}-"),
        },
        None => TokenError::NotAToken,
    }
}

fn to_base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 8 / 5 + 1);
    let (mut bits, mut count) = (0u32, 0);
    for byte in bytes {
        bits = bits << 8 | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(char::from(ALPHABET[(bits >> count & 31) as usize]));
        }
    }
    if count > 0 {
        text.push(char::from(ALPHABET[(bits << (5 - count) & 31) as usize]));
    }
    text
}

fn from_base32(text: &str) -> Result<Vec<u8>, TokenError> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut bits, mut count) = (0u32, 0);
    for (at, character) in text.chars().enumerate() {
        let digit = ALPHABET
            .iter()
            .position(|digit| char::from(*digit) == character)
            .and_then(|digit| u32::try_from(digit).ok())
            .ok_or(TokenError::BadCharacter {
                character,
                position: PREFIX.len() + at + 1,
            })?;
        bits = (bits << 5 | digit) & 0xffff;
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token {
            cluster: ClusterId([1; 16]),
            ca: Fingerprint([2; 32]),
            secret: [3; 16],
            addresses: vec![
                "10.0.0.1:7620".parse().unwrap(),
                "[fd00::1]:7620".parse().unwrap(),
            ],
            kind: Some(NodeKind::Witness),
            expires_unix_s: 1_800_000_000,
        }
    }

    #[test]
    fn a_token_survives_being_written_down() {
        let text = token().to_string();
        assert!(text.starts_with("relevo1-"), "{text}");
        assert!(
            text[8..]
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        );
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!("  {}\n", text.to_uppercase()).parse(), Ok(token()));
    }

    #[test]
    fn golden_token() {
        let fields = from_base32(&token().to_string()[8..]).unwrap();
        let hex: String = fields.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            &hex[..hex.len() - 8],
            "01010101010101010101010101010101\
             0202020202020202020202020202020202020202020202020202020202020202\
             03030303030303030303030303030303\
             02000a000001c43b01fd000000000000000000000000000001c43b\
             0101\
             80a4a7da06"
        );
    }

    #[test]
    fn the_hash_is_sha256_of_the_secret() {
        assert_eq!(
            Token::hash_of(b"0123456789abcdef"),
            "9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f"
        );
    }

    #[test]
    fn errors_say_what_is_wrong() {
        assert_eq!("hello".parse::<Token>(), Err(TokenError::NotAToken));
        assert_eq!(
            "relevo2-abc".parse::<Token>(),
            Err(TokenError::OtherVersion {
                prefix: "relevo2-".to_owned()
            })
        );
        assert_eq!(
            "relevo1-ab!".parse::<Token>(),
            Err(TokenError::BadCharacter {
                character: '!',
                position: 11
            })
        );
        assert_eq!("relevo1-".parse::<Token>(), Err(TokenError::Damaged));
        let text = token().to_string();
        assert_eq!(
            text[..text.len() - 3].parse::<Token>(),
            Err(TokenError::Damaged)
        );
    }

    #[test]
    fn the_secret_is_not_in_debug_output() {
        assert!(!format!("{:?}", token()).contains('3'.to_string().repeat(2).as_str()));
        assert!(!format!("{:?}", token()).contains("secret"));
    }

    proptest! {
        #[test]
        fn base32_reads_what_it_writes(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(from_base32(&to_base32(&bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_is_refused_or_read_without_a_panic(text in "(relevo1-)?[a-z2-7]{0,300}") {
            prop_assert!(text.parse::<Token>().is_err());
        }

        #[test]
        fn a_changed_character_is_noticed(at in 8usize..100, to in 0usize..32) {
            let mut text = token().to_string().into_bytes();
            prop_assume!(text[at] != ALPHABET[to]);
            text[at] = ALPHABET[to];
            prop_assert_eq!(
                String::from_utf8(text).unwrap().parse::<Token>(),
                Err(TokenError::Damaged)
            );
        }
    }
}
