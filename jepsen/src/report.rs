//! Verdicts for people: a table for the terminal, one HTML page for a run, one for many.
//!
//! Not here: what they say (`crate::checker`). The page is one file without scripts: what it shows, it holds.

mod evidence;
mod faults;
mod lanes;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};
use serde::{Deserialize, Serialize};

use crate::checker::{Answer, Outcome, Verdict};
use crate::history::{History, Stage};
use crate::nemesis::Network;
use crate::policy::Rule;

/// A table for the terminal.
pub fn terminal(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(TableStyle::new().header_separator(LineStyle::new('─', '─', '─', '─')))
        .set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.to_string()
}

/// The checks of a run.
pub fn table(verdicts: &[Verdict]) -> String {
    let rows = verdicts.iter().map(|verdict| {
        let (word, found) = words(&verdict.answer);
        vec![
            verdict.check.name(),
            word.to_owned(),
            found.chars().take(90).collect(),
        ]
    });
    terminal(&["check", "verdict", "looked at / found"], rows)
}

fn words(answer: &Answer) -> (&'static str, String) {
    match answer {
        Answer::Holds { looked_at } => ("holds", looked_at.to_string()),
        Answer::Violated { count, findings } => {
            let first = findings.first().map_or("", String::as_str);
            ("VIOLATED", format!("{count}: {first}"))
        }
        Answer::Unknown { why } => ("could not tell", why.clone()),
    }
}

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:66rem;padding:0 1rem;color:#222}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}\
td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}\
code,pre{font:13px/1.4 ui-monospace,monospace;background:#f4f4f4}pre{padding:.6rem;overflow-x:auto;white-space:pre-wrap}\
.holds{color:#186a3b}.VIOLATED{color:#b00020;font-weight:600}.unknown{color:#8a6d00}\
svg{width:100%;height:auto;background:#fafafa}.note{color:#666;font-size:.9rem}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn class(word: &str) -> &str {
    if word == "could not tell" { "unknown" } else { word }
}

/// The page of one run.
pub fn html(history: &History, verdicts: &[Verdict]) -> String {
    let header = &history.header;
    let outcome = Outcome::of(verdicts).word();
    let policy = Rule::of(history).unusual();
    let policy = policy.map_or(String::new(), |policy| format!(" by {policy}"));
    let title = format!("{}{policy} under {}", header.workload, header.nemesis);
    let mut out = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title}: {outcome}</title><style>{STYLE}</style>\
         <h1>{title}: <span class='{}'>{outcome}</span></h1>",
        class(outcome)
    );
    let broken = header.broken.as_ref().map_or(String::new(), |rule| {
        format!(", <b>with the rule <code>{rule}</code> broken on purpose</b>")
    });
    let _ = write!(
        out,
        "<p>{} nodes of PostgreSQL {:?}, system {}, network {}, {} clients each, {} s{broken}. Again:</p><pre>{}</pre>\
         <p class=note>The seed fixes the operations of every client and the schedule of faults, not how real processes \
         interleave: the same seed need not give the same history.</p>",
        header.servers.len(),
        header.servers,
        header.system,
        Network::named(&header.network).map_or(header.network.as_str(), |network| network.name()),
        header.clients,
        header.seconds,
        escaped(&header.command)
    );
    faults::impossible(&mut out, history);
    checks(&mut out, verdicts);
    evidence::anomalies(&mut out, history, verdicts);
    out.push_str("<h2>Operations and faults</h2>");
    let timeline = Timeline::of(history);
    out.push_str(&timeline.svg());
    lanes::draw(&mut out, history, &timeline);
    faults::availability(&mut out, history);
    curves(&mut out, history);
    ending(&mut out, history);
    out.push_str("</html>");
    out
}

