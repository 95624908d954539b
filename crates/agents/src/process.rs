//! The process part: a supervised process with the service's environment.

use std::path::PathBuf;

use relevo_host::process::{ProcessSpec, ProcessState, Supervisor};
use relevo_types::{ServiceId, cluster::ProcessPart};
use tokio::sync::mpsc;

use crate::{Attached, PartFailed, PartHealth, Result};

/// What a process is told about its service.
#[derive(Debug)]
pub(crate) struct ProcessContext<'a> {
    pub(crate) service: ServiceId,
    pub(crate) service_name: &'a str,
    pub(crate) index: usize,
    pub(crate) node_name: &'a str,
    pub(crate) log: PathBuf,
    pub(crate) volumes: Vec<Attached>,
}

/// Starts the process, waits until it is ready, and reports to `failures` when it is given up.
pub(crate) async fn start(
    part: &ProcessPart,
    context: ProcessContext<'_>,
    failures: &mpsc::Sender<PartFailed>,
) -> Result<Supervisor> {
    let program = part.command.first().map_or("", String::as_str);
    let name = format!("{} of service {}", program, context.service_name);
    let mut spec = ProcessSpec::new(name, part.command.clone());
    spec.directory.clone_from(&part.directory);
    spec.ready = part.ready;
    spec.log = Some(context.log);
    spec.environment
        .insert("RELEVO_SERVICE".into(), context.service_name.into());
    spec.environment
        .insert("RELEVO_NODE".into(), context.node_name.into());
    for volume in &context.volumes {
        let path = volume.place.path().to_string_lossy().into_owned();
        spec.environment.insert(variable(&volume.name), path);
    }
    // The administrator's words come last and win.
    spec.environment.extend(part.environment.clone());

    let supervisor = Supervisor::start(spec)?;
    if let Err(error) = supervisor.ready().await {
        supervisor.stop(true).await?;
        return Err(error);
    }
    let mut states = supervisor.states();
    let (service, index) = (context.service, context.index);
    let failures = failures.clone();
    tokio::spawn(async move {
        let over = |state: &ProcessState| {
            matches!(state, ProcessState::Failed { .. } | ProcessState::Stopped)
        };
        let reason = match states.wait_for(over).await.as_deref() {
            Ok(ProcessState::Failed { reason }) => reason.clone(),
            _ => return,
        };
        let report = PartFailed {
            service,
            index,
            reason,
        };
        // The manager has gone only when the daemon ends.
        drop(failures.send(report).await);
    });
    Ok(supervisor)
}

pub(crate) fn probe(supervisor: Option<&Supervisor>) -> PartHealth {
    match supervisor.map(Supervisor::state) {
        None | Some(ProcessState::Stopped) => PartHealth::Inactive,
        Some(ProcessState::Running { .. }) => PartHealth::Active,
        Some(ProcessState::Restarting { reason }) => PartHealth::Impaired(reason),
        Some(ProcessState::Failed { reason }) => PartHealth::Failed(reason),
    }
}

/// The environment variable that holds the path of a volume's device or socket.
fn variable(volume: &str) -> String {
    let name: String = volume
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_uppercase()
            } else {
                '_'
            }
        })
        .collect();
    format!("RELEVO_VOLUME_{name}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn variables_are_made_of_letters_digits_and_underscores() {
        assert_eq!(
            super::variable("mail-store.2"),
            "RELEVO_VOLUME_MAIL_STORE_2"
        );
    }
}
