//! Rows that were written before DDL gave a column of theirs another type: what the DDL makes of such a row at the node that wrote it.
//!
//! A row of a node that had not run `ALTER COLUMN ... TYPE` yet is described by the former type, for good: in the stream, in the journal, in
//! quarantine. At its own node the statement turns the value into one of the new type. So it is that value which the row has to have
//! everywhere; refused, the row would be missing here until somebody writes it again, though all tables are the same by then. The server is
//! asked for the value, by the cast that ALTER TABLE applies where the statement does not say USING.
//!
//! In:   actions as they were decided      Out: the same, described by the types that the columns have here
//! Invariants: 1. only where it is known how the type came about: by a statement that travelled, that has no USING, and that is the only one between
//!             the two types ([`is_told`]). 2. by a cast of built-in types alone, which gives the same at all nodes and at all
//!             times ([`CASTS`]). 3. where that cannot be had the row waits in quarantine, as any that does not fit
//! Not here: reading statements ([`said`]); lengths (`varchar(5)`): the column's input function sees to them as ALTER TABLE does; rows that are
//!           folded of several versions, whose descriptions may be mixed
//!
//! Columns of the primary key are other: a row is known by its key's bytes, and what is another value is another row. So only `varchar` that has become
//! `text` is the same there.

pub(super) mod said;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use bytes::Bytes;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Row};

use super::batch::{Action, Write};
use super::catalog::{LocalColumn, LocalTable};
use super::failure::Failure;
use super::plan::is_same_type;
use super::session::Raw;
use super::write::Writer;
use crate::pg;
use crate::resolve::Folding;
use crate::shared::lock;

/// How rows of one description get the types that their columns have here.
#[derive(Debug)]
pub(crate) struct Retyped {
    /// The description with these types.
    pub(crate) table: Arc<TableDesc>,
    /// Columns of another type, by their places in the description, and what that is.
    columns: Vec<(usize, u32)>,
    /// Gives their values of today, for an array of each one's former ones.
    sql: String,
}

/// What is known of descriptions that do not fit for a type; `None` of those that cannot be made to.
#[derive(Debug, Default)]
pub(crate) struct RetypedTables(HashMap<usize, Known>);

#[derive(Debug)]
struct Known {
    retyped: Option<Arc<Retyped>>,
    /// Kept, or its address would be another's.
    _table: Arc<TableDesc>,
}

impl RetypedTables {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn get(&self, table: &Arc<TableDesc>) -> Option<Option<Arc<Retyped>>> {
        let known = self.0.get(&(Arc::as_ptr(table) as usize))?;
        Some(known.retyped.clone())
    }

    pub(super) fn insert(
        &mut self,
        table: &Arc<TableDesc>,
        retyped: Option<Retyped>,
    ) -> Option<Arc<Retyped>> {
        // Those of rows in quarantine are read anew each time.
        if self.0.len() >= 10_000 {
            self.0.clear();
        }
        let retyped = retyped.map(Arc::new);
        let known = Known {
            retyped: retyped.clone(),
            _table: Arc::clone(table),
        };
        self.0.insert(Arc::as_ptr(table) as usize, known);
        retyped
    }
}

/// A column of another type: its place in the description, how it is described, what it is here.
type Differing<'t> = (usize, &'t ColumnDesc, &'t LocalColumn);

/// Are columns that both have of one type in both? `is_own`: see [`super::own_tables`].
pub(super) fn has_same_types(table: &TableDesc, local: &LocalTable, is_own: bool) -> bool {
    differing(table, local, is_own).next().is_none()
}

fn differing<'t>(
    table: &'t TableDesc,
    local: &'t LocalTable,
    is_own: bool,
) -> impl Iterator<Item = Differing<'t>> {
    table.columns.iter().enumerate().filter_map(move |(at, there)| {
        let here = local.columns.iter().find(|here| here.name == there.name)?;
        (!is_same_type(here, there, is_own)).then_some((at, there, here))
    })
}

