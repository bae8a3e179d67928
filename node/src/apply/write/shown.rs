//! Rows that stand in the table as JSON, for lines of the conflict log.
//!
//! In:   keys        Out: the rows that are there, locked, as the text of `jsonb`
//! Invariants: a value that `jsonb` does not take ends nothing: the line has it as its text, and says so ([`crate::review::Unread`])
//! Not here: images that came in, or are in the journal (`super::super::ledger`)

use anabranch_conflict::Version;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::super::batch::Action;
use super::super::failure::Failure;
use super::super::loss::{Loss, Tuple};
use super::super::plan::{Plan, RowArray, Source};
use super::{Writer, keys_of, parameters, references};
use crate::pg;
use crate::review::as_jsonb;

/// A locked row that was read.
#[derive(Debug, Clone)]
pub(crate) struct Read {
    pub(crate) xmin: u32,
    /// None where it is too long for one value of JSON.
    json: Option<String>,
}

impl Read {
    /// What a line shows of it; what `version` wrote, where that cannot be shown.
    pub(crate) fn tuple(self, version: Option<Version>) -> Tuple {
        match (self.json, version) {
            (Some(json), _) => Tuple::Json(json),
            (None, Some(version)) => Tuple::Journal(version),
            (None, None) => Tuple::None,
        }
    }
}

impl Writer<'_> {
    /// Locks and reads the rows of `actions` that are there.
    pub(in crate::apply) async fn read_rows_of(
        &mut self,
        plan: &Plan,
        actions: &[&Action],
    ) -> Result<Vec<Option<Read>>, Failure> {
        let rows = keys_of(plan, actions)?;
        self.read_array(plan, rows, self.mode == super::Mode::Cautious)
            .await
    }

    /// Locks and reads the rows of an array that are there. Where this is not `guarded` a value that `jsonb` does not take ends the
    /// transaction, which then runs again with savepoints: without one it is one statement.
    pub(in crate::apply) async fn read_array(
        &mut self,
        plan: &Plan,
        rows: RowArray<'_>,
        guarded: bool,
    ) -> Result<Vec<Option<Read>>, Failure> {
        let mut out = vec![None; rows.count() as usize];
        let (array, text) = rows.finish();
        let params = parameters(array, None, text);
        let (found, is_jsonb) = match self
            .try_query(&plan.lock_jsonb, &references(&params), guarded)
            .await?
        {
            Some(found) => (found, true),
            None => {
                let statement = self.session.prepare(&plan.lock_json).await?;
                let client = &self.session.client;
                (client.query(&statement, &references(&params)).await?, false)
            }
        };
        for row in found {
            let json: String = row.try_get(2)?;
            let json = match is_jsonb {
                true => Some(json),
                false => self.as_jsonb(plan, &json).await?,
            };
            if let Some(slot) = place(&row)?.and_then(|at| out.get_mut(at)) {
                let xmin = xmin(&row)?;
                *slot = Some(Read { xmin, json });
            }
        }
        Ok(out)
    }

    /// Reads rows that nobody's write made and that are about to be overwritten, for their lines. In a savepoint: in a second try
    /// nobody would look for them.
    pub(in crate::apply) async fn show_unheard(
        &mut self,
        plan: &Plan,
        losses: &mut [Loss],
    ) -> Result<(), Failure> {
        if losses.is_empty() {
            return Ok(());
        }
        let mut rows = plan.rows();
        for loss in &*losses {
            let key = loss.table.image_of_canonical(loss.key.canonical())?;
            rows.push(&Source::Key(&key))?;
        }
        let read = self.read_array(plan, rows, true).await?;
        for (loss, row) in losses.iter_mut().zip(read) {
            loss.local_tuple = row.map_or(Tuple::None, |row| row.tuple(None));
        }
        Ok(())
    }

    /// The text of `jsonb` for a row of the table as `row_to_json` made it. None where it is too long for that.
    pub(in crate::apply) async fn as_jsonb(&self, plan: &Plan, row: &str) -> Result<Option<String>, Failure> {
        let type_of = |name: &str| plan.type_of(name).to_owned();
        let shown = as_jsonb(&self.session.client, row, &type_of).await?;
        Ok(shown.map(|shown| plan.without_generated(shown)))
    }

    /// Runs a query. Where it is `guarded` and the server refuses it, the transaction goes on: `None`.
    pub(in crate::apply) async fn try_query(
        &mut self,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
        guarded: bool,
    ) -> Result<Option<Vec<Row>>, Failure> {
        let statement = self.session.prepare(sql).await?;
        let client = &self.session.client;
        if !guarded {
            return Ok(Some(client.query(&statement, params).await?));
        }
        let asked = client.query(&statement, params);
        Ok(pg::attempt(client, asked).await?.ok())
    }
}

/// Where in the array the row is that a statement of [`Plan::lock`]'s kind gave.
pub(super) fn place(row: &Row) -> Result<Option<usize>, Failure> {
    let at = usize::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0);
    Ok(at.checked_sub(1))
}

pub(super) fn xmin(row: &Row) -> Result<u32, Failure> {
    Ok(u32::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0))
}
