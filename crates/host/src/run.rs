//! One run of a program to its end: with input, a time limit and a bounded memory for what it prints.
//!
//! Called by `fence`. Nothing that the program starts in its session outlives the run.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    HostError, Result, parent,
    process::{Exit, leader::Leader},
};

/// How long the last words are waited for after the end: a process that escaped the group may hold the
/// pipe open for ever.
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(200);

/// How long a process may take to be gone after SIGKILL. One that waits for a device in the kernel is left to
/// it.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its whole environment: ours is not handed on.
    pub environment: Vec<(OsString, OsString)>,
    /// What it reads from standard input.
    pub input: Vec<u8>,
    /// After this it is killed with its session.
    pub limit: Duration,
    /// The first so many bytes of standard output are kept.
    pub out_max: usize,
    /// The last so many bytes of standard error are kept: the reason stands at the end.
    pub err_max: usize,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ran {
    /// How it ended; `None`: it was killed when its time was over.
    pub exit: Option<Exit>,
    /// The beginning of standard output.
    pub out: Vec<u8>,
    /// There was more of it.
    pub out_cut: bool,
    /// The end of standard error.
    pub err: Vec<u8>,
}

/// Runs a program in a session of its own, from `/`, to its end. Dropping the future kills it.
///
/// # Errors
/// It could not be started.
pub async fn run(run: Run) -> Result<Ran> {
    let Run {
        program,
        arguments,
        environment,
        input,
        limit,
        out_max,
        err_max,
    } = run;
    let start = || -> io::Result<_> {
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .envs(environment)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only one async-signal-safe system call runs, without allocation.
        unsafe {
            command.pre_exec(|| {
                // A session of its own: no terminal to ask for passwords on, and a group to kill.
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let mut child = parent::spawn(command)?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let leader = Leader::watch(child)?;
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(io::Error::other("the process was started without pipes"));
        };
        let stdin = tokio::process::ChildStdin::from_std(stdin)?;
        let stdout = tokio::process::ChildStdout::from_std(stdout)?;
        let stderr = tokio::process::ChildStderr::from_std(stderr)?;
        Ok((leader, stdin, stdout, stderr))
    };
    let (mut leader, mut stdin, stdout, stderr) = start().map_err(|error| {
        HostError::io(
            format!("cannot start {}", program.display()),
            error,
            "check that the program is installed and may be executed",
        )
    })?;
    let mut out = Kept::first(out_max);
    let mut err = Kept::last(err_max);
    let exit = {
        let feed = async {
            // A program that does not read its input, or not all of it, tells what it thinks by its exit code.
            drop(stdin.write_all(&input).await);
            drop(stdin);
        };
        let talk = async {
            tokio::join!(feed, out.take_all(stdout), err.take_all(stderr));
        };
        tokio::pin!(talk);
        let mut talking = true;
        let ended = async {
            loop {
                tokio::select! {
                    exit = leader.exited() => break exit,
                    () = &mut talk, if talking => talking = false,
                }
            }
        };
        let exit = tokio::time::timeout(limit, ended).await.ok();
        if exit.is_none() {
            leader.signal(rustix::process::Signal::KILL);
            drop(tokio::time::timeout(KILL_PATIENCE, leader.exited()).await);
        }
        if talking {
            drop(tokio::time::timeout(LAST_WORDS_PATIENCE, &mut talk).await);
        }
        exit
    };
    drop(tokio::time::timeout(LAST_WORDS_PATIENCE, leader.group_gone()).await);
    Ok(Ran {
        exit,
        out_cut: out.cut,
        out: out.bytes.into(),
        err: err.bytes.into(),
    })
}

/// The first or the last bytes of a stream; the rest is read and dropped, so that nobody waits for a full pipe.
struct Kept {
    bytes: VecDeque<u8>,
    max: usize,
    last: bool,
    cut: bool,
}

impl Kept {
    const fn first(max: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            max,
            last: false,
            cut: false,
        }
    }

    const fn last(max: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            max,
            last: true,
            cut: false,
        }
    }

    async fn take_all(&mut self, mut from: impl AsyncRead + Unpin) {
        let mut buffer = [0; 4096];
        while let Ok(length) = from.read(&mut buffer).await {
            if length == 0 {
                return;
            }
            self.take(&buffer[..length]);
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.last {
            self.bytes.extend(bytes);
            let surplus = self.bytes.len().saturating_sub(self.max);
            self.bytes.drain(..surplus);
            self.cut |= surplus > 0;
        } else {
            let room = self.max - self.bytes.len();
            self.bytes.extend(&bytes[..bytes.len().min(room)]);
            self.cut |= bytes.len() > room;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn shell(script: &str, input: &str, limit: Duration) -> Run {
        Run {
            program: PathBuf::from("/bin/sh"),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![("PATH".into(), "/usr/bin:/bin".into())],
            input: input.as_bytes().to_vec(),
            limit,
            out_max: 1000,
            err_max: 1000,
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn input_output_and_exit_code() {
        let ran = run(shell("cat; echo oops >&2; exit 3", "a=b\n", LONG))
            .await
            .unwrap();
        assert_eq!(ran.exit, Some(Exit::Code(3)));
        assert_eq!(ran.out, b"a=b\n");
        assert_eq!(ran.err, b"oops\n");
        assert!(!ran.out_cut);
        let ran = run(shell("kill -9 $$", "", LONG)).await.unwrap();
        assert_eq!(ran.exit, Some(Exit::Signal(9)));
        // Ours is not handed on.
        let ran = run(shell("env | wc -l", "", LONG)).await.unwrap();
        let count: u32 = String::from_utf8_lossy(&ran.out).trim().parse().unwrap();
        assert!(count <= 3, "{count} variables");
    }

    #[tokio::test]
    async fn one_that_reads_nothing_or_is_not_there() {
        let input = "x".repeat(1 << 20);
        let ran = run(shell("exit 0", &input, LONG)).await.unwrap();
        assert_eq!(ran.exit, Some(Exit::Code(0)));
        let mut none = shell("", "", LONG);
        none.program = PathBuf::from("/nonexistent/program");
        let error = run(none).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/program"), "{error}");
    }

    /// Also those that it left in the background.
    #[tokio::test]
    async fn the_whole_session_is_killed_when_the_time_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pids");
        let script = format!(
            "sleep 1000 & echo $! >{0}; trap '' TERM; echo begun; sleep 1000; echo $! >>{0}",
            file.display()
        );
        let before = clock::now();
        let ran = run(shell(&script, "", Duration::from_millis(300)))
            .await
            .unwrap();
        assert_eq!(ran.exit, None);
        assert_eq!(ran.out, b"begun\n");
        assert!(clock::now().since(before) < Duration::from_secs(20));
        let pid = std::fs::read_to_string(&file).unwrap();
        let gone = || {
            std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
                .map_or(true, |stat| stat.contains(") Z "))
        };
        for _ in 0..200 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("process {pid} outlived the run");
    }

    #[tokio::test]
    async fn megabytes_are_read_and_bounded() {
        let script = "head -c 8000000 /dev/zero; head -c 8000000 /dev/zero >&2; echo end >&2";
        let ran = run(shell(script, "", LONG)).await.unwrap();
        assert_eq!(ran.exit, Some(Exit::Code(0)));
        assert_eq!((ran.out.len(), ran.err.len()), (1000, 1000));
        assert!(ran.out_cut);
        assert!(ran.err.ends_with(b"end\n"));
    }

    /// A process that left the session holds the pipe; the run ends all the same.
    #[tokio::test]
    async fn a_deserter_does_not_hold_the_run_up() {
        let before = clock::now();
        let ran = run(shell("setsid sleep 5 & echo said", "", LONG))
            .await
            .unwrap();
        assert_eq!(ran.out, b"said\n");
        assert!(clock::now().since(before) < Duration::from_secs(4));
    }
}
