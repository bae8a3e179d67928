//! How rows of a table of some origin are written into the table here: columns by name, and the statements.
//!
//! Values travel as one array of the table's row type, so every type goes the same way (`docs/design.md`
//! section 7); columns whose type has no binary form go beside it as text and are cast.
//!
//! A key alone is such a row with NULL in all other columns. A domain may refuse that: the server reads each column of a row, NULL or
//! not, by its type. So of a table with a column of a domain beside its key, the key's columns go beside the row as well, each as an array
//! of its own type, and a key alone has no row.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use anabranch_proto::row::{Cell, Cells, RowImage};
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use anabranch_proto::wire::Malformed;
use bytes::Bytes;
use serde_json::value::RawValue;

use super::catalog::{FIRST_USER_OID, LocalColumn, LocalTable};
use super::late::Late;
use super::types::{adapt, put_sized};
use crate::review::json_nulls;
use crate::setup::sql::literal;

/// An origin's table does not fit ours.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Mismatch {
    #[error(
        "table {0}.{1} has no column {2} on this node; add it, the rows are kept in quarantine until then"
    )]
    NoColumn(String, String, String),
    #[error(
        "column {2} of table {0}.{1} was {3} where the row was written and is {4} on this node; make both the same, the rows are \
         kept in quarantine until then; where they are the same by now, write the row again"
    )]
    Type(String, String, String, String, String),
    /// A row lacks a column that DDL has added here, and what rows have in it that were there cannot be read any more; last, why.
    #[error(
        "table {0}.{1}: what DDL gave to rows in the new column {2} cannot be read as the type that it has now ({3}), so rows from where it had \
         not run are kept in quarantine; write them again there, once it has"
    )]
    Added(String, String, String, String),
    #[error(
        "table {0}.{1} has a column of a type without a binary form, and column {2}, which is an array or of a domain: one of them must be of \
         another type; the rows are kept in quarantine until then"
    )]
    NoForm(String, String, String),
    #[error(
        "the primary key of table {0}.{1} is ({2}) at its origin and ({3}) on this node; make both the same"
    )]
    Key(String, String, String, String),
}

/// Statements and column mapping for one (origin's table, local table) pair.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) local: Arc<LocalTable>,
    /// Per local column, the origin's column.
    from: Vec<Option<usize>>,
    /// Both have the same columns in the same order, and all are written: a row's cells are taken as they come.
    in_order: bool,
    /// Columns of the origin that the table here does not have, and that rows are written without.
    pub(crate) missing: Vec<usize>,
    /// Columns here that the origin's description lacks, of those that can be written.
    pub(crate) absent: Vec<usize>,
    /// Of these, those that DDL has added; filled in by the apply session alone.
    pub(crate) late: Vec<Late>,
    /// Are all values of the origin's rows written? Not those of columns that are missing here, or generated.
    pub(crate) takes_all: bool,
    /// Per local column, the place in the origin's key.
    key_from: Vec<Option<usize>>,
    /// Local columns that travel as text.
    text: Vec<usize>,
    /// The columns that travel beside the row. Where a column has no binary form the server reads no row at all, not even one that
    /// is NULL there: then all that have one and come in. Where one is of a domain, which may refuse NULL: the key's, in its order. Else none.
    beside: Vec<usize>,
    /// There is no row to travel beside: all of its columns do, here or as text.
    is_rowless: bool,
    pub(crate) insert: String,
    /// None where a column travels as text, or the key is checked later than the row is written.
    pub(crate) copy: Option<String>,
    pub(crate) update: String,
    pub(crate) update_unguarded: String,
    pub(crate) delete: String,
    pub(crate) delete_unguarded: String,
    pub(crate) delete_others: String,
    /// Are there other rows than those of the array?
    pub(crate) has_others: String,
    /// Locks the rows that are there and says who wrote them.
    pub(crate) lock: String,
    /// The same, and the rows as JSON, if `jsonb` takes all of their values.
    pub(crate) lock_jsonb: String,
    /// The same, whatever their values are.
    pub(crate) lock_json: String,
    pub(crate) render: String,
    /// As `render`, whatever the values are.
    pub(crate) render_json: String,
    pub(crate) table_sql: String,
    /// Its rows, to be read and changed: without those of tables that inherit from it.
    pub(crate) rows_sql: String,
}

/// `xmin`s that the guard takes as not yet decoded: those in a window of this size above the horizon.
/// Modulo 2^32, so that frozen rows with ancient ids pass (`docs/design.md` section 7).
const GUARD_WINDOW: u32 = 1 << 28;

/// A name as SQL wants it.
pub(crate) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Is it of the type that the origin says? Only built-in types have the same OID at all servers: another's is another type there.
/// Unless it is an own description: a type that was renamed since is known by its OID.
pub(super) fn is_same_type(here: &LocalColumn, there: &ColumnDesc, is_own: bool) -> bool {
    let is_known = is_own || here.type_oid < FIRST_USER_OID;
    (is_known && here.type_oid == there.type_oid) || unquoted(&here.type_name) == unquoted(&there.type_name)
}

/// Schema and name. Servers of different versions have different keywords to quote.
fn unquoted(type_name: &str) -> (String, String) {
    let (mut schema, mut name) = (None, String::new());
    let (mut quoted, mut chars) = (false, type_name.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => name.push('"'),
            '"' => quoted = !quoted,
            '.' if !quoted && schema.is_none() => schema = Some(std::mem::take(&mut name)),
            c => name.push(c),
        }
    }
    (schema.unwrap_or_default(), name)
}

impl Plan {
    /// Of a table that has all of the origin's columns (but for our own tables: see [`Self::of`]).
    pub(crate) fn new(origin: &TableDesc, local: Arc<LocalTable>) -> Result<Self, Mismatch> {
        Self::of(origin, local, false, false)
    }

