//! Applying beside people at work: their locks, their unfinished transactions, their constraints.

use std::time::Duration;

use anabranch_tests::load::{self, Load};
use anabranch_tests::process::{self, Signal};
use anabranch_tests::wait::{PATIENCE, until};
use anabranch_tests::{Cluster, Postgres};

const ITEMS: &str = "create table item (id int primary key, v text)";
const ALL: &str = "select coalesce(string_agg(id || '=' || v, ' ' order by id), 'none') from item";

async fn with_rows(count: usize) -> Cluster {
    let cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    cluster
        .run(
            0,
            &format!("insert into item select i, 'base' from generate_series(1, {count}) i"),
        )
        .await;
    cluster.converge().await;
    cluster
}

/// The server process that sends the node's changes to its daemon.
async fn walsender(cluster: &Cluster, node: usize) -> u32 {
    let pid = cluster
        .value(
            node,
            "select active_pid from pg_replication_slots where slot_name = 'anabranch'",
        )
        .await;
    pid.parse().expect("the daemon reads its slot")
}

/// Lets the other node's write arrive at node 1 while the decoder there is blind to what was committed.
async fn arrives_while_the_decoder_is_blind(
    local: &str,
    remote: &str,
    local_first: bool,
    expected: &str,
) -> Cluster {
    let cluster = with_rows(1).await;
    let sender = walsender(&cluster, 1).await;
    process::signal(sender, Signal::STOP);
    if local_first {
        cluster.run(1, local).await;
        cluster.run(0, remote).await;
    } else {
        // The remote one is older, but is on its way while the local one is committed.
        cluster.partition(&[0], &[1]);
        cluster.run(0, remote).await;
        cluster.run(1, local).await;
        cluster.heal();
    }
    // Long enough for the write to arrive and, if nothing held it, to be applied over the local one.
    tokio::time::sleep(Duration::from_secs(2)).await;
    process::signal(sender, Signal::CONT);
    cluster.converge().await;
    cluster.expect(ALL, expected).await;
    let log = cluster.conflicts().await;
    assert_eq!(log.len(), 1, "{log:#?}");
    cluster
}

#[tokio::test]
async fn a_local_update_that_is_not_decoded_yet_loses_to_a_later_one_but_is_logged() {
    let (local, remote) = ("update item set v = 'local'", "update item set v = 'remote'");
    arrives_while_the_decoder_is_blind(local, remote, true, "1=remote").await;
}

#[tokio::test]
async fn a_local_update_that_is_not_decoded_yet_is_not_overwritten_by_an_earlier_one() {
    let (local, remote) = ("update item set v = 'local'", "update item set v = 'remote'");
    arrives_while_the_decoder_is_blind(local, remote, false, "1=local").await;
}

#[tokio::test]
async fn a_local_delete_that_is_not_decoded_yet_is_not_undone_by_an_earlier_update() {
    arrives_while_the_decoder_is_blind("delete from item", "update item set v = 'remote'", false, "none")
        .await;
}

#[tokio::test]
async fn a_local_insert_that_is_not_decoded_yet_is_not_overwritten_by_an_earlier_one() {
    let (local, remote) = (
        "insert into item values (2, 'local')",
        "insert into item values (2, 'remote')",
    );
    let cluster = arrives_while_the_decoder_is_blind(local, remote, false, "1=base 2=local").await;
    // Which of two writes is decoded first does not change what they were.
    for node in cluster.all() {
        for line in cluster.conflicts_at(node).await {
            assert_eq!(line.kind(), "insert_exists", "n{}: {line:#?}", node + 1);
        }
    }
}

#[tokio::test]
async fn a_local_delete_and_insert_that_are_not_decoded_yet_are_not_overwritten() {
    let local = "begin; delete from item; insert into item values (1, 'local'); commit";
    arrives_while_the_decoder_is_blind(local, "update item set v = 'remote'", false, "1=local").await;
}

#[tokio::test]
async fn a_local_key_change_that_is_not_decoded_yet_is_kept() {
    let local = "update item set id = 2, v = 'moved'";
    arrives_while_the_decoder_is_blind(local, "update item set v = 'remote'", false, "2=moved").await;
}

#[tokio::test]
async fn a_local_write_of_a_subtransaction_that_is_not_decoded_yet_is_kept() {
    let local = "begin; savepoint a; update item set v = 'local'; release a; commit";
    arrives_while_the_decoder_is_blind(local, "update item set v = 'remote'", false, "1=local").await;
}

