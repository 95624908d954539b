//! What an administrator may choose for a volume, under the names that DRBD has for it.

use serde::{Deserialize, Serialize};

use super::{ClusterState, Protocol};
use crate::{NodeId, VolumeId};

/// The choices for one volume. They may change while it is in use.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VolumeOptions {
    /// What requests do while the cluster can't agree on a smaller in-sync set.
    pub on_no_quorum: OnLoss,
    /// Pairs of replicas whose protocol is not the weaker one of the two replicas' own.
    pub protocols: Vec<PairProtocol>,
    /// A node whose replica of protocol A may be in the in-sync set for a while, as before a planned
    /// switchover to it.
    pub admit: Option<NodeId>,
    /// What happens when a replica of protocol A does not keep up.
    pub congestion: Congestion,
    /// The primary compares the other replicas with its own this often, in seconds; `None`: only when
    /// it is asked to.
    pub verify_every_s: Option<u32>,
    /// What becomes of a read that no replica can serve.
    #[serde(default)]
    pub on_io_error: OnIoError,
    /// What requests do when the last replica that was in sync has lost its disk.
    #[serde(default)]
    pub on_no_data: OnNoData,
    /// When a disk that does not answer counts as failed.
    #[serde(default)]
    pub disk_timeout: DiskTimeout,
    /// Whether a resync compares digests of blocks before it copies them.
    #[serde(default)]
    pub csums: Csums,
    /// How fast resyncs and verifications go.
    #[serde(default)]
    pub sync_rate: SyncRate,
    /// Its resyncs on a node wait while those of this volume are under way there.
    #[serde(default)]
    pub resync_after: Option<VolumeId>,
    /// Which side gives way when two histories of the volume meet and both have changes of their own.
    #[serde(default)]
    pub after_split_brain: AfterSplitBrain,
    /// Whether the data links between the replicas are encrypted.
    #[serde(default)]
    pub encryption: Encryption,
}

/// `encryption`: what data links are once both ends have proved who they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Encryption {
    /// TLS.
    #[default]
    On,
    /// Plain TCP, on whatever path: for cables that nobody else is on. Who is on them can read, and with
    /// some effort change, what replicas say to each other; checksums are against accidents only.
    Off,
}

/// `on-io-error`: what becomes of a read of the primary's disk that fails, and that no other replica in
/// sync can answer. Failed writes and flushes always take the replica out of use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum OnIoError {
    /// The replica is out of use.
    #[default]
    Detach,
    /// The application gets the error, and the replica stays.
    PassOn,
}

/// `on-no-data-accessible`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum OnNoData {
    /// Requests fail.
    #[default]
    Error,
    /// Requests wait, unanswered, until their connection ends: when the volume is attached again or
    /// opens elsewhere.
    Suspend,
}

/// `disk-timeout`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskTimeout {
    /// Seconds that one operation of the disk may take; `None`: any time.
    pub seconds: Option<u32>,
}

impl Default for DiskTimeout {
    /// The kernel gives a SCSI disk 30 seconds for one try.
    fn default() -> Self {
        Self { seconds: Some(30) }
    }
}

/// `csums`: whether a resync sends digests first, and then only the blocks that differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Csums {
    /// As long as at least one block in eight turns out to be the same.
    #[default]
    Auto,
    /// Always.
    Yes,
    /// Never.
    No,
}

/// How fast resyncs and verifications of a volume go together, in bytes a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SyncRate {
    /// `resync-rate`: always this fast; `None`: by what applications leave.
    pub fixed: Option<u64>,
    /// `c-min-rate`: at least this fast, however applications fare.
    pub min: u64,
    /// `c-max-rate`: at most this fast, even if nobody else wants anything.
    pub max: Option<u64>,
}

impl SyncRate {
    /// What a rate may be. Below the lower end one piece of 128 KiB would take longer than 2 s.
    pub const RATES: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 40;
}

impl Default for SyncRate {
    /// The least is what a single disk that turns can do beside an application: a terabyte takes three
    /// days then, at the worst.
    fn default() -> Self {
        Self {
            fixed: None,
            min: 4 << 20,
            max: None,
        }
    }
}