    /// `drops`: rows are written without the columns that the table here does not have. Those of our own tables always are, without
    /// a word: in an upgrade nodes of two layouts of schema `anabranch` work together. `is_own`: the description is this node's
    /// ([`super::own_tables`]).
    pub(crate) fn of(
        origin: &TableDesc,
        local: Arc<LocalTable>,
        drops: bool,
        is_own: bool,
    ) -> Result<Self, Mismatch> {
        let (mut missing, mut takes_all) = (Vec::new(), true);
        let names = (local.schema.clone(), local.name.clone());
        let mut from = vec![None; local.columns.len()];
        for (at, column) in origin.columns.iter().enumerate() {
            let found = local
                .columns
                .iter()
                .enumerate()
                .find(|(_, here)| here.name == column.name);
            let Some((here, local_column)) = found else {
                // A later release's column: it has a default there, and nothing of an application's is lost.
                if origin.is_own() {
                    continue;
                }
                if drops {
                    missing.push(at);
                    takes_all = false;
                    continue;
                }
                return Err(Mismatch::NoColumn(names.0, names.1, column.name.clone()));
            };
            if !is_same_type(local_column, column, is_own) {
                let (there, here) = (column.type_name.clone(), local_column.type_name.clone());
                return Err(Mismatch::Type(names.0, names.1, column.name.clone(), there, here));
            }
            if local_column.generated {
                takes_all = false;
            } else if let Some(slot) = from.get_mut(here) {
                *slot = Some(at);
            }
        }
        let there: Vec<&str> = origin.key_columns().map(|column| column.name.as_str()).collect();
        let here: Vec<&str> = local
            .key
            .iter()
            .filter_map(|&at| Some(local.columns.get(at)?.name.as_str()))
            .collect();
        if there != here {
            return Err(Mismatch::Key(names.0, names.1, there.join(", "), here.join(", ")));
        }
        let mut key_from = vec![None; local.columns.len()];
        for (place, &at) in local.key.iter().enumerate() {
            if let Some(slot) = key_from.get_mut(at) {
                *slot = Some(place);
            }
        }
        let text = (0..local.columns.len())
            .filter(|&at| {
                local
                    .columns
                    .get(at)
                    .is_some_and(|column| column.text_only || column.is_tsquery())
            })
            .collect();
        let mut columns = local.columns.iter().enumerate();
        let has_domain = columns.any(|(at, column)| column.is_domain() && !local.key.contains(&at));
        let is_rowless = local.columns.iter().any(|column| column.text_only);
        let beside = match (is_rowless, has_domain) {
            (true, _) => columns_of_rowless(&local, &from)?,
            (false, true) => local.key.clone(),
            (false, false) => Vec::new(),
        };
        let absent = (0..local.columns.len())
            .filter(|&at| from.get(at).is_some_and(Option::is_none))
            .filter(|&at| local.columns.get(at).is_some_and(|column| !column.generated))
            .collect();
        let in_order =
            from.len() == origin.columns.len() && from.iter().enumerate().all(|(at, from)| *from == Some(at));
        let mut plan = Self {
            local,
            from,
            in_order,
            missing,
            absent,
            late: Vec::new(),
            takes_all,
            key_from,
            text,
            beside,
            is_rowless,
            insert: String::new(),
            copy: None,
            update: String::new(),
            update_unguarded: String::new(),
            delete: String::new(),
            delete_unguarded: String::new(),
            delete_others: String::new(),
            has_others: String::new(),
            lock: String::new(),
            lock_jsonb: String::new(),
            lock_json: String::new(),
            render: String::new(),
            render_json: String::new(),
            table_sql: String::new(),
            rows_sql: String::new(),
        };
        plan.write_statements();
        Ok(plan)
    }

    /// `v.c3`, or its cast from text.
    fn value(&self, at: usize) -> String {
        let binary = match self.beside.contains(&at) {
            true => format!("v.b{at}"),
            false => format!("v.c{at}"),
        };
        match (self.text.contains(&at), self.local.columns.get(at)) {
            (true, Some(column)) if column.is_tsquery() => {
                format!("coalesce({binary}, v.t{at}::pg_catalog.tsquery)")
            }
            (true, Some(column)) => format!("v.t{at}::{}", column.type_sql),
            _ => binary,
        }
    }

    fn column(&self, at: usize) -> String {
        self.local
            .columns
            .get(at)
            .map_or_else(String::new, |column| quote(&column.name))
    }

    /// `ROWS FROM (unnest($1::t[]), ..) AS v (c0, .., extra)`; text columns, and then those that travel beside the row, take
    /// parameters from `next` on.
    fn source(&self, extra: Option<(&str, &str)>, ordinality: bool, mut next: usize) -> String {
        let mut functions = format!("unnest($1::{}[])", self.table_sql);
        let mut names: Vec<String> = (0..self.local.columns.len()).map(|at| format!("c{at}")).collect();
        if let Some((name, type_sql)) = extra {
            let _ = write!(functions, ", unnest(${next}::{type_sql}[])");
            names.push(name.to_owned());
            next += 2;
        }
        for at in &self.text {
            let _ = write!(functions, ", unnest(${next}::text[])");
            names.push(format!("t{at}"));
            next += 1;
        }
        for (at, column) in self.columns_beside() {
            let _ = write!(functions, ", unnest(${next}::{}[])", column.type_name);
            names.push(format!("b{at}"));
            next += 1;
        }
        let ordinality = if ordinality {
            names.push("ord".to_owned());
            " WITH ORDINALITY"
        } else {
            ""
        };
        format!("ROWS FROM ({functions}){ordinality} AS v ({})", names.join(", "))
    }

    /// The columns that travel beside the row.
    fn columns_beside(&self) -> impl Iterator<Item = (usize, &LocalColumn)> {
        let beside = self.beside.iter();
        beside.filter_map(|&at| Some((at, self.local.columns.get(at)?)))
    }

