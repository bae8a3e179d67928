//! The conflict log against the truth, per losing version.
//!
//! `conflict/src/last_writer.rs` has the promise: may(v) – a version exists that is concurrent with v and has a higher
//! stamp; must(v) – there is such a one that every version which covers v covers, too. Every node logs every v of
//! must, and none that is not of may.
//!
//! Under another policy (`conflict/src/frontier.rs`) "higher" is preferred, and must(v) is that no version knew of v in the end, and that v
//! is not what the row became. A version that had lost may come back, and has a line, too, where it was there before.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anabranch_proto::Stamp;

use super::unique::{about_unique_values, of_unique_value};
use super::{Answer, Findings};
use crate::history::{History, Line};
use crate::policy::{Rule, frontier};
use crate::truth::{Row, Truth, Version, parse_stamp};
use crate::workload::Workload;

/// Which versions may, and which must, be in the log.
pub(crate) struct Losers {
    may: HashMap<(Row, Stamp), Option<i64>>,
    /// With node and transaction.
    must: BTreeMap<(Row, Stamp), (u16, Option<i64>)>,
}

impl Losers {
    /// Of all rows.
    pub(crate) fn of(history: &History, truth: &Truth) -> Self {
        let mut losers = Self {
            may: HashMap::new(),
            must: BTreeMap::new(),
        };
        let rule = Rule::of(history);
        let policy = rule.decides();
        for (row, all) in &truth.rows {
            let arrived = all.iter().filter(|version| truth.arrived(version, history));
            let versions: Vec<&Version> = arrived.collect();
            let left = rule.unusual().map(|_| losers_left(rule, &versions));
            for (at, lost) in versions.iter().enumerate() {
                let others = match left {
                    None => &versions[at + 1..],
                    Some(_) => &versions[..],
                };
                let beats = |other: &&Version| {
                    lost.concurrent_with(other) && policy.prefers(&other.decided(), &lost.decided())
                };
                let winners: Vec<&Version> = others.iter().copied().filter(beats).collect();
                if winners.is_empty() {
                    continue;
                }
                losers.may.insert((row.clone(), lost.stamp), lost.value);
                let follows = |other: &&Version| other.stamp != lost.stamp && lost.covered_by(other);
                let followers: Vec<&Version> = versions.iter().copied().filter(follows).collect();
                let surely = |winner: &&Version| followers.iter().all(|other| winner.covered_by(other));
                let is_sure = match &left {
                    None => winners.iter().any(surely),
                    Some(left) => left.contains(&lost.stamp),
                };
                if is_sure {
                    let value = (lost.node.0, lost.txn);
                    losers.must.insert((row.clone(), lost.stamp), value);
                }
            }
        }
        losers
    }
}

/// Where a policy chooses among the whole frontier: the versions that no other knew of, but for the one that the row becomes.
fn losers_left(rule: Rule, versions: &[&Version]) -> BTreeSet<Stamp> {
    let winner = rule.winner(versions.iter().copied());
    let frontier = frontier(versions.iter().copied());
    let left = frontier.members().iter().map(|member| member.version.stamp);
    left.filter(|stamp| winner.is_none_or(|winner| winner.stamp != *stamp))
        .collect()
}

/// One node's log against the truth.
pub(crate) struct Against {
    /// Whose.
    pub(crate) node: u16,
    /// Its lines.
    pub(crate) lines: usize,
    /// Versions that must be in it.
    pub(crate) must: usize,
    /// Those of them that are not.
    pub(crate) missing: usize,
    /// Versions that may be in it.
    pub(crate) may: usize,
    /// Lines of no such version.
    pub(crate) unfounded: usize,
}

/// Each node's log against the truth, in numbers.
pub(crate) fn against_truth(history: &History, truth: &Truth) -> Vec<Against> {
    let losers = Losers::of(history, truth);
    let mut logs: BTreeMap<u16, Against> = BTreeMap::new();
    for node in history.survivors() {
        let mut named: BTreeSet<(Row, Stamp)> = BTreeSet::new();
        let mut log = Against {
            node,
            lines: 0,
            must: losers.must.len(),
            missing: 0,
            may: losers.may.len(),
            unfounded: 0,
        };
        for line in history.lines().filter(|line| line.node == node) {
            log.lines += 1;
            let name = line.key.zip(parse_stamp(&line.lost));
            let name = name.map(|(key, stamp)| ((line.table.clone(), key), stamp));
            match name {
                Some(name) if losers.may.contains_key(&name) => {
                    named.insert(name);
                }
                _ if about_unique_values(line) => {}
                _ => log.unfounded += 1,
            }
        }
        log.missing = losers.must.keys().filter(|name| !named.contains(*name)).count();
        logs.insert(node, log);
    }
    logs.into_values().collect()
}

