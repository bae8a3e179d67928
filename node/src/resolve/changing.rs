//! Where a policy is changed for another: met in the stream, before anything that comes after it there is decided.
//!
//! In:   rows of `anabranch.policy_change`, on every way that changes come here      Out: the place, for what chooses
//! Holds: the change that is under way, the place, and whether that is in the database yet
//! On crash: read from there; what is not, is met again in the journal, which lets nothing go before
//! Not here: what is made of it (`anabranch_conflict::change`), who is asked (`crate::policy_change`)

use anabranch_conflict::change::Point;
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{NodeId, Position};
use uuid::Uuid;

use super::{Error, Resolver};
use crate::policy_change;

/// The change of this life, if there is one.
#[derive(Default)]
pub(super) struct Changing {
    id: Option<Uuid>,
    is_kept: bool,
}

impl Resolver {
    /// The policies are on their way to others. `point`: where that was done, as the database knows it.
    pub(crate) fn begin_change(&mut self, id: Uuid, point: Option<Point>) {
        self.merged.point = point;
        self.changing = Changing {
            id: Some(id),
            is_kept: point.is_some(),
        };
    }

    /// Where the change was made, if this node has come to that.
    pub(crate) const fn change_point(&self) -> Option<Point> {
        self.merged.point
    }

    /// The place is in the database.
    pub(crate) fn change_point_kept(&mut self) {
        self.changing.is_kept = true;
    }

    /// Is the place known from the journal alone? Then nothing may go from there.
    pub(crate) const fn needs_journal_for_change(&self) -> bool {
        self.merged.point.is_some() && !self.changing.is_kept
    }

    /// Forgets what is settled: the index shows it as the policy of today would have decided it, the rows as the one of then did.
    ///
    /// # Errors
    /// When the index overflow cannot be used.
    pub(crate) fn forget_settled(&mut self) -> Result<(), Error> {
        let settled = self.settled.clone();
        self.forget_contested(&settled);
        Ok(self.index.forget_stable(&settled, None)?)
    }

    /// Meets a row that may be the one that makes the change.
    pub(super) fn meet_change(
        &mut self,
        table: &TableDesc,
        row: &RowImage,
        node: NodeId,
        position: Position,
    ) -> Result<(), Error> {
        let Some(id) = self.changing.id else { return Ok(()) };
        if table.is_own()
            && table.name == policy_change::TABLE
            && policy_change::makes(table, row)? == Some(id)
        {
            self.merged.point.get_or_insert(Point { node, position });
        }
        Ok(())
    }
}
