//! The first bytes on a data link: which cluster, which volume, which protocol versions, and what follows.

use relevo_types::{ClusterId, VolumeId, cluster::Encryption};

use super::{PROTOCOL_MAX, PROTOCOL_MIN};

/// Length of an encoded [`LinkHello`]; never changes, whatever the version.
pub const LINK_HELLO_BYTES: usize = 36;

/// On a link without encryption: the first plain bytes, by the dialing side once it has read the answer to its
/// greeting. The other side sends none before it has them, so no end takes plain bytes for TLS.
pub const PLAIN_START: [u8; 8] = *b"RELEVOPL";

const MAGIC: [u8; 8] = *b"RELEVODL";

/// In the flags: the sender wants what follows the greetings without encryption.
const FLAG_PLAIN: u8 = 1;

/// In the flags: the dialing side moves the link that there is to this connection.
const FLAG_CONTINUES: u8 = 2;

/// A version of the data-link protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ProtocolVersion(pub u8);

/// What both sides say first on a new link. Each checks the other's with [`Self::agree`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkHello {
    /// The oldest version that the sender speaks.
    pub protocol_min: ProtocolVersion,
    /// The newest version that the sender speaks.
    pub protocol_max: ProtocolVersion,
    /// The sender's cluster.
    pub cluster: ClusterId,
    /// The volume that the link is for.
    pub volume: VolumeId,
    /// What the sender wants to follow the greetings: what its volume's configuration says.
    pub encryption: Encryption,
    /// The dialing side moves the link that there is to this connection.
    pub continues: bool,
}

/// Why a link can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The other side is not a data port of Relevo.
    #[error(
        "the other side does not speak Relevo's data-link protocol; is it a data port, and of Relevo?"
    )]
    NotRelevo,
    /// The checksum does not match.
    #[error("the greeting was damaged on the way")]
    Checksum,
    /// Another cluster.
    #[error("the other side belongs to cluster {theirs}, this node to {ours}")]
    OtherCluster {
        /// This node's.
        ours: ClusterId,
        /// The other side's.
        theirs: ClusterId,
    },
    /// Another volume.
    #[error("the other side answered for volume {theirs}, not {ours}")]
    OtherVolume {
        /// This side's.
        ours: VolumeId,
        /// The other side's.
        theirs: VolumeId,
    },
    /// One side would encrypt, the other would not.
    #[error(
        "this link's encryption is `{}` here and `{}` at the other side: the change of the option `encryption` has not reached both yet; it is tried again",
        ours.word(), theirs.word()
    )]
    Encryption {
        /// This side's.
        ours: Encryption,
        /// The other side's.
        theirs: Encryption,
    },
    /// No common version.
    #[error(
        "the other side speaks data-link protocol {} to {}, this node {} to {}; update the older one",
        theirs.0.0, theirs.1.0, ours.0.0, ours.1.0
    )]
    NoCommonVersion {
        /// This side's oldest and newest.
        ours: (ProtocolVersion, ProtocolVersion),
        /// The other side's oldest and newest.
        theirs: (ProtocolVersion, ProtocolVersion),
    },
}

impl LinkHello {
    /// This build's greeting.
    #[must_use]
    pub const fn new(cluster: ClusterId, volume: VolumeId, encryption: Encryption) -> Self {
        Self {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            cluster,
            volume,
            encryption,
            continues: false,
        }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; LINK_HELLO_BYTES] {
        let mut bytes = [0; LINK_HELLO_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8] = self.protocol_min.0;
        bytes[9] = self.protocol_max.0;
        let plain = match self.encryption {
            Encryption::On => 0,
            Encryption::Off => FLAG_PLAIN,
        };
        bytes[10] = plain | if self.continues { FLAG_CONTINUES } else { 0 };
        // 11 is reserved, zero.
        bytes[12..28].copy_from_slice(&self.cluster.0);
        bytes[28..32].copy_from_slice(&self.volume.0.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..32]);
        bytes[32..36].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// They are no greeting, or damaged.
    pub fn decode(bytes: &[u8; LINK_HELLO_BYTES]) -> Result<Self, HelloError> {
        if bytes[0..8] != MAGIC {
            return Err(HelloError::NotRelevo);
        }
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if crc32c::crc32c(&bytes[..32]) != word(32) {
            return Err(HelloError::Checksum);
        }
        let mut cluster = [0; 16];
        cluster.copy_from_slice(&bytes[12..28]);
        Ok(Self {
            protocol_min: ProtocolVersion(bytes[8]),
            protocol_max: ProtocolVersion(bytes[9]),
            cluster: ClusterId(cluster),
            volume: VolumeId(word(28)),
            encryption: if bytes[10] & FLAG_PLAIN == 0 {
                Encryption::On
            } else {
                Encryption::Off
            },
            continues: bytes[10] & FLAG_CONTINUES != 0,
        })
    }

    /// The newest version that both sides speak.
    ///
    /// # Errors
    /// The two are not about the same volume of the same cluster, share no version, or differ in whether to
    /// encrypt: neither side ever gives in.
    pub fn agree(&self, theirs: &Self) -> Result<ProtocolVersion, HelloError> {
        if self.cluster != theirs.cluster {
            return Err(HelloError::OtherCluster {
                ours: self.cluster,
                theirs: theirs.cluster,
            });
        }
        if self.volume != theirs.volume {
            return Err(HelloError::OtherVolume {
                ours: self.volume,
                theirs: theirs.volume,
            });
        }
        let newest = self.protocol_max.min(theirs.protocol_max);
        if newest < self.protocol_min.max(theirs.protocol_min) {
            return Err(HelloError::NoCommonVersion {
                ours: (self.protocol_min, self.protocol_max),
                theirs: (theirs.protocol_min, theirs.protocol_max),
            });
        }
        if self.encryption != theirs.encryption {
            return Err(HelloError::Encryption {
                ours: self.encryption,
                theirs: theirs.encryption,
            });
        }
        Ok(newest)
    }
}
