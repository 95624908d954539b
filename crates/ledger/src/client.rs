//! The ledger's client: posts one entry after the other and never gives one up.

use std::{collections::BTreeSet, future::Future, path::PathBuf, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use relevo_host::clock;
use tokio::{net::TcpStream, task::JoinHandle};

use crate::{
    Acknowledged, Entry, Journal, Stored,
    server::{Added, Listing},
};

/// The rest between two tries of one entry: long enough to leave the machine alone, short enough
/// not to show in a gap.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// The largest answer that is read: a full page of numbers with all their digits.
const MAX_ANSWER: usize = 4 << 20;

/// What [`run_client`] does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientConfig {
    /// The ledger: `http://host:port`.
    pub target: String,
    /// Where acknowledged entries are written down.
    pub journal: PathBuf,
    /// Rest between two entries.
    pub pause: Duration,
    /// End after so many entries; `None`: never.
    pub count: Option<u64>,
    /// Give a connection up after this long.
    pub connect_timeout: Duration,
    /// Give an answer up after this long.
    pub request_timeout: Duration,
}

impl ClientConfig {
    /// No pause, no end, 250 ms to connect, 1 s for an answer.
    #[must_use]
    pub fn new(target: impl Into<String>, journal: impl Into<PathBuf>) -> Self {
        Self {
            target: target.into(),
            journal: journal.into(),
            pause: Duration::ZERO,
            count: None,
            connect_timeout: Duration::from_millis(250),
            request_timeout: Duration::from_secs(1),
        }
    }
}

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The target can't be understood.
    #[error("`{0}` is not the address of a ledger; write http://192.168.1.1:8080")]
    Target(String),
    /// No connection, no answer, or not in time. Ask again.
    #[error("no answer from {target}: {why}; asking again is safe")]
    NoAnswer {
        /// Whom we asked.
        target: String,
        /// What happened.
        why: String,
    },
    /// The ledger refused.
    #[error("the ledger refuses ({status}): {why}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its words.
        why: String,
    },
    /// The journal can't be written or read.
    #[error("the journal {path}: {error}; check the path and the space left")]
    Journal {
        /// Where it is.
        path: PathBuf,
        /// The system's words.
        error: std::io::Error,
    },
}

/// A client with one connection, made anew after every failure.
#[derive(Debug)]
pub struct LedgerClient {
    host: String,
    connect_timeout: Duration,
    request_timeout: Duration,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The server may be gone without a word; don't leave a socket that waits for it.
        self.driver.abort();
    }
}

impl LedgerClient {
    /// A client of `http://host:port` with the default time-outs of [`ClientConfig::new`].
    ///
    /// # Errors
    /// That is not what `target` is.
    pub fn new(target: &str) -> Result<Self, ClientError> {
        let config = ClientConfig::new(target, "");
        Self::with_timeouts(target, config.connect_timeout, config.request_timeout)
    }

    /// A client with other time-outs.
    ///
    /// # Errors
    /// As of [`Self::new`].
    pub fn with_timeouts(
        target: &str,
        connect_timeout: Duration,
        request_timeout: Duration,
    ) -> Result<Self, ClientError> {
        let host = target
            .strip_prefix("http://")
            .map(|rest| rest.trim_end_matches('/'))
            .filter(|host| host.contains(':') && !host.contains('/'))
            .ok_or_else(|| ClientError::Target(target.to_owned()))?;
        Ok(Self {
            host: host.to_owned(),
            connect_timeout,
            request_timeout,
            connection: None,
        })
    }

