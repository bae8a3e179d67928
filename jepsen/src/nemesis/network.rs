//! How nodes reach each other in a run, and what cannot be done to them there.

use std::sync::OnceLock;

use anabranch_tests::network;
use clap::ValueEnum;

use super::{bridge, packets, proof};

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// All on one machine, an in-process TCP proxy for each direction of dialling. Works everywhere.
    Proxy,
    /// Each node in a network namespace of its own, joined by a veth pair to a bridge on which nft drops and refuses packets.
    Veth,
}

/// How many nodes are enough to see that what is done to two is not done to a third.
const NODES: usize = 3;

impl Network {
    /// As on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Veth => "veth",
        }
    }

    /// The network of a name, if there is one; histories of before there were two name none.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "" | "proxy" => Some(Self::Proxy),
            "veth" => Some(Self::Veth),
            _ => None,
        }
    }

    /// Why there can be none here; `None` when it was tried, and what has to be cut is cut and nothing else.
    pub fn impossible(self) -> Option<String> {
        static WHY: OnceLock<Option<String>> = OnceLock::new();
        match self {
            Self::Proxy => None,
            Self::Veth => WHY.get_or_init(why_no_veth).clone(),
        }
    }

    /// Why a nemesis can do nothing at all on it.
    pub fn cannot(self, nemesis: &str) -> Option<&'static str> {
        (self == Self::Veth && nemesis == "slow").then_some(bridge::NOT_SLOW)
    }
}

fn why_no_veth() -> Option<String> {
    if !packets::inside() {
        let why = packets::impossible();
        return Some(why.unwrap_or_else(|| "not in a network namespace of its own".to_owned()));
    }
    match network::Network::start(NODES) {
        Ok(network) => proof::prove(network.seats()).err(),
        Err(error) => Some(format!("a bridge with {NODES} namespaces: {error}")),
    }
}
