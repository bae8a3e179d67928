//! Tables: keys, types, and what has become of them since.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_node::pg;
use anabranch_node::source::{Error, Event, Source};
use anabranch_proto::row::Cell;
use anabranch_proto::schema::TableDesc;
use anabranch_proto::txn::Change;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::server::{Decoded, PATIENCE, next, transaction};

/// The table of the next change.
async fn table(source: &mut Source) -> Arc<TableDesc> {
    loop {
        if let Event::Change(Change::Put { table, .. } | Change::Delete { table, .. }) =
            next(source).await.unwrap()
        {
            return table;
        }
    }
}

fn key(table: &TableDesc) -> Vec<&str> {
    table.key_columns().map(|column| column.name.as_str()).collect()
}

#[tokio::test]
async fn columns_carry_qualified_types_and_the_best_image_there_is() {
    let decoded = Decoded::new(
        "CREATE SCHEMA \"Odd.One\"; CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN positive AS int CHECK (value > 0); \
         CREATE TYPE pair AS (a int, b text); CREATE TYPE span AS RANGE (subtype = int4); \
         CREATE TYPE \"Odd.One\".\"Enum\" AS ENUM ('x'); \
         CREATE TABLE t (id int PRIMARY KEY, mood mood, positive positive, pair pair, span span, ints int[], \
            moods mood[], odd \"Odd.One\".\"Enum\", acl aclitem, name varchar(7), amount numeric(10,2), at timestamptz)",
    )
    .await;
    let mut source = decoded.source().await;
    decoded
        .run(
            "INSERT INTO t VALUES (1, 'sad', 3, (1, 'x'), '[1,2)', '{1,2}', '{sad,happy}', 'x', 'postgres=r/postgres', \
             'name', 1.5, now())",
        )
        .await;
    let (table, row) = loop {
        if let Event::Change(Change::Put { table, row, .. }) = next(&mut source).await.unwrap() {
            break (table, row);
        }
    };
    let types = table
        .columns
        .iter()
        .map(|column| (column.name.as_str(), column.type_name.as_str()));
    let types = types.collect::<HashMap<_, _>>();
    for (column, name) in [
        ("id", "pg_catalog.int4"),
        ("mood", "public.mood"),
        ("positive", "public.positive"),
        ("pair", "public.pair"),
        ("span", "public.span"),
        ("ints", "pg_catalog._int4"),
        ("moods", "public._mood"),
        ("odd", "\"Odd.One\".\"Enum\""),
        ("acl", "pg_catalog.aclitem"),
        ("name", "pg_catalog.varchar"),
        ("amount", "pg_catalog.numeric"),
        ("at", "pg_catalog.timestamptz"),
    ] {
        assert_eq!(types[column], name);
        // Every name can be used as it stands.
        decoded.run(&format!("SELECT NULL::{name}")).await;
    }
    assert_eq!(table.columns[9].type_mod, 11);
    let version = decoded.version().await;
    for (cell, column) in row.cells().zip(&table.columns) {
        // aclitem has no binary output before 16.
        if column.name == "acl" && version < 160_000 {
            assert_eq!(cell, Cell::Text(b"postgres=r/postgres"));
        } else {
            assert!(matches!(cell, Cell::Binary(_)), "{column:?} {cell:?}");
        }
    }
    assert_eq!(row.cells().nth(1), Some(Cell::Binary(b"sad")));
    assert_eq!(row.cells().nth(2), Some(Cell::Binary(&3i32.to_be_bytes())));
}

