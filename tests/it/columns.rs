//! Columns that are merged: counters add up, the highest stays highest, and nobody's column is lost to another's.

use std::cell::Cell;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{PATIENCE, until};

use crate::journals::segments;

const SCHEMA: &str = "create table account (id int primary key, owner text not null default '', \
        balance numeric(12,2) not null default 0, visits int not null default 0, best int not null default 0, \
        least bigint not null default 0);
    create table person (id int primary key, name text, city text, note text);
    create table tiny (id int primary key, n smallint not null, t text)";

const POLICY: &str = r#"
    [[table]]
    name = "public.account"
    [table.columns]
    balance = "delta"
    visits = "delta"
    best = "max"
    least = "min"
    [[table]]
    name = "public.person"
    policy = "column_merge"
    [[table]]
    name = "public.tiny"
    policy = "column_merge"
    columns = { n = "delta" }
"#;

/// Three nodes, each with one row of every table.
async fn start() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .policy(POLICY)
        .start()
        .await;
    cluster
        .run(0, "insert into account values (1, 'ann', 100.00, 0, 10, 10)")
        .await;
    cluster
        .run(0, "insert into person values (1, 'ann', 'rome', 'none')")
        .await;
    cluster.run(0, "insert into tiny values (1, 32000, 'x')").await;
    cluster.converge().await;
    cluster
}

const ACCOUNT: &str = "select coalesce(string_agg(concat_ws(' ', id, owner, balance, visits, best, least), ', ' order by id), 'none') \
     from account";
const PERSON: &str =
    "select coalesce(string_agg(concat_ws(' ', id, name, city, note), ', ' order by id), 'none') from person";
const TINY: &str = "select string_agg(concat_ws(' ', id, n, t), ', ' order by id) from tiny";

#[tokio::test]
async fn what_each_side_of_a_partition_adds_is_added_once() {
    let cluster = start().await;
    cluster
        .apart(&[
            (
                0,
                "update account set balance = balance + 10.50, visits = visits + 1, best = 12",
            ),
            (
                1,
                "update account set balance = balance - 30.25, visits = visits + 1, best = 40, least = 3",
            ),
            (
                2,
                "update account set balance = balance + 0.01, visits = visits + 1, least = 7",
            ),
            (2, "update account set visits = visits + 1"),
        ])
        .await;
    cluster.expect(ACCOUNT, "1 ann 80.26 4 40 3").await;
    assert_eq!(cluster.conflicts().await.len(), 0, "nothing was lost");
    // Who has seen the value may lower it.
    cluster.run(1, "update account set best = 2, least = 9").await;
    cluster.converge().await;
    cluster.expect(ACCOUNT, "1 ann 80.26 4 2 9").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn what_a_large_transaction_adds_is_added_once() {
    let cluster = start().await;
    cluster
        .run(
            0,
            "insert into account (id, owner) select i, 'owner of account ' || i from generate_series(2, 30000) i",
        )
        .await;
    cluster.converge().await;
    let raise = "update account set balance = balance + 1.50, visits = visits + 1";
    cluster
        .apart(&[
            (0, raise),
            (
                1,
                "update account set visits = visits + 1 where id in (2, 15000, 30000)",
            ),
            (2, raise),
        ])
        .await;
    cluster
        .expect(
            "select concat_ws(' ', count(*), sum(balance), sum(visits)) from account",
            "30000 90100.00 60003",
        )
        .await;
    assert_eq!(cluster.conflicts().await.len(), 0, "nothing was lost");
}

#[tokio::test]
async fn a_row_counted_for_the_first_time_on_both_sides_counts_both() {
    let cluster = start().await;
    let visit = "insert into account (id, visits) values (2, 1) on conflict (id) do update set visits = account.visits + 1";
    cluster
        .apart(&[(0, visit), (1, visit), (2, visit), (2, visit)])
        .await;
    cluster
        .expect("select visits::text from account where id = 2", "4")
        .await;
}

#[tokio::test]
async fn each_column_is_its_own_last_writers() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update person set name = 'anna'"),
            (1, "update person set city = 'oslo'"),
            (2, "update person set city = 'bern', note = 'moved'"),
        ])
        .await;
    cluster.expect(PERSON, "1 anna bern moved").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].0["lost_columns"], serde_json::json!(["city"]), "{log:#?}");
    assert_eq!(log[0].0["conflict_resolution"], "merge", "{log:#?}");
    assert_eq!(log[0].0["policy"], "column_merge", "{log:#?}");
}