fn checks(out: &mut String, verdicts: &[Verdict]) {
    out.push_str("<h2>Checks</h2><table><tr><th>check<th>asks<th>verdict<th>looked at, or found");
    for verdict in verdicts {
        let (word, found) = words(&verdict.answer);
        let found = match &verdict.answer {
            Answer::Violated { count, .. } => format!("{count}, below"),
            _ => escaped(&found),
        };
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td class='{}'>{word}<td>{found}",
            verdict.check.name(),
            verdict.check.question(),
            class(word)
        );
    }
    out.push_str("</table>");
    for verdict in verdicts {
        if let Answer::Violated { count, findings } = &verdict.answer {
            let _ = write!(
                out,
                "<h3>{}: {count} found, {} shown</h3><pre>",
                verdict.check.name(),
                findings.len()
            );
            for finding in findings {
                let _ = writeln!(out, "{}", escaped(finding));
            }
            out.push_str("</pre>");
        }
    }
}

/// Width and height of a picture, units of SVG.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 220.0;

/// A fault's time.
struct Band {
    name: String,
    from_us: i64,
    to_us: i64,
}

fn bands(history: &History) -> Vec<Band> {
    let mut open: BTreeMap<&str, i64> = BTreeMap::new();
    let mut bands = Vec::new();
    for fault in history.faults() {
        match fault.phase.as_str() {
            "start" => {
                open.insert(&fault.name, fault.at_us);
            }
            "stop" => {
                if let Some(from_us) = open.remove(fault.name.as_str()) {
                    bands.push(Band {
                        name: fault.name.clone(),
                        from_us,
                        to_us: fault.at_us,
                    });
                }
            }
            _ => {}
        }
    }
    bands
}

fn length_us(history: &History) -> i64 {
    history.ops().map(|op| op.at_us).max().unwrap_or(1).max(1)
}

/// Latencies and rates with the faults behind them.
struct Timeline {
    length_us: i64,
    bands: Vec<Band>,
    /// (end, latency, how it ended).
    points: Vec<(i64, i64, Stage)>,
    /// Acknowledged transactions, per second and node.
    rates: BTreeMap<u16, Vec<f64>>,
}

impl Timeline {
    fn of(history: &History) -> Self {
        let length_us = length_us(history);
        let mut invoked = BTreeMap::new();
        let mut points = Vec::new();
        let mut rates: BTreeMap<u16, Vec<f64>> = BTreeMap::new();
        let seconds = usize::try_from(length_us / 1_000_000).unwrap_or(0) + 1;
        for op in history.ops() {
            if op.stage == Stage::Invoke {
                invoked.insert(op.txn, op.at_us);
                continue;
            }
            if let Some(began) = invoked.get(&op.txn) {
                points.push((op.at_us, op.at_us - began, op.stage));
            }
            if op.stage == Stage::Ok {
                let of_node = rates.entry(op.node).or_insert_with(|| vec![0.0; seconds]);
                if let Some(count) = of_node.get_mut(usize::try_from(op.at_us / 1_000_000).unwrap_or(0)) {
                    *count += 1.0;
                }
            }
        }
        Self {
            length_us,
            bands: bands(history),
            points,
            rates,
        }
    }

    fn x(&self, at_us: i64) -> f64 {
        at_us as f64 / self.length_us as f64 * WIDTH
    }

    fn backdrop(&self) -> String {
        let mut out = String::new();
        for band in &self.bands {
            let (from, to) = (self.x(band.from_us), self.x(band.to_us));
            let _ = write!(
                out,
                "<rect x='{from:.1}' y='0' width='{:.1}' height='{HEIGHT}' fill='#f3c6c6' opacity='.55'><title>{} \
                 ({:.1} s to {:.1} s)</title></rect>",
                (to - from).max(1.0),
                escaped(&band.name),
                band.from_us as f64 / 1e6,
                band.to_us as f64 / 1e6
            );
        }
        out
    }

