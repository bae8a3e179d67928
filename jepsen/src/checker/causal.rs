//! Causal convergence of a whole history, in polynomial time.
//!
//! In:   transactions with what they read and wrote        Out: bad patterns, each with a cycle
//! Holds: per transaction a vector: of every process, how much of it comes causally before
//!
//! A. Bouajjani, C. Enea, R. Guerraoui, J. Hamza: "On Verifying Causal Consistency", POPL 2017, for histories in which no
//! value is written twice; with transactions as the units, as R. Biswas and C. Enea have it in "On the Complexity of
//! Checking Transactional Consistency", OOPSLA 2019. The causal order CO is the closure of session order and
//! reads-from. The history is causally convergent if and only if there is
//! * no read of a value that nobody wrote (ThinAirRead), or that a transaction wrote which did not commit;
//! * no cycle in CO (CyclicCO);
//! * no cycle in CO and CF (CyclicCF), where CF holds `t1 -> t2` when a transaction reads a row from t2, and t1 wrote the
//!   row, too, and is causally before the reader. WriteCORead and WriteCOInitRead are cycles of that kind, since the
//!   initial transaction is before every session.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use anabranch_proto::Stamp;

use super::{Answer, Findings};
use crate::history::{Act, First, History, Op, Stage, Step};
use crate::truth::{Row, Truth};

/// The transaction that wrote what was there before the load.
pub const INITIAL: i64 = 0;

/// One transaction of the graph.
#[derive(Debug)]
pub struct Txn {
    /// Its witness; [`INITIAL`] for the first.
    pub id: i64,
    /// Its process, numbered from 0; the initial transaction is a process of its own.
    pub process: usize,
    /// Its place in the process, from 1.
    pub place: u32,
    /// Rows it read from others, with the transaction (an index) it read each from.
    pub reads: Vec<(Row, usize)>,
    /// Rows it wrote.
    pub writes: Vec<Row>,
}

/// All transactions and the causal order.
#[derive(Debug, Default)]
pub struct Graph {
    /// Transactions; the initial one is first.
    pub txns: Vec<Txn>,
    /// Reads that no committed transaction explains.
    pub thin_air: Vec<String>,
    /// Reads, and appends, that found no row where there is one for ever.
    pub absent: Vec<String>,
    /// Per process its transactions, in order.
    processes: Vec<Vec<usize>>,
    /// Per transaction and process: how many transactions of it come causally before or are it. Empty where CO has a
    /// cycle.
    before: Vec<Vec<u32>>,
    /// A cycle of CO.
    cycle: Option<Vec<usize>>,
    /// Per row and process: places of the transactions that write it, ascending.
    writers: HashMap<Row, BTreeMap<usize, Vec<u32>>>,
}

impl Graph {
    /// Of a history. A transaction whose fate the client does not know counts when some node holds it.
    pub fn of(history: &History, truth: &Truth) -> Self {
        let mut graph = Self::default();
        let mut by_value: HashMap<(Row, i64), usize> = HashMap::new();
        let initial = Txn {
            id: INITIAL,
            process: 0,
            place: 1,
            reads: Vec::new(),
            writes: Vec::new(),
        };
        graph.txns.push(initial);
        graph.processes.push(vec![0]);
        let workload = crate::workload::Workload::named(&history.header.workload);
        let appends = workload.as_ref().is_some_and(|workload| workload.appends);
        // Rows that are there before the load are never deleted.
        let mut for_ever: HashSet<Row> = HashSet::new();
        if let Some(workload) = workload {
            for (table, key, value) in workload.preload(history.header.keys) {
                by_value.insert(((table.clone(), key), value), 0);
                for_ever.insert((table.clone(), key));
                graph.txns[0].writes.push((table, key));
            }
        }
        let of_many = rows_of_many(history);
        let mut numbers: HashMap<u64, usize> = HashMap::new();
        let mut seen = Vec::new();
        for op in history.ops() {
            let counts = match op.stage {
                Stage::Ok => true,
                Stage::Info => truth.committed(op.txn),
                Stage::Invoke | Stage::Fail => false,
            };
            if !counts {
                continue;
            }
            let process = *numbers.entry(op.process).or_insert_with(|| {
                graph.processes.push(Vec::new());
                graph.processes.len() - 1
            });
            let at = graph.txns.len();
            graph.processes[process].push(at);
            let place = u32::try_from(graph.processes[process].len()).unwrap_or(u32::MAX);
            let mut txn = Txn {
                id: op.txn,
                process,
                place,
                reads: Vec::new(),
                writes: Vec::new(),
            };
            let of_many = of_many.get(&op.txn).into_iter().flatten().copied();
            for step in op.steps.iter().chain(of_many) {
                let row = (step.table.clone(), step.key);
                if let (Act::Write, Some(value)) = (step.act, step.value) {
                    by_value.insert((row.clone(), value), at);
                    txn.writes.push(row);
                }
            }
            graph.txns.push(txn);
            seen.push((at, op));
        }
        for (at, op) in seen {
            // Of a transaction without an answer the reads are not all known.
            if op.stage != Stage::Ok {
                continue;
            }
            for step in &op.steps {
                let row = (step.table.clone(), step.key);
                if found_nothing(step, appends) && for_ever.contains(&row) {
                    graph.absent.push(format!(
                        "transaction {} of n{} found no row {}/{}, which was there before the load and is never deleted",
                        op.txn, op.node, row.0, row.1
                    ));
                }
                let Some(value) = seen_by(step) else { continue };
                match by_value.get(&(row.clone(), value)) {
                    Some(&from) => graph.txns[at].reads.push((row, from)),
                    None => graph.thin_air.push(format!(
                        "transaction {} of n{} read {step}, which no committed transaction wrote",
                        op.txn, op.node
                    )),
                }
            }
        }
        graph.close();
        graph
    }

