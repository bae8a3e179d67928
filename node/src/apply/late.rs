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

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anabranch_conflict::{Op, Version};
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use anabranch_proto::{Lsn, NodeId, Position};
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;
use uuid::Uuid;

use super::batch::{Action, Write};
use super::catalog::{self, LocalTable};
use super::failure::Failure;
use super::lookup::Said;
use super::session::TableError;
use super::write::Writer;
use crate::pg;
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
    /// In this node's own stream, of which it is not known: behind there.
    Own(Uuid, Position),
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

const NOTED: &str = "SELECT a.attname::text, x.node_id, x.epoch, x.lsn, x.ddl::text, d.epoch, d.after_lsn, x.value \
    FROM anabranch.added_column x JOIN pg_class c ON c.oid = x.rel JOIN pg_namespace n ON n.oid = c.relnamespace \
    JOIN pg_attribute a ON a.attrelid = x.rel AND a.attnum = x.attnum AND a.atttypid = x.type AND NOT a.attisdropped \
    LEFT JOIN anabranch.ddl d ON d.id = x.ddl WHERE n.nspname = $1 AND c.relname = $2 ORDER BY x.attnum";

/// Of the columns `absent` of a table, by their places, those that DDL has added.
pub(super) async fn load(
    client: &Client,
    local: &LocalTable,
    absent: &[usize],
) -> Result<Vec<Late>, tokio_postgres::Error> {
    let mut out = Vec::new();
    for row in client.query(NOTED, &[&local.schema, &local.name]).await? {
        let name: String = row.try_get(0)?;
        let mut columns = absent.iter().filter_map(|&at| local.columns.get(at));
        let Some(column) = columns.find(|column| column.name == name) else {
            continue;
        };
        let position = |epoch: Option<i64>, lsn: Option<PgLsn>| {
            let epoch = u32::try_from(epoch?).unwrap_or(0);
            Some(Position::new(epoch, u64::from(lsn?)))
        };
        let node: i32 = row.try_get(1)?;
        let place = match position(row.try_get(2)?, row.try_get(3)?) {
            Some(at) => Place::At(at),
            None => {
                let after = position(row.try_get(5)?, row.try_get(6)?).unwrap_or(Position::ZERO);
                let id: String = row.try_get(4)?;
                Place::Own(Uuid::parse_str(&id).unwrap_or_default(), after)
            }
        };
        let text: Option<String> = row.try_get(7)?;
        let value = match text {
            None => Value::Null,
            Some(text) if column.text_only => Value::Text(text.into_bytes()),
            Some(text) => {
                let read = format!("SELECT $1::text::{}", column.type_sql);
                let read = client.query_one(read.as_str(), &[&text]).await?;
                match read.try_get::<_, pg::Image<'_>>(0)?.0 {
                    Some(image) => Value::Binary(image.to_vec()),
                    None => Value::Null,
                }
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
            value,
        });
    }
    Ok(out)
}

/// Descriptions of tables with columns added: by the address of the one without, which the entry keeps alive, and by which columns.
#[derive(Debug, Default)]
pub(crate) struct Extended(HashMap<(usize, Vec<String>), (Arc<TableDesc>, Arc<TableDesc>)>);

impl Extended {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn of(&mut self, table: &Arc<TableDesc>, late: &[&Late]) -> Arc<TableDesc> {
        let names = late.iter().map(|late| late.column.name.clone()).collect();
        let entry = self
            .0
            .entry((Arc::as_ptr(table) as usize, names))
            .or_insert_with(|| {
                let mut longer = TableDesc::clone(table);
                longer.columns.extend(late.iter().map(|late| late.column.clone()));
                (Arc::clone(table), Arc::new(longer))
            });
        Arc::clone(&entry.1)
    }
}

impl Writer<'_> {
    /// Was DDL of this node met in its stream since plans were made? Then they are made anew, of tables as that left them.
    pub(crate) fn forget_what_own_ddl_changed(&mut self) {
        let said = self.shared.own_ddl.load(Ordering::Acquire);
        self.session.note_own_ddl(said);
    }

    /// Has none been met since?
    pub(crate) fn plans_are_current(&self) -> bool {
        self.session
            .knows_own_ddl(self.shared.own_ddl.load(Ordering::Acquire))
    }

    /// The actions with what rows lack, if any row lacks something.
    pub(crate) async fn with_late(&mut self, actions: &[Action]) -> Result<Option<Vec<Action>>, Failure> {
        let (mut last, mut lack) = (0, false);
        for action in actions {
            let address = Arc::as_ptr(&action.table) as usize;
            if address == last {
                continue;
            }
            last = address;
            match self.session.plan(&action.table).await {
                Ok(plan) => lack |= !plan.late.is_empty(),
                Err(TableError::Catalog(catalog::Error::Sql(error))) => return Err(Failure::Sql(error)),
                // It is refused where it is written.
                Err(_) => {}
            }
        }
        if !lack {
            return Ok(None);
        }
        let mut out = Vec::with_capacity(actions.len());
        for action in actions {
            out.push(self.filled(action).await?.unwrap_or_else(|| action.clone()));
        }
        Ok(Some(out))
    }

    async fn filled(&mut self, action: &Action) -> Result<Option<Action>, Failure> {
        let Write::Put(row) = &action.write else {
            return Ok(None);
        };
        // A column that a version does not have is in a merged row what others wrote; what nobody did is in a row that is new.
        let is_merged = lock(&self.shared.resolver).merging(action.key.table()).is_some();
        if is_merged && (action.op != Op::Insert || !action.folds.is_empty()) {
            return Ok(None);
        }
        let Ok(plan) = self.session.plan(&action.table).await else {
            return Ok(None);
        };
        let mut unseen = Vec::new();
        for late in &plan.late {
            if !self.had_run(action.version, late).await? {
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
    async fn had_run(&mut self, version: Version, late: &Late) -> Result<bool, Failure> {
        let place = match late.place {
            Place::At(place) => place,
            Place::Own(id, after) => match self.lookup.own_ddl(id, after)? {
                Said::At(place) => {
                    self.note_place(id, place).await?;
                    place
                }
                // Whoever has seen it has seen more of this node than this node knows of itself.
                Said::NotYet => return Ok(false),
                // All have run it since long.
                Said::LetGo => after,
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
        self.session
            .client
            .execute(&note, &[&id.to_string(), &epoch, &lsn])
            .await?;
        Ok(())
    }
}
