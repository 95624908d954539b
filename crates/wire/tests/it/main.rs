//! Frames as broken peers and broken memory send them, and as the documentation has them.

mod corpus;
mod damage;
mod document;
