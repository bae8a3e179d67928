//! DDL of another node: run at its place in the stream, in the transaction of the rows around it.
//!
//! In:   a row of `anabranch.ddl`, between the rows before and after it      Out: a changed schema, or why not
//! Invariants: 1. what is not run is not passed: its transaction waits, and with it all of its origin; 2. it runs with the
//!             rights of the role that ran it at its origin (`crate::setup::ddl`); 3. and once: where its row is, it has run
//! On crash: the transaction is gone, and is applied again
//! Not here: waiting and trying again (`super`), DDL that is said here (`crate::setup::ddl`, and in the database)

use std::collections::{HashMap, VecDeque};

use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, PutOp, TxnHeader};
use anabranch_proto::wire::Malformed;
use anabranch_proto::{NodeId, Position, Vector};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::apart;
use super::failure::Failure;
use super::named_anew::Name;
use super::write::Writer;
use crate::membership::{binary, number};
use crate::names::Names;
use crate::pg;
use crate::setup::ddl::{self, RunError};
use crate::shared::{Lasting, lock};

/// A statement of another node.
#[derive(Debug, Clone)]
pub(crate) struct Ddl {
    pub(crate) id: Uuid,
    pub(crate) origin: NodeId,
    /// Who ran it there.
    role: String,
    pub(crate) command: String,
    search_path: String,
    /// Did its origin refuse tables with rows that would be published?
    rows_checked: bool,
    /// What its transaction had seen.
    deps: Vector,
    /// Where that ended.
    place: Position,
}

/// Why a statement cannot be run here.
#[derive(Debug, thiserror::Error)]
#[error("DDL of node {} (id {}): {error}", ddl.origin, ddl.id)]
pub(crate) struct Stuck {
    pub(crate) ddl: Ddl,
    pub(crate) error: RunError,
}

impl Stuck {
    /// Only a lock is in the way.
    pub(crate) fn waits_for_lock(&self) -> bool {
        match &self.error {
            RunError::Sql(error) => {
                let waits = [SqlState::LOCK_NOT_AVAILABLE, SqlState::T_R_DEADLOCK_DETECTED];
                error.code().is_some_and(|code| waits.contains(code))
            }
            RunError::NotLet(_) | RunError::Unfit(_) => false,
        }
    }
}

const DONE: &str = "SELECT EXISTS (SELECT FROM anabranch.ddl_done WHERE id = $1::text::uuid)";
const HERE: &str = "SELECT EXISTS (SELECT FROM anabranch.ddl WHERE id = $1::text::uuid)";

/// Statements of other nodes, as far back as is looked.
const OTHERS: &str = "
    SELECT node_id, (after_lsn - '0/0')::int8, command, coalesce((to_jsonb(d) ->> 'epoch')::int8, 0), xmin::text, command = $2, id::text
    FROM anabranch.ddl d WHERE node_id <> $1 ORDER BY said_at DESC LIMIT 1000";
/// So many of them have their places kept.
const PLACES_MAX: usize = 1000;
/// Concurrent ones that are shown of one that cannot be run.
const CONCURRENT_MAX: usize = 50;

/// A statement of another node than one that is run, neither having seen the other.
pub(super) struct Other {
    pub(super) node: NodeId,
    pub(super) command: String,
    /// Is it the same text?
    pub(super) is_same: bool,
    /// The transaction, of this server, that has written its row, and run it.
    pub(super) xid: u32,
}

/// Where transactions ended that said DDL, in their origins' streams: what a statement's own row says lies before its commit by as much
/// as its transaction lasted. Those that were met last, and at the start those that the journal has.
#[derive(Debug, Default)]
pub struct Places {
    known: HashMap<Uuid, Position>,
    order: VecDeque<Uuid>,
}

impl Places {
    pub(crate) fn note(&mut self, id: Uuid, place: Position) {
        if self.known.insert(id, place).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > PLACES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    /// Had somebody who has `seen` so much of its node not seen the statement `id`, which was said behind `after`?
    fn is_unseen(&self, id: Uuid, seen: Position, after: Position) -> bool {
        match self.known.get(&id) {
            Some(place) => seen < *place,
            None => is_before(seen, after),
        }
    }
}

/// Is this table the one by which statements travel?
pub(crate) fn is_ddl(table: &TableDesc) -> bool {
    table.is_own() && table.name == ddl::TABLE
}

impl Ddl {
    /// The statement that a change brings, if it brings one.
    pub(crate) fn of(change: &Change, header: &TxnHeader) -> Result<Option<Self>, Malformed> {
        let Change::Put { table, row, .. } = change else {
            return Ok(None);
        };
        if !is_ddl(table) {
            return Ok(None);
        }
        let text = |name: &str| -> Result<String, Malformed> {
            String::from_utf8(binary(table, row, name)?.to_vec())
                .map_err(|_| Malformed("a text that is not UTF-8"))
        };
        let id = Uuid::from_slice(binary(table, row, "id")?).map_err(|_| Malformed("not a UUID"))?;
        Ok(Some(Self {
            id,
            origin: header.origin(),
            role: text("role")?,
            command: text("command")?,
            search_path: text("search_path")?,
            rows_checked: are_rows_checked(table, row)?,
            deps: header.deps.clone(),
            place: header.position,
        }))
    }

