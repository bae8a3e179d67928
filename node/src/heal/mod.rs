//! Heal: a node whose replication slot or journal is gone comes back with its own rows, and nothing that was acknowledged here is lost
//! unsaid.
//!
//! In:   the configuration, the journal, the database      Out: a new slot, rows written again, the record;
//!       [`Event`]s to whoever watches, and at the end a [`Report`]
//! Invariants: 1. no daemon applies anything before every row of the gap is in the new slot's stream ([`Phase::Begun`]); 2. the
//!        record names each row that was written again, brought back or deleted before that is done
//! On crash: run again, it goes on; what was written again is not written twice, unless the slot is lost once more
//! Not here: comparing and mending rows that are gone (`crate::verify`)
//!
//! Why this is sound is in `docs/design.md`, section 9. Reading order: [`healing`], [`check`], [`tail`], [`gap`], [`again`], [`absent`];
//! [`sequences`] lifts what a promotion has set back; [`refetch`] before all of that, where it is the journal that is lost; [`waits`] for whom it waits, and its end by who runs it; [`described`] rows of the journal at the server; [`state`] what is kept of it.

mod absent;
mod again;
mod check;
mod described;
mod gap;
mod healing;
mod published;
mod refetch;
mod sequences;
mod state;
mod tail;
mod waits;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anabranch_proto::Lsn;
use serde::{Deserialize, Serialize};

use crate::apply::failure::Failure;
use crate::config::Config;
use crate::journal;
use crate::source::slot;
use crate::verify::{self, Difference};
use crate::{admin, daemon, pg, setup};

use healing::Healing;
use waits::unless;

pub use sequences::Lifted;
pub use state::{Horizon, Horizons, Phase, Record, State};
pub use waits::Stop;

/// What the record says of a row that was written again.
const AGAIN: &str = "written again";
/// And of one that had been deleted and that another node has written since.
pub(crate) const CAME_BACK: &str = "deleted here unheard of, and back: another node has written it since";

/// What becomes of rows that were deleted here while nothing was decoded, and that no other node has written since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deleted {
    /// They come back here.
    BringBack,
    /// They are deleted everywhere.
    Delete,
}

/// How to heal.
#[derive(Debug, Clone)]
pub struct Options {
    /// Only say what would be done.
    pub dry_run: bool,
    /// See [`Deleted`].
    pub deleted: Deleted,
    /// Go on although rows of tables whose columns are merged were written: they are in the record, and become what the
    /// other nodes make of them.
    pub leave_merged: bool,
    /// How long the other nodes are waited for, seconds.
    pub wait_s: u32,
    /// Rows that each node reads in a second at most, for comparing; 0: no limit.
    pub rate: u64,
}

/// What happens, for whoever watches.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step begins.
    Step {
        /// In words.
        what: String,
    },
    /// Not getting on: what for.
    Waiting {
        /// In words.
        on: String,
    },
    /// Rows of the gap were found in a table; without a dry run they are written again now.
    Found {
        /// `schema.table`.
        table: String,
        /// How many.
        rows: u64,
    },
    /// What a promoted standby lacked was put back.
    PutBack {
        /// How many rows.
        rows: u64,
    },
    /// A sequence was behind what rows have, and was lifted.
    Lifted {
        /// Which.
        #[serde(flatten)]
        what: Lifted,
    },
    /// Rows were written again.
    Again {
        /// How many so far.
        rows: u64,
    },
    /// Comparing.
    Compare {
        /// See [`verify::Event`].
        what: verify::Event,
    },
    /// The end.
    Report(Report),
}

/// The result.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Nothing was changed.
    pub dry_run: bool,
    /// Nothing is left to do but what `differences` says.
    pub healed: bool,
    /// The journal was lost, and was made anew of what the other members hold, or would be.
    pub journal_made_anew: bool,
    /// Own transactions are in the journal up to here.
    pub journaled: String,
    /// Where the new slot begins; empty for a dry run.
    pub slot_at: String,
    /// `schema.table`, what was done, or would be, and to how many rows.
    pub tables: BTreeMap<String, BTreeMap<String, u64>>,
    /// Sequences that were behind what rows have, as after a promotion, and were lifted.
    pub lifted: Vec<Lifted>,
    /// Rows that differ still, by table.
    pub differences: BTreeMap<String, Vec<Difference>>,
    /// Rows of what a promoted server lacked that it refuses, by table, where no other node has them: the record has each, with the reason.
    pub refused: BTreeMap<String, u64>,
    /// Why it is not finished.
    pub problems: Vec<String>,
    /// What else is to be said.
    pub notes: Vec<String>,
    /// The file with a line for each row.
    pub record: Option<PathBuf>,
}

/// Told what happens.
pub type Watch = Arc<dyn Fn(Event) + Send + Sync>;

