//! Where to begin again: the own frame that the slot was confirmed up to, and the index as it was there.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anabranch_conflict::Fold;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::{FrameReader, Record, TableCache, TxnHeader};
use anabranch_proto::{Lsn, NodeId, Position, Vector};

use super::Error;
use crate::apply::ddl::Ddl;
use crate::apply::feed::{Feed, Pieces};
use crate::apply::named_anew::tell_copied;
use crate::journal::{self, Cursor, Journal};
use crate::pg::xid;
use crate::resolve::LocalTxn;
use crate::shared::{Shared, lock};
use crate::source::Timelines;

/// The state of the fold at a place of the WAL.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Decoding starts here; `Lsn::ZERO` for where the slot is.
    pub start: Lsn,
    /// The fold there.
    pub fold: Fold,
    /// The journal holds own transactions up to here.
    pub journaled: Position,
}

/// Where to begin: at the state that was kept last ([`read`]), or else at the own frame that the slot is confirmed up to. `confirmed` and
/// `slot_start` are what the slot says now and where it was made; `timelines` the server's.
///
/// Where the state lies behind the journal's last own transaction and the slot does not, the server has forgotten what was confirmed; or it
/// was set back, slot and all, and has other WAL there. Which it is shows when that transaction is decoded again: so the frame where the slot
/// is is begun from, if there is one.
///
/// # Errors
/// When the journal cannot be read, or lacks what the slot has passed.
pub fn begin(
    kept: Option<(Lsn, Fold)>,
    journal: &Journal,
    node: NodeId,
    journaled: Position,
    (confirmed, slot_start): (Lsn, Lsn),
    timelines: &Timelines,
) -> Result<Checkpoint, Error> {
    let find = || find(journal, node, journaled, (confirmed, slot_start), timelines);
    let Some((start, fold)) = kept else {
        return find();
    };
    if start > confirmed
        && fold.last() >= journaled
        && let Ok(found) = find()
        && found.start == confirmed
    {
        return Ok(found);
    }
    Ok(Checkpoint {
        start,
        fold,
        journaled,
    })
}

/// The own frame that the slot is confirmed up to.
fn find(
    journal: &Journal,
    node: NodeId,
    journaled: Position,
    (confirmed, slot_start): (Lsn, Lsn),
    timelines: &Timelines,
) -> Result<Checkpoint, Error> {
    let fresh = Checkpoint {
        start: Lsn::ZERO,
        fold: Fold::new(node),
        journaled,
    };
    if confirmed > journaled.lsn && confirmed > slot_start {
        return Err(Error::JournalLost { confirmed });
    }
    if journaled == Position::ZERO {
        return Ok(fresh);
    }
    // As it was decoded then: a slot that came along with a promotion may be on an earlier timeline than the journal.
    let wanted = Position {
        epoch: timelines.at(confirmed).min(journaled.epoch),
        lsn: confirmed,
    };
    let header = match journal.cursor_on(node, wanted) {
        Ok(mut cursor) => header_at(&mut cursor, node, |header| header.position >= wanted)?,
        // The server forgot how far the slot was confirmed; frames that are gone were confirmed before.
        Err(journal::Error::Trimmed { oldest, .. }) => {
            header_at(&mut journal.cursor(node, oldest)?, node, |_| true)?
        }
        Err(error) => return Err(error.into()),
    };
    Ok(match header {
        Some(header) if header.position.lsn == confirmed || confirmed > slot_start => {
            let mut vector = header.deps.clone();
            vector.raise(node, header.position);
            let mut fold = Fold::joined(node, vector, header.stamp.time);
            if header.witness_us != 0 {
                fold.witness(header.witness_us);
            }
            Checkpoint {
                start: header.position.lsn,
                fold,
                journaled,
            }
        }
        _ => fresh,
    })
}

fn header_at(
    cursor: &mut Cursor,
    node: NodeId,
    wanted: impl Fn(&TxnHeader) -> bool,
) -> Result<Option<TxnHeader>, Error> {
    let mut found = None;
    each_header(cursor, node, |header| {
        let is_wanted = wanted(&header);
        found = is_wanted.then_some(header);
        is_wanted
    })?;
    Ok(found)
}

