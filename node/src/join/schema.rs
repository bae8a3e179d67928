//! The schema, by `pg_dump --schema-only`: tables before the data; indexes, constraints and triggers after it, in parallel.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::process::Command;
use tokio_postgres::Client;
use tokio_postgres::config::{Host, SslMode};

use super::state::{done, is_done};
use super::waiting::connect_donor;
use super::{Error, Event, Options, Report, Source, connect_admin, io, on_snapshot, sql};
use crate::donor::Cut;
use crate::pg::Dsn;
use crate::shared::lock;

/// How the donor's schema is read.
pub(super) struct Dump {
    program: PathBuf,
    dsn: Dsn,
}

/// An object after the data, as `pg_dump` wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    name: String,
    kind: String,
    sql: String,
}

impl Dump {
    /// The newest `pg_dump` that is found; it must not be older than the donor's server.
    pub(super) async fn find(options: &Options, from: &Source) -> Result<Self, Error> {
        let mut best: Option<(i32, PathBuf)> = None;
        for program in candidates(options.pg_bin.as_deref()) {
            if let Some(major) = version(&program).await
                && best.as_ref().is_none_or(|best| best.0 < major)
            {
                best = Some((major, program));
            }
        }
        match best {
            Some((major, program)) if major >= from.major => Ok(Self {
                program,
                dsn: options.donor_dsn.clone(),
            }),
            found => Err(Error::Refused(format!(
                "the donor runs PostgreSQL {}, and {}: install the client programs of version {} or later, or name \
                 their folder with --pg-bin",
                from.major,
                found.map_or_else(
                    || "no pg_dump is found".to_owned(),
                    |(major, program)| format!("{} is of version {major}", program.display())
                ),
                from.major
            ))),
        }
    }

    async fn section(&self, section: &str, cut: &Cut) -> Result<String, Error> {
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
            ])
            .arg(format!("--section={section}"))
            .arg(format!("--snapshot={}", cut.snapshot))
            .env("PGPORT", self.dsn.port(0).to_string())
            .env("PGCONNECT_TIMEOUT", "30")
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
            // Its words are in the server's language.
            if let Err(gone @ Error::Snapshot(_)) = on_snapshot(&connect_donor(&self.dsn).await?, cut).await {
                return Err(gone);
            }
            return Err(Error::Refused(format!(
                "pg_dump failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
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
    dump.lines()
        .filter(|line| {
            !line.starts_with("\\restrict ")
                && !line.starts_with("\\unrestrict ")
                && !line.starts_with("SET transaction_timeout")
                && !line.starts_with("SELECT pg_catalog.set_config('search_path'")
                // Made with the database, and owned by the server's own role.
                && *line != "CREATE SCHEMA \"public\";"
        })
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// The settings at the head of a dump, and its entries.
fn entries(dump: &str) -> Vec<Entry> {
    let mut out: Vec<Entry> = Vec::new();
    for line in dump.lines() {
        if let Some(head) = line.strip_prefix("-- Name: ")
            && let Some((name, rest)) = head.rsplit_once("; Type: ")
        {
            let kind = rest.split(';').next().unwrap_or_default();
            out.push(Entry {
                name: name.to_owned(),
                kind: kind.to_owned(),
                sql: String::new(),
            });
        } else if let Some(entry) = out.last_mut()
            && !line.starts_with("--")
        {
            entry.sql.push_str(line);
            entry.sql.push('\n');
        }
    }
    out
}

/// Types, functions, tables without their indexes.
pub(super) async fn before_data(admin: &Client, dump: &Dump, cut: &Cut) -> Result<(), Error> {
    if is_done(admin, "schema").await? {
        return Ok(());
    }
    let text = dump.section("pre-data", cut).await?;
    admin
        .batch_execute(&format!(
            "BEGIN; SET LOCAL check_function_bodies = off; {text}\n{} COMMIT",
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
        .batch_execute(
            "SET search_path = pg_catalog; SET row_security = off; SET statement_timeout = 0; SET lock_timeout = 0; \
             SET idle_in_transaction_session_timeout = 0; SET default_tablespace = ''; \
             SET default_transaction_read_only = off",
        )
        .await
        .map_err(sql("reset the session"))
}

/// Primary keys, unique constraints and indexes several at once; then the rest in its order.
pub(super) async fn after_data(
    options: &Options,
    dump: &Dump,
    cut: &Cut,
    report: &Report,
) -> Result<(), Error> {
    let text = dump.section("post-data", cut).await?;
    let (indexes, rest): (Vec<Entry>, Vec<Entry>) = entries(&text)
        .into_iter()
        .partition(|entry| entry.kind == "INDEX" || entry.kind == "CONSTRAINT");
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
    let what = format!("{} {}", entry.kind, entry.name);
    if is_done(admin, &what).await? {
        return Ok(());
    }
    admin
        .batch_execute(&format!("BEGIN; {}\n{} COMMIT", entry.sql, done(&what)))
        .await
        .map_err(sql(format!("make {what}")))?;
    report(Event::Built { what });
    Ok(())
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
        let names: Vec<(&str, &str)> = entries
            .iter()
            .map(|entry| (entry.kind.as_str(), entry.name.as_str()))
            .collect();
        assert_eq!(names, [("CONSTRAINT", "t t_pkey"), ("INDEX", "t_v")]);
        assert!(entries[0].sql.contains("ADD CONSTRAINT"));
        assert_eq!(
            entries[1].sql.trim(),
            "CREATE INDEX \"t_v\" ON \"public\".\"t\" (\"v\");"
        );
    }

    #[test]
    fn lines_for_psql_and_for_newer_servers_are_left_out() {
        let dump = "\\restrict x\nSET transaction_timeout = 0;\nSET lock_timeout = 0;\n\\unrestrict x\n";
        assert_eq!(runnable(dump), "SET lock_timeout = 0;\n");
    }
}
