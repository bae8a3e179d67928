//! Rows of nodes that had not run DDL yet which added columns to their table: what they have in those.
//!
//! A row that a node wrote before it ran `ADD COLUMN` has, there, what the statement gives to the rows that it finds. So it must have that
//! at every node, also where somebody has written the new column of the row meanwhile, and lost: were the column left alone, or given its
//! default, nodes would differ that met the two in another order.
//!
//! In:   actions as they were decided      Out: the same, with the columns that they lack
//! Invariants: only of a node that had not run the statement, as its transaction says. One that lacks a column otherwise has had it
//!             dropped by hand, and says nothing of what others have in it
//! Not here: which columns were added, and what rows have in them ([`crate::setup::ddl::ADDED`]); columns that the table here lacks
//!           ([`super::refused`])

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use anabranch_conflict::{Op, Version};
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use anabranch_proto::{Lsn, NodeId, Position};
use tokio_postgres::types::{FromSql, PgLsn};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::batch::{Action, Write};
use super::catalog::{self, LocalColumn, LocalTable};
use super::failure::Failure;
use super::lookup::Said;
use super::plan::{Mismatch, Plan};
use super::session::TableError;
use super::write::Writer;
use crate::pg;
use crate::resolve::Folding;
use crate::shared::lock;

/// A column that DDL has added here, of a table that some description lacks it in.
#[derive(Debug)]
pub(crate) struct Late {
    column: ColumnDesc,
    /// Whose statement it was.
    node: NodeId,
    place: Place,
    value: Value,
}

/// Where the statement's transaction ended.
#[derive(Debug)]
enum Place {
    At(Position),
    /// In this node's own stream, behind the position; found once.
    Own(Uuid, Position, OnceLock<Position>),
}

#[derive(Debug)]
enum Value {
    Null,
    Binary(Vec<u8>),
    Text(Vec<u8>),
}

impl Late {
    fn cell(&self) -> Cell<'_> {
        match &self.value {
            Value::Null => Cell::Null,
            Value::Binary(value) => Cell::Binary(value),
            Value::Text(value) => Cell::Text(value),
        }
    }
}

const ANY: &str = "SELECT EXISTS (SELECT FROM anabranch.added_column)";

/// Has DDL added any column to any table?
pub(super) async fn any(client: &Client) -> Result<bool, tokio_postgres::Error> {
    client.query_one(ANY, &[]).await?.try_get(0)
}

const NOTED: &str = "SELECT a.attname::text, x.node_id, x.epoch, x.lsn, x.ddl::text, d.epoch, d.after_lsn, x.value, \
        format_type(a.atttypid, a.atttypmod), a.atthasmissing, a.attrelid, a.attnum \
    FROM anabranch.added_column x JOIN pg_class c ON c.oid = x.rel JOIN pg_namespace n ON n.oid = c.relnamespace \
    JOIN pg_attribute a ON a.attrelid = x.rel AND a.attnum = x.attnum AND NOT a.attisdropped \
    LEFT JOIN anabranch.ddl d ON d.id = x.ddl WHERE n.nspname = $1 AND c.relname = $2 ORDER BY x.attnum";

/// Of the columns `absent` of a table, by their places, those that DDL has added.
pub(super) async fn load(
    client: &Client,
    local: &LocalTable,
    absent: &[usize],
) -> Result<Vec<Late>, TableError> {
    let mut out = Vec::new();
    let noted = client.query(NOTED, &[&local.schema, &local.name]).await;
    for row in noted.map_err(catalog::Error::from)? {
        let name: String = get(&row, 0)?;
        let mut columns = absent.iter().filter_map(|&at| local.columns.get(at));
        let Some(column) = columns.find(|column| column.name == name) else {
            continue;
        };
        let position = |epoch: Option<i64>, lsn: Option<PgLsn>| {
            let epoch = u32::try_from(epoch?).unwrap_or(0);
            Some(Position::new(epoch, u64::from(lsn?)))
        };
        let node: i32 = get(&row, 1)?;
        let place = match position(get(&row, 2)?, get(&row, 3)?) {
            Some(at) => Place::At(at),
            None => {
                let after = position(get(&row, 5)?, get(&row, 6)?).unwrap_or(Position::ZERO);
                let id: String = get(&row, 4)?;
                Place::Own(Uuid::parse_str(&id).unwrap_or_default(), after, OnceLock::new())
            }
        };
        out.push(Late {
            column: ColumnDesc {
                name,
                type_oid: column.type_oid,
                type_mod: -1,
                type_name: column.type_name.clone(),
            },
            node: NodeId(u16::try_from(node).unwrap_or(0)),
            place,
            value: value(client, local, column, &row).await?,
        });
    }
    Ok(out)
}

