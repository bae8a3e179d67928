//! Foreign keys between writers that do not see each other: a row that is left without its parent is in the log of every
//! node under one id, whatever came first where; and nothing is where every row has its parent.

use std::time::{Duration, Instant};

use anabranch_tests::Cluster;
use anabranch_tests::conflicts::Conflict;
use anabranch_tests::daemon::anabranch_ok;
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{PATIENCE, until, until_ok};
use serde_json::json;

use crate::drops::wait_parted;

const SCHEMA: &str = "create table parent (id int primary key, code text unique);
    create table child (id int primary key, parent int references parent, v text);
    create index on child (parent)";

const CHILDREN: &str =
    "select coalesce(string_agg(concat_ws(':', id, parent), ' ' order by id), 'none') from child";
const LINES: &str = "select coalesce(string_agg(table_name || ':' || (key->>'id'), ' ' order by table_name, key->>'id'), 'none') \
    from anabranch.conflict_history where conflict_type = 'foreign_key_missing'";

async fn start(more: &str) -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .schema(more)
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into parent values (1, 'a'), (2, 'b'), (3, 'c'); insert into child values (1, 1)",
        )
        .await;
    cluster.converge().await;
    cluster
}

/// All lines are of rows without their parents, the same at every node, of these rows.
async fn expect_lines(cluster: &Cluster, rows: &str) -> Vec<Conflict> {
    for node in cluster.all() {
        cluster.wait_value(node, LINES, rows).await;
    }
    let log = cluster.conflicts().await;
    let other = log.iter().find(|line| line.kind() != "foreign_key_missing");
    assert!(other.is_none(), "{other:#?}");
    log
}

#[tokio::test]
async fn a_child_whose_parent_is_deleted_unseen_is_in_every_log() {
    let cluster = start("").await;
    cluster
        .apart(&[
            (0, "delete from parent where id = 2"),
            (1, "insert into child values (10, 2, 'here')"),
        ])
        .await;
    cluster.expect(CHILDREN, "1:1 10:2").await;
    expect_lines(&cluster, "child:10").await;
    for node in cluster.all() {
        let line = &cluster.conflicts_at(node).await[0];
        assert_eq!(line.resolution(), "keep");
        assert_eq!(line.0["constraint_name"], "child_parent_fkey");
        assert_eq!(line.0["error"]["sqlstate"], "23503");
        assert_eq!(
            line.0["error"]["detail"],
            "Key (parent)=(2) is not present in table public.parent."
        );
        assert_eq!(*line.key(), json!({"id": 10}));
        let row = json!({"id": 10, "parent": 2, "v": "here"});
        assert_eq!(*line.applied(), row);
        // Who wrote the row, and who deleted its parent.
        let (child, parent) = match node {
            0 => ("remote", "local"),
            1 => ("local", "remote"),
            _ if line.0["loser"] == "local" => ("local", "remote"),
            _ => ("remote", "local"),
        };
        assert_eq!(line.0["loser"], child, "{line:#?}");
        assert_eq!(line.0[format!("{child}_tuple")], row);
        assert_eq!(line.0[format!("{child}_origin")], 2);
        assert_eq!(line.0[format!("{parent}_origin")], 1);
        assert_eq!(line.0[format!("{parent}_tuple")], json!(null));
    }
    // Who changes an orphan knows of it; who brings the parent back mends it.
    cluster.run(2, "update child set v = 'known' where id = 10").await;
    cluster.converge().await;
    cluster.run(0, "insert into parent values (2, 'again')").await;
    cluster.converge().await;
    expect_lines(&cluster, "child:10").await;
}