    fn svg(&self) -> String {
        let mut out = format!(
            "<p class=note>Latency of each transaction, 0.1 ms to 10 s, logarithmic; red bands are faults (point at them \
             for their names). Blue acknowledged, orange refused, red unknown.</p><svg viewBox='0 0 {WIDTH} {HEIGHT}'>{}",
            self.backdrop()
        );
        // At most some thousands of dots: a page must stay light.
        let step = (self.points.len() / 6_000).max(1);
        for (at, latency, stage) in self
            .points
            .iter()
            .enumerate()
            .filter(|(at, (_, _, stage))| at % step == 0 || *stage != Stage::Ok)
            .map(|(_, point)| point)
        {
            let decades = ((*latency).max(100) as f64 / 100.0).log10() / 5.0;
            let color = match stage {
                Stage::Ok => "#2266aa",
                Stage::Info => "#cc0000",
                _ => "#e69500",
            };
            let _ = write!(
                out,
                "<circle cx='{:.1}' cy='{:.1}' r='1.6' fill='{color}' opacity='.5'/>",
                self.x(*at),
                HEIGHT - decades.min(1.0) * HEIGHT
            );
        }
        out.push_str("</svg><p class=note>Acknowledged transactions a second, at each node.</p>");
        let rates = self.rates.iter();
        let rates = rates.map(|(node, values)| (*node, values.iter().copied().map(Some).collect()));
        out.push_str(&self.lines(&rates.collect()));
        out
    }

    /// One value a second of each node; a gap where there is none.
    fn lines(&self, series: &BTreeMap<u16, Vec<Option<f64>>>) -> String {
        let mut out = format!("<svg viewBox='0 0 {WIDTH} {HEIGHT}'>{}", self.backdrop());
        let top = series.values().flatten().flatten().copied().fold(1.0, f64::max);
        for (node, values) in series {
            let color = COLORS[usize::from(*node) % COLORS.len()];
            let points: Vec<Option<String>> = (0..)
                .zip(values)
                .map(|(second, value)| {
                    let x = self.x(second * 1_000_000 + 500_000);
                    value.map(|value| format!("{x:.1},{:.1}", HEIGHT - value / top * (HEIGHT - 14.0)))
                })
                .collect();
            for line in points.split(Option::is_none).filter(|line| !line.is_empty()) {
                let line: Vec<&str> = line.iter().flatten().map(String::as_str).collect();
                let _ = write!(
                    out,
                    "<polyline points='{}' fill='none' stroke='{color}' stroke-width='2' stroke-linecap='round'><title>n{node}</title>\
                     </polyline>",
                    line.join(" ")
                );
            }
        }
        let _ = write!(out, "<text x='4' y='12' font-size='12'>{top:.0}</text></svg>");
        out
    }
}

const COLORS: &[&str] = &["#555555", "#2266aa", "#dd7711", "#228844", "#aa3377", "#6644bb"];

fn curves(out: &mut String, history: &History) {
    let timeline = Timeline::of(history);
    type Pick = fn(&crate::history::Sample) -> Option<f64>;
    let curves: [(&str, Pick); 6] = [
        ("Lag of the farthest peer, seconds", |sample| sample.lag_seconds),
        ("Rows not stable yet", |sample| {
            sample.index_entries.map(|count| count as f64)
        }),
        ("Conflicts logged since the daemon's start", |sample| {
            sample.conflicts.map(|count| count as f64)
        }),
        ("Journal, MiB", |sample| {
            sample.journal_bytes.map(|bytes| bytes as f64 / 1_048_576.0)
        }),
        ("WAL that the slot holds back, MiB", |sample| {
            sample.slot_bytes.map(|bytes| bytes as f64 / 1_048_576.0)
        }),
        ("Server's clock off by, seconds (absolute)", |sample| {
            sample.clock_us.map(|us| us.unsigned_abs() as f64 / 1e6)
        }),
    ];
    out.push_str(
        "<h2>Curves</h2><p class=note>A gap is a time in which the server or the daemon did not answer.</p>",
    );
    for (name, pick) in curves {
        let series = sampled(history, timeline.length_us, pick);
        let _ = write!(out, "<p class=note>{name}</p>{}", timeline.lines(&series));
    }
    alarms(out, history);
}

