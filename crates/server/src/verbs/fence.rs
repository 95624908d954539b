//! Fencing, for people: devices, attempts, words of persons, agents.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::{StreamExt as _, future::join_all, stream};
use relevo_fence::{Metadata, Reply, check::unfit, metadata::is_secret};
use relevo_types::{
    NodeId,
    cluster::{
        ClusterState, Command, FenceAction, FenceAsked, FenceCommand, FenceDevice, FenceKind,
        FenceOutcome, FenceTarget, FenceValue,
    },
};
use tokio::sync::watch;

use super::{WAIT, find_node};
use crate::{
    api::{
        AddFenceDeviceRequest, ApiError, Done, ErrorKind, FenceAgentStatus, FenceAgentSummary,
        FenceHistoryEntry, FenceKindRequest, FenceOutlook, FenceParameterStatus, FencePower,
        FenceRequest, FenceWordRequest,
    },
    cluster::Cluster,
    fencing::{
        ConfirmFailure, FenceCall, Progress,
        attempts::{asked_words, evidence_words, failure_words},
        may_use,
    },
    join::split_remedy,
    rpc::send_fence_call,
};

/// Agents that describe themselves at the same time: programs of some 30 MB each.
const AGENTS_PARALLEL: usize = 4;

/// The longest name of a person: it is for the record only.
const WHO_CHARS_MAX: usize = 64;

impl Cluster {
    /// Adds or changes a fence device, checked against what its agent says of itself.
    pub(crate) async fn add_fence_device(
        &self,
        request: AddFenceDeviceRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("fence device `{}` was not added", request.name);
        let state = self.state();
        let (unchecked, replace) = (request.unchecked, request.replace);
        let mut device = device(&state, request, &what)?;
        // What makes no sense to the control log is told before any agent runs.
        let command = |device: &FenceDevice| {
            let device = device.clone();
            Command::from(if replace {
                FenceCommand::ReplaceDevice(device)
            } else {
                FenceCommand::AddDevice(device)
            })
        };
        let mut tried = ClusterState::clone(&state);
        if let Err(rejection) = tried.apply(&command(&device)) {
            return Err(super::rejected(&what, &rejection));
        }
        let mut remarks = Vec::new();
        if let FenceKind::Agent(name) = &device.kind
            && !unchecked
        {
            let metadata = self.metadata(name, &what).await.map_err(|mut error| {
                error.remedy.push_str(
                    ", or add the device on a node that has the agent, or with --unchecked",
                );
                error
            })?;
            remarks = check(&metadata, &mut device, &what)?;
        }
        self.change(&what, command(&device)).await?;
        let users: Vec<String> = users(&state, &device)
            .map(|node| state.node_name(node))
            .collect();
        let targets: Vec<String> = device
            .targets
            .keys()
            .map(|node| state.node_name(*node))
            .collect();
        let mut done = format!(
            "Fence device {} can switch off {}.",
            device.name,
            targets.join(", ")
        );
        if device.kind != FenceKind::Person {
            done.push_str(&format!(
                " It is checked in a moment, from {}; `relevo fence device test {}` checks it here and now.",
                users.join(", "),
                device.name
            ));
        }
        for remark in remarks {
            done.push_str(&format!(" Note: {remark}."));
        }
        Ok(Done { done })
    }

    pub(crate) async fn remove_fence_device(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("fence device `{name}` was not removed");
        let command = Command::from(FenceCommand::RemoveDevice {
            name: name.to_owned(),
        });
        self.change(&what, command).await?;
        Ok(Done {
            done: format!("Fence device {name} is removed."),
        })
    }

