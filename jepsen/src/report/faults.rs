//! What each fault did to whoever wrote meanwhile, how soon all went on after it, and what could not be done.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{bands, escaped, length_us};
use crate::history::{Fault, History, Stage};

/// Faults that could not be made, that met nothing, or for which no time was left.
pub(super) fn impossible(out: &mut String, history: &History) {
    let told: Vec<String> = history
        .faults()
        .filter(|fault| fault.is_of_nothing())
        .map(|fault| format!("<li>{}: {}", escaped(&fault.name), escaped(&fault.detail)))
        .collect();
    if !told.is_empty() {
        let _ = write!(
            out,
            "<p>Faults that could not run, met nothing, or were left out, and so were <b>not</b> survived:</p><ul>{}</ul>",
            told.join("")
        );
    }
}

/// Acknowledged transactions: per node when.
struct Acknowledged(BTreeMap<u16, Vec<i64>>);

impl Acknowledged {
    fn of(history: &History) -> Self {
        let mut times: BTreeMap<u16, Vec<i64>> = history.nodes().map(|node| (node, Vec::new())).collect();
        for op in history.ops().filter(|op| op.stage == Stage::Ok) {
            times.entry(op.node).or_default().push(op.at_us);
        }
        for of_node in times.values_mut() {
            of_node.sort_unstable();
        }
        Self(times)
    }

    fn between(times: &[i64], from_us: i64, to_us: i64) -> usize {
        times.partition_point(|at| *at <= to_us) - times.partition_point(|at| *at < from_us)
    }
}

/// So many a second.
fn rate(count: usize, from_us: i64, to_us: i64) -> f64 {
    count as f64 * 1e6 / (to_us - from_us).max(1) as f64
}

/// Per fault and node: how many were acknowledged a second while it lasted, as a share of the run's whole, and how long after it the
/// first was.
pub(super) fn availability(out: &mut String, history: &History) {
    out.push_str(
        "<h2>Availability under each fault</h2><p class=note>Per node: acknowledged transactions a second while it lasted, and of what the node \
         does over the whole run (100% is no loss). Then how long after its end each node acknowledged again, and how soon no \
         daemon saw a peer more than a second behind (looked at every two seconds).</p>\
         <table><tr><th>fault<th>how<th>from, s<th>to, s<th>acknowledged a second<th>refused or unknown<th>again after<th>caught up after",
    );
    let acknowledged = Acknowledged::of(history);
    let whole_us = length_us(history);
    for band in bands(history) {
        let ended = history
            .ops()
            .filter(|op| (band.from_us..=band.to_us).contains(&op.at_us));
        let bad = ended
            .filter(|op| matches!(op.stage, Stage::Fail | Stage::Info))
            .count();
        let mut good = Vec::new();
        let mut again = Vec::new();
        for (node, times) in &acknowledged.0 {
            let count = Acknowledged::between(times, band.from_us, band.to_us);
            let here = rate(count, band.from_us, band.to_us);
            let usual = rate(times.len(), 0, whole_us);
            let share = if usual > 0.0 { here / usual * 100.0 } else { 0.0 };
            good.push(format!("n{node}: {here:.0} ({share:.0}%)"));
            let next = times.get(times.partition_point(|at| *at < band.to_us));
            again.push(match next {
                Some(at) => format!("n{node}: {:.2} s", (at - band.to_us) as f64 / 1e6),
                None => format!("n{node}: never"),
            });
        }
        let told = |phase: &str, at_us: i64| {
            let is_it =
                |fault: &&Fault| fault.phase == phase && fault.name == band.name && fault.at_us == at_us;
            history.faults().find(is_it).map(|fault| escaped(&fault.detail))
        };
        let how = [told("start", band.from_us), told("stop", band.to_us)];
        let how: Vec<String> = how
            .into_iter()
            .flatten()
            .filter(|text| !text.is_empty())
            .collect();
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td>{:.1}<td>{:.1}<td>{}<td>{bad}<td>{}<td>{}",
            escaped(&band.name),
            how.join("; "),
            band.from_us as f64 / 1e6,
            band.to_us as f64 / 1e6,
            good.join(", "),
            again.join(", "),
            caught_up(history, band.to_us)
        );
    }
    out.push_str("</table>");
}

/// The first moment from which on every daemon has answered since, with a lag of at most a second.
fn caught_up(history: &History, since_us: i64) -> String {
    let mut lags: BTreeMap<u16, bool> = BTreeMap::new();
    let nodes = history.survivors().count();
    for sample in history.samples().filter(|sample| sample.at_us >= since_us) {
        lags.insert(sample.node, sample.lag_seconds.is_some_and(|lag| lag <= 1.0));
        let prompt = lags
            .iter()
            .filter(|(node, prompt)| **prompt && !history.lost(**node))
            .count();
        if prompt == nodes {
            return format!("{:.1} s", (sample.at_us - since_us) as f64 / 1e6);
        }
    }
    "not seen before the load ended".to_owned()
}
