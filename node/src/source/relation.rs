//! Tables, as pgoutput describes them and as the catalog completes them: primary key and type names.
//!
//! In:   Relation and Type messages            Out: `Arc<TableDesc>` by table OID
//! Holds: one description a published table, one name a type
//! Invariants: 1. every Relation message is looked up anew: pgoutput sends one again exactly when something
//!                about the table may have changed, and a new primary key does not show in the message.
//!             2. an unchanged table keeps its `Arc`.
//! On crash: learnt again, pgoutput describes every table anew on a new connection
//! Not here: asking the catalog, and waiting for what nobody sees yet (`catalog`); comparing schemas between nodes

use std::sync::Arc;

use anabranch_conflict::policy::Policies;
use anabranch_proto::schema::{ColumnDesc, TableDesc};
use hashbrown::HashMap;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tracing::debug;

use super::Error;
use super::catalog::{Answer, CatalogKey, Stuck, look_up, marked, places, same_set};
use super::pgoutput;
use crate::setup::sql::qualified;
use crate::shared::lock;

/// OIDs below this are the same on every server for ever (`FirstNormalObjectId`).
const FIRST_USER_OID: u32 = 16_384;

/// A published table.
#[derive(Debug, Clone)]
pub(super) struct Relation {
    /// What leaves this node.
    pub(super) table: Arc<TableDesc>,
    /// A former row always tells its primary key.
    pub(super) identity_has_key: bool,
    /// Its columns are merged.
    pub(super) is_merged: bool,
    /// Its columns as the server sends them, and its key among them.
    pub(super) sent: (Vec<ColumnDesc>, Vec<u16>),
    /// The places of those that do not leave this node: generated columns, which each node computes for itself. From version 18 on
    /// they are published where that refuses updates otherwise.
    pub(super) kept_back: Vec<usize>,
}

/// A table that is being looked up.
struct Pending {
    message: pgoutput::Relation,
    /// The transaction that the message is of.
    xid: u32,
    /// The lookup runs by itself, so that a caller who stops waiting again and again does not start it again
    /// and again.
    lookup: Option<JoinHandle<Result<Answer, tokio_postgres::Error>>>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(lookup) = &self.lookup {
            lookup.abort();
        }
    }
}

/// All tables met so far.
pub(super) struct Relations {
    sql: Arc<Client>,
    policies: Arc<Policies>,
    tables: HashMap<u32, Relation>,
    /// Names of built-in types, which never change.
    builtin: HashMap<u32, String>,
    /// Names from Type messages, for types that are gone from the catalog.
    announced: HashMap<u32, String>,
    /// Names of tables that were gone when they were described, in a transaction of which nobody wants the rows.
    gone: HashMap<u32, String>,
    pending: Option<Pending>,
    stuck: Stuck,
}

impl Relations {
    pub(super) fn new(sql: Arc<Client>, policies: Arc<Policies>) -> Self {
        Self {
            sql,
            policies,
            tables: HashMap::new(),
            builtin: HashMap::new(),
            announced: HashMap::new(),
            gone: HashMap::new(),
            pending: None,
            stuck: Stuck::default(),
        }
    }

    /// Why the stream has waited for long, while it does.
    pub(super) fn stuck(&self) -> Option<String> {
        lock(&self.stuck).clone()
    }

    pub(super) fn get(&self, oid: u32) -> Option<&Relation> {
        self.tables.get(&oid)
    }

    /// Was this table gone when it was described? Its name then.
    pub(super) fn gone(&self, oid: u32) -> Option<&str> {
        self.gone.get(&oid).map(String::as_str)
    }

    pub(super) fn announce(&mut self, oid: u32, schema: &str, name: &str) {
        self.announced.insert(oid, qualified(schema, name));
    }

    /// Takes a Relation message; [`Self::settle`] completes it.
    pub(super) fn describe(&mut self, message: pgoutput::Relation, xid: u32) {
        self.pending = Some(Pending {
            message,
            xid,
            lookup: None,
        });
    }

