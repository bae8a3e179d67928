//! Making an ordinary PostgreSQL database a node, judging whether it can be one, and taking it all away again.
//!
//! In:   a connection with an administrator's rights, the configuration            Out: schema `anabranch`, publication,
//!       slot, replica identities, grants; or findings with remedies
//! Holds: nothing; every command reads the catalog anew
//! Invariants: 1. `init` is idempotent and changes nothing when a check fails. 2. what `--dry-run` prints is what runs.
//!       3. `remove` leaves nothing of what `init` made.
//! Not here: the daemon's own connections (`crate::source`), printing (the `anabranch` command).
//!
//! Reading order: [`objects`] what is made, [`facts`] and [`table`] what is there, [`select`] which tables, [`check`]
//! whether it fits, [`plan`] what is to be done, [`execute`] doing it, [`grants`], [`doctor`], [`remove`]; [`merged`] and [`together`] for
//! merged columns; [`exclusion`] for constraints that are no keys, [`pairwise`] for keys without claims; [`parents`] for rows that are brought back; for sequences [`sequence`] what is there, [`ids`] what is to be done, by [`interleave`], [`range`] and [`snowflake`];
//! for DDL that travels [`ddl`], and what captures it [`plain_ddl`]; [`tables`] single tables.

pub mod check;
pub mod conflict_log;
pub mod connect;
pub mod ddl;
pub mod doctor;
pub mod error;
pub mod exclusion;
pub mod execute;
pub mod facts;
pub mod finding;
pub mod grants;
pub mod ids;
pub mod interleave;
pub mod merged;
pub mod objects;
pub mod pairwise;
pub mod parents;
pub mod pattern;
pub mod plain_ddl;
pub mod plan;
pub mod range;
pub mod remove;
pub mod select;
pub mod sequence;
pub mod snowflake;
pub mod sql;
pub mod table;
pub mod tables;
pub mod together;

pub use connect::connect;
pub use error::{Error, describe};
pub use execute::{Event, execute};
pub(crate) use execute::{lock_holders, writers};
pub use facts::Facts;
pub use finding::{Finding, Level, worst};
pub use plan::{Plan, plan, plan_joined};
