//! One node: two tables, of which one refers to the other, a decoder that lags behind, an applier that looks for orphans, and
//! what mends them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::rc::Rc;

use anabranch_conflict::orphan::{self, Orphan, Parent};
use anabranch_conflict::policy::ForeignKeys;
use anabranch_conflict::record::foreign_key_id;
use anabranch_conflict::{Fold, Kind, Stability, Verdict, Version, admit};
use anabranch_proto::{NodeId, Position, Stamp, Vector};
use uuid::Uuid;

use super::Broken;
use crate::delivery::{Inbox, deliverable};

pub(super) type Id = u8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Parent(Id),
    Child(Id),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    /// Of a child: the parent that it refers to.
    pub(super) parent: Option<Id>,
    /// No two writes share one.
    pub(super) value: u64,
}

pub(super) type Table = BTreeMap<Key, Row>;
pub(super) type Writes = BTreeMap<Key, Option<Row>>;

#[derive(Debug)]
pub(super) struct Txn {
    pub(super) stamp: Stamp,
    pub(super) position: Position,
    pub(super) deps: Vector,
    pub(super) writes: Writes,
    /// The line that it works off, where no session wrote it.
    pub(super) mends: Option<Uuid>,
}

impl Txn {
    pub(super) fn version(&self, key: Key) -> Option<Version> {
        let kind = match self.writes.get(&key)? {
            Some(_) => Kind::Put,
            None => Kind::Delete,
        };
        Some(Version {
            stamp: self.stamp,
            position: self.position,
            kind,
        })
    }

    pub(super) fn is_in(&self, vector: &Vector) -> bool {
        vector.covers(self.stamp.node, self.position)
    }
}

/// Does a child refer to nothing?
pub(super) fn is_orphan(table: &Table, child: Id) -> bool {
    let row = table.get(&Key::Child(child));
    let parent = row.and_then(|row| row.parent);
    parent.is_some_and(|parent| !table.contains_key(&Key::Parent(parent)))
}

/// The children of a parent.
pub(super) fn children(table: &Table, parent: Id) -> impl Iterator<Item = (Id, Row)> {
    table.iter().filter_map(move |(key, row)| match key {
        Key::Child(child) if row.parent == Some(parent) => Some((*child, *row)),
        _ => None,
    })
}

/// What became of a line at the node that is to mend its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note {
    Mended,
    /// The row had a parent by then, or was gone.
    NotNeeded,
    /// Nothing is known of the parent.
    NotKnown,
    /// By a person, at a node that waited.
    Closed,
}

#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) child: Id,
    pub(super) parent: Id,
    /// The child's version, if that names the line.
    pub(super) version: Option<Version>,
    /// Who is to mend it.
    pub(super) writer: NodeId,
    /// Both sides, as far as they are known.
    pub(super) places: Vec<(NodeId, Position)>,
    /// What the parent was.
    again: Option<Row>,
    pub(super) note: Option<Note>,
    /// Which of this node's lines it is.
    at: usize,
}

enum Wal {
    Local(Writes, i64, Position, Option<Uuid>),
    Echo(Vec<(NodeId, Position, Stamp)>),
}

/// How often what happened.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Seen {
    pub(super) incoming: u64,
    pub(super) bereft: u64,
    pub(super) knowing: u64,
    pub(super) fences: u64,
    pub(super) repairs: u64,
    pub(super) forgotten: u64,
    pub(super) mended: u64,
    pub(super) not_needed: u64,
    pub(super) left: u64,
}

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) policy: ForeignKeys,
    broken: Option<Broken>,
    pub(super) table: Table,
    wal: VecDeque<Wal>,
    next_lsn: u64,
    /// The last own commit.
    last: Position,
    fold: Fold,
    index: BTreeMap<Key, Version>,
    known: BTreeMap<Stamp, Rc<Txn>>,
    pub(super) inbox: Inbox<Txn>,
    applied: Vector,
    stability: Stability,
    found: BTreeSet<Key>,
    pub(super) log: BTreeMap<Uuid, Line>,
    /// Of other nodes' lines whose rows are orphans no more: what was applied when that was seen.
    others_mended: BTreeMap<Uuid, Vector>,
    pub(super) seen: Seen,
    pub(super) trace: bool,
}

