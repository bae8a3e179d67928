//! The main job: what is written anywhere is everywhere, whole, in order, once.

use std::time::Duration;

use anabranch_proto::Lsn;
use anabranch_tests::daemon::{anabranch_ok, anabranch_refuses};
use anabranch_tests::load::{self, Load};
use anabranch_tests::wait::until;
use anabranch_tests::{Cluster, cluster};
use serde_json::Value;

const ITEMS: &str = "create table item (id int primary key, v text)";

async fn writes_at_every_node_reach_every_node<const N: usize>(versions: [u32; N]) {
    let cluster = Cluster::of(versions).schema(ITEMS).start().await;
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!("insert into item select {node} * 100 + i, 'new' from generate_series(1, 20) i"),
            )
            .await;
    }
    cluster.converge().await;
    cluster
        .expect("select count(*) from item", &(N * 20).to_string())
        .await;
    for node in cluster.all() {
        // Rows that another node inserted.
        let others = (node + 1) % N * 100;
        cluster
            .run(
                node,
                &format!(
                    "update item set v = 'changed at {node}' where id = {others} + 1; delete from item where id = {others} + 2"
                ),
            )
            .await;
    }
    cluster.converge().await;
    cluster
        .expect("select count(*) from item", &(N * 19).to_string())
        .await;
    cluster
        .expect(
            "select count(*) from item where v like 'changed at %'",
            &N.to_string(),
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn writes_at_each_of_two_nodes_reach_both() {
    writes_at_every_node_reach_every_node([15, 15]).await;
}

#[tokio::test]
async fn every_supported_version_replicates_with_every_other() {
    writes_at_every_node_reach_every_node([15, 16, 17, 18]).await;
}

#[tokio::test]
async fn writes_at_each_of_three_nodes_reach_all() {
    writes_at_every_node_reach_every_node([15, 15, 15]).await;
}

#[tokio::test]
async fn writes_at_each_of_five_nodes_reach_all() {
    writes_at_every_node_reach_every_node([15, 15, 15, 15, 15]).await;
}

#[tokio::test]
async fn writes_reach_all_nodes_of_a_cluster_of_versions_15_and_18() {
    writes_at_every_node_reach_every_node([15, 18, 15]).await;
}

#[tokio::test]
async fn writes_reach_all_nodes_of_a_cluster_of_version_18() {
    writes_at_every_node_reach_every_node([18, 18]).await;
}

#[tokio::test]
async fn a_change_is_applied_once_and_never_comes_back() {
    let cluster = Cluster::of([15, 18, 15]).schema(ITEMS).start().await;
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!("insert into item select {node} * 100 + i, 'x' from generate_series(1, 50) i"),
            )
            .await;
    }
    cluster.converge().await;
    // A row that was written again, even with the same values, is another tuple.
    let tuples = "select string_agg(id || ':' || ctid || ':' || xmin, ' ' order by id) from item";
    let before = cluster.values(tuples).await;
    // Anything that went round would have come back within a few round trips; more traffic pushes it along.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.converge().await;
    }
    assert_eq!(cluster.values(tuples).await, before);
}