/// It cannot be healed, or not now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It must not.
    #[error("{0}")]
    Refused(String),
    /// Whoever runs it has ended it.
    #[error("{0}")]
    Interrupted(String),
    /// The server cannot be reached.
    #[error(transparent)]
    Connect(#[from] pg::Error),
    /// A statement failed.
    #[error("{}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// The replication connection failed.
    #[error(transparent)]
    Source(#[from] crate::source::Error),
    /// Database, folder and configuration do not belong together.
    #[error(transparent)]
    Identity(#[from] daemon::IdentityError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// Reading the journal failed.
    #[error("reading the journal: {0}")]
    Unreadable(String),
    /// The policy file.
    #[error(transparent)]
    Policy(#[from] crate::config::PolicyError),
    /// The seat cannot be taken.
    #[error(transparent)]
    Seat(#[from] crate::apply::Error),
    /// A table cannot be read.
    #[error("{0}")]
    Table(String),
    /// Set-up failed.
    #[error(transparent)]
    Setup(#[from] setup::Error),
    /// The daemon that was started for it ended.
    #[error("the daemon ended: {0}")]
    Daemon(Box<daemon::Error>),
    /// The daemon does not answer.
    #[error(transparent)]
    Admin(#[from] admin::Error),
    /// A file.
    #[error("cannot {what}: {source}")]
    Io {
        /// What for.
        what: String,
        /// Why.
        source: std::io::Error,
    },
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Unreadable(failure.to_string())
    }
}

impl From<anabranch_proto::wire::Malformed> for Error {
    fn from(error: anabranch_proto::wire::Malformed) -> Self {
        Self::Unreadable(error.to_string())
    }
}

impl From<verify::table::Error> for Error {
    fn from(error: verify::table::Error) -> Self {
        Self::Table(error.to_string())
    }
}

fn refused<T>(text: impl Into<String>) -> Result<T, Error> {
    Err(Error::Refused(text.into()))
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// Heals this node; run again, it goes on where it was. The last event is the report, also when it is not finished. Told to `stop`, it ends,
/// and what is left to do is in the error.
///
/// # Errors
/// When it must not be healed, or a step fails.
pub async fn run(config: &Config, options: &Options, watch: &Watch, stop: &Stop) -> Result<Report, Error> {
    let dir = &config.node.data_dir;
    let config = &unless(stop, dir, Box::pin(chosen(config))).await?;
    let known = State::read(dir).map_err(io("read heal.json in node.data_dir"))?;
    let socket = dir.join(admin::SOCKET);
    let asked = async { Ok::<_, Error>(admin::is_running(&socket).await) };
    let runs = unless(stop, dir, Box::pin(asked)).await?;
    let mut made_anew = None;
    if !runs && let Some(lost) = unless(stop, dir, Box::pin(refetch::look(config, watch))).await? {
        let fetched = Box::pin(refetch::run(config, options, lost, watch));
        match unless(stop, dir, fetched).await? {
            refetch::Outcome::Whole(report) => {
                watch(Event::Report(report.clone()));
                return Ok(report);
            }
            refetch::Outcome::SlotToo(text) => made_anew = Some(text),
        }
    }
    // Lost once more before all was compared: begun anew, which compares everything, too.
    let known = match known {
        Some(state) if state.phase == Phase::Written && !runs && is_lost(config).await? => None,
        known => known,
    };
    let written = known.as_ref().is_some_and(|state| state.phase == Phase::Written);
    let report = match known {
        Some(state) if written && !options.dry_run => {
            absent::finish(config, options, state, runs, (watch, stop)).await?
        }
        _ if runs => {
            return refused(
                "the daemon of this node runs, so its slot is there: there is nothing to heal (`anabranch status`)",
            );
        }
        known => {
            let begun = known.filter(|state| state.phase != Phase::Done);
            let opened = Box::pin(Healing::open(config, begun.is_some()));
            let mut healing = unless(stop, dir, opened).await?;
            if options.dry_run {
                unless(stop, dir, Box::pin(healing.dry_run(options, watch))).await?
            } else {
                let again = Box::pin(healing.again(options, begun, watch));
                let again = unless(stop, dir, again).await;
                let state = match again {
                    Err(interrupted @ Error::Interrupted(_)) => {
                        healing.call_off().await;
                        return Err(interrupted);
                    }
                    state => state?,
                };
                // The daemon takes its place.
                drop(healing);
                absent::finish(config, options, state, false, (watch, stop)).await?
            }
        }
    };
    let mut report = report;
    if let Some(text) = made_anew {
        report.journal_made_anew = true;
        report.notes.insert(0, text);
    }
    watch(Event::Report(report.clone()));
    Ok(report)
}

/// The configuration with its server chosen: all is done at that one.
async fn chosen(config: &Config) -> Result<Config, Error> {
    let known = pg::Known {
        last: pg::LastServer::read(&config.node.data_dir).map_err(io("read server.json in node.data_dir"))?,
        here: None,
    };
    let mut config = config.clone();
    config.postgres.pin = Some(pg::choose(&pg::dsn(&config.postgres)?, &known).await?);
    Ok(config)
}

/// Is the slot gone, or its WAL?
async fn is_lost(config: &Config) -> Result<bool, Error> {
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    let found = slot::find(&sql, &config.postgres.slot).await?;
    let is_gone = found.is_none_or(|slot| slot.wal_status == "lost");
    Ok(is_gone || published::look(config, &sql).await?.is_some())
}

/// The LSN of a slot, for people.
fn text_of(lsn: Option<Lsn>) -> String {
    lsn.map_or_else(String::new, |lsn| lsn.to_string())
}