    /// Direct predecessors in CO: the one before in the session (or the initial one), and those read from.
    fn predecessors(&self, at: usize) -> Vec<usize> {
        let txn = &self.txns[at];
        let mut before: Vec<usize> = txn.reads.iter().map(|(_, from)| *from).collect();
        match (txn.place, at) {
            (_, 0) => {}
            (1, _) => before.push(0),
            (place, _) => before.push(self.processes[txn.process][place as usize - 2]),
        }
        before.retain(|&other| other != at);
        before.sort_unstable();
        before.dedup();
        before
    }

    /// The causal past of every transaction.
    fn close(&mut self) {
        let count = self.txns.len();
        for (at, txn) in self.txns.iter().enumerate() {
            for row in &txn.writes {
                let places = self.writers.entry(row.clone()).or_default();
                places.entry(self.txns[at].process).or_default().push(txn.place);
            }
        }
        let predecessors: Vec<Vec<usize>> = (0..count).map(|at| self.predecessors(at)).collect();
        let Some(order) = topological(&predecessors) else {
            // Without an order there is a cycle, whether it can be shown or not.
            self.cycle = Some(cycle(&predecessors).unwrap_or_default());
            return;
        };
        self.before = vec![Vec::new(); count];
        for at in order {
            let mut past = vec![0; self.processes.len()];
            for &other in &predecessors[at] {
                for (mine, theirs) in past.iter_mut().zip(&self.before[other]) {
                    *mine = (*mine).max(*theirs);
                }
            }
            past[self.txns[at].process] = self.txns[at].place;
            self.before[at] = past;
        }
    }

    /// Is `first` causally before `second`?
    pub fn is_before(&self, first: usize, second: usize) -> bool {
        first != second
            && self
                .before
                .get(second)
                .and_then(|past| past.get(self.txns[first].process))
                .is_some_and(|&places| places >= self.txns[first].place)
    }

    /// Of every process, the last transaction that writes `row` and is causally before `reader`.
    pub fn last_writers(&self, row: &Row, reader: usize) -> Vec<usize> {
        let (Some(writers), Some(past)) = (self.writers.get(row), self.before.get(reader)) else {
            return Vec::new();
        };
        let own = &self.txns[reader];
        let mut last = Vec::new();
        for (&process, places) in writers {
            let mut upto = past[process];
            if process == own.process {
                upto = upto.min(own.place - 1);
            }
            let known = places.partition_point(|&place| place <= upto);
            if let Some(place) = known.checked_sub(1).and_then(|at| places.get(at)) {
                last.push(self.processes[process][*place as usize - 1]);
            }
        }
        last
    }

    /// A transaction in words.
    pub fn name(&self, at: usize) -> String {
        match self.txns[at].id {
            INITIAL => "the initial transaction".to_owned(),
            id => format!("{id} (n{})", crate::client::node_of(id)),
        }
    }

