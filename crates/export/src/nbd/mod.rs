//! The Network Block Device protocol: fixed newstyle negotiation, structured replies, base
//! allocation; <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.
//!
//! [`Session`] is the server side of one connection without the connection: the data path feeds it
//! bytes, takes [`NbdRequest`]s, gives answers and sends what comes out. [`client`] is a small
//! blocking client for tools and tests of our own.

pub mod client;
mod negotiate;
mod output;
mod proto;
mod session;
mod transmit;

pub use client::{Breaker, Client, ClientError, Completed, NbdAddr, Op, Pipeline};
pub use proto::MAX_REQUEST;
pub use session::{CloseReason, Export, NbdRequest, Phase, RequestTag, Session};
