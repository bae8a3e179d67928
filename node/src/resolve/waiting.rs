//! Rows in quarantine, as far as deciding goes: which key waits with which version, and which of them were overtaken.
//!
//! In:   rows that are put there, local writes and truncates that come over them      Out: keys to be let go of
//! Holds: a stamp for each row in quarantine, at the start its version; keys that were overtaken and are in the table still; keys that
//!        were put there by what was rolled back, since commits held the rows, as long as these are not visible
//! Invariants: 1. as long as a row that was overtaken is in the table, or may be, nothing is forgotten: that it was overtaken is known by
//!        the index alone, and after a restart by the journal that this is built from; 2. what an apply transaction put there counts from
//!        the moment it is sent, so that what is decoded from then on overtakes it, and is taken back with the transaction
//! On crash: read from the table, and compared with the index, before anything is forgotten
//! Not here: the table, trying rows again (`crate::apply`)

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anabranch_conflict::Version;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{Position, Stamp, Vector};

use super::{Error, Resolver};
use crate::index::{Entry, RowKey, TableId};

/// A row in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quarantined {
    /// The version that waits.
    pub stamp: Stamp,
    /// The last own transaction that has to be visible before it makes sense to write the row again.
    pub after: Position,
}

/// Keys with the tables that they are of.
type Keys = Vec<(Arc<TableDesc>, RowKey)>;

/// What an open apply transaction has put into quarantine.
struct PutAside {
    key: RowKey,
    row: Quarantined,
    /// What waited of the row before.
    before: Option<Quarantined>,
    /// The row was overtaken before: what is put there now is not.
    overtaken: Keys,
}

#[derive(Default)]
pub(super) struct Waiting {
    pub(super) rows: HashMap<RowKey, Quarantined>,
    overtaken: Keys,
    /// Keys that were overtaken are being let go of.
    is_releasing: bool,
    put_aside: Vec<PutAside>,
    held_before: HashMap<RowKey, Position>,
    /// Rows of an earlier life are not compared with the index yet.
    unjudged: bool,
    /// As long as they are not: the version that waits of each, and whether the journal still has it.
    loaded: HashMap<RowKey, (Version, bool)>,
}

impl Resolver {
    /// Keys whose rows are in quarantine.
    pub const fn quarantined(&mut self) -> &mut HashMap<RowKey, Quarantined> {
        &mut self.waiting.rows
    }

    /// A row of an earlier life is in quarantine. Until [`Self::quarantine_judged`] nothing is forgotten. To be called before the journal
    /// is read.
    pub(crate) fn load_quarantined(&mut self, key: RowKey, version: Version) {
        // Until it is known what held it.
        let (stamp, after) = (version.stamp, Position::ZERO);
        self.waiting
            .rows
            .insert(key.clone(), Quarantined { stamp, after });
        self.waiting.loaded.insert(key, (version, false));
        self.waiting.unjudged = true;
    }

    /// Meets a version of an earlier life: one that has seen what waits of its row has overtaken that.
    pub(super) fn meet_loaded(
        &mut self,
        table: &Arc<TableDesc>,
        key: &RowKey,
        version: Version,
        deps: &Vector,
    ) {
        let Some((waits, is_met)) = self.waiting.loaded.get_mut(key) else {
            return;
        };
        if version.stamp == waits.stamp {
            *is_met = true;
        } else if waits.covered_by(deps) {
            self.overtake(table, key);
        }
    }

    /// Once the journal is read: where all that is known of a row is settled, what waits of it is its version, unless it was overtaken. The
    /// index may name another one: the journal has let go of what waits, and not of what that had won over, or it is forgotten what was
    /// chosen among them. `is_closed`: another policy has decided all of it, so that the index does not say what had won.
    ///
    /// # Errors
    /// When the index cannot be used.
    pub(crate) fn restore_loaded(&mut self, is_closed: bool) -> Result<(), Error> {
        let loaded = std::mem::take(&mut self.waiting.loaded);
        for (key, (version, is_met)) in &loaded {
            let waits = self.waits_with(key, *version) && version.covered_by(&self.settled);
            let truncate = self.index.truncate(key.table());
            if !waits || truncate.is_some_and(|truncate| truncate.stamp >= version.stamp) {
                continue;
            }
            let Some(current) = self.current(key)?.map(|current| current.version) else {
                continue;
            };
            let is_chosen = self.chooses(key.table());
            let is_told = if is_closed {
                false
            } else if is_chosen {
                !self.versions(key).is_empty()
            } else {
                *is_met || current.stamp > version.stamp && self.ranking(key.table()).is_none()
            };
            if !is_told && current.stamp != version.stamp && current.covered_by(&self.settled) {
                self.index.put(key.clone(), Entry::new(*version, 0))?;
            }
        }
        self.waiting.loaded = loaded;
        Ok(())
    }

    /// Are rows of an earlier life still to be compared with the index?
    pub(crate) const fn is_quarantine_unjudged(&self) -> bool {
        self.waiting.unjudged
    }

    /// All rows of an earlier life were compared with the index: those that are not their rows' winners are overtaken.
    pub(crate) fn quarantine_judged(&mut self) {
        self.waiting.unjudged = false;
        self.waiting.loaded = HashMap::new();
    }

