//! The tests' own tools, tried without the program: a tool that does nothing would let every test pass.

use std::time::Duration;

use anabranch_tests::disk::{self, Disk};
use anabranch_tests::load::{self, Load};
use anabranch_tests::postgres::{Options, Postgres, free_port, open_dir};
use anabranch_tests::process::{self, Signal};
use anabranch_tests::proxy::{Mode, Proxy};
use anabranch_tests::set_clock::Clock;
use anabranch_tests::wait::{PATIENCE, until};
use anabranch_tests::{Cluster, cluster, preload, rows};
use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn options(version: u32, member: usize) -> Options {
    Options {
        version,
        member,
        conf: Vec::new(),
        clock: None,
        tcp_port: None,
    }
}

#[tokio::test]
async fn servers_of_both_versions_start_and_stop() {
    let dir = open_dir("it-");
    for version in [15, 18] {
        let mut server = Postgres::create(&dir.path().join(version.to_string()), options(version, 0));
        server.start().await;
        let session = server.try_session("postgres", "postgres").await.expect("connect");
        assert_eq!(
            session
                .number("select current_setting('server_version_num')::int / 10000")
                .await,
            i64::from(version)
        );
        server.stop();
        assert!(server.try_session("postgres", "postgres").await.is_err());
    }
}

#[tokio::test]
async fn members_have_system_identifiers_of_their_own() {
    let dir = open_dir("it-");
    let mut identifiers = Vec::new();
    for (version, member) in [(15, 0), (15, 1), (18, 2)] {
        let mut server = Postgres::create(&dir.path().join(member.to_string()), options(version, member));
        server.start().await;
        let session = server.try_session("postgres", "postgres").await.expect("connect");
        identifiers.push(
            session
                .value("select system_identifier from pg_control_system()")
                .await,
        );
    }
    identifiers.sort();
    identifiers.dedup();
    assert_eq!(identifiers.len(), 3);
}

#[tokio::test]
async fn a_killed_server_leaves_no_process_and_recovers_what_was_committed() {
    let dir = open_dir("it-");
    let mut server = Postgres::create(&dir.path().join("a"), options(15, 0));
    server.start().await;
    cluster::prepare_database(&server, &["create table t (i int)"]).await;
    let session = server.session().await;
    let backend = session.backend_pid().await;
    session.run("insert into t values (1)").await;
    session.run("begin; insert into t values (2)").await;
    server.kill();
    assert!(!process::alive(backend));
    server.start().await;
    assert_eq!(server.session().await.column("select i from t").await, ["1"]);
    assert!(
        server.log().contains("was not properly shut down"),
        "{}",
        server.log()
    );
}

#[tokio::test]
async fn a_clock_can_be_set_ahead_and_back_while_the_server_runs() {
    let dir = open_dir("it-");
    let options = Options {
        clock: Some(Clock::WrongBy(1_000)),
        ..options(15, 0)
    };
    let mut server = Postgres::create(&dir.path().join("a"), options);
    server.start().await;
    let session = server.try_session("postgres", "postgres").await.expect("connect");
    for error_s in [1_000, -1_000, 0] {
        server.set_clock(error_s);
        let real = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs();
        let ahead = "select extract(epoch from clock_timestamp())::bigint";
        let difference = session.number(ahead).await - i64::try_from(real).expect("fits");
        assert!(
            (difference - error_s).abs() < 100,
            "wanted {error_s} s, got {difference} s"
        );
    }
}

#[tokio::test]
async fn a_frozen_backend_thaws() {
    let dir = open_dir("it-");
    let mut server = Postgres::create(&dir.path().join("a"), options(15, 0));
    server.start().await;
    let session = server.try_session("postgres", "postgres").await.expect("connect");
    let pid = session.backend_pid().await;
    process::signal(pid, Signal::STOP);
    assert!(
        tokio::time::timeout(Duration::from_millis(300), session.try_run("select 1"))
            .await
            .is_err()
    );
    process::signal(pid, Signal::CONT);
    session.run("select 1").await;
}

