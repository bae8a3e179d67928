//! What is exported for other checkers, read again by somebody who knows only the formats, and judged by brute force: the same answers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::*;
use crate::export;

/// One transaction, as a file tells of it: its session, and (reads?, key, value) in order.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    session: u64,
    micros: Vec<(bool, String, i64)>,
}

/// Is there no order of all transactions that explains it? Everything is written down: session order, reads-from, and that what a
/// reader knew was written before what it read; then all paths.
fn is_causal(txns: &[Told]) -> bool {
    let count = txns.len();
    let mut order = vec![vec![false; count]; count];
    let writer = |key: &str, value: i64| {
        (0..count).find(|&at| {
            let micros = &txns[at].micros;
            micros
                .iter()
                .any(|(reads, of, wrote)| !reads && of == key && *wrote == value)
        })
    };
    let mut last: HashMap<u64, usize> = HashMap::new();
    let mut reads = Vec::new();
    for (at, txn) in txns.iter().enumerate() {
        if let Some(before) = last.insert(txn.session, at) {
            order[before][at] = true;
        }
        for (_, key, value) in txn.micros.iter().filter(|micro| micro.0) {
            let Some(from) = writer(key, *value) else {
                return false;
            };
            if from != at {
                order[from][at] = true;
                reads.push((at, key.clone(), from));
            }
        }
    }
    close(&mut order);
    let known = order.clone();
    for (reader, key, from) in reads {
        for (at, txn) in txns.iter().enumerate() {
            let writes = txn.micros.iter().any(|(reads, of, _)| !reads && *of == key);
            if writes && at != from && at != reader && known[at][reader] {
                order[at][from] = true;
            }
        }
    }
    close(&mut order);
    (0..count).all(|at| !order[at][at])
}

fn close(order: &mut [Vec<bool>]) {
    let count = order.len();
    for by in 0..count {
        for from in 0..count {
            for to in 0..count {
                order[from][to] |= order[from][by] && order[by][to];
            }
        }
    }
}

/// The value of a keyword in a map: `:process 5,`.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let rest = line.split_once(&format!(":{name} ")).expect(name).1;
    rest.split([',', '}']).next().unwrap()
}

/// Reads op maps; asserts what `jepsen.history` asserts: indices in order, one operation at a time in a process, none after one without
/// an end. Those of the nemesis are left aside, as Elle does (`client-ops`).
fn read_edn(text: &str) -> Vec<Told> {
    let mut told = Vec::new();
    let mut open: BTreeSet<u64> = BTreeSet::new();
    let mut crashed: BTreeSet<u64> = BTreeSet::new();
    for (index, line) in text.lines().enumerate() {
        assert_eq!(field(line, "index"), index.to_string());
        if field(line, "process") == ":nemesis" {
            assert_eq!(field(line, "type"), ":info");
            assert!(line.starts_with('{') && line.ends_with("\"}"), "{line}");
            continue;
        }
        assert!(line.starts_with('{') && line.ends_with("]}"), "{line}");
        assert_eq!(field(line, "f"), ":txn");
        let process: u64 = field(line, "process").parse().unwrap();
        let kind = field(line, "type");
        if kind == ":invoke" {
            assert!(open.insert(process), "{process} begins twice: {line}");
            assert!(!crashed.contains(&process), "{process} goes on: {line}");
            continue;
        }
        assert!(
            open.remove(&process),
            "{process} ends what it did not begin: {line}"
        );
        if kind == ":info" {
            crashed.insert(process);
        }
        if kind != ":ok" {
            continue;
        }
        let mut micros = Vec::new();
        let value = line.split_once(":value [").unwrap().1.strip_suffix("]}").unwrap();
        for micro in value.split("[:").skip(1) {
            let micro = micro.trim_end().strip_suffix(']').unwrap();
            let (act, rest) = micro.split_once(" \"").unwrap();
            let (key, value) = rest.split_once("\" ").unwrap();
            let list = value.trim_start_matches('[').trim_end_matches(']');
            let values = list
                .split(' ')
                .filter(|value| !value.is_empty() && *value != "nil");
            let values: Vec<i64> = values.map(|value| value.parse().unwrap()).collect();
            match (act, values.last()) {
                ("r", Some(&last)) => micros.push((true, key.to_owned(), last)),
                ("r", None) => {}
                ("w" | "append", Some(&last)) => micros.push((false, key.to_owned(), last)),
                other => panic!("{other:?} in {line}"),
            }
        }
        told.push(Told {
            session: process,
            micros,
        });
    }
    assert!(open.is_empty(), "{open:?} never end");
    told
}

