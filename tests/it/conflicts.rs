//! Writes that did not see each other: every node ends with the same row, and the loser is in every log.

use anabranch_tests::Cluster;
use anabranch_tests::conflicts::Conflict;
use anabranch_tests::wait::until;
use serde_json::{Value, json};

const ITEMS: &str = "create table item (id int primary key, v text)";

/// A cluster that holds one row, `(1, 'base')`.
async fn with_a_row<const N: usize>(versions: [u32; N]) -> Cluster {
    let cluster = Cluster::of(versions).schema(ITEMS).start().await;
    cluster.run(0, "insert into item values (1, 'base')").await;
    cluster.converge().await;
    cluster
}

const ALL: &str = "select coalesce(string_agg(id || '=' || v, ' ' order by id), 'none') from item";

/// Asserts what each node, from the first on, calls its one conflict: what came in, and what it met there.
async fn expect_kinds(cluster: &Cluster, kinds: &[&str]) {
    for (node, kind) in kinds.iter().enumerate() {
        let log = cluster.conflicts_at(node).await;
        let [line] = log.as_slice() else {
            panic!("n{} has not one line: {log:#?}", node + 1);
        };
        assert_eq!(line.kind(), *kind, "at n{}: {line:#?}", node + 1);
    }
}

/// Asserts that the log has a line whose losing or winning side holds this value.
fn expect_logged(log: &[Conflict], value: &str) {
    assert!(
        log.iter().any(|line| line.everything().contains(value)),
        "`{value}` is in no line of the log: {log:#?}"
    );
}

#[tokio::test]
async fn of_two_updates_the_later_wins_and_the_earlier_is_logged_everywhere() {
    let cluster = with_a_row([15, 15, 15]).await;
    cluster
        .apart(&[
            (0, "update item set v = 'earlier'"),
            (1, "update item set v = 'later'"),
        ])
        .await;
    cluster.expect(ALL, "1=later").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    for node in cluster.all() {
        let line = &cluster.conflicts_at(node).await[0];
        assert_eq!(line.kind(), "update_origin_differs");
        assert_eq!(line.key(), &json!({"id": 1}));
        assert_eq!(line.applied(), &json!({"id": 1, "v": "later"}));
        let sides = [line.local(), line.remote()];
        assert!(sides.contains(&&json!({"id": 1, "v": "earlier"})), "{line:#?}");
        assert!(sides.contains(&&json!({"id": 1, "v": "later"})), "{line:#?}");
    }
    // The node that wrote the loser took the other's row; the winner kept its own.
    assert_eq!(cluster.conflicts_at(0).await[0].resolution(), "apply_remote");
    assert_eq!(
        cluster.conflicts_at(0).await[0].local(),
        &json!({"id": 1, "v": "earlier"})
    );
    assert_eq!(cluster.conflicts_at(1).await[0].resolution(), "keep_local");
    assert_eq!(
        cluster.conflicts_at(1).await[0].local(),
        &json!({"id": 1, "v": "later"})
    );
}

#[tokio::test]
async fn of_two_inserts_of_one_key_the_later_wins() {
    let cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    cluster
        .apart(&[
            (1, "insert into item values (7, 'earlier')"),
            (0, "insert into item values (7, 'later')"),
        ])
        .await;
    cluster.expect(ALL, "7=later").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].kind(), "insert_exists");
    expect_logged(&log, "earlier");
}

#[tokio::test]
async fn a_delete_after_a_concurrent_update_wins_and_the_update_is_logged() {
    let cluster = with_a_row([15, 15, 15]).await;
    cluster
        .apart(&[(0, "update item set v = 'updated'"), (1, "delete from item")])
        .await;
    cluster.expect(ALL, "none").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    expect_logged(&log, "updated");
    // To the third either may come first.
    expect_kinds(&cluster, &["delete_origin_differs", "update_deleted"]).await;
}