#[tokio::test]
async fn a_child_is_whole_in_its_line_and_comes_back_with_the_null_of_json() {
    let cluster = start(
        "alter table child add column doc jsonb, add column twice int generated always as (id * 2) stored",
    )
    .await;
    cluster
        .apart(&[
            (0, "delete from parent where id = 2"),
            (
                1,
                "insert into child (id, parent, v, doc) values (10, 2, 'here', 'null')",
            ),
        ])
        .await;
    expect_lines(&cluster, "child:10").await;
    for node in cluster.all() {
        let line = &cluster.conflicts_at(node).await[0];
        let row = line.applied();
        assert_eq!((&row["v"], &row["parent"]), (&json!("here"), &json!(2)));
        assert_eq!(row["doc"]["unread_text"], "null", "{line:#?}");
        assert_eq!(row.get("twice"), None, "{line:#?}");
    }
    cluster
        .run(
            0,
            "delete from child where id = 10; insert into parent values (2, 'again')",
        )
        .await;
    cluster.converge().await;
    let id = cluster
        .value(0, "select conflict_id from anabranch.conflict_history")
        .await;
    let config = cluster.nodes[0].daemon.config_arg();
    anabranch_ok(&["conflicts", "replay", &id, "--force", "--config", config]).await;
    cluster.converge().await;
    cluster
        .expect(
            "select v || ' ' || jsonb_typeof(doc) from child where id = 10",
            "here null",
        )
        .await;
}

/// Node 3 hears of the deletion first, or of the child, and its daemon is killed in between.
async fn third(first: usize) {
    let mut cluster = start("").await;
    cluster.isolate_all();
    cluster.run(0, "delete from parent where id = 2").await;
    cluster.run(1, "insert into child values (10, 2)").await;
    cluster.set_lines(&[first], &[2], Mode::Pass);
    let (sql, told) = match first {
        0 => ("select count(*) from parent", "2"),
        _ => ("select count(*) from child", "2"),
    };
    cluster.wait_value(2, sql, told).await;
    cluster.wait_value(2, LINES, "none").await;
    for node in &mut cluster.nodes {
        node.daemon.kill();
        node.daemon.start();
    }
    cluster.heal();
    cluster.converge().await;
    cluster.expect(CHILDREN, "1:1 10:2").await;
    expect_lines(&cluster, "child:10").await;
}

#[tokio::test]
async fn a_third_node_that_hears_of_the_deletion_first_logs_the_same() {
    third(0).await;
}

#[tokio::test]
async fn a_third_node_that_hears_of_the_child_first_logs_the_same() {
    third(1).await;
}

#[tokio::test]
async fn every_way_to_lose_a_parent_is_found() {
    let cluster = start(
        "create table tag (id int primary key, code text references parent (code) on update cascade);
         create table tree (id int primary key, up int references tree on delete cascade);
         create table pair (a int, b text, primary key (a, b));
         create table half (id int primary key, b text, a int, foreign key (a, b) references pair);
         create table p_root (id int primary key) partition by range (id);
         create table p_low partition of p_root for values from (0) to (100);
         create table p_high partition of p_root for values from (100) to (200);
         create table c_root (id int primary key, parent int references p_root) partition by range (id);
         create table c_low partition of c_root for values from (0) to (100);
         create table c_high partition of c_root for values from (100) to (200)",
    )
    .await;
    cluster
        .run(
            0,
            "insert into tag values (1, 'c'); insert into tree values (1, null), (2, 1), (3, 2);
             insert into pair values (1, 'x'), (2, 'x'); insert into p_root values (5), (105);
             insert into c_root values (1, 5), (101, 105);
             insert into half values (1, 'x', 1), (2, null, 7)",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            // The parent's key moves away; its children go with it, those that are known.
            (0, "delete from child; update parent set id = 30 where id = 3"),
            (1, "insert into child values (10, 3)"),
            // A child moves to it.
            (1, "insert into child values (11, 1)"),
            (0, "delete from parent where id = 2"),
            (1, "update child set parent = 2 where id = 11"),
            // Referred to by another key than the primary one.
            (0, "update parent set code = 'moved' where code = 'c'"),
            (1, "insert into tag values (2, 'c')"),
            // To itself.
            (0, "delete from tree where id = 2"),
            (1, "insert into tree values (4, 3)"),
            // Of two columns, in another order; with a NULL among them it refers to nothing.
            (0, "delete from half; delete from pair"),
            (1, "insert into half values (3, 'x', 2), (4, null, 1)"),
            // In partitions.
            (0, "delete from c_root; delete from p_root"),
            (1, "insert into c_root values (2, 105), (102, 5)"),
        ])
        .await;
    expect_lines(
        &cluster,
        "c_high:102 c_low:2 child:10 child:11 half:3 tag:2 tree:4",
    )
    .await;
}

