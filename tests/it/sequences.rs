//! Ids by sequences at every node: they never collide once the sequences are divided.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::daemon::anabranch;
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::wait::{PATIENCE, until_ok};
use tokio::task::JoinHandle;

const SCHEMA: &str = "
    create table ser (id serial primary key, node int not null);
    create table ident (id bigint generated always as identity primary key, node int not null)";

/// Runs `anabranch sequences VERB` at a node; what it said, and whether it ended with 0.
async fn sequences(cluster: &Cluster, node: usize, verb: &str) -> (bool, String) {
    let node = &cluster.nodes[node];
    let admin = node.server.dsn("postgres", DATABASE);
    let config = node.daemon.config_arg();
    let output = anabranch(&["sequences", verb, "--config", config, "--admin-dsn", &admin]).await;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

async fn apply(cluster: &Cluster, node: usize) {
    let (ok, said) = sequences(cluster, node, "apply").await;
    assert!(ok, "{said}");
}

/// Waits until a node has heard from all members that it is safe.
async fn wait_safe(cluster: &Cluster, node: usize) {
    until_ok("its sequences are safe", PATIENCE, async || {
        let (ok, said) = sequences(cluster, node, "status").await;
        if ok { Ok(()) } else { Err(said) }
    })
    .await;
}

/// A client that inserts by both kinds of columns until stopped; the ids that were committed, of each.
struct Client {
    stop: Arc<AtomicBool>,
    ids: JoinHandle<[Vec<i64>; 2]>,
}

async fn insert(cluster: &Cluster, node: usize) -> Client {
    let session = cluster.session(node).await;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let ids = tokio::spawn(async move {
        let mut ids = [Vec::new(), Vec::new()];
        while !stopped.load(Ordering::Relaxed) {
            for (table, ids) in ["ser", "ident"].iter().zip(&mut ids) {
                let sql = format!("insert into {table} (node) values ({node}) returning id");
                ids.push(session.number(&sql).await);
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        ids
    });
    Client { stop, ids }
}

/// Stops the clients, and checks that no id was given twice and every row is everywhere.
async fn settle(cluster: &Cluster, clients: Vec<Client>) {
    let mut all = [Vec::new(), Vec::new()];
    for client in clients {
        client.stop.store(true, Ordering::Relaxed);
        let ids = client.ids.await.expect("no INSERT fails");
        assert!(
            ids.iter().all(|ids| ids.len() > 10),
            "a client wrote next to nothing"
        );
        for (all, ids) in all.iter_mut().zip(ids) {
            all.extend(ids);
        }
    }
    cluster.converge().await;
    for (table, ids) in ["ser", "ident"].iter().zip(all) {
        let distinct: BTreeSet<i64> = ids.iter().copied().collect();
        assert_eq!(distinct.len(), ids.len(), "{table}: an id was given twice");
        cluster
            .expect(&format!("select count(*) from {table}"), &ids.len().to_string())
            .await;
    }
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn ids_never_collide_under_load_at_every_node_while_another_joins() {
    let mut cluster = Cluster::of([15, 18]).schema(SCHEMA).start().await;
    for node in [0, 1] {
        apply(&cluster, node).await;
    }
    for node in [0, 1] {
        wait_safe(&cluster, node).await;
    }
    let mut clients = Vec::new();
    for node in [0, 0, 1, 1] {
        clients.push(insert(&cluster, node).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let joiner = cluster.add_server(18).await;
    cluster.join(joiner, 0).await;
    cluster.nodes[joiner].daemon.start();
    cluster.wait_writable(joiner).await;
    clients.push(insert(&cluster, joiner).await);
    clients.push(insert(&cluster, joiner).await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for node in cluster.all() {
        wait_safe(&cluster, node).await;
    }
    settle(&cluster, clients).await;
    for (node, offset) in [(0, "1"), (1, "2"), (2, "3")] {
        let offsets = format!(
            "select string_agg(distinct (id % 16)::text, ',') from (select id, node from ser union all select id, node from ident) x
             where node = {node}"
        );
        assert_eq!(cluster.value(0, &offsets).await, offset);
    }
}

#[tokio::test]
async fn a_cluster_is_divided_while_one_node_writes_and_then_all_do() {
    let cluster = Cluster::of([15, 18, 15]).schema(SCHEMA).start().await;
    let mut clients = vec![insert(&cluster, 0).await];
    // The ones that do not write go first, so what the first hands out meanwhile goes past what they begin with.
    for node in [1, 2] {
        apply(&cluster, node).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    apply(&cluster, 0).await;
    wait_safe(&cluster, 0).await;
    for node in [1, 2] {
        cluster
            .wait_value(
                node,
                "select count(*) from anabranch.sequence where increment = 16",
                "6",
            )
            .await;
        let (ok, said) = sequences(&cluster, node, "status").await;
        assert!(!ok && said.contains("node 1 may have"), "{said}");
        apply(&cluster, node).await;
        wait_safe(&cluster, node).await;
        clients.push(insert(&cluster, node).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    settle(&cluster, clients).await;
}

#[tokio::test]
async fn a_sequence_that_went_back_below_its_own_rows_is_lifted() {
    let cluster = Cluster::of([15, 18]).schema(SCHEMA).start().await;
    apply(&cluster, 0).await;
    apply(&cluster, 1).await;
    wait_safe(&cluster, 0).await;
    for _ in 0..5 {
        cluster.run(0, "insert into ser (node) values (0)").await;
        // Values of the other's share, however high, are not this node's to hand out.
        cluster
            .run(1, "insert into ser (node) values (1), (1), (1)")
            .await;
    }
    cluster.converge().await;
    assert!(
        sequences(&cluster, 0, "status").await.0,
        "nothing has gone back yet"
    );
    // As a standby has it that was promoted without the last of what its primary handed out.
    let session = cluster.session(0).await;
    let first = session
        .number("select min(id)::bigint from ser where node = 0")
        .await;
    cluster
        .admin(0)
        .await
        .run(&format!("select setval('ser_id_seq', {first}, true)"))
        .await;
    let (safe, said) = sequences(&cluster, 0, "status").await;
    assert!(!safe && said.contains("in public.ser.id already"), "{said}");
    assert!(
        session
            .try_run("insert into ser (node) values (0)")
            .await
            .is_err(),
        "it handed out what is in a row"
    );
    apply(&cluster, 0).await;
    wait_safe(&cluster, 0).await;
    session.run("insert into ser (node) values (0)").await;
    cluster.converge().await;
    cluster.expect("select count(*) from ser", "21").await;
}
