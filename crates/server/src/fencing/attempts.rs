//! Attempts: the machine of `relevo_fence::attempt` with real devices, heartbeats and people.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use relevo_fence::{Ability, Action, Attempt, Effect, Input, Level, Means, Plan, Reply, RunId};
use relevo_host::clock;
use relevo_types::{
    NodeId,
    cluster::{
        ClusterState, FenceAction, FenceAsked, FenceDevice, FenceEvidence, FenceKind, FenceOutcome,
        FenceProof, FenceRecord, FenceVerified,
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinError, JoinSet},
};

use super::{ConfirmFailure, FenceRefusal, Fencing, Inner, Progress, action_limit, lock, may_use};
use crate::{api::EventLevel, events::unix_ms};

/// How often heartbeats of the node are looked at: as often as they come.
const LISTEN_PAUSE: Duration = Duration::from_millis(100);

/// Persons who confirm the same attempt at the same time.
const CONFIRM_QUEUE: usize = 4;

/// An attempt under way.
pub(super) struct Running {
    pub(super) progress: watch::Receiver<Progress>,
    confirms: mpsc::Sender<Confirm>,
    task: AbortHandle,
}

/// What a person says about an attempt.
struct Confirm {
    word: Word,
    who: String,
    answer: oneshot::Sender<Result<(), String>>,
}

enum Word {
    /// The node is off; said on that node.
    Off { on: NodeId },
    /// It shall end.
    GiveUp,
}

impl Running {
    pub(super) fn abort(self) {
        self.task.abort();
    }
}

impl Fencing {
    /// Begins to fence a node, or joins the attempt that is under way. Returns at once; the progress has the
    /// proof as soon as the node was verifiably off, and `ended` when nothing more is done.
    ///
    /// # Errors
    /// Nothing was begun; why and what to do.
    pub(crate) fn fence(
        &self,
        node: NodeId,
        action: FenceAction,
        asked: FenceAsked,
    ) -> Result<watch::Receiver<Progress>, FenceRefusal> {
        let state = self.inner.state();
        if node == self.inner.context.me {
            return Err(FenceRefusal {
                reason: "a node can't fence itself".to_owned(),
                remedy: "ask on another node".to_owned(),
            });
        }
        if state.fencing.levels(node).is_empty() {
            return Err(FenceRefusal {
                reason: format!("node {} has no fence device", state.node_name(node)),
                remedy: "`relevo fence device add` adds one".to_owned(),
            });
        }
        Ok(self.begin(&state, node, action, asked, false))
    }

    /// The same where a person's word is the only means, whatever devices there are.
    pub(crate) fn fence_by_word(
        &self,
        node: NodeId,
        asked: FenceAsked,
    ) -> watch::Receiver<Progress> {
        let state = self.inner.state();
        self.begin(&state, node, FenceAction::Off, asked, true)
    }

    fn begin(
        &self,
        state: &ClusterState,
        node: NodeId,
        action: FenceAction,
        asked: FenceAsked,
        by_word: bool,
    ) -> watch::Receiver<Progress> {
        let mut attempts = lock(&self.inner.attempts);
        if let Some(running) = attempts.get(&node) {
            return running.progress.clone();
        }
        let name = state.node_name(node);
        let begun_unix_ms = unix_ms();
        let (sender, progress) = watch::channel(Progress {
            doing: format!("begins to fence {name}"),
            waits_for_a_person: false,
            action,
            begun_unix_ms,
            proof: None,
            ended: None,
            remarks: Vec::new(),
        });
        let record = FenceRecord {
            node,
            name,
            by: self.inner.context.me,
            asked,
            action,
            begun_unix_ms,
            ended_unix_ms: None,
            outcome: FenceOutcome::Failed(Vec::new()),
            remarks: Vec::new(),
        };
        let (confirms, confirmed) = mpsc::channel(CONFIRM_QUEUE);
        let driver = Driver {
            inner: Arc::clone(&self.inner),
            // What the node holds under this generation is what the proof will be about.
            generation: state
                .nodes
                .get(&node)
                .map(|it| it.lease.generation)
                .unwrap_or_default(),
            record,
            progress: sender,
            devices: BTreeMap::new(),
            runs: JoinSet::new(),
            running: BTreeMap::new(),
            ended: false,
        };
        let task = self
            .inner
            .context
            .runtime
            .spawn(driver.drive(confirmed, by_word));
        let running = Running {
            progress: progress.clone(),
            confirms,
            task: task.abort_handle(),
        };
        attempts.insert(node, running);
        progress
    }