/// `after-split-brain`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum AfterSplitBrain {
    /// Both stand alone until a person decides.
    #[default]
    Disconnect,
    /// The side without changes, if there is one; else both stand alone.
    DiscardZeroChanges,
    /// The side that changed fewer blocks.
    DiscardLeastChanges,
    /// The side whose history is the older one: that of the primary before the fork.
    DiscardOlderPrimary,
    /// The side whose history is the younger one: that of the forced promotion.
    DiscardYoungerPrimary,
    /// The replica of this node.
    Discard(NodeId),
}

/// The protocol of one pair of replicas.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PairProtocol {
    /// The two nodes, the lower one first.
    pub nodes: [NodeId; 2],
    /// The protocol between them.
    pub protocol: Protocol,
}

/// How far a replica of protocol A may be behind, and what happens then.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Congestion {
    /// `sndbuf-size`: bytes under way to such a replica at most, [`Self::SNDBUF`].
    pub sndbuf_bytes: u64,
    /// `on-congestion`
    pub policy: OnCongestion,
    /// `congestion-fill`: with [`OnCongestion::PullAhead`], bytes under way at which it is left behind;
    /// at most what fits the buffer.
    pub fill_bytes: u64,
    /// `congestion-extents`: the same by the number of regions of 1 MiB that the activity log holds
    /// while something is under way to it.
    pub extents: u32,
}

/// `on-congestion`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum OnCongestion {
    /// The application's writes wait.
    #[default]
    Block,
    /// The replica is left behind: marks instead of data, until its buffer is empty.
    PullAhead,
}

impl Congestion {
    /// What `sndbuf-size` may be. The upper end is the engine's bound for data that is not
    /// acknowledged everywhere.
    pub const SNDBUF: std::ops::RangeInclusive<u64> = 4096..=64 << 20;

    /// Bytes under way at which a replica is left behind.
    #[must_use]
    pub fn pull_ahead_at(&self) -> u64 {
        self.fill_bytes.min(self.sndbuf_bytes)
    }
}

impl Default for Congestion {
    fn default() -> Self {
        Self {
            sndbuf_bytes: 16 << 20,
            policy: OnCongestion::Block,
            fill_bytes: 12 << 20,
            extents: 1000,
        }
    }
}

/// What happens to requests that can't be served now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum OnLoss {
    /// They wait until they can be.
    #[default]
    Suspend,
    /// They fail.
    Error,
}

/// Why an option was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionError {
    /// No option has this name.
    #[error("there is no option `{key}`; there are {}", keys().join(", "))]
    Unknown {
        /// The name.
        key: String,
    },
    /// The option can't have this value.
    #[error("`{key}` can't be `{value}`; it may be {allowed}")]
    Value {
        /// The option.
        key: &'static str,
        /// The value.
        value: String,
        /// What it may be.
        allowed: String,
    },
}

/// An option: its name, how it is shown, how it is set. One line of [`TABLE`] each.
struct Entry {
    key: &'static str,
    allowed: &'static str,
    show: fn(&VolumeOptions, &ClusterState) -> String,
    /// `None`: it can't have that value.
    set: fn(&mut VolumeOptions, &ClusterState, &str) -> Option<()>,
}

