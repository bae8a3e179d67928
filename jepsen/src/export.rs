//! Histories in the formats of other checkers.
//!
//! * `history.edn`, as Jepsen writes it: op maps with `:index`, `:time`, `:type`, `:process`, `:f`, `:value`, the first an initial
//!   transaction of process 0. For `elle.list-append` where rows hold lists, for `elle.rw-register` else. Faults are operations of the
//!   process `:nemesis`, which Elle leaves aside and who reads the history wants.
//! * Plume's text: `r(key,value,session,txn)` and `w(...)`, one a line, with an explicit initial transaction of a session
//!   of its own, that every session reads first.
//!
//! Invariants: 1. a history that these models cannot say is refused: deletes, sums, statements over many rows; 2. as in Jepsen a process
//! whose operation has no known end goes on under another number

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use crate::history::{Act, Fault, History, Stage, Step};
use crate::truth::Truth;
use crate::workload::Workload;

/// Why the history is none of registers or lists.
fn refused(history: &History) -> Option<&'static str> {
    if Workload::named(&history.header.workload).is_some_and(|workload| workload.adds) {
        return Some("a history of sums does not tell whose write a read saw");
    }
    let any = |is: fn(&Step) -> bool| history.ops().any(|op| op.steps.iter().any(is));
    if any(|step| step.last.is_some() || step.act == Act::GiveUp) {
        return Some("a history with statements of many rows does not tell each row's write");
    }
    any(|step| step.act == Act::Delete).then_some("a history with deletes is no register history")
}

/// As Elle reads it.
///
/// # Errors
/// For histories that are not of registers or lists.
pub fn edn(history: &History) -> crate::Result<String> {
    if let Some(why) = refused(history) {
        return Err(why.into());
    }
    let mut maps = Vec::new();
    let workload = Workload::named(&history.header.workload);
    let lists = workload.as_ref().is_some_and(|workload| workload.appends);
    let rows = workload.map_or(Vec::new(), |workload| workload.preload(history.header.keys));
    let initial = rows.into_iter().map(|(table, key, value)| Step {
        act: Act::Write,
        table,
        key,
        value: Some(value),
        list: None,
        last: None,
    });
    let initial: Vec<String> = initial.map(|step| micro(&step, Stage::Ok, lists)).collect();
    for stage in ["invoke", "ok"] {
        let value = initial.join(" ");
        maps.push(format!(
            ":time 0, :type :{stage}, :process 0, :f :txn, :value [{value}]"
        ));
    }
    // Where a fault took long to begin, it is told after what happened meanwhile.
    let mut faults: Vec<&Fault> = history.faults().collect();
    faults.sort_by_key(|fault| fault.at_us);
    let mut faults = faults.into_iter().peekable();
    let mut lives: HashMap<u64, u64> = HashMap::new();
    for op in history.ops() {
        while let Some(fault) = faults.next_if(|fault| fault.at_us <= op.at_us) {
            maps.push(of_nemesis(fault));
        }
        let life = lives.entry(op.process).or_default();
        let process = op.process + *life * LIFE;
        if op.stage == Stage::Info {
            *life += 1;
        }
        let stage = match op.stage {
            Stage::Invoke => "invoke",
            Stage::Ok => "ok",
            Stage::Fail => "fail",
            Stage::Info => "info",
        };
        let steps: Vec<String> = op.steps.iter().map(|step| micro(step, op.stage, lists)).collect();
        maps.push(format!(
            ":time {}, :type :{stage}, :process {process}, :f :txn, :value [{}]",
            op.at_us * 1_000,
            steps.join(" ")
        ));
    }
    maps.extend(faults.map(of_nemesis));
    let mut out = String::new();
    for (index, map) in maps.iter().enumerate() {
        writeln!(out, "{{:index {index}, {map}}}")?;
    }
    Ok(out)
}

/// A fault's moment as an operation, all but its index: `:f` is its phase.
fn of_nemesis(fault: &Fault) -> String {
    let text = match fault.detail.as_str() {
        "" => fault.name.clone(),
        detail => format!("{}: {detail}", fault.name),
    };
    // As EDN has strings: these two are special, and a line is one operation.
    let text = text
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!(
        ":time {}, :type :info, :process :nemesis, :f :{}, :value \"{text}\"",
        fault.at_us * 1_000,
        fault.phase
    )
}

/// Between the numbers of one process before and after an operation without a known end.
const LIFE: u64 = 1_000_000_000;

fn micro(step: &Step, stage: Stage, lists: bool) -> String {
    let act = match step.act {
        Act::Read => "r",
        _ if lists => "append",
        _ => "w",
    };
    let known = step.act != Act::Read || stage == Stage::Ok;
    let value = match &step.list {
        Some(list) if known && step.act == Act::Read => {
            let elements: Vec<String> = list.iter().map(ToString::to_string).collect();
            Some(format!("[{}]", elements.join(" ")))
        }
        _ => step.value.filter(|_| known).map(|value| value.to_string()),
    };
    let value = value.unwrap_or_else(|| "nil".to_owned());
    format!("[:{act} \"{}/{}\" {value}]", step.table, step.key)
}

/// As Plume reads it. Keys and values are numbers; 0 is no row.
///
/// # Errors
/// As for [`edn`].
pub fn plume(history: &History) -> crate::Result<String> {
    if let Some(why) = refused(history) {
        return Err(why.into());
    }
    let truth = Truth::of(history);
    let mut keys: BTreeMap<(String, i64), usize> = BTreeMap::new();
    let mut key_of = |table: &str, key: i64| {
        let next = keys.len() + 1;
        *keys.entry((table.to_owned(), key)).or_insert(next)
    };
    let mut out = String::new();
    let mut initial = Vec::new();
    if let Some(workload) = Workload::named(&history.header.workload) {
        for (table, key, value) in workload.preload(history.header.keys) {
            initial.push((key_of(&table, key), value));
        }
    }
    for (key, value) in &initial {
        let _ = writeln!(out, "w({key},{value},0,0)");
    }
    let mut sessions = BTreeSet::new();
    let mut number = 0_u64;
    for op in history.ops() {
        if !truth.counts(op) {
            continue;
        }
        if sessions.insert(op.process) {
            number += 1;
            for (key, value) in &initial {
                let _ = writeln!(out, "r({key},{value},{},{number})", op.process);
            }
        }
        number += 1;
        for step in &op.steps {
            let key = key_of(&step.table, step.key);
            // Who appended has seen what it appended to.
            let before = step.list.as_ref().and_then(|list| list.iter().rev().nth(1));
            if let (Act::Write, Some(before)) = (step.act, before) {
                let _ = writeln!(out, "r({key},{before},{},{number})", op.process);
            }
            let act = match step.act {
                Act::Read if op.stage != Stage::Ok => continue,
                Act::Read => 'r',
                Act::Write => 'w',
                // Refused above.
                _ => continue,
            };
            let _ = writeln!(
                out,
                "{act}({key},{},{},{number})",
                step.value.unwrap_or(0),
                op.process
            );
        }
    }
    Ok(out)
}
