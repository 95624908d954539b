//! The routes about fencing.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    routing::{delete, get, post},
};

use super::{Answer, body, to_the_end};
use crate::{
    api::{
        AddFenceDeviceRequest, Done, FenceAgentStatus, FenceAgentSummary, FenceDeviceStatus,
        FenceHistoryEntry, FenceOutlook, FencePower, FenceRequest, FenceWordRequest,
    },
    app::App,
};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/fence/devices", get(devices).post(add_device))
        .route("/v1/fence/devices/{name}", delete(remove_device))
        .route("/v1/fence/devices/{name}/test", post(test_device))
        .route("/v1/fence/nodes/{name}", get(outlook).post(fence))
        .route("/v1/fence/nodes/{name}/confirm", post(confirm))
        .route("/v1/fence/nodes/{name}/cancel", post(cancel))
        .route("/v1/fence/nodes/{name}/power", get(power))
        .route("/v1/fence/history", get(history))
        .route("/v1/fence/agents", get(agents))
        .route("/v1/fence/agents/{name}", get(agent))
}

async fn devices(State(app): State<Arc<App>>) -> Answer<Vec<FenceDeviceStatus>> {
    Ok(Json(app.cluster_status().await?.fencing.devices))
}

async fn add_device(State(app): State<Arc<App>>, bytes: Bytes) -> Answer<Done> {
    let request: AddFenceDeviceRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.add_fence_device(request).await }).await
}

async fn remove_device(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    app.running()?.remove_fence_device(&name).await.map(Json)
}

async fn test_device(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Done> {
    app.running()?.test_fence_device(&name).await.map(Json)
}

async fn outlook(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<FenceOutlook> {
    app.running()?.fence_outlook(&name).await.map(Json)
}

async fn fence(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: FenceRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.fence_node(&name, request).await }).await
}

async fn confirm(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: FenceWordRequest = body(&bytes)?;
    let cluster = app.running()?;
    to_the_end(async move { cluster.fence_confirm(&name, request).await }).await
}

async fn cancel(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<Done> {
    let request: FenceWordRequest = body(&bytes)?;
    app.running()?.fence_cancel(&name, request).await.map(Json)
}

async fn power(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<Vec<FencePower>> {
    app.running()?.fence_power(&name).await.map(Json)
}

async fn history(State(app): State<Arc<App>>) -> Answer<Vec<FenceHistoryEntry>> {
    Ok(Json(app.running()?.fence_history()))
}

async fn agents(State(app): State<Arc<App>>) -> Answer<Vec<FenceAgentSummary>> {
    let cluster = app.running()?;
    Ok(Json(cluster.fence_agents().await))
}

async fn agent(State(app): State<Arc<App>>, Path(name): Path<String>) -> Answer<FenceAgentStatus> {
    app.running()?.fence_agent(&name).await.map(Json)
}