const TABLE: &[Entry] = &[
    Entry {
        key: "on-no-quorum",
        allowed: OnLoss::ALLOWED,
        show: |options, _| options.on_no_quorum.word().to_owned(),
        set: |options, _, value| {
            options.on_no_quorum = OnLoss::parse(value)?;
            Some(())
        },
    },
    Entry {
        key: "on-io-error",
        allowed: "detach or pass_on",
        show: |options, _| {
            match options.on_io_error {
                OnIoError::Detach => "detach",
                OnIoError::PassOn => "pass_on",
            }
            .to_owned()
        },
        set: |options, _, value| {
            options.on_io_error = match value {
                "detach" => OnIoError::Detach,
                "pass_on" => OnIoError::PassOn,
                _ => return None,
            };
            Some(())
        },
    },
    Entry {
        key: "on-no-data-accessible",
        allowed: OnLoss::ALLOWED,
        show: |options, _| {
            match options.on_no_data {
                OnNoData::Error => OnLoss::Error.word(),
                OnNoData::Suspend => OnLoss::Suspend.word(),
            }
            .to_owned()
        },
        set: |options, _, value| {
            options.on_no_data = match OnLoss::parse(value)? {
                OnLoss::Error => OnNoData::Error,
                OnLoss::Suspend => OnNoData::Suspend,
            };
            Some(())
        },
    },
    Entry {
        key: "disk-timeout",
        allowed: "no, or a time from 1s to 1h, as 30s or 2min",
        show: |options, _| {
            let seconds = options.disk_timeout.seconds;
            seconds.map_or_else(|| "no".to_owned(), |seconds| format!("{seconds}s"))
        },
        set: |options, _, value| {
            options.disk_timeout.seconds = match value {
                "no" => None,
                value => Some(parse_seconds(value, 1, 3600)?),
            };
            Some(())
        },
    },
    Entry {
        key: "protocol",
        allowed: "`default` (each pair has the weaker one of its replicas' own), or a list of pairs like `alpha/beta:A,beta/gamma:C`",
        show: show_protocols,
        set: |options, state, value| {
            options.protocols = parse_protocols(state, value)?;
            Some(())
        },
    },
    Entry {
        key: "admit",
        allowed: "none, or a node: its replica of protocol A then joins the in-sync set for up to 5 minutes, as before a planned switchover to it",
        show: |options, state| {
            let node = options.admit.map(|node| state.node_name(node));
            node.unwrap_or_else(|| "none".to_owned())
        },
        set: |options, state, value| {
            options.admit = match value {
                "none" => None,
                node => Some(state.node_named(node)?.id),
            };
            Some(())
        },
    },
    Entry {
        key: "verify-every",
        allowed: "no, or a time from 1min to 1000d, as 90min, 12h or 7d",
        show: |options, _| {
            let words = |seconds: u32| {
                let units = [("d", 86_400), ("h", 3600), ("min", 60)];
                let whole = units.iter().find(|(_, unit)| seconds.is_multiple_of(*unit));
                whole.map_or_else(
                    || format!("{seconds}s"),
                    |(word, unit)| format!("{}{word}", seconds / unit),
                )
            };
            options
                .verify_every_s
                .map_or_else(|| "no".to_owned(), words)
        },
        set: |options, _, value| {
            options.verify_every_s = match value {
                "no" => None,
                value => Some(parse_seconds(value, 60, 86_400_000)?),
            };
            Some(())
        },
    },
    Entry {
        key: "csums",
        allowed: "auto, yes or no: whether a resync sends digests of blocks first, and then only the blocks that differ; auto as long as one in eight is the same",
        show: |options, _| {
            match options.csums {
                Csums::Auto => "auto",
                Csums::Yes => "yes",
                Csums::No => "no",
            }
            .to_owned()
        },
        set: |options, _, value| {
            options.csums = match value {
                "auto" => Csums::Auto,
                "yes" => Csums::Yes,
                "no" => Csums::No,
                _ => return None,
            };
            Some(())
        },
    },
    Entry {
        key: "resync-rate",
        allowed: "auto (by `c-min-rate` and `c-max-rate`), or bytes a second that resyncs and verifications of the volume go at together, 64K to 1T, as 500K, 20M or 1G",
        show: |options, _| {
            let fixed = options.sync_rate.fixed;
            fixed.map_or_else(|| "auto".to_owned(), show_rate)
        },
        set: |options, _, value| {
            options.sync_rate.fixed = match value {
                "auto" => None,
                value => Some(parse_rate(value)?),
            };
            Some(())
        },
    },
    Entry {
        key: "c-min-rate",
        allowed: "bytes a second, 64K to 1T, as 500K, 20M or 1G: so fast a resync goes at least while applications write",
        show: |options, _| show_rate(options.sync_rate.min),
        set: |options, _, value| {
            options.sync_rate.min = parse_rate(value)?;
            Some(())
        },
    },
    Entry {
        key: "c-max-rate",
        allowed: "no, or bytes a second, 64K to 1T, as 500K, 20M or 1G: so fast a resync goes at most",
        show: |options, _| {
            let max = options.sync_rate.max;
            max.map_or_else(|| "no".to_owned(), show_rate)
        },
        set: |options, _, value| {
            options.sync_rate.max = match value {
                "no" => None,
                value => Some(parse_rate(value)?),
            };
            Some(())
        },
    },
    Entry {
        key: "resync-after",
        allowed: "none, or another volume: on a node where that one is resynced this one waits",
        show: |options, state| {
            let volume = options.resync_after.and_then(|id| state.volumes.get(&id));
            volume.map_or_else(|| "none".to_owned(), |volume| volume.name.clone())
        },
        set: |options, state, value| {
            options.resync_after = match value {
                "none" => None,
                name => Some(state.volumes.values().find(|it| it.name == name)?.id),
            };
            Some(())
        },
    },
    Entry {
        key: "after-split-brain",
        allowed: "disconnect, discard-zero-changes, discard-least-changes, discard-older-primary, discard-younger-primary, or `discard NODE`",
        show: |options, state| options.after_split_brain.words(state),
        set: |options, state, value| {
            options.after_split_brain = AfterSplitBrain::parse(state, value)?;
            Some(())
        },
    },
    Entry {
        key: "encryption",
        allowed: "on or off",
        show: |options, _| options.encryption.word().to_owned(),
        set: |options, _, value| {
            options.encryption = match value {
                "on" => Encryption::On,
                "off" => Encryption::Off,
                _ => return None,
            };
            Some(())
        },
    },
    Entry {
        key: "sndbuf-size",
        allowed: "4096 to 67108864 bytes",
        show: |options, _| options.congestion.sndbuf_bytes.to_string(),
        set: |options, _, value| {
            options.congestion.sndbuf_bytes = parse_sndbuf(value)?;
            Some(())
        },
    },
    Entry {
        key: "on-congestion",
        allowed: "block or pull-ahead",
        show: |options, _| {
            match options.congestion.policy {
                OnCongestion::Block => "block",
                OnCongestion::PullAhead => "pull-ahead",
            }
            .to_owned()
        },
        set: |options, _, value| {
            options.congestion.policy = match value {
                "block" => OnCongestion::Block,
                "pull-ahead" => OnCongestion::PullAhead,
                _ => return None,
            };
            Some(())
        },
    },
    Entry {
        key: "congestion-fill",
        allowed: "4096 to 67108864 bytes",
        show: |options, _| options.congestion.fill_bytes.to_string(),
        set: |options, _, value| {
            options.congestion.fill_bytes = parse_sndbuf(value)?;
            Some(())
        },
    },
    Entry {
        key: "congestion-extents",
        allowed: "a number of regions, at least 1",
        show: |options, _| options.congestion.extents.to_string(),
        set: |options, _, value| {
            options.congestion.extents = value.parse().ok().filter(|extents| *extents > 0)?;
            Some(())
        },
    },
];

