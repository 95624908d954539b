//! The calls about fencing.

use hyper::Method;
use relevo_server::api::{
    AddFenceDeviceRequest, Done, FenceAgentStatus, FenceAgentSummary, FenceDeviceStatus,
    FenceHistoryEntry, FenceOutlook, FencePower, FenceRequest, FenceWordRequest,
};

use super::{Client, escape};
use crate::CliError;

impl Client {
    /// The fence devices.
    ///
    /// # Errors
    /// See [`CliError`], as all calls.
    pub async fn fence_devices(&self) -> Result<Vec<FenceDeviceStatus>, CliError> {
        self.get("/v1/fence/devices").await
    }

    /// Adds a fence device.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn add_fence_device(
        &self,
        request: &AddFenceDeviceRequest,
    ) -> Result<Done, CliError> {
        self.call(Method::POST, "/v1/fence/devices", Some(request))
            .await
    }

    /// Removes a fence device.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn remove_fence_device(&self, name: &str) -> Result<Done, CliError> {
        let path = format!("/v1/fence/devices/{}", escape(name));
        self.call::<(), _>(Method::DELETE, &path, None).await
    }

    /// Looks whether a fence device would work from the daemon's node.
    ///
    /// # Errors
    /// It would not; or see [`CliError`].
    pub async fn test_fence_device(&self, name: &str) -> Result<Done, CliError> {
        self.post(&format!("/v1/fence/devices/{}/test", escape(name)))
            .await
    }

    /// What is known before a node is switched off.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn fence_outlook(&self, node: &str) -> Result<FenceOutlook, CliError> {
        self.get(&format!("/v1/fence/nodes/{}", escape(node))).await
    }

    /// Switches a node off, or off and on again; returns when that is over.
    ///
    /// # Errors
    /// Nobody knows that it was off; or see [`CliError`].
    pub async fn fence(&self, node: &str, request: &FenceRequest) -> Result<Done, CliError> {
        let path = format!("/v1/fence/nodes/{}", escape(node));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// A person says that a node is off.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn confirm_fence(
        &self,
        node: &str,
        request: &FenceWordRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/fence/nodes/{}/confirm", escape(node));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// A person takes the attempt to fence a node back.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn cancel_fence(
        &self,
        node: &str,
        request: &FenceWordRequest,
    ) -> Result<Done, CliError> {
        let path = format!("/v1/fence/nodes/{}/cancel", escape(node));
        self.call(Method::POST, &path, Some(request)).await
    }

    /// What the devices of a node say of its power.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn fence_power(&self, node: &str) -> Result<Vec<FencePower>, CliError> {
        self.get(&format!("/v1/fence/nodes/{}/power", escape(node)))
            .await
    }

    /// What was done, the newest last.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn fence_history(&self) -> Result<Vec<FenceHistoryEntry>, CliError> {
        self.get("/v1/fence/history").await
    }

    /// The agents that are installed on the daemon's node.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn fence_agents(&self) -> Result<Vec<FenceAgentSummary>, CliError> {
        self.get("/v1/fence/agents").await
    }

    /// What an agent says of itself.
    ///
    /// # Errors
    /// See [`CliError`].
    pub async fn fence_agent(&self, name: &str) -> Result<FenceAgentStatus, CliError> {
        self.get(&format!("/v1/fence/agents/{}", escape(name)))
            .await
    }
}
