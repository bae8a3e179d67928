//! What statements become.

use std::time::Duration;

use anabranch_node::source::{Error, Event};
use anabranch_proto::Lsn;

use crate::server::{Decoded, next, transaction};

#[tokio::test]
async fn every_change_of_a_transaction_arrives_in_order() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1, 'a'), (2, NULL)").await;
    decoded
        .run("BEGIN; UPDATE t SET v = 'b' WHERE id = 1; DELETE FROM t WHERE id = 2; COMMIT")
        .await;
    assert_eq!(
        transaction(&mut source).await,
        ["insert t: 1, a", "insert t: 2, NULL"]
    );
    assert_eq!(transaction(&mut source).await, ["update t: 1, b", "delete t: 2"]);
}

#[tokio::test]
async fn begin_and_commit_tell_position_time_and_xid() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    let mut last = Lsn::ZERO;
    for id in 0..3 {
        let sql = format!(
            "INSERT INTO t VALUES ({id}) RETURNING pg_current_xact_id()::text, \
            (extract(epoch FROM clock_timestamp()) * 1000000)::int8"
        );
        let row = decoded.user.query_one(&sql, &[]).await.unwrap();
        let (xid, clock_us): (String, i64) = (row.get(0), row.get(1));
        let after = decoded.lsn("pg_current_wal_insert_lsn()").await;
        let Event::Begin {
            commit_start,
            commit_us,
            xid: seen,
        } = next(&mut source).await.unwrap()
        else {
            panic!("no begin")
        };
        assert_eq!(seen.to_string(), xid);
        assert!(
            (commit_us - clock_us).abs() < 60_000_000,
            "{commit_us} {clock_us}"
        );
        assert!(matches!(next(&mut source).await.unwrap(), Event::Change(_)));
        let end = next(&mut source).await.unwrap();
        let Event::Commit {
            commit_start: start,
            commit_end,
            commit_us: us,
        } = end
        else {
            panic!("no commit")
        };
        assert_eq!((start, us), (commit_start, commit_us));
        assert!(
            last <= start && start < commit_end && commit_end <= after,
            "{last} {start} {commit_end} {after}"
        );
        assert!(source.received() >= commit_end);
        last = commit_end;
    }
}

#[tokio::test]
async fn transactions_come_in_commit_order_and_whole() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    let other = decoded.server.user("postgres").await;
    decoded.run("BEGIN; INSERT INTO t VALUES (1)").await;
    other
        .batch_execute("BEGIN; INSERT INTO t VALUES (2)")
        .await
        .unwrap();
    decoded.run("INSERT INTO t VALUES (3)").await;
    other
        .batch_execute("INSERT INTO t VALUES (4); COMMIT")
        .await
        .unwrap();
    decoded.run("INSERT INTO t VALUES (5); COMMIT").await;
    assert_eq!(transaction(&mut source).await, ["insert t: 2", "insert t: 4"]);
    assert_eq!(
        transaction(&mut source).await,
        ["insert t: 1", "insert t: 3", "insert t: 5"]
    );
}

#[tokio::test]
async fn what_a_savepoint_takes_back_never_arrives() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    decoded
        .run(
            "BEGIN; INSERT INTO t VALUES (1); SAVEPOINT a; INSERT INTO t VALUES (2); ROLLBACK TO a; \
             SAVEPOINT b; INSERT INTO t VALUES (3); RELEASE b; COMMIT; \
             BEGIN; INSERT INTO t VALUES (4); ROLLBACK; INSERT INTO t VALUES (5)",
        )
        .await;
    assert_eq!(transaction(&mut source).await, ["insert t: 1", "insert t: 3"]);
    assert_eq!(transaction(&mut source).await, ["insert t: 5"]);
}

#[tokio::test]
async fn a_prepared_transaction_arrives_when_it_commits() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    decoded
        .run("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'p'")
        .await;
    decoded
        .run("BEGIN; INSERT INTO t VALUES (9); PREPARE TRANSACTION 'q'")
        .await;
    decoded.run("INSERT INTO t VALUES (2)").await;
    decoded.run("COMMIT PREPARED 'p'").await;
    decoded.run("ROLLBACK PREPARED 'q'").await;
    decoded.run("INSERT INTO t VALUES (3)").await;
    for wanted in ["insert t: 2", "insert t: 1", "insert t: 3"] {
        assert_eq!(transaction(&mut source).await, [wanted]);
    }
}

