//! Fence devices, and the record of what was done with them.

use super::{Applied, check_name, taken};
use crate::{
    NodeId,
    cluster::{
        ClusterState, FENCE_DEVICES_MAX, FENCE_HISTORY_MAX, FENCE_LEVEL_MAX, FenceCommand,
        FenceDevice, FenceKind, FenceOutcome, FenceRecord, FenceValue, Fencing, NodeKind, Outcome,
        Rejection,
    },
};

/// Parameters of a device, and words of a command: agents have some forty.
const WORDS_MAX: usize = 64;

/// The longest value or word: a private key in one line.
const WORD_LEN_MAX: usize = 4096;

/// The longest delay: a node that may wait ten minutes for its takeover waits for a person as well.
const DELAY_MS_MAX: u64 = 600_000;

/// Seconds that an action or its verification may take. Slow BMCs need a minute.
const LIMIT_S: std::ops::RangeInclusive<u32> = 1..=600;

/// Seconds between two checks: a BMC that is asked more often than this has little time left; a device
/// that nobody looks at for a week is none.
const CHECK_S: std::ops::RangeInclusive<u32> = 10..=604_800;

/// Parameters that we set ourselves, and where their value comes from.
const OURS: [(&str, &str); 6] = [
    ("action", "what is asked for decides it"),
    ("option", "what is asked for decides it"),
    ("plug", "write --node NODE=PLUG"),
    ("port", "write --node NODE=PLUG"),
    ("nodename", "it is the name of the node"),
    ("delay", "use --delay"),
];

/// Texts of a record are bounded: it stays in the log of every node.
const TEXTS_MAX: usize = 16;
const TEXT_CHARS_MAX: usize = 500;

impl ClusterState {
    pub(super) fn apply_fence(&mut self, command: &FenceCommand) -> Applied {
        match command {
            FenceCommand::AddDevice(device) => {
                check_name(&device.name)?;
                if self.fencing.devices.contains_key(&device.name) {
                    return Err(taken("fence device", &device.name));
                }
                if self.fencing.devices.len() >= FENCE_DEVICES_MAX {
                    return Err(bad(format!(
                        "there are {FENCE_DEVICES_MAX} fence devices, the most there can be; remove one first"
                    )));
                }
                self.set_device(device)?;
            }
            FenceCommand::ReplaceDevice(device) => {
                if !self.fencing.devices.contains_key(&device.name) {
                    return Err(no_device(&device.name));
                }
                self.set_device(device)?;
            }
            FenceCommand::RemoveDevice { name } => {
                let mut fencing = self.fencing.clone();
                if fencing.devices.remove(name).is_none() {
                    return Err(no_device(name));
                }
                self.check_levels(&fencing)?;
                self.fencing = fencing;
            }
            FenceCommand::Record(record) => self.record(record),
        }
        Ok(Outcome::Done)
    }

    fn set_device(&mut self, device: &FenceDevice) -> Result<(), Rejection> {
        self.check_device(device)?;
        let mut fencing = self.fencing.clone();
        fencing.devices.insert(device.name.clone(), device.clone());
        self.check_levels(&fencing)?;
        self.fencing = fencing;
        Ok(())
    }

    /// Takes a node out of everything about fencing but the history.
    pub(super) fn forget_fencing_of(&mut self, node: NodeId) {
        self.fencing.devices.retain(|_, device| {
            device.targets.remove(&node);
            if let Some(from) = &mut device.from {
                from.remove(&node);
            }
            !device.targets.is_empty()
        });
    }