    /// Looks now whether a device would work from this node.
    pub(crate) async fn test_fence_device(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("fence device `{name}` was not tested");
        let state = self.state();
        let device = state.fencing.devices.get(name).ok_or_else(|| {
            ApiError::new(
                ErrorKind::NotFound,
                &what,
                format!("there is no fence device `{name}`"),
                "`relevo fence device list` lists them",
            )
        })?;
        if device.kind == FenceKind::Person {
            return Ok(Done {
                done: "A person can't be tested; see to it that one can be reached.".to_owned(),
            });
        }
        if !may_use(&state, device, self.me()) {
            let users: Vec<String> = users(&state, device)
                .map(|node| state.node_name(node))
                .collect();
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                "this node may not use it",
                format!("ask on {}", users.join(" or ")),
            ));
        }
        self.fencing().test(device).await.map_err(|why| {
            let (reason, remedy) = split_remedy(&why);
            ApiError::new(
                ErrorKind::Unavailable,
                format!("fence device `{name}` would not work from this node"),
                reason,
                remedy,
            )
        })?;
        Ok(Done {
            done: format!("Fence device {name} would work from this node; nothing was switched."),
        })
    }

    /// What is known before a node is switched off; refuses what can't be done.
    pub(crate) async fn fence_outlook(&self, name: &str) -> Result<FenceOutlook, ApiError> {
        let what = format!("node `{name}` was not fenced");
        let state = self.state();
        let node = find_node(&state, name, &what)?;
        self.not_myself(node, &what)?;
        let status = self.status().await;
        let mut known = Vec::new();
        let mut warnings = Vec::new();
        let seen = status.nodes.iter().find(|it| it.name == name);
        let condition = seen.map_or("unknown", |it| it.state.as_str());
        known.push(format!("node {name} is {condition}"));
        for service in &status.services {
            if service.node.as_deref() == Some(name) {
                known.push(format!("service {} runs there", service.name));
            }
        }
        for volume in &status.volumes {
            if volume.primary.as_deref() == Some(name) {
                known.push(format!("it is primary of volume {}", volume.name));
            }
            if volume.in_sync.len() == 1 && volume.in_sync.first().is_some_and(|it| it == name) {
                warnings.push(format!(
                    "its replica of volume {} is the only one with all data: the volume stops until the node is back",
                    volume.name
                ));
            }
        }
        for (level, devices) in state.fencing.levels(node) {
            let names: Vec<String> = devices
                .iter()
                .map(|it| format!("{} ({})", it.name, it.kind))
                .collect();
            known.push(format!("level {level}: {}", names.join(" and ")));
        }
        if condition == "alive" {
            warnings.push(format!(
                "{name} is alive: `relevo standby {name}` moves its services away without an interruption"
            ));
        }
        let quorum = &status.quorum;
        let voter = seen.is_some_and(|it| it.voter) && condition == "alive";
        if voter && quorum.alive == quorum.needed {
            warnings.push(
                "without it the voters that are left are no majority: nothing can be decided until it is back"
                    .to_owned(),
            );
        }
        Ok(FenceOutlook {
            node: name.to_owned(),
            known,
            warnings,
        })
    }

    /// Switches a node off, or off and on again.
    pub(crate) async fn fence_node(
        &self,
        name: &str,
        request: FenceRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("node `{name}` was not fenced");
        let state = self.state();
        let node = find_node(&state, name, &what)?;
        typed(name, &request.confirm, &what)?;
        let asked = FenceAsked::Person(self.person(&request.who));
        let progress = self
            .fencing()
            .fence(node, request.action, asked)
            .map_err(|refusal| {
                ApiError::new(ErrorKind::Refused, &what, refusal.reason, refusal.remedy)
            })?;
        if progress.borrow().action != request.action {
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                format!(
                    "an attempt to fence it ({}) is under way: it {}",
                    progress.borrow().action,
                    progress.borrow().doing
                ),
                format!("wait for its end, or `relevo fence cancel {name}`"),
            ));
        }
        self.outcome(name, request.action, progress, &what).await
    }

    /// Waits for the end of an attempt.
    async fn outcome(
        &self,
        name: &str,
        action: FenceAction,
        progress: watch::Receiver<Progress>,
        what: &str,
    ) -> Result<Done, ApiError> {
        let mut ending = progress.clone();
        let ended = ending.wait_for(|progress| progress.ended.is_some());
        let last = match tokio::time::timeout(WAIT, ended).await {
            Ok(Ok(progress)) => progress.clone(),
            Ok(Err(_)) => {
                return Err(ApiError::new(
                    ErrorKind::Unavailable,
                    what,
                    "the attempt was cut short: the daemon is stopping",
                    "ask on another node",
                ));
            }
            Err(_) => progress.borrow().clone(),
        };
        let state = self.state();
        let remarks: String = last
            .remarks
            .iter()
            .map(|it| format!(" Note: {it}."))
            .collect();
        match (&last.ended, &last.proof) {
            (Some(Err(failures)), _) => {
                let words: Vec<String> = failures.iter().map(failure_words).collect();
                Err(ApiError::new(
                    ErrorKind::Unavailable,
                    what,
                    words.join("; "),
                    format!(
                        "`relevo fence device test NAME` tells what is wrong with a device; if you know that {name} is off: `relevo fence confirm {name}`"
                    ),
                ))
            }
            (Some(Ok(())), Some(proof)) => {
                let how = evidence_words(&state, &proof.how);
                let end = if action == FenceAction::Reboot && remarks.is_empty() {
                    " It is switched on again."
                } else {
                    ""
                };
                Ok(Done {
                    done: format!("Node {name} was off: {how}.{end}{remarks}"),
                })
            }
            _ => Err(ApiError::new(
                ErrorKind::Unavailable,
                match last.proof {
                    Some(_) => format!("node `{name}` was off, and it is not over"),
                    None => format!("node `{name}` is not fenced yet"),
                },
                format!("after {} s the attempt {}", WAIT.as_secs(), last.doing),
                "it goes on; `relevo status` and `relevo fence history` show it",
            )),
        }
    }

    /// A person says that a node is off.
    pub(crate) async fn fence_confirm(
        &self,
        name: &str,
        request: FenceWordRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("that node `{name}` is off was not taken");
        let node = find_node(&self.state(), name, &what)?;
        typed(name, &request.confirm, &what)?;
        self.not_myself(node, &what)?;
        let who = self.person(&request.who);
        let refused = |why: String| {
            let (reason, remedy) = split_remedy(&why);
            ApiError::new(ErrorKind::Refused, &what, reason, remedy)
        };
        self.fencing().check_silent(node).await.map_err(refused)?;
        let call = FenceCall::Confirm {
            node,
            who: who.clone(),
            on: self.me(),
        };
        match self.tell_attempt(node, &call).await {
            Ok(by) => Ok(Done {
                done: format!(
                    "{who} says that node {name} is off: the attempt on {} has its proof.",
                    self.state().node_name(by)
                ),
            }),
            Err(ConfirmFailure::Refused(why)) => Err(refused(why)),
            Err(ConfirmFailure::NoAttempt) => {
                // Nobody asked yet: the word is an attempt of its own, so that it is recorded like any other.
                let asked = FenceAsked::Person(who.clone());
                let progress = self.fencing().fence_by_word(node, asked);
                match self.fencing().confirm(node, &who, self.me()).await {
                    Ok(()) => self.outcome(name, FenceAction::Off, progress, &what).await,
                    Err(ConfirmFailure::Refused(why)) => {
                        drop(self.fencing().give_up(node, &who).await);
                        Err(refused(why))
                    }
                    Err(ConfirmFailure::NoAttempt) => {
                        self.outcome(name, FenceAction::Off, progress, &what).await
                    }
                }
            }
        }
    }

    /// A person takes the attempt to fence a node back.
    pub(crate) async fn fence_cancel(
        &self,
        name: &str,
        request: FenceWordRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("the fencing of node `{name}` was not cancelled");
        let node = find_node(&self.state(), name, &what)?;
        let call = FenceCall::GiveUp {
            node,
            who: self.person(&request.who),
        };
        match self.tell_attempt(node, &call).await {
            Ok(by) => Ok(Done {
                done: format!(
                    "The attempt of {} to fence node {name} was told to end; `relevo fence history` shows what came of it.",
                    self.state().node_name(by)
                ),
            }),
            Err(ConfirmFailure::NoAttempt) => Err(ApiError::new(
                ErrorKind::Refused,
                what,
                "no node that answers is at it",
                "`relevo status` shows attempts under way",
            )),
            Err(ConfirmFailure::Refused(why)) => {
                Err(ApiError::new(ErrorKind::Refused, what, why, ""))
            }
        }
    }

    /// Tells whichever node is at it; gives that node.
    async fn tell_attempt(&self, node: NodeId, call: &FenceCall) -> Result<NodeId, ConfirmFailure> {
        match self.fencing().answer(call.clone()).await {
            Ok(()) => return Ok(self.me()),
            Err(ConfirmFailure::NoAttempt) => {}
            Err(refused) => return Err(refused),
        }
        let state = self.state();
        let others = state
            .nodes
            .keys()
            .copied()
            .filter(|other| *other != self.me() && *other != node);
        let asked = others.map(|other| async move {
            // Asking a node that is away costs the whole wait, and tells nothing.
            if self.rpc().trouble_with(other).is_some() {
                return None;
            }
            Some((other, send_fence_call(self.rpc(), other, call).await.ok()?))
        });
        let mut refused = ConfirmFailure::NoAttempt;
        for (other, answer) in join_all(asked).await.into_iter().flatten() {
            match answer {
                Ok(()) => return Ok(other),
                Err(ConfirmFailure::NoAttempt) => {}
                Err(why) => refused = why,
            }
        }
        Err(refused)
    }

    /// What the devices of a node say of its power.
    pub(crate) async fn fence_power(&self, name: &str) -> Result<Vec<FencePower>, ApiError> {
        let what = format!("the power of node `{name}` was not asked for");
        let state = self.state();
        let node = find_node(&state, name, &what)?;
        let found = self.fencing().power(node).await;
        if found.is_empty() {
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                "it has no fence device that this node may ask",
                "`relevo fence device list` tells which node may use which",
            ));
        }
        let power = |(device, level, reply): (FenceDevice, u8, Reply)| {
            let (power, detail) = match reply {
                Reply::On => ("on", None),
                Reply::Off => ("off", None),
                Reply::Failed(why) => ("unknown", Some(why)),
                Reply::Done => ("unknown", None),
            };
            FencePower {
                device: device.name,
                level,
                power: power.to_owned(),
                detail,
            }
        };
        Ok(found.into_iter().map(power).collect())
    }

    /// What was done, the newest last.
    pub(crate) fn fence_history(&self) -> Vec<FenceHistoryEntry> {
        let state = self.state();
        let entry = |record: &relevo_types::cluster::FenceRecord| {
            let (proof, how) = match &record.outcome {
                FenceOutcome::Proved(proof) => {
                    (Some(proof), vec![evidence_words(&state, &proof.how)])
                }
                FenceOutcome::Failed(failures) => {
                    (None, failures.iter().map(failure_words).collect())
                }
            };
            FenceHistoryEntry {
                node: record.name.clone(),
                by: state.node_name(record.by),
                asked: asked_words(&record.asked),
                action: record.action,
                begun_unix_ms: record.begun_unix_ms,
                ended_unix_ms: record.ended_unix_ms,
                proved: proof.is_some(),
                proved_unix_ms: proof.map(|it| it.unix_ms),
                generation: proof.map(|it| it.generation.0),
                how,
                remarks: record.remarks.clone(),
            }
        };
        state.fencing.history.iter().map(entry).collect()
    }

    /// The agents that are installed here.
    pub(crate) async fn fence_agents(&self) -> Vec<FenceAgentSummary> {
        let agents = self.fencing().agents();
        let described = agents.installed().into_iter().map(|name| async move {
            let description = match agents.metadata(&name).await {
                Ok(metadata) => metadata.shortdesc.clone(),
                Err(_) => {
                    format!("(does not describe itself; `relevo fence agent {name}` says why)")
                }
            };
            FenceAgentSummary { name, description }
        });
        let described: Vec<_> = described.collect();
        stream::iter(described)
            .buffered(AGENTS_PARALLEL)
            .collect()
            .await
    }

    /// What an agent says of itself.
    pub(crate) async fn fence_agent(&self, name: &str) -> Result<FenceAgentStatus, ApiError> {
        let what = format!("fence agent `{name}` can't be described");
        let metadata = self.metadata(name, &what).await?;
        let shown = |it: &&relevo_fence::Parameter| {
            !matches!(it.name.as_str(), "action" | "option" | "help" | "version")
        };
        Ok(FenceAgentStatus {
            name: name.to_owned(),
            description: metadata.shortdesc.clone(),
            text: metadata.longdesc.clone(),
            actions: metadata.actions.iter().cloned().collect(),
            parameters: metadata
                .parameters
                .iter()
                .filter(shown)
                .map(|it| FenceParameterStatus {
                    name: it.name.clone(),
                    required: it.required && it.default.is_none(),
                    secret: metadata.is_secret(&it.name),
                    deprecated: it.deprecated,
                    default: it.default.clone(),
                    choices: it.choices.clone(),
                    description: it.shortdesc.clone(),
                })
                .collect(),
            needs_plug: metadata
                .plug_parameter()
                .and_then(|plug| metadata.parameter(plug))
                .is_some_and(|it| it.required && it.default.is_none()),
            unfit: unfit(&metadata, false).map(str::to_owned),
        })
    }

    async fn metadata(&self, name: &str, what: &str) -> Result<Arc<Metadata>, ApiError> {
        self.fencing().agents().metadata(name).await.map_err(|why| {
            let (reason, remedy) = split_remedy(&why);
            ApiError::new(ErrorKind::Refused, what, reason, remedy)
        })
    }

    fn not_myself(&self, node: NodeId, what: &str) -> Result<(), ApiError> {
        if node == self.me() {
            return Err(ApiError::new(
                ErrorKind::Refused,
                what,
                "it is the node that is asked, and it is on",
                "ask on another node",
            ));
        }
        Ok(())
    }

    /// A person as the record names it.
    fn person(&self, who: &str) -> String {
        let who: String = who
            .chars()
            .filter(|c| !c.is_control())
            .take(WHO_CHARS_MAX)
            .collect();
        let who = if who.trim().is_empty() {
            "somebody"
        } else {
            who.trim()
        };
        format!("{who} on {}", self.state().node_name(self.me()))
    }
}