#[tokio::test]
async fn rows_that_outlive_a_truncate_without_their_parents_are_found() {
    let cluster = start("create table old (id int primary key, parent int references parent)").await;
    cluster
        .apart(&[
            (1, "insert into old values (1, 1)"),
            (0, "truncate parent cascade"),
            (1, "insert into child values (10, 2)"),
        ])
        .await;
    cluster.expect(CHILDREN, "10:2").await;
    for node in cluster.all() {
        cluster.wait_value(node, LINES, "child:10").await;
    }
    cluster.conflicts().await;
}

#[tokio::test]
async fn a_local_writer_that_holds_the_row_is_waited_for() {
    let cluster = start("").await;
    let (remover, inserter) = (cluster.session(1).await, cluster.session(1).await);
    // The one deletes a parent, the other writes a child, and neither has committed when the other's change comes in.
    let waits = "select count(*) > 0 from pg_stat_activity \
        where application_name = 'anabranch:apply' and wait_event_type = 'Lock'";
    remover.run("begin; delete from parent where id = 2").await;
    cluster.run(0, "insert into child values (10, 2)").await;
    cluster.wait_value(1, waits, "t").await;
    remover.run("commit").await;
    cluster
        .wait_value(1, "select count(*) from child where id = 10", "1")
        .await;
    inserter.run("begin; insert into child values (11, 3)").await;
    cluster.run(0, "delete from parent where id = 3").await;
    cluster.wait_value(1, waits, "t").await;
    inserter.run("commit").await;
    cluster.converge().await;
    cluster.expect(CHILDREN, "1:1 10:2 11:3").await;
    expect_lines(&cluster, "child:10 child:11").await;
}

#[tokio::test]
async fn a_child_that_wins_over_a_cascade_stays_and_is_logged() {
    let cluster = start(
        "create table part (id int primary key, parent int references parent on delete cascade, v text)",
    )
    .await;
    cluster.run(0, "insert into part values (1, 2, 'old')").await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from parent where id = 2"),
            (1, "update part set v = 'new' where id = 1"),
        ])
        .await;
    cluster.expect("select string_agg(v, ' ') from part", "new").await;
    for node in cluster.all() {
        cluster.wait_value(node, LINES, "part:1").await;
    }
    // And the delete that lost has its own.
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 2, "{log:#?}");
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_load_in_which_every_row_has_its_parent_has_no_line() {
    let cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .schema(
            "create table part (id int primary key, parent int references parent on delete cascade);
             create index on part (parent);
             create table loose (id int primary key, parent int references parent on delete set null);
             create index on loose (parent);
             create table late (id int primary key, parent int references parent deferrable initially deferred);
             create index on late (parent);
             create table tree (id int primary key, up int references tree deferrable initially deferred)",
        )
        .start()
        .await;
    let until = Instant::now() + Duration::from_secs(4);
    let mut clients = Vec::new();
    for client in 0..6i32 {
        let session = cluster.session(client as usize % 2).await;
        clients.push(tokio::spawn(async move {
            let mut id = client * 10_000_000;
            while Instant::now() < until {
                id += 10;
                let parent = id;
                session
                    .run(&format!("insert into parent values ({parent}, 'c{parent}')"))
                    .await;
                session
                    .run(&format!(
                        "insert into child values ({id}, {parent}); insert into part values ({id}, {parent});
                         insert into loose values ({id}, {parent})"
                    ))
                    .await;
                // Children before parents, in one transaction.
                let next = parent + 1;
                session
                    .run(&format!(
                        "begin; insert into late values ({id}, {next}); insert into tree values ({id}, {next}), ({next}, null);
                         insert into parent values ({next}, 'c{next}'); commit"
                    ))
                    .await;
                session
                    .run(&format!("update child set parent = {next} where id = {id}"))
                    .await;
                // Deleted first, moved away after.
                session
                    .run(&format!(
                        "begin; delete from parent where id = {parent}; update child set v = 'moved' where id = {id}; commit"
                    ))
                    .await;
                session
                    .run(&format!(
                        "begin; set constraints all deferred; delete from tree where id = {next}; \
                         update tree set up = null where id = {id}; delete from child where id = {id}; \
                         delete from late where id = {id}; delete from parent where id = {next}; commit"
                    ))
                    .await;
            }
        }));
    }
    for client in clients {
        client.await.expect("a client");
    }
    cluster.converge().await;
    cluster.expect("select count(*) from parent", "0").await;
    cluster.expect_no_conflict().await;
    // In pieces: rows whose parents come later, and parents whose children go later.
    cluster
        .run(
            0,
            "begin; insert into late select g, g from generate_series(1, 30000) g; \
             insert into parent select g, 'x' || g from generate_series(1, 30000) g; \
             insert into part select g, g from generate_series(1, 30000) g; commit",
        )
        .await;
    cluster.converge().await;
    cluster
        .run(1, "begin; delete from parent; delete from late; commit")
        .await;
    cluster.converge().await;
    cluster.expect("select count(*) from part", "0").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn orphans_of_large_transactions_are_found() {
    let cluster = start("").await;
    cluster
        .run(
            0,
            "insert into parent select g, 'x' || g from generate_series(10, 30000) g",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from parent where id between 10 and 25000"),
            (
                1,
                "insert into child select g, g from generate_series(24900, 30000) g",
            ),
        ])
        .await;
    for node in cluster.all() {
        let lines =
            "select count(*) from anabranch.conflict_history where conflict_type = 'foreign_key_missing'";
        cluster.wait_value(node, lines, "101").await;
    }
    assert_eq!(cluster.conflicts().await.len(), 101);
}

