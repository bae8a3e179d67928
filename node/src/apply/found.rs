//! Working off what the decoder found: conflicts that were decided before their local side was known.
//!
//! In:   [`Found`]s of the resolver        Out: log lines, and rows put right, in an apply transaction of its own
//! Not here: finding them (`crate::resolve`)

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::record::classify;
use anabranch_conflict::{ConflictType, Kind, Op, Resolution, Version};
use anabranch_proto::Stamp;
use anabranch_proto::schema::TableDesc;

use super::batch::{Action, Write};
use super::catalog;
use super::failure::Failure;
use super::loss::{KeyFrom, Loser, Loss, Refusal, Tuple};
use super::plan::Source;
use super::session::TableError;
use super::write::{Mode, Writer};
use crate::index::RowKey;
use crate::pg::xid;
use crate::resolve::Found;
use crate::shared::{Counters, Visibility, lock};

/// Findings that are put right at once.
const REPAIR_ROWS: usize = 1_000;

impl Writer<'_> {
    /// Puts the rows of findings right where that is needed, and gives their lines for the log. Findings of tables that are
    /// passed over here are dropped: what others wrote there was passed over, whatever the journal and the index say of it.
    pub(crate) async fn reconcile(&mut self, found: &mut Vec<Found>) -> Result<Vec<Loss>, Failure> {
        found.retain(|item| !self.shared.passed_over.holds(&item.table));
        if found.is_empty() {
            return Ok(Vec::new());
        }
        // What is confirmed to the slot because of this transaction must be durable with it.
        self.commit_durably().await?;
        let mut losses = Vec::new();
        // Many at once: each look at the decoder costs a flush of the server.
        for some in found.chunks(REPAIR_ROWS) {
            let mut standing = self.repair(some, &mut losses).await?;
            losses.extend(self.settle_found(some).await?);
            for (at, item) in some.iter().enumerate().filter(|(_, item)| item.log) {
                let mut line = line(item);
                if let Some(row) = standing.remove(&at) {
                    line.remote_tuple = row;
                }
                losses.push(line);
            }
        }
        Ok(losses)
    }

    /// Makes the open transaction one that is flushed before its COMMIT is answered.
    pub(crate) async fn commit_durably(&mut self) -> Result<(), Failure> {
        let local = "SET LOCAL synchronous_commit = local";
        Ok(self.session.client.batch_execute(local).await?)
    }

    /// Rows that should be absent, but may be there: they go. What lines show of those that were, by place in `found`; lines of those
    /// that the server does not let go.
    async fn repair(
        &mut self,
        found: &[Found],
        losses: &mut Vec<Loss>,
    ) -> Result<HashMap<usize, Tuple>, Failure> {
        let mut tables: BTreeMap<Keyed<'_>, Vec<usize>> = BTreeMap::new();
        let hidden = self.hidden_writers(found).await?;
        let held_rows: HashSet<&RowKey> = found
            .iter()
            .filter(|item| !is_of_another(item) && is_of_hidden(item, &hidden))
            .map(|item| &item.key)
            .collect();
        let held_since = self.held_since(found, &hidden);
        let applied = self.shared.applied.borrow().clone();
        let repairs = found
            .iter()
            .enumerate()
            .filter(|(_, item)| item.repair && !item.settle);
        for (at, item) in repairs {
            if !is_of_another(item) && is_of_hidden(item, &hidden) {
                // Its lock is held until its commit is visible, which may wait for this very transaction. Had the
                // local write won, the remote one could not have passed the lock. A remote one that is still to be written here may not find
                // the row either.
                if !item.local_won {
                    self.quarantine(&deletion(item)?, &Failure::Held).await?;
                }
                continue;
            }
            if !applied.covers(item.remote.origin(), item.remote.position) {
                // Not written here yet: when it is, the local write is known, and seen.
                continue;
            }
            let is_held = held_rows.contains(&item.key) || held_since.contains(&item.key);
            if is_held || self.is_made_by_hidden(&item.key, &hidden)? {
                // A later local write holds it, whose commit may wait for this very transaction. What becomes of the row is seen to with that.
                continue;
            }
            tables.entry(keyed(&item.table)).or_default().push(at);
        }
        let mut out = HashMap::new();
        for places in tables.into_values() {
            losses.extend(self.repair_table(found, &places, &mut out).await?);
        }
        Ok(out)
    }

    /// The local writers of the rows of `found` whose commits are decoded but not visible yet, since they wait for peers.
    async fn hidden_writers(&mut self, found: &[Found]) -> Result<HashSet<u32>, Failure> {
        if *self.shared.visibility.borrow() != Visibility::BeforeDependents {
            return Ok(HashSet::new());
        }
        let own = self.shared.node;
        let mut xids: Vec<i64> = Vec::new();
        {
            let resolver = lock(&self.shared.resolver);
            for item in found.iter().filter(|item| item.repair || item.settle) {
                xids.extend(item.local_txn.map(|txn| i64::from(txn.xid)));
                // A later local write that met nothing may hold the row, too.
                let current = resolver.current(&item.key)?;
                xids.extend(
                    current
                        .filter(|current| current.version.origin() == own && current.xid != 0)
                        .map(|current| i64::from(current.xid)),
                );
            }
            // Or one that was found since.
            let keys: HashSet<&RowKey> = found.iter().map(|item| &item.key).collect();
            let since = resolver.found_since().filter(|item| keys.contains(&item.key));
            let since = since.filter_map(|item| item.local_txn);
            xids.extend(since.map(|txn| i64::from(txn.xid)));
        }
        self.hidden_among(&xids).await
    }

    /// Those of some transactions (32 bits of their ids) that are not visible yet.
    pub(super) async fn hidden_among(&mut self, xids: &[i64]) -> Result<HashSet<u32>, Failure> {
        let statement = self.session.prepare(&xid::hidden()).await?;
        let rows = self.session.client.query(&statement, &[&xids]).await?;
        let hidden = rows.iter().map(|row| row.try_get::<_, i64>(0));
        Ok(hidden
            .map(|xid| Ok(u32::try_from(xid?).unwrap_or(0)))
            .collect::<Result<_, tokio_postgres::Error>>()?)
    }

    /// Rows of `found` that local writers among `hidden` hold by what was found since.
    fn held_since(&self, found: &[Found], hidden: &HashSet<u32>) -> HashSet<RowKey> {
        if hidden.is_empty() {
            return HashSet::new();
        }
        let keys: HashSet<&RowKey> = found.iter().map(|item| &item.key).collect();
        let resolver = lock(&self.shared.resolver);
        resolver
            .found_since()
            .filter(|item| keys.contains(&item.key) && !is_of_another(item) && is_of_hidden(item, hidden))
            .map(|item| item.key.clone())
            .collect()
    }

    /// Is a row to be what an own commit made of it that is not visible yet?
    fn is_made_by_hidden(&self, key: &RowKey, hidden: &HashSet<u32>) -> Result<bool, Failure> {
        let current = lock(&self.shared.resolver).current(key)?;
        Ok(current.is_some_and(|current| {
            let is_own = current.version.origin() == self.shared.node;
            is_own && !current.parked && hidden.contains(&current.xid)
        }))
    }

    /// Of one table, whose key all of them have alike.
    async fn repair_table(
        &mut self,
        found: &[Found],
        places: &[usize],
        out: &mut HashMap<usize, Tuple>,
    ) -> Result<Vec<Loss>, Failure> {
        let items: Vec<(usize, &Found)> = places
            .iter()
            .filter_map(|&at| Some((at, found.get(at)?)))
            .collect();
        let Some((_, first)) = items.first() else {
            return Ok(Vec::new());
        };
        let actions = items
            .iter()
            .map(|(_, item)| deletion(item))
            .collect::<Result<Vec<_>, _>>()?;
        let all: Vec<&Action> = actions.iter().collect();
        let plan = match self.session.plan_of_key(&first.table).await {
            Ok(plan) => plan,
            // No table, no row.
            Err(TableError::Catalog(catalog::Error::Missing(..))) => return Ok(Vec::new()),
            Err(error) => {
                let failure = Failure::from(error);
                if failure.is_transient() {
                    return Err(failure);
                }
                return self.refuse_table(&all, &failure).await;
            }
        };
        let standing = self.lock_rows(&plan, &all).await?;
        if standing.iter().all(Option::is_none) {
            return Ok(Vec::new());
        }
        self.pass_fence().await?;
        let (mut gone, mut shown) = (Vec::new(), Vec::new());
        {
            let resolver = lock(&self.shared.resolver);
            for ((&(at, item), action), row) in items.iter().zip(&actions).zip(standing) {
                let Some(row) = row else {
                    continue;
                };
                let current = resolver.current(&item.key)?;
                if current.is_some_and(|current| !current.is_there()) {
                    gone.push(action);
                    // What stood there was the remote insert that lost, unless a local write came over it. That one may be gone, too, for the unique
                    // value that it gave up.
                    let is_current = current.is_some_and(|current| current.xid == row.xmin);
                    if item.local_won && item.log && !is_current {
                        shown.push((at, item.remote, action));
                    }
                }
            }
        }
        if !shown.is_empty() {
            let of: Vec<&Action> = shown.iter().map(|(_, _, action)| *action).collect();
            let read = self.read_rows_of(&plan, &of).await?;
            for (&(at, remote, _), row) in shown.iter().zip(read) {
                out.extend(row.map(|row| (at, row.tuple(Some(remote)))));
            }
        }
        let mut losses = Vec::new();
        if self.mode == Mode::Cautious {
            for action in &gone {
                if let Err(failure) = self.in_savepoint(&plan, &[action]).await? {
                    losses.push(self.quarantine(action, &failure).await?);
                }
            }
        } else if !gone.is_empty() {
            self.force(&plan, &gone).await?;
        }
        Counters::add(&self.shared.counters.repairs, gone.len() as u64);
        Ok(losses)
    }
}

