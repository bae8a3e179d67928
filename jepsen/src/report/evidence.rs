//! What belongs to a finding: the transactions that it names, the lines of the conflict logs about them; and the logs against what must be in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::escaped;
use crate::checker::conflicts::against_truth;
use crate::checker::{Answer, Verdict};
use crate::history::{End, History, Line, Op, Stage};
use crate::truth::Truth;

/// Transactions told of at most.
const TXNS: usize = 60;
/// Lines of logs told of at most.
const LINES: usize = 40;
/// The smallest transaction id has so many digits.
const DIGITS: usize = 12;

/// Ids of transactions that a text names.
fn named(text: &str) -> BTreeSet<i64> {
    let numbers = text.split(|letter: char| !letter.is_ascii_digit());
    let long = numbers.filter(|number| number.len() >= DIGITS);
    long.filter_map(|number| number.parse().ok()).collect()
}

/// Under the checks: of every violated one the transactions that its findings name, in the order of time, and the lines about them.
pub(super) fn anomalies(out: &mut String, history: &History, verdicts: &[Verdict]) {
    let mut begun: BTreeMap<i64, i64> = BTreeMap::new();
    for op in history.ops().filter(|op| op.stage == Stage::Invoke) {
        begun.insert(op.txn, op.at_us);
    }
    for verdict in verdicts {
        let Answer::Violated { findings, .. } = &verdict.answer else {
            continue;
        };
        let names: BTreeSet<i64> = findings.iter().flat_map(|finding| named(finding)).collect();
        // A value is its transaction and one digit more.
        let is_named = |txn: i64| names.contains(&txn) || names.iter().any(|name| name / 10 == txn);
        let ops: Vec<&Op> = history
            .ops()
            .filter(|op| op.stage != Stage::Invoke && is_named(op.txn))
            .collect();
        let lines: Vec<&Line> = history
            .lines()
            .filter(|line| line.lost_value.is_some_and(|value| is_named(value / 10)))
            .collect();
        if ops.is_empty() && lines.is_empty() {
            continue;
        }
        let name = verdict.check.name();
        let _ = write!(
            out,
            "<h3>{name}: the transactions that are named</h3><table><tr><th>began, s<th>ended, s<th>node<th>session<th>transaction<th><th>did"
        );
        for op in ops.iter().take(TXNS) {
            let steps: Vec<String> = op.steps.iter().map(ToString::to_string).collect();
            let began = begun.get(&op.txn).copied().unwrap_or(op.at_us);
            let _ = write!(
                out,
                "<tr><td>{:.4}<td>{:.4}<td>n{}<td>{}<td>{}<td>{:?}<td><code>{}</code>",
                began as f64 / 1e6,
                op.at_us as f64 / 1e6,
                op.node,
                op.process,
                op.txn,
                op.stage,
                escaped(&steps.join(" "))
            );
        }
        let _ = write!(
            out,
            "</table><p class=note>{} of {} shown.</p>",
            ops.len().min(TXNS),
            ops.len()
        );
        let _ = write!(
            out,
            "<h3>{name}: lines of the conflict logs in which they lost ({})</h3><pre>",
            lines.len()
        );
        for line in lines.iter().take(LINES) {
            let _ = writeln!(out, "n{}: {}", line.node, escaped(&line.text));
        }
        out.push_str("</pre>");
    }
}

/// The logs of all nodes against what the servers' own WAL says must, and may, be in them.
pub(super) fn conflict_log(out: &mut String, history: &History) {
    let lines = history.lines().count();
    let _ = write!(
        out,
        "<h3>Conflict log against the truth</h3><p>{lines} lines at all nodes together.</p>"
    );
    if history.header.is_anabranch() {
        out.push_str(
            "<table><tr><th>node<th>lines<th>versions that lost and must have one<th>of these without<th>versions that may have one\
             <th>lines of none of these",
        );
        for row in against_truth(history, &Truth::of(history)) {
            let _ = write!(
                out,
                "<tr><td>n{}<td>{}<td>{}<td>{}<td>{}<td>{}",
                row.node, row.lines, row.must, row.missing, row.may, row.unfounded
            );
        }
        out.push_str(
            "</table><p class=note>Rows that lost a unique value to another row have lines, too, which are not of these; sums have \
             none.</p>",
        );
    }
    out.push_str("<p>Some of the lines:</p><pre>");
    for line in history.lines().take(8) {
        let _ = writeln!(out, "{}", escaped(&line.text));
    }
    out.push_str("</pre>");
}

/// What daemons warned of.
pub(super) fn logs(out: &mut String, end: &End) {
    if end.said.is_empty() {
        return;
    }
    out.push_str(
        "<h3>Warnings and errors in the daemons' logs</h3><p class=note>The first of each daemon, by its own clock.</p><pre>",
    );
    for (node, line) in &end.said {
        let _ = writeln!(out, "n{node}: {}", escaped(line));
    }
    out.push_str("</pre>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_findings_transactions_are_found_in_its_text() {
        let text = "100001000007 (n1) must be before 200002000006 (n2): 17 reads kv/12, row 1000010000071";
        let found = named(text);
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [100_001_000_007, 200_002_000_006, 1_000_010_000_071]
        );
    }
}
