//! Planted violations of lists.

use super::*;

/// What the transaction appends as its first step.
fn element(node: u16, number: i64) -> i64 {
    txn(node, number) * 10
}

fn appended(key: i64, list: &[i64]) -> Step {
    Step {
        list: Some(list.to_vec()),
        ..write(key, *list.last().unwrap())
    }
}

fn seen(key: i64, list: &[i64]) -> Step {
    Step {
        list: Some(list.to_vec()),
        ..read(key, *list.last().unwrap())
    }
}

/// Row 0 is `[1]` at first; n1 appends to it, n2 sees that and appends, n1 sees both.
fn appending() -> (Scene, i64, i64) {
    let (a, b) = (element(1, 1), element(2, 1));
    let mut scene = Scene::new();
    scene.history.header.workload = "append".to_owned();
    let (one, first) = scene.op(1, Stage::Ok, &[appended(0, &[1, a])]);
    scene.apply(2, 1, &first, &[one]);
    let (two, second) = scene.op(2, Stage::Ok, &[seen(0, &[1, a]), appended(0, &[1, a, b])]);
    scene.apply(1, 2, &second, &[two]);
    scene.op(1, Stage::Ok, &[seen(0, &[1, a, b])]);
    (scene, a, b)
}

/// All nodes hold this as row 0 at the end, and the others as they were at first.
fn ending(scene: &mut Scene, list: &[i64]) {
    for node in [1, 2] {
        scene.hold(node, "kv", &[(0, *list.last().unwrap()), (1, 2), (2, 3), (3, 4)]);
        if let Some(Event::Final(table)) = scene.history.events.last_mut() {
            table.more = vec![(0, list.to_vec()), (1, vec![2]), (2, vec![3]), (3, vec![4])];
        }
    }
}

#[test]
fn good_lists_stand_every_check_of_theirs() {
    let (mut scene, a, b) = appending();
    ending(&mut scene, &[1, a, b]);
    for node in [1, 2] {
        scene.hold(node, durable::WITNESS, &[(txn(1, 1), 1), (txn(2, 1), 2)]);
    }
    for check in Workload::named("append").unwrap().checks("anabranch") {
        // Nobody read two rows here.
        if check != Check::Atomic {
            scene.holds(check);
        }
    }
}

#[test]
fn a_list_that_lost_an_element_within_is_found() {
    let (mut scene, a, b) = appending();
    ending(&mut scene, &[1, b]);
    scene.violated(Check::Append, "where the same append was seen before");
    scene.violated(Check::Append, &format!("does not hold {a}"));
}

#[test]
fn a_list_without_its_last_element_is_found() {
    let (mut scene, a, b) = appending();
    ending(&mut scene, &[1, a, b]);
    if let Some(Event::Final(table)) = scene.history.events.last_mut() {
        table.more[0].1 = vec![1, a];
    }
    scene.violated(Check::Append, "whose last element should be");
}

#[test]
fn an_element_twice_one_from_nowhere_and_one_of_a_failed_append_are_found() {
    let (mut scene, a, b) = appending();
    let c = element(1, 3);
    scene.op(1, Stage::Ok, &[appended(0, &[1, a, a, b, c])]);
    scene.violated(Check::Append, "twice");

    let (mut scene, a, b) = appending();
    let stranger = element(7, 1);
    scene.op(1, Stage::Ok, &[appended(0, &[1, a, stranger, b, c])]);
    scene.violated(
        Check::Append,
        &format!("holds {stranger}, which no committed transaction"),
    );
    // Another row's element is from nowhere, too.
    let (mut scene, a, _) = appending();
    scene.op(1, Stage::Ok, &[appended(1, &[2, a, c])]);
    scene.violated(
        Check::Append,
        &format!("holds {a}, which no committed transaction"),
    );

    let (mut scene, a, b) = appending();
    scene.op(1, Stage::Fail, &[write(0, c)]);
    scene.op(2, Stage::Ok, &[seen(0, &[1, a, b, c])]);
    scene.violated(Check::Append, "which no committed transaction");
    scene.violated(Check::Causal, "no committed transaction wrote");
}

