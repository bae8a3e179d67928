//! A replicated table as it is compared: what is read of it, and the statements that read it.
//!
//! In:   the catalogs of this server            Out: [`Compared`]
//! Invariants: a row's hash depends on its values alone: not on the order of columns or rows, the server's version, its
//!        collations or its settings
//! Not here: running them ([`super::seat`])

use std::sync::Arc;

use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use anabranch_proto::wire::Malformed;
use tokio_postgres::{Client, Row};

use crate::apply::catalog::{self, FIRST_USER_OID, LocalTable};
use crate::apply::plan::{Mismatch, Plan, quote};
use crate::pg;

/// Tables of the publication that are not ours: schema, name, estimate of rows.
pub(crate) const TABLES: &str = "SELECT p.schemaname::text, p.tablename::text, greatest(c.reltuples, 0)::int8 \
    FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname \
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename \
    WHERE p.pubname = $1 AND p.schemaname <> 'anabranch' ORDER BY 1, 2";

/// Size in pages; rows in a page, about; bytes, with those of values that are stored out of line.
pub(crate) const SIZE: &str = "SELECT pg_relation_size(c.oid) / current_setting('block_size')::int8, \
    CASE WHEN c.relpages > 0 AND c.reltuples > 0 THEN c.reltuples / c.relpages ELSE 60 END::float8, \
    (pg_relation_size(c.oid) + CASE WHEN c.reltoastrelid <> 0 THEN pg_relation_size(c.reltoastrelid) ELSE 0 END)::int8 \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2";

/// Hash of a fixed text.
pub(super) const PROBE: &str =
    "SELECT hashtextextended('anabranch' COLLATE \"C\", 0), getdatabaseencoding()::text";

/// Settings that values' texts depend on, beside those of every session, and gentle ones: one process, no surprises.
pub(crate) const SETTINGS: &str = "SET lc_monetary = 'C'; SET lock_timeout = '10s'; SET jit = off; \
    SET max_parallel_workers_per_gather = 0; SET work_mem = '32MB'; SET enable_seqscan = off; SET enable_hashjoin = off; \
    SET enable_mergejoin = off; SET plan_cache_mode = force_custom_plan; SET default_transaction_read_only = on";

/// A table here.
pub(crate) struct Compared {
    /// As the decoder describes it, generated columns left out.
    pub(crate) desc: Arc<TableDesc>,
    pub(crate) plan: Plan,
    local: Arc<LocalTable>,
}

/// It cannot be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    #[error("table {0}.{1} has a generated key")]
    GeneratedKey(String, String),
}

impl Compared {
    pub(crate) async fn load(sql: &Client, schema: &str, name: &str) -> Result<Self, Error> {
        let local = Arc::new(catalog::load(sql, schema, name).await?);
        let taken: Vec<usize> = (0..local.columns.len())
            .filter(|&at| local.columns.get(at).is_some_and(|column| !column.generated))
            .collect();
        let key = local.key.iter().map(|at| {
            let place = taken.iter().position(|taken| taken == at)?;
            u16::try_from(place).ok()
        });
        let generated = || Error::GeneratedKey(schema.to_owned(), name.to_owned());
        let key = key.collect::<Option<Vec<u16>>>().ok_or_else(generated)?;
        let columns = taken.iter().filter_map(|&at| local.columns.get(at));
        let columns = columns.map(|column| ColumnDesc {
            name: column.name.clone(),
            type_oid: column.type_oid,
            // As the decoder says it: keys have the form of that type.
            type_mod: match column.base_oid {
                base if column.is_domain() && base < FIRST_USER_OID => ColumnDesc::domain_over(base),
                _ => column.type_mod,
            },
            type_name: column.type_name.clone(),
        });
        let desc = Arc::new(TableDesc {
            schema: schema.to_owned(),
            name: name.to_owned(),
            columns: columns.collect(),
            key,
            identity_full: false,
        });
        let plan = Plan::new(&desc, Arc::clone(&local))?;
        Ok(Self { desc, plan, local })
    }

    /// Does the column's type have no binary form?
    fn is_text_only(&self, name: &str) -> bool {
        let mut columns = self.local.columns.iter();
        columns.any(|column| column.name == name && column.text_only)
    }

