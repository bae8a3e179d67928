//! What a replicated table looks like on this server.
//!
//! In:   schema and table names from the stream      Out: [`LocalTable`]
//! Holds: nothing; the apply session caches tables and drops them when a statement says they changed
//! Not here: mapping a peer's columns on ours ([`super::plan`])

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;

use tokio_postgres::{Client, Row};

use super::foreign::Links;
use super::plan::quote;
use super::types::TypeTree;
use crate::pg;
use crate::resolve::unique::expr::{Column, Reader};
use crate::resolve::unique::{Class, Part};
use crate::resolve::{UniqueKey, UniqueKeys};
use crate::setup::table::{BASE_TYPES, KEY_TYPES};

/// A column here.
#[derive(Debug, Clone)]
pub(crate) struct LocalColumn {
    pub(crate) name: String,
    pub(crate) type_oid: u32,
    /// As `format_type` prints it, for casts.
    pub(crate) type_sql: String,
    /// Schema-qualified type name, to compare with a peer's: [`pg::TYPE_NAME`].
    pub(crate) type_name: String,
    pub(crate) generated: bool,
    /// Of a generated one: what it is computed by, of its own type, in SQL over the table's columns.
    pub(crate) expression: Option<String>,
    pub(crate) identity_always: bool,
    /// The type has no binary input, so its values travel as text.
    pub(crate) text_only: bool,
    /// The type below all domains.
    pub(crate) base_oid: u32,
    pub(crate) type_mod: i32,
    pub(crate) tree: TypeTree,
}

impl LocalColumn {
    /// Is it of the type whose empty value has a binary form that can be sent but not read?
    pub(crate) const fn is_tsquery(&self) -> bool {
        const TSQUERY_OID: u32 = 3615;
        self.base_oid == TSQUERY_OID
    }

    /// Is the type a domain? It may refuse NULL, today or after an ALTER DOMAIN.
    pub(crate) const fn is_domain(&self) -> bool {
        self.base_oid != self.type_oid
    }
}

/// A part of a unique index, and what its operator class and collation call equal: that need not be what `=` is here, whose
/// search path has only built-in operators.
#[derive(Debug, Clone)]
pub(crate) struct UniquePart {
    /// In SQL over the table's columns.
    pub(crate) sql: String,
    /// `::type`, as the operator takes it; empty for a polymorphic one.
    pub(crate) cast: String,
    /// `OPERATOR(schema.=)`
    pub(crate) equal: String,
    /// ` COLLATE schema.name`; empty where the type has none.
    pub(crate) collate: String,
}

/// A unique index other than the primary key.
#[derive(Debug, Clone)]
pub(crate) struct UniqueIndex {
    pub(crate) name: String,
    pub(crate) parts: Vec<UniquePart>,
    /// Which rows are in it, in SQL, where it is partial.
    pub(crate) predicate: Option<String>,
    /// Is a row with a NULL in it equal to none?
    pub(crate) nulls_distinct: bool,
}

/// A table here.
#[derive(Debug, Clone)]
pub(crate) struct LocalTable {
    pub(crate) schema: String,
    pub(crate) name: String,
    /// It holds its rows itself: those of tables that inherit from it are theirs. (A partitioned table has none of its own.)
    pub(crate) has_own_rows: bool,
    /// In the order of the row type: attribute numbers, dropped columns left out.
    pub(crate) columns: Vec<LocalColumn>,
    /// Indices into `columns`, in the key's order.
    pub(crate) key: Vec<usize>,
    pub(crate) key_deferrable: bool,
    /// OID of the table's row type.
    pub(crate) row_type: u32,
    pub(crate) unique: Vec<UniqueIndex>,
    /// Its foreign keys; filled in by the apply session alone.
    pub(crate) links: Links,
}

