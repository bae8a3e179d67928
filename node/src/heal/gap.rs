//! The gap: rows as transactions left them that the journal does not know.
//!
//! In:   a range of xids, the tables, the journal            Out: where such rows are, and when they were written
//! Holds: keys that the journal knows, as numbers, up to a bound; rows of one portion
//! Invariants: no row of the gap is left out, but one that it has made what an earlier version had been which a delete elsewhere had not
//!        seen, or which what is in quarantine has come over ([`Scan::left`]). A row that is none may be taken for one where the journal
//!        has let go what wrote it, or a savepoint hides whose it is: writing it again changes no value
//! Not here: rows that are gone (`crate::verify`), writing ([`super::again`])
//!
//! A row's xmin says who wrote it. Below the horizon all is known. From there on a row is of the gap unless its xmin is an own
//! transaction of the journal, or the row is as the newest write of it in the journal made it: that was an apply
//! transaction, or an own one with savepoints. Or as an earlier one did, where the newest has not come into the table yet.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use anabranch_conflict::policy::Policies;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::TxnHeader;
use anabranch_proto::{NodeId, Position, Vector};
use futures_util::StreamExt as _;
use tokio_postgres::{Client, Row};

use super::Error;
use super::described::{hashes, hashes_of};
use crate::apply::catalog;
use crate::apply::feed::{Feed, Pieces};
use crate::capture::Marks;
use crate::journal::Journal;
use crate::policy_change;
use crate::source::Timelines;
use crate::verify::newest::{self, Newest};
use crate::verify::table::{self, Compared};

/// Keys that are remembered of the journal; past that every row is looked for in it.
const KEYS_MAX: usize = 4 << 20;
/// Rows that are compared with the journal at once.
const COMPARED_AT_ONCE: usize = 20_000;
/// Rows that one statement reads, about.
const PIECE_ROWS: f64 = 1_000_000.0;

const WAITING: &str = "SELECT key_bytes FROM anabranch.quarantine WHERE schema_name = $1 AND table_name = $2";

/// Xids from `first` on, `count` of them, in 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Xids {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// What the journal knows.
pub(super) struct Known {
    /// Ids of own transactions that the server has.
    own: HashSet<u32>,
    /// Hashes of the rows' tables and keys; none where there are too many.
    keys: Option<HashSet<u64>>,
    /// The last own transaction.
    pub(super) last: Option<TxnHeader>,
    /// The last that the server has, and the last heartbeat of these.
    pub(super) held: Marks,
    /// The first that it lacks, and how many of those have changes.
    pub(super) lacks: Option<(Position, u64)>,
    origins: Vec<NodeId>,
    pub(super) upto: Vector,
}

fn key_hash(schema: &str, name: &str, key: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (schema, name, key).hash(&mut hasher);
    hasher.finish()
}

impl Known {
    /// Reads the whole journal, for all of `node`, which is this one, and of others everything at or below `progress`, or
    /// that its own transactions have seen: blocks.
    pub(super) fn read(
        journal: &Journal,
        node: NodeId,
        progress: &Vector,
        timelines: &Timelines,
    ) -> Result<Self, Error> {
        let others = progress.iter().map(|(origin, _)| origin);
        let mut origins: Vec<NodeId> = others.filter(|&origin| origin != node).collect();
        origins.insert(0, node);
        let mut known = Self {
            own: HashSet::new(),
            keys: Some(HashSet::new()),
            last: None,
            held: Marks::default(),
            lacks: None,
            origins: Vec::new(),
            upto: progress.clone(),
        };
        while let Some(&origin) = origins.get(known.origins.len()) {
            known.origins.push(origin);
            let (mut feed, _) = Feed::oldest(journal, origin)?;
            while let Some(head) = feed.peek()? {
                if origin != node && head.header().position > known.upto.get(origin) {
                    break;
                }
                let Some(head) = feed.take() else { break };
                if origin == node {
                    known.note_own(head.header(), timelines);
                }
                let mut pieces = Pieces::of_head(journal, head)?;
                while let Some(mut piece) = pieces.next_piece()? {
                    while let Some(change) = piece.next_change()? {
                        change.each_row(|table, key, _| {
                            known.note(&table.schema, &table.name, key);
                            Ok::<_, Error>(())
                        })?;
                    }
                }
            }
            if let Some(last) = known.last.as_ref().filter(|_| origin == node) {
                known.upto.raise(node, last.position);
                // What it had applied when it wrote that, the server may not have any more.
                known.upto.join(&last.deps);
                for (seen, _) in last.deps.iter() {
                    if !origins.contains(&seen) {
                        origins.push(seen);
                    }
                }
            }
        }
        Ok(known)
    }