    #[cfg(test)]
    pub(super) fn example(origin: NodeId, command: &str) -> Self {
        Self {
            id: Uuid::nil(),
            origin,
            role: "app".to_owned(),
            command: command.to_owned(),
            search_path: "public".to_owned(),
            rows_checked: true,
            deps: Vector::new(),
            place: Position::ZERO,
        }
    }

    /// Statements of other nodes that neither saw this one nor were seen by it, as `node beta (2): statement`.
    pub(crate) async fn concurrent(
        &self,
        sql: &Client,
        (names, lasting): (&Names, &Lasting),
    ) -> Result<Vec<String>, tokio_postgres::Error> {
        let others = self.others(sql, lasting).await?;
        let text = |other: &Other| {
            let command: String = other.command.chars().take(200).collect();
            format!("node {}: {command}", names.with_id(other.node.0))
        };
        Ok(others.iter().take(CONCURRENT_MAX).map(text).collect())
    }

    /// The same, the last ones first. (What is here already, and of another node, has not seen this one.)
    pub(super) async fn others(
        &self,
        sql: &Client,
        lasting: &Lasting,
    ) -> Result<Vec<Other>, tokio_postgres::Error> {
        let origin = i32::from(self.origin.0);
        let rows = sql.query(OTHERS, &[&origin, &self.command]).await?;
        let mut out = Vec::new();
        for row in rows {
            let (node, after, epoch): (i32, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(3)?);
            let node = NodeId(u16::try_from(node).unwrap_or(0));
            let (epoch, after) = (
                u32::try_from(epoch).unwrap_or(0),
                u64::try_from(after).unwrap_or(0),
            );
            let id: String = row.try_get(6)?;
            let id = Uuid::parse_str(&id).unwrap_or_default();
            let (seen, after) = (self.deps.get(node), Position::new(epoch, after));
            if lock(&lasting.ddl_places).is_unseen(id, seen, after) {
                let xid: String = row.try_get(4)?;
                out.push(Other {
                    node,
                    command: row.try_get(2)?,
                    is_same: row.try_get(5)?,
                    xid: xid.parse().unwrap_or(0),
                });
            }
        }
        Ok(out)
    }

    /// It has run here: notes the names that it gives to tables, and says which they are.
    pub(crate) fn name_tables(&self, lasting: &Lasting) -> Vec<Name> {
        let path = (self.search_path.as_str(), self.role.as_str());
        lasting
            .named_anew
            .note(&self.command, path, (self.origin, self.place))
    }

    /// The same at the start, where it stands in the journal. None of one that a heal has said again.
    pub(crate) fn recall(change: &Change, header: &TxnHeader, lasting: &Lasting) -> Vec<Name> {
        if !matches!(
            change,
            Change::Put {
                op: PutOp::Insert,
                ..
            }
        ) {
            return Vec::new();
        }
        let Ok(Some(ddl)) = Self::of(change, header) else {
            return Vec::new();
        };
        lock(&lasting.ddl_places).note(ddl.id, ddl.place);
        ddl.name_tables(lasting)
    }

    /// Is its row here, as before this transaction? Whoever writes that row runs the statement in the same transaction.
    pub(crate) async fn is_here(&self, client: &Client) -> Result<bool, tokio_postgres::Error> {
        client.query_one(HERE, &[&self.id.to_string()]).await?.try_get(0)
    }

