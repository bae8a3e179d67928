//! What the catalog says of each table, and what of it stands in the way of replication.

use std::collections::HashMap;

use anabranch_proto::schema::full_name;
use tokio_postgres::Client;

use super::finding::Finding;
use super::pairwise;
use super::sql::{ident, literal, qualified};
use crate::apply::catalog::unique_keys;

/// `pg_class.relkind`, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An ordinary table, or a partition that holds rows.
    Table,
    /// A partitioned table: holds no rows itself.
    Partitioned,
    /// A foreign table.
    Foreign,
    /// A view or a materialized view.
    View,
}

/// One relation.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // independent facts of pg_class
pub struct Table {
    /// `pg_class.oid`.
    pub oid: u32,
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// `p` permanent, `u` unlogged, `t` temporary.
    pub persistence: String,
    /// Oids of the partitioned tables above it.
    pub ancestors: Vec<u32>,
    /// Replica identity: `d`, `n`, `f`, `i`.
    pub identity: String,
    /// Index of identity `i`.
    pub identity_index: Option<String>,
    /// Has it a TOAST table, so that an UPDATE may leave a value unsent?
    pub has_toast: bool,
    /// Stored generated columns.
    pub generated_stored: bool,
    /// Virtual generated columns (18).
    pub generated_virtual: bool,
    /// Does row-level security bind the daemon's role, unless it has BYPASSRLS? (It does not bind the owner, unless it is forced.)
    pub row_security: bool,
    /// Foreign keys that it holds.
    pub foreign_keys: i32,
    /// Those of them by whose columns no index finds its rows, by name.
    pub foreign_keys_unindexed: Vec<String>,
    /// CHECK constraints.
    pub checks: i32,
    /// Exclusion constraints, and unique keys of periods (18, `WITHOUT OVERLAPS`).
    pub exclusions: i32,
    /// Those of them that are unique keys of periods.
    pub periods: i32,
    /// Unique constraints or indexes besides the primary key.
    pub uniques: i32,
    /// Those of an ordinary table by which a row can be refused for another one.
    pub unique_keys: Vec<pairwise::Key>,
    /// Triggers and rules that fire for the daemon too (ALWAYS or REPLICA), by name.
    pub replica_triggers: Vec<String>,
    /// Member of an extension?
    pub of_extension: bool,
    /// Does the session's role own it?
    pub owned: bool,
    /// Primary key.
    pub key: Option<Key>,
    /// Columns whose values cannot be brought to other nodes.
    pub misfits: Vec<Misfit>,
    /// Privileges on the table that the daemon's role lacks.
    pub lacks: Vec<String>,
    /// Schemas (of the table and of its columns' types) that the daemon's role may not use.
    pub lacks_schemas: Vec<String>,
}

/// A primary key.
#[derive(Debug, Clone, Default)]
pub struct Key {
    /// Columns in key order.
    pub columns: Vec<KeyColumn>,
    /// DEFERRABLE?
    pub deferrable: bool,
}

/// A column of a primary key.
#[derive(Debug, Clone)]
pub struct KeyColumn {
    /// Name.
    pub name: String,
    /// Type as SQL spells it.
    pub type_name: String,
    /// Name in `pg_type` of the type under all domains, with its schema unless `pg_catalog`.
    pub base_type: String,
    /// Is the base type an enum?
    pub is_enum: bool,
    /// Do equal values have equal bytes under its collation?
    pub deterministic: bool,
    /// Generated column?
    pub generated: bool,
}

/// A column whose values cannot be brought to other nodes.
#[derive(Debug, Clone)]
pub struct Misfit {
    /// Its name.
    pub column: String,
    /// Its type, as SQL spells it.
    pub type_name: String,
    /// Why not.
    pub why: Why,
}