/// The largest unit first.
const RATE_UNITS: [(&str, u64); 5] = [
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
    ("", 1),
];

fn show_rate(bytes: u64) -> String {
    let whole = RATE_UNITS
        .iter()
        .find(|(_, unit)| bytes.is_multiple_of(*unit));
    let (name, unit) = whole.copied().unwrap_or(("", 1));
    format!("{}{name}", bytes / unit)
}

fn parse_rate(value: &str) -> Option<u64> {
    let (name, unit) = RATE_UNITS.iter().find(|(name, _)| value.ends_with(name))?;
    let number: u64 = value.strip_suffix(name)?.parse().ok()?;
    let bytes = number.checked_mul(*unit)?;
    SyncRate::RATES.contains(&bytes).then_some(bytes)
}

fn parse_sndbuf(value: &str) -> Option<u64> {
    let bytes = value.parse().ok()?;
    Congestion::SNDBUF.contains(&bytes).then_some(bytes)
}

fn show_protocols(options: &VolumeOptions, state: &ClusterState) -> String {
    if options.protocols.is_empty() {
        return "default".to_owned();
    }
    let pairs = options.protocols.iter().map(|pair| {
        let [one, other] = pair.nodes.map(|node| state.node_name(node));
        format!("{one}/{other}:{}", pair.protocol)
    });
    pairs.collect::<Vec<_>>().join(",")
}

