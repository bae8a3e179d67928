//! Messages into events: the stream of whole transactions that the rest of the daemon works on.
//!
//! In:   frames of the slot            Out: [`Event`]s
//! Holds: the frame that could not be delivered yet, if any
//! Invariants: as of the module above
//! On crash: nothing to lose
//! Not here: what is confirmed to the slot, and when (the caller, by [`Source::feedback`])

use std::sync::Arc;

use anabranch_conflict::policy::Policies;
use anabranch_proto::Lsn;
use anabranch_proto::row::{Cell, RowImage};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, PutOp};
use anabranch_proto::wire::Malformed;
use bytes::Bytes;
use tokio_postgres::Client;

use super::Error;
use super::pgoutput::{Message, OldTuple, Tuple};
use super::relation::{Relation, Relations};
use super::slot::{self, Slot};
use super::walsender::{Feedback, Frame, Identity, Replication, ReplyWanted, Walsender};
use crate::pg::Dsn;

/// What to decode.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// The server, as `pg::dsn` reads it.
    pub dsn: Dsn,
    /// The logical slot, which exists.
    pub slot: String,
    /// The publication, older than the slot.
    pub publication: String,
    /// Everything that ends after this is sent; the server begins later if the slot was confirmed further
    /// (compare with [`Source::slot`]). `Lsn::ZERO`: from where the slot was confirmed.
    pub start: Lsn,
    /// Updates of tables whose columns are merged carry the former row.
    pub policies: Arc<Policies>,
}

/// One thing that happened, in the order of the WAL's commits.
#[derive(Debug, Clone)]
pub enum Event {
    /// A transaction begins. It has committed: all of it follows.
    Begin {
        /// Start of its commit record.
        commit_start: Lsn,
        /// Its commit timestamp, microseconds since the Unix epoch.
        commit_us: i64,
        /// Its top-level transaction id, 32 bits.
        xid: u32,
    },
    /// A change of the transaction that began last.
    Change(Change),
    /// `pg_logical_emit_message`. Any role may write any: never trust it.
    Message {
        /// Prefix.
        prefix: String,
        /// Content.
        content: Bytes,
        /// Part of the transaction around it; else it was sent when written, whatever became of its
        /// transaction.
        transactional: bool,
    },
    /// The transaction that began last is complete.
    Commit {
        /// Start of its commit record.
        commit_start: Lsn,
        /// End of its commit record: its position.
        commit_end: Lsn,
        /// Its commit timestamp, microseconds since the Unix epoch.
        commit_us: i64,
    },
    /// Outside a transaction: everything published that ends at or before `wal_end` was sent. Inside one, the
    /// same of what came before it. An idle slot is kept from pinning WAL by confirming this once all that
    /// was received is durable.
    Keepalive {
        /// How far the server has decoded.
        wal_end: Lsn,
        /// The server wants feedback. It was already answered with the last one given.
        reply_wanted: bool,
    },
}

/// A slot being decoded. One task owns it.
pub struct Source {
    replication: Replication,
    relations: Relations,
    identity: Identity,
    slot: Slot,
    /// A message that ended in an error: it is tried again, never skipped.
    held: Option<Bytes>,
    in_transaction: bool,
    /// Of the transaction begun last.
    xid: u32,
    /// Rows of other tables than the daemon's own are passed over until the transaction ends.
    skipping: bool,
    /// End of the last commit.
    last_commit: Lsn,
    scratch: (Vec<u8>, Vec<u8>),
}

impl Source {
    /// Connects to the server and starts decoding. `sql` is a session on the same database, outside any
    /// transaction, that is used for catalog lookups.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses, or the slot is missing, in use, lost, or unfit.
    pub async fn connect(options: SourceOptions, sql: Arc<Client>) -> Result<Self, Error> {
        let slot = slot::require(&sql, &options.slot).await?;
        let mut walsender = Walsender::connect(&options.dsn, "decode").await?;
        let identity = walsender.identify().await?;
        if options.start > identity.written {
            return Err(Error::StartBeyondWal {
                start: options.start,
                written: identity.written,
            });
        }
        let replication = walsender
            .start(&options.slot, &options.publication, options.start)
            .await?;
        Ok(Self {
            replication,
            relations: Relations::new(sql, options.policies),
            identity,
            slot,
            held: None,
            in_transaction: false,
            xid: 0,
            skipping: false,
            last_commit: Lsn::ZERO,
            scratch: (Vec::new(), Vec::new()),
        })
    }

