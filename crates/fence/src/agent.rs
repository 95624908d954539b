//! One action of one device: an agent of the distribution, or any command.
//!
//! What is told goes to standard input, a `name=value` line each, as the [fence agent API] has it: nothing of
//! it, secrets least of all, is on a command line that `ps` shows. Commands get the same lines. What an agent
//! hands on to the tools it calls is its own affair.
//!
//! | action | exit code |
//! |---|---|
//! | `off`, `on`, `monitor`, `metadata` | 0: done; any other: not, or nobody knows |
//! | `status` | 0: the power is on; 2 *and* a line `off` or `Status: off` on standard output: it is off; anything else: nobody knows |
//!
//! The line is asked for because 2 is also what a shell ends with on a syntax error, and what many programs end
//! with on wrong arguments: a script with a typing error must not prove that a node is off. All agents of the
//! distribution print it.
//!
//! [fence agent API]: https://github.com/ClusterLabs/fence-agents/blob/main/doc/FenceAgentAPI.md

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use relevo_host::{
    process::Exit,
    run::{Ran, Run, run},
};
use relevo_types::cluster::{FenceDevice, FenceKind, FenceTarget, FenceValue};

use crate::metadata::{METADATA_MAX, Metadata, clean};

/// Where agents of the distribution are.
pub const AGENT_DIRECTORY: &str = "/usr/sbin";

/// How long an agent may take to describe itself: some load large libraries for it.
const METADATA_LIMIT: Duration = Duration::from_secs(30);

/// What is kept of what an agent prints: enough for its last words.
const WORDS_KEPT: usize = 4096;

/// How many of its last lines go into a reason.
const LAST_LINES: usize = 3;

/// The longest line of a file that has a value.
const FILE_VALUE_MAX: usize = 4096;

/// What a device is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    /// Switch the node off.
    Off,
    /// Switch it on.
    On,
    /// Say whether it is on.
    Status,
    /// Say whether the device itself works.
    Monitor,
}

/// What a device answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// It did what was asked, by its own word.
    Done,
    /// [`Action::Status`]: the power is on.
    On,
    /// [`Action::Status`]: the power is off.
    Off,
    /// It failed, took too long, or nobody can tell; why.
    Failed(String),
}

/// The agents of this machine.
#[derive(Debug)]
pub struct Agents {
    directory: PathBuf,
    /// What they said of themselves, as long as the program stays the same.
    known: Mutex<BTreeMap<String, (SystemTime, Arc<Metadata>)>>,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Status => "status",
            Self::Monitor => "monitor",
        })
    }
}

impl Default for Agents {
    fn default() -> Self {
        Self::new(AGENT_DIRECTORY)
    }
}

