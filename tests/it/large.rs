//! Large transactions, which travel in parts and are resolved and written in pieces: what a small one promises, they
//! promise.

use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::proxy::Mode;

const PATIENCE: Duration = Duration::from_secs(60);

/// So many rows take several frames and several pieces.
const ROWS: u32 = 10_000;

#[tokio::test]
async fn a_large_transaction_whose_unique_values_others_have_is_written_whole() {
    let cluster = Cluster::of([15, 15, 18])
        .schema("create table pair (id int primary key, a text unique, v text)")
        .start()
        .await;
    let insert = |first: u32, count: u32| {
        format!(
            "insert into pair select {first} + i, 'x' || i, repeat('v', 80) from generate_series(1, {count}) i"
        )
    };
    cluster.isolate_all();
    cluster.run(0, &insert(0, 500)).await;
    cluster.run(1, &insert(100_000, ROWS)).await;
    cluster.heal();
    for node in cluster.all() {
        cluster
            .wait_value(node, "select count(*) > 500 from pair", "t")
            .await;
        let seen = "select count(*) from pair where id > 100000";
        assert_eq!(
            cluster.value(node, seen).await,
            ROWS.to_string(),
            "half a transaction"
        );
    }
    cluster.converge_within(PATIENCE).await;
    cluster
        .expect(
            "select count(*) || ' ' || min(id) from pair",
            &format!("{ROWS} 100001"),
        )
        .await;
    for node in cluster.all() {
        let kinds = "select string_agg(distinct conflict_type || ' ' || (key->>'id' < '100000' or length(key->>'id') < 6), ', ') || ' ' || count(*) \
            from anabranch.conflict_history";
        cluster
            .wait_value(node, kinds, "multiple_unique_conflicts true 500")
            .await;
    }
}

#[tokio::test]
async fn a_large_change_that_is_tried_again_meets_what_was_written_meanwhile() {
    let cluster = Cluster::of([15, 15])
        .schema("create table counter (id int primary key, n int not null, pad text)")
        .schema("create table plain (id int primary key, n int not null, pad text)")
        .policy("[[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n")
        .config("[apply]\nlock_timeout_ms = 200\n")
        // Ahead by more than all of this takes on a busy machine.
        .clock(1, 30)
        .start()
        .await;
    for table in ["counter", "plain"] {
        cluster
            .run(
                0,
                &format!(
                    "insert into {table} select i, 0, repeat('v', 80) from generate_series(1, {ROWS}) i"
                ),
            )
            .await;
    }
    cluster.converge().await;
    // What is written last waits for us; what comes before it is decided and written, and taken back, again and again.
    let holder = cluster.admin(0).await;
    holder
        .run(&format!(
            "begin; select from counter where id = {ROWS} for update; select from plain where id = {ROWS} for update"
        ))
        .await;
    cluster
        .run(
            1,
            "begin; update counter set n = n + 10; update plain set n = 10; commit",
        )
        .await;
    cluster
        .wait_value(
            0,
            "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock'",
            "t",
        )
        .await;
    // Stamped lower than the large one.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        holder_free(&cluster, "update counter set n = n + 1 where id = 1").await;
        holder_free(&cluster, "update plain set n = 1 where id in (1, 2)").await;
    }
    holder.run("commit").await;
    cluster.converge_within(PATIENCE).await;
    cluster
        .expect(
            "select string_agg(n::text, ' ' order by id) from counter where id in (1, 2, 9000)",
            "13 10 10",
        )
        .await;
    cluster
        .expect("select min(n) || ' ' || max(n) from plain", "10 10")
        .await;
}

async fn holder_free(cluster: &Cluster, sql: &str) {
    let session = cluster.session(0).await;
    session.run(&format!("set lock_timeout = '10s'; {sql}")).await;
}

