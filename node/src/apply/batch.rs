//! A batch: what one apply transaction writes, resolved, with several writes of one row joined to the last.
//!
//! In:   changes of transactions in causal order        Out: actions per row, lines for the conflict log
//! Invariants: 1. at most one action a row; 2. an action expects the row as it stood before the batch
//! Not here: SQL ([`super::write`])

use std::sync::Arc;

use anabranch_conflict::record::classify;
use anabranch_conflict::{ConflictType, Kind, Op, Resolution, TableVersion, Version};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{Change, PutOp, TxnHeader};
use anabranch_proto::{NodeId, Position, Stamp};
use hashbrown::HashMap;

use super::failure::Failure;
use super::lookup::Lookup;
use super::loss::{KeyFrom, Loser, Loss, Refusal, Tuple};
use crate::index::{Entry, RowKey};
use crate::resolve::{self, Decision, Expect, Resolver, TxnClaims, Yielded};

/// What becomes of a row.
#[derive(Debug, Clone)]
pub(crate) enum Write {
    /// The whole row.
    Put(RowImage),
    /// No row; the image of its key.
    Delete(RowImage),
}

/// One row's write.
#[derive(Debug, Clone)]
pub(crate) struct Action {
    pub(crate) table: Arc<TableDesc>,
    pub(crate) key: RowKey,
    pub(crate) write: Write,
    pub(crate) version: Version,
    pub(crate) op: Op,
    pub(crate) expect: Expect,
    /// Lock first: the log wants the row as it stands.
    pub(crate) careful: bool,
    /// The row's image is still to be read back from the journal ([`Batch::read_back`]).
    pub(crate) recall: bool,
    /// Not empty: the row is folded once it is locked, and the losses of these versions are logged.
    pub(crate) folds: Vec<Stamp>,
    /// It comes from the quarantine, so what is known of no row any more may be later than it.
    pub(crate) again: bool,
}

impl Action {
    /// A write of a row of which nothing is known: it is locked and looked at first.
    pub(crate) const fn careful(
        table: Arc<TableDesc>,
        key: RowKey,
        write: Write,
        version: Version,
        op: Op,
    ) -> Self {
        Self {
            table,
            key,
            write,
            version,
            op,
            expect: Expect {
                present: None,
                xid: 0,
            },
            careful: true,
            recall: false,
            folds: Vec::new(),
            again: false,
        }
    }
}

/// A truncate, to be done between the actions before and after it.
#[derive(Debug, Clone)]
pub(crate) struct Truncate {
    pub(crate) tables: Vec<Arc<TableDesc>>,
    pub(crate) version: TableVersion,
    pub(crate) deps: anabranch_proto::Vector,
}

/// A batch, or a chunk of one.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) actions: Vec<Action>,
    pub(crate) losses: Vec<Loss>,
    by_key: HashMap<RowKey, usize>,
    /// The xid horizon when the rows were decided. A later one may be past a local write that the decisions
    /// did not know.
    pub(crate) horizon: Option<u32>,
    /// Changes that went in.
    pub(crate) change_count: usize,
    /// Bytes of the images held.
    pub(crate) byte_count: usize,
    /// Rows that are left as they are, of tables whose policy is over the frontier, with the winner that they are left to: a
    /// local write that is decoded before another try may take its place and lose.
    pub(crate) left: HashMap<RowKey, (Arc<TableDesc>, Stamp)>,
    /// The last own transaction that a row was left to, because it won.
    pub(crate) left_to: Position,
}

impl Batch {
    /// What of a transaction is not found out again when that is resolved a second time.
    pub(crate) fn known(losses: Vec<Loss>, actions: Vec<Action>) -> Self {
        Self {
            losses,
            actions,
            ..Self::default()
        }
    }

    /// Makes room for so many rows.
    pub(crate) fn reserve(&mut self, rows: usize) {
        self.actions.reserve(rows);
        self.by_key.reserve(rows);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.actions.is_empty() && self.losses.is_empty()
    }

