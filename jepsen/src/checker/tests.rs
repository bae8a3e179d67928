//! Planted violations: each checker must find its own, and must not complain of a good history.

mod append;
mod export;
mod heal;
mod part;
mod policy;
mod total;
mod unique;

use super::*;
use crate::history::{Act, Commit, End, Event, Final, First, Header, Line, Op, Stage, Step};

/// A history of two nodes in the register workload with four rows; every node's WAL by hand.
struct Scene {
    history: History,
    clock_us: i64,
    lsn: [u64; 3],
    places: [u64; 3],
}

const START_US: i64 = 1_700_000_000_000_000;

fn step(act: Act, key: i64, value: Option<i64>) -> Step {
    Step {
        act,
        table: "kv".to_owned(),
        key,
        value,
        list: None,
        last: None,
    }
}

fn read(key: i64, value: i64) -> Step {
    step(Act::Read, key, Some(value))
}

fn write(key: i64, value: i64) -> Step {
    step(Act::Write, key, Some(value))
}

/// Transaction number `number` of a node's first process.
fn txn(node: u16, number: i64) -> i64 {
    i64::from(node) * 100_000_000_000 + number
}

impl Scene {
    fn new() -> Self {
        let header = Header {
            format: 1,
            workload: "register".to_owned(),
            system: "anabranch".to_owned(),
            servers: vec![15, 15],
            keys: 4,
            ..Header::default()
        };
        let end = End {
            arrived_us: Some(2),
            equal_us: Some(3),
            rest: vec![(1, 10, 10), (2, 10, 10)],
            ..End::default()
        };
        let mut scene = Self {
            history: History {
                header,
                events: vec![Event::End(end)],
            },
            clock_us: START_US,
            lsn: [100; 3],
            places: [0; 3],
        };
        // The rows that are there before the load.
        let rows = (0..4).map(|key| write(key, key + 1)).collect();
        let first = scene.commit(1, Vec::new(), rows);
        scene.apply(2, 1, &first, &[]);
        scene
    }

    fn end(&mut self) -> &mut End {
        match &mut self.history.events[0] {
            Event::End(end) => end,
            _ => unreachable!("the end was put first"),
        }
    }

    /// A local commit; returns its LSN and stamp.
    fn commit(&mut self, node: u16, witnesses: Vec<i64>, rows: Vec<Step>) -> (u64, String) {
        self.clock_us += 1_000;
        self.lsn[usize::from(node)] += 100;
        let lsn = self.lsn[usize::from(node)];
        self.history.events.push(Event::Commit(Commit {
            node,
            lsn,
            commit_us: self.clock_us,
            first: First::User,
            witnesses,
            rows,
            ..Commit::default()
        }));
        let truth = Truth::of(&self.history);
        let stamp = truth
            .rows
            .values()
            .flatten()
            .filter(|version| version.node.0 == node)
            .map(|version| version.stamp)
            .max();
        (
            lsn,
            stamp
                .map(|stamp| {
                    stamp
                        .to_bytes()
                        .iter()
                        .map(|byte| format!("{byte:02x}"))
                        .collect()
                })
                .unwrap_or_default(),
        )
    }

    /// `node` applies a transaction of `origin`.
    fn apply(&mut self, node: u16, origin: u16, what: &(u64, String), witnesses: &[i64]) {
        self.lsn[usize::from(node)] += 100;
        self.history.events.push(Event::Commit(Commit {
            node,
            lsn: self.lsn[usize::from(node)],
            commit_us: self.clock_us,
            first: First::Progress,
            witnesses: witnesses.to_vec(),
            progress: vec![(origin, what.0, what.1.clone())],
            ..Commit::default()
        }));
    }

    /// A client's transaction, and its commit where it writes.
    fn op(&mut self, node: u16, stage: Stage, steps: &[Step]) -> (i64, (u64, String)) {
        self.places[usize::from(node)] += 1;
        let id = txn(node, self.places[usize::from(node)].try_into().unwrap());
        let writes: Vec<Step> = steps
            .iter()
            .filter(|step| step.act != Act::Read)
            .cloned()
            .collect();
        let mut committed = (0, String::new());
        if !writes.is_empty() && stage == Stage::Ok {
            committed = self.commit(node, vec![id], writes);
        }
        self.history.events.push(Event::Op(Op {
            at_us: self.clock_us - START_US,
            stage,
            process: u64::from(node) * 100_000,
            node,
            txn: id,
            steps: steps.to_vec(),
            error: None,
        }));
        (id, committed)
    }

    fn hold(&mut self, node: u16, table: &str, rows: &[(i64, i64)]) {
        let rows = rows
            .iter()
            .map(|&(key, value)| (key, Some(value), value.to_string()))
            .collect();
        self.history.events.push(Event::Final(Final {
            node,
            table: table.to_owned(),
            rows,
            more: Vec::new(),
        }));
    }

