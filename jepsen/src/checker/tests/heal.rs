//! Nodes that were healed, and faults that could not be made.

use super::*;
use crate::history::{Fault, Healed};

/// n1 loses its slot after row 0 is 11 everywhere, writes 0 (twice) and 1 while nobody decodes, is healed, and writes them again.
fn healed() -> Scene {
    let mut scene = Scene::new();
    scene.history.header.nemesis = "heal".to_owned();
    let (before, first) = scene.op(1, Stage::Ok, &[write(0, 11)]);
    scene.apply(2, 1, &first, &[before]);
    let journaled = scene.lsn[1];
    let gap: Vec<i64> = [12, 13, 14]
        .into_iter()
        .zip([0, 0, 1])
        .map(|(value, key)| scene.op(1, Stage::Ok, &[write(key, value)]).0)
        .collect();
    let slot_at = scene.lsn[1];
    scene.history.events.push(Event::Healed(Healed {
        at_us: 0,
        node: 1,
        journaled,
        slot_at,
        rows: 5,
    }));
    // Not later than they were written; meanwhile n2 has written row 1, later.
    let written_us = scene.clock_us;
    let (two, won) = scene.op(2, Stage::Ok, &[write(1, 22)]);
    let again = scene.commit(1, gap.clone(), vec![write(0, 13), write(1, 14)]);
    if let Some(Event::Commit(commit)) = scene.history.events.last_mut() {
        commit.again_us = Some(written_us);
    }
    let truth = Truth::of(&scene.history);
    let hex = |stamp: anabranch_proto::Stamp| -> String {
        stamp
            .to_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let stamp = hex(truth.stamps[&gap[0]]);
    scene.apply(2, 1, &(again.0, stamp.clone()), &gap);
    scene.apply(1, 2, &won, &[two]);
    for node in [1, 2] {
        scene.hold(node, "kv", &[(0, 13), (1, 22), (2, 3), (3, 4)]);
        let all: Vec<(i64, i64)> = gap
            .iter()
            .chain([&before])
            .map(|txn| (*txn, 1))
            .chain([(two, 2)])
            .collect();
        scene.hold(node, durable::WITNESS, &all);
        scene.line(node, 1, &stamp, 14);
    }
    scene
}

#[test]
fn what_a_healed_node_wrote_again_counts_and_is_stamped_as_of_when_it_was_written() {
    let scene = healed();
    for check in [
        Check::Equal,
        Check::Durable,
        Check::Stamps,
        Check::FinalValue,
        Check::ConflictLog,
        Check::LogsEqual,
    ] {
        scene.holds(check);
    }
}

#[test]
fn what_was_overwritten_while_nobody_decoded_may_not_come_back() {
    let mut scene = healed();
    scene
        .history
        .events
        .retain(|event| !matches!(event, Event::Final(table) if table.table == "kv"));
    for node in [1, 2] {
        scene.hold(node, "kv", &[(0, 12), (1, 22), (2, 3), (3, 4)]);
    }
    scene.violated(Check::FinalValue, "kv/0 is 12");
}

#[test]
fn a_transaction_that_a_healed_node_did_not_write_again_is_lost() {
    let mut scene = healed();
    scene.history.events.retain(
        |event| !matches!(event, Event::Final(table) if table.table == durable::WITNESS && table.node == 2),
    );
    scene.hold(2, durable::WITNESS, &[(txn(1, 1), 1), (txn(2, 1), 2)]);
    scene.violated(Check::Durable, "is lost at n2");
}

#[test]
fn a_nemesis_none_of_whose_faults_could_be_made_was_not_survived() {
    let of = |phases: &[&str]| {
        let mut scene = finished();
        scene.history.header.nemesis = "kill".to_owned();
        for phase in phases {
            scene.history.events.push(Event::Fault(Fault {
                at_us: 1,
                name: "kill -9 of the daemon of n1".to_owned(),
                phase: (*phase).to_owned(),
                detail: "there is none".to_owned(),
            }));
        }
        Outcome::of(&check(&scene.history))
    };
    assert_eq!(of(&["start", "stop"]), Outcome::Holds);
    assert_eq!(of(&["start", "stop", "impossible"]), Outcome::Holds);
    assert_eq!(of(&["impossible"]), Outcome::Unknown);
    assert_eq!(of(&["left-out"]), Outcome::Unknown);
    assert_eq!(of(&["start", "stop", "left-out"]), Outcome::Holds);
    // One that met nothing was not survived, one beside it was.
    assert_eq!(of(&["start", "stop", "idle"]), Outcome::Unknown);
    assert_eq!(of(&["start", "stop", "idle", "start", "stop"]), Outcome::Holds);
    assert_eq!(of(&[]), Outcome::Unknown);
}