impl Writer<'_> {
    /// Makes rows what the index says they are, whatever they are now: under a policy over the frontier a local
    /// write may lose to an earlier one, and a row may get a version back that nobody is about to write.
    /// Gives the lines of rows that the server refused.
    async fn settle_found(&mut self, found: &[Found]) -> Result<Vec<Loss>, Failure> {
        let mut tables: BTreeMap<(&str, &str), BTreeMap<&RowKey, &Found>> = BTreeMap::new();
        for item in found.iter().filter(|item| item.settle) {
            let name = (item.table.schema.as_str(), item.table.name.as_str());
            tables.entry(name).or_default().insert(&item.key, item);
        }
        if tables.is_empty() {
            return Ok(Vec::new());
        }
        let hidden = self.hidden_writers(found).await?;
        let held_since = self.held_since(found, &hidden);
        let held_rows: HashSet<&RowKey> = found
            .iter()
            .filter(|item| is_of_hidden(item, &hidden))
            .map(|item| &item.key)
            .chain(&held_since)
            .collect();
        let mut losses = self.lines_of_merged(found)?;
        for mut rows in tables.into_values() {
            for held in self.take_untouchable(&mut rows, &held_rows, &hidden)? {
                self.quarantine(&held, &Failure::Held).await?;
            }
            losses.extend(self.refuse_unfit(&mut rows).await?);
            losses.extend(self.settle_rows(&rows).await?);
        }
        Ok(losses)
    }

    /// Takes out rows that are described by a key which is another one here by now, or of another type: none is found by it. What they must be
    /// waits in quarantine; gives their lines.
    async fn refuse_unfit(&mut self, rows: &mut BTreeMap<&RowKey, &Found>) -> Result<Vec<Loss>, Failure> {
        let address = |item: &Found| Arc::as_ptr(&item.table) as usize;
        let (mut losses, mut fitting) = (Vec::new(), HashSet::new());
        loop {
            let next = rows.values().find(|item| !fitting.contains(&address(item)));
            let Some(table) = next.map(|item| Arc::clone(&item.table)) else {
                return Ok(losses);
            };
            let at = Arc::as_ptr(&table) as usize;
            let failure = match self.session.plan_of_key(&table).await.map_err(Failure::from) {
                Err(failure @ Failure::Table(TableError::Mismatch(_))) => failure,
                Err(failure) if failure.is_transient() => return Err(failure),
                Ok(_) | Err(_) => {
                    fitting.insert(at);
                    continue;
                }
            };
            let (unfit, fit): (BTreeMap<&RowKey, &Found>, BTreeMap<&RowKey, &Found>) = std::mem::take(rows)
                .into_iter()
                .partition(|(_, item)| address(item) == at);
            *rows = fit;
            lock(&self.shared.resolver).begin_repair(unfit.keys().map(|key| (*key).clone()));
            self.pass_fence().await?;
            let (actions, lines) = self.as_they_must_be(&unfit)?;
            losses.extend(lines);
            let all: Vec<&Action> = actions.iter().collect();
            losses.extend(self.refuse_table(&all, &failure).await?);
        }
    }

    async fn settle_rows(&mut self, rows: &BTreeMap<&RowKey, &Found>) -> Result<Vec<Loss>, Failure> {
        let Some(first) = rows.values().next() else {
            return Ok(Vec::new());
        };
        let plan = match self.session.plan_of_key(&first.table).await {
            Ok(plan) => plan,
            // No table, no row.
            Err(TableError::Catalog(catalog::Error::Missing(..))) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut keys = plan.rows();
        for item in rows.values() {
            let key = item.table.image_of_canonical(item.key.canonical())?;
            keys.push(&Source::Key(&key))?;
        }
        let standing = self.lock_array(&plan, keys).await?;
        self.note_locked(rows.keys().copied(), &standing);
        self.pass_fence().await?;
        // From here on a local write of a row that is not there is a finding of its own once it is decoded: it may meet ours. One that is there is
        // locked until ours is committed; were its writes found as well, a row that is written all the time would be put right without end.
        let absent = rows.keys().zip(&standing).filter(|(_, row)| row.is_none());
        lock(&self.shared.resolver).begin_repair(absent.map(|(key, _)| (*key).clone()));
        let (actions, mut losses) = self.as_they_must_be(rows)?;
        {
            // What was refused of them after they were found was decided without that: it is written now as it must be, or refused again.
            let mut resolver = lock(&self.shared.resolver);
            for action in &actions {
                resolver.overtake(&action.table, &action.key);
            }
        }
        // The images may come from tables described otherwise, before columns were added.
        losses.extend(self.write_rows(&actions).await?);
        Counters::add(&self.shared.counters.repairs, actions.len() as u64);
        Ok(losses)
    }

    /// Rows as the index says that they are; with lines of those that are folded.
    fn as_they_must_be(
        &mut self,
        rows: &BTreeMap<&RowKey, &Found>,
    ) -> Result<(Vec<Action>, Vec<Loss>), Failure> {
        let mut actions = Vec::with_capacity(rows.len());
        let mut losses = Vec::new();
        for item in rows.values() {
            if self.is_merged(item) {
                let action = deletion(item)?;
                let current = lock(&self.shared.resolver).current(&item.key)?;
                let known = !lock(&self.shared.resolver).versions(&item.key).is_empty();
                // Nothing known and no tombstone: all of it is stable, and as it must be.
                if known || current.is_some_and(|current| current.version.kind == Kind::Delete) {
                    actions.push(self.folded(&action, &mut losses)?);
                }
                continue;
            }
            let current = lock(&self.shared.resolver).current(&item.key)?;
            if let Some(current) = current {
                actions.push(self.as_it_must_be(item, current.version)?);
            }
        }
        Ok((actions, losses))
    }

    /// The lines of merged rows: who lost something to whom does not depend on whether anything can be written now.
    fn lines_of_merged(&self, found: &[Found]) -> Result<Vec<Loss>, Failure> {
        let mut asked: BTreeMap<&RowKey, (&Found, Vec<Stamp>)> = BTreeMap::new();
        for item in found.iter().filter(|item| item.settle && self.is_merged(item)) {
            let (_, stamps) = asked.entry(&item.key).or_insert((item, Vec::new()));
            stamps.extend([item.local.stamp, item.remote.stamp]);
            stamps.sort_unstable();
            stamps.dedup();
        }
        let mut losses = Vec::new();
        for (key, (item, stamps)) in asked {
            if let Some(folded) = self.fold(&item.table, key, &stamps)? {
                self.merge_lines(key, &folded, &mut losses);
            }
        }
        Ok(losses)
    }

    fn is_merged(&self, item: &Found) -> bool {
        let resolver = lock(&self.shared.resolver);
        resolver.merging(item.key.table()).is_some()
    }

    /// Takes out the rows that nothing can be done about now. Those that the applier is about to write are left to
    /// it: it knows the local write by then. Of those that a hidden commit holds locked, which may wait for this very
    /// transaction, the ones that it has lost are given back, for the quarantine.
    fn take_untouchable(
        &self,
        rows: &mut BTreeMap<&RowKey, &Found>,
        held_rows: &HashSet<&RowKey>,
        hidden: &HashSet<u32>,
    ) -> Result<Vec<Action>, Failure> {
        let applied = self.shared.applied.borrow().clone();
        let mut held = Vec::new();
        let mut failed = None;
        rows.retain(|key, item| {
            let mut look = || -> Result<bool, Failure> {
                let Some(current) = lock(&self.shared.resolver).current(key)? else {
                    return Ok(false);
                };
                let winner = current.version;
                let own = winner.origin() == self.shared.node;
                let unapplied = |version: &Version| {
                    version.origin() != self.shared.node
                        && !applied.covers(version.origin(), version.position)
                };
                if unapplied(&winner) || lock(&self.shared.resolver).versions(key).iter().any(unapplied) {
                    // A row that nobody sees yet is not found by who is about to delete it.
                    if !own && winner.kind == Kind::Delete && held_rows.contains(*key) {
                        held.push(self.as_it_must_be(item, winner)?);
                    }
                    return Ok(false);
                }
                let held_row = held_rows.contains(*key) || own && hidden.contains(&current.xid);
                if !held_row {
                    return Ok(true);
                }
                // Had an own write that is still held won, nothing can have passed its lock.
                if !own {
                    held.push(self.as_it_must_be(item, winner)?);
                }
                Ok(false)
            };
            look().unwrap_or_else(|failure| {
                failed = Some(failure);
                false
            })
        });
        match failed {
            Some(failure) => Err(failure),
            None => Ok(held),
        }
    }

    fn as_it_must_be(&self, item: &Found, version: Version) -> Result<Action, Failure> {
        if self.is_merged(item)
            && let Some(folded) = self.fold(&item.table, &item.key, &[])?
        {
            let (write, op) = match folded.row {
                Some(row) => (Write::Put(row), Op::Update),
                None => {
                    let key = item.table.image_of_canonical(item.key.canonical())?;
                    (Write::Delete(key), Op::Delete)
                }
            };
            return Ok(Action::careful(
                folded.table,
                item.key.clone(),
                write,
                folded.top,
                op,
            ));
        }
        let (table, write, op) = match version.kind {
            Kind::Delete => {
                let key = item.table.image_of_canonical(item.key.canonical())?;
                (Arc::clone(&item.table), Write::Delete(key), Op::Delete)
            }
            Kind::Put => {
                let (table, row) = self.lookup.must(version, &item.table, &item.key)?;
                (table, Write::Put(row), Op::Update)
            }
        };
        Ok(Action::careful(table, item.key.clone(), write, version, op))
    }
}

