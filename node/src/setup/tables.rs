//! Which tables of a database are replicated, and why the others are not.
//!
//! In:   [`Facts`], the configuration            Out: a [`View`] of each table; plans that add tables to the publication
//!       ([`add`]) and take them out of it ([`remove`])
//! Invariants: the configuration's patterns choose; nothing here changes them
//! Not here: bringing rows that exist to the other nodes (`crate::verify`), printing

pub mod add;
pub mod remove;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anabranch_conflict::policy::Policies;
use anabranch_proto::schema::{full_name, name_fits, split_name};
use serde::Serialize;
use tokio_postgres::Client;

use super::error::Error;
use super::facts::Facts;
use super::finding::{Finding, Level};
use super::pattern::{Choice, Patterns};
use super::select::select;
use super::table::{Kind, Table};
use crate::publication::Kept;

/// Of the kinds in which a table can stand, what is and what the configuration wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Chosen, and in the publication.
    Replicated,
    /// Neither.
    NotReplicated,
    /// Chosen, and not in the publication: what is written to it stays here.
    NotYet,
    /// In the publication, and not chosen any more.
    NotChosen,
}

/// One table.
#[derive(Debug, Clone, Serialize)]
pub struct View {
    /// `schema.table`.
    pub table: String,
    /// How it stands.
    pub state: State,
    /// Why: the pattern that decides, in words.
    pub why: String,
    /// The partitioned table above it that the publication or a pattern means, as `schema.table`.
    pub partition_of: Option<String>,
    /// Replica identity: `default`, `full`, `nothing` or `index NAME`.
    pub identity: String,
    /// What decides its conflicts, as in the policy file.
    pub policy: String,
    /// Estimate of rows by the last ANALYZE or VACUUM; none before the first.
    pub rows: Option<u64>,
    /// Bytes on disk, with indexes and values stored out of line.
    pub bytes: u64,
    /// Why it could not be replicated, with remedies.
    pub obstacles: Vec<Finding>,
    /// What to do where state and configuration differ.
    pub advice: Option<String>,
    /// Changes of it that come from others are passed over here: it was taken out (`anabranch.removed_table`), or never was in
    /// replication. None that an alarm says was taken out of the publication by hand.
    pub passed_over: bool,
}

/// Rows, about, and bytes, by `pg_class.oid`.
pub type Sizes = HashMap<u32, (Option<u64>, u64)>;

const SIZES: &str = "SELECT c.oid, c.reltuples::int8, pg_total_relation_size(c.oid)::int8 FROM pg_class c \
    JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE c.relkind IN ('r', 'p', 'f') AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch')";

/// Reads how large the tables are.
///
/// # Errors
/// When the server answers with an error.
pub async fn sizes(client: &Client) -> Result<Sizes, Error> {
    let read = |source| Error::Read {
        what: "the sizes of the tables",
        source,
    };
    let mut sizes = Sizes::new();
    for row in client.query(SIZES, &[]).await.map_err(read)? {
        let (rows, bytes): (i64, i64) = (row.try_get(1).map_err(read)?, row.try_get(2).map_err(read)?);
        let size = (u64::try_from(rows).ok(), u64::try_from(bytes).unwrap_or(0));
        sizes.insert(row.try_get(0).map_err(read)?, size);
    }
    Ok(sizes)
}

/// How every table stands; views are left out unless they are named. `data_dir` is the daemon's, where it says which tables it has
/// seen in the publication.
#[must_use]
pub fn views(
    facts: &Facts,
    (patterns, data_dir): (&Patterns, &Path),
    policies: &Policies,
    sizes: &Sizes,
) -> Vec<View> {
    let kept = Kept::read(data_dir).ok().flatten();
    let selection = select(facts, patterns);
    let by_oid: HashMap<u32, &Table> = facts.tables.iter().map(|table| (table.oid, table)).collect();
    let chosen: Vec<u32> = selection.all.iter().map(|table| table.oid).collect();
    let published = |table: &Table| is_published(facts, table);
    let tables = facts.tables.iter().filter(|table| {
        table.kind != Kind::View || patterns.choose(&table.schema, &table.name) == Choice::ByName
    });
    tables
        .map(|table| {
            let name = name_of(table);
            let word = word_of(table);
            let (is_chosen, is_published) = (chosen.contains(&table.oid), published(table));
            let state = match (is_chosen, is_published) {
                (true, true) => State::Replicated,
                (false, false) => State::NotReplicated,
                (true, false) => State::NotYet,
                (false, true) => State::NotChosen,
            };
            // The one by whose oid it is listed or chosen.
            let above = table
                .ancestors
                .iter()
                .filter_map(|oid| by_oid.get(oid))
                .find(|above| published(above) || chosen.contains(&above.oid));
            let mut obstacles = if is_chosen || is_published || table.kind == Kind::View {
                table.obstacles(facts.server.major())
            } else {
                Vec::new()
            };
            obstacles.extend(
                selection
                    .findings
                    .iter()
                    .filter(|finding| {
                        finding.level == Level::Fail && is_chosen && finding.check == format!("table {name}")
                    })
                    .cloned(),
            );
            obstacles.dedup();
            let (rows, bytes) = sizes.get(&table.oid).copied().unwrap_or_default();
            View {
                why: why(table, patterns, above.copied()),
                partition_of: above.map(|above| word_of(above)),
                identity: match (table.identity.as_str(), &table.identity_index) {
                    ("f", _) => "full".to_owned(),
                    ("n", _) => "nothing".to_owned(),
                    ("i", Some(index)) => format!("index {index}"),
                    _ => "default".to_owned(),
                },
                policy: policies.of(&table.schema, &table.name).to_string(),
                rows: rows.filter(|_| table.kind == Kind::Table),
                bytes,
                advice: advice(state, &word, above.copied(), &obstacles),
                obstacles,
                passed_over: is_removed(facts, table)
                    || state == State::NotReplicated && is_apart(facts, table, kept.as_ref()),
                state,
                table: word,
            }
        })
        .collect()
}