fn parse_protocols(state: &ClusterState, value: &str) -> Option<Vec<PairProtocol>> {
    if value == "default" {
        return Some(Vec::new());
    }
    let mut pairs: Vec<PairProtocol> = Vec::new();
    for pair in value.split(',') {
        let (nodes, protocol) = pair.rsplit_once(':')?;
        let (one, other) = nodes.split_once('/')?;
        let mut nodes = [state.node_named(one)?.id, state.node_named(other)?.id];
        nodes.sort();
        if nodes[0] == nodes[1] || pairs.iter().any(|known| known.nodes == nodes) {
            return None;
        }
        pairs.push(PairProtocol {
            nodes,
            protocol: protocol.parse().ok()?,
        });
    }
    Some(pairs)
}

/// The names of all options.
#[must_use]
pub fn keys() -> Vec<&'static str> {
    TABLE.iter().map(|entry| entry.key).collect()
}

impl VolumeOptions {
    /// What was chosen for a pair of nodes itself, in either order.
    #[must_use]
    pub fn protocol_of_pair(&self, one: NodeId, other: NodeId) -> Option<Protocol> {
        let nodes = [one.min(other), one.max(other)];
        let pair = self.protocols.iter().find(|pair| pair.nodes == nodes);
        pair.map(|pair| pair.protocol)
    }

    /// Sets one option by its name. Names of nodes and volumes in the value are looked up in `state`.
    ///
    /// # Errors
    /// There is no such option, or it can't have that value.
    pub fn set(&mut self, state: &ClusterState, key: &str, value: &str) -> Result<(), OptionError> {
        let Some(entry) = TABLE.iter().find(|entry| entry.key == key) else {
            return Err(OptionError::Unknown {
                key: key.to_owned(),
            });
        };
        (entry.set)(self, state, value).ok_or_else(|| OptionError::Value {
            key: entry.key,
            value: value.to_owned(),
            allowed: entry.allowed.to_owned(),
        })
    }

    /// All options with their values, as [`Self::set`] reads them.
    #[must_use]
    pub fn list(&self, state: &ClusterState) -> Vec<(&'static str, String)> {
        TABLE
            .iter()
            .map(|entry| (entry.key, (entry.show)(self, state)))
            .collect()
    }
}

