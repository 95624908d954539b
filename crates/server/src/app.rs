//! The daemon as the API sees it: in no cluster, or running as a member of one.

use std::sync::{Arc, PoisonError, RwLock};

use relevo_types::cluster::Command;
use tokio::{runtime::Handle, sync::watch};

use crate::{
    DaemonOptions,
    api::{
        ApiError, ClusterStatus, DaemonStatus, Done, ErrorKind, EventKind, EventLevel, Health,
        InitAnswer, InitRequest, JoinAnswer, JoinRequest, Status, TokenRequest,
    },
    cluster::Cluster,
    events::{Events, unix_ms},
    join,
    membership_files::{MemberFiles, Places},
};

/// How long the token that `init` prints is good.
const FIRST_TOKEN_VALID_S: u64 = 24 * 3600;

/// The daemon.
pub(crate) struct App {
    pub(crate) events: Arc<Events>,
    options: DaemonOptions,
    places: Places,
    started_unix_ms: u64,
    runtime: Handle,
    phase: RwLock<Phase>,
    /// One of init, join, leave at a time.
    changing: tokio::sync::Mutex<()>,
    stopping: watch::Sender<bool>,
}

#[derive(Clone)]
enum Phase {
    NoCluster,
    Running(Arc<Cluster>),
}

impl App {
    /// A daemon in no cluster.
    pub(crate) fn new(options: DaemonOptions, places: Places, runtime: Handle) -> Self {
        Self {
            events: Arc::new(Events::default()),
            places,
            options,
            started_unix_ms: unix_ms(),
            runtime,
            phase: RwLock::new(Phase::NoCluster),
            changing: tokio::sync::Mutex::new(()),
            stopping: watch::Sender::new(false),
        }
    }

    /// Goes on as the member that this machine was before, if it was one.
    pub(crate) async fn resume(&self, member: Option<MemberFiles>) -> anyhow::Result<()> {
        match member {
            None => {
                self.events.add(
                    EventLevel::Info,
                    EventKind::Daemon,
                    "",
                    "started; this machine belongs to no cluster yet",
                );
                Ok(())
            }
            Some(files) => self.start(files, None).await,
        }
    }

    /// Ends the membership's work in order, and tells every waiting call.
    pub(crate) async fn stop(&self) {
        self.stopping.send_replace(true);
        if let Some(cluster) = self.leave_running() {
            cluster.stop(true).await;
        }
    }

    async fn start(&self, files: MemberFiles, first: Option<Command>) -> anyhow::Result<()> {
        self.events.set_node(&files.node.spec.name);
        let cluster = Cluster::start(
            self.places.clone(),
            files,
            &self.options,
            Arc::clone(&self.events),
            self.runtime.clone(),
            first,
        )
        .await?;
        *self.phase.write().unwrap_or_else(PoisonError::into_inner) = Phase::Running(cluster);
        Ok(())
    }

    /// The cluster, or why there is none.
    pub(crate) fn running(&self) -> Result<Arc<Cluster>, ApiError> {
        self.current().ok_or_else(|| {
            ApiError::new(
                ErrorKind::Refused,
                "nothing was done",
                "this machine belongs to no cluster",
                "`relevo init --name NAME` starts one, `relevo join TOKEN` joins one",
            )
        })
    }

    fn current(&self) -> Option<Arc<Cluster>> {
        match &*self.phase.read().unwrap_or_else(PoisonError::into_inner) {
            Phase::NoCluster => None,
            Phase::Running(cluster) => Some(Arc::clone(cluster)),
        }
    }