/// Is the local write among `hidden`?
fn is_of_hidden(item: &Found, hidden: &HashSet<u32>) -> bool {
    item.local_txn.is_some_and(|txn| hidden.contains(&txn.xid))
}

/// Is the row that is to go another one than the local write's?
const fn is_of_another(item: &Found) -> bool {
    item.rival.is_some() && item.local_won
}

/// A table, and the columns of its key with their types.
type Keyed<'t> = (&'t str, &'t str, Vec<(&'t str, u32)>);

/// What a description says of a table's key. Rows that were written before it was given another type have it otherwise: no plan of the others
/// finds them, and the server takes none of their keys for one.
fn keyed(table: &TableDesc) -> Keyed<'_> {
    let columns = table
        .key
        .iter()
        .filter_map(|&at| table.columns.get(usize::from(at)));
    let key = columns.map(|column| (column.name.as_str(), column.type_oid));
    (&table.schema, &table.name, key.collect())
}

/// The winning delete of a finding, as a write; or the row that yields a unique value, which goes.
fn deletion(item: &Found) -> Result<Action, Failure> {
    let version = if item.local_won == item.rival.is_none() {
        item.local
    } else {
        item.remote
    };
    let write = Write::Delete(item.table.image_of_canonical(item.key.canonical())?);
    let (table, key) = (Arc::clone(&item.table), item.key.clone());
    Ok(Action::careful(table, key, write, version, Op::Delete))
}