/// Alarms that stood when somebody looked, every two seconds.
fn alarms(out: &mut String, history: &History) {
    let mut seen: BTreeMap<(u16, &str), (i64, i64)> = BTreeMap::new();
    for sample in history.samples() {
        for text in &sample.alarms {
            let first = (sample.at_us, sample.at_us);
            seen.entry((sample.node, text)).or_insert(first).1 = sample.at_us;
        }
    }
    if seen.is_empty() {
        return;
    }
    out.push_str(
        "<h2>Alarms while the load went on</h2><table><tr><th>node<th>seen from, s<th>to, s<th>alarm",
    );
    for ((node, text), (from_us, to_us)) in seen {
        let (from, to) = (from_us as f64 / 1e6, to_us as f64 / 1e6);
        let _ = write!(
            out,
            "<tr><td>n{node}<td>{from:.1}<td>{to:.1}<td>{}",
            escaped(text)
        );
    }
    out.push_str("</table>");
}

/// Per node and second what its last sample by then says: nothing, where that one had no answer, or was none yet.
fn sampled(
    history: &History,
    length_us: i64,
    pick: fn(&crate::history::Sample) -> Option<f64>,
) -> BTreeMap<u16, Vec<Option<f64>>> {
    let seconds = usize::try_from(length_us / 1_000_000).unwrap_or(0) + 1;
    let mut series: BTreeMap<u16, Vec<Option<f64>>> = BTreeMap::new();
    for sample in history.samples() {
        let values = series.entry(sample.node).or_insert_with(|| vec![None; seconds]);
        let from = usize::try_from(sample.at_us / 1_000_000).unwrap_or(0);
        for slot in values.iter_mut().skip(from) {
            *slot = pick(sample);
        }
    }
    series
}

fn ending(out: &mut String, history: &History) {
    let Some(end) = history.end() else {
        let why = history.header.cut_short.as_deref().unwrap_or("nobody knows why");
        let _ = write!(
            out,
            "<h2>The end</h2><p>The run was cut short: {}</p>",
            escaped(why)
        );
        return;
    };
    let after = |at: Option<i64>, from_us: i64| {
        at.map_or_else(
            || format!("not within {} s", end.patience_seconds),
            |at| format!("{:.2} s", (at - from_us) as f64 / 1e6),
        )
    };
    let load_us = end.load_ended_us();
    let _ = write!(
        out,
        "<h2>The end</h2><p>After the end of the load, at {:.1} s: all arrived {}, rows equal {}. After the undoing of the last fault, at \
         {:.1} s, with the rest of the load in it: all arrived {}, rows equal {}.</p>\
         <table><tr><th>node<th>slot behind, bytes<th>WAL held back, bytes<th>journal, bytes<th>rows not stable\
         <th>of the journal and these rows not asked, since",
        load_us as f64 / 1e6,
        after(end.arrived_us, load_us),
        after(end.equal_us, load_us),
        end.healed_us as f64 / 1e6,
        after(end.arrived_us, end.healed_us),
        after(end.equal_us, end.healed_us)
    );
    for (node, slot, journal) in &end.rest {
        let not_asked = end.not_asked.iter().find(|(of, _)| of == node);
        let why = not_asked.map_or("", |(_, why)| why.as_str());
        let of_node = |of: &u16| of == node;
        let held_back = end.held_back.iter().find(|(of, _)| of_node(of));
        let unstable = end.unstable.iter().find(|(of, _)| of_node(of));
        let _ = write!(
            out,
            "<tr><td>n{node}<td>{slot}<td>{}<td>{journal}<td>{}<td>{}",
            held_back.map_or(String::new(), |(_, bytes)| bytes.to_string()),
            unstable.map_or(String::new(), |(_, rows)| rows
                .map_or_else(|| "no answer".to_owned(), |rows| rows.to_string())),
            escaped(why)
        );
    }
    out.push_str("</table>");
    if let Some((seconds, rounds)) = end.rest_after {
        let _ = write!(
            out,
            "<p class=note>So after {seconds} s, in which all that was known became stable {rounds} times.</p>"
        );
    }
    for (node, name, text) in &end.alarms {
        let _ = write!(
            out,
            "<p>At n{node} the alarm <code>{}</code> stands at rest: {}</p>",
            escaped(name),
            escaped(text)
        );
    }
    if let Some(difference) = &end.difference {
        let _ = write!(out, "<h3>Rows that differ</h3><pre>{}</pre>", escaped(difference));
    }
    evidence::conflict_log(out, history);
    evidence::logs(out, end);
}