    fn write_statements(&mut self) {
        let local = Arc::clone(&self.local);
        self.table_sql = format!("{}.{}", quote(&local.schema), quote(&local.name));
        let only = if local.has_own_rows { "ONLY " } else { "" };
        self.rows_sql = format!("{only}{}", self.table_sql);
        let (table, rows) = (self.table_sql.clone(), self.rows_sql.clone());
        let written: Vec<usize> = (0..local.columns.len())
            .filter(|&at| self.from.get(at).copied().flatten().is_some())
            .collect();
        let join = |parts: Vec<String>, by: &str| parts.join(by);
        let names = join(written.iter().map(|&at| self.column(at)).collect(), ", ");
        let values = join(written.iter().map(|&at| self.value(at)).collect(), ", ");
        let on_key = self.on_key();
        let key_names = join(local.key.iter().map(|&at| self.column(at)).collect(), ", ");
        let plain = self.source(None, false, 2);
        let guarded = self.source(Some(("x", "xid")), false, 2);
        let guard = format!("(t.xmin = v.x OR ((t.xmin::text::int8 - $3) & 4294967295) >= {GUARD_WINDOW})");
        let set = written
            .iter()
            .filter(|&&at| !local.columns.get(at).is_some_and(|column| column.identity_always))
            .map(|&at| format!("{} = {}", self.column(at), self.value(at)))
            .collect::<Vec<_>>()
            .join(", ");
        // ON CONFLICT cannot name a deferrable key.
        self.insert = if local.key_deferrable {
            format!(
                "INSERT INTO {table} AS t ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {plain} \
                 WHERE NOT EXISTS (SELECT FROM {rows} AS t WHERE {on_key})"
            )
        } else {
            format!(
                "INSERT INTO {table} AS t ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {plain} \
                 ON CONFLICT ({key_names}) DO NOTHING"
            )
        };
        if self.text.is_empty() && !local.key_deferrable {
            self.copy = Some(format!("COPY {table} ({names}) FROM STDIN (FORMAT binary)"));
        }
        if set.is_empty() {
            // Nothing but an always-generated key: an update has nothing to set, but locks and counts its rows.
            let found = |source: &str| format!("SELECT FROM {rows} AS t, {source} WHERE {on_key}");
            self.update = format!("{} AND {guard} FOR UPDATE OF t", found(&guarded));
            self.update_unguarded = format!("{} FOR UPDATE OF t", found(&plain));
        } else {
            self.update = format!("UPDATE {rows} AS t SET {set} FROM {guarded} WHERE {on_key} AND {guard}");
            self.update_unguarded = format!("UPDATE {rows} AS t SET {set} FROM {plain} WHERE {on_key}");
        }
        if written.iter().any(|&at| self.is_always_identity(at)) {
            self.update = self.replace(&written, &format!("{guarded} WHERE {on_key} AND {guard}"));
            self.update_unguarded = self.replace(&written, &format!("{plain} WHERE {on_key}"));
        }
        self.delete = format!("DELETE FROM {rows} AS t USING {guarded} WHERE {on_key} AND {guard}");
        self.delete_unguarded = format!("DELETE FROM {rows} AS t USING {plain} WHERE {on_key}");
        let others = format!("FROM {rows} AS t WHERE NOT EXISTS (SELECT FROM {plain} WHERE {on_key})");
        self.delete_others = format!("DELETE {others}");
        self.has_others = format!("SELECT EXISTS (SELECT {others})");
        let numbered = self.source(None, true, 2);
        let lock = |columns: &str| {
            format!(
                "SELECT v.ord, t.xmin::text::int8{columns} FROM {numbered} JOIN {rows} AS t ON {on_key} \
                 ORDER BY v.ord FOR UPDATE OF t"
            )
        };
        self.lock = lock("");
        self.lock_jsonb = lock(&format!(", {}", self.shown("t")));
        // `json` takes what `jsonb` does not: \u0000, half of a surrogate pair, numbers out of all range.
        self.lock_json = lock(", row_to_json(t.*)::text");
        let as_jsonb = self.rendering(&|row| self.shown(row), &plain);
        self.render_json = self.rendering(&|row| format!("row_to_json({row}.*)::text"), &plain);
        self.render = as_jsonb;
    }

    /// The `jsonb` of a row, as lines of the conflict log show it: without what each node computes by itself, which an image has not, and with
    /// the null of JSON told from NULL.
    fn shown(&self, row: &str) -> String {
        let columns = self.local.columns.iter();
        let (generated, others): (Vec<_>, Vec<_>) = columns.partition(|column| column.generated);
        let without = match generated.is_empty() {
            true => String::new(),
            false => {
                let names: Vec<String> = generated.iter().map(|column| literal(&column.name)).collect();
                format!(" OPERATOR(pg_catalog.-) ARRAY[{}]::text[]", names.join(", "))
            }
        };
        let others = others.iter().map(|column| {
            let value = format!("{row}.{}", quote(&column.name));
            (
                column.name.as_str(),
                column.type_oid,
                column.type_name.as_str(),
                value,
            )
        });
        format!("(to_jsonb({row}.*){without}{})::text", json_nulls(others))
    }

    /// JSON of a row, without what each node computes by itself.
    pub(crate) fn without_generated(&self, json: String) -> String {
        let columns = self.local.columns.iter();
        let generated: Vec<&LocalColumn> = columns.filter(|column| column.generated).collect();
        if generated.is_empty() {
            return json;
        }
        let Ok(mut row) = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(&json) else {
            return json;
        };
        for column in generated {
            row.remove(&column.name);
        }
        serde_json::to_string(&row).unwrap_or(json)
    }