    fn check_device(&self, device: &FenceDevice) -> Result<(), Rejection> {
        check_kind(&device.kind)?;
        if device.parameters.len() > WORDS_MAX {
            return Err(bad(format!(
                "{} parameters are given; {WORDS_MAX} are the most",
                device.parameters.len()
            )));
        }
        if device.kind == FenceKind::Person && !device.parameters.is_empty() {
            return Err(bad("a person takes no parameters; leave --set out"));
        }
        for (name, value) in &device.parameters {
            check_parameter(name, value)?;
        }
        if device.targets.is_empty() {
            return Err(bad(
                "the device switches no node off; name one with --node NODE or --node NODE=PLUG",
            ));
        }
        for (node, target) in &device.targets {
            self.known(*node)?;
            let name = self.node_name(*node);
            if !(1..=FENCE_LEVEL_MAX).contains(&target.level) {
                return Err(bad(format!(
                    "level {} of node {name} is none; use 1 to {FENCE_LEVEL_MAX}",
                    target.level
                )));
            }
            if target.delay_ms > DELAY_MS_MAX {
                return Err(bad(format!(
                    "a delay of {} s before node {name} is fenced is too long; {} s are the most",
                    target.delay_ms / 1000,
                    DELAY_MS_MAX / 1000
                )));
            }
            if let Some(plug) = &target.plug {
                check_word("the plug", plug)?;
            }
        }
        if let Some(from) = &device.from {
            if from.is_empty() {
                return Err(bad(
                    "no node may use the device; name one with --from, or leave --from out for all data nodes",
                ));
            }
            for node in from {
                self.known(*node)?;
            }
        }
        for node in device.targets.keys() {
            let other = |id: &NodeId| id != node;
            let users = match &device.from {
                Some(from) => from.iter().any(other),
                None => self
                    .nodes
                    .values()
                    .any(|it| other(&it.id) && it.spec.kind == NodeKind::Data),
            };
            if !users {
                return Err(bad(format!(
                    "no other node may use the device against node {}, and a node can't fence itself; name others with --from",
                    self.node_name(*node)
                )));
            }
        }
        let limits = [
            ("an action", device.action_limit_s),
            ("the verification", device.verify_limit_s),
        ];
        for (what, limit) in limits {
            if !LIMIT_S.contains(&limit) {
                return Err(bad(format!(
                    "{limit} s for {what} can't be; use {} to {} s",
                    LIMIT_S.start(),
                    LIMIT_S.end()
                )));
            }
        }
        if !CHECK_S.contains(&device.check_every_s) {
            return Err(bad(format!(
                "a check every {} s can't be; use {} s to {} s",
                device.check_every_s,
                CHECK_S.start(),
                CHECK_S.end()
            )));
        }
        if device.trust_exit_code && device.kind == FenceKind::Person {
            return Err(bad(
                "a person has no exit code; leave --trust-exit-code out",
            ));
        }
        Ok(())
    }

    fn known(&self, node: NodeId) -> Result<(), Rejection> {
        if self.nodes.contains_key(&node) {
            Ok(())
        } else {
            Err(Rejection::NoNode { node })
        }
    }

