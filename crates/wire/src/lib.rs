//! What two nodes say to each other about a volume: the messages of the data link and their
//! encoding. `docs/protocol.md` is the specification.
//!
//! * [`message`]: the messages, as values. The replication engine speaks only these.
//! * [`frame`]: their encoding: length-prefixed frames with a version and a checksum, decoded
//!   incrementally from a byte stream. Called by the data path; fuzzed.
//! * [`payload`]: aligned memory for what writes carry.

pub mod frame;
pub mod message;
pub mod payload;

pub use frame::{
    Decoder, Encoded, FrameError, HelloError, LINK_HELLO_BYTES, LinkHello, PLAIN_START,
    ProtocolVersion, encode, encode_into,
};
pub use message::{BlockDigest, Body, Message, PeerInfo, Refusal};
pub use payload::PayloadArena;