    /// Runs it in a transaction of somebody's.
    pub(crate) async fn run_once(&self, client: &Client) -> Result<(), RunError> {
        let done: bool = client
            .query_one(DONE, &[&self.id.to_string()])
            .await?
            .try_get(0)?;
        if done {
            tracing::info!(id = %self.id, origin = %self.origin, "DDL was done by hand, going on");
            return ddl::adopt(client).await;
        }
        let (role, path) = (&self.role, &self.search_path);
        let before = ddl::run(client, role, &self.command, path, self.rows_checked).await?;
        let said = (self.origin, self.place);
        ddl::note_columns(client, &before, &self.id.to_string(), said).await
    }
}

/// Whoever names a timeline looks for rows, too. An older release does neither: what it let pass must not be stuck elsewhere.
fn are_rows_checked(table: &TableDesc, row: &RowImage) -> Result<bool, Malformed> {
    let is_named = table.columns.iter().any(|column| column.name == "epoch");
    Ok(is_named && number::<8>(table, row, "epoch")? > 0)
}

/// Was nothing seen of what was committed behind a place? That of an older release names no timeline: it is taken for the same.
fn is_before(seen: Position, mut place: Position) -> bool {
    if place.epoch == 0 {
        place.epoch = seen.epoch;
    }
    seen <= place
}

impl Writer<'_> {
    /// Runs it, unless it has run here, or somebody has done it by hand.
    pub(crate) async fn ddl(&mut self, ddl: &Ddl) -> Result<(), Failure> {
        if std::mem::take(&mut self.has_run) {
            // A node that is healed says again what its journal does not know to be said.
            tracing::info!(id = %ddl.id, origin = %ddl.origin, "DDL has run here before, going on");
            return Ok(());
        }
        let lasting = &self.shared.lasting;
        lock(&lasting.ddl_places).note(ddl.id, ddl.place);
        let client = &self.session.client;
        let before = apart::before(client, ddl, lasting).await?;
        match ddl.run_once(client).await {
            Ok(()) => {
                tracing::info!(id = %ddl.id, origin = %ddl.origin, command = ddl.command, "DDL");
                ddl.name_tables(lasting);
                if let Some(before) = before {
                    let found = before.after((client, self.fence), ddl, lasting).await?;
                    self.apart.extend(found);
                }
                // Whatever was prepared may be of another shape now.
                self.session.forget_tables();
                // Rows of a table that it has made may be right behind it.
                let (client, rule) = (&self.session.client, &self.session.passed_over);
                let passed_over = &self.shared.passed_over;
                Box::pin(passed_over.read_within(client, rule, &mut self.reading)).await?;
                let keys = super::catalog::unique_keys(&self.session.client).await?;
                lock(&self.shared.resolver).set_unique_keys(keys);
                Ok(())
            }
            // Nothing that the statement did: the session has ended, though the connection may not have been seen to end yet.
            Err(RunError::Sql(error)) if self.session.client.is_closed() || pg::is_lost(&error) => {
                Err(Failure::Sql(error))
            }
            Err(error) => Err(Failure::Ddl(Box::new(Stuck {
                ddl: ddl.clone(),
                error,
            }))),
        }
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::row::Cell;
    use anabranch_proto::schema::ColumnDesc;

    use super::*;

    #[test]
    fn rows_are_looked_for_where_the_origin_has_looked_for_them() {
        let checked = |name: &str, value: i64| {
            let column = ColumnDesc {
                name: name.to_owned(),
                type_oid: 20,
                type_mod: -1,
                type_name: "pg_catalog.int8".to_owned(),
            };
            let table = TableDesc {
                schema: "anabranch".to_owned(),
                name: ddl::TABLE.to_owned(),
                columns: vec![column],
                key: vec![0],
                identity_full: false,
            };
            let row = RowImage::build([Cell::Binary(&value.to_be_bytes())].into_iter());
            are_rows_checked(&table, &row).unwrap()
        };
        assert!(checked("epoch", 1));
        // As the other node's table has it after `init`, and before.
        assert!(!checked("epoch", 0) && !checked("id", 1));
    }

    #[test]
    fn a_statement_is_seen_with_the_end_of_its_transaction_where_that_is_known() {
        let at = |lsn| Position::new(1, lsn);
        let mut places = Places::default();
        let of = |id| Uuid::from_u128(id);
        places.note(of(1), at(100));
        let unseen = |places: &Places, id, seen| places.is_unseen(of(id), at(seen), at(10));
        // While its transaction was open; and one of which only the row's own place is known.
        assert!(unseen(&places, 1, 50) && unseen(&places, 1, 99) && !unseen(&places, 1, 100));
        assert!(unseen(&places, 2, 10) && !unseen(&places, 2, 50));
        // A try that comes again is one. Of too many the first ones are forgotten.
        places.note(of(1), at(100));
        for id in 0..PLACES_MAX {
            places.note(of(1000 + id as u128), at(200));
        }
        assert!(!unseen(&places, 1, 50) && unseen(&places, 1000, 199));
        assert_eq!((places.known.len(), places.order.len()), (PLACES_MAX, PLACES_MAX));
    }

    #[test]
    fn what_was_seen_of_a_later_timeline_is_behind_every_place_of_an_earlier_one() {
        let is_before = |seen: (u32, u64), place: (u32, u64)| {
            is_before(Position::new(seen.0, seen.1), Position::new(place.0, place.1))
        };
        assert!(is_before((1, 50), (1, 100)));
        assert!(!is_before((1, 150), (1, 100)));
        assert!(!is_before((2, 50), (1, 100)));
        assert!(is_before((1, 150), (2, 100)));
        assert!(is_before((2, 50), (0, 100)) && !is_before((2, 150), (0, 100)));
    }
}