/// Why a column's values cannot be brought to other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// They are numbers of catalog objects ([`OBJECT_TYPES`]).
    Number,
    /// Its type is made of one without a binary form, and the server tries to send it in binary all the same.
    NoForm,
    /// It is of a domain that refuses NULL, and a row that comes in has nothing else for it.
    Domain,
    /// It is an array or of a domain, and stands beside a column without a binary form.
    Beside,
}

/// Types whose values are numbers of objects in the catalogs of one server. Only their texts are names.
pub const OBJECT_TYPES: [&str; 11] = [
    "regclass",
    "regcollation",
    "regconfig",
    "regdictionary",
    "regnamespace",
    "regoper",
    "regoperator",
    "regproc",
    "regprocedure",
    "regrole",
    "regtype",
];

/// What is wrong with the column `a`, of a type that is `y` below all domains, and whose elements are `e` if it is an array: 'number', 'no form',
/// 'domain', 'beside' ([`Why`]) or NULL. Rows are written as values of the table's row type, whose columns the server reads each by its type: for one that
/// is generated, or has no binary form, that is NULL (`crate::apply::plan`). `base` has the domains of each type.
const MISFIT: &str = "CASE
    WHEN a.attgenerated = '' AND EXISTS (SELECT FROM pg_type p WHERE p.oid = ANY (y.oid || @PARTS@)
        AND p.typnamespace = 'pg_catalog'::regnamespace AND p.typname IN (@OBJECT_TYPES@)) THEN 'number'
    WHEN y.typsend <> 0 AND EXISTS (SELECT FROM pg_type p WHERE p.oid = ANY (@PARTS@) AND (p.typsend = 0 OR p.typreceive = 0)) THEN 'no form'
    WHEN (a.attgenerated <> '' OR y.typsend = 0 OR y.typreceive = 0) AND EXISTS (
        SELECT FROM base l JOIN pg_type d ON d.oid = l.base AND d.typtype = 'd' WHERE l.typ = a.atttypid AND (d.typnotnull OR EXISTS (
            SELECT FROM pg_constraint k WHERE k.contypid = d.oid AND k.contype = 'c'
                AND pg_get_constraintdef(k.oid) ~* 'VALUE IS NOT NULL'))) THEN 'domain'
    WHEN a.attgenerated = '' AND y.typsend <> 0 AND y.typreceive <> 0 AND (y.oid <> a.atttypid OR format_type(y.oid, NULL) LIKE '%[]')
        AND EXISTS (SELECT FROM pg_attribute o JOIN pg_type ot ON ot.oid = o.atttypid
            WHERE o.attrelid = a.attrelid AND o.attnum > 0 AND NOT o.attisdropped AND (ot.typsend = 0 OR ot.typreceive = 0))
        AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary AND a.attnum = ANY (i.indkey)) THEN 'beside'
    END";

/// What values of the type are made of: elements, fields, bounds.
const PARTS: &str = "ARRAY(SELECT e.oid WHERE e.oid IS NOT NULL
        UNION ALL SELECT f.atttypid FROM pg_attribute f WHERE f.attrelid = y.typrelid AND f.attnum > 0 AND NOT f.attisdropped
        UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE y.oid IN (r.rngtypid, r.rngmultitypid))";

/// [`MISFIT`] in SQL.
pub(crate) fn misfit_sql() -> String {
    let types = OBJECT_TYPES.map(literal).join(", ");
    MISFIT.replace("@PARTS@", PARTS).replace("@OBJECT_TYPES@", &types)
}

/// Privileges that the daemon needs on a replicated table.
pub const PRIVILEGES: [&str; 5] = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE"];

/// Types whose equal values can be given equal bytes: what a row key may be made of. Floats (0 and -0), intervals
/// ('1 day' and '24:00'), jsonb, citext, arrays and ranges have equal values that look different.
pub const KEY_TYPES: [&str; 20] = [
    "bool",
    "bytea",
    "char",
    "name",
    "int8",
    "int2",
    "int4",
    "text",
    "oid",
    "cidr",
    "inet",
    "macaddr",
    "macaddr8",
    "bpchar",
    "varchar",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "uuid",
];