impl Node {
    pub(super) fn new(id: NodeId, members: &[NodeId], policy: ForeignKeys, broken: Option<Broken>) -> Self {
        Self {
            id,
            policy,
            broken,
            table: Table::new(),
            wal: VecDeque::new(),
            next_lsn: 10,
            last: Position::ZERO,
            fold: Fold::new(id),
            index: BTreeMap::new(),
            known: BTreeMap::new(),
            inbox: BTreeMap::new(),
            applied: Vector::new(),
            stability: Stability::new(members.iter().copied()),
            found: BTreeSet::new(),
            log: BTreeMap::new(),
            others_mended: BTreeMap::new(),
            seen: Seen::default(),
            trace: false,
        }
    }

    /// A session commits, if the server lets it: it checks a child that is new or refers to another parent than before, and
    /// that no parent goes which has children.
    pub(super) fn write(&mut self, writes: Writes, now_us: i64) -> bool {
        let mut after = self.table.clone();
        for (&key, row) in &writes {
            match row {
                Some(row) => after.insert(key, *row),
                None => after.remove(&key),
            };
        }
        let holds = writes.iter().all(|(key, row)| match (key, row) {
            (Key::Child(child), Some(row)) => {
                let before = self.table.get(key);
                before.is_some_and(|before| before.parent == row.parent) || !is_orphan(&after, *child)
            }
            (Key::Parent(parent), None) => children(&after, *parent).next().is_none(),
            _ => true,
        });
        if holds {
            let knows = |(key, row): (&Key, &Option<Row>)| match key {
                Key::Child(child) => row.is_some() && is_orphan(&after, *child),
                Key::Parent(_) => false,
            };
            self.seen.knowing += u64::from(writes.iter().any(knows));
            self.table = after;
            self.commit(writes, now_us, None);
        }
        holds
    }

    fn commit(&mut self, writes: Writes, now_us: i64, mends: Option<Uuid>) {
        self.next_lsn += 10;
        self.last = Position::new(1, self.next_lsn);
        self.wal.push_back(Wal::Local(writes, now_us, self.last, mends));
    }

    /// The decoder meets what comes next in the WAL. A local transaction is given back, for the peers.
    pub(super) fn decode(&mut self) -> Option<Rc<Txn>> {
        match self.wal.pop_front()? {
            Wal::Echo(progress) => {
                self.fold.echo(progress);
                None
            }
            Wal::Local(writes, now_us, position, mends) => {
                let stamp = self.fold.begin_local(now_us, 1 << 40).stamp;
                let deps = self.fold.commit_local(position).unwrap();
                let txn = Rc::new(Txn {
                    stamp,
                    position,
                    deps,
                    writes,
                    mends,
                });
                self.tell(|| format!("decodes {txn:?}"));
                self.resolve(&txn, true);
                Some(txn)
            }
        }
    }

    /// Everything that is committed is decoded.
    pub(super) fn fence(&mut self, sent: &mut Vec<Rc<Txn>>) {
        while !self.wal.is_empty() {
            sent.extend(self.decode());
        }
    }

    fn resolve(&mut self, txn: &Rc<Txn>, local: bool) {
        self.known.insert(txn.stamp, Rc::clone(txn));
        for &key in txn.writes.keys() {
            let version = txn.version(key).unwrap();
            let verdict = admit(self.index.get(&key), &version, &txn.deps);
            if local && matches!(verdict, Verdict::WinsOver | Verdict::Loses) {
                self.found.insert(key);
            }
            if matches!(verdict, Verdict::Wins | Verdict::WinsOver) {
                self.index.insert(key, version);
            }
        }
    }

    /// Origins whose next transaction may be applied.
    pub(super) fn deliverable(&self) -> Vec<NodeId> {
        let known = (self.fold.vector(), &self.applied);
        deliverable(&self.inbox, self.id, known, |txn| &txn.deps)
    }

    /// Is the row there, and last written by a session whose commit is not decoded?
    fn is_unknown(&self, key: Key) -> bool {
        let touched = |entry: &Wal| matches!(entry, Wal::Local(writes, ..) if writes.contains_key(&key));
        self.table.contains_key(&key) && self.wal.iter().any(touched)
    }

