//! What must have come out of a run, computed from the whole history by brute force. Shares no code with the
//! crate: who had seen what is recorded by the servers, not by the fold.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anabranch_conflict::frontier::{Deletes, Order, Policy};
use anabranch_proto::Stamp;

use super::daemon::Daemon;
use super::{
    Arbiter, Choice, Columns, Counts, Key, Rules, Txn, Value, change, checked, collections, groups, priority,
};

/// A local transaction, and per node the position up to which its server had applied when it committed.
pub(crate) struct Event {
    pub(crate) txn: Rc<Txn>,
    pub(crate) truth: BTreeMap<u16, u64>,
}

impl Event {
    fn saw(&self, other: &Self) -> bool {
        self.truth
            .get(&other.txn.stamp.node.0)
            .is_some_and(|&upto| upto >= other.txn.position.lsn.0)
    }
}

/// What was wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A stamp or a dependency is not what really happened.
    Stamps(String),
    /// Nodes hold different rows, or not the rows they should.
    Rows(String),
    /// A committed write was overwritten by an older one, if only for a moment.
    Overwritten(String),
    /// A lost write is not in a node's log.
    Missing(String),
    /// The log holds what was not lost to a concurrent write.
    Unfounded(String),
    /// The cluster did not come to rest, or did not forget.
    Stuck(String),
}

/// One version of a row: by a write of the row itself, or by a truncate of its table.
struct Candidate<'a> {
    event: &'a Event,
    by_truncate: bool,
}

impl Candidate<'_> {
    fn covers(&self, other: &Self) -> bool {
        if Rc::ptr_eq(&self.event.txn, &other.event.txn) {
            return other.by_truncate && !self.by_truncate;
        }
        self.event.saw(other.event)
    }

    fn order(&self) -> (u64, u16, bool) {
        let stamp = self.event.txn.stamp;
        (stamp.time.as_u64(), stamp.node.0, !self.by_truncate)
    }
}

fn check_stamps(history: &[Event]) -> Result<(), Failure> {
    for event in history {
        let deps: BTreeMap<u16, u64> = event
            .txn
            .deps
            .iter()
            .map(|(node, at)| (node.0, at.lsn.0))
            .collect();
        if deps != event.truth {
            return Err(Failure::Stamps(format!(
                "{:?} depends on {deps:?}, not on {:?}",
                event.txn, event.truth
            )));
        }
        for other in history {
            if event.saw(other) && event.txn.stamp <= other.txn.stamp {
                return Err(Failure::Stamps(format!("{:?} saw {:?}", event.txn, other.txn)));
            }
        }
    }
    let stamps: BTreeSet<Stamp> = history.iter().map(|event| event.txn.stamp).collect();
    if stamps.len() < history.len() {
        return Err(Failure::Stamps("two transactions share a stamp".to_owned()));
    }
    Ok(())
}