    fn note_own(&mut self, header: &TxnHeader, timelines: &Timelines) {
        if timelines.holds(header.position) {
            self.own.insert(header.xid);
            self.held.note(header, self.last.as_ref());
            // No daemon runs on a server that lacks something: what this one lacked before that was put back by an earlier heal.
            self.lacks = None;
        } else {
            let (_, count) = self.lacks.get_or_insert((header.position, 0));
            *count += u64::from(header.change_count > 0);
        }
        self.last = Some(header.clone());
    }

    /// Knows no more than what the server has.
    pub(super) fn forget_what_is_lacked(&mut self, progress: &Vector, node: NodeId) {
        self.upto = progress.clone();
        if let Some(held) = &self.held.last {
            self.upto.raise(node, held.position);
        }
    }

    /// What the newest writes at or below `upto` made of these rows, by their keys; none of those that nothing wrote.
    pub(super) async fn newest(
        &self,
        journal: &Journal,
        upto: &Vector,
        desc: &Arc<TableDesc>,
        keys: Vec<Vec<u8>>,
    ) -> Result<HashMap<Vec<u8>, Newest>, Error> {
        let (journal, origins, upto) = (journal.clone(), self.origins.clone(), upto.clone());
        let desc = Arc::clone(desc);
        let found = tokio::task::spawn_blocking(move || {
            let name = (desc.schema.as_str(), desc.name.as_str());
            newest::find(&journal, &origins, (&upto, &Vector::new()), name, &keys)
        });
        let found = found
            .await
            .map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))?;
        found.map_err(|error| Error::Unreadable(error.to_string()))
    }

    /// What writes made of these rows; see [`newest::images`].
    async fn images(
        &self,
        journal: &Journal,
        desc: &Arc<TableDesc>,
        keys: HashMap<Vec<u8>, Option<Arc<Vector>>>,
    ) -> Result<newest::Images, Error> {
        if keys.is_empty() {
            return Ok(newest::Images::new());
        }
        let (journal, origins, upto) = (journal.clone(), self.origins.clone(), self.upto.clone());
        let desc = Arc::clone(desc);
        let found = tokio::task::spawn_blocking(move || {
            let name = (desc.schema.as_str(), desc.name.as_str());
            newest::images(&journal, &origins, &upto, name, &keys)
        });
        let found = found
            .await
            .map_err(|_| Error::Unreadable("it ended unexpectedly".to_owned()))?;
        found.map_err(|error| Error::Unreadable(error.to_string()))
    }

    /// Which of these rows, by key and hash, are as a write in the journal made them: of those keys, any write, or one that the vector does
    /// not cover.
    pub(super) async fn made_before(
        &self,
        (sql, journal): (&Client, &Journal),
        compared: &Compared,
        rows: &[(&[u8], i64)],
        keys: HashMap<Vec<u8>, Option<Arc<Vector>>>,
    ) -> Result<HashSet<usize>, Error> {
        let images = self.images(journal, &compared.desc, keys).await?;
        let (mut places, mut described) = (Vec::new(), Vec::new());
        for (at, (key, hash)) in rows.iter().enumerate() {
            for image in images.get(*key).into_iter().flatten() {
                // As the row is, its table's description of then fits.
                if compared.plan_of(&image.0).is_ok() {
                    places.push((at, *hash));
                    described.push(Some(image));
                }
            }
        }
        // A row may have been written many times.
        let mut hashes = Vec::with_capacity(described.len());
        for some in described.chunks(COMPARED_AT_ONCE) {
            hashes.extend(hashes_of(sql, compared, some).await?);
        }
        let equal = places.iter().zip(hashes);
        let equal = equal.filter(|((_, hash), known)| *known == Some(*hash));
        Ok(equal.map(|((at, _), _)| *at).collect())
    }

    /// May this transaction have been made while nobody decoded?
    pub(super) fn is_unheard_of(&self, xmin: u32, xids: Xids) -> bool {
        let first = (xids.first & 0xFFFF_FFFF) as u32;
        xmin >= 3 && u64::from(xmin.wrapping_sub(first)) < xids.count && !self.own.contains(&xmin)
    }

    fn note(&mut self, schema: &str, name: &str, key: &[u8]) {
        if let Some(keys) = &mut self.keys {
            keys.insert(key_hash(schema, name, key));
            if keys.len() > KEYS_MAX {
                self.keys = None;
            }
        }
    }

    fn may_hold(&self, schema: &str, name: &str, key: &[u8]) -> bool {
        let keys = self.keys.as_ref();
        keys.is_none_or(|keys| keys.contains(&key_hash(schema, name, key)))
    }
}

