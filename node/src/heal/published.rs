//! A publication that was gone or incomplete for a while is as good as a slot that was: what was written meanwhile was not decoded.
//!
//! In:   the catalog, `publication.json`      Out: whether that is so, since which transaction; the same file, begun anew
//! Invariants: 1. a new slot is made only while the publication is whole; 2. the node counts as broken until all is written again
//! On crash: run again, it is looked at again
//! Not here: what is wrong with a publication (`crate::publication`)

use tokio_postgres::Client;

use super::{Error, io, refused};
use crate::config::Config;
use crate::publication::{self, Kept};

const FILE: &str = "read or write publication.json in node.data_dir";
const BEGUN: &str = "was gone or incomplete, and a heal was begun that is not finished";

/// Was it not as it should have been?
pub(super) struct Broken {
    /// Transactions from here on may not have been decoded, 64 bits; as far as that is known.
    pub(super) first_xid: Option<u64>,
}

/// None where it has been as it should be ever since a daemon looked.
pub(super) async fn look(config: &Config, sql: &Client) -> Result<Option<Broken>, Error> {
    let Some(mut kept) = Kept::read(&config.node.data_dir).map_err(io(FILE))? else {
        return Ok(None);
    };
    kept.compare(&publication::now(sql, &config.postgres.publication).await?);
    Ok(kept.broken().is_some().then(|| Broken {
        first_xid: kept.good_xid(),
    }))
}

/// Is it whole, so that what is written again gets into the stream, and what is written after that?
pub(super) async fn require(config: &Config, sql: &Client) -> Result<(), Error> {
    let name = &config.postgres.publication;
    let kept = Kept::read(&config.node.data_dir)
        .map_err(io(FILE))?
        .unwrap_or_default();
    match kept.unfit(&publication::now(sql, name).await?) {
        None => Ok(()),
        Some(why) => refused(format!(
            "publication {name}: {why}. What is written again would not be sent: run `anabranch init`, which mends it, then this \
             again (docs/errors/the-publication-was-changed.md)"
        )),
    }
}

/// From here on the publication must stay as it is; the node counts as broken until [`end`].
pub(super) async fn begin(config: &Config, sql: &Client) -> Result<(), Error> {
    let before = Kept::read(&config.node.data_dir)
        .map_err(io(FILE))?
        .unwrap_or_default();
    let now = publication::now(sql, &config.postgres.publication).await?;
    let Some(published) = &now.published else {
        return require(config, sql).await;
    };
    let kept = Kept::begin(&now, published, before.doubts().clone()).with_broken(BEGUN);
    // Killed now and run again, it begins no later.
    kept.since(before.good_xid())
        .keep(&config.node.data_dir)
        .map_err(io(FILE))
}

/// All is written again.
pub(super) fn end(config: &Config) -> Result<(), Error> {
    match Kept::read(&config.node.data_dir).map_err(io(FILE))? {
        Some(kept) => kept.healed().keep(&config.node.data_dir).map_err(io(FILE)),
        None => Ok(()),
    }
}
