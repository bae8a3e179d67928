//! Rows of tables whose policy chooses among the whole frontier ([`anabranch_conflict::frontier`]).
//!
//! In:   the same changes as [`Resolver`]      Out: decisions, findings
//! Holds: per contested row the versions that its index entry does not show; rows that are being put right; large transactions that wait
//! Invariants: 1. the index entry and the contested versions of a row are its frontier, as far as it is not stable;
//!        2. the index entry is what the row shows, or will show once its finding is worked off; 3. every local
//!        write that meets a concurrent remote one, or may meet a repair under way unseen, is a finding
//! On crash: rebuilt with the index
//! Not here: last update wins, which needs one version a row (the parent module)

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::frontier::{Deletes, Frontier, Member, Policy};
use anabranch_conflict::policy::{ForeignKeys, Name, Policies, TablePolicy};
use anabranch_conflict::table::{AgainstTruncate, admit_row};
use anabranch_conflict::{Kind, TableVersion, Version};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Lsn, Stamp, Vector};

use super::{
    Decision, Error, Expect, Folding, Found, Images, LocalTxn, Resolver, Truncated, has_unseen, of_truncate,
};
use crate::index::{Entry, RowKey, TableId};

/// What the resolver keeps for policies over the frontier.
#[derive(Default)]
pub(super) struct Ranked {
    policies: Policies,
    /// Of `policies`.
    hash: String,
    /// By table number; `None` for last update wins.
    by_table: Vec<Option<Arc<Policy>>>,
    contested: HashMap<RowKey, Vec<Version>>,
    repairing: HashSet<RowKey>,
    /// See [`Resolver::set_stuck`].
    stuck: Vec<Stamp>,
    idle_sweeps: u32,
}

impl Ranked {
    pub(super) fn new(policies: Policies) -> Self {
        Self {
            hash: policies.hash(),
            policies,
            ..Self::default()
        }
    }

    /// How the rows of a table are folded from their versions, if they are.
    pub(super) fn folding(&self, table: &TableDesc) -> Option<Folding> {
        let (schema, name) = (&table.schema, &table.name);
        match self.policies.change_of(schema, name) {
            Some(change) => Some(Folding::Change(Arc::new(change))),
            None => Folding::of(self.policies.of(schema, name)),
        }
    }

    /// Is the row being put right?
    pub(super) fn is_repaired(&self, key: &RowKey) -> bool {
        self.repairing.contains(key)
    }

    /// A table has this number; tells whether it is new. Asked for every row, so names are matched once a table.
    pub(super) fn learn(&mut self, id: TableId, table: &TableDesc) -> bool {
        let is_new = id.0 as usize == self.by_table.len();
        if is_new {
            let policy = &self.policies.of(&table.schema, &table.name).policy;
            // While its policy is changed, it is decided as where a script chooses.
            let is_changed = self.policies.change_of(&table.schema, &table.name).is_some();
            let ranked = (!policy.is_last_writer() && !is_changed).then(|| Arc::new(policy.clone()));
            self.by_table.push(ranked);
        }
        is_new
    }
}

/// A row as it is known.
struct Row {
    frontier: Frontier<()>,
    /// What it shows: `None` for something stable, or when a truncate has removed it.
    shown: Option<Entry>,
    expect: Expect,
    /// Was the version that is left out met before?
    is_met: bool,
    /// Has a transaction met it that was rolled back, and is to be decided anew ([`Resolver::set_stuck`])?
    is_pending: bool,
}

impl Resolver {
    /// The policies in force.
    pub(crate) fn policies(&self) -> &Policies {
        &self.ranked.policies
    }

    /// The policy of a row's table and the hash of all, for the log; while it is changed, the one that decided last.
    #[must_use]
    pub fn policy_in_words(&self, table: &TableDesc, key: &RowKey) -> (String, String) {
        let hash = match self.new_policies(table, key) {
            Some(next) => next.hash(),
            None => self.ranked.hash.clone(),
        };
        (self.policy_of(table, key).to_string(), hash)
    }