    fn line(&mut self, node: u16, key: i64, lost: &str, value: i64) {
        let stamp = crate::truth::parse_stamp_bytes(lost).unwrap();
        self.history.events.push(Event::Line(Line {
            node,
            id: format!("{key}-{stamp}"),
            table: "kv".to_owned(),
            key: Some(key),
            conflict: "update_origin_differs".to_owned(),
            lost: stamp.to_string(),
            won: self.latest(key),
            lost_value: Some(value),
            status: "new".to_owned(),
            text: String::new(),
        }));
    }

    /// The stamp of a row's last version, as a line shows it.
    fn latest(&self, key: i64) -> String {
        let truth = Truth::of(&self.history);
        let versions = truth.rows.get(&("kv".to_owned(), key));
        let last = versions.and_then(|versions| versions.last());
        last.map_or(String::new(), |version| version.stamp.to_string())
    }

    fn ask(&self, check: Check) -> Answer {
        check_these(&self.history, &[check]).remove(0).answer
    }

    fn holds(&self, check: Check) {
        let answer = self.ask(check);
        assert!(
            matches!(answer, Answer::Holds { looked_at: 1.. }),
            "{check:?}: {answer:?}"
        );
    }

    fn violated(&self, check: Check, word: &str) {
        match self.ask(check) {
            Answer::Violated { findings, .. } => {
                assert!(
                    findings.iter().any(|text| text.contains(word)),
                    "{check:?}: {findings:?}"
                );
            }
            other => panic!("{check:?} finds nothing: {other:?}"),
        }
    }
}

/// Two nodes write row 0 at once; n2's is later and wins, n1's is logged at both.
fn conflict() -> (Scene, (u64, String)) {
    let mut scene = Scene::new();
    let (one, lost) = scene.op(1, Stage::Ok, &[read(0, 1), write(0, 11)]);
    let (two, won) = scene.op(2, Stage::Ok, &[read(0, 1), write(0, 22)]);
    scene.apply(2, 1, &lost, &[one]);
    scene.apply(1, 2, &won, &[two]);
    scene.op(1, Stage::Ok, &[read(0, 22), read(1, 2)]);
    scene.op(2, Stage::Ok, &[read(0, 22), read(1, 2)]);
    (scene, lost)
}

fn finished() -> Scene {
    let (mut scene, lost) = conflict();
    for node in [1, 2] {
        scene.hold(node, "kv", &[(0, 22), (1, 2), (2, 3), (3, 4)]);
        scene.hold(node, durable::WITNESS, &[(txn(1, 1), 1), (txn(2, 1), 2)]);
        scene.line(node, 0, &lost.1, 11);
    }
    scene
}

#[test]
fn a_good_history_stands_every_check() {
    let scene = finished();
    let workload = Workload::named("register").unwrap();
    for check in workload.checks("anabranch") {
        scene.holds(check);
    }
    assert_eq!(Outcome::of(&check(&scene.history)), Outcome::Holds);
}

#[test]
fn a_history_without_an_end_or_without_anything_proves_nothing() {
    let mut scene = finished();
    scene.history.events.remove(0);
    assert_eq!(Outcome::of(&check(&scene.history)), Outcome::Unknown);
    assert_eq!(Outcome::of(&[]), Outcome::Unknown);
    let empty = History {
        events: vec![Event::End(End::default())],
        ..History::default()
    };
    for check in [
        Check::Equal,
        Check::Durable,
        Check::FinalValue,
        Check::ConflictLog,
        Check::Causal,
        Check::Session,
    ] {
        let answer = check_these(&empty, &[check]).remove(0).answer;
        assert!(matches!(answer, Answer::Unknown { .. }), "{check:?}: {answer:?}");
    }
}

#[test]
fn of_an_unknown_workload_system_or_nemesis_nobody_can_tell() {
    let changed = |change: fn(&mut Header)| {
        let mut scene = finished();
        change(&mut scene.history.header);
        Outcome::of(&check(&scene.history))
    };
    // The first histories name no system.
    assert_eq!(changed(|header| header.system.clear()), Outcome::Holds);
    assert_eq!(
        changed(|header| header.nemesis = "none".to_owned()),
        Outcome::Holds
    );
    let unknown: [fn(&mut Header); 3] = [
        |header| header.workload = "registers".to_owned(),
        |header| header.system = "bdr".to_owned(),
        |header| header.nemesis = "kills".to_owned(),
    ];
    for change in unknown {
        assert_eq!(changed(change), Outcome::Unknown);
    }
}

#[test]
fn what_does_not_arrive_is_found() {
    let mut scene = finished();
    scene.end().arrived_us = None;
    scene.violated(Check::Arrival, "not at every node");
}

#[test]
fn a_differing_row_is_found_and_named() {
    let (mut scene, _) = conflict();
    scene.hold(1, "kv", &[(0, 22), (1, 2)]);
    scene.hold(2, "kv", &[(0, 11), (1, 2)]);
    scene.violated(Check::Equal, "kv/0: n1 holds 22");
    let (mut scene, _) = conflict();
    scene.hold(1, "kv", &[(0, 22)]);
    scene.violated(Check::Equal, "1 of 2 nodes");
}

