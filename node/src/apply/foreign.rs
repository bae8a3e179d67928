//! Foreign keys between replicated tables, as this server's catalogs have them.
//!
//! In:   the catalogs        Out: [`ForeignKey`]s, and [`Links`]: which of them a table holds, and which refer to it
//! Holds: nothing; the apply session keeps them as long as what it knows of tables
//! Not here: looking for rows that break them ([`super::orphans`])
//!
//! Left out: keys that PostgreSQL does not enforce, keys over periods (18), and keys of which the daemon's role may not read
//! or lock one of the tables: such a table is not replicated.

use std::collections::HashMap;
use std::sync::Arc;

use anabranch_conflict::Kind;
use anabranch_conflict::orphan::Parent;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use tokio_postgres::Client;

use super::plan::quote;
use crate::resolve::{self, Resolver};

/// Schema and name.
pub(crate) type TableName = (String, String);

/// A column that refers, and the one referred to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) child: String,
    pub(crate) parent: String,
    pub(crate) child_type: String,
    /// For casts.
    pub(crate) parent_type: String,
    /// The operator between the parent's value and the child's: `OPERATOR(pg_catalog.=)`.
    pub(crate) equal: String,
    /// ` COLLATE x` behind the child's value, where its own collation is another one than the parent's.
    pub(crate) collate: String,
}

/// A foreign key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForeignKey {
    pub(crate) name: String,
    /// The table that holds it, as SQL names it; may be partitioned. With ONLY where it is not: rows of tables that inherit from
    /// it are held to nothing, as PostgreSQL's own checks have it.
    pub(crate) child_rows: String,
    /// The tables that its rows are in: that one, or its partitions.
    pub(crate) children: Vec<TableName>,
    /// The table referred to, as SQL names it; may be partitioned.
    pub(crate) parent: String,
    /// Its rows, likewise: rows of tables that inherit from it are nobody's parents.
    pub(crate) parent_rows: String,
    pub(crate) parents: Vec<TableName>,
    /// In the order of the key that is referred to, if that is the primary one.
    pub(crate) pairs: Vec<Pair>,
    /// Does it refer to the primary key?
    pub(crate) to_primary: bool,
    /// Has the child an index that finds the rows of a parent?
    pub(crate) is_indexed: bool,
}

/// The foreign keys of one table.
#[derive(Debug, Clone, Default)]
pub(crate) struct Links {
    /// Those it holds.
    pub(crate) held: Vec<Arc<ForeignKey>>,
    /// Those that refer to it.
    pub(crate) referring: Vec<Arc<ForeignKey>>,
}

impl Links {
    /// Has it a part in a foreign key?
    pub(crate) const fn is_empty(&self) -> bool {
        self.held.is_empty() && self.referring.is_empty()
    }

    /// Do keys refer to columns of it that are not the primary key?
    pub(crate) fn is_referred_to_otherwise(&self) -> bool {
        self.referring.iter().any(|key| !key.to_primary)
    }
}

/// All foreign keys, by table.
#[derive(Debug, Default)]
pub(crate) struct KeysByTable(HashMap<TableName, Links>);

impl KeysByTable {
    pub(crate) fn new(keys: Vec<ForeignKey>) -> Self {
        let mut tables: HashMap<TableName, Links> = HashMap::new();
        for key in keys {
            let key = Arc::new(key);
            for table in &key.children {
                tables
                    .entry(table.clone())
                    .or_default()
                    .held
                    .push(Arc::clone(&key));
            }
            for table in &key.parents {
                tables
                    .entry(table.clone())
                    .or_default()
                    .referring
                    .push(Arc::clone(&key));
            }
        }
        Self(tables)
    }

    pub(crate) fn of(&self, table: &TableName) -> Links {
        self.0.get(table).cloned().unwrap_or_default()
    }
}

