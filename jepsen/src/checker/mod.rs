//! Checkers: each asks one thing of a history.
//!
//! In:   a [`History`], from a run or a file        Out: [`Verdict`]s
//! Invariants: 1. a checker that had nothing to look at says so, it never says "holds"; 2. each has tests with
//!        planted violations that it must find
//! Not here: how the truth is computed (`crate::truth`), which checks a workload must stand (`crate::workload`)

pub mod append;
pub mod atomic;
pub mod causal;
pub mod conflicts;
pub mod durable;
pub mod finals;
pub mod quiet;
pub mod session;
pub mod sum;
#[cfg(test)]
mod tests;
pub mod thin_air;
pub mod total;
pub mod unique;

use serde::{Deserialize, Serialize};

use crate::history::History;
use crate::nemesis;
use crate::policy::Rule;
use crate::system::System;
use crate::truth::Truth;
use crate::workload::Workload;

/// One question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// After the last fault, what is written anywhere arrives everywhere.
    Arrival,
    /// All nodes hold the same rows.
    Equal,
    /// Acknowledged transactions are at every node, and wrote what they said; those that failed are at none.
    Durable,
    /// Stamps in progress rows are those that the origin's own WAL gives.
    Stamps,
    /// No transaction is applied before one that it had seen.
    Order,
    /// Each row holds the version that its policy prefers: usually the one with the highest stamp.
    FinalValue,
    /// Each row holds the sum of what was added to it.
    Sum,
    /// Sums of whole tables, at any moment.
    Total,
    /// The conflict log holds what it must, and nothing that it must not.
    ConflictLog,
    /// Logs name the same lost writes at every node, as far as they must.
    LogsEqual,
    /// Causal convergence of everything read and written.
    Causal,
    /// A read sees of everything it depends on at least that version.
    Visible,
    /// No transaction is half seen.
    Atomic,
    /// The four session guarantees.
    Session,
    /// Every value that was found was written, where rows come and go.
    ThinAir,
    /// Lists are whole, in causal order, and nothing appended is gone without a line.
    Append,
    /// Each unique value is one row's, and every row that lost it has a line.
    Unique,
    /// Slot, journal and index shrink once all is quiet.
    Bounded,
    /// No server or daemon ended by itself, and none went on where it had to end.
    Alive,
    /// What the nemesis is for was done at all.
    Faults,
    /// This program knows what was run. Asked only where it does not: then nothing else can be.
    Known,
}

impl Check {
    /// What it asks, for people.
    pub fn question(self) -> &'static str {
        match self {
            Self::Arrival => "after the last fault, what is written anywhere arrives everywhere",
            Self::Equal => "all nodes hold the same rows",
            Self::Durable => {
                "every acknowledged transaction is at every node, with all that it wrote, none that failed is at any"
            }
            Self::Stamps => "stamps that travelled are those that the origin's WAL gives",
            Self::Order => "no node applied a transaction before one that it had seen",
            Self::FinalValue => "each row holds the version that has to win",
            Self::Sum => "each row holds all that was added to it, once, and nothing of it was called lost",
            Self::Total => "no snapshot of any node shows sums that a half transaction would make",
            Self::ConflictLog => "every lost write has its line, no line is without a lost write",
            Self::LogsEqual => "every node names every lost write that all must name, once",
            Self::Causal => "everything read and written is causally convergent",
            Self::Visible => "a read sees at least the versions that it depends on",
            Self::Atomic => "no transaction is seen half",
            Self::Session => "sessions read their writes, and never go back",
            Self::ThinAir => {
                "every value that was found in a row was written to it by a committed transaction"
            }
            Self::Append => "lists are whole, in causal order, and no append is gone without a line",
            Self::Unique => "each unique value is one row's, and each row that lost one has its line",
            Self::Bounded => "slot, journal and index are small once all is quiet",
            Self::Alive => "no server or daemon ended by itself but those that had to",
            Self::Faults => "faults happened: where none could, nothing was survived",
            Self::Known => "workload, system and nemesis are known, so that it is known what to ask",
        }
    }

    /// As on the command line and in files.
    pub fn name(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => name,
            _ => format!("{self:?}"),
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Answer {
    /// Looked at so many things, all right.
    Holds {
        /// Of what there were so many.
        looked_at: usize,
    },
    /// It does not hold.
    Violated {
        /// How often; at most some of them are told.
        count: usize,
        /// In words.
        findings: Vec<String>,
    },
    /// Nobody can say.
    Unknown {
        /// Why.
        why: String,
    },
}

/// A check and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The question.
    pub check: Check,
    /// The answer.
    #[serde(flatten)]
    pub answer: Answer,
}

/// All verdicts taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Exit code 0.
    Holds,
    /// Exit code 2.
    Unknown,
    /// Exit code 1.
    Violated,
}

impl Outcome {
    /// Of some verdicts: one violation is enough; without verdicts nobody can say.
    pub fn of(verdicts: &[Verdict]) -> Self {
        let each = verdicts.iter().map(|verdict| match verdict.answer {
            Answer::Holds { .. } => Self::Holds,
            Answer::Violated { .. } => Self::Violated,
            Answer::Unknown { .. } => Self::Unknown,
        });
        each.max().unwrap_or(Self::Unknown)
    }

    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Holds => 0,
            Self::Violated => 1,
            Self::Unknown => 2,
        }
    }

    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Violated => "VIOLATED",
            Self::Unknown => "could not tell",
        }
    }
}

/// Findings told in full; all are counted.
const TOLD: usize = 20;

