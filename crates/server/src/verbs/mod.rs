//! The calls of the API on a running cluster: each checks, proposes to the control log, and waits
//! until what was asked for is there or can't come.

mod fence;
pub(crate) mod metadata;
mod node;
mod order;
mod path;
mod placement;
mod replica;
mod service;
mod split;
mod volume;
mod wait_sync;

use std::time::Duration;

use relevo_transport::random;
use relevo_types::{
    LineageId, NodeId,
    cluster::{ClusterState, Command, Outcome, Rejection, Service, Volume},
};

use crate::{
    api::{ApiError, ErrorKind},
    cluster::Cluster,
};

/// How long a call waits for what it asked for before it says that it is still under way. The
/// longest normal step is making a file system on a large volume.
const WAIT: Duration = Duration::from_secs(120);

/// What a wait found.
enum Found<T> {
    Yes(T),
    /// It can't come any more.
    Failed(ApiError),
    /// Not yet.
    NotYet,
}

/// An identity for a volume's next history.
fn new_lineage(what: &str) -> Result<LineageId, ApiError> {
    let lineage = random::nonzero_u64()
        .map_err(|e| ApiError::new(ErrorKind::Internal, what, e.to_string(), ""))?;
    Ok(LineageId(lineage))
}

impl Cluster {
    /// Proposes a command and explains what stood against it.
    async fn change(&self, what: &str, command: Command) -> Result<Outcome, ApiError> {
        self.propose(command).await.map_err(|e| e.explain(what))
    }

    /// Waits until `look` finds something in the committed state.
    async fn await_state<T>(
        &self,
        bound: Duration,
        late: impl FnOnce() -> ApiError,
        mut look: impl FnMut(&ClusterState) -> Found<T>,
    ) -> Result<T, ApiError> {
        let mut states = self.states();
        let wait = async {
            loop {
                let found = look(&states.borrow_and_update());
                match found {
                    Found::Yes(found) => return Ok(found),
                    Found::Failed(error) => return Err(error),
                    Found::NotYet => {}
                }
                if states.changed().await.is_err() {
                    return Err(ApiError::new(
                        ErrorKind::Unavailable,
                        "the call was cut short",
                        "the daemon is stopping",
                        "ask again when it is back; `relevo status` shows what was done",
                    ));
                }
            }
        };
        match tokio::time::timeout(bound, wait).await {
            Ok(result) => result,
            Err(_) => Err(late()),
        }
    }
}

/// Why a command had no effect, as far as is known.
#[derive(Clone, Debug)]
pub(crate) enum ProposeFailure {
    /// Committed, and it did not fit the state.
    Rejected(Rejection),
    /// Not known to be committed. The text says why.
    Lost(String),
}

impl ProposeFailure {
    pub(crate) fn explain(self, what: &str) -> ApiError {
        match self {
            Self::Rejected(rejection) => rejected(what, &rejection),
            Self::Lost(why) => ApiError::new(
                ErrorKind::Unavailable,
                what,
                format!("the control log did not commit it: {why}"),
                "a majority of the nodes must be up and connected (`relevo status`); ask again then, after a look whether it was done all the same",
            ),
        }
    }
}

/// A rejection's text says what to do after its last semicolon.
fn rejected(what: &str, rejection: &Rejection) -> ApiError {
    let text = rejection.to_string();
    let (reason, remedy) = match text.rsplit_once("; ") {
        Some((reason, remedy)) => (reason.to_owned(), remedy.to_owned()),
        None => (text, String::new()),
    };
    let kind = match rejection {
        Rejection::NoNode { .. } | Rejection::NoVolume { .. } | Rejection::NoService { .. } => {
            ErrorKind::NotFound
        }
        Rejection::BadName { .. }
        | Rejection::BadSize { .. }
        | Rejection::BadReplicas { .. }
        | Rejection::BadPlacement { .. }
        | Rejection::BadPath { .. }
        | Rejection::BadFencing { .. } => ErrorKind::BadRequest,
        _ => ErrorKind::Refused,
    };
    ApiError::new(kind, what, reason, remedy)
}

fn find_volume<'a>(
    state: &'a ClusterState,
    name: &str,
    what: &str,
) -> Result<&'a Volume, ApiError> {
    state.volume_named(name).ok_or_else(|| {
        ApiError::new(
            ErrorKind::NotFound,
            what,
            format!("there is no volume `{name}`"),
            "`relevo volume list` lists them",
        )
    })
}

fn find_service<'a>(
    state: &'a ClusterState,
    name: &str,
    what: &str,
) -> Result<&'a Service, ApiError> {
    state.service_named(name).ok_or_else(|| {
        ApiError::new(
            ErrorKind::NotFound,
            what,
            format!("there is no service `{name}`"),
            "`relevo service list` lists them",
        )
    })
}

fn find_node(state: &ClusterState, name: &str, what: &str) -> Result<NodeId, ApiError> {
    state.node_named(name).map(|node| node.id).ok_or_else(|| {
        let names: Vec<&str> = state
            .nodes
            .values()
            .map(|node| node.spec.name.as_str())
            .collect();
        ApiError::new(
            ErrorKind::NotFound,
            what,
            format!("there is no node `{name}`"),
            format!("the nodes are: {}", names.join(", ")),
        )
    })
}
