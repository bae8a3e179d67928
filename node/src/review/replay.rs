//! Writing lost values again: one new local transaction, which wins over both sides of the conflict everywhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anabranch_conflict::policy::{Policies, TablePolicy};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::{Client, Transaction};

use super::line::cell;
use super::unread::{are_one, unread};
use super::{Columns, Error, Line, Status, Unread, as_jsonb, json_nulls};
use crate::pg;
use crate::setup::sql::{ident, qualified};

/// How to replay.
#[derive(Debug, Clone, Default)]
pub struct Replay {
    /// Also over a row that changed since or is merged of what several wrote, and a line that was replayed before.
    pub force: bool,
    /// Only these columns; else every lost one.
    pub columns: Option<Vec<String>>,
    /// Who says so.
    pub who: String,
    /// For the log.
    pub note: Option<String>,
    /// The policies in force, if they are known: by which a line was decided it says itself.
    pub policies: Option<Policies>,
}

/// What a replay did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replayed {
    /// The line.
    pub conflict_id: String,
    /// `updated`, `inserted` or `deleted`.
    pub did: String,
    /// Columns that were written.
    pub columns: Vec<String>,
}

/// What of the row is known to the catalog.
struct Table {
    name: String,
    /// Its own rows: those of tables that inherit from it are other rows, which may have the same keys.
    rows: String,
    /// Columns that can be written.
    writable: Vec<String>,
    /// Of these, those that only an INSERT can set.
    always: Vec<String>,
    /// Types of all.
    types: BTreeMap<String, String>,
    /// What tells the null of JSON from NULL in a row `t`.
    json_nulls: String,
}

/// What is written again.
enum Again {
    Delete,
    Columns(Vec<String>),
}

/// Writes the losing values of the conflict `id` again.
///
/// # Errors
/// [`Error::Refused`] with the reason, such as what changed since; then nothing is changed.
pub async fn replay(client: &mut Client, id: &str, how: &Replay) -> Result<Replayed, Error> {
    let found = super::find(client, id).await?;
    let transaction = client.transaction().await?;
    transaction
        .batch_execute("SET LOCAL lock_timeout = '10s'")
        .await?;
    transaction.batch_execute(pg::AS_A_USER).await?;
    let line = lock_line(&transaction, &found.conflict_id).await?;
    if line.status == Status::Replayed && !how.force {
        return Err(Error::Refused(format!(
            "conflict {} was replayed already, by {} at {}; --force does it again",
            line.conflict_id,
            line.reviewed_by.as_deref().unwrap_or("?"),
            line.reviewed_at.as_deref().unwrap_or("?")
        )));
    }
    let table = read_table(&transaction, &line).await?;
    // The table's own triggers run from here on.
    transaction.batch_execute(pg::AS_USERS).await?;
    let current = current_row(&transaction, &table, &line).await?;
    let again = again(&table, &line, current.is_some(), how)?;
    if let Some(why) = changed_since(&line, &table, current.as_ref())
        && !how.force
    {
        return Err(Error::Refused(format!(
            "{why}. Whoever wrote it may have known better; look at it, then use --force to write the lost values over it"
        )));
    }
    let replayed = write(&transaction, &table, &line, current.is_some(), again).await?;
    transaction
        .execute(
            "UPDATE anabranch.conflict_history SET status = 'replayed', reviewed_by = $2, reviewed_at = clock_timestamp(), \
             note = coalesce($3, note) WHERE conflict_id = $1::text::uuid",
            &[&line.conflict_id, &how.who, &how.note],
        )
        .await?;
    transaction.commit().await?;
    Ok(replayed)
}

/// Locked, so that two reviewers do not replay one line at once.
async fn lock_line(transaction: &Transaction<'_>, id: &str) -> Result<Line, Error> {
    let sql = "SELECT pg_catalog.to_jsonb(h)::text FROM anabranch.conflict_history AS h WHERE h.conflict_id = $1::text::uuid FOR UPDATE";
    let row = transaction.query_opt(sql, &[&id]).await?;
    let row = row.ok_or_else(|| Error::NotFound(id.to_owned()))?;
    Ok(serde_json::from_str(row.try_get(0)?)?)
}

