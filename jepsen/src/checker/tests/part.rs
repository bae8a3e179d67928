//! Histories of which something is missing: nothing holds, and what may only seem to be violated is not called so.

use super::*;

/// The answer has nothing to say but this.
fn unknown(scene: &Scene, check: Check, word: &str) {
    match scene.ask(check) {
        Answer::Unknown { why } => assert!(why.contains(word), "{check:?}: {why}"),
        other => panic!("{check:?}: {other:?}"),
    }
}

#[test]
fn an_incomplete_history_cannot_hold() {
    let mut scene = finished();
    scene.end().miss("a node could not be read");
    scene.end().miss("a client could not go on");
    unknown(
        &scene,
        Check::Equal,
        "a node could not be read; a client could not go on",
    );
}

#[test]
fn of_a_node_at_which_nothing_was_acknowledged_nobody_can_tell() {
    let mut scene = finished();
    scene.holds(Check::Durable);
    scene.history.header.servers.push(15);
    unknown(&scene, Check::Durable, "no transaction was acknowledged at n3");
    // One at which something was lost all the same is found.
    scene.hold(3, durable::WITNESS, &[(txn(1, 1), 1)]);
    scene.violated(Check::Durable, "is lost at n3");
}

#[test]
fn what_a_part_of_a_history_seems_to_show_is_told_and_not_believed() {
    // n2 could not be read.
    let mut scene = finished();
    let of_two = |event: &Event| match event {
        Event::Final(table) => table.node == 2,
        Event::Commit(commit) => commit.node == 2,
        _ => false,
    };
    scene.history.events.retain(|event| !of_two(event));
    scene.violated(Check::Equal, "1 of 2 nodes");
    scene.end().miss("n2 could not be read");
    unknown(
        &scene,
        Check::Equal,
        "n2 could not be read; what was found may come of that: 2: ",
    );
    assert_eq!(Outcome::of(&check(&scene.history)), Outcome::Unknown);
}

#[test]
fn of_a_run_that_was_given_up_what_did_happen_counts() {
    let mut scene = finished();
    scene.history.header.cut_short = Some("the disk cannot be thawed".to_owned());
    scene.history.events.remove(0);
    for check in Workload::named("register").unwrap().checks("anabranch") {
        let answer = scene.ask(check);
        assert!(matches!(answer, Answer::Unknown { .. }), "{check:?}: {answer:?}");
    }
    unknown(&scene, Check::Durable, "the disk cannot be thawed");
    assert!(crate::report::html(&scene.history, &[]).contains("cut short: the disk cannot be thawed"));
    scene.history.events.push(Event::Death(crate::history::Death {
        at_us: 1,
        node: 2,
        what: "daemon".to_owned(),
        how: "exit status: 1".to_owned(),
        excuse: None,
        words: String::new(),
    }));
    scene.violated(Check::Alive, "ended by itself");
}