const DELETE: &str = "[[table]]\nname = \"public.child\"\nforeign_keys = \"delete_child\"";
const ORPHANS: &str = "select count(*) from child c where parent is not null and not exists (select from parent where id = c.parent)";

async fn deleting() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .policy(DELETE)
        .start()
        .await;
    let rows =
        "insert into parent values (1, 'a'), (2, 'b'), (3, 'c'); insert into child values (1, 1), (2, 2)";
    cluster.run(0, rows).await;
    cluster.converge().await;
    cluster
}

/// Nobody has a row without its parent, and the lines say what was done.
async fn expect_deleted(cluster: &Cluster, rows: &str) {
    for node in cluster.all() {
        cluster.wait_value(node, ORPHANS, "0").await;
    }
    cluster.converge().await;
    for line in expect_lines(cluster, rows).await {
        assert_eq!(line.resolution(), "delete_child");
        assert_eq!(line.0["policy"], "last_update_wins, delete_child");
    }
}

#[tokio::test]
async fn children_without_parents_are_deleted_by_the_node_that_wrote_them() {
    let cluster = deleting().await;
    // Whoever may make functions has none of them run by the daemon.
    cluster
        .run_everywhere(
            "create function jsonb_populate_record(child, jsonb) returns child language plpgsql as $$ begin raise 'taken over'; end $$;
             create function jsonb_to_record(jsonb) returns record language plpgsql as $$ begin raise 'taken over'; end $$",
        )
        .await;
    cluster
        .apart(&[
            (0, "delete from child; delete from parent where id in (1, 2)"),
            (1, "insert into child values (10, 1)"),
            (2, "insert into child values (11, 2), (12, 3)"),
        ])
        .await;
    expect_deleted(&cluster, "child:10 child:11").await;
    cluster.expect(CHILDREN, "12:3").await;
    let noted = "select coalesce(string_agg(key->>'id', ' '), 'none') from anabranch.conflict_history where note = 'deleted here'";
    assert_eq!(cluster.values(noted).await, ["none", "10", "11"]);
}

/// Node 2 has written children of parent 2, which is gone, and may not delete child 10.
async fn kept_from_deleting() -> Cluster {
    let cluster = deleting().await;
    // The trigger stands for whatever keeps the row from going.
    cluster
        .run(
            1,
            "create function stay() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
             create trigger stay before delete on child for each row when (old.id = 10) execute function stay()",
        )
        .await;
    cluster
        .apart(&[
            (
                0,
                "delete from child where parent = 2; delete from parent where id = 2",
            ),
            (
                1,
                "insert into child values (10, 2); insert into child values (11, 2)",
            ),
        ])
        .await;
    for node in cluster.all() {
        cluster.wait_value(node, LINES, "child:10 child:11").await;
        cluster.wait_value(node, ORPHANS, "1").await;
    }
    until("it says what is in the way", async || {
        let status = cluster.status(1).await.to_string();
        status.contains("cannot be deleted yet") && status.contains("not now")
    })
    .await;
    cluster
}