/// One row of a summary.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// The workload.
    pub workload: String,
    /// The nemesis.
    pub nemesis: String,
    /// The network; empty where it was the usual one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub network: String,
    /// Workload, nemesis, the network unless it was the usual one, what was broken.
    pub run: String,
    /// The seed.
    pub seed: u64,
    /// Acknowledged transactions.
    pub acknowledged: usize,
    /// Faults that happened, and that could not or met nothing.
    pub faults: (usize, usize),
    /// How often each kind of those that happened did.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub variants: BTreeMap<String, usize>,
    /// Seconds from the undoing of the last fault until rows were equal. While the load goes on they are not, so the rest of the load is in it.
    pub recovery: Option<f64>,
    /// Seconds from the end of the load until rows were equal.
    #[serde(default)]
    pub quiet: Option<f64>,
    /// All checks together, in a word.
    pub outcome: String,
    /// The checks that do not hold.
    pub failed: Vec<String>,
    /// The command that runs it again.
    #[serde(default)]
    pub again: String,
    /// Name of its page, beside the summary.
    pub page: String,
}

/// What a run is called.
pub fn run_name(workload: &str, policy: Rule, nemesis: &str) -> String {
    let policy = policy
        .unusual()
        .map_or(String::new(), |policy| format!(", {policy}"));
    format!("{workload} / {nemesis}{policy}")
}

/// What was run, and on which network, as a [`Summary`] names it, unless it was the usual one.
pub fn on_network(what: &str, network: &str) -> String {
    if network.is_empty() {
        what.to_owned()
    } else {
        format!("{what}, {network}")
    }
}

/// Seconds until something was, for people.
pub fn seconds(after: Option<f64>) -> String {
    after.map_or_else(|| "never".to_owned(), |seconds| format!("{seconds:.1} s"))
}

/// The page over many runs.
pub fn summary(title: &str, runs: &[Summary]) -> String {
    let mut out = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>\
         <p class=note>Rows are equal so long after the undoing of the last fault, with the rest of the load in it, and so long after the \
         end of the load.</p>\
         <table><tr><th>run<th>seed<th>acknowledged<th>faults<th>impossible<th>equal after undoing<th>after load<th>verdict<th>not held"
    );
    for run in runs {
        let (recovery, quiet) = (seconds(run.recovery), seconds(run.quiet));
        let _ = write!(
            out,
            "<tr><td><a href='{}'>{}</a><td>{}<td>{}<td>{}<td>{}<td>{recovery}<td>{quiet}<td class='{}'>{}<td>{}",
            run.page,
            escaped(&run.run),
            run.seed,
            run.acknowledged,
            run.faults.0,
            run.faults.1,
            class(&run.outcome),
            run.outcome,
            run.failed.join(", ")
        );
    }
    out.push_str("</table></html>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Event, Sample};

    #[test]
    fn a_curve_has_a_gap_while_nobody_answers() {
        let sample = |second: i64, lag_seconds: Option<f64>| {
            Event::Sample(Sample {
                at_us: second * 1_000_000,
                node: 1,
                lag_seconds,
                ..Sample::default()
            })
        };
        let history = History {
            events: vec![sample(1, Some(2.0)), sample(3, None), sample(4, Some(0.5))],
            ..History::default()
        };
        let series = sampled(&history, 5_000_000, |sample| sample.lag_seconds);
        assert_eq!(
            series[&1],
            [None, Some(2.0), Some(2.0), None, Some(0.5), Some(0.5)]
        );
        let drawn = Timeline::of(&history).lines(&series);
        assert_eq!(drawn.matches("<polyline").count(), 2, "{drawn}");
    }
}
