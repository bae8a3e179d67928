//! A lot at once, and too little space.

use std::time::{Duration, Instant};

use anabranch_tests::Cluster;
use anabranch_tests::daemon::anabranch_ok;
use anabranch_tests::load::{self, Load};
use anabranch_tests::process::{is_root, run};
use anabranch_tests::wait::{until, until_ok};

const MEMORY_MIB_MAX: u64 = 256;

async fn a_million_rows_in_one_transaction(versions: [u32; 3]) {
    let cluster = Cluster::of(versions)
        .on_disk()
        .schema("create table bulk (id int primary key, v text)")
        .start()
        .await;
    let started = Instant::now();
    cluster
        .run(
            0,
            "insert into bulk select i, 'row number ' || i from generate_series(1, 1000000) i",
        )
        .await;
    println!("committed after {:?}", started.elapsed());
    // Others keep writing meanwhile.
    cluster
        .run(
            1,
            "insert into bulk select -i, 'other' from generate_series(1, 1000) i",
        )
        .await;
    cluster.converge_within(Duration::from_secs(300)).await;
    println!("equal after {:?}", started.elapsed());
    cluster
        .run(1, "update bulk set v = 'updated ' || id where id > 0")
        .await;
    cluster.converge_within(Duration::from_secs(300)).await;
    println!("a million updates equal after {:?}", started.elapsed());
    cluster.run(2, "delete from bulk where id % 2 = 0").await;
    cluster.converge_within(Duration::from_secs(300)).await;
    println!("half a million deletes equal after {:?}", started.elapsed());
    cluster.expect("select count(*) from bulk", "500500").await;
    cluster.expect_no_conflict().await;
    let memory: Vec<u64> = cluster
        .nodes
        .iter()
        .map(|node| node.daemon.peak_memory_mib())
        .collect();
    println!("peak memory of the daemons: {memory:?} MiB");
    assert!(
        memory.iter().all(|&mib| mib <= MEMORY_MIB_MAX),
        "daemons used {memory:?} MiB"
    );
}

