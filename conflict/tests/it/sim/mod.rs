//! A model of a whole cluster: servers with a WAL, daemons beside them, links between them.
//!
//! * [`server`] – rows, locks and the WAL; local sessions and apply transactions commit into it.
//! * [`daemon`] – decoding, row index, log, forgetting: the crate under test with the state it leaves to callers.
//! * [`apply`] – an apply transaction, statement by statement, while sessions and decoder go on.
//! * [`crash`] – checkpoints, the end of a daemon, its start.
//! * [`join`] – a node that joins while everything goes on.
//! * [`merged`] – rows whose columns are merged.
//! * [`checked`] – merged rows that a CHECK refuses.
//! * [`scripted`] – rows that a script chooses.
//! * [`collections`] – columns of sets, lists and documents: what is written, and what must come of it.
//! * [`groups`] – columns of which some are decided together.
//! * [`change`] – a policy that is changed meanwhile.
//! * [`cluster`] – the random schedule, the links, the clocks, the drain.
//! * [`oracle`] – what must have come out, from the history alone, sharing no code with the crate.
//!
//! A run is a function of its seed and its [`Rules`].

pub(crate) mod apply;
pub(crate) mod change;
pub(crate) mod checked;
pub(crate) mod cluster;
pub(crate) mod collections;
pub(crate) mod crash;
pub(crate) mod daemon;
pub(crate) mod groups;
pub(crate) mod join;
pub(crate) mod merged;
pub(crate) mod oracle;
pub(crate) mod scripted;
pub(crate) mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::frontier::Policy;
use anabranch_conflict::{Kind, Stability, Version, merge};
use anabranch_proto::{NodeId, Position, Stamp, Vector};

pub(crate) use cluster::run;

/// A row's table and primary key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) table: u8,
    pub(crate) id: u8,
}

/// A row's columns: a number that no two writes share, and where columns are merged another such, a counter and a
/// highest value; or a set, a list and a document ([`collections`]), by their numbers; or three more such numbers
/// ([`groups`]).
pub(crate) type Value = [i64; 4];

/// A transaction's writes, several to one key made one: truncates first, then rows (`None`: deleted).
#[derive(Debug, Clone, Default)]
pub(crate) struct Writes {
    /// Rows that it wrote before it truncated their tables.
    pub(crate) before: Option<Box<Writes>>,
    pub(crate) truncates: Vec<u8>,
    pub(crate) rows: BTreeMap<Key, Option<Value>>,
    /// The rows that are updates, as they were before the transaction.
    pub(crate) updated: BTreeMap<Key, Value>,
    /// The rows that were removed, be it to be put anew.
    pub(crate) replaced: BTreeSet<Key>,
    /// Nodes that become members by it.
    pub(crate) joins: Vec<NodeId>,
    /// Does it make the change of the policy?
    pub(crate) change: bool,
}

impl Writes {
    /// Rows of a table go with its truncate. They travel all the same.
    fn truncate_rows(&mut self, table: u8) {
        let of_table = |key: &Key| key.table == table;
        let before = self.before.get_or_insert_default();
        before
            .rows
            .extend(self.rows.extract_if(.., |key, _| of_table(key)));
        before
            .updated
            .extend(self.updated.extract_if(.., |key, _| of_table(key)));
        before
            .replaced
            .extend(self.replaced.extract_if(.., |key| of_table(key)));
    }
}

/// A stamped transaction, as it travels.
#[derive(Debug)]
pub(crate) struct Txn {
    pub(crate) stamp: Stamp,
    pub(crate) position: Position,
    pub(crate) deps: Vector,
    pub(crate) writes: Writes,
}

impl Txn {
    /// It as far as it had come when it truncated the table of a row that it had written by then.
    pub(crate) fn before_truncate(&self, key: Key) -> Option<Self> {
        let before = self.writes.before.as_deref()?;
        before.rows.contains_key(&key).then(|| Self {
            stamp: self.stamp,
            position: self.position,
            deps: self.deps.clone(),
            writes: before.clone(),
        })
    }

    pub(crate) fn version(&self, key: Key) -> Version {
        let kind = if self.writes.rows[&key].is_some() {
            Kind::Put
        } else {
            Kind::Delete
        };
        Version {
            stamp: self.stamp,
            position: self.position,
            kind,
        }
    }
}

/// What a node's stream is made of.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Txn(Rc<Txn>),
    /// What the node had applied at this place of its stream.
    Heartbeat(Vector),
}

impl Item {
    /// Takes in what the item, once `origin`'s stream is applied up to it, says of `origin`.
    pub(crate) fn observe(&self, origin: NodeId, stability: &mut Stability) {
        match self {
            Self::Heartbeat(vector) => stability.observe(origin, vector),
            Self::Txn(txn) => {
                let mut vector = txn.deps.clone();
                vector.raise(origin, txn.position);
                stability.observe(origin, &vector);
            }
        }
    }
}

/// Who wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Arbiter {
    LastWriter,
    /// Wrong: of two concurrent versions with one time, the one of the deciding node wins.
    LocalOnEqualTime,
    /// Wrong: origin priority, compared with the row's current version only.
    PriorityOfCurrent,
    /// A policy over the full frontier.
    Ranked(Policy),
    /// Columns are merged, or a script chooses.
    Merged(Merging),
}