#[test]
fn a_row_missing_at_one_node_is_found() {
    let (mut scene, _) = conflict();
    scene.hold(1, "kv", &[(0, 22), (1, 2)]);
    scene.hold(2, "kv", &[(0, 22)]);
    scene.violated(Check::Equal, "no row");
}

#[test]
fn a_lost_a_failed_and_an_unknown_transaction_are_found() {
    let (mut scene, _) = conflict();
    scene.hold(1, durable::WITNESS, &[(txn(1, 1), 1), (txn(2, 1), 2)]);
    scene.hold(2, durable::WITNESS, &[(txn(2, 1), 2)]);
    scene.violated(Check::Durable, "is lost at n2");

    let mut scene = finished();
    let (failed, _) = scene.op(1, Stage::Fail, &[write(1, 111)]);
    scene.hold(
        1,
        durable::WITNESS,
        &[(txn(1, 1), 1), (txn(2, 1), 2), (failed, 1)],
    );
    scene.violated(Check::Durable, "failed, and is at n1");

    let mut scene = finished();
    scene.hold(
        2,
        durable::WITNESS,
        &[(txn(1, 1), 1), (txn(2, 1), 2), (txn(2, 99), 2)],
    );
    scene.violated(Check::Durable, "nobody ran");
}

#[test]
fn an_earlier_write_that_stays_is_found() {
    let (mut scene, _) = conflict();
    for node in [1, 2] {
        scene.hold(node, "kv", &[(0, 11), (1, 2), (2, 3), (3, 4)]);
    }
    scene.holds(Check::Equal);
    scene.violated(Check::FinalValue, "kv/0 is 11, but its last version is 22");
}

#[test]
fn a_stamp_that_changed_on_its_way_is_found() {
    let mut scene = finished();
    let (id, committed) = scene.op(1, Stage::Ok, &[write(2, 333)]);
    scene.apply(2, 1, &(committed.0, "00000000000000000001".to_owned()), &[id]);
    scene.violated(Check::Stamps, "its own WAL says");
}

#[test]
fn a_place_where_nothing_was_committed_is_found() {
    let mut scene = finished();
    let (id, committed) = scene.op(1, Stage::Ok, &[write(2, 333)]);
    scene.apply(2, 1, &(0, String::new()), &[]);
    // What is behind all that was read of n1 may have come since.
    scene.apply(2, 1, &(committed.0 + 50, committed.1.clone()), &[]);
    scene.holds(Check::Stamps);
    scene.apply(2, 1, &(committed.0 - 50, committed.1), &[id]);
    scene.violated(Check::Stamps, "where nothing was committed");
}

#[test]
fn what_is_applied_before_something_that_it_had_seen_is_found() {
    let local = |node, lsn| Commit {
        node,
        lsn,
        commit_us: START_US,
        first: First::User,
        witnesses: vec![txn(node, 1)],
        ..Commit::default()
    };
    let applied = |node, lsn, of: &[(u16, u64)]| {
        let stamp = |origin: u16| format!("{:016x}{origin:04x}", 1);
        Commit {
            node,
            lsn,
            commit_us: START_US,
            first: First::Progress,
            progress: of
                .iter()
                .map(|&(origin, at)| (origin, at, stamp(origin)))
                .collect(),
            ..Commit::default()
        }
    };
    // n2 had applied what n1 wrote when it wrote itself.
    let at_three = |commits: &[Commit]| {
        let mut scene = Scene::new();
        scene.history.header.servers = vec![15; 3];
        scene.history.events.truncate(1);
        let before = [local(1, 100), applied(2, 100, &[(1, 100)]), local(2, 200)];
        let all = before.iter().chain(commits).cloned();
        scene.history.events.extend(all.map(Event::Commit));
        scene
    };
    at_three(&[applied(3, 100, &[(1, 100)]), applied(3, 200, &[(2, 200)])]).holds(Check::Order);
    at_three(&[applied(3, 100, &[(2, 200), (1, 100)])]).holds(Check::Order);
    let wrong = at_three(&[applied(3, 100, &[(2, 200)]), applied(3, 200, &[(1, 100)])]);
    wrong.violated(
        Check::Order,
        "n3 applied at 0/64 the transaction of n2 at 0/C8, which had seen n1 up to 0/64, and had n1 up to 0/0",
    );
    let back = at_three(&[applied(3, 100, &[(1, 100)]), applied(3, 200, &[(1, 90)])]);
    back.violated(Check::Order, "and had said 0/64");
}

#[test]
fn a_line_that_names_a_wrong_winner_is_found() {
    let mut scene = finished();
    scene.holds(Check::ConflictLog);
    // The version that was there before both knew it.
    let initial = Truth::of(&scene.history).rows[&("kv".to_owned(), 0)][0].stamp;
    for won in [initial.to_string(), String::new()] {
        for event in &mut scene.history.events {
            if let Event::Line(line) = event {
                line.won.clone_from(&won);
            }
        }
        scene.violated(Check::ConflictLog, "won, which is no later concurrent version");
    }
}