#[tokio::test]
async fn what_merging_lost_is_written_again_beside_what_it_kept() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update person set name = 'anna', city = 'oslo'"),
            (1, "update person set city = 'bern'"),
        ])
        .await;
    cluster.expect(PERSON, "1 anna bern none").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            let row = serde_json::json!({ "id": 1, "name": "anna", "city": "bern", "note": "none" });
            assert_eq!(*line.applied(), row, "n{}: {line:#?}", node + 1);
        }
    }
    let id = log[0].0["conflict_id"].as_str().expect("an id");
    let config = cluster.nodes[2].daemon.config_arg();
    anabranch_ok(&["conflicts", "--config", config, "replay", id]).await;
    cluster.converge().await;
    cluster.expect(PERSON, "1 anna oslo none").await;
}

#[tokio::test]
async fn a_delete_and_updates_apart_end_alike() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update person set name = 'earlier'"),
            (1, "delete from person"),
            (2, "update person set note = 'later'"),
            (0, "delete from account"),
            (1, "update account set visits = visits + 5"),
            (2, "update account set visits = visits + 7"),
        ])
        .await;
    // The last write is above the delete, and brings the row back as it knew it.
    cluster.expect(PERSON, "1 ann rome later").await;
    cluster.expect(ACCOUNT, "1 ann 100.00 12 10 10").await;
    let log = cluster.conflicts().await;
    assert!(
        log.iter().any(|line| line.everything().contains("earlier")),
        "{log:#?}"
    );
    // A delete that is above them all removes it.
    cluster
        .apart(&[
            (0, "update account set visits = visits + 1"),
            (1, "update account set visits = visits + 1"),
            (2, "delete from account"),
        ])
        .await;
    cluster.expect(ACCOUNT, "none").await;
}

#[tokio::test]
async fn a_sum_that_its_column_cannot_hold_leaves_one_out_everywhere() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update tiny set n = n + 500"),
            (1, "update tiny set n = n + 600, t = 'kept'"),
            (2, "update tiny set n = n + 7"),
        ])
        .await;
    cluster.expect(TINY, "1 32507 kept").await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].0["error"]["sqlstate"], "22003", "{log:#?}");
    // It lost to the one that left no room for it, not to what came later; also where it is the last.
    cluster
        .apart(&[
            (0, "update tiny set n = 32700"),
            (0, "insert into tiny values (2, 32000, 'two')"),
        ])
        .await;
    cluster
        .apart(&[
            (0, "update tiny set n = n + 500 where id = 2"),
            (1, "update tiny set n = n + 600 where id = 2"),
        ])
        .await;
    cluster.expect(TINY, "1 32700 kept, 2 32500 two").await;
    assert_eq!(cluster.conflicts().await.len(), 2);
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            let origins = ["remote_origin", "local_origin"].map(|side| line.0[side].as_i64());
            assert_eq!(origins, [Some(2), Some(1)], "n{}: {line:#?}", node + 1);
            let id = line.0["conflict_id"].as_str().expect("an id");
            let config = cluster.nodes[node].daemon.config_arg();
            let said = anabranch_ok(&["conflicts", "--config", config, "explain", id]).await;
            assert!(
                said.contains("out of its range") && !said.contains("the time decides"),
                "{said}"
            );
        }
    }
}

#[tokio::test]
async fn what_a_counter_or_a_greatest_value_lost_is_written_again_by_force_alone() {
    let cluster = start().await;
    cluster
        .apart(&[
            (0, "update tiny set n = n + 500"),
            (1, "update tiny set n = n + 600, t = 'kept'"),
            (2, "update tiny set n = n + 7"),
            (0, "update account set best = 4, owner = 'earlier'"),
            (1, "update account set best = 40, owner = 'later'"),
        ])
        .await;
    let (tiny, account) = ("1 32507 kept", "1 later 100.00 0 40 10");
    cluster.expect(TINY, tiny).await;
    cluster.expect(ACCOUNT, account).await;
    let log = cluster.conflicts().await;
    let id = |table: &str| {
        let found = log.iter().find(|line| line.0["table_name"] == table);
        let found = found.unwrap_or_else(|| panic!("no line of {table} in {log:#?}"));
        found.0["conflict_id"].as_str().expect("an id")
    };
    let config = cluster.nodes[2].daemon.config_arg();
    for (table, parts) in [
        ("tiny", &["column(s) n (delta)", "--force"][..]),
        (
            "account",
            &["column(s) best (max)", "--columns owner writes the others"],
        ),
    ] {
        let said = anabranch_refuses(&["conflicts", "--config", config, "replay", id(table)]).await;
        for part in parts {
            assert!(said.contains(part), "`{part}` is not in {said}");
        }
    }
    let alone = ["replay", id("account"), "--columns", "owner"];
    anabranch_ok(&[&["conflicts", "--config", config], &alone[..]].concat()).await;
    cluster.converge().await;
    cluster.expect(TINY, tiny).await;
    cluster.expect(ACCOUNT, "1 earlier 100.00 0 40 10").await;
    let forced = ["replay", id("tiny"), "--force"];
    anabranch_ok(&[&["conflicts", "--config", config], &forced[..]].concat()).await;
    cluster.converge().await;
    cluster.expect(TINY, "1 32600 kept").await;
}

