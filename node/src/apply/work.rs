//! What one apply transaction does, kept so that it can run again.
//!
//! Small transactions are resolved once: their batches stay here and are written again after a failure. A
//! large one is read from the journal again; then what was lost to it the first time is carried along. While a chunk of a large
//! one is written, the next is read and resolved.

mod at_once;
mod carried;
mod reached;
mod stream;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::Stamp;
use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{NodeId, Position, Vector};

use super::batch::{Action, Batch, Truncate, Write};
use super::ddl::Ddl;
use super::failure::Failure;
use super::feed::Head;
use super::loss::{Counts, Loss};
use super::truncate::Met;
use super::write::{Mode, Writer};
use crate::config::Config;
use crate::index::RowKey;
use crate::journal::Journal;
use crate::resolve::{Expect, Found, Resolver};
use crate::shared::{Shared, Visibility, lock};
use carried::Carried;
use stream::{Chunk, Reading};

/// Changes that are resolved before the chunk being written is looked after again.
const SLICE_ROWS: usize = 256;

enum Step {
    Rows(Batch),
    Truncate(Truncate, Met),
    Ddl(Ddl),
}

impl Step {
    fn into_losses(self) -> Vec<Loss> {
        match self {
            Self::Rows(batch) => batch.losses,
            Self::Truncate(_, met) => met.losses,
            Self::Ddl(_) => Vec::new(),
        }
    }

    /// What is not found out again when its transaction is resolved a second time.
    fn into_known(self) -> Result<(Vec<Loss>, Vec<Action>), Failure> {
        match self {
            Self::Truncate(truncate, met) => met.into_known(&truncate),
            step => Ok((step.into_losses(), Vec::new())),
        }
    }
}

/// One apply transaction's work.
pub(crate) struct Work {
    reading: Reading,
    steps: Vec<Step>,
    /// Losses of chunks that are no longer among the steps.
    carried: Carried,
    found: Vec<Found>,
    release: Vec<(Arc<TableDesc>, RowKey)>,
    released: Vec<(Arc<TableDesc>, RowKey)>,
    headers: Vec<Arc<TxnHeader>>,
    last_seq: Option<u64>,
    left_to: Position,
    isolated: bool,
    /// Has DDL been met in it?
    has_ddl: bool,
    /// The stamps of its transactions, once one of them has truncated.
    own: Option<Arc<HashSet<Stamp>>>,
    /// The transaction of the last try, 0 before the first.
    xid: u32,
    /// The steps were resolved a moment ago for this very try, which had no xid yet.
    is_fresh: bool,
}

impl Work {
    fn new(reading: Reading) -> Self {
        Self {
            reading,
            steps: Vec::new(),
            carried: Carried::default(),
            found: Vec::new(),
            release: Vec::new(),
            released: Vec::new(),
            headers: Vec::new(),
            last_seq: None,
            left_to: Position::ZERO,
            isolated: false,
            has_ddl: false,
            own: None,
            xid: 0,
            is_fresh: false,
        }
    }

    /// Transactions in causal order: several small ones, or one large one.
    pub(crate) fn txns(heads: Vec<Head>) -> Self {
        let mut work = Self::new(Reading::nothing());
        let mut small = VecDeque::new();
        for head in heads {
            work.last_seq = work.last_seq.max(Some(head.seq()));
            match head {
                Head::Small(header, changes, _) => {
                    let header = Arc::new(header);
                    work.headers.push(Arc::clone(&header));
                    small.push_back((header, changes));
                }
                Head::Large { header, from, .. } => {
                    let header = Arc::new(header);
                    work.headers.push(Arc::clone(&header));
                    work.reading = Reading::large(header, from);
                }
            }
        }
        if !small.is_empty() {
            work.reading = Reading::small(small);
        }
        work
    }

    /// Findings of the decoder.
    pub(crate) fn found(found: Vec<Found>) -> Self {
        Self {
            found,
            ..Self::new(Reading::nothing())
        }
    }

