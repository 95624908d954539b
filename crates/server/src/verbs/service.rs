//! Services: create, remove, start, stop, move.

use std::{net::IpAddr, time::Duration};

use relevo_types::{
    NodeId, ServiceId, VolumeId,
    cluster::{
        AddressPart, ClusterState, Command, MountPart, Outcome, Part, Placement, ProcessPart,
        Protocol, Service, ServiceSpec, VolumePart,
    },
};

use super::{Found, WAIT, find_node, find_service, find_volume, placement::changed};
use crate::{
    api::{
        AddressRequest, ApiError, CreateServiceRequest, Done, ErrorKind, PartRequest, ServiceState,
    },
    cluster::Cluster,
};

/// How often a call that waits for a service to run looks at its holder's report.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How long a switchover waits for a replica of protocol A to get all that it lacks. It is admitted for
/// five minutes, and the move itself needs a part of them.
const DRAIN_WAIT: Duration = Duration::from_secs(240);

/// A service that failed and that nobody took in so many looks (a second) is not taken at all: the
/// planner needs some milliseconds.
const FREE_LOOKS: u32 = 20;

impl Cluster {
    /// Creates a service and waits until it runs, or a node gave it up.
    pub(crate) async fn create_service(
        &self,
        request: CreateServiceRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("service `{}` was not created", request.name);
        let state = self.state();
        let spec = service_spec(&state, &request, &what)?;
        let target = match &request.on {
            Some(node) => Some(find_node(&state, node, &what)?),
            None => None,
        };
        let placement = changed(&state, &Placement::default(), &request.placement, &what)?;
        let command = Command::CreateService {
            spec,
            placement,
            target,
        };
        let Outcome::Service(id) = self.change(&what, command).await? else {
            return Err(ApiError::new(
                ErrorKind::Internal,
                what,
                "the control log gave an answer that does not fit",
                "report this as a bug",
            ));
        };
        let name = &request.name;
        self.await_running(
            id,
            name,
            None,
            format!("service `{name}` was created and does not run"),
        )
        .await
    }

    /// Stops and removes a service.
    pub(crate) async fn remove_service(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("service `{name}` was not removed");
        let id = find_service(&self.state(), name, &what)?.id;
        self.disable(id, &what).await?;
        self.change(&what, Command::RemoveService { service: id })
            .await?;
        Ok(Done {
            done: format!("Service {name} is gone."),
        })
    }

    /// Starts a service and waits until it runs.
    pub(crate) async fn start_service(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("service `{name}` was not started");
        let id = find_service(&self.state(), name, &what)?.id;
        let enable = Command::EnableService {
            service: id,
            enabled: true,
        };
        self.change(&what, enable).await?;
        self.await_running(id, name, None, format!("service `{name}` does not run"))
            .await
    }

    /// Stops a service and waits until nobody holds it.
    pub(crate) async fn stop_service(&self, name: &str) -> Result<Done, ApiError> {
        let what = format!("service `{name}` was not stopped");
        let id = find_service(&self.state(), name, &what)?.id;
        self.disable(id, &what).await?;
        Ok(Done {
            done: format!("Service {name} is stopped."),
        })
    }

    /// Moves a service and waits until it runs there; without a node, takes the wish back.
    pub(crate) async fn move_service(
        &self,
        name: &str,
        to: Option<&str>,
    ) -> Result<Done, ApiError> {
        let what = format!("service `{name}` was not moved");
        let state = self.state();
        let id = find_service(&state, name, &what)?.id;
        let target = match to {
            Some(node) => Some(find_node(&state, node, &what)?),
            None => None,
        };
        if let Some(node) = target {
            let service = find_service(&state, name, &what)?;
            self.drain_to(service, node, &what).await?;
            let state = self.state();
            check_move(&state, find_service(&state, name, &what)?, node, &what)?;
        }
        self.change(
            &what,
            Command::SetTarget {
                service: id,
                target,
            },
        )
        .await?;
        if target.is_none() {
            return Ok(Done {
                done: format!("Service {name} may be anywhere; it stays where it is."),
            });
        }
        self.await_running(id, name, target, what).await
    }