/// A write whose line is there loses a column more while the log takes no more lines: it is no other losing write.
#[tokio::test]
async fn a_write_that_has_a_line_is_not_counted_when_it_loses_more_in_a_storm() {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .policy(POLICY)
        .config("[conflict_log]\nlines_per_second = 4\nburst_lines = 100")
        .start()
        .await;
    let rows = "insert into person select n, 'base', 'base', 'base' from generate_series(1, 3000) n";
    cluster.run(0, rows).await;
    cluster.converge().await;
    cluster.isolate_all();
    cluster
        .run(0, "update person set name = 'first', city = 'first' where id = 1")
        .await;
    cluster
        .run(0, "update person set note = 'first' where id > 1")
        .await;
    cluster
        .run(1, "update person set name = 'second' where id = 1")
        .await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    let lines = "select string_agg(array_to_string(lost_columns, ' '), ', ') from anabranch.conflict_history where key = '{\"id\": 1}'";
    for node in [0, 1] {
        cluster.wait_value(node, lines, "name").await;
    }
    cluster
        .run(2, "update person set note = 'third' where id > 1")
        .await;
    cluster
        .run(2, "update person set name = 'third', city = 'third' where id = 1")
        .await;
    // What is decoded before anything comes in is told once.
    cluster.journalled(2).await;
    cluster.heal();
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(distinct concat_ws(' ', name, city, note), ', ') from person where id < 3",
            "base base third, third third base",
        )
        .await;
    // The first's writes, and the second's.
    let all = "(select count(*) from anabranch.conflict_history) + (select sum(count) from anabranch.conflict_storm)";
    for node in [0, 1] {
        cluster.wait_value(node, &format!("select {all}"), "3001").await;
    }
    // Here the first's meets two, and may have been counted and not have a line when it met the second: none is missing.
    cluster
        .wait_value(2, &format!("select ({all})::int between 3001 and 3002"), "t")
        .await;
    let of_first = "select array(select unnest(lost_columns) order by 1)::text from anabranch.conflict_history \
                    where key = '{\"id\": 1}' and lost_columns @> '{city}'";
    for node in [0, 1] {
        cluster.wait_value(node, of_first, "{city,name}").await;
    }
}

const GROUPED: &str = "create table span (id int primary key, low int not null, high int not null, note text, \
        constraint in_order check (low <= high))";
const GROUPS: &str =
    "[[table]]\nname = \"public.span\"\npolicy = \"column_merge\"\ngroups = [[\"low\", \"high\"]]\n";
const SPAN: &str = "select string_agg(concat_ws(' ', id, low, high, note), ', ' order by id) from span";

#[tokio::test]
async fn columns_under_one_check_are_one_writers() {
    let cluster = Cluster::of([15, 18, 15])
        .schema(GROUPED)
        .policy(GROUPS)
        .start()
        .await;
    cluster
        .run(0, "insert into span values (1, 10, 20, 'x'), (2, 10, 20, 'x')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update span set low = 19 where id = 1"),
            (1, "update span set high = 11 where id = 1"),
            (2, "update span set note = 'kept' where id = 1"),
            (0, "update span set high = 12, note = 'lost' where id = 2"),
            (1, "update span set low = 15, note = 'later' where id = 2"),
        ])
        .await;
    cluster.expect(SPAN, "1 10 11 kept, 2 15 20 later").await;
    cluster
        .expect("select count(*) from anabranch.quarantine", "0")
        .await;
    let mut lost: Vec<String> = cluster
        .conflicts()
        .await
        .iter()
        .map(|line| {
            assert_eq!(line.resolution(), "merge", "{line:#?}");
            assert_eq!(line.0["policy"], "column_merge, groups (high low)", "{line:#?}");
            format!("{} {}", line.key()["id"], line.0["lost_columns"])
        })
        .collect();
    lost.sort();
    assert_eq!(lost, ["1 [\"low\"]", "2 [\"high\",\"note\"]"]);
}