#[test]
fn a_lost_write_without_a_line_is_found() {
    let (scene, _) = conflict();
    scene.violated(Check::ConflictLog, "lost without a line");
    scene.violated(Check::LogsEqual, "has no line");
    // One node alone is enough to be found incomplete.
    let (mut scene, lost) = conflict();
    scene.line(1, 0, &lost.1, 11);
    scene.holds(Check::ConflictLog);
    scene.violated(Check::LogsEqual, "n2 has no line");
}

#[test]
fn logs_are_counted_against_the_truth() {
    let scene = finished();
    let of = |scene: &Scene| {
        let all = conflicts::against_truth(&scene.history, &Truth::of(&scene.history));
        let of =
            |log: &conflicts::Against| (log.node, log.lines, log.must, log.missing, log.may, log.unfounded);
        all.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(of(&scene), [(1, 1, 1, 0, 1, 0), (2, 1, 1, 0, 1, 0)]);
    let (mut scene, lost) = conflict();
    scene.line(1, 3, &lost.1, 11);
    assert_eq!(of(&scene), [(1, 1, 1, 1, 1, 1), (2, 0, 1, 1, 1, 0)]);
    let page = crate::report::html(&scene.history, &check(&scene.history));
    assert!(
        page.contains("without a line") && page.contains("the transactions that are named"),
        "{page}"
    );
}

#[test]
fn a_line_without_a_lost_write_a_wrong_row_and_a_line_twice_are_found() {
    let mut scene = finished();
    let (_, known) = scene.op(1, Stage::Ok, &[read(0, 22), write(0, 44)]);
    scene.line(1, 0, &known.1, 44);
    scene.violated(Check::ConflictLog, "lost to no concurrent one");

    let (mut scene, lost) = conflict();
    scene.line(1, 0, &lost.1, 12);
    scene.violated(Check::ConflictLog, "shows Some(12)");

    let mut scene = finished();
    let (_, lost) = conflict();
    scene.line(2, 0, &lost.1, 11);
    scene.violated(Check::LogsEqual, "2 times");
}

#[test]
fn a_write_that_somebody_overwrote_knowingly_needs_no_line() {
    let mut scene = Scene::new();
    let (one, first) = scene.op(1, Stage::Ok, &[write(0, 11)]);
    let (two, second) = scene.op(1, Stage::Ok, &[read(0, 11), write(0, 12)]);
    let (three, won) = scene.op(2, Stage::Ok, &[write(0, 22)]);
    scene.apply(2, 1, &first, &[one]);
    scene.apply(2, 1, &second, &[two]);
    scene.apply(1, 2, &won, &[three]);
    scene.violated(Check::ConflictLog, &format!("transaction {two}"));
    let losers = conflicts::exact(&scene.history, &Truth::of(&scene.history));
    let Answer::Violated { count, .. } = losers else {
        panic!("{losers:?}")
    };
    assert_eq!(count, 1, "only the last of n1's writes must be logged");
}

#[test]
fn a_cycle_of_reads_is_found() {
    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[read(1, 22), write(0, 11)]);
    scene.op(2, Stage::Ok, &[read(0, 11), write(1, 22)]);
    scene.violated(Check::Causal, "cycle of session order and reads-from");
}

/// `count` reads of another session, first in the history.
fn read_by_a_third(scene: &mut Scene, count: i64, step: &Step) {
    for number in 0..count {
        scene.history.events.push(Event::Op(Op {
            at_us: 1,
            stage: Stage::Ok,
            process: 300_000,
            node: 1,
            txn: txn(3, 1_000 + number),
            steps: vec![step.clone()],
            error: None,
        }));
    }
}

#[test]
fn cycles_are_found_though_hundreds_of_transactions_follow_from_them() {
    let mut scene = Scene::new();
    read_by_a_third(&mut scene, 300, &read(0, 11));
    scene.op(1, Stage::Ok, &[read(1, 22), write(0, 11)]);
    scene.op(2, Stage::Ok, &[read(0, 11), write(1, 22)]);
    scene.violated(Check::Causal, "cycle of session order and reads-from");

    let mut scene = Scene::new();
    read_by_a_third(&mut scene, 300, &read(0, 11));
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.op(2, Stage::Ok, &[write(0, 22)]);
    scene.op(1, Stage::Ok, &[read(0, 22)]);
    scene.op(2, Stage::Ok, &[read(0, 11)]);
    scene.violated(Check::Causal, "no order of writes explains");
}

#[test]
fn a_row_that_is_gone_for_a_while_is_found_by_who_reads_and_by_who_writes_it() {
    let mut scene = finished();
    scene.op(1, Stage::Ok, &[step(Act::Read, 3, None)]);
    scene.violated(Check::Causal, "found no row kv/3");
    // Where rows come and go nobody can say that it should be there.
    let mut scene = Scene::new();
    scene.history.header.workload = "mix".to_owned();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.op(1, Stage::Ok, &[read(0, 11), step(Act::Read, 3, None)]);
    scene.holds(Check::Causal);

    let mut scene = finished();
    scene.holds(Check::Durable);
    if let Some(Event::Commit(commit)) = scene.history.events.iter_mut().find(|event| {
        matches!(event, Event::Commit(commit) if commit.witnesses == [txn(2, 1)] && commit.first == First::User)
    }) {
        commit.rows.clear();
    }
    scene.violated(Check::Durable, "its w(kv/0 = 22) is not in what it committed");
}