fn get<'r, T: FromSql<'r>>(row: &'r Row, at: usize) -> Result<T, catalog::Error> {
    Ok(row.try_get(at)?)
}

/// What the rows have in the column that were there: what the catalog has, which is of the column's type whatever has become of that; else
/// what was noted, as that type reads it now.
async fn value(
    client: &Client,
    local: &LocalTable,
    column: &LocalColumn,
    row: &Row,
) -> Result<Value, TableError> {
    const OF_CATALOG: &str = "FROM pg_attribute a WHERE a.attrelid = $1 AND a.attnum = $2";
    let (noted, type_sql): (Option<String>, String) = (get(row, 7)?, get(row, 8)?);
    let is_known: bool = get(row, 9)?;
    if noted.is_none() && !is_known {
        return Ok(Value::Null);
    }
    let output = if column.text_only { "::text" } else { "" };
    let (rel, attnum): (u32, i16) = (get(row, 10)?, get(row, 11)?);
    // It is an array of one. There are none of arrays, but each of these stands in quotes.
    let first = if type_sql.ends_with("[]") {
        format!("((a.attmissingval::text::text[])[1])::{type_sql}")
    } else {
        format!("(a.attmissingval::text::{type_sql}[])[1]")
    };
    let of_catalog = format!("SELECT ({first}){output} {OF_CATALOG}");
    let of_note = format!("SELECT ($1::text::{type_sql}){output}");
    let asked = async {
        if is_known {
            client.query_one(of_catalog.as_str(), &[&rel, &attnum]).await
        } else {
            client.query_one(of_note.as_str(), &[&noted]).await
        }
    };
    match pg::attempt(client, asked).await.map_err(catalog::Error::from)? {
        Ok(row) => Ok(match get::<pg::Image<'_>>(&row, 0)?.0 {
            Some(image) if column.text_only => Value::Text(image.to_vec()),
            Some(image) => Value::Binary(image.to_vec()),
            None => Value::Null,
        }),
        Err(error) => {
            let (schema, table) = (local.schema.clone(), local.name.clone());
            let why = crate::error::sql(&error).to_string();
            Err(Mismatch::Added(schema, table, column.name.clone(), why).into())
        }
    }
}

/// Descriptions of tables with columns added.
#[derive(Debug, Default)]
pub(crate) struct Extended(HashMap<Lacking, With>);

/// The address of the description without, and which columns.
type Lacking = (usize, Vec<String>);

#[derive(Debug)]
struct With {
    longer: Arc<TableDesc>,
    /// Kept, or its address would be another's.
    _shorter: Arc<TableDesc>,
}

impl Extended {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn of(&mut self, table: &Arc<TableDesc>, late: &[&Late]) -> Arc<TableDesc> {
        let names = late.iter().map(|late| late.column.name.clone()).collect();
        let with = self
            .0
            .entry((Arc::as_ptr(table) as usize, names))
            .or_insert_with(|| {
                let mut longer = TableDesc::clone(table);
                longer.columns.extend(late.iter().map(|late| late.column.clone()));
                With {
                    longer: Arc::new(longer),
                    _shorter: Arc::clone(table),
                }
            });
        Arc::clone(&with.longer)
    }
}

