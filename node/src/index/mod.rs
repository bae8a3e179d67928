//! The row index: which version each recently written row holds.
//!
//! In:   versions as they win (resolve)            Out: the current version of a row
//! Holds: one entry per row written above the stable point, and per table the latest unstable truncate;
//!        in memory up to a budget, older entries in sled
//! Invariants: 1. an entry is forgotten only when its version is stable, and not before a truncate that it stands above: the row would
//!        count as gone with that; 2. the newest entry of a row hides
//!        older ones, wherever they are; 3. a truncate hides what is below it for as long as that is held anywhere, also once it is
//!        stable itself: nothing of its table is written anew for it
//! On crash: gone, and rebuilt from the journal ([`crate::capture::rebuild`]); the sled folder is emptied at start
//! Not here: who wins (`anabranch-conflict`), reading the journal

mod cold;
mod filter;
mod key;

use std::collections::HashSet;
use std::path::Path;

use anabranch_conflict::{Kind, TableVersion, Version};
use anabranch_proto::schema::TableDesc;
use anabranch_proto::stamp::NTP64;
use anabranch_proto::{Lsn, NodeId, Position, Stamp, Vector};
use hashbrown::HashMap;

pub use cold::{Error, Summary};
pub use key::{RowKey, TableId};

use crate::broken::{self, Rule};
use cold::Cold;

/// A row's current version, and who wrote it physically.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The version. For a local write met while its transaction is still being decoded the position is just
    /// past the start of its commit record: after every earlier commit, and not after its own end, so
    /// coverage reads the same.
    pub version: Version,
    /// The transaction id (32 bits) that the row's `xmin` should show, 0 if unknown.
    pub xid: u32,
    /// Another row has one of its unique values ([`anabranch_conflict::claims`]): it is in the log, and not in the table.
    pub parked: bool,
    /// It was met when something was known of the row already: what it does to the row, INSERT or UPDATE, does not say whether
    /// there was one here.
    pub over: bool,
}

impl Entry {
    /// A version written by `xid`, which nobody has taken a value from.
    #[must_use]
    pub const fn new(version: Version, xid: u32) -> Self {
        Self {
            version,
            xid,
            parked: false,
            over: false,
        }
    }

    /// What a truncate leaves of a row that it removes.
    #[must_use]
    pub const fn of_truncate(truncate: TableVersion) -> Self {
        let version = Version {
            stamp: truncate.stamp,
            position: truncate.position,
            kind: Kind::Delete,
        };
        Self::new(version, 0)
    }

    /// Should the table have a row?
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.version.kind == Kind::Put && !self.parked
    }
}

/// An entry in 24 bytes.
#[derive(Clone, Copy)]
struct Packed {
    time: u64,
    lsn: u64,
    xid: u32,
    node: u16,
    /// Timeline in the upper 13 bits, then 1 for what came over something known, 1 for a parked row, 1 for a delete in the lowest.
    epoch_kind: u16,
}

impl Packed {
    fn new(entry: &Entry) -> Self {
        let Version {
            stamp,
            position,
            kind,
        } = entry.version;
        let epoch = u16::try_from(position.epoch & 0x1FFF).unwrap_or(0);
        Self {
            time: stamp.time.as_u64(),
            lsn: position.lsn.0,
            xid: entry.xid,
            node: stamp.node.0,
            epoch_kind: epoch << 3
                | u16::from(entry.over) << 2
                | u16::from(entry.parked) << 1
                | u16::from(kind == Kind::Delete),
        }
    }

    fn entry(self) -> Entry {
        let kind = if self.epoch_kind & 1 == 1 {
            Kind::Delete
        } else {
            Kind::Put
        };
        Entry {
            version: Version {
                stamp: Stamp {
                    time: NTP64(self.time),
                    node: NodeId(self.node),
                },
                position: Position {
                    epoch: u32::from(self.epoch_kind >> 3),
                    lsn: Lsn(self.lsn),
                },
                kind,
            },
            xid: self.xid,
            parked: self.epoch_kind & 2 == 2,
            over: self.epoch_kind & 4 == 4,
        }
    }

