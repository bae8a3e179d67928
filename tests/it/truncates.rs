//! TRUNCATE among other writes of its transaction, and in transactions that are tried again.

use std::time::Duration;

use anabranch_tests::process::{self, Signal};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::{PATIENCE, until};
use anabranch_tests::{Cluster, Session};

const TABLES: &str = "create table t (id int primary key, v text);
    create table u (id int primary key, v int)";
const ALL: &str = "select coalesce(string_agg(id || '=' || v, ' ' order by id), 'none') from t";
const WAITING: &str = "select count(*) from anabranch.quarantine";
/// The daemon waits so long for a lock, and starts again.
const LOCKS: &str = "[apply]\nlock_timeout_ms = 200\n";
const TRIES: Duration = Duration::from_millis(1_500);

/// Three nodes, the third of which hears of nothing, so that nothing is forgotten; and a transaction at the second that keeps
/// what is written there from passing for old.
async fn start(policy: &str) -> (Cluster, Session) {
    let mut cluster = Cluster::of([15, 15, 18]).schema(TABLES).config(LOCKS);
    if !policy.is_empty() {
        cluster = cluster.policy(policy);
    }
    let cluster = cluster.start().await;
    cluster
        .run(0, "insert into t values (1, 'old'), (5, 'old')")
        .await;
    cluster.run(0, "insert into u values (1, 1)").await;
    cluster.converge().await;
    cluster.partition(&[2], &[0, 1]);
    let long = cluster.session(1).await;
    long.run("begin; insert into u values (99, 0)").await;
    (cluster, long)
}

#[tokio::test]
async fn a_row_behind_a_truncate_is_deleted_though_its_transaction_was_tried_again_for_a_refused_row() {
    let cluster = Cluster::of([15, 15, 18])
        .schema(TABLES)
        .schema_of(1, "alter table u add constraint small check (v < 100)")
        .start()
        .await;
    cluster.partition(&[2], &[0, 1]);
    let long = cluster.session(1).await;
    long.run("begin; insert into u values (99, 0)").await;
    cluster
        .run(
            0,
            "begin; truncate t; insert into t values (1, 'a'), (2, 'b'); insert into u values (1, 1000); commit",
        )
        .await;
    cluster.wait_value(1, WAITING, "1").await;
    cluster.wait_value(1, ALL, "1=a 2=b").await;
    cluster.run(0, "delete from t where id = 1").await;
    cluster.wait_value(1, ALL, "2=b").await;
    long.run("rollback").await;
    cluster.run(0, "delete from u").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "2=b").await;
}

/// A row behind a truncate whose transaction is tried again for a lock is updated and deleted as any.
async fn is_written_on(policy: &str) {
    let (cluster, long) = start(policy).await;
    let holder = cluster.session(1).await;
    holder.run("begin; select from u where id = 1 for update").await;
    cluster
        .run(
            0,
            "begin; truncate t; insert into t values (1, 'a'), (2, 'b'), (3, 'c'); update u set v = 2 where id = 1; commit",
        )
        .await;
    tokio::time::sleep(TRIES).await;
    holder.run("commit").await;
    cluster.wait_value(1, ALL, "1=a 2=b 3=c").await;
    cluster.run(0, "update t set v = 'updated' where id = 1").await;
    cluster.run(0, "delete from t where id = 2").await;
    cluster.wait_value(1, ALL, "1=updated 3=c").await;
    // Concurrent and later: it beats the row, which has its line as any.
    cluster.run(2, "insert into t values (3, 'later')").await;
    long.run("rollback").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "1=updated 3=later").await;
    let lines = cluster.conflicts().await;
    assert_eq!(lines.len(), 1, "{lines:#?}");
}

#[tokio::test]
async fn a_row_behind_a_truncate_that_is_tried_again_is_written_on() {
    is_written_on("").await;
}

#[tokio::test]
async fn a_row_behind_a_truncate_that_is_tried_again_is_written_on_under_a_policy() {
    is_written_on(
        "[[table]]\nname = \"public.t\"\npolicy = \"origin_priority\"\npriority = [\"n3\", \"n1\"]\n",
    )
    .await;
}