/// A time with its unit, in whole seconds.
fn parse_seconds(value: &str, least: u32, most: u32) -> Option<u32> {
    let digits = value.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = value.split_at(digits);
    let unit = match unit {
        "s" => 1,
        "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    let seconds = number.parse::<u32>().ok()?.checked_mul(unit)?;
    (least..=most).contains(&seconds).then_some(seconds)
}

impl AfterSplitBrain {
    /// As an administrator writes it.
    #[must_use]
    pub fn words(self, state: &ClusterState) -> String {
        match self {
            Self::Disconnect => "disconnect".to_owned(),
            Self::DiscardZeroChanges => "discard-zero-changes".to_owned(),
            Self::DiscardLeastChanges => "discard-least-changes".to_owned(),
            Self::DiscardOlderPrimary => "discard-older-primary".to_owned(),
            Self::DiscardYoungerPrimary => "discard-younger-primary".to_owned(),
            Self::Discard(node) => format!("discard {}", state.node_name(node)),
        }
    }

    fn parse(state: &ClusterState, value: &str) -> Option<Self> {
        Some(match value {
            "disconnect" => Self::Disconnect,
            "discard-zero-changes" => Self::DiscardZeroChanges,
            "discard-least-changes" => Self::DiscardLeastChanges,
            "discard-older-primary" => Self::DiscardOlderPrimary,
            "discard-younger-primary" => Self::DiscardYoungerPrimary,
            other => Self::Discard(state.node_named(other.strip_prefix("discard ")?)?.id),
        })
    }
}

impl Encryption {
    /// As an administrator writes it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

impl OnLoss {
    const ALLOWED: &str = "suspend-io or io-error";

    const fn word(self) -> &'static str {
        match self {
            Self::Suspend => "suspend-io",
            Self::Error => "io-error",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        match word {
            "suspend-io" => Some(Self::Suspend),
            "io-error" => Some(Self::Error),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_set() {
        let state = ClusterState::default();
        let mut options = VolumeOptions::default();
        options.set(&state, "on-no-quorum", "io-error").unwrap();
        options.set(&state, "on-congestion", "pull-ahead").unwrap();
        options.set(&state, "sndbuf-size", "65536").unwrap();
        options.set(&state, "congestion-fill", "32768").unwrap();
        options.set(&state, "congestion-extents", "7").unwrap();
        options.set(&state, "on-io-error", "pass_on").unwrap();
        options.set(&state, "encryption", "off").unwrap();
        let no_data = "on-no-data-accessible";
        options.set(&state, no_data, "suspend-io").unwrap();
        options.set(&state, "disk-timeout", "2min").unwrap();
        assert_eq!(options.disk_timeout.seconds, Some(120));
        options.set(&state, "csums", "yes").unwrap();
        options.set(&state, "resync-rate", "1500K").unwrap();
        options.set(&state, "c-min-rate", "100000").unwrap();
        options.set(&state, "c-max-rate", "2G").unwrap();
        assert_eq!(options.sync_rate.fixed, Some(1500 << 10));
        assert_eq!(options.sync_rate.max, Some(2 << 30));
        let policy = ("after-split-brain", "discard-least-changes");
        options.set(&state, policy.0, policy.1).unwrap();
        let mut again = VolumeOptions::default();
        for (key, value) in options.list(&state) {
            again.set(&state, key, &value).unwrap();
        }
        assert_eq!(again, options);
        assert_ne!(options, VolumeOptions::default());
    }

    #[test]
    fn times_have_units() {
        let state = ClusterState::default();
        let mut options = VolumeOptions::default();
        for value in ["no", "90min", "36h", "7d"] {
            options.set(&state, "verify-every", value).unwrap();
            let shown = options.list(&state);
            let shown = shown.iter().find(|(key, _)| *key == "verify-every");
            assert_eq!(shown.unwrap().1, value);
        }
        for value in ["7", "d", "30s", "1001d", "99999999999d", "-1h", "7 d"] {
            assert!(
                options.set(&state, "verify-every", value).is_err(),
                "{value}"
            );
        }
    }

    #[test]
    fn rates_have_units() {
        let state = ClusterState::default();
        let mut options = VolumeOptions::default();
        for value in ["64K", "100000", "1M", "1500K", "3G", "1T"] {
            options.set(&state, "c-min-rate", value).unwrap();
            let shown = options.list(&state);
            let shown = shown.iter().find(|(key, _)| *key == "c-min-rate");
            assert_eq!(shown.unwrap().1, value);
        }
        for value in [
            "",
            "M",
            "0",
            "63K",
            "2T",
            "-1M",
            "1.5M",
            "1m",
            "no",
            "99999999999T",
        ] {
            assert!(options.set(&state, "c-min-rate", value).is_err(), "{value}");
        }
    }

    #[test]
    fn mistakes_are_explained() {
        let state = ClusterState::default();
        let mut options = VolumeOptions::default();
        let unknown = options.set(&state, "on-no-quorun", "io-error").unwrap_err();
        assert!(unknown.to_string().contains("on-no-quorum"), "{unknown}");
        let value = options.set(&state, "on-no-quorum", "ignore").unwrap_err();
        assert_eq!(
            value.to_string(),
            "`on-no-quorum` can't be `ignore`; it may be suspend-io or io-error"
        );
        assert_eq!(options, VolumeOptions::default());
    }
}