    /// One apply transaction: the next ones of some origins, of those in `order` at most `most`; and then what it leaves without
    /// parents.
    pub(super) fn apply(&mut self, order: &[NodeId], most: usize, sent: &mut Vec<Rc<Txn>>) -> bool {
        let mut batch: Vec<Rc<Txn>> = Vec::new();
        while batch.len() < most {
            let ready = self.deliverable();
            let Some(&origin) = order.iter().find(|origin| ready.contains(origin)) else {
                break;
            };
            let txn = self.inbox.get_mut(&origin).unwrap().pop_front().unwrap();
            self.resolve(&txn, false);
            self.applied.raise(origin, txn.position);
            batch.push(txn);
        }
        let keys: BTreeSet<Key> = batch.iter().flat_map(|txn| txn.writes.keys().copied()).collect();
        if keys.iter().any(|key| self.is_unknown(*key)) {
            self.fence(sent);
        }
        let due = |key: &Key| {
            let version = *self.index.get(key)?;
            // Where that lost to a later write, this stands, or a repair sees to it.
            let came_in = batch.iter().find(|txn| txn.stamp == version.stamp)?;
            Some((*key, (version, came_in.writes[key])))
        };
        let due: BTreeMap<Key, (Version, Option<Row>)> = keys.iter().filter_map(due).collect();
        let names = || {
            batch
                .iter()
                .map(|txn| (txn.stamp.node, txn.position))
                .collect::<Vec<_>>()
        };
        self.tell(|| format!("applies {:?}, of which {due:?}", names()));
        self.put(&due, sent);
        let mut progress: BTreeMap<NodeId, (Position, Stamp)> = BTreeMap::new();
        for txn in &batch {
            progress.insert(txn.stamp.node, (txn.position, txn.stamp));
            let mut knows = txn.deps.clone();
            knows.raise(txn.stamp.node, txn.position);
            self.stability.observe(txn.stamp.node, &knows);
        }
        if !batch.is_empty() {
            let progress = progress.into_iter();
            let progress = progress.map(|(node, (position, stamp))| (node, position, stamp));
            self.wal.push_back(Wal::Echo(progress.collect()));
        }
        !batch.is_empty()
    }

    /// Makes the rows of findings what the index says, and looks for what that leaves without parents.
    pub(super) fn repair(&mut self, sent: &mut Vec<Rc<Txn>>) {
        self.fence(sent);
        let found = std::mem::take(&mut self.found);
        let due = found.iter().filter_map(|key| {
            let version = *self.index.get(key)?;
            Some((*key, (version, self.known[&version.stamp].writes[key])))
        });
        let due: BTreeMap<Key, (Version, Option<Row>)> = due
            .filter(|(key, (_, row))| self.table.get(key) != row.as_ref())
            .collect();
        self.seen.repairs += due.len() as u64;
        self.tell(|| format!("repairs {due:?}"));
        self.put(&due, sent);
    }

    /// Writes rows, and looks at what they leave.
    fn put(&mut self, due: &BTreeMap<Key, (Version, Option<Row>)>, sent: &mut Vec<Rc<Txn>>) {
        let mut gone = Table::new();
        for (&key, (_, row)) in due {
            let before = match row {
                Some(row) => self.table.insert(key, *row),
                None => self.table.remove(&key),
            };
            if let (Some(before), None) = (before, row) {
                gone.insert(key, before);
            }
        }
        // Those that are found as children first: they are told as what came in.
        let mut suspects: BTreeMap<Id, Option<Version>> = BTreeMap::new();
        for (key, (_, row)) in due {
            if let (Key::Child(child), Some(_)) = (key, row)
                && is_orphan(&self.table, *child)
            {
                suspects.insert(*child, None);
            }
        }
        for (key, (version, row)) in due {
            if let (Key::Parent(parent), None) = (key, row)
                && self.broken != Some(Broken::WrittenRowsOnly)
                && !self.table.contains_key(key)
            {
                for (child, _) in children(&self.table, *parent) {
                    suspects.entry(child).or_insert(Some(*version));
                }
            }
        }
        if suspects.is_empty() {
            return;
        }
        if self.broken != Some(Broken::NoFence) {
            self.seen.fences += u64::from(!self.wal.is_empty());
            self.fence(sent);
        }
        for (child, removed_by) in suspects {
            self.judge(child, removed_by, &gone);
        }
    }

