//! Fan-out: what more peers cost the source. One slot is decoded whatever their number.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anabranch_tests::Cluster;

use crate::results::{Record, Rounds, turns};
use crate::stage::{PATIENCE, System, direct, settings};
use crate::usage::{Meter, Part, load};

const TABLE: &str =
    "create table fanout (id bigint primary key, a int not null, b int not null, pad text not null)";
const WALSENDER: &str =
    "select pid from pg_stat_activity where usename = 'anabranch' and backend_type = 'walsender'";

/// The system that is measured.
pub const SYSTEM: System = System::Anabranch15;

/// The name of this work with so many rows.
pub fn work(rows: u64) -> String {
    format!("fan-out-{rows}")
}

/// Measures clusters of one node and so many peers: the same rows, 500 a transaction.
pub async fn measure(peers: &[usize], rows: u64, rounds: Rounds, mut done: impl FnMut(Record)) {
    for round in rounds {
        for peers in turns(peers, round) {
            done(Record {
                work: work(rows),
                shape: shape(peers),
                system: SYSTEM.to_string(),
                round,
                values: one(peers, rows).await,
            });
        }
    }
}

/// A record's shape with so many peers.
pub fn shape(peers: usize) -> String {
    format!("{peers} peers")
}

async fn one(peers: usize, rows: u64) -> BTreeMap<String, f64> {
    let versions = vec![15; peers + 1];
    let mut builder = Cluster::of_versions(&versions).schema(TABLE).without_daemons();
    for node in 0..=peers {
        for line in settings(false) {
            builder = builder.conf(node, &line);
        }
    }
    let mut cluster = builder.start().await;
    direct(&cluster);
    for node in &mut cluster.nodes {
        node.daemon.start();
    }
    let all = cluster.all();
    cluster.arrive_among(&all, Duration::from_secs(120)).await;
    for &node in &all {
        cluster.admin(node).await.run("checkpoint").await;
    }
    let before = load();
    let walsender = cluster.admin(0).await.number(WALSENDER).await;
    let daemon = cluster.nodes[0].daemon.pid().expect("the daemon runs");
    let processes = vec![
        (Part::Walsender, u32::try_from(walsender).expect("a pid")),
        (Part::SourceDaemon, daemon),
    ];
    let meter = Meter::start(&processes);
    let began = Instant::now();
    let session = cluster.session(0).await;
    session.run("set synchronous_commit = off").await;
    session
        .run(&format!(
            "do $$ begin for b in 0..{} loop insert into fanout select i, 0, 0, rpad('', 80, 'x') from \
             generate_series(b::bigint * 500 + 1, b::bigint * 500 + 500) i; commit; end loop; end $$",
            rows.max(500) / 500 - 1
        ))
        .await;
    cluster.arrive_among(&all, PATIENCE).await;
    let seconds = began.elapsed().as_secs_f64();
    let mut values: BTreeMap<String, f64> = meter.stop(&processes);
    values.retain(|name, _| name.starts_with("cpu_") || name == "mib_source_daemon");
    values.insert("seconds".to_owned(), seconds);
    values.insert("load_before".to_owned(), before);
    values
}