fn is_removed(facts: &Facts, table: &Table) -> bool {
    let mut removed = facts.ours.removed.iter();
    removed.any(|(schema, name)| *schema == table.schema && *name == table.name)
}

/// Would what others send of a table that is neither chosen nor listed be passed over, as the daemon goes by it
/// (`crate::apply::passed_over`)?
fn is_apart(facts: &Facts, table: &Table, kept: Option<&Kept>) -> bool {
    let is_closed = facts
        .ours
        .publication
        .as_ref()
        .is_some_and(|publication| !publication.open_ended);
    let was_published = kept.is_some_and(|kept| kept.has_table(table.oid));
    is_closed && !was_published && matches!(table.kind, Kind::Table | Kind::Partitioned)
}

fn why(table: &Table, patterns: &Patterns, above: Option<&Table>) -> String {
    let decided = patterns.deciding(&table.schema, &table.name);
    match decided {
        Some(pattern) if pattern.exclude => format!("excluded by \"{pattern}\""),
        _ if above.is_some() => "its partitioned table is".to_owned(),
        Some(pattern) if pattern.is_exact() => format!("named by \"{pattern}\""),
        Some(_) if table.of_extension => "belongs to an extension".to_owned(),
        Some(_) if table.kind == Kind::Foreign => "is a foreign table".to_owned(),
        Some(pattern) => format!("chosen by \"{pattern}\""),
        None => "no pattern of postgres.tables".to_owned(),
    }
}

fn advice(state: State, name: &str, above: Option<&Table>, obstacles: &[Finding]) -> Option<String> {
    let name = above.map_or_else(|| name.to_owned(), word_of);
    match state {
        State::NotYet if !obstacles.is_empty() => {
            Some("what stands in the way is named by `anabranch doctor`".to_owned())
        }
        State::NotYet => Some(format!(
            "`anabranch tables add {name}` at the node that has its rows; `anabranch init` at the others"
        )),
        State::NotChosen => Some(format!(
            "`anabranch tables remove {name}`, or add \"{name}\" to postgres.tables"
        )),
        State::Replicated | State::NotReplicated => None,
    }
}

/// As `postgres.tables` and the command line name it: `schema.table`, with quotes where a dot is in the schema's name.
#[must_use]
pub fn word_of(table: &Table) -> String {
    full_name(&table.schema, &table.name)
}

/// `schema.table`, for people.
#[must_use]
pub fn name_of(table: &Table) -> String {
    format!("{}.{}", table.schema, table.name)
}

/// Does the publication list it, or a partitioned table above it?
#[must_use]
pub fn is_published(facts: &Facts, table: &Table) -> bool {
    facts.ours.publication.as_ref().is_some_and(|publication| {
        let mut oids = std::iter::once(&table.oid).chain(&table.ancestors);
        oids.any(|oid| publication.tables.contains(oid))
    })
}

/// Tables, and partitions under partitioned ones, that words of a command line mean: `schema.table` with `*` for anything, or a
/// table in any schema.
///
/// # Errors
/// The first that means none.
pub fn meant<'a>(facts: &'a Facts, words: &[String]) -> Result<Vec<&'a Table>, Error> {
    let mut out: BTreeMap<u32, &Table> = BTreeMap::new();
    for word in words {
        let (schema, name) = split_name(word);
        let fits = |table: &&Table| {
            let fits_schema = schema
                .as_ref()
                .is_none_or(|schema| name_fits(schema, &table.schema));
            fits_schema && name_fits(&name, &table.name)
        };
        let named: Vec<&Table> = facts
            .tables
            .iter()
            .filter(|table| matches!(table.kind, Kind::Table | Kind::Partitioned))
            .filter(fits)
            .collect();
        if named.is_empty() {
            return Err(Error::Refused(format!(
                "there is no table `{word}` here; `anabranch tables list` shows all"
            )));
        }
        out.extend(named.into_iter().map(|table| (table.oid, table)));
    }
    let under = |table: &&Table| table.ancestors.iter().any(|oid| out.contains_key(oid));
    let more: Vec<&Table> = facts.tables.iter().filter(under).collect();
    out.extend(more.into_iter().map(|table| (table.oid, table)));
    let mut tables: Vec<&Table> = out.into_values().collect();
    tables.sort_by(|a, b| (&a.schema, &a.name).cmp(&(&b.schema, &b.name)));
    Ok(tables)
}
