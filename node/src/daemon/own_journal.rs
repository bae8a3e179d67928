//! This node's journal: where it is, opening it, closing it.
//!
//! In:   configuration            Out: the journal, and what was recovered of it
//! Must never: take a folder that another daemon holds; that of an earlier life of this one is waited for
//! Not here: the journal itself (`crate::journal`), what it may let go (`trim`)

use std::sync::Arc;
use std::time::Duration;

use super::Error;
use crate::config::Config;
use crate::journal::{self, Journal, RealDisk};

/// What a power cut may take of our own transactions from the journal and leave to the peers: they are decoded again.
const SYNC_WITHIN: Duration = Duration::from_millis(20);

/// Where this node's journal is.
pub(crate) fn journal_options(config: &Config) -> journal::Options {
    journal::Options {
        dir: config.node.data_dir.join("journal"),
        segment_bytes: config.journal.segment_mib << 20,
        max_bytes: config.journal.max_size_mib << 20,
        sync_within: SYNC_WITHIN,
        node: config.node.id,
        cluster: config.cluster.id.clone(),
    }
}

/// Opens it, or makes it.
pub(super) async fn open_journal(config: &Arc<Config>) -> Result<(Journal, journal::Recovered), Error> {
    let options = journal_options(config);
    // The writer of an earlier life may take a moment to let go of the folder.
    let mut attempt = 0;
    loop {
        let options = options.clone();
        let opened = tokio::task::spawn_blocking(move || Journal::open(options, Arc::new(RealDisk))).await;
        match opened {
            Ok(Err(journal::Error::Locked { .. })) if attempt < 20 => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(opened) => return Ok(opened?),
            Err(_) => return Err(Error::Ended("opening the journal")),
        }
    }
}

/// Waits until what was framed last is on the disk, but not for a disk that hangs. An error was told when it happened.
pub(super) async fn close_journal(journal: &Journal) {
    let _ = tokio::time::timeout(Duration::from_secs(5), journal.close()).await;
}
