//! After the last fault: does everything arrive, does the kept log shrink, is everybody still there?

use std::collections::BTreeMap;

use super::{Answer, Findings, session};
use crate::history::{History, Stage};
use crate::nemesis::{Part, moves_sessions};

/// Largest WAL that a slot may not be confirmed to at rest, bytes. Clock witnesses go on: some hundred bytes are seen.
const SLOT_BYTES_MAX: i64 = 1 << 20;

/// Most WAL that a server may keep for a slot at rest, bytes: since the last checkpoint some pages, each once as a whole. What was written
/// just before, to fill the journals, is more.
const HELD_BACK_BYTES_MAX: i64 = 1 << 20;

/// Most segments of a journal at rest: the one being written, and two that wait for what follows them to be known everywhere.
const SEGMENTS_MAX: u64 = 3;

/// A segment of histories that do not say how long theirs are.
const FORMER_SEGMENT_BYTES: u64 = 16 << 20;

/// What was acknowledged so long before an fsync works again has been in the daemon's hands while it did not, microseconds: on a busy
/// machine one took two seconds to end.
const AT_ONCE_US: i64 = 3_000_000;

/// The end of a process is found so late, microseconds.
const FOUND_WITHIN_US: i64 = 2_000_000;

/// Does what is written after the last fault arrive everywhere?
pub(crate) fn arrival(history: &History) -> Answer {
    let mut findings = Findings::default();
    if let Some(end) = history.end() {
        findings.look();
        if end.arrived_us.is_none() {
            findings.add(format!(
                "what was written at every node after the last fault was not at every node {} s later",
                end.patience_seconds
            ));
        }
    }
    findings.answer("the history has no end")
}

/// Are slot and journal small at rest, and is nothing unstable?
pub(crate) fn bounded(history: &History) -> Answer {
    let mut findings = Findings::default();
    let Some(end) = history.end() else {
        return findings.answer("the history has no end");
    };
    let segment = match end.segment_bytes {
        0 => FORMER_SEGMENT_BYTES,
        bytes => bytes,
    };
    let waited = end.rest_after.map_or(String::new(), |(seconds, rounds)| {
        format!("; {seconds} s were waited, in which all that was known became stable {rounds} times")
    });
    for &(node, slot_bytes, journal_bytes) in &end.rest {
        findings.look();
        if slot_bytes > SLOT_BYTES_MAX {
            findings.add(format!(
                "n{node}: the slot holds back {slot_bytes} bytes of WAL at rest"
            ));
        }
        // What is not asked is not looked at; the report says why.
        if end.not_asked.iter().any(|(of, _)| *of == node) {
            continue;
        }
        findings.look();
        if journal_bytes > SEGMENTS_MAX * segment + segment / 2 {
            findings.add(format!(
                "n{node}: the journal has {journal_bytes} bytes at rest, more than {SEGMENTS_MAX} segments of {segment}{waited}"
            ));
        }
    }
    for &(node, bytes) in &end.held_back {
        findings.look();
        if bytes > HELD_BACK_BYTES_MAX {
            findings.add(format!(
                "n{node}: the server keeps {bytes} bytes of WAL for the slot at rest (restart_lsn)"
            ));
        }
    }
    let mut silent = Vec::new();
    for &(node, rows) in &end.unstable {
        findings.look();
        match rows {
            Some(0) => {}
            Some(rows) => findings.add(format!(
                "n{node}: {rows} rows are in the index at rest: they never became stable, or are not forgotten{waited}"
            )),
            None => silent.push(format!("n{node}")),
        }
    }
    match findings.answer("no slot or journal was measured at rest") {
        Answer::Holds { .. } if !silent.is_empty() => Answer::Unknown {
            why: format!("the daemon of {} did not answer at rest", silent.join(", ")),
        },
        answer => answer,
    }
}

/// Did any fault happen? Sessions that moved count: that is what `move` is.
pub(crate) fn faults(history: &History) -> Answer {
    let mut findings = Findings::default();
    findings.look_at(history.faults_done());
    if moves_sessions(&history.header.nemesis) && session::moved(history) {
        findings.look();
    }
    let impossible: Vec<String> = history
        .faults()
        .filter(|fault| fault.is_of_nothing())
        .map(|fault| format!("{}: {}", fault.name, fault.detail))
        .collect();
    let why = match impossible.as_slice() {
        [] => "no fault was planned: the run is too short".to_owned(),
        some => format!(
            "no fault could be made, or none met anything: {}",
            some.join("; ")
        ),
    };
    findings.answer(&why)
}

/// Faults that a daemon has to end of, and that it lived through though its node committed something meanwhile; with the node.
fn unheeded(history: &History) -> Vec<(String, u16)> {
    let plan = history.header.plan.iter().flatten();
    let mut deadly: BTreeMap<String, u16> = BTreeMap::new();
    for fault in plan.flat_map(|planned| &planned.faults) {
        if let Some((node, _)) = fault.must_end() {
            deadly.insert(fault.to_string(), u16::try_from(node + 1).unwrap_or(0));
        }
    }
    let mut begun: BTreeMap<&str, i64> = BTreeMap::new();
    let mut unheeded = Vec::new();
    for fault in history.faults() {
        let Some(&node) = deadly.get(&fault.name) else {
            continue;
        };
        if fault.phase == "start" {
            begun.insert(&fault.name, fault.at_us);
        }
        let (Some(from), true) = (begun.get(fault.name.as_str()), fault.phase == "stop") else {
            continue;
        };
        let had_to_sync = history.ops().any(|op| {
            op.stage == Stage::Ok
                && op.node == node
                && op.steps.iter().any(|step| !step.act.reads())
                && (*from..=fault.at_us - AT_ONCE_US).contains(&op.at_us)
        });
        let ended = history.deaths().any(|death| {
            death.node == node
                && death.what == Part::Daemon.to_string()
                && (*from..=fault.at_us + FOUND_WITHIN_US).contains(&death.at_us)
        });
        if had_to_sync && !ended {
            unheeded.push((fault.name.clone(), node));
        }
    }
    unheeded
}

/// Did everybody stay alive, at all times?
pub(crate) fn alive(history: &History) -> Answer {
    let mut findings = Findings::default();
    for death in history.deaths() {
        findings.look();
        if death.excuse.is_none() {
            findings.add(format!(
                "the {} of n{} ended by itself after {:.1} s with {}: {}",
                death.what,
                death.node,
                death.at_us as f64 / 1e6,
                death.how,
                death.words
            ));
        }
    }
    for (fault, node) in unheeded(history) {
        findings.add(format!(
            "the daemon of n{node} went on as if nothing had been while {fault}"
        ));
    }
    if let Some(end) = history.end() {
        findings.look();
        for (node, name, text) in &end.alarms {
            // Others wait for somebody, or are over in a while: they are told. That nodes hold different rows is never right.
            if name == "drift" {
                findings.add(format!("n{node}: rows were not as the stream says: {text}"));
            }
        }
        for note in &end.notes {
            findings.add(note.clone());
        }
        for lost in end.lost.iter().filter(|lost| lost.must_tell) {
            findings.look();
            let told = lost.words.contains("slot") && lost.words.contains("does not exist");
            if !told {
                findings.add(format!(
                    "the slot of n{} was dropped, and its daemon does not say so; it says: {}",
                    lost.node, lost.words
                ));
            }
        }
    }
    findings.answer("the history has no end")
}
