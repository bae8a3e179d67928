//! After the copy: the donor's journal, Anabranch's own tables, the slot, and the checkpoint that decoding begins from.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anabranch_conflict::Fold;
use anabranch_proto::txn::{FrameReader, Record, TableCache};
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::state::{State, done, is_done};
use super::waiting::{Patience, connect_donor};
use super::{Error, Event, Options, Report, Source, connect_admin, copy, say, sql};
use crate::config::Config;
use crate::donor::{CUT_VOID, Cut};
use crate::journal::{self, Journal, RealDisk};
use crate::link::{Identity, JoinError, Joining, SeedWaits};
use crate::setup::ids;
use crate::setup::pattern::Patterns;
use crate::setup::sequence::{self, Depth};
use crate::setup::sql::{ident, literal};
use crate::setup::{self, Facts, Plan};

/// How long the donor's own stream may take to pass the cut: its heartbeat comes every second.
const PASS_PATIENCE: Duration = Duration::from_secs(120);

/// The step that copies the donor's rows of our own tables.
const OWN_TABLES: &str = "own tables";

/// What all of it needs.
pub(super) struct Whole<'a> {
    pub(super) config: &'a Config,
    pub(super) options: &'a Options,
    pub(super) state: &'a State,
    pub(super) identity: &'a Identity,
    /// What the donor calls all that ever were members.
    pub(super) names: &'a BTreeMap<String, u16>,
    pub(super) report: &'a Report,
}

impl Whole<'_> {
    /// Brings the journal to where the donor's is, of a donor that stands by the cut: its daemon may be another one than has made it.
    async fn seed(
        &self,
        donor: &mut Joining,
        journal: &Journal,
        cut: &Cut,
        waits: &(dyn Fn(SeedWaits) + Send + Sync),
    ) -> Result<(Vector, (Vector, Stamp)), JoinError> {
        match donor.hold(cut).await {
            // Whether it holds the snapshot makes no difference to what it tells.
            Ok(_) => {}
            Err(refused @ JoinError::Refused(_)) if refused.refusal_code() != Some(CUT_VOID) => {}
            Err(failed) => return Err(failed),
        }
        donor.seed(journal, cut.lsn, waits).await
    }

    /// Takes over the donor's journal. Gives its last transaction before the cut, and what is settled of it.
    async fn take_over(
        &self,
        cut: &Cut,
        node: NodeId,
        donor: &mut Joining,
        patience: &mut Patience<'_>,
    ) -> Result<(Option<(Position, Stamp)>, (Vector, Stamp)), Error> {
        say(self.report, "take over the donor's journal");
        let journal = open_journal(self.config).await?;
        let at = Position {
            epoch: cut.epoch,
            lsn: cut.lsn,
        };
        let began = tokio::time::Instant::now();
        let waits = |on: SeedWaits| {
            let on = match on {
                SeedWaits::Room(on) => {
                    format!(
                        "{on} (another limit holds from the next run of the join on, which goes on from here)"
                    )
                }
                SeedWaits::Donor => format!(
                    "donor `{}` to have in its journal what was committed there before the cut. If that is full (`anabranch status` there), it \
                     waits for a member that is away: bring that back, or drop it",
                    self.options.donor.name
                ),
            };
            (self.report)(Event::Waiting { on });
        };
        let (own, settled) = loop {
            match self.seed(donor, &journal, cut, &waits).await {
                Ok((held, settled)) if held.get(node) >= at => {
                    break (last_before(&journal, node, at)?, settled);
                }
                Ok(_) if began.elapsed() < PASS_PATIENCE => {
                    patience.answered();
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                Ok(_) => {
                    return Err(Error::Refused(format!(
                        "the donor's stream has not passed the cut at {at}: is its daemon running, and does no commit there wait for a \
                         synchronous standby that is away?"
                    )));
                }
                Err(error) => {
                    patience.wait(error.into()).await?;
                    let again = super::connect(self.config, self.options, self.identity, patience).await?;
                    *donor = again.instead_of(donor);
                }
            }
        };
        journal.close().await?;
        Ok((own, settled))
    }

    pub(super) async fn finish(
        &self,
        cut: &Cut,
        from: &Source,
        donor: &mut Joining,
        patience: &mut Patience<'_>,
    ) -> Result<(), Error> {
        let (config, options) = (self.config, self.options);
        let (own, settled) = self.take_over(cut, from.node, donor, patience).await?;
        let Some((own, stamp)) = own else {
            return Err(Error::Refused(
            "the donor's journal holds nothing of its own before the cut: abandon this join and begin anew"
                .to_owned(),
        ));
        };
        let mut vector = from.applied.clone();
        vector.raise(from.node, own);
        let highest = progress(&from.client, from.node).await?.1.max(stamp);

        say(self.report, "set the node up");
        self.set_up(from, (own, stamp)).await?;
        let admin = connect_admin(&options.admin_dsn, "join").await?;
        late_lines(options, &admin).await?;
        let row = admin
            .query_one(
                "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1",
                &[&config.postgres.slot],
            )
            .await
            .map_err(sql("read where the slot begins"))?;
        let start: i64 = row.try_get(0).map_err(sql("read where the slot begins"))?;
        let fold = Fold::joined(config.node.id, vector, highest.time);
        crate::daemon::keep_settled(&config.node.data_dir, &settled.0, settled.1)
            .map_err(super::io("write down what is settled"))?;
        crate::capture::write_checkpoint(
            &config.node.data_dir,
            // Of whatever timeline the server is on: nobody was promoted while it was copied.
            Position::new(0, u64::try_from(start).unwrap_or(0)),
            &fold,
        )
        .map_err(super::io("write the checkpoint"))?;
        super::state::say_copied(&admin).await
    }

    /// Anabranch's schema, with what the donor's says of members, positions, quarantine and conflicts; the slot last.
    async fn set_up(&self, from: &Source, own: (Position, Stamp)) -> Result<(), Error> {
        let (config, options, report) = (self.config, self.options, self.report);
        let mut admin = connect_admin(&options.admin_dsn, "join").await?;
        // The tables first, by themselves: who is a member must be known before the rest is planned.
        if !is_done(&admin, OWN_TABLES).await? {
            let are_made = facts(config, options, &mut admin).await?.ours.node.is_some();
            let mut objects = self.plan(&mut admin).await?;
            // The first stage makes them, in one transaction; where an earlier run did, it says who founded a cluster.
            objects.stages.truncate(usize::from(!are_made));
            execute(&mut admin, options, &objects, report).await?;
            own_rows(&mut admin, config, self.state, from, own).await?;
        }
        let plan = self.plan(&mut admin).await?;
        execute(&mut admin, options, &plan, report).await?;
        sequences(config, options, &mut admin, report).await
    }

    async fn plan(&self, admin: &mut Client) -> Result<Plan, Error> {
        let mut facts = facts(self.config, self.options, admin).await?;
        // Its own table of members is empty until the donor's rows are in it.
        facts.ours.names.extend(self.names.clone());
        let plan = setup::plan_joined(&facts, self.config).map_err(setup::Error::from)?;
        if plan.is_allowed() {
            return Ok(plan);
        }
        let failed: Vec<String> = plan
            .findings
            .iter()
            .filter(|finding| finding.level == setup::Level::Fail)
            .map(|finding| format!("{}: {}: {}", finding.check, finding.found, finding.remedy))
            .collect();
        Err(Error::Refused(failed.join("\n")))
    }
}