#[test]
fn elements_against_the_causal_order_are_found() {
    let mut scene = Scene::new();
    scene.history.header.workload = "append".to_owned();
    let (a, b) = (element(1, 1), element(1, 2));
    // Of the first nobody heard what it made.
    scene.op(1, Stage::Ok, &[write(0, a)]);
    scene.op(1, Stage::Ok, &[appended(0, &[1, a, b])]);
    scene.op(2, Stage::Ok, &[seen(0, &[1, b, a])]);
    scene.violated(Check::Append, "which is causally earlier");
}

#[test]
fn an_append_that_is_gone_without_a_line_is_found() {
    let concurrent = || {
        let (a, b) = (element(1, 1), element(2, 1));
        let mut scene = Scene::new();
        scene.history.header.workload = "append".to_owned();
        let (one, first) = scene.op(1, Stage::Ok, &[appended(0, &[1, a])]);
        let (two, second) = scene.op(2, Stage::Ok, &[appended(0, &[1, b])]);
        scene.apply(2, 1, &first, &[one]);
        scene.apply(1, 2, &second, &[two]);
        ending(&mut scene, &[1, b]);
        (scene, first.1, a)
    };
    let (scene, _, a) = concurrent();
    scene.violated(Check::Append, &format!("does not hold {a}"));
    let (mut scene, stamp, a) = concurrent();
    scene.line(2, 0, &stamp, a);
    scene.holds(Check::Append);
    // Without a log nobody can be asked for a line.
    let (mut scene, _, _) = concurrent();
    scene.history.header.system = "native".to_owned();
    scene.holds(Check::Append);
}

#[test]
fn what_was_lost_with_a_list_is_accounted_for_by_its_line() {
    // n1 appends twice, n2 once: n1's second list is lost, and the first append with it.
    let (a, b, c) = (element(1, 1), element(1, 2), element(2, 1));
    let mut scene = Scene::new();
    scene.history.header.workload = "append".to_owned();
    scene.op(1, Stage::Ok, &[appended(0, &[1, a])]);
    let (_, second) = scene.op(1, Stage::Ok, &[appended(0, &[1, a, b])]);
    scene.op(2, Stage::Ok, &[appended(0, &[1, c])]);
    ending(&mut scene, &[1, c]);
    scene.violated(Check::Append, &format!("does not hold {a}"));
    scene.line(1, 0, &second.1, b);
    scene.holds(Check::Append);
}

#[test]
fn a_list_that_is_gone_for_a_while_is_found_by_who_reads_and_by_who_appends() {
    for gone in [step(Act::Read, 2, None), write(2, element(2, 2))] {
        let (mut scene, a, b) = appending();
        ending(&mut scene, &[1, a, b]);
        scene.holds(Check::Append);
        scene.op(2, Stage::Ok, &[gone]);
        scene.violated(Check::Append, "found no row kv/2");
    }
}

#[test]
fn an_append_reads_what_it_appends_to() {
    let mut scene = Scene::new();
    scene.history.header.workload = "append".to_owned();
    let (a, b) = (element(1, 1), element(1, 2));
    scene.op(1, Stage::Ok, &[appended(0, &[1, a])]);
    // The session's own append is not in what it appends to.
    scene.op(1, Stage::Ok, &[appended(0, &[1, b])]);
    scene.violated(Check::Session, "read your writes");
    scene.violated(Check::Causal, "no order of writes explains");
}

#[test]
fn lists_survive_their_file_and_are_exported_as_elle_reads_them() {
    let (mut scene, a, b) = appending();
    ending(&mut scene, &[1, a, b]);
    let dir = anabranch_tests::postgres::open_dir("jepsen-history-");
    let path = dir.path().join("h.jsonl");
    scene.history.write(&path).unwrap();
    assert_eq!(History::read(&path).unwrap(), scene.history);
    let edn = crate::export::edn(&scene.history).unwrap();
    assert!(
        edn.starts_with(
            "{:index 0, :time 0, :type :invoke, :process 0, :f :txn, :value [[:append \"kv/0\" 1] "
        ),
        "{edn}"
    );
    assert!(
        edn.contains(&format!(
            ":type :ok, :process 200000, :f :txn, :value [[:r \"kv/0\" [1 {a}]] [:append \"kv/0\" {b}]]"
        )),
        "{edn}"
    );
}
