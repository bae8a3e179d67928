//! Heal: a node whose replication slot is gone comes back with its own rows, and nothing that was acknowledged here is lost
//! unsaid.
//!
//! In:   the configuration, the journal, the database      Out: a new slot, rows written again, the record;
//!       [`Event`]s to whoever watches, and at the end a [`Report`]
//! Holds: rows of one portion
//! Invariants: 1. no daemon applies anything before every row of the gap is in the new slot's stream ([`Phase::Begun`]); 2. the
//!        record names each row that was written again, brought back or deleted before that is done
//! On crash: run again, it goes on; what was written again is not written twice, unless the slot is lost once more
//! Not here: comparing and mending rows that are gone (`crate::verify`)
//!
//! Why this is sound is in `docs/design.md`, section 9. Reading order: [`check`], [`gap`], [`again`], [`absent`]; [`state`] what
//! is kept of it.

mod absent;
mod again;
mod check;
mod gap;
mod state;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::Fold;
use anabranch_proto::stamp::STAMP_LEN;
use anabranch_proto::{Lsn, NodeId, Stamp, Vector};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::apply::Seat;
use crate::apply::failure::Failure;
use crate::config::Config;
use crate::journal::{self, Journal, RealDisk};
use crate::source::{Identity, Walsender, slot};
use crate::verify::{self, Difference};
use crate::{admin, capture, daemon, pg, setup};

use again::Again;
use gap::{Known, Scan, Table, Xids};

pub use state::{Horizon, Phase, Record, State};

/// What the record says of a row that was written again.
const AGAIN: &str = "written again";
/// And of one that had been deleted and that another node has written since.
pub(crate) const CAME_BACK: &str = "deleted here unheard of, and back: another node has written it since";
/// Rows of the gap that are held at once.
const ROWS_AT_ONCE: usize = 200_000;
/// Between two looks at what slot creation waits for.
const LOOK_EVERY: Duration = Duration::from_secs(2);

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
    /// Own transactions are in the journal up to here.
    pub journaled: String,
    /// Where the new slot begins; empty for a dry run.
    pub slot_at: String,
    /// `schema.table`, what was done, or would be, and to how many rows.
    pub tables: BTreeMap<String, BTreeMap<String, u64>>,
    /// Rows that differ still, by table.
    pub differences: BTreeMap<String, Vec<Difference>>,
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

/// Heals this node; run again, it goes on where it was. The last event is the report, also when it is not finished.
///
/// # Errors
/// When it must not be healed, or a step fails.
pub async fn run(config: &Config, options: &Options, watch: &Watch) -> Result<Report, Error> {
    let dir = &config.node.data_dir;
    let known = State::read(dir).map_err(io("read heal.json in node.data_dir"))?;
    let runs = admin::status(&dir.join(admin::SOCKET)).await.is_ok();
    // Lost once more before all was compared: begun anew, which compares everything, too.
    let known = match known {
        Some(state) if state.phase == Phase::Written && !runs && is_lost(config).await? => None,
        known => known,
    };
    let written = known.as_ref().is_some_and(|state| state.phase == Phase::Written);
    let report = match known {
        Some(state) if written && !options.dry_run => {
            absent::finish(config, options, state, runs, watch).await?
        }
        _ if runs => {
            return refused(
                "the daemon of this node runs, so its slot is there: there is nothing to heal (`anabranch status`)",
            );
        }
        known => {
            let begun = known.filter(|state| state.phase != Phase::Done);
            let mut healing = Box::pin(Healing::open(config, begun.is_some())).await?;
            if options.dry_run {
                healing.dry_run(options, watch).await?
            } else {
                let state = Box::pin(healing.again(options, begun, watch)).await?;
                // The daemon takes its place.
                drop(healing);
                absent::finish(config, options, state, false, watch).await?
            }
        }
    };
    watch(Event::Report(report.clone()));
    Ok(report)
}

/// Is the slot gone, or its WAL?
async fn is_lost(config: &Config) -> Result<bool, Error> {
    let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
    let found = slot::find(&sql, &config.postgres.slot).await?;
    Ok(found.is_none_or(|slot| slot.wal_status == "lost"))
}

