//! The decisions of replication, as pure functions: what a write is stamped, what it covers, who wins, what
//! is logged, what may be forgotten.
//!
//! In:   versions, vectors and stamps from decoding and from peers      Out: verdicts to the row index,
//! the applier and the conflict log
//! Holds: nothing; callers keep the state (`Fold`, `Version`, `Frontier`, `Stability`)
//! Invariants (the laws; `tests/` tries them against a model of whole clusters):
//! 1. *Covered implies later*: a version covered by a transaction has a lower stamp than it ([`clock`]).
//! 2. *Order does not matter*: nodes that applied the same versions of a row, in any orders that respect what
//!    covers what, hold the same winner ([`last_writer`], [`frontier`], [`table`]), under the policy that all of
//!    them read from one file ([`policy`]). Nor does it matter which rows give up a value of a unique key ([`claims`]).
//! 3. *No silent loss*: what lost to a concurrent write that nobody resolved knowingly is reported at every
//!    node, under one id, and nothing that was not concurrent is reported ([`last_writer`], [`record`]).
//! 4. *Forgetting is invisible*: dropping what is stable changes no later verdict ([`stability`]).
//!
//! On crash: nothing is lost here; every function gives the same answer for the same arguments on every node.
//! Not here: reading the stream (node: source), keeping the entries (node: index), SQL (node: apply).

pub mod change;
pub mod claims;
pub mod clock;
pub mod columns;
pub mod frontier;
pub mod groups;
pub mod last_writer;
pub mod merge;
pub mod orphan;
pub mod policy;
pub mod record;
pub mod script;
pub mod stability;
pub mod table;
pub mod version;

pub use claims::{Claim, Claims};
pub use clock::{Fold, FoldError, LocalStamp};
pub use last_writer::{Verdict, admit};
pub use record::{ConflictType, Op, Resolution, conflict_id};
pub use stability::Stability;
pub use table::TableVersion;
pub use version::{Kind, Version};