/// Checks a run that has come to rest; returns how many losers every log had to hold.
pub(crate) fn check(
    history: &[Event],
    nodes: &[Daemon],
    keys: &[Key],
    rules: &Rules,
    counts: &mut Counts,
) -> Result<u32, Failure> {
    check_stamps(history)?;
    if rules.arbiter == Arbiter::LastWriter {
        check_overwritten(history, nodes)?;
    }
    let rows = |node: &Daemon| -> BTreeMap<Key, Value> {
        node.server
            .rows
            .iter()
            .map(|(key, row)| (*key, row.value))
            .collect()
    };
    let mut first = rows(&nodes[0]);
    if rules.check.is_some() {
        first = checked::rows(nodes, keys, counts)?;
    }
    for node in &nodes[1..] {
        if rules.check.is_none() && rows(node) != first {
            let (a, b) = (nodes[0].node, node.node);
            return Err(Failure::Rows(format!(
                "{a:?} holds {first:?}, {b:?} holds {:?}",
                rows(node)
            )));
        }
    }
    let policy = match &rules.arbiter {
        Arbiter::LastWriter => None,
        Arbiter::Ranked(policy) => Some(policy),
        Arbiter::Merged(_) => None,
        Arbiter::PriorityOfCurrent | Arbiter::LocalOnEqualTime => return Ok(0),
    };
    let merged = matches!(rules.arbiter, Arbiter::Merged(_));
    let (mut may, mut must) = (BTreeSet::new(), BTreeSet::new());
    for &key in keys {
        let truth = policy.map_or_else(
            || match (rules.choice(), rules.columns) {
                (Some(choice), _) => chosen_truth(history, key, choice, counts),
                (None, _) if !merged => truth_of(history, key),
                (None, Columns::Collections(_)) => collections_truth(history, key),
                (None, Columns::Numbers | Columns::Mirrored(_)) => merged_truth(history, key, &[0, 1]),
                (None, Columns::Groups(merged, _)) => merged_truth(history, key, &merged),
            },
            |policy| ranked_truth(history, key, policy),
        );
        if first.get(&key).copied() != truth.value {
            return Err(Failure::Rows(format!(
                "{key:?} is {:?}, must be {:?}",
                first.get(&key),
                truth.value
            )));
        }
        // Of a chosen row, that it is the chosen one is all that there is to it.
        match rules.columns {
            _ if !merged || rules.choice().is_some() => {}
            Columns::Collections(_) => check_collections(history, key, truth.value)?,
            // Who writes over a row that waits decides all of it, by what is shown there.
            Columns::Numbers | Columns::Mirrored(_) if nodes.iter().any(|node| node.waiting.held(key)) => {}
            Columns::Numbers | Columns::Mirrored(_) => check_meaning(history, key, truth.value)?,
            Columns::Groups(_, meant) => check_groups(history, key, truth.value, &meant)?,
        }
        may.extend(truth.may.into_iter().map(|loser| (key, loser)));
        must.extend(truth.must.into_iter().map(|loser| (key, loser)));
    }
    check_ids(nodes)?;
    for node in nodes {
        let logged: BTreeSet<(Key, Stamp)> = node.log.values().copied().collect();
        // A joiner's log is a copy of its donor's as it was then, and goes on from there.
        if let Some(missing) = must.difference(&logged).next()
            && !node.joined
        {
            return Err(Failure::Missing(format!("{missing:?} at {:?}", node.node)));
        }
        if let Some(unfounded) = logged.difference(&may).next() {
            return Err(Failure::Unfounded(format!("{unfounded:?} at {:?}", node.node)));
        }
    }
    Ok(must.len() as u32)
}

/// A loser has one id, in every log.
fn check_ids(nodes: &[Daemon]) -> Result<(), Failure> {
    let mut ids = BTreeMap::new();
    for node in nodes {
        for (id, loser) in &node.log {
            if ids.insert(loser, id).is_some_and(|other| other != id) {
                return Err(Failure::Unfounded(format!(
                    "{loser:?} has another id at {:?}",
                    node.node
                )));
            }
        }
    }
    Ok(())
}

fn candidates(history: &[Event], key: Key) -> Vec<Candidate<'_>> {
    let mut candidates = Vec::new();
    for event in history {
        if event.txn.writes.truncates.contains(&key.table) {
            candidates.push(Candidate {
                event,
                by_truncate: true,
            });
        }
        if event.txn.writes.rows.contains_key(&key) {
            candidates.push(Candidate {
                event,
                by_truncate: false,
            });
        }
    }
    candidates
}

/// Of each, which of the others it covers, by their places.
fn coverings<'a>(candidates: &'a [Candidate<'a>]) -> Vec<impl Fn(usize) -> bool + 'a> {
    let all = candidates.iter();
    all.map(|a| move |number: usize| a.covers(&candidates[number]))
        .collect()
}

/// The same in the order of the fold.
fn in_order(history: &[Event], key: Key) -> Vec<Candidate<'_>> {
    let mut candidates = candidates(history, key);
    candidates.sort_by_key(Candidate::order);
    candidates
}

/// What a history makes of a row under last update wins.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Truth {
    pub(crate) value: Option<Value>,
    pub(crate) may: BTreeSet<Stamp>,
    pub(crate) must: BTreeSet<Stamp>,
}