/// Of a partitioned table's keys only the table's own: its partitions' are the same again. Whether a key is enforced or over a
/// period is not a column before 18.
const KEYS: &str = "
SELECT c.conname::text,
    format('%s%I.%I', CASE cc.relkind WHEN 'p' THEN '' ELSE 'ONLY ' END, cn.nspname, cc.relname),
    format('%I.%I', pn.nspname, pc.relname),
    coalesce(i.indisprimary, false),
    EXISTS (SELECT FROM pg_index x WHERE x.indrelid = c.conrelid AND x.indisvalid AND x.indpred IS NULL
            AND (x.indkey::int2[])[0] = ANY (c.conkey)),
    leaves.c_schemas, leaves.c_names, leaves.p_schemas, leaves.p_names,
    pairs.children, pairs.parents, pairs.types, pairs.operators, pairs.collations, pc.relkind = 'p', pairs.child_types
FROM pg_constraint c
JOIN pg_class cc ON cc.oid = c.conrelid JOIN pg_namespace cn ON cn.oid = cc.relnamespace
JOIN pg_class pc ON pc.oid = c.confrelid JOIN pg_namespace pn ON pn.oid = pc.relnamespace
LEFT JOIN pg_index i ON i.indexrelid = c.conindid
CROSS JOIN LATERAL (
    SELECT array_agg(ln.nspname::text ORDER BY l.oid) FILTER (WHERE of = 'c') AS c_schemas,
        array_agg(l.relname::text ORDER BY l.oid) FILTER (WHERE of = 'c') AS c_names,
        array_agg(ln.nspname::text ORDER BY l.oid) FILTER (WHERE of = 'p') AS p_schemas,
        array_agg(l.relname::text ORDER BY l.oid) FILTER (WHERE of = 'p') AS p_names
    FROM (SELECT 'c' AS of, c.conrelid AS oid UNION SELECT 'c', relid::oid FROM pg_partition_tree(c.conrelid)
          UNION SELECT 'p', c.confrelid UNION SELECT 'p', relid::oid FROM pg_partition_tree(c.confrelid)) AS t
    JOIN pg_class l ON l.oid = t.oid AND l.relkind = 'r' JOIN pg_namespace ln ON ln.oid = l.relnamespace) AS leaves
CROSS JOIN LATERAL (
    SELECT array_agg(ca.attname::text ORDER BY at) AS children,
        array_agg(pa.attname::text ORDER BY at) AS parents,
        array_agg(format_type(pa.atttypid, -1) ORDER BY at) AS types,
        array_agg(format_type(ca.atttypid, -1) ORDER BY at) AS child_types,
        array_agg(format('OPERATOR(%I.%s)', n.nspname, o.oprname) ORDER BY at) AS operators,
        array_agg(CASE WHEN pa.attcollation <> 0 AND pa.attcollation <> ca.attcollation
            THEN format(' COLLATE %I.%I', lcn.nspname, lc.collname) ELSE '' END ORDER BY at) AS collations
    FROM unnest(c.conkey, c.confkey, c.conpfeqop) WITH ORDINALITY AS k(child, parent, op, place)
    JOIN pg_attribute ca ON ca.attrelid = c.conrelid AND ca.attnum = k.child
    JOIN pg_attribute pa ON pa.attrelid = c.confrelid AND pa.attnum = k.parent
    JOIN pg_operator o ON o.oid = k.op JOIN pg_namespace n ON n.oid = o.oprnamespace
    LEFT JOIN pg_collation lc ON lc.oid = pa.attcollation LEFT JOIN pg_namespace lcn ON lcn.oid = lc.collnamespace
    CROSS JOIN LATERAL (SELECT coalesce(array_position(i.indkey::int2[], k.parent), k.place::int) AS at) AS a) AS pairs
WHERE c.contype = 'f' AND c.conparentid = 0
    AND coalesce((to_jsonb(c) ->> 'conenforced')::bool, true) AND NOT coalesce((to_jsonb(c) ->> 'conperiod')::bool, false)
    AND cn.nspname <> 'anabranch'
    AND has_schema_privilege(cn.oid, 'USAGE') AND has_schema_privilege(pn.oid, 'USAGE')
    AND has_table_privilege(c.conrelid, 'SELECT') AND has_table_privilege(c.conrelid, 'UPDATE')
    AND has_table_privilege(c.confrelid, 'SELECT') AND has_table_privilege(c.confrelid, 'UPDATE')
ORDER BY c.oid";