impl Agents {
    /// Those in a directory.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            known: Mutex::default(),
        }
    }

    /// The names of those that are installed, in order.
    #[must_use]
    pub fn installed(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| is_program(&entry.path()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with("fence_"))
            .collect();
        names.sort();
        names
    }

    /// What an agent says of itself.
    ///
    /// # Errors
    /// It is not installed, or does not describe itself; the text says what to do.
    pub async fn metadata(&self, name: &str) -> Result<Arc<Metadata>, String> {
        let path = self.path(name)?;
        let changed = fs::metadata(&path)
            .and_then(|metadata| metadata.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        if let Some((then, metadata)) = self.lock().get(name)
            && *then == changed
        {
            return Ok(Arc::clone(metadata));
        }
        let what = |why: String| {
            format!(
                "agent {name} does not describe itself (action metadata): {why}; run `{} -o metadata` to see what is wrong with it",
                path.display()
            )
        };
        let asked = program(
            &path,
            Vec::new(),
            b"action=metadata\n".to_vec(),
            METADATA_LIMIT,
        );
        let ran = run(Run {
            out_max: METADATA_MAX + 1,
            ..asked
        })
        .await
        .map_err(|e| what(e.to_string()))?;
        if ran.exit != Some(Exit::Code(0)) {
            return Err(what(ended(&ran, METADATA_LIMIT, &[])));
        }
        let metadata = Metadata::parse(&String::from_utf8_lossy(&ran.out)).map_err(what)?;
        let metadata = Arc::new(metadata);
        self.lock()
            .insert(name.to_owned(), (changed, Arc::clone(&metadata)));
        Ok(metadata)
    }

    /// Asks a device to do something about a node; about itself for [`Action::Monitor`].
    pub async fn call(
        &self,
        device: &FenceDevice,
        node: &str,
        action: Action,
        limit: Duration,
    ) -> Reply {
        let target = FenceTarget::default();
        self.call_for(device, node, &target, action, limit).await
    }

    /// The same with the plug that is the node.
    pub async fn call_for(
        &self,
        device: &FenceDevice,
        node: &str,
        target: &FenceTarget,
        action: Action,
        limit: Duration,
    ) -> Reply {
        match self.prepare(device, node, target, action, limit).await {
            Err(why) => Reply::Failed(why),
            Ok((asked, secrets)) => match run(asked).await {
                Err(error) => Reply::Failed(error.to_string()),
                Ok(ran) => reply(action, &ran, limit, &secrets),
            },
        }
    }

    /// What to run, and the secrets that must not show up in what it prints.
    async fn prepare(
        &self,
        device: &FenceDevice,
        node: &str,
        target: &FenceTarget,
        action: Action,
        limit: Duration,
    ) -> Result<(Run, Vec<String>), String> {
        let mut plug_parameter = "plug";
        let (path, arguments) = match &device.kind {
            FenceKind::Agent(name) => {
                let metadata = self.metadata(name).await?;
                plug_parameter = metadata.plug_parameter().unwrap_or(plug_parameter);
                (self.path(name)?, Vec::new())
            }
            FenceKind::Command(words) => {
                let plug = target.plug.as_deref().unwrap_or(node);
                let fill = |word: &String| {
                    let word = word
                        .replace("{action}", &action.to_string())
                        .replace("{node}", node)
                        .replace("{plug}", plug);
                    OsString::from(word)
                };
                let (program, rest) = words.split_first().ok_or("its command is empty")?;
                (PathBuf::from(program), rest.iter().map(fill).collect())
            }
            FenceKind::Person => return Err("a person is no program".to_owned()),
        };
        let mut input = format!("action={action}\n");
        let mut secrets = Vec::new();
        let mut line = |name: &str, value: &str| {
            input.push_str(name);
            input.push('=');
            input.push_str(value);
            input.push('\n');
        };
        for (name, value) in &device.parameters {
            match value {
                FenceValue::Plain(text) => line(name, text),
                FenceValue::Secret(text) => {
                    line(name, text);
                    secrets.push(text.clone());
                }
                FenceValue::File(path) => {
                    let text = first_line(path).map_err(|why| {
                        format!(
                            "the value of `{name}` can't be read from {}: {why}; put it there, in the first line, readable for the daemon",
                            path.display()
                        )
                    })?;
                    line(name, &text);
                    secrets.push(text);
                }
            }
        }
        if let Some(plug) = &target.plug {
            line(plug_parameter, plug);
        }
        if action != Action::Monitor {
            line("nodename", node);
        }
        secrets.retain(|secret| !secret.is_empty());
        Ok((
            program(&path, arguments, input.into_bytes(), limit),
            secrets,
        ))
    }

    fn path(&self, name: &str) -> Result<PathBuf, String> {
        // The control log refuses such a name; what would be run here must not depend on that alone.
        if name.contains('/') || !name.starts_with("fence_") {
            return Err(format!("`{}` is no name of a fence agent", clean(name)));
        }
        let path = self.directory.join(name);
        if is_program(&path) {
            Ok(path)
        } else {
            Err(format!(
                "agent {name} is not installed on this node ({} is no program); install package fence-agents here, or keep this node from using the device with --from",
                path.display()
            ))
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (SystemTime, Arc<Metadata>)>> {
        // Each use leaves the map whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn program(path: &Path, arguments: Vec<OsString>, input: Vec<u8>, limit: Duration) -> Run {
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
    Run {
        program: path.to_owned(),
        arguments,
        // ssh looks for its known hosts at home; the rest is what agents of the distribution expect.
        environment: vec![
            (
                "PATH".into(),
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            ),
            ("HOME".into(), home),
            ("LANG".into(), "C".into()),
            ("LC_ALL".into(), "C".into()),
        ],
        input,
        limit,
        out_max: WORDS_KEPT,
        err_max: WORDS_KEPT,
    }
}

fn reply(action: Action, ran: &Ran, limit: Duration, secrets: &[String]) -> Reply {
    match (action, ran.exit) {
        (Action::Status, Some(Exit::Code(0))) => Reply::On,
        (Action::Status, Some(Exit::Code(2))) if says_off(&ran.out) => Reply::Off,
        (Action::Status, Some(Exit::Code(2))) => Reply::Failed(format!(
            "it ended with code 2, which is off, and did not print a line `off`, so nobody knows{}",
            last_words(ran, secrets)
        )),
        (_, Some(Exit::Code(0))) => Reply::Done,
        _ => Reply::Failed(ended(ran, limit, secrets)),
    }
}

fn says_off(out: &[u8]) -> bool {
    String::from_utf8_lossy(out)
        .lines()
        .map(str::trim)
        .any(|line| line.eq_ignore_ascii_case("off") || line.eq_ignore_ascii_case("status: off"))
}

fn ended(ran: &Ran, limit: Duration, secrets: &[String]) -> String {
    let how = match ran.exit {
        Some(exit) => format!("it {exit}"),
        None => format!(
            "it did not end within {} s and was killed",
            limit.as_secs_f64()
        ),
    };
    format!("{how}{}", last_words(ran, secrets))
}

/// What it printed last, without secrets; of standard output where it complained of nothing.
fn last_words(ran: &Ran, secrets: &[String]) -> String {
    let lines = |bytes: &[u8]| -> Vec<String> {
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        for secret in secrets {
            text = text.replace(secret.as_str(), "***");
        }
        text.lines()
            .map(clean)
            .filter(|line| !line.is_empty() && !line.ends_with("Please use '-h' for usage"))
            .collect()
    };
    let mut words = lines(&ran.err);
    if words.is_empty() {
        words = lines(&ran.out);
    }
    let skip = words.len().saturating_sub(LAST_LINES);
    if words.is_empty() {
        ", without a word".to_owned()
    } else {
        format!(": {}", clean(&words[skip..].join(" / ")))
    }
}

fn first_line(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let read = |bytes: &mut Vec<u8>| -> io::Result<usize> {
        let limit = FILE_VALUE_MAX as u64 + 1;
        fs::File::open(path)?.take(limit).read_to_end(bytes)
    };
    read(&mut bytes).map_err(|e| e.to_string())?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or(&[]);
    if line.len() > FILE_VALUE_MAX {
        return Err(format!(
            "its first line is longer than {FILE_VALUE_MAX} bytes"
        ));
    }
    let text = std::str::from_utf8(line).map_err(|_| "it is not UTF-8".to_owned())?;
    let text = text.trim_end_matches('\r');
    if text.chars().any(char::is_control) {
        return Err("its first line has a control character".to_owned());
    }
    Ok(text.to_owned())
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tempfile::TempDir;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    /// A directory with an agent that is a shell script.
    fn agent(script: &str) -> (TempDir, Agents) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fence_test");
        let metadata = "<resource-agent name='fence_test'><parameters><parameter name='port'/></parameters></resource-agent>";
        let script = format!(
            "#!/bin/sh\nread first\ncase $first in action=metadata) echo \"{metadata}\"; exit 0;; esac\n{script}\n"
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let agents = Agents::new(directory.path());
        (directory, agents)
    }

    fn device(kind: FenceKind, parameters: &[(&str, FenceValue)]) -> FenceDevice {
        FenceDevice {
            name: "d".to_owned(),
            kind,
            parameters: parameters
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.clone()))
                .collect(),
            targets: BTreeMap::new(),
            from: None,
            action_limit_s: 60,
            verify_limit_s: 60,
            check_every_s: 3600,
            trust_exit_code: false,
        }
    }

    fn plain(parameters: &[(&str, FenceValue)]) -> FenceDevice {
        device(FenceKind::Agent("fence_test".to_owned()), parameters)
    }

    fn failed(reply: Reply) -> String {
        match reply {
            Reply::Failed(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn an_agent_is_told_by_lines_and_answers_by_its_exit_code() {
        let (directory, agents) = agent("cat >\"${0%/*}/told\"; exit 0");
        let device = plain(&[
            ("ip", FenceValue::Plain("::1".to_owned())),
            ("password", FenceValue::Secret("sesame".to_owned())),
        ]);
        let target = FenceTarget {
            plug: Some("7".to_owned()),
            ..FenceTarget::default()
        };
        let reply = agents
            .call_for(&device, "beta", &target, Action::Off, LIMIT)
            .await;
        assert_eq!(reply, Reply::Done);
        let told = fs::read_to_string(directory.path().join("told")).unwrap();
        // `action=off` was read by the first line of the script. The agent knows its plug as `port`.
        assert_eq!(told, "ip=::1\npassword=sesame\nport=7\nnodename=beta\n");
        assert_eq!(agents.installed(), ["fence_test"]);
    }

    #[tokio::test]
    async fn off_is_code_two_and_the_word() {
        for (script, expected) in [
            ("echo Status: ON; exit 0", Some(Reply::On)),
            ("echo Status: OFF; exit 2", Some(Reply::Off)),
            ("echo off; exit 2", Some(Reply::Off)),
            ("echo asked; echo ' Off '; exit 2", Some(Reply::Off)),
            ("echo 'can not switch off'; exit 2", None),
            ("exit 2", None),
            ("echo offline; exit 2", None),
            ("echo official; echo Status: ON; exit 2", None),
            ("echo Status: OFF; exit 1", None),
            ("echo Status: OFF; exit 3", None),
            ("echo Status: OFF; kill -9 $$", None),
            // A typing error: the shell ends with 2.
            ("if then; echo off", None),
        ] {
            let (_directory, agents) = agent(script);
            let reply = agents
                .call(&plain(&[]), "beta", Action::Status, LIMIT)
                .await;
            match expected {
                Some(expected) => assert_eq!(reply, expected, "{script}"),
                None => assert!(matches!(reply, Reply::Failed(_)), "{script}: {reply:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_failure_has_the_last_words_and_no_secret() {
        let (directory, agents) =
            agent("cat >&2; echo failed; echo 'the BMC does not answer' >&2; exit 1");
        let file = directory.path().join("pw");
        fs::write(&file, "from-a-file\nmore\n").unwrap();
        let device = plain(&[
            ("password", FenceValue::Secret("sesame".to_owned())),
            ("zkey", FenceValue::File(file.clone())),
        ]);
        let why = failed(agents.call(&device, "beta", Action::Off, LIMIT).await);
        assert!(
            why.contains("code 1") && why.contains("does not answer"),
            "{why}"
        );
        assert!(why.contains("zkey=***"), "{why}");
        assert!(
            !why.contains("sesame") && !why.contains("from-a-file"),
            "{why}"
        );

        fs::remove_file(&file).unwrap();
        let why = failed(agents.call(&device, "beta", Action::Off, LIMIT).await);
        assert!(why.contains("`zkey` can't be read"), "{why}");
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_and_one_that_shouts_is_bounded() {
        let (_directory, agents) = agent("sleep 1000");
        let limit = Duration::from_millis(200);
        let why = failed(agents.call(&plain(&[]), "beta", Action::Off, limit).await);
        assert!(why.contains("did not end within 0.2 s"), "{why}");
        let (_directory, agents) =
            agent("head -c 9000000 /dev/zero | tr '\\0' x; head -c 9000000 /dev/zero >&2; exit 1");
        let why = failed(agents.call(&plain(&[]), "beta", Action::Off, LIMIT).await);
        assert!(why.len() < 6000, "{} bytes", why.len());
    }

    #[tokio::test]
    async fn any_command_can_be_a_device() {
        let directory = tempfile::tempdir().unwrap();
        let told = directory.path().join("told");
        let words = [
            "/bin/sh",
            "-c",
            "cat >\"$0\"; echo \"$@\" >>\"$0\"",
            told.to_str().unwrap(),
            "{action}",
            "node-{node}",
            "{plug}",
            "{other}",
        ];
        let command = FenceKind::Command(words.map(str::to_owned).to_vec());
        let agents = Agents::new("/nonexistent");
        let device = device(command, &[("x", FenceValue::Plain("y".to_owned()))]);
        let reply = agents.call(&device, "beta", Action::On, LIMIT).await;
        assert_eq!(reply, Reply::Done);
        assert_eq!(
            fs::read_to_string(told).unwrap(),
            "action=on\nx=y\nnodename=beta\non node-beta beta {other}\n"
        );
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let agents = Agents::new("/nonexistent");
        assert_eq!(agents.installed(), [""; 0]);
        let why = failed(agents.call(&plain(&[]), "b", Action::Off, LIMIT).await);
        assert!(why.contains("package fence-agents"), "{why}");
        let odd = agents.metadata("../bin/sh").await.unwrap_err();
        assert!(odd.contains("no name"), "{odd}");
        let (_directory, agents) = agent("exit 0");
        assert!(agents.metadata("fence_test").await.is_ok());
        let (directory, agents) = agent("");
        fs::write(directory.path().join("fence_test"), "#!/bin/sh\necho no\n").unwrap();
        let why = agents.metadata("fence_test").await.unwrap_err();
        assert!(
            why.contains("no XML") && why.contains("-o metadata"),
            "{why}"
        );
    }
}
