//! The changes of an apply transaction, as they are read and resolved into batches.
//!
//! In:   transactions at hand, or the pieces of a large one from the journal      Out: [`Chunk`]s, in order
//! Holds: the piece being read; what the transaction being resolved claims of unique keys
//! Must never: talk to the server. It may run while an earlier chunk is written, so it must not need what became of that

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use anabranch_proto::txn::{Change, Changes, TxnHeader};

use super::super::batch::{Action, Batch};
use super::super::ddl::Ddl;
use super::super::failure::Failure;
use super::super::feed::Pieces;
use super::super::truncate::Met;
use super::Step;
use crate::config::Config;
use crate::index::RowKey;
use crate::journal::{CursorState, Journal};
use crate::resolve::{Resolver, TxnClaims};
use crate::shared::{Shared, lock};

/// Rows of a large transaction that are written at once.
const CHUNK_ROWS: usize = 4_000;
/// Bytes of images that are written at once.
const CHUNK_BYTES: usize = 8 << 20;

/// Rows resolved for one statement or some, and what stands between them and those that follow.
#[derive(Default)]
pub(super) struct Chunk {
    pub(super) batch: Batch,
    pub(super) step: Option<Step>,
    /// Nothing more goes in; else it is still to be filled.
    pub(super) is_closed: bool,
    /// Nothing comes after it.
    pub(super) is_last: bool,
}

impl Chunk {
    /// Rows alone, to be written as they are expected to be found.
    pub(super) fn is_plain(&self) -> bool {
        self.step.is_none() && self.batch.is_plain()
    }
}

enum Stream {
    /// Nothing (more) to resolve.
    Done,
    Small(VecDeque<(Arc<TxnHeader>, Changes)>),
    Large {
        header: Arc<TxnHeader>,
        from: CursorState,
        pieces: Option<Box<Pieces>>,
        changes: Option<Changes>,
    },
}

/// What is still to be resolved.
pub(super) struct Reading {
    stream: Stream,
    chunked: bool,
    /// What the transaction that is being resolved claims, and which it is.
    claims: TxnClaims,
    claiming: Option<Arc<TxnHeader>>,
    /// Rows that yielded to a large transaction's, to go again should it run again; and those that came back with its
    /// truncate, or were folded again.
    pub(super) evicted: Vec<Action>,
}

impl Reading {
    fn new(stream: Stream, chunked: bool) -> Self {
        Self {
            stream,
            chunked,
            claims: TxnClaims::default(),
            claiming: None,
            evicted: Vec::new(),
        }
    }

    pub(super) fn nothing() -> Self {
        Self::new(Stream::Done, false)
    }

    pub(super) fn small(txns: VecDeque<(Arc<TxnHeader>, Changes)>) -> Self {
        Self::new(Stream::Small(txns), false)
    }

    /// A transaction whose pieces begin at `from`.
    pub(super) fn large(header: Arc<TxnHeader>, from: CursorState) -> Self {
        let stream = Stream::Large {
            header,
            from,
            pieces: None,
            changes: None,
        };
        Self::new(stream, true)
    }

    /// Is it one large transaction, written in several chunks?
    pub(super) const fn is_chunked(&self) -> bool {
        self.chunked
    }

    /// Opens a large transaction's pieces.
    pub(super) fn open(&mut self, journal: &Journal) -> Result<(), Failure> {
        if let Stream::Large {
            header, from, pieces, ..
        } = &mut self.stream
            && pieces.is_none()
        {
            *pieces = Some(Box::new(Pieces::large(journal, header.origin(), *from)?));
        }
        Ok(())
    }

    /// Takes rows that are to be written before all else in another try: one action a row, though each try may name it.
    pub(super) fn write_again(&mut self, rows: Vec<Action>) {
        if rows.is_empty() {
            return;
        }
        let known = self.evicted.iter().enumerate();
        let known: HashMap<RowKey, usize> = known.map(|(at, row)| (row.key.clone(), at)).collect();
        for row in rows {
            match known.get(&row.key).and_then(|at| self.evicted.get_mut(*at)) {
                Some(before) if before.version.stamp == row.version.stamp => {}
                Some(before) => *before = row,
                None => self.evicted.push(row),
            }
        }
    }

    /// Begins a large transaction anew.
    pub(super) fn start_again(&mut self, journal: &Journal) -> Result<(), Failure> {
        (self.claims, self.claiming) = (TxnClaims::default(), None);
        if let Stream::Large { pieces, changes, .. } = &mut self.stream {
            (*pieces, *changes) = (None, None);
        }
        self.open(journal)
    }

    /// The next chunk, for the apply transaction `xid`.
    pub(super) fn next_chunk(
        &mut self,
        (shared, xid): (&Shared, u32),
        config: &Config,
    ) -> Result<Chunk, Failure> {
        let mut chunk = Chunk::default();
        self.fill(&mut chunk, (shared, xid), config, usize::MAX)?;
        Ok(chunk)
    }