/// Collects an answer.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    looked_at: usize,
    count: usize,
    told: Vec<String>,
}

impl Findings {
    /// One more thing was looked at.
    pub(crate) fn look(&mut self) {
        self.looked_at += 1;
    }

    /// So many more.
    pub(crate) fn look_at(&mut self, count: usize) {
        self.looked_at += count;
    }

    /// Something is wrong.
    pub(crate) fn add(&mut self, text: String) {
        self.count += 1;
        if self.told.len() < TOLD {
            self.told.push(text);
        }
    }

    /// The answer; `nothing` is why there may have been nothing to look at.
    pub(crate) fn answer(self, nothing: &str) -> Answer {
        if self.count > 0 {
            return Answer::Violated {
                count: self.count,
                findings: self.told,
            };
        }
        if self.looked_at == 0 {
            return Answer::Unknown {
                why: nothing.to_owned(),
            };
        }
        Answer::Holds {
            looked_at: self.looked_at,
        }
    }
}

/// What is not promised of what is committed between the loss of a slot and `anabranch heal`.
const NOT_OF_A_GAP: &[Check] = &[Check::Causal, Check::Visible, Check::Atomic, Check::Session];

/// Asks every question that the history's workload must stand.
pub fn check(history: &History) -> Vec<Verdict> {
    let header = &history.header;
    let (Some(workload), Some(system), Some(rule), true) = (
        Workload::named(&header.workload),
        System::named(&header.system),
        Rule::named(&header.policy),
        header.nemesis.is_empty() || nemesis::exists(&header.nemesis),
    ) else {
        return check_these(history, &[Check::Known]);
    };
    let mut checks = workload.checks(system.name());
    rule.of_checks(&mut checks);
    if nemesis::heals(&header.nemesis) {
        // What was committed while nobody decoded comes again row by row, not transaction by transaction.
        checks.retain(|check| !NOT_OF_A_GAP.contains(check));
    }
    let is_any_lost = history.end().is_some_and(|end| !end.lost.is_empty());
    if is_any_lost || history.healed().next().is_some() {
        // Streams end and begin elsewhere.
        checks.retain(|check| *check != Check::Order);
    }
    let clients = header.clients * header.servers.len();
    if workload.claims && clients < crate::generator::LOOKS_ON {
        // Of few clients none reads.
        checks.retain(|check| *check != Check::ThinAir);
    }
    if !matches!(header.nemesis.as_str(), "" | "none") {
        checks.push(Check::Faults);
    }
    check_these(history, &checks)
}

/// Asks these questions.
pub fn check_these(history: &History, checks: &[Check]) -> Vec<Verdict> {
    let truth = Truth::of(history);
    let graph = causal::Graph::of(history, &truth);
    checks
        .iter()
        .map(|&check| Verdict {
            check,
            answer: ask(check, history, &truth, &graph),
        })
        .collect()
}

fn ask(check: Check, history: &History, truth: &Truth, graph: &causal::Graph) -> Answer {
    let answer = match check {
        Check::Arrival => quiet::arrival(history),
        Check::Equal => finals::equal(history),
        Check::Durable => durable::durable(history, truth),
        Check::Stamps => finals::stamps(truth),
        Check::Order => finals::order(truth),
        Check::FinalValue => finals::final_value(history, truth),
        Check::Sum => sum::sum(history),
        Check::Total => total::total(history),
        Check::ConflictLog => conflicts::exact(history, truth),
        Check::LogsEqual => conflicts::at_every_node(history, truth),
        Check::Causal => graph.convergence(),
        Check::Visible => graph.visible(truth),
        Check::Atomic => atomic::atomic(graph, truth),
        Check::Session => session::session(history, graph, truth),
        Check::ThinAir => thin_air::thin_air(history),
        Check::Append => append::append(history, truth, graph),
        Check::Unique => unique::unique(history, truth),
        Check::Bounded => quiet::bounded(history),
        Check::Alive => quiet::alive(history),
        Check::Faults => quiet::faults(history),
        Check::Known => Answer::Unknown {
            why: format!(
                "nobody knows what to ask of workload `{}` under nemesis `{}` on system `{}`, by policy `{}`",
                history.header.workload, history.header.nemesis, history.header.system, history.header.policy
            ),
        },
    };
    match missing(history) {
        None => answer,
        Some(why) => of_a_part(check, answer, why),
    }
}

/// Why the history is not whole.
fn missing(history: &History) -> Option<String> {
    if let Some(why) = &history.header.cut_short {
        return Some(format!("the run was cut short: {why}"));
    }
    match history.end() {
        None => Some("the history has no end: the run was cut short".to_owned()),
        Some(end) => end.incomplete.clone(),
    }
}

/// The answer where something is missing: it can hide a violation, and it can make one, such as a value that seems to be from nowhere
/// since the WAL with the transaction that wrote it was not read. Not where all that is asked is what did happen.
fn of_a_part(check: Check, answer: Answer, why: String) -> Answer {
    let told_by_itself = matches!(
        check,
        Check::Arrival | Check::Total | Check::Bounded | Check::Alive | Check::Known
    );
    match answer {
        Answer::Violated { count, findings } if !told_by_itself => Answer::Unknown {
            why: format!(
                "{why}; what was found may come of that: {count}: {}",
                findings.first().map_or("", String::as_str)
            ),
        },
        // That there was nothing to look at has the same reason, but where nobody knows what to ask.
        Answer::Unknown { .. } if check != Check::Known => Answer::Unknown { why },
        Answer::Holds { .. } => Answer::Unknown { why },
        answer => answer,
    }
}