    /// The policies that are coming into force, if they have decided this row.
    fn new_policies(&self, table: &TableDesc, key: &RowKey) -> Option<&Policies> {
        let policies = &self.ranked.policies;
        policies.next().filter(|_| {
            policies.change_of(&table.schema, &table.name).is_some() && self.is_decided_by_new(key)
        })
    }

    /// The policy that decided a row last.
    fn policy_of(&self, table: &TableDesc, key: &RowKey) -> &TablePolicy {
        let policies = self.new_policies(table, key).unwrap_or(&self.ranked.policies);
        policies.of(&table.schema, &table.name)
    }

    /// Does the time of writes decide which of two versions of a row, or of its columns, stays? `of_delete`: one of them, and not both,
    /// is a delete. Not by the columns that were lost: which these are may not be known yet, and all nodes are to say the same.
    #[must_use]
    pub fn goes_by_time(&self, table: &TableDesc, key: &RowKey, of_delete: bool) -> bool {
        let policy = self.policy_of(table, key);
        let by_rule = of_delete && policy.policy.deletes != Deletes::ByStamp;
        let name = policy.name();
        let by_time = matches!(
            name,
            Name::LastUpdateWins | Name::FirstUpdateWins | Name::ColumnMerge
        );
        by_time && !by_rule
    }

    /// What becomes of a table's rows that lost their parents.
    #[must_use]
    pub fn foreign_keys(&self, table: &TableDesc) -> ForeignKeys {
        self.foreign_keys_of(&table.schema, &table.name)
    }

    /// The same, by the table's name.
    #[must_use]
    pub fn foreign_keys_of(&self, schema: &str, table: &str) -> ForeignKeys {
        self.ranked.policies.of(schema, table).foreign_keys
    }

    /// Does any table's policy bring parents back?
    #[must_use]
    pub fn restores_parents(&self) -> bool {
        let rules = self.ranked.policies.rules().iter();
        let mut policies = rules.map(|(_, policy)| policy.foreign_keys);
        policies.any(|policy| policy == ForeignKeys::RestoreParent)
    }

    /// Does the highest stamp decide which of a table's rows wins?
    #[must_use]
    pub fn is_last_update_wins(&mut self, table: &TableDesc) -> bool {
        let id = self.table_id(table);
        self.ranking(id).is_none() && self.merging(id).is_none()
    }

    /// Is the winner of a table's rows chosen among the whole frontier, so that a later write may lose to an earlier one?
    #[must_use]
    pub fn is_ranked(&self, table: TableId) -> bool {
        self.ranking(table).is_some()
    }

    /// The policy over the frontier of a table; `None` for last update wins.
    pub(super) fn ranking(&self, table: TableId) -> Option<Arc<Policy>> {
        self.ranked.by_table.get(table.0 as usize).cloned().flatten()
    }

    /// The row without what the transaction stamped as `except` wrote: its last write is its version.
    fn row(&self, key: &RowKey, except: Version) -> Result<Row, Error> {
        let truncate = self.index.truncate(key.table());
        let own = self.index.get(key)?;
        let alive = |version: &Version| truncate.is_none_or(|truncate| version.stamp >= truncate.stamp);
        let shown = own.filter(|entry| !self.is_truncate(key, entry) && alive(&entry.version));
        let contested = self.ranked.contested.get(key).map_or(&[][..], Vec::as_slice);
        let known = contested.iter().copied().filter(alive);
        let mut known: Vec<Version> = known.chain(shown.map(|entry| entry.version)).collect();
        let is_met = known.iter().any(|version| version.stamp == except.stamp);
        known.retain(|version| version.stamp != except.stamp);
        let is_pending = known
            .iter()
            .any(|version| self.ranked.stuck.contains(&version.stamp));
        let members = known.into_iter().map(|version| Member { version, value: () });
        let present = match (shown, own, truncate) {
            (Some(entry), ..) => Some(entry.version.kind == Kind::Put),
            (None, Some(_), _) | (None, None, Some(_)) => Some(false),
            (None, None, None) => None,
        };
        Ok(Row {
            frontier: Frontier::of(members),
            shown,
            expect: Expect {
                present,
                xid: shown.map_or(0, |entry| entry.xid),
            },
            is_met,
            is_pending,
        })
    }