/// Reads `r(key,value,session,txn)` as Plume does: transactions by their number, in the order of their first line.
fn read_plume(text: &str) -> Vec<Told> {
    let mut places: BTreeMap<u64, usize> = BTreeMap::new();
    let mut told: Vec<Told> = Vec::new();
    for line in text.lines() {
        let (act, rest) = line.split_once('(').unwrap();
        let numbers: Vec<u64> = rest
            .strip_suffix(')')
            .unwrap()
            .split(',')
            .map(|number| number.parse().unwrap())
            .collect();
        let [key, value, session, txn] = numbers[..] else {
            panic!("{line}")
        };
        let at = *places.entry(txn).or_insert_with(|| {
            told.push(Told {
                session,
                micros: Vec::new(),
            });
            told.len() - 1
        });
        assert_eq!(told[at].session, session, "a transaction of two sessions: {line}");
        assert!(act == "r" || act == "w", "{line}");
        let value = i64::try_from(value).unwrap();
        told[at].micros.push((act == "r", key.to_string(), value));
    }
    told
}

/// With the beginnings that a run writes down, too.
fn whole(scene: &Scene) -> History {
    let mut history = scene.history.clone();
    history.events = history
        .events
        .into_iter()
        .flat_map(|event| {
            let begin = match &event {
                Event::Op(op) => Some(Event::Op(Op {
                    stage: Stage::Invoke,
                    ..op.clone()
                })),
                _ => None,
            };
            begin.into_iter().chain([event])
        })
        .collect();
    history
}

fn told(scene: &Scene) -> [Vec<Told>; 2] {
    let history = whole(scene);
    [
        read_edn(&export::edn(&history).unwrap()),
        read_plume(&export::plume(&history).unwrap()),
    ]
}

#[test]
fn what_is_exported_says_what_was_read_and_written() {
    let scene = finished();
    let [edn, plume] = told(&scene);
    // The initial transaction, then one of each node that writes, one of each that reads.
    assert_eq!(edn.len(), 5);
    let own = |reads: bool, value| (reads, "kv/0".to_owned(), value);
    assert_eq!(edn[0].micros.len(), 4);
    assert_eq!(
        (edn[1].session, &edn[1].micros),
        (100_000, &vec![own(true, 1), own(false, 11)])
    );
    // The same, and each of two sessions reads the initial transaction first.
    assert_eq!(plume.len(), 7);
    assert_eq!(plume[0].session, 0);
    assert_eq!(plume[0].micros.len(), 4);
    for session in [100_000, 200_000] {
        let first = plume.iter().find(|txn| txn.session == session).unwrap();
        assert!(
            first.micros.iter().all(|micro| micro.0) && first.micros.len() == 4,
            "{first:?}"
        );
    }
    assert!(is_causal(&edn) && is_causal(&plume));
    scene.holds(Check::Causal);
}

#[test]
fn what_is_violated_here_is_violated_in_what_is_exported() {
    let mut cycle = Scene::new();
    cycle.op(1, Stage::Ok, &[read(1, 22), write(0, 11)]);
    cycle.op(2, Stage::Ok, &[read(0, 11), write(1, 22)]);
    let mut opposite = Scene::new();
    opposite.op(1, Stage::Ok, &[write(0, 11)]);
    opposite.op(2, Stage::Ok, &[write(0, 22)]);
    opposite.op(1, Stage::Ok, &[read(0, 22)]);
    opposite.op(2, Stage::Ok, &[read(0, 11)]);
    let mut from_nowhere = finished();
    from_nowhere.op(1, Stage::Ok, &[read(0, 99)]);
    for scene in [cycle, opposite, from_nowhere] {
        assert!(matches!(scene.ask(Check::Causal), Answer::Violated { .. }));
        for told in told(&scene) {
            assert!(!is_causal(&told), "{told:?}");
        }
    }
}

