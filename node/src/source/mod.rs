//! Decodes the node's own WAL: one logical slot, one pgoutput stream, events in commit order.
//!
//! In:   pgoutput of the slot, over a walsender connection        Out: [`Event`]s to the stamp stage
//! Holds: one read buffer, the tables seen so far; never a whole transaction (the server keeps those)
//! Invariants: 1. a transaction's events come together, after its commit, in commit order; commit ends only grow.
//!             2. nothing is skipped: what cannot be delivered is an error, and the same error again until
//!                its cause is gone.
//!             3. feedback only grows and never passes what the server has sent.
//! On crash: nothing is kept here; the slot sends again from the position that was confirmed
//! Not here: telling own transactions from local ones and stamping (`stamp`), what to confirm (the journal)
//!
//! * [`walsender`] – the replication connection: login, commands, frames, feedback.
//! * [`pgoutput`] – the messages inside the frames.
//! * [`relation`] – tables as pgoutput and the catalog describe them.
//! * [`catalog`] – asking the catalog, and waiting until it shows what a commit has made.
//! * [`assemble`] – messages into events.
//! * [`paced`] – the walsender's many small messages, taken in larger pieces.
//! * [`slot`] – replication slots.
//! * [`timelines`] – which WAL the server has, after a promotion.

mod assemble;
mod catalog;
mod error;
mod handshake;
mod paced;
pub mod pgoutput;
mod relation;
pub mod slot;
mod socket;
mod timelines;
mod walsender;

pub use assemble::{Event, Source, SourceOptions};
pub use error::{Error, ServerError};
pub use timelines::{Timelines, identify};
pub use walsender::{Feedback, Identity, ReplyWanted, Walsender};