    /// Are all its rows to be written as they are expected to be found, with nothing to log?
    pub(crate) fn is_plain(&self) -> bool {
        let is_plain = |action: &Action| !action.careful && !action.recall && action.folds.is_empty();
        self.losses.is_empty() && self.left.is_empty() && self.actions.iter().all(is_plain)
    }

    /// Resolves a row change into the batch; the transaction's writer will be `xid`, and `claims` what it claims. A
    /// truncate is given back.
    pub(crate) fn add(
        &mut self,
        resolver: &mut Resolver,
        change: Change,
        (header, claims): (&TxnHeader, &mut TxnClaims),
        xid: u32,
    ) -> Result<Option<Truncate>, resolve::Error> {
        self.change_count += 1;
        let version = |kind| Version {
            stamp: header.stamp,
            position: header.position,
            kind,
        };
        match change {
            Change::Put {
                table,
                op,
                row,
                old_key,
                former,
            } => {
                self.byte_count += row.as_bytes().len();
                let moved = old_key.is_some();
                if let Some(old_key) = old_key {
                    let key = resolver.key_of_image(&table, &old_key)?;
                    let write = Write::Delete(old_key);
                    self.row(
                        resolver,
                        (&table, key),
                        (write, Op::Delete),
                        version(Kind::Delete),
                        (header, None, claims),
                        xid,
                    )?;
                }
                let key = resolver.key_of_row(&table, &row)?;
                let put_op = match (moved, op) {
                    (true, _) => Op::Move,
                    (false, PutOp::Insert) => Op::Insert,
                    (false, PutOp::Update | PutOp::State) => Op::Update,
                };
                let stated = (op == PutOp::State).then(|| key.clone());
                self.row(
                    resolver,
                    (&table, key),
                    (Write::Put(row), put_op),
                    version(Kind::Put),
                    (header, former, claims),
                    xid,
                )?;
                // Whether there is a row is not said: it is locked and looked at first.
                let place = stated.and_then(|key| self.by_key.get(&key).copied());
                if let Some(action) = place.and_then(|place| self.actions.get_mut(place)) {
                    action.careful = true;
                }
            }
            Change::Delete { table, key } => {
                self.byte_count += key.as_bytes().len();
                let row_key = resolver.key_of_image(&table, &key)?;
                let write = Write::Delete(key);
                self.row(
                    resolver,
                    (&table, row_key),
                    (write, Op::Delete),
                    version(Kind::Delete),
                    (header, None, claims),
                    xid,
                )?;
            }
            // RESTART IDENTITY is of the sequences of the node where it was said.
            Change::Truncate { tables, .. } => {
                resolver.claim_truncated(claims, &tables);
                let version = TableVersion {
                    stamp: header.stamp,
                    position: header.position,
                };
                let deps = header.deps.clone();
                return Ok(Some(Truncate {
                    tables,
                    version,
                    deps,
                }));
            }
        }
        Ok(None)
    }

