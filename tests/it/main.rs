//! End-to-end tests: real PostgreSQL servers, the real program, real faults.
//!
//! Every sentence of what the project claims to survive is the name of a test here; `docs/testing.md` says
//! how to run some of them and how to read a failure.

mod apply;
mod checks;
mod claims;
mod clocks;
mod collections;
mod collisions;
mod columns;
mod conflicts;
mod crashes;
mod ddl;
mod drift;
mod drops;
mod durability;
mod failover;
mod foreign_keys;
mod harness;
mod heals;
mod joins;
mod journals;
mod large;
mod leaves;
mod limits;
mod monitoring;
mod partitions;
mod plain_ddl;
mod policies;
mod policy_change;
mod publications;
mod quarantine;
mod refusals;
mod replicates;
mod review;
mod scripts;
mod sequences;
mod starts;
mod tables;
mod truncates;
mod types;
mod verify;
mod web;
mod went_back;
