//! Foreign judges against Relevo's NBD server and client.

mod copies;
mod describe;
mod illegal;
mod interop;
mod subject;
mod tools;
mod verify;