    /// The statement that shows key and row as JSON. `shown` makes that of a row.
    fn rendering(&self, shown: &dyn Fn(&str) -> String, plain: &str) -> String {
        let is_beside = !self.beside.is_empty();
        let key_pairs = self.local.key.iter().filter_map(|&at| {
            let name = &self.local.columns.get(at)?.name;
            let value = match is_beside {
                true => self.value(at),
                false => format!("v.{}", quote(name)),
            };
            Some(format!("'{}', {value}", name.replace('\'', "''")))
        });
        let key_pairs = key_pairs.collect::<Vec<_>>().join(", ");
        // (`v.*` and not `v`: a column may have that name.)
        let (row, from) = match is_beside {
            false => ("v", format!("unnest($1::{}[]) AS v", self.table_sql)),
            true => {
                let named = (0..self.local.columns.len()).map(|at| {
                    let value = match self.beside.contains(&at) || self.is_rowless && self.text.contains(&at)
                    {
                        true => self.value(at),
                        false => format!("v.c{at}"),
                    };
                    format!("{value} AS {}", self.column(at))
                });
                let named = named.collect::<Vec<_>>().join(", ");
                ("r", format!("{plain} CROSS JOIN LATERAL (SELECT {named}) AS r"))
            }
        };
        format!(
            "SELECT jsonb_build_object({key_pairs})::text, {} FROM {from}",
            shown(row)
        )
    }

    /// A column beside the key that only an INSERT can set.
    fn is_always_identity(&self, at: usize) -> bool {
        let column = self.local.columns.get(at);
        column.is_some_and(|column| column.identity_always) && !self.local.key.contains(&at)
    }

    /// Deletes rows and inserts them again, with what they had in columns that do not come in; as UPDATE cannot set all of the
    /// columns. Counts those that were there.
    fn replace(&self, written: &[usize], found: &str) -> String {
        let (table, rows) = (&self.table_sql, &self.rows_sql);
        let kept: Vec<usize> = (0..self.local.columns.len())
            .filter(|at| !written.contains(at))
            .filter(|&at| self.local.columns.get(at).is_some_and(|column| !column.generated))
            .collect();
        let names = written.iter().chain(&kept).map(|&at| self.column(at));
        let values = written.iter().map(|&at| self.value(at));
        let values = values.chain(kept.iter().map(|at| format!("v.k{at}")));
        let returned = kept.iter().map(|&at| format!(", t.{} AS k{at}", self.column(at)));
        format!(
            "WITH v AS (DELETE FROM {rows} AS t USING {found} RETURNING v.*{}) \
             INSERT INTO {table} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM v",
            returned.collect::<String>(),
            names.collect::<Vec<_>>().join(", "),
            values.collect::<Vec<_>>().join(", ")
        )
    }

    /// Reads rows of some keys: their place in the array, then `columns` of `t`.
    pub(crate) fn read(&self, columns: &str) -> String {
        let (numbered, on_key) = (self.source(None, true, 2), self.on_key());
        let rows = &self.rows_sql;
        format!("SELECT v.ord, {columns} FROM {numbered} JOIN {rows} AS t ON {on_key} ORDER BY v.ord")
    }

    /// The rows in the array, as `v`, whose columns are [`Self::value_of`]; with their place `v.ord`.
    pub(crate) fn numbered(&self) -> String {
        self.source(None, true, 2)
    }

    /// The rows of the table, as `t`, with the keys in the array: [`Self::numbered`].
    pub(crate) fn standing(&self) -> String {
        format!(
            "{} JOIN {} AS t ON {}",
            self.numbered(),
            self.rows_sql,
            self.on_key()
        )
    }

    /// The rows in the array under the names of the table's columns, to stand behind FROM: with those that travel as text, and those that are
    /// generated as the table would compute them.
    pub(crate) fn as_rows(&self) -> String {
        let columns = &self.local.columns;
        let plain = columns.iter().enumerate();
        let plain: Vec<String> = plain
            .filter(|(_, column)| !column.generated)
            .map(|(at, column)| format!("{} AS {}", self.value(at), quote(&column.name)))
            .collect();
        // Its names are those of the table's columns, so they are looked for among the rows' first.
        let made: String = columns
            .iter()
            .filter_map(|column| {
                let expression = column.expression.as_ref()?;
                Some(format!(", {expression} AS {}", quote(&column.name)))
            })
            .collect();
        let source = self.source(None, false, 2);
        format!(
            "(SELECT n.*{made} FROM (SELECT {} FROM {source}) AS n) AS n",
            plain.join(", ")
        )
    }

    /// Counts the rows in the array that stand in the table just so, in all columns that are written.
    pub(crate) fn as_written(&self) -> String {
        // As their types' output, since not all types have an equality, and some take different values for equal.
        let output = |value: &str| format!("pg_catalog.format('%L', {value}) COLLATE pg_catalog.\"C\"");
        let written = self.from.iter().enumerate();
        let written = written.filter_map(|(at, from)| from.map(|_| at));
        let is_same: String = written
            .map(|at| {
                let (stands, comes) = (format!("t.{}", self.column(at)), self.value(at));
                format!(" AND {} = {}", output(&stands), output(&comes))
            })
            .collect();
        format!("SELECT count(*) FROM {} WHERE true{is_same}", self.standing())
    }

    /// A column of the rows in the array, cast from text where it travels as that.
    pub(crate) fn value_of(&self, name: &str) -> Option<String> {
        let at = self.local.columns.iter().position(|column| column.name == name)?;
        Some(self.value(at))
    }

    /// Computes something of the rows in the array, with their place.
    pub(crate) fn compute(&self, what: &str) -> String {
        let numbered = self.source(None, true, 2);
        format!("SELECT v.ord, {what} FROM {numbered} ORDER BY v.ord")
    }

