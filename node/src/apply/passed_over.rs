//! Tables that are not replicated here: what others send of them is passed over.
//!
//! In:   `anabranch.removed_table`, the catalog, `postgres.tables`            Out: changes, without those of such tables
//! Holds: the tables' names, and how many changes of each were passed over since the start
//! Must never: touch our own tables, or another table of the same transaction; pass over a table that is published here, or that
//!        was until somebody took it out of the publication by hand
//! On crash: read again, before anything is applied
//!
//! They are those that were taken out of replication here, and those that are here and were never in it: `postgres.tables` does not
//! choose them, and the publication does not have them. What is written to such a table here goes to nobody, so it is this node's own,
//! and rows of others would overwrite it with nobody the wiser. One that is not here at all is none of them: its rows wait in the quarantine.
//!
//! The transactions themselves count as applied: the others need not keep them, and no stream waits. So what was passed over does
//! not come again when the table is added (again); `anabranch tables add` compares all rows. Whoever looks into the journal finds it all
//! the same, and so do the index that is rebuilt and what is found again after a start: nothing is made of that ([`PassedOver::holds`]).
//!
//! One that the alarm `publication` names, since it was taken out by hand, goes on being applied: people are told to give the others
//! its rows as they are here, which must not be older ones than theirs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anabranch_proto::schema::{TableDesc, full_name};
use anabranch_proto::txn::Change;
use tokio_postgres::{Client, Row};

use crate::config::Config;
use crate::publication::Kept;
use crate::resolve::Resolver;
use crate::setup::pattern::{Choice, Patterns};
use crate::shared::lock;

/// Schema and name.
pub(crate) type Name = (String, String);

const HAS_REMOVED: &str = "SELECT to_regclass('anabranch.removed_table') IS NOT NULL";
const REMOVED: &str = "SELECT schema_name, table_name FROM anabranch.removed_table";
const PUBLICATION: &str = "SELECT oid, puballtables FROM pg_publication WHERE pubname = $1";
/// Tables that the publication `$1` does not list, and all partitioned ones, which those may be partitions of; `$2` and `$3`: of tables
/// only this one. Takes no locks, so that it waits for nobody, and joins by indexes alone: the apply session knows no other joins.
const TABLES: &str = "SELECT c.oid, n.nspname::text, c.relname::text, x.published, \
    EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'), \
    CASE WHEN c.relispartition THEN ARRAY(SELECT relid::oid FROM pg_partition_ancestors(c.oid) WHERE relid <> c.oid) \
        ELSE '{}' END \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM pg_publication_rel r WHERE r.prrelid = c.oid AND r.prpubid = $1) \
        OR EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnnspid = n.oid AND s.pnpubid = $1) AS published) x \
    WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch') \
      AND (c.relkind = 'p' OR NOT x.published) \
      AND ($2::text IS NULL OR c.relkind = 'p' OR n.nspname = $2 AND c.relname = $3)";
/// Are rows of these in quarantine?
const HELD: &str = "SELECT EXISTS (SELECT FROM anabranch.quarantine q, unnest($1::text[], $2::text[]) o (schema_name, table_name) \
    WHERE q.schema_name = o.schema_name AND q.table_name = o.table_name)";
/// They were refused before it was known that the table is passed over: with their lines of the log nothing is left for a person to do.
const CLEAN: &str = "WITH over AS (SELECT * FROM unnest($1::text[], $2::text[]) o (schema_name, table_name)), \
    gone AS (DELETE FROM anabranch.quarantine q USING over o \
        WHERE q.schema_name = o.schema_name AND q.table_name = o.table_name RETURNING q.schema_name, q.table_name), \
    told AS (UPDATE anabranch.conflict_history h SET status = 'acknowledged', reviewed_by = 'anabranch', \
        reviewed_at = clock_timestamp(), note = 'the table is not replicated here' \
        WHERE (h.schema_name, h.table_name) IN (SELECT schema_name, table_name FROM gone) \
        AND h.conflict_resolution = 'skip' AND h.status = 'new') \
    SELECT count(*) FROM gone";

/// Tables that `anabranch tables remove` has taken out of replication here. A database that was set up by an older release has none.
async fn removed(client: &Client) -> Result<BTreeSet<Name>, tokio_postgres::Error> {
    if !client.query_one(HAS_REMOVED, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(BTreeSet::new());
    }
    let rows = client.query(REMOVED, &[]).await?;
    let names = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    names.collect()
}

/// Everything that is passed over here: where no daemon runs that knows it.
///
/// # Errors
/// When the server answers with one.
pub(crate) async fn all(client: &Client, config: &Config) -> Result<BTreeSet<Name>, tokio_postgres::Error> {
    let mut names = removed(client).await?;
    let rule = Rule::of(config);
    if let Some(outside) = rule.outside(client, None).await? {
        names.extend(rule.never_published(outside).map(|(name, _)| name));
    }
    Ok(names)
}

