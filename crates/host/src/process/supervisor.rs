//! The owner of one supervised process: restarts it, gives it up, stops it.

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use relevo_types::Time;
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot, watch},
};

use super::{
    EXIT_WINDOW, FIRST_RESTART, MAX_EXITS, ProcessSpec, ProcessState, child::Running, log::Log,
};
use crate::{HostError, Result, clock};

/// How often readiness is looked at.
const READY_PAUSE: Duration = Duration::from_millis(10);

/// How long one look at readiness may take; a connection to our own machine needs far less.
const READY_CONNECT: Duration = Duration::from_millis(250);

/// How many of a process's last lines go into the reason of its failure.
const LAST_WORDS: usize = 3;

/// Stop requests that can wait; the first one ends the supervisor, more are refused politely.
const STOP_QUEUE: usize = 4;

/// A running supervised process. Dropping it kills the process group without ceremony.
pub struct Supervisor {
    spec: ProcessSpec,
    stops: mpsc::Sender<Stop>,
    state: watch::Receiver<ProcessState>,
    log: Arc<Log>,
}

struct Stop {
    force: bool,
    done: oneshot::Sender<Result<()>>,
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor")
            .field("name", &self.spec.name)
            .field("state", &*self.state.borrow())
            .finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Starts the process and watches it from now on. Needs a tokio runtime.
    ///
    /// # Errors
    /// It can't be started at all: no such program, no right to it.
    pub fn start(spec: ProcessSpec) -> Result<Self> {
        let log = Arc::new(Log::new(spec.log.clone()));
        let child = Running::start(&spec, &log)?;
        let (stops, requests) = mpsc::channel(STOP_QUEUE);
        let (report, state) = watch::channel(ProcessState::Running { pid: child.pid() });
        let keeper = Keeper {
            spec: spec.clone(),
            log: Arc::clone(&log),
            report,
            requests,
            exits: VecDeque::new(),
        };
        tokio::spawn(keeper.run(child));
        Ok(Self {
            spec,
            stops,
            state,
            log,
        })
    }

    /// What the process does now and from now on.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<ProcessState> {
        self.state.clone()
    }

    /// What the process does now.
    #[must_use]
    pub fn state(&self) -> ProcessState {
        self.state.borrow().clone()
    }

    /// The last lines that the process wrote, oldest first.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        self.log.last_lines(count)
    }

    /// Waits until the process is ready: its address accepts connections. A process that ends
    /// meanwhile is restarted as ever.
    ///
    /// # Errors
    /// It was given up, was stopped, or took longer than its `ready_patience`.
    pub async fn ready(&self) -> Result<()> {
        let what = || format!("{} did not become ready", self.spec.name);
        let mut states = self.states();
        let given_up = async {
            let over = states
                .wait_for(|state| {
                    matches!(state, ProcessState::Failed { .. } | ProcessState::Stopped)
                })
                .await;
            match over.as_deref() {
                Ok(ProcessState::Failed { reason }) => reason.clone(),
                _ => "it was stopped meanwhile".to_owned(),
            }
        };
        let Some(address) = self.spec.ready else {
            return Ok(());
        };
        let accepts = async {
            loop {
                let attempt = tokio::time::timeout(READY_CONNECT, TcpStream::connect(address));
                if matches!(attempt.await, Ok(Ok(_))) {
                    return;
                }
                tokio::time::sleep(READY_PAUSE).await;
            }
        };
        tokio::select! {
            () = accepts => Ok(()),
            reason = given_up => Err(HostError::new(what(), reason, "see its log")),
            () = tokio::time::sleep(self.spec.ready_patience) => Err(HostError::new(
                what(),
                format!(
                    "{address} accepted no connection for {:?}{}",
                    self.spec.ready_patience,
                    self.last_words(),
                ),
                "see its log, and check the `ready` address of the process part",
            )),
        }
    }

    /// Stops the process and its whole group: SIGTERM, after its `stop_patience` SIGKILL; with
    /// `force` SIGKILL at once. A process that ended is fine.
    ///
    /// # Errors
    /// The kernel does not end it.
    pub async fn stop(&self, force: bool) -> Result<()> {
        let (done, answer) = oneshot::channel();
        if self.stops.send(Stop { force, done }).await.is_err() {
            return Ok(());
        }
        // The keeper that goes without an answer has served another stop and is done.
        answer.await.unwrap_or(Ok(()))
    }

    fn last_words(&self) -> String {
        last_words(&self.log)
    }
}

fn last_words(log: &Log) -> String {
    let lines = log.last_lines(LAST_WORDS);
    if lines.is_empty() {
        String::new()
    } else {
        format!("; its last words: {}", lines.join(" / "))
    }
}

/// The task behind a [`Supervisor`].
struct Keeper {
    spec: ProcessSpec,
    log: Arc<Log>,
    report: watch::Sender<ProcessState>,
    requests: mpsc::Receiver<Stop>,
    /// When it ended, within the window.
    exits: VecDeque<Time>,
}

impl Keeper {
    async fn run(mut self, first: Running) {
        let mut child = Some(first);
        loop {
            let reason = match &mut child {
                Some(running) => {
                    self.report
                        .send_replace(ProcessState::Running { pid: running.pid() });
                    tokio::select! {
                        exit = running.exited() => {
                            running.group_gone().await;
                            format!("{} {exit}", self.spec.name)
                        }
                        request = self.requests.recv() => {
                            return self.stop(child, request).await;
                        }
                    }
                }
                None => format!("{} can't be started", self.spec.name),
            };
            let Some(pause) = self.count_exit(clock::now()) else {
                tracing::warn!("{reason}; given up after {} ends", MAX_EXITS + 1);
                let reason = format!(
                    "{reason}, for the {}th time within {} s{}",
                    MAX_EXITS + 1,
                    EXIT_WINDOW.as_secs(),
                    last_words(&self.log)
                );
                self.report.send_replace(ProcessState::Failed { reason });
                let request = self.requests.recv().await;
                return self.stop(None, request).await;
            };
            tracing::warn!("{reason}; starting it again in {pause:?}");
            self.report
                .send_replace(ProcessState::Restarting { reason });
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                request = self.requests.recv() => return self.stop(None, request).await,
            }
            child = match Running::start(&self.spec, &self.log) {
                Ok(running) => Some(running),
                Err(error) => {
                    tracing::warn!("{error}");
                    None
                }
            };
        }
    }

    /// Counts an end of the process; says how long to wait before it is started again, or `None`
    /// when it is to be given up.
    fn count_exit(&mut self, now: Time) -> Option<Duration> {
        self.exits.retain(|exit| now.since(*exit) < EXIT_WINDOW);
        self.exits.push_back(now);
        if self.exits.len() > MAX_EXITS {
            return None;
        }
        // At most MAX_EXITS - 1 doublings.
        let doublings = u32::try_from(self.exits.len() - 1).unwrap_or(0);
        Some(FIRST_RESTART * 2u32.pow(doublings))
    }

    /// Serves a stop; `None`: the supervisor was dropped.
    async fn stop(self, child: Option<Running>, request: Option<Stop>) {
        let gentle = request.as_ref().is_some_and(|request| !request.force);
        let patience = gentle.then_some(self.spec.stop_patience);
        let result = match child {
            Some(mut running) => running.stop(&self.spec.name, patience).await,
            None => Ok(()),
        };
        if result.is_ok() {
            self.report.send_replace(ProcessState::Stopped);
        }
        if let Some(Stop { done, .. }) = request {
            // The asker may have gone; the process is stopped all the same.
            drop(done.send(result));
        }
    }
}