    /// Keys as JSON, with their place in the array.
    pub(crate) fn read_keys(&self) -> String {
        let names = self.local.key.iter().filter_map(|&at| {
            let name = self.local.columns.get(at)?.name.replace('\'', "''");
            Some(format!("'{name}', {}", self.value(at)))
        });
        let pairs = names.collect::<Vec<_>>().join(", ");
        self.compute(&format!("jsonb_build_object({pairs})::text"))
    }

    /// The type of a column, for people.
    pub(crate) fn type_of(&self, name: &str) -> &str {
        let mut columns = self.local.columns.iter();
        let column = columns.find(|column| column.name == name);
        column.map_or("?", |column| &column.type_name)
    }

    fn on_key(&self) -> String {
        let pairs = self.local.key.iter();
        let pairs = pairs.map(|&at| format!("t.{} = {}", self.column(at), self.value(at)));
        pairs.collect::<Vec<_>>().join(" AND ")
    }

    /// Starts an array of rows for this table.
    pub(crate) fn rows(&self) -> RowArray<'_> {
        let mut bytes = Vec::with_capacity(4_096);
        for part in [1, 0, self.local.row_type, 0, 1] {
            bytes.extend_from_slice(&part.to_be_bytes());
        }
        RowArray {
            plan: self,
            bytes,
            text: vec![ColumnArray::new(TEXT_OID); self.text.len()],
            beside: self
                .columns_beside()
                .map(|(_, column)| ColumnArray::new(column.type_oid))
                .collect(),
            count: 0,
        }
    }
}

/// The `$1` of a statement: rows as an array of the table's row type, and the columns that go beside it.
pub(crate) struct RowArray<'p> {
    plan: &'p Plan,
    bytes: Vec<u8>,
    text: Vec<ColumnArray>,
    beside: Vec<ColumnArray>,
    count: u32,
}

/// What a row array is made of.
pub(crate) enum Source<'r> {
    /// A whole row of the origin.
    Row(&'r RowImage),
    /// Only the key's columns.
    Key(&'r RowImage),
}

impl RowArray<'_> {
    /// Appends a row.
    pub(crate) fn push(&mut self, source: &Source<'_>) -> Result<(), Malformed> {
        let (image, map, is_row) = match source {
            Source::Row(row) => (row, &self.plan.from, true),
            Source::Key(key) => (key, &self.plan.key_from, false),
        };
        if self.plan.is_rowless || !is_row && !self.beside.is_empty() {
            return self.push_beside(image, map);
        }
        let mut cells = Picked::new(image, self.plan.in_order && is_row);
        let columns = &self.plan.local.columns;
        let (texts, besides) = (&mut self.text, &mut self.beside);
        let (text_at, beside_at) = (&self.plan.text, &self.plan.beside);
        put_sized(&mut self.bytes, |out| {
            out.extend_from_slice(&u32::try_from(columns.len()).unwrap_or(0).to_be_bytes());
            for (at, (column, from)) in columns.iter().zip(map).enumerate() {
                out.extend_from_slice(&column.type_oid.to_be_bytes());
                let cell = cells.pick(*from);
                if let Some(beside) = slot(beside_at, besides, at) {
                    beside.push_value(column, cell)?;
                }
                let is_empty = is_empty_query(column, cell);
                if let Some(text) = slot(text_at, texts, at) {
                    text.push_text(as_text(column, cell))?;
                }
                put_value(out, column, if is_empty { Cell::Null } else { cell })?;
            }
            Ok(())
        })?;
        self.count += 1;
        Ok(())
    }

    /// Appends columns without a row.
    fn push_beside(&mut self, image: &RowImage, map: &[Option<usize>]) -> Result<(), Malformed> {
        self.bytes.extend_from_slice(&(-1i32).to_be_bytes());
        let mut cells = Picked::new(image, false);
        for (at, (column, from)) in self.plan.local.columns.iter().zip(map).enumerate() {
            let cell = cells.pick(*from);
            if let Some(text) = slot(&self.plan.text, &mut self.text, at) {
                text.push_text(as_text(column, cell))?;
            }
            if let Some(beside) = slot(&self.plan.beside, &mut self.beside, at) {
                let is_empty = is_empty_query(column, cell);
                beside.push_value(column, if is_empty { Cell::Null } else { cell })?;
            }
        }
        self.count += 1;
        Ok(())
    }

    /// Rows so far.
    pub(crate) const fn count(&self) -> u32 {
        self.count
    }

    /// The parameters: `$1`, and those of the columns beside it.
    pub(crate) fn finish(mut self) -> (Bytes, Vec<Bytes>) {
        if let Some(slot) = self.bytes.get_mut(12..16) {
            slot.copy_from_slice(&self.count.to_be_bytes());
        }
        let beside = self.text.into_iter().chain(self.beside);
        (Bytes::from(self.bytes), beside.map(ColumnArray::finish).collect())
    }

    /// The parameters of [`Plan::render`] and [`Plan::render_json`], which show text columns as null and take them only beside a key.
    pub(crate) fn finish_rendering(self) -> (Bytes, Vec<Bytes>) {
        let is_alone = self.beside.is_empty();
        let (array, beside) = self.finish();
        (array, if is_alone { Vec::new() } else { beside })
    }
}

/// The array of the column at a place, if it has one of those `places`.
fn slot<'a>(places: &[usize], arrays: &'a mut [ColumnArray], at: usize) -> Option<&'a mut ColumnArray> {
    let place = places.iter().position(|&place| place == at)?;
    arrays.get_mut(place)
}

/// `tsquery_recv` refuses the image that `tsquery_send` makes of an empty query.
fn is_empty_query(column: &LocalColumn, cell: Cell<'_>) -> bool {
    column.is_tsquery() && matches!(cell, Cell::Binary([0, 0, 0, 0]))
}

