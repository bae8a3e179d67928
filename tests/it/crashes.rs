//! Crashes at random moments under load: nothing lost, nothing applied twice.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anabranch_tests::Cluster;
use anabranch_tests::disk::{self, Disk};
use anabranch_tests::load::{self, Load};
use anabranch_tests::wait::until;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const CRASHES: usize = 10;
const CATCH_UP: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_daemon_that_loses_power_soon_after_its_first_start_knows_its_folder_again() {
    if let Some(why) = disk::impossible() {
        eprintln!("skipped: {why}");
        return;
    }
    let mut cluster = Cluster::of([15, 15]).on_disk().without_daemons().start().await;
    let images = cluster.dir().join("images");
    let mut disk = Disk::under(&cluster.nodes[0].data_dir, &images, 512).expect("a disk of its own");
    cluster.start_daemons();
    cluster.converge().await;
    cluster.nodes[0].daemon.kill();
    disk.lose_power().expect("lose power");
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    // Its files lie on the disk.
    cluster.nodes[0].daemon.kill();
}

#[derive(Clone, Copy)]
enum Victim {
    Daemon,
    Server,
    Both,
    /// Every server and every daemon at once: the lights go out.
    Everything,
}

async fn crash_under_load(versions: [u32; 3], victim: Victim, seed: u64) {
    let mut cluster = Cluster::of(versions).on_disk().schema(load::SCHEMA).start().await;
    let options = load::Options {
        clients: 2,
        delete_one_in: 10,
        seed,
        ..load::Options::default()
    };
    let load = Load::start(&cluster, &[0, 1, 2], options);
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..CRASHES {
        tokio::time::sleep(Duration::from_millis(random.random_range(100..1200))).await;
        let nodes = match victim {
            Victim::Everything => cluster.all(),
            _ => vec![random.random_range(0..3)],
        };
        for &node in &nodes {
            let node = &mut cluster.nodes[node];
            if !matches!(victim, Victim::Server) {
                node.daemon.kill();
            }
            if !matches!(victim, Victim::Daemon) {
                node.server.kill();
            }
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
        for &node in &nodes {
            let node = &mut cluster.nodes[node];
            if !node.server.runs() {
                node.server.start().await;
            }
            if !node.daemon.started() {
                node.daemon.start();
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let ledger = load.stop().await;
    for node in &mut cluster.nodes {
        assert!(node.daemon.runs(), "the daemon of {} ended by itself", node.name);
    }
    cluster.converge_within(CATCH_UP).await;
    ledger.account(&cluster).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_daemon_killed_ten_times_under_load_loses_and_repeats_nothing() {
    crash_under_load([15, 15, 15], Victim::Daemon, 11).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_killed_ten_times_under_load_loses_and_repeats_nothing() {
    crash_under_load([15, 18, 15], Victim::Server, 12).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_server_and_its_daemon_killed_ten_times_under_load_lose_and_repeat_nothing() {
    crash_under_load([15, 15, 18], Victim::Both, 13).await;
}

#[tokio::test]
async fn all_servers_and_daemons_killed_ten_times_under_load_lose_and_repeat_nothing() {
    crash_under_load([15, 15, 15], Victim::Everything, 14).await;
}

#[tokio::test]
async fn a_daemon_killed_while_it_starts_loses_and_repeats_nothing() {
    let mut cluster = Cluster::of([15, 15, 15])
        .on_disk()
        .schema(load::SCHEMA)
        .start()
        .await;
    let load = Load::start(
        &cluster,
        &[0, 1, 2],
        load::Options {
            seed: 15,
            ..load::Options::default()
        },
    );
    for wait_ms in [0, 20, 50, 90, 140, 200, 300, 500, 700, 1000] {
        cluster.nodes[1].daemon.kill();
        cluster.nodes[1].daemon.start();
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
    }
    let ledger = load.stop().await;
    cluster.converge_within(CATCH_UP).await;
    ledger.account(&cluster).await;
}

#[tokio::test]
async fn a_server_that_crashes_while_its_daemon_starts_is_waited_for() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text)")
        .start()
        .await;
    cluster.nodes[1].daemon.stop();
    let admin = cluster.admin(1).await;
    admin
        .run("begin; lock table anabranch.node in access exclusive mode")
        .await;
    cluster.nodes[1].daemon.start();
    until("the daemon waits in its start", async || {
        let waits =
            "select count(*) from pg_stat_activity where usename = 'anabranch' and wait_event_type = 'Lock'";
        cluster.admin(1).await.number(waits).await > 0
    })
    .await;
    cluster.nodes[1].server.kill();
    // Long enough for a second try.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(cluster.nodes[1].daemon.runs(), "the daemon has given up");
    cluster.nodes[1].server.start().await;
    cluster.run(0, "insert into item values (1, 'after it')").await;
    cluster.converge().await;
}

/// A server that cannot make the next file of its WAL panics, and tells the session that needed it why, by the SQLSTATE of that file's error.
#[tokio::test]
async fn a_server_that_panics_under_what_its_daemon_writes_is_waited_for() {
    let mut cluster = Cluster::of([15, 15])
        .schema("create table item (id int primary key, v text)")
        .start()
        .await;
    let server = &mut cluster.nodes[1].server;
    // So that it is rather the applier than the WAL writer that meets it.
    server.set_conf(&["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'"]);
    server.set_conf(&["restart_after_crash = off"]);
    server.reload().await;
    let wal = server.data_dir().join("pg_wal");
    let allow = |mode| {
        std::fs::set_permissions(&wal, std::fs::Permissions::from_mode(mode)).expect("set the folder's mode");
    };
    allow(0o500);
    let rows = "insert into item select i, repeat(md5(i::text), 15) from generate_series(1, 100000) i";
    cluster.run(0, rows).await;
    let deadline = std::time::Instant::now() + CATCH_UP;
    while cluster.nodes[1].server.ended().is_none() {
        assert!(std::time::Instant::now() < deadline, "the server goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    allow(0o700);
    assert!(cluster.nodes[1].daemon.runs(), "the daemon has given up");
    cluster.nodes[1].server.start().await;
    cluster.converge().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_deleted_index_folder_costs_time_and_no_data() {
    let mut cluster = Cluster::of([15, 15, 15])
        .on_disk()
        .schema(load::SCHEMA)
        .schema("create table item (id int primary key, v text)")
        // So little that it overflows to disk.
        .config("[apply]\nindex_memory_mib = 1\n")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into item select i, 'base' from generate_series(1, 30000) i",
        )
        .await;
    cluster.converge().await;
    // So that what is in the folder from now on stays there.
    cluster.wait_settled().await;
    // Unstable rows: the third node is away.
    cluster.partition(&[0, 1], &[2]);
    let load = Load::start(
        &cluster,
        &[0, 1, 2],
        load::Options {
            seed: 16,
            ..load::Options::default()
        },
    );
    cluster
        .run(0, "update item set v = 'before the folder went'")
        .await;
    cluster
        .run(2, "update item set v = 'apart, earlier' where id <= 10")
        .await;
    cluster
        .run(0, "update item set v = 'apart, later' where id <= 10")
        .await;
    until("the index overflows to disk", async || {
        cluster.status(0).await["index"]["overflowed"] == true
    })
    .await;
    let daemon = &mut cluster.nodes[0].daemon;
    daemon.kill();
    let index = cluster.nodes[0].data_dir.join("index");
    assert!(
        index.is_dir(),
        "no {}; has the folder another name now?",
        index.display()
    );
    std::fs::remove_dir_all(&index).expect("delete the index folder");
    cluster.nodes[0].daemon.start();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ledger = load.stop().await;
    cluster.heal();
    cluster.converge_within(CATCH_UP).await;
    ledger.account(&cluster).await;
    cluster
        .expect("select count(*) from item where v = 'apart, later'", "10")
        .await;
    for node in cluster.all() {
        // By its loser: at n3 the same row beat what n1 wrote first, and that is logged there, too.
        let logged = "select count(*) from anabranch.conflict_history where table_name = 'item' \
            and 'apart, earlier' = case conflict_resolution when 'keep_local' then remote_tuple ->> 'v' \
            else local_tuple ->> 'v' end";
        assert_eq!(cluster.value(node, logged).await, "10", "at n{}", node + 1);
    }
}

#[tokio::test]
async fn a_corrupted_index_folder_costs_time_and_no_data() {
    let mut cluster = Cluster::of([15, 15])
        .on_disk()
        .schema("create table item (id int primary key, v text)")
        .config("[apply]\nindex_memory_mib = 1\n")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into item select i, 'base' from generate_series(1, 30000) i",
        )
        .await;
    cluster.converge().await;
    cluster.partition(&[0], &[1]);
    cluster
        .run(
            0,
            "update item set v = 'earlier' where id <= 10; update item set v = 'bulk' where id > 10",
        )
        .await;
    cluster.run(1, "update item set v = 'later' where id <= 10").await;
    cluster.nodes[0].daemon.kill();
    for entry in walk(&cluster.nodes[0].data_dir.join("index")) {
        std::fs::write(&entry, b"not what it was").expect("overwrite a file of the index");
    }
    cluster.nodes[0].daemon.start();
    cluster.heal();
    cluster.converge_within(CATCH_UP).await;
    cluster
        .expect("select count(*) from item where v = 'later'", "10")
        .await;
    assert_eq!(cluster.conflicts().await.len(), 10);
}

/// Every file below a folder.
fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .flat_map(|entry| {
            if entry.path().is_dir() {
                walk(&entry.path())
            } else {
                vec![entry.path()]
            }
        })
        .collect()
}
