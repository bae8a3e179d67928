//! Which descriptions of tables are this node's own: they were in its journal, or in its quarantine, with its own transactions.
//!
//! A description names types, since each server numbers its own. In an own one the numbers say more: a type keeps its OID when it is renamed
//! (`ALTER TYPE ... RENAME`, `SET SCHEMA`), so an own row that is put back behind that is still known to fit.
//!
//! In:   descriptions as they are read      Out: is this one of them?
//! Holds: at most [`TABLES_MAX`] descriptions
//! Must never: take another node's for an own one. They are told apart by their addresses, so they are read into caches of their own
//! On crash: nothing to lose

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anabranch_proto::schema::TableDesc;

use crate::shared::lock;

/// Past so many in use all are forgotten: rows of those wait in quarantine if they do not fit by their names, and are read again there.
const TABLES_MAX: usize = 10_000;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct OwnTables(Mutex<HashMap<usize, Arc<TableDesc>>>);

impl OwnTables {
    /// Takes descriptions that own transactions came with.
    pub(crate) fn learn<'t>(&self, tables: impl Iterator<Item = &'t Arc<TableDesc>>) {
        let mut known = lock(&self.0);
        for table in tables {
            let address = Arc::as_ptr(table) as usize;
            if known.contains_key(&address) {
                continue;
            }
            if known.len() >= TABLES_MAX {
                // Those that nobody else has are not asked for again.
                known.retain(|_, table| Arc::strong_count(table) > 1);
            }
            if known.len() >= TABLES_MAX {
                known.clear();
            }
            known.insert(address, Arc::clone(table));
        }
    }

    /// Is it an own one?
    pub(crate) fn holds(&self, table: &Arc<TableDesc>) -> bool {
        lock(&self.0).contains_key(&(Arc::as_ptr(table) as usize))
    }
}