    /// Who the server is.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The slot as it was before decoding started.
    #[must_use]
    pub const fn slot(&self) -> &Slot {
        &self.slot
    }

    /// The highest position the server has told us. Whatever ends at or before it has been sent to us, though
    /// it may not have been returned by [`Self::next`] yet.
    #[must_use]
    pub const fn received(&self) -> Lsn {
        self.replication.received()
    }

    /// Why nothing has come for long, where that is because a commit whose table is still to be looked up is not visible.
    #[must_use]
    pub fn stuck(&self) -> Option<String> {
        self.relations.stuck()
    }

    /// When the server sent the last message that was returned, by its own clock, microseconds since the Unix epoch; 0
    /// before the first. What it sends long after the commit is a backlog.
    #[must_use]
    pub const fn sent_us(&self) -> i64 {
        self.replication.sent_us()
    }

    /// The next event. Cancel-safe. Sends feedback that could not be sent before.
    ///
    /// # Errors
    /// When the connection ends (make a new `Source`), or an event cannot be made. The latter is tried again
    /// by the next call, so nothing is lost; the error tells what has to be put right.
    pub async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.buffered()? {
                return Ok(event);
            }
            if self.relations.is_pending() {
                self.relations.settle(self.skipping).await?;
            } else {
                self.replication.fill().await?;
            }
        }
    }

    /// The next event, if it can be had without waiting; `None` when the socket or the catalog is needed.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn buffered(&mut self) -> Result<Option<Event>, Error> {
        // Nothing passes a table that is still to be looked up.
        while !self.relations.is_pending() {
            if self.skipping && self.held.is_none() {
                let relations = &self.relations;
                let is_other = |oid| relations.get(oid).is_some_and(|known| !known.table.is_own());
                self.replication
                    .pass_over_rows(|oid| is_other(oid) || relations.gone(oid).is_some());
            }
            let wal = match self.held.take() {
                Some(wal) => wal,
                None => match self.replication.buffered()? {
                    None => break,
                    Some(Frame::Wal(wal)) => wal,
                    Some(Frame::Keepalive { wal_end, reply }) => {
                        return Ok(Some(Event::Keepalive {
                            wal_end,
                            reply_wanted: reply == ReplyWanted::Yes,
                        }));
                    }
                },
            };
            match self.event(&wal) {
                Ok(None) => {}
                Ok(event) => return Ok(event),
                Err(error) => {
                    self.held = Some(wal);
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    /// Reports to the server what was received (`write`), is durable here (`flush`, where a restart begins)
    /// and is applied elsewhere (`apply`). Values are held down to [`Self::received`] and never go back. Of
    /// reports that could not be sent the last goes. Cancel-safe: what is not sent now goes with
    /// [`Self::next`].
    ///
    /// A server that shuts down waits until `flush` has reached all that it sent.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn feedback(
        &mut self,
        write: Lsn,
        flush: Lsn,
        apply: Lsn,
        reply: ReplyWanted,
    ) -> Result<(), Error> {
        self.replication
            .feedback(Feedback { write, flush, apply }, reply)
            .await
    }

    /// Gives no more rows of the open transaction but those of the daemon's own tables, and no TRUNCATE: the caller knows the
    /// rest, and reading it would cost as much again. So it does not matter whether these tables are still there, either.
    pub const fn skip_rows(&mut self) {
        self.skipping = self.in_transaction;
    }

    /// What one message means; `None` for those that only teach.
    fn event(&mut self, wal: &Bytes) -> Result<Option<Event>, Error> {
        let message = Message::parse(wal)?;
        let is_part = !matches!(
            message,
            Message::Begin { .. }
                | Message::Relation(_)
                | Message::Type { .. }
                | Message::Unasked(_)
                | Message::Logical {
                    transactional: false,
                    ..
                }
        );
        if is_part && !self.in_transaction {
            return Err(Error::Protocol(Malformed("a change outside a transaction")));
        }
        let change = match message {
            Message::Begin {
                commit_start,
                commit_us,
                xid,
            } => {
                return self.begin(commit_start, commit_us, xid).map(Some);
            }
            Message::Commit {
                commit_start,
                commit_end,
                commit_us,
            } => {
                return self.commit(commit_start, commit_end, commit_us).map(Some);
            }
            Message::Origin => return Ok(None),
            Message::Relation(relation) => {
                self.relations.describe(relation, self.xid);
                return Ok(None);
            }
            Message::Type { oid, schema, name } => {
                self.relations.announce(oid, &schema, &name);
                return Ok(None);
            }
            Message::Logical {
                transactional,
                prefix,
                content,
                ..
            } => {
                return Ok(Some(Event::Message {
                    prefix,
                    content,
                    transactional,
                }));
            }
            Message::Insert { relation, new } => insert(known(&self.relations, relation)?, new)?,
            Message::Update { relation, old, new } => {
                update(known(&self.relations, relation)?, old, new, &mut self.scratch)?
            }
            Message::Delete { relation, old } => delete(known(&self.relations, relation)?, old)?,
            // Of tables that may be gone.
            Message::Truncate { .. } if self.skipping => return Ok(None),
            Message::Truncate {
                relations,
                cascade,
                restart_identity,
            } => {
                let table = |&oid| known(&self.relations, oid).map(|known| Arc::clone(&known.table));
                let tables = relations.iter().map(table).collect::<Result<_, _>>()?;
                Change::Truncate {
                    tables,
                    cascade,
                    restart_identity,
                }
            }
            Message::Unasked(tag) => {
                return Err(Error::Unexpected {
                    what: format!("pgoutput message {:?}", char::from(tag)),
                });
            }
        };
        Ok(Some(Event::Change(change)))
    }

    fn begin(&mut self, commit_start: Lsn, commit_us: i64, xid: u32) -> Result<Event, Error> {
        if std::mem::replace(&mut self.in_transaction, true) {
            return Err(Error::Protocol(Malformed("a transaction inside another")));
        }
        self.xid = xid;
        Ok(Event::Begin {
            commit_start,
            commit_us,
            xid,
        })
    }

    fn commit(&mut self, commit_start: Lsn, commit_end: Lsn, commit_us: i64) -> Result<Event, Error> {
        if commit_end <= self.last_commit {
            return Err(Error::Protocol(Malformed(
                "a commit that is not after the one before it",
            )));
        }
        self.last_commit = commit_end;
        (self.in_transaction, self.skipping) = (false, false);
        Ok(Event::Commit {
            commit_start,
            commit_end,
            commit_us,
        })
    }
}

fn known(relations: &Relations, oid: u32) -> Result<&Relation, Error> {
    relations.get(oid).ok_or_else(|| match relations.gone(oid) {
        Some(table) => Error::TableGone {
            table: table.to_owned(),
        },
        None => Error::Protocol(Malformed("a change of a table that was not described")),
    })
}

fn table_name(table: &TableDesc) -> String {
    format!("{}.{}", table.schema, table.name)
}

/// The row in the columns that leave this node.
fn row(relation: &Relation, tuple: Tuple) -> Result<RowImage, Error> {
    let sent = tuple.image;
    if sent.cells().len() != relation.sent.0.len() {
        return Err(Error::Protocol(Malformed(
            "a row whose column count is not its table's",
        )));
    }
    if relation.kept_back.is_empty() {
        return Ok(sent);
    }
    let cells = sent.cells().enumerate();
    let cells = cells.filter(|(at, _)| !relation.kept_back.contains(at));
    let cells: Vec<Cell<'_>> = cells.map(|(_, cell)| cell).collect();
    Ok(RowImage::build(cells.into_iter()))
}

fn insert(relation: &Relation, new: Tuple) -> Result<Change, Error> {
    let table = &relation.table;
    if new.has_unchanged {
        return Err(Error::Protocol(Malformed("an insert without all values")));
    }
    let row = row(relation, new)?;
    Ok(Change::Put {
        table: Arc::clone(table),
        op: PutOp::Insert,
        row,
        old_key: None,
        former: None,
    })
}

fn update(
    relation: &Relation,
    old: Option<OldTuple>,
    new: Tuple,
    scratch: &mut (Vec<u8>, Vec<u8>),
) -> Result<Change, Error> {
    let table = &relation.table;
    if !relation.identity_has_key {
        return Err(Error::IdentityWithoutKey {
            table: table_name(table),
        });
    }
    let (old, is_full) = match old {
        None => (None, false),
        Some(OldTuple::Key(tuple)) => (Some(row(relation, tuple)?), false),
        Some(OldTuple::Full(tuple)) => (Some(row(relation, tuple)?), true),
    };
    let has_unchanged = new.has_unchanged;
    let mut row = row(relation, new)?;
    if has_unchanged {
        row = filled(table, &row, old.as_ref(), is_full)?;
    }
    let mut old_key = None;
    let mut former = None;
    // Without a former row the identity is untouched, and the key is part of it.
    if let Some(old) = &old {
        // Of nearly all the key is the same byte by byte.
        let is_moved = !table.has_same_key_bytes(old, &row) && {
            let (before, after) = scratch;
            before.clear();
            after.clear();
            table.canonical_key(old, before)?;
            table.canonical_key(&row, after)?;
            before != after
        };
        if is_moved {
            old_key = Some(table.key_image(old)?);
        } else if relation.is_merged && is_full {
            former = Some(changed(old, &row));
        }
    }
    Ok(Change::Put {
        table: Arc::clone(table),
        op: PutOp::Update,
        row,
        old_key,
        former,
    })
}

/// The former row, with a mark where the new one has the same value.
fn changed(old: &RowImage, new: &RowImage) -> RowImage {
    let cells = old.cells().zip(new.cells());
    let cells: Vec<Cell<'_>> = cells
        .map(|(old, new)| if old == new { Cell::Unchanged } else { old })
        .collect();
    RowImage::build(cells.into_iter())
}

/// The new row with its untouched out-of-line values from the former one.
fn filled(
    table: &TableDesc,
    new: &RowImage,
    old: Option<&RowImage>,
    old_is_full: bool,
) -> Result<RowImage, Error> {
    let mut cells = Vec::with_capacity(table.columns.len());
    let mut old_cells = old.map(RowImage::cells);
    for (at, cell) in (0u16..).zip(new.cells()) {
        let former = old_cells.as_mut().and_then(Iterator::next);
        let cell = match (cell, former) {
            (Cell::Unchanged, Some(value @ (Cell::Text(_) | Cell::Binary(_))))
                if old_is_full || table.key.contains(&at) =>
            {
                value
            }
            (Cell::Unchanged, _) => {
                let column = table.columns.get(usize::from(at));
                return Err(Error::ToastNotLogged {
                    table: table_name(table),
                    column: column.map(|column| column.name.clone()).unwrap_or_default(),
                });
            }
            (cell, _) => cell,
        };
        cells.push(cell);
    }
    Ok(RowImage::build(cells.into_iter()))
}

fn delete(relation: &Relation, old: OldTuple) -> Result<Change, Error> {
    let table = &relation.table;
    if !relation.identity_has_key {
        return Err(Error::IdentityWithoutKey {
            table: table_name(table),
        });
    }
    let (OldTuple::Key(tuple) | OldTuple::Full(tuple)) = old;
    let key = table.key_image(&row(relation, tuple)?)?;
    Ok(Change::Delete {
        table: Arc::clone(table),
        key,
    })
}