#[tokio::test]
async fn a_large_transaction_that_truncates_in_its_midst_is_whole_also_when_it_is_tried_again() {
    let mut cluster = Cluster::of([15, 15, 18])
        .schema("create table bulk (id int primary key, v text)")
        .config("[apply]\nlock_timeout_ms = 200\n")
        .start()
        .await;
    let rows = |first: u32, what: &str| {
        format!(
            "insert into bulk select {first} + i, '{what}' || repeat('v', 80) from generate_series(1, {ROWS}) i"
        )
    };
    cluster.run(0, &rows(0, "old")).await;
    cluster.converge().await;
    cluster.isolate_all();
    cluster.run(2, "update bulk set v = 'gone' where id <= 3").await;
    cluster
        .run(
            1,
            &format!(
                "begin; update bulk set v = 'passing' || v; {}; truncate bulk; {}; \
                 update bulk set v = 'new' where id % 2 = 0; delete from bulk where id > {ROWS} + 10; commit",
                rows(ROWS, "passing"),
                rows(5_000, "late")
            ),
        )
        .await;
    cluster
        .run(
            0,
            &format!("update bulk set v = 'kept' where id in (1, 6001, {ROWS})"),
        )
        .await;
    // The first tries wait for a row in its midst.
    let holder = cluster.admin(0).await;
    holder
        .run(&format!("begin; select from bulk where id = {ROWS} for update"))
        .await;
    cluster.heal();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].daemon.start();
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    cluster
        .run(
            0,
            "set lock_timeout = '10s'; update bulk set v = 'kept, too' where id = 2",
        )
        .await;
    holder.run("commit").await;
    cluster.converge_within(PATIENCE).await;
    let expected = format!("{}", ROWS + 10 - 5_000 + 2);
    cluster.expect("select count(*) from bulk", &expected).await;
    cluster
        .expect(
            &format!(
                "select string_agg(v, ' ' order by id) from bulk where id in (1, 2, 3, 6001, 6002, {ROWS})"
            ),
            "kept kept, too kept new kept",
        )
        .await;
}

/// What a truncate takes out of a merged row is in it no more when the truncating transaction is tried again.
#[tokio::test]
async fn a_large_transaction_that_cuts_a_merged_row_cuts_it_also_when_it_is_tried_again() {
    let cluster = Cluster::of([15, 15, 18])
        .schema(
            "create table counter (id int primary key, n int not null);
             create table held (id int primary key, v int); create table bulk (id int primary key, v text)",
        )
        .policy("[[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n")
        .config("[apply]\nlock_timeout_ms = 200\n")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into counter values (1, 5); insert into held values (1, 0)",
        )
        .await;
    cluster.converge().await;
    cluster.isolate_all();
    cluster.run(2, "update counter set n = n + 1000").await;
    cluster
        .run(
            0,
            &format!(
                "begin; truncate counter; insert into bulk select i, repeat('v', 80) from generate_series(1, 2 * {ROWS}) i; \
                 update held set v = 1; commit"
            ),
        )
        .await;
    cluster.run(1, "update counter set n = n + 10").await;
    cluster.set_lines(&[1], &[2], Mode::Pass);
    cluster.wait_value(1, "select n::text from counter", "1015").await;
    // The first tries come as far as this row.
    let holder = cluster.session(1).await;
    holder
        .run("begin; select from held where id = 1 for update")
        .await;
    cluster.heal();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    holder.run("commit").await;
    cluster.converge_within(PATIENCE).await;
    cluster.expect("select n::text from counter", "15").await;
}

#[tokio::test]
async fn a_large_insert_that_is_tried_again_calls_no_row_anothers_than_it_was() {
    let cluster = Cluster::of([15, 15])
        .schema("create table bulk (id int primary key, v text)")
        .config("[apply]\nlock_timeout_ms = 200\n")
        .start()
        .await;
    cluster.isolate_all();
    cluster
        .run(
            0,
            "insert into bulk select i, 'lost' from generate_series(1, 50) i",
        )
        .await;
    cluster
        .run(
            1,
            &format!("insert into bulk select i, repeat('v', 80) from generate_series(1, {ROWS}) i"),
        )
        .await;
    let holder = cluster.session(0).await;
    holder
        .run(&format!("begin; insert into bulk values ({ROWS}, 'rolled back')"))
        .await;
    cluster.heal();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    holder.run("rollback").await;
    cluster.converge_within(PATIENCE).await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 50);
    for node in cluster.all() {
        let unnamed = "select count(*) from anabranch.conflict_history where local_stamp is null or remote_stamp is null";
        assert_eq!(cluster.value(node, unnamed).await, "0");
    }
    cluster.expect_no_drift();
}
