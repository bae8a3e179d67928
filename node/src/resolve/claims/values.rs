//! The values that a row has in the unique keys of its table.
//!
//! Holds: of each table its keys, and where their columns are in the rows that came last
//! Not here: what makes two values equal ([`crate::resolve::unique`])

use std::sync::Arc;

use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::wire::Malformed;

use super::Registers;
use crate::index::TableId;
use crate::resolve::unique::{UniqueKey, places};

/// A value of a unique key: a hash under a seed of this process, of 128 bits, so that no two are ever equal by chance.
pub(super) type Value = u128;

/// Of each key the places of its columns in a row; `None` where the row does not have them all.
pub(super) type Places = Vec<Option<Vec<usize>>>;

/// The unique keys of a table, and where their columns are in the rows of one description of it.
#[derive(Default)]
pub(super) struct Keys {
    pub(super) name: (String, String),
    pub(super) keys: Vec<UniqueKey>,
    pub(super) mapped: Option<(Arc<TableDesc>, Places)>,
}

impl Keys {
    /// Finds the columns in rows of this description.
    fn map(&mut self, table: &Arc<TableDesc>) {
        let is_mapped = |mapped: &(Arc<TableDesc>, Places)| Arc::ptr_eq(&mapped.0, table);
        if self.mapped.as_ref().is_some_and(is_mapped) {
            return;
        }
        let places = self.keys.iter().map(|key| places(key, table)).collect();
        self.mapped = Some((Arc::clone(table), places));
    }
}

impl Registers {
    /// A table has this number. Asked for every row.
    pub(in crate::resolve) fn learn(&mut self, id: TableId, table: &TableDesc) {
        if id.0 as usize == self.by_table.len() {
            let name = (table.schema.clone(), table.name.clone());
            let keys = self.keys.get(&name).cloned().unwrap_or_default();
            let mapped = None;
            self.by_table.push(Keys { name, keys, mapped });
        }
    }

    pub(super) fn values(
        &mut self,
        id: TableId,
        table: &Arc<TableDesc>,
        row: &RowImage,
    ) -> Result<Vec<(Value, Arc<str>)>, Malformed> {
        let Some(keys) = self.by_table.get_mut(id.0 as usize) else {
            return Ok(Vec::new());
        };
        keys.map(table);
        let Some((_, places)) = &keys.mapped else {
            return Ok(Vec::new());
        };
        let cells: Vec<Cell<'_>> = row.cells().collect();
        let mut out = Vec::with_capacity(places.len());
        let mut bytes = Vec::new();
        for (key, places) in keys.keys.iter().zip(places) {
            let Some(places) = places else { continue };
            bytes.clear();
            bytes.extend_from_slice(&id.0.to_be_bytes());
            bytes.extend_from_slice(key.definition.as_bytes());
            bytes.push(0);
            if key.put_value(&mut bytes, (table, &cells, places))? {
                let value = xxhash_rust::xxh3::xxh3_128_with_seed(&bytes, self.seed);
                out.push((value, Arc::clone(&key.name)));
            }
        }
        Ok(out)
    }
}