/// How columns are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Merging {
    /// Versions are folded again, the stable lowest ones into the base, or let go where all others cover them.
    Folded,
    /// Wrong: into the row as it is, as they arrive.
    Incremental,
    /// Wrong: whatever is stable is folded into the base.
    ForgetAnyStable,
    /// Wrong: what all others cover is let go, stable or not.
    LetGoUnstable,
    /// Wrong: the stable lowest ones are let go, whoever covers them.
    LetGoUncovered,
    /// Wrong: one column into the row as it is, as updates arrive.
    Arriving(usize),
    /// A script chooses among the versions that no other covers.
    Chosen(Choice),
    /// Wrong: it chooses between what the row shows and what comes in.
    ChosenOfTwo(Choice),
}

impl Merging {
    pub(crate) const fn choice(self) -> Option<Choice> {
        match self {
            Self::Chosen(choice) | Self::ChosenOfTwo(choice) => Some(choice),
            _ => None,
        }
    }
}

/// What a script chooses: see [`scripted`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The highest last column, a delete counting as 50; then the highest stamp.
    Highest,
    /// The middle one, by stamp: what comes in can make another than itself or the former choice win.
    Middle,
    /// It fails where a last column can be divided by three, else the lowest stamp.
    Failing,
    /// By either of two policies: see [`change`].
    Changed(change::Switch),
}

/// Which columns a table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Columns {
    /// Numbers: see [`merged`].
    Numbers,
    /// The same, of which daemons see the last column with the other sign, and merge it by this rule: its highest value is
    /// their least.
    Mirrored(merge::Rule),
    /// A number, and see [`collections`]; with their rules.
    Collections([merge::Rule; 4]),
    /// Numbers that the last writer decides, those of one group together. The groups that daemons merge by, and those
    /// that are meant.
    Groups(groups::Of, groups::Of),
}

/// Node 1 first, then 2, ...
pub(crate) fn priority(node: NodeId) -> u32 {
    100 - u32::from(node.0)
}

/// How the others come to know a node that joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joining {
    /// From the donor's stream, at a place before the donor's copy is cut.
    ThroughStream,
    /// Wrong: from the donor's stream, but after the cut.
    AfterCut,
    /// Wrong: when they first meet its stream.
    OnSight,
}

/// What makes a daemon repair a row when the decoder meets a local write of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reconcile {
    /// Whenever an apply transaction that is later in the WAL has looked at the row.
    Always,
    /// Wrong: only when the local write wins over an applied one and is a delete.
    WinningDeletes,
    /// Wrong: the index is put right, the row is not.
    Never,
}

/// How the daemons of a run behave. The default is right; each control breaks one thing.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) arbiter: Arbiter,
    /// What is written where columns are merged.
    pub(crate) columns: Columns,
    pub(crate) reconcile: Reconcile,
    /// Statements check the row they find against the horizon.
    pub(crate) guard: bool,
    /// The slow path waits for the decoder before it decides again.
    pub(crate) fence: bool,
    /// Vectors are believed when met, not when their stream is applied up to them.
    pub(crate) gossip: bool,
    /// Heartbeats tell what is applied, not what is decoded as applied.
    pub(crate) hasty_heartbeats: bool,
    /// Tombstones are dropped without waiting for stability.
    pub(crate) drop_tombstones: bool,
    /// Rows with a repair under way are forgotten like others.
    pub(crate) forget_under_repair: bool,
    /// Checkpoints move past what decoding has found to do.
    pub(crate) careless_checkpoints: bool,
    /// Own writes decoded again after a crash are not checked against answers to them.
    pub(crate) forget_answers: bool,
    /// The node that logs is part of a conflict's id.
    pub(crate) own_ids: bool,
    /// Server clocks stand still, so that times collide.
    pub(crate) frozen_clocks: bool,
    pub(crate) truncates: bool,
    pub(crate) joining: Joining,
    /// Small clusters, short runs, and many joins.
    pub(crate) join_often: bool,
    /// A joiner looks again at the rows of its copy that are not settled yet.
    pub(crate) joiner_repairs: bool,
    /// A joiner takes over what its donor remembers of unsettled rows.
    pub(crate) joiner_index: bool,
    /// The journal lets go whatever is stable, at once.
    pub(crate) hasty_trimming: bool,
    /// A version that becomes the winner again is not written: only what comes in is.
    pub(crate) forget_comebacks: bool,
    /// A truncate looks at the version that a row shows, and leaves the rest of its frontier.
    pub(crate) truncate_spares_losers: bool,
    /// The journal lets go whole files, with so many items of each stream; and of stamps only what was heard last of each node
    /// is known, as daemons do.
    pub(crate) coarse_trimming: Option<usize>,
    /// The policy is changed meanwhile.
    pub(crate) change: Option<change::Switch>,
    /// Tables have a CHECK over a merged column.
    pub(crate) check: Option<checked::Check>,
}