/// The headers of whole transactions, one after the other, until `is_last` says that it needs no more.
pub(super) fn each_header(
    cursor: &mut Cursor,
    node: NodeId,
    mut is_last: impl FnMut(TxnHeader) -> bool,
) -> Result<(), Error> {
    let mut cache = TableCache::default();
    while let Some(located) = cursor.try_next()? {
        let mut reader = FrameReader::new(node, journal::unpack(&located.frame)?, &mut cache)?;
        while let Some(record) = reader.next_record()? {
            if let Record::Txn(header, _) = record
                && is_last(header)
            {
                return Ok(());
            }
        }
    }
    Ok(())
}

const FILE: &str = "checkpoint.json";

#[derive(serde::Serialize, serde::Deserialize)]
struct Stored {
    lsn: Lsn,
    /// The timeline; 0 where that was not said.
    #[serde(default)]
    timeline: u32,
    fold: Fold,
}

/// Keeps the state of the fold at a place in the WAL, durably.
///
/// # Errors
/// When the file cannot be written.
pub fn write(dir: &Path, at: Position, fold: &Fold) -> std::io::Result<()> {
    let text = serde_json::to_vec(&Stored {
        lsn: at.lsn,
        timeline: at.epoch,
        fold: fold.clone(),
    })
    .map_err(std::io::Error::other)?;
    crate::small_file::replace(&dir.join(FILE), &text)
}

/// Removes what is kept: it is of transactions that the journal does not hold any more.
///
/// # Errors
/// When the file cannot be removed.
pub fn forget(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(dir.join(FILE)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::fs::File::open(dir)?.sync_all(),
    }
}

/// The state kept last, if the slot is not confirmed beyond it and its place is in the server's history.
#[must_use]
pub fn read(dir: &Path, confirmed: Lsn, timelines: &Timelines) -> Option<(Lsn, Fold)> {
    let text = std::fs::read(dir.join(FILE)).ok()?;
    let stored: Stored = serde_json::from_slice(&text).ok()?;
    let at = Position {
        epoch: match stored.timeline {
            0 => stored.fold.last().epoch,
            timeline => timeline,
        },
        lsn: stored.lsn,
    };
    // Else it was written behind the place where a standby was promoted. (A joiner that has written nothing did not say where.)
    let is_held = at.epoch == 0 || timelines.holds(at);
    (stored.lsn >= confirmed && is_held).then_some((stored.lsn, stored.fold))
}

/// What the journal has let go of each of `origins`, or never had: it begins behind that. Its files say it where they are this node's own
/// from the beginning. One that was taken over from members, by a join or a heal, begins where theirs did; of a node of which they held
/// nothing any more, all is gone that is `settled`.
///
/// # Errors
/// When the journal cannot be read.
pub fn gone(journal: &Journal, origins: &[NodeId], settled: &Vector) -> Result<Vector, journal::Error> {
    let mut gone = journal.stats().oldest;
    for &origin in origins {
        let (_, begins) = Feed::oldest(journal, origin)?;
        let holds_nothing = journal.appended_of(origin) == Position::ZERO;
        let after = if holds_nothing {
            begins.max(settled.get(origin))
        } else {
            begins
        };
        if after > Position::ZERO {
            gone.raise(origin, after);
        }
    }
    Ok(gone)
}