/// Finds out how rows of a description that does not fit here get to fit, if they do.
pub(super) async fn load(
    client: &Client,
    table: &TableDesc,
    local: &LocalTable,
    is_own: bool,
) -> Result<Option<Retyped>, Error> {
    let columns: Vec<Differing<'_>> = differing(table, local, is_own).collect();
    if columns.is_empty() || columns.iter().any(|column| !may_differ(table, column)) {
        return Ok(None);
    }
    let Some(casts) = casts(client, &columns).await? else {
        return Ok(None);
    };
    if !are_told(client, local, &columns, &casts).await? {
        return Ok(None);
    }
    let mut as_here = TableDesc::clone(table);
    let (mut values, mut arrays, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for (place, ((at, _, here), cast)) in columns.iter().zip(&casts).enumerate() {
        values.push(format!("v.c{place}::{}", cast.now));
        arrays.push(format!("unnest(${}::{}[])", place + 1, cast.former));
        names.push(format!("c{place}"));
        if let Some(column) = as_here.columns.get_mut(*at) {
            (column.type_oid, column.type_mod) = (here.type_oid, -1);
            column.type_name.clone_from(&here.type_name);
        }
    }
    let sql = format!(
        "SELECT {} FROM ROWS FROM ({}) WITH ORDINALITY AS v ({}, ord) ORDER BY v.ord",
        values.join(", "),
        arrays.join(", "),
        names.join(", ")
    );
    Ok(Some(Retyped {
        table: Arc::new(as_here),
        columns: columns
            .iter()
            .map(|(at, there, _)| (*at, there.type_oid))
            .collect(),
        sql,
    }))
}

/// May a column be made another type's at all?
fn may_differ(table: &TableDesc, (at, there, here): &Differing<'_>) -> bool {
    const TEXT: u32 = 25;
    const VARCHAR: u32 = 1043;
    let in_key = table.key.iter().any(|key| usize::from(*key) == *at);
    !here.generated && (!in_key || (there.type_oid, here.type_oid) == (VARCHAR, TEXT))
}

/// The types of a column in SQL.
struct Cast {
    former: String,
    now: String,
    /// What stands between the parentheses of the former type.
    lengths: String,
}

/// Casts that ALTER TABLE may apply by itself, and that give the same whenever and wherever they are applied: of built-in types (whose OIDs are below
/// 10,000), which others know by the same binary form; defined by the server, as one for assignments, or the one by way of the text to a string type,
/// which needs no definition; and by nothing that a setting has a say in (`timestamp` to `timestamptz`). Without arrays. An explicit
/// cast is no other than an assignment's where no length is given.
const CASTS: &str = "
SELECT 'pg_catalog.' || quote_ident(o.typname), 'pg_catalog.' || quote_ident(t.typname), format_type(o.oid, k.typmod)
FROM unnest($1::oid[], $2::int4[], $3::oid[]) WITH ORDINALITY AS k (former, typmod, now, place)
JOIN pg_type o ON o.oid = k.former JOIN pg_proc written ON written.oid = o.typoutput
JOIN pg_type t ON t.oid = k.now JOIN pg_proc taken ON taken.oid = t.typinput
LEFT JOIN pg_cast c ON c.castsource = o.oid AND c.casttarget = t.oid
LEFT JOIN pg_proc f ON f.oid = c.castfunc
WHERE o.oid < 10000 AND o.typtype = 'b' AND o.typcategory <> 'A' AND o.typarray <> 0 AND o.typsend <> 0 AND o.typreceive <> 0
    AND t.oid < 10000 AND t.typtype = 'b' AND t.typcategory <> 'A' AND t.typsend <> 0 AND t.typreceive <> 0
    AND CASE
        WHEN c.oid IS NULL THEN t.typcategory = 'S' AND written.provolatile = 'i' AND taken.provolatile = 'i'
        WHEN c.oid >= 16384 OR c.castcontext = 'e' THEN false
        WHEN c.castmethod = 'b' THEN true
        WHEN c.castmethod = 'f' THEN f.provolatile = 'i'
        ELSE written.provolatile = 'i' AND taken.provolatile = 'i' END
ORDER BY k.place";

async fn casts(client: &Client, columns: &[Differing<'_>]) -> Result<Option<Vec<Cast>>, Error> {
    let former: Vec<u32> = columns.iter().map(|(_, there, _)| there.type_oid).collect();
    let mods: Vec<i32> = columns.iter().map(|(_, there, _)| there.type_mod).collect();
    let now: Vec<u32> = columns.iter().map(|(_, _, here)| here.type_oid).collect();
    let rows = client.query(CASTS, &[&former, &mods, &now]).await?;
    if rows.len() != columns.len() {
        return Ok(None);
    }
    let cast = |row: &Row| {
        let name: String = row.try_get(2)?;
        Ok(Cast {
            former: row.try_get(0)?,
            now: row.try_get(1)?,
            lengths: said::lengths(&name),
        })
    };
    rows.iter().map(cast).collect::<Result<_, Error>>().map(Some)
}

/// Statements that may have changed a type. (Nothing takes one away.)
const STATEMENTS: &str =
    "SELECT command, search_path, role FROM anabranch.ddl WHERE command ~* '\\mtype\\M' ORDER BY said_at, id";

/// What a statement may call the table: a statement of one that it is a partition of, or inherits from, changes it, too.
const NAMES: &str = "
WITH RECURSIVE up (oid) AS (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2
    UNION SELECT i.inhparent FROM pg_inherits i JOIN up ON i.inhrelid = up.oid)
SELECT n.nspname::text, c.relname::text FROM up JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace";

const TYPES: &str =
    "SELECT to_regtype(t)::oid FROM unnest($1::text[]) WITH ORDINALITY AS k (t, place) ORDER BY k.place";

/// Is it known of all columns how their types came about?
async fn are_told(
    client: &Client,
    local: &LocalTable,
    columns: &[Differing<'_>],
    casts: &[Cast],
) -> Result<bool, Error> {
    let mut names: Vec<(String, String)> = Vec::new();
    for row in client.query(NAMES, &[&local.schema, &local.name]).await? {
        names.push((row.try_get(0)?, row.try_get(1)?));
    }
    let mut statements = Vec::new();
    for row in client.query(STATEMENTS, &[]).await? {
        let (command, path, role): (String, String, String) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        statements.push((command, path, role));
    }
    for ((_, there, here), cast) in columns.iter().zip(casts) {
        let mut changes = Vec::new();
        for (command, path, role) in &statements {
            let is_meant = |schema: Option<&str>, name: &str| {
                let mut names = names.iter().filter(|known| known.1 == name);
                names.any(|known| match schema {
                    Some(schema) => known.0 == schema,
                    None => is_in_path(&known.0, path, role),
                })
            };
            match said::changes(command, &there.name, is_meant) {
                Some(some) => changes.extend(some),
                // It may be about the column.
                None if command.to_lowercase().contains(&there.name.to_lowercase()) => return Ok(false),
                None => {}
            }
        }
        let texts: Vec<&str> = changes.iter().map(|change| change.to.as_str()).collect();
        // Up to version 15 it refuses what is no type at all.
        let Ok(rows) = pg::attempt(client, client.query(TYPES, &[&texts])).await? else {
            return Ok(false);
        };
        let mut all = Vec::with_capacity(changes.len());
        for (row, change) in rows.iter().zip(&changes) {
            all.push(Given {
                type_oid: row.try_get::<_, Option<u32>>(0)?.unwrap_or(0),
                lengths: said::lengths(&change.to),
                has_using: change.has_using,
            });
        }
        if !is_told(&all, (there.type_oid, &cast.lengths), here.type_oid) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Is a schema one that a name without a schema may be of?
fn is_in_path(schema: &str, path: &str, role: &str) -> bool {
    let mut parts = path.split(',').map(|part| part.trim().trim_matches('"'));
    parts.any(|part| part == schema || (part == "$user" && role == schema))
}

/// A type that a statement gave to a column.
struct Given {
    /// 0 where there is none of that name.
    type_oid: u32,
    lengths: String,
    has_using: bool,
}

/// Do these statements, which are all that a column's type was changed by, say what becomes of a value of `former`, a type and its lengths? The last
/// (or the last ones, if they say the same) has made the type that the column has. Those before it have made the former one: with another one among
/// them it is not known which of them a row has been through, and each may leave something else of its value.
fn is_told(statements: &[Given], former: (u32, &str), now: u32) -> bool {
    const NUMERIC: u32 = 1700;
    const INTERVAL: u32 = 1186;
    // `numeric(10)` is `numeric(10,0)`; of an interval there is more to say than that.
    let is_former = |given: &Given| {
        let is_same = given.lengths == former.1
            || given.type_oid == NUMERIC && format!("{},0", given.lengths) == former.1;
        given.type_oid == former.0 && given.type_oid != INTERVAL && is_same
    };
    let Some(last) = statements.last() else {
        return false;
    };
    let is_last = |given: &Given| given.type_oid == now && given.lengths == last.lengths;
    let mut before = statements.iter().rev().skip_while(|given| is_last(given));
    is_last(last) && before.all(is_former) && statements.iter().all(|given| !given.has_using)
}

impl Writer<'_> {
    /// The actions with values of the types that the columns have here, if any row's are others. `is_folded`: a row may be one of
    /// several versions.
    pub(super) async fn with_types(
        &mut self,
        actions: &[Action],
        is_folded: bool,
    ) -> Result<Option<Vec<Action>>, Failure> {
        let mut known: HashMap<usize, Option<Arc<Retyped>>> = HashMap::new();
        let mut described: BTreeMap<usize, (Arc<Retyped>, Vec<usize>)> = BTreeMap::new();
        let mut fits = None;
        for (at, action) in actions.iter().enumerate() {
            let address = Arc::as_ptr(&action.table) as usize;
            if fits == Some(address) {
                continue;
            }
            let found = match known.entry(address) {
                Entry::Occupied(found) => found.into_mut(),
                Entry::Vacant(free) => free.insert(self.session.retyped(&action.table).await?),
            };
            let Some(retyped) = found else {
                fits = Some(address);
                continue;
            };
            if !self.may_be_mixed(action, is_folded) {
                let new = || (Arc::clone(retyped), Vec::new());
                described.entry(address).or_insert_with(new).1.push(at);
            }
        }
        if described.is_empty() {
            return Ok(None);
        }
        let mut out = actions.to_vec();
        for (retyped, places) in described.into_values() {
            let rows = places.iter().filter_map(|&at| match &actions.get(at)?.write {
                Write::Put(row) => Some(row),
                Write::Delete(_) => None,
            });
            let rows: Vec<&RowImage> = rows.collect();
            let mut made = self.cast(&retyped, &rows).await?.into_iter();
            for at in places {
                let Some(action) = out.get_mut(at) else { continue };
                if let Write::Put(row) = &mut action.write {
                    // What has no value of the new type does not fit, and is refused where it is written.
                    let Some(new) = made.next().flatten() else {
                        continue;
                    };
                    *row = new;
                }
                if self.session.own_tables().holds(&action.table) {
                    let own = self.session.own_tables();
                    own.learn(std::iter::once(&retyped.table));
                }
                action.table = Arc::clone(&retyped.table);
            }
        }
        Ok(Some(out))
    }

    /// A row of one version, with values of the types that the columns have here, if its are others; for lines of the log.
    pub(super) async fn shown_as_here(
        &mut self,
        table: &Arc<TableDesc>,
        row: &RowImage,
    ) -> Result<Option<(Arc<TableDesc>, RowImage)>, Failure> {
        let is_merged = {
            let mut resolver = lock(&self.shared.resolver);
            let id = resolver.table_id(table);
            matches!(resolver.merging(id), Some(Folding::Columns(_)))
        };
        let retyped = match is_merged {
            true => None,
            false => self.session.retyped(table).await?,
        };
        let Some(retyped) = retyped else {
            return Ok(None);
        };
        let made = self.cast(&retyped, &[row]).await?.pop().flatten();
        Ok(made.map(|row| (Arc::clone(&retyped.table), row)))
    }

    /// Where columns are merged a row may hold values of versions that are described otherwise; and what is in quarantine may be such a row.
    /// Not one that is made of one version alone: what nobody has raced is folded, too, when it is tried again.
    fn may_be_mixed(&self, action: &Action, is_folded: bool) -> bool {
        let resolver = lock(&self.shared.resolver);
        matches!(resolver.merging(action.key.table()), Some(Folding::Columns(_)))
            && (is_folded || action.again || !action.folds.is_empty())
            && !resolver.is_image_of(&action.key, action.version.stamp)
    }

    /// The rows with their values of the new types; none for one that has no such value.
    async fn cast(
        &mut self,
        retyped: &Retyped,
        rows: &[&RowImage],
    ) -> Result<Vec<Option<RowImage>>, Failure> {
        if let Some(made) = self.cast_all(retyped, rows).await? {
            return Ok(made.into_iter().map(Some).collect());
        }
        let mut out = Vec::with_capacity(rows.len());
        for row in rows {
            let made = match rows.len() {
                1 => None,
                _ => self.cast_all(retyped, std::slice::from_ref(row)).await?,
            };
            out.push(made.and_then(|mut made| made.pop()));
        }
        Ok(out)
    }

    /// None where the server refuses one of them.
    async fn cast_all(
        &mut self,
        retyped: &Retyped,
        rows: &[&RowImage],
    ) -> Result<Option<Vec<RowImage>>, Failure> {
        if rows.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let columns = retyped.columns.iter();
        let arrays =
            columns.map(|(at, type_oid)| array(*type_oid, rows.iter().map(|row| row.cells().nth(*at))));
        let Some(arrays) = arrays.collect::<Option<Vec<Bytes>>>() else {
            return Ok(None);
        };
        let params: Vec<Raw> = arrays.into_iter().map(Raw).collect();
        let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|raw| raw as &(dyn ToSql + Sync)).collect();
        let Some(answers) = self.try_query(&retyped.sql, &params, true).await? else {
            return Ok(None);
        };
        if answers.len() != rows.len() {
            return Ok(None);
        }
        let made = rows
            .iter()
            .zip(&answers)
            .map(|(row, answer)| with_values(row, retyped, answer));
        Ok(Some(made.collect::<Result<_, Error>>()?))
    }
}

fn with_values(row: &RowImage, retyped: &Retyped, answer: &Row) -> Result<RowImage, Error> {
    let mut cells: Vec<Cell<'_>> = row.cells().collect();
    for (place, (at, _)) in retyped.columns.iter().enumerate() {
        let pg::Image(value) = answer.try_get(place)?;
        if let Some(cell) = cells.get_mut(*at) {
            *cell = value.map_or(Cell::Null, Cell::Binary);
        }
    }
    Ok(RowImage::build(cells.into_iter()))
}

/// An array of values, as its type's binary form; none where one of them has another form.
fn array<'r>(type_oid: u32, values: impl ExactSizeIterator<Item = Option<Cell<'r>>>) -> Option<Bytes> {
    let count = u32::try_from(values.len()).ok()?;
    let mut out = Vec::with_capacity(20 + values.len() * 16);
    for part in [1, 1, type_oid, count, 1] {
        out.extend_from_slice(&part.to_be_bytes());
    }
    for value in values {
        match value? {
            Cell::Null => out.extend_from_slice(&(-1i32).to_be_bytes()),
            Cell::Binary(value) => anabranch_proto::wire::put_bytes(&mut out, value),
            Cell::Text(_) | Cell::Unchanged => return None,
        }
    }
    Some(Bytes::from(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_goes_through_one_statement_or_none() {
        const INT: u32 = 23;
        const BIGINT: u32 = 20;
        const NUMERIC: u32 = 1700;
        const TEXT: u32 = 25;
        let given = |all: &[(u32, &str, bool)]| -> Vec<Given> {
            let given = all.iter().map(|&(type_oid, lengths, has_using)| Given {
                type_oid,
                lengths: lengths.to_owned(),
                has_using,
            });
            given.collect()
        };
        for (statements, former, now, expected) in [
            (&[(BIGINT, "", false)][..], (INT, ""), BIGINT, true),
            // By hand, or by way of a new column of that name.
            (&[][..], (INT, ""), BIGINT, false),
            (&[(BIGINT, "", false)][..], (INT, ""), TEXT, false),
            (&[(0, "", false)][..], (INT, ""), TEXT, false),
            (&[(BIGINT, "", true)][..], (INT, ""), BIGINT, false),
            // Said twice; and what rounds twice.
            (
                &[(BIGINT, "", false), (BIGINT, "", false)][..],
                (INT, ""),
                BIGINT,
                true,
            ),
            (
                &[(NUMERIC, "10,4", false), (NUMERIC, "10,2", false)][..],
                (TEXT, ""),
                NUMERIC,
                false,
            ),
            // The row has been through the first, whichever that was.
            (
                &[(NUMERIC, "10", false), (TEXT, "", false)][..],
                (NUMERIC, "10,0"),
                TEXT,
                true,
            ),
            (
                &[(NUMERIC, "10,0", true), (TEXT, "", false)][..],
                (NUMERIC, "10,0"),
                TEXT,
                false,
            ),
            // 2.75 became 3 at its own node, before it became a text.
            (
                &[(NUMERIC, "10,0", false), (TEXT, "", false)][..],
                (NUMERIC, "10,2"),
                TEXT,
                false,
            ),
            (
                &[(BIGINT, "", false), (INT, "", false), (TEXT, "", false)][..],
                (INT, ""),
                TEXT,
                false,
            ),
        ] {
            assert_eq!(
                is_told(&given(statements), former, now),
                expected,
                "{former:?} {now}"
            );
        }
    }

    #[test]
    fn a_schema_is_looked_for_in_the_path_that_was_said() {
        assert!(is_in_path("public", "\"$user\", public", "app"));
        assert!(is_in_path("app", "\"$user\", public", "app"));
        assert!(is_in_path("My Shop", "\"My Shop\"", "app"));
        assert!(!is_in_path("shop", "\"$user\", public", "app"));
    }

    #[test]
    fn an_array_has_its_values_and_none_of_another_form() {
        let cells = [Some(Cell::Null), Some(Cell::Binary(&[0, 0, 0, 7]))];
        let expected: Vec<u8> = [1u32, 1, 23, 2, 1, u32::MAX, 4, 7]
            .iter()
            .flat_map(|part| part.to_be_bytes())
            .collect();
        assert_eq!(array(23, cells.into_iter()), Some(Bytes::from(expected)));
        assert_eq!(array(23, [Some(Cell::Text(b"7"))].into_iter()), None);
        assert_eq!(array(23, [None].into_iter()), None);
    }
}