#[tokio::test]
async fn constraints_over_columns_that_are_merged_apart_are_refused_with_the_groups_to_write() {
    let schema = "create table area (zip text, street text, primary key (zip, street));
        create table house (id int primary key, zip text, street text, number int, letter text, floors int, most int, a int, b int,
            sum int generated always as (a + b) stored, solo int unique check (solo > 0),
            constraint at foreign key (zip, street) references area,
            constraint storeys check (floors < most), constraint total check (sum < 100), unique (id, letter),
            constraint by_id check (id < a));
        create unique index house_door on house (number, lower(letter)) include (solo)";
    let rule = |rest: &str| {
        let named = "[[table]]\nname = \"public.house\"\nunique_keys = \"pairwise\"";
        format!("{named}\npolicy = \"column_merge\"\n{rest}")
    };
    let mut cluster = Cluster::of([15, 18])
        .schema(schema)
        .policy(&rule(""))
        .without_daemons()
        .start()
        .await;
    let path = cluster.nodes[0].data_dir.with_file_name("policy.toml");
    let ruled = rule("groups = [[\"a\", \"b\"]]\ncolumns = { most = \"max\" }\n");
    for (policy, parts) in [
        (
            rule(""),
            &[
                "foreign key \"at\" is over columns that are merged each by itself",
                "CHECK \"storeys\" is over",
                "CHECK \"total\" is over columns that are merged each by itself, so rows that keep it can be merged into one that \
                 breaks it: a, b",
                "unique key \"house_door\" is over",
                r#"write groups = [["a","b"],["floors","most"],["letter","number"],["street","zip"]] into the table's rule"#,
            ][..],
        ),
        (
            ruled,
            &[
                "column `most` is merged by max, and CHECK \"storeys\" is over it and `floors`",
                r#"write groups = [["a","b"],["letter","number"],["street","zip"]] into the table's rule"#,
            ],
        ),
    ] {
        std::fs::write(&path, policy).expect("write the policy");
        let daemon = &mut cluster.nodes[0].daemon;
        let said = anabranch(&["doctor", "--config", daemon.config_arg()]).await;
        assert!(!said.status.success());
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        daemon.start();
        assert!(!daemon.wait_exit(PATIENCE).expect("it ends").success());
        for text in [said, daemon.log()] {
            for part in parts {
                assert!(text.contains(part), "`{part}` is not in {text}");
            }
            for part in [
                "by_id",
                "house_solo_check",
                "house_solo_key\" is",
                "house_id_letter",
            ] {
                assert!(!text.contains(part), "`{part}` is in {text}");
            }
        }
    }
    let groups = r#"[["floors", "most"], ["letter", "number"], ["street", "zip"], ["b", "a"]]"#;
    for node in &cluster.nodes {
        let path = node.data_dir.with_file_name("policy.toml");
        std::fs::write(path, rule(&format!("groups = {groups}\n"))).expect("write the policy");
    }
    cluster.start_daemons();
    cluster.converge().await;
}

#[tokio::test]
async fn a_check_that_comes_later_is_refused_or_alarmed_and_the_policy_can_follow() {
    let merge = "[[table]]\nname = \"public.span\"\npolicy = \"column_merge\"\n";
    let mut cluster = Cluster::of([15, 15])
        .schema("create table span (id int primary key, low int not null, high int not null, note text)")
        .config("[ddl]\nroles = [\"app\"]\n")
        .policy(merge)
        .start()
        .await;
    cluster.run(0, "insert into span values (1, 10, 20, 'x')").await;
    cluster.converge().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let check = "alter table span add constraint in_order check (low <= high)";
    let refused = anabranch_refuses(&["ddl", "--config", &config, check]).await;
    for part in [
        "nothing was changed",
        "CHECK \"in_order\"",
        r#"write groups = [["high","low"]]"#,
    ] {
        assert!(refused.contains(part), "`{part}` is not in {refused}");
    }
    let alone = "alter table span add constraint positive check (low > 0)";
    anabranch_ok(&["ddl", "--config", &config, alone]).await;
    // By a function that knows no policy it goes through.
    cluster
        .run(0, &format!("select anabranch.replicate_ddl('{check}')"))
        .await;
    let alarmed = async |cluster: &Cluster, node: usize| {
        let alarms = cluster.status_or_null(node).await["alarms"].to_string();
        alarms.contains("merge_groups") && alarms.contains("in_order")
    };
    for node in cluster.all() {
        until("the constraint is alarmed", async || {
            alarmed(&cluster, node).await
        })
        .await;
    }
    // What the groups are there for: each merged by itself.
    cluster.isolate_all();
    cluster.run(0, "update span set low = 19").await;
    cluster.run(1, "update span set high = 11").await;
    cluster.heal();
    for node in cluster.all() {
        cluster
            .wait_value(node, "select count(*) from anabranch.quarantine", "1")
            .await;
    }
    cluster.run(1, "update span set low = 12, high = 13").await;
    cluster.converge().await;
    // A node that is started again goes on, so that the policy can be changed.
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    cluster.start_daemons();
    cluster.converge().await;
    cluster.wait_settled().await;
    for node in &mut cluster.nodes {
        node.daemon.stop();
        let path = node.data_dir.with_file_name("policy.toml");
        std::fs::write(path, GROUPS).expect("write the policy");
    }
    cluster.start_daemons();
    cluster.converge().await;
    cluster
        .apart(&[(0, "update span set low = 13"), (1, "update span set high = 12")])
        .await;
    cluster.expect(SPAN, "1 12 12 x").await;
    for node in cluster.all() {
        assert!(!alarmed(&cluster, node).await);
    }
}