#[tokio::test]
async fn a_deletion_that_could_not_be_made_is_made_after_a_restart() {
    let mut cluster = kept_from_deleting().await;
    cluster.nodes[1].daemon.kill();
    cluster.run(1, "drop trigger stay on child").await;
    cluster.nodes[1].daemon.start();
    expect_deleted(&cluster, "child:10 child:11").await;
    cluster.expect(CHILDREN, "1:1").await;
}

#[tokio::test]
async fn a_child_that_has_its_parent_again_is_not_deleted() {
    let cluster = kept_from_deleting().await;
    cluster.run(0, "insert into parent values (2, 'again')").await;
    cluster.converge().await;
    cluster.run(1, "drop trigger stay on child").await;
    let noted = "select note from anabranch.conflict_history where key->>'id' = '10'";
    cluster
        .wait_value(1, noted, "not deleted: the row has a parent, or is gone")
        .await;
    cluster.converge().await;
    cluster.expect(CHILDREN, "1:1 10:2").await;
}

#[tokio::test]
async fn a_row_that_was_written_since_is_not_deleted_before_all_have_met_that() {
    let cluster = deleting().await;
    let stay = "create function stay() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
        create trigger stay before delete on child for each row execute function stay()";
    cluster.run(1, stay).await;
    // One after the other: it is the order in which they are looked at.
    for (parent, child) in [(2, 10), (3, 11)] {
        let delete =
            format!("delete from child where parent = {parent}; delete from parent where id = {parent}");
        let insert = format!("insert into child values ({child}, {parent})");
        cluster.apart(&[(0, delete.as_str()), (1, insert.as_str())]).await;
    }
    until("both are known to be everywhere", async || {
        let status = cluster.status(1).await.to_string();
        status.contains("cannot be deleted yet") && status.contains("1 more rows are not mended")
    })
    .await;
    cluster.partition(&[2], &[0, 1]);
    // The server lets it: the row refers to what it did before.
    cluster.run(0, "update child set v = 'new' where id = 10").await;
    cluster
        .wait_value(1, "select v from child where id = 10", "new")
        .await;
    cluster.run(1, "drop trigger stay on child").await;
    let noted = "select coalesce(string_agg(key->>'id', ' '), 'none') from anabranch.conflict_history where note = 'deleted here'";
    cluster.wait_value(1, noted, "11").await;
    let stays = "select count(*) from child where id = 10";
    assert_eq!(cluster.value(1, stays).await, "1");
    cluster.heal();
    expect_deleted(&cluster, "child:10 child:11").await;
    cluster.expect(CHILDREN, "1:1").await;
}

const RESTORE: &str = "[[table]]\nname = \"public.child\"\nforeign_keys = \"restore_parent\"
    [[table]]\nname = \"public.remark\"\nforeign_keys = \"restore_parent\"";

async fn restoring(more: &str) -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(SCHEMA)
        .schema(more)
        .policy(RESTORE)
        .start()
        .await;
    let rows =
        "insert into parent values (1, 'a'), (2, 'b'), (3, 'c'); insert into child values (1, 1), (2, 2)";
    cluster.run(0, rows).await;
    cluster.converge().await;
    cluster
}

const NOTES: &str = "select coalesce(string_agg(concat(key->>'id', ' ', note), ', ' order by key->>'id') filter (where note is not null), 'none') \
    from anabranch.conflict_history";

#[tokio::test]
async fn parents_come_back_as_the_node_that_wrote_their_children_last_showed_them() {
    let cluster = restoring("").await;
    cluster
        .run(2, "update parent set code = 'b, later' where id = 2")
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from child; delete from parent where id in (1, 2)"),
            (1, "insert into child values (10, 2), (11, 2)"),
            (2, "insert into child values (12, 3)"),
        ])
        .await;
    for node in cluster.all() {
        cluster.wait_value(node, LINES, "child:10 child:11").await;
        cluster.wait_value(node, ORPHANS, "0").await;
    }
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(':', id, code), ' ' order by id) from parent",
            "2:b, later 3:c",
        )
        .await;
    cluster.expect(CHILDREN, "10:2 11:2 12:3").await;
    for line in expect_lines(&cluster, "child:10 child:11").await {
        assert_eq!(line.resolution(), "restore_parent");
        assert_eq!(line.0["policy"], "last_update_wins, restore_parent");
    }
    // One of them brought it back, the other found it there, when its turn came.
    let back = "restored here";
    let there = "not restored: the row has a parent, or is gone";
    let expected = [format!("10 {back}, 11 {there}"), format!("10 {there}, 11 {back}")];
    until_ok("both lines have their notes", PATIENCE, async || {
        let notes = cluster.value(1, NOTES).await;
        if expected.contains(&notes) {
            Ok(())
        } else {
            Err(notes)
        }
    })
    .await;
    for node in [0, 2] {
        assert_eq!(cluster.value(node, NOTES).await, "none");
    }
}