    /// Is the history causally convergent?
    pub fn convergence(&self) -> Answer {
        let mut findings = Findings::default();
        for text in self.thin_air.iter().chain(&self.absent) {
            findings.add(text.clone());
        }
        if let Some(cycle) = &self.cycle {
            findings.add(format!(
                "a cycle of session order and reads-from: {}",
                self.path(cycle)
            ));
            return findings.answer("");
        }
        let mut conflict: Vec<Vec<usize>> = (0..self.txns.len()).map(|at| self.predecessors(at)).collect();
        let mut why: HashMap<(usize, usize), String> = HashMap::new();
        for (reader, txn) in self.txns.iter().enumerate() {
            for (row, from) in &txn.reads {
                findings.look();
                for earlier in self.last_writers(row, reader) {
                    if earlier != *from {
                        conflict[*from].push(earlier);
                        why.entry((earlier, *from)).or_insert_with(|| {
                            format!(
                                "{} reads {}/{} from the latter and knew the former",
                                self.name(reader),
                                row.0,
                                row.1
                            )
                        });
                    }
                }
            }
        }
        if topological(&conflict).is_none() {
            let cycle = cycle(&conflict).unwrap_or_default();
            let mut text = format!("a cycle that no order of writes explains: {}", self.path(&cycle));
            for pair in cycle.windows(2) {
                if let Some(why) = why.get(&(pair[0], pair[1])) {
                    text.push_str(&format!(
                        "\n  {} must be before {}: {why}",
                        self.name(pair[0]),
                        self.name(pair[1])
                    ));
                }
            }
            findings.add(text);
        }
        findings.answer("nothing was read")
    }

    /// With the stamps as the order of writes: a read sees, of every row, at least what it knew.
    pub fn visible(&self, truth: &Truth) -> Answer {
        let mut findings = Findings::default();
        for (reader, txn) in self.txns.iter().enumerate() {
            for (row, from) in &txn.reads {
                findings.look();
                let read = self.stamp(*from, truth);
                for known in self.last_writers(row, reader) {
                    let stamp = self.stamp(known, truth);
                    if stamp > read {
                        findings.add(format!(
                            "{} read {}/{} as {} wrote it, stamped {read}, and knew the later write of {}, stamped {stamp}",
                            self.name(reader),
                            row.0,
                            row.1,
                            self.name(*from),
                            self.name(known),
                        ));
                    }
                }
            }
        }
        findings.answer("nothing was read")
    }

    /// A transaction's stamp; the initial one is before all.
    pub fn stamp(&self, at: usize, truth: &Truth) -> Stamp {
        let id = self.txns[at].id;
        truth.stamps.get(&id).copied().unwrap_or(Stamp::ZERO)
    }

    fn path(&self, cycle: &[usize]) -> String {
        let names: Vec<String> = cycle.iter().map(|&at| self.name(at)).collect();
        names.join(" -> ")
    }
}

/// By transaction that writes many rows at once: the rows, which only the WAL of its own server tells.
fn rows_of_many(history: &History) -> HashMap<i64, Vec<&Step>> {
    let has_many = |op: &&Op| op.steps.iter().any(|step| step.last.is_some());
    let mut rows: HashMap<i64, Vec<&Step>> = history
        .ops()
        .filter(has_many)
        .map(|op| (op.txn, Vec::new()))
        .collect();
    for commit in history.commits().filter(|commit| commit.first != First::Progress) {
        for txn in &commit.witnesses {
            if let Some(rows) = rows.get_mut(txn) {
                // Of a row that it writes twice nobody sees the first.
                let last: HashMap<(&str, i64), &Step> = commit
                    .rows
                    .iter()
                    .map(|row| ((row.table.as_str(), row.key), row))
                    .collect();
                *rows = last.into_values().collect();
            }
        }
    }
    rows
}

/// Was there no row? A write tells that where it says what it made of the row.
fn found_nothing(step: &Step, appends: bool) -> bool {
    match step.act {
        Act::Read => step.value.is_none(),
        Act::Write => appends && step.list.is_none(),
        _ => false,
    }
}

/// The value that a step shows its transaction to have seen: what it read, or what it appended to.
fn seen_by(step: &Step) -> Option<i64> {
    match (step.act, &step.list) {
        (Act::Read, _) => step.value,
        (Act::Write, Some(list)) => list.iter().rev().nth(1).copied(),
        _ => None,
    }
}

/// Of each, who comes after it.
fn successors_of(predecessors: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut successors = vec![Vec::new(); predecessors.len()];
    for (at, before) in predecessors.iter().enumerate() {
        for &other in before {
            successors[other].push(at);
        }
    }
    successors
}

