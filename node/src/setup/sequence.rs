//! What the catalog says of each sequence, and what the members have said of how they divide it.
//!
//! In:   a connection, the tables that are replicated            Out: [`Sequences`] to `interleave`
//! Not here: whether a sequence is safe, and what to do about it (`interleave`)

use std::collections::{BTreeMap, BTreeSet};

use anabranch_proto::NodeId;
use tokio_postgres::Client;

use super::error::Error;
use super::sql::{ident, qualified};
use crate::config::Method;
use crate::membership;

/// Name of the table in schema `anabranch` in which every member says how it divides each sequence.
pub const TABLE: &str = "sequence";

/// How much of a sequence is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The catalog only.
    Catalog,
    /// Last values too, and values in columns that are still to be handed out, where the session's role may read them.
    Values,
    /// And the highest value in each column.
    Columns,
}

/// A column whose default takes values from a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Oid of its table.
    pub table_oid: u32,
    /// Schema of its table.
    pub schema: String,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Of an identity column, whether GENERATED ALWAYS; none of a serial or another default.
    pub identity: Option<bool>,
    /// Its default, as SQL; none of an identity column.
    pub default: Option<String>,
    /// Highest value that its type holds; none where it is no integer.
    pub type_max: Option<i64>,
    /// Highest value in it, where that was asked for and there is one.
    pub highest: Option<i64>,
    /// Highest value in it that the sequence is still to hand out, where values were asked for and there is one.
    pub ahead: Option<i64>,
}

impl Column {
    /// `public.item.id`, a bigint that takes its values from [`Sequence::example`].
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Self {
            table_oid: 1,
            schema: "public".to_owned(),
            table: "item".to_owned(),
            name: "id".to_owned(),
            identity: None,
            default: Some("nextval('public.s'::regclass)".to_owned()),
            type_max: Some(i64::MAX),
            highest: Some(90),
            ahead: None,
        }
    }

    /// `schema.table.column`, quoted as needed.
    #[must_use]
    pub fn sql_name(&self) -> String {
        format!("{}.{}", qualified(&self.schema, &self.table), ident(&self.name))
    }

    /// `schema.table.column`, as a configuration names it.
    #[must_use]
    pub fn display(&self) -> String {
        format!("{}.{}.{}", self.schema, self.table, self.name)
    }
}

/// What a sequence has handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value {
    /// `last_value`.
    pub last: i64,
    /// Was it handed out, rather than being the next?
    pub called: bool,
}

/// One sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// Its type, such as `bigint`.
    pub data_type: String,
    /// Value that `RESTART` and `TRUNCATE ... RESTART IDENTITY` go back to.
    pub start: i64,
    /// Lowest value.
    pub min: i64,
    /// Highest value.
    pub max: i64,
    /// `INCREMENT BY`.
    pub increment: i64,
    /// `CYCLE`?
    pub cycles: bool,
    /// Its owner.
    pub owner: String,
    /// May the session's role alter it?
    pub may_alter: bool,
    /// None where it was not asked for, or may not be read.
    pub value: Option<Value>,
    /// Columns of replicated tables that take their values from it.
    pub columns: Vec<Column>,
    /// Does a column of any table take values from it?
    pub in_use: bool,
}

#[cfg(test)]
impl Sequence {
    /// `public.s`, which has given 100 values to [`Column::example`].
    pub(crate) fn example() -> Self {
        Self {
            schema: "public".to_owned(),
            name: "s".to_owned(),
            data_type: "bigint".to_owned(),
            start: 1,
            min: 1,
            max: i64::MAX,
            increment: 1,
            cycles: false,
            owner: "app".to_owned(),
            may_alter: true,
            value: Some(Value {
                last: 100,
                called: true,
            }),
            columns: vec![Column::example()],
            in_use: true,
        }
    }
}

impl Sequence {
    /// `schema.name`, quoted as needed.
    #[must_use]
    pub fn sql_name(&self) -> String {
        qualified(&self.schema, &self.name)
    }

    /// The next value, as far as it is known.
    #[must_use]
    pub fn next(&self) -> Option<i128> {
        let value = self.value?;
        let step = if value.called {
            i128::from(self.increment)
        } else {
            0
        };
        Some(i128::from(value.last) + step)
    }

    /// Highest value that it, and every column that uses it, can hold.
    #[must_use]
    pub fn bound(&self) -> i64 {
        let columns = self.columns.iter().filter_map(|column| column.type_max);
        columns.fold(self.max, i64::min)
    }
}

