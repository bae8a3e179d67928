//! Lines of the conflict log before they are written: who lost, to whom, and where the rows' images are.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_conflict::{ConflictType, Kind, Resolution, Version, script};
use anabranch_proto::row::RowImage;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::{NodeId, Position, Stamp};

use super::batch::Action;
use super::write::Read;
use crate::index::{Entry, RowKey};

/// No node has this id.
const NOBODY: NodeId = NodeId(0);

/// A row of the log line.
#[derive(Debug, Clone)]
pub(crate) enum Tuple {
    /// There was none.
    None,
    /// An image in the columns of some origin.
    Image(Arc<TableDesc>, RowImage),
    /// What stands in the table when the row is locked, before it is written; if this version wrote it. A local
    /// write that is not decoded yet may have come over it.
    Standing(Entry),
    /// A write's row, to be read back from the journal.
    Journal(Version),
    /// Another row's, to be read back from the journal: the one that has a unique value.
    JournalOf(Version, RowKey),
    /// Rendered already.
    Json(String),
}

/// Whose write lost, seen from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loser {
    /// The version that stood here.
    Local,
    /// The version that came in.
    Remote,
}

/// A server's refusal of a row.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) sqlstate: String,
    pub(crate) message: String,
    pub(crate) detail: Option<String>,
    pub(crate) context: Option<String>,
    pub(crate) constraint: Option<String>,
    /// Of a row without its parent: the rows, as JSON, that its parent is made of again.
    pub(crate) parents: Option<String>,
}

impl Refusal {
    /// The table's script did not choose, so the highest stamp did.
    pub(crate) fn script(failure: &script::Failure) -> Self {
        Self {
            sqlstate: failure.sqlstate().to_owned(),
            message: format!("{failure}; the last update wins"),
            detail: None,
            context: None,
            constraint: None,
            parents: None,
        }
    }

    /// Another row has the value.
    pub(crate) fn claimed(constraint: &str) -> Self {
        Self {
            sqlstate: "23505".to_owned(),
            message: format!("a later row has this row's value of the unique key \"{constraint}\""),
            detail: None,
            context: None,
            constraint: Some(constraint.to_owned()),
            parents: None,
        }
    }
}

/// A line of the conflict log.
#[derive(Debug, Clone)]
pub(crate) struct Loss {
    pub(crate) table: Arc<TableDesc>,
    pub(crate) key: RowKey,
    /// The row or key image to render the key's columns from; `None` when only the canonical key is known.
    pub(crate) key_from: KeyFrom,
    pub(crate) kind: ConflictType,
    pub(crate) resolution: Resolution,
    pub(crate) loser: Loser,
    pub(crate) local: Option<Version>,
    pub(crate) remote: Option<Version>,
    pub(crate) local_tuple: Tuple,
    pub(crate) remote_tuple: Tuple,
    pub(crate) refusal: Option<Refusal>,
    /// Was it found when the local write that lost was decoded? Then it, or one found behind it, says what its transaction made of
    /// the row in the end.
    pub(crate) is_decoded: bool,
    /// What of it was lost, and what the row is, where the winner's row does not say that.
    pub(crate) lost_columns: Option<Lost>,
    /// Why it lost, where the server was not asked: a sum that its column cannot hold, a unique value of another row.
    pub(crate) reason: Option<Refusal>,
}

/// What was lost of a version that the winner has not simply taken the place of.
#[derive(Debug, Clone)]
pub(crate) struct Lost {
    /// Columns, if the rest was not lost.
    pub(crate) columns: Option<Vec<String>>,
    /// The row as all its versions make it, where it is folded of them.
    pub(crate) left: Option<Tuple>,
}

/// Losses that get no line: how many of each table and kind, and of which origin to which.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts(BTreeMap<Group, i64>);

