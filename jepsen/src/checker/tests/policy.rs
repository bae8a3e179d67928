//! What other policies than the last update decide.

use super::*;

/// Who writes row 0 first and then, not knowing of that, what each makes of it, and the policy by which the first of both wins.
type Case = (&'static str, [u16; 2], [Step; 2]);

fn cases() -> [Case; 4] {
    let delete = || step(Act::Delete, 0, None);
    [
        ("first_update_wins", [1, 2], [write(0, 11), write(0, 22)]),
        ("origin_priority", [2, 1], [write(0, 11), write(0, 22)]),
        ("delete_wins", [1, 2], [delete(), write(0, 22)]),
        ("update_wins", [1, 2], [write(0, 11), delete()]),
    ]
}

/// Both commits, each applied at the other node; their stamps.
fn at_once(case: &Case) -> (Scene, [String; 2]) {
    let (policy, [first, second], [one, two]) = case;
    let mut scene = Scene::new();
    (*policy).clone_into(&mut scene.history.header.policy);
    let (a, one) = scene.op(*first, Stage::Ok, std::slice::from_ref(one));
    let (b, two) = scene.op(*second, Stage::Ok, std::slice::from_ref(two));
    scene.apply(*second, *first, &one, &[a]);
    scene.apply(*first, *second, &two, &[b]);
    (scene, [one.1, two.1])
}

fn ends_with(scene: &mut Scene, value: Option<i64>) {
    let row = value.map(|value| (0, value));
    let rows: Vec<(i64, i64)> = row.into_iter().chain([(1, 2), (2, 3), (3, 4)]).collect();
    for node in [1, 2] {
        scene.hold(node, "kv", &rows);
    }
}

fn lost_to(scene: &mut Scene, node: u16, (lost, value): (&str, Option<i64>), won: &str) {
    scene.line(node, 0, lost, 0);
    if let Some(Event::Line(line)) = scene.history.events.last_mut() {
        line.lost_value = value;
        line.won = crate::truth::parse_stamp_bytes(won).unwrap().to_string();
    }
}

/// What is asked of values and logs.
const DECIDED: [Check; 3] = [Check::FinalValue, Check::ConflictLog, Check::LogsEqual];

#[test]
fn each_policy_decides_as_it_says_and_the_other_write_has_a_line() {
    for case in cases() {
        let (mut scene, [one, two]) = at_once(&case);
        ends_with(&mut scene, case.2[0].value);
        for node in [1, 2] {
            lost_to(&mut scene, node, (&two, case.2[1].value), &one);
        }
        for check in DECIDED {
            scene.holds(check);
        }
        // By the last update the other one would have won.
        scene.history.header.policy.clear();
        scene.violated(Check::FinalValue, "its last version");
        scene.violated(Check::ConflictLog, "lost to no concurrent one");
        scene.violated(Check::LogsEqual, "has no line");
    }
}

#[test]
fn what_a_policy_does_not_choose_is_found() {
    for case in cases() {
        let (mut scene, [one, two]) = at_once(&case);
        ends_with(&mut scene, case.2[1].value);
        scene.holds(Check::Equal);
        scene.violated(Check::FinalValue, "its winning version");
        scene.violated(Check::ConflictLog, "lost without a line");
        scene.violated(Check::LogsEqual, "has no line");
        lost_to(&mut scene, 1, (&one, case.2[0].value), &two);
        scene.violated(Check::ConflictLog, "lost to no concurrent one");
        lost_to(&mut scene, 1, (&two, case.2[1].value), &two);
        scene.violated(Check::ConflictLog, "no preferred concurrent version");
    }
}

/// n1 writes row 0 (x), and again (z); n2 writes it (y), not knowing of either. By the first update x beats y, and y beats z.
fn comes_back() -> (Scene, [String; 3]) {
    let mut scene = Scene::new();
    "first_update_wins".clone_into(&mut scene.history.header.policy);
    let (one, x) = scene.op(1, Stage::Ok, &[write(0, 11)]);
    let (two, y) = scene.op(2, Stage::Ok, &[write(0, 22)]);
    let (three, z) = scene.op(1, Stage::Ok, &[write(0, 33)]);
    scene.apply(2, 1, &x, &[one]);
    scene.apply(2, 1, &z, &[three]);
    scene.apply(1, 2, &y, &[two]);
    (scene, [x.1, y.1, z.1])
}

#[test]
fn a_version_that_had_lost_comes_back_once_somebody_overwrote_what_beat_it() {
    let (mut scene, [x, y, z]) = comes_back();
    ends_with(&mut scene, Some(22));
    for node in [1, 2] {
        lost_to(&mut scene, node, (&z, Some(33)), &y);
    }
    for check in DECIDED {
        scene.holds(check);
    }
    // n2 met x before z.
    lost_to(&mut scene, 2, (&y, Some(22)), &x);
    for check in DECIDED {
        scene.holds(check);
    }
    // Who overwrote x knew of it.
    lost_to(&mut scene, 1, (&x, Some(11)), &y);
    scene.violated(Check::ConflictLog, "lost to no concurrent one");
    for wrong in [11, 33] {
        let (mut scene, _) = comes_back();
        ends_with(&mut scene, Some(wrong));
        scene.violated(Check::FinalValue, "its winning version is 22");
    }
}

#[test]
fn what_does_not_hold_by_another_policy_is_not_asked_and_an_unknown_one_is_not_judged() {
    let asked = |policy: &str| {
        let mut scene = finished();
        policy.clone_into(&mut scene.history.header.policy);
        let verdicts = check(&scene.history);
        (
            verdicts.iter().map(|verdict| verdict.check).collect::<Vec<_>>(),
            Outcome::of(&verdicts),
        )
    };
    let (usual, outcome) = asked("");
    assert_eq!(outcome, Outcome::Holds);
    assert_eq!(asked("last_update_wins"), (usual, Outcome::Holds));
    let (other, outcome) = asked("first_update_wins");
    assert_eq!(outcome, Outcome::Violated);
    assert!(other.contains(&Check::ThinAir) && !other.contains(&Check::Causal));
    assert_eq!(asked("the_best_wins"), (vec![Check::Known], Outcome::Unknown));
}