/// An order in which every one comes after its predecessors, as far as there is one: what is on a cycle or behind one is left out.
fn ordered(predecessors: &[Vec<usize>], successors: &[Vec<usize>]) -> Vec<usize> {
    let mut missing: Vec<usize> = predecessors.iter().map(Vec::len).collect();
    let mut ready: VecDeque<usize> = (0..missing.len()).filter(|&at| missing[at] == 0).collect();
    let mut order = Vec::with_capacity(missing.len());
    while let Some(at) = ready.pop_front() {
        order.push(at);
        for &next in &successors[at] {
            missing[next] -= 1;
            if missing[next] == 0 {
                ready.push_back(next);
            }
        }
    }
    order
}

/// An order in which every one comes after its predecessors, if there is one.
fn topological(predecessors: &[Vec<usize>]) -> Option<Vec<usize>> {
    let order = ordered(predecessors, &successors_of(predecessors));
    (order.len() == predecessors.len()).then_some(order)
}

/// From how many transactions a short cycle is looked for.
const STARTS: usize = 200;

/// A short cycle, first and last the same, in the order of the edges. Where [`topological`] finds no order, there is one.
fn cycle(predecessors: &[Vec<usize>]) -> Option<Vec<usize>> {
    // What is left after taking away all that can be ordered, from both sides, lies on or between cycles.
    let successors = successors_of(predecessors);
    let mut left = vec![true; predecessors.len()];
    for at in ordered(predecessors, &successors) {
        left[at] = false;
    }
    // Behind a cycle there may be any number that are on none: none of those may be all that is looked at.
    let on_a_cycle = within(predecessors, &left);
    for at in ordered(&successors, predecessors) {
        left[at] = false;
    }
    let others = (0..left.len()).filter(|&at| left[at]).take(STARTS);
    let starts = on_a_cycle.into_iter().chain(others);
    let cycles = starts.filter_map(|start| shortest_through(start, &successors, &left));
    cycles.min_by_key(Vec::len)
}

/// One that is on a cycle for sure. Of those left each has a predecessor that is left, too: who goes back for ever comes by somebody
/// twice.
fn within(predecessors: &[Vec<usize>], left: &[bool]) -> Option<usize> {
    let mut passed = vec![false; left.len()];
    let mut at = left.iter().position(|&is_left| is_left)?;
    while !passed[at] {
        passed[at] = true;
        at = predecessors[at].iter().copied().find(|&before| left[before])?;
    }
    Some(at)
}

/// The shortest cycle through `start`, among those that are left.
fn shortest_through(start: usize, successors: &[Vec<usize>], left: &[bool]) -> Option<Vec<usize>> {
    let mut from: HashMap<usize, usize> = HashMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(at) = queue.pop_front() {
        for &next in &successors[at] {
            if next == start {
                let mut path = vec![start, at];
                let mut back = at;
                while back != start {
                    back = from[&back];
                    path.push(back);
                }
                path.reverse();
                if at == start {
                    path = vec![start, start];
                }
                return Some(path);
            }
            if left[next] && !from.contains_key(&next) {
                from.insert(next, at);
                queue.push_back(next);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many that follow from two on a cycle, and are before them in the history.
    fn downstream(count: usize) -> Vec<Vec<usize>> {
        let mut predecessors = vec![vec![count]; count];
        predecessors.extend([vec![count + 1], vec![count]]);
        predecessors
    }

    #[test]
    fn a_cycle_is_found_whatever_follows_from_it() {
        for count in [0, 1, 300] {
            let predecessors = downstream(count);
            assert_eq!(topological(&predecessors), None);
            let found = cycle(&predecessors).unwrap();
            let ends = [vec![count, count + 1, count], vec![count + 1, count, count + 1]];
            assert!(ends.contains(&found), "{found:?}");
        }
    }

    #[test]
    fn a_cycle_is_found_among_many_that_lie_between_two() {
        // 300 to 302 are a cycle, then all the others, each after that and before the second cycle, of 303 and 304.
        let mut predecessors = vec![vec![300]; 300];
        predecessors.extend([vec![302], vec![300], vec![301]]);
        let mut second: Vec<usize> = (0..300).collect();
        second.push(304);
        predecessors.extend([second, vec![303]]);
        let found = cycle(&predecessors).unwrap();
        assert_eq!(found.first(), found.last());
        for pair in found.windows(2) {
            assert!(predecessors[pair[1]].contains(&pair[0]), "{found:?}");
        }
    }

    #[test]
    fn what_can_be_ordered_has_no_cycle() {
        let predecessors = vec![vec![1, 2], vec![2], vec![]];
        assert_eq!(topological(&predecessors), Some(vec![2, 1, 0]));
        assert_eq!(cycle(&predecessors), None);
    }
}
