//! The server of this node: which of several hosts, and whether it is still the one that the node ran on.
//!
//! In:   `postgres.dsn`, `server.json` in the data folder       Out: a configuration with its server chosen
//! Must never: let a life talk to two servers, or go on on a timeline that only has the number of the known one
//! Not here: choosing (`crate::pg`), another server that takes writes meanwhile (`rivals`)

use std::sync::Arc;

use anabranch_proto::Lsn;

use super::Error;
use crate::config::Config;
use crate::{pg, source};

/// The configuration with its server chosen: every connection of this life is to that one, or fails.
pub(super) async fn pinned(
    config: &Arc<Config>,
    hosts: &pg::Dsn,
    here: &mut Option<pg::ServerId>,
) -> Result<Arc<Config>, Error> {
    let known = pg::Known {
        last: pg::LastServer::read(&config.node.data_dir).map_err(Error::ServerFile)?,
        here: *here,
    };
    let pin = pg::choose(hosts, &known).await?;
    tracing::info!(
        host = pin.host(),
        timeline = pin.timeline(),
        "the server of this node"
    );
    *here = Some(pin.id());
    let mut config = config.as_ref().clone();
    config.postgres.pin = Some(pin);
    Ok(Arc::new(config))
}

/// What is to be remembered of a server.
pub(crate) fn server_of(identity: &source::Identity, timelines: &source::Timelines) -> pg::LastServer {
    pg::LastServer {
        system_identifier: identity.system_id,
        timeline: timelines.current(),
        began: timelines.began().0,
    }
}

/// Is its timeline the one that this node ran on, if the number is?
pub(crate) fn check_branch(config: &Config, server: &pg::LastServer) -> Result<(), Error> {
    let last = pg::LastServer::read(&config.node.data_dir).map_err(Error::ServerFile)?;
    match last {
        Some(last)
            if last.system_identifier == server.system_identifier
                && last.timeline == server.timeline
                && last.began != server.began =>
        {
            Err(Error::OtherBranch {
                timeline: server.timeline,
                found: Lsn(server.began),
                known: Lsn(last.began),
            })
        }
        _ => Ok(()),
    }
}
