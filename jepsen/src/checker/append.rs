//! Lists in jsonb that transactions append to: whole, in causal order, and nothing that was appended is gone unsaid.
//!
//! A row's value is its list's last element, so a list names the version that it is, and all that is asked of registers is asked of
//! lists, too; the graph takes an append for a read of what it was appended to. Here is asked what only the elements tell.
//!
//! Rows are decided whole: of two appends that did not know of each other one is lost, and with it what its list alone held. So lists
//! do not hold every append (Elle, asked for serialisability, says so), but the log has a line of a version that did.

use std::collections::{BTreeSet, HashMap};

use super::causal::{Graph, INITIAL};
use super::{Answer, Findings};
use crate::history::{Act, History};
use crate::truth::{Row, Truth};

/// Elements of one table's lists, each with its row's key.
type Elements = BTreeSet<(i64, i64)>;

/// Versions of rows, by their last element, with where each was seen first.
struct Lists<'a> {
    contents: HashMap<(Row, i64), &'a [i64]>,
    /// Transactions of the graph.
    places: HashMap<i64, usize>,
    graph: &'a Graph,
    findings: Findings,
}

/// Is every list what its version can be, and is nothing gone without a line?
pub(crate) fn append(history: &History, truth: &Truth, graph: &Graph) -> Answer {
    let mut lists = Lists {
        contents: HashMap::new(),
        places: (0..graph.txns.len()).map(|at| (graph.txns[at].id, at)).collect(),
        graph,
        findings: Findings::default(),
    };
    // What found no row has no list.
    for text in &graph.absent {
        lists.findings.add(text.clone());
    }
    for op in history.ops() {
        for step in op.steps.iter().filter(|_| truth.counts(op)) {
            if let (Some(value), Some(list)) = (step.value, &step.list) {
                let row = (step.table.clone(), step.key);
                let place = format!("transaction {} of n{}", op.txn, op.node);
                lists.take(row, value, list, &place);
            }
        }
    }
    for table in history.finals().filter(|table| !history.lost(table.node)) {
        let values: HashMap<i64, Option<i64>> = table.rows.iter().map(|row| (row.0, row.1)).collect();
        for (key, list) in &table.more {
            let value = values.get(key).copied().flatten().unwrap_or(0);
            let place = format!("n{} at the end", table.node);
            lists.take((table.table.clone(), *key), value, list, &place);
        }
    }
    // Stamps and a log are Anabranch's.
    if history.header.is_anabranch() {
        lists.gone(history, truth);
    }
    lists.findings.answer("no list was read")
}

impl<'a> Lists<'a> {
    /// A list that somebody saw as `row`'s, with `value` beside it.
    fn take(&mut self, row: Row, value: i64, list: &'a [i64], place: &str) {
        self.findings.look();
        let name = format!("{place}: {}/{}", row.0, row.1);
        if list.last() != Some(&value) {
            self.findings.add(format!(
                "{name} is {list:?}, whose last element should be {value}"
            ));
            return;
        }
        if let Some(known) = self.contents.get(&(row.clone(), value)) {
            if *known != list {
                self.findings.add(format!(
                    "{name} is {list:?}, and was {known:?} where the same append was seen before"
                ));
            }
            return;
        }
        let mut once = BTreeSet::new();
        for element in list {
            if !once.insert(element) {
                self.findings
                    .add(format!("{name} holds {element} twice: {list:?}"));
            }
            match self.writer(&row, *element) {
                None => self.findings.add(format!(
                    "{name} holds {element}, which no committed transaction appended to it"
                )),
                Some(at) => {
                    let last = self.writer(&row, value);
                    if last.is_some_and(|last| self.graph.is_before(last, at)) {
                        self.findings.add(format!(
                            "{name} holds {element} before {value}, which is causally earlier: {list:?}"
                        ));
                    }
                }
            }
        }
        self.contents.insert((row, value), list);
    }

    /// The transaction of the graph that appended this element to this row.
    fn writer(&self, row: &Row, element: i64) -> Option<usize> {
        let id = match element / 10 {
            txn if self.places.contains_key(&txn) => txn,
            _ => INITIAL,
        };
        let at = *self.places.get(&id)?;
        let wrote = self.graph.txns[at].writes.contains(row);
        // What was there before the load: the initial transaction wrote one small number into every row.
        (wrote && (id != INITIAL || element < 1_000_000)).then_some(at)
    }

    /// What is in no node's list at the end must have been in a version that the log of some node has a line of.
    fn gone(&mut self, history: &History, truth: &Truth) {
        let mut said: HashMap<&str, Elements> = HashMap::new();
        for line in history.lines().filter(|line| !history.lost(line.node)) {
            let (Some(key), Some(value)) = (line.key, line.lost_value) else {
                continue;
            };
            let row = (line.table.clone(), key);
            let said = said.entry(&line.table).or_default();
            let elements = self.contents.get(&(row, value)).copied().unwrap_or_default();
            said.extend(elements.iter().map(|element| (key, *element)));
            said.insert((key, value));
        }
        let mut held: HashMap<&str, Vec<(u16, Elements)>> = HashMap::new();
        for table in history.finals().filter(|table| !history.lost(table.node)) {
            let elements = table
                .more
                .iter()
                .flat_map(|(key, list)| list.iter().map(|element| (*key, *element)));
            held.entry(&table.table)
                .or_default()
                .push((table.node, elements.collect()));
        }
        for op in history.ops() {
            let nodes = truth.witnessed.get(&op.txn);
            let arrived = nodes.is_some_and(|nodes| nodes.iter().any(|&node| !history.lost(node)));
            if !truth.counts(op) || (history.lost(op.node) && !arrived) {
                continue;
            }
            for step in op.steps.iter().filter(|step| step.act == Act::Write) {
                let Some(value) = step.value else { continue };
                let element = (step.key, value);
                for (node, held) in held.get(step.table.as_str()).into_iter().flatten() {
                    self.findings.look();
                    let said = said.get(step.table.as_str());
                    if !held.contains(&element) && !said.is_some_and(|said| said.contains(&element)) {
                        self.findings.add(format!(
                            "n{node}: {}/{} does not hold {value}, which transaction {} of n{} appended, and no log has a line of a \
                             version that held it",
                            step.table, step.key, op.txn, op.node
                        ));
                    }
                }
            }
        }
    }
}