#[tokio::test]
async fn an_update_after_a_concurrent_delete_brings_the_row_back_and_the_delete_is_logged() {
    let cluster = with_a_row([15, 15, 15]).await;
    cluster
        .apart(&[(0, "delete from item"), (1, "update item set v = 'updated'")])
        .await;
    cluster.expect(ALL, "1=updated").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].key(), &json!({"id": 1}));
    expect_kinds(&cluster, &["update_deleted", "delete_origin_differs"]).await;
}

#[tokio::test]
async fn two_deletes_of_one_row_leave_no_row() {
    let cluster = with_a_row([15, 15]).await;
    cluster
        .apart(&[(0, "delete from item"), (1, "delete from item")])
        .await;
    cluster.expect(ALL, "none").await;
    assert_eq!(cluster.conflicts().await.len(), 1);
    expect_kinds(&cluster, &["delete_missing", "delete_missing"]).await;
    // The row may be made anew afterwards, at either node.
    cluster.run(0, "insert into item values (1, 'again')").await;
    cluster.converge().await;
    cluster.expect(ALL, "1=again").await;
}

#[tokio::test]
async fn insert_delete_insert_of_one_key_apart_from_an_insert_of_it() {
    for (first, then, winner) in [(0, 1, "theirs"), (1, 0, "third")] {
        let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
        cluster.isolate_all();
        for at in [first, then] {
            if at == 0 {
                let session = cluster.session(0).await;
                session.run("insert into item values (1, 'first')").await;
                session.run("delete from item").await;
                session.run("insert into item values (1, 'third')").await;
            } else {
                cluster.run(1, "insert into item values (1, 'theirs')").await;
            }
        }
        cluster.heal();
        cluster.converge().await;
        cluster.expect(ALL, &format!("1={winner}")).await;
        let loser = if winner == "third" { "theirs" } else { "third" };
        // What of the node's own chain of writes is logged depends on which of them had arrived; its end is
        // a loser everywhere.
        for node in cluster.all() {
            expect_logged(&cluster.conflicts_at(node).await, loser);
        }
    }
}

#[tokio::test]
async fn insert_delete_insert_in_one_transaction_apart_from_an_insert() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    let thrice = "begin; insert into item values (1, 'first'); delete from item; insert into item values (1, 'third'); commit";
    cluster
        .apart(&[(1, "insert into item values (1, 'theirs')"), (0, thrice)])
        .await;
    cluster.expect(ALL, "1=third").await;
    expect_logged(&cluster.conflicts().await, "theirs");
}

#[tokio::test]
async fn a_row_may_be_deleted_and_inserted_again_at_other_nodes() {
    let cluster = with_a_row([15, 15, 15]).await;
    for round in 0..5 {
        cluster.run(round % 3, "delete from item").await;
        cluster.converge().await;
        cluster
            .run(
                (round + 1) % 3,
                &format!("insert into item values (1, 'round {round}')"),
            )
            .await;
        cluster.converge().await;
    }
    cluster.expect(ALL, "1=round 4").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn two_rows_that_move_to_one_key_leave_the_later() {
    let cluster = Cluster::of([15, 15, 18]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'one'), (3, 'three')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update item set id = 2 where id = 1"),
            (1, "update item set id = 2 where id = 3"),
        ])
        .await;
    cluster.expect(ALL, "2=three").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].key(), &json!({"id": 2}));
    expect_logged(&log, "one");
    expect_kinds(&cluster, &["update_pkey_exists"; 3]).await;
}

