//! The schema, by `pg_dump --schema-only`: tables before the data; indexes, constraints and triggers after it, in parallel.
//!
//! Both halves are read as soon as the snapshot is cut, and kept until the join is complete: `pg_dump` reads the old snapshot with the
//! server's catalog of now, and fails on whatever was dropped since. Before a join begins the whole of it is tried ([`trial`]).

mod lines;
mod trial;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::process::Command;
use tokio_postgres::Client;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;

use super::state::{done, is_done};
use super::waiting::connect_donor;
use super::{Error, Event, Options, Report, Source, connect_admin, io, on_snapshot, sql};
use crate::donor::Cut;
use crate::pg::{self, Dsn};
use crate::setup::Finding;
use crate::setup::plain_ddl::TRIGGERS;
use crate::shared::lock;

pub(super) use trial::tried;

const BEFORE: &str = "pre-data";
const AFTER: &str = "post-data";

/// The donor's schema as it was at the cut.
pub(super) struct Dump {
    before: String,
    after: String,
}

impl Dump {
    /// What an earlier run has kept of this cut; else it is read now, and kept.
    pub(super) async fn open(
        admin: &Client,
        options: &Options,
        cut: &Cut,
        from: &Source,
    ) -> Result<Self, Error> {
        if let Some(kept) = Self::kept(admin).await? {
            return Ok(kept);
        }
        let program = Program::find(options, from.major).await?;
        let dump = Self {
            before: program.section(BEFORE, cut).await?,
            after: program.section(AFTER, cut).await?,
        };
        admin
            .execute(
                "INSERT INTO anabranch_join.dump (section, sql) VALUES ($1, $2), ($3, $4) ON CONFLICT DO NOTHING",
                &[&BEFORE, &dump.before, &AFTER, &dump.after],
            )
            .await
            .map_err(sql("keep the donor's schema"))?;
        Ok(dump)
    }

    async fn kept(admin: &Client) -> Result<Option<Self>, Error> {
        let row = admin
            .query_opt(
                "SELECT b.sql, a.sql FROM anabranch_join.dump b, anabranch_join.dump a WHERE b.section = $1 AND a.section = $2",
                &[&BEFORE, &AFTER],
            )
            .await
            .map_err(sql("read the schema that was kept"))?;
        row.map(|row| {
            Ok(Self {
                before: row.try_get(0)?,
                after: row.try_get(1)?,
            })
        })
        .transpose()
        .map_err(sql("read the schema that was kept"))
    }
}

/// An object after the data, as `pg_dump` wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Its place in the dump. Names tell no two entries apart: `pg_dump` quotes none, and writes `a b c` for constraint `b c` of table `a` and
    /// for constraint `c` of table `a b`.
    place: usize,
    kind: String,
    /// None for what is in no schema.
    schema: Option<String>,
    name: String,
    sql: String,
}

impl Entry {
    /// An event trigger of ours, whose function is in a schema that is left out: this node makes its own.
    fn is_ours(&self) -> bool {
        self.kind == "EVENT TRIGGER" && TRIGGERS.contains(&self.name.as_str())
    }

    /// For people.
    fn label(&self) -> String {
        match &self.schema {
            Some(schema) => format!("{} {schema}.{}", self.kind, self.name),
            None => format!("{} {}", self.kind, self.name),
        }
    }
}

/// The kind of entries that are foreign keys.
const FOREIGN_KEY: &str = "FK CONSTRAINT";

/// A foreign key, by the statement that makes it. All names are quoted.
#[derive(Debug, PartialEq, Eq)]
struct ForeignKey {
    table: String,
    name: String,
    /// What makes it, alone.
    statement: String,
    /// The whole entry, with the key made NOT VALID.
    unvalidated: String,
}