/// What a column that travels as text has there: of a tsquery only the empty one.
fn as_text<'c>(column: &LocalColumn, cell: Cell<'c>) -> Cell<'c> {
    match (column.text_only, is_empty_query(column, cell)) {
        (true, _) => cell,
        (false, true) => Cell::Text(b""),
        (false, false) => Cell::Null,
    }
}

/// The columns with a binary form that come in (`from`), of a table that has one without: they travel beside each other. An array of arrays is
/// none to the server, and a domain may refuse the NULL of a row of which only the key is known.
fn columns_of_rowless(local: &LocalTable, from: &[Option<usize>]) -> Result<Vec<usize>, Mismatch> {
    let mut out = Vec::new();
    for (at, column) in local.columns.iter().enumerate() {
        let is_key = local.key.contains(&at);
        let comes = from.get(at).is_some_and(Option::is_some);
        if column.text_only || column.generated || !(comes || is_key) {
            continue;
        }
        if column.type_sql.ends_with("[]") || column.is_domain() && !is_key {
            let (schema, table) = (local.schema.clone(), local.name.clone());
            return Err(Mismatch::NoForm(schema, table, column.name.clone()));
        }
        out.push(at);
    }
    Ok(out)
}

/// A row's cells, picked by their places.
enum Picked<'r> {
    /// As they come: the places are 0, 1, and so on.
    InOrder(Cells<'r>),
    Any(Vec<Cell<'r>>),
}

impl<'r> Picked<'r> {
    fn new(image: &'r RowImage, in_order: bool) -> Self {
        match in_order {
            true => Self::InOrder(image.cells()),
            false => Self::Any(image.cells().collect()),
        }
    }

    /// The next local column's, which is at this place.
    fn pick(&mut self, from: Option<usize>) -> Cell<'r> {
        let cell = match self {
            Self::InOrder(cells) => cells.next(),
            Self::Any(cells) => from.and_then(|from| cells.get(from).copied()),
        };
        cell.unwrap_or(Cell::Null)
    }
}

/// What `COPY ... (FORMAT binary)` reads: the columns that are written, in their order.
pub(crate) struct CopyImage(Vec<u8>);

impl CopyImage {
    /// For rows of so many bytes in all.
    pub(crate) fn new(len: usize) -> Self {
        // With the head and the end. A row becomes no longer, but for its nulls.
        let mut bytes = Vec::with_capacity(len + 32);
        bytes.extend_from_slice(b"PGCOPY\n\xff\r\n\0");
        // Flags, and the length of an extension: none.
        bytes.extend_from_slice(&[0; 8]);
        Self(bytes)
    }

    /// Appends a row.
    pub(crate) fn push(&mut self, plan: &Plan, row: &RowImage) -> Result<(), Malformed> {
        let mut cells = Picked::new(row, plan.in_order);
        let written = plan.local.columns.iter().zip(&plan.from);
        let written = written.filter(|(_, from)| from.is_some());
        let count = match plan.in_order {
            true => plan.from.len(),
            false => written.clone().count(),
        };
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&count.to_be_bytes());
        for (column, from) in written {
            put_value(&mut self.0, column, cells.pick(*from))?;
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Bytes {
        self.0.extend_from_slice(&(-1i16).to_be_bytes());
        Bytes::from(self.0)
    }
}

/// A value of a column, behind its length.
fn put_value(out: &mut Vec<u8>, column: &LocalColumn, cell: Cell<'_>) -> Result<(), Malformed> {
    match cell {
        Cell::Null => out.extend_from_slice(&(-1i32).to_be_bytes()),
        Cell::Binary(value) => put_sized(out, |out| adapt(&column.tree, value, out))?,
        Cell::Text(_) => return Err(Malformed("a text value for a type with a binary form")),
        Cell::Unchanged => return Err(Malformed("a value that was not sent (unchanged TOAST)")),
    }
    Ok(())
}

/// The image of an array of one column's values.
#[derive(Clone)]
struct ColumnArray {
    bytes: Vec<u8>,
    count: u32,
}

const TEXT_OID: u32 = 25;

impl ColumnArray {
    fn new(element_oid: u32) -> Self {
        let mut bytes = Vec::new();
        for part in [1, 1, element_oid, 0, 1] {
            bytes.extend_from_slice(&part.to_be_bytes());
        }
        Self { bytes, count: 0 }
    }

    fn push_value(&mut self, column: &LocalColumn, cell: Cell<'_>) -> Result<(), Malformed> {
        put_value(&mut self.bytes, column, cell)?;
        self.count += 1;
        Ok(())
    }

    fn push_text(&mut self, cell: Cell<'_>) -> Result<(), Malformed> {
        match cell {
            Cell::Null => self.bytes.extend_from_slice(&(-1i32).to_be_bytes()),
            Cell::Text(value) => anabranch_proto::wire::put_bytes(&mut self.bytes, value),
            Cell::Binary(_) => return Err(Malformed("a binary value for a type without a binary form")),
            Cell::Unchanged => return Err(Malformed("a value that was not sent (unchanged TOAST)")),
        }
        self.count += 1;
        Ok(())
    }