/// By what it is told which tables are not replicated here.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    /// None where they cannot be read, which a daemon's can: nothing is outside of them then.
    patterns: Option<Patterns>,
    publication: String,
    data_dir: PathBuf,
}

impl Rule {
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            patterns: Patterns::parse(&config.postgres.tables).ok(),
            publication: config.postgres.publication.clone(),
            data_dir: config.node.data_dir.clone(),
        }
    }

    /// Is this table here, and never was replicated?
    ///
    /// # Errors
    /// When the server answers with one.
    pub(crate) async fn passes(
        &self,
        client: &Client,
        schema: &str,
        name: &str,
    ) -> Result<bool, tokio_postgres::Error> {
        let outside = self.outside(client, Some((schema, name))).await?;
        let named = |found: &Name| found.0 == schema && found.1 == name;
        let mut names = self.never_published(outside.unwrap_or_default());
        Ok(names.any(|(found, _)| named(&found)))
    }

    /// Tables that are here, not chosen and not published, with their oids. None where there is no publication, which says nothing of
    /// what is meant: the daemon ends for that.
    async fn outside(
        &self,
        client: &Client,
        only: Option<(&str, &str)>,
    ) -> Result<Option<BTreeMap<Name, u32>>, tokio_postgres::Error> {
        let Some(patterns) = &self.patterns else {
            return Ok(None);
        };
        let publication = client.query_opt(PUBLICATION, &[&self.publication]).await?;
        let Some(publication) = publication else {
            return Ok(None);
        };
        let (publication, publishes_all): (u32, bool) = (publication.try_get(0)?, publication.try_get(1)?);
        if publishes_all {
            return Ok(Some(BTreeMap::new()));
        }
        let (schema, name) = only.unzip();
        let rows = client.query(TABLES, &[&publication, &schema, &name]).await?;
        let tables = rows.iter().map(Outline::read).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(outside(&tables, patterns)))
    }

    /// Those of them that no daemon has seen in the publication.
    fn never_published(&self, outside: BTreeMap<Name, u32>) -> impl Iterator<Item = (Name, u32)> {
        let kept = match outside.is_empty() {
            true => Ok(None),
            false => Kept::read(&self.data_dir),
        };
        // What it says cannot be told: they are applied, as they may have been before.
        let is_unknown = kept.is_err();
        if let Err(error) = &kept {
            tracing::warn!(%error, "publication.json in node.data_dir cannot be read");
        }
        let kept = kept.ok().flatten();
        let was_published =
            move |oid: u32| is_unknown || kept.as_ref().is_some_and(|kept| kept.has_table(oid));
        outside.into_iter().filter(move |(_, oid)| !was_published(*oid))
    }
}

/// A table, as far as it matters here.
struct Outline {
    oid: u32,
    name: Name,
    published: bool,
    of_extension: bool,
    /// Partitioned tables above it.
    ancestors: Vec<u32>,
}

impl Outline {
    /// Of a row of [`TABLES`].
    fn read(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            oid: row.try_get(0)?,
            name: (row.try_get(1)?, row.try_get(2)?),
            published: row.try_get(3)?,
            of_extension: row.try_get(4)?,
            ancestors: row.try_get(5)?,
        })
    }

    /// Is it in replication by itself, or meant to be? As `init` chooses.
    fn is_in(&self, patterns: &Patterns) -> bool {
        let chosen = match patterns.choose(&self.name.0, &self.name.1) {
            Choice::Out => false,
            Choice::ByName => true,
            Choice::ByWildcard => !self.of_extension,
        };
        self.published || chosen
    }
}

/// Those that are not in replication, neither by themselves nor as partitions.
fn outside(tables: &[Outline], patterns: &Patterns) -> BTreeMap<Name, u32> {
    let is_in: HashMap<u32, bool> = tables
        .iter()
        .map(|table| (table.oid, table.is_in(patterns)))
        .collect();
    let is_in = |oid: &u32| is_in.get(oid).copied().unwrap_or(false);
    let out = tables
        .iter()
        .filter(|table| !is_in(&table.oid) && !table.ancestors.iter().any(is_in));
    out.map(|table| (table.name.clone(), table.oid)).collect()
}

/// What is known of one of the tables.
#[derive(Debug, Clone, Copy, Default)]
struct Passed {
    /// It was taken out of replication here; else it never was in it.
    removed: bool,
    /// Changes since the start.
    count: u64,
}