/// The device that is asked for.
fn device(
    state: &ClusterState,
    request: AddFenceDeviceRequest,
    what: &str,
) -> Result<FenceDevice, ApiError> {
    let bad = |reason: String, remedy: &str| {
        Err(ApiError::new(ErrorKind::BadRequest, what, reason, remedy))
    };
    let secrets: BTreeSet<&String> = request.secrets.iter().collect();
    if let Some(name) = request
        .secrets
        .iter()
        .find(|it| !request.parameters.contains_key(*it))
    {
        return bad(
            format!("`{name}` is to be a secret and has no value"),
            "give it with --set",
        );
    }
    let mut parameters: BTreeMap<String, FenceValue> = BTreeMap::new();
    for (name, value) in &request.parameters {
        let value = value.clone();
        let value = if secrets.contains(name) || is_secret(name, "") {
            FenceValue::Secret(value)
        } else {
            FenceValue::Plain(value)
        };
        parameters.insert(name.clone(), value);
    }
    for (name, path) in request.files {
        if parameters.contains_key(&name) {
            return bad(
                format!("`{name}` is given as a value and as a file"),
                "leave one of the two out",
            );
        }
        parameters.insert(name, FenceValue::File(path));
    }
    let mut targets = BTreeMap::new();
    for (name, plug) in request.nodes {
        let target = FenceTarget {
            plug,
            level: request.level,
            delay_ms: request.delay_ms,
        };
        if targets
            .insert(find_node(state, &name, what)?, target)
            .is_some()
        {
            return bad(
                format!("node {name} is named twice"),
                "a node with two plugs of one device has both in one --node: NODE=1,2",
            );
        }
    }
    let from = request.from.map(|names| {
        names
            .iter()
            .map(|name| find_node(state, name, what))
            .collect::<Result<BTreeSet<_>, _>>()
    });
    Ok(FenceDevice {
        name: request.name,
        kind: match request.kind {
            FenceKindRequest::Agent(name) => FenceKind::Agent(name),
            FenceKindRequest::Command(words) => FenceKind::Command(words),
            FenceKindRequest::Person => FenceKind::Person,
        },
        parameters,
        targets,
        from: from.transpose()?,
        action_limit_s: request.action_limit_s,
        verify_limit_s: request.verify_limit_s,
        check_every_s: request.check_every_s,
        trust_exit_code: request.trust_exit_code,
    })
}

