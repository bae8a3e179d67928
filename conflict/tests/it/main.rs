//! The laws of the crate, tried from outside: on small histories in every causal order ([`laws`]; rows that begin anew [`replaced`], that are
//! written all the time [`let_go`], that are folded after a start [`restarted`]), and on simulated clusters ([`convergence`], [`controls`];
//! with unique keys [`unique`], with foreign keys [`foreign`]).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod controls;
mod convergence;
mod delivery;
mod foreign;
mod laws;
mod let_go;
mod replaced;
mod restarted;
mod script;
mod sim;
mod unique;