    /// Keys to take out of the quarantine.
    pub(crate) fn release(keys: Vec<(Arc<TableDesc>, RowKey)>) -> Self {
        Self {
            release: keys,
            ..Self::new(Reading::nothing())
        }
    }

    /// A quarantined row, tried again.
    pub(crate) fn again(action: Action) -> Self {
        let mut work = Self::new(Reading::nothing());
        let mut batch = Batch::default();
        batch.actions.push(action);
        work.steps.push(Step::Rows(batch));
        work.isolated = true;
        work
    }

    pub(crate) fn take_found(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.found)
    }

    pub(crate) const fn has_txns(&self) -> bool {
        !self.headers.is_empty()
    }

    pub(crate) const fn txn_count(&self) -> u64 {
        self.headers.len() as u64
    }

    /// Row changes of its transactions.
    pub(crate) fn change_count(&self) -> u64 {
        self.headers.iter().map(|header| header.change_count).sum()
    }

    pub(crate) const fn last_seq(&self) -> Option<u64> {
        self.last_seq
    }

    /// The last own transaction that a row was left to: what is written here may only be seen with it.
    pub(crate) const fn left_to(&self) -> Position {
        self.left_to
    }

    /// Up to which own transaction all must be visible before any of it is written: to the last that one of its transactions had seen at its
    /// origin; and where rows that own ones wrote are to go, to the last of all, since a row that is not visible yet would stay.
    pub(crate) fn answers(&self, own: NodeId) -> Position {
        if self.found.iter().any(|item| item.repair || item.settle) {
            return Position::new(u32::MAX, u64::MAX);
        }
        let seen = self.headers.iter().map(|header| header.deps.get(own));
        seen.max().unwrap_or(Position::ZERO)
    }

    /// May it wait for other rows than those it writes? Not while a commit, which may hold one, may wait for it.
    pub(crate) fn may_wait(&self, shared: &Shared) -> bool {
        self.found.is_empty() || *shared.visibility.borrow() != Visibility::BeforeDependents
    }

    /// What was prepared in an earlier try may be of a shape that is not there (any more).
    pub(crate) const fn has_ddl(&self) -> bool {
        self.has_ddl
    }

    pub(crate) const fn is_isolated(&self) -> bool {
        self.isolated
    }

    /// Is it one large transaction, of which each try decides anew what becomes of its rows?
    pub(crate) const fn is_large(&self) -> bool {
        self.reading.is_chunked()
    }

    /// Runs with savepoints from now on.
    pub(crate) fn isolate(&mut self, failure: &Failure) {
        tracing::warn!(error = %failure, "a row was refused: the batch runs again with each row by itself");
        self.isolated = true;
    }

    /// The positions that are reached once this is committed.
    pub(crate) fn reaches(&self) -> Vector {
        self.headers
            .iter()
            .map(|header| (header.origin(), header.position))
            .collect()
    }

    /// What each origin had applied at the last of its transactions here, itself included: in-band knowledge.
    pub(crate) fn knowledge(&self) -> Vec<(NodeId, Vector)> {
        let mut out: Vec<(NodeId, Vector)> = Vec::new();
        for header in self.headers.iter().rev() {
            if out.iter().all(|(origin, _)| *origin != header.origin()) {
                let mut knows = header.deps.clone();
                knows.raise(header.origin(), header.position);
                out.push((header.origin(), knows));
            }
        }
        out
    }

    /// The stamps of its transactions.
    pub(crate) fn stamps(&self) -> impl Iterator<Item = Stamp> {
        self.headers.iter().map(|header| header.stamp)
    }

    /// Prepares for another try.
    pub(crate) fn start_again(&mut self, journal: &Journal) -> Result<(), Failure> {
        self.released.clear();
        self.is_fresh = false;
        if !self.reading.is_chunked() {
            return Ok(());
        }
        // Resolved again from the journal: what was lost to it is known to the resolver no more, so it is kept.
        let mut losses = self.carried.begin_again();
        for step in self.steps.drain(..) {
            let (lost, rows) = step.into_known()?;
            losses.extend(lost);
            self.reading.write_again(rows);
        }
        losses.retain(|loss| !loss.is_of_one_try());
        let kept = Batch::known(losses, self.reading.evicted.clone());
        if !kept.is_empty() {
            self.steps.push(Step::Rows(kept));
        }
        self.reading.start_again(journal)
    }

    /// Writes everything, resolving on the way what was not resolved in an earlier try.
    pub(crate) async fn write(&mut self, writer: &mut Writer<'_>, config: &Config) -> Result<(), Failure> {
        if !self.found.is_empty() {
            let losses = writer.reconcile(&mut self.found).await?;
            self.carried.replace(losses);
        }
        if !self.release.is_empty() {
            // What tells that they are not to be written may be forgotten from then on.
            writer.commit_durably().await?;
            self.released.extend(self.release.iter().cloned());
        }
        let before = std::mem::replace(&mut self.xid, writer.xid);
        let is_fresh = std::mem::take(&mut self.is_fresh);
        // All of them, before any is tried: a try that fails in the midst leaves none with the name of the one before.
        for step in &mut self.steps {
            if let Step::Rows(batch) = step {
                rename_writer(batch, (before, writer.xid));
            }
        }
        for step in &mut self.steps {
            if let Step::Rows(batch) = step {
                if is_fresh {
                    let mut resolver = lock(&writer.shared.resolver);
                    name_writer(batch, &mut resolver, (before, writer.xid))?;
                } else {
                    refresh(batch, writer.shared, (before, writer.xid))?;
                }
                self.left_to = self.left_to.max(batch.left_to);
            }
            write_step(step, &mut self.released, writer).await?;
        }
        let mut next = self.reading.next_chunk((writer.shared, writer.xid), config)?;
        loop {
            let is_last = next.is_last;
            let is_alone = next.is_plain() && !next.batch.is_empty();
            let new = self.keep(next);
            if self.reading.is_chunked() && is_alone && !is_last && writer.mode != Mode::Cautious {
                next = self.write_and_read(writer, config).await?;
                if let Err(failure) = self.forget_chunk(writer).await {
                    self.keep(next);
                    return Err(failure);
                }
                continue;
            }
            for step in self.steps.iter_mut().skip(new) {
                write_step(step, &mut self.released, writer).await?;
            }
            if is_last {
                return Ok(());
            }
            if self.reading.is_chunked() {
                self.forget_chunk(writer).await?;
            }
            next = self.reading.next_chunk((writer.shared, writer.xid), config)?;
        }
    }

    /// Takes a chunk among the steps; which place it begins at. All of it is kept before any is tried: the stream is past it, and
    /// another try runs what is kept.
    fn keep(&mut self, chunk: Chunk) -> usize {
        let new = self.steps.len();
        self.left_to = self.left_to.max(chunk.batch.left_to);
        if !chunk.batch.is_empty() {
            self.steps.push(Step::Rows(chunk.batch));
        }
        if let Some(mut step) = chunk.step {
            self.has_ddl |= matches!(step, Step::Ddl(_));
            if let Step::Truncate(_, met) = &mut step {
                *met = Met::within(self.own_stamps());
            }
            self.steps.push(step);
        }
        new
    }

    fn own_stamps(&mut self) -> Arc<HashSet<Stamp>> {
        let headers = &self.headers;
        let all = || Arc::new(headers.iter().map(|header| header.stamp).collect());
        Arc::clone(self.own.get_or_insert_with(all))
    }

    /// The steps of a large transaction are written: of those only the lines are kept.
    async fn forget_chunk(&mut self, writer: &mut Writer<'_>) -> Result<(), Failure> {
        for step in self.steps.drain(..) {
            let (lost, rows) = step.into_known()?;
            {
                let resolver = lock(&writer.shared.resolver);
                self.carried
                    .add(lost, |loss| resolver.is_by_stamp(loss.key.table()));
            }
            self.reading.write_again(rows);
        }
        writer.sift_touched().await
    }

    /// Writes the last step, and meanwhile reads and resolves the chunk behind it. That is decided as if the step were
    /// written; where it is not (a local write came over a row, and is not decoded yet), the guard notices, as with any
    /// local write that a decision did not know.
    async fn write_and_read(&mut self, writer: &mut Writer<'_>, config: &Config) -> Result<Chunk, Failure> {
        let (shared, xid) = (writer.shared, writer.xid);
        let mut next = Chunk::default();
        let Some(step) = self.steps.last_mut() else {
            return Ok(next);
        };
        let written = write_step(step, &mut self.released, writer);
        let reading = async {
            while !next.is_closed {
                // What is written goes first, whenever it can go on.
                tokio::task::yield_now().await;
                self.reading.fill(&mut next, (shared, xid), config, SLICE_ROWS)?;
            }
            Ok::<(), Failure>(())
        };
        let (written, read) = tokio::join!(Box::pin(written), reading);
        if let Err(failure) = written.and(read) {
            // Its lines are known only here by now.
            self.keep(next);
            return Err(failure);
        }
        Ok(next)
    }

    /// All lines for the log.
    pub(crate) fn losses(&self) -> Vec<Loss> {
        let of_steps = self.steps.iter().flat_map(|step| match step {
            Step::Rows(batch) => batch.losses.as_slice(),
            Step::Truncate(_, met) => &met.losses,
            Step::Ddl(_) => &[],
        });
        self.carried.losses().chain(of_steps).cloned().collect()
    }

    /// How many of its losses are not among them, since the log would not take their lines.
    pub(crate) fn counted_losses(&self) -> Counts {
        self.carried.counts()
    }

    /// Tells how many lines the log takes, at the begin of a try.
    pub(crate) const fn set_lines(&mut self, lines_max: usize) {
        self.carried.set_lines(lines_max);
    }

    /// Keys that leave the quarantine with this transaction.
    pub(crate) fn released(&self) -> Vec<(Arc<TableDesc>, RowKey)> {
        self.released.clone()
    }

    /// Opens a large transaction's pieces.
    pub(crate) fn open(&mut self, journal: &Journal) -> Result<(), Failure> {
        self.reading.open(journal)
    }
}

