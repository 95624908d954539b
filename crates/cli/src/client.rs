//! The way to the daemon: HTTP over its Unix socket, one connection per call.

mod fence;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use relevo_server::api::{
    AddReplicaRequest, ApiError, ClusterStatus, ConfirmRequest, CreateServiceRequest,
    CreateVolumeRequest, Done, Event, HoldRequest, InitAnswer, InitRequest, JoinAnswer,
    JoinRequest, LossStatus, MetadataDump, MoveServiceRequest, OrderRequest, PathRequest,
    PlacementRequest, SOCKET_NAME, ServiceStatus, SetOptionsRequest, StandbyRequest, Status,
    TokenAnswer, TokenRequest, VolumeStatus, WaitSyncRequest, WhatIfAnswer, WhatIfRequest,
    WhyAnswer,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::CliError;

/// The daemon bounds every call itself; this only catches a daemon that hangs.
const CALL_TIMEOUT: Duration = Duration::from_secs(180);

/// The longest answer that is read: a status of the largest cluster stays far below.
const ANSWER_MAX: usize = 16 << 20;

/// The way to one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The daemon of a state directory.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self {
            socket: state_dir.join(SOCKET_NAME),
        }
    }

    /// Makes this machine the first node of a new cluster.
    ///
    /// # Errors
    /// [`CliError`], as all calls.
    pub async fn init(&self, request: &InitRequest) -> Result<InitAnswer, CliError> {
        self.call(Method::POST, "/v1/init", Some(request)).await
    }

    /// Makes this machine a node of an existing cluster.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn join(&self, request: &JoinRequest) -> Result<JoinAnswer, CliError> {
        self.call(Method::POST, "/v1/join", Some(request)).await
    }

    /// Takes this machine out of its cluster.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn leave(&self) -> Result<Done, CliError> {
        self.post("/v1/leave").await
    }

    /// Makes a join token.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn create_token(&self, request: &TokenRequest) -> Result<TokenAnswer, CliError> {
        self.call(Method::POST, "/v1/tokens", Some(request)).await
    }

    /// What is going on.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn status(&self) -> Result<Status, CliError> {
        self.get("/v1/status").await
    }

    /// What is going on in the cluster; an error when the machine belongs to none.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn cluster(&self) -> Result<ClusterStatus, CliError> {
        self.get("/v1/cluster").await
    }

    /// The volumes.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn volumes(&self) -> Result<Vec<VolumeStatus>, CliError> {
        self.get("/v1/volumes").await
    }

    /// Creates a volume; returns when every replica exists.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn create_volume(&self, request: &CreateVolumeRequest) -> Result<Done, CliError> {
        self.call(Method::POST, "/v1/volumes", Some(request)).await
    }

    /// Removes a volume and its data.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn remove_volume(&self, name: &str) -> Result<Done, CliError> {
        let path = format!("/v1/volumes/{}", escape(name));
        self.call::<(), _>(Method::DELETE, &path, None).await
    }

    /// Makes this node primary of a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn make_primary(&self, volume: &str) -> Result<Done, CliError> {
        self.post(&format!("/v1/volumes/{}/primary", escape(volume)))
            .await
    }

    /// What may be lost when this node's replica, outside the in-sync set, is forced.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn force_loss(&self, volume: &str) -> Result<LossStatus, CliError> {
        let path = format!("/v1/volumes/{}/force", escape(volume));
        self.call::<(), _>(Method::GET, &path, None).await
    }

    /// Forces this node's replica.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn force(&self, volume: &str, request: &ConfirmRequest) -> Result<Done, CliError> {
        let path = format!("/v1/volumes/{}/force", escape(volume));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// What gives way when the replica of a node is kept.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn resolve_loss(&self, volume: &str, keep: &str) -> Result<LossStatus, CliError> {
        let path = resolve_path(volume, keep);
        self.call::<(), _>(Method::GET, &path, None).await
    }

    /// Keeps the replica of a node; the others give way.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn resolve(
        &self,
        volume: &str,
        keep: &str,
        request: &ConfirmRequest,
    ) -> Result<Done, CliError> {
        let path = resolve_path(volume, keep);
        self.call(Method::POST, &path, Some(request)).await
    }

    /// Adds a replica to a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn add_replica(
        &self,
        volume: &str,
        request: &AddReplicaRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/volumes/{}/replicas", escape(volume));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// Removes a replica of a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn remove_replica(&self, volume: &str, node: &str) -> Result<Done, CliError> {
        let (volume, node) = (escape(volume), escape(node));
        let path = format!("/v1/volumes/{volume}/replicas/{node}");
        self.call::<(), _>(Method::DELETE, &path, None).await
    }

    /// Sets options of a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn set_options(
        &self,
        volume: &str,
        request: &SetOptionsRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/volumes/{}/options", escape(volume));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// Gives an order to the daemon's replica of a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn order(&self, volume: &str, request: &OrderRequest) -> Result<Done, CliError> {
        let path = format!("/v1/volumes/{}/order", escape(volume));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// The metadata on the backing of the daemon's replica of a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn dump_metadata(&self, volume: &str) -> Result<MetadataDump, CliError> {
        self.get(&format!("/v1/volumes/{}/metadata", escape(volume)))
            .await
    }

    /// Waits until every replica of a volume is in sync, or the time is over: then an error names what is
    /// missing.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn wait_sync(
        &self,
        volume: &str,
        request: WaitSyncRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/volumes/{}/wait-sync", escape(volume));
        self.call(Method::POST, &path, Some(&request)).await
    }

    /// Makes this node secondary of a volume.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn make_secondary(&self, volume: &str) -> Result<Done, CliError> {
        self.post(&format!("/v1/volumes/{}/secondary", escape(volume)))
            .await
    }

    /// The services.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn services(&self) -> Result<Vec<ServiceStatus>, CliError> {
        self.get("/v1/services").await
    }

    /// Creates a service; returns when it runs or fails.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn create_service(&self, request: &CreateServiceRequest) -> Result<Done, CliError> {
        self.call(Method::POST, "/v1/services", Some(request)).await
    }

    /// Stops and removes a service.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn remove_service(&self, name: &str) -> Result<Done, CliError> {
        let path = format!("/v1/services/{}", escape(name));
        self.call::<(), _>(Method::DELETE, &path, None).await
    }

    /// Starts a service and forgets its failures.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn start_service(&self, name: &str) -> Result<Done, CliError> {
        self.post(&format!("/v1/services/{}/start", escape(name)))
            .await
    }

    /// Stops a service.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn stop_service(&self, name: &str) -> Result<Done, CliError> {
        self.post(&format!("/v1/services/{}/stop", escape(name)))
            .await
    }

    /// Changes where a service may and shall run.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn place_service(
        &self,
        name: &str,
        request: &PlacementRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/services/{}/place", escape(name));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// Holds a service where it is, or ends that.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn hold_service(&self, name: &str, request: &HoldRequest) -> Result<Done, CliError> {
        let path = format!("/v1/services/{}/hold", escape(name));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// What would come of something.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn what_if(&self, request: &WhatIfRequest) -> Result<WhatIfAnswer, CliError> {
        self.call(Method::POST, "/v1/what-if", Some(request)).await
    }

    /// Why a service is where it is.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn why(&self, name: &str) -> Result<WhyAnswer, CliError> {
        self.get(&format!("/v1/services/{}/why", escape(name)))
            .await
    }

    /// Moves a service; returns when it runs there or can't.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn move_service(
        &self,
        name: &str,
        request: &MoveServiceRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/services/{}/move", escape(name));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// Sets or clears a node's standby.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn set_standby(&self, node: &str, standby: bool) -> Result<Done, CliError> {
        let path = format!("/v1/nodes/{}/standby", escape(node));
        self.call(Method::POST, &path, Some(&StandbyRequest { standby }))
            .await
    }

    /// Gives a node one more path.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn add_path(&self, node: &str, request: &PathRequest) -> Result<Done, CliError> {
        let path = format!("/v1/nodes/{}/paths", escape(node));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// Takes a path from a node.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn remove_path(&self, node: &str, name: &str) -> Result<Done, CliError> {
        let path = format!("/v1/nodes/{}/paths/{}", escape(node), escape(name));
        self.call::<(), _>(Method::DELETE, &path, None).await
    }

    /// The events that the daemon remembers.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn events(&self) -> Result<Vec<Event>, CliError> {
        let mut stream = self.event_stream(false).await?;
        let mut events = Vec::new();
        while let Some(event) = stream.next().await? {
            events.push(event);
        }
        Ok(events)
    }

    /// The events that the daemon remembers and, with `follow`, those that come.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn event_stream(&self, follow: bool) -> Result<EventStream, CliError> {
        let path = format!("/v1/events?follow={follow}");
        let response = self.send::<()>(Method::GET, &path, None).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        Ok(EventStream {
            body: response.into_body(),
            rest: Vec::new(),
        })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.call::<(), T>(Method::GET, path, None).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.call::<(), T>(Method::POST, path, None).await
    }

    async fn call<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, CliError> {
        let answer = async {
            let response = self.send(method, path, body).await?;
            if !response.status().is_success() {
                return Err(refusal(response).await);
            }
            let bytes = collect(response).await?;
            serde_json::from_slice(&bytes).map_err(|e| CliError::BadAnswer(e.to_string()))
        };
        tokio::time::timeout(CALL_TIMEOUT, answer)
            .await
            .unwrap_or_else(|_| {
                let why = format!("no answer within {} s", CALL_TIMEOUT.as_secs());
                Err(CliError::BadAnswer(why))
            })
    }

    async fn send<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<Response<Incoming>, CliError> {
        let broken = |e: hyper::Error| CliError::BadAnswer(e.to_string());
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| CliError::NoDaemon {
                socket: self.socket.clone(),
                reason: connect_reason(&e),
            })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        // Ends with the response or when the daemon closes; its error shows up in the call too.
        tokio::spawn(connection);
        let bytes = match body {
            Some(body) => serde_json::to_vec(body)
                .map_err(|e| CliError::Input(format!("the request can't be sent: {e}")))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "relevo")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|e| CliError::Input(format!("the request can't be sent: {e}")))?;
        sender.send_request(request).await.map_err(broken)
    }
}