impl ForeignKey {
    /// `pg_dump` writes two lines: `ALTER TABLE ONLY t` (without ONLY where `t` is partitioned), and `ADD CONSTRAINT ...;`.
    fn of(entry: &str) -> Option<Self> {
        let lines: Vec<&str> = entry.lines().collect();
        let at = lines.iter().position(|line| line.starts_with("ALTER TABLE "))?;
        let (head, add) = (*lines.get(at)?, *lines.get(at + 1)?);
        let table = head.strip_prefix("ALTER TABLE ")?;
        let table = table.strip_prefix("ONLY ").unwrap_or(table);
        let added = add.trim_start().strip_prefix("ADD CONSTRAINT ")?;
        let (name, _) = added.split_once(" FOREIGN KEY (")?;
        let open = add.strip_suffix(';')?;
        let closed = format!("{open} NOT VALID;");
        let mut unvalidated = lines.clone();
        *unvalidated.get_mut(at + 1)? = &closed;
        Some(Self {
            table: table.to_owned(),
            name: name.to_owned(),
            statement: format!("{head} {}", add.trim_start()),
            unvalidated: unvalidated.join("\n"),
        })
    }
}

/// How the donor's schema is read.
struct Program {
    program: PathBuf,
    /// Its version.
    major: i32,
    dsn: Dsn,
}

/// Could the schema be read? Asked before anything is begun: by then the node is a member.
pub(super) async fn readable(options: &Options, server: i32) -> Finding {
    match Program::find(options, server).await {
        Ok(found) => Finding::ok("pg_dump", found.program.display().to_string()),
        Err(error) => Finding::fail(
            "pg_dump",
            error.to_string(),
            "install the client programs of the donor's version or a later one, or name their folder with --pg-bin",
        ),
    }
}

impl Program {
    /// The newest `pg_dump` that is found; it must not be older than the donor's server.
    async fn find(options: &Options, server: i32) -> Result<Self, Error> {
        let mut best: Option<(i32, PathBuf)> = None;
        for program in candidates(options.pg_bin.as_deref()) {
            if let Some(major) = version(&program).await
                && best.as_ref().is_none_or(|best| best.0 < major)
            {
                best = Some((major, program));
            }
        }
        match best {
            Some((major, program)) if major >= server => Ok(Self {
                program,
                major,
                dsn: options.donor_dsn.clone(),
            }),
            found => Err(Error::Refused(format!(
                "the donor runs PostgreSQL {server}, and {}: install the client programs of version {server} or later, or name \
                 their folder with --pg-bin",
                found.map_or_else(
                    || "no pg_dump is found".to_owned(),
                    |(major, program)| format!("{} is of version {major}", program.display())
                )
            ))),
        }
    }

    /// One half of the schema, as the cut has it.
    async fn section(&self, section: &str, cut: &Cut) -> Result<String, Error> {
        let args = [
            format!("--section={section}"),
            format!("--snapshot={}", cut.snapshot),
        ];
        let read = self.read(&args).await;
        if let Err(Error::Dump(_)) = &read {
            // Its words are in the server's language.
            if let Err(gone @ Error::Snapshot(_)) = on_snapshot(&connect_donor(&self.dsn).await?, cut).await {
                return Err(gone);
            }
        }
        read
    }

    /// What the program writes, as far as it can be run here.
    async fn read(&self, more: &[String]) -> Result<String, Error> {
        let config = self.dsn.config();
        let mut command = Command::new(&self.program);
        command
            .args([
                "--schema-only",
                "--no-publications",
                "--no-subscriptions",
                "--exclude-schema=anabranch",
                "--exclude-schema=anabranch_join",
                "--exclude-schema=anabranch_ddl",
                "--quote-all-identifiers",
                // Read as text here, whatever the database's encoding is.
                "--encoding=UTF8",
            ])
            .args(more)
            .env("PGPORT", self.dsn.port(0).to_string())
            .env("PGCONNECT_TIMEOUT", "30")
            // Its texts are read by a session that has it on, whatever the donor's database says.
            .env("PGOPTIONS", {
                let mut options = std::env::var_os("PGOPTIONS").unwrap_or_default();
                options.push(" -c standard_conforming_strings=on");
                options
            })
            .kill_on_drop(true);
        match config.get_hosts().first() {
            Some(Host::Tcp(name)) => drop(command.env("PGHOST", name)),
            Some(Host::Unix(folder)) => drop(command.env("PGHOST", folder)),
            None => {}
        }
        if let Some(address) = config.get_hostaddrs().first() {
            command.env("PGHOSTADDR", address.to_string());
        }
        if let Some(user) = config.get_user() {
            command.env("PGUSER", user);
        }
        if let Some(name) = config.get_dbname() {
            command.env("PGDATABASE", name);
        }
        if let Some(password) = config.get_password() {
            command.env(
                "PGPASSWORD",
                std::ffi::OsStr::new(&*String::from_utf8_lossy(password)),
            );
        }
        if config.get_ssl_mode() == SslMode::Require {
            command.env("PGSSLMODE", "require");
        }
        let output = command.output().await.map_err(io("run pg_dump"))?;
        if !output.status.success() {
            return Err(Error::Dump(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            ));
        }
        Ok(runnable(&String::from_utf8_lossy(&output.stdout)))
    }
}