    fn row(
        &mut self,
        resolver: &mut Resolver,
        (table, key): (&Arc<TableDesc>, RowKey),
        (mut write, op): (Write, Op),
        version: Version,
        (header, former, claims): (&TxnHeader, Option<RowImage>, &mut TxnClaims),
        xid: u32,
    ) -> Result<(), resolve::Error> {
        let prior = self.by_key.get(&key).copied();
        let images = match &write {
            Write::Put(row) => (Some(row), None, former.as_ref()),
            Write::Delete(key) => (None, Some(key), None),
        };
        let decision = resolver.remote((table, &key), version, &header.deps, images, xid)?;
        resolver.claim(claims, (table, &key), version, images.0)?;
        match decision {
            Decision::Fold { expect } => {
                let former = prior.and_then(|at| self.actions.get(at));
                let mut folds = former.map_or_else(Vec::new, |action| action.folds.clone());
                folds.push(version.stamp);
                // As below: the operation tells where nothing is known.
                let present = expect.present.unwrap_or(matches!(op, Op::Update | Op::Delete));
                let expect = Expect {
                    present: Some(present),
                    ..expect
                };
                let action = Action {
                    table: Arc::clone(table),
                    version: resolver.current(&key)?.map_or(version, |entry| entry.version),
                    key,
                    write,
                    op,
                    expect: former.map_or(expect, |action| action.expect),
                    careful: true,
                    recall: false,
                    folds,
                    again: false,
                };
                self.put(prior, action);
            }
            Decision::Apply {
                expect,
                beaten,
                unsure,
            } => {
                if resolver.is_parked(&key, version.stamp)? {
                    // Found out when it was tried before.
                    write = Write::Delete(table.image_of_canonical(key.canonical())?);
                }
                if let Some(loser) = beaten {
                    let local_tuple = self.standing(prior, &loser);
                    self.losses.push(loss(
                        table,
                        &key,
                        (&write, op),
                        version,
                        &loser,
                        local_tuple,
                        Loser::Local,
                    ));
                }
                if let Some(action) = prior.and_then(|at| self.actions.get_mut(at)) {
                    action.table = Arc::clone(table);
                    action.write = write;
                    action.version = version;
                    action.op = op;
                    action.recall = false;
                    action.careful |= beaten.is_some() || unsure;
                    return Ok(());
                }
                let table = Arc::clone(table);
                let careful = beaten.is_some() || unsure || resolver.quarantined().contains_key(&key);
                // Where nothing is known the operation tells; the first one, as later ones of this batch follow it.
                let present = expect.present.unwrap_or(matches!(op, Op::Update | Op::Delete));
                let expect = Expect {
                    present: Some(present),
                    ..expect
                };
                let action = Action {
                    table,
                    key,
                    write,
                    version,
                    op,
                    expect,
                    careful,
                    recall: false,
                    folds: Vec::new(),
                    again: false,
                };
                self.put(None, action);
            }
            Decision::Keep { winner } | Decision::Restore { winner, .. } => {
                self.leave_to(&winner, resolver.node());
                let restore = matches!(decision, Decision::Restore { .. });
                let local_tuple = match winner.version.kind {
                    Kind::Put if restore => Tuple::Journal(winner.version),
                    _ => self.standing(prior, &winner),
                };
                self.losses.push(loss(
                    table,
                    &key,
                    (&write, op),
                    version,
                    &winner,
                    local_tuple,
                    Loser::Remote,
                ));
                if let Decision::Restore { winner, expect } = decision {
                    self.restore(table, key, prior, winner.version, expect)?;
                } else if resolver.is_ranked(key.table()) {
                    let left = (Arc::clone(table), winner.version.stamp);
                    self.left.insert(key, left);
                }
            }
        }
        Ok(())
    }

    /// A row yields a unique value to another one: it goes, and is logged. Gives what becomes of it.
    pub(crate) fn give_up(&mut self, row: &Yielded, node: NodeId) -> Result<Action, resolve::Error> {
        let prior = self.by_key.get(&row.key).copied();
        let version = row.entry.version;
        let former = prior.and_then(|at| self.actions.get(at));
        let loser = self.standing(prior, &row.entry);
        let key_image = row.table.image_of_canonical(row.key.canonical())?;
        let action = Action {
            expect: former.map_or(
                Expect {
                    present: None,
                    xid: row.entry.xid,
                },
                |action| action.expect,
            ),
            ..Action::careful(
                Arc::clone(&row.table),
                row.key.clone(),
                Write::Delete(key_image),
                version,
                Op::Delete,
            )
        };
        self.put(prior, action.clone());
        let winner = Tuple::JournalOf(row.winner, row.rival.clone());
        let (local, remote, local_tuple, remote_tuple) = if row.incoming {
            (row.winner, version, winner, loser)
        } else {
            (version, row.winner, loser, winner)
        };
        if row.incoming {
            self.leave_to(&Entry::new(row.winner, 0), node);
        }
        self.losses.push(Loss {
            table: Arc::clone(&row.table),
            key: row.key.clone(),
            key_from: KeyFrom::Canonical,
            kind: ConflictType::MultipleUniqueConflicts,
            resolution: if row.incoming {
                Resolution::KeepLocal
            } else {
                Resolution::ApplyRemote
            },
            loser: if row.incoming { Loser::Remote } else { Loser::Local },
            local: Some(local),
            remote: Some(remote),
            local_tuple,
            remote_tuple,
            refusal: None,
            is_decoded: false,
            lost_columns: None,
            reason: Some(Refusal::claimed(&row.constraint)),
        });
        Ok(action)
    }