    /// Before a switchover to replicas of protocol A: they get what they lack and join the in-sync set.
    async fn drain_to(&self, service: &Service, node: NodeId, what: &str) -> Result<(), ApiError> {
        let volumes: Vec<VolumeId> = service.spec.volumes().collect();
        for id in volumes {
            let state = self.state();
            let Some(volume) = state.volumes.get(&id) else {
                continue;
            };
            let follows = volume.serving().is_some_and(|primary| {
                volume.replicas.contains_key(&node)
                    && volume.protocol(primary, node) == Protocol::A
                    && !volume.in_sync.contains(&node)
            });
            if !follows {
                continue;
            }
            // Taken back first: the time for which it holds counts from the change.
            let name = volume.name.clone();
            let node_name = state.node_name(node);
            for admit in ["none", &node_name] {
                let change = [("admit".to_owned(), admit.to_owned())];
                self.set_volume_options(&name, &change).await?;
            }
            let late = || {
                ApiError::new(
                    ErrorKind::Unavailable,
                    what,
                    format!(
                        "the replica of volume `{name}` on {node_name}, of protocol A, did not get all that it lacks within {} s",
                        DRAIN_WAIT.as_secs()
                    ),
                    "`relevo status` shows how far it is behind; ask again when that is less",
                )
            };
            self.await_state(DRAIN_WAIT, late, |state| match state.volumes.get(&id) {
                Some(volume) if !volume.in_sync.contains(&node) => Found::NotYet,
                _ => Found::Yes(()),
            })
            .await?;
        }
        Ok(())
    }

    async fn disable(&self, id: ServiceId, what: &str) -> Result<(), ApiError> {
        let disable = Command::EnableService {
            service: id,
            enabled: false,
        };
        self.change(what, disable).await?;
        let late = || {
            ApiError::new(
                ErrorKind::Unavailable,
                what,
                format!("its parts did not stop within {} s", WAIT.as_secs()),
                "`relevo status` shows what it waits for; it goes on stopping",
            )
        };
        self.await_state(WAIT, late, |state| match state.services.get(&id) {
            Some(service) if service.holder.is_some() => Found::NotYet,
            _ => Found::Yes(()),
        })
        .await
    }