async fn open_journal(config: &Config) -> Result<Journal, Error> {
    let options = crate::daemon::journal_options(config);
    let opened = tokio::task::spawn_blocking(move || Journal::open(options, Arc::new(RealDisk))).await;
    match opened {
        Ok(opened) => Ok(opened?.0),
        Err(error) => Err(Error::Refused(error.to_string())),
    }
}

/// The donor's last transaction that ends at or below `at`, with its stamp.
fn last_before(journal: &Journal, node: NodeId, at: Position) -> Result<Option<(Position, Stamp)>, Error> {
    let oldest = journal.stats().oldest.get(node);
    let mut cursor = match journal.cursor(node, oldest) {
        Err(journal::Error::Trimmed { oldest, .. }) => journal.cursor(node, oldest)?,
        cursor => cursor?,
    };
    let unreadable =
        |error: anabranch_proto::wire::Malformed| Error::Refused(format!("the donor's journal: {error}"));
    let mut cache = TableCache::default();
    let mut last = None;
    while let Some(located) = cursor.try_next()? {
        let payload = journal::unpack(&located.frame)?;
        let mut reader = FrameReader::new(node, payload, &mut cache).map_err(unreadable)?;
        while let Some(record) = reader.next_record().map_err(unreadable)? {
            let Record::Txn(header, _) = record else { continue };
            if header.position > at {
                return Ok(last);
            }
            last = Some((header.position, header.stamp));
        }
    }
    Ok(last)
}

/// What the donor had applied of others, and the highest stamp among that.
pub(super) async fn progress(client: &Client, donor: NodeId) -> Result<(Vector, Stamp), Error> {
    let read = crate::apply::progress::read(client, donor).await;
    read.map_err(sql("read the donor's anabranch.progress"))
}

