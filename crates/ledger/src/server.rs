//! The ledger's HTTP side.
//!
//! | request | answer |
//! |---|---|
//! | `POST /entries` with `{"number": 7, "text": "..."}` or just `7` | 200 `{"number", "result": "stored" or "known"}` once it is on stable storage |
//! | `GET /entries?from=N&limit=N` | 200 `{"count", "numbers", "next"}`; `next` is where to go on, or null |
//! | `GET /health` | 200 `{"ok", "entries", "last", "storage"}`, 503 when the storage failed |

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::{get, post},
    serve::ListenerExt as _,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

use crate::{
    Entry, LedgerError, MAX_TEXT, Storage, Stored,
    book::{Book, Refusal},
};

/// A body that is larger is refused: the longest text with every byte escaped, and the rest.
const MAX_BODY: usize = 6 * MAX_TEXT + 256;

/// Numbers in one answer of `GET /entries`, at most.
const MAX_PAGE: usize = 100_000;

/// Connections the kernel keeps for us until we accept them.
const BACKLOG: u32 = 256;

/// How long requests under way may take when the ledger ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// What [`run`] needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LedgerConfig {
    /// Where to listen; at least one. An address that this machine does not have yet is fine.
    pub listen: Vec<SocketAddr>,
    /// Where the entries are.
    pub storage: Storage,
}

/// A running ledger.
#[derive(Debug)]
pub struct Ledger {
    book: Arc<Book>,
    addresses: Vec<SocketAddr>,
    servers: JoinSet<io::Result<()>>,
    end: watch::Sender<bool>,
}

struct Shared {
    book: Arc<Book>,
    storage: String,
}

/// Runs the ledger until SIGTERM or SIGINT, or until its storage fails.
///
/// # Errors
/// See [`LedgerError`].
pub async fn run(config: LedgerConfig) -> Result<(), LedgerError> {
    let handler = |kind| signal(kind).map_err(|error| LedgerError::Failed(error.to_string()));
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    let ledger = Ledger::start(config).await?;
    let mut failure = ledger.book.failure();
    let failed = failure.wait_for(Option::is_some);
    let reason = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        reason = failed => reason.ok().and_then(|reason| reason.clone()),
    };
    ledger.stop().await;
    reason.map_or(Ok(()), |reason| Err(LedgerError::Failed(reason)))
}

impl Ledger {
    /// Opens the storage and listens.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub async fn start(config: LedgerConfig) -> Result<Self, LedgerError> {
        if config.listen.is_empty() {
            return Err(LedgerError::Configuration(
                "it is told no address to listen on; give one with --listen".to_owned(),
            ));
        }
        let mut listeners = Vec::new();
        // First of all, so that a port in use is known before a long recovery.
        for address in &config.listen {
            listeners.push(listen(*address).map_err(|error| LedgerError::Listen {
                address: *address,
                error,
            })?);
        }
        let storage = config.storage.to_string();
        let opening = tokio::task::spawn_blocking(move || Book::open(&config.storage));
        let book = opening
            .await
            .map_err(|error| LedgerError::Failed(error.to_string()))??;
        let (count, last) = book.extent();
        tracing::info!("ledger on the {storage}: {count} entries, last number {last:?}");

        let book = Arc::new(book);
        let shared = Arc::new(Shared {
            book: Arc::clone(&book),
            storage,
        });
        let router = Router::new()
            .route("/entries", post(add).get(list))
            .route("/health", get(health))
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .with_state(shared);
        let (end, ended) = watch::channel(false);
        let mut servers = JoinSet::new();
        let mut addresses = Vec::new();
        for listener in listeners {
            addresses.extend(listener.local_addr());
            let listener = listener.tap_io(|stream| {
                // Answers are small and awaited. A connection that is gone already says so later.
                drop(stream.set_nodelay(true));
            });
            let mut ended = ended.clone();
            let server = axum::serve(listener, router.clone())
                .with_graceful_shutdown(async move {
                    // The sender lives as long as the ledger; without it, end as well.
                    drop(ended.wait_for(|ended| *ended).await);
                })
                .into_future();
            servers.spawn(server);
        }
        Ok(Self {
            book,
            addresses,
            servers,
            end,
        })
    }

    /// Where it listens, in the order of the configuration; real ports for port 0.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Ends it: requests under way get half a second. After that the storage is free again, if
    /// its writer does not hang in the system.
    pub async fn stop(mut self) {
        self.end.send_replace(true);
        let all = async { while self.servers.join_next().await.is_some() {} };
        drop(tokio::time::timeout(FAREWELL, all).await);
        self.servers.shutdown().await;
        let mut writer = self.book.failure();
        drop(self.book);
        // The writer closes the storage before it drops its end of this channel.
        let closed = async { while writer.changed().await.is_ok() {} };
        drop(tokio::time::timeout(FAREWELL, closed).await);
    }
}

