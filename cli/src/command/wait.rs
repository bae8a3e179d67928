//! `anabranch wait`: until what another node had committed is visible here.
//!
//! Exit codes: 0 it is visible, 1 not in time, 2 could not tell.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anabranch_node::admin;
use anabranch_node::config::Config;
use anabranch_proto::{Lsn, NodeId, Position};
use serde_json::json;

use crate::args::Wait;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(path: &Path, verb: &Wait, format: Format) -> ExitCode {
    match wait(path, verb, format).await {
        Ok(reached) => ExitCode::from(u8::from(!reached)),
        Err(failure) => {
            crate::report(&failure, format);
            ExitCode::from(2)
        }
    }
}

async fn wait(path: &Path, verb: &Wait, format: Format) -> Result<bool, Failure> {
    let config = super::load(path)?;
    let position = verb.position.as_deref().map(position).transpose()?;
    let node = node(&config, &verb.node).await?;
    let socket = config.node.data_dir.join(admin::SOCKET);
    let timeout = Duration::from_secs(verb.timeout.into());
    let (reached, position) = admin::wait_for(&socket, node, position, timeout)
        .await
        .map_err(|error| super::status::unanswered(error, &socket))?;
    match format {
        Format::Json => output::json(&json!({
            "reached": reached, "node": verb.node, "position": position.to_string(),
        }))?,
        Format::Table if reached => say(&format!("{position} of {} is visible here\n", verb.node))?,
        Format::Table => say(&format!(
            "{position} of {} was not visible here within {} s\n",
            verb.node, verb.timeout
        ))?,
    }
    Ok(reached)
}

/// A member by its name or its id. Who joined later is known to the daemon alone.
async fn node(config: &Config, name: &str) -> Result<NodeId, Failure> {
    if let Ok(id) = name.parse::<u16>() {
        return Ok(NodeId(id));
    }
    if config.node.name == name {
        return Ok(config.node.id);
    }
    let status = super::status::read(config).await?;
    let peer = status.peers.iter().find(|peer| peer.name == name);
    peer.map(|peer| NodeId(peer.id))
        .ok_or_else(|| Failure::Usage(format!("--node {name} is neither an id nor the name of a member")))
}

/// `1:0/19D2920`, or an LSN alone: of the timeline that is known here.
fn position(text: &str) -> Result<Position, Failure> {
    let bad = || {
        Failure::Usage(format!(
            "--position {text} is no position; write timeline and LSN such as 1:0/19D2920, or the LSN alone"
        ))
    };
    let (epoch, lsn) = match text.split_once(':') {
        Some((epoch, lsn)) => (epoch.parse().map_err(|_| bad())?, lsn),
        None => (0, text),
    };
    let lsn: Lsn = lsn.parse().map_err(|_| bad())?;
    if lsn == Lsn::ZERO {
        return Err(bad());
    }
    Ok(Position { epoch, lsn })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_a_timeline_and_an_lsn_or_an_lsn() {
        assert_eq!(position("2:0/1F").unwrap(), Position::new(2, 0x1F));
        assert_eq!(position("1/0").unwrap(), Position::new(0, 1 << 32));
        for wrong in ["", "1", "x:0/1", "1:2:0/1", "1:0/x", "0/0"] {
            assert!(matches!(position(wrong), Err(Failure::Usage(_))), "{wrong}");
        }
    }
}