/// Reads all foreign keys from the catalogs.
pub(crate) async fn load(sql: &Client) -> Result<Vec<ForeignKey>, tokio_postgres::Error> {
    let mut out = Vec::new();
    for row in sql.query(KEYS, &[]).await? {
        let texts = |at: usize| -> Result<Vec<String>, tokio_postgres::Error> {
            Ok(row.try_get::<_, Option<Vec<String>>>(at)?.unwrap_or_default())
        };
        let named = |schemas: Vec<String>, names: Vec<String>| schemas.into_iter().zip(names).collect();
        let children = texts(9)?.into_iter().zip(texts(15)?);
        let parents = texts(10)?.into_iter().zip(texts(11)?);
        let rest = texts(12)?.into_iter().zip(texts(13)?);
        let pairs = children.zip(parents).zip(rest);
        let pairs = pairs.map(|((child, parent), (equal, collate))| Pair {
            child: child.0,
            parent: parent.0,
            child_type: child.1,
            parent_type: parent.1,
            equal,
            collate,
        });
        let parent: String = row.try_get(2)?;
        let only = if row.try_get(14)? { "" } else { "ONLY " };
        out.push(ForeignKey {
            name: row.try_get(0)?,
            child_rows: row.try_get(1)?,
            children: named(texts(5)?, texts(6)?),
            parent_rows: format!("{only}{parent}"),
            parent,
            parents: named(texts(7)?, texts(8)?),
            pairs: pairs.collect(),
            to_primary: row.try_get(3)?,
            is_indexed: row.try_get(4)?,
        });
    }
    Ok(out)
}

impl ForeignKey {
    /// `p.a OPERATOR(..) t.b AND ..`: is `p`'s row the parent of `child`'s? `parent` gives the parent's value of a column.
    pub(crate) fn joined(&self, parent: impl Fn(&Pair) -> String, child: &str) -> String {
        let pairs = self.pairs.iter().map(|pair| {
            let (equal, collate) = (&pair.equal, &pair.collate);
            format!("{} {equal} {child}.{}{collate}", parent(pair), quote(&pair.child))
        });
        pairs.collect::<Vec<_>>().join(" AND ")
    }

    /// Does `child` refer to anything? With a NULL among the columns it does not.
    pub(crate) fn refers(&self, child: &str) -> String {
        let each = self.pairs.iter();
        let each = each.map(|pair| format!("{child}.{} IS NOT NULL", quote(&pair.child)));
        each.collect::<Vec<_>>().join(" AND ")
    }

    /// `FROM .. AS p WHERE ..`: the parent of `child`.
    pub(crate) fn parent_of(&self, child: &str) -> String {
        let joined = self.joined(|pair| format!("p.{}", quote(&pair.parent)), child);
        format!("FROM {} AS p WHERE {joined}", self.parent_rows)
    }

    /// `t.a::int4, ..`: the values by which `child` refers, as the parent's columns have them.
    pub(crate) fn values_of(&self, child: &str) -> impl Iterator<Item = String> {
        let values = self.pairs.iter();
        values.map(move |pair| format!("{child}.{}::{}", quote(&pair.child), pair.parent_type))
    }

    /// What became of the parent with this primary key, as far as that is decoded. `desc` describes one of the tables it may have been in.
    ///
    /// # Errors
    /// When the key has no value, or the index overflow cannot be read.
    pub(crate) fn parent_now(
        &self,
        resolver: &mut Resolver,
        desc: &TableDesc,
        image: &RowImage,
    ) -> Result<Parent, resolve::Error> {
        let mut parent = Parent::Unknown;
        // It was in one of the partitions, if there are some.
        for (schema, name) in &self.parents {
            let (schema, name) = (schema.clone(), name.clone());
            let desc = TableDesc {
                schema,
                name,
                ..desc.clone()
            };
            let key = resolver.key_of_image(&desc, image)?;
            match resolver.current(&key)? {
                Some(entry) if entry.version.kind == Kind::Delete => {
                    let later = match parent {
                        Parent::Deleted(before) => before.stamp < entry.version.stamp,
                        _ => true,
                    };
                    if later {
                        parent = Parent::Deleted(entry.version);
                    }
                }
                Some(entry) if !entry.is_there() => parent = Parent::Parked(entry.version),
                _ => {}
            }
        }
        Ok(parent)
    }
}