    /// Notes that a row stays as its winner wrote it.
    pub(crate) fn leave_to(&mut self, winner: &Entry, node: NodeId) {
        if winner.version.stamp.node == node {
            self.left_to = self.left_to.max(winner.version.position);
        }
    }

    /// The row gets a version that it had before, or never had here.
    pub(crate) fn restore(
        &mut self,
        table: &Arc<TableDesc>,
        key: RowKey,
        prior: Option<usize>,
        version: Version,
        expect: Expect,
    ) -> Result<(), resolve::Error> {
        let write = Write::Delete(table.image_of_canonical(key.canonical())?);
        let op = match version.kind {
            Kind::Put => Op::Update,
            Kind::Delete => Op::Delete,
        };
        let action = Action {
            table: Arc::clone(table),
            key,
            write,
            version,
            op,
            expect: prior
                .and_then(|at| self.actions.get(at))
                .map_or(expect, |action| action.expect),
            careful: true,
            recall: version.kind == Kind::Put,
            folds: Vec::new(),
            again: false,
        };
        self.put(prior, action);
        Ok(())
    }

    /// The row's action, in place of the one `prior` to it, if there is one.
    fn put(&mut self, prior: Option<usize>, action: Action) {
        match prior.and_then(|at| self.actions.get_mut(at)) {
            Some(slot) => *slot = action,
            None => {
                self.by_key.insert(action.key.clone(), self.actions.len());
                self.actions.push(action);
            }
        }
    }

    /// Reads the images of restored rows back from the journal, which holds everything that is not stable; what
    /// is stable is covered by all that comes in, and never restored.
    pub(crate) fn read_back(&mut self, lookup: &Lookup) -> Result<(), Failure> {
        for action in self.actions.iter_mut().filter(|action| action.recall) {
            let (table, row) = lookup.must(action.version, &action.table, &action.key)?;
            action.table = table;
            action.write = Write::Put(row);
            action.recall = false;
        }
        Ok(())
    }

    /// The row that a line's local side shows: an earlier action of this batch, or what stands in the table.
    fn standing(&self, prior: Option<usize>, entry: &Entry) -> Tuple {
        match prior.and_then(|at| self.actions.get(at)) {
            Some(action) if action.version.stamp == entry.version.stamp => match &action.write {
                Write::Put(row) => Tuple::Image(Arc::clone(&action.table), row.clone()),
                // A row that gave up a unique value, or one that is still to be read back.
                Write::Delete(_) if action.version.kind == Kind::Put => Tuple::Journal(action.version),
                Write::Delete(_) => Tuple::None,
            },
            _ if entry.version.kind == Kind::Delete => Tuple::None,
            _ => Tuple::Standing(*entry),
        }
    }
}

fn loss(
    table: &Arc<TableDesc>,
    key: &RowKey,
    (write, op): (&Write, Op),
    remote: Version,
    local: &Entry,
    local_tuple: Tuple,
    loser: Loser,
) -> Loss {
    let (key_from, remote_tuple) = match write {
        Write::Put(row) => (
            KeyFrom::Row(row.clone()),
            Tuple::Image(Arc::clone(table), row.clone()),
        ),
        Write::Delete(key) => (KeyFrom::Key(key.clone()), Tuple::None),
    };
    Loss {
        table: Arc::clone(table),
        key: key.clone(),
        key_from,
        kind: classify(op, local.version.kind),
        resolution: if loser == Loser::Remote {
            Resolution::KeepLocal
        } else {
            Resolution::ApplyRemote
        },
        loser,
        local: Some(local.version),
        remote: Some(remote),
        local_tuple,
        remote_tuple,
        refusal: None,
        is_decoded: false,
        lost_columns: None,
        reason: None,
    }
}