#[tokio::test]
async fn a_row_of_a_table_that_is_not_here_waits_with_its_line_until_the_table_is_made() {
    let cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .schema("create table other (id int primary key)")
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    // Nothing of it was ever on its way: a daemon that has still to decode writes of a table that is gone ends.
    cluster.run(1, "drop table item").await;
    cluster.run(0, "insert into item values (2, 'after')").await;
    const WAITING: &str = "select count(*) from anabranch.quarantine";
    cluster.wait_value(1, WAITING, "1").await;
    let log = cluster.conflicts_at(1).await;
    let [line] = log.as_slice() else {
        panic!("not one line: {log:#?}");
    };
    assert_eq!((line.kind(), line.resolution()), ("table_missing", "skip"));
    let text = line.everything();
    // The value as its bytes: without a table nobody says what they are.
    assert!(text.contains("42P01") && text.contains("6166746572"), "{text}");
    assert_eq!(line.local(), &Value::Null);
    // Nothing else stops.
    cluster.run(0, "insert into other values (1)").await;
    cluster.wait_value(1, "select count(*) from other", "1").await;

    cluster.run(1, ITEMS).await;
    anabranch_tests::cluster::initialise(&cluster.nodes[1]).await;
    cluster.wait_value(1, WAITING, "0").await;
    cluster.wait_value(1, ALL, "2=after").await;
    let closed = "select concat_ws(' ', status, reviewed_by) from anabranch.conflict_history";
    cluster.wait_value(1, closed, "acknowledged anabranch").await;
}

#[tokio::test]
async fn a_row_that_moves_to_two_keys_is_at_both() {
    let cluster = with_a_row([15, 15, 15]).await;
    cluster
        .apart(&[
            (0, "update item set id = 2, v = 'two'"),
            (1, "update item set id = 3, v = 'three'"),
        ])
        .await;
    cluster.expect(ALL, "2=two 3=three").await;
    cluster.conflicts().await;
}

#[tokio::test]
async fn a_row_that_moves_while_it_is_updated_keeps_both_writes() {
    let cluster = with_a_row([15, 15]).await;
    cluster
        .apart(&[
            (0, "update item set id = 2, v = 'moved'"),
            (1, "update item set v = 'updated'"),
        ])
        .await;
    // A move is a delete of the old key and a put of the new; the update is later than the delete.
    cluster.expect(ALL, "1=updated 2=moved").await;
    assert_eq!(cluster.conflicts().await.len(), 1);
}

#[tokio::test]
async fn rows_may_swap_their_keys() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster
        .run(0, "insert into item values (1, 'a'), (2, 'b'), (3, 'c')")
        .await;
    cluster.converge().await;
    let swap = "begin; update item set id = -1 where id = 1; update item set id = 1 where id = 2; \
                update item set id = 2 where id = -1; commit";
    cluster.run(1, swap).await;
    cluster.converge().await;
    cluster.expect(ALL, "1=b 2=a 3=c").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn an_insert_and_its_update_elsewhere_reach_the_third_in_either_order() {
    // The line that is late at the third node: the insert's, then the update's.
    for late in [0, 1] {
        let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).start().await;
        cluster.partition(&[late], &[2]);
        cluster.run(0, "insert into item values (1, 'inserted')").await;
        cluster.wait_value(1, "select v from item", "inserted").await;
        cluster.run(1, "update item set v = 'updated'").await;
        cluster.heal();
        cluster.converge().await;
        cluster.expect(ALL, "1=updated").await;
        cluster.expect_no_conflict().await;
    }
}

#[tokio::test]
async fn of_three_writes_apart_two_are_logged_on_every_node() {
    for versions in [[15, 15, 15], [18, 15, 18]] {
        let cluster = with_a_row(versions).await;
        cluster
            .apart(&[
                (2, "update item set v = 'first'"),
                (0, "update item set v = 'second'"),
                (1, "update item set v = 'third'"),
            ])
            .await;
        cluster.expect(ALL, "1=third").await;
        let log = cluster.conflicts().await;
        assert_eq!(log.len(), 2, "{log:#?}");
        expect_logged(&log, "first");
        expect_logged(&log, "second");
    }
}