    fn leave_running(&self) -> Option<Arc<Cluster>> {
        let mut phase = self.phase.write().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *phase, Phase::NoCluster) {
            Phase::NoCluster => None,
            Phase::Running(cluster) => Some(cluster),
        }
    }

    fn refuse_second_cluster(&self, what: &str) -> Result<(), ApiError> {
        match self.current() {
            None => Ok(()),
            Some(cluster) => Err(ApiError::new(
                ErrorKind::Refused,
                what,
                format!(
                    "this machine belongs to the cluster `{}` already",
                    cluster.name()
                ),
                "`relevo leave` takes it out of that one; a second daemon needs its own --state-dir",
            )),
        }
    }

    pub(crate) async fn init(&self, request: InitRequest) -> Result<InitAnswer, ApiError> {
        let what = "no cluster was made";
        let _one_at_a_time = self.changing.lock().await;
        self.refuse_second_cluster(what)?;
        let name = request.cluster.clone();
        // Checked by the control log again; here before anything is written.
        let (files, command) = join::new_cluster(request)?;
        check_init(&command, what)?;
        let (cluster_id, node) = (files.member.cluster, files.node.spec.name.clone());
        self.become_member(files, Some(command), what).await?;
        let request = TokenRequest {
            kind: None,
            valid_s: FIRST_TOKEN_VALID_S,
        };
        let token = self.running()?.create_token(&request).await?;
        Ok(InitAnswer {
            cluster_id: cluster_id.to_string(),
            cluster: name,
            node,
            token,
        })
    }

    pub(crate) async fn join(&self, request: JoinRequest) -> Result<JoinAnswer, ApiError> {
        let what = "this machine did not join";
        let _one_at_a_time = self.changing.lock().await;
        self.refuse_second_cluster(what)?;
        let files = join::ask_to_join(request).await?;
        let (cluster_id, node) = (files.member.cluster, files.node.spec.name.clone());
        let name = files.node.cluster_name.clone();
        self.become_member(files, None, what).await?;
        let cluster = self.running()?;
        cluster.await_admission().await?;
        let members = cluster
            .state()
            .nodes
            .values()
            .map(|node| node.spec.name.clone())
            .collect();
        Ok(JoinAnswer {
            cluster_id: cluster_id.to_string(),
            cluster: name,
            node,
            members,
        })
    }

    /// Writes the files and starts; takes the files back when the start fails.
    async fn become_member(
        &self,
        files: MemberFiles,
        first: Option<Command>,
        what: &str,
    ) -> Result<(), ApiError> {
        let failed = |e: anyhow::Error| {
            let (why, remedy) = join::split_remedy(&format!("{e:#}"));
            ApiError::new(ErrorKind::Internal, what, why, remedy)
        };
        self.places.save(&files).map_err(failed)?;
        if let Err(error) = self.start(files, first).await {
            if let Err(error) = self.places.wipe() {
                tracing::error!(%error, "the files of a failed start were not removed");
            }
            return Err(failed(error));
        }
        Ok(())
    }

    pub(crate) async fn leave(&self) -> Result<Done, ApiError> {
        let what = "this node did not leave";
        let _one_at_a_time = self.changing.lock().await;
        let cluster = self.running()?;
        cluster.leave(what).await?;
        self.leave_running();
        cluster.stop(false).await;
        let name = cluster.name().to_owned();
        drop(cluster);
        self.places.wipe().map_err(|e| {
            ApiError::new(
                ErrorKind::Internal,
                "this node left, but its files are still there",
                e.to_string(),
                format!("remove {} by hand", self.places.state_dir().display()),
            )
        })?;
        Ok(Done {
            done: format!("This machine left cluster {name}."),
        })
    }

    pub(crate) async fn status(&self) -> Status {
        let daemon = DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_unix_ms: self.started_unix_ms,
            state_dir: self.places.state_dir().to_owned(),
        };
        let Some(cluster) = self.current() else {
            return Status {
                health: Health::Down,
                problems: vec!["this machine belongs to no cluster".to_owned()],
                daemon,
                cluster: None,
            };
        };
        let cluster = cluster.status().await;
        let (health, problems) = crate::status::judge(&cluster);
        Status {
            health,
            problems,
            daemon,
            cluster: Some(cluster),
        }
    }

    pub(crate) async fn cluster_status(&self) -> Result<ClusterStatus, ApiError> {
        Ok(self.running()?.status().await)
    }
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").finish_non_exhaustive()
    }
}

/// Tries the first command on an empty state, so that a bad name is refused before anything is
/// written.
fn check_init(command: &Command, what: &str) -> Result<(), ApiError> {
    let mut state = relevo_types::cluster::ClusterState::default();
    match state.apply(command) {
        Ok(_) => Ok(()),
        Err(rejection) => Err(crate::verbs::ProposeFailure::Rejected(rejection).explain(what)),
    }
}
