//! A small batch in one exchange with the server: BEGIN, progress and all rows are sent without waiting for answers.
//!
//! In:   transactions that were not tried before      Out: rows and progress, in an open transaction
//! Invariants: 1. progress is the first statement; 2. every statement is guarded as in [`super::super::write`], and what a guard held
//!        back takes the slow path once all answers are here; 3. nothing is sent unless all of the batch is plain
//! On crash: as any apply transaction
//!
//! The rows are resolved before the transaction has begun, so before its xid is known. That is no other decision: what the decoder
//! meets afterwards is a finding against the index, and what it has not met is held back by the guard, whose horizon is that of the
//! decision. In the index the writer is [`UNNAMED`] until the answer is here, which is before COMMIT is sent. An error in the
//! middle makes the server refuse all that follows up to ROLLBACK; the first one is told. A BEGIN that fails makes it refuse all of
//! it ([`BEGIN`]).

use std::pin::Pin;
use std::sync::Arc;

use anabranch_proto::NodeId;
use futures_util::future::join_all;
use tokio_postgres::{Client, Row, Statement};

use super::super::batch::{Action, Batch, Write};
use super::super::failure::Failure;
use super::super::plan::Plan;
use super::super::session::BEGIN;
use super::super::write::{
    COPY_ROWS_MIN, Missed, Mode, Parameter, PartKind, Tried, Writer, arguments, by_table, parts, references,
};
use super::reached::{Reached, xid_of};
use super::{Step, Work};
use crate::config::Config;
use crate::shared::{Counters, lock};

/// Stands for the xid of a transaction that has not begun: `BootstrapTransactionId`, which no row of a table has.
const UNNAMED: u32 = 1;

/// Most statements that are sent at once.
const STATEMENTS_MAX: usize = 16;
/// And most changes: each row costs another look into the index, for the name of its writer, and of many that is more than the exchanges
/// that are spared.
const CHANGES_MAX: u64 = 256;

/// A statement that is ready to be sent.
struct Ready<'b> {
    kind: PartKind,
    statement: Statement,
    params: Vec<Parameter>,
    actions: Vec<&'b Action>,
}

/// Rows of one table that are ready to be sent.
type ReadyTable<'b> = (Arc<Plan>, Vec<Ready<'b>>);

enum Answer {
    Begun,
    Progress(Vec<Row>),
    Written(u64),
}

type Exchange<'c> = Pin<Box<dyn Future<Output = Result<Answer, tokio_postgres::Error>> + Send + 'c>>;

impl Work {
    /// Begins the transaction and writes everything, if it is little and plain. Else nothing was sent, and what was resolved is
    /// kept for [`Work::write`].
    pub(crate) async fn write_at_once(
        &mut self,
        writer: &mut Writer<'_>,
        node: NodeId,
        config: &Config,
    ) -> Result<bool, Failure> {
        if !self.may_go_at_once() || writer.mode == Mode::Cautious {
            return Ok(false);
        }
        let reached = self.reached(writer.session, node);
        let Some(progress) = reached.prepared(writer.session) else {
            return Ok(false);
        };
        let chunk = self.reading.next_chunk((writer.shared, UNNAMED), config)?;
        let is_plain = chunk.is_plain() && chunk.is_last;
        self.keep(chunk);
        (self.xid, self.is_fresh) = (UNNAMED, true);
        let mut nothing = Batch::default();
        let batch = match self.steps.first_mut() {
            Some(Step::Rows(batch)) if is_plain => batch,
            None if is_plain => &mut nothing,
            _ => return Ok(false),
        };
        let Some(tables) = ready(writer, batch) else {
            return Ok(false);
        };
        self.is_fresh = false;
        for (plan, statements) in &tables {
            for ready in statements {
                writer.note_touched(plan, &ready.actions).await?;
            }
        }
        let (progress, written) = exchange(&writer.session.client, (&progress, &reached), &tables).await?;
        let xid = xid_of(&progress, writer.session)?;
        let mut written = written.into_iter();
        let missed = tables.into_iter().map(|(plan, statements)| {
            let mut missed = Missed::default();
            for (ready, written) in statements.iter().zip(&mut written) {
                missed.note(ready.kind, &ready.actions, written);
            }
            (plan, missed)
        });
        let missed: Vec<_> = missed.filter(|(_, missed)| !missed.again.is_empty()).collect();
        (self.xid, writer.xid, writer.horizon) = (xid, xid, batch.horizon);
        {
            let mut resolver = lock(&writer.shared.resolver);
            for action in &batch.actions {
                resolver.set_xid(&action.key, action.version.stamp, xid)?;
            }
        }
        for (plan, Missed { again, undeleted }) in missed {
            let again = writer.settle(&plan, &again, Tried::Yes { undeleted }).await?;
            writer.force(&plan, &again).await?;
        }
        batch.losses.append(&mut writer.unheard);
        Counters::add(&writer.shared.counters.rows, batch.change_count as u64);
        Ok(true)
    }