/// The definitions of may and must in the docs of `anabranch_conflict::last_writer`, word by word.
pub(crate) fn truth_of(history: &[Event], key: Key) -> Truth {
    let candidates = candidates(history, key);
    let value = candidates
        .iter()
        .max_by_key(|candidate| candidate.order())
        .and_then(|winner| {
            if winner.by_truncate {
                None
            } else {
                winner.event.txn.writes.rows[&key]
            }
        });
    let mut truth = Truth {
        value,
        may: BTreeSet::new(),
        must: BTreeSet::new(),
    };
    let covers: Vec<Vec<bool>> = candidates
        .iter()
        .map(|a| candidates.iter().map(|b| a.covers(b)).collect())
        .collect();
    let all = 0..candidates.len();
    for v in all.clone() {
        let loses_to = |w: usize| {
            w != v && !covers[v][w] && !covers[w][v] && candidates[w].order() > candidates[v].order()
        };
        let mut winners = all.clone().filter(|&w| loses_to(w)).peekable();
        if winners.peek().is_none() {
            continue;
        }
        let loser = candidates[v].event.txn.stamp;
        truth.may.insert(loser);
        let unseen = |w: usize| !all.clone().any(|v2| covers[v2][v] && !covers[v2][w] && v2 != w);
        if !candidates[v].by_truncate && winners.any(unseen) {
            truth.must.insert(loser);
        }
    }
    truth
}

/// What a history makes of a row under a policy over the frontier: of the writes that no other write has seen and
/// that are above the last truncate, the one that the policy prefers. The others must be logged; a write that
/// met a concurrent one which is preferred, or a concurrent later truncate, may be.
fn ranked_truth(history: &[Event], key: Key, policy: &Policy) -> Truth {
    let candidates = candidates(history, key);
    let put =
        |candidate: &Candidate<'_>| !candidate.by_truncate && candidate.event.txn.writes.rows[&key].is_some();
    // Written otherwise than the crate does: one number, the highest is preferred.
    let rank = |candidate: &Candidate<'_>| {
        let (time, node, _) = candidate.order();
        let stamp = i128::from(time) << 16 | i128::from(node);
        let (first, by_node) = match policy.order {
            Order::LastUpdateWins => (stamp, 0),
            Order::FirstUpdateWins => (-stamp, 0),
            Order::OriginPriority(_) => (stamp, priority(candidate.event.txn.stamp.node)),
        };
        let preferred = match policy.deletes {
            Deletes::ByStamp => false,
            Deletes::DeleteWins => !put(candidate),
            Deletes::UpdateWins => put(candidate),
        };
        (preferred, by_node, first)
    };
    let last_truncate = candidates
        .iter()
        .filter(|candidate| candidate.by_truncate)
        .map(Candidate::order)
        .max();
    let writes = || candidates.iter().filter(|candidate| !candidate.by_truncate);
    let alive =
        |candidate: &&Candidate<'_>| last_truncate.is_none_or(|truncate| candidate.order() > truncate);
    let unseen = |candidate: &&Candidate<'_>| !candidates.iter().any(|other| other.covers(candidate));
    let winner = writes()
        .filter(alive)
        .filter(unseen)
        .max_by_key(|write| rank(write));
    let mut truth = Truth {
        value: winner.and_then(|winner| winner.event.txn.writes.rows[&key]),
        may: BTreeSet::new(),
        must: BTreeSet::new(),
    };
    for write in &candidates {
        let beats = |other: &Candidate<'_>| {
            !Rc::ptr_eq(&other.event.txn, &write.event.txn)
                && !other.covers(write)
                && !write.covers(other)
                && if other.by_truncate || write.by_truncate {
                    other.order() > write.order()
                } else {
                    rank(other) > rank(write)
                }
        };
        let loser = write.event.txn.stamp;
        if candidates.iter().any(beats) {
            truth.may.insert(loser);
        }
        let won = winner.is_some_and(|winner| Rc::ptr_eq(&winner.event.txn, &write.event.txn));
        if !write.by_truncate && !won && unseen(&write) && (alive(&write) || put(write)) {
            truth.must.insert(loser);
        }
    }
    truth
}

