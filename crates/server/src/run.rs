//! The life of the daemon's process.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use relevo_control::lock::StateDir;
use relevo_types::cluster::NodeKind;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    DaemonOptions,
    api::{EventKind, EventLevel, SOCKET_NAME, router::router},
    app::App,
    membership_files::{MemberFiles, Places},
    state_dir::{listen, private_dir},
};

/// Threads for everything that is not the data path and not membership. What blocks runs
/// elsewhere, so two are enough, and each costs memory.
const RUNTIME_THREADS: usize = 2;

/// A witness only votes.
const RUNTIME_THREADS_WITNESS: usize = 1;

/// Threads for calls that block (devices, mounts): they are rare, and each costs memory.
const BLOCKING_THREADS: usize = 8;

/// How long such a thread is kept for the next call.
const BLOCKING_KEPT: Duration = Duration::from_secs(2);

/// How long calls under way at the end may take to get their answers.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Runs the daemon until it is told to stop by SIGTERM or SIGINT, and hands everything over
/// before it ends.
///
/// # Errors
/// It could not start. The text says why and what to do.
pub fn run(options: &DaemonOptions) -> anyhow::Result<()> {
    start_log(&options.log_level)?;
    if options.die_with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .context("ask to end with the parent process")?;
    }
    private_dir(&options.state_dir).with_context(|| {
        format!(
            "the state directory {} can't be made; name one that can with --state-dir",
            options.state_dir.display()
        )
    })?;
    let state_dir = StateDir::lock(&options.state_dir)?;
    let options = &with_absolute_paths(options)?;
    let path = state_dir.path().canonicalize()?;
    let places = Places::new(&path);
    let member = places.load()?;
    let threads = match &member {
        Some(files) if files.node.spec.kind == NodeKind::Witness => RUNTIME_THREADS_WITNESS,
        Some(_) | None => RUNTIME_THREADS,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEPT)
        .thread_name("relevo-rt")
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(serve(options, places, member));
    runtime.shutdown_timeout(LAST_ANSWERS);
    result
}

/// Paths are written down and used later, by then perhaps from another working directory.
fn with_absolute_paths(options: &DaemonOptions) -> anyhow::Result<DaemonOptions> {
    let absolute = |path: &std::path::Path| {
        std::path::absolute(path).with_context(|| format!("find {}", path.display()))
    };
    Ok(DaemonOptions {
        state_dir: absolute(&options.state_dir)?,
        device_dir: absolute(&options.device_dir)?,
        pool_dir: absolute(&options.pool_dir)?,
        ..options.clone()
    })
}

async fn serve(
    options: &DaemonOptions,
    places: Places,
    member: Option<MemberFiles>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let socket = places.state_dir().join(SOCKET_NAME);
    let runtime = tokio::runtime::Handle::current();
    let app = Arc::new(App::new(options.clone(), places, runtime));
    app.resume(member).await?;
    let listener = listen(&socket)
        .with_context(|| format!("can't listen on the socket {}", socket.display()))?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let server = tokio::spawn(axum::serve(listener, router(Arc::clone(&app))).into_future());
    let reason = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    app.events.add(
        EventLevel::Info,
        EventKind::Daemon,
        "",
        &format!("stopping: {reason}"),
    );
    app.stop().await;
    server.abort();
    // A socket that is left over is replaced at the next start.
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::debug!(%error, "the socket was not removed");
    }
    Ok(())
}

fn start_log(level: &str) -> anyhow::Result<()> {
    // The consensus library calls every node that is away an error, several times a second; the
    // membership tells it once.
    let filter = format!("warn,openraft=error,openraft::replication=off,relevo={level}");
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .with_context(|| format!("`{level}` is no log level"))?;
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .with_ansi(false)
        .finish();
    tracing::subscriber::set_global_default(log).context("start the log")
}
