//! Domain types and wire formats of Anabranch. No I/O, no clock, no async.
//!
//! * [`ids`] – node ids, LSNs, positions.
//! * [`stamp`] – hybrid-logical-clock stamps.
//! * [`vector`] – what is applied somewhere, per origin.
//! * [`schema`], [`row`] – tables, row images, canonical keys.
//! * [`txn`] – transactions and the frame payload that carries them.
//! * [`wire`] – reading bytes that someone else wrote.
//! * [`link`], [`admin`] – generated gRPC messages and services (feature `transport`).

pub mod ids;
pub mod row;
pub mod schema;
pub mod stamp;
pub mod txn;
pub mod vector;
pub mod wire;

/// The protocol between daemons, generated from `proto/link.proto`.
#[cfg(feature = "transport")]
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::indexing_slicing
)]
pub mod link {
    tonic::include_proto!("anabranch.link.v1");
}

/// What a daemon tells its operator, generated from `proto/admin.proto`.
#[cfg(feature = "transport")]
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::indexing_slicing
)]
pub mod admin {
    tonic::include_proto!("anabranch.admin.v1");
}

pub use ids::{Lsn, NodeId, Position};
pub use stamp::Stamp;
pub use vector::Vector;
