//! Tables that were taken out of replication here: what others still send of them is passed over.
//!
//! In:   `anabranch.removed_table`            Out: changes, without those of such tables
//! Holds: the tables' names, and how many changes of each were passed over since the start
//! Must never: touch our own tables, or another table of the same transaction
//! On crash: read again, before anything is applied
//!
//! The transactions themselves count as applied: the others need not keep them, and no stream waits. So what was passed over does
//! not come again when the table is added again; `anabranch tables add` compares all rows. Whoever looks into the journal finds it all
//! the same, and so do the index that is rebuilt and what is found again after a start: nothing is made of that ([`PassedOver::holds`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::shared::lock;

/// Schema and name.
pub(crate) type Name = (String, String);

const READ: &str = "SELECT schema_name, table_name FROM anabranch.removed_table";
/// Rows of it that were refused before it was known that the table is passed over.
const CLEAN: &str = "DELETE FROM anabranch.quarantine q USING anabranch.removed_table r \
    WHERE q.schema_name = r.schema_name AND q.table_name = r.table_name";

/// The tables that are passed over here. A database that was set up by an older release has none. In a transaction that fails there.
///
/// # Errors
/// When the server answers with another error.
pub(crate) async fn removed(client: &Client) -> Result<BTreeSet<Name>, tokio_postgres::Error> {
    let rows = match client.query(READ, &[]).await {
        Ok(rows) => rows,
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Vec::new(),
        Err(error) => return Err(error),
    };
    let names = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    names.collect()
}

/// The tables, and what of them was passed over.
#[derive(Debug, Default)]
pub struct PassedOver(Mutex<BTreeMap<Name, u64>>);

impl PassedOver {
    /// Reads which tables they are.
    ///
    /// # Errors
    /// When the server answers with another error.
    pub async fn read(&self, client: &Client) -> Result<(), tokio_postgres::Error> {
        let names = removed(client).await?;
        let is_any = !names.is_empty();
        {
            let mut known = lock(&self.0);
            known.retain(|name, _| names.contains(name));
            for name in names {
                known.entry(name).or_insert_with_key(|(schema, name)| {
                    tracing::info!(
                        table = format!("{schema}.{name}"),
                        "passed over: removed from replication here"
                    );
                    0
                });
            }
        }
        if is_any {
            client.execute(CLEAN, &[]).await?;
        }
        Ok(())
    }

    /// What is left of a change; none when all of it is passed over.
    pub fn sift(&self, change: Change) -> Option<Change> {
        let mut known = lock(&self.0);
        if known.is_empty() {
            return Some(change);
        }
        let mut is_passed = |table: &TableDesc| {
            let count = known.get_mut(&(table.schema.clone(), table.name.clone()));
            count.map(|count| *count += 1).is_some()
        };
        match change {
            Change::Put { ref table, .. } | Change::Delete { ref table, .. } => {
                (!is_passed(table)).then_some(change)
            }
            Change::Truncate {
                mut tables,
                cascade,
                restart_identity,
            } => {
                tables.retain(|table| !is_passed(table));
                (!tables.is_empty()).then_some(Change::Truncate {
                    tables,
                    cascade,
                    restart_identity,
                })
            }
        }
    }

    /// Is this one of the tables? Its rows are this node's own business: nobody's version says what they must be.
    #[must_use]
    pub fn holds(&self, table: &TableDesc) -> bool {
        let known = lock(&self.0);
        !known.is_empty() && known.contains_key(&(table.schema.clone(), table.name.clone()))
    }

    /// Each table, as `schema.table`, with how many changes were passed over since the start.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let known = lock(&self.0);
        let named = known
            .iter()
            .map(|((schema, name), count)| (format!("{schema}.{name}"), *count));
        named.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anabranch_proto::row::{Cell, RowImage};

    use super::*;

    fn table(name: &str) -> Arc<TableDesc> {
        Arc::new(TableDesc {
            schema: "s".to_owned(),
            name: name.to_owned(),
            columns: Vec::new(),
            key: Vec::new(),
            identity_full: false,
        })
    }

    #[test]
    fn only_the_tables_named_are_passed_over() {
        let over = PassedOver::default();
        let delete = |name| Change::Delete {
            table: table(name),
            key: RowImage::build([Cell::Null].into_iter()),
        };
        assert!(over.sift(delete("gone")).is_some());
        lock(&over.0).insert(("s".to_owned(), "gone".to_owned()), 0);
        assert!(over.sift(delete("gone")).is_none());
        assert!(over.sift(delete("here")).is_some());
        let both = Change::Truncate {
            tables: vec![table("gone"), table("here")],
            cascade: false,
            restart_identity: false,
        };
        let left = over.sift(both).unwrap();
        assert_eq!(left.tables().len(), 1);
        assert_eq!(over.counts().get("s.gone"), Some(&2));
        assert!(over.holds(&table("gone")) && !over.holds(&table("here")));
    }
}