/// Everything that is held while rows are written again: nobody else can run this node meanwhile.
struct Healing<'a> {
    config: &'a Config,
    sql: Client,
    journal: Journal,
    _seat: Seat,
    walsender: Walsender,
    known: Known,
    horizon: Horizon,
    /// Everything decoded or applied here; the highest stamp in it; the last witness.
    vector: Vector,
    highest: Stamp,
    witness_us: Option<i64>,
    tables: Vec<Table>,
    /// Does the server keep the times of commits?
    times: bool,
}

impl<'a> Healing<'a> {
    /// Looks at everything that must be so; changes nothing. `begun`: the slot may be there already.
    async fn open(config: &'a Config, begun: bool) -> Result<Self, Error> {
        let policies = config.policies()?;
        let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
        sql.batch_execute(verify::table::SETTINGS).await?;
        let node_row = daemon::check_identity(config, &sql).await?;
        daemon::read_members(config, &sql).await?;
        if !begun {
            let found = slot::find(&sql, &config.postgres.slot).await?;
            if found.is_some_and(|slot| slot.wal_status != "lost") {
                return refused(format!(
                    "replication slot {} is there and has its WAL: there is nothing to heal; start the daemon",
                    config.postgres.slot
                ));
            }
        }
        let options = daemon::journal_options(config);
        let opened = tokio::task::spawn_blocking(move || Journal::open(options, Arc::new(RealDisk))).await;
        let (journal, recovered) =
            opened.map_err(|_| Error::Unreadable("opening it ended unexpectedly".to_owned()))??;
        let seat = Seat::take(config).await?;
        let Some(horizon) = Horizon::read(&config.node.data_dir).map_err(io("read horizon.json"))? else {
            return refused(
                "there is no horizon.json in node.data_dir: the daemon that ran here did not write down which transactions it \
                 had decoded, so rows written since cannot be told; see docs/errors/when-a-node-is-lost.md",
            );
        };
        let node = config.node.id;
        let mut vector = seat.progress.clone();
        vector.raise(node, recovered.last.get(node));
        let (of_journal, upto) = (journal.clone(), vector.clone());
        let known = tokio::task::spawn_blocking(move || Known::read(&of_journal, node, &upto)).await;
        let known = known.map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))??;
        let mut walsender = Walsender::connect(&pg::dsn(&config.postgres)?, "heal").await?;
        let identity: Identity = walsender.identify().await?;
        daemon::check_server(config, &node_row, &identity)?;
        let server = (&mut walsender, &identity);
        check::server(config, &sql, server, (&known, horizon), &seat.progress).await?;
        let tables = gap::tables(&sql, &config.postgres.publication, node, &policies).await?;
        let setting = sql
            .query_one("SELECT current_setting('track_commit_timestamp') = 'on'", &[])
            .await?;
        let (highest, witness_us) = clocks(&sql, node, &known).await?;
        Ok(Self {
            config,
            times: setting.try_get(0)?,
            sql,
            journal,
            _seat: seat,
            walsender,
            known,
            horizon,
            vector,
            highest,
            witness_us,
            tables,
        })
    }

    fn report(&self) -> Report {
        let last = self.known.last.as_ref();
        Report {
            journaled: last.map_or_else(String::new, |header| header.position.to_string()),
            ..Report::default()
        }
    }

    fn scan(&self, xids: Xids) -> Scan<'_> {
        Scan {
            sql: &self.sql,
            journal: &self.journal,
            known: &self.known,
            xids,
            times: self.times,
        }
    }

    /// Rows of the gap as it is now, by table.
    async fn count(
        &self,
        xids: Xids,
        merged_only: bool,
        watch: &Watch,
    ) -> Result<BTreeMap<String, u64>, Error> {
        let scan = self.scan(xids);
        let mut counts = BTreeMap::new();
        for (at, table) in self.tables.iter().enumerate() {
            if merged_only && !table.is_merged {
                continue;
            }
            let mut rows = 0;
            for pages in scan.begin(table).await? {
                rows += scan.portion(at, table, pages).await?.len() as u64;
            }
            scan.end().await?;
            if rows > 0 {
                let table = table.name();
                watch(Event::Found {
                    table: table.clone(),
                    rows,
                });
                counts.insert(table, rows);
            }
        }
        Ok(counts)
    }

    async fn until_now(&self) -> Result<Xids, Error> {
        let first = self.horizon.xid;
        let end = check::next_xid(&self.sql).await?;
        Ok(Xids {
            first,
            count: end.saturating_sub(first),
        })
    }

    async fn dry_run(&mut self, options: &Options, watch: &Watch) -> Result<Report, Error> {
        watch(Event::Step {
            what: "looking for rows written since the slot was lost".to_owned(),
        });
        let counts = self.count(self.until_now().await?, false, watch).await?;
        let mut report = Report {
            dry_run: true,
            ..self.report()
        };
        for (table, rows) in counts {
            let merged = self.tables.iter().any(|of| of.is_merged && of.name() == table);
            let what = match (merged, options.leave_merged) {
                (false, _) => "would be written again",
                (true, true) => "would be left: its columns are merged",
                (true, false) => "stands in the way: its columns are merged",
            };
            report.tables.insert(table, [(what.to_owned(), rows)].into());
        }
        Ok(report)
    }

    /// Makes the slot, and writes again what it has not met.
    async fn again(
        &mut self,
        options: &Options,
        begun: Option<State>,
        watch: &Watch,
    ) -> Result<State, Error> {
        let dir = self.config.node.data_dir.clone();
        if begun.is_none() && !options.leave_merged {
            let counts = self.count(self.until_now().await?, true, watch).await?;
            if let Some((table, rows)) = counts.first_key_value() {
                return refused(format!(
                    "{rows} rows of {table}, whose columns are merged, may have been written since the slot was lost: what was \
                     added to them here cannot be told from what the others had added. `--leave-merged` writes them into the \
                     record as they are here, and they become what the other nodes make of them: add what is missing by hand"
                ));
            }
        }
        let again = Again::open(self.config).await?;
        let mut state = match begun {
            Some(state) => state,
            None => {
                let mut state = State::begin(self.horizon.xid);
                state.first_witness = Some(again.first_witness().await?);
                state.keep(&dir).map_err(io("write heal.json"))?;
                state
            }
        };
        let end = match (self.slot_of(&state).await?, state.end_xid) {
            (true, Some(end)) => end,
            _ => self.make_slot(&mut state, watch).await?,
        };
        let xids = Xids {
            first: state.first_xid,
            count: end.saturating_sub(state.first_xid),
        };
        self.write_again(&again, &mut state, xids, watch).await?;
        state.told_at = Some(again.end(state.first_witness.unwrap_or(0)).await?);
        state.phase = Phase::Written;
        state.keep(&dir).map_err(io("write heal.json"))?;
        self.journal.close().await?;
        Ok(state)
    }

    /// Is the slot there that was made for this heal, and unread?
    async fn slot_of(&self, state: &State) -> Result<bool, Error> {
        let found = slot::find(&self.sql, &self.config.postgres.slot).await?;
        Ok(
            found
                .is_some_and(|slot| slot.wal_status != "lost" && Some(slot.confirmed_flush) == state.slot_at),
        )
    }

    /// Makes the slot and the checkpoint that decoding begins from; the xid at which its stream begins, or a little
    /// later.
    async fn make_slot(&mut self, state: &mut State, watch: &Watch) -> Result<u64, Error> {
        let (config, dir) = (self.config, &self.config.node.data_dir);
        watch(Event::Step {
            what: format!("making replication slot {}", config.postgres.slot),
        });
        self.drop_slot(watch).await?;
        let made = self
            .walsender
            .create_slot(&config.postgres.slot, slot::Snapshot::Nothing);
        tokio::pin!(made);
        let made = loop {
            tokio::select! {
                made = &mut made => break made?,
                () = tokio::time::sleep(LOOK_EVERY) => {
                    let on = setup::execute::writers(&self.sql).await?;
                    watch(Event::Waiting { on: on.join("; ") });
                }
            }
        };
        let at = made.consistent_point;
        let mut fold = Fold::joined(config.node.id, self.vector.clone(), self.highest.time);
        if let Some(witness) = self.witness_us {
            fold.witness(witness);
        }
        capture::write_checkpoint(dir, at, &fold).map_err(io("write the checkpoint"))?;
        let end = check::next_xid(&self.sql).await?;
        state.slot_at = Some(at);
        state.end_xid = Some(end);
        state.keep(dir).map_err(io("write heal.json"))?;
        let last = self.known.last.as_ref();
        let mut record = state.record(dir);
        record
            .add(&[json!({
                "did": "slot made", "slot": config.postgres.slot, "at": at,
                "journaled": last.map(|header| header.position.to_string()),
                "first_xid": state.first_xid, "end_xid": end, "times_known": self.times,
            })])
            .map_err(io("write the record"))?;
        Ok(end)
    }

    /// An earlier heal that was killed may still be making it, in a backend that waits and does not notice.
    async fn drop_slot(&self, watch: &Watch) -> Result<(), Error> {
        let in_use = |error: &crate::source::Error| match error {
            crate::source::Error::Catalog { source, .. } => source.code() == Some(&SqlState::OBJECT_IN_USE),
            _ => false,
        };
        loop {
            match slot::drop_if_exists(&self.sql, &self.config.postgres.slot).await {
                Ok(()) => return Ok(()),
                Err(error) if in_use(&error) => {
                    let on = setup::execute::writers(&self.sql).await?;
                    let on = format!("{}; {}", crate::error::chain(&error), on.join("; "));
                    watch(Event::Waiting { on });
                }
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn write_again(
        &self,
        again: &Again,
        state: &mut State,
        xids: Xids,
        watch: &Watch,
    ) -> Result<(), Error> {
        let dir = &self.config.node.data_dir;
        watch(Event::Step {
            what: "writing again what was written since the slot was lost".to_owned(),
        });
        let mut record = state.record(dir);
        let scan = self.scan(xids);
        let mut held = Vec::new();
        for (at, table) in self.tables.iter().enumerate() {
            let mut rows = 0;
            for pages in scan.begin(table).await? {
                let found = scan.portion(at, table, pages).await?;
                rows += found.len() as u64;
                if table.is_merged {
                    let mut lines = Vec::new();
                    let places: Vec<String> = found.iter().map(gap::Place::ctid).collect();
                    for row in self.sql.query(&table.compared.json_sql(), &[&places]).await? {
                        let row: String = row.try_get(0)?;
                        let row: serde_json::Value = serde_json::from_str(&row).unwrap_or_default();
                        lines.push(
                            json!({ "did": "left: columns are merged", "table": table.name(), "row": row }),
                        );
                    }
                    record.add(&lines).map_err(io("write the record"))?;
                    continue;
                }
                held.extend(found);
                if held.len() >= ROWS_AT_ONCE {
                    let counts = again
                        .write(&self.tables, std::mem::take(&mut held), &mut record)
                        .await?;
                    state.rows += counts.values().sum::<u64>();
                    watch(Event::Again { rows: state.rows });
                }
            }
            scan.end().await?;
            if rows > 0 {
                watch(Event::Found {
                    table: table.name(),
                    rows,
                });
            }
        }
        let counts = again.write(&self.tables, held, &mut record).await?;
        state.rows += counts.values().sum::<u64>();
        watch(Event::Again { rows: state.rows });
        record.sync().map_err(io("write the record"))
    }
}

/// The highest stamp of what is decoded and applied here, and the last witness.
async fn clocks(sql: &Client, node: NodeId, known: &Known) -> Result<(Stamp, Option<i64>), Error> {
    let last = known.last.as_ref();
    let mut highest = last.map_or(Stamp::ZERO, |header| header.stamp);
    for row in sql.query("SELECT stamp FROM anabranch.progress", &[]).await? {
        if let Ok(bytes) = <[u8; STAMP_LEN]>::try_from(row.try_get::<_, Vec<u8>>(0)?) {
            let stamp = Stamp::from_bytes(bytes);
            if stamp.time > highest.time {
                highest = stamp;
            }
        }
    }
    let row = sql
        .query_opt(
            "SELECT witness_us FROM anabranch.clock WHERE node_id = $1 AND witness_us > 0",
            &[&i32::from(node.0)],
        )
        .await?;
    let written = row.map(|row| row.try_get(0)).transpose()?;
    let decoded = last.map(|header| header.witness_us).filter(|&us| us != 0);
    Ok((highest, written.or(decoded)))
}

/// The LSN of a slot, for people.
fn text_of(lsn: Option<Lsn>) -> String {
    lsn.map_or_else(String::new, |lsn| lsn.to_string())
}