#[tokio::test]
#[ignore = "minutes; run by name, see docs/testing.md"]
async fn a_transaction_of_a_million_rows_arrives_in_bounded_memory() {
    a_million_rows_in_one_transaction([15, 15, 18]).await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_large_transaction_that_is_rolled_back_leaves_nothing() {
    let cluster = Cluster::of([15, 18])
        .on_disk()
        .schema("create table bulk (id int primary key, v text)")
        .start()
        .await;
    for node in cluster.all() {
        cluster
            .run(
                node,
                &format!(
                    // Other rows at each node: both are under way at once, and deleting a row twice is a conflict.
                    "begin; insert into bulk select i, repeat('x', 200) from generate_series(1, 200000) i; rollback; \
                     begin; insert into bulk select -i - {node} * 100000, repeat('y', 200) \
                     from generate_series(1, 100000) i; savepoint s; \
                     insert into bulk select i, repeat('z', 200) from generate_series(1, 100000) i; rollback to s; \
                     delete from bulk where id between -({node} + 1) * 100000 and -{node} * 100000 - 1; \
                     insert into bulk values ({node}, 'kept'); commit"
                ),
            )
            .await;
    }
    cluster.converge_within(Duration::from_secs(120)).await;
    cluster.expect("select count(*) from bulk", "2").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_limit_on_transactions_does_not_end_the_daemons_own() {
    let mut cluster = Cluster::of([15, 18])
        .schema("create table bulk (id int primary key, v text)")
        .start()
        .await;
    let limit = "alter role anabranch set transaction_timeout = '500ms'";
    cluster.admin(1).await.run(limit).await;
    cluster.nodes[1].daemon.stop();
    cluster.nodes[1].daemon.start();
    // Applied in one transaction, which takes longer.
    cluster
        .run(
            0,
            "insert into bulk select i, 'row ' || i from generate_series(1, 300000) i",
        )
        .await;
    cluster.converge_within(Duration::from_secs(60)).await;
    cluster.expect("select count(*) from bulk", "300000").await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_row_of_a_hundred_megabytes_arrives() {
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, v bytea)")
        .start()
        .await;
    // Nothing that can be packed well.
    let large = "(select string_agg(decode(md5(i::text), 'hex'), null) from generate_series(1, 6500000) i)";
    cluster
        .run(0, &format!("insert into t values (1, {large}), (2, 'small')"))
        .await;
    cluster.run(0, "update t set v = v || '!' where id = 1").await;
    cluster.run(1, "insert into t values (3, 'other')").await;
    cluster.converge_within(Duration::from_secs(120)).await;
    cluster
        .expect("select count(*) || ' ' || max(length(v)) from t", "3 104000001")
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn lines_of_large_rows_fit_into_the_conflict_log() {
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key, v bytea)")
        .start()
        .await;
    // Together more than the server takes as one JSON value: bytes are twice as long there, and both rows are shown.
    let write = |node: u32| {
        format!(
            "insert into t select i, convert_to(repeat('{node}', 800000), 'UTF8') from generate_series(1, 100) i"
        )
    };
    cluster.partition(&[0], &[1]);
    cluster.run(0, &write(0)).await;
    cluster.run(1, &write(1)).await;
    cluster.heal();
    cluster.converge_within(Duration::from_secs(120)).await;
    cluster
        .expect(
            "select count(*) || ' ' || min(length(local_tuple->>'v')) || ' ' || min(length(applied_tuple->>'v')) \
             from anabranch.conflict_history",
            "100 1600002 1600002",
        )
        .await;
}

#[tokio::test]
async fn a_large_transaction_survives_a_kill_in_its_midst() {
    let mut cluster = Cluster::of([15, 15])
        .on_disk()
        .schema("create table bulk (id int primary key, v text)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into bulk select i, 'row number ' || i from generate_series(1, 300000) i",
        )
        .await;
    for wait_ms in [50, 150, 300, 500] {
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        cluster.nodes[0].daemon.kill();
        cluster.nodes[1].daemon.kill();
        let seen = cluster.value(1, "select count(*) from bulk").await;
        assert!(
            ["0", "300000"].contains(&seen.as_str()),
            "half a transaction: {seen} rows"
        );
        cluster.nodes[0].daemon.start();
        cluster.nodes[1].daemon.start();
    }
    cluster.converge_within(Duration::from_secs(120)).await;
    cluster.expect("select count(*) from bulk", "300000").await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn a_daemon_is_started_again_right_behind_a_large_transaction() {
    let mut cluster = Cluster::of([15, 18])
        .schema("create table bulk (id int primary key, v text)")
        .start()
        .await;
    for round in 0..3 {
        cluster
            .run(
                0,
                &format!("insert into bulk select i, 'row ' || i from generate_series({round} * 30000 + 1, {round} * 30000 + 30000) i"),
            )
            .await;
        let end = cluster.value(0, "select pg_current_wal_insert_lsn()").await;
        cluster
            .wait_value(
                0,
                &format!("select confirmed_flush_lsn >= '{end}' from pg_replication_slots where slot_name = 'anabranch'"),
                "t",
            )
            .await;
        cluster.nodes[0].daemon.kill();
        cluster.nodes[0].daemon.start();
        cluster.converge().await;
    }
    cluster.expect("select count(*) from bulk", "90000").await;
    cluster.expect_no_conflict().await;
}

/// Every row that one of three large transactions wrote and another overwrote has its line, at all nodes.
#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn large_transactions_that_collide_with_each_other_lose_nothing_without_a_line() {
    let cluster = Cluster::of([15, 15, 18])
        .config("[conflict_log]\nlines_per_second = 0")
        .schema("create table bulk (id int primary key, by int, v text)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into bulk select i, 0, 'row number ' || i from generate_series(1, 24000) i",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update bulk set by = 1, v = v || ' of the first'"),
            (1, "update bulk set by = 2, v = v || ' of the second'"),
            (2, "delete from bulk where id % 3 = 0"),
        ])
        .await;
    // The second's update has a higher stamp than the first's, and the delete than both.
    cluster
        .expect(
            "select concat_ws(' ', count(*), min(by), max(by)) from bulk",
            "16000 2 2",
        )
        .await;
    // All of the first's writes lost, and a third of the second's; each is one line.
    let lost = "select concat_ws(' ', count(*), count(distinct conflict_id), count(distinct key)) from anabranch.conflict_history";
    for node in 0..3 {
        assert_eq!(
            cluster.value(node, lost).await,
            "32000 32000 24000",
            "at node {node}"
        );
    }
}

/// Lines of more rows than are kept in memory show both rows all the same.
#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn large_transactions_that_collide_show_rows_that_are_read_back_from_the_journal() {
    let cluster = Cluster::of([15, 18])
        .config("[conflict_log]\nlines_per_second = 0")
        .schema("create table bulk (id int primary key, by int, v text)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into bulk select i, 0, repeat(md5(i::text), 96) from generate_series(1, 8000) i",
        )
        .await;
    cluster.converge().await;
    cluster
        .apart(&[
            (0, "update bulk set by = 1, v = v || '1'"),
            (1, "update bulk set by = 2, v = v || '2'"),
        ])
        .await;
    cluster
        .expect("select min(by) || ' ' || max(by) from bulk", "2 2")
        .await;
    let shown = "select concat_ws(' ', count(*), count(distinct key), min(loser), max(loser),
            count(*) filter (where local_tuple->>'by' = '1' and right(local_tuple->>'v', 1) = '1'),
            count(*) filter (where remote_tuple->>'by' = '2' and right(remote_tuple->>'v', 1) = '2'))
        from anabranch.conflict_history";
    assert_eq!(cluster.value(0, shown).await, "8000 8000 local local 8000 8000");
    let mirrored = shown
        .replace("= '1'", "= '0'")
        .replace("= '2'", "= '1'")
        .replace("= '0'", "= '2'");
    assert_eq!(
        cluster.value(1, &mirrored).await,
        "8000 8000 remote remote 8000 8000"
    );
    let kinds = "select string_agg(distinct conflict_type, ' ') from anabranch.conflict_history";
    cluster.expect(kinds, "update_origin_differs").await;
}