#[test]
fn an_acknowledged_transaction_that_its_own_server_does_not_hold_is_found() {
    let mut scene = finished();
    let own = |event: &Event| matches!(event, Event::Commit(commit) if commit.witnesses == [txn(2, 1)] && commit.first == First::User);
    scene.history.events.retain(|event| !own(event));
    scene.violated(Check::Durable, "is no commit of its own in the WAL there");
}

#[test]
fn a_value_from_nowhere_is_found() {
    let mut scene = finished();
    scene.op(1, Stage::Ok, &[read(0, 99)]);
    scene.violated(Check::Causal, "no committed transaction wrote");
    let mut scene = finished();
    scene.op(1, Stage::Fail, &[write(0, 98)]);
    scene.op(1, Stage::Ok, &[read(0, 98)]);
    scene.violated(Check::Causal, "no committed transaction wrote");
}

#[test]
fn an_answer_that_is_seen_without_what_it_answers_is_found() {
    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.op(2, Stage::Ok, &[read(0, 11), write(1, 22)]);
    scene.history.header.servers.push(15);
    // A third session sees the answer, and row 0 as it was at first.
    scene.op(2, Stage::Ok, &[read(1, 22)]);
    if let Some(Event::Op(op)) = scene.history.events.last_mut() {
        op.process = 300_000;
        op.steps = vec![read(1, 22), read(0, 1)];
    }
    scene.violated(Check::Causal, "no order of writes explains");
    scene.violated(Check::Visible, "knew the later write");
}

#[test]
fn two_readers_that_see_two_writes_in_opposite_orders_are_found() {
    // Each of two sessions overwrites for itself what the other one keeps: no single order of the writes fits.
    let mut scene = Scene::new();
    let (_, _) = scene.op(1, Stage::Ok, &[write(0, 11)]);
    let (_, _) = scene.op(2, Stage::Ok, &[write(0, 22)]);
    scene.op(1, Stage::Ok, &[read(0, 22)]);
    scene.op(2, Stage::Ok, &[read(0, 11)]);
    scene.violated(Check::Causal, "no order of writes explains");
}

#[test]
fn a_half_seen_transaction_is_found() {
    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[write(0, 11), write(1, 12)]);
    scene.op(2, Stage::Ok, &[read(0, 11), read(1, 2)]);
    scene.violated(Check::Atomic, "too");
}

#[test]
fn a_transaction_over_which_a_later_write_came_is_not_half_seen() {
    let mut scene = Scene::new();
    let (one, first) = scene.op(1, Stage::Ok, &[write(0, 11), write(1, 12)]);
    scene.apply(2, 1, &first, &[one]);
    scene.op(2, Stage::Ok, &[read(1, 12), write(1, 22)]);
    scene.op(2, Stage::Ok, &[read(0, 11), read(1, 22)]);
    scene.holds(Check::Atomic);
}

#[test]
fn each_session_guarantee_is_missed() {
    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.op(1, Stage::Ok, &[read(0, 1)]);
    scene.violated(Check::Session, "read your writes");

    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.op(2, Stage::Ok, &[read(0, 11)]);
    scene.op(2, Stage::Ok, &[read(0, 1)]);
    scene.violated(Check::Session, "monotonic reads");

    // n2's clock is behind and its WAL does not say that it had applied what the session read.
    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.clock_us = START_US + 100;
    scene.op(2, Stage::Ok, &[read(0, 11), write(1, 22)]);
    scene.clock_us = START_US + 9_000;
    scene.violated(Check::Session, "writes follow reads");
}

#[test]
fn a_session_whose_later_write_is_stamped_earlier_is_found() {
    let mut scene = Scene::new();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    // The session goes on at the other node, which knows nothing of it and whose clock is behind.
    scene.clock_us = START_US + 100;
    scene.op(2, Stage::Ok, &[write(1, 22)]);
    if let Some(Event::Op(op)) = scene.history.events.last_mut() {
        op.process = 100_000;
    }
    scene.violated(Check::Session, "monotonic writes");
}