#[tokio::test]
async fn different_rows_are_found_and_named() {
    let dir = open_dir("it-");
    let mut sessions = Vec::new();
    let mut servers = Vec::new();
    for member in 0..2 {
        let mut server = Postgres::create(&dir.path().join(member.to_string()), options(15, member));
        server.start().await;
        // Another column order is no difference.
        let columns = if member == 0 {
            "i int primary key, v text"
        } else {
            "v text, i int primary key"
        };
        cluster::prepare_database(&server, &[&format!("create table t ({columns})")]).await;
        sessions.push(server.admin().await);
        servers.push(server);
    }
    for session in &sessions {
        session
            .run("insert into public.t (i, v) values (1, 'same'), (2, 'same')")
            .await;
    }
    assert_eq!(rows::equal(&sessions).await, Ok(()));
    sessions[1]
        .run("update public.t set v = 'other' where i = 2")
        .await;
    let difference = rows::equal(&sessions).await.expect_err("rows differ");
    assert!(difference.contains(r#"{"i": 2, "v": "other"}"#), "{difference}");
}

/// A server that sends every byte back.
async fn echo() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

/// Does a byte come back within this time?
async fn says_back(stream: &mut tokio::net::TcpStream, within: Duration) -> bool {
    let mut byte = [0];
    stream.write_all(b"x").await.is_ok()
        && matches!(
            tokio::time::timeout(within, stream.read_exact(&mut byte)).await,
            Ok(Ok(1))
        )
}

#[tokio::test]
async fn a_proxy_passes_cuts_stalls_and_mends() {
    // What is held back for so long would have come back.
    const HELD: Duration = Duration::from_millis(300);
    let proxy = Proxy::to(echo().await);
    let dial = || tokio::net::TcpStream::connect(proxy.address());
    let mut stream = dial().await.expect("connect");
    assert!(says_back(&mut stream, PATIENCE).await);

    for mode in [Mode::Stall, Mode::StallRequests, Mode::StallAnswers] {
        proxy.set(mode);
        assert!(!says_back(&mut stream, HELD).await, "{mode:?}");
        proxy.set(Mode::Pass);
        // What was held back arrives.
        let mut held = [0];
        stream.read_exact(&mut held).await.expect("the held byte");
        assert!(says_back(&mut stream, PATIENCE).await, "{mode:?}");
    }

    proxy.set(Mode::Cut);
    until("the open connection is reset", async || {
        !says_back(&mut stream, PATIENCE).await
    })
    .await;
    let refused = match dial().await {
        Err(_) => true,
        Ok(mut stream) => !says_back(&mut stream, PATIENCE).await,
    };
    assert!(refused, "a cut line takes no new connection");
    proxy.set(Mode::Pass);
    let mut stream = dial().await.expect("connect again");
    assert!(says_back(&mut stream, PATIENCE).await);
}

#[tokio::test]
async fn a_line_that_loses_packets_is_late_and_loses_no_bytes() {
    let proxy = Proxy::to(echo().await);
    let mut stream = tokio::net::TcpStream::connect(proxy.address())
        .await
        .expect("connect");
    proxy.set(Mode::Lossy(30));
    let began = std::time::Instant::now();
    for round in 0..20_u8 {
        stream.write_all(&[round]).await.expect("write");
        let mut byte = [0];
        stream.read_exact(&mut byte).await.expect("it comes back");
        assert_eq!(byte, [round]);
    }
    // Forty packets: that none is lost has a chance of one in a million and a half.
    assert!(
        began.elapsed() >= Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn ports_are_given_out_once() {
    let ports: std::collections::BTreeSet<u16> = (0..50).map(|_| free_port()).collect();
    assert_eq!(ports.len(), 50);
}

#[tokio::test]
async fn a_standby_follows_and_holds_commits_when_it_does_not() {
    let dir = open_dir("it-");
    let mut primary = Postgres::create(&dir.path().join("primary"), options(15, 0));
    primary.start().await;
    let mut standby = Postgres::standby_of(&primary, &dir.path().join("standby"));
    standby.start().await;
    primary.set_conf(&["synchronous_standby_names = 'standby'"]);
    let session = primary
        .try_session("postgres", "postgres")
        .await
        .expect("connect");
    primary.reload().await;
    let sync =
        "select count(*) from pg_stat_replication where application_name = 'standby' and sync_state = 'sync'";
    until("the standby is synchronous", async || {
        session.number(sync).await == 1
    })
    .await;
    session.run("create table t (i int)").await;
    standby.stop();
    let commit = session.try_run("insert into t values (1)");
    assert!(
        tokio::time::timeout(Duration::from_millis(500), commit)
            .await
            .is_err(),
        "the commit did not wait"
    );
}

#[tokio::test]
async fn the_accounting_finds_a_lost_write_a_repeated_one_and_a_lost_transaction() {
    let cluster = Cluster::of([15])
        .schema(load::SCHEMA)
        .without_daemons()
        .start()
        .await;
    let load = Load::start(
        &cluster,
        &[0],
        load::Options {
            delete_one_in: 10,
            ..load::Options::default()
        },
    );
    // More than the clients' last transactions can delete.
    until("rows have been written often", async || {
        let often = "select count(*) from kv where cardinality(hist) > 2";
        cluster.admin(0).await.number(often).await > 20
    })
    .await;
    let ledger = load.stop().await;
    ledger.account(&cluster).await;
    let some_row = "where k = (select k from kv where cardinality(hist) > 2 limit 1)";
    for damage in [
        format!("update kv set hist = hist[2:] {some_row}"),
        format!("update kv set hist = hist || hist[1] {some_row}"),
        "delete from witness where id = (select min(id) from witness)".to_owned(),
        "insert into witness values ('w1n1c0t999999', 1)".to_owned(),
    ] {
        let session = cluster.session(0).await;
        session
            .run("create table kv_kept as table kv; create table witness_kept as table witness")
            .await;
        session.run(&damage).await;
        let found = std::panic::AssertUnwindSafe(ledger.account(&cluster))
            .catch_unwind()
            .await;
        assert!(found.is_err(), "not found: {damage}");
        session
            .run("truncate kv, witness; insert into kv table kv_kept; insert into witness table witness_kept; drop table kv_kept, witness_kept")
            .await;
    }
    ledger.account(&cluster).await;
}

#[test]
fn what_was_synced_survives_and_what_was_not_is_gone() {
    if disk::impossible().is_some() {
        return;
    }
    let dir = open_dir("jepsen-power-");
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("before"), "x").unwrap();
    let mut disk = Disk::under(&folder, &dir.path().join("images"), 64).unwrap();
    std::fs::write(folder.join("synced"), "x").unwrap();
    std::fs::File::open(folder.join("synced"))
        .unwrap()
        .sync_all()
        .unwrap();
    std::fs::File::open(&folder).unwrap().sync_all().unwrap();
    std::fs::write(folder.join("unsynced"), "x").unwrap();
    disk.lose_power().unwrap();
    let there = |name: &str| folder.join(name).exists();
    assert!(there("before") && there("synced") && !there("unsynced"));
}

#[test]
fn libraries_can_be_preloaded_here() {
    // The compiler that links these tests makes them.
    assert_eq!(preload::impossible(), None);
}

#[test]
fn a_full_disk_takes_nothing_until_it_is_emptied() {
    if disk::impossible().is_some() {
        return;
    }
    let dir = open_dir("jepsen-full-");
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let mut disk = Disk::under(&folder, &dir.path().join("images"), 64).unwrap();
    disk.fill().unwrap();
    assert!(std::fs::write(folder.join("more"), [1; 8192]).is_err());
    disk.empty();
    std::fs::write(folder.join("more"), [1; 8192]).unwrap();
}
