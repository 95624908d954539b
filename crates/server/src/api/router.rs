//! The routes of the daemon's socket.

mod fence;

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Path, Query, State},
    http::header,
    response::{IntoResponse as _, Response},
    routing::{delete, get, post},
};
use futures::stream;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::sync::broadcast;

use super::{
    AddReplicaRequest, ApiError, ClusterStatus, ConfirmRequest, CreateServiceRequest,
    CreateVolumeRequest, Done, ErrorKind, Event, HoldRequest, InitAnswer, InitRequest, JoinAnswer,
    JoinRequest, LossStatus, MetadataDump, MoveServiceRequest, OrderRequest, PathRequest,
    PlacementRequest, ServiceStatus, SetOptionsRequest, StandbyRequest, Status, TokenAnswer,
    TokenRequest, VolumeStatus, WaitSyncRequest, WhatIfAnswer, WhatIfRequest, WhyAnswer,
};
use crate::app::App;

/// The longest request: a service with some dozen parts is a few KiB.
const REQUEST_MAX: usize = 1 << 20;

type Answer<T> = Result<Json<T>, ApiError>;

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/cluster", get(cluster))
        .route("/v1/events", get(events))
        .route("/v1/init", post(init))
        .route("/v1/join", post(join))
        .route("/v1/leave", post(leave))
        .route("/v1/tokens", post(create_token))
        .route("/v1/volumes", get(volumes).post(create_volume))
        .route("/v1/volumes/{name}", delete(remove_volume))
        .route("/v1/volumes/{name}/primary", post(make_primary))
        .route("/v1/volumes/{name}/secondary", post(make_secondary))
        .route("/v1/volumes/{name}/force", get(force_loss).post(force))
        .route(
            "/v1/volumes/{name}/resolve/{node}",
            get(resolve_loss).post(resolve),
        )
        .route("/v1/volumes/{name}/replicas", post(add_replica))
        .route("/v1/volumes/{name}/replicas/{node}", delete(remove_replica))
        .route("/v1/volumes/{name}/options", post(set_options))
        .route("/v1/volumes/{name}/order", post(order))
        .route("/v1/volumes/{name}/metadata", get(dump_metadata))
        .route("/v1/volumes/{name}/wait-sync", post(wait_sync))
        .route("/v1/services", get(services).post(create_service))
        .route("/v1/services/{name}", delete(remove_service))
        .route("/v1/services/{name}/start", post(start_service))
        .route("/v1/services/{name}/stop", post(stop_service))
        .route("/v1/services/{name}/move", post(move_service))
        .route("/v1/services/{name}/place", post(place_service))
        .route("/v1/services/{name}/hold", post(hold_service))
        .route("/v1/services/{name}/why", get(why_service))
        .route("/v1/what-if", post(what_if))
        .route("/v1/nodes/{name}/standby", post(set_standby))
        .route("/v1/nodes/{name}/paths", post(add_path))
        .route("/v1/nodes/{name}/paths/{path}", delete(remove_path))
        .merge(fence::routes())
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(REQUEST_MAX))
        .with_state(app)
}

async fn unknown() -> ApiError {
    ApiError::new(
        ErrorKind::NotFound,
        "the daemon does not know this call",
        "the path or the method is unknown",
        "use a `relevo` of the daemon's version",
    )
}

/// A request's body. Not axum's extractor: its refusals are no [`ApiError`].
fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|e| {
        ApiError::new(
            ErrorKind::BadRequest,
            "the request was not understood",
            e.to_string(),
            "use a `relevo` of the daemon's version",
        )
    })
}

async fn status(State(app): State<Arc<App>>) -> Json<Status> {
    Json(app.status().await)
}

async fn cluster(State(app): State<Arc<App>>) -> Answer<ClusterStatus> {
    app.cluster_status().await.map(Json)
}

async fn volumes(State(app): State<Arc<App>>) -> Answer<Vec<VolumeStatus>> {
    Ok(Json(app.cluster_status().await?.volumes))
}

async fn services(State(app): State<Arc<App>>) -> Answer<Vec<ServiceStatus>> {
    Ok(Json(app.cluster_status().await?.services))
}

async fn init(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<InitAnswer> {
    let request: InitRequest = body(&bytes)?;
    to_the_end(async move { app.init(request).await }).await
}

async fn join(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<JoinAnswer> {
    let request: JoinRequest = body(&bytes)?;
    to_the_end(async move { app.join(request).await }).await
}

async fn leave(State(app): State<Arc<App>>) -> Answer<Done> {
    to_the_end(async move { app.leave().await }).await
}

async fn create_token(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<TokenAnswer> {
    let request: TokenRequest = body(&bytes)?;
    app.running()?.create_token(&request).await.map(Json)
}

async fn create_volume(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<Done> {
    let request: CreateVolumeRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.create_volume(request).await }).await
}

async fn remove_volume(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.remove_volume(&name).await }).await
}

