//! Whose turn it is to bring a parent back, where several nodes wrote children of it.
//!
//! In:   open lines of other members, and what of their rows is here        Out: the member that it is left to
//! Holds: what was seen of other members' rows, and since when own lines wait, while anything is open
//! Invariants: of the members whose rows are without one parent the lowest brings it back; another one does once the lowest has
//!        no such row any more, knows that itself, and all that it did until it knew is applied here; or once it is dropped. So no two
//!        insert one row, unseen: what both wrote would be added up in columns that are merged
//! On crash: waits a little longer
//! Not here: which lines these are ([`super`])
//!
//! Every member has the lines of all the others by the time it may mend its own: it knows then that each had applied the removal of
//! the parent, so it has all that each wrote before, and who writes after that cannot refer to that parent.
//! Where a row was written again, by another member, and lost its parent once more, it is that one's: the older line counts for nobody, and
//! whoever has it waits.
//! That the lowest member cannot bring it back, or that somebody has closed its line there, nobody hears of: the others wait, and say so.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use anabranch_proto::{Lsn, NodeId, Vector};
use tokio::time::Instant;
use tokio_postgres::{Row, Transaction};

use super::{Line, are_met, key_of, orphan};
use crate::apply::foreign::ForeignKey;
use crate::review::Error;
use crate::setup::sql::qualified;

/// Another member may take this long until somebody hears of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far each member's stream is applied in what a statement sees, and the WAL here that has all that it sees. Read by [`places`].
pub(super) const APPLIED: &str = "SELECT array_agg(origin::int4), array_agg((lsn - '0/0')::int8), \
    (pg_current_wal_insert_lsn() - '0/0')::int8";

#[derive(Debug)]
struct Wait {
    since: Instant,
    is_tried: bool,
}

/// What is remembered between two passes.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// By lines of other members, whose rows are not without their parents any more: how far all streams were when that was seen.
    mended: HashMap<String, Vec<(NodeId, Lsn)>>,
    /// By own lines that wait for another member.
    waiting: HashMap<String, Wait>,
}

impl Turns {
    fn wait(&mut self, line: &str) -> &mut Wait {
        self.waiting.entry(line.to_owned()).or_insert_with(|| Wait {
            since: Instant::now(),
            is_tried: false,
        })
    }

    /// Does the line wait for longer than another member should take?
    pub(super) fn is_long(&mut self, line: &str) -> bool {
        self.wait(line).since.elapsed() > PATIENCE
    }
}

/// One line's turn.
pub(super) struct Turn<'a> {
    pub(super) turns: &'a mut Turns,
    /// Open lines of members before this one, of rows with the same parent.
    pub(super) rivals: &'a [Line],
    /// Open lines of this line's row and of those of `rivals`, of this node and of any member.
    pub(super) again: &'a [Line],
    /// What every member is known to have applied.
    pub(super) stable: &'a Vector,
    /// How far each member's stream is here.
    pub(super) reached: &'a Vector,
    /// This node.
    pub(super) own: NodeId,
    /// Members that are not dropped: of the others all that there is has been applied everywhere.
    pub(super) live: &'a BTreeSet<NodeId>,
}

impl Turn<'_> {
    /// The member that a line's parent is left to; none where it is this one's turn.
    pub(super) async fn left_to(
        &mut self,
        transaction: &Transaction<'_>,
        line: &Line,
        keys: &[ForeignKey],
    ) -> Result<Option<NodeId>, Error> {
        // Who has written the row since brings its parent back, whichever member that is: both would insert it otherwise.
        let (own, again, rivals) = (self.own, self.again, self.rivals);
        let since = again.iter();
        let since = since.filter(|other| other.writer != own && other.comes_after(line));
        for rival in since.chain(rivals) {
            // Its writer has its note on that, which nobody else hears of, or leaves the row to who wrote it since: as soon as it is known
            // to have met what makes that line.
            if rival.is_before(line) || self.is_left(rival) {
                continue;
            }
            if self.may_restore(transaction, rival, keys).await? {
                return Ok(Some(rival.writer));
            }
        }
        Ok(None)
    }

    /// Does its writer know that another member, or this one, has written the row since?
    fn is_left(&self, rival: &Line) -> bool {
        let mut again = self.again.iter();
        again.any(|other| {
            let is_others = other.writer != rival.writer && other.comes_after(rival);
            is_others && are_met(&other.writes, self.stable, self.reached)
        })
    }

    /// Once, after a long wait: is it worth a look whether the parent could come back at all?
    pub(super) fn is_to_try(&mut self, line: &Line) -> bool {
        let is_long = self.turns.is_long(&line.id);
        let wait = self.turns.wait(&line.id);
        is_long && !std::mem::replace(&mut wait.is_tried, is_long)
    }

    /// May the member that wrote another line's row bring the parent back still, or have done so without its being known here?
    async fn may_restore(
        &mut self,
        transaction: &Transaction<'_>,
        rival: &Line,
        keys: &[ForeignKey],
    ) -> Result<bool, Error> {
        // These it leaves alone itself.
        let Some(key) = key_of(rival, keys) else {
            return Ok(false);
        };
        let Some(orphan) = orphan(transaction, rival, key).await? else {
            return Ok(false);
        };
        let table = qualified(&rival.schema, &rival.table);
        let sql = format!(
            "{APPLIED}, EXISTS (SELECT FROM ONLY {table} AS t WHERE {orphan}) FROM anabranch.progress"
        );
        let row = transaction.query_one(&sql, &[&rival.key]).await?;
        if row.try_get(3)? {
            self.turns.mended.remove(&rival.id);
            return Ok(true);
        }
        let seen = places(&row, self.own, self.live)?;
        let seen = self.turns.mended.entry(rival.id.clone()).or_insert(seen);
        Ok(!are_met(seen, self.stable, self.reached))
    }
}

/// What the columns of [`APPLIED`] say of members that are `live`, of which this node is `own`.
pub(super) fn places(
    row: &Row,
    own: NodeId,
    live: &BTreeSet<NodeId>,
) -> Result<Vec<(NodeId, Lsn)>, tokio_postgres::Error> {
    let lsn = |lsn: i64| Lsn(u64::try_from(lsn).unwrap_or(0));
    let origins: Option<Vec<i32>> = row.try_get(0)?;
    let lsns: Option<Vec<i64>> = row.try_get(1)?;
    let applied = origins
        .unwrap_or_default()
        .into_iter()
        .zip(lsns.unwrap_or_default());
    let mut places: Vec<(NodeId, Lsn)> = applied
        .filter_map(|(origin, at)| Some((NodeId(u16::try_from(origin).ok()?), lsn(at))))
        .filter(|(origin, _)| live.contains(origin))
        .collect();
    places.push((own, lsn(row.try_get(2)?)));
    Ok(places)
}