/// Of large transactions that collide the log takes some lines, and counts the rest; each loser once.
#[tokio::test]
#[ignore = "long; with others of its kind, see docs/testing.md"]
async fn large_transactions_that_collide_are_counted_whole_where_the_log_takes_few_lines() {
    let cluster = Cluster::of([15, 18])
        .config("[conflict_log]\nlines_per_second = 10\nburst_lines = 500")
        .schema("create table bulk (id int primary key, by int, v text)")
        .schema("create table other (id int primary key)")
        .start()
        .await;
    cluster
        .run(
            0,
            "insert into bulk select i, 0, 'row number ' || i from generate_series(1, 24000) i",
        )
        .await;
    cluster.converge().await;
    cluster.partition(&[0], &[1]);
    // At its end the large one waits for a lock, so it is tried more than once.
    let holders = [cluster.session(0).await, cluster.session(1).await];
    cluster.run(0, "insert into other values (1)").await;
    cluster.run(1, "insert into other values (2)").await;
    for (holder, id) in holders.iter().zip([4, 3]) {
        holder
            .run(&format!("begin; insert into other values ({id})"))
            .await;
    }
    for (node, id) in [(0, 3), (1, 4)] {
        let update = format!("begin; update bulk set by = {id}; insert into other values ({id}); commit");
        cluster.run(node, &update).await;
    }
    cluster.heal();
    let retries = async |node: usize| cluster.status(node).await["apply"]["retries"].as_u64() > Some(0);
    for node in cluster.all() {
        until("it is tried again", async || retries(node).await).await;
    }
    for holder in &holders {
        holder.run("rollback").await;
    }
    cluster.converge().await;
    let lines = "select count(*) from anabranch.conflict_history where table_name = 'bulk'";
    let counted = "select coalesce(sum(count), 0) from anabranch.conflict_storm where table_name = 'bulk'";
    for node in cluster.all() {
        let both = format!("select ({lines}) + ({counted})");
        assert_eq!(cluster.value(node, &both).await, "24000", "at node {node}");
        let few = format!("select ({lines}) between 1 and 5000");
        assert_eq!(cluster.value(node, &few).await, "t", "at node {node}");
    }
}