/// Why a table cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// For the stream there is no such table here; last, how that is.
    #[error("table {0}.{1} {2}")]
    Missing(String, String, &'static str),
    #[error("table {0}.{1} has no primary key on this node; add the one it has on the other nodes")]
    NoKey(String, String),
    #[error(transparent)]
    Sql(#[from] tokio_postgres::Error),
}

const ABSENT: &str = "does not exist on this node; create it as on the other nodes";
/// Of a table that is here by itself ([`super::passed_over`]), and was made a moment ago.
pub(crate) const APART: &str = "is not replicated on this node: postgres.tables does not choose it; what other nodes send of it is passed over";

const TABLE: &str = "SELECT c.oid, c.reltype, c.relkind = 'r' FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')";

const COLUMNS: &str = "SELECT a.attnum, a.attname::text, a.atttypid, format_type(a.atttypid, NULL), \
    a.attgenerated <> '', a.attidentity = 'a', t.typsend = 0 OR t.typreceive = 0, @TYPE_NAME@, \
    (WITH RECURSIVE base AS (SELECT t.oid, t.typtype, t.typbasetype UNION ALL \
        SELECT y.oid, y.typtype, y.typbasetype FROM base b JOIN pg_type y ON y.oid = b.typbasetype WHERE b.typtype = 'd') \
    SELECT b.oid FROM base b WHERE b.typtype <> 'd'), a.atttypmod, \
    CASE WHEN a.attgenerated <> '' THEN '(' || pg_get_expr(d.adbin, d.adrelid) || ')::' || format_type(a.atttypid, a.atttypmod) END \
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace \
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

/// Of a type with a length `format_type` gives the one without with -1, and the one of length 1 with NULL. 403 is btree, whose third
/// strategy is equality.
const UNIQUE: &str = "SELECT c.relname::text, i.indisprimary, i.indimmediate, \
    i.indkey::int2[], i.indnkeyatts, NOT i.indnullsnotdistinct, p.parts, p.casts, p.operators, p.collations, \
    pg_get_expr(i.indpred, i.indrelid, false) \
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
    CROSS JOIN LATERAL (SELECT array_agg(pg_get_indexdef(i.indexrelid, k.place::int, false) ORDER BY k.place) AS parts, \
        array_agg(CASE WHEN t.typtype = 'p' THEN '' ELSE '::' || format_type(t.oid, -1) END ORDER BY k.place) AS casts, \
        array_agg(CASE WHEN e.oid IS NULL THEN 'OPERATOR(pg_catalog.=)' \
            ELSE format('OPERATOR(%I.%s)', en.nspname, e.oprname) END ORDER BY k.place) AS operators, \
        array_agg(CASE WHEN l.oid IS NULL THEN '' \
            ELSE format(' COLLATE %I.%I', ln.nspname, l.collname) END ORDER BY k.place) AS collations \
        FROM unnest(i.indclass::oid[], i.indcollation::oid[]) WITH ORDINALITY k(class, collation_oid, place) \
        JOIN pg_opclass o ON o.oid = k.class JOIN pg_type t ON t.oid = o.opcintype \
        LEFT JOIN pg_amop a ON a.amopfamily = o.opcfamily AND a.amoplefttype = o.opcintype \
            AND a.amoprighttype = o.opcintype AND a.amopstrategy = 3 AND o.opcmethod = 403 \
        LEFT JOIN pg_operator e ON e.oid = a.amopopr LEFT JOIN pg_namespace en ON en.oid = e.oprnamespace \
        LEFT JOIN pg_collation l ON l.oid = k.collation_oid LEFT JOIN pg_namespace ln ON ln.oid = l.collnamespace) p \
    WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid";

/// Reads a table from the catalogs.
pub(crate) async fn load(sql: &Client, schema: &str, name: &str) -> Result<LocalTable, Error> {
    let table = find(sql, schema, name).await?;
    read(sql, (schema, name), &table).await
}

/// The same in an open transaction, once DDL of the table that is committed is seen, too: it holds a lock until then.
pub(crate) async fn load_settled(sql: &Client, schema: &str, name: &str) -> Result<LocalTable, Error> {
    find(sql, schema, name).await?;
    let wait = format!(
        "LOCK TABLE ONLY {}.{} IN ACCESS SHARE MODE",
        quote(schema),
        quote(name)
    );
    sql.batch_execute(&wait).await?;
    load(sql, schema, name).await
}

async fn find(sql: &Client, schema: &str, name: &str) -> Result<Row, Error> {
    let table = sql.query_opt(TABLE, &[&schema, &name]).await?;
    table.ok_or_else(|| Error::Missing(schema.to_owned(), name.to_owned(), ABSENT))
}

async fn read(sql: &Client, (schema, name): (&str, &str), table: &Row) -> Result<LocalTable, Error> {
    let (oid, row_type): (u32, u32) = (table.try_get(0)?, table.try_get(1)?);
    let mut columns = Vec::new();
    let mut by_number: HashMap<i16, usize> = HashMap::new();
    let query = COLUMNS.replace("@TYPE_NAME@", pg::TYPE_NAME);
    for row in sql.query(&query, &[&oid]).await? {
        let type_oid: u32 = row.try_get(2)?;
        by_number.insert(row.try_get(0)?, columns.len());
        columns.push(LocalColumn {
            name: row.try_get(1)?,
            type_oid,
            type_sql: row.try_get(3)?,
            generated: row.try_get(4)?,
            expression: row.try_get(10)?,
            identity_always: row.try_get(5)?,
            text_only: row.try_get(6)?,
            type_name: row.try_get(7)?,
            base_oid: row.try_get::<_, Option<u32>>(8)?.unwrap_or(type_oid),
            type_mod: row.try_get(9)?,
            tree: tree(sql, type_oid, 0).await?,
        });
    }
    let (mut key, mut key_deferrable, mut unique) = (Vec::new(), false, Vec::new());
    for row in sql.query(UNIQUE, &[&oid]).await? {
        let (primary, immediate): (bool, bool) = (row.try_get(1)?, row.try_get(2)?);
        let numbers: Vec<i16> = row.try_get(3)?;
        let key_count: i16 = row.try_get(4)?;
        if primary {
            let of_key = numbers.iter().take(usize::try_from(key_count).unwrap_or(0));
            let indices: Option<Vec<usize>> = of_key.map(|number| by_number.get(number).copied()).collect();
            key = indices.unwrap_or_default();
            key_deferrable = !immediate;
        } else {
            unique.push(UniqueIndex {
                name: row.try_get(0)?,
                nulls_distinct: row.try_get(5)?,
                parts: parts(&row)?,
                predicate: row.try_get(10)?,
            });
        }
    }
    if key.is_empty() {
        return Err(Error::NoKey(schema.to_owned(), name.to_owned()));
    }
    Ok(LocalTable {
        schema: schema.to_owned(),
        name: name.to_owned(),
        has_own_rows: table.try_get(2)?,
        columns,
        key,
        key_deferrable,
        row_type,
        unique,
        links: Links::default(),
    })
}

/// The parts of an index, of a row of [`UNIQUE`].
fn parts(row: &Row) -> Result<Vec<UniquePart>, tokio_postgres::Error> {
    let texts = |at: usize| row.try_get::<_, Vec<String>>(at);
    let of_key = texts(6)?.into_iter().zip(texts(7)?);
    let parts = of_key.zip(texts(8)?.into_iter().zip(texts(9)?));
    let parts = parts.map(|((sql, cast), (equal, collate))| UniquePart {
        sql,
        cast,
        equal,
        collate,
    });
    Ok(parts.collect())
}

/// Unique keys beside the primary one, of operator classes and collations under which equal values look alike or differ in
/// case alone. Each part and the predicate as SQL, with the name of the column where a part is one.
const UNIQUE_KEYS: &str = "
SELECT i.indrelid, n.nspname::text, c.relname::text, x.relname::text, NOT i.indnullsnotdistinct,
    array_agg(pg_get_indexdef(i.indexrelid, k.place::int, false) ORDER BY k.place),
    array_agg(a.attname::text ORDER BY k.place),
    pg_get_expr(i.indpred, i.indrelid, false)
FROM pg_index i
JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class x ON x.oid = i.indexrelid
CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indcollation::oid[], i.indclass::oid[])
    WITH ORDINALITY k(attnum, collation_oid, class, place)
LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
JOIN pg_opclass o ON o.oid = k.class JOIN pg_namespace opn ON opn.oid = o.opcnamespace
LEFT JOIN pg_collation l ON l.oid = k.collation_oid
WHERE i.indisunique AND NOT i.indisprimary AND i.indisvalid
    AND c.relkind IN ('r', 'p') AND k.place <= i.indnkeyatts
    AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch')
GROUP BY i.indexrelid, 1, 2, 3, 4, 5, i.indpred
HAVING bool_and(coalesce(l.collisdeterministic, true) AND (opn.nspname = 'pg_catalog' OR o.opcname = 'citext_ops'))
ORDER BY 2, 3, 4";

/// The columns of tables that have such keys: their base type, and whether equal values of a key on them look alike. Not of
/// domains where the form depends on the base type (numeric, bpchar): a peer knows them by the domain. Last, has the locale a `lower` or `upper` that
/// [`fold`](crate::resolve::unique::fold) does not follow? ICU takes accents off in Greek, parts an Armenian ligature its own way, and
/// keeps the dot of a Lithuanian i. Generated columns are left out: they do not travel, so a row that comes in has no value of a key on one.
const KEY_COLUMNS: &str = "
SELECT a.attrelid, a.attname::text,
    CASE WHEN t.typtype = 'e' THEN 'enum'
         WHEN tn.nspname = 'pg_catalog' OR t.typname = 'citext' THEN t.typname::text ELSE '' END,
    coalesce(l.collisdeterministic, true), t.typtype = 'c',
    CASE WHEN t.typname IN ('numeric', 'bpchar') THEN a.atttypid = t.oid ELSE true END,
    coalesce(CASE l.collprovider WHEN 'd' THEN coalesce(d.of->>'datlocale', d.of->>'daticulocale')
        ELSE coalesce(to_jsonb(l)->>'colllocale', to_jsonb(l)->>'colliculocale') END ~ '^(el|hy|lt)', false)