    fn finish(mut self) -> Bytes {
        if let Some(slot) = self.bytes.get_mut(12..16) {
            slot.copy_from_slice(&self.count.to_be_bytes());
        }
        Bytes::from(self.bytes)
    }
}

/// An `xid[]` image of expected `xmin`s.
pub(crate) fn xid_array(xids: impl ExactSizeIterator<Item = u32>) -> Bytes {
    const XID_OID: u32 = 28;
    let count = u32::try_from(xids.len()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(20 + xids.len() * 8);
    for part in [1, 0, XID_OID, count, 1] {
        bytes.extend_from_slice(&part.to_be_bytes());
    }
    for xid in xids {
        bytes.extend_from_slice(&4u32.to_be_bytes());
        bytes.extend_from_slice(&xid.to_be_bytes());
    }
    Bytes::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::foreign::Links;
    use super::super::types::TypeTree;
    use super::*;

    fn local_column(name: &str) -> LocalColumn {
        LocalColumn {
            name: name.to_owned(),
            type_oid: 25,
            type_sql: "text".to_owned(),
            type_name: "pg_catalog.text".to_owned(),
            generated: false,
            expression: None,
            identity_always: false,
            text_only: false,
            base_oid: 25,
            type_mod: -1,
            tree: TypeTree::Plain,
        }
    }

    /// A table as it is here, and as an origin describes it. The first column is the key.
    fn tables(schema: &str, here: &[&str], there: &[&str]) -> (TableDesc, Arc<LocalTable>) {
        let local = LocalTable {
            schema: schema.to_owned(),
            name: "t".to_owned(),
            has_own_rows: true,
            columns: here.iter().map(|name| local_column(name)).collect(),
            key: vec![0],
            key_deferrable: false,
            row_type: 0,
            unique: Vec::new(),
            links: Links::default(),
        };
        let column = |name: &&str| ColumnDesc {
            name: (*name).to_owned(),
            type_oid: 25,
            type_mod: -1,
            type_name: "pg_catalog.text".to_owned(),
        };
        let origin = TableDesc {
            schema: schema.to_owned(),
            name: "t".to_owned(),
            columns: there.iter().map(column).collect(),
            key: vec![0],
            identity_full: false,
        };
        (origin, Arc::new(local))
    }

    #[test]
    fn a_column_of_a_later_layout_of_our_own_tables_is_left_out_without_a_line() {
        let (origin, local) = tables("anabranch", &["id", "old"], &["id", "new", "old"]);
        let plan = Plan::of(&origin, local, false, false).unwrap();
        assert!(plan.missing.is_empty());
        assert_eq!(plan.from, [Some(0), Some(2)]);
        assert!(plan.insert.contains("(\"id\", \"old\")"), "{}", plan.insert);
        // One of an earlier layout has its default.
        let (origin, local) = tables("anabranch", &["id", "new", "old"], &["id", "old"]);
        let plan = Plan::of(&origin, local, false, false).unwrap();
        assert_eq!(plan.from, [Some(0), None, Some(1)]);
        // Of an application's table each is told.
        let (origin, local) = tables("public", &["id", "old"], &["id", "new", "old"]);
        let refused = Plan::of(&origin, Arc::clone(&local), false, false);
        assert!(matches!(refused, Err(Mismatch::NoColumn(..))), "{refused:?}");
        assert_eq!(Plan::of(&origin, local, true, false).unwrap().missing, [1]);
    }

    #[test]
    fn what_a_line_shows_has_no_generated_column_and_tells_the_null_of_json_from_null() {
        let (origin, local) = tables("public", &["id", "it's", "doc"], &["id", "doc"]);
        let plain = Plan::of(&origin, Arc::clone(&local), false, false).unwrap();
        assert!(plain.render.contains("(to_jsonb(v.*))::text"), "{}", plain.render);
        let mut local = LocalTable::clone(&local);
        local.columns[1].generated = true;
        local.columns[2].type_oid = 3802;
        local.columns[2].base_oid = 3802;
        local.columns[2].type_name = "pg_catalog.jsonb".to_owned();
        let (mut origin, _) = tables("public", &["id"], &["id", "doc"]);
        origin.columns[1].type_oid = 3802;
        origin.columns[1].type_name = "pg_catalog.jsonb".to_owned();
        let plan = Plan::of(&origin, Arc::new(local), false, false).unwrap();
        for (sql, row) in [(&plan.render, "v"), (&plan.lock_jsonb, "t")] {
            let begins = format!(
                "(to_jsonb({row}.*) OPERATOR(pg_catalog.-) ARRAY['it''s']::text[] OPERATOR(pg_catalog.||) CASE WHEN \
                 pg_catalog.jsonb_typeof({row}.\"doc\")"
            );
            assert!(sql.contains(&begins), "{sql}");
        }
        let row = plan.without_generated(r#"{"id": 1.10, "it's": 2, "doc": null}"#.to_owned());
        assert_eq!(row, r#"{"doc":null,"id":1.10}"#);
    }

    #[test]
    fn a_key_beside_a_domain_travels_without_a_row() {
        let (origin, local) = tables("public", &["id", "mail"], &["id", "mail"]);
        let plain = Plan::of(&origin, Arc::clone(&local), false, false).unwrap();
        let source = "ROWS FROM (unnest($1::\"public\".\"t\"[])) AS v (c0, c1)";
        assert_eq!(
            plain.delete_unguarded,
            format!("DELETE FROM ONLY \"public\".\"t\" AS t USING {source} WHERE t.\"id\" = v.c0")
        );
        let mut local = LocalTable::clone(&local);
        local.columns[1].type_oid = 16_500;
        let plan = Plan::of(&origin, Arc::new(local.clone()), false, false).unwrap();
        let source = "unnest($1::\"public\".\"t\"[]), unnest($2::pg_catalog.text[])) AS v (c0, c1, b0)";
        for sql in [
            &plan.delete_unguarded,
            &plan.update_unguarded,
            &plan.insert,
            &plan.render,
        ] {
            assert!(sql.contains(source), "{sql}");
        }
        let guarded = "unnest($2::xid[]), unnest($4::pg_catalog.text[])) AS v (c0, c1, x, b0)";
        assert!(plan.delete.contains(guarded), "{}", plan.delete);
        assert!(plan.lock.contains("ON t.\"id\" = v.b0"), "{}", plan.lock);

        let key = RowImage::build([Cell::Binary(b"k")].into_iter());
        let row = RowImage::build([Cell::Binary(b"k"), Cell::Binary(b"a@b")].into_iter());
        let pushed = |plan: &Plan, sources: &[Source<'_>]| {
            let mut rows = plan.rows();
            for source in sources {
                rows.push(source).unwrap();
            }
            rows.finish()
        };
        let (_, beside) = pushed(&plain, &[Source::Key(&key)]);
        assert!(beside.is_empty());
        let (array, beside) = pushed(&plan, &[Source::Key(&key), Source::Row(&row)]);
        // Two elements: no row, and a row of two columns.
        assert_eq!(
            array[12..28],
            [0, 0, 0, 2, 0, 0, 0, 1, 255, 255, 255, 255, 0, 0, 0, 24]
        );
        let [keys] = beside.as_slice() else {
            panic!("{beside:?}")
        };
        assert_eq!(keys[20..], [0, 0, 0, 1, b'k', 0, 0, 0, 1, b'k']);

        // A domain in the key itself has its value.
        local.columns.swap(0, 1);
        local.columns[0].name = "id".to_owned();
        local.columns[1].name = "mail".to_owned();
        let of_key = Plan::of(&origin, Arc::new(local), false, false).unwrap();
        assert_eq!(of_key.delete_unguarded, plain.delete_unguarded);
    }

    #[test]
    fn beside_a_column_without_a_binary_form_all_travel_without_a_row() {
        let (origin, local) = tables("public", &["id", "book", "n"], &["id", "book", "n"]);
        let mut local = LocalTable::clone(&local);
        local.columns[1].text_only = true;
        local.columns[1].type_sql = "isbn".to_owned();
        let plan = Plan::of(&origin, Arc::new(local.clone()), false, false).unwrap();
        let source = "ROWS FROM (unnest($1::\"public\".\"t\"[]), unnest($2::text[]), unnest($3::pg_catalog.text[]), \
             unnest($4::pg_catalog.text[])) AS v (c0, c1, c2, t1, b0, b2)";
        let values = "SELECT v.b0, v.t1::isbn, v.b2 FROM";
        assert!(
            plan.insert.contains(&format!("{values} {source}")),
            "{}",
            plan.insert
        );
        assert!(plan.render.contains("v.t1::isbn AS \"book\""), "{}", plan.render);
        let mut rows = plan.rows();
        let row = RowImage::build([Cell::Binary(b"k"), Cell::Text(b"0-3"), Cell::Null].into_iter());
        let key = RowImage::build([Cell::Binary(b"l")].into_iter());
        rows.push(&Source::Row(&row)).unwrap();
        rows.push(&Source::Key(&key)).unwrap();
        let (array, beside) = rows.finish();
        assert_eq!(
            array[12..],
            [0, 0, 0, 2, 0, 0, 0, 1, 255, 255, 255, 255, 255, 255, 255, 255]
        );
        let [texts, ids, numbers] = beside.as_slice() else {
            panic!("{beside:?}")
        };
        assert_eq!(texts[20..], [0, 0, 0, 3, b'0', b'-', b'3', 255, 255, 255, 255]);
        assert_eq!(ids[20..], [0, 0, 0, 1, b'k', 0, 0, 0, 1, b'l']);
        assert_eq!(numbers[20..], [255; 8]);

        local.columns[2].type_sql = "text[]".to_owned();
        let local = Arc::new(local);
        let refused = Plan::of(&origin, Arc::clone(&local), false, false);
        assert!(matches!(refused, Err(Mismatch::NoForm(..))), "{refused:?}");
        // By its key alone a row is found all the same, and so it can go.
        let plan = Plan::of(&origin.key_alone(), local, false, false).unwrap();
        let source = "ROWS FROM (unnest($1::\"public\".\"t\"[]), unnest($2::text[]), unnest($3::pg_catalog.text[])) \
             AS v (c0, c1, c2, t1, b0)";
        assert_eq!(
            plan.delete_unguarded,
            format!("DELETE FROM ONLY \"public\".\"t\" AS t USING {source} WHERE t.\"id\" = v.b0")
        );
        let mut rows = plan.rows();
        rows.push(&Source::Key(&key)).unwrap();
        let (_, beside) = rows.finish();
        assert_eq!(beside.len(), 2);
        assert_eq!(beside[1][20..], [0, 0, 0, 1, b'l']);
    }

    #[test]
    fn types_are_the_same_by_their_names_and_only_built_in_ones_by_their_oids() {
        let same = |(here, type_name): (u32, &str), (there, name): (u32, &str)| {
            let local = LocalColumn {
                type_oid: here,
                base_oid: here,
                type_name: type_name.to_owned(),
                ..local_column("c")
            };
            let column = ColumnDesc {
                name: "c".to_owned(),
                type_oid: there,
                type_mod: -1,
                type_name: name.to_owned(),
            };
            [false, true].map(|is_own| is_same_type(&local, &column, is_own))
        };
        let by_any = |here, there| same(here, there) == [true, true];
        let by_none = |here, there| same(here, there) == [false, false];
        let role = "\"Sales\".\"UserRole\"";
        assert!(by_any((16_500, role), (16_600, role)));
        assert!(by_any((16_500, "public.mood"), (16_600, "public.mood")));
        // A word that only one of the servers quotes.
        assert!(by_any(
            (16_500, "json_table.mood"),
            (16_600, "\"json_table\".mood")
        ));
        assert!(by_any((25, "pg_catalog.text"), (25, "")));
        // The number says something of an own description alone: the type was renamed since.
        let renamed = same((16_500, "public.mood"), (16_500, "public.color"));
        assert_eq!(renamed, [false, true]);
        assert!(by_none((16_500, "public.mood"), (16_600, "public.color")));
        assert!(by_none((16_500, "\"a.b\".c"), (16_600, "a.\"b.c\"")));
        assert_eq!(unquoted("\"a\"\".b\".c"), ("a\".b".to_owned(), "c".to_owned()));
    }
}
