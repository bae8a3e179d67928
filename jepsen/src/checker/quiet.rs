//! After the last fault: does everything arrive, does the kept log shrink, is everybody still there?

use super::{Answer, Findings, session};
use crate::history::History;
use crate::nemesis::moves_sessions;

/// Largest WAL that a slot may hold back at rest, bytes: some checkpoints' worth.
const SLOT_BYTES_MAX: i64 = 256 << 20;

/// Largest journal at rest, bytes: the segment being written (256 MiB at most) and one before it.
const JOURNAL_BYTES_MAX: u64 = 512 << 20;

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

/// Are slot and journal small at rest?
pub(crate) fn bounded(history: &History) -> Answer {
    let mut findings = Findings::default();
    for &(node, slot_bytes, journal_bytes) in history.end().map_or(&[][..], |end| &end.rest) {
        findings.look();
        if slot_bytes > SLOT_BYTES_MAX {
            findings.add(format!(
                "n{node}: the slot holds back {slot_bytes} bytes of WAL at rest"
            ));
        }
        if journal_bytes > JOURNAL_BYTES_MAX {
            findings.add(format!("n{node}: the journal has {journal_bytes} bytes at rest"));
        }
    }
    findings.answer("no slot or journal was measured at rest")
}

/// Did any fault happen? Sessions that moved count: that is what `move` is.
pub(crate) fn faults(history: &History) -> Answer {
    let mut findings = Findings::default();
    let of = |phase: &str| history.faults().filter(|fault| fault.phase == phase).count();
    findings.look_at(of("start"));
    if moves_sessions(&history.header.nemesis) && session::moved(history) {
        findings.look();
    }
    let impossible: Vec<String> = history
        .faults()
        .filter(|fault| fault.phase == "impossible")
        .map(|fault| format!("{}: {}", fault.name, fault.detail))
        .collect();
    let why = match impossible.as_slice() {
        [] => "no fault was planned: the run is too short".to_owned(),
        some => format!("no fault could be made: {}", some.join("; ")),
    };
    findings.answer(&why)
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
    if let Some(end) = history.end() {
        findings.look();
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