#[test]
fn what_is_kept_for_ever_is_found() {
    let mut scene = finished();
    scene.end().rest = vec![(1, 2 << 20, 0), (2, 0, 0)];
    scene.violated(Check::Bounded, "n1: the slot");
    scene.end().rest = vec![(1, 0, 0), (2, 0, 3 << 20)];
    scene.end().segment_bytes = 1 << 20;
    scene.holds(Check::Bounded);
    scene.end().rest = vec![(1, 0, 0), (2, 0, 5 << 20)];
    scene.violated(Check::Bounded, "n2: the journal");
    scene.end().rest_after = Some((120, 0));
    scene.violated(
        Check::Bounded,
        "120 s were waited, in which all that was known became stable 0 times",
    );
    // Where nothing was to be let go, or a lost member holds it all, of the slot alone.
    scene.end().not_asked = vec![(2, "n1 is lost, and no other member was told so".to_owned())];
    scene.holds(Check::Bounded);
    scene.end().rest = vec![(2, 2 << 20, 5 << 20)];
    scene.violated(Check::Bounded, "n2: the slot");
}

#[test]
fn wal_that_is_kept_and_rows_that_never_become_stable_are_found() {
    let mut scene = finished();
    scene.end().held_back = vec![(1, 1 << 19), (2, 0)];
    scene.end().unstable = vec![(1, Some(0)), (2, Some(0))];
    scene.holds(Check::Bounded);
    scene.end().held_back[1].1 = 3 << 20;
    scene.violated(Check::Bounded, "n2: the server keeps 3145728 bytes of WAL");
    scene.end().held_back.clear();
    scene.end().unstable[0].1 = Some(7);
    scene.violated(Check::Bounded, "n1: 7 rows are in the index at rest");
    // Who does not answer has not said that all is well.
    scene.end().unstable[0].1 = None;
    let answer = scene.ask(Check::Bounded);
    assert!(matches!(answer, Answer::Unknown { .. }), "{answer:?}");
    let page = crate::report::html(&scene.history, &[]);
    assert!(page.contains("no answer"), "{page}");
}

/// The transactions of [`finished`], in a workload in which rows come and go.
fn come_and_go() -> Scene {
    let mut scene = finished();
    scene.history.header.workload = "mix".to_owned();
    scene
        .history
        .events
        .retain(|event| !matches!(event, Event::Op(op) if op.steps.iter().all(|step| step.act == Act::Read)));
    scene
}

#[test]
fn a_value_that_nobody_wrote_is_found_where_rows_come_and_go() {
    let mut scene = come_and_go();
    scene.op(1, Stage::Ok, &[read(0, 22), step(Act::Read, 9, None)]);
    scene.holds(Check::ThinAir);
    scene.op(1, Stage::Ok, &[read(1, 22)]);
    scene.violated(
        Check::ThinAir,
        "read r(kv/1 = 22), which no committed transaction wrote",
    );

    let mut scene = come_and_go();
    scene.op(1, Stage::Fail, &[write(3, 98)]);
    scene.op(2, Stage::Ok, &[read(3, 98)]);
    scene.violated(Check::ThinAir, "kv/3 = 98");
    // That it was applied does not say that anybody wrote it.
    let (lsn, stamp) = (scene.lsn[1], "00000000000000000001".to_owned());
    scene.apply(2, 1, &(lsn, stamp), &[]);
    if let Some(Event::Commit(commit)) = scene.history.events.last_mut() {
        commit.rows.push(write(3, 98));
    }
    scene.violated(Check::ThinAir, "kv/3 = 98");
    // Of two writes of one transaction only the second can be seen.
    let mut scene = come_and_go();
    let id = txn(1, 77);
    scene.commit(1, vec![id], vec![write(3, 771), write(3, 772)]);
    scene.op(2, Stage::Ok, &[read(3, 772)]);
    scene.holds(Check::ThinAir);
    scene.op(2, Stage::Ok, &[read(3, 771)]);
    scene.violated(Check::ThinAir, "kv/3 = 771");
}

#[test]
fn a_session_that_goes_back_is_found_where_rows_come_and_go() {
    let mut scene = come_and_go();
    scene.op(2, Stage::Ok, &[read(0, 22)]);
    scene.op(2, Stage::Ok, &[step(Act::Read, 0, None)]);
    scene.holds(Check::Session);
    scene.op(2, Stage::Ok, &[read(0, 11)]);
    scene.violated(Check::Session, "monotonic reads");
}

#[test]
fn a_session_that_goes_back_behind_a_large_transaction_is_found() {
    // n1 writes all rows by one statement, which n2 shows, and then shows what was there before.
    let large = |read_again: Step| {
        let mut scene = come_and_go();
        scene.history.header.workload = "bulk".to_owned();
        let (id, many) = (txn(1, 2), txn(1, 2) * 10);
        let written = (0..3).map(|key| write(key, many)).collect();
        let committed = scene.commit(1, vec![id], written);
        scene.apply(2, 1, &committed, &[id]);
        scene.history.events.push(Event::Op(Op {
            at_us: 1,
            stage: Stage::Ok,
            process: 100_000,
            node: 1,
            txn: id,
            steps: vec![Step {
                last: Some(2),
                ..step(Act::WriteMany, 0, Some(many))
            }],
            error: None,
        }));
        scene.op(2, Stage::Ok, &[read(0, many)]);
        scene.op(2, Stage::Ok, &[read_again]);
        scene
    };
    large(read(0, txn(1, 2) * 10)).holds(Check::Session);
    large(read(0, 22)).violated(Check::Session, "monotonic reads");
}