fn line(item: &Found) -> Loss {
    let local_tuple = match (&item.local_row, item.local.kind) {
        (Some(row), _) => Tuple::Image(Arc::clone(&item.table), row.clone()),
        (None, Kind::Delete) => Tuple::None,
        (None, Kind::Put) => Tuple::Journal(item.local),
    };
    let remote_tuple = match item.remote.kind {
        Kind::Delete => Tuple::None,
        Kind::Put => Tuple::Journal(item.remote),
    };
    let (local_tuple, remote_tuple) = match &item.rival {
        Some(rival) if item.local_won => (
            Tuple::JournalOf(item.local, rival.key.clone()),
            Tuple::Journal(item.remote),
        ),
        Some(rival) => (
            Tuple::Journal(item.local),
            Tuple::JournalOf(item.remote, rival.key.clone()),
        ),
        None => (local_tuple, remote_tuple),
    };
    let op = match item.remote.kind {
        Kind::Delete => Op::Delete,
        Kind::Put => Op::Update,
    };
    let key_from = match (&item.local_row, &item.key_image) {
        (Some(row), _) => KeyFrom::Row(row.clone()),
        (None, Some(key)) => KeyFrom::Key(key.clone()),
        (None, None) => KeyFrom::Canonical,
    };
    Loss {
        table: Arc::clone(&item.table),
        key: item.key.clone(),
        key_from,
        kind: match item.rival {
            Some(_) => ConflictType::MultipleUniqueConflicts,
            None => classify(op, item.local.kind),
        },
        resolution: if item.local_won {
            Resolution::KeepLocal
        } else {
            Resolution::ApplyRemote
        },
        loser: if item.local_won {
            Loser::Remote
        } else {
            Loser::Local
        },
        local: Some(item.local),
        remote: Some(item.remote),
        local_tuple,
        remote_tuple,
        refusal: None,
        is_decoded: item.rival.is_none() && !item.local_won,
        lost_columns: None,
        reason: item
            .rival
            .as_ref()
            .map(|rival| Refusal::claimed(&rival.constraint)),
    }
}

#[cfg(test)]
mod tests {
    use anabranch_proto::schema::ColumnDesc;

    use super::*;

    #[test]
    fn rows_whose_keys_are_of_other_types_are_not_looked_for_together() {
        let column = |name: &str, type_oid: u32| ColumnDesc {
            name: name.to_owned(),
            type_oid,
            type_mod: -1,
            type_name: String::new(),
        };
        let table = |id: u32, value: u32| TableDesc {
            schema: "public".to_owned(),
            name: "item".to_owned(),
            columns: vec![column("value", value), column("id", id)],
            key: vec![1],
            identity_full: false,
        };
        assert_eq!(keyed(&table(23, 25)), ("public", "item", vec![("id", 23)]));
        assert_eq!(keyed(&table(23, 25)), keyed(&table(23, 1043)));
        assert_ne!(keyed(&table(23, 25)), keyed(&table(20, 25)));
    }
}
