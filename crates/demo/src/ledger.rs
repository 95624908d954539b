//! The client of the demo: a process in its own namespace that posts entries without a pause, and
//! its journal, read from here.

use std::{
    cell::{Ref, RefCell},
    fs::File,
    path::PathBuf,
    process::Child,
    time::Duration,
};

use anyhow::Context as _;
use relevo_host::command::NsCommand;
use relevo_ledger::{Acknowledged, Journal, LedgerClient};
use relevo_types::Time;
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::Lab;

/// The client asks again when an answer takes longer. Short, so that the waits that are measured are
/// the cluster's and not the client's own patience.
const REQUEST_TIMEOUT_MS: u32 = 400;

/// The same for a connection.
const CONNECT_TIMEOUT_MS: u32 = 200;

/// The posting process.
#[derive(Debug)]
pub(crate) struct Client {
    child: Child,
    journal: PathBuf,
    /// What was read of the journal, and up to where.
    read: RefCell<(Vec<Acknowledged>, u64)>,
}

impl Client {
    /// Starts it against the service's address.
    pub(crate) fn start(lab: &Lab) -> anyhow::Result<Self> {
        let journal = lab.file("journal");
        let log = File::create(lab.file("client.log"))?;
        let mut command = NsCommand::new(lab.program())
            .args(["ledger-client", "--target"])
            .arg(target(lab))
            .arg("--journal")
            .arg(&journal)
            .args(["--request-timeout-ms", &REQUEST_TIMEOUT_MS.to_string()])
            .args(["--connect-timeout-ms", &CONNECT_TIMEOUT_MS.to_string()])
            .stdout(log.try_clone()?)
            .stderr(log)
            .own_group();
        if let Some(namespace) = &lab.machine("client").namespace {
            command = command.in_namespace(namespace);
        }
        let child = command.spawn().context("start the client")?;
        Ok(Self {
            child,
            journal,
            read: RefCell::default(),
        })
    }

    /// Every entry acknowledged so far, in order.
    fn entries(&self) -> Ref<'_, Vec<Acknowledged>> {
        let mut read = self.read.borrow_mut();
        // Not there before the first entry.
        if let Ok((new, end)) = Journal::read_from(&self.journal, read.1) {
            read.0.extend(new);
            read.1 = end;
        }
        drop(read);
        Ref::map(self.read.borrow(), |(entries, _)| entries)
    }

    /// How many entries were acknowledged after a moment.
    pub(crate) fn acknowledged_after(&self, moment: Duration) -> usize {
        let after = time(moment);
        self.entries()
            .iter()
            .rev()
            .take_while(|entry| entry.acknowledged > after)
            .count()
    }

    /// How many entries were acknowledged between two moments.
    pub(crate) fn acknowledged_between(&self, begin: Duration, end: Duration) -> u64 {
        let window = time(begin)..=time(end);
        self.entries()
            .iter()
            .filter(|entry| window.contains(&entry.acknowledged))
            .count() as u64
    }

    /// The longest time without an acknowledgement in a window.
    pub(crate) fn longest_gap(&self, begin: Duration, end: Duration) -> Duration {
        relevo_ledger::longest_gap(&self.entries(), time(begin), time(end)).length()
    }

    /// Holds it still; the gap that this makes belongs to no scene.
    pub(crate) fn pause(&self) -> anyhow::Result<()> {
        kill_process(self.pid()?, Signal::STOP).context("pause the client")
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) -> anyhow::Result<()> {
        kill_process(self.pid()?, Signal::CONT).context("resume the client")
    }

    fn pid(&self) -> anyhow::Result<Pid> {
        Ok(Pid::from_child(&self.child))
    }

    /// Asks the service, from the client's place, for every entry it has, and counts those that it
    /// acknowledged once and does not have.
    pub(crate) fn missing(&self, lab: &Lab) -> anyhow::Result<u64> {
        let target = target(lab);
        let ask = move || -> anyhow::Result<_> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let mut client = LedgerClient::with_timeouts(
                &target,
                Duration::from_secs(2),
                Duration::from_secs(10),
            )?;
            Ok(runtime.block_on(client.numbers())?)
        };
        let present = match &lab.machine("client").namespace {
            Some(namespace) => namespace.run(ask)??,
            // The demo's own thread has a runtime for the API but is not inside it.
            None => ask()?,
        };
        let missing = self
            .entries()
            .iter()
            .filter(|entry| !present.contains(&entry.number))
            .count();
        Ok(missing as u64)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A paused process is killed all the same; it has nothing to say at the end.
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}

/// Kills the processes of the demo's service, wherever they run, and says how many there were.
pub(crate) fn kill_ledger(lab: &Lab) -> anyhow::Result<usize> {
    let mark = format!("RELEVO_DEMO={}", lab.mount_point().display());
    let mut killed = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment
            .split(|byte| *byte == 0)
            .any(|word| word == mark.as_bytes())
            && let Some(pid) = Pid::from_raw(pid)
        {
            kill_process(pid, Signal::KILL).context("kill the service's process")?;
            killed += 1;
        }
    }
    Ok(killed)
}

fn target(lab: &Lab) -> String {
    format!("http://{}", lab.service_socket())
}

fn time(moment: Duration) -> Time {
    Time(u64::try_from(moment.as_nanos()).unwrap_or(u64::MAX))
}