async fn read_table(transaction: &Transaction<'_>, line: &Line) -> Result<Table, Error> {
    let rows = transaction
        .query(
            "SELECT a.attname::text, a.attgenerated = '', format_type(a.atttypid, a.atttypmod), a.attidentity = 'a', a.atttypid,
                 c.relkind = 'r'
             FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped
             ORDER BY a.attnum",
            &[&line.schema_name, &line.table_name],
        )
        .await?;
    if rows.is_empty() {
        return Err(Error::Refused(format!(
            "table {} is not here any more",
            line.table()
        )));
    }
    let name = qualified(&line.schema_name, &line.table_name);
    let has_own_rows: bool = match rows.first() {
        Some(row) => row.try_get(5)?,
        None => false,
    };
    let mut table = Table {
        rows: match has_own_rows {
            true => format!("ONLY {name}"),
            // A partitioned table has none of its own.
            false => name.clone(),
        },
        name,
        writable: Vec::new(),
        always: Vec::new(),
        types: BTreeMap::new(),
        json_nulls: String::new(),
    };
    for row in &rows {
        let name: String = row.try_get(0)?;
        let (type_sql, type_oid): (String, u32) = (row.try_get(2)?, row.try_get(4)?);
        if row.try_get(1)? {
            table.writable.push(name.clone());
            let value = format!("t.{}", ident(&name));
            let column = (name.as_str(), type_oid, type_sql.as_str(), value);
            table.json_nulls += &json_nulls(std::iter::once(column));
        }
        if row.try_get(3)? {
            table.always.push(name.clone());
        }
        table.types.insert(name, type_sql);
    }
    Ok(table)
}

/// Columns of the table, read from the JSON that is the parameter `at`. Not as a row of the table: a domain may refuse NULL for the others.
fn record<'a>(table: &Table, columns: impl Iterator<Item = &'a String>, at: usize) -> Result<String, Error> {
    let each = columns.map(|name| match table.types.get(name) {
        Some(type_sql) => Ok(format!("{} {type_sql}", ident(name))),
        None => Err(Error::Refused(format!(
            "table {} has no column {name} any more",
            table.name
        ))),
    });
    let each = each.collect::<Result<Vec<_>, Error>>()?.join(", ");
    Ok(format!(
        "pg_catalog.jsonb_to_record(${at}::text::jsonb) AS r ({each})"
    ))
}

/// `t.a = r.a AND ..` for the key's columns, `r` being made of the parameter `at`.
fn of_key(table: &Table, line: &Line, at: usize) -> Result<String, Error> {
    if line.key.is_empty() {
        return Err(Error::Refused(
            "the row's key is redacted in the log: nobody can say which row it was".to_owned(),
        ));
    }
    if unread(&line.key).next().is_some() {
        return Err(Error::Refused(
            "the log has the row's key as bytes: no table here could read the row when it came, so nobody can say here which row it \
             was. A row that was refused waits in anabranch.quarantine and is written once the table can take it"
                .to_owned(),
        ));
    }
    let names = |alias: &str| {
        let each = line.key.keys().map(|name| format!("{alias}.{}", ident(name)));
        each.collect::<Vec<_>>().join(", ")
    };
    Ok(format!(
        "({}) OPERATOR(pg_catalog.=) (SELECT {} FROM {})",
        names("t"),
        names("r"),
        record(table, line.key.keys(), at)?
    ))
}

async fn current_row(
    transaction: &Transaction<'_>,
    table: &Table,
    line: &Line,
) -> Result<Option<Columns>, Error> {
    let condition = of_key(table, line, 1)?;
    let sql = |row: &str| {
        format!(
            "SELECT {row}::text FROM {} AS t WHERE {condition} FOR UPDATE OF t",
            table.rows
        )
    };
    let as_line = format!("(pg_catalog.to_jsonb(t.*){})", table.json_nulls);
    let key = serde_json::to_string(&line.key)?;
    transaction.batch_execute("SAVEPOINT current").await?;
    let read = transaction.query_opt(&sql(&as_line), &[&key]).await;
    let json: Option<String> = match read {
        Ok(row) => row.map(|row| row.try_get(0)).transpose()?,
        Err(error) if pg::is_transient(&error) => return Err(error.into()),
        // A value of `json` that `jsonb` does not take, or something that is wrong with the key.
        Err(_) => {
            transaction.batch_execute("ROLLBACK TO SAVEPOINT current").await?;
            let row = transaction
                .query_opt(&sql("pg_catalog.row_to_json(t.*)"), &[&key])
                .await?;
            let json: Option<String> = row.map(|row| row.try_get(0)).transpose()?;
            match json {
                Some(json) => {
                    let type_of = |name: &str| table.types.get(name).cloned().unwrap_or_default();
                    let read = as_jsonb(transaction, &json, &type_of).await?;
                    Some(read.ok_or_else(|| Error::Refused("the row is too long to be compared".to_owned()))?)
                }
                None => None,
            }
        }
    };
    transaction.batch_execute("RELEASE SAVEPOINT current").await?;
    Ok(json.map(|json| serde_json::from_str(&json)).transpose()?)
}