    /// `t.a, t.b::text`: columns as the decoder sends them.
    pub(crate) fn images<'a>(&'a self, columns: impl Iterator<Item = &'a ColumnDesc>) -> String {
        let columns = columns.map(|column| {
            let cast = if self.is_text_only(&column.name) {
                "::text"
            } else {
                ""
            };
            format!("t.{}{cast}", quote(&column.name))
        });
        columns.collect::<Vec<_>>().join(", ")
    }

    /// The number of a row's block: of its key as text, equal for equal keys.
    fn block(&self, bits: u32) -> String {
        const NUMERIC: u32 = 1700;
        let values = self.desc.key_columns().map(|column| {
            let name = quote(&column.name);
            match column.base_oid() {
                NUMERIC => format!("trim_scale(t.{name})::text"),
                _ => format!("t.{name}::text"),
            }
        });
        let values = values.collect::<Vec<_>>().join(", ");
        let mask = (1u64 << bits) - 1;
        format!("(hashtextextended(concat_ws(E'\\n', {values}) COLLATE \"C\", 0) & {mask})")
    }

    /// The hash of these columns' values.
    pub(crate) fn hash(columns: &[String]) -> String {
        let values = columns.iter().map(|name| format!("t.{}", quote(name)));
        let values = values.collect::<Vec<_>>().join(", ");
        format!("hashtextextended(ROW({values})::text COLLATE \"C\", 0)")
    }

    fn from(&self, (from, to): (u64, Option<u64>)) -> String {
        let upper = to.map_or_else(String::new, |to| format!(" AND t.ctid < '({to},0)'::tid"));
        let table = &self.plan.table_sql;
        format!("FROM ONLY {table} AS t WHERE t.ctid >= '({from},0)'::tid{upper}")
    }

    /// Blocks of some pages: number, count, hash.
    pub(super) fn blocks_sql(&self, columns: &[String], bits: u32, pages: (u64, Option<u64>)) -> String {
        format!(
            "SELECT b, count(*), bit_xor(h) FROM (SELECT {} AS b, {} AS h {}) AS s GROUP BY b",
            self.block(bits),
            Self::hash(columns),
            self.from(pages)
        )
    }

    /// Rows of some pages whose blocks have their bit set in `$1`: the key's columns, then the hash.
    pub(super) fn rows_sql(&self, columns: &[String], bits: u32, pages: (u64, Option<u64>)) -> String {
        format!(
            "SELECT {}, {} {} AND get_bit($1, {}) = 1",
            self.images(self.desc.key_columns()),
            Self::hash(columns),
            self.from(pages),
            self.block(bits)
        )
    }

    /// Rows of some pages whose xmin is one of `xids`, a first id and how many from there: ctid, xmin, when it was committed
    /// (microseconds since the Unix epoch; null where the server does not keep that), hash, then the key's columns. `and` is
    /// one more condition.
    pub(crate) fn written_sql(
        &self,
        pages: (u64, Option<u64>),
        (first, count): (u64, u64),
        (times, and): (bool, &str),
    ) -> String {
        let time = if times {
            "(extract(epoch FROM pg_xact_commit_timestamp(t.xmin)) * 1000000)::int8"
        } else {
            "NULL::int8"
        };
        // Ids below 3 are no transaction's.
        format!(
            "SELECT t.ctid::text, t.xmin::text::int8, {time}, {}, {} {} AND t.xmin::text::int8 >= 3 \
             AND ((t.xmin::text::int8 - {first}) & 4294967295) < {count}{and}",
            Self::hash(&self.columns()),
            self.images(self.desc.key_columns()),
            self.from(pages),
        )
    }

    /// All columns that are compared.
    pub(crate) fn columns(&self) -> Vec<String> {
        self.desc
            .columns
            .iter()
            .map(|column| column.name.clone())
            .collect()
    }

    /// Writes rows again as they are: `$1` their ctids, as text, `$2` their xmins. Gives their keys as JSON. None where there is no
    /// column that can be set.
    pub(crate) fn again_sql(&self) -> Option<String> {
        let mut columns = self.local.columns.iter();
        let column = columns.find(|column| !column.generated && !column.identity_always)?;
        let (name, table) = (quote(&column.name), &self.plan.table_sql);
        Some(format!(
            "UPDATE ONLY {table} AS t SET {name} = t.{name} \
             FROM unnest($1::text[]::tid[], $2::int8[]) AS v (place, x) \
             WHERE t.ctid = v.place AND t.xmin::text::int8 = v.x RETURNING {}",
            self.key_json("t")
        ))
    }

    /// The row of one key, `$1`, as JSON, deleted if its hash is `$2`, where all nodes have the same columns; gives what it
    /// was. (Not as `jsonb`, here and below, which does not take all values of `json`.)
    pub(crate) fn delete_sql(&self) -> String {
        let table = &self.plan.table_sql;
        let on = self.desc.key_columns().map(|column| {
            let name = quote(&column.name);
            format!("t.{name} = v.{name}")
        });
        let on = on.collect::<Vec<_>>().join(" AND ");
        // Not as a row of the table: a domain may refuse NULL for the other columns.
        let key = self.desc.key_columns();
        let key = key.map(|column| format!("{} {}", quote(&column.name), column.type_name));
        let key = key.collect::<Vec<_>>().join(", ");
        let mut columns = self.columns();
        // The order in which they are compared.
        columns.sort_unstable();
        let hash = Self::hash(&columns);
        format!(
            "DELETE FROM ONLY {table} AS t USING jsonb_to_record($1::text::jsonb) AS v ({key}) \
             WHERE {on} AND {hash} = $2::int8 RETURNING row_to_json(t.*)::text"
        )
    }

    /// The key of `alias` as JSON.
    fn key_json(&self, alias: &str) -> String {
        let pairs = self.desc.key_columns().map(|column| {
            let literal = column.name.replace('\'', "''");
            format!("'{literal}', {alias}.{}", quote(&column.name))
        });
        format!(
            "jsonb_build_object({})::text",
            pairs.collect::<Vec<_>>().join(", ")
        )
    }

    /// Rows of some ctids, `$1`, as text: as JSON.
    pub(crate) fn json_sql(&self) -> String {
        let table = &self.plan.table_sql;
        format!("SELECT row_to_json(t.*)::text FROM ONLY {table} AS t WHERE t.ctid = ANY ($1::text[]::tid[])")
    }

    /// Rows of some keys: place, hash; with `details` the hashes of single columns; with `whole` the row's columns.
    pub(super) fn look_sql(&self, columns: &[String], details: bool, whole: bool) -> String {
        let mut out = vec![Self::hash(columns)];
        if details {
            let hashes = columns.iter().map(|name| {
                format!(
                    "coalesce(hashtextextended(t.{}::text COLLATE \"C\", 0), 0)",
                    quote(name)
                )
            });
            let hashes = hashes.collect::<Vec<_>>().join(", ");
            out.push(format!("ARRAY[{hashes}]::int8[]"));
        }
        if whole {
            out.push(self.images(self.desc.columns.iter()));
        }
        self.plan.read(&out.join(", "))
    }

    /// Hashes of rows that some node has described: place, hash. None where it lacks one of the columns.
    pub(crate) fn hash_sql(plan: &Plan, desc: &TableDesc, columns: &[String]) -> Option<String> {
        let has = |name: &String| desc.columns.iter().any(|column| column.name == *name);
        if !columns.iter().all(has) {
            return None;
        }
        let values = columns.iter().map(|name| plan.value_of(name));
        let values = values.collect::<Option<Vec<_>>>()?.join(", ");
        Some(plan.compute(&format!("hashtextextended(ROW({values})::text COLLATE \"C\", 0)")))
    }

    /// How rows that another node, or an earlier time, has described are read here.
    pub(crate) fn plan_of(&self, desc: &TableDesc) -> Result<Plan, Error> {
        Ok(Plan::new(desc, Arc::clone(&self.local))?)
    }

    /// Keys as JSON, of rows that may not be there.
    pub(crate) fn keys_sql(&self) -> String {
        self.plan.read_keys()
    }

    /// The image of the key's columns, from `row`'s columns `at` and after.
    pub(crate) fn key_image(&self, row: &Row, at: usize) -> Result<RowImage, tokio_postgres::Error> {
        self.image(row, at, self.desc.key_columns())
    }

    /// The image of a key whose canonical form this is.
    pub(crate) fn image_of_canonical(&self, canonical: &[u8]) -> Result<RowImage, Malformed> {
        let image = self.desc.image_of_canonical(canonical)?;
        let cells = image.cells().zip(self.desc.key_columns());
        let cells = cells.map(|(cell, column)| match cell {
            Cell::Binary(value) if self.is_text_only(&column.name) => Cell::Text(value),
            cell => cell,
        });
        Ok(RowImage::build(cells.collect::<Vec<_>>().into_iter()))
    }

    /// The image of the whole row.
    pub(super) fn row_image(&self, row: &Row, at: usize) -> Result<RowImage, tokio_postgres::Error> {
        self.image(row, at, self.desc.columns.iter())
    }

    fn image<'a>(
        &self,
        row: &Row,
        at: usize,
        columns: impl Iterator<Item = &'a ColumnDesc>,
    ) -> Result<RowImage, tokio_postgres::Error> {
        let mut cells = Vec::new();
        for (place, column) in (at..).zip(columns) {
            let value: pg::Image<'_> = row.try_get(place)?;
            cells.push(match value.0 {
                None => Cell::Null,
                Some(value) if self.is_text_only(&column.name) => Cell::Text(value),
                Some(value) => Cell::Binary(value),
            });
        }
        Ok(RowImage::build(cells.into_iter()))
    }
}
