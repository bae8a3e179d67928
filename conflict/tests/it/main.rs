//! The laws of the crate, tried from outside: on small histories in every causal order ([`laws`]; rows that begin anew [`replaced`]), and on
//! simulated clusters ([`convergence`], [`controls`]; with unique keys [`unique`]).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

mod controls;
mod convergence;
mod laws;
mod replaced;
mod script;
mod sim;
mod unique;