/// A table of which rows may be written again.
pub(super) struct Table {
    pub(super) compared: Compared,
    /// More of the WHERE, for our own tables.
    only: String,
    /// Its columns are merged: what a write of the gap added to them cannot be told.
    pub(super) is_merged: bool,
    /// Keys of rows that wait in quarantine.
    waiting: HashSet<Vec<u8>>,
}

impl Table {
    pub(super) fn name(&self) -> String {
        format!("{}.{}", self.compared.desc.schema, self.compared.desc.name)
    }
}

/// A row of the gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Which table.
    pub(super) table: usize,
    pub(super) page: u32,
    pub(super) line: u16,
    pub(super) xmin: u32,
    /// When it was committed, microseconds since the Unix epoch, if the server knows.
    pub(super) at_us: Option<i64>,
}

impl Place {
    /// As PostgreSQL writes it.
    pub(super) fn ctid(&self) -> String {
        format!("({},{})", self.page, self.line)
    }
}

/// Tables whose rows travel: those replicated, and of ours what this node has said.
pub(super) async fn tables(
    sql: &Client,
    publication: &str,
    node: NodeId,
    policies: &Policies,
) -> Result<Vec<Table>, Error> {
    let mut tables = Vec::new();
    // DDL first: rows may need what it makes.
    let own = [
        ("ddl", format!(" AND t.node_id = {node}")),
        (
            "member",
            format!(" AND t.said_by = {node} AND t.fact <> 'founder'"),
        ),
        ("sequence", format!(" AND t.node_id = {node}")),
        // Where a change is made is told by the place of its vote in the stream: the first one, should it come again.
        (policy_change::TABLE, format!(" AND t.node_id = {node}")),
    ];
    for (name, only) in own {
        let compared = match Compared::load(sql, "anabranch", name).await {
            // An older release made the schema.
            Err(table::Error::Catalog(catalog::Error::Missing(..))) if name == policy_change::TABLE => {
                continue;
            }
            compared => compared?,
        };
        tables.push(Table {
            compared,
            only,
            is_merged: false,
            waiting: HashSet::new(),
        });
    }
    for row in sql.query(table::TABLES, &[&publication]).await? {
        let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        tables.push(Table {
            waiting: waiting(sql, &schema, &name).await?,
            compared: Compared::load(sql, &schema, &name).await?,
            only: String::new(),
            is_merged: policies.of(&schema, &name).columns.is_some(),
        });
    }
    Ok(tables)
}

