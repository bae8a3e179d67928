//! Planted violations of sums.

use super::*;
use crate::workload::tpcb;

fn totals(of: &[(&str, i64)]) -> Vec<Step> {
    of.iter()
        .map(|(table, sum)| Step {
            table: (*table).to_owned(),
            ..step(Act::Total, 0, Some(*sum))
        })
        .collect()
}

/// Four accounts with 1, 2, 3 and 4.
fn bank() -> Scene {
    let mut scene = Scene::new();
    scene.history.header.workload = "bank".to_owned();
    scene
}

#[test]
fn a_snapshot_in_which_money_is_missing_is_found() {
    let mut scene = bank();
    scene.op(1, Stage::Ok, &totals(&[("kv", 10)]));
    scene.hold(1, "kv", &[(0, 0), (1, 2), (2, 4), (3, 4)]);
    scene.holds(Check::Total);
    scene.op(2, Stage::Ok, &totals(&[("kv", 9)]));
    scene.violated(Check::Total, "kv 9, but it is 10 at all times");
    let mut scene = bank();
    scene.hold(2, "kv", &[(0, 0), (1, 2), (2, 3), (3, 4)]);
    scene.violated(Check::Total, "n2 at the end");
}

/// One transaction of pgbench, and what both nodes hold after it.
fn transacted(missing: Option<&str>) -> (Scene, i64) {
    let mut scene = Scene::new();
    scene.history.header.workload = "tpcb".to_owned();
    scene.history.header.keys = 2;
    let id = txn(1, 1);
    let of = |table: &str, key, place| Step {
        table: table.to_owned(),
        ..step(Act::Write, key, Some(id * 10 + place))
    };
    let steps = [
        of(tpcb::ACCOUNTS, 2, 0),
        of(tpcb::OF_TELLERS, 20, 2),
        of(tpcb::OF_BRANCHES, 1, 3),
        of(tpcb::HISTORY, id, 4),
    ];
    scene.op(1, Stage::Ok, &steps);
    let delta = tpcb::delta(id * 10);
    for node in [1, 2] {
        let part = |table: &str, count: i64, key: i64| {
            let has = node == 1 || missing != Some(table);
            (1..=count)
                .map(|row| (row, if row == key && has { delta } else { 0 }))
                .collect::<Vec<_>>()
        };
        let accounts = part(tpcb::ACCOUNTS, 2, 2);
        let tellers = part(tpcb::OF_TELLERS, tpcb::TELLERS, 20);
        let branches = part(tpcb::OF_BRANCHES, tpcb::BRANCHES, 1);
        scene.hold(node, tpcb::ACCOUNTS, &accounts);
        scene.hold(node, tpcb::OF_TELLERS, &tellers);
        scene.hold(node, tpcb::OF_BRANCHES, &branches);
        scene.hold(node, tpcb::HISTORY, &[(id, delta)]);
        scene.hold(node, durable::WITNESS, &[(id, 1)]);
    }
    (scene, delta)
}

#[test]
fn sums_of_tpcb_are_asked_row_by_row_and_as_a_whole() {
    let (scene, delta) = transacted(None);
    assert_ne!(delta, 0);
    scene.holds(Check::Sum);
    scene.holds(Check::Total);
    for table in [tpcb::ACCOUNTS, tpcb::OF_TELLERS, tpcb::OF_BRANCHES] {
        let (scene, _) = transacted(Some(table));
        scene.violated(Check::Sum, &format!("n2: {table}/"));
        scene.violated(Check::Total, "n2 at the end");
    }
}

#[test]
fn a_transaction_of_tpcb_that_is_seen_half_is_found() {
    let (mut scene, delta) = transacted(None);
    let alike = [
        (tpcb::ACCOUNTS, delta),
        (tpcb::OF_TELLERS, delta),
        (tpcb::OF_BRANCHES, delta),
        (tpcb::HISTORY, delta),
    ];
    scene.op(2, Stage::Ok, &totals(&alike));
    scene.holds(Check::Total);
    let mut half = alike;
    half[3].1 = 0;
    scene.op(2, Stage::Ok, &totals(&half));
    scene.violated(Check::Total, "they are alike at all times");
}