/// A small file system of its own.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &std::path::Path, mib: u32) -> Self {
        run(std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(at));
        Self(at.to_owned())
    }

    fn resize(&self, mib: u32) {
        run(std::process::Command::new("mount")
            .args(["-o", &format!("remount,size={mib}m")])
            .arg(&self.0));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the daemon may still be ending.
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .status();
    }
}

#[tokio::test]
async fn a_full_disk_stops_the_journal_and_loses_nothing() {
    if !is_root() {
        eprintln!("skipped: mounting needs root");
        return;
    }
    let mut cluster = Cluster::of([15, 15, 15])
        .on_disk()
        .schema(load::SCHEMA)
        .schema("create table bulk (id int primary key, filler text)")
        .config("[journal]\nsegment_mib = 4\n")
        .without_daemons()
        .start()
        .await;
    let disk = SmallDisk::mount(&cluster.nodes[0].data_dir, 48);
    cluster.start_daemons();
    cluster.converge().await;
    // One peer is away, so nothing can be forgotten.
    cluster.nodes[2].daemon.stop();
    let load = Load::start(
        &cluster,
        &[0, 1],
        load::Options {
            seed: 31,
            pause: Duration::from_millis(40),
            ..load::Options::default()
        },
    );
    for batch in 0..24 {
        // Some four MiB that do not compress.
        cluster
            .run(
                batch % 2,
                &format!(
                    "insert into bulk select {batch} * 10000 + i, string_agg(encode(sha512(random()::text::bytea), 'hex'), '') \
                     from generate_series(1, 4096) i, generate_series(1, 8) group by i"
                ),
            )
            .await;
    }
    until("the full disk is an alarm that says what to do", async || {
        let status = cluster.status_or_null(0).await;
        let mut alarms = status["alarms"].as_array().into_iter().flatten();
        alarms.any(|alarm| {
            let text = alarm["text"].as_str().unwrap_or_default();
            alarm["name"] == "journal" && text.contains("free disk space")
        })
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let ledger = load.stop().await;
    // Space returns: it goes on by itself.
    disk.resize(512);
    cluster
        .run(0, "insert into bulk values (-1, 'there is space')")
        .await;
    until_ok("the journal goes on", Duration::from_secs(180), async || {
        let arrived = cluster.value(1, "select count(*) from bulk where id = -1").await;
        if arrived == "1" { Ok(()) } else { Err("not yet") }
    })
    .await;
    cluster.nodes[2].daemon.start();
    cluster.converge_within(Duration::from_secs(180)).await;
    cluster
        .expect("select count(*) from bulk", &(24 * 4096 + 1).to_string())
        .await;
    ledger.account(&cluster).await;
    // Its folder can go once nothing lies on the disk any more.
    cluster.kill_daemons();
    drop(disk);
}

#[tokio::test]
async fn a_small_file_that_cannot_be_written_is_an_alarm_and_not_the_end() {
    let cluster = Cluster::of([15, 15])
        .schema("create table t (id int primary key)")
        .start()
        .await;
    cluster.converge().await;
    // No file takes the place of a folder that holds something, whoever writes it: as on a full disk, for one file alone.
    let dir = &cluster.nodes[0].data_dir;
    let (kept, in_the_way) = (dir.join("publication.json"), dir.join("in-the-way"));
    std::fs::create_dir(&in_the_way).expect("make a folder");
    std::fs::write(in_the_way.join("file"), "").expect("write a file");
    while std::fs::rename(&in_the_way, &kept).is_err() {
        std::fs::remove_file(&kept).expect("take the file away");
    }
    until("it is an alarm", async || {
        has_alarm(&cluster, 0, "publication_file").await
    })
    .await;
    cluster.run(0, "insert into t values (1)").await;
    cluster.run(1, "insert into t values (2)").await;
    cluster.converge().await;
    std::fs::remove_dir_all(&kept).expect("take the folder away");
    until("the file is written again", async || {
        kept.is_file() && !has_alarm(&cluster, 0, "publication_file").await
    })
    .await;
}

/// What a journal may hold in these tests, and more than that.
const SMALL_JOURNAL: &str = "[journal]\nmax_size_mib = 4\nsegment_mib = 1\n";
const MIB: u64 = 1 << 20;
const BULK: &str = "create table bulk (id int primary key, filler text)";

/// Writes so many MiB that do not compress, in transactions of one each, with keys from `first` on.
async fn write_mib(cluster: &Cluster, node: usize, first: u32, mib: u32) {
    for batch in 0..mib {
        let first = first + batch * 1024;
        cluster
            .run(
                node,
                &format!(
                    "insert into bulk select {first} + i, string_agg(encode(sha512(random()::text::bytea), 'hex'), '') \
                     from generate_series(1, 1024) i, generate_series(1, 8) group by i"
                ),
            )
            .await;
    }
}

async fn has_alarm(cluster: &Cluster, node: usize, name: &str) -> bool {
    let alarms = cluster.status_or_null(node).await["alarms"].clone();
    alarms
        .as_array()
        .is_some_and(|alarms| alarms.iter().any(|alarm| alarm["name"] == name))
}

async fn wait_full(cluster: &Cluster, node: usize) {
    until("the journal is full", async || {
        has_alarm(cluster, node, "journal").await
    })
    .await;
}

/// The journals go below their limits again, what was written is confirmed, and all of it without anybody's help.
async fn expect_all_goes_on(cluster: &Cluster, nodes: &[usize]) {
    let mut ends = Vec::new();
    for &node in nodes {
        ends.push(cluster.value(node, "select pg_current_wal_insert_lsn()").await);
    }
    cluster.converge_among(nodes, Duration::from_secs(120)).await;
    for (&node, end) in nodes.iter().zip(&ends) {
        until_ok("its journal shrinks", Duration::from_secs(60), async || {
            let status = cluster.status(node).await;
            let bytes = status["journal"]["bytes"].as_u64().expect("a number");
            match has_alarm(cluster, node, "journal").await || bytes > 4 * MIB {
                false => Ok(()),
                true => Err(format!("node {node}: {}", status["journal"])),
            }
        })
        .await;
        cluster
            .wait_value(
                node,
                &format!("select confirmed_flush_lsn >= '{end}' from pg_replication_slots where slot_name = 'anabranch'"),
                "t",
            )
            .await;
    }
}

#[tokio::test]
async fn a_journal_at_its_limit_goes_on_once_the_member_is_back() {
    let mut cluster = Cluster::of([15, 15])
        .schema(BULK)
        .config(SMALL_JOURNAL)
        .start()
        .await;
    cluster.converge().await;
    cluster.nodes[1].daemon.stop();
    write_mib(&cluster, 0, 0, 16).await;
    wait_full(&cluster, 0).await;
    // While nobody takes anything, nothing more of its own is let in.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let bytes = cluster.status(0).await["journal"]["bytes"]
        .as_u64()
        .expect("a number");
    assert!((3 * MIB..=8 * MIB).contains(&bytes), "{bytes} bytes");
    cluster.nodes[1].daemon.start();
    expect_all_goes_on(&cluster, &[0, 1]).await;
    cluster.expect("select count(*) from bulk", "16384").await;
    cluster.expect_no_conflict().await;
}

/// What each must hear of the other lies behind more than either may write.
#[tokio::test]
async fn two_journals_that_are_both_at_their_limits_go_on_once_they_meet() {
    let cluster = Cluster::of([15, 18])
        .schema(BULK)
        .config(SMALL_JOURNAL)
        .start()
        .await;
    cluster.converge().await;
    cluster.partition(&[0], &[1]);
    // A quarter of the rows at both, so that appliers need the decoder.
    write_mib(&cluster, 0, 0, 12).await;
    write_mib(&cluster, 1, 9 * 1024, 12).await;
    wait_full(&cluster, 0).await;
    wait_full(&cluster, 1).await;
    cluster.heal();
    expect_all_goes_on(&cluster, &[0, 1]).await;
    cluster
        .expect("select count(*) from bulk", &(21 * 1024).to_string())
        .await;
}

#[tokio::test]
async fn a_daemon_killed_at_the_limit_goes_on_and_so_do_three_nodes() {
    let mut cluster = Cluster::of([15, 15, 18])
        .schema(BULK)
        .config(SMALL_JOURNAL)
        .start()
        .await;
    cluster.converge().await;
    cluster.nodes[2].daemon.stop();
    write_mib(&cluster, 0, 0, 6).await;
    write_mib(&cluster, 1, 100_000, 6).await;
    wait_full(&cluster, 0).await;
    wait_full(&cluster, 1).await;
    cluster.nodes[0].daemon.kill();
    write_mib(&cluster, 0, 200_000, 4).await;
    // By itself, though the third is still away.
    cluster.nodes[0].daemon.start();
    wait_full(&cluster, 0).await;
    cluster.nodes[0].daemon.kill();
    cluster.nodes[1].daemon.kill();
    // Also not from the first: what it lacks is passed on.
    cluster.partition(&[0], &[2]);
    for node in 0..3 {
        if !cluster.nodes[node].daemon.runs() {
            cluster.nodes[node].daemon.start();
        }
    }
    write_mib(&cluster, 2, 300_000, 6).await;
    expect_all_goes_on(&cluster, &[0, 1, 2]).await;
    cluster
        .expect("select count(*) from bulk", &(22 * 1024).to_string())
        .await;
    cluster.expect_no_conflict().await;
}

#[tokio::test]
async fn a_member_is_dropped_although_the_journals_are_at_their_limits() {
    let mut cluster = Cluster::of([15, 15, 15])
        .schema(BULK)
        .config(SMALL_JOURNAL)
        .start()
        .await;
    cluster.converge().await;
    cluster.nodes[2].daemon.kill();
    write_mib(&cluster, 0, 0, 8).await;
    write_mib(&cluster, 1, 100_000, 8).await;
    wait_full(&cluster, 0).await;
    wait_full(&cluster, 1).await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    tokio::time::timeout(
        Duration::from_secs(120),
        anabranch_ok(&["node", "drop", "n3", "--config", &config]),
    )
    .await
    .expect("the drop ends");
    expect_all_goes_on(&cluster, &[0, 1]).await;
    for node in 0..2 {
        let count = cluster.value(node, "select count(*) from bulk").await;
        assert_eq!(count, (16 * 1024).to_string(), "at node {node}");
    }
}

#[tokio::test]
#[ignore = "minutes; run by name, see docs/testing.md"]
async fn a_steady_load_of_three_thousand_transactions_a_second_is_milliseconds_behind() {
    let cluster = Cluster::of([15, 15, 15])
        .on_disk()
        .schema(
            "create table event (id bigint primary key, node int, at timestamptz default clock_timestamp())",
        )
        .start()
        .await;
    let mut writers = Vec::new();
    for node in cluster.all() {
        let config = cluster.nodes[node].server.config("app", "app");
        writers.push(tokio::spawn(async move {
            let session = anabranch_tests::Session::connect(&config, "writer")
                .await
                .expect("connect");
            let mut ticks = tokio::time::interval(Duration::from_millis(1));
            for id in 0..20_000_i64 {
                ticks.tick().await;
                session
                    .run(&format!(
                        "insert into event (id, node) values ({}, {node})",
                        id * 3 + node as i64
                    ))
                    .await;
            }
        }));
    }
    // One clock for both ends: how old is what arrives, when it becomes visible.
    let mut lags_us = Vec::new();
    let reader = cluster.session(1).await;
    let mut last = 0;
    while !writers.iter().all(tokio::task::JoinHandle::is_finished) {
        let seen = reader
            .rows(&format!(
                "select max(id), extract(epoch from clock_timestamp() - max(at)) * 1000000 from event where node = 0 and id > {last}"
            ))
            .await;
        if let [Some(id), Some(lag)] = seen[0].as_slice() {
            last = id.parse().expect("a number");
            lags_us.push(lag.parse::<f64>().expect("a number") as i64);
        }
        // Two cores for everything: looking must not become the load.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for writer in writers {
        writer.await.expect("the writer succeeds");
    }
    lags_us.sort_unstable();
    let at = |share: f64| lags_us[((lags_us.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
    println!(
        "lag over {} looks: p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        lags_us.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
    until_ok("all have arrived", Duration::from_secs(60), async || {
        let count = reader.number("select count(*) from event").await;
        if count == 60_000 { Ok(()) } else { Err(count) }
    })
    .await;
    cluster.converge().await;
}