#[tokio::test]
async fn an_image_that_cannot_be_had_in_binary_is_told_apart() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY, acls aclitem[])").await;
    let version = decoded.version().await;
    let mut source = decoded.source().await;
    decoded
        .run("INSERT INTO t VALUES (1, '{postgres=r/postgres}')")
        .await;
    let outcome = loop {
        match next(&mut source).await {
            Ok(Event::Begin { .. }) => {}
            other => break other,
        }
    };
    if version < 160_000 {
        assert!(matches!(outcome, Err(Error::NoBinaryOutput(_))), "{outcome:?}");
    } else {
        assert!(matches!(outcome, Ok(Event::Change(_))), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_key_is_the_primary_key_in_its_own_order() {
    let decoded = Decoded::new(
        "CREATE TABLE t (a int, b int, c int, d int, PRIMARY KEY (c, a) INCLUDE (d)); \
         ALTER TABLE t REPLICA IDENTITY FULL",
    )
    .await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1, 2, 3, 4)").await;
    let first = table(&mut source).await;
    assert_eq!((key(&first), first.identity_full), (vec!["c", "a"], true));
    decoded.run("ANALYZE t; UPDATE t SET b = 5").await;
    let second = table(&mut source).await;
    assert!(
        Arc::ptr_eq(&first, &second),
        "an unchanged table is described once"
    );
    decoded
        .run("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (b); DELETE FROM t")
        .await;
    let third = table(&mut source).await;
    assert_eq!(key(&third), ["b"]);
    decoded
        .run("ALTER TABLE t ADD e text; INSERT INTO t (a, b, c) VALUES (1, 2, 3)")
        .await;
    assert_eq!(table(&mut source).await.columns.len(), 5);
}

#[tokio::test]
async fn a_table_without_a_key_stops_the_stream_until_it_has_one() {
    let decoded = Decoded::new("CREATE TABLE bare (id int)").await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO bare VALUES (1)").await;
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    for _ in 0..2 {
        let error = next(&mut source).await.unwrap_err();
        assert!(
            matches!(&error, Error::NoPrimaryKey { table } if table == "public.bare"),
            "{error:?}"
        );
    }
    decoded.run("ALTER TABLE bare ADD PRIMARY KEY (id)").await;
    assert!(matches!(next(&mut source).await, Ok(Event::Change(_))));
}

#[tokio::test]
async fn an_identity_without_the_key_is_refused() {
    let decoded = Decoded::new(
        "CREATE TABLE t (id int PRIMARY KEY, u int NOT NULL); CREATE UNIQUE INDEX u ON t (u); \
         ALTER TABLE t REPLICA IDENTITY USING INDEX u",
    )
    .await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1, 2)").await;
    assert_eq!(transaction(&mut source).await, ["insert t: 1, 2"]);
    decoded.run("UPDATE t SET id = 3").await;
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    let error = next(&mut source).await.unwrap_err();
    assert!(matches!(error, Error::IdentityWithoutKey { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("ALTER TABLE public.t REPLICA IDENTITY FULL"),
        "{error}"
    );
}

#[tokio::test]
async fn a_table_that_is_gone_is_still_decoded() {
    let decoded = Decoded::new("CREATE TABLE t (id int, v text, PRIMARY KEY (id))").await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1, 'a')").await;
    decoded.run("UPDATE t SET id = 2").await;
    decoded.run("DROP TABLE t").await;
    assert_eq!(transaction(&mut source).await, ["insert t: 1, a"]);
    assert_eq!(transaction(&mut source).await, ["update t: 2, a from 1"]);
}

#[tokio::test]
async fn a_table_that_is_gone_does_not_matter_where_nobody_wants_its_rows() {
    let decoded = Decoded::new(
        "CREATE TABLE first (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, v text); \
         ALTER TABLE t REPLICA IDENTITY FULL",
    )
    .await;
    let rows = "INSERT INTO t VALUES (1, 'x'); UPDATE t SET v = 'y'";
    decoded
        .run(&format!(
            "BEGIN; INSERT INTO first VALUES (1); {rows}; TRUNCATE t; {rows}; INSERT INTO first VALUES (2); COMMIT"
        ))
        .await;
    decoded.run("DELETE FROM t; DROP TABLE t").await;
    let mut source = decoded.source().await;
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    assert!(matches!(next(&mut source).await, Ok(Event::Change(_))));
    source.skip_rows();
    let end = next(&mut source).await;
    assert!(matches!(end, Ok(Event::Commit { .. })), "{end:?}");
    // Somebody does.
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    let error = next(&mut source).await.unwrap_err();
    assert!(
        matches!(&error, Error::TableGone { table } if table == "public.t"),
        "{error:?}"
    );
}

#[tokio::test]
async fn partitions_and_generated_columns_are_as_published() {
    let decoded = Decoded::new(
        "CREATE TABLE p (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED, v int) PARTITION BY RANGE (id); \
         CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); \
         CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20)",
    )
    .await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO p (id, v) VALUES (1, 7)").await;
    // Across partitions an update is a delete and an insert.
    decoded.run("UPDATE p SET id = 11").await;
    assert_eq!(transaction(&mut source).await, ["insert p1: 1, 7"]);
    assert_eq!(
        transaction(&mut source).await,
        ["delete p1: 1", "insert p2: 11, 7"]
    );
}

#[tokio::test]
async fn a_key_that_is_not_published_is_named() {
    let decoded = Decoded::new("CREATE TABLE t (id int PRIMARY KEY, v int)").await;
    decoded
        .run(
            "DROP PUBLICATION anabranch; \
             CREATE PUBLICATION anabranch FOR TABLE t (v) WITH (publish = 'insert')",
        )
        .await;
    let mut source = decoded.source().await;
    decoded.run("INSERT INTO t VALUES (1, 2)").await;
    assert!(matches!(next(&mut source).await, Ok(Event::Begin { .. })));
    let error = next(&mut source).await.unwrap_err();
    assert!(
        matches!(&error, Error::KeyNotPublished { column, .. } if column == "id"),
        "{error:?}"
    );
}

/// From now on commits wait for a standby that is not there.
async fn hold_commits(decoded: &Decoded) {
    decoded
        .run("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        .await;
    decoded.run("SELECT pg_reload_conf()").await;
    // Nobody waits before the checkpointer has read it, too. What is tried writes to the WAL, without which no commit waits, and
    // nothing of it is in the stream.
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    loop {
        let tried = commit(decoded, "CREATE TEMPORARY TABLE tried ()").await;
        while !tried.is_finished() {
            let row = decoded.user.query_one(waits, &[]).await.unwrap();
            if row.get::<_, i64>(0) > 0 {
                return release(decoded, tried).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tried.await.unwrap();
    }
}

/// Commits, and is not seen by anybody until [`release`].
async fn commit(decoded: &Decoded, sql: &str) -> JoinHandle<()> {
    let writer = decoded.server.user("postgres").await;
    let sql = format!("BEGIN; {sql}; COMMIT");
    tokio::spawn(async move { writer.batch_execute(&sql).await.unwrap() })
}

async fn release(decoded: &Decoded, commit: JoinHandle<()>) {
    while !commit.is_finished() {
        decoded
            .run("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            .await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    commit.await.unwrap();
}

/// The transaction is in the stream, and its first change is not.
async fn waits(source: &mut Source) {
    assert!(matches!(next(source).await.unwrap(), Event::Begin { .. }));
    let change = tokio::time::timeout(Duration::from_secs(1), next(source)).await;
    assert!(change.is_err(), "{change:?}");
}

#[tokio::test]
async fn what_a_commit_made_that_nobody_sees_yet_is_waited_for() {
    let decoded = Decoded::new("CREATE TABLE old (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    hold_commits(&decoded).await;
    let made = commit(
        &decoded,
        "CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE fresh (id int PRIMARY KEY, mood mood); \
         ALTER TABLE fresh REPLICA IDENTITY FULL; INSERT INTO fresh VALUES (1, 'sad')",
    )
    .await;
    waits(&mut source).await;
    let seen = "SELECT count(*) FROM pg_class WHERE relname = 'fresh'";
    assert_eq!(
        decoded.user.query_one(seen, &[]).await.unwrap().get::<_, i64>(0),
        0
    );
    release(&decoded, made).await;
    let table = table(&mut source).await;
    assert_eq!(key(&table), ["id"]);
    assert_eq!(table.columns[1].type_name, "public.mood");
}

#[tokio::test]
async fn a_key_that_a_commit_made_that_nobody_sees_yet_is_waited_for() {
    let decoded = Decoded::new(
        "CREATE TABLE renamed (id int PRIMARY KEY); ALTER TABLE renamed REPLICA IDENTITY FULL; \
         CREATE TABLE bare (v int); ALTER TABLE bare REPLICA IDENTITY FULL; \
         CREATE TABLE swapped (a int PRIMARY KEY, b int NOT NULL); ALTER TABLE swapped REPLICA IDENTITY FULL",
    )
    .await;
    let mut source = decoded.source().await;
    hold_commits(&decoded).await;
    for (sql, expected) in [
        (
            "ALTER TABLE renamed RENAME id TO k; INSERT INTO renamed VALUES (1)",
            "k",
        ),
        (
            "ALTER TABLE bare ADD PRIMARY KEY (v); INSERT INTO bare VALUES (1)",
            "v",
        ),
        // Here nothing in the message shows that the key is another.
        (
            "ALTER TABLE swapped DROP CONSTRAINT swapped_pkey, ADD PRIMARY KEY (b); INSERT INTO swapped VALUES (1, 2)",
            "b",
        ),
    ] {
        let made = commit(&decoded, sql).await;
        waits(&mut source).await;
        release(&decoded, made).await;
        let described = table(&mut source).await;
        assert_eq!(key(&described), [expected], "{sql}");
        assert!(matches!(next(&mut source).await.unwrap(), Event::Commit { .. }));
    }
}

#[tokio::test]
async fn a_key_that_was_renamed_behind_a_write_is_known_by_its_place() {
    let decoded = Decoded::new(
        "CREATE TABLE t (a int, gone int, b int, v text, PRIMARY KEY (b, a)); ALTER TABLE t REPLICA IDENTITY FULL; \
         ALTER TABLE t DROP gone; CREATE TABLE whole (id int PRIMARY KEY, v text); ALTER TABLE whole REPLICA IDENTITY FULL",
    )
    .await;
    decoded
        .run(
            "BEGIN; INSERT INTO t VALUES (1, 2, 'x'); ALTER TABLE t RENAME b TO k; ALTER TABLE t ADD more int; DELETE FROM t; COMMIT",
        )
        .await;
    // Of another transaction, and all of it before it is decoded.
    decoded.run("INSERT INTO t VALUES (3, 4, 'y')").await;
    decoded.run("ALTER TABLE t RENAME a TO i").await;
    let mut source = decoded.source().await;
    for expected in [["b", "a"], ["k", "a"], ["k", "a"]] {
        let described = table(&mut source).await;
        assert_eq!(key(&described), expected);
    }
    // By one with a lower xid, which commits later.
    let lower = decoded.server.user("postgres").await;
    lower
        .batch_execute("BEGIN; SELECT pg_current_xact_id()")
        .await
        .unwrap();
    decoded.run("INSERT INTO whole VALUES (5, 'z')").await;
    lower
        .batch_execute("ALTER TABLE whole RENAME id TO k; COMMIT")
        .await
        .unwrap();
    let described = table(&mut source).await;
    assert_eq!(key(&described), ["id"]);
}

#[tokio::test]
async fn what_such_a_commit_left_alone_is_not_waited_for() {
    let decoded = Decoded::new(
        "CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY FULL; \
         CREATE TABLE marked (id int PRIMARY KEY)",
    )
    .await;
    let mut source = decoded.source().await;
    hold_commits(&decoded).await;
    for (sql, expected) in [
        ("INSERT INTO t VALUES (1)", "id"),
        ("ALTER TABLE t ADD v text; INSERT INTO t VALUES (2)", "id"),
        // The message tells this key.
        (
            "ALTER TABLE marked RENAME id TO k; INSERT INTO marked VALUES (1)",
            "k",
        ),
    ] {
        let made = commit(&decoded, sql).await;
        let described = table(&mut source).await;
        assert_eq!(key(&described), [expected], "{sql}");
        assert!(!made.is_finished(), "the commit did not wait: {sql}");
        assert!(matches!(next(&mut source).await.unwrap(), Event::Commit { .. }));
        release(&decoded, made).await;
    }
}

#[tokio::test]
async fn a_stream_that_waits_long_for_a_commit_says_so() {
    let decoded = Decoded::new("CREATE TABLE old (id int PRIMARY KEY)").await;
    let mut source = decoded.source().await;
    hold_commits(&decoded).await;
    let made = commit(
        &decoded,
        "CREATE TABLE fresh (id int PRIMARY KEY); INSERT INTO fresh VALUES (1)",
    )
    .await;
    waits(&mut source).await;
    let begun = Instant::now();
    let text = loop {
        if let Some(text) = source.stuck() {
            break text;
        }
        assert!(begun.elapsed() < PATIENCE, "nothing is said");
        let change = tokio::time::timeout(Duration::from_millis(100), next(&mut source)).await;
        assert!(change.is_err(), "{change:?}");
    };
    assert!(
        text.contains("public.fresh") && text.contains("pg_cancel_backend"),
        "{text}"
    );
    release(&decoded, made).await;
    let described = table(&mut source).await;
    assert_eq!(key(&described), ["id"]);
    assert_eq!(source.stuck(), None);
}

#[tokio::test]
async fn the_first_of_many_that_is_not_visible_is_found_at_once() {
    let decoded = Decoded::new("CREATE TABLE old (id int PRIMARY KEY)").await;
    let id = async |client: &Client| {
        let row = client
            .query_one("SELECT pg_current_xact_id()::text::int8 & 4294967295", &[])
            .await;
        row.unwrap().get::<_, i64>(0)
    };
    let first_hidden = async |xids: &[i64]| {
        let row = decoded.user.query_one(pg::xid::NOW, &[]).await.unwrap();
        let snapshot = pg::xid::Snapshot::parse(row.get(0)).unwrap();
        let shows = |xid: &i64| snapshot.shows(u32::try_from(*xid).unwrap());
        xids.iter().position(|xid| !shows(xid))
    };
    let ended = id(&decoded.sql).await;
    let open = decoded.server.user("postgres").await;
    open.batch_execute("BEGIN").await.unwrap();
    let runs = id(&open).await;
    let after = id(&decoded.sql).await;
    assert_eq!(first_hidden(&[ended, after]).await, None);
    assert_eq!(first_hidden(&[after, ended, runs, after, runs]).await, Some(2));
    let running = pg::xid::Running::now(&decoded.sql).await.unwrap();
    let is_held = |xid: i64| running.holds(u32::try_from(xid).unwrap());
    assert_eq!([ended, runs, after].map(is_held), [false, true, false]);
}

#[tokio::test]
async fn an_id_of_32_bits_is_the_one_next_to_the_snapshot() {
    let decoded = Decoded::new("CREATE TABLE old (id int PRIMARY KEY)").await;
    let wrap = 1_i64 << 32;
    for (snapshot, xid, expected) in [
        // The lowest that runs, the end, those that run.
        ((100, 104, vec![100, 102]), 99, true),
        ((100, 104, vec![100, 102]), 100, false),
        ((100, 104, vec![100, 102]), 101, true),
        ((100, 104, vec![100, 102]), 102, false),
        ((100, 104, vec![100, 102]), 104, false),
        ((100, 104, vec![100, 102]), 106, false),
        // The same after so many transactions that the lower half has begun anew.
        ((wrap + 100, wrap + 104, vec![wrap + 100]), 100, false),
        ((wrap + 100, wrap + 104, vec![wrap + 100]), 101, true),
        ((wrap + 100, wrap + 104, vec![wrap + 100]), 104, false),
        ((wrap + 100, wrap + 104, vec![wrap + 100]), 106, false),
        ((wrap + 100, wrap + 104, vec![wrap + 100]), wrap - 6, true),
        ((wrap - 4, wrap - 2, vec![wrap - 4]), 3, false),
    ] {
        let (min, max, running): (i64, i64, Vec<i64>) = snapshot;
        let running = running.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        let snapshot = format!("{min}:{max}:{running}");
        let sql = format!(
            "SELECT {} FROM (SELECT '{snapshot}'::pg_snapshot AS s, {max}::int8 AS max) AS x",
            pg::xid::visible("$1")
        );
        let row = decoded.user.query_one(&sql, &[&xid]).await.unwrap();
        assert_eq!(row.get::<_, bool>(0), expected, "{xid} in {snapshot}");
    }
}
