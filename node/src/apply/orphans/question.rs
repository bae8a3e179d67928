//! The text of the queries that look for orphans.
//!
//! In:   a foreign key, and which rows are suspected        Out: SQL over the parameters of [`Suspects`]
//! Not here: running them ([`super`])

use std::collections::BTreeMap;

use super::super::foreign::{Pair, TableName};
use super::super::plan::quote;
use super::{From, Suspects};

/// Orphans of one key that one transaction gives lines to, for each table.
pub(super) const ORPHANS_MAX: usize = 50_000;

impl Suspects {
    /// Which of the rows may be, or may have made, an orphan? A parent that is there is locked as by PostgreSQL's own triggers, in a
    /// query within the query: so what is seen is what is there once the lock is had. None: not asked.
    pub(super) fn question(&self, may_wait: bool) -> Option<String> {
        let key = &self.key;
        Some(match &self.from {
            From::Children(plan) => format!(
                "SELECT v.ord FROM {} WHERE {} AND (SELECT true {} FOR KEY SHARE{}) IS NULL",
                plan.standing(),
                key.refers("t"),
                key.parent_of("t"),
                skipping(may_wait)
            ),
            From::Parents(_) | From::Former(_) => format!(
                "SELECT v.ord FROM {} WHERE EXISTS (SELECT FROM {} AS t WHERE {} AND NOT EXISTS (SELECT {}))",
                self.parents(),
                key.child_rows,
                self.referring(),
                key.parent_of("t")
            ),
            From::All => return None,
        })
    }

    /// Reads the orphans that are in one table (which has its rows itself), with `columns` of `t`. They are locked, so that they stay what is logged.
    pub(super) fn details(&self, child: &str, columns: &str, may_wait: bool) -> String {
        let key = &self.key;
        let (place, from) = match &self.from {
            From::Children(plan) => ("v.ord", plan.standing()),
            From::Parents(_) | From::Former(_) => {
                let (parents, referring) = (self.parents(), self.referring());
                (
                    "v.ord",
                    format!("{parents} JOIN ONLY {child} AS t ON {referring}"),
                )
            }
            From::All => ("0::int8", format!("ONLY {child} AS t")),
        };
        format!(
            "SELECT {place}, {columns} FROM {from} WHERE {} AND NOT EXISTS (SELECT {}) LIMIT {ORPHANS_MAX} \
             FOR NO KEY UPDATE OF t{}",
            key.refers("t"),
            key.parent_of("t"),
            skipping(may_wait)
        )
    }

    /// The parents' values as `v`, with their places.
    fn parents(&self) -> String {
        match &self.from {
            From::Children(plan) | From::Parents(plan) => plan.numbered(),
            // Not as rows of the table: a domain may refuse NULL for the columns that are not told.
            From::Former(_) => format!(
                "(SELECT r.*, u.ord FROM unnest($1::text[]) WITH ORDINALITY AS u (j, ord) \
                 CROSS JOIN LATERAL jsonb_to_record(u.j::jsonb) AS r ({})) AS v",
                columns(
                    self.key
                        .pairs
                        .iter()
                        .map(|pair| (&pair.parent, &pair.parent_type))
                )
            ),
            From::All => String::new(),
        }
    }

    /// Is `t` a child of `v`?
    fn referring(&self) -> String {
        let value = |pair: &Pair| match &self.from {
            From::Parents(plan) => plan.value_of(&pair.parent),
            _ => None,
        };
        let value = |pair: &Pair| value(pair).unwrap_or_else(|| format!("v.{}", quote(&pair.parent)));
        self.key.joined(value, "t")
    }
}

/// `"a" int, ..`: columns and their types, each once.
pub(super) fn columns<'a>(columns: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    let columns: BTreeMap<&String, &String> = columns.collect();
    let columns = columns.iter();
    let columns = columns.map(|(name, type_sql)| format!("{} {type_sql}", quote(name)));
    columns.collect::<Vec<_>>().join(", ")
}

pub(super) fn sql_name((schema, name): &TableName) -> String {
    format!("{}.{}", quote(schema), quote(name))
}

const fn skipping(may_wait: bool) -> &'static str {
    if may_wait { "" } else { " SKIP LOCKED" }
}