FROM pg_attribute a
JOIN base b ON b.typ = a.atttypid AND b.typtype <> 'd'
JOIN pg_type t ON t.oid = b.base JOIN pg_namespace tn ON tn.oid = t.typnamespace
LEFT JOIN pg_collation l ON l.oid = a.attcollation
CROSS JOIN (SELECT to_jsonb(d) AS of FROM pg_database d WHERE d.datname = current_database()) d
WHERE a.attrelid = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''";

/// What a table's columns are to its unique keys.
#[derive(Default)]
struct KeyColumns {
    /// Those that expressions may be of.
    readable: Vec<Column>,
    /// Those whose equal values look alike.
    canonical: HashSet<String>,
}

/// Reads the unique keys that rows are compared by, of all tables.
///
/// # Errors
/// When the catalogs cannot be read.
pub async fn unique_keys(sql: &Client) -> Result<UniqueKeys, tokio_postgres::Error> {
    let found = sql.query(UNIQUE_KEYS, &[]).await?;
    let mut tables = Vec::new();
    for row in &found {
        tables.push(row.try_get::<_, u32>(0)?);
    }
    let mut columns: HashMap<u32, KeyColumns> = HashMap::new();
    for row in sql
        .query(&format!("{BASE_TYPES}{KEY_COLUMNS}"), &[&tables])
        .await?
    {
        let (name, base): (String, String) = (row.try_get(1)?, row.try_get(2)?);
        let (deterministic, composite, plain): (bool, bool, bool) =
            (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
        let of = columns.entry(row.try_get(0)?).or_default();
        let is_key_type = base == "enum" || base == "numeric" || KEY_TYPES.contains(&base.as_str());
        if deterministic && plain && is_key_type {
            of.canonical.insert(name.clone());
        }
        // Of a composite value IS NULL means something else.
        if !composite {
            let class = class_of(&base, deterministic && !row.try_get::<_, bool>(6)?);
            of.readable.push(Column { name, class });
        }
    }
    let mut out = UniqueKeys::new();
    for row in &found {
        let Some(columns) = columns.get(&row.try_get(0)?) else {
            continue;
        };
        let name: String = row.try_get(3)?;
        let key = unique_key(
            name.as_str(),
            row.try_get(4)?,
            (
                &row.try_get::<_, Vec<String>>(5)?,
                &row.try_get::<_, Vec<Option<String>>>(6)?,
            ),
            row.try_get(7)?,
            columns,
        );
        if let Some(key) = key {
            out.entry((row.try_get(1)?, row.try_get(2)?))
                .or_default()
                .push(key);
        }
    }
    Ok(out)
}

/// `None` where the daemon cannot compare by the key.
fn unique_key(
    name: &str,
    nulls_distinct: bool,
    (texts, names): (&[String], &[Option<String>]),
    predicate: Option<String>,
    columns: &KeyColumns,
) -> Option<UniqueKey> {
    let mut reader = Reader::new(&columns.readable);
    let mut parts = Vec::with_capacity(texts.len());
    for (text, name) in texts.iter().zip(names) {
        let column = name.as_ref().filter(|name| columns.canonical.contains(*name));
        parts.push(match column {
            Some(name) => Part::Column(reader.place(name)),
            None => Part::Term(reader.part(text)?),
        });
    }
    let mut definition: Vec<&str> = texts.iter().map(String::as_str).collect();
    let cond = match &predicate {
        Some(text) => {
            definition.extend(["WHERE", text]);
            Some(reader.predicate(text)?)
        }
        None => None,
    };
    Some(UniqueKey {
        name: name.into(),
        definition: definition.join("\0"),
        columns: reader.used,
        parts,
        predicate: cond,
        nulls_distinct,
    })
}

fn class_of(base: &str, foldable: bool) -> Class {
    match base {
        "bool" => Class::Bool,
        "int2" | "int4" | "int8" => Class::Int,
        "text" | "varchar" if foldable => Class::Text,
        "bpchar" if foldable => Class::Padded,
        "citext" if foldable => Class::Citext,
        "enum" => Class::Enum,
        "uuid" => Class::Uuid,
        _ => Class::Other,
    }
}

/// OIDs below this are built in, and the same on every server.
pub(crate) const FIRST_USER_OID: u32 = 16_384;

const TYPE: &str = "SELECT t.typtype::text, t.typelem, t.typbasetype, t.typrelid, t.typlen = -1 AND t.typelem <> 0 \
    AND t.typcategory = 'A', coalesce(r.rngsubtype, m.rngsubtype, 0) \
    FROM pg_type t LEFT JOIN pg_range r ON r.rngtypid = t.oid LEFT JOIN pg_range m ON m.rngmultitypid = t.oid \
    WHERE t.oid = $1";

const FIELDS: &str = "SELECT atttypid FROM pg_attribute WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped \
    ORDER BY attnum";

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

fn tree(sql: &Client, oid: u32, depth: u8) -> Boxed<'_, Result<TypeTree, Error>> {
    Box::pin(async move {
        // Types cannot contain themselves except by way of arrays of composites, which nobody keeps in a table.
        if oid < FIRST_USER_OID || depth > 16 {
            return Ok(TypeTree::Plain);
        }
        let Some(row) = sql.query_opt(TYPE, &[&oid]).await? else {
            return Ok(TypeTree::Plain);
        };
        let kind: String = row.try_get(0)?;
        let (element_oid, base, relation): (u32, u32, u32) =
            (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        let (is_array, subtype): (bool, u32) = (row.try_get(4)?, row.try_get(5)?);
        Ok(match kind.as_str() {
            "d" => tree(sql, base, depth + 1).await?,
            "c" => {
                let mut fields = Vec::new();
                for field in sql.query(FIELDS, &[&relation]).await? {
                    let field_oid: u32 = field.try_get(0)?;
                    fields.push((field_oid, tree(sql, field_oid, depth + 1).await?));
                }
                TypeTree::Composite(fields)
            }
            "r" | "m" => match (tree(sql, subtype, depth + 1).await?, kind.as_str()) {
                (TypeTree::Plain, _) => TypeTree::Plain,
                (bound, "r") => TypeTree::Range(Box::new(bound)),
                (bound, _) => TypeTree::Multirange(Box::new(bound)),
            },
            _ if is_array => {
                let element = Box::new(tree(sql, element_oid, depth + 1).await?);
                TypeTree::Array { element_oid, element }
            }
            _ => TypeTree::Plain,
        })
    })
}
