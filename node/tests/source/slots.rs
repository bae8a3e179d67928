//! The slot: what is refused, and what feedback does to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_node::pg;
use anabranch_node::source::slot::{self, Snapshot};
use anabranch_node::source::{Error, Event, ReplyWanted, Source, Walsender};
use anabranch_proto::Lsn;

use crate::server::{Decoded, PATIENCE, Server, config, next, transaction};

async fn refused(decoded: &Decoded, slot: &str, start: Lsn) -> Error {
    let mut options = decoded.options(start);
    options.slot = slot.to_owned();
    match Source::connect(options, Arc::clone(&decoded.sql)).await {
        Err(error) => error,
        Ok(_) => panic!("slot {slot} was accepted"),
    }
}

#[tokio::test]
async fn a_slot_that_does_not_fit_is_refused_with_a_remedy() {
    let decoded = Decoded::new("").await;
    let error = refused(&decoded, "nowhere", Lsn::ZERO).await;
    assert!(
        matches!(&error, Error::SlotMissing { slot } if slot == "nowhere"),
        "{error:?}"
    );
    assert!(error.to_string().contains("anabranch init"), "{error}");

    decoded
        .run("SELECT pg_create_physical_replication_slot('bytes')")
        .await;
    let error = refused(&decoded, "bytes", Lsn::ZERO).await;
    assert!(
        error
            .to_string()
            .contains("replication slot bytes is a physical slot"),
        "{error}"
    );

    decoded.run("CREATE DATABASE elsewhere").await;
    let other = decoded.server.user("elsewhere").await;
    other
        .batch_execute("SELECT pg_create_logical_replication_slot('far', 'pgoutput')")
        .await
        .unwrap();
    let error = refused(&decoded, "far", Lsn::ZERO).await;
    assert!(
        error.to_string().contains("belongs to another database"),
        "{error}"
    );

    let error = refused(&decoded, "anabranch", Lsn(u64::MAX / 2)).await;
    assert!(matches!(error, Error::StartBeyondWal { .. }), "{error:?}");
}

#[tokio::test]
async fn a_slot_has_one_reader_and_is_free_again_after_it() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    let error = refused(&decoded, "anabranch", Lsn::ZERO).await;
    assert!(matches!(error, Error::SlotInUse { .. }), "{error:?}");
    assert!(error.is_transient());
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("active for PID"),
        "{error:?}"
    );
    decoded.run("INSERT INTO t VALUES (1)").await;
    assert_eq!(transaction(&mut source).await, ["insert t: 1"]);
    drop(source);
    let start = Instant::now();
    let mut source = loop {
        match Source::connect(decoded.options(Lsn::ZERO), Arc::clone(&decoded.sql)).await {
            Ok(source) => break source,
            Err(Error::SlotInUse { .. }) if start.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error:?}"),
        }
    };
    // Nothing was confirmed, so it comes again.
    assert_eq!(transaction(&mut source).await, ["insert t: 1"]);
}

#[tokio::test]
async fn slots_are_created_once_and_dropped() {
    let server = Server::start("");
    let user = server.user("postgres").await;
    let config = config(&server.dsn("postgres"));
    let (sql, _) = pg::connect(&config, "test").await.unwrap();
    let mut walsender = Walsender::connect(&pg::dsn(&config).unwrap(), "test")
        .await
        .unwrap();
    assert_eq!(slot::find(&sql, "s").await.unwrap(), None);
    user.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    let made = walsender.create_slot("s", Snapshot::Export).await.unwrap();
    user.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let snapshot = made.snapshot.unwrap();
    user.batch_execute(&format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{snapshot}'"
    ))
    .await
    .unwrap();
    assert_eq!(
        user.query_one("SELECT count(*) FROM t", &[])
            .await
            .unwrap()
            .get::<_, i64>(0),
        1
    );
    user.batch_execute("COMMIT").await.unwrap();

    let found = slot::require(&sql, "s").await.unwrap();
    assert_eq!(found.confirmed_flush, made.consistent_point);
    assert_eq!((found.active_pid, found.wal_status.as_str()), (None, "reserved"));
    let error = walsender.create_slot("s", Snapshot::Nothing).await.unwrap_err();
    assert!(matches!(error, Error::SlotExists { .. }), "{error:?}");
    slot::drop_if_exists(&sql, "s").await.unwrap();
    slot::drop_if_exists(&sql, "s").await.unwrap();
    assert_eq!(slot::find(&sql, "s").await.unwrap(), None);
    assert!(matches!(
        slot::require(&sql, "s").await,
        Err(Error::SlotMissing { .. })
    ));
}