    /// Resolves up to so many changes more into the chunk.
    pub(super) fn fill(
        &mut self,
        chunk: &mut Chunk,
        (shared, xid): (&Shared, u32),
        config: &Config,
        at_most: usize,
    ) -> Result<(), Failure> {
        let rows_max = config.apply.batch_rows_max.max(CHUNK_ROWS);
        let mut resolver = lock(&shared.resolver);
        let batch = &mut chunk.batch;
        if batch.change_count == 0 {
            // The first decision's: a later one may be past a local write that it did not know.
            batch.horizon = shared.horizon();
            // What others say of their transactions is believed up to what a batch may hold.
            batch.reserve(self.stream.change_count().min(rows_max));
        }
        let pause_at = batch.change_count.saturating_add(at_most);
        let mut passed_over = 0_usize;
        while let Some((header, change)) = self.stream.next_change(shared).map_err(unreadable)? {
            meet_member(&change, shared).map_err(unreadable)?;
            self.end_claims(Some(&header), batch, &mut resolver)?;
            let Some(change) = shared.passed_over.sift(change) else {
                passed_over += 1;
                if batch.change_count.saturating_add(passed_over) >= pause_at {
                    return Ok(());
                }
                if passed_over.is_multiple_of(CHUNK_ROWS) {
                    // Decoding needs the resolver, too.
                    drop(resolver);
                    std::thread::yield_now();
                    resolver = lock(&shared.resolver);
                }
                continue;
            };
            shared
                .lasting
                .named_anew
                .meet(&header, &change, &shared.lasting.alarms);
            let ddl = Ddl::of(&change, &header).map_err(Failure::Unreadable)?;
            let truncate = batch.add(&mut resolver, change, (&header, &mut self.claims), xid)?;
            chunk.step = ddl
                .map(Step::Ddl)
                .or_else(|| truncate.map(|truncate| Step::Truncate(truncate, Met::default())));
            let is_full = self.chunked && (batch.change_count >= rows_max || batch.byte_count >= CHUNK_BYTES);
            if chunk.step.is_some() || is_full {
                chunk.is_closed = true;
                return Ok(());
            }
            if batch.change_count >= pause_at {
                return Ok(());
            }
        }
        self.end_claims(None, batch, &mut resolver)?;
        (chunk.is_closed, chunk.is_last) = (true, true);
        Ok(())
    }

    /// The transaction before `next` is resolved whole, if that is another one: rows yield.
    fn end_claims(
        &mut self,
        next: Option<&Arc<TxnHeader>>,
        batch: &mut Batch,
        resolver: &mut Resolver,
    ) -> Result<(), Failure> {
        let same = |header: &TxnHeader| next.is_some_and(|next| next.stamp == header.stamp);
        if self.claiming.as_ref().is_some_and(|header| same(header)) {
            return Ok(());
        }
        if let Some(header) = std::mem::replace(&mut self.claiming, next.cloned()) {
            for row in resolver.end_claims(&mut self.claims, &header.deps)? {
                let action = batch.give_up(&row, resolver.node())?;
                if self.chunked && !row.incoming {
                    self.evicted.push(action);
                }
            }
        }
        Ok(())
    }
}

impl Stream {
    /// How many changes it has, or had at its begin.
    fn change_count(&self) -> usize {
        let count = match self {
            Self::Done => 0,
            Self::Small(txns) => txns.iter().fold(0, |count: u64, (header, _)| {
                count.saturating_add(header.change_count)
            }),
            Self::Large { header, .. } => header.change_count,
        };
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    fn next_change(&mut self, shared: &Shared) -> Result<Option<(Arc<TxnHeader>, Change)>, Failure> {
        match self {
            Self::Done => Ok(None),
            Self::Small(txns) => {
                while let Some((header, changes)) = txns.front_mut() {
                    if let Some(change) = changes.next_change()? {
                        return Ok(Some((Arc::clone(header), change)));
                    }
                    lock(&shared.recent).insert(header);
                    txns.pop_front();
                }
                *self = Self::Done;
                Ok(None)
            }
            Self::Large {
                header,
                pieces,
                changes,
                ..
            } => loop {
                if let Some(current) = changes
                    && let Some(change) = current.next_change()?
                {
                    return Ok(Some((Arc::clone(header), change)));
                }
                lock(&shared.recent).insert(header);
                *changes = match pieces {
                    Some(pieces) => pieces.next_piece()?,
                    None => None,
                };
                if changes.is_none() {
                    return Ok(None);
                }
            },
        }
    }
}

/// A second try would not meet the change again, and commit without it.
fn unreadable(failure: Failure) -> Failure {
    match failure {
        Failure::Malformed(why) => Failure::Unreadable(why),
        failure => failure,
    }
}

/// A fact about a member, on its way into the table: noted before anything that it comes with may be called stable.
fn meet_member(change: &Change, shared: &Shared) -> Result<(), Failure> {
    if let Change::Put { table, row, .. } = change
        && table.is_own()
        && table.name == crate::membership::TABLE
        && let Some(fact) = crate::membership::of_row(table, row)?
    {
        shared.expect_member(&fact);
    }
    Ok(())
}