/// Every node adds and removes, all at once, a number of rounds.
async fn count_everywhere(cluster: &Cluster, nodes: &[usize], rounds: usize) {
    let sessions = futures_util::future::join_all(nodes.iter().map(|&node| cluster.session(node))).await;
    let all: Vec<_> = sessions
        .iter()
        .enumerate()
        .map(async |(node, session)| {
            for round in 0..rounds {
                let sql = format!(
                    "update account set visits = visits + 1, balance = balance + {}.01 where id = 1",
                    node + 1
                );
                // A lock that the applier waits for may be refused; that write was not made.
                while session.try_run(&sql).await.is_err() {}
                let _ = session
                    .try_run(&format!("update person set note = '{node}.{round}' where id = 1"))
                    .await;
            }
        })
        .collect();
    futures_util::future::join_all(all).await;
}

#[tokio::test]
async fn counters_that_all_nodes_raise_at_once_add_up() {
    let cluster = start().await;
    count_everywhere(&cluster, &[0, 1, 2], 200).await;
    cluster.converge().await;
    cluster
        .expect("select visits || ' ' || balance from account", "600 1306.00")
        .await;
}

/// Several sessions raise it without a pause, so that one always waits for the row.
#[tokio::test]
async fn a_counter_that_is_raised_all_the_time_keeps_nothing_from_being_applied() {
    let cluster = Cluster::of([15, 18])
        .schema("create table counter (id int primary key, n int not null); create table other (id int primary key)")
        .policy("[[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n")
        .start()
        .await;
    cluster.run(0, "insert into counter values (1, 0)").await;
    cluster.converge().await;
    let sessions = futures_util::future::join_all((0..4).map(|_| cluster.session(0))).await;
    let (raised, ends) = (Cell::new(0), Cell::new(false));
    let raise = sessions.iter().map(async |session| {
        while !ends.get() {
            // A lock that the applier waits for may be refused; that write was not made.
            let done = session.try_run("update counter set n = n + 1 where id = 1").await;
            raised.set(raised.get() + i32::from(done.is_ok()));
        }
    });
    let race = async {
        for round in 1..=20 {
            let sql = format!(
                "begin; update counter set n = n + 1 where id = 1; insert into other values ({round}); commit"
            );
            cluster.run(1, &sql).await;
            cluster
                .wait_value(0, "select count(*) from other", &round.to_string())
                .await;
        }
        ends.set(true);
    };
    tokio::join!(futures_util::future::join_all(raise), race);
    cluster.converge().await;
    let all = (raised.get() + 20).to_string();
    cluster.expect("select n from counter", &all).await;
}