/// This node's share of each sequence. Where members divide one and there is no share of it for this node, the join does not end: once it
/// takes writes, it would give ids that a member gives. Anything else that is in the way is only said.
async fn sequences(
    config: &Config,
    options: &Options,
    admin: &mut Client,
    report: &Report,
) -> Result<(), Error> {
    let facts = facts(config, options, admin).await?;
    let patterns = Patterns::parse(&config.postgres.tables).map_err(setup::Error::from)?;
    let tables = setup::select::select(&facts, &patterns).all;
    let all = sequence::read(admin, &setup::select::oids(&tables), Depth::Columns).await?;
    let plan = ids::plan_of_joiner(&all, config);
    let in_words =
        |finding: &setup::Finding| format!("{}: {} {}", finding.check, finding.found, finding.remedy);
    for finding in plan
        .findings
        .iter()
        .filter(|finding| finding.level == setup::Level::Warn)
    {
        let text = in_words(finding);
        report(Event::Note { text });
    }
    if plan.is_allowed() {
        return execute(admin, options, &plan, report).await;
    }
    // The preflight has looked for the same at the donor: it came about since.
    let failed = plan
        .findings
        .iter()
        .filter(|finding| finding.level == setup::Level::Fail);
    let failed: Vec<String> = failed.map(in_words).collect();
    Err(Error::Refused(format!(
        "{}\nthe members divide their sequences, and this node has no share: mend that and run the same command again, which goes on from \
         here; or give the join up with `--abandon`",
        failed.join("\n")
    )))
}

pub(super) async fn facts(config: &Config, options: &Options, admin: &mut Client) -> Result<Facts, Error> {
    let (slot, publication) = (&config.postgres.slot, &config.postgres.publication);
    Ok(setup::facts::read(admin, &options.role, slot, publication).await?)
}

async fn execute(admin: &mut Client, options: &Options, plan: &Plan, report: &Report) -> Result<(), Error> {
    let watcher = connect_admin(&options.admin_dsn, "join").await?;
    let report = Arc::clone(report);
    let mut pass_on = move |event: setup::Event| match event {
        setup::Event::Did(what) => report(Event::Built { what }),
        setup::Event::Waiting { what, on } => report(Event::Waiting {
            on: format!("{what}: {}", on.join("; ")),
        }),
    };
    Ok(setup::execute(admin, &watcher, plan, &mut pass_on).await?)
}

/// The donor's rows of our own tables, in one transaction with the note that they are there.
async fn own_rows(
    admin: &mut Client,
    config: &Config,
    state: &State,
    from: &Source,
    (own, stamp): (Position, Stamp),
) -> Result<(), Error> {
    const QUARANTINE: &str = "schema_name, table_name, key_bytes, key, origin, epoch, lsn, stamp, change, sqlstate, \
        message, detail, first_at, last_at, attempts";
    const SEQUENCE: &str = "schema_name, sequence_name, node_id, increment, base, said_at, method";
    admin.batch_execute("BEGIN").await.map_err(sql("begin"))?;
    for (table, columns) in [
        ("progress", "*"),
        ("member", "*"),
        ("sequence", SEQUENCE),
        ("default_before", "*"),
        // The tables came with the identities that these were changed to.
        ("identity_before", "*"),
        ("ddl", "*"),
        // What was done by hand there before the cut is in the copy, whether or not its statement has been passed.
        ("ddl_done", "*"),
        ("policy_change", "*"),
        ("quarantine", QUARANTINE),
        ("conflict_history", "*"),
        // What the donor only counted has no line that could come.
        ("conflict_storm", "*"),
    ] {
        let list = if columns == "*" {
            String::new()
        } else {
            format!(" ({columns})")
        };
        copy::pass(
            &from.client,
            admin,
            &format!("COPY (SELECT {columns} FROM anabranch.{table}) TO STDOUT (FORMAT binary)"),
            &format!("COPY anabranch.{table}{list} FROM STDIN (FORMAT binary)"),
        )
        .await
        .map_err(sql(format!("copy anabranch.{table}")))?;
    }
    added_columns(admin, &from.client, own).await?;
    let (donor, id) = (from.node, config.node.id);
    admin
        .batch_execute(&format!(
            "DELETE FROM anabranch.progress WHERE origin = {id};
             INSERT INTO anabranch.progress (origin, epoch, lsn, stamp)
                 VALUES ({donor}, {}, '{}', '\\x{}') ON CONFLICT (origin)
                 DO UPDATE SET epoch = excluded.epoch, lsn = excluded.lsn, stamp = excluded.stamp;
             INSERT INTO anabranch.progress (origin) VALUES ({id});
             UPDATE anabranch.node SET incarnation = {};
             CREATE OR REPLACE FUNCTION anabranch.open_for_writes() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
                 SET search_path = pg_catalog, pg_temp AS $$ BEGIN
                     EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database());
                 END $$;
             REVOKE ALL ON FUNCTION anabranch.open_for_writes() FROM PUBLIC;
             GRANT USAGE ON SCHEMA anabranch TO {role};
             GRANT EXECUTE ON FUNCTION anabranch.open_for_writes() TO {role};
             {noted} COMMIT",
            own.epoch,
            own.lsn,
            hex::encode(stamp.to_bytes()),
            literal(&state.incarnation),
            role = ident(&options_role(config)),
            noted = done(OWN_TABLES),
        ))
        .await
        .map_err(sql("write down where the copy is cut"))
}