    /// Posts an entry once; `Ok` means that it is on stable storage.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post(&mut self, entry: &Entry) -> Result<Stored, ClientError> {
        let body = serde_json::json!({ "number": entry.number, "text": entry.text });
        let answer = self
            .ask("POST", "/entries", Bytes::from(body.to_string()))
            .await?;
        let added: Added = self.understand(&answer)?;
        if added.number != entry.number {
            return Err(self.no_answer(format!(
                "it answered for entry {} instead of {}",
                added.number, entry.number
            )));
        }
        Ok(added.result)
    }

    /// All numbers that the ledger has.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn numbers(&mut self) -> Result<BTreeSet<u64>, ClientError> {
        let mut numbers = BTreeSet::new();
        let mut from = 0;
        loop {
            let answer = self
                .ask("GET", &format!("/entries?from={from}"), Bytes::new())
                .await?;
            let page: Listing = self.understand(&answer)?;
            numbers.extend(page.numbers);
            match page.next {
                Some(next) if next > from => from = next,
                _ => return Ok(numbers),
            }
        }
    }

    /// Whether the ledger works; its own words otherwise.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn health(&mut self) -> Result<(), ClientError> {
        self.ask("GET", "/health", Bytes::new()).await.map(drop)
    }

    async fn ask(&mut self, method: &str, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        // Taken, so that whatever goes wrong it is closed and never used again.
        let connection = match self.connection.take() {
            Some(connection) if !connection.sender.is_closed() => connection,
            _ => self.connect().await?,
        };
        let (connection, status, body) = self.exchange(connection, method, path, body).await?;
        self.connection = Some(connection);
        if status == StatusCode::OK {
            return Ok(body);
        }
        let why = serde_json::from_slice::<serde_json::Value>(&body)
            .ok()
            .and_then(|answer| {
                let why = answer.get("error").or_else(|| answer.get("failure"));
                why?.as_str().map(str::to_owned)
            })
            .unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
        Err(ClientError::Refused {
            status: status.as_u16(),
            why,
        })
    }

    async fn connect(&self) -> Result<Connection, ClientError> {
        let connect = async {
            let stream = TcpStream::connect(&self.host)
                .await
                .map_err(|error| error.to_string())?;
            stream
                .set_nodelay(true)
                .map_err(|error| error.to_string())?;
            http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())
        };
        let (sender, driver) = tokio::time::timeout(self.connect_timeout, connect)
            .await
            .unwrap_or_else(|_| Err(format!("no connection within {:?}", self.connect_timeout)))
            .map_err(|why| self.no_answer(why))?;
        let driver = tokio::spawn(async move {
            // Its error reaches whoever waits for an answer on it.
            drop(driver.await);
        });
        Ok(Connection { sender, driver })
    }

    async fn exchange(
        &self,
        mut connection: Connection,
        method: &str,
        path: &str,
        body: Bytes,
    ) -> Result<(Connection, StatusCode, Bytes), ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.no_answer(error.to_string()))?;
        let exchange = async {
            let answer = connection
                .sender
                .send_request(request)
                .await
                .map_err(|error| error.to_string())?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|error| error.to_string())?;
            Ok((connection, status, body.to_bytes()))
        };
        tokio::time::timeout(self.request_timeout, exchange)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.request_timeout)))
            .map_err(|why| self.no_answer(why))
    }

    fn understand<T: serde::de::DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.no_answer(error.to_string()))
    }

    fn no_answer(&self, why: String) -> ClientError {
        ClientError::NoAnswer {
            target: self.host.clone(),
            why,
        }
    }
}

/// Posts numbered entries, each until it is acknowledged, and writes them down; goes on after the
/// last number of a journal that exists. Ends when `stop` does, or after `config.count` entries.
///
/// # Errors
/// The target makes no sense, or the journal can't be written.
pub async fn run_client(
    config: ClientConfig,
    stop: impl Future<Output = ()>,
) -> Result<(), ClientError> {
    let in_journal = |error| ClientError::Journal {
        path: config.journal.clone(),
        error,
    };
    let mut client = LedgerClient::with_timeouts(
        &config.target,
        config.connect_timeout,
        config.request_timeout,
    )?;
    let mut journal = Journal::open(&config.journal).map_err(in_journal)?;
    let first = journal.last().unwrap_or(0) + 1;
    let posting = async {
        let mut number = first;
        while config.count.is_none_or(|count| number - first < count) {
            let entry = Entry {
                number,
                text: format!("entry {number}"),
            };
            let sent = clock::now();
            let mut troubled = false;
            while let Err(error) = client.post(&entry).await {
                // Once for each entry: an outage would fill the journal otherwise.
                if !troubled {
                    troubled = true;
                    let note = format!("entry {number}: {error}");
                    journal.note(clock::now(), &note).map_err(in_journal)?;
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            let entry = Acknowledged {
                number,
                sent,
                acknowledged: clock::now(),
            };
            journal.add(&entry).map_err(in_journal)?;
            number += 1;
            if !config.pause.is_zero() {
                tokio::time::sleep(config.pause).await;
            }
        }
        Ok(())
    };
    tokio::select! {
        result = posting => result,
        () = stop => Ok(()),
    }
}