#[tokio::test]
async fn a_write_that_saw_the_other_is_no_conflict() {
    let cluster = with_a_row([15, 15, 15]).await;
    for round in 0..12 {
        let node = round % 3;
        cluster
            .run(node, &format!("update item set v = 'round {round}'"))
            .await;
        let next = (node + 1) % 3;
        cluster
            .wait_value(next, "select v from item", &format!("round {round}"))
            .await;
    }
    cluster.converge().await;
    cluster.expect(ALL, "1=round 11").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn two_updates_of_a_row_in_one_transaction_are_no_conflict() {
    let cluster = with_a_row([15, 15, 18]).await;
    for node in cluster.all() {
        cluster
            .run(
                node,
                "begin; update item set v = 'once'; update item set v = v || ', twice'; commit",
            )
            .await;
        cluster.converge().await;
    }
    cluster.expect(ALL, "1=once, twice").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn freezing_the_table_between_writes_changes_nothing() {
    let cluster = with_a_row([15, 15]).await;
    for node in cluster.all() {
        cluster.admin(node).await.run("vacuum freeze item").await;
    }
    cluster.run(0, "update item set v = 'after freezing'").await;
    cluster.converge().await;
    cluster.expect(ALL, "1=after freezing").await;
    cluster.expect_no_conflict().await;

    // And a real conflict is still found when the rows were frozen while the nodes were apart.
    cluster.isolate_all();
    cluster.run(0, "update item set v = 'earlier'").await;
    cluster.run(1, "update item set v = 'later'").await;
    for node in cluster.all() {
        cluster.admin(node).await.run("vacuum freeze item").await;
    }
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "1=later").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    expect_logged(&log, "earlier");
}

#[tokio::test]
async fn equal_rows_from_a_dump_are_no_conflict() {
    let mut cluster = Cluster::of([15, 15, 18])
        .schema(ITEMS)
        .without_daemons()
        .start()
        .await;
    // Filled behind the daemons' back, as a restored dump does: the same rows, each with its own xmin.
    let fill = "insert into item select i, 'from the dump' from generate_series(1, 100) i";
    cluster.run(0, fill).await;
    let dump = cluster.dir().join("item.sql");
    let mut pg_dump = cluster.nodes[0].server.client("pg_dump", "app");
    pg_dump
        .args(["--data-only", "--table=item"])
        .stdout(std::fs::File::create(&dump).expect("create the dump"));
    anabranch_tests::process::run(&mut pg_dump);
    for node in [1, 2] {
        let mut psql = cluster.nodes[node].server.client("psql", "app");
        anabranch_tests::process::run(psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-f"]).arg(&dump));
    }
    // Set up only now, so that the dump's own inserts are before everything.
    for node in &cluster.nodes {
        let admin = node.server.dsn("postgres", "app");
        anabranch_tests::daemon::anabranch_ok(&[
            "remove",
            "--config",
            node.daemon.config_arg(),
            "--admin-dsn",
            &admin,
            "--yes",
        ])
        .await;
        anabranch_tests::cluster::initialise(node).await;
    }
    cluster.start_daemons();
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!("update item set v = 'by n{}' where id % 3 = {node}", node + 1),
            )
            .await;
    }
    cluster.converge().await;
    cluster
        .expect("select count(*) from item where v like 'by n%'", "100")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn writes_with_equal_times_are_ordered_by_their_node() {
    // Both clocks stand still at one moment, so stamps differ only by counting and by node.
    let noon_s = 1_780_315_200;
    let cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .schema("create table lead (id uuid primary key)")
        .stopped_clock(0, noon_s)
        .stopped_clock(1, noon_s)
        // However long ago that is: the daemons go by the time of today, and would remove lines of then.
        .config("[conflict_log]\nretention_days = 36500\n")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into item select i, 'base' from generate_series(1, 100) i",
        )
        .await;
    cluster.converge().await;
    let mut lead = [0_u64, 0];
    for round in 0..20 {
        cluster.isolate_all();
        for node in cluster.all() {
            let session = cluster.session(node).await;
            // Commits that bring this node's counter up to the other's.
            for _ in 0..lead[node] {
                session.run("insert into lead values (gen_random_uuid())").await;
            }
            for id in 1..=100 {
                session
                    .run(&format!(
                        "update item set v = 'n{} round {round};' where id = {id}",
                        node + 1
                    ))
                    .await;
            }
        }
        cluster.heal();
        cluster.converge().await;
        let log = cluster.conflicts().await;
        let of_round: Vec<_> = log
            .iter()
            .filter(|line| line.everything().contains(&format!(" round {round};")))
            .collect();
        assert_eq!(
            of_round.len(),
            100,
            "every row was written twice in round {round}: {of_round:#?}"
        );
        for line in &of_round {
            let [one, two] = times_by_node(line);
            if one == two {
                // The higher node id wins a tie.
                assert_eq!(line.applied()["v"], format!("n2 round {round};"), "{line:#?}");
                return;
            }
            lead = [two.saturating_sub(one).min(90), one.saturating_sub(two).min(90)];
        }
    }
    panic!("in twenty rounds no two writes of a row had equal times");
}

