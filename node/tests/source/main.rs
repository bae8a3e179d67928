//! Decoding a real server.

// The exemption of tests does not reach the functions that they share.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod changes;
mod connections;
mod server;
mod slots;
mod tables;
mod unique;