fn candidates(named: Option<&Path>) -> Vec<PathBuf> {
    if let Some(dir) = named {
        return vec![dir.join("pg_dump")];
    }
    let mut out = vec![PathBuf::from("pg_dump")];
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        out.extend(
            versions
                .flatten()
                .map(|version| version.path().join("bin/pg_dump")),
        );
    }
    out
}

/// The major version of a `pg_dump`, if it is one.
async fn version(program: &Path) -> Option<i32> {
    let output = Command::new(program).arg("--version").output().await.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let number = text
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    number
        .split('.')
        .next()?
        .trim_end_matches(|c: char| !c.is_ascii_digit())
        .parse()
        .ok()
}

/// A dump without what is for psql, and without settings that an older server may not know.
fn runnable(dump: &str) -> String {
    lines::lines(dump)
        .filter(|line| {
            let text = line.text;
            let left_out = text.starts_with("\\restrict ")
                || text.starts_with("\\unrestrict ")
                || text.starts_with("SET transaction_timeout")
                || text.starts_with("SELECT pg_catalog.set_config('search_path'")
                // Made with the database, and owned by the server's own role.
                || text == "CREATE SCHEMA \"public\";";
            !(line.is_outside && left_out)
        })
        .flat_map(|line| [line.text, "\n"])
        .collect()
}

/// The entries of a dump, without the settings at its head. Each is preceded by three lines of comment, of which the second names it:
/// nowhere but outside, since a text of somebody's may hold such lines, and what is an entry is run by a superuser.
fn entries(dump: &str) -> Vec<Entry> {
    let mut out: Vec<Entry> = Vec::new();
    // It is set where it changes, before the comment, and stays for the entries that follow: these may be made by another session.
    let mut tablespace = String::new();
    let mut previous = lines::Line::default();
    for line in lines::lines(dump) {
        let text = line.text;
        if previous.is_outside
            && previous.text == "--"
            && let Some(mut entry) = headed(text)
        {
            entry.place = out.len();
            entry.sql.clone_from(&tablespace);
            out.push(entry);
        } else if line.is_outside && previous.text.is_empty() && text.starts_with("SET default_tablespace = ")
        {
            tablespace = format!("{text}\n");
        } else if let Some(entry) = out.last_mut() {
            entry.sql.push_str(text);
            entry.sql.push('\n');
        }
        previous = line;
    }
    out
}

/// The entry that a line of comment begins: `-- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: app`.
fn headed(line: &str) -> Option<Entry> {
    let (name, rest) = line.strip_prefix("-- Name: ")?.rsplit_once("; Type: ")?;
    let mut parts = rest.split("; ");
    let kind = parts.next().unwrap_or_default();
    let schema = parts.find_map(|part| part.strip_prefix("Schema: "));
    Some(Entry {
        place: 0,
        kind: kind.to_owned(),
        schema: schema.filter(|&schema| schema != "-").map(str::to_owned),
        name: name.to_owned(),
        sql: String::new(),
    })
}