impl Table {
    /// `schema.name`, quoted as needed.
    #[must_use]
    pub fn sql_name(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    /// Why the table cannot be replicated: every reason, with a remedy. `major` is the server's version.
    #[must_use]
    pub fn obstacles(&self, major: i32) -> Vec<Finding> {
        let name = self.sql_name();
        let check = format!("table {}.{}", self.schema, self.name);
        let exclude = format!(
            "or exclude it: add \"!{}\" to postgres.tables",
            full_name(&self.schema, &self.name)
        );
        let mut out = Vec::new();
        match self.kind {
            Kind::Foreign => {
                out.push(Finding::fail(
                    &check,
                    "is a foreign table; its rows are not in this server's WAL",
                    &exclude,
                ));
                return out;
            }
            Kind::View => {
                out.push(Finding::fail(
                    &check,
                    "is a view; only tables are replicated",
                    &exclude,
                ));
                return out;
            }
            Kind::Table | Kind::Partitioned => {}
        }
        match self.persistence.as_str() {
            "u" => out.push(Finding::fail(
                &check,
                "is unlogged; its rows are not in the WAL",
                format!("ALTER TABLE {name} SET LOGGED; {exclude}"),
            )),
            "t" => out.push(Finding::fail(
                &check,
                "is temporary; its rows are not in the WAL",
                &exclude,
            )),
            _ => {}
        }
        match &self.key {
            None => out.push(Finding::fail(
                &check,
                "has no primary key; publishing it would break its users' UPDATE and DELETE",
                format!("ALTER TABLE {name} ADD PRIMARY KEY (...); {exclude}"),
            )),
            Some(key) => key.obstacles(&check, &name, &exclude, &mut out),
        }
        out.extend(
            self.misfits
                .iter()
                .map(|misfit| misfit.finding(&check, &name, &exclude)),
        );
        if major >= 18 && self.generated_virtual && self.has_toast {
            out.push(Finding::fail(
                &check,
                "has virtual generated columns and columns that may be stored out of line: with the replica identity \
                 FULL that these need, version 18 refuses its users' UPDATE",
                format!("make the generated columns STORED, {exclude}"),
            ));
        }
        out
    }

    /// What works, but not as one might think.
    #[must_use]
    pub fn remarks(&self) -> Vec<Finding> {
        let check = format!("table {}.{}", self.schema, self.name);
        let mut out = Vec::new();
        if self.foreign_keys > 0 {
            out.push(Finding::warn(
                &check,
                format!(
                    "has {} foreign key(s), which are not enforced on replicated rows",
                    self.foreign_keys
                ),
                "concurrent writers can leave a row without its parent; it is in the conflict log as foreign_key_missing, and stays; \
                 with foreign_keys = \"delete_child\" in the policy it is deleted, with \"restore_parent\" its parent comes back",
            ));
        }
        if !self.foreign_keys_unindexed.is_empty() {
            out.push(Finding::warn(
                &check,
                format!(
                    "has no index on the columns of its foreign key(s) {}",
                    self.foreign_keys_unindexed.join(", ")
                ),
                "each deletion of a parent scans the table, at every node; CREATE INDEX on the referring columns",
            ));
        }
        if self.checks > 0 {
            out.push(Finding::warn(
                &check,
                format!(
                    "has {} CHECK constraint(s), which are enforced on replicated rows",
                    self.checks
                ),
                "keep them the same on every node; a row that violates one here is quarantined",
            ));
        }
        if self.uniques > 0 {
            out.push(Finding::warn(
                &check,
                format!("has {} unique constraint(s) besides the primary key", self.uniques),
                "uniqueness across concurrent writers is resolved afterwards; the losing row is in the conflict log",
            ));
        }
        if !self.replica_triggers.is_empty() {
            out.push(Finding::warn(
                &check,
                format!("fires ALWAYS or REPLICA triggers or rules on replicated rows: {}", self.replica_triggers.join(", ")),
                "what they write then stays at this node alone: it does not travel, and may be written over without a line in the \
                 conflict log; a row that one refuses or leaves out (by returning NULL) goes to quarantine here; use ordinary \
                 triggers, which fire where the row is written and whose writes travel",
            ));
        }
        out
    }

    /// Must its replica identity be FULL? Values stored out of line and unchanged are not in an UPDATE otherwise.
    #[must_use]
    pub fn needs_full(&self) -> bool {
        self.kind == Kind::Table && self.has_toast
    }
}

impl Misfit {
    fn finding(&self, check: &str, table: &str, exclude: &str) -> Finding {
        let (column, of) = (&self.column, &self.type_name);
        let (found, remedy) = match self.why {
            Why::Number => (
                format!(
                    "has a column {column} of type {of}, whose values are numbers of objects in this server's catalogs: at another \
                     node the same number is another object, or none"
                ),
                format!(
                    "keep the name: ALTER TABLE {table} ALTER COLUMN {} TYPE text{}",
                    ident(column),
                    if of.ends_with("[]") { "[]" } else { "" }
                ),
            ),
            Why::NoForm => (
                format!(
                    "has a column {column} of type {of}, which is made of a type without a binary form: the server could not send its rows"
                ),
                "keep such values one in a column each, or as text".to_owned(),
            ),
            Why::Beside => (
                format!(
                    "has a column {column} of type {of}, an array or a domain, beside a column of a type without a binary form: no row of \
                     another node could be written"
                ),
                "keep one of them as text, or in a table of its own".to_owned(),
            ),
            Why::Domain => (
                format!(
                    "has a column {column} of the domain {of}, which refuses NULL, and the column is generated or its type has no binary \
                     form: no row of another node could be written"
                ),
                "give the column the type that the domain is over, with NOT NULL and CHECK of its own"
                    .to_owned(),
            ),
        };
        Finding::fail(check, found, format!("{remedy}; {exclude}"))
    }
}

impl Key {
    fn obstacles(&self, check: &str, table: &str, exclude: &str, out: &mut Vec<Finding>) {
        if self.deferrable {
            out.push(Finding::fail(
                check,
                "has a DEFERRABLE primary key, which cannot identify rows",
                format!("ALTER TABLE {table} DROP CONSTRAINT ..., ADD PRIMARY KEY (...) without DEFERRABLE; {exclude}"),
            ));
        }
        for column in &self.columns {
            let name = &column.name;
            if column.generated {
                out.push(Finding::fail(
                    check,
                    format!("has a generated column in its primary key: {name}"),
                    format!(
                        "ALTER TABLE {table} ALTER COLUMN {} DROP EXPRESSION; {exclude}",
                        ident(name)
                    ),
                ));
            }
            if !column.is_enum
                && column.base_type != "numeric"
                && !KEY_TYPES.contains(&column.base_type.as_str())
            {
                out.push(Finding::fail(
                    check,
                    format!(
                        "has a primary key column {name} of type {}, in which equal values can look different",
                        column.type_name
                    ),
                    format!("use an integer, uuid, text, date or timestamp type for the key; {exclude}"),
                ));
            }
            if !column.deterministic {
                out.push(Finding::fail(
                    check,
                    format!("has a primary key column {name} with a nondeterministic collation"),
                    format!(
                        "ALTER TABLE {table} ALTER COLUMN {} TYPE {} COLLATE \"C\"; {exclude}",
                        ident(name),
                        column.type_name
                    ),
                ));
            }
        }
    }
}

/// Reads every relation outside the system schemas and ours. `role` is the daemon's role, if it exists.
pub(super) async fn read(client: &Client, role: Option<u32>) -> Result<Vec<Table>, tokio_postgres::Error> {
    let mut keys = read_keys(client).await?;
    let mut misfits = read_misfits(client).await?;
    let mut unique_keys = pairwise::read(client, &unique_keys(client).await?).await?;
    let rows = client.query(TABLES, &[&role]).await?;
    rows.iter()
        .map(|row| {
            let oid = row.try_get(0)?;
            let kind: String = row.try_get(3)?;
            let name: (String, String) = (row.try_get(1)?, row.try_get(2)?);
            Ok(Table {
                oid,
                unique_keys: unique_keys
                    .remove(&name)
                    .map_or_else(Vec::new, |keyed| keyed.keys),
                schema: name.0,
                name: name.1,
                kind: match kind.as_str() {
                    "r" => Kind::Table,
                    "p" => Kind::Partitioned,
                    "f" => Kind::Foreign,
                    _ => Kind::View,
                },
                persistence: row.try_get(4)?,
                ancestors: row.try_get(5)?,
                identity: row.try_get(6)?,
                identity_index: row.try_get(7)?,
                has_toast: row.try_get(8)?,
                generated_stored: row.try_get(9)?,
                generated_virtual: row.try_get(10)?,
                row_security: row.try_get(11)?,
                foreign_keys: row.try_get(12)?,
                checks: row.try_get(13)?,
                exclusions: row.try_get(14)?,
                periods: row.try_get(22)?,
                uniques: row.try_get(15)?,
                replica_triggers: row.try_get(16)?,
                of_extension: row.try_get(17)?,
                owned: row.try_get(18)?,
                lacks: row.try_get(19)?,
                lacks_schemas: row.try_get(20)?,
                foreign_keys_unindexed: row.try_get(21)?,
                key: keys.remove(&oid),
                misfits: misfits.remove(&oid).unwrap_or_default(),
            })
        })
        .collect()
}

async fn read_keys(client: &Client) -> Result<HashMap<u32, Key>, tokio_postgres::Error> {
    let mut keys: HashMap<u32, Key> = HashMap::new();
    for row in client.query(&format!("{BASE_TYPES}{KEYS}"), &[]).await? {
        let key = keys.entry(row.try_get(0)?).or_default();
        key.deferrable = row.try_get(1)?;
        key.columns.push(KeyColumn {
            name: row.try_get(2)?,
            type_name: row.try_get(3)?,
            base_type: row.try_get(4)?,
            is_enum: row.try_get(5)?,
            deterministic: row.try_get(6)?,
            generated: row.try_get(7)?,
        });
    }
    Ok(keys)
}

async fn read_misfits(client: &Client) -> Result<HashMap<u32, Vec<Misfit>>, tokio_postgres::Error> {
    let mut misfits: HashMap<u32, Vec<Misfit>> = HashMap::new();
    let sql = format!("{BASE_TYPES}{}", MISFITS.replace("@MISFIT@", &misfit_sql()));
    for row in client.query(&sql, &[]).await? {
        let what: String = row.try_get(3)?;
        misfits.entry(row.try_get(0)?).or_default().push(Misfit {
            column: row.try_get(1)?,
            type_name: row.try_get(2)?,
            why: match what.as_str() {
                "number" => Why::Number,
                "no form" => Why::NoForm,
                "beside" => Why::Beside,
                _ => Why::Domain,
            },
        });
    }
    Ok(misfits)
}

const TABLES: &str = "
SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text,
    ARRAY(SELECT relid::oid FROM pg_partition_ancestors(c.oid) WHERE relid <> c.oid),
    c.relreplident::text,
    (SELECT x.relname::text FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
     WHERE i.indrelid = c.oid AND i.indisreplident),
    c.reltoastrelid <> 0,
    EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped AND a.attgenerated = 's'),
    EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped AND a.attgenerated = 'v'),
    c.relrowsecurity AND (c.relforcerowsecurity OR $1::oid IS NULL OR NOT pg_has_role($1::oid, c.relowner, 'USAGE')),
    (SELECT count(*)::int FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'f'),
    (SELECT count(*)::int FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'c'),
    (SELECT count(*)::int FROM pg_index i WHERE i.indrelid = c.oid AND i.indisexclusion AND NOT i.indisprimary),
    (SELECT count(*)::int FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND NOT i.indisprimary),
    ARRAY(SELECT t.tgname::text FROM pg_trigger t
          WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgenabled IN ('A', 'R')
          UNION ALL SELECT r.rulename::text FROM pg_rewrite r
          WHERE r.ev_class = c.oid AND r.ev_type <> '1' AND r.ev_enabled IN ('A', 'R') ORDER BY 1),
    EXISTS (SELECT FROM pg_depend d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'),
    pg_has_role(c.relowner, 'USAGE'),
    CASE WHEN $1::oid IS NULL THEN ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE'] ELSE
        ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) p
              WHERE NOT has_table_privilege($1::oid, c.oid, p)) END,
    ARRAY(SELECT DISTINCT s.nspname::text FROM pg_namespace s
          WHERE (s.oid = c.relnamespace OR s.oid IN (
                SELECT t.typnamespace FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                WHERE a.attrelid = c.oid AND NOT a.attisdropped))
            AND s.nspname <> 'pg_catalog'
            AND ($1::oid IS NULL OR NOT has_schema_privilege($1::oid, s.oid, 'USAGE')) ORDER BY 1),
    ARRAY(SELECT DISTINCT k.conname::text FROM pg_constraint k
          WHERE k.conrelid = c.oid AND k.contype = 'f' AND NOT EXISTS (SELECT FROM pg_index i
                WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL
                    AND (i.indkey::int2[])[0] = ANY (k.conkey)) ORDER BY 1),
    (SELECT count(*)::int FROM pg_index i
     WHERE i.indrelid = c.oid AND i.indisexclusion AND i.indisunique AND NOT i.indisprimary)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm')
  AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch')