/// Rebuilds the row index and the stability from the journal, for everything at or below `vector`.
/// Returns how many changes there were, and the tables that they are of. `lost` is where a slot begins that was made anew, on
/// that timeline ([`crate::heal`]): what the earlier one had still to say of conflicts is found again. `running` tells, where that
/// matters, which own transactions are not visible yet: the slot may have passed them long ago.
///
/// # Errors
/// When the journal cannot be read.
pub fn rebuild(
    journal: &Journal,
    shared: &Shared,
    vector: &Vector,
    members: &[NodeId],
    lost: Option<Position>,
    running: Option<&xid::Running>,
) -> Result<(u64, Vec<Arc<TableDesc>>), Error> {
    let mut count = 0;
    let mut tables: HashMap<(String, String), Arc<TableDesc>> = HashMap::new();
    let timeline = shared.timeline.load(Ordering::Relaxed);
    let lasting = &shared.lasting;
    let joins = !lock(&shared.members).ready().contains(&shared.node);
    let mut feeds = Vec::new();
    for &origin in members {
        feeds.push(Feed::oldest(journal, origin)?.0);
    }
    // The lowest stamp first: what is covered by another comes before it.
    loop {
        let mut next: Option<(anabranch_proto::Stamp, &mut Feed)> = None;
        for feed in &mut feeds {
            let upto = vector.get(feed.origin);
            let stamp = match feed.peek().map_err(replay_error)? {
                Some(head) if head.header().position <= upto => head.header().stamp,
                _ => continue,
            };
            if next.as_ref().is_none_or(|(lowest, _)| stamp < *lowest) {
                next = Some((stamp, feed));
            }
        }
        let Some(head) = next.and_then(|(_, feed)| feed.take()) else {
            break;
        };
        let header = head.header().clone();
        let txn = LocalTxn {
            stamp: header.stamp,
            position: header.position,
            // Of an earlier timeline others may have the same ids now.
            xid: match lost {
                Some(at) if at.epoch != header.position.epoch => 0,
                _ => header.xid,
            },
            commit_us: header.commit_us,
        };
        if lost.is_some() {
            // The log's lines tell it.
            lock(&shared.recent).insert(&header);
        }
        // A promotion ends all waiting: what is of an earlier timeline is visible or gone, and others may have its id.
        let own = running.filter(|_| header.origin() == shared.node);
        let is_hidden = own.map(|running| header.position.epoch == timeline && running.holds(header.xid));
        let mut pieces = Pieces::of_head(journal, head)?;
        while let Some(mut piece) = pieces.next_piece().map_err(replay_error)? {
            let mut resolver = lock(&shared.resolver);
            while let Some(change) = piece.next_change()? {
                // What was written into a table of that name before, or by who had not run the DDL, is of another one.
                for name in Ddl::recall(&change, &header, lasting) {
                    if joins && tables.contains_key(&name) {
                        tell_copied((name.0.as_str(), name.1.as_str()), &lasting.alarms);
                    }
                }
                for table in change.tables() {
                    if joins && lasting.named_anew.is_of_another(table, &header) {
                        tell_copied((table.schema.as_str(), table.name.as_str()), &lasting.alarms);
                    }
                    let name = (table.schema.clone(), table.name.clone());
                    tables.entry(name).or_insert_with(|| Arc::clone(table));
                }
                match lost {
                    None => resolver.rebuild(&change, (header.stamp, header.position), &header.deps)?,
                    Some(at) => resolver.relive(&change, &txn, &header.deps, at.lsn)?,
                }
                if is_hidden == Some(true) {
                    resolver.rebuilt_by(&change, (header.stamp, header.position), header.xid)?;
                }
                count += 1;
            }
        }
        lock(&shared.resolver).history_end(&header.deps, lost.map(|at| at.lsn))?;
        let origin = header.origin();
        let mut knows = header.deps;
        knows.raise(origin, header.position);
        shared.hear([header.stamp]);
        lock(&shared.stability).observe(origin, &knows);
        if let Some(is_hidden) = is_hidden {
            shared.recall_own(header.position, header.xid, is_hidden);
        }
    }
    if let Some(at) = lost {
        lock(&shared.resolver).hold_found_at(at.lsn);
    }
    Ok((count, tables.into_values().collect()))
}

