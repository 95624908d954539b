//! Identifiers and counters. Each is a newtype so that none can be taken for another.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

number! {
    /// A machine of the cluster; given by the control log when it joins, never used again.
    NodeId(u32), "n"
}
number! {
    /// A replicated volume; given by the control log, never used again.
    VolumeId(u32), "v"
}
number! {
    /// A service; given by the control log, never used again.
    ServiceId(u32), "s"
}
number! {
    /// The number of a volume's configuration {primary, in-sync set}. Only grows (DESIGN, rule 1).
    Epoch(u64), "e"
}
number! {
    /// Position of a write within the epoch in which its primary accepted it. Starts at 1.
    Seq(u64), "#"
}
number! {
    /// A random number drawn at each start of a process: tells a restarted peer from a
    /// reconnected one.
    Instance(u64), "i"
}
number! {
    /// The number under which a node may hold a lease. Once a majority of the voters has
    /// condemned it, the node gets no lease until the control log gives it the next number.
    LeaseGeneration(u64), "g"
}
number! {
    /// A volume's history. A forced promotion starts a new one (DESIGN, rule 9). Random, not 0.
    LineageId(u64), "l"
}
number! {
    /// Which of a volume's bitmaps belongs to a replica: 0 to 6, fixed while the replica exists.
    ReplicaSlot(u8), "r"
}

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Seq {
    /// The position after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl LeaseGeneration {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl ReplicaSlot {
    /// How many replicas a volume can have, and so how many bitmaps its metadata holds.
    pub const COUNT: usize = 7;

    /// The slot as an index below [`Self::COUNT`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The identity of a cluster: 16 random bytes drawn by `relevo init`, written as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ClusterId {
    type Err = ParseClusterIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0u8; 16];
        if text.len() != 32 || !text.is_ascii() {
            return Err(ParseClusterIdError);
        }
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| ParseClusterIdError)?;
        }
        Ok(Self(bytes))
    }
}

/// The text is not 32 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a cluster id is 32 hex digits")]
pub struct ParseClusterIdError;

impl Serialize for ClusterId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ClusterId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_id_reads_what_it_writes() {
        let id = ClusterId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 254, 255]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("12".parse::<ClusterId>(), Err(ParseClusterIdError));
        assert_eq!(
            "zz".repeat(16).parse::<ClusterId>(),
            Err(ParseClusterIdError)
        );
    }
}
