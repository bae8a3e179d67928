//! The donor's schema on trial: made here, without rows, and undone.
//!
//! In:   what `pg_dump` writes of the donor as it is now            Out: what this server refuses, in its own words
//! Must never: leave anything: it is one transaction, which is not committed
//! Not here: the schema that a join makes, of its snapshot (the parent)
//!
//! Versions know different things: 18 has generated columns that are not stored, keys without overlaps, constraints that are not
//! enforced; and a `pg_dump` may write what only its own version reads. What an older server does not take it says best itself, and
//! before the node is a member rather than in the middle of the copy.

use tokio_postgres::Client;
use tokio_postgres::error::{DbError, ErrorPosition, SqlState};

use super::{Entry, Program, entries};
use crate::config::Config;
use crate::join::{Error, Options, connect_admin, sql};
use crate::pg;
use crate::setup::{self, Finding};

const CHECK: &str = "schema";
/// So many of what is refused is told.
const NAMED: usize = 5;
/// The longest part of a statement that is shown.
const SHOWN: usize = 200;

/// Major versions of all that takes part.
#[derive(Debug, Clone, Copy)]
struct Versions {
    donor: i32,
    here: i32,
    pg_dump: i32,
}

impl Versions {
    const fn are_equal(self) -> bool {
        self.donor == self.here && self.pg_dump == self.here
    }

    /// What to do about something that is refused.
    fn remedy(self) -> String {
        let Self { donor, here, .. } = self;
        let mut text = if donor == here {
            format!("change it at the members so that PostgreSQL {here} takes it")
        } else {
            format!(
                "join with a server of PostgreSQL {donor}, or change it at the members so that PostgreSQL {here} takes it, too"
            )
        };
        if self.pg_dump > donor.max(here) {
            text.push_str(&format!(
                "; if it is pg_dump {} that writes it so: name the folder of pg_dump {} with --pg-bin",
                self.pg_dump,
                donor.max(here)
            ));
        }
        text
    }
}

/// Tries to make the donor's schema in this node's database, which must be empty. Where all versions are equal there is nothing to find out.
pub(in crate::join) async fn tried(
    config: &Config,
    options: &Options,
    donor: i32,
    here: i32,
) -> Result<Vec<Finding>, Error> {
    let program = Program::find(options, donor).await?;
    let versions = Versions {
        donor,
        here,
        pg_dump: program.major,
    };
    if versions.are_equal() {
        return Ok(Vec::new());
    }
    // Without rows, so nobody who writes there is in the way; who alters a table may be.
    let dump = match program.read(&["--lock-wait-timeout=30s".to_owned()]).await {
        Ok(dump) => dump,
        Err(Error::Dump(words)) => {
            return Ok(vec![Finding::fail(
                CHECK,
                format!("the donor's cannot be read: {words}"),
                "mend what pg_dump says, and run this again",
            )]);
        }
        Err(failed) => return Err(failed),
    };
    let admin = connect_admin(&options.admin_dsn, "join").await?;
    begin(config, &admin).await?;
    let found = make(&admin, &entries(&dump), versions).await?;
    admin
        .batch_execute("ROLLBACK")
        .await
        .map_err(sql("undo the donor's schema"))?;
    Ok(found)
}

/// As a join begins, with what a dump says at its head.
async fn begin(config: &Config, admin: &Client) -> Result<(), Error> {
    let mut text = "BEGIN; SET LOCAL check_function_bodies = off; SET LOCAL xmloption = content;".to_owned();
    // Defaults of the donor's tables may name it.
    if let Some(snowflake) = setup::snowflake::sql(config.node.id) {
        text.push_str(&format!("{}\n{snowflake}", setup::objects::SCHEMA));
    }
    text.push_str("\nSAVEPOINT made");
    admin
        .batch_execute(&text)
        .await
        .map_err(sql("try to make the donor's schema here"))
}