/// While it lives nobody else reads which tables they are.
pub(crate) type Reading = tokio::sync::OwnedMutexGuard<()>;

/// The tables, and what of them was passed over.
#[derive(Debug, Default)]
pub struct PassedOver {
    /// By schema, then by name.
    tables: Mutex<BTreeMap<String, BTreeMap<String, Passed>>>,
    /// Are there any? Most nodes have none, and every change that comes in asks.
    has_any: AtomicBool,
    /// Held from the look at the catalog on: what an earlier one has found replaces nothing that a later one has.
    reading: Arc<tokio::sync::Mutex<()>>,
}

impl PassedOver {
    /// Reads which tables they are.
    ///
    /// # Errors
    /// When the server answers with an error.
    pub(crate) async fn read(&self, client: &Client, rule: &Rule) -> Result<(), tokio_postgres::Error> {
        let _first = self.reading.lock().await;
        self.read_alone(client, rule).await
    }

    /// The same, as the open transaction of `client` has it; the others see what was before that until it has ended, so none of them reads while
    /// what is put into `reading` is there.
    ///
    /// # Errors
    /// When the server answers with an error.
    pub(crate) async fn read_within(
        &self,
        client: &Client,
        rule: &Rule,
        reading: &mut Option<Reading>,
    ) -> Result<(), tokio_postgres::Error> {
        if reading.is_none() {
            *reading = Some(Arc::clone(&self.reading).lock_owned().await);
        }
        self.read_alone(client, rule).await
    }

    async fn read_alone(&self, client: &Client, rule: &Rule) -> Result<(), tokio_postgres::Error> {
        let removed = removed(client).await?;
        let outside = rule.outside(client, None).await?;
        let known: BTreeMap<Name, Passed> = {
            let known = lock(&self.tables);
            let all = known.iter().flat_map(|(schema, tables)| {
                let of = move |(name, passed): (&String, &Passed)| ((schema.clone(), name.clone()), *passed);
                tables.iter().map(of)
            });
            all.collect()
        };
        let mut now: BTreeMap<Name, Passed> = BTreeMap::new();
        match outside {
            // It is not known what is meant: as before.
            None => now.extend(known.clone().into_iter().filter(|(_, passed)| !passed.removed)),
            Some(outside) => {
                let (old, new): (BTreeMap<Name, u32>, _) = outside
                    .into_iter()
                    .partition(|(name, _)| known.get(name).is_some_and(|passed| !passed.removed));
                let names = old.into_iter().chain(rule.never_published(new));
                now.extend(names.map(|(name, _)| (name, Passed::default())));
            }
        }
        for name in removed {
            if !known.get(&name).is_some_and(|passed| passed.removed) {
                let (schema, table) = &name;
                tracing::info!(
                    table = format!("{schema}.{table}"),
                    "passed over: removed from replication here"
                );
            }
            now.entry(name).or_default().removed = true;
        }
        let mut known = lock(&self.tables);
        let mut tables: BTreeMap<String, BTreeMap<String, Passed>> = BTreeMap::new();
        for ((schema, name), mut passed) in now {
            // As it is by now: the applier counts meanwhile.
            let counted = known.get(&schema).and_then(|tables| tables.get(&name));
            passed.count = counted.map_or(0, |counted| counted.count);
            tables.entry(schema).or_default().insert(name, passed);
        }
        self.has_any.store(!tables.is_empty(), Ordering::Release);
        *known = tables;
        Ok(())
    }

    /// Takes rows of the tables out of the quarantine. The session must be let write. The resolver forgets them whoever took them out
    /// (`anabranch tables remove` does): what it takes for waiting would never be mended once the table is added.
    ///
    /// # Errors
    /// When the server answers with an error.
    pub(crate) async fn clean(
        &self,
        client: &Client,
        resolver: &Mutex<Resolver>,
    ) -> Result<(), tokio_postgres::Error> {
        let (schemas, names): (Vec<String>, Vec<String>) = {
            let known = lock(&self.tables);
            let all = known
                .iter()
                .flat_map(|(schema, tables)| tables.keys().map(move |name| (schema.clone(), name.clone())));
            all.unzip()
        };
        if schemas.is_empty() {
            return Ok(());
        }
        let held: bool = client.query_one(HELD, &[&schemas, &names]).await?.try_get(0)?;
        if held {
            let gone: i64 = client.query_one(CLEAN, &[&schemas, &names]).await?.try_get(0)?;
            tracing::info!(
                rows = gone,
                "left the quarantine: their tables are not replicated here"
            );
        }
        let tables = schemas.iter().zip(&names);
        let tables = tables.map(|(schema, name)| (schema.as_str(), name.as_str()));
        lock(resolver).forget_quarantined(tables);
        Ok(())
    }