fn resolve_path(volume: &str, keep: &str) -> String {
    format!("/v1/volumes/{}/resolve/{}", escape(volume), escape(keep))
}

/// Events as they come.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    rest: Vec<u8>,
}

impl EventStream {
    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<Event>, CliError> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|e| CliError::BadAnswer(e.to_string()));
            }
            if self.rest.len() > ANSWER_MAX {
                return Err(CliError::BadAnswer("an endless line".to_owned()));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
                Some(Err(e)) => return Err(CliError::BadAnswer(e.to_string())),
                None => return Ok(None),
            }
        }
    }
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, CliError> {
    let limited = http_body_util::Limited::new(response.into_body(), ANSWER_MAX);
    let body = limited
        .collect()
        .await
        .map_err(|e| CliError::BadAnswer(e.to_string()))?;
    Ok(body.to_bytes())
}

async fn refusal(response: Response<Incoming>) -> CliError {
    let status = response.status();
    match collect(response).await {
        Ok(bytes) => match serde_json::from_slice::<ApiError>(&bytes) {
            Ok(error) => CliError::Api(error),
            Err(_) => CliError::BadAnswer(format!(
                "{status}: {}",
                String::from_utf8_lossy(&bytes).trim()
            )),
        },
        Err(error) => error,
    }
}

fn connect_reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such socket".to_owned(),
        std::io::ErrorKind::ConnectionRefused => {
            "the socket is left over from a daemon that is gone".to_owned()
        }
        std::io::ErrorKind::PermissionDenied => {
            "permission denied; the socket is for the user that runs the daemon".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Names are letters, digits, `-`, `_` and `.`; anything else is sent percent-encoded so that the
/// daemon can refuse it by name.
fn escape(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_escaped() {
        assert_eq!(escape("mail-1.x_y"), "mail-1.x_y");
        assert_eq!(escape("a/b c"), "a%2Fb%20c");
    }
}