#[tokio::test]
async fn a_transaction_is_never_seen_half() {
    let cluster = Cluster::of([15, 15, 18])
        .schema("create table account (id int primary key, amount bigint not null)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into account select i, 100 from generate_series(1, 10) i",
        )
        .await;
    cluster.converge().await;
    let writers: Vec<_> = [0, 1]
        .map(|node| (node, cluster.nodes[node].server.config("app", "app")))
        .into_iter()
        .map(|(node, config)| {
            tokio::spawn(async move {
                let session = anabranch_tests::Session::connect(&config, "writer")
                    .await
                    .expect("connect");
                for i in 0..300 {
                    // Each node has accounts of its own: no conflicts, so the sum holds in every whole state.
                    let (from, to) = (node * 5 + 1 + i % 5, node * 5 + 1 + (i + 2) % 5);
                    session
                        .run(&format!(
                            "begin; update account set amount = amount - {i} where id = {from}; \
                             update account set amount = amount + {i} where id = {to}; commit"
                        ))
                        .await;
                }
            })
        })
        .collect();
    let reader = cluster.session(2).await;
    let mut looks = 0;
    while !writers.iter().all(tokio::task::JoinHandle::is_finished) {
        assert_eq!(reader.number("select sum(amount) from account").await, 1000);
        looks += 1;
    }
    assert!(looks > 10, "only {looks} looks while writers ran");
    for writer in writers {
        writer.await.expect("the writer succeeds");
    }
    cluster.converge().await;
    cluster.expect("select sum(amount) from account", "1000").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn an_answer_is_never_seen_before_its_question() {
    let cluster = Cluster::of([15, 15, 15])
        .schema("create table question (id int primary key); create table answer (id int primary key)")
        .start()
        .await;
    let asks = cluster.session(0).await;
    let answers = cluster.session(1).await;
    let watches = cluster.session(2).await;
    // Questions are late at the third node, answers are not.
    cluster.partition(&[0], &[2]);
    for id in 0..40 {
        asks.run(&format!("insert into question values ({id})")).await;
        until("the question arrives", async || {
            answers
                .number(&format!("select count(*) from question where id = {id}"))
                .await
                == 1
        })
        .await;
        answers.run(&format!("insert into answer values ({id})")).await;
        if id == 20 {
            cluster.heal();
        }
        let orphans =
            "select count(*) from answer a where not exists (select from question q where q.id = a.id)";
        assert_eq!(watches.number(orphans).await, 0);
    }
    cluster.converge().await;
    cluster.expect("select count(*) from answer", "40").await;
}

#[tokio::test]
async fn random_writes_everywhere_are_all_accounted_for() {
    let cluster = Cluster::of([15, 18, 15]).schema(load::SCHEMA).start().await;
    let options = load::Options {
        clients: 3,
        delete_one_in: 8,
        ..load::Options::default()
    };
    let load = Load::start(&cluster, &[0, 1, 2], options);
    tokio::time::sleep(Duration::from_secs(8)).await;
    let ledger = load.stop().await;
    cluster.converge().await;
    assert!(
        !cluster.conflicts_at(0).await.is_empty(),
        "so few keys and no conflict: the load proves nothing"
    );
    ledger.account(&cluster).await;
}

#[tokio::test]
async fn a_daemon_ends_cleanly_on_sigterm_and_goes_on_where_it_was() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster.run(0, "insert into item values (1, 'before')").await;
    cluster.converge().await;
    let status = cluster.nodes[0].daemon.stop();
    assert!(status.success(), "ended with {status}");
    cluster.run(0, "insert into item values (2, 'while away')").await;
    cluster
        .run(1, "insert into item values (3, 'meanwhile at the other')")
        .await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster
        .expect("select string_agg(id::text, ',' order by id) from item", "1,2,3")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn daemons_talk_through_mutual_tls() {
    let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).tls().start().await;
    cluster.run(1, "insert into item values (1, 'secret')").await;
    cluster.converge().await;
    cluster.expect("select v from item", "secret").await;
}

#[tokio::test]
async fn a_daemon_reaches_its_server_by_tcp_with_a_password() {
    let mut cluster = Cluster::of([15, 15])
        .schema(ITEMS)
        .tcp(0)
        .without_daemons()
        .start()
        .await;
    cluster
        .admin(0)
        .await
        .run("alter role anabranch password 'correct horse'")
        .await;
    let port = cluster.nodes[0].server.port();
    let password_file = cluster.dir().join("password");
    std::fs::write(&password_file, "correct horse\n").expect("write the password file");
    cluster.nodes[0].daemon.edit_config(|text| {
        let (start, rest) = text.split_once("dsn = \"").expect("a dsn");
        let (_, end) = rest.split_once("\"\n").expect("the dsn's end");
        format!(
            "{start}dsn = \"host=127.0.0.1 port={port} user=anabranch dbname=app\"\npassword_file = \"{}\"\n{end}",
            password_file.display()
        )
    });
    cluster.start_daemons();
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
    cluster.expect("select v from item", "x").await;
    assert!(
        !cluster.nodes[0].daemon.log().contains("correct horse"),
        "the password is in the log"
    );
}