    /// Is a table still to be looked up?
    pub(super) const fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Completes the Relation message that is pending from the catalog. Cancel-safe. After an error the next
    /// call looks again.
    ///
    /// The message is of the time of the transaction, the catalog is of now. Where they differ the message
    /// wins; what neither tells is an error. Not of a table that is gone where `is_skipped`: nobody wants the transaction's rows.
    pub(super) async fn settle(&mut self, is_skipped: bool) -> Result<(), Error> {
        let Some(pending) = &mut self.pending else {
            return Ok(());
        };
        let (sql, builtin, stuck) = (&self.sql, &self.builtin, &self.stuck);
        let lookup = pending.lookup.get_or_insert_with(|| {
            let of = (&pending.message, pending.xid);
            tokio::spawn(look_up(Arc::clone(sql), of, builtin, Arc::clone(stuck)))
        });
        let answer = lookup.await;
        pending.lookup = None;
        *lock(&self.stuck) = None;
        let Some(Pending { message, .. }) = &self.pending else {
            return Ok(());
        };
        let name = format!("{}.{}", message.schema, message.name);
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(source)) => {
                let what = format!("look up table {name} in the catalog");
                return Err(Error::Catalog { what, source });
            }
            // The runtime is shutting down.
            Err(_) => return Err(Error::Closed),
        };
        let known = self.tables.get(&message.oid);
        let oid = message.oid;
        let relation = match self.completed(message, &answer, known, &name) {
            Err(Error::TableGone { table }) if is_skipped => {
                self.tables.remove(&oid);
                self.gone.insert(oid, table);
                self.pending = None;
                return Ok(());
            }
            completed => completed?,
        };
        debug!(table = name, oid, "table described");
        self.gone.remove(&oid);
        self.tables.insert(oid, relation);
        self.pending = None;
        let builtin = answer
            .type_names
            .into_iter()
            .filter(|&(oid, _)| oid < FIRST_USER_OID);
        self.builtin.extend(builtin);
        Ok(())
    }

    fn completed(
        &self,
        message: &pgoutput::Relation,
        answer: &Answer,
        known: Option<&Relation>,
        name: &str,
    ) -> Result<Relation, Error> {
        let type_name = |oid: u32| {
            let names = [&answer.type_names, &self.builtin, &self.announced];
            names.into_iter().find_map(|names| names.get(&oid)).cloned()
        };
        let columns = message.columns.iter().map(|column| ColumnDesc {
            name: column.name.clone(),
            type_oid: column.type_oid,
            type_mod: match answer.base_types.get(&column.type_oid) {
                Some(base) if *base < FIRST_USER_OID => ColumnDesc::domain_over(*base),
                _ => column.type_mod,
            },
            type_name: type_name(column.type_oid).unwrap_or_default(),
        });
        let columns = columns.collect::<Vec<_>>();
        let same = known.filter(|known| known.sent.0 == columns);
        let key = key_columns(message, &answer.key, same.map(|same| &*same.sent.1), name)?;
        let identity_has_key = key.iter().all(|&at| {
            message
                .columns
                .get(usize::from(at))
                .is_some_and(|column| column.identity)
        });
        let kept_back = places_of(&answer.generated, &columns, &key);
        let leaves = |at: &usize| !kept_back.contains(at);
        let before = |at: u16| (0..usize::from(at)).filter(leaves).count();
        let leaving = (0..columns.len()).filter(leaves);
        let table = TableDesc {
            schema: message.schema.clone(),
            name: message.name.clone(),
            columns: leaving.filter_map(|at| columns.get(at).cloned()).collect(),
            key: key
                .iter()
                .filter_map(|at| u16::try_from(before(*at)).ok())
                .collect(),
            identity_full: message.identity == b'f',
        };
        let table = match known {
            Some(known) if *known.table == table => Arc::clone(&known.table),
            _ => Arc::new(table),
        };
        let is_merged = self.policies.of(&table.schema, &table.name).columns.is_some();
        Ok(Relation {
            table,
            identity_has_key,
            is_merged,
            sent: (columns, key),
            kept_back,
        })
    }
}

/// The places of these columns, but those of the key.
fn places_of(names: &[String], columns: &[ColumnDesc], key: &[u16]) -> Vec<usize> {
    let is_meant = |(at, column): &(u16, &ColumnDesc)| names.contains(&column.name) && !key.contains(at);
    let found = (0u16..).zip(columns).filter(is_meant);
    found.map(|(at, _)| usize::from(at)).collect()
}

/// The key's places among the published columns, in the key's order.
fn key_columns(
    message: &pgoutput::Relation,
    catalog: &CatalogKey,
    known: Option<&[u16]>,
    table: &str,
) -> Result<Vec<u16>, Error> {
    let marked = marked(message);
    match catalog {
        CatalogKey::Columns(names) => match places(message, names) {
            Ok(key) if marked.is_empty() || same_set(&key, &marked) => Ok(key),
            _ if !marked.is_empty() => Ok(marked),
            Err(column) => Err(Error::KeyNotPublished {
                table: table.to_owned(),
                column: column.clone(),
            }),
            Ok(key) => Ok(key),
        },
        _ if !marked.is_empty() => Ok(marked),
        CatalogKey::None => Err(Error::NoPrimaryKey {
            table: table.to_owned(),
        }),
        CatalogKey::Gone => match known {
            Some(known) => Ok(known.to_vec()),
            None => Err(Error::TableGone {
                table: table.to_owned(),
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::tests::{columns, message};
    use super::*;

    #[test]
    fn the_catalog_gives_the_order_of_the_key() {
        let full = message(b'f', &[("a", true), ("b", true), ("c", true)]);
        assert_eq!(
            key_columns(&full, &columns(&["c", "a"]), None, "s.t").unwrap(),
            [2, 0]
        );
        let default = message(b'd', &[("a", true), ("b", false), ("c", true)]);
        assert_eq!(
            key_columns(&default, &columns(&["c", "a"]), None, "s.t").unwrap(),
            [2, 0]
        );
    }

    #[test]
    fn a_key_of_the_past_is_taken_from_the_message() {
        let default = message(b'd', &[("a", true), ("b", false), ("c", true)]);
        for now in [
            columns(&["b"]),
            columns(&["renamed", "c"]),
            CatalogKey::None,
            CatalogKey::Gone,
        ] {
            assert_eq!(
                key_columns(&default, &now, None, "s.t").unwrap(),
                [0, 2],
                "{now:?}"
            );
        }
    }

    #[test]
    fn a_table_without_a_key_is_refused_by_name() {
        let full = message(b'f', &[("a", true)]);
        let error = key_columns(&full, &CatalogKey::None, None, "s.t").unwrap_err();
        assert!(
            matches!(&error, Error::NoPrimaryKey { table } if table == "s.t"),
            "{error}"
        );
        let error = key_columns(&full, &CatalogKey::Gone, None, "s.t").unwrap_err();
        assert!(matches!(error, Error::TableGone { .. }), "{error}");
        let error = key_columns(&full, &columns(&["a", "x"]), None, "s.t").unwrap_err();
        assert!(
            matches!(&error, Error::KeyNotPublished { column, .. } if column == "x"),
            "{error}"
        );
    }
}