    /// Which large transactions wait for DDL that cannot be run here: they were rolled back, and are decided anew while others go on. What
    /// they have put back, or were about to write, is in the index and not in the table.
    pub(crate) fn set_stuck(&mut self, stuck: Vec<Stamp>) {
        self.ranked.stuck = stuck;
    }

    /// Keeps the frontier; the row shows the version of `entry`.
    fn store(&mut self, key: &RowKey, frontier: &Frontier<()>, entry: Entry) -> Result<(), Error> {
        self.index.put(key.clone(), entry)?;
        let rest: Vec<Version> = frontier
            .members()
            .iter()
            .map(|member| member.version)
            .filter(|version| version.stamp != entry.version.stamp)
            .collect();
        if rest.is_empty() {
            self.ranked.contested.remove(key);
        } else {
            self.ranked.contested.insert(key.clone(), rest);
        }
        Ok(())
    }

    /// A remote version. See [`Self::remote`].
    pub(super) fn remote_ranked(
        &mut self,
        policy: &Policy,
        key: &RowKey,
        version: Version,
        deps: &Vector,
        xid: u32,
    ) -> Result<Decision, Error> {
        if let Some(winner) = self.truncate_over(key, &version, deps) {
            return Ok(Decision::Keep { winner });
        }
        let mut row = self.row(key, version)?;
        let shown = row.shown.map(|entry| entry.version.stamp);
        // An earlier try of this transaction has written nothing, and put nothing back: it was rolled back.
        let tried = row.shown.filter(|entry| row.is_met && entry.xid != xid);
        let unsure = tried.is_some_and(|entry| entry.over);
        let is_known = row.expect.present.is_some() || !row.frontier.members().is_empty();
        if tried.is_some_and(|entry| entry.version.stamp == version.stamp) {
            row.expect.present = None;
        }
        let outcome = row.frontier.meet(policy, shown, version, (), deps);
        let incoming_won = outcome.winner.stamp == version.stamp;
        // After a restart nobody knows whether the row shows what its entry says: the repair may not have been made.
        let trusted = row.shown.is_some_and(|entry| entry.xid != 0) && !unsure;
        let kept = !incoming_won && !outcome.changed && trusted;
        let winner = Entry {
            // For another write of this transaction, or another try of it; or of one that waits.
            over: row
                .shown
                .filter(|_| (row.is_met || kept && row.is_pending) && !outcome.changed)
                .map_or(!kept && is_known, |entry| entry.over),
            ..Entry::new(outcome.winner, if kept { row.expect.xid } else { xid })
        };
        self.store(key, &row.frontier, winner)?;
        Ok(if incoming_won {
            Decision::Apply {
                expect: row.expect,
                beaten: outcome.lost.and(row.shown),
                unsure,
            }
        } else if kept {
            Decision::Keep { winner }
        } else {
            Decision::Restore {
                winner,
                expect: row.expect,
            }
        })
    }

    /// What a truncate of the table left, where the version loses to it.
    pub(super) fn truncate_over(&self, key: &RowKey, version: &Version, deps: &Vector) -> Option<Entry> {
        let truncate = self.index.truncate(key.table())?;
        let loses = admit_row(Some(&truncate), version, deps) == AgainstTruncate::Loses;
        loses.then(|| of_truncate(truncate))
    }

    /// A local write that lost to a truncate. It may have come after that was applied; what the row must be is in the
    /// index.
    pub(super) fn found_truncated(
        &mut self,
        (table, key): (&Arc<TableDesc>, RowKey),
        local: Version,
        images: Images<'_>,
        txn: &LocalTxn,
        winner: Entry,
    ) -> Result<(), Error> {
        if self.index.get(&key)?.is_none() {
            self.index.put(key.clone(), winner)?;
        }
        let found = self.finding(table, key, local, images, txn, winner.version, false);
        self.push_found(Found {
            settle: true,
            ..found
        });
        Ok(())
    }