fn replay_error(error: crate::apply::failure::Failure) -> Error {
    Error::Replay(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use anabranch_proto::Stamp;
    use anabranch_proto::txn::FrameBuilder;

    use super::*;
    use crate::journal::{Frame, FrameKind, FrameMeta};

    const HERE: NodeId = NodeId(3);

    /// Promoted once: timeline 1 was left at 0/3000000.
    fn promoted() -> Timelines {
        Timelines::of(2, "1\t0/3000000\tno recovery target specified\n")
    }

    fn kept(at: Position, fold: &Fold) -> Option<Lsn> {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), at, fold).unwrap();
        Some(read(dir.path(), Lsn(0x100), &promoted())?.0)
    }

    fn fold(own: Position) -> Fold {
        let mut vector: Vector = [(NodeId(1), Position::new(1, 7))].into_iter().collect();
        vector.raise(HERE, own);
        Fold::joined(HERE, vector, Stamp::ZERO.time)
    }

    #[test]
    fn a_state_from_behind_the_place_of_a_promotion_is_not_begun_from() {
        let own = fold(Position::new(1, 0x300_0000));
        assert_eq!(kept(Position::new(1, 0x300_0000), &own), Some(Lsn(0x300_0000)));
        assert_eq!(kept(Position::new(1, 0x300_0001), &own), None);
        assert_eq!(kept(Position::new(2, 0x300_0001), &own), Some(Lsn(0x300_0001)));
        // As it was written before timelines were told: it is that of the last own transaction.
        assert_eq!(kept(Position::new(0, 0x300_0001), &own), None);
    }

    /// A journal with an own transaction that ends at each of these places.
    async fn journal_of(dir: &Path, ends: &[u64]) -> Journal {
        journal_behind(dir, Position::ZERO, ends).await
    }

    /// The same, of which nothing up to `prev` is there.
    async fn journal_behind(dir: &Path, mut prev: Position, ends: &[u64]) -> Journal {
        let options = journal::Options {
            dir: dir.to_owned(),
            segment_bytes: 64 << 10,
            max_bytes: 1 << 30,
            sync_within: Duration::from_micros(200),
            node: HERE,
            cluster: "test".to_owned(),
        };
        let (journal, _) = Journal::open(options, Arc::new(journal::RealDisk)).unwrap();
        for &end in ends {
            let last = Position::new(1, end);
            let mut builder = FrameBuilder::default();
            builder.end_txn(&TxnHeader {
                position: last,
                stamp: Stamp::ZERO,
                deps: Vector::new(),
                xid: 1,
                commit_us: 0,
                witness_us: 0,
                change_count: 0,
            });
            let (codec, payload, raw_len) = journal::pack(builder.finish()).unwrap();
            let meta = FrameMeta {
                origin: HERE,
                prev,
                last,
                kind: FrameKind::Whole,
                txn_count: 1,
                part: 0,
                part_run: 0,
                codec,
                raw_len,
            };
            let seq = journal.append(Frame { meta, payload }).await.unwrap();
            journal.wait_durable(seq).await.unwrap();
            prev = last;
        }
        journal
    }

    #[tokio::test]
    async fn what_a_slot_has_forgotten_is_decoded_again_if_the_last_own_transaction_is_among_it() {
        let dir = tempfile::tempdir().unwrap();
        let journal = journal_of(dir.path(), &[0x100, 0x200]).await;
        let (timelines, journaled) = (Timelines::of(1, ""), Position::new(1, 0x200));
        let begun = |confirmed: u64, knows: u64| {
            let kept = Some((Lsn(0x300), fold(Position::new(1, knows))));
            let slot = (Lsn(confirmed), Lsn(0x80));
            let begun = begin(kept, &journal, HERE, journaled, slot, &timelines).unwrap();
            (begun.start.0, begun.fold.last().lsn.0)
        };
        assert_eq!(begun(0x300, 0x200), (0x300, 0x200));
        assert_eq!(begun(0x100, 0x200), (0x100, 0x100));
        assert_eq!(begun(0x200, 0x200), (0x200, 0x200));
        // No own frame ends there: the one place that is known to be right.
        for confirmed in [0x80, 0x150, 0x250] {
            assert_eq!(begun(confirmed, 0x200), (0x300, 0x200), "{confirmed:#x}");
        }
        // The last own transaction is met behind it.
        assert_eq!(begun(0x100, 0x100), (0x300, 0x100));
    }

    #[tokio::test]
    async fn a_journal_that_was_taken_over_has_lost_what_those_had_let_go_that_it_is_from() {
        let (dir, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (before, later) = (Position::new(1, 0x200), Position::new(1, 0x280));
        let mut settled = Vector::new();
        settled.raise(NodeId(1), later);
        settled.raise(HERE, later);
        let mut expected = Vector::new();
        expected.raise(NodeId(1), later);
        expected.raise(HERE, before);
        let journal = journal_behind(dir.path(), before, &[0x300, 0x400]).await;
        let origins = [NodeId(1), NodeId(2), HERE];
        assert_eq!(gone(&journal, &origins, &settled).unwrap(), expected);
        let journal = journal_of(whole.path(), &[0x300]).await;
        assert_eq!(gone(&journal, &[HERE], &settled).unwrap(), Vector::new());
    }

    #[test]
    fn a_joiners_state_is_begun_from_also_where_its_server_was_promoted_before() {
        assert_eq!(
            kept(Position::new(0, 0x400_0000), &fold(Position::ZERO)),
            Some(Lsn(0x400_0000))
        );
    }
}
