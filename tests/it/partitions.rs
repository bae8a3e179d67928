//! Lines that break, stall, work in one direction only, and come back.

use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::load::{self, Load};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::PATIENCE;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const ITEMS: &str = "create table item (id int primary key, v text)";

#[tokio::test]
async fn every_node_takes_writes_while_alone_and_all_agree_afterwards() {
    let cluster = Cluster::of([15, 18, 15]).schema(load::SCHEMA).start().await;
    for seed in [21, 22, 23] {
        cluster.isolate_all();
        let options = load::Options {
            clients: 3,
            keys: 30,
            delete_one_in: 5,
            seed,
            ..load::Options::default()
        };
        let load = Load::start(&cluster, &[0, 1, 2], options);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        for node in cluster.all() {
            cluster
                .wait_value(node, "select count(*) > 40 from witness", "t")
                .await;
        }
        let ledger = load.stop().await;
        assert!(
            ledger.committed() > 100,
            "the nodes did not take writes while alone"
        );
        cluster.heal();
        cluster.converge().await;
        ledger.account(&cluster).await;
        // A new round starts from no rows, so that each ledger explains all it finds.
        cluster.run(0, "truncate kv; truncate witness").await;
        cluster.converge().await;
    }
    assert!(!cluster.conflicts_at(0).await.is_empty());
}

#[tokio::test]
async fn a_minority_goes_on_and_the_majority_too() {
    let cluster = Cluster::of([15, 15, 15, 15, 15])
        .schema(load::SCHEMA)
        .start()
        .await;
    cluster.partition(&[0, 1], &[2, 3, 4]);
    let load = Load::start(
        &cluster,
        &[0, 1, 2, 3, 4],
        load::Options {
            clients: 1,
            seed: 24,
            ..load::Options::default()
        },
    );
    tokio::time::sleep(Duration::from_secs(4)).await;
    // Each side agrees with itself meanwhile.
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    cluster.arrive_among(&[2, 3, 4], PATIENCE).await;
    let ledger = load.stop().await;
    cluster.heal();
    cluster.converge().await;
    ledger.account(&cluster).await;
}

#[tokio::test]
async fn lines_that_flap_lose_nothing() {
    let cluster = Cluster::of([15, 15, 15]).schema(load::SCHEMA).start().await;
    let load = Load::start(
        &cluster,
        &[0, 1, 2],
        load::Options {
            delete_one_in: 10,
            seed: 25,
            ..load::Options::default()
        },
    );
    let mut random = StdRng::seed_from_u64(25);
    for _ in 0..40 {
        let (from, to) = (random.random_range(0..3), random.random_range(0..3));
        if from != to {
            cluster
                .line(from, to)
                .set(Mode::FLAPPING[random.random_range(0..Mode::FLAPPING.len())]);
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(20..300))).await;
    }
    cluster.heal();
    let ledger = load.stop().await;
    cluster.converge().await;
    ledger.account(&cluster).await;
}

#[tokio::test]
async fn a_line_that_works_in_one_direction_of_dialling_is_enough() {
    // n2 cannot reach n1, n1 reaches n2: what n2 writes still gets to n1 and back again.
    let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).start().await;
    cluster.line(1, 0).set(Mode::Cut);
    cluster.run(0, "insert into item values (1, 'by n1')").await;
    cluster.run(1, "insert into item values (2, 'by n2')").await;
    // n1 pulls from n2 directly; n2 gets n1's by way of n3.
    cluster.converge().await;
    cluster.expect("select count(*) from item", "2").await;
}

#[tokio::test]
async fn a_third_node_relays_between_two_that_cannot_talk() {
    let cluster = Cluster::of([15, 15, 15]).schema(load::SCHEMA).start().await;
    cluster.partition(&[0], &[2]);
    let load = Load::start(
        &cluster,
        &[0, 1, 2],
        load::Options {
            seed: 26,
            ..load::Options::default()
        },
    );
    tokio::time::sleep(Duration::from_secs(3)).await;
    let ledger = load.stop().await;
    // Never healed.
    cluster.converge().await;
    ledger.account(&cluster).await;
}

#[tokio::test]
async fn a_stalled_line_is_noticed_and_dialled_again() {
    let cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    cluster.set_lines(&[0], &[1], Mode::Stall);
    cluster.run(0, "insert into item values (1, 'x')").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cluster.value(1, "select count(*) from item").await, "0");
    cluster.heal();
    cluster.converge().await;
}

