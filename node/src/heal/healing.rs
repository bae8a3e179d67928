//! One heal from its checks to the last row that is written again: the new slot, and what it has not met.
//!
//! In:   the configuration, the journal, the database      Out: the slot, rows written again, [`State`], the record
//! Holds: the seat, so nobody else can run this node; rows of one portion
//! Invariants: 1. nothing is changed before every check has passed; 2. the state is on disk before the slot is made, and
//!        before a row is written again
//! On crash: run again, it goes on
//! Not here: rows that are gone ([`super::absent`])

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::Fold;
use anabranch_conflict::policy::Policies;
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::again::Again;
use super::gap::{Known, Scan, Table, Xids};
use super::sequences::{Behind, Lifted};
use super::state::Line;
use super::tail::Tail;
use super::{
    Error, Event, Horizon, Horizons, Options, Phase, Record, Report, State, Watch, check, gap, io, published,
    refused, waits,
};
use crate::apply::{Seat, progress};
use crate::config::Config;
use crate::journal::{Journal, RealDisk};
use crate::source::{Identity, Timelines, Walsender, slot};
use crate::verify::table;
use crate::{capture, daemon, pg, policy_change};

/// Rows of the gap that are held at once.
const ROWS_AT_ONCE: usize = 200_000;
/// More ids than are given out while a tail is put back.
const XIDS_SPARE: u64 = 1 << 24;
/// Between two looks at what slot creation waits for.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A heal that is interrupted takes no longer for what it leaves at the server.
const CALLED_OFF_WITHIN: Duration = Duration::from_secs(5);

/// Everything that is held while rows are written again: nobody else can run this node meanwhile.
pub(super) struct Healing<'a> {
    config: &'a Config,
    sql: Client,
    journal: Journal,
    _seat: Seat,
    walsender: Walsender,
    known: Known,
    horizon: Horizon,
    timelines: Timelines,
    /// Kept before anything is changed there: from then on no older one is this node's.
    server: pg::LastServer,
    policies: Policies,
    /// What the server had applied of others.
    progress: Vector,
    /// The highest stamp of all that is decoded or applied here; the last witness.
    highest: Stamp,
    witness_us: Option<i64>,
    tables: Vec<Table>,
    /// Does the server keep the times of commits?
    times: bool,
}

