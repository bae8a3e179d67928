//! The Anabranch daemon. Data flows decode -> stamp -> journal -> exchange -> order -> resolve -> apply.

pub mod admin;
pub mod apply;
pub mod broken;
pub mod capture;
pub mod config;
pub mod daemon;
pub mod donor;
pub mod error;
pub mod heal;
pub mod index;
pub mod join;
pub mod journal;
pub mod link;
pub mod membership;
pub mod pg;
pub mod recent;
pub mod resolve;
pub mod review;
pub mod setup;
pub mod shared;
mod small_file;
pub mod source;
pub mod status;
pub mod verify;
pub mod web;