/// Keys of a table's rows that wait in quarantine.
pub(super) async fn waiting(sql: &Client, schema: &str, name: &str) -> Result<HashSet<Vec<u8>>, Error> {
    let rows = sql.query(WAITING, &[&schema, &name]).await?;
    Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
}

/// From a page to before another, or to the end.
pub(super) type Pages = (u64, Option<u64>);

/// Looks for rows of the gap.
pub(super) struct Scan<'a> {
    pub(super) sql: &'a Client,
    pub(super) journal: &'a Journal,
    pub(super) known: &'a Known,
    pub(super) xids: Xids,
    /// Does the server keep the times of commits?
    pub(super) times: bool,
}

impl Scan<'_> {
    /// Begins with a table: gives its portions, by pages. One transaction until [`Self::end`], so that nothing moves the rows
    /// meanwhile; each statement has its own snapshot.
    pub(super) async fn begin(&self, table: &Table) -> Result<Vec<Pages>, Error> {
        let desc = &table.compared.desc;
        let lock = format!(
            "BEGIN READ ONLY; LOCK TABLE ONLY {} IN ACCESS SHARE MODE",
            table.compared.plan.table_sql
        );
        self.sql.batch_execute(&lock).await?;
        let size = self
            .sql
            .query_one(table::SIZE, &[&desc.schema, &desc.name])
            .await?;
        let (pages, page_rows): (i64, f64) = (size.try_get(0)?, size.try_get(1)?);
        let pages = u64::try_from(pages).unwrap_or(0);
        let step = ((PIECE_ROWS / page_rows.max(1.0)) as u64).max(1);
        let mut portions = Vec::new();
        let mut from = 0;
        while from + step < pages {
            portions.push((from, Some(from + step)));
            from += step;
        }
        // Rows that came since the size was asked are on later pages.
        portions.push((from, None));
        Ok(portions)
    }

    /// The file that a table's rows are in: another one once they were all moved.
    pub(super) async fn file_of(&self, table: &Table) -> Result<Option<u32>, Error> {
        let file = "SELECT pg_relation_filenode(to_regclass($1::text))";
        let row = self
            .sql
            .query_one(file, &[&table.compared.plan.table_sql])
            .await?;
        Ok(row.try_get(0)?)
    }

    pub(super) async fn end(&self) -> Result<(), Error> {
        Ok(self.sql.batch_execute("COMMIT").await?)
    }

    /// The rows of the gap in one portion of the table numbered `at`.
    pub(super) async fn portion(&self, at: usize, table: &Table, pages: Pages) -> Result<Vec<Place>, Error> {
        let (compared, desc) = (&table.compared, &table.compared.desc);
        let xids = (self.xids.first & 0xFFFF_FFFF, self.xids.count);
        let text = compared.written_sql(pages, xids, (self.times, &table.only));
        let rows = self.sql.query_raw(&text, Vec::<String>::new()).await?;
        let mut rows = std::pin::pin!(rows);
        let (mut found, mut doubtful) = (Vec::new(), Vec::new());
        while let Some(row) = rows.next().await {
            let row = row?;
            let place = place(at, &row)?;
            if self.known.own.contains(&place.xmin) {
                continue;
            }
            let mut key = Vec::new();
            desc.canonical_key_of_image(&compared.key_image(&row, 4)?, &mut key)?;
            if self.known.may_hold(&desc.schema, &desc.name, &key) {
                doubtful.push((place, row.try_get::<_, i64>(3)?, key));
            } else {
                found.push(place);
            }
        }
        for some in doubtful.chunks(COMPARED_AT_ONCE) {
            found.extend(self.compare(table, some).await?);
        }
        Ok(found)
    }

    /// Rows of the journal's keys that are not as their newest write in the journal made them.
    async fn compare(&self, table: &Table, some: &[(Place, i64, Vec<u8>)]) -> Result<Vec<Place>, Error> {
        let (compared, desc) = (&table.compared, &table.compared.desc);
        let keys = some.iter().map(|row| row.2.clone()).collect();
        let newest = self
            .known
            .newest(self.journal, &self.known.upto, desc, keys)
            .await?;
        let writes: Vec<Option<&Newest>> = some.iter().map(|row| newest.get(&row.2)).collect();
        let known = hashes(self.sql, compared, &writes).await?;
        let strange = some
            .iter()
            .zip(known)
            .filter(|(row, known)| *known != Some(row.1));
        let strange: Vec<&(Place, i64, Vec<u8>)> = strange.map(|(row, _)| row).collect();
        let left = self.left(table, &strange, &newest).await?;
        let strange = strange.into_iter().enumerate();
        Ok(strange
            .filter(|(at, _)| !left.contains(at))
            .map(|(_, row)| row.0)
            .collect())
    }

    /// Which of these rows are as an earlier write in the journal made them, and not written since as far as can be told: what came later
    /// waits in quarantine, or is a delete that had not met them, which is still to be made sure of. Written again they would be newer than that.
    async fn left(
        &self,
        table: &Table,
        strange: &[&(Place, i64, Vec<u8>)],
        newest: &HashMap<Vec<u8>, Newest>,
    ) -> Result<HashSet<usize>, Error> {
        let compared = &table.compared;
        let mut doubtful = HashMap::new();
        for (_, _, key) in strange {
            if table.waiting.contains(key) {
                doubtful.insert(key.clone(), None);
            } else if let Some(newest) = newest.get(key).filter(|newest| newest.image.is_none()) {
                doubtful.insert(key.clone(), Some(Arc::clone(&newest.knows)));
            }
        }
        let rows: Vec<(&[u8], i64)> = strange
            .iter()
            .map(|(_, hash, key)| (key.as_slice(), *hash))
            .collect();
        self.known
            .made_before((self.sql, self.journal), compared, &rows, doubtful)
            .await
    }
}

