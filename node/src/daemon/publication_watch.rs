//! Notices a publication that is not as it was: dropped, made anew, with other options, or without a table.
//!
//! In:   the catalog, `publication.json`; tables that a comparison of all nodes found equal            Out: an alarm, or an error
//!       that ends the daemon; the file
//! Holds: what is known of the publication
//! Invariants: an alarm stands until the tables that it names were compared and found equal, by a comparison that began when every
//!        transaction had ended that may have written unsent; where there is a new reason for it, by one that began after that
//! On crash: the file says what was known; nothing is decoded before the first look
//! Not here: what is wrong (`crate::publication`), bringing back what was not sent (`crate::heal`, `crate::verify`)

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_postgres::Client;

use super::Error;
use crate::config::Config;
use crate::pg;
use crate::publication::{self, Faults, Kept, Now};
use crate::shared::{Shared, lock};
use crate::source;
use crate::verify::{Report, TableReport};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(2);
/// Between two writes of the file where only time has passed.
const KEEP_EVERY: Duration = Duration::from_secs(10);
const ALARM: &str = "publication";
const PAGE: &str = "docs/errors/the-publication-was-changed.md";

/// Tables that were compared and found equal at all nodes.
#[derive(Debug, Default)]
pub(super) struct Verified {
    tables: Mutex<Vec<(String, Instant)>>,
    news: Notify,
}

impl Verified {
    /// Takes in a comparison that began then.
    pub(super) fn note(&self, report: &Report, began: Instant) {
        if !report.problems.is_empty() {
            return;
        }
        let equal = report.tables.iter().filter(|table| is_equal(table));
        let names = equal.map(|table| (table.table.clone(), began));
        lock(&self.tables).extend(names);
        self.news.notify_one();
    }
}

fn is_equal(table: &TableReport) -> bool {
    table.shape.is_empty()
        && table.undecided.is_empty()
        && table.quarantined.is_empty()
        && !table.more
        && table.differences.iter().all(|row| row.mended)
}

/// How far a doubted table is that is published again.
#[derive(Debug, Clone, Copy)]
enum Settling {
    /// Transactions below this may still write unsent.
    Waits(u64),
    /// They have ended.
    Since(Instant),
}

/// What is watched.
pub(super) struct Watch {
    config: Arc<Config>,
    kept: Kept,
    /// As it is on disk, and since when.
    written: (Kept, Instant),
    settling: BTreeMap<String, Settling>,
}

/// Looks before anything is decoded.
pub(super) async fn begin(config: &Arc<Config>, sql: &Client) -> Result<Watch, Error> {
    let (dir, name) = (&config.node.data_dir, &config.postgres.publication);
    let kept = Kept::read(dir).map_err(Error::PublicationFile)?;
    let now = publication::now(sql, name).await?;
    let broken = |why: &str| Error::Publication {
        publication: name.clone(),
        why: why.to_owned(),
    };
    let kept = match (kept, &now.published) {
        (Some(kept), _) => kept,
        (None, None) => return Err(broken("does not exist")),
        (None, Some(published)) => {
            if let Some(why) = publication::unusable(published) {
                return Err(broken(&why));
            }
            Kept::begin(&now, published, BTreeMap::new())
        }
    };
    let mut watch = Watch {
        config: Arc::clone(config),
        written: (Kept::default(), Instant::now()),
        kept,
        settling: BTreeMap::new(),
    };
    watch.take(&now, &[])?;
    watch.keep()?;
    Ok(watch)
}

/// Says durably that decoding cannot go on as long as the node is not healed.
pub(super) fn mark(config: &Config, error: &Error) {
    let why = match error.for_good() {
        Some(source::Error::PublicationMissing { .. }) => {
            "did not exist at a place that was being decoded".to_owned()
        }
        Some(error) => format!("cannot be decoded at one place ({error})"),
        None => return,
    };
    if let Err(error) = Kept::mark_broken(&config.node.data_dir, &why) {
        tracing::error!(%error, "publication.json in node.data_dir cannot be written");
    }
}