    /// Waits until a service runs (on `node`, if given), as its holder reports, or until it was
    /// given up and nobody takes it.
    async fn await_running(
        &self,
        id: ServiceId,
        name: &str,
        node: Option<NodeId>,
        what: String,
    ) -> Result<Done, ApiError> {
        let failed_before = failures(&self.state(), id);
        let mut free_looks = 0;
        let wait = async {
            loop {
                match self.look_at(id, node, failed_before, &what).await {
                    Look::Runs(done) => return Ok(done),
                    Look::Over(error) => return Err(error),
                    Look::Free(error) if free_looks >= FREE_LOOKS => return Err(error),
                    Look::Free(_) => free_looks += 1,
                    Look::NotYet => free_looks = 0,
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        match tokio::time::timeout(WAIT, wait).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::new(
                ErrorKind::Unavailable,
                what.clone(),
                format!("service {name} did not run within {} s", WAIT.as_secs()),
                "`relevo status` shows what it waits for; the cluster goes on trying",
            )),
        }
    }

    async fn look_at(
        &self,
        id: ServiceId,
        node: Option<NodeId>,
        failed_before: u32,
        what: &str,
    ) -> Look {
        let state = self.state();
        let refused = |why: &str, remedy: String| {
            Look::Over(ApiError::new(ErrorKind::Refused, what, why, remedy))
        };
        let Some(service) = state.services.get(&id) else {
            return refused("it was removed meanwhile", String::new());
        };
        let name = &service.spec.name;
        let here = node.is_none() || service.holder == node;
        if let Some(holder) = service.holder.filter(|_| here)
            && self.service_state(id).await == ServiceState::Running
        {
            return Look::Runs(running(&state, service, holder));
        }
        if !service.enabled {
            let remedy = format!("`relevo service start {name}` starts it");
            return refused("it was stopped meanwhile", remedy);
        }
        let failed = failures(&state, id) > failed_before;
        match (failed, node, service.holder) {
            (false, _, _) => Look::NotYet,
            // It failed where it was asked to be.
            (true, Some(_), _) => Look::Over(gave_up(&state, service, what)),
            // Another node tries.
            (true, None, Some(_)) => Look::NotYet,
            (true, None, None) => Look::Free(gave_up(&state, service, what)),
        }
    }
}

/// What a look at a service that shall run found.
enum Look {
    Runs(Done),
    /// It can't come any more.
    Over(ApiError),
    /// A node gave it up, and nobody has it at the moment.
    Free(ApiError),
    NotYet,
}

fn running(state: &ClusterState, service: &Service, holder: NodeId) -> Done {
    let mut done = format!(
        "Service {} runs on {}.",
        service.spec.name,
        state.node_name(holder)
    );
    for (node, failure) in service.failures.iter().filter(|(node, _)| **node != holder) {
        done.push_str(&format!(
            " It failed on {}: {}.",
            state.node_name(*node),
            failure.reason
        ));
    }
    Done { done }
}

/// How often nodes gave the service up.
fn failures(state: &ClusterState, id: ServiceId) -> u32 {
    state.services.get(&id).map_or(0, |service| {
        service.failures.values().map(|f| f.count).sum()
    })
}

fn gave_up(state: &ClusterState, service: &Service, what: &str) -> ApiError {
    let failures: Vec<String> = service
        .failures
        .iter()
        .map(|(node, failure)| {
            format!(
                "node {} gave it up: {}",
                state.node_name(*node),
                failure.reason
            )
        })
        .collect();
    ApiError::new(
        ErrorKind::Refused,
        what,
        failures.join("; "),
        format!(
            "mend that, then run `relevo service start {}`",
            service.spec.name
        ),
    )
}

/// Refuses at once what the planner would wait for without an end.
fn check_move(
    state: &ClusterState,
    service: &Service,
    node: NodeId,
    what: &str,
) -> Result<(), ApiError> {
    let name = state.node_name(node);
    let refuse =
        |why: String, remedy: String| Err(ApiError::new(ErrorKind::Refused, what, why, remedy));
    if !service.enabled {
        return refuse(
            "it is stopped".to_owned(),
            format!("`relevo service start {}` starts it", service.spec.name),
        );
    }
    if let Some(member) = state.nodes.get(&node) {
        if member.standby {
            return refuse(
                format!("node {name} is in standby"),
                format!("`relevo unstandby {name}` ends that"),
            );
        }
        if member.lease.evicted {
            return refuse(
                format!("node {name} is down"),
                "bring it back first".to_owned(),
            );
        }
    }
    for id in service.spec.volumes() {
        if let Some(volume) = state.volumes.get(&id)
            && !volume.in_sync.contains(&node)
        {
            let volume = &volume.name;
            return refuse(
                format!("node {name} has no in-sync replica of volume `{volume}`"),
                "wait for its resync (`relevo status` shows it), or choose another node".to_owned(),
            );
        }
    }
    Ok(())
}

fn service_spec(
    state: &ClusterState,
    request: &CreateServiceRequest,
    what: &str,
) -> Result<ServiceSpec, ApiError> {
    let parts: Result<Vec<Part>, ApiError> = request
        .parts
        .iter()
        .map(|part| self::part(state, part, what))
        .collect();
    Ok(ServiceSpec {
        name: request.name.clone(),
        parts: parts?,
    })
}

fn part(state: &ClusterState, part: &PartRequest, what: &str) -> Result<Part, ApiError> {
    Ok(match part {
        PartRequest::Volume(volume) => Part::Volume(VolumePart {
            volume: find_volume(state, &volume.name, what)?.id,
            device: volume.device,
        }),
        PartRequest::Mount(mount) => {
            if !mount.at.is_absolute() {
                return Err(ApiError::new(
                    ErrorKind::BadRequest,
                    what,
                    format!("the mount point {} is no absolute path", mount.at.display()),
                    "begin it with `/`",
                ));
            }
            Part::Mount(MountPart {
                volume: find_volume(state, &mount.volume, what)?.id,
                mount_point: mount.at.clone(),
                filesystem: mount.filesystem.clone(),
                make: mount.make,
                options: mount.options.clone(),
            })
        }
        PartRequest::Address(address) => Part::Address(address_part(address, what)?),
        PartRequest::Process(process) => {
            if let Some(program) = process.command.first().filter(|p| !p.starts_with('/')) {
                return Err(ApiError::new(
                    ErrorKind::BadRequest,
                    what,
                    format!("the program `{program}` is no absolute path"),
                    "a service starts without a search path: write the whole path",
                ));
            }
            Part::Process(ProcessPart {
                command: process.command.clone(),
                environment: process.environment.clone(),
                directory: process.directory.clone(),
                ready: process.ready,
            })
        }
    })
}

fn address_part(request: &AddressRequest, what: &str) -> Result<AddressPart, ApiError> {
    let bad = || {
        ApiError::new(
            ErrorKind::BadRequest,
            what,
            format!("`{}` is no address with a prefix", request.address),
            "write for example 192.168.1.1/24 or fd00::1/64",
        )
    };
    let (address, prefix) = request.address.split_once('/').ok_or_else(bad)?;
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let prefix: u8 = prefix.parse().map_err(|_| bad())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix == 0 || prefix > longest {
        return Err(bad());
    }
    Ok(AddressPart {
        address,
        prefix,
        interface: request.interface.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(address: &str) -> Result<AddressPart, ApiError> {
        let request = AddressRequest {
            address: address.to_owned(),
            interface: None,
        };
        address_part(&request, "x")
    }

    #[test]
    fn addresses() {
        assert_eq!(read("10.0.0.1/24").unwrap().prefix, 24);
        assert_eq!(read("fd00::1/64").unwrap().prefix, 64);
        for bad in [
            "10.0.0.1",
            "10.0.0.1/33",
            "10.0.0/24",
            "10.0.0.1/0",
            "fd00::1/129",
        ] {
            assert!(
                read(bad).unwrap_err().remedy.contains("192.168.1.1/24"),
                "{bad}"
            );
        }
    }
}