    /// A person says that a node is off: the attempt that is under way here has its proof.
    ///
    /// # Errors
    /// There is no attempt here, or the word is not believed.
    pub(crate) async fn confirm(
        &self,
        node: NodeId,
        who: &str,
        on: NodeId,
    ) -> Result<(), ConfirmFailure> {
        let confirms = self.confirms(node)?;
        self.check_silent(node)
            .await
            .map_err(ConfirmFailure::Refused)?;
        tell(confirms, Word::Off { on }, who).await
    }

    /// A person takes the attempt that is under way here back.
    ///
    /// # Errors
    /// There is none.
    pub(crate) async fn give_up(&self, node: NodeId, who: &str) -> Result<(), ConfirmFailure> {
        let confirms = self.confirms(node)?;
        tell(confirms, Word::GiveUp, who).await
    }

    /// Nobody hears the node.
    ///
    /// # Errors
    /// Who does, in a sentence with what to do.
    pub(crate) async fn check_silent(&self, node: NodeId) -> Result<(), String> {
        let (_, hearers) = self
            .inner
            .heard(node)
            .await
            .ok_or("this node's daemon is stopping, and hears nobody; ask on another node")?;
        if hearers.is_empty() {
            return Ok(());
        }
        let state = self.inner.state();
        let names: Vec<String> = hearers.iter().map(|it| state.node_name(*it)).collect();
        Err(format!(
            "{} is on: its heartbeats arrive on {}; switch it off first",
            state.node_name(node),
            names.join(" and ")
        ))
    }

    fn confirms(&self, node: NodeId) -> Result<mpsc::Sender<Confirm>, ConfirmFailure> {
        let attempts = lock(&self.inner.attempts);
        let running = attempts.get(&node).ok_or(ConfirmFailure::NoAttempt)?;
        Ok(running.confirms.clone())
    }
}

async fn tell(
    confirms: mpsc::Sender<Confirm>,
    word: Word,
    who: &str,
) -> Result<(), ConfirmFailure> {
    let (answer, taken) = oneshot::channel();
    let confirm = Confirm {
        word,
        who: who.to_owned(),
        answer,
    };
    if confirms.send(confirm).await.is_err() {
        return Err(ConfirmFailure::NoAttempt);
    }
    match taken.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(why)) => Err(ConfirmFailure::Refused(why)),
        // It ended in the same moment.
        Err(_) => Err(ConfirmFailure::NoAttempt),
    }
}

/// Carries an attempt out.
struct Driver {
    inner: Arc<Inner>,
    generation: relevo_types::LeaseGeneration,
    record: FenceRecord,
    progress: watch::Sender<Progress>,
    devices: BTreeMap<String, FenceDevice>,
    runs: JoinSet<(RunId, Reply)>,
    running: BTreeMap<RunId, AbortHandle>,
    ended: bool,
}

impl Drop for Driver {
    /// However the task ends, a new attempt can begin.
    fn drop(&mut self) {
        if !self.ended {
            lock(&self.inner.attempts).remove(&self.record.node);
        }
    }
}