#[tokio::test]
async fn a_server_that_does_not_log_enough_is_told_so() {
    let server = Server::start("wal_level = replica\nmax_prepared_transactions = 0");
    server.user("postgres").await;
    let dsn = pg::dsn(&config(&server.dsn("postgres"))).unwrap();
    let mut walsender = Walsender::connect(&dsn, "test").await.unwrap();
    let error = walsender.create_slot("s", Snapshot::Nothing).await.unwrap_err();
    assert!(matches!(error, Error::WalLevel(_)), "{error:?}");
}

#[tokio::test]
async fn a_slot_that_lost_its_wal_is_refused() {
    let server =
        Server::start("max_slot_wal_keep_size = '1MB'\nmin_wal_size = '32MB'\nmax_wal_size = '32MB'");
    let user = server.user("postgres").await;
    let config = config(&server.dsn("postgres"));
    let (sql, _) = pg::connect(&config, "test").await.unwrap();
    let mut walsender = Walsender::connect(&pg::dsn(&config).unwrap(), "test")
        .await
        .unwrap();
    walsender.create_slot("s", Snapshot::Nothing).await.unwrap();
    for _ in 0..8 {
        user.batch_execute("SELECT pg_logical_emit_message(false, '', 'x'), pg_switch_wal(); CHECKPOINT")
            .await
            .unwrap();
    }
    let error = slot::require(&sql, "s").await.unwrap_err();
    assert!(
        matches!(&error, Error::SlotLost { slot } if slot == "s"),
        "{error:?}"
    );
}

#[tokio::test]
async fn feedback_moves_the_slot_forward_only_and_never_past_what_was_sent() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1)").await;
    decoded.run("INSERT INTO t VALUES (2)").await;
    let mut ends = Vec::new();
    while ends.len() < 2 {
        if let Event::Commit { commit_end, .. } = next(&mut source).await.unwrap() {
            ends.push(commit_end);
        }
    }
    source
        .feedback(ends[1], ends[0], Lsn::ZERO, ReplyWanted::No)
        .await
        .unwrap();
    reported(&decoded, &mut source, ends[1], ends[0], Lsn::ZERO).await;
    source
        .feedback(Lsn::ZERO, Lsn::ZERO, Lsn(1), ReplyWanted::No)
        .await
        .unwrap();
    reported(&decoded, &mut source, ends[1], ends[0], Lsn(1)).await;
    source
        .feedback(Lsn(u64::MAX), Lsn(u64::MAX), Lsn(u64::MAX), ReplyWanted::No)
        .await
        .unwrap();
    let row = decoded
        .user
        .query_one(
            "SELECT flush_lsn <= sent_lsn, write_lsn <= sent_lsn, replay_lsn <= sent_lsn \
                    FROM pg_stat_replication WHERE application_name = 'anabranch:decode'",
            &[],
        )
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0) && row.get::<_, bool>(1) && row.get::<_, bool>(2));

    // Confirmed is confirmed: a restart begins after it.
    drop(source);
    decoded.run("INSERT INTO t VALUES (3)").await;
    let start = Instant::now();
    while slot::require(&decoded.sql, "anabranch")
        .await
        .unwrap()
        .active_pid
        .is_some()
    {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut source = decoded.source().await;
    assert!(source.slot().confirmed_flush >= ends[1]);
    assert_eq!(transaction(&mut source).await, ["insert t: 3"]);
}