async fn make(admin: &Client, all: &[Entry], versions: Versions) -> Result<Vec<Finding>, Error> {
    let mut refused = Vec::new();
    for entry in all.iter().filter(|entry| !entry.is_ours()) {
        // The savepoint is the one before: of a text that cannot be parsed nothing is run at all.
        let text = format!("{}\nRELEASE made; SAVEPOINT made", entry.sql);
        let Err(failed) = admin.batch_execute(&text).await else {
            continue;
        };
        let what = || format!("try to make {}", entry.label());
        let said = match failed.as_db_error() {
            Some(said) if !pg::is_lost(&failed) => said,
            _ => return Err(sql(what())(failed)),
        };
        if *said.code() == SqlState::OUT_OF_MEMORY {
            // No room for so many locks: a join makes one after the other what comes after the data.
            refused.push(Finding::warn(
                CHECK,
                format!(
                    "not all of it could be tried here: {}",
                    crate::error::sql(&failed)
                ),
                "raise max_locks_per_transaction here, and restart the server, to have it tried",
            ));
            return Ok(refused);
        }
        if refused.is_empty() || !is_of_names(said.code()) {
            let at = place(said)
                .and_then(|place| line_before(&text, place))
                .map(|line| format!(", at `{line}`"))
                .unwrap_or_default();
            refused.push(Finding::fail(
                entry.label(),
                format!(
                    "PostgreSQL {} here refuses it: {}{at}",
                    versions.here,
                    crate::error::sql(&failed)
                ),
                versions.remedy(),
            ));
        }
        if refused.len() == NAMED {
            break;
        }
        admin
            .batch_execute("ROLLBACK TO made")
            .await
            .map_err(sql(what()))?;
    }
    if refused.is_empty() {
        let found = format!(
            "all of the donor's can be made here, as pg_dump {} writes it",
            versions.pg_dump
        );
        refused.push(Finding::ok(CHECK, found));
    }
    Ok(refused)
}

/// Does it name something that is not there? Perhaps because that was refused before.
fn is_of_names(code: &SqlState) -> bool {
    [
        SqlState::UNDEFINED_TABLE,
        SqlState::UNDEFINED_COLUMN,
        SqlState::UNDEFINED_OBJECT,
        SqlState::INVALID_SCHEMA_NAME,
    ]
    .contains(code)
}

/// Where in the statement, in letters from 1.
fn place(said: &DbError) -> Option<usize> {
    match said.position()? {
        ErrorPosition::Original(place) => usize::try_from(*place).ok(),
        ErrorPosition::Internal { .. } => None,
    }
}

/// The line of a text that ends before a letter, or holds it: a server that cannot parse something points behind it.
fn line_before(text: &str, place: usize) -> Option<String> {
    let (at, _) = text.char_indices().nth(place.checked_sub(1)?)?;
    let end = text.get(..at)?.trim_end().len();
    let from = text.get(..end)?.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text.get(from..)?.lines().next()?.trim();
    Some(line.chars().take(SHOWN).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_told_that_the_server_stumbled_over() {
        let text = "\nCREATE TABLE \"bill\" (\n    \"id\" integer NOT NULL,\n    \"ä\" integer GENERATED ALWAYS AS ((\"id\" * 2))\n);\n";
        let place = |word: &str| text.split_once(word).unwrap().0.chars().count() + 1;
        let last = "\"ä\" integer GENERATED ALWAYS AS ((\"id\" * 2))";
        assert_eq!(line_before(text, place(");\n")).as_deref(), Some(last));
        assert_eq!(line_before(text, place("ALWAYS")).as_deref(), Some(last));
        assert_eq!(line_before(text, 1).as_deref(), Some(""));
        assert_eq!(line_before(text, 0), None);
        assert_eq!(line_before(text, 1000), None);
        assert_eq!(
            line_before(&"x".repeat(300), 7).map(|line| line.len()),
            Some(SHOWN)
        );
    }

    #[test]
    fn what_to_do_depends_on_which_version_is_the_odd_one() {
        let remedy = |donor, here, pg_dump| Versions { donor, here, pg_dump }.remedy();
        assert!(remedy(18, 15, 18).starts_with("join with a server of PostgreSQL 18"));
        assert!(!remedy(18, 15, 18).contains("--pg-bin"));
        assert!(remedy(15, 15, 18).contains("the folder of pg_dump 15 with --pg-bin"));
    }
}