/// What a history makes of a row of which a script chooses a version: of the writes that no other write has seen and that
/// are above the last truncate, the one that is meant. The others must be logged; any that met a concurrent one may be.
fn chosen_truth(history: &[Event], key: Key, choice: Choice, counts: &mut Counts) -> Truth {
    let candidates = in_order(history, key);
    let value = |write: &Candidate<'_>| write.event.txn.writes.rows[&key];
    let last_truncate = candidates.iter().rposition(|candidate| candidate.by_truncate);
    let is_seen = |write: &Candidate<'_>| candidates.iter().any(|other| other.covers(write));
    let alive = |at: usize| last_truncate.is_none_or(|truncate| at > truncate);
    let open: Vec<&Candidate<'_>> = candidates
        .iter()
        .enumerate()
        .filter(|(at, write)| !write.by_truncate && alive(*at) && !is_seen(write))
        .map(|(_, write)| write)
        .collect();
    let last: Vec<Option<i64>> = open
        .iter()
        .map(|write| value(write).map(|value| value[3]))
        .collect();
    let made = history.iter().find(|event| event.txn.writes.change);
    let mut meant = || match choice {
        Choice::Changed(switch) => {
            let old: Vec<bool> = open
                .iter()
                .map(|write| made.is_none_or(|made| !write.event.saw(made)))
                .collect();
            let of = |(write, last): (&&Candidate<'_>, &Option<i64>)| (write.event.txn.stamp.node, *last);
            let versions: Vec<_> = open.iter().zip(&last).map(of).collect();
            let some_old = old.contains(&true);
            counts.mixed += u32::from(some_old && old.contains(&false));
            counts.all_new += u32::from(!some_old && old.len() > 1);
            change::meant(switch, &versions, &old)
        }
        _ => choice.meant(&last),
    };
    let winner = if open.is_empty() {
        None
    } else {
        Some(open[meant()])
    };
    let mut truth = Truth {
        value: winner.and_then(value),
        may: BTreeSet::new(),
        must: BTreeSet::new(),
    };
    for (at, write) in candidates.iter().enumerate() {
        let is_other = |other: &&Candidate<'_>| !Rc::ptr_eq(&other.event.txn, &write.event.txn);
        let met = candidates
            .iter()
            .filter(is_other)
            .any(|other| !other.covers(write) && !write.covers(other));
        let loser = write.event.txn.stamp;
        if met {
            truth.may.insert(loser);
        }
        let won = winner.is_some_and(|winner| Rc::ptr_eq(&winner.event.txn, &write.event.txn));
        let is_write = !write.by_truncate && !won && !is_seen(write);
        if is_write && (alive(at) || value(write).is_some()) {
            truth.must.insert(loser);
        }
    }
    truth
}

/// One step of the fold that `anabranch_conflict::merge` describes, over plain numbers. The first columns, as many as
/// `groups` has, are the last writer's, those of one group together; of fewer than four the rest is a counter and a
/// highest value.
fn fold_one(
    row: Option<Value>,
    inserted: &mut bool,
    covers_all: bool,
    write: &Candidate<'_>,
    key: Key,
    groups: &[u16],
) -> Option<Value> {
    let new = write.event.txn.writes.rows[&key]?;
    let old = write.event.txn.writes.updated.get(&key);
    let Some(mut here) = row else {
        *inserted = old.is_none();
        return Some(new);
    };
    if covers_all {
        return Some(new);
    }
    let fits = |sum: i64| (-32_768..32_768).contains(&sum);
    if groups.len() == new.len() && old.is_none() {
        return Some(new);
    }
    let Some(old) = old else {
        let sum = here[2] + new[2];
        here[2] = match *inserted {
            true if fits(sum) => sum,
            true => here[2],
            false => new[2],
        };
        *inserted = true;
        return Some([new[0], new[1], here[2], here[3].max(new[3])]);
    };
    for at in 0..groups.len() {
        if (0..groups.len()).any(|other| groups[other] == groups[at] && old[other] != new[other]) {
            here[at] = new[at];
        }
    }
    if groups.len() == new.len() {
        return Some(here);
    }
    let sum = here[2] + new[2] - old[2];
    here[2] = if fits(sum) { sum } else { here[2] };
    let (was, top) = (here[3], here[3].max(new[3]));
    here[3] = match new[3].cmp(&old[3]) {
        std::cmp::Ordering::Equal => was,
        std::cmp::Ordering::Greater => top,
        std::cmp::Ordering::Less if was == old[3] => new[3],
        std::cmp::Ordering::Less if was > old[3] => was,
        std::cmp::Ordering::Less => top,
    };
    Some(here)
}

/// What a history makes of a row whose columns are merged: all its writes folded in stamp order. Must be logged: a write
/// that was deleted, or that changed one of the columns with `groups` where a later one changed that or another of its
/// group, neither having seen the other, and nobody having seen it without that.
fn merged_truth(history: &[Event], key: Key, groups: &[u16]) -> Truth {
    let candidates = in_order(history, key);
    let (mut row, mut inserted, mut alive): (_, _, Vec<&Candidate<'_>>) = (None, false, Vec::new());
    for write in &candidates {
        if write.event.txn.writes.replaced.contains(&key) {
            row = None;
        }
        if row.is_none() {
            alive.clear();
        }
        let covers_all = alive.iter().all(|before| write.covers(before));
        alive.push(write);
        row = if write.by_truncate {
            None
        } else {
            fold_one(row, &mut inserted, covers_all, write, key, groups)
        };
    }
    let mut truth = Truth {
        value: row,
        may: BTreeSet::new(),
        must: BTreeSet::new(),
    };
    let new = |write: &Candidate<'_>| {
        if write.by_truncate {
            None
        } else {
            write.event.txn.writes.rows[&key]
        }
    };
    for v in &candidates {
        for w in &candidates {
            if v.covers(w) || w.covers(v) || Rc::ptr_eq(&v.event.txn, &w.event.txn) {
                continue;
            }
            truth.may.insert(v.event.txn.stamp);
            if v.by_truncate || w.order() < v.order() {
                continue;
            }
            let changes = |write: &Candidate<'_>, at: usize| {
                let old = write.event.txn.writes.updated.get(&key);
                new(write).is_some_and(|new| old.is_none_or(|old| old[at] != new[at]))
            };
            let lost = match (new(v), new(w)) {
                (None, None) => false,
                (Some(_), None) | (None, Some(_)) => true,
                (Some(_), Some(_)) => (0..groups.len()).any(|at| {
                    let of_group = |other: &usize| groups[*other] == groups[at];
                    changes(v, at) && (0..groups.len()).filter(of_group).any(|other| changes(w, other))
                }),
            };
            let history = candidates.iter().any(|z| z.covers(v) && !z.covers(w));
            // A table that was emptied has no row that a delete could have lost.
            let emptied =
                new(v).is_none() && candidates.iter().any(|t| t.by_truncate && t.order() > v.order());
            if lost && !history && !emptied {
                truth.must.insert(v.event.txn.stamp);
            }
        }
    }
    truth
}

