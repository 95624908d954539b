//! Where services run: rules, holding, and why.

use relevo_planner::{Fitness, Supposed};
use relevo_types::{
    NodeId, ServiceId,
    cluster::{ClusterState, Command, Placement},
    size::parse_size,
};

use super::{find_node, find_service};
use crate::{
    api::{
        ApiError, Done, ErrorKind, MoveForecast, PlacementRequest, WhatIfAnswer, WhatIfRequest,
        WhyAnswer, WhyNode,
    },
    cluster::Cluster,
};

impl Cluster {
    /// Changes where a service may and shall run.
    pub(crate) async fn place_service(
        &self,
        name: &str,
        request: &PlacementRequest,
    ) -> Result<Done, ApiError> {
        let what = format!("the placement of service `{name}` was not changed");
        let state = self.state();
        let service = find_service(&state, name, &what)?;
        let placement = changed(&state, &service.placement, request, &what)?;
        let rules = placement.words(&state);
        let service = service.id;
        self.change(&what, Command::SetPlacement { service, placement })
            .await?;
        Ok(Done {
            done: if rules.is_empty() {
                format!("Service {name} may run on any node that can.")
            } else {
                format!("Service {name}: {}.", rules.join("; "))
            },
        })
    }

    /// Holds a service where it is, or ends that.
    pub(crate) async fn hold_service(
        &self,
        name: &str,
        reason: Option<String>,
    ) -> Result<Done, ApiError> {
        let what = format!("service `{name}` is as it was");
        let service = find_service(&self.state(), name, &what)?.id;
        let done = match &reason {
            Some(_) => format!(
                "Service {name} is held: nothing moves it, also not the death of its node; `relevo service unhold {name}` ends that."
            ),
            None => format!("Service {name} is held no more."),
        };
        self.change(&what, Command::Hold { service, reason })
            .await?;
        Ok(Done { done })
    }

    /// Why a service is where it is.
    pub(crate) async fn why(&self, name: &str) -> Result<WhyAnswer, ApiError> {
        let what = format!("nothing can be said of service `{name}`");
        let state = self.state();
        let id = find_service(&state, name, &what)?.id;
        let status = self.status().await;
        let service = status.services.into_iter().find(|it| it.name == name);
        let service = service.ok_or_else(|| {
            ApiError::new(ErrorKind::NotFound, what, "it was removed meanwhile", "")
        })?;
        let holder = state.services.get(&id).and_then(|service| service.holder);
        let verdicts = self.verdicts(id).await;
        let nodes = verdicts.iter().map(|(node, fitness)| WhyNode {
            node: state.node_name(*node),
            has_it: holder == Some(*node),
            can: matches!(fitness, Fitness::Fit { .. }),
            verdict: fitness.words(),
        });
        Ok(WhyAnswer {
            service,
            judged_by: state.node_name(self.me()),
            decides: self.leader() == Some(self.me()),
            nodes: nodes.collect(),
        })
    }

    /// What would come of something. Nothing of it is done.
    pub(crate) async fn what_if(&self, request: &WhatIfRequest) -> Result<WhatIfAnswer, ApiError> {
        let what = "nothing can be foreseen";
        let state = self.state();
        let supposed = match request {
            WhatIfRequest::Dies(node) => Supposed::Dies(find_node(&state, node, what)?),
            WhatIfRequest::Standby(node) => Supposed::Standby(find_node(&state, node, what)?),
        };
        let forecast = self.forecast(supposed).await.ok_or_else(|| {
            ApiError::new(
                ErrorKind::Unavailable,
                what,
                "this node does not know the state of the cluster yet",
                "`relevo status` shows whom it reaches; ask again then",
            )
        })?;
        let name = |node: Option<NodeId>| node.map(|node| state.node_name(node));
        let moves = forecast.moves.into_iter().map(|(service, (from, to))| {
            let known = state.services.get(&service);
            MoveForecast {
                service: known.map_or_else(|| service.to_string(), |it| it.spec.name.clone()),
                from: name(from),
                to: name(to),
            }
        });
        Ok(WhatIfAnswer {
            decides: forecast.decides,
            steps: forecast.steps,
            moves: moves.collect(),
            waits: forecast.waits.into_iter().map(|it| it.reason).collect(),
            remarks: forecast.remarks,
        })
    }
}

/// A placement with the rules that a request gives.
pub(super) fn changed(
    state: &ClusterState,
    placement: &Placement,
    request: &PlacementRequest,
    what: &str,
) -> Result<Placement, ApiError> {
    let nodes = |names: &Option<Vec<String>>| -> Result<Option<Vec<NodeId>>, ApiError> {
        let found = names.as_ref().map(|names| {
            let ids = names.iter().map(|name| find_node(state, name, what));
            ids.collect()
        });
        found.transpose()
    };
    let services = |names: &Option<Vec<String>>| -> Result<Option<Vec<ServiceId>>, ApiError> {
        let found = names.as_ref().map(|names| {
            let ids = names.iter().map(|name| find_service(state, name, what));
            ids.map(|found| found.map(|service| service.id)).collect()
        });
        found.transpose()
    };
    let mut new = placement.clone();
    if let Some(prefer) = nodes(&request.prefer)? {
        new.prefer = prefer;
    }
    for (rule, names) in [
        (&mut new.only, &request.only),
        (&mut new.never, &request.never),
    ] {
        if let Some(given) = nodes(names)? {
            *rule = given.into_iter().collect();
        }
    }
    for (rule, names) in [
        (&mut new.with, &request.with),
        (&mut new.apart, &request.apart),
        (&mut new.after, &request.after),
    ] {
        if let Some(given) = services(names)? {
            *rule = given.into_iter().collect();
        }
    }
    if let Some(memory) = &request.memory {
        let bytes = parse_size(memory).map_err(|why| {
            ApiError::new(ErrorKind::BadRequest, what, why, "write for example 4GiB")
        })?;
        new.memory_mib = bytes.div_ceil(1 << 20);
    }
    if let Some(delay) = &request.failback {
        new.failback_s = match delay.as_str() {
            "never" => None,
            delay => Some(parse_delay_s(delay).ok_or_else(|| {
                ApiError::new(
                    ErrorKind::BadRequest,
                    what,
                    format!("`{delay}` is no delay for `failback`"),
                    "write for example 30s, 5min or 1h, or `never`",
                )
            })?),
        };
    }
    Ok(new)
}

/// `30s`, `5min`, `1h` or `2d` in seconds.
fn parse_delay_s(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays() {
        assert_eq!(parse_delay_s("30s"), Some(30));
        assert_eq!(parse_delay_s("5min"), Some(300));
        assert_eq!(parse_delay_s("1 h"), Some(3600));
        for bad in ["", "30", "s", "-3s", "5 weeks", "99999999999999999999d"] {
            assert_eq!(parse_delay_s(bad), None, "{bad}");
        }
    }
}