/// Checks a device against what its agent says, and hides what it calls a secret. Gives what is worth knowing.
fn check(
    metadata: &Metadata,
    device: &mut FenceDevice,
    what: &str,
) -> Result<Vec<String>, ApiError> {
    let with_plug = device.targets.values().any(|it| it.plug.is_some());
    let findings = metadata.check(&device.parameters, with_plug);
    let mut errors = findings.errors;
    errors.extend(unfit(metadata, device.trust_exit_code).map(str::to_owned));
    if let Some((first, rest)) = errors.split_first() {
        let (mut reason, remedy) = split_remedy(first);
        for more in rest {
            reason.push_str(&format!("; also: {more}"));
        }
        return Err(ApiError::new(ErrorKind::BadRequest, what, reason, remedy));
    }
    for (name, value) in &mut device.parameters {
        if let FenceValue::Plain(text) = value
            && metadata.is_secret(name)
        {
            *value = FenceValue::Secret(std::mem::take(text));
        }
    }
    Ok(findings.remarks)
}

/// The nodes that may use a device against another one.
fn users<'a>(
    state: &'a ClusterState,
    device: &'a FenceDevice,
) -> impl Iterator<Item = NodeId> + 'a {
    state
        .nodes
        .keys()
        .copied()
        .filter(|node| may_use(state, device, *node))
        .filter(|node| device.targets.keys().any(|target| target != node))
}

fn typed(name: &str, confirm: &str, what: &str) -> Result<(), ApiError> {
    if confirm == name {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::BadRequest,
        what,
        "it was not confirmed with the name of the node",
        format!("confirm with `{name}`"),
    ))
}