/// What the columns are for, said without any fold: of a row that was never removed and was made once.
fn check_meaning(history: &[Event], key: Key, value: Option<Value>) -> Result<(), Failure> {
    let writes: Vec<&Event> = history
        .iter()
        .filter(|event| {
            event.txn.writes.rows.contains_key(&key) || event.txn.writes.truncates.contains(&key.table)
        })
        .collect();
    let new = |event: &&Event| event.txn.writes.rows.get(&key).copied().flatten();
    let old = |event: &&Event| event.txn.writes.updated.get(&key).copied();
    let made = writes.iter().filter(|event| old(event).is_none()).count();
    let removed = writes.iter().any(|event| {
        event.txn.writes.replaced.contains(&key)
            || new(event).is_none()
            || !event.txn.writes.truncates.is_empty()
    });
    let (Some(value), 1, false) = (value, made, removed) else {
        return Ok(());
    };
    let pairs = || {
        writes
            .iter()
            .map(|event| (old(event).unwrap_or_default(), new(event).unwrap()))
    };
    let wrong = |what: &str, wanted: i64| {
        Err(Failure::Rows(format!(
            "{key:?} is {value:?}: {what} must be {wanted}"
        )))
    };
    // Far from the ends of its range, whatever the order.
    let swing: i64 = pairs().map(|(old, new)| (new[2] - old[2]).abs()).sum();
    let sum: i64 = pairs().map(|(old, new)| new[2] - old[2]).sum();
    if swing < 32_768 && value[2] != sum {
        return wrong("the sum", sum);
    }
    let raised_only = pairs().all(|(old, new)| new[3] >= old[3]);
    let highest = pairs().map(|(_, new)| new[3]).max().unwrap_or_default();
    if raised_only && value[3] != highest {
        return wrong("the highest", highest);
    }
    for at in 0..2 {
        let writers = writes
            .iter()
            .filter(|event| old(event).is_none_or(|old| old[at] != new(event).unwrap()[at]));
        let last = writers.max_by_key(|event| event.txn.stamp).and_then(new);
        if last.is_some_and(|last| last[at] != value[at]) {
            return wrong("what was written last", last.unwrap_or_default()[at]);
        }
    }
    Ok(())
}

/// As [`check_meaning`], of groups.
fn check_groups(history: &[Event], key: Key, value: Option<Value>, meant: &[u16; 4]) -> Result<(), Failure> {
    let written = history
        .iter()
        .filter_map(|event| event.txn.writes.rows.get(&key).copied().flatten());
    let written: Vec<Value> = written.collect();
    value
        .and_then(|value| groups::mixed(&value, &written, meant))
        .map_or(Ok(()), |mixed| {
            Err(Failure::Rows(format!(
                "{key:?} is {value:?}: columns {mixed:?} are of no one writer"
            )))
        })
}