impl<'a> Healing<'a> {
    /// Looks at everything that must be so; changes nothing. `begun`: the slot may be there already.
    pub(super) async fn open(config: &'a Config, begun: bool) -> Result<Self, Error> {
        let file = config.policy_file()?;
        let (sql, _driver) = pg::connect(&config.postgres, "heal").await?;
        sql.batch_execute(table::SETTINGS).await?;
        let node_row = daemon::check_identity(config, &sql).await?;
        let members = daemon::read_members(config, &sql).await?;
        let file = file.policies(&config.names(&policy_change::Body::names(&members)))?;
        let policies = policy_change::force::find(config, &file, &sql, &members)
            .await
            .map_err(|error| Error::Refused(error.to_string()))?
            .policies;
        let slot = slot::find(&sql, &config.postgres.slot).await?;
        let mut walsender = Walsender::connect(&pg::dsn(&config.postgres)?, "heal").await?;
        let identity: Identity = walsender.identify().await?;
        daemon::check_server(config, &node_row, &identity)?;
        let timelines = Timelines::read(&mut walsender, &identity).await?;
        let found = daemon::server_of(&identity, &timelines);
        if let Err(error) = daemon::check_branch(config, &found) {
            return refused(error.to_string());
        }
        let options = daemon::journal_options(config);
        let opened = tokio::task::spawn_blocking(move || Journal::open(options, Arc::new(RealDisk))).await;
        let (journal, recovered) =
            opened.map_err(|_| Error::Unreadable("opening it ended unexpectedly".to_owned()))??;
        let seat = Seat::take(config).await?;
        let node = config.node.id;
        let broken = published::look(config, &sql).await?;
        let is_lost = broken.is_some() || slot.is_none_or(|slot| slot.wal_status == "lost");
        let is_well = !begun && !is_lost && timelines.holds(recovered.last.get(node));
        let (of_journal, progress, history) = (journal.clone(), seat.progress.clone(), timelines.clone());
        let known =
            tokio::task::spawn_blocking(move || Known::read(&of_journal, node, &progress, &history)).await;
        let known = known.map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))??;
        let server = (&identity, &timelines);
        let horizons = Horizons::read(&config.node.data_dir).map_err(io("read horizon.json"))?;
        let horizon = horizons.last_of(&timelines);
        // What the daemon decoded while the publication was incomplete is no horizon.
        let first_xid = broken.and_then(|broken| broken.first_xid);
        let horizon = horizon.map(|horizon| Horizon {
            xid: first_xid
                .into_iter()
                .chain([horizon.xid])
                .min()
                .unwrap_or(horizon.xid),
            ..horizon
        });
        if let Some(horizon) = horizon {
            check::server(config, &sql, server, (&known, horizon), &seat.progress).await?;
        }
        if is_well {
            return refused(format!(
                "replication slot {} is there and has its WAL: there is nothing to heal; start the daemon",
                config.postgres.slot
            ));
        }
        let Some(horizon) = horizon else {
            let why = if horizons.is_empty() {
                "there is no horizon.json in node.data_dir: the daemon that ran here did not write down which transactions it had \
                 decoded"
            } else {
                "the server was promoted, or restored, at a place before all that horizon.json in node.data_dir knows of"
            };
            return refused(format!(
                "{why}, so rows written since cannot be told; see docs/errors/when-a-node-is-lost.md"
            ));
        };
        published::require(config, &sql).await?;
        let tables = gap::tables(&sql, &config.postgres.publication, node, &policies).await?;
        let setting = sql
            .query_one("SELECT current_setting('track_commit_timestamp') = 'on'", &[])
            .await?;
        let (highest, witness_us) = clocks(&sql, node, &known).await?;
        Ok(Self {
            config,
            policies,
            progress: seat.progress.clone(),
            timelines,
            server: found,
            times: setting.try_get(0)?,
            sql,
            journal,
            _seat: seat,
            walsender,
            known,
            horizon,
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

    pub(super) async fn dry_run(&mut self, options: &Options, watch: &Watch) -> Result<Report, Error> {
        watch(Event::Step {
            what: "looking for rows written since the slot was lost".to_owned(),
        });
        let lacked = self.lacked();
        if lacked.is_some() {
            // What it lacks is nobody's write since.
            self.known
                .forget_what_is_lacked(&self.progress, self.config.node.id);
        }
        let counts = self.count(self.until_now().await?, false, watch).await?;
        let mut report = Report {
            dry_run: true,
            notes: lacked
                .map(|lacked| format!("{lacked}: they would be put back"))
                .into_iter()
                .collect(),
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
    pub(super) async fn again(
        &mut self,
        options: &Options,
        begun: Option<State>,
        watch: &Watch,
    ) -> Result<State, Error> {
        let dir = self.config.node.data_dir.clone();
        let is_put_back = match &begun {
            // It came before the slot.
            Some(state) => self.slot_of(state).await?,
            None => false,
        };
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
        self.server.keep(&dir).map_err(io("write server.json"))?;
        let again = Again::open(self.config).await?;
        let mut state = match begun {
            Some(mut state) => {
                // Promoted once more meanwhile.
                state.first_xid = state.first_xid.min(self.horizon.xid);
                state
            }
            None => {
                let mut state = State::begin(self.horizon.xid);
                state.first_witness = Some(again.first_witness().await?);
                state.keep(&dir).map_err(io("write heal.json"))?;
                state
            }
        };
        if !is_put_back {
            state.timeline = self.timelines.current();
            if let Some(lacked) = self.lacked() {
                self.put_back(&mut state, lacked, options, watch).await?;
            }
        }
        self.lift_sequences(&again, &mut state, watch).await?;
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
        published::end(self.config)?;
        state.phase = Phase::Written;
        state.keep(&dir).map_err(io("write heal.json"))?;
        self.journal.close().await?;
        Ok(state)
    }

    /// What the server lacks of the own stream, for people; none when it has all.
    fn lacked(&self) -> Option<String> {
        let (first, count) = self.known.lacks?;
        let left = daemon::left_at(self.timelines.left(first.epoch));
        let last = self.known.last.as_ref().map(|header| header.position.to_string());
        Some(format!(
            "in this server's history timeline {} was {left}; the journal holds {count} transactions of this node's behind that, \
             up to {}",
            first.epoch,
            last.unwrap_or_default()
        ))
    }

    /// Puts back what the server lacks.
    async fn put_back(
        &mut self,
        state: &mut State,
        lacked: String,
        options: &Options,
        watch: &Watch,
    ) -> Result<(), Error> {
        watch(Event::Step {
            what: format!("{lacked}: putting them back"),
        });
        let first = state.first_xid;
        let end = check::next_xid(&self.sql).await?;
        let tail = Tail {
            config: self.config,
            policies: &self.policies,
            journal: &self.journal,
            known: &self.known,
            progress: &self.progress,
            xids: Xids {
                first,
                // Whoever writes until the tables are locked is among them.
                count: end.saturating_sub(first).saturating_add(XIDS_SPARE),
            },
            leave_merged: options.leave_merged,
        };
        let mut record = state.record(&self.config.node.data_dir);
        // A session of its own, since it has other settings.
        let (client, _driver) = pg::connect(&self.config.postgres, "heal").await?;
        let done = tail.put_back(&client, &mut record, watch).await?;
        watch(Event::PutBack { rows: done.rows });
        lifted(state, done.lifted, watch);
        state.lacked = Some(lacked);
        state
            .keep(&self.config.node.data_dir)
            .map_err(io("write heal.json"))?;
        let publication = &self.config.postgres.publication;
        self.tables = gap::tables(&self.sql, publication, self.config.node.id, &self.policies).await?;
        self.highest = clocks(&self.sql, self.config.node.id, &self.known).await?.0;
        Ok(())
    }

    /// Sequences that are behind the rows that are there: whoever was killed in between had not, and a server may lack of its
    /// sequences what it has of its rows.
    async fn lift_sequences(&self, again: &Again, state: &mut State, watch: &Watch) -> Result<(), Error> {
        let mut behind = Behind::read(again.client(), self.config).await?;
        lifted(state, behind.lift(again.client()).await?, watch);
        if state.lacked.is_some() {
            state.sequences = behind.doubts();
        }
        state
            .keep(&self.config.node.data_dir)
            .map_err(io("write heal.json"))
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
        published::begin(config, &self.sql).await?;
        self.drop_slot(watch).await?;
        let made = self
            .walsender
            .create_slot(&config.postgres.slot, slot::Snapshot::Nothing);
        tokio::pin!(made);
        let made = loop {
            tokio::select! {
                made = &mut made => break made?,
                () = tokio::time::sleep(LOOK_EVERY) => {
                    let on = waits::writers(&self.sql).await?;
                    watch(Event::Waiting { on });
                }
            }
        };
        let at = made.consistent_point;
        let mut fold = Fold::joined(config.node.id, self.known.upto.clone(), self.highest.time);
        if let Some(witness) = self.witness_us {
            fold.witness(witness);
        }
        let place = Position {
            epoch: self.timelines.current(),
            lsn: at,
        };
        capture::write_checkpoint(dir, place, &fold).map_err(io("write the checkpoint"))?;
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

    /// A slot that is being made has nobody left who wants it. What was done by now is gone on with.
    pub(super) async fn call_off(&self) {
        let slot = &self.config.postgres.slot;
        let ended = Box::pin(waits::end_making(&self.sql, slot));
        // The next heal does it, too.
        let _ = tokio::time::timeout(CALLED_OFF_WITHIN, ended).await;
    }

    /// An earlier heal that was killed may still be making it, in a backend that waits and does not notice: that is ended. Another
    /// that reads the slot is waited for.
    async fn drop_slot(&self, watch: &Watch) -> Result<(), Error> {
        let in_use = |error: &crate::source::Error| match error {
            crate::source::Error::Catalog { source, .. } => source.code() == Some(&SqlState::OBJECT_IN_USE),
            _ => false,
        };
        loop {
            match slot::drop_if_exists(&self.sql, &self.config.postgres.slot).await {
                Ok(()) => return Ok(()),
                Err(error) if in_use(&error) => {
                    // Where it may not be ended, it ends with those whom it waits for.
                    let _ = waits::end_making(&self.sql, &self.config.postgres.slot).await;
                    let writers = waits::writers(&self.sql).await?;
                    let on = format!("{}; {writers}", crate::error::chain(&error));
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
        let (mut held, mut files) = (Vec::new(), Vec::new());
        for (at, table) in self.tables.iter().enumerate() {
            let mut rows = 0;
            let portions = scan.begin(table).await?;
            files.push((table, scan.file_of(table).await?));
            for pages in portions {
                let found = scan.portion(at, table, pages).await?;
                rows += found.len() as u64;
                if table.is_merged {
                    let mut lines = Vec::new();
                    let places: Vec<String> = found.iter().map(gap::Place::ctid).collect();
                    for row in self.sql.query(&table.compared.json_sql(), &[&places]).await? {
                        let line = Line::of("left: columns are merged", &table.name());
                        lines.push(line.with_json("row", row.try_get(0)?));
                    }
                    record.add(&lines).map_err(io("write the record"))?;
                    continue;
                }
                held.extend(found);
                if held.len() >= ROWS_AT_ONCE {
                    let some = std::mem::take(&mut held);
                    state.rows += self.write_some(again, some, &files, (&mut record, watch)).await?;
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
        state.rows += self.write_some(again, held, &files, (&mut record, watch)).await?;
        watch(Event::Again { rows: state.rows });
        record.sync().map_err(io("write the record"))
    }

    /// Writes a portion again; how many rows. Who is not found at its place any more has been written since, as long as nobody has moved
    /// the rows of a table: `files` are those that these were found in.
    async fn write_some(
        &self,
        again: &Again,
        rows: Vec<gap::Place>,
        files: &[(&Table, Option<u32>)],
        (record, watch): (&mut Record, &Watch),
    ) -> Result<u64, Error> {
        let wanted = rows.len() as u64;
        let written = again.write(&self.tables, rows, record, watch).await?;
        if written < wanted {
            let scan = self.scan(Xids { first: 0, count: 0 });
            for (table, file) in files {
                if scan.file_of(table).await? != *file {
                    return refused(format!(
                        "table {} was rewritten meanwhile (VACUUM FULL, CLUSTER), so that rows of it were not found: run this again",
                        table.name()
                    ));
                }
            }
        }
        Ok(written)
    }
}

fn lifted(state: &mut State, lifted: Vec<Lifted>, watch: &Watch) {
    for each in lifted {
        watch(Event::Lifted { what: each.clone() });
        state.lifted.retain(|said| said.sequence != each.sequence);
        state.lifted.push(each);
    }
}

/// The highest stamp of what is decoded and applied here, and the last witness.
async fn clocks(sql: &Client, node: NodeId, known: &Known) -> Result<(Stamp, Option<i64>), Error> {
    let last = known.last.as_ref();
    let (_, applied) = progress::read(sql, node).await?;
    let decoded = last.map_or(Stamp::ZERO, |header| header.stamp);
    let highest = if applied.time > decoded.time {
        applied
    } else {
        decoded
    };
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