#[test]
fn a_row_may_come_back_where_a_delete_left_none_and_nowhere_else() {
    let went_back = |at_two: &[(First, Step)]| {
        let mut scene = come_and_go();
        scene.op(2, Stage::Ok, &[read(0, 22)]);
        for (first, row) in at_two {
            scene.commit(2, Vec::new(), vec![row.clone()]);
            if let Some(Event::Commit(commit)) = scene.history.events.last_mut() {
                commit.first = *first;
            }
        }
        scene.op(2, Stage::Ok, &[read(0, 11)]);
        scene
    };
    // Values of the first transactions of the two nodes, as they are in real runs.
    let value = |node| txn(node, 1) * 10;
    let in_real = |mut scene: Scene| {
        for event in &mut scene.history.events {
            let steps = match event {
                Event::Op(op) => &mut op.steps,
                Event::Commit(commit) => &mut commit.rows,
                _ => continue,
            };
            for step in steps.iter_mut() {
                step.value = match step.value {
                    Some(11) => Some(value(1)),
                    Some(22) => Some(value(2)),
                    other => other,
                };
            }
        }
        scene
    };
    let deleted = (First::User, step(Act::Delete, 0, None));
    let applied = |value| (First::Progress, write(0, value));
    in_real(went_back(&[deleted.clone(), applied(11)])).holds(Check::Session);
    let all_others: [&[(First, Step)]; 4] = [
        &[applied(11)],
        &[(First::Progress, step(Act::Delete, 0, None)), applied(11)],
        &[deleted.clone(), applied(22), applied(11)],
        &[deleted, (First::User, write(0, 33)), applied(11)],
    ];
    for at_two in all_others {
        in_real(went_back(at_two)).violated(Check::Session, "monotonic reads");
    }
}

#[test]
fn a_daemon_that_goes_on_after_an_fsync_that_failed_is_found() {
    use crate::history::{Death, Fault as Told};
    use crate::nemesis::{Fault, Part, Planned};
    let fault = Fault::FsyncFails(1, Part::Daemon);
    let scene_of = |from_us: i64, to_us: i64, death_us: Option<i64>| {
        let mut scene = finished();
        scene.history.header.plan = Some(vec![Planned {
            after: std::time::Duration::ZERO,
            faults: vec![fault.clone()],
            length: std::time::Duration::from_secs(2),
        }]);
        for (phase, at_us) in [("start", from_us), ("stop", to_us)] {
            scene.history.events.push(Event::Fault(Told {
                at_us,
                name: fault.to_string(),
                phase: phase.to_owned(),
                detail: String::new(),
            }));
        }
        scene.history.events.extend(death_us.map(|at_us| {
            Event::Death(Death {
                at_us,
                node: 2,
                what: "daemon".to_owned(),
                how: "exit status: 1".to_owned(),
                excuse: Some(fault.to_string()),
                words: "fsync".to_owned(),
            })
        }));
        scene
    };
    // The transactions of the scene are of its first milliseconds.
    scene_of(0, 9_000_000, Some(200_000)).holds(Check::Alive);
    scene_of(0, 9_000_000, None).violated(Check::Alive, "the daemon of n2 went on");
    scene_of(0, 9_000_000, Some(20_000_000)).violated(Check::Alive, "the daemon of n2 went on");
    // Nothing was there to sync.
    scene_of(10_000_000, 19_000_000, None).holds(Check::Alive);
}

#[test]
fn rows_that_had_drifted_are_found_and_other_alarms_are_told() {
    let mut scene = finished();
    scene.end().alarms = vec![(1, "web".to_owned(), "the port is taken".to_owned())];
    scene.end().said = vec![(2, "WARN the port <1> is taken".to_owned())];
    scene.holds(Check::Alive);
    let page = crate::report::html(&scene.history, &[]);
    assert!(page.contains("the port is taken"), "{page}");
    assert!(page.contains("n2: WARN the port &lt;1&gt; is taken"), "{page}");
    scene
        .end()
        .alarms
        .push((2, "drift".to_owned(), "1 row".to_owned()));
    scene.violated(Check::Alive, "n2: rows were not as the stream says");
}

#[test]
fn a_daemon_that_ended_is_found() {
    let mut scene = finished();
    scene
        .end()
        .notes
        .push("the daemon of n1 ended by itself".to_owned());
    scene.violated(Check::Alive, "ended by itself");
}

#[test]
fn a_daemon_that_ended_at_any_time_is_found_unless_a_fault_excuses_it() {
    let mut scene = finished();
    let mut death = crate::history::Death {
        at_us: 1_500_000,
        node: 2,
        what: "daemon".to_owned(),
        how: "exit status: 1".to_owned(),
        excuse: Some("fsync fails for the daemon of n2".to_owned()),
        words: "No space".to_owned(),
    };
    scene.history.events.push(Event::Death(death.clone()));
    scene.holds(Check::Alive);
    death.excuse = None;
    scene.history.events.push(Event::Death(death));
    scene.violated(Check::Alive, "the daemon of n2 ended by itself after 1.5 s");
}

