//! Ctrl-C and SIGTERM: noticed between steps, so that everything is cleaned up.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Watches for SIGINT and SIGTERM on a thread of its own.
///
/// # Errors
/// When the watcher can't be started.
pub(crate) fn install() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (interrupt, terminate) = {
        let _guard = runtime.enter();
        use tokio::signal::unix::{SignalKind, signal};
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            let (mut interrupt, mut terminate) = (interrupt, terminate);
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    REQUESTED.store(true, Ordering::SeqCst);
                }
            });
        })?;
    Ok(())
}

/// Whether the user asked to end.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// Fails when the user asked to end; called in every wait.
///
/// # Errors
/// `interrupted`.
pub(crate) fn check() -> anyhow::Result<()> {
    anyhow::ensure!(!requested(), "interrupted; everything is being cleaned up");
    Ok(())
}

/// Returns when the user asks to end.
pub(crate) fn wait() {
    while !requested() {
        std::thread::sleep(Duration::from_millis(50));
    }
}