#[tokio::test]
async fn what_a_later_transaction_puts_in_an_emptied_table_is_not_taken_for_a_row_that_stays() {
    let (cluster, long) = start("").await;
    let holder = cluster.session(1).await;
    holder.run("begin; select from u where id = 1 for update").await;
    // Together in one apply transaction.
    cluster.partition(&[0], &[1]);
    cluster.run(0, "truncate t").await;
    cluster.run(0, "insert into t values (1, 'new')").await;
    cluster.run(0, "update u set v = 2 where id = 1").await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    tokio::time::sleep(TRIES).await;
    holder.run("commit").await;
    cluster.wait_value(1, ALL, "1=new").await;
    long.run("rollback").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "1=new").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn what_is_written_here_while_a_truncate_is_tried_again_stays_if_it_is_newer() {
    let (cluster, long) = start("").await;
    let holder = cluster.session(1).await;
    holder.run("begin; select from u where id = 1 for update").await;
    cluster
        .run(
            0,
            "begin; truncate t; insert into t values (1, 'a'); update u set v = 2 where id = 1; commit",
        )
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let here = cluster.session(1).await;
    here.run("set lock_timeout = '10s'; insert into t values (7, 'here')")
        .await;
    tokio::time::sleep(TRIES).await;
    holder.run("commit").await;
    cluster.wait_value(1, ALL, "1=a 7=here").await;
    long.run("rollback").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "1=a 7=here").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn the_line_of_a_row_that_is_lost_to_a_truncate_shows_what_was_lost() {
    let (cluster, long) = start("").await;
    cluster.partition(&[0], &[1]);
    cluster.run(1, "insert into t values (9, 'overrun')").await;
    let holder = cluster.session(1).await;
    holder.run("begin; select from u where id = 1 for update").await;
    cluster
        .run(0, "begin; truncate t; update u set v = 2 where id = 1; commit")
        .await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    // What comes now comes behind a try, and between two others.
    cluster
        .wait_value(
            1,
            "select count(*) > 0 from pg_stat_activity where application_name like 'anabranch:%' and wait_event_type = 'Lock'",
            "t",
        )
        .await;
    tokio::time::sleep(TRIES).await;
    let here = cluster.session(1).await;
    here.run("set lock_timeout = '10s'; update t set v = 'instead' where id = 9")
        .await;
    tokio::time::sleep(TRIES).await;
    holder.run("commit").await;
    cluster.wait_value(1, ALL, "9=instead").await;
    long.run("rollback").await;
    cluster.heal();
    cluster.converge().await;
    let lines = cluster.conflicts_at(1).await;
    let lost = lines.iter().find(|line| line.kind() == "truncate_conflict");
    let shown = lost.expect("the row has a line").everything();
    assert!(shown.contains("overrun") && !shown.contains("instead"), "{shown}");
}

#[tokio::test]
async fn a_truncate_that_a_trigger_keeps_from_deleting_rows_waits_with_an_alarm() {
    let cluster = Cluster::of([15, 15]).schema(TABLES).start().await;
    cluster
        .run(0, "insert into t values (1, 'old'), (5, 'old')")
        .await;
    cluster.converge().await;
    let admin = cluster.admin(1).await;
    admin
        .run(
            "create function stay() returns trigger language plpgsql as $$ begin return null; end $$;
             create trigger stay before delete on t for each row execute function stay();
             alter table t enable always trigger stay",
        )
        .await;
    cluster.partition(&[0], &[1]);
    cluster.run(0, "truncate t").await;
    // It stays, so that the others are deleted one by one.
    cluster.run(1, "insert into t values (7, 'newer')").await;
    cluster.heal();
    until("the trigger is alarmed", async || {
        let alarms = cluster.status_or_null(1).await["alarms"].to_string();
        alarms.contains("kept the row from being written")
    })
    .await;
    admin
        .run("set lock_timeout = '10s'; drop trigger stay on t")
        .await;
    cluster.converge().await;
    cluster.expect(ALL, "7=newer").await;
}