    fn to_bytes(self) -> [u8; 24] {
        let mut out = [0; 24];
        let parts: [&[u8]; 5] = [
            &self.time.to_be_bytes(),
            &self.lsn.to_be_bytes(),
            &self.xid.to_be_bytes(),
            &self.node.to_be_bytes(),
            &self.epoch_kind.to_be_bytes(),
        ];
        for (slot, byte) in out.iter_mut().zip(parts.into_iter().flatten()) {
            *slot = *byte;
        }
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut from = anabranch_proto::wire::Reader::new(bytes);
        Some(Self {
            time: from.u64().ok()?,
            lsn: from.u64().ok()?,
            xid: from.u32().ok()?,
            node: from.u16().ok()?,
            epoch_kind: from.u16().ok()?,
        })
    }
}

/// Keyed by short byte strings that whoever writes to the database chooses, so seeded per process.
type Map = HashMap<RowKey, Packed, seeded::Build>;

/// xxh3 with a random seed; one write a key (see `Hash for RowKey`).
mod seeded {
    use std::hash::{BuildHasher, Hasher};

    #[derive(Clone)]
    pub(super) struct Build(u64);

    impl Default for Build {
        fn default() -> Self {
            Self(rand::random())
        }
    }

    impl BuildHasher for Build {
        type Hasher = One;

        fn build_hasher(&self) -> One {
            One(self.0)
        }
    }

    pub(super) struct One(u64);

    impl Hasher for One {
        fn write(&mut self, bytes: &[u8]) {
            self.0 = xxhash_rust::xxh3::xxh3_64_with_seed(bytes, self.0);
        }

        fn finish(&self) -> u64 {
            self.0
        }
    }
}

/// Tables that one kind of transaction writes in turn are mostly no more than this.
const RECENT: usize = 8;

/// Numbers for tables, by name. A number lives as long as the process.
#[derive(Debug, Default)]
pub struct TableIds {
    /// Schema, name and number of those looked up last: mostly the next row is of one of them, and to compare names costs less than to
    /// hash them.
    recent: Vec<(String, String, TableId)>,
    /// The place of the next one among them.
    next: usize,
    /// By schema, then name: a look-up allocates nothing.
    ids: HashMap<String, HashMap<String, TableId>>,
    count: u32,
}

impl TableIds {
    /// The table's number.
    pub fn id(&mut self, table: &TableDesc) -> TableId {
        let mut recent = self.recent.iter();
        let known = recent.find(|(schema, name, _)| *name == table.name && *schema == table.schema);
        if let Some((_, _, id)) = known {
            return *id;
        }
        let id = self.look_up(table);
        match self.recent.get_mut(self.next) {
            // Many tables that take turns allocate nothing.
            Some(oldest) => {
                oldest.0.clone_from(&table.schema);
                oldest.1.clone_from(&table.name);
                oldest.2 = id;
            }
            None => self.recent.push((table.schema.clone(), table.name.clone(), id)),
        }
        self.next = (self.next + 1) % RECENT;
        id
    }

    fn look_up(&mut self, table: &TableDesc) -> TableId {
        if let Some(id) = self.known(&table.schema, &table.name) {
            return id;
        }
        let id = TableId(self.count);
        self.count = self.count.saturating_add(1);
        let names = self.ids.entry(table.schema.clone()).or_default();
        names.insert(table.name.clone(), id);
        id
    }

    /// The number of a table that has been met.
    #[must_use]
    pub fn known(&self, schema: &str, name: &str) -> Option<TableId> {
        self.ids.get(schema)?.get(name).copied()
    }
}

/// The index of one node.
pub struct RowIndex {
    hot: Map,
    heap_bytes: usize,
    budget_bytes: usize,
    cold: Cold,
    truncates: HashMap<TableId, TableVersion>,
    /// By table: entries below this stamp are gone with a truncate, though they are still held.
    gone_below: HashMap<TableId, Stamp>,
    swept_len: usize,
    idle_sweeps: u32,
}

/// Bytes of one slot of the map, its control byte included.
const SLOT: usize = size_of::<(RowKey, Packed)>() + 1;

/// What the index holds, for status.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Stats {
    /// Entries in memory.
    pub entries: usize,
    /// Their memory, bytes.
    pub bytes: usize,
    /// Entries that overflowed to disk.
    pub overflowed: usize,
}