/// What a member said of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// How its ids are made.
    pub method: Method,
    /// It hands out every so-manieth value.
    pub increment: i64,
    /// Highest value that it may have handed out by another rule before; none where there was none.
    pub base: Option<i64>,
}

impl Said {
    /// Is the sequence as it says?
    #[must_use]
    pub fn is_kept_by(&self, sequence: &Sequence) -> bool {
        match self.method {
            Method::Interleave => self.increment == sequence.increment,
            Method::Range => {
                i128::from(sequence.max) - i128::from(sequence.min) + 1 == i128::from(self.increment)
            }
            Method::Snowflake => sequence.columns.is_empty(),
        }
    }
}

/// What there is of `anabranch.snowflake()`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Function {
    /// Its comment, which tells what it was made from; none where it does not exist.
    pub made_from: Option<String>,
    /// Last value of its sequence, where it may be read and there is one.
    pub last: Option<i64>,
}

/// Everything that `sequences` judges.
#[derive(Debug, Clone)]
pub struct Sequences {
    /// Those outside the system schemas and extensions.
    pub all: Vec<Sequence>,
    /// Columns of replicated tables that take their values from `anabranch.snowflake()`.
    pub snowflakes: Vec<Column>,
    /// The function.
    pub function: Function,
    /// (schema, name) to what each member, dropped ones too, said.
    pub said: BTreeMap<(String, String), BTreeMap<NodeId, Said>>,
    /// Live members, by id.
    pub members: BTreeMap<NodeId, String>,
    /// Highest node id that ever was.
    pub highest_id: NodeId,
}

impl Sequences {
    /// Columns of replicated tables that take their values from a sequence or `anabranch.snowflake()`.
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        let by_sequence = self.all.iter().flat_map(|sequence| &sequence.columns);
        by_sequence.chain(&self.snowflakes)
    }

    /// What was said of a sequence, by node.
    #[must_use]
    pub fn said_of(&self, sequence: &Sequence) -> Option<&BTreeMap<NodeId, Said>> {
        self.said.get(&(sequence.schema.clone(), sequence.name.clone()))
    }

    fn named(&self, schema: &str, name: &str) -> Option<&Sequence> {
        let mut all = self.all.iter();
        all.find(|sequence| sequence.schema == schema && sequence.name == name)
    }

    /// (schema, name) of what a node, this one, has said and does not hold: the sequence is gone, or divided otherwise. Not of snowflake
    /// ids: the columns of one sequence get them one after the other, and that of an identity column goes then.
    #[must_use]
    pub fn unkept(&self, node: NodeId) -> Vec<(String, String)> {
        let is_unkept = |((schema, name), said): &(&(String, String), &BTreeMap<NodeId, Said>)| {
            said.get(&node).is_some_and(|said| {
                let sequence = self.named(schema, name);
                said.method != Method::Snowflake && sequence.is_none_or(|sequence| !said.is_kept_by(sequence))
            })
        };
        let unkept = self.said.iter().filter(is_unkept);
        unkept.map(|(name, _)| name.clone()).collect()
    }

    /// Sequences that columns of replicated tables take values from, of which `node`, this one, has said that they have snowflake ids.
    #[must_use]
    pub fn counted_again(&self, node: NodeId) -> Vec<String> {
        let counted = self.all.iter().filter(|sequence| {
            let said = self.said_of(sequence).and_then(|said| said.get(&node));
            said.is_some_and(|said| said.method == Method::Snowflake && !said.is_kept_by(sequence))
        });
        counted.map(Sequence::sql_name).collect()
    }

    /// Sequences of replicated tables of which another live member has said that it divides them, and `node`, this one, has not.
    #[must_use]
    pub fn divided_elsewhere(&self, node: NodeId) -> Vec<String> {
        let used = self.all.iter().filter(|sequence| !sequence.columns.is_empty());
        let elsewhere = used.filter(|sequence| {
            self.said_of(sequence).is_some_and(|said| {
                let mut others = said.iter().filter(|(other, _)| self.members.contains_key(other));
                // Snowflake ids are far above what one node counts.
                !said.contains_key(&node) && others.any(|(_, said)| said.method != Method::Snowflake)
            })
        });
        elsewhere.map(Sequence::sql_name).collect()
    }
}

