//! What an administrator may choose for a volume, under the names that DRBD has for it.

use serde::{Deserialize, Serialize};

use super::ClusterState;

/// The choices for one volume. They may change while it is in use.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VolumeOptions {
    /// What a failed disk means for the application.
    pub on_io_error: OnIoError,
    /// What requests do while no disk can serve them.
    pub on_no_data: OnLoss,
    /// What requests do while the cluster can't agree on a smaller in-sync set.
    pub on_no_quorum: OnLoss,
}

/// `on-io-error`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum OnIoError {
    /// The disk is given up. While another replica is in sync the application does not notice.
    #[default]
    Detach,
    /// The disk is given up and the application gets the error at once.
    PassOn,
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
        show: |options, _| options.on_no_data.word().to_owned(),
        set: |options, _, value| {
            options.on_no_data = OnLoss::parse(value)?;
            Some(())
        },
    },
    Entry {
        key: "on-no-quorum",
        allowed: OnLoss::ALLOWED,
        show: |options, _| options.on_no_quorum.word().to_owned(),
        set: |options, _, value| {
            options.on_no_quorum = OnLoss::parse(value)?;
            Some(())
        },
    },
];

/// The names of all options.
#[must_use]
pub fn keys() -> Vec<&'static str> {
    TABLE.iter().map(|entry| entry.key).collect()
}

impl VolumeOptions {
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
        options.set(&state, "on-io-error", "pass_on").unwrap();
        options.set(&state, "on-no-quorum", "io-error").unwrap();
        let mut again = VolumeOptions::default();
        for (key, value) in options.list(&state) {
            again.set(&state, key, &value).unwrap();
        }
        assert_eq!(again, options);
        assert_ne!(options, VolumeOptions::default());
    }

    #[test]
    fn mistakes_are_explained() {
        let state = ClusterState::default();
        let mut options = VolumeOptions::default();
        let unknown = options.set(&state, "on-io-eror", "detach").unwrap_err();
        assert!(unknown.to_string().contains("on-io-error"), "{unknown}");
        let value = options.set(&state, "on-io-error", "ignore").unwrap_err();
        assert_eq!(
            value.to_string(),
            "`on-io-error` can't be `ignore`; it may be detach or pass_on"
        );
        assert_eq!(options, VolumeOptions::default());
    }
}