impl RowIndex {
    /// An empty index that overflows to the folder `dir` (emptied now) past `budget_bytes` of memory.
    ///
    /// # Errors
    /// When the folder cannot be emptied.
    pub fn new(dir: &Path, budget_bytes: usize) -> Result<Self, Error> {
        Ok(Self {
            hot: Map::default(),
            heap_bytes: 0,
            budget_bytes,
            cold: Cold::new(dir)?,
            truncates: HashMap::new(),
            gone_below: HashMap::new(),
            swept_len: 0,
            idle_sweeps: 0,
        })
    }

    /// Where it overflows to.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.cold.folder()
    }

    /// The row's current version, if it was written above the stable point.
    ///
    /// # Errors
    /// When the overflow cannot be read.
    pub fn get(&self, key: &RowKey) -> Result<Option<Entry>, Error> {
        let held = match self.hot.get(key) {
            Some(packed) => Some(packed.entry()),
            None => self.cold.get(key)?.map(Packed::entry),
        };
        Ok(match held {
            Some(entry) if self.is_gone(key.table(), &entry) => {
                self.truncate(key.table()).map(Entry::of_truncate)
            }
            held => held,
        })
    }

    /// Is what is held gone with a truncate?
    fn is_gone(&self, table: TableId, entry: &Entry) -> bool {
        let below = self.gone_below.get(&table);
        below.is_some_and(|below| entry.version.stamp < *below)
    }

    /// Makes `entry` the row's current version.
    ///
    /// # Errors
    /// When the overflow cannot be written.
    pub fn put(&mut self, key: RowKey, entry: Entry) -> Result<(), Error> {
        if broken::is(Rule::Tombstone) && entry.version.kind == Kind::Delete {
            self.hot.remove(&key);
            return Ok(());
        }
        let full = self.hot.len() == self.hot.capacity();
        if (full || self.bytes() > self.budget_bytes) && !self.hot.contains_key(&key) {
            // Before the map doubles, not after: old and new would be in memory together.
            let next = if full { self.slots_bytes() * 2 } else { 0 };
            if next.max(self.slots_bytes()) + self.heap_bytes > self.budget_bytes && !self.hot.is_empty() {
                let hot = std::mem::take(&mut self.hot);
                self.heap_bytes = 0;
                self.swept_len = 0;
                self.cold.spill(hot.into_iter())?;
            }
        }
        let heap_len = key.heap_len();
        if self.hot.insert(key, Packed::new(&entry)).is_none() {
            self.heap_bytes += heap_len;
        }
        Ok(())
    }

    /// The latest unstable truncate of a table.
    #[must_use]
    pub fn truncate(&self, table: TableId) -> Option<TableVersion> {
        self.truncates.get(&table).copied()
    }

    /// Keeps a truncate of a table, if it is the latest. Entries below it are gone.
    pub fn put_truncate(&mut self, table: TableId, truncate: TableVersion) {
        let latest = anabranch_conflict::table::latest(self.truncate(table), truncate);
        self.truncates.insert(table, latest);
        let below = self.gone_below.entry(table).or_insert(latest.stamp);
        *below = latest.stamp.max(*below);
    }

    /// The entries of a table that are `wanted`, newest per row, without those that are gone with a truncate. It walks what is in
    /// memory of all tables, and on disk what is of this one, but for generations that `may_hold` says hold no row that is wanted; and
    /// it holds no more of it than what is wanted.
    ///
    /// # Errors
    /// When the overflow cannot be read.
    pub fn entries_where(
        &self,
        table: TableId,
        may_hold: impl Fn(&Summary) -> bool,
        wanted: impl Fn(&Entry) -> bool,
    ) -> Result<Vec<(RowKey, Entry)>, Error> {
        let gone_below = self.gone_below.get(&table).copied().unwrap_or(Stamp::ZERO);
        let may_hold = |summary: &Summary| summary.newest >= gone_below && may_hold(summary);
        let wanted = |entry: &Entry| !self.is_gone(table, entry) && wanted(entry);
        let mut found: HashMap<RowKey, Entry> = HashMap::new();
        // Older ones first.
        let is_partial = self.cold.each_of(table, may_hold, |key, packed| {
            let entry = packed.entry();
            if wanted(&entry) {
                found.insert(key, entry);
            } else {
                found.remove(&key);
            }
        })?;
        if is_partial {
            // A newer entry of the row may be in a generation that was left out.
            let mut newest = HashMap::new();
            for (key, entry) in found {
                if self.cold.get(&key)?.map(Packed::entry) == Some(entry) {
                    newest.insert(key, entry);
                }
            }
            found = newest;
        }
        for (key, packed) in self.hot.iter().filter(|(key, _)| key.table() == table) {
            let entry = packed.entry();
            if wanted(&entry) {
                found.insert(key.clone(), entry);
            } else {
                found.remove(key);
            }
        }
        Ok(found.into_iter().collect())
    }

    /// The keys of a table that are held, also of what is gone with a truncate. It walks all that is held of the table.
    ///
    /// # Errors
    /// When the overflow cannot be read.
    pub fn keys_of(&self, table: TableId) -> Result<HashSet<RowKey>, Error> {
        let hot = self.hot.keys().filter(|key| key.table() == table);
        let mut keys: HashSet<RowKey> = hot.cloned().collect();
        let all = |_: &Summary| true;
        self.cold.each_of(table, all, |key, _| {
            keys.insert(key);
        })?;
        Ok(keys)
    }

    /// Forgets what is stable and whose writing transaction is below the `horizon` xid, now and then: call it
    /// often.
    ///
    /// # Errors
    /// When the overflow cannot be written.
    pub fn forget_stable(&mut self, stable: &Vector, horizon: Option<u32>) -> Result<(), Error> {
        self.truncates
            .retain(|_, truncate| !stable.covers(truncate.origin(), truncate.position));
        let truncates = &self.truncates;
        let truncated = |table: TableId| truncates.get(&table).map(|truncate| truncate.stamp);
        self.cold.forget_stable(stable, truncated)?;
        if self.cold.len() > 0 {
            // An entry that went would uncover an older one of its row.
            return Ok(());
        }
        // A walk costs what it visits, so wait until half of what it would visit is new.
        let small = self.hot.len() < 1_000;
        if self.hot.is_empty() || (!small && self.hot.len() < self.swept_len * 2 && self.idle_sweeps < 50) {
            self.idle_sweeps += 1;
            return Ok(());
        }
        self.idle_sweeps = 0;
        let below =
            |xid: u32| xid == 0 || horizon.is_some_and(|horizon| xid.wrapping_sub(horizon) >= 1 << 31);
        let mut freed = 0;
        let gone_below = &self.gone_below;
        self.hot.retain(|key, packed| {
            let version = packed.entry().version;
            let is_gone = gone_below
                .get(&key.table())
                .is_some_and(|below| version.stamp < *below);
            let is_stable = stable.covers(version.origin(), version.position);
            let is_above = || truncated(key.table()).is_some_and(|at| version.stamp > at);
            let keep = !is_gone && (!is_stable || !below(packed.xid) || is_above());
            if !keep {
                freed += key.heap_len();
            }
            keep
        });
        self.heap_bytes -= freed.min(self.heap_bytes);
        // Nothing is held below those that are stable any more.
        self.gone_below.retain(|table, _| truncates.contains_key(table));
        if self.hot.capacity() > 4_096 && self.hot.len() * 4 < self.hot.capacity() {
            self.hot.shrink_to(self.hot.len() * 2);
        }
        self.swept_len = self.hot.len();
        Ok(())
    }

    /// Is any version held, or any truncate, that is in `held` and not in `stable`? Those on disk count by their
    /// generations.
    #[must_use]
    pub fn has_unstable(&self, stable: &Vector, held: &Vector) -> bool {
        let unstable = |packed: &Packed| {
            let version = packed.entry().version;
            !version.covered_by(stable) && version.covered_by(held)
        };
        self.hot.values().any(unstable)
            || self.cold.has_unstable(stable)
            || self
                .truncates
                .values()
                .any(|truncate| !truncate.covered_by(stable) && truncate.covered_by(held))
    }

    /// What is held.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            entries: self.hot.len(),
            bytes: self.bytes(),
            overflowed: self.cold.len(),
        }
    }

    fn bytes(&self) -> usize {
        self.slots_bytes() + self.heap_bytes
    }

    fn slots_bytes(&self) -> usize {
        // hashbrown keeps 8/7 of its capacity in slots, rounded to a power of two.
        (self.hot.capacity() * 8 / 7).next_power_of_two() * SLOT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(time: u64, kind: Kind) -> Entry {
        Entry {
            version: Version {
                stamp: Stamp {
                    time: NTP64(time),
                    node: NodeId(2),
                },
                position: Position::new(3, time),
                kind,
            },
            xid: 77,
            parked: false,
            over: false,
        }
    }

    fn key(table: u32, at: u32) -> RowKey {
        RowKey::from_canonical(TableId(table), &at.to_be_bytes())
    }

    #[test]
    fn a_table_keeps_its_number_however_many_take_turns() {
        let table = |schema: &str, at: usize| TableDesc {
            schema: schema.to_owned(),
            name: format!("t{at}"),
            columns: Vec::new(),
            key: Vec::new(),
            identity_full: false,
        };
        let mut ids = TableIds::default();
        for count in [1, RECENT / 2, 2 * RECENT + 1] {
            for at in (0..count).chain(0..count) {
                let number = u32::try_from(2 * at).unwrap();
                assert_eq!(ids.id(&table("a", at)), TableId(number));
                assert_eq!(ids.id(&table("b", at)), TableId(number + 1));
            }
        }
        assert!(ids.recent.len() <= RECENT);
        assert_eq!(ids.known("b", "t0"), Some(TableId(1)));
    }

    #[test]
    fn an_entry_survives_packing() {
        for kind in [Kind::Put, Kind::Delete] {
            for (parked, over) in [(false, false), (true, false), (false, true)] {
                let entry = Entry {
                    parked,
                    over,
                    ..entry(9, kind)
                };
                assert_eq!(Packed::new(&entry).entry(), entry);
                assert_eq!(
                    Packed::from_bytes(&Packed::new(&entry).to_bytes())
                        .unwrap()
                        .entry(),
                    entry
                );
            }
        }
    }

    #[test]
    fn entries_overflow_to_disk_and_newer_ones_hide_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(dir.path(), 64 * 1024).unwrap();
        for at in 0..10_000 {
            index
                .put(key(1, at), entry(u64::from(at) + 1, Kind::Put))
                .unwrap();
        }
        assert!(index.stats().overflowed > 5_000, "{:?}", index.stats());
        index.put(key(1, 5), entry(50_000, Kind::Delete)).unwrap();
        assert_eq!(index.get(&key(1, 5)).unwrap(), Some(entry(50_000, Kind::Delete)));
        assert_eq!(index.get(&key(1, 6)).unwrap(), Some(entry(7, Kind::Put)));
        assert_eq!(index.get(&key(2, 6)).unwrap(), None);
        assert_eq!(
            index.entries_where(TableId(1), |_| true, |_| true).unwrap().len(),
            10_000
        );
        let stable = [(NodeId(2), Position::new(3, 49_999))].into_iter().collect();
        index.forget_stable(&stable, Some(78)).unwrap();
        assert_eq!(index.stats().overflowed, 0);
        assert_eq!(
            index.entries_where(TableId(1), |_| true, |_| true).unwrap(),
            vec![(key(1, 5), entry(50_000, Kind::Delete))]
        );
    }

    #[test]
    fn forgetting_never_uncovers_an_older_entry_of_a_row() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(dir.path(), 64 * 1024).unwrap();
        // Not stable for long: another origin's, high above the rest.
        index.put(key(1, 0), entry(90_000, Kind::Put)).unwrap();
        for at in 0..3_000 {
            index
                .put(key(1, at + 1), entry(u64::from(at) + 1, Kind::Put))
                .unwrap();
        }
        assert!(index.stats().overflowed > 0, "{:?}", index.stats());
        index.put(key(1, 1), entry(50_000, Kind::Delete)).unwrap();
        let stable = [(NodeId(2), Position::new(3, 60_000))].into_iter().collect();
        for _ in 0..60 {
            index.forget_stable(&stable, Some(78)).unwrap();
        }
        assert_ne!(index.get(&key(1, 1)).unwrap(), Some(entry(1, Kind::Put)));
    }

    #[test]
    fn an_overflow_of_two_million_entries_stays_small_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(&dir.path().join("index"), 96 << 20).unwrap();
        for at in 0..2_000_000 {
            index
                .put(key(1, at), entry(u64::from(at) + 1, Kind::Put))
                .unwrap();
        }
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        let peak_kib: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(peak_kib < 512 << 10, "{peak_kib} KiB");
        assert!(index.stats().overflowed > 1_000_000, "{:?}", index.stats());
        assert_eq!(index.get(&key(1, 7)).unwrap(), Some(entry(8, Kind::Put)));
    }

    #[test]
    fn a_truncate_hides_what_is_below_it_for_as_long_as_that_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(dir.path(), 64 * 1024).unwrap();
        // Never stable, so that what overflows with it, and after it, stays.
        let mut other = entry(90_000, Kind::Put);
        other.version.stamp.node = NodeId(3);
        index.put(key(2, 0), other).unwrap();
        for at in 0..3_000 {
            index
                .put(key(1, at), entry(u64::from(at) + 1, Kind::Put))
                .unwrap();
        }
        assert!(index.stats().overflowed > 0, "{:?}", index.stats());
        let at = entry(4_000, Kind::Delete).version;
        let truncate = TableVersion {
            stamp: at.stamp,
            position: at.position,
        };
        index.put_truncate(TableId(1), truncate);
        index.put(key(1, 7), entry(5_000, Kind::Put)).unwrap();
        let held = index.stats();
        assert_eq!(index.get(&key(1, 1)).unwrap(), Some(Entry::of_truncate(truncate)));
        assert_eq!(index.get(&key(1, 9_999)).unwrap(), None);
        assert_eq!(index.get(&key(2, 0)).unwrap(), Some(other));
        let left = index.entries_where(TableId(1), |_| true, |_| true).unwrap();
        assert_eq!(left, [(key(1, 7), entry(5_000, Kind::Put))]);
        assert_eq!(index.keys_of(TableId(1)).unwrap().len(), 3_000);
        let below = |entry: &Entry| entry.version.stamp < truncate.stamp;
        assert!(
            index
                .entries_where(TableId(1), |_| true, below)
                .unwrap()
                .is_empty()
        );
        assert_eq!(
            index.stats().overflowed,
            held.overflowed,
            "nothing was written anew"
        );
        // Stable, and forgotten; what it has hidden is not.
        let stable = [(NodeId(2), Position::new(3, 4_500))].into_iter().collect();
        for _ in 0..60 {
            index.forget_stable(&stable, Some(78)).unwrap();
        }
        assert_eq!(index.truncate(TableId(1)), None);
        for at in (0..3_000).filter(|at| *at != 7) {
            assert_eq!(index.get(&key(1, at)).unwrap(), None, "{at}");
        }
        assert_eq!(index.get(&key(1, 7)).unwrap(), Some(entry(5_000, Kind::Put)));
    }

    fn of_node(node: u16, time: u64) -> Entry {
        let mut entry = entry(time, Kind::Put);
        entry.version.stamp.node = NodeId(node);
        entry
    }

    fn upto(nodes: &[(u16, u64)]) -> Vector {
        let of = nodes.iter();
        of.map(|&(node, time)| (NodeId(node), Position::new(3, time)))
            .collect()
    }

    /// What a truncate that has `seen` all of that, but is not older than anything, asks for; and how many rows it reads.
    fn unseen_of(index: &RowIndex, table: u32, seen: &Vector) -> (Vec<(RowKey, Entry)>, usize) {
        let read = std::cell::Cell::new(0);
        let may_hold = |summary: &Summary| !seen.includes(&summary.upto);
        let wanted = |entry: &Entry| {
            read.set(read.get() + 1);
            !entry.version.covered_by(seen)
        };
        let rows = index.entries_where(TableId(table), may_hold, wanted).unwrap();
        (rows, read.get())
    }

    #[test]
    fn what_a_truncate_has_seen_on_disk_is_not_read_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(dir.path(), 64 * 1024).unwrap();
        for at in 0..20_000 {
            let (table, time) = (1 + at % 2, u64::from(at) + 1);
            index.put(key(table, at), of_node(2, time)).unwrap();
        }
        let held = index.stats();
        assert!(held.overflowed > 15_000, "{held:?}");
        let (rows, read) = unseen_of(&index, 1, &upto(&[(2, 20_000)]));
        assert!(rows.is_empty());
        assert!(read <= held.entries, "{read} of {held:?}");
        // One of another node's: the generation that it is in is read, and of that the rows of its table.
        index.put(key(1, 4), of_node(3, 30_000)).unwrap();
        for at in 0..2_000 {
            index.put(key(2, 50_000 + at), of_node(2, 20_000)).unwrap();
        }
        let (rows, read) = unseen_of(&index, 1, &upto(&[(2, 20_000)]));
        assert_eq!(rows, [(key(1, 4), of_node(3, 30_000))]);
        assert!(read < 2_000, "{read}");
        let all = index.entries_where(TableId(1), |_| true, |_| true).unwrap();
        assert_eq!(all.len(), 10_000);
        assert!(all.iter().all(|(key, _)| key.table() == TableId(1)));
    }

    #[test]
    fn a_row_whose_newest_entry_is_in_a_generation_that_is_not_read_is_not_as_an_older_one_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(dir.path(), 64 * 1024).unwrap();
        index.put(key(1, 1), of_node(3, 5)).unwrap();
        index.put(key(1, 2), of_node(3, 6)).unwrap();
        let fill = |index: &mut RowIndex, from: u32| {
            for at in from..from + 3_000 {
                index.put(key(9, at), of_node(2, 10)).unwrap();
            }
        };
        fill(&mut index, 0);
        index.put(key(1, 1), of_node(2, 10)).unwrap();
        fill(&mut index, 10_000);
        assert!(!index.hot.contains_key(&key(1, 1)), "both are on disk");
        let (rows, _) = unseen_of(&index, 1, &upto(&[(2, 10)]));
        assert_eq!(rows, [(key(1, 2), of_node(3, 6))]);
    }

    #[test]
    fn what_stands_above_a_truncate_is_not_forgotten_before_it() {
        for overflows in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut index = RowIndex::new(dir.path(), 64 * 1024).unwrap();
            // Concurrent: node 3 has truncated, node 2 has written the row later, and everybody has that by now.
            let at = of_node(3, 50).version;
            let truncate = TableVersion {
                stamp: at.stamp,
                position: at.position,
            };
            index.put_truncate(TableId(1), truncate);
            index.put(key(1, 1), of_node(2, 60)).unwrap();
            index.put(key(2, 1), of_node(2, 60)).unwrap();
            if overflows {
                for at in 0..3_000 {
                    index.put(key(2, 10 + at), of_node(2, 60)).unwrap();
                }
            }
            let sweep = |index: &mut RowIndex, stable: &Vector| {
                for _ in 0..60 {
                    index.forget_stable(stable, Some(78)).unwrap();
                }
            };
            sweep(&mut index, &upto(&[(2, 60)]));
            assert_eq!(
                index.get(&key(1, 1)).unwrap(),
                Some(of_node(2, 60)),
                "{overflows}"
            );
            assert_eq!(index.truncate(TableId(1)), Some(truncate));
            sweep(&mut index, &upto(&[(2, 60), (3, 50)]));
            assert_eq!(index.truncate(TableId(1)), None);
            assert_eq!(index.get(&key(1, 1)).unwrap(), None, "{overflows}");
            assert_eq!(index.stats().overflowed, 0);
        }
    }

    #[test]
    fn what_is_stable_stays_until_its_writer_is_below_the_horizon() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = RowIndex::new(dir.path(), 1 << 20).unwrap();
        index.put(key(1, 1), entry(5, Kind::Put)).unwrap();
        let stable = [(NodeId(2), Position::new(3, 5))].into_iter().collect();
        index.forget_stable(&stable, Some(77)).unwrap();
        assert!(index.get(&key(1, 1)).unwrap().is_some());
        index.forget_stable(&stable, Some(78)).unwrap();
        assert!(index.get(&key(1, 1)).unwrap().is_none());
    }
}
