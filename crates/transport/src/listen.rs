//! Listening on addresses that come and go while connections live on.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};

use crate::net;

/// Accepts on a listener until it is told to stop; then it serves what it accepted to the end.
type Accept = dyn Fn(TcpListener, oneshot::Receiver<()>) -> Pin<Box<dyn Future<Output = ()> + Send>>
    + Send
    + Sync;

/// Where a server listens. Clones are about the same server.
#[derive(Clone)]
pub struct Listeners {
    inner: Arc<Inner>,
}

struct Inner {
    accept: Box<Accept>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the address that was asked for.
    open: BTreeMap<SocketAddr, Open>,
    /// Those that listen, and those that only serve what they accepted.
    tasks: JoinSet<()>,
    closed: bool,
}

struct Open {
    local: SocketAddr,
    /// Dropped: stop listening.
    _stop: oneshot::Sender<()>,
}

impl Listeners {
    pub(crate) fn new<F>(
        accept: impl Fn(TcpListener, oneshot::Receiver<()>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self {
            inner: Arc::new(Inner {
                accept: Box::new(move |listener, stop| Box::pin(accept(listener, stop))),
                state: Mutex::default(),
            }),
        }
    }

    /// Listens on these addresses and no others from now on; gives those on which it can't, and why. Connections
    /// that were made on others live on. Must run inside a Tokio runtime.
    pub fn listen_on(&self, addresses: &[SocketAddr]) -> Vec<(SocketAddr, io::Error)> {
        let mut state = self.lock();
        let mut failed = Vec::new();
        if state.closed {
            return failed;
        }
        while state.tasks.try_join_next().is_some() {}
        state.open.retain(|address, _| addresses.contains(address));
        for address in addresses {
            if state.open.contains_key(address) {
                continue;
            }
            let bound =
                net::listen(*address).and_then(|listener| Ok((listener.local_addr()?, listener)));
            match bound {
                Ok((local, listener)) => {
                    let (stop, stopped) = oneshot::channel();
                    let task = (self.inner.accept)(listener, stopped);
                    state.tasks.spawn(task);
                    state.open.insert(*address, Open { local, _stop: stop });
                }
                Err(error) => failed.push((*address, error)),
            }
        }
        failed
    }

    /// Where it listens; tells the port when 0 was asked for.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.lock().open.values().map(|open| open.local).collect()
    }

    /// Ends everything, connections too.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.open.clear();
        state.tasks.abort_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each use leaves it whole, so a panic elsewhere spoils nothing.
        self.inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listeners").field(&self.addresses()).finish()
    }
}

/// On all of these addresses, or on none.
pub(crate) fn on_all(listeners: &Listeners, addresses: &[SocketAddr]) -> io::Result<()> {
    match listeners.listen_on(addresses).into_iter().next() {
        None => Ok(()),
        Some((_, error)) => {
            listeners.close();
            Err(error)
        }
    }
}