    fn judge(&mut self, child: Id, removed_by: Option<Version>, gone: &Table) {
        let key = Key::Child(child);
        let parent = self.table[&key].parent.unwrap();
        let current = self.index.get(&key).copied();
        if current.is_some_and(|version| version.kind == Kind::Delete) {
            // It is about to go itself.
            return;
        }
        let of_parent = match self.index.get(&Key::Parent(parent)) {
            Some(version) if version.kind == Kind::Delete => Parent::Deleted(*version),
            _ => Parent::Unknown,
        };
        let orphan = Orphan {
            child: current,
            parent: of_parent,
            removed_by,
            to_primary: true,
        };
        let had_seen = |one: Version, other: Version| -> Result<bool, Infallible> {
            Ok(one.stamp == other.stamp || other.covered_by(&self.known[&one.stamp].deps))
        };
        let Ok(Some(sides)) = orphan::judge(&orphan, had_seen) else {
            return;
        };
        let named = sides.child.or(sides.removed_by).unwrap();
        let id = foreign_key_id("public", "child", "parent", &[child], named.stamp);
        if self.log.contains_key(&id) {
            return;
        }
        if removed_by.is_none() {
            self.seen.incoming += 1;
        } else {
            self.seen.bereft += 1;
        }
        let sides_known = sides.child.into_iter().chain(sides.removed_by);
        let line = Line {
            child,
            parent,
            version: sides.child,
            writer: named.origin(),
            places: sides_known
                .map(|version| (version.origin(), version.position))
                .collect(),
            again: gone.get(&Key::Parent(parent)).copied(),
            note: None,
            at: self.log.len(),
        };
        self.tell(|| format!("logs {id} {line:?}"));
        self.log.insert(id, line);
        if self.broken == Some(Broken::ByEachApplier) {
            self.table.remove(&key);
        }
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:?} {}", self.id, what());
        }
    }

    fn stable(&mut self) -> Vector {
        let seen = self.fold.vector().clone();
        self.stability.observe(self.id, &seen);
        self.stability.stable()
    }

    /// This node's own lines that are still to be worked off, in the order in which they were found.
    pub(super) fn open(&self) -> Vec<Uuid> {
        let own = self
            .log
            .iter()
            .filter(|(_, line)| line.writer == self.id && line.note.is_none());
        let mut own: Vec<(usize, Uuid)> = own.map(|(id, line)| (line.at, *id)).collect();
        own.sort_unstable();
        own.into_iter().map(|(_, id)| id).collect()
    }

    /// Works off what may be. Gives the lines of others that own ones are left to.
    pub(super) fn mend(&mut self, now_us: i64) -> Vec<Uuid> {
        let mut left = Vec::new();
        if self.policy == ForeignKeys::Keep || self.broken == Some(Broken::ByEachApplier) {
            return left;
        }
        let stable = self.stable();
        let open = self.open();
        if open.is_empty() {
            self.others_mended.clear();
        }
        for id in open {
            let line = self.log[&id].clone();
            let mut places = line.places.iter();
            let is_met = places.all(|(node, position)| stable.covers(*node, *position));
            if !is_met && self.broken != Some(Broken::Hasty) {
                continue;
            }
            if is_orphan(&self.table, line.child) && !self.is_met(line.child, &stable) {
                continue;
            }
            let is_to_be = is_orphan(&self.table, line.child)
                || self.broken == Some(Broken::LooksOnce) && self.table.contains_key(&Key::Child(line.child));
            let writes = match (is_to_be, self.policy, line.again) {
                (false, ..) => Err(Note::NotNeeded),
                (true, ForeignKeys::DeleteChild, _) => Ok((Key::Child(line.child), None)),
                (true, _, None) => Err(Note::NotKnown),
                (true, _, Some(again)) => {
                    if let Some(other) = self.left_to(&line, &stable) {
                        self.seen.left += 1;
                        left.push(other);
                        continue;
                    }
                    // The parent of the row as it is now.
                    let is_same = self.table[&Key::Child(line.child)].parent == Some(line.parent);
                    if is_same {
                        Ok((Key::Parent(line.parent), Some(again)))
                    } else {
                        Err(Note::NotKnown)
                    }
                }
            };
            let note = match writes {
                Err(note) => note,
                Ok((key, row)) => {
                    match row {
                        Some(row) => self.table.insert(key, row),
                        None => self.table.remove(&key),
                    };
                    self.commit(Writes::from([(key, row)]), now_us, Some(id));
                    self.seen.mended += 1;
                    Note::Mended
                }
            };
            self.tell(|| format!("is done with {id}: {note:?}"));
            self.seen.not_needed += u64::from(note == Note::NotNeeded);
            self.log.get_mut(&id).unwrap().note = Some(note);
        }
        left
    }

    /// Have all met the version that an orphan has by now, and what took its parent last? It may have been written again since its
    /// line was, or have lost its parent once more.
    fn is_met(&self, child: Id, stable: &Vector) -> bool {
        let parent = self.table[&Key::Child(child)].parent.unwrap();
        let keys = [Key::Child(child), Key::Parent(parent)];
        let mut known = keys.iter().filter_map(|key| self.index.get(key));
        known.all(|version| version.covered_by(stable))
            || matches!(self.broken, Some(Broken::Hasty | Broken::OldSides))
    }

    /// Another member's line that may bring the row's parent back still, or have done so without its being known here: a later one of
    /// this row, or that of a member before this one of another row with the same parent.
    fn left_to(&mut self, line: &Line, stable: &Vector) -> Option<Uuid> {
        if self.broken == Some(Broken::AllRestore) {
            return None;
        }
        let is_later = |other: &Line, than: &Line| other.child == than.child && other.at > than.at;
        let is_rival = |rival: &Line| {
            let is_lower = rival.writer < self.id && rival.parent == line.parent;
            let is_open = rival.writer != self.id && rival.note.is_none();
            let is_first = if rival.child == line.child {
                is_later(rival, line)
            } else {
                is_lower
            };
            is_open && is_first
        };
        // Who wrote it leaves it to who wrote the row since, as soon as it knows.
        let is_left = |rival: &Line| {
            let is_others = |other: &Line| is_later(other, rival) && other.writer != rival.writer;
            let is_met = |other: &Line| {
                let mut places = other.places.iter();
                places.all(|(node, position)| stable.covers(*node, *position))
            };
            let mut others = self.log.values();
            others.any(|other| other.note.is_none() && is_others(other) && is_met(other))
        };
        let rivals = self.log.iter();
        let rivals = rivals.filter(|(_, rival)| is_rival(rival) && !is_left(rival));
        let mut rivals: Vec<(NodeId, Uuid, Id)> = rivals
            .map(|(id, rival)| (rival.writer, *id, rival.child))
            .collect();
        rivals.sort_unstable();
        for (_, id, child) in rivals {
            if is_orphan(&self.table, child) {
                self.others_mended.remove(&id);
                return Some(id);
            }
            let mut applied = self.applied.clone();
            applied.raise(self.id, self.last);
            let seen = self.others_mended.entry(id).or_insert(applied);
            if !stable.includes(seen) {
                return Some(id);
            }
        }
        None
    }

    /// The daemon starts again: what its tables and its log do not say is gone.
    pub(super) fn restart(&mut self) {
        self.others_mended.clear();
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.wal.is_empty() && self.found.is_empty() && self.inbox.values().all(VecDeque::is_empty)
    }

    /// Forgets what is stable.
    pub(super) fn forget(&mut self) {
        if !self.found.is_empty() {
            return;
        }
        let stable = match self.broken {
            Some(Broken::Forgetful) => self.fold.vector().clone(),
            _ => self.stable(),
        };
        let before = self.index.len();
        self.index.retain(|_, version| !version.covered_by(&stable));
        self.seen.forgotten += (before - self.index.len()) as u64;
    }
}