async fn write_step(
    step: &mut Step,
    released: &mut Vec<(Arc<TableDesc>, RowKey)>,
    writer: &mut Writer<'_>,
) -> Result<(), Failure> {
    match step {
        Step::Rows(batch) => {
            batch.read_back(writer.lookup)?;
            batch.losses.retain(|loss| !loss.is_of_one_try());
            // The row of these is not to be seen yet, so that none was deleted says nothing.
            let waiting = writer.waiting_deletions(batch.actions.iter());
            let kept: Vec<_> = {
                let mut resolver = lock(&writer.shared.resolver);
                let quarantined = resolver.quarantined();
                let of = batch
                    .actions
                    .iter()
                    .filter(|action| quarantined.contains_key(&action.key) && !waiting.contains(&action.key));
                of.map(|action| (Arc::clone(&action.table), action.key.clone()))
                    .collect()
            };
            writer.write(batch).await?;
            let refused = |key: &RowKey| {
                // One that lost to another row is settled.
                let mut lines = batch.losses.iter();
                writer.put_off.contains(key) || lines.any(|loss| loss.keeps_row_out() && loss.key == *key)
            };
            // One that an earlier step has let go may be refused now.
            released.retain(|(_, key)| !refused(key));
            released.extend(kept.into_iter().filter(|(_, key)| !refused(key)));
        }
        Step::Truncate(truncate, met) => {
            let gone = writer.truncate(truncate, met).await?;
            let refused = |key: &RowKey| {
                let mut lines = met.losses.iter();
                lines.any(|loss| loss.keeps_row_out() && loss.key == *key)
            };
            released.extend(gone);
            // One that came back with it.
            released.retain(|(_, key)| !refused(key));
        }
        Step::Ddl(ddl) => writer.ddl(ddl).await?,
    }
    Ok(())
}