/// Times of the stamps of a conflict between nodes 1 and 2, in the order of the nodes.
fn times_by_node(line: &Conflict) -> [u64; 2] {
    let mut times = [0, 0];
    for side in ["local_stamp", "remote_stamp"] {
        let (time, node) = line.0[side]
            .as_str()
            .and_then(|text| text.split_once('.'))
            .expect("time.node");
        let node: usize = node.parse().expect("a node id");
        times[node - 1] = u64::from_str_radix(time, 16).expect("hexadecimal");
    }
    times
}

#[tokio::test]
async fn a_line_of_the_log_tells_who_what_when_and_why() {
    let cluster = with_a_row([15, 15]).await;
    cluster
        .apart(&[
            (0, "update item set v = 'earlier'"),
            (1, "update item set v = 'later'"),
        ])
        .await;
    for node in cluster.all() {
        let line = &cluster.conflicts_at(node).await[0].0;
        for (column, value) in line.as_object().expect("an object") {
            // Nothing but these may be unknown for two updates that nobody has reviewed.
            if ![
                "error",
                "constraint_name",
                "redacted_columns",
                "reviewed_by",
                "reviewed_at",
                "note",
            ]
            .contains(&column.as_str())
            {
                assert_ne!(
                    value,
                    &Value::Null,
                    "{column} is empty at n{}: {line:#}",
                    node + 1
                );
            }
        }
        assert_eq!(line["schema_name"], "public");
        assert_eq!(line["table_name"], "item");
        assert_eq!(line["policy"], "last_update_wins");
    }
}

#[tokio::test]
async fn conflicts_are_listed_filtered_and_shown() {
    use anabranch_tests::daemon::anabranch_ok;
    let cluster = with_a_row([15, 15]).await;
    cluster
        .apart(&[
            (0, "update item set v = 'earlier'"),
            (1, "update item set v = 'later'"),
        ])
        .await;
    let config = cluster.nodes[0].daemon.config_arg();
    let all = anabranch_ok(&["conflicts", "list", "--config", config, "--output", "json"]).await;
    let all: Value = serde_json::from_str(&all).expect("JSON");
    let lines = all.as_array().expect("a list");
    assert_eq!(lines.len(), 1, "{all:#}");
    let id = lines[0]["conflict_id"].as_str().expect("an id");
    let shown = anabranch_ok(&["conflicts", "show", id, "--config", config, "--output", "json"]).await;
    assert!(shown.contains("earlier") && shown.contains("later"), "{shown}");
    for (filter, value, count) in [
        ("--table", "public.item", 1),
        ("--table", "public.other", 0),
        ("--type", "update_origin_differs", 1),
        ("--type", "insert_exists", 0),
    ] {
        let found = anabranch_ok(&[
            "conflicts",
            "list",
            "--config",
            config,
            "--output",
            "json",
            filter,
            value,
        ])
        .await;
        let found: Value = serde_json::from_str(&found).expect("JSON");
        assert_eq!(
            found.as_array().map(Vec::len),
            Some(count),
            "{filter} {value}: {found:#}"
        );
    }
    until("the human form shows it too", async || {
        anabranch_ok(&["conflicts", "list", "--config", config])
            .await
            .contains("update_origin_differs")
    })
    .await;
}