/// As [`merged_truth`], of collections. Only what took something from another may be logged.
fn collections_truth(history: &[Event], key: Key) -> Truth {
    let candidates = in_order(history, key);
    let covers = coverings(&candidates);
    let writes: Vec<Option<collections::Write<'_>>> = candidates
        .iter()
        .enumerate()
        .map(|(number, candidate)| {
            let writes = &candidate.event.txn.writes;
            let new = writes
                .rows
                .get(&key)?
                .as_ref()
                .filter(|_| !candidate.by_truncate)?;
            let (old, covers) = (writes.updated.get(&key), &covers[number]);
            Some(collections::Write {
                number,
                old,
                new,
                covers,
            })
        })
        .collect();
    let replaces = |at: usize| candidates[at].event.txn.writes.replaced.contains(&key);
    let (mut row, mut alive): (Option<collections::Folded>, Vec<usize>) = (None, Vec::new());
    for (at, write) in writes.iter().enumerate() {
        if replaces(at) || write.is_none() {
            row = None;
        }
        if row.is_none() {
            alive.clear();
        }
        let covers_all = alive.iter().all(|before| covers[at](*before));
        alive.push(at);
        row = write
            .as_ref()
            .map(|write| collections::fold_one(row.take(), covers_all, write));
    }
    let mut truth = Truth {
        value: row.map(|row| row.value),
        may: BTreeSet::new(),
        must: BTreeSet::new(),
    };
    for v in 0..candidates.len() {
        for w in v + 1..candidates.len() {
            if covers[v](w) || covers[w](v) || Rc::ptr_eq(&candidates[v].event.txn, &candidates[w].event.txn)
            {
                continue;
            }
            let lost = match (&writes[v], &writes[w]) {
                (None, None) => false,
                (Some(_), None) | (None, Some(_)) => true,
                (Some(low), Some(high)) => replaces(w) || collections::is_lost(low, high),
            };
            let loser = candidates[v].event.txn.stamp;
            if lost || candidates[w].by_truncate {
                truth.may.insert(loser);
            }
            if !lost {
                continue;
            }
            let history = (0..candidates.len()).any(|z| covers[z](v) && !covers[z](w));
            let emptied = writes[v].is_none() && (v + 1..candidates.len()).any(|t| candidates[t].by_truncate);
            if !candidates[v].by_truncate && !history && !emptied {
                truth.must.insert(loser);
            }
        }
    }
    truth
}

/// As [`check_meaning`], of collections.
fn check_collections(history: &[Event], key: Key, value: Option<Value>) -> Result<(), Failure> {
    let candidates = in_order(history, key);
    let covers = coverings(&candidates);
    let mut writes = Vec::new();
    for (number, candidate) in candidates.iter().enumerate() {
        let txn = &candidate.event.txn.writes;
        let new = txn.rows.get(&key).and_then(Option::as_ref);
        let (Some(new), false, false) = (new, candidate.by_truncate, txn.replaced.contains(&key)) else {
            return Ok(());
        };
        writes.push(collections::Write {
            number,
            old: txn.updated.get(&key),
            new,
            covers: &covers[number],
        });
    }
    let made = writes.iter().filter(|write| write.old.is_none()).count();
    let (Some(value), 1) = (value, made) else {
        return Ok(());
    };
    collections::check_meaning(value, &writes).map_err(|wrong| Failure::Rows(format!("{key:?}: {wrong}")))
}

/// No statement of an apply transaction replaced or removed a row newer than what it wrote.
fn check_overwritten(history: &[Event], nodes: &[Daemon]) -> Result<(), Failure> {
    let written: BTreeMap<Value, Stamp> = history
        .iter()
        .flat_map(|event| {
            event
                .txn
                .writes
                .rows
                .values()
                .flatten()
                .map(|value| (*value, event.txn.stamp))
        })
        .collect();
    for node in nodes {
        for (key, value, by) in &node.overwritten {
            // A value that no history knows was replaced within its own transaction.
            if written.get(value).is_some_and(|stamp| stamp > by) {
                return Err(Failure::Overwritten(format!(
                    "{key:?} = {value:?} by {by:?} at {:?}",
                    node.node
                )));
            }
        }
    }
    Ok(())
}