/// Tables of the publication, with their partitions and what they are partitions of.
const PUBLISHED: &str = "
    SELECT DISTINCT x.relid::oid FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
    CROSS JOIN LATERAL (SELECT r.prrelid AS relid UNION ALL SELECT relid::oid FROM pg_partition_tree(r.prrelid)
                        UNION ALL SELECT relid::oid FROM pg_partition_ancestors(r.prrelid)) x
    WHERE p.pubname = $1";

/// Oids of the tables that are replicated.
///
/// # Errors
/// When the server answers with an error.
pub async fn published(client: &Client, publication: &str) -> Result<BTreeSet<u32>, tokio_postgres::Error> {
    let rows = client.query(PUBLISHED, &[&publication]).await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

/// Reads the sequences and what was said of them. `tables` are the oids of those that are replicated.
///
/// # Errors
/// When the server answers a query with an error; [`Error::Refused`] where `init` has not been run.
pub async fn read(client: &Client, tables: &BTreeSet<u32>, depth: Depth) -> Result<Sequences, Error> {
    let read = |what| move |source| Error::Read { what, source };
    let row = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('anabranch.sequence') AND attname = 'method')",
            &[],
        )
        .await
        .map_err(read("schema anabranch"))?;
    if !row.try_get::<_, bool>(0).map_err(read("schema anabranch"))? {
        return Err(Error::Refused(
            "anabranch.sequence does not exist, or is of an older release: run `anabranch init` first"
                .to_owned(),
        ));
    }
    let members = membership::read(client).await.map_err(read("the members"))?;
    let mut all = catalog(client, tables).await.map_err(read("the sequences"))?;
    for sequence in &mut all {
        if depth != Depth::Catalog {
            values(client, sequence, depth)
                .await
                .map_err(read("the values of a sequence"))?;
        }
    }
    let own = client
        .query_opt("SELECT node_id FROM anabranch.node", &[])
        .await
        .map_err(read("anabranch.node"))?;
    let own = own
        .map(|row| row.try_get::<_, i32>(0))
        .transpose()
        .map_err(read("anabranch.node"))?;
    let mut snowflakes = snowflake_columns(client, tables)
        .await
        .map_err(read("columns with snowflake ids"))?;
    let function = function(client, depth)
        .await
        .map_err(read("anabranch.snowflake()"))?;
    if depth != Depth::Catalog {
        let node = own.map_or(NodeId(0), id);
        for column in &mut snowflakes {
            column.ahead = ahead(client, column, node)
                .await
                .map_err(read("a column with snowflake ids"))?;
        }
    }
    let ids = members.iter().map(|fact| fact.node);
    let ids: BTreeSet<NodeId> = ids.chain(own.map(id)).collect();
    Ok(Sequences {
        all,
        snowflakes,
        function,
        said: said(client).await.map_err(read("anabranch.sequence"))?,
        members: members
            .live()
            .into_iter()
            .map(|node| {
                let name = members.entry(node).map(|fact| fact.name.clone());
                (node, name.unwrap_or_default())
            })
            .collect(),
        highest_id: ids.last().copied().unwrap_or(NodeId(0)),
    })
}

fn id(number: i32) -> NodeId {
    NodeId(u16::try_from(number).unwrap_or(0))
}

async fn catalog(client: &Client, tables: &BTreeSet<u32>) -> Result<Vec<Sequence>, tokio_postgres::Error> {
    let mut columns: BTreeMap<u32, Vec<Column>> = BTreeMap::new();
    let mut in_use = BTreeSet::new();
    for row in client.query(&columns_sql(), &[]).await? {
        let sequence: u32 = row.try_get(0)?;
        in_use.insert(sequence);
        let table_oid: u32 = row.try_get(1)?;
        if !tables.contains(&table_oid) {
            continue;
        }
        columns.entry(sequence).or_default().push(Column {
            table_oid,
            schema: row.try_get(6)?,
            table: row.try_get(7)?,
            name: row.try_get(2)?,
            identity: row.try_get(3)?,
            type_max: row.try_get(4)?,
            default: row.try_get(5)?,
            highest: None,
            ahead: None,
        });
    }
    let rows = client.query(SEQUENCES, &[]).await?;
    rows.iter()
        .map(|row| {
            let oid: u32 = row.try_get(0)?;
            Ok(Sequence {
                schema: row.try_get(1)?,
                name: row.try_get(2)?,
                data_type: row.try_get(3)?,
                start: row.try_get(4)?,
                min: row.try_get(5)?,
                max: row.try_get(6)?,
                increment: row.try_get(7)?,
                cycles: row.try_get(8)?,
                owner: row.try_get(9)?,
                may_alter: row.try_get(10)?,
                value: None,
                columns: columns.remove(&oid).unwrap_or_default(),
                in_use: in_use.contains(&oid),
            })
        })
        .collect()
}