    /// What is left of a change; none when all of it is passed over.
    pub fn sift(&self, change: Change) -> Option<Change> {
        if !self.has_any.load(Ordering::Acquire) {
            return Some(change);
        }
        let mut known = lock(&self.tables);
        let mut is_passed = |table: &TableDesc| {
            let tables = known.get_mut(table.schema.as_str());
            let passed = tables.and_then(|tables| tables.get_mut(table.name.as_str()));
            if let Some(passed) = &passed
                && passed.count == 0
                && !passed.removed
            {
                tracing::warn!(
                    table = format!("{}.{}", table.schema, table.name),
                    "passed over: another node sends this table, and postgres.tables of this node does not choose it"
                );
            }
            passed.map(|passed| passed.count += 1).is_some()
        };
        match change {
            Change::Put { ref table, .. } | Change::Delete { ref table, .. } => {
                (!is_passed(table)).then_some(change)
            }
            Change::Truncate {
                mut tables,
                cascade,
                restart_identity,
            } => {
                tables.retain(|table| !is_passed(table));
                (!tables.is_empty()).then_some(Change::Truncate {
                    tables,
                    cascade,
                    restart_identity,
                })
            }
        }
    }

    /// Is this one of the tables? Its rows are this node's own business: nobody's version says what they must be.
    #[must_use]
    pub fn holds(&self, table: &TableDesc) -> bool {
        let known = lock(&self.tables);
        let tables = known.get(table.schema.as_str());
        tables.is_some_and(|tables| tables.contains_key(table.name.as_str()))
    }

    /// Each table that was taken out here, or that others have sent, by its [`full_name`], with how many changes were passed over since
    /// the start.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let known = lock(&self.tables);
        let all = known.iter().flat_map(|(schema, tables)| {
            let said = tables
                .iter()
                .filter(|(_, passed)| passed.removed || passed.count > 0);
            said.map(move |(name, passed)| (full_name(schema, name), passed.count))
        });
        all.collect()
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::row::{Cell, RowImage};

    use super::*;

    fn table(name: &str) -> Arc<TableDesc> {
        Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: name.to_owned(),
            columns: Vec::new(),
            key: Vec::new(),
            identity_full: false,
        })
    }

    #[test]
    fn only_the_tables_named_are_passed_over() {
        let over = PassedOver::default();
        let delete = |name| Change::Delete {
            table: table(name),
            key: RowImage::build([Cell::Null].into_iter()),
        };
        assert!(over.sift(delete("gone")).is_some());
        let passed = BTreeMap::from([
            (
                "gone".to_owned(),
                Passed {
                    removed: true,
                    count: 0,
                },
            ),
            ("own".to_owned(), Passed::default()),
        ]);
        lock(&over.tables).insert("s".to_owned(), passed);
        over.has_any.store(true, Ordering::Release);
        assert!(over.sift(delete("gone")).is_none());
        assert!(over.sift(delete("here")).is_some());
        let both = Change::Truncate {
            tables: vec![table("gone"), table("here")],
            cascade: false,
            restart_identity: false,
        };
        let left = over.sift(both).unwrap();
        assert_eq!(left.tables().len(), 1);
        // Of one that was never in it only what others do send is told.
        assert_eq!(over.counts(), BTreeMap::from([("s.gone".to_owned(), 2)]));
        assert!(over.sift(delete("own")).is_none());
        assert_eq!(over.counts().get("s.own"), Some(&1));
        assert!(over.holds(&table("gone")) && over.holds(&table("own")) && !over.holds(&table("here")));
    }

    #[test]
    fn a_partition_is_in_replication_with_its_table_and_an_extensions_table_only_by_name() {
        let outline = |oid, name: &str, ancestors: &[u32]| Outline {
            oid,
            name: ("s".to_owned(), name.to_owned()),
            published: false,
            of_extension: false,
            ancestors: ancestors.to_vec(),
        };
        let tables = [
            outline(1, "log", &[]),
            outline(2, "log_1", &[1]),
            Outline {
                published: true,
                ..outline(3, "old", &[])
            },
            outline(4, "old_1", &[3]),
            outline(5, "x_own", &[]),
            outline(6, "x_own_1", &[5]),
            Outline {
                of_extension: true,
                ..outline(7, "w_ext", &[])
            },
            outline(8, "w_here", &[]),
        ];
        let chosen = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
            let out = outside(&tables, &Patterns::parse(&texts).unwrap());
            out.into_values().collect::<Vec<u32>>()
        };
        assert_eq!(chosen(&["s.log", "s.w_*"]), [7, 5, 6]);
        assert_eq!(chosen(&["s.*", "!s.x_own*", "s.w_ext"]), [5, 6]);
    }
}
