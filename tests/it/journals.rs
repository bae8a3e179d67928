//! A node whose journal is lost or damaged, while its server and slot are there: `anabranch heal` makes it anew of what the
//! others hold.

use std::fs;
use std::path::PathBuf;

use anabranch_tests::Cluster;
use anabranch_tests::cluster::create_cluster;
use anabranch_tests::daemon::{anabranch_ok, anabranch_refuses};
use anabranch_tests::postgres::DATABASE;
use anabranch_tests::wait::until;
use serde_json::Value;

use crate::heals::{
    ITEMS, ROWS, base, heal, heal_refuses, healed, horizon_passes, keys, lost, record, refuses,
};

/// Files of the journal, the oldest first.
pub(crate) fn segments(cluster: &Cluster, node: usize) -> Vec<PathBuf> {
    let folder = fs::read_dir(cluster.nodes[node].data_dir.join("journal")).expect("list the journal");
    let mut files: Vec<PathBuf> = folder.map(|file| file.expect("a file").path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "seg"));
    files.sort();
    files
}

/// Where the slot is, and how far the other holds this node's stream, are one place: nothing is under way.
async fn all_is_sent(cluster: &Cluster) {
    let admin = cluster.admin(0).await;
    let confirmed =
        "select (confirmed_flush_lsn - '0/0')::int8 from pg_replication_slots where slot_name = 'anabranch'";
    let applied = "select (lsn - '0/0')::int8 from anabranch.progress where origin = 1";
    until("the other has what the slot has passed", async || {
        let confirmed = admin.number(confirmed).await;
        cluster.value(1, applied).await.parse::<i64>().expect("a number") >= confirmed
    })
    .await;
}

/// Both sides write one row and others while the daemon of node 0 is down, and after its heal all is as after any outage.
async fn comes_back(cluster: &mut Cluster, report: &Value) {
    assert_eq!(report["journal_made_anew"], true, "{report:#}");
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=n2 2=local 3=remote 4=base 5=base 6=base 7=local")
        .await;
    let lost = lost(cluster).await;
    assert!(lost.len() == 1 && lost[0].starts_with("1 "), "{lost:?}");
    // And over restarts.
    cluster.nodes[0].daemon.kill();
    cluster.run(0, "update item set v = 'again' where id = 4").await;
    cluster.run(1, "update item set v = 'again' where id = 5").await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=n2 2=local 3=remote 4=again 5=again 6=base 7=local")
        .await;
    assert_eq!(cluster.conflicts().await.len(), 1);
    cluster.expect_no_drift();
}

async fn apart(cluster: &Cluster) {
    cluster
        .run(
            0,
            "update item set v = 'local' where id in (1, 2); insert into item values (7, 'local')",
        )
        .await;
    // Later, and without having seen it.
    cluster.run(1, "update item set v = 'n2' where id = 1").await;
    cluster.run(1, "update item set v = 'remote' where id = 3").await;
}

#[tokio::test]
async fn a_lost_journal_is_made_anew_of_what_the_others_hold() {
    let mut cluster = Cluster::of([15, 18]).schema(ITEMS).start().await;
    base(&cluster, 0, 6).await;
    all_is_sent(&cluster).await;
    cluster.nodes[0].daemon.stop();
    let folder = cluster.nodes[0].data_dir.clone();
    // All of it, or the journal alone.
    fs::remove_dir_all(folder.join("journal")).expect("lose the journal");
    apart(&cluster).await;
    refuses(&mut cluster, 0, "anabranch heal");

    // The only one that has it is down.
    cluster.nodes[1].daemon.stop();
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = heal_refuses(&config, &["--wait", "1"]).await;
    assert!(said.contains("Every other member is needed"), "{said}");
    cluster.nodes[1].daemon.start();
    let (code, report) = heal(&cluster, 0, &["--dry-run"]).await;
    assert!(
        code == 0 && report["notes"].to_string().contains("would be made anew"),
        "{report:#}"
    );
    refuses(&mut cluster, 0, "anabranch heal");
    let report = healed(&mut cluster, 0, &[]).await;
    comes_back(&mut cluster, &report).await;
}

#[tokio::test]
async fn a_lost_journal_is_made_anew_also_where_the_others_have_let_go_of_the_beginning() {
    let mut cluster = Cluster::of([15, 18])
        .schema(ITEMS)
        .schema("create table bulk (id int primary key, filler text not null)")
        .config("[journal]\nsegment_mib = 1\n")
        .start()
        .await;
    base(&cluster, 0, 6).await;
    let oldest = || segments(&cluster, 1).into_iter().next();
    let first = oldest();
    // Some MiB that do not compress.
    cluster
        .run(
            0,
            "insert into bulk select i, string_agg(md5(random()::text), '') \
             from generate_series(1, 400) i, generate_series(1, 320) group by i",
        )
        .await;
    until("the other has let go of its first file", async || {
        oldest() > first
    })
    .await;
    all_is_sent(&cluster).await;
    cluster.nodes[0].daemon.stop();
    fs::remove_dir_all(cluster.nodes[0].data_dir.join("journal")).expect("lose the journal");
    apart(&cluster).await;
    let report = healed(&mut cluster, 0, &[]).await;
    comes_back(&mut cluster, &report).await;
}