#[tokio::test]
async fn a_moved_row_tells_its_former_key() {
    for identity in ["DEFAULT", "FULL"] {
        let decoded = Decoded::new(&format!(
            "CREATE TABLE t (id int, v text, part int, PRIMARY KEY (part, id)); \
             ALTER TABLE t REPLICA IDENTITY {identity}; INSERT INTO t VALUES (1, 'a', 7)"
        ))
        .await;
        let mut source = decoded.source().await;
        decoded.run("UPDATE t SET v = 'b', id = 1").await;
        decoded.run("UPDATE t SET id = 2").await;
        decoded.run("DELETE FROM t").await;
        assert_eq!(transaction(&mut source).await, ["update t: 1, b, 7"]);
        assert_eq!(transaction(&mut source).await, ["update t: 2, b, 7 from 7, 1"]);
        assert_eq!(transaction(&mut source).await, ["delete t: 7, 2"]);
    }
}

#[tokio::test]
async fn a_key_that_is_written_differently_is_not_moved() {
    let decoded = Decoded::new("CREATE TABLE t (id numeric PRIMARY KEY); INSERT INTO t VALUES (1.0)").await;
    let mut source = decoded.source().await;
    decoded.run("UPDATE t SET id = 1.00").await;
    decoded.run("UPDATE t SET id = 1.01").await;
    let one = transaction(&mut source).await;
    assert!(one.len() == 1 && !one[0].contains("from"), "{one:?}");
    let two = transaction(&mut source).await;
    assert!(two.len() == 1 && two[0].contains("from"), "{two:?}");
}

#[tokio::test]
async fn untouched_values_out_of_line_are_filled_from_the_former_row() {
    let decoded = Decoded::new(
        "CREATE TABLE t (id int PRIMARY KEY, big text, n int, gap text); \
         ALTER TABLE t ALTER big SET STORAGE EXTERNAL, REPLICA IDENTITY FULL; \
         INSERT INTO t VALUES (1, repeat('x', 9000), 0, NULL)",
    )
    .await;
    let mut source = decoded.source().await;
    decoded
        .run("UPDATE t SET n = 1; UPDATE t SET id = 2; UPDATE t SET big = 'small'")
        .await;
    // One simple query is one transaction.
    assert_eq!(
        transaction(&mut source).await,
        [
            "update t: 1, 9000 bytes of text, 1, NULL",
            "update t: 2, 9000 bytes of text, 1, NULL from 1",
            "update t: 2, small, 1, NULL",
        ]
    );
}

#[tokio::test]
async fn an_untouched_key_out_of_line_is_filled_too() {
    // Past about 2.7 kB no index takes a value, and below 2 kB none goes out of line, unless told to.
    let decoded = Decoded::new(
        "CREATE TABLE t (id text PRIMARY KEY, n int) WITH (toast_tuple_target = 128); \
         ALTER TABLE t ALTER id SET STORAGE EXTERNAL; \
         INSERT INTO t VALUES (repeat('k', 2200), 0)",
    )
    .await;
    let mut source = decoded.source().await;
    decoded.run("UPDATE t SET n = 1").await;
    assert_eq!(
        transaction(&mut source).await,
        ["update t: 2200 bytes of text, 1"]
    );
}