impl Writer<'_> {
    /// Was DDL of this node met in its stream since plans were made? Then they are made anew, of tables as that left them.
    pub(crate) fn forget_what_own_ddl_changed(&mut self) {
        let said = self.shared.own_ddl.load(Ordering::Acquire);
        self.session.note_own_ddl(said);
    }

    /// Waits for the decoder, as [`super::fence`] says; and begins again where it met DDL of this node, of which the plans know nothing.
    pub(super) async fn pass_fence(&mut self) -> Result<(), Failure> {
        self.fence.pass(self.shared).await?;
        if self.plans_are_current() {
            Ok(())
        } else {
            Err(Failure::Raced)
        }
    }

    /// Has none been met since?
    pub(crate) fn plans_are_current(&self) -> bool {
        self.session
            .knows_own_ddl(self.shared.own_ddl.load(Ordering::Acquire))
    }

    /// The actions with what rows lack, if any row lacks something. `is_locked`: their rows are locked, and those that are there known.
    pub(crate) async fn with_late(
        &mut self,
        actions: &[Action],
        is_locked: bool,
    ) -> Result<Option<Vec<Action>>, Failure> {
        if actions.is_empty() || !self.session.has_added_columns().await? {
            return Ok(None);
        }
        let mut plans: HashMap<usize, Option<Arc<Plan>>> = HashMap::new();
        let mut lack = false;
        for action in actions {
            let address = Arc::as_ptr(&action.table) as usize;
            if plans.contains_key(&address) {
                continue;
            }
            // What does not fit is refused where it is written.
            let plan = self.session.plan_if_fit(&action.table).await?;
            let plan = plan.filter(|plan| !plan.late.is_empty());
            lack |= plan.is_some();
            plans.insert(address, plan);
        }
        if !lack {
            return Ok(None);
        }
        let mut out = Vec::with_capacity(actions.len());
        let mut unmet = HashSet::new();
        for action in actions {
            let plan = plans
                .get(&(Arc::as_ptr(&action.table) as usize))
                .cloned()
                .flatten();
            let filled = match plan {
                Some(plan) if self.lacks(action, is_locked) => self.filled(action, &plan, &mut unmet).await?,
                _ => None,
            };
            out.push(filled.unwrap_or_else(|| action.clone()));
        }
        Ok(Some(out))
    }

    /// Is it a row whose version is all that there is of it? A column that a version lacks is in a merged row what others wrote; where the
    /// row is new nobody did.
    fn lacks(&self, action: &Action, is_locked: bool) -> bool {
        if !matches!(action.write, Write::Put(_)) {
            return false;
        }
        let merging = lock(&self.shared.resolver).merging(action.key.table());
        if !matches!(merging, Some(Folding::Columns(_))) {
            return true;
        }
        if is_locked {
            !self.locked.contains(&action.key)
        } else {
            action.op == Op::Insert && action.expect.present == Some(false) && action.folds.is_empty()
        }
    }

    /// `unmet`: own statements that are not in the journal yet, as was found a moment ago.
    async fn filled(
        &mut self,
        action: &Action,
        plan: &Plan,
        unmet: &mut HashSet<Uuid>,
    ) -> Result<Option<Action>, Failure> {
        let Write::Put(row) = &action.write else {
            return Ok(None);
        };
        let mut unseen = Vec::new();
        for late in &plan.late {
            if !self.had_run(action.version, late, unmet).await? {
                unseen.push(late);
            }
        }
        if unseen.is_empty() {
            return Ok(None);
        }
        let cells: Vec<Cell<'_>> = row.cells().chain(unseen.iter().map(|late| late.cell())).collect();
        let table = self.session.extended.of(&action.table, &unseen);
        if self.session.own_tables().holds(&action.table) {
            self.session.own_tables().learn(std::iter::once(&table));
        }
        Ok(Some(Action {
            table,
            write: Write::Put(RowImage::build(cells.into_iter())),
            ..action.clone()
        }))
    }

    /// Had the node that wrote this version run the statement?
    async fn had_run(
        &mut self,
        version: Version,
        late: &Late,
        unmet: &mut HashSet<Uuid>,
    ) -> Result<bool, Failure> {
        let place = match &late.place {
            Place::At(place) => *place,
            Place::Own(id, after, found) => match found.get() {
                Some(place) => *place,
                None if unmet.contains(id) => return Ok(false),
                None => match self.lookup.own_ddl(*id, *after)? {
                    Said::At(place) => {
                        self.note_place(*id, place).await?;
                        *found.get_or_init(|| place)
                    }
                    // Whoever has seen it has seen more of this node than this node knows of itself.
                    Said::NotYet => {
                        unmet.insert(*id);
                        return Ok(false);
                    }
                    // All have run it since long.
                    Said::LetGo => *found.get_or_init(|| *after),
                },
            },
        };
        if version.origin() == late.node {
            return Ok(version.position >= place);
        }
        // Of one that the journal has let go of, all that is known is that it lacks the column.
        let header = self.lookup.header(version)?;
        Ok(header.is_some_and(|header| header.deps.get(late.node) >= place))
    }

    async fn note_place(&mut self, id: Uuid, place: Position) -> Result<(), Failure> {
        const NOTE: &str = "UPDATE anabranch.added_column SET epoch = $2, lsn = $3 WHERE ddl = $1::text::uuid AND lsn IS NULL";
        let Lsn(lsn) = place.lsn;
        let (epoch, lsn) = (i64::from(place.epoch), PgLsn::from(lsn));
        let note = self.session.prepare(NOTE).await?;
        let client = &self.session.client;
        client.execute(&note, &[&id.to_string(), &epoch, &lsn]).await?;
        Ok(())
    }
}