/// What a node's status has of one of its peers.
async fn peer(cluster: &Cluster, node: usize, id: u64) -> Value {
    let status = cluster.status(node).await;
    let peers = status["peers"].as_array().expect("a list of peers");
    let found = peers.iter().find(|peer| peer["id"] == id);
    found.expect("the peer").clone()
}

fn lsn(peer: &Value, name: &str) -> Lsn {
    let text = peer[name].as_str().expect("an LSN");
    text.parse().expect("an LSN")
}

#[tokio::test]
async fn status_shows_how_far_every_peer_is_and_the_journal() {
    let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).start().await;
    cluster.run(0, "insert into item values (1, 'x')").await;
    cluster.converge().await;
    for node in cluster.all() {
        let status = cluster.status(node).await;
        for name in ["n1", "n2", "n3"] {
            assert!(status.to_string().contains(name), "no {name} in {status:#}");
        }
        assert!(status["journal"]["bytes"].as_u64() > Some(0), "{status:#}");
        assert_eq!(status["apply"]["quarantined"], 0, "{status:#}");
    }

    // One of three is cut off and lacks what is written now, the other has it.
    cluster.partition(&[0, 2], &[1]);
    cluster.run(0, "insert into item values (2, 'y')").await;
    let end = cluster.value(0, "select pg_current_wal_insert_lsn()").await;
    let end: Lsn = end.parse().expect("an LSN");
    until("who is cut off is shown to lag, and nobody else", async || {
        let (cut, linked) = (peer(&cluster, 0, 2).await, peer(&cluster, 0, 3).await);
        let lags = cut["lag_bytes"].as_u64() > Some(0) && cut["lag_seconds"].as_f64() > Some(0.1);
        cut["connected"] == false
            && linked["connected"] == true
            && lags
            && lsn(&cut, "replay_lsn") < end
            && lsn(&linked, "replay_lsn") >= end
    })
    .await;
    cluster.heal();
    until("it has caught up", async || {
        let back = peer(&cluster, 0, 2).await;
        let positions = ["sent_lsn", "write_lsn", "flush_lsn", "replay_lsn"];
        // They have one clock.
        let offset_us = back["clock_offset_us"].as_i64();
        back["connected"] == true
            && positions.iter().all(|name| lsn(&back, name) >= end)
            && offset_us.is_some_and(|us| us.abs() < 1_000_000)
    })
    .await;
    cluster.converge().await;
}

#[tokio::test]
async fn remove_leaves_nothing_behind() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text)")
        .start()
        .await;
    cluster.run(0, "insert into item values (1, 'kept')").await;
    cluster.converge().await;
    for node in &mut cluster.nodes {
        node.daemon.stop();
    }
    // The server notices a moment later.
    let reads = "select count(*) from pg_replication_slots where active";
    cluster.wait_value(0, reads, "0").await;
    let node = &cluster.nodes[0];
    let admin = node.server.dsn("postgres", "app");
    let remove = [
        "remove",
        "--config",
        node.daemon.config_arg(),
        "--admin-dsn",
        &admin,
        "--yes",
    ];
    // A member is not taken away from the others without a word.
    let said = anabranch_refuses(&remove).await;
    assert!(said.contains("anabranch leave") && said.contains("n2"), "{said}");
    anabranch_ok(&[&remove[..], &["--without-leaving"]].concat()).await;
    for (what, query) in [
        (
            "schema",
            "select count(*) from pg_namespace where nspname = 'anabranch'",
        ),
        ("publication", "select count(*) from pg_publication"),
        ("slot", "select count(*) from pg_replication_slots"),
        (
            "replica identity",
            "select count(*) from pg_class where relreplident = 'f' and relkind = 'r' and relnamespace = 'public'::regnamespace",
        ),
    ] {
        assert_eq!(cluster.value(0, query).await, "0", "{what} left behind");
    }
    assert_eq!(cluster.value(0, "select v from item").await, "kept");
    // And it can be set up again.
    cluster::initialise(&cluster.nodes[0]).await;
}