/// Types, functions, tables without their indexes.
pub(super) async fn before_data(admin: &Client, dump: &Dump) -> Result<(), Error> {
    if is_done(admin, "schema").await? {
        return Ok(());
    }
    admin
        .batch_execute(&format!(
            "BEGIN; SET LOCAL check_function_bodies = off; {}\n{} COMMIT",
            dump.before,
            done("schema")
        ))
        .await
        .map_err(sql(
            "make the donor's tables here (roles that they need must exist)",
        ))?;
    settings(admin).await
}

/// What a dump sets at its head is for the dump alone.
async fn settings(admin: &Client) -> Result<(), Error> {
    admin
        .batch_execute(&format!(
            "SET search_path = {}; SET row_security = off; SET statement_timeout = 0; SET lock_timeout = 0; \
             SET idle_in_transaction_session_timeout = 0; SET default_tablespace = ''; \
             SET default_transaction_read_only = off",
            pg::SEARCH_PATH
        ))
        .await
        .map_err(sql("reset the session"))?;
    admin
        .batch_execute(pg::ROW_SECURITY_OF_OTHERS)
        .await
        .map_err(sql("set row_security"))
}

/// Entries that nothing here is made of, so that an index or constraint behind them does not need them.
const LEAVES: [&str; 13] = [
    "ACL",
    "CHECK CONSTRAINT",
    "COMMENT",
    "DEFAULT",
    "EVENT TRIGGER",
    FOREIGN_KEY,
    "INDEX ATTACH",
    "POLICY",
    "ROW SECURITY",
    "RULE",
    "SECURITY LABEL",
    "STATISTICS",
    "TRIGGER",
];

/// Constraints and indexes that can be made at once, in any order; and the rest, in its order. What depends on a primary key (by GROUP BY)
/// `pg_dump` puts behind that: a materialised view, whose indexes come after it; a function with a body in SQL, which an index may call
/// without naming it.
fn at_once(entries: Vec<Entry>) -> (Vec<Entry>, Vec<Entry>) {
    let (mut at_once, mut rest) = (Vec::new(), Vec::new());
    let (mut views, mut is_open): (Vec<String>, bool) = (Vec::new(), true);
    for entry in entries {
        let is_free = || !views.iter().any(|view| entry.sql.contains(view));
        match entry.kind.as_str() {
            "INDEX" | "CONSTRAINT" if is_open && is_free() => {
                at_once.push(entry);
                continue;
            }
            "INDEX" | "CONSTRAINT" => {}
            "MATERIALIZED VIEW" => {
                let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
                let schema = entry.schema.as_deref().unwrap_or_default();
                views.push(format!("{}.{}", quoted(schema), quoted(&entry.name)));
            }
            kind => is_open = is_open && LEAVES.contains(&kind),
        }
        rest.push(entry);
    }
    (at_once, rest)
}

