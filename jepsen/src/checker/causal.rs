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

use std::collections::{BTreeMap, HashMap, VecDeque};

use anabranch_proto::Stamp;

use super::{Answer, Findings};
use crate::history::{Act, History, Stage, Step};
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
        if let Some(workload) = crate::workload::Workload::named(&history.header.workload) {
            for (table, key, value) in workload.preload(history.header.keys) {
                by_value.insert(((table.clone(), key), value), 0);
                graph.txns[0].writes.push((table, key));
            }
        }
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
            for step in &op.steps {
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
            self.cycle = cycle(&predecessors);
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
        for text in &self.thin_air {
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
        if topological(&conflict).is_none()
            && let Some(cycle) = cycle(&conflict)
        {
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

/// The value that a step shows its transaction to have seen: what it read, or what it appended to.
fn seen_by(step: &Step) -> Option<i64> {
    match (step.act, &step.list) {
        (Act::Read, _) => step.value,
        (Act::Write, Some(list)) => list.iter().rev().nth(1).copied(),
        _ => None,
    }
}

/// An order in which every one comes after its predecessors, if there is one.
fn topological(predecessors: &[Vec<usize>]) -> Option<Vec<usize>> {
    let mut successors = vec![Vec::new(); predecessors.len()];
    let mut missing: Vec<usize> = vec![0; predecessors.len()];
    for (at, before) in predecessors.iter().enumerate() {
        for &other in before {
            successors[other].push(at);
            missing[at] += 1;
        }
    }
    let mut ready: VecDeque<usize> = (0..predecessors.len()).filter(|&at| missing[at] == 0).collect();
    let mut order = Vec::with_capacity(predecessors.len());
    while let Some(at) = ready.pop_front() {
        order.push(at);
        for &next in &successors[at] {
            missing[next] -= 1;
            if missing[next] == 0 {
                ready.push_back(next);
            }
        }
    }
    (order.len() == predecessors.len()).then_some(order)
}

/// A short cycle, first and last the same, in the order of the edges.
fn cycle(predecessors: &[Vec<usize>]) -> Option<Vec<usize>> {
    // What is left after taking away all that can be ordered, from both sides, lies on or between cycles.
    let mut successors = vec![Vec::new(); predecessors.len()];
    for (at, before) in predecessors.iter().enumerate() {
        for &other in before {
            successors[other].push(at);
        }
    }
    let mut best: Option<Vec<usize>> = None;
    let mut missing: Vec<usize> = predecessors.iter().map(Vec::len).collect();
    let mut ready: Vec<usize> = (0..missing.len()).filter(|&at| missing[at] == 0).collect();
    while let Some(at) = ready.pop() {
        for &next in &successors[at] {
            missing[next] -= 1;
            if missing[next] == 0 {
                ready.push(next);
            }
        }
    }
    let left: Vec<usize> = (0..missing.len()).filter(|&at| missing[at] > 0).collect();
    for &start in left.iter().take(200) {
        let mut from: HashMap<usize, usize> = HashMap::new();
        let mut queue = VecDeque::from([start]);
        'search: while let Some(at) = queue.pop_front() {
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
                    if best.as_ref().is_none_or(|best| path.len() < best.len()) {
                        best = Some(path);
                    }
                    break 'search;
                }
                if missing[next] > 0 && next != start && !from.contains_key(&next) {
                    from.insert(next, at);
                    queue.push_back(next);
                }
            }
        }
    }
    best
}