#[tokio::test]
async fn a_parent_comes_back_with_what_it_refers_to() {
    let cluster = restoring(
        "create table remark (id int primary key, child int references child on delete cascade, at int references parent);
         create index on remark (child); create index on remark (at);
         alter table child drop constraint child_parent_fkey,
            add constraint child_parent_fkey foreign key (parent) references parent on delete cascade",
    )
    .await;
    cluster
        .apart(&[
            (0, "delete from parent where id in (1, 2)"),
            (1, "insert into remark values (7, 2, 2)"),
        ])
        .await;
    for node in cluster.all() {
        cluster
            .wait_value(node, "select count(*) from remark r join child c on c.id = r.child join parent p on p.id = c.parent", "1")
            .await;
    }
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(':', id, code), ' ' order by id) from parent",
            "2:b 3:c",
        )
        .await;
    cluster.expect(CHILDREN, "2:2").await;
}

#[tokio::test]
async fn a_parent_comes_back_with_what_a_generated_column_of_it_refers_to() {
    let cluster = restoring(
        "create table region (id int primary key);
         alter table parent add column region int generated always as (case when id = 4 then 40 end) stored references region;
         create index on parent (region)",
    )
    .await;
    cluster
        .run(
            0,
            "insert into region values (40); insert into parent values (4, 'd')",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from parent where id = 4; delete from region"),
            (1, "insert into child values (10, 4)"),
        ])
        .await;
    let whole =
        "select count(*) from child c join parent p on p.id = c.parent join region r on r.id = p.region";
    for node in cluster.all() {
        cluster.wait_value(node, whole, "1").await;
    }
    cluster.wait_value(1, NOTES, "10 restored here").await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_parent_comes_back_though_another_node_once_brought_it_back_for_the_same_row() {
    let cluster = restoring("").await;
    let parents = "select string_agg(id::text, ' ' order by id) from parent";
    cluster
        .apart(&[
            (0, "insert into child values (10, 3)"),
            (1, "delete from parent where id = 3"),
        ])
        .await;
    cluster.wait_value(0, NOTES, "10 restored here").await;
    for node in cluster.all() {
        cluster.wait_value(node, parents, "1 2 3").await;
    }
    cluster.run(0, "update child set parent = 2 where id = 10").await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from parent where id = 3"),
            (1, "update child set parent = 3 where id = 10"),
        ])
        .await;
    // The first node's line of that row is open at the second: it is the second's turn all the same.
    cluster.wait_value(1, NOTES, "10 restored here").await;
    for node in cluster.all() {
        cluster.wait_value(node, parents, "1 2 3").await;
    }
    cluster.converge().await;
    cluster.expect(CHILDREN, "1:1 2:2 10:3").await;
}

#[tokio::test]
async fn a_parent_whose_unique_value_is_taken_stays_away_and_one_that_is_refused_comes_later() {
    let cluster = restoring("").await;
    cluster
        .run(
            1,
            "create function stay() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
             create trigger stay before insert on parent for each row when (new.id = 1) execute function stay()",
        )
        .await;
    cluster
        .apart(&[
            (0, "delete from child; delete from parent where id in (1, 2); insert into parent values (20, 'b')"),
            (1, "insert into child values (10, 1), (11, 2)"),
        ])
        .await;
    for node in cluster.all() {
        cluster.wait_value(node, LINES, "child:10 child:11").await;
    }
    let taken = "11 not restored: another row has a value of a unique key that the parent had";
    cluster.wait_value(1, NOTES, taken).await;
    until("it says what is in the way", async || {
        let status = cluster.status(1).await.to_string();
        status.contains("cannot have it back yet") && status.contains("not now")
    })
    .await;
    cluster.run(1, "drop trigger stay on parent").await;
    cluster
        .wait_value(1, NOTES, &format!("10 restored here, {taken}"))
        .await;
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(':', id, code), ' ' order by id) from parent",
            "1:a 3:c 20:b",
        )
        .await;
    cluster.expect(CHILDREN, "10:1 11:2").await;
}