#[test]
fn a_lost_node_takes_with_it_what_it_did_not_send_and_must_say_that_its_slot_is_gone() {
    let mut scene = finished();
    // Written at node 2, and never at node 1.
    scene.op(2, Stage::Ok, &[read(1, 2), write(1, 33)]);
    scene.violated(Check::Durable, "lost at n1");
    scene.violated(Check::FinalValue, "n1: kv/1 is 2");
    scene.end().lost.push(crate::history::Lost {
        node: 2,
        must_tell: true,
        words: "all is well".to_owned(),
    });
    scene.holds(Check::Durable);
    scene.holds(Check::FinalValue);
    scene.violated(Check::Alive, "does not say so");
    scene.end().lost[0].words = "replication slot anabranch does not exist".to_owned();
    scene.holds(Check::Alive);
    // What was lost at the survivor is still found.
    scene
        .history
        .events
        .retain(|event| !matches!(event, Event::Final(table) if table.node == 1));
    scene.hold(1, durable::WITNESS, &[(txn(2, 1), 2)]);
    scene.violated(Check::Durable, "of n1 is lost at n1");
}

#[test]
fn a_history_survives_its_file() {
    let scene = finished();
    let dir = anabranch_tests::postgres::open_dir("jepsen-history-");
    let path = dir.path().join("h.jsonl");
    scene.history.write(&path).unwrap();
    assert_eq!(History::read(&path).unwrap(), scene.history);
    std::fs::write(&path, "{\"kind\":\"unheard\"}\n").unwrap();
    assert!(History::read(&path).is_err());
}

/// Both nodes add to row 0 at once: 2 (by value 10) and 3 (by value 20) to the 1 that is there.
fn counted(at_one: i64, at_two: i64) -> (Scene, String) {
    let mut scene = Scene::new();
    scene.history.header.workload = "counter".to_owned();
    let (_, (_, stamp)) = scene.op(1, Stage::Ok, &[write(0, 10)]);
    scene.op(2, Stage::Ok, &[write(0, 20)]);
    for (node, sum) in [(1, at_one), (2, at_two)] {
        scene.hold(node, "kv", &[(0, sum), (1, 2), (2, 3), (3, 4)]);
        scene.hold(node, durable::WITNESS, &[(txn(1, 1), 1), (txn(2, 1), 2)]);
    }
    (scene, stamp)
}

#[test]
fn an_increment_that_is_lost_or_counted_twice_is_found() {
    // The header has four keys, the workload loads as many.
    counted(6, 6).0.holds(Check::Sum);
    counted(6, 4).0.violated(Check::Sum, "n2: kv/0 is Some(4)");
    counted(8, 6).0.violated(Check::Sum, "n1: kv/0 is Some(8)");
    let (mut logged, stamp) = counted(6, 6);
    logged.line(1, 0, &stamp, 10);
    logged.violated(Check::Sum, "logs a lost write");
}

#[test]
fn a_row_that_a_large_transfer_left_out_is_found() {
    let transferred = |rows: &[(i64, i64)]| {
        let mut scene = Scene::new();
        scene.history.header.workload = "bulk-bank".to_owned();
        let many = |act, value| Step {
            last: Some(3),
            ..step(act, 0, Some(value))
        };
        // What is taken back to a savepoint adds nothing.
        let steps = [many(Act::UndoneMany, 20), many(Act::WriteMany, 10)];
        scene.op(1, Stage::Ok, &steps);
        scene.hold(1, "kv", rows);
        scene.hold(1, durable::WITNESS, &[(txn(1, 1), 1)]);
        scene
    };
    transferred(&[(0, 3), (1, 0), (2, 5), (3, 2)]).holds(Check::Sum);
    transferred(&[(0, 3), (1, 0), (2, 3), (3, 2)]).violated(Check::Sum, "n1: kv/2 is Some(3)");
}

#[test]
fn steps_over_many_rows_are_read_back_from_a_history() {
    let many = Step {
        last: Some(9),
        ..step(Act::PutMany, 4, Some(70))
    };
    for step in [many, write(1, 10), step(Act::GiveUp, 0, None)] {
        let json = serde_json::to_string(&step).unwrap();
        assert_eq!(serde_json::from_str::<Step>(&json).unwrap(), step, "{json}");
    }
}

#[test]
fn a_session_that_moved_and_does_not_find_what_it_wrote_is_found() {
    let mut scene = Scene::new();
    scene.history.header.nemesis = "move".to_owned();
    scene.op(1, Stage::Ok, &[write(0, 11)]);
    let answer = scene.ask(Check::Session);
    assert!(
        matches!(answer, Answer::Unknown { .. }),
        "nobody moved: {answer:?}"
    );
    scene.op(2, Stage::Ok, &[read(0, 1)]);
    if let Some(Event::Op(op)) = scene.history.events.last_mut() {
        op.process = 100_000;
    }
    scene.violated(Check::Session, "read your writes");
}