const COUNTER: &str = "create table counter (id int primary key, n int not null, t text)";
const DELTA: &str = "[[table]]\nname = \"public.counter\"\ncolumns = { n = \"delta\" }\n";
const COUNTERS: &str = "select coalesce(string_agg(id || '=' || n, ' ' order by id), 'none') from counter";

async fn counters() -> Cluster {
    let cluster = Cluster::of([15, 15, 18])
        .schema(COUNTER)
        .policy(DELTA)
        .start()
        .await;
    cluster.run(0, "insert into counter values (1, 5), (2, 5)").await;
    cluster.converge().await;
    cluster
}

#[tokio::test]
async fn a_counter_that_its_own_transaction_truncates_is_gone() {
    let cluster = counters().await;
    cluster
        .run(
            0,
            "begin; update counter set n = n + 1 where id = 1; insert into counter values (3, 1); truncate counter; commit",
        )
        .await;
    cluster.converge().await;
    cluster.expect(COUNTERS, "none").await;
    cluster
        .run(
            1,
            "begin; insert into counter values (1, 10); truncate counter; insert into counter values (1, 20); commit",
        )
        .await;
    cluster.converge().await;
    cluster.expect(COUNTERS, "1=20").await;
    let add = "update counter set n = n + 1 where id = 1";
    cluster.apart(&[(0, add), (1, add), (2, add)]).await;
    cluster.expect(COUNTERS, "1=23").await;
    cluster.run(2, "update counter set n = n + 7 where id = 1").await;
    cluster.run(2, "truncate counter").await;
    cluster.converge().await;
    cluster.expect(COUNTERS, "none").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn what_was_added_before_a_truncate_of_the_same_transaction_is_in_no_counter() {
    let cluster = counters().await;
    cluster
        .apart(&[
            (
                0,
                "begin; update counter set n = n + 1 where id = 1; truncate counter; insert into counter values (2, 100); commit",
            ),
            (1, "update counter set n = n + 10 where id = 1"),
            (2, "update counter set n = n + 1000"),
        ])
        .await;
    // The first is what those who did not see the truncate made of it; the second began anew, and was added to.
    cluster.expect(COUNTERS, "1=1015 2=1100").await;
}

#[tokio::test]
async fn a_row_that_its_own_transaction_truncates_is_gone_after_a_restart_too() {
    for policy in [
        "",
        "[[table]]\nname = \"public.t\"\npolicy = \"first_update_wins\"\n",
        "[[table]]\nname = \"public.t\"\npolicy = \"column_merge\"\n",
    ] {
        let (mut cluster, long) = start(policy).await;
        long.run("rollback").await;
        cluster
            .run(
                0,
                "begin; insert into t values (3, 'passing'); truncate t; insert into t values (4, 'stays'); commit",
            )
            .await;
        cluster.arrive_among(&[0, 1], PATIENCE).await;
        cluster.nodes[1].daemon.kill();
        cluster.nodes[1].daemon.start();
        cluster.run(0, "insert into t values (3, 'new')").await;
        cluster.wait_value(1, ALL, "3=new 4=stays").await;
        cluster.heal();
        cluster.converge().await;
        cluster.expect(ALL, "3=new 4=stays").await;
        cluster.expect_no_conflict().await;
    }
}

/// What a node's decoder reads from: stopped, it makes the decoder blind.
async fn sender(cluster: &Cluster, node: usize) -> u32 {
    let slot = "select active_pid from pg_replication_slots where slot_name = 'anabranch'";
    let pid = cluster.value(node, slot).await;
    pid.parse().expect("the daemon reads its slot")
}

#[tokio::test]
async fn a_row_that_comes_in_after_it_was_put_and_truncated_here_does_not_stay() {
    let cluster = Cluster::of([15, 15]).schema(TABLES).start().await;
    cluster.converge().await;
    let sender = sender(&cluster, 1).await;
    // Decided at the second without what is committed there: the decoder is blind.
    process::signal(sender, Signal::STOP);
    cluster.partition(&[0], &[1]);
    cluster.run(0, "insert into t values (1, 'earlier')").await;
    cluster
        .run(
            1,
            "begin; insert into t values (1, 'passing'); truncate t; commit",
        )
        .await;
    cluster.heal();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    process::signal(sender, Signal::CONT);
    cluster.converge().await;
    cluster.expect(ALL, "none").await;
}

#[tokio::test]
async fn a_newer_write_that_meets_a_truncate_here_is_written_and_no_drift() {
    let cluster = Cluster::of([15, 15]).schema(TABLES).start().await;
    cluster
        .run(0, "insert into t values (1, 'old'), (2, 'old'), (3, 'old')")
        .await;
    cluster.converge().await;
    let sender = sender(&cluster, 1).await;
    process::signal(sender, Signal::STOP);
    cluster.partition(&[0], &[1]);
    cluster.run(1, "truncate t").await;
    cluster
        .run(
            0,
            "update t set v = 'newer' where id = 1; delete from t where id = 2",
        )
        .await;
    cluster.heal();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    process::signal(sender, Signal::CONT);
    cluster.converge().await;
    cluster.expect(ALL, "1=newer").await;
}

#[tokio::test]
async fn a_row_that_came_in_behind_a_truncate_does_not_stay_when_the_daemon_is_killed_then() {
    for policy in [
        "",
        "[[table]]\nname = \"public.t\"\npolicy = \"first_update_wins\"\n",
        "[[table]]\nname = \"public.t\"\npolicy = \"column_merge\"\n",
    ] {
        // In one try: a second one could wait for the decoder.
        let mut cluster = Cluster::of([15, 15])
            .schema(TABLES)
            .config("[apply]\nlock_timeout_ms = 20000\n");
        if !policy.is_empty() {
            cluster = cluster.policy(policy);
        }
        let mut cluster = cluster.start().await;
        cluster.converge().await;
        let truncating = cluster.session(1).await;
        truncating.run("begin; truncate t").await;
        cluster.run(0, "insert into t values (1, 'earlier')").await;
        until("the insert waits for the truncate", async || {
            let waits = "select count(*) from pg_locks where relation = 't'::regclass and not granted";
            cluster.admin(1).await.number(waits).await > 0
        })
        .await;
        // From here on the daemon decodes nothing: neither the truncate nor the row behind it.
        let sender = sender(&cluster, 1).await;
        process::signal(sender, Signal::STOP);
        truncating.run("commit").await;
        cluster.wait_value(1, ALL, "1=earlier").await;
        cluster.nodes[1].daemon.kill();
        process::signal(sender, Signal::CONT);
        cluster.nodes[1].daemon.start();
        cluster.converge().await;
        cluster.expect(ALL, "none").await;
        assert_eq!(cluster.conflicts().await.len(), 1, "{policy}");
    }
}

#[tokio::test]
async fn restart_identity_is_of_the_node_that_says_so_and_the_others_empty_the_table_at_once() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table s (id int generated by default as identity primary key, n serial, v text);
             create table r (id serial primary key, v text)",
        )
        .start()
        .await;
    cluster.run(0, "insert into s (v) values ('old'), ('old')").await;
    cluster
        .run(
            1,
            "select nextval('s_id_seq'), nextval('s_n_seq'), nextval('r_id_seq') from generate_series(1, 10)",
        )
        .await;
    cluster.converge().await;
    let files = "select pg_relation_filenode('s') || ' ' || pg_relation_filenode('r')";
    let before = cluster.value(1, files).await;
    cluster.run(0, "truncate s, r restart identity").await;
    cluster.converge().await;
    cluster.expect("select count(*) from s", "0").await;
    // Deleting row by row would keep them.
    let after = cluster.value(1, files).await;
    let both: Vec<(&str, &str)> = before.split(' ').zip(after.split(' ')).collect();
    assert!(both.iter().all(|(before, after)| before != after), "{both:?}");
    for node in cluster.all() {
        cluster.run(node, "insert into s (v) values ('new')").await;
    }
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(concat_ws(' ', id, n), ', ' order by id) from s",
            "1 1, 11 11",
        )
        .await;
    cluster.expect_no_conflict().await;
}