const ACCOUNTS: &str = "create table account (id int primary key, balance bigint not null, log text);
    create table entry (id int primary key, account int references account);
    create index on entry (account)";

const ACCOUNTS_POLICY: &str = "[[table]]\nname = \"public.entry\"\nforeign_keys = \"restore_parent\"
    [[table]]\nname = \"public.account\"\ncolumns = { balance = \"delta\", log = \"append\" }";

/// Account 1 has 100.
async fn accounts() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(ACCOUNTS)
        .policy(ACCOUNTS_POLICY)
        .start()
        .await;
    cluster
        .run(0, "insert into account values (1, 100, 'opened')")
        .await;
    cluster.converge().await;
    cluster
}

/// Nodes 2 and 3 have each written a child of account 1, which node 1 has removed; and node 2 may not bring the account back.
async fn two_writers_of_one_parent() -> Cluster {
    let cluster = accounts().await;
    cluster
        .run(
            1,
            "create function stay() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
             create trigger stay before insert on account for each row execute function stay()",
        )
        .await;
    cluster
        .apart(&[
            (0, "delete from account where id = 1"),
            (1, "insert into entry values (10, 1)"),
            (2, "insert into entry values (11, 1)"),
        ])
        .await;
    for node in cluster.all() {
        cluster.wait_value(node, LINES, "entry:10 entry:11").await;
    }
    until("node 2 says what is in the way", async || {
        let status = cluster.status(1).await.to_string();
        status.contains("cannot have it back yet") && status.contains("not now")
    })
    .await;
    until("node 3 says for whom it waits", async || {
        let status = cluster.status(2).await.to_string();
        status.contains("waits for node n2, which wrote another row of that parent, to bring it back")
    })
    .await;
    cluster
}

const ACCOUNT: &str = "select concat_ws(' ', balance, log) from account where id = 1";

async fn expect_account_once(cluster: &Cluster, nodes: &[usize]) {
    for &node in nodes {
        cluster.wait_value(node, ACCOUNT, "100 opened").await;
    }
    cluster.converge_among(nodes, PATIENCE).await;
    // Both had their turn.
    for &node in nodes {
        assert_eq!(cluster.value(node, ACCOUNT).await, "100 opened");
    }
}