async fn snowflake_columns(
    client: &Client,
    tables: &BTreeSet<u32>,
) -> Result<Vec<Column>, tokio_postgres::Error> {
    let mut out = Vec::new();
    for row in client.query(SNOWFLAKES, &[]).await? {
        let table_oid: u32 = row.try_get(0)?;
        if !tables.contains(&table_oid) {
            continue;
        }
        out.push(Column {
            table_oid,
            schema: row.try_get(4)?,
            table: row.try_get(5)?,
            name: row.try_get(1)?,
            identity: None,
            default: row.try_get(2)?,
            type_max: row.try_get(3)?,
            highest: None,
            ahead: None,
        });
    }
    Ok(out)
}

async fn function(client: &Client, depth: Depth) -> Result<Function, tokio_postgres::Error> {
    let row = client
        .query_one(
            "SELECT obj_description(to_regprocedure('anabranch.snowflake()'), 'pg_proc'),
                    coalesce(has_sequence_privilege(to_regclass('anabranch.snowflake_seq'), 'SELECT'), false)",
            &[],
        )
        .await?;
    let last = if depth != Depth::Catalog && row.try_get(1)? {
        let last = client
            .query_one(
                "SELECT CASE WHEN is_called THEN last_value END FROM anabranch.snowflake_seq",
                &[],
            )
            .await?;
        last.try_get(0)?
    } else {
        None
    };
    Ok(Function {
        made_from: row.try_get(0)?,
        last,
    })
}

/// The highest id of this node in a column that its sequence does not know to be handed out.
async fn ahead(client: &Client, column: &Column, node: NodeId) -> Result<Option<i64>, tokio_postgres::Error> {
    let table = qualified(&column.schema, &column.table);
    let may: bool = client
        .query_one(
            "SELECT has_table_privilege($1, 'SELECT')
                 AND coalesce(has_sequence_privilege(to_regclass('anabranch.snowflake_seq'), 'SELECT'), false)",
            &[&table],
        )
        .await?
        .try_get(0)?;
    if !may {
        return Ok(None);
    }
    let name = ident(&column.name);
    let last = "(SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM anabranch.snowflake_seq)";
    let of_last = format!(
        "((({last} >> 12) << 22) | ({}::bigint << 12) | ({last} & 4095))",
        node.0
    );
    let sql = format!(
        "SELECT max({name})::bigint FROM {table} WHERE {name} > {of_last} AND (({name}::bigint >> 12) & 1023) = {}",
        node.0
    );
    let ahead: Option<i64> = client.query_one(&sql, &[]).await?.try_get(0)?;
    // What was handed out while the column was read is not ahead.
    let Some(ahead) = ahead.filter(|ahead| *ahead >= super::snowflake::LOWEST) else {
        return Ok(None);
    };
    let still: bool = client
        .query_one(&format!("SELECT {of_last} < {ahead}"), &[])
        .await?
        .try_get(0)?;
    Ok(still.then_some(ahead))
}

async fn values(client: &Client, sequence: &mut Sequence, depth: Depth) -> Result<(), tokio_postgres::Error> {
    let name = sequence.sql_name();
    let may: bool = client
        .query_one("SELECT has_sequence_privilege($1, 'SELECT')", &[&name])
        .await?
        .try_get(0)?;
    if !may {
        return Ok(());
    }
    sequence.value = Some(value(client, &name).await?);
    let (next, increment, max) = (sequence.next(), sequence.increment, sequence.max);
    for column in sequence
        .columns
        .iter_mut()
        .filter(|column| column.type_max.is_some())
    {
        let table = qualified(&column.schema, &column.table);
        let may: bool = client
            .query_one("SELECT has_table_privilege($1, 'SELECT')", &[&table])
            .await?
            .try_get(0)?;
        if !may {
            continue;
        }
        let highest = format!("SELECT max({})::bigint", ident(&column.name));
        if depth == Depth::Columns {
            let highest = format!("{highest} FROM {table}");
            column.highest = client.query_one(&highest, &[]).await?.try_get(0)?;
        }
        if let Some(next) = next.filter(|_| increment > 0) {
            let name = ident(&column.name);
            let ahead = format!(
                "{highest} FROM {table} WHERE {name} BETWEEN {next} AND {max} AND mod({name}::numeric - {next}, {increment}) = 0"
            );
            column.ahead = client.query_one(&ahead, &[]).await?.try_get(0)?;
        }
    }
    if sequence.columns.iter().any(|column| column.ahead.is_some()) {
        // What was handed out while the columns were read is not ahead.
        sequence.value = Some(value(client, &name).await?);
        let next = sequence.next();
        for column in &mut sequence.columns {
            column.ahead = column.ahead.filter(|ahead| next <= Some(i128::from(*ahead)));
        }
    }
    Ok(())
}