fn place(table: usize, row: &Row) -> Result<Place, Error> {
    let ctid: String = row.try_get(0)?;
    let unreadable = || Error::Refused(format!("a ctid that cannot be read: {ctid}"));
    let inner = ctid.trim_start_matches('(').trim_end_matches(')');
    let (page, line) = inner.split_once(',').ok_or_else(unreadable)?;
    Ok(Place {
        table,
        page: page.parse().map_err(|_| unreadable())?,
        line: line.parse().map_err(|_| unreadable())?,
        xmin: u32::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0),
        at_us: row.try_get(2)?,
    })
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Stamp;

    use super::*;

    #[test]
    fn what_an_earlier_heal_has_put_back_is_not_lacked() {
        let mut known = Known {
            own: HashSet::new(),
            keys: None,
            last: None,
            held: Marks::default(),
            lacks: None,
            origins: Vec::new(),
            upto: Vector::new(),
        };
        let timelines = Timelines::of(3, "1\t0/200\tpromoted\n2\t0/300\tpromoted\n");
        let mut lacks = |epoch: u32, lsn: u64| {
            let header = TxnHeader {
                position: Position::new(epoch, lsn),
                stamp: Stamp::ZERO,
                deps: Vector::new(),
                xid: 7,
                commit_us: 0,
                witness_us: 0,
                change_count: 1,
            };
            known.note_own(&header, &timelines);
            known.lacks
        };
        assert_eq!(lacks(1, 0x100), None);
        let first = Position::new(1, 0x210);
        assert_eq!(lacks(1, 0x210), Some((first, 1)));
        assert_eq!(lacks(1, 0x220), Some((first, 2)));
        // Decoded on the second timeline, which took the first one's tail over.
        assert_eq!(lacks(2, 0x280), None);
        assert_eq!(lacks(2, 0x310), Some((Position::new(2, 0x310), 1)));
        assert_eq!(lacks(3, 0x320), None);
    }
}