/// Is every lost write in the log of some node, and no line without a lost write?
pub(crate) fn exact(history: &History, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    let losers = Losers::of(history, truth);
    let claims = Workload::named(&history.header.workload).is_some_and(|workload| workload.claims);
    let rule = Rule::of(history);
    // Each version is asked whether it lost; where no two can meet, none may have a line.
    findings.look_at(truth.rows.values().map(Vec::len).sum());
    let mut logged: BTreeSet<(Row, Stamp)> = BTreeSet::new();
    // Values lost to another row are `unique`'s, which is asked where rows claim some: elsewhere no line may speak of any.
    let lines = history
        .lines()
        .filter(|line| !(claims && about_unique_values(line)));
    for line in lines.filter(|line| !history.lost(line.node)) {
        findings.look();
        let (Some(key), Some(stamp)) = (line.key, parse_stamp(&line.lost)) else {
            findings.add(format!(
                "n{}: a line that names no row or no stamp: {}",
                line.node, line.text
            ));
            continue;
        };
        let name = ((line.table.clone(), key), stamp);
        match losers.may.get(&name) {
            None => findings.add(format!(
                "n{}: {}/{key} has a line for the version stamped {stamp}, which lost to no concurrent one: {}",
                line.node, line.table, line.text
            )),
            Some(value) if line.lost_value != *value => findings.add(format!(
                "n{}: the line of {}/{key} stamped {stamp} shows {:?} as lost, the version is {value:?}: {}",
                line.node, line.table, line.lost_value, line.text
            )),
            Some(_) => {
                // A unique value may have taken the row of the version that stayed.
                if !claims && let Some(versions) = truth.rows.get(&name.0) {
                    won_against(rule, line, versions, stamp, &mut findings);
                }
            }
        }
        logged.insert(name);
    }
    // Such a line says of a version that it is lost, whatever took it.
    for line in history
        .lines()
        .filter(|line| claims && of_unique_value(line) && !history.lost(line.node))
    {
        if let (Some(key), Some(stamp)) = (line.key, parse_stamp(&line.lost)) {
            logged.insert(((line.table.clone(), key), stamp));
        }
    }
    findings.look_at(losers.must.len());
    for (((table, key), stamp), (node, txn)) in &losers.must {
        let name = ((table.clone(), *key), *stamp);
        if !logged.contains(&name) {
            findings.add(format!(
                "{table}/{key}: the version of transaction {} of n{node}, stamped {stamp}, is lost without a line at any node",
                txn.unwrap_or(0)
            ));
        }
    }
    findings.answer("no version of any row is known")
}

/// What a line calls the winner is a version of the row that did not know of the one that lost, and has the higher stamp, or is what the
/// policy prefers.
fn won_against(rule: Rule, line: &Line, versions: &[Version], lost: Stamp, findings: &mut Findings) {
    findings.look();
    let of = |stamp: Stamp| versions.iter().find(|version| version.stamp == stamp);
    let (winner, loser) = (parse_stamp(&line.won).and_then(of), of(lost));
    let policy = rule.decides();
    let is_right = winner.zip(loser).is_some_and(|(winner, loser)| {
        policy.prefers(&winner.decided(), &loser.decided()) && winner.concurrent_with(loser)
    });
    if !is_right {
        let which = rule.unusual().map_or("later", |_| "preferred");
        findings.add(format!(
            "n{}: the line of {}/{} stamped {lost} says that `{}` won, which is no {which} concurrent version of the row: {}",
            line.node,
            line.table,
            line.key.unwrap_or(0),
            line.won,
            line.text
        ));
    }
}

/// Does every node name every lost write that all must name, and each once?
pub(crate) fn at_every_node(history: &History, truth: &Truth) -> Answer {
    let mut findings = Findings::default();
    let losers = Losers::of(history, truth);
    // Each version is asked whether it lost; where no two can meet, none may have a line.
    findings.look_at(truth.rows.values().map(Vec::len).sum());
    let mut logged: BTreeMap<(Row, Stamp, u16), usize> = BTreeMap::new();
    let mut ids: BTreeMap<(Row, Stamp), BTreeSet<&str>> = BTreeMap::new();
    for line in history.lines().filter(|line| !history.lost(line.node)) {
        let (Some(key), Some(stamp)) = (line.key, parse_stamp(&line.lost)) else {
            continue;
        };
        let row = (line.table.clone(), key);
        *logged.entry((row.clone(), stamp, line.node)).or_default() += 1;
        ids.entry((row, stamp)).or_default().insert(&line.id);
    }
    for (((table, key), stamp, node), count) in &logged {
        findings.look();
        if *count > 1 {
            findings.add(format!(
                "n{node}: {table}/{key} stamped {stamp} is logged {count} times"
            ));
        }
    }
    for (((table, key), stamp), ids) in &ids {
        if ids.len() > 1 {
            findings.add(format!(
                "{table}/{key} stamped {stamp} has different ids at different nodes: {ids:?}"
            ));
        }
    }
    for ((row, stamp), (origin, txn)) in &losers.must {
        for node in history.survivors() {
            findings.look();
            if !logged.contains_key(&(row.clone(), *stamp, node)) {
                findings.add(format!(
                    "n{node} has no line for {}/{} of transaction {} of n{origin}, stamped {stamp}",
                    row.0,
                    row.1,
                    txn.unwrap_or(0)
                ));
            }
        }
    }
    findings.answer("no version of any row is known")
}
