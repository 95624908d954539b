//! How nodes reach each other: identities, RPC, data links, heartbeats.
//!
//! Called by the server and the data path. Everything on TCP is TLS 1.3 with certificates of the
//! cluster's own CA on both sides; heartbeats are UDP with a message authentication code.
//!
//! * [`identity`]: the CA, node certificates, TLS configurations, who a peer is.
//! * [`token`]: the text that lets a machine join.
//! * [`rpc`]: requests between daemons, on the control port.
//! * [`datalink`]: connections that carry one volume, on the data port; set up here, then handed
//!   to the data path, which drives socket and TLS session itself.
//! * [`heartbeat`]: datagrams, one socket per network, and all paths of a node together.
//! * [`mod@line`]: heartbeats on byte streams, in frames of [`framing`].
//! * [`net`]: socket options and connecting.

pub mod datalink;
pub mod framing;
pub mod heartbeat;
pub mod identity;
pub mod line;
mod listen;
pub mod net;
pub mod random;
pub mod rpc;
pub mod token;

pub use datalink::{
    DataListener, EstablishedLink, LinkAdmission, LinkDialer, LinkError, WantedLink,
};
pub use heartbeat::{HeartbeatKey, HeartbeatSocket, HeartbeatSockets, HeartbeatWaker, PathChange};
pub use identity::{ClusterCa, Fingerprint, Identity, IdentityError, NodeKey};
pub use line::HeartbeatLine;
pub use listen::Listeners;
pub use rpc::{Method, RpcClient, RpcConfig, RpcError, RpcHandler, RpcServer};
pub use token::{Token, TokenError};