#[test]
fn lists_are_exported_whole_and_an_append_has_read_what_it_appended_to() {
    let (a, b) = (txn(1, 1) * 10, txn(2, 1) * 10);
    let list = |step: Step, list: &[i64]| Step {
        list: Some(list.to_vec()),
        ..step
    };
    let mut scene = Scene::new();
    scene.history.header.workload = "append".to_owned();
    scene.op(1, Stage::Ok, &[list(write(0, a), &[1, a])]);
    scene.op(2, Stage::Ok, &[list(write(0, b), &[1, a, b])]);
    scene.op(1, Stage::Ok, &[list(read(0, b), &[1, a, b])]);
    let edn = export::edn(&whole(&scene)).unwrap();
    assert!(edn.contains(&format!("[:append \"kv/0\" {a}]")), "{edn}");
    assert!(edn.contains(&format!("[:r \"kv/0\" [1 {a} {b}]]")), "{edn}");
    let [edn, plume] = told(&scene);
    assert!(is_causal(&edn) && is_causal(&plume));
    // n1 reads what is without n2's append after it has read it: a cycle for both.
    scene.op(1, Stage::Ok, &[list(read(0, a), &[1, a])]);
    scene.violated(Check::Causal, "no order of writes explains");
    assert!(!is_causal(&told(&scene)[1]));
}

#[test]
fn a_process_goes_on_under_another_number_after_an_operation_without_an_end() {
    let mut scene = finished();
    scene.op(1, Stage::Info, &[write(1, 77)]);
    scene.op(1, Stage::Ok, &[read(1, 2)]);
    let [edn, _] = told(&scene);
    assert_eq!(edn.last().unwrap().session, 1_000_100_000);
}

#[test]
fn faults_are_operations_of_the_nemesis_at_their_times() {
    use crate::history::Fault;
    let mut scene = finished();
    let [before, _] = told(&scene);
    // Told when they had begun, which is later than their time; the last one when nobody writes any more.
    for (at_us, phase, detail) in [
        (9_000_000, "stop", ""),
        (2_500, "start", "said \"so\",\nin a \\ line"),
    ] {
        scene.history.events.push(Event::Fault(Fault {
            at_us,
            name: "kill -9 of the daemon of n1".to_owned(),
            phase: phase.to_owned(),
            detail: detail.to_owned(),
        }));
    }
    let edn = export::edn(&whole(&scene)).unwrap();
    let times = edn
        .lines()
        .map(|line| field(line, "time").parse::<i64>().unwrap());
    assert!(times.is_sorted(), "{edn}");
    let faults: Vec<&str> = edn.lines().filter(|line| line.contains(":nemesis")).collect();
    assert!(
        faults[0].ends_with(
            ":time 2500000, :type :info, :process :nemesis, :f :start, \
             :value \"kill -9 of the daemon of n1: said \\\"so\\\",\\nin a \\\\ line\"}"
        ),
        "{faults:?}"
    );
    assert!(
        faults[1].ends_with(":f :stop, :value \"kill -9 of the daemon of n1\"}"),
        "{faults:?}"
    );
    assert_eq!(edn.lines().last(), Some(faults[1]));
    // What clients did is told as without any fault.
    let [after, _] = told(&scene);
    assert_eq!(before, after);
}

#[test]
fn what_is_no_history_of_registers_is_not_exported() {
    let mut sums = finished();
    sums.history.header.workload = "bank".to_owned();
    let mut deletes = finished();
    deletes.op(1, Stage::Ok, &[step(Act::Delete, 1, None)]);
    for scene in [sums, deletes] {
        assert!(export::edn(&scene.history).is_err() && export::plume(&scene.history).is_err());
    }
}
