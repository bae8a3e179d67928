//! Sums of whole tables, at any moment and at the end: a transaction that takes here what it gives there is never seen half, so no
//! snapshot of any node has another sum.

use std::collections::BTreeMap;

use super::durable::WITNESS;
use super::{Answer, Findings};
use crate::history::{Act, History, Stage};
use crate::workload::{Books, Workload};

/// Is every sum what it has to be?
pub(crate) fn total(history: &History) -> Answer {
    let mut findings = Findings::default();
    let Some(workload) = Workload::named(&history.header.workload) else {
        return findings.answer("the workload is not known");
    };
    let books = workload.books(history.header.keys);
    for op in history.ops().filter(|op| op.stage == Stage::Ok) {
        let totals = op.steps.iter().filter(|step| step.act == Act::Total);
        let totals: Vec<(&str, i64)> = totals
            .filter_map(|step| Some((step.table.as_str(), step.value?)))
            .collect();
        let place = || {
            format!(
                "transaction {} of n{} after {:.1} s",
                op.txn,
                op.node,
                op.at_us as f64 / 1e6
            )
        };
        judge(books, &totals, place, &mut findings);
    }
    let mut ends: BTreeMap<u16, Vec<(&str, i64)>> = BTreeMap::new();
    let tables = history.finals().filter(|table| table.table != WITNESS);
    for table in tables.filter(|table| !history.lost(table.node)) {
        let sum = table.rows.iter().filter_map(|(_, value, _)| *value).sum();
        ends.entry(table.node).or_default().push((&table.table, sum));
    }
    for (node, totals) in &ends {
        judge(books, totals, || format!("n{node} at the end"), &mut findings);
    }
    findings.answer("no sum was read")
}

fn judge(books: Books, totals: &[(&str, i64)], place: impl Fn() -> String, findings: &mut Findings) {
    let Some(&(_, first)) = totals.first() else { return };
    let expected = match books {
        Books::None => return,
        Books::Constant(sum) => sum,
        Books::Alike => first,
    };
    findings.look_at(totals.len());
    if totals.iter().any(|(_, sum)| *sum != expected) {
        let shown: Vec<String> = totals
            .iter()
            .map(|(table, sum)| format!("{table} {sum}"))
            .collect();
        let should = match books {
            Books::Constant(sum) => format!("it is {sum} at all times"),
            _ => "they are alike at all times".to_owned(),
        };
        findings.add(format!(
            "{}: the sums are {}, but {should}",
            place(),
            shown.join(", ")
        ));
    }
}