    /// A row is about to be put into quarantine, by an apply transaction whose end is to be told to [`Self::put_aside_ended`]. What was
    /// overtaken of the same key before is so no more; but where a later version is known already, which was decoded before this was
    /// refused, that has overtaken it.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn quarantine(
        &mut self,
        table: &Arc<TableDesc>,
        key: &RowKey,
        row: Quarantined,
    ) -> Result<(), Error> {
        // Where all versions count, one with a higher stamp says nothing.
        let current = self.current(key)?.filter(|_| self.is_by_stamp(key.table()));
        let is_late = current.is_some_and(|current| current.version.stamp > row.stamp);
        let waiting = &mut self.waiting;
        let of_key = |of: &mut (Arc<TableDesc>, RowKey)| of.1 == *key;
        let overtaken = waiting.overtaken.extract_if(.., of_key).collect();
        waiting.put_aside.push(PutAside {
            key: key.clone(),
            row,
            before: waiting.rows.insert(key.clone(), row),
            overtaken,
        });
        if is_late {
            self.overtake(table, key);
        }
        Ok(())
    }

    /// The apply transaction ended. Where it was rolled back, what waited before waits still, and what was overtaken is so still.
    pub(crate) fn put_aside_ended(&mut self, is_committed: bool) {
        let waiting = &mut self.waiting;
        let mut put_aside = std::mem::take(&mut waiting.put_aside);
        if is_committed {
            return;
        }
        while let Some(put) = put_aside.pop() {
            // One that is not there was overtaken meanwhile.
            if waiting
                .rows
                .get(&put.key)
                .is_some_and(|row| row.stamp == put.row.stamp)
            {
                match put.before {
                    Some(before) => waiting.rows.insert(put.key.clone(), before),
                    None => waiting.rows.remove(&put.key),
                };
            }
            waiting.overtaken.extend(put.overtaken);
            if put.row.after > Position::ZERO {
                waiting.held_before.insert(put.key, put.row.after);
            }
        }
    }

    /// Forgets which rows were held before by commits that are visible by now; `is_visible`: up to some own transaction.
    pub(crate) fn forget_held_before(&mut self, is_visible: impl Fn(Position) -> bool) {
        self.waiting.held_before.retain(|_, after| !is_visible(*after));
    }

    /// Is a row held by own commits that are not visible yet, so that its deletion waits in quarantine, or did in a try that was rolled
    /// back? Another try of a large transaction is decided anew, and the index names the first one as the row's writer: nothing else says so.
    pub(crate) fn is_held(&self, key: &RowKey, is_visible: impl Fn(Position) -> bool) -> bool {
        let waits = self.waiting.rows.get(key).map(|row| row.after);
        let before = self.waiting.held_before.get(key).copied();
        let mut held = [waits, before].into_iter().flatten();
        held.any(|after| after > Position::ZERO && !is_visible(after))
    }

    /// Rows of these tables, (schema, name), are in quarantine no more: who keeps them there has let go of them.
    pub(crate) fn forget_quarantined<'a>(&mut self, tables: impl Iterator<Item = (&'a str, &'a str)>) {
        if self.waiting.rows.is_empty() {
            return;
        }
        let gone: HashSet<TableId> = tables
            .filter_map(|(schema, name)| self.ids.known(schema, name))
            .collect();
        self.waiting.rows.retain(|key, _| !gone.contains(&key.table()));
    }

    /// Does this version of a row wait in quarantine?
    pub(super) fn waits_with(&self, key: &RowKey, version: Version) -> bool {
        let waits = self.waiting.rows.get(key);
        waits.is_some_and(|waits| waits.stamp == version.stamp)
    }

    /// Is a row of this version, which waits in quarantine, still to be written? `put`: it is to be there. Where one version is chosen of
    /// several the index names another one until it is chosen again, as after a start: what waits is made anew when it is tried.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(crate) fn is_still_due(&self, key: &RowKey, stamp: Stamp, put: bool) -> Result<bool, Error> {
        let mut known = self.versions(key).iter();
        let may_be_chosen = self.chooses(key.table()) && known.any(|version| version.stamp == stamp);
        Ok(may_be_chosen || self.is_winner(key, stamp, put)?)
    }

    /// What waits of a row in quarantine is not to be written any more.
    pub(crate) fn overtake(&mut self, table: &Arc<TableDesc>, key: &RowKey) {
        if !self.waiting.rows.is_empty() && self.waiting.rows.remove(key).is_some() {
            self.waiting.overtaken.push((Arc::clone(table), key.clone()));
        }
    }

    /// Rows of a table in quarantine that a truncate of this stamp removes, what its own transaction wrote before it among them:
    /// once it is forgotten, nothing else says that they are not to be written any more.
    #[must_use]
    pub fn quarantined_below(&self, table: TableId, truncate: Stamp) -> Vec<RowKey> {
        let below = self.waiting.rows.iter();
        let below = below.filter(|(key, row)| key.table() == table && row.stamp <= truncate);
        below.map(|(key, _)| key.clone()).collect()
    }

    /// Takes the keys that were overtaken since the last call. They count as overtaken until [`Self::released`].
    pub fn take_overtaken(&mut self) -> Vec<(Arc<TableDesc>, RowKey)> {
        let overtaken = std::mem::take(&mut self.waiting.overtaken);
        self.waiting.is_releasing |= !overtaken.is_empty();
        overtaken
    }

    /// The keys taken last are in quarantine no more, durably.
    pub fn released(&mut self) {
        self.waiting.is_releasing = false;
    }

    /// Is a row overtaken, or may it be, whose place in the table is not given up yet? What has overtaken it must be known as long.
    #[must_use]
    pub fn is_release_due(&self) -> bool {
        let waiting = &self.waiting;
        let is_put_over = waiting.put_aside.iter().any(|put| !put.overtaken.is_empty());
        waiting.unjudged || waiting.is_releasing || is_put_over || !waiting.overtaken.is_empty()
    }
}