impl Watch {
    /// Ends when the publication is broken. Without a connection it tries again: the stages that need one notice by themselves.
    pub(super) async fn run(mut self, shared: &Shared, verified: &Verified) -> Error {
        let mut client = None;
        loop {
            match self.look(shared, verified, &mut client).await {
                Ok(()) => {}
                Err(error @ Error::Publication { .. }) => return error,
                // What was seen is in memory, and kept with the next look: by then what it is compared with is the same.
                Err(Error::PublicationFile(error)) => {
                    let text = format!("publication.json in node.data_dir cannot be written: {error}");
                    shared.alarms.raise("publication_file", text);
                }
                Err(error) => {
                    tracing::debug!(%error, "looking at the publication");
                    client = None;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = verified.news.notified() => {}
            }
        }
    }

    async fn look(
        &mut self,
        shared: &Shared,
        verified: &Verified,
        client: &mut Option<Client>,
    ) -> Result<(), Error> {
        let session = match client {
            Some(session) => session,
            None => client.insert(pg::connect(&self.config.postgres, "publication watch").await?.0),
        };
        let now = publication::now(session, &self.config.postgres.publication).await?;
        let equal = std::mem::take(&mut *lock(&verified.tables));
        let faults = self.take(&now, &equal)?;
        if self.kept.doubts().is_empty() && faults.whole.is_empty() {
            shared.alarms.clear(ALARM);
        } else {
            shared.alarms.raise(ALARM, self.text(&faults));
        }
        let is_due = self.written.1.elapsed() >= KEEP_EVERY;
        if is_due || self.kept.differs_from(&self.written.0) {
            self.keep()?;
            shared.alarms.clear("publication_file");
        }
        Ok(())
    }

    fn keep(&mut self) -> Result<(), Error> {
        self.kept
            .keep(&self.config.node.data_dir)
            .map_err(Error::PublicationFile)?;
        self.written = (self.kept.clone(), Instant::now());
        Ok(())
    }

    /// Takes in one look; an error where the publication is broken, which is kept first.
    fn take(&mut self, now: &Now, equal: &[(String, Instant)]) -> Result<Faults, Error> {
        let faults = self.kept.compare(now);
        if let Some(why) = self.kept.broken().map(str::to_owned) {
            // It ends in any case: what is wrong with the publication is seen again at the next start.
            if let Err(error) = self.keep() {
                tracing::error!(%error, "what is wrong with the publication is not kept");
            }
            return Err(Error::Publication {
                publication: self.config.postgres.publication.clone(),
                why,
            });
        }
        let doubted: BTreeSet<String> = self.kept.doubts().keys().cloned().collect();
        let settles = |table: &String| doubted.contains(table) && !faults.doubted.contains(table);
        self.settling.retain(|table, _| settles(table));
        for table in doubted {
            if faults.tables.contains_key(&table) {
                self.settling.remove(&table);
                continue;
            }
            let state = self.settling.entry(table.clone());
            let state = state.or_insert(Settling::Waits(now.xmax));
            if let Settling::Waits(xmax) = *state
                && now.xmin >= xmax
            {
                *state = Settling::Since(Instant::now());
            }
            if let Settling::Since(since) = *state
                && equal.iter().any(|(name, began)| *name == table && *began > since)
            {
                self.kept.settle(&table);
                tracing::info!(table, "compared and found equal at all nodes");
            }
        }
        Ok(faults)
    }

    fn text(&self, faults: &Faults) -> String {
        let publication = &self.config.postgres.publication;
        let mut lines: Vec<String> = faults
            .whole
            .iter()
            .map(|what| format!("publication {publication}: {what}"))
            .collect();
        let node = &self.config.node.name;
        for (table, why) in self.kept.doubts() {
            let remedy = match (faults.tables.get(table), self.settling.get(table)) {
                (Some(remedy), _) => format!("it {remedy}; then compare it"),
                (None, Some(Settling::Since(_))) => format!(
                    "run `anabranch verify {table}`, and where it differs `anabranch repair --from {node} {table}`, which gives the \
                     other nodes the rows of this one"
                ),
                _ => "a transaction that was open then still runs: wait for it".to_owned(),
            };
            lines.push(format!("{table}: {why}; {remedy}"));
        }
        format!(
            "rows that were written here may not have been sent ({PAGE}): {}",
            lines.join(". ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publication::tests::{begun, put_in_again};

    #[test]
    fn equal_rows_end_the_alarm_although_a_column_has_another_length_somewhere() {
        let said = || vec!["column n".to_owned()];
        assert!(is_equal(&TableReport {
            types: said(),
            ..TableReport::default()
        }));
        assert!(!is_equal(&TableReport {
            shape: said(),
            ..TableReport::default()
        }));
    }

    #[test]
    fn a_comparison_that_began_before_the_table_was_away_once_more_does_not_end_the_alarm() {
        let mut watch = Watch {
            config: Arc::new(Config::example()),
            kept: begun(),
            written: (Kept::default(), Instant::now()),
            settling: BTreeMap::new(),
        };
        let is_doubted = |watch: &Watch| watch.kept.doubts().contains_key("public.item");
        let equal = |began| [("public.item".to_owned(), began)];
        let looks = |entry| Now {
            xmin: 2_000,
            xmax: 2_000,
            ..put_in_again(entry)
        };
        watch.take(&looks(5_000), &[]).unwrap();
        let began = Instant::now() + Duration::from_millis(1);
        std::thread::sleep(Duration::from_millis(2));
        // Out and in once more, with a write between: it may have been compared before that.
        watch.take(&looks(5_001), &equal(began)).unwrap();
        assert!(is_doubted(&watch));
        watch.take(&looks(5_001), &equal(began)).unwrap();
        assert!(is_doubted(&watch));
        let later = Instant::now() + Duration::from_millis(1);
        watch.take(&looks(5_001), &equal(later)).unwrap();
        assert!(!is_doubted(&watch));
    }
}