impl Rules {
    /// What a script chooses, if one does.
    pub(crate) const fn choice(&self) -> Option<Choice> {
        match self.arbiter {
            Arbiter::Merged(how) => how.choice(),
            _ => None,
        }
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            arbiter: Arbiter::LastWriter,
            columns: Columns::Numbers,
            reconcile: Reconcile::Always,
            guard: true,
            fence: true,
            gossip: false,
            hasty_heartbeats: false,
            drop_tombstones: false,
            forget_under_repair: false,
            careless_checkpoints: false,
            forget_answers: false,
            own_ids: false,
            frozen_clocks: false,
            truncates: true,
            joining: Joining::ThroughStream,
            join_often: false,
            joiner_repairs: true,
            joiner_index: true,
            hasty_trimming: false,
            forget_comebacks: false,
            truncate_spares_losers: false,
            coarse_trimming: None,
            change: None,
            check: None,
        }
    }
}

/// How often the interesting things happened, so that a run that tries nothing is noticed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) txns: u32,
    pub(crate) truncates: u32,
    pub(crate) deletes: u32,
    pub(crate) moves: u32,
    pub(crate) cut_off: u32,
    pub(crate) clamped: u32,
    pub(crate) relayed: u32,
    pub(crate) guard_failed: u32,
    pub(crate) fenced: u32,
    pub(crate) met_late_local_won: u32,
    pub(crate) met_late_applied_won: u32,
    pub(crate) changed_before_commit: u32,
    pub(crate) repairs_that_wrote: u32,
    pub(crate) forgotten: u32,
    pub(crate) logged: u32,
    pub(crate) must_log: u32,
    pub(crate) truncate_lost_rows: u32,
    pub(crate) crashes: u32,
    pub(crate) answered_before: u32,
    pub(crate) joins: u32,
    pub(crate) joiner_txns: u32,
    pub(crate) comebacks: u32,
    pub(crate) merges: u32,
    pub(crate) left_out: u32,
    pub(crate) let_go: u32,
    pub(crate) compacted: u32,
    pub(crate) lowered: u32,
    pub(crate) changes: u32,
    pub(crate) switched: u32,
    /// Writes while some nodes have forgotten the policy of before, and others have not.
    pub(crate) between: u32,
    /// Rows that must be decided by the policy of before, although one of their versions is new.
    pub(crate) mixed: u32,
    /// Rows with several versions, all of them new.
    pub(crate) all_new: u32,
    /// Merged rows that a CHECK refused; those that left the quarantine, since a later version made them fit, or a local one took
    /// their place; and those that wait in the end.
    pub(crate) refused: u32,
    pub(crate) fitted: u32,
    pub(crate) decided: u32,
    pub(crate) waiting: u32,
}

impl Counts {
    /// All but those that only some policies have.
    pub(crate) fn all(&self) -> [(&'static str, u32); 21] {
        [
            ("transactions", self.txns),
            ("truncates", self.truncates),
            ("deletes", self.deletes),
            ("changes of a key", self.moves),
            ("nodes that a partition cuts off", self.cut_off),
            ("clamped stamps", self.clamped),
            ("relayed items", self.relayed),
            ("failed guards", self.guard_failed),
            ("fences", self.fenced),
            ("late local writes that won", self.met_late_local_won),
            ("late local writes that lost", self.met_late_applied_won),
            ("rows decided again at commit", self.changed_before_commit),
            ("repairs that wrote", self.repairs_that_wrote),
            ("forgotten entries", self.forgotten),
            ("logged losers", self.logged),
            ("losers that must be logged", self.must_log),
            ("rows lost to a truncate", self.truncate_lost_rows),
            ("crashes", self.crashes),
            ("writes decoded again after an answer", self.answered_before),
            ("joins", self.joins),
            ("transactions of joiners", self.joiner_txns),
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.txns += other.txns;
        self.truncates += other.truncates;
        self.deletes += other.deletes;
        self.moves += other.moves;
        self.cut_off += other.cut_off;
        self.clamped += other.clamped;
        self.relayed += other.relayed;
        self.guard_failed += other.guard_failed;
        self.fenced += other.fenced;
        self.met_late_local_won += other.met_late_local_won;
        self.met_late_applied_won += other.met_late_applied_won;
        self.changed_before_commit += other.changed_before_commit;
        self.repairs_that_wrote += other.repairs_that_wrote;
        self.forgotten += other.forgotten;
        self.logged += other.logged;
        self.must_log += other.must_log;
        self.truncate_lost_rows += other.truncate_lost_rows;
        self.crashes += other.crashes;
        self.answered_before += other.answered_before;
        self.joins += other.joins;
        self.joiner_txns += other.joiner_txns;
        self.comebacks += other.comebacks;
        self.merges += other.merges;
        self.left_out += other.left_out;
        self.let_go += other.let_go;
        self.compacted += other.compacted;
        self.lowered += other.lowered;
        self.changes += other.changes;
        self.switched += other.switched;
        self.between += other.between;
        self.mixed += other.mixed;
        self.all_new += other.all_new;
        self.refused += other.refused;
        self.fitted += other.fitted;
        self.decided += other.decided;
        self.waiting += other.waiting;
    }
}