#[tokio::test]
async fn a_damaged_journal_is_made_anew_and_the_old_one_is_kept() {
    let mut cluster = Cluster::of([18, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 6).await;
    all_is_sent(&cluster).await;
    cluster.nodes[0].daemon.kill();
    // In the first frames: what comes behind them was durable.
    let file = segments(&cluster, 0).remove(0);
    let mut bytes = fs::read(&file).expect("read a segment");
    for byte in &mut bytes[400..600] {
        *byte ^= 0x5a;
    }
    fs::write(&file, &bytes).expect("damage a segment");
    apart(&cluster).await;
    refuses(&mut cluster, 0, "is damaged at byte");
    let report = healed(&mut cluster, 0, &[]).await;
    assert!(
        report["notes"].to_string().contains("is damaged at byte"),
        "{report:#}"
    );
    let kept = fs::read_dir(&cluster.nodes[0].data_dir).expect("list the folder");
    let kept = kept.filter(|file| {
        let name = file.as_ref().expect("a file").file_name();
        name.to_string_lossy().starts_with("journal.lost-")
    });
    assert_eq!(kept.count(), 1);
    comes_back(&mut cluster, &report).await;
}

#[tokio::test]
async fn what_no_other_journal_holds_is_written_again_from_the_tables() {
    let mut cluster = Cluster::of([15, 15]).schema(ITEMS).start().await;
    base(&cluster, 0, 6).await;
    // Journalled and confirmed, and sent to nobody.
    cluster.nodes[1].daemon.stop();
    cluster
        .run(
            0,
            "update item set v = 'alone' where id <= 2; insert into item values (7, 'alone')",
        )
        .await;
    horizon_passes(&cluster, 0).await;
    cluster.nodes[0].daemon.kill();
    fs::remove_dir_all(cluster.nodes[0].data_dir.join("journal")).expect("lose the journal");
    cluster.run(0, "update item set v = 'later' where id = 3").await;
    cluster
        .run(1, "update item set v = 'n2' where id in (2, 4)")
        .await;
    cluster.nodes[1].daemon.start();
    cluster.status(1).await;
    // Without what tells which rows they are nothing can be done.
    let horizon = cluster.nodes[0].data_dir.join("horizon.json");
    let kept = fs::read(&horizon).expect("read horizon.json");
    fs::remove_file(&horizon).expect("lose horizon.json");
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = heal_refuses(&config, &[]).await;
    assert!(
        said.contains("this node is lost") && said.contains("horizon.json"),
        "{said}"
    );
    fs::write(&horizon, kept).expect("put horizon.json back");

    let report = healed(&mut cluster, 0, &[]).await;
    assert_eq!(report["journal_made_anew"], true, "{report:#}");
    assert_eq!(
        keys(&record(&report, "written again")),
        [1, 2, 3, 7],
        "{report:#}"
    );
    cluster.converge().await;
    cluster
        .expect(ROWS, "1=alone 2=n2 3=later 4=n2 5=base 6=base 7=alone")
        .await;
    let lost = lost(&cluster).await;
    assert!(lost.len() == 1 && lost[0].starts_with("2 "), "{lost:?}");
    cluster.nodes[0].daemon.kill();
    cluster.run(0, "update item set v = 'again' where id = 1").await;
    cluster.nodes[0].daemon.start();
    cluster.converge().await;
    cluster.expect("select v from item where id = 1", "again").await;
}

#[tokio::test]
async fn a_node_that_is_alone_begins_anew_when_its_journal_is_lost() {
    let mut cluster = Cluster::of([15]).bare().schema(ITEMS).start().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    create_cluster(&cluster.nodes[0]).await;
    cluster.nodes[0].daemon.start();
    cluster
        .run(
            0,
            "insert into item select i, 'base' from generate_series(1, 20) i",
        )
        .await;
    horizon_passes(&cluster, 0).await;
    cluster.nodes[0].daemon.stop();
    fs::remove_dir_all(cluster.nodes[0].data_dir.join("journal")).expect("lose the journal");
    for more in [&["--dry-run"][..], &[]] {
        let said = anabranch_refuses(&[&["heal", "--config", &config], more].concat()).await;
        assert!(
            said.contains("no other node") && said.contains("anabranch cluster create"),
            "{said}"
        );
        assert!(!said.contains("node drop"), "{said}");
    }
    // As it is told. (The server notices a moment later that nobody reads.)
    let reads = "select count(*) from pg_replication_slots where active";
    cluster.wait_value(0, reads, "0").await;
    let admin = cluster.nodes[0].server.dsn("postgres", DATABASE);
    anabranch_ok(&["remove", "--config", &config, "--admin-dsn", &admin, "--yes"]).await;
    create_cluster(&cluster.nodes[0]).await;
    cluster.nodes[0].daemon.start();
    let node = cluster.add_server(15).await;
    cluster.join(node, 0).await;
    cluster.nodes[node].daemon.start();
    cluster.wait_writable(node).await;
    cluster
        .run(node, "update item set v = 'joined' where id = 1")
        .await;
    cluster.converge().await;
    cluster
        .expect("select count(*) || min(v) || max(v) from item", "20basejoined")
        .await;
}
