//! Requests between daemons, on the control port.
//!
//! One TLS connection per direction and pair of nodes, many requests on it at a time, each with its
//! own answer. [`RpcClient`] keeps a connection to every peer it was given addresses of: when one
//! breaks, or the peer is silent while it owes answers, the next path is tried at once.
//! [`RpcServer`] hands requests to an [`RpcHandler`], with the id of the node that sent them.
//!
//! Frames are a length (u32, little-endian) and a `Frame` in postcard.

mod client;
mod connection;
mod server;

use std::time::Duration;

use bytes::Bytes;
use relevo_types::{NodeId, Timing};
use serde::{Deserialize, Serialize};

pub use client::{RpcClient, call_as_stranger, join};
pub use server::RpcServer;

/// The longest frame: a snapshot of the control log's state in one piece, with room to grow.
pub const MAX_FRAME_BYTES: usize = 8 << 20;

/// The longest frame from a machine without a certificate: it can only ask to join.
const MAX_STRANGER_FRAME_BYTES: usize = 64 << 10;

/// What a request is about. Numbers on the wire are the order here; append only.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Method {
    /// A message of the control log; opaque here.
    Raft,
    /// A command for the control log's leader.
    Propose,
    /// A machine with a token asks to become a node. The only one without a certificate.
    Join,
    /// A node tells what it observes.
    Report,
    /// A call of the API that another node shall handle.
    Api,
    /// What a person says about the fencing of a node, for whoever is at it.
    Fence,
}

/// Times of the RPC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RpcConfig {
    /// How long connecting to one address may take, the TLS handshake included.
    pub connect_timeout: Duration,
    /// A peer that owes an answer and sends nothing for this long is gone: next path.
    pub silence: Duration,
    /// A peer that owes an answer is asked for a sign of life this often.
    pub ping: Duration,
}

impl Default for RpcConfig {
    fn default() -> Self {
        Self::for_timing(&relevo_types::Sensitivity::Normal.timing())
    }
}

impl RpcConfig {
    /// What fits the cluster's time-outs: a dead path is left in half the dead time, so that
    /// the loss of one path out of two is no loss of the node.
    #[must_use]
    pub fn for_timing(timing: &Timing) -> Self {
        Self {
            connect_timeout: timing.suspect.max(Duration::from_millis(300)),
            silence: timing.dead / 2,
            ping: timing.heartbeat,
        }
    }
}

/// Why a request has no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RpcError {
    /// It was not sent.
    #[error("node {peer} can't be reached: {why}")]
    Unreachable {
        /// The peer.
        peer: String,
        /// What happened on each path.
        why: String,
    },
    /// It was sent, and the connection broke; the peer may have handled it.
    #[error("the connection to node {peer} broke before the answer came: {why}")]
    Lost {
        /// The peer.
        peer: String,
        /// What happened.
        why: String,
    },
    /// It was sent, and no answer came in time; the peer may handle it yet.
    #[error("node {peer} did not answer within {} ms", after.as_millis())]
    TimedOut {
        /// The peer.
        peer: String,
        /// How long was waited.
        after: Duration,
    },
    /// The peer does not accept it from this machine.
    #[error("{why}")]
    Refused {
        /// Why, and what to do.
        why: String,
    },
    /// The peer tried, and it failed.
    #[error("{why}")]
    Failed {
        /// Why, and what to do.
        why: String,
    },
    /// Longer than a frame may be.
    #[error("a message of {len} bytes is longer than allowed ({max})")]
    TooLong {
        /// Its length.
        len: usize,
        /// The bound.
        max: usize,
    },
}

impl RpcError {
    /// Whether the peer may have handled the request: then only what may happen twice is asked
    /// again.
    #[must_use]
    pub const fn may_have_happened(&self) -> bool {
        matches!(
            self,
            Self::Lost { .. } | Self::TimedOut { .. } | Self::Failed { .. }
        )
    }
}

/// Handles requests of peers. Called by [`RpcServer`], many at a time.
#[async_trait::async_trait]
pub trait RpcHandler: Send + Sync + 'static {
    /// Answers a request. `peer` is the verified sender; `None`: a machine without a certificate,
    /// whose method is then [`Method::Join`].
    async fn handle(
        &self,
        peer: Option<NodeId>,
        method: Method,
        body: Bytes,
    ) -> Result<Bytes, RpcError>;
}

/// What goes over a connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Frame {
    Request {
        id: u64,
        method: Method,
        body: Bytes,
    },
    Response {
        id: u64,
        result: Result<Bytes, Failure>,
    },
    Ping,
    Pong,
}

/// An error of a handler on its way back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Failure {
    refused: bool,
    why: String,
}

impl From<RpcError> for Failure {
    fn from(error: RpcError) -> Self {
        Self {
            refused: matches!(error, RpcError::Refused { .. }),
            why: error.to_string(),
        }
    }
}

impl From<Failure> for RpcError {
    fn from(failure: Failure) -> Self {
        if failure.refused {
            Self::Refused { why: failure.why }
        } else {
            Self::Failed { why: failure.why }
        }
    }
}

/// Encodes a frame with its length in front.
fn encode(frame: &Frame) -> Result<Vec<u8>, RpcError> {
    let malformed = |why: String| RpcError::Failed { why };
    let mut bytes = postcard::to_extend(frame, vec![0; 4])
        .map_err(|error| malformed(format!("a message can't be encoded: {error}")))?;
    let len = bytes.len() - 4;
    let too_long = RpcError::TooLong {
        len,
        max: MAX_FRAME_BYTES,
    };
    if len > MAX_FRAME_BYTES {
        return Err(too_long);
    }
    let prefix = u32::try_from(len).map_err(|_| too_long)?;
    bytes[..4].copy_from_slice(&prefix.to_le_bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_frames() {
        let request = Frame::Request {
            id: 300,
            method: Method::Report,
            body: Bytes::from_static(b"hi"),
        };
        assert_eq!(
            encode(&request).unwrap(),
            [7, 0, 0, 0, 0, 0xac, 2, 3, 2, b'h', b'i']
        );
        let response = Frame::Response {
            id: 1,
            result: Err(Failure {
                refused: true,
                why: "no".to_owned(),
            }),
        };
        assert_eq!(
            encode(&response).unwrap(),
            [7, 0, 0, 0, 1, 1, 1, 1, 2, b'n', b'o']
        );
        assert_eq!(encode(&Frame::Ping).unwrap(), [1, 0, 0, 0, 2]);
        assert_eq!(encode(&Frame::Pong).unwrap(), [1, 0, 0, 0, 3]);
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let request = Frame::Request {
            id: 1,
            method: Method::Api,
            body: Bytes::from(vec![0; MAX_FRAME_BYTES]),
        };
        assert!(matches!(encode(&request), Err(RpcError::TooLong { .. })));
    }
}