/// Primary keys, unique constraints and indexes several at once; then the rest in its order.
pub(super) async fn after_data(options: &Options, dump: &Dump, report: &Report) -> Result<(), Error> {
    let entries = entries(&dump.after).into_iter();
    let (indexes, rest) = at_once(entries.filter(|entry| !entry.is_ours()).collect());
    let queue = Arc::new(Mutex::new(VecDeque::from(indexes)));
    let mut tasks = tokio::task::JoinSet::<Result<(), Error>>::new();
    for _ in 0..options.jobs.max(1) {
        let (queue, report, dsn) = (Arc::clone(&queue), Arc::clone(report), options.admin_dsn.clone());
        tasks.spawn(async move {
            let admin = connect_admin(&dsn, "join").await?;
            loop {
                let Some(entry) = lock(&queue).pop_front() else {
                    return Ok(());
                };
                build(&admin, &entry, &report).await?;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| Error::Refused(error.to_string()))??;
    }
    let admin = connect_admin(&options.admin_dsn, "join").await?;
    for entry in rest {
        build(&admin, &entry, report).await?;
    }
    Ok(())
}

async fn build(admin: &Client, entry: &Entry, report: &Report) -> Result<(), Error> {
    let what = entry.label();
    let step = format!("make {} {what}", entry.place);
    if is_done(admin, &step).await? {
        return Ok(());
    }
    let refused = match make(admin, &entry.sql, &step).await {
        Ok(()) => {
            report(Event::Built { what });
            return Ok(());
        }
        Err(refused) => refused,
    };
    admin
        .batch_execute("ROLLBACK")
        .await
        .map_err(sql(format!("make {what}")))?;
    match (entry.kind.as_str(), refused.code()) {
        (FOREIGN_KEY, Some(&SqlState::FOREIGN_KEY_VIOLATION)) => {
            let text = orphaned(admin, entry, &step, refused).await?;
            report(Event::Note { text });
            Ok(())
        }
        // Of a key that was left out.
        ("COMMENT", Some(&SqlState::UNDEFINED_OBJECT)) if entry.name.starts_with("CONSTRAINT ") => {
            let text = format!("the comment on {} is left out, as the constraint is", entry.name);
            report(Event::Note { text });
            make(admin, "", &step)
                .await
                .map_err(sql(format!("leave {what} out")))
        }
        _ => Err(sql(format!("make {what}"))(refused)),
    }
}

/// Runs an entry, and writes down that it is done.
async fn make(admin: &Client, statements: &str, step: &str) -> Result<(), tokio_postgres::Error> {
    let text = format!("BEGIN; {statements}\n{} COMMIT", done(step));
    admin.batch_execute(&text).await
}

/// Makes a foreign key that rows of the copy violate, without looking at them: at the donor they do, too, or the rows that they refer to
/// are of a table that is not replicated. Says what was done, and what is left to do.
async fn orphaned(
    admin: &Client,
    entry: &Entry,
    step: &str,
    refused: tokio_postgres::Error,
) -> Result<String, Error> {
    let what = entry.label();
    let why = refused.as_db_error().map_or_else(
        || refused.to_string(),
        |error| error.detail().unwrap_or_else(|| error.message()).to_owned(),
    );
    let Some(key) = ForeignKey::of(&entry.sql) else {
        return Err(sql(format!("make {what}"))(refused));
    };
    let found = format!(
        "{what}: rows have no parent, as at the donor, or their parents' table is not replicated ({why})"
    );
    let made = match make(admin, &key.unvalidated, step).await {
        Ok(()) => {
            return Ok(format!(
                "{found}: it is made NOT VALID, and holds for what is written from now on. When the rows have parents: ALTER TABLE {} \
                 VALIDATE CONSTRAINT {}",
                key.table, key.name
            ));
        }
        Err(error) => error,
    };
    admin
        .batch_execute("ROLLBACK")
        .await
        .map_err(sql(format!("make {what}")))?;
    // Partitioned tables have none that are not valid before 18.
    if made.code() != Some(&SqlState::WRONG_OBJECT_TYPE) {
        return Err(sql(format!("make {what} NOT VALID"))(made));
    }
    make(admin, "", step)
        .await
        .map_err(sql(format!("leave {what} out")))?;
    Ok(format!(
        "{found}: it is LEFT OUT HERE, since this server has no NOT VALID foreign keys of partitioned tables. When the rows have parents: {}",
        key.statement
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_is_cut_into_its_entries() {
        let dump = "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc\nSET statement_timeout = 0;\n\n--\n\
            -- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: app\n--\n\n\
            ALTER TABLE ONLY \"public\".\"t\"\n    ADD CONSTRAINT \"t_pkey\" PRIMARY KEY (\"id\");\n\n\n--\n\
            -- Name: t_v; Type: INDEX; Schema: public; Owner: app\n--\n\nCREATE INDEX \"t_v\" ON \"public\".\"t\" (\"v\");\n";
        let entries = entries(&runnable(dump));
        let labels: Vec<String> = entries.iter().map(Entry::label).collect();
        assert_eq!(labels, ["CONSTRAINT public.t t_pkey", "INDEX public.t_v"]);
        assert!(entries[0].sql.contains("ADD CONSTRAINT"));
        let index = "CREATE INDEX \"t_v\" ON \"public\".\"t\" (\"v\");";
        assert!(entries[1].sql.trim_end().ends_with(index));
    }

    #[test]
    fn entries_of_equal_names_are_told_apart() {
        let head = |name: &str, schema: &str| {
            format!(
                "--\n-- Name: {name}; Type: CONSTRAINT; Schema: {schema}; Owner: app\n--\n\nSELECT 1;\n\n"
            )
        };
        let dump = ["a", "b", "b"]
            .map(|schema| head("item item_pkey", schema))
            .concat();
        let entries = entries(&dump);
        assert_eq!(entries[0].label(), "CONSTRAINT a.item item_pkey");
        assert_eq!(entries[1].label(), "CONSTRAINT b.item item_pkey");
        let places: Vec<usize> = entries.iter().map(|entry| entry.place).collect();
        assert_eq!(places, [0, 1, 2]);
    }

    #[test]
    fn a_tablespace_holds_for_all_entries_until_the_next_and_no_text_is_taken_for_an_entry() {
        let dump = "SET default_tablespace = fast;\n\n--\n-- Name: t_v; Type: INDEX; Schema: public; Owner: app; Tablespace: fast\n--\n\n\
            CREATE INDEX;\n\n\n--\n-- Name: INDEX t_v; Type: COMMENT; Schema: public; Owner: app\n--\n\n\
            COMMENT ON INDEX \"public\".\"t_v\" IS 'one\n-- Name: two; Type: INDEX\nthree';\n\n\n\
            SET default_tablespace = '';\n\n--\n-- Name: watch; Type: EVENT TRIGGER; Schema: -; Owner: postgres\n--\n\nCREATE EVENT TRIGGER;\n";
        let entries = entries(dump);
        let labels: Vec<String> = entries.iter().map(Entry::label).collect();
        assert_eq!(
            labels,
            [
                "INDEX public.t_v",
                "COMMENT public.INDEX t_v",
                "EVENT TRIGGER watch"
            ]
        );
        assert!(entries[0].sql.starts_with("SET default_tablespace = fast;"));
        assert!(entries[1].sql.starts_with("SET default_tablespace = fast;"));
        assert!(entries[1].sql.contains("one\n-- Name: two; Type: INDEX\nthree"));
        assert!(entries[2].sql.starts_with("SET default_tablespace = '';"));
    }

    #[test]
    fn what_needs_a_view_or_function_behind_a_key_is_made_after_it() {
        let dump = |all: &[(&str, &str, &str)]| {
            let all = all.iter().map(|(kind, name, sql)| {
                format!("--\n-- Name: {name}; Type: {kind}; Schema: public; Owner: app\n--\n\n{sql};\n\n\n")
            });
            entries(&all.collect::<String>())
        };
        let names = |all: Vec<Entry>| all.into_iter().map(|entry| entry.name).collect::<Vec<_>>();
        let mut all = vec![
            ("CONSTRAINT", "t t_pkey", "ALTER TABLE \"public\".\"t\""),
            ("COMMENT", "CONSTRAINT t_pkey ON t", "COMMENT"),
            (
                "MATERIALIZED VIEW",
                "m",
                "CREATE MATERIALIZED VIEW \"public\".\"m\"",
            ),
            ("CONSTRAINT", "u u_pkey", "ALTER TABLE \"public\".\"u\""),
            ("INDEX", "m_n", "CREATE INDEX \"m_n\" ON \"public\".\"m\" (\"n\")"),
            ("INDEX ATTACH", "p_n", "ALTER INDEX"),
            ("INDEX", "t_n", "CREATE INDEX \"t_n\" ON \"public\".\"t\" (\"n\")"),
        ];
        let (first, rest) = at_once(dump(&all));
        assert_eq!(names(first), ["t t_pkey", "u u_pkey", "t_n"]);
        assert_eq!(names(rest), ["CONSTRAINT t_pkey ON t", "m", "m_n", "p_n"]);
        all.insert(2, ("FUNCTION", "f(integer)", "CREATE FUNCTION"));
        let (first, rest) = at_once(dump(&all));
        assert_eq!(names(first), ["t t_pkey"]);
        assert_eq!(names(rest)[3..], ["u u_pkey", "m_n", "p_n", "t_n"]);
    }

    #[test]
    fn a_foreign_key_can_be_made_without_looking_at_rows() {
        let dump = "SET default_tablespace = '';\n\n--\n-- Name: part part_item_fkey; Type: FK CONSTRAINT; Schema: public; Owner: app\n--\n\n\
            ALTER TABLE ONLY \"public\".\"part\"\n    ADD CONSTRAINT \"part_item_fkey\" FOREIGN KEY (\"item\") REFERENCES \
            \"public\".\"item\"(\"id\") DEFERRABLE;\n\n\n--\n-- PostgreSQL database dump complete\n--\n\n";
        let entries = entries(dump);
        assert_eq!(entries[0].kind, FOREIGN_KEY);
        let key = ForeignKey::of(&entries[0].sql).expect("it is one");
        assert_eq!(key.table, "\"public\".\"part\"");
        assert_eq!(key.name, "\"part_item_fkey\"");
        assert!(
            key.statement
                .starts_with("ALTER TABLE ONLY \"public\".\"part\" ADD CONSTRAINT ")
        );
        let made = "REFERENCES \"public\".\"item\"(\"id\") DEFERRABLE NOT VALID;\n";
        assert!(key.unvalidated.contains(made), "{}", key.unvalidated);
        assert_eq!(ForeignKey::of("CREATE INDEX;\n"), None);
    }

    #[test]
    fn lines_for_psql_and_for_newer_servers_are_left_out() {
        let dump = "\\restrict x\nSET transaction_timeout = 0;\nSET lock_timeout = 0;\n\\unrestrict x\n";
        assert_eq!(runnable(dump), "SET lock_timeout = 0;\n");
    }

    #[test]
    fn what_a_text_or_a_body_holds_is_no_entry_and_stays_as_it_is() {
        let planted =
            "--\n-- Name: x; Type: INDEX; Schema: public; Owner: o\n--\n\nALTER ROLE me SUPERUSER;\n--";
        let set = "\nSET default_tablespace = fast;";
        for held in [
            format!("COMMENT ON INDEX \"i\" IS 'a\n{planted}\n{set}';"),
            format!("COMMENT ON INDEX \"i\" IS E'it''s \\\\ \\'\n{planted}\n{set}';"),
            format!("COMMENT ON INDEX \"a''\n{planted}\n{set}\" IS NULL;"),
            format!("CREATE FUNCTION f() RETURNS void AS $_$\n'\n{planted}\n{set}\n$_$;"),
            format!("/* /* */\n{planted}\n{set}\n*/"),
        ] {
            let dump = format!(
                "--\n-- Name: INDEX i; Type: COMMENT; Schema: public; Owner: o\n--\n\n{held}\n\n\n\
                 --\n-- Name: watch; Type: EVENT TRIGGER; Schema: -; Owner: o\n--\n\nCREATE EVENT TRIGGER;\n"
            );
            let entries = entries(&runnable(&dump));
            let labels: Vec<String> = entries.iter().map(Entry::label).collect();
            assert_eq!(
                labels,
                ["COMMENT public.INDEX i", "EVENT TRIGGER watch"],
                "{held}"
            );
            assert!(entries[0].sql.contains(&held), "{held}");
            assert!(!entries[1].sql.contains("default_tablespace"), "{held}");
        }
    }

    #[test]
    fn a_body_keeps_lines_that_are_left_out_elsewhere() {
        let body = "CREATE FUNCTION f() RETURNS void AS $$\r\n\
            CREATE SCHEMA \"public\";\nSET transaction_timeout = 0;\n\\restrict x\n$$;\n";
        let dump = format!("CREATE SCHEMA \"public\";\n{body}\\unrestrict x\n");
        assert_eq!(runnable(&dump), body);
    }
}