/// What the donor knows of columns that DDL has added, with the tables' and columns' numbers here. Where the donor does not know yet where
/// its own was said, that was before the cut.
async fn added_columns(admin: &Client, donor: &Client, own: Position) -> Result<(), Error> {
    const ALL: &str = "SELECT coalesce(jsonb_agg(to_jsonb(x) || jsonb_build_object('schema', n.nspname, 'table', c.relname, 'column', a.attname)), '[]')::text \
        FROM anabranch.added_column x JOIN pg_class c ON c.oid = x.rel JOIN pg_namespace n ON n.oid = c.relnamespace \
        JOIN pg_attribute a ON a.attrelid = x.rel AND a.attnum = x.attnum AND NOT a.attisdropped";
    const HERE: &str = "INSERT INTO anabranch.added_column (rel, attnum, ddl, node_id, epoch, lsn, value) \
        SELECT c.oid, a.attnum, x.ddl, x.node_id, coalesce(x.epoch, $2), coalesce(x.lsn, $3), x.value \
        FROM jsonb_to_recordset($1::text::jsonb) AS x (schema text, \"table\" text, \"column\" text, ddl uuid, node_id int, epoch bigint, \
            lsn pg_lsn, value text) \
        JOIN pg_namespace n ON n.nspname = x.schema JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = x.\"table\" \
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = x.\"column\" AND a.attnum > 0 AND NOT a.attisdropped";
    let what = || sql("copy anabranch.added_column");
    let row = donor.query_one(ALL, &[]).await.map_err(what())?;
    let all: String = row.try_get(0).map_err(what())?;
    let (epoch, lsn) = (i64::from(own.epoch), PgLsn::from(own.lsn.0));
    admin.execute(HERE, &[&all, &epoch, &lsn]).await.map_err(what())?;
    Ok(())
}

/// Lines of conflicts before the cut that the donor wrote after it: it had not decoded one of the two writes yet. Nobody finds these
/// again here. (The donor has written them by now. Others among them are of conflicts after the cut, and have the id that they
/// will have here.)
async fn late_lines(options: &Options, admin: &Client) -> Result<(), Error> {
    let newest = admin
        .query_one(
            "SELECT coalesce(max(detected_at) - interval '1 hour', '-infinity')::text FROM anabranch.conflict_history",
            &[],
        )
        .await
        .map_err(sql("read the conflict log"))?;
    let newest: String = newest.try_get(0).map_err(sql("read the conflict log"))?;
    let donor = connect_donor(&options.donor_dsn).await?;
    admin
        .batch_execute("CREATE TEMP TABLE anabranch_late (LIKE anabranch.conflict_history)")
        .await
        .map_err(sql("make a temporary table"))?;
    copy::pass(
        &donor,
        admin,
        &format!(
            "COPY (SELECT * FROM anabranch.conflict_history WHERE detected_at >= {}) TO STDOUT (FORMAT binary)",
            literal(&newest)
        ),
        "COPY anabranch_late FROM STDIN (FORMAT binary)",
    )
    .await
    .map_err(sql("copy late lines of anabranch.conflict_history"))?;
    admin
        .batch_execute(
            "INSERT INTO anabranch.conflict_history SELECT * FROM anabranch_late ON CONFLICT DO NOTHING; \
             DROP TABLE anabranch_late",
        )
        .await
        .map_err(sql("write late lines of anabranch.conflict_history"))
}

/// The daemon's role, by its own connection string.
fn options_role(config: &Config) -> String {
    crate::pg::dsn(&config.postgres)
        .ok()
        .and_then(|dsn| dsn.config().get_user().map(str::to_owned))
        .unwrap_or_default()
}