#[tokio::test]
async fn what_a_silent_line_holds_back_comes_by_way_of_others() {
    // No connection breaks, and what n2 writes waits at n1 for what n3 wrote before.
    let cluster = Cluster::of([15, 15, 15]).schema(ITEMS).start().await;
    cluster.set_lines(&[0], &[2], Mode::Stall);
    cluster.run(2, "insert into item values (1, 'by n3')").await;
    cluster.wait_value(1, "select v from item", "by n3").await;
    cluster.run(1, "update item set v = 'changed by n2'").await;
    cluster.run(0, "insert into item values (2, 'by n1')").await;
    // Never healed.
    cluster.converge().await;
    cluster
        .expect(
            "select string_agg(v, ', ' order by id) from item",
            "changed by n2, by n1",
        )
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_node_that_was_off_gets_what_a_node_that_is_now_off_had_written() {
    let mut cluster = Cluster::of([15, 15, 15]).schema(ITEMS).start().await;
    cluster.nodes[2].daemon.stop();
    cluster.run(0, "insert into item values (1, 'from n1')").await;
    cluster.arrive_among(&[0, 1], PATIENCE).await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[0].server.kill();
    cluster.nodes[2].daemon.start();
    cluster.wait_value(2, "select v from item", "from n1").await;
    cluster.run(2, "update item set v = 'changed by n3'").await;
    cluster.arrive_among(&[1, 2], PATIENCE).await;
    cluster.nodes[0].server.start().await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster.expect("select v from item", "changed by n3").await;
    cluster.expect_no_conflict().await;
}

/// Bytes of WAL that the slot holds back at a node.
async fn held_wal(cluster: &Cluster, node: usize) -> i64 {
    cluster
        .admin(node)
        .await
        .number("select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint from pg_replication_slots where slot_name = 'anabranch'")
        .await
}

/// A peer is away while this many MiB of changes accumulate; then it catches up.
async fn a_peer_away(mib: i64) {
    let mut cluster = Cluster::of([15, 15, 15])
        .on_disk()
        .schema("create table bulk (id bigint primary key, filler text)")
        .config("[journal]\nsegment_mib = 16\n")
        .start()
        .await;
    cluster.nodes[2].daemon.stop();
    // A MiB of text each time, which does not compress away.
    for batch in 0..mib {
        cluster
            .run(
                (batch % 2) as usize,
                &format!(
                    "insert into bulk select {batch} * 2000 + i, string_agg(encode(sha512(random()::text::bytea), 'hex'), '') \
                     from generate_series(1, 1024) i, generate_series(1, 8) group by i"
                ),
            )
            .await;
    }
    cluster.arrive_among(&[0, 1], Duration::from_secs(300)).await;
    for node in [0, 1] {
        // The slot moves on without the peer, so the server may recycle its WAL.
        let admin = cluster.admin(node).await;
        anabranch_tests::wait::until("the slot moves on", async || {
            // A slot's restart position needs a record of running transactions, which a checkpoint writes.
            admin.run("checkpoint").await;
            held_wal(&cluster, node).await < 96 * 1024 * 1024
        })
        .await;
        assert!(
            cluster.nodes[node].daemon.peak_memory_mib() <= 256,
            "n{} used {} MiB",
            node + 1,
            cluster.nodes[node].daemon.peak_memory_mib()
        );
    }
    cluster.nodes[2].daemon.start();
    cluster.converge_within(Duration::from_secs(600)).await;
    cluster
        .expect("select count(*) from bulk", &(mib * 1024).to_string())
        .await;
    let memory: Vec<u64> = cluster
        .nodes
        .iter()
        .map(|node| node.daemon.peak_memory_mib())
        .collect();
    println!("peak memory of the daemons: {memory:?} MiB");
    assert!(
        memory.iter().all(|&mib| mib <= 256),
        "daemons used {memory:?} MiB"
    );
    // And the disk space comes back once everyone has everything.
    let journals = cluster
        .nodes
        .iter()
        .map(|node| node.data_dir.clone())
        .collect::<Vec<_>>();
    anabranch_tests::wait::until("the journals shrink", async || {
        cluster.arrive_among(&[0, 1, 2], PATIENCE).await;
        journals.iter().all(|dir| disk_usage(dir) < 96 * 1024 * 1024)
    })
    .await;
}

fn disk_usage(dir: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => disk_usage(&entry.path()),
            Ok(data) => data.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

#[tokio::test]
async fn a_peer_away_pins_no_wal_and_catches_up() {
    a_peer_away(200).await;
}

#[tokio::test]
#[ignore = "minutes; run by name, see docs/testing.md"]
async fn a_peer_away_while_a_gigabyte_accumulates_pins_no_wal_and_catches_up() {
    a_peer_away(1024).await;
}
