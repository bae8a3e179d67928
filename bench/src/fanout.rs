//! Fan-out: what more peers cost the source. One slot is decoded whatever their number.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anabranch_tests::Cluster;

use crate::results::Record;
use crate::stage::{PATIENCE, direct, settings};
use crate::usage::{Meter, Part, load};

const TABLE: &str =
    "create table fanout (id bigint primary key, a int not null, b int not null, pad text not null)";
const WALSENDER: &str =
    "select pid from pg_stat_activity where usename = 'anabranch' and backend_type = 'walsender'";

/// Measures clusters of one node and so many peers: the same rows, 500 a transaction.
pub async fn measure(peers: &[usize], rows: u64, rounds: usize, mut done: impl FnMut(Record)) {
    for round in 0..rounds {
        let mut order = peers.to_vec();
        order.rotate_left(round % peers.len().max(1));
        for peers in order {
            done(Record {
                work: format!("fan-out-{rows}"),
                shape: shape(peers),
                system: "anabranch-15".to_owned(),
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
            rows / 500 - 1
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
