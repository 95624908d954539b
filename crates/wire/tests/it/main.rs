//! Frames as broken peers and broken memory send them.

mod corpus;
mod damage;