#[tokio::test]
async fn asynchronous_commits_are_never_overwritten_unseen() {
    // Commits become visible up to three times this long before they reach the decoder.
    let cluster = Cluster::of([15, 15])
        .schema(load::SCHEMA)
        .conf(1, "wal_writer_delay = 2s")
        .conf(1, "synchronous_commit = off")
        .start()
        .await;
    let options = load::Options {
        clients: 4,
        keys: 30,
        delete_one_in: 10,
        seed: 41,
        ..load::Options::default()
    };
    let load = Load::start(&cluster, &[0, 1], options);
    tokio::time::sleep(Duration::from_secs(8)).await;
    let ledger = load.stop().await;
    cluster.converge().await;
    ledger.account(&cluster).await;
}

#[tokio::test]
async fn savepoints_and_exception_blocks_send_only_what_was_kept() {
    let cluster = with_rows(3).await;
    cluster
        .run(
            0,
            "begin; update item set v = 'kept' where id = 1; savepoint a; update item set v = 'undone' where id = 2; \
             insert into item values (10, 'undone'); rollback to a; insert into item values (11, 'kept'); \
             savepoint b; update item set v = 'kept too' where id = 3; release b; commit",
        )
        .await;
    cluster
        .run(
            1,
            "do $$ begin
                insert into item values (20, 'kept');
                begin insert into item values (21, 'undone'); insert into item values (20, 'violates');
                exception when unique_violation then insert into item values (22, 'from the handler'); end;
             end $$",
        )
        .await;
    cluster
        .run(1, "begin; insert into item values (30, 'undone'); rollback")
        .await;
    cluster.converge().await;
    cluster
        .expect(
            ALL,
            "1=kept 2=base 3=kept too 11=kept 20=kept 22=from the handler",
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn prepared_transactions_arrive_when_they_are_committed() {
    let cluster = with_rows(3).await;
    let session = cluster.session(0).await;
    session.run("begin; update item set v = 'prepared' where id = 1; insert into item values (4, 'prepared'); prepare transaction 'yes'").await;
    session
        .run("begin; update item set v = 'never' where id = 2; prepare transaction 'no'")
        .await;
    session.run("update item set v = 'meanwhile' where id = 3").await;
    cluster.converge().await;
    cluster.expect(ALL, "1=base 2=base 3=meanwhile").await;
    // A write elsewhere of a row that a prepared transaction has locked.
    cluster
        .run(1, "update item set v = 'elsewhere' where id = 2")
        .await;
    session.run("commit prepared 'yes'").await;
    session.run("rollback prepared 'no'").await;
    cluster.converge().await;
    cluster
        .expect(ALL, "1=prepared 2=elsewhere 3=meanwhile 4=prepared")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_prepared_transaction_conflicts_by_its_commit() {
    let cluster = with_rows(1).await;
    let session = cluster.session(0).await;
    session
        .run("begin; update item set v = 'prepared first, committed last'; prepare transaction 'p'")
        .await;
    cluster.partition(&[0], &[1]);
    cluster.run(1, "update item set v = 'between'").await;
    session.run("commit prepared 'p'").await;
    cluster.heal();
    cluster.converge().await;
    cluster.expect(ALL, "1=prepared first, committed last").await;
    assert_eq!(cluster.conflicts().await.len(), 1);
}

#[tokio::test]
async fn copied_rows_arrive() {
    let cluster = with_rows(0).await;
    let lines: String = (1..=5000).map(|id| format!("{id}\tcopied {id}\n")).collect();
    cluster
        .session(0)
        .await
        .copy_in("copy item from stdin", lines)
        .await;
    cluster.converge().await;
    cluster
        .expect("select count(*) || max(v) from item", "5000copied 999")
        .await;
    cluster.expect_no_conflict().await;
}

const FAMILY: &str = "create table parent (id int primary key); \
     create table child (id int primary key, parent int references parent on delete cascade); \
     create table other (id int primary key)";

#[tokio::test]
async fn truncates_of_several_tables_and_with_cascade_arrive() {
    let cluster = Cluster::of([15, 18]).schema(FAMILY).start().await;
    let fill = "insert into parent select i from generate_series(1, 10) i; \
        insert into child select i, i from generate_series(1, 10) i; insert into other select i from generate_series(1, 10) i";
    cluster.run(0, fill).await;
    cluster.converge().await;
    cluster.run(1, "truncate parent cascade").await;
    cluster.converge().await;
    cluster.expect("select (select count(*) from parent) || ',' || (select count(*) from child) || ',' || (select count(*) from other)", "0,0,10").await;
    cluster
        .run(
            1,
            "insert into parent values (1); insert into child values (1, 1)",
        )
        .await;
    cluster.converge().await;
    cluster
        .run(
            0,
            "begin; truncate child, parent, other; insert into parent values (2); commit",
        )
        .await;
    cluster.converge().await;
    cluster.expect("select (select string_agg(id::text, '') from parent) || ',' || (select count(*) from child) || ',' || (select count(*) from other)", "2,0,0").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn foreign_key_actions_arrive_as_what_they_did() {
    let cluster = Cluster::of([15, 15]).schema(FAMILY).start().await;
    cluster
        .run(
            0,
            "insert into parent values (1), (2); insert into child values (1, 1), (2, 1), (3, 2)",
        )
        .await;
    cluster.converge().await;
    cluster.run(1, "delete from parent where id = 1").await;
    cluster.converge().await;
    cluster
        .expect("select string_agg(id::text, ',') from child", "3")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_truncate_behind_rows_that_are_tried_again_is_not_forgotten() {
    let cluster = Cluster::of([15, 18])
        .schema(
            "create table code (id int primary key, v text unique); create table gone (id int primary key)",
        )
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into code values (1, 'a'), (2, 'b'); insert into gone values (1), (2)",
        )
        .await;
    cluster.converge().await;
    cluster.partition(&[0], &[1]);
    // Refused as they come, so that the batch runs again; behind them, in the same one, the truncate.
    let swap = "update code set v = 'c' where id = 1; update code set v = 'a' where id = 2; update code set v = 'b' where id = 1";
    cluster
        .run(
            0,
            &format!("begin; {swap}; truncate gone; insert into gone values (3); commit"),
        )
        .await;
    cluster.heal();
    cluster.converge().await;
    cluster
        .expect("select string_agg(id::text, ',') from gone", "3")
        .await;
    cluster
        .expect("select string_agg(id || v, ',' order by id) from code", "1b,2a")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_truncate_removes_what_it_saw_and_what_is_older_and_nothing_newer() {
    let cluster = with_rows(3).await;
    cluster.partition(&[0], &[1]);
    cluster
        .run(1, "insert into item values (10, 'older than the truncate')")
        .await;
    cluster
        .run(1, "update item set v = 'older update' where id = 1")
        .await;
    cluster.run(0, "truncate item").await;
    cluster
        .run(0, "insert into item values (20, 'after the truncate')")
        .await;
    cluster
        .run(1, "insert into item values (11, 'newer than the truncate')")
        .await;
    cluster
        .run(1, "update item set v = 'newer update' where id = 2")
        .await;
    cluster.heal();
    cluster.converge().await;
    cluster
        .expect(
            ALL,
            "2=newer update 11=newer than the truncate 20=after the truncate",
        )
        .await;
    // What it removed without having seen it is lost, so it is logged.
    for node in cluster.all() {
        let log = cluster.conflicts_at(node).await;
        for lost in ["older than the truncate", "older update"] {
            assert!(
                log.iter().any(|line| line.everything().contains(lost)),
                "{lost} is not logged at n{}: {log:#?}",
                node + 1
            );
        }
    }
}

#[tokio::test]
async fn a_row_that_breaks_a_check_at_one_node_waits_alone_and_is_retried() {
    let cluster = Cluster::of([15, 15, 15])
        .schema("create table t (id int primary key, v int)")
        .schema_of(2, "alter table t add constraint small check (v < 100)")
        .config("[apply]\nquarantine_retry_ms = 500\n")
        .start()
        .await;
    cluster
        .run(
            0,
            "begin; insert into t values (1, 1000); insert into t values (2, 2); commit",
        )
        .await;
    cluster.run(0, "insert into t values (3, 3)").await;
    cluster.run(0, "update t set v = 2000 where id = 1").await;
    cluster.run(1, "insert into t values (4, 4)").await;
    cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
    let all = "select string_agg(id || '=' || v, ' ' order by id) from t";
    cluster.wait_value(0, all, "1=2000 2=2 3=3 4=4").await;
    cluster.wait_value(2, all, "2=2 3=3 4=4").await;
    cluster
        .wait_value(2, "select count(*) > 0 from anabranch.quarantine", "t")
        .await;
    assert!(
        cluster
            .value(2, "select message from anabranch.quarantine")
            .await
            .contains("small")
    );
    assert!(cluster.status(2).await.to_string().contains("quarantine"));
    // Mended: the row comes of itself, with its newest version.
    cluster.run(2, "alter table t drop constraint small").await;
    cluster.wait_value(2, all, "1=2000 2=2 3=3 4=4").await;
    cluster
        .wait_value(2, "select count(*) from anabranch.quarantine", "0")
        .await;
    cluster.converge().await;
    // Of both versions that were refused the log keeps a line, and nobody has to look after it.
    let lines = "select string_agg(remote_tuple->>'v' || ' ' || status || ' by ' || reviewed_by, ', ' order by lost_at) \
                 from anabranch.conflict_history";
    let closed = "1000 acknowledged by anabranch, 2000 acknowledged by anabranch";
    assert_eq!(cluster.value(2, lines).await, closed);
}

#[tokio::test]
async fn a_refused_row_that_then_loses_has_the_line_of_its_loss_at_every_node() {
    let cluster = Cluster::of([15, 15, 15])
        .schema("create table t (id int primary key, v int)")
        .schema_of(2, "alter table t add constraint small check (v < 100)")
        .start()
        .await;
    cluster.run(0, "insert into t values (1, 1)").await;
    cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
    cluster.partition(&[1], &[0, 2]);
    cluster.run(0, "update t set v = 1000 where id = 1").await;
    let refused = "select conflict_type from anabranch.conflict_history";
    cluster.wait_value(2, refused, "check_violation").await;
    cluster.run(1, "update t set v = 50 where id = 1").await;
    cluster.heal();
    cluster.converge().await;
    let lines = "select string_agg(conflict_type || ' ' || status, ', ') from anabranch.conflict_history";
    for node in cluster.all() {
        assert_eq!(
            cluster.value(node, lines).await,
            "update_origin_differs new",
            "n{}",
            node + 1
        );
        let lost = "select case loser when 'local' then local_tuple else remote_tuple end->>'v' from anabranch.conflict_history";
        assert_eq!(cluster.value(node, lost).await, "1000", "n{}", node + 1);
    }
    cluster
        .wait_value(2, "select count(*) from anabranch.quarantine", "0")
        .await;
}

#[tokio::test]
async fn a_value_that_no_server_can_read_back_waits_alone() {
    // PostgreSQL sends an empty tsquery in binary but cannot receive one, here inside an array.
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, q tsquery[])")
        .start()
        .await;
    cluster
        .run(
            0,
            "begin; insert into t values (1, array[''::tsquery]); insert into t values (2, '{}'); commit",
        )
        .await;
    cluster.run(0, "insert into t values (3, '{a}')").await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    let ids = "select string_agg(id::text, ',' order by id) from t";
    cluster.wait_value(1, ids, "2,3").await;
    cluster
        .wait_value(1, "select count(*) from anabranch.quarantine", "1")
        .await;
    // A version that it can read takes the place of the one that waits.
    cluster.run(0, "update t set q = '{b}' where id = 1").await;
    cluster.wait_value(1, ids, "1,2,3").await;
    cluster
        .wait_value(1, "select count(*) from anabranch.quarantine", "0")
        .await;
    cluster.converge().await;
}

#[tokio::test]
async fn a_taken_value_of_a_secondary_unique_key_never_stops_the_stream() {
    let cluster = Cluster::of([15, 15, 18])
        .schema("create table person (id int primary key, email text unique, note text)")
        .start()
        .await;
    cluster.isolate_all();
    cluster
        .run(0, "insert into person values (1, 'same@example.org', 'first')")
        .await;
    cluster
        .run(1, "insert into person values (2, 'same@example.org', 'second')")
        .await;
    cluster
        .run(2, "insert into person values (3, 'other@example.org', 'third')")
        .await;
    cluster.heal();
    cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
    cluster
        .run(0, "insert into person values (4, 'four@example.org', 'after')")
        .await;
    cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
    for node in cluster.all() {
        assert_eq!(
            cluster
                .value(node, "select count(*) from person where id in (3, 4)")
                .await,
            "2",
            "n{}",
            node + 1
        );
        assert_eq!(
            cluster
                .value(
                    node,
                    "select count(*) from person where email = 'same@example.org'"
                )
                .await,
            "1"
        );
        cluster
            .wait_value(node, "select count(*) > 0 from anabranch.conflict_history", "t")
            .await;
    }
    // A deterministic rule: the nodes agree who holds the value.
    cluster.converge().await;
}

#[tokio::test]
async fn in_a_deadlock_with_a_users_session_the_user_goes_on() {
    let cluster = with_rows(2).await;
    let user = cluster.session(1).await;
    user.run("begin; update item set v = 'user' where id = 2").await;
    // Arrives at node 1, takes row 1, waits for row 2.
    cluster.run(0, "begin; update item set v = 'remote' where id = 1; update item set v = 'remote' where id = 2; commit").await;
    cluster
        .wait_value(
            1,
            "select count(*) > 0 from pg_stat_activity where usename = 'anabranch' and wait_event_type = 'Lock'",
            "t",
        )
        .await;
    // Closes the circle. The user's statement must succeed: the apply session gives way.
    user.run("update item set v = 'user' where id = 1").await;
    user.run("commit").await;
    cluster.converge().await;
    // The user's writes and the remote ones did not see each other; the user's committed later.
    cluster.expect(ALL, "1=user 2=user").await;
}

#[tokio::test]
async fn tables_are_locked_in_the_order_in_which_they_were_written() {
    let cluster = Cluster::of([15, 15])
        .schema("create table branch (id int primary key, v text); create table teller (id int primary key, v text)")
        .start()
        .await;
    // Whoever numbers tables has met `branch` first.
    cluster
        .run(
            0,
            "insert into branch values (1, 'base'); insert into teller values (1, 'base')",
        )
        .await;
    cluster.converge().await;
    let user = cluster.session(1).await;
    user.run("begin; update teller set v = 'user' where id = 1").await;
    cluster
        .run(
            0,
            "begin; update teller set v = 'remote' where id = 1; update branch set v = 'remote' where id = 1; commit",
        )
        .await;
    // Each time that the applier waits for the row, it has no lock on what comes after that: else both would wait for each other,
    // and every try would end like this while users go on.
    let other = cluster.session(1).await;
    for _ in 0..5 {
        cluster
            .wait_value(
                1,
                "select count(*) > 0 from pg_stat_activity where usename = 'anabranch' and wait_event_type = 'Lock'",
                "t",
            )
            .await;
        other
            .run("select from branch where id = 1 for update nowait")
            .await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    user.run("update branch set v = 'user' where id = 1; commit")
        .await;
    cluster.converge().await;
    // The user's transaction committed later, and had not seen the other.
    cluster.expect("select v from branch", "user").await;
    cluster.expect("select v from teller", "user").await;
}

async fn a_user_may_hold_a_row_lock_for(long: Duration) {
    let cluster = with_rows(2).await;
    let user = cluster.session(1).await;
    user.run("begin; select from item where id = 1 for update").await;
    cluster.run(0, "update item set v = 'waits' where id = 1").await;
    let held = tokio::time::Instant::now();
    let mut writes = 0;
    while held.elapsed() < long {
        // Nobody is thrown out, and the other direction flows.
        user.run("select 1").await;
        let at_other = cluster.session(1).await;
        at_other.run("update item set v = v || '.' where id = 2").await;
        writes += 1;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let all = format!("base{}", ".".repeat(writes));
    cluster
        .wait_value(0, "select v from item where id = 2", &all)
        .await;
    assert_eq!(user.value("select v from item where id = 1").await, "base");
    user.run("commit").await;
    cluster.converge().await;
    cluster.expect("select v from item where id = 1", "waits").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_user_may_hold_a_row_lock_for_longer_than_the_applier_waits() {
    // Of `apply.lock_timeout_ms` some.
    a_user_may_hold_a_row_lock_for(Duration::from_secs(4)).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_user_may_hold_a_row_lock_for_a_minute() {
    a_user_may_hold_a_row_lock_for(Duration::from_secs(60)).await;
}

#[tokio::test]
async fn a_long_transaction_at_the_receiver_makes_nothing_wrong() {
    let cluster = with_rows(100).await;
    let long = cluster.session(1).await;
    long.run("begin; insert into item values (1000, 'long')").await;
    for round in 0..5 {
        cluster
            .run(0, &format!("update item set v = 'round {round}' where id <= 100"))
            .await;
        cluster
            .run(
                1,
                &format!("update item set v = v || '+' where id = {}", round + 1),
            )
            .await;
    }
    cluster.converge().await;
    long.run("commit").await;
    cluster.converge().await;
    cluster.expect("select v from item where id = 1000", "long").await;
    // Only the other node's last write came after that of round 4.
    cluster
        .expect("select count(*) from item where v = 'round 4'", "99")
        .await;
    cluster
        .expect("select count(*) from item where id = 5 and v like '%+'", "1")
        .await;
}

#[tokio::test]
async fn the_daemons_own_sessions_may_be_ended_at_any_time() {
    let cluster = with_rows(100).await;
    for round in 0..10 {
        cluster
            .run(0, &format!("update item set v = 'round {round}'"))
            .await;
        for node in cluster.all() {
            cluster
                .admin(node)
                .await
                .run("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'anabranch'")
                .await;
        }
    }
    cluster.converge().await;
    cluster
        .expect("select count(*) from item where v = 'round 9'", "100")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn triggers_and_foreign_keys_do_not_run_a_second_time() {
    let cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .schema(
            "create table audit (id uuid primary key default gen_random_uuid(), what text);
             create function note() returns trigger language plpgsql as $$ begin
                insert into audit (what) values (tg_op); return new; end $$;
             create trigger noted after insert or update on item for each row execute function note()",
        )
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.run(1, "insert into item values (2, 'y')").await;
    cluster.converge().await;
    cluster.expect("select count(*) from audit", "2").await;
}

/// A physical standby of the first server, for which its commits wait.
async fn synchronous_standby(cluster: &mut Cluster) -> Postgres {
    let mut standby = Postgres::standby_of(&cluster.nodes[0].server, &cluster.dir().join("standby"));
    standby.start().await;
    let primary = &mut cluster.nodes[0].server;
    primary.set_conf(&["synchronous_standby_names = 'standby'"]);
    primary.reload().await;
    let sync =
        "select count(*) from pg_stat_replication where application_name = 'standby' and sync_state = 'sync'";
    cluster.wait_value(0, sync, "1").await;
    standby
}

#[tokio::test]
async fn a_commit_that_waits_for_a_synchronous_standby_is_not_seen_elsewhere_first() {
    let mut cluster = with_rows(1).await;
    // Which then stops answering.
    let standby = synchronous_standby(&mut cluster).await;
    let admin = cluster.admin(0).await;
    cluster.run(0, "update item set v = 'the standby answers'").await;
    cluster.converge().await;

    let receiver = standby_process(&standby, "walreceiver").await;
    process::signal(receiver, Signal::STOP);
    let waiting = cluster.session(0).await;
    let commit =
        tokio::spawn(async move { waiting.run("update item set v = 'waits for the standby'").await });
    until("the commit waits", async || {
        admin
            .number("select count(*) from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app'")
            .await
            == 1
    })
    .await;
    // Invisible here, so it must be nowhere else, however long it takes.
    for _ in 0..30 {
        let here = admin.value("select v from item").await;
        let there = cluster.value(1, "select v from item").await;
        assert!(
            here == "waits for the standby" || there == "the standby answers",
            "the other node shows `{there}` while `{here}` is what its origin shows"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    process::signal(receiver, Signal::CONT);
    commit.await.expect("the commit returns");
    cluster
        .wait_value(1, "select v from item", "waits for the standby")
        .await;
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}

/// What node 1 shows of the rows 1 and 2.
async fn both_rows(cluster: &Cluster) -> (String, String) {
    let session = cluster.session(0).await;
    let row = session
        .value("select string_agg(v, ' | ' order by id) from item where id <= 2")
        .await;
    let (first, second) = row.split_once(" | ").expect("two rows");
    (first.to_owned(), second.to_owned())
}

#[tokio::test]
async fn what_loses_to_a_commit_that_waits_for_a_standby_is_not_half_seen_before_it() {
    let mut cluster = with_rows(2).await;
    let standby = synchronous_standby(&mut cluster).await;
    let admin = cluster.admin(0).await;
    cluster.converge().await;

    // Ours holds the first row, so theirs, which is applied here, waits for it.
    let waiting = cluster.session(0).await;
    waiting.run("begin").await;
    waiting.run("update item set v = 'ours' where id = 1").await;
    cluster.run(1, "update item set v = 'theirs' where id <= 2").await;
    let count = async |what: &str| {
        admin
            .number(&format!("select count(*) from pg_stat_activity where {what}"))
            .await
    };
    until("the applier waits for the row", async || {
        count("wait_event_type = 'Lock' and usename = 'anabranch'").await == 1
    })
    .await;
    // Ours is later, so it wins, and nobody may see it yet.
    let receiver = standby_process(&standby, "walreceiver").await;
    process::signal(receiver, Signal::STOP);
    let commit = tokio::spawn(async move { waiting.run("commit").await });
    until("the commit waits", async || {
        count("wait_event = 'SyncRep' and usename = 'app'").await == 1
    })
    .await;
    // Theirs lost the first row to ours: with their second row must come ours.
    until("the applier waits for ours to be seen", async || {
        let rows = both_rows(&cluster).await;
        assert_ne!(
            rows,
            ("base".to_owned(), "theirs".to_owned()),
            "half of a transaction is seen"
        );
        let status = cluster.status(0).await;
        let text = status["apply"]["waiting_for"].as_str().unwrap_or_default();
        text.contains("not visible yet")
    })
    .await;
    process::signal(receiver, Signal::CONT);
    commit.await.expect("the commit returns");
    cluster.converge().await;
    assert_eq!(
        both_rows(&cluster).await,
        ("ours".to_owned(), "theirs".to_owned())
    );
    assert_eq!(cluster.conflicts().await.len(), 1);
}

/// A commit is decoded, and sent, before others see it, if only by a moment: here a standby that does not exist is waited for from that very
/// moment on, and the daemon learns of it when the commit is on its way.
#[tokio::test]
async fn what_answers_a_commit_is_not_seen_before_it() {
    let mut cluster = with_rows(2).await;
    let (here, there) = (cluster.admin(0).await, cluster.admin(1).await);
    let waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app'";
    let mut tries = 0;
    let (ours, commit) = loop {
        tries += 1;
        assert!(
            tries < 60,
            "no commit was sent before the daemon knew that it waits"
        );
        let ours = format!("ours {tries}");
        let update = format!("update item set v = '{ours}' where id = 1");
        let waiting = cluster.session(0).await;
        let server = &mut cluster.nodes[0].server;
        server.set_conf(&["synchronous_standby_names = 'nobody'"]);
        here.run("select pg_reload_conf()").await;
        let commit = tokio::spawn(async move { waiting.run(&update).await });
        let mut is_sent = false;
        for _ in 0..10 {
            is_sent = there.value("select v from item where id = 1").await == ours;
            if is_sent {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if is_sent && here.number(waits).await == 1 {
            break (ours, commit);
        }
        cluster.let_commits_go(0).await;
        commit.await.expect("the commit returns");
        cluster
            .wait_value(1, "select v from item where id = 1", &ours)
            .await;
    };
    cluster.run(1, "update item set v = 'answer' where id = 2").await;
    until("the applier waits for ours to be seen", async || {
        let rows = both_rows(&cluster).await;
        assert!(
            rows.0 == ours || rows.1 == "base",
            "the answer is seen before what it answers: {rows:?}"
        );
        let status = cluster.status(0).await;
        let text = status["apply"]["waiting_for"].as_str().unwrap_or_default();
        text.contains("not visible yet")
    })
    .await;
    cluster.let_commits_go(0).await;
    commit.await.expect("the commit returns");
    cluster.converge().await;
    assert_eq!(both_rows(&cluster).await, (ours, "answer".to_owned()));
    cluster.expect_no_conflict().await;
}

/// A remote DELETE waits for commits that nobody sees yet, which may have written its row, and not for those that come while it does.
#[tokio::test]
async fn a_delete_does_not_wait_for_commits_that_come_while_it_waits() {
    let mut cluster = with_rows(1).await;
    let here = cluster.admin(0).await;
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app'";
    // The DELETE is later, so it wins over what it has not seen; its row is locked and looked at first.
    cluster.partition(&[0], &[1]);
    cluster.run(0, "update item set v = 'ours'").await;
    cluster.wait_decoded(0).await;
    cluster.run(1, "delete from item").await;
    let server = &mut cluster.nodes[0].server;
    server.set_conf(&["synchronous_standby_names = 'nobody'"]);
    server.reload().await;
    cluster.wait_decoded(0).await;
    let session = cluster.session(0).await;
    let first_pid = session.backend_pid().await;
    let first = tokio::spawn(async move { session.run("insert into item values (10, 'first')").await });
    until("the first commit waits", async || here.number(waiting).await == 1).await;
    cluster.wait_decoded(0).await;
    cluster.heal();
    until("the applier waits for it", async || {
        let status = cluster.status(0).await;
        let text = status["apply"]["waiting_for"].as_str().unwrap_or_default();
        text.contains("not visible yet")
    })
    .await;
    let session = cluster.session(0).await;
    let second = tokio::spawn(async move { session.run("insert into item values (11, 'second')").await });
    until("the second commit waits", async || {
        here.number(waiting).await == 2
    })
    .await;
    cluster.wait_decoded(0).await;
    here.run(&format!("select pg_cancel_backend({first_pid})")).await;
    first.await.expect("the first commit returns");
    cluster
        .wait_value(0, "select count(*) from item where id = 1", "0")
        .await;
    assert_eq!(here.number(waiting).await, 1, "the second commit waits still");
    cluster.let_commits_go(0).await;
    second.await.expect("the second commit returns");
    cluster.converge().await;
    cluster.expect(ALL, "10=first 11=second").await;
}

async fn standby_process(standby: &Postgres, kind: &str) -> u32 {
    let session = standby
        .try_session("postgres", "postgres")
        .await
        .expect("connect to the standby");
    let pid = session
        .value(&format!(
            "select pid from pg_stat_activity where backend_type = '{kind}'"
        ))
        .await;
    pid.parse().expect("the process runs")
}

#[tokio::test]
async fn a_lost_version_is_logged_as_it_was_though_a_later_local_write_stands_in_its_place() {
    let cluster = with_rows(1).await;
    cluster.partition(&[0], &[1]);
    let local = cluster.session(1).await;
    let xid = local
        .value("update item set v = 'what lost' where id = 1 returning xmin::text")
        .await;
    // Its decoder has met it, and what is to come it has not.
    until("the write is decoded", async || {
        let decoded = cluster.status(1).await["positions"]["decoded_lsn"]
            .as_str()
            .unwrap_or("0/0")
            .to_owned();
        let sql = format!("select '{decoded}'::pg_lsn >= pg_current_wal_flush_lsn()");
        cluster.value(1, &sql).await == "t"
    })
    .await;
    cluster
        .run(0, "update item set v = 'what won' where id = 1")
        .await;
    let sender = walsender(&cluster, 1).await;
    process::signal(sender, Signal::STOP);
    local.run("update item set v = 'not decoded' where id = 1").await;
    cluster.heal();
    // The winner is decided on while the decoder is blind, and waits for it with the row locked. (Heartbeats are applied before it,
    // in transactions that do not touch the table.)
    until("the winner waits for the decoder", async || {
        let sql = "select count(*) from pg_locks where relation = 'item'::regclass and granted and pid in \
                   (select pid from pg_stat_activity where usename = 'anabranch' and state = 'idle in transaction')";
        cluster.value(1, sql).await != "0"
    })
    .await;
    process::signal(sender, Signal::CONT);
    cluster.converge().await;
    let shown = format!(
        "select coalesce(string_agg(distinct local_tuple ->> 'v', ','), 'no line') from anabranch.conflict_history \
         where loser = 'local' and local_xid = {xid}"
    );
    assert_eq!(cluster.value(1, &shown).await, "what lost");
}

#[tokio::test]
async fn what_is_cancelled_anywhere_in_an_apply_transaction_never_passes_for_a_local_write() {
    let cluster = with_rows(1).await;
    // A BEGIN that is cancelled must not let what was sent behind it be transactions of its own.
    let storm = "do $$ begin for i in 1..1500 loop perform pg_stat_clear_snapshot(); \
                 perform pg_cancel_backend(pid) from pg_stat_activity where application_name = 'anabranch:apply'; \
                 perform pg_sleep(random() * 0.004); end loop; end $$";
    let writes = "do $$ begin for i in 2..2001 loop insert into item values (i, 'new'); commit; \
                  perform pg_sleep(0.001); end loop; end $$";
    let before = cluster.status(1).await["apply"]["local_txns"].clone();
    let (admin, writer) = (cluster.admin(1).await, cluster.session(0).await);
    tokio::join!(admin.run(storm), writer.run(writes));
    cluster
        .wait_value(1, "select count(*) from item where v = 'new'", "2000")
        .await;
    let after = cluster.status(1).await["apply"].clone();
    assert!(after["retries"].as_u64() > Some(10), "{after}");
    assert_eq!(after["local_txns"], before, "{after}");
    cluster.converge().await;
    cluster.expect_no_conflict().await;
}