    /// A version of an earlier life that lost to a truncate. With `lsn`, at its echo: an own truncate was decoded without it, and
    /// it may have been decided before that and written behind it.
    pub(super) fn history_truncated(
        &mut self,
        (table, key): (&Arc<TableDesc>, RowKey),
        version: Version,
        winner: Version,
        lsn: Option<Lsn>,
    ) {
        let Some(lsn) = lsn else { return };
        if winner.origin() == self.node && version.kind == Kind::Put {
            self.push_found(Found {
                local_won: true,
                settle: true,
                log: true,
                ..Found::of_versions(lsn, table, key, winner, version)
            });
        }
    }

    /// A local write, decoded. See [`Self::local`].
    pub(super) fn local_ranked(
        &mut self,
        policy: &Policy,
        (table, key): (&Arc<TableDesc>, RowKey),
        local: Version,
        images: Images<'_>,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        if let Some(winner) = self.truncate_over(&key, &local, seen) {
            return self.found_truncated((table, key), local, images, txn, winner);
        }
        let mut row = self.row(&key, local)?;
        let node = self.node;
        let newer =
            |member: &Member<()>| member.version.origin() == node && member.version.stamp > local.stamp;
        if row.frontier.members().iter().any(newer) {
            // Decoded again after a restart.
            return Ok(());
        }
        let shown = row.shown.map(|entry| entry.version.stamp);
        let outcome = row.frontier.meet(policy, shown, local, (), seen);
        self.store(&key, &row.frontier, Entry::new(outcome.winner, txn.xid))?;
        let local_won = outcome.winner.stamp == local.stamp;
        let other = row
            .frontier
            .members()
            .iter()
            .find(|member| member.version.stamp != local.stamp);
        let (remote, log) = match (local_won, outcome.lost, other) {
            (false, ..) => (outcome.winner, true),
            (true, Some(lost), _) => (lost, true),
            (true, None, Some(other)) => (other.version, false),
            (true, None, None) if self.ranked.repairing.contains(&key) => (local, false),
            (true, None, None) => return Ok(()),
        };
        let found = self.finding(table, key, local, images, txn, remote, local_won);
        self.push_found(Found {
            settle: true,
            log,
            ..found
        });
        Ok(())
    }

    /// Is all that is known of a row settled? `current` is what the index says of it.
    pub(super) fn is_settled(&self, key: &RowKey, current: Version) -> bool {
        let contested = self.ranked.contested.get(key).into_iter().flatten();
        contested.chain([&current]).all(|it| it.covered_by(&self.settled))
            && self.is_merged_in(key, &self.settled)
    }

    /// Rows of a table of which anything unstable is known, also those that are gone with a truncate.
    pub(super) fn known_rows(&self, table: TableId) -> Result<HashSet<RowKey>, Error> {
        Ok(self.and_contested(table, self.index.keys_of(table)?))
    }

    /// Rows of a table, decided by the highest stamp alone, that should not be there. It holds no more of the table than these, but where a
    /// truncate is unstable.
    pub(super) fn absent_rows(&self, table: TableId) -> Result<HashSet<RowKey>, Error> {
        if self.index.truncate(table).is_some() {
            return self.known_rows(table);
        }
        let absent = self
            .index
            .entries_where(table, |_| true, |entry| !entry.is_there())?;
        Ok(absent.into_iter().map(|(key, _)| key).collect())
    }

    /// Those of which a truncate has more to say than that they are gone: what is below it and `seen` by it is hidden once it is in
    /// the index.
    pub(super) fn rows_to_cut(
        &self,
        table: TableId,
        truncate: TableVersion,
        seen: &Vector,
    ) -> Result<HashSet<RowKey>, Error> {
        let may_hold = has_unseen(truncate.stamp, seen);
        let entries = self.index.entries_where(table, may_hold, |entry| {
            entry.version.stamp >= truncate.stamp || !entry.version.covered_by(seen)
        })?;
        let keys = entries.into_iter().map(|(key, _)| key).collect();
        Ok(self.and_contested(table, keys))
    }

    /// Adds the rows of which more is known than their entries.
    fn and_contested(&self, table: TableId, mut keys: HashSet<RowKey>) -> HashSet<RowKey> {
        let contested = self.ranked.contested.keys();
        keys.extend(contested.filter(|key| key.table() == table).cloned());
        keys.extend(self.merged.keys_of(table).cloned());
        keys
    }

    /// A local truncate, decoded.
    pub(super) fn local_truncate_ranked(
        &mut self,
        policy: &Policy,
        table: &Arc<TableDesc>,
        id: TableId,
        txn: &LocalTxn,
        seen: &Vector,
    ) -> Result<(), Error> {
        let truncate = TableVersion {
            stamp: txn.stamp,
            position: txn.position,
        };
        let gone = of_truncate(truncate).version;
        let known = self.with_own(seen);
        let is_seen = |version: &Version| version.covered_by(&known);
        for key in self.rows_to_cut(id, truncate, &known)? {
            // Earlier writes of the same transaction are gone with the truncate, too.
            let mut row = self.row(&key, gone)?;
            let met = row.frontier.members().iter().map(|member| member.version);
            let concurrent: Vec<Version> = met.filter(|version| !is_seen(version)).collect();
            let shown = row.shown.map(|entry| entry.version.stamp);
            let after = row.frontier.truncate(policy, shown, &truncate, seen);
            match after.winner {
                Some(winner) => self.store(&key, &row.frontier, Entry::new(winner, 0))?,
                None => {
                    self.index.put(key.clone(), of_truncate(truncate))?;
                    self.ranked.contested.remove(&key);
                }
            }
            let Some(&first) = concurrent.first() else {
                continue;
            };
            let remote = after.lost.unwrap_or(first);
            let found = self.finding(table, key, gone, (None, None, None), txn, remote, true);
            self.push_found(Found {
                settle: true,
                log: after.lost.is_some(),
                ..found
            });
        }
        self.index.put_truncate(id, truncate);
        Ok(())
    }

    /// A remote truncate. See [`Self::remote_truncate`].
    pub(super) fn remote_truncate_ranked(
        &mut self,
        policy: &Policy,
        table: TableId,
        truncate: TableVersion,
        deps: &Vector,
    ) -> Result<Truncated, Error> {
        let mut out = Truncated::default();
        let gone = of_truncate(truncate);
        for key in self.rows_to_cut(table, truncate, deps)? {
            let mut row = self.row(&key, gone.version)?;
            let before = row.shown.filter(|entry| entry.version.stamp != truncate.stamp);
            let shown = before.map(|entry| entry.version.stamp);
            let after = row.frontier.truncate(policy, shown, &truncate, deps);
            if after.lost.is_some()
                && let Some(lost) = before
            {
                out.lost.push((key.clone(), lost));
            }
            let Some(winner) = after.winner else {
                self.index.put(key.clone(), gone)?;
                self.ranked.contested.remove(&key);
                continue;
            };
            // Where its own transaction has written the row before, that may have put this version back, and another try of it must do so, too.
            // So may one that waits have done, whose own version is not to be written before it runs.
            let is_doubted = row.is_met || row.is_pending && !self.ranked.stuck.contains(&winner.stamp);
            let trusted = before.is_some_and(|entry| entry.xid != 0) && !after.changed && !is_doubted;
            let xid = before.filter(|_| trusted).map_or(0, |entry| entry.xid);
            self.store(&key, &row.frontier, Entry::new(winner, xid))?;
            match (winner.kind, trusted) {
                (Kind::Put, true) => out.survivors.push(key),
                (Kind::Put, false) => out.restored.push((key, winner)),
                (Kind::Delete, _) => {}
            }
        }
        self.index.put_truncate(table, truncate);
        Ok(out)
    }

    /// A version that was applied or decoded before the daemon stopped. In an order that respects what covers
    /// what. With `lsn`, at its echo: its meeting with a local write may not have been put right.
    pub(super) fn history_ranked(
        &mut self,
        policy: &Policy,
        (table, key): (&Arc<TableDesc>, RowKey),
        version: Version,
        deps: &Vector,
        lsn: Option<Lsn>,
    ) -> Result<(), Error> {
        if let Some(winner) = self.truncate_over(&key, &version, deps) {
            self.history_truncated((table, key), version, winner.version, lsn);
            return Ok(());
        }
        let mut row = self.row(&key, version)?;
        let shown = row.shown.map(|entry| entry.version.stamp);
        let outcome = row.frontier.meet(policy, shown, version, (), deps);
        // A writer that is known here is an own commit that nobody sees yet ([`Self::rebuilt_by`]): what loses to its row leaves it so. At an echo
        // it may be any that was decoded, and what lost may have been written over it all the same.
        let is_left = |entry: &Entry| lsn.is_none() && entry.version.stamp == outcome.winner.stamp;
        let writer = row.shown.filter(is_left).map_or(0, |entry| entry.xid);
        self.store(&key, &row.frontier, Entry::new(outcome.winner, writer))?;
        let own = row
            .frontier
            .members()
            .iter()
            .map(|member| member.version)
            .find(|other| other.origin() == self.node && other.stamp != version.stamp);
        let (Some(lsn), Some(local)) = (lsn, own) else {
            return Ok(());
        };
        let lost = |version: Version| outcome.lost.is_some_and(|lost| lost.stamp == version.stamp);
        self.push_found(Found {
            local_won: outcome.winner.stamp != version.stamp,
            settle: true,
            log: lost(local) || lost(version) && outcome.winner.stamp == local.stamp,
            ..Found::of_versions(lsn, table, key, local, version)
        });
        Ok(())
    }

    /// Rows that are not there, or cannot be found, are being put right from what is known now: local writes of them that are decoded until
    /// [`Self::repaired`] are findings, whatever they have seen, since they may have met the repair.
    pub fn begin_repair(&mut self, keys: impl IntoIterator<Item = RowKey>) {
        self.ranked.repairing.extend(keys);
    }

    /// Is any row being put right?
    #[must_use]
    pub fn is_repairing(&self) -> bool {
        !self.ranked.repairing.is_empty()
    }

    /// Everything that was committed before the repair ended is decoded.
    pub fn repaired(&mut self) {
        self.ranked.repairing.clear();
    }

    /// Has its frontier other versions than the one that it shows?
    pub(super) fn is_contested(&self, key: &RowKey) -> bool {
        self.ranked.contested.contains_key(key)
    }

    /// Drops contested versions that are stable: everything still to come covers them.
    pub(super) fn forget_contested(&mut self, stable: &Vector) {
        // A walk costs what it visits: seldom when that is much.
        self.ranked.idle_sweeps += 1;
        if self.ranked.contested.len() > 10_000 && self.ranked.idle_sweeps < 40 {
            return;
        }
        self.ranked.idle_sweeps = 0;
        self.ranked.contested.retain(|_, versions| {
            versions.retain(|version| !version.covered_by(stable));
            !versions.is_empty()
        });
    }

    /// Is any version known that is in `held` and not in `stable`? Then a conflict may be decided elsewhere that
    /// is not decided here, or the reverse.
    #[must_use]
    pub fn has_unstable(&self, stable: &Vector, held: &Vector) -> bool {
        let contested = |version: &Version| !version.covered_by(stable) && version.covered_by(held);
        self.index.has_unstable(stable, held)
            || self.has_unstable_merged(stable, held)
            || self.ranked.contested.values().flatten().any(contested)
    }
}