    /// A few small transactions that were not tried before, and nothing else?
    fn may_go_at_once(&self) -> bool {
        self.has_txns()
            && self.steps.is_empty()
            && self.found.is_empty()
            && self.release.is_empty()
            && !self.isolated
            && !self.reading.is_chunked()
            && self.change_count() < CHANGES_MAX
    }
}

/// The statements for a batch, if all is known that they need without asking the server, and its rows have a form that the
/// server can be sent.
fn ready<'b>(writer: &Writer<'_>, batch: &'b Batch) -> Option<Vec<ReadyTable<'b>>> {
    if !writer.plans_are_current() {
        return None;
    }
    let mut tables = Vec::new();
    let mut count = 0;
    let described = by_table(&batch.actions)
        .into_iter()
        .flat_map(|(_, described)| described.into_values());
    for actions in described {
        let Some(first) = actions.first() else { continue };
        // What a guard holds back of these is folded, not settled.
        if lock(&writer.shared.resolver).merging(first.key.table()).is_some() {
            return None;
        }
        let plan = writer.session.known_plan(&first.table)?;
        // Lines may come of columns that are missing here; what rows lack that have others there is looked up.
        if !plan.missing.is_empty() || !plan.late.is_empty() {
            return None;
        }
        // What rows have that others refer to is read before they are written ([`super::super::orphans`]).
        let links = &plan.local.links;
        let is_delete = |action: &&Action| matches!(action.write, Write::Delete(_));
        if links.is_referred_to_otherwise() || (!links.referring.is_empty() && actions.iter().any(is_delete))
        {
            return None;
        }
        let mut statements = Vec::new();
        for part in parts(&plan, &actions) {
            let is_copied = part.kind == PartKind::Inserts
                && part.actions.len() >= COPY_ROWS_MIN
                && plan.copy.is_some()
                && writer.mode == Mode::Swift;
            if is_copied {
                return None;
            }
            let statement = writer.session.prepared(part.sql)?;
            let params = arguments(&plan, &part.actions, part.guarded.then_some(batch.horizon)).ok()?;
            statements.push(Ready {
                kind: part.kind,
                statement,
                params,
                actions: part.actions,
            });
        }
        count += statements.len();
        tables.push((plan, statements));
    }
    (count <= STATEMENTS_MAX).then_some(tables)
}

/// Sends everything, then takes the answers: what progress says, and how many rows each statement wrote.
async fn exchange(
    client: &Client,
    (progress, reached): (&Statement, &Reached),
    tables: &[ReadyTable<'_>],
) -> Result<(Vec<Row>, Vec<u64>), Failure> {
    // A statement is sent when it is polled first, and `join_all` polls in this order.
    let mut all: Vec<Exchange<'_>> = vec![
        Box::pin(async move {
            client.batch_execute(BEGIN).await?;
            Ok(Answer::Begun)
        }),
        Box::pin(async move {
            let rows = client.query(progress, &reached.params()).await?;
            Ok(Answer::Progress(rows))
        }),
    ];
    for ready in tables.iter().flat_map(|table| &table.1) {
        all.push(Box::pin(async move {
            let params = references(&ready.params);
            let written = client.execute(&ready.statement, &params).await?;
            Ok(Answer::Written(written))
        }));
    }
    let (mut progress_says, mut written) = (Vec::new(), Vec::new());
    for answer in join_all(all).await {
        match answer? {
            Answer::Begun => {}
            Answer::Progress(rows) => progress_says = rows,
            Answer::Written(count) => written.push(count),
        }
    }
    Ok((progress_says, written))
}