impl Driver {
    async fn drive(mut self, mut confirmed: mpsc::Receiver<Confirm>, by_word: bool) {
        let node = self.record.node;
        let begins = format!(
            "begins to fence it ({}), asked by {}",
            self.record.action,
            asked_words(&self.record.asked)
        );
        self.inner
            .event(EventLevel::Warning, &self.record.name, &begins);
        let plan = self.plan(by_word).await;
        let mut attempt = Attempt::new(plan);
        let mut over = false;
        while !over {
            match self.inner.heard(node).await {
                Some((Some(at), _)) => {
                    let effects = attempt.step(clock::now(), Input::Heard(at));
                    over |= self.carry_out(effects);
                }
                Some((None, _)) => {}
                // Who does not listen can't say that a node is silent.
                None => {
                    let effects = attempt.give_up("the daemon, which is stopping,");
                    self.carry_out(effects);
                    break;
                }
            }
            let effects = attempt.step(clock::now(), Input::Tick);
            over |= self.carry_out(effects);
            if self.is_taken_from() {
                let effects = attempt.step(clock::now(), Input::SwitchOn);
                over |= self.carry_out(effects);
            }
            self.progress.send_if_modified(|progress| {
                let doing = attempt.doing();
                let changed = progress.doing != doing;
                progress.doing = doing;
                progress.waits_for_a_person = attempt.waits_for_a_person();
                changed
            });
            if over {
                break;
            }
            let wake = attempt.wake().map(|at| at.since(clock::now()));
            let pause = wake.unwrap_or(LISTEN_PAUSE).min(LISTEN_PAUSE);
            tokio::select! {
                Some(done) = self.runs.join_next(), if !self.runs.is_empty() => {
                    // One that was cancelled is no news.
                    if let Some((run, reply)) = self.known(done) {
                        let effects = attempt.step(clock::now(), Input::Replied { run, reply });
                        over |= self.carry_out(effects);
                    }
                }
                Some(confirm) = confirmed.recv() => {
                    let who = &confirm.who;
                    let taken = match confirm.word {
                        Word::Off { on } => attempt.confirm(clock::now(), who, on),
                        Word::GiveUp => Ok(attempt.give_up(who)),
                    };
                    let answer = taken.map(|effects| over |= self.carry_out(effects));
                    // The caller may have gone away; its word holds all the same.
                    drop(confirm.answer.send(answer));
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// A run that ended, if somebody still waits for it.
    fn known(&mut self, done: Result<(RunId, Reply), JoinError>) -> Option<(RunId, Reply)> {
        let (run, reply) = done
            .or_else(|error| {
                let lost = self
                    .running
                    .iter()
                    .find(|(_, task)| task.id() == error.id());
                let why = format!("the run was lost: {error}");
                lost.map(|(run, _)| (*run, Reply::Failed(why))).ok_or(())
            })
            .ok()?;
        self.running.remove(&run)?;
        Some((run, reply))
    }

    /// What the node had when the attempt began was taken from it, or was given back by itself.
    fn is_taken_from(&self) -> bool {
        let state = self.inner.state();
        let node = state.nodes.get(&self.record.node);
        node.is_none_or(|node| node.lease.evicted || node.lease.generation != self.generation)
    }

    /// Carries effects out; true when it is over.
    fn carry_out(&mut self, effects: Vec<Effect>) -> bool {
        let mut over = false;
        for effect in effects {
            match effect {
                Effect::Run {
                    run,
                    device,
                    action,
                    limit,
                } => self.run(run, &device, action, limit),
                Effect::Cancel(run) => {
                    if let Some(task) = self.running.remove(&run) {
                        task.abort();
                    }
                }
                Effect::Proved(how) => self.proved(how),
                Effect::AskPerson(text) => {
                    self.inner
                        .event(EventLevel::Alarm, &self.record.name, &text);
                }
                Effect::Alarm(text) => {
                    self.inner
                        .event(EventLevel::Alarm, &self.record.name, &text);
                    self.record.remarks.push(text.clone());
                    self.progress.send_modify(|it| it.remarks.push(text));
                }
                Effect::Ended(result) => {
                    if let Err(failures) = &result {
                        let words: Vec<String> = failures.iter().map(failure_words).collect();
                        let text = format!("was NOT fenced: {}", words.join("; "));
                        self.inner
                            .event(EventLevel::Alarm, &self.record.name, &text);
                        self.record.outcome = FenceOutcome::Failed(failures.clone());
                    }
                    self.record.ended_unix_ms = Some(unix_ms());
                    self.write();
                    // Before the end is told, so that whoever hears of it can begin anew.
                    self.ended = true;
                    lock(&self.inner.attempts).remove(&self.record.node);
                    self.progress.send_modify(|it| it.ended = Some(result));
                    over = true;
                }
            }
        }
        over
    }

    fn proved(&mut self, how: FenceEvidence) {
        let proof = FenceProof {
            node: self.record.node,
            generation: self.generation,
            by: self.record.by,
            unix_ms: unix_ms(),
            how,
        };
        let state = self.inner.state();
        let text = format!("was off: {}", evidence_words(&state, &proof.how));
        self.inner
            .event(EventLevel::Warning, &self.record.name, &text);
        self.record.outcome = FenceOutcome::Proved(proof.clone());
        self.write();
        self.progress.send_modify(|it| it.proof = Some(proof));
    }

    fn write(&self) {
        if self.inner.records.try_send(self.record.clone()).is_err() {
            tracing::error!("too much waits for the control log: an attempt is not recorded");
        }
    }

    fn run(&mut self, run: RunId, device: &str, action: Action, limit: Duration) {
        let inner = Arc::clone(&self.inner);
        let (node, name) = (self.record.node, self.record.name.clone());
        let device = self.devices.get(device).cloned();
        let task = self.runs.spawn(async move {
            let reply = match device {
                Some(device) => {
                    let target = device.targets.get(&node).cloned().unwrap_or_default();
                    inner
                        .agents
                        .call_for(&device, &name, &target, action, limit)
                        .await
                }
                None => Reply::Failed("the device is unknown".to_owned()),
            };
            (run, reply)
        });
        self.running.insert(run, task);
    }

    /// How the node is to be fenced, by the devices as they are now.
    async fn plan(&mut self, by_word: bool) -> Plan {
        let state = self.inner.state();
        let timing = self.inner.context.timing;
        let mut plan = Plan {
            node: self.record.name.clone(),
            action: self.record.action,
            delay: Duration::ZERO,
            // A person takes what the node has from it by the reboot itself; the cluster by its decision.
            hold: matches!(self.record.asked, FenceAsked::Cluster(_)),
            levels: Vec::new(),
            grace: timing.heartbeat * 2,
            silence: timing.dead,
        };
        if by_word {
            plan.levels.push(Level {
                number: 1,
                means: Means::Person,
            });
            return plan;
        }
        for (number, devices) in state.fencing.levels(self.record.node) {
            let mut abilities = Vec::new();
            let mut means = None;
            for device in devices {
                let target = device.targets.get(&self.record.node);
                let delay = Duration::from_millis(target.map_or(0, |it| it.delay_ms));
                plan.delay = plan.delay.max(delay);
                if device.kind == FenceKind::Person {
                    means = Some(Means::Person);
                } else {
                    abilities.push(self.ability(&state, device).await);
                    self.devices.insert(device.name.clone(), device.clone());
                }
            }
            plan.levels.push(Level {
                number,
                means: means.unwrap_or(Means::Devices(abilities)),
            });
        }
        plan
    }

    async fn ability(&self, state: &ClusterState, device: &FenceDevice) -> Ability {
        let mut ability = Ability {
            name: device.name.clone(),
            unusable: None,
            off: true,
            on: true,
            status: !device.trust_exit_code,
            trust_exit_code: device.trust_exit_code,
            action_limit: action_limit(device),
            verify_limit: Duration::from_secs(u64::from(device.verify_limit_s)),
        };
        if !may_use(state, device, self.record.by) {
            ability.unusable =
                Some("this node may not use it (--from); ask on a node that may".to_owned());
        } else if let FenceKind::Agent(name) = &device.kind {
            match self.inner.agents.metadata(name).await {
                Ok(metadata) => {
                    ability.off = metadata.can("off");
                    ability.on = metadata.can("on");
                    ability.status = metadata.can("status");
                }
                Err(why) => ability.unusable = Some(why),
            }
        }
        ability
    }
}

/// Who asked, in words.
pub(crate) fn asked_words(asked: &FenceAsked) -> String {
    match asked {
        FenceAsked::Person(who) => who.clone(),
        FenceAsked::Cluster(why) => format!("the cluster ({why})"),
    }
}

/// What failed, in words.
pub(crate) fn failure_words(failure: &relevo_types::cluster::FenceFailure) -> String {
    match &failure.device {
        Some(device) => format!("{device}: {}", failure.why),
        None => failure.why.clone(),
    }
}

/// How it is known, in words.
pub(crate) fn evidence_words(state: &ClusterState, how: &FenceEvidence) -> String {
    match how {
        FenceEvidence::Devices { level, devices } => {
            let each = devices.iter().map(|(name, verified)| match verified {
                FenceVerified::Status => format!("{name} switched it off and said so when asked"),
                FenceVerified::ExitCode => {
                    format!("{name} switched it off, by its exit code, which is trusted")
                }
            });
            format!("{} (level {level})", each.collect::<Vec<_>>().join(", "))
        }
        FenceEvidence::Person { who, on } => {
            format!("{who} confirmed it on node {}", state.node_name(*on))
        }
    }
}