async fn make_primary(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.make_primary(&name).await }).await
}

async fn make_secondary(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.make_secondary(&name).await }).await
}

async fn force_loss(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<LossStatus> {
    app.running()?.force_loss(&name).await.map(Json)
}

async fn force(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: ConfirmRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.force_primary(&name, &request).await }).await
}

async fn resolve_loss(
    State(app): State<Arc<App>>,
    Path((name, node)): Path<(String, String)>,
) -> Answer<LossStatus> {
    app.running()?.resolve_loss(&name, &node).await.map(Json)
}

async fn resolve(
    State(app): State<Arc<App>>,
    Path((name, node)): Path<(String, String)>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: ConfirmRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.resolve(&name, &node, &request).await }).await
}

async fn add_replica(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: AddReplicaRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.add_replica(&name, request).await }).await
}

async fn remove_replica(
    State(app): State<Arc<App>>,
    Path((name, node)): Path<(String, String)>,
) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.remove_replica(&name, &node).await }).await
}

async fn set_options(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: SetOptionsRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.set_volume_options(&name, &request.options).await }).await
}

async fn order(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: OrderRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.order_volume(&name, request).await }).await
}

async fn dump_metadata(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Answer<MetadataDump> {
    app.running()?.dump_metadata(&name).await.map(Json)
}

async fn wait_sync(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: WaitSyncRequest = body(&bytes)?;
    app.running()?.wait_sync(&name, request).await.map(Json)
}

async fn create_service(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<Done> {
    let request: CreateServiceRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.create_service(request).await }).await
}

async fn remove_service(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.remove_service(&name).await }).await
}

async fn start_service(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.start_service(&name).await }).await
}

async fn stop_service(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.stop_service(&name).await }).await
}

async fn move_service(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: MoveServiceRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.move_service(&name, request.to.as_deref()).await }).await
}

async fn place_service(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: PlacementRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.place_service(&name, &request).await }).await
}

async fn hold_service(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: HoldRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.hold_service(&name, request.reason).await }).await
}

async fn why_service(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<WhyAnswer> {
    app.running()?.why(&name).await.map(Json)
}

async fn what_if(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<WhatIfAnswer> {
    let request: WhatIfRequest = body(&bytes)?;
    app.running()?.what_if(&request).await.map(Json)
}

async fn set_standby(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: StandbyRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.set_standby(&name, request.standby).await }).await
}

async fn add_path(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: PathRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.add_path(&name, request).await }).await
}

async fn remove_path(
    State(app): State<Arc<App>>,
    Path((name, path)): Path<(String, String)>,
) -> Answer<Done> {
    let cluster = app.running()?;
    to_the_end(async move { cluster.remove_path(&name, &path).await }).await
}

/// Carries a call of several steps out to its end even when the caller hangs up in the middle:
/// axum drops a handler with its connection, and half a volume would stay behind.
async fn to_the_end<T: Send + 'static>(
    call: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(call).await {
        Ok(result) => result.map(Json),
        Err(e) => Err(ApiError::new(
            ErrorKind::Internal,
            "the call was not completed",
            e.to_string(),
            "look at the log of the daemon",
        )),
    }
}

#[derive(Deserialize)]
struct EventsQuery {
    /// `?follow` alone is a yes too.
    follow: Option<String>,
}

impl EventsQuery {
    fn follows(&self) -> bool {
        self.follow.as_deref().is_some_and(|word| word != "false")
    }
}

/// JSON lines: the remembered events, and with `follow` those that come.
async fn events(State(app): State<Arc<App>>, Query(query): Query<EventsQuery>) -> Response {
    let (past, live) = app.events.follow();
    let mut text = Vec::new();
    for event in &past {
        push_line(&mut text, event);
    }
    let body = if query.follows() {
        let first = (Some(Bytes::from(text)), live);
        Body::from_stream(stream::unfold(first, |(past, mut live)| async move {
            let chunk = match past {
                Some(past) => past,
                None => next_line(&mut live).await?,
            };
            Some((Ok::<_, Infallible>(chunk), (None, live)))
        }))
    } else {
        Body::from(text)
    };
    ([(header::CONTENT_TYPE, "application/jsonl")], body).into_response()
}

async fn next_line(live: &mut broadcast::Receiver<Event>) -> Option<Bytes> {
    loop {
        match live.recv().await {
            Ok(event) => {
                let mut line = Vec::new();
                push_line(&mut line, &event);
                return Some(Bytes::from(line));
            }
            // The numbers of the events show the gap.
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return None,
        }
    }
}

fn push_line(text: &mut Vec<u8>, event: &Event) {
    // An event is strings and numbers; its JSON can't fail.
    if let Ok(json) = serde_json::to_vec(event) {
        text.extend_from_slice(&json);
        text.push(b'\n');
    }
}
