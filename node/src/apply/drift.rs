//! Rows that are not as the stream says: the nodes held different rows before the write came.
//!
//! In:   rows that a statement did not write, locked and with the decoder past the lock      Out: an alarm, a counter
//! Must never: stop or change what is written; the row becomes the incoming one, which covers all that is known of it
//!
//! A row without an entry in the index was last written by something stable (`docs/design.md`, section 5), so an
//! incoming UPDATE or DELETE must find it, and an incoming INSERT must not. Where that is not so, nobody's conflict is
//! to be logged: no write lost, but somebody wrote past the replication, or restored rows, or we are wrong.
//! What is known to be missing or too many for another reason is no drift: rows in quarantine, rows that a local
//! transaction is racing for, batches that run with savepoints, tables where a secondary unique key takes rows away, and those whose policy puts former versions back.

use super::batch::{Action, Write};
use super::plan::Plan;
use super::write::Standing;
use crate::resolve::Resolver;
use crate::shared::{Counters, Shared};

/// How a row was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drift {
    UpdateFoundNone,
    DeleteFoundNone,
    InsertFoundOne,
}

impl Drift {
    const fn text(self) -> &'static str {
        match self {
            Self::UpdateFoundNone => "an UPDATE found no row, which was inserted",
            Self::DeleteFoundNone => "a DELETE found no row",
            Self::InsertFoundOne => "an INSERT found a row, which was overwritten",
        }
    }
}

/// Compares what `action` expects with what stands.
fn judge(action: &Action, standing: Option<&Standing>) -> Option<Drift> {
    match (&action.write, action.expect.present, standing) {
        (Write::Put(_), Some(true), None) => Some(Drift::UpdateFoundNone),
        (Write::Put(_), Some(false), Some(_)) => Some(Drift::InsertFoundOne),
        (Write::Delete(_), Some(true), None) => Some(Drift::DeleteFoundNone),
        _ => None,
    }
}

/// Looks at a row that a statement did not write, and says when it drifted.
pub(super) fn look(
    plan: &Plan,
    action: &Action,
    standing: Option<&Standing>,
    resolver: &mut Resolver,
    shared: &Shared,
) {
    let Some(drift) = judge(action, standing) else {
        return;
    };
    if !plan.local.unique.is_empty()
        || resolver.quarantined().contains(&action.key)
        || resolver.is_raced_for(&action.key)
    {
        return;
    }
    Counters::add(&shared.counters.drifted_rows, 1);
    let (schema, name) = (&action.table.schema, &action.table.name);
    let text = format!(
        "rows were not as the stream says, so nodes held different ones: in {schema}.{name} {}; {} row(s) since the start. Compare the \
         nodes (anabranch verify {schema}.{name}), and find out who writes past the replication",
        drift.text(),
        shared
            .counters
            .drifted_rows
            .load(std::sync::atomic::Ordering::Relaxed),
    );
    shared.alarms.raise("drift", text);
}