#[tokio::test]
async fn a_parent_of_two_writers_comes_back_once() {
    let cluster = accounts().await;
    cluster
        .apart(&[
            (0, "delete from account where id = 1"),
            (1, "insert into entry values (10, 1)"),
            (2, "insert into entry values (11, 1)"),
        ])
        .await;
    let (restored, there) = (
        "10 restored here",
        "11 not restored: the row has a parent, or is gone",
    );
    cluster.wait_value(1, NOTES, restored).await;
    cluster.wait_value(2, NOTES, there).await;
    expect_account_once(&cluster, &[0, 1, 2]).await;
    expect_lines(&cluster, "entry:10 entry:11").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_parent_is_left_to_the_lowest_writer_for_as_long_as_it_has_a_row_of_it() {
    let cluster = two_writers_of_one_parent().await;
    assert_eq!(cluster.value(2, NOTES).await, "none");
    // Node 2's row goes, and node 2 knows it: now it is node 3's turn.
    cluster.run(0, "delete from entry where id = 10").await;
    cluster.wait_value(2, NOTES, "11 restored here").await;
    let gone = "10 not restored: the row has a parent, or is gone";
    cluster.wait_value(1, NOTES, gone).await;
    expect_account_once(&cluster, &[0, 1, 2]).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_parent_is_brought_back_by_the_next_where_somebody_closes_the_line_of_the_first() {
    let cluster = two_writers_of_one_parent().await;
    for node in [1, 2] {
        let close = "update anabranch.conflict_history set status = 'dismissed' where key->>'id' = '10'";
        cluster.admin(node).await.run(close).await;
    }
    cluster.wait_value(2, NOTES, "11 restored here").await;
    expect_account_once(&cluster, &[0, 1, 2]).await;
}

#[tokio::test]
async fn a_parent_is_brought_back_by_the_next_where_the_first_is_dropped() {
    let mut cluster = two_writers_of_one_parent().await;
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].server.kill();
    wait_parted(&cluster, 0, 1).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    anabranch_ok(&["node", "drop", "n2", "--config", &config]).await;
    cluster.wait_value(2, NOTES, "11 restored here").await;
    expect_account_once(&cluster, &[0, 2]).await;
}

#[tokio::test]
async fn documents_that_the_log_cannot_take_keep_nobody_from_finding_rows_and_parents() {
    let cluster = Cluster::of([15, 15, 18])
        .schema(
            "create table folder (id int primary key, size numeric, docs json[], doc json, at timestamptz);
             create table paper (id int primary key, folder int references folder, doc json);
             create index on paper (folder)",
        )
        .policy("[[table]]\nname = \"public.paper\"\nforeign_keys = \"restore_parent\"")
        .start()
        .await;
    let folder = r#"insert into folder values (2, 1.50, array['"\u0000"', '{}']::json[], '{"a": ["\u0000", "\ud83d", 1e999999]}', '2020-02-02 12:00+00')"#;
    cluster.run(0, folder).await;
    cluster.converge().await;
    const FOLDER: &str = "select string_agg(concat_ws(' ', id, size, docs, doc, extract(epoch from at)::bigint), ', ') from folder";
    let before = cluster.value(1, FOLDER).await;
    cluster
        .apart(&[
            (0, "delete from folder"),
            (
                1,
                r#"insert into paper values (10, 2, '"\u0000"'), (11, 2, '"\ud83d"'), (12, 2, '1e999999')"#,
            ),
        ])
        .await;
    for node in cluster.all() {
        cluster
            .wait_value(node, LINES, "paper:10 paper:11 paper:12")
            .await;
        cluster.wait_value(node, FOLDER, &before).await;
    }
    cluster.converge().await;
    let log = expect_lines(&cluster, "paper:10 paper:11 paper:12").await;
    let row = |id: i32| {
        log.iter()
            .find(|line| *line.key() == json!({ "id": id }))
            .map(Conflict::applied)
    };
    // As in every line: marked, so that a replay does not take the text for the value.
    let document = |id: i32, doc: &str| {
        let doc = json!({ "unread_text": doc, "type": "pg_catalog.json" });
        json!({"id": id, "folder": 2, "doc": doc})
    };
    assert_eq!(row(10), Some(&document(10, r#""\u0000""#)));
    assert_eq!(row(11), Some(&document(11, r#""\ud83d""#)));
    assert_eq!(row(12), Some(&document(12, "1e999999")));
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn rows_that_cannot_be_mended_hold_up_no_others() {
    let cluster = deleting().await;
    cluster
        .run(
            1,
            "create function stay() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
             create trigger stay before delete on child for each row when (old.id < 10000) execute function stay()",
        )
        .await;
    // More than are read at once, all before the one that can be.
    cluster
        .apart(&[
            (0, "delete from child; delete from parent where id in (1, 2)"),
            (
                1,
                "insert into child select g, 1 from generate_series(1001, 2100) g",
            ),
            (1, "insert into child values (10001, 2)"),
        ])
        .await;
    let noted = "select coalesce(string_agg(key->>'id', ' '), 'none') from anabranch.conflict_history where note = 'deleted here'";
    cluster.wait_value(1, noted, "10001").await;
    cluster.run(1, "drop trigger stay on child").await;
    for node in cluster.all() {
        cluster.wait_value(node, ORPHANS, "0").await;
    }
    cluster.converge().await;
}

#[tokio::test]
async fn rows_of_tables_that_inherit_are_neither_parents_nor_children() {
    let cluster = start(
        "create table heir (primary key (id)) inherits (parent);
         create table lost (primary key (id)) inherits (child)",
    )
    .await;
    // As PostgreSQL's own checks have it.
    cluster
        .run(
            0,
            "insert into heir values (2, 'heir'); insert into lost values (50, 2), (51, 77), (52, 3)",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "delete from only parent where id in (2, 3)"),
            (1, "insert into child values (10, 2)"),
        ])
        .await;
    expect_lines(&cluster, "child:10").await;
}