async fn value(client: &Client, name: &str) -> Result<Value, tokio_postgres::Error> {
    let row = client
        .query_one(&format!("SELECT last_value, is_called FROM {name}"), &[])
        .await?;
    Ok(Value {
        last: row.try_get(0)?,
        called: row.try_get(1)?,
    })
}

type SaidBySequence = BTreeMap<(String, String), BTreeMap<NodeId, Said>>;

async fn said(client: &Client) -> Result<SaidBySequence, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT schema_name, sequence_name, node_id, increment, base, method FROM anabranch.sequence",
            &[],
        )
        .await?;
    let mut out = SaidBySequence::new();
    for row in rows {
        let method: String = row.try_get(5)?;
        let said = Said {
            // One of a later release divides it in a way that is not known here.
            method: Method::of(&method).unwrap_or(Method::Interleave),
            increment: row.try_get(3)?,
            base: row.try_get(4)?,
        };
        out.entry((row.try_get(0)?, row.try_get(1)?))
            .or_default()
            .insert(id(row.try_get(2)?), said);
    }
    Ok(out)
}

const SEQUENCES: &str = "
SELECT c.oid, n.nspname::text, c.relname::text, format_type(s.seqtypid, NULL), s.seqstart, s.seqmin, s.seqmax,
    s.seqincrement, s.seqcycle, pg_get_userbyid(c.relowner)::text, pg_has_role(c.relowner, 'USAGE')
FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'anabranch', 'anabranch_join')
  AND c.relpersistence <> 't'
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 2, 3";

/// Which column (`rel`, `num`) takes values from which sequence (`seq`), or from another relation. A default names its sequence by a
/// dependency; an identity column's sequence depends on the column.
pub(super) const USES: &str = "
SELECT d.refobjid AS seq, f.adrelid AS rel, f.adnum AS num
FROM pg_depend d JOIN pg_attrdef f ON f.oid = d.objid
WHERE d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_class'::regclass
UNION
SELECT d.objid, d.refobjid, d.refobjsubid FROM pg_depend d
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i' AND d.refobjsubid > 0";

fn columns_sql() -> String {
    format!(
        "SELECT u.seq, a.attrelid, a.attname::text, CASE WHEN a.attidentity <> '' THEN a.attidentity = 'a' END,
             CASE a.atttypid WHEN 'int2'::regtype THEN 32767::bigint WHEN 'int4'::regtype THEN 2147483647
                             WHEN 'int8'::regtype THEN 9223372036854775807 END,
             (SELECT pg_get_expr(f.adbin, f.adrelid) FROM pg_attrdef f WHERE f.adrelid = u.rel AND f.adnum = u.num),
             n.nspname::text, t.relname::text
         FROM ({USES}) u
         JOIN pg_sequence s ON s.seqrelid = u.seq
         JOIN pg_attribute a ON a.attrelid = u.rel AND a.attnum = u.num
         JOIN pg_class t ON t.oid = u.rel JOIN pg_namespace n ON n.oid = t.relnamespace
         ORDER BY 1, 2, a.attnum"
    )
}

const SNOWFLAKES: &str = "
SELECT a.attrelid, a.attname::text, pg_get_expr(f.adbin, f.adrelid),
    CASE a.atttypid WHEN 'int8'::regtype THEN 9223372036854775807 END, n.nspname::text, t.relname::text
FROM pg_depend d JOIN pg_attrdef f ON f.oid = d.objid
JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
JOIN pg_class t ON t.oid = a.attrelid JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_proc'::regclass
  AND d.refobjid = to_regprocedure('anabranch.snowflake()')
ORDER BY a.attrelid::regclass::text, a.attnum";