/// Listens on an address that may come to this machine later (`IP_FREEBIND`) and may have been in use a
/// moment ago (`SO_REUSEADDR`).
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        let socket = TcpSocket::new_v4()?;
        rustix::net::sockopt::set_ip_freebind(&socket, true)?;
        socket
    } else {
        let socket = TcpSocket::new_v6()?;
        rustix::net::sockopt::set_ipv6_freebind(&socket, true)?;
        socket
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn add(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    let entry = match parse(&body) {
        Ok(entry) => entry,
        Err(why) => return refuse(StatusCode::BAD_REQUEST, &why),
    };
    let number = entry.number;
    match shared.book.add(entry).await {
        Ok(result) => Json(Added { number, result }).into_response(),
        Err(Refusal::Conflict) => refuse(
            StatusCode::CONFLICT,
            &format!("entry {number} is there with another text; use the next free number"),
        ),
        Err(Refusal::Busy) => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "too many entries wait for the storage; try again",
        ),
        Err(Refusal::Full) => refuse(
            StatusCode::INSUFFICIENT_STORAGE,
            "the storage is full; make it larger",
        ),
        Err(Refusal::Failed(why)) => refuse(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Added {
    pub(crate) number: u64,
    pub(crate) result: Stored,
}

fn parse(body: &[u8]) -> Result<Entry, String> {
    let text = std::str::from_utf8(body).map_err(|_| "the body is not UTF-8".to_owned())?;
    let text = text.trim();
    let entry: Entry = if text.starts_with('{') {
        serde_json::from_str(text).map_err(|error| format!("the body is no entry: {error}"))?
    } else {
        let number = text.parse().map_err(|_| {
            "the body is neither a number nor {\"number\": N, \"text\": \"...\"}".to_owned()
        })?;
        Entry {
            number,
            text: String::new(),
        }
    };
    if entry.text.len() > MAX_TEXT {
        return Err(format!("the text is longer than {MAX_TEXT} bytes"));
    }
    Ok(entry)
}

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    from: u64,
    limit: Option<usize>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Listing {
    pub(crate) count: usize,
    pub(crate) numbers: Vec<u64>,
    pub(crate) next: Option<u64>,
}

async fn list(State(shared): State<Arc<Shared>>, Query(page): Query<Page>) -> Response {
    let limit = page.limit.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
    let mut numbers = shared.book.numbers(page.from, limit + 1);
    let next = numbers.get(limit).copied();
    numbers.truncate(limit);
    Json(Listing {
        count: shared.book.extent().0,
        numbers,
        next,
    })
    .into_response()
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let failure = shared.book.failure().borrow().clone();
    let (entries, last) = shared.book.extent();
    let status = if failure.is_some() {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    let body = json!({
        "ok": failure.is_none(),
        "entries": entries,
        "last": last,
        "storage": shared.storage,
        "failure": failure,
    });
    (status, Json(body)).into_response()
}

fn refuse(status: StatusCode, why: &str) -> Response {
    (status, Json(json!({ "error": why }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_read_and_nonsense_is_explained() {
        let entry = |number, text: &str| Entry {
            number,
            text: text.to_owned(),
        };
        assert_eq!(parse(b"12\n"), Ok(entry(12, "")));
        assert_eq!(parse(br#" {"number": 3, "text": "x"}"#), Ok(entry(3, "x")));
        for nonsense in [&b""[..], b"-1", b"{}", b"{\"number\":1,\"txt\":2}", b"\xff"] {
            assert!(parse(nonsense).is_err(), "{nonsense:?}");
        }
        let long = format!("{{\"number\":1,\"text\":\"{}\"}}", "y".repeat(MAX_TEXT + 1));
        assert!(parse(long.as_bytes()).unwrap_err().contains("longer than"));
    }
}