/// Schema, table, kind, and the nodes that lost and won; 0 where none did.
type Group = (String, String, &'static str, i32, i32);

impl Counts {
    /// Counts one.
    pub(crate) fn add(&mut self, loss: &Loss) {
        let origin = |version: Option<Version>| version.map_or(0, |version| i32::from(version.origin().0));
        let (schema, table) = (loss.table.schema.clone(), loss.table.name.clone());
        let group = (
            schema,
            table,
            loss.kind.as_str(),
            origin(loss.losing()),
            origin(loss.winning()),
        );
        *self.0.entry(group).or_default() += 1;
    }

    /// Adds what is counted in another one.
    pub(crate) fn join(&mut self, other: &Self) {
        for (group, count) in &other.0 {
            *self.0.entry(group.clone()).or_default() += count;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub(crate) fn total(&self) -> u64 {
        self.0
            .values()
            .map(|count| u64::try_from(*count).unwrap_or(0))
            .sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Group, i64)> {
        self.0.iter().map(|(group, count)| (group, *count))
    }
}

/// Where a line's key columns come from.
#[derive(Debug, Clone)]
pub(crate) enum KeyFrom {
    Row(RowImage),
    Key(RowImage),
    Canonical,
}

impl Loss {
    /// The row that stood here was nobody's version, and is overwritten: it was here before its table was replicated, or somebody wrote
    /// past the replication. Its line is named by a version of no node at the time of the one that takes its place, so that nodes
    /// which held the same row have one line. The row is still to be read.
    pub(crate) fn unheard(action: &Action, row: &RowImage) -> Self {
        let time = action.version.stamp.time;
        let local = Version {
            stamp: Stamp { time, node: NOBODY },
            position: Position::ZERO,
            kind: Kind::Put,
        };
        Self {
            table: Arc::clone(&action.table),
            key: action.key.clone(),
            key_from: KeyFrom::Canonical,
            kind: ConflictType::InsertExists,
            resolution: Resolution::ApplyRemote,
            loser: Loser::Local,
            local: Some(local),
            remote: Some(action.version),
            local_tuple: Tuple::None,
            remote_tuple: Tuple::Image(Arc::clone(&action.table), row.clone()),
            refusal: None,
            is_decoded: false,
            lost_columns: None,
            reason: None,
        }
    }

    /// See [`Self::unheard`].
    pub(crate) fn is_unheard(&self) -> bool {
        self.local.is_some_and(|version| version.origin() == NOBODY)
    }

    /// Was the row put into quarantine? One that is written without columns is skipped in these alone.
    pub(crate) fn keeps_row_out(&self) -> bool {
        self.resolution == Resolution::Skip && self.lost_columns.is_none()
    }

    /// Is it found out anew each time its transaction is tried?
    pub(crate) fn is_of_one_try(&self) -> bool {
        self.refusal.is_some() || self.is_unheard()
    }

    /// Has it a line, however many there are? A row that is not in the table is nowhere else, and by the line of one that shall go it is
    /// found.
    pub(crate) fn is_whole(&self) -> bool {
        self.refusal.is_some()
            || self.kind == ConflictType::MultipleUniqueConflicts
            || matches!(
                self.resolution,
                Resolution::DeleteChild | Resolution::RestoreParent
            )
    }

    /// Keeps only the names of rows that the journal has: they are read back from there.
    pub(crate) fn shed_rows(&mut self) {
        if self.refusal.is_some() || self.reason.is_some() || self.lost_columns.is_some() || self.is_unheard()
        {
            return;
        }
        let sides = [
            (&mut self.local_tuple, self.local),
            (&mut self.remote_tuple, self.remote),
        ];
        for (tuple, version) in sides {
            if let (Tuple::Image(..) | Tuple::Json(_), Some(version)) = (&*tuple, version)
                && version.kind == Kind::Put
            {
                *tuple = Tuple::Journal(version);
            }
        }
        self.key_from = KeyFrom::Canonical;
    }

    /// Copies its rows out of the frame that they came in: a slice keeps all of that in memory.
    pub(crate) fn detach(&mut self) {
        let key_row = match &mut self.key_from {
            KeyFrom::Row(row) | KeyFrom::Key(row) => {
                *row = row.detached();
                Some(row.clone())
            }
            KeyFrom::Canonical => None,
        };
        let left = self.lost_columns.as_mut().and_then(|lost| lost.left.as_mut());
        let tuples = [&mut self.local_tuple, &mut self.remote_tuple];
        for tuple in tuples.into_iter().chain(left) {
            if let Tuple::Image(_, row) = tuple {
                // Mostly it is one row.
                *row = match &key_row {
                    Some(key_row) if *key_row == *row => key_row.clone(),
                    _ => row.detached(),
                };
            }
        }
    }

    /// Fills in the row that stands in the table, where it is the version's own; else the journal has it.
    pub(crate) fn fill_standing(&mut self, row: Option<&Read>) {
        for tuple in [&mut self.local_tuple, &mut self.remote_tuple] {
            if let Tuple::Standing(entry) = tuple {
                let own = row.filter(|row| entry.xid != 0 && row.xmin == entry.xid);
                *tuple = match own {
                    Some(row) => row.clone().tuple(Some(entry.version)),
                    None => Tuple::Journal(entry.version),
                };
            }
        }
    }

    /// Bytes of its rows, about: what is still to be read is taken to be as long as what is here.
    pub(crate) fn bytes(&self) -> usize {
        let known = |tuple: &Tuple| match tuple {
            Tuple::Image(_, row) => row.as_bytes().len(),
            Tuple::Json(json) => json.len(),
            _ => 0,
        };
        let left = self.left().map_or(0, known);
        2 * known(&self.local_tuple).max(known(&self.remote_tuple)) + left
    }

    /// The row that is folded of all versions, if it is.
    pub(crate) fn left(&self) -> Option<&Tuple> {
        self.lost_columns.as_ref()?.left.as_ref()
    }

    /// The foreign key that refers to nothing, if that is what the line is about.
    pub(crate) fn foreign_key(&self) -> Option<&str> {
        let reason = self.reason.as_ref()?.constraint.as_deref();
        reason.filter(|_| self.kind == ConflictType::ForeignKeyMissing)
    }

    /// The version that lost: names the line on every node.
    pub(crate) fn losing(&self) -> Option<Version> {
        match self.loser {
            Loser::Local => self.local,
            Loser::Remote => self.remote,
        }
    }

    /// The version that it lost to.
    pub(crate) fn winning(&self) -> Option<Version> {
        match self.loser {
            Loser::Local => self.remote,
            Loser::Remote => self.local,
        }
    }
}