    /// Levels have no gap, and a person is alone in a level.
    fn check_levels(&self, fencing: &Fencing) -> Result<(), Rejection> {
        for node in self.nodes.keys() {
            let name = self.node_name(*node);
            for (expected, (level, devices)) in (1u8..).zip(fencing.levels(*node)) {
                let names: Vec<&str> = devices.iter().map(|it| it.name.as_str()).collect();
                let names = names.join(", ");
                if level != expected {
                    return Err(bad(format!(
                        "node {name} would have level {level} ({names}) without level {expected}; levels are 1, 2, ... without a gap"
                    )));
                }
                let person = devices.iter().any(|it| it.kind == FenceKind::Person);
                if person && devices.len() > 1 {
                    return Err(bad(format!(
                        "level {level} of node {name} would be {names}, and a person decides alone; give the person a level of its own, the last one"
                    )));
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &FenceRecord) {
        let record = bounded(record.clone());
        let history = &mut self.fencing.history;
        let same = |it: &FenceRecord| {
            (it.by, it.begun_unix_ms, it.node) == (record.by, record.begun_unix_ms, record.node)
        };
        match history.iter_mut().find(|it| same(it)) {
            // An end is not taken back by the proof's record, which may arrive later.
            Some(known) if known.ended_unix_ms.is_some() && record.ended_unix_ms.is_none() => {}
            Some(known) => *known = record,
            None => {
                history.push(record);
                let surplus = history.len().saturating_sub(FENCE_HISTORY_MAX);
                history.drain(..surplus);
            }
        }
    }
}

fn bad(why: impl Into<String>) -> Rejection {
    Rejection::BadFencing { why: why.into() }
}

fn no_device(name: &str) -> Rejection {
    bad(format!(
        "there is no fence device `{name}`; `relevo fence device list` lists them"
    ))
}

fn check_kind(kind: &FenceKind) -> Result<(), Rejection> {
    match kind {
        FenceKind::Agent(name) => {
            let rest = name.strip_prefix("fence_").unwrap_or("");
            let good = !rest.is_empty()
                && rest.len() <= 64
                && rest
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
            if good {
                Ok(())
            } else {
                Err(bad(format!(
                    "`{name}` is no name of a fence agent, which is `fence_` and letters, digits, `_` and `-`, without a directory; `relevo fence agents` lists those installed, and --command takes any program"
                )))
            }
        }
        FenceKind::Command(words) => {
            let program = words.first().map_or("", String::as_str);
            if !program.starts_with('/') || program.contains('{') {
                return Err(bad(format!(
                    "`{program}` is not the absolute path of a program; write it out: /usr/local/sbin/..."
                )));
            }
            if words.len() > WORDS_MAX {
                return Err(bad(format!(
                    "the command has {} words; {WORDS_MAX} are the most",
                    words.len()
                )));
            }
            words
                .iter()
                .try_for_each(|word| check_word("a word of the command", word))
        }
        FenceKind::Person => Ok(()),
    }
}

fn check_parameter(name: &str, value: &FenceValue) -> Result<(), Rejection> {
    let good = !name.is_empty()
        && name.len() <= 64
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    if !good {
        return Err(bad(format!(
            "`{name}` is no name of a parameter; `relevo fence agent NAME` lists those of an agent"
        )));
    }
    if let Some((_, how)) = OURS.iter().find(|(ours, _)| *ours == name) {
        return Err(bad(format!("parameter `{name}` can't be set; {how}")));
    }
    let what = format!("the value of `{name}`");
    match value {
        FenceValue::Plain(text) | FenceValue::Secret(text) => check_word(&what, text),
        FenceValue::File(path) if path.is_absolute() => Ok(()),
        FenceValue::File(path) => Err(bad(format!(
            "`{}` for parameter `{name}` is not the absolute path of a file; write it out",
            path.display()
        ))),
    }
}

/// Values go to agents a line each: a line end within one would smuggle in another parameter. The text of
/// a refusal never shows the value, which may be a secret.
fn check_word(what: &str, text: &str) -> Result<(), Rejection> {
    if text.len() > WORD_LEN_MAX {
        return Err(bad(format!(
            "{what} is {} bytes long; {WORD_LEN_MAX} are the most",
            text.len()
        )));
    }
    if text.chars().any(char::is_control) {
        return Err(bad(format!(
            "{what} has a line end or another control character; agents take one line each"
        )));
    }
    Ok(())
}

fn bounded(mut record: FenceRecord) -> FenceRecord {
    record.remarks.truncate(TEXTS_MAX);
    record.remarks.iter_mut().for_each(shorten);
    if let FenceOutcome::Failed(failures) = &mut record.outcome {
        failures.truncate(TEXTS_MAX);
        failures
            .iter_mut()
            .for_each(|failure| shorten(&mut failure.why));
    }
    record
}

fn shorten(text: &mut String) {
    if let Some((end, _)) = text.char_indices().nth(TEXT_CHARS_MAX) {
        text.truncate(end);
        text.push_str(" ...");
    }
}