/// A batch that was resolved for a transaction without a name gets the name.
fn name_writer(batch: &mut Batch, resolver: &mut Resolver, names: (u32, u32)) -> Result<(), Failure> {
    rename_writer(batch, names);
    for action in &batch.actions {
        resolver.set_xid(&action.key, action.version.stamp, names.1)?;
    }
    Ok(())
}

/// Rows that follow another write of the same transaction expect it by the name of this try.
fn rename_writer(batch: &mut Batch, (before, xid): (u32, u32)) {
    for action in &mut batch.actions {
        if before != 0 && action.expect.xid == before {
            action.expect.xid = xid;
        }
    }
}

/// Brings an earlier try's batch up to date: rows that a local write has won meanwhile are left alone, and the
/// resolver learns the new writer.
fn refresh(batch: &mut Batch, shared: &Shared, (before, xid): (u32, u32)) -> Result<(), Failure> {
    let mut resolver = lock(&shared.resolver);
    batch.horizon = shared.horizon();
    for mut action in std::mem::take(&mut batch.actions) {
        if resolver.merging(action.key.table()).is_some() {
            // Whatever came meanwhile goes into it: also a local write with a lower stamp, which is below the horizon by now, so that
            // the guard would let the row be written as it was decided.
            if !action.folds.contains(&action.version.stamp) {
                action.folds.push(action.version.stamp);
            }
            if let Some(current) = resolver.current(&action.key)? {
                action.version = current.version;
            }
            batch.actions.push(action);
        } else if resolver.is_winner(
            &action.key,
            action.version.stamp,
            matches!(action.write, Write::Put(_)),
        )? {
            // A local row that was found meanwhile may be where none was to be. Who put it right left it to this write.
            action.careful |=
                matches!(action.write, Write::Delete(_)) && action.expect.present == Some(false);
            batch.actions.push(action);
        } else if resolver.is_parked(&action.key, action.version.stamp)? {
            // The finding has its line.
            action.write = Write::Delete(action.table.image_of_canonical(action.key.canonical())?);
            (action.careful, action.recall) = (true, false);
            batch.actions.push(action);
        } else if let Some(winner) = resolver.current(&action.key)? {
            if resolver.is_ranked(action.key.table()) {
                let left = (Arc::clone(&action.table), action.version.stamp);
                batch.left.insert(action.key.clone(), left);
            }
            batch.leave_to(&winner, shared.node);
        }
    }
    take_up(batch, &resolver, shared.node)?;
    name_writer(batch, &mut resolver, (before, xid))
}

/// Rows that were left to a winner which is one no more. A local write stands as it was committed; what anybody else wrote
/// nobody else will write.
fn take_up(batch: &mut Batch, resolver: &Resolver, node: NodeId) -> Result<(), Failure> {
    let written: HashSet<RowKey> = batch.actions.iter().map(|action| action.key.clone()).collect();
    let mut left = std::mem::take(&mut batch.left);
    for (key, (table, winner)) in left.iter_mut().filter(|(key, _)| !written.contains(*key)) {
        let Some(current) = resolver
            .current(key)?
            .filter(|current| current.version.stamp != *winner)
        else {
            continue;
        };
        *winner = current.version.stamp;
        if current.version.origin() == node {
            batch.leave_to(&current, node);
            continue;
        }
        let unknown = Expect {
            present: None,
            xid: 0,
        };
        batch.restore(table, key.clone(), None, current.version, unknown)?;
        if let Some(action) = batch.actions.last_mut().filter(|_| current.parked) {
            // It gave up a unique value, and stays away.
            action.recall = false;
        }
    }
    batch.left = left;
    Ok(())
}