/// Waits until the server shows these positions.
async fn reported(decoded: &Decoded, source: &mut Source, write: Lsn, flush: Lsn, apply: Lsn) {
    let wanted = format!("{write} {flush} {apply} {flush}");
    let query = "SELECT concat_ws(' ', coalesce(write_lsn, '0/0'), flush_lsn, coalesce(replay_lsn, '0/0'), confirmed_flush_lsn) \
        FROM pg_stat_replication r, pg_replication_slots s WHERE r.pid = s.active_pid";
    let start = Instant::now();
    loop {
        let seen: String = decoded.user.query_one(query, &[]).await.unwrap().get(0);
        if seen == wanted {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{seen} instead of {wanted}");
        let _ = tokio::time::timeout(Duration::from_millis(10), source.next()).await;
    }
}

#[tokio::test]
async fn an_idle_slot_is_told_how_far_the_server_has_come() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    decoded.run("DROP PUBLICATION anabranch; CREATE PUBLICATION anabranch FOR TABLE t; CREATE TABLE hidden (id int)").await;
    let mut source = decoded.source().await;
    decoded
        .run("INSERT INTO hidden SELECT generate_series(1, 1000)")
        .await;
    let end = decoded.lsn("pg_current_wal_insert_lsn()").await;
    while source.received() < end {
        let event = tokio::time::timeout(PATIENCE, source.next())
            .await
            .unwrap()
            .unwrap();
        let Event::Keepalive {
            wal_end,
            reply_wanted,
        } = event
        else {
            panic!("{event:?}")
        };
        assert!(wal_end <= source.received());
        if reply_wanted {
            let at = source.received();
            source.feedback(at, at, at, ReplyWanted::No).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_server_that_asks_whether_we_live_is_answered() {
    let server = Server::start("wal_sender_timeout = '2s'");
    let user = server.user("postgres").await;
    user.batch_execute("CREATE PUBLICATION anabranch FOR ALL TABLES; CREATE TABLE t (id int PRIMARY KEY)")
        .await
        .unwrap();
    let config = config(&server.dsn("postgres"));
    let dsn = pg::dsn(&config).unwrap();
    Walsender::connect(&dsn, "test")
        .await
        .unwrap()
        .create_slot("anabranch", Snapshot::Nothing)
        .await
        .unwrap();
    let (sql, _) = pg::connect(&config, "test").await.unwrap();
    let options = anabranch_node::source::SourceOptions {
        dsn,
        slot: "anabranch".to_owned(),
        publication: "anabranch".to_owned(),
        start: Lsn::ZERO,
        policies: std::sync::Arc::default(),
    };
    let mut source = Source::connect(options, Arc::new(sql)).await.unwrap();
    let mut asked = 0;
    while asked < 5 {
        match tokio::time::timeout(PATIENCE, source.next())
            .await
            .unwrap()
            .unwrap()
        {
            Event::Keepalive {
                reply_wanted: true, ..
            } => asked += 1,
            Event::Keepalive { .. } => {}
            event => panic!("{event:?}"),
        }
    }
    user.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    assert_eq!(transaction(&mut source).await, ["insert t: 1"]);
}

#[tokio::test]
async fn the_end_of_the_server_is_an_error_that_passes() {
    let decoded = Decoded::new("").await;
    let mut source = decoded.source().await;
    decoded
        .run("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
        .await;
    let error = next(&mut source).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
}

#[tokio::test]
async fn a_publication_that_is_missing_is_named() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY)").await;
    decoded.run("DROP PUBLICATION anabranch").await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1)").await;
    let error = next(&mut source).await.unwrap_err();
    assert!(
        matches!(&error, Error::PublicationMissing { publication, .. } if publication == "anabranch"),
        "{error:?}"
    );
    assert!(!error.is_transient());
}