const CHANGED: &str = "the row changed since the conflict was resolved";

/// What is known of the row as the resolution left it.
fn left_by(line: &Line) -> Left<'_> {
    if line.conflict_resolution != "skip" {
        return line.applied_tuple.as_ref().map_or(Left::None, Left::Row);
    }
    match &line.remote_tuple {
        // Of a row that was refused whole all columns are lost.
        Some(row) if !row.keys().all(|name| line.is_lost(name)) => Left::Without(row),
        _ => Left::Unknown,
    }
}

/// See [`left_by`].
enum Left<'a> {
    /// It was gone.
    None,
    /// As it is here.
    Row(&'a Columns),
    /// As it is here, without the columns that were lost.
    Without(&'a Columns),
    /// The server refused the row that came in, and the line does not say what stood in its place.
    Unknown,
}

/// Lines of before JSON's null had a mark of its own hold it as SQL's.
fn is_unmarked_null(before: &RawValue, now: &RawValue) -> bool {
    before.get() == "null" && Unread::of(now).is_some_and(|now| now.is_json_null())
}

/// How the row differs from what the resolution left; redacted columns cannot be compared, nor those that no line can have.
fn changed_since(line: &Line, table: &Table, current: Option<&Columns>) -> Option<String> {
    let left = left_by(line);
    let of_lost = matches!(left, Left::Without(_));
    let applied = match left {
        Left::None => None,
        Left::Row(row) | Left::Without(row) => Some(row),
        Left::Unknown => {
            return current.map(|_| {
                "the server refused the row that came in, and the log does not say what stood in its place, so whether the row that is \
                 here was here then is not known"
                    .to_owned()
            });
        }
    };
    match (applied, current) {
        (None, None) => None,
        (None, Some(_)) => Some(format!(
            "{CHANGED}: there was no row of this key after it, and there is one now"
        )),
        (Some(_), None) => Some(format!("{CHANGED}: it is gone")),
        (Some(applied), Some(current)) => {
            let redacted = |name: &String| {
                line.redacted_columns
                    .iter()
                    .flatten()
                    .any(|hidden| hidden == name)
            };
            let (mut out, mut unknown) = (String::new(), Vec::new());
            let compared = |name: &String| {
                table.writable.contains(name) && !redacted(name) && !(of_lost && line.is_lost(name))
            };
            for (name, value) in current.iter().filter(|(name, _)| compared(name)) {
                let before = applied.get(name);
                if before.is_some_and(|before| Unread::of(before).is_some_and(|it| it.is_too_long())) {
                    unknown.push(name);
                } else if !before
                    .is_some_and(|before| are_one(before, value) || is_unmarked_null(before, value))
                {
                    let was = before.map_or_else(|| "not there".to_owned(), |value| cell(value));
                    let separator = if out.is_empty() { "" } else { "; " };
                    let _ = write!(out, "{separator}{name} was {was} and is {}", cell(value));
                }
            }
            match (out.is_empty(), unknown.is_empty()) {
                (false, _) => Some(format!("{CHANGED}: {out}")),
                (true, false) => Some(format!(
                    "what the resolution left in column(s) {} was too long for the conflict log, so whether the row changed since is not \
                     known",
                    unknown
                        .iter()
                        .map(|name| name.as_str())
                        .collect::<Vec<_>>()
                        .join(", ")
                )),
                (true, true) => None,
            }
        }
    }
}

/// What is to be written, if the log has it.
fn again(table: &Table, line: &Line, exists: bool, how: &Replay) -> Result<Again, Error> {
    if line.lost_a_delete() {
        return match how.columns {
            Some(_) => Err(Error::Refused("a delete was lost; it has no columns".to_owned())),
            None => Ok(Again::Delete),
        };
    }
    let tuple = line.losing_tuple().ok_or_else(|| {
        Error::Refused(format!(
            "the losing values are not in the log of node {}; the log of the node that wrote them may have them \
             (`conflicts list --all-nodes`)",
            line.node
        ))
    })?;
    let columns = chosen(table, line, tuple, exists, how)?;
    let names = |are_too_long: bool| -> Vec<&str> {
        let wanted = unread(tuple).filter(|(name, value)| columns.contains(name) && !value.is_json_null());
        let these = wanted.filter(|(_, value)| value.is_too_long() == are_too_long);
        these.map(|(name, _)| name.as_str()).collect()
    };
    let (unread, too_long) = (names(false), names(true));
    if !too_long.is_empty() {
        return Err(Error::Refused(format!(
            "column(s) {} were too long for the conflict log, which says only how many bytes they had; they cannot be written again from \
             here. Who still has the values writes them by hand; name the other columns with --columns",
            too_long.join(", ")
        )));
    }
    if unread.is_empty() {
        return Ok(Again::Columns(columns));
    }
    Err(Error::Refused(format!(
        "the log has column(s) {} not as values, but as bytes that no table here could read when the row came, or as JSON that it \
         cannot hold as such; they cannot be written again from here. Read them in the line (`conflicts show {}`) or at the node that \
         wrote them, write them by hand, and name the other columns with --columns",
        unread.join(", "),
        line.conflict_id
    )))
}

async fn write(
    transaction: &Transaction<'_>,
    table: &Table,
    line: &Line,
    exists: bool,
    again: Again,
) -> Result<Replayed, Error> {
    let key = serde_json::to_string(&line.key)?;
    let done = |did: &str, columns: Vec<String>| Replayed {
        conflict_id: line.conflict_id.clone(),
        did: did.to_owned(),
        columns,
    };
    let Again::Columns(columns) = again else {
        let sql = format!(
            "DELETE FROM {} AS t WHERE {}",
            table.rows,
            of_key(table, line, 1)?
        );
        let deleted = transaction.execute(&sql, &[&key]).await?;
        if deleted != u64::from(exists) {
            return Err(not_one(line, deleted));
        }
        return Ok(done("deleted", Vec::new()));
    };
    // Of the other columns the table may not take what the line has.
    let tuple: BTreeMap<&String, &RawValue> = line
        .losing_tuple()
        .into_iter()
        .flatten()
        .filter(|(name, _)| columns.contains(name))
        .map(|(name, value)| (name, &**value))
        .collect();
    let json = serde_json::to_string(&tuple)?;
    let names: Vec<String> = columns.iter().map(|name| ident(name)).collect();
    let names = names.join(", ");
    let value = |name: &String| {
        let is_null = |value: &&RawValue| Unread::of(value).is_some_and(|value| value.is_json_null());
        match (tuple.get(name).copied().filter(is_null), table.types.get(name)) {
            (Some(_), Some(type_sql)) => format!("'null'::{type_sql}"),
            _ => format!("r.{}", ident(name)),
        }
    };
    let values = columns.iter().map(value).collect::<Vec<_>>().join(", ");
    let from = format!("FROM {}", record(table, columns.iter(), 1)?);
    let (sql, did) = if exists {
        let condition = of_key(table, line, 2)?;
        (
            format!(
                "UPDATE {} AS t SET ({names}) = (SELECT {values} {from}) WHERE {condition}",
                table.rows
            ),
            "updated",
        )
    } else {
        (
            format!(
                "INSERT INTO {} ({names}) OVERRIDING SYSTEM VALUE SELECT {values} {from} WHERE $2::text IS NOT NULL",
                table.name
            ),
            "inserted",
        )
    };
    let written = transaction.execute(&sql, &[&json, &key]).await?;
    if written != 1 {
        return Err(not_one(line, written));
    }
    Ok(done(did, columns))
}

fn not_one(line: &Line, written: u64) -> Error {
    Error::Refused(format!(
        "{written} row(s) were written instead of one: a trigger or row-level security of {} is in the way",
        line.table()
    ))
}

/// Which columns are written.
fn chosen(
    table: &Table,
    line: &Line,
    tuple: &Columns,
    exists: bool,
    how: &Replay,
) -> Result<Vec<String>, Error> {
    let columns = asked_for(table, line, tuple, exists, how)?;
    if exists {
        refuse_always(table, &columns)?;
    }
    if exists && !how.force {
        refuse_merged(line, &columns, how)?;
    }
    Ok(columns)
}

/// The server lets nobody update an identity column that is always generated; what it would say does not tell what to do.
fn refuse_always(table: &Table, columns: &[String]) -> Result<(), Error> {
    let (always, others): (Vec<&String>, Vec<&String>) =
        columns.iter().partition(|name| table.always.contains(name));
    if always.is_empty() {
        return Ok(());
    }
    let list = |names: Vec<&String>| {
        let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
        names.join(",")
    };
    let rest = match others.is_empty() {
        true => String::new(),
        false => format!("; --columns {} writes the others", list(others)),
    };
    Err(Error::Refused(format!(
        "column(s) {} are GENERATED ALWAYS AS IDENTITY, which no UPDATE can set in a row that is there{rest}",
        list(always)
    )))
}

/// What a column with a rule holds is made of what several wrote, and the log has it whole, as the loser had it: written again it would
/// undo what all others put into it, also the one that won. Either policy may be what counts: the row was merged by that of the line, and
/// what is written now is merged by that in force. What the server here refused
/// was never in the row, and lost to nobody.
fn refuse_merged(line: &Line, columns: &[String], how: &Replay) -> Result<(), Error> {
    if line.conflict_resolution == "skip" {
        return Ok(());
    }
    let rule = |column: &str| {
        let now = how.policies.as_ref();
        let now = now.and_then(|policies| policies.of(&line.schema_name, &line.table_name).rule_of(column));
        now.or_else(|| TablePolicy::rule_in(&line.policy, column))
    };
    let (mut merged, mut others) = (Vec::new(), Vec::new());
    for column in columns {
        match rule(column) {
            Some(rule) => merged.push(format!("{column} ({rule})")),
            None => others.push(column.as_str()),
        }
    }
    if merged.is_empty() {
        return Ok(());
    }
    let rest = if others.is_empty() {
        String::new()
    } else {
        format!("; --columns {} writes the others", others.join(","))
    };
    Err(Error::Refused(format!(
        "column(s) {} are merged of what several nodes wrote, and the log has the whole value as the write that lost left it: written again \
         it would undo what the others wrote there, at every node. Write by hand what the losing write added or changed, or use --force to \
         set the column(s) to the value of the log{rest}",
        merged.join(", ")
    )))
}

/// Those that are named, or all that were lost.
fn asked_for(
    table: &Table,
    line: &Line,
    tuple: &Columns,
    exists: bool,
    how: &Replay,
) -> Result<Vec<String>, Error> {
    let redacted = |name: &str| {
        line.redacted_columns
            .iter()
            .flatten()
            .any(|hidden| hidden == name)
    };
    if let Some(columns) = &how.columns {
        if !exists {
            return Err(Error::Refused(
                "the row is not there: without --columns it is inserted whole".to_owned(),
            ));
        }
        if let Some(wrong) = columns
            .iter()
            .find(|name| !tuple.contains_key(*name) || !table.writable.contains(name))
        {
            let why = if redacted(wrong) {
                "is redacted in the log"
            } else {
                "is no column of the losing row that can be written"
            };
            return Err(Error::Refused(format!("column {wrong} {why}")));
        }
        return Ok(columns.clone());
    }
    let wanted = |name: &&String| !exists || (line.is_lost(name) && !line.key.contains_key(*name));
    let hidden: Vec<&String> = line
        .redacted_columns
        .iter()
        .flatten()
        .filter(|name| !exists || line.is_lost(name))
        .collect();
    if !hidden.is_empty() && !how.force {
        let names: Vec<&str> = hidden.into_iter().map(String::as_str).collect();
        return Err(Error::Refused(format!(
            "column(s) {} are redacted in the log and cannot be written again; name the others with --columns, or use --force to \
             leave them out",
            names.join(", ")
        )));
    }
    let columns: Vec<String> = table
        .writable
        .iter()
        .filter(wanted)
        .filter(|name| tuple.contains_key(*name))
        .cloned()
        .collect();
    if columns.is_empty() {
        return Err(Error::Refused("nothing of it was lost".to_owned()));
    }
    Ok(columns)
}