/// Nobody races the row until then, so nobody folds it; and what each write did is more than is kept in memory.
#[tokio::test]
async fn a_counter_that_is_raised_all_the_time_is_raced_once_the_journals_have_let_go_what_it_was() {
    let cluster = Cluster::of([15, 15])
        .schema("create table counter (id int primary key, n int not null, pad text not null)")
        .policy("[[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n")
        .config("[journal]\nsegment_mib = 1\n")
        .start()
        .await;
    let row = "insert into counter select 1, 0, string_agg(md5(i::text), '') from generate_series(1, 3200) i";
    cluster.run(0, row).await;
    cluster.converge().await;
    let session = cluster.session(0).await;
    let (raised, ends) = (Cell::new(0), Cell::new(false));
    let raise = async {
        while !ends.get() {
            // A lock that the applier waits for may be refused; that write was not made.
            let done = session.try_run("update counter set n = n + 1").await;
            raised.set(raised.get() + i32::from(done.is_ok()));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let more = async |count: i32| {
        let upto = raised.get() + count;
        until("the counter is raised", async || raised.get() >= upto).await;
    };
    let race = async {
        more(250).await;
        let newest = cluster.all().into_iter();
        let newest: Vec<_> = newest.filter_map(|node| segments(&cluster, node).pop()).collect();
        assert_eq!(newest.len(), 2);
        until("the journals have let it go", async || {
            let oldest = |node| segments(&cluster, node).into_iter().next();
            let mut nodes = cluster.all().into_iter().zip(&newest);
            nodes.all(|(node, newest)| oldest(node).is_some_and(|oldest| oldest > *newest))
        })
        .await;
        cluster.isolate_all();
        cluster.run(1, "update counter set n = n + 100000").await;
        more(5).await;
        cluster.heal();
        for node in cluster.all() {
            cluster
                .wait_value(node, "select (n > 100000)::text from counter", "true")
                .await;
        }
        more(5).await;
        ends.set(true);
    };
    futures_util::future::join(raise, race).await;
    cluster.converge().await;
    let all = (100_000 + raised.get()).to_string();
    cluster.expect("select n::text from counter", &all).await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn counters_add_up_through_killed_daemons() {
    let mut cluster = start().await;
    for round in 1..4 {
        cluster.isolate_all();
        for node in 0..3 {
            cluster
                .run(node, "update account set visits = visits + 1, best = best + 1")
                .await;
        }
        cluster.kill_daemons();
        for node in 0..3 {
            cluster.run(node, "update account set visits = visits + 10").await;
        }
        cluster.heal();
        cluster.start_daemons();
        cluster.run(1, "update account set visits = visits + 100").await;
        cluster.converge().await;
        cluster
            .expect(
                "select visits || ' ' || best from account",
                &format!("{} {}", round * 133, 10 + round),
            )
            .await;
    }
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_joins_while_counters_are_raised_everywhere() {
    let mut cluster = start().await;
    let node = cluster.add_server(15).await;
    let join = async { cluster.join(node, 0).await };
    futures_util::future::join(count_everywhere(&cluster, &[0, 1, 2], 300), join).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster
        .expect("select visits || ' ' || balance from account", "900 1909.00")
        .await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_joins_with_changes_under_way_that_have_not_met() {
    let mut cluster = start().await;
    cluster.isolate_all();
    for node in 0..3 {
        cluster
            .run(
                node,
                &format!("update account set visits = visits + {}", 10i32.pow(node as u32)),
            )
            .await;
    }
    cluster.set_lines(&[0], &[1], Mode::Pass);
    cluster
        .wait_value(1, "select visits::text from account", "11")
        .await;
    let node = cluster.add_server(15).await;
    cluster.join(node, 1).await;
    cluster.nodes[node].daemon.start();
    cluster
        .wait_value(node, "select visits::text from account", "11")
        .await;
    cluster.heal();
    cluster.wait_writable(node).await;
    cluster.converge().await;
    cluster.expect("select visits::text from account", "111").await;
}

#[tokio::test]
async fn an_increment_with_a_lower_stamp_than_a_change_that_is_tried_again_is_never_written_over() {
    let cluster = Cluster::of([15, 15])
        .schema("create table counter (id int primary key, n int not null)")
        .policy("[[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n")
        .config("[apply]\nlock_timeout_ms = 200\n")
        .clock(1, 5)
        .start()
        .await;
    cluster.run(0, "insert into counter values (1, 0), (2, 0)").await;
    cluster.converge().await;
    // Who writes the first row waits for us; what the second one becomes is written down.
    let holder = cluster.admin(0).await;
    holder
        .run(
            "create schema watch;
             create table watch.seen (at serial, n int);
             create function watch.note() returns trigger language plpgsql security definer as $$
             begin
                 if new.id = 1 then perform pg_advisory_xact_lock_shared(7);
                 else insert into watch.seen (n) values (new.n); end if;
                 return new;
             end $$;
             create trigger note before update on counter for each row execute function watch.note();
             alter table counter enable always trigger note",
        )
        .await;
    holder.run("select pg_advisory_lock(7)").await;
    cluster.run(1, "update counter set n = n + 10").await;
    cluster
        .wait_value(
            0,
            "select count(*) from pg_locks where locktype = 'advisory' and objid = 7 and not granted",
            "1",
        )
        .await;
    cluster.run(0, "update counter set n = n + 1 where id = 2").await;
    // Some tries, each given up for the lock: what was committed meanwhile is below the horizon by the next but one.
    tokio::time::sleep(std::time::Duration::from_millis(2_000)).await;
    holder.run("select pg_advisory_unlock(7)").await;
    for node in cluster.all() {
        let all = "select string_agg(n::text, ',' order by id) from counter";
        cluster.wait_value(node, all, "10,11").await;
    }
    // A write on top of a row without the increment would make that good for all.
    assert_eq!(
        cluster
            .value(0, "select count(*) from watch.seen where n = 10")
            .await,
        "0",
        "the row was without the increment for a moment"
    );
    let fired = "select (count(*) >= 2)::text from watch.seen";
    assert_eq!(cluster.value(0, fired).await, "true", "the trigger did not fire");
}

const QUARANTINED: &str = "select count(*) from anabranch.quarantine";

async fn ddl(cluster: &Cluster, node: usize, statement: &str) {
    let config = cluster.nodes[node].daemon.config_arg();
    anabranch_ok(&["ddl", "--config", config, statement]).await;
}

/// Two nodes with a table that DDL has made after the policy named it, and one row. It has no value to store out of line.
async fn start_counter(config: &str) -> Cluster {
    let cluster = Cluster::of([15, 18])
        .config("[ddl]\nroles = [\"app\"]\n")
        .config(config)
        .policy(
            "[[table]]\nname = \"public.counter\"\npolicy = \"column_merge\"\ncolumns = { n = \"delta\" }\n",
        )
        .start()
        .await;
    let create = "create table counter (id int primary key, n int not null, spare int not null default 7)";
    ddl(&cluster, 0, create).await;
    cluster.run(0, "insert into counter values (1, 100)").await;
    cluster.converge().await;
    cluster
}

async fn wait_alarmed(cluster: &Cluster, node: usize, words: &str) {
    until(&format!("n{} is alarmed: {words}", node + 1), async || {
        let alarms = cluster.status_or_null(node).await["alarms"].to_string();
        alarms.contains("merge_groups") && alarms.contains(words)
    })
    .await;
}

#[tokio::test]
async fn a_table_that_ddl_makes_is_merged_from_its_first_row_on() {
    let cluster = start_counter("").await;
    cluster
        .apart(&[
            (0, "update counter set n = n + 1"),
            (1, "update counter set n = n + 2"),
        ])
        .await;
    cluster.expect("select n::text from counter", "103").await;
    // By hand, which nothing hinders.
    cluster
        .run(1, "alter table counter replica identity default")
        .await;
    wait_alarmed(&cluster, 1, "replica identity is not FULL").await;
}

#[tokio::test]
async fn columns_come_and_go_while_a_row_is_merged() {
    let mut cluster = start_counter("").await;
    // A row as it was before the column came is what is merged into.
    cluster.isolate_all();
    cluster.run(1, "update counter set n = n + 10").await;
    ddl(
        &cluster,
        0,
        "alter table counter add column flag bool not null default false",
    )
    .await;
    cluster.run(0, "update counter set n = n + 5").await;
    cluster.heal();
    cluster.converge().await;
    let row = "select concat_ws(' ', n, spare, flag) from counter";
    cluster.expect(row, "115 7 f").await;
    cluster.expect(QUARANTINED, "0").await;
    // A write from before a column went, and one from after it.
    cluster.isolate_all();
    ddl(&cluster, 1, "alter table counter drop column spare").await;
    cluster.run(0, "update counter set n = n + 1").await;
    cluster.run(1, "update counter set n = n + 2").await;
    cluster.heal();
    for node in cluster.all() {
        cluster.wait_value(node, QUARANTINED, "1").await;
    }
    cluster.run(0, "update counter set n = 200").await;
    cluster.converge().await;
    cluster
        .expect("select concat_ws(' ', n, flag) from counter", "200 f")
        .await;
    for node in cluster.all() {
        cluster.wait_value(node, QUARANTINED, "0").await;
        let log = cluster.nodes[node].daemon.log();
        assert!(!log.contains("applying is stuck"), "{log}");
    }
    // One that the policy names.
    let drop = "alter table counter drop column n";
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let refused = anabranch_refuses(&["ddl", "--config", &config, drop]).await;
    for part in ["nothing was changed", "has no column `n`"] {
        assert!(refused.contains(part), "`{part}` is not in {refused}");
    }
    cluster
        .run(0, &format!("select anabranch.replicate_ddl('{drop}')"))
        .await;
    for node in cluster.all() {
        wait_alarmed(&cluster, node, "has no column `n`").await;
    }
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    cluster.start_daemons();
    cluster.run(1, "insert into counter values (2, true)").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_column_with_a_rule_is_given_no_other_type_and_one_that_is_all_the_same_adds_up() {
    let mut cluster = start_counter("[apply]\nquarantine_retry_ms = 300\n").await;
    // They look at once, and then every ten seconds: the type as it is is to be known.
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    cluster.start_daemons();
    cluster.converge().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let wider = "alter table counter alter column n type bigint";
    let refused = anabranch_refuses(&["ddl", "--config", &config, wider]).await;
    let words = "column `n` is merged by delta, and is of type bigint where it was integer";
    for part in [
        "nothing was changed",
        words,
        "take its rule out of the policy for as long",
    ] {
        assert!(refused.contains(part), "`{part}` is not in {refused}");
    }
    ddl(&cluster, 0, "alter table counter alter column spare type bigint").await;
    cluster.converge().await;
    // By a function that knows no policy it goes through.
    cluster.isolate_all();
    cluster.run(1, "update counter set n = n + 2").await;
    cluster
        .run(0, &format!("select anabranch.replicate_ddl('{wider}')"))
        .await;
    cluster
        .run(0, "update counter set n = n + 4000000000 where id = 1")
        .await;
    cluster.heal();
    for node in cluster.all() {
        cluster
            .wait_value(node, "select n::text from counter", "4000000102")
            .await;
        cluster.wait_value(node, QUARANTINED, "0").await;
        wait_alarmed(&cluster, node, words).await;
    }
    cluster.run(1, "update counter set n = n + 1").await;
    cluster.converge().await;
    cluster.expect("select n::text from counter", "4000000103").await;
}

#[tokio::test]
async fn a_merged_row_that_waits_for_a_column_is_written_whole() {
    let cluster = start_counter("[apply]\nquarantine_retry_ms = 300\n").await;
    cluster.run(0, "alter table counter add column extra int").await;
    cluster.isolate_all();
    cluster.run(0, "update counter set n = n + 10").await;
    cluster.run(1, "update counter set n = n + 1").await;
    cluster.heal();
    cluster.wait_value(0, "select n::text from counter", "111").await;
    cluster.wait_value(1, QUARANTINED, "1").await;
    // Nobody knows any more what it was merged of.
    cluster.wait_settled().await;
    cluster.run(1, "alter table counter add column extra int").await;
    cluster.wait_value(1, "select n::text from counter", "111").await;
    cluster.wait_value(1, QUARANTINED, "0").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_version_that_lost_to_two_others_has_one_line_with_all_that_it_lost() {
    let cluster = start().await;
    cluster.isolate_all();
    cluster
        .run(0, "update person set name = 'lost', city = 'lost'")
        .await;
    cluster.run(1, "update person set name = 'anna'").await;
    cluster.run(2, "update person set city = 'bern'").await;
    // One after the other, and not in the same order at all nodes.
    let lost = "select string_agg(array_to_string(lost_columns, ' '), ', ') from anabranch.conflict_history";
    cluster.set_lines(&[0], &[1], Mode::Pass);
    cluster.wait_value(0, lost, "name").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(PERSON, "1 anna bern none").await;
    for node in cluster.all() {
        let columns =
            "select string_agg(c, ' ' order by c) from anabranch.conflict_history, unnest(lost_columns) c";
        cluster.wait_value(node, columns, "city name").await;
        let lines = "select count(*) from anabranch.conflict_history";
        assert_eq!(cluster.value(node, lines).await, "1", "n{}", node + 1);
    }
}

/// Published, since the server refuses updates otherwise; and computed by each node from what the others send.
#[tokio::test]
async fn a_generated_column_is_of_no_writer() {
    let cluster = Cluster::of([18, 18])
        .schema(
            "create table line (id int primary key, qty int not null, price int not null, note text,
                 total int generated always as (qty * price) stored);
             create table counted (id int primary key, qty int not null, price int not null, note text,
                 total int generated always as (qty * price) stored)",
        )
        .policy(
            "[[table]]\nname = \"public.line\"\npolicy = \"column_merge\"\n\
             [[table]]\nname = \"public.counted\"\n[table.columns]\nqty = \"delta\"\n",
        )
        .start()
        .await;
    let published = "select pubgencols::text from pg_publication where pubname = 'anabranch'";
    cluster.expect(published, "s").await;
    cluster
        .run(0, "insert into line values (1, 2, 10, 'old'), (2, 2, 10, 'old')")
        .await;
    cluster
        .run(0, "insert into counted values (1, 2, 10, 'old')")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update line set qty = 3 where id = 1"),
            (0, "update counted set note = 'new'"),
            // The total alone is no write of the columns without a rule.
            (1, "update counted set qty = qty + 5"),
            (1, "update line set price = 20 where id = 1"),
        ])
        .await;
    let rows = |table: &str| {
        format!(
            "select string_agg(concat_ws(' ', id, qty, price, note, total), ', ' order by id) from {table}"
        )
    };
    cluster
        .expect(&rows("line"), "1 3 20 old 60, 2 2 10 old 20")
        .await;
    cluster.expect(&rows("counted"), "1 7 10 new 70").await;
    cluster.expect_no_conflict().await;
    cluster
        .apart(&[
            (0, "update line set price = 30 where id = 2"),
            (1, "update line set price = 40 where id = 2"),
        ])
        .await;
    cluster
        .expect(&rows("line"), "1 3 20 old 60, 2 2 40 old 80")
        .await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    assert_eq!(log[0].0["lost_columns"], serde_json::json!(["price"]), "{log:#?}");
    assert_eq!(log[0].applied()["price"], 40, "{log:#?}");

    // A column that is made, and rows that are written, by one transaction.
    let alter = "alter table line add column sum int generated always as (qty + price) stored";
    cluster.run(1, alter).await;
    cluster
        .run(
            0,
            &format!("begin; {alter}; update line set note = 'summed'; commit"),
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update line set qty = 9 where id = 1"),
            (1, "update line set price = 50 where id = 1"),
        ])
        .await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, sum, note), ', ' order by id) from line",
            "1 59 summed, 2 42 summed",
        )
        .await;
    assert_eq!(cluster.conflicts().await.len(), 1);
}