ORDER BY 2, 3";

/// Begins a query: `base` has for each type (`typ`) those that its domain is of, the last being none itself.
pub(crate) const BASE_TYPES: &str = "
WITH RECURSIVE base AS (
    SELECT oid AS typ, oid AS base, typtype, typbasetype FROM pg_type
    UNION ALL
    SELECT b.typ, t.oid, t.typtype, t.typbasetype FROM base b JOIN pg_type t ON t.oid = b.typbasetype
    WHERE b.typtype = 'd')";

const KEYS: &str = "
SELECT i.indrelid, NOT i.indimmediate, a.attname::text, format_type(a.atttypid, a.atttypmod),
    CASE WHEN tn.nspname = 'pg_catalog' THEN t.typname::text ELSE tn.nspname || '.' || t.typname END,
    t.typtype = 'e', coalesce(l.collisdeterministic, true), a.attgenerated <> ''
FROM pg_index i
CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, place)
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
JOIN base b ON b.typ = a.atttypid AND b.typtype <> 'd'
JOIN pg_type t ON t.oid = b.base
JOIN pg_namespace tn ON tn.oid = t.typnamespace
LEFT JOIN pg_collation l ON l.oid = a.attcollation
WHERE i.indisprimary AND k.place <= i.indnkeyatts
ORDER BY i.indrelid, k.place";

const MISFITS: &str = "
SELECT m.attrelid, m.attname, m.type_name, m.what FROM (
    SELECT a.attrelid, a.attnum, a.attname::text, format_type(a.atttypid, a.atttypmod) AS type_name, @MISFIT@ AS what
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN base b ON b.typ = a.atttypid AND b.typtype <> 'd'
    JOIN pg_type y ON y.oid = b.base
    LEFT JOIN pg_type e ON e.oid = y.typelem AND y.typcategory = 'A'
    WHERE c.relkind IN ('r', 'p') AND c.oid >= 16384) AS m
WHERE m.what IS NOT NULL ORDER BY m.attrelid, m.attnum";
