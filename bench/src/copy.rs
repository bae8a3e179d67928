//! The first copy: how fast an empty server has the rows of another, with their indexes.
//!
//! Native replication's target has the table and its indexes before, as `pg_dump --schema-only` makes them; a join makes them itself.

use std::time::{Duration, Instant};

use anabranch_tests::Cluster;
use anabranch_tests::cluster::prepare_database;
use anabranch_tests::postgres::{DATABASE, Options, Postgres, open_dir};
use anabranch_tests::session::Session;

use crate::results::{Record, Rounds, turns};
use crate::stage::{PATIENCE, System, settings};
use crate::usage::load;

const SCHEMA: [&str; 3] = [
    "create table copied (id bigint primary key, a int not null, b int not null, pad text not null)",
    "create index copied_a on copied (a)",
    "create index copied_pad on copied (pad, b)",
];

async fn fill(session: &Session, rows: u64) {
    session
        .run(&format!(
            "insert into copied select i, hashint8(i), i % 1000, rpad(md5(i::text), 80, 'x') \
             from generate_series(1, {rows}::bigint) i"
        ))
        .await;
}

/// The name of this work with so many rows.
pub fn work(rows: u64) -> String {
    format!("first-copy-{rows}")
}

/// Is there anything to measure with a system? pglogical's first copy is not compared.
pub const fn is_measured(system: System) -> bool {
    !matches!(system, System::Pglogical15)
}

/// Measures each system alone; pglogical is not among them.
pub async fn measure(systems: &[System], rows: u64, rounds: Rounds, mut done: impl FnMut(Record)) {
    for round in rounds {
        for system in turns(systems, round) {
            let (seconds, before) = match system {
                system if !is_measured(system) => continue,
                system if system.is_ours() => join(system, rows).await,
                system => subscribe(system, rows).await,
            };
            done(Record {
                work: work(rows),
                shape: "narrow".to_owned(),
                system: system.to_string(),
                round,
                values: [
                    ("seconds".to_owned(), seconds.as_secs_f64()),
                    ("rows_per_s".to_owned(), rows as f64 / seconds.as_secs_f64()),
                    ("load_before".to_owned(), before),
                ]
                .into(),
            });
        }
    }
}

/// Until the joiner takes writes.
async fn join(system: System, rows: u64) -> (Duration, f64) {
    let mut builder = Cluster::of([system.version()]);
    for line in settings(false) {
        builder = builder.conf(0, &line);
    }
    for sql in SCHEMA {
        builder = builder.schema(sql);
    }
    let mut cluster = builder.start().await;
    fill(&cluster.session(0).await, rows).await;
    let node = cluster.add_server(system.version()).await;
    let lines = settings(false);
    let server = &mut cluster.nodes[node].server;
    server.stop();
    server.set_conf(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    server.start().await;
    decoded(&cluster.admin(0).await).await;
    rest(&[&cluster.nodes[0].server, &cluster.nodes[node].server]).await;
    let before = load();
    let began = Instant::now();
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    let seconds = began.elapsed();
    let servers = [&cluster.nodes[0].server, &cluster.nodes[node].server];
    compare(system, servers).await;
    (seconds, before)
}

/// Waits until the donor's daemon has decoded what was filled in.
async fn decoded(donor: &Session) {
    let end = donor.value("select pg_current_wal_flush_lsn()::text").await;
    let open = format!(
        "select count(*) from pg_replication_slots where slot_name = 'anabranch' and confirmed_flush_lsn < '{end}'"
    );
    let began = Instant::now();
    while donor.number(&open).await > 0 {
        assert!(began.elapsed() < PATIENCE, "the donor does not catch up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Until the table is in step.
async fn subscribe(system: System, rows: u64) -> (Duration, f64) {
    let dir = open_dir("anabranch-bench-");
    let server = async |member: usize, name: &str| {
        let options = Options {
            version: system.version(),
            member,
            conf: settings(false),
            clock: None,
            tcp_port: None,
        };
        let mut server = Postgres::create(&dir.path().join(name), options);
        server.start().await;
        prepare_database(&server, &SCHEMA).await;
        server
    };
    let (source, target) = (server(0, "source").await, server(1, "target").await);
    fill(&source.session().await, rows).await;
    let admin = source.admin().await;
    admin.run("create publication native for all tables").await;
    rest(&[&source, &target]).await;
    let before = load();
    let began = Instant::now();
    let admin = target.admin().await;
    let dsn = source.dsn("postgres", DATABASE);
    admin
        .run(&format!(
            "create subscription native connection '{dsn}' publication native"
        ))
        .await;
    let open = "select count(*) from pg_subscription_rel where srsubstate <> 'r'";
    while admin.number(open).await > 0 {
        assert!(began.elapsed() < PATIENCE, "{system} does not get in step");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let seconds = began.elapsed();
    compare(system, [&source, &target]).await;
    (seconds, before)
}

async fn rest(servers: &[&Postgres]) {
    for server in servers {
        server.admin().await.run("checkpoint").await;
    }
}

async fn compare(system: System, servers: [&Postgres; 2]) {
    let sql = "select count(*) || ' ' || sum(hashtext(t::text)::bigint) from copied t";
    let source = servers[0].admin().await.value(sql).await;
    let target = servers[1].admin().await.value(sql).await;
    assert!(source == target, "{source} at the source, {target} with {system}");
}