#[tokio::test]
async fn a_value_that_is_not_in_the_log_is_an_error_that_stays() {
    let decoded = Decoded::new(
        "CREATE TABLE t (id int PRIMARY KEY, big text, n int); \
         ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
         INSERT INTO t VALUES (1, repeat('x', 9000), 0)",
    )
    .await;
    let mut source = decoded.source().await;
    decoded.run("UPDATE t SET n = 1").await;
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    for _ in 0..3 {
        let error = next(&mut source).await.unwrap_err();
        assert!(
            matches!(&error, Error::ToastNotLogged { table, column } if table == "public.t" && column == "big"),
            "{error:?}"
        );
        assert!(
            error
                .to_string()
                .contains("ALTER TABLE public.t REPLICA IDENTITY FULL"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn one_truncate_of_several_tables_is_one_change() {
    let decoded = Decoded::new(
        "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); \
         CREATE TABLE c (id int PRIMARY KEY REFERENCES b)",
    )
    .await;
    let mut source = decoded.source().await;
    decoded.run("TRUNCATE a, b RESTART IDENTITY CASCADE").await;
    decoded.run("TRUNCATE a").await;
    assert_eq!(
        transaction(&mut source).await,
        ["truncate a b c cascade=true restart=true"]
    );
    assert_eq!(
        transaction(&mut source).await,
        ["truncate a cascade=false restart=false"]
    );
}

#[tokio::test]
async fn messages_arrive_at_their_place() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    decoded
        .run(
            "BEGIN; INSERT INTO t VALUES (1); SELECT pg_logical_emit_message(true, 'p', 'x'); \
             INSERT INTO t VALUES (2); COMMIT",
        )
        .await;
    decoded
        .run("SELECT pg_logical_emit_message(false, 'q', 'y')")
        .await;
    assert_eq!(
        transaction(&mut source).await,
        [
            "insert t: 1",
            "message p b\"x\" transactional=true",
            "insert t: 2"
        ]
    );
    let event = next(&mut source).await.unwrap();
    assert!(
        matches!(&event, Event::Message { prefix, transactional: false, .. } if prefix == "q"),
        "{event:?}"
    );
}

#[tokio::test]
async fn a_large_transaction_streams_through_in_order() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let mut source = decoded.source().await;
    decoded
        .run("INSERT INTO t SELECT i, repeat('v', 20) FROM generate_series(0, 99999) i")
        .await;
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    let (mut rows, mut from_memory) = (0i32, 0);
    loop {
        let event = match source.buffered().unwrap() {
            Some(event) => {
                from_memory += 1;
                event
            }
            None => next(&mut source).await.unwrap(),
        };
        match event {
            Event::Change(change) => {
                assert_eq!(
                    crate::server::show(&change),
                    format!("insert t: {rows}, {}", "v".repeat(20))
                );
                rows += 1;
            }
            Event::Commit { .. } => break,
            Event::Keepalive { .. } => {}
            event => panic!("{event:?}"),
        }
    }
    assert_eq!(rows, 100_000);
    // How many depends on how the server's writes and our reads fall together.
    assert!(from_memory > 0, "every event was waited for");
}

#[tokio::test]
async fn giving_up_waiting_loses_nothing() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let mut source = decoded.source().await;
    let user = decoded.server.user("postgres").await;
    let writer = tokio::spawn(async move {
        for id in 0..200 {
            let big = if id % 20 == 0 { 1_000_000 } else { 10 };
            let sql = format!("INSERT INTO public.t VALUES ({id}, repeat('x', {big}))");
            user.batch_execute(&sql).await.unwrap();
        }
    });
    let mut rows = 0;
    let mut given_up = 0;
    let started = std::time::Instant::now();
    while rows < 200 {
        assert!(started.elapsed() < crate::server::PATIENCE, "stuck at row {rows}");
        let waited = tokio::select! {
            biased;
            event = source.next() => Some(event.unwrap()),
            () = tokio::task::yield_now() => None,
        };
        match waited {
            Some(Event::Change(change)) => {
                let shown = crate::server::show(&change);
                assert!(shown.starts_with(&format!("insert t: {rows}, ")), "{shown}");
                rows += 1;
            }
            Some(_) => {}
            None => given_up += 1,
        }
        if given_up % 50 == 1 {
            let at = source.received();
            let wait = source.feedback(at, Lsn::ZERO, Lsn::ZERO, anabranch_node::source::ReplyWanted::Yes);
            let _ = tokio::time::timeout(Duration::ZERO, wait).await;
        }
    }
    writer.await.unwrap();
    assert!(given_up > 100, "{given_up}");
}
