//! Planted violations of unique values.

use super::*;
use crate::workload::claim;

/// Two values that claim the same.
fn rivals() -> (i64, i64) {
    let rival = (2..)
        .map(|n| n * 10)
        .find(|&value| claim(value, 4) == claim(10, 4));
    (10, rival.unwrap())
}

/// n1 writes row 0, n2 row 1, not knowing, with the same unique value; n2's is later.
fn claiming() -> (Scene, String, String) {
    let (lost, won) = rivals();
    let mut scene = Scene::new();
    scene.history.header.workload = "unique".to_owned();
    let (one, first) = scene.op(1, Stage::Ok, &[write(0, lost)]);
    let (two, second) = scene.op(2, Stage::Ok, &[write(1, won)]);
    scene.apply(2, 1, &first, &[one]);
    scene.apply(1, 2, &second, &[two]);
    (scene, first.1, second.1)
}

/// The rows of a node at the end, each with the unique value beside it.
fn hold(scene: &mut Scene, node: u16, rows: &[(i64, i64)]) {
    let mut all = rows.to_vec();
    all.extend([(2, 3), (3, 4)]);
    scene.hold(node, "kv", &all);
    if let Some(Event::Final(table)) = scene.history.events.last_mut() {
        table.more = rows
            .iter()
            .map(|&(key, value)| (key, vec![claim(value, 4)]))
            .collect();
    }
}

fn lost_value(scene: &mut Scene, node: u16, key: i64, stamp: &str, value: i64) {
    scene.line(node, key, stamp, value);
    if let Some(Event::Line(line)) = scene.history.events.last_mut() {
        line.conflict = "multiple_unique_conflicts".to_owned();
    }
}

/// As it should be: n2's row has the value, n1's is gone and logged.
fn decided() -> (Scene, String) {
    let (mut scene, first, second) = claiming();
    let (lost, won) = rivals();
    for node in [1, 2] {
        hold(&mut scene, node, &[(1, won)]);
        lost_value(&mut scene, node, 0, &first, lost);
    }
    (scene, second)
}

#[test]
fn a_value_that_one_row_has_and_a_logged_loser_are_right() {
    let (mut scene, _) = decided();
    for node in [1, 2] {
        scene.hold(node, durable::WITNESS, &[(txn(1, 1), 1), (txn(2, 1), 2)]);
    }
    scene.op(1, Stage::Ok, &[read(1, rivals().1)]);
    for check in Workload::named("unique").unwrap().checks("anabranch") {
        scene.holds(check);
    }
}

#[test]
fn a_value_that_two_rows_have_is_found() {
    let (mut scene, _, _) = claiming();
    let (lost, won) = rivals();
    hold(&mut scene, 1, &[(0, lost), (1, won)]);
    scene.violated(Check::Unique, "and so has 0");
}

#[test]
fn a_value_that_is_not_the_writes_is_found() {
    let (mut scene, _) = decided();
    if let Some(Event::Final(table)) = scene
        .history
        .events
        .iter_mut()
        .rfind(|event| matches!(event, Event::Final(_)))
    {
        table.more[0].1 = vec![claim(rivals().1, 4) + 1];
    }
    scene.violated(Check::Unique, "but that write claimed");
}

#[test]
fn a_loser_without_a_line_at_one_node_is_found() {
    let (mut scene, first, _) = claiming();
    let (lost, won) = rivals();
    for node in [1, 2] {
        hold(&mut scene, node, &[(1, won)]);
    }
    lost_value(&mut scene, 1, 0, &first, lost);
    scene.violated(Check::Unique, "n2: kv/0 is None");
}

#[test]
fn a_winner_that_is_gone_is_found_though_it_is_logged() {
    let (mut scene, _, second) = claiming();
    let (lost, won) = rivals();
    for node in [1, 2] {
        hold(&mut scene, node, &[(0, lost)]);
        lost_value(&mut scene, node, 1, &second, won);
    }
    scene.violated(Check::Unique, "is called lost for a unique value");
}

#[test]
fn a_row_that_is_not_its_last_version_is_found() {
    let (mut scene, _) = decided();
    scene.op(1, Stage::Ok, &[write(1, rivals().1 + 7)]);
    scene.violated(Check::Unique, "but its last version is");
}

#[test]
fn a_row_that_was_refused_for_a_value_that_nobody_had_is_found() {
    let refused = |scene: &mut Scene, key: i64, stamp: &str, value: i64| {
        scene.line(1, key, stamp, value);
        if let Some(Event::Line(line)) = scene.history.events.last_mut() {
            line.conflict = "apply_error".to_owned();
            line.status = "acknowledged".to_owned();
            line.text = "constraint_name: kv_claim_key".to_owned();
        }
    };
    // The winner itself may have been refused for a moment.
    let (mut scene, second) = decided();
    refused(&mut scene, 1, &second, rivals().1);
    scene.holds(Check::Unique);
    scene.holds(Check::ConflictLog);
    let (mut scene, _) = decided();
    let alone = (3..)
        .map(|n| n * 10)
        .find(|&value| claim(value, 4) != claim(10, 4) && claim(value, 4) != claim(1, 4));
    let (_, other) = scene.op(1, Stage::Ok, &[write(2, alone.unwrap())]);
    refused(&mut scene, 2, &other.1, alone.unwrap());
    scene.violated(Check::Unique, "is called refused");
}

#[test]
fn a_row_that_was_written_at_last_and_is_still_called_refused_is_found() {
    let (mut scene, second) = decided();
    scene.line(1, 1, &second, rivals().1);
    if let Some(Event::Line(line)) = scene.history.events.last_mut() {
        line.conflict = "apply_error".to_owned();
        line.text = "constraint_name: kv_claim_key".to_owned();
    }
    scene.violated(Check::Unique, "still open");
}

#[test]
fn a_line_that_names_no_version_is_found() {
    let (mut scene, _) = decided();
    lost_value(&mut scene, 1, 0, "00000000000000010001", 5);
    scene.violated(Check::Unique, "names no version");
}
